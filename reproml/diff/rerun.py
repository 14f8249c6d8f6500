"""Run a traced training again up to one step, and record each operator of that step with its results.

A trace may come from somebody else, so nothing in it decides what is executed. A recipe in its header is
checked as any recipe is and trained by this Python's own `reproml train`; a script is run only if the user
names it. Each command is shown before it runs. Of the environment variables in the header only those of
VARIABLES apply: they choose kernels and threads, and cannot make a program load code.

The command runs with REPROML_TRACE_RERUN = {"step": ..., "folder": ...}: its trace is then written to that
folder and ends the process after that step (recorder.py). Everything else that the command does, it does.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import msgspec
import safetensors.torch
from torch import Tensor

from reproml.errors import ReproError
from reproml.pipeline.recipe import Recipe, recipe_toml
from reproml.tracing.chain import Reader
from reproml.tracing.recorder import RERUN

# The names of get_cpu_capability() -> the values of ATEN_CPU_CAPABILITY.
_CAPABILITIES = {"DEFAULT": "default", "NO AVX": "default", "AVX2": "avx2", "AVX512": "avx512"}

# The variables that a trace may set. None of them names a file, a folder or a library.
VARIABLES = frozenset(
    """
    ATEN_CPU_CAPABILITY BLIS_NUM_THREADS CUBLAS_WORKSPACE_CONFIG CUDA_VISIBLE_DEVICES GLIBC_TUNABLES
    GOMP_CPU_AFFINITY KMP_AFFINITY KMP_BLOCKTIME MKL_CBWR MKL_DYNAMIC MKL_ENABLE_INSTRUCTIONS
    MKL_NUM_THREADS MKL_THREADING_LAYER NPY_DISABLE_CPU_FEATURES NPY_ENABLE_CPU_FEATURES OMP_DYNAMIC
    OMP_NUM_THREADS OMP_PLACES OMP_PROC_BIND OMP_SCHEDULE OMP_THREAD_LIMIT ONEDNN_DEFAULT_FPMATH_MODE
    ONEDNN_MAX_CPU_ISA OPENBLAS_CORETYPE OPENBLAS_NUM_THREADS REPROML_KERNELS VECLIB_MAXIMUM_THREADS
    """.split()
)
_VALUE = re.compile(r"[\w.,:;=+*{}() -]{0,200}", re.ASCII)


@dataclass(frozen=True)
class Again:
    """How to run trainings again: the user's script with its arguments, if any, and where to show it."""

    script: Sequence[str] = ()
    show: Callable[[str], None] = print


def script_words(command: Optional[str]) -> list[str]:
    """Split the value of the option --script. Raises ReproError if its quotes do not match."""
    try:
        return shlex.split(command or "")
    except ValueError as error:
        raise ReproError(f"cannot read the script's command line {command!r}: {error}") from None


class Rerun:
    """One step of a training, run again into `folder`."""

    def __init__(self, reader: Reader, step: int, folder: Path, again: Again) -> None:
        """Run it. Raises ReproError if the trace cannot be run again or does not reach that step."""
        path, variables = reader.path, _variables(reader.header)
        command = [sys.executable, *_command(reader, step, folder, again.script)]
        settings = [f"{name}={value}" for name, value in sorted(variables.items())]
        again.show(f"running {path} again: {shlex.join([*settings, *command])}")
        try:
            child = subprocess.run(
                command,
                env={
                    **{name: v for name, v in os.environ.items() if name not in VARIABLES},
                    **variables,
                    RERUN: json.dumps({"step": step, "folder": str(folder)}),
                },
                capture_output=True,
                text=True,
                errors="backslashreplace",
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


def _command(reader: Reader, step: int, folder: Path, script: Sequence[str]) -> list[str]:
    """Return the arguments for Python that train up to this step."""
    header, path = reader.header, reader.path
    numerics = header.get("numerics")
    traced = ["--numerics", str(numerics), "--trace", str(folder / "trace")]
    if numerics not in (None, "exact", "native"):
        raise ReproError(f"cannot run {path} again: it has numerics that do not exist")
    if "recipe" in header:
        try:
            recipe = msgspec.convert(header["recipe"], Recipe)
        except (msgspec.ValidationError, ValueError) as error:
            raise ReproError(
                f"cannot run {path} again: its recipe is not valid ({error})"
            ) from None
        file = folder / f"{recipe.name}.toml"
        file.write_text(recipe_toml(recipe), encoding="utf-8")
        return ["-m", "reproml", "train", "--recipe", str(file), "--steps", str(step), *traced]
    if not script:
        raise ReproError(
            f"cannot run {path} again: it is not a trace of a recipe; name the script that made it, "
            "with its arguments: --script 'SCRIPT.py ARGS'"
        )
    if numerics is None:  # the script calls reproml.trace itself
        return list(script)
    return ["-m", "reproml", "run", *traced, *script]


def _variables(header: dict[str, Any]) -> dict[str, str]:
    """Return the variables of VARIABLES with which the trace was made."""
    environment = header.get("environment")
    groups: dict[str, Any] = environment if isinstance(environment, dict) else {}
    torch, variables = (
        group if isinstance(group, dict) else {}
        for group in (groups.get("torch"), groups.get("variables"))
    )
    found = {
        "OMP_NUM_THREADS": str(torch.get("threads")),
        "ATEN_CPU_CAPABILITY": _CAPABILITIES.get(str(torch.get("capability")), ""),
        **variables,
    }
    if not found["OMP_NUM_THREADS"].isdecimal():
        del found["OMP_NUM_THREADS"]
    return {
        name: value
        for name, value in found.items()
        if name in VARIABLES and isinstance(value, str) and value and _VALUE.fullmatch(value)
    }
