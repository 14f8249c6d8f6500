"""Compares the exchange of unrounded sums with rational numbers, for one to four workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.distributed import partial_sums
from reproml.arithmetic.distributed.partial_sums import (
    Exchange,
    Partial,
    all_reduce,
    finish,
    matrix_product,
    sum_over,
)
from reproml.arithmetic.numerics.formats import NARROW, rounding_to
from reproml.arithmetic.numerics.rounding import nearest
from tests.arithmetic.distributed.together import Thread, together
from tests.arithmetic.strategies import ANY, FINITE, tensors

COMPILED = kernels.library
SIZES = st.integers(1, 4)
ROWS = st.integers(0, 6)
DTYPES = st.sampled_from([torch.float32, *NARROW])


@st.composite
def matrices(draw, values=FINITE):
    """The number of workers, and a [k, m], b [k, n]: k rows to be sharded."""
    size, k, m, n = draw(SIZES), draw(ROWS), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return size, draw(tensors((k, m), values)), draw(tensors((k, n), values))


def local_rows(x: torch.Tensor, me: Thread) -> torch.Tensor:
    return x[me.rank :: me.size]


def bits(x: torch.Tensor) -> list[int]:
    unsigned = torch.int16 if x.dtype in NARROW else torch.int32
    return x.contiguous().view(unsigned).reshape(-1).tolist()


def finite(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in a dtype, with its largest numbers in place of infinite ones."""
    return x.to(dtype).nan_to_num()


def exact_product(a: torch.Tensor, b: torch.Tensor, divisor: int = 1) -> torch.Tensor:
    """Return the sums of products, rounded once to the dtype of a and b."""
    columns = [[[Fraction(v) for v in column] for column in x.t().tolist()] for x in (a, b)]
    with rounding_to(a.dtype):
        rows = [
            [nearest(sum((p * q for p, q in zip(i, j)), Fraction(0)) / divisor) for j in columns[1]]
            for i in columns[0]
        ]
    return torch.tensor(rows, dtype=a.dtype).reshape(a.shape[1], b.shape[1])


@contextmanager
def some_without_kernels(me: Thread, without: int) -> Iterator[None]:
    """Do without the C library on the workers whose bit is set in `without`."""
    kernels.library = None if without >> me.rank & 1 else COMPILED
    try:
        yield
    finally:
        kernels.library = COMPILED


SMALL = st.integers(-3, 3).map(float)  # many ties
SCALES = st.sampled_from([0, -140, -120, -30, -22, -12, 14, 100])


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(matrices(), matrices(SMALL)), SCALES, DTYPES, st.sampled_from([1, 3, 7]),
    st.integers(0, 15),
)  # fmt: skip
def test_matrix_product_is_correctly_rounded_on_every_worker(case, scale, dtype, divisor, without):
    """Also where sums are halfway between two numbers, subnormal or too large."""
    size, a, b = case
    a, b = finite(a * (1 + 2.0**-7), dtype), finite(b * 2.0**scale, dtype)

    def work(me: Thread) -> torch.Tensor:
        with some_without_kernels(me, without):
            mine = replace(
                matrix_product(local_rows(a, me), local_rows(b, me), len(a)).partial(),
                divisor=divisor,
            )
            exchange = Exchange(me, [mine])
        with some_without_kernels(me, without):
            exchange.send_results()
        return finish([exchange])[0]

    expected = bits(exact_product(a, b, divisor))
    assert [bits(found) for found in together(size, work)] == [expected] * size


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 60), st.sampled_from([1, 9, 255, 256, 257, 1025, 1300]),
    st.randoms(use_true_random=False), st.sampled_from([1.0, 0.5, 0.1, 0.0]),
)  # fmt: skip
def test_sums_of_one_worker_are_within_their_bound(m, n, k, random, density):
    """Integers that are added exactly. Some sums have only zero terms, in others the terms cancel."""
    generator = torch.Generator().manual_seed(random.getrandbits(30))

    def numbers(columns: int) -> Any:
        x = torch.randint(-3, 4, (columns, k), generator=generator).float().t()
        return x * (torch.rand(k, columns, generator=generator) < density)

    a, b = numbers(m), numbers(n)
    a = a if random.getrandbits(1) else a.contiguous()
    found = matrix_product(a, b, k).partial()
    terms = a.long().t().unsqueeze(2) * b.long()
    totals, sizes = terms.sum(1), terms.abs().sum(1)
    assert found.sums.long().equal(totals) and found.sums.double().equal(found.sums)
    assert (found.sums.signbit() & (found.sums == 0)).equal(sizes == 0)
    assert bool((found.abs_bounds.unsqueeze(1) * (1 + 2.0**-40) >= sizes).all())
    i, j = torch.arange(m * n).div(n, rounding_mode="floor"), torch.arange(m * n) % n
    assert found.factors is not None
    pairs = found.factors.pairs(i, j)
    assert pairs[:, 0].long().equal(totals.reshape(-1)) and not pairs[:, 1:].any()


