from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import msgspec
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline import checkpoint
from reproml.pipeline.checkpoint import (
    Checkpoint,
    Checkpoints,
    TraceHead,
    checkpoint_paths,
    latest_checkpoint,
)
from reproml.pipeline.run import Recording, perform
from reproml.pipeline.train import Training, train
from reproml.versions import DEFINITIONS
from tests import tiny


def save(folder: Path, numerics: str = "exact", steps: int = 6, trace: Any = None) -> Checkpoints:
    """Train the tiny recipe some of its 6 steps, with a checkpoint after each."""
    checkpoints = Checkpoints(folder, tiny.recipe(), numerics, 1, None)
    recorder: Any = SimpleNamespace(head=lambda: msgspec.to_builtins(trace)) if trace else None

    def after_step(training: Training) -> None:
        checkpoints.save(training, [f"step {training.done}"], recorder)

    train(tiny.recipe(), tiny.prepared(), numerics, steps, after_step=after_step)
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the two newest checkpoints after step 4. They are shared: do not change them."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, steps=4, trace=TraceHead(7, "ab", 4, 1, 1))
    return {path.name: path.read_bytes() for path in checkpoint_paths(folder)}


@pytest.fixture
def folder(saved: dict[str, bytes], tmp_path: Path) -> Path:
    return put(tmp_path, saved)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def step(found: Checkpoint | None) -> int:
    assert found is not None
    return found.head.step


