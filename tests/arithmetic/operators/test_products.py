"""Tests of products of many numbers, which are rounded once, against fractions."""

from __future__ import annotations

import ctypes
import math
import operator
from fractions import Fraction
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics import formats, rounding
from reproml.arithmetic.operators import products
from tests.arithmetic.forms import agree, reference, with_threads
from verification.oracle import Real, check, rounding_to, same_bits

# The product of all three is 1 + 3 * 2^-24 - 2^-70, which binary64 rounds to a midpoint.
BESIDE_MIDPOINT = [1 + 2.0**-23, 1 + 2.0**-23, 1 - 2.0**-24]


def exact(factors: list[float]) -> Real:
    return Real(math.prod(map(Fraction, factors)))


def prefixes(row: list[float]) -> list[Real]:
    return [Real(v) for v in accumulate(map(Fraction, row), operator.mul)]


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
        "midpoints": torch.tensor(BESIDE_MIDPOINT)[torch.randint(0, 3, (60, 12))],
    }
    return kinds[kind]


@pytest.mark.parametrize("path", ["compiled", "reference"])
@pytest.mark.parametrize(
    "kind", ["integers", "halves", "below 1", "large", "powers of two", "many bits", "midpoints"]
)
def test_products_are_rounded_once(kind, path, monkeypatch):
    if path == "reference":
        monkeypatch.setattr(kernels, "library", None)
    x = numbers(kind)
    with reproml.exact():
        check(x.prod(1), of_rows(x, exact), any_zero=True)
        check(x.cumprod(1), of_rows(x, prefixes), any_zero=True)
        index = torch.arange(60).repeat_interleave(12)
        found = torch.ones(60).scatter_reduce(0, index, x.flatten(), "prod")
    check(found, of_rows(x, exact), any_zero=True)


@pytest.mark.parametrize("path", ["compiled", "reference"])
def test_ties_need_no_fractions(path, monkeypatch):
    def refused(*args: Any) -> None:
        raise AssertionError

    x = numbers("integers")
    values = [abs(int(y.v)) for row in of_rows(x, prefixes) for y in row]
    assert sum((n // (n & -n)).bit_length() == 25 for n in values) > 5
    monkeypatch.setattr(rounding, "_overwrite_failures", refused)
    monkeypatch.setattr(products, "exact_product", refused)
    if path == "reference":
        monkeypatch.setattr(kernels, "library", None)
    with reproml.exact():
        x.cumprod(1)


FACTORS = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0, 3.0, 2.0**-149]),
    st.sampled_from(BESIDE_MIDPOINT),
    st.integers(-99, 99).map(lambda n: n / 8),
    st.floats(width=32),
    st.floats(0.5, 2.0, width=32),
)


@pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_loop_gives_bits_of_reference_path(dtype, data):
    """Rows in groups of eight and in parts, along each axis, with all kinds of numbers."""
    shape = data.draw(st.sampled_from([(3, 5), (9, 7, 2), (2, 67), (130,), (1, 66, 11), (17, 1)]))
    kinds = data.draw(st.lists(FACTORS, min_size=1, max_size=12))
    index = torch.randint(len(kinds), shape, generator=torch.Generator().manual_seed(len(kinds)))
    x = torch.tensor(kinds)[index].to(dtype).float()
    with formats.rounding_to(dtype):
        for dim in range(x.dim()):
            agree(products.prod, x, dim)
            agree(products.cumprod, x, dim)
        agree(products.prod, x)
        agree(products.cumprod, x.mT if x.dim() > 1 else x[::3], 0)
        at = torch.arange(x.numel()) * 7 % 11
        agree(products.segment_product, at, x.flatten(), 13)


@pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
def test_loop_takes_threads():
    x = torch.randn(700, 90)
    with_threads(products.prod, x, 1)
    with_threads(products.cumprod, x, 1)
    with_threads(products.cumprod, x.flatten(), 0)


