"""The fast loops of csrc give the same bits as the reference path and the compiled path."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import executor, kernels
from tests.arithmetic.forms import reference
from tests.arithmetic.strategies import LAYOUTS, NOT_FINITE, SPECIAL, grid, lay_out
from verification.oracle import bits_of_tensor, same_bits

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

ONE = """exp expm1 erfinv tanh sigmoid silu gelu gelu_tanh softplus log_sigmoid
    elu selu celu mish""".split()
TWO = """tanh_backward sigmoid_backward silu_backward gelu_backward gelu_tanh_backward
    softplus_backward log_sigmoid_backward elu_backward selu_backward celu_backward
    elu_backward_of_result selu_backward_of_result celu_backward_of_result
    mish_backward""".split()
WITH_OPTIONS: dict[str, Any] = {
    f"gelu_tanh{end}": partial(operator_table.EXACT[f"gelu{end}"], approximate="tanh")
    for end in ("", "_backward")
}
WITH_OPTIONS["log_sigmoid"] = lambda x: operator_table.EXACT["log_sigmoid_forward"](x)[0]
WITH_OPTIONS["softplus_backward"] = partial(
    operator_table.EXACT["softplus_backward"], beta=1, threshold=20
)
ELUS = {"elu": (1, 1, 1), "selu": (1.6732632, 1.0507009, 1), "celu": (0.3, 1, 1 / 0.3)}
for name, constants in ELUS.items():
    WITH_OPTIONS[name] = lambda x, c=constants: operator_table.EXACT["elu"](x, *c)
    for of_result, end in ((False, ""), (True, "_of_result")):
        WITH_OPTIONS[f"{name}_backward{end}"] = lambda g, x, c=constants, of_result=of_result: (
            operator_table.EXACT["elu_backward"](g, *c, of_result, x)
        )
WITH_OPTIONS["log_sigmoid_backward"] = partial(
    operator_table.EXACT["log_sigmoid_backward"], buffer=torch.empty(0)
)
ROWS = ["_softmax", "_safe_softmax", "_log_softmax"]
ROWS_BACKWARD = ["_softmax_backward_data", "_log_softmax_backward_data"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(executor, "_plans", {})


def agree(name: str, *arguments: Any) -> torch.Tensor:
    """Assert that all three paths give the same bits; return the result."""
    f = WITH_OPTIONS.get(name) or operator_table.EXACT[name]
    found: torch.Tensor = f(*arguments)
    expected = reference(f, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_FAST", {})
        patch.setattr(executor, "_plans", {})
        compiled = f(*arguments)
    for other in (expected, compiled):
        assert same_bits(found, other), (name, bits_of_tensor(found), bits_of_tensor(other))
    return found


def is_fast() -> bool:
    return any(plan is not None and plan.fast >= 0 for plan in executor._plans.values())


def normal(*shape: int, seed: int = 0, scale: float = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def any_numbers(n: int, seed: int = 0) -> torch.Tensor:
    """Numbers with random bits: all exponents, subnormal, infinite and NaN."""
    random = torch.Generator().manual_seed(seed)
    patterns = torch.randint(-(2**31), 2**31, (n,), generator=random)
    return patterns.to(torch.int32).view(torch.float32)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("name", ONE)
def test_formulas_of_one_operand(name):
    agree(name, torch.tensor(SPECIAL + NOT_FINITE))
    agree(name, any_numbers(4000))
    for scale in (1e-30, 1e-6, 1, 10, 100):
        agree(name, normal(2000, scale=scale))
    agree(name, integers(300) / 4)
    assert is_fast()


def test_sigmoid_near_zero_is_decided_by_its_loop(monkeypatch):
    """Where 1/2 + x / 4 is a midpoint, the cubic term decides."""
    x = torch.cat([torch.arange(-2000, 2000) * 2.0**-e for e in (24, 25, 30)])
    agree("sigmoid", x)
    monkeypatch.setattr(
        executor, "_complete", lambda plan, call, operands, out, index: left.append(index)
    )
    left: list[torch.Tensor] = []
    operator_table.EXACT["sigmoid"](x)
    assert not left


@pytest.mark.parametrize("name", TWO)
def test_formulas_of_two_operands(name):
    special = [x.contiguous() for x in torch.broadcast_tensors(*grid(2))]
    agree(name, *special)
    agree(name, *[torch.tensor(SPECIAL + NOT_FINITE), torch.tensor(NOT_FINITE + SPECIAL)])
    agree(name, any_numbers(1000), any_numbers(1000, seed=1))
    for scale in (1e-30, 1e-6, 1, 5):
        agree(name, normal(2000), normal(2000, seed=1, scale=scale))
    agree(name, integers(300), integers(300, seed=1) / 4)
    agree(name, normal(300) * 1e-40, normal(300, seed=1))
    agree(name, integers(300).clamp(-1, 0), normal(300, seed=1, scale=4))  # many zeros
    assert is_fast()


@pytest.mark.parametrize(
    "name", ["gelu", "gelu_tanh", "gelu_backward", "gelu_tanh_backward", "silu_backward"]
)
def test_zeros_of_gradients_and_ends_of_ranges(name):
    at = [
        -0.7517915964126587,
        -0.7524614220710163,
        -1.2784645557403564,
        -8.0,
        8.0,
        -14.0,
        -15.0,
        -27.0,
        -32.0,
        -38.0,
        -1e7,
        -3e38,
        700.0,
        -745.0,
    ]
    ulps = torch.arange(-3, 4, dtype=torch.int32)
    x = torch.cat([(torch.tensor([a]).view(torch.int32) + ulps).view(torch.float32) for a in at])
    x = torch.cat([x, torch.tensor(NOT_FINITE)])
    for g in (1.0, 0.0, -0.0, 2.0**-149, -3e38, *NOT_FINITE):
        agree(name, *([torch.full_like(x, g)] if "backward" in name else []), x)


def test_erfinv_between_minus_one_and_one():
    """Its domain, of which any_numbers has little, and the numbers next to 1, 1/2 and 0."""
    ulps = torch.arange(200, dtype=torch.int32)
    for at in (1.0, 0.5, 0.0):
        x = (torch.tensor(at + 2.0**-25).view(torch.int32) + ulps - 100).view(torch.float32)
        agree("erfinv", torch.cat([x, -x]))
    agree("erfinv", torch.rand(20000, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    agree("erfinv", torch.exp2(normal(2000, scale=40)).clamp(max=1) * integers(2000).sign())
    assert is_fast()


def test_erfinv_rarely_fails_the_rounding_test(monkeypatch):
    """The initialisation of a large model depends on it."""
    failed = []
    monkeypatch.setattr(
        executor, "_complete", lambda *arguments: failed.extend(arguments[-1].tolist())
    )
    x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    operator_table.EXACT["erfinv"](x)
    assert is_fast() and len(failed) < 3
    monkeypatch.setattr(executor, "_FAST", {})
    monkeypatch.setattr(executor, "_plans", {})
    operator_table.EXACT["erfinv"](x)
    assert not is_fast() and len(failed) < 6


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 511, 513, 4099])
def test_lengths_around_a_block(n):
    for name in ("tanh", "gelu_backward"):
        agree(name, *[normal(n, seed=s) for s in range(1 + (name in TWO))])


def rows_of(shape: tuple[int, ...]) -> list[torch.Tensor]:
    masked = normal(*shape, seed=7)
    masked[masked > 1] = -math.inf
    infinite = torch.where(masked > 1.5, math.inf, masked)
    return [
        normal(*shape),
        integers(*shape),
        normal(*shape, scale=100),
        normal(*shape, scale=1e-20),
        normal(*shape) + 1e9,
        torch.where(integers(*shape) > 1, 1e20, normal(*shape)),  # differences that are rounded
        masked,
        torch.full(shape, -math.inf),
        infinite,
        torch.where(masked > 0, math.nan, masked),
    ]


SHAPES = [(1, 1), (3, 1), (2, 2), (5, 12), (3, 15), (3, 16), (3, 17), (40, 33), (2, 257), (2, 2048)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_formulas_of_rows(name, shape):
    for x in rows_of(shape):
        agree(name, x, -1)
    assert is_fast()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS_BACKWARD)
def test_gradients_of_rows(name, shape):
    forward = operator_table.EXACT[name.replace("_backward_data", "")]
    hot = torch.zeros(shape)
    hot[:, 0] = -1 / 3
    for x in rows_of(shape)[:7]:
        y = forward(x, 1)
        for g in (normal(*shape, seed=3), integers(*shape, seed=3), hot, 0 * hot, any_row(shape)):
            agree(name, g, y, 1, torch.float32)
    assert is_fast()


def any_row(shape: tuple[int, ...]) -> torch.Tensor:
    return any_numbers(math.prod(shape), seed=5).view(shape)


def test_longer_rows_take_the_compiled_path():
    agree("_softmax", normal(2, 2049), 1)
    assert not is_fast()


def test_row_with_one_entry_passes():
    """As in causal attention: its gradient is an exact zero and passes the rounding test."""
    x = normal(6, 6).masked_fill(torch.ones(6, 6).tril() == 0, -math.inf)
    y = operator_table.EXACT["_softmax"](x, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            executor, "_complete", lambda *arguments: pytest.fail("an element failed the test")
        )
        z = operator_table.EXACT["_softmax_backward_data"](
            normal(6, 6, seed=1), y, 1, torch.float32
        )
    assert not z[0].any() and not z[0].signbit().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    x, g = (lay_out(normal(3, 4, 5, seed=s), layout) for s in (0, 1))
    for name in ("gelu", "tanh"):
        agree(name, x)
    agree("gelu_backward", g, x)
    agree("gelu_backward", g, x[:1])
    for dim in range(3):
        agree("_softmax", x, dim)
        agree("_log_softmax", x, dim)
        agree("_softmax_backward_data", g, x, dim, torch.float32)
        agree("_log_softmax_backward_data", g, -x.abs(), dim, torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(threads, monkeypatch):
    """Each thread lists its own failures; none is lost."""
    monkeypatch.setattr(executor, "_MIN_WORK_FOR_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = normal(4099)
        x[::97] = math.nan
        agree("tanh", x)
        for shape in [(700, 7), (3, 1500)]:
            rows = normal(*shape)
            rows[::2, 0] = math.inf
            agree("_softmax", rows, 1)
    finally:
        torch.set_num_threads(before)
