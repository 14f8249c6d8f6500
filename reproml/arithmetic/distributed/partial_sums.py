"""Sums whose terms are spread over several workers: exchanged without rounding, rounded once.

Each worker has the binary64 sum of its own terms. Every element of the result has an owner among the
workers. The owner adds the sums of all workers, applies the rounding test to the total (a tree of
additions like any other, see operators/matmul.py) and sends the binary32 number to all workers. For the
few totals that fail the test, every worker sends the exact sum of its own terms, an integer multiple of
2^-600, and all workers add these.

    bytes that a worker sends for an element: 8 to the owner, 4 from the owner to all, times (W - 1) / W
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from itertools import accumulate
from typing import Callable, Optional, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reproml.arithmetic.numerics.exact_sums import exact_sum
from reproml.arithmetic.numerics.rounding import gamma, nearest, rounding_test
from reproml.errors import ReproError

# A product of four binary32 numbers is a multiple of 2^-596 below 2^512; 2^63 of them fit 1,216 bits.
_UNIT = 600
_BYTES = 152
_LISTED = 16  # failed elements of each owner that are sent with the results
_CHUNK = 1 << 22  # terms that `exact_unit_sums` computes at a time


class Group(Protocol):
    """A group of workers. All of them call the same methods in the same order."""

    rank: int
    size: int
    models: WeakKeyDictionary[nn.Module, None]  # the wrapped models, in the order of wrapping

    def all_to_all(self, x: Tensor) -> Tensor:
        """Send x[p] to worker p; return what all workers sent here. [size, ...] -> [size, ...]."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x of every worker, all of one shape. [...] -> [size, ...]."""
        ...

    def broadcast(self, x: Tensor) -> None:
        """Overwrite x with the x of worker 0."""
        ...


@dataclass(frozen=True)
class Partial:
    """The sums of one worker's terms, for a matrix [m, n] of sums over all workers."""

    sums: Tensor  # float64 [m, n]; -0 only where all terms of this worker are zeros
    abs_bounds: Tensor  # float64 [m]: at least sum |term|, for every element of the row
    height: int  # at most this many additions and multiplications lie between a term and the total
    exact: Callable[[Tensor, Tensor], list[int]]  # rows, columns int64 [f] -> exact sums / 2^-600
    divisor: int = 1  # the total is divided by it; > 0


def all_reduce(group: Group, partials: Sequence[Partial], checksum: int = 0) -> list[Tensor]:
    """Return the sums over all workers, each rounded once: float32 [m, n], the same on every worker.

    checksum: a CRC-32 that must be the same on every worker, else ReproError is raised.
    """
    received = group.all_to_all(torch.cat([_pack_for_owners(p, group.size) for p in partials], 1))
    totals = reduce(torch.add, received)  # keeps -0 where all workers sent -0; `sum` would not
    rounded, failed = _round_totals(partials, totals, group.size)
    header = failed.new_zeros(2 + _LISTED)
    header[0], header[1] = len(failed), checksum >> 1  # 31 bits fit int32
    header[2:][: len(failed)] = failed[:_LISTED]
    gathered = group.all_gather(torch.cat([header, rounded.view(torch.int32)]))
    counts, lists = gathered[:, 0].tolist(), gathered[:, 2 : 2 + _LISTED]
    check_agreement(gathered[:, 1])
    if max(counts) > _LISTED:
        padded = failed.new_zeros(max(counts))
        padded[: len(failed)] = failed
        lists = group.all_gather(padded)
    results = _unpack_results(partials, gathered[:, 2 + _LISTED :].view(torch.float32))
    if any(counts):
        failures = [places[:n] for places, n in zip(lists.tolist(), counts)]
        _resolve_failures(group, partials, results, failures)
    return results


def check_agreement(checksums: Tensor) -> None:
    """Raise ReproError if the workers computed with different numbers. checksums: int [size, ...]."""
    if len(checksums.unique()) > 1:
        raise ReproError(
            "the workers computed with different numbers, so the gradients would differ from those of "
            "a single process; look for a number that each worker computes from its own rows, such as "
            "len(labels), and for different random seeds"
        )


def matrix_product(a: Tensor, b: Tensor, height: int, divisor: int = 1) -> Partial:
    """Return sum_k a[k, i] b[k, j] / divisor, k over all workers' rows.

    a, b: float32 [k, m], [k, n], the rows of this worker.
    """
    wide_a, wide_b = a.double(), b.double()
    norms = [torch.linalg.vector_norm(x, dim=0) for x in (wide_a, wide_b)]
    largest = norms[1].max() if b.numel() else 0.0

    def exact(i: Tensor, j: Tensor) -> list[int]:
        return exact_unit_sums(
            lambda at: wide_a[:, i[at]].t() * wide_b[:, j[at]].t(), len(a), len(i)
        )

    sums = with_signed_zeros(wide_a.t() @ wide_b, lambda: (a != 0).float().t() @ (b != 0).float())
    return Partial(sums, norms[0] * largest, height, exact, divisor)


def row_sums(x: Tensor, height: int, divisor: int = 1, factor: Optional[Tensor] = None) -> Partial:
    """Return sum_k x[i, k] factor[i] / divisor, k over all workers' columns: a matrix [m, 1].

    x: float32 [m, k], the columns of this worker. factor: float32 [m, 1].
    """
    terms = x.double() if factor is None else x.double() * factor.double()

    def exact(i: Tensor, j: Tensor) -> list[int]:
        return exact_unit_sums(lambda at: terms[i[at]], x.shape[1], len(i))

    return Partial(terms.sum(1, keepdim=True), terms.abs().sum(1), height, exact, divisor)


