"""Convolutions and pooling as the sums they are: each output is one dot product or one sum, rounded once.

One- and two-dimensional; one dimension is two with a height of 1. The compiled loops slide over the image;
the plain path lays out patches (im2col) and multiplies matrices.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators.arguments import pair
from reproml.arithmetic.operators.matmul import matmul
from reproml.arithmetic.operators.reductions import sum_over
from reproml.errors import NotExactError


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    size: Sequence[int],
) -> Tensor:
    """The first `size` places of a kernel: [n, c, h, w] -> [n, groups, c / groups * kh * kw, places]."""
    columns = unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    sides = zip(x.shape[2:], kernel, stride, padding, dilation)
    places = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sides]
    if places != list(size):  # a transposed convolution with output_padding has more
        columns = columns.reshape(*columns.shape[:2], *places)[..., : size[0], : size[1]]
    length = columns.shape[1] // groups
    return columns.reshape(len(x), groups, length, size[0] * size[1])


def _correlate(
    x: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    size: Any,
) -> Tensor:
    """x [n, c, h, w], w [o, c / groups, kh, kw], bias [o] -> [n, o, *size]."""

    def reference() -> Tensor:
        columns = _patches(x, w.shape[2:], stride, padding, dilation, groups, size)
        n, out = len(x), len(w)
        kernels = w.reshape(1, groups, out // groups, -1).expand(n, -1, -1, -1)
        b = None if bias is None else bias.reshape(1, groups, -1, 1)
        return matmul(kernels, columns, b).reshape(n, out, *size)

    if x.shape[1] != groups * w.shape[1]:
        return reference()  # which says so
    geometry = _geometry(w, groups, x.shape, size, stride, padding, dilation)
    shape = (len(x), len(w), *size)
    return _compiled("reproml_convolution", geometry, [x, w, bias], shape, reference)


def _geometry(
    w: Tensor, groups: int, x: Any, size: Any, stride: Any, padding: Any, dilation: Any
) -> Any:
    """The sizes of a convolution, as c/convolution.c takes them."""
    sizes = (x[0], groups, w.shape[1], len(w) // groups, *x[2:], *size, *w.shape[2:])
    return _Geometry(*sizes, *stride, *padding, *dilation)


_Geometry = ctypes.c_int64 * 16


def _compiled(
    kernel: str,
    geometry: Any,
    operands: Sequence[Optional[Tensor]],
    shape: Sequence[int],
    reference: Callable[[], Tensor],
) -> Tensor:
    """The kernel's result of this shape, with what it leaves as `plain` has it, or all of it if it must."""
    given = [None if x is None else x.contiguous() for x in operands]
    if not all(x is None or x.numel() for x in given):
        return reference()
    if not kernels.usable(*[x for x in given if x is not None]):
        return reference()
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    if not out.numel():
        return reference()
    pointers = [None if x is None else x.data_ptr() for x in (*given, out)]
    result = kernels.run_kernel(getattr(kernels.library, kernel), geometry, *pointers)
    if not result.complete:
        return reference()
    if result.failed is not None:
        out.view(-1)[result.failed] = reference().reshape(-1)[result.failed]
    return out


