"""Results in binary64: products, sums and functions that are hard to round, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any
from unittest.mock import Mock

import mpmath
import pytest
import torch

import reproml
from reproml.arithmetic.compiler import evaluate, kernels, pair_arrays
from reproml.arithmetic.numerics.formats import rounding_to
from reproml.arithmetic.numerics.rationals import Rationals
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.operators import matmul

pytestmark = pytest.mark.usefixtures("path")

HARD = [
    [1.0, 2.0**-53],  # a tie
    [1.0, 2.0**-53, 2.0**-1074],  # just above one
    [1.0 + 2.0**-52, 2.0**-53, -(2.0**-1074)],
    [1e308, 1e308, -1e308],  # overflows on the way
    [1e308, 1e308],
    [2.0**1023, 2.0**1023 - 2.0**970, 2.0**969],  # between the largest number and the overflow
    [2.0**-1074, 2.0**-1074, -(2.0**-1074)],
    [1e300, 1.0, -1e300, 1e-300],
    [3.0, -3.0, 0.0],
]


def exact(terms: list[Fraction]) -> float:
    with rounding_to(torch.float64):
        return nearest(sum(terms, Fraction(0)))


@pytest.mark.parametrize("terms", HARD, ids=range(len(HARD)))
def test_sums_are_rounded_once(terms):
    x = torch.tensor(terms, dtype=torch.float64)
    with reproml.exact():
        found = x.sum().item(), x.cumsum(0)[-1].item(), (x @ torch.ones_like(x)).item()
    assert found == (exact([Fraction(t) for t in terms]),) * 3


@pytest.mark.parametrize("terms", [*HARD, [1e308, 1e308, -1e308] * 300], ids=range(len(HARD) + 1))
def test_running_sums_are_rounded_once(terms):
    x = torch.tensor([terms, [-t for t in terms]], dtype=torch.float64)
    with reproml.exact():
        found = x.cumsum(1).tolist()
    for row, sums in zip(x.tolist(), found):
        total = Fraction(0)
        for t, y in zip(row, sums):
            total += Fraction(t)
            assert y == exact([total])


def test_running_sums_of_a_row_are_computed_together(monkeypatch):
    """[a, a, -a, ...] overflows in pairs at most elements, each of which may not sum its whole prefix."""
    counted = Mock(wraps=Rationals.of_floats)
    monkeypatch.setattr(Rationals, "of_floats", counted)
    x = torch.tensor([[1e308, 1e308, -1e308] * 20, [math.inf, 1.0, -1.0] * 20], dtype=torch.float64)
    with reproml.exact():
        x.cumsum(1)
    assert [len(call.args[0]) for call in counted.call_args_list] == [60]


def test_running_sums_after_an_infinity_are_limits():
    row = [1e308, 1e308, 2.5, math.inf, -1.0, math.inf, -math.inf, 1.0]
    x = torch.tensor(row, dtype=torch.float64)
    with reproml.exact():
        found = x.cumsum(0).tolist()
    assert found[:6] == [1e308] + [math.inf] * 5 and all(map(math.isnan, found[6:]))


@pytest.mark.parametrize(
    "dtype, values",
    [
        (torch.uint64, [2**63 + 1025, 2**64 - 1, 1]),
        (torch.int64, [-(2**63), 1025, 2**62 + 257, -1]),
        (torch.int32, [-5, 2**31 - 1]),
        (torch.bool, [True, False, True]),
    ],
)
def test_sums_of_integers_are_rounded_once(dtype, values):
    x = torch.tensor([values, values[::-1]], dtype=dtype)
    with reproml.exact():
        found = (
            x.sum(1, dtype=torch.float64),
            x.sum(dtype=torch.float64),
            x[:, 0].sum(dtype=torch.float64),
        )
    assert found[0].tolist() == [float(sum(values))] * 2 and found[1] == float(2 * sum(values))
    assert found[2] == float(values[0] + values[-1])


def numbers(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    scale = torch.randint(-600, 500, shape, generator=generator)
    return torch.where(scale % 3 == 0, torch.ldexp(x, scale), x)


@pytest.mark.parametrize("alpha, beta", [(1, 1), (0.3, -1.7)])
def test_products_are_rounded_once(alpha, beta):
    """The factors span the exponents, so that some products underflow and others overflow."""
    a, b, bias = numbers(1, 9, 5), numbers(2, 5, 11), numbers(3, 11)
    with reproml.exact():
        found = torch.addmm(bias, a, b, alpha=alpha, beta=beta)
    for i in range(9):
        for j in range(11):
            terms = [Fraction(x) * Fraction(y) for x, y in zip(a[i].tolist(), b[:, j].tolist())]
            last = Fraction(beta) * Fraction(bias[j].item())
            assert found[i, j].item() == exact([*[Fraction(alpha) * t for t in terms], last])


def test_cancelling_products_are_rounded_once():
    a, b = numbers(4, 20, 30), torch.rand(30, 1, dtype=torch.float64)
    a = torch.cat([a, -a, torch.full((20, 1), 2.0**-700)], 1)
    b = torch.cat([b, torch.nextafter(b, torch.ones_like(b)), torch.full((1, 1), 2.0**-374)])
    with reproml.exact():
        found = (a @ b).squeeze(1).tolist()
    for row, y in zip(a.tolist(), found):
        assert y == exact([Fraction(p) * Fraction(q) for p, q in zip(row, b[:, 0].tolist())])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("alpha, beta", [(1, 1), (0, 1), (-2, 0.5), (1, 0), (1e308, -1e300)])
def test_products_with_infinities_are_limits(alpha, beta, monkeypatch):
    kinds = [0.0, 1.0, -2.5, 1e308, 5e-324, math.inf, -math.inf, math.nan]
    values = torch.tensor(kinds, dtype=torch.float64)
    at = torch.randint(8, (3, 12, 12), generator=torch.Generator().manual_seed(0))
    a, b, bias = values[at]
    a, b = a[:, :3], b[:3]
    counted = Mock(wraps=matmul._exact_element)
    monkeypatch.setattr(matmul, "_exact_element", counted)
    with reproml.exact():
        found = torch.addmm(bias, a, b, alpha=alpha, beta=beta).flatten().tolist()
    finite = 0
    for n, y in enumerate(found):
        i, j = divmod(n, 12)
        row, column = a[i].tolist(), b[:, j].tolist()
        terms = [(alpha, p, q) for p, q in zip(row, column)]
        terms += [(beta, bias[i, j].item(), 1.0)] if beta else []
        if all(math.isfinite(v) for term in terms for v in term):
            finite += 1
            assert y == exact([Fraction(math.prod(map(Fraction, term))) for term in terms])
        else:  # the limit is that of the infinite terms and NaN
            limit = 0.0
            for term in terms:
                signs = [v if not math.isfinite(v) else (v > 0) - (v < 0) for v in term]
                limit += math.prod(signs)
            assert y == limit or (math.isnan(y) and math.isnan(limit))
    assert counted.call_count <= finite < len(found)


@pytest.mark.parametrize("name", ["sin", "cos", "exp", "log", "tanh", "expm1", "log1p"])
def test_functions_are_rounded_once(name):
    x = torch.cat([numbers(5, 60) * 20, torch.tensor([3.0, 710.0, 1e22, 2.0**-1074, 1e-160])])
    x = x.abs().double()
    with reproml.exact():
        found = getattr(torch, name)(x).tolist()
    with mpmath.workprec(2000):
        for t, y in zip(x.tolist(), found):
            value = getattr(mpmath, name)(mpmath.mpf(min(t, 1e3) if name == "expm1" else t))
            mantissa, exponent = abs(value).man_exp
            size = math.inf if abs(value) >= 2**1024 else float(mantissa * Fraction(2) ** exponent)
            wanted = math.copysign(size, value)
            assert y == wanted, (t, y, wanted)


@pytest.mark.parametrize("name", ["exp", "expm1", "sinh", "tanh", "log1p", "sin", "erf"])
def test_functions_of_smallest_numbers_do_not_vanish(name):
    x = torch.tensor(
        [5e-324, -5e-324, 1.5e-323, 3e-310, 1.0], dtype=torch.float64
    )  # 1: in one block
    with reproml.exact():
        found = torch.cat(
            [getattr(torch, name)(x), *[getattr(torch, name)(y) for y in x[:4, None]]]
        )
    assert found[:4].tolist() == found[5:].tolist()
    if name == "erf":
        assert found[:2].tolist() == [5e-324, -5e-324]
    else:
        assert found[:4].tolist() == ([1.0] * 4 if name == "exp" else x[:4].tolist())


LATER: dict[str, Any] = {  # what mpmath names them, and where they are not computed by it
    "sin": (mpmath.sin, -1e5, 1e5),
    "cos": (mpmath.cos, -1e5, 1e5),
    "tan": (mpmath.tan, -20, 20),
    "sinc": (mpmath.sincpi, -20, 20),
    "atan": (mpmath.atan, -20, 20),
    "asin": (mpmath.asin, -1, 1),
    "acos": (mpmath.acos, -1, 1),
    "erf": (mpmath.erf, -8, 8),
    "erfc": (mpmath.erfc, -8, 20),
    "erfinv": (mpmath.erfinv, -1, 1),
    "lgamma": (lambda x: mpmath.log(abs(mpmath.gamma(x))), -20, 200),
    "digamma": (mpmath.digamma, -20, 200),
    "exp2": (lambda x: mpmath.power(2, x), -20, 20),
}


@pytest.mark.parametrize("name", LATER)
def test_functions_without_multi_precision(name, monkeypatch):
    """Pairs round what is not extreme. Multi-precision would take 1,000 times as long."""
    function, low, high = LATER[name]
    x = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = low + (high - low) * x
    if kernels.library is not None:
        monkeypatch.setattr(evaluate, "_multi_precision", Mock(side_effect=AssertionError))
    with reproml.exact():
        found = getattr(torch, name)(x).tolist()
    with mpmath.workprec(400):
        assert found == [float(function(mpmath.mpf(t))) for t in x.tolist()]


def test_position_table_equals_correctly_rounded_functions():
    with reproml.exact():
        rate = 1.0 / 10000 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        table = torch.outer(torch.arange(50, dtype=torch.float64), rate).sin()
    with mpmath.workprec(300):
        for i, r in enumerate(rate.tolist()):
            for n in range(50):
                assert table[n, i].item() == float(mpmath.sin(mpmath.mpf(n * r)))


@pytest.mark.parametrize(
    "name", ["log", "log2", "log10", "log1p", "asin", "acos", "atanh", "erfinv"]
)
def test_numbers_outside_the_domain_take_no_other_path(name, monkeypatch):
    monkeypatch.setattr(evaluate, "_limit", Mock(side_effect=AssertionError))
    with reproml.exact():
        outside = getattr(torch, name)(torch.tensor([-1.5, -3.0, -1e300], dtype=torch.float64))
    assert outside.isnan().all()


def test_softmax_of_masked_rows_takes_no_other_path(monkeypatch):
    monkeypatch.setattr(evaluate, "exact_rows", Mock(side_effect=AssertionError))
    x = numbers(6, 4, 9).clamp(-1, 1)
    masked = x.masked_fill(torch.arange(9) > 5, torch.finfo(torch.float32).min)
    if kernels.library is not None:
        with reproml.exact():
            found, expected = masked.softmax(1), x[:, :6].softmax(1)
        assert torch.equal(found[:, :6], expected) and not found[:, 6:].any()
        assert not found.signbit().any()


def test_gradient_of_logcumsumexp_takes_no_other_path(monkeypatch):
    """PyTorch takes the logarithm of a number without the sign that is wanted as the lowest number."""
    monkeypatch.setattr(evaluate, "exact_rows", Mock(side_effect=AssertionError))
    x = torch.linspace(-3, 3, 20).requires_grad_()
    if kernels.library is not None:
        with reproml.exact():
            x.logcumsumexp(0).backward(torch.cos(torch.arange(20.0)))
        assert x.grad is not None and x.grad.isfinite().all()


def test_products_of_binary32_numbers_have_no_error():
    """A bound of 0 leaves no midpoint undecided, and one element in ten of such products is one."""
    torch.manual_seed(0)
    a, b = torch.randn(1, 16, 64).double(), torch.randn(1, 64, 9).double()
    s, t, rad = pair_arrays.products(a, b)
    if kernels.library is None:
        assert rad.isinf().all()
        return
    for i in range(16):
        for j in range(9):
            exact = sum(
                Fraction(x) * Fraction(y) for x, y in zip(a[0, i].tolist(), b[0, :, j].tolist())
            )
            assert Fraction(s[0, i, j].item()) + Fraction(t[0, i, j].item()) == exact
    assert not rad.any()
    wide = torch.randn(1, 16, 64, dtype=torch.float64)
    assert pair_arrays.products(wide, wide.mT)[2].all()
