"""The table of csrc/rounding.h: each error bound leaves the room that its rounding test needs.

The inputs have exact results just beside the midpoint of two binary32 numbers, and in binary64 they round
to that midpoint. A loop must round them correctly or report them as failed. In a build whose unit roundoff
U is far too small, so that the bounds have no room, at least one of them must be rounded wrongly.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable, NamedTuple

import pytest
import torch
from torch import Tensor

from reproml.arithmetic.compiler import executor, kernels
from reproml.arithmetic.numerics import formats
from reproml.arithmetic.numerics.rounding import U, nearest
from reproml.arithmetic.operators import optimizer_formulas

CSRC = Path(kernels.__file__).parents[1] / "csrc"
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(kernels.library is None, reason="the kernels are not built"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler"),
]


def compile_c(target: Path, sources: list[Path], *options: str) -> ctypes.CDLL:
    assert COMPILER is not None
    flags = ["-O1", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-w", f"-I{CSRC}"]
    command = [
        COMPILER,
        *flags,
        *options,
        *map(str, sources),
        "-o",
        str(target),
        "-lm",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(target))


# ---- the functions of rounding.h ----

WRAPPERS = """
#include "rounding.h"
int ball(double mid, double rel, double rad, float *to) { return !round_ball(mid, rel, rad, to); }
int padded_ball(double mid, double rad, float *to) { return !round_padded_ball(mid, rad, to); }
int normal_ball(double mid, double rad, float *to) { return !round_normal_ball(mid, rad, to); }
int sum(double mid, double rad, float *to) { return !round_sum(mid, rad, to); }
int signed_sum(double mid, double rad, float *to) { return !round_signed_sum(mid, -rad, to); }
int value_pair(double s, double t, double rad, float *to) { return !round_pair((pair){s, t, rad}, to); }
"""

PADDED = ["padded_ball", "normal_ball", "sum", "signed_sum"]  # they need room in their bound


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("header")
    (folder / "wrappers.c").write_text(WRAPPERS)
    return compile_c(folder / "wrappers.so", [folder / "wrappers.c"])


def round_by(function: Any, *numbers: float) -> tuple[bool, float]:
    """Return whether the test passed, and the rounded number."""
    out = ctypes.c_float()
    passed = function(*map(ctypes.c_double, numbers), ctypes.byref(out))
    return bool(passed), out.value


def midpoints() -> Iterator[float]:
    """Midpoints of two binary32 numbers: odd multiples of half an ulp, of both parities and signs."""
    for exponent in (0, 40, -100):
        for odd in (1, 3, 2**23 + 1, 2**24 - 1):
            yield math.ldexp(1 + odd * 2.0**-24, exponent)
            yield -math.ldexp(1 + odd * 2.0**-24, exponent)


def beside_midpoints() -> Iterator[tuple[Fraction, float]]:
    """Real numbers on either side of a midpoint, with the binary64 numbers around them."""
    for m in midpoints():
        step = Fraction(math.ulp(m))
        for side in (-1, 1):
            for distance in (Fraction(1, 2**60), Fraction(1, 3), Fraction(1), Fraction(2)):
                real = Fraction(m) + side * distance * step
                for steps in range(-3, 4):
                    yield real, m + steps * math.ulp(m)


def upper(x: Fraction) -> float:
    """The least binary64 number >= x >= 0."""
    result = float(x)
    return result if Fraction(result) >= x else math.nextafter(result, math.inf)


def wrong_results(function: Callable[..., Any], room: float, *, rel: bool = False) -> list[Any]:
    wrong = []
    for real, mid in beside_midpoints():
        rad = upper(abs(real - Fraction(mid))) + room * abs(mid)
        arguments = (mid, 0.0, rad) if rel else (mid, rad)
        passed, value = round_by(function, *arguments)
        if passed and value != nearest(real):
            wrong.append((real, mid))
    return wrong


def test_round_ball_needs_no_room(header):
    assert not wrong_results(header.ball, 0, rel=True)


@pytest.mark.parametrize("name", PADDED)
def test_padded_tests_need_room_of_one_roundoff(header, name):
    function = getattr(header, name)
    assert not wrong_results(function, U)
    assert wrong_results(function, 0)


def test_round_ball_adds_the_relative_bound(header):
    mid = 1 + 2.0**-24 + 2.0**-40
    assert round_by(header.ball, mid, 0.0, 0.0) == (True, 1 + 2.0**-23)
    assert not round_by(header.ball, mid, 2.0**-39, 0.0)[0]


def test_round_pair_needs_no_room(header):
    for m in midpoints():
        for t in (2.0**-80, -(2.0**-80), 2.0**-54, -(2.0**-54), 3 * 2.0**-56):
            t *= abs(m)
            for rad in (0.0, abs(t) / 2, abs(t) * (1 - 2.0**-52), abs(t), 2 * abs(t)):
                for error in (-1, 1):
                    real = Fraction(m) + Fraction(t) + error * Fraction(rad)
                    passed, value = round_by(header.value_pair, m, t, rad)
                    assert not passed or value == nearest(real)
            assert round_by(header.value_pair, m, t, 0.0)[0]
    assert round_by(header.value_pair, 1 + 2.0**-24, 0.0, 0.0) == (True, 1.0)
    assert not round_by(header.value_pair, math.inf, 0.0, 0.0)[0]


NARROW_WRAPPERS = """
#include "rounding.h"
int ball(double mid, double rad, float *to) { return !round_ball(mid, 0, rad, to); }
int padded_ball(double mid, double rad, float *to) { return !round_padded_ball(mid, rad, to); }
int normal_ball(double mid, double rad, float *to) { return !round_normal_ball(mid, rad, to); }
int sum(double mid, double rad, float *to) { return !round_sum(mid, rad, to); }
int quick_sum(double mid, double rad, float *to) { return !round_sum_quickly(mid, rad, to); }
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_results_beside_a_midpoint_are_right_or_fail(dtype, tmp_path):
    """Their ends are rounded to binary32, which must not move one across a midpoint."""
    to = formats.FORMATS[dtype]
    (tmp_path / "narrow.c").write_text(NARROW_WRAPPERS)
    library = compile_c(
        tmp_path / "narrow.so", [tmp_path / "narrow.c"], f"-DPRECISION={to.precision}"
    )
    passed = 0
    for exponent in (0, 7, -9, to.lowest + to.precision - 2, to.lowest + 2, to.lowest, to.top - 1):
        last = max(exponent - to.precision + 1, to.lowest)
        for odd in (-1, 1, 3, 2**to.precision - 1):
            m = 2.0**exponent + odd * 2.0 ** (last - 1)
            for real in (
                Fraction(m) * (1 + s * Fraction(1, 2**d)) for s in (-1, 1) for d in SHIFTS
            ):
                for sign in (-1, 1):
                    mid = sign * float(real)
                    rad = max(upper(abs(sign * real - Fraction(mid))), 2.0**-149) + U * abs(mid)
                    for name in ("ball", "padded_ball", "normal_ball", "sum", "quick_sum"):
                        ok, value = round_by(getattr(library, name), mid, rad)
                        passed += ok
                        with formats.rounding_to(dtype):
                            assert not ok or value == nearest(sign * real), (name, mid, rad)
    assert passed > 1000


