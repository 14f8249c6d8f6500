"""Losses and their gradients: each is one formula of real numbers, rounded once.

Functions are named like PyTorch's operators. `x` is the input, `y` or `target` the target; a loss is
float32 of their broadcast shape, or float32 [] after a reduction. `reduction` is NONE, MEAN or SUM, as in
PyTorch's schemas.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.direct import run_directly
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise, rowwise_by_balls
from reproml.arithmetic.compiler.pairs import sum_by_pairs
from reproml.arithmetic.numerics.formats import BINARY64, narrow, operate, target
from reproml.arithmetic.numerics.rounding import two_sum
from reproml.arithmetic.operators.activations import HALF
from reproml.arithmetic.operators.arguments import require, require_shape
from reproml.arithmetic.operators.reductions import reduce_sum

NONE, MEAN, SUM = 0, 1, 2


def mse_loss(x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
    """Return (x - y)^2."""
    total = _sum_by_loop("mse", reduction, x, y)
    if total is not None:
        return total
    return reduced_loss(lambda ctx, x, y: (x - y) * (x - y), reduction, x, y)


def mse_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    """Return 2 g (x - y), for MEAN divided by the number of elements."""
    z = _gradient_by_loop("mse_loss_backward", g, x, y, reduction)
    if z is not None:
        return z
    n = _divisor(reduction, x, y)

    def formula(ctx: Any, g: Any, x: Any, y: Any) -> Any:
        return g * (2 * (x - y)) / n

    def exact_products(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Round once what binary64 holds exactly: every eighth difference of random numbers is a tie."""
        difference, lost = two_sum(x.double(), -y.double())
        factor = g.double() * (2 / max(n, 1))
        power_of_two = (torch.frexp(factor)[0].abs() == 0.5) & (n & (n - 1) == 0)
        exact = power_of_two & (lost == 0) & difference.isfinite()
        value = narrow(difference * factor)
        return torch.where(exact, value, elementwise(formula, g, torch.where(exact, 1.0, x), y))

    return elementwise(formula, g, x, y, reference=exact_products)


def smooth_l1_loss(x: Tensor, y: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    """Return d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = x - y."""
    require(beta >= 0, f"smooth_l1_loss: beta must not be negative, but is {beta}")
    b = Fraction(beta)

    def formula(ctx: Any, x: Any, y: Any, near: Any) -> Any:
        d = abs(x - y)
        return ctx.choose(near < 1, d - b * HALF, d * d / (2 * b)) if b else d

    total = _sum_by_loop("smooth_l1", reduction, x, y, beta)
    if total is not None:
        return total
    return reduced_loss(formula, reduction, x, y, _is_within(x, y, beta))


def smooth_l1_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float) -> Tensor:
    """Return g d / beta where |d| < beta, else g sign(d), with d = x - y."""
    z = _gradient_by_loop("smooth_l1_backward", g, x, y, reduction) if beta == 1 else None
    if z is not None:
        return z
    b = Fraction(beta)

    def formula(ctx: Any, x: Any, y: Any, near: Any, sign: Any) -> Any:
        return ctx.choose(near < 1, sign, (x - y) / b) if b else sign

    return loss_gradient(formula, reduction, g, x, y, _is_within(x, y, beta), _sign(x, y))


def huber_loss(x: Tensor, y: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """Return d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2)."""
    require(delta > 0, f"huber_loss: delta must be positive, but is {delta}")
    b = Fraction(delta)

    def formula(ctx: Any, x: Any, y: Any, near: Any) -> Any:
        d = abs(x - y)
        return ctx.choose(near < 1, b * (d - b * HALF), d * d * HALF)

    total = _sum_by_loop("huber", reduction, x, y, delta)
    if total is not None:
        return total
    return reduced_loss(formula, reduction, x, y, _is_within(x, y, delta))


def huber_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float) -> Tensor:
    """Return g d where |d| <= delta, else g delta sign(d), with d = x - y."""
    z = _gradient_by_loop("smooth_l1_backward", g, x, y, reduction) if delta == 1 else None
    if z is not None:
        return z
    b = Fraction(delta)

    def formula(ctx: Any, x: Any, y: Any, near: Any, sign: Any) -> Any:
        return ctx.choose(near < 1, b * sign, x - y)

    return loss_gradient(formula, reduction, g, x, y, _is_within(x, y, delta), _sign(x, y))


