"""Balls enclose the exact value in every context, and each result is the exact value rounded once."""

from __future__ import annotations

import math
import threading
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import evaluate, kernels
from reproml.arithmetic.compiler.evaluate import TENSORS, elementwise, exact_values, rowwise
from reproml.arithmetic.compiler.pair_arrays import narrow_rows_by_pairs
from reproml.arithmetic.numerics.balls import Ball, MultiPrecisionContext
from reproml.arithmetic.numerics.formats import rounding_to
from reproml.arithmetic.numerics.rounding import TINY
from tests.arithmetic.forms import agree
from tests.arithmetic.strategies import ANY, MODERATE, tensors
from verification import oracle as o
from verification.oracle import Real, check, reals, same_bits

# name -> (formula on a context, the same on real numbers)
FORMULAS: dict[str, Any] = {
    "polynomial": (lambda ctx, x, y: x * x * y - 3 * x + y, lambda x, y: x * x * y - 3 * x + y),
    "quotient": (lambda ctx, x, y: (x + 1) / (y * y + 2), lambda x, y: (x + 1) / (y * y + 2)),
    "sevenths": (lambda ctx, x, y: x * Fraction(1, 3) - y / 3, lambda x, y: x * Fraction(1, 3) - y / 3),
    "exp": (lambda ctx, x, y: ctx.exp(x - y) - ctx.exp(y), lambda x, y: o.exp(x - y) - o.exp(y)),
    "log": (lambda ctx, x, y: ctx.log(x * x + abs(y) + 1), lambda x, y: o.log(x * x + abs(y) + 1)),
    "sqrt": (
        lambda ctx, x, y: ctx.sqrt(x * x + y * y) - abs(x),
        lambda x, y: o.sqrt(x * x + y * y) - abs(x),
    ),
    "log1p": (lambda ctx, x, y: ctx.log1p(ctx.exp(x)) * y, lambda x, y: o.log1p(o.exp(x)) * y),
    "expm1": (lambda ctx, x, y: ctx.expm1(x * y), lambda x, y: o.expm1(x * y)),
    "tanh": (lambda ctx, x, y: ctx.tanh(x) * ctx.sigmoid(y), lambda x, y: o.tanh(x) * o.sigmoid(y)),
    "erfc": (lambda ctx, x, y: ctx.erfc(x) - ctx.erf(y), lambda x, y: o.erfc(x) - o.erf(y)),
    "sin": (lambda ctx, x, y: ctx.sin(x) + ctx.cos(y), lambda x, y: o.sin(x) + o.cos(y)),
}  # fmt: skip
small = st.floats(-20, 20, width=32)


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=40)
@given(st.lists(st.tuples(small, small), min_size=1, max_size=8))
def test_balls_enclose_the_exact_value(name, pairs):
    formula, exact = FORMULAS[name]
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs))
    ball = formula(TENSORS, TENSORS.exact(x), TENSORS.exact(y))
    error = torch.as_tensor(ball.error, dtype=torch.float64).expand(x.shape)
    for mid, bound, (a, b) in zip(ball.mid.tolist(), error.tolist(), pairs):
        if math.isfinite(bound) and math.isfinite(mid):
            value = exact(Real(a), Real(b)).mpf
            largest = o.mp.mpf(bound) * (1 + o.mp.mpf(2) ** -20) + o.mp.mpf(2) ** -1000
            assert abs(value - o.mp.mpf(mid)) <= largest
    for bits in (80, 300):
        ctx = MultiPrecisionContext(bits)
        p, q = (np.array([ctx.mp.mpf(v) for v in column], dtype=object) for column in zip(*pairs))
        ball = formula(ctx, ctx.exact(p), ctx.exact(q))
        errors = np.broadcast_to(ball.error, p.shape)
        for mid, bound, (a, b) in zip(ball.mid, errors, pairs):
            value = exact(Real(a), Real(b)).mpf
            assert abs(value - o.mp.mpf(mid)) <= o.mp.mpf(bound) + o.mp.mpf(2) ** -1000


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=25)
@given(st.data())
def test_elementwise_and_exact_values_round_once(name, data):
    formula, exact = FORMULAS[name]
    x, y = data.draw(tensors((5,), small)), data.draw(tensors((5,), small))
    expected = [exact(a, b) for a, b in zip(reals(x), reals(y))]
    check(elementwise(formula, x, y), expected, any_zero=True)
    values = exact_values(formula, [x.double().numpy(), y.double().numpy()])
    check(torch.tensor(values, dtype=torch.float32), expected, any_zero=True)


