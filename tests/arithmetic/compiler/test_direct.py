"""The loops without a rounding test agree with the oracle, and with the path without the C library."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any, Callable

import pytest
import torch

from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import direct, kernels
from reproml.arithmetic.numerics import formats
from reproml.arithmetic.operators import remainders
from tests.arithmetic.forms import agree, with_threads
from tests.arithmetic.test_operator_table import larger, smaller
from verification import functions
from verification.oracle import Real, check, float32_scalar, reals, same_bits, sqrt

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

TENTH = float32_scalar(0.1)
MEAN = 1


def clip(x: Any) -> Any:
    return Real(-3) if x < -3 else Real(3) if x > 3 else x


def hardswish_slope(g: Any, x: Any) -> Any:
    return Real(0) if x <= -3 else g * (2 * x + 3) / 6 if x < 3 else g


def smooth_slope(g: Any, x: Any, y: Any) -> Any:
    d = x - y
    return g * d if abs(d) < 1 else g if d > 0 else -g


def soft(x: Any, bound: Any) -> Any:
    return x - bound if x > bound else x + bound if x < -bound else x * 0


def truncated(x: Any, y: Any) -> Any:
    return x / y if y.v == 0 else Real(math.trunc(x.v / y.v), x.minus != y.minus)


# operator, its arguments after the tensors, its options, the number of tensors, the definition
CASES: list[tuple[str, tuple[Any, ...], dict[str, Any], int, Callable[..., Any]]] = [
    ("add", (), {"alpha": 0.1}, 2, lambda x, y: x + TENTH * y),
    ("sub", (), {"alpha": 0.1}, 2, lambda x, y: x + -TENTH * y),
    ("addcmul", (), {"value": 0.1}, 3, lambda x, a, b: x + TENTH * a * b),
    ("addcdiv", (), {"value": 0.1}, 3, lambda x, a, b: x + TENTH * a / b),
    ("lerp", (), {}, 3, lambda x, y, w: x + w * (y - x)),
    ("leaky_relu", (0.1,), {}, 1, lambda x: x if x > 0 else x * TENTH),
    ("leaky_relu_backward", (0.1, False), {}, 2, lambda g, x: g if x > 0 else g * TENTH),
    ("hardsigmoid", (), {}, 1, lambda x: (clip(x) + 3) / 6),
    ("hardsigmoid_backward", (), {}, 2, lambda g, x: g / 6 if -3 < x < 3 else Real(0)),
    ("hardswish", (), {}, 1, lambda x: x * (clip(x) + 3) / 6),
    ("hardswish_backward", (), {}, 2, hardswish_slope),
    ("smooth_l1_loss_backward", (0, 1.0), {}, 3, smooth_slope),
    ("sqrt", (), {}, 1, sqrt),
    ("maximum", (), {}, 2, larger),
    ("minimum", (), {}, 2, smaller),
    ("_prelu_kernel", (), {}, 2, lambda x, w: x if x > 0 else x * w),
    ("softshrink", (0.1,), {}, 1, lambda x: soft(x, TENTH)),
    ("hardshrink", (0.1,), {}, 1, lambda x: x if abs(x) > TENTH else Real(0)),
    ("hardshrink_backward", (0.1,), {}, 2, lambda g, x: g if abs(x) > TENTH else Real(0)),
    ("fmod", (), {}, 2, functions.fmod),
    ("remainder", (), {}, 2, functions.remainder),
    ("floor_divide", (), {}, 2, functions.floor_divide),
    ("div", (), {"rounding_mode": "trunc"}, 2, truncated),
]


def hard_numbers(n: int, seed: int) -> torch.Tensor:
    """Numbers of few bits and of all exponents, numbers beside 1, subnormal numbers and zeros."""
    random = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (n,), generator=random)

    kinds = [
        integers(-9, 10) / 4,
        integers(-(2**24), 2**24) * 2.0**-12,
        1 + integers(-3, 4) * 2.0**-23,
        integers(-9, 10) * 2.0**-149,
        integers(-(2**31), 2**31).int().view(torch.float32),
        torch.randn(n, generator=random),
        integers(-3, 4) * 2.0 ** (integers(-60, 60)),
        torch.where(integers(0, 2) > 0, -0.0, 0.0),
    ]
    rows = torch.stack([kind.float() for kind in kinds])
    return rows[integers(0, len(kinds)), torch.arange(n)]


@pytest.mark.parametrize(("name", "arguments", "options", "operands", "formula"), CASES)
def test_direct_loop_gives_bits_of_oracle(name, arguments, options, operands, formula):
    f = partial(operator_table.EXACT[name], **options)
    x = [hard_numbers(700, seed) for seed in range(operands)]
    found = agree(f, *x, *arguments)
    # A block whose elements all pass the test is not computed in the longer way.
    alone = [f(*[t[i : i + 1] for t in x], *arguments) for i in range(700)]
    assert same_bits(torch.cat(alone), found)
    finite = torch.stack(x).isfinite().all(0)
    if name == "addcdiv":
        finite &= x[2] != 0
    if name == "sqrt":
        finite &= x[0] >= 0
    expected = [formula(*row) for row in zip(*[reals(t[finite]) for t in x])]
    check(found[finite], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fmod", "remainder", "floor", "trunc"])
def test_remainders_of_all_numbers_are_those_of_the_reference_path(name, dtype):
    """They include infinities and NaN, and quotients beside integers, of few bits and above 2^52."""
    special = torch.tensor([0.0, -0.0, 1.0, -3.0, math.inf, -math.inf, math.nan, 2.0**-149])
    x, y = (hard_numbers(4000, seed) for seed in (8, 9))
    near = torch.where(x.abs() < 2.0**60, (x * 1000).trunc() * y, x)
    pairs = [(x, y), (near, y), tuple(torch.cartesian_prod(special, special).T)]
    with formats.rounding_to(dtype):
        for a, b in pairs:
            a, b = (t.to(dtype).float().contiguous() for t in (a, b))
            if name in ("floor", "trunc"):
                agree(partial(remainders.rounded_quotient, mode=name), a, b)
            else:
                agree(getattr(remainders, name), a, b)


def test_remainders_take_operands_that_broadcast():
    x, y = hard_numbers(700, 0), hard_numbers(10, 1)
    for function in (remainders.fmod, remainders.remainder, remainders.floor_divide):
        agree(function, x.view(70, 10), y)
        agree(function, y.view(10, 1), y)
        agree(function, x, 0.75)
        agree(function, 0.75, x)
    with_threads(remainders.remainder, hard_numbers(70_001, 0), hard_numbers(70_001, 1))


UNIT = 2.0**-23
ABOVE, BELOW = 1 + UNIT, 1 - UNIT

# Results that differ from a midpoint by 2^-70 of it: binary64 rounds them to the midpoint.
BESIDE: dict[str, tuple[str, list[float], dict[str, float], Any]] = {
    "add": ("add", [ABOVE, BELOW / 2**24], {"alpha": ABOVE}, lambda x, y: x + Fraction(ABOVE) * y),
    "addcmul": ("addcmul", [ABOVE, ABOVE, BELOW / 2**24], {}, lambda x, a, b: x + a * b),
    "addcdiv": (
        "addcdiv", [ABOVE, BELOW / 2**24, 1.0], {"value": ABOVE},
        lambda x, a, b: x + Fraction(ABOVE) * a / b),
    "lerp": ("lerp", [ABOVE, 2 * ABOVE, BELOW / 2**24], {}, lambda x, y, w: x + w * (y - x)),
    "mse": (
        "mse_loss_backward", [ABOVE / 2, ABOVE, ABOVE / 2**24], {"reduction": 0},
        lambda g, x, y: 2 * g * (x - y)),
    "smooth": (
        "smooth_l1_loss_backward", [2 * ABOVE, ABOVE / 2, ABOVE / 2**25],
        {"reduction": 0, "beta": 1.0}, lambda g, x, y: g * (x - y)),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_block_of_numbers_beside_a_midpoint(name):
    """The whole block would pass a test whose bound is too small."""
    operator, numbers, options, formula = BESIDE[name]
    found = operator_table.EXACT[operator](*[torch.full((512,), v) for v in numbers], **options)
    check(found, [Real(formula(*map(Fraction, numbers)))] * 512)


def test_gradient_of_mse_rounds_ties_once(monkeypatch):
    """2 g (x - y) / n for n of one, few and many bits."""
    f = operator_table.EXACT["mse_loss_backward"]
    for n in (1, 2, 3, 7, 64, 1000, 1023):
        x, y, g = (hard_numbers(n, seed) for seed in (n, n + 1, n + 2))
        x, y, g = (torch.where(t.isfinite(), t, 1.0) for t in (x, y, g[0]))
        found = agree(f, g, x, y, MEAN)
        expected = [2 * reals(g).item() * (a - b) / n for a, b in zip(reals(x), reals(y))]
        check(found, expected)


def test_direct_loop_takes_threads_and_single_numbers():
    add = partial(operator_table.EXACT["add"], alpha=0.1)
    x, y = hard_numbers(70_001, 0), hard_numbers(70_001, 1)
    with_threads(add, x, y)
    agree(add, x, y[5])
    agree(add, x[5], y)
    agree(add, x[:70_000].view(100, 700), y[:700])
    agree(add, x[::3], y[::3])
    agree(add, x[:0], y[:0])


def test_direct_loop_takes_operands_of_any_layout():
    x, y = hard_numbers(700, 0).view(70, 10), hard_numbers(700, 1).view(10, 70)
    found = direct.run_directly("add_scaled", x.t(), y, scalar=0.1)
    expected = direct.run_directly("add_scaled", x.t().contiguous(), y, scalar=0.1)
    assert found is not None and expected is not None and found.is_contiguous()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_every_loop_is_used(monkeypatch):
    used = set()
    library_call = direct.run_directly

    def recorded(name: str, *operands: Any, **options: Any) -> Any:
        result = library_call(name, *operands, **options)
        used.add(name if result is not None else None)
        return result

    for module in ("pointwise", "activations", "losses", "remainders"):
        monkeypatch.setattr(f"reproml.arithmetic.operators.{module}.run_directly", recorded)
    for name, arguments, options, operands, _ in CASES:
        x = [torch.ones(5)] * operands
        operator_table.EXACT[name](*x, *arguments, **options)
    operator_table.EXACT["mse_loss_backward"](torch.ones(()), x[0], x[0], MEAN)
    assert used == set(direct._LOOPS)
