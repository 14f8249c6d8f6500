"""Test that sums and matrix products are rounded once, for every size, order, layout and path."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml.arithmetic.numerics import exact_sums
from reproml.arithmetic.operators import linalg, matmul, reductions
from tests.arithmetic import forms
from tests.arithmetic.strategies import ANY, FINITE, LAYOUTS, SMALL_INTEGERS, lay_out, tensors
from verification.oracle import Real, check, reals, same_bits, total

few = settings(max_examples=25)


@pytest.fixture(params=["reference", 2, 4, 8], autouse=True, ids=lambda x: f"{x}")
def path(request, monkeypatch):
    with forms.path_of_products(request.param, monkeypatch, torch.float32):
        yield


def exact_product(a, b, bias=None):
    """Return a b + bias, computed in integers, which is faster than fractions for matrices of one scale."""
    scaled = [(x.double() * 2.0**60).numpy() for x in (a, b)]
    integers = [
        np.vectorize(int, otypes=[object])(x) if x.size else x.astype(object) for x in scaled
    ]
    c = integers[0].dot(integers[1])
    out = np.empty(c.shape, dtype=object)
    for i in np.ndindex(c.shape):
        value = Fraction(int(c[i]), 2**120)
        if bias is not None:
            value += Fraction(float(bias.expand(c.shape)[i]))
        out[i] = Real(value)
    return out


@pytest.mark.parametrize("kind", ["ties", "cancelling", "integers", "normal"])
@pytest.mark.parametrize("bias", [False, "row", "matrix", "column"])
def test_product_is_rounded_once(kind, bias):
    """Many of the elements fail the rounding test at the same time, so that every path is taken."""
    random = torch.Generator().manual_seed(3)
    m, k, n = (19, 40, 17) if bias == "column" else (17, 40, 19)
    if kind == "integers":
        a, b = (torch.randint(-4, 5, s, generator=random).float() for s in ((m, k), (k, n)))
        c = torch.randint(-4, 5, (n,), generator=random).float()
    else:
        a, b = (torch.randn(s, generator=random) for s in ((m, k), (k, n)))
        c = torch.randn(n, generator=random)
    if kind == "ties":  # one large product and halves of its ulp
        a = torch.round(a * 4) * 2.0**-25
        b = torch.round(b)
        a[:, 0], b[0] = 1.0, 1.0
        c = torch.round(c) * 2.0**-25
    if kind == "cancelling":  # row times column is almost 0
        a, b = torch.cat([a, -a * (1 + 2.0**-23)], 1), torch.cat([b, b], 0)
        c = c * 2.0**-40
    if bias == "matrix":
        c = c[torch.arange(m * n) % n].view(m, n) * torch.arange(m).unsqueeze(1)
    if bias == "column":
        c = c[torch.arange(m) % n].unsqueeze(1)
    expected = exact_product(a, b, c if bias else None)
    found = matmul.matmul(a, b, c if bias else None)
    check(found, expected)
    for layout in LAYOUTS:
        assert same_bits(
            found, matmul.matmul(lay_out(a, layout), lay_out(b, layout), c if bias else None)
        )


@pytest.mark.parametrize("bias", [False, True])
def test_sums_that_binary64_holds_are_rounded_once(bias):
    """Masses of ties of whole numbers, and lines beside them whose sums binary64 does not hold."""
    random = torch.Generator().manual_seed(5)
    a = torch.randint(-8, 9, (17, 300), generator=random).float()
    a[:, 0], a[:, 1] = 2.0**24, torch.randint(0, 4, (17,), generator=random)
    b = 2.0 ** torch.randint(0, 2, (300, 49), generator=random)
    a[3] *= 2.0**-30
    a[4] = 0
    a[5] *= 2.0**100  # overflows
    b[7, 6] = 2.0**-40
    b[:, 7] = torch.randn(300, generator=random)
    b[:, 8] = torch.where(torch.arange(300) % 2 == 0, 1 + 2.0**-23, 2.0**-25)
    c = torch.randint(-4, 5, (49,), generator=random).float() if bias else None
    check(matmul.matmul(a, b, c), exact_product(a, b, c))
    check(matmul.matmul(b.t(), a.t()), exact_product(b.t(), a.t()))


@pytest.mark.parametrize("k", [3, 20, 300, 600, 5000])
@pytest.mark.parametrize("tail", [-52, -53, -54, -60])
def test_sums_just_beside_a_tie_are_not_taken_for_exact(k, tail):
    """1 + 2^-24, and a last term that binary64 loses, wherever it stands."""
    for at in {2, k // 2, k - 1} - {0, 1}:
        for sign, expected in ((1, 1 + 2.0**-23), (-1, 1.0)):
            a, b = torch.zeros(17, k), torch.ones(k, 49)
            a[:, 0], a[:, 1], a[:, at] = 1, 2.0**-24, sign * 2.0**tail
            assert (matmul.matmul(a, b) == expected).all()
            assert (matmul.matmul(b.t().contiguous(), a.t()) == expected).all()


@pytest.mark.parametrize("failing", [0.05, 0.6])
def test_rows_that_fail_together_are_rounded_once(failing):
    """Few or many elements of a tile fail, in several slices of terms and in tiles that are not full."""
    random = torch.Generator().manual_seed(4)
    m, k, n = 19, 300, 29
    a, b = (torch.randn(s, generator=random) for s in ((m, k), (k, n)))
    columns = torch.rand(n, generator=random) < failing
    b = torch.where(
        columns, b, b * 0
    )  # the products with these columns are almost 0, the others are not
    b = torch.cat([b, b + 2.0**-10 * ~columns])
    a, c = torch.cat([a, -a * (1 + 2.0**-23)], 1), torch.randn(n, generator=random) * 2.0**-40
    for bias in (None, c):
        expected = exact_product(a, b, bias)
        check(matmul.matmul(a, b, bias), expected)
        if bias is None:
            check(matmul.matmul(b.t(), a.t()), expected.T)


@pytest.mark.parametrize(
    "m, n", [(1, 1), (8, 24), (9, 25), (3, 48), (17, 31), (40, 7), (4, 5), (2, 485)]
)
@pytest.mark.parametrize("k", [1, 7, 100, 447, 448, 453, 1024, 1025, 2100])
def test_every_tile_shape_matches_reference(path, monkeypatch, m, n, k):
    """All layouts of both factors are compared with PyTorch's own kernels for binary64."""
    random = torch.Generator().manual_seed(m * n * k)
    a, b, c = (torch.randn(s, generator=random) for s in ((m, k), (k, n), (n,)))
    a[:, ::3] = 0.0
    expected = matmul._reference(a, b, None), matmul._reference(a, b, c)
    for x in (a, a.t().contiguous().t(), a.repeat(1, 2)[:, :k]):
        for y in (b, b.t().contiguous().t(), b.repeat(1, 2)[:, n:]):
            assert same_bits(matmul.matmul(x, y), expected[0])
            assert same_bits(matmul.matmul(x, y, c), expected[1])