SHIFTS = (3, 9, 12, 15, 20, 22, 23, 24, 25, 26, 40, 52, 60)


@pytest.mark.parametrize("name", ["ball", *PADDED])
def test_results_that_are_not_numbers_fail_or_stay(header, name):
    extra = (0.0,) if name == "ball" else ()
    passed, value = round_by(getattr(header, name), math.nan, *extra, 0.0)
    assert not passed or math.isnan(value)
    passed, value = round_by(getattr(header, name), math.inf, *extra, 0.0)
    assert not passed or value == math.inf


@pytest.mark.parametrize("name", ["ball", "padded_ball", "normal_ball"])
def test_balls_keep_the_sign_of_an_exact_zero(header, name):
    extra = (0.0,) if name == "ball" else ()
    for zero in (0.0, -0.0):
        passed, value = round_by(getattr(header, name), zero, *extra, 0.0)
        assert passed and math.copysign(1, value) == math.copysign(1, zero)
    for underflow in (2.0**-200, -(2.0**-200)):
        assert not round_by(getattr(header, name), underflow, *extra, 2.0**-199)[0]


def test_sums_compare_the_sign_of_zero(header):
    assert round_by(header.sum, 0.0, 0.0) == (True, 0.0)
    assert not round_by(header.sum, -0.0, 0.0)[0]
    assert not round_by(header.sum, 0.0, 2.0**-200)[0]
    for zero in (0.0, -0.0):
        passed, value = round_by(header.signed_sum, zero, 0.0)
        assert passed and math.copysign(1, value) == math.copysign(1, zero)
    passed, value = round_by(header.value_pair, 0.0, 0.0, 0.0)
    assert passed and math.copysign(1, value) == 1


