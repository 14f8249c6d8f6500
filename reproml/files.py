"""Read files, write files that appear complete or not at all, and hold locks that end with their process.

The package filelock does not replace `locked`: its version for Python 3.9 leaves the lock file behind on
other systems than Windows, and deleting that file here would not be safe, because filelock does not check
that the file it has locked still exists under its name. Two processes could then hold the lock.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from reproml.errors import ReproError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises OSError, also for a pipe or a device, which may have no end."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder has an error of its own
        raise OSError(errno.EINVAL, "it is a pipe or a device and not a file", str(path))
    return path.open("rb")


def read_regular(path: Path) -> bytes:
    """Return the content of a file that `open_regular` opens."""
    with open_regular(path) as file:
        return file.read()


def files_below(folder: Path) -> list[Path]:
    """Return all files in a folder and its subfolders. Raises ReproError for what others cannot check.

    That is a link, which leads elsewhere on another machine, a device, or a name that is not UTF-8.
    """
    paths = sorted(folder.rglob("*"))
    for path in paths:
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise ReproError(
                f"{path} is a link or a device, which is neither signed nor exported; delete it"
            )
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise ReproError(
                f"the name of {path} is not UTF-8; rename or delete the file"
            ) from None
    return [path for path in paths if path.is_file()]


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a new file and flush it to the disk, so that it is complete if a crash follows a rename."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under another name in the same folder, then rename it. Raises OSError."""
    part = partial_path(path)
    try:
        write_and_sync(part, data)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return a new name in the folder of `path` for a file in progress; a kill may leave it behind."""
    return path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk; not on Windows, where folders cannot be opened."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the block, then delete it. The lock of a killed process is free.

    Raises BlockingIOError immediately if another process holds it, OSError if it cannot be created.
    """
    descriptor = _lock(path)
    try:
        yield
    finally:
        _unlock(path, descriptor)


if sys.platform == "win32":  # where a file is not deleted while it is open

    def _lock(path: Path) -> int:
        descriptor = None
        try:  # the file of a process that deletes it now cannot be opened
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            if not isinstance(error, PermissionError) or not path.exists():
                raise
            raise BlockingIOError(error.errno, "another process holds the lock") from None
        return descriptor

    def _unlock(path: Path, descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
        os.close(descriptor)
        with suppress(FileNotFoundError, PermissionError):  # another process deleted or opened it
            path.unlink()

else:

    def _lock(path: Path) -> int:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            except FileNotFoundError:
                pass  # its holder deleted it between our two calls: create it again
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _unlock(path: Path, descriptor: int) -> None:
        path.unlink(missing_ok=True)  # while it is locked: a waiting process sees it deleted
        os.close(descriptor)
