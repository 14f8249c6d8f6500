"""Cross products, sums of triple products, and QR factorizations in correctly rounded steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.dispatch.deferred import replay_log
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
    last = range(-len(sumdim), 0)
    rows = [
        t.movedim(tuple(sumdim), tuple(last)).flatten(-len(sumdim))
        for t in torch.broadcast_tensors(*operands)
    ]

    def formula(ctx: Any, x: Any, y: Any, z: Any) -> Any:
        return ctx.sum(x * y * z)

    if not rows[0].numel():
        return x.new_zeros(rows[0].shape[:-1])
    return rowwise(formula, -1, *rows).squeeze(-1)
