"""`reproduced`: what it accepts, what it refuses, and what it states."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reproml.cli import main
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.evidence import provenance, reproduced
from reproml.evidence.provenance import describe, make_provenance
from tests.evidence.statements import check_statement, parse, rewrite, save_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in "abc":
        save_run(folder / name, builder=f"lab-{name}")
    return folder


@pytest.fixture(autouse=True)
def at_work(saved, tmp_path, monkeypatch) -> None:
    """Work in a folder with runs of three builders: a, b and c."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def external(values: dict[str, Any]) -> Any:
    return values["predicate"]["buildDefinition"]["externalParameters"]


def test_two_builders_give_a_summary(capsys):
    assert main(["reproduced", "a", "b", "--builder", "https://example.org/me"]) == 0
    out = capsys.readouterr().out
    assert "a/provenance.json: by urn:reproml:builder:lab-a, weights checked" in out
    assert out.splitlines()[-1] == (
        "reproduced by 2 builders: parameters, data and weights agree; 2 of 2 stated weights were "
        "checked in their files; wrote a.reproduced.json"
    )
    raw = Path("a.reproduced.json").read_bytes()
    values = check_statement(raw)
    predicate = values["predicate"]
    assert predicate["verifiedLevels"] == ["REPROML_REPRODUCED"]
    assert predicate["verificationResult"] == "PASSED"
    assert predicate["verifier"]["id"] == "https://example.org/me"
    sha256 = hashlib.sha256(Path("a/weights.safetensors").read_bytes()).hexdigest()
    assert values["subject"] == [{"name": "weights.safetensors", "digest": {"sha256": sha256}}]
    assert predicate["resourceUri"].endswith(f"checksum=sha256:{sha256}")
    assert [a["digest"]["sha256"] for a in predicate["inputAttestations"]] == [
        hashlib.sha256(Path(name, "provenance.json").read_bytes()).hexdigest() for name in "ab"
    ]
    summary = parse(raw)
    assert summary.verified_levels == "REPROML_REPRODUCED"
    assert len(summary.input_attestations) == 2


def test_json_and_output_file(capsys):
    assert main(["reproduced", "a", "b/provenance.json", "c", "--json", "--out", "x.json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reproduced"] and result["summary"] == "x.json"
    assert result["builders"] == [f"urn:reproml:builder:lab-{name}" for name in "abc"]
    assert Path("x.json").is_file() and not Path("a.reproduced.json").exists()


def test_unwritable_summary_is_named(capsys):
    assert main(["reproduced", "a", "b", "--out", "none/x.json"]) == 2
    assert "cannot write the summary none/x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "out", ["a/provenance.json", "c/../b/provenance.json", "link/provenance.json"]
)
def test_summary_does_not_replace_a_statement(out, capsys):
    Path("link").symlink_to("b")
    before = Path("a/provenance.json").read_bytes(), Path("b/provenance.json").read_bytes()
    assert main(["reproduced", "a", "b", "--out", out]) == 2
    assert f"{out} is a provenance to compare" in capsys.readouterr().err
    assert before == (
        Path("a/provenance.json").read_bytes(),
        Path("b/provenance.json").read_bytes(),
    )


def test_long_names_are_reported_in_a_sentence(tmp_path, capsys):
    assert main(["reproduced", "a" * 300, "b"]) == 2
    assert f"cannot read the provenance {'a' * 300}: File name too long" in capsys.readouterr().err
    assert main(["reproduced", "a", "b", "--out", "a" * 300]) == 2
    assert "cannot write the summary" in capsys.readouterr().err
    paths = [script_provenance(tmp_path / name, name) for name in ("one", "two")]
    for path in paths:
        rewrite(path, lambda v: v["subject"][0].update(name="a" * 300))
    assert main(["reproduced", *map(str, paths)]) == 2
    assert f"cannot read {tmp_path / 'one'}/aaa" in capsys.readouterr().err
    folder = Path("c" * 250)
    shutil.copytree("a", folder)
    with pytest.raises(ReproError, match="cannot read c+.reproduced.json: File name too long"):
        reproduced.reproduced_by(folder)


