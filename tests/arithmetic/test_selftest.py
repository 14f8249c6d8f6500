"""Tests of the self-test: it passes here, and each check fails on a machine that breaks its assumption."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import operator
import platform
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Callable, Optional

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from reproml.arithmetic import selftest
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators import matmul
from reproml.arithmetic.selftest import CHECKS, DOUBLE, SINGLE, Fault, nearest, value
from verification import oracle


def test_self_test_passes_here():
    outcomes = list(selftest.self_test())
    assert [o.name for o in outcomes] == list(CHECKS)
    assert [(o.name, o.fault) for o in outcomes if o.fault or o.note] == []


# --- the oracle -----------------------------------------------------------------------------------


@given(st.fractions() | st.builds(Fraction, st.integers(), st.integers(1, 2**1100)))
def test_nearest_equals_integer_division_in_python(x):
    try:
        right = x.numerator / x.denominator
    except OverflowError:
        right = math.copysign(math.inf, x)
    assert nearest(x, DOUBLE).to_bytes(8, "little") == struct.pack("<d", right)


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 3))
def test_nearest_equals_the_oracle_for_binary32(x, k):
    exact_path = Fraction(x) + k * Fraction(x) / 2**60
    if exact_path:
        assert nearest(exact_path, SINGLE) == oracle.bits_of(oracle.Real(exact_path)) & 0xFFFF_FFFF


@given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(-1e-307, 1e-307))
def test_value_and_nearest_are_inverse(x):
    bits = int.from_bytes(struct.pack("<d", x), "little")
    assert value(bits, DOUBLE) == Fraction(x)
    assert nearest(value(bits, DOUBLE), DOUBLE, bool(bits & DOUBLE.sign)) == bits
    assert float.fromhex(selftest._hexadecimal(bits, DOUBLE)).hex() == x.hex()


# --- broken machines ------------------------------------------------------------------------------

Change = Callable[[Any, tuple[Any, ...]], Any]


class Broken(TorchDispatchMode):
    """A machine whose operator `name` returns `change(correct result, operands)`."""

    def __init__(self, name: str, change: Change) -> None:
        super().__init__()
        self.name, self.change = f"aten::{name}", change

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return self.change(result, args) if func._schema.name == self.name else result


def off_by_an_ulp(
    at: int = -1, dtype: Optional[torch.dtype] = None, least: int = 1, most: int = 1 << 60
) -> Change:
    """Change one element by an ulp in results of the dtype that have `least` to `most` elements."""

    def change(x: torch.Tensor, args: Any) -> torch.Tensor:
        if not least <= x.numel() <= most or (dtype and x.dtype is not dtype):
            return x
        x = x.clone().contiguous()
        flat = x.view(-1)
        flat[at] = torch.nextafter(flat[at], torch.tensor(math.inf, dtype=x.dtype))
        return x

    return change


def fused(x: torch.Tensor, args: Any) -> torch.Tensor:
    """Return the rounding error of x * y where x * y + z is 0, as a fused operation does."""
    return torch.where(x == 0, torch.full_like(x, 2.0**-60), x)


def fused_in_place(x: torch.Tensor, args: Any) -> torch.Tensor:
    return x.copy_(fused(x, args))


def in_float32(name: str) -> Change:
    return lambda x, args: (
        x
        if x.dtype is not torch.float64
        else getattr(torch, name)(*[a.float() if torch.is_tensor(a) else a for a in args]).double()
    )


def strassen(x: torch.Tensor, args: Any) -> torch.Tensor:
    """Return one level of Strassen's product, whose error is small in norm, but not for each element."""
    a, b = args[0], args[1]
    if a.dtype is not torch.float64 or a.dim() != 2 or any(n % 2 for n in (*a.shape, *b.shape)):
        return x

    def quarters(x: torch.Tensor) -> list[torch.Tensor]:
        return [part for half in x.chunk(2, 0) for part in half.chunk(2, 1)]

    (a11, a12, a21, a22), (b11, b12, b21, b22) = quarters(a), quarters(b)
    m1, m2, m3 = (a11 + a22) @ (b11 + b22), (a21 + a22) @ b11, a11 @ (b12 - b22)
    m4, m5, m6 = a22 @ (b21 - b11), (a11 + a12) @ b22, (a21 - a11) @ (b11 + b12)
    m7 = (a12 - a22) @ (b21 + b22)
    rows = [[m1 + m4 - m5 + m7, m3 + m5], [m2 + m4, m1 - m2 + m3 + m6]]
    return torch.cat([torch.cat(row, 1) for row in rows])


