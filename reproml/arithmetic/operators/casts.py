"""Casts between dtypes: a cast rounds once, and one that would round twice is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import devices
from reproml.errors import NotExactError


def to_copy(x: Tensor, *, dtype: Any = None, **options: Any) -> Tensor:
    """Compute aten._to_copy. Raises NotExactError as `_check_cast` does."""
    _check_cast(x, dtype or x.dtype)
    return torch.ops.aten._to_copy(x, dtype=dtype, **options)  # type: ignore[no-any-return]


def copy_(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Compute aten.copy_. Raises NotExactError as `_check_cast` does."""
    _check_cast(source, x.dtype)
    return x.copy_(source, non_blocking)


def _check_cast(x: Tensor, dtype: torch.dtype) -> None:
    """Raise NotExactError if the cast of x to `dtype` rounds twice or depends on the machine.

    PyTorch casts float64, int64 and int32 to 16-bit floats by way of float32. A float outside an integer
    dtype's range becomes whatever integer the processor returns.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if half and x.dtype in (torch.float64, torch.int64, torch.int32):
        raise NotExactError(
            f"A cast from {x.dtype} to {dtype} rounds twice; cast to float32 first."
        )
    if x.is_floating_point() and not (
        dtype.is_floating_point or dtype.is_complex or dtype is torch.bool
    ):
        if devices.is_on_accelerator(x):
            replay_log.flush()
        integer, bounds = x.double().trunc(), torch.iinfo(dtype)
        if not bool(((integer >= bounds.min) & (integer < bounds.max + 1.0)).all()):
            raise NotExactError(
                f"A cast of NaN, infinity or an out-of-range number to {dtype} depends on the machine."
            )
