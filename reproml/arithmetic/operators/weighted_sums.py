"""Sums of few elements with rational weights, rounded once: interpolation, and its gradients.

`separable_sums` applies a sparse matrix of rational numbers to each of the last axes of a tensor. It
computes in float64 with rounded weights (csrc/weighted_sums.c), or in pairs of float64 numbers if the
result is float64, and takes what passes the rounding test; the rest is summed exactly, with integers as
weights. A weight of zero leaves its element out, even if that is infinite or NaN.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.pair_arrays import PairArray, PairArrays, round_pairs
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import BINARY64, narrow, target
from reproml.arithmetic.numerics.rounding import Resolve, gamma, nearest, round_sum, two_sum

_CHUNK = 1 << 17  # elements at once, so that the temporaries stay in a processor's cache

# A weight of up to 29 bits times a binary32 number is exact in binary64, and so is a divisor of up to 27
# bits times a midpoint of two binary32 numbers.
_WEIGHT, _DIVISOR = 1 << 29, 1 << 27

Row = dict[int, Fraction]


class SparseMatrix:
    """A matrix of rational numbers with few in each row: weights[i, k] is in column index[i, k] of row i.

    index: int64 [rows, k]. weights: float64 [rows, k], each rounded once. numerators: integers [rows, k],
    weights times divisors; divisors: integers [rows]. Rows with fewer numbers end with weights of zero.
    """

    def __init__(self, rows: Sequence[Row], columns: int) -> None:
        rows = [{j: w for j, w in row.items() if w} for row in rows]
        width = max([1, *map(len, rows)])
        self.columns = columns
        self._rows = rows
        shape = (len(rows), width)
        self.index = np.zeros(shape, np.int64)
        self.weights = np.zeros(shape)
        self.numerators = np.zeros(shape, object)
        self.divisors = np.ones(len(rows), object)
        for i, row in enumerate(rows):
            divisor = math.lcm(*[w.denominator for w in row.values()])
            self.divisors[i] = divisor
            for k, (j, w) in enumerate(row.items()):
                self.index[i, k] = j
                self.weights[i, k] = w.numerator / w.denominator
                self.numerators[i, k] = w.numerator * (divisor // w.denominator)
        self.largest = int(abs(self.numerators).max(initial=0))
        self.largest_divisor = max([1, *self.divisors])

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def pairs(self) -> NDArray[np.float64]:
        """Return s, t and rad, float64 [3, rows, k], such that a weight is within rad of s + t."""
        pairs = np.zeros((3, *self.weights.shape))
        for i, row in enumerate(self._rows):
            for k, w in enumerate(row.values()):
                s = float(self.weights[i, k])
                t = float(w - Fraction(s))
                exact = w == Fraction(s) + Fraction(t)
                pairs[:, i, k] = s, t, 0.0 if exact else abs(s) * 2.0**-105
        return pairs

    @cached_property
    def integers(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the numerators and the divisors as float64, which small ones are exactly."""
        return self.numerators.astype(np.float64), self.divisors.astype(np.float64)

    @cached_property
    def transposed(self) -> SparseMatrix:
        rows: list[Row] = [{} for _ in range(self.columns)]
        for i, row in enumerate(self._rows):
            for j, w in row.items():
                rows[j][i] = w
        return SparseMatrix(rows, len(self))


_AXES = 3  # of the compiled loop
_NO_AXIS = SparseMatrix([{0: Fraction(1)}], 1)


