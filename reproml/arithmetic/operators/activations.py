"""Activation functions and their gradients: formulas of real numbers, each rounded once.

Functions are named like PyTorch's operators; x and g are float32 of one shape (or broadcast), and so is
the result. Where a branch depends on the sign of an operand, which is exact, `ctx.choose` selects it. A
branch that is one IEEE 754 operation is computed by PyTorch.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.compiler.direct import run_directly
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.balls import Formula
from reproml.arithmetic.numerics.formats import BINARY64, narrow, operate, reach, target
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require
from reproml.arithmetic.operators.pointwise import formula_operator

HALF = Fraction(1, 2)


# ---- derivatives of tanh and sigmoid, from the function's result y -----------------------------------

tanh_backward = formula_operator(lambda ctx, g, y: g * (1 - y * y), "tanh_backward")
sigmoid_backward = formula_operator(lambda ctx, g, y: g * y * (1 - y), "sigmoid_backward")


# ---- functions that are x / 2 near zero, x far above and 0 far below -------------------------------


def half_near_zero(formula: Formula) -> Callable[[Tensor], Tensor]:
    """Return the definition on tensors of a formula that is x / 2 + c x^2 + O(x^3), with c from 1/4 to 1.

    Where |x| < 2^-64 its value lies between x / 2 and the next binary64 number above. Half of a subnormal
    number may be a midpoint of binary32, so the latter is what rounds correctly.
    """

    def definition(x: Tensor) -> Tensor:
        tiny = (x.abs() < 2.0**-64) & (x != 0)
        half = x.double() * 0.5
        above_half = torch.nextafter(half, torch.full_like(half, torch.inf))
        return torch.where(
            tiny, narrow(above_half), elementwise(formula, torch.where(tiny, 1.0, x))
        )

    return definition


Definition = Callable[..., Tensor]


def _with_tails(definition: Definition, low: float) -> Definition:
    """Complete the definition of gelu or mish, whose formula has no bound where its exponents are large.

    Above 32 the value is x (1 - d) with 0 < d < 2^-80, which rounds to x; for binary64 that is so above 60.
    Below `low`, which is given such that the value is closer to 0 than half of the smallest number, it
    rounds to -0.
    """

    def complete(x: Tensor) -> Tensor:
        above, below = (x > max(32, reach(5))) & x.isfinite(), (x < low) & x.isfinite()
        y = definition(torch.where(above | below, 1.0, x))
        return torch.where(above, x, torch.where(below, -0.0, y))

    return complete


def _gradient_with_tails(formula: Formula, low: float) -> Definition:
    """Return the definition of g f'(x) on tensors, where f is as for `_with_tails`.

    Above 32, f' is 1 + d with |d| < 2^-80. Below `low` it lies between 0 and -2^-280.
    """

    def complete(g: Tensor, x: Tensor) -> Tensor:
        known = g.isfinite() & x.isfinite()
        above, below = (x > max(32, reach(5))) & known, (x < low) & known
        y = elementwise(formula, g, torch.where(above | below, 1.0, x))
        return torch.where(above, g, torch.where(below, -0.0 * g, y))

    return _nan_at_infinity(complete)


def _nan_at_infinity(definition: Definition) -> Definition:
    """Complete the definition of g f'(x), where an infinite x is multiplied by 0."""
    return lambda g, x: torch.where(x.isinf(), torch.nan, definition(g, x))


def _half_gradient_near_zero(definition: Definition) -> Definition:
    """Complete the definition of g f'(x) on tensors, where f'(x) is 1/2 + c x + O(x^2) with 1/4 < c < 1.

    Where |x| < 2^-64 the value lies between g / 2 and the next binary64 number, away from 0 if x > 0, else
    towards 0. Half of a subnormal number may be a midpoint of binary32, so that number rounds correctly.
    """

    def complete(g: Tensor, x: Tensor) -> Tensor:
        tiny = (x.abs() < 2.0**-64) & (x != 0) & g.isfinite()
        half = g.double() * 0.5
        end = torch.copysign(torch.where(x > 0, torch.inf, 0.0).double(), half)
        y = definition(g, torch.where(tiny, 1.0, x))
        return torch.where(tiny, narrow(torch.nextafter(half, end)), y)

    return complete


