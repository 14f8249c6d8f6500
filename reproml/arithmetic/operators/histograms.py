"""Histograms: bins are found by exact comparisons, and weights are summed exactly and rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import rowwise
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import narrow, storing
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require_float32
from reproml.arithmetic.operators.indexing import segment_sum
from reproml.errors import NotExactError


def bincount(x: Tensor, weights: Optional[Tensor] = None, minlength: int = 0) -> Tensor:
    """Return the sum of the weights of each number of x, rounded once."""
    if weights is None:
        raise NotExactError("bincount takes integers.")
    require_float32(weights.dtype)
    if x.shape != weights.shape:
        raise RuntimeError("bincount: weights should have the same shape as the input")
    size = max(int(minlength), int(x.max()) + 1 if x.numel() else 0)
    if x.numel() and int(x.min()) < 0:
        raise RuntimeError("bincount only supports 1-d non-negative integral inputs")
    return segment_sum(x.long(), weights, size)


def histc(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Return how many elements are in each of the bins, which divide [min, max] into equal parts.

    A bin has its lower edge, the last one its upper edge as well. If min = max, the smallest and the
    largest element take their place. The edges are rational numbers, with which elements are compared
    exactly.
    """
    if bins <= 0:
        raise RuntimeError("bins must be > 0")
    ends = [float32_scalar(min), float32_scalar(max)]
    low, high = _bounds(x, None if ends[0] == ends[1] and x.numel() else ends, Fraction(1))
    with storing():
        inner = [_round_up(e) for e in _edges(low, high, bins)[1:-1]]
    edges = _on_device(inner, x.device)
    inside = (x >= float(low)) & (x <= float(high))
    at = torch.where(inside, torch.bucketize(x.contiguous(), edges, right=True), bins).reshape(-1)
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=x.device)
    return narrow(counts.scatter_add(0, at, torch.ones_like(at))[:-1].double())


def histogram(
    x: Tensor,
    bins: Any = 100,
    *,
    range: Optional[Sequence[float]] = None,
    weight: Optional[Tensor] = None,
    density: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute aten.histogram: the sum of the weights in each bin, and the edges of the bins.

    bins: the edges, or a number of bins, whose edges are fl(low + i (high - low) / bins). A density is h
    / (sum of all h times the width of the bin), from the rounded sums h. The width is the difference of
    the edges that are given, or (high - low) / bins.
    """
    width: Optional[Fraction] = None
    if isinstance(bins, Tensor):
        edges = bins
    else:
        ends = None if range is None else [float32_scalar(end) for end in range]
        if ends is None and not x.numel():
            ends = [Fraction(0), Fraction(1)]
        low, high = _bounds(x, ends, Fraction(1, 2))
        width = (high - low) / bins
        numbers = [nearest(e) for e in _edges(low, high, bins)]
        edges = _on_device(numbers, x.device)
    count = len(edges) - 1
    flat = x.reshape(-1).contiguous()
    at = torch.searchsorted(edges, flat, right=True) - 1
    at = torch.where(flat == edges[-1], count - 1, at)
    inside = (flat >= edges[0]) & (flat <= edges[-1])
    at = torch.where(inside, at, count)
    weights = torch.ones_like(flat) if weight is None else weight.reshape(-1)
    sums = segment_sum(at, weights, count + 1)[:-1]
    if density:
        sums = rowwise(
            lambda ctx, h, low, high: h / (ctx.sum(h) * (width or high - low)),
            *(0, sums, edges[:-1], edges[1:]),
        )
    return sums, edges


def _edges(low: Fraction, high: Fraction, bins: int) -> list[Fraction]:
    return [low + (high - low) * Fraction(i, bins) for i in range(bins + 1)]


def _on_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Return the numbers as float32, without making the host wait."""
    empty = torch.empty(0, dtype=torch.float32, device=device)
    return torch.stack([to_device(x, device).float() for x in numbers]) if numbers else empty


def _bounds(
    x: Tensor, given: Optional[list[Fraction]], margin: Fraction
) -> tuple[Fraction, Fraction]:
    """Return the range of a histogram: as given, or the smallest and the largest element.

    margin: what is subtracted and added where both ends are equal.
    """
    if given is not None:
        low, high = given
    else:
        ends = x.aminmax()
        if not bool(torch.isfinite(ends.min) & torch.isfinite(ends.max)):
            raise RuntimeError(f"range of [{ends.min.item()}, {ends.max.item()}] is not finite")
        low, high = Fraction(ends.min.item()), Fraction(ends.max.item())
    if low == high:
        low, high = low - margin, high + margin
    if low > high:
        raise RuntimeError("max must be larger than min")
    return low, high


def _round_up(x: Fraction) -> float:
    """Return the smallest binary32 number that is not less than x."""
    value = torch.tensor(nearest(x))
    up = torch.tensor(torch.inf)
    return float(value if Fraction(value.item()) >= x else torch.nextafter(value, up))
