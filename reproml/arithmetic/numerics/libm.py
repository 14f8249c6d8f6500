"""Correctly rounded forms of the functions that Python takes from the C library.

The last bit of the C library's results differs between systems. mpmath is imported when it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from functools import wraps
from types import BuiltinFunctionType, ModuleType
from typing import Any, Callable

from reproml.arithmetic.numerics.rationals import to_53_bits, to_double

# Bits to compute with, and to round to before the result.
_BITS = 400, 150
# A value within 2^-150 of a midpoint of two floats counts as the midpoint: an exact tie, which a power may
# be, is recognized, and no other value of these functions is known to come that close.
# Squares of floats sum to less than 4,300 bits: a distance is compared with its tie exactly.
_DISTANCE_BITS = 4500, 4400


def _log(mp: Any, x: Any, base: Any = None) -> Any:
    return mp.log(x) if base is None else mp.log(x) / mp.log(base)


def _lgamma(mp: Any, x: Any) -> Any:
    return mp.loggamma(x) if x > 0 else mp.log(abs(mp.gamma(x)))


def _same(name: str) -> Callable[..., Any]:
    return lambda mp, *args: getattr(mp, name)(*args)


# Function of `math` -> the real function, given mpmath and arguments in its numbers. All other functions of
# `math` compute with integers, are exact, or are operations that IEEE 754 rounds (sqrt, fma, degrees).
_REAL_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        name: _same(name)
        for name in "cos sin tan exp log1p expm1 log10 tanh cosh sinh acos asin atan acosh asinh atanh "
        "atan2 erf gamma".split()
    },
    "erfc": lambda mp, x: mp.erfc(x) if x < 100 else 0 * x,
    "log": _log,
    "log2": lambda mp, x: mp.log(x) / mp.ln2,
    "exp2": lambda mp, x: mp.power(2, x),
    "cbrt": lambda mp, x: mp.sign(x) * mp.cbrt(abs(x)),
    "pow": lambda mp, x, y: _real_power(mp, x, y),
    "lgamma": _lgamma,
}


class ExactMath(ModuleType):
    """Python's `math`, whose functions are correctly rounded to binary64.

    They raise the errors of `math`, and infinities and NaN are those of `math`.
    """

    def __init__(self) -> None:
        super().__init__("math")
        vars(self).update(vars(math))
        for name, function in _REAL_FUNCTIONS.items():
            if hasattr(math, name):
                setattr(self, name, _rounded(getattr(math, name), function))
        self.dist = _dist
        self.hypot = lambda *x: _dist(x, [0.0] * len(x))


def _dist(p: Any, q: Any) -> float:
    approximation = math.dist(p, q)  # raises its errors
    pairs = [(float(x), float(y)) for x, y in zip(p, q)]
    if not all(math.isfinite(x) for pair in pairs for x in pair):
        return approximation

    def distance(mp: Any) -> Any:
        return mp.sqrt(mp.fsum((mp.mpf(x) - mp.mpf(y)) ** 2 for x, y in pairs))

    return rounded_to_nearest(distance, _DISTANCE_BITS)


def _rounded(native: Callable[..., float], function: Callable[..., Any]) -> Callable[..., float]:
    @wraps(native)
    def rounded(*args: Any) -> Any:
        approximation = native(*args)  # raises its errors
        numbers = [_number(x) for x in args]
        if not all(isinstance(x, int) or math.isfinite(x) for x in [approximation, *numbers]):
            return approximation  # a limit, which needs no rounding
        if native is math.atan2 and 0 in numbers:
            return approximation  # 0 or a multiple of pi / 2, by the sign of a zero, which mpmath lacks
        found = rounded_to_nearest(lambda mp: function(mp, *map(mp.mpf, numbers)))
        return found or math.copysign(found, approximation)

    return rounded


def _number(x: Any) -> Any:
    """Return the float that `math` computes with, or the integer, if no float is that large."""
    try:
        return float(x)
    except OverflowError:
        return int(x)


def rounded_to_nearest(value: Callable[[Any], Any], bits: tuple[int, int] = _BITS) -> float:
    """Return the float nearest to value(mpmath), ties to even. Raises OverflowError, as `math` does."""
    found = rounded_to_double(value, bits)
    if math.isinf(found):
        raise OverflowError("math range error")
    return found


def rounded_to_odd(value: Callable[[Any], Any], bits: tuple[int, int] = _BITS) -> float:
    """Return the float next to value(mpmath) towards zero if it is odd or exact, else its neighbour.

    Rounding that to a format of fewer than 52 bits gives what rounding the value gives: S. Boldo and
    G. Melquiond, IEEE Transactions on Computers 57(4), 2008. The result must not be subnormal.
    """
    n, exponent = _significant(value, bits)
    return to_53_bits(n, 1, exponent)


def rounded_to_double(value: Callable[[Any], Any], bits: tuple[int, int] = _BITS) -> float:
    """Return the float nearest to value(mpmath), ties to even; infinity on overflow."""
    return to_double(*_significant(value, bits))


def _significant(value: Callable[[Any], Any], bits: tuple[int, int]) -> tuple[int, int]:
    """Return n and e of the number n 2^e to which value(mpmath) is rounded."""
    import mpmath

    with mpmath.workprec(bits[0]):
        x = value(mpmath.mp)
        with mpmath.workprec(bits[1]):
            sign, mantissa, exponent, _ = (+x)._mpf_
    return -int(mantissa) if sign else int(mantissa), exponent


def log_of_fraction(x: Fraction) -> float:
    """Return the logarithm of a positive rational number; rounding it to binary32 rounds it once.

    A number within 2^-400 of 1 gives 0, as its logarithm is less than half of the least binary32 number.
    """
    return rounded_to_odd(lambda mp: mp.log(mp.mpf(x.numerator) / mp.mpf(x.denominator)))


class ExactPower(float):
    """A float whose `**` with another number is correctly rounded, as either operand."""

    def __pow__(self, exponent: Any, modulo: Any = None) -> Any:
        return power(float(self), exponent)

    def __rpow__(self, base: Any, modulo: Any = None) -> Any:
        return power(base, float(self))

    def __reduce__(self) -> Any:
        return float, (float(self),)


def power(base: float, exponent: float) -> Any:
    """Return base**exponent, correctly rounded to binary64. Raises the errors of `**`."""
    base, exponent = float(base), float(exponent)
    approximation: Any = base**exponent  # raises the errors of `**`
    if isinstance(approximation, complex) or base == 0:
        return approximation
    if not (math.isfinite(base) and math.isfinite(exponent)):
        return approximation  # a limit, which needs no rounding
    found = rounded_to_nearest(lambda mp: _real_power(mp, mp.mpf(base), mp.mpf(exponent)))
    return found or math.copysign(found, approximation)


def _real_power(mp: Any, base: Any, exponent: Any) -> Any:
    """Return a power that is real: if the base is negative, the exponent is an integer."""
    magnitude = mp.power(abs(base), exponent)
    return -magnitude if base < 0 and exponent % 2 else magnitude


EXACT_MATH = ExactMath()
_EXACT = {getattr(math, name): getattr(EXACT_MATH, name) for name in [*_REAL_FUNCTIONS, "dist", "hypot"]
          if hasattr(math, name)}  # fmt: skip


@contextmanager
def exact_functions(modules: Iterable[dict[str, Any]]) -> Iterator[None]:
    """Replace `math` and its functions among global variables of modules, until the end of the block."""
    with ExitStack() as stack:
        for variables in modules:
            for name, value in list(variables.items()):
                exact = EXACT_MATH if value is math else None
                if isinstance(value, BuiltinFunctionType):
                    exact = _EXACT.get(value)
                if exact is not None:
                    variables[name] = exact
                    stack.callback(variables.__setitem__, name, value)
        yield
