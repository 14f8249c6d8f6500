"""Optimizers' steps: each new parameter and each new state is one formula, rounded once.

PyTorch has up to three forms of an optimizer, `for` loop, foreach and fused, which round differently,
and the first two take powers of Python floats with the C library. While `exact()` is active all three
are this one definition. A hyperparameter h enters as `single(h)`, rounded to binary32 as PyTorch does
with any Python number that meets a float32 tensor; 1 - h is taken first, in binary64. (Were 0.9 taken
as it is, 9/10 less 2^-55, then 0.9 m would be that near a tie for each tenth m.) Only the correction
of Adam's bias takes the betas as given.
"""

from __future__ import annotations

import ctypes
import importlib
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
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import devices
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.errors import NotExactError

_STEP_BITS, _POWER_BITS = 160, 256


def bias_correction(beta: float, step: int) -> Fraction:
    """1 - beta^step, to 160 bits (the exact power would have 53 * step bits)."""
    return Fraction(_scaled_correction(beta, step), 1 << _STEP_BITS)


def _scaled_correction(beta: float, step: int) -> int:
    """2^160 (1 - beta^step), rounded.

    By squaring, in integers of 256 bits: each of the 2 log2(step) products is cut off by less than
    2^-256, which the powers that follow multiply by less than `step`.
    """
    one = 1 << _POWER_BITS
    power, square, left = one, int(math.ldexp(beta, _POWER_BITS)), step
    while left:
        if left & 1:
            power = power * square >> _POWER_BITS
        square = square * square >> _POWER_BITS
        left >>= 1
    cut = _POWER_BITS - _STEP_BITS
    return (one - power + (1 << cut - 1)) >> cut


def adam(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[int],
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1) and AdamW (Loshchilov & Hutter 2019, algorithm 2).

    d = grad (+ weight_decay * param, unless decoupled);
    m' = beta1 m + (1 - beta1) d,   v' = beta2 v + (1 - beta2) d^2,   each rounded once;
    param' = param (1 - lr weight_decay, if decoupled)
             - lr / (1 - beta1^t) * m' / (sqrt(v' / (1 - beta2^t)) + eps),   rounded once.
    """
    sign = -1 if maximize else 1
    penalty = 0.0 if decoupled_weight_decay else weight_decay
    held = weight_decay if decoupled_weight_decay else 0.0
    numbers = _adam_numbers(float(lr), float(beta1), float(beta2), penalty, held, eps)
    _check(*params, *grads, *exp_avgs, *exp_avg_sqs)
    together: dict[int, list[tuple[Tensor, ...]]] = {}  # by step; it is the same for almost all
    for i, state in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        if amsgrad:
            _adam_step(numbers, steps[i], sign, *state, max_exp_avg_sqs[i])
        elif eps >= 0 and _fits(state):
            together.setdefault(steps[i], []).append(state)
        else:
            _adam_step(numbers, steps[i], sign, *state)
    for step, states in together.items():
        for group in [states] if _apart(states) else [[state] for state in states]:
            _adam_kernel(numbers, step, sign, group)


def _fits(state: Sequence[Tensor]) -> bool:
    """Whether a compiled loop can take the tensors of one parameter."""
    return kernels.usable(*state) and all(x.shape == state[0].shape for x in state[1:])


def _apart(states: list[tuple[Tensor, ...]]) -> bool:
    """Whether no two parameters or averages share memory: else their order counts."""
    own = [x.untyped_storage().data_ptr() for p, g, m, v in states for x in (p, m, v)]
    return len(set(own)) == len(own)


def _adam_kernel(n: _AdamNumbers, step: int, sign: int, states: list[tuple[Tensor, ...]]) -> None:
    """The step of all parameters in one compiled loop, and what it leaves by definition.

    Its rate and scale have up to three roundings of binary64, which its bound has.
    """
    first, second = (
        math.ldexp(_scaled_correction(beta, step), -_STEP_BITS) for beta in (n.beta1, n.beta2)
    )
    *floats, epsilon, lr = n.floats
    sizes = [p.numel() for p, *_ in states]
    failed = torch.empty(sum(sizes), dtype=torch.int64, device="cpu")
    pointers = [x.data_ptr() for state in states for x in state]
    count = kernels.library.reproml_adam(
        len(states),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_void_p * len(pointers))(*pointers),
        sign,
        *floats,
        lr / first,
        1 / math.sqrt(second),
        epsilon,
        failed.data_ptr(),
    )
    increment_version([x for p, g, m, v in states for x in (p, m, v)])
    if count < 0:  # no memory
        for state in states:
            _adam_step(n, step, sign, *state)
    at = failed[: max(count, 0)]
    for i, state in enumerate(states) if count > 0 else ():
        own = at[at >> 40 == i] & (1 << 40) - 1
        if len(own):
            _settle(partial(_adam_step, n, step, sign), state, own)


class _AdamNumbers(NamedTuple):
    """The numbers of Adam's step that are the same at each: the fractions once more as floats."""

    decay: Fraction
    keep: Fraction
    b1: Fraction
    rest1: Fraction
    b2: Fraction
    rest2: Fraction
    epsilon: Fraction
    lr: Fraction
    beta1: float  # the betas as given
    beta2: float
    floats: tuple[float, ...]


