"""The functions composed in binary64 stay within the radius that their balls have (by mpmath)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from reproml.arithmetic.numerics import special
from reproml.arithmetic.numerics.balls import MultiPrecisionContext, TensorContext
from verification import oracle as o

FUNCTIONS: dict[str, Any] = {
    "atan": o.mp.atan,
    "lgamma": lambda x: o.mp.log(abs(o.mp.gamma(x))) if abs(x) < 30 else o.mp.loggamma(x),
    "digamma": lambda x: o.mp.psi(0, x),
    "trigamma": lambda x: o.mp.psi(1, x),
}


def sample(name: str) -> torch.Tensor:
    """Return binary32 numbers: even, random and extreme ones, and those where formulas meet."""
    random = np.random.default_rng(1)
    size = 2.0 ** random.uniform(-149, 120, 60)
    points = [
        random.uniform(-12, 12, 150),
        random.uniform(-1, 1, 100),
        np.array([1, 2, 8, 0.5, -0.5, 1.5, -2.5, 1.4616321, -0.50408301]),
        *[np.array([8, 1, 2]) + k * 2.0**-20 for k in (-3, -1, 1, 3)],
        size if name != "atan" else np.concatenate([size, -size]),
    ]
    x = torch.tensor(np.concatenate(points), dtype=torch.float32).double()
    return x if name == "atan" else x[(x != x.trunc()) | (x > 0)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_is_below_the_radius(name):
    context, x = TensorContext(), sample(name)
    y = getattr(context, name)(context.exact(x))
    before, o.mp.prec = o.mp.prec, 300
    try:
        for at, mid, error in zip(x.tolist(), y.mid.tolist(), y.error.tolist()):
            value = FUNCTIONS[name](o.mp.mpf(at))
            # `round_ball` adds room for the rounding of the last operation
            assert abs(o.mp.mpf(mid) - value) <= error + 2.0**-52 * abs(mid), at
            assert error <= 2.0**-38 * (1 + abs(mid)), at
    finally:
        o.mp.prec = before


def test_error_of_lgamma_near_its_zeros_is_below_the_radius():
    context = TensorContext()
    t = torch.cat([torch.linspace(-1, 1, 300), 2.0 ** -torch.arange(0, 18)]) * 2.0**-6
    x = torch.cat([1 + t, 1 - t, 2 + t, 2 - t]).double()
    y = special.lgamma_near_zero(context, context.exact(x))
    before, o.mp.prec = o.mp.prec, 300
    try:
        for at, mid, error in zip(x.tolist(), y.mid.tolist(), y.error.tolist()):
            value = o.mp.loggamma(o.mp.mpf(at))
            assert abs(o.mp.mpf(mid) - value) <= error <= 2.0**-48 * abs(mid), at
    finally:
        o.mp.prec = before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_long_numbers_agree_with_longer_ones(name):
    context = MultiPrecisionContext(120)
    before, o.mp.prec = o.mp.prec, 900
    try:
        for at in sample(name)[::9].tolist():
            mid = np.array([context.mp.mpf(at)], dtype=object)
            y = getattr(context, name)(context.exact(mid))
            value = FUNCTIONS[name](o.mp.mpf(at))
            assert abs(o.mp.mpf(y.mid[0]) - value) <= o.mp.mpf(np.ravel(y.error)[0]), at
    finally:
        o.mp.prec = before
