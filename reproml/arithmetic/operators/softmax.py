"""Softmax, log-softmax, logsumexp and their gradients: formulas over a row, each element rounded once.

Elements that are -inf have the weight exp(-inf) = 0, and a formula cannot compute with them. Therefore each
operator but softmax_backward has two forms, which define the same numbers:

- `_compiled_*(ctx, ...)` is a formula for the compiled path, where the operands are binary64 numbers. It
  selects the elements that are -inf itself (`ctx.choose`).
- `_reference_*(...)` is the reference path on tensors [..., n]. It replaces each -inf by a finite number
  and passes a mask of zeros and ones to its formula, because that formula may also be evaluated on
  fractions and on mpmath's numbers, for elements that fail the rounding test.

The largest element of a row is handled apart from the others: the sum of exp(x - max) over the others is
the argument of log1p, so that nothing cancels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise, rowwise_by_balls
from reproml.arithmetic.compiler.pairs import rows_by_pairs
from reproml.arithmetic.numerics.exact_sums import distilled
from reproml.arithmetic.numerics.formats import BINARY64, operate, target
from reproml.arithmetic.operators.arguments import dims_tuple, require_shape
from reproml.arithmetic.operators.reductions import apply_to_rows

# Elements of which logcumsumexp takes the sums at once.
_TOGETHER = 1 << 22

# ---- softmax -----------------------------------------------------------------------------------------


def softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Compute aten._softmax: exp(x) / sum(exp(x)) along `dim`. Raises IndexError for an invalid `dim`."""
    _check_dim(x, dim)
    if not x.numel():
        return x.clone()
    second_test = partial(rows_by_pairs, "softmax", _reference_softmax)
    return rowwise(_compiled_softmax, dim, x, reference=second_test, fast="softmax")


def _compiled_softmax(ctx: Any, x: Any) -> Any:
    finite, largest, is_minus_inf = _compiled_without_minus_inf(ctx, x)
    difference = ctx.difference(finite, largest)  # mostly exact
    e = ctx.choose(is_minus_inf, ctx.constant(0), ctx.exp(difference))
    return e / ctx.sum(e)


def _reference_softmax(x: Tensor) -> Tensor:
    def formula(ctx: Any, x: Any, weight: Any) -> Any:
        e = weight * ctx.exp(x - ctx.max(x))
        return e / ctx.sum(e)

    # In float64 exp(-760) < 2^-1096 rounds to 0, and counts as 0 beside 1 (compiler/evaluate.py).
    if target() is BINARY64:
        x = torch.where(x < x.amax(-1, keepdim=True) - 760, -torch.inf, x)
    return rowwise(formula, -1, *_without_minus_inf(x))


def safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Compute aten._safe_softmax: softmax, but a row in which every element is -inf gives zeros."""
    _check_dim(x, dim)
    if not x.numel():
        return x.clone()
    second_test = partial(rows_by_pairs, "softmax", _reference_safe_softmax)
    return rowwise(_compiled_softmax, dim, x, reference=second_test, fast="softmax")


def _reference_safe_softmax(x: Tensor) -> Tensor:
    return torch.where((x == -torch.inf).all(-1, keepdim=True), 0.0, _reference_softmax(x))


def softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Compute aten._softmax_backward_data: y (g - sum(g y)), where y is the result of softmax."""
    _check_dim(g, dim)
    require_shape("the gradient", g, g.shape)
    require_shape("the result", y, g.shape)
    second_test = partial(
        rows_by_pairs, "softmax_backward", partial(rowwise_by_balls, _softmax_backward, -1)
    )
    return rowwise(_softmax_backward, dim, g, y, reference=second_test, fast="softmax_backward")


def _softmax_backward(ctx: Any, g: Any, y: Any) -> Any:
    return y * (g - ctx.sum(g * y))


# ---- log-softmax -------------------------------------------------------------------------------------


