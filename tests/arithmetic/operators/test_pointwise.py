"""Test large integer powers of single elements."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import reproml
from reproml.arithmetic.numerics.rounding import nearest

INF = math.inf
VALUES = [
    -1.0,
    -1.5,
    0.75,
    -0.75,
    2.0,
    -0.5,
    1 + 2.0**-23,
    -(1 - 2.0**-24),
    3.0,
    3 * 2.0**-149,
    2.0**-149,
]


def power(x: float, p: int) -> float:
    """Return x^p rounded once; 2^1000 and 2^-1000 stand for all larger and smaller powers."""
    if abs(math.log2(abs(x))) * abs(p) > 1000:
        size = INF if (abs(x) > 1) == (p > 0) else 0.0
    else:
        size = nearest(Fraction(abs(x)) ** p)
    return math.copysign(size, x if p % 2 else 1)


@pytest.mark.parametrize("p", [65, 66, 100, 149, 1001, -65, -66, -100, -149, -1001, 4097])
def test_large_integer_power_is_rounded_once(p):
    with reproml.exact():
        found = torch.tensor(VALUES).pow(p)
    assert [str(x) for x in found.tolist()] == [str(power(x, p)) for x in VALUES]


def test_large_integer_powers_of_special_values():
    x = torch.tensor([0.0, -0.0, INF, -INF, math.nan])
    expected = {
        65: [0.0, -0.0, INF, -INF], 66: [0.0, 0.0, INF, INF],
        -65: [INF, -INF, 0.0, -0.0], -66: [INF, INF, 0.0, 0.0],
    }  # fmt: skip
    for p, values in expected.items():
        with reproml.exact():
            found = x**p
        assert [str(v) for v in found.tolist()] == [str(v) for v in [*values, math.nan]]


@pytest.mark.parametrize("p", [2.0**24, 2.0**33, -(2.0**40), 3.4e38, -3.4e38])
def test_huge_powers_overflow_or_underflow(p):
    x = torch.tensor([1 + 2.0**-23, 1 - 2.0**-24, 1.0, -1.0, 7.0, 1e-40])
    with reproml.exact():
        found = (x**p).tolist()
    up, down = (INF, 0.0) if p > 0 else (0.0, INF)
    assert found[2:] == [1, 1, up, down]
    if abs(p) > 2**32:
        assert found[:2] == [up, down]


@pytest.mark.parametrize("p", [65, -1001])
def test_powers_of_many_equal_numbers_are_affordable(p):
    with reproml.exact():
        assert torch.full((300_000,), -1.0).pow(p).eq(-1).all()
        assert torch.full((300_000,), 2.0).pow(p).eq(2.0 ** max(p, -1001)).all()
