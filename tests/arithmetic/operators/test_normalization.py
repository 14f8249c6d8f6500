"""Test the normalizations: compiled path and reference path against the oracle and against each other."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.operators import normalization
from tests.arithmetic.forms import KINDS, agree, numbers, with_threads
from tests.arithmetic.strategies import LAYOUTS, MODERATE, SMALL_INTEGERS, lay_out, tensors
from tests.arithmetic.test_operator_table import CASES, TESTS, compare
from verification.oracle import Real, check

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
EPS = 1e-5
ALL = [True, True, True]


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("name", [name for name in sorted(CASES) if "_norm" in name])
@TESTS
@given(data=st.data())
def test_each_path_is_rounded_once(path, name, data):
    with pytest.MonkeyPatch.context() as m:
        if path == "reference":
            m.setattr(kernels, "library", None)
        for case in CASES[name]:
            compare(name, case, data.draw(case.draw))


def parameters(shape, affine):
    if not affine:
        return None, None
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return numbers(shape, seed=2), numbers(shape, "integers", seed=3)


def batch_norm(x, weight, bias, training, momentum=0.1, eps=EPS):
    """Return the operator's results and the updated running statistics."""
    c = x.shape[1]
    mean, var = numbers((c,), seed=4), numbers((c,), seed=5).abs()
    result = normalization.batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return (*result, mean, var)


def check_batch_norm(x, g, weight, bias, momentum=0.1):
    *_, mean, var = agree(batch_norm, x, weight, bias, False)
    _, m, r, *_ = agree(batch_norm, x, weight, bias, True, momentum)
    for train in (True, False):
        agree(normalization.batch_norm_backward, g, x, weight, mean, var, m, r, train, EPS, ALL)


def check_layer_norm(x, g, shape, weight, bias):
    shape = list(shape)
    _, m, r = agree(normalization.layer_norm, x, shape, weight, bias, EPS)
    agree(normalization.layer_norm_backward, g, x, shape, m, r, weight, bias, ALL)


def check_group_norm(x, g, groups, weight, bias):
    n, c = x.shape[:2]
    sizes = (n, c, x[0, 0].numel(), groups)
    _, m, r = agree(normalization.group_norm, x, weight, bias, *sizes, EPS)
    agree(normalization.group_norm_backward, g, x, m, r, weight, *sizes, ALL)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [(4, 6, 5, 5), (3, 1, 4, 4), (9, 4), (2, 6, 7), (2, 2, 3, 3), (1, 2, 1), (2, 4, 12, 13)],
)
def test_compiled_path_matches_reference(shape, kind, affine):
    c, places = shape[1], tuple(shape[2:])
    x = numbers(shape, kind)
    for i, g in enumerate((numbers(shape, seed=1), numbers(shape, "ties", 1), x)):
        x, g = lay_out(x, LAYOUTS[i]), lay_out(g, LAYOUTS[-i])
        weight, bias = parameters(c, affine)
        check_batch_norm(x, g, weight, bias, momentum=(0.1, 0.5, 1.0)[i])
        check_layer_norm(x, g, shape[1:], *parameters(shape[1:], affine))
        if places:
            check_layer_norm(x, g, shape[-1:], *parameters(shape[-1], affine))
            for groups in {1, 2 if c % 2 == 0 else c, c}:
                check_group_norm(x, g, groups, *parameters(c, affine))


@pytest.mark.parametrize("kind", ["normal", "far"])
def test_long_rows_match_reference(kind):
    x, g = numbers((2, 2, 3, 6_001), kind), numbers((2, 2, 3, 6_001), seed=1)
    check_batch_norm(x, g, *parameters(2, True))
    check_layer_norm(x, g, x.shape[-1:], *parameters(6_001, True))


def test_short_rows_match_reference():
    x, g = numbers((3000, 5)), numbers((3000, 5), seed=1)
    check_layer_norm(x, g, (5,), *parameters(5, True))
    check_layer_norm(x[:, :1], g[:, :1], (1,), *parameters(1, True))
    check_batch_norm(x, g, *parameters(5, True))


def test_weight_or_bias_alone_matches_reference():
    x, g = numbers((7, 5)), numbers((7, 5), seed=1)
    weight, bias = parameters(5, True)
    for pair in ((weight, None), (None, bias)):
        check_layer_norm(x, g, (5,), *pair)
        check_batch_norm(x, g, *pair)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_non_finite_input_matches_reference(value):
    x, g = numbers((3, 4, 3, 3)), numbers((3, 4, 3, 3), seed=1)
    x[1, 2, 0, 0] = value
    check_batch_norm(x, g, *parameters(4, True))
    check_batch_norm(g, x, *parameters(4, True))
    check_layer_norm(x, g, (3,), *parameters(3, True))
    check_group_norm(g, x, 2, *parameters(4, True))


