"""Rules of elementwise functions, layers, sums and products: (operator, positional, keywords) -> result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.distributed.operands import (
    by_name,
    dimensions,
    first_batch,
    from_the_right,
    own_part,
    refuse,
    rows_of,
    with_batch,
)
from reproml.arithmetic.distributed.partial_sums import (
    Partial,
    in_units,
    marked,
    plain_sum,
    product,
)
from reproml.arithmetic.distributed.pending import exchanged, note, raw
from reproml.arithmetic.distributed.sharded import Sharded, gathered
from reproml.arithmetic.operators.convolution import weight_gradient_factors

aten = torch.ops.aten


def everywhere(func: Any, args: Any, kwargs: Any) -> Any:
    """From the gathered batch, on every worker."""
    schema = func._schema
    if schema.is_mutable or any(r.alias_info for r in schema.returns):
        refuse(func, "it writes or looks into a tensor of the batch")
    return func(*tree_map_only(Sharded, gathered, args), **tree_map_only(Sharded, gathered, kwargs))


def pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise, of operands that broadcast together; also in place."""
    at = from_the_right(first_batch(args, kwargs))
    in_place = func._schema.is_mutable
    if in_place and not isinstance(args[0], Sharded):
        return func(*tree_map_only(Sharded, gathered, args), **kwargs)
    result = func(
        *[own_part(func, x, at) for x in args],
        **{k: own_part(func, x, at) for k, x in kwargs.items()},
    )
    if in_place:
        return args[0]
    told = not at.few or kwargs.get("memory_format") is torch.contiguous_format
    return with_batch(result, at, None if told else _pointwise_strides(args))


def _pointwise_strides(args: Any) -> Optional[Sequence[int]]:
    """Those that PyTorch gives to the whole result, where the part does not tell them."""
    batches = [x for x in tensors(args) if isinstance(x, Sharded)]
    if len({x.shape for x in batches}) > 1:
        return None
    with raw():
        plain = [torch.empty_strided(x.shape, x.stride(), device="meta") for x in batches]
        return compute_elementwise_output_strides(*plain)


def each_row(func: Any, args: Any, kwargs: Any) -> Any:
    """Each row of the first dimension by itself: layers, pooling, padding."""
    x = first_batch(args, kwargs)
    at = x.at
    if at.dim or any(isinstance(y, Sharded) and y.at != at for y in tensors(args)):
        return everywhere(func, args, kwargs)
    if func._schema.name.endswith("_backward"):  # of what was computed from the gathered batch
        args = [rows_of(args[0], x), *args[1:]]
    result = func(*tree_map_only(Sharded, lambda y: y.local, args), **kwargs)
    return tree_map_only(Tensor, lambda y: Sharded(y, at), result)


def along(func: Any, args: Any, kwargs: Any) -> Any:
    """Over one or more dimensions, kept or not: over the batch itself from the gathered batch."""
    x = first_batch(args, kwargs)
    named = by_name(func, args, kwargs)
    if "other" in named:  # max and min of two tensors
        return pointwise(func, args, kwargs)
    dims = dimensions(named.get("dim", named.get("dims")), x.dim())
    if x.at.dim in dims or any(isinstance(y, Sharded) and y.at != x.at for y in tensors(args)):
        return everywhere(func, args, kwargs)
    at = from_the_right(x)
    result = func(*[own_part(func, y, at) if _like(y, x) else y for y in args], **kwargs)
    first = next(tensors([result] if isinstance(result, Tensor) else result))
    gone = 0 if first.dim() == x.dim() else sum(d < x.at.dim for d in dims)
    return tree_map_only(Tensor, lambda y: Sharded(y, x.at.moved(x.at.dim - gone)), result)


def _like(y: Any, x: Tensor) -> bool:
    return isinstance(y, Tensor) and y.dim() == x.dim()