# ---- gelu --------------------------------------------------------------------------------------------


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return x Phi(x); approximate "tanh": x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    by_erf = approximate == "none"
    formula = _gelu if by_erf else _gelu_tanh
    if target() is BINARY64:
        return _nan_at_minus_infinity(_with_tails(partial(elementwise, formula), -60))(x)
    low = -15 if by_erf else -32  # 15 Phi(-15) < 2^-150
    reference = _nan_at_minus_infinity(_with_tails(half_near_zero(formula), low))
    return elementwise(formula, x, reference=reference, fast="gelu" if by_erf else "gelu_tanh")


def gelu_backward(g: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Return g times the derivative of gelu at x."""
    by_erf = approximate == "none"
    formula = _gelu_backward if by_erf else _gelu_tanh_backward
    if target() is BINARY64:
        return _gradient_with_tails(formula, -60)(g, x)
    reference = _half_gradient_near_zero(_gradient_with_tails(formula, -32))
    fast = "gelu_backward" if by_erf else "gelu_tanh_backward"
    return elementwise(formula, g, x, reference=reference, fast=fast)


def _gelu(ctx: Any, x: Any) -> Any:
    return x * _phi(ctx, x)


def _gelu_tanh(ctx: Any, x: Any) -> Any:
    return x * ctx.sigmoid(2 * _gelu_inner(ctx, x))  # 1 + tanh(a) = 2 sigmoid(2 a)


def _gelu_backward(ctx: Any, g: Any, x: Any) -> Any:
    return g * (_phi(ctx, x) + x * _density(ctx, x))


def _gelu_tanh_backward(ctx: Any, g: Any, x: Any) -> Any:
    s = ctx.sigmoid(2 * _gelu_inner(ctx, x))
    slope = ctx.sqrt(2 / ctx.pi) * (1 + 3 * Fraction(44715, 1000000) * (x * x))
    return g * (s + 2 * x * s * (1 - s) * slope)


def _phi(ctx: Any, x: Any) -> Any:
    """Return the normal distribution function, erfc(-x / sqrt 2) / 2."""
    return ctx.erfc(-x / ctx.sqrt(ctx.constant(Fraction(2)))) * HALF


def _density(ctx: Any, x: Any) -> Any:
    """Return the normal density, exp(-x^2 / 2) / sqrt(2 pi)."""
    return ctx.exp(-(x * x) * HALF) / ctx.sqrt(ctx.constant(Fraction(2)) * ctx.pi)


def _gelu_inner(ctx: Any, x: Any) -> Any:
    return ctx.sqrt(2 / ctx.pi) * (x + Fraction(44715, 1000000) * (x * x * x))


def _by_loop(
    fast: str,
    formula: Formula,
    complete: Definition,
    *operands: Tensor,
    scalars: tuple[float, ...] = (),
) -> Tensor:
    """Compute a formula by its loop in csrc, and what that leaves, and all of float64, by `complete`."""
    if target() is BINARY64:
        return complete(*operands)
    return elementwise(formula, *operands, reference=complete, fast=fast, scalars=scalars)


# ---- silu, softplus, mish, log_sigmoid ---------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x); NaN where x is minus infinity, which is multiplied by 0."""
    if target() is BINARY64:
        return _nan_at_minus_infinity(partial(elementwise, _silu))(x)
    reference = _nan_at_minus_infinity(half_near_zero(_silu))
    return elementwise(_silu, x, reference=reference, fast="silu")


def _nan_at_minus_infinity(definition: Definition) -> Definition:
    """Complete the definition of x f(x), where minus infinity is multiplied by f(x) = 0."""
    return lambda x: torch.where(x == -torch.inf, torch.nan, definition(x))


def _silu(ctx: Any, x: Any) -> Any:
    return x * ctx.sigmoid(x)


def silu_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return g s (1 + x (1 - s)) with s = sigmoid(x)."""

    def formula(ctx: Any, g: Any, x: Any) -> Any:
        s = ctx.sigmoid(x)
        return g * (s * (1 + x * ctx.sigmoid(-x)))

    complete = _nan_at_infinity(partial(elementwise, formula))
    if target() is BINARY64:
        return complete(g, x)
    reference = _half_gradient_near_zero(complete)
    return elementwise(formula, g, x, reference=reference, fast="silu_backward")


def softplus_formula(ctx: Any, x: Any) -> Any:
    """Return log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|))."""
    return ctx.choose(x < 0, 0 * x, x) + ctx.log1p(ctx.exp(-abs(x)))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Return log(1 + exp(beta x)) / beta; x itself where beta x > threshold."""
    b = float32_scalar(beta)

    def formula(ctx: Any, x: Any) -> Any:
        return softplus_formula(ctx, b * x) / b

    def complete(x: Tensor) -> Tensor:
        at_infinity = (x * float(b)).clamp(min=0) / float(b)
        y = torch.where(x.isinf(), at_infinity, elementwise(formula, x))
        return torch.where(x * float(b) > threshold, x, y)

    if b != 1 or threshold < 20:
        return complete(x)
    return _by_loop("softplus", formula, complete, x)  # above 20 it rounds to x


