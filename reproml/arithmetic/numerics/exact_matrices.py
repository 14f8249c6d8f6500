"""Exact linear algebra of small matrices, on integers of any length, each result rounded once.

A matrix of binary32 numbers is an integer matrix times a power of two. The integers are eliminated without
fractions: every number on the way is a determinant of a part of the matrix, and each division is exact
(E. Bareiss, Mathematics of Computation 22(103), 1968). All functions take and return float64 arrays of
binary32 numbers, and read nothing but the values, so their results do not depend on the machine.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reproml.arithmetic.numerics.rationals import Rationals, to_53_bits

Array = NDArray[Any]


class Singular(Exception):
    """A matrix is singular. `column`: the first column that depends on those before it, from 1."""

    def __init__(self, column: int) -> None:
        super().__init__(column)
        self.column = column


def integers(a: Array) -> tuple[Array, int]:
    """Return an array of Python integers n and an exponent e with a = n 2^e. a: finite float64."""
    if not a.size:
        return a.astype(object), 0
    x = Rationals.of_floats(a)
    return x.n, x.exponent


def rounded(n: Array, d: Any, exponent: int) -> Array:
    """Return n 2^exponent / d, each rounded once to binary32. d: an integer other than 0, or an array."""
    if not n.size:
        return n.astype(np.float64)
    n, d = (-n, -d) if isinstance(d, int) and d < 0 else (n, d)
    if not isinstance(d, int):
        sign = np.where(d < 0, -1, 1).astype(object)
        n, d = n * sign, d * sign
    return Rationals(n, d, exponent).nearest()  # type: ignore[no-any-return]


# ---- elimination -----------------------------------------------------------------------------------


class Echelon(NamedTuple):
    """The reduced row echelon form of an integer matrix, times `d`.

    rows: the form, with d in each pivot column. columns: the pivot columns; their number is the rank. sign:
    of the permutation of the rows.
    """

    rows: Array
    d: int
    columns: list[int]
    sign: int


def echelon(m: Array, width: int) -> Echelon:
    """Eliminate the first `width` columns of an integer matrix from all rows but the pivot's."""
    m, d, sign = m.copy(), 1, 1
    columns: list[int] = []
    for j in range(width):
        k = len(columns)
        if k == len(m):
            break
        below = np.nonzero(m[k:, j])[0]
        if not len(below):
            continue
        if below[0]:
            m[[k, k + below[0]]] = m[[k + below[0], k]]
            sign = -sign
        pivot, row, others = m[k, j], m[k].copy(), np.arange(len(m)) != k
        m[others] = (pivot * m[others] - np.multiply.outer(m[others, j], row)) // d
        d = pivot
        columns.append(j)
    return Echelon(m, int(d), columns, sign)


def _solved(a: Array, b: Array) -> tuple[Array, int]:
    """Return x and d with a x = d b, for integer matrices [n, n] and [n, k]. Raises Singular."""
    form = echelon(np.concatenate([a, b], 1), len(a))
    if len(form.columns) < len(a):
        missing = set(range(len(a))) - set(form.columns)
        raise Singular(min(missing) + 1)
    return form.rows[:, len(a) :], form.d


def solve(factors: list[Array], b: Array) -> Array:
    """Return x with f x = b, or f g x = b for two factors, rounded once in all. Raises Singular.

    factors: matrices [n, n]. b: [n, k].
    """
    (a, e), (right, f) = integers(factors[0]), integers(b)
    for factor in factors[1:]:
        g, exponent = integers(factor)
        a, e = a.dot(g), e + exponent
    x, d = _solved(a, right)
    return rounded(x, d, f - e)


# ---- determinants ----------------------------------------------------------------------------------


def determinant(a: Array) -> Fraction:
    """Return the exact determinant of a matrix [n, n]."""
    m, e = integers(a)
    return _determinant(m) * Fraction(2) ** (e * len(a))


def _determinant(m: Array) -> int:
    form = echelon(m, len(m))
    return form.sign * form.d if len(form.columns) == len(m) else 0


def cofactors(a: Array) -> Array:
    """Return the derivatives of the determinant by each element of a matrix [n, n]."""
    m, e = integers(a)
    n = len(m)
    form = echelon(np.concatenate([m, np.eye(n, dtype=np.int64).astype(object)], 1), n)
    if len(form.columns) == n:
        adjugate = form.sign * form.rows[:, n:]
    elif len(form.columns) < n - 1:
        adjugate = np.zeros((n, n), dtype=object)
    else:  # it has rank one: the outer product of the vectors that m takes to 0 from both sides
        x, y = _null_vector(m), _null_vector(m.T)
        i, j = int(np.nonzero(x)[0][0]), int(np.nonzero(y)[0][0])
        minor = (-1) ** (i + j) * _determinant(np.delete(np.delete(m, j, 0), i, 1))
        adjugate = np.multiply.outer(x, y) * minor // (x[i] * y[j])
    return rounded(adjugate.T.copy(), 1, e * (n - 1))


