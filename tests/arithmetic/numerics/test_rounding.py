"""From real numbers to binary32."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reproml.arithmetic.numerics.exact_sums import exact_sum
from reproml.arithmetic.numerics.rounding import U, gamma, nearest, round_ball, round_sum
from tests.arithmetic.strategies import FINITE, SPECIAL
from verification import oracle as o
from verification.oracle import Real

fractions = st.one_of(
    st.fractions(),
    FINITE.map(Fraction),
    st.tuples(FINITE, FINITE).map(lambda t: Fraction(t[0]) * Fraction(t[1]) / 3),
    # ties of any exponent, and what is next to them
    st.tuples(
        st.integers(-(2**25), 2**25), st.integers(-155, 110), st.sampled_from([-1, 0, 1])
    ).map(lambda t: Fraction(t[0]) * Fraction(2) ** t[1] + t[2] * Fraction(1, 2**400)),
)


@given(fractions)
def test_nearest(x):
    expected = o.float_of(Real(x))
    assert nearest(x) == expected
    if x:
        assert math.copysign(1, nearest(x)) == math.copysign(1, expected)
    else:
        assert math.copysign(1, nearest(x)) == 1


def test_nearest_at_the_ends():
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
def test_settle_asks_whenever_the_bound_leaves_a_doubt(values, width):
    """c is anywhere within e of the value; the result is the value's nearest all the same."""
    values = [v for v in values if abs(v) < 2**200 and (width or Fraction(float(v)) == v)]
    if not values:
        return
    for sign in (-1, 1):
        c = torch.tensor(
            [float(v + sign * abs(v) * Fraction(width) * 3 / 4) for v in values],
            dtype=torch.float64,
        )
        e = torch.tensor(
            [float(abs(v)) * (width + (2 * U if width else 0)) for v in values], dtype=torch.float64
        )
        for function in (round_ball, round_sum):
            found = function(
                c, e * (1 + 2.0**-40), lambda at: [nearest(values[i]) for i in at.tolist()]
            )
            assert found.tolist() == [o.float_of(Real(v)) for v in values]


def test_settle_takes_nan_and_infinity_as_they_are():
    c = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    for e in (0.0, math.inf):
        for function in (round_ball, round_sum):
            x = function(c, torch.full((3,), e, dtype=torch.float64), lambda at: [])
            assert x.isnan().tolist() == [True, False, False] and x[1:].tolist() == c[1:].tolist()


def test_an_exact_zero_of_a_sum_is_plus_zero():
    c = torch.tensor([0.0, -0.0], dtype=torch.float64)
    x = round_sum(c, torch.zeros(2, dtype=torch.float64), lambda at: [0.0] * len(at))
    assert not x.signbit().any()


def test_a_zero_that_is_not_sure_is_asked_for():
    """c = 0 with a bound: the value may have underflowed from below."""
    for c in (0.0, -0.0, 1e-80, -1e-80):
        for value in (0.0, -0.0):
            centre, bound = torch.tensor([[c], [1e-70]], dtype=torch.float64)
            answer = [value]
            x = round_ball(centre, bound, lambda at, answer=answer: answer)  # type: ignore[misc]
            assert x.signbit().item() == (math.copysign(1, value) < 0)


def test_0_dim_and_empty():
    for shape in [(), (0,), (2, 0)]:
        c = torch.full(shape, 1 + 2.0**-24, dtype=torch.float64)
        for function in (round_ball, round_sum):
            found = function(c, c * U, lambda at: [1.0] * len(at))
            assert found.shape == torch.Size(shape) and bool((found == 1).all())


def test_special_values_round_like_the_hardware():
    c = torch.tensor([x * y for x in SPECIAL for y in SPECIAL], dtype=torch.float64)
    with np.errstate(over="ignore"):
        expected = torch.tensor(c.numpy().astype(np.float32))
    found = round_ball(c, torch.zeros_like(c), lambda at: c[at].tolist())
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
