"""Sums, means and variances over any axes, and running sums, each rounded once.

`reduce_sum` is the sum on which the other families build as well. It takes the sums to be correct if they
pass the rounding test, with the bound |computed - exact| <= gamma_n * sum |x|, which holds for any order
of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and otherwise adds
fractions. An exact zero is +0. Operators take float32 tensors, a `dim` argument as PyTorch's (one axis,
several, or None for all), and return float32; a `dtype` other than float32 raises NotExactError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from typing import Any, Callable, Optional

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels, pair_arrays
from reproml.arithmetic.compiler.evaluate import rowwise, rowwise_by_balls
from reproml.arithmetic.compiler.pairs import rows_by_pairs
from reproml.arithmetic.numerics.exact_sums import nearest_of_rows
from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.arithmetic.numerics.rationals import Rationals
from reproml.arithmetic.numerics.rounding import gamma, nearest, round_sum
from reproml.arithmetic.operators.arguments import dims_tuple, require_float32
from reproml.errors import NotExactError
from reproml.torch_internals import canonicalize_dims

# ---- sums --------------------------------------------------------------------------------------------


def sum_dims(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Compute aten.sum."""
    require_float32(dtype)
    if target() is BINARY64:
        return _sums_in_binary64(x, dims_tuple(dim), keepdim)
    return reduce_sum(x.float(), dims_tuple(dim), keepdim)


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Compute aten.mean: the exact sum divided by the number of elements."""
    dims = dims_tuple(dim)
    count = 1
    for d in dims if x.dim() else ():
        count *= x.shape[d]
    divisor = count if dims else x.numel()
    require_float32(dtype)
    if target() is BINARY64:
        return _sums_in_binary64(x, dims, keepdim, divisor)
    return reduce_sum(x.float(), dims, keepdim, divisor=divisor)


def _sums_in_binary64(
    x: Tensor, dims: Sequence[int], keepdim: bool, divisor: int = 1, y: Optional[Tensor] = None
) -> Tensor:
    """Compute reduce_sum rounded to binary64: in pairs, then by exact integers."""

    unsigned = x.dtype is torch.uint64

    def of_rows(rows: Tensor, factors: Optional[Tensor] = None) -> Tensor:
        if not rows.is_floating_point():  # binary64 may not hold them
            high = rows >> 32 & 0xFFFFFFFF if unsigned else rows >> 32
            rows = torch.cat([high.double() * 2.0**32, (rows & 0xFFFFFFFF).double()], 1)
        if not divisor:
            return rows.new_full((len(rows),), torch.nan)
        ctx = pair_arrays.PairArrays()
        total = pair_arrays.PairArray(ctx, *pair_arrays.sums(rows, factors))
        total = total / divisor if divisor != 1 and kernels.library and x.is_cpu else total
        value, failed = pair_arrays.round_pairs(total.s, total.t, total.rad)
        value = value + 0.0
        if failed.any():
            few = rows[failed], None if factors is None else factors[failed]
            value[failed] = _exact_sums(*few, divisor).to(value.device)
        return value

    if y is not None:
        return apply_to_rows(of_rows, x.double(), dims, keepdim, y.double())
    if unsigned:
        x = x.view(torch.int64)
    return apply_to_rows(of_rows, x.double() if x.is_floating_point() else x.long(), dims, keepdim)


def _exact_sums(rows: Tensor, factors: Optional[Tensor], divisor: int = 1) -> Tensor:
    """Return the exact sum of each row, or of its products, divided and rounded once to binary64."""
    values = []
    for i, row in enumerate(rows):
        other = None if factors is None else factors[i]
        finite = bool(row.isfinite().all()) and (other is None or bool(other.isfinite().all()))
        if not finite:  # the sum of these signs has the same limit, and cannot overflow
            signs = [torch.where(t.isfinite(), t.sign(), t) for t in (row, other) if t is not None]
            values.append(float(torch.stack(signs).prod(0).sum()) / divisor)
            continue
        terms = Rationals.of_floats(row.cpu().numpy())
        if other is not None:
            terms = terms * Rationals.of_floats(other.cpu().numpy())
        values.append(nearest(terms.total() / divisor))
    return torch.tensor(values, dtype=torch.float64)


def nansum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Compute aten.nansum: the sum of all elements that are not NaN."""
    numbers = x.nan_to_num(0.0, torch.inf, -torch.inf)  # a tenth of the time of `torch.where`
    return sum_dims(numbers, dim, keepdim, dtype=dtype)


