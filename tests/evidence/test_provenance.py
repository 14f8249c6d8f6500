"""provenance.json: its fields, its determinism, and that any changed byte is noticed."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from reproml.cli import main
from reproml.errors import ReproError
from reproml.evidence import provenance
from reproml.evidence.provenance import (
    builder_id,
    read_provenance,
    revision,
    same_builder_key,
)
from reproml.pipeline import run as runs
from reproml.pipeline.recipe import load_recipe
from reproml.versions import DEFINITIONS
from tests import tiny
from tests.evidence.statements import check_statement, parse, rewrite, save_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder, which tests do not change."""
    return save_run(tmp_path_factory.mktemp("run") / "a")


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "a"))


def test_statement_has_the_specified_fields(folder):
    values = check_statement((folder / "provenance.json").read_bytes())
    definition = values["predicate"]["buildDefinition"]
    weights = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert values["subject"] == [{"name": "weights.safetensors", "digest": {"sha256": weights}}]
    assert definition["externalParameters"]["definitions"] == DEFINITIONS
    assert definition["externalParameters"]["numerics"] == "exact"
    recipe = json.loads(json.dumps(definition["externalParameters"]["recipe"]))
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == tiny.recipe().sha256
    kinds = [d["annotations"]["kind"] for d in definition["resolvedDependencies"]]
    assert kinds[:3] == ["data", "data", "source"]
    details = values["predicate"]["runDetails"]
    assert details["builder"]["id"] == "urn:reproml:builder:a"
    for file in details["byproducts"]:
        content = (folder / file["name"]).read_bytes()
        assert file["digest"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert [f["name"] for f in details["byproducts"]] == ["log.txt", "metrics.json", "run.json"]


def test_library_of_in_toto_accepts_the_statement(folder):
    predicate = parse((folder / "provenance.json").read_bytes())
    assert predicate.build_definition.build_type == f"urn:reproml:recipe:definitions-{DEFINITIONS}"
    assert predicate.run_details.metadata.started_on.seconds > 0


def test_native_run_has_no_definitions(tmp_path):
    run = runs.perform(tiny.recipe(), numerics="native")
    with runs.reserve_run_folder(tmp_path / "run") as save:
        save(run)
    definition = check_statement((tmp_path / "run/provenance.json").read_bytes())["predicate"]
    assert definition["buildDefinition"]["buildType"] == "urn:reproml:recipe:native"
    assert read_provenance(tmp_path / "run").definitions is None


def test_two_runs_differ_in_times_and_builder_only(folder, tmp_path):
    again = runs.perform(tiny.recipe())
    with runs.reserve_run_folder(tmp_path / "b") as save:
        save(again)
    both = []
    for path in folder, tmp_path / "b":
        values = json.loads((path / "provenance.json").read_bytes())
        details = values["predicate"]["runDetails"]
        details["metadata"] = details["builder"]["id"] = None
        for file in details["byproducts"]:
            if file["name"] in ("run.json", "log.txt"):  # which contain times
                file["digest"] = None
        both.append(values)
    assert both[0] == both[1]


def test_same_times_give_the_same_bytes(folder, tmp_path):
    save_run(tmp_path / "b")
    assert read_provenance(tmp_path / "b").sha256 == read_provenance(folder).sha256


def test_trace_is_a_byproduct_with_its_head(tmp_path):
    trace = tmp_path / "trace.jsonl"
    recording = runs.Recording(trace=trace)
    traced = runs.perform(tiny.recipe(), recording=recording)
    with runs.reserve_run_folder(tmp_path / "run") as save:
        save(runs.Run(**{**vars(traced), "trace": trace}))
    byproducts = {b.name: b.digest for b in read_provenance(tmp_path / "run").details.byproducts}
    last = json.loads(trace.read_text().splitlines()[-1])
    assert byproducts["head of the trace"] == {"sha256": last["head"]}
    assert byproducts["trace.jsonl"] == {"sha256": hashlib.sha256(trace.read_bytes()).hexdigest()}


def test_any_changed_byte_is_refused_and_named(copied):
    path = copied / "provenance.json"
    raw = path.read_bytes()
    for position in range(len(raw)):
        changed = bytearray(raw)
        changed[position] ^= 1 + position % 2
        path.write_bytes(changed)
        with pytest.raises(ReproError, match=r"a/provenance\.json"):
            read_provenance(copied)
    for content in raw[:-1], raw + b"\n", raw.replace(b"\n", b"\r\n"), b"":
        path.write_bytes(content)
        with pytest.raises(ReproError, match=r"a/provenance\.json"):
            read_provenance(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(_type="https://in-toto.io/Statement/v0.1"), "its _type is"),
        (lambda v: v.update(predicateType="https://slsa.dev/provenance/v0.2"), "its predicateType"),
        (
            lambda v: v["predicate"]["buildDefinition"].update(
                buildType="https://example.org/make"
            ),
            "not a provenance of reproml: its buildType is 'https://example.org/make'",
        ),
        (lambda v: v.update(subject=[]), "the only subject of a recipe is weights"),
        (lambda v: v["predicate"]["runDetails"].update(builder=7), "is damaged: .*builder"),
        (lambda v: v["predicate"]["buildDefinition"].pop("externalParameters"), "is damaged"),
    ],
)
def test_foreign_statement_is_refused(copied, change, message):
    rewrite(copied / "provenance.json", change)
    with pytest.raises(ReproError, match=message):
        read_provenance(copied)


