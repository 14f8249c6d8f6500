"""Rounding to binary32: the rounding test, and the room that each caller's error bound leaves it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from reproml.arithmetic.compiler import evaluate
from reproml.arithmetic.numerics import exact_sums, rounding
from reproml.arithmetic.numerics.exact_sums import exact_sum
from reproml.arithmetic.numerics.rounding import (
    TINY,
    U,
    gamma,
    nearest,
    round_ball,
    round_sum,
    rounding_test,
    widened,
)
from tests.arithmetic.strategies import FINITE, SPECIAL
from verification import oracle as o
from verification.oracle import Real

fractions = st.one_of(
    st.fractions(),
    FINITE.map(Fraction),
    st.tuples(FINITE, FINITE).map(lambda t: Fraction(t[0]) * Fraction(t[1]) / 3),
    # ties of any exponent, and their neighbours
    st.tuples(
        st.integers(-(2**25), 2**25), st.integers(-155, 110), st.sampled_from([-1, 0, 1])
    ).map(lambda t: Fraction(t[0]) * Fraction(2) ** t[1] + t[2] * Fraction(1, 2**400)),
)


# Midpoints of binary32 numbers of any exponent, their neighbours in binary64, and binary32 numbers.
beside_midpoints = st.one_of(
    FINITE,
    st.tuples(st.integers(-(2**25), 2**25), st.integers(-155, 100), st.integers(-2, 2)).map(
        lambda t: t[0] * 2.0 ** t[1] * (1 + t[2] * 2.0**-52)
    ),
)


def f64(values: Iterable[Any]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


@given(fractions)
def test_nearest_agrees_with_the_oracle(x):
    expected = o.float_of(Real(x))
    assert nearest(x) == expected
    if x:
        assert math.copysign(1, nearest(x)) == math.copysign(1, expected)
    else:
        assert math.copysign(1, nearest(x)) == 1


def test_nearest_underflows_and_overflows_like_ieee_754():
    assert nearest(Fraction(2) ** -150) == 0 and nearest(Fraction(3, 2**151)) == 2.0**-149
    largest = Fraction(2**24 - 1) * 2**104
    assert nearest(largest + Fraction(2) ** 103 - 1) == float(largest)
    assert nearest(largest + Fraction(2) ** 103) == math.inf
    assert math.copysign(1, nearest(Fraction(-1, 10**60))) == -1


@given(st.lists(st.one_of(st.floats(-1e300, 1e300), FINITE), max_size=20), st.randoms())
def test_exact_sum_in_any_order(terms, random):
    expected = sum(map(Fraction, terms), Fraction(0))
    random.shuffle(terms)
    assert exact_sum(terms) == expected


@pytest.mark.parametrize("n", [0, 1, 2, 10, 784, 10**6])
def test_gamma_bounds_the_relative_error(n):
    assert Fraction(gamma(n)) >= n * Fraction(U) / (1 - n * Fraction(U))
    assert gamma(n) < (n + 4) * U * 1.001


@given(
    st.lists(fractions, min_size=1, max_size=12),
    st.sampled_from([0.0, 2.0**-52, 2.0**-30, 2.0**-20]),
)
def test_result_is_nearest_for_any_midpoint_within_the_bound(values, width):
    values = [v for v in values if abs(v) < 2**200 and (width or Fraction(float(v)) == v)]
    if not values:
        return
    for sign in (-1, 1):
        mid = f64(float(v + sign * abs(v) * Fraction(width) * 3 / 4) for v in values)
        error = f64(float(abs(v)) * (width + (2 * U if width else 0)) for v in values)
        for function in (round_ball, round_sum):
            found = function(
                mid, error * (1 + 2.0**-40), lambda at: [nearest(values[i]) for i in at.tolist()]
            )
            assert found.tolist() == [o.float_of(Real(v)) for v in values]


def test_nan_and_infinite_midpoints_are_the_result():
    mid = f64([math.nan, math.inf, -math.inf])
    for error in (0.0, math.inf):
        for function in (round_ball, round_sum):
            x = function(mid, torch.full((3,), error, dtype=torch.float64), lambda at: [])
            assert x.isnan().tolist() == [True, False, False] and x[1:].tolist() == mid[1:].tolist()


def test_exact_zero_of_a_sum_is_plus_zero():
    mid = f64([0.0, -0.0])
    x = round_sum(mid, torch.zeros(2, dtype=torch.float64), lambda at: [0.0] * len(at))
    assert not x.signbit().any()


def test_zero_of_unknown_sign_is_resolved():
    """The midpoint is near 0 and its error is larger: the exact value may be on the other side."""
    for mid in (0.0, -0.0, 1e-80, -1e-80):
        for value in (0.0, -0.0):
            answer = [value]
            x = round_ball(f64([mid]), f64([1e-70]), lambda at, answer=answer: answer)  # type: ignore[misc]
            assert x.signbit().item() == (math.copysign(1, value) < 0)


def test_0_dim_and_empty_tensors_keep_their_shape():
    for shape in [(), (0,), (2, 0)]:
        mid = torch.full(shape, 1 + 2.0**-24, dtype=torch.float64)
        for function in (round_ball, round_sum):
            found = function(mid, mid * U, lambda at: [1.0] * len(at))
            assert found.shape == torch.Size(shape) and bool((found == 1).all())


def test_special_values_round_like_the_hardware():
    mid = f64(x * y for x in SPECIAL for y in SPECIAL)
    with np.errstate(over="ignore"):
        expected = torch.tensor(mid.numpy().astype(np.float32))
    found = round_ball(mid, torch.zeros_like(mid), lambda at: mid[at].tolist())
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


# ---- the test itself -------------------------------------------------------------------------------


@given(st.lists(st.tuples(beside_midpoints, beside_midpoints), min_size=1, max_size=12))
def test_rounding_test_passes_only_equal_ends(pairs):
    """Every number between two ends that pass rounds to the result, and ends that round alike do pass."""
    low, high = f64(map(min, pairs)), f64(map(max, pairs))
    for zeros_agree in (False, True):
        result, failed = rounding_test(low, high, zeros_agree)
        for a, b, x, bad in zip(low.tolist(), high.tolist(), result.tolist(), failed.tolist()):
            ends = [Real(a), Real(b)]
            rounded = {o.float_of(end) if zeros_agree else o.bits_of(end) for end in ends}
            assert bad == (len(rounded) > 1)
            if not bad:
                between = Real((Fraction(a) + Fraction(b)) / 2)
                assert x == o.float_of(ends[0]) == o.float_of(between) == o.float_of(ends[1])


def test_signs_of_zeros_disagree_unless_allowed():
    low, high = f64([-0.0, 0.0, -1e-80]), f64([0.0, 0.0, 1e-80])
    assert rounding_test(low, high)[1].tolist() == [True, False, True]
    assert rounding_test(low, high, zeros_agree=True)[1].tolist() == [False, False, False]


def test_nan_ends_fail_where_zeros_agree():
    nan = f64([math.nan])
    assert rounding_test(nan, nan, zeros_agree=True)[1].tolist() == [True]
    assert rounding_test(nan, nan)[0].isnan().all()


# ---- the room of each bound ------------------------------------------------------------------------


@contextmanager
def recorded_ends() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect the ends of each rounding test in `round_ball` and `round_sum`."""
    calls: list[tuple[Tensor, Tensor]] = []

    def recorder(low: Tensor, high: Tensor, zeros_agree: bool = False) -> tuple[Tensor, Tensor]:
        calls.append((low, high))
        return rounding_test(low, high, zeros_agree)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "rounding_test", recorder)
        yield calls


