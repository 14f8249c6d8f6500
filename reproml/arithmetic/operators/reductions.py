"""Norms, variances, running sums, powers and the like, each rounded once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch._prims_common import canonicalize_dims

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import rowwise
from reproml.arithmetic.numerics.exact_sums import nearest_of_rows
from reproml.arithmetic.numerics.rounding import gamma, round_sum
from reproml.arithmetic.operators.arguments import dims_of, only_float32
from reproml.errors import NotExactError


def total(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    only_float32(dtype)
    return sum_over(x.float(), dims_of(dim), keepdim)


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    only_float32(dtype)
    count = 1
    for d in dims_of(dim) if x.dim() else ():
        count *= x.shape[d]
    count = count if dims_of(dim) else x.numel()
    return sum_over(x.float(), dims_of(dim), keepdim, divisor=count)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """A function [rows, n] -> [rows, 1], applied over the axes `dim`."""
    dims = sorted(canonicalize_dims(x.dim(), tuple(dims_of(dim)))) or list(range(x.dim()))
    dims = dims if x.dim() else []
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    length = torch.Size([x.shape[d] for d in dims]).numel()
    rows = x.permute([*kept, *dims]).reshape(torch.Size(shape).numel(), length)
    y = function(rows).reshape(shape)
    return y.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else y


def variance(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    c = 1 if correction is None else correction
    return _by_rows(lambda rows: row_variance(rows, c), x, dim, keepdim)


def deviation(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    """The square root of the exact variance."""
    c = 1 if correction is None else correction
    return _by_rows(lambda rows: row_variance(rows, c, root=True), x, dim, keepdim)


def vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The 2-norm, 1-norm, or largest absolute value."""
    only_float32(dtype)
    if ord == 2:
        return _by_rows(
            lambda r: rowwise(lambda ctx, x: ctx.sqrt(ctx.sum(x * x)), 1, r), x, dim, keepdim
        )
    if ord == 1:
        return sum_over(x.abs(), dims_of(dim), keepdim)
    if ord == float("inf"):
        return x.abs().amax(tuple(dims_of(dim)), keepdim)
    raise NotExactError(f"The norm of order {ord} has no exact definition; 1, 2 and inf have.")


def norm(
    x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


def cumsum(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    """Each element is the exact sum of those up to it, rounded once."""
    only_float32(dtype)
    if not x.numel():
        return x.clone()
    rows = torch.atleast_1d(x.double()).movedim(dim, -1)
    n = rows.shape[-1]
    flat = rows.reshape(-1, n)

    def resolve(index: Tensor) -> Sequence[float]:
        pairs = zip((index // n).tolist(), (index % n).tolist())
        return [nearest_of_rows(flat[i : i + 1, : j + 1])[0] for i, j in pairs]

    c, bound = rows.cumsum(-1), rows.abs().cumsum(-1) * gamma(n)
    return round_sum(c, bound, resolve).movedim(-1, dim).reshape(x.shape)


def sum_over(
    x: Tensor,
    dims: Sequence[int],
    keepdim: bool = False,
    divisor: int = 1,
    y: Optional[Tensor] = None,
) -> Tensor:
    """The sum of x, or of the products x * y, over `dims`, divided by `divisor`, rounded once.

    x, y: float32 of one shape; dims: empty for all. Returns float32.
    """
    if y is not None and y.shape != x.shape:
        raise RuntimeError(f"tensors of shapes {list(x.shape)} and {list(y.shape)} do not multiply")
    if kernels.library and x.is_cpu:
        total = _compiled_sum(x, dims or range(x.dim()), keepdim, divisor, y)
        if total is not None:
            return total
    dims = sorted(canonicalize_dims(x.dim(), tuple(dims))) if dims else list(range(x.dim()))
    dims = dims if x.dim() else []
    wide = x.double() if y is None else x.double() * y.double()
    count = 1
    for d in dims:
        count *= x.shape[d]
    if not dims:
        c, size = wide, wide.abs()
    else:
        c, size = wide.sum(dims, keepdim=keepdim), wide.abs().sum(dims, keepdim=keepdim)
    if divisor != 1:
        c, size = c / divisor, size / divisor

    def resolve(index: Tensor) -> list[float]:
        kept = [d for d in range(x.dim()) if d not in dims]
        rows = wide.permute([*kept, *dims]).reshape(-1, count)
        return nearest_of_rows(rows[index], scale=Fraction(1, divisor))

    return round_sum(c, size * gamma(count), resolve)


def _compiled_sum(
    x: Tensor, dims: Sequence[int], keepdim: bool, divisor: int, y: Optional[Tensor]
) -> Optional[Tensor]:
    """sum_over by csrc/reductions.c; None where that cannot settle all."""
    rank, reduced = x.dim(), 0
    for d in dims:
        if not -rank <= d < rank or reduced >> d % rank & 1:
            return None  # the plain path names the error
        reduced |= 1 << d % rank
    shape = x.shape
    kept = [
        1 if reduced >> d & 1 else m for d, m in enumerate(shape) if keepdim or not reduced >> d & 1
    ]
    if not rank or abs(divisor) > 1 << 53:
        return None
    out = x.new_empty(kept)
    strides = x.stride()
    axes = (ctypes.c_int64 * (3 * rank))(*shape, *strides, *(strides if y is None else y.stride()))
    factor = None if y is None else y.data_ptr()
    left = kernels.library.reproml_sum(
        x.data_ptr(), factor, axes, rank, reduced, divisor, out.data_ptr()
    )
    if left < 0:  # axes too scattered for one loop
        order = sorted(range(rank), key=lambda d: reduced >> d & 1)
        count = x.numel() // max(out.numel(), 1)
        rows, factors = (
            None if t is None else t.permute(order).reshape(out.numel(), count) for t in (x, y)
        )
        assert rows is not None
        total = _compiled_sum(rows, (1,), False, divisor, factors)
        return None if total is None else total.reshape(kept)
    return None if left else out


def row_variance(rows: Tensor, correction: float, root: bool = False) -> Tensor:
    """The variance of each row, divided by n - correction, or its square root, [groups, 1]."""
    n, c = rows.shape[1], Fraction(correction)
    divisor = n - c if n > c else Fraction(1)

    def formula(ctx: Any, x: Any) -> Any:
        v = _variance(ctx, x, n, n - divisor)
        return ctx.sqrt(v) if root else v

    if not n:
        return rows.new_full((len(rows), 1), torch.nan)
    result = rowwise(formula, 1, rows)
    return result if n > c else result / 0.0  # like PyTorch: infinite, or NaN of equal numbers


def _variance(ctx: Any, x: Any, n: int, correction: Fraction) -> Any:
    d = x - ctx.sum(x) / n
    return ctx.sum(d * d) / (n - correction)
