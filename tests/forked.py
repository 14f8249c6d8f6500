"""`python -m reproml` in a process of its own, without loading PyTorch each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent

# Forks for each command line that it reads. It computes nothing itself, so that it has no threads yet.
_SERVER = """
import gc, json, os, sys
import rich.console, sklearn.datasets, torch._dynamo
import reproml.arithmetic.mode, reproml.script
from reproml.cli import main
gc.freeze()
for line in sys.stdin:
    folder, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        for descriptor, name in (1, "stdout"), (2, "stderr"):
            os.dup2(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY), descriptor)
        sys.exit(main(arguments))
    status = os.waitpid(child, 0)[1]
    print(os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status), flush=True)
"""


class Shown(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def environment(variables: Optional[Mapping[str, str]] = None) -> dict[str, str]:
    """Return this process's environment, in which Python finds this checkout's reproml."""
    own = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**os.environ, **own, **(variables or {})}


class Reproml:
    """Within `with`, a call runs the arguments in the folder, under the environment variables."""

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

    def __call__(self, folder: Path, *arguments: str) -> Shown:
        assert self._server.stdin and self._server.stdout
        print(json.dumps([str(folder), arguments]), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        texts = []
        for name in ("stdout", "stderr"):
            texts.append((folder / name).read_text())
            (folder / name).unlink()
        return Shown(status, *texts)
