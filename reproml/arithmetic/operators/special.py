"""Special functions that have no formula here: each element is computed in mpmath's long numbers.

500 bits are computed and 420 kept, on the host; an element takes a tenth of a millisecond or more. Equal
elements are computed once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics.balls import polygamma
from reproml.arithmetic.numerics.devices import is_on_accelerator
from reproml.arithmetic.numerics.formats import BINARY64, narrow, target
from reproml.arithmetic.numerics.libm import rounded_to_double, rounded_to_odd
from reproml.arithmetic.operators.arguments import float32_operands

# As many as a value may need: I1(x) = x / 2 (1 + x^2 / 8 + ...) is near a midpoint for the least x.
_BITS = 500, 420
_lock = threading.Lock()  # mpmath's precision is global


def by_long_numbers(function: Callable[..., Any], x: Tensor) -> Tensor:
    """Return function(mpmath, float) of each element of x, rounded once to the target.

    The function may return a Python float for an infinity or NaN.
    """
    if is_on_accelerator(x):
        replay_log.flush()
    values, places = torch.unique(x.detach().cpu().double(), return_inverse=True)
    with _lock:
        found = [_value(function, v) for v in values.tolist()]
    rounded = narrow(torch.tensor(found, dtype=torch.float64))
    return rounded[places].reshape(x.shape).to(x.device)


def _value(function: Callable[..., Any], x: float) -> float:
    limits: list[float] = []

    def value(mp: Any) -> Any:
        y = function(mp, x)
        if isinstance(y, float):
            limits.append(y)
            return mp.mpf(0)
        return y

    found = (rounded_to_double if target() is BINARY64 else rounded_to_odd)(value, _BITS)
    return limits[0] if limits else found


def _function(
    formula: Callable[[Any, Any], Any], low: float, high: float, ends: Sequence[float]
) -> Callable[[Any], Tensor]:
    """Return the operator formula(mpmath, x) on [low, high], where a value rounds like that at the bound.

    ends: the values at minus infinity and infinity.
    """

    def value(mp: Any, x: float) -> Any:
        if math.isnan(x):
            return x
        if math.isinf(x):
            return ends[x > 0]
        return formula(mp, mp.mpf(min(max(x, low), high)))

    def operator(x: Any) -> Tensor:
        (x,) = float32_operands(x)
        return by_long_numbers(value, x)

    return operator


_ALL = (-math.inf, math.inf)
INF, NAN = math.inf, math.nan

# Beyond the bounds the values overflow or underflow in binary32.
i0 = _function(lambda mp, x: mp.besseli(0, x), -100, 100, (INF, INF))
i1 = _function(lambda mp, x: mp.besseli(1, x), -100, 100, (-INF, INF))


def _scaled_i(order: int) -> Callable[[Any, Any], Any]:
    """exp(-|x|) I(|x|), with the sign of x for order 1.

    From 2^60 on, two terms of its asymptotic series.
    """

    def formula(mp: Any, x: Any) -> Any:
        size = abs(x)
        if size > 2.0**60:
            y = (1 - mp.mpf(4 * order - 1) / (8 * size)) / mp.sqrt(2 * mp.pi * size)
        else:
            y = mp.besseli(order, size) * mp.exp(-size)
        return -y if order and x < 0 else y

    return formula


i0e = _function(_scaled_i(0), *_ALL, (0.0, 0.0))
i1e = _function(_scaled_i(1), *_ALL, (-0.0, 0.0))


def erfcx_of(mp: Any, x: Any) -> Any:
    """exp(x^2) erfc(x); the first terms of its asymptotic series from 2^60 on."""
    if x > 2.0**60:
        return (1 - 1 / (2 * x * x)) / (x * mp.sqrt(mp.pi))
    return mp.exp(x * x) * mp.erfc(x)


erfcx = _function(erfcx_of, -10, INF, (INF, 0.0))


def _log_ndtr(mp: Any, x: Any) -> Any:
    """log(erfc(-x / sqrt 2) / 2), by `erfcx_of` below 0."""
    t = x / mp.sqrt(2)
    if x > 0:
        return mp.log1p(-mp.erfc(t) / 2)
    return mp.log(erfcx_of(mp, -t) / 2) - t * t


log_ndtr = _function(_log_ndtr, -INF, 30, (-INF, -0.0))


def _ndtri(mp: Any, p: Any) -> Any:
    """The x at which the normal distribution function is p: Newton's method on log_ndtr from binary64."""
    if p <= 0 or p >= 1:
        return -INF if p == 0 else INF if p == 1 else NAN
    if p == 0.5:
        return mp.mpf(0)
    if p > 0.5:
        return -_ndtri(mp, 1 - p)
    target = mp.log(p)
    x = -mp.sqrt(-2 * target) if p < 0.1 else (p - 0.5) * mp.sqrt(2 * mp.pi)
    for _ in range(60):
        log = _log_ndtr(mp, x)
        slope = mp.sqrt(2 / mp.pi) / erfcx_of(mp, -x / mp.sqrt(2))  # of log_ndtr, for x < 0
        step = (log - target) / slope
        x = min(x - step, mp.mpf(0))
        if abs(step) <= mp.ldexp(1, -300) * max(abs(x), mp.ldexp(1, -200)):
            break
    return x


ndtri = _function(_ndtri, *_ALL, (NAN, NAN))


# Ai(100) underflows.
bessel_j0 = _function(lambda mp, x: mp.besselj(0, x), *_ALL, (0.0, 0.0))
bessel_j1 = _function(lambda mp, x: mp.besselj(1, x), *_ALL, (0.0, 0.0))
airy_ai = _function(lambda mp, x: mp.airyai(x), -INF, 100, (NAN, 0.0))


def higher_polygamma(n: int, x: Tensor) -> Tensor:
    """Return the n-th derivative of digamma, infinite at its poles: 0, -1, -2 and so on."""

    def value(mp: Any, x: float) -> Any:
        if math.isinf(x):
            return 0.0 if x > 0 else NAN
        if x <= 0 and x == math.floor(x):
            return INF if n % 2 else -INF
        return x if math.isnan(x) else polygamma(mp, n, mp.mpf(x))

    return by_long_numbers(value, x)


def spherical_bessel_j0(x: Any) -> Tensor:
    """Return sin(x) / x: 1 at 0, 0 at both infinities."""
    (x,) = float32_operands(x)
    regular = (x != 0) & ~x.isinf()
    y = elementwise(lambda ctx, x: ctx.sin(x) / x, torch.where(regular, x, 1.0))
    return torch.where(regular, y, (x == 0).float())
