"""The rounded steps of batch, group and layer normalization: the reference path.

The mean and rstd = 1 / sqrt(variance + eps) of each group of numbers are rounded once, from the exact
mean and variance; then each output element is rounded once, from these. Backward likewise: the sums over
a group are rounded, then each element. Statistics and sums are float32 also where the elements have 16
bits. `rows` are float32 [groups, n]; mean and rstd are float32 [groups,
1].

normalization.py applies these steps to entire tensors; normalization_compiled.py only to single elements
that a kernel could not round.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.numerics.formats import storing
from reproml.arithmetic.operators.reductions import reduce_sum, variance_formula


def mean_and_rstd(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / sqrt(variance + eps) of each row, where the variance is divided by n."""
    n, epsilon = rows.shape[1], Fraction(eps)

    def rstd(ctx: Any, x: Any) -> Any:
        return 1 / ctx.sqrt(variance_formula(ctx, x, n, Fraction(0)) + epsilon)

    with storing():
        return reduce_sum(rows, (1,), keepdim=True, divisor=n), rowwise(rstd, 1, rows)


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Optional[Tensor], bias: Optional[Tensor]
) -> Tensor:
    """Return (x - mean) * rstd * weight + bias, rounded once; all operands broadcast to x."""
    one, zero = x.new_ones(()), x.new_zeros(())
    w, b = one if weight is None else weight, zero if bias is None else bias
    return elementwise(lambda ctx, x, m, r, w, b: (x - m) * r * w + b, x, mean, rstd, w, b)


def rows_backward(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of rows that were normalized with their own statistics, float32 [groups, n].

    rstd * (w g - a / n - (x - mean) * rstd * b / n), where a = sum w g and b = sum w g (x - mean) rstd
    over the row are rounded once; 0 for rows of one element, which are normalized to a constant. g, x:
    [groups, n]; weight: broadcast to them.
    """
    n = x.shape[1]
    if n == 1:
        return torch.zeros_like(x)
    weight = weight.expand(x.shape)
    with storing():
        a = reduce_sum(g, (1,), keepdim=True, y=weight)
        b = rowwise(
            lambda ctx, g, w, x, m, r: ctx.sum(w * g * (x - m) * r), 1, g, weight, x, mean, rstd
        )
    return element_backward(n, g, weight, x, mean, rstd, a, b)


def element_backward(
    n: int, g: Tensor, w: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """Return the last step of rows_backward, for elements with the sums a and b of their row."""

    def formula(ctx: Any, g: Any, w: Any, x: Any, m: Any, r: Any, a: Any, b: Any) -> Any:
        return r * (w * g - (a + (x - m) * r * b) / n)

    return elementwise(formula, g, w, x, mean, rstd, a, b)


def weight_gradient(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient of each row's weight, sum g (x - mean) rstd; [groups, n] -> [groups]."""
    return rowwise(lambda ctx, g, x, m, r: ctx.sum(g * (x - m) * r), 1, g, x, mean, rstd).squeeze(1)
