"""Convolutions and their gradients: each output element is one dot product, rounded once.

One, two and three dimensions with a batch. A one-dimensional convolution is computed as a two-dimensional
one of height 1; three dimensions are in convolution_volumes.py. The reference path copies the patches under
the kernel into a matrix (im2col, `_patches`) and multiplies matrices. The compiled path
(csrc/convolution.c) packs patches as it multiplies them, or slides the kernel over the image where a group
has few outputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.formats import target
from reproml.arithmetic.operators import convolution_volumes
from reproml.arithmetic.operators.arguments import require_shape
from reproml.arithmetic.operators.matmul import matmul
from reproml.arithmetic.operators.reductions import reduce_sum
from reproml.errors import NotExactError


class Geometry(NamedTuple):
    """Describes how a kernel slides over an image: [vertical, horizontal] sizes, and channel groups."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int


# ---- PyTorch's operators -----------------------------------------------------------------------------


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
    """Compute aten.convolution: each output element, including its bias, is one dot product.

    x: float32 [n, c, h, w], [n, c, length] or [n, c, d, h, w]; w: float32 [o, c / groups, kh, kw]
    (transposed: [c, o / groups, kh, kw]); bias: float32 [o]. Returns float32 [n, o, ...].

    Raises RuntimeError for shapes and sizes that do not match, NotExactError for another dtype or without
    a batch.
    """
    _check(x, w, bias, stride, padding, dilation, transposed, groups)
    if x.dim() == 3:
        flat = convolution(
            *(x.unsqueeze(2), w.unsqueeze(2), bias),
            *([1, *stride], [0, *padding], [1, *dilation]),
            *(transposed, [0, *output_padding], groups),
        )
        return flat.squeeze(2)
    geometry, output_padding = _geometry(x, stride, padding, dilation, groups, output_padding)
    size = _output_size(x, w, geometry, transposed, output_padding)
    correlate, correlate_transposed, _ = _sums(x)
    return (correlate_transposed if transposed else correlate)(x, w, bias, geometry, size)


