"""Pooling and nearest upsampling: each output is one sum over a window, rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from reproml.arithmetic.compiler.evaluate import rowwise
from reproml.arithmetic.operators.arguments import pair
from reproml.arithmetic.operators.convolution import spread_out
from reproml.arithmetic.operators.indexing import scatter_sums, sum_at
from reproml.arithmetic.operators.reductions import sum_over
from reproml.errors import NotExactError


def upsample_nearest_backward(
    g: Tensor,
    out: Any,
    size: Any,
    scales_h: Optional[float] = None,
    scales_w: Optional[float] = None,
) -> Tensor:
    """The sum over the copies of each element; whole factors only."""
    n, c, h, w = size
    if g.shape[2] % h or g.shape[3] % w:
        raise NotExactError(
            f"Upsampling from {[h, w]} to {list(g.shape[2:])} has no exact backward; use whole factors."
        )
    return sum_over(g.reshape(n, c, h, g.shape[2] // h, w, g.shape[3] // w), (3, 5))


def _pooling(
    x: Tensor, kernel: Any, stride: Any, padding: Any, ceil: bool, count_padding: bool, divisor: Any
) -> tuple[list[int], list[int], list[int], int]:
    kernel, padding = pair(kernel), pair(padding)
    stride = pair(stride) if stride else kernel
    if min(*kernel, *stride) < 1 or any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel)):
        raise RuntimeError(
            f"pooling cannot have kernel {kernel}, stride {stride}, padding {padding}"
        )
    sides = zip(x.shape[-2:], kernel, stride, padding)
    whole = all((i + 2 * p - k) % s == 0 for i, k, s, p in sides)
    if (ceil and not whole) or (any(padding) and not count_padding and divisor is None):
        raise NotExactError(
            "Average pooling whose windows are of different size at the border has no exact definition "
            "here; use ceil_mode=False and count_include_pad=True."
        )
    return kernel, stride, padding, divisor or kernel[0] * kernel[1]


def avg_pool2d(
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Optional[int] = None,
) -> Tensor:
    """The mean of each window, rounded once. x [n, c, h, w] or [c, h, w]."""
    if x.dim() == 3:
        x4 = x.unsqueeze(0)
        return avg_pool2d(
            x4, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
        ).squeeze(0)
    kernel, stride, padding, divisor = _pooling(
        x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    x = pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    return sum_over(_windows_of(x, kernel, stride), (-2, -1), divisor=divisor)


def avg_pool2d_backward(
    g: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: Optional[int],
) -> Tensor:
    """The sum of the gradients of the windows over an element, divided by the window's size."""
    if x.dim() == 3:
        rest = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return avg_pool2d_backward(g.unsqueeze(0), x.unsqueeze(0), *rest).squeeze(0)
    kernel, stride, padding, divisor = _pooling(
        x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    covered = [m * k for m, k in zip(g.shape[2:], kernel)]
    if kernel == stride and not any(padding) and covered == list(x.shape[2:]) and divisor > 0:
        return _share(g, kernel, divisor)
    wide = spread_out(g, kernel, stride, padding, (1, 1), x.shape[2:])
    return sum_over(_windows_of(wide, kernel, (1, 1)), (-2, -1), divisor=divisor)


def _windows_of(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The windows of [n, c, h, w], a view [n, c, rows, columns, *kernel]."""
    return x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])


def _share(g: Tensor, kernel: Sequence[int], divisor: int) -> Tensor:
    """g / divisor, rounded once, for each element of windows that do not overlap.

    A quotient in binary64 rounds like the exact one (see docs/exact.md); an exact zero is +0.
    """
    *outer, rows, columns = g.shape
    each = ((g.double() + 0.0) / divisor).float().reshape(*outer, rows, 1, columns, 1)
    shared = each.expand(*outer, rows, kernel[0], columns, kernel[1]).contiguous()
    return shared.reshape(*outer, rows * kernel[0], columns * kernel[1])


def _windows(n: int, parts: int) -> list[tuple[int, int]]:
    """Of n elements, the `parts` windows of adaptive pooling."""
    return [(i * n // parts, -(-(i + 1) * n // parts)) for i in range(parts)]


def _factors(size: Sequence[int], parts: Sequence[int]) -> Optional[list[tuple[int, int]]]:
    """Parts and their length along each axis, where all windows are equal and do not overlap."""
    if any(p < 1 or n < 1 or n % p for n, p in zip(size, parts)):
        return None
    return [(p, n // p) for n, p in zip(size, parts)]


def adaptive_avg_pool2d(x: Tensor, size: Any) -> Tensor:
    """The mean of each window, rounded once. x [..., h, w]."""
    factors = _factors(x.shape[-2:], pair(size))
    if factors:
        (m, a), (n, b) = factors
        return sum_over(x.reshape(*x.shape[:-2], m, a, n, b), (-3, -1), divisor=a * b)
    rows, columns = (_windows(n, p) for n, p in zip(x.shape[-2:], pair(size)))
    means = [
        sum_over(x[..., top:bottom, left:right], (-2, -1), divisor=(bottom - top) * (right - left))
        for top, bottom in rows
        for left, right in columns
    ]
    return torch.stack(means, -1).reshape(*x.shape[:-2], len(rows), len(columns))


def adaptive_avg_pool2d_backward(g: Tensor, x: Tensor) -> Tensor:
    """For each element the sum of gradient / size over the windows that hold it, rounded once."""
    factors = _factors(x.shape[-2:], g.shape[-2:])
    if factors:
        (_, a), (_, b) = factors
        return _share(g, (a, b), a * b)
    rows, columns = (_windows(n, p) for n, p in zip(x.shape[-2:], g.shape[-2:]))
    holders = [
        (
            [i for i, (a, b) in enumerate(rows) if a <= y < b],
            [j for j, (a, b) in enumerate(columns) if a <= z < b],
        )
        for y in range(x.shape[-2])
        for z in range(x.shape[-1])
    ]
    area = torch.empty(g.shape[-2:], dtype=torch.float32, device=g.device)
    for i, (top, bottom) in enumerate(rows):
        for j, (left, right) in enumerate(columns):
            area[i, j] = (bottom - top) * (right - left)
    grads = [
        rowwise(
            lambda ctx, g, a: ctx.sum(g / a),
            -1,
            g[..., ys, :][..., zs].flatten(-2),
            area[ys][:, zs].flatten(),
        )
        for ys, zs in holders
    ]
    return torch.cat(grads, -1).reshape(x.shape)


def max_pool_backward(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """The gradients of all windows whose largest element is this one; the indices come last."""
    indices = rest[-1]
    planes = g.shape[:-2].numel()
    area = x.shape[-2] * x.shape[-1]
    compiled = scatter_sums(planes, area, indices, g)
    if compiled is not None:
        return compiled.reshape(x.shape)
    first = torch.arange(planes, device=g.device).unsqueeze(1) * area
    at = indices.reshape(planes, math.prod(indices.shape[-2:])) + first
    return sum_at(at.reshape(-1), g.reshape(-1), x.numel()).reshape(x.shape)