# ---- the loops ----


class Found(NamedTuple):
    """One element of a loop's result."""

    failed: bool
    value: float
    expected: float

    @property
    def wrong(self) -> bool:
        return not self.failed and self.value != self.expected


# Terms whose sum is just above the midpoint 1 + 2^-24. The sum of the rounding errors loses 2^-140 and
# seems to be just below it.
HARD = [1.0, 2.0**-24, 2.0**-80, 2.0**-140, -(2.0**-80), -(2.0**-148)]
# The sum with the rounding errors passes for these.
EASY = [1.0, 2.0**-24, 2.0**-80]
ABOVE = 1 + 2.0**-23  # where both round to

# Three binary32 numbers whose product is 1 + 3 * 2^-24 - 2^-70, just below a midpoint.
G, W, R, BELOW = 1 + 2.0**-23, 1 + 2.0**-23, 1 - 2.0**-24, 1 + 2.0**-23


def test_inputs_are_beside_midpoints():
    for terms in (HARD, EASY):
        assert nearest(sum(map(Fraction, terms), Fraction(0))) == ABOVE
        assert nearest(Fraction(sum(terms))) == 1
    assert nearest(Fraction(G) * Fraction(W) * Fraction(R)) == BELOW
    assert nearest(Fraction(G * W * R)) == 1 + 2.0**-22


def row(terms: list[float], n: int) -> Tensor:
    return torch.tensor(terms + [0.0] * (n - len(terms)))


def integers(*numbers: int) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def at(x: Any) -> Any:
    return None if x is None else x.data_ptr()


CAPACITY = 64


def listed(count: int, failed: Any, out: Tensor, expected: Any) -> list[Found]:
    """The elements of a loop that returns the number of failures and lists them."""
    places = set(failed[: max(count, 0)])
    everything = count < 0 or count > CAPACITY
    values, results = out.reshape(-1).tolist(), torch.as_tensor(expected).reshape(-1).tolist()
    return [
        Found(everything or i in places, value, result)
        for i, (value, result) in enumerate(zip(values, results))
    ]


def product(library: Any, terms: list[float], k: int, columns: int) -> list[Found]:
    a, b = row(terms, k), torch.ones(columns, k)
    out, failed = torch.empty(columns), integers(*[0] * CAPACITY)
    strides = (k, k, 1, k * columns, *((1, k) if columns > 1 else (1, 1)))
    left = library.reproml_product(
        *(None, 1, 1, columns, k, at(a), *strides[:3], at(b), *strides[3:]),
        *(None, None, at(out), failed, CAPACITY),
    )
    return listed(left, failed, out, [ABOVE] * columns)


def packed_product(library: Any, terms: list[float], n: int, k: int) -> list[Found]:
    """A product [n, k] @ [k, n] with panels of the second matrix that are packed before."""
    pack = library.reproml_pack_matrix
    pack.restype, pack.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_int64] * 3 + [ctypes.c_void_p] + [ctypes.c_int64] * 2,
    )
    a, b, out = row(terms, k).repeat(n, 1), torch.ones(k, n), torch.empty(n, n)
    panels, failed = pack(n, n, k, at(b), n, 1), integers(*[0] * CAPACITY)
    assert panels
    left = library.reproml_product(
        *(panels, 1, n, n, k, at(a), 0, k, 1, at(b), 0, n, 1, None, None, at(out), failed, CAPACITY)
    )
    ctypes.CDLL(None).free(ctypes.c_void_p(panels))
    return listed(left, failed, out, [ABOVE] * n * n)


