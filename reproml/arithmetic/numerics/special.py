"""Functions that are formulas of others, with a bound of what a series leaves out: atan, lgamma and its
derivatives.

They are evaluated on the balls of a `Binary64Context`, so they need no instruction of their own in a
program, and all but atan also in pairs (compiler/pair_arrays.py). A condition on a midpoint chooses between
formulas that are both valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import comb
from typing import Any, NamedTuple, Union

_HALF = Fraction(1, 2)
_ATAN = [(-1) ** n / (2 * n + 1) for n in range(13, 0, -1)]


def atan(ctx: Any, x: Any) -> Any:
    """Return atan(x) = pi/2 - atan(1/x) for x > 1, and atan(t) = 2 atan(t / (1 + sqrt(1 + t^2))), twice.

    Then |t| <= tan(pi / 16) < 0.2, and the Maclaurin series is cut after t^27, with a remainder below
    0.04^14 / 29 < 2^-69 relative to t. Horner's scheme errs by less than 2^-52 relative to t. The slope of
    atan is at most 1.
    """
    size = abs(x)
    far = size.mid > 1
    t = ctx.choose(far, 1 / size, size)
    for _ in range(2):
        t = t / (1 + ctx.sqrt(1 + t * t))
    mid = t.mid
    square = mid * mid
    y = mid + mid * (_horner(square, _ATAN) * square)
    y = 4 * ctx.ball(y, t.error + abs(mid) * 2.0**-51)
    y = ctx.choose(far, ctx.pi * _HALF - y, y)
    return ctx.choose(x < 0, -y, y)


def _horner(x: Any, coefficients: Sequence[Union[float, Fraction]]) -> Any:
    y = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        y = y * x + coefficient
    return y


# ---- the logarithm of the gamma function, and its derivatives ----------------------------------------


class Stirling(NamedTuple):
    """How a context takes Stirling's series: for numbers from `shift` on, so many terms.

    bound: what the series leave out, which is less than the first omitted term (NIST Digital Library of
    Mathematical Functions, 5.11(ii)), and in binary64 their rounding.
    """

    shift: int
    terms: int
    bound: float


# B_26 / 8^26 < 2^-57. The values are below 1/8, and Horner's scheme adds up less than 3 / 8^2.
BINARY64 = Stirling(shift=8, terms=12, bound=2.0**-54)
PAIRS = Stirling(shift=32, terms=14, bound=2.0**-120)  # B_30 / 32^30 < 2^-120


def _bernoulli(count: int) -> list[Fraction]:
    """Return B_0, ..., B_count."""
    numbers = [Fraction(1)]
    for n in range(1, count + 1):
        numbers.append(-sum((comb(n + 1, k) * numbers[k] for k in range(n)), Fraction(0)) / (n + 1))
    return numbers


EVEN_BERNOULLI = _bernoulli(30)[2::2]
_TERMS = range(1, len(EVEN_BERNOULLI) + 1)
_LGAMMA = [EVEN_BERNOULLI[k - 1] / (2 * k * (2 * k - 1)) for k in _TERMS]
_DIGAMMA = [EVEN_BERNOULLI[k - 1] / (2 * k) for k in _TERMS]
_TRIGAMMA = [EVEN_BERNOULLI[k - 1] for k in _TERMS]


def _series(ctx: Any, z: Any, coefficients: list[Fraction], power: int) -> Any:
    """Return the sum of c / z^power, c' / z^(power + 2), ... Its slope in z is below 1 / z^2."""
    last_first = coefficients[: ctx.stirling.terms][::-1]
    if ctx.stirling is BINARY64:
        w = 1 / z.mid
        square = w * w
        sums = _horner(square, [float(c) for c in last_first]) * (w if power == 1 else square)
        return ctx.ball(sums, z.error * square + ctx.stirling.bound)
    w = 1 / z
    square = w * w
    sums = _horner(square, last_first) * (w if power == 1 else square)
    return sums + ctx.ball(0.0, ctx.stirling.bound)


def _shifted(ctx: Any, x: Any) -> tuple[Any, Any]:
    """Return whether x > shift, and z, which is x then and x + shift otherwise."""
    far = x.mid > ctx.stirling.shift
    return far, ctx.choose(far, x, x + ctx.stirling.shift)


def _reflected(ctx: Any, x: Any) -> Any:
    """Return x, or 1 - x where x < 0."""
    return ctx.choose(x < 0, 1 - x, x)


