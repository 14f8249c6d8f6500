"""Sums whose terms are spread over several workers: exchanged without rounding, rounded once.

Each worker has the binary64 sum of its own terms. Every element of the result has an owner among the
workers. The owner adds the sums of all workers, applies the rounding test to the total (a tree of
additions like any other, see operators/matmul.py) and sends the rounded number to all workers. A sum is
sent as an integer of 48 bits in units of its row's bound: what that loses is part of the tested bound.

The totals are rounded once, to the dtype of the result: float32, or bfloat16 and float16, whose operands
are widened to float32. Rounded totals are binary32 numbers in any case, and travel as such.

For the few totals that fail the test, every worker sends the owner its sum with the rounding errors kept;
for those that fail again, the exact sum of its terms, an integer multiple of 2^-600.

    bytes that a worker sends for an element: 6 to the owner, 4 from the owner to all, times (W - 1) / W
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby
from typing import Callable, NamedTuple, Optional, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.exact_sums import (
    compensated_sums,
    exact_sum,
    round_compensated,
)
from reproml.arithmetic.numerics.formats import narrow, rounding_to
from reproml.arithmetic.numerics.rounding import SLACK, gamma, nearest, rounding_test
from reproml.errors import ReproError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the terms and of the totals

# A product of four binary32 numbers is a multiple of 2^-596 below 2^512; 2^63 of them fit 1,216 bits.
_UNIT = 600
_BYTES = 152
CHUNK = 1 << 22  # terms of failed elements that are computed at a time
_RUN = 256  # products that are added in sequence: RUN of csrc/partial_sums.c


class Group(Protocol):
    """A group of workers. All of them call the same methods in the same order."""

    rank: int
    size: int
    models: WeakKeyDictionary[nn.Module, None]  # the wrapped models, in the order of wrapping

    def start_all_to_all(self, x: Tensor) -> Callable[[], Tensor]:
        """Send x[p] to worker p, [size, ...]; return a function that waits for what all sent here."""
        ...

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """Send x, of one shape on all workers; return a function that waits for all: [size, ...]."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of every worker, all of one shape. [...] -> [size, ...]."""
        ...

    def broadcast(self, x: Tensor) -> None:
        """Overwrite x with the x of worker 0."""
        ...


