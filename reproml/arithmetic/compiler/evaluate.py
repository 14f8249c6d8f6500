"""Evaluation of a formula on tensors, each result rounded once.

`elementwise` and `rowwise` evaluate `formula(ctx, x, y, ...)` (see numerics/balls.py). Each element takes
the first of these paths that can round it:

1. the fast path: a loop of its own in C, for the most frequent formulas (executor.py);
2. the compiled path: a recorded program (executor.py). Both need the C library;
3. the reference path: balls on float64 tensors, and the rounding test;
4. the exact path: rational numbers where the result is one, otherwise balls of mpmath's long numbers.

All paths return the same bits, as each returns only values that are correctly rounded for certain.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Any, Callable, Optional, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic.compiler import executor, pair_arrays
from reproml.arithmetic.numerics.balls import (
    Formula,
    Irrational,
    MultiPrecisionContext,
    RationalContext,
    TensorContext,
)
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.arithmetic.numerics.rationals import Rationals
from reproml.arithmetic.numerics.rounding import nearest, round_ball, rounding_test
from reproml.errors import NotExactError

TENSORS = TensorContext()

# Elements at once, so that the float64 temporaries of a formula stay in a processor's cache.
_CHUNK = 1 << 15


def elementwise(
    formula: Formula,
    *operands: Union[Tensor, float, int],
    reference: Optional[Callable[..., Tensor]] = None,
    fast: Optional[str] = None,
    scalars: tuple[float, ...] = (),
) -> Tensor:
    """Evaluate the formula on each element of operands that broadcast together, rounded once to float32.

    reference: the operator's complete definition on tensors, where the formula describes it only as long as
    the result passes the rounding test. fast: the name of the formula's own loop in csrc, if it has one;
    scalars: what that takes.
    """
    if target() is BINARY64:  # the formula describes it then, without exception
        return _elements_in_binary64(formula, *operands)
    call = _Elementwise(formula, None, fast, reference, scalars)
    result = executor.run(call, operands)
    return call.by_reference(*operands) if result is None else result


def rowwise(
    formula: Formula,
    dim: int,
    *operands: Tensor,
    reference: Optional[Callable[..., Tensor]] = None,
    fast: Optional[str] = None,
) -> Tensor:
    """Evaluate the formula on each row along `dim` of operands that broadcast, rounded once to float32.

    The formula returns a value for each element of the row, or one for each row (then `dim` has length 1
    in the result). reference, fast: as for `elementwise`; the reference takes rows along the last axis.
    """
    result = executor.run(_Rowwise(formula, dim, fast, reference), operands)
    if result is not None:
        return result
    if reference is None:
        return rowwise_by_balls(formula, dim, *operands)
    wide = [torch.atleast_1d(x).movedim(dim, -1) for x in torch.broadcast_tensors(*operands)]
    result = reference(*wide).movedim(-1, dim)
    return result if operands[0].dim() else result.reshape(())


# ---- the reference path ----------------------------------------------------------------------------


class _Elementwise(executor.FormulaCall):
    __slots__ = ()

    def by_reference(self, *operands: Any) -> Tensor:
        return (self.reference or self._in_chunks)(*operands)

    def by_exact_path(self, *operands: Tensor) -> Optional[Tensor]:
        """Compute a few elements that a program left by `exact_values`, as no bound is better in binary64.

        Returns None if a value is zero, whose sign the reference path determines.
        """
        rows = torch.stack(torch.broadcast_tensors(*operands), 1).double().numpy()
        values = torch.from_numpy(exact_elements(self.formula, rows))
        return values.float() if values.all() else None

    def _in_chunks(self, *operands: Union[Tensor, float, int]) -> Tensor:
        shape = torch.broadcast_shapes(*[x.shape for x in operands if isinstance(x, Tensor)])
        n = shape.numel()
        device = next(x.device for x in operands if isinstance(x, Tensor))
        if n <= _CHUNK or device.type != "cpu":
            return _elements_by_balls(self.formula, *operands)
        result = torch.empty(n, dtype=torch.float32, device=device)
        flat = [
            x.expand(shape).reshape(-1) if isinstance(x, Tensor) and x.numel() > 1 else x
            for x in operands
        ]
        for start in range(0, n, _CHUNK):
            part = slice(start, start + _CHUNK)
            chunk = [x[part] if isinstance(x, Tensor) and x.numel() == n else x for x in flat]
            result[part] = _elements_by_balls(self.formula, *chunk).reshape(-1)
        return result.reshape(shape)


class _Rowwise(executor.FormulaCall):
    __slots__ = ()

    def by_reference(self, *operands: Any) -> Tensor:
        if self.reference:
            return self.reference(*operands)
        return rowwise_by_balls(self.formula, -1, *operands)


def _wide(x: Union[Tensor, float, int], device: torch.device) -> Tensor:
    return to_device(x, device).double()


def _elements_by_balls(formula: Formula, *operands: Union[Tensor, float, int]) -> Tensor:
    device = next(x.device for x in operands if isinstance(x, Tensor))
    wide = [_wide(x, device) for x in operands]
    y = formula(TENSORS, *[TENSORS.exact(x) for x in wide])
    shape = torch.broadcast_shapes(*[x.shape for x in wide])
    if not shape:
        return _elements_by_balls(formula, *[x.reshape(1) for x in wide]).reshape(())

    def resolve(index: Tensor) -> Any:
        where = torch.unravel_index(index, shape)
        rows = torch.stack([x.expand(shape)[where] for x in wide], 1).cpu().numpy()
        values = y.mid.expand(shape)[where].cpu().numpy().copy()
        finite = np.isfinite(rows).all(1)  # the others are limits: nothing to round
        found = pair_arrays.narrow_elements_by_pairs(formula, torch.from_numpy(rows).unbind(1))
        if found is not None:
            in_pairs, left = (x.numpy() for x in found)
            passed = finite & ~left & (in_pairs != 0)
            values[passed] = in_pairs[passed]
            finite &= ~passed
        exact = exact_elements(formula, rows[finite])
        # An exact zero has the sign that IEEE arithmetic gives it step by step, where that gives 0.
        signed = (values[finite] == 0) & (exact == 0) & ~np.signbit(exact)
        values[finite] = np.where(signed, values[finite], exact)
        return values

    return round_ball(y.mid.expand(shape), _wide(y.error, device).expand(shape), resolve)


def rowwise_by_balls(formula: Formula, dim: int, *operands: Tensor) -> Tensor:
    """Evaluate as `rowwise` does, on the reference path alone."""
    operands = torch.broadcast_tensors(*[x.double() for x in operands])
    wide = [torch.atleast_1d(x).movedim(dim, -1) for x in operands]
    if target() is BINARY64:
        result = _rows_in_binary64(formula, wide).movedim(-1, dim)
        return result if operands[0].dim() else result.reshape(())
    y = formula(TENSORS, *[TENSORS.exact(x) for x in wide])
    n = y.mid.shape[-1]

    def resolve(index: Tensor) -> Any:
        rows, row_of = torch.unique(index // n, return_inverse=True)
        picked = torch.stack([x.reshape(-1, x.shape[-1])[rows] for x in wide], 1).cpu().numpy()
        at = row_of.cpu().numpy(), (index % n).cpu().numpy()
        values: NDArray[Any] = y.mid.reshape(-1, n)[rows].cpu().numpy()[at]
        # The value of a row with an infinity is a limit: nothing to round.
        finite = np.isfinite(picked).all((1, 2))
        wanted = finite[at[0]]
        found = pair_arrays.narrow_rows_by_pairs(formula, torch.from_numpy(picked).unbind(1))
        if found is not None:
            rounded, failed = (x.expand(len(rows), n).numpy()[at] for x in found)
            values = np.where(wanted & ~failed, rounded, values)
            wanted &= failed
        if wanted.any():
            values[wanted] = exact_rows(formula, picked, at[0][wanted], at[1][wanted])
        return values

    # + 0.0: an exact zero is +0, as its sign may depend on the order of a sum in native arithmetic
    result = round_ball(y.mid + 0.0, y.error, resolve).movedim(-1, dim)
    return result if operands[0].dim() else result.reshape(())


# ---- results in binary64 ---------------------------------------------------------------------------


# What the exact path raises at a pole, or outside of a function's domain.
_NO_VALUE = (ZeroDivisionError, TypeError, AttributeError, ValueError)


def _elements_in_binary64(formula: Formula, *operands: Union[Tensor, float, int]) -> Tensor:
    """Evaluate as `elementwise` does, rounded to binary64: in pairs, then on the exact path."""
    device = next(x.device for x in operands if isinstance(x, Tensor))
    wide = [_wide(x, device) for x in operands]
    shape = torch.broadcast_shapes(*[x.shape for x in wide])
    program = executor.cached_pair_program(formula, len(wide))
    found = pair_arrays.elements_by_pairs(formula, program, wide) if shape.numel() else None
    if found is None:
        value = torch.empty(shape, dtype=torch.float64, device=device)
        failed = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        value, failed = found
    unsigned = failed | (value == 0)  # the sign of a zero is that of IEEE arithmetic, step by step
    if unsigned.any():
        few = [x.expand(shape)[unsigned] for x in wide]
        y = formula(TENSORS, *[TENSORS.exact(x) for x in few])
        mid = torch.as_tensor(getattr(y, "mid", y), dtype=torch.float64).expand(few[0].shape)
        left = failed[unsigned]
        rows = torch.stack([x[left] for x in few], 1).cpu().numpy()
        exact = torch.zeros_like(mid)
        exact[left] = torch.from_numpy(_exact_or_limits(formula, rows, mid[left].cpu().numpy())).to(
            device
        )
        value[unsigned] = torch.where((exact == 0) & ~exact.signbit() & (mid == 0), mid, exact)
    return value


def _exact_or_limits(formula: Formula, rows: NDArray[Any], mid: NDArray[Any]) -> NDArray[Any]:
    """Return the values on rows of operands; mid is what binary64 gives for each."""
    values = np.empty(len(rows))
    ordinary = np.isfinite(rows).all(1) & np.isfinite(mid)
    values[ordinary] = exact_elements(formula, rows[ordinary])
    others = np.flatnonzero(~ordinary)
    bits = np.ascontiguousarray(rows[others]).view(np.int64)  # 0 is not -0
    _, first, at = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    limits = [_limit(formula, rows[i], mid[i]) for i in others[first]]
    values[others] = np.array(limits)[np.reshape(at, -1)] if limits else 0
    return values


def _limit(formula: Formula, row: NDArray[Any], mid: Any) -> Any:
    """Return the value of one element whose operands or whose value in binary64 are not finite.

    Binary64 may overflow on the way to the value, and a value beside an infinite operand may be finite.
    """
    size = np.abs(row[np.isfinite(row) & (row != 0)])
    moderate = ((size > 2.0**-256) & (size < 2.0**256)).all()
    if moderate and not np.isfinite(row).all() and (mid == 0 or not np.isfinite(mid)):
        return mid
    try:
        if np.isfinite(row).all():
            found = exact_values(formula, list(row))[0]
            return found or math.copysign(found, _moderate(formula, row))
        with _lock:
            ctx = _multi_precision_context(_BITS[-1])

            def value_at(numbers: NDArray[Any]) -> Any:
                y = formula(ctx, *[ctx.exact(np.array([ctx.mp.mpf(float(x))])) for x in numbers])
                return np.atleast_1d(y.mid)[0]

            value = value_at(row)
            if ctx.mp.isnan(value):
                return math.nan
            if value:
                return nearest(_mp_to_fraction(value))
            # An infinite operand gives a zero without a sign, a large one the sign of the limit.
            near = value_at(np.clip(row, -(2.0**64), 2.0**64))
            return -0.0 if near < 0 else 0.0
    except _NO_VALUE:
        if np.isfinite(mid):
            raise NotExactError(f"it is not defined in float64 for {row.tolist()}") from None
        return mid  # a pole, or outside of the domain


def _moderate(formula: Formula, row: NDArray[Any]) -> float:
    """Return what binary64 gives for operands of the same signs that overflow nowhere on the way."""
    size = np.clip(np.abs(row), 2.0**-100, 2.0**100)
    numbers = np.where(row == 0, row, np.copysign(size, row))
    y: Any = formula(TENSORS, *[TENSORS.exact(x) for x in torch.from_numpy(numbers)])
    return float(getattr(y, "mid", y))


def _rows_in_binary64(formula: Formula, operands: Sequence[Tensor]) -> Tensor:
    """Evaluate as `rowwise_by_balls` does, rounded to binary64. Rows lie along the last axis."""
    found = pair_arrays.rows_by_pairs(formula, operands) if operands[0].numel() else None
    if found is not None and not found[1].any():
        return found[0] + 0.0
    y = formula(TENSORS, *[TENSORS.exact(x) for x in operands])
    if not operands[0].numel():  # no rows, or sums of nothing and their quotients
        empty: Tensor = y.mid + 0.0
        return empty
    value, failed = found or (y.mid.clone(), torch.ones_like(y.mid, dtype=torch.bool))
    value = (value.expand(y.mid.shape) + 0.0).contiguous()
    failed = failed.expand(y.mid.shape)
    n = y.mid.shape[-1]
    index = failed.reshape(-1).nonzero().squeeze(1)
    if len(index):
        rows, row_of = torch.unique(index // n, return_inverse=True)
        flat = [x.reshape(math.prod(x.shape[:-1]), x.shape[-1])[rows] for x in operands]
        picked = torch.stack(flat, 1).cpu().numpy()
        at = row_of.cpu().numpy(), (index % n).cpu().numpy()
        exact: NDArray[Any] = y.mid.reshape(-1, n)[rows].cpu().numpy()[at] + 0.0
        finite = np.isfinite(picked).all((1, 2))
        if not (finite[at[0]] | ~np.isfinite(exact) | (exact == 0)).all():
            raise NotExactError("it is not defined in float64 for rows with an infinite number")
        overflow = finite[at[0]] & ~np.isfinite(exact)  # or a pole, or outside of the domain
        wanted = finite[at[0]] & ~np.isin(at[0], at[0][overflow])
        exact[wanted] = exact_rows(formula, picked, at[0][wanted], at[1][wanted])
        for i in np.flatnonzero(finite[at[0]] & ~wanted):
            with suppress(*_NO_VALUE):
                exact[i] = exact_rows(formula, picked, at[0][i : i + 1], at[1][i : i + 1])[0]
        value.view(-1)[index] = torch.from_numpy(exact).to(value.device)
    return value


# ---- the exact path --------------------------------------------------------------------------------

# A value that agrees with a midpoint of two binary32 numbers in all these bits is taken to be the midpoint.
# This is part of the contract: a term that is 2^-1100 times smaller than the rest counts as zero.
_BITS = (120, 240, 480, 1100)


_lock = threading.Lock()  # mpmath's caches are not thread-safe


def exact_elements(formula: Formula, rows: NDArray[Any]) -> NDArray[Any]:
    """Return the correctly rounded values of a formula on rows of finite numbers, float64 [k, operands]."""
    if not len(rows):
        return np.empty(0)
    if (rows == rows[0]).all():  # a tensor may be constant, or have few values
        return np.full(len(rows), exact_values(formula, list(rows[0]))[0])
    if rows.shape[1] == 1:
        few, inverse = np.unique(rows, return_inverse=True)
        if len(few) < len(rows):
            values: NDArray[Any] = exact_elements(formula, few[:, None])[np.reshape(inverse, -1)]
            return values
    try:
        operands = [Rationals.of_floats(x) for x in rows.T]
        return _rounded(formula(RationalContext(), *operands), len(rows))
    except (Irrational, ZeroDivisionError):  # of some element
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        found = _exact_values_of_rows(formula, unique)
        return found[np.reshape(inverse, -1)]  # type: ignore[no-any-return]


def _exact_values_of_rows(formula: Formula, rows: NDArray[Any]) -> NDArray[Any]:
    """Return the values on rows of operands: together with few bits, and what they leave one by one."""
    values, left = np.empty(len(rows)), np.arange(len(rows))
    with suppress(*_NO_VALUE), _lock:
        columns = [_to_fraction(x) for x in rows.T]
        values, failed = _at_bits(_BITS[0], formula, columns, slice(None))[:2]
        left = np.flatnonzero(failed)
    for i in left:
        values[i] = exact_values(formula, list(rows[i]))[0]
    return values


def exact_rows(
    formula: Formula, rows: NDArray[Any], row_of: NDArray[Any], column: NDArray[Any]
) -> NDArray[Any]:
    """Return some of the correctly rounded values of a formula over rows.

    rows: float64 [rows, operands, n]. row_of, column: int64 [k], the values that are wanted, of rows of
    finite numbers. Returns float64 [k].
    """
    at, position = np.unique(row_of, return_inverse=True)
    values = np.empty(len(column))
    together = max(1, _CHUNK // rows.shape[2])
    try:
        for start in range(0, len(at), together):  # numbers of any length
            part = slice(start, start + together)
            here = (position >= part.start) & (position < part.stop)
            operands = [Rationals.of_floats(x) for x in rows[at[part]].transpose(1, 0, 2)]
            y: Rationals = formula(RationalContext(), *operands)
            values[here] = y[position[here] - start, column[here]].nearest()
        return values
    except (Irrational, ZeroDivisionError):  # of some row
        for i, row in enumerate(at):
            of_row = position == i
            values[of_row] = exact_values(formula, list(rows[row]), column[of_row])
        return values


def _rounded(y: Any, length: int) -> NDArray[Any]:
    """Return rational numbers, or one for all, rounded to binary32."""
    y = y if isinstance(y, Rationals) else Rationals(y.numerator, y.denominator)
    return np.broadcast_to(y.nearest(), length).copy()


def exact_values(
    formula: Formula, operands: Sequence[NDArray[Any]], at: Any = slice(None)
) -> NDArray[Any]:
    """Return the correctly rounded values of a formula on finite numbers.

    operands: float64 arrays that broadcast together. at: the indices of the values that are wanted.
    Returns a float64 array of binary32 numbers.
    Raises ZeroDivisionError where the formula divides by zero.
    """
    try:
        y: Rationals = formula(RationalContext(), *[Rationals.of_floats(x) for x in operands])
        return y[at].nearest()  # type: ignore[no-any-return]
    except Irrational:
        pass
    with _lock:
        return _multi_precision(formula, [_to_fraction(np.atleast_1d(x)) for x in operands], at)


_multi_precision_context = lru_cache(maxsize=None)(MultiPrecisionContext)  # used under the lock


def _multi_precision(formula: Formula, rationals: Sequence[Any], at: Any) -> NDArray[Any]:
    for bits in _BITS:
        values, failed, mid = _at_bits(bits, formula, rationals, at)
        if not failed.any():
            return values
    return np.where(failed, _nearest(_snap(_from_mp(mid))), values)


def _at_bits(
    bits: int, formula: Formula, rationals: Sequence[Any], at: Any
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the rounded values, where they fail the test, and the numbers of so many bits."""
    ctx = _multi_precision_context(bits)
    number = np.frompyfunc(ctx.number, 1, 1)
    y = formula(ctx, *[ctx.exact(number(x)) for x in rationals])
    mid, error = y.mid[at], np.broadcast_to(y.error, y.mid.shape)[at]
    error = np.where(error == error, error, ctx.infinity)  # 0 times infinity: no bound is known
    low, high = (torch.from_numpy(_nearest(_from_mp(end))) for end in (mid - error, mid + error))
    result, failed = rounding_test(low, high)
    return result.double().numpy(), failed.numpy(), mid


def _mp_to_fraction(x: Any) -> Fraction:
    """Return an mpmath number as a fraction; outside binary32's range, any fraction outside it will do."""
    sign, mantissa, exponent, bits = x._mpf_
    if not mantissa and exponent:  # infinite
        exponent, mantissa = 2000, 1
    exponent = min(max(exponent, -2000 - bits), 2000)
    q = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -q if sign else q


def _to_60_bits(q: Fraction) -> Fraction:
    """Return the nearest number of about 60 bits; a midpoint of binary32 numbers has 25."""
    unit = Fraction(2) ** (abs(q.numerator).bit_length() - q.denominator.bit_length() - 60)
    return round(q / unit) * unit


_to_fraction: Any = np.frompyfunc(Fraction, 1, 1)
_from_mp: Any = np.frompyfunc(_mp_to_fraction, 1, 1)
_snap: Any = np.frompyfunc(_to_60_bits, 1, 1)
_nearest: Any = np.vectorize(nearest, otypes=[float])
