"""What every export does, and the model card, which needs no package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reproml import cli
from reproml.cli import main
from reproml.evidence.exports import FORMATS
from reproml.pipeline import golden
from reproml.pipeline.recipe import load_recipe
from reproml.pipeline.run import Run, reserve_run_folder
from tests import tiny
from tests.evidence.conftest import NEEDS


def write(folder: Path, run: Run) -> Path:
    with reserve_run_folder(folder) as save:
        save(run)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(Path("runs/tiny"), tiny.run())


def export(run: Path, *options: str) -> int:
    return main(["export", str(run), *options])


def refusal(
    capsys: pytest.CaptureFixture[str], run: Path, *options: str, form: str = "model-card"
) -> str:
    capsys.readouterr()
    assert export(run, "--format", form, *options) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def card(run: Path) -> str:
    assert export(run, "--format", "model-card") == 0
    return (run.parent / f"{run.name}-model-card/README.md").read_text("utf-8")


def test_the_formats_are_those_of_the_option():
    assert list(FORMATS) == cli.OPTIONS["--format"]["choices"]


def test_the_card_begins_with_yaml(run):
    """Each line is a name and a JSON value, which is also a YAML value."""
    empty, front, _ = card(run).split("---\n", 2)
    lines = [line.split(": ", 1) for line in front.splitlines()]
    metadata = {name: json.loads(value) for name, value in lines}
    assert empty == "" and metadata["library_name"] == "reproml"
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    items = tiny.run().items
    accuracy = int(str(items["test.correct"])) / int(str(items["test.total"]))
    assert model["name"] == "tiny" and result["metrics"][0]["value"] == accuracy


def test_the_commands_of_the_card_verify_the_weights(run):
    text = card(run)
    commands = [
        line
        for block in re.findall("```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    (recipe,) = re.findall("```toml\n(.*?)```", text, re.DOTALL)
    folder = run.parent / "tiny-model-card"
    (folder / "tiny.toml").write_text(recipe)
    assert load_recipe(str(folder / "tiny.toml")).sha256 == tiny.recipe().sha256

    check, train, compare = commands
    assert subprocess.run(check, shell=True, cwd=folder, check=False).returncode == 0
    program, *arguments = train.split()
    assert program == "reproml"
    arguments = [str(folder / a) if a in ("./tiny.toml", "again") else a for a in arguments]
    assert main(arguments) == 0
    printed = subprocess.run(
        compare, shell=True, cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    hashes = {line.split()[0] for line in printed.splitlines()}
    assert hashes == {tiny.run().items["weights.safetensors.sha256"]}

    (folder / "run/weights.safetensors").write_bytes(b"other")
    assert subprocess.run(check, shell=True, cwd=folder, check=False).returncode == 1


def test_the_card_names_the_golden_file(run, capsys):
    assert "No golden file states" in card(run)
    shutil.rmtree("runs/tiny-model-card")
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    assert "The golden file `golden/tiny.json` of the recipe states this hash" in card(run)
    golden.write_golden({**tiny.run().items, "train.correct": 1}, golden.golden_path("tiny"), True)
    other = ["--out", "other"]
    assert f"is not the run that {golden.golden_path('tiny')} expects" in refusal(
        capsys, run, *other
    )


def test_the_card_of_a_signed_run_has_the_third_command(run):
    assert "--signature" not in card(run)
    shutil.rmtree("runs/tiny-model-card")
    (run / "model.sig").write_text("{}")
    assert "\nreproml verify --run run --signature KEY.pub\n" in card(run)


def test_a_native_run_has_no_card(run, capsys):
    record = {**tiny.run().record, "numerics": "native"}
    items = {**tiny.run().items, "definitions.version": "none: native numerics"}
    other = write(Path("runs/native"), replace(tiny.run(), record=record, items=items))
    assert "is not an exact run" in refusal(capsys, other)


def test_an_export_holds_the_run_unchanged(run, capsys):
    assert export(run, "--format", "model-card", "--out", "card", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"run": "runs/tiny", "format": "model-card", "exported": "card"}
    assert {path.name: path.read_bytes() for path in run.iterdir()} == {
        path.name: path.read_bytes() for path in Path("card/run").iterdir()
    }
    assert sorted(path.name for path in Path("card").iterdir()) == ["README.md", "run"]


def test_nothing_is_overwritten(run, capsys):
    assert "is within the run folder" in refusal(capsys, run, "--out", "runs/tiny/card")
    assert "already exists" in refusal(capsys, run, "--out", ".")
    Path("file").write_text("mine")
    assert "already exists" in refusal(capsys, run, "--out", "file")
    assert "cannot write" in refusal(capsys, run, "--out", "file/card")
    assert Path("file").read_text() == "mine"
    assert sorted(path.name for path in Path().glob("**/*") if "partial" in path.name) == []


@pytest.mark.parametrize("target", ["secret", "more", "none"])
def test_links_are_refused(run, capsys, target):
    """An export must not publish what a link leads to."""
    Path("secret").write_text("x")
    Path("more").mkdir()
    (run / "link").symlink_to(Path(target).absolute())
    assert "runs/tiny/link is a link" in refusal(capsys, run)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("numerics", "native", "other numerics"),
        ("definitions.version", 1, "other definitions"),
        ("data.sha256", {}, "other data"),
        ("data.sha256", 7, "other data"),
    ],
)
def test_run_that_contradicts_its_results_is_refused(run, capsys, key, value, message):
    record = {**tiny.run().record, key: value}
    other = write(Path("runs/other"), replace(tiny.run(), record=record))
    assert f"runs/other/run.json records {message} than" in refusal(capsys, other)


def test_run_of_another_recipe_is_refused(run, capsys):
    values = json.loads((run / "run.json").read_text())
    values["recipe"]["seed"] = 99
    (run / "run.json").write_text(json.dumps(values))
    assert "records another recipe than" in refusal(capsys, run)


def test_damaged_runs_are_refused(run, capsys):
    items = tiny.run().items

    def refused(form: str, **changed: Any) -> str:
        other = write(Path("runs/other"), replace(tiny.run(), **changed))
        return refusal(capsys, other, form=form)

    assert "is damaged" in refused("model-card", weights=b"other")
    without = {name: value for name, value in items.items() if name != "test.total"}
    assert "lacks counts" in refused("model-card", items=without)
    wrong = {**items, "test.total": "many"}
    assert "test.total is not a number" in refused("model-card", items=wrong)
    assert "is not a complete run" in refusal(capsys, Path("runs"))


@pytest.mark.parametrize(
    "module, extra, command",
    [
        ("model_signing", "sign", "sign runs/tiny --key key.pem"),
        ("rocrate", "ro-crate", "export runs/tiny --format ro-crate"),
        ("mlflow", "mlflow", "export runs/tiny --format mlflow"),
    ],
)
def test_a_missing_package_is_named(run, capsys, monkeypatch, module, extra, command):
    for name in [module, *(name for name in sys.modules if name.startswith(module + "."))]:
        monkeypatch.setitem(sys.modules, name, None)  # its import raises ModuleNotFoundError
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"reproml: {command.split()[0]} needs the package {module}; install reproml[{extra}]\n"
    )


def test_tests_that_need_packages_are_run_by_ci():
    """Where a package is missing, pytest leaves out its file; .ci/second names each, and fails."""
    folder = Path(__file__).parent
    script = (folder.parent.parent / ".ci/second").read_text("utf-8")
    assert NEEDS and all(f"tests/evidence/{name}" in script for name in NEEDS)
    assert all((folder / name).is_file() for name in NEEDS)
