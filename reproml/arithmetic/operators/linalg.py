"""Matrix factorisations: a QR factorisation in correctly rounded steps."""

from __future__ import annotations

from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.operators.matmul import matmul
from reproml.arithmetic.operators.reductions import vector_norm
from reproml.errors import NotExactError


def qr(a: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """A = Q R with a positive diagonal, of [m, n], by Gram & Schmidt, each column twice (Kahan: twice is
    enough; Parlett, The Symmetric Eigenvalue Problem, section 6.9): v - Q (Q^T v) with both products
    rounded once, then v / |v| rounded once; R = Q^T A rounded once, zero below its diagonal.

    Raises NotExactError for another mode, a batch, or columns that depend on each other.
    """
    if mode != "reduced" or a.dim() != 2:
        raise NotExactError("A QR factorisation is defined for one matrix and mode='reduced'.")
    with replay_log.immediate_tests():
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
        q[:, j : j + 1] = elementwise(lambda ctx, v, n: v / n, v, length)
    return q, matmul(q.t(), a).triu()
