"""Formulas in pairs of binary64 numbers on tensors, for results that are rounded to binary64.

Binary64 has no room for the first rounding test of such results. So a formula is computed in pairs at
once: an elementwise formula by its program (pair_program.py), where it has one, any other by one call of
csrc/pair_program.c for each operation. A pair s + t has about 100 bits and a bound `rad`, which is 0
where nothing was rounded. What fails the test is left to the exact path, and all of it without the compiled
loops.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.pair_program import (
    PairContext,
    PairFunctions,
    PairProgram,
    Unsupported,
)
from reproml.arithmetic.numerics import special
from reproml.arithmetic.numerics.balls import Formula
from reproml.arithmetic.numerics.formats import sum_to_odd
from reproml.arithmetic.numerics.rounding import SLACK, U, rounding_test

Number = Union[int, float, Fraction]

_FAR = 2.0**-900  # a term that is so much smaller may count as zero: see evaluate._BITS


class PairArray:
    """Real numbers that lie within rad of s + t: float64 tensors of one shape. rad is not below 0."""

    __slots__ = ("ctx", "s", "t", "rad")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def __init__(self, ctx: PairArrays, s: Tensor, t: Tensor, rad: Tensor) -> None:
        self.ctx, self.s, self.t, self.rad = ctx, s, t, rad

    @property
    def mid(self) -> Tensor:
        """The number itself, for conditions on exact numbers and on their differences."""
        return self.s

    def __add__(self, other: Union[PairArray, Number]) -> PairArray:
        return self.ctx.run("add", self, other)

    def __sub__(self, other: Union[PairArray, Number]) -> PairArray:
        return self.ctx.run("add", self, -other)

    def __rsub__(self, other: Number) -> PairArray:
        return self.ctx.run("add", -self, other)

    def __mul__(self, other: Union[PairArray, Number]) -> PairArray:
        return self.ctx.run("mul", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Union[PairArray, Number]) -> PairArray:
        return self.ctx.run("div", self, other)

    def __rtruediv__(self, other: Number) -> PairArray:
        return self.ctx.run("div", self.ctx.constant(other), self)

    def __neg__(self) -> PairArray:
        return PairArray(self.ctx, -self.s, -self.t, self.rad)

    def __abs__(self) -> PairArray:
        sign = torch.where(self.s < 0, -1.0, 1.0).double()
        return PairArray(self.ctx, self.s * sign, self.t * sign, self.rad)

    def __lt__(self, other: Number) -> Tensor:
        return self.ctx.certain(self, self.s < float(other), float(other))

    def __gt__(self, other: Number) -> Tensor:
        return self.ctx.certain(self, self.s > float(other), float(other))

    def __eq__(self, other: Any) -> Any:
        raise Unsupported


class PairArrays(PairFunctions):
    """The context of formulas on pairs. uncertain: where a condition is not certain, so that nothing is."""

    def __init__(self) -> None:
        self.uncertain: list[Tensor] = []

    def run(self, op: str, *operands: Union[PairArray, Number]) -> PairArray:
        """Run one instruction of csrc/pair_program.c on operands that broadcast together."""
        lifted = [x if isinstance(x, PairArray) else self.constant(x) for x in operands]
        shape = torch.broadcast_shapes(*[x.s.shape for x in lifted])
        steps = [int(x.s.numel() != 1) for x in lifted]
        arrays = [
            (y.expand(shape) if step else y).contiguous()
            for x, step in zip(lifted, steps)
            for y in (x.s, x.t, x.rad)
        ]
        out = [torch.empty(shape, dtype=torch.float64, device="cpu") for _ in range(3)]
        _call(_program_of(op, len(lifted)), arrays, steps, out)
        return PairArray(self, *out)

    def certain(self, x: PairArray, condition: Tensor, bound: float) -> Tensor:
        self.uncertain.append((x.rad > 0) & ~((x.s - bound).abs() * 0.5 > x.rad + x.t.abs()))
        return condition

    # ---- the context -----------------------------------------------------------------------------------

    def exact(self, mid: Tensor) -> PairArray:
        zero = torch.zeros_like(mid, memory_format=torch.contiguous_format)
        return PairArray(self, mid, zero, zero)

    def constant(self, x: Number) -> PairArray:
        x = Fraction(x)
        high = float(x)
        low = float(x - Fraction(high))
        rest = abs(x - Fraction(high) - Fraction(low))
        return self.pair(high, low, math.nextafter(float(rest), math.inf) if rest else 0.0)

    def pair(self, *numbers: float) -> PairArray:
        return PairArray(self, *torch.tensor(numbers, dtype=torch.float64, device="cpu").unbind())

    def ball(self, mid: Any, rad: Any) -> PairArray:
        rad = torch.as_tensor(rad, dtype=torch.float64)
        mid = torch.as_tensor(mid, dtype=torch.float64).expand_as(rad)
        return PairArray(self, mid, torch.zeros_like(rad), rad.abs())

    def choose(self, condition: Any, x: Any, y: Any) -> PairArray:
        x, y = (z if isinstance(z, PairArray) else self.constant(z) for z in (x, y))
        parts = ((x.s, y.s), (x.t, y.t), (x.rad, y.rad))
        return PairArray(self, *[self.where(condition, a, b) for a, b in parts])

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):
            return x if condition else y
        x, y = (torch.as_tensor(z, dtype=torch.float64) for z in (x, y))
        return torch.where(condition, x, y)

    def sum(self, x: PairArray) -> PairArray:
        n, shape = x.s.shape[-1], (*x.s.shape[:-1], 1)
        out = [torch.empty(shape, dtype=torch.float64, device="cpu") for _ in range(3)]
        arrays = [y.contiguous() for y in (x.s, x.t, x.rad)]
        kernels.library.reproml_pair_sums(
            out[0].numel(), n, *[y.data_ptr() for y in arrays], _pointers(out)
        )
        return PairArray(self, *out)

    @staticmethod
    def total(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    def max(self, x: PairArray) -> PairArray:
        return self.exact(x.s.amax(-1, keepdim=True))

    lgamma, digamma, trigamma = special.lgamma, special.digamma, special.trigamma
    stirling = special.PAIRS


def _pointers(tensors: Sequence[Optional[Tensor]]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])


def _call(
    program: PairProgram,
    arrays: Sequence[Tensor],
    steps: Sequence[int],
    out: Sequence[Optional[Tensor]],
) -> None:
    first = out[0]
    assert first is not None
    kernels.library.reproml_pair_arrays(
        program.address,
        first.numel(),
        _pointers(arrays),
        (ctypes.c_int64 * len(steps))(*steps),
        _pointers(out),
    )


@cache
def _program_of(op: str, operands: int) -> PairProgram:
    ctx = PairContext(operands)
    return PairProgram(ctx, ctx.run(op, *ctx.operands), [False] * operands)


# ---- formulas ------------------------------------------------------------------------------------------

_UNSUPPORTED = (Unsupported, AttributeError, TypeError)


def elements_by_pairs(
    formula: Formula, program: Optional[PairProgram], operands: Sequence[Tensor]
) -> Optional[tuple[Tensor, Tensor]]:
    """Return the values of an elementwise formula, rounded once, and where the test failed.

    operands: float64 tensors that broadcast together. Returns None if the formula has no such form, or
    without the compiled loops.
    """
    if kernels.library is None or not all(x.is_cpu for x in operands):
        return None
    shape = torch.broadcast_shapes(*[x.shape for x in operands])
    if program is None:
        return _by_operations(formula, operands, shape, round_pairs)
    steps = [int(x.numel() != 1) for x in operands]
    arrays = [(x.expand(shape) if s else x).contiguous() for x, s in zip(operands, steps)]
    value, rad = (torch.empty(shape, dtype=torch.float64, device="cpu") for _ in range(2))
    _call(program, arrays, steps, [value, None, rad])
    failed = rad != 0
    for x in operands:
        failed |= ~x.isfinite()
    return value, failed


def elements_in_pairs(
    program: Optional[PairProgram], operands: Sequence[Tensor]
) -> Optional[tuple[Tensor, Tensor, Tensor]]:
    """Return s, t and rad of an elementwise formula of float64 tensors [n]; None where it cannot run."""
    if kernels.library is None or program is None or not all(x.is_cpu for x in operands):
        return None
    zero = torch.zeros_like(operands[0])
    arrays = [y for x in operands for y in (x.contiguous(), zero, zero)]
    s, t, rad = (torch.empty_like(zero) for _ in range(3))
    _call(program, arrays, [1] * len(operands), [s, t, rad])
    return s, t, rad


def rows_by_pairs(formula: Formula, operands: Sequence[Tensor]) -> Optional[tuple[Tensor, Tensor]]:
    """The same of a formula on rows, which lie along the last axis. An exact zero is +0."""
    if kernels.library is None or not all(x.is_cpu for x in operands):
        return None
    return _by_operations(formula, operands, None, round_pairs)


def narrow_rows_by_pairs(
    formula: Formula, operands: Sequence[Tensor]
) -> Optional[tuple[Tensor, Tensor]]:
    """The same, rounded to a target that is narrower than binary64; the values are float64."""
    if kernels.library is None:
        return None
    return _by_operations(formula, operands, None, _round_to_target)


def narrow_elements_by_pairs(
    formula: Formula, operands: Sequence[Tensor]
) -> Optional[tuple[Tensor, Tensor]]:
    """The same of an elementwise formula of float64 tensors of one shape."""
    if kernels.library is None:
        return None
    return _by_operations(formula, operands, operands[0].shape, _round_to_target)


def _by_operations(
    formula: Formula,
    operands: Sequence[Tensor],
    shape: Optional[torch.Size],
    rounded: Callable[..., tuple[Tensor, Tensor]],
) -> Optional[tuple[Tensor, Tensor]]:
    ctx = PairArrays()
    try:
        y = formula(ctx, *[ctx.exact(x) for x in operands])
    except _UNSUPPORTED:
        return None
    y = y if isinstance(y, PairArray) else ctx.constant(y)
    value, failed = rounded(y.s, y.t, y.rad)
    if shape is not None:
        value, failed = value.expand(shape).clone(), failed.expand(shape).clone()
    for x in operands:
        unsure = ~x.isfinite()
        failed = failed | (unsure if shape is not None else unsure.any(-1, keepdim=True))
    for unsure in ctx.uncertain:
        unsure = unsure if shape is not None or not unsure.dim() else unsure.any(-1, keepdim=True)
        failed = failed | unsure
    return value, failed


def round_pairs(s: Tensor, t: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    """Round s + t to binary64, which differ by at most rad from the exact values, and find what fails.

    A bound of 0 needs no test: the sum of two binary64 numbers is rounded by IEEE arithmetic.
    """
    low, high = _ends(t, rad)
    low, high = s + low, s + high
    failed = ~((low == high) & high.isfinite() & rad.isfinite())
    return high, failed | _is_far(s, t)


def _round_to_target(s: Tensor, t: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a narrower target. The ends are rounded to odd first, so that they are rounded once."""
    low, high = (sum_to_odd(s, end) + 0.0 for end in _ends(t, rad))  # an exact zero is +0
    value, failed = rounding_test(low, high)
    return value.double(), failed | ~(s.isfinite() & rad.isfinite()) | _is_far(s, t)