def separable_sums(x: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
    """Apply a matrix to each of the last axes of x: each result is one weighted sum, rounded once.

    x: float32 [..., *columns of the matrices]. Returns float32 [..., *rows]. A sum without terms is +0.
    """
    inner, outer = [m.columns for m in matrices], [len(m) for m in matrices]
    leading = x.shape[: x.dim() - len(matrices)]
    planes = x.reshape(-1, *inner) if x.numel() else x.new_zeros(math.prod(leading), *inner)
    compiled = _by_loop(planes, matrices)
    if compiled is None:
        result = _in_chunks(planes, matrices)
    else:
        result, left = compiled
        if left is not None:
            result[left] = _in_chunks(planes[left], matrices)
    return result.reshape(*leading, *outer)


def _by_loop(
    x: Tensor, matrices: Sequence[SparseMatrix]
) -> Optional[tuple[Tensor, Optional[Tensor]]]:
    """Compute the sums of planes by csrc/weighted_sums.c; None where it does not apply.

    Returns the sums and the planes with a sum that failed, int64 [k]; None: no plane.
    """
    shape = (len(x), *map(len, matrices))
    loops = kernels.loops()
    if loops is None or not (x.is_cpu and x.numel() and math.prod(shape)) or len(matrices) > _AXES:
        return None
    axes = [*[_NO_AXIS] * (_AXES - len(matrices)), *matrices]
    arrays: list[tuple[Any, ...]] = [(m.index, m.weights) for m in axes]
    growth, divisors = 0.0, None
    if _are_small(matrices):
        growth = float(_growth(matrices))
        arrays = [(m.index, m.weights, m.integers[0]) for m in axes]
        first, second, third = (m.integers[1] for m in axes)
        divisors = first[:, None, None] * second[:, None] * third
    pointers = [a.ctypes.data for of_axis in zip(*arrays) for a in of_axis]
    sizes = [size for m in axes for size in (len(m), m.columns, m.index.shape[1])]
    x = x.contiguous()
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    failed = torch.empty(shape, dtype=torch.bool, device="cpu")
    count = loops.reproml_weighted_sums(
        len(x),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_void_p * 9)(*pointers),
        None if divisors is None else divisors.ctypes.data,
        growth,
        _roundings(matrices),
        *[t.data_ptr() for t in (x, out, failed)],
    )
    return out, failed.flatten(1).any(1).nonzero().squeeze(1) if count else None


def _roundings(matrices: Sequence[SparseMatrix]) -> int:
    """Each sum has a rounding for each term, and a weight and a product are rounded for each axis."""
    return sum(m.index.shape[1] + 2 for m in matrices)


def _are_small(matrices: Sequence[SparseMatrix]) -> bool:
    """Return whether products with integer weights, and with divisors, are exact in binary64."""
    return (
        target() is not BINARY64
        and math.prod(m.largest for m in matrices) < _WEIGHT
        and math.prod(m.largest_divisor for m in matrices) < _DIVISOR
    )


def _growth(matrices: Sequence[SparseMatrix]) -> int:
    """Return how large a sum with integer weights may be, relative to the largest element."""
    return math.prod(max(abs(m.numerators).sum(1)) for m in matrices)