def with_signed_zeros(sums: Tensor, nonzero_terms: Callable[[], Tensor]) -> Tensor:
    """Return the sums with -0 where all terms are zeros, as behind a ReLU, and +0 where terms cancel.

    nonzero_terms: the number of nonzero terms of each sum, or any positive number for it.
    """
    zero = sums == 0
    if not bool(zero.any()):
        return sums
    signed = torch.where(nonzero_terms() == 0, -0.0, 0.0).to(sums.dtype)
    return torch.where(zero, signed, sums)


def exact_unit_sums(terms: Callable[[slice], Tensor], k: int, count: int) -> list[int]:
    """Return `count` exact sums of k finite terms each, in units of 2^-600.

    terms: returns the terms of a slice of the sums, float64 [len(slice), k].
    """
    step = max(1, _CHUNK // max(1, k))
    chunks = (terms(slice(start, start + step)).tolist() for start in range(0, count, step))
    return [in_units(exact_sum(row)) for chunk in chunks for row in chunk]


def in_units(x: Fraction) -> int:
    """Return x / 2^-600, which is an integer."""
    return x.numerator * ((1 << _UNIT) // x.denominator)


# ---- layout of the exchange: owner o has the rows o * s ... o * s + s - 1 of each matrix, padded ------


def _rows_per_owner(p: Partial, size: int) -> int:
    """Return s, the number of rows of the matrix that one worker owns."""
    return -(-len(p.sums) // size)


def _pack_for_owners(p: Partial, size: int) -> Tensor:
    """Return what each owner receives, float64 [size, s * (n + 1)]: rows, each with its bound."""
    m, n = p.sums.shape
    s = _rows_per_owner(p, size)
    packed = p.sums.new_zeros(size * s, n + 1)
    packed[:m, :n] = p.sums
    packed[:m, n] = p.abs_bounds
    return packed.reshape(size, s * (n + 1))


def _round_totals(partials: Sequence[Partial], totals: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Round the totals that this worker owns.

    Returns the float32 values, flat [sum of s * n], and the int32 places of those that fail the test.
    """
    values, places, start, owned = [], [], 0, 0
    for p in partials:
        n, s = p.sums.shape[1], _rows_per_owner(p, size)
        packed = totals[start : start + s * (n + 1)].reshape(s, n + 1)
        mid = packed[:, :n] if p.divisor == 1 else packed[:, :n] / p.divisor
        radius = packed[:, n:] * (gamma(p.height + size) / p.divisor)
        value, failed = _rounding_test(mid, radius, finite=bool(packed.sum().isfinite()))
        i, j = failed.nonzero().unbind(1)
        empty = (mid[i, j] == 0) & mid[i, j].signbit()  # -0 of all workers: only zeros were added
        value[i[empty], j[empty]] = 0.0  # an exact zero is +0
        values.append(value.reshape(-1))
        places.append((i * n + j)[~empty] + owned)
        start, owned = start + packed.numel(), owned + value.numel()
    return torch.cat(values), torch.cat(places).int()


def _rounding_test(mid: Tensor, radius: Tensor, finite: bool) -> tuple[Tensor, Tensor]:
    """Round to binary32 what lies within `radius` of `mid`; return the values and where the test fails.

    The test assumes of the radius:
    - It has room for the roundings of the division, of its own computation and of mid - radius and
      mid + radius: `gamma` provides it.
    - mid is a sum in any order, so the sign of a zero is not known: the test compares bit patterns, so that
      -0 beside +0 fails.
    - Where mid is NaN or infinite it is the result itself; where only the radius is, the test fails.

    finite: whether all numbers are known to be finite.
    """
    value, failed = rounding_test(mid - radius, mid + radius)
    if not finite:
        value = torch.where(mid.isfinite(), value, mid.float())
        failed = mid.isfinite() & (failed | ~radius.isfinite())
    return value, failed


def _unpack_results(partials: Sequence[Partial], gathered: Tensor) -> list[Tensor]:
    """Return the matrices [m, n] that all owners rounded. gathered: float32 [size, sum of s * n]."""
    size, start, results = len(gathered), 0, []
    for p in partials:
        m, n = p.sums.shape
        width = _rows_per_owner(p, size) * n
        results.append(gathered[:, start : start + width].reshape(-1, n)[:m].clone())
        start += width
    return results


def _resolve_failures(
    group: Group, partials: Sequence[Partial], results: list[Tensor], failures: list[list[int]]
) -> None:
    """Overwrite the results that failed the test with the rounded exact sums.

    failures: for each owner the places among the results that it owns.
    """
    per_owner = [_rows_per_owner(p, group.size) for p in partials]
    starts = list(accumulate((s * p.sums.shape[1] for s, p in zip(per_owner, partials)), initial=0))
    indices: list[list[tuple[int, int]]] = [[] for _ in partials]  # (row, column)
    for owner, places in enumerate(failures):
        for place in places:
            number = (
                bisect_right(starts, place) - 1
            )  # the last partial that starts here, if some are empty
            row, column = divmod(place - starts[number], partials[number].sums.shape[1])
            indices[number].append((owner * per_owner[number] + row, column))

    local = bytearray()
    for p, pairs in zip(partials, indices):
        if pairs:
            rows, columns = torch.tensor(pairs, device=p.sums.device).t()
            for x in p.exact(rows, columns):
                local += x.to_bytes(_BYTES, "little", signed=True)
    sent = torch.frombuffer(local, dtype=torch.uint8).reshape(-1, _BYTES)
    received = group.all_gather(sent.to(results[0].device)).cpu().numpy()

    totals = iter(
        sum(int.from_bytes(x.tobytes(), "little", signed=True) for x in terms)
        for terms in received.transpose(1, 0, 2)
    )
    for p, pairs, result in zip(partials, indices, results):
        for row, column in pairs:
            result[row, column] = nearest(Fraction(next(totals), p.divisor << _UNIT))
