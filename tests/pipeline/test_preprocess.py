"""Standardisation: correctly rounded, and independent of the layout and the split of the pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline import data, preprocess, recipe

DTYPES = ["u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u2"]
CHUNK = preprocess._CHUNK

images = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 5), st.integers(1, 5))
).filter(lambda array: array.min() != array.max())
counts = hnp.arrays(np.int64, st.integers(2, 40), elements=st.integers(0, 10**9)).filter(
    lambda array: np.count_nonzero(array) > 1
)


def standardized(array: np.ndarray, levels: int = 256) -> np.ndarray:
    """Run the pipeline on one array: histogram, table, look-up."""
    table = preprocess.standardization(preprocess.histogram(array, levels))
    return preprocess.standardize(array, table)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- correct rounding, against two oracles that share nothing with the code -----------------------


def compare(q: Fraction, a: int, d: int) -> int:
    """Return the sign of q - a / sqrt(d), exactly."""
    left, right = q * abs(q) * d, Fraction(a * abs(a))  # x |x| is increasing
    return (left > right) - (left < right)


def is_correctly_rounded(f: np.float32, a: int, d: int) -> bool:
    """Return whether f is the binary32 number nearest to a / sqrt(d), ties to even."""
    below, above = (np.nextafter(f, np.float32(to)) for to in (-np.inf, np.inf))
    low = compare((Fraction(float(below)) + Fraction(float(f))) / 2, a, d)
    high = compare((Fraction(float(f)) + Fraction(float(above))) / 2, a, d)
    even = not f.view(np.uint32) & 1
    return low < 0 < high or (even and 0 in (low, high))


def numerators(pixels: np.ndarray) -> tuple[list[int], int]:
    """Return N v - S for each level v, and N Q - S^2, term by term from the definition."""
    n, s, q = (sum(int(c) * v**power for v, c in enumerate(pixels)) for power in (0, 1, 2))
    return [n * v - s for v in range(len(pixels))], n * q - s * s


@given(counts)
def test_every_entry_is_correctly_rounded(pixels: np.ndarray) -> None:
    table = preprocess.standardization(pixels)
    tops, d = numerators(pixels)
    assert table.dtype == np.float32 and table.shape == pixels.shape
    assert all(is_correctly_rounded(f, a, d) for f, a in zip(table, tops))


@given(a=st.integers(-(10**24), 10**24), d=st.integers(1, 10**30))
def test_quotient_against_fractions(a: int, d: int) -> None:
    assert is_correctly_rounded(preprocess._quotient(a, d), a, d)


@given(a=st.integers(-(10**12), 10**12), d=st.integers(1, 10**24))
def test_quotient_against_mpmath(a: int, d: int) -> None:
    with mpmath.workprec(400):
        exact = mpmath.mpf(a) / mpmath.sqrt(d)
        with mpmath.workprec(24):
            expected = float(+exact)  # mpmath rounds to nearest even
    assert preprocess._quotient(a, d) == np.float32(expected)


@given(m=st.integers(2**23, 2**24 - 1), root=st.sampled_from([1, 2, 2**20]), up=st.integers(-1, 1))
def test_quotient_at_ties(m: int, root: int, up: int) -> None:
    a = (2 * m + 1) * root * 2**40 + up  # halfway between two neighbours, and just beside it
    f = preprocess._quotient(a, (root * 2**40) ** 2)
    below, above = 2 * m, 2 * m + 2
    expected = (below if m % 2 == 0 else above) if up == 0 else (below if up < 0 else above)
    assert int(f) == expected
    assert preprocess._quotient(-a, (root * 2**40) ** 2) == -f


def test_level_at_mean_is_positive_zero() -> None:
    table = preprocess.standardization(np.array([1, 0, 1]))
    assert table.tolist() == [-1.0, 0.0, 1.0] and not np.signbit(table[1])


def test_oracle_rejects_neighbours() -> None:
    f = preprocess._quotient(1, 3)
    assert is_correctly_rounded(f, 1, 3)
    for to in (-np.inf, np.inf):
        assert not is_correctly_rounded(np.nextafter(f, np.float32(to)), 1, 3)


@given(images)
def test_result_is_close_to_float_standardization(array: np.ndarray) -> None:
    result = standardized(array)
    v = array.astype(np.int64)
    variance = Fraction(int((v * v).sum()), v.size) - Fraction(int(v.sum()), v.size) ** 2
    root = Fraction(isqrt(int(variance * 4**60)), 2**60)
    expected = (v - float(v.mean())) / float(root)
    assert np.allclose(result, expected, rtol=1e-6, atol=1e-6)


# --- only the values of the pixels matter --------------------------------------------------------


@given(images, st.randoms(use_true_random=False))
def test_order_of_images_does_not_matter(array: np.ndarray, random: Any) -> None:
    order = list(range(len(array)))
    random.shuffle(order)
    assert same_bits(standardized(array[order]), standardized(array)[order])


@given(images, st.lists(st.integers(0, 20), max_size=6))
def test_batches_do_not_matter(array: np.ndarray, cuts: list[int]) -> None:
    parts = np.split(array, sorted(min(cut, len(array)) for cut in cuts))
    pixels = sum((preprocess.histogram(part, 256) for part in parts), np.zeros(256, np.int64))
    table = preprocess.standardization(pixels)
    results = [preprocess.standardize(part, table) for part in parts]
    assert same_bits(np.concatenate(results), standardized(array))


@given(images, st.sampled_from([1, 2, 3, 7, 1000]))
def test_chunk_size_does_not_matter(array: np.ndarray, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "_CHUNK", chunk)
        result = standardized(array)
    assert same_bits(result, standardized(array))


@pytest.mark.parametrize("n", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_chunk_boundaries_are_correct(n: int) -> None:
    array = np.random.default_rng(n).integers(0, 256, (n, 2, 3), dtype=np.uint8)
    table = preprocess.standardization(np.bincount(array.ravel(), minlength=256))
    assert same_bits(standardized(array), table[array])


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_number_of_workers_does_not_matter(workers: int) -> None:
    array = np.random.default_rng(1).integers(0, 256, (500, 4, 4), dtype=np.uint8)
    parts = np.array_split(array, 13)
    with ThreadPoolExecutor(workers) as pool:
        pixels = sum(pool.map(lambda part: preprocess.histogram(part, 256), parts))
        table = preprocess.standardization(np.asarray(pixels))
        results = list(pool.map(lambda part: preprocess.standardize(part, table), parts))
    assert same_bits(np.concatenate(results), standardized(array))


@pytest.mark.parametrize("threads", ["1", "7"])
def test_thread_count_does_not_matter(threads: str) -> None:
    script = """
