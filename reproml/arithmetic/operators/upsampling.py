"""Interpolation on a regular grid, and its gradients: each element is one weighted sum, rounded once.

The weights are those of PyTorch's formulas, evaluated in rational numbers: output i of an axis is at
(i + 1/2) r - 1/2 of the input, or at i r with align_corners, where r is the exact quotient of the sizes,
or 1 / s for a scale factor s that is given. PyTorch rounds r, the place and the weights to binary32 first.

An axis that keeps its size although a factor other than 1 is given is copied, but by bicubic interpolation
without antialiasing, as PyTorch does in the forward pass. The gradient is always the transpose.

Nearest-neighbor interpolation copies numbers, from the same places forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Callable, Optional

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.operators.arguments import require_container, require_shape
from reproml.arithmetic.operators.indexing import sums_in_planes
from reproml.arithmetic.operators.reductions import reduce_sum
from reproml.arithmetic.operators.weighted_sums import Row, SparseMatrix, separable_sums

HALF, ONE = Fraction(1, 2), Fraction(1)

# ---- the weights of one axis -------------------------------------------------------------------------

# Weights(size, out, align, scale) returns the weights of each output element. scale: the given factor.
Weights = Callable[[int, int, bool, Optional[float]], list[Row]]


def _ratio(size: int, out: int, align: bool, scale: Optional[float]) -> Fraction:
    if align:
        return Fraction(size - 1, out - 1) if out > 1 else Fraction(0)
    return 1 / Fraction(scale) if scale and scale > 0 else Fraction(size, out)


def _source(ratio: Fraction, i: int, align: bool) -> Fraction:
    return i * ratio if align else (i + HALF) * ratio - HALF


def _row(terms: Any) -> Row:
    """Add up the weights of each index."""
    row: Row = {}
    for index, weight in terms:
        row[index] = row.get(index, Fraction(0)) + weight
    return row


def linear(size: int, out: int, align: bool, scale: Optional[float]) -> list[Row]:
    if size == out:
        return [{i: Fraction(1)} for i in range(out)]
    ratio, last = _ratio(size, out, align, scale), size - 1
    rows = []
    for i in range(out):
        place = max(_source(ratio, i, align), Fraction(0))
        left = min(math.floor(place), last)
        t = min(place - left, Fraction(1))
        rows.append(_row([(left, 1 - t), (min(left + 1, last), t)]))
    return rows


def cubic_weights(t: Fraction, a: Fraction = Fraction(-3, 4)) -> list[Fraction]:
    """Return the weights of the neighbors at -1, 0, 1 and 2 of a place t between 0 and 1.

    Source: R. Keys, IEEE Transactions on Acoustics, Speech, and Signal Processing 29(6), 1981.
    """
    return [_cubic(x, a) for x in (1 + t, t, 1 - t, 2 - t)]


def _cubic(x: Fraction, a: Fraction) -> Fraction:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else Fraction(0)


def cubic(size: int, out: int, align: bool, scale: Optional[float]) -> list[Row]:
    ratio, last = _ratio(size, out, align, scale), size - 1
    rows = []
    for i in range(out):
        place = _source(ratio, i, align)
        left = min(math.floor(place), last)
        weights = cubic_weights(min(place - left, Fraction(1)))
        around = [min(max(left + k, 0), last) for k in (-1, 0, 1, 2)]
        rows.append(_row(zip(around, weights)))
    return rows


def _antialiased(radius: int, kernel: Callable[[Fraction], Fraction]) -> Weights:
    """Return the weights of a kernel that is stretched by the ratio, and normalized to a sum of 1."""

    def weights(size: int, out: int, align: bool, scale: Optional[float]) -> list[Row]:
        if size == out:
            return [{i: Fraction(1)} for i in range(out)]
        ratio = _ratio(size, out, align, scale)
        stretch = max(ratio, Fraction(1))
        rows = []
        for i in range(out):
            center, support = ratio * (i + HALF), radius * stretch
            first = max(int(center - support + HALF), 0)
            end = min(int(center + support + HALF), size)
            row = {j: kernel((j - center + HALF) / stretch) for j in range(first, end)}
            total = sum(row.values())
            rows.append({j: w / total for j, w in row.items()} if total else row)
        return rows

    return weights


antialiased_linear = _antialiased(1, lambda x: max(1 - abs(x), Fraction(0)))
antialiased_cubic = _antialiased(2, lambda x: _cubic(x, Fraction(-1, 2)))


@lru_cache(maxsize=256)
def _matrix(
    weights: Weights, size: int, out: int, align: bool, scale: Optional[float], transposed: bool
) -> SparseMatrix:
    matrix = SparseMatrix(weights(size, out, align, scale), size)
    return matrix.transposed if transposed else matrix


# ---- PyTorch's operators -----------------------------------------------------------------------------


def interpolation(axes: int, weights: Weights) -> Callable[..., Tensor]:
    """Return the definition of aten.upsample_..., for inputs [n, c, ...] with this many more axes."""

    def interpolate(x: Tensor, size: Any, align: bool, *scales: Any) -> Tensor:
        size, scales = _size_and_scales(x, size, scales, axes)
        _require(x, axes, size)
        sides = zip(x.shape[2:], size, scales)
        return separable_sums(x, [_matrix(weights, n, m, align, s, False) for n, m, s in sides])

    return interpolate


def interpolation_backward(axes: int, weights: Weights) -> Callable[..., Tensor]:
    """Return the definition of aten.upsample_..._backward: the transposed sums."""

    def backward(g: Tensor, size: Any, input_size: Any, align: bool, *scales: Any) -> Tensor:
        size, input_size, scales = list(size), list(input_size), _padded(scales, axes)
        require_shape("the gradient", g, (*input_size[:2], *size))
        _require(g, axes, input_size[2:])
        sides = zip(input_size[2:], size, scales)
        return separable_sums(g, [_matrix(weights, n, m, align, s, True) for n, m, s in sides])

    return backward


def _size_and_scales(
    x: Tensor, size: Any, scales: Sequence[Any], axes: int
) -> tuple[list[int], tuple[Any, ...]]:
    """Return the output's size and the scale factors, also from the arguments of the overloads "vec"."""
    if scales and isinstance(scales[0], (list, tuple)):
        scales = scales[0]
    if size is None:
        size = [math.floor(float(n) * s) for n, s in zip(x.shape[2:], scales)]
    return list(size), _padded(scales or (), axes)


