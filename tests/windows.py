"""Make Linux refuse in one process what Windows refuses: `python -m tests.windows FILE.py`.

What is simulated is how files behave and what Python lacks there. PyTorch, its arithmetic and Python's
own modules stay those of Linux: they are imported before.
"""

from __future__ import annotations

import errno
import os
import runpy
import shutil
import signal
import sys
from types import ModuleType
from typing import Any

# Imported now, as they choose their system when they are imported.
import numpy  # noqa: F401
import rich.console  # noqa: F401
import rich.progress  # noqa: F401
import safetensors.torch  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.export._trace  # noqa: F401

UNIX_MODULES = "fcntl grp posix pty pwd resource syslog termios tty".split()
UNIX_NAMES = """
    O_CLOEXEC O_DIRECTORY O_NOCTTY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG chown chroot fchmod fchown fork
    forkpty getegid geteuid getgid getpgid getuid initgroups killpg lchown mkfifo mknod nice openpty
    pread preadv pwrite pwritev register_at_fork sched_getaffinity sched_setaffinity sendfile setsid
    setuid statvfs sync sysconf umount2 uname wait wait3 wait4 waitid
""".split()
UNIX_SIGNALS = "SIGALRM SIGCHLD SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 setitimer".split()


def pretend() -> None:
    """Simulate Windows from now on."""
    from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

    def locking(descriptor: int, mode: int, count: int) -> None:
        try:
            flock(descriptor, mode)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt: Any = ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_NBLCK, msvcrt.LK_UNLCK = locking, LOCK_EX | LOCK_NB, LOCK_UN
    sys.modules["msvcrt"] = msvcrt
    for name in UNIX_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # its import raises ModuleNotFoundError
    for owner, names in (os, UNIX_NAMES), (signal, UNIX_SIGNALS):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    os.rename = _rename  # type: ignore[assignment]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # it opens folders otherwise
    sys.addaudithook(_refuse)
    sys.platform = "win32"


def _rename(source: Any, target: Any, rename: Any = os.rename) -> None:
    if os.path.lexists(target):  # also an empty folder
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists")
    rename(source, target)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise the error of Windows before a call that it refuses."""
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        if os.path.isdir(arguments[0]):
            raise PermissionError(errno.EACCES, "Permission denied", str(arguments[0]))
    elif event in ("os.remove", "os.rename", "os.rmdir"):
        for path in arguments[: 1 + (event == "os.rename")]:
            if _is_open(os.path.abspath(path)):
                raise PermissionError(errno.EACCES, "used by another process", str(path))
    elif event == "ctypes.dlopen" and arguments[0] is None:
        raise TypeError("bad argument type for built-in operation")


def _is_open(path: str) -> bool:
    """Return whether this process has opened the file, or one in the folder."""
    opened = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in opened if os.path.lexists(link)]
    return any(target == path or target.startswith(path + os.sep) for target in targets)


if __name__ == "__main__":
    pretend()
    runpy.run_path(sys.argv[1], run_name="__main__")
