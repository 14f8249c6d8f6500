"""Batch, group and layer normalisation: written expressions of correctly rounded steps.

Of each group of numbers the mean and 1 / sqrt(variance + eps) are rounded once, from the exact mean
and variance; then each output once, from these. Backward likewise: the sums over a group are rounded,
then each element. `rows` are float32 [groups, n]; statistics are float32 [groups, 1].
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.operators.reductions import _variance, sum_over


def statistics(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and 1 / sqrt(variance + eps) of each row, the variance divided by n."""
    n, epsilon = rows.shape[1], Fraction(eps)

    def inverse_deviation(ctx: Any, x: Any) -> Any:
        return 1 / ctx.sqrt(_variance(ctx, x, n, Fraction(0)) + epsilon)

    return sum_over(rows, (1,), keepdim=True, divisor=n), rowwise(inverse_deviation, 1, rows)


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Optional[Tensor], bias: Optional[Tensor]
) -> Tensor:
    """(x - mean) * rstd * weight + bias; all broadcast against x."""
    one, zero = torch.ones((), device=x.device), torch.zeros((), device=x.device)
    w, b = one if weight is None else weight, zero if bias is None else bias
    return elementwise(lambda ctx, x, m, r, w, b: (x - m) * r * w + b, x, mean, rstd, w, b)


def group_backward(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of rows that were normalised with their own statistics.

    rstd * (w g - a / n - (x - mean) * rstd * b / n), with a = sum w g and b = sum w g (x - mean) rstd
    over the row, each rounded once; 0 for rows of one element, which normalise to a constant. g, x
    [groups, n]; weight broadcast to them.
    """
    n = x.shape[1]
    if n == 1:
        return torch.zeros_like(x)
    weight = weight.expand(x.shape)
    a = sum_over(g, (1,), keepdim=True, y=weight)
    b = rowwise(
        lambda ctx, g, w, x, m, r: ctx.sum(w * g * (x - m) * r), 1, g, weight, x, mean, rstd
    )
    return gradient(n, g, weight, x, mean, rstd, a, b)


def gradient(
    n: int, g: Tensor, w: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, a: Tensor, b: Tensor
) -> Tensor:
    """The last step of group_backward."""

    def formula(ctx: Any, g: Any, w: Any, x: Any, m: Any, r: Any, a: Any, b: Any) -> Any:
        return r * (w * g - (a + (x - m) * r * b) / n)

    return elementwise(formula, g, w, x, mean, rstd, a, b)


def scaled_sum(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """sum g (x - mean) rstd over the last axis: the gradient of a weight. [groups, n] -> [groups]."""
    return rowwise(lambda ctx, g, x, m, r: ctx.sum(g * (x - m) * r), 1, g, x, mean, rstd).squeeze(1)
