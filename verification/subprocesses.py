"""Run `python -m reproml` in separate processes without loading PyTorch in each."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent

# Forks once for each command line that it reads. It computes nothing itself, so it has no threads.
_SERVER = """
import gc, json, os, signal, sys
import rich.console, sklearn.datasets, torch._dynamo
import reproml.arithmetic.handlers, reproml.script
from reproml.cli import main
from verification.subprocesses import die_at_call
gc.freeze()
for line in sys.stdin:
    folder, arguments, seconds, call = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for descriptor, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY), descriptor)
        if call:
            die_at_call(call)
        status = main(arguments)
        if not seconds and not call:
            sys.exit(status)
        os._exit(status)  # without PyTorch's cleanup, which takes longer than most tests
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    status = os.waitpid(child, 0)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), flush=True)
"""

# The calls that change a folder, as Python's audit events name them.
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_at_call(number: int) -> None:
    """Kill this process before its n-th call that changes a folder, or in the middle of a write."""
    left = number

    def count(half_written: Optional[int] = None) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            if half_written is not None:
                os.truncate(half_written, os.fstat(half_written).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if event in _CHANGES or writing:
            count()

    def fsync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
        count(descriptor if stat.S_ISREG(os.fstat(descriptor).st_mode) else None)
        fsync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


class Completed(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def environment(variables: Optional[Mapping[str, str]] = None) -> dict[str, str]:
    """Return this process's environment, changed so that Python imports this checkout's reproml."""
    own = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own, **(variables or {})}


class Reproml:
    """Run command lines in a folder: `with Reproml() as reproml: reproml(folder, "train", ...)`.

    The process is killed after `seconds`, or at its `call`-th call that changes a folder; 0 means never.
    """

    def __init__(self, variables: Optional[Mapping[str, str]] = None) -> None:
        self._variables = variables

    def __enter__(self) -> Reproml:
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env=environment(self._variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._server.__exit__(kind, error, trace)

    def __call__(
        self, folder: Path, *arguments: str, seconds: float = 0, call: int = 0
    ) -> Completed:
        assert self._server.stdin and self._server.stdout
        for name in ("stdout", "stderr"):
            (folder / name).touch()  # the process may be killed before it writes anything
        job = json.dumps([str(folder), arguments, seconds, call])
        print(job, file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        texts = []
        for name in ("stdout", "stderr"):
            texts.append((folder / name).read_text())
            (folder / name).unlink()
        return Completed(status, *texts)