def total(func: Any, args: Any, kwargs: Any) -> Any:
    """sum, mean."""
    named = by_name(func, args, kwargs)
    x = named["self"]
    dims = dimensions(named.get("dim"), x.dim())
    if x.at.dim not in dims:
        return along(func, args, kwargs)
    group, keep = x.at.group, named.get("keepdim", False)
    if not x.is_floating_point() and named.get("dtype") not in (None, torch.int64):
        return everywhere(func, args, kwargs)
    if not x.is_floating_point():
        with raw():
            local = func(*tree_map_only(Sharded, lambda y: y.local, args), **kwargs)
            return group.to_all(local).sum(0)
    if x.dtype is not torch.float32 or named.get("dtype") not in (None, torch.float32):
        return everywhere(func, args, kwargs)
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    m = math.prod(shape)
    count = math.prod(x.shape[d] for d in dims)
    with raw():
        rows = x.local.permute([*kept, *dims]).reshape(m, x.local.numel() // max(m, 1))
        partial = plain_sum(rows, count, count if "mean" in func._schema.name else 1)
    if keep:
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    return exchanged(group, partial, shape)


def matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """mm, bmm, and with a first operand that is added, addmm and baddbmm."""
    *bias, a, b = args
    of_a, of_b = (from_the_right(x) if isinstance(x, Sharded) else None for x in (a, b))
    rows = of_a.dim if of_a else None, of_b.dim if of_b else None
    if rows == (-1, -2) and of_a and of_b and a.dim() == 2 and not bias:
        if of_a.moved(-2) == of_b:
            with raw():
                partial = product(a.local.t(), b.local, a.shape[1])
            return exchanged(of_a.group, partial, (a.shape[0], b.shape[1]))
    elif rows in ((-2, None), (None, -1), (-3, -3), (-3, None), (None, -3)):
        at = of_a or of_b
        assert at is not None
        if rows[0] == -3 or rows[1] == -3:
            a, b = own_part(func, a, at), own_part(func, b, at)
        else:
            a, b = (x.local if isinstance(x, Sharded) else x for x in (a, b))
        return with_batch(func(*[own_part(func, x, at) for x in bias], a, b, **kwargs), at)
    return everywhere(func, args, kwargs)


def convolution_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask = args
    if not (isinstance(g, Sharded) and isinstance(x, Sharded)) or isinstance(w, Sharded):
        return everywhere(func, args, kwargs)
    if g.at != x.at or x.at.dim:
        return everywhere(func, args, kwargs)
    at, rest = x.at, (sizes, stride, padding, dilation, transposed, output_padding, groups)
    grad_x = grad_w = grad_b = None
    if mask[0]:
        grad_x = Sharded(func(g.local, x.local, w, *rest, [True, False, False])[0], at)
    if mask[1]:
        slid, still = (g, x) if transposed else (x, g)
        with raw():
            partial = _weight_partial(slid, still, w, stride, padding, dilation, groups)
        grad_w = exchanged(at.group, partial, w.shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return grad_x, grad_w, grad_b


def _weight_partial(
    slid: Sharded, still: Sharded, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Partial:
    """The weight's gradient, [o, c / groups * kh * kw], image by image, so that few additions follow
    each other: the terms of a place, then of an image."""
    operands = [slid.local, still.local, w]
    if w.dim() == 3:  # one dimension is two with a height of 1
        operands = [t.unsqueeze(2) for t in operands]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    given = (*operands, stride, padding, dilation, groups)
    rows, columns = weight_gradient_factors(
        *given
    )  # float32 [n, groups, o, places], [n, groups, places, l]
    n, _, o, places = rows.shape
    length = columns.shape[3]
    wide_rows, wide_columns = rows.double(), columns.double()
    sums = marked(
        (wide_rows @ wide_columns).sum(0),
        lambda: ((rows != 0).float() @ (columns != 0).float()).sum(0),
    ).reshape(groups * o, length)
    norms = torch.linalg.vector_norm(wide_rows, dim=(0, 3))  # [groups, o]
    others = torch.linalg.vector_norm(wide_columns, dim=(0, 2)).amax(1, keepdim=True)

    def exact(i: Tensor, j: Tensor) -> list[int]:
        def terms(at: slice) -> Tensor:
            group, row = i[at] // o, i[at] % o
            left, right = wide_rows[:, group, row], wide_columns[:, group, :, j[at]]
            return (left.transpose(0, 1) * right).reshape(len(row), n * places)

        return in_units(terms, n * places, len(i))

    return Partial(sums, (norms * others).reshape(-1), places + slid.at.batch, exact)


def new(func: Any, args: Any, kwargs: Any) -> Any:
    """new_zeros and its kin: a tensor that every worker has."""
    return func(args[0].local, *args[1:], **kwargs)


def drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """Random numbers: every worker draws those of the whole batch, and keeps its own."""
    x, *rest = args
    if any(isinstance(y, Sharded) for y in tensors(rest)):
        refuse(func, "its parameters are part of the batch")
    with raw():
        whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if kwargs.get("generator") is None and x.is_cpu and x.at.group.size > 1:
            note(torch.get_rng_state().numpy().tobytes())
    result = func(whole, *rest, **kwargs)
    with raw():
        own = x.at.of(result, x.at.dim)
        if not func._schema.is_mutable:
            return Sharded(own.contiguous(), x.at)
        x.local.copy_(own)
    return x
