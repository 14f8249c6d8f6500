"""Tests of csrc/pair_program.c and compiler/pair_program.py: bounds against an exact oracle, and bits.

Every instruction keeps its result within its own bound, for pairs whose two numbers lie any distance apart;
where nothing is rounded the bound is 0. Operators give the bits of the reference path on inputs whose
results are ties in masses.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Callable

import mpmath
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import executor, kernels, pair_program
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.rounding import SLACK
from tests.arithmetic.compiler.test_rounding_bounds import COMPILER, CSRC, compile_c
from tests.arithmetic.forms import agree
from tests.arithmetic.strategies import ANY, NOT_FINITE, SPECIAL, broadcast, grid, lay_out

pytestmark = [
    pytest.mark.skipif(kernels.library is None, reason="the kernels are not built"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
]

mp = mpmath.MPContext()
mp.prec = 2500
Pair = tuple[float, float, float]

SOURCE = """
#include "pair_program.c"
void run(int op, const double *x, double *y) {
    pairs r[4];
    for (int j = 0; j < 3; j++) fill(r + j, (pair){x[3 * j], x[3 * j + 1], x[3 * j + 2]});
    const pair_instruction in = {op, 0, 1, 2};
    const pair_program p = {.operands = 3, .length = 1, .code = &in};
    run_pair_instructions(&p, r, 8);
    y[0] = r[3].s[5], y[1] = r[3].t[5], y[2] = r[3].rad[5];
}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "run.c").write_text(SOURCE)
    library = compile_c(folder / "run.so", [folder / "run.c", CSRC / "parallel.c"])

    def instruction(op: str, *operands: Pair) -> Pair:
        x = (ctypes.c_double * 9)(*[number for pair in operands for number in pair])
        y = (ctypes.c_double * 3)()
        library.run(pair_program._OPS[op], x, y)
        return y[0], y[1], y[2]

    return instruction


def numbers(lowest: int = -1074, highest: int = 1000) -> st.SearchStrategy[float]:
    scaled = st.tuples(st.integers(-(2**53), 2**53), st.integers(lowest, highest - 53))
    small = st.tuples(st.integers(-(2**10), 2**10), st.integers(-150, 20))
    return st.one_of(small, small, scaled).map(lambda n: math.ldexp(*n))


@st.composite
def pairs(draw: Any, lowest: int = -1074, highest: int = 1000) -> Pair:
    """A pair whose second number is any smaller one, or 0; with a bound or without."""
    s = draw(numbers(lowest, highest))
    t = draw(st.one_of(st.just(0.0), numbers(-1074, 20).map(lambda x: x * abs(s) * 2.0**-80)))
    t = t if abs(t) <= math.ulp(s) / 2 and s else 0.0
    return s, t, draw(st.sampled_from([0.0, 0.0, abs(s) * 2.0**-90, abs(t) * 2.0**-40]))


SINGLE = numbers().map(lambda x: (x, 0.0, 0.0))


def values(pair: Pair) -> Iterator[Fraction]:
    """The middle and both ends of what a pair stands for."""
    s, t, rad = map(Fraction, pair)
    yield from {s + t, s + t - rad, s + t + rad}


def within(found: Pair, exact: Any) -> None:
    """Assert that the bound of a pair holds; an infinite bound is one that cannot be rounded."""
    if not all(map(math.isfinite, found)):
        return
    s, t, rad = map(Fraction, found)
    assert abs(t) <= Fraction(math.ulp(found[0])) / 2
    if isinstance(exact, Fraction):
        assert abs(s + t - exact) <= rad * Fraction(SLACK)
    else:
        assert abs(mp.mpf(found[0]) + found[1] - exact) <= mp.mpf(found[2]) * SLACK


EXACT = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
}


@settings(max_examples=120)
@given(pairs(), pairs(), SINGLE, SINGLE)
def test_bounds_of_sums_products_and_quotients(run, p, q, x, y):
    for op, exact in EXACT.items():
        for name, a, b in [(op, p, q), (op + "1", p, x), (op + "11", y, x)]:
            if name in pair_program._OPS:
                found = run(name, a, b)
                for v in values(a):
                    for w in values(b):
                        if op != "div" or w:
                            within(found, exact(v, w))


