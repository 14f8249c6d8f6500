"""Inverses, linear systems, determinants and factorizations of small matrices, each number rounded once.

The last two axes of a tensor are a matrix, the others are a batch. Where PyTorch's result depends on a rank
that it finds in rounded numbers, the rank here is the exact one. A loop eliminates in pairs of binary64
numbers with error bounds (small_matrices_compiled.py); what it does not decide, integers of any length do
(numerics/exact_matrices.py), on the host, so matrices are limited to 64 rows and columns.

Results that do not exist, as the inverse of a singular matrix, are NaN, and `info` counts as PyTorch
documents it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import exact_matrices as exact
from reproml.arithmetic.numerics.balls import Ball, TensorContext
from reproml.arithmetic.numerics.devices import is_on_accelerator
from reproml.arithmetic.numerics.libm import log_of_fraction
from reproml.arithmetic.numerics.rounding import SLACK, round_ball
from reproml.arithmetic.operators import small_matrices_compiled as compiled
from reproml.errors import NotExactError

LARGEST = 64

Array = NDArray[Any]


def _arrays(*operands: Tensor) -> list[Array]:
    """Return the operands as float64 arrays. Raises NotExactError for infinities and NaN."""
    if any(map(is_on_accelerator, operands)):
        replay_log.flush()
    arrays = [x.detach().cpu().double().numpy() for x in operands]
    if not all(np.isfinite(x).all() for x in arrays):
        raise NotExactError("A matrix with infinities or NaN has no exact inverse or factorization")
    return arrays


def _require_small(*matrices: Tensor, square: bool = False) -> None:
    for a in matrices:
        if a.dim() < 2 or (square and a.shape[-1] != a.shape[-2]):
            kind = "square matrix" if square else "matrix"
            raise RuntimeError(f"the last two axes have to be a {kind}, not {list(a.shape)}")
        if max(a.shape[-2:]) > LARGEST:
            raise NotExactError(
                f"it is defined for matrices of up to {LARGEST} rows and columns, not for "
                f"{list(a.shape[-2:])}; eliminate by blocks of {LARGEST}, iterate with matrix products, "
                "or move this code out of reproml.exact()"
            )


def _batches(*operands: Tensor, batch: Optional[torch.Size] = None) -> list[Array]:
    """Return the operands as arrays [count, rows, columns], expanded to one batch."""
    batch = torch.broadcast_shapes(*[x.shape[:-2] for x in operands]) if batch is None else batch
    return [
        np.broadcast_to(a, (*batch, *a.shape[-2:])).reshape(-1, *a.shape[-2:])
        if a.size
        else np.zeros((math.prod(batch), *a.shape[-2:]))
        for a in _arrays(*operands)
    ]


def _tensor(values: Array, like: Tensor, shape: Any, dtype: Any = torch.float32) -> Tensor:
    return torch.from_numpy(values.reshape(tuple(shape))).to(dtype).to(like.device)


def _check_errors(name: str, info: Tensor, is_matrix: bool) -> None:
    torch.ops.aten._linalg_check_errors(info, name, is_matrix=is_matrix)


# ---- inverses and linear systems ---------------------------------------------------------------------


def inv(a: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Compute aten.linalg_inv_ex: the inverse, and the first dependent column from 1, or 0."""
    _require_small(a, square=True)
    (matrices,) = _batches(a)
    x, columns = _solved([matrices], _identity(matrices))
    info = _tensor(columns, a, a.shape[:-2], torch.int32)
    if check_errors:
        _check_errors("linalg.inv_ex", info, a.dim() == 2)
    return _tensor(x, a, a.shape), info


def _identity(like: Array) -> Array:
    return np.broadcast_to(np.eye(like.shape[-1]), like.shape)


def _solved(factors: list[Array], right: Array) -> tuple[Array, Array]:
    """Return x [count, n, k] with f x = right, or f g x = right for two factors, rounded once.

    Also returns 0 for each matrix, or its first dependent column, from 1; then x is NaN.
    """
    found = compiled.solve(factors, [right])
    for i in np.nonzero(found.left)[0].tolist():
        try:
            found.x[i], found.info[i] = exact.solve([f[i] for f in factors], right[i]), 0
        except exact.Singular as error:
            found.x[i], found.info[i] = np.nan, error.column
    return found.x, found.info


