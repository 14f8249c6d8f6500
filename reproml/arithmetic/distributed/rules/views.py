"""Rules of views, slices and concatenation: they move the batch dimension, and refuse to split its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.distributed.operands import (
    arguments_by_name,
    local_operand,
    normalize_dims,
    refuse,
)
from reproml.arithmetic.distributed.rules.compute import on_gathered_batch
from reproml.arithmetic.distributed.sharded import (
    RoundRobinShard,
    Sharded,
    first_sharded,
    shard_from_right,
)
from reproml.arithmetic.distributed.tensors import map_tensors
from reproml.torch_internals import DisableTorchDispatch

aten = torch.ops.aten


def _view_strides(func: Any, args: Any, kwargs: Any) -> Optional[Sequence[int]]:
    """Return the strides of a view of the batch args[0]; None if the local tensor determines them."""
    x = args[0]
    if not x.shard.hides_layout:
        return None
    with natively():
        batch = torch.empty_strided(x.shape, x.stride(), device="meta")
        result = func(batch, *args[1:], **kwargs)
    return (result if isinstance(result, Tensor) else result[0]).stride()


def view(func: Any, args: Any, kwargs: Any) -> Any:
    """Reshape without a copy: the batch moves to where row-major order puts it in the new shape."""
    x, shard = args[0], args[0].shard
    shape = list(args[1])
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = x.numel() // known if known else 0
    moved = _shard_in_shape(shard, math.prod(x.shape[shard.dim + 1 :]) * shard.after, shape)
    if moved is None:
        refuse(func, f"{list(x.shape)} as {shape} splits rows of the batch")
    strides = _view_strides(aten.view.default, [x, shape], {})
    shape[moved.dim] = moved.local_size
    return Sharded(x.local.view(shape), moved, strides)


def _shard_in_shape(
    shard: RoundRobinShard, inner: int, shape: Sequence[int]
) -> Optional[RoundRobinShard]:
    """Return the shard of a tensor after a reshape, or None if this would split rows of the batch.

    inner: the distance between consecutive rows of the batch, in elements of the tensor.
    """
    for dim in [shard.dim, *range(len(shape))]:
        if dim >= len(shape):
            continue
        after, rest = divmod(inner, math.prod(shape[dim + 1 :]) or 1)
        before, over = divmod(shape[dim], shard.batch * after) if after else (0, 1)
        if before and not rest and not over:
            return shard._replace(dim=dim, before=before, after=after)
    return None


def t(func: Any, args: Any, kwargs: Any) -> Any:
    return _permute(func, args, range(args[0].dim())[::-1])


def transpose(func: Any, args: Any, kwargs: Any) -> Any:
    return _permute(func, args, _swap(args[0].dim(), *args[1:]))


def permute(func: Any, args: Any, kwargs: Any) -> Any:
    return _permute(func, args, args[1])


def _permute(func: Any, args: Any, order: Sequence[int]) -> Sharded:
    """Permute dimensions. order: the old dimension of each new one."""
    x = args[0]
    dims = [d % x.dim() for d in order]
    strides = [x.stride(d) for d in dims]
    return Sharded(func(x.local, *args[1:]), x.shard.at_dim(dims.index(x.shard.dim)), strides)


def _swap(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def transpose_(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], [d % args[0].dim() for d in args[1:]]
    with natively(), DisableTorchDispatch():
        func(x, *dims)  # changes the shape and strides of the wrapper
    x.local = x.local.transpose(*dims)
    x.shard = x.shard.at_dim(_swap(x.dim(), *dims)[x.shard.dim])
    return x


def unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[1] % (args[0].dim() + 1)
    strides = _view_strides(func, args, kwargs)
    return Sharded(func(x.local, dim), x.shard.at_dim(x.shard.dim + (dim <= x.shard.dim)), strides)


def squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    dims = normalize_dims(args[1] if len(args) > 1 else None, x.dim())
    removed = [d for d in dims if x.shape[d] == 1]
    if x.shard.dim in removed:
        refuse(func, "it removes the dimension of the batch")
    shard = x.shard.at_dim(x.shard.dim - sum(d < x.shard.dim for d in removed))
    return Sharded(aten.squeeze.dims(x.local, removed), shard, _view_strides(func, args, kwargs))


def expand(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], list(args[1])
    shard = x.shard.at_dim(x.shard.dim + len(shape) - x.dim())
    strides = _view_strides(func, args, kwargs)
    shape[shard.dim] = shard.local_size
    return Sharded(func(x.local, shape, **kwargs), shard, strides)


def slice_(func: Any, args: Any, kwargs: Any) -> Any:
    named = arguments_by_name(func, args, kwargs)
    x, dim = named["self"], named["dim"] % named["self"].dim()
    strides = _view_strides(func, args, kwargs)
    if dim != x.shard.dim:
        return Sharded(func(x.local, *args[1:], **kwargs), x.shard, strides)
    start, end, step = named["start"], named["end"], named["step"]
    if start not in (None, 0) or step != 1 or (end is not None and end < x.shape[dim]):
        refuse(func, "it selects some rows of the batch")
    return Sharded(aten.alias(x.local), x.shard, strides)


def select_or_split(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute select, split and unbind along a dimension other than the batch."""
    named = arguments_by_name(func, args, kwargs)
    x, dim = named["self"], named["dim"] % named["self"].dim()
    if dim == x.shard.dim:
        refuse(func, "it selects some rows of the batch")
    result = func(x.local, *args[1:], **kwargs)
    first = result if isinstance(result, Tensor) else result[0]
    shard = x.shard.at_dim(x.shard.dim - (first.dim() < x.dim() and dim < x.shard.dim))
    strides = _view_strides(func, args, kwargs)  # those of the first, and so of all
    return map_tensors(Tensor, lambda y: Sharded(y, shard, strides), result)


def select_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute select_backward and slice_backward: zeros, but for the slice."""
    g, shape, dim, *rest = args
    shape = list(shape)
    dim %= len(shape)
    shard = g.shard.at_dim(g.shard.dim + (g.dim() < len(shape) and dim <= g.shard.dim))
    if dim == shard.dim:
        if g.dim() == len(shape) and g.shape[dim] == shape[dim]:  # a slice of all rows, x[:, ...]
            return Sharded(aten.alias(g.local), shard)
        return on_gathered_batch(func, args, kwargs)
    shape[shard.dim] = shard.local_size
    return Sharded(func(g.local, shape, dim, *rest, **kwargs), shard)


def cat_or_stack(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute cat and stack along a dimension other than the batch."""
    named = arguments_by_name(func, args, kwargs)
    x = first_sharded(args, kwargs)
    stacks = "stack" in func._schema.name
    dim = named["dim"] % (x.dim() + stacks)
    if dim == x.shard.dim and not stacks:
        if not all(isinstance(y, Sharded) for y in named["tensors"]):
            refuse(
                func,
                "it concatenates rows of the batch with rows that may belong to this worker alone",
            )
        return on_gathered_batch(func, args, kwargs)
    if any(y.dim() != x.dim() for y in named["tensors"]):
        return on_gathered_batch(func, args, kwargs)
    shard = shard_from_right(x)
    result = func([local_operand(func, y, shard) for y in named["tensors"]], dim)
    return Sharded(result, x.shard.at_dim(x.shard.dim + (stacks and dim <= x.shard.dim)))


def constant_pad(func: Any, args: Any, kwargs: Any) -> Any:
    x, pad = args[0], args[1]
    if x.dim() - x.shard.dim <= len(pad) // 2:
        return on_gathered_batch(func, args, kwargs)
    return Sharded(func(x.local, *args[1:], **kwargs), x.shard)
