"""Sums over indices: each output is the exact sum of the values assigned to it, rounded once.

The order of the values does not matter. `segment_sum` is the reference path, with the compiled path as
its first attempt; the operators bring their arguments into its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.exact_sums import nearest_of_rows
from reproml.arithmetic.numerics.formats import BINARY64, operate, target
from reproml.arithmetic.numerics.rounding import gamma, round_sum
from reproml.arithmetic.operators.arguments import require_shape
from reproml.arithmetic.operators.reductions import sum_dims
from reproml.errors import NotExactError


def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Return x + the sum of the elements of source at each index along `dim`."""
    if not index.numel():
        return x + 0.0  # -0 becomes +0, as in any other sum
    return _add_at(x, *scattered(x, dim, index, source))


def scattered(x: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return the flat indices in x at which aten.scatter writes along `dim`, and the elements for these."""
    if not x.dim():
        return index * 0, source.reshape(index.shape)
    fits = index.dim() == x.dim() == source.dim()
    if fits:
        sizes = list(x.shape)
        sizes[dim] = index.shape[dim]
        fits = all(i <= min(s, n) for i, s, n in zip(index.shape, source.shape, sizes))
    if not fits:
        raise RuntimeError(
            f"an index of shape {list(index.shape)} does not fit {list(x.shape)} and a source of shape "
            f"{list(source.shape)}"
        )
    used = [slice(0, n) for n in index.shape]
    in_x = list(used)
    in_x[dim] = slice(None)
    return flat_indices(x)[tuple(in_x)].gather(dim, index), source[tuple(used)]


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    """Return x + the sum of alpha * source at each index along `dim`; the products are rounded first."""
    source = source if alpha == 1 else operate(torch.mul, source, alpha)
    if x.dim():
        sizes = list(x.shape)
        sizes[dim] = index.numel()
        require_shape("the source", source, sizes)
    return _add_at(x, flat_indices(x).index_select(dim, index), source)


def index_put(
    x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """Apply index_put_ to a copy of x."""
    return index_put_(x.clone(), indices, values, accumulate)


def index_put_(
    x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """Write values at the indices, in order, or add their exact sum with `accumulate`."""
    if accumulate:
        return x.copy_(_add_at(x, torch.ops.aten.index(flat_indices(x), indices), values))
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # one thread writes the values in order
    try:
        # Tensor.index_put_ takes no None, which stands for all of a dimension.
        return torch.ops.aten.index_put_(x, indices, values)  # type: ignore[no-any-return]
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    """Return x with `source` written, in order, or added (rounded once) at the flat indices."""
    flat = index_put(x.reshape(-1), [index], source.reshape(index.shape), accumulate)
    return flat.reshape(x.shape)


def unfold_backward(g: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """Return the sum of the gradients of all windows that contain an element."""
    x = g.new_zeros(sizes)
    index = flat_indices(x).unfold(dim, size, step)
    require_shape("the gradient", g, index.shape)
    return _add_at(x, index, g)


def padding_backward(pad: Any) -> Any:
    """Return the gradient of a padding that copies elements: the sum of those of all copies."""

    def backward(g: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
        copied = pad(flat_indices(x).double(), padding)  # not defined for integers
        require_shape("the gradient", g, copied.shape)
        return _add_at(torch.zeros_like(x), copied.long(), g)

    return backward


def embedding_backward(
    g: Tensor, indices: Tensor, rows: int, padding: int, scale_by_freq: bool
) -> Tensor:
    """Compute aten.embedding_dense_backward: the sum of the gradients of each row of the embedding table.

    g: float32 [*indices.shape, width]. Returns float32 [rows, width], with zeros in row `padding`. Raises
    NotExactError for scale_grad_by_freq.
    """
    if scale_by_freq:
        raise NotExactError(
            "An embedding with scale_grad_by_freq=True has no exact definition; leave it out."
        )
    require_shape("the gradient", g, (*indices.shape, *g.shape[-1:]))
    if indices.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"the indices must be int64 or int32, not {indices.dtype}")
    compiled = compiled_segment_sums(1, rows, indices.long(), g, padding=padding)
    if compiled is not None:
        return compiled.squeeze(0)
    flat, width = indices.reshape(-1), g.shape[-1]
    grads = torch.where((flat == padding).unsqueeze(1), 0.0, g.reshape(-1, width))
    at = flat.unsqueeze(1) * width + torch.arange(width, device=g.device)
    return segment_sum(at.reshape(-1), grads.reshape(-1), rows * width).reshape(rows, width)


# ---- the sums ----------------------------------------------------------------------------------------


def flat_indices(x: Tensor) -> Tensor:
    """Return the flat index of each element of x, in x's shape."""
    return torch.arange(x.numel(), device=x.device).reshape(x.shape)


def _add_at(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """Return x + the sum of the elements of `source` (broadcast to index) at each flat index.

    Raises RuntimeError unless x and source are float32.
    """
    for t in (x, source):
        if t.dtype is not target().container:
            raise RuntimeError(f"sums at indices take float32 tensors, not {t.dtype}")
    values = source.expand(index.shape).reshape(-1)
    return segment_sum(index.reshape(-1), values, x.numel(), x.reshape(-1)).reshape(x.shape)


def segment_sum(index: Tensor, values: Tensor, size: int, start: Optional[Tensor] = None) -> Tensor:
    """Return start + the sum of the values of each index, rounded once.

    index: int64 [n], from 0 to size - 1; values: float32 [n]; start: float32 [size]. Returns float32
    [size].
    """
    if target() is BINARY64:
        return _segment_sum_in_binary64(index, values, size, start)
    compiled = compiled_segment_sums(1, size, index, values, start)
    if compiled is not None:
        return compiled.reshape(size)
    terms = values.double()
    if start is not None:
        index = torch.cat([torch.arange(size, device=index.device), index])
        terms = torch.cat([start.double(), terms])
    zeros = torch.zeros(size, dtype=torch.float64, device=values.device)
    mid, magnitude = zeros.scatter_add(0, index, terms), zeros.scatter_add(0, index, terms.abs())
    counts = zeros.scatter_add(0, index, torch.ones_like(terms))

    def resolve(failed: Tensor) -> Sequence[float]:
        return [nearest_of_rows(terms[index == i].unsqueeze(0))[0] for i in failed.tolist()]

    return round_sum(mid, magnitude * gamma(counts), resolve)


def _segment_sum_in_binary64(
    index: Tensor, values: Tensor, size: int, start: Optional[Tensor]
) -> Tensor:
    """Compute `segment_sum` rounded to binary64."""
    if start is not None:
        index = torch.cat([torch.arange(size, device=index.device), index])
        values = torch.cat([start, values])
    return reduce_groups(lambda rows: sum_dims(rows, 1), index, size, values)


def reduce_groups(
    reduce: Callable[..., Tensor], index: Tensor, size: int, *values: Tensor
) -> Tensor:
    """Return reduce(rows) for the values of each index, [n] -> [size], and 0 where there are none.

    All groups of equally many values are rows of one call.
    """
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=size)
    first = counts.cumsum(0) - counts
    result = values[0].new_zeros(size)
    for count in counts.unique().tolist():
        at = (counts == count).nonzero()
        rows = order[first[at] + torch.arange(count, device=at.device)]
        if count:
            result[at.squeeze(1)] = reduce(*[x[rows] for x in values])
    return result


def sums_in_planes(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return, for each plane, the sum of the values of each index, rounded once.

    values: float32 [planes, *]. index: int64, from 0 to size - 1, of one plane's shape or of values' shape.
    Returns float32 [planes, size].
    """
    planes = len(values)
    index = index.expand(values.shape).reshape(planes, values.shape[1:].numel())
    compiled = compiled_segment_sums(planes, size, index, values)
    if compiled is not None:
        return compiled.reshape(planes, size)
    first = torch.arange(planes, device=values.device).unsqueeze(1) * size
    flat = (index + first).reshape(-1)
    return segment_sum(flat, values.reshape(-1), planes * size).reshape(planes, size)


def compiled_segment_sums(
    planes: int,
    rows: int,
    index: Tensor,
    values: Tensor,
    start: Optional[Tensor] = None,
    padding: int = -1,
    mean: bool = False,
) -> Optional[Tensor]:
    """Sum rows of values by csrc/indexing.c; None where it does not apply or a sum fails its tests.

    index: int64 [planes, n], from 0 to rows - 1, or `padding` for values to be left out.
    values: float32 [planes, n, width]; start: float32 [planes, rows, width]. Returns that shape.
    mean: whether each sum is divided by the number of its rows, for one plane without `start`.
    """
    if kernels.loops() is None or not (values.is_cpu and index.numel()):
        return None
    index, values = index.contiguous(), values.contiguous()
    start = None if start is None else start.contiguous()
    width = values.numel() // index.numel()
    out = torch.empty(planes, rows, width, dtype=torch.float32, device="cpu")
    left = kernels.loops().reproml_scatter(
        planes,
        index.numel() // planes,
        width,
        rows,
        index.data_ptr(),
        values.data_ptr(),
        None if start is None else start.data_ptr(),
        padding,
        mean,
        out.data_ptr(),
    )
    return None if left else out


def unsafe_masked_index(
    x: Tensor, mask: Tensor, indices: Sequence[Optional[Tensor]], fill: Any
) -> Tensor:
    """Compute aten._unsafe_masked_index: x at the indices where the mask is true, elsewhere a number."""
    return torch.ops.aten._unsafe_masked_index(x, mask, indices, fill)  # type: ignore[no-any-return]


def unsafe_masked_index_put_accumulate(
    x: Tensor, mask: Tensor, indices: Sequence[Optional[Tensor]], values: Tensor
) -> Tensor:
    """Return x + the sum of all values that are put there where the mask is true."""
    inside = [
        None if i is None else i.clamp(-x.shape[d], x.shape[d] - 1) for d, i in enumerate(indices)
    ]
    return index_put(x, inside, values.masked_fill(~mask, 0.0), True)