def binary_cross_entropy(
    x: Tensor, y: Tensor, weight: Optional[Tensor] = None, reduction: int = MEAN
) -> Tensor:
    """Return -w (y log x + (1 - y) log(1 - x)), where each logarithm is clamped to at least -100.

    Raises RuntimeError for an x or y outside of [0, 1].
    """
    for name, t in (("input", x), ("target", y)):
        require((t >= 0) & (t <= 1), f"all elements of {name} should be between 0 and 1")

    def formula(ctx: Any, x: Any, y: Any, w: Any, zero: Any, one: Any) -> Any:
        # Where x is 0 or 1 a finite logarithm is computed and multiplied by 0, and -100 is added instead.
        log_x = (1 - zero) * ctx.log(x + zero) - 100 * zero
        log_1_x = (1 - one) * ctx.log1p(-x * (1 - one)) - 100 * one
        return -w * (y * log_x + (1 - y) * log_1_x)

    zero = (x.double() < 3.720075976020836e-44).float()  # exp(-100)
    one = (x == 1).float()
    return reduced_loss(formula, reduction, x, y, _weight_or_one(weight, x), zero, one)


def binary_cross_entropy_backward(
    g: Tensor, x: Tensor, y: Tensor, weight: Optional[Tensor] = None, reduction: int = MEAN
) -> Tensor:
    """Return g w (x - y) / max(x (1 - x), 1e-12)."""
    small = Fraction(1, 10**12)
    wide = x.double()  # between these bounds are all binary64 numbers with x (1 - x) >= 10^-12
    tiny = ((wide < 1.000000000001e-12) | (wide > 0.9999999999989999)).to(x.dtype)

    def formula(ctx: Any, x: Any, y: Any, w: Any, tiny: Any) -> Any:
        return w * (x - y) / ((1 - tiny) * (x * (1 - x)) + tiny * small)

    return loss_gradient(formula, reduction, g, x, y, _weight_or_one(weight, x), tiny)


def binary_cross_entropy_with_logits(
    x: Tensor,
    y: Tensor,
    weight: Optional[Tensor] = None,
    pos_weight: Optional[Tensor] = None,
    reduction: int = MEAN,
) -> Tensor:
    """Return w ((1 - y) x + (1 + (p - 1) y) softplus(-x)), where p is the weight of positive targets.

    Below 0, where softplus(-x) is -x + log1p(exp(x)), the terms in x add up to -p y x.
    """

    def formula(ctx: Any, x: Any, y: Any, w: Any, p: Any) -> Any:
        linear = ctx.choose(x < 0, 0 * x - p * y * x, (1 - y) * x)
        return w * (linear + (1 + (p - 1) * y) * ctx.log1p(ctx.exp(-abs(x))))

    if weight is None and pos_weight is None:
        total = _sum_by_loop("bce_with_logits", reduction, x, y)
        if total is not None:
            return total
    return reduced_loss(
        formula, reduction, x, y, _weight_or_one(weight, x), _weight_or_one(pos_weight, x)
    )


# ---- helpers of the losses above ---------------------------------------------------------------------


def reduced_loss(formula: Callable[..., Any], reduction: int, *operands: Tensor) -> Tensor:
    """Return the formula's sum or mean over all elements, or for NONE each value, rounded once."""
    if reduction == NONE:
        return elementwise(formula, *operands)
    n = _divisor(reduction, *operands)
    flat = [x.reshape(-1) for x in torch.broadcast_tensors(*operands)]

    def value(ctx: Any, *x: Any) -> Any:
        return ctx.sum(formula(ctx, *x)) / n

    def of_distinct_elements(*rows: Tensor) -> Tensor:
        """Compute the same of equal elements once, as a saturated sigmoid gives 0 and 1 only."""
        if (
            target() is BINARY64 or not rows[0].is_cpu
        ):  # how many are distinct would have to be waited for
            return rowwise_by_balls(value, -1, *rows)
        total = sum_by_pairs(formula, n, *[x.contiguous() for x in rows])
        if total is not None:
            return total.reshape(*rows[0].shape[:-1], 1)
        if not all(x.isfinite().all() for x in rows):
            limit = rowwise_by_balls(value, -1, *rows)
            if not limit.isfinite().all():
                return limit
        elements, counts = torch.unique(
            torch.stack([x.reshape(-1) for x in rows]), dim=1, return_counts=True
        )
        total = rowwise_by_balls(
            lambda ctx, count, *x: ctx.sum(count * formula(ctx, *x)) / n, -1, counts, *elements
        )
        return total.reshape(*rows[0].shape[:-1], 1)

    return rowwise(value, 0, *flat, reference=of_distinct_elements).reshape(())


