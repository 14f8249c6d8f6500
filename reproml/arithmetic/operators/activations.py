"""Definitions of activation functions and losses: formulas of real numbers, each rounded once.

`formula(k, x, ...)` as in ball.py. Where a branch depends on the sign of an exact operand, `k.choose`
takes it. Names are those of PyTorch's operators.
"""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic import NotExactError
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.dispatch.deferred import on_device
from reproml.arithmetic.operators.matmul import sum_over

HALF = Fraction(1, 2)


def single(x: Any) -> Fraction:
    """A Python number, rounded to binary32 as PyTorch does where it meets a float32 tensor."""
    value = ctypes.c_float(float(x)).value
    if not math.isfinite(value):
        raise NotExactError(
            f"The number {x} is not finite in float32, so nothing exact follows from it."
        )
    return Fraction(value)


def require(holds: Any, what: str) -> None:
    """Raise RuntimeError, as PyTorch does, unless `holds`: a truth value, or a bool tensor of which all are
    true. A tensor on a device, for which the host would wait, is not looked at."""
    if not isinstance(holds, Tensor):
        holds = torch.tensor(holds, device="cpu")
    if holds.is_cpu and not bool(holds.all()):
        raise RuntimeError(what)


# ---- activations -----------------------------------------------------------------------------------


def _phi(k: Any, x: Any) -> Any:
    """The normal distribution function, erfc(-x / sqrt 2) / 2."""
    return k.erfc(-x / k.sqrt(k.constant(Fraction(2)))) * HALF


def _density(k: Any, x: Any) -> Any:
    return k.exp(-(x * x) * HALF) / k.sqrt(k.constant(Fraction(2)) * k.pi)


def _gelu_inner(k: Any, x: Any) -> Any:
    return k.sqrt(2 / k.pi) * (x + Fraction(44715, 1000000) * (x * x * x))


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x); approximate "tanh": x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if approximate == "none":
        return elementwise(_gelu, x, plain=_plain_gelu, direct="gelu")
    # 1 + tanh(a) = 2 sigmoid(2 a)
    return elementwise(lambda k, x: x * k.sigmoid(2 * _gelu_inner(k, x)), x)


def _gelu(k: Any, x: Any) -> Any:
    return x * _phi(k, x)


def _gelu_backward(k: Any, g: Any, x: Any) -> Any:
    return g * (_phi(k, x) + x * _density(k, x))


def _plain_gelu(x: Tensor) -> Tensor:
    y = elementwise(_gelu, x.clamp(min=-15))
    # 15 Phi(-15) < 2^-150: what is beyond rounds to -0
    return torch.where(
        (x < -15) & (x > -torch.inf), -0.0, torch.where(x == -torch.inf, torch.nan, y)
    )


def gelu_backward(g: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """g times the derivative of gelu at x."""
    if approximate == "none":
        return elementwise(_gelu_backward, g, x, direct="gelu_backward")

    def formula(k: Any, g: Any, x: Any) -> Any:
        s = k.sigmoid(2 * _gelu_inner(k, x))
        slope = k.sqrt(2 / k.pi) * (1 + 3 * Fraction(44715, 1000000) * (x * x))
        return g * (s + 2 * x * s * (1 - s) * slope)

    return elementwise(formula, g, x)


def silu_backward(g: Tensor, x: Tensor) -> Tensor:
    """g s (1 + x (1 - s)), s = sigmoid(x)."""

    def formula(k: Any, g: Any, x: Any) -> Any:
        s = k.sigmoid(x)
        return g * (s * (1 + x * k.sigmoid(-x)))

    return elementwise(formula, g, x, direct="silu_backward")


def _softplus(k: Any, x: Any) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    return k.choose(x < 0, 0 * x, x) + k.log1p(k.exp(-abs(x)))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    b = single(beta)
    y = elementwise(lambda k, x: _softplus(k, b * x) / b, x)
    return torch.where(x * float(b) > threshold, x, y)


def softplus_backward(g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    b = single(beta)
    y = elementwise(lambda k, g, x: g * k.sigmoid(b * x), g, x)
    return torch.where(x * float(b) > threshold, g, y)


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x))."""
    return elementwise(lambda k, x: x * k.tanh(_softplus(k, x)), x)


def mish_backward(g: Tensor, x: Tensor) -> Tensor:
    def formula(k: Any, g: Any, x: Any) -> Any:
        t = k.tanh(_softplus(k, x))
        return g * (t + x * k.sigmoid(x) * (1 - t * t))

    return elementwise(formula, g, x)


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """-softplus(-x), and PyTorch's buffer, which is not used."""
    return elementwise(lambda k, x: -_softplus(k, -x), x), x.new_empty(0)