def _in_chunks(planes: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
    outer = list(map(len, matrices))
    result = planes.new_empty(len(planes), *outer)
    size = max(1, math.prod(planes.shape[1:]), math.prod(outer))
    for part in zip(*[t.split(max(1, _CHUNK // size)) for t in (planes, result)]):
        if part[1].numel():
            part[1].copy_(_sums_of_planes(part[0], matrices))
    return result


def _sums_of_planes(x: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
    """[planes, *columns] -> [planes, *rows]"""
    finite = x.isfinite()
    limits = None
    if not x.is_cpu or not finite.all():
        limits = _in_order(x.double(), matrices)  # infinite or NaN where an operand is
        x = torch.where(finite, x, 0.0)
    wide = x.double()

    def resolve(failed: Tensor) -> Any:
        return _exact_values(wide, matrices, failed)

    if target() is BINARY64:
        result = _in_pairs(wide, matrices, resolve)
        return result if limits is None else torch.where(limits.isfinite(), result, limits)
    mid = _apply(wide, matrices, [m.weights for m in matrices])
    magnitude = _apply(wide.abs(), matrices, [abs(m.weights) for m in matrices])
    result = round_sum(mid + 0.0, magnitude * gamma(_roundings(matrices)), resolve)
    return result if limits is None else torch.where(limits.isfinite(), result, limits.float())


def _apply(
    x: Tensor, matrices: Sequence[SparseMatrix], weights: Sequence[NDArray[np.float64]]
) -> Tensor:
    for axis, (m, numbers) in enumerate(zip(matrices, weights), 1):
        factors = to_device(torch.from_numpy(numbers), x.device)
        index = to_device(torch.from_numpy(m.index), x.device)
        shape = [-1] + [1] * (len(matrices) - axis)
        terms = [
            x.index_select(axis, index[:, k]).mul_(factors[:, k].reshape(shape))
            for k in range(index.shape[1])
        ]
        x = terms[0]
        for term in terms[1:]:
            x.add_(term)
    return x


def _in_pairs(x: Tensor, matrices: Sequence[SparseMatrix], resolve: Resolve) -> Tensor:
    """Compute the sums rounded to binary64. Without the compiled loops all of them are exact sums."""
    if kernels.library is None or not x.is_cpu:
        shape = (len(x), *map(len, matrices))
        index = torch.arange(math.prod(shape), device=x.device)
        exact = torch.as_tensor(resolve(index), dtype=torch.float64)
        return to_device(exact, x.device).reshape(shape)
    ctx = PairArrays()
    total = ctx.exact(x)
    for axis, m in enumerate(matrices, 1):
        shape = (-1, *[1] * (len(matrices) - axis))
        index, pairs = torch.from_numpy(m.index), torch.from_numpy(m.pairs)
        terms = [
            PairArray(
                ctx, *[y.index_select(axis, index[:, k]) for y in (total.s, total.t, total.rad)]
            )
            * PairArray(ctx, *[y[:, k].reshape(shape) for y in pairs])
            for k in range(index.shape[1])
        ]
        total = sum(terms[1:], terms[0])
    result, failed = round_pairs(total.s, total.t, total.rad)
    at = failed.reshape(-1).nonzero().squeeze(1)
    if len(at):
        result.view(-1)[at] = torch.as_tensor(resolve(at), dtype=torch.float64)
    return result + 0.0


def _in_order(x: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
    """Return the sum of the terms whose weight is not zero; right where one of them is infinite or NaN."""
    total = torch.zeros(len(x), *map(len, matrices), dtype=torch.float64, device=x.device)
    for ks in np.ndindex(*[m.index.shape[1] for m in matrices]):
        term, weight = x, torch.ones((), dtype=torch.float64, device=x.device)
        for axis, (m, k) in enumerate(zip(matrices, ks), 1):
            shape = [-1] + [1] * (len(matrices) - axis)
            term = term.index_select(
                axis, to_device(torch.from_numpy(m.index[:, k].copy()), x.device)
            )
            weight = weight * to_device(torch.from_numpy(m.weights[:, k].copy()), x.device).reshape(
                shape
            )
        total += torch.where(weight == 0, 0.0, term * weight)
    return total


def _exact_values(x: Tensor, matrices: Sequence[SparseMatrix], at: Tensor) -> Any:
    """Return the correctly rounded sums at these flat indices of the result, float64 [k]."""
    x, at = x.cpu(), at.cpu()
    if not _are_small(matrices):
        return _by_fractions(*_terms(x, matrices, at, object))
    values = np.empty(len(at))
    rest = torch.ones_like(at, dtype=torch.bool)
    area = math.prod(map(len, matrices))
    if len(at) > len(x) * area // 16:  # all sums of a plane cost less than its failures one by one
        planes = (at // area).unique()
        planes = planes[_are_short(x[planes], matrices)]
        place = torch.full((len(x),), -1, device="cpu").index_copy(
            0, planes, torch.arange(len(planes), device="cpu")
        )[at // area]
        rest = place < 0
        every = _of_planes(x[planes], matrices).reshape(len(planes), area)
        values[~rest.numpy()] = every[place[~rest], at[~rest] % area].numpy()
    if rest.any():
        terms, n, d = _terms(x, matrices, at[rest], np.float64)
        values[rest.numpy()] = nearest_of_quotients(
            torch.from_numpy(terms * n), torch.from_numpy(d)
        )
    return values


def _terms(
    x: Tensor, matrices: Sequence[SparseMatrix], at: Tensor, dtype: Any
) -> tuple[Any, Any, Any]:
    """Return the elements that each sum adds up, their integer weights, [k, terms], and divisors, [k]."""
    plane, *places = np.unravel_index(at.numpy(), (len(x), *map(len, matrices)))
    index, n, d = plane[:, None], np.ones((len(plane), 1), dtype), np.ones(len(plane), dtype)
    for m, i in zip(matrices, places):
        here = (index[:, :, None] * m.columns + m.index[i][:, None, :]).reshape(len(i), -1)
        numerators, divisors = m.numerators[i].astype(dtype), m.divisors[i].astype(dtype)
        n = (n[:, :, None] * numerators[:, None, :]).reshape(len(i), -1)
        index, d = here, d * divisors
    return x.reshape(-1).numpy()[index], n, d


def _by_fractions(values: Any, weights: Any, divisors: Any) -> Any:
    rows = zip(values.tolist(), weights.tolist(), divisors.tolist())
    return np.array([nearest(sum(Fraction(v) * w for v, w in zip(a, b)) / c) for a, b, c in rows])


def _are_short(x: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
    """Return for which planes binary64 holds all sums with integer weights exactly, in any order.

    All of these are multiples of the last bit of any element, and not larger than `largest`.
    """
    bits = x.flatten(1).view(torch.int64)
    whole = (bits & (1 << 52) - 1) | 1 << 52
    exponents = ((bits >> 52) & 0x7FF) - 1075
    last = ((whole & -whole).double().view(torch.int64) + (exponents << 52)).view(torch.float64)
    last = torch.where(bits << 1 == 0, torch.inf, last).amin(1)
    largest = x.flatten(1).abs().amax(1) * float(_growth(matrices))
    return largest <= last * 2.0**53


def _of_planes(x: Tensor, matrices: Sequence[SparseMatrix]) -> Tensor:
    """Return all sums of planes for which `_are_short` holds, rounded once: float64 [planes, *rows]."""
    sums = _apply(x, matrices, [m.integers[0] for m in matrices])
    divisors = torch.ones((), dtype=torch.float64, device="cpu")
    for m in matrices:
        divisors = divisors.unsqueeze(-1) * torch.from_numpy(m.integers[1])
    return _quotients(sums, torch.zeros_like(divisors), divisors)


def nearest_of_quotients(terms: Tensor, divisors: Tensor) -> Any:
    """Return the correctly rounded sums of rows of finite float64 terms [k, n], divided by integers [k].

    divisors: float64, positive and below _DIVISOR. Returns a float64 numpy array of numbers of the target.

    A row becomes s + t exactly, by TwoSum (Knuth, The Art of Computer Programming 2, section 4.2.2). Rows
    that are too long for two numbers are computed by fractions.
    """
    s, t = terms[:, 0], torch.zeros_like(divisors)
    inexact = torch.zeros_like(divisors, dtype=torch.bool)
    for k in range(1, terms.shape[1]):
        s, lost = two_sum(s, terms[:, k])
        t, rest = two_sum(t, lost)
        inexact |= rest != 0
    values = _quotients(*two_sum(s, t), divisors).numpy()
    for i in inexact.nonzero().squeeze(1).tolist():
        total = sum(map(Fraction, terms[i].tolist()), Fraction(0))
        values[i] = nearest(total / int(divisors[i]))
    return values


def _quotients(s: Tensor, t: Tensor, divisors: Tensor) -> Tensor:
    """Return (s + t) / divisors, rounded once to the target: float64, s is s + t rounded.

    The arguments broadcast; the divisors are those of `nearest_of_quotients`. Let m be the number nearest
    to s / d that has one bit more than the target's; below the normal numbers, half of their last place.
    If it is a midpoint of numbers of the target, the sign of s + t - m d decides: m d is exact, s - m d too
    as the two are close (Sterbenz) or m is 0, and the sign of a rounded sum is right. Otherwise no midpoint
    is near, and s / d rounds correctly.
    """
    quotient = s / divisors
    to = target()
    last = 1 << (52 - to.precision)  # the last place of a midpoint
    middle = ((quotient.view(torch.int64) + last // 2) & -last).view(torch.float64)
    is_midpoint = (middle.view(torch.int64) & last) != 0
    small = quotient.abs() < 2.0 ** (to.lowest + to.precision)
    if small.any():
        unit = 2.0 ** (to.lowest - 1)
        count = (quotient / unit).round()
        middle = torch.where(small, count * unit, middle)
        is_midpoint = torch.where(small, count % 2 != 0, is_midpoint)
    beyond = (s - middle * divisors) + t
    side = torch.nextafter(middle, beyond.sign() * torch.inf)
    value = torch.where(is_midpoint, torch.where(beyond == 0, middle, side), quotient)
    return narrow(torch.where(s == 0, 0.0, value)).double()  # an exact zero is +0