def total(library: Any, terms: list[float], n: int, columns: int, factor: bool, divisor: float = 1):
    x = (row(terms, n) * divisor).unsqueeze(1).repeat(1, columns)
    y = torch.ones_like(x) if factor else None
    out = torch.empty(columns)
    axes = integers(n, columns, *x.stride(), *x.stride())
    left = library.reproml_sum(at(x), at(y), axes, 2, 1, divisor, at(out))
    return [Found(left != 0, value, ABOVE) for value in out.tolist()]


def scatter(library: Any, terms: list[float], width: int, mean: bool = False) -> list[Found]:
    # Rows of more than one number are added last first.
    terms = terms if width == 1 else terms[::-1]
    values = row(terms, 8).unsqueeze(1).repeat(1, width) * (8 if mean else 1)
    index, out = torch.zeros(8, dtype=torch.int64), torch.empty(width)
    sizes = 1, 8, width, 1
    left = library.reproml_scatter(*sizes, at(index), at(values), None, -1, mean, at(out))
    return [Found(left != 0, value, ABOVE) for value in out.tolist()]


def row_products(library: Any, copies: int, ones: int, running: bool) -> list[Found]:
    """Rows of G, W, R and ones, with the products up to each element or the last of them."""
    x = torch.ones(copies, 3 + ones)
    x[:, :3] = torch.tensor([G, W, R])
    out, failed = torch.empty(x.shape), integers(*[0] * CAPACITY)
    left = library.reproml_row_products(
        *(copies, 3 + ones, 1, at(x), running, at(out), failed, CAPACITY)
    )
    found = out.flatten()[2 + ones :: 3 + ones] if running else out.flatten()[:copies]
    return [Found(left != 0, value, BELOW) for value in found.tolist()]


def nll(library: Any, terms: list[float], mean: int) -> list[Found]:
    x, target = row(terms, 8) * (8 if mean else 1), torch.zeros(8, dtype=torch.int64)
    loss, weights = torch.empty(1), torch.empty(1)
    passed = library.reproml_nll(at(x), at(target), None, 8, 1, -100, mean, at(loss), at(weights))
    return [Found(not passed, loss.item(), -ABOVE)]


def layout(n: int) -> Any:
    return integers(1, 1, n, n, n, 1, 1, 0, 0)


def normalize(
    library: Any,
    x: Tensor,
    b: Any = None,
    mean: float = 0,
    var: Any = None,
    eps: float = 1,
    **running: Any,
) -> tuple[int, Any, Tensor, Tensor, Tensor]:
    means, rstd, out = torch.tensor([float(mean)]), torch.empty(1), torch.empty(len(x))
    failed, old = integers(*[0] * CAPACITY), running.get("old")
    left = library.reproml_normalize(
        *(layout(len(x)), at(x), None, at(b), eps, at(var), at(old), None),
        *(running.get("momentum", 0.0), at(means), at(rstd), at(out), failed, CAPACITY),
    )
    return left, failed, means, rstd, out


def mean_of(library: Any, terms: list[float]) -> list[Found]:
    left, _, mean, _, _ = normalize(library, row(terms, 8) * 8)
    return [Found(left < 0, mean.item(), ABOVE)]


def normalized(library: Any) -> list[Found]:
    """(1 + 2^-60) + 2^-24"""
    x, b, var = torch.ones(1), torch.tensor([2.0**-24]), torch.ones(1)
    left, failed, _, _, out = normalize(library, x, b, -(2.0**-60), var, 0.0)
    return listed(left, failed, out, [ABOVE])


def tie(m: float) -> float:
    """The midpoint m rounded to binary32, ties to even."""
    return torch.tensor(m, dtype=torch.float64).float().item()


def inverse_roots(library: Any) -> list[Found]:
    """1 / sqrt(v), where binary64 finds the midpoint m and the exact root is beside it."""
    found = []
    for k in range(1, 400, 2):
        m = 1 + k * 2.0**-24
        v = 1 / m**2
        expected = math.nextafter(m, math.inf if Fraction(v) * Fraction(m) ** 2 < 1 else 0)
        expected = tie(m + (expected - m) * 2**10)
        if 1 / math.sqrt(v) == m and tie(m) != expected:
            var = torch.tensor([v])
            left, _, _, rstd, _ = normalize(library, torch.ones(1), None, 0, var, v - var.item())
            found.append(Found(left < 0, rstd.item(), expected))
    assert len(found) > 5
    return found


