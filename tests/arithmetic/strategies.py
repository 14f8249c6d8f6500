"""Tensors that are hard to round: ties, near-ties, cancellation, subnormals, overflow, specials."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

SPECIAL = [
    0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 0.1, -0.1, 1.5, 16777216.0, 16777215.0, 1 + 2**-23, 1 - 2**-24,
    2.0**-149, -(2.0**-149), 2.0**-126, 2.0**-126 - 2.0**-149, 3.4028234663852886e38,
    -3.4028234663852886e38, 2.0**127, 2.0**64, 2.0**-75, -(2.0**-24), 20.5, -20.5, 88.72284, 88.7229,
    -103.97, -104.5, -87.4, 1e-3, 700.0, -800.0, 3e38, 1e-40, 100.0, -17.3, 3.0, -3.5, 6.5,
]  # fmt: skip
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]

_tie_parts = st.tuples(
    st.integers(-(2**24), 2**24),
    st.sampled_from([-149, -140, -80, -48, -25, -24, -23, -1, 0, 1, 30, 100]),
).map(lambda t: float(np.float32(t[0] * 2.0 ** t[1])))
_powers = st.tuples(st.sampled_from([1.0, -1.0]), st.integers(-149, 127)).map(
    lambda t: t[0] * 2.0 ** t[1]
)
FINITE = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(-5, 5).map(float),
    st.integers(-80, 80).map(lambda n: 1 + n * 2.0**-23),
    _tie_parts,
    _powers,
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-8, 8, width=32),
)
ANY = st.one_of(FINITE, FINITE, FINITE, st.sampled_from(NOT_FINITE))
SMALL_INTEGERS = st.integers(-3, 3).map(float)
MODERATE = st.one_of(st.floats(-30, 30, width=32), SMALL_INTEGERS)  # typical weights and gradients
POSITIVE = FINITE.map(abs)

LAYOUTS = ["plain", "transposed", "strided", "offset"]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the same numbers in another memory layout."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.full((1,), 7, dtype=x.dtype), x.reshape(-1)])[1:].reshape(x.shape)
    return x


UNIT = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 1.0, 0.5, 2.0**-149, 1 - 2**-24]))


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], values: Any = ANY) -> torch.Tensor:
    """float32 of this shape. Half of them contain small integers only, so that sums cancel."""
    n = int(np.prod(shape))
    family = draw(
        st.one_of(st.just(values), st.sampled_from([values, values, values, SMALL_INTEGERS]))
    )
    if family is SMALL_INTEGERS and values is POSITIVE:
        family = SMALL_INTEGERS.map(abs)
    if family is SMALL_INTEGERS and values is UNIT:
        family = st.sampled_from([0.0, 1.0])
    numbers = draw(st.lists(family, min_size=n, max_size=n))
    x = torch.tensor(numbers, dtype=torch.float32).reshape(shape)
    return lay_out(x, draw(st.sampled_from(LAYOUTS)))


SHAPES = [(), (0,), (1,), (6,), (2, 3), (3, 0), (2, 1, 3)]


@st.composite
def broadcast(draw: Any, n: int, values: Any = ANY) -> tuple[torch.Tensor, ...]:
    """Tuples of n tensors that broadcast together."""
    shape = draw(st.sampled_from(SHAPES))
    kinds = [values] * n if not isinstance(values, (list, tuple)) else values
    result = []
    for i, kind in enumerate(kinds):
        own = shape
        if i:
            own = tuple(1 if m and draw(st.integers(0, 3)) == 0 else m for m in shape)
            own = own[draw(st.sampled_from([0, 0, 0, len(own)])) :]
        result.append(draw(tensors(own, kind)))
    return tuple(result)


def grid(n: int, values: Any = None) -> tuple[torch.Tensor, ...]:
    """Return all combinations of n special values, as n tensors that broadcast."""
    numbers = values if values is not None else SPECIAL + NOT_FINITE
    if n > 1:
        numbers = numbers[:: max(1, len(numbers) // {2: 22, 3: 8}.get(n, 5))] + [-0.0]
    line = torch.tensor(numbers, dtype=torch.float32)
    return tuple(line.reshape([-1 if i == j else 1 for j in range(n)]) for i in range(n))
