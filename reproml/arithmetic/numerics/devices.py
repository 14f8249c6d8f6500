"""Tensors on accelerators: whether reading one makes the host wait, and how numbers get there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_on_accelerator(x: Tensor) -> bool:
    """Whether a host that reads x waits for a device."""
    return not (x.is_cpu or x.is_meta)


def to_device(x: Any, device: torch.device) -> Tensor:
    """A number, or a tensor of the host's, as a tensor there, for which the host does not wait."""
    if not isinstance(x, Tensor):
        return torch.full((), x, device=device)
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
