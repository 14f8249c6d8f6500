"""Helpers to read an operator's arguments: dtypes, axes, pairs of sizes, and checks of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.numerics.devices import to_device
from reproml.errors import NotExactError


def require(condition: Any, message: str) -> None:
    """Raise RuntimeError(message), as PyTorch does, unless the condition holds.

    condition: a bool, or a bool tensor whose elements must all be true. A tensor on an accelerator is not
    checked, because reading it would make the host wait.
    """
    if isinstance(condition, Tensor):
        condition = not condition.is_cpu or bool(condition.all())
    if not condition:
        raise RuntimeError(message)


def require_float32(dtype: Any) -> None:
    """Raise NotExactError if an operator's `dtype` argument asks for anything but float32."""
    if dtype not in (None, torch.float32):
        raise NotExactError(
            f"A result of {dtype} has no exact definition; use dtype=torch.float32."
        )


def require_shape(name: str, x: Optional[Tensor], shape: Sequence[int]) -> None:
    """Raise RuntimeError unless an operand, if there is one, is float32 and has this shape.

    The compiled loops read as many numbers as the sizes of other operands say.
    """
    if x is not None and (x.shape != tuple(shape) or x.dtype is not torch.float32):
        raise RuntimeError(
            f"{name} must be float32 of shape {list(shape)}, not {x.dtype} of shape {list(x.shape)}"
        )


def float32_operands(*operands: Any) -> tuple[Tensor, ...]:
    """Convert Python numbers, integers and 0-dim float64 tensors to float32 tensors, as PyTorch does."""
    if all(isinstance(x, Tensor) and x.dtype is torch.float32 for x in operands):
        return operands
    device = next(x.device for x in operands if isinstance(x, Tensor))
    return tuple(to_device(x, device).to(torch.float32) for x in operands)


def dims_tuple(dim: Any) -> Sequence[int]:
    """Return PyTorch's `dim` argument as a tuple, which is empty for all axes."""
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def pair(x: Any) -> list[int]:
    """Return [height, width] of a size that may be one number, a list of one, or a list of two."""
    return [x[0], x[-1]] if isinstance(x, (list, tuple)) else [x, x]
