"""Linear systems and determinants with gradients of their own, as exact() writes them.

PyTorch's gradients start from the rounded LU factorization; these are exact solutions again. The functions
are named like PyTorch's operators and take their arguments; they run above autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.operators.small_matrices import is_vector
from reproml.errors import NotExactError


def linalg_solve_ex(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x with a x = b (left), or x a = b, rounded once, and which matrices are singular.

    The gradient of b is h with a^T h = g (h a^T = g), rounded once; that of a is -h x^T (-x^T h).
    """
    x, info = _Solve.apply(a, b, left)
    if check_errors:
        torch.ops.aten._linalg_check_errors(info, "linalg.solve_ex", is_matrix=a.dim() == 2)
    return x, info


class _Solve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, left: bool) -> tuple[Tensor, Tensor]:
        x, _, _, info = torch.ops.aten._linalg_solve_ex(a, b, left=left)
        return x, info

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        a, b, ctx.left = inputs
        x, info = output
        ctx.save_for_backward(a, x)
        ctx.mark_non_differentiable(info)
        ctx.vector, ctx.shape = is_vector(a, b), b.shape

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        a, x = ctx.saved_tensors
        if ctx.vector:
            g, x = g.unsqueeze(-1), x.unsqueeze(-1)
        left = ctx.left or ctx.vector
        h = torch.linalg.solve_ex(a.mT, g, left=left)[0]
        grad_a = None
        if ctx.needs_input_grad[0]:
            product = torch.matmul(h, x.mT) if left else torch.matmul(x.mT, h)
            grad_a = -product.sum_to_size(a.shape)
        h = h.squeeze(-1) if ctx.vector else h
        return grad_a, h.sum_to_size(ctx.shape), None


def linalg_det(a: Tensor) -> Tensor:
    """Return the determinant, rounded once. Its gradient is g times the rounded cofactors."""
    determinant: Tensor = _Det.apply(a)[0]
    return determinant


class _Det(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor]:
        value, cofactors, _ = torch.ops.aten._linalg_det(a)
        return value, cofactors

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Any, of_cofactors: Any) -> Any:
        if of_cofactors is not None:
            raise NotExactError(
                "The second derivative of a determinant has no exact definition; use slogdet, whose "
                "gradient is an inverse that can be differentiated again."
            )
        (cofactors,) = ctx.saved_tensors
        return None if g is None else g[..., None, None] * cofactors


def linalg_slogdet(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sign of the determinant and log |det|, rounded once.

    The gradient is g times the rounded inverse, transposed; NaN if the matrix is singular.
    """
    sign, log = _Slogdet.apply(a)
    return sign, log


class _Slogdet(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor]:
        sign, log, _, _ = torch.ops.aten._linalg_slogdet(a)
        return sign, log

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(ctx: Any, _: Any, g: Tensor) -> Any:
        (a,) = ctx.saved_tensors
        return g[..., None, None] * torch.linalg.inv_ex(a)[0].mT