def test_statement_alone_is_compared(capsys):
    """As somebody sends it: provenance.json without any other file."""
    for path in Path("b").iterdir():
        if path.name != "provenance.json":
            path.unlink()
    assert main(["reproduced", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "b/provenance.json: by urn:reproml:builder:lab-b, weights not beside it" in out
    assert "; 1 of 2 stated weights were checked in their files; " in out


@pytest.mark.parametrize("name", ["weights.safetensors", "metrics.json", "run.json", "log.txt"])
@pytest.mark.parametrize("folder", ["a", "b"])
def test_changed_byte_of_a_file_is_named(folder, name, capsys):
    path = Path(folder, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["reproduced", "a", "b"]) == 1
    found = hashlib.sha256(content).hexdigest()
    out = capsys.readouterr().out
    assert f"not reproduced: {path} is not the file that {folder}/provenance.json states" in out
    assert f"its sha256 is {found}, not " in out and not Path("a.reproduced.json").exists()


def test_summary_of_an_earlier_comparison_is_named(capsys):
    assert main(["reproduced", "a", "b"]) == 0
    Path("b/weights.safetensors").write_bytes(b"")
    assert main(["reproduced", "a", "b"]) == 1
    assert (
        "a.reproduced.json is of an earlier comparison, not of this one" in capsys.readouterr().out
    )


@pytest.mark.parametrize("folder", ["a", "b"])
def test_changed_byte_of_a_statement_is_named(folder, capsys):
    path = Path(folder, "provenance.json")
    raw = path.read_bytes()
    for position in range(0, len(raw), 101):
        changed = bytearray(raw)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert main(["reproduced", "a", "b"]) == 2
        assert f"reproml: {path} is " in capsys.readouterr().err
    assert not Path("a.reproduced.json").exists()


def make_native(values: dict[str, Any]) -> None:
    external(values).update(numerics="native", definitions=None)
    values["predicate"]["buildDefinition"]["buildType"] = "urn:reproml:recipe:native"


def change_weights(values: dict[str, Any]) -> None:
    values["subject"][0]["digest"]["sha256"] = "0" * 64


def change_data(values: dict[str, Any]) -> None:
    dependencies = values["predicate"]["buildDefinition"]["resolvedDependencies"]
    dependencies[0]["digest"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda v: external(v)["recipe"].update(seed=2), "differ in recipe.seed: 1 and 2"),
        (
            lambda v: external(v)["recipe"]["optimizer"].update(eps=1e-7),
            "differ in recipe.optimizer.eps: 1e-08 and 1e-07",
        ),
        (make_native, 'differ in numerics: "exact" and "native"'),
        (lambda v: external(v)["recipe"].update(more=1), "differ in recipe.more: not stated and 1"),
        (
            lambda v: external(v)["recipe"].update({"optimizer.eps": 1e-8}),
            "differ in recipe.optimizer.eps: not stated and 1e-08",
        ),
        (change_data, "depends on the data images.uint8 (sha256 "),
        (change_weights, "differ in the sha256 of weights.safetensors: "),
    ],
)
def test_difference_of_forged_statements_is_named(change, difference, capsys):
    """Even with a corrected digest of the content, as nothing is compared with itself only."""
    rewrite(Path("b/provenance.json"), change)
    assert main(["reproduced", "a", "b"]) == 1
    assert difference in capsys.readouterr().out
    assert not Path("a.reproduced.json").exists()


def test_key_with_a_dot_does_not_hide_another(capsys):
    def change(values: dict[str, Any]) -> None:
        recipe = external(values)["recipe"]
        recipe["optimizer"]["eps"], recipe["optimizer.eps"] = 1e-7, 1e-8

    rewrite(Path("b/provenance.json"), change)
    assert main(["reproduced", "a", "b"]) == 1
    assert "recipe.optimizer.eps: 1e-08 and 1e-07" in capsys.readouterr().out


def test_weights_are_not_called_checked_if_they_were_not(capsys):
    rewrite(Path("b/provenance.json"), lambda v: external(v)["recipe"].update(seed=2))
    with Path("b/weights.safetensors").open("ab") as file:
        file.write(b"x")
    assert main(["reproduced", "a", "b"]) == 1
    assert "checked" not in capsys.readouterr().out


def test_environments_may_differ():
    def change(values: dict[str, Any]) -> None:
        definition = values["predicate"]["buildDefinition"]
        dependencies = definition["resolvedDependencies"]
        definition["resolvedDependencies"] = [
            d for d in dependencies if d["annotations"]["kind"] != "lock"
        ]
        values["predicate"]["runDetails"]["builder"]["version"]["torch"] = "9.9"

    rewrite(Path("b/provenance.json"), change)
    assert main(["reproduced", "a", "b"]) == 0


