"""Tests of arithmetic/patches.py: what exact() replaces in PyTorch, and that it restores all of it."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import threading
import warnings
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch

import reproml
from reproml.arithmetic import patches
from reproml.arithmetic.operators import optimizers
from reproml.errors import NotExactError
from reproml.torch_internals import (
    INTERNALS,
    OPTIMIZER_STEPS,
    OUTPUT_CODE,
    UnknownPyTorchError,
    lookup,
)

SET_FLUSH_DENORMAL = torch.set_flush_denormal  # as a program has it after `from torch import ...`
ones = torch.ones(2)

SWITCHES = [(owner, name) for owner, name, _ in patches.PATCHES[:6]]


def current() -> list[Any]:
    return [
        vars(owner).get(name) if isinstance(owner, type) else getattr(owner, name)
        for owner, name, _ in patches.PATCHES
    ]


def test_patches_hold_until_the_outermost_exit():
    before = current()
    with reproml.exact():
        within = current()
        assert all(x is not y for x, y in zip(within, before))
        with reproml.exact():
            pass
        assert current() == within
    assert current() == before
    with pytest.raises(ZeroDivisionError), reproml.exact():
        raise ZeroDivisionError
    assert current() == before


def test_patches_are_restored_after_concurrent_threads():
    before = current()

    def work() -> None:
        for _ in range(20):
            with reproml.exact():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert current() == before


def test_patches_are_undone_if_one_cannot_be_applied(monkeypatch):
    before = current()
    incomplete = [*patches.PATCHES, (torch.nn.init, "_no_such_function", lambda original: None)]
    monkeypatch.setattr(patches, "PATCHES", incomplete)
    for _ in range(2):
        with pytest.raises(UnknownPyTorchError, match=r"torch\.nn\.init\._no_such_function"):
            patches.apply()
    monkeypatch.undo()
    assert current() == before
    with reproml.exact():
        assert current() != before
    assert current() == before


@pytest.mark.parametrize("value", [True, False])
def test_switches_are_off_within_exact(value):
    torch.backends.cudnn.enabled = value
    try:
        before = [getattr(owner, name) for owner, name in SWITCHES]
        with reproml.exact():
            assert not any(getattr(owner, name) for owner, name in SWITCHES)
        assert [getattr(owner, name) for owner, name in SWITCHES] == before
        assert torch.backends.cudnn.enabled is value
    finally:
        torch.backends.cudnn.enabled = True


def test_switches_can_be_set_after_disable_global_flags():
    script = (
        "import torch, reproml\n"
        "torch.backends.disable_global_flags()\n"
        "with reproml.exact():\n"
        "    print(torch.backends.mkldnn.enabled, torch.backends.flags_frozen())\n"
        "print(torch.backends.mkldnn.enabled, torch.backends.flags_frozen())\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["False", "True", "True", "True"]


def test_replaced_restores_a_static_method():
    class Owner:
        @staticmethod
        def double(x: int) -> int:
            return 2 * x

    original = vars(Owner)["double"]
    patch = (Owner, "double", lambda _: staticmethod(lambda x: 3 * x))
    with patches.replaced([patch]):
        assert Owner().double(1) == 3
    assert vars(Owner)["double"] is original and Owner().double(1) == 2


def test_every_step_of_an_optimizer_is_replaced():
    assert set(optimizers.STEPS) == set(OPTIMIZER_STEPS)
    replaced = {
        (owner.__name__, name) for owner, name, _ in patches.PATCHES if "optim" in str(owner)
    }
    for name, forms in OPTIMIZER_STEPS.items():
        for form in forms:
            assert (f"torch.optim.{name}", f"_{form}_{name.lstrip('_')}") in replaced


def test_private_patched_names_are_listed_as_internals():
    undefined = [
        module
        for name, module in sys.modules.items()
        if name.startswith("torch.optim._") or name.rpartition(".")[2] in UNDEFINED
    ]
    private = [
        f"{patches._dotted_name(owner)}.{name}"
        for owner, name, _ in patches.PATCHES
        if name.startswith("_") and not name.endswith("__") and owner not in undefined
    ]
    assert len(private) > 15 and set(private) <= set(INTERNALS)


# Imports every module of reproml and compares PyTorch before and after: attributes of its modules and
# classes, hooks, and kernels for the dispatch key that reproml uses.
IMPORTS = """if True:
    import importlib, pkgutil, sys
    import rich.console, safetensors.torch, sklearn.datasets, torch, torch._dynamo
    import torch.distributed, torch.utils._python_dispatch, torch.utils.data.distributed

    def attributes():
        found = {}
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0] not in ("torch", "safetensors"):
                continue
            for name, value in list(vars(module).items()):
                found[module_name, name] = value
                if isinstance(value, type) and value.__module__.startswith("torch"):
                    for attribute, x in list(vars(value).items()):
                        found[module_name, name, attribute] = x
        return found

    def registered():
        modules, optimizers = torch.nn.modules.module, sys.modules["torch.optim.optimizer"]
        hooks = [x for owner in (modules, optimizers) for name, x in vars(owner).items()
                 if name.startswith("_global_") and isinstance(x, dict) and x]
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        kernels = [x for x in torch._C._dispatch_get_all_op_names() if has(x, "Fake")]
        return hooks, kernels

    before, hooks_before = attributes(), registered()
    import reproml
    for module in pkgutil.walk_packages(reproml.__path__, "reproml."):
        if module.name != "reproml.__main__" and "_kernels" not in module.name:
            importlib.import_module(module.name)
    after = attributes()
    for key, value in before.items():
        if key[-1] not in ("__warningregistry__", "__abstractmethods__") and key in after:
            if after[key] is not value and "_cache" not in key[-1]:
                print(*key)
        elif key not in after:
            print("removed", *key)
    if registered() != hooks_before:
        print("registered", registered())
    print(len(before) > 10_000, "reproml.arithmetic.patches" in sys.modules)
