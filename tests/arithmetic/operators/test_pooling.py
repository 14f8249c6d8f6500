"""Test pooling, embeddings and sums over indices: compiled path and reference path against the oracle and
against each other."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics import formats
from reproml.arithmetic.operators import embedding_bag, indexing, pooling, scatter
from tests.arithmetic.forms import KINDS, agree, numbers, with_threads
from tests.arithmetic.strategies import FINITE, LAYOUTS, lay_out, tensors
from tests.arithmetic.test_operator_table import CASES, TESTS, compare
from verification.oracle import Real, check, reals, rounding_to

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
aten = torch.ops.aten
NAMES = [
    n for n in sorted(CASES) if "pool" in n or "embedding" in n or "scatter" in n or "index_" in n
]


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize("name", NAMES)
@TESTS
@given(data=st.data())
def test_each_path_is_rounded_once(path, name, data):
    with pytest.MonkeyPatch.context() as m:
        if path == "reference":
            m.setattr(kernels, "library", None)
        for case in CASES[name]:
            compare(name, case, data.draw(case.draw))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "window",
    [
        ([2, 2], [2, 2], [0, 0]),
        ([3, 3], [2, 2], [1, 1]),
        ([2, 3], [3, 1], [0, 1]),
        ([2, 3], [2, 3], [0, 1]),
    ],
)
def test_compiled_pooling_matches_reference(kind, window):
    x = lay_out(numbers((2, 3, 10, 9), kind), "transposed")
    out, index = aten.max_pool2d_with_indices(x, *window)
    for i, g in enumerate(
        (numbers(out.shape, kind, 1), torch.zeros(out.shape) * -1.0, numbers(out.shape, "ties"))
    ):
        g = lay_out(g, LAYOUTS[i])
        agree(pooling.max_pool_backward, g, x, *window, [1, 1], False, index)
        agree(pooling.avg_pool2d, x, *window)
        agree(pooling.avg_pool2d, x[0], *window, divisor_override=-3)
        size = aten.avg_pool2d(x, *window).shape
        g = numbers(size, kind, 2 + i)
        for divisor in (None, 5, -4):
            agree(pooling.avg_pool2d_backward, g, x, *window, False, True, divisor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (8, 12), (4, 5)])
def test_compiled_adaptive_pooling_matches_reference(kind, size):
    x = numbers((2, 3, 8, 12), kind)
    agree(pooling.adaptive_avg_pool2d, x, size)
    agree(pooling.adaptive_avg_pool2d_backward, numbers((2, 3, *size), kind, 1), x)
    zeros = torch.full((2, 3, *size), -0.0)
    assert agree(pooling.adaptive_avg_pool2d_backward, zeros, x).is_contiguous()


def test_underflowing_quotients_keep_their_sign():
    g = torch.tensor([-(2.0**-149), 2.0**-149, -3 * 2.0**-149, -0.0]).reshape(1, 4, 1, 1)
    agree(pooling.adaptive_avg_pool2d_backward, g, torch.zeros(1, 4, 3, 3))
    window = ([3, 3], [3, 3], [0, 0], False, True, None)
    agree(pooling.avg_pool2d_backward, g, torch.zeros(1, 4, 3, 3), *window)


def windows(n, count):
    return [range(i * n // count, -(-(i + 1) * n // count)) for i in range(count)]


def adaptive_gradient(g, h, w):
    """The exact sum of gradient / size over the windows that contain an element, [h][w]."""
    rows, columns = windows(h, g.shape[0]), windows(w, g.shape[1])
    total = [[Fraction(0)] * w for _ in range(h)]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            share = Fraction(g[i, j].item()) / (len(row) * len(column))
            for y in row:
                for z in column:
                    total[y][z] += share
    return [[Real(v) for v in line] for line in total]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(10, 10, 3, 3), (7, 5, 2, 4), (3, 4, 5, 7), (9, 1, 4, 1)])
def test_gradient_of_adaptive_pooling_is_correctly_rounded(kind, sizes):
    h, w, *counts = sizes
    g = numbers((3, *counts), kind)
    found = agree(pooling.adaptive_avg_pool2d_backward, g, torch.empty(3, h, w))
    for plane, of_plane in zip(found, g):
        check(plane, adaptive_gradient(of_plane, h, w))


@given(tensors((2, 3), FINITE))
def test_gradient_of_adaptive_pooling_of_any_numbers(g):
    found = pooling.adaptive_avg_pool2d_backward(g.unsqueeze(0), torch.empty(1, 3, 5))
    check(found[0], adaptive_gradient(g, 3, 5))


def test_gradient_of_adaptive_pooling_takes_other_windows_and_numbers():
    backward = pooling.adaptive_avg_pool2d_backward
    g = torch.tensor([[1.0, torch.inf, -torch.inf], [torch.nan, 3e38, 3e38], [0.0, -0.0, 1.0]])
    agree(backward, g[None], torch.empty(1, 4, 7))
    agree(backward, lay_out(g, "transposed")[None], torch.empty(1, 5, 5))
    x = torch.empty(1, 2, 40_001)  # windows of 13,334 and 13,335 numbers need a large denominator
    g = numbers((1, 1, 3), "integers")
    assert pooling._compiled_adaptive_backward(g, x) is None
    assert backward(numbers((0, 1, 2, 3)), torch.empty(0, 1, 3, 5)).shape == (0, 1, 3, 5)
    with_threads(backward, numbers((60, 5, 7), "ties"), torch.empty(60, 13, 17))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 7, 300])
def test_compiled_embedding_backward_matches_reference(kind, width):
    g = numbers((6, 9, width), kind)
    index = torch.randint(0, 7, (6, 9), generator=torch.Generator().manual_seed(0))
    for layout in LAYOUTS:
        for padding in (-1, 3):
            laid = lay_out(g, layout)
            agree(indexing.embedding_backward, laid, index, 8, padding, False)
            agree(indexing.embedding_backward, laid, index.int(), 8, padding, False)


def test_non_finite_gradients_match_reference():
    g = torch.tensor([1.0, float("inf"), float("nan"), -float("inf"), 2.0, 3e38, 3e38]).reshape(
        7, 1
    )
    for index in ([0, 1, 2, 3, 4, 5, 5], [0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 1, 2, 3, 4]):
        agree(indexing.embedding_backward, g, torch.tensor(index), 8, -1, False)
        wide = g.expand(7, 3).contiguous()
        agree(indexing.embedding_backward, wide, torch.tensor(index), 8, -1, False)
        agree(indexing.segment_sum, torch.tensor(index), g.reshape(-1), 8, g.new_full((8,), -0.0))


def test_kernel_rounds_ties_and_near_ties():
    values = torch.tensor(
        [1.0, 2.0**-24, 2.0**-90, 1.0, 2.0**-24, -(2.0**-90), 3.0, -3.0, -0.0, -0.0]
    )
    index = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    groups = [[values[i].item() for i in range(10) if index[i] == row] for row in range(5)]
    expected = [Real(sum(map(Fraction, group), Fraction(0))) for group in groups]
    found = indexing.compiled_segment_sums(1, 5, index, values)
    assert found is not None
    check(found.reshape(5), expected)
    wide = indexing.compiled_segment_sums(1, 5, index, values.unsqueeze(1).expand(10, 2))
    assert wide is not None
    check(wide[0, :, 1], expected)


def test_sums_needing_fractions_use_reference_path():
    values = torch.tensor([2.0**80, 1.0, -(2.0**80), -1.0])
    index = torch.zeros(4, dtype=torch.int64)
    assert indexing.compiled_segment_sums(1, 2, index, values) is None
    agree(indexing.segment_sum, index, values, 2)


def mean(terms: list[Real]) -> Real:
    return Real(sum((t.v for t in terms), Fraction(0)) / max(len(terms), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3])
def test_means_of_bags_need_no_fractions(width, dtype, monkeypatch):
    """Bags of subnormal numbers, of numbers that cancel and of integers whose means are often ties."""
    random = torch.Generator().manual_seed(width)
    whole = torch.randint(-(2**7), 2**7, (12, width), generator=random)
    offsets, index = torch.tensor([0, 2, 2, 6]), torch.arange(12)
    bags = [range(2), range(0), [2, 3, 5], range(6, 12)]
    with formats.rounding_to(dtype), rounding_to(dtype):
        unit = 2.0 ** formats.target().lowest
        for weight in (whole * unit, whole.float(), torch.cat([whole[:6], -whole[:6]]) / 8):
            with monkeypatch.context() as m:
                m.setattr(scatter, "exact_sum", None)
                means, *_ = embedding_bag.embedding_bag(
                    weight, index, offsets, False, 1, padding_idx=4
                )
            x = reals(weight)
            expected = [[mean([x[i, c] for i in bag]) for c in range(width)] for bag in bags]
            check(means.to(dtype), expected)


def test_means_of_bags_are_those_of_the_reference_path():
    weight = torch.tensor([1.0, math.inf, math.nan, -math.inf, 2.0, 3e38, 3e38, 2.0**80, 1.0])
    weight = torch.cat([weight, -weight[-2:]]).unsqueeze(1).expand(11, 2).contiguous()
    offsets = torch.tensor([0, 1, 3, 5, 7])
    for mode in (0, 1):
        agree(embedding_bag.embedding_bag, weight, torch.arange(11), offsets, False, mode)


def test_index_out_of_range_raises_error():
    for width in (1, 3):
        with pytest.raises((IndexError, RuntimeError)):
            indexing.embedding_backward(torch.ones(2, width), torch.tensor([0, 5]), 4, -1, False)


def test_result_is_independent_of_threads():
    x = numbers((8, 9, 30, 31))
    for window in (([2, 2], [2, 2]), ([3, 3], [2, 2])):
        out, index = aten.max_pool2d_with_indices(x, *window)
        g = numbers(out.shape, "ties")
        with_threads(pooling.max_pool_backward, g, x, index)
        with_threads(pooling.avg_pool2d, x, *window)
