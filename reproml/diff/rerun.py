"""Run a traced training again up to one step, and record each operator of that step with its results.

The header of a trace has the command, the folder, the environment variables and the number of threads. The
same command runs in a new process with REPROML_TRACE_RERUN = {"step": ..., "folder": ...}: its trace is
then written to that folder and ends the process after that step (recorder.py). Everything else that the
command does, it does again.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from reproml import environment
from reproml.errors import ReproError
from reproml.tracing.chain import Reader
from reproml.tracing.recorder import RERUN

# The names of get_cpu_capability() -> the values of ATEN_CPU_CAPABILITY.
_CAPABILITIES = {"DEFAULT": "default", "NO AVX": "default", "AVX2": "avx2", "AVX512": "avx512"}


class Rerun:
    """One step of a training, run again into `folder`."""

    def __init__(self, reader: Reader, step: int, folder: Path) -> None:
        """Run it. Raises ReproError if the trace cannot be run again or does not reach that step."""
        header, path = reader.header, reader.path
        if not header.get("command"):
            raise ReproError(
                f"cannot run {path} again: its header has no command, as no script made it"
            )
        try:
            child = subprocess.run(
                header["command"],
                cwd=header["folder"],
                env={
                    **_variables(header),
                    RERUN: json.dumps({"step": step, "folder": str(folder)}),
                },
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise ReproError(f"cannot run {path} again: {error}") from None
        if not (folder / "weights.safetensors").exists():
            last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
            raise ReproError(f"the rerun of {path} did not reach step {step}: {last}")
        self._folder = folder
        entries = list(Reader(folder / "trace"))
        self.step: dict[str, Any] = entries[-1]
        # Each with its number, which is also the name of the file with its results.
        self.operators = [(i, e) for i, e in enumerate(entries, 1) if e["entry"] == "op"]

    def results(self, number: int) -> dict[str, Tensor]:
        """Return the output tensors of an operator by their position."""
        return self.tensors(str(number))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the `gradients` or `weights` of the step by the parameters' names."""
        found: dict[str, Tensor] = safetensors.torch.load_file(self._folder / f"{name}.safetensors")
        return found


def _variables(header: dict[str, Any]) -> dict[str, str]:
    """Return this process's variables, with those that change results replaced by the trace's."""
    then = header["environment"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(environment.PREFIXES)}
    torch: dict[str, Any] = then["torch"]
    defaults = {"OMP_NUM_THREADS": str(torch["threads"])}
    if torch["capability"] in _CAPABILITIES:
        defaults["ATEN_CPU_CAPABILITY"] = _CAPABILITIES[torch["capability"]]
    return {**kept, **defaults, **then["variables"]}
