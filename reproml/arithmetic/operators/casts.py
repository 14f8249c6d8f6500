"""Casts between dtypes, each of which rounds once."""

from __future__ import annotations

import math
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import devices
from reproml.arithmetic.numerics.formats import binary32_to_odd
from reproml.arithmetic.numerics.rationals import to_53_bits
from reproml.errors import NotExactError

# Floats of 16 and 8 bits, to which PyTorch rounds wide numbers by way of float32.
NARROW = frozenset(
    x
    for x in vars(torch).values()
    if isinstance(x, torch.dtype) and x.is_floating_point and x.itemsize < 4
)


def to_copy(x: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Compute aten._to_copy of a tensor or, as `vmap` calls it, a Python number.

    Raises NotExactError as `_prepared` does.
    """
    x = _as_tensor(x)
    x = _prepared(x, dtype or x.dtype)
    return torch.ops.aten._to_copy(x, dtype=dtype, **options)  # type: ignore[no-any-return]


def copy_(x: Tensor, source: Any, non_blocking: bool = False) -> Tensor:
    """Compute aten.copy_. Raises NotExactError as `_prepared` does."""
    return x.copy_(_prepared(_as_tensor(source), x.dtype), non_blocking)


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor that PyTorch casts to `dtype` with one rounding of x.

    Raises NotExactError if the result depends on the machine: a float outside an integer dtype's range
    becomes whatever integer the processor returns. Below the range of int64 that is its lowest number.
    """
    if dtype in NARROW and x.dtype.itemsize >= 4 and x.dtype is not torch.float32:
        return float32_to_odd(x)
    if x.is_floating_point() and not (
        dtype.is_floating_point or dtype.is_complex or dtype is torch.bool
    ):
        if devices.is_on_accelerator(x):
            replay_log.flush()
        if dtype is torch.int64:
            # -inf and numbers below the range become its lowest number on every machine.
            x = torch.where(x < -(2.0**63), -(2.0**63), x)
        integer, bounds = x.double().trunc(), torch.iinfo(dtype)
        if not bool(((integer >= bounds.min) & (integer < bounds.max + 1.0)).all()):
            raise NotExactError(
                f"A cast of NaN, infinity or an out-of-range number to {dtype} depends on the machine; "
                "replace these numbers before it, for example by clamp."
            )
    return x


def float32_to_odd(x: Tensor) -> Tensor:
    """Return a float32 tensor, whose cast to a narrow dtype rounds x once.

    Raises NotExactError for unsigned integers of 32 and more bits.
    """
    if x.dtype is torch.int64:
        # The last 12 bits of an integer that binary64 cannot hold only show that it is not a tie.
        sticky = x & ~4095 | torch.where((x & 4095) == 0, 0, 2048)
        x = torch.where((x >= -(2**53)) & (x <= 2**53), x, sticky.to(x.dtype))
    elif x.dtype not in (torch.float64, torch.int32):
        raise NotExactError(
            f"A cast from {x.dtype} to fewer bits is not defined; cast to int64 first."
        )
    return binary32_to_odd(x.double())


def is_float32(value: Union[int, float]) -> bool:
    """Return whether a number is a float32 number or NaN, so that PyTorch rounds it once to fewer bits."""
    wide = to_53_bits(value, 1, 0) if isinstance(value, int) else value
    return math.isnan(wide) or (float(np.float32(wide)) == wide and wide == value)


def wide_numbers(data: Any) -> Any:
    """Return nested Python numbers as floats whose rounding to 16 or 8 bits rounds the numbers once.

    Returns None if there is something else in the lists and tuples.
    """
    if isinstance(data, (list, tuple)):
        inner = [wide_numbers(x) for x in data]
        return None if any(x is None for x in inner) else inner
    if isinstance(data, Tensor) and not data.dim() and not data.is_complex():
        data = data.item()
    if isinstance(data, (int, np.integer)):
        return to_53_bits(int(data), 1, 0)
    return float(data) if isinstance(data, (float, np.floating)) else None


def _as_tensor(x: Any) -> Tensor:
    """Return a Python number as a 0-dim tensor that has its value."""
    if isinstance(x, Tensor):
        return x
    return torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)


# ---- new tensors that hold a Python number -----------------------------------------------------------


def full(size: Any, value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a tensor that is filled with a number, which is rounded once."""
    value = number_for(value, dtype or torch.get_default_dtype())
    return torch.full(size, value, dtype=dtype, **options)


def scalar_tensor(value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a 0-dim tensor of a number, which is rounded once."""
    value = number_for(value, dtype or torch.get_default_dtype())
    return torch.ops.aten.scalar_tensor(value, dtype=dtype, **options)  # type: ignore[no-any-return]


def full_like(x: Tensor, value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a tensor like x that is filled with a number, which is rounded once."""
    return torch.full_like(x, number_for(value, dtype or x.dtype), dtype=dtype, **options)


def new_full(x: Tensor, size: Any, value: Any, *, dtype: Any = None, **options: Any) -> Tensor:
    """Return a tensor of x's dtype that is filled with a number, which is rounded once."""
    return x.new_full(size, number_for(value, dtype or x.dtype), dtype=dtype, **options)


def fill(x: Tensor, value: Any) -> Tensor:
    """Return a tensor like x that is filled with a number, which is rounded once."""
    return fill_(x.clone(), value)


def fill_(x: Tensor, value: Any) -> Tensor:
    """Fill x with a number, which is rounded once."""
    if isinstance(value, Tensor):
        return x.fill_(_prepared(value, x.dtype))
    return x.fill_(number_for(value, x.dtype))


def number_for(value: Any, dtype: torch.dtype) -> Any:
    """Return a number that PyTorch rounds to the nearest number of `dtype`, by way of float32."""
    if dtype not in NARROW or isinstance(value, complex):
        return value
    return float32_to_odd(_as_tensor(value)).item()


def zero_tensor(size: Any, **options: Any) -> Tensor:
    """Compute aten._efficientzerotensor, a tensor of zeros without memory, as a tensor with memory."""
    return torch.zeros(size, **options)
