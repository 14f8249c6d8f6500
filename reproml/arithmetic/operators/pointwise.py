"""Arithmetic, comparisons and elementary functions of single elements, each rounded once.

Functions are named like PyTorch's operators. Tensors are float32 and broadcast together.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.direct import run_directly
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.balls import Formula
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import BINARY64, narrow, operate, reach, target
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import float32_operands
from reproml.arithmetic.operators.remainders import rounded_quotient

# ---- one IEEE 754 operation --------------------------------------------------------------------------


def add(x: Any, y: Any, alpha: float = 1) -> Tensor:
    """Return x + alpha y."""
    if alpha == 1:
        return operate(torch.add, x, y)
    a = float32_scalar(alpha)
    x, y = float32_operands(x, y)
    z = run_directly("add_scaled", x, y, scalar=float(a))
    return elementwise(lambda ctx, x, y: x + a * y, x, y) if z is None else z


def sub(x: Any, y: Any, alpha: float = 1) -> Tensor:
    """Return x - alpha y."""
    return operate(torch.sub, x, y) if alpha == 1 else add(x, y, alpha=-alpha)


def rsub(x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    """Return y - alpha x."""
    return operate(torch.ops.aten.rsub, x, y) if alpha == 1 else add(y, x, alpha=-alpha)


def mul(x: Any, y: Any) -> Tensor:
    """Return x y: one IEEE 754 operation."""
    return operate(torch.mul, x, y)


def div(x: Any, y: Any, *, rounding_mode: Optional[str] = None) -> Tensor:
    """Return x / y, never x times the reciprocal of a scalar y: on the CPU one IEEE 754 operation.

    float64 operands are divided in float64. On an accelerator the quotient is rounded to binary64 and
    then to binary32, which gives the correctly rounded quotient, because 53 >= 2 * 24 + 2 (Figueroa, ACM
    SIGNUM Newsletter 30(3), 1995).

    With a rounding_mode, it is `remainders.rounded_quotient`, or for integers PyTorch's.
    Raises NotExactError for float64 numbers then.
    """
    if rounding_mode is not None:
        if not any(_is_float(t) for t in (x, y)):
            return torch.div(x, y, rounding_mode=rounding_mode)
        x, y = float32_operands(x, y)
        return rounded_quotient(x, y, rounding_mode)
    if _is_float64(x, y):
        return torch.div(x, y)
    a, b = float32_operands(x, y)
    if a.is_cpu and b.is_cpu:
        return operate(torch.div, a, b)
    return narrow(a.double() / b.double())


def _is_float(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, Tensor) else isinstance(x, float)


def _is_float64(x: Any, y: Any) -> bool:
    """Return whether PyTorch's dtype of x / y is float64."""
    if not any(isinstance(t, Tensor) and t.dtype is not torch.float32 for t in (x, y)):
        return False
    dtype = torch.result_type(x, y)
    return (dtype if dtype.is_floating_point else torch.get_default_dtype()) is torch.float64


def reciprocal(x: Tensor) -> Tensor:
    """Return 1 / x."""
    return div(1.0, x)


def sqrt(x: Tensor) -> Tensor:
    """Return the square root: the processor's, or that of binary64, which may be wrong by an ulp, rounded.

    The root of a binary32 number has a relative distance of at least 2^-51 from every midpoint m of two
    binary32 numbers: in units in which m is an odd integer below 2^25, x is an integer too and differs
    from m^2, so |sqrt(x) - m| >= 1 / (sqrt(x) + m).
    """
    if target() is BINARY64:
        return elementwise(lambda ctx, x: ctx.sqrt(x), x)
    y = run_directly("sqrt", x)
    return narrow(x.double().sqrt()) if y is None else y


def signbit(x: Tensor) -> Tensor:
    """Return whether the sign is negative; False for NaN, whose sign depends on the machine."""
    return torch.signbit(x) & ~x.isnan()


def copysign(x: Any, y: Any) -> Tensor:
    """Return |x| with the sign of y, which is + for NaN, whose sign depends on the machine."""
    x, y = float32_operands(x, y)
    return torch.copysign(x, torch.where(y.isnan(), 1.0, y))