@given(beside_midpoints, st.one_of(st.sampled_from([0.0, U, 2.0**-24, 1.0]), st.floats(0, 1)))
def test_ends_of_round_ball_enclose_the_interval(mid, relative):
    """SLACK covers a bound that is 2^-21 too small, 2 U |mid| the rounding of the ends, TINY underflow."""
    error = abs(mid) * relative
    with recorded_ends() as calls:
        round_ball(f64([mid]), f64([error]), lambda at: [0.0] * len(at))
    low, high = (Fraction(end.item()) for end in calls[0])
    exact_error = Fraction(error) * (1 + Fraction(1, 2**21))
    exact_error += Fraction(TINY) / 2 if abs(mid) < 2.0**-900 else 0
    assert low <= Fraction(mid) - exact_error and high >= Fraction(mid) + exact_error


@given(beside_midpoints, st.floats(2.0**-60, 1))
def test_widened_covers_its_own_rounding_and_the_ends(mid, relative):
    """This is what distributed batch norm takes as its bound, even if the error is 0."""
    error = f64([abs(mid) * relative])
    bound = widened(error, f64([mid]).abs()) + TINY
    exact_error = Fraction(error.item()) * (1 + Fraction(1, 2**21))
    assert Fraction((mid - bound).item()) <= Fraction(mid) - exact_error
    assert Fraction((mid + bound).item()) >= Fraction(mid) + exact_error


