"""Interception: modes and tensor subclasses first, then our handlers; nothing registered at import."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reproml
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.numerics.rounding import nearest
from verification.oracle import same_bits

# A sum from left to right in binary32 loses all of the ones.
TERMS = [2.0**24, 1.0, 1.0, -(2.0**24)] * 20
EXACT_SUM = nearest(sum(map(Fraction, TERMS), Fraction(0)))


class RecordingMode(TorchDispatchMode):
    """A mode that records the names of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that holds a tensor and runs every operator on that."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        make: Any = Tensor._make_wrapper_subclass
        x = make(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        x.held = inner
        return x

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def held(x: Any) -> Any:
            return x.held if isinstance(x, Wrapped) else [*map(held, x)] if type(x) is list else x

        named = {name: held(x) for name, x in (kwargs or {}).items()}
        return Wrapped(func(*map(held, args), **named))


class Modest(Tensor):
    """A subclass that runs operators on itself, except `sum` of an axis and those with other subclasses."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if len(types) > 1 or str(func) == "aten.sum.dim_IntList":
            return NotImplemented
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode_first", [False, True])
def test_mode_sees_operators_not_their_definitions(mode_first):
    x, recorder = torch.tensor(TERMS).repeat(3, 1), RecordingMode()
    first, second = (recorder, reproml.exact()) if mode_first else (reproml.exact(), recorder)
    with first, second:
        total = torch.sum(torch.mul(x.t(), 1.0), 0)
    assert total.tolist() == [EXACT_SUM] * 3
    assert recorder.seen[-2:] == ["aten.mul.Tensor", "aten.sum.dim_IntList"]


def test_nested_modes_see_the_same_operators():
    outer, inner = RecordingMode(), RecordingMode()
    with reproml.exact(), outer, inner:
        assert torch.tensor(TERMS).sum().item() == EXACT_SUM
    assert "aten.sum.default" in outer.seen and outer.seen == inner.seen


def test_operators_called_by_a_mode_are_exact():
    class Twice(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "aten.sum" in str(func):
                return torch.tensor(TERMS).sum() + func(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    with reproml.exact(), Twice():
        assert torch.ones(3).sum().item() == EXACT_SUM + 3


def test_unknown_operator_is_refused_inside_a_mode():
    for operation in (torch.special.bessel_y0, lambda x: torch.linalg.svd(x.expand(2, 2))):
        with pytest.raises(reproml.NotExactError), reproml.exact(), RecordingMode():
            operation(torch.ones(2))
    with reproml.exact(), RecordingMode():
        assert torch.bitwise_and(torch.tensor(6), 3).item() == 2


def test_operators_called_by_a_subclass_are_exact():
    x = Wrapped(torch.tensor(TERMS))
    with reproml.exact():
        assert torch.sum(x).held.item() == EXACT_SUM  # type: ignore[attr-defined]
        with pytest.raises(reproml.NotExactError):
            torch.special.bessel_y0(x)


def test_not_implemented_passes_to_the_next():
    class Plain(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return NotImplemented if types else func(*args, **(kwargs or {}))

    x = torch.tensor(TERMS)
    with reproml.exact():
        with Plain():
            assert torch.sum(Wrapped(x)).held.item() == EXACT_SUM  # type: ignore[attr-defined]
            assert torch.sum(torch.nn.Parameter(x)).item() == EXACT_SUM
        assert type(torch.maximum(x.as_subclass(Modest), Wrapped(x))) is Wrapped
        with pytest.raises(TypeError, match="Modest"):
            torch.sum(x.as_subclass(Modest), 0)


def test_subclass_calling_itself_natively_is_exact():
    with reproml.exact():
        total = torch.sum(torch.tensor(TERMS).as_subclass(Modest))
    assert float(total) == EXACT_SUM


class Passing(Tensor):
    """A subclass that leaves every operator to its base class, the usual form."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def test_subclass_calling_super_is_exact():
    x = torch.tensor(TERMS).as_subclass(Passing)
    with reproml.exact():
        assert float(torch.sum(x)) == EXACT_SUM
        assert float(torch.mul(x, 1.0).sum()) == EXACT_SUM
        with pytest.raises(reproml.NotExactError):
            torch.special.bessel_y0(x)


@pytest.mark.parametrize("compiled_before", [False, True])
def test_compiled_functions_run_eagerly(compiled_before):
    called = []

    def backend(graph: Any, examples: Any) -> Any:
        def run(*inputs: Any) -> Any:
            called.append(inputs)
            return (inputs[0].detach().double().sum().float() + 1,)

        return run

    compiled = torch.compile(lambda x: x.tanh().sum(), backend=backend)
    x = torch.tensor(TERMS)
    if compiled_before:
        compiled(x)
    count = len(called)
    with reproml.exact():
        assert same_bits(compiled(x), x.tanh().sum())
    assert len(called) == count
    compiled(x)
    assert len(called) == count + 1  # outside, the compiler is used again


def test_natively_and_intercept_again():
    x = torch.linspace(-3, 3, 1000)
    native = torch.exp(x)
    with reproml.exact():
        exact = torch.exp(x)
        with dispatcher.natively():
            assert same_bits(torch.exp(x), native)
            torch.special.bessel_y0(x)
            with dispatcher.intercept_again():
                assert same_bits(torch.exp(x), exact)
        assert same_bits(torch.exp(x), exact)


def test_interception_continues_after_an_error():
    with reproml.exact():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                torch.mm(torch.ones(2, 3), torch.ones(2, 3))
        with pytest.raises(reproml.NotExactError):
            torch.special.bessel_y0(torch.ones(2))
        assert torch.tensor(TERMS).sum().item() == EXACT_SUM


def test_operators_of_other_namespaces_are_intercepted():
    library = torch.library.Library("reproml_test", "DEF")
    library.define("halve(Tensor x) -> Tensor")
    library.impl("halve", lambda x: x / 2, "CPU")
    try:
        halve = torch.ops.reproml_test.halve
        assert halve(torch.ones(1)).item() == 0.5
        for _ in range(2):
            with pytest.raises(reproml.NotExactError, match="halve"), reproml.exact():
                halve(torch.ones(1))
    finally:
        library._destroy()


IMPORT_ALL_MODULES = """
import importlib, os, pkgutil, torch

def operators_with_kernel():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in torch._C._dispatch_get_all_op_names() if has_kernel(name, "Fake")}

def fork_handlers():
    return [f for f in registered if str(f.__module__).startswith("reproml")]

registered = []
os.register_at_fork = lambda **functions: registered.extend(functions.values())
import reproml
for module in pkgutil.walk_packages(reproml.__path__, "reproml."):
    if "_kernels" not in module.name and not module.name.endswith("__main__"):  # libraries of C, a program
        importlib.import_module(module.name)
from reproml.arithmetic import state
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import rounding

assert not operators_with_kernel() and not fork_handlers() and state.registration is None
assert rounding.defer_test != replay_log.defer_test
for _ in range(2):
    with reproml.exact():
        pass
assert len(fork_handlers()) == 1 and rounding.defer_test == replay_log.defer_test
aten = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
assert len(aten) > 2500 and aten <= operators_with_kernel()
"""


def test_only_the_first_context_registers_kernels():
    """Importing all modules registers nothing; `exact()` registers a kernel for every aten operator."""
    subprocess.run([sys.executable, "-c", IMPORT_ALL_MODULES], check=True)


def test_threads_may_enter_the_first_context_together():
    code = """
import threading, torch, reproml
barrier, errors = threading.Barrier(4), []
def enter():
    barrier.wait()
    try:
        with reproml.exact():
            torch.ones(3).exp()
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=enter) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.cat([x, w]),
        lambda x, w: torch.ops.aten.index.Tensor(x, [None, Wrapped(torch.tensor([0, 1]))]),
        lambda x, w: torch.ops.aten.add.out(x, x, alpha=0.3, out=w),
    ],
)
def test_subclass_in_a_list_or_by_name_runs_the_operator(call):
    with reproml.exact():
        x = torch.randn(2, 3)
        found = call(x, Wrapped(x.clone()))
        expected = call(x, x.clone())
    assert isinstance(found, Wrapped) and torch.equal(
        found.held, getattr(expected, "held", expected)
    )
