"""Python numbers that are combined with a float32 tensor."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any

from reproml.errors import NotExactError


def float32_scalar(x: Any) -> Fraction:
    """Return a Python number rounded to binary32, as PyTorch does where it meets a float32 tensor."""
    value = ctypes.c_float(float(x)).value
    if not math.isfinite(value):
        raise NotExactError(
            f"The number {x} is not finite in float32, so no exact result can be computed with it."
        )
    return Fraction(value)
