"""Tensors computed from Python numbers: arange and linspace."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import target
from reproml.arithmetic.operators.arguments import require_float32


def arange(*bounds: float, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """Return start + i * step, rounded once. PyTorch itself computes integer results.

    bounds: (end), (start, end) or (start, end, step).
    """
    integers = all(isinstance(b, int) for b in bounds)
    if dtype is None and not integers:
        dtype = torch.get_default_dtype()
    if dtype not in (torch.float32, target().dtype):
        if dtype is not None and dtype.is_floating_point and not integers:
            require_float32(dtype)
        return torch.arange(*bounds, dtype=dtype, device=device)
    start, end, step = (
        (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1) if len(bounds) == 2 else bounds
    )
    count = math.ceil((end - start) / step)  # in binary64, as PyTorch counts
    i = torch.arange(max(count, 0), dtype=torch.int64)
    return elementwise(lambda ctx, i: Fraction(start) + i * Fraction(step), i).to(device or "cpu")


def linspace(
    start: Any, end: Any, steps: int, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Return start + i (end - start) / (steps - 1), rounded once.

    Raises NotExactError unless dtype is float32.
    """
    require_float32(dtype or torch.get_default_dtype())
    a, b = Fraction(float(start)), Fraction(float(end))
    i = torch.arange(steps, dtype=torch.int64)
    return elementwise(lambda ctx, i: a + i * ((b - a) / max(steps - 1, 1)), i).to(device or "cpu")