@lru_cache(maxsize=64)
def _adam_numbers(
    lr: float, beta1: float, beta2: float, penalty: float, held: float, eps: float
) -> _AdamNumbers:
    keep = 1 - float32_scalar(lr) * float32_scalar(held)
    first = float32_scalar(penalty), keep, float32_scalar(beta1), float32_scalar(1 - beta1)
    exact = (
        *first,
        float32_scalar(beta2),
        float32_scalar(1 - beta2),
        float32_scalar(eps),
        float32_scalar(lr),
    )
    return _AdamNumbers(*exact, beta1, beta2, tuple(map(float, exact)))


def _adam_step(
    n: _AdamNumbers,
    step: int,
    sign: int,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    *v_max: Tensor,
) -> None:
    rate, correction = n.lr / bias_correction(n.beta1, step), bias_correction(n.beta2, step)
    direction = _direction(n.decay, sign)

    def moved(ctx: Any, p: Any, m: Any, v: Any) -> Any:
        return n.keep * p - rate * (m / (ctx.sqrt(v / correction) + n.epsilon))

    m.copy_(elementwise(lambda ctx, p, g, m: n.b1 * m + n.rest1 * direction(p, g), p, g, m))
    v.copy_(elementwise(lambda ctx, p, g, v: n.b2 * v + n.rest2 * square(direction(p, g)), p, g, v))
    if v_max:
        v = torch.maximum(v_max[0], v, out=v_max[0])
    p.copy_(elementwise(moved, p, m, v))


