"""Matrix products, rounded once.

The product of two binary32 numbers is exact in binary64, so only the sum is rounded there. The rounding
test is applied to that sum, whatever its order, with |sum - exact| <= gamma_k * sum |a||b| (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1) and sum |a||b| <= ||a|| ||b||
(Cauchy-Schwarz): one norm for each row and column bounds every element. Elements that fail the test are
computed again, in this order: with the bound from the product of the absolute values, if they are many;
as a sum with its rounding errors kept (TwoSum); with exact fractions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels, pair_arrays
from reproml.arithmetic.compiler.direct import run_directly
from reproml.arithmetic.numerics.exact_sums import MANY, ONE, exact_sum, nearest_of_rows
from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.arithmetic.numerics.rationals import Rationals
from reproml.arithmetic.numerics.rounding import gamma, nearest, round_sum
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require_float32
from reproml.errors import NotExactError


def matmul(
    a: Tensor, b: Tensor, bias: Optional[Tensor] = None, alpha: Fraction = ONE, beta: Fraction = ONE
) -> Tensor:
    """Return alpha * (a @ b) + beta * bias, rounded once.

    a: float32 [..., m, k]; b: float32 [..., k, n] with the same leading axes; bias: float32, broadcast to
    [..., m, n]; alpha, beta: binary32 numbers. Returns float32 [..., m, n], where an exact zero is +0. If
    beta is 0, bias is ignored, as in BLAS.

    Raises NotExactError for another dtype, RuntimeError for shapes that cannot be multiplied.
    """
    if target() is BINARY64:
        return _in_binary64(a, b, bias, alpha, beta)
    if alpha is ONE and beta is ONE and kernels.loops() is not None:
        product = _compiled(a, b, bias)  # first, because the checks below take as long
        if product is not None:
            return product
    f32 = torch.float32
    if a.dtype is not f32 or b.dtype is not f32 or (bias is not None and bias.dtype is not f32):
        raise NotExactError("A matrix product is defined for float32 only.")
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(
            f"matrices of shapes {list(a.shape)} and {list(b.shape)} cannot be multiplied"
        )
    if beta == 0 and bias is not None:  # not even its NaN counts
        return matmul(a, b, None, alpha)
    return _reference(a, b, bias, alpha, beta)


def _in_binary64(
    a: Tensor, b: Tensor, bias: Optional[Tensor], alpha: Fraction, beta: Fraction
) -> Tensor:
    """Compute `matmul` rounded to binary64: in pairs, then by exact integers."""
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(
            f"matrices of shapes {list(a.shape)} and {list(b.shape)} cannot be multiplied"
        )
    a, b = a.double(), b.double()
    shape = (*a.shape[:-1], b.shape[-1])
    batch = math.prod(shape[:-2])
    if not math.prod(shape):
        return a.new_empty(shape)
    s, t, rad = pair_arrays.products(*[x.reshape(batch, *x.shape[-2:]) for x in (a, b)])
    ctx = pair_arrays.PairArrays()
    y = pair_arrays.PairArray(ctx, s.reshape(shape), t.reshape(shape), rad.reshape(shape))
    added = None if bias is None or beta == 0 else bias.double().expand(shape)
    if kernels.library is not None and a.is_cpu:
        y = y if alpha == 1 else y * alpha
        if added is not None:
            y = y + (ctx.exact(added) if beta == 1 else ctx.exact(added) * beta)
    value, failed = pair_arrays.round_pairs(y.s, y.t, y.rad)
    value = value + 0.0
    if failed.any():
        limits = _limits(a, b, added, alpha, beta)
        value = torch.where(limits.isfinite(), value, limits)
        failed &= limits.isfinite()
    for at in failed.nonzero().tolist():
        *of, i, j = at
        row, column = a[(*of, i)], b[(*of, slice(None), j)]
        last = None if added is None else added[tuple(at)]
        value[tuple(at)] = _exact_element(row, column, last, alpha, beta)
    return value


def _limits(
    a: Tensor, b: Tensor, added: Optional[Tensor], alpha: Fraction, beta: Fraction
) -> Tensor:
    """Return the product of the signs of all finite numbers and of the others as they are.

    It is infinite or NaN where the product of the matrices is, and cannot overflow.
    """
    a, b = (torch.where(x.isfinite(), x.sign(), x) for x in (a, b))
    limits = (a @ b) * ((alpha > 0) - (alpha < 0))
    if added is not None:
        limits = limits + torch.where(added.isfinite(), 0.0, added) * (1 if beta > 0 else -1)
    return limits


def _exact_element(
    row: Tensor, column: Tensor, added: Optional[Tensor], alpha: Fraction, beta: Fraction
) -> float:
    x, y = (Rationals.of_floats(t.cpu().numpy()) for t in (row, column))
    total = alpha * (x * y).total() + (0 if added is None else beta * Fraction(float(added)))
    return nearest(total)


def _reference(
    a: Tensor, b: Tensor, bias: Optional[Tensor], alpha: Fraction = ONE, beta: Fraction = ONE
) -> Tensor:
    """Compute the product by PyTorch's own kernels for binary64."""
    wide_a, wide_b = a.double(), b.double()
    row_norms = torch.linalg.vector_norm(wide_a, dim=-1, keepdim=True)
    column_norms = torch.linalg.vector_norm(wide_b, dim=-2, keepdim=True)
    product = wide_a @ wide_b
    wide_bias = None if bias is None else bias.double().expand(product.shape)

    def midpoint_and_error(magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result and a bound of its error, from a bound of the sums of |a||b|."""
        mid = product
        if alpha != 1:
            mid, magnitude = mid * float(alpha), magnitude * abs(float(alpha))
        if wide_bias is not None:
            term = wide_bias if beta == 1 else wide_bias * float(beta)
            mid, magnitude = mid + term, magnitude + term.abs()
        return mid, magnitude * gamma(a.shape[-1] + 2)

    def resolve(index: Tensor) -> Sequence[float]:
        if len(index) < MANY:
            return resolve_few(index)
        tight = round_sum(*midpoint_and_error(wide_a.abs() @ wide_b.abs()), resolve_few)
        return tight.reshape(-1)[index].tolist()

    def resolve_few(index: Tensor) -> Sequence[float]:
        *batch, i, j = torch.unravel_index(index, product.shape)
        terms = wide_a[(*batch, i)] * wide_b.transpose(-1, -2)[(*batch, j)]
        if wide_bias is None:
            return nearest_of_rows(terms, scale=alpha)
        last = wide_bias[(*batch, i, j)].unsqueeze(1)
        if alpha == beta == 1:
            return nearest_of_rows(torch.cat([terms, last], 1))
        return [
            nearest(alpha * exact_sum(row) + beta * Fraction(x))
            for row, x in zip(terms.tolist(), last.squeeze(1).tolist())
        ]

    return round_sum(*midpoint_and_error(row_norms * column_norms), resolve)


def _compiled(a: Tensor, b: Tensor, bias: Optional[Tensor]) -> Optional[Tensor]:
    """Compute the product by csrc/matmul.c; None where it does not apply."""
    f32, of_a, of_b = torch.float32, a.stride(), b.stride()
    shape: tuple[int, ...]
    if len(of_a) == len(of_b) == 2:
        (m, k), (inner, n) = a.shape, b.shape
        batch, batches, a_batch, b_batch, shape = 1, 1, 0, 0, (m, n)
    elif len(of_a) == len(of_b) == 3:
        (batch, m, k), (batches, inner, n) = a.shape, b.shape
        a_batch, b_batch, shape = of_a[0], of_b[0], (batch, m, n)
    elif len(of_a) == len(of_b) > 3 and a.shape[:-2] == b.shape[:-2]:
        if bias is not None and bias.dim() > 1:
            bias = bias.expand(*a.shape[:-1], b.shape[-1]).flatten(0, -3)
        product = _compiled(a.flatten(0, -3), b.flatten(0, -3), bias)
        return None if product is None else product.unflatten(0, a.shape[:-2])
    else:
        return None
    if inner != k or batches != batch or not batch * m * n:
        return None
    if a.dtype is not f32 or b.dtype is not f32 or not (a.is_cpu and b.is_cpu):
        return None
    row = added = None  # to each row of the product, and to all of it
    if bias is not None:
        if bias.dtype is not f32 or not bias.is_cpu:
            return None
        if bias.shape == (n,):
            row = bias.contiguous()
        else:
            added = bias.expand(shape).contiguous()
    out = a.new_empty(shape)
    result = kernels.run_kernel(
        kernels.loops().reproml_product,
        *(None, batch, m, n, k),
        *(a.data_ptr(), a_batch, of_a[-2], of_a[-1], b.data_ptr(), b_batch, of_b[-2], of_b[-1]),
        *(None if x is None else x.data_ptr() for x in (row, added)),
        out.data_ptr(),
    )
    if not result.complete:
        return None
    if result.failed is not None:
        left = result.failed
        *of, i, j = torch.unravel_index(left, out.shape)
        rows, columns = a[(*of, i)].unsqueeze(1), b.transpose(-1, -2)[(*of, j)].unsqueeze(2)
        rest = None if bias is None else bias.expand(shape)[(*of, i, j)].reshape(-1, 1, 1)
        out.view(-1)[left] = _reference(rows, columns, rest).reshape(-1)
    return out


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Compute aten.addmm and aten.baddbmm: alpha * (a @ b) + beta * bias, rounded once."""
    if alpha == beta == 1:
        return matmul(a, b, bias)
    return matmul(a, b, bias, float32_scalar(alpha), float32_scalar(beta))


def mv(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b for a vector b, rounded once."""
    return matmul(a, b.unsqueeze(1)).squeeze(1)


def addmv(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return alpha * (a @ b) + beta * bias for a vector b, rounded once."""
    if a.shape[1] != len(b):
        raise RuntimeError(
            f"a matrix of shape {list(a.shape)} and a vector of {len(b)} cannot be multiplied"
        )
    bias = bias.expand(len(a))
    # As a row, because the compiled loop adds one number to each column.
    return baddbmm(bias, b.unsqueeze(0), a.t(), beta=beta, alpha=alpha).squeeze(0)


def addbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return alpha * (the sum of all a[i] @ b[i]) + beta * bias, rounded once."""
    if len(a) != len(b) or a.shape[2] != b.shape[1]:
        raise RuntimeError(
            f"batches of shapes {list(a.shape)} and {list(b.shape)} cannot be multiplied"
        )
    return baddbmm(bias, a.transpose(0, 1).flatten(1), b.flatten(0, 1), beta=beta, alpha=alpha)


def addr(x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return alpha * (the outer product of a and b) + beta * x, rounded once."""
    x = x.expand(len(a), len(b))
    if beta == 1 and x.dtype is torch.float32:
        # + 0.0: an exact zero is +0.
        sums = run_directly(
            "addcmul", x + 0.0, a.unsqueeze(1), b, scalar=float(float32_scalar(alpha))
        )
        if sums is not None:
            return sums
    return baddbmm(x, a.unsqueeze(1), b.unsqueeze(0), beta=beta, alpha=alpha)


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    out_dtype: Any = None,
) -> Tensor:
    """Compute aten._grouped_mm: the products of groups of rows or columns, which end at the offsets.

    Rows of a [m, k] meet one of the matrices b [g, k, n]; matrices a [g, m, k] meet columns of b [k, n];
    if both have two axes, k is divided and the result is [g, m, n]. Two batches are multiplied without
    offsets.
    """
    require_float32(out_dtype)
    if bias is not None:
        raise NotExactError("A grouped product is defined without a bias.")
    if offs is None:
        return matmul(a, b)
    ends = [0, *offs.tolist()]
    if a.dim() == b.dim() == 2:
        pairs = [(a[:, i:j], b[i:j]) for i, j in zip(ends, ends[1:])]
        return torch.stack([matmul(x, y) for x, y in pairs])
    if a.dim() == 2:
        parts = [matmul(a[i:j], b[n]) for n, (i, j) in enumerate(zip(ends, ends[1:]))]
        return torch.cat([*parts, a.new_zeros(len(a) - ends[-1], b.shape[2])])
    parts = [matmul(a[n], b[:, i:j]) for n, (i, j) in enumerate(zip(ends, ends[1:]))]
    return torch.cat([*parts, a.new_zeros(a.shape[1], b.shape[1] - ends[-1])], 1)