def log_sigmoid_backward(g: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return elementwise(lambda k, g, x: g * k.sigmoid(-x), g, x)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def leaky_relu_backward(g: Tensor, x: Tensor, slope: float, is_result: bool) -> Tensor:
    return torch.where(x > 0, g, g * slope)


def elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    """scale x, or scale alpha (exp(input_scale x) - 1) below 0."""
    a, s, i = single(alpha), single(scale), single(input_scale)
    below = elementwise(lambda k, x: s * a * k.expm1(i * x), x.clamp(max=0))
    return torch.where(x > 0, x * float(s), below)


def celu(x: Tensor, alpha: float = 1) -> Tensor:
    """x, or alpha (exp(x / alpha) - 1) below 0."""
    return elu(x, alpha, 1, float(1 / single(alpha)))


def elu_backward(
    g: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    a, s, i = single(alpha), single(scale), single(input_scale)
    low = x.clamp(max=0)
    if is_result:  # x is elu's result y, and s a exp(i x) = y + s a
        below = elementwise(lambda k, g, y: g * i * (y + s * a), g, low)
    else:
        below = elementwise(lambda k, g, x: g * i * s * a * k.exp(i * x), g, low)
    return torch.where(x > 0, g * float(s), below)


def hardtanh_backward(g: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x > low) & (x < high), g, 0.0)


def hardsigmoid(x: Tensor) -> Tensor:
    """min(max(x + 3, 0), 6) / 6."""
    return elementwise(lambda k, x: (x + 3) / 6, x.clamp(-3, 3))


def hardsigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), elementwise(lambda k, g: g / 6, g), 0.0)


def hardswish(x: Tensor) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6."""
    return elementwise(lambda k, x, c: x * (c + 3) / 6, x, x.clamp(-3, 3))


def hardswish_backward(g: Tensor, x: Tensor) -> Tensor:
    middle = elementwise(lambda k, g, x: g * (2 * x + 3) / 6, g, x)
    return torch.where(x <= -3, 0.0, torch.where(x < 3, middle, g))


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * weight)


def prelu_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, g, g * weight), torch.where(x > 0, 0.0, g * x)


# ---- softmax ---------------------------------------------------------------------------------------


def _shifted(k: Any, x: Any) -> Any:
    return x - k.max(x)


def _log_softmax(k: Any, x: Any, others: Any) -> Any:
    """x - max - log(1 + the sum of exp over all but the largest), so that nothing cancels."""
    d = k.difference(x, k.max(x))
    return k.plus(d, -k.log1p(k.sum(others * k.exp(d))))


def _softmax(k: Any, x: Any, present: Any) -> Any:
    e = present * k.exp(_shifted(k, x))
    return e / k.sum(e)


# Elements that are -inf do not count: exp(-inf) = 0. For the definitions each is replaced by the row's
# largest, and marked; the formulas for the compiled loops (`*_of`) choose by themselves.


def _present(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """x with each -inf replaced by the row's largest, and 0 where that was done, else 1."""
    absent = x == -torch.inf
    return torch.where(absent, x.amax(dim, keepdim=True), x), (~absent).float()


def _others(x: Tensor, present: Tensor, dim: int = -1) -> Tensor:
    """`present`, with 0 at the first largest element of each row as well."""
    if not x.dim():
        return torch.zeros_like(x)
    return present.scatter(dim, x.argmax(dim, keepdim=True), 0.0)


def _filled(k: Any, x: Any) -> tuple[Any, Any, Any]:
    """x with each -inf replaced by the row's largest, that, and where it was done."""
    top, absent = k.max(x), x.c == -math.inf
    return k.exact(k.where(absent, top.c, x.c)), top, absent