def running_means(library: Any) -> list[Found]:
    """(1 - momentum) old + momentum new just beside a midpoint m."""
    found = []
    for k in range(1, 400, 2):
        m, old, new = 1 + k * 2.0**-24, torch.ones(1), torch.full((2,), 1.001)
        momentum = round((m - 1) / (new[0].item() - 1) * 2.0**53) * 2.0**-53
        real = 1 + Fraction(momentum) * (Fraction(new[0].item()) - 1)
        mid = (1 - momentum) + momentum * new[0].item()
        if mid == m and tie(m) != nearest(real):
            left, _, _, _, _ = normalize(library, new, old=old, momentum=momentum)
            found.append(Found(left < 0, old.item(), nearest(real)))
    assert len(found) > 5
    return found


def normalize_backward(
    library: Any, n: int, x: Tensor, g: Tensor, w: Any, rstd: float, sums: bool, bias: Any, out: Any
) -> tuple[int, Any]:
    failed, groups = integers(*[0] * CAPACITY), [torch.empty(1) if sums else None for _ in range(2)]
    mean, root = torch.zeros(1), torch.tensor([rstd])
    left = library.reproml_normalize_backward(
        *(layout(n), at(x), at(g), at(w), at(mean), at(root), *map(at, groups)),
        *(None, at(bias), at(out), failed, CAPACITY),
    )
    return left, failed


def bias_gradient(library: Any, terms: list[float]) -> list[Found]:
    bias, g = torch.empty(1), row(terms, 32)
    left, _ = normalize_backward(library, 32, torch.zeros(32), g, None, 1.0, False, bias, None)
    return [Found(left < 0, bias.item(), ABOVE)]


def input_gradient(library: Any, sums: bool) -> list[Found]:
    g, w, out = torch.tensor([G, -G]), torch.tensor([W]), torch.empty(2)
    left, failed = normalize_backward(library, 2, torch.zeros(2), g, w, R, sums, None, out)
    return listed(left, failed, out, [BELOW, -BELOW])


def column_moments(library: Any, terms: list[float]) -> list[Found]:
    g, one, zero, sums = row(terms, 32), torch.ones(32), torch.zeros(32), torch.empty(2)
    pointers = at(one), at(g), at(zero), at(one), at(sums), at(sums[1:])
    left = library.reproml_column_moments(32, 1, *pointers)
    return [Found(left != 0, value, ABOVE) for value in sums.tolist()]


def channel_moments(library: Any, terms: list[float]) -> list[Found]:
    g, one, zero, out = row(terms, 32), torch.ones(32), torch.zeros(1), torch.empty(1)
    left = library.reproml_channel_moments(1, 1, 32, 1, at(one), at(g), at(zero), at(one), at(out))
    return [Found(left != 0, out.item(), ABOVE)]


def convolution(library: Any, terms: list[float], name: str) -> list[Found]:
    """32 terms: input channels, those of the transposed convolution, or the images of a batch."""
    n, c, o = {"convolution": (1, 32, 1), "transposed": (1, 1, 32), "weight_gradient": (32, 1, 1)}[
        name
    ]
    sizes = integers(n, 1, c, o, *[1] * 8, 0, 0, 1, 1)
    out, failed = torch.empty(1), integers(*[0] * CAPACITY)
    bias = () if name == "weight_gradient" else (None,)
    x, w = row(terms, 32), torch.ones(32)
    kernel = getattr(library, f"reproml_{name}")
    left = kernel(sizes, at(x), at(w), *bias, at(out), failed, CAPACITY)
    return listed(left, failed, out, [ABOVE])


def adaptive_pool(library: Any, terms: list[float]) -> list[Found]:
    """One element in 32 windows of length 1."""
    g, out, failed = row(terms, 32), torch.empty(1), integers(*[0] * CAPACITY)
    left = library.reproml_adaptive_pool_backward(1, 1, 1, 32, 1, at(g), at(out), failed, CAPACITY)
    return listed(left, failed, out, [ABOVE])