def log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Compute aten._log_softmax: x - log(sum(exp(x))) along `dim`. Raises IndexError for an invalid `dim`.

    It is (x - max) - log1p(sum of exp(x - max) over all elements but one of the largest).
    """
    _check_dim(x, dim)
    if not x.numel():
        return x.clone()
    second_test = partial(rows_by_pairs, "log_softmax", _reference_log_softmax)
    return rowwise(_compiled_log_softmax, dim, x, reference=second_test, fast="log_softmax")


def _compiled_log_softmax(ctx: Any, x: Any) -> Any:
    finite, largest, is_minus_inf = _compiled_without_minus_inf(ctx, x)
    difference = ctx.difference(finite, largest)
    y = ctx.plus(difference, -ctx.log1p(_compiled_sum_of_others(ctx, difference, is_minus_inf)))
    # Where the largest element is not finite, 0 * largest is NaN and the reference path computes the row.
    return ctx.choose(is_minus_inf, ctx.ball(-math.inf, 0 * largest.mid), y)


def _reference_log_softmax(x: Tensor) -> Tensor:
    def formula(ctx: Any, x: Any, other: Any) -> Any:
        difference = ctx.difference(x, ctx.max(x))
        return ctx.plus(difference, -ctx.log1p(ctx.sum(other * ctx.exp(difference))))

    finite, weight = _without_minus_inf(x)
    weight = _without_largest(x, weight)
    # Where one element is larger than all others by more than 1,000, the logarithm is below 2^-1400, which
    # counts as zero beside another term (compiler/evaluate.py); alone it rounds to -0.
    largest = x.amax(-1, keepdim=True)
    second = torch.where(weight > 0, x, -torch.inf).amax(-1, keepdim=True)
    alone = (largest.double() - second.double() > 1000) & second.isfinite() & largest.isfinite()
    y = rowwise(formula, -1, torch.where(alone, 0.0, finite), weight)
    y = torch.where(alone, torch.where(x == largest, -0.0, operate(torch.sub, x, largest)), y)
    return torch.where((x == -torch.inf) & ~y.isnan(), -torch.inf, y)


def log_softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Compute aten._log_softmax_backward_data: g - exp(y) sum(g), where y is the result of log_softmax."""
    _check_dim(g, dim)
    require_shape("the gradient", g, g.shape)
    require_shape("the result", y, g.shape)
    return rowwise(
        _compiled_log_softmax_backward,
        dim,
        g,
        y,
        reference=partial(rows_by_pairs, "log_softmax_backward", _reference_log_softmax_backward),
        fast="log_softmax_backward",
    )


def _compiled_log_softmax_backward(ctx: Any, g: Any, y: Any) -> Any:
    return g - ctx.choose(y.mid == -math.inf, ctx.constant(0), ctx.exp(y)) * ctx.sum(g)


def _reference_log_softmax_backward(g: Tensor, y: Tensor) -> Tensor:
    """Compute it element by element from the exact sums of g.

    Where the largest element of a row cancels beyond pairs, the others need no multi-precision.
    """

    def formula(ctx: Any, g: Any, y: Any, weight: Any, *parts: Any) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return g - weight * ctx.exp(y) * total

    used = y != -torch.inf
    operands = g, torch.where(used, y, 0.0), used.float()
    if not g.is_cpu:  # the exact sums would have to be waited for
        return rowwise(lambda ctx, *x: formula(ctx, *x, ctx.sum(x[0])), -1, *operands)
    sums = _sums_in_parts(g)
    result = elementwise(formula, *operands, *sums)
    # An exact zero is +0. The last part is 0.
    same = (y == 0) & (g == sums[0]) & (sums[1] == 0)
    zero = torch.where(used & (sums[0] != 0), same, g == 0)
    return torch.where(zero & ~result.isnan(), 0.0, result)


def _sums_in_parts(g: Tensor) -> list[Tensor]:
    """Return float64 tensors [..., 1] that add up to the exact sum of each row, the largest part first."""
    rows = [
        distilled(row) if all(map(math.isfinite, row)) else [sum(row)]
        for row in g.reshape(math.prod(g.shape[:-1]), -1 if g.numel() else 0).tolist()
    ]
    longest = max([1, *map(len, rows)]) + 1
    table = [[*row, *[0.0] * (longest - len(row))] for row in rows]
    parts = torch.tensor(table, dtype=torch.float64, device=g.device)
    return list(parts.reshape(*g.shape[:-1], 1, longest).unbind(-1))


# ---- logsumexp ---------------------------------------------------------------------------------------


def logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    """Return log(sum(exp(x))) over one axis or several, computed as max + log1p(...) like log_softmax."""
    dims = dims_tuple(dim)
    second_test = partial(rows_by_pairs, "logsumexp", _reference_logsumexp)

    def along(x: Tensor, dim: int) -> Tensor:
        y = rowwise(_compiled_logsumexp, dim, x, reference=second_test)
        return _with_infinities(y, lambda: x.amax(dim, keepdim=bool(x.dim())))

    if len(dims) == 1 and x.numel():
        y = along(x, dims[0])
        return y if keepdim or not x.dim() else y.squeeze(dims[0])

    def of_rows(rows: Tensor) -> Tensor:
        return along(rows, 1) if rows.numel() else rows.new_full((len(rows), 1), -torch.inf)

    return apply_to_rows(of_rows, x.to(target().container), dim, keepdim)


