"""Measure the distance of tensors in units in the last place, counted in floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from reproml.digest import canonical_array
from reproml.errors import ReproError

_WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Distance:
    """The distance of two tensors of the same shape and dtype."""

    ulps: Optional[int]  # the largest distance of two elements; None for integers
    elements: int  # how many differ
    of: int  # of how many


def distance(a: Tensor, b: Tensor) -> Optional[Distance]:
    """Return the distance of two tensors, or None if their shapes or dtypes differ.

    The elements of complex tensors are their real and imaginary parts. Raises ReproError for a dtype that
    has no digest.

    The floating-point numbers of a format are numbered in their order, with -0 just below +0; the distance
    of two is the difference of their numbers. The numbers of infinity and NaN follow those of finite
    values.
    """
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return None
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    x, y = (_bits(t) for t in (a, b))
    elements = int((x != y).sum())
    if not a.is_floating_point():
        return Distance(None, elements, x.size)
    x, y = _order(x), _order(y)
    differences = np.where(x > y, x - y, y - x)
    return Distance(int(differences.max(initial=0)), elements, x.size)


def largest_difference(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> Optional[tuple[str, Optional[Distance]]]:
    """Return the name and the distance of the tensor that differs most, or None if all are equal.

    A tensor that only one side has, or whose shape differs, is returned first, with None.
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
    """Return the bits of the elements, with one canonical NaN, as in a digest."""
    try:
        array = canonical_array(x)
    except TypeError:
        raise ReproError(f"tensors of {x.dtype} cannot be compared; convert them") from None
    return array.view(_WIDTHS[array.itemsize])


def _order(bits: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Number the floating-point numbers in their order, as unsigned integers."""
    sign = np.array(1 << (8 * bits.itemsize - 1), bits.dtype)
    return np.where(bits & sign, ~bits, bits | sign)
