"""Correctly rounded forms of the functions that Python takes from the C library.

The last bit of the C library's results differs between systems. mpmath is imported when it is needed.
"""

from __future__ import annotations

import math
from typing import Any


class ExactMath:
    """Python's `math`, with transcendental functions that mpmath rounds correctly to binary64."""

    _ROUNDED = frozenset("cos sin tan exp log tanh erf acos asin atan cosh sinh".split())

    def __getattr__(self, name: str) -> Any:
        if name not in self._ROUNDED:
            return getattr(math, name)

        def rounded(x: float) -> float:
            import mpmath

            # The table maker's dilemma: every known binary64 case is decided by 2^-120.
            with mpmath.workprec(200):
                return float(getattr(mpmath, name)(mpmath.mpf(x)))

        return rounded


class ExactPower(float):
    """A float whose `**` with another number is correctly rounded, as either operand."""

    def __pow__(self, exponent: Any, modulo: Any = None) -> Any:
        return _power(float(self), exponent)

    def __rpow__(self, base: Any, modulo: Any = None) -> Any:
        return _power(base, float(self))

    def __reduce__(self) -> Any:
        return float, (float(self),)


def _power(base: float, exponent: float) -> Any:
    approximation: Any = float(base) ** float(exponent)  # raises the errors of `**`
    if isinstance(approximation, complex):
        return approximation
    if base == 0 or not (math.isfinite(base) and math.isfinite(exponent)):
        return approximation  # a limit, which needs no rounding
    if base < 0:  # then the exponent is an integer, or the power would be complex
        return -_power(-base, exponent) if exponent % 2 else _power(-base, exponent)
    import mpmath

    with mpmath.workprec(400):
        return float(mpmath.power(mpmath.mpf(base), mpmath.mpf(exponent)))
