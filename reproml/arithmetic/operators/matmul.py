"""Sums and dot products, rounded once: Ziv's test on a binary64 sum in any order.

The product of two binary32 numbers is exact in binary64. With |sum - exact| <= gamma_K * sum |a||b|
(Higham, section 3.1) and sum |a||b| <= ||a|| ||b|| (Cauchy-Schwarz), one norm for each row and column
bounds every element of a matrix product. Elements that fail the test go up three stairs: the bound
from the product of the absolute values; a sum with its errors kept (TwoSum); exact fractions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from fractions import Fraction
from typing import Optional

import torch
from torch import Tensor
from torch._prims_common import canonicalize_dims

from reproml.arithmetic import NotExactError
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.rounding import exact_sum, gamma, nearest, settle_sum, two_sum

# From this many failures on, a whole product of absolute values is cheaper than each by itself.
_MANY = 64
_CHUNK = 1 << 22  # elements gathered at once

ONE = Fraction(1)


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
    single = torch.float32
    if (
        a.dtype is not single
        or b.dtype is not single
        or (bias is not None and bias.dtype is not single)
    ):
        raise NotExactError("A product of matrices is defined for float32 alone.")
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise RuntimeError(
            f"matrices of shapes {list(a.shape)} and {list(b.shape)} do not multiply"
        )
    if beta == 0 and bias is not None:  # as in BLAS, not even its NaN counts
        return matmul(a, b, None, alpha)
    return _plain(a, b, bias, alpha, beta)


def _plain(
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
        if len(index) < _MANY:
            return few(index)
        tight = settle_sum(*scaled(c, wide_a.abs() @ wide_b.abs()), few)
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

    return settle_sum(*scaled(c, row * column), resolve)


def _compiled(a: Tensor, b: Tensor, bias: Optional[Tensor]) -> Optional[Tensor]:
    """The product by c/products.c, or None where that does not apply."""
    single, of_a, of_b = torch.float32, a.stride(), b.stride()
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
    if a.dtype is not single or b.dtype is not single or not (a.is_cpu and b.is_cpu):
        return None
    if bias is not None and not (
        bias.shape == (n,) and bias.dtype is single and kernels.usable(bias)
    ):
        return None
    out = a.new_empty(shape)
    left = kernels.unsettled(
        kernels.library.reproml_product,
        *(batch, m, n, k),
        *(a.data_ptr(), a_batch, of_a[-2], of_a[-1], b.data_ptr(), b_batch, of_b[-2], of_b[-1]),
        *(None if bias is None else bias.data_ptr(), out.data_ptr()),
    )
    if left is None:
        return None
    if left is not kernels.NONE:
        *of, i, j = torch.unravel_index(left, out.shape)
        rows, columns = a[(*of, i)].unsqueeze(1), b.transpose(-1, -2)[(*of, j)].unsqueeze(2)
        rest = None if bias is None else bias[j].reshape(-1, 1, 1)
        out.view(-1)[left] = _plain(rows, columns, rest).reshape(-1)
    return out


def sum_over(
    x: Tensor,
    dims: Sequence[int],
    keepdim: bool = False,
    divisor: int = 1,
    y: Optional[Tensor] = None,
) -> Tensor:
    """The sum of x, or of the products x * y, over `dims`, divided by `divisor`, rounded once.

    x, y: float32 of one shape; dims: empty for all. Returns float32.
    """
    if y is not None and y.shape != x.shape:
        raise RuntimeError(f"tensors of shapes {list(x.shape)} and {list(y.shape)} do not multiply")
    if kernels.library and x.is_cpu:
        total = _compiled_sum(x, dims or range(x.dim()), keepdim, divisor, y)
        if total is not None:
            return total
    dims = sorted(canonicalize_dims(x.dim(), tuple(dims))) if dims else list(range(x.dim()))
    dims = dims if x.dim() else []
    wide = x.double() if y is None else x.double() * y.double()
    count = 1
    for d in dims:
        count *= x.shape[d]
    if not dims:
        c, size = wide, wide.abs()
    else:
        c, size = wide.sum(dims, keepdim=keepdim), wide.abs().sum(dims, keepdim=keepdim)
    if divisor != 1:
        c, size = c / divisor, size / divisor

    def resolve(index: Tensor) -> list[float]:
        kept = [d for d in range(x.dim()) if d not in dims]
        rows = wide.permute([*kept, *dims]).reshape(-1, count)
        return nearest_of_rows(rows[index], scale=Fraction(1, divisor))

    return settle_sum(c, size * gamma(count), resolve)


def _compiled_sum(
    x: Tensor, dims: Sequence[int], keepdim: bool, divisor: int, y: Optional[Tensor]
) -> Optional[Tensor]:
    """sum_over by c/sums.c; None where that cannot settle all."""
    rank, reduced = x.dim(), 0
    for d in dims:
        if not -rank <= d < rank or reduced >> d % rank & 1:
            return None  # the plain path names the error
        reduced |= 1 << d % rank
    shape = x.shape
    kept = [
        1 if reduced >> d & 1 else m for d, m in enumerate(shape) if keepdim or not reduced >> d & 1
    ]
    if not rank or abs(divisor) > 1 << 53:
        return None
    out = x.new_empty(kept)
    strides = x.stride()
    axes = (ctypes.c_int64 * (3 * rank))(*shape, *strides, *(strides if y is None else y.stride()))
    factor = None if y is None else y.data_ptr()
    left = kernels.library.reproml_sum(
        x.data_ptr(), factor, axes, rank, reduced, divisor, out.data_ptr()
    )
    if left < 0:  # axes too scattered for one loop
        order = sorted(range(rank), key=lambda d: reduced >> d & 1)
        count = x.numel() // max(out.numel(), 1)
        rows, factors = (
            None if t is None else t.permute(order).reshape(out.numel(), count) for t in (x, y)
        )
        assert rows is not None
        total = _compiled_sum(rows, (1,), False, divisor, factors)
        return None if total is None else total.reshape(kept)
    return None if left else out


def nearest_of_rows(terms: Tensor, scale: Fraction = ONE) -> list[float]:
    """The correctly rounded sum of each row of finite float64 terms [rows, n], times `scale`."""
    values: list[float] = []
    for chunk in terms.split(max(1, _CHUNK // max(1, terms.shape[1]))):
        if scale == 1 and len(chunk) >= _MANY:
            values += _by_two_sum(chunk)
        else:
            values += [nearest(scale * exact_sum(row)) for row in chunk.tolist()]
    return values


def _by_two_sum(terms: Tensor) -> list[float]:
    """nearest_of_rows by compensated sums (Ogita, Rump & Oishi, SIAM J. Sci. Comput. 26(6), 2005).

    Each row becomes s + t with |s + t - exact| <= e. The rows for which this is not enough, and those
    whose s + t rounds to a midpoint of binary32 in binary64 (which would round twice), go on.
    """
    s, n = terms, terms.shape[1]
    t = torch.zeros(len(terms), dtype=torch.float64, device=terms.device)
    size = torch.zeros_like(t)
    while s.shape[1] > 1:
        if s.shape[1] % 2:
            s = torch.nn.functional.pad(s, (0, 1))
        s, error = two_sum(*s.split(s.shape[1] // 2, 1))
        t = t + error.sum(1)
        size = size + error.abs().sum(1)
    s = s.sum(1)
    e = size * gamma(n) + 2.0**-1000 * (size > 0)
    low, high = s + (t - e), s + (t + e)
    result = high.float()
    sure = (low.float() == result) & ~_maybe_midpoint(low) & ~_maybe_midpoint(high)
    values: list[float] = (result + 0.0).tolist()
    for i in (~sure).nonzero().squeeze(1).tolist():
        values[i] = nearest(exact_sum(terms[i].tolist()))
    return values


def _maybe_midpoint(x: Tensor) -> Tensor:
    """Whether float64 x may be halfway between two binary32 numbers (all subnormal ones may)."""
    half = (x.view(torch.int64) & 0x1FFFFFFF) == 0x10000000
    return half | ((x.abs() < 2.0**-125) & (x != 0))