@given(tensors((5, 7), ANY), st.integers(0, 6))
def test_records_are_the_same_with_and_without_kernels(x, scale):
    """Also of NaN, infinities and zeros of both signs; a record holds a sum to half a unit."""
    sums = x.double() * 2.0 ** (40 * scale)
    bounds = sums.abs().amax(1)
    packed = []
    for library in (COMPILED, None):
        records = torch.full((6, 8 + 48), 7, dtype=torch.uint8)
        before, kernels.library = kernels.library, library
        partial_sums._pack(Partial(sums, bounds, 1), 0, records)
        kernels.library = before
        packed.append(records)
    assert packed[0].equal(packed[1])


def test_rounding_of_owners_has_room_for_what_packing_loses():
    """A sum just beside a midpoint that packing moves to the midpoint must fail the test."""
    unit = 2.0**-47 * 2
    for beside in (unit / 2, unit / 4, -unit / 2, -unit / 4):
        sums = torch.tensor([[1 + 2.0**-24 + beside]], dtype=torch.float64)
        records = torch.zeros(1, 1, 16, dtype=torch.uint8)
        p = Partial(sums, torch.tensor([1.5], dtype=torch.float64), 1)
        partial_sums._pack(p, 0, records[0])
        for library in (COMPILED, None):
            before, kernels.library = kernels.library, library
            value, failed = partial_sums._round_totals(p, records)
            kernels.library = before
            assert failed.tolist() == [0] and len(value) == 1


@settings(max_examples=100, deadline=None)
@given(matrices(SMALL), matrices(), DTYPES, st.data())
def test_several_sums_are_exchanged_together(one, other, dtype, data):
    """Sums of small integers, often ties and zeros, together with others, perhaps of another dtype."""
    size = one[0]
    scale = 2.0 ** data.draw(st.sampled_from([-140, -24, 0, 100]))
    a, b = one[1] * (1 + 2.0**-23), one[2] * scale
    x = finite(other[1], dtype)

    def work(me: Thread) -> list[torch.Tensor]:
        sums = (
            sum_over(local_rows(x, me), (0,), len(x), dtype=dtype).partial(),
            matrix_product(local_rows(a, me), local_rows(b, me), len(a)).partial(),
        )
        return all_reduce(me, [sums[1], sums[0], sums[1]])

    ones = torch.ones(len(x), 1, dtype=dtype)
    expected = [bits(exact_product(a, b)), bits(exact_product(x, ones)), bits(exact_product(a, b))]
    for found in together(size, work):
        assert [bits(t) for t in found] == expected


BIG = [
    (2.0**7, 2.0**7),
    (-(2.0**7), 2.0**7),
]  # their sum is 0, but binary32 sums of 48 bits lose more


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "half"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
@pytest.mark.parametrize(("cancelling", "divisor"), [([], 1), (BIG, 1), (BIG, 3)])
def test_sums_beside_midpoints_are_rounded_once(dtype, half, size, sign, cancelling, divisor):
    """1 + half + sign 2^-36 is a midpoint of 16 bits in binary32, which must not round it first.

    The first test resolves it, the sums with their errors kept, or the exact sums.
    """
    terms = [*cancelling, (divisor, 1), (divisor * half, 1), (sign * 2.0**-12, 2.0**-24)]
    a, b = torch.tensor(terms, dtype=dtype).split(1, 1)

    def work(me: Thread) -> float:
        product = matrix_product(local_rows(a, me), local_rows(b, me), len(a))
        return all_reduce(me, [product._replace(divisor=divisor).partial()])[0].item()

    assert together(size, work) == [1 + half * (1 + sign)] * size


@settings(max_examples=60, deadline=None)
@given(matrices(ANY), DTYPES, st.integers(0, 15))
def test_nan_and_infinity_follow_ieee_754(case, dtype, without):
    size, a, b = case
    a, b = a.to(dtype), b.to(dtype)

    def work(me: Thread) -> torch.Tensor:
        with some_without_kernels(me, without):
            exchange = Exchange(
                me, [matrix_product(local_rows(a, me), local_rows(b, me), len(a)).partial()]
            )
        with some_without_kernels(me, without):
            exchange.send_results()
        return finish([exchange])[0]

    terms = a.double().unsqueeze(2) * b.double().unsqueeze(1)
    ieee, are_finite = terms.sum(0).to(dtype), terms.isfinite().all(0)
    zeroed = [x.nan_to_num(0, 0, 0) for x in (a, b)]
    expected = torch.where(are_finite, exact_product(*zeroed), ieee)
    for found in together(size, work):
        assert found.isnan().equal(expected.isnan())
        kept = ~expected.isnan()
        assert bits(found[kept]) == bits(expected[kept])


