"""The gradient of nearest-neighbor upsampling; upsampling itself only copies numbers."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

from reproml.arithmetic.operators.arguments import require_shape
from reproml.arithmetic.operators.reductions import reduce_sum
from reproml.errors import NotExactError


def upsample_nearest2d_backward(
    g: Tensor,
    output_size: Any,
    input_size: Any,
    scales_h: Optional[float] = None,
    scales_w: Optional[float] = None,
) -> Tensor:
    """Return the sum of the gradients of the copies of each element, rounded once.

    g: float32 [n, c, *output_size]; input_size: [n, c, h, w]. Returns float32 of shape input_size. Raises
    NotExactError unless the output's height and width are multiples of the input's.
    """
    n, c, h, w = input_size
    require_shape("the gradient", g, (n, c, *output_size))
    if g.shape[2] % h or g.shape[3] % w:
        raise NotExactError(
            f"Upsampling from {[h, w]} to {list(g.shape[2:])} has no exact gradient; use an integer factor."
        )
    return reduce_sum(g.reshape(n, c, h, g.shape[2] // h, w, g.shape[3] // w), (3, 5))
