"""Sums whose terms lie with several workers: exchanged unrounded, rounded once, everywhere alike.

Each worker has the binary64 sum of its own terms. The sums go to an owner each, who adds them, puts the
rounding test to the total (a tree of additions like any other, see dot.py) and gives the binary32 number
to all. Of the few totals that fail, every worker gives the exact sum of its own terms, a whole number of
2^-600, and all add these.

    bytes that a worker sends for an element: 8 to the owner, 4 from the owner to all, times (W - 1) / W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Callable, Optional, Protocol

import torch
from torch import Tensor

from reproml.arithmetic.numerics.exact_sums import exact_sum
from reproml.arithmetic.numerics.rounding import gamma, nearest
from reproml.errors import ReproError

# A product of four binary32 numbers is a multiple of 2^-596 below 2^512; 2^63 of them fit 1,216 bits.
_UNIT = 600
_BYTES = 152
_LISTED = 16  # failures that travel with the results
_CHUNK = 1 << 22  # terms gathered at once


class Group(Protocol):
    """The workers. All of them call the same functions in the same order."""

    rank: int
    size: int

    def to_owners(self, x: Tensor) -> Tensor:
        """Send x[p] to worker p; return what the workers sent here. [size, ...] -> [size, ...]."""
        ...

    def to_all(self, x: Tensor) -> Tensor:
        """Return the x of all workers, of one shape. [...] -> [size, ...]."""
        ...


@dataclass(frozen=True)
class Partial:
    """One worker's part of a matrix [m, n] of sums."""

    sums: Tensor  # float64 [m, n], of its own terms; -0 only where all of them are zeros
    sizes: Tensor  # float64 [m]: no sum of absolute values of a row's terms is larger
    height: int  # additions and multiplications on a term's way into the whole sum, at most
    exact: Callable[[Tensor, Tensor], list[int]]  # rows, columns int64 [f] -> the sums / 2^-600
    divisor: int = 1  # of the whole sum, > 0


def merge(group: Group, partials: Sequence[Partial], agreed: int = 0) -> list[Tensor]:
    """The sums over all workers, each rounded once: float32 [m, n], the same on every worker.

    agreed: a CRC of what every worker should have alike; raises ReproError if they differ.
    """
    given = group.to_owners(torch.cat([_dealt(p, group.size) for p in partials], 1))
    total = reduce(torch.add, given)  # -0 where all gave -0, which `sum` would not keep
    rounded, failed = _tested(partials, total, group.size)
    head = failed.new_zeros(2 + _LISTED)
    head[0], head[1] = len(failed), agreed >> 1  # within int32
    head[2:][: len(failed)] = failed[:_LISTED]
    shared = group.to_all(torch.cat([head, rounded.view(torch.int32)]))
    counts, results = shared[:, 0].tolist(), shared[:, 2 + _LISTED :].view(torch.float32)
    refuse_unlike(shared[:, 1])
    if max(counts) > _LISTED:
        padded = failed.new_zeros(max(counts))
        padded[: len(failed)] = failed
        lists = group.to_all(padded)
    else:
        lists = shared[:, 2 : 2 + _LISTED]
    whole = _gathered(partials, results)
    if any(counts):
        _settle(group, partials, whole, [row[:n] for row, n in zip(lists.tolist(), counts)])
    return whole


def refuse_unlike(agreed: Tensor) -> None:
    """Raise ReproError if the workers did not compute with the same numbers. agreed: [size, ...]."""
    if len(agreed.unique()) > 1:
        raise ReproError(
            "the workers computed with different numbers, so the gradients are not those of one process: "
            "a count of one worker's labels beside the global batch, say, or another random seed"
        )


def product(a: Tensor, b: Tensor, height: int, divisor: int = 1) -> Partial:
    """sum_k a[k, i] b[k, j] over all workers. a, b float32 [k, m], [k, n], this worker's rows."""
    wide_a, wide_b = a.double(), b.double()
    norms = [torch.linalg.vector_norm(x, dim=0) for x in (wide_a, wide_b)]
    largest = norms[1].max() if b.numel() else 0.0

    def exact(i: Tensor, j: Tensor) -> list[int]:
        return in_units(lambda at: wide_a[:, i[at]].t() * wide_b[:, j[at]].t(), len(a), len(i))

    sums = marked(wide_a.t() @ wide_b, lambda: (a != 0).float().t() @ (b != 0).float())
    return Partial(sums, norms[0] * largest, height, exact, divisor)


def marked(sums: Tensor, counts: Callable[[], Tensor]) -> Tensor:
    """The sums with -0 where all terms are zeros, as behind a ReLU, and +0 where they cancel.

    counts: the numbers of the terms that are not zeros, or any positive number for them.
    """
    zero = sums == 0
    if not bool(zero.any()):
        return sums
    return torch.where(zero, torch.where(counts() == 0, -0.0, 0.0).to(sums.dtype), sums)


