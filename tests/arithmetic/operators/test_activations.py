"""Inputs that fail the rounding test in masses: no element may take the slow path of long numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any

import mpmath
import pytest
import torch
from torch.nn import functional as F

import reproml
from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import evaluate, kernels, pair_arrays
from reproml.arithmetic.numerics.rounding import nearest
from tests.arithmetic.forms import agree
from verification import oracle
from verification.oracle import Real, check, reals, same_bits

UNIT = Fraction(2) ** -149
GELU_TANH = partial(F.gelu, approximate="tanh")


@pytest.fixture(params=[True, False], ids=["compiled", "reference"])
def no_long_numbers(monkeypatch, request):
    if not request.param:
        monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(evaluate, "exact_values", None)
    monkeypatch.setattr(evaluate, "exact_elements", None)


@pytest.mark.parametrize("f", [F.gelu, GELU_TANH, F.silu])
def test_half_of_subnormal_numbers_is_rounded_up_at_ties(no_long_numbers, f):
    """x / 2 + c x^2 with c > 0: between a midpoint and the next number above."""
    counts = [1, 2, 3, 4, 5, 2**22 + 1, 2**23 - 1, 2**23 + 1, 2**24 - 1]
    x = torch.tensor([float(sign * n * UNIT) for n in counts for sign in (1, -1)] + [0.0, -0.0])
    with reproml.exact():
        y = f(x)
    above = [Fraction(v) / 2 + UNIT / 2**60 * (v != 0) for v in x.tolist()]
    expected = torch.tensor([nearest(v) for v in above]).copysign(x)
    assert y.view(torch.int32).tolist() == expected.view(torch.int32).tolist()


FAR = [33.0, 1e3, 1e7, 2.0**24 + 2, 2.0**127, -1100.0, -1e7, -(2.0**127)]


@pytest.mark.parametrize("f", [F.gelu, GELU_TANH, F.mish])
def test_values_far_from_zero_are_x_or_minus_zero(no_long_numbers, f):
    x = torch.tensor(FAR, requires_grad=True)
    g = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-45, 3e38, -1.0, 0.0])
    with reproml.exact():
        y = f(x)
        (gradient,) = torch.autograd.grad(y, x, g)
    assert y.tolist() == [v if v > 0 else 0.0 for v in FAR]
    assert y.signbit().tolist() == [v < 0 for v in FAR]
    # the derivative is 1 there, and a negative number next to 0 here
    assert gradient.tolist() == [v if x > 0 else 0.0 for v, x in zip(g.tolist(), FAR)]
    assert gradient.signbit().tolist() == [(v.signbit() ^ (x < 0)).item() for v, x in zip(g, FAR)]


@pytest.mark.parametrize("scale", [1e4, 1e7, 1e30])
def test_log_softmax_of_distant_logits(no_long_numbers, scale):
    """The largest logit alone counts: the others' values are rounded differences."""
    torch.manual_seed(1)
    x = torch.rand(20, 9).sort(1).values * scale
    x[:, -1] += scale  # alone
    with reproml.exact():
        y = x.log_softmax(1)
        loss = F.cross_entropy(x, torch.zeros(20, dtype=torch.long), reduction="none")
    for row, found in zip(x.tolist(), y.tolist()):
        assert found == [nearest(Fraction(v) - Fraction(row[-1])) for v in row]
    assert y[:, -1].signbit().all() and torch.equal(loss, -y[:, 0])


@pytest.mark.parametrize("n", [3, 300, 2500])
def test_gradient_of_saturated_rows_takes_no_row_exactly(n, monkeypatch):
    """With its own softmax as target, the largest element cancels beyond pairs, but the others do not."""
    monkeypatch.setattr(evaluate, "exact_rows", None)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)) * 50
    with reproml.exact():
        y, g = x.log_softmax(1), -x.softmax(1)
        found = torch.ops.aten._log_softmax_backward_data(g, y, 1, torch.float32)
    expected = []
    for of_g, of_y in zip(g, y):
        total = Real(sum(map(Fraction, of_g.tolist())))
        expected += [v - oracle.exp(w) * total for v, w in zip(reals(of_g), reals(of_y))]
    check(found.flatten(), expected)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_special_result_leaves_other_gradients_of_log_softmax_alone(compiled, special, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernels, "library", None)
    g, y = torch.tensor([[1e18, 1, -1e4, 0.5]]), torch.tensor([[-3e-18, special, -1, -2]])
    with reproml.exact():
        found = torch.ops.aten._log_softmax_backward_data(g, y, 1, torch.float32)
    assert found[0, 0] == 10001.5 and not found[0, 1].isfinite()


