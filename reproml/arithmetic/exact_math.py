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
