"""Elementary and special functions that are formulas of those of a context, each rounded once.

Functions are named like PyTorch's operators. Tensors are float32 and broadcast together. Arguments at which
a formula has no value (poles, infinities) are replaced before it, and their limits filled in after it.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.balls import Formula
from reproml.arithmetic.numerics.formats import BINARY64, operate, reach, target
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.numerics.special import lgamma_near_zero
from reproml.arithmetic.operators.arguments import float32_operands, require
from reproml.arithmetic.operators.pointwise import within
from reproml.arithmetic.operators.special import higher_polygamma

_HALF = Fraction(1, 2)
_PI = 3.141592653589793


def odd_function(
    formula: Formula, bound: Optional[float] = None, end: float = torch.inf
) -> Callable[[Any], Tensor]:
    """Return the operator of an odd function, whose zero has the sign of its argument.

    bound: beyond it the value rounds like that at the bound. end: the largest number of its domain.
    """

    def operator(x: Any) -> Tensor:
        (x,) = float32_operands(x)
        x = x if bound is None else x.clamp(-reach(bound), reach(bound))
        y = within(-end, end, partial(elementwise, formula), x)
        return torch.where(x == 0, x, y)

    return operator


def _function(formula: Formula, low: float, high: float = torch.inf) -> Callable[[Any], Tensor]:
    """Return the operator of a function from `low` to `high`."""
    return lambda x: within(low, high, partial(elementwise, formula), *float32_operands(x))


# ---- exponentials and logarithms ---------------------------------------------------------------------


def exp2(x: Any) -> Tensor:
    """Return 2^x."""
    (x,) = float32_operands(x)
    return elementwise(lambda ctx, x: ctx.exp(x * ctx.ln2), x.clamp(-reach(200), reach(200)))


log2 = _function(lambda ctx, x: ctx.log(x) / ctx.ln2, 0)
log10 = _function(lambda ctx, x: ctx.log(x) / ctx.ln10, 0)


def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """Return log(exp(x) + exp(y))."""
    return _log_of_sum(x, y, lambda ctx, d: ctx.log1p(ctx.exp(-d)))


def logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    """Return log2(2^x + 2^y), which is x + 1 where x = y."""
    equal = x == y
    x, y = torch.where(equal, operate(torch.add, x, 1.0), x), torch.where(equal, -torch.inf, y)
    return _log_of_sum(x, y, lambda ctx, d: ctx.log1p(ctx.exp(-d * ctx.ln2)) / ctx.ln2)


def _log_of_sum(x: Tensor, y: Tensor, rest: Formula) -> Tensor:
    """Return max(x, y) + rest(|x - y|), where rest(d) < 2^-170 for d > 200."""

    def formula(ctx: Any, x: Any, y: Any) -> Any:
        d = x - y
        return ctx.choose(d < 0, y, x) + rest(ctx, abs(d))

    largest = torch.maximum(x, y)
    # NaN or an infinity is the result, too; + 0.0: what is far below is positive
    far = ~((x.double() - y.double()).abs() <= reach(200))
    value = elementwise(formula, torch.where(far, 1.0, x), torch.where(far, 1.0, y))
    return torch.where(far, largest + 0.0, value)


def xlog1py(x: Any, y: Any) -> Tensor:
    """Return x log(1 + y), where 0 log(1 + y) is 0 unless y is NaN."""
    x, y = float32_operands(x, y)
    value = elementwise(lambda ctx, x, y: x * ctx.log1p(y), x, torch.where(x == 0, 1.0, y))
    return torch.where(y.isnan(), y, torch.where(x == 0, 0.0, value))


def entr(x: Any) -> Tensor:
    """Return -x log x: 0 at 0, minus infinity below."""
    (x,) = float32_operands(x)
    regular = (x > 0) & x.isfinite()
    y = elementwise(lambda ctx, x: -x * ctx.log(x), torch.where(regular, x, 1.0))
    limit = torch.where(x == 0, 0.0, torch.where(x.isnan(), x, -torch.inf))
    return torch.where(regular, y, limit)


def logit(x: Any, eps: Optional[float] = None) -> Tensor:
    """Return log(x / (1 - x)), of x clamped to [eps, 1 - eps] if eps is a number >= 0."""
    (x,) = float32_operands(x)
    bounds = _logit_bounds(eps)
    if bounds is not None:
        low, high = bounds
        x = torch.where(x < low, low, torch.where(x > high, high, x))
    return elementwise(_logit, x + 0.0)  # -0 is 0


def _logit(ctx: Any, x: Any) -> Any:
    """log1p(|2 x - 1| / min(x, 1 - x)) with the sign of 2 x - 1, so that nothing cancels."""
    s = 2 * x - 1
    y = ctx.log1p(abs(s) / ctx.choose(s < 0, x, 1 - x))
    return ctx.choose(s < 0, -y, y)


def logit_backward(g: Tensor, x: Tensor, eps: Optional[float] = None) -> Tensor:
    """Return g / (x (1 - x)), 0 outside of [eps, 1 - eps]; without eps NaN outside of [0, 1]."""
    bounds = _logit_bounds(eps)
    low, high = bounds or (0.0, 1.0)
    at_end = (x == 0) | (x == 1)
    y = elementwise(lambda ctx, g, x: g / (x * (1 - x)), g, torch.where(at_end, 0.5, x))
    y = torch.where(at_end, g * torch.inf, y)
    return torch.where((x < low) | (x > high), torch.nan if bounds is None else 0.0, y)


def _logit_bounds(eps: Optional[float]) -> Optional[tuple[float, float]]:
    """Return eps and 1 - eps, each rounded to binary32; None for no bounds."""
    if eps is None or eps < 0:
        return None
    low = float32_scalar(eps)
    return float(low), float(float32_scalar(1 - low))


# ---- trigonometric and hyperbolic functions ----------------------------------------------------------


tan = odd_function(lambda ctx, x: ctx.sin(x) / ctx.cos(x))
atan = odd_function(lambda ctx, x: ctx.atan(x))
# tan(asin(x) / 2) = x / (1 + cos(asin x)), and tan(acos(x) / 2) = sqrt((1 - x) / (1 + x))
asin = odd_function(lambda ctx, x: 2 * ctx.atan(x / (1 + ctx.sqrt((1 - x) * (1 + x)))), end=1)


def _acos(ctx: Any, x: Any) -> Any:
    size = abs(x)
    y = 2 * ctx.atan(ctx.sqrt((1 - size) / (1 + size)))
    return ctx.choose(x < 0, ctx.pi - y, y)


acos = _function(_acos, -1, 1)


def atan2(y: Any, x: Any) -> Tensor:
    """Return the angle of the point (x, y), with the zeros and infinities of C (ISO C99, F.9.1.4)."""
    y, x = float32_operands(y, x)
    undefined = x.isnan() | y.isnan()
    # An infinite coordinate only gives the direction.
    infinite = x.isinf() | y.isinf()
    u, v = (
        torch.where(infinite, torch.where(t.isinf(), t.sign(), torch.copysign(t * 0, t)), t)
        for t in (x, y)
    )
    on_axis = (u == 0) | (v == 0) | undefined

    def formula(ctx: Any, y: Any, x: Any) -> Any:
        angle = ctx.atan(abs(y) / abs(x))
        return ctx.choose(x < 0, ctx.pi - angle, angle)

    angle = elementwise(formula, torch.where(on_axis, 1.0, v), torch.where(on_axis, 1.0, u))
    along_x = torch.where(torch.signbit(u), torch.full_like(angle, _PI), 0.0)
    along_axis = torch.where(v == 0, along_x, torch.full_like(angle, _PI / 2))
    angle = torch.copysign(torch.where(on_axis, along_axis, angle), v)
    return torch.where(undefined, torch.nan, angle)


def _sinh(ctx: Any, x: Any) -> Any:
    """(t + t / (1 + t)) / 2 with t = exp(|x|) - 1 and x's sign."""
    t = ctx.expm1(abs(x))
    y = (t + t / (1 + t)) * _HALF
    return ctx.choose(x < 0, -y, y)


