"""The functions in binary64 stay within the error bound that the rounding test relies on (by mpmath)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reproml.arithmetic.numerics import elementary
from tests.arithmetic.strategies import SPECIAL
from verification import oracle as o


def sample(low: float, high: float) -> torch.Tensor:
    """Return even and random points, points near 0 and at the ends; some are binary32 numbers."""
    random = np.random.default_rng(1)
    points = np.concatenate([
        np.linspace(low, high, 301),
        random.uniform(low, high, 300),
        random.uniform(low, high, 200).astype(np.float32),
        2.0 ** random.uniform(-60, 0, 150) * random.choice([-1.0, 1.0], 150),
        np.array(SPECIAL),
        np.array([low, high, np.nextafter(low, high), np.nextafter(high, low)]),
        # where the branches and the reductions meet
        *[np.array([c - 2.0**-30, c, c + 2.0**-30]) for c in (-0.5, -0.35, -0.25, 0.25, 0.35, 0.5)],
        *[k * np.log(2) / 2 * np.array([1 - 2.0**-40, 1, 1 + 2.0**-40]) for k in range(-9, 10, 2)],
        *[k * np.pi / 4 * np.array([1 - 2.0**-40, 1, 1 + 2.0**-40]) for k in range(1, 20)],
    ])  # fmt: skip
    return torch.tensor(np.unique(points[(points >= low) & (points <= high)]), dtype=torch.float64)


def worst(function, exact, x: torch.Tensor) -> float:
    """Return the largest relative error."""
    largest = 0.0
    before = o.mp.prec
    o.mp.prec = 300
    try:
        for a, b in zip(x.tolist(), function(x).tolist()):
            value = exact(o.mp.mpf(a))
            if value == 0:
                assert b == 0, a
            else:
                largest = max(largest, float(abs(o.mp.mpf(b) - value) / abs(value)))
    finally:
        o.mp.prec = before
    return largest


CASES = [
    ("exp", elementary.exp, o.mp.exp, -700, 709),
    ("exp", elementary.exp, o.mp.exp, -2, 2),
    ("log", elementary.log, o.mp.log, 2.0**-149, 1e38),
    ("log", elementary.log, o.mp.log, 2.0**-300, 2),
    ("expm1", elementary.expm1, o.mp.expm1, -60, 709),
    ("expm1", elementary.expm1, o.mp.expm1, -1, 1),
    ("log1p", elementary.log1p, o.mp.log1p, -1 + 2.0**-50, 3),
    ("log1p", elementary.log1p, o.mp.log1p, 2.0**-149, 1e38),
    ("sin", lambda x: elementary.sin_cos(x)[0], o.mp.sin, -100, 100),
    ("sin", lambda x: elementary.sin_cos(x)[0], o.mp.sin, -elementary.SIN_MAX, elementary.SIN_MAX),
    ("cos", lambda x: elementary.sin_cos(x)[1], o.mp.cos, -100, 100),
    ("cospi", lambda x: elementary.sin_cos_pi(x)[1], o.mp.cospi, -3, 3),
    ("sinpi", lambda x: elementary.sin_cos_pi(x)[0], o.mp.sinpi, -3, 3),
    ("erf", elementary.erf, o.mp.erf, -6, 6),
    ("erfc", elementary.erfc, o.mp.erfc, -6, 11),
    ("erfc", elementary.erfc, o.mp.erfc, 10, 26),
    ("erfinv", elementary.erfinv, o.mp.erfinv, -1 + 2.0**-53, 1 - 2.0**-53),
    ("erfinv", lambda x: elementary.erfinv(1 - x), lambda x: o.mp.erfinv(1 - float(x)), 2.0**-53, 0.01),
]  # fmt: skip


# The binary32 number nearest to a multiple of pi / 2, and random ones, of every exponent beyond SIN_MAX.
generator = torch.Generator().manual_seed(1)
FAR = torch.cat(
    [
        torch.tensor([16367173.0 * 2.0**72, 2.0**128 - 2.0**104, elementary.SIN_MAX + 0.0625]),
        torch.randint(2**23, 2**24, (9, 109), generator=generator)
        .mul(2.0 ** torch.arange(-4, 105.0))
        .ravel(),
    ]
).double()


@pytest.mark.parametrize("which, exact", [(0, o.mp.sin), (1, o.mp.cos)])
def test_sin_and_cos_of_large_binary32_numbers(which, exact):
    before, o.mp.prec = o.mp.prec, 300
    try:
        for sign in (1, -1):
            found = worst(lambda x: elementary.sin_cos(x)[which], exact, sign * FAR)
            assert found < 8 * 2.0**-53 < elementary.RELATIVE
    finally:
        o.mp.prec = before


def test_two_over_pi_is_truncated():
    before, o.mp.prec = o.mp.prec, 300
    try:
        assert elementary._TWO_OVER_PI == int(o.mp.floor(o.mp.ldexp(2 / o.mp.pi, 224)))
    finally:
        o.mp.prec = before


@pytest.mark.parametrize("name, function, exact, low, high", CASES)
def test_relative_error_is_below_the_bound(name, function, exact, low, high):
    x = sample(float(low), float(high))
    if name in ("sin", "cos"):  # binary32 arguments, for which the reduction is precise enough
        x = x.float().double().unique()
        x = x[(x >= low) & (x <= high)]
    assert worst(function, exact, x) < elementary.RELATIVE


def test_measured_errors_of_exp_and_log_are_small():
    """exp and log are wrong by less than 2 ulp of binary64, as their analysis states."""
    assert worst(elementary.exp, o.mp.exp, sample(-700, 709)) < 2 * 2.0**-52
    assert worst(elementary.log, o.mp.log, sample(2.0**-149, 1e38)) < 2 * 2.0**-52


def test_values_at_the_ends_follow_ieee_754():
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([0.0, -0.0, -1.0, inf, nan], dtype=torch.float64)
    log = elementary.log(x)
    assert log[0] == log[1] == -inf and log[2].isnan() and log[3] == inf and log[4].isnan()
    assert elementary.exp(x[4]).isnan() and elementary.exp(x[0]) == 1
    # values out of range are beyond every binary32 number
    ends = elementary.exp(torch.tensor([-1e30, -inf, 1e30, inf], dtype=torch.float64))
    assert (ends[:2] < 2.0**-160).all() and (ends[2:] > 2.0**200).all() and (ends[:2] > 0).all()


@pytest.mark.parametrize(
    "function", [elementary.exp, elementary.log, elementary.log1p, elementary.expm1]
)
def test_layout_and_length_do_not_change_bits(function):
    x = sample(0.01, 30)
    together = function(x)
    strided = torch.stack([x, x], 1)[:, 0]
    one_by_one = torch.stack([function(v) for v in x[:50]])
    assert torch.equal(together, function(strided)) and torch.equal(together[:50], one_by_one)
    assert function(x[:0]).shape == (0,)
