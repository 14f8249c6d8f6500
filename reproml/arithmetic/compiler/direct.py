"""Operators of one or two operations whose loops in C need no rounding test (csrc/direct.c)."""

from __future__ import annotations

import ctypes
from typing import Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels

# In the order of csrc/direct.c.
_LOOPS = {
    name: i
    for i, name in enumerate(
        """add_scaled addcmul addcdiv lerp leaky_relu leaky_relu_backward
        hardsigmoid hardsigmoid_backward hardswish hardswish_backward mse_loss_backward
        smooth_l1_backward sqrt maximum minimum prelu softshrink shrink_backward
        fmod remainder floor_divide trunc_divide""".split()
    )
}
_MIN_WORK_FOR_THREADS = 1 << 15  # elements
_Pointers, _Steps = ctypes.c_void_p * 3, ctypes.c_int64 * 3


def run_directly(name: str, *operands: Tensor, scalar: float = 0.0) -> Optional[Tensor]:
    """Return the operator of float32 operands; None where its loop cannot take them.

    It takes operands that broadcast to the shape of the first. The result is contiguous.
    """
    first = operands[0]
    loops = kernels.loops()
    if loops is None or name not in _LOOPS or not first.numel():
        return None
    steps, dense = [], []
    for x in operands:
        if x.dtype is not torch.float32 or not x.is_cpu or x.dim() > first.dim():
            return None
        steps.append(int(x.numel() != 1 or x.shape == first.shape))
        if steps[-1] and x.shape != first.shape:
            if torch.broadcast_shapes(x.shape, first.shape) != first.shape:
                return None
            x = x.expand(first.shape)
        dense.append(x.contiguous())
    missing = 3 - len(dense)
    n, out = first.numel(), first.new_empty(first.shape)
    loops.reproml_direct(
        _LOOPS[name],
        n,
        _Pointers(*[x.data_ptr() for x in dense], *[dense[0].data_ptr()] * missing),
        _Steps(*steps, *[1] * missing),
        scalar,
        out.data_ptr(),
        torch.get_num_threads() if n > _MIN_WORK_FOR_THREADS else 1,
    )
    return out