@settings(max_examples=100)
@given(st.integers(-(2**24), 2**24), st.integers(-(2**24), 2**24), st.integers(1, 2**20))
def test_bound_is_0_where_nothing_is_rounded(run, x, y, d):
    a, b = (float(x), y * 2.0**-160, 0.0), (float(y), 0.0, 0.0)
    assert run("add", a, b)[2] == 0 and run("add1", b, b)[2] == 0
    assert run("mul11", b, b)[2] == run("mul1", b, b)[2] == run("mul", b, b)[2] == 0
    for op in ("div", "div1"):
        assert run(op, (float(x * d), 0.0, 0.0), (float(d), 0.0, 0.0)) == (x, 0, 0)
    assert run("sqrt", (float(x * x), 0.0, 0.0)) == (abs(x), 0, 0)


@pytest.mark.parametrize("op", ["add", "add1", "mul", "mul1", "div", "div1"])
@settings(max_examples=50)
@given(p=pairs(-300, 300), x=numbers(-300, 300))
def test_bounds_are_small_beside_the_small_part(run, op, p, x):
    """Otherwise x / 2 + x^2 / 6 would not be rounded for a subnormal x."""
    s, t, _ = p
    assume(s and x)
    small = max(abs(t), abs(s) * 2.0**-53, abs(x) * 2.0**-53 if op.startswith("add") else 0)
    scale = {"add": 1, "mul": abs(x), "div": 1 / abs(x)}[op.rstrip("1")]
    rad = run(op, (s, t, 0.0), (x, 0.0, 0.0))[2]
    assert rad <= small * scale * 2.0**-49 + 2.0**-999 * (1 + 1 / abs(x))


FUNCTIONS = {
    "sqrt": (mp.sqrt, 0, mp.inf),
    "exp": (mp.exp, -1000, 700),
    "expm1": (mp.expm1, -1000, 700),
    "log": (mp.log, 0, mp.inf),
    "log1p": (mp.log1p, -1, mp.inf),
    "sin": (mp.sin, -mp.inf, mp.inf),
    "cos": (mp.cos, -mp.inf, mp.inf),
    "sinpi": (mp.sinpi, -(2**60), 2**60),
    "cospi": (mp.cospi, -(2**60), 2**60),
    "atan": (mp.atan, -mp.inf, mp.inf),
    "erf": (mp.erf, -(2**16), 2**16),
    "erfc": (mp.erfc, -(2**16), 2**16),
    "erfinv": (mp.erfinv, -1, 1),
}


@pytest.mark.parametrize("op", FUNCTIONS)
@settings(max_examples=50)
@given(p=pairs())
def test_bounds_of_functions(run, op, p):
    function, low, high = FUNCTIONS[op]
    found = run(op, p)
    for v in values(p):
        x = mp.mpf(v.numerator) / v.denominator
        if low < x < high:
            within(found, function(x))


EDGES = {  # where a series, a reduction or a bound begins or ends
    "sin": [2.0**-21, math.pi / 4, math.pi / 2, math.pi, 1e5 * math.pi, 2.0**23 - 1, 2.0**23],
    "sinpi": [0.25, 0.5, 1.0, 1.5, 2.0**49 - 0.25, 2.0**49, 2.0**49 + 0.125, 2.0**49 + 0.25],
    "atan": [2.0**-300, 1.0, 2.0**300, 2.0**900, 2.0**901],
    "erf": [2.0**-300, 2.0**-21, 3.0, 24.5, 26.5, 40.0, 2.0**16],
    "erfinv": [2.0**-300, 0.5, 0.999, 1 - 2.0**-53],
}
EDGES["cos"], EDGES["cospi"], EDGES["erfc"] = EDGES["sin"], EDGES["sinpi"], EDGES["erf"]


@pytest.mark.parametrize("op", EDGES)
def test_bounds_at_edges(run, op):
    for edge in EDGES[op]:
        for x in (edge, -math.nextafter(edge, 0.0)):
            quarter = math.ulp(x) / 4
            for t, rad in ((0.0, 0.0), (0.0, abs(x) * 2.0**-90), (quarter, 0.0), (-quarter, 0.0)):
                found = run(op, (x, t, rad))
                for v in values((x, t, rad)):
                    within(found, FUNCTIONS[op][0](mp.mpf(v.numerator) / v.denominator))


