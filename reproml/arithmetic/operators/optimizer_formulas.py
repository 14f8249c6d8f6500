"""The steps of torch.optim other than Adam and SGD, and what all definitions of a step share.

A number that depends on the step, such as a bias correction, is computed in binary64 as PyTorch writes it,
with correctly rounded powers, and rounded to binary32 where it meets a tensor. So it is the same in every
form of an optimizer and on every machine.

A step is a function of one parameter, its gradient and its states, which it updates in place. All but
Adafactor have a loop in csrc/optimizer_formulas.c, which computes the same formulas. The function computes
what the loop leaves: the elements that fail a rounding test (`_update`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import rounding_to, target
from reproml.arithmetic.numerics.libm import power
from reproml.arithmetic.numerics.rounding import nearest
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


# --- compiled loops ------------------------------------------------------------------------------

# In the order of csrc/optimizer_formulas.c.
_LOOPS = {
    name: i
    for i, name in enumerate(
        """rmsprop rmsprop_centered rmsprop_momentum rmsprop_centered_momentum adagrad adadelta
        nadam radam radam_plain adamax asgd asgd_copy rprop""".split()
    )
}
_States, _Numbers = ctypes.c_void_p * 4, ctypes.c_double * 9


def has_kernel(state: Sequence[Tensor]) -> bool:
    """Return whether a compiled loop can update one parameter, given its gradient and its states.

    Raises RuntimeError if their shapes differ.
    """
    shape = state[0].shape
    for x in state:
        if x.shape != shape:
            raise RuntimeError(
                f"a parameter of shape {list(shape)} has a gradient or a state of shape {list(x.shape)}"
            )
    return kernels.usable(*state)


def redo(
    reference_step: Callable[..., None], states: Sequence[Sequence[Tensor]], failed: Tensor
) -> None:
    """Repeat a step, which left them unchanged, for the elements that failed the rounding test.

    states: parameter, gradient and states of each parameter. failed: 2^40 times the parameter's number
    plus the element's flat index.
    """
    for i, (p, g, *others) in enumerate(states):
        index = failed[failed >> 40 == i] & (1 << 40) - 1
        if len(index):
            few = [x.view(-1)[index] for x in (p, g, *others)]
            reference_step(*few)
            for x, y in zip((p, *others), (few[0], *few[2:])):
                x.view(-1)[index] = y


def share_no_memory(state: Sequence[Tensor]) -> bool:
    """Return whether the tensors share no memory; if they do, the order of formulas counts."""
    return len({x.untyped_storage().data_ptr() for x in state}) == len(state)


def _update(
    loop: str,
    reference_step: Callable[..., None],
    state: Sequence[Tensor],
    numbers: Sequence[Any],
    decay: Any = 0,
    sign: int = 1,
) -> None:
    """Do a step by a compiled loop, and by `reference_step(*state)` for what it leaves.

    state: parameter, gradient and states. numbers: the constants of the loop; decay: weight decay that is
    added to the gradient; all binary32 numbers. sign: -1 for gradients to ascend.
    """
    p, g, *others = state
    if not (has_kernel(state) and kernels.binary32_loops() and share_no_memory(state)):
        return reference_step(*state)
    failed = torch.empty(p.numel(), dtype=torch.int64, device="cpu")
    count = kernels.library.reproml_optimizer_step(
        _LOOPS[loop],
        p.numel(),
        _States(p.data_ptr(), *[x.data_ptr() for x in others]),
        g.data_ptr(),
        sign,
        float(decay),
        _Numbers(*map(float, numbers)),
        failed.data_ptr(),
    )
    increment_version([p, *others])
    if count:
        redo(reference_step, [state], failed[:count])


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
    epsilon, mu, decay = float32_scalar(eps), float32_scalar(momentum), float32_scalar(weight_decay)
    sign = -1 if maximize else 1
    direction = direction_of(decay, sign)

    def update(ctx: Any, p: Any, g: Any, v: Any, a: Any) -> Any:
        return direction(p, g) / (ctx.sqrt(v - a * a if centered else v) + epsilon)

    def accumulated_update(ctx: Any, p: Any, g: Any, v: Any, a: Any, b: Any) -> Any:
        return mu * b + update(ctx, p, g, v, a)

    def step(p: Tensor, g: Tensor, v: Tensor, *others: Tensor) -> None:
        decayed = decay_operand(weight_decay, p, g)
        assign(v, lambda ctx, p, g, v: keep * v + rest * square(direction(p, g)), decayed, g, v)
        a = others[0] if centered else v
        if centered:
            assign(a, lambda ctx, p, g, a: keep * a + rest * direction(p, g), decayed, g, a)
        if mu:
            b = others[-1]
            assign(b, accumulated_update, decayed, g, v, a, b)
            assign(p, lambda ctx, p, b: p - rate * b, p, b)
        else:
            assign(p, lambda ctx, p, g, v, a: p - rate * update(ctx, p, g, v, a), p, g, v, a)

    loop = "rmsprop" + "_centered" * centered + "_momentum" * bool(mu)
    for i, state in enumerate(map(list, zip(params, grads, square_avgs))):
        if centered:
            state.append(grad_avgs[i])
        if mu:
            state.append(buffers[i])
        _update(loop, step, state, (rate, keep, rest, epsilon, mu), decay, sign)


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
    epsilon, decay = float32_scalar(eps), float32_scalar(weight_decay)
    sign = -1 if maximize else 1
    direction = direction_of(decay, sign)

    def step(rate: Fraction, p: Tensor, g: Tensor, s: Tensor) -> None:
        def update(ctx: Any, p: Any, g: Any, s: Any) -> Any:
            return p - rate * (direction(p, g) / (ctx.sqrt(s) + epsilon))

        decayed = decay_operand(weight_decay, p, g)
        assign(s, lambda ctx, p, g, s: s + square(direction(p, g)), decayed, g, s)
        assign(p, update, p, g, s)

    for *state, count in zip(params, grads, state_sums, steps):
        rate = float32_scalar(lr) / (1 + (count - 1) * float32_scalar(lr_decay))
        _update("adagrad", partial(step, rate), state, (rate, epsilon), decay, sign)


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
    epsilon, decay = float32_scalar(eps), float32_scalar(weight_decay)
    sign = -1 if maximize else 1
    direction = direction_of(decay, sign)

    def update(ctx: Any, p: Any, g: Any, v: Any, a: Any) -> Any:
        return ctx.sqrt(a + epsilon) / ctx.sqrt(v + epsilon) * direction(p, g)

    def step(p: Tensor, g: Tensor, v: Tensor, a: Tensor) -> None:
        decayed = decay_operand(weight_decay, p, g)
        assign(v, lambda ctx, p, g, v: keep * v + rest * square(direction(p, g)), decayed, g, v)
        u = elementwise(update, decayed, g, v, a)
        assign(a, lambda ctx, a, u: keep * a + rest * (u * u), a, u)
        assign(p, lambda ctx, p, u: p - rate * u, p, u)

    for state in zip(params, grads, square_avgs, acc_deltas):
        _update("adadelta", step, state, (rate, keep, rest, epsilon), decay, sign)


# --- NAdam, RAdam, Adamax ------------------------------------------------------------------------


class _Averages(NamedTuple):
    """The two averages of Adam, with a weight decay that is part of the direction, or decoupled."""

    keep1: Fraction
    rest1: Fraction
    keep2: Fraction
    rest2: Fraction
    shrinkage: Fraction  # the factor of the parameter
    decay: Fraction
    sign: int

    def operand(self, p: Tensor, g: Tensor) -> Tensor:
        return p if self.decay else g

    def update(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        """m' = beta1 m + (1 - beta1) d and v' = beta2 v + (1 - beta2) d^2, each rounded once."""
        keep1, rest1, keep2, rest2, _, decay, sign = self
        direction, operand = direction_of(decay, sign), self.operand(p, g)
        assign(v, lambda ctx, p, g, v: keep2 * v + rest2 * square(direction(p, g)), operand, g, v)
        assign(m, lambda ctx, p, g, m: keep1 * m + rest1 * direction(p, g), operand, g, m)


def _averages(
    lr: float, beta1: float, beta2: float, weight_decay: float, decoupled: bool, maximize: bool
) -> _Averages:
    return _Averages(
        keep1=float32_scalar(beta1),
        rest1=float32_scalar(1 - beta1),
        keep2=float32_scalar(beta2),
        rest2=float32_scalar(1 - beta2),
        shrinkage=float32_scalar(1 - lr * weight_decay if decoupled else 1.0),
        decay=float32_scalar(0.0 if decoupled else weight_decay),
        sign=-1 if maximize else 1,
    )


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
    of = _averages(lr, beta1, beta2, weight_decay, decoupled_weight_decay, maximize)
    epsilon, shrinkage, direction = (
        float32_scalar(eps),
        of.shrinkage,
        direction_of(of.decay, of.sign),
    )

    def momentum(step: int) -> float:
        factor: float = beta1 * (1.0 - 0.5 * _power(0.96, step * momentum_decay))
        return factor

    def update(ctx: Any, p: Any, q: Any, g: Any, m: Any, v: Any, a: Any, b: Any, c: Any) -> Any:
        return shrinkage * p - (a * direction(q, g) + b * m) / (ctx.sqrt(v / c) + epsilon)

    def step(a: float, b: float, c: float, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        of.update(p, g, m, v)
        assign(p, update, p, of.operand(p, g), g, m, v, a, b, c)

    for *state, product, count in zip(params, grads, exp_avgs, exp_avg_sqs, mu_products, steps):
        mu, following = momentum(count), momentum(count + 1)
        with rounding_to(product.dtype):
            assign(product, lambda ctx, x, y: x * y, product, _number(mu))
        reached = float(product)
        a = _number(lr * (1.0 - mu) / (1.0 - reached))
        b = _number(lr * following / (1.0 - reached * following))
        c = _number(1 - _power(beta2, count))
        _update(
            "nadam", partial(step, a, b, c), state, (*of[:5], b, epsilon, a, c), of.decay, of.sign
        )


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
    of = _averages(lr, beta1, beta2, weight_decay, decoupled_weight_decay, maximize)
    epsilon, shrinkage = float32_scalar(eps), of.shrinkage
    longest = 2 / (1 - beta2) - 1

    def update(ctx: Any, p: Any, m: Any, v: Any, a: Any) -> Any:
        return shrinkage * p - a * (m / (ctx.sqrt(v) + epsilon))

    def step(rectified: bool, rate: float, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> None:
        of.update(p, g, m, v)
        if rectified:
            assign(p, update, p, m, v, rate)
        else:
            assign(p, lambda ctx, p, m, a: shrinkage * p - a * m, p, m, rate)

    for *state, count in zip(params, grads, exp_avgs, exp_avg_sqs, steps):
        power2 = _power(beta2, count)
        rate = lr / (1 - _power(beta1, count))
        length = longest - 2 * count * power2 / (1 - power2)
        rectified = length > 5.0
        if rectified:
            rectification = (length - 4) * (length - 2) * longest
            rectification /= (longest - 4) * (longest - 2) * length
            rate = rate * math.sqrt(rectification) * math.sqrt(1 - power2)
        rate = _number(rate)
        loop = "radam" if rectified else "radam_plain"
        numbers = (*of[:5], rate, epsilon)
        _update(loop, partial(step, rectified, rate), state, numbers, of.decay, of.sign)


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
    fade, epsilon, decay = float32_scalar(beta2), float32_scalar(eps), float32_scalar(weight_decay)
    sign = -1 if maximize else 1
    direction = direction_of(decay, sign)

    def step(rate: float, p: Tensor, g: Tensor, m: Tensor, u: Tensor) -> None:
        operand = decay_operand(weight_decay, p, g)
        assign(m, lambda ctx, p, g, m: keep * m + rest * direction(p, g), operand, g, m)
        size = elementwise(lambda ctx, p, g: abs(direction(p, g)) + epsilon, operand, g)
        torch.maximum(elementwise(lambda ctx, u: fade * u, u), size, out=u)
        assign(p, lambda ctx, p, m, u, a: p - a * (m / u), p, m, u, rate)

    for *state, count in zip(params, grads, exp_avgs, exp_infs, steps):
        rate = _number(float(lr) / (1 - _power(float(beta1), count)))
        _update(
            "adamax", partial(step, rate), state, (keep, rest, fade, epsilon, rate), decay, sign
        )


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
    lr, sign = float(lr), -1 if maximize else 1
    decay = float32_scalar(weight_decay)
    direction = direction_of(decay, sign)

    def update(ctx: Any, p: Any, q: Any, g: Any, shrinkage: Any, eta: Any) -> Any:
        return shrinkage * p - eta * direction(q, g)

    def step(
        shrinkage: float, rate: float, weight: float, p: Tensor, g: Tensor, ax: Tensor
    ) -> None:
        assign(p, update, p, decay_operand(weight_decay, p, g), g, shrinkage, rate)
        if weight == 1:
            ax.copy_(p)
        else:
            assign(ax, lambda ctx, x, p, mu: x + mu * (p - x), ax, p, weight)

    for *state, mu, eta, count in zip(params, grads, axs, mus, etas, steps):
        rate, weight = float(eta), float(mu)
        numbers = _number(1 - lambd * rate), _number(rate), _number(weight)
        loop = "asgd_copy" if weight == 1 else "asgd"
        _update(loop, partial(step, *numbers), state, numbers, decay, sign)
        eta.fill_(_number(lr / _power(1 + lambd * lr * count, alpha)))
        mu.fill_(_number(1 / max(1, count - t0)))


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
    low, high, down, up = (  # which PyTorch converts to the dtype
        nearest(Fraction(x)) for x in (step_size_min, step_size_max, etaminus, etaplus)
    )

    def step(p: Tensor, g: Tensor, prev: Tensor, size: Tensor) -> None:
        g = -g if maximize else g
        turned = g.sign() * prev.sign()  # the sign of a product, which could underflow
        factor = torch.where(turned > 0, up, torch.where(turned < 0, down, turned * 0 + 1))
        assign(size, lambda ctx, x, y: x * y, size, factor)
        size.clamp_(low, high)
        g = torch.where(turned < 0, 0.0, g)
        assign(p, lambda ctx, p, s, x: p - s * x, p, g.sign(), size)
        prev.copy_(g)

    numbers = up, down, low, high
    for state in zip(params, grads, prevs, step_sizes):
        _update("rprop", step, state, numbers, sign=-1 if maximize else 1)


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
    eps1 = torch.finfo(target().dtype).eps if eps1 is None else eps1
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
