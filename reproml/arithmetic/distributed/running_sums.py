"""Sums whose terms are computed one part after another: kept without rounding, rounded once at the end.

A sum is kept as s + t, two binary64 numbers, by error-free additions. Where these two are not enough, as
for terms that differ by a factor of more than 2^50, the element has further numbers in `rests`. So the
memory does not depend on the number of terms.
"""

from __future__ import annotations

import math
from typing import Optional, Union

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.distributed.partial_sums import Factors, Partial, Products
from reproml.arithmetic.numerics.exact_sums import distilled, exact_sum, round_compensated
from reproml.arithmetic.numerics.formats import narrow, rounding_to
from reproml.arithmetic.numerics.rounding import nearest, two_sum

_CHUNK = 1 << 20  # factors that are copied at a time


class RunningSum:
    """A matrix of exact sums."""

    def __init__(
        self, m: int, n: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.s, self.t = torch.zeros(2, m, n, dtype=torch.float64, device=device)
        self.rests: dict[int, list[float]] = {}  # flat index -> numbers that are added to s + t
        self.divisor = 1
        self.dtype = dtype  # of the total, one of DTYPES

    def add(self, sums: Union[Products, Partial]) -> None:
        """Add the terms of a part."""
        self.divisor = sums.divisor
        if isinstance(sums, Partial):
            self._add_terms(sums)
            return
        start, count = 0, max(1, _CHUNK // max(1, self.s.shape[1]))
        a_terms, b_terms = sums.factors.a_term.split(count), sums.factors.b_term.split(count)
        for rows, columns in sums.blocks:
            for a_term, b_term in zip(a_terms, b_terms):
                factors = sums.factors._replace(a_term=a_term, b_term=b_term)
                if len(rows) and len(columns) and len(a_term):
                    self._add_products(factors, start, rows, columns)
            start += len(rows)

    def _add_products(self, factors: Factors, start: int, rows: Tensor, columns: Tensor) -> None:
        """Add products to the rows of this matrix from `start` on."""
        s, t = (x[start : start + len(rows)] for x in (self.s, self.t))
        failed = _add_compiled(factors, rows, columns, s, t)
        if failed is None:
            failed = _add_in_order(factors, rows, columns, s, t)
        if len(failed):
            i = failed.div(len(columns), rounding_mode="floor") + start
            j = failed % len(columns)
            index = iter((i * len(columns) + j).tolist())
            for terms in factors.terms(i, j):
                for new in terms.tolist():
                    self._set(next(index), new)

    def _add_terms(self, partial: Partial) -> None:
        """Add terms that are not products of two binary32 numbers, to a matrix of one column."""
        assert partial.terms is not None
        finite = partial.abs_bounds.isfinite()
        self.s += torch.where(finite.unsqueeze(1), 0.0, partial.sums)
        rows = finite.nonzero().squeeze(1)
        for terms in partial.terms():
            numbers, complete = _in_three(terms[rows])
            for k, (at, kept) in enumerate(zip(rows.tolist(), numbers.tolist())):
                self._set(at, kept if complete[k] else terms[at].tolist())

    def _set(self, at: int, terms: list[float]) -> None:
        """Add terms to an element, in as many numbers as the sum needs."""
        flat_s, flat_t = self.s.view(-1), self.t.view(-1)
        if not math.isfinite(flat_s[at]):
            return
        kept = [float(flat_s[at]), float(flat_t[at]), *self.rests.pop(at, ())]
        s, t, *rest = [*distilled([*kept, *terms]), 0.0, 0.0]
        flat_s[at], flat_t[at] = s, t
        if rest[:-2]:
            self.rests[at] = rest[:-2]

    def total(self) -> Tensor:
        """Return the sums, divided by the divisor and rounded once: [m, n]."""
        with rounding_to(self.dtype):
            return self._rounded().to(self.dtype)

    def _rounded(self) -> Tensor:
        """Return the total, rounded to the target format."""
        s, t = two_sum(self.s.reshape(-1), self.t.reshape(-1))
        finite = s.isfinite()
        t = torch.where(finite, t, 0.0)
        value, failed = round_compensated(s, t, torch.zeros_like(s))
        failed = finite & failed & (t != 0)
        if self.divisor != 1:
            failed = finite
        single = narrow(torch.where(s == 0, 0.0, s))  # an exact zero is +0
        value = torch.where(finite & (t != 0), value, single)
        for at in {*failed.nonzero().squeeze(1).tolist(), *self.rests}:
            numbers = [float(s[at]), float(t[at]), *self.rests.get(at, ())]
            if math.isfinite(numbers[0]):
                value[at] = nearest(exact_sum(numbers) / self.divisor)
        return value.reshape(self.s.shape)


def _add_compiled(
    factors: Factors, rows: Tensor, columns: Tensor, s: Tensor, t: Tensor
) -> Optional[Tensor]:
    """Add the terms to s + t; return the flat indices of elements that need more numbers, unchanged.

    None if the C library cannot do it; then nothing is added.
    """
    a, b, a_term, b_term, _ = factors
    if kernels.binary32_loops() is None:
        return None
    if not kernels.usable(a, b, a_term, b_term, rows, columns, s, t):
        return None
    failed = torch.empty(s.shape, dtype=torch.uint8)
    operands = (a, rows, a_term, b, b_term, columns, s, t, failed)
    count = kernels.library.reproml_add_products(
        len(rows), len(columns), len(a_term), *[x.data_ptr() for x in operands]
    )
    if count < 0:
        return None
    return failed.view(-1).nonzero().squeeze(1) if count else failed.new_empty(0).long()


def _add_in_order(factors: Factors, rows: Tensor, columns: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Do the same as `_add_compiled` in PyTorch."""
    new_s, new_t, lost = s, t, torch.zeros_like(s)
    for a_term, b_term in zip(factors.a_term, factors.b_term):
        left, right = factors.a[rows + a_term].double(), factors.b[columns + b_term].double()
        new_s, rest = two_sum(new_s, left.unsqueeze(1) * right)
        new_t, rest = two_sum(new_t, rest)
        lost += rest.abs()
    finite = new_s.isfinite()
    failed = finite & (lost != 0)
    s.copy_(torch.where(failed, s, new_s))
    t.copy_(torch.where(failed, t, torch.where(finite, new_t, 0.0)))
    return failed.view(-1).nonzero().squeeze(1)


def _in_three(terms: Tensor) -> tuple[Tensor, list[bool]]:
    """Return three numbers for the sum of each row, float64 [m, 3], and whether they are all of it."""
    numbers = []
    for _ in range(3):
        errors = [terms.new_zeros(len(terms), 1)]
        while terms.shape[1] > 1:
            if terms.shape[1] % 2:
                terms = torch.nn.functional.pad(terms, (0, 1))
            terms, lost = two_sum(*terms.split(terms.shape[1] // 2, 1))
            errors.append(lost)
        numbers.append(terms.sum(1))
        terms = torch.cat(errors, 1)
    return torch.stack(numbers, 1), (terms == 0).all(1).tolist()