def test_channels_last_and_empty_match_reference():
    x, g = (numbers((3, 4, 5, 5), seed=s).to(memory_format=torch.channels_last) for s in (0, 1))
    check_batch_norm(x, g, *parameters(4, True))
    check_group_norm(x, g, 2, *parameters(4, True))
    agree(normalization.layer_norm, torch.empty(0, 3), [3], None, None, EPS)


def test_result_is_independent_of_threads():
    x, g = numbers((6, 9, 30, 31)), numbers((6, 9, 30, 31), seed=1)
    weight, bias = parameters(9, True)
    with_threads(batch_norm, x, weight, bias, True)
    _, m, r, mean, var = batch_norm(x, weight, bias, True)
    with_threads(normalization.batch_norm_backward, g, x, weight, mean, var, m, r, True, EPS, ALL)
    rows, g_rows = x.reshape(-1, 31), g.reshape(-1, 31)
    weight, bias = parameters(31, True)
    with_threads(normalization.layer_norm, rows, [31], weight, bias, EPS)
    _, m, r = normalization.layer_norm(rows, [31], weight, bias, EPS)
    backward = normalization.layer_norm_backward
    with_threads(backward, g_rows, rows, [31], m, r, weight, bias, ALL)


# ---- elements and statistics that fail the rounding test ---------------------------------------------


@pytest.fixture
def left(monkeypatch):
    """Record how many elements each kernel call returned as failed; None for too many."""
    counts = []
    run_kernel = kernels.run_kernel

    def counted(*arguments):
        result = run_kernel(*arguments)
        count = 0 if result.failed is None else len(result.failed)
        counts.append(count if result.complete else None)
        return result

    monkeypatch.setattr(kernels, "run_kernel", counted)
    return counts


def test_kernel_rounds_statistics_that_are_ties(left):
    """The mean, the variance and the sums are ties or zero, so all fail the first rounding test."""
    x = (
        torch.tensor([[1.0, 1 + 2.0**-23], [4097.0, 0.0], [3.0, 3.0]])
        .repeat(1, 8)
        .reshape(1, 3, 16)
    )
    g = torch.tensor([[1.0, 2.0**-24], [1.0, -1.0], [0.0, -0.0]]).repeat(1, 8).reshape(1, 3, 16)
    g[0, 0, 1:-1] = 0.0
    check_batch_norm(x, g, *parameters(3, True))
    check_layer_norm(x, g, (16,), *parameters(16, True))
    check_group_norm(x, g, 3, *parameters(3, True))
    check_group_norm(x.transpose(0, 1).contiguous(), g.transpose(0, 1).contiguous(), 1, None, None)
    assert None not in left


def test_statistics_needing_fractions_use_reference_path(left):
    x = torch.tensor([2.0**80, 1.0, -(2.0**80), -1.0] * 4).reshape(1, 1, 16)
    g = torch.ones_like(x)
    check_batch_norm(x, g, None, None)
    check_layer_norm(x, g, (16,), None, None)
    assert None in left


