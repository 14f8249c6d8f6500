"""Powers, each rounded once: of tensors and numbers, with exponents that are numbers or tensors."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import BINARY64, narrow, operate, reach, target
from reproml.arithmetic.numerics.libm import EXACT_MATH
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import float32_operands
from reproml.errors import NotExactError

_log = math.log  # of the C library; within exact() `math` has another one


def power(x: Any, exponent: Any) -> Tensor:
    """Compute aten.pow; x or the exponent may be a number."""
    if isinstance(exponent, Tensor):
        if not isinstance(x, Tensor):
            _check_logarithm(x)
        return _power_of_tensors(*float32_operands(x, exponent))
    return _power_of_number(x, exponent)


def _check_logarithm(base: float) -> None:
    """Raise NotExactError for a base whose logarithm, as a float32 number, depends on the C library.

    PyTorch's gradient of base**x multiplies by this number. The C library's logarithm may be wrong by some
    units in its last place, which changes the float32 number only next to a midpoint.
    """
    if base > 0 and math.isfinite(base):
        log = _log(base)
        if target() is BINARY64 and log == EXACT_MATH.log(base):
            return  # the only number that another machine may have
        ends = [ctypes.c_float(log * (1 + sign * 2.0**-49)).value for sign in (-1, 1)]
        if ends[0] != ends[1]:
            raise NotExactError(
                f"The gradient of a power of {base} depends on the machine; give the base as a tensor."
            )


def _power_of_tensors(x: Tensor, y: Tensor) -> Tensor:
    """Return x^y with the zeros, infinities and NaN of C's pow (ISO C99, F.9.4.4)."""
    size = x.abs()
    # Beyond these bounds the power overflows or underflows; NaN is 0 times infinity, or of an operand. The
    # bounds are so wide that the machine's logarithm decides no result.
    log_of_power = y.double() * size.double().log()
    regular = log_of_power.abs() <= reach(150)
    base, exponent = torch.where(regular, size, 1.0), torch.where(regular, y, 1.0)
    power = elementwise(lambda ctx, x, y: ctx.exp(y * ctx.log(x)), base, exponent)
    power = torch.where(y == 2, operate(torch.mul, x, x), power)  # ties are frequent
    power = torch.where(
        regular, power, torch.where(log_of_power > 0, torch.inf, 0.0).to(power.dtype)
    )
    power = torch.where((y == 0) | (size == 1), 1.0, power)
    half = y * 0.5
    is_integer, is_odd = y == y.trunc(), (y == y.trunc()) & (half != half.trunc())
    power = torch.where(torch.signbit(x) & is_odd, -power, power)
    undefined = ((x < 0) & x.isfinite() & ~is_integer) | x.isnan() | y.isnan()
    return torch.where(undefined & (y != 0) & (x != 1), torch.nan, power)


def _power_of_number(x: Tensor, exponent: float) -> Tensor:
    """Return x^p. If p is an integer up to 64 it is a product, any other is exp(p log x)."""
    p = float32_scalar(exponent)
    if p == 2:
        return operate(torch.mul, x, x)
    if p == 0:
        return torch.ones_like(x)
    if p.denominator == 1 and abs(p) <= 64:
        return elementwise(lambda ctx, x: _integer_power(x, int(p)), x)
    if p.denominator == 1 and target() is BINARY64:
        size = torch.where(x.isfinite() & (x != 0), x.abs(), 1.0)
        y = elementwise(lambda ctx, x: ctx.exp(p * ctx.log(x)), size)
        y = torch.where(x.isfinite(), y, x.abs() if p > 0 else torch.where(x.isnan(), x, 0.0))
        y = torch.where(x == 0, 0.0 if p > 0 else torch.inf, y)
        return torch.where(torch.signbit(x) & (p % 2 == 1), -y, y)
    if p.denominator == 1:
        return _large_integer_power(x.float(), int(p))
    ordinary = (x > 0) & x.isfinite()
    y = elementwise(lambda ctx, x: ctx.exp(p * ctx.log(x)), torch.where(ordinary, x, 1.0))
    at_zero, at_infinity = (0.0, torch.inf) if p > 0 else (torch.inf, 0.0)
    limit = torch.where(x > 0, at_infinity, torch.where(x == 0, at_zero, torch.nan))
    return torch.where(ordinary, y, limit.to(y.dtype))


def _integer_power(x: Any, n: int) -> Any:
    if n < 0:
        return 1 / _integer_power(x, -n)
    y = x
    for _ in range(n - 1):
        y = y * x
    return y


def _large_integer_power(x: Tensor, p: int) -> Tensor:
    """Return x^p for |p| > 64, as exp(p log |x|) with the sign of the power.

    A power of a power of two is one as well. No other power is a binary32 number or halfway between two,
    as its odd factor has over 100 bits, so that the rounding test decides it.
    """
    # An exponent beyond 2^32 is even, and its powers of all numbers but 1 overflow or underflow.
    p = max(-(2**32), min(p, 2**32))
    size = x.abs()
    fraction, exponent = torch.frexp(size)
    is_power_of_two = fraction == 0.5
    places = ((exponent.long() - 1) * p).clamp(-1000, 1000)
    power_of_two = narrow((places + 1023 << 52).view(torch.float64))
    # The powers of numbers beyond these bounds overflow or underflow, like those of the bounds.
    largest = max(1 + 2.0**-23, 2.0 ** (256 / abs(p)))
    smallest = min(1 - 2.0**-24, 2.0 ** (-256 / abs(p)))
    other = torch.where(is_power_of_two | size.isnan(), 3.0, size).clamp(smallest, largest)
    y = elementwise(lambda ctx, x: ctx.exp(p * ctx.log(x)), other)
    y = torch.where(is_power_of_two, power_of_two, y)
    y = torch.where(size == 0, 0.0 if p > 0 else torch.inf, torch.where(x.isnan(), x, y))
    return torch.where(torch.signbit(x), -y, y) if p % 2 else y
