"""Sums over any axes: the compiled loops (csrc/reductions.c) and the plain path give the same bits."""

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
def test_both_forms_agree(shape, kind):
    x = numbers(shape, kind)
    y = numbers(tuple(x.shape), "normal", 1)
    subsets = [c for r in range(1, x.dim() + 1) for c in combinations(range(x.dim()), r)]
    for i, dims in enumerate(subsets):
        v = lay_out(x, LAYOUTS[i % len(LAYOUTS)])
        for options in ({}, {"keepdim": True, "divisor": 3}, {"y": y}):
            agree(reductions.sum_over, v, dims, **options)


def test_channels_last():
    x = numbers((4, 6, 9, 9), "normal").to(memory_format=torch.channels_last)
    assert same_bits(
        reductions.sum_over(x, (0, 2, 3)), reductions.sum_over(x.contiguous(), (0, 2, 3))
    )


@pytest.mark.parametrize(
    "shape, dims", [((400_000,), (0,)), ((3, 64, 40, 40), (0, 2, 3)), ((5000, 40), (0,))]
)
def test_threads_do_not_matter(shape, dims):
    x = numbers(shape, "ties")
    with_threads(reductions.sum_over, x, dims)
    agree(reductions.sum_over, x, dims)


@settings(max_examples=100)
@given(tensors((5, 4), ANY), st.sampled_from([1, 3, 7, -2]))
def test_any_numbers(x, divisor):
    for dims in ((0,), (1,), ()):
        agree(reductions.sum_over, x, dims, divisor=divisor)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_what_is_not_finite(n):
    x = numbers((3 * n, n))
    for i, value in enumerate((float("inf"), float("nan"), -float("inf"))):
        x[i::3, i % n] = value
        x[i, (i + 1) % n] = float("inf")
    for dims in ((0,), (1,), (0, 1)):
        agree(reductions.sum_over, x, dims)
        agree(reductions.sum_over, x.t(), dims, divisor=3)


def total(rows, divisor=1):
    return [Real(sum(map(Fraction, r), Fraction(0)) / divisor) for r in rows.tolist()]


@pytest.mark.parametrize("divisor", [1, 2, 3, 12])
def test_failures_are_settled_in_the_loop(divisor):
    """Ties, sums just beside one, and zeros: Ziv's test fails, and fractions are not needed."""
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


def test_what_the_loop_cannot_settle_goes_to_the_plain_path():
    x = torch.tensor([[2.0**80, 1.0, -(2.0**80), -1.0], [1.0, 2.0, 3.0, 4.0]])
    assert reductions._compiled_sum(x, (1,), False, 1, None) is None
    check(reductions.sum_over(x, (1,)), total(x))


def test_errors_are_pytorchs_own():
    for dims in ((2,), (-3,), (0, 0)):
        with pytest.raises((IndexError, RuntimeError)):
            reductions.sum_over(torch.ones(2, 3), dims)
