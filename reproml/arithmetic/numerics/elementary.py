"""exp, log, sin, erf and similar functions in binary64, from +, -, *, / alone, with a proven error bound.

Each function is a fixed sequence of IEEE 754 operations on tensors, with one rounding each (PyTorch's eager
kernels of single operators do not contract to FMA). Therefore it returns the same bits on every machine,
and what has been verified on one machine holds on all. No vendor's libm is used.

tools/coefficients.py computes every constant and coefficient of this file and of the same functions in
csrc; tests/tools/test_coefficients.py compares them bit for bit. csrc/elementary.h has the same sequences.
"""

from __future__ import annotations

from math import factorial, ldexp

import torch
from torch import Tensor

from reproml.arithmetic.numerics.devices import is_on_accelerator

# Bound of the relative error of every function in this file: 8 ulp of binary64. The analysis is in each
# function's docstring; tests/arithmetic/numerics/test_elementary.py measures less than 3 ulp.
RELATIVE = 2.0**-49
EXP_RELATIVE = 2.0**-51  # bound of the relative error of exp

_INV_LN2 = 1.4426950408889634  # 1 / ln 2
# ln 2 = _LN2_HIGH + _LN2_LOW to 2^-93; the high part ends in 16 zero bits, so that k * _LN2_HIGH is
# exact for |k| < 2^16.
_LN2_HIGH = float.fromhex("0x1.62e42fefap-1")
_LN2_LOW = float.fromhex("0x1.cf79abc9e3b3ap-40")
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
_EXP = [1 / factorial(n) for n in range(14, -1, -1)]
_LOG = [2 / (2 * n + 1) for n in range(11, 0, -1)]


def horner(x: Tensor, coefficients: list[float]) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = y * x + coefficient  # two kernels, two roundings
    return y


def power_of_two(k: Tensor) -> Tensor:
    """Return 2^k for integers -1022 <= k <= 1023 in a float64 tensor."""
    return ((k.to(torch.int64) + 1023) << 52).view(torch.float64)


def exp(x: Tensor) -> Tensor:
    """Compute exp(x), float64 in and out, for -700 <= x <= 709. Other arguments are clamped to that range.

    Cody & Waite reduction x = k ln 2 + r, |r| <= 0.3466: the error of r is below 2^-53 * 0.35 + k 2^-93.
    Taylor to the 14th power: the remainder is below r^15 / 15! < 2^-62. Horner's last step, 1 + r y, rounds
    by 1.42 * 2^-53 (by half of that if the result is below 1) and propagates |r| times y's error of
    1.5 * 2^-53. In total, the error is below 2.4 * 2^-53 exp(x).
    """
    x = x.clamp(-700.0, 709.0)
    k = torch.round(x * _INV_LN2)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    # 2^k in two factors, as 2^1024 is not a binary64 number
    half = torch.floor(k * 0.5)
    return horner(r, _EXP) * power_of_two(half) * power_of_two(k - half)


def log(x: Tensor) -> Tensor:
    """Compute log(x), float64 in and out; x normal or zero. log(0) = -inf, NaN below zero.

    x = 2^k m with sqrt(1/2) <= m < sqrt(2), so that k = 0 around 1 and nothing cancels. With
    s = (m - 1)/(m + 1), |s| <= 0.1716: log m = 2 artanh s. The series is cut after s^23, with a remainder
    below 2^-63 relative to s. m - 1 is exact (Sterbenz), s has two roundings.
    """
    bits = x.view(torch.int64) if x.is_contiguous() else x.contiguous().view(torch.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (k << 52)).view(torch.float64)
    k = k.double()
    f = m - 1
    s = f / (m + 1)
    s2 = s * s
    # log m = 2 s + s * (2/3 s2 + 2/5 s2^2 + ...)
    y = (2 * s + s * (horner(s2, _LOG) * s2) + k * _LN2_LOW) + k * _LN2_HIGH
    y = torch.where(x > 0, y, torch.where(x == 0, -torch.inf, torch.nan))
    return torch.where(x == torch.inf, x, y)


_EXPM1 = [1 / factorial(n) for n in range(15, 0, -1)]


def expm1(x: Tensor) -> Tensor:
    """Compute exp(x) - 1, float64 in and out, for x <= 709.

    For |x| < 0.35 the Taylor series without its first term, so that nothing cancels; otherwise
    exp(x) >= 1.41 or <= 0.71, and the subtraction loses two bits at most.
    """
    small = x.clamp(-0.35, 0.35)
    return torch.where(x.abs() < 0.35, horner(small, _EXPM1) * small, exp(x) - 1)