STEP = 2.0**-24 * (1 + 2.0**-40)  # 1 + STEP is just above a midpoint


def sgd(library: Any, momentum: bool) -> list[Found]:
    p, g = torch.ones(1), -torch.ones(1)
    buffer = torch.tensor([-1.0]) if momentum else None
    failed, rate, take = integers(0), 0.0 if momentum else STEP, STEP if momentum else 1.0
    numbers = (1.0, 0.0, rate, 1.0, take)  # sign, decay, rate, momentum, dampening
    left = library.reproml_sgd(1, at(p), at(g), at(buffer), 0, 0, *numbers, failed)
    value = p if buffer is None else -buffer
    return [Found(left != 0, value.item(), ABOVE)]


def adam(library: Any, which: int) -> list[Found]:
    """Parameter, average or average of squares, each once the one that is hard."""
    state = [torch.ones(1) for _ in range(4)]  # parameter, gradient, both averages
    pointers = (ctypes.c_void_p * 5)(*map(at, state), None)  # no average of amsgrad
    first, second = ((1.0, STEP) if which == i else (1.0, 0.0) for i in (2, 3))
    rate, failed = -STEP if which == 0 else 0.0, integers(0)
    left = library.reproml_adam(
        1, integers(1), pointers, 1.0, 0.0, 1.0, *first, *second, rate, 1.0, 0.0, failed
    )
    return [Found(left != 0, state[which].item(), ABOVE)]


def other_optimizer(library: Any) -> list[Found]:
    """The parameter of ASGD. The loops of all optimizers but Adam and SGD share its rounding test."""
    p, average, g = torch.ones(1), torch.zeros(1), torch.ones(1)
    state, failed = (ctypes.c_void_p * 4)(at(p), at(average), None, None), integers(0)
    numbers = (ctypes.c_double * 9)(1.0, -STEP)  # shrinkage, rate
    loop = optimizer_formulas._LOOPS["asgd_copy"]
    left = library.reproml_optimizer_step(loop, 1, state, at(g), 1.0, 0.0, numbers, failed)
    return [Found(left != 0, p.item(), ABOVE)]


def weight_norm_gradient(library: Any) -> list[Found]:
    """1 - b sum, where b sum is -2^-24 - 2^-64."""
    grad, v = torch.tensor([1.0, -(2.0**16), -(2.0**-24)]), torch.tensor([2.0**-40, 1.0, 1.0])
    one, of_g, out, failed = torch.ones(1), torch.ones(1), torch.ones(3), torch.ones(1)
    pointers = map(at, (grad, v, one, one, out, of_g, failed))
    left = library.reproml_weight_norm_backward(1, 3, *pointers)
    return [Found(left != 0, out[0].item(), ABOVE)]


def factors() -> tuple[int, int, int]:
    """p, q and p q: an odd multiple of half an ulp whose tie goes up."""
    for n in range(2**24 + 3, 2**24 + 1000, 4):
        for p in range(3, 4096, 2):
            if n % p == 0:
                return p, n // p, n
    raise AssertionError


def fast(library: Any, name: str, *operands: Tensor) -> tuple[int, Any, Tensor]:
    n, out, failed = operands[0].numel(), torch.empty_like(operands[0]), integers(*[0] * CAPACITY)
    pointers = (ctypes.c_void_p * (len(operands) + 1))(*map(at, (*operands, out)))
    dims = 2 if "softmax" in name else 1
    sizes = integers(*[1, n][-dims:])
    strides = integers(*[n, 1][-dims:] * (len(operands) + 1))
    left = library.reproml_fast(
        executor._FAST[name], None, dims, sizes, strides, pointers, failed, 1
    )
    return left, failed, out


def small_factor(library: Any, name: str) -> list[Found]:
    """g y (1 - y), with g y a midpoint and y far below the roundoff."""
    p, q, n = factors()
    g, y = p * 2.0**20, q * 2.0**-80
    left, failed, out = fast(library, name, torch.tensor([g, 0.0]), torch.tensor([y, 0.0]))
    return listed(left, failed, out[:1], [(n - 1) * 2.0**-60])


