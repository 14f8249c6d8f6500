"""Compiled programs return the bits of the reference path, for every operator, layout and length."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import direct, executor, kernels
from reproml.arithmetic.compiler.assembler import Program
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.compiler.tape import Tape
from reproml.arithmetic.numerics import elementary
from reproml.arithmetic.numerics.rounding import U
from tests.arithmetic.forms import with_threads
from tests.arithmetic.numerics.test_elementary import sample
from tests.arithmetic.strategies import LAYOUTS, NOT_FINITE, SPECIAL, grid, lay_out
from verification.oracle import bits_of_tensor, same_bits

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(executor, "_plans", {})
    monkeypatch.setattr(executor, "_programs", {})
    monkeypatch.setattr(executor, "_FAST", {})  # test_fast.py tests these
    monkeypatch.setattr(direct, "_LOOPS", {})  # and test_direct.py these


def is_compiled() -> bool:
    return bool(executor._plans) and all(plan is not None for plan in executor._plans.values())


def both(function: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """Return the results of the compiled path and of the reference path."""
    found = function(*arguments, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "library", None)
        return found, function(*arguments, **options)


def agree(function: Any, *arguments: Any, **options: Any) -> None:
    found, reference = both(function, *arguments, **options)
    pairs = zip(found, reference) if isinstance(found, tuple) else [(found, reference)]
    for x, y in pairs:
        assert x.shape == y.shape and same_bits(x, y), (bits_of_tensor(x), bits_of_tensor(y))


ONE = """rsqrt exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv gelu silu softplus mish
log_sigmoid_forward elu celu hardsigmoid hardswish""".split()
TWO = """tanh_backward sigmoid_backward gelu_backward silu_backward mish_backward xlogy
hardswish_backward hardsigmoid_backward""".split()
ROWS = ["_softmax", "_safe_softmax", "_log_softmax", "logsumexp"]
ROWS_BACKWARD = ["_softmax_backward_data", "_log_softmax_backward_data"]
LOSSES = ["mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits"]
SLOPES = ["mse_loss_backward"]


def normal(*shape: int, seed: int = 0, scale: float = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def ties(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return ties of 1 and half its ulp, and subnormal numbers."""
    x = 1 + integers(*shape, seed=seed) * 2.0**-23
    return torch.where(x > 1, x, integers(*shape, seed=seed + 1) * 2.0**-149)


@pytest.mark.parametrize("name", ONE)
def test_operators_of_one_operand_agree(name):
    f = operator_table.EXACT[name]
    agree(f, torch.tensor(SPECIAL + NOT_FINITE))
    for x in (normal(999), ties(40), integers(300)):
        agree(f, x)
    assert is_compiled()


@pytest.mark.parametrize("name", TWO)
def test_operators_of_two_operands_agree(name):
    agree(operator_table.EXACT[name], *torch.broadcast_tensors(*grid(2)))
    for make in (normal, integers, ties):
        agree(operator_table.EXACT[name], make(90, seed=3), make(90, seed=4))
    assert is_compiled()


@pytest.mark.parametrize(
    "shape", [(), (1,), (64, 10), (3, 4, 5), (2, 300), (3, 1000), (300, 1), (9000,)]
)
@pytest.mark.parametrize("name", ROWS + ROWS_BACKWARD)
def test_operators_on_rows_agree(name, shape):
    f, count = operator_table.EXACT[name], 1 + (name in ROWS_BACKWARD)
    masked = normal(*shape, seed=7)
    masked[masked > 1] = -math.inf
    kinds = [normal(*shape), integers(*shape)]
    if count == 1:
        kinds += [masked, torch.full(shape, -math.inf), torch.where(masked > 0, math.nan, masked)]
    if math.prod(shape) < 100:
        kinds.append(ties(*shape))
    for x in kinds:
        others = (integers(*shape, seed=5).mul(0.25),) if count == 2 else ()
        for dim in {-1, -len(shape) if shape else -1}:
            agree(f, x, *others, dim, torch.float32) if others else agree(f, x, dim)


@pytest.mark.parametrize("n", [1, 5, 255, 256, 257, 1000, 20_000])  # the last: by several threads
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_losses_agree(name, n, reduction):
    for make in (normal, integers):
        agree(
            operator_table.EXACT[name], make(n, seed=1), make(n, seed=2).abs(), reduction=reduction
        )
    assert is_compiled() or reduction  # a sum or a mean has a loop of its own


