"""What torch.amp.GradScaler computes: gradients without the scale, and the next scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reproml.arithmetic.numerics.formats import NARROW, operate, rounding_to
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require


def unscale_(grads: Sequence[Tensor], found_inf: Tensor, inverse: Tensor) -> None:
    """Multiply each gradient by the inverse of the scale, rounded once to the gradient's dtype.

    Writes 1 to found_inf, a float32 number, if a gradient has an infinity or NaN before. Raises
    RuntimeError unless found_inf and the inverse are float32.
    """
    for x in (found_inf, inverse):
        require(x.dtype is torch.float32, f"the scale and found_inf must be float32, not {x.dtype}")
    for g in grads:
        found_inf.copy_(torch.where(g.isfinite().all(), found_inf, 1.0))
        if g.dtype in NARROW:
            with rounding_to(g.dtype):
                g.copy_(operate(torch.mul, g, inverse))
        else:
            g.mul_(inverse)


def update_scale_(
    scale: Tensor, tracker: Tensor, found_inf: Tensor, growth: float, backoff: float, interval: int
) -> Tensor:
    """Multiply the scale by `backoff` after infinities, by `growth` after `interval` steps without any.

    scale, found_inf: float32, with one element; tracker: int32, the steps since the last change. The
    factors are rounded to float32 and each product once. A product that overflows is not taken.
    """
    one = tracker + 1
    found, due = found_inf != 0, one == interval
    grown = scale * float(float32_scalar(growth))
    grown = torch.where(grown.isfinite(), grown, scale)
    scale.copy_(
        torch.where(found, scale * float(float32_scalar(backoff)), torch.where(due, grown, scale))
    )
    tracker.copy_(torch.where(found | due, 0, one))
    return scale
