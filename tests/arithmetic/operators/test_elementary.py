"""Test elementary functions and remainders: gradients, forms of an operator, exact values in masses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import reproml
from verification.op_db import difference
from verification.oracle import Real, check, mp, reals, rounding_to, same_bits

aten = torch.ops.aten
UNIT = torch.linspace(-0.9, 0.9, 24)
POSITIVE = torch.linspace(1.1, 7, 24)
FUNCTIONS: dict[str, Any] = {
    **{name: UNIT for name in "exp2 tan asin acos atan sinh cosh asinh atanh sinc digamma".split()},
    **{name: POSITIVE for name in "log2 log10 acosh lgamma frac".split()},
    "logit": UNIT.abs(),
}
BINARY = """
pow fmod remainder hypot atan2 logaddexp logaddexp2 special_xlog1py copysign fmax fmin floor_divide
""".split()


@pytest.mark.parametrize("name", [*FUNCTIONS, *BINARY[:-1]])  # floor_divide has no gradient
def test_gradient_is_close_to_that_in_float64(name):
    operands = [FUNCTIONS[name]] if name in FUNCTIONS else [POSITIVE, POSITIVE.flip(0) / 3 + 0.1]
    function, results = getattr(aten, name), []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.clone().to(dtype).requires_grad_() for x in operands]
        with reproml.exact() if dtype is torch.float32 else torch.enable_grad():
            y = function(*leaves)
            y.backward(torch.linspace(-1, 2, 24, dtype=dtype))
        results.append([y.detach(), *[x.grad for x in leaves if x.grad is not None]])
    assert len(results[0]) == len(results[1]) == 1 + len(operands)
    for got, reference in zip(*results):
        assert got.dtype is torch.float32
        assert not difference(got, reference, 2.0**-21 * (1 + reference.abs()))


@pytest.mark.parametrize("name", [*FUNCTIONS, *BINARY])
def test_other_forms_have_the_same_bits(name):
    operands = [POSITIVE / 8] if name in FUNCTIONS else [POSITIVE, POSITIVE.flip(0) / 3]
    function = getattr(aten, name)
    with reproml.exact():
        expected, out = function(*operands), torch.empty(0)
        assert function(*operands, out=out) is out and same_bits(out, expected)
        if hasattr(aten, name + "_"):
            x = operands[0].clone()
            assert getattr(aten, name + "_")(x, *operands[1:]) is x and same_bits(x, expected)
        strided = [torch.stack([x, x], 1)[:, 0] for x in operands]
        assert same_bits(function(*strided), expected)


FOREACH = "acos asin atan cosh sinh tan frac lgamma".split()


@pytest.mark.parametrize("name", FOREACH)
def test_foreach_forms_have_the_same_bits(name):
    xs = [UNIT.abs(), POSITIVE[:3] / 8]
    with reproml.exact():
        expected = [getattr(aten, name)(x) for x in xs]
        assert all(map(same_bits, getattr(torch, f"_foreach_{name}")(xs), expected))
        copies = [x.clone() for x in xs]
        getattr(torch, f"_foreach_{name}_")(copies)
        assert all(map(same_bits, copies, expected))


def test_foreach_powers_have_the_same_bits():
    xs, ys = [POSITIVE, POSITIVE[:3]], [POSITIVE / 4, POSITIVE[:3] - 3]
    with reproml.exact():
        pairs = [
            (torch._foreach_pow(xs, ys), [torch.pow(x, y) for x, y in zip(xs, ys)]),
            (torch._foreach_pow(xs, 0.3), [torch.pow(x, 0.3) for x in xs]),
            (torch._foreach_pow(xs, [2.5, -3]), [torch.pow(x, p) for x, p in zip(xs, (2.5, -3))]),
            (torch._foreach_pow(3.5, ys), [torch.pow(3.5, y) for y in ys]),
        ]
    for found, expected in pairs:
        assert all(map(same_bits, found, expected))


@pytest.mark.parametrize(
    "name, values, exact",
    [
        ("exp2", range(-149, 128), lambda n: 2.0**n),
        ("exp2", [-150.0, -151.0], lambda n: 0), ("exp2", [128.0, 1e30], lambda n: torch.inf),
        ("log2", [2.0**n for n in range(-149, 128)], lambda x: torch.tensor(x).frexp()[1].item() - 1),
        ("log10", [10.0**n for n in range(11)], lambda x: len(str(int(x))) - 1),
        ("atan", [0.0], lambda x: 0), ("acos", [1.0], lambda x: 0), ("acosh", [1.0], lambda x: 0),
        ("logit", [0.5], lambda x: 0), ("lgamma", [1.0, 2.0], lambda x: 0), ("cosh", [0.0], lambda x: 1),
        ("sinc", range(-5, 6), lambda n: n == 0), ("sinh", [0.0], lambda x: 0),
    ],
)  # fmt: skip
def test_many_rational_values_are_exact(name, values, exact):
    x = torch.tensor([float(v) for v in values]).repeat(2000)
    expected = torch.tensor([float(exact(v)) for v in values]).repeat(2000)
    with reproml.exact():
        assert same_bits(getattr(aten, name)(x), expected)


@pytest.mark.parametrize("name", ["sin", "cos"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sin_and_cos_of_many_large_numbers_are_rounded_once(name, dtype):
    draw = torch.Generator().manual_seed(1)
    far = (
        torch.exp(torch.rand(60, generator=draw) * 74 + 14) * torch.randn(60, generator=draw).sign()
    )
    x = torch.cat([far, torch.tensor([2.0**19, 0.0, -0.0, 1.5, math.inf, math.nan])]).to(dtype)
    with mp.workprec(400):
        wanted = [Real(getattr(mp, name)(mp.mpf(v))) for v in x[:64].tolist()]
    with reproml.exact(), rounding_to(dtype):
        found = getattr(torch, name)(x)
        # Far numbers and zeros: the oracle's zero has no sign.
        zeros = [Real(1)] * 2 if name == "cos" else list(reals(x[61:63]))
        check(found[:64], [*wanted[:61], *zeros, wanted[63]])
        assert found[64:].isnan().all()
        columns = x[:60].view(12, 5).t()
        transposed = getattr(torch, name)(columns)
        assert transposed.stride() == columns.stride() and torch.equal(
            transposed, found[:60].view(12, 5).t()
        )


def test_digamma_among_many_poles_is_rounded_once():
    x = torch.tensor([0.0, -0.0, -1.0, -7.0, 0.5, 3.0, -1.5, math.inf, -math.inf])
    wanted = [Real(v) for v in (-math.inf, math.inf, math.nan, math.nan)]
    wanted += [Real(mp.psi(0, v)) for v in (0.5, 3.0, -1.5)]
    with reproml.exact():
        check(torch.digamma(x)[:7], wanted)
        assert torch.digamma(x)[7] == math.inf and torch.digamma(x)[8].isnan()
        assert same_bits(torch.digamma(x), torch.cat([torch.digamma(v.view(1)) for v in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_angle_of_a_real_number_is_pi_or_zero(dtype):
    numbers = [0.0, -0.0, -6e-8, 3.0, -math.inf, math.inf, math.nan, -5.0]
    angles = [0.0, 0.0, math.pi, 0.0, math.pi, 0.0, math.nan, math.pi]
    with reproml.exact():
        found = torch.angle(torch.tensor(numbers, dtype=dtype))
        of_integers = torch.angle(torch.tensor([-2, 0, 2]))
    assert found.dtype is dtype and same_bits(found, torch.tensor(angles, dtype=dtype))
    assert same_bits(of_integers, torch.tensor([math.pi, 0.0, 0.0]))