def test_threads_share_a_long_row():
    """The sum of a loss whose terms cancel, and a row whose elements are rounded block by block."""
    x, y, w = normal(20_000), normal(20_000, seed=1).abs(), normal(20_000, seed=2)
    with_threads(operator_table.EXACT["binary_cross_entropy_with_logits"], x, y, w, None, 2)
    with_threads(operator_table.EXACT["_log_softmax"], integers(20_000), 0, False)
    with_threads(operator_table.EXACT["logsumexp"], x, [0])


def polynomial(ctx: Any, x: Any, y: Any) -> Any:
    return x * y + x * Fraction(1, 3) - y


def weighted(ctx: Any, x: Any, y: Any) -> Any:
    return x * ctx.sum(x * y)


SHAPES = [
    ((5,), (5,)), ((5,), ()), ((), ()), ((3, 1), (4,)), ((2, 3, 4), (3, 1)), ((2, 1, 4), (3, 1)),
    ((0,), (0,)), ((2, 0), (1,)), ((7, 300), (300,)), ((300, 7), (300, 1)), ((2, 3, 2, 50), (3, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts_agree(shapes, layout):
    x, y = (lay_out(normal(*shape, seed=i), layout) for i, shape in enumerate(shapes))
    agree(elementwise, polynomial, x, y)
    agree(elementwise, polynomial, x.double(), y)
    agree(elementwise, polynomial, lay_out(ties(*shapes[0]), layout), y)
    full = torch.broadcast_shapes(*shapes)
    for dim in range(len(full)):
        if math.prod(full):
            agree(rowwise, weighted, dim, x, y)
            agree(rowwise, lambda ctx, x, y: ctx.sum(x * y) / 3, dim, x, y)


def test_numbers_and_integer_tensors_agree():
    agree(elementwise, polynomial, normal(5), 0.1)
    agree(elementwise, polynomial, normal(5), 3)
    agree(elementwise, polynomial, normal(5), torch.arange(5))


def test_result_has_the_layout_of_its_operand():
    x = normal(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert elementwise(polynomial, x, x).stride() == x.stride()
    y = normal(4, 5).t()
    assert elementwise(polynomial, y, 1.0).stride() == y.stride()


@pytest.mark.parametrize(
    "n", [15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 513, 1025]
)
def test_lengths_around_a_block_agree(n):
    agree(lambda x: elementwise(lambda ctx, x: ctx.exp(x) / 3, x), normal(n))
    for rows in (1, 2, 9):
        agree(lambda x: rowwise(lambda ctx, x: x - ctx.sum(x) / 7, 1, x), normal(rows, n))
        agree(
            lambda x: rowwise(lambda ctx, x: ctx.max(x) - ctx.sum(ctx.exp(x - ctx.max(x))), 1, x),
            normal(rows, n),
        )


def added(ctx: Any, x: Any, y: Any) -> Any:
    return x + y


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_no_failure_is_lost_between_threads(threads, monkeypatch):
    """Each thread writes its failures to its own section of the buffer."""
    monkeypatch.setattr(executor, "_MIN_WORK_FOR_THREADS", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in [(4099,), (37, 41), (5, 700), (3, 7, 9)]:
            x = normal(*shape)
            x.view(-1)[::97] = 1 + 2.0**-23
            y = torch.where(x == 1 + 2.0**-23, 2.0**-24, 0.25)
            agree(elementwise, added, x, y)
            agree(rowwise, lambda ctx, x, y: x + y + 0 * ctx.sum(x), -1, x, y)
            agree(rowwise, lambda ctx, x, y: ctx.sum(x + y), -1, x, y)
    finally:
        torch.set_num_threads(before)


def test_failed_elements_take_the_reference_path():
    seen = []

    def reference(x):
        seen.append(x.numel())
        return x + 5

    x = torch.tensor([2.0, 1.0, 3.0, math.nan, 1.0])
    # lgamma has no instruction in pairs, whose test would pass.
    formula = lambda ctx, x: x + 0 * ctx.lgamma(x) + Fraction(1, 2**24)  # noqa: E731
    y = elementwise(formula, x, reference=reference)
    assert (
        seen == [2]  # the NaN of an operand that is NaN is the result
        and y[[1, 4]].tolist() == [6, 6]
        and y[3].isnan()
        and y[[0, 2]].tolist() == [2, 3]
    )
    rows = torch.tensor([[1.0, 2.0**-24], [1.0, 1.0], [2.0**-24, 1.0]])
    y = rowwise(lambda ctx, x: ctx.sum(x), 1, rows, reference=lambda x: x.sum(1, keepdim=True) + 7)
    assert y.tolist() == [[8], [2], [8]]


def test_formulas_are_identified_by_code_and_cells():
    def scaled(factor: Any) -> Any:
        return elementwise(lambda ctx, x: x * factor, torch.ones(2))[0].item()

    assert [scaled(f) for f in (2, 3, Fraction(1, 2), 2)] == [2, 3, 0.5, 2]

    def through(f: Any) -> Any:
        return elementwise(lambda ctx, x: f(x), torch.ones(1)).item()

    assert [through(lambda x: x + 1), through(lambda x: x + 2)] == [2, 3]
    assert len(executor._plans) == 5


def test_unsupported_formulas_take_the_reference_path():
    branching = lambda ctx, x: x if x < 0 else -x  # noqa: E731
    one = torch.ones(1)
    assert elementwise(branching, -one).item() == -1 and elementwise(branching, one).item() == -1
    listed = [1]
    assert elementwise(lambda ctx, x: x + listed[0], one).item() == 2
    without_copies = lambda ctx, x: ctx.exact(x.mid.clone())  # noqa: E731
    assert elementwise(without_copies, one).item() == 1
    assert not is_compiled()


def test_number_of_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(executor, "_MAX_PLANS", 4)

    def plus(n: int) -> Any:
        return elementwise(lambda ctx, x: x + n, torch.zeros(1)).item()

    assert [plus(n) for n in range(20)] == list(range(20))
    assert len(executor._plans) <= 4


# ---- single instructions ---------------------------------------------------------------------------


def midpoint(ctx: Any, y: Any, from_: Any = None) -> Any:
    """Return the computed midpoint, or its difference from a float64 operand, as an exact number."""
    return ctx.exact(y.mid if from_ is None else y.mid - from_.mid)


def refuse(*operands: Any) -> Any:
    raise AssertionError("an element failed the rounding test")


RANGES = {
    "exp": (-690, 709), "expm1": (-60, 709), "log": (2.0**-149, 1e38), "log1p": (-1 + 2.0**-50, 1e38),
    "sin": (-600, 600), "cos": (-600, 600), "sinpi": (0, 2), "cospi": (0, 2), "erf": (-10, 10),
    "erfc": (-10, 26), "erfinv": (2.0**-53 - 1, 1 - 2.0**-53), "sqrt": (0, 1e30),
}  # fmt: skip
REFERENCES = {
    "sin": lambda x: elementary.sin_cos(x)[0],
    "cos": lambda x: elementary.sin_cos(x)[1],
    "sinpi": lambda x: elementary.sin_cos_pi(x)[0],
    "cospi": lambda x: elementary.sin_cos_pi(x)[1],
    "sqrt": lambda x: torch.tensor(np.sqrt(np.where(x < 0, np.nan, x))),
}


@pytest.mark.parametrize("name", RANGES)
def test_functions_have_the_bits_of_elementary_py(name):
    """Therefore the error that test_elementary.py measures is theirs as well."""
    low, high = RANGES[name]
    x = torch.cat([sample(low, high), sample(max(low, -2), min(high, 2))])
    reference: Any = REFERENCES.get(name) or getattr(elementary, name)
    difference = elementwise(
        lambda ctx, x, y: midpoint(ctx, getattr(ctx, name)(x), y), x, reference(x), reference=refuse
    )
    assert not difference.any()
    special = torch.tensor([0.0, -0.0, *NOT_FINITE, -5e-324, 1e308])
    special = special if name not in ("sinpi", "cospi") else special[:2]
    agree_in = elementwise(
        lambda ctx, x: midpoint(ctx, getattr(ctx, name)(x)),
        special,
        reference=lambda x: reference(x.double()).float(),
    )
    assert same_bits(agree_in, reference(special.double()).float())


@pytest.mark.parametrize("n", [1, 3, 16, 33, 256, 257, 3000, 100000])
def test_sum_keeps_its_rounding_errors(n):
    random = np.random.default_rng(n)
    x = torch.tensor(random.standard_normal(n) * 2.0 ** random.integers(-20, 20, n))
    exact = torch.full((n,), math.fsum(x.tolist()), dtype=torch.float64)
    difference = rowwise(lambda ctx, x, y: midpoint(ctx, ctx.sum(x), ctx.max(y)), 0, x, exact)
    assert abs(difference.item()) <= 2 * U * x.abs().sum()


def test_program_has_no_duplicate_or_unused_instruction():
    tape = Tape(["load32"])
    (x,) = (tape.exact(register) for register in tape.operands)
    y = tape.exp(-abs(x)) + tape.exp(-abs(x))
    used = [instruction.op for instruction in tape.code]
    assert used.count("exp") == used.count("abs") == 1 and "le" not in used
    program = Program(tape, y, rows=False)
    assert program.instructions <= 8
