"""The exchange of unrounded sums against rational numbers, for one to four workers."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml.arithmetic.distributed import partial_sums as partials
from reproml.arithmetic.distributed.partial_sums import Partial, merge, plain_sum, product
from reproml.arithmetic.numerics.rounding import nearest
from tests.arithmetic.distributed.together import Thread, together
from tests.arithmetic.strategies import ANY, FINITE, tensors

SIZES = st.integers(1, 4)
ROWS = st.integers(0, 6)


@st.composite
def matrices(draw, values=FINITE):
    """Workers, and a [k, m], b [k, n]: k rows to be dealt to them."""
    size, k, m, n = draw(SIZES), draw(ROWS), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return size, draw(tensors((k, m), values)), draw(tensors((k, n), values))


def dealt(x: torch.Tensor, me: Thread) -> torch.Tensor:
    return x[me.rank :: me.size]


def bits(x: torch.Tensor) -> list[int]:
    return x.contiguous().view(torch.int32).reshape(-1).tolist()


def exact_product(a: torch.Tensor, b: torch.Tensor, divisor: int = 1) -> torch.Tensor:
    columns = [[[Fraction(v) for v in column] for column in x.t().tolist()] for x in (a, b)]
    return torch.tensor(
        [
            [nearest(sum((p * q for p, q in zip(i, j)), Fraction(0)) / divisor) for j in columns[1]]
            for i in columns[0]
        ],
        dtype=torch.float32,
    ).reshape(a.shape[1], b.shape[1])


@settings(max_examples=150, deadline=None)
@given(matrices(), st.sampled_from([1, 3, 7]))
def test_a_product_is_the_rounded_exact_one_on_every_worker(case, divisor):
    size, a, b = case

    def work(me: Thread) -> torch.Tensor:
        return merge(me, [product(dealt(a, me), dealt(b, me), len(a), divisor)])[0]

    expected = bits(exact_product(a, b, divisor))
    assert [bits(found) for found in together(size, work)] == [expected] * size


@settings(max_examples=100, deadline=None)
@given(matrices(st.integers(-3, 3).map(float)), matrices(), st.data())
def test_several_sums_are_exchanged_at_once(one, other, data):
    """Sums of small whole numbers, often ties and zeros, beside others."""
    size = one[0]
    scale = 2.0 ** data.draw(st.sampled_from([-140, -24, 0, 100]))
    a, b = one[1] * (1 + 2.0**-23), one[2] * scale
    x = other[1]

    def work(me: Thread) -> list[torch.Tensor]:
        sums = plain_sum(dealt(x, me).t(), len(x)), product(dealt(a, me), dealt(b, me), len(a))
        return merge(me, [sums[1], sums[0], sums[1]])

    ones = torch.ones(len(x), 1)
    expected = [bits(exact_product(a, b)), bits(exact_product(x, ones)), bits(exact_product(a, b))]
    for found in together(size, work):
        assert [bits(t) for t in found] == expected


@settings(max_examples=60, deadline=None)
@given(matrices(ANY))
def test_what_is_not_finite_follows_ieee(case):
    size, a, b = case

    def work(me: Thread) -> torch.Tensor:
        return merge(me, [product(dealt(a, me), dealt(b, me), len(a))])[0]

    terms = a.double().unsqueeze(2) * b.double().unsqueeze(1)
    ieee, finite = terms.sum(0).float(), terms.isfinite().all(0)
    zeroed = [x.nan_to_num(0, 0, 0) for x in (a, b)]
    expected = torch.where(finite, exact_product(*zeroed), ieee)
    for found in together(size, work):
        assert found.isnan().equal(expected.isnan())
        kept = ~expected.isnan()
        assert bits(found[kept]) == bits(expected[kept])


TIE = 1 + 2.0**-24  # as a sum: a midpoint of binary32


@pytest.mark.parametrize("count", [1, partials._LISTED, partials._LISTED + 1, 100])
def test_failures_are_settled_however_many(count):
    """Columns that sum to a midpoint, with one more term far below that decides."""
    a = torch.tensor([[1.0] * count, [2.0**-24] * count, [0.0, 2.0**-90, -(2.0**-90)][:1] * count])
    decide = torch.tensor([0.0, 2.0**-90, -(2.0**-90)] * count)[:count]
    a[2] = decide

    def work(me: Thread) -> tuple[torch.Tensor, int]:
        found = merge(me, [plain_sum(dealt(a, me).t(), 3)])[0]
        return found, len(me.sent)

    for found, exchanges in together(2, work):
        assert found.squeeze(1).tolist() == [1 + 2.0**-23 * (d > 0) for d in decide.tolist()]
        # the sums, the results, the exact sums; the places only if they did not fit beside the results
        assert exchanges == 3 + (count > 2 * partials._LISTED)


def test_no_failure_no_third_exchange():
    a = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))

    def work(me: Thread) -> int:
        merge(me, [plain_sum(dealt(a, me).t(), 8)])
        return len(me.sent)

    assert together(3, work) == [2, 2, 2]


def test_zeros_are_settled_at_once_whatever_their_sign():
    """As where a ReLU was off: nothing to exchange once more, but where terms cancel."""
    a = torch.tensor([[-0.0, 0.0, 1.0], [-0.0, -0.0, 0.0]])

    def work(me: Thread, b: list[list[float]]) -> tuple[list[int], int]:
        return bits(merge(me, [product(a, torch.tensor(b), 4)])[0]), len(me.sent)

    assert together(2, lambda me: work(me, [[0.0], [-3.0]])) == [([0] * 3, 2)] * 2
    cancels = together(2, lambda me: work(me, [[1.0 - 2 * me.rank], [-3.0]]))
    assert cancels == [([0] * 3, 3)] * 2


def test_an_element_costs_twelve_bytes():
    """8 to its owner and 4 from there to all: what native all-reduce's 8 compare with."""
    a, b, size = torch.rand(4, 300), torch.rand(4, 200), 4

    def work(me: Thread) -> float:
        merge(me, [product(dealt(a, me), dealt(b, me), 4)])
        to_owners, to_all = me.sent[:2]
        return (8 * to_owners[1] * (size - 1) + 4 * to_all[0] * (size - 1)) / (300 * 200)

    assert all(
        12 * (size - 1) / size <= each < 12.1 * (size - 1) / size for each in together(size, work)
    )


@given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=5))
def test_products_of_three_numbers_fit_the_accumulator(triples):
    total = sum((Fraction(a) * Fraction(b) * Fraction(c) for a, b, c in triples), Fraction(0))
    whole = partials.units(total)
    assert Fraction(whole, 1 << partials._UNIT) == total
    stored = whole.to_bytes(partials._BYTES, "little", signed=True)
    assert int.from_bytes(stored, "little", signed=True) == whole


def test_the_bound_of_the_caller_is_what_decides():
    """A wrong sum within its bound does no harm: the exact sums have the last word."""

    def work(me: Thread) -> float:
        honest = plain_sum(torch.tensor([[1.0, 2.0**-30]]), 4)
        off = Partial(honest.sums + 2.0**-25, honest.sizes + 2.0**28, 4, honest.exact)
        return float(merge(me, [off])[0])

    assert together(2, work) == [2.0, 2.0]