@pytest.mark.parametrize("value", [2.0**-24, 3 * 2.0**-24, -(2.0**-25), 2.0**-150, -(2.0**-150)])
def test_ties_and_underflow_round_to_even(value):
    """1 + value and value are halfway between two binary32 numbers, or near it."""
    v = Fraction(value)
    one = torch.ones(3)
    check(elementwise(lambda ctx, x: x + v, one), [Real(1 + v)] * 3)
    check(elementwise(lambda ctx, x: x * v, one), [Real(v)] * 3)
    # With a square root no ball can decide: it is rational, or recognized as the midpoint itself.
    four = torch.full((), 4.0)
    check(elementwise(lambda ctx, x: ctx.sqrt(x) - 1 + v, four), Real(1 + v))
    two = torch.full((2,), 2.0)
    check(elementwise(lambda ctx, x: ctx.sqrt(x) * ctx.sqrt(x) - 1 + v, two), [Real(1 + v)] * 2)


def test_infinite_and_nan_operands_follow_ieee_754():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    found = elementwise(lambda ctx, x: 2 * x + 1, x)
    assert found[:2].tolist() == [math.inf, -math.inf] and found[2].isnan() and found[3] == 1
    found = elementwise(lambda ctx, x: 1 / x, x)
    assert found[:2].tolist() == [0, 0] and found[3] == math.inf


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 2)])
def test_shapes_of_results_and_ties(shape):
    x = torch.full(shape, 1.0)
    third = o.float_of(Real(Fraction(1, 3)))
    assert same_bits(elementwise(lambda ctx, x: x / 3, x), torch.full(shape, third))
    # a tie, so that each element is resolved
    assert same_bits(elementwise(lambda ctx, x: x + Fraction(1, 2**24), x), x)
    for dim in range(-len(shape), len(shape)):
        found = rowwise(lambda ctx, x: x / ctx.sum(x), dim, x)
        n = max(1, x.shape[dim])
        assert same_bits(found, torch.full(shape, o.float_of(Real(Fraction(1, n)))))


@settings(max_examples=20)
@given(st.data())
def test_rowwise_does_not_depend_on_order(data):
    x = data.draw(tensors((3, 6), MODERATE))
    at = torch.tensor(data.draw(st.permutations(range(6))))
    for formula in (
        lambda ctx, x: ctx.sum(x * x) - ctx.sum(x) * ctx.sum(x) / 6,
        lambda ctx, x: ctx.log1p(ctx.sum(ctx.exp(x - ctx.max(x)))),
    ):
        assert same_bits(rowwise(formula, 1, x), rowwise(formula, 1, x[:, at]))
        assert same_bits(rowwise(formula, 1, x), rowwise(formula, 0, x.t()).t())


@settings(max_examples=20)
@given(tensors((3, 5), ANY))
def test_rowwise_sum_is_rounded_once(x):
    expected = [[o.total(row)] for row in reals(x)]
    check(rowwise(lambda ctx, x: ctx.sum(x), 1, x), expected)


