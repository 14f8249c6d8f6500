"""Casts between dtypes: a cast rounds once, and one that would round twice is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import devices
from reproml.errors import NotExactError


def to_copy(x: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Compute aten._to_copy of a tensor or, as `vmap` calls it, a Python number.

    Raises NotExactError as `_check_cast` does.
    """
    x = _as_tensor(x)
    _check_cast(x, dtype or x.dtype)
    return torch.ops.aten._to_copy(x, dtype=dtype, **options)  # type: ignore[no-any-return]


def copy_(x: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
    """Compute aten.copy_. Raises NotExactError as `_check_cast` does."""
    source = _as_tensor(source)
    _check_cast(source, x.dtype)
    return x.copy_(source, non_blocking)


def _check_cast(x: Tensor, dtype: torch.dtype) -> None:
    """Raise NotExactError if the cast of x to `dtype` rounds twice or depends on the machine.

    PyTorch casts wide numbers to floats of 16 and 8 bits by way of float32. A float outside an integer
    dtype's range becomes whatever integer the processor returns.
    """
    if _is_narrow(dtype) and x.dtype.itemsize >= 4 and x.dtype is not torch.float32:
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
                f"A cast of NaN, infinity or an out-of-range number to {dtype} depends on the machine; "
                "replace these numbers before it, for example by clamp."
            )


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4


def _as_tensor(x: Any) -> Tensor:
    """Return a Python number as a 0-dim tensor that has its value."""
    if isinstance(x, Tensor):
        return x
    return torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)


# ---- new tensors that hold a Python number -----------------------------------------------------------


def full(size: Any, value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a tensor that is filled with a number, which is rounded once."""
    value = _for_dtype(value, dtype or torch.get_default_dtype())
    return torch.full(size, value, dtype=dtype, **options)


def scalar_tensor(value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a 0-dim tensor of a number, which is rounded once."""
    value = _for_dtype(value, dtype or torch.get_default_dtype())
    return torch.ops.aten.scalar_tensor(value, dtype=dtype, **options)  # type: ignore[no-any-return]


def full_like(x: Tensor, value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a tensor like x that is filled with a number, which is rounded once."""
    return torch.full_like(x, _for_dtype(value, dtype or x.dtype), dtype=dtype, **options)


def new_full(x: Tensor, size: Any, value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a tensor of x's dtype that is filled with a number, which is rounded once."""
    return x.new_full(size, _for_dtype(value, dtype or x.dtype), dtype=dtype, **options)


def fill(x: Tensor, value: Any) -> Tensor:
    """Return a tensor like x that is filled with a number, which is rounded once."""
    return fill_(x.clone(), value)


def fill_(x: Tensor, value: Any) -> Tensor:
    """Fill x with a number, which is rounded once."""
    if isinstance(value, Tensor):
        _check_cast(value, x.dtype)
        return x.fill_(value)
    return x.fill_(_for_dtype(value, x.dtype))


def _for_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return a number that PyTorch, by way of float32, rounds to the number of `dtype` nearest to `value`.

    Of the two float32 numbers around `value` it is the odd one, which lies on the same side of the halfway
    points of narrower formats (S. Boldo & G. Melquiond, IEEE Transactions on Computers 57(4), 2008).
    """
    if not _is_narrow(dtype) or isinstance(value, complex) or not abs(value) < 2.0**127:
        return value
    near = np.float32(value)
    if float(near) == value or near.view(np.int32) & 1:
        return float(near)
    return float(np.nextafter(near, np.float32(np.inf if value > float(near) else -np.inf)))
