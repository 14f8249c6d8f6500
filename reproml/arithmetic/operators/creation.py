"""Tensors computed from Python numbers: arange, linspace, logspace and windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import NARROW, target
from reproml.arithmetic.operators.arguments import require, require_float32
from reproml.arithmetic.operators.special import by_long_numbers
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

    def value(mp: Any, i: float) -> Any:
        x = a + int(i) * ((b - a) / max(steps - 1, 1))
        return mp.power(mp.mpf(base), mp.mpf(x.numerator) / x.denominator)

    return by_long_numbers(value, torch.arange(steps).double()).to(device or "cpu")


# ---- windows -----------------------------------------------------------------------------------------

# A window: (mpmath, the place in the window as a fraction from 0 to 1, parameters) -> number.
_Window = Callable[..., Any]


def _hann(mp: Any, t: Any) -> Any:
    return mp.sinpi(t) ** 2


def _hamming(mp: Any, t: Any, alpha: float = 0.54, beta: float = 0.46) -> Any:
    return mp.mpf(alpha) - mp.mpf(beta) * mp.cospi(2 * t)


def _blackman(mp: Any, t: Any) -> Any:
    """(1 - c) (0.34 - 0.16 c) / 2 = 0.42 - 0.5 c + 0.08 cos(4 pi t), without cancellation at the ends."""
    s = mp.sinpi(t) ** 2
    return s * (mp.mpf(18) + 32 * s) / 50


def _bartlett(mp: Any, t: Any) -> Any:
    return 1 - abs(2 * t - 1)


def _kaiser(mp: Any, t: Any, beta: float = 12.0) -> Any:
    return mp.besseli(0, beta * mp.sqrt(4 * t * (1 - t))) / mp.besseli(0, mp.mpf(beta))


def window(formula: _Window) -> Callable[..., Tensor]:
    """Return an operator (length, periodic, parameters) that evaluates a window, each number rounded once.

    Number i is at i / length, or at i / (length - 1) with periodic=False. A single number is 1.
    """

    def operator(length: int, periodic: bool = True, *parameters: Any, **options: Any) -> Tensor:
        return _window(formula, length, periodic, parameters, **options)

    return operator


def _window(
    formula: _Window,
    length: int,
    periodic: bool,
    parameters: Sequence[Any],
    *,
    dtype: Any = None,
    device: Any = None,
    **_: Any,
) -> Tensor:
    require_float32(dtype or _default_dtype())
    require(length >= 0, f"a window needs a length of at least 0, not {length}")
    if length == 1:
        return torch.ones(1, dtype=target().container, device=device)
    last = length if periodic else length - 1

    def value(mp: Any, i: float) -> Any:
        return formula(mp, mp.mpf(int(i)) / last, *parameters)

    return by_long_numbers(value, torch.arange(length).double()).to(device or "cpu")


hann_window = window(_hann)
hamming_window = window(_hamming)
blackman_window = window(_blackman)
bartlett_window = window(_bartlett)
kaiser_window = window(_kaiser)


def _default_dtype() -> torch.dtype:
    """Return the default dtype, or float32 for one of 16 bits, to which the result is rounded then."""
    dtype = torch.get_default_dtype()
    return torch.float32 if dtype in NARROW else dtype