def forged(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    """Alter the newest checkpoint and give it the right SHA-256, unlike accidental damage."""
    path = checkpoint_paths(folder)[0]
    raw = path.read_bytes()
    tensors = safetensors.torch.load(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    head = json.loads(header["__metadata__"]["reproml"])
    change(tensors, head)
    raw = safetensors.torch.save(tensors, {"reproml": json.dumps(head)})
    path.unlink()
    path = folder / f"step-00000004-{hashlib.sha256(raw).hexdigest()}.safetensors"
    path.write_bytes(raw)
    return path


def test_load_returns_saved_checkpoint(folder):
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.head.recipe == tiny.recipe() and found.head.numerics == "exact"
    assert (found.head.step, found.head.every, found.head.log) == (4, 1, ["step 4"])
    assert found.head.trace == TraceHead(7, "ab", 4, 1, 1)
    unbroken = train(tiny.recipe(), tiny.prepared())
    assert found.state.epochs == unbroken.epochs[:1]  # the loss to the last bit
    assert found.state.initial_state_dict_sha256 == unbroken.initial_state_dict_sha256
    names = {name.split(".")[0] for name in found.state.tensors}
    assert names == {"model", "optimizer", "random", "losses"}
    assert found.state.tensors["losses"].shape == (1,)


@pytest.mark.parametrize("numerics", ["exact", "native"])
def test_training_resumes_to_same_weights(tmp_path, monkeypatch, numerics):
    monkeypatch.setattr(checkpoint, "KEPT", 6)
    save(tmp_path, numerics)
    unbroken = train(tiny.recipe(), tiny.prepared(), numerics)
    starts = [checkpoint.load_checkpoint(path) for path in checkpoint_paths(tmp_path)]
    assert [start.head.step for start in starts] == [6, 5, 4, 3, 2, 1]
    for start in starts:
        trained = train(tiny.recipe(), tiny.prepared(), numerics, start=start.state)
        assert digest(trained.model) == digest(unbroken.model)
        assert trained.epochs == unbroken.epochs


def test_resumed_run_records_resumption_time(tmp_path):
    save(tmp_path)
    start = latest_checkpoint(tmp_path)
    checkpoints = Checkpoints(tmp_path, tiny.recipe(), "exact", 1, start)
    resumed = perform(tiny.recipe(), recording=Recording(checkpoints))
    assert resumed.items == tiny.run().items
    assert {"started", "resumed", "trained", "finished"} == set(resumed.record["times"])
    assert "data_ready" in tiny.run().record["times"]


def test_save_keeps_last_two(tmp_path):
    save(tmp_path)
    assert [path.name[:13] for path in checkpoint_paths(tmp_path)] == [
        "step-00000006",
        "step-00000005",
    ]
    assert len(list(tmp_path.iterdir())) == 2


def test_file_name_contains_sha256(folder):
    for path in checkpoint_paths(folder):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem.split("-")[2]


def test_save_respects_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "KEPT", 6)
    checkpoints = Checkpoints(tmp_path, tiny.recipe(), "exact", 4, None)
    train(tiny.recipe(), tiny.prepared(), after_step=lambda t: checkpoints.save(t, []))
    assert [checkpoint.load_checkpoint(path).head.step for path in checkpoint_paths(tmp_path)] == [
        4
    ]


def test_delete_removes_only_checkpoints(tmp_path):
    save(tmp_path / "checkpoints").delete()
    assert list(tmp_path.iterdir()) == []
    checkpoints = save(tmp_path / "checkpoints")
    (tmp_path / "checkpoints/notes.txt").write_text("mine")
    checkpoints.delete()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["notes.txt"]


def test_partial_files_are_deleted(folder):
    (folder / ".step-00000005-ab.safetensors.partial-01234567").write_text("half")
    (folder / ".mine.partial-01234567").write_text("mine")
    Checkpoints(folder, tiny.recipe(), "exact", 1, latest_checkpoint(folder))
    left = {path.name for path in folder.iterdir()} - {
        path.name for path in checkpoint_paths(folder)
    }
    assert left == {".mine.partial-01234567"}


@pytest.mark.parametrize("name", ["runs/a", "runs/a.checkpoints", "runs/a/", "runs/a.checkpoints/"])
def test_run_folder_and_checkpoint_folder_are_inverse(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    run = checkpoint.run_folder(Path(name))
    assert run == Path("runs/a")
    assert checkpoint.checkpoint_folder(run) == Path(tmp_path.resolve() / "runs/a.checkpoints")


def test_latest_is_none_without_checkpoints(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-1.safetensors").write_text("not ours")
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ReproError, match="cannot read the checkpoints in .*: Not a directory"):
        latest_checkpoint(tmp_path / "step-1.safetensors")


# --- damaged files --------------------------------------------------------------------------------------


@given(st.data())
def test_damaged_checkpoint_falls_back_to_previous(saved, tmp_path_factory, data):
    """The newest checkpoint is truncated anywhere, or has any bit flipped."""
    folder = put(tmp_path_factory.mktemp("damaged"), saved)
    newest, before = checkpoint_paths(folder)
    raw = bytearray(newest.read_bytes())
    if data.draw(st.booleans(), "cut"):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
    newest.write_bytes(raw)
    lines: list[str] = []
    found = latest_checkpoint(folder, lines.append)
    assert found is not None and (found.path, found.head.step) == (before, 3)
    reason = "its SHA-256 differs from the one in its name"
    assert lines == [f"skipping the damaged checkpoint {newest}: {reason}"]


def test_damaged_checkpoint_is_not_kept(folder):
    newest, before = checkpoint_paths(folder)
    newest.write_bytes(b"")
    start = latest_checkpoint(folder)
    checkpoints = Checkpoints(folder, tiny.recipe(), "exact", 1, start)
    assert start is not None and start.path == before
    train(
        tiny.recipe(),
        tiny.prepared(),
        steps=4,
        start=start.state,
        after_step=lambda t: checkpoints.save(t, []),
    )
    assert newest not in checkpoint_paths(folder)
    assert [checkpoint.load_checkpoint(path).head.step for path in checkpoint_paths(folder)] == [
        4,
        3,
    ]


def test_all_checkpoints_damaged_raises(folder):
    for path in checkpoint_paths(folder):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ReproError, match="all checkpoints in .* are damaged; delete that folder to train"
    ):
        latest_checkpoint(folder)


def test_unreadable_checkpoint_is_skipped(folder):
    newest, _ = checkpoint_paths(folder)
    newest.unlink()
    newest.mkdir()
    lines: list[str] = []
    assert step(latest_checkpoint(folder, lines.append)) == 3
    assert "it cannot be read: Is a directory" in lines[0]
    newest.rmdir()
    newest.symlink_to("/dev/null")
    assert step(latest_checkpoint(folder, lines.append)) == 3
    assert "it cannot be read: it is a pipe or a device" in lines[1]


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "unpickled")


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_pickle_is_never_unpickled(folder, tmp_path, write):
    with (tmp_path / "pickle").open("wb") as file:
        write(Trap(tmp_path / "trap"), file)
    raw = (tmp_path / "pickle").read_bytes()
    name = f"step-00000009-{hashlib.sha256(raw).hexdigest()}.safetensors"
    (tmp_path / "pickle").rename(folder / name)
    lines: list[str] = []
    assert step(latest_checkpoint(folder, lines.append)) == 4
    assert "it is not a safetensors checkpoint" in lines[0] and name in lines[0]
    assert not (tmp_path / "trap").exists()


