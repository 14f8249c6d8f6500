"""Rules of elementwise functions, layers, sums and products: (operator, args, kwargs) -> result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import pad

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.distributed.micro_batches import MicroBatch
from reproml.arithmetic.distributed.operands import (
    arguments_by_name,
    as_sharded,
    local_operand,
    normalize_dims,
    refuse,
    shard_like,
)
from reproml.arithmetic.distributed.partial_sums import (
    DTYPES,
    Factors,
    Products,
    matrix_product,
    offsets,
    product_height,
    sum_over,
)
from reproml.arithmetic.distributed.pending import (
    add_to_checksum,
    reduce_over_batch,
    without_exchange,
)
from reproml.arithmetic.distributed.sharded import Sharded, first_sharded, shard_from_right
from reproml.arithmetic.distributed.tensors import map_tensors
from reproml.torch_internals import compute_elementwise_output_strides

aten = torch.ops.aten


def on_gathered_batch(func: Any, args: Any, kwargs: Any) -> Any:
    """Gather the batch and compute the result on every worker."""
    schema = func._schema
    if schema.is_mutable or any(r.alias_info for r in schema.returns):
        refuse(func, "it writes to the batch or returns a view of it")
    args, kwargs = map_tensors(Sharded, Sharded.full_tensor, (args, kwargs))
    return func(*args, **kwargs)


def on_single_worker(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute a sum over the batch where there is one worker only, so that nothing is exchanged.

    The first of several results has the rows of the batch.
    """
    shard = first_sharded(args, kwargs).shard
    result = func(*map_tensors(Sharded, lambda x: x.local, args), **kwargs)
    if isinstance(result, Tensor):
        return without_exchange(shard.group, result)
    first, *sums = result
    first = None if first is None else Sharded(first, shard)
    return (first, *[None if x is None else without_exchange(shard.group, x) for x in sums])


def elementwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute element by element, from operands that broadcast together; also in place."""
    shard = shard_from_right(first_sharded(args, kwargs))
    in_place = func._schema.is_mutable
    if in_place and not isinstance(args[0], Sharded):
        return func(*map_tensors(Sharded, Sharded.full_tensor, args), **kwargs)
    result = func(
        *[local_operand(func, x, shard) for x in args],
        **{name: local_operand(func, x, shard) for name, x in kwargs.items()},
    )
    if in_place:
        return args[0]
    if not shard.hides_layout or kwargs.get("memory_format") is torch.contiguous_format:
        return as_sharded(result, shard)
    return as_sharded(result, shard, _elementwise_strides(args))


def _elementwise_strides(args: Any) -> Optional[Sequence[int]]:
    """Return the strides that PyTorch gives to the result for the global batch; None if unknown."""
    batches = [x for x in tensors(args) if isinstance(x, Sharded)]
    if len({x.shape for x in batches}) > 1:
        return None
    return _strides_of(*[(tuple(x.shape), x.stride()) for x in batches])


@lru_cache(maxsize=256)
def _strides_of(*layouts: Any) -> Sequence[int]:
    """Return the strides of an elementwise result. layouts: shape and strides of each operand."""
    with natively():
        plain = [torch.empty_strided(*layout, device="meta") for layout in layouts]
        strides: Sequence[int] = compute_elementwise_output_strides(*plain)
        return strides


def row_by_row(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute each row of dimension 0 from that row alone: layers, pooling, padding."""
    x = first_sharded(args, kwargs)
    if x.shard.dim or any(isinstance(y, Sharded) and y.shard != x.shard for y in tensors(args)):
        return on_gathered_batch(func, args, kwargs)
    if func._schema.name.endswith("_backward"):  # the gradient may come from the gathered batch
        args = [shard_like(args[0], x), *args[1:]]
    result = func(*map_tensors(Sharded, lambda y: y.local, args), **kwargs)
    return map_tensors(Tensor, lambda y: Sharded(y, x.shard), result)


