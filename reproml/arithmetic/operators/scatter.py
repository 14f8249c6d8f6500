"""Reductions at indices: sums, means, products and extrema of all values that have the same index.

Each result is rounded once, from the exact value, so that the order of the values does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.numerics.exact_sums import exact_sum
from reproml.arithmetic.numerics.formats import BINARY64, operate, target
from reproml.arithmetic.numerics.rounding import gamma, nearest, round_sum
from reproml.arithmetic.operators.arguments import require_container, require_shape
from reproml.arithmetic.operators.indexing import (
    flat_indices,
    index_put,
    reduce_groups,
    scattered,
    segment_sum,
)
from reproml.arithmetic.operators.pointwise import div
from reproml.arithmetic.operators.products import groups, prod, segment_product
from reproml.errors import NotExactError


def scatter_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Reduce the elements of source at each index along `dim`, with x's own element if include_self.

    reduce: "sum", "mean", "prod", "amax" or "amin".
    """
    if not index.numel():
        return x.clone() if reduce == "prod" or not include_self else x + 0.0
    return _reduce_at(x, *scattered(x, dim, index, source), reduce, include_self)


def index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Reduce the slices of source at each index along `dim`, as `scatter_reduce` does."""
    if x.dim():
        sizes = list(x.shape)
        sizes[dim] = index.numel()
        require_shape("the source", source, sizes)
    at = flat_indices(x).index_select(dim, index)
    return _reduce_at(x, at, source.reshape(at.shape), reduce, include_self)


def index_copy(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Return x with the slices of source written at the indices along `dim`, in order."""
    x_, source_ = torch.atleast_1d(x), torch.atleast_1d(source)
    sizes = list(x_.shape)
    sizes[dim] = index.numel()
    if list(source_.shape) != sizes or source.dtype is not x.dtype:
        raise RuntimeError(
            f"index_copy(): a source of {source.dtype}, shape {list(source.shape)}, does not fit"
        )
    result = index_put(x_.movedim(dim, 0), [index.reshape(-1)], source_.movedim(dim, 0))
    return result.movedim(0, dim).reshape(x.shape)


def _reduce_at(x: Tensor, index: Tensor, source: Tensor, reduce: str, include_self: bool) -> Tensor:
    for t in (x, source):
        require_container(t)
    start, at, values = x.reshape(-1), index.reshape(-1), source.reshape(-1)
    if reduce in ("amax", "amin"):
        result = start.scatter_reduce(0, at, values, reduce, include_self=include_self) + 0.0
    elif reduce in ("sum", "mean", "prod"):
        every, terms = at, values
        if include_self:
            own = torch.arange(len(start), device=x.device)
            every, terms = torch.cat([own, at]), torch.cat([start, values])
        if reduce == "sum":
            result = segment_sum(every, terms, len(start))
        elif reduce == "prod" and target() is BINARY64:
            result = reduce_groups(lambda rows: prod(rows, 1), every, len(start), terms)
        elif reduce == "prod":
            result = segment_product(every, terms, len(start))
        else:
            result = segment_total(every, terms.double(), len(start), mean=True)
    else:
        raise RuntimeError(f"reduce argument must be sum, mean, prod, amax or amin, not {reduce}")
    if not include_self:
        touched = torch.zeros_like(start, dtype=torch.bool).index_fill(0, at, True)
        result = torch.where(touched, result, start)
    return result.reshape(x.shape)


def segment_total(
    index: Tensor,
    terms: Tensor,
    size: int,
    mean: bool = False,
    factors: Optional[Tensor] = None,
    divisors: Optional[Tensor] = None,
) -> Tensor:
    """Return the sum of the terms of each index, rounded once: float32 [size], 0 for an index without any.

    index: int64 [n]. terms: float64 [n]. mean: whether each sum is divided by the number of its terms.
    factors: float64 [n], by which the terms are multiplied. divisors: float64 [n], positive integers by
    which they are divided.
    """
    if target() is BINARY64:

        def reduce(terms: Tensor, factors: Tensor, divisors: Tensor) -> Tensor:
            count = terms.shape[1] if mean else 1
            formula = lambda ctx, x, w, d: ctx.sum(x * w / (d * count))  # noqa: E731
            return rowwise(formula, 1, terms, factors, divisors).squeeze(1)

        one = torch.ones((), dtype=torch.float64, device=terms.device).expand(terms.shape)
        factors, divisors = (one if x is None else x for x in (factors, divisors))
        return reduce_groups(reduce, index, size, terms, factors, divisors)
    if factors is not None:
        terms = terms * factors  # exact
    quotients = terms if divisors is None else terms / divisors
    zeros = torch.zeros(size, dtype=torch.float64, device=terms.device)
    mid = zeros.scatter_add(0, index, quotients)
    magnitude = zeros.scatter_add(0, index, quotients.abs())
    counts = zeros.scatter_add(0, index, torch.ones_like(terms))
    if mean:
        mid, magnitude = mid / counts.clamp(min=1), magnitude / counts.clamp(min=1)

    def resolve(failed: Tensor) -> Sequence[float]:
        if divisors is None:
            sums = [(exact_sum(g), len(g)) for g in groups(index, terms, failed)]
        else:
            pairs = zip(groups(index, terms, failed), groups(index, divisors, failed))
            sums = [(sum(map(_quotient, *each), Fraction(0)), len(each[0])) for each in pairs]
        return [nearest(s / n if mean else s) for s, n in sums]

    return round_sum(mid, magnitude * gamma(counts + 2), resolve)


