"""Special functions: bounds of their errors, arguments far from 0, and values near midpoints."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import special

import reproml
from reproml.arithmetic.compiler import evaluate, kernels
from reproml.arithmetic.numerics.rounding import SLACK
from reproml.arithmetic.operators import special as operators
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


def _i(order, scaled):
    return lambda x: mp.besseli(order, x) * (mp.exp(-abs(x)) if scaled else 1)


def _scaled_erfc(x):
    return mp.exp(x * x) * mp.erfc(x)


def _log_ndtr(x):
    return mp.log(_scaled_erfc(-x / mp.sqrt(2)) / 2) - x * x / 2


# name -> the operator, its approximation, the function, and bounds of the arguments
QUICK: dict[str, Any] = {
    "i0": (torch.i0, operators._i(0, False), _i(0, False), -90, 90),
    "i1": (special.i1, operators._i(1, False), _i(1, False), -90, 90),
    "i0e": (special.i0e, operators._i(0, True), _i(0, True), -1e5, 1e5),
    "i1e": (special.i1e, operators._i(1, True), _i(1, True), -1e5, 1e5),
    "erfcx": (special.erfcx, operators._quick_erfcx, _scaled_erfc, -9, 1e4),
    "log_ndtr": (special.log_ndtr, operators._quick_log_ndtr, _log_ndtr, -1e4, 12),
    "bessel_j0": (special.bessel_j0, operators._j(0), lambda x: mp.besselj(0, x), -1e6, 1e6),
    "bessel_j1": (special.bessel_j1, operators._j(1), lambda x: mp.besselj(1, x), -1e6, 1e6),
    "airy_ai": (special.airy_ai, operators._quick_airy, lambda x: mp.airyai(x), -1e7, 20),
    **{
        f"polygamma({n})": (
            lambda x, n=n: torch.polygamma(n, x),
            lambda x, n=n: operators._quick_polygamma(n, x),
            lambda x, n=n: f.polygamma(n, x),
            -1e4 if n < 4 else -10,
            1e4,
        )
        for n in (2, 3, 20)
    },
}


def _arguments(low, high):
    """Return binary32 numbers: of all sizes, beside powers of 2 and edges of intervals, and even ones."""
    draw = torch.Generator().manual_seed(3)
    size = torch.exp(torch.rand(40, generator=draw) * 120 - 60)
    beside = torch.tensor([2.0, 8, 12, 16, 26, 1024, 37.336308]).repeat(3)
    beside = beside * (1 + torch.arange(-1, 2).repeat_interleave(7) * 2.0**-23)
    even = torch.linspace(-30, 30, 41) + 0.125
    x = torch.cat([size, -size, beside, -beside, even, even / 100, torch.tensor([1e-40, -1e-45])])
    x = x[(x >= low) & (x <= high)]
    return x[(x > 0) | (x != x.floor())]


@pytest.mark.parametrize("name", QUICK)
def test_approximations_are_within_their_bounds(name):
    _, approximation, function, low, high = QUICK[name]
    x = _arguments(low, high).double()
    y = approximation(x)
    error = torch.as_tensor(y.error, dtype=torch.float64).expand_as(y.mid)
    for v, mid, bound in zip(x.tolist(), y.mid.tolist(), error.tolist()):
        # Near 0, numbers beside a midpoint may lie on the same side of it instead: one step of binary64.
        room = 2.0**-1000 + (abs(mid) * 2.0**-52 if abs(v) < 2.0**-54 else 0)
        assert math.isinf(mid) or abs(function(mp.mpf(v)) - mid) <= bound * SLACK + room, v


@pytest.mark.parametrize("name", QUICK)
def test_special_functions_are_rounded_once(name):
    operator, _, function, low, high = QUICK[name]
    x = _arguments(low, high)
    for dtype in (torch.float32, torch.bfloat16):
        narrow = x.to(dtype)
        narrow = narrow[(narrow > 0) | (narrow != narrow.floor())]
        with reproml.exact(), rounding_to(dtype):
            check(operator(narrow), [Real(function(v.mpf)) for v in reals(narrow)])


def _normal_quantile(p):
    return mp.findroot(lambda x: mp.ncdf(x) / p - 1, special.ndtri(torch.tensor(p).double()).item())


def test_quantiles_of_normal_distribution_are_rounded_once():
    p = torch.tensor([1e-45, 1e-38, 3e-20, 1e-9, 1e-4, 0.099999994, 0.1, 0.3, 0.7, 0.9, 0.99999994])
    p = torch.cat([p, 0.5 + torch.tensor([-(2.0**-25), 2.0**-24, 2.0**-12])])
    wanted = [_normal_quantile(v) for v in p.tolist()]
    y = operators._quick_ndtri(p.double())
    for v, mid, bound in zip(wanted, y.mid.tolist(), y.error.tolist()):
        assert abs(v - mid) <= bound + abs(mid) * 2.0**-52 and bound < abs(mid) * 2.0**-40
    with reproml.exact():
        check(special.ndtri(p), [Real(v) for v in wanted])
        ends = special.ndtri(torch.tensor([0.0, 1.0, 0.5, -0.1, 1.1, math.nan]))
    check(ends, [Real(v) for v in (-INF, INF, 0, NAN, NAN, NAN)])


@pytest.mark.parametrize("name", [*QUICK, "ndtri"])
def test_few_elements_need_long_numbers(name, monkeypatch):
    found = []
    long_numbers = operators._in_long_numbers

    def counted(function, x):
        found.append(x.numel())
        return long_numbers(function, x)

    monkeypatch.setattr(operators, "_in_long_numbers", counted)
    operator = QUICK[name][0] if name in QUICK else special.ndtri
    draw = torch.Generator().manual_seed(0)
    subnormal = torch.randint(1, 2**23, (2000,), generator=draw).int().view(torch.float32)
    with reproml.exact():
        for x in (torch.rand(2000, generator=draw), torch.randn(2000, generator=draw), subnormal):
            operator(x)
            operator(x * -60)
    assert sum(found) <= 4