def test_same_builder_is_refused_unless_allowed(tmp_path, capsys):
    run = save_run(tmp_path / "again", builder="lab-a", log=["another"])
    assert main(["reproduced", "a", "b", str(run)]) == 2
    assert "are of the same builder urn:reproml:builder:lab-a" in capsys.readouterr().err
    assert main(["reproduced", "a", str(run), "--same-builder"]) == 0
    levels = json.loads(Path("a.reproduced.json").read_bytes())["predicate"]["verifiedLevels"]
    assert levels == ["REPROML_REPEATED_BY_ONE_BUILDER"]  # not a property of SLSA
    assert main(["reproduced", "a", "b", str(run), "--same-builder"]) == 0
    levels = json.loads(Path("a.reproduced.json").read_bytes())["predicate"]["verifiedLevels"]
    assert levels == ["REPROML_REPRODUCED"]


def test_other_spelling_of_the_same_builder_is_refused(tmp_path, capsys):
    run = save_run(tmp_path / "again", builder="URN:reproml:builder:l%61b-a")
    change = {"id": "URN:REPROML:builder:l%61b-a"}
    rewrite(
        run / "provenance.json", lambda v: v["predicate"]["runDetails"]["builder"].update(change)
    )
    assert main(["reproduced", "a", str(run)]) == 2
    assert "are of the same builder" in capsys.readouterr().err
    assert main(["reproduced", "a", str(run), "--same-builder"]) == 0
    assert "reproduced by 1 builder: " in capsys.readouterr().out


def test_copy_of_a_statement_is_refused(capsys):
    shutil.copytree("a", "copy")
    assert main(["reproduced", "a", "copy", "--same-builder"]) == 2
    assert "a/provenance.json and copy/provenance.json are the same" in capsys.readouterr().err


def test_mixed_definitions_are_refused(capsys):
    def change(values: dict[str, Any]) -> None:
        external(values).update(definitions=1)
        definition = values["predicate"]["buildDefinition"]
        definition["buildType"] = "urn:reproml:recipe:definitions-1"

    rewrite(Path("b/provenance.json"), change)
    assert main(["reproduced", "a", "b"]) == 2
    assert "b/provenance.json with version 1" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"{}", b"not JSON"])
def test_foreign_statement_is_refused(content, capsys):
    Path("other.json").write_bytes(content)
    assert main(["reproduced", "a", "other.json"]) == 2
    assert "other.json is " in capsys.readouterr().err


def test_golden_file_is_no_provenance(capsys):
    assert main(["reproduced", "a", "a/metrics.json"]) == 2
    assert "a/metrics.json is not a provenance" in capsys.readouterr().err


# --- provenances of scripts --------------------------------------------------------------------------

STATE = {"w": torch.arange(4.0)}


def script_provenance(folder: Path, builder: str, data: str = "data/x", name: str = "m.pt") -> Path:
    """Write the provenance of a script with one data file and one checkpoint."""
    folder.mkdir()
    torch.save({"model": STATE}, folder / name)
    raw = make_provenance(
        [describe(f"{name}['model']", {provenance.STATE_DICT: digest(STATE)})],
        "script",
        {"script": f"{folder.name}/t.py", "arguments": ["1"], "seed": None, "numerics": "exact"},
        [
            describe(f"{folder.name}/t.py", {"sha256": "1" * 64}, kind=provenance.SCRIPT),
            describe(data, {"sha256": "2" * 64}, kind=provenance.DATA),
        ],
        internal={},
        builder=builder,
        versions={},
        times=("2020-01-01T00:00:00+00:00", "2020-01-01T00:00:00+00:00"),
        byproducts=[],
    )
    check_statement(raw)
    (folder / "p.json").write_bytes(raw)
    return folder / "p.json"


def test_scripts_in_other_folders_agree(tmp_path, capsys):
    one = script_provenance(tmp_path / "one", "a")
    two = script_provenance(tmp_path / "two", "b", data="/elsewhere/x")
    assert main(["reproduced", str(one), str(two)]) == 0
    assert "weights checked" in capsys.readouterr().out
    values = check_statement((tmp_path / "one.reproduced.json").read_bytes())
    assert values["subject"][0]["digest"] == {"reproml_digest_1": digest(STATE)}