sinh = odd_function(_sinh, 100)


def cosh(x: Any) -> Tensor:
    """Return (exp(x) + exp(-x)) / 2."""

    def formula(ctx: Any, x: Any) -> Any:
        e = ctx.exp(abs(x))
        return (e + 1 / e) * _HALF

    (x,) = float32_operands(x)
    return elementwise(formula, x.clamp(-reach(100), reach(100)))


def _asinh(ctx: Any, x: Any) -> Any:
    """log(1 + a + a^2 / (1 + sqrt(1 + a^2))) with a = |x| and x's sign."""
    a = abs(x)
    square = a * a
    y = ctx.log1p(a + square / (1 + ctx.sqrt(1 + square)))
    return ctx.choose(x < 0, -y, y)


_finite_asinh = odd_function(_asinh)


def asinh(x: Any) -> Tensor:
    """Return log(x + sqrt(x^2 + 1))."""
    (x,) = float32_operands(x)
    return torch.where(x.isinf(), x, _finite_asinh(torch.where(x.isinf(), 1.0, x)))


def acosh(x: Any) -> Tensor:
    """Return log(x + sqrt(x^2 - 1)); NaN below 1."""
    (x,) = float32_operands(x)
    y = elementwise(
        lambda ctx, x: ctx.log1p((x - 1) + ctx.sqrt((x - 1) * (x + 1))),
        torch.where((x >= 1) & x.isfinite(), x, 1.0),
    )
    return torch.where(x.isinf() & (x > 0), x, torch.where(x >= 1, y, torch.nan))


def _atanh(ctx: Any, x: Any) -> Any:
    """log(1 + 2 a / (1 - a)) / 2 with a = |x| and x's sign."""
    a = abs(x)
    y = ctx.log1p(2 * a / (1 - a)) * _HALF
    return ctx.choose(x < 0, -y, y)


atanh = odd_function(_atanh, end=1)


