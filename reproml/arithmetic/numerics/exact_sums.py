"""Exact sums, rounded once at the end: the accurate path of sums that fail the rounding test."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from reproml.arithmetic.numerics.formats import may_be_midpoint
from reproml.arithmetic.numerics.rounding import gamma, nearest, rounding_test, two_sum

ONE = Fraction(1)


# From this many failures on, one product of absolute values for all elements costs less than an exact sum
# for each failure.
MANY = 64


_CHUNK = 1 << 22  # elements gathered at once


def nearest_of_rows(terms: Tensor, scale: Fraction = ONE) -> list[float]:
    """Return the correctly rounded sum of each row of finite float64 terms [rows, n], times `scale`."""
    values: list[float] = []
    for chunk in terms.split(max(1, _CHUNK // max(1, terms.shape[1]))):
        if scale == 1 and len(chunk) >= MANY:
            values += _by_two_sum(chunk)
        else:
            values += [nearest(scale * exact_sum(row)) for row in chunk.tolist()]
    return values


def _by_two_sum(terms: Tensor) -> list[float]:
    """Compute `nearest_of_rows` by compensated sums; rows for which the test fails are summed exactly."""
    result, failed = round_compensated(*compensated_sums(terms))
    values: list[float] = result.tolist()
    for i in failed.nonzero().squeeze(1).tolist():
        values[i] = nearest(exact_sum(terms[i].tolist()))
    return values


def compensated_sums(terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s, t and e with |s + t - exact| <= e for the sum of each row of finite terms, [rows, n].

    Source: T. Ogita, S. Rump & S. Oishi, SIAM Journal on Scientific Computing 26(6), 2005.
    """
    s, n = terms, terms.shape[1]
    t = torch.zeros(len(terms), dtype=torch.float64, device=terms.device)
    size = torch.zeros_like(t)
    while s.shape[1] > 1:
        if s.shape[1] % 2:
            s = torch.nn.functional.pad(s, (0, 1))
        s, lost = two_sum(*s.split(s.shape[1] // 2, 1))
        t = t + lost.sum(1)
        size = size + lost.abs().sum(1)
    return s.sum(1), t, size * gamma(n)


def round_compensated(s: Tensor, t: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the target real numbers within e of s + t; return the values and where the test fails.

    It fails also where an end s + (t - e) or s + (t + e) rounds to a midpoint of the target in binary64,
    because such an end would be rounded twice.
    """
    low, high = s + (t - e), s + (t + e)
    result, failed = rounding_test(low, high, zeros_agree=True)
    return result + 0.0, failed | may_be_midpoint(low) | may_be_midpoint(high)


def distilled(terms: list[float]) -> list[float]:
    """Return a few numbers, the largest first, whose sum is exactly that of finite binary64 terms.

    `math.fsum` rounds the exact sum correctly (Shewchuk, Discrete & Computational Geometry 18, 1997). What
    remains is a sum again, 2^53 times smaller; this is repeated until nothing remains.
    """
    terms, numbers = list(terms), []
    while (part := math.fsum(terms)) != 0:
        numbers.append(part)
        terms.append(-part)
    return numbers


def exact_sum(terms: list[float]) -> Fraction:
    """Return the exact sum of finite binary64 numbers."""
    return sum(map(Fraction, distilled(terms)), Fraction(0))
