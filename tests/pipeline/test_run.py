from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline import run as runs
from reproml.pipeline.run import (
    Run,
    items_json,
    load_run_model,
    read_items,
    recompute,
    reserve_run_folder,
)
from tests import tiny

FILES = ["log.txt", "metrics.json", "provenance.json", "run.json", "weights.safetensors"]


def save(out: Path, run: Run) -> None:
    with reserve_run_folder(out) as write:
        write(run)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "run", tiny.run())
    return tmp_path / "run"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_run_folder_has_documented_files(folder):
    assert sorted(os.listdir(folder)) == FILES
    assert os.listdir(folder.parent) == ["run"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == tiny.run().items
    weights = (folder / "weights.safetensors").read_bytes()
    assert metrics["weights.safetensors.sha256"] == hashlib.sha256(weights).hexdigest()
    assert metrics["epoch.2.state_dict.sha256"] == digest(safetensors.torch.load(weights))
    assert (metrics["train.total"], metrics["test.total"]) == (1500, 297)
    assert "epoch 2 of 2: loss" in (folder / "log.txt").read_text()
    record = json.loads((folder / "run.json").read_text())
    assert record["recipe.sha256"] == tiny.recipe().sha256
    assert record["recipe"]["train"] == {"epochs": 2, "batch_size": 500}
    assert {"data.sha256", "versions", "machine", "definitions.version", "times"} <= set(record)


def test_items_follow_pipeline_order():
    names = list(tiny.run().items)
    starts = ["recipe", "definitions", "data", "preprocessed", "initial", "epoch.1", "epoch.2"]
    starts += ["weights", "train", "test"]
    positions = [next(i for i, name in enumerate(names) if name.startswith(s)) for s in starts]
    assert positions == sorted(positions)


def test_epoch_items_sort_chronologically():
    run = runs.perform(tiny.recipe(epochs=11), numerics="native")
    losses = [name for name in run.items if name.endswith(".loss")]
    assert losses == sorted(losses) and losses[0] == "epoch.01.loss"


def test_safetensors_file_has_known_bytes():
    """The golden hash is that of the file, so a library with another layout must be noticed here."""
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    for tensor in model.state_dict().values():
        tensor.fill_(1)
    sha256 = hashlib.sha256(safetensors.torch.save(model.state_dict())).hexdigest()
    assert sha256 == "18cfb5a4acd187308e534eacb1a319432a5f55e2eb353dd923354bda149159ee"


def test_recompute_equals_recorded_items(folder):
    items, recorded = recompute(folder, tiny.recipe())
    assert items_json(recorded).replace('"', "") == items_json(items).replace('"', "")
    assert list(items) == list(tiny.run().items)


def test_recompute_ignores_recorded_results(folder):
    lies = {name: "0" for name in tiny.run().items}
    (folder / "metrics.json").write_text(items_json({**lies, "more": "1"}))
    items, _ = recompute(folder, tiny.recipe())
    trail = {"epoch.1.loss", "epoch.2.loss", "epoch.1.state_dict.sha256"}
    assert {name for name, value in items.items() if value == "0"} == trail
    assert items["more"] == "1"


# --- the folder appears complete or not at all -------------------------------------------------------


def other(run: Run) -> Run:
    return dataclasses.replace(run, log=["another"])


def test_run_is_replaced_atomically(folder):
    save(folder, other(tiny.run()))
    assert (folder / "log.txt").read_text() == "another\n"
    assert sorted(os.listdir(folder)) == FILES and os.listdir(folder.parent) == ["run"]


def test_run_is_replaced_without_renameat2(folder, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    save(folder, other(tiny.run()))
    assert (folder / "log.txt").read_text() == "another\n"
    assert os.listdir(folder.parent) == ["run"]


@pytest.mark.parametrize("stray", ["notes.txt", "log.txt"])  # an unrelated file; an incomplete run
def test_other_content_raises_and_stays(tmp_path, stray):
    out = tmp_path / "run"
    out.mkdir()
    (out / stray).write_text("mine")
    with pytest.raises(ReproError, match="not a run; choose another folder with --out"):
        save(out, tiny.run())
    assert everything(tmp_path) == {f"run/{stray}": b"mine"}


def test_content_added_during_training_stays(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ReproError, match=r"stays in .*/\.run\.partial-.*: .* not a run"):
        with reserve_run_folder(out) as write:
            out.mkdir()
            (out / "notes.txt").write_text("mine")
            write(tiny.run())
    assert (out / "notes.txt").read_text() == "mine"
    (kept,) = tmp_path.glob(".run.partial-*")
    assert sorted(os.listdir(kept)) == FILES


def test_second_run_into_same_folder_raises(tmp_path):
    with reserve_run_folder(tmp_path / "run") as write:
        with pytest.raises(ReproError, match="another process is training into .*/run; wait"):
            save(tmp_path / "run", other(tiny.run()))
        save(tmp_path / "beside", other(tiny.run()))
        write(tiny.run())
    save(tmp_path / "run", other(tiny.run()))  # the lock was released
    assert (tmp_path / "run/log.txt").read_text() == "another\n"
    assert sorted(os.listdir(tmp_path)) == ["beside", "run"]


def test_incomplete_folders_of_killed_runs_are_deleted(tmp_path):
    (tmp_path / ".run.partial-1").mkdir()
    (tmp_path / ".run.partial-1/metrics.json").write_text("{")
    (tmp_path / ".run.partial-2").mkdir()
    for name in FILES:
        (tmp_path / ".run.partial-2" / name).write_text("")
    (tmp_path / ".run.partial-3").write_text("an unrelated file")
    (tmp_path / ".run.lock").write_text("")
    save(tmp_path / "run", tiny.run())
    assert sorted(os.listdir(tmp_path)) == [".run.partial-2", ".run.partial-3", "run"]


def test_complete_copies_of_killed_runs_are_deleted(tmp_path):
    """A kill between the last file and the rename leaves one; a run with other weights or items stays."""
    for number, result in enumerate([tiny.run(), other(tiny.run())]):
        save(tmp_path / "beside", result)
        os.rename(tmp_path / "beside", tmp_path / f".run.partial-{number}")
    for number, name in (2, "weights.safetensors"), (3, "metrics.json"):
        save(tmp_path / "beside", tiny.run())
        (tmp_path / "beside" / name).write_text("{}")
        os.rename(tmp_path / "beside", tmp_path / f".run.partial-{number}")
    save(tmp_path / "run", tiny.run())
    left = [".run.partial-2", ".run.partial-3", "run"]
    assert sorted(os.listdir(tmp_path)) == left  # the log and the record may differ


def test_empty_folder_and_link_are_used(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    save(tmp_path / "link", tiny.run())
    assert sorted(os.listdir(tmp_path / "empty")) == FILES and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/reproml-test", "/"])
def test_unwritable_folder_raises_before_training(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ReproError), reserve_run_folder(tmp_path / out):
        raise AssertionError("the training was begun")
    assert everything(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("limit", [0, 100, 1500])
def test_full_disk_keeps_previous_content(tmp_path, there_before, limit):
    out = tmp_path / "run"
    if there_before:
        save(out, other(tiny.run()))
    before = everything(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(ReproError, match="cannot write the run folder"),
            reserve_run_folder(out) as write,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # like a full disk
            write(tiny.run())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything(tmp_path) == before and len(os.listdir(tmp_path)) == there_before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ReproError])
def test_interrupted_training_leaves_nothing(tmp_path, error):
    with pytest.raises(error), reserve_run_folder(tmp_path / "runs" / "run"):
        raise error
    assert os.listdir(tmp_path / "runs") == []


# --- invalid run folders -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.json", "run.json", "weights.safetensors"])
def test_missing_file_raises_with_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(ReproError, match=f"not a complete run: it has no {name}"):
        recompute(folder, tiny.recipe())


def test_missing_folder_raises(tmp_path):
    with pytest.raises(ReproError, match="does not exist"):
        recompute(tmp_path / "none", tiny.recipe())


@given(st.data())
@settings(max_examples=30)
def test_damaged_weights_file_is_detected(tmp_path_factory, data):
    """A truncation or a flipped bit raises an error or changes the hash."""
    folder = tmp_path_factory.mktemp("damaged")
    save(folder / "run", tiny.run())
    raw = bytearray(tiny.run().weights)
    if data.draw(st.booleans(), "cut"):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        start = data.draw(st.sampled_from([0, 0, len(raw) // 2]))  # the header is hit more often
        bit = data.draw(st.integers(8 * start, 8 * min(start + 400, len(raw)) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    (folder / "run/weights.safetensors").write_bytes(raw)
    try:
        _, _, sha256 = load_run_model(folder / "run", tiny.recipe(), tiny.prepared(), "exact")
        assert sha256 != tiny.run().items["weights.safetensors.sha256"]
    except ReproError as error:
        assert "weights.safetensors" in str(error)
    finally:
        shutil.rmtree(folder)


def test_pickled_weights_raise(folder):
    torch.save({"1.weight": torch.zeros(1)}, folder / "weights.safetensors")
    with pytest.raises(ReproError, match="not a safetensors file"):
        recompute(folder, tiny.recipe())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("1.bias"),
        lambda state: state.update(extra=torch.zeros(1)),
        lambda state: state.update({"1.bias": state["1.bias"].double()}),
        lambda state: state.update({"1.bias": state["1.bias"][:-1].clone()}),
    ],
)
def test_other_tensors_raise(folder, change):
    state = safetensors.torch.load(tiny.run().weights)
    change(state)
    (folder / "weights.safetensors").write_bytes(safetensors.torch.save(state))
    with pytest.raises(ReproError, match="other tensors than a model of tiny"):
        recompute(folder, tiny.recipe())


def test_run_of_other_recipe_raises(folder):
    with pytest.raises(ReproError, match="a run of another recipe"):
        recompute(folder, tiny.recipe(seed=2))


def test_recompute_of_native_run_raises(tmp_path):
    save(tmp_path / "run", runs.perform(tiny.recipe(), numerics="native"))
    with pytest.raises(ReproError, match="not a run in exact numerics"):
        recompute(tmp_path / "run", tiny.recipe())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"a": {}}', "the value of 'a' must be"),
        ('{"a": true}', "the value of 'a' must be"),
        ('{"a": 1, "b": 2, "a": 1}', "is not JSON: the key 'a' occurs twice"),
    ],
)
def test_invalid_items_file_raises(tmp_path, text, message):
    path = tmp_path / "items.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ReproError, match=message):
        read_items(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder for many examples; each restores its files."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    save(folder, tiny.run())
    return folder


@given(st.sampled_from(FILES[1:3]), st.binary(max_size=60), st.integers(0, 3000), st.data())
@example("run.json", b"[" * 100_000, 0, None)
def test_arbitrary_bytes_raise_at_most_repro_error(shared, name, junk, place, data):
    """The bytes replace as many or more bytes of metrics.json or run.json."""
    content = (shared / name).read_bytes()
    end = place + len(junk) if data is None else data.draw(st.integers(place, place + 100), "end")
    try:
        (shared / name).write_bytes(content[:place] + junk + content[end:])
        for read in (
            lambda: read_items(shared / "metrics.json"),
            lambda: runs.recorded_recipe(shared),
            lambda: runs.finished_items(shared, tiny.recipe(), "exact"),
        ):
            try:
                read()
            except ReproError as error:
                assert str(shared) in str(error)
    finally:
        (shared / name).write_bytes(content)


def test_items_keep_every_digit(tmp_path):
    (tmp_path / "items.json").write_text('{"a": 0.10000000000000001, "b": 1.0, "c": 1, "d": null}')
    items = read_items(tmp_path / "items.json")
    assert items == {"a": "0.10000000000000001", "b": "1.0", "c": "1", "d": None}
