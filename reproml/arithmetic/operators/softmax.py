"""Softmax, log-softmax and logsumexp: formulas over a row, each element rounded once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import rowwise
from reproml.errors import NotExactError


def _shifted(ctx: Any, x: Any) -> Any:
    return x - ctx.max(x)


def _log_softmax(ctx: Any, x: Any, others: Any) -> Any:
    """x - max - log(1 + the sum of exp over all but the largest), so that nothing cancels."""
    d = ctx.difference(x, ctx.max(x))
    return ctx.plus(d, -ctx.log1p(ctx.sum(others * ctx.exp(d))))


def _softmax(ctx: Any, x: Any, present: Any) -> Any:
    e = present * ctx.exp(_shifted(ctx, x))
    return e / ctx.sum(e)


def _present(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """x with each -inf replaced by the row's largest, and 0 where that was done, else 1."""
    absent = x == -torch.inf
    return torch.where(absent, x.amax(dim, keepdim=True), x), (~absent).float()


def _others(x: Tensor, present: Tensor, dim: int = -1) -> Tensor:
    """`present`, with 0 at the first largest element of each row as well."""
    if not x.dim():
        return torch.zeros_like(x)
    return present.scatter(dim, x.argmax(dim, keepdim=True), 0.0)


def _filled(ctx: Any, x: Any) -> tuple[Any, Any, Any]:
    """x with each -inf replaced by the row's largest, that, and where it was done."""
    top, absent = ctx.max(x), x.mid == -math.inf
    return ctx.exact(ctx.where(absent, top.mid, x.mid)), top, absent


def _rest(ctx: Any, d: Any, absent: Any) -> Any:
    """The sum of exp(d) over all elements but one of the largest, where d = 0."""
    below, zero = d.mid < 0, ctx.constant(0)
    ties = ctx.total(ctx.where(absent | below, 0.0, 1.0)) - 1  # whole numbers
    return ctx.sum(ctx.choose(below, ctx.exp(d), zero)) + ctx.exact(ties)


def _log_softmax_of(ctx: Any, x: Any) -> Any:
    filled, top, absent = _filled(ctx, x)
    d = ctx.difference(filled, top)
    y = ctx.plus(d, -ctx.log1p(_rest(ctx, d, absent)))
    # 0 * top: NaN, and so left to the definition, where the largest is not finite
    return ctx.choose(absent, ctx.ball(-math.inf, 0 * top.mid), y)


def _check_axis(x: Tensor, dim: int) -> None:
    axes = max(x.dim(), 1)
    if not -axes <= dim < axes:
        raise IndexError(f"a tensor of shape {list(x.shape)} has no axis {dim}")


def log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    _check_axis(x, dim)
    if not x.numel():
        return x.clone()
    return rowwise(_log_softmax_of, dim, x, reference=_reference_log_softmax, fast="log_softmax")


def _reference_log_softmax(x: Tensor) -> Tensor:
    filled, present = _present(x)
    y = rowwise(_log_softmax, -1, filled, _others(x, present))
    return torch.where((x == -torch.inf) & ~y.isnan(), -torch.inf, y)


def log_softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """g - exp(y) sum(g)."""
    return rowwise(
        _log_softmax_backward_of,
        dim,
        g,
        y,
        reference=_reference_log_softmax_backward,
        fast="log_softmax_backward",
    )


def _log_softmax_backward_of(ctx: Any, g: Any, y: Any) -> Any:
    return g - ctx.choose(y.mid == -math.inf, ctx.constant(0), ctx.exp(y)) * ctx.sum(g)


def _reference_log_softmax_backward(g: Tensor, y: Tensor) -> Tensor:
    return rowwise(
        lambda ctx, g, y, present: g - present * ctx.exp(y) * ctx.sum(g),
        -1,
        g,
        torch.where(y == -torch.inf, 0.0, y),
        (y != -torch.inf).float(),
    )


def _softmax_of(ctx: Any, x: Any) -> Any:
    filled, top, absent = _filled(ctx, x)
    e = ctx.choose(
        absent, ctx.constant(0), ctx.exp(ctx.difference(filled, top))
    )  # which is mostly exact
    return e / ctx.sum(e)


def softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    _check_axis(x, dim)
    if not x.numel():
        return x.clone()
    return rowwise(_softmax_of, dim, x, reference=_reference_softmax, fast="softmax")


def _reference_softmax(x: Tensor) -> Tensor:
    return rowwise(_softmax, -1, *_present(x))


def safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """softmax, with zeros for a row that is -inf throughout."""
    if not x.numel():
        return x.clone()
    return rowwise(_softmax_of, dim, x, reference=_reference_safe_softmax, fast="softmax")


def _reference_safe_softmax(x: Tensor) -> Tensor:
    return torch.where((x == -torch.inf).all(-1, keepdim=True), 0.0, _reference_softmax(x))


def softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """y (g - sum(g y))."""
    return rowwise(_softmax_backward, dim, g, y, fast="softmax_backward")


def _softmax_backward(ctx: Any, g: Any, y: Any) -> Any:
    return y * (g - ctx.sum(g * y))


def logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if len(dims) != 1:
        raise NotExactError(
            f"logsumexp over {len(dims)} axes has no exact definition; flatten them."
        )
    if not x.numel():
        return torch.full_like(x.sum(dims[0], keepdim=keepdim), -torch.inf)
    y = rowwise(_logsumexp_of, dims[0], x, reference=_reference_logsumexp)
    return y if keepdim or not x.dim() else y.squeeze(dims[0])


def _logsumexp_of(ctx: Any, x: Any) -> Any:
    filled, top, absent = _filled(ctx, x)
    return top + ctx.log1p(_rest(ctx, ctx.difference(filled, top), absent))


def _reference_logsumexp(x: Tensor) -> Tensor:
    filled, present = _present(x)
    y = rowwise(
        lambda ctx, x, others: ctx.max(x) + ctx.log1p(ctx.sum(others * ctx.exp(_shifted(ctx, x)))),
        -1,
        filled,
        _others(x, present),
    )
    return torch.where((x == -torch.inf).all(-1, keepdim=True), -torch.inf, y)
