"""exact() and the pipeline work where the system refuses what Windows refuses (tests/windows.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import reproml
from reproml.files import locked
from reproml.pipeline.golden import golden_path, write_golden
from reproml.pipeline.run import reserve_run_folder
from tests import tiny
from verification.subprocesses import environment


def on_windows(script: str, folder: Path) -> str:
    """Run a script in the folder, without the compiled loops, and return what it prints."""
    (folder / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-m", "tests.windows", "script.py"],
        cwd=folder,
        env=environment({"REPROML_KERNELS": "off"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRAIN = """
import torch, reproml
torch.manual_seed(1)
with reproml.exact():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.rand(6, 8)), torch.arange(6) % 4).backward()
        optimizer.step()
"""


def test_script_has_the_same_digest(tmp_path):
    names: dict[str, Any] = {}
    exec(TRAIN, names)
    shown = on_windows(TRAIN + "print(reproml.digest(model))", tmp_path)
    assert shown == f"{reproml.digest(names['model'])}\n"


COMMANDS = """
from reproml.cli import main
assert main(["verify", "--run", "run"]) == 0
assert main(["report", "--run", "run"]) == 0
for folder in ("run", "empty", "new/run"):
    arguments = ["--recipe", "./tiny.toml", "--out", folder, "--trace", "run.trace"]
    assert main(["train", *arguments, "--checkpoint-every", "2"]) == 0
"""


def test_run_verifies_and_another_is_published(tmp_path):
    """In place of a run, of an empty folder, and where there was nothing."""
    write_golden(tiny.run().items, tmp_path / golden_path("tiny"), force=False)
    with reserve_run_folder(tmp_path / "run") as save:
        save(tiny.run())
    (tmp_path / "run/log.txt").write_text("old")
    (tmp_path / "empty").mkdir()
    tiny.toml(tmp_path)
    assert "tiny: verified" in on_windows(COMMANDS, tmp_path)
    for out in ("run", "empty", "new/run"):
        assert (tmp_path / out / "weights.safetensors").read_bytes() == tiny.run().weights
        assert (tmp_path / out / "log.txt").read_text() != "old"
    left = {"empty", "golden", "new", "run", "run.html", "run.trace", "script.py", "tiny.toml"}
    assert set(os.listdir(tmp_path)) == left and os.listdir(tmp_path / "new") == ["run"]


LOCK = """
from pathlib import Path
from reproml.files import locked
path = Path("lock")
for _ in range(2):
    with locked(path):
        try:
            with locked(path):
                raise AssertionError("two hold it")
        except BlockingIOError:
            assert path.exists()
    assert not path.exists()
opened = path.open("w")  # by another process that wants the lock
with locked(path):
    pass
assert path.exists()
"""


def test_lock_is_exclusive_and_leaves_no_file(tmp_path):
    on_windows(LOCK, tmp_path)
    with locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


SIMULATION = """
import ctypes, importlib, os
os.mkdir("a"), os.mkdir("b"), os.mkdir("c")
file = open("a/file", "w")
for error, call in [
    (ImportError, lambda: importlib.import_module("fcntl")),
    (AttributeError, lambda: os.register_at_fork),
    (PermissionError, lambda: os.open("a", os.O_RDONLY)),
    (PermissionError, lambda: os.remove("a/file")),
    (PermissionError, lambda: os.rename("a", "d")),
    (FileExistsError, lambda: os.rename("b", "c")),
    (TypeError, lambda: ctypes.CDLL(None)),
]:
    try:
        call()
    except error:
        print("refused")
"""


def test_simulation_refuses_what_windows_refuses(tmp_path):
    assert on_windows(SIMULATION, tmp_path) == 7 * "refused\n"
