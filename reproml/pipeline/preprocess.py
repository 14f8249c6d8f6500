"""Standardise images exactly: sums in integers, then one correctly rounded value for each level.

To add a preprocessing, write a function here from a histogram to a table, enter it in `_TABLES` at the
end of this file, and declare its settings as a class of `Preprocess` in recipe.py.

A pixel has few levels (256 for MNIST), so (v - mean) / std is a table with one entry a level, and
preprocessing is a table look-up. With N pixels in the training set, S the sum of their levels and Q the
sum of the squares, and the population standard deviation,

    (v - mean) / std = (N v - S) / sqrt(N Q - S^2)

The scale of the levels (1/255) cancels. The numerator and the number under the root are integers,
computed exactly, so each entry is rounded once. Integer sums do not depend on their order, so batches,
workers, memory layout and machine cannot change a bit.

torchvision's ToTensor and Normalize round five times in float32: v/255, the mean, the standard
deviation, the difference, the quotient. The error is largest where v is near the mean: there the
subtraction cancels the leading bits and leaves the errors of v/255 and of the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isqrt, ldexp
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline.data import Dataset, Split
from reproml.pipeline.recipe import Preprocess, Standardize

_CHUNK = 512  # images at a time: numpy needs 8 bytes a pixel for the index


class Arrays(NamedTuple):
    """Samples ready for a model: x float32 [n, h, w], y int64 [n]."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Prepared:
    """The preprocessed data set."""

    train: Arrays
    test: Arrays
    classes: int

    @cached_property
    def digest(self) -> str:
        """`reproml.digest` of train.x, train.y, test.x and test.y, computed at the first access."""
        return digest(
            {
                "train.x": self.train.x,
                "train.y": self.train.y,
                "test.x": self.test.x,
                "test.y": self.test.y,
            }
        )


def preprocess(dataset: Dataset, settings: Preprocess) -> Prepared:
    """Preprocess both splits with the recipe's settings and the statistics of the training set.

    Raises ReproError if the training images cannot be standardised (all pixels are equal).
    """
    table = _TABLES[type(settings)](histogram(dataset.train.images, dataset.levels))

    def apply(split: Split) -> Arrays:
        return Arrays(standardize(split.images, table), split.labels)

    return Prepared(apply(dataset.train), apply(dataset.test), dataset.classes)


def histogram(images: NDArray[Any], levels: int) -> NDArray[np.int64]:
    """Return the number of pixels of each level: int64 [levels].

    `images` is an array [n, ...] of any integer dtype and memory layout, with values in
    range(levels). The histograms of parts add up to the histogram of all. Raises ValueError for a value
    out of range.
    """
    _check_range(images, levels)
    counts = np.zeros(levels, np.int64)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.intp).ravel()
        counts += np.bincount(chunk, minlength=levels)
    return counts


def standardization(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the table of correctly rounded (v - mean) / std for each level v: float32 [levels].

    `counts` is the histogram of the training set. Raises ReproError if its variance is zero.
    """
    pixels = [int(count) for count in counts]  # Python's integers do not overflow
    n = sum(pixels)
    s = sum(v * count for v, count in enumerate(pixels))
    q = sum(v * v * count for v, count in enumerate(pixels))
    d = n * q - s * s
    if d == 0:
        raise ReproError(
            f"the training images cannot be standardised: their {n} pixels are all equal"
        )
    return np.array([_quotient(n * v - s, d) for v in range(len(pixels))], np.float32)


def standardize(images: NDArray[Any], table: NDArray[np.float32]) -> NDArray[np.float32]:
    """Look up each pixel in the table: integers of shape [n, ...] to float32 of the same shape.

    Raises ValueError for a value out of range(len(table)).
    """
    _check_range(images, len(table))
    result = np.empty(images.shape, np.float32)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.intp)
        np.take(table, chunk, out=result[start : start + _CHUNK], mode="clip")  # checked above
    return result


def _check_range(images: NDArray[Any], levels: int) -> None:
    if images.dtype.kind not in "iu":
        raise TypeError(f"pixels must be integers, not {images.dtype}")
    if images.size and not 0 <= int(images.min()) <= int(images.max()) < levels:
        raise ValueError(
            f"pixels must be from 0 to {levels - 1}, not from {images.min()} to {images.max()}"
        )


def _quotient(a: int, d: int) -> np.float32:
    """Return a / sqrt(d), d > 0, correctly rounded to binary32 (to nearest, ties to even).

    An integer root gives about 49 leading bits; the last of them is set if the root is inexact (round to
    odd). As these are at least 2 bits more than binary32 has, rounding them to nearest gives the same as
    rounding the exact value (Boldo & Melquiond, 2008).
    """
    shift = 48 + d.bit_length() // 2 - abs(a).bit_length()
    numerator, denominator = a * a << max(2 * shift, 0), d << max(-2 * shift, 0)
    root = isqrt(numerator // denominator)  # floor of 2^shift |a| / sqrt(d), below 2^53
    odd = root | (root * root * denominator != numerator)
    return np.float32(ldexp(-odd if a < 0 else odd, -shift))  # ldexp is exact, the cast rounds


# To add a preprocessing that is another table: a line here, and its class in recipe.Preprocess.
_TABLES = {Standardize: standardization}
