"""Tests of arithmetic/patches.py: what exact() replaces in PyTorch, and that it restores all of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

import reproml
from reproml.arithmetic import patches
from reproml.arithmetic.operators import optimizers
from reproml.torch_internals import INTERNALS, OPTIMIZER_STEPS, UnknownPyTorchError

SWITCHES = [(owner, name) for owner, name, _ in patches.PATCHES[:6]]


def current() -> list[Any]:
    return [
        vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
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
            assert (f"torch.optim.{name}", f"_{form}_{name}") in replaced


def test_private_patched_names_are_listed_as_internals():
    private = [
        f"{patches._dotted_name(owner)}.{name}"
        for owner, name, _ in patches.PATCHES
        if name.startswith("_") and not name.endswith("__")
    ]
    assert len(private) > 20 and set(private) <= set(INTERNALS)


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


def test_no_attribute_is_patched_twice():
    names = [(patches._dotted_name(owner), name) for owner, name, _ in patches.PATCHES]
    assert len(set(names)) == len(names)