def tanh(ctx: Any, x: Any) -> Any:
    """Return -t / (2 + t) with t = exp(-2 |x|) - 1, so that nothing cancels, and with x's sign."""
    t = ctx.expm1(-2 * abs(x))
    y = -t / (2 + t)
    return ctx.choose(x < 0, -y, y)


def lgamma(ctx: Any, x: Any) -> Any:
    """Return log |Gamma(x)| of an exact number.

    Below 0 it is log(pi / |sin(pi x)|) - lgamma(1 - x), up to the shift s
    lgamma(x + s) - log(x (x + 1) ... (x + s - 1)).
    """
    a = _reflected(ctx, x)
    far, z = _shifted(ctx, a)
    product = a
    for i in range(1, ctx.stirling.shift):
        product = product * (a + i)
    product = ctx.choose(far, ctx.constant(Fraction(1)), product)
    if ctx.stirling is BINARY64:
        constant = ctx.ball(0.4189385332046727, 2.0**-54)  # log(2 pi) / 2 - 1 / 2
    else:
        constant = ctx.log(2 * ctx.pi) * _HALF - _HALF
    y = (z - _HALF) * (ctx.log(z) - 1) + constant + _series(ctx, z, _LGAMMA, 1) - ctx.log(product)
    return ctx.choose(x < 0, ctx.log(ctx.pi / abs(ctx.sinpi(x))) - y, y)


# The coefficients of t, ..., t^9 in log Gamma(1 + t), (-1)^k zeta(k) / k, and in log Gamma(2 + t), (-1)^k
# (zeta(k) - 1) / k, with Euler's constant for zeta(1) (NIST Digital Library of Mathematical Functions,
# 5.7.3).
_ZETA = [0.5772156649015329, 1.6449340668482264, 1.2020569031595942, 1.0823232337111382]
_ZETA += [1.0369277551433699, 1.0173430619844492, 1.0083492773819229, 1.0040773561979443]
_ZETA += [1.0020083928260822]
_AT_1, _AT_2 = ([(-1) ** k * (z - n) / k for k, z in enumerate(_ZETA, 1)][::-1] for n in (0, 1))


def lgamma_near_zero(ctx: Any, x: Any) -> Any:
    """Return log Gamma(x) of an exact number t + 1 or t + 2, |t| <= 2^-6: 0 at t = 0.

    The series is cut after t^9, with a remainder below 2^-57 t; Horner's scheme, with the roundings of the
    coefficients, errs by less than 2^-51 t.
    """
    if getattr(ctx, "stirling", None) is not BINARY64:
        return ctx.lgamma(x)
    second = x.mid > 1.5
    t = ctx.where(second, x.mid - 2, x.mid - 1)
    y = t * ctx.where(second, _horner(t, _AT_2), _horner(t, _AT_1))
    return ctx.ball(y + 0.0, abs(t) * 2.0**-50)


def digamma(ctx: Any, x: Any) -> Any:
    """Return the derivative of lgamma at an exact number; below 0 digamma(1 - x) - pi cot(pi x)."""
    a = _reflected(ctx, x)
    far, z = _shifted(ctx, a)
    steps = 1 / a
    for i in range(1, ctx.stirling.shift):
        steps = steps + 1 / (a + i)
    steps = ctx.choose(far, ctx.constant(Fraction(0)), steps)
    y = ctx.log(z) - 1 / (2 * z) - _series(ctx, z, _DIGAMMA, 2) - steps
    return ctx.choose(x < 0, y - ctx.pi * (ctx.cospi(x) / ctx.sinpi(x)), y)


def trigamma(ctx: Any, x: Any) -> Any:
    """Return the derivative of digamma; below 0 (pi / sin(pi x))^2 - trigamma(1 - x)."""
    a = _reflected(ctx, x)
    far, z = _shifted(ctx, a)
    steps = 1 / (a * a)
    for i in range(1, ctx.stirling.shift):
        steps = steps + 1 / ((a + i) * (a + i))
    steps = ctx.choose(far, ctx.constant(Fraction(0)), steps)
    y = (1 + 1 / (2 * z) + _series(ctx, z, _TRIGAMMA, 2)) / z + steps
    pole = ctx.pi / ctx.sinpi(x)
    return ctx.choose(x < 0, pole * pole - y, y)