def ties(n):
    """Return x of mean 0 and variance 1, a weight and a bias with which every second output is a tie."""
    x = torch.tensor([1.0, -1.0]).repeat(n // 2).reshape(1, 1, n)
    return x, torch.ones(1), torch.full((1,), 2.0**-24)


def exact(formula, *operands):
    """Evaluate a formula of rational numbers on each element of operands that broadcast together."""
    operands = torch.broadcast_tensors(*operands)
    values = [
        formula(*(Fraction(v) for v in row))
        for row in zip(*(t.reshape(-1).tolist() for t in operands))
    ]
    result = np.empty(len(values), dtype=object)
    result[:] = [Real(v) for v in values]
    return result.reshape(operands[0].shape)


@pytest.mark.parametrize("n", [16, 2000])
def test_kernel_rounds_elements_that_are_ties(left, n):
    """The mean is 0 and the variance 1, so every second output is a midpoint."""
    x, weight, bias = ties(n)
    out, mean, rstd, *_ = agree(batch_norm, x, weight, bias, True, 0.1, 0.0)
    assert mean.item() == 0 and rstd.item() == 1
    check(out, exact(lambda x, w, b: x * w + b, x, weight, bias))
    shape = [n]
    across = weight.expand(n).contiguous(), bias.expand(n).contiguous()
    rows, *_ = agree(normalization.layer_norm, x, shape, *across, 0.0)
    check(rows, exact(lambda x, w, b: x * w + b, x, weight, bias))
    assert left == [0] * 2


@pytest.mark.parametrize("n", [16, 2000])
def test_elements_failing_in_kernel_match_reference(left, n):
    """Pairs lose the last bits of x - mean here. Many failures take the reference path."""
    x = torch.full((1, 1, n), 2.0**100)
    x[..., ::2] = 1.0
    mean, one = torch.tensor([-(2.0**20) * (1 + 2.0**-23)]), torch.ones(1)
    weight, bias = one * 1.5, one * (-1.5 * 2.0**100)
    out, *_ = agree(normalization.batch_norm, x, weight, bias, mean, one, False, 0.1, 0.0)
    check(out, exact(lambda x, m, w, b: (x - m) * w + b, x, mean, weight, bias))
    assert left == [8 if n == 16 else None]


@TESTS
@given(data=st.data())
def test_gradients_that_cancel_are_correctly_rounded(data):
    """The gradient is constant or the row itself, as in `layer_norm(x).sum().backward()`."""
    n = data.draw(st.sampled_from([2, 5, 16, 33]))
    x = data.draw(tensors((n,), data.draw(st.sampled_from([SMALL_INTEGERS, MODERATE]))))
    g = data.draw(st.sampled_from([torch.ones(n), x.clone(), torch.full((n,), 0.1), -x]))
    w = data.draw(
        st.sampled_from(
            [torch.ones(n), torch.full((n,), 3.0), data.draw(tensors((n,), SMALL_INTEGERS))]
        )
    )
    m, r = (
        data.draw(st.sampled_from([0.0, 1 / 3, 2.0**-30])),
        data.draw(st.sampled_from([1.0, 0.5, 0.7, 1e-3])),
    )
    m, r = (torch.tensor([v], dtype=torch.float32) for v in (m, r))
    found, *_ = normalization.layer_norm_backward(g, x, [n], m, r, w, None, ALL)
    terms = list(zip(*(map(Fraction, t.tolist()) for t in (g, w, x))))
    mean, rstd = Fraction(m.item()), Fraction(r.item())
    a = Fraction(nearest(sum((g * w for g, w, _ in terms), Fraction(0))))
    b = Fraction(nearest(sum((g * w * (x - mean) * rstd for g, w, x in terms), Fraction(0))))
    values = [Real(rstd * (w * g - (a + (x - mean) * rstd * b) / n)) for g, w, x in terms]
    assert found is not None
    check(found, values, any_zero=True)
    agree(normalization.layer_norm_backward, g, x, [n], m, r, w, None, ALL)
    agree(normalization.layer_norm_backward, g, x, [n], m, -r, w, None, ALL)
    image, of_image = x.reshape(1, 1, n), g.reshape(1, 1, n)
    for given_statistics in (True, False):
        arguments = of_image, image, w[:1], m, r.square(), m, r, not given_statistics, 0.0, ALL
        agree(normalization.batch_norm_backward, *arguments)


@pytest.mark.parametrize("r", [1.0, -1.0])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_gradient_zero_by_cancellation_has_reference_sign(zero, r):
    x, g = torch.tensor([[-1.0, 1.0]]), torch.tensor([[zero, 1.0]])
    mean, rstd = torch.zeros(1), torch.tensor([r])
    agree(normalization.layer_norm_backward, g, x, [2], mean, rstd, None, None, ALL)


def test_gradients_failing_the_first_test_match_reference(left):
    x, weight, _ = ties(16)
    g = torch.zeros_like(x)
    g[..., 0], g[..., 1], g[..., 2] = 1.0, 2.0**-20, -(2.0**-20)
    one, zero = torch.ones(1), torch.zeros(1)
    for w in (weight, weight * 3 + 2.0**-12):
        backward = normalization.batch_norm_backward
        for train in (True, False):
            agree(backward, g * (1 + 2.0**-12), x, w, zero, one, zero, one, train, 0.0, ALL)
        agree(
            normalization.layer_norm_backward,
            g,
            x,
            [16],
            zero,
            one,
            w.expand(16).contiguous(),
            None,
            ALL,
        )
    assert None not in left