def test_exact_values_are_the_same_in_threads():
    """mpmath's context and caches are shared between threads."""
    x = torch.linspace(-3, 3, 40).double().numpy()
    formula = FORMULAS["exp"][0]
    expected = exact_values(formula, [x, x]).tolist()
    wrong = []

    def work(bits):
        for _ in range(3):
            mpmath.mp.prec = bits
            if exact_values(formula, [x, x]).tolist() != expected:
                wrong.append(bits)

    before = mpmath.mp.prec
    threads = [threading.Thread(target=work, args=(bits,)) for bits in (10, 53, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mpmath.mp.prec = before
    assert not wrong


def test_finite_extremes_round_once():
    for values in ([3.4028234663852886e38] * 4, [2.0**-149] * 4, [3e38, -3e38, 1e-45, 2.0**-126]):
        x = torch.tensor(values)
        check(elementwise(lambda ctx, x: x * x / x, x), [v * v / v for v in reals(x)])
        check(elementwise(lambda ctx, x: x * x, x), [v * v for v in reals(x)])
        check(elementwise(lambda ctx, x, y: x / y, x, x.flip(0)), reals(x) / reals(x.flip(0)))


def test_nan_bound_does_not_make_value_infinite():
    """With few bits the bound of exp(-x^2 / 2) is infinite; times that of x, which is 0, it is NaN."""
    x = torch.tensor([3e38, 1.7e38, 1e30])
    assert operator_table.EXACT["gelu_backward"](torch.ones(3), x).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "x, value, slope",
    [
        (3e38, 3e38, 1),
        (-3e38, 0, 0),
        (1e20, 1e20, 1),
        (-1e20, 0, 0),
        (2.0**-149, 2.0**-149, 0.5),  # just above the tie at half of it
        (-(2.0**-149), 0, 0.5),  # just below
    ],
)
def test_tanh_gelu_is_exact_at_extreme_values(x, value, slope):
    """These reach the exact path, where pi is irrational."""
    x = torch.tensor([x], requires_grad=True)
    with reproml.exact():
        y = torch.nn.functional.gelu(x, approximate="tanh")
        y.backward(torch.ones(1))
    assert y.item() == torch.tensor(value).item() and x.grad.item() == slope


def test_bound_of_exp_far_below_zero_holds():
    """There binary64 has the value at -700; whether a zero near it is above or below 0 is not known."""
    for mid, rad in ((-730.0, 20.0), (-1e30, 3.0), (-3.4e38, 1e23)):
        x, rad = torch.tensor([[mid], [rad]], dtype=torch.float64)
        y = TENSORS.exp(Ball(x, 0, rad, TENSORS))
        assert y.error.dtype is torch.float64
        assert y.error.item() >= max(y.mid.item(), 2 * TINY)
    x, rad = torch.tensor([[-730.0], [40.0]], dtype=torch.float64)
    assert TENSORS.exp(Ball(x, 0, rad, TENSORS)).error.item() == math.inf


def test_sign_of_a_sum_that_underflows_is_that_of_its_largest_term():
    """3 (1/4)^q - (1/2)^q, whose terms are far below the smallest number."""
    x, y = torch.zeros(1, 2), torch.tensor([[-1.0, -4.0], [-2.0, -4.0]])
    g, distance = torch.tensor([[3.0, -1.0]]), torch.tensor([[4.0, 4.0]])
    for p in (1e4, 1e6, 1e16, 1e18):
        found = agree(operator_table.EXACT["_cdist_backward"], g, x, y, p, distance)
        assert found[0, 0].item() == 0 and found[0, 0].signbit()


@pytest.mark.usefixtures("path")
def test_rows_that_cancel_are_rounded_once(monkeypatch):
    """Where a gradient is parallel to its weights, all of binary64's bits cancel; pairs have enough."""
    draw = torch.Generator().manual_seed(2)
    v = torch.cat([torch.ones(2, 30), torch.randn(2, 30, generator=draw), torch.zeros(1, 30)])
    g, scale = torch.rand(5, 1, generator=draw), 2.0 ** torch.arange(-2, 3).float().unsqueeze(1)
    operator = torch.ops.aten._weight_norm_interface_backward
    if kernels.library is not None:
        monkeypatch.setattr(evaluate, "exact_rows", None)
    with reproml.exact():
        norms = v[:4].norm(dim=1, keepdim=True)
        found = operator(v[:4] * scale[:4], v[:4], g[:4], norms, 0)[0]
    a, b, n = reals(v[:4]), reals(g[:4]), reals(norms)
    for i in range(4):
        grads = a[i] * Real(Fraction(float(scale[i])))
        slope = o.total(grads * a[i]) / (n[i, 0] * n[i, 0])
        check(found[i], (grads - a[i] * slope) * (b[i, 0] / n[i, 0]))
    with reproml.exact():  # nothing divided by nothing
        assert torch._weight_norm_interface(v[4:], g[4:], 0)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
def test_pairs_of_rows_are_rounded_to_narrow_targets_once(dtype):
    """Midpoints that are exact pass, and what is beside them; a sum of sevenths is not known to be one."""
    one = 1 + 2.0 ** -{torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    rows = [[one, 0], [one, 2.0**-80], [one, -(2.0**-80)], [1, -1], [-(2.0**-160), 0]]
    rows += [[one, 2.0**-1000], [math.nan, 0], [math.inf, 0]]
    x = torch.tensor(rows, dtype=torch.float64)
    with rounding_to(dtype):
        found = narrow_rows_by_pairs(lambda ctx, x: ctx.sum(x), [x])
        sevenths = narrow_rows_by_pairs(
            lambda ctx, x: ctx.sum(x / 7), [torch.full_like(x[:1, :1], one).expand(1, 7)]
        )
    assert found is not None and sevenths is not None
    up = 2 * one - 1
    assert found[0][:5].flatten().tolist() == [1, up, 1, 0, 0]
    assert [math.copysign(1, v) for v in found[0][3:5]] == [1, -1]
    assert found[1].flatten().tolist() == [False] * 5 + [True] * 3
    assert sevenths[1].all()