def _flipped(w: Tensor, groups: int) -> Tensor:
    """[o, c / groups, kh, kw] -> [c, o / groups, kh, kw], turned by 180 degrees."""
    split = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
    return split.reshape(-1, len(w) // groups, *w.shape[2:]).flip(2, 3)


def spread_out(
    g: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, size: Any
) -> Tensor:
    """g with stride - 1 zeros between its elements, padded so that sliding the kernel over it at stride
    1 without further padding gives `size` places: what a transposed convolution slides over."""
    n, c, h, w = g.shape
    wide = g.new_zeros(n, c, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1)
    wide[:, :, :: stride[0], :: stride[1]] = g
    margins = []
    for axis in (1, 0):  # the last axis first, as `pad` wants it
        reach = dilation[axis] * (kernel[axis] - 1)
        before = reach - padding[axis]
        margins += [before, size[axis] + reach - wide.shape[2 + axis] - before]
    padded = pad(wide, [max(m, 0) for m in margins])  # first, or there may be too little to cut off
    left, right, top, bottom = (max(-m, 0) for m in margins)
    return padded[..., top : padded.shape[2] - bottom, left : padded.shape[3] - right]


def _transposed(
    g: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    size: Any,
) -> Tensor:
    """The convolution's transpose: g [n, o, ...], w [o, c / groups, kh, kw] -> [n, c, *size]."""

    def reference() -> Tensor:
        wide = spread_out(g, w.shape[2:], stride, padding, dilation, size)
        return _correlate(wide, _flipped(w, groups), bias, (1, 1), (0, 0), dilation, groups, size)

    if g.shape[1] != len(w):
        return reference()  # which says so
    shape = (len(g), groups * w.shape[1], *size)
    geometry = _geometry(w, groups, shape, g.shape[2:], stride, padding, dilation)
    return _compiled("reproml_transposed", geometry, [g, w, bias], shape, reference)


def _weight_gradient(
    x: Tensor, g: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """The gradient of w, [o, c / groups, kh, kw], from x [n, c, h, w] and the output's g [n, o, ...]."""

    def reference() -> Tensor:
        rows, columns = weight_operands(x, g, w, stride, padding, dilation, groups)
        rows = rows.permute(1, 2, 0, 3).reshape(groups, rows.shape[2], -1)
        columns = columns.transpose(0, 1).reshape(groups, -1, columns.shape[3])
        return matmul(rows, columns).reshape(w.shape)

    geometry = _geometry(w, groups, x.shape, g.shape[2:], stride, padding, dilation)
    return _compiled("reproml_weight_gradient", geometry, [x, g], w.shape, reference)


def weight_operands(
    x: Tensor, g: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, Tensor]:
    """The factors of the weight's gradient, which is the sum over n of the products of matrices:
    [n, groups, o / groups, places] and [n, groups, places, c / groups * kh * kw]."""
    columns = _patches(x, w.shape[2:], stride, padding, dilation, groups, g.shape[2:])
    rows = g.reshape(len(g), groups, g.shape[1] // groups, math.prod(g.shape[2:]))
    return rows, columns.transpose(2, 3)


def convolution(
    x: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    """aten.convolution: each output, bias included, is one dot product."""
    _check(x, w, bias, stride, padding, dilation, transposed, groups)
    if x.dim() == 3:
        stride, dilation = [1, *stride], [1, *dilation]
        padding, output_padding = [0, *padding], [0, *output_padding]
        flat = convolution(
            x.unsqueeze(2),
            w.unsqueeze(2),
            bias,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
        )
        return flat.squeeze(2)
    require_two_dimensions(x)
    stride, padding, dilation, output_padding = map(
        pair, (stride, padding, dilation, output_padding)
    )
    reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:])]
    sides = list(zip(x.shape[2:], stride, padding, reach, output_padding))
    if transposed:
        size = [(i - 1) * s - 2 * p + r + o + 1 for i, s, p, r, o in sides]
        _check_size(size, x, w)
        if any(o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation)):
            raise RuntimeError(
                f"output padding {output_padding} must be below stride {stride} or dilation {dilation}"
            )
        return _transposed(x, w, bias, stride, padding, dilation, groups, size)
    size = [(i + 2 * p - r - 1) // s + 1 for i, s, p, r, _ in sides]
    _check_size(size, x, w)
    return _correlate(x, w, bias, stride, padding, dilation, groups, size)


def _check(
    x: Tensor,
    w: Tensor,
    bias: Optional[Tensor],
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    groups: int,
) -> None:
    """What PyTorch checks only in its own kernels."""
    for t in (x, w) if bias is None else (x, w, bias):
        if t.dtype is not torch.float32:
            raise NotExactError(f"A convolution is defined for float32, not for {t.dtype}.")
    channels = groups * w.shape[1] if transposed else len(w)
    if w.dim() != x.dim() or groups < 1 or len(w) % groups:
        shapes = f"{list(w.shape)} and an input of shape {list(x.shape)}"
        raise RuntimeError(f"weights of shape {shapes} do not convolve in {groups} groups")
    if x.shape[1] != (len(w) if transposed else groups * w.shape[1]):
        raise RuntimeError(
            f"weights of shape {list(w.shape)} in {groups} groups do not fit an input of "
            f"{x.shape[1]} channels, {list(x.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(f"a bias of shape {list(bias.shape)} does not fit {channels} channels")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise RuntimeError(
            f"a convolution cannot have stride {stride}, dilation {dilation}, padding {padding}"
        )


def _check_size(size: list[int], x: Tensor, w: Tensor) -> None:
    if min(size) < 1:
        raise RuntimeError(
            f"a kernel of {list(w.shape[2:])} has no place in an input of {list(x.shape)}"
        )


def require_two_dimensions(x: Tensor) -> None:
    if x.dim() != 4:
        raise NotExactError(
            f"A convolution or pooling of an input of shape {list(x.shape)} has no exact definition here; "
            "one and two dimensions with a batch have."
        )


def convolution_backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: list[bool],
) -> tuple[Optional[Tensor], ...]:
    """aten.convolution_backward: each element of each gradient is one dot product or one sum."""
    _check(x, w, None, stride, padding, dilation, transposed, groups)
    if g.dtype is not torch.float32:
        raise NotExactError(f"A convolution is defined for float32, not for {g.dtype}.")
    grad_bias = sum_over(g, [0, *range(2, g.dim())]) if mask[2] else None
    one_dimension = x.dim() == 3
    if one_dimension:
        g, x, w = g.unsqueeze(2), x.unsqueeze(2), w.unsqueeze(2)
        stride, dilation, padding = [1, *stride], [1, *dilation], [0, *padding]
    require_two_dimensions(x)
    stride, padding, dilation = map(pair, (stride, padding, dilation))
    grad_x = grad_w = None
    if mask[0]:
        if transposed:
            grad_x = _correlate(g, w, None, stride, padding, dilation, groups, x.shape[2:])
        else:
            grad_x = _transposed(g, w, None, stride, padding, dilation, groups, x.shape[2:])
    if mask[1]:
        # Of a transposed convolution, x and g change places.
        still, slid = (x, g) if transposed else (g, x)
        grad_w = _weight_gradient(slid, still, w, stride, padding, dilation, groups)
    if one_dimension:
        grad_x = None if grad_x is None else grad_x.squeeze(2)
        grad_w = None if grad_w is None else grad_w.squeeze(2)
    return grad_x, grad_w, grad_bias


# ---- pooling ---------------------------------------------------------------------------------------
