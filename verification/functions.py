"""Functions on the oracle's real numbers that only the tests of single operators need."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Callable

import numpy as np

from verification import oracle as o
from verification.oracle import INF, NAN, Real, exp, log1p, mp, real, sqrt

HALF = Fraction(1, 2)


def _ieee(function: Callable[..., Any], *operands: Real) -> Real:
    """Return a function's value at zeros, infinities and NaN as numpy's binary64 function gives it."""
    with np.errstate(all="ignore"):
        return Real(float(function(*[np.float64(as_float(x)) for x in operands])))


def as_float(x: Real) -> float:
    return -0.0 if x.v == 0 and x.minus else float(x.mpf)


def _special(*operands: Real) -> bool:
    return any(x.v == 0 or not x.finite for x in operands)


def _at_special(native: Callable[..., Any], value: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is `native` at zeros, infinities and NaN, and `value` of mpmath elsewhere."""

    def function(*operands: Any) -> Any:
        operands = tuple(real(x) for x in operands)
        if _special(*operands):
            return _ieee(native, *operands)
        return value(*operands)

    return function


def _inside(low: float, high: float, value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: value(x) if low <= x.v <= high else Real(NAN)


deg2rad = _at_special(np.deg2rad, lambda x: Real(x.mpf * mp.pi / 180))
rad2deg = _at_special(np.rad2deg, lambda x: Real(x.mpf * 180 / mp.pi))


def angle(x: Real) -> Real:
    return x if x.v != x.v else Real(mp.pi * 1) if x.v < 0 else Real(0)


def entr(x: Real) -> Real:
    if x.v != x.v or x.v == 0:
        return x if x.v else Real(0)
    return -x * o.log(x) if x.v > 0 and x.finite else Real(-INF)


def round_to_decimals(x: Real, decimals: int) -> Real:
    """Return the nearest multiple of 10^-decimals, of two the even one, with the sign of x."""
    if not x.finite or x.v == 0:
        return x
    power = Fraction(10) ** decimals
    n = Fraction(round(Fraction(x.v) * power))
    return Real(n / power) if n else x * 0


def mvlgamma(x: Real, p: int) -> Real:
    """Return the sum of lgamma(x - j/2) over j < p, and p (p - 1) / 4 log pi."""
    if x.v != x.v:
        return x
    if p > 1 and x < Fraction(p - 1, 2):
        return Real(NAN)
    if not x.finite:
        return Real(INF)
    total = Real(0) if p == 1 else Real(mp.mpf(p * (p - 1)) / 4 * mp.log(mp.pi))
    for j in range(p):
        total = total + lgamma(x - Fraction(j, 2))
    return total


tan = _at_special(np.tan, lambda x: Real(mp.tan(x.mpf)))
asin = _at_special(np.arcsin, _inside(-1, 1, lambda x: Real(mp.asin(x.mpf))))
acos = _at_special(
    np.arccos, _inside(-1, 1, lambda x: Real(0) if x.v == 1 else Real(mp.acos(x.mpf)))
)
atan = _at_special(np.arctan, lambda x: Real(mp.atan(x.mpf)))
sinh = _at_special(np.sinh, lambda x: Real(mp.sinh(x.mpf)))
cosh = _at_special(np.cosh, lambda x: Real(mp.cosh(x.mpf)))
asinh = _at_special(np.arcsinh, lambda x: Real(mp.asinh(x.mpf)))
acosh = _at_special(
    np.arccosh, _inside(1, math.inf, lambda x: Real(0) if x.v == 1 else Real(mp.acosh(x.mpf)))
)
atanh = _at_special(
    np.arctanh, _inside(-1, 1, lambda x: Real(x.v * INF if abs(x.v) == 1 else mp.atanh(x.mpf)))
)
hypot = _at_special(np.hypot, lambda x, y: sqrt(x * x + y * y))
atan2 = _at_special(np.arctan2, lambda y, x: Real(mp.atan2(y.mpf, x.mpf)))


def exp2(x: Any) -> Any:
    if x.finite and abs(x) < 1000:
        return power(real(2), x)
    return _ieee(np.exp2, x)


def log2(x: Any) -> Any:
    if x.finite and x > 0:
        m, e = math.frexp(float(x.v))
        return Real(e - 1) if m == 0.5 else Real(mp.log(x.mpf) / mp.ln2)
    return _ieee(np.log2, x)


def log10(x: Any) -> Any:
    if x.finite and x > 0:
        exact = {Fraction(10) ** n: n for n in range(12)}.get(x.v)
        return Real(mp.log(x.mpf) / mp.ln10) if exact is None else Real(exact)
    return _ieee(np.log10, x)


def _special_power(x: float, y: float) -> float:
    """Return Python's power of special numbers, but not of 0 to a negative one, where it raises."""
    if x == 0 and y < 0:
        return math.copysign(math.inf, x if y % 2 == 1 else 1)
    return math.pow(x, y)


def power(x: Any, y: Any) -> Any:
    x, y = real(x), real(y)
    if _special(x, y):
        return _ieee(_special_power, x, y)
    if x < 0 and y.v.denominator != 1:
        return Real(NAN)
    minus = x < 0 and y.v % 2 == 1
    base, exponent = abs(x).v, y.v
    size = mp.log(abs(x).mpf) * y.mpf
    if abs(size) > 2000:
        return _signed(Real(INF) if size > 0 else Real(Fraction(1, 2**2500)), minus)
    while exponent.denominator > 1:  # the root of a square is rational
        root = sqrt(Real(base))
        if not isinstance(root.v, Fraction):
            return Real(mp.power(mp.mpf(base.numerator) / base.denominator, mp.mpf(exponent.numerator)
                                 / exponent.denominator))  # fmt: skip
        base, exponent = root.v, 2 * exponent
    if abs(exponent) <= 300:
        return _signed(Real(base ** int(exponent)), minus)
    return _signed(Real(mp.power(abs(x).mpf, y.mpf)), minus)


def _signed(x: Real, minus: bool) -> Real:
    return -x if minus else x


def logaddexp(x: Any, y: Any) -> Any:
    if not (x.finite and y.finite):
        return _ieee(np.logaddexp, x, y)
    low, high = (x, y) if x < y else (y, x)
    return high + log1p(exp(low - high))


def logaddexp2(x: Any, y: Any) -> Any:
    if not (x.finite and y.finite):
        return _ieee(np.logaddexp2, x, y)
    if x.v == y.v:
        return Real(x.v + 1)
    low, high = (x, y) if x < y else (y, x)
    return high + Real(mp.log1p(mp.power(2, (low - high).mpf)) / mp.ln2)


def sinc(x: Any) -> Any:
    if not x.finite:
        return Real(NAN)
    if x.v.denominator == 1:
        return Real(int(x.v == 0))
    return Real(mp.sinpi(x.mpf) / (mp.pi * x.mpf))


def logit(x: Any) -> Any:
    if not x.finite or not 0 <= x.v <= 1:
        return Real(NAN)
    if x.v in (0, 1):
        return Real(-INF if x.v == 0 else INF)
    return o.log(x / (1 - x))


def logit_backward(g: Any, x: Any) -> Any:
    if not x.finite or not 0 <= x.v <= 1:
        return Real(NAN)
    return g / abs(x * (1 - x))


def xlog1py(x: Any, y: Any) -> Any:
    if y.v != y.v:
        return y
    return Real(0) if x.v == 0 else x * log1p(y)


def _is_pole(x: Any) -> bool:
    return x.v == 0 or bool(x.finite and x.v < 0 and x.v.denominator == 1)


def lgamma(x: Any) -> Any:
    if not x.finite or _is_pole(x):
        return Real(abs(x.v) if not x.finite else INF)
    if x.v in (1, 2):
        return Real(0)
    return Real(mp.loggamma(x.mpf) if x > 0 else mp.log(abs(mp.gamma(x.mpf))))


def digamma(x: Any) -> Any:
    if not x.finite:
        return x if x.v == INF else Real(NAN)
    if _is_pole(x):
        return Real(NAN if x.v != 0 else INF if x.minus else -INF)
    return Real(mp.psi(0, x.mpf))


def trigamma(x: Any) -> Any:
    if not x.finite:
        return Real(0) if x.v == INF else Real(NAN)
    return Real(INF) if _is_pole(x) else Real(polygamma(1, x.mpf))


def polygamma(n: int, x: Any) -> Any:
    """Return a derivative of digamma; below -10 by reflection, as mpmath steps to 0 otherwise."""
    if n == 0 or x > -10:
        return mp.psi(n, x)
    with mp.workprec(3 * mp.prec):
        pi, cot = mp.pi, mp.cospi(x) / mp.sinpi(x)
        square = 1 + cot * cot
        slope = {1: -(pi**2) * square, 2: 2 * pi**3 * cot * square}.get(n)
        if n == 3:
            slope = -2 * pi**4 * square * (1 + 3 * cot * cot)
        return (-1) ** n * mp.psi(n, 1 - x) - slope


# ---- remainders --------------------------------------------------------------------------------------


def _quotient(x: Any, y: Any, rounding: Callable[[Any], int]) -> int:
    return rounding(x.v / y.v)


def fmod(x: Any, y: Any) -> Any:
    if _special(x, y):
        return _ieee(np.fmod, x, y)
    return Real(x.v - y.v * _quotient(x, y, math.trunc), x.minus)


def remainder(x: Any, y: Any) -> Any:
    if x.finite and not y.finite and y.v == y.v:
        return x if x.v == 0 or (x.v < 0) == (y.v < 0) else y
    if _special(x, y):
        return _ieee(np.fmod, x, y)
    return Real(x.v - y.v * _quotient(x, y, math.floor), x.minus)


def floor_divide(x: Any, y: Any) -> Any:
    minus = x.minus != y.minus
    if x.finite and y.finite and y.v != 0:
        return Real(_quotient(x, y, math.floor), minus)
    if y.v == 0:
        return x / y
    if x.finite and y.v == y.v:
        return Real(-1) if minus and x.v != 0 else Real(0, minus)
    return Real(NAN)


def frac(x: Any) -> Any:
    return Real(x.v - math.trunc(x.v)) if x.finite else Real(NAN)


# ---- comparisons -------------------------------------------------------------------------------------


def copysign(x: Any, y: Any) -> Any:
    size = abs(x) if x.v == x.v else x
    return _signed(size, y.minus and y.v == y.v)


# ---- special functions -----------------------------------------------------------------------------


def _special_function(value: Callable[[Any], Any], low: Any, high: Any) -> Callable[[Any], Any]:
    """Return a function on real numbers from one on mpmath numbers, and its limits."""

    def function(x: Any) -> Any:
        x = real(x)
        if x.v != x.v:
            return x
        if not x.finite:
            return Real(high if x.v > 0 else low)
        return Real(value(x.mpf))

    return function


def _bessel_i(order: int, x: Any) -> Any:
    """Sum the power series; beyond 200 the function overflows in binary32."""
    x = min(max(x, mp.mpf(-200)), mp.mpf(200))
    total, term, k = mp.mpf(0), (x / 2) ** order, 0
    while abs(term) > mp.mpf(2) ** -2000:
        total, k = total + term, k + 1
        term = term * (x / 2) ** 2 / (k * (k + order))
    return total


i0 = _special_function(lambda x: _bessel_i(0, x), INF, INF)
i1 = _special_function(lambda x: _bessel_i(1, x), -INF, INF)
i0e = _special_function(lambda x: _bessel_i(0, x) * mp.exp(-abs(x)), 0, 0)
i1e = _special_function(lambda x: _bessel_i(1, x) * mp.exp(-abs(x)), 0, 0)
airy_ai = _special_function(mp.airyai, NAN, 0)
erfcx = _special_function(lambda x: mp.exp(x * x) * mp.erfc(x), INF, 0)
log_ndtr = _special_function(lambda x: mp.log(mp.erfc(-x / mp.sqrt(2)) / 2), -INF, 0)


def bessel_j(order: int) -> Callable[[Any], Any]:
    return _special_function(lambda x: mp.besselj(order, x), 0, 0)


def spherical_bessel_j0(x: Real) -> Real:
    if x.v == 0 or not x.finite:
        return x if x.v != x.v else Real(1 if x.v == 0 else 0)
    return real(o.sin(x) / x)


def ndtri(p: Real) -> Real:
    if p.v in (0, 1):
        return Real(-INF if p.v == 0 else INF)
    return Real(mp.sqrt(2) * mp.erfinv(2 * p.mpf - 1))


def nextafter(x: Real, y: Real) -> Real:
    """Return the neighbour of x in the oracle's format, by the order of bit patterns."""
    a, b = as_float(x), as_float(y)
    if math.isnan(a) or math.isnan(b) or a == b:
        return x + y if a != b else y
    if not a:
        return Real(math.copysign(2.0 ** o.FORMATS[o.target][1], b))
    bits = o.bits_of(x) + (1 if (b > a) == (a > 0) else -1)
    return Real(o.float_with(bits, o.target))
