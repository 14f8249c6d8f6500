"""Bags of embeddings: sums, means and maxima of the rows of a table, and their gradients."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from reproml.arithmetic.operators.arguments import require
from reproml.arithmetic.operators.indexing import compiled_segment_sums, segment_sum
from reproml.arithmetic.operators.reductions import reduce_sum
from reproml.arithmetic.operators.scatter import segment_total
from reproml.errors import NotExactError

SUM, MEAN, MAX = range(3)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Optional[Tensor] = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute aten._embedding_bag: for each bag of indices the sum, mean or maximum of rows of `weight`.

    Rows are multiplied by the weights of the samples, which belong to the sum. `padding_idx` is left out.
    Returns the bags, float32 [bags, width], the bag of each index, the size of each bag, and for the
    maximum the row that each element is from, or -1 in an empty bag. Raises RuntimeError for indices or
    offsets out of range.
    """
    indices, offsets = indices.long(), offsets.long()
    require(
        (indices >= 0) & (indices < len(weight)),
        f"embedding_bag: all indices must be at least 0 and below {len(weight)}, the rows of the table",
    )
    ends = torch.cat([offsets, offsets.new_full((1,), len(indices))])
    require(
        torch.cat([ends[:1] == 0, ends[1:] >= ends[:-1]]),
        f"embedding_bag: offsets must begin with 0, not decrease, and end at {len(indices)} or below",
    )
    if include_last_offset:
        offsets = offsets[:-1]
    bags, width = len(offsets), weight.shape[1]
    place = torch.arange(len(indices), device=weight.device)
    bag = torch.searchsorted(offsets.contiguous(), place, right=True) - 1
    kept = indices != padding_idx
    sizes = torch.zeros(bags, dtype=torch.int64, device=weight.device)
    sizes = sizes.scatter_add(0, bag, kept.long())
    rows = weight[indices]
    if mode != MAX and per_sample_weights is None:
        at = torch.where(kept, bag, bags)
        total = compiled_segment_sums(1, bags + 1, at, rows, padding=bags, mean=mode == MEAN)
        if total is not None:
            return total[0, :-1], bag, sizes, torch.empty_like(sizes)[:0]
    at = bag.unsqueeze(1) * width + torch.arange(width, device=weight.device)
    if mode == MAX:
        low = rows.new_full((bags * width,), -torch.inf)
        values = torch.where(kept.unsqueeze(1), rows, -torch.inf)
        best = low.scatter_reduce(0, at.reshape(-1), values.reshape(-1), "amax")
        # the first row that has the maximum
        is_best = ((values == best[at]) | values.isnan()) & kept.unsqueeze(1)
        last = torch.full((bags * width,), len(indices), dtype=torch.int64, device=weight.device)
        first = last.scatter_reduce(
            0,
            at.reshape(-1),
            torch.where(is_best, place.unsqueeze(1), len(indices)).reshape(-1),
            "amin",
        )
        padded = torch.cat([indices, indices.new_full((1,), -1)])
        largest = padded[first].reshape(bags, width)
        result = torch.where((sizes > 0).unsqueeze(1), best.reshape(bags, width) + 0.0, 0.0)
        return result, bag, sizes, largest
    factors = _of_elements(per_sample_weights, width)
    # The padding gets a bag of its own, so that it is not counted.
    at = torch.where(kept.unsqueeze(1), at, bags * width)
    total = segment_total(
        *(at.reshape(-1), rows.double().reshape(-1), bags * width + 1, mode == MEAN), factors
    )
    return total[:-1].reshape(bags, width), bag, sizes, torch.empty_like(sizes)[:0]


def embedding_bag_backward(
    g: Tensor,
    indices: Tensor,
    offsets: Tensor,
    bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Optional[Tensor],
    padding_idx: int = -1,
) -> Tensor:
    """Compute aten._embedding_bag_backward. Raises NotExactError for sparse gradients."""
    if sparse:
        raise NotExactError(
            "An embedding bag with sparse=True has no exact gradient; use sparse=False."
        )
    return embedding_bag_dense_backward(
        g,
        indices,
        bag,
        bag_size,
        maximum_indices,
        num_weights,
        scale_grad_by_freq,
        mode,
        per_sample_weights,
        padding_idx,
    )


def embedding_bag_dense_backward(
    g: Tensor,
    indices: Tensor,
    bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    per_sample_weights: Optional[Tensor],
    padding_idx: int = -1,
) -> Tensor:
    """Return the gradient of the table: for each row the sum over its uses, rounded once.

    A use adds g, g times the weight of the sample, or g / size of the bag; the maximum adds g to one row
    for each element. Raises NotExactError for scale_grad_by_freq.
    """
    if scale_grad_by_freq:
        raise NotExactError(
            "An embedding bag with scale_grad_by_freq=True has no exact gradient; leave it out."
        )
    width = g.shape[1]
    column = torch.arange(width, device=g.device)
    if mode == MAX:
        used = maximum_indices >= 0
        at = torch.where(used, maximum_indices, num_weights) * width + column
        total = segment_sum(at.reshape(-1), g.reshape(-1), (num_weights + 1) * width)
        return total[: num_weights * width].reshape(num_weights, width)
    rows = torch.where(indices == padding_idx, num_weights, indices.long())
    at = rows.unsqueeze(1) * width + column
    divisors = bag_size[bag].clamp(min=1) if mode == MEAN else None
    total = segment_total(
        at.reshape(-1),
        g[bag].double().reshape(-1),
        (num_weights + 1) * width,
        factors=_of_elements(per_sample_weights, width),
        divisors=_of_elements(divisors, width),
    )
    return total[: num_weights * width].reshape(num_weights, width)


def _of_elements(x: Optional[Tensor], width: int) -> Optional[Tensor]:
    """Return the number of each row for its elements, float64 [rows * width]."""
    return None if x is None else x.double().repeat_interleave(width)


def per_sample_weights_backward(
    g: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    bag: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    """Return the gradient of the weights of the samples: the dot products of g and rows of the table."""
    dots = reduce_sum(g[bag], (1,), y=weight[indices.long()])
    return torch.where(indices == padding_idx, 0.0, dots)
