"""Evaluation of a definition on tensors, each result rounded once.

`elementwise` and `rowwise` evaluate `formula(k, x, y, ...)` (see field.py) in binary64, put Ziv's
rounding test to the result and take the rare elements that fail to exact fractions and to mpmath.
Where the compiled loops are there, the first evaluation is theirs (compiled.py); what they cannot decide
comes here all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial
from typing import Any, Callable, Optional, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic.compiler import executor
from reproml.arithmetic.numerics.balls import (
    Formula,
    Irrational,
    MultiPrecisionContext,
    RationalContext,
    TensorContext,
)
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.rounding import nearest, round_ball

TENSORS = TensorContext()
# A value that agrees with a midpoint of two binary32 numbers to 1,000 bits is taken to be it. This is
# part of the contract: a term that is 2^-1000 times smaller than the rest counts as zero.
_BITS = (120, 240, 480, 1100)


_lock = threading.Lock()  # mpmath's caches are not made for threads


def exact_values(
    formula: Formula, operands: Sequence[NDArray[Any]], at: Any = slice(None)
) -> NDArray[Any]:
    """The correctly rounded values of a formula on finite numbers.

    operands: float64 arrays that broadcast together. at: the places whose values are wanted.
    Returns a float64 array of binary32 numbers.
    Raises ZeroDivisionError where the formula divides by zero.
    """
    rationals = [_to_fraction(np.atleast_1d(x)) for x in operands]
    try:
        return np.asarray(_nearest(formula(RationalContext(), *rationals)[at]))
    except Irrational:
        pass
    with _lock:
        return _multi_precision(formula, rationals, at)


_multi_precision_context = lru_cache(maxsize=None)(MultiPrecisionContext)  # under the lock


def _multi_precision(formula: Formula, rationals: Sequence[Any], at: Any) -> NDArray[Any]:
    for bits in _BITS:
        k = _multi_precision_context(bits)
        number = np.frompyfunc(k.number, 1, 1)
        y = formula(k, *[k.exact(number(x)) for x in rationals])
        c, e = y.mid[at], np.broadcast_to(y.error, y.mid.shape)[at]
        e = np.where(e == e, e, k.infinity)  # 0 times infinity: nothing is known
        low, high = (_nearest(_from_mp(end)) for end in (c - e, c + e))
        same = (low == high) & (np.signbit(low) == np.signbit(high))
        if same.all():
            return np.asarray(high)
    return np.where(same, high, _nearest(_snap(_from_mp(c))))


def _mp_to_fraction(x: Any) -> Fraction:
    """A mpmath number as a fraction; what is out of binary32's range may stay anywhere out of it."""
    sign, mantissa, exponent, bits = x._mpf_
    if not mantissa and exponent:  # infinite
        exponent, mantissa = 2000, 1
    exponent = min(max(exponent, -2000 - bits), 2000)
    q = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -q if sign else q


def _to_60_bits(q: Fraction) -> Fraction:
    """The nearest number of about 60 bits; a midpoint of binary32 has 25."""
    unit = Fraction(2) ** (abs(q.numerator).bit_length() - q.denominator.bit_length() - 60)
    return round(q / unit) * unit


_to_fraction: Any = np.frompyfunc(Fraction, 1, 1)
_from_mp: Any = np.frompyfunc(_mp_to_fraction, 1, 1)
_snap: Any = np.frompyfunc(_to_60_bits, 1, 1)
_nearest: Any = np.vectorize(nearest, otypes=[float])


# Elements at once: the float64 temporaries of a formula stay in a processor's cache.
_CHUNK = 1 << 15


def _wide(x: Union[Tensor, float, int], device: torch.device) -> Tensor:
    return to_device(x, device).double()


def elementwise(
    formula: Formula,
    *operands: Union[Tensor, float, int],
    reference: Optional[Callable[..., Tensor]] = None,
    fast: Optional[str] = None,
) -> Tensor:
    """The formula on each element of operands that broadcast together, rounded once to float32.

    plain: the whole definition on tensors, where the formula only stands for it as long as its result
    passes the rounding test. direct: the name of the formula's own loop in csrc/fast.c, if it has one.
    """
    definition = reference or partial(_in_chunks, formula)
    exact_path = None if reference else partial(_exactly, formula)
    result = executor.elementwise(formula, definition, operands, fast, exact_path)
    return definition(*operands) if result is None else result


