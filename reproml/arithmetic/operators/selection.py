"""Operators that select elements by their order: quantiles, the most frequent element, both extrema.

Elements that are equal are taken in the order of their indices (a stable sort), NaN is larger than all
others, and a zero is +0, as its sign would depend on the order of evaluation.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor


def kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Return the k-th smallest element along `dim`, and its index."""
    if not 1 <= k <= (x.shape[dim] if x.dim() else 1):
        raise RuntimeError(f"kthvalue(): selected number k out of range for dimension {dim}")
    ordered, order = _sorted_rows(x, dim)
    return _at(ordered, order, torch.full_like(order[..., :1], k - 1), x, dim, keepdim)


def median(x: Tensor, dim: Optional[int] = None, keepdim: bool = False) -> Any:
    """Return the lower median, or NaN where there is one, and its first index if there is a `dim`."""
    if dim is None:
        return _of_all(median, x)
    ordered, order = _sorted_rows(x, dim)
    n = ordered.shape[-1]
    numbers = (~ordered.isnan()).sum(-1, keepdim=True)
    return _at(ordered, order, torch.where(numbers < n, numbers, (n - 1) // 2), x, dim, keepdim)


def nanmedian(x: Tensor, dim: Optional[int] = None, keepdim: bool = False) -> Any:
    """Return the lower median of the elements that are not NaN, and its index if there is a `dim`."""
    if dim is None:
        return _of_all(nanmedian, x)
    ordered, order = _sorted_rows(x, dim)
    numbers = (~ordered.isnan()).sum(-1, keepdim=True)
    return _at(ordered, order, (numbers - 1).clamp(min=0) // 2, x, dim, keepdim)


def mode(x: Tensor, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Return the smallest of the most frequent elements, and the last of its indices."""
    ordered, order = _sorted_rows(x, dim)
    place = torch.arange(ordered.shape[-1], device=x.device).expand(ordered.shape)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    before = (
        place - torch.where(first, place, 0).cummax(-1).values
    )  # equal elements before this one
    return _at(ordered, order, before.argmax(-1, keepdim=True), x, dim, keepdim)


def aminmax(
    x: Tensor, *, dim: Optional[int] = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element."""
    dims = [] if dim is None else [dim]
    return x.amin(dims, keepdim) + 0.0, x.amax(dims, keepdim) + 0.0


def unique(
    x: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> Any:
    """Compute aten._unique2: the different elements, always sorted, with the places of each."""
    return torch.ops.aten._unique2(_without_minus_zero(x), True, return_inverse, return_counts)


def unique_dim(
    x: Tensor,
    dim: int,
    sorted: bool = True,
    return_inverse: bool = False,
    return_counts: bool = False,
) -> Any:
    """Return the different slices along `dim`, sorted."""
    return torch.ops.aten.unique_dim(
        _without_minus_zero(x), dim, True, return_inverse, return_counts
    )


def unique_consecutive(
    x: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: Optional[int] = None
) -> Any:
    """Return the elements or slices that differ from the one before."""
    return torch.ops.aten.unique_consecutive(
        _without_minus_zero(x), return_inverse, return_counts, dim
    )


def _without_minus_zero(x: Tensor) -> Tensor:
    return x + 0.0 if x.is_floating_point() else x


def _sorted_rows(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the elements in order along `dim`, which becomes the last axis, and their indices."""
    rows = torch.atleast_1d(_without_minus_zero(x)).movedim(dim, -1)
    return rows.sort(dim=-1, stable=True)  # type: ignore[no-any-return]


def _at(
    ordered: Tensor, order: Tensor, place: Tensor, x: Tensor, dim: int, keepdim: bool
) -> tuple[Tensor, Tensor]:
    """Return the elements at a place [..., 1] of the rows in order, and their indices."""
    values, indices = (t.gather(-1, place).movedim(-1, dim) for t in (ordered, order))
    if not x.dim():
        return values.reshape(()), indices.reshape(())
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def _of_all(function: Any, x: Tensor) -> Tensor:
    if not x.numel():
        return x.new_full((), torch.nan)
    return function(x.reshape(-1), 0)[0]  # type: ignore[no-any-return]