def half_away(x: torch.Tensor, args: Any) -> torch.Tensor:
    return torch.where(args[0] < 0, (args[0] - 0.5).ceil(), (args[0] + 0.5).floor())


def cut(x: torch.Tensor, args: Any) -> torch.Tensor:
    """Round towards zero in a cast to float32."""
    if x.dtype is not torch.float32 or args[0].dtype is not torch.float64:
        return x
    too_far = x.double().abs() > args[0].abs()
    return torch.where(too_far, torch.nextafter(x, torch.zeros_like(x)), x)


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def from_the_end(x: torch.Tensor, args: Any) -> torch.Tensor:
    return torch.sum(args[0].flip(args[1]), *args[1:])


def k_from_the_end(x: torch.Tensor, args: Any) -> torch.Tensor:
    return torch.matmul(args[0].flip(1), args[1].flip(0))


def neighbour(towards: float) -> Change:
    def change(x: torch.Tensor, args: Any) -> torch.Tensor:
        right = np.sqrt(args[0].abs().numpy())
        return torch.where(x > 0, torch.from_numpy(np.nextafter(right, towards)), x)

    return change


def patched(owner: Any, name: str, replacement: Any) -> Any:
    @contextlib.contextmanager
    def patch() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(owner, name, replacement)
            yield

    return patch


def broken(name: str, change: Change) -> Any:
    return lambda: Broken(name, change)


def ulps(count: int) -> Change:
    return lambda x, args: (x.view(torch.int64) + count).view(torch.float64)


reference_product = matmul._compiled
last_product = off_by_an_ulp()


def wrong_product(*args: Any) -> Any:
    return last_product(reference_product(*args), args)


F32, F64 = torch.float32, torch.float64
# assumption: machines that violate it
BROKEN: dict[str, list[Any]] = {
    "subnormal float32 numbers count, in every thread": [
        flushing,
        broken("mul", lambda x, _: torch.where(x.abs() < 2.0**-126, x * 0, x)),
    ],
    "subnormal float64 numbers count, in every thread": [flushing],
    "float32 add is rounded once": [
        broken("add", off_by_an_ulp(least=1 << 15)),  # the last of the threads
        broken("add", off_by_an_ulp(least=1 << 15, at=12_345)),
        broken("add", off_by_an_ulp(most=1)),  # a single element
        broken("add", off_by_an_ulp(least=40, most=80)),  # a tensor and a number
    ],
    "float32 sub is rounded once": [broken("sub", off_by_an_ulp(at=3))],
    "float32 mul is rounded once": [
        flushing,
        broken("mul", lambda x, _: torch.where(x == 0, x.abs(), x)),  # the sign of a zero
        broken("mul", lambda x, _: torch.where(x.isinf(), 3.4028234663852886e38, x)),
    ],
    "float32 div is rounded once": [broken("div", lambda x, args: args[0] * (1 / args[1]))],
    "float64 add is rounded once": [broken("add", off_by_an_ulp(least=1 << 15))],
    "float64 sub is rounded once": [
        broken("sub", off_by_an_ulp(at=5)),
        patched(operator, "sub", lambda a, b: math.nextafter(a, b) if a == 1 else a - b),
    ],
    "float64 mul is rounded once": [broken("mul", in_float32("mul"))],
    "float64 div is rounded once": [broken("div", lambda x, args: args[0] * (1 / args[1]))],
    "float64 sqrt is within an ulp": [
        broken("sqrt", ulps(2)),
        broken("sqrt", ulps(-2)),
    ],
    "casts to float32 are rounded once": [broken("_to_copy", cut), flushing],
    "casts to float64 and int64 are exact": [
        broken("_to_copy", off_by_an_ulp(dtype=F64, at=1)),
        broken("_to_copy", lambda x, args: x + 1 if x.dtype is torch.int64 else x),
    ],
    "float32 mul and add are not fused": [broken("add", fused), broken("add_", fused_in_place)],
    "float64 mul and add are not fused": [broken("sub", fused)],
    "float64 round and floor are exact": [
        broken("round", half_away),
        broken("floor", lambda x, args: args[0].trunc()),
    ],
    "math.fsum is rounded once": [patched(math, "fsum", sum)],
    "integer sums and shifts are exact": [
        broken("sum", lambda x, args: x + 1),
        broken("__rshift__", lambda x, args: args[0].abs() >> 7),
    ],
    "float64 sums keep their error bound": [
        broken("sum", in_float32("sum")),
        broken("sum", lambda x, args: x - args[0].reshape(-1)[-1]),
        broken("cumsum", in_float32("cumsum")),
        broken("scatter_add", lambda x, args: x * (1 + 2.0**-20)),
    ],
    "float64 norms keep their error bound": [
        broken("linalg_vector_norm", lambda x, args: x * (1 + 2.0**-20))
    ],
    "float64 matrix products keep their error bound": [
        broken("mm", strassen),
        broken("mm", in_float32("mm")),
        broken("bmm", in_float32("bmm")),
    ],
    "float64 matrix products of integers are exact": [
        broken("mm", off_by_an_ulp(dtype=F64, at=0)),
        broken("mm", in_float32("mm")),
    ],
    "random numbers are the stream of mt19937": [
        broken("rand", lambda x, args: x.roll(1)),
        broken("rand", lambda x, args: x if x.dtype is F32 else x.flip(0)),
        broken("randperm", lambda x, args: x.flip(0)),
    ],
    "SHA-256 is right": [patched(hashlib, "sha256", hashlib.sha3_256)],
    "compiled loops agree with the reference path": [patched(matmul, "_compiled", wrong_product)],
}


