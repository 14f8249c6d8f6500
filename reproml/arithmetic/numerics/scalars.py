"""Python numbers that are combined with a tensor."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any

from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.errors import NotExactError


def float32_scalar(x: Any) -> Fraction:
    """Return a Python number rounded to binary32, as PyTorch does where it meets a float32 tensor.

    Beside a float64 tensor it is exact."""
    in_binary64 = target() is BINARY64
    value = float(x) if in_binary64 else ctypes.c_float(float(x)).value
    if not math.isfinite(value):
        dtype = "float64" if in_binary64 else "float32"
        raise NotExactError(
            f"The number {x} is not finite in {dtype}, so no exact result can be computed with it."
        )
    return Fraction(value)
