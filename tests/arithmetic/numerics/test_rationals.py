"""Arrays of rational numbers compute like fractions."""

from __future__ import annotations

import math
import operator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproml.arithmetic.compiler.evaluate import exact_elements
from reproml.arithmetic.numerics.balls import RationalContext
from reproml.arithmetic.numerics.rationals import Rationals
from reproml.arithmetic.numerics.rounding import nearest
from tests.arithmetic.strategies import FINITE

LENGTH = 4
doubles = st.floats(allow_nan=False, allow_infinity=False)
arrays = st.lists(st.one_of(FINITE, doubles, st.just(0.0)), min_size=LENGTH, max_size=LENGTH)
numbers = st.one_of(st.integers(-9, 9), st.fractions(max_denominator=99))


def fractions(x):
    return [Fraction(v) for v in x]


@given(arrays)
def test_floats_are_themselves(x):
    assert list(Rationals.of_floats(np.array(x)).fractions()) == fractions(x)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
@given(arrays, arrays, numbers)
def test_operations_are_exact(name, x, y, k):
    function = getattr(operator, name)
    a, b = (Rationals.of_floats(np.array(v)) for v in (x, y))
    if name != "truediv" or all(y):
        expected = [function(v, w) for v, w in zip(fractions(x), fractions(y))]
        assert list(function(a, b).fractions()) == expected
        thirds = (a / 3, b / -7)  # with denominators
        expected = [function(v / 3, w / -7) for v, w in zip(fractions(x), fractions(y))]
        assert list(function(*thirds).fractions()) == expected
    if name != "truediv" or k:
        assert list(function(a, k).fractions()) == [function(v, k) for v in fractions(x)]
    if name != "truediv" or all(x):
        assert list(function(k, a).fractions()) == [function(k, v) for v in fractions(x)]
        assert list(function(k, a / -3).fractions()) == [function(k, v / -3) for v in fractions(x)]


@given(arrays, numbers)
def test_comparison_selection_and_absolute_value(x, k):
    a = Rationals.of_floats(np.array(x)) / 7
    exact = [v / 7 for v in fractions(x)]
    assert list(a < k) == [v < k for v in exact]
    assert list(abs(-a).fractions()) == [abs(v) for v in exact]
    ctx = RationalContext()
    assert list(ctx.choose(a < k, a, k).fractions()) == [min(v, k) for v in exact]
    huge = ctx.choose(a < k, 2**62, -(2**62)) * 4  # not computed in 64 bits
    assert list(huge.fractions()) == [2**64 if v < k else -(2**64) for v in exact]
    assert ctx.max(a).fractions() == max(exact)
    assert ctx.sum(a).fractions() == sum(exact)
    if all(x):
        assert ctx.sum(1 / a).fractions() == sum(1 / v for v in exact)
    assert list(a[np.array([2, 0])].fractions()) == [exact[2], exact[0]]


@given(arrays, st.integers(1, 99), st.integers(-300, 300))
def test_nearest_rounds_once(x, d, exponent):
    found = (Rationals.of_floats(np.array(x)) * Fraction(2) ** exponent / d).nearest()
    expected = [nearest(Fraction(v) * Fraction(2) ** exponent / d) for v in x]
    assert found.tolist() == expected
    assert [math.copysign(1, v) for v in found] == [math.copysign(1, v) for v in expected]


@pytest.mark.parametrize("tie", [1 + 2.0**-24, 2.0**-150, 3 * 2.0**-150, 2.0**128 - 2.0**103])
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_even_and_their_neighbours_do_not(tie, sign):
    beside = Fraction(2) ** -400
    x = Rationals.of_floats(np.array([sign * tie] * 3)) + Rationals.of_fractions(
        np.array([Fraction(0), beside, -beside], dtype=object)
    )
    exact = [Fraction(sign * tie) + e for e in (0, beside, -beside)]
    assert x.nearest().tolist() == [nearest(v) for v in exact]


def test_division_by_zero_raises():
    with pytest.raises(ZeroDivisionError):
        1 / Rationals.of_floats(np.array([1.0, 0.0]))


def test_elements_that_are_not_rational_are_computed_one_by_one():
    """The square root of the second element is not rational."""

    def formula(ctx, x, y):
        return ctx.choose(y < 1, ctx.sqrt(x), x / 3)

    found = exact_elements(formula, np.array([[4.0, 0.0], [2.0, 0.0], [5.0, 1.0]]))
    assert found.tolist() == [2.0, float(np.float32(math.sqrt(2))), float(np.float32(5 / 3))]
