"""Norms, variances, running sums, powers and the like, each rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch._prims_common import canonicalize_dims

from reproml.arithmetic import NotExactError
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.dispatch import deferred
from reproml.arithmetic.numerics.rounding import gamma, settle_sum
from reproml.arithmetic.operators import normalization_reference
from reproml.arithmetic.operators.activations import single
from reproml.arithmetic.operators.matmul import matmul, nearest_of_rows, sum_over


def dims_of(dim: Any) -> Sequence[int]:
    """PyTorch's `dim` as a sequence; empty for all axes."""
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def only_float32(dtype: Any) -> None:
    if dtype not in (None, torch.float32):
        raise NotExactError(f"A result of {dtype} has no exact definition here; ask for float32.")


def total(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    only_float32(dtype)
    return sum_over(x.float(), dims_of(dim), keepdim)


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    only_float32(dtype)
    count = 1
    for d in dims_of(dim) if x.dim() else ():
        count *= x.shape[d]
    count = count if dims_of(dim) else x.numel()
    return sum_over(x.float(), dims_of(dim), keepdim, divisor=count)


def _by_rows(function: Callable[[Tensor], Tensor], x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """A function [rows, n] -> [rows, 1], applied over the axes `dim`."""
    dims = sorted(canonicalize_dims(x.dim(), tuple(dims_of(dim)))) or list(range(x.dim()))
    dims = dims if x.dim() else []
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    length = torch.Size([x.shape[d] for d in dims]).numel()
    rows = x.permute([*kept, *dims]).reshape(torch.Size(shape).numel(), length)
    y = function(rows).reshape(shape)
    return y.reshape([1 if d in dims else n for d, n in enumerate(x.shape)]) if keepdim else y


def variance(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    c = 1 if correction is None else correction
    return _by_rows(lambda rows: normalization_reference.variance(rows, c), x, dim, keepdim)


def deviation(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    """The square root of the exact variance."""
    c = 1 if correction is None else correction
    return _by_rows(
        lambda rows: normalization_reference.variance(rows, c, root=True), x, dim, keepdim
    )


def vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The 2-norm, 1-norm, or largest absolute value."""
    only_float32(dtype)
    if ord == 2:
        return _by_rows(lambda r: rowwise(lambda k, x: k.sqrt(k.sum(x * x)), 1, r), x, dim, keepdim)
    if ord == 1:
        return sum_over(x.abs(), dims_of(dim), keepdim)
    if ord == float("inf"):
        return x.abs().amax(tuple(dims_of(dim)), keepdim)
    raise NotExactError(f"The norm of order {ord} has no exact definition; 1, 2 and inf have.")


def norm(
    x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


def cumsum(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    """Each element is the exact sum of those up to it, rounded once."""
    only_float32(dtype)
    if not x.numel():
        return x.clone()
    rows = torch.atleast_1d(x.double()).movedim(dim, -1)
    n = rows.shape[-1]
    flat = rows.reshape(-1, n)

    def resolve(index: Tensor) -> Sequence[float]:
        pairs = zip((index // n).tolist(), (index % n).tolist())
        return [nearest_of_rows(flat[i : i + 1, : j + 1])[0] for i, j in pairs]

    c, bound = rows.cumsum(-1), rows.abs().cumsum(-1) * gamma(n)
    return settle_sum(c, bound, resolve).movedim(-1, dim).reshape(x.shape)


def power(x: Any, exponent: Any) -> Tensor:
    """x^exponent for a number as the exponent: a product where it is whole, else exp(exponent log x)."""
    if isinstance(x, Tensor) and not isinstance(exponent, Tensor):
        p = single(exponent)
        if p == 2:
            return x * x
        if p == 0:
            return torch.ones_like(x)
        if p.denominator == 1 and abs(p) <= 64:
            return elementwise(lambda k, x: _whole_power(x, int(p)), x)
        y = elementwise(lambda k, x: k.exp(p * k.log(x)), torch.where(x > 0, x, 1.0))
        at_zero = torch.where(x == 0, 0.0 if p > 0 else torch.inf, torch.nan)
        return torch.where(x > 0, y, at_zero)
    raise NotExactError("A power whose exponent is a tensor has no exact definition; use a number.")


def _whole_power(x: Any, n: int) -> Any:
    if n < 0:
        return 1 / _whole_power(x, -n)
    y = x
    for _ in range(n - 1):
        y = y * x
    return y


def addcmul(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    v = single(value)
    return elementwise(lambda k, x, a, b: x + v * a * b, x, a, b)


def addcdiv(x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    v = single(value)
    return elementwise(lambda k, x, a, b: x + v * a / b, x, a, b)


def lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    """x + weight (y - x)."""
    w = weight if isinstance(weight, Tensor) else float(single(weight))
    return elementwise(lambda k, x, y, w: x + w * (y - x), x, y, w)


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """alpha * (a @ b) + beta * bias, also of two dimensions (addmm) or of vectors (addmv)."""
    if alpha == beta == 1:
        return matmul(a, b, bias)
    return matmul(a, b, bias, single(alpha), single(beta))


def addmv(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    bias = bias.expand(len(a)).unsqueeze(1)
    return matmul(a, b.unsqueeze(1), bias, single(alpha), single(beta)).squeeze(1)


def arange(*bounds: float, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """start + i * step. Whole numbers are left to PyTorch."""
    if (
        dtype not in (None, torch.float32)
        or all(isinstance(b, int) for b in bounds)
        and dtype is None
    ):
        return torch.arange(*bounds, dtype=dtype, device=device)
    start, end, step = (
        (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1) if len(bounds) == 2 else bounds
    )
    count = math.ceil((end - start) / step)  # in binary64, as PyTorch counts
    i = torch.arange(max(count, 0), dtype=torch.int64)
    return elementwise(lambda k, i: Fraction(start) + i * Fraction(step), i).to(device or "cpu")


def linspace(
    start: Any, end: Any, steps: int, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """start + i (end - start) / (steps - 1)."""
    only_float32(dtype)
    a, b = Fraction(float(start)), Fraction(float(end))
    i = torch.arange(steps, dtype=torch.int64)
    return elementwise(lambda k, i: a + i * ((b - a) / max(steps - 1, 1)), i).to(device or "cpu")


def upsample_nearest_backward(
    g: Tensor,
    out: Any,
    size: Any,
    scales_h: Optional[float] = None,
    scales_w: Optional[float] = None,
) -> Tensor:
    """The sum over the copies of each element; whole factors only."""
    n, c, h, w = size
    if g.shape[2] % h or g.shape[3] % w:
        raise NotExactError(
            f"Upsampling from {[h, w]} to {list(g.shape[2:])} has no exact backward; use whole factors."
        )
    return sum_over(g.reshape(n, c, h, g.shape[2] // h, w, g.shape[3] // w), (3, 5))


def qr(a: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """A = Q R with a positive diagonal, of [m, n], by Gram & Schmidt, each column twice (Kahan: twice is
    enough; Parlett, The Symmetric Eigenvalue Problem, section 6.9): v - Q (Q^T v) with both products
    rounded once, then v / |v| rounded once; R = Q^T A rounded once, zero below its diagonal.

    Raises NotExactError for another mode, a batch, or columns that depend on each other.
    """
    if mode != "reduced" or a.dim() != 2:
        raise NotExactError("A QR factorisation is defined for one matrix and mode='reduced'.")
    with deferred.at_once():
        return _gram_schmidt(a)


def _gram_schmidt(a: Tensor) -> tuple[Tensor, Tensor]:
    q = a.new_zeros(a.shape[0], min(a.shape))
    for j in range(q.shape[1]):
        v = a[:, j : j + 1]
        for _ in range(2 if j else 0):
            past = q[:, :j]
            along = matmul(past.t(), v)
            v = matmul(-past, along, v)
        length = vector_norm(v)
        if not length > 0:
            raise NotExactError(
                "The columns depend on each other: their QR factorisation is not unique."
            )
        q[:, j : j + 1] = elementwise(lambda k, v, n: v / n, v, length)
    return q, matmul(q.t(), a).triu()
