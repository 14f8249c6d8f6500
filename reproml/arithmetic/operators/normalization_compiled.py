"""Batch, group and layer normalization by the kernels of csrc/normalization.c: the compiled path.

Each `compiled_*` function returns None where the kernels do not apply or where a mean, rstd or sum fails
their rounding tests; then normalization.py computes the entire result on the reference path. Single
output elements that a kernel could not round are computed here, by the steps of
normalization_reference.py.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.operators import normalization_reference as reference
from reproml.arithmetic.operators.reductions import reduce_sum


class Layout(NamedTuple):
    """Locates the groups of numbers that are normalized together: `layout` of csrc/normalization.c.

    A group consists of `runs` runs of `length` contiguous numbers. The weight of a number has the index
    group % weight_period * weight_group + run * weight_run, or, if `along`, the number's index in its run.
    """

    groups: int
    runs: int
    length: int
    group_stride: int
    run_stride: int
    weight_period: int = 1
    weight_group: int = 0
    weight_run: int = 0
    along: int = 0

    def groups_and_weights(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the group and the index of the weight of each flat index."""
        run = index // self.length
        if self.run_stride > self.group_stride:
            group, run = run % self.groups, run // self.groups
        else:
            group, run = run // self.runs, run % self.runs
        if self.along:
            return group, index % self.length
        return group, group % self.weight_period * self.weight_group + run * self.weight_run


def _channel_layout(x: Tensor) -> Layout:
    n, c, *rest = x.shape
    places = math.prod(rest)
    return Layout(c, n, places, places, c * places, c, 1)


@lru_cache(maxsize=256)
def _row_layout(rows: int, length: int, along: bool) -> Layout:
    return Layout(rows, 1, length, length, length, along=along)


def _group_layout(n: int, c: int, places: int, groups: int) -> Layout:
    each = c // groups
    return Layout(n * groups, each, places, each * places, places, groups, each, 1)


def _usable(x: Tensor, *others: Optional[Tensor]) -> bool:
    f32 = torch.float32
    if kernels.binary32_loops() is None:  # they round statistics as they round results
        return False
    if not x.is_cpu or x.dtype is not f32 or not x.numel():
        return False
    for t in others:
        if t is not None and not (t.is_cpu and t.dtype is f32 and t.is_contiguous()):
            return False
    return True


