"""Tensors on accelerators: whether reading one makes the host wait, and how to copy operands there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.numerics.formats import BINARY64, target


def is_on_accelerator(x: Tensor) -> bool:
    """Whether the host has to wait for a device when it reads x."""
    return not (x.is_cpu or x.is_meta)


def to_device(x: Any, device: torch.device) -> Tensor:
    """Return a Python number or a tensor as a tensor on the device, without making the host wait."""
    if not isinstance(x, Tensor):
        dtype = torch.float64 if target() is BINARY64 else torch.float32
        return torch.full((), x, dtype=dtype if isinstance(x, float) else None, device=device)
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