@pytest.mark.parametrize("m, k, n", [(3, 40, 70), (70, 40, 3), (12, 500, 12), (1, 9, 1)])
def test_matrix_is_added_to_each_product_of_a_batch(m, k, n):
    draw = torch.Generator().manual_seed(4)
    shapes = (2, 3, m, k), (2, 3, k, n), (2, 3, m, n)
    a, b, c = (torch.randint(-9, 9, s, generator=draw).float() for s in shapes)
    c = c + 2.0**24  # midpoints
    a[0, 0, 0], c[0, 1, 0, 0], c[0, 2, 0, 0] = 0.0, torch.inf, torch.nan
    found = matmul.matmul(a, b, c)
    expected = a.double() @ b.double() + c.double()
    assert same_bits(found, expected.float())
    one = matmul.matmul(a, b, c[1:, :1])
    assert same_bits(one, (a.double() @ b.double() + c[1:, :1].double()).float())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_result_is_independent_of_threads(path, threads):
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(s, generator=random) for s in ((3, 70, 90), (3, 90, 80)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_bits(matmul.matmul(a, b), matmul._reference(a, b, None))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("count", [1, 30])
def test_non_finite_operands_match_binary64(value, count):
    """The kernel's list of failures holds them in one case and overflows in the other."""
    a, b = torch.ones(40, 30), torch.ones(30, 50)
    a[:count, 3] = value
    b[5, :count] = -value
    expected = (a.double() @ b.double()).float()
    assert same_bits(matmul.matmul(a, b), expected)


@few
@given(st.data())
def test_result_is_independent_of_summation_order(data):
    m, k, n = (data.draw(st.integers(1, 5)) for _ in range(3))
    a, b = data.draw(tensors((m, k), FINITE)), data.draw(tensors((k, n), FINITE))
    at = torch.tensor(data.draw(st.permutations(range(k))))
    assert same_bits(matmul.matmul(a, b), matmul.matmul(a[:, at], b[at]))
    assert same_bits(matmul.matmul(a, b), matmul.matmul(b.t(), a.t()).t())


@few
@given(st.data())
def test_result_is_independent_of_batch(data):
    a, b = data.draw(tensors((3, 4, 5), FINITE)), data.draw(tensors((3, 5, 2), FINITE))
    product = matmul.matmul(a, b)
    for i in range(3):
        assert same_bits(product[i], matmul.matmul(a[i], b[i]))
        assert same_bits(product[i, :1], matmul.matmul(a[i, :1], b[i]))


@few
@given(st.sampled_from([(0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 0, 0)]))
def test_empty_product_is_positive_zero(shape):
    m, k, n = shape
    assert same_bits(matmul.matmul(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))
    assert same_bits(matmul.matmul(torch.ones(0, m, k), torch.ones(0, k, n)), torch.zeros(0, m, n))
    minus = torch.full((n,), -0.0)
    assert same_bits(matmul.matmul(torch.ones(m, k), torch.ones(k, n), minus), torch.zeros(m, n))


@pytest.mark.parametrize("a, b", [((3, 2, 2), (2, 2, 2)), ((3, 4, 4), (1, 4, 4)), ((2, 3), (2, 3))])
def test_incompatible_shapes_raise_runtime_error(a, b):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul.matmul(torch.ones(a), torch.ones(b))


def test_meta_tensor_raises_runtime_error():
    with pytest.raises(RuntimeError):
        matmul.matmul(torch.ones(2, 2), torch.ones(2, 2, device="meta"))


@few
@given(tensors((4, 6), ANY))
def test_reduce_sum_is_rounded_once(x):
    a = reals(x)
    check(reductions.reduce_sum(x, ()), total(a))
    check(reductions.reduce_sum(x, (0,)), [total(c) for c in a.T])
    check(reductions.reduce_sum(x, (1,), keepdim=True), [[total(r)] for r in a])
    check(reductions.reduce_sum(x, (-1,), divisor=3), [total(r) / 3 for r in a])
    check(reductions.reduce_sum(x, (1,), y=x.flip(0)), [total(r * s) for r, s in zip(a, a[::-1])])


@pytest.mark.parametrize("scale", [1, Fraction(1, 3), Fraction(-5, 7)])
def test_nearest_of_rows_is_rounded_once(scale):
    """The numbers of rows are below and above the limit for compensated sums."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 9, generator=random).double()
    rows[::2, 1] = -rows[::2, 0]
    rows[1::3] = torch.round(rows[1::3] * 4) * 2.0**-25 + torch.tensor([1.0] + [0.0] * 8)
    rows[5::7] *= 2.0**-140
    rows[::11] = 0.0
    rows[3::11] *= -0.0
    expected = [Real(sum(map(Fraction, r), Fraction(0)) * scale) for r in rows.tolist()]
    for part in (rows, rows[:5]):
        found = torch.tensor(exact_sums.nearest_of_rows(part, scale))
        check(found, expected[: len(part)])


@few
@given(tensors((70, 7), SMALL_INTEGERS), st.sampled_from([2.0**-24, 2.0**-150, 1.0]))
def test_nearest_of_rows_rounds_ties_to_even(x, unit):
    """The terms are 1 and integer multiples of half an ulp, so about half of all sums are ties."""
    terms = x.double() * unit
    terms[:, 0] += 1
    found = torch.tensor(exact_sums.nearest_of_rows(terms))
    check(found, [Real(sum(map(Fraction, r), Fraction(0))) for r in terms.tolist()])


def test_product_with_huge_exponent_range():
    values = torch.tensor([3.4e38, -3.4e38, 1e-45, 1.0, 2.0**-24, -1.0])
    a = torch.stack([values.roll(i) for i in range(6)])
    b = torch.stack([values.flip(0).roll(i) for i in range(6)])
    expected = [[total(x * y) for y in reals(b.t())] for x in reals(a)]
    check(matmul.matmul(a, b), expected)


SETTINGS = [
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"},
    {"OMP_NUM_THREADS": "2", "MKL_CBWR": "COMPATIBLE", "REPROML_KERNELS": "off"},
]
PROGRAM = """
import hashlib, torch, reproml
torch.manual_seed(0)
with reproml.exact():
    model = torch.nn.Sequential(torch.nn.Linear(70, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        x, y = torch.rand(64, 70), torch.randint(0, 10, (64,))
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    print(reproml.digest(model), loss.item().hex(), (torch.randn(40000) * 3).exp().sum().item().hex())
"""


def test_training_is_independent_of_threads_and_instructions(path, request):
    if "[8]" not in request.node.name:
        return  # run once; SETTINGS select the kernels
    lines = set()
    for setting in SETTINGS:
        environment = {**os.environ, **setting}
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        lines.add(result.stdout)
    assert len(lines) == 1


def outer_sum(x, a, b, alpha=1):
    """Return x + alpha a b in real numbers; an exact zero is +0."""
    rows, columns, terms = reals(a), reals(b), reals(x)
    out = np.empty((len(a), len(b)), dtype=object)
    for i, j in np.ndindex(out.shape):
        value = terms[i, j] + rows[i] * columns[j] * Real(float(torch.tensor(alpha)))
        out[i, j] = Real(0) if value.v == 0 else value
    return out


@pytest.mark.parametrize("scale", [1.0, 2.0**-24, 2.0**-75, 2.0**60])
@pytest.mark.parametrize("alpha", [1, 0.3])
def test_added_outer_product_is_rounded_once(scale, alpha):
    random = torch.Generator().manual_seed(5)
    a, b = (torch.randint(-4, 5, (n,), generator=random) * scale for n in (9, 11))
    x = torch.randint(-(2**24), 2**24, (9, 11), generator=random).float()
    x[0], x[1], x[2] = -0.0, -a[1] * b, 1.0
    check(matmul.addr(x, a, b, alpha=alpha), outer_sum(x, a, b, alpha))
    limits = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -0.0])
    check(matmul.addr(x[:5, :5], limits, limits), outer_sum(x[:5, :5], limits, limits))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vector_with_bias_is_rounded_once(layout):
    random = torch.Generator().manual_seed(6)
    a = lay_out(torch.randint(-9, 10, (5, 40), generator=random).float(), layout)
    b, bias = (torch.randint(-9, 10, (n,), generator=random) * 2.0**-20 for n in (40, 5))
    check(matmul.addmv(bias, a, b), exact_product(a, b[:, None], bias[:, None])[:, 0])
    check(matmul.addmv(bias[:1], a, b), exact_product(a, b[:, None], bias[:1])[:, 0])


TRIPLES = {  # the numbers of x, y and z, drawn from -20 to 19
    "normal": (1, 1, 1),
    "whole": (1, 1, 1),
    "one underflows": (2.0**-70, 2.0**-70, 1),
    "all underflow": (2.0**-149, 2.0**-149, 2.0**-149),
    "subnormal": (2.0**-60, 2.0**-70, 2.0**-14),
    "small beside large": (2.0**100, 2.0**-100, 2.0**-3),
    "large": (2.0**100, 2.0**20, 2.0**-100),
    "overflow": (2.0**110, 2.0**110, 2.0**110),
    "zero": (2.0**110, 0, 2.0**110),
}


@pytest.mark.parametrize("kind", TRIPLES)
@pytest.mark.parametrize("axes", [(1, 2), (0, 2), (-1,), (), (0, 1, 2)])
def test_sum_of_triple_products_is_rounded_once(kind, axes):
    random = torch.Generator().manual_seed(7)
    shapes = [(3, 4), (3, 5), (4, 5)]
    draw = [
        torch.randn(s, generator=random)
        if kind == "normal"
        else torch.randint(-20, 20, s, generator=random).float()
        for s in shapes
    ]
    x, y, z = (t * scale for t, scale in zip(draw, TRIPLES[kind]))
    if kind == "small beside large":
        x[0], x[1], y[2] = x[0] * 2.0**-200, x[1] * 2.0**-240, y[2] * 2.0**-40
    a, b, c = (reals(t) for t in (x, y, z))
    terms = a[:, :, None] * b[:, None, :] * c[None]
    kept = [n for n in range(3) if n not in [i % 3 for i in axes]]
    rows = terms.transpose(kept + [i % 3 for i in axes])
    expected = np.empty([3 * (n == 0) or 4 * (n == 1) or 5 for n in kept], dtype=object)
    for at in np.ndindex(expected.shape):
        value = total(np.ravel(rows[at]))
        expected[at] = Real(0) if value.v == 0 else value
    check(linalg.trilinear(x, y, z, [2], [1], [0], list(axes)), expected)


def test_sum_of_infinite_triple_products():
    x = torch.tensor([[1.0, math.inf], [0, 2], [3, 4], [math.nan, 5]])
    y, z = torch.tensor([[1.0, 0, -1], [2, 3, math.inf]]), torch.tensor([[1.0, 0.1, 2]])
    # The sum over j and k of x[i, j] y[j, k] z[k].
    found = linalg.trilinear(x, y, z, [2], [0], [1], [1, 2])
    wide = (x.double()[:, :, None] * y.double() * z.double()).sum((1, 2))
    assert same_bits(found, torch.where(wide.isnan(), torch.nan, wide).float())
