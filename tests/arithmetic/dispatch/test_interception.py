"""Interception by a spare dispatch key, and by a mode where the key is taken: the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from reproml.arithmetic.dispatch import interception
from reproml.arithmetic.dispatch.interception import ByKey, ByMode, choose, spare_key
from reproml.torch_internals import get_current_dispatch_mode_stack as stack
from verification.subprocesses import ROOT


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


# --- which of the two ------------------------------------------------------------------------------


def test_this_pytorch_has_a_spare_key():
    assert isinstance(interception.interception, ByKey)


@pytest.mark.parametrize(
    "name, value",
    [
        ("parse_dispatch_key", lambda name: None),  # there is no such key
        ("dispatch_has_backend_fallback", lambda key: True),
        ("dispatch_get_registrations_for_dispatch_key", lambda name: ["aten::add.Tensor"]),
        ("KEY_NAME", "AutocastCPU"),  # above autograd
    ],
)
def test_mode_is_chosen_without_a_spare_key(monkeypatch, name, value):
    if name == "KEY_NAME":
        for test in (
            "dispatch_has_backend_fallback",
            "dispatch_get_registrations_for_dispatch_key",
        ):
            monkeypatch.setattr(interception, test, lambda x: [])
    else:
        monkeypatch.setattr(interception, "KEY_NAME", "VmapMode")  # another that nothing uses
    monkeypatch.setattr(interception, name, value)
    assert spare_key() is None and isinstance(choose(), ByMode)


def test_mode_is_chosen_if_the_key_has_no_name(monkeypatch):
    def parse(name: str) -> Any:
        raise RuntimeError("could not parse dispatch key")

    monkeypatch.setattr(interception, "parse_dispatch_key", parse)
    assert isinstance(choose(), ByMode)


# --- the mode --------------------------------------------------------------------------------------


def test_mode_leaves_the_stack_and_returns_to_its_place():
    mode, outer, inner = ByMode(), Passing(), Passing()
    with outer:
        mode.set_included(True)
        with inner:
            assert stack() == [outer, mode, inner] and mode.count_other_modes() == 2
            with pytest.raises(ValueError), mode.natively():
                assert stack() == [outer, inner] and not mode.is_active()
                with mode.natively():
                    assert stack() == [outer, inner]
                with mode.again(), mode.again():
                    assert stack() == [outer, inner, mode]
                raise ValueError
            assert stack() == [outer, mode, inner]
            mode.set_included(False)
            assert stack() == [outer, inner]
        mode.set_included(False)
    assert stack() == []


# --- the same bits ---------------------------------------------------------------------------------

# These tests need what the mode does not offer: kernels, and blocks that are hidden from modes.
ONLY_BY_KEY = (
    "only_the_first_context or not_implemented_passes or calling_itself_natively or calling_super"
)

# Runs the command line in a process in which the key is taken.
COMMAND_LINE = """if True:
    import sys
    from tests import taken_key
    from reproml.arithmetic.dispatch.interception import ByMode, interception
    from reproml.cli import main
    assert isinstance(interception, ByMode)
    sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str, cwd: Path = ROOT) -> str:
    shown = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout


@pytest.mark.parametrize(
    "path, chosen",
    [
        ("arithmetic/dispatch/test_dispatcher.py", f"not ({ONLY_BY_KEY})"),
        ("test_accumulation.py", "complete_batch and (lstm or mlp)"),
        ("arithmetic/distributed/test_sharded.py", "single_process and (lstm or mlp)"),
    ],
)
def test_tests_pass_with_a_taken_key(path, chosen):
    shown = run("-m", "pytest", "-q", "-p", "tests.taken_key", f"tests/{path}", "-k", chosen)
    assert " passed" in shown


def test_golden_file_is_reached_with_a_taken_key():
    assert "verified" in run("-c", COMMAND_LINE, "verify", "--recipe", "digits-mlp")


@pytest.mark.parametrize("name", ["lstm", "resnet_small", "transformer"])
def test_example_has_the_same_digests_with_a_taken_key(tmp_path, name):
    script = str(ROOT / "examples" / f"{name}.py")
    run("-c", COMMAND_LINE, "run", "--digest", "found.json", script, "--steps", "2", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())["optimizers"]
    expected = json.loads((ROOT / "tests" / "examples.json").read_text())[name]
    assert [x["parameters.sha256"] for x in found] == expected


HIDDEN = """if True:
    import torch
    from tests import taken_key
    import reproml

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return super().__torch_dispatch__(func, types, args, kwargs or {})

    def block():
        with torch._C._DisableTorchDispatch():
            torch.ones(3).exp()

    with reproml.exact():
        for hidden in (block, lambda: torch.ones(3).as_subclass(Subclass).exp()):
            try:
                hidden()
            except reproml.NotExactError as error:
                print(error)
"""


def test_hidden_operators_are_refused_with_a_taken_key():
    first, second = run("-c", HIDDEN).splitlines()
    assert first.startswith("torch._C._DisableTorchDispatch() would hide operators from reproml")
    assert second.startswith("super().__torch_dispatch__() would hide operators from reproml")


def test_key_that_was_taken_after_the_import_is_an_error():
    code = """if True:
        import reproml, reproml.arithmetic.dispatch.dispatcher
        from tests import taken_key
        try:
            with reproml.exact():
                pass
        except reproml.NotExactError as error:
            print(error)
    """
    assert "was taken by another library after reproml was imported" in run("-c", code)


def test_views_of_any_layout_pass_the_mode():
    code = """if True:
        import torch
        from tests import taken_key
        import reproml
        sparse, complex = torch.ones(2).to_sparse(), torch.ones(4, dtype=torch.complex64)
        with reproml.exact():
            print(sparse.detach().is_sparse, complex[:3].shape)
    """
    assert run("-c", code) == "True torch.Size([3])\n"
