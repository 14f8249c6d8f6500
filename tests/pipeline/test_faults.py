"""Kills, full disks and missing permissions: nothing is lost, no half-written file is accepted."""

from __future__ import annotations

import hashlib
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reproml import cli
from reproml.evidence import reproduced
from reproml.evidence.provenance import read_provenance
from reproml.pipeline import golden
from reproml.pipeline.checkpoint import Checkpoints, checkpoint_folder, checkpoint_paths
from reproml.pipeline.run import Run, items_json, perform, reserve_run_folder
from tests import tiny
from verification.subprocesses import Reproml

FILES = ["log.txt", "metrics.json", "provenance.json", "run.json", "weights.safetensors"]
TINY = ["--recipe", "./tiny.toml"]
TRAIN = [
    "train",
    *TINY,
    "--checkpoint-every",
    "2",
    "--resume",
    "runs/tiny",
]  # the command of a job that is restarted


@pytest.fixture(scope="module")
def reproml() -> Iterator[Reproml]:
    with Reproml({"OMP_NUM_THREADS": "1"}) as reproml:
        yield reproml


@pytest.fixture(scope="module")
def other() -> Run:
    """Return a run of the same name, to be replaced."""
    return perform(tiny.recipe(seed=2))


@contextmanager
def at_work() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        tiny.toml(Path(name))
        yield Path(name)


def is_complete(out: Path, run: Run) -> bool:
    """Return whether `out` is a complete copy of the run, except for times in the log and the record."""
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    return (
        sorted(contents) == FILES
        and not any(reproduced.wrong_files(read_provenance(out)))
        and contents["metrics.json"] == items_json(run.items).encode()
        and contents["weights.safetensors"] == run.weights
        and contents["run.json"].endswith(b"\n}\n")
        and contents["log.txt"].splitlines()[-1].endswith(run.log[-1].split(" ", 1)[1].encode())
    )


# --- killed ---------------------------------------------------------------------------------------


def test_kill_at_each_folder_change_loses_nothing(reproml, other, monkeypatch):
    """A kill before each of them and in the middle of each write leaves every possible state."""
    status, call = -9, 0
    while status == -9:
        call += 1
        with at_work() as folder:
            out = folder / "runs/tiny"
            with reserve_run_folder(out) as save:
                save(other)
            status = reproml(folder, *TRAIN, call=call).returncode
            assert is_complete(out, tiny.run()) or (is_complete(out, other) and status == -9)
            monkeypatch.chdir(folder)
            assert cli.main(TRAIN) == 0
            assert is_complete(out, tiny.run())
            assert checkpoint_paths(checkpoint_folder(out)) == []
    assert status == 0 and call > 30  # three checkpoints and five files


@given(kills=st.lists(st.floats(0.001, 0.4), max_size=3), every=st.integers(1, 6))
@settings(max_examples=6)
def test_kills_at_random_times_lose_nothing(reproml, kills, every):
    with at_work() as folder:
        for seconds in kills:
            shown = reproml(folder, *TRAIN, "--checkpoint-every", str(every), seconds=seconds)
            assert shown.returncode in (-9, 0) and shown.stderr == ""
        assert reproml(folder, *TRAIN).returncode == 0
        assert is_complete(folder / "runs/tiny", tiny.run())


def test_killed_golden_replacement_is_atomic(reproml):
    status, call = -9, 0
    old, new = "{}", items_json(tiny.run().items)
    while status == -9:
        call += 1
        with at_work() as folder:
            path = folder / golden.golden_path("tiny")
            path.parent.mkdir()
            path.write_text(old)
            status = reproml(folder, "golden", *TINY, "--force", call=call).returncode
            assert path.read_text() == new or (path.read_text() == old and status == -9)
    assert status == 0 and call > 3


# --- a disk that is full, a folder that cannot be written -----------------------------------------


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working directory with a training that was interrupted after 4 of 6 steps."""
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    interrupt_after(4, monkeypatch)
    assert cli.main(TRAIN) == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint = Checkpoints.save

    def save(self, training, log, recorder):
        save_checkpoint(self, training, log, recorder)
        if training.done == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save)


def everything(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def files_end_after(size: int) -> Iterator[None]:
    """Limit the size of files, so that a write stops in the middle as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("every", "words"),
    [("1", "cannot write checkpoints into"), ("9", "cannot write the run folder")],
)
def test_full_disk_loses_no_checkpoint(begun, capsys, every, words):
    before = everything(begun)
    assert len(before) == 3  # two checkpoints and the recipe
    with files_end_after(1000):
        assert cli.main([*TRAIN, "--checkpoint-every", every]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert everything(begun) == before
    assert cli.main(TRAIN) == 0
    assert is_complete(begun / "runs/tiny", tiny.run())
    assert os.listdir("runs") == ["tiny"]


@contextmanager
def unprivileged() -> Iterator[None]:
    """Become another user for the block if this is root, who may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("there", ["nothing", "run", "checkpoints"])
def test_read_only_run_folder_raises_before_training(there):
    with at_work() as folder:
        out = folder / "tiny"
        if there == "run":
            with reserve_run_folder(out) as save:
                save(tiny.run())
        if there == "checkpoints":
            checkpoint_folder(out).mkdir()
        before = everything(folder)
        folder.chmod(0o555)
        try:
            with (
                unprivileged(),
                pytest.raises(Exception, match="cannot write .*: Permission denied"),
            ):
                with reserve_run_folder(out):
                    raise AssertionError("the training was begun")
        finally:
            folder.chmod(0o755)
        assert everything(folder) == before


def test_read_only_checkpoint_folder_raises_before_training():
    with at_work() as folder:
        folder.chmod(0o555)
        try:
            with (
                unprivileged(),
                pytest.raises(Exception, match="cannot write checkpoints into .*denied"),
            ):
                Checkpoints(folder / "tiny.checkpoints", tiny.recipe(), "exact", 1, None)
        finally:
            folder.chmod(0o755)


# --- two processes ----------------------------------------------------------------------------------


def test_second_training_into_same_folder_raises(begun, capsys):
    before = everything(begun / "runs/tiny.checkpoints")
    with reserve_run_folder(begun / "runs/tiny") as save:
        assert cli.main(TRAIN) == 2
        error = capsys.readouterr().err
        assert "another process is training into" in error and error.count("\n") == 1
        assert everything(begun / "runs/tiny.checkpoints") == before
        save(tiny.run())
    assert is_complete(begun / "runs/tiny", tiny.run())