def along_dims(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute along one or more dimensions, kept or reduced; gather if one of them is the batch."""
    x = first_sharded(args, kwargs)
    named = arguments_by_name(func, args, kwargs)
    if "other" in named:  # max and min of two tensors
        return elementwise(func, args, kwargs)
    dims = normalize_dims(named.get("dim", named.get("dims")), x.dim())
    other_shard = any(isinstance(y, Sharded) and y.shard != x.shard for y in tensors(args))
    if x.shard.dim in dims or other_shard:
        return on_gathered_batch(func, args, kwargs)
    shard = shard_from_right(x)

    def local(y: Any) -> Any:
        same_rank = isinstance(y, Tensor) and y.dim() == x.dim()
        return local_operand(func, y, shard) if same_rank else y

    result = func(*map(local, args), **kwargs)
    first = next(tensors([result] if isinstance(result, Tensor) else result))
    dropped = 0 if first.dim() == x.dim() else sum(d < x.shard.dim for d in dims)
    shard = x.shard.at_dim(x.shard.dim - dropped)
    return map_tensors(Tensor, lambda y: Sharded(y, shard), result)


def sum_or_mean(func: Any, args: Any, kwargs: Any) -> Any:
    named = arguments_by_name(func, args, kwargs)
    x, dtype = named["self"], named.get("dtype")
    dims = normalize_dims(named.get("dim"), x.dim())
    if x.shard.dim not in dims:
        return along_dims(func, args, kwargs)
    group = x.shard.group
    if not x.is_floating_point() and dtype in (None, torch.int64):  # exact in integers
        if isinstance(group, MicroBatch):
            return on_gathered_batch(func, args, kwargs)
        with natively():
            local = func(*map_tensors(Sharded, lambda y: y.local, args), **kwargs)
            return group.all_gather(local).sum(0)
    if x.dtype not in DTYPES or dtype not in (None, torch.float32, x.dtype):
        return on_gathered_batch(func, args, kwargs)
    if group.size == 1:
        return on_single_worker(func, args, kwargs)
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    count = math.prod(x.shape[d] for d in dims)
    with natively():
        divisor = count if "mean" in func._schema.name else 1
        products = sum_over(x.local, dims, count, divisor, dtype or x.dtype)
    if named.get("keepdim", False):
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    return reduce_over_batch(group, products, shape)


def matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute mm, bmm, addmm and baddbmm, the last two with a first operand that is added."""
    *bias, a, b = args
    shard_a, shard_b = (shard_from_right(x) if isinstance(x, Sharded) else None for x in (a, b))
    dims = shard_a.dim if shard_a else None, shard_b.dim if shard_b else None
    if dims == (-1, -2) and shard_a and shard_b and a.dim() == 2 and not bias:
        if shard_a.at_dim(-2) == shard_b and a.dtype is b.dtype and a.dtype in DTYPES:
            # The product sums over the batch.
            if shard_a.group.size == 1:
                return on_single_worker(func, args, kwargs)
            with natively():
                products = matrix_product(a.local.t(), b.local, a.shape[1])
            return reduce_over_batch(shard_a.group, products, (a.shape[0], b.shape[1]))
    elif dims in ((-2, None), (None, -1), (-3, -3), (-3, None), (None, -3)):
        shard = shard_a or shard_b
        assert shard is not None
        if -3 in dims:
            a, b = local_operand(func, a, shard), local_operand(func, b, shard)
        else:
            a, b = (x.local if isinstance(x, Sharded) else x for x in (a, b))
        bias = [local_operand(func, x, shard) for x in bias]
        return as_sharded(func(*bias, a, b, **kwargs), shard)
    return on_gathered_batch(func, args, kwargs)


def embedding(func: Any, args: Any, kwargs: Any) -> Any:
    weight, indices, *rest = args
    if isinstance(weight, Sharded):
        return on_gathered_batch(func, args, kwargs)
    return Sharded(func(weight, indices.local, *rest, **kwargs), indices.shard)


def convolution_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask = args
    if not (isinstance(g, Sharded) and isinstance(x, Sharded)) or isinstance(w, Sharded):
        return on_gathered_batch(func, args, kwargs)
    if g.shard != x.shard or x.shard.dim or x.dtype not in DTYPES:
        return on_gathered_batch(func, args, kwargs)
    if x.shard.group.size == 1:
        return on_single_worker(func, args, kwargs)
    options = (sizes, stride, padding, dilation, transposed, output_padding, groups)
    grad_x = grad_w = grad_b = None
    if mask[0]:
        local = func(g.local, x.local, w, *options, [True, False, False])[0]
        grad_x = Sharded(local, x.shard)
    if mask[1]:
        image, output = (g, x) if transposed else (x, g)
        with natively():
            products = _weight_products(image, output, w, stride, padding, dilation, groups)
        grad_w = reduce_over_batch(x.shard.group, products, w.shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return grad_x, grad_w, grad_b


def _weight_products(
    image: Sharded,
    output: Sharded,
    w: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Products:
    """Return the sums of the weight's gradient, [o, c / groups * kh * kw].

    The kernel slides over `image`. A term is a place of the kernel on one image; factors are found by their
    offsets in memory, so that no patches are copied.
    """
    x, g = image.local.float(), output.local.float()
    if w.dim() == 3:  # one dimension is two with a height of 1
        x, g, w = (t.unsqueeze(2) for t in (x, g, w))
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    x, g = pad(x, (padding[1], padding[1], padding[0], padding[0])).contiguous(), g.contiguous()
    n, outputs, *size = g.shape
    places = math.prod(size)
    rows = offsets((outputs, places)).to(x.device)
    g_terms = offsets((n, g.stride(0)), (places, 1)).to(x.device)
    x_terms = offsets(
        (n, x.stride(0)), (size[0], stride[0] * x.stride(2)), (size[1], stride[1])
    ).to(x.device)
    columns = offsets(
        (x.shape[1], x.stride(1)),
        (w.shape[2], dilation[0] * x.stride(2)),
        (w.shape[3], dilation[1]),
    ).to(x.device)
    o, length = outputs // groups, len(columns) // groups

    def at(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        return rows[i], columns[i // o * length + j]

    factors = Factors(g.view(-1), x.view(-1), g_terms, x_terms, at)
    blocks = list(zip(rows.split(o), columns.split(length)))
    height = product_height(places * image.shard.batch)
    return Products(factors, blocks, height, dtype=w.dtype)


def new_tensor(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute new_zeros and similar operators: a plain tensor, the same on every worker."""
    return func(args[0].local, *args[1:], **kwargs)


def random_numbers(func: Any, args: Any, kwargs: Any) -> Any:
    """Draw the random numbers of the global batch on every worker; keep this worker's rows."""
    x, *rest = args
    if any(isinstance(y, Sharded) for y in tensors(rest)):
        refuse(func, "its parameters depend on the batch")
    if isinstance(x.shard.group, MicroBatch):
        x.shard.group.before_draw(kwargs.get("generator"))
    with natively():
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if kwargs.get("generator") is None and x.is_cpu and x.shard.group.size > 1:
            add_to_checksum(x.shard.group, torch.get_rng_state().numpy().tobytes())
    result = func(like, *rest, **kwargs)
    with natively():
        local = x.shard.local_rows(result, x.shard.dim)
        if not func._schema.is_mutable:
            return Sharded(local.contiguous(), x.shard)
        x.local.copy_(local)
    return x
