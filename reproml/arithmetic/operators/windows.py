"""Sums over windows of several sizes: average pooling in general, and `fold`. Each is rounded once.

The mean over a window is a sum with one weight for each axis, 1 / length, so that pooling and its gradient
are products with sparse matrices (weighted_sums.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.operators.arguments import require, require_container, require_shape
from reproml.arithmetic.operators.indexing import sums_in_planes
from reproml.arithmetic.operators.weighted_sums import SparseMatrix, separable_sums

# ---- average pooling ---------------------------------------------------------------------------------


def avg_pool(axes: int) -> Callable[..., Tensor]:
    """Return the definition of aten.avg_pool for inputs [..., *size of this many axes]."""

    def pool(
        x: Tensor,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Optional[int] = None,
    ) -> Tensor:
        sides = _sides(x, axes, kernel, stride, padding)
        rest = (ceil_mode, count_include_pad)
        matrices = [_means(*s, *rest, divisor_override, i == 0) for i, s in enumerate(sides)]
        return separable_sums(x, matrices)

    return pool


def avg_pool_backward(axes: int) -> Callable[..., Tensor]:
    """Return the definition of aten.avg_pool_backward: the transposed sums."""

    def backward(
        g: Tensor,
        x: Tensor,
        kernel: Any,
        stride: Any,
        padding: Any,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: Optional[int],
    ) -> Tensor:
        sides = _sides(x, axes, kernel, stride, padding)
        rest = (ceil_mode, count_include_pad)
        matrices = [_means(*s, *rest, divisor_override, i == 0) for i, s in enumerate(sides)]
        require_shape("the gradient", g, (*x.shape[:-axes], *map(len, matrices)))
        return separable_sums(g, [m.transposed for m in matrices])

    return backward


def _sides(x: Tensor, axes: int, kernel: Any, stride: Any, padding: Any) -> list[tuple[int, ...]]:
    """Return (size, kernel, stride, padding) of each axis. Raises RuntimeError for sizes out of range."""
    require_axes(x, axes)
    sizes = [_tuple(y, axes) for y in (kernel, stride or kernel, padding)]
    sides = list(zip(x.shape[-axes:], *sizes))
    for _, k, s, p in sides:
        if k < 1 or s < 1 or not 0 <= 2 * p <= k:
            raise RuntimeError(
                f"kernel size {sizes[0]} and stride {sizes[1]} must be positive, and padding {sizes[2]} "
                "between 0 and half of the kernel size"
            )
    return sides


@lru_cache(maxsize=256)
def _means(
    n: int,
    kernel: int,
    stride: int,
    padding: int,
    ceil: bool,
    count_padding: bool,
    divisor: Optional[int],
    is_first: bool,
) -> SparseMatrix:
    """Return the weights of one axis: 1 / length of the window, or 1 / divisor on the first axis.

    A window ends at the end of the padding, and its length counts padding only with count_padding.
    """
    require(divisor != 0, "the divisor must not be zero")
    count = (n + 2 * padding - kernel + (stride - 1) * ceil) // stride + 1
    if ceil and (count - 1) * stride >= n + padding:  # a window that begins behind the input
        count -= 1
    require(count > 0, f"kernel size {kernel} is larger than the padded input {n + 2 * padding}")
    rows = []
    for start in range(-padding, count * stride - padding, stride):
        end = min(start + kernel, n + padding)
        length = end - start
        start, end = max(start, 0), min(end, n)
        if divisor is not None:
            weight = Fraction(1, divisor if is_first else 1)
        else:
            weight = Fraction(1, length if count_padding else max(end - start, 1))
        rows.append(dict.fromkeys(range(start, end), weight))
    return SparseMatrix(rows, n)


def adaptive_avg_pool(axes: int) -> Callable[..., Tensor]:
    """Return the definition of aten._adaptive_avg_pool: the mean of each window."""

    def pool(x: Tensor, size: Any) -> Tensor:
        require_axes(x, axes)
        sides = zip(x.shape[-axes:], _tuple(size, axes))
        return separable_sums(x, [_adaptive_means(n, m) for n, m in sides])

    return pool


def adaptive_avg_pool_backward(axes: int) -> Callable[..., Tensor]:
    """Return the definition of aten._adaptive_avg_pool_backward: the transposed sums."""

    def backward(g: Tensor, x: Tensor) -> Tensor:
        require_axes(x, axes)
        require_shape("the gradient", g, (*x.shape[:-axes], *g.shape[-axes:]))
        sides = zip(x.shape[-axes:], g.shape[-axes:])
        return separable_sums(g, [_adaptive_means(n, m).transposed for n, m in sides])

    return backward


@lru_cache(maxsize=256)
def _adaptive_means(n: int, count: int) -> SparseMatrix:
    rows = [dict.fromkeys(w, Fraction(1, max(len(w), 1))) for w in _adaptive_windows(n, count)]
    return SparseMatrix(rows, n)


def _adaptive_windows(n: int, count: int) -> list[range]:
    """Return the indices of each window of adaptive pooling along an axis of n elements."""
    return [range(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]


@lru_cache(maxsize=256)
def by_length(n: int, count: int) -> dict[int, tuple[list[int], list[range]]]:
    """Return the windows of adaptive pooling of each length: their numbers and their indices."""
    found: dict[int, tuple[list[int], list[range]]] = {}
    for i, window in enumerate(_adaptive_windows(n, count)):
        numbers, indices = found.setdefault(len(window), ([], []))
        numbers.append(i)
        indices.append(window)
    return found


def require_axes(x: Tensor, axes: int) -> None:
    """Raise RuntimeError unless x has one or two axes before these, and elements."""
    require_container(x)
    if x.dim() not in (axes + 1, axes + 2) or not math.prod(x.shape[-axes - 1 :]):
        raise RuntimeError(f"pooling along {axes} axes does not take shape {list(x.shape)}")


def _tuple(x: Any, axes: int) -> Sequence[int]:
    """Return a size for each axis."""
    if isinstance(x, int):
        return (x,) * axes
    return tuple(x) * axes if len(x) == 1 else tuple(x)


# ---- fold --------------------------------------------------------------------------------------------


def col2im(x: Tensor, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Tensor:
    """Return the sum of all elements of patches that lie on one another, rounded once.

    x: float32 [n, c * kh * kw, places] or without n. Returns [n, c, *size], or without n.
    """
    require_container(x)
    area, patch = math.prod(size), math.prod(kernel)
    numbers = torch.arange(1, area + 1, device=x.device).double().reshape(1, 1, *size)
    # In the padding the index is 0.
    index = torch.nn.functional.unfold(numbers, kernel, dilation, padding, stride)[0].long()
    if x.dim() not in (2, 3) or x.shape[-2] % patch or x.shape[-1] != index.shape[1]:
        raise RuntimeError(
            f"patches of shape {list(x.shape)} do not fit an output of size {list(size)}: each of "
            f"{index.shape[1]} columns must have a multiple of {patch} elements"
        )
    outer = (*x.shape[:-2], x.shape[-2] // patch)
    values = x.reshape(math.prod(outer), *index.shape)
    return sums_in_planes(index, values, area + 1)[:, 1:].reshape(*outer, *size)