def _padded(scales: Sequence[Any], axes: int) -> tuple[Any, ...]:
    """Return the scale factors with those that are left out, which are the last, as None."""
    return (*scales, *[None] * (axes - len(scales)))


def _require(x: Tensor, axes: int, size: Sequence[int]) -> None:
    require_container(x)
    if x.dim() != axes + 2 or len(size) != axes or 0 in x.shape[1:] or min(size) < 1:
        raise RuntimeError(f"cannot interpolate from an input of shape {list(x.shape)} to {size}")


# ---- nearest-neighbor interpolation ------------------------------------------------------------------


def nearest(native: Any, is_exact: bool = False) -> Callable[..., Tensor]:
    """Return the definition of aten.upsample_nearest... or aten._upsample_nearest_exact..., for any dtype.

    native: the operator. It runs wherever all of its kernels copy the same elements.
    """

    def interpolate(x: Tensor, size: Any, *scales: Any, **out: Any) -> Tensor:
        result: Tensor = native(x, size, *scales, **out)
        size, scales = _size_and_scales(x, size, scales, x.dim() - 2)
        sides = list(zip(x.shape[2:], size, scales))
        if not x.is_meta and not all(_kernels_agree(*side, is_exact) for side in sides):
            for axis, side in enumerate(sides, 2):
                x = x.index_select(axis, _nearest_places(*side, is_exact).to(x.device))
            result.copy_(x)
        return result

    return interpolate


def nearest_backward(is_exact: bool = False) -> Callable[..., Tensor]:
    """Return the gradient of nearest-neighbor interpolation: the sum of those of all copies."""

    def backward(g: Tensor, size: Any, input_size: Any, *scales: Any) -> Tensor:
        size, outer, inner = list(size), list(input_size)[:2], list(input_size)[2:]
        require_shape("the gradient", g, (*outer, *size))
        _require(g, len(size), inner)
        if not len(g):
            return g.new_empty(input_size)
        sides = list(zip(inner, size, _padded(scales, len(size))))
        places = [_nearest_places(*side, is_exact) for side in sides]
        if all(torch.equal(p, torch.arange(m) * n // m) for p, (n, m, _) in zip(places, sides)):
            if all(m % n == 0 for n, m, _ in sides):  # blocks of copies
                blocks = g.reshape(*outer, *[k for n, m, _ in sides for k in (n, m // n)])
                return reduce_sum(blocks, range(3, blocks.dim(), 2))
        index = torch.zeros((), dtype=torch.int64)
        for n, place in zip(inner, places):
            index = index.unsqueeze(-1) * n + place
        planes = g.reshape(-1, *size)
        return sums_in_planes(index.to(g.device), planes, math.prod(inner)).reshape(*input_size)

    return backward


@lru_cache(maxsize=256)
def _nearest_places(n: int, m: int, scale: Optional[float], is_exact: bool) -> Tensor:
    """Return the element of an axis of n that each of m elements copies, int64 [m] on the CPU.

    It is floor(fl(i r)) with r rounded to binary32, as PyTorch documents it, or exactly floor((i + 1/2) r).
    """
    if is_exact:
        places = [math.floor(place) for place in _centers(n, m, scale)]
        return torch.tensor(places, device="cpu").clamp_(max=n - 1)
    ratio = np.float32(1 / scale) if scale and scale > 0 else np.float32(n) / np.float32(m)
    places = np.floor(np.arange(m).astype(np.float32) * ratio).astype(np.int64)
    return torch.from_numpy(np.minimum(places, n - 1))


@lru_cache(maxsize=256)
def _kernels_agree(n: int, m: int, scale: Optional[float], is_exact: bool) -> bool:
    """Return whether all kernels of PyTorch copy the elements `_nearest_places`.

    Some ignore a scale factor if the size does not change or is doubled. With is_exact, they round the
    places differently, which matters close to an integer.
    """
    if scale and scale > 0 and (m == n or m == 2 * n) and scale * n != m:
        return False
    if not is_exact:
        return True
    places = _centers(n, m, scale)
    return all(abs(p - round(p)) > max(p, ONE) * Fraction(1, 1 << 20) for p in places)


def _centers(n: int, m: int, scale: Optional[float]) -> list[Fraction]:
    ratio = _ratio(n, m, False, scale)
    return [(i + HALF) * ratio for i in range(m)]