_LOOPS = ("bce_with_logits", "smooth_l1", "huber")  # in the order of csrc/losses.c


def _sum_by_loop(
    name: str, reduction: int, x: Tensor, y: Tensor, scalar: float = 1
) -> Optional[Tensor]:
    """Return a reduced loss by its loop in csrc; None where it does not apply or the test fails."""
    loops = kernels.loops()
    floats = x.dtype is y.dtype is torch.float32 and x.is_cpu and y.is_cpu
    if reduction == NONE or not floats or not 0 < scalar < math.inf or loops is None:
        return None
    x, y = (t.contiguous() for t in torch.broadcast_tensors(x, y))
    out = x.new_empty(())
    layout = x.data_ptr(), y.data_ptr(), x.numel()
    divisor = _divisor(reduction, x)
    if name == "mse":
        rounded = not loops.reproml_squared_distance(*layout, divisor, out.data_ptr())
    else:
        rounded = loops.reproml_loss(_LOOPS.index(name), *layout, scalar, divisor, out.data_ptr())
    return out if rounded else None


def _gradient_by_loop(
    name: str, g: Tensor, x: Tensor, y: Tensor, reduction: int
) -> Optional[Tensor]:
    """Return the gradient of a loss by its loop in csrc/direct.c; None where that cannot take it."""
    n = _divisor(reduction, x, y)
    return run_directly(name, x, y, g, scalar=n) if n < 2**27 else None


def loss_gradient(
    formula: Callable[..., Any], reduction: int, g: Tensor, *operands: Tensor
) -> Tensor:
    """Return g times each value of the formula, for MEAN divided by their number, rounded once."""
    n = _divisor(reduction, *operands)
    return elementwise(lambda ctx, g, *x: g * formula(ctx, *x) / n, g, *operands)


def _divisor(reduction: int, *operands: Tensor) -> int:
    """Return the number of elements of a loss for MEAN, otherwise 1."""
    return torch.broadcast_tensors(*operands)[0].numel() if reduction == MEAN else 1


def _is_within(x: Tensor, y: Tensor, bound: float) -> Tensor:
    """Return 1 where |x - y| < bound holds for the exact difference, else 0.

    At the bound itself both branches of a loss agree. The binary64 difference may be rounded, but not
    across the bound, which is a binary64 number.
    """
    if target() is not BINARY64:
        return ((x.double() - y.double()).abs() < bound).float()
    difference, lost = two_sum(x, -y)
    below = difference.abs() < bound
    return (below | ((difference.abs() == bound) & (lost * difference < 0))).float()


def _sign(x: Tensor, y: Tensor) -> Tensor:
    """Return the sign of x - y, NaN where that is."""
    return torch.where((x - y).isnan(), torch.nan, (x > y).float() - (x < y).float())


def _weight_or_one(weight: Optional[Tensor], x: Tensor) -> Tensor:
    return x.new_ones(()) if weight is None else weight


# ---- negative log-likelihood -------------------------------------------------------------------------