class Factors(NamedTuple):
    """The products a[row + a_term[p]] b[column + b_term[p]], whose sum over p is an element of a matrix.

    a, b: float32, one axis; the others are offsets in them, int64.
    """

    a: Tensor
    b: Tensor
    a_term: Tensor  # [k]
    b_term: Tensor  # [k]
    at: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # indices [f] of elements -> row, column

    def terms(self, i: Tensor, j: Tensor) -> Iterator[Tensor]:
        """Yield the terms of these elements, float64 [some, k], a limited number at a time."""
        row, column = self.at(i, j)
        step = max(1, CHUNK // max(1, len(self.a_term)))
        for some, other in zip(row.split(step), column.split(step)):
            left = self.a[some.unsqueeze(1) + self.a_term]
            yield left.double() * self.b[other.unsqueeze(1) + self.b_term].double()

    def pairs(self, i: Tensor, j: Tensor) -> Tensor:
        """Return sums with their errors kept: float64 [f, 3], s, t, e with |s + t - exact| <= e."""
        if kernels.binary32_loops() is None or not self.a.is_cpu:
            return torch.cat([torch.stack(compensated_sums(x), 1) for x in self.terms(i, j)])
        row, column = self.at(i, j)
        operands = (self.a, row, self.a_term, self.b, column, self.b_term)
        pairs = torch.empty(len(row), 3, dtype=torch.float64)
        kernels.library.reproml_partial_pairs(
            len(row), len(self.a_term), *[x.data_ptr() for x in (*operands, pairs)]
        )
        return pairs


@dataclass(frozen=True)
class Partial:
    """The sums of one worker's terms, for a matrix [m, n] of sums over all workers."""

    sums: Tensor  # float64 [m, n]; -0 only where all terms of this worker are zeros
    abs_bounds: Tensor  # float64 [m]: at least sum |term|, for every element of the row
    height: int  # at most this many additions and multiplications lie between a term and the total
    factors: Optional[Factors] = None  # None: `exact` has the exact sums
    # Rows and columns, int64 [f] -> exact sums / 2^-600.
    exact: Optional[Callable[[Tensor, Tensor], list[int]]] = None
    divisor: int = 1  # the total is divided by it; > 0
    # Numbers whose exact sum along each row is that of this worker, float64 [m, some] at a time; n is 1.
    terms: Optional[Callable[[], Iterator[Tensor]]] = None
    dtype: torch.dtype = torch.float32  # of the totals, one of DTYPES

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return self.sums.shape[0], self.sums.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self.sums.device


class Products(NamedTuple):
    """A matrix of sums of products, of which this worker has some terms."""

    factors: Factors
    # Consecutive rows that have the same columns: the offsets of these rows, and of these columns.
    blocks: Sequence[tuple[Tensor, Tensor]]
    height: int  # as in Partial
    divisor: int = 1
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return sum(len(row) for row, _ in self.blocks), len(self.blocks[0][1])

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.factors.a.device

    def partial(self) -> Partial:
        """Return the sums of this worker's terms."""
        parts = [sum_products(self.factors, row, column) for row, column in self.blocks]
        sums, bounds = (torch.cat(part) for part in zip(*parts))
        return Partial(
            sums, bounds, self.height, self.factors, divisor=self.divisor, dtype=self.dtype
        )


class Exchange:
    """Sums that are on their way to their owners and, rounded, back to all workers."""

    def __init__(self, group: Group, partials: Sequence[Partial]) -> None:
        self.group, self.partials = group, list(partials)
        layouts = [_layout(p, group.size) for p in partials]
        device = partials[0].sums.device
        width = sum(s * record for s, record in layouts)
        records = torch.empty(group.size, width, dtype=torch.uint8, device=device)
        start = 0
        for p, (s, record) in zip(partials, layouts):
            for owner, rows in enumerate(records[:, start : start + s * record]):
                _pack(p, owner * s, rows.view(s, record))
            start += s * record
        self._layouts = layouts
        self._listed = 16 + sum(s * p.sums.shape[1] for p, (s, _) in zip(partials, layouts)) // 4096
        self._received = group.start_all_to_all(records)
        self._failed: Tensor
        self._gathered: Callable[[], Tensor]

    def send_results(self, checksum: int = 0) -> None:
        """Round the totals that this worker owns and send them to all.

        checksum: a CRC-32 that must be the same on every worker, else `results` raises ReproError.
        """
        received, start = self._received(), 0
        values, places, owned = [], [], 0
        for p, (s, record) in zip(self.partials, self._layouts):
            part = received[:, start : start + s * record]
            with rounding_to(p.dtype):
                value, failed = _round_totals(p, part.unflatten(1, (s, record)))
            values.append(value)
            places.append(failed + owned)
            start, owned = start + s * record, owned + len(value)
        self._failed = torch.cat(places)
        header = self._failed.new_zeros(2 + self._listed)
        header[0], header[1] = len(self._failed), checksum >> 1  # 31 bits fit int32
        header[2:][: len(self._failed)] = self._failed[: self._listed]
        sent = torch.cat([header, *[value.view(torch.int32) for value in values]])
        self._gathered = self.group.start_all_gather(sent)

    def results(self) -> tuple[list[Tensor], list[list[int]]]:
        """Return the matrices, float32 [m, n], and for each owner the places of those that failed."""
        gathered = self._gathered()
        counts, lists = gathered[:, 0].tolist(), gathered[:, 2 : 2 + self._listed]
        check_agreement(gathered[:, 1])
        if max(counts) > self._listed:
            padded = self._failed.new_zeros(max(counts))
            padded[: len(self._failed)] = self._failed
            lists = self.group.all_gather(padded)
        values, start, matrices = gathered.view(torch.float32), 2 + self._listed, []
        for p, (s, _) in zip(self.partials, self._layouts):
            m, n = p.sums.shape
            matrices.append(values[:, start : start + s * n].reshape(-1, n)[:m].clone())
            start += s * n
        return matrices, [places[:n] for places, n in zip(lists.tolist(), counts)]

    def locate(self, owner: int, places: Sequence[int], first: int) -> list[tuple[int, int, int]]:
        """Return number, row and column of places of an owner. first: the number of the first matrix."""
        starts = accumulate(
            (s * p.sums.shape[1] for p, (s, _) in zip(self.partials, self._layouts))
        )
        located, ends, number, start, end = [], iter(starts), -1, 0, 0
        for place in places:
            while place >= end:
                number, start, end = number + 1, end, next(ends)
            row, column = divmod(place - start, self.partials[number].sums.shape[1])
            located.append((first + number, owner * self._layouts[number][0] + row, column))
        return located


def all_reduce(group: Group, partials: Sequence[Partial], checksum: int = 0) -> list[Tensor]:
    """Return the sums over all workers, each rounded once: [m, n], the same on every worker."""
    exchange = Exchange(group, partials)
    exchange.send_results(checksum)
    return finish([exchange])


def finish(exchanges: Sequence[Exchange]) -> list[Tensor]:
    """Return the matrices of exchanges whose results were sent, with those that failed resolved.

    Each matrix has the dtype of its sums.
    """
    group = exchanges[0].group
    partials = [p for e in exchanges for p in e.partials]
    results: list[Tensor] = []
    failures: list[list[tuple[int, int, int]]] = [[] for _ in range(group.size)]
    for exchange in exchanges:
        matrices, places = exchange.results()
        for owner, failed in enumerate(places):
            failures[owner] += exchange.locate(owner, failed, len(results))
        results += matrices
    if any(failures):
        _resolve(group, partials, results, failures)
    return [x.to(p.dtype) for x, p in zip(results, partials)]


def check_agreement(checksums: Tensor) -> None:
    """Raise ReproError if the workers computed with different numbers. checksums: int [size, ...]."""
    if len(checksums.unique()) > 1:
        raise ReproError(
            "the workers computed with different numbers, so the gradients would differ from those of "
            "a single process; look for a number that each worker computes from its own rows, such as "
            "len(labels), and for different random seeds"
        )


def matrix_product(a: Tensor, b: Tensor, height: int) -> Products:
    """Return sum_k a[k, i] b[k, j], k over all workers' rows.

    a, b: [k, m], [k, n] of one dtype, the rows of this worker. height: the number of rows of all workers.
    """
    dtype, a, b = a.dtype, a.float(), b.float()
    (k, m), n = a.shape, b.shape[1]
    row, a_term = offsets((m, a.stride(1))), offsets((k, a.stride(0)))
    b_term, column = offsets((k, b.stride(0))), offsets((n, b.stride(1)))
    factors = Factors(flat(a), flat(b), a_term, b_term, lambda i, j: (row[i], column[j]))
    return Products(factors, [(row, column)], product_height(height), dtype=dtype)


def sum_over(
    x: Tensor,
    dims: Sequence[int],
    height: int,
    divisor: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Products:
    """Return the sum of x over `dims`, of all workers, divided by `divisor`: a matrix [m, 1].

    x: the elements of this worker. height: the number of elements of all workers in a sum. dtype: of the
    sums, at least as wide as x's.
    """
    x = x.float()
    kept = [d for d in range(x.dim()) if d not in dims]
    row = offsets(*[(x.shape[d], x.stride(d)) for d in kept])
    term = offsets(*[(x.shape[d], x.stride(d)) for d in dims])
    zeros = torch.zeros_like(term)
    factors = Factors(
        flat(x), x.new_ones(1), term, zeros, lambda i, j: (row[i], torch.zeros_like(i))
    )
    column = zeros.new_zeros(1)
    return Products(factors, [(row, column)], product_height(height), divisor, dtype)


def flat(x: Tensor) -> Tensor:
    """Return the memory of x from its first element on as one axis."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.as_strided((length if x.numel() else 0,), (1,))


def offsets(*axes: tuple[int, int]) -> Tensor:
    """Return the offsets of elements in memory, in row-major order. axes: (size, stride) of each."""
    total = torch.zeros(1, dtype=torch.int64)
    for size, stride in axes:
        total = (total.unsqueeze(1) + torch.arange(size) * stride).reshape(-1)
    return total


def product_height(terms: int) -> int:
    """Return the height of the tree of additions of a sum of `terms` products on all workers."""
    return min(terms, _RUN) + terms // _RUN + 1


def sum_products(factors: Factors, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of products and the bounds of their terms, for the elements (row[i], column[j]).

    Returns float64 [m, n], -0 where all terms are zeros, and float64 [m].
    """
    a, b, a_term, b_term, _ = factors
    m, n, k = len(row), len(column), len(a_term)
    sums = a.new_empty(m, n, dtype=torch.float64)
    norms = [sums.new_empty(m), sums.new_empty(n)]
    compiled = kernels.binary32_loops() is not None and a.is_cpu and m and n and k
    operands = (a, row, a_term, b, b_term, column, sums, *norms)
    if not compiled or kernels.library.reproml_partial_product(
        m, n, k, *[x.data_ptr() for x in operands]
    ):
        left, right = a[row.unsqueeze(1) + a_term], b[b_term.unsqueeze(1) + column]
        sums.fill_(-0.0)
        for some, other in zip(left.split(_RUN, 1), right.split(_RUN)):
            counts = (some != 0).float() @ (other != 0).float()
            part = some.double() @ other.double()
            sums += torch.where(part != 0, part, torch.where(counts == 0, -0.0, 0.0))
        norms = [torch.linalg.vector_norm(left, dim=1, dtype=torch.float64)]
        norms += [torch.linalg.vector_norm(right, dim=0, dtype=torch.float64)]
    return sums, norms[0] * (norms[1].max() if n else 0.0)


def row_sums(x: Tensor, height: int, factor: Tensor) -> Partial:
    """Return sum_k x[i, k] factor[i], k over all workers' columns: a matrix [m, 1].

    x: float32 [m, k], the columns of this worker. factor: float32 [m, 1].
    """
    terms = x.double() * factor.double()

    def exact(i: Tensor, j: Tensor) -> list[int]:
        return [in_units(exact_sum(row)) for row in terms[i].tolist()]

    return Partial(terms.sum(1, keepdim=True), terms.abs().sum(1), height, exact=exact)


def in_units(x: Fraction) -> int:
    """Return x / 2^-600, which is an integer."""
    return x.numerator * ((1 << _UNIT) // x.denominator)


# ---- the exchange: owner o has the rows o * s ... o * s + s - 1 of each matrix -----------------------
#
# The record of a row, as in csrc/partial_sums.c: the bound, float64; the upper 32 bits of each sum, an
# integer of 48 bits, int32 [n]; its lower 16 bits, int16 [n]; padding to a multiple of 8 bytes.

_EMPTY = -(
    1 << 31
)  # the upper bits of what is not a number of units; the lower bits are an index of
_SPECIAL = (-0.0, math.nan, math.inf, -math.inf)


def _layout(p: Partial, size: int) -> tuple[int, int]:
    """Return s, the number of rows of the matrix that one worker owns, and the bytes of a record."""
    m, n = p.sums.shape
    return -(-m // size), 8 + (6 * n + 7) // 8 * 8


def _pack(p: Partial, first: int, records: Tensor) -> None:
    """Pack the rows from `first` on into records, uint8 [s, bytes]; what remains is a row of zeros."""
    sums = p.sums[first : first + len(records)].contiguous()
    bounds = p.abs_bounds[first : first + len(records)].contiguous()
    records[len(sums) :] = 0
    m, n = sums.shape
    if not m:
        return
    if kernels.binary32_loops() is not None and kernels.usable(sums, bounds, records):
        kernels.library.reproml_pack_sums(
            m, n, *(sums.data_ptr(), bounds.data_ptr(), records.data_ptr())
        )
        return
    records = records[:m]
    records[:, 8 + 6 * n :] = 0
    records[:, :8] = bounds.view(torch.uint8).view(m, 8)
    finite = bounds.isfinite().unsqueeze(1)
    packed = torch.where(finite, sums / _units(bounds).unsqueeze(1), 0.0).round().to(torch.int64)
    high, low = packed >> 16, packed & 0xFFFF
    for code, value in enumerate(_SPECIAL):
        same = sums.isnan() if value != value else sums == value
        if code == 0:
            same = same & sums.signbit()
        high, low = torch.where(same, _EMPTY, high), torch.where(same, code, low)
    low = torch.where(low < 1 << 15, low, low - (1 << 16))
    records[:, 8 : 8 + 4 * n] = high.to(torch.int32).contiguous().view(torch.uint8)
    records[:, 8 + 4 * n : 8 + 6 * n] = low.to(torch.int16).contiguous().view(torch.uint8)


def _units(bounds: Tensor) -> Tensor:
    """Return the unit of each row, a power of two: |sum| <= bound (1 + 2^-41) < 2^47 units."""
    exponent = torch.frexp(bounds * (1 + 2.0**-40)).exponent
    return torch.ldexp(torch.ones_like(bounds), torch.where(bounds.isfinite(), exponent - 47, 0))


def _round_totals(p: Partial, records: Tensor) -> tuple[Tensor, Tensor]:
    """Round the totals of one matrix to the target format.

    records: uint8 [size, s, bytes], with any stride between workers. Returns the float32 values, flat
    [s * n], and the int32 places of those that fail the test. The test assumes of the bound:
    - It has room for the roundings of the division, of its own computation and of mid - radius and
      mid + radius: `gamma` provides it.
    - mid is a sum in any order, so the sign of a zero is not known: the test compares bit patterns, so that
      -0 beside +0 fails. But -0 of all workers means that only zeros were added.
    - Where mid is NaN or infinite it is the result itself; where only the radius is, the test fails.
    """
    (size, s, _), n = records.shape, p.sums.shape[1]
    relative = gamma(p.height + size)
    if kernels.binary32_loops() is not None and records.is_cpu:
        value = torch.empty(s * n)
        places = torch.empty(s * n, dtype=torch.int32)
        work = torch.empty(n, dtype=torch.float64)
        count = kernels.library.reproml_round_sums(
            *(records.data_ptr(), size, records.stride(0), s, n, relative, p.divisor),
            *(work.data_ptr(), value.data_ptr(), places.data_ptr()),
        )
        return value, places[:count]
    total = records.new_full((s, n), -0.0, dtype=torch.float64)
    bound, units = total.new_zeros(s), total.new_zeros(s)
    special = total.new_tensor(_SPECIAL)
    for record in records:
        its_bound = record[:, :8].contiguous().view(torch.float64).squeeze(1)
        high = record[:, 8 : 8 + 4 * n].contiguous().view(torch.int32).to(torch.int64)
        low = record[:, 8 + 4 * n : 8 + 6 * n].contiguous().view(torch.int16).to(torch.int64)
        low = low & 0xFFFF
        unit = _units(its_bound)
        number = (high * (1 << 16) + low).double() * unit.unsqueeze(1)
        total += torch.where(high == _EMPTY, special[low.clamp(max=3)], number)
        bound += its_bound
        units += torch.where(its_bound.isfinite() & (its_bound > 0), unit, 0.0)
    # A sum was rounded to half a unit; the rest of 0.5625 is room for what `relative` multiplies.
    radius = ((bound * relative + 0.5625 * units) / p.divisor * SLACK).unsqueeze(1)
    mid = total / p.divisor
    value, failed = rounding_test(mid - radius, mid + radius)
    value = torch.where(mid.isfinite(), value, narrow(mid))
    failed = mid.isfinite() & (failed | ~radius.isfinite())
    empty = (mid == 0) & mid.signbit()
    value, failed = torch.where(empty, 0.0, value).float(), failed & ~empty
    return value.reshape(-1), failed.reshape(-1).nonzero().squeeze(1).int()


# ---- elements that failed the test: each worker sends its sums to their owners -----------------------


def _resolve(
    group: Group,
    partials: Sequence[Partial],
    results: list[Tensor],
    failures: list[list[tuple[int, int, int]]],
) -> None:
    """Overwrite the results that failed the test. failures: for each owner (matrix, row, column)."""
    for encode, decode in ((_encode_pairs, _round_pairs), (_encode_exact, _round_exact)):
        longest = max(map(len, failures))
        if not longest:
            return
        index = [place for places in failures for place in places]
        owners = [owner for owner, places in enumerate(failures) for _ in places]
        slots = [slot for places in failures for slot in range(len(places))]
        groups = _by_matrix(index, results[0].device)
        rows = torch.cat([encode(partials[number], i, j) for number, i, j, _ in groups])
        sent = rows.new_zeros(group.size, longest, rows.shape[1])
        order = [k for *_, listed in groups for k in listed]
        sent[[owners[k] for k in order], [slots[k] for k in order]] = rows
        mine = failures[group.rank]
        received = group.start_all_to_all(sent)()[:, : len(mine)]
        values = results[0].new_zeros(longest)
        at = 0
        for number, times in groupby(number for number, *_ in mine):
            p, end = partials[number], at + len(list(times))
            with rounding_to(p.dtype):
                values[at:end] = decode(p.divisor, received[:, at:end])
            at = end
        gathered = group.all_gather(values)
        found = torch.cat([row[: len(places)] for row, places in zip(gathered, failures)])
        for number, i, j, listed in groups:
            results[number][i, j] = found[listed]
        again = zip(found.isnan().tolist(), owners, index)
        failures = [[] for _ in failures]
        for fails, owner, place in again:
            if fails:
                failures[owner].append(place)


def _by_matrix(
    index: Sequence[tuple[int, int, int]], device: torch.device
) -> list[tuple[int, Tensor, Tensor, list[int]]]:
    """Return the matrices in the index: number, rows and columns, and where in the index they are."""
    listed: dict[int, list[int]] = {}
    for k, (number, _, _) in enumerate(index):
        listed.setdefault(number, []).append(k)
    groups = []
    for number, which in listed.items():
        i, j = torch.tensor([index[k][1:] for k in which], device=device).unbind(1)
        groups.append((number, i, j, which))
    return groups


def _encode_pairs(p: Partial, i: Tensor, j: Tensor) -> Tensor:
    """Return sums with their errors kept: float64 s, t, e with |s + t - exact| <= e, as uint8 [f, 24]."""
    if p.factors is None or p.divisor != 1:
        return p.sums.new_tensor([0.0, 0.0, math.inf]).repeat(len(i), 1).view(torch.uint8)
    return p.factors.pairs(i, j).view(torch.uint8)


def _round_pairs(divisor: int, received: Tensor) -> Tensor:
    """Return the totals, rounded to the target, float32 [f]; NaN where the test fails.

    divisor: 1, or none of the sums is finite. received: [size, f, 24].
    """
    sums, rests, errors = received.contiguous().view(torch.float64).permute(2, 1, 0)  # [f, size]
    s, t, e = compensated_sums(sums)
    size = t.abs() + rests.abs().sum(1)
    e = (e + errors.sum(1)) * SLACK + size * gamma(len(received) + 1)
    value, failed = round_compensated(s, t + rests.sum(1), e)
    # If e = 0 the total is s, which may be halfway between two numbers.
    failed = (failed | ~e.isfinite()) & (e != 0)
    exact = narrow(torch.where(s == 0, 0.0, s))  # a negative sum may underflow to -0
    return torch.where(failed, math.nan, torch.where(e == 0, exact, value))


def _encode_exact(p: Partial, i: Tensor, j: Tensor) -> Tensor:
    """Return exact sums in units of 2^-600: uint8 [f, 152]."""
    if p.factors is None:
        assert p.exact is not None
        integers = p.exact(i, j)
    else:
        integers = [
            in_units(exact_sum(row)) for terms in p.factors.terms(i, j) for row in terms.tolist()
        ]
    data = b"".join(x.to_bytes(_BYTES, "little", signed=True) for x in integers)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return encoded.reshape(-1, _BYTES).to(p.sums.device)


def _round_exact(divisor: int, received: Tensor) -> Tensor:
    """Return the totals / divisor, rounded to the target, float32 [f]. received: [size, f, 152]."""
    values = []
    for parts in received.transpose(0, 1).cpu().numpy():
        total = sum(int.from_bytes(x.tobytes(), "little", signed=True) for x in parts)
        values.append(nearest(Fraction(total, divisor << _UNIT)))
    return torch.tensor(values, dtype=torch.float64, device=received.device).float()
