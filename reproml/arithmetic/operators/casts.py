"""Casts between dtypes: each rounds once, or is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import devices
from reproml.errors import NotExactError


def to_copy(x: Tensor, *, dtype: Any = None, **options: Any) -> Tensor:
    check_cast(x, dtype or x.dtype)
    return torch.ops.aten._to_copy(x, dtype=dtype, **options)  # type: ignore[no-any-return]


def copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    check_cast(source, x.dtype)
    return x.copy_(source, non_blocking)


def check_cast(x: Tensor, dtype: torch.dtype) -> None:
    """A cast rounds once, except from float64 to 16 bits, which goes by way of float32; and what a
    number out of an integer's range becomes depends on the machine."""
    if x.dtype is torch.float64 and dtype in (torch.float16, torch.bfloat16):
        raise NotExactError(f"A cast from float64 to {dtype} rounds twice; cast to float32 first.")
    if x.dtype in (torch.int64, torch.int32) and dtype in (torch.float16, torch.bfloat16):
        raise NotExactError(
            f"A cast from {x.dtype} to {dtype} rounds twice; cast to float32 first."
        )
    if x.is_floating_point() and not (
        dtype.is_floating_point or dtype.is_complex or dtype is torch.bool
    ):
        if devices.is_on_accelerator(x):
            replay_log.flush()
        whole, bounds = x.double().trunc(), torch.iinfo(dtype)
        if not bool(((whole >= bounds.min) & (whole < bounds.max + 1.0)).all()):
            raise NotExactError(
                f"A cast of NaN, infinity or a number out of range to {dtype} depends on the machine."
            )