def definition(values: dict[str, Any]) -> Any:
    return values["predicate"]["buildDefinition"]


def external(values: dict[str, Any]) -> Any:
    return definition(values)["externalParameters"]


def first_data(values: dict[str, Any]) -> Any:
    return definition(values)["resolvedDependencies"][0]


def set_time(values: dict[str, Any], time: str) -> None:
    values["predicate"]["runDetails"]["metadata"]["finishedOn"] = time


def set_builder(values: dict[str, Any], name: str) -> None:
    values["predicate"]["runDetails"]["builder"]["id"] = name


def set_digest(values: dict[str, Any], **digest: str) -> None:
    values["subject"][0]["digest"] = digest


def forget_data(values: dict[str, Any]) -> None:
    dependencies = definition(values)["resolvedDependencies"]
    dependencies[:] = [d for d in dependencies if d["annotations"]["kind"] != "data"]


RECIPE = "urn:reproml:recipe"
FORGED = {
    "type of a script": (
        lambda v: definition(v).update(buildType=f"urn:reproml:script:definitions-{DEFINITIONS}"),
        "its buildType is",
    ),
    "type without definitions": (
        lambda v: definition(v).update(buildType=f"{RECIPE}:native"),
        "its buildType is",
    ),
    "other definitions": (lambda v: external(v).update(definitions=99), "its buildType is"),
    "list of definitions": (lambda v: external(v).update(definitions=[2]), "definitions"),
    "true definitions": (lambda v: external(v).update(definitions=True), "definitions"),
    "native definitions": (lambda v: external(v).update(numerics="native"), "are native, but"),
    "exact without definitions": (lambda v: external(v).update(definitions=None), "are exact, but"),
    "other numerics": (lambda v: external(v).update(numerics="fast"), "numerics"),
    "no numerics": (lambda v: external(v).pop("numerics"), "numerics"),
    "key of the recipe": (lambda v: external(v).update({"recipe.seed": 1}), "recipe.seed"),
    "no parameters": (lambda v: external(v).clear(), "not those of a script"),
    "no builder": (lambda v: set_builder(v, ""), "is not a URI"),
    "builder of two lines": (lambda v: set_builder(v, "urn:x\nconfirmed"), "is not a URI"),
    "builder and end of line": (lambda v: set_builder(v, "urn:x:a\n"), "is not a URI"),
    "builder without scheme": (lambda v: set_builder(v, "lab"), "is not a URI"),
    "time in words": (lambda v: set_time(v, "yesterday"), "is not a time"),
    "time without zone": (lambda v: set_time(v, "2026-01-01T00:00:00"), "is not a time"),
    "one digit": (lambda v: set_time(v, "2026-1-01T00:00:00.0Z"), "is not a time"),
    "end of line": (lambda v: set_time(v, "2026-01-01T00:00:00Z\n"), "is not a time"),
    "month 13": (lambda v: set_time(v, "2026-13-01T00:00:00Z"), "is not a time"),
    "two subjects": (
        lambda v: v["subject"].append({"name": "evil", "digest": {"sha256": "0" * 64}}),
        "the only subject",
    ),
    "same subject twice": (lambda v: v["subject"].append(v["subject"][0]), "the only subject"),
    "subject elsewhere": (lambda v: v["subject"][0].update(name="../secret"), "the only subject"),
    "other subject": (lambda v: v["subject"][0].update(name="x"), "the only subject"),
    "unknown algorithm": (lambda v: set_digest(v, md5="0" * 32), "the md5 .* is no digest"),
    "one more algorithm": (
        lambda v: v["subject"][0]["digest"].update(sha512="f" * 128),
        "the sha512 .* is no digest",
    ),
    "digest of a state dict": (lambda v: set_digest(v, reproml_digest_1="0" * 64), "only subject"),
    "upper case": (lambda v: set_digest(v, sha256="A" * 64), "is no digest"),
    "short digest": (lambda v: set_digest(v, sha256="a" * 63), "is no digest"),
    "no digest": (lambda v: set_digest(v), "the only subject"),
    "no data": (forget_data, "a recipe depends on data"),
    "no dependencies": (lambda v: definition(v).update(resolvedDependencies=[]), "depends on data"),
    "unknown kind": (
        lambda v: first_data(v).update(annotations={"kind": "Data"}),
        "of the unknown kind 'Data'",
    ),
    "no kind": (lambda v: first_data(v).pop("annotations"), "of the unknown kind None"),
    "kind that is a list": (lambda v: first_data(v).update(annotations={"kind": []}), "kind \\[]"),
    "data by commit": (
        lambda v: first_data(v).update(digest={"gitCommit": "0" * 40}),
        "has no digest of the kind data",
    ),
    "script of a recipe": (
        lambda v: first_data(v).update(annotations={"kind": "script"}),
        "and on nothing else",
    ),
    "same data twice": (
        lambda v: definition(v)["resolvedDependencies"].append(first_data(v)),
        "two of its dependencies have the same name",
    ),
    "same file twice": (
        lambda v: v["predicate"]["runDetails"]["byproducts"].append(
            v["predicate"]["runDetails"]["byproducts"][0]
        ),
        "two of its byproducts have the same name",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_statement_that_reproml_does_not_write_is_refused(copied, name, capsys):
    """Even with a corrected digest of the content."""
    change, message = FORGED[name]
    rewrite(copied / "provenance.json", change)
    with pytest.raises(ReproError, match=message):
        read_provenance(copied)
    assert main(["reproduced", str(copied), str(copied)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "provenance.json").write_bytes(content)
    with pytest.raises(ReproError, match=r"provenance\.json"):
        read_provenance(tmp_path)


def test_missing_provenance_is_named(tmp_path):
    with pytest.raises(ReproError, match=r"cannot read the provenance .*provenance\.json"):
        read_provenance(tmp_path)


# --- the builder -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("lab-a", "urn:reproml:builder:lab-a"),
        ("https://example.org/lab", "https://example.org/lab"),
        ("our lab/7", "urn:reproml:builder:our%20lab%2F7"),
        ("Zürich", "urn:reproml:builder:Z%C3%BCrich"),
    ],
)
def test_builder_is_named_by_option(monkeypatch, name, uri):
    monkeypatch.setenv("REPROML_BUILDER", "another")
    assert builder_id(name) == uri


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("urn:reproml:builder:bob", "URN:REPROML:builder:bob", True),
        ("urn:reproml:builder:bob", "urn:reproml:builder:%62ob", True),
        ("urn:reproml:builder:Z%C3%BCrich", "urn:reproml:builder:Zu%CC%88rich", True),
        ("https://example.org/lab", "HTTPS://Example.ORG/lab", True),
        ("https://example.org/lab", "https://example.org/Lab", False),
        ("urn:reproml:builder:bob", "urn:reproml:builder:Bob", False),
        ("urn:reproml:builder:%FF", "urn:reproml:builder:%FE", False),
    ],
)
def test_builders_are_compared_as_uris(one, other, same):
    assert (same_builder_key(one) == same_builder_key(other)) == same


