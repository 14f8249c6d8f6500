"""Tests of compiler/pairs.py and csrc/pairs.c with an exact oracle: what passes is correctly rounded.

The rows are those on which whole tensors fail the first test, and arbitrary ones. `otherwise` marks what
the pairs leave, so that each test also states how much that may be.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.pairs import rows_by_pairs
from reproml.arithmetic.operators import softmax as softmax_operators
from tests.arithmetic.forms import KINDS, agree, numbers
from tests.arithmetic.strategies import ANY, tensors
from verification import oracle as o

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

Rows = Any  # an array of Real


def running_sums(x: Rows) -> list[Any]:
    return [o.total(x[: i + 1]) for i in range(len(x))]


def variance(x: Rows) -> list[Any]:
    mean = o.total(x) / len(x)
    return [o.total([(v - mean) * (v - mean) for v in x]) / (len(x) - 1)]


def deviation(x: Rows) -> list[Any]:
    return [o.sqrt(variance(x)[0])]


def softmax_backward(g: Rows, y: Rows) -> list[Any]:
    total = o.dot(g, y)
    return [b * (a - total) for a, b in zip(g, y)]


def log_softmax_backward(g: Rows, y: Rows) -> list[Any]:
    total = o.total(g)
    return [a - o.exp(b) * total for a, b in zip(g, y)]


def softmax(x: Rows) -> list[Any]:
    top = max(x, key=lambda v: v.mpf)
    e = [o.exp(v - top) for v in x]
    return [v / o.total(e) for v in e]


def log_of_sum(x: Rows) -> tuple[Any, Any]:
    """Return the largest number and the logarithm of the sum of exp(x - largest)."""
    first = max(range(len(x)), key=lambda i: x[i].mpf)
    others = o.total([o.exp(v - x[first]) for i, v in enumerate(x) if i != first])
    return x[first], o.log1p(others)


def log_softmax(x: Rows) -> list[Any]:
    top, log = log_of_sum(x)
    return [v - top - log for v in x]


def logsumexp(x: Rows) -> list[Any]:
    top, log = log_of_sum(x)
    return [top + log]


ORACLES: dict[str, Callable[..., list[Any]]] = {
    f.__name__: f
    for f in (
        running_sums,
        variance,
        deviation,
        softmax_backward,
        log_softmax_backward,
        softmax,
        log_softmax,
        logsumexp,
    )
}
LEFT = 1.2345678806304932  # what no test computes
ONE_FOR_EACH_ROW = ("variance", "deviation", "logsumexp")


def compare(kind: str, *operands: Tensor) -> int:
    """Check every result that passes, up to the sign of an exact zero, and return how many are left."""
    n = operands[0].shape[-1]
    left: list[Tensor] = []

    def otherwise(*rows: Tensor) -> Tensor:
        left.append(rows[0])
        return rows[0].new_full((len(rows[0]), 1 if kind in ONE_FOR_EACH_ROW else n), LEFT)

    out = rows_by_pairs(kind, otherwise, *operands, divisor=max(n - 1, 1))
    passed = out != LEFT
    expected = np.array([ORACLES[kind](*rows) for rows in zip(*map(o.reals, operands))])
    if passed.any():
        o.check(out[passed], expected[passed.numpy()], any_zero=True)
    return int((~passed).any(-1).sum())


def operands_of(kind: str, x: Tensor) -> tuple[Tensor, ...]:
    if kind == "softmax_backward":
        return torch.flip(x, (0,)), x.softmax(-1)
    if kind == "log_softmax_backward":
        return torch.flip(x, (0,)), x.log_softmax(-1)
    return (x,)


@pytest.mark.parametrize("numbers_of", KINDS)
@pytest.mark.parametrize("kind", ORACLES)
def test_hard_rows_pass_and_are_correctly_rounded(kind: str, numbers_of: str) -> None:
    x = numbers((12, 9), numbers_of)
    limit = (
        12 if kind == "logsumexp" else 4
    )  # beside a number that is far above all others nothing is known
    assert compare(kind, *operands_of(kind, x)) <= (limit if numbers_of == "wide" else 1)


@pytest.mark.parametrize("value", [0.1, 2.0**-24, 2.0**-149, 3e38, -1 / 3])
def test_equal_numbers_have_the_variance_0(value: float) -> None:
    x = torch.full((3, 50), value)
    for kind in ("variance", "deviation"):
        assert compare(kind, x) == 0


@pytest.mark.parametrize("g", [1.0, -0.3, 2.0**-140])
def test_gradients_that_cancel(g: float) -> None:
    """`x.softmax(1).sum().backward()`: the sum of the rounded probabilities is not quite 1."""
    x = numbers((20, 40), "normal")
    constant = torch.full_like(x, g)
    assert compare("softmax_backward", constant, x.softmax(1)) == 0
    assert compare("log_softmax_backward", constant, x.log_softmax(1)) == 0
    far = torch.where(torch.arange(40) % 3 == 0, -torch.inf, x.log_softmax(1))
    assert compare("log_softmax_backward", constant, far) == 0
    assert compare("log_softmax_backward", constant, x.log_softmax(1) * 1e6) == 0


@settings(max_examples=100)
@given(tensors((3, 4), ANY), tensors((3, 4), ANY))
def test_arbitrary_rows(x: Tensor, y: Tensor) -> None:
    x, y = (torch.where(t.isfinite(), t, 1.0) for t in (x, y))
    for kind in ORACLES:
        compare(kind, *((x, y) if kind.endswith("backward") else (x,)))


def test_numbers_that_are_not_finite_are_left() -> None:
    x = torch.tensor([[1.0, torch.inf, 2.0], [1.0, torch.nan, 2.0], [1.0, 2.0, 3.0]])
    for kind in ("variance", "deviation"):
        assert compare(kind, x[:2]) == 2
        assert rows_by_pairs(kind, lambda rows: rows[:, :1] * 0 - 1, x, divisor=2).tolist() == [
            [-1],
            [-1],
            [1],
        ]


def test_operands_that_are_not_contiguous_take_the_next_path() -> None:
    x = torch.ones(4, 3).t()
    assert rows_by_pairs("running_sums", lambda rows: rows * 7, x).tolist() == [[7] * 4] * 3


def test_logarithms_of_softmax_that_are_far_from_zero_or_no_numbers() -> None:
    def left(g: list[float], y: list[float]) -> int:
        return compare("log_softmax_backward", torch.tensor([g]), torch.tensor([y]))

    assert left([1.0, -1.0, 5.0], [-1.0, 720.0, -1.0]) == 1
    assert left([1.0, -1.0, 5.0], [-1.0, torch.nan, -1.0]) == 1
    assert left([1.0, -1.0, 5.0], [-1.0, torch.inf, -1.0]) == 1
    assert left([1.0, -1.0, 5.0], [-1.0, -720.0, -torch.inf]) == 0
    # The sum is 2^19, which a compensated sum loses, and the result -2^19 exp(-610) rounds to -0.
    g = [0.0] * 96
    g[:80:16] = [2.0**127, 2.0**73, 2.0**19, -(2.0**73), -(2.0**127)]
    y = torch.full((1, 96), -610.0)
    with reproml.exact():
        found = torch.ops.aten._log_softmax_backward_data(torch.tensor([g]), y, 1, torch.float32)
    assert found[0, 1].item() == 0 and found[0, 1].signbit()


@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_empty_rows_take_the_next_path(shape: tuple[int, int]) -> None:
    empty = torch.empty(shape)
    assert rows_by_pairs("softmax_backward", lambda g, y: g + 1, empty, empty).shape == shape


def test_the_threads_share_many_rows() -> None:
    x = numbers((40_000, 5), "integers")
    y = x.double().cumsum(1).float()  # exact
    assert o.same_bits(rows_by_pairs("running_sums", lambda rows: rows, x) + 0.0, y + 0.0)


@pytest.mark.parametrize("gap", [0, 1, 30, 88, 104, 500, 599, 601, 700, 730, 760, 790, 900, 1e4])
def test_log_softmax_of_ties_agrees_with_exact_path(gap: float) -> None:
    """Differences are midpoints of binary32 numbers, which a logarithm near 0 decides, or equal numbers."""
    top = 4194304.5
    x = torch.full((3, 6), top - gap)
    x[0, :3] = torch.tensor([top, -4194304.0, -4194302.0])
    x[1, :4] = torch.tensor([top, -4194304.0, -torch.inf, top - 2 * gap])
    x[2, 2] = top
    agree(softmax_operators.log_softmax, x, 1)
    agree(softmax_operators.logsumexp, x, 1)
    agree(softmax_operators.softmax, x, 1)


def test_where_a_logarithm_begins_to_count_as_zero_agrees_with_exact_path() -> None:
    """About 2^1097 times smaller than another term, the logarithm falls below bounds of the exact path."""
    gaps = torch.arange(740.0, 770.0)
    x = torch.full((len(gaps), 4), -4194304.0)
    x[:, 0] = 4194304.5
    x[:, 1] = 4194304.5 - gaps
    agree(softmax_operators.log_softmax, x, 1)
    assert compare("log_softmax", x[:1]) == 0


def test_softmax_of_numbers_that_are_not_finite_is_left() -> None:
    for value in (torch.inf, torch.nan):
        x = torch.tensor([[1.0, value, 2.0]])
        assert rows_by_pairs("softmax", lambda x: x * 0 + 7, x).nan_to_num(7).tolist() == [[7] * 3]
    x = torch.full((1, 3), -torch.inf)
    for kind in ("softmax", "log_softmax"):
        assert rows_by_pairs(kind, lambda x: torch.full_like(x, 7), x).tolist() == [[7] * 3]


def library_of(source: str, tmp_path: Path) -> ctypes.CDLL:
    """Compile a C file that includes files of csrc."""
    file, library = tmp_path / "pairs.c", tmp_path / "pairs.so"
    file.write_text(source)
    folder = Path(reproml.__file__).parent / "arithmetic/csrc"
    flags = ["-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-unused-function", "-Wno-psabi"]
    sources = [file, folder / "parallel.c"]
    subprocess.run(["cc", *flags, f"-I{folder}", *sources, "-o", library, "-lm"], check=True)
    return ctypes.CDLL(str(library))


def test_exponential_and_logarithm_of_a_pair_stay_within_their_bounds(tmp_path: Path) -> None:
    library = library_of(
        '#include "softmax_pairs.c"\n'
        "void exponential(double x, double lost, double *out) {\n"
        "    exp_of_pair(x, lost, out, out + 1);\n"
        "    out[2] = out[0] * EXP_OF_PAIR_ERROR;\n"
        "}\n"
        "void logarithm(double x, double lost, double *out) {\n"
        "    pair p = log1p_of_pair((pair){x, lost, 0});\n"
        "    out[0] = p.s, out[1] = p.t, out[2] = p.rad;\n"
        "}\n",
        tmp_path,
    )
    out = (ctypes.c_double * 3)()
    normal = numbers((200,), "normal")
    points = [0.0, 2.0**-149, -1e-20, 600.0, -600.0, 0.34657, -0.34658]
    points += [*normal.tolist(), *(normal * 100).tolist()]
    for function, log in ((library.exponential, False), (library.logarithm, True)):
        function.argtypes = [ctypes.c_double, ctypes.c_double, ctypes.POINTER(ctypes.c_double)]
        for x in points:
            x = math.exp(min(x, 30)) if log else x
            for lost in (0.0, x * 2.0**-53, x * -(2.0**-60)):
                function(x, lost, out)
                value = o.mp.mpf(x) + lost
                exact = o.mp.log1p(value) if log else o.mp.exp(value)
                error = abs(o.mp.mpf(out[0]) + out[1] - exact)
                assert error <= out[2] <= exact * 2.0**-49, (x, lost)


RUNNING = {
    "zeros": torch.zeros(2, 40),
    "descending": -torch.arange(80.0).view(2, 40) * 30,
    "ascending": torch.arange(80.0).view(2, 40) * 30,  # each number leaves those before it behind
    "far": torch.tensor([0.0, -700, -599, -601, 0, 1e30, -1e30, 2.0**24, 1e30] * 4).view(2, 18),
    "from 0": torch.tensor([[-1e4, -2e3, -900, -0.0, -1, 0], [-0.0, -900, -900, -1e5, 0, 800]]),
    "cancelling": torch.tensor([[-math.log(2)] * 4 + [-math.log(3)] * 4] * 2),
    "minus infinity": torch.tensor([[-torch.inf, -torch.inf, 1, -torch.inf, 3, -2]]),
    "subnormal": torch.tensor([[2.0**-149, -(2.0**-149), 2.0**-126, -200, -110]]),
}


@pytest.mark.parametrize("kind", [*RUNNING, *KINDS])
def test_running_logsumexp_is_rounded_once(kind: str, monkeypatch: Any) -> None:
    x = RUNNING[kind] if kind in RUNNING else numbers((3, 40), kind)

    def refused(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(softmax_operators, "logsumexp", refused)  # no element needs it
    out = softmax_operators.logcumsumexp(x, 1)
    for found, row in zip(out, x):
        for i in range(len(row)):
            numbers_before = o.reals(row[: i + 1][row[: i + 1] > -torch.inf])
            if len(numbers_before):
                o.check(found[i : i + 1], logsumexp(numbers_before), any_zero=True)
            else:
                assert found[i] == -torch.inf


@settings(max_examples=60)
@given(tensors((2, 5), ANY))
def test_running_logsumexp_is_that_of_its_definition(x: Tensor) -> None:
    agree(softmax_operators.logcumsumexp, x, 1)
    agree(softmax_operators.logcumsumexp, x, 0)


def test_running_logsumexp_of_long_rows() -> None:
    """Blocks of 128 numbers continue the sums of those before them."""
    x = numbers((2, 700), "normal") * torch.linspace(0, 400, 700)
    agree(softmax_operators.logcumsumexp, x, 1)
    x[1, 300] = torch.inf
    x[0, 20] = torch.nan
    agree(softmax_operators.logcumsumexp, x, 1)
