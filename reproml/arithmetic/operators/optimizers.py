"""The steps of torch.optim: each new parameter and each new state is one formula, rounded once.

PyTorch has up to three forms of an optimizer, `for` loop, foreach and fused, which round differently, and
the first two take powers of Python floats from the C library. Within `exact()` the definition below
replaces all three (arithmetic/patches.py).

A hyperparameter h enters a formula as `float32_scalar(h)`, rounded to binary32 as PyTorch rounds any Python
number that meets a float32 tensor; 1 - h is computed before that, in binary64. (Used as it is, 0.9 would be
9/10 - 2^-55, and 0.9 m would be that close to a tie for every tenth m.) Only the bias correction of Adam
takes the betas as given.

A bfloat16 or float16 parameter has gradients and states of its dtype, to which each new value is rounded
once. Its tensors are widened to float32, which holds their numbers, for the duration of the step.

To add an optimizer `name`:

1. write its definition in optimizer_formulas.py, `name(params, grads, *states, *, hyperparameters)`, which
   updates in place; its loop, if it has one, is a case in csrc/optimizer_formulas.c;
2. add it to `_DEFINITIONS`, with the options it takes from PyTorch's functions, and to `DEFINED`;
3. add the functions of PyTorch that it replaces to OPTIMIZER_STEPS in reproml/torch_internals.py;
4. test it against real numbers in tests/arithmetic/operators/test_optimizers.py (test_other_optimizers).
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
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import devices
from reproml.arithmetic.numerics.formats import FORMATS, NARROW, rounding_to, target
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators import optimizer_formulas as formulas
from reproml.arithmetic.operators import pointwise
from reproml.arithmetic.operators.optimizer_formulas import (
    assign,
    decay_operand,
    direction_of,
    has_kernel,
    redo,
    share_no_memory,
    square,
)
from reproml.errors import NotExactError

Step = Callable[..., None]

# --- Adam, AdamW ---------------------------------------------------------------------------------

_STEP_BITS, _POWER_BITS = 160, 256


def bias_correction(beta: float, step: int) -> Fraction:
    """Return 1 - beta^step, to 160 bits (the exact power would have 53 * step bits)."""
    return Fraction(_scaled_correction(beta, step), 1 << _STEP_BITS)


def _scaled_correction(beta: float, step: int) -> int:
    """Return 2^160 (1 - beta^step), rounded.

    By squaring, in integers of 256 bits: each of the 2 log2(step) products is truncated by less than
    2^-256, which the powers that follow multiply by less than `step`.
    """
    power, square, remaining = 1 << _POWER_BITS, int(math.ldexp(beta, _POWER_BITS)), step
    while remaining:
        if remaining & 1:
            power = power * square >> _POWER_BITS
        square = square * square >> _POWER_BITS
        remaining >>= 1
    extra = _POWER_BITS - _STEP_BITS
    return ((1 << _POWER_BITS) - power + (1 << extra - 1)) >> extra


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
    """Do a step of Adam (Kingma & Ba 2015, algorithm 1) or AdamW (Loshchilov & Hutter 2019, algorithm 2).

    d = grad (+ weight_decay * param, unless decoupled);
    m' = beta1 m + (1 - beta1) d,   v' = beta2 v + (1 - beta2) d^2,   each rounded once;
    param' = param (1 - lr weight_decay, if decoupled)
             - lr / (1 - beta1^t) * m' / (sqrt(v' / (1 - beta2^t)) + eps),   rounded once.
    """
    numbers = float(lr), float(beta1), float(beta2), weight_decay
    optimizer = _adam(*numbers, decoupled_weight_decay, eps, maximize, target().container)
    compiled: dict[int, list[tuple[Tensor, ...]]] = {}  # by step, which few parameters differ in
    for i, averages in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        state = (*averages, max_exp_avg_sqs[i]) if amsgrad else averages
        if has_kernel(state) and eps >= 0:
            compiled.setdefault(steps[i], []).append(state)
        else:
            optimizer.reference_step(steps[i], *state)
    for step, states in compiled.items():
        changed = [x for p, g, *others in states for x in (p, *others)]
        for group in [states] if share_no_memory(changed) else [[state] for state in states]:
            optimizer.compiled_step(step, group)


class _Hyperparameters(NamedTuple):
    """The hyperparameters of Adam, as fractions that binary32 has, or as floats."""

    penalty: Any  # weight decay that is added to the gradient
    shrinkage: Any  # the factor of the parameter: below 1 with decoupled weight decay
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    lr: Any


class _Adam(NamedTuple):
    """Adam with given hyperparameters.

    Formulas refer to `self`, so that the compiler skips them (executor._key): the constants of a step
    would make another program for each step.
    """

    exact: _Hyperparameters
    floats: _Hyperparameters
    betas: tuple[float, float]  # as given
    sign: int  # -1 for gradients to ascend

    def reference_step(
        self, step: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor, *v_max: Tensor
    ) -> None:
        """Update one parameter, of any layout, by the reference path."""
        exact = self.exact
        correction1, correction2 = (bias_correction(beta, step) for beta in self.betas)
        direction, rate = direction_of(exact.penalty, self.sign), exact.lr / correction1

        def average(ctx: Any, p: Any, g: Any, m: Any) -> Any:
            return self.exact.beta1 * m + self.exact.one_minus_beta1 * direction(p, g)

        def average_square(ctx: Any, p: Any, g: Any, v: Any) -> Any:
            return self.exact.beta2 * v + self.exact.one_minus_beta2 * square(direction(p, g))

        def update(ctx: Any, p: Any, m: Any, v: Any) -> Any:
            denominator = ctx.sqrt(v / correction2) + self.exact.eps
            return self.exact.shrinkage * p - rate * (m / denominator)

        decayed = decay_operand(self.floats.penalty, p, g)
        assign(m, average, decayed, g, m)
        assign(v, average_square, decayed, g, v)
        if v_max:
            v = torch.maximum(v_max[0], v, out=v_max[0])
        assign(p, update, p, m, v)

    def compiled_step(self, step: int, states: list[tuple[Tensor, ...]]) -> None:
        """Update parameters in one compiled loop, which is the fast path.

        Elements that fail the rounding test fall back to the reference path. The rate and the scale have
        up to three roundings of binary64, which the loop's bound includes.
        """
        correction1, correction2 = (
            math.ldexp(_scaled_correction(beta, step), -_STEP_BITS) for beta in self.betas
        )
        floats = self.floats
        sizes = [p.numel() for p, *_ in states]
        failed = torch.empty(sum(sizes), dtype=torch.int64, device="cpu")
        missing = [0] * (5 - len(states[0]))  # the largest second average
        pointers = [p for state in states for p in (*(x.data_ptr() for x in state), *missing)]
        count = kernels.loops().reproml_adam(
            len(states),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(pointers))(*pointers),
            self.sign,
            floats.penalty,
            floats.shrinkage,
            floats.beta1,
            floats.one_minus_beta1,
            floats.beta2,
            floats.one_minus_beta2,
            floats.lr / correction1,
            1 / math.sqrt(correction2),
            floats.eps,
            failed.data_ptr(),
        )
        increment_version([x for p, g, *others in states for x in (p, *others)])
        if count < 0:  # out of memory
            for state in states:
                self.reference_step(step, *state)
        elif count:
            redo(partial(self.reference_step, step), states, failed[:count])


@lru_cache(maxsize=64)
def _adam(
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    decoupled: bool,
    eps: float,
    maximize: bool,
    container: torch.dtype,
) -> _Adam:
    exact = _Hyperparameters(
        penalty=float32_scalar(0.0 if decoupled else weight_decay),
        shrinkage=1 - float32_scalar(lr) * float32_scalar(weight_decay if decoupled else 0.0),
        beta1=float32_scalar(beta1),
        one_minus_beta1=float32_scalar(1 - beta1),
        beta2=float32_scalar(beta2),
        one_minus_beta2=float32_scalar(1 - beta2),
        eps=float32_scalar(eps),
        lr=float32_scalar(lr),
    )
    floats = _Hyperparameters(*map(float, exact))
    if floats.shrinkage == 1 != exact.shrinkage:  # csrc/optimizers.c takes a factor of 1 as exact
        floats = floats._replace(shrinkage=math.nextafter(1, 0))
    return _Adam(exact, floats, (beta1, beta2), -1 if maximize else 1)


# --- SGD -----------------------------------------------------------------------------------------


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
    """Do a step of gradient descent with momentum (Sutskever et al. 2013, as PyTorch states it).

    d = grad + weight_decay * param
    buffer' = momentum * buffer + (1 - dampening) d (in the first step: d), rounded once;
    param' = param - lr * (buffer', or d + momentum * buffer' with nesterov), rounded once.
    """
    rate, decay = float32_scalar(lr), float32_scalar(weight_decay)
    mu, fresh = float32_scalar(momentum), float32_scalar(1 - dampening)
    sign = -1 if maximize else 1
    direction = direction_of(decay, sign)

    def reference_step(first: bool, p: Tensor, g: Tensor, buffer: Optional[Tensor] = None) -> None:
        if buffer is None:
            assign(p, lambda ctx, p, g: p - rate * direction(p, g), p, g)
            return
        decayed = decay_operand(weight_decay, p, g)
        if first:
            assign(buffer, lambda ctx, p, g: direction(p, g), decayed, g)
        else:
            average = lambda ctx, p, g, b: mu * b + fresh * direction(p, g)  # noqa: E731
            assign(buffer, average, decayed, g, buffer)
        if nesterov:
            assign(p, lambda ctx, p, g, b: p - rate * (direction(p, g) + mu * b), p, g, buffer)
        else:
            assign(p, lambda ctx, p, b: p - rate * b, p, buffer)

    numbers = (nesterov, sign, float(decay), float(rate), float(mu), float(fresh))
    for i, (p, g) in enumerate(zip(params, grads)):
        buffer = buffers[i] if mu else None
        first = bool(mu) and buffer is None
        if first:
            buffer = buffers[i] = torch.zeros_like(p)
        state = (p, g) if buffer is None else (p, g, buffer)
        if not has_kernel(state):
            reference_step(first, *state)
            continue
        failed = torch.empty(p.numel(), dtype=torch.int64, device="cpu")
        count = kernels.loops().reproml_sgd(
            p.numel(),
            p.data_ptr(),
            g.data_ptr(),
            None if buffer is None else buffer.data_ptr(),
            first,
            *numbers,
            failed.data_ptr(),
        )
        increment_version([p, *state[2:]])
        if count:
            redo(partial(reference_step, first), [state], failed[:count])


# --- other formats -------------------------------------------------------------------------------


def _each_in_its_format(definition: Step) -> Step:
    """Return the step, which is defined for float32 tensors, for parameters of other dtypes too.

    It updates each parameter of 16 bits by itself, on widened copies of its tensors.
    """

    def step(*lists: Any, **options: Any) -> None:
        params = lists[0]
        if all(p.dtype is torch.float32 for p in params):
            definition(*lists, **options)
            return
        groups: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            groups.setdefault(i if p.dtype in NARROW else p.dtype, []).append(i)
        for chosen in groups.values():
            dtype = params[chosen[0]].dtype
            given = [[_widened(x[i]) for i in chosen] if x else [] for x in lists]
            with rounding_to(dtype):
                definition(*given, **options)
            for number, (old, new) in enumerate(zip(lists, given)):
                for i, x in zip(chosen, new):
                    if old[i] is None and x is not None:  # the first buffer of SGD
                        old[i] = x.to(dtype)
                    elif number != 1 and isinstance(x, Tensor) and x is not old[i]:
                        old[i].copy_(x)

    return step


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in NARROW else x


# --- what is refused -----------------------------------------------------------------------------

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_DTYPES = tuple(FORMATS)


@lru_cache(maxsize=64)
def _check_number(x: float, container: torch.dtype) -> None:
    """Raise for a number that is not finite in a dtype; it is called with the same few at every step."""
    with rounding_to(container):
        float32_scalar(x)


def _check(params: Sequence[Tensor], *others: Sequence[Optional[Tensor]]) -> None:
    """Raise NotExactError unless all tensors are ones that a definition can update: before it does."""
    for p in params:
        _check_tensor(p)
    for tensors in others:
        for p, x in zip(params, tensors):
            if x is None:  # a buffer of SGD before the first step
                continue
            _check_tensor(x)
            if x.dtype is not p.dtype and (x.dim() or x.dtype is not torch.float32):
                raise NotExactError(
                    f"The optimizer's step is defined for gradients and states of the parameter's dtype "
                    f"{p.dtype}, not of {x.dtype}; convert them or take the step out of reproml.exact()."
                )


def _check_tensor(x: Tensor) -> None:
    if x.dtype in _DTYPES and x.layout is torch.strided and type(x) in _PLAIN_TYPES:
        return
    refusal = getattr(type(x), "optimizer_refusal", None)
    if refusal is not None:
        raise NotExactError(refusal)
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise NotExactError(
            f"The optimizer's step is defined for plain tensors, not for {type(x).__name__}; "
            "take the step out of reproml.exact()."
        )
    if x.dtype not in _DTYPES or x.is_sparse:
        kind = "a sparse gradient" if x.is_sparse else f"{x.dtype}"
        raise NotExactError(
            f"The optimizer's step is defined for dense tensors of float32, bfloat16, float16 or float64, "
            f"not for {kind} of shape {list(x.shape)}; convert it or take the step out of reproml.exact()."
        )


def _refuse_unless(ok: bool, what: str) -> None:
    if not ok:
        raise NotExactError(
            f"The optimizer's step has no exact definition with {what}; leave it out."
        )


# --- what replaces PyTorch's Python functions; all forms of an optimizer take the same arguments --


def _python_step(
    definition: Step, options: str, counters: bool = True, takes_steps: bool = False
) -> Step:
    """Return the function that is called with the arguments of PyTorch's.

    options: those that the definition takes. counters: the last list counts the steps. takes_steps: the
    definition takes the counts, as integers.
    """

    names = options.split()
    formats_step = _each_in_its_format(definition)

    def step(*lists: Any, **given: Any) -> None:
        _refuse_unless(not given.get("has_complex"), "complex parameters")
        if counters:
            *lists, counts = lists  # type: ignore[assignment]
        _check(*lists)
        for container in {FORMATS[p.dtype].container for p in lists[0]}:
            for name in names:
                x = given[name]
                if isinstance(x, (int, float, Tensor)) and not isinstance(x, bool):
                    _check_number(float(x), container)  # before anything is changed
        if counters:
            for count in counts:
                count += 1
            if takes_steps:
                lists = (*lists, _integers(counts))
        try:
            formats_step(*lists, **{name: given[name] for name in names})
        except NotExactError:  # of a number that follows from the options, such as a rate
            for count in counts if counters else ():
                count -= 1
            raise

    return step


def _skips(lists: Sequence[Any], grad_scale: Any, found_inf: Any) -> bool:
    """Return whether a gradient scaler found infinities; otherwise divide the gradients by its scale.

    A fused step takes the scaler's tensors, or None for each. The quotients are rounded once.
    """
    if found_inf is not None and float(found_inf):
        return True
    if grad_scale is not None:
        params, grads = lists[:2]
        _check(params, grads)
        for g in grads:
            with rounding_to(g.dtype):
                g.copy_(pointwise.div(g, grad_scale))
    return False


def _integers(counts: Sequence[Tensor]) -> list[int]:
    """Return the integers in 0-dim tensors; those on one accelerator are read in one transfer."""
    one_device = len({x.device for x in counts}) == 1
    at_once = one_device and devices.is_on_accelerator(counts[0])
    return [int(x) for x in (torch.stack(list(counts)).tolist() if at_once else counts)]


def _checked(step: Step) -> Step:
    """Return the step, which refuses what no definition has, and which runs natively."""

    def checked(*lists: Any, **options: Any) -> None:
        grad_scale, found_inf = options.pop("grad_scale", None), options.pop("found_inf", None)
        options.pop("differentiable", None)
        _refuse_unless(not torch.is_grad_enabled(), "differentiable=True")
        with dispatcher.natively():
            if not _skips(lists, grad_scale, found_inf):
                replay_log.run_step(step, lists, options)

    return checked


_DEFINITIONS: dict[str, Step] = {
    "adam": _python_step(
        adam,
        "lr beta1 beta2 weight_decay eps amsgrad maximize decoupled_weight_decay",
        takes_steps=True,
    ),
    "sgd": _python_step(
        sgd, "lr weight_decay momentum dampening nesterov maximize", counters=False
    ),
    "rmsprop": _python_step(
        formulas.rmsprop, "lr alpha eps weight_decay momentum centered maximize"
    ),
    "adagrad": _python_step(
        formulas.adagrad, "lr weight_decay lr_decay eps maximize", takes_steps=True
    ),
    "adadelta": _python_step(formulas.adadelta, "lr rho eps weight_decay maximize"),
    "nadam": _python_step(
        formulas.nadam,
        "beta1 beta2 lr weight_decay momentum_decay eps decoupled_weight_decay maximize",
        takes_steps=True,
    ),
    "radam": _python_step(
        formulas.radam,
        "beta1 beta2 lr weight_decay eps decoupled_weight_decay maximize",
        takes_steps=True,
    ),
    "adamax": _python_step(
        formulas.adamax, "eps beta1 beta2 lr weight_decay maximize", takes_steps=True
    ),
    "asgd": _python_step(
        formulas.asgd, "lambd lr t0 alpha weight_decay maximize", takes_steps=True
    ),
    "rprop": _python_step(formulas.rprop, "step_size_min step_size_max etaminus etaplus maximize"),
    "_adafactor": _python_step(
        formulas.adafactor,
        "d lr beta2_decay weight_decay eps1 eps2 maximize",
        takes_steps=True,
    ),
}
# Module of torch.optim -> what replaces each of its OPTIMIZER_STEPS (reproml/torch_internals.py).
STEPS = {name: _checked(step) for name, step in _DEFINITIONS.items()}
# The optimizers that have a definition; all others of torch.optim are refused.
# LBFGS has no definition of its own: it consists of operators of the table, and of IEEE 754's on floats.
DEFINED = frozenset(
    "Adam AdamW SGD RMSprop Adagrad Adadelta NAdam RAdam Adamax ASGD Rprop Adafactor LBFGS".split()
)


# --- the operators of the fused form, when they are called directly (operator_table.py) -----------


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
    _check(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    if _skips((params, grads), grad_scale, found_inf):
        return
    _each_in_its_format(adam)(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        _integers(state_steps),
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
    _check(params, grads, buffers)
    if _skips((params, grads), grad_scale, found_inf):
        return
    step = _each_in_its_format(sgd)
    if is_first_step:
        firsts: list[Optional[Tensor]] = [None] * len(params)
        step(params, grads, firsts, **options)
        for buffer, first in zip(buffers, firsts):
            if first is not None:
                buffer.copy_(first)
    else:
        step(params, grads, buffers, **options)
