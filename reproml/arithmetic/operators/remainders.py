"""Remainders, and quotients and numbers rounded to integers or decimals, each rounded once.

The real numbers x / y and x - n y, with the integer n next to x / y, are rounded only at the end. PyTorch
computes with x / y rounded, and may return a quotient that is off by one.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.compiler.direct import run_directly
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.elementary import power_of_two
from reproml.arithmetic.numerics.formats import BINARY64, narrow, operate, target
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.operators.arguments import float32_operands
from reproml.errors import NotExactError

_STEP = 38  # a remainder of 24 bits is shifted by so many at once, within int64


def fmod(x: Any, y: Any) -> Tensor:
    """Return x - y trunc(x / y), which is a binary32 number; a zero has the sign of x."""
    x, y = float32_operands(x, y)
    z = _by_loop("fmod", x, y)
    if z is not None:
        return z
    regular = x.isfinite() & y.isfinite() & (y != 0)
    r = _remainder(torch.where(regular, x, 0.0), torch.where(regular, y, 1.0))
    limit = torch.where(x.isfinite() & y.isinf(), x, torch.nan)
    return torch.where(regular, torch.copysign(r, x), limit)


def remainder(x: Any, y: Any) -> Tensor:
    """Return x - y floor(x / y), whose sign is that of y; a zero has the sign of x."""
    x, y = float32_operands(x, y)
    z = _by_loop("remainder", x, y)
    if z is not None:
        return z
    r = fmod(x, y)
    return torch.where(_is_rounded_up(r, y), operate(torch.add, r, y), r)


def floor_divide(x: Any, y: Any) -> Tensor:
    """Return floor(x / y)."""
    x, y = float32_operands(x, y)
    return rounded_quotient(x, y, "floor")


def frac(x: Tensor) -> Tensor:
    """Return x - trunc(x), which is a binary32 number."""
    return torch.frac(x)


def round_to_decimals(x: Tensor, *, decimals: int = 0) -> Tensor:
    """Return the multiple of 10^-decimals next to x, of two the one with the even factor, rounded once.

    Raises NotExactError unless decimals are -7 to 12, so that the factor is computed exactly in binary64: x
    10^d has at most 24 + 28 bits, and x / 10^7 differs from each tie by 2^-51 of it or is one. A zero has
    the sign of x.
    """
    if decimals == 0:
        return x.round()
    if not -7 <= decimals <= 12:
        raise NotExactError(
            f"Rounding to {decimals} decimals has no exact definition, only to -7 to 12."
        )
    if target() is BINARY64:
        scale = Fraction(10) ** decimals
        values = [
            nearest(round(Fraction(n) * scale) / scale) if math.isfinite(n) else n
            for n in x.reshape(-1).tolist()
        ]
        return torch.copysign(
            torch.tensor(values, dtype=torch.float64).to(x.device).reshape(x.shape), x
        )
    if x.dtype is not torch.float32:
        raise NotExactError(f"Rounding to decimals is defined for float32, not for {x.dtype}.")
    power = 10 ** abs(decimals)
    # Beyond this bound, x is such a multiple, or half the distance of two does not move it.
    regular = x.abs() < (2.0**23 if decimals > 0 else 2.0**26 * power)
    kept = torch.where(regular, x, 0.0).double()
    if decimals > 0:
        n = (kept * power).round()
        y = elementwise(lambda ctx, n: n / power, n.to(torch.int64))
    else:
        y = narrow((kept / power).round() * power)
    return torch.where(regular, torch.copysign(y, x), x)


def rounded_quotient(x: Tensor, y: Tensor, mode: str) -> Tensor:
    """Return floor(x / y), or trunc(x / y) for the mode "trunc", of the exact quotient.

    Where y is infinite, floor(x / y) is -1 for operands of different signs; where x is, it is NaN, as in
    PyTorch. A zero has the sign of x / y.
    """
    if mode not in ("floor", "trunc"):
        raise RuntimeError(
            f"div expected rounding_mode to be one of None, 'trunc', or 'floor' but found '{mode}'"
        )
    z = _by_loop(f"{mode}_divide", x, y)
    if z is not None:
        return z
    r = fmod(x, y)
    down = (_is_rounded_up(r, y) & (mode == "floor")).float()
    regular = x.isfinite() & y.isfinite() & (y != 0)
    q = elementwise(
        lambda ctx, x, r, y, down: (x - r) / y - down,
        *(torch.where(regular, t, 0.0) for t in (x, r)),
        torch.where(regular, y, 1.0),
        down,
    )
    zero = torch.where(torch.signbit(x) != torch.signbit(y), -0.0, 0.0).to(q.dtype)
    q = torch.where(q == 0, zero, q)
    if mode == "trunc":
        return torch.where(regular, q, (x / y).trunc())
    limit = torch.where(x.isfinite() & y.isinf(), torch.where(down > 0, -1.0, zero), torch.nan)
    return torch.where(regular, q, torch.where(y == 0, x / y, limit))


def _by_loop(name: str, x: Tensor, y: Tensor) -> Optional[Tensor]:
    if x.shape != y.shape and y.numel() != 1:
        x, y = torch.broadcast_tensors(x, y)
    return run_directly(name, x, y)


def _is_rounded_up(r: Tensor, y: Tensor) -> Tensor:
    """Return whether trunc(x / y), which has the remainder r, is greater than floor(x / y)."""
    return (r != 0) & ((r < 0) != (y < 0))


def _remainder(x: Tensor, y: Tensor) -> Tensor:
    """Return |x| modulo |y| for finite x and y, y != 0.

    |x| = m 2^e and |y| = n 2^f with integers of 24 bits. For e >= f it is (m 2^(e - f) mod n) 2^f, where m
    is shifted by up to 38 bits at once and e - f is at most 276; for e < f it is (m mod n 2^(f - e)) 2^e.
    """
    if target() is BINARY64:  # the C library's remainder is exact
        values = np.fmod(x.abs().cpu().numpy(), y.abs().cpu().numpy())
        return torch.as_tensor(values, device=x.device)
    (m, e), (n, f) = (torch.frexp(t.double().abs()) for t in (x, y))
    r, n = (m * 2.0**24).long(), (n * 2.0**24).long()
    left = (e - f).clamp(min=0).long()
    n = n << (f - e).clamp(0, _STEP).long()  # beyond 24, all of m is the remainder
    r = r.remainder(n)
    for _ in range(8):
        step = left.clamp(max=_STEP)
        r, left = (r << step).remainder(n), left - step
    return (r.double() * power_of_two(torch.minimum(e, f) - 24)).float()
