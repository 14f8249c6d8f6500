"""Files that appear whole or not at all, whatever kills the process, and locks that die with it."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a new file to the disk itself, so that a crash after a rename finds it whole."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name beside its place, then rename it there. Raises OSError."""
    part = partial(path)
    try:
        write(part, data)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def partial(path: Path) -> Path:
    """Return a new name beside `path` for what is being written; a kill may leave it behind."""
    return path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block, then delete it; a killed process holds it no more.

    Raises BlockingIOError at once if another holds it, OSError if it cannot be made.
    """
    descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees it gone
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # deleted by its holder between our two calls: make it anew
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