def test_builder_defaults_to_variable_then_host(monkeypatch):
    monkeypatch.setenv("REPROML_BUILDER", "lab-b")
    assert builder_id() == "urn:reproml:builder:lab-b"
    monkeypatch.delenv("REPROML_BUILDER")
    monkeypatch.setattr(platform, "node", lambda: "host.example.org")
    assert builder_id() == "urn:reproml:builder:host.example.org"


@pytest.mark.parametrize("name", ["  ", "a\nb", "\x1b[2J"])
def test_unusable_builder_fails_before_training(tmp_path, name, capsys):
    tiny.toml(tmp_path)
    arguments = ["--recipe", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")]
    assert main(["train", *arguments, "--builder", name]) == 2
    assert "is not a name of a machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_command_line_writes_builder(tmp_path):
    tiny.toml(tmp_path)
    arguments = ["--recipe", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run")]
    assert main(["train", *arguments, "--builder", "lab"]) == 0
    assert read_provenance(tmp_path / "run").builder == "urn:reproml:builder:lab"


# --- dependencies ------------------------------------------------------------------------------------


def test_source_digest_is_that_of_sha256sum():
    command = "find . -type f -name '*.py' | cut -c3- | LC_ALL=C sort | xargs sha256sum | sha256sum"
    shown = subprocess.run(
        command, shell=True, cwd=ROOT / "reproml", check=True, capture_output=True, text=True
    ).stdout
    source = provenance.source_dependencies()[0]
    assert source["digest"] == {"dirHash": shown.split()[0]}


def test_lock_is_a_dependency_only_if_installed(monkeypatch):
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    monkeypatch.setattr(provenance, "_is_installed", lambda text: True)
    assert provenance.source_dependencies()[-1]["digest"] == {"sha256": lock}
    monkeypatch.undo()
    monkeypatch.setattr(provenance, "version", lambda name: "0.0")
    names = [d["name"] for d in provenance.source_dependencies()]
    assert "reproml" in names and "requirements.lock" not in names


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=m"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_revision_of_a_file_and_whether_it_is_clean(tmp_path, monkeypatch):
    file = tmp_path / "train.py"
    file.write_text("1\n")
    assert revision(file, "r") == []
    git(tmp_path, "init")
    assert revision(file, "r") == []  # not tracked
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-m", "a")
    (tmp_path / "runs").mkdir()
    commit = {"gitCommit": git(tmp_path, "rev-parse", "HEAD").strip()}
    expected = {"name": "r", "digest": commit, "annotations": {"kind": "source", "clean": True}}
    assert revision(file, "r") == [expected]
    file.write_text("2\n")
    assert revision(file, "r")[0]["annotations"]["clean"] is False
    monkeypatch.setenv("PATH", "")
    assert revision(file, "r") == []


def test_recipe_is_read_from_a_provenance(folder, copied):
    assert load_recipe(str(folder / "provenance.json")).sha256 == tiny.recipe().sha256

    def forget(values):
        del values["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["seed"]

    rewrite(copied / "provenance.json", forget)
    with pytest.raises(ReproError, match=r"states no valid recipe: .*seed"):
        load_recipe(str(copied / "provenance.json"))