# --- another training, another version, forged contents ----------------------------------------------


def test_other_recipe_or_numerics_raises(folder):
    start = latest_checkpoint(folder)
    with pytest.raises(ReproError, match="checkpoints of another recipe than tiny; leave out"):
        Checkpoints(folder, tiny.recipe(seed=2), "exact", 1, start)
    with pytest.raises(ReproError, match="in exact numerics, not native; choose with --numerics"):
        Checkpoints(folder, tiny.recipe(), "native", 1, start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "version 2 of the format, this reproml has version 1; update reproml"),
        ({"format": 0}, "version 0 of the format.*; delete the folder to train from scratch"),
        (
            {"definitions": DEFINITIONS + 1},
            f"version {DEFINITIONS + 1} of the definitions, this reproml has version {DEFINITIONS}; update",
        ),
        ({"format": 2, "step": None, "new": []}, "version 2 of the format"),
    ],
)
def test_other_version_raises(folder, change, message):
    forged(folder, lambda tensors, head: head.update(change))
    with pytest.raises(ReproError, match=message):
        latest_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.pop("step"),
        lambda head: head.update(step="4"),
        lambda head: head["recipe"].update(name="../up"),  # would become part of a file name
        lambda head: head["recipe"]["model"].update(kind="unheard-of"),
        lambda head: head["epochs"].append([1]),
        lambda head: head.update(format="1"),
    ],
)
def test_invalid_head_is_skipped_as_damaged(folder, change):
    path = forged(folder, lambda tensors, head: change(head))
    lines: list[str] = []
    assert step(latest_checkpoint(folder, lines.append)) == 3
    assert str(path) in lines[0] and "not a safetensors checkpoint" in lines[0]


def extra(head: dict[str, Any]) -> None:
    head.update(step=head["step"] + 3, epochs=head["epochs"] * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, head: tensors.pop("model.1.bias"),
        lambda tensors, head: tensors.pop("optimizer.0.exp_avg_sq"),
        lambda tensors, head: tensors.pop("losses"),
        lambda tensors, head: tensors.update(more=torch.zeros(1)),
        lambda tensors, head: tensors.update({"model.1.bias": torch.zeros(7)}),
        lambda tensors, head: tensors.update({"model.1.bias": torch.zeros(8).double()}),
        lambda tensors, head: tensors.update(losses=torch.zeros(1, dtype=torch.complex64)),
        lambda tensors, head: tensors.update(losses=torch.zeros(())),
        lambda tensors, head: tensors.update(losses=torch.zeros(3)),
        lambda tensors, head: tensors["random.now"].fill_(7),
        lambda tensors, head: tensors["random.epoch"].fill_(7),
        lambda tensors, head: head.update(step=5),
        lambda tensors, head: head.update(initial_state_dict_sha256="ab"),
        lambda tensors, head: head.update(step=13, epochs=head["epochs"] * 4),
    ],
)
def test_forged_state_raises_one_sentence(folder, change):
    path = forged(folder, change)
    state = checkpoint.load_checkpoint(path).state
    with pytest.raises(ReproError, match="is not from a training of tiny; delete it"):
        train(tiny.recipe(), tiny.prepared(), start=state)


@given(st.binary(max_size=400), st.integers(0, 400))
def test_arbitrary_head_raises_at_most_repro_error(saved, tmp_path_factory, junk, place):
    """The header's JSON is altered anywhere; the file name has the right SHA-256."""
    folder = tmp_path_factory.mktemp("junk")
    raw = bytearray(saved[max(saved)])
    raw[8 + place : 8 + place + len(junk)] = junk
    path = folder / f"step-00000004-{hashlib.sha256(raw).hexdigest()}.safetensors"
    path.write_bytes(raw)
    try:
        found = latest_checkpoint(folder)
        assert found is not None and isinstance(msgspec.to_builtins(found.head), dict)
    except ReproError as error:
        assert str(folder) in str(error)
