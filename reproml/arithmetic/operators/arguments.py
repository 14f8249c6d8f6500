"""How definitions read an operator's arguments: dtypes, dimensions, pairs of sizes, and checks of their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.numerics.devices import to_device
from reproml.errors import NotExactError


def require(holds: Any, what: str) -> None:
    """Raise RuntimeError, as PyTorch does, unless `holds`: a truth value, or a bool tensor of which all are
    true. A tensor on a device, for which the host would wait, is not looked at."""
    if not isinstance(holds, Tensor):
        holds = torch.tensor(holds, device="cpu")
    if holds.is_cpu and not bool(holds.all()):
        raise RuntimeError(what)


def dims_of(dim: Any) -> Sequence[int]:
    """PyTorch's `dim` as a sequence; empty for all axes."""
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def only_float32(dtype: Any) -> None:
    if dtype not in (None, torch.float32):
        raise NotExactError(f"A result of {dtype} has no exact definition here; ask for float32.")


def float32_operands(*operands: Any) -> tuple[Tensor, ...]:
    """Python numbers, integers and 0-dim float64 tensors as they meet a float32 tensor."""
    if all(isinstance(x, Tensor) and x.dtype is torch.float32 for x in operands):
        return operands
    device = next(x.device for x in operands if isinstance(x, Tensor))
    return tuple(to_device(x, device).to(torch.float32) for x in operands)


def pair(x: Any) -> list[int]:
    return [x[0], x[-1]] if isinstance(x, (list, tuple)) else [x, x]
