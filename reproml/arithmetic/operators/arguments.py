"""Helpers to read an operator's arguments: dtypes, axes, pairs of sizes, and checks of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import target
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
    """Raise NotExactError if an operator's `dtype` argument asks for anything but float32 or the target."""
    if dtype not in (None, torch.float32, target().dtype):
        raise NotExactError(
            f"A result of {dtype} has no exact definition; use dtype=torch.float32."
        )


def require_container(x: Tensor) -> None:
    """Raise NotExactError unless an operand has the dtype of definitions, as integers have not."""
    if x.dtype is not target().container:
        raise NotExactError(f"it is defined for floating-point numbers, not for {x.dtype}")


def require_shape(name: str, x: Optional[Tensor], shape: Sequence[int]) -> None:
    """Raise RuntimeError unless an operand, if there is one, has this shape and a definition's dtype.

    The compiled loops read as many numbers as the sizes of other operands say.
    """
    dtype = target().container
    if x is not None and (x.shape != tuple(shape) or x.dtype is not dtype):
        raise RuntimeError(
            f"{name} must be {str(dtype)[6:]} of shape {list(shape)}, not {x.dtype} of shape "
            f"{list(x.shape)}"
        )


def float32_operands(*operands: Any) -> tuple[Tensor, ...]:
    """Convert Python numbers, integers and 0-dim float64 tensors to the dtype of definitions.

    That is float32, as PyTorch does, or float64 for results in float64."""
    dtype = target().container
    if all(isinstance(x, Tensor) and x.dtype is dtype for x in operands):
        return operands
    device = next(x.device for x in operands if isinstance(x, Tensor))
    return tuple(to_device(x, device).to(dtype) for x in operands)


def dims_tuple(dim: Any) -> Sequence[int]:
    """Return PyTorch's `dim` argument as a tuple, which is empty for all axes."""
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def pair(x: Any) -> list[int]:
    """Return [height, width] of a size that may be one number, a list of one, or a list of two."""
    return [x[0], x[-1]] if isinstance(x, (list, tuple)) else [x, x]