@given(
    beside_midpoints.filter(lambda x: abs(x) > 2.0**-590),
    st.sampled_from([1, 2, 10, 784, 10**6, 2**30]),
    st.floats(1, 2.0**40),
)
def test_ends_of_round_sum_enclose_the_worst_sum(mid, n, cancelling):
    """gamma(n) covers the error of n additions, that of the bound (2^-21), and the rounding of the ends.

    cancelling: the sum of absolute values over |mid|; at least 1, up to the error of mid itself.
    """
    size = abs(mid) * cancelling * (1 + 2 * n * U)
    worst = n * Fraction(U) / (1 - n * Fraction(U)) * Fraction(size) * (1 + Fraction(1, 2**21))
    with recorded_ends() as calls:
        round_sum(f64([mid]), f64([size * gamma(n)]), lambda at: [0.0] * len(at))
    low, high = (Fraction(end.item()) for end in calls[0])
    assert low <= Fraction(mid) - worst and high >= Fraction(mid) + worst


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=30), st.randoms())
def test_ends_of_round_sum_enclose_a_dot_product(pairs, random):
    random.shuffle(pairs)
    exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
    terms = [a * b for a, b in pairs]
    size = math.hypot(*[a for a, _ in pairs]) * math.hypot(*[b for _, b in pairs])
    with recorded_ends() as calls:
        bound = size * gamma(len(terms) + 2)  # 2: the norms
        found = round_sum(f64([sum(terms)]), f64([bound]), lambda at: [nearest(exact)] * len(at))
    assert Fraction(calls[0][0].item()) <= exact <= Fraction(calls[0][1].item())
    assert o.bits_of_tensor(found) == [o.bits_of(Real(exact))]


@given(st.lists(st.lists(beside_midpoints, min_size=3, max_size=3), min_size=1, max_size=8))
@example([[1 + 2.0**-24, 2.0**-60, 0.0], [1 + 3 * 2.0**-24, 0.0, -(2.0**-30)]])
def test_compensated_sums_pass_only_correct_values(rows):
    """An end is rounded to binary64 first, so those that become midpoints must fail."""
    rows = [[a, b * 2.0**-30, c * 2.0**-60] for a, b, c in rows]
    rows = [[x if abs(x) > 2.0**-590 else 0.0 for x in row] for row in rows]
    expected = [o.float_of(Real(sum(map(Fraction, row), Fraction(0)))) for row in rows]
    assert exact_sums._by_two_sum(f64(rows)) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_sums, "nearest", lambda exact: math.nan)  # what fails the test
        found = exact_sums._by_two_sum(f64(rows))
    assert [x for x in found if x == x] == [y for x, y in zip(found, expected) if x == x]


@settings(max_examples=30, deadline=None)
@given(st.floats(-80, 80, width=32), st.floats(-80, 80, width=32))
def test_ends_of_mpmath_balls_enclose_the_value(x, y):
    """mid - error and mid + error, before they are rounded to binary32."""
    ends = []

    def recorder(end: Any) -> Any:
        ends.append(end.item())
        return from_mp(end)

    formula = lambda ctx, x, y: ctx.exp(x) * ctx.sin(y) + ctx.log1p(ctx.exp(y))  # noqa: E731
    exact = o.exp(Real(x)) * o.sin(Real(y)) + o.log1p(o.exp(Real(y)))
    from_mp = evaluate._from_mp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_from_mp", recorder)
        rationals = [np.array([Fraction(v)], dtype=object) for v in (x, y)]
        found = evaluate._multi_precision(formula, rationals, slice(None))
    assert found.tolist() == [o.float_of(exact)]
    assert o.mp.mpf(ends[0]) <= exact.mpf <= o.mp.mpf(ends[1])