def _quotient(a: float, b: float) -> Fraction:
    return Fraction(a) / Fraction(b)


# ---- segments of a sequence --------------------------------------------------------------------------

_REDUCTIONS = {"sum": "sum", "mean": "mean", "prod": "prod", "max": "amax", "min": "amin"}
_EMPTY = {"sum": 0.0, "mean": float("nan"), "prod": 1.0, "max": -float("inf"), "min": float("inf")}


def segment_reduce(
    x: Tensor,
    reduce: str,
    *,
    lengths: Optional[Tensor] = None,
    indices: Optional[Tensor] = None,
    offsets: Optional[Tensor] = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: Any = None,
) -> Tensor:
    """Reduce consecutive segments along `axis`, whose lengths or offsets are given for all outer axes.

    reduce: "sum", "mean", "prod", "max" or "min". initial: one more element of each segment. An empty
    segment without it gives 0, NaN, 1 or an infinity.

    Raises NotExactError for a mean with an initial element other than 0.
    """
    if reduce == "mean" and initial:
        raise NotExactError("segment_reduce with reduce='mean' is defined without `initial` only.")
    at, shape = _segments(x, lengths, offsets, axis)
    start = x.new_full((math.prod(shape) + 1,), _EMPTY[reduce] if initial is None else initial)
    with_initial = initial is not None and reduce != "mean"
    result = _reduce_at(start, at.reshape(-1), x.reshape(-1), _REDUCTIONS[reduce], with_initial)
    return result[:-1].reshape(shape)


def segment_reduce_backward(
    g: Tensor,
    y: Tensor,
    x: Tensor,
    reduce: str,
    *,
    lengths: Optional[Tensor] = None,
    offsets: Optional[Tensor] = None,
    axis: int = 0,
    initial: Any = None,
) -> Tensor:
    """Compute aten._segment_reduce_backward from the result y of the forward pass.

    A mean divides g by the length. The elements that are the extremum get g / their number. For a product
    it is g y / x, and where x is 0, g times the rounded product of y's other elements.
    """
    at, shape = _segments(x, lengths, offsets, axis)
    size = y.numel()
    require_shape("the result", y, shape)
    require_shape("the gradient", g, shape)

    def of_elements(t: Tensor) -> Tensor:
        return torch.cat([t.reshape(-1)[:size], t.new_ones(1)])[at]

    def count(which: Tensor) -> Tensor:
        zeros = x.new_zeros(size + 1)
        return zeros.scatter_add(0, at.reshape(-1), which.reshape(-1).float())

    def gradient() -> Tensor:
        if reduce == "sum":
            return of_elements(g)
        if reduce == "mean":
            return div(of_elements(g), of_elements(count(torch.ones_like(x))))
        if reduce in ("max", "min"):
            chosen = (x == of_elements(y)) | x.isnan()
            return torch.where(chosen, div(of_elements(g), of_elements(count(chosen))), 0.0)
        is_zero = x == 0
        others = torch.where(is_zero, 1.0, x).reshape(-1)
        start = x.new_full((size + 1,), 1.0 if initial is None else initial)
        every = torch.cat([torch.arange(size + 1, device=x.device), at.reshape(-1)])
        product = segment_product(every, torch.cat([start, others]), size + 1)
        at_zero = torch.where(
            of_elements(count(is_zero)) > 1, 0.0, operate(torch.mul, of_elements(g), product[at])
        )
        quotient = elementwise(
            lambda ctx, g, y, x: g * y / x,
            of_elements(g),
            of_elements(y),
            torch.where(is_zero, 1.0, x),
        )
        return torch.where(is_zero, at_zero, quotient)

    return torch.where(at == size, 0.0, gradient())


def _segments(
    x: Tensor, lengths: Optional[Tensor], offsets: Optional[Tensor], axis: int
) -> tuple[Tensor, list[int]]:
    """Return the flat index in the result of each element of x, and the result's shape.

    An element before the first or after the last offset is in no segment; its index is the result's size.
    """
    if offsets is None:
        assert lengths is not None
        ends = lengths.cumsum(-1)
    else:
        ends = offsets[..., 1:]
    count = ends.shape[-1]
    outer = x.shape[:axis]
    place = torch.arange(x.shape[axis], device=x.device).expand(*outer, x.shape[axis])
    segment = torch.searchsorted(ends.contiguous(), place.contiguous(), right=True)
    shape = [*outer, count, *x.shape[axis + 1 :]]
    inner = x.shape[axis + 1 :].numel()
    rows = torch.arange(outer.numel(), device=x.device).reshape(*outer, 1) * count + segment
    at = rows.unsqueeze(-1) * inner + torch.arange(inner, device=x.device)
    outside = segment >= count
    if offsets is not None:
        outside = outside | (place < offsets[..., :1])
    return torch.where(outside.unsqueeze(-1), math.prod(shape), at).reshape(x.shape), shape