def _rest(k: Any, d: Any, absent: Any) -> Any:
    """The sum of exp(d) over all elements but one of the largest, where d = 0."""
    below, zero = d.c < 0, k.constant(0)
    ties = k.total(k.where(absent | below, 0.0, 1.0)) - 1  # whole numbers
    return k.sum(k.choose(below, k.exp(d), zero)) + k.exact(ties)


def _log_softmax_of(k: Any, x: Any) -> Any:
    filled, top, absent = _filled(k, x)
    d = k.difference(filled, top)
    y = k.plus(d, -k.log1p(_rest(k, d, absent)))
    # 0 * top: NaN, and so left to the definition, where the largest is not finite
    return k.choose(absent, k.ball(-math.inf, 0 * top.c), y)


def _check_axis(x: Tensor, dim: int) -> None:
    axes = max(x.dim(), 1)
    if not -axes <= dim < axes:
        raise IndexError(f"a tensor of shape {list(x.shape)} has no axis {dim}")


def log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    _check_axis(x, dim)
    if not x.numel():
        return x.clone()
    return rowwise(_log_softmax_of, dim, x, plain=_plain_log_softmax, direct="log_softmax")


def _plain_log_softmax(x: Tensor) -> Tensor:
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
        plain=_plain_log_softmax_backward,
        direct="log_softmax_backward",
    )


def _log_softmax_backward_of(k: Any, g: Any, y: Any) -> Any:
    return g - k.choose(y.c == -math.inf, k.constant(0), k.exp(y)) * k.sum(g)


def _plain_log_softmax_backward(g: Tensor, y: Tensor) -> Tensor:
    return rowwise(
        lambda k, g, y, present: g - present * k.exp(y) * k.sum(g),
        -1,
        g,
        torch.where(y == -torch.inf, 0.0, y),
        (y != -torch.inf).float(),
    )


def _softmax_of(k: Any, x: Any) -> Any:
    filled, top, absent = _filled(k, x)
    e = k.choose(absent, k.constant(0), k.exp(k.difference(filled, top)))  # which is mostly exact
    return e / k.sum(e)


def softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    _check_axis(x, dim)
    if not x.numel():
        return x.clone()
    return rowwise(_softmax_of, dim, x, plain=_plain_softmax, direct="softmax")


def _plain_softmax(x: Tensor) -> Tensor:
    return rowwise(_softmax, -1, *_present(x))


def safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """softmax, with zeros for a row that is -inf throughout."""
    if not x.numel():
        return x.clone()
    return rowwise(_softmax_of, dim, x, plain=_plain_safe_softmax, direct="softmax")


def _plain_safe_softmax(x: Tensor) -> Tensor:
    return torch.where((x == -torch.inf).all(-1, keepdim=True), 0.0, _plain_softmax(x))


def softmax_backward(g: Tensor, y: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """y (g - sum(g y))."""
    return rowwise(_softmax_backward, dim, g, y, direct="softmax_backward")


def _softmax_backward(k: Any, g: Any, y: Any) -> Any:
    return y * (g - k.sum(g * y))


def logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if len(dims) != 1:
        raise NotExactError(
            f"logsumexp over {len(dims)} axes has no exact definition; flatten them."
        )
    if not x.numel():
        return torch.full_like(x.sum(dims[0], keepdim=keepdim), -torch.inf)
    y = rowwise(_logsumexp_of, dims[0], x, plain=_plain_logsumexp)
    return y if keepdim or not x.dim() else y.squeeze(dims[0])


def _logsumexp_of(k: Any, x: Any) -> Any:
    filled, top, absent = _filled(k, x)
    return top + k.log1p(_rest(k, k.difference(filled, top), absent))


def _plain_logsumexp(x: Tensor) -> Tensor:
    filled, present = _present(x)
    y = rowwise(
        lambda k, x, others: k.max(x) + k.log1p(k.sum(others * k.exp(_shifted(k, x)))),
        -1,
        filled,
        _others(x, present),
    )
    return torch.where((x == -torch.inf).all(-1, keepdim=True), -torch.inf, y)


# ---- losses ----------------------------------------------------------------------------------------

NONE, MEAN, SUM = 0, 1, 2


def _reduced(formula: Callable[..., Any], reduction: int, *operands: Tensor) -> Tensor:
    """The formula's sum or mean over all elements, rounded once; or each element."""
    if reduction == NONE:
        return elementwise(formula, *operands)
    wide = torch.broadcast_tensors(*operands)
    n = wide[0].numel() if reduction == MEAN else 1
    flat = [x.reshape(-1) for x in wide]
    return rowwise(lambda k, *x: k.sum(formula(k, *x)) / n, 0, *flat).reshape(())


def _spread(formula: Callable[..., Any], reduction: int, g: Tensor, *operands: Tensor) -> Tensor:
    """g times the formula, divided by the number of elements for a mean."""
    n = torch.broadcast_tensors(*operands)[0].numel() if reduction == MEAN else 1
    return elementwise(lambda k, g, *x: g * formula(k, *x) / n, g, *operands)


def mse_loss(x: Tensor, y: Tensor, reduction: int = MEAN) -> Tensor:
    return _reduced(lambda k, x, y: (x - y) * (x - y), reduction, x, y)


def mse_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int) -> Tensor:
    return _spread(lambda k, x, y: 2 * (x - y), reduction, g, x, y)