def log1p(x: Tensor) -> Tensor:
    """Compute log(1 + x), float64 in and out, near 0 by the series of `log` with x in place of m - 1."""
    s = x.clamp(-0.25, 0.25)
    s = s / (2 + s)
    s2 = s * s
    near = 2 * s + s * (horner(s2, _LOG) * s2)
    # For |x| >= 1/4 the rounding of 1 + x moves its logarithm by less than 2^-53 / 0.75.
    return torch.where(x.abs() < 0.25, near, log(1 + x))


# pi / 2 split into numbers of 33, 33 and 53 bits, so that k times the first two is exact for k < 2^20.
_PIO2 = [float.fromhex(h) for h in ("0x1.921fb544p+0", "0x1.0b4611a6p-34", "0x1.3198a2e037073p-69")]
_SIN = [(-1) ** n / factorial(2 * n + 1) for n in range(8, 0, -1)]
_COS = [(-1) ** n / factorial(2 * n) for n in range(9, 0, -1)]
SIN_MAX = 2.0**19  # beyond this the reduction by these numbers is not precise enough


def sin_cos_reduced(r: Tensor, quadrant: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sin and cos of r + quadrant * pi / 2, |r| <= 0.79: Taylor series, remainders below 2^-62."""
    r2 = r * r
    s = r + r * (horner(r2, _SIN) * r2)
    c = 1 + horner(r2, _COS) * r2
    q = quadrant - torch.floor(quadrant * 0.25) * 4  # exact, and faster than the remainder
    odd = (q == 1) | (q == 3)
    sine = torch.where(odd, c, s) * torch.where(q >= 2, -1.0, 1.0)
    cosine = torch.where(odd, s, c) * torch.where((q == 1) | (q == 2), -1.0, 1.0)
    return sine, cosine


# 2 / pi, times 2^224 and truncated.
_TWO_OVER_PI = int("a2f9836e4e441529fc2757d1f534ddc0db6295993c439041fe5163ab", 16)
_PARTS, _PART_BITS = 4, 29


_tables: dict[torch.device, Tensor] = {}


def _two_over_pi(device: torch.device) -> Tensor:
    """Return 2^e 2 / pi modulo 4 for e = -4, ..., 104, in parts of 29 bits: float64 [4, 109].

    The last bit of the parts is 2^-27, 2^-56, 2^-85 and 2^-114.
    """
    if device in _tables:
        return _tables[device]
    values = []
    for e in range(-4, 105):
        scaled = (_TWO_OVER_PI << (e + 4)) >> (4 + 224 - 114)  # 2^e 2 / pi in units of 2^-114
        parts = [scaled >> _PART_BITS * i & (1 << _PART_BITS) - 1 for i in range(_PARTS)]
        values += [ldexp(part, _PART_BITS * i - 114) for i, part in enumerate(parts)][::-1]
    # Each number is written on the device: a copy from the host would make it wait.
    numbers = [torch.full((), value, dtype=torch.float64, device=device) for value in values]
    table = torch.stack(numbers).view(-1, _PARTS).T.contiguous()
    if type(table) is Tensor:  # and not of a mode, such as one of tensors without numbers
        _tables[device] = table
    return table


def _reduced(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return r and k with x = r + k pi / 2 modulo 2 pi, |r| <= 0.79, for a binary32 number |x| > 2^19.

    Payne & Hanek's reduction. x = m 2^e with an integer m of 24 bits, so that its product with a part of
    2^e 2 / pi is exact. The parts that are left out add less than 2^-90. k is an integer near the sum of
    the first two products, and the first minus k is exact. The sum with the second product is exact below
    1/8, from where the third, which is below 2^-32, could cancel; the fourth is below 2^-61, and the sum
    is at least 2^-31: the binary32 number nearest to a multiple of pi / 2 is 16367173 x 2^72, at 1.6e-9
    (Muller, Elementary Functions, 3rd ed., section 11.2). So three roundings, and two of the product with
    pi / 2, give an error below 5 x 2^-53.
    """
    m, e = torch.frexp(x)
    m = m * 2.0**24
    rows = (e - 20).clamp(0, 108).reshape(-1)
    table = _two_over_pi(x.device)
    first, second, third, fourth = (
        m * table[i].index_select(0, rows).view(x.shape) for i in range(_PARTS)
    )
    k = torch.round(first + second)
    return (((first - k) + second) + third + fourth) * (3.141592653589793 * 0.5), k


def sin_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sin(x) and cos(x), float64 in and out, for |x| <= 2^19 and for binary32 numbers beyond.

    Cody & Waite's reduction, beyond 2^19 that of Payne & Hanek.
    """
    if x.is_cpu and bool(((x.abs() > SIN_MAX) & x.isfinite()).all()):
        return sin_cos_reduced(*_reduced(x))
    k = torch.round(x.clamp(-SIN_MAX, SIN_MAX) * (1 / _PIO2[0]))
    r = ((x - k * _PIO2[0]) - k * _PIO2[1]) - k * _PIO2[2]
    far = (x.abs() > SIN_MAX) & x.isfinite()
    if is_on_accelerator(x) or bool(far.any()):  # not to make the host wait for a device
        large = torch.where(far, x, 2 * SIN_MAX)
        r, k = (torch.where(far, a, b) for a, b in zip(_reduced(large), (r, k)))
    return sin_cos_reduced(torch.where(x.isfinite(), r, x * 0), k)


def sin_cos_pi(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sin(pi x) and cos(pi x), float64 in and out; the reduction is exact."""
    k = torch.round(2 * x)
    return sin_cos_reduced((x - k * 0.5) * 3.141592653589793, k)


_ERF = [
    2 / 3.141592653589793**0.5 * (-1) ** n / (factorial(n) * (2 * n + 1)) for n in range(15, -1, -1)
]
ERFC_MAX = 26.4
# (1 + 2 t) exp(t^2) erfc(t) as a polynomial in q = (t - 4) / (t + 4), lowest power first. It interpolates
# at the 23 Chebyshev nodes in q for 0 <= t <= 26.5, computed with 400 bits. Its error is below 2^-53.8.
_ERFC = [
    float.fromhex(h)
    for h in """
    0x1.3ba5916e9fd7fp+0 -0x1.1df1ad154a299p-3 0x1.f7f5df66fdadep-7 0x1.16ecefcfa5e28p-4
    -0x1.9ddb23c3ea4c9p-4 0x1.7fee004dfa851p-4 -0x1.0fb06dfe33f76p-4 0x1.3079edf99d4cap-5
    -0x1.096238870c62dp-6 0x1.49c671a0c8c9bp-8 -0x1.8d4a9a7d2a17ep-11 -0x1.a1de85c746b2fp-13
    0x1.3be07b21013ddp-13 -0x1.996a9b20dbee0p-16 -0x1.789aef365b0bcp-17 0x1.7fbe577ed8f8ep-18
    0x1.41ccde9dafc40p-22 -0x1.c0f6bc55d88a1p-21 0x1.12bd61508d241p-24 0x1.f53f0fc69fbadp-24
    -0x1.100b34b026457p-27 -0x1.eb2fb8da58cefp-27 -0x1.145966503e5d2p-29
    """.split()
]


def erf(x: Tensor) -> Tensor:
    """Compute erf(x), float64 in and out: the Maclaurin series for |x| < 1/2, 1 - erfc(|x|) above."""
    small = x.clamp(-0.5, 0.5)
    far = 1 - erfc(x.abs())
    return torch.where(
        x.abs() < 0.5, small * horner(small * small, _ERF), torch.where(x < 0, -far, far)
    )


def erfc(x: Tensor) -> Tensor:
    """Compute erfc(x), float64 in and out; beyond 26.4 the result is the value at 26.4, which is 2^-1011.

    It is exp(-t^2) P(q) / (1 + 2 t) with t = |x|; below 0 it is 2 - erfc(-x). t = h + l, where h is a
    multiple of 2^-20, so that h^2 is exact; exp(-t^2) = exp(-h^2) exp(-z) with z = l (t + h) < 2^-15. In
    units of 2^-53 the error is below 2.4 (exp) + 1.8 (Horner's scheme) + 0.6 (P) + 5.2 (q: three roundings
    times P' / P < 1.75) + 5 (the other operations) = 15. `erf` multiplies this by erfc(1/2) / erf(1/2),
    which is 0.93, and adds one rounding.
    """
    t = x.abs().clamp(max=ERFC_MAX)
    h = (t + 1.5 * 2.0**32) - 1.5 * 2.0**32
    z = (t - h) * (t + h)
    y = exp(-(h * h)) * (1 - z * (1 - z * (0.5 - z * (1 / 6))))
    y = y * horner((t - 4) / (t + 4), _ERFC[::-1]) / (1 + 2 * t)
    return torch.where(x < 0, 2 - y, y)


def erfcx(x: Tensor) -> Tensor:
    """Compute exp(x^2) erfc(x), float64 in and out, for x >= 0.

    Up to ERFC_MAX it is P(q) / (1 + 2 x) as in `erfc`: in units of 2^-53 the error is below 1.8 + 0.6 +
    5.2, and two roundings. Beyond, it is the asymptotic series in w = 1 / (2 x^2), whose remainder is less
    than the first omitted term, 135135 w^7 < 2^-55 (NIST Digital Library of Mathematical Functions,
    7.12(i)).
    """
    far = x > ERFC_MAX
    t = x.clamp(max=ERFC_MAX)
    y = horner((t - 4) / (t + 4), _ERFC[::-1]) / (1 + 2 * t)
    if is_on_accelerator(x) or bool(far.any()):  # as in `sin_cos`
        t = x.clamp(min=ERFC_MAX)
        w = torch.full_like(t, 0.5) / (t * t)
        y = torch.where(far, horner(w, _ERFCX) / (t * 3.141592653589793**0.5), y)
    return y


_ERFCX = [10395.0, -945.0, 105.0, -15.0, 3.0, -1.0, 1.0]

# erfinv(x) / (x v) as a polynomial in q = 23/16 - 19.5 / v, v = 8 - log(1 - x^2), lowest power first. It
# interpolates at the 38 Chebyshev nodes in q for -1 <= q <= 1, computed with 400 bits. Its error is below
# 2^-53.9 for |x| < 1, where q < 0.995.
_ERFINV = [
    float.fromhex(h)
    for h in """
    0x1.4be363d1a1814p-3 0x1.f0dcaf8089916p-6 -0x1.764447cecce86p-5 -0x1.2989e9538b735p-6
    0x1.ab88dfec0062ap-7 -0x1.0fe5f5d7ca97ep-9 -0x1.991dbfff50645p-7 0x1.3afa08000da1dp-9
    0x1.185aa8ef0fafbp-7 -0x1.439bae46ebd4ep-9 -0x1.98d17182b4e14p-8 0x1.74afce0d52c66p-10
    0x1.f71ca09b20523p-9 -0x1.02ef9539300d5p-10 -0x1.1b9256091c7c5p-9 0x1.d130045ef694dp-11
    0x1.3833cfafc9660p-10 -0x1.ccc05ceeb5762p-11 -0x1.92075d9def448p-11 0x1.793e523e6e8bcp-11
    0x1.12b843600355bp-11 -0x1.05354bb1b8e9ap-11 -0x1.4c4f30e3880d0p-12 0x1.567ede47627f4p-12
    0x1.478c38710c4eep-13 -0x1.cee21fcb840ebp-13 -0x1.1a62bd9a9a209p-14 0x1.27bf83f008482p-13
    0x1.d0ddcb91bb0bcp-16 -0x1.3b1c73b940e81p-14 -0x1.4f9fc760eca78p-17 0x1.02b1746505d95p-15
    0x1.3a125df50cdd1p-19 -0x1.370871491342bp-17 -0x1.805ba420a7f54p-23 0x1.f32b900b0f1b9p-20
    -0x1.0d8d941795ea8p-25 -0x1.9d4ceca247833p-23
    """.split()
]


def erfinv(x: Tensor) -> Tensor:
    """Compute the inverse of erf, float64 in and out, for |x| < 1; infinite at 1 and -1, NaN beyond.

    It is x v R(q) with v = 8 + w, w = -log(1 - x^2), and q = 23/16 - 19.5 / v in [-1, 0.995). In units of
    2^-53, w errs by 3 ((1 - x)(1 + x)) + w + 1.5 (log), and the rounding of v adds v. With erfinv(x) =
    x P(w), these errors are multiplied by P' / P, which is pi / 12 at 0 and less above, and together give
    (2 w + 12.5) P' / P < 3.3. To this come 1.6 (two roundings of q, times R' / R), 3.7 (Horner's scheme),
    0.6 (R) and 2 (two products). All of them are largest at x = 0, and their sum is below 11.2.
    """
    v = 8 - log((1 - x) * (1 + x))
    q = 1.4375 - torch.full_like(v, 19.5) / v  # 19.5 / v would multiply by the reciprocal of v
    y = x * (v * horner(q, _ERFINV[::-1]))
    return torch.where(x.abs() == 1, x * torch.inf, y)
