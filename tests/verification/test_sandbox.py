"""The fuzzer is worth what its sandbox notices: each kind of misbehaviour is shown to be found."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import pytest

from reproml import cli
from verification import fuzz, sandbox


class _Unpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("unpickled",)


def _run_file() -> None:
    exec(compile("1 + 1", os.path.abspath("file"), "exec"))


def _raise() -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("deed", "found"),
    [
        (lambda: None, ""),
        (lambda: Path("runs/page.html").write_text("&lt;script>"), ""),
        (lambda: Path("other").touch(), "wrote"),
        (lambda: Path("../up").mkdir(), "wrote"),
        (lambda: Path("other").symlink_to("/"), "wrote"),
        (lambda: os.rename("runs", "other"), "wrote"),
        (lambda: os.system("true"), "executed"),
        (lambda: subprocess.Popen([sys.executable, "-c", ""]).wait(), "executed"),
        (lambda: socket.getaddrinfo("localhost", 80), "executed"),
        (lambda: pickle.loads(pickle.dumps(_Unpickled())), "executed"),
        (_run_file, "executed"),
        (lambda: Path("runs/page.html").write_text("<script>CANARY</script>"), "in a page"),
        (lambda: print("\x1b[77m"), "a control character"),
        (lambda: print("\x9b0m", file=sys.stderr), "a control character"),
        (_raise, "status a traceback"),
        (lambda: sys.exit(3), "status 3"),
        (lambda: os._exit(0), "status a crash"),
        (lambda: time.sleep(60), "status no end"),
    ],
)
def test_misbehaviour_is_found(tmp_path, monkeypatch, deed: Callable[[], Any], found: str):
    def command(args: Any, terminal: Any) -> tuple[int, dict[str, Any]]:
        deed()
        return 0, {}

    work = tmp_path / "work"
    (work / "runs").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setitem(cli.VERBS, "data", replace(cli.VERBS["data"], command=command))
    monkeypatch.setattr(sandbox, "SECONDS", 1 if "no end" in found else 60)
    monkeypatch.setattr(fuzz, "KEPT", os.listdir(tempfile.gettempdir()))
    worker = sandbox.Worker(work)
    try:
        faults = fuzz.faults(["data"], worker.run(["data"], ("runs",), 0))
    finally:
        worker.end()
    assert bool(faults) == bool(found) and all(found in fault for fault in faults)