TIE = 1 + 2.0**-24  # a midpoint between two binary32 numbers


@pytest.mark.parametrize("count", [1, 16, 17, 100])
def test_any_number_of_failures_is_resolved(count):
    """Columns that sum to a midpoint, with one more, far smaller term that decides the rounding."""
    a = torch.tensor([[1.0] * count, [2.0**-24] * count, [0.0, 2.0**-90, -(2.0**-90)][:1] * count])
    decide = torch.tensor([0.0, 2.0**-90, -(2.0**-90)] * count)[:count]
    a[2] = decide

    def work(me: Thread) -> tuple[torch.Tensor, int]:
        found = all_reduce(me, [sum_over(local_rows(a, me), (0,), 3).partial()])[0]
        return found, len(me.sent)

    for found, exchanges in together(2, work):
        assert found.squeeze(1).tolist() == [1 + 2.0**-23 * (d > 0) for d in decide.tolist()]
        # Sums and results, first rounded, then with errors kept, then exact: 2^-90 is lost in the second.
        # The places are sent only if they did not fit beside the results.
        assert exchanges == 4 + 2 * (count > 1) + (count > 32)


def test_without_failures_there_are_two_exchanges():
    a = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))

    def work(me: Thread) -> int:
        all_reduce(me, [sum_over(local_rows(a, me), (0,), 8).partial()])
        return len(me.sent)

    assert together(3, work) == [2, 2, 2]


def test_sums_of_zeros_pass_the_rounding_test():
    """As behind a ReLU: more exchanges are necessary only where terms cancel."""
    a = torch.tensor([[-0.0, 0.0, 1.0], [-0.0, -0.0, 0.0]])

    def work(me: Thread, b: list[list[float]]) -> tuple[list[int], int]:
        return bits(all_reduce(me, [matrix_product(a, torch.tensor(b), 4).partial()])[0]), len(
            me.sent
        )

    assert together(2, lambda me: work(me, [[0.0], [-3.0]])) == [([0] * 3, 2)] * 2
    cancels = together(2, lambda me: work(me, [[1.0 - 2 * me.rank], [-3.0]]))
    assert cancels == [([0] * 3, 4)] * 2


def test_element_costs_ten_bytes():
    """6 bytes to its owner and 4 from there to all; a native all-reduce sends 8."""
    a, b, size = torch.rand(4, 300), torch.rand(4, 200), 4

    def work(me: Thread) -> float:
        all_reduce(me, [matrix_product(local_rows(a, me), local_rows(b, me), 4).partial()])
        sums, results = me.sent[:2]
        return (sums[1] + 4 * results[0]) * (size - 1) / (300 * 200)

    assert all(
        10 * (size - 1) / size <= each < 10.1 * (size - 1) / size for each in together(size, work)
    )


@given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=5))
def test_products_of_three_numbers_fit_the_accumulator(triples):
    total = sum((Fraction(a) * Fraction(b) * Fraction(c) for a, b, c in triples), Fraction(0))
    units = partial_sums.in_units(total)
    assert Fraction(units, 1 << partial_sums._UNIT) == total
    stored = units.to_bytes(partial_sums._BYTES, "little", signed=True)
    assert int.from_bytes(stored, "little", signed=True) == units


@pytest.mark.parametrize(
    ("dtype", "tiny"),
    [(torch.float32, 2.0**-80), (torch.bfloat16, 2.0**-80), (torch.float16, 2.0**-24)],
)
def test_negative_sum_underflows_to_negative_zero(dtype, tiny):
    """Two terms cancel exactly, so that the sum with its errors kept is what remains, -tiny^2."""
    a = torch.tensor([[1.0], [tiny], [-1.0]], dtype=dtype)
    b = torch.tensor([[1.0], [-tiny], [1.0]], dtype=dtype)
    assert exact_product(a, b).signbit()

    def work(me: Thread) -> list[int]:
        products = matrix_product(local_rows(a, me), local_rows(b, me), 3)
        return bits(all_reduce(me, [products.partial()])[0])

    for size in (1, 2, 3):
        assert together(size, work) == [bits(exact_product(a, b))] * size


def test_wrong_sum_within_its_bound_is_corrected():
    """A wrong sum fails the rounding test if its bound is honest; the exact sums decide the result."""

    def work(me: Thread) -> float:
        honest = sum_over(torch.tensor([[1.0, 2.0**-30]]), (1,), 4).partial()
        off = Partial(honest.sums + 2.0**-25, honest.abs_bounds + 2.0**28, 4, honest.factors)
        return float(all_reduce(me, [off])[0])

    assert together(2, work) == [2.0, 2.0]
