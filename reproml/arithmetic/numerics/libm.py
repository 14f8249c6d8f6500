"""Correctly rounded replacements for Python's `math`, whose last bit depends on the C library."""

from __future__ import annotations

import math
from typing import Any


class ExactMath:
    """Python's `math` with transcendental functions that mpmath rounds correctly to binary64."""

    _ROUNDED = (
        "cos",
        "sin",
        "tan",
        "exp",
        "log",
        "tanh",
        "erf",
        "acos",
        "asin",
        "atan",
        "cosh",
        "sinh",
    )

    def __getattr__(self, name: str) -> Any:
        if name not in self._ROUNDED:
            return getattr(math, name)

        def rounded(x: float) -> float:
            import mpmath

            # Table maker's dilemma: no binary64 case is known that needs more than 120 bits.
            with mpmath.workprec(200):
                return float(getattr(mpmath, name)(mpmath.mpf(x)))

        return rounded


class ExactPower(float):
    """A float whose `**` with another number is correctly rounded, as either operand.

    Python takes a power of floats from the C library, whose last bit differs between systems.
    """

    def __pow__(self, exponent: Any, modulo: Any = None) -> Any:
        return _power(float(self), exponent)

    def __rpow__(self, base: Any, modulo: Any = None) -> Any:
        return _power(base, float(self))

    def __reduce__(self) -> Any:
        return float, (float(self),)


def _power(base: float, exponent: float) -> Any:
    native: Any = float(base) ** float(exponent)  # raises what Python raises
    if isinstance(native, complex):
        return native
    if base == 0 or not (math.isfinite(base) and math.isfinite(exponent)):
        return native  # a limit
    if base < 0:  # the exponent is an integer, as `native` is not complex
        return -_power(-base, exponent) if exponent % 2 else _power(-base, exponent)
    import mpmath

    with mpmath.workprec(400):
        return float(mpmath.power(mpmath.mpf(base), mpmath.mpf(exponent)))
