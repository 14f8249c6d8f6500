"""Losses of margins and their gradients: each is one formula of real numbers, rounded once.

Functions are named like PyTorch's operators. x is the input, float32 [n, classes] or [classes]; a loss is
float32 [n] or [], or float32 [] after a reduction. A term that is NaN counts as 0, as in PyTorch.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise, rowwise, rowwise_by_balls
from reproml.arithmetic.compiler.pairs import sum_by_pairs
from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.arithmetic.numerics.rounding import two_sum
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require, require_shape
from reproml.arithmetic.operators.losses import MEAN, NONE, loss_gradient, reduced_loss

# exp(-800) < 2^-1154 counts as zero beside any other term, and underflows (docs/contract.md).
_FAR = 800.0
_FARTHER = 2500.0  # exp(-2500) underflows in binary64 even times two binary64 numbers


def soft_margin_loss(x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
    """Return log(1 + exp(-x y)) = max(-x y, 0) + log1p(exp(-|x y|))."""
    if target() is BINARY64:
        return _soft_margin_in_binary64(x, y, reduction)
    product = x.double() * y.double()  # exact

    def formula(ctx: Any, larger: Any, size: Any) -> Any:
        return larger + ctx.log1p(ctx.exp(-size))

    return reduced_loss(formula, reduction, (-product).clamp_min(0), product.abs().clamp_max(_FAR))


def _soft_margin_in_binary64(x: Tensor, y: Tensor, reduction: int) -> Tensor:
    near = ~((x * y).abs() > _FAR)
    u, v = (torch.where(near, t, 0.0) for t in (x, y))

    def formula(ctx: Any, x: Any, y: Any, negative: Any, u: Any, v: Any, near: Any) -> Any:
        return negative * abs(x * y) + near * ctx.log1p(ctx.exp(-abs(u * v)))

    negative = x.signbit() ^ y.signbit()
    return reduced_loss(formula, reduction, x, y, negative.to(x.dtype), u, v, near.to(x.dtype))


def soft_margin_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    """Return -g y sigmoid(-x y), for MEAN divided by the number of elements."""
    if target() is BINARY64:
        product = (x * y).clamp(-_FARTHER, _FARTHER)
        far = product.abs() == _FARTHER
        u, v, bound = (torch.where(far, t, z) for t, z in ((0.0, x), (0.0, y), (product, x * 0.0)))
        return loss_gradient(
            *(lambda ctx, u, v, bound, y: -y * ctx.sigmoid(-(u * v + bound)), reduction, g),
            *(u, v, bound, y),
        )
    product = (x.double() * y.double()).clamp(-_FAR, _FAR)
    return loss_gradient(lambda ctx, p, y: -y * ctx.sigmoid(-p), reduction, g, product, y)


# ---- one class a row ---------------------------------------------------------------------------------


def multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1,
    weight: Optional[Tensor] = None,
    reduction: int = MEAN,
) -> Tensor:
    """Return w sum max(0, margin - x[target] + x[j])^p / classes over all j but the target; p is 1 or 2."""
    terms = _MultiMargin(x, target, p, margin, weight)
    loss = _summed(terms.formula, reduction, terms.classes, *terms.operands)
    return loss.reshape(target.shape) if reduction == NONE else loss


def multi_margin_loss_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    p: float,
    margin: float,
    weight: Optional[Tensor] = None,
    reduction: int = MEAN,
) -> Tensor:
    """Return g times the derivative of each term, and at the target minus their sum."""
    terms = _MultiMargin(x, target, p, margin, weight)
    divisor = terms.classes * (len(terms.own) if reduction == MEAN else 1)
    of_term = terms.slope  # a compiled formula may refer to functions, but not to objects

    def slope(ctx: Any, g: Any, *operands: Any) -> Any:
        return g * of_term(ctx, *operands) / divisor

    g = g.reshape(-1, 1)
    others = elementwise(slope, g, *terms.operands)
    own = rowwise(lambda ctx, *v: -ctx.sum(slope(ctx, *v)), 1, g, *terms.operands)
    return torch.where(terms.is_target, own, others).reshape(x.shape)


class _MultiMargin:
    """The operands of multi_margin_loss as rows [n, classes], and the formulas of its terms."""

    def __init__(
        self, x: Tensor, target: Tensor, p: float, margin: float, weight: Optional[Tensor]
    ) -> None:
        require(p in (1, 2), "only p == 1 and p == 2 supported")
        rows, index = _as_rows(x), target.reshape(-1, 1)
        self.classes = rows.shape[1]
        _require_same_count(len(index), len(rows))
        require_shape("the weight", weight, (self.classes,))
        require((index >= 0) & (index < self.classes), "target out of range")
        m = float32_scalar(margin)
        self.is_target = torch.arange(self.classes, device=x.device) == index
        self.own = rows.gather(1, index)
        active = _exceeds(m, self.own, rows) & ~self.is_target
        w = torch.ones_like(self.own) if weight is None else weight[index]
        self.operands = (
            *(torch.where(active, t, 0.0) for t in (rows, self.own)),
            w,
            active.float(),
        )
        square = p == 2
        self.formula = lambda ctx, x, own, w, active: (
            active * (w * (m - own + x) * (m - own + x) if square else w * (m - own + x))
        )
        self.slope = lambda ctx, x, own, w, active: (
            active * (w * (2 * (m - own + x)) if square else w)
        )


def _as_rows(x: Tensor) -> Tensor:
    """Return x as [n, classes]; a number is one row of one class."""
    require(x.dim() <= 2 and x.numel(), f"an input of shape {list(x.shape)} is not supported")
    return x.reshape(-1, x.shape[-1] if x.dim() else 1)


def _require_same_count(targets: int, expected: int) -> None:
    require(targets == expected, f"{expected} targets are expected, not {targets}")


def _exceeds(margin: Fraction, own: Tensor, other: Tensor) -> Tensor:
    """Return whether margin - own + other > 0 holds exactly.

    s + t is margin - own. s + other is exact where it is as small as t, and otherwise has the sign of the
    sum, which rounding keeps.
    """
    s, t = two_sum(torch.full_like(own.double(), float(margin)), -own.double())
    total = s + other.double()
    return torch.where(t.isfinite(), total + t, total) > 0


def _summed(formula: Any, reduction: int, classes: int, *operands: Tensor) -> Tensor:
    """Return the sum of the terms of each row / classes, or for SUM and MEAN of all rows, rounded once."""
    rows = torch.broadcast_tensors(*operands)
    if reduction == NONE:
        return rowwise(lambda ctx, *x: ctx.sum(formula(ctx, *x)) / classes, 1, *rows)
    n = classes * (len(rows[0]) if reduction == MEAN else 1)
    flat = [x.reshape(-1) for x in rows]

    def value(ctx: Any, *x: Any) -> Any:
        return ctx.sum(formula(ctx, *x)) / n

    def second_test(*rows: Tensor) -> Tensor:
        total = None
        if target() is not BINARY64 and rows[0].is_cpu:
            total = sum_by_pairs(formula, n, *[x.contiguous() for x in rows])
        return rowwise_by_balls(value, -1, *rows) if total is None else total.reshape(1)

    return rowwise(value, 0, *flat, reference=second_test).reshape(())


# ---- several classes a row ---------------------------------------------------------------------------


def multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int) -> tuple[Tensor, Tensor]:
    """Compute aten.multilabel_margin_loss_forward: the loss, and 1 at the classes of `target`, else 0.

    The loss is sum max(0, 1 - x[t] + x[j]) / classes over all t of a row of `target` up to its first -1,
    and all j that are not among them.
    """
    counts = _Counts(x, target)
    loss = _summed(
        lambda ctx, x, slope, ones: slope * x + ones,
        reduction,
        counts.slope.shape[1],
        *(torch.where(counts.slope == 0, 0.0, counts.rows), counts.slope, counts.ones),
    )
    return (loss.reshape(x.shape[:-1]) if reduction == NONE else loss), counts.is_target


def multilabel_margin_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, reduction: int, is_target: Tensor
) -> Tensor:
    """Return g / classes times the number of terms that have x as x[j], minus that as x[t]."""
    slope = _Counts(x, target).slope
    divisor = slope.shape[1] * (len(slope) if reduction == MEAN else 1)
    out = elementwise(lambda ctx, g, n: g * n / divisor, g.reshape(-1, 1), slope.double())
    return out.reshape(x.shape)


class _Counts:
    """In how many terms each class is, so that the terms of a row add up to the sum of slope x + ones.

    A class that is a target is in `ones` terms as x[t], where slope = -ones. Any other is in `slope` terms
    as x[j], where ones = 0. Both are [n, classes], and rows is x in that shape.
    """

    def __init__(self, x: Tensor, target: Tensor) -> None:
        self.rows = rows = _as_rows(x)
        _require_same_count(target.numel(), x.numel())
        index, classes = target.reshape(rows.shape), rows.shape[1]
        require((index >= -1) & (index < classes), "target is out of range")
        listed = (index >= 0).long().cumprod(1)
        index = index * listed
        marks = torch.zeros_like(index).scatter_add(1, index, listed)
        self.is_target = (marks > 0).to(x.dtype).reshape(target.shape)
        # A term is above 0 if x[j] > bound, where the bound is x[t] - 1, rounded down. NaN is in no term.
        bound, lost = two_sum(rows.gather(1, index).double(), torch.full_like(rows.double(), -1.0))
        below = torch.nextafter(bound, torch.full_like(bound, -torch.inf))
        bound = torch.where(lost < 0, below, bound)
        bound = torch.where((listed > 0) & ~bound.isnan(), bound, torch.inf)
        other = torch.where((marks > 0) | rows.isnan(), -torch.inf, rows.double())
        of_targets = classes - torch.searchsorted(other.sort(1)[0], bound, right=True)
        of_others = torch.searchsorted(bound.sort(1)[0], other)
        ones = torch.zeros_like(index).scatter_add(1, index, of_targets)
        self.ones, self.slope = ones.to(x.dtype), (of_others - ones).to(x.dtype)
