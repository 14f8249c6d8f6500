"""The layers of the package: its import graph has no cycle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).replace(".__init__", "")


def module_parents(module: str) -> set[str]:
    """Return the packages that contain the module; they were run before it."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports, also within functions, but not for types."""
    paths = {module_name(path, root): path for path in root.glob(f"{package}/**/*.py")}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
        graph[module] = set()
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in paths else node.module for name in full]
            parents = {
                name.rpartition(".")[0] for name in names
            }  # Python runs their __init__ first
            parents -= {module, *module_parents(module)}
            graph[module] |= {name for name in {*names, *parents} if name in paths}
    return graph


def test_no_module_imports_itself_by_way_of_others():
    graph = import_graph(ROOT, "reproml")
    assert len(graph) > 50 and sum(map(len, graph.values())) > 200
    list(TopologicalSorter(graph).static_order())


def test_a_cycle_is_found(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/__init__.py").write_text("")
    (tmp_path / "p/a.py").write_text("from p import b\n")
    (tmp_path / "p/b.py").write_text("def f():\n    from p.a import x\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(tmp_path, "p")).static_order())


@pytest.mark.parametrize(
    "lower, higher",
    [
        ("reproml.arithmetic.numerics", "reproml.arithmetic.dispatch"),
        ("reproml.arithmetic.numerics", "reproml.arithmetic.compiler"),
        ("reproml.arithmetic.compiler", "reproml.arithmetic.operators"),
        ("reproml.arithmetic.operators", "reproml.arithmetic.distributed"),
        ("reproml.arithmetic", "reproml.pipeline"),
        ("reproml.tracing", "reproml.pipeline"),
        ("reproml.pipeline", "reproml.diff"),
        ("reproml", "reproml.cli"),
    ],
)
def test_lower_layers_do_not_import_higher_ones(lower, higher):
    above = [
        f"{module} imports {name}"
        for module, names in import_graph(ROOT, "reproml").items()
        for name in names
        if (module + ".").startswith(lower + ".") and (name + ".").startswith(higher + ".")
        if not (module + ".").startswith(higher + ".") and module != "reproml.__main__"
    ]
    assert above == []