def _null_vector(m: Array) -> Array:
    """Return an integer vector x with m x = 0, for a matrix of rank n - 1."""
    form = echelon(m, m.shape[1])
    (free,) = set(range(m.shape[1])) - set(form.columns)
    x = np.zeros(m.shape[1], dtype=object)
    x[free] = form.d
    x[form.columns] = -form.rows[: len(form.columns), free]
    return x


# ---- factorizations --------------------------------------------------------------------------------


class LU(NamedTuple):
    """P a = L U, with L (below the diagonal) and U in one array.

    pivots: the row, from 1, with which each row was exchanged. zero: the first column whose pivot is 0,
    from 1, or 0 if there is none.
    """

    lu: Array
    pivots: list[int]
    zero: int


def lu(a: Array) -> LU:
    """Factorize a matrix [m, n]. A pivot is the largest number of its column, the first if equal."""
    m, e = integers(a)
    m = m.copy()
    rows, width = m.shape
    result, d, pivots, zero = np.zeros(m.shape), 1, [], 0
    for k in range(min(rows, width)):
        sizes = np.abs(m[k:, k])
        best = k + max(range(len(sizes)), key=lambda i: (sizes[i], -i))
        pivots.append(best + 1)
        m[[k, best]], result[[k, best]] = m[[best, k]], result[[best, k]]
        result[k, k:] = rounded(m[k, k:], d, e)
        pivot = int(m[k, k])
        if not pivot:  # the column is 0 from here on: nothing is eliminated
            zero = zero or k + 1
            continue
        result[k + 1 :, k] = rounded(m[k + 1 :, k], pivot, 0)
        rest = pivot * m[k + 1 :] - np.multiply.outer(m[k + 1 :, k], m[k])
        m[k + 1 :] = rest // d
        d = pivot
    return LU(result, pivots, zero)


def cholesky(a: Array) -> tuple[Array, int]:
    """Return L with L L^T = a, read from the lower triangle of a, and 0.

    If a is not positive definite, the number is the order of the first leading minor that is not positive,
    and L is 0.
    """
    m, e = integers(a)
    m = m.copy()
    result, d = np.zeros(m.shape), 1
    for k in range(len(m)):
        pivot = int(m[k, k])
        if pivot <= 0:
            return np.zeros(m.shape), k + 1
        for i in range(k, len(m)):  # (m[i, k] / d) / sqrt(pivot / d), times 2^e / sqrt(2^e)
            result[i, k] = _signed_root(int(m[i, k]), pivot * d, e)
        low = m[k + 1 :, k].copy()
        m[k + 1 :, k + 1 :] = (pivot * m[k + 1 :, k + 1 :] - np.multiply.outer(low, low)) // d
        d = pivot
    return result, 0


def _signed_root(n: int, d: int, exponent: int) -> float:
    """Return n / sqrt(d) sqrt(2^exponent), rounded once to binary32."""
    square = Fraction(n * n, d) * Fraction(2) ** exponent
    root = root_to_odd(square)
    with np.errstate(over="ignore"):
        return float(np.float32(-root if n < 0 else root))


def root_to_odd(square: Fraction) -> float:
    """Return the square root of a rational number, rounded to odd to 53 bits or more."""
    n, d = square.numerator, square.denominator
    places = max(0, 64 - (n.bit_length() - d.bit_length()) // 2)
    q, r = divmod(n << 2 * places, d)
    root = math.isqrt(q)
    sticky = 1 if r or root * root != q else 0
    return to_53_bits(2 * root + sticky, 1, -places - 1)


# ---- least squares ---------------------------------------------------------------------------------


def least_squares(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the x of least norm for which |a x - b| is least, and the sums of squares of a x - b.

    a: [m, n] of full rank; b: [m, k]. Returns [n, k] and [k]. Raises Singular for another rank.
    """
    (m, e), (right, f) = integers(a), integers(b)
    if len(m) >= m.shape[1]:
        x, d = _solved(m.T.dot(m), m.T.dot(right))
    else:
        y, d = _solved(m.dot(m.T), right)
        x = m.T.dot(y)
    distance = m.dot(x) - d * right
    squares = (distance * distance).sum(0)
    return rounded(x, d, f - e), rounded(np.atleast_1d(squares), d * d, 2 * f)


def pseudoinverse(a: Array) -> tuple[Array, int, Fraction, Fraction]:
    """Return the pseudoinverse [n, m] of a matrix [m, n], its exact rank, and the squared norms of both.

    With the pivot columns C of a and the rows F of its reduced echelon form, a = C F, it is
    F^T (F F^T)^-1 (C^T C)^-1 C^T. The norms are Frobenius norms.
    """
    m, e = integers(a)
    form = echelon(m, m.shape[1])
    rank = len(form.columns)
    if not rank:
        return np.zeros(m.T.shape), 0, Fraction(0), Fraction(0)
    c, f = m[:, form.columns], form.rows[:rank]  # f is F times form.d
    left, d = _solved(c.T.dot(c), c.T)
    both, d2 = _solved(f.dot(f.T), left)
    n, d = f.T.dot(both) * form.d, d * d2
    own = Fraction(int((m * m).sum())) * Fraction(4) ** e
    inverse = Fraction(int((n * n).sum()), d * d) / Fraction(4) ** e
    return rounded(n, d, -e), rank, own, inverse
