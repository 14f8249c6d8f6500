"""Test that sums over any axes have the same bits by csrc/reductions.c and on the reference path."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators import reductions
from tests.arithmetic.forms import KINDS, agree, numbers, with_threads
from tests.arithmetic.strategies import ANY, LAYOUTS, lay_out, tensors
from verification.oracle import Real, check, same_bits

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

SHAPES = [
    (1,), (7,), (100_000,), (64, 128), (300, 17), (20_000, 2), (3, 1), (3, 5, 7), (16, 8, 5, 5),
    (2, 3, 2, 5, 3), (9, 1, 40), (0, 5), (5, 0),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_path_matches_reference(shape, kind):
    x = numbers(shape, kind)
    y = numbers(tuple(x.shape), "normal", 1)
    subsets = [c for r in range(1, x.dim() + 1) for c in combinations(range(x.dim()), r)]
    for i, dims in enumerate(subsets):
        v = lay_out(x, LAYOUTS[i % len(LAYOUTS)])
        for options in ({}, {"keepdim": True, "divisor": 3}, {"y": y}):
            agree(reductions.reduce_sum, v, dims, **options)


def test_sum_is_independent_of_memory_layout():
    x = numbers((4, 6, 9, 9), "normal").to(memory_format=torch.channels_last)
    assert same_bits(
        reductions.reduce_sum(x, (0, 2, 3)), reductions.reduce_sum(x.contiguous(), (0, 2, 3))
    )


@pytest.mark.parametrize(
    "shape, dims", [((400_000,), (0,)), ((3, 64, 40, 40), (0, 2, 3)), ((5000, 40), (0,))]
)
def test_sum_is_independent_of_threads(shape, dims):
    x = numbers(shape, "ties")
    with_threads(reductions.reduce_sum, x, dims)
    agree(reductions.reduce_sum, x, dims)


@settings(max_examples=100)
@given(tensors((5, 4), ANY), st.sampled_from([1, 3, 7, -2]))
def test_arbitrary_numbers_match_reference(x, divisor):
    for dims in ((0,), (1,), ()):
        agree(reductions.reduce_sum, x, dims, divisor=divisor)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_non_finite_numbers_match_reference(n):
    x = numbers((3 * n, n))
    for i, value in enumerate((float("inf"), float("nan"), -float("inf"))):
        x[i::3, i % n] = value
        x[i, (i + 1) % n] = float("inf")
    for dims in ((0,), (1,), (0, 1)):
        agree(reductions.reduce_sum, x, dims)
        agree(reductions.reduce_sum, x.t(), dims, divisor=3)


def total(rows, divisor=1):
    return [Real(sum(map(Fraction, r), Fraction(0)) / divisor) for r in rows.tolist()]


@pytest.mark.parametrize("divisor", [1, 2, 3, 12])
def test_kernel_rounds_ties_and_near_ties(divisor):
    """Ties, sums next to a tie, and zeros fail the first rounding test but do not need fractions."""
    half = 2.0**-24
    rows = torch.tensor([
        [1.0, half, 0.0], [1.0, -half / 2, 0.0], [1 + 2 * half, half, 0.0], [1.0, half, 2.0**-90],
        [1.0, half, -(2.0**-90)], [3.0, -1.0, -2.0], [-0.0, -0.0, -0.0], [2.0**-149, 0.0, 0.0],
        [2.0**-149, 2.0**-149, 2.0**-149], [3.4028234663852886e38, 2.0**102, 2.0**102],
    ])  # fmt: skip
    for x in (rows, rows.t().contiguous().t(), rows.repeat(1, 20)):
        found = reductions._compiled_sum(x, (1,), False, divisor, None)
        assert found is not None
        check(found, total(x, divisor))


def test_sums_needing_fractions_use_reference_path():
    x = torch.tensor([[2.0**80, 1.0, -(2.0**80), -1.0], [1.0, 2.0, 3.0, 4.0]])
    assert reductions._compiled_sum(x, (1,), False, 1, None) is None
    check(reductions.reduce_sum(x, (1,)), total(x))


def test_invalid_axes_raise_pytorch_error():
    for dims in ((2,), (-3,), (0, 0)):
        with pytest.raises((IndexError, RuntimeError)):
            reductions.reduce_sum(torch.ones(2, 3), dims)