def softplus_backward(g: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """Return g sigmoid(beta x); g itself where beta x > threshold."""
    b = float32_scalar(beta)

    def formula(ctx: Any, g: Any, x: Any) -> Any:
        return g * ctx.sigmoid(b * x)

    def complete(g: Tensor, x: Tensor) -> Tensor:
        return torch.where(x * float(b) > threshold, g, elementwise(formula, g, x))

    if b != 1 or threshold < 20:
        return complete(g, x)
    return _by_loop("softplus_backward", formula, complete, g, x)


def mish(x: Tensor) -> Tensor:
    """Return x tanh(softplus(x))."""
    complete = _with_tails(partial(elementwise, _mish), -1024)
    return elementwise(_mish, x, reference=complete, fast="mish")


def _mish(ctx: Any, x: Any) -> Any:
    return x * ctx.tanh(softplus_formula(ctx, x))


def mish_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return g (t + x sigmoid(x) (1 - t^2)) with t = tanh(softplus(x))."""

    def formula(ctx: Any, g: Any, x: Any) -> Any:
        t = ctx.tanh(softplus_formula(ctx, x))
        return g * (t + x * ctx.sigmoid(x) * (1 - t * t))

    complete = _gradient_with_tails(formula, -1024)
    return elementwise(formula, g, x, reference=complete, fast="mish_backward")


def log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return -softplus(-x), and an empty tensor in place of PyTorch's buffer (aten.log_sigmoid_forward)."""

    def formula(ctx: Any, x: Any) -> Any:
        return -softplus_formula(ctx, -x)

    def complete(x: Tensor) -> Tensor:
        return torch.where(x == torch.inf, -0.0, elementwise(formula, x))

    return _by_loop("log_sigmoid", formula, complete, x), x.new_empty(0)


def log_sigmoid_backward(g: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    """Return g sigmoid(-x)."""
    formula: Formula = lambda ctx, g, x: g * ctx.sigmoid(-x)  # noqa: E731
    return elementwise(formula, g, x, fast="log_sigmoid_backward")


# ---- glu ---------------------------------------------------------------------------------------------


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """Return a sigmoid(b), where a and b are the halves of x along `dim`."""
    return elementwise(lambda ctx, a, b: a * ctx.sigmoid(b), *_halves(x, dim))


def glu_backward(g: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return the gradients of both halves, g sigmoid(b) and g a sigmoid(b) (1 - sigmoid(b))."""
    a, b = _halves(x, dim)
    of_a = elementwise(lambda ctx, g, b: g * ctx.sigmoid(b), g, b)
    of_b = elementwise(_glu_slope, g, a, b, reference=_glu_slope_near_zero)
    return torch.cat([of_a, of_b], dim)


def _glu_slope(ctx: Any, g: Any, a: Any, b: Any) -> Any:
    return g * a * (ctx.sigmoid(b) * ctx.sigmoid(-b))


def _glu_slope_near_zero(g: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute `_glu_slope`, which is g a / 4 (1 - b^2 / 4 + ...).

    Where |b| < 2^-64 it lies between the exact g a / 4 and the next binary64 number towards 0.
    """
    quarter = g.double() * a.double() * 0.25
    tiny = (b.abs() < 2.0**-64) & quarter.isfinite()
    below = torch.nextafter(quarter, torch.copysign(torch.zeros_like(quarter), quarter))
    y = elementwise(_glu_slope, g, a, torch.where(tiny, 1.0, b))
    return torch.where(tiny, narrow(torch.where(b == 0, quarter, below)), y)


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    require(x.dim() > 0, "glu does not support 0-dimensional tensors")
    n = x.shape[dim]
    require(n % 2 == 0, f"Halving dimension must be even, but dimension {dim} is size {n}")
    return x.narrow(dim, 0, n // 2), x.narrow(dim, n // 2, n // 2)


# ---- piecewise linear and exponential ----------------------------------------------------------------


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    """Return x, or slope * x where x <= 0."""
    y = run_directly("leaky_relu", x, scalar=slope)
    return torch.where(x > 0, x, operate(torch.mul, x, slope)) if y is None else y


def leaky_relu_backward(g: Tensor, x: Tensor, slope: float, is_result: bool) -> Tensor:
    """Return g, or slope * g where x <= 0; x may be the result of leaky_relu, which has the same sign."""
    y = run_directly("leaky_relu_backward", g, x, scalar=slope)
    return torch.where(x > 0, g, operate(torch.mul, g, slope)) if y is None else y


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """Compute aten._prelu_kernel: x, or weight * x where x <= 0."""
    y = run_directly("prelu", x, weight)
    return torch.where(x > 0, x, operate(torch.mul, x, weight)) if y is None else y


def prelu_backward(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute aten._prelu_kernel_backward: the gradients of x and, not yet summed, of weight."""
    of_x, of_weight = operate(torch.mul, g, weight), operate(torch.mul, g, x)
    return torch.where(x > 0, g, of_x), torch.where(x > 0, 0.0, of_weight)


def elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    """Return scale x, or scale alpha (exp(input_scale x) - 1) where x <= 0."""
    a, s, i = float32_scalar(alpha), float32_scalar(scale), float32_scalar(input_scale)

    def complete(x: Tensor) -> Tensor:
        below = elementwise(lambda ctx, x: s * a * ctx.expm1(i * x), x.clamp(max=0))
        return torch.where(x > 0, operate(torch.mul, x, float(s)), below)

    def formula(ctx: Any, x: Any) -> Any:
        low = ctx.choose(x < 0, x, 0 * x)
        return ctx.choose(x < 0, s * a * ctx.expm1(i * low), s * x)

    if min(a, s, i) <= 0:
        return complete(x)
    return _by_loop("elu", formula, complete, x, scalars=(float(s), float(s * a), float(i)))


def celu(x: Tensor, alpha: float = 1) -> Tensor:
    """Return x, or alpha (exp(x / alpha) - 1) where x <= 0."""
    return elu(x, alpha, 1, float(1 / float32_scalar(alpha)))


def elu_backward(
    g: Tensor, alpha: float, scale: float, input_scale: float, is_result: bool, x: Tensor
) -> Tensor:
    """Return g scale, or g input_scale scale alpha exp(input_scale x) where x <= 0.

    x is elu's input, or its result if `is_result`.
    """
    a, s, i = float32_scalar(alpha), float32_scalar(scale), float32_scalar(input_scale)

    def slope(ctx: Any, x: Any) -> Any:
        """Its slope below 0; for the result y, s a exp(i x) = y + s a."""
        return i * (x + s * a) if is_result else i * s * a * ctx.exp(i * x)

    def complete(g: Tensor, x: Tensor) -> Tensor:
        below = elementwise(lambda ctx, g, x: g * slope(ctx, x), g, x.clamp(max=0))
        return torch.where(x > 0, operate(torch.mul, g, float(s)), below)

    def formula(ctx: Any, g: Any, x: Any) -> Any:
        low = ctx.choose(x < 0, x, 0 * x)
        return ctx.choose(-x < 0, g * s, g * slope(ctx, low))

    if min(a, s, i) <= 0:
        return complete(g, x)
    scalars = float(s), float(s * a if is_result else i * s * a), float(i)
    fast = "elu_backward_of_result" if is_result else "elu_backward"
    return _by_loop(fast, formula, complete, g, x, scalars=scalars)


def softshrink(x: Tensor, bound: float = 0.5) -> Tensor:
    """Return x - bound where x > bound, x + bound where x < -bound, else a zero with x's sign."""
    require(bound >= 0, f"lambda must be greater or equal to 0, but found to be {bound}.")
    b = float(float32_scalar(bound))
    y = run_directly("softshrink", x, scalar=b)
    if y is not None:
        return y
    above, below = operate(torch.sub, x, b), operate(torch.add, x, b)
    return torch.where(x > b, above, torch.where(x < -b, below, x * 0.0))


def hardshrink(x: Tensor, bound: float = 0.5) -> Tensor:
    """Return 0 where |x| <= bound, else x."""
    return shrink_backward(x, x, bound)


def shrink_backward(g: Tensor, x: Tensor, bound: float) -> Tensor:
    """Compute aten.softshrink_backward and hardshrink_backward: 0 where |x| <= bound, else g."""
    b = float(float32_scalar(bound))
    y = run_directly("shrink_backward", g, x, scalar=b)
    return torch.where(x.abs() <= b, 0.0, g) if y is None else y


def rrelu_backward(
    g: Tensor, x: Tensor, noise: Tensor, low: float, high: float, training: bool, is_result: bool
) -> Tensor:
    """Compute aten.rrelu_with_noise_backward: g noise, or that of leaky_relu by the mean slope."""
    if training and high - low > 1e-6:
        return operate(torch.mul, g, noise)
    return leaky_relu_backward(g, x, (low + high) / 2, is_result)


def hardtanh_backward(g: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return g where low < x < high, else 0."""
    return torch.where((x > low) & (x < high), g, 0.0)


def hardsigmoid(x: Tensor) -> Tensor:
    """Return min(max(x + 3, 0), 6) / 6."""
    y = run_directly("hardsigmoid", x)
    return elementwise(lambda ctx, x: (x + 3) / 6, x.clamp(-3, 3)) if y is None else y


def hardsigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return g / 6 where -3 < x < 3, else 0."""
    y = run_directly("hardsigmoid_backward", g, x)
    if y is None:
        y = torch.where((x > -3) & (x < 3), elementwise(lambda ctx, g: g / 6, g), 0.0)
    return y


def hardswish(x: Tensor) -> Tensor:
    """Return x min(max(x + 3, 0), 6) / 6."""
    y = run_directly("hardswish", x)
    if y is None:
        y = elementwise(lambda ctx, x, c: x * (c + 3) / 6, x, x.clamp(-3, 3))
    return y


def hardswish_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return 0 where x <= -3, g (2 x + 3) / 6 where x < 3, else g."""
    y = run_directly("hardswish_backward", g, x)
    if y is not None:
        return y
    middle = elementwise(lambda ctx, g, x: g * (2 * x + 3) / 6, g, x)
    return torch.where(x <= -3, 0.0, torch.where(x < 3, middle, g))