def allclose(
    x: Tensor, y: Tensor, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> bool:
    """Return whether |x - y| <= atol + rtol |y| for all elements, where each operation rounds."""
    if target().precision >= 24:
        return bool(torch.isclose(x, y, rtol, atol, equal_nan).all())
    close = (x == y) | (x.isnan() & y.isnan() & equal_nan)
    difference = sub(x, y).abs()
    near = difference <= add(mul(y, rtol).abs(), atol)
    return bool((close | (near & difference.isfinite())).all())


# ---- comparisons -------------------------------------------------------------------------------------


def extremum(name: str) -> Callable[..., Any]:
    """Return the definition of aten.max, min, amax or amin.

    A result that is zero is +0, because natively the order of evaluation decides between +0 and -0.
    """

    def operator(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[1], Tensor):
            return (maximum if "max" in name else minimum)(*args)
        result = getattr(torch.ops.aten, name)(*args, **kwargs)
        if not args[0].is_floating_point():
            return result
        return result + 0.0 if isinstance(result, Tensor) else (result[0] + 0.0, result[1])

    return operator


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """Return the larger of x and y, where +0 > -0 (IEEE 754-2019); native kernels disagree about zeros."""
    z = run_directly("maximum", x, y)
    return torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y)) if z is None else z


def minimum(x: Tensor, y: Tensor) -> Tensor:
    """Return the smaller of x and y, where -0 < +0."""
    z = run_directly("minimum", x, y)
    return torch.where((x == 0) & (y == 0), -((-x) + (-y)), torch.minimum(x, y)) if z is None else z


def fmax(x: Tensor, y: Tensor) -> Tensor:
    """Return the larger of x and y, where +0 > -0; the other one if one of them is NaN."""
    return torch.where(y.isnan(), x, torch.where(x.isnan(), y, maximum(x, y)))


def fmin(x: Tensor, y: Tensor) -> Tensor:
    """Return the smaller of x and y, where -0 < +0; the other one if one of them is NaN."""
    return torch.where(y.isnan(), x, torch.where(x.isnan(), y, minimum(x, y)))


def clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """Return min(max(x, low), high); NaN for a bound that is NaN, which PyTorch 2.8's clamp ignores."""
    if low is not None:
        x = maximum(x, low) if isinstance(low, Tensor) else torch.clamp_min(x, low)
    if high is not None:
        x = minimum(x, high) if isinstance(high, Tensor) else torch.clamp_max(x, high)
    return x


def clamp_min(x: Tensor, low: Any) -> Tensor:
    """Return max(x, low)."""
    return clamp(x, low)


def clamp_max(x: Tensor, high: Any) -> Tensor:
    """Return min(x, high)."""
    return clamp(x, None, high)


def clamp_gradient(x: Tensor, low: Any = None, high: Any = None) -> tuple[Any, ...]:
    """Return where x, where low and where high gets the gradient of clamp: tensors of bool.

    None stands for all of x, or for a bound that is missing. A number that equals a bound gets the
    gradient, as in PyTorch up to 2.13. Neither a NaN nor, beside one, another operand gets any.
    """
    if low is None:
        return (None, None, None) if high is None else (x <= high, None, x > high)
    if high is None:
        return x >= low, x < low, None
    inside = (x >= low) & (x <= high)
    return inside, (low < high) & (x < low), (x > high) | (high < low)


def clamp_max_gradient(x: Tensor, high: Any) -> tuple[Any, ...]:
    """Return the same of `clamp_max`."""
    return x <= high, x > high


