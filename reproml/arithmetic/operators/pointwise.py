"""Arithmetic, comparisons and elementary functions of single elements, each rounded once."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import float32_operands
from reproml.errors import NotExactError


def power(x: Any, exponent: Any) -> Tensor:
    """x^exponent for a number as the exponent: a product where it is whole, else exp(exponent log x)."""
    if isinstance(x, Tensor) and not isinstance(exponent, Tensor):
        p = float32_scalar(exponent)
        if p == 2:
            return x * x
        if p == 0:
            return torch.ones_like(x)
        if p.denominator == 1 and abs(p) <= 64:
            return elementwise(lambda ctx, x: _whole_power(x, int(p)), x)
        y = elementwise(lambda ctx, x: ctx.exp(p * ctx.log(x)), torch.where(x > 0, x, 1.0))
        at_zero = torch.where(x == 0, 0.0 if p > 0 else torch.inf, torch.nan)
        return torch.where(x > 0, y, at_zero)
    raise NotExactError("A power whose exponent is a tensor has no exact definition; use a number.")


def _whole_power(x: Any, n: int) -> Any:
    if n < 0:
        return 1 / _whole_power(x, -n)
    y = x
    for _ in range(n - 1):
        y = y * x
    return y


def addcmul(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    v = float32_scalar(value)
    return elementwise(lambda ctx, x, a, b: x + v * a * b, x, a, b)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    v = float32_scalar(value)
    return elementwise(lambda ctx, x, a, b: x + v * a / b, x, a, b)


def lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    """x + weight (y - x)."""
    w = weight if isinstance(weight, Tensor) else float(float32_scalar(weight))
    return elementwise(lambda ctx, x, y, w: x + w * (y - x), x, y, w)


def xlogy(x: Any, y: Any) -> Tensor:
    """x log y, 0 where x is 0 (unless y is NaN)."""
    device = next(t.device for t in (x, y) if isinstance(t, Tensor))
    x, y = (to_device(t if isinstance(t, Tensor) else float(t), device) for t in (x, y))
    value = elementwise(lambda ctx, x, y: x * ctx.log(y), x, torch.where(x == 0, 1.0, y))
    return torch.where(y.isnan(), y, torch.where(x == 0, 0.0, value))


# Beyond these ends the rounded value is that at the end: 1, infinity, 0 or -1.
_FLAT = {"tanh": (-20, 20), "exp": (-120, 100), "expm1": (-120, 100)}


_ODD = ("sin", "tanh", "erf", "erfinv", "expm1", "log1p")


def elementary_function(name: str) -> Callable[..., Any]:
    """An operator that is one function of a field; an odd one keeps the sign of a zero."""

    odd = name in _ODD

    def formula(ctx: Any, x: Any) -> Any:
        y = getattr(ctx, name)(x)
        return ctx.choose(x.mid == 0, x, y) if odd else y

    def reference(x: Tensor) -> Tensor:
        if name in _FLAT:
            x = x.clamp(*_FLAT[name])
        y = elementwise(lambda ctx, x: getattr(ctx, name)(x), x)
        return torch.where(x == 0, x, y) if odd else y

    fast = name if name in ("exp", "expm1", "tanh", "sigmoid") else None
    return lambda x: elementwise(formula, *float32_operands(x), reference=reference, fast=fast)


def formula_operator(formula: Callable[..., Any], fast: Optional[str] = None) -> Callable[..., Any]:
    """An operator that is one formula of its operands, all of them numbers or tensors."""
    return lambda *operands: elementwise(formula, *operands, fast=fast)


def add(x: Any, y: Any, alpha: float = 1) -> Tensor:
    if alpha == 1:
        return torch.add(x, y)  # one IEEE 754 operation
    a = float32_scalar(alpha)
    return elementwise(lambda ctx, x, y: x + a * y, *float32_operands(x, y))


def sub(x: Any, y: Any, alpha: float = 1) -> Tensor:
    return torch.sub(x, y) if alpha == 1 else add(x, y, alpha=-alpha)


def rsub(x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    return torch.ops.aten.rsub(x, y) if alpha == 1 else add(y, x, alpha=-alpha)


def div(x: Any, y: Any, *, rounding_mode: Optional[str] = None) -> Tensor:
    """x / y, never by a scalar's reciprocal: on the CPU one IEEE 754 operation.

    A quotient of binary32 numbers that is rounded to binary64 first rounds twice without harm, as
    53 >= 2 * 24 + 2 (Figueroa, ACM SIGNUM Newsletter 30(3), 1995).
    """
    if rounding_mode is not None:
        raise NotExactError(
            f"A division with rounding_mode={rounding_mode!r} has no exact definition."
        )
    a, b = float32_operands(x, y)
    if a.is_cpu and b.is_cpu:
        return torch.div(a, b)
    return (a.double() / b.double()).float()


def sqrt(x: Tensor) -> Tensor:
    """The binary64 root may be an ulp wrong: a root of a binary32 number stays 2^-51 away (relatively)
    from every midpoint m. In units in which m is an odd integer below 2^25, x is one too and not m^2, so
    |sqrt(x) - m| >= 1 / (sqrt(x) + m)."""
    return x.double().sqrt().float()


def maximum(x: Tensor, y: Tensor) -> Tensor:
    """The larger, +0 before -0 (IEEE 754-2019): native kernels differ in this."""
    return torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y))


def minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x == 0) & (y == 0), -((-x) + (-y)), torch.minimum(x, y))


def clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """min(max(x, low), high)."""
    if low is not None:
        x = maximum(x, low) if isinstance(low, Tensor) else torch.clamp(x, min=low)
    if high is not None:
        x = minimum(x, high) if isinstance(high, Tensor) else torch.clamp(x, max=high)
    return x


def extreme(name: str) -> Callable[..., Any]:
    """max, min, amax and amin; a zero is +0, as the order decides between 0 and -0 natively."""

    def extreme(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[1], Tensor):
            return (maximum if "max" in name else minimum)(*args)
        result = getattr(torch.ops.aten, name)(*args, **kwargs)
        if not args[0].is_floating_point():
            return result
        return result + 0.0 if isinstance(result, Tensor) else (result[0] + 0.0, result[1])

    return extreme
