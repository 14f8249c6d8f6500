"""Cross products, sums of triple products, and QR factorizations in correctly rounded steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics.formats import BINARY32, target
from reproml.arithmetic.operators.matmul import matmul
from reproml.arithmetic.operators.norms import vector_norm
from reproml.errors import NotExactError


def qr(a: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """Compute aten.linalg_qr: A = Q R, where R has a positive diagonal.

    a: float32 [m, n]. Returns Q, float32 [m, min(m, n)], and R, float32 [min(m, n), n].

    Gram-Schmidt orthogonalization, twice for each column, which suffices (Kahan; see Parlett, The
    Symmetric Eigenvalue Problem, section 6.9): v - Q (Q^T v), where both products are rounded once, then
    v / |v|, rounded once. R is Q^T A, rounded once, with zeros below its diagonal.

    Raises NotExactError for another mode, a batch of matrices, or linearly dependent columns.
    """
    if mode != "reduced" or a.dim() != 2:
        raise NotExactError("A QR factorization is defined for one matrix and mode='reduced' only.")
    with replay_log.immediate_tests():
        return _gram_schmidt(a)


def _gram_schmidt(a: Tensor) -> tuple[Tensor, Tensor]:
    q = a.new_zeros(a.shape[0], min(a.shape))
    for j in range(q.shape[1]):
        v = a[:, j : j + 1]
        for _ in range(2 if j else 0):
            previous = q[:, :j]
            projections = matmul(previous.t(), v)
            v = matmul(-previous, projections, v)
        length = vector_norm(v)
        if not length > 0:
            raise NotExactError(
                "The columns are linearly dependent, so their QR factorization is not unique."
            )
        q[:, j : j + 1] = elementwise(lambda ctx, v, n: v / n, v, length)
    return q, matmul(q.t(), a).triu()


def cross(x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    """Compute aten.linalg_cross: x[1] y[2] - x[2] y[1] and so on along `dim`, each rounded once."""
    x, y = torch.broadcast_tensors(x, y)
    if x.shape[dim] != 3:
        raise RuntimeError(f"linalg.cross: inputs dimension {dim} must have length 3")
    following = [t.roll(-1, dim) for t in (x, y)]
    before = [t.roll(1, dim) for t in (x, y)]
    return elementwise(
        lambda ctx, a, b, c, d: a * d - c * b, following[0], following[1], before[0], before[1]
    )


def trilinear(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    """Compute aten._trilinear, which nn.Bilinear calls: the sum of x y z over the axes `sumdim`.

    expand1, expand2, expand3: the axes of x, y and z at which one of length 1 is inserted first.
    """
    operands: list[Tensor] = []
    for t, axes in ((x, expand1), (y, expand2), (z, expand3)):
        for axis in axes:
            t = t.unsqueeze(axis)
        operands.append(t)
    product = _as_matrix_product(operands, sumdim)
    if product is not None:
        return product
    last = range(-len(sumdim) - 1, -1)
    rows = [
        t.unsqueeze(-1).movedim([i % t.dim() for i in sumdim], tuple(last)).flatten(last.start)
        for t in torch.broadcast_tensors(*operands)
    ]

    def formula(ctx: Any, x: Any, y: Any, z: Any) -> Any:
        return ctx.sum(x * y * z)

    if not rows[0].numel():
        return x.new_zeros(rows[0].shape[:-1])
    return rowwise(formula, -1, *rows).squeeze(-1)


def _as_matrix_product(operands: list[Tensor], sumdim: Sequence[int]) -> Optional[Tensor]:
    """Compute `trilinear` as a product of matrices. Returns None where it is not exactly one."""
    shape = torch.broadcast_shapes(*[t.shape for t in operands])
    if target() is not BINARY32 or not all(t.is_cpu and t.numel() for t in operands):
        return None
    i, j, k = min(  # x y is the smallest of the three products
        ((0, 1, 2), (0, 2, 1), (1, 2, 0)),
        key=lambda of: torch.broadcast_shapes(operands[of[0]].shape, operands[of[1]].shape).numel(),
    )
    x, y, z = (operands[n].double() for n in (i, j, k))
    summed = [n % len(shape) for n in sumdim]
    left, right = torch.broadcast_shapes(x.shape, y.shape), z.shape
    kept = [n for n in range(len(shape)) if n not in summed]
    batch = [n for n in kept if left[n] > 1 and right[n] > 1]
    columns = [n for n in kept if n not in batch and right[n] > 1]
    lines = [n for n in kept if n not in batch and n not in columns]

    def matrices(t: Tensor, *groups: list[int]) -> Tensor:
        """Expand a tensor to all axes of these groups and make an axis of each group."""
        axes = [n for group in groups for n in group]
        t = t.expand([shape[n] if n in axes else 1 for n in range(len(shape))])
        t = t.permute(axes + [n for n in range(len(shape)) if n not in axes])
        return t.reshape([math.prod(shape[n] for n in group) for group in groups])

    finite = all(bool(t.isfinite().all()) for t in (x, y, z))
    numbers = [x, y, z] if finite else [t.nan_to_num(0.0, 0.0, 0.0) for t in (x, y, z)]
    parts = _scaled_factors(*numbers)
    if parts is None:
        return None
    high, low, factors, exponent = parts
    a = torch.cat([matrices(t, batch, lines, summed) for t in (high, low)], 2)
    b = matrices(factors, batch, summed, columns)
    product = _shifted(matmul(a, torch.cat([b, b], 1)), exponent)
    if product is None:
        return None
    if not finite:  # the sums of terms that are infinite or NaN are so in any order
        a, b = matrices(x * y, batch, lines, summed), matrices(z, batch, summed, columns)
        limits = a @ b
        product = torch.where(limits.isfinite(), product, limits.float())
    order = batch + lines + columns
    unordered = product.reshape([shape[n] for n in order])
    return unordered.permute([order.index(n) for n in kept]).contiguous()


def _scaled_factors(
    x: Tensor, y: Tensor, z: Tensor
) -> Optional[tuple[Tensor, Tensor, Tensor, int]]:
    """Return float32 h, l and f and an exponent e with x y z = (h + l) f 2^e, for binary32 numbers.

    The product of two binary32 numbers is the sum of two others, unless one of these underflows. So powers
    of two bring x and y near 1, and z to the other side, so that e = 0, or near 1 where that is too far.
    Returns None where a number underflows nevertheless.
    """
    largest = [float(t.abs().amax()) for t in (x, y, z)]
    of_x, of_y, of_z = (math.frexp(n)[1] for n in largest)
    exponent = 0 if abs(of_x + of_y + of_z) < 100 else of_x + of_y + of_z
    if 0 in largest:
        z, exponent = torch.zeros_like(z), 0
    both = (x * 2.0**-of_x) * (y * 2.0**-of_y)
    scaled = z * 2.0 ** (of_x + of_y - exponent)
    high, factors = both.float(), scaled.float()
    low = (both - high).float()
    exact = (high.double() + low == both).all() & (factors == scaled).all()
    return (high, low, factors, exponent) if exact else None


def _shifted(x: Tensor, exponent: int) -> Optional[Tensor]:
    """Return x 2^exponent, where x is rounded to binary32; None where that may round it again.

    It does not round a normal number that becomes another one, or that becomes too small for any.
    """
    if not exponent:
        return x
    shifted = x.double() * 2.0**exponent
    normal = x.double().abs().minimum(shifted.abs()) >= 2.0**-126
    exact = (normal | (shifted.abs() < 2.0**-150)) & (exponent < 0 or x != 0)
    return shifted.float() if exact.all() else None
