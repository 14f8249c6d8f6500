"""Python numbers as they meet a float32 tensor."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any

from reproml.errors import NotExactError


def float32_scalar(x: Any) -> Fraction:
    """A Python number, rounded to binary32 as PyTorch does where it meets a float32 tensor."""
    value = ctypes.c_float(float(x)).value
    if not math.isfinite(value):
        raise NotExactError(
            f"The number {x} is not finite in float32, so nothing exact follows from it."
        )
    return Fraction(value)