def trace(x: Tensor) -> Tensor:
    """Return the sum of the diagonal."""
    return reduce_sum(x.diagonal(), ())


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of two vectors."""
    return reduce_sum(a, (), y=b)


def cumsum(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    """Return, for each element, the sum of the elements up to it along `dim`, rounded once.

    An integer dtype converts the elements first, as in PyTorch.
    """
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        return torch.cumsum(x.to(dtype), dim)
    require_float32(dtype)
    if not x.numel():
        return x.clone()
    rows = torch.atleast_1d(x).movedim(dim, -1).contiguous()
    n = rows.shape[-1]
    if target() is BINARY64:
        value = _running_sums_in_binary64(rows.double().reshape(-1, n))
        return value.reshape(rows.shape).movedim(-1, dim).reshape(x.shape)

    def by_fractions(rows: Tensor) -> Tensor:
        wide = rows.double()

        def resolve(index: Tensor) -> Sequence[float]:
            values: list[float] = []
            failed, counts = torch.unique_consecutive(index // n, return_counts=True)
            few = wide.reshape(-1, n)[failed]
            # a sum that is infinite does not fail
            for row, at in zip(few, (index % n).split(counts.tolist())):
                values += _exact_running_sums(row, at).tolist()
            return values

        return round_sum(wide.cumsum(-1), wide.abs().cumsum(-1) * gamma(n), resolve)

    result = rows_by_pairs("running_sums", by_fractions, rows)
    return result.movedim(-1, dim).reshape(x.shape)


def _running_sums_in_binary64(rows: Tensor) -> Tensor:
    """Compute `cumsum` of rows, rounded to binary64: in pairs, then by exact integers."""
    value, failed = pair_arrays.round_pairs(*pair_arrays.sums(rows, running=True))
    limits = torch.where(rows.isfinite(), 0.0, rows).cumsum(-1)
    value = torch.where(limits.isfinite(), value + 0.0, limits)
    failed &= limits.isfinite()
    for i in failed.any(1).nonzero().squeeze(1).tolist():
        exact = _exact_running_sums(rows[i], failed[i])
        value[i, failed[i]] = torch.from_numpy(exact).to(value.device)
    return value


def _exact_running_sums(row: Tensor, at: Tensor) -> Any:
    """Return the sums up to some elements of a row, rounded once; no number up to these may be infinite."""
    terms = Rationals.of_floats(torch.where(row.isfinite(), row, 0.0).cpu().numpy())
    return Rationals(np.cumsum(terms.n), 1, terms.exponent)[at.cpu().numpy()].nearest()


def reduce_sum(
    x: Tensor,
    dims: Sequence[int],
    keepdim: bool = False,
    divisor: int = 1,
    y: Optional[Tensor] = None,
) -> Tensor:
    """Return the sum of x, or of the products x * y, over `dims`, divided by `divisor`, rounded once.

    x, y: float32 of one shape; dims: empty for all axes. Returns float32. Raises NotExactError for another
    dtype, RuntimeError for operands of different shapes, and PyTorch's error for an axis out of range or
    named twice.
    """
    for t in (x,) if y is None else (x, y):
        if t.dtype is not torch.float32 and t.dtype is not target().container:
            raise NotExactError(f"it is defined for float32, not for {t.dtype}")
    if y is not None and y.shape != x.shape:
        raise RuntimeError(
            f"operands of shapes {list(x.shape)} and {list(y.shape)} cannot be multiplied elementwise"
        )
    if target() is BINARY64:
        return _sums_in_binary64(x, dims, keepdim, divisor, y)
    if kernels.loops() and x.is_cpu and (y is None or y.is_cpu):
        total = _compiled_sum(x, dims or range(x.dim()), keepdim, divisor, y)
        if total is not None:
            return total
    dims = sorted(canonicalize_dims(x.dim(), tuple(dims))) if dims else list(range(x.dim()))
    dims = dims if x.dim() else []
    terms = x.double() if y is None else x.double() * y.double()
    count = 1
    for d in dims:
        count *= x.shape[d]
    if not dims:
        mid, magnitude = terms, terms.abs()
    else:
        mid, magnitude = terms.sum(dims, keepdim=keepdim), terms.abs().sum(dims, keepdim=keepdim)
    if divisor != 1:
        mid, magnitude = mid / divisor, magnitude / divisor

    def resolve(index: Tensor) -> list[float]:
        kept = [d for d in range(x.dim()) if d not in dims]
        rows = terms.permute([*kept, *dims]).reshape(-1, count)
        return nearest_of_rows(rows[index], scale=Fraction(1, divisor))

    return round_sum(mid, magnitude * gamma(count), resolve)


def _compiled_sum(
    x: Tensor, dims: Sequence[int], keepdim: bool, divisor: int, y: Optional[Tensor]
) -> Optional[Tensor]:
    """Compute reduce_sum by csrc/reductions.c; None where it does not apply or a sum fails its tests."""
    rank, reduced = x.dim(), 0  # reduced: bit d is set if axis d is summed over
    for d in dims:
        if not -rank <= d < rank or reduced >> d % rank & 1:
            return None  # the reference path raises PyTorch's error
        reduced |= 1 << d % rank
    if not rank or abs(divisor) > 1 << 53:
        return None
    shape = x.shape
    kept = [
        1 if reduced >> d & 1 else m for d, m in enumerate(shape) if keepdim or not reduced >> d & 1
    ]
    out = x.new_empty(kept)
    strides = x.stride()
    axes = (ctypes.c_int64 * (3 * rank))(*shape, *strides, *(strides if y is None else y.stride()))
    factor = None if y is None else y.data_ptr()
    left = kernels.loops().reproml_sum(
        x.data_ptr(), factor, axes, rank, reduced, divisor, out.data_ptr()
    )
    if left < 0:  # too many axes that cannot be merged for the kernel's loops
        order = sorted(range(rank), key=lambda d: reduced >> d & 1)
        matrix = (out.numel(), x.numel() // max(out.numel(), 1))
        rows = x.permute(order).reshape(matrix)
        factors = None if y is None else y.permute(order).reshape(matrix)
        total = _compiled_sum(rows, (1,), False, divisor, factors)
        return None if total is None else total.reshape(kept)
    return None if left else out


# ---- variances ---------------------------------------------------------------------------------------


def variance(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    """Compute aten.var: the sum of squared distances from the exact mean, divided by n - correction."""
    c = 1 if correction is None else correction
    return apply_to_rows(lambda rows: row_variance(rows, c), x, dim, keepdim)


def standard_deviation(
    x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> Tensor:
    """Compute aten.std: the square root of the exact variance."""
    c = 1 if correction is None else correction
    return apply_to_rows(lambda rows: row_variance(rows, c, root=True), x, dim, keepdim)


def row_variance(rows: Tensor, correction: float, root: bool = False) -> Tensor:
    """Return the variance of each row, or its square root: float32 [rows, n] -> [rows, 1]."""
    n, c = rows.shape[1], Fraction(correction)
    divisor = n - c if n > c else Fraction(1)

    def formula(ctx: Any, x: Any) -> Any:
        v = variance_formula(ctx, x, n, n - divisor)
        return ctx.sqrt(v) if root else v

    def second_test(rows: Tensor) -> Tensor:
        by_balls = partial(rowwise_by_balls, formula, -1)
        if float(divisor) != divisor:
            return by_balls(rows)
        kind = "deviation" if root else "variance"
        return rows_by_pairs(kind, by_balls, rows, divisor=float(divisor))

    if not n:
        return rows.new_full((len(rows), 1), torch.nan)
    result = rowwise(formula, 1, rows, reference=second_test)
    return result if n > c else result / 0.0  # as in PyTorch: infinity, or NaN for equal numbers


def variance_formula(ctx: Any, x: Any, n: int, correction: Fraction) -> Any:
    """Return the variance of a row of n elements, divided by n - correction."""
    d = x - ctx.sum(x) / n
    return ctx.sum(d * d) / (n - correction)


def standard_deviation_and_mean(
    x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute aten.std_mean."""
    y = standard_deviation(x, dim, correction=correction, keepdim=keepdim)
    return y, mean(x, dim, keepdim)


def variance_and_mean(
    x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute aten.var_mean."""
    return variance(x, dim, correction=correction, keepdim=keepdim), mean(x, dim, keepdim)


def apply_to_rows(
    function: Callable[..., Tensor], x: Tensor, dim: Any, keepdim: bool, *others: Tensor
) -> Tensor:
    """Apply a function [rows, n] -> [rows, 1] of x, and of others of its shape, over the axes `dim`."""
    dims = sorted(canonicalize_dims(x.dim(), tuple(dims_tuple(dim)))) or list(range(x.dim()))
    dims = dims if x.dim() else []
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    length = torch.Size([x.shape[d] for d in dims]).numel()
    matrix = torch.Size(shape).numel(), length
    y = function(*[t.permute([*kept, *dims]).reshape(matrix) for t in (x, *others)]).reshape(shape)
    return y.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else y