def nll_loss(
    x: Tensor, target: Tensor, weight: Optional[Tensor], reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute aten.nll_loss_forward: the loss and the total weight, sum w (0 for NONE), each rounded once.

    x: float32 [n, classes] or [classes]; target: int64 [n] or []; weight: float32 [classes] or None. With
    w the weight of a sample's class, the loss is -w x[target] for NONE, -sum(w x[target]) for SUM and
    that divided by sum(w) for MEAN. Raises IndexError for a target that is no class.
    """
    target = _checked_targets(x, target, weight)
    if x.dim() == 1:  # one sample: a batch of one
        loss, total = nll_loss(x.unsqueeze(0), target.reshape(1), weight, reduction, ignore_index)
        return (loss.squeeze(0) if reduction == NONE else loss), total
    if reduction != NONE and _compiled_nll_applies(x, target, weight):
        loss, total = x.new_empty(()), x.new_empty(())
        if kernels.loops().reproml_nll(
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
    return _reference_nll(x, target, weight, reduction, ignore_index)


def _checked_targets(x: Tensor, target: Tensor, weight: Optional[Tensor]) -> Tensor:
    """Return the targets as int64. Raises RuntimeError for operands whose shapes or dtypes do not fit."""
    fits = target.shape == x.shape[:-1] or (x.dim() == 1 and target.shape == (1,))
    if x.dim() not in (1, 2) or not fits:
        raise RuntimeError(
            f"an input of shape {list(x.shape)} takes one target a row, not {list(target.shape)}"
        )
    require_shape("the input", x, x.shape)
    require_shape("the weight", weight, x.shape[-1:])
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"the targets must be int64 or uint8, not {target.dtype}")
    return target.long()


def _compiled_nll_applies(x: Tensor, target: Tensor, weight: Optional[Tensor]) -> bool:
    """Return whether csrc/losses.c can take these tensors."""
    if x.dim() != 2 or not x.numel() or target.dtype is not torch.int64:
        return False
    if not kernels.usable(x, target):
        return False
    return weight is None or kernels.usable(weight)


def _reference_nll(
    x: Tensor, target: Tensor, weight: Optional[Tensor], reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    counted = target != ignore_index
    invalid = counted & ((target < 0) | (target >= x.shape[1]))
    if x.is_cpu and bool(invalid.any()):
        raise IndexError(f"Target {int(target[invalid][0])} is out of bounds.")
    index = torch.where(counted, target, 0)
    picked = torch.where(counted, x.gather(1, index.unsqueeze(1)).squeeze(1), 0.0)
    w = counted.float() if weight is None else torch.where(counted, weight[index], 0.0)
    if reduction == NONE:
        return torch.where(counted, -operate(torch.mul, picked, w), 0.0), x.new_zeros(())
    total = reduce_sum(w, ())
    if reduction == SUM:
        return -reduce_sum(picked, (), y=w), total
    mean = rowwise(lambda ctx, x, w: -(ctx.sum(x * w) / ctx.sum(w)), 0, picked, w)
    return mean.reshape(()), total


def nll_loss_backward(
    g: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    reduction: int,
    ignore_index: int,
    total: Tensor,
) -> Tensor:
    """Return -g w / total (MEAN) or -g w at the target, 0 elsewhere: float32 of x's shape."""
    target = _checked_targets(x, target, weight)
    each = reduction == NONE and g.dim() > 0
    require_shape("the gradient", g, target.shape if each else ())
    require_shape("the total weight", total, ())
    if _compiled_nll_applies(x, target, weight) and kernels.usable(g):
        out = torch.empty_like(x)
        divisor = float(total) if reduction == MEAN else 1.0
        if kernels.loops().reproml_nll_backward(
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
    index = torch.where(counted, row_target, 0)
    w = torch.ones_like(index, dtype=x.dtype) if weight is None else weight[index]
    if reduction == MEAN:
        value = elementwise(lambda ctx, g, w, t: -(g * w / t), g, w, total)
    else:
        value = -operate(torch.mul, g, w)
    values = torch.where(counted, value, 0.0).unsqueeze(1)
    return torch.zeros_like(rows).scatter(1, index.unsqueeze(1), values).reshape(x.shape)


def nll_loss2d(
    x: Tensor, target: Tensor, weight: Optional[Tensor], reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Compute aten.nll_loss2d_forward: nll_loss of each pixel. x [n, classes, h, w], target [n, h, w]."""
    _check_pixels(x, target)
    pixels = _pixels_as_rows(x)
    loss, total = nll_loss(pixels, target.reshape(-1), weight, reduction, ignore_index)
    return loss.reshape(target.shape) if reduction == NONE else loss, total


def nll_loss2d_backward(g: Tensor, x: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """Compute aten.nll_loss2d_backward: nll_loss_backward of each pixel."""
    _check_pixels(x, target)
    n, c, h, w = x.shape
    g = g.reshape(-1) if g.dim() else g
    flat = nll_loss_backward(g, _pixels_as_rows(x), target.reshape(-1), *rest)
    return flat.reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()


def _check_pixels(x: Tensor, target: Tensor) -> None:
    if x.dim() != 4 or target.shape != (len(x), *x.shape[2:]):
        raise RuntimeError(
            f"an input of shape {list(x.shape)} takes one target a pixel, not {list(target.shape)}"
        )


def _pixels_as_rows(x: Tensor) -> Tensor:
    """Return the pixels as rows: [n, c, h, w] -> [n * h * w, c]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
