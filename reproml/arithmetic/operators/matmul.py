"""Sums and dot products, rounded once: Ziv's test on a binary64 sum in any order.

The product of two binary32 numbers is exact in binary64. With |sum - exact| <= gamma_K * sum |a||b|
(Higham, section 3.1) and sum |a||b| <= ||a|| ||b|| (Cauchy-Schwarz), one norm for each row and column
bounds every element of a matrix product. Elements that fail the test go up three stairs: the bound
from the product of the absolute values; a sum with its errors kept (TwoSum); exact fractions.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.exact_sums import MANY, ONE, exact_sum, nearest_of_rows
from reproml.arithmetic.numerics.rounding import gamma, nearest, round_sum
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.errors import NotExactError


def matmul(
    a: Tensor, b: Tensor, bias: Optional[Tensor] = None, alpha: Fraction = ONE, beta: Fraction = ONE
) -> Tensor:
    """alpha * (a @ b) + beta * bias, rounded once.

    a: float32 [..., m, k]; b: float32 [..., k, n], the same leading axes; bias: float32, broadcast to
    [..., m, n]. alpha, beta: binary32 numbers. Returns float32 [..., m, n]; an exact zero is +0.
    """
    if alpha is ONE and beta is ONE and kernels.library is not None:
        product = _compiled(a, b, bias)  # first, as the checks below take as long
        if product is not None:
            return product
    f32 = torch.float32
    if a.dtype is not f32 or b.dtype is not f32 or (bias is not None and bias.dtype is not f32):
        raise NotExactError("A product of matrices is defined for float32 alone.")
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(
            f"matrices of shapes {list(a.shape)} and {list(b.shape)} do not multiply"
        )
    if beta == 0 and bias is not None:  # as in BLAS, not even its NaN counts
        return matmul(a, b, None, alpha)
    return _reference(a, b, bias, alpha, beta)


def _reference(
    a: Tensor, b: Tensor, bias: Optional[Tensor], alpha: Fraction = ONE, beta: Fraction = ONE
) -> Tensor:
    """The product by PyTorch's own, in binary64."""
    wide_a, wide_b = a.double(), b.double()
    row, column = (
        torch.linalg.vector_norm(x, dim=d, keepdim=True) for x, d in ((wide_a, -1), (wide_b, -2))
    )
    c = wide_a @ wide_b
    wide_bias = None if bias is None else bias.double().expand(c.shape)

    def scaled(c: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The centre and the bound, once the product's own size is known."""
        if alpha != 1:
            c, size = c * float(alpha), size * abs(float(alpha))
        if wide_bias is not None:
            term = wide_bias if beta == 1 else wide_bias * float(beta)
            c, size = c + term, size + term.abs()
        return c, size * gamma(a.shape[-1] + 2)

    def resolve(index: Tensor) -> Sequence[float]:
        if len(index) < MANY:
            return few(index)
        tight = round_sum(*scaled(c, wide_a.abs() @ wide_b.abs()), few)
        return tight.reshape(-1)[index].tolist()

    def few(index: Tensor) -> Sequence[float]:
        *batch, i, j = torch.unravel_index(index, c.shape)
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

    return round_sum(*scaled(c, row * column), resolve)


def _compiled(a: Tensor, b: Tensor, bias: Optional[Tensor]) -> Optional[Tensor]:
    """The product by csrc/matmul.c, or None where that does not apply."""
    f32, of_a, of_b = torch.float32, a.stride(), b.stride()
    shape: tuple[int, ...]
    if len(of_a) == len(of_b) == 2:
        (m, k), (inner, n) = a.shape, b.shape
        batch, batches, a_batch, b_batch, shape = 1, 1, 0, 0, (m, n)
    elif len(of_a) == len(of_b) == 3:
        (batch, m, k), (batches, inner, n) = a.shape, b.shape
        a_batch, b_batch, shape = of_a[0], of_b[0], (batch, m, n)
    else:
        return None
    if inner != k or batches != batch or not batch * m * n:
        return None
    if a.dtype is not f32 or b.dtype is not f32 or not (a.is_cpu and b.is_cpu):
        return None
    if bias is not None and not (bias.shape == (n,) and bias.dtype is f32 and kernels.usable(bias)):
        return None
    out = a.new_empty(shape)
    result = kernels.run_kernel(
        kernels.library.reproml_product,
        *(batch, m, n, k),
        *(a.data_ptr(), a_batch, of_a[-2], of_a[-1], b.data_ptr(), b_batch, of_b[-2], of_b[-1]),
        *(None if bias is None else bias.data_ptr(), out.data_ptr()),
    )
    if not result.complete:
        return None
    if result.failed is not None:
        left = result.failed
        *of, i, j = torch.unravel_index(left, out.shape)
        rows, columns = a[(*of, i)].unsqueeze(1), b.transpose(-1, -2)[(*of, j)].unsqueeze(2)
        rest = None if bias is None else bias[j].reshape(-1, 1, 1)
        out.view(-1)[left] = _reference(rows, columns, rest).reshape(-1)
    return out


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """alpha * (a @ b) + beta * bias, also of two dimensions (addmm) or of vectors (addmv)."""
    if alpha == beta == 1:
        return matmul(a, b, bias)
    return matmul(a, b, bias, float32_scalar(alpha), float32_scalar(beta))


def addmv(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    bias = bias.expand(len(a)).unsqueeze(1)
    return matmul(a, b.unsqueeze(1), bias, float32_scalar(alpha), float32_scalar(beta)).squeeze(1)