import numpy as np
from reproml.pipeline import preprocess
array = np.arange(5 * 4096, dtype=np.int64).reshape(5, 64, 64) ** 2 % 251
table = preprocess.standardization(preprocess.histogram(array, 256))
print(preprocess.digest({"x": preprocess.standardize(array, table)}))
"""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **dict.fromkeys(names, threads)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    array = np.arange(5 * 4096, dtype=np.int64).reshape(5, 64, 64) ** 2 % 251
    assert printed.strip() == digest({"x": standardized(array)})


@given(images)
def test_memory_layout_does_not_matter(array: np.ndarray) -> None:
    expected = standardized(array)
    wide = np.zeros((2 * len(array), *array.shape[1:]), np.uint8)
    wide[::2] = array
    unaligned = np.frombuffer(b"\0" + array.tobytes(), np.uint8, offset=1).reshape(array.shape)
    for same in [
        np.asfortranarray(array),
        wide[::2],
        array[::-1][::-1],
        np.ascontiguousarray(array.transpose(2, 1, 0)).transpose(2, 1, 0),
        unaligned,  # and read-only
    ]:
        result = standardized(same)
        assert np.array_equal(same, array) and same_bits(result, expected)
        assert result.flags.c_contiguous


@given(images, st.sampled_from(DTYPES))
def test_integer_dtype_does_not_matter(array: np.ndarray, dtype: str) -> None:
    assert same_bits(standardized(array.astype(dtype)), standardized(array))


@given(images)
def test_signed_bytes_equal_unsigned(array: np.ndarray) -> None:
    half = array // 2
    assume(half.min() != half.max())
    assert same_bits(standardized(half.astype(np.int8)), standardized(half))


@given(images)
def test_sample_shape_does_not_matter(array: np.ndarray) -> None:
    flat = array.reshape(len(array), -1)
    assert same_bits(standardized(flat).reshape(array.shape), standardized(array))


@given(counts, st.integers(2, 30))
def test_scale_of_levels_cancels(pixels: np.ndarray, scale: int) -> None:
    """A multiple of v, such as v/255, has the same standardised value: 1/255 is not rounded."""
    scaled = np.zeros(len(pixels) * scale, np.int64)
    scaled[::scale] = pixels
    table = preprocess.standardization(pixels)
    assert same_bits(preprocess.standardization(scaled)[::scale], table)


# --- what cannot be standardised ------------------------------------------------------------------


@pytest.mark.parametrize("shape, value", [((3, 2, 2), 0), ((3, 2, 2), 7), ((1, 1, 1), 255)])
def test_constant_images_raise(shape: tuple[int, ...], value: int) -> None:
    with pytest.raises(ReproError, match="cannot be standardised.*all equal"):
        standardized(np.full(shape, value, np.uint8))


def test_empty_images_raise() -> None:
    with pytest.raises(ReproError, match="cannot be standardised"):
        standardized(np.zeros((0, 28, 28), np.uint8))
    table = np.arange(256, dtype=np.float32)
    assert preprocess.standardize(np.zeros((0, 28, 28), np.uint8), table).shape == (0, 28, 28)


@pytest.mark.parametrize("value", [-1, 17, 2**40])
def test_pixels_out_of_range_raise(value: int) -> None:
    array = np.array([[0, 16, value]])
    with pytest.raises(ValueError, match="from 0 to 16"):
        preprocess.histogram(array, 17)
    with pytest.raises(ValueError, match="from 0 to 16"):
        preprocess.standardize(array, np.zeros(17, np.float32))


def test_large_unsigned_pixels_raise() -> None:
    with pytest.raises(ValueError, match="from 0 to 16"):
        preprocess.histogram(np.array([[2**64 - 1]], np.uint64), 17)


def test_float_pixels_raise() -> None:
    with pytest.raises(TypeError, match="must be integers, not float32"):
        preprocess.histogram(np.zeros((1, 2), np.float32), 17)


# --- complete data sets ------------------------------------------------------------------------------


def check_prepared(dataset: data.Dataset) -> preprocess.Prepared:
    prepared = preprocess.preprocess(dataset, recipe.Standardize())
    table = preprocess.standardization(preprocess.histogram(dataset.train.images, dataset.levels))
    for (x, y), split in [(prepared.train, dataset.train), (prepared.test, dataset.test)]:
        assert same_bits(x, table[split.images])
        assert y.dtype == np.int64 and np.array_equal(y, split.labels)
    assert prepared.classes == dataset.classes
    return prepared


def test_digits_have_known_sums() -> None:
    prepared = check_prepared(data.load_dataset("digits"))
    # 1500 * 64 pixels, sum 468,645, sum of squares 5,744,313.
    tops, d = numerators(preprocess.histogram(data.load_dataset("digits").train.images, 17))
    assert tops[0] == -468_645 and d == 96_000 * 5_744_313 - 468_645**2
    assert prepared.digest == digest(
        {
            "train.x": prepared.train.x,
            "train.y": prepared.train.y,
            "test.x": prepared.test.x,
            "test.y": prepared.test.y,
        }
    )


def test_digest_covers_every_array() -> None:
    prepared = preprocess.preprocess(data.load_dataset("digits"), recipe.Standardize())
    seen = {prepared.digest}
    for arrays in (prepared.train, prepared.test):
        for array in arrays:
            changed = preprocess.Prepared(prepared.train, prepared.test, prepared.classes)
            array.flat[5] += 1
            seen.add(changed.digest)
            array.flat[5] -= 1
    assert len(seen) == 5


def test_mnist_has_known_sums(mnist_mirror: Path) -> None:
    dataset = data.load_dataset("mnist", mnist_mirror)
    check_prepared(dataset)
    tops, d = numerators(preprocess.histogram(dataset.train.images, 256))
    assert tops[0] == -1_567_298_545  # mean 33.318 of 255: the well-known 0.1307
    assert d == 47_040_000 * 342_590_800_147 - 1_567_298_545**2


def test_digits_against_torchvision() -> None:
    check_against_torchvision(
        data.load_dataset("digits"), differing=11, worst_ulps=20, worst_level=5
    )


def test_mnist_against_torchvision(mnist_mirror: Path) -> None:
    dataset = data.load_dataset("mnist", mnist_mirror)
    check_against_torchvision(dataset, differing=195, worst_ulps=64, worst_level=33)


def check_against_torchvision(
    dataset: data.Dataset, differing: int, worst_ulps: int, worst_level: int
) -> None:
    """Check that our values are within 1/2 ulp of the exact ones, and torchvision's within their bound.

    ToTensor and Normalize round five times in float32, even if mean and standard deviation are given
    with full precision: v/255, mean, std, the difference, the quotient. Near the mean (33.3 of 255 for
    MNIST, 4.9 for the digits) the difference cancels, and the rounding errors of v/255 and of the mean
    are tens of ulps of the result. The distance is always within the bound of those five roundings.
    """
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = preprocess.histogram(dataset.train.images, dataset.levels)
    ours = preprocess.standardization(pixels)
    tops, d = numerators(pixels)
    n = int(pixels.sum())
    u = mpmath.mpf(2) ** -24  # unit roundoff of binary32
    with mpmath.workprec(200):
        exact = [a / mpmath.sqrt(d) for a in tops]
        mean = mpmath.mpf(-tops[0]) / n / 255
        std = mpmath.sqrt(d) / n / 255
        levels = np.arange(dataset.levels, dtype=np.uint8).reshape(1, -1, 1)
        pipeline = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((float(mean),), (float(std),))]
        )
        theirs = pipeline(levels).numpy().ravel()

        ulps = [mpmath.mpf(float(np.spacing(abs(f)))) for f in ours]
        our_errors = [abs(float(f) - x) / ulp for f, x, ulp in zip(ours, exact, ulps)]
        their_errors = [abs(float(f) - x) / ulp for f, x, ulp in zip(theirs, exact, ulps)]
        assert max(our_errors) <= 0.5
        assert all(o <= t for o, t in zip(our_errors, their_errors))
        assert np.count_nonzero(ours != theirs) == differing
        assert worst_ulps - 1 < max(their_errors) < worst_ulps
        assert their_errors.index(max(their_errors)) == worst_level

        for v, (f, x) in enumerate(zip(theirs, exact)):
            inputs = u * (mpmath.mpf(v) / 255 + mean) / std  # v/255 and the mean, amplified
            last = 3 * u * abs(x)  # std, difference, quotient
            assert abs(float(f) - x) <= (inputs + last) * (1 + 8 * u)