def _output_size(
    x: Tensor, w: Tensor, geometry: Geometry, transposed: bool, output_padding: Sequence[int]
) -> list[int]:
    """Return height and width of the output. Raises RuntimeError if there is none."""
    reach = [d * (k - 1) for d, k in zip(geometry.dilation, w.shape[2:])]
    sides = list(zip(x.shape[2:], geometry.stride, geometry.padding, reach, output_padding))
    if not transposed:
        size = [(i + 2 * p - r - 1) // s + 1 for i, s, p, r, _ in sides]
        if min(size) < 1:
            kernel, padded = [r + 1 for r in reach], [i + 2 * p for i, _, p, *_ in sides]
            raise RuntimeError(f"kernel size {kernel} is larger than the padded input {padded}")
        return size
    size = [(i - 1) * s - 2 * p + r + o + 1 for i, s, p, r, o in sides]
    if min(size) < 1:
        raise RuntimeError(f"a transposed convolution of {list(x.shape)} has output size {size}")
    if any(o >= max(s, d) for o, s, d in zip(output_padding, geometry.stride, geometry.dilation)):
        raise RuntimeError(
            f"output_padding {output_padding} must be smaller than stride {geometry.stride} or "
            f"dilation {geometry.dilation}"
        )
    return size


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
    """Compute aten.convolution_backward: each element of each gradient is one dot product or one sum.

    g: float32 of the output's shape. Returns the gradients of x, w and bias, each None unless `mask` asks
    for it. Raises what `convolution` raises.
    """
    _check(x, w, None, stride, padding, dilation, transposed, groups)
    _require_float32(g)
    one_dimension = x.dim() == 3
    if one_dimension:
        g, x, w = g.unsqueeze(2), x.unsqueeze(2), w.unsqueeze(2)
        stride, dilation, padding = [1, *stride], [1, *dilation], [0, *padding]
        output_padding = [0, *output_padding]
    geometry, output_padding = _geometry(x, stride, padding, dilation, groups, output_padding)
    correlate, correlate_transposed, weight_gradient = _sums(x)
    outputs = groups * w.shape[1] if transposed else len(w)
    size = _output_size(x, w, geometry, transposed, output_padding)
    require_shape("the gradient", g, (len(x), outputs, *size))
    grad_bias = reduce_sum(g, (0, *range(2, g.dim()))) if mask[2] else None
    grad_x = grad_w = None
    if mask[0]:
        backward = correlate if transposed else correlate_transposed
        grad_x = backward(g, w, None, geometry, x.shape[2:])
    if mask[1]:
        # In a transposed convolution, x and g swap their roles.
        image, output = (g, x) if transposed else (x, g)
        grad_w = weight_gradient(image, output, w, geometry)
    if one_dimension:
        grad_x = None if grad_x is None else grad_x.squeeze(2)
        grad_w = None if grad_w is None else grad_w.squeeze(2)
    return grad_x, grad_w, grad_bias


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
    """Check what PyTorch checks only in its own kernels."""
    for t in (x, w) if bias is None else (x, w, bias):
        _require_float32(t)
    if w.dim() != x.dim() or groups < 1 or len(w) % groups:
        raise RuntimeError(
            f"weight of shape {list(w.shape)} and input of shape {list(x.shape)} cannot be convolved in "
            f"{groups} groups"
        )
    channels = len(w) if transposed else groups * w.shape[1]
    if x.shape[1] != channels:
        raise RuntimeError(
            f"weight of shape {list(w.shape)} in {groups} groups expects an input with {channels} "
            f"channels, not {list(x.shape)}"
        )
    outputs = groups * w.shape[1] if transposed else len(w)
    if bias is not None and bias.shape != (outputs,):
        raise RuntimeError(f"bias must have shape [{outputs}], not {list(bias.shape)}")
    if min(*stride, *dilation, 1) < 1 or min(*padding, 0) < 0:
        raise RuntimeError(
            f"stride {stride} and dilation {dilation} must be positive, padding {padding} not negative"
        )


def _require_float32(x: Tensor) -> None:
    if x.dtype is not target().container:
        raise NotExactError(f"A convolution is defined for float32 only, not for {x.dtype}.")


def _geometry(
    x: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, output_padding: Any
) -> tuple[Geometry, list[int]]:
    """Return the geometry and output_padding with a size for each axis.

    Raises NotExactError unless x is [n, c, h, w] or [n, c, d, h, w].
    """
    if x.dim() not in (4, 5):
        raise NotExactError(
            f"A convolution of an input of shape {list(x.shape)} has no exact definition; use one, two or "
            "three dimensions with a batch."
        )
    axes = x.dim() - 2
    sizes = [list(s) * axes if len(s) == 1 else list(s) for s in (stride, padding, dilation)]
    more = list(output_padding)
    return Geometry(sizes[0], sizes[1], sizes[2], groups), more * axes if len(more) == 1 else more


def _sums(x: Tensor) -> tuple[Callable[..., Tensor], ...]:
    """Return the functions that compute the three sums below for images or volumes."""
    if x.dim() == 5:
        volumes = convolution_volumes
        return volumes.correlate, volumes.correlate_transposed, volumes.weight_gradient
    return _correlate, _correlate_transposed, _weight_gradient


# ---- the three sums, each by a kernel and by a matrix product ----------------------------------------


def _correlate(
    x: Tensor, w: Tensor, bias: Optional[Tensor], geometry: Geometry, size: Sequence[int]
) -> Tensor:
    """Correlate x with w: x [n, c, h, w], w [o, c / groups, kh, kw], bias [o] -> [n, o, *size]."""

    def reference() -> Tensor:
        columns = _patches(x, w.shape[2:], geometry, size)
        n, out, groups = len(x), len(w), geometry.groups
        rows = w.reshape(1, groups, out // groups, -1).expand(n, -1, -1, -1)
        b = None if bias is None else bias.reshape(1, groups, -1, 1)
        return matmul(rows, columns, b).reshape(n, out, *size)

    if x.shape[1] != geometry.groups * w.shape[1]:
        return reference()  # raises the error
    sizes = _kernel_sizes(x.shape, w, geometry, size)
    shape = (len(x), len(w), *size)
    return _compiled("reproml_convolution", sizes, [x, w, bias], shape, reference)


def _correlate_transposed(
    g: Tensor, w: Tensor, bias: Optional[Tensor], geometry: Geometry, size: Sequence[int]
) -> Tensor:
    """Compute the transpose of `_correlate`.

    g [n, o, ...], w [o, c / groups, kh, kw], bias [c] -> [n, c, *size].
    """
    stride, padding, dilation, groups = geometry

    def reference() -> Tensor:
        dilated = dilate_and_pad(g, w.shape[2:], stride, padding, dilation, size)
        plain = Geometry((1, 1), (0, 0), dilation, groups)
        return _correlate(dilated, _transposed_weight(w, groups), bias, plain, size)

    if g.shape[1] != len(w):
        return reference()  # raises the error
    shape = (len(g), groups * w.shape[1], *size)
    sizes = _kernel_sizes(shape, w, geometry, g.shape[2:])
    return _compiled("reproml_transposed", sizes, [g, w, bias], shape, reference)


def _weight_gradient(x: Tensor, g: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """Compute the gradient of w, where g is the output's gradient.

    x [n, c, h, w], g [n, o, ...] -> [o, c / groups, kh, kw].
    """

    def reference() -> Tensor:
        groups = geometry.groups
        rows, columns = weight_gradient_factors(x, g, w, *geometry)
        rows = rows.permute(1, 2, 0, 3).reshape(groups, rows.shape[2], -1)
        columns = columns.transpose(0, 1).reshape(groups, -1, columns.shape[3])
        return matmul(rows, columns).reshape(w.shape)

    sizes = _kernel_sizes(x.shape, w, geometry, g.shape[2:])
    return _compiled("reproml_weight_gradient", sizes, [x, g], w.shape, reference)


def weight_gradient_factors(
    x: Tensor, g: Tensor, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the factors of the weight's gradient, which is the sum over n of their matrix products.

    Their shapes are [n, groups, o / groups, places] and [n, groups, places, c / groups * kh * kw], where
    places are the positions of the kernel on the image.
    """
    geometry = Geometry(stride, padding, dilation, groups)
    columns = _patches(x, w.shape[2:], geometry, g.shape[2:])
    rows = g.reshape(len(g), groups, g.shape[1] // groups, math.prod(g.shape[2:]))
    return rows, columns.transpose(2, 3)


_KernelSizes = ctypes.c_int64 * 16


def _kernel_sizes(x: Sequence[int], w: Tensor, geometry: Geometry, size: Sequence[int]) -> Any:
    """Return the sizes of a convolution as csrc/convolution.c takes them. x: the input's shape."""
    stride, padding, dilation, groups = geometry
    sizes = (x[0], groups, w.shape[1], len(w) // groups, *x[2:], *size, *w.shape[2:])
    return _KernelSizes(*sizes, *stride, *padding, *dilation)


def _compiled(
    kernel: str,
    sizes: Any,
    operands: Sequence[Optional[Tensor]],
    shape: Sequence[int],
    reference: Callable[[], Tensor],
) -> Tensor:
    """Return the result of a kernel of csrc/convolution.c, float32 of this shape.

    Elements that the kernel could not round are taken from the reference path, and so is the entire
    result where the kernel does not apply. sizes: those that the kernel takes, from `_kernel_sizes`.
    """
    given = [None if x is None else x.contiguous() for x in operands]
    if not all(x is None or x.numel() for x in given):
        return reference()
    if not kernels.usable(*[x for x in given if x is not None]):
        return reference()
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    if not out.numel():
        return reference()
    pointers = [None if x is None else x.data_ptr() for x in (*given, out)]
    result = kernels.run_kernel(getattr(kernels.loops(), kernel), sizes, *pointers)
    if not result.complete:
        return reference()
    if result.failed is not None:
        out.view(-1)[result.failed] = reference().reshape(-1)[result.failed]
    return out


# ---- the reference path ------------------------------------------------------------------------------


def _patches(x: Tensor, kernel: Sequence[int], geometry: Geometry, size: Sequence[int]) -> Tensor:
    """Copy the patches under the first `size` positions of the kernel.

    [n, c, h, w] -> [n, groups, c / groups * kh * kw, places].
    """
    stride, padding, dilation, groups = geometry
    columns = unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    sides = zip(x.shape[2:], kernel, stride, padding, dilation)
    places = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sides]
    if places != list(size):  # the gradient of a transposed convolution with output_padding
        columns = columns.reshape(*columns.shape[:2], *places)[..., : size[0], : size[1]]
    length = columns.shape[1] // groups
    return columns.reshape(len(x), groups, length, size[0] * size[1])


def _transposed_weight(w: Tensor, groups: int) -> Tensor:
    """Swap the channels and rotate by 180 degrees: [o, c / groups, kh, kw] -> [c, o / groups, kh, kw]."""
    split = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
    return split.reshape(-1, len(w) // groups, *w.shape[2:]).flip(2, 3)


def dilate_and_pad(
    g: Tensor, kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, size: Any
) -> Tensor:
    """Return the image over which a transposed convolution slides its kernel, with stride 1 and no padding.

    It is g, [n, c, h, w], with stride - 1 zeros between its elements and margins of zeros (or cut off),
    so that the kernel has `size` positions.
    """
    n, c, h, w = g.shape
    dilated = g.new_zeros(n, c, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1)
    dilated[:, :, :: stride[0], :: stride[1]] = g
    margins = []
    for axis in (1, 0):  # the last axis first, as `pad` expects
        reach = dilation[axis] * (kernel[axis] - 1)
        before = reach - padding[axis]
        margins += [before, size[axis] + reach - dilated.shape[2 + axis] - before]
    padded = pad(dilated, [max(m, 0) for m in margins])  # first, so that enough remains to cut off
    left, right, top, bottom = (max(-m, 0) for m in margins)
    return padded[..., top : padded.shape[2] - bottom, left : padded.shape[3] - right]
