"""Average pooling and the gradients of pooling: each output element is one sum over a window, rounded once.

Max pooling itself only selects (operator_table.DATA_MOVEMENT). Inputs are float32 [n, c, h, w] or [c, h,
w]. Pooling with windows of several sizes, and of three axes, is in windows.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import narrow
from reproml.arithmetic.operators import windows
from reproml.arithmetic.operators.arguments import pair, require, require_shape
from reproml.arithmetic.operators.convolution import dilate_and_pad
from reproml.arithmetic.operators.indexing import compiled_segment_sums, index_put_, segment_sum
from reproml.arithmetic.operators.reductions import reduce_sum

# ---- average pooling ---------------------------------------------------------------------------------


def avg_pool2d(
    x: Tensor,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Optional[int] = None,
) -> Tensor:
    """Return the sum of each window divided by its size or by divisor_override, rounded once.

    Raises RuntimeError for sizes out of range.
    """
    if _has_border(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override):
        return windows.avg_pool(2)(
            x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
    if x.dim() == 3:
        x4 = x.unsqueeze(0)
        return avg_pool2d(
            x4, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
        ).squeeze(0)
    kernel, stride, padding, divisor = _pooling_sizes(kernel, stride, padding, divisor_override)
    x = pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    return reduce_sum(_windows(x, kernel, stride), (-2, -1), divisor=divisor)


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
    """Return the sum of the gradients of the windows that contain an element, divided as in avg_pool2d.

    g: float32 of avg_pool2d's output shape. Returns float32 of x's shape. Raises what avg_pool2d raises.
    """
    rest = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if _has_border(x, *rest):
        return windows.avg_pool_backward(2)(g, x, *rest)
    if x.dim() == 3:
        return avg_pool2d_backward(g.unsqueeze(0), x.unsqueeze(0), *rest).squeeze(0)
    kernel, stride, padding, divisor = _pooling_sizes(kernel, stride, padding, divisor_override)
    sides = zip(x.shape[2:], kernel, stride, padding)
    size = [(i + 2 * p - k) // s + 1 for i, k, s, p in sides]
    require_shape("the gradient", g, (*x.shape[:2], *size))
    covered = [m * k for m, k in zip(g.shape[2:], kernel)]
    if kernel == stride and not any(padding) and covered == list(x.shape[2:]) and divisor > 0:
        return _divide_among_windows(g, kernel, divisor)
    dilated = dilate_and_pad(g, kernel, stride, padding, (1, 1), x.shape[2:])
    return reduce_sum(_windows(dilated, kernel, (1, 1)), (-2, -1), divisor=divisor)


def _has_border(
    x: Tensor, kernel: Any, stride: Any, padding: Any, ceil: bool, count_padding: bool, divisor: Any
) -> bool:
    """Return whether windows at the border have another size."""
    kernel, stride, padding, _ = _pooling_sizes(kernel, stride, padding, divisor)
    sides = zip(x.shape[-2:], kernel, stride, padding)
    complete = all((i + 2 * p - k) % s == 0 for i, k, s, p in sides)
    return (ceil and not complete) or (any(padding) and not count_padding and divisor is None)


def _pooling_sizes(
    kernel: Any, stride: Any, padding: Any, divisor: Any
) -> tuple[list[int], list[int], list[int], int]:
    """Return kernel, stride and padding as pairs, and the divisor of average pooling.

    Raises RuntimeError for sizes out of range.
    """
    kernel, padding = pair(kernel), pair(padding)
    stride = pair(stride) if stride else kernel
    if min(*kernel, *stride) < 1 or any(not 0 <= 2 * p <= k for p, k in zip(padding, kernel)):
        raise RuntimeError(
            f"kernel size {kernel} and stride {stride} must be positive, and padding {padding} between 0 "
            "and half of the kernel size"
        )
    return kernel, stride, padding, divisor or kernel[0] * kernel[1]


def _windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return a view of the windows of [n, c, h, w], [n, c, rows, columns, *kernel]."""
    return x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])


def _divide_among_windows(g: Tensor, kernel: Sequence[int], divisor: int) -> Tensor:
    """Return g / divisor, rounded once, for each element of windows that do not overlap.

    The quotient in binary64 rounds to binary32 like the exact one (see pointwise.div). An exact zero is +0.
    """
    *outer, rows, columns = g.shape
    each = narrow((g.double() + 0.0) / divisor).reshape(*outer, rows, 1, columns, 1)
    shared = each.expand(*outer, rows, kernel[0], columns, kernel[1]).contiguous()
    return shared.reshape(*outer, rows * kernel[0], columns * kernel[1])


# ---- adaptive average pooling ------------------------------------------------------------------------