"""


def test_importing_reproml_changes_nothing_in_pytorch():
    shown = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["True", "True"]


# ---- optimizers without a definition -------------------------------------------------------------

UNDEFINED = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer and name not in optimizers.DEFINED
}


def optimizer_step(kind: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
    p = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = kind([p], **options)
    p.grad = torch.full((2, 2), 0.3, dtype=dtype)
    optimizer.step(lambda: (p * p).sum())
    return p.detach()


@pytest.mark.parametrize("name", UNDEFINED)
def test_optimizers_without_a_definition_are_refused(name):
    assert "sparseadam" in UNDEFINED
    with reproml.exact(), pytest.raises(NotExactError, match=name):
        optimizer_step(UNDEFINED[name])
    subclass = type("Mine", (UNDEFINED[name],), {"step": lambda self, closure: closure()})
    with reproml.exact(), pytest.raises(NotExactError, match=name):
        optimizer_step(subclass)


@pytest.mark.parametrize("module", ["torch.optim.future", "torch.optim"])
def test_an_optimizer_of_a_future_pytorch_is_refused(module):
    class Future(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=0.5)

    class Own(Future):
        pass

    with reproml.exact():
        assert optimizer_step(Own).tolist() == [[0.85000002384185791015625] * 2] * 2
    Future.__module__ = module
    assert optimizer_step(Future).shape == (2, 2)
    with reproml.exact(), pytest.raises(NotExactError, match="future"):
        optimizer_step(Future)


def test_functional_steps_without_a_definition_are_refused():
    step = patches._step("_future")
    with reproml.exact(), pytest.raises(NotExactError, match="torch.optim.future has no exact"):
        step(lambda *lists: None, [], [])


@pytest.mark.parametrize(
    "kind, dtype, options, listed",
    [
        (torch.optim.NAdam, torch.complex64, {"foreach": False}, "torch.optim.nadam"),
        (torch.optim.AdamW, torch.complex64, {"foreach": False}, "torch.optim.adam"),
        (torch.optim.SGD, torch.complex64, {"momentum": 0.9, "foreach": False}, "torch.optim.sgd"),
        (torch.optim.Adadelta, torch.complex64, {"foreach": True}, "torch.optim.adadelta"),
        (
            torch.optim.AdamW,
            torch.float32,
            {"weight_decay": 1e39, "fused": True},
            "torch.optim.adam",
        ),
        (torch.optim.AdamW, torch.float32, {"weight_decay": 1e39}, "torch.optim.adam"),
    ],
)
def test_unknown_steps_run_natively_with_warn(kind, dtype, options, listed):
    expected = optimizer_step(kind, dtype, **options)
    with pytest.warns(UserWarning, match=listed), reproml.exact(on_unknown="warn"):
        found = optimizer_step(kind, dtype, **options)
    assert torch.equal(found, expected) and not torch.equal(found, torch.ones_like(found))


def test_a_step_that_is_refused_changes_nothing():
    """SGD checked each parameter when it came to it, and Adam counted the step first."""
    single, short = (
        torch.nn.Parameter(torch.ones(3).to(d)) for d in (torch.float32, torch.float8_e5m2)
    )
    single.grad, short.grad = torch.ones(3), torch.ones(3).to(short.dtype)
    for kind in (torch.optim.SGD, torch.optim.Adadelta, torch.optim.Adam):
        optimizer = kind([single, short], lr=0.5, foreach=False)
        with reproml.exact(), pytest.raises(NotExactError, match="float8"):
            optimizer.step()
        assert torch.equal(single.detach(), torch.ones(3))
        assert all(state["step"] == 0 for state in optimizer.state.values() if "step" in state)


# ---- schedulers and initializers -----------------------------------------------------------------


def test_schedulers_made_before_exact_round_correctly():
    p = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([p], lr=0.1)
    library = torch.optim.lr_scheduler
    cyclic = library.CyclicLR(
        sgd, 0.5, 1.0, 1, 1, mode="exp_range", gamma=0.97, cycle_momentum=False
    )
    restarts = library.CosineAnnealingWarmRestarts(torch.optim.SGD([p], lr=0.1), 2, 2)
    averaging = torch.optim.swa_utils.SWALR(
        torch.optim.SGD([p], lr=1.0), 0.0, anneal_epochs=7, anneal_strategy="cos"
    )
    with reproml.exact(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(1, 40, 2):
            cyclic.step(i)
            power = float(mpmath.power(mpmath.mpf(0.97), i))
            assert cyclic.get_last_lr() == [0.5 + 0.5 * power]
        restarts.step(5.5)
        assert restarts.T_cur == 3.5 and restarts.T_i == 4
        averaging.step()
        for i in range(1, 2000):
            cosine = float(mpmath.cos(mpmath.mpf(math.pi * (i / 2000))))
            assert averaging.anneal_func(i / 2000) == (1 - cosine) / 2
    assert type(cyclic.gamma) is float


def test_gains_take_correctly_rounded_powers():
    slopes = [x / 997 for x in range(1, 200)]
    with reproml.exact():
        found = [torch.nn.init.calculate_gain("leaky_relu", x) for x in slopes]
    assert found == [math.sqrt(2 / (1 + float(Fraction(x) ** 2))) for x in slopes]


# ---- compiled functions, subnormal numbers -------------------------------------------------------


def test_compiled_code_is_refused():
    base = lookup(OUTPUT_CODE)
    compiled = [x for x in base.__subclasses__() if "__call__" in vars(x)]
    assert len(compiled) >= 3
    for kind in compiled:
        code = object.__new__(kind)
        code.compiled_fn_runner = None
        code.gm = code.current_callable = lambda inputs: inputs
        with reproml.exact(), pytest.raises(NotExactError, match=r"torch\._inductor compiled"):
            code([ones])


@pytest.mark.parametrize("stance", ["default", "eager_on_recompile", "fail_on_recompile"])
def test_functions_run_as_written_whatever_the_stance(stance):
    def backend(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    function = torch.compile(lambda x: x + 1, backend=backend)
    with reproml.exact():
        torch.compiler.set_stance(stance)
        assert function(ones).tolist() == [2.0, 2.0]
        with torch.compiler.set_stance(stance):
            assert function(ones).tolist() == [2.0, 2.0]
    with pytest.raises(Exception, match="compiled"):
        function(ones)


def test_flushing_subnormals_is_refused_within_exact():
    with reproml.exact():
        with pytest.raises(NotExactError, match="set_flush_denormal"):
            torch.set_flush_denormal(True)
        torch.set_flush_denormal(False)
        assert (torch.tensor([2.0**-140]) * 0.5).item() == 2.0**-141
    torch.set_flush_denormal(False)


def test_flushing_that_was_not_seen_raises_at_the_end():
    with pytest.raises(NotExactError, match="have been flushed"), reproml.exact():
        SET_FLUSH_DENORMAL(True)
    SET_FLUSH_DENORMAL(False)
    with pytest.raises(ZeroDivisionError), reproml.exact():
        SET_FLUSH_DENORMAL(True)
        raise ZeroDivisionError
    SET_FLUSH_DENORMAL(False)


def test_no_attribute_is_patched_twice():
    names = [(patches._dotted_name(owner), name) for owner, name, _ in patches.PATCHES]
    assert len(set(names)) == len(names)


# ---- TorchScript, torch.export, torch.cond -------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_cannot_be_made_to_optimize():
    before = torch._C._jit_set_profiling_mode(True)
    torch._C._jit_set_profiling_mode(before)
    with reproml.exact(), lookup("torch.jit.fuser")("fuser1"):
        assert torch._C._jit_set_profiling_mode(True) is False
    assert torch._C._jit_set_profiling_mode(before) is before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_methods_of_interfaces_are_refused():
    """Their functions are not part of the script that calls them, and may have been optimized before."""

    @torch.jit.interface
    class Unary(torch.nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # type: ignore[empty-body]
            pass

    class Calls(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.script(torch.nn.Tanh())

        def forward(self, x: torch.Tensor):
            return self.inner.forward(x)

    Calls.__annotations__ = {"inner": Unary}
    script = torch.jit.script(Calls())
    with (
        reproml.exact(),
        pytest.raises(NotExactError, match=r"called at .*test_patches.py:\d+; call"),
    ):
        script(ones)
    with pytest.warns(UserWarning, match="interface"), reproml.exact(on_unknown="warn"):
        script(ones)


class Exported(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp().softmax(0).tanh()


def test_programs_are_exported_outside_and_run_within_exact():
    x, module = torch.linspace(-3, 3, 100), Exported()
    program = torch.export.export(module, (x,))
    with reproml.exact():
        for run in (program.module(), torch.export.unflatten(program)):
            assert torch.equal(run(x), module(x))
        for refused in (
            lambda: torch.export.export(module, (x,)),
            lambda: torch.export.draft_export(module, (x,)),
            program.run_decompositions,
        ):
            with pytest.raises(
                NotExactError, match=r"called at .*test_patches.py:\d+; call it before"
            ):
                refused()
    with pytest.warns(UserWarning, match="torch.export"), reproml.exact(on_unknown="warn"):
        torch.export.export(module, (x,))


def test_conditions_within_vmap_are_refused():
    def branch(x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    with reproml.exact(), pytest.raises(NotExactError, match=r"called at .*; use torch.where"):
        torch.vmap(branch)(torch.ones(2, 3))


def test_optimizer_refusal_names_the_line():
    optimizer = torch.optim.SparseAdam([torch.nn.Parameter(torch.ones(2))])
    with (
        reproml.exact(),
        pytest.raises(
            NotExactError,
            match=r"torch.optim.sparseadam .*, called at \S*test_patches.py:\d+; use one of A",
        ),
    ):
        optimizer.step()
