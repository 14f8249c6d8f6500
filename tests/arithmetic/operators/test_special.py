"""Functions that mpmath computes: orders of polygamma, arguments far from 0, and values near midpoints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import special

import reproml
from reproml.arithmetic.compiler import evaluate, kernels
from verification import functions as f
from verification.oracle import INF, NAN, Real, check, mp, reals, rounding_to, same_bits

FAR = torch.tensor([2.0**58, 2.0**70, 3.0e38, 1e4, 50.0, 2.0**-149, 2.0**-140, 3 * 2.0**-149])


@pytest.mark.parametrize("n", [2, 3, 7])
def test_higher_polygamma_is_rounded_once(n):
    x = torch.tensor([0.5, 3.0, -1.25, 40.0, 1e-3, 0.0, -2.0, math.inf, -math.inf, math.nan])
    pole = INF if n % 2 else -INF
    wanted = [Real(mp.psi(n, v)) for v in x[:5].tolist()]
    wanted += [Real(v) for v in (pole, pole, 0, NAN, NAN)]
    with reproml.exact():
        check(torch.polygamma(n, x), wanted)
        leaf: Any = x[:5].clone().requires_grad_()
        torch.polygamma(n, leaf).sum().backward()
        assert same_bits(leaf.grad, torch.polygamma(n + 1, x[:5]))


def test_first_order_has_value_half_of_smallest_numbers():
    """I1(x) = x / 2 (1 + x^2 / 8 + ...) lies just above x / 2, which is a midpoint for odd multiples."""
    x = torch.tensor([1.0, 3.0, 5.0]) * 2.0**-149
    with reproml.exact():
        assert (special.i1(x) / 2.0**-149).tolist() == [1.0, 2.0, 3.0]
        assert (special.i1e(x) / 2.0**-149).tolist() == [0.0, 1.0, 2.0]


def test_values_far_from_zero():
    x = torch.cat([FAR, -FAR])
    with reproml.exact():
        scaled, one, normal = special.i0e(x), special.i1e(x), special.log_ndtr(x)
        error = special.erfcx(x)
    for y, function in ((scaled, _scaled(0)), (one, _scaled(1))):
        check(y, [Real(function(v.mpf)) for v in reals(x)])
    for v, found in zip(reals(x), error):
        if v.mpf > 2.0**50:  # 1 / (x sqrt pi), within 1 / (2 x^2) of it
            check(found.reshape(1), [Real(1 / (v.mpf * mp.sqrt(mp.pi)) * (1 - 1 / (2 * v.mpf**2)))])
        elif abs(v.mpf) < 100:
            check(found.reshape(1), [f.erfcx(v)])
    big = reals(x[8:10])
    check(normal[8:10], [Real(-(v.mpf**2) / 2 - mp.log(-v.mpf * mp.sqrt(2 * mp.pi))) for v in big])
    assert normal[0] == 0 and bool(normal[0].signbit())


def _scaled(order):
    def value(x):
        size = abs(x)
        if size > 2.0**50:
            terms = 1 - mp.mpf(4 * order**2 - 1) / (8 * size)
            y = terms / mp.sqrt(2 * mp.pi * size)
        else:
            y = mp.besseli(order, size) * mp.exp(-size)
        return -y if order and x < 0 else y

    return value


EXTREME = [1e300, 1e15 + 0.5, 40.25, 5e-324, -5e-324, 1e-300, -1e-160, 1 + 2**-52, 2 - 2**-52]
EXTREME += [-12.75, -1e15 + 0.5, -1e10 + 0.1, -12345.6, -(2.0**51) - 0.5, -3.25, 1e160, -2.0]


@pytest.mark.parametrize("n", [-1, 0, 1, 2, 3])
def test_gamma_functions_of_extreme_numbers_are_rounded_once_to_binary64(n):
    """mpmath's psi takes a step for each integer between a negative number and 0. -1: lgamma."""
    x = torch.tensor(EXTREME, dtype=torch.float64)
    poles = [INF, NAN, INF, -INF, INF][n + 1]
    wanted = []
    for v in reals(x):
        value = f.lgamma(v) if n < 0 else Real(poles) if v.v == -2 else Real(f.polygamma(n, v.mpf))
        wanted.append(value)
    with reproml.exact(), rounding_to(torch.float64):
        check(torch.lgamma(x) if n < 0 else torch.polygamma(n, x), wanted)


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lgamma_near_its_zeros_needs_no_long_numbers(dtype, path, monkeypatch):
    t = torch.cat([torch.arange(-70, 71) * 2.0**-12, torch.arange(-40, 41) * 2.0**-23])
    x = torch.cat([1 + t, 2 + t, torch.tensor([0.0, -3.0, 3.5, math.inf])]).to(dtype)
    monkeypatch.setattr(evaluate, "exact_elements", None)
    if path == "reference":
        monkeypatch.setattr(kernels, "library", None)
    with reproml.exact(), rounding_to(dtype):
        check(torch.lgamma(x), [f.lgamma(v) for v in reals(x)])
        check(torch.lgamma(x[:100]), [f.lgamma(v) for v in reals(x[:100])])
        assert not torch.signbit(torch.lgamma(torch.tensor([1.0, 2.0], dtype=dtype))).any()


@pytest.mark.parametrize("n", [2, 7, 40])
def test_higher_polygamma_is_rounded_once_to_binary64(n):
    x = torch.tensor([0.1, 3.0, -1.25, 40.0, 1e-3, -5.5, 1e300], dtype=torch.float64)
    with reproml.exact(), rounding_to(torch.float64):
        check(torch.polygamma(n, x), [Real(mp.psi(n, v)) for v in x.tolist()])


def test_erfc_far_from_zero():
    x = torch.tensor([1e300, -1e300, 1e160, 28.0, 26.5, -7.0], dtype=torch.float64)
    with reproml.exact(), rounding_to(torch.float64):
        check(torch.erfc(x), [Real(mp.erfc(mp.mpf(min(v, 1e3)))) for v in x.tolist()])
