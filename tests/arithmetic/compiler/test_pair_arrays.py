"""Results in binary64: products, sums and functions that are hard to round, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch

import reproml
from reproml.arithmetic.numerics.formats import rounding_to
from reproml.arithmetic.numerics.rounding import nearest

pytestmark = pytest.mark.usefixtures("path")

HARD = [
    [1.0, 2.0**-53],  # a tie
    [1.0, 2.0**-53, 2.0**-1074],  # just above one
    [1.0 + 2.0**-52, 2.0**-53, -(2.0**-1074)],
    [1e308, 1e308, -1e308],  # overflows on the way
    [1e308, 1e308],
    [2.0**1023, 2.0**1023 - 2.0**970, 2.0**969],  # between the largest number and the overflow
    [2.0**-1074, 2.0**-1074, -(2.0**-1074)],
    [1e300, 1.0, -1e300, 1e-300],
    [3.0, -3.0, 0.0],
]


def exact(terms: list[Fraction]) -> float:
    with rounding_to(torch.float64):
        return nearest(sum(terms, Fraction(0)))


@pytest.mark.parametrize("terms", HARD, ids=range(len(HARD)))
def test_sums_are_rounded_once(terms):
    x = torch.tensor(terms, dtype=torch.float64)
    with reproml.exact():
        found = x.sum().item(), x.cumsum(0)[-1].item(), (x @ torch.ones_like(x)).item()
    assert found == (exact([Fraction(t) for t in terms]),) * 3


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    scale = torch.randint(-600, 500, shape, generator=generator)
    return torch.where(scale % 3 == 0, torch.ldexp(x, scale), x)


@pytest.mark.parametrize("alpha, beta", [(1, 1), (0.3, -1.7)])
def test_products_are_rounded_once(alpha, beta):
    """The factors span the exponents, so that some products underflow and others overflow."""
    a, b, bias = numbers(1, 9, 5), numbers(2, 5, 11), numbers(3, 11)
    with reproml.exact():
        found = torch.addmm(bias, a, b, alpha=alpha, beta=beta)
    for i in range(9):
        for j in range(11):
            terms = [Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist())]
            last = Fraction(beta) * Fraction(bias[j].item())
            assert found[i, j].item() == exact([*[Fraction(alpha) * t for t in terms], last])


def test_cancelling_products_are_rounded_once():
    a, b = numbers(4, 20, 30), torch.rand(30, 1, dtype=torch.float64)
    a = torch.cat([a, -a, torch.full((20, 1), 2.0**-700)], 1)
    b = torch.cat([b, torch.nextafter(b, torch.ones_like(b)), torch.full((1, 1), 2.0**-374)])
    with reproml.exact():
        found = (a @ b).squeeze(1).tolist()
    for row, y in zip(a.tolist(), found):
        assert y == exact([Fraction(p) * Fraction(q) for p, q in zip(row, b[:, 0].tolist())])


@pytest.mark.parametrize("name", ["sin", "cos", "exp", "log", "tanh", "expm1", "log1p"])
def test_functions_are_rounded_once(name):
    x = torch.cat([numbers(5, 60) * 20, torch.tensor([3.0, 710.0, 1e22, 2.0**-1074, 1e-160])])
    x = x.abs().double()
    with reproml.exact():
        found = getattr(torch, name)(x).tolist()
    with mpmath.workprec(2000):
        for t, y in zip(x.tolist(), found):
            value = getattr(mpmath, name)(mpmath.mpf(min(t, 1e3) if name == "expm1" else t))
            mantissa, exponent = abs(value).man_exp
            size = math.inf if abs(value) >= 2**1024 else float(mantissa * Fraction(2) ** exponent)
            wanted = math.copysign(size, value)
            assert y == wanted, (t, y, wanted)


def test_position_table_equals_correctly_rounded_functions():
    with reproml.exact():
        rate = 1.0 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        table = torch.outer(torch.arange(50, dtype=torch.float64), rate).sin()
    with mpmath.workprec(300):
        for i, r in enumerate(rate.tolist()):
            for n in range(50):
                assert table[n, i].item() == float(mpmath.sin(mpmath.mpf(n * r)))
