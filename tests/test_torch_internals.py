"""Tests of torch_internals.py, the only module that may use private names of PyTorch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reproml import torch_internals
from reproml.errors import ReproError
from reproml.torch_internals import INTERNALS, UnknownPyTorchError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "reproml"

# Attributes with an underscore that are public in Python, NumPy or mpmath.
NOT_PYTORCH = {"_asdict", "_fields", "_getframe", "_mpf_", "_replace"}


@pytest.mark.parametrize("name", INTERNALS)
def test_internal_has_purpose_and_consequence(name):
    purpose, without = INTERNALS[name]
    assert purpose and without and name.startswith("torch.")


def test_lookup_finds_modules_that_torch_hides():
    adam = torch_internals.lookup("torch.optim.adam._single_tensor_adam")
    assert adam.__module__ == "torch.optim.adam" and not hasattr(torch.optim, "adam")
    assert torch_internals.lookup("torch.Tensor") is torch.Tensor


@pytest.mark.parametrize(
    "name", ["torch._C._no_such_name", "torch.optim.no_module._f", "torch.nn.init._no.name"]
)
def test_lookup_of_a_missing_name_raises(name):
    with pytest.raises(UnknownPyTorchError) as caught:
        torch_internals.lookup(name)
    assert (
        str(caught.value)
        == f"reproml does not know PyTorch {torch.__version__} yet: {name} is missing"
    )
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, ReproError)


def test_missing_attribute_raises():
    with pytest.raises(UnknownPyTorchError, match=r"OpOverload\._no_such_name is missing"):
        torch_internals.attribute(
            torch.ops.aten.add.Tensor, "torch._ops.OpOverload", "_no_such_name", "", ""
        )
    del INTERNALS["torch._ops.OpOverload._no_such_name"]


# Removes each private name in turn, in a process of its own, and enters exact().
MISSING = """if True:
    import importlib, os, sys
    import torch, torch._dynamo, torch._inductor.output_code, torch.export
    from reproml.torch_internals import INTERNALS, UnknownPyTorchError, lookup

    def remove(name):
        owner_name, _, last = name.rpartition(".")
        if owner_name == "torch._ops.OpOverload":
            return delattr(torch.ops.aten.add.Tensor, last)
        if owner_name == "torch.autograd.graph.Node":
            torch._C._FunctionBase = object
            return None
        owner = lookup(owner_name)
        if name in sys.modules:
            sys.modules[name] = None  # as if there were no such file
        if last not in vars(owner):  # a module may stand for another
            owner = getattr(owner, "m", owner)
        try:
            return delattr(owner, last)
        except (AttributeError, TypeError):  # an attribute of a type of C stays: another type instead
            parent, _, kind = owner_name.rpartition(".")
            return setattr(lookup(parent), kind, object)

    for name in INTERNALS:
        if os.fork():
            os.wait()
            continue
        for module in [x for x in sys.modules if x.startswith("reproml")]:
            del sys.modules[module]
        try:
            remove(name)
            import reproml
            with reproml.exact():
                print(name, "| not found to be missing")
        except BaseException as error:
            print(name, "|", error)
        sys.stdout.flush()
        os._exit(0)
"""


def test_each_missing_name_is_reported():
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MISSING], capture_output=True, text=True, check=True
    )
    reported = dict(line.split(" | ", 1) for line in shown.stdout.splitlines())
    prefix = f"reproml does not know PyTorch {torch.__version__} yet: "
    assert reported == {name: f"{prefix}{name} is missing" for name in INTERNALS}


def test_command_line_reports_a_missing_name():
    script = (
        "import sys, torch\n"
        "del torch.nn.init._no_grad_trunc_normal_\n"
        "from reproml.cli import main\n"
        "sys.exit(main(['run', 'no-script.py']))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1
    assert "torch.nn.init._no_grad_trunc_normal_ is missing" in shown.stderr


def test_importing_reproml_does_not_import_torch():
    script = "import sys, reproml; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "False\n"


# --- no other module uses a private name ----------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def dotted(node: ast.AST) -> str:
    """Return "a.b.c" for such an expression, "" for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return owner and f"{owner}.{node.attr}"
    return ""


def names_from_torch(tree: ast.AST) -> dict[str, str]:
    """Map each name that a module imports from torch to the dotted name of what it is."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def names_of_our_own(trees: list[ast.AST]) -> set[str]:
    """Return the private names that reproml itself defines: functions, classes, variables, attributes."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                names.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def private_uses(tree: ast.AST, allowed: set[str]) -> Iterator[str]:
    """Yield the private names of PyTorch in a module that is not torch_internals."""
    imported = names_from_torch(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            full = [".".join([*modules, alias.name]) for alias in node.names]
            yield from (
                x for x in full if x.startswith("torch.") and any(map(is_private, x.split(".")))
            )
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            first, _, rest = dotted(node).partition(".")
            if first in imported:  # torch.ops.aten._to_copy is the public name of an operator
                name = f"{imported[first]}.{rest}"
                if not name.startswith("torch.ops."):
                    yield name
            elif node.attr not in allowed:
                yield f"(...).{node.attr}"
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr"):
            key = node.args[1]
            if isinstance(key, ast.Constant) and is_private(str(key.value)):
                if key.value not in allowed:
                    yield f"getattr(..., {key.value!r})"
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            module = node.args[0]
            if isinstance(module, ast.Constant) and str(module.value).startswith("torch._"):
                yield str(module.value)


def all_private_uses(root: Path) -> dict[str, list[str]]:
    trees: dict[str, ast.AST] = {
        str(path.relative_to(root)): ast.parse(path.read_text("utf-8"))
        for path in sorted(root.rglob("*.py"))
    }
    own = names_of_our_own(list(trees.values()))
    # Private attributes of objects, such as an operator's _schema, may be read once they are listed.
    kinds = ("torch._ops.OpOverload.", "torch.library.Library.", "torch.autograd.graph.Node.")
    listed = {name.rpartition(".")[2] for name in INTERNALS if name.startswith(kinds)}
    allowed = own | listed | NOT_PYTORCH
    found = {name: list(private_uses(tree, allowed)) for name, tree in trees.items()}
    found.pop("torch_internals.py", None)
    return {name: uses for name, uses in found.items() if uses}


def test_private_names_are_used_by_torch_internals_only():
    assert all_private_uses(PACKAGE) == {}


@pytest.mark.parametrize(
    "line, found",
    [
        ("import torch\ntorch._C._f()", ["torch._C._f", "torch._C"]),
        ("import torch._tensor_str", ["torch._tensor_str"]),
        ("from torch.utils._pytree import tree_map", ["torch.utils._pytree.tree_map"]),
        ("from torch.nn.init import _f", ["torch.nn.init._f"]),
        ("from torch import Tensor\nTensor._make()", ["torch.Tensor._make"]),
        ("import torch.distributed as dist\ndist._f", ["torch.distributed._f"]),
        ("import importlib\nimportlib.import_module('torch._dynamo')", ["torch._dynamo"]),
        ("def f(x):\n    return x._private_to_torch", ["(...)._private_to_torch"]),
        ("def f(x):\n    return getattr(x, '_private', None)", ["getattr(..., '_private')"]),
        ("class A:\n    def __init__(self):\n        self._x = self.__dict__", []),
        ("import torch\ntorch.ops.aten._to_copy, torch.__version__, torch.nn.init", []),
        ("def f(operator):\n    return operator._schema, getattr(operator, '_op')", []),
    ],
)
def test_private_uses_are_found(tmp_path, line, found):
    (tmp_path / "module.py").write_text(line)
    assert all_private_uses(tmp_path).get("module.py", []) == found
