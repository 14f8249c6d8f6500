from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reproml.files import locked, read_regular, write_atomically
from verification.subprocesses import environment


def test_pipe_and_device_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "device").symlink_to("/dev/zero")  # which has no end
    for name in ("pipe", "device"):
        with pytest.raises(OSError, match="is a pipe or a device"):
            read_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)


@pytest.mark.parametrize("before", [None, b"old"])
def test_write_atomically_keeps_old_file_on_failure(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # like a full disk
    try:
        with pytest.raises(OSError):
            write_atomically(path, bytes(11))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])
    write_atomically(path, bytes(11))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [bytes(11)]


def test_lock_is_exclusive_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            raise AssertionError("two hold it")
        assert path.exists()
    with locked(path):  # released above
        pass
    assert not path.exists()


def test_killed_process_releases_lock(tmp_path):
    path = tmp_path / "lock"
    script = f"""
import pathlib, time
from reproml.files import locked
with locked(pathlib.Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), locked(path):
        raise AssertionError("two hold it")
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert path.exists()
    with locked(path):
        pass
    assert not path.exists()


def test_deleted_lock_file_is_created_again(tmp_path, monkeypatch):
    path, calls = tmp_path / "lock", []

    def flock(descriptor, operation, flock=fcntl.flock):
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()  # after the code under test opened it
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path):
        assert len(calls) == 2
        with pytest.raises(BlockingIOError), locked(path):
            raise AssertionError("two hold it")


def test_lock_in_missing_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none/lock"):
        raise AssertionError("nothing holds it")
