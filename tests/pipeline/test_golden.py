from __future__ import annotations

import json
import os
import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reproml.cli import main
from reproml.errors import ReproError
from reproml.pipeline import golden
from reproml.pipeline.run import Items, Number, items_json, reserve_run_folder
from reproml.versions import DEFINITIONS
from tests import tiny

ITEMS = {
    "definitions.version": DEFINITIONS,
    "epoch.1.loss": 0.1158857,
    "epoch.2.loss": None,
    "test.correct": 971,
    "weights.sha256": "ab" * 32,
}


def altered(value: object) -> object:
    """Return the value with one bit, or the last digit, changed."""
    if value is None:
        return 1.0
    if isinstance(value, str):
        return value[:-1] + chr(ord(value[-1]) ^ 1)
    assert isinstance(value, (int, float))
    return value + 1 if isinstance(value, int) else value * (1 + 2**-52)


@pytest.fixture
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory with the tiny recipe, its golden file and its run."""
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    with reserve_run_folder(tmp_path / "run") as save:
        save(tiny.run())
    return tmp_path


VERIFY = ["verify", "--recipe", "./tiny.toml", "--json", "--run", "run"]


def test_verify_compares_every_item(at_work, capsys):
    assert main(VERIFY) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verified"] is True
    assert [row["item"] for row in result["items"]] == list(tiny.run().items)
    assert all(row["match"] for row in result["items"])


def test_verify_by_retraining_succeeds(at_work, capsys):
    assert main(VERIFY[:-2]) == 0
    assert main(["golden", "--recipe", "./tiny.toml", "--force"]) == 0
    assert (at_work / "golden/tiny.json").read_text() == items_json(tiny.run().items)


@pytest.mark.parametrize("item", sorted(tiny.run().items))
def test_altered_golden_value_differs(at_work, capsys, item):
    path = at_work / "golden/tiny.json"
    values = json.loads(path.read_text())
    values[item] = altered(values[item])
    path.write_text(json.dumps(values))
    before = {p: p.read_bytes() for p in at_work.rglob("*") if p.is_file()}
    status = main(VERIFY)
    captured = capsys.readouterr()
    if item == "definitions.version":
        assert status == 2 and item in captured.err
    else:
        assert status == 1
        first, *rest = json.loads(captured.out)["items"]
        assert (first["item"], first["match"]) == (item, False)
        assert first["expected"] == str(values[item])
        assert first["found"] == str(tiny.run().items[item])
        assert all(row["match"] for row in rest)
    assert {p: p.read_bytes() for p in at_work.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("item", sorted(tiny.run().items))
def test_altered_recorded_value_differs(at_work, capsys, item):
    path = at_work / "run/metrics.json"
    values = json.loads(path.read_text())
    values[item] = altered(values[item])
    path.write_text(json.dumps(values))
    assert main(VERIFY) == 1
    first, *_ = json.loads(capsys.readouterr().out)["items"]
    assert item in first["item"] and not first["match"]


def test_altered_weights_differ(at_work, capsys):
    path = at_work / "run/weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert main(VERIFY) == 1
    differing = [r["item"] for r in json.loads(capsys.readouterr().out)["items"] if not r["match"]]
    assert differing[:2] == ["epoch.2.state_dict.sha256", "weights.safetensors.sha256"]


# --- compare --------------------------------------------------------------------------------------


@given(st.data())
def test_any_altered_character_is_a_difference(data):
    """The text itself is altered, to include digits beyond the precision of binary64."""
    text = items_json(ITEMS)
    item = data.draw(st.sampled_from([k for k in sorted(ITEMS) if k != "definitions.version"]))
    start = text.index(f'"{item}": ') + len(item) + 4
    end = min(i for i in (text.find(",\n", start), text.find("\n}", start)) if i > 0)
    position = data.draw(st.integers(start, end - 1))
    character = data.draw(st.characters(min_codepoint=32, max_codepoint=126))
    changed = text[:position] + character + text[position + 1 :]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(changed)
        file.flush()
        try:
            expected = golden.read_golden(Path(file.name))
        except ReproError:
            return
    found = [c.item for c in golden.compare_items(expected, ITEMS) if not c.match]
    assert changed == text or character == " " or found[0] == item


@pytest.mark.parametrize("version", ["9" * 20_000, "10000000000", str(DEFINITIONS + 1)])
def test_golden_file_of_newer_version_is_refused(at_work, capsys, version):
    path = at_work / "golden/tiny.json"
    values = json.loads(path.read_text())
    text = json.dumps({**values, "definitions.version": "V"}).replace('"V"', version)
    path.write_text(text)
    assert main(VERIFY) == 2
    error = capsys.readouterr().err
    assert "update reproml" in error and error.count("\n") == 1 and len(error) < 300


def test_missing_and_unknown_items_are_differences():
    found: Items = {"b": 1, "a": 2}
    rows = golden.compare_items({"c": Number("3"), "a": Number("2")}, found)
    assert [(c.item, c.expected, c.found, c.match) for c in rows] == [
        ("b", "missing", "1", False),
        ("a", "2", "2", True),
        ("c", "3", "missing", False),
    ]


@pytest.mark.parametrize(
    ("expected", "found", "shown"),
    [("297", 297, '"297"'), ("null", None, '"null"'), ("missing", ..., '"missing"')],
)
def test_string_differs_from_number(expected, found, shown):
    [row] = golden.compare_items({"a": expected}, {} if found is ... else {"a": found})
    assert (row.expected, row.match) == (shown, False)


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (DEFINITIONS + 1, "update reproml"),
        (10**30, "update reproml"),
        (DEFINITIONS - 1, "check it with a reproml that has that version"),
        ("none: native numerics", "must be an integer"),
        (1.5, "must be an integer"),
        (str(DEFINITIONS), f'must be an integer, not "{DEFINITIONS}"'),
        (None, "must be an integer"),
    ],
)
def test_other_definitions_version_raises(tmp_path, version, message):
    path = tmp_path / "golden.json"
    path.write_text(json.dumps({**ITEMS, "definitions.version": version}))
    with pytest.raises(ReproError, match=f"definitions.version.*{message}"):
        golden.read_golden(path)


def test_missing_definitions_version_raises(tmp_path):
    (tmp_path / "golden.json").write_text("{}")
    with pytest.raises(ReproError, match="is not a golden file: it has no definitions.version"):
        golden.read_golden(tmp_path / "golden.json")


def test_golden_file_is_sorted_json(tmp_path):
    golden.write_golden(ITEMS, tmp_path / "new" / "golden.json", force=False)
    text = (tmp_path / "new/golden.json").read_text()
    lines = text.splitlines()
    assert lines[0] == "{" and lines[-1] == "}" and lines[1:-1] == sorted(lines[1:-1])
    assert json.loads(text) == ITEMS
    assert os.listdir(tmp_path / "new") == ["golden.json"]


def test_write_golden_overwrites_only_with_force(tmp_path):
    path = tmp_path / "golden.json"
    path.write_text("mine")
    with pytest.raises(ReproError, match="already exists; --force replaces it"):
        golden.write_golden(ITEMS, path, force=False)
    assert path.read_text() == "mine"
    golden.write_golden(ITEMS, path, force=True)
    assert json.loads(path.read_text()) == ITEMS


def test_full_disk_keeps_old_golden_file(tmp_path):
    path = tmp_path / "golden.json"
    path.write_text("mine")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ReproError, match="cannot write the golden file"):
            golden.write_golden(ITEMS, path, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["golden.json"]


def test_find_golden_prefers_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(golden, "_INSTALLED", tmp_path / "installed")
    with pytest.raises(ReproError, match="no golden file golden/tiny.json"):
        golden.find_golden("tiny")
    golden.write_golden(ITEMS, tmp_path / "installed/tiny.json", force=False)
    assert golden.find_golden("tiny") == tmp_path / "installed/tiny.json"
    golden.write_golden(ITEMS, golden.golden_path("tiny"), force=False)
    assert golden.find_golden("tiny") == Path("golden/tiny.json")
