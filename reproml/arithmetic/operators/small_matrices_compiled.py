"""Small matrices by the loops of csrc/matrices.c, which decide nearly all matrices of a batch.

A batch of matrices is a float64 array [count, rows, columns] of binary32 numbers. What is not decided, and
all of it without the loops, is left to numerics/exact_matrices.py. The results are rounded once, to
binary32, in float64 arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from reproml.arithmetic.compiler import kernels, pair_arrays

Array = NDArray[Any]


class Solution(NamedTuple):
    """What `solve` finds for a batch. left: which matrices it does not decide, bool [count].

    x: [count, n, k]. info: int32 [count], 0 or the first dependent column, from 1. low, high, exponent:
    the determinant is between low 2^exponent and high 2^exponent, float64 and int64 [count]. unsure: which
    numbers of x are not decided; candidate: what they are if they are short. rank: that of a where it is
    known to be less than n, else n.
    """

    x: Array
    info: Array
    low: Array
    high: Array
    exponent: Array
    left: Array
    unsure: Array
    candidate: Array
    rank: Array


class Factors(NamedTuple):
    """What `factorize` finds. pivots, info: as those of exact_matrices.LU, [count, steps] and [count]."""

    factors: Array
    pivots: Array
    info: Array
    left: Array


def solve(left: Sequence[Array], right: Sequence[Array], adjugate: bool = False) -> Solution:
    """Find x with a x = b, for a [count, n, n] and b [count, n, k], each one batch or a product of two.

    adjugate: find x times the determinant of a.
    """
    found = _eliminate(left, right, adjugate)
    if kernels.library is None:
        return found
    if len(left) == len(right) == 1:  # of a product, `whole` takes less time
        _decide(found, left, right[0], adjugate)
    if found.left.any():
        some = found.left.copy()
        a, b = ([x[some] for x in factors] for factors in (left, right))
        _put(found, some, _eliminate(a, b, adjugate, whole=True))
        if len(left) == 1 and not adjugate:
            _solve_near_identity(found, left[0], right[0])
        if len(right) == 1:
            _decide(found, left, right[0], adjugate)
    return found


def _put(found: Any, where: Array, other: Any) -> None:
    """Replace the results of the matrices `where` by those of `other`, of the same type, that are better.

    These are the decided ones and, where no elimination succeeded before, those that are eliminated.
    """
    better = ~other.left | ((other.info == 0) & (found.info[where] < 0))
    into = np.nonzero(where)[0][better]
    for mine, new in zip(found, other):
        mine[into] = new[better]


def _decide(found: Solution, left: Sequence[Array], b: Array, adjugate: bool) -> None:
    """Decide which matrices that are left are singular, and which numbers are their candidates."""
    some = np.nonzero(found.left | (adjugate & (found.info != 0)))[0]
    if not len(some) or not left[0].size:
        return
    n = left[0].shape[1]
    factors = [np.ascontiguousarray(f[some]) for f in left]
    given, candidate = np.ascontiguousarray(b[some]), found.candidate[some]
    unsure, rank = found.unsure[some].astype(np.uint8), found.rank[some]
    info = np.where(found.info[some] == 0, 0, -1).astype(np.int32)
    pointers = [f.ctypes.data for f in factors] + [None] * (2 - len(factors))
    kernels.library.reproml_decide(
        *(len(some), n, b.shape[2], *pointers),
        *[x.ctypes.data for x in (given, candidate, unsure, info, rank)],
    )
    decided = found.unsure[some] & (unsure == 0)
    with np.errstate(over="ignore", under="ignore"):
        x = np.where(decided, candidate.astype(np.float32), found.x[some])
    singular = info > 0
    x[singular] = np.nan
    if adjugate:  # all its numbers are minors, which are 0
        x[rank < n - 1] = 0
    found.x[some], found.unsure[some], found.rank[some] = x, unsure != 0, rank
    found.info[some] = np.where(singular, info, found.info[some])
    found.low[some[singular]] = found.high[some[singular]] = 0
    found.left[some] = (found.info[some] < 0) | ((info == 0) & (unsure != 0).any((1, 2)))


def _solve_near_identity(found: Solution, a: Array, b: Array) -> None:
    """Solve r a x = r b for what is left, where r a is close to the identity, so that bounds hardly grow.

    Source: E. Hansen & R. Smith, SIAM J. Numer. Anal. 4(1), 1967. Where b has no columns, only the
    determinant is wanted: then r is nearly the inverse of P L, where P L U = a. So r a is close to U, and
    the determinant of r is exactly 1 or -1.
    """
    where = found.left.copy()
    matrices = torch.from_numpy(a[where])
    sign = np.ones(len(matrices))
    if b.shape[2]:
        r = torch.linalg.inv_ex(matrices)[0].numpy()
    else:
        lu, pivots, _ = torch.linalg.lu_factor_ex(matrices)
        p, lower, _ = torch.lu_unpack(lu, pivots)
        one = torch.eye(a.shape[1], dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True)
        r = ((inverse.tril(-1) + one) @ p.mT).numpy()
        exchanged = pivots.numpy() != np.arange(1, a.shape[1] + 1)
        sign -= 2 * (exchanged.sum(1) % 2)
    usable = np.isfinite(r).all((1, 2))
    where[where] = usable
    r, sign = r[usable], sign[usable]
    if len(r):
        second = _eliminate([r, a[where]], [r, b[where]])
        low, high = np.sort([sign * second.low, sign * second.high], 0)
        if b.shape[2]:  # the determinant of r is not known
            low, high = np.full((2, len(r)), [[-np.inf], [np.inf]])
        _put(
            found, where, second._replace(low=low, high=high, left=second.left | (second.info != 0))
        )


def _eliminate(
    left: Sequence[Array], right: Sequence[Array], adjugate: bool = False, whole: bool = False
) -> Solution:
    """Do what `solve` promises, by one of the two methods of csrc/matrices.c."""
    if kernels.library is None or not left[0].size:
        shape = len(left[0]), left[0].shape[1], right[-1].shape[2]
        none = np.full(len(left[0]), np.inf)
        info = np.zeros(len(none), np.int32)
        exponents, unsure = info.astype(np.int64), np.ones(shape, dtype=bool)
        x, rank = np.empty(shape), np.full(len(none), shape[1], np.int32)
        return Solution(x, info, -none, none, exponents, none > 0, unsure, x, rank)
    (a, e), (b, f) = _product(left), _product(right)
    count, n, k = b[0].shape
    pairs = zip(*_of_equal_length(a, b))
    parts = [np.ascontiguousarray(np.concatenate([x, y], 2)) for x, y in pairs]
    ends, determinants = np.zeros((2, count, n, k)), np.zeros((count, 2))
    exponents, info = np.zeros(count, np.int64), np.empty(count, np.int32)
    kernels.library.reproml_solve(
        *(whole, count, n, k, _pointers(parts), adjugate),
        *[x.ctypes.data for x in (*ends, determinants, exponents, info)],
    )
    shift = f + (e * (n - 1) if adjugate else -e)
    x, unsure = rounded(ends[0], ends[1], shift[:, None, None])
    x[info > 0] = np.nan
    left_over = (info < 0) | ((info == 0) & unsure.any((1, 2)))
    candidate = _short(ends[0], ends[1], shift[:, None, None])
    if adjugate:  # a number other than 0 is an equality of another kind
        candidate[candidate != 0] = np.nan
    low, high = determinants.T.copy()
    rank = np.full(count, n, np.int32)
    return Solution(x, info, low, high, e * n + exponents, left_over, unsure, candidate, rank)


def factorize(a: Array, cholesky: bool = False) -> Factors:
    """Find L and U in one matrix, with P a = L U; or L with L L^T = a, from the lower triangle of a."""
    found = _factorize(a, cholesky)
    if found.left.any() and kernels.library is not None:
        some = found.left.copy()
        _put(found, some, _factorize(a[some], cholesky, whole=True))
    return found


def _factorize(a: Array, cholesky: bool, whole: bool = False) -> Factors:
    count, rows, width = a.shape
    ends, info = np.zeros((2, *a.shape)), np.zeros(count, dtype=np.int32)
    pivots = np.zeros((count, min(rows, width)), dtype=np.int32)
    if kernels.library is None or not a.size:
        return Factors(ends[0], pivots, info, np.ones(count, dtype=bool))
    scaled, e = normalized(a, even=cholesky)
    kernels.library.reproml_factorize(
        *(whole, cholesky, count, rows, width),
        *[x.ctypes.data for x in (scaled, *ends, pivots, info)],
    )
    exponents = e[:, None, None]
    shift = exponents // 2 if cholesky else np.triu(np.broadcast_to(exponents, a.shape))
    factors, unsure = rounded(ends[0], ends[1], shift)
    return Factors(factors, pivots, info, (info < 0) | unsure.any((1, 2)))


def normalized(a: Array, even: bool = False) -> tuple[Array, Array]:
    """Return a 2^-e and e, [count], so that the largest number of each matrix is in [1/4, 1)."""
    e = np.frexp(np.abs(a).max((1, 2), initial=0))[1].astype(np.int64)
    e += e % 2 if even else 0
    return np.ascontiguousarray(np.ldexp(a, -e[:, None, None])), e


def _product(factors: Sequence[Array]) -> tuple[list[Array], Array]:
    """Return one batch, or the product of two as pairs with their bounds, and its exponents of 2."""
    scaled = [normalized(f) for f in factors]
    if len(factors) == 1:
        return [scaled[0][0]], scaled[0][1]
    pairs = pair_arrays.products(*[torch.from_numpy(x) for x, _ in scaled])
    s, e = normalized(pairs[0].numpy())
    rest = [np.ldexp(p.numpy(), -e[:, None, None]) for p in pairs[1:]]
    return [s, *rest], sum(e for _, e in scaled) + e


def _of_equal_length(a: list[Array], b: list[Array]) -> list[list[Array]]:
    parts = max(len(a), len(b))
    return [x + [np.zeros(x[0].shape)] * (parts - len(x)) for x in (a, b)]


def rounded(low: Array, high: Array, shift: Any = 0) -> tuple[Array, Array]:
    """Return high 2^shift, rounded to binary32, and where low 2^shift is rounded to another number."""
    with np.errstate(over="ignore", under="ignore"):
        ends = [np.ldexp(x, shift).astype(np.float32) for x in (low, high)]
    unsure = (ends[0].view(np.int32) != ends[1].view(np.int32)) | np.isnan(ends[1])
    return ends[1].astype(np.float64), unsure


def _short(low: Array, high: Array, shift: Any) -> Array:
    """Return 0 if it is between low and high, else the middle times 2^shift, to the bits that both share.

    These are at least 24 and at most 50.
    """
    mantissa, e = np.frexp(low / 2 + high / 2)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        width = np.ldexp(high / 2 - low / 2, 1 - e)
        bits = (-np.frexp(width)[1] - 1).clip(24, 50)
        short = np.ldexp(np.rint(np.ldexp(mantissa, bits)), e - bits + shift)
    return np.where((low <= 0) & (high >= 0), 0.0, short)


def _pointers(parts: list[Array]) -> Any:
    return (ctypes.c_void_p * 3)(*[x.ctypes.data for x in parts])
