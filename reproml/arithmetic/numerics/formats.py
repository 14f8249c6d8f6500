"""The format to which results are rounded: binary32, or that of an operator on tensors of another dtype.

Every definition is written for float32 operands. A bfloat16 or float16 number is a binary32 number too, so
`handlers.py` widens such operands and sets the target format; `rounding.py` and the loops of csrc then
round each exact value once, to that format. Their results still are float32 tensors, whose numbers are
those of the target format; the conversion at the end rounds nothing. For float64 operands they are float64
tensors.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor


class Format(NamedTuple):
    """A binary floating-point format, with the rules of IEEE 754 for subnormal and infinite numbers."""

    dtype: torch.dtype
    container: torch.dtype  # of the tensors that hold its numbers within a definition
    precision: int  # bits of the significand
    lowest: int  # the smallest positive number is 2**lowest
    top: int  # the numbers are smaller than 2**top


BINARY32 = Format(torch.float32, torch.float32, 24, -149, 128)
BFLOAT16 = Format(torch.bfloat16, torch.float32, 8, -133, 128)
FLOAT16 = Format(torch.float16, torch.float32, 11, -24, 16)
BINARY64 = Format(torch.float64, torch.float64, 53, -1074, 1024)

FORMATS = {x.dtype: x for x in (BINARY32, BFLOAT16, FLOAT16, BINARY64)}
NARROW = (torch.bfloat16, torch.float16)  # dtypes whose operands are widened to float32


class _Local(threading.local):
    target = BINARY32
    written = BINARY32


_local = _Local()


def target() -> Format:
    """Return the format to which this thread's definitions round."""
    return _local.target


def rounding_to(
    dtype: torch.dtype, written: Optional[torch.dtype] = None
) -> AbstractContextManager[Format]:
    """Round to the format of a dtype within this block: float32, bfloat16, float16 or float64.

    written: the dtype of operands that the definition writes, such as running statistics, if it is another.
    """
    return _rounding(FORMATS[dtype], FORMATS[written or dtype])


@contextmanager
def _rounding(to: Format, written: Format) -> Iterator[Format]:
    before = _local.target, _local.written
    _local.target, _local.written = to, written
    try:
        yield to
    finally:
        _local.target, _local.written = before


def storing() -> AbstractContextManager[Format]:
    """Round to float32 within this block, where the target is narrower.

    It is for the intermediate results of a definition that PyTorch stores in float32 whatever the operands
    are, such as the statistics of a normalization.
    """
    stored = BINARY32 if _local.target.precision < 24 else _local.target
    return _rounding(stored, _local.written)


def writing() -> AbstractContextManager[Format]:
    """Round within this block to the dtype of the operands that the definition writes."""
    return _rounding(_local.written, _local.written)


def narrow(x: Tensor) -> Tensor:
    """Round a float64 tensor once to the target format. Returns a tensor of the format's container."""
    to = _local.target
    if to is BINARY32:
        return x.float()
    if to is BINARY64:
        return x
    if not x.is_cpu:
        return binary32_to_odd(x).to(to.dtype).float()
    near = x.float()
    # Rounding twice is wrong only by way of a midpoint, and few numbers are near one.
    again = _midpoints(near, to)
    if again.any():
        near[again] = binary32_to_odd(x[again])
    return near.to(to.dtype).float()


def _midpoints(x: Tensor, to: Format) -> Tensor:
    """Whether numbers of a float32 tensor may be halfway between two numbers of a narrower format.

    All subnormal float16 numbers may. bfloat16 has the exponents of float32.
    """
    below = 24 - to.precision
    half = (x.view(torch.int32) & ((1 << below) - 1)) == 1 << (below - 1)
    return half if to is BFLOAT16 else half | ((x.abs() < 2.0**-14) & (x != 0))


def narrow_float32(x: Tensor) -> Tensor:
    """Round a float32 tensor once to the target format, if that is narrower."""
    to = _local.target
    return x if to.precision >= 24 else x.to(to.dtype).float()


def binary32_to_odd(x: Tensor) -> Tensor:
    """Return a float64 tensor as float32, such that rounding it further rounds x once.

    Of the two binary32 numbers around a number of x the result is the odd one, which lies on the same side
    of the midpoints of narrower formats (S. Boldo & G. Melquiond, IEEE Transactions on Computers 57(4),
    2008).
    """
    near = x.float()
    even = near.view(torch.int32) & 1 == 0
    other = torch.nextafter(near, torch.where(x > near, torch.inf, -torch.inf).float())
    return torch.where((near.double() != x) & even & ~near.isnan(), other, near)


def operate(operation: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Tensor:
    """Return torch.add, sub, mul, div or aten.rsub of float32 or 16-bit operands, rounded to the target.

    That is one IEEE 754 operation, unless the target has 16 bits. One of the operands may be a Python
    number, which is rounded to float32 first, as in PyTorch. Binary64 holds a product exactly, and a sum
    rounded to odd; a quotient of numbers of 24 bits that is not a midpoint of 12 bits differs from each of
    these by more than binary64 rounds it.
    """
    if _local.target.precision >= 24:
        return operation(x, y)
    x, y = (t.float() if isinstance(t, Tensor) else ctypes.c_float(t).value for t in (x, y))
    if operation is torch.ops.aten.rsub:
        operation, x, y = torch.add, -x, y
    if not (x if isinstance(x, Tensor) else y).is_cpu:
        return narrow(_operate_in_binary64(operation, x, y))
    near, to = operation(x, y), _local.target
    again = _midpoints(near, to)  # see `narrow`
    if again.any():
        x, y = (t.expand_as(near)[again] if isinstance(t, Tensor) else t for t in (x, y))
        near[again] = binary32_to_odd(_operate_in_binary64(operation, x, y))
    return near.to(to.dtype).float()


def _operate_in_binary64(operation: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Tensor:
    """Return torch.add, sub, mul or div in float64 such that `binary32_to_odd` rounds to odd once."""
    x, y = (t.double() if isinstance(t, Tensor) else t for t in (x, y))
    if operation in (torch.add, torch.sub):
        return sum_to_odd(x, y if operation is torch.add else -y)
    return operation(x, y)


def sum_to_odd(x: Any, y: Any) -> Tensor:
    """Return x + y rounded to odd to binary64, of float64 tensors or one of them and a Python number."""
    z: Tensor = x + y
    back = z - x
    lost = (x - (z - back)) + (y - back)  # of two_sum
    even = (z.view(torch.int64) & 1) == 0
    away = torch.where((lost > 0) == (z > 0), 1, -1)
    odd = (z.view(torch.int64) + away).view(torch.float64)
    return torch.where(even & ((lost > 0) | (lost < 0)), odd, z)


def reach(bound: float) -> float:
    """Return an exponent beyond which a value of the target overflows or underflows, given binary32's."""
    return bound * 12 if _local.target is BINARY64 else bound


def may_be_midpoint(x: Tensor) -> Tensor:
    """Whether numbers of a float64 tensor may be halfway between two numbers of the target format.

    All subnormal numbers of the format may. The target is narrower than binary64.
    """
    to = _local.target
    below = 53 - to.precision  # bits of binary64 below the last place of the target
    half = (x.view(torch.int64) & ((1 << below) - 1)) == 1 << (below - 1)
    return half | ((x.abs() < 2.0 ** (to.lowest + to.precision)) & (x != 0))
