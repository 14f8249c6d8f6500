"""Definitions of activation functions and losses: formulas of real numbers, each rounded once.

`formula(k, x, ...)` as in ball.py. Where a branch depends on the sign of an exact operand, `k.choose`
takes it. Names are those of PyTorch's operators.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.scalars import float32_scalar

HALF = Fraction(1, 2)


# ---- activations -----------------------------------------------------------------------------------


def _phi(ctx: Any, x: Any) -> Any:
    """The normal distribution function, erfc(-x / sqrt 2) / 2."""
    return ctx.erfc(-x / ctx.sqrt(ctx.constant(Fraction(2)))) * HALF


def _density(ctx: Any, x: Any) -> Any:
    return ctx.exp(-(x * x) * HALF) / ctx.sqrt(ctx.constant(Fraction(2)) * ctx.pi)


def _gelu_inner(ctx: Any, x: Any) -> Any:
    return ctx.sqrt(2 / ctx.pi) * (x + Fraction(44715, 1000000) * (x * x * x))


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Phi(x); approximate "tanh": x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if approximate == "none":
        return elementwise(_gelu, x, reference=_reference_gelu, fast="gelu")
    # 1 + tanh(a) = 2 sigmoid(2 a)
    return elementwise(lambda ctx, x: x * ctx.sigmoid(2 * _gelu_inner(ctx, x)), x)


def _gelu(ctx: Any, x: Any) -> Any:
    return x * _phi(ctx, x)


def _gelu_backward(ctx: Any, g: Any, x: Any) -> Any:
    return g * (_phi(ctx, x) + x * _density(ctx, x))


def _reference_gelu(x: Tensor) -> Tensor:
    y = elementwise(_gelu, x.clamp(min=-15))
    # 15 Phi(-15) < 2^-150: what is beyond rounds to -0
    return torch.where(
        (x < -15) & (x > -torch.inf), -0.0, torch.where(x == -torch.inf, torch.nan, y)
    )


def gelu_backward(g: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """g times the derivative of gelu at x."""
    if approximate == "none":
        return elementwise(_gelu_backward, g, x, fast="gelu_backward")

    def formula(ctx: Any, g: Any, x: Any) -> Any:
        s = ctx.sigmoid(2 * _gelu_inner(ctx, x))
        slope = ctx.sqrt(2 / ctx.pi) * (1 + 3 * Fraction(44715, 1000000) * (x * x))
        return g * (s + 2 * x * s * (1 - s) * slope)

    return elementwise(formula, g, x)


def silu_backward(g: Tensor, x: Tensor) -> Tensor:
    """g s (1 + x (1 - s)), s = sigmoid(x)."""

    def formula(ctx: Any, g: Any, x: Any) -> Any:
        s = ctx.sigmoid(x)
        return g * (s * (1 + x * ctx.sigmoid(-x)))

    return elementwise(formula, g, x, fast="silu_backward")


def _softplus(ctx: Any, x: Any) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    return ctx.choose(x < 0, 0 * x, x) + ctx.log1p(ctx.exp(-abs(x)))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    b = float32_scalar(beta)
    y = elementwise(lambda ctx, x: _softplus(ctx, b * x) / b, x)
    return torch.where(x * float(b) > threshold, x, y)


def softplus_backward(g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    b = float32_scalar(beta)
    y = elementwise(lambda ctx, g, x: g * ctx.sigmoid(b * x), g, x)
    return torch.where(x * float(b) > threshold, g, y)


def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x))."""
    return elementwise(lambda ctx, x: x * ctx.tanh(_softplus(ctx, x)), x)


def mish_backward(g: Tensor, x: Tensor) -> Tensor:
    def formula(ctx: Any, g: Any, x: Any) -> Any:
        t = ctx.tanh(_softplus(ctx, x))
        return g * (t + x * ctx.sigmoid(x) * (1 - t * t))

    return elementwise(formula, g, x)


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """-softplus(-x), and PyTorch's buffer, which is not used."""
    return elementwise(lambda ctx, x: -_softplus(ctx, -x), x), x.new_empty(0)


def log_sigmoid_backward(g: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    return elementwise(lambda ctx, g, x: g * ctx.sigmoid(-x), g, x)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def leaky_relu_backward(g: Tensor, x: Tensor, slope: float, is_result: bool) -> Tensor:
    return torch.where(x > 0, g, g * slope)


def elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    """scale x, or scale alpha (exp(input_scale x) - 1) below 0."""
    a, s, i = float32_scalar(alpha), float32_scalar(scale), float32_scalar(input_scale)
    below = elementwise(lambda ctx, x: s * a * ctx.expm1(i * x), x.clamp(max=0))
    return torch.where(x > 0, x * float(s), below)


def celu(x: Tensor, alpha: float = 1) -> Tensor:
    """x, or alpha (exp(x / alpha) - 1) below 0."""
    return elu(x, alpha, 1, float(1 / float32_scalar(alpha)))


def elu_backward(
    g: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    a, s, i = float32_scalar(alpha), float32_scalar(scale), float32_scalar(input_scale)
    low = x.clamp(max=0)
    if is_result:  # x is elu's result y, and s a exp(i x) = y + s a
        below = elementwise(lambda ctx, g, y: g * i * (y + s * a), g, low)
    else:
        below = elementwise(lambda ctx, g, x: g * i * s * a * ctx.exp(i * x), g, low)
    return torch.where(x > 0, g * float(s), below)


def hardtanh_backward(g: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x > low) & (x < high), g, 0.0)


def hardsigmoid(x: Tensor) -> Tensor:
    """min(max(x + 3, 0), 6) / 6."""
    return elementwise(lambda ctx, x: (x + 3) / 6, x.clamp(-3, 3))


def hardsigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), elementwise(lambda ctx, g: g / 6, g), 0.0)


def hardswish(x: Tensor) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6."""
    return elementwise(lambda ctx, x, c: x * (c + 3) / 6, x, x.clamp(-3, 3))


def hardswish_backward(g: Tensor, x: Tensor) -> Tensor:
    middle = elementwise(lambda ctx, g, x: g * (2 * x + 3) / 6, g, x)
    return torch.where(x <= -3, 0.0, torch.where(x < 3, middle, g))


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, x * weight)


def prelu_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(x > 0, g, g * weight), torch.where(x > 0, 0.0, g * x)


# ---- softmax ---------------------------------------------------------------------------------------


# Elements that are -inf do not count: exp(-inf) = 0. For the definitions each is replaced by the row's
# largest, and marked; the formulas for the compiled loops (`*_of`) choose by themselves.


# ---- losses ----------------------------------------------------------------------------------------
