"""`golden --list`: what it shows, and that a contradiction fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from reproml.cli import main
from reproml.evidence import registry
from reproml.pipeline import golden
from reproml.pipeline.data import SHAPES, load_dataset
from reproml.versions import DEFINITIONS
from tests import tiny
from tests.evidence.statements import rewrite, save_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["digits-mlp", "mnist-cnn", "mnist-mlp-bf16", "mnist-mlp"]  # in the order of the files


@pytest.fixture
def at_work(tmp_path, monkeypatch) -> Path:
    """Work in a folder with a golden file, its recipe and one confirmation; return the confirmation."""
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    confirmation = Path("golden/confirmations/tiny/lab.json")
    confirmation.parent.mkdir(parents=True)
    run = save_run(tmp_path / "run", builder="lab")
    shutil.copy(run / "provenance.json", confirmation)
    return confirmation


def test_golden_files_of_the_project_are_listed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["golden", "--list", "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["golden"]}
    assert list(listed) == NAMES
    assert (listed["mnist-cnn"]["task"], listed["mnist-cnn"]["parameters"]) == ("mnist", 61706)
    assert listed["mnist-mlp"]["accuracy"] == "97.18 %"
    for name, entry in listed.items():
        items = json.loads((ROOT / f"golden/{name}.json").read_text())
        assert entry["sha256"] == items["weights.safetensors.sha256"]
        assert entry["definitions"] == DEFINITIONS
        versions = {line.partition(",")[0] for line in entry["confirmed"]}
        assert versions == {"Python 3.9", "Python 3.13"}, name


def test_installed_golden_files_are_listed_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [e.name for e in registry.entries()] == NAMES


def test_entry_shows_where_it_was_confirmed(at_work, capsys):
    assert main(["golden", "--list"]) == 0
    out = capsys.readouterr().out
    items = tiny.run().items
    correct = f"{100 * float(str(items['test.correct'])) / 297:.2f} %"
    assert f"  {correct}  " in out and str(items["weights.safetensors.sha256"]) in out
    assert "    confirmed: Python 3." in out and ": urn:reproml:builder:lab" in out


def test_golden_file_without_recipe_or_confirmation(at_work):
    Path("tiny.toml").unlink()
    at_work.unlink()
    (entry,) = registry.entries()
    assert (entry.task, entry.parameters, entry.confirmed, entry.defects) == ("", None, [], [])


def damage_weights(values):
    values["subject"][0]["digest"]["sha256"] = "0" * 64


def damage_recipe(values):
    values["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["seed"] = 9


def damage_definitions(values):
    definition = values["predicate"]["buildDefinition"]
    definition["externalParameters"]["definitions"] = 1
    definition["buildType"] = "urn:reproml:recipe:definitions-1"


def damage_numerics(values):
    definition = values["predicate"]["buildDefinition"]
    definition["externalParameters"].update(numerics="native", definitions=None)
    definition["buildType"] = "urn:reproml:recipe:native"


def damage_data(values):
    values["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"] = "0" * 64


def rename_data(values):
    values["predicate"]["buildDefinition"]["resolvedDependencies"][0]["name"] = "other"


def forget_data(values):
    del values["predicate"]["buildDefinition"]["resolvedDependencies"][0]


def forget_all_data(values):
    del values["predicate"]["buildDefinition"]["resolvedDependencies"][:2]


def add_subject(values):
    values["subject"].append({"name": "evil", "digest": {"sha256": "0" * 64}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_weights, f"states other weights: {'0' * 64}"),
        (damage_recipe, "is of another recipe"),
        (damage_definitions, "was made with version 1 of the definitions"),
        (damage_numerics, "is of native numerics"),
        (damage_data, "is of other data"),
        (rename_data, "is of other data"),
        (forget_data, "is of other data"),
        (forget_all_data, "is not a provenance that reproml wrote: a recipe depends on data"),
        (add_subject, "is not a provenance that reproml wrote: the only subject of a recipe"),
    ],
)
def test_contradicting_confirmation_fails(at_work, change, message, capsys):
    rewrite(at_work, change)
    assert main(["golden", "--list"]) == 1
    out = capsys.readouterr().out
    assert f"    WRONG: {at_work} {message}" in out and "confirmed:" not in out


def test_one_statement_under_two_names_fails(at_work):
    copy = at_work.with_name("other.json")
    shutil.copy(at_work, copy)
    (entry,) = registry.entries()
    assert entry.defects == [f"{at_work} and {copy} are the same provenance"]
    assert len(entry.confirmed) == 1


@pytest.mark.parametrize("builder", ["urn:reproml:builder:lab", "URN:reproml:builder:l%61b"])
def test_two_statements_of_one_builder_fail(at_work, builder):
    copy = at_work.with_name("other.json")
    shutil.copy(at_work, copy)

    def change(values):
        details = values["predicate"]["runDetails"]
        details["builder"]["id"] = builder
        details["metadata"]["finishedOn"] = "2026-01-01T00:00:00Z"

    rewrite(copy, change)
    (entry,) = registry.entries()
    assert len(entry.confirmed) == len(entry.defects) == 1
    assert f"{at_work} and {copy} are of the same builder" in entry.defects[0]


def test_two_builders_confirm(at_work, tmp_path):
    run = save_run(tmp_path / "again", builder="other")
    shutil.copy(run / "provenance.json", at_work.with_name("other.json"))
    (entry,) = registry.entries()
    assert len(entry.confirmed) == 2 and entry.defects == []


def test_other_recipe_of_the_same_name_fails(at_work, tmp_path):
    tiny.toml(tmp_path, seed=2)
    (entry,) = registry.entries()
    assert entry.defects == ["golden/tiny.json is of another recipe than the one named tiny"]


def test_golden_file_of_another_name_fails(at_work):
    Path("golden/tiny.json").rename("golden/small.json")
    (entry,) = registry.entries()
    assert entry.defects == ["golden/small.json is of the recipe tiny"]


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_shapes_are_those_of_the_data(name, request):
    if name == "mnist":
        request.getfixturevalue("mnist_mirror")
    dataset = load_dataset(name)
    assert SHAPES[name] == (dataset.train.images.shape[1:], dataset.classes)


# A reproml that lists nothing, trains `slow` for a minute and finds that `bad` differs.
FAKE = """#!/bin/sh
echo "$@" >> calls
case "$*" in *slow) sleep 60 ;; *bad) exit 1 ;; esac
"""


@pytest.mark.parametrize(
    ("names", "arguments", "status"),
    [
        ("good", ["9s"], 0),
        ("good gallery", ["9s"], 0),  # the digests of gallery/ are of no recipe
        ("bad good", ["9s"], 1),
        ("good slow", ["1s"], 0),
        ("good slow", ["1s", "--all"], 1),
        ("bad slow", ["1s"], 1),
    ],
)
def test_ci_trains_every_golden_file_within_a_limit(tmp_path, names, arguments, status):
    for path, content in {
        ".ci/golden": (ROOT / ".ci/golden").read_text(),
        "bin/reproml": FAKE,
    }.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(content)
        (tmp_path / path).chmod(0o755)
    (tmp_path / "golden").mkdir()
    for name in names.split():
        (tmp_path / f"golden/{name}.json").write_text("{}")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [tmp_path / ".ci/golden", *arguments]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == status, shown.stderr
    trained = [f"verify --recipe {name}" for name in sorted(names.split()) if name != "gallery"]
    assert (tmp_path / "calls").read_text().splitlines() == ["golden --list", *trained]
    assert ("slow takes longer than 1s" in shown.stdout) == ("slow" in names)