def hypot(x: Tensor, y: Tensor) -> Tensor:
    """Return sqrt(x^2 + y^2); infinity if x or y is infinite, even if the other is NaN."""
    infinite = x.isinf() | y.isinf()
    value = elementwise(lambda ctx, x, y: ctx.sqrt(x * x + y * y), x, y)
    return torch.where(infinite, torch.inf, value)


def sinc(x: Any) -> Tensor:
    """Return sin(pi x) / (pi x), which is 1 at 0 and 0 at all other integers."""
    (x,) = float32_operands(x)
    is_integer = x == x.trunc()
    y = elementwise(lambda ctx, x: ctx.sinpi(x) / (ctx.pi * x), torch.where(is_integer, 0.5, x))
    y = torch.where(is_integer, (x == 0).float(), y)
    return torch.where(x.isinf(), torch.nan, y)


deg2rad = odd_function(lambda ctx, x: x * ctx.pi / 180)
rad2deg = odd_function(lambda ctx, x: x * 180 / ctx.pi)


def angle(x: Any) -> Tensor:
    """Return the angle of a real number: pi below 0, else 0."""
    (x,) = float32_operands(x)
    below = x.sign().clamp_(-1, 0).abs_()  # 1 or 0; `torch.where` takes ten times as long
    found: Tensor = below.mul_(_PI) + x.clamp(0, 0)  # a NaN remains one
    return found


# ---- the gamma function ------------------------------------------------------------------------------


def lgamma(x: Any) -> Tensor:
    """Return log |Gamma(x)|: infinite at 0, the negative integers and both infinities."""
    (x,) = float32_operands(x)
    pole = x.isinf() | ((x <= 0) & (x == x.trunc()))
    ordinary = torch.where(pole, 3.0, x)
    near_zero = ((ordinary - 1.5).abs() - 0.5).abs() <= 2.0**-6  # beside 1 and 2
    if target() is BINARY64 or not x.is_cpu or not near_zero.any():
        y = elementwise(_lgamma, ordinary)
    elif near_zero.all():
        y = elementwise(lgamma_near_zero, ordinary)
    else:
        y = elementwise(_lgamma, torch.where(near_zero, 3.0, ordinary))
        y[near_zero] = elementwise(lgamma_near_zero, ordinary[near_zero])
    return torch.where(pole, torch.inf, y)


def _lgamma(ctx: Any, x: Any) -> Any:
    return ctx.lgamma(x)


def _regular(formula: Formula, pole: Tensor, x: Tensor) -> Tensor:
    """Evaluate a formula where there is no pole, and elsewhere at 1 or not at all."""
    if x.is_cpu and pole.sum() * 4 > x.numel():
        y = torch.ones_like(x)
        y[~pole] = elementwise(formula, x[~pole])
        return y
    return elementwise(formula, torch.where(pole, 1.0, x))


def digamma(x: Any) -> Tensor:
    """Return the derivative of lgamma: infinite at 0, NaN at negative integers."""
    (x,) = float32_operands(x)
    pole = (x <= 0) & (x == x.trunc())
    y = _regular(lambda ctx, x: ctx.digamma(x), pole | x.isinf(), x)
    at_pole = torch.where(x == 0, torch.copysign(torch.full_like(y, torch.inf), -x), torch.nan)
    return torch.where(pole, at_pole, torch.where(x.isinf(), x, y))


def polygamma(n: int, x: Any) -> Tensor:
    """Return the n-th derivative of digamma, which for n > 0 is infinite at its poles."""
    if n == 0:
        return digamma(x)
    require(n > 0, "polygamma(n, x) does not support negative n.")
    (x,) = float32_operands(x)
    if n > 1:
        return higher_polygamma(n, x)
    pole = (x <= 0) & (x == x.trunc()) & x.isfinite()
    y = _regular(lambda ctx, x: ctx.trigamma(x), pole | x.isinf(), x)
    y = torch.where(pole, torch.inf, y)
    return torch.where(x.isinf(), torch.where(x > 0, 0.0, torch.nan).to(y.dtype), y)


def mvlgamma(x: Any, p: int) -> Tensor:
    """Return the sum of lgamma(x - j/2) over j < p, plus p (p - 1) / 4 log pi.

    For p > 1 it is infinite at x = (p - 1) / 2 and NaN below, where PyTorch defines no result.
    """
    if p < 1:
        raise RuntimeError(f"mvlgamma: p has to be at least 1, not {p}")
    if p == 1:
        return lgamma(x)
    (x,) = float32_operands(x)
    least = (p - 1) / 2
    regular = (x > least) & x.isfinite()

    def formula(ctx: Any, x: Any) -> Any:
        total = ctx.lgamma(x)
        for j in range(1, p):
            total = total + ctx.lgamma(x - Fraction(j, 2))
        return total + Fraction(p * (p - 1), 4) * ctx.log(0 * x + ctx.pi)

    y = elementwise(formula, torch.where(regular, x, float(p)))
    return torch.where(regular, y, torch.where(x >= least, torch.inf, torch.nan).to(y.dtype))
