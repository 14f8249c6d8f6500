"""Inverses, linear systems, determinants and factorizations of small matrices, each number rounded once.

The last two axes of a tensor are a matrix, the others are a batch. Where PyTorch's result depends on a rank
that it finds in rounded numbers, the rank here is the exact one. The arithmetic is that of integers of any
length (numerics/exact_matrices.py), on the host, so matrices are limited to 64 rows and columns.

Results that do not exist, as the inverse of a singular matrix, are NaN, and `info` counts as PyTorch
documents it.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Callable, Optional

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import exact_matrices as exact
from reproml.arithmetic.numerics.devices import is_on_accelerator
from reproml.arithmetic.numerics.libm import log_of_fraction
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


def _batches(
    function: Callable[..., Any], *operands: Tensor, batch: Optional[torch.Size] = None
) -> list[Any]:
    """Return function(matrix, ...) for each element of the batch."""
    batch = torch.broadcast_shapes(*[x.shape[:-2] for x in operands]) if batch is None else batch
    arrays = [
        np.broadcast_to(a, (*batch, *a.shape[-2:])).reshape(-1, *a.shape[-2:])
        if a.size
        else np.zeros((math.prod(batch), *a.shape[-2:]))
        for a in _arrays(*operands)
    ]
    return [function(*matrices) for matrices in zip(*arrays)]


def _tensor(values: list[Any], like: Tensor, shape: Any, dtype: Any = torch.float32) -> Tensor:
    found = np.array(values, dtype=np.float64) if values else np.zeros(0)
    return torch.from_numpy(found.reshape(tuple(shape))).to(dtype).to(like.device)


def _or_singular(function: Callable[..., Array], shape: Any) -> Callable[..., tuple[Array, int]]:
    """Return a function that returns the value and 0, or NaN and the column that makes it singular."""

    def checked(*matrices: Array) -> tuple[Array, int]:
        try:
            return function(*matrices), 0
        except exact.Singular as error:
            return np.full(shape, np.nan), error.column

    return checked


def _check_errors(name: str, info: Tensor, is_matrix: bool) -> None:
    torch.ops.aten._linalg_check_errors(info, name, is_matrix=is_matrix)


# ---- inverses and linear systems ---------------------------------------------------------------------


def inv(a: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Compute aten.linalg_inv_ex: the inverse, and the first dependent column from 1, or 0."""
    _require_small(a, square=True)
    found = _batches(_or_singular(exact.inverse, a.shape[-2:]), a)
    info = _tensor([i for _, i in found], a, a.shape[:-2], torch.int32)
    if check_errors:
        _check_errors("linalg.inv_ex", info, a.dim() == 2)
    return _tensor([x for x, _ in found], a, a.shape), info


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
    x, info = _solution(exact.solve, matrix, right)
    info = info.reshape(-1)[: math.prod(a.shape[:-2])].reshape(a.shape[:-2])
    if check_errors:
        _check_errors("linalg.solve_ex", info, a.dim() == 2)
    x = x.squeeze(-1) if vector else x if left else x.mT
    return x, *_no_factors(a), info


def _solution(function: Any, *operands: Tensor) -> tuple[Tensor, Tensor]:
    """Return function(matrix, ..., right side) for a batch, in the shape of the right side."""
    batch = torch.broadcast_shapes(*[x.shape[:-2] for x in operands])
    right = operands[-1]
    if right.shape[-2] != operands[0].shape[-1]:
        raise RuntimeError(
            f"the shapes {list(operands[0].shape)} and {list(right.shape)} do not fit together"
        )
    found = _batches(_or_singular(function, right.shape[-2:]), *operands)
    x = _tensor([x for x, _ in found], right, (*batch, *right.shape[-2:]))
    return x, _tensor([i for _, i in found], right, batch, torch.int32)


def _no_factors(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the LU factorization that only PyTorch's own gradient reads."""
    return a.new_empty(0), torch.empty(0, dtype=torch.int32, device=a.device)


def _triangle(a: Any, upper: bool, unitriangular: bool = False) -> Any:
    a = np.triu(a) if upper else np.tril(a)
    if unitriangular:
        a = a.copy()
        np.fill_diagonal(a, 1.0)
    return a


def solve_triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    """Compute aten.linalg_solve_triangular: only one triangle of a is read."""
    _require_small(a, square=True)
    if not left:
        x = solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular)
        return x.mT

    def function(a: Array, b: Array) -> Array:
        return exact.solve(_triangle(a, upper, unitriangular), b)

    return _solution(function, a, b)[0]


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
    """Compute aten._linalg_det: the determinant; in the place of LU, its derivatives by each element."""
    _require_small(a, square=True)
    found = _batches(lambda m: (_nearest(exact.determinant(m)), exact.cofactors(m)), a)
    value = _tensor([x for x, _ in found], a, a.shape[:-2])
    return value, _tensor([c for _, c in found], a, a.shape), _no_factors(a)[1]


def slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute aten._linalg_slogdet: the sign of the determinant and log |det|; no factors."""
    _require_small(a, square=True)

    def function(m: Array) -> tuple[int, float]:
        d = exact.determinant(m)
        return (d > 0) - (d < 0), log_of_fraction(abs(d)) if d else -math.inf

    found = _batches(function, a)
    sign, log = (_tensor([x[i] for x in found], a, a.shape[:-2]) for i in (0, 1))
    return sign, log, *_no_factors(a)


def _nearest(x: Fraction) -> float:
    return float(exact.rounded(np.array([x.numerator], dtype=object), x.denominator, 0)[0])


# ---- factorizations ----------------------------------------------------------------------------------


def lu_factor(
    a: Tensor, *, pivot: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten.linalg_lu_factor_ex: P a = L U, L and U rounded in one matrix; pivots; info."""
    _require_pivot(pivot)
    _require_small(a)
    found = _batches(exact.lu, a)
    batch, count = a.shape[:-2], min(a.shape[-2:])
    factors = _tensor([x.lu for x in found], a, a.shape)
    pivots = _tensor([x.pivots for x in found], a, (*batch, count), torch.int32)
    info = _tensor([x.zero for x in found], a, batch, torch.int32)
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
    order = pivots.expand(*batch, -1).reshape(math.prod(batch), pivots.shape[-1]).tolist()
    given = iter(order)
    transposed = adjoint == left  # a^T x = b, or x a = b

    def function(factors: Array, b: Array) -> Array:
        lower, upper = _triangle(factors, False, True), _triangle(factors, True)
        steps = list(enumerate(next(given)))
        if not transposed:
            b = _exchanged(b, steps)
            return exact.solve_product([lower, upper], b)
        return _exchanged(exact.solve_product([upper.T, lower.T], b), steps[::-1])

    x = _solution(function, factors, b if left else b.mT)[0]
    return x if left else x.mT


def _exchanged(x: Array, steps: Any) -> Array:
    x = x.copy()
    for i, pivot in steps:
        x[[i, pivot - 1]] = x[[pivot - 1, i]]
    return x


def cholesky_ex(
    a: Tensor, *, upper: bool = False, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute aten.linalg_cholesky_ex: L with L L^T = a, or L^T; the order of a minor that is not > 0."""
    _require_small(a, square=True)
    found = _batches(exact.cholesky, a.mT if upper else a)
    factor = _tensor([x for x, _ in found], a, a.shape)
    info = _tensor([i for _, i in found], a, a.shape[:-2], torch.int32)
    if check_errors:
        _check_errors("torch.linalg.cholesky_ex", info, a.dim() == 2)
    return factor.mT if upper else factor, info


def cholesky(a: Tensor, upper: bool = False) -> Tensor:
    """Compute aten.cholesky. Raises PyTorch's error if a matrix is not positive definite."""
    factor, info = cholesky_ex(a, upper=upper)
    _check_errors("cholesky", info, a.dim() == 2)
    return factor


def cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """Compute aten.cholesky_solve: x with L L^T x = b."""
    _require_small(factor, square=True)

    def function(factor: Array, b: Array) -> Array:
        lower = _triangle(factor.T if upper else factor, False)
        return exact.solve_product([lower, lower.T], b)

    return _solution(function, factor, b)[0]


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
    relative = None if driver == "gels" or rcond is None or rcond < 0 else Fraction(rcond)
    vector = is_vector(a, b)
    right = b.unsqueeze(-1) if vector else b

    def function(a: Array, b: Array) -> Any:
        _certain_pseudoinverse(a, None, relative, min(rows, columns))
        return exact.least_squares(a, b)

    batch = torch.broadcast_shapes(a.shape[:-2], right.shape[:-2])
    found = _batches(function, a, right, batch=batch)
    k = right.shape[-1]
    x = _tensor([x for x, _ in found], a, (*batch, columns, k))
    residuals = a.new_empty(0)
    if rows > columns and driver == "gels":
        residuals = _tensor([r for _, r in found], a, (*batch, k))
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
        return [Fraction(v) for v in x.expand(a.shape[:-2]).reshape(-1).tolist()]

    given = iter(zip(bounds(atol), bounds(rtol)))
    found = _batches(lambda m: _certain_pseudoinverse(m, *next(given)), a)
    return _tensor(found, a, a.mT.shape)


def _certain_pseudoinverse(
    a: Array, atol: Optional[Fraction], rtol: Optional[Fraction], rank: int = 0
) -> Array:
    """Return the pseudoinverse if all singular values but exact zeros are above the tolerances.

    The least of them is at least 1 / |a^+|, and the largest at most |a|, in Frobenius norms.
    """
    value, found, own, inverse = exact.pseudoinverse(a)
    if rtol is None:
        rtol = Fraction(0) if atol else max(a.shape) * _EPSILON
    low = max((atol or 0) ** 2, rtol**2 * own)
    if low * inverse >= 1 or found < rank:
        raise NotExactError(
            "A matrix whose singular values are nearly or exactly zero has no certain rank; add a "
            "multiple of the identity, or select independent columns"
        )
    return value