def is_vector(a: Tensor, b: Tensor) -> bool:
    """Return whether b is a vector for each matrix of a, as PyTorch decides it."""
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


def solve(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute aten._linalg_solve_ex: x with a x = b (left), or x a = b; no factors; the info of `inv`."""
    _require_small(a, square=True)
    vector = is_vector(a, b)
    right = b.unsqueeze(-1) if vector else b
    matrix, right = (a, right) if left or vector else (a.mT, right.mT)
    x, info = _solution([matrix], right)
    info = info.reshape(-1)[: math.prod(a.shape[:-2])].reshape(a.shape[:-2])
    if check_errors:
        _check_errors("linalg.solve_ex", info, a.dim() == 2)
    x = x.squeeze(-1) if vector else x if left else x.mT
    return x, *_no_factors(a), info


def _solution(
    factors: list[Tensor], right: Tensor, prepare: Optional[Callable[..., list[Array]]] = None
) -> tuple[Tensor, Tensor]:
    """Return x with f x = right, or f g x = right, for a batch, and the info of `inv`.

    prepare: takes the arrays of `factors` and returns those of f and g, where they are others.
    """
    batch = torch.broadcast_shapes(*[x.shape[:-2] for x in (*factors, right)])
    _require_fit(factors[0], right)
    if prepare and not right.numel():  # nobody asks for the info
        return _tensor(np.empty(0), right, (*batch, *right.shape[-2:])), right.new_zeros(0)
    *arrays, b = _batches(*factors, right)
    x, info = _solved(prepare(*arrays) if prepare else arrays, b)
    shape = (*batch, *right.shape[-2:])
    return _tensor(x, right, shape), _tensor(info, right, batch, torch.int32)


def _require_fit(a: Tensor, right: Tensor) -> None:
    if right.shape[-2] != a.shape[-1]:
        raise RuntimeError(
            f"the shapes {list(a.shape)} and {list(right.shape)} do not fit together"
        )


def _no_factors(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the LU factorization that only PyTorch's own gradient reads."""
    return a.new_empty(0), torch.empty(0, dtype=torch.int32, device=a.device)


def _triangle(a: Any, upper: bool, unitriangular: bool = False) -> Any:
    a = np.triu(a) if upper else np.tril(a)
    return np.where(np.eye(a.shape[-1], dtype=bool), 1.0, a) if unitriangular else a


def solve_triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Compute aten.linalg_solve_triangular: only one triangle of a is read."""
    _require_small(a, square=True)
    if not left:
        x = solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular)
        return x.mT
    return _solution([a], b, lambda a: [_triangle(a, upper, unitriangular)])[0]


def triangular_solve(
    b: Tensor,
    a: Tensor,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute aten.triangular_solve: the solution, and a copy of a."""
    matrix, upper_now = (a.mT, not upper) if transpose else (a, upper)
    x = solve_triangular(matrix, b, upper=upper_now, unitriangular=unitriangular)
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return x, a.expand(*batch, *a.shape[-2:]).clone(memory_format=torch.contiguous_format)


# ---- determinants ------------------------------------------------------------------------------------


def det(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten._linalg_det of a [..., n, n]: the determinant [...] and its derivatives by each element.

    The derivatives are in the place of LU. Raises NotExactError for more than 64 rows or another dtype than
    float32.
    """
    _require_small(a, square=True)
    (matrices,) = _batches(a)
    found = compiled.solve([matrices], [_identity(matrices)], adjugate=True)
    values, unsure = compiled.rounded(found.low, found.high, found.exponent)
    cofactors = found.x.transpose(0, 2, 1).copy()
    values[found.info > 0] = 0
    left = (unsure | found.left | (found.info != 0)) & (found.rank >= a.shape[-1] - 1)
    for i in np.nonzero(left)[0].tolist():
        values[i] = _nearest(exact.determinant(matrices[i]))
        cofactors[i] = exact.cofactors(matrices[i])
    shape = a.shape[:-2]
    return _tensor(values, a, shape), _tensor(cofactors, a, a.shape), _no_factors(a)[1]


def slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute aten._linalg_slogdet: the sign of the determinant and log |det|; no factors."""
    _require_small(a, square=True)

    (matrices,) = _batches(a)
    found = compiled.solve([matrices], [matrices[..., :0]])
    sign = np.sign(found.low)
    known = (sign * found.high > 0) & np.isfinite(found.low - found.high) & (found.info == 0)
    low, high = (np.where(known, abs(x), 1.0) for x in (found.low, found.high))
    inside = abs(found.exponent) < 500  # then it is one logarithm, which may be near 0
    low, high = (np.ldexp(x, np.where(inside, found.exponent, 0)) for x in (low, high))
    width = np.where(known, abs(high - low), math.inf)
    size, exponent = np.minimum(low, high), np.where(inside, 0, found.exponent)

    def resolve(failed: Tensor) -> list[float]:
        logs = []
        for i in failed.tolist():
            d = Fraction(0) if found.info[i] > 0 else exact.determinant(matrices[i])
            sign[i] = (d > 0) - (d < 0)
            logs.append(log_of_fraction(abs(d)) if d else -math.inf)
        return logs

    ctx = TensorContext()
    y = ctx.log(Ball(torch.from_numpy(size), 0, torch.from_numpy(width) * SLACK, ctx))
    y = y + ctx.exact(torch.from_numpy(exponent).double()) * ctx.log(
        ctx.exact(y.mid.new_tensor(2.0))
    )
    log = round_ball(y.mid, y.error, resolve)
    shape = a.shape[:-2]
    return _tensor(sign, a, shape), log.reshape(shape).to(a.device), *_no_factors(a)


def _nearest(x: Fraction) -> float:
    return float(exact.rounded(np.array([x.numerator], dtype=object), x.denominator, 0)[0])


# ---- factorizations ----------------------------------------------------------------------------------


def lu_factor(
    a: Tensor, *, pivot: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten.linalg_lu_factor_ex: P a = L U, L and U rounded in one matrix; pivots; info."""
    _require_pivot(pivot)
    _require_small(a)
    (matrices,) = _batches(a)
    batch, count = a.shape[:-2], min(a.shape[-2:])
    found = compiled.factorize(matrices)
    for i in np.nonzero(found.left)[0].tolist():
        found.factors[i], found.pivots[i], found.info[i] = exact.lu(matrices[i])
    factors = _tensor(found.factors, a, a.shape)
    pivots = _tensor(found.pivots, a, (*batch, count), torch.int32)
    info = _tensor(found.info, a, batch, torch.int32)
    if check_errors:
        _check_errors("torch.linalg.lu_factor_ex", info, a.dim() == 2)
    return factors, pivots, info


def lu(a: Tensor, *, pivot: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten.linalg_lu: a = P L U, L and U rounded."""
    factors, pivots, _ = lu_factor(a, pivot=pivot)
    p, lower, upper = torch.lu_unpack(factors, pivots)
    return p, lower, upper


def _require_pivot(pivot: bool) -> None:
    if not pivot:
        raise NotExactError("An LU factorization is defined with pivot=True only")


def lu_solve(
    factors: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False
) -> Tensor:
    """Compute aten.linalg_lu_solve: x with P L U x = b for the factors as they are given."""
    _require_small(factors, square=True)
    batch = torch.broadcast_shapes(factors.shape[:-2], b.shape[:-2])
    if pivots.numel() and not 1 <= pivots.min() <= pivots.max() <= factors.shape[-1]:
        raise RuntimeError(f"pivots must be between 1 and {factors.shape[-1]}, the number of rows")
    order = pivots.expand(*batch, -1).reshape(math.prod(batch), pivots.shape[-1]).tolist()
    right = b if left else b.mT
    _require_fit(factors, right)
    lu, given = _batches(factors, right)
    lower, upper = _triangle(lu, False, True), _triangle(lu, True)
    if adjoint == left:  # a^T x = b, or x a = b
        x, _ = _solved([upper.transpose(0, 2, 1), lower.transpose(0, 2, 1)], given)
        x = _exchanged(x, order, -1)
    else:
        x, _ = _solved([lower, upper], _exchanged(given, order, 1))
    result = _tensor(x, right, (*batch, *right.shape[-2:]))
    return result if left else result.mT


def _exchanged(x: Array, order: list[list[int]], direction: int) -> Array:
    x = x.copy()
    for rows, pivots in zip(x, order):
        for i, pivot in list(enumerate(pivots))[::direction]:
            rows[[i, pivot - 1]] = rows[[pivot - 1, i]]
    return x


def cholesky_ex(
    a: Tensor, *, upper: bool = False, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute aten.linalg_cholesky_ex: L with L L^T = a, or L^T; the order of a minor that is not > 0."""
    _require_small(a, square=True)
    (matrices,) = _batches(a.mT if upper else a)
    found = compiled.factorize(matrices, cholesky=True)
    for i in np.nonzero(found.left)[0].tolist():
        found.factors[i], found.info[i] = exact.cholesky(matrices[i])
    factor = _tensor(found.factors, a, a.shape)
    info = _tensor(found.info, a, a.shape[:-2], torch.int32)
    if check_errors:
        _check_errors("torch.linalg.cholesky_ex", info, a.dim() == 2)
    return factor.mT if upper else factor, info


def cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """Compute aten.cholesky_solve: x with L L^T x = b."""
    _require_small(factor, square=True)

    def prepare(factor: Array) -> list[Array]:
        lower = _triangle(factor, False)
        return [lower, lower.transpose(0, 2, 1)]

    return _solution([factor.mT if upper else factor], b, prepare)[0]


def cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:
    """Compute aten.cholesky_inverse: the inverse of L L^T."""
    identity = torch.eye(factor.shape[-1], dtype=torch.float32, device=factor.device)
    return cholesky_solve(identity, factor, upper)


# ---- least squares -----------------------------------------------------------------------------------

_EPSILON = Fraction(1, 2**23)


def lstsq(
    a: Tensor, b: Tensor, rcond: Optional[float] = None, *, driver: Optional[str] = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute aten.linalg_lstsq for matrices whose rank is full for certain: x, the residuals, the rank.

    As PyTorch, it returns the residuals with driver='gels' alone, and the rank with 'gelsy'.
    """
    if driver not in (None, "gelsy", "gels"):
        raise NotExactError(
            f"Least squares with driver={driver!r} returns singular values, which have no exact "
            "definition; use driver='gelsy' or driver='gels'"
        )
    _require_small(a)
    rows, columns = a.shape[-2:]
    relative = None if driver == "gels" or rcond is None or rcond < 0 else _tolerance(rcond)
    vector = is_vector(a, b)
    right = b.unsqueeze(-1) if vector else b
    batch = torch.broadcast_shapes(a.shape[:-2], right.shape[:-2])
    matrices, given = _batches(a, right, batch=batch)
    none = [None] * len(matrices)
    _pseudoinverses(matrices, none, [relative] * len(matrices), min(rows, columns))
    k = right.shape[-1]
    values, squares = np.empty((len(matrices), columns, k)), np.empty((len(matrices), k))
    with_residuals = rows > columns and driver == "gels"
    left = np.ones(len(matrices), dtype=bool)
    if rows >= columns and not with_residuals:
        found = _solve_normal_equations(matrices, given)
        values, left = found.x, found.left | (found.info != 0)
    for i in np.nonzero(left)[0].tolist():
        values[i], squares[i] = exact.least_squares(matrices[i], given[i])
    x = _tensor(values, a, (*batch, columns, k))
    residuals = _tensor(squares, a, (*batch, k)) if with_residuals else a.new_empty(0)
    shape = a.shape[:-2] if driver != "gels" else (0,)
    rank = torch.full(shape, min(rows, columns), dtype=torch.int64, device=a.device)
    return (x.squeeze(-1) if vector else x), residuals, rank, a.new_empty(0)


def pinv(
    a: Tensor,
    *,
    atol: Optional[Tensor] = None,
    rtol: Optional[Tensor] = None,
    hermitian: bool = False,
) -> Tensor:
    """Compute aten.linalg_pinv for matrices whose rank does not depend on the tolerances."""
    _require_small(a)
    if hermitian:
        a = a.tril() + a.tril(-1).mT

    def bounds(x: Optional[Tensor]) -> list[Optional[Fraction]]:
        if x is None:
            return [None] * math.prod(a.shape[:-2])
        return [_tolerance(v) for v in x.expand(a.shape[:-2]).reshape(-1).tolist()]

    (matrices,) = _batches(a)
    return _tensor(_pseudoinverses(matrices, bounds(atol), bounds(rtol)), a, a.mT.shape)


def _tolerance(x: float) -> Fraction:
    if not math.isfinite(x):
        raise NotExactError(f"A tolerance of {x} leaves no certain rank; give a finite one")
    return Fraction(x)


def _pseudoinverses(a: Array, atol: Sequence[Any], rtol: Sequence[Any], rank: int = 0) -> Array:
    """Return _certain_pseudoinverse(...) of each matrix."""
    tall = a if a.shape[1] >= a.shape[2] else a.transpose(0, 2, 1)
    found = _solve_normal_equations(tall)
    values = found.x if tall is a else found.x.transpose(0, 2, 1).copy()
    left = found.left | (found.info != 0)
    with np.errstate(over="ignore"):
        norms = (tall**2).sum((1, 2)), (values**2).sum((1, 2))
    exponents = np.zeros(len(a), dtype=np.int64)
    far = ~left & ~((norms[1] > 2.0**-240) & np.isfinite(norms[1]))
    if far.any():  # rounded to infinity or subnormal; the norms are those of matrices of about 1
        scaled, exponents[far] = compiled.normalized(tall[far])
        second = _solve_normal_equations(scaled)
        norms[0][far], norms[1][far] = (scaled**2).sum((1, 2)), (second.x**2).sum((1, 2))
        left[far] = second.left | (second.info != 0)
    for i in range(len(a)):
        if not left[i]:  # the norms err by far less than the factor 1/2
            own, inverse = float(norms[0][i]), float(norms[1][i])
            scale = Fraction(2) ** int(-exponents[i])
            bound = atol[i] and atol[i] * scale
            try:
                left[i] = not float(_lowest(a[i], bound, rtol[i], own)) * inverse < 0.5
            except OverflowError:
                left[i] = True
        if left[i]:
            values[i] = _certain_pseudoinverse(a[i], atol[i], rtol[i], rank)
    return values


def _solve_normal_equations(a: Array, b: Optional[Array] = None) -> compiled.Solution:
    """Find x with a^T a x = a^T b, or a x = b if a is square. b: None for the identity."""
    if a.shape[1] == a.shape[2]:
        return compiled.solve([a], [_identity(a) if b is None else b])
    transposed = a.transpose(0, 2, 1)
    return compiled.solve([transposed, a], [transposed] if b is None else [transposed, b])


def _lowest(a: Array, atol: Any, rtol: Any, own: Any) -> Any:
    """Return the square of the bound below which a singular value counts as 0. own: |a|^2."""
    if rtol is None:
        rtol = Fraction(0) if atol else max(a.shape) * _EPSILON
    return max((atol or 0) ** 2, rtol**2 * own)


def _certain_pseudoinverse(
    a: Array, atol: Optional[Fraction], rtol: Optional[Fraction], rank: int = 0
) -> Array:
    """Return the pseudoinverse if all singular values but exact zeros are above the tolerances.

    The least of them is at least 1 / |a^+|, and the largest at most |a|, in Frobenius norms.
    """
    value, found, own, inverse = exact.pseudoinverse(a)
    if _lowest(a, atol, rtol, own) * inverse >= 1 or found < rank:
        raise NotExactError(
            "A matrix whose singular values are nearly or exactly zero has no certain rank; add a "
            "multiple of the identity, or select independent columns"
        )
    return value