def _at(x: Optional[Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


_Layout = ctypes.c_int64 * len(Layout._fields)
_stored = lru_cache(maxsize=256)(lambda layout: _Layout(*layout))


def _call(kernel: Any, layout: Layout, x: Tensor, *arguments: Any) -> kernels.KernelResult:
    return kernels.run_kernel(kernel, _stored(layout), x.data_ptr(), *arguments)


def _forward(
    layout: Layout,
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    mean: Tensor,
    rstd: Tensor,
    given: Optional[Tensor] = None,
    running: tuple[Optional[Tensor], Optional[Tensor]] = (None, None),
    momentum: float = 0.0,
) -> Optional[Tensor]:
    """Return the output, and write mean and rstd; None if one of them fails the rounding tests.

    given: a variance to use together with the given mean, instead of computing them. running: the running
    mean and variance to update with `momentum`.
    """
    out = torch.empty_like(x)
    complete, left = _call(
        kernels.library.reproml_normalize,
        layout,
        x,
        _at(weight),
        _at(bias),
        eps,
        _at(given),
        _at(running[0]),
        _at(running[1]),
        momentum,
        mean.data_ptr(),
        rstd.data_ptr(),
        out.data_ptr(),
    )
    if not complete:
        return None
    if left is not None:
        group, at = layout.groups_and_weights(left)
        w, b = (None if t is None else t.view(-1)[at] for t in (weight, bias))
        statistics = mean.view(-1)[group], rstd.view(-1)[group]
        out.view(-1)[left] = reference.normalize(x.view(-1)[left], *statistics, w, b)
    return out


def _backward(
    layout: Layout,
    g: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    mask: tuple[bool, bool, bool],
) -> Optional[tuple[Optional[Tensor], ...]]:
    """Return the gradients of x and, where a group has one weight, of weight and bias, as `mask` asks for.

    given: whether mean and rstd were given, so that they do not depend on x. None if a sum fails the
    rounding tests.
    """
    new = mean.new_empty
    out = torch.empty_like(x) if mask[0] else None
    sums = [new(layout.groups) if mask[0] and not given else None for _ in range(2)]
    weight_sum, bias_sum = (new(layout.groups) if m else None for m in mask[1:])
    complete, left = _call(
        kernels.library.reproml_normalize_backward,
        layout,
        x,
        g.data_ptr(),
        _at(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        *map(_at, (*sums, weight_sum, bias_sum, out)),
    )
    if not complete:
        return None
    if out is not None and left is not None:
        group, at = layout.groups_and_weights(left)
        w = x.new_ones(len(left)) if weight is None else weight.view(-1)[at]
        some_g, some_x = (t.view(-1)[left] for t in (g, x))
        m, r = mean.view(-1)[group], rstd.view(-1)[group]
        if sums[0] is None or sums[1] is None:
            value = elementwise(lambda ctx, g, w, r: g * w * r, some_g, w, r)
        else:
            n = layout.runs * layout.length
            value = reference.element_backward(
                n, some_g, w, some_x, m, r, sums[0][group], sums[1][group]
            )
        out.view(-1)[left] = value
    return out, weight_sum, bias_sum


# ---- the operators -----------------------------------------------------------------------------------

_SHORT = 8  # channels with shorter runs are first copied to rows, so that the inner loops are long


def _swap_batch_and_channels(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def compiled_batch_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    if not _usable(x, weight, bias, running_mean, running_var):
        return None
    layout = _channel_layout(x)
    short = layout.length < _SHORT
    if short:
        stored = _swap_batch_and_channels(x)
        layout = Layout(*_row_layout(layout.groups, stored[0].numel(), False)[:5], layout.groups, 1)
    else:
        stored = x.contiguous()
    rstd = stored.new_empty(layout.groups)
    if training:
        mean = stored.new_empty(layout.groups)
        m = ctypes.c_float(momentum).value
        running = (running_mean, running_var)
        out = _forward(layout, stored, weight, bias, eps, mean, rstd, None, running, m)
    else:
        if running_mean is None or running_var is None:
            return None
        mean = running_mean
        out = _forward(layout, stored, weight, bias, eps, mean, rstd, running_var)
    if out is None:
        return None
    if short:
        out = _swap_batch_and_channels(out)
    return (out, mean, rstd) if training else (out, x.new_empty(0), x.new_empty(0))


def compiled_batch_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    mean: Tensor,
    rstd: Tensor,
    given: bool,
    mask: Any,
) -> Optional[tuple[Optional[Tensor], ...]]:
    layout = _channel_layout(x)
    if not _usable(x, weight, mean, rstd) or layout.runs * layout.length == 1:
        return None
    short = layout.length < _SHORT
    if short:
        x, g = _swap_batch_and_channels(x), _swap_batch_and_channels(g)
        layout = Layout(*_row_layout(layout.groups, x[0].numel(), False)[:5], layout.groups, 1)
    result = _backward(
        layout, g.contiguous(), x.contiguous(), weight, mean, rstd, given, tuple(mask)
    )
    if result is None or not short or result[0] is None:
        return result
    return (_swap_batch_and_channels(result[0]), *result[1:])


def compiled_layer_norm(
    x: Tensor, shape: list[int], weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    if not _usable(x, weight, bias):
        return None
    n = math.prod(shape)
    outer = x.shape[: x.dim() - len(shape)]
    along = weight is not None or bias is not None
    if along:
        weight = x.new_ones(n) if weight is None else weight
        bias = x.new_zeros(n) if bias is None else bias
    kept = (*outer, *[1] * len(shape))
    mean, rstd = x.new_empty(kept), x.new_empty(kept)
    layout = _row_layout(x.numel() // n, n, along)
    out = _forward(layout, x.contiguous(), weight, bias, eps, mean, rstd)
    return None if out is None else (out, mean, rstd)


def compiled_layer_norm_backward(
    g: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Optional[Tensor],
    mask: list[bool],
) -> Optional[tuple[Optional[Tensor], ...]]:
    n = math.prod(shape)
    if not _usable(x, weight, mean, rstd) or n == 1:
        return None
    g, x, rows = g.contiguous(), x.contiguous(), mean.numel()
    weight_sum, bias_sum = (x.new_empty(shape) if m else None for m in mask[1:])
    grad_x: Optional[Tensor] = None
    if mask[0]:
        layout = _row_layout(rows, n, weight is not None)
        result = _backward(layout, g, x, weight, mean, rstd, False, (True, False, False))
        if result is None:
            return None
        grad_x = result[0]
    if mask[1] or mask[2]:
        tensors = (x, g, mean, rstd, weight_sum, bias_sum)
        if kernels.library.reproml_column_moments(rows, n, *map(_at, tensors)):
            return None
    return grad_x, weight_sum, bias_sum


def compiled_group_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    n: int,
    c: int,
    places: int,
    groups: int,
    eps: float,
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    if not _usable(x, weight, bias):
        return None
    mean, rstd = x.new_empty(n, groups), x.new_empty(n, groups)
    layout = _group_layout(n, c, places, groups)
    out = _forward(layout, x.contiguous(), weight, bias, eps, mean, rstd)
    return None if out is None else (out, mean, rstd)


def compiled_group_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Optional[Tensor],
    n: int,
    c: int,
    places: int,
    groups: int,
    mask: list[bool],
) -> Optional[tuple[Optional[Tensor], ...]]:
    if not _usable(x, weight, mean, rstd) or c // groups * places == 1:
        return None
    g, x = g.contiguous(), x.contiguous()
    grad_x: Optional[Tensor] = None
    if mask[0]:
        layout = _group_layout(n, c, places, groups)
        result = _backward(layout, g, x, weight, mean, rstd, False, (True, False, False))
        if result is None:
            return None
        grad_x = result[0]
    grad_weight = x.new_empty(c) if mask[1] else None
    if grad_weight is not None:
        sums = kernels.library.reproml_channel_moments
        if sums(n, c, places, groups, *map(_at, (x, g, mean, rstd, grad_weight))):
            return None
    grad_bias = reduce_sum(g.reshape(n, c, places), (0, 2)) if mask[2] else None
    return grad_x, grad_weight, grad_bias
