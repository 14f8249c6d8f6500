"""How far apart tensors are, in units in the last place: by how many floating-point numbers, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np
from torch import Tensor

from reproml.digest import canonical_array

_WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Distance:
    """Of two tensors of one shape and dtype."""

    ulps: Optional[int]  # the largest distance of two elements; None if they are no floats
    elements: int  # how many differ
    of: int  # of how many


def distance(a: Tensor, b: Tensor) -> Optional[Distance]:
    """Return how far apart two real tensors are, None if they have other shapes or dtypes.

    The floats of each format are numbered in their order, -0 just below +0; the distance of two is the
    difference of their numbers. Infinity and NaN have the numbers that follow those of the finite ones.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.is_complex():
        return None
    x, y = (_bits(t) for t in (a, b))
    elements = int((x != y).sum())
    if not a.is_floating_point():
        return Distance(None, elements, x.size)
    x, y = _order(x), _order(y)
    apart = np.where(x > y, x - y, y - x)
    return Distance(int(apart.max(initial=0)), elements, x.size)


def first_apart(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> Optional[tuple[str, Optional[Distance]]]:
    """Return the name and the distance of the tensor that is furthest apart, None if all are equal.

    A tensor that only one of the two has, or of another shape, comes first, with None.
    """
    if a.keys() != b.keys():
        return min(a.keys() ^ b.keys()), None
    found = {name: distance(a[name], b[name]) for name in a}
    odd = [name for name, d in found.items() if d is None]
    if odd:
        return odd[0], None
    name = max(found, key=lambda n: (found[n].elements > 0, found[n].ulps or 0), default=None)  # type: ignore[union-attr]
    return (name, found[name]) if name is not None and found[name].elements else None  # type: ignore[union-attr]


def _bits(x: Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """One NaN for all, as in a digest."""
    array = canonical_array(x)
    return array.view(_WIDTHS[array.itemsize])


def _order(bits: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Number the floats in their order, as unsigned integers."""
    sign = np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    return np.where(bits & sign, ~bits, bits | sign)
