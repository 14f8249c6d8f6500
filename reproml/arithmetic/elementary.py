"""exp and log in binary64, from +, -, *, / alone, with a proven error.

Each is a fixed sequence of IEEE 754 operations on whole tensors, one rounding each (PyTorch's eager
kernels of single operators do not contract to FMA), so it gives the same bits on every machine, and
what has been verified on one machine holds on all. No vendor's libm is trusted.
"""

from __future__ import annotations

from math import factorial

import torch
from torch import Tensor

# Bound of the relative error of every function of this file: 8 ulp of binary64. The analysis stands
# with each function; tests/arithmetic/test_elementary.py measures under 2 ulp against mpmath.
RELATIVE = 2.0**-49

_INV_LN2 = 1.4426950408889634  # 1 / ln 2
# ln 2 = _LN2_HIGH + _LN2_LOW to 2^-93; the high part ends in 16 zero bits, so that k * _LN2_HIGH is
# exact for |k| < 2^16.
_LN2_HIGH = float.fromhex("0x1.62e42fefap-1")
_LN2_LOW = float.fromhex("0x1.cf79abc9e3b3ap-40")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_EXP = [1 / factorial(n) for n in range(14, -1, -1)]
_LOG = [2 / (2 * n + 1) for n in range(11, 0, -1)]


def _horner(x: Tensor, coefficients: list[float]) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient  # two kernels, two roundings
    return y


def _power_of_two(k: Tensor) -> Tensor:
    """2^k for integers -1022 <= k <= 1023, given as float64."""
    return ((k.to(torch.int64) + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """exp(x), float64 in and out, for -700 <= x <= 709; what lies outside is moved to that end.

    Cody & Waite reduction x = k ln 2 + r, |r| <= 0.3466: the error of r is below 2^-53 * 0.35 + k 2^-93.
    Taylor to the 14th power: the remainder is below r^15 / 15! < 2^-62. Horner's scheme errs by less
    than 2 * 2^-53 * exp(|r|) at its last two steps, the earlier ones weighed by |r|.
    """
    x = x.clamp(-700.0, 709.0)
    k = torch.round(x * _INV_LN2)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    # 2^k in two factors, as 2^1024 is not a number
    half = torch.floor(k * 0.5)
    return _horner(r, _EXP) * _power_of_two(half) * _power_of_two(k - half)


def log(x: Tensor) -> Tensor:
    """log(x), float64 in and out; x normal or zero. log(0) = -inf, NaN below zero.

    x = 2^k m with sqrt(1/2) <= m < sqrt(2), so that k = 0 around 1 and nothing cancels. With
    s = (m - 1)/(m + 1), |s| <= 0.1716: log m = 2 artanh s, the series cut at s^23, remainder below
    2^-63 relative to s. m - 1 is exact (Sterbenz), s has two roundings.
    """
    bits = x.view(torch.int64) if x.is_contiguous() else x.contiguous().view(torch.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (k << 52)).view(torch.float64)
    k = k.double()
    f = m - 1
    s = f / (m + 1)
    s2 = s * s
    # log m = 2 s + s * (2/3 s2 + 2/5 s2^2 + ...)
    y = (2 * s + s * (_horner(s2, _LOG) * s2) + k * _LN2_LOW) + k * _LN2_HIGH
    y = torch.where(x > 0, y, torch.where(x == 0, -torch.inf, torch.nan))
    return torch.where(x == torch.inf, x, y)
