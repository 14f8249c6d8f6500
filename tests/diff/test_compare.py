from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reproml
from reproml import environment
from reproml.cli import main
from reproml.diff import compare as compare_module
from reproml.diff import rerun
from reproml.diff.compare import Divergence, compare, sparkline
from reproml.diff.rerun import Again, Rerun
from reproml.diff.ulps import Distance
from reproml.errors import ReproError
from reproml.pipeline import golden
from reproml.pipeline.recipe import Recipe, load_recipe
from reproml.pipeline.run import TRACE, Recording, perform, reserve_run_folder
from reproml.tracing import chain
from reproml.tracing.chain import Reader
from tests import tiny
from verification import subprocesses

# --- differences that are planted -----------------------------------------------------------------


def train(
    path: Path,
    numerics: str = "native",
    level: str = "step",
    seed: int = 1,
    shuffle: int = 1,
    lr: float = 0.1,
    later_lr: float = 0.1,
    data: int = 0,
    labels_behind: int = 0,
    width: int = 5,
    initial: float = 0.0,
    dropout: int = 0,
    epochs: int = 2,
) -> None:
    """Four samples a step, three steps an epoch."""
    torch.manual_seed(7)
    x, y = torch.rand(12, 4), torch.randint(3, (12,)).roll(labels_behind)
    x.view(torch.int32).view(-1)[20] ^= data
    exact: Any = reproml.exact if numerics == "exact" else torch.enable_grad
    with reproml.trace(path, level), exact():
        torch.manual_seed(seed)
        last = nn.Linear(width, 3)
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.5), last)
        with torch.no_grad():
            last.bias[0] += initial
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(shuffle)
        loader: Any = DataLoader(TensorDataset(x, y), 4, shuffle=True, generator=generator)
        step = 0
        for _ in range(epochs):
            for inputs, labels in loader:
                step += 1
                if step == 4:
                    optimizer.param_groups[0]["lr"] = later_lr
                    torch.rand(dropout)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()


def planted(folder: Path, **changes: Any) -> Divergence:
    train(folder / "a", level=changes.get("level", "step"))
    train(folder / "b", **changes)
    found = compare(folder / "a", folder / "b")
    assert found is not None and found.kind == "trace"
    return found