def test_provenance_of_a_script_states_no_recipe(tmp_path, capsys):
    one = script_provenance(tmp_path / "one", "a")
    assert main(["train", "--recipe", str(one)]) == 2
    assert "one/t.py, not of a recipe; train it again with reproml run" in capsys.readouterr().err


def test_changed_state_dict_is_named(tmp_path, capsys):
    one = script_provenance(tmp_path / "one", "a")
    two = script_provenance(tmp_path / "two", "b")
    torch.save({"model": {"w": STATE["w"] + 1}}, tmp_path / "two/m.pt")
    assert main(["reproduced", str(one), str(two)]) == 1
    assert "two/m.pt['model'] is not the file that" in capsys.readouterr().out
    (tmp_path / "two/m.pt").write_bytes(b"not an archive")
    assert main(["reproduced", str(one), str(two)]) == 2
    assert "two/m.pt cannot be read to check its digest" in capsys.readouterr().err


def state_digests(path: Path, **digests: str) -> None:
    rewrite(path, lambda v: v["subject"][0].update(name="m.pt", digest=digests))


def test_summary_has_only_digests_that_all_state(tmp_path):
    one = script_provenance(tmp_path / "one", "a")
    two = script_provenance(tmp_path / "two", "b")
    (tmp_path / "one/m.pt").unlink()
    (tmp_path / "two/m.pt").unlink()
    state_digests(one, reproml_digest_1="a" * 64, sha256="f" * 64)
    state_digests(two, reproml_digest_1="a" * 64)
    assert main(["reproduced", str(one), str(two)]) == 0
    values = check_statement((tmp_path / "one.reproduced.json").read_bytes())
    assert values["subject"] == [{"name": "m.pt", "digest": {"reproml_digest_1": "a" * 64}}]
    assert values["predicate"]["resourceUri"].endswith("reproml_digest_1:" + "a" * 64)


def test_digests_that_the_first_does_not_state_are_compared(tmp_path, capsys):
    paths = [script_provenance(tmp_path / name, name) for name in ("one", "two", "three")]
    for path in paths:
        (path.parent / "m.pt").unlink()
    state_digests(paths[0], reproml_digest_1="a" * 64)
    state_digests(paths[1], reproml_digest_1="a" * 64, sha256="1" * 64)
    state_digests(paths[2], reproml_digest_1="a" * 64, sha256="2" * 64)
    assert main(["reproduced", *map(str, paths)]) == 1
    out = capsys.readouterr().out
    assert f"{paths[1]} and {paths[2]} differ in the sha256 of m.pt: {'1' * 64} and " in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["subject"].clear(), "has no subject"),
        (lambda v: v["subject"].append(v["subject"][0]), "two of its subjects have the same name"),
        (lambda v: v["subject"][0].update(digest={"sha256": "0" * 64}), "has no reproml_digest_1"),
        (
            lambda v: v["predicate"]["buildDefinition"]["resolvedDependencies"].pop(0),
            "one dependency of the kind script",
        ),
        (lambda v: external(v).update(seed="1"), "not those of a script"),
        (lambda v: external(v).update(more=1), "not those of a script"),
    ],
)
def test_forged_statement_of_a_script_is_refused(tmp_path, change, message):
    path = script_provenance(tmp_path / "one", "a")
    rewrite(path, change)
    with pytest.raises(ReproError, match=message):
        provenance.read_provenance(path)


def test_number_of_results_is_compared(tmp_path, capsys):
    one = script_provenance(tmp_path / "one", "a")
    two = script_provenance(tmp_path / "two", "b")
    more = {"name": "other", "digest": {"reproml_digest_1": "0" * 64}}
    rewrite(two, lambda v: v["subject"].append(more))
    assert main(["reproduced", str(one), str(two)]) == 1
    assert "differ in the number of results: 1 and 2" in capsys.readouterr().out


def test_only_files_that_exist_are_called_checked(tmp_path, capsys):
    paths = [script_provenance(tmp_path / name, name) for name in ("one", "two")]
    more = {"name": "other", "digest": {"reproml_digest_1": "0" * 64}}
    for path in paths:
        rewrite(path, lambda v: v["subject"].append(more))
    assert main(["reproduced", *map(str, paths)]) == 0
    out = capsys.readouterr().out
    assert "weights of 1 of 2 files checked" in out and "; 2 of 4 stated weights were " in out


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "x", "./weights.safetensors"])
def test_recipe_has_no_other_result_than_its_weights(name, capsys):
    """Else a statement from somebody else could lead the check past the weights beside it."""
    rewrite(Path("b/provenance.json"), lambda v: v["subject"][0].update(name=name))
    Path("b/weights.safetensors").write_bytes(b"evil")
    assert main(["reproduced", "a", "b"]) == 2
    assert "the only subject of a recipe is weights.safetensors" in capsys.readouterr().err


