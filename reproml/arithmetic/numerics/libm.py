"""Python's `math` where the C library would decide the last bit."""

from __future__ import annotations

import math
from typing import Any


class ExactMath:
    """Python's `math`, its transcendental functions correctly rounded to binary64 by mpmath."""

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

            with mpmath.workprec(
                200
            ):  # Table maker's dilemma: no binary64 case is known past 2^-120
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
    reference: Any = float(base) ** float(exponent)  # raises as it always does
    if isinstance(reference, complex):
        return reference
    if base == 0 or not (math.isfinite(base) and math.isfinite(exponent)):
        return reference  # a limit
    if base < 0:  # then the exponent is whole, or `plain` is complex
        return -_power(-base, exponent) if exponent % 2 else _power(-base, exponent)
    import mpmath

    with mpmath.workprec(400):
        return float(mpmath.power(mpmath.mpf(base), mpmath.mpf(exponent)))