def smooth_l1_loss(x: Tensor, y: Tensor, reduction: int = MEAN, beta: float = 1.0) -> Tensor:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, with d = x - y."""
    b = Fraction(beta)

    def formula(k: Any, x: Any, y: Any, near: Any) -> Any:
        d = abs(x - y)
        return k.choose(near < 1, d - b * HALF, d * d / (2 * b)) if b else d

    return _reduced(formula, reduction, x, y, _within(x, y, beta))


def smooth_l1_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, beta: float) -> Tensor:
    b = Fraction(beta)

    def formula(k: Any, x: Any, y: Any, near: Any, sign: Any) -> Any:
        return k.choose(near < 1, sign, (x - y) / b) if b else sign

    return _spread(formula, reduction, g, x, y, _within(x, y, beta), _sign(x, y))


def huber_loss(x: Tensor, y: Tensor, reduction: int = MEAN, delta: float = 1.0) -> Tensor:
    """d^2 / 2 where |d| <= delta, else delta (|d| - delta / 2)."""
    b = Fraction(delta)

    def formula(k: Any, x: Any, y: Any, near: Any) -> Any:
        d = abs(x - y)
        return k.choose(near < 1, b * (d - b * HALF), d * d * HALF)

    return _reduced(formula, reduction, x, y, _within(x, y, delta))


def huber_loss_backward(g: Tensor, x: Tensor, y: Tensor, reduction: int, delta: float) -> Tensor:
    b = Fraction(delta)

    def formula(k: Any, x: Any, y: Any, near: Any, sign: Any) -> Any:
        return k.choose(near < 1, b * sign, x - y)

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

    def formula(k: Any, x: Any, y: Any, w: Any, zero: Any, one: Any) -> Any:
        # where x is 0 or 1 the logarithm of a stand-in is multiplied away and -100 takes its place
        log_x = (1 - zero) * k.log(x + zero) - 100 * zero
        log_1_x = (1 - one) * k.log1p(-x * (1 - one)) - 100 * one
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

    def formula(k: Any, x: Any, y: Any, w: Any, tiny: Any) -> Any:
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

    def formula(k: Any, x: Any, y: Any, w: Any, p: Any) -> Any:
        return w * ((1 - y) * x + (1 + (p - 1) * y) * _softplus(k, -x))

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
    return rowwise(lambda k, x, w: -(k.sum(x * w) / k.sum(w)), 0, picked, w).reshape(()), total


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
        value = elementwise(lambda k, g, w, t: -(g * w / t), g, w, total)
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


def xlogy(x: Any, y: Any) -> Tensor:
    """x log y, 0 where x is 0 (unless y is NaN)."""
    device = next(t.device for t in (x, y) if isinstance(t, Tensor))
    x, y = (on_device(t if isinstance(t, Tensor) else float(t), device) for t in (x, y))
    value = elementwise(lambda k, x, y: x * k.log(y), x, torch.where(x == 0, 1.0, y))
    return torch.where(y.isnan(), y, torch.where(x == 0, 0.0, value))