def test_file_outside_the_folder_is_not_read(tmp_path, capsys):
    """A statement from somebody else must not choose which files are read.

    A script may save its weights anywhere, so that such a name is allowed, but not called checked.
    """
    one = script_provenance(tmp_path / "one", "a")
    two = script_provenance(tmp_path / "two", "b")
    for path in one, two:
        for name in "../secret", str(tmp_path / "secret"):
            rewrite(path, lambda v, name=name: v["subject"][0].update(name=name))
            (tmp_path / "secret").write_text("x")
            assert main(["reproduced", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "weights not beside it" in out and "; 0 of 2 stated weights were checked" in out


# --- the status that the page of a run shows ---------------------------------------------------------


def test_status_names_the_builders():
    assert reproduced.reproduced_by(Path("a")) is None
    assert main(["reproduced", "a", "b"]) == 0
    names = ["urn:reproml:builder:lab-a", "urn:reproml:builder:lab-b"]
    assert reproduced.reproduced_by(Path("a")) == names


def test_summary_of_one_builder_is_no_status(tmp_path):
    save_run(tmp_path / "again", builder="lab-a", log=["another"])
    assert main(["reproduced", "a", "again", "--same-builder"]) == 0
    assert reproduced.reproduced_by(Path("a")) is None


def test_summary_of_another_run_is_refused():
    assert main(["reproduced", "a", "b", "--out", "c.reproduced.json"]) == 0
    with pytest.raises(ReproError, match="is about other weights than c/provenance"):
        reproduced.reproduced_by(Path("c"))
    for content in '{"subject": 1}', "[" * 100_000, "[]":
        Path("c.reproduced.json").write_text(content)
        with pytest.raises(ReproError, match="is not a summary that reproduced wrote"):
            reproduced.reproduced_by(Path("c"))


def test_command_line_and_page_count_the_same_builders(tmp_path, capsys):
    run = save_run(tmp_path / "again", builder="lab-a", log=["another"])
    assert main(["reproduced", "a", str(run), "b", "--same-builder"]) == 0
    assert "reproduced by 2 builders: " in capsys.readouterr().out
    names = ["urn:reproml:builder:lab-a", "urn:reproml:builder:lab-b"]
    assert reproduced.reproduced_by(Path("a")) == names


def repeat_the_first_input(values: dict[str, Any]) -> None:
    inputs = values["predicate"]["inputAttestations"]
    inputs[1] = {**inputs[0], "annotations": {"builder": "urn:x:mallory"}}


def unite_builders(values: dict[str, Any]) -> None:
    for one in values["predicate"]["inputAttestations"]:
        one["annotations"]["builder"] = "urn:reproml:builder:lab-a"


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["predicate"].update(verificationResult="FAILED"),
        lambda v: v.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda v: v.update(predicateType="https://slsa.dev/provenance/v1"),
        lambda v: v["predicate"]["policy"].update(uri="urn:other"),
        lambda v: v["predicate"].update(verifiedLevels=["SLSA_BUILD_REPRODUCED"]),
        lambda v: v["predicate"]["inputAttestations"].pop(),
        lambda v: v["subject"][0].update(digest={}),
        lambda v: v["subject"][0].update(digest=7),
        lambda v: v["predicate"]["inputAttestations"][0]["digest"].update(sha256=[]),
        repeat_the_first_input,
        unite_builders,
    ],
)
def test_forged_summary_is_no_status(change):
    assert main(["reproduced", "a", "b"]) == 0
    path = Path("a.reproduced.json")
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ReproError, match="is not a summary that reproduced wrote"):
        reproduced.reproduced_by(Path("a"))


def test_summary_with_another_builder_for_the_run_is_refused():
    assert main(["reproduced", "a", "b"]) == 0
    path = Path("a.reproduced.json")
    path.write_bytes(path.read_bytes().replace(b"builder:lab-a", b"builder:lab-z"))
    with pytest.raises(ReproError, match="run reproduced again"):
        reproduced.reproduced_by(Path("a"))