def sgd(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Optional[Tensor]],
    *,
    lr: Any,
    weight_decay: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, as PyTorch states it).

    d = grad + weight_decay * param
    buffer' = momentum * buffer + (1 - dampening) d (at first: d), rounded once;
    param' = param - lr * (buffer', or d + momentum * buffer' with nesterov), rounded once.
    """
    rate, decay, mu, fresh = (
        float32_scalar(lr),
        float32_scalar(weight_decay),
        float32_scalar(momentum),
        float32_scalar(1 - dampening),
    )
    sign = -1 if maximize else 1
    direction = _direction(decay, sign)

    def plain(p: Tensor, g: Tensor) -> None:
        p.copy_(elementwise(lambda ctx, p, g: p - rate * direction(p, g), p, g))

    def first(p: Tensor, g: Tensor, b: Tensor) -> None:
        b.copy_(elementwise(lambda ctx, p, g: direction(p, g), p, g))
        move(p, g, b)

    def later(p: Tensor, g: Tensor, b: Tensor) -> None:
        b.copy_(elementwise(lambda ctx, p, g, b: mu * b + fresh * direction(p, g), p, g, b))
        move(p, g, b)

    def move(p: Tensor, g: Tensor, b: Tensor) -> None:
        if nesterov:
            p.copy_(
                elementwise(lambda ctx, p, g, b: p - rate * (direction(p, g) + mu * b), p, g, b)
            )
        else:
            p.copy_(elementwise(lambda ctx, p, b: p - rate * b, p, b))

    numbers = (nesterov, sign, decay, rate, mu, fresh)
    for i, (p, g) in enumerate(zip(params, grads)):
        _check(p, g)
        buffer = buffers[i] if mu else None
        if not mu:
            _with_kernel("reproml_sgd", plain, [p, g, None], [0, *numbers])
        elif buffer is None:
            buffer = buffers[i] = torch.zeros_like(p)
            _with_kernel("reproml_sgd", first, [p, g, buffer], [1, *numbers])
        else:
            _check(buffer)
            _with_kernel("reproml_sgd", later, [p, g, buffer], [0, *numbers])


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
    """RMSprop (Hinton 2012; centered: Graves 2013), as PyTorch states it.

    d = grad + weight_decay * param;
    v' = alpha v + (1 - alpha) d^2 and, centered, a' = alpha a + (1 - alpha) d, each rounded once;
    u = d / (sqrt(v' - a'^2) + eps); without momentum param' = param - lr u, rounded once; else
    buffer' = momentum * buffer + u and param' = param - lr * buffer', each rounded once.
    """
    rate, keep, rest = float32_scalar(lr), float32_scalar(alpha), float32_scalar(1 - alpha)
    epsilon, mu = float32_scalar(eps), float32_scalar(momentum)
    direction = _direction(float32_scalar(weight_decay), -1 if maximize else 1)

    def update(ctx: Any, p: Any, g: Any, v: Any, a: Any) -> Any:
        return direction(p, g) / (ctx.sqrt(v - a * a if centered else v) + epsilon)

    for i, (p, g, v) in enumerate(zip(params, grads, square_avgs)):
        _check(p, g, v)
        v.copy_(
            elementwise(lambda ctx, p, g, v: keep * v + rest * square(direction(p, g)), p, g, v)
        )
        a = grad_avgs[i] if centered else v
        if centered:
            a.copy_(elementwise(lambda ctx, p, g, a: keep * a + rest * direction(p, g), p, g, a))
        if mu:
            b = buffers[i]
            b.copy_(
                elementwise(
                    lambda ctx, p, g, v, a, b: mu * b + update(ctx, p, g, v, a), p, g, v, a, b
                )
            )
            p.copy_(elementwise(lambda ctx, p, b: p - rate * b, p, b))
        else:
            p.copy_(
                elementwise(lambda ctx, p, g, v, a: p - rate * update(ctx, p, g, v, a), p, g, v, a)
            )


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
    """Adagrad (Duchi, Hazan & Singer 2011).

    d = grad + weight_decay * param;   s' = s + d^2, rounded once;
    param' = param - lr / (1 + (t - 1) lr_decay) * d / (sqrt(s') + eps), rounded once.
    """
    epsilon, direction = (
        float32_scalar(eps),
        _direction(float32_scalar(weight_decay), -1 if maximize else 1),
    )
    for p, g, s, step in zip(params, grads, state_sums, steps):
        _check(p, g, s)
        rate = float32_scalar(lr) / (1 + (step - 1) * float32_scalar(lr_decay))
        s.copy_(elementwise(lambda ctx, p, g, s: s + square(direction(p, g)), p, g, s))

        def moved(ctx: Any, p: Any, g: Any, s: Any, rate: Fraction = rate) -> Any:
            return p - rate * (direction(p, g) / (ctx.sqrt(s) + epsilon))

        p.copy_(elementwise(moved, p, g, s))


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
    """Adadelta (Zeiler 2012).

    d = grad + weight_decay * param;   v' = rho v + (1 - rho) d^2, rounded once;
    u = sqrt(a + eps) / sqrt(v' + eps) * d, rounded once;   a' = rho a + (1 - rho) u^2 and
    param' = param - lr * u, each rounded once.
    """
    rate, keep, rest, epsilon = (
        float32_scalar(lr),
        float32_scalar(rho),
        float32_scalar(1 - rho),
        float32_scalar(eps),
    )
    direction = _direction(float32_scalar(weight_decay), -1 if maximize else 1)

    def update(ctx: Any, p: Any, g: Any, v: Any, a: Any) -> Any:
        return ctx.sqrt(a + epsilon) / ctx.sqrt(v + epsilon) * direction(p, g)

    for p, g, v, a in zip(params, grads, square_avgs, acc_deltas):
        _check(p, g, v, a)
        v.copy_(
            elementwise(lambda ctx, p, g, v: keep * v + rest * square(direction(p, g)), p, g, v)
        )
        u = elementwise(update, p, g, v, a)
        a.copy_(elementwise(lambda ctx, a, u: keep * a + rest * (u * u), a, u))
        p.copy_(elementwise(lambda ctx, p, u: p - rate * u, p, u))


def square(x: Any) -> Any:
    return x * x


def _direction(decay: Fraction, sign: int) -> Callable[[Any, Any], Any]:
    """The gradient to descend: with the sign of the aim, and weight decay as a penalty."""

    def direction(p: Any, g: Any) -> Any:
        g = g if sign == 1 else -g
        return g + decay * p if decay else g

    return direction


def _with_kernel(
    name: str, step: Callable[..., None], state: Sequence[Optional[Tensor]], numbers: Sequence[Any]
) -> None:
    """The step in place: by the compiled loop, if there is one, and what it leaves by definition."""
    tensors = [x for x in state if x is not None]
    if not _fits(tensors):
        return step(*tensors)
    failed = torch.empty(tensors[0].numel(), dtype=torch.int64, device="cpu")
    pointers = [None if x is None else x.data_ptr() for x in state]
    scalars = [x if isinstance(x, (bool, int)) else float(x) for x in numbers]
    kernel = getattr(kernels.library, name)
    count = kernel(tensors[0].numel(), *pointers, *scalars, failed.data_ptr())
    increment_version([tensors[0], *tensors[2:]])
    if count:
        _settle(step, tensors, failed[:count])
    return None


def _settle(step: Callable[..., None], state: Sequence[Tensor], at: Tensor) -> None:
    """The step of the elements `at`; the second of the state is the gradient, and stays."""
    few = [x.view(-1)[at] for x in state]
    step(*few)
    for i, (x, y) in enumerate(zip(state, few)):
        if i != 1:
            x.view(-1)[at] = y


_PLAIN = (Tensor, torch.nn.Parameter)


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype is torch.float32 and x.layout is torch.strided and type(x) in _PLAIN:
            continue
        refusal = getattr(type(x), "optimizer_refusal", None)
        if refusal is not None:
            raise NotExactError(refusal)
        if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise NotExactError(
                f"The optimizer's step is defined for plain tensors, not for {type(x).__name__}; "
                "take the step out of reproml.exact()."
            )
        if x.dtype is not torch.float32 or x.is_sparse:
            kind = "a sparse gradient" if x.is_sparse else f"{x.dtype}"
            raise NotExactError(
                f"The optimizer's step is defined for dense float32 tensors, not for {kind} "
                f"of shape {list(x.shape)}; convert it or take the step out of reproml.exact()."
            )


# How PyTorch calls them: its Python functions (all three forms take the same arguments) ...


def _refuse_unless(ok: bool, what: str) -> None:
    if not ok:
        raise NotExactError(
            f"The optimizer's step has no exact definition with {what}; leave it out."
        )


def _python(
    step: Callable[..., None], names: str, counters: bool = True, steps: bool = False
) -> Callable[..., None]:
    """What PyTorch calls, with the options `names`: the last list counts the steps (`counters`), and
    goes on to the definition as whole numbers (`steps`)."""

    def called(*lists: Any, **options: Any) -> None:
        _refuse_unless(not options.get("has_complex"), "complex parameters")
        if counters:
            *lists, counted = lists  # type: ignore[assignment]
            for counter in counted:
                counter += 1
            if steps:
                lists = (*lists, _whole(counted))
        step(*lists, **{name: options[name] for name in names.split()})

    return called


def _whole(counters: Sequence[Tensor]) -> list[int]:
    """The numbers in 0-dim tensors; of those on a device the host reads all at once."""
    together = len({x.device for x in counters}) == 1 and devices.is_on_accelerator(counters[0])
    return [int(x) for x in (torch.stack(list(counters)).tolist() if together else counters)]


# ... and the operators of the fused form, when called directly.


def fused_adam(
    params: Any,
    grads: Any,
    exp_avgs: Any,
    exp_avg_sqs: Any,
    max_exp_avg_sqs: Any,
    state_steps: Any,
    *,
    decoupled: bool = False,
    grad_scale: Any = None,
    found_inf: Any = None,
    **options: Any,
) -> None:
    _refuse_unless(grad_scale is None and found_inf is None, "a gradient scaler")
    steps = _whole(state_steps)
    adam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        steps,
        decoupled_weight_decay=decoupled,
        **options,
    )


def fused_adamw(*lists: Any, **options: Any) -> None:
    fused_adam(*lists, decoupled=True, **options)


def fused_sgd(
    params: Any,
    grads: Any,
    buffers: Any,
    *,
    is_first_step: bool,
    grad_scale: Any = None,
    found_inf: Any = None,
    **options: Any,
) -> None:
    _refuse_unless(grad_scale is None and found_inf is None, "a gradient scaler")
    if is_first_step:
        firsts: list[Optional[Tensor]] = [None] * len(params)
        sgd(params, grads, firsts, **options)
        for buffer, first in zip(buffers, firsts):
            if first is not None:
                buffer.copy_(first)
    else:
        sgd(params, grads, buffers, **options)


# module of torch.optim -> the one definition of its `_single_tensor_*`, `_multi_tensor_*`, `_fused_*`
PYTHON_STEPS: dict[str, Callable[..., None]] = {
    "adam": _python(
        adam,
        "lr beta1 beta2 weight_decay eps amsgrad maximize decoupled_weight_decay",
        steps=True,
    ),
    "sgd": _python(sgd, "lr weight_decay momentum dampening nesterov maximize", counters=False),
    "rmsprop": _python(rmsprop, "lr alpha eps weight_decay momentum centered maximize"),
    "adagrad": _python(adagrad, "lr weight_decay lr_decay eps maximize", steps=True),
    "adadelta": _python(adadelta, "lr rho eps weight_decay maximize"),
}
# Optimizers whose steps take powers of Python floats with the C library: refused.
_REFUSED = ("nadam", "radam", "adamax", "asgd")

_originals: list[tuple[Any, str, Any]] = []


def _instead(
    original: Callable[..., None], step: Callable[..., None], active: Callable[[], bool]
) -> Any:
    """The exact step in a thread that is in `exact()`, PyTorch's own elsewhere."""

    def either(*lists: Any, **options: Any) -> None:
        if not active():
            return original(*lists, **options)
        scaled = options.pop("grad_scale", None), options.pop("found_inf", None)
        _refuse_unless(scaled == (None, None), "a gradient scaler")
        options.pop("differentiable", None)
        _refuse_unless(not torch.is_grad_enabled(), "differentiable=True")
        with dispatcher.natively():
            return replay_log.run_step(step, lists, options)

    return either


def _refused(name: str) -> Callable[..., None]:
    def step(*lists: Any, **options: Any) -> None:
        raise NotExactError(
            f"torch.optim's {name} has no exact definition; use Adam, AdamW or SGD."
        )

    return step


def apply(active: Callable[[], bool]) -> None:
    """Make every form of PyTorch's optimizers the definitions above."""
    steps = {**PYTHON_STEPS, **{name: _refused(name) for name in _REFUSED}}
    for name, step in steps.items():
        module = importlib.import_module(f"torch.optim.{name}")
        for form in ("_single_tensor_", "_multi_tensor_", "_fused_"):
            original = getattr(module, form + name, None)
            if original is not None:
                _originals.append((module, form + name, original))
                setattr(module, form + name, _instead(original, step, active))


def restore() -> None:
    """Undo take_over()."""
    while _originals:
        setattr(*_originals.pop())
