"""Losses: each is one formula of real numbers, rounded once. Names are those of PyTorch's operators."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.operators.activations import HALF, _softplus
from reproml.arithmetic.operators.arguments import require
from reproml.arithmetic.operators.reductions import sum_over

NONE, MEAN, SUM = 0, 1, 2


def _reduced(formula: Callable[..., Any], reduction: int, *operands: Tensor) -> Tensor:
    """The formula's sum or mean over all elements, rounded once; or each element."""
    if reduction == NONE:
        return elementwise(formula, *operands)
    wide = torch.broadcast_tensors(*operands)
    n = wide[0].numel() if reduction == MEAN else 1
    flat = [x.reshape(-1) for x in wide]
    return rowwise(lambda ctx, *x: ctx.sum(formula(ctx, *x)) / n, 0, *flat).reshape(())


def _spread(formula: Callable[..., Any], reduction: int, g: Tensor, *operands: Tensor) -> Tensor:
    """g times the formula, divided by the number of elements for a mean."""
    n = torch.broadcast_tensors(*operands)[0].numel() if reduction == MEAN else 1
    return elementwise(lambda ctx, g, *x: g * formula(ctx, *x) / n, g, *operands)


def mse_loss(x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
    return _reduced(lambda ctx, x, y: (x - y) * (x - y), reduction, x, y)


def mse_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    return _spread(lambda ctx, x, y: 2 * (x - y), reduction, g, x, y)


def smooth_l1_loss(x: Tensor, y: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = x - y."""
    b = Fraction(beta)

    def formula(ctx: Any, x: Any, y: Any, near: Any) -> Any:
        d = abs(x - y)
        return ctx.choose(near < 1, d - b * HALF, d * d / (2 * b)) if b else d

    return _reduced(formula, reduction, x, y, _within(x, y, beta))


def smooth_l1_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float) -> Tensor:
    b = Fraction(beta)

    def formula(ctx: Any, x: Any, y: Any, near: Any, sign: Any) -> Any:
        return ctx.choose(near < 1, sign, (x - y) / b) if b else sign

    return _spread(formula, reduction, g, x, y, _within(x, y, beta), _sign(x, y))


def huber_loss(x: Tensor, y: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2)."""
    b = Fraction(delta)

    def formula(ctx: Any, x: Any, y: Any, near: Any) -> Any:
        d = abs(x - y)
        return ctx.choose(near < 1, b * (d - b * HALF), d * d * HALF)

    return _reduced(formula, reduction, x, y, _within(x, y, delta))


def huber_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float) -> Tensor:
    b = Fraction(delta)

    def formula(ctx: Any, x: Any, y: Any, near: Any, sign: Any) -> Any:
        return ctx.choose(near < 1, b * sign, x - y)

    return _spread(formula, reduction, g, x, y, _within(x, y, delta), _sign(x, y))


def _within(x: Tensor, y: Tensor, bound: float) -> Tensor:
    """1 where |x - y| < bound exactly, else 0 (at the bound both branches agree)."""
    # x - y in binary64 may round, but not across the bound, itself a binary64 number.
    return ((x.double() - y.double()).abs() < bound).float()


def _sign(x: Tensor, y: Tensor) -> Tensor:
    return (x > y).float() - (x < y).float()


def bce(x: Tensor, y: Tensor, weight: Optional[Tensor] = None, reduction: int = MEAN) -> Tensor:
    """-w (y log x + (1 - y) log(1 - x)), each logarithm no less than -100.

    Raises RuntimeError for an x or y outside of [0, 1]."""
    for name, t in (("input", x), ("target", y)):
        require((t >= 0) & (t <= 1), f"all elements of the {name} should be between 0 and 1")

    def formula(ctx: Any, x: Any, y: Any, w: Any, zero: Any, one: Any) -> Any:
        # where x is 0 or 1 the logarithm of a stand-in is multiplied away and -100 takes its place
        log_x = (1 - zero) * ctx.log(x + zero) - 100 * zero
        log_1_x = (1 - one) * ctx.log1p(-x * (1 - one)) - 100 * one
        return -w * (y * log_x + (1 - y) * log_1_x)

    zero = (x.double() < 3.720075976020836e-44).float()  # exp(-100)
    one = (x == 1).float()
    return _reduced(formula, reduction, x, y, _ones(weight, x), zero, one)


def bce_backward(
    g: Tensor, x: Tensor, y: Tensor, weight: Optional[Tensor] = None, reduction: int = MEAN
) -> Tensor:
    """g w (x - y) / max(x (1 - x), 1e-12)."""
    small = Fraction(1, 10**12)
    tiny = ((x.double() * (1 - x.double())) < 1e-12).float()

    def formula(ctx: Any, x: Any, y: Any, w: Any, tiny: Any) -> Any:
        return w * (x - y) / ((1 - tiny) * (x * (1 - x)) + tiny * small)

    return _spread(formula, reduction, g, x, y, _ones(weight, x), tiny)


def bce_with_logits(
    x: Tensor,
    y: Tensor,
    weight: Optional[Tensor] = None,
    pos_weight: Optional[Tensor] = None,
    reduction: int = MEAN,
) -> Tensor:
    """w ((1 - y) x + (1 + (p - 1) y) softplus(-x)), p the weight of positives."""

    def formula(ctx: Any, x: Any, y: Any, w: Any, p: Any) -> Any:
        return w * ((1 - y) * x + (1 + (p - 1) * y) * _softplus(ctx, -x))

    return _reduced(formula, reduction, x, y, _ones(weight, x), _ones(pos_weight, x))


def _ones(weight: Optional[Tensor], x: Tensor) -> Tensor:
    return torch.ones((), device=x.device) if weight is None else weight


def nll_loss(
    x: Tensor, target: Tensor, weight: Optional[Tensor], reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """-sum w x[target] / sum w for a mean, -sum w x[target], or each; and sum w."""
    if reduction != NONE and _is_nll(x, target, weight):
        loss, total = x.new_empty(()), x.new_empty(())
        if kernels.library.reproml_nll(
            x.data_ptr(),
            target.data_ptr(),
            None if weight is None else weight.data_ptr(),
            *x.shape,
            ignore_index,
            reduction == MEAN,
            loss.data_ptr(),
            total.data_ptr(),
        ):
            return loss, total
    if x.dim() == 1:
        loss, total = nll_loss(x.unsqueeze(0), target.reshape(1), weight, reduction, ignore_index)
        return (loss.squeeze(0) if reduction == NONE else loss), total
    counted = target != ignore_index
    missing = counted & ((target < 0) | (target >= x.shape[1]))
    if x.is_cpu and bool(missing.any()):
        raise IndexError(f"Target {int(target[missing][0])} is out of bounds.")
    at = torch.where(counted, target, 0)
    picked = torch.where(counted, x.gather(1, at.unsqueeze(1)).squeeze(1), 0.0)
    w = counted.float() if weight is None else torch.where(counted, weight[at], 0.0)
    if reduction == NONE:
        return torch.where(counted, -(picked * w), 0.0), torch.zeros((), device=x.device)
    total = sum_over(w, ())
    if reduction == SUM:
        return -sum_over(picked, (), y=w), total
    return rowwise(lambda ctx, x, w: -(ctx.sum(x * w) / ctx.sum(w)), 0, picked, w).reshape(
        ()
    ), total


def _is_nll(x: Tensor, target: Tensor, weight: Optional[Tensor]) -> bool:
    """Whether the compiled loops of c/losses.c can take these."""
    if x.dim() != 2 or not x.numel() or x.dtype is not torch.float32:
        return False
    if target.dtype is not torch.int64:
        return False
    if len(target) != len(x) or target.dim() != 1 or not kernels.usable(x, target):
        return False
    return weight is None or (kernels.usable(weight) and weight.shape == x.shape[1:])


def nll_loss_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    reduction: int,
    ignore_index: int,
    total: Tensor,
) -> Tensor:
    """-g w / total at the target, 0 elsewhere."""
    each = g.dim() > 0
    if _is_nll(x, target, weight) and kernels.usable(g) and (g.shape == target.shape or not each):
        out = torch.empty_like(x)
        divisor = float(total) if reduction == MEAN else 1.0
        if kernels.library.reproml_nll_backward(
            g.data_ptr(),
            each,
            target.data_ptr(),
            None if weight is None else weight.data_ptr(),
            *x.shape,
            ignore_index,
            reduction == MEAN,
            divisor,
            out.data_ptr(),
        ):
            return out
    rows, row_target = (x.unsqueeze(0), target.reshape(1)) if x.dim() == 1 else (x, target)
    counted = row_target != ignore_index
    at = torch.where(counted, row_target, 0)
    w = torch.ones_like(at, dtype=torch.float32) if weight is None else weight[at]
    if reduction == MEAN:
        value = elementwise(lambda ctx, g, w, t: -(g * w / t), g, w, total)
    else:
        value = -(g * w)
    value = torch.where(counted, value, 0.0)
    return torch.zeros_like(rows).scatter(1, at.unsqueeze(1), value.unsqueeze(1)).reshape(x.shape)


def nll_loss2d(
    x: Tensor, target: Tensor, weight: Optional[Tensor], reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """nll_loss of each place: x [n, c, h, w], target [n, h, w]."""
    loss, total = nll_loss(_places(x), target.reshape(-1), weight, reduction, ignore_index)
    return loss.reshape(target.shape) if reduction == NONE else loss, total


def nll_loss2d_backward(g: Tensor, x: Tensor, target: Tensor, *rest: Any) -> Tensor:
    n, c, h, w = x.shape
    flat = nll_loss_backward(g.reshape(-1) if g.dim() else g, _places(x), target.reshape(-1), *rest)
    return flat.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()


def _places(x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n * h * w, c]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
