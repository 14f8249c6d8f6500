"""The CTC loss against the same steps, each in real numbers that are rounded once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.operators import ctc
from tests.arithmetic.strategies import tensors
from verification import oracle as o
from verification.oracle import INF, NAN, Real, check, real, reals, rounded, same_bits, total

few = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
NOTHING = Real(-INF)
ctc_loss: Any = torch.nn.functional.ctc_loss  # which takes lists of lengths, too


def added(terms: Any, y: Any) -> Any:
    """Return log of the sum of exponentials + y, rounded."""
    terms = [x for x in terms if x.v != -INF]
    if not terms or y.v == -INF:
        return NOTHING
    top = max(terms, key=lambda x: x.mpf)
    value = top + y + o.log(total([o.exp(x - top) for x in terms]))
    return rounded(np.array([value], dtype=object))[0]


def steps(y: Any, labels: Any, blank: int) -> list[list[Any]]:
    """Return alpha for log probabilities y [t, c] and the labels with blanks."""
    rows: list[list[Any]] = []
    for t in range(len(y)):
        row = []
        for s, label in enumerate(labels):
            if t == 0:
                row.append(y[0][label] if s < 2 else NOTHING)
                continue
            before = [rows[-1][s]] + ([rows[-1][s - 1]] if s else [])
            if s > 1 and label not in (blank, labels[s - 2]):
                before.append(rows[-1][s - 2])
            row.append(added(before, y[t][label]))
        rows.append(row)
    return rows


def loss_and_gradient(y: Any, target: Any, blank: int) -> tuple[Any, Any]:
    labels = [blank, *(x for t in target for x in (t, blank))]
    gradient = np.full(y.shape, Real(0), dtype=object)
    if not len(y):
        return Real(INF if target else 0), gradient
    alpha = steps(y, labels, blank)
    beta = [row[::-1] for row in steps(y[::-1], labels[::-1], blank)[::-1]]
    loss = -added(alpha[-1][-2:], Real(0))
    for t, c in np.ndindex(y.shape):
        if loss.v == INF:
            gradient[t, c] = Real(NAN)
            continue
        terms = []
        for s, label in enumerate(labels):
            a, b = alpha[t][s], beta[t][s]
            if label == c and NOTHING.v not in (a.v, b.v):
                terms.append(o.exp(a + b + loss - y[t][c]))
        terms = list(rounded(np.array(terms, dtype=object))) if terms else [Real(0)]
        p = rounded(np.array([total(terms)], dtype=object))[0]
        gradient[t, c] = o.exp(y[t][c]) - p
    return loss, gradient


# Beside these most terms vanish. None differ by 750 to 850, where the contract's 2^-1100 and the oracle's
# 1,200 bits may decide a tie differently.
DISTANT = [0, -1, -(2.0**-24), -(2.0**-149), -30, -103, -110, -2000, -(2.0**24) + 1]
DISTANT += [-3.0 * 2**23, -(2.0**45), -1e30 - 2.0**80, -1e30]
NUMBERS = st.floats(-6, 0, width=32) | st.sampled_from([float(torch.tensor(x)) for x in DISTANT])


@st.composite
def problems(draw: Any) -> Any:
    t, n, c = draw(st.integers(1, 5)), draw(st.integers(1, 2)), draw(st.integers(2, 3))
    x = draw(tensors((t, n, c), draw(st.sampled_from([st.floats(-6, 0, width=32), NUMBERS]))))
    blank = draw(st.integers(0, c - 1))
    words = st.lists(st.sampled_from([k for k in range(c) if k != blank]), max_size=3)
    targets = [draw(words) for _ in range(n)]
    lengths = [draw(st.integers(0, t)) for _ in range(n)]
    return x, targets, lengths, blank


@pytest.mark.usefixtures("path")
@few
@given(problems(), st.booleans())
def test_each_step_is_rounded_once(problem, concatenated):
    x, targets, lengths, blank = problem
    sizes = [len(w) for w in targets]
    if concatenated:
        words = torch.tensor([i for w in targets for i in w], dtype=torch.int64)
    else:
        words = torch.full((len(targets), 4), 1 - min(blank, 1), dtype=torch.int64)
        for i, w in enumerate(targets):
            words[i, : len(w)] = torch.tensor(w, dtype=torch.int64)
    leaf: Any = x.detach().clone().requires_grad_()
    weights = torch.tensor([0.75, -1.5])[: len(targets)]
    with reproml.exact():
        loss = ctc_loss(leaf, words, lengths, sizes, blank, "none")
        loss.backward(weights)
        same = ctc_loss(x, words, torch.tensor(lengths), torch.tensor(sizes), blank, "none")
    assert same_bits(loss.detach(), same)
    for i, (target, length) in enumerate(zip(targets, lengths)):
        y = reals(x[:length, i])
        y = y.reshape(length, x.shape[2])
        expected, gradient = loss_and_gradient(y, target, blank)
        check(loss.detach()[i : i + 1], [expected], True)
        if length:
            check(leaf.grad[:length, i], gradient * real(weights[i].item()), True)
        assert not leaf.grad[length:, i].any()


def test_target_without_path_is_infinite():
    x: Any = torch.zeros(2, 1, 3, requires_grad=True)
    with reproml.exact():
        loss = ctc_loss(x, torch.tensor([[1, 1]]), [2], [2])
        none = ctc_loss(x, torch.tensor([[1, 1]]), [2], [2], zero_infinity=True)
        none.backward()
    assert loss.item() == float("inf") and none.item() == 0 and not x.grad.any()


@pytest.mark.usefixtures("path")
def test_exponential_of_a_sum_is_rounded_once():
    """The terms cancel, or leave what decides whether the exponential underflows or overflows."""
    random = torch.Generator().manual_seed(3)
    large = torch.randn(40, generator=random) * 1e30
    rests = torch.tensor(
        [0, -0.0, 1, -90, -103.5, -104, -109, -111, 88.7, 88.8, 99, 101, -1e8, 1e8]
    )
    a = torch.cat([large, rests, rests])
    c = torch.cat([-large * 2**-20, -rests, rests * 2**-25])
    d = torch.cat([torch.zeros(40), rests, -rests.flip(0)])
    b = torch.cat([-large, torch.zeros(2 * len(rests))])
    operands = a, b, c, d
    total = [sum(map(Fraction, row), Fraction(0)) for row in zip(*[x.tolist() for x in operands])]
    expected = [o.exp(Real(x)) for x in total]
    check(ctc._exp_of_sum(*operands), expected)


def test_loss_is_close_to_pytorch():
    torch.manual_seed(0)
    x = torch.randn(30, 4, 7).log_softmax(2).requires_grad_()
    targets, lengths = torch.randint(1, 7, (4, 9)), [30, 22, 25, 18]
    native = ctc_loss(x, targets, lengths, [9, 8, 1, 0])
    (expected,) = torch.autograd.grad(native, x)
    with reproml.exact():
        exact = ctc_loss(x, targets, lengths, [9, 8, 1, 0])
        (found,) = torch.autograd.grad(exact, x)
    assert torch.allclose(native, exact, rtol=1e-5)
    assert torch.allclose(expected, found, atol=1e-5)
