"""Convolutions of volumes [n, c, d, h, w]: each output element is one dot product, rounded once.

The patches under the kernel are copied into a matrix, and matrices are multiplied. The functions take the
geometry of convolution.Geometry with three sizes each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor
from torch.nn.functional import pad

from reproml.arithmetic.operators.matmul import matmul


def correlate(
    x: Tensor, w: Tensor, bias: Optional[Tensor], geometry: Any, size: Sequence[int]
) -> Tensor:
    """Correlate x with w: x [n, c, ...], w [o, c / groups, ...], bias [o] -> [n, o, *size]."""
    n, out, groups = len(x), len(w), geometry.groups
    columns = _patches(x, w.shape[2:], geometry, size)
    rows = w.reshape(1, groups, out // groups, -1).expand(n, -1, -1, -1)
    if groups == 1:  # the loop of products adds one bias to each column
        return matmul(columns.mT, rows.mT, bias).mT.reshape(n, out, *size)
    b = None if bias is None else bias.reshape(1, groups, -1, 1)
    return matmul(rows, columns, b).reshape(n, out, *size)


def correlate_transposed(
    g: Tensor, w: Tensor, bias: Optional[Tensor], geometry: Any, size: Sequence[int]
) -> Tensor:
    """Compute the transpose of `correlate`: g [n, o, ...], bias [c] -> [n, c, *size]."""
    axes, groups = len(size), geometry.groups
    dilated = g.new_zeros(
        *g.shape[:2], *[(m - 1) * s + 1 for m, s in zip(g.shape[2:], geometry.stride)]
    )
    dilated[(..., *[slice(None, None, s) for s in geometry.stride])] = g
    margins: list[int] = []
    cut = []
    for axis in range(axes):
        reach = geometry.dilation[axis] * (w.shape[2 + axis] - 1)
        before = reach - geometry.padding[axis]
        after = size[axis] + reach - dilated.shape[2 + axis] - before
        margins[:0] = [max(before, 0), max(after, 0)]  # the last axis first, as `pad` expects
        start = max(-before, 0)
        cut.append(slice(start, start + size[axis] + reach))
    image = pad(dilated, margins)[(..., *cut)]
    split = w.reshape(groups, -1, *w.shape[1:]).transpose(1, 2)
    flipped = split.reshape(-1, len(w) // groups, *w.shape[2:]).flip(*range(2, 2 + axes))
    plain = geometry._replace(stride=[1] * axes, padding=[0] * axes)
    return correlate(image, flipped, bias, plain, size)


def weight_gradient(x: Tensor, g: Tensor, w: Tensor, geometry: Any) -> Tensor:
    """Compute the gradient of w: x [n, c, ...], g [n, o, ...] -> [o, c / groups, ...]."""
    groups, size = geometry.groups, g.shape[2:]
    places = len(g) * math.prod(size)
    columns = _patches(x, w.shape[2:], geometry, size)  # [n, groups, c / groups * kernel, places]
    columns = columns.permute(1, 0, 3, 2).reshape(groups, places, columns.shape[2])
    outputs = g.shape[1] // groups
    rows = g.reshape(len(g), groups, outputs, math.prod(size)).permute(1, 2, 0, 3)
    return matmul(rows.reshape(groups, outputs, places), columns).reshape(w.shape)


def _patches(x: Tensor, kernel: Sequence[int], geometry: Any, size: Sequence[int]) -> Tensor:
    """Copy the patches under the first `size` positions: -> [n, groups, c / groups * kernel, places]."""
    axes = len(size)
    windows = pad(x, [p for p in reversed(geometry.padding) for _ in (0, 1)])
    for axis, (k, s, d, m) in enumerate(zip(kernel, geometry.stride, geometry.dilation, size), 2):
        windows = windows.unfold(axis, d * (k - 1) + 1, s).narrow(axis, 0, m)[..., ::d]
    order = [0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes)]
    length = x.shape[1] // geometry.groups * math.prod(kernel)
    return windows.permute(order).reshape(len(x), geometry.groups, length, math.prod(size))
