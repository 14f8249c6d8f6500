"""Products of bfloat16 and float16 matrices against exact sums, with vectors of every width."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

import reproml
from reproml.arithmetic.numerics import formats
from reproml.arithmetic.operators import matmul
from tests.arithmetic import forms
from verification import oracle
from verification.oracle import Real, check, same_bits

DTYPES = [torch.bfloat16, torch.float16]
KINDS = [*forms.KINDS, "midpoints", "tiny", "huge", "zeros"]
SHAPES = [
    (5, 1, 7),
    (8, 16, 16),
    (9, 17, 33),
    (24, 33, 49),
    (6, 260, 17),
    (17, 40, 150),
    (5, 2070, 6),
]
SCALE = 2**140  # every finite number of both dtypes is a multiple of 1 / SCALE


@pytest.fixture(params=["reference", 2, 4, 8], autouse=True, ids=str)
def path(request, monkeypatch):
    with forms.path_of_products(request.param, monkeypatch, *DTYPES):
        yield


def factors(kind, dtype, m, k, n):
    """Return two matrices and a bias of the dtype."""
    to = formats.FORMATS[dtype]
    names = ("normal", *forms.KINDS)
    a, b, c = (
        forms.numbers(shape, kind if kind in names else "normal", seed)
        for seed, shape in enumerate(((m, k), (n, k), (n,)))
    )
    if kind == "midpoints":  # one large product and halves of its ulp
        a, b, c = torch.round(4 * a) * 2.0 ** -(to.precision + 1), torch.round(b), torch.round(c)
        a[:, 0], b[:, 0] = 1.0, 1.0
    if kind == "tiny":  # products are near the smallest numbers of the format, and below
        a, b, c = a * 2.0 ** (to.lowest // 2), b * 2.0 ** (to.lowest // 2), c * 2.0**to.lowest
    if kind == "huge":  # sums overflow
        a, b, c = (
            a * 2.0 ** (to.top // 2 - 1),
            b * 2.0 ** (to.top // 2 - 2),
            c * 2.0 ** (to.top - 3),
        )
    if kind == "zeros":
        a[::2], b[1::3] = 0.0, 0.0
    limit = torch.finfo(dtype).max
    return [x.clamp(-limit, limit).to(dtype) for x in (a, b.t(), c)]


@cache
def exact_product(kind, dtype, m, k, n):
    """Return the exact products without and with the bias, summed in integers."""

    def integers(x):
        pairs = map(float.as_integer_ratio, x.double().flatten().tolist())
        ints = np.empty(x.numel(), dtype=object)
        ints[:] = [p * (SCALE // q) for p, q in pairs]
        return ints.reshape(x.shape)

    a, b, c = map(integers, factors(kind, dtype, m, k, n))
    product = a.dot(b)
    real = np.vectorize(lambda v: Real(Fraction(int(v), SCALE**2)), otypes=[object])
    return real(product), real(product + c * SCALE)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_rounded_once(dtype, kind, shape):
    a, b, c = factors(kind, dtype, *shape)
    expected = exact_product(kind, dtype, *shape)
    with oracle.rounding_to(dtype), reproml.exact():
        for x in (a, a.t().contiguous().t()):
            for y in (b, b.contiguous()):
                check(x @ y, expected[0])
                check(torch.addmm(c, x, y), expected[1])
        check((b.t() @ a.t()).t(), expected[0])
        both = torch.stack([a, a]), torch.stack([b, b])
        check(torch.bmm(*both)[1], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_without_terms_is_positive_zero(dtype):
    with reproml.exact():
        found = torch.ones(9, 0, dtype=dtype) @ torch.ones(0, 20, dtype=dtype)
    assert same_bits(found, torch.zeros(9, 20, dtype=dtype))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_operands_match_binary64(dtype, count, value):
    a, b = torch.ones(40, 30, dtype=dtype), torch.ones(30, 50, dtype=dtype)
    a[:count, 3], b[5, :count] = value, -value
    with reproml.exact():
        found = a @ b
    assert same_bits(found, (a.double() @ b.double()).to(dtype))


@pytest.mark.parametrize("value", [1 + 2.0**-23, 2.0**60, 3.0e38, 2.0**-149, 2.0**-100])
@pytest.mark.parametrize("side", [0, 1])
def test_operand_with_more_bits_is_used_exactly(value, side):
    """An in-place form multiplies float32 numbers, and rounds to the dtype that it writes."""
    random = torch.Generator().manual_seed(5)
    sides = [torch.randn(s, generator=random).bfloat16().float() for s in ((9, 40), (40, 21))]
    sides[side][3, 7] = value
    a, b = sides
    with formats.rounding_to(torch.bfloat16):
        found = matmul.matmul(a, b)
    terms = [
        [[Real(x) * Real(y) for x, y in zip(r, c)] for c in b.t().tolist()] for r in a.tolist()
    ]
    expected = np.array([[oracle.total(t) for t in row] for row in terms], dtype=object)
    with oracle.rounding_to(torch.bfloat16):
        check(found.bfloat16(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_independent_of_threads(dtype):
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(s, generator=random).to(dtype) for s in ((3, 70, 90), (3, 90, 80)))

    def product():
        with reproml.exact():
            return a @ b

    forms.with_threads(product)