def test_every_check_has_a_broken_machine():
    assert list(BROKEN) == list(CHECKS)


@pytest.mark.parametrize(
    ("name", "machine"), [(name, machine) for name, all_ in BROKEN.items() for machine in all_]
)
def test_check_detects_a_broken_machine(name, machine):
    with machine(), pytest.raises(Fault) as caught:
        CHECKS[name]()
    fault = caught.value
    assert fault.operands and fault.expected != fault.found
    assert fault.expected in str(fault) and fault.found in str(fault)


@pytest.mark.parametrize(
    ("name", "machine"),
    [
        # Another order of summation, or another square root, gives other bits within the assumption.
        ("float64 sums keep their error bound", broken("sum", from_the_end)),
        ("float64 matrix products keep their error bound", broken("mm", k_from_the_end)),
        ("float64 sqrt is within an ulp", broken("sqrt", neighbour(math.inf))),
        ("float64 sqrt is within an ulp", broken("sqrt", neighbour(-math.inf))),
    ],
)
def test_check_accepts_results_within_its_assumption(name, machine):
    with machine():
        CHECKS[name]()


def test_fault_message_names_operation_and_values():
    with Broken("mul", off_by_an_ulp(at=0, least=1 << 15)), pytest.raises(Fault) as caught:
        CHECKS["float32 mul is rounded once"]()
    assert re.fullmatch(  # there are as many numbers as the threads need
        r"torch\.mul in float32, element 0 of \d+, of 0x0\.000000p\+0, 0x0\.000000p\+0: "
        r"expected 0x0\.000000p\+0, found 0x0\.000002p-126",
        str(caught.value),
    )


UPWARD = {"x86_64": 0x800, "AMD64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}


@pytest.mark.parametrize("name", ["float32 add is rounded once", "float64 div is rounded once"])
def test_check_detects_another_rounding_mode(name):
    """The mode is set in the processor, for this thread."""
    libm = ctypes.CDLL(None)
    assert libm.fesetround(UPWARD[platform.machine()]) == 0
    try:
        with pytest.raises(Fault):
            CHECKS[name]()
    finally:
        assert libm.fesetround(0) == 0


def test_check_detects_a_flushing_pool_thread():
    """A thread keeps the setting of the thread that started it, even if that changes its own later."""
    script = """if True:
        import torch
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        torch.ones(1 << 20) + 1  # starts the pool
        torch.set_flush_denormal(False)
        from reproml.arithmetic.selftest import CHECKS
        try:
            CHECKS["subnormal float32 numbers count, in every thread"]()
        except Exception as fault:
            print(fault)
    """
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "found 0x0.000000p+0" in shown.stdout


def test_note_reports_missing_compiled_loops(monkeypatch):
    monkeypatch.setattr(kernels, "library", None)
    assert "slower" in (CHECKS["compiled loops agree with the reference path"]() or "")


def test_self_test_reports_an_exception_as_fault(monkeypatch):
    def fail() -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(selftest, "CHECKS", {"it runs": fail})
    (outcome,) = selftest.self_test()
    assert outcome.as_json()["holds"] is False
    assert outcome.as_json()["fault"] == {"message": "no such instruction"}
