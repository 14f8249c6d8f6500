"""The steps of torch.optim that have no compiled loop, and what all definitions of a step share.

A number that depends on the step, such as a bias correction, is computed in binary64 as PyTorch writes it,
with correctly rounded powers, and rounded to binary32 where it meets a tensor. So it is the same in every
form of an optimizer and on every machine.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import target
from reproml.arithmetic.numerics.libm import power
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.norms import vector_norm
from reproml.arithmetic.operators.reductions import reduce_sum

_power = lru_cache(maxsize=256)(power)


def square(x: Any) -> Any:
    return x * x


def direction_of(decay: Fraction, sign: int) -> Callable[[Any, Any], Any]:
    """Return the formula of the gradient to descend: `sign` times the gradient, plus weight decay."""

    def direction(p: Any, g: Any) -> Any:
        g = g if sign == 1 else -g
        return g + decay * p if decay else g

    return direction


def decay_operand(decay: float, p: Tensor, g: Tensor) -> Tensor:
    """Return the operand `p` of a direction: without weight decay `g`, so that p's NaN does not count."""
    return p if decay else g


def assign(target: Tensor, formula: Callable[..., Any], *operands: Any) -> None:
    """Overwrite a tensor with the correctly rounded values of a formula."""
    target.copy_(elementwise(formula, *operands))


def _number(x: float) -> float:
    """Return a number of the step, rounded to binary32. As an operand it needs no program of its own."""
    return float(float32_scalar(x))


# --- RMSprop, Adagrad, Adadelta ------------------------------------------------------------------


def rmsprop(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    grad_avgs: list[Tensor],
    buffers: list[Tensor],
    *,
    lr: Any,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    centered: bool,
    maximize: bool,
) -> None:
    """Do a step of RMSprop (Hinton 2012; centered: Graves 2013), as PyTorch states it.

    d = grad + weight_decay * param;
    v' = alpha v + (1 - alpha) d^2 and, centered, a' = alpha a + (1 - alpha) d, each rounded once;
    u = d / (sqrt(v' - a'^2) + eps); without momentum param' = param - lr u, rounded once; else
    buffer' = momentum * buffer + u and param' = param - lr * buffer', each rounded once.
    """
    rate, keep, rest = float32_scalar(lr), float32_scalar(alpha), float32_scalar(1 - alpha)
    epsilon, mu = float32_scalar(eps), float32_scalar(momentum)
    direction = direction_of(float32_scalar(weight_decay), -1 if maximize else 1)

    def update(ctx: Any, p: Any, g: Any, v: Any, a: Any) -> Any:
        return direction(p, g) / (ctx.sqrt(v - a * a if centered else v) + epsilon)

    def accumulated_update(ctx: Any, p: Any, g: Any, v: Any, a: Any, b: Any) -> Any:
        return mu * b + update(ctx, p, g, v, a)

    for i, (p, g, v) in enumerate(zip(params, grads, square_avgs)):
        decayed = decay_operand(weight_decay, p, g)
        assign(v, lambda ctx, p, g, v: keep * v + rest * square(direction(p, g)), decayed, g, v)
        a = grad_avgs[i] if centered else v
        if centered:
            assign(a, lambda ctx, p, g, a: keep * a + rest * direction(p, g), decayed, g, a)
        if mu:
            assign(buffers[i], accumulated_update, decayed, g, v, a, buffers[i])
            assign(p, lambda ctx, p, b: p - rate * b, p, buffers[i])
        else:
            assign(p, lambda ctx, p, g, v, a: p - rate * update(ctx, p, g, v, a), p, g, v, a)


