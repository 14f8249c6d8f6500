"""Compares running sums, to which terms are added part by part, with rational numbers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.distributed.partial_sums import Products, matrix_product, sum_over
from reproml.arithmetic.distributed.rules.normalization import _scaled_sum
from reproml.arithmetic.distributed.running_sums import RunningSum
from reproml.arithmetic.numerics.formats import rounding_to
from reproml.arithmetic.numerics.rounding import nearest
from tests.arithmetic.distributed.test_partial_sums import (
    DTYPES,
    SCALES,
    bits,
    exact_product,
    finite,
)
from tests.arithmetic.strategies import ANY, FINITE, tensors

CPU = torch.device("cpu")
COMPILED = kernels.library
# Exponents far apart, so that a sum needs more than two binary64 numbers.
WIDE = st.tuples(st.sampled_from([-1, 1]), st.integers(1, 2**24 - 1), st.integers(-149, 104)).map(
    lambda x: x[0] * x[1] * 2.0 ** x[2]
)


@st.composite
def matrices(draw, values=FINITE):
    """a [k, m], b [k, n], and where to split their k rows."""
    k, m, n = draw(st.integers(0, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, k), max_size=3)))
    return draw(tensors((k, m), values)), draw(tensors((k, n), values)), [0, *cuts, k]


def running_total(
    parts: Sequence[Products], compiled: Sequence[bool] = (True,)
) -> tuple[torch.Tensor, RunningSum]:
    running = RunningSum(*parts[0].shape, CPU, parts[0].dtype)
    for number, part in enumerate(parts):
        kernels.library = COMPILED if compiled[number % len(compiled)] else None
        try:
            running.add(part)
        finally:
            kernels.library = COMPILED
    return running.total(), running


def split(a: torch.Tensor, b: torch.Tensor, cuts: Sequence[int]) -> list[Products]:
    pairs = zip(cuts, cuts[1:])
    return [matrix_product(a[i:j], b[i:j], len(a)) for i, j in pairs]


COMPILED_OR_NOT = st.sampled_from([(True,), (False,), (True, False), (False, True)])


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(matrices(), matrices(WIDE), matrices(st.integers(-3, 3).map(float))),
    SCALES, DTYPES, COMPILED_OR_NOT,
)  # fmt: skip
def test_sum_of_parts_is_correctly_rounded(case, scale, dtype, compiled):
    """Also where sums are halfway between two numbers, subnormal or too large."""
    a, b, cuts = case
    a, b = finite(a * (1 + 2.0**-7), dtype), finite(b * 2.0**scale, dtype)
    assert bits(running_total(split(a, b, cuts), compiled)[0]) == bits(exact_product(a, b))


@settings(max_examples=60, deadline=None)
@given(matrices(ANY), DTYPES, COMPILED_OR_NOT)
def test_nan_and_infinity_follow_ieee_754(case, dtype, compiled):
    a, b, cuts = case
    a, b = a.to(dtype), b.to(dtype)
    terms = a.double().unsqueeze(2) * b.double().unsqueeze(1)
    are_finite = terms.isfinite().all(0)
    zeroed = [x.nan_to_num(0, 0, 0) for x in (a, b)]
    expected = torch.where(are_finite, exact_product(*zeroed), terms.sum(0).to(dtype))
    found = running_total(split(a, b, cuts), compiled)[0]
    assert found.isnan().equal(expected.isnan())
    kept = ~expected.isnan()
    assert bits(found[kept]) == bits(expected[kept])


@pytest.mark.parametrize("compiled", [True, False])
def test_terms_far_apart_need_more_numbers(compiled):
    """The smallest term decides the rounding of a tie, and cancels in the second column."""
    tiny = 2.0**-140
    a = torch.tensor([[1.0], [2.0**-24], [tiny], [2.0**-100]])
    b = torch.tensor([[1.0, 1.0], [1.0, 1.0], [tiny, tiny], [1.0, 0.0]])
    last = torch.tensor([[-(2.0**-100)]]), torch.tensor([[1.0, 0.0]])
    again = torch.tensor([[-tiny]]), torch.tensor([[0.0, tiny]])
    parts = [matrix_product(*x, 6) for x in ((a, b), last, again)]
    total, running = running_total(parts, [compiled])
    assert total.tolist() == [[1 + 2.0**-23, 1.0]]
    assert 0 in running.rests and bits(total) == bits(exact_product(
        torch.cat([a, last[0], again[0]]), torch.cat([b, last[1], again[1]])
    ))  # fmt: skip


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("dtype", "half", "tiny"),
    [
        (torch.bfloat16, 2.0**-8, 2.0**-18),
        (torch.bfloat16, 2.0**-8, 2.0**-50),
        (torch.float16, 2.0**-11, 2.0**-18),
    ],
)
def test_sums_beside_midpoints_are_rounded_once(dtype, half, tiny, compiled, sign):
    """1 + half + sign tiny^2 is a midpoint of 16 bits in binary32, which must not round it first."""
    a, b = torch.tensor([(1, 1), (half, 1), (sign * tiny, tiny)], dtype=dtype).split(1, 1)
    total, _ = running_total(split(a, b, [0, 1, 3]), [compiled])
    assert total.dtype is dtype and total.item() == 1 + half * (1 + sign)


def test_elements_without_rests_are_stored_in_two_numbers():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 30, generator=generator) for _ in range(2))
    total, running = running_total(split(a, b, [0, 20, 21, 64]))
    assert not running.rests and bits(total) == bits(exact_product(a, b))


@settings(max_examples=40, deadline=None)
@given(tensors((6, 3), FINITE), st.sampled_from([1, 3, 6]), DTYPES)
def test_mean_is_divided_before_it_is_rounded(x, divisor, dtype):
    x = finite(x, dtype)
    parts = [sum_over(rows, (0,), 6, divisor, dtype) for rows in x.split(2)]
    found = running_total(parts)[0]
    with rounding_to(dtype):
        expected = [nearest(sum(map(Fraction, c), Fraction(0)) / divisor) for c in x.t().tolist()]
    assert bits(found) == bits(torch.tensor(expected, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(tensors((4, 2, 6), st.one_of(FINITE, WIDE)), DTYPES)
def test_sums_of_several_factors_are_exact(operands, dtype):
    """Those of a normalization's weight: g (x - mean) rstd."""
    parts = [[t[:, i:j] for t in operands] for i, j in ((0, 1), (1, 4), (4, 4), (4, 6))]
    running = RunningSum(2, 1, CPU, dtype)
    for part in parts:
        running.add(_scaled_sum(part, 6, dtype))
    fractions = [[list(map(Fraction, row)) for row in t.tolist()] for t in operands]
    with rounding_to(dtype):
        expected = [
            nearest(sum(((a * (b - m) * r) for a, b, m, r in zip(*lines)), Fraction(0)))
            for lines in zip(*fractions)
        ]
    assert bits(running.total()) == bits(torch.tensor(expected, dtype=dtype))
