"""Test powers: large integer exponents, ties in masses, and the gradient of a number's powers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

import reproml
from reproml.arithmetic.numerics.rounding import nearest
from verification import oracle as o

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


def test_many_ties_are_rounded_to_even():
    """Cubes, squares and powers 3/2 of 25 bits, with their multiples by powers of two."""
    cases = [
        *[(x, 2.0) for x in range(4097, 4600, 2)],
        *[(x, 3.0) for x in range(257, 319, 2)],
        *[(x * x, 1.5) for x in range(257, 319, 2)],
        *[(2.0**-n, 150.0 / n) for n in (1, 2, 3, 5, 6, 10, 15, 25, 30, 50, 75)],
    ]
    x, y = (torch.tensor(column, dtype=torch.float32) for column in zip(*cases))
    with reproml.exact():
        found = torch.pow(x.repeat(40), y.repeat(40))
    roots = [math.isqrt(int(x)) if y == 1.5 else x for x, y in cases]
    exact = [Fraction(r) ** int(3 if y == 1.5 else y) for r, (_, y) in zip(roots, cases)]
    assert found.tolist() == [nearest(v) for v in exact] * 40


@pytest.mark.parametrize("base", [10000.0, 500000, 0.5, 1, 2.718281828459045])
def test_powers_of_a_number_and_their_gradient(base):
    """As RoPE computes its frequencies. The gradient is g (y l), with l the rounded logarithm."""
    x = (torch.arange(0, 64, 2).float() / 64).requires_grad_()
    g = torch.linspace(-1, 1, 32)
    with reproml.exact():
        y = base**x
        y.backward(g)
    b = o.mp.mpf(o.struct_float32(base))
    o.check(y, [o.Real(o.mp.power(b, o.mp.mpf(v))) for v in x.tolist()])
    log = o.rounded(o.Real(o.mp.log(o.mp.mpf(base))))
    product = o.rounded(o.reals(y) * log)
    assert x.grad is not None
    o.check(x.grad, o.reals(g) * product)


def test_base_with_an_uncertain_logarithm_is_refused():
    """It is so close to a midpoint of two float32 numbers that the C library may round it either way."""
    base = float(o.mp.exp(1.5 + o.mp.mpf(2) ** -24))
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="give the base as a tensor"):
        base ** torch.ones(2)
    with reproml.exact():
        torch.tensor(base) ** torch.ones(2)