def plain_sum(x: Tensor, height: int, divisor: int = 1, times: Optional[Tensor] = None) -> Partial:
    """sum_k x[i, k] times[i] / divisor over all workers. x float32 [m, k], times [m, 1] -> [m, 1]."""
    wide = x.double() if times is None else x.double() * times.double()

    def exact(i: Tensor, j: Tensor) -> list[int]:
        return in_units(lambda at: wide[i[at]], x.shape[1], len(i))

    return Partial(wide.sum(1, keepdim=True), wide.abs().sum(1), height, exact, divisor)


def in_units(terms: Callable[[slice], Tensor], k: int, count: int) -> list[int]:
    """The exact sums of finite terms, as multiples of 2^-600. terms(at) float64 [at, k] of [count, k]."""
    step = max(1, _CHUNK // max(1, k))
    chunks = (terms(slice(start, start + step)).tolist() for start in range(0, count, step))
    return [units(exact_sum(row)) for chunk in chunks for row in chunk]


def units(x: Fraction) -> int:
    """x / 2^-600, a whole number."""
    return x.numerator * ((1 << _UNIT) // x.denominator)


def _share(m: int, size: int) -> int:
    """Rows of a matrix of m that one worker owns."""
    return -(-m // size)


def _dealt(p: Partial, size: int) -> Tensor:
    """What each owner gets of it, float64 [size, share * (n + 1)]: rows, then their sizes."""
    m, n = p.sums.shape
    share = _share(m, size)
    both = p.sums.new_zeros(size * share, n + 1)
    both[:m, :n] = p.sums
    both[:m, n] = p.sizes
    return both.reshape(size, share * (n + 1))


def _tested(partials: Sequence[Partial], total: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of the rows owned here: float32 values, flat, and int32 places of those that fail the test."""
    values, failures, start = [], [], 0
    for p in partials:
        n = p.sums.shape[1]
        share = _share(len(p.sums), size)
        both = total[start : start + share * (n + 1)].reshape(share, n + 1)
        start += both.numel()
        c = both[:, :n] if p.divisor == 1 else both[:, :n] / p.divisor
        e = both[:, n:] * (gamma(p.height + size) / p.divisor)
        value = (c + e).float()
        failed = (c - e).float().view(torch.int32) != value.view(torch.int32)
        if not bool(both.sum().isfinite()):  # then some sum or size may not be
            value = torch.where(c.isfinite(), value, c.float())
            failed = c.isfinite() & (failed | ~e.isfinite())
        i, j = failed.nonzero().unbind(1)
        nothing = (c[i, j] == 0) & c[i, j].signbit()  # -0 of all workers: no term but zeros
        value[i[nothing], j[nothing]] = 0.0  # an exact zero is +0
        values.append(value.reshape(-1))
        failures.append((i * n + j)[~nothing] + sum(map(len, values[:-1])))
    return torch.cat(values), torch.cat(failures).int()


def _gathered(partials: Sequence[Partial], results: Tensor) -> list[Tensor]:
    """What all owners rounded, as the matrices [m, n]. results: float32 [size, shares * n]."""
    size, start, whole = len(results), 0, []
    for p in partials:
        m, n = p.sums.shape
        width = _share(m, size) * n
        part = results[:, start : start + width].reshape(-1, n)
        whole.append(part[:m].clone())
        start += width
    return whole


def _settle(
    group: Group, partials: Sequence[Partial], whole: list[Tensor], lists: list[list[int]]
) -> None:
    """Put the exact sums where the test failed: lists[p] has the places among the rows p owns."""
    at: list[list[tuple[int, int]]] = [[] for _ in partials]
    for owner, places in enumerate(lists):
        start, number = 0, 0
        for place in sorted(places):
            while True:
                m, n = partials[number].sums.shape
                share = _share(m, group.size)
                if place < start + share * n:
                    break
                start, number = start + share * n, number + 1
            row, column = divmod(place - start, n)
            at[number].append((owner * share + row, column))
    own = bytearray()
    for p, pairs in zip(partials, at):
        if pairs:
            rows, columns = torch.tensor(pairs, device=p.sums.device).t()
            own += b"".join(
                x.to_bytes(_BYTES, "little", signed=True) for x in p.exact(rows, columns)
            )
    sent = torch.frombuffer(own, dtype=torch.uint8).reshape(-1, _BYTES)
    every = group.to_all(sent.to(whole[0].device)).cpu().numpy()
    totals = iter(
        sum(int.from_bytes(part.tobytes(), "little", signed=True) for part in parts)
        for parts in every.transpose(1, 0, 2)
    )
    for p, pairs, result in zip(partials, at, whole):
        for row, column in pairs:
            result[row, column] = nearest(Fraction(next(totals), p.divisor << _UNIT))