def test_equal_traces_have_no_difference(tmp_path):
    for level in ("epoch", "step", "op"):
        train(tmp_path / "a", level=level)
        train(tmp_path / "b", level=level)
        assert compare(tmp_path / "a", tmp_path / "b") is None
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("changes", "part", "step", "tensor", "cause"),
    [
        ({"shuffle": 2}, "batch", 1, "tensor 1 of the batch", "shuffle"),
        ({"labels_behind": 1}, "batch", 1, "tensor 2 of the batch", "part of the batch"),
        ({"data": 1}, "batch", None, "tensor 1 of the batch", "other data"),
        ({"seed": 2}, "initial weights", 1, "0.weight", "seed"),
        ({"initial": 2**-20}, "initial weights", 1, "3.bias", "initial weights"),
        ({"width": 6}, "model", 1, None, "model"),
        ({"lr": 0.2}, "settings", 1, None, "optimizer"),
        ({"later_lr": 0.2}, "weights", 4, "0.weight", "learning rate"),
        ({"dropout": 50}, "loss", 4, None, "draws between steps"),
        ({"epochs": 1}, "length", 4, None, "length"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_first_difference_and_its_cause(tmp_path, changes, part, step, tensor, cause):
    found = planted(tmp_path, **changes)
    assert (found.part, found.tensor, found.cause[0]) == (part, tensor, cause)
    assert found.step == step or step is None


def test_exact_against_native(tmp_path):
    found = planted(tmp_path, numerics="exact")
    assert found.cause[0] == "numerics" and found.part in ("initial weights", "loss", "gradients")


def test_growth_of_the_difference(tmp_path):
    found = planted(tmp_path, initial=2**-20)
    assert [step for step, _ in found.growth] == [1, 2, 3, 4, 5, 6]
    assert all(apart > 0 for _, apart in found.growth)
    found = planted(tmp_path, later_lr=0.2)
    assert [step for step, _ in found.growth] == [4, 5, 6]


FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", FORMATS)
def test_ulps_are_those_of_the_dtype(tmp_path, dtype):
    """Losses and weights that are neighbours in their format."""

    def train(path: Path, factor: float) -> None:
        with reproml.trace(path):
            model = nn.Linear(1, 1, bias=False).to(dtype)
            nn.init.zeros_(model.weight)
            optimizer = torch.optim.SGD(model.parameters(), lr=1)
            number = torch.tensor([factor], dtype=dtype)
            ((model(torch.ones(1, dtype=dtype)) + 1) * number).sum().backward()
            optimizer.step()

    train(tmp_path / "a", 1.0)
    train(tmp_path / "b", 1.0 + torch.finfo(dtype).eps)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found is not None and (found.part, found.distance) == ("loss", Distance(1, 1, 1))
    assert found.growth == [(1, 1)]
    about = [entry.get("about", {}) for entry in Reader(tmp_path / "a")]
    losses = [a["losses"] for a in about if "losses" in a]
    assert losses == ([] if dtype is torch.float32 else [[f"{str(dtype)[6:]}[]"]])


@pytest.mark.parametrize("dtype", FORMATS)
def test_files_of_weights_in_every_format(tmp_path, dtype):
    for name, number in (("a", 1.0), ("b", 1.0 + torch.finfo(dtype).eps)):
        weights = {"x": torch.ones(3, dtype=dtype), "y": torch.tensor([number, 2.0], dtype=dtype)}
        safetensors.torch.save_file(weights, tmp_path / f"{name}.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found is not None and (found.tensor, found.distance) == ("y", Distance(1, 1, 2))


def test_op_level_names_operator_and_line(tmp_path):
    found = planted(tmp_path, level="op", initial=2**-20)
    assert found.part == "initial weights" and found.operator is not None and found.step == 1
    assert found.operator.name == "aten.add_" and found.operator.line.startswith(__file__)
    lines = Path(__file__).read_text().splitlines()
    assert "+= initial" in lines[int(found.operator.line.rsplit(":", 1)[1]) - 1]


def test_truncated_trace_diverges_at_its_end(tmp_path):
    train(tmp_path / "a")
    raw = (tmp_path / "a").read_bytes()
    complete = raw[: raw.index(b'"step":4') + 3]
    (tmp_path / "b").write_bytes(complete)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found is not None and found.part == "length" and found.cause[0] == "interrupted"
    assert found.notes == [
        f"{tmp_path / 'b'} is truncated after entry {complete.count(bytes([10])) - 1}"
    ]


def test_damage_after_first_difference_is_found(tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", lr=0.2)
    raw = (tmp_path / "b").read_bytes()
    (tmp_path / "b").write_bytes(raw.replace(b'"step":6', b'"step":7'))
    with pytest.raises(ReproError, match="is damaged: entry"):
        compare(tmp_path / "a", tmp_path / "b")


# --- the rerun ------------------------------------------------------------------------------------

# An operator whose result is one ulp off where the variable is set, from the third step on.
SCRIPT = """
import os, sys
import torch
import reproml

step = 0

@torch.library.custom_op("planted::sum", mutates_args=())
def add_up(x: torch.Tensor) -> torch.Tensor:
    turned = step >= 3 and os.environ.get("OMP_SCHEDULE") == "dynamic"
    return torch.nextafter(x.sum(), torch.tensor(torch.inf)) if turned else x.sum()

def keep(ctx, inputs, output):
    ctx.size = inputs[0].shape

add_up.register_autograd(lambda ctx, g: g.expand(ctx.size), setup_context=keep)

torch.manual_seed(1)
x = torch.nn.Parameter(torch.rand(1000))
optimizer = torch.optim.SGD([x], lr=0.1)
with reproml.trace(sys.argv[1]):
    for step in range(1, 5):
        optimizer.zero_grad()
        loss = add_up(x * x)  # here
        loss.backward()
        optimizer.step()
"""


def test_rerun_finds_the_operator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    for name, variable in (("a", "static"), ("b", "dynamic")):
        subprocess.run(
            [sys.executable, "script.py", name],
            cwd=tmp_path,
            env={**subprocesses.environment(), "OMP_SCHEDULE": variable},
            check=True,
        )
    before = {name: (tmp_path / name).read_bytes() for name in ("a", "b")}
    shown: list[str] = []
    found = compare(tmp_path / "a", tmp_path / "b", Again(["script.py", "x"], shown.append))
    assert [line.split(":", 1)[0] for line in shown] == [
        f"running {tmp_path / name} again" for name in ("a", "b")
    ]
    assert "OMP_SCHEDULE=dynamic" in shown[1] and shown[1].endswith(f"{sys.executable} script.py x")
    assert {name: (tmp_path / name).read_bytes() for name in ("a", "b")} == before

    assert found is not None and (found.part, found.step, found.notes) == ("loss", 3, [])
    operator = found.operator
    assert operator is not None and (operator.name, operator.same_inputs) == ("planted.sum", True)
    line = SCRIPT.splitlines().index("        loss = add_up(x * x)  # here") + 1
    assert operator.line == f"{tmp_path}/script.py:{line}" or operator.line == f"script.py:{line}"
    assert operator.distance == Distance(1, 1, 1) and operator.shape == "float32[]"
    assert found.cause[0] == "order of a sum"
    assert "in which planted.sum adds up, by OMP_SCHEDULE (static and dynamic)" in found.cause[1]


def reseal(path: Path, **changes: Any) -> None:
    """Give a trace another header, as anybody can: nothing in it is secret."""
    first, rest = path.read_bytes().split(b"\n", 1)
    header = {k: v for k, v in json.loads(first).items() if k != "sha256"}
    path.write_bytes(chain._sealed({**header, **changes}) + rest)


def test_rerun_never_runs_command_of_header(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(Path("a"))
    train(Path("b"), initial=0.5)
    command = {"command": ["sh", "-c", f"touch {tmp_path}/ran"], "folder": str(tmp_path)}
    recipes: list[Any] = [
        {},
        {"recipe": "x"},
        {"recipe": {"name": "../up"}, "numerics": "exact"},
        {"recipe": None, "numerics": "; sh"},
    ]
    for recipe in recipes:
        reseal(Path("a"), **command, **recipe)
        assert main(["diff", "a", "b", "--rerun"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("reproml: cannot run a again: ") and error.count("\n") == 1
        assert not Path("ran").exists() and sorted(os.listdir()) == ["a", "b"]
    assert main(["diff", "a", "b", "--script", "x.py"]) == 2
    assert "add --rerun" in capsys.readouterr().err


def test_rerun_applies_only_harmless_variables():
    variables = {
        "LD_PRELOAD": "x.so",
        "OMP_TOOL_LIBRARIES": "x.so",
        "TORCH_EXTENSIONS_DIR": "x",
        "CUDA_INJECTION64_PATH": "x.so",
        "PYTHONPATH": "x",
        "PATH": "x",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_PLACES": "/x",
        "KMP_AFFINITY": "a\0b",
        "MKL_DYNAMIC": 1,
    }
    torch_facts = {"threads": 3, "capability": "AVX2"}
    header = {"environment": {"torch": torch_facts, "variables": variables}}
    assert rerun._variables(header) == {
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "3",
        "ATEN_CPU_CAPABILITY": "avx2",
    }
    odd: Any
    for odd in ({}, {"environment": []}, {"environment": {"torch": 1, "variables": [1]}}):
        assert rerun._variables(odd) == {}
    assert all(name.startswith(environment.PREFIXES) for name in rerun.VARIABLES)


def test_rerun_of_recipe_takes_recipe_from_header(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, optimizer in (("a", "0.1"), ("b", "0.2")):
        path = tiny.toml(tmp_path, optimizer=f'kind = "sgd"\nlearning_rate = {optimizer}')
        few = ["--recipe", str(path), "--steps", "1", "--trace", name]
        assert main(["train", *few, "--numerics", "native"]) == 0
        path.unlink()
    header = Reader(Path("a")).header
    reseal(Path("a"), command=["false"], folder="/none")
    step = Rerun(Reader(Path("a")), 1, tmp_path, Again()).step
    assert step == next(e for e in Reader(Path("a")) if e["entry"] == "step")
    shown = capsys.readouterr().out.splitlines()[-1]
    assert f"-m reproml train --recipe {tmp_path}/tiny.toml --steps 1 --numerics native" in shown
    assert load_recipe(str(tmp_path / "tiny.toml")) == msgspec.convert(header["recipe"], Recipe)


def test_forged_entries_are_refused_or_compared(tmp_path):
    """The chain does not prove who wrote an entry: each one is checked, and so are its references."""
    train(tmp_path / "a", epochs=1)
    entries = list(Reader(tmp_path / "a"))
    optimizer, step = entries[0], entries[1]

    path = Path(tmp_path / "b")

    def forged(*changed: dict[str, Any]) -> Path:
        writer = chain.Writer(path, {"level": "step"})
        for entry in changed:
            writer.append(entry)
        writer.close()
        return path

    damaged: list[Any] = [
        {"entry": "stop"},
        {**step, "step": "1"},
        {**step, "batch": [["0", "xyz"]]},
        {**step, "loss": None},
        {k: v for k, v in step.items() if k != "weights"},
        {**optimizer, "settings": [1]},
    ]
    for entry in damaged:
        with pytest.raises(ReproError, match="is damaged: entry 1"):
            compare(tmp_path / "a", forged(entry))
    odd: list[tuple[Any, str]] = [
        ({**step, "loss": [*step["loss"], "1"]}, "loss"),
        ({**step, "loss": ["no number"]}, "loss"),
        ({**step, "gradients": ["0"] * 9}, "gradients"),
        ({**step, "optimizer": 5, "weights": ["0"] * len(step["weights"])}, "weights"),
    ]
    for entry, part in odd:
        found = compare(tmp_path / "a", forged(optimizer, entry))
        assert found is not None and found.part == part
        assert compare(forged(optimizer, entry), tmp_path / "a") is not None


@pytest.mark.parametrize("group", ["x", ["x"], {"variables": "x"}, {"torch": 5}])
def test_odd_header_is_compared(tmp_path, group):
    train(tmp_path / "a")
    train(tmp_path / "b", initial=0.5)
    reseal(tmp_path / "a", environment=group, recipe=group, definitions=group)
    assert compare(tmp_path / "a", tmp_path / "b") is not None
    reseal(tmp_path / "a", level=5)
    with pytest.raises(ReproError, match="is damaged: it has no level"):
        compare(tmp_path / "a", tmp_path / "b")


# --- runs, weights, golden files ------------------------------------------------------------------


def saved(out: Path, **changes: Any) -> Path:
    with reserve_run_folder(out) as save:
        save(perform(tiny.recipe(**changes)) if changes else tiny.run())
    return out


def test_runs_without_traces_diverge_at_an_item(tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    assert compare(a, a) is None
    found = compare(a, b)
    assert found is not None and (found.kind, found.part) == ("run", "item")
    assert found.cause == ("recipe", "different recipes: seed (1 and 2)")
    assert found.item == "recipe.canonical_json.sha256"
    assert found.tensor in safetensors.torch.load(tiny.run().weights)
    shown = compare_module.lines(found, "a", "b")
    assert f"an item, first {found.item}; " in shown[0]
    assert shown[2].startswith(f"by how much: weights, most in {found.tensor}: at most ")
    with pytest.raises(ReproError, match="--rerun needs two traces"):
        compare(a, b, Again())


def test_runs_with_traces_diverge_at_a_step(tmp_path):
    folders = []
    for name in ("a", "b"):
        optimizer = 'kind = "sgd"\nlearning_rate = ' + {"a": "0.1", "b": "0.2"}[name]
        recipe = replace_trace(tiny.recipe(optimizer=optimizer))
        result = perform(recipe, recording=Recording(trace=tmp_path / f"{name}.trace"))
        with reserve_run_folder(tmp_path / name) as save:
            save(replace(result, trace=tmp_path / f"{name}.trace"))
        folders.append(tmp_path / name)
        assert (tmp_path / name / TRACE).exists()
    found = compare(*folders)
    assert found is not None and (found.kind, found.part) == ("run", "settings")
    assert found.cause == ("recipe", "different recipes: optimizer.learning_rate (0.1 and 0.2)")


def replace_trace(recipe: Any) -> Any:
    import msgspec

    return msgspec.structs.replace(recipe, trace="step")


def test_weights_files_are_compared(tmp_path):
    state = safetensors.torch.load(tiny.run().weights)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    state["1.bias"][2] = torch.nextafter(state["1.bias"][2], torch.tensor(9.0))
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    assert compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors") is None
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found is not None and (found.tensor, found.differing) == ("1.bias", (1, 4))
    assert found.distance == Distance(1, 1, 8)


def test_golden_files_diverge_in_pipeline_order(tmp_path):
    items = dict(tiny.run().items)
    golden.write_golden(items, tmp_path / "a.json", False)
    later = {**items, "epoch.1.loss": 0.5, "weights.safetensors.sha256": "0"}
    golden.write_golden(later, tmp_path / "b.json", False)
    golden.write_golden({**later, "preprocessed.arrays.sha256": "0"}, tmp_path / "c.json", False)
    found = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert found is not None and (found.item, found.differing) == (
        "epoch.1.loss",
        (2, len(items)),
    )
    assert found.values == (repr(items["epoch.1.loss"]), "0.5")
    found = compare(tmp_path / "a.json", tmp_path / "c.json")
    assert found is not None and found.item == "preprocessed.arrays.sha256"
    assert found.cause[0] == "preprocessing"


@pytest.mark.parametrize("name", ["a.trace", "a.json", "a.safetensors"])
def test_pipe_or_device_is_refused(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(ReproError, match="is a pipe or a device"):
        compare(tmp_path / name, tmp_path / name)


# --- the command line -----------------------------------------------------------------------------


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(Path("a"))
    train(Path("b"), lr=0.2)
    train(Path("c"), level="op")
    assert main(["diff", "a", "a"]) == 0
    assert capsys.readouterr().out == "a and a: no difference\n"
    assert main(["diff", "a", "b"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("a and b diverge in the first step: the settings of the optimizer")
    assert shown[-1] == "likely cause: different settings of the optimizer: lr (0.1 and 0.2)"
    assert main(["diff", "a", "b", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["differ"] is True and result["part"] == "settings"
    for arguments, words in (
        (["a", "c"], "at level step and c at op"),
        (["a", "none"], "none does not exist"),
        (["a", "x.safetensors"], "a is a trace file and x.safetensors a weights file"),
    ):
        assert main(["diff", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_every_part_is_described():
    parts = {part for order in compare_module._ORDER.values() for _, part in order}
    assert parts | {"item", "length", "epoch"} == set(compare_module.PARTS)


def test_sparkline():
    assert sparkline([0, 0, 1, 2, 1024]) == "▁▁▁▂█"
    assert sparkline([0]) == "▁" and len(sparkline(list(range(1000)))) == 40