def _ends(t: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    rad = torch.where(rad == 0, rad, rad * SLACK + t.abs() * (2 * U))
    return t - rad, t + rad


def _is_far(s: Tensor, t: Tensor) -> Tensor:
    return (t != 0) & (t.abs() < _FAR * s.abs())


def round_pairs_to_odd(s: Tensor, t: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    """Round s + t to binary64, but to an odd number unless it is exact, and find what fails.

    s is the nearest number to s + t. So it is one of the two numbers around the exact value, and the other
    one lies on the side of the sign of t.
    """
    failed = ~((t.abs() > 2 * rad) | ((t == 0) & (rad == 0))) | ~s.isfinite()
    return sum_to_odd(s, t), failed


# ---- sums and products ---------------------------------------------------------------------------------


def sums(x: Tensor, y: Optional[Tensor] = None, running: bool = False) -> tuple[Tensor, ...]:
    """Return s, t and rad of the sum of each row of x, or of x y: float64 [rows, n] -> [rows] each.

    running: the sums up to each element, [rows, n]. Without the compiled loops all bounds are infinite.
    """
    rows, n = x.shape
    shape = (rows, n) if running else (rows,)
    if kernels.library is None or not x.is_cpu:
        return _unknown(shape, x.device)
    x, y = x.contiguous(), None if y is None else y.contiguous()
    out = [torch.empty(shape, dtype=torch.float64, device="cpu") for _ in range(3)]
    pointer = None if y is None else y.data_ptr()
    kernels.library.reproml_binary64_sums(rows, n, x.data_ptr(), pointer, running, _pointers(out))
    return tuple(out)


def products(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Return s, t and rad of the products of float64 matrices [batch, m, k] and [batch, k, n]."""
    (batch, m, k), n = a.shape, b.shape[-1]
    if kernels.library is None or not a.is_cpu:
        return _unknown((batch, m, n), a.device)
    a, b = a.contiguous(), b.contiguous()
    out = [torch.empty((batch, m, n), dtype=torch.float64, device="cpu") for _ in range(3)]
    kernels.library.reproml_binary64_products(
        batch, m, n, k, a.data_ptr(), b.data_ptr(), _pointers(out)
    )
    return tuple(out)


def _unknown(shape: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    zero = torch.zeros(shape, dtype=torch.float64, device=device)
    return zero, zero, torch.full_like(zero, torch.inf)