def fmax_gradient(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    """Return the same of `fmax`: of equal numbers the first gets the gradient, as in PyTorch 2.8."""
    first = (x >= y) | y.isnan()
    return first, ~first


def fmin_gradient(x: Tensor, y: Tensor) -> tuple[Any, ...]:
    """Return the same of `fmin`."""
    first = (x <= y) | y.isnan()
    return first, ~first


# ---- formulas ----------------------------------------------------------------------------------------


def formula_operator(formula: Callable[..., Any], fast: Optional[str] = None) -> Callable[..., Any]:
    """Return an operator that is one formula of its operands, each a number or a tensor.

    fast: the name of the formula's own loop in csrc, if it has one.
    """
    return lambda *operands: elementwise(formula, *operands, fast=fast)


rsqrt = formula_operator(lambda ctx, x: 1 / ctx.sqrt(x))


def addcmul(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    """Return x + value a b."""
    v = float32_scalar(value)
    y = run_directly("addcmul", x, a, b, scalar=float(v))
    return elementwise(lambda ctx, x, a, b: x + v * a * b, x, a, b) if y is None else y


def addcdiv(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    """Return x + value a / b."""
    v = float32_scalar(value)
    y = run_directly("addcdiv", x, a, b, scalar=float(v))
    return elementwise(lambda ctx, x, a, b: x + v * a / b, x, a, b) if y is None else y


def lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    """Return x + weight (y - x)."""
    if not isinstance(weight, Tensor):
        weight = to_device(float(float32_scalar(weight)), x.device)
    z = run_directly("lerp", x, y, weight)
    if z is None:
        z = elementwise(lambda ctx, x, y, w: x + w * (y - x), x, y, weight)
    return z


def xlogy(x: Any, y: Any) -> Tensor:
    """Return x log y, where 0 log y is 0 unless y is NaN."""
    device = next(t.device for t in (x, y) if isinstance(t, Tensor))
    x, y = (to_device(t if isinstance(t, Tensor) else float(t), device) for t in (x, y))
    value = elementwise(lambda ctx, x, y: x * ctx.log(y), x, torch.where(x == 0, 1.0, y))
    return torch.where(y.isnan(), y, torch.where(x == 0, 0.0, value))


# ---- elementary functions ----------------------------------------------------------------------------


# Outside of these bounds the rounded value is that at the bound: 1, 2, infinity, 0 or -1.
_CONSTANT_BEYOND = {"tanh": (-20, 20), "exp": (-120, 100), "expm1": (-120, 100), "erfc": (-20, 100)}
_ODD = ("sin", "tanh", "erf", "erfinv", "expm1", "log1p")
_DOMAIN = {"log": (0, torch.inf), "log1p": (-1, torch.inf), "erfinv": (-1, 1)}  # NaN outside
_EVERYWHERE = (-torch.inf, torch.inf)


def within(low: float, high: float, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return function(x), and NaN outside of its domain, which only float64 finds element by element."""
    if target() is not BINARY64 or (low, high) == _EVERYWHERE:
        return function(x)
    outside = (x < low) | (x > high)
    return torch.where(outside, torch.nan, function(torch.where(outside, 0.5, x)))


def elementary_function(name: str) -> Callable[..., Any]:
    """Return an operator that is one elementary function, which every context has under this name.

    An odd function returns a zero with the sign of its argument. The loop in csrc, if the function has one
    (executor.py), has its name too.
    """
    odd = name in _ODD

    def formula(ctx: Any, x: Any) -> Any:
        y = getattr(ctx, name)(x)
        return ctx.choose(x.mid == 0, x, y) if odd else y

    def reference(x: Tensor) -> Tensor:
        if name in _CONSTANT_BEYOND:
            x = x.clamp(*map(reach, _CONSTANT_BEYOND[name]))
        value: Formula = lambda ctx, x: getattr(ctx, name)(x)  # noqa: E731
        low, high = _DOMAIN.get(name, _EVERYWHERE)
        y = within(low, high, partial(elementwise, value), x)
        return torch.where(x == 0, x, y) if odd else y

    complete = reference if odd or name in _CONSTANT_BEYOND else None

    def operator(x: Any) -> Tensor:
        (x,) = float32_operands(x)
        if target() is BINARY64:
            return reference(x)
        return elementwise(formula, x, reference=complete, fast=name)

    return operator


def nextafter(x: Tensor, y: Tensor) -> Tensor:
    """Return the number of the result's dtype next to x in the direction of y."""
    x, y = float32_operands(x, y)
    if target().precision >= 24:
        return torch.nextafter(x, y)
    x, y = torch.broadcast_tensors(x.to(target().dtype), y.to(target().dtype))
    away = torch.where((y > x) == (x > 0), 1, -1).to(torch.int16)
    neighbour = (x.contiguous().view(torch.int16) + away).view(x.dtype)
    smallest = torch.full_like(x, 2.0 ** target().lowest).copysign(y)
    neighbour = torch.where(x == 0, smallest, neighbour)
    return torch.where(x == y, y, torch.where(x.isnan() | y.isnan(), x + y, neighbour)).float()


def frexp(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return m and e with x = m 2^e and 1/2 <= |m| < 1; x and 0 if x is 0, infinite or NaN."""
    m, e = torch.frexp(x)
    ordinary = x.isfinite() & (x != 0)
    return torch.where(ordinary, m, x), torch.where(ordinary, e, 0)