def adagrad(
    params: list[Tensor],
    grads: list[Tensor],
    state_sums: list[Tensor],
    steps: list[int],
    *,
    lr: Any,
    weight_decay: float,
    lr_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """Do a step of Adagrad (Duchi, Hazan & Singer 2011).

    d = grad + weight_decay * param;   s' = s + d^2, rounded once;
    param' = param - lr / (1 + (t - 1) lr_decay) * d / (sqrt(s') + eps), rounded once.
    """
    epsilon = float32_scalar(eps)
    direction = direction_of(float32_scalar(weight_decay), -1 if maximize else 1)
    for p, g, s, step in zip(params, grads, state_sums, steps):
        rate = float32_scalar(lr) / (1 + (step - 1) * float32_scalar(lr_decay))

        def update(ctx: Any, p: Any, g: Any, s: Any, rate: Fraction = rate) -> Any:
            return p - rate * (direction(p, g) / (ctx.sqrt(s) + epsilon))

        assign(
            s,
            lambda ctx, p, g, s: s + square(direction(p, g)),
            decay_operand(weight_decay, p, g),
            g,
            s,
        )
        assign(p, update, p, g, s)


def adadelta(
    params: list[Tensor],
    grads: list[Tensor],
    square_avgs: list[Tensor],
    acc_deltas: list[Tensor],
    *,
    lr: Any,
    rho: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Do a step of Adadelta (Zeiler 2012).

    d = grad + weight_decay * param;   v' = rho v + (1 - rho) d^2, rounded once;
    u = sqrt(a + eps) / sqrt(v' + eps) * d, rounded once;   a' = rho a + (1 - rho) u^2 and
    param' = param - lr * u, each rounded once.
    """
    rate, keep, rest = float32_scalar(lr), float32_scalar(rho), float32_scalar(1 - rho)
    epsilon = float32_scalar(eps)
    direction = direction_of(float32_scalar(weight_decay), -1 if maximize else 1)

    def update(ctx: Any, p: Any, g: Any, v: Any, a: Any) -> Any:
        return ctx.sqrt(a + epsilon) / ctx.sqrt(v + epsilon) * direction(p, g)

    for p, g, v, a in zip(params, grads, square_avgs, acc_deltas):
        decayed = decay_operand(weight_decay, p, g)
        assign(v, lambda ctx, p, g, v: keep * v + rest * square(direction(p, g)), decayed, g, v)
        u = elementwise(update, decayed, g, v, a)
        assign(a, lambda ctx, a, u: keep * a + rest * (u * u), a, u)
        assign(p, lambda ctx, p, u: p - rate * u, p, u)


# --- NAdam, RAdam, Adamax ------------------------------------------------------------------------


def _averages(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    beta1: float,
    beta2: float,
    decay: float,
    sign: int,
) -> None:
    """Update m' = beta1 m + (1 - beta1) d and v' = beta2 v + (1 - beta2) d^2, each rounded once."""
    keep1, rest1 = float32_scalar(beta1), float32_scalar(1 - beta1)
    keep2, rest2 = float32_scalar(beta2), float32_scalar(1 - beta2)
    direction = direction_of(float32_scalar(decay), sign)
    operand = decay_operand(decay, p, g)
    assign(v, lambda ctx, p, g, v: keep2 * v + rest2 * square(direction(p, g)), operand, g, v)
    assign(m, lambda ctx, p, g, m: keep1 * m + rest1 * direction(p, g), operand, g, m)


def nadam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    mu_products: list[Tensor],
    steps: list[int],
    *,
    beta1: Any,
    beta2: Any,
    lr: Any,
    weight_decay: float,
    momentum_decay: float,
    eps: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """Do a step of NAdam (Dozat 2016), as PyTorch states it.

    d = grad (+ weight_decay * param, unless decoupled);   m' and v' as for Adam, each rounded once;
    mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2);   mu_product' = mu_product * mu_t, rounded once;
    param' = param (1 - lr weight_decay, if decoupled) - (a d + b m') / (sqrt(v' / c) + eps), rounded once,
    with the numbers a = lr (1 - mu_t) / (1 - mu_product'), b = lr mu_(t+1) / (1 - mu_product' mu_(t+1)) and
    c = 1 - beta2^t.
    """
    lr, beta1, beta2 = float(lr), float(beta1), float(beta2)
    decay = 0.0 if decoupled_weight_decay else weight_decay
    shrinkage = float32_scalar(1 - lr * weight_decay if decoupled_weight_decay else 1.0)
    epsilon, sign = float32_scalar(eps), -1 if maximize else 1
    direction = direction_of(float32_scalar(decay), sign)

    def momentum(step: int) -> float:
        factor: float = beta1 * (1.0 - 0.5 * _power(0.96, step * momentum_decay))
        return factor

    def update(ctx: Any, p: Any, q: Any, g: Any, m: Any, v: Any, a: Any, b: Any, c: Any) -> Any:
        return shrinkage * p - (a * direction(q, g) + b * m) / (ctx.sqrt(v / c) + epsilon)

    for p, g, m, v, product, step in zip(params, grads, exp_avgs, exp_avg_sqs, mu_products, steps):
        _averages(p, g, m, v, beta1=beta1, beta2=beta2, decay=decay, sign=sign)
        mu, following = momentum(step), momentum(step + 1)
        assign(product, lambda ctx, x, y: x * y, product, _number(mu))
        reached = float(product)
        numbers = (
            lr * (1.0 - mu) / (1.0 - reached),
            lr * following / (1.0 - reached * following),
            1 - _power(beta2, step),
        )
        assign(p, update, p, decay_operand(decay, p, g), g, m, v, *map(_number, numbers))


def radam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[int],
    *,
    beta1: Any,
    beta2: Any,
    lr: Any,
    weight_decay: float,
    eps: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """Do a step of RAdam (Liu et al. 2020, algorithm 2), as PyTorch states it.

    d = grad (+ weight_decay * param, unless decoupled);   m' and v' as for Adam, each rounded once;
    rho = 2 / (1 - beta2) - 1,   rho_t = rho - 2 t beta2^t / (1 - beta2^t);
    param' = param (1 - lr weight_decay, if decoupled) - a m' / (sqrt(v') + eps), rounded once, where
    rho_t > 5, with the number a = lr / (1 - beta1^t) * sqrt((rho_t - 4) (rho_t - 2) rho / ((rho - 4)
    (rho - 2) rho_t)) * sqrt(1 - beta2^t); elsewhere param' = param (...) - lr / (1 - beta1^t) m'.
    """
    lr, beta1, beta2 = float(lr), float(beta1), float(beta2)
    decay = 0.0 if decoupled_weight_decay else weight_decay
    shrinkage = float32_scalar(1 - lr * weight_decay if decoupled_weight_decay else 1.0)
    epsilon, sign = float32_scalar(eps), -1 if maximize else 1
    longest = 2 / (1 - beta2) - 1

    def update(ctx: Any, p: Any, m: Any, v: Any, a: Any) -> Any:
        return shrinkage * p - a * (m / (ctx.sqrt(v) + epsilon))

    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps):
        _averages(p, g, m, v, beta1=beta1, beta2=beta2, decay=decay, sign=sign)
        power2 = _power(beta2, step)
        rate = lr / (1 - _power(beta1, step))
        length = longest - 2 * step * power2 / (1 - power2)
        if length > 5.0:
            rectification = (length - 4) * (length - 2) * longest
            rectification /= (longest - 4) * (longest - 2) * length
            rate = rate * math.sqrt(rectification) * math.sqrt(1 - power2)
            assign(p, update, p, m, v, _number(rate))
        else:
            assign(p, lambda ctx, p, m, a: shrinkage * p - a * m, p, m, _number(rate))


def adamax(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_infs: list[Tensor],
    steps: list[int],
    *,
    eps: float,
    beta1: Any,
    beta2: Any,
    lr: Any,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Do a step of Adamax (Kingma & Ba 2015, algorithm 2), as PyTorch states it.

    d = grad + weight_decay * param;   m' = beta1 m + (1 - beta1) d, rounded once;
    u' = max(beta2 u, |d| + eps), rounded once;
    param' = param - lr / (1 - beta1^t) * m' / u', rounded once.
    """
    keep, rest = float32_scalar(beta1), float32_scalar(1 - float(beta1))
    fade, epsilon = float32_scalar(beta2), float32_scalar(eps)
    direction = direction_of(float32_scalar(weight_decay), -1 if maximize else 1)
    for p, g, m, u, step in zip(params, grads, exp_avgs, exp_infs, steps):
        operand = decay_operand(weight_decay, p, g)
        assign(m, lambda ctx, p, g, m: keep * m + rest * direction(p, g), operand, g, m)
        size = elementwise(lambda ctx, p, g: abs(direction(p, g)) + epsilon, operand, g)
        torch.maximum(elementwise(lambda ctx, u: fade * u, u), size, out=u)
        rate = _number(float(lr) / (1 - _power(float(beta1), step)))
        assign(p, lambda ctx, p, m, u, a: p - a * (m / u), p, m, u, rate)


# --- ASGD, Rprop ---------------------------------------------------------------------------------


def asgd(
    params: list[Tensor],
    grads: list[Tensor],
    axs: list[Tensor],
    mus: list[Tensor],
    etas: list[Tensor],
    steps: list[int],
    *,
    lambd: float,
    lr: Any,
    t0: float,
    alpha: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Do a step of averaged gradient descent (Polyak & Juditsky 1992), as PyTorch states it.

    d = grad + weight_decay * param;   param' = param (1 - lambd eta) - eta d, rounded once;
    average' = average + mu (param' - average), rounded once;
    eta' = lr / (1 + lambd lr t)^alpha and mu' = 1 / max(1, t - t0), each rounded to binary32.
    """
    lr = float(lr)
    direction = direction_of(float32_scalar(weight_decay), -1 if maximize else 1)

    def update(ctx: Any, p: Any, q: Any, g: Any, shrinkage: Any, eta: Any) -> Any:
        return shrinkage * p - eta * direction(q, g)

    for p, g, ax, mu, eta, step in zip(params, grads, axs, mus, etas, steps):
        rate, weight = float(eta), float(mu)
        numbers = _number(1 - lambd * rate), _number(rate)
        assign(p, update, p, decay_operand(weight_decay, p, g), g, *numbers)
        if weight == 1:
            ax.copy_(p)
        else:
            assign(ax, lambda ctx, x, p, mu: x + mu * (p - x), ax, p, _number(weight))
        eta.fill_(_number(lr / _power(1 + lambd * lr * step, alpha)))
        mu.fill_(_number(1 / max(1, step - t0)))


def rprop(
    params: list[Tensor],
    grads: list[Tensor],
    prevs: list[Tensor],
    step_sizes: list[Tensor],
    *,
    step_size_min: float,
    step_size_max: float,
    etaminus: float,
    etaplus: float,
    maximize: bool,
) -> None:
    """Do a step of resilient backpropagation (Riedmiller & Braun 1993), as PyTorch states it.

    The step size is multiplied by etaplus, etaminus or 1 where the exact product of the gradient and its
    predecessor is positive, negative or zero, rounded once, and limited to the range; param' = param -
    sign(grad) * size', rounded once, and unchanged where the product is negative: there the predecessor
    becomes 0, elsewhere the gradient.
    """
    low, high = _number(step_size_min), _number(step_size_max)
    for p, g, prev, size in zip(params, grads, prevs, step_sizes):
        g = -g if maximize else g
        turned = g.sign() * prev.sign()  # the sign of a product, which could underflow
        factor = torch.where(
            turned > 0, _number(etaplus), torch.where(turned < 0, _number(etaminus), turned * 0 + 1)
        )
        assign(size, lambda ctx, x, y: x * y, size, factor)
        size.clamp_(low, high)
        g = torch.where(turned < 0, 0.0, g)
        assign(p, lambda ctx, p, s, x: p - s * x, p, g.sign(), size)
        prev.copy_(g)


# --- Adafactor -----------------------------------------------------------------------------------


def adafactor(
    params: list[Tensor],
    grads: list[Tensor],
    row_vars: list[Optional[Tensor]],
    col_vars: list[Optional[Tensor]],
    variances: list[Optional[Tensor]],
    steps: list[int],
    *,
    d: float,
    lr: Any,
    beta2_decay: float,
    weight_decay: float,
    eps1: Optional[float],
    eps2: float,
    maximize: bool,
) -> None:
    """Do a step of Adafactor (Shazeer & Stern 2018, algorithms 4 and 5), as PyTorch states it.

    w = t^beta2_decay,   rho = min(lr, 1 / sqrt(t)),   alpha = max(eps2, norm(param) / sqrt(n)) rho.
    A matrix has two factors: row' = row + w (mean of grad^2 over the row - row), column' likewise, where
    the mean and the factor are rounded once; V = row' column' / max(mean of row', eps1), rounded once. A
    vector has V' = V + w (grad^2 - V), rounded once. Then u = grad / sqrt(max(V, eps1^2)), rounded once,
    and param' = param (1 - lr weight_decay) - alpha / max(1, norm(u) / (sqrt(n) d)) u, rounded once. Norms
    and means are rounded once.
    """
    lr = float(lr)
    shrinkage = float32_scalar(1 - lr * weight_decay)
    eps1 = torch.finfo(target().container).eps if eps1 is None else eps1
    smallest, smallest_square = _number(eps1), _number(eps1 * eps1)

    def moved(ctx: Any, average: Any, target: Any, w: Any) -> Any:
        return average + w * (target - average)

    for p, g, row, column, variance, step in zip(
        params, grads, row_vars, col_vars, variances, steps
    ):
        weight = _number(_power(float(step), beta2_decay))
        rate = min(lr, 1 / math.sqrt(step)) * max(
            eps2, float(vector_norm(p)) / math.sqrt(p.numel())
        )
        if variance is None:
            assert row is not None and column is not None
            for factor, dim in ((row, -1), (column, -2)):
                squares = reduce_sum(g, [dim], True, y=g, divisor=g.shape[dim])
                assign(factor, moved, factor, squares, weight)
            scale = reduce_sum(row, [-2], True, divisor=row.shape[-2]).clamp_min(smallest)
            estimate = elementwise(lambda ctx, r, c, s: r * c / s, row, column, scale)
        else:
            assign(variance, lambda ctx, v, g, w: v + w * (g * g - v), variance, g, weight)
            estimate = variance
        u = elementwise(
            lambda ctx, g, v: g / ctx.sqrt(v),
            -g if maximize else g,
            estimate.clamp_min(smallest_square),
        )
        rate /= max(1.0, float(vector_norm(u)) / (math.sqrt(u.numel()) * d))
        assign(p, lambda ctx, p, u, a: shrinkage * p - a * u, p, u, _number(rate))