def log_softmax_gradient(library: Any, terms: list[float]) -> list[Found]:
    """g - exp(y) sum g for g = 0 and y = 0."""
    g = torch.tensor([0.0, *terms])
    y = torch.full((len(g),), -math.inf)
    y[0] = 0.0
    left, failed, out = fast(library, "log_softmax_backward", g, y)
    return listed(left, failed, out[:1], [-ABOVE])


LOOPS: dict[str, Callable[[Any, list[float]], list[Found]]] = {
    "product": lambda c, v: product(c, v, 32, 1),
    "product along the terms": lambda c, v: product(c, v, 512, 2),
    "product in two passes": lambda c, v: product(c, v, 1100, 1),
    "product with packed panels": lambda c, v: packed_product(c, v, 5, 32),
    "product with packed panels in two sections": lambda c, v: packed_product(c, v, 5, 2100),
    "sum along the terms": lambda c, v: total(c, v, 64, 1, False),
    "sum across columns": lambda c, v: total(c, v, 64, 40, False),
    "sum of products": lambda c, v: total(c, v, 64, 40, True),
    "mean": lambda c, v: total(c, v, 64, 3, False, 64.0),
    "sum of few terms": lambda c, v: total(c, v, 8, 3, False),
    "mean of few terms": lambda c, v: total(c, v, 8, 3, False, 8.0),
    "scatter": lambda c, v: scatter(c, v, 1),
    "scatter rows": lambda c, v: scatter(c, v, 3),
    "mean of scattered rows": lambda c, v: scatter(c, v, 3, True),
    "nll": lambda c, v: nll(c, v, 0),
    "mean nll": lambda c, v: nll(c, v, 1),
    "mean of a normalization": mean_of,
    "bias gradient": bias_gradient,
    "column moments": column_moments,
    "channel moments": channel_moments,
    "convolution": lambda c, v: convolution(c, v, "convolution"),
    "transposed convolution": lambda c, v: convolution(c, v, "transposed"),
    "weight gradient": lambda c, v: convolution(c, v, "weight_gradient"),
    "log_softmax gradient": log_softmax_gradient,
    "gradient of adaptive pooling": adaptive_pool,
}

SINGLE: dict[str, Callable[[Any], list[Found]]] = {
    "output of a normalization": normalized,
    "inverse roots": inverse_roots,
    "products of rows": lambda c: row_products(c, 9, 2, False),
    "products up to each element": lambda c: row_products(c, 9, 2, True),
    "product of a long row": lambda c: row_products(c, 1, 90, False),
    "products up to each element of a long row": lambda c: row_products(c, 1, 90, True),
    "running means": running_means,
    "input gradient": lambda c: input_gradient(c, True),
    "input gradient, given statistics": lambda c: input_gradient(c, False),
    "sgd": lambda c: sgd(c, False),
    "sgd with momentum": lambda c: sgd(c, True),
    "adam": lambda c: adam(c, 0),
    "adam, average": lambda c: adam(c, 2),
    "adam, average of squares": lambda c: adam(c, 3),
    "other optimizers": other_optimizer,
    "gradient of scaled rows": weight_norm_gradient,
    "sigmoid gradient": lambda c: small_factor(c, "sigmoid_backward"),
    "softmax gradient": lambda c: small_factor(c, "softmax_backward"),
}


@pytest.fixture(scope="module")
def no_room(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The loops with bounds that are too small by a factor of 2^147."""
    target = tmp_path_factory.mktemp("kernels") / "no_room.so"
    library = compile_c(target, sorted(CSRC.glob("*.c")), "-DU=0x1p-200")
    for name, (result, arguments) in kernels._SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@pytest.mark.parametrize("name", LOOPS)
def test_loop_rounds_beside_a_midpoint(name, no_room):
    for terms in (HARD, EASY):
        assert not any(found.wrong for found in LOOPS[name](kernels.library, terms))
    assert any(found.wrong for found in LOOPS[name](no_room, HARD))


@pytest.mark.parametrize("name", SINGLE)
def test_formula_rounds_beside_a_midpoint(name, no_room):
    assert not any(found.wrong for found in SINGLE[name](kernels.library))
    assert any(found.wrong for found in SINGLE[name](no_room))