@pytest.mark.parametrize("op", FUNCTIONS)
@settings(max_examples=50)
@given(x=st.floats(2.0**-149, 500, width=32), negative=st.booleans())
def test_functions_of_binary32_numbers_have_90_bits(run, op, x, negative):
    """exp is 1 plus a small part with that many bits."""
    if negative and op not in ("sqrt", "log"):
        x = -x
    x = x / 512 if op == "erfinv" else x
    assume(op != "log1p" or x > -0.999)
    assume(op != "erfc" or x < 24)  # exp(-x^2) has no bits beyond
    s, t, rad = run(op, (x, 0.0, 0.0))
    exact = FUNCTIONS[op][0](mp.mpf(x))
    within((s, t, rad), exact)
    assert rad <= abs(exact) * (2.0**-77 if op == "erfc" and 0 < x < 3 else 2.0**-88)  # 1 - erf(x)
    if op == "exp" and abs(x) < 2.0**-54:
        assert s == 1 and rad <= abs(x) * 2.0**-50


@settings(max_examples=100)
@given(pairs(), pairs(), pairs())
def test_conditions_are_certain_or_have_no_bound(run, p, x, y):
    for op, holds in (("lt", lambda v: v < 0), ("eq", lambda v: v == 0)):
        outcomes = {holds(v) for v in values(p)}
        condition = run(op, p)[0]
        assert condition in outcomes if condition == condition else p[2] > 0
        chosen = run("select", (condition, 0.0, 0.0), x, y)
        if condition == condition:
            assert len(outcomes) == 1 and chosen == (x if condition else y)
        else:
            assert chosen[2] == math.inf


def test_exact_zeros_stay_exact(run):
    zero, p = (0.0, 0.0, 0.0), (0.3, 1e-20, 1e-30)
    assert run("mul", zero, p)[2] == run("mul", p, zero)[2] == run("div", zero, p)[2] == 0
    assert run("mul1", p, zero)[2] == run("div1", zero, (3.0, 0.0, 0.0))[2] == 0
    assert run("exp", zero) == (1, 0, 0) and run("log", (1.0, 0.0, 0.0)) == zero
    for op in "expm1 log1p sqrt sin sinpi atan erf erfinv".split():
        assert run(op, zero) == zero
    for op in ("cos", "cospi", "erfc"):
        assert run(op, zero) == (1, 0, 0)
    assert run("div", p, zero)[2] == run("div1", p, zero)[2] == math.inf


# ---- results ----


def hard(seed: int) -> torch.Tensor:
    """Subnormal numbers, ties, small integers, tiny and large numbers, zeros of both signs."""
    draw = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (8,), generator=draw)

    kinds = [
        integers(-(2**23), 2**23).float() * 2.0**-149,
        integers(-9, 9).float(),
        integers(-9, 9).float() / 2,
        integers(-(2**24), 2**24).float(),
        1 + integers(-3, 4).float() * 2.0**-23,
        integers(-3, 4).float() * 2.0**-24,
        torch.randn(8, generator=draw) * 2.0**-40,
        torch.randn(8, generator=draw) * 1e30,
        torch.full((8,), -0.0),
        torch.tensor(SPECIAL[:20] + [*NOT_FINITE, 0.0]),
    ]
    return torch.cat([k[torch.randperm(len(k), generator=draw)] for k in kinds])


OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        name: operator_table.EXACT[name]
        for name in "rsqrt exp expm1 log log1p tanh sigmoid silu hardsigmoid hardswish mish "
        "hardswish_backward hardsigmoid_backward silu_backward tanh_backward sigmoid_backward "
        "log_sigmoid_backward addcmul addcdiv mish_backward".split()
    },
    "add": lambda x, y: operator_table.EXACT["add"](x, y, alpha=0.1),
    "lerp": lambda x, y: operator_table.EXACT["lerp"](x, y, 0.1),
    "lerp, tensor": operator_table.EXACT["lerp"],
    "power -2": lambda x: operator_table.EXACT["pow"](x, -2),
    "power 3": lambda x: operator_table.EXACT["pow"](x, 3),
    "power 2.5": lambda x: operator_table.EXACT["pow"](x, 2.5),
    "elu": lambda x: operator_table.EXACT["elu"](x, 0.1, 0.3),
    "gelu, tanh": lambda x: operator_table.EXACT["gelu"](x, approximate="tanh"),
}
ARITY = {
    **dict.fromkeys("add lerp silu_backward tanh_backward sigmoid_backward".split(), 2),
    **dict.fromkeys("hardswish_backward hardsigmoid_backward mish_backward".split(), 2),
    **dict.fromkeys(["log_sigmoid_backward", "addcmul", "addcdiv", "lerp, tensor"], 3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_hard_operands_give_the_bits_of_the_reference_path(name):
    agree(OPERATORS[name], *[hard(i) for i in range(ARITY.get(name, 1))])
    agree(OPERATORS[name], *[hard(0) for _ in range(ARITY.get(name, 1))])


@settings(max_examples=6)
@given(broadcast(3, ANY))
def test_arbitrary_operands_and_layouts(operands):
    for name, function in OPERATORS.items():
        if name not in ("mish", "mish_backward", "gelu, tanh", "power 2.5"):
            agree(function, *operands[: ARITY.get(name, 1)])


@pytest.mark.parametrize("layout", ["transposed", "strided", "offset"])
def test_failed_elements_are_found_in_any_layout(layout):
    x = lay_out(torch.arange(1, 5001).reshape(50, 100).float() * 2.0**-149, layout)
    agree(OPERATORS["hardswish"], x)
    agree(OPERATORS["addcmul"], x, x[:1], x[:, :1])
    agree(OPERATORS["lerp, tensor"], x, x.double()[0, 0], 3)


def nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("elements were left")

    monkeypatch.setattr(executor, "_complete", fail)
    monkeypatch.setattr(executor, "_FAST", {})


@pytest.mark.parametrize(
    "name",
    "add addcmul lerp power_-2 power_3 hardswish hardsigmoid silu log1p silu_backward "
    "hardswish_backward log_sigmoid_backward".split(),
)
@pytest.mark.parametrize(
    "numbers_of",
    [
        lambda: torch.arange(-60, 60).float(),
        lambda: torch.arange(1, 100).float() * 2.0**-149,
        lambda: 1 + torch.arange(-9, 9) * 2.0**-23,
        lambda: torch.full((9,), 2.0**-24),
        lambda: torch.zeros(9),
    ],
)
def test_masses_of_ties_take_no_other_path(name, numbers_of, monkeypatch):
    nothing_left(monkeypatch)
    name, x = name.replace("_-", " -").replace("r_3", "r 3"), numbers_of()
    if name == "log1p":
        x = x.abs()
    OPERATORS[name](*[x] * ARITY.get(name, 1))


def test_infinite_and_undefined_results_take_no_other_path(monkeypatch):
    x, zero = torch.tensor([1.0, 0.0, -2.0, torch.inf]), torch.zeros(4)
    expected = x / zero
    nothing_left(monkeypatch)
    assert torch.equal(
        OPERATORS["addcdiv"](zero, x, zero).nan_to_num(7), (expected + 0).nan_to_num(7)
    )


def test_zero_has_the_sign_of_the_reference_path():
    zeros = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149)])
    x, y = (t.reshape(-1) for t in torch.meshgrid(zeros, zeros, indexing="ij"))
    for formula in (
        lambda ctx, x, y: x * y * Fraction(1, 3) * x,
        lambda ctx, x, y: (x - y) * Fraction(1, 3),
        lambda ctx, x, y: -(x * Fraction(1, 3) - y * Fraction(1, 3)),
        lambda ctx, x, y: x + y * Fraction(-1, 3) - Fraction(2, 3) * x,
        lambda ctx, x, y: x * x * x * x * x * x * x * x * y,
    ):
        agree(elementwise, formula, x, y)


def test_term_below_2_to_minus_900_is_left():
    """The exact path may count it as zero, so pairs must not decide by it."""
    x = torch.tensor([1 + 2.0**-24], dtype=torch.float64)
    tiny = torch.tensor([2.0**-950], dtype=torch.float64)
    seen = []

    def reference(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y.item())
        return x.float()

    for y in (tiny, tiny * 2.0**100):
        elementwise(lambda ctx, x, y: x + y, x, y, reference=reference)
    assert seen == [2.0**-950]


@pytest.mark.parametrize(
    "formula",
    [
        lambda ctx, x: ctx.lgamma(x),
        lambda ctx, x: x if x < 0 else -x,
        lambda ctx, x: x,
        lambda ctx, x: ctx.constant(Fraction(1)),
        lambda ctx, x: sum((x * n for n in range(2, 99)), x),
    ],
)
def test_formulas_without_a_pair_program(formula):
    assert pair_program.pair_program_of(formula, [torch.float32]) is None


def test_special_numbers_agree():
    for name in ("hardswish_backward", "silu_backward", "tanh_backward"):
        agree(OPERATORS[name], *torch.broadcast_tensors(*grid(2)))