@pytest.mark.parametrize("shape", [(5, 9), (3, 90), (7, 4, 6)])
@pytest.mark.parametrize("running", [False, True])
def test_what_the_loop_reports_is_multiplied_exactly(running, shape, monkeypatch):
    x = torch.rand(shape) + 0.5
    function = products.cumprod if running else products.prod
    expected = reference(function, x, 1).contiguous()
    wrong = [0, 1, expected.numel() - 1]

    def loop(outer: int, n: int, inner: int, x: int, running: bool, out: int, *rest: Any) -> int:
        ctypes.memmove(out, expected.data_ptr(), expected.nbytes)
        for i, at in enumerate(wrong):
            ctypes.c_float.from_address(out + 4 * at).value = math.nan
            rest[0][i] = at
        return len(wrong)

    library = SimpleNamespace(reproml_row_products=loop)
    monkeypatch.setattr(kernels, "library", library)
    assert same_bits(function(x, 1), expected)
    monkeypatch.setattr(kernels, "_CAPACITY", 2)  # too many of them: all by the reference path
    assert same_bits(function(x, 1), expected)


def test_odd_bits():
    x = torch.tensor([3.0, -5.0, 0.75, 24.0, 2.0**-149, -8.0, 0.0, 2.0**24 - 1, math.inf, math.nan])
    assert products._odd_bits(x).tolist() == [2, 3, 2, 2, 0, 0, 0, 24, 0, 0]


@pytest.mark.parametrize("count", [1010, 1060, 1100, 2300])
@pytest.mark.usefixtures("path")
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


WIDE = {
    "many bits": [[x, 3.0, y] for x, y in torch.rand(300, 2, dtype=torch.float64).tolist()],
    "far": [
        [1e-200, 1e-200, 1e300],
        [1e155, 1e150, -1e4],
        [1e300, 1e300, 1e-300],
        [-1e308, 10, 0.1],
    ],
    "subnormal": [
        [5e-324, 1, 1.5],
        [5e-324, -0.5, 3],
        [3e-308, 0.1, 0.7],
        [2.0**-600, 2.0**-475, 3],
    ],
    "ties": [
        [2.0**27 + 1, 2.0**26 + 1, 1],
        [2.0**53 - 1, 2.0**1000, 2.0**-1074],
        [3, 2.0**-1074, 0.5],
    ],
    "long": torch.randn(3, 200, dtype=torch.float64).tolist(),
}


@pytest.mark.parametrize("bits", [60, 160])
@pytest.mark.parametrize("kind", WIDE)
def test_products_are_rounded_once_to_binary64(kind, bits, monkeypatch):
    """With 60 bits instead of 160 many products fail the test and are multiplied exactly."""
    monkeypatch.setattr(products, "_BITS", bits)
    x = torch.tensor(WIDE[kind], dtype=torch.float64)
    with reproml.exact(), rounding_to(torch.float64):
        check(x.prod(1), of_rows(x, exact))
        check(x.prod(), exact(x.flatten().tolist()))
        check(x.cumprod(1), of_rows(x, prefixes))


def test_zeros_and_infinities_in_binary64_are_those_of_ieee_754():
    values = torch.tensor(
        [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, math.nan], dtype=torch.float64
    )
    x = torch.cartesian_prod(values, values, values)
    special = (x[:, 0] * x[:, 1] * x[:, 2]).tolist()
    native = x.cumprod(1)
    with reproml.exact():
        found, running = x.prod(1), x.cumprod(1)
        assert x[:, :0].prod(1).tolist() == [1.0] * len(x)
    assert same_bits(found, x.new_tensor(special)) and same_bits(running, native)


def test_many_factors_in_binary64_take_no_quadratic_time(monkeypatch):
    """A product of n numbers has 53 n bits, but no product here needs them all."""
    monkeypatch.setattr(products, "exact_product", None)
    x = 1 + torch.rand(1500, dtype=torch.float64) * 1e-3 - 0.0005
    with reproml.exact():
        running, total = x.cumprod(0), x.prod()
    assert running[-1] == total
    with rounding_to(torch.float64):
        check(total, exact(x.tolist()))


@pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
def test_many_factors_of_many_indices_need_no_fractions(monkeypatch):
    x = (1 + torch.randn(90000, generator=torch.Generator().manual_seed(1)) * 1e-3).reshape(
        60, 1500
    )
    index = torch.arange(60).unsqueeze(1).expand(x.shape).T.reshape(-1)
    expected = of_rows(x, exact)
    monkeypatch.setattr(products, "exact_product", None)
    with reproml.exact():
        found = torch.ones(70).scatter_reduce(0, index, x.T.reshape(-1), "prod")
    check(found[:60], expected)
    assert found[60:].eq(1).all()