def test_constant_tensor_is_computed_once(monkeypatch):
    calls = []
    exact_values = evaluate.exact_values

    def counted(*args: Any) -> Any:
        calls.append(args)
        return exact_values(*args)

    monkeypatch.setattr(evaluate, "exact_values", counted)
    monkeypatch.setattr(pair_arrays, "narrow_elements_by_pairs", lambda *args: None)
    x = torch.full((3000,), -2.4570248)  # next to a zero, where binary64 has few bits
    with reproml.exact():
        y = x.lgamma()
    with mpmath.workdps(50):
        expected = float(mpmath.log(abs(mpmath.gamma(float(x[0])))))
    assert len(calls) == 1 and (y == torch.tensor(expected)).all()


@pytest.mark.parametrize(
    "name, options", [("silu", {}), ("gelu", {}), ("gelu", {"approximate": "tanh"})]
)
def test_activation_near_zero_is_that_of_reference(name, options):
    """Ties of the first terms of its series: x / 2, and g / 2 or g (1 + x) / 2."""
    units = torch.tensor([1.0, 1.5, 1 + 2.0**-23, 2 - 2.0**-23, -1.0, -1 - 2.0**-22])
    x = (units[:, None] * 2.0 ** torch.arange(-149, -6.0)).flatten()
    agree(operator_table.EXACT[name], x, **options)
    for g in (1.0, -1.0, 0.0, -0.0, 2.0**-149, 3 * 2.0**-149, 1 + 2.0**-23, 3e38):
        agree(operator_table.EXACT[f"{name}_backward"], torch.full_like(x, g), x, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_softplus_of_infinities(dtype):
    x = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    with reproml.exact():
        for beta, threshold in ((1, 20), (1, math.inf), (0.5, 20), (2, math.inf)):
            y = F.softplus(x, beta, threshold)
            assert y.tolist() == [math.inf, 0] and not y[1].signbit()


def test_slope_of_softplus_near_zero_is_that_of_reference():
    """g (1/2 + x / 4): the first two terms are often a midpoint."""
    x = torch.cat([torch.arange(-200, 200) * 2.0**-e for e in (20, 24, 25, 30, 149)])
    softplus = partial(operator_table.EXACT["softplus_backward"], beta=1, threshold=20)
    log_sigmoid = partial(operator_table.EXACT["log_sigmoid_backward"], buffer=x[:0])
    agree(operator_table.EXACT["sigmoid"], x)
    for g in (1.0, -1.0, 0.0, 2.0**-149, 3 * 2.0**-149, 1 + 2.0**-23, 3e38):
        agree(softplus, torch.full_like(x, g), x)
        agree(log_sigmoid, torch.full_like(x, g), x)


def test_far_numbers_are_those_of_reference():
    x = torch.tensor(
        [-14.9, -15.1, -31.9, -32.1, -1e30, 31.9, 1e30, 88.8, 99.9, 100.1, 701.0, 3e38]
    )
    x = torch.cat([x, torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])])
    for name in ("gelu", "exp", "expm1"):
        agree(operator_table.EXACT[name], x)
        agree(operator_table.EXACT[name], x.repeat_interleave(300))
    for g in (1.0, -1.0, 0.0, -0.0, 3e38, float("inf"), float("nan")):
        agree(operator_table.EXACT["gelu_backward"], torch.full_like(x, g), x)


NAN_KEEPERS = "exp expm1 log1p erfinv tanh sigmoid silu gelu mish".split()


@pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
@pytest.mark.parametrize("count", [1, 40, 1000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_stay_compiled(monkeypatch, value, count):
    x = torch.ones(2000)
    x[:count] = value
    rows = x.view(40, 50)
    with reproml.exact():
        monkeypatch.setattr(kernels, "library", None)
        expected = [getattr(torch.ops.aten, name)(x) for name in NAN_KEEPERS]
        expected += [f(rows, 1) for f in (torch.softmax, torch.log_softmax)]
        monkeypatch.undo()
        if value == float("-inf"):  # rows without a finite number take the reference path
            rows = rows[count:]
            expected[-2:] = [t[count:] for t in expected[-2:]]
        monkeypatch.setattr(evaluate, "_elements_by_balls", None)
        monkeypatch.setattr(evaluate, "rowwise_by_balls", None)
        found = [getattr(torch.ops.aten, name)(x) for name in NAN_KEEPERS]
        found += [f(rows, 1) for f in (torch.softmax, torch.log_softmax)]
    assert all(same_bits(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_of_infinities(dtype):
    x = torch.tensor([math.inf, -math.inf], dtype=dtype)
    with reproml.exact():
        y = torch.nn.functional.gelu(x)
    assert y[0] == math.inf and y[1].isnan()