def _with_infinities(y: Tensor, largest: Callable[[], Tensor]) -> Tensor:
    """Return infinity for the sums whose largest element is +inf, and y, where they are NaN, for others."""
    if y.is_cpu and not y.isnan().any():
        return y
    return torch.where(largest() == torch.inf, torch.inf, y)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Return, for each element, the logsumexp of the elements up to it along `dim`."""
    if not x.numel():
        return x.clone()
    rows = torch.atleast_1d(x).movedim(dim, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    y = _logcumsumexp_by_loop(flat)
    if y is None:
        y = _logcumsumexp_by_definition(flat)
    y = _with_infinities(y, lambda: flat.cummax(1).values)
    return y.reshape(rows.shape).movedim(-1, dim).reshape(x.shape)


def _logcumsumexp_by_loop(x: Tensor) -> Optional[Tensor]:
    """Compute `logcumsumexp` of rows [rows, n] by csrc/softmax_pairs.c; None where it does not apply."""
    loops = kernels.loops()
    if loops is None or not x.is_cpu or x.dtype is not torch.float32:
        return None
    x = x.contiguous()
    out = torch.empty_like(x)
    result = kernels.run_kernel(loops.reproml_logcumsumexp, *x.shape, x.data_ptr(), out.data_ptr())
    if not result.complete:
        return None
    if result.failed is not None:
        for at in result.failed.tolist():
            i, j = divmod(at, x.shape[1])
            out[i, j] = logsumexp(x[i, : j + 1], 0)
    return out


def _logcumsumexp_by_definition(flat: Tensor) -> Tensor:
    n = flat.shape[-1]
    place = torch.arange(n, device=flat.device)
    parts = []
    together = max(1, _TOGETHER // (n * len(flat)))
    for at in place.split(together):
        up_to = torch.where(place <= at.unsqueeze(1), flat.unsqueeze(1), -torch.inf)
        parts.append(logsumexp(up_to, -1))
    return torch.cat(parts, -1)


def _compiled_logsumexp(ctx: Any, x: Any) -> Any:
    finite, largest, is_minus_inf = _compiled_without_minus_inf(ctx, x)
    others = _compiled_sum_of_others(ctx, ctx.difference(finite, largest), is_minus_inf)
    return largest + ctx.log1p(others)


def _reference_logsumexp(x: Tensor) -> Tensor:
    def formula(ctx: Any, x: Any, other: Any) -> Any:
        return ctx.max(x) + ctx.log1p(ctx.sum(other * ctx.exp(x - ctx.max(x))))

    finite, weight = _without_minus_inf(x)
    y = rowwise(formula, -1, finite, _without_largest(x, weight))
    return torch.where((x == -torch.inf).all(-1, keepdim=True), -torch.inf, y)


# ---- shared helpers ----------------------------------------------------------------------------------


def _check_dim(x: Tensor, dim: int) -> None:
    rank = max(x.dim(), 1)
    if not -rank <= dim < rank:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})"
        )


def _compiled_without_minus_inf(ctx: Any, x: Any) -> tuple[Any, Any, Any]:
    """Return x with each -inf replaced by the row's largest element, that element, and where x is -inf."""
    largest, is_minus_inf = ctx.max(x), x.mid == -math.inf
    return ctx.exact(ctx.where(is_minus_inf, largest.mid, x.mid)), largest, is_minus_inf


def _compiled_sum_of_others(ctx: Any, difference: Any, is_minus_inf: Any) -> Any:
    """Sum exp(difference) over all elements but one of the largest, whose difference is 0."""
    below, zero = difference.mid < 0, ctx.constant(0)
    ties = ctx.total(ctx.where(is_minus_inf | below, 0.0, 1.0)) - 1  # an exact integer
    return ctx.sum(ctx.choose(below, ctx.exp(difference), zero)) + ctx.exact(ties)


def _without_minus_inf(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x with each -inf replaced by its row's largest element, and the weights: 0 there, else 1."""
    is_minus_inf = x == -torch.inf
    return torch.where(is_minus_inf, x.amax(-1, keepdim=True), x), (~is_minus_inf).float()


def _without_largest(x: Tensor, weight: Tensor) -> Tensor:
    """Return `weight` with a 0 also at the first of the largest elements of each row."""
    return weight.scatter(-1, x.argmax(-1, keepdim=True), 0.0)
