"""Tensors computed from Python numbers: arange, linspace, logspace and windows."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import TENSORS, elementwise
from reproml.arithmetic.numerics.balls import Ball, Formula
from reproml.arithmetic.numerics.formats import NARROW, target
from reproml.arithmetic.operators.arguments import require, require_float32
from reproml.arithmetic.operators.special import by_long_numbers, scaled_i
from reproml.errors import NotExactError


def arange(*bounds: float, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """Return start + i * step, rounded once. PyTorch itself computes integer results.

    bounds: (end), (start, end) or (start, end, step).
    """
    integers = all(isinstance(b, int) for b in bounds)
    if dtype is None and not integers:
        dtype = _default_dtype()
    if dtype not in (torch.float32, target().dtype):
        if dtype is not None and dtype.is_floating_point and not integers:
            require_float32(dtype)
        return torch.arange(*bounds, dtype=dtype, device=device)
    start, end, step = (
        (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1) if len(bounds) == 2 else bounds
    )
    count = math.ceil((end - start) / step)  # in binary64, as PyTorch counts
    i = torch.arange(max(count, 0), dtype=torch.int64)
    return elementwise(lambda ctx, i: Fraction(start) + i * Fraction(step), i).to(device or "cpu")


def linspace(
    start: Any, end: Any, steps: int, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Return start + i (end - start) / (steps - 1), rounded once.

    Raises NotExactError unless dtype is float32.
    """
    require_float32(dtype or _default_dtype())
    a, b = Fraction(float(start)), Fraction(float(end))
    i = torch.arange(steps, dtype=torch.int64)
    return elementwise(lambda ctx, i: a + i * ((b - a) / max(steps - 1, 1)), i).to(device or "cpu")


def logspace(
    start: Any,
    end: Any,
    steps: int,
    base: float = 10.0,
    *,
    dtype: Any = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    """Return base^(start + i (end - start) / (steps - 1)), rounded once.

    Raises NotExactError unless base > 0.
    """
    require_float32(dtype or _default_dtype())
    if not 0 < base < math.inf:
        raise NotExactError(
            f"logspace has no exact definition for base={base}; use a positive base"
        )
    a, b = Fraction(float(start)), Fraction(float(end))

    step = (b - a) / max(steps - 1, 1)

    def value(mp: Any, i: float) -> Any:
        x = a + int(i) * step
        return mp.power(mp.mpf(base), mp.mpf(x.numerator) / x.denominator)

    def quick(i: Tensor) -> Ball:
        log = TENSORS.log(TENSORS.exact(torch.full_like(i[:1], base)))
        return TENSORS.exp((TENSORS.exact(i) * step + a) * log)

    normal = base >= sys.float_info.min  # see elementary.log
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    return by_long_numbers(value, i, quick if normal else None).to(device or "cpu")


# ---- windows -----------------------------------------------------------------------------------------

# A window: (n, parameters) -> the function (context, i) of number i, at i / n. Windows are symmetric, so
# that i is at most n / 2 here.
_Window = Callable[..., Formula]


def _hann(n: int) -> Formula:
    def formula(ctx: Any, i: Any) -> Any:
        s = ctx.sinpi(i / n)
        return s * s

    return formula


def _hamming(n: int, alpha: float = 0.54, beta: float = 0.46) -> Formula:
    a, b = Fraction(alpha), Fraction(beta)
    return lambda ctx, i: a - ctx.cospi(2 * i / n) * b


def _blackman(n: int) -> Formula:
    """(1 - c) (0.34 - 0.16 c) / 2 = 0.42 - 0.5 c + 0.08 cos(4 pi t), without cancellation at the ends."""

    def formula(ctx: Any, i: Any) -> Any:
        s = ctx.sinpi(i / n)
        s = s * s
        return s * (18 + 32 * s) / 50

    return formula


def _bartlett(n: int) -> Formula:
    return lambda ctx, i: 2 * i / n


def window(formula: _Window) -> Callable[..., Tensor]:
    """Return an operator (length, periodic, parameters) that evaluates a window, each number rounded once.

    Number i is at i / length, or at i / (length - 1) with periodic=False. A single number is 1.
    """

    def value(n: int, i: Tensor, parameters: Sequence[float]) -> Tensor:
        return elementwise(formula(n, *parameters), i)

    return _operator(value)


def _kaiser(n: int, i: Tensor, parameters: Sequence[float]) -> Tensor:
    """I0(x) / I0(beta) with x = 2 beta sqrt(i (n - i)) / n; both are taken times exp(-beta) in binary64."""
    (beta,) = parameters or (12.0,)

    def value(mp: Any, i: float) -> Any:
        t = mp.mpf(int(i)) / n
        return mp.besseli(0, beta * mp.sqrt(4 * t * (1 - t))) / mp.besseli(0, mp.mpf(beta))

    def quick(i: Tensor) -> Ball:
        m, size = TENSORS.exact(i), abs(beta)
        x = TENSORS.sqrt(m * (n - m)) * (2 * Fraction(size)) / n
        y = scaled_i(0, x.mid)
        # The slope of log(exp(-x) I0(x)) lies between -1 and 0, and exp(d) - 1 < 2 d for d < 1.
        moved = torch.where(x.error < 1, 2 * x.error * y.mid, torch.inf)
        y = TENSORS.ball(y.mid, y.error + moved)
        return y * TENSORS.exp(x - Fraction(size)) / scaled_i(0, torch.full_like(i[:1], size))

    return by_long_numbers(value, i, quick)


def _operator(value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def operator(
        length: int,
        periodic: bool = True,
        *parameters: float,
        dtype: Any = None,
        device: Any = None,
        **_: Any,
    ) -> Tensor:
        require_float32(dtype or _default_dtype())
        require(length >= 0, f"a window needs a length of at least 0, not {length}")
        if length == 1:
            return torch.ones(1, dtype=target().container, device=device)
        if not all(math.isfinite(p) for p in parameters):
            raise NotExactError(f"a window has no exact definition for the parameters {parameters}")
        n = length if periodic else length - 1
        i = torch.arange(length, dtype=torch.float64, device="cpu")
        return value(n, torch.minimum(i, n - i), parameters).to(device or "cpu")

    return operator


hann_window = window(_hann)
hamming_window = window(_hamming)
blackman_window = window(_blackman)
bartlett_window = window(_bartlett)
kaiser_window = _operator(_kaiser)


def _default_dtype() -> torch.dtype:
    """Return the default dtype, or float32 for one of 16 bits, to which the result is rounded then."""
    dtype = torch.get_default_dtype()
    return torch.float32 if dtype in NARROW else dtype