def adaptive_avg_pool2d(x: Tensor, size: Any) -> Tensor:
    """Return the mean of each window, rounded once. [..., h, w] -> [..., *size]."""
    if x.dim() < 2:
        raise RuntimeError(f"pooling expects an input [..., h, w], not {list(x.shape)}")
    equal = _equal_windows(x.shape[-2:], pair(size))
    if equal:
        (m, a), (n, b) = equal
        return reduce_sum(x.reshape(*x.shape[:-2], m, a, n, b), (-3, -1), divisor=a * b)
    windows.require_axes(x, 2)
    rows, columns = (windows.by_length(n, m) for n, m in zip(x.shape[-2:], pair(size)))
    out = x.new_empty(*x.shape[:-2], *pair(size))

    def index(numbers: Any) -> Tensor:
        return to_device(torch.tensor(numbers, device="cpu"), x.device)

    for a, (i, at_rows) in rows.items():
        for b, (j, at_columns) in columns.items():
            same_size = x[..., index(at_rows)[:, :, None, None], index(at_columns)]
            means = reduce_sum(same_size, (-3, -1), divisor=a * b)
            out[..., index(i)[:, None], index(j)] = means
    return out


def adaptive_avg_pool2d_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return the sum of gradient / size over the windows that contain an element.

    g: float32 [..., rows, columns]. Returns float32 of x's shape, each element rounded once.
    """
    _check_windows(g, x)
    equal = _equal_windows(x.shape[-2:], g.shape[-2:])
    if equal:
        (_, a), (_, b) = equal
        return _divide_among_windows(g, (a, b), a * b)
    compiled = _compiled_adaptive_backward(g, x)
    return windows.adaptive_avg_pool_backward(2)(g, x) if compiled is None else compiled


def _compiled_adaptive_backward(g: Tensor, x: Tensor) -> Optional[Tensor]:
    """Compute adaptive_avg_pool2d_backward by csrc/pooling.c; None where an element fails its tests."""
    g = g.contiguous()
    if not kernels.usable(g) or not (g.numel() and x.numel()):
        return None
    out = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    result = kernels.run_kernel(
        kernels.loops().reproml_adaptive_pool_backward,
        *(x.shape[:-2].numel(), *x.shape[-2:], *g.shape[-2:], g.data_ptr(), out.data_ptr()),
    )
    return out if result == (True, None) else None


def _check_windows(g: Tensor, x: Tensor) -> None:
    if x.dim() < 2 or g.dim() != x.dim():
        raise RuntimeError(
            f"a gradient of shape {list(g.shape)} does not fit an input of shape {list(x.shape)}"
        )
    require_shape("the gradient", g, (*x.shape[:-2], *g.shape[-2:]))


def _equal_windows(size: Sequence[int], counts: Sequence[int]) -> Optional[list[tuple[int, int]]]:
    """Return the number and length of windows along each axis; None if they differ in size or overlap."""
    if any(c < 1 or n < 1 or n % c for n, c in zip(size, counts)):
        return None
    return [(c, n // c) for n, c in zip(size, counts)]


# ---- max pooling -------------------------------------------------------------------------------------


def max_pool_backward(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Return the sum of the gradients of the windows whose largest element is this one, rounded once.

    aten.max_pool2d_with_indices_backward and aten.adaptive_max_pool2d_backward, whose last argument is
    the flat index of each window's largest element in its plane [h, w]. Returns float32 of x's shape.
    """
    indices = rest[-1]
    _check_windows(g, x)
    if indices.shape != g.shape or indices.dtype is not torch.int64:
        raise RuntimeError(
            f"the indices must be int64 of shape {list(g.shape)}, not {indices.dtype} of shape "
            f"{list(indices.shape)}"
        )
    planes, area = g.shape[:-2].numel(), x.shape[-2] * x.shape[-1]
    compiled = compiled_segment_sums(planes, area, indices, g)
    if compiled is not None:
        return compiled.reshape(x.shape)
    require((indices >= 0) & (indices < area), f"an index is not in a plane of {area} elements")
    first = torch.arange(planes, device=g.device).unsqueeze(1) * area
    index = indices.reshape(planes, math.prod(indices.shape[-2:])) + first
    return segment_sum(index.reshape(-1), g.reshape(-1), x.numel()).reshape(x.shape)


def max_pool3d_backward(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Compute max_pool_backward for three axes: the indices are flat in [d, h, w]."""
    if x.dim() < 3 or g.dim() != x.dim():
        _check_windows(g[:0], x)
    planes = [t.flatten(-3, -2) for t in (g, x, rest[-1])]
    return max_pool_backward(*planes).reshape(x.shape)


def max_unpool(axes: int) -> Any:
    """Return the definition of aten.max_unpool: each element at its index in a plane of zeros.

    Of several elements with one index the last is kept.
    """

    def unpool(x: Tensor, indices: Tensor, size: Any, *rest: Any) -> Tensor:
        if x.dim() not in (axes + 1, axes + 2) or indices.shape != x.shape:
            raise RuntimeError(
                f"an input of shape {list(x.shape)} and indices of shape {list(indices.shape)} cannot be "
                f"unpooled along {axes} axes"
            )
        outer, area = x.shape[:-axes], math.prod(size)
        inside = (indices >= 0) & (indices < area)
        require(inside, f"an index is not in a plane of {area} elements")
        first = torch.arange(outer.numel(), device=x.device).reshape(*outer, *[1] * axes) * area
        out = x.new_zeros(outer.numel() * area)
        index = (indices + first).reshape(-1)
        return index_put_(out, [index], x.reshape(-1)).reshape(*outer, *size)

    return unpool