def _exactly(formula: Formula, *operands: Tensor) -> Optional[Tensor]:
    """The values, which are numbers, at a few places [n] that a program left: by exact numbers at once,
    as no bound is better in binary64 here. None if one is zero: its sign takes the definition."""
    rows = torch.stack(torch.broadcast_tensors(*operands), 1).double().numpy()
    values = [float(exact_values(formula, list(row))[0]) for row in rows]
    return torch.tensor(values, dtype=torch.float64).float() if all(values) else None


def _in_chunks(formula: Formula, *operands: Union[Tensor, float, int]) -> Tensor:
    shape = torch.broadcast_shapes(*[x.shape for x in operands if isinstance(x, Tensor)])
    n = shape.numel()
    device = next(x.device for x in operands if isinstance(x, Tensor))
    if n <= _CHUNK or device.type != "cpu":
        return _elementwise(formula, *operands)
    result = torch.empty(n, dtype=torch.float32, device=device)
    flat = [
        x.expand(shape).reshape(-1) if isinstance(x, Tensor) and x.numel() > 1 else x
        for x in operands
    ]
    for at in range(0, n, _CHUNK):
        part = slice(at, at + _CHUNK)
        chunk = [x[part] if isinstance(x, Tensor) and x.numel() == n else x for x in flat]
        result[part] = _elementwise(formula, *chunk).reshape(-1)
    return result.reshape(shape)


def _elementwise(formula: Formula, *operands: Union[Tensor, float, int]) -> Tensor:
    device = next(x.device for x in operands if isinstance(x, Tensor))
    wide = [_wide(x, device) for x in operands]
    y = formula(TENSORS, *[TENSORS.exact(x) for x in wide])
    shape = torch.broadcast_shapes(*[x.shape for x in wide])
    if not shape:
        return _elementwise(formula, *[x.reshape(1) for x in wide]).reshape(())

    def value(row: NDArray[Any], c: float) -> float:
        if not np.isfinite(row).all():
            return c  # a limit: nothing to round
        exact = float(exact_values(formula, list(row))[0])
        # An exact zero has the sign that IEEE arithmetic gives it step by step, where it gives 0.
        return c if c == 0 and exact == 0 and not np.signbit(exact) else exact

    def resolve(index: Tensor) -> list[float]:
        where = torch.unravel_index(index, shape)
        rows = torch.stack([x.expand(shape)[where] for x in wide], 1).cpu().numpy()
        return [value(row, c) for row, c in zip(rows, y.mid.expand(shape)[where].tolist())]

    return round_ball(y.mid.expand(shape), _wide(y.error, device).expand(shape), resolve)


def rowwise(
    formula: Formula,
    dim: int,
    *operands: Tensor,
    reference: Optional[Callable[..., Tensor]] = None,
    fast: Optional[str] = None,
) -> Tensor:
    """The formula on each row along `dim`, of operands that broadcast, rounded once to float32.

    The formula gives a value for each element of the row, or one for each row (then `dim` has
    length 1 in the result). plain, direct: as for `elementwise`, plain on rows along the last axis.
    """
    definition = reference or partial(_rowwise, formula, -1)
    result = executor.rowwise(formula, definition, dim, operands, fast)
    if result is not None:
        return result
    if reference is None:
        return _rowwise(formula, dim, *operands)
    wide = [torch.atleast_1d(x).movedim(dim, -1) for x in torch.broadcast_tensors(*operands)]
    result = reference(*wide).movedim(-1, dim)
    return result if operands[0].dim() else result.reshape(())


def _rowwise(formula: Formula, dim: int, *operands: Tensor) -> Tensor:
    operands = torch.broadcast_tensors(*[x.double() for x in operands])
    wide = [torch.atleast_1d(x).movedim(dim, -1) for x in operands]
    y = formula(TENSORS, *[TENSORS.exact(x) for x in wide])
    n = y.mid.shape[-1]

    def resolve(index: Tensor) -> list[float]:
        rows, counts = torch.unique_consecutive(index // n, return_counts=True)
        picked = torch.stack([x.reshape(-1, x.shape[-1])[rows] for x in wide], 1).cpu().numpy()
        centre = y.mid.reshape(-1, n)[rows].cpu().numpy()
        values: list[float] = []
        for row, c, at in zip(picked, centre, (index % n).split(counts.tolist())):
            at = at.cpu().numpy()
            # A row with an infinity has a limit for its value: nothing to round.
            values += list(
                exact_values(formula, list(row), at) if np.isfinite(row).all() else c[at]
            )
        return values

    # + 0.0: an exact zero is +0, as the order of a sum may decide its sign natively
    result = round_ball(y.mid + 0.0, y.error, resolve).movedim(-1, dim)
    return result if operands[0].dim() else result.reshape(())
