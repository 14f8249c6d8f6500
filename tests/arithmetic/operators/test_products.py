"""Tests of products of many numbers, which are rounded once, against fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reproml
from reproml.arithmetic.numerics import rounding
from reproml.arithmetic.operators import products
from verification.oracle import Real, check


def exact(factors: list[float]) -> Real:
    return Real(math.prod(map(Fraction, factors)))


def prefixes(row: list[float]) -> list[Real]:
    return [exact(row[: i + 1]) for i in range(len(row))]


def of_rows(x: Tensor, function: Any) -> Any:
    return np.array([function(row) for row in x.tolist()], dtype=object)


def numbers(kind: str) -> Tensor:
    torch.manual_seed(0)
    whole = torch.randint(1, 20, (60, 12)) * torch.tensor([1.0, -1.0] * 6)
    kinds: dict[str, Tensor] = {
        "integers": whole,
        "halves": whole / 2,
        "below 1": whole * 2.0**-14,  # subnormal products
        "large": whole * 2.0**10,  # overflow
        "powers of two": 2.0 ** torch.randint(-15, 15, (60, 12)),
        "many bits": torch.randn(60, 12),
    }
    return kinds[kind]


@pytest.mark.parametrize(
    "kind", ["integers", "halves", "below 1", "large", "powers of two", "many bits"]
)
def test_products_are_rounded_once(kind):
    x = numbers(kind)
    with reproml.exact():
        check(x.prod(1), of_rows(x, exact), any_zero=True)
        check(x.cumprod(1), of_rows(x, prefixes), any_zero=True)
        index = torch.arange(60).repeat_interleave(12)
        found = torch.ones(60).scatter_reduce(0, index, x.flatten(), "prod")
    check(found, of_rows(x, exact), any_zero=True)


def test_ties_need_no_fractions(monkeypatch):
    def refused(*args: Any) -> None:
        raise AssertionError

    x = numbers("integers")
    values = [abs(int(y.v)) for row in of_rows(x, prefixes) for y in row]
    assert sum((n // (n & -n)).bit_length() == 25 for n in values) > 5
    monkeypatch.setattr(rounding, "_overwrite_failures", refused)
    with reproml.exact():
        x.cumprod(1)


def test_odd_bits():
    x = torch.tensor([3.0, -5.0, 0.75, 24.0, 2.0**-149, -8.0, 0.0, 2.0**24 - 1, math.inf, math.nan])
    assert products._odd_bits(x).tolist() == [2, 3, 2, 2, 0, 0, 0, 24, 0, 0]


@pytest.mark.parametrize("count", [1010, 1060, 1100, 2300])
def test_many_factors_of_one_index_keep_their_bits(count):
    """The product of as many numbers between 1/2 and 1 is subnormal in binary64, or 0."""
    torch.manual_seed(count)
    x = 1 + torch.randint(0, 2**12, (count,)) * 2.0**-23
    index = torch.zeros(count, dtype=torch.int64)
    with reproml.exact():
        found = torch.ones(1).scatter_reduce(0, index, x, "prod")
        check(found, np.array([exact(x.tolist())]))
        x[5], x[7] = 0.0, -1.0
        zero = torch.ones(1).scatter_reduce(0, index, x, "prod")
    assert zero.item() == 0 and math.copysign(1, zero.item()) == -1
