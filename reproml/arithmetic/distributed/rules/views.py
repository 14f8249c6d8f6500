"""Rules of views, parts and what is put together: where the batch goes, what takes its rows apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.distributed.operands import (
    by_name,
    dimensions,
    first_batch,
    from_the_right,
    own_part,
    refuse,
)
from reproml.arithmetic.distributed.pending import raw
from reproml.arithmetic.distributed.rules.compute import everywhere
from reproml.arithmetic.distributed.sharded import Rows, Sharded

aten = torch.ops.aten


def view_strides(func: Any, args: Any, kwargs: Any) -> Optional[Sequence[int]]:
    """Those of a view of the whole batch args[0], where the part does not tell them."""
    x = args[0]
    if not x.at.few:
        return None
    with raw():
        whole = torch.empty_strided(x.shape, x.stride(), device="meta")
        result = func(whole, *args[1:], **kwargs)
    return (result if isinstance(result, Tensor) else result[0]).stride()


def view(func: Any, args: Any, kwargs: Any) -> Any:
    """view and its kin: the batch goes where row-major order has it in the new shape."""
    x, at = args[0], args[0].at
    shape = list(args[1])
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = x.numel() // known if known else 0
    moved = _placed(at, math.prod(x.shape[at.dim + 1 :]) * at.after, shape)
    if moved is None:
        refuse(func, f"{list(x.shape)} as {shape} takes the rows of the batch apart")
    strides = view_strides(aten.view.default, [x, shape], {})
    shape[moved.dim] = moved.own
    return Sharded(x.local.view(shape), moved, strides)


def _placed(at: Rows, inner: int, shape: Sequence[int]) -> Optional[Rows]:
    """The batch in another shape, `inner` elements of the whole tensor lying within one of its rows."""
    for dim in [at.dim, *range(len(shape))]:
        if dim >= len(shape):
            continue
        after, rest = divmod(inner, math.prod(shape[dim + 1 :]) or 1)
        before, over = divmod(shape[dim], at.batch * after) if after else (0, 1)
        if before and not rest and not over:
            return replace(at, dim=dim, before=before, after=after)
    return None


def permuted(order: Callable[[int, Any], Sequence[int]]) -> Callable[..., Any]:
    """A rule for a permutation: order(rank, arguments) has the old dimension at each new place."""

    def rule(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        dims = [d % x.dim() for d in order(x.dim(), args[1:])]
        strides = [x.stride(d) for d in dims]
        return Sharded(func(x.local, *args[1:]), x.at.moved(dims.index(x.at.dim)), strides)

    return rule


def swapped(rank: int, dims: Any) -> list[int]:
    order = list(range(rank))
    a, b = dims
    order[a], order[b] = order[b], order[a]
    return order


def transpose_(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], [d % args[0].dim() for d in args[1:]]
    with raw(), torch._C._DisableTorchDispatch():
        func(x, *dims)  # its shape and strides
    x.local = x.local.transpose(*dims)
    x.at = x.at.moved(swapped(x.dim(), dims)[x.at.dim])
    return x


def unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[1] % (args[0].dim() + 1)
    strides = view_strides(func, args, kwargs)
    return Sharded(func(x.local, dim), x.at.moved(x.at.dim + (dim <= x.at.dim)), strides)


def squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    gone = [d for d in dimensions(args[1] if len(args) > 1 else None, x.dim()) if x.shape[d] == 1]
    kept = [d for d in gone if d != x.at.dim]
    at = x.at.moved(x.at.dim - sum(d < x.at.dim for d in kept))
    if kept != gone:
        refuse(func, "it takes away the dimension of the batch")
    return Sharded(aten.squeeze.dims(x.local, kept), at, view_strides(func, args, kwargs))


def expand(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], list(args[1])
    at = x.at.moved(x.at.dim + len(shape) - x.dim())
    strides = view_strides(func, args, kwargs)
    shape[at.dim] = at.own
    return Sharded(func(x.local, shape, **kwargs), at, strides)


def slice_(func: Any, args: Any, kwargs: Any) -> Any:
    named = by_name(func, args, kwargs)
    x, dim = named["self"], named["dim"] % named["self"].dim()
    strides = view_strides(func, args, kwargs)
    if dim != x.at.dim:
        return Sharded(func(x.local, *args[1:], **kwargs), x.at, strides)
    start, end, step = named["start"], named["end"], named["step"]
    if start not in (None, 0) or step != 1 or (end is not None and end < x.shape[dim]):
        refuse(func, "it takes some rows of the batch")
    return Sharded(aten.alias(x.local), x.at, strides)


def parted(func: Any, args: Any, kwargs: Any) -> Any:
    """split, unbind, select along another dimension than the batch's."""
    named = by_name(func, args, kwargs)
    x, dim = named["self"], named["dim"] % named["self"].dim()
    if dim == x.at.dim:
        refuse(func, "it takes some rows of the batch")
    result = func(x.local, *args[1:], **kwargs)
    first = result if isinstance(result, Tensor) else result[0]
    at = x.at.moved(x.at.dim - (first.dim() < x.dim() and dim < x.at.dim))
    strides = view_strides(func, args, kwargs)  # of the first, and so of all
    return tree_map_only(Tensor, lambda y: Sharded(y, at, strides), result)


def part_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """select_backward, slice_backward: zeros but for the part."""
    g, shape, dim, *rest = args
    shape = list(shape)
    dim %= len(shape)
    at = g.at.moved(g.at.dim + (g.dim() < len(shape) and dim <= g.at.dim))
    if dim == at.dim:
        return everywhere(func, args, kwargs)
    shape[at.dim] = at.own
    return Sharded(func(g.local, shape, dim, *rest, **kwargs), at)


def joined(func: Any, args: Any, kwargs: Any) -> Any:
    """cat and stack along another dimension than the batch's."""
    named = by_name(func, args, kwargs)
    x = first_batch(args, kwargs)
    stacked = "stack" in func._schema.name
    dim = named["dim"] % (x.dim() + stacked)
    if dim == x.at.dim and not stacked:
        if not all(isinstance(y, Sharded) for y in named["tensors"]):
            refuse(func, "it joins rows of the batch to rows that may be of this worker alone")
        return everywhere(func, args, kwargs)
    if any(y.dim() != x.dim() for y in named["tensors"]):
        return everywhere(func, args, kwargs)
    at = from_the_right(x)
    result = func([own_part(func, y, at) for y in named["tensors"]], dim)
    return Sharded(result, x.at.moved(x.at.dim + (stacked and dim <= x.at.dim)))


def padded(func: Any, args: Any, kwargs: Any) -> Any:
    x, pad = args[0], args[1]
    if x.dim() - x.at.dim <= len(pad) // 2:
        return everywhere(func, args, kwargs)
    return Sharded(func(x.local, *args[1:], **kwargs), x.at)
