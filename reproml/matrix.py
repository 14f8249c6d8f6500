"""Run a recipe in fresh processes under every setting of this CPU that changes native results.

Native PyTorch comes to another hash for many of them; exact arithmetic has one for all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from reproml.errors import ReproError


@dataclass(frozen=True)
class Setting:
    """Environment variables for one process, and what this machine must offer for them."""

    name: str
    variables: dict[str, str]
    capabilities: tuple[str, ...] = ()  # of torch.backends.cpu.get_cpu_capability(); (): any
    mkl: bool = False


def _threads(count: int) -> Setting:
    variables = {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
    variables["MKL_DYNAMIC"] = "FALSE"  # else PyTorch gets no more threads than the CPU has cores
    return Setting(f"{count} thread{'s' * (count > 1)}", variables)


def _variable(name: str, value: str, *capabilities: str, mkl: bool = False) -> Setting:
    return Setting(f"{name}={value}", {name: value}, capabilities, mkl)


SETTINGS = [
    _variable("ATEN_CPU_CAPABILITY", "default"),
    _variable("ATEN_CPU_CAPABILITY", "avx2", "AVX2", "AVX512"),
    _variable("ATEN_CPU_CAPABILITY", "avx512", "AVX512"),
    _threads(1),
    _threads(2),
    _threads(7),
    _variable("MKL_CBWR", "COMPATIBLE", mkl=True),
    _variable("MKL_ENABLE_INSTRUCTIONS", "SSE4_2", mkl=True),
    _variable("MKL_ENABLE_INSTRUCTIONS", "AVX2", mkl=True),
]


@dataclass(frozen=True)
class Row:
    """The digests of the weights, a SHA-256 each, that one setting ends with."""

    setting: str
    native: str
    exact: str


def offered() -> list[Setting]:
    """Return the settings that make a difference to this CPU and this build of PyTorch."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return [
        setting
        for setting in SETTINGS
        if capability in (setting.capabilities or (capability,))
        and (torch.backends.mkl.is_available() or not setting.mkl)
    ]


def run(
    recipe: str,
    steps: int,
    data_folder: Optional[Path] = None,
    settings: Optional[list[Setting]] = None,
    each: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Train so many steps under each setting, natively and exactly; `each` gets each row at once.

    `recipe` is a name or path. Raises ReproError if a training fails, naming the setting.
    """
    rows = []
    for setting in offered() if settings is None else settings:
        native, exact = (
            _train(setting, recipe, steps, data_folder, numerics)
            for numerics in ("native", "exact")
        )
        rows.append(Row(setting.name, native, exact))
        each(rows[-1])
    return rows


def _train(
    setting: Setting, recipe: str, steps: int, data_folder: Optional[Path], numerics: str
) -> str:
    """Return the digest of the weights that a fresh process ends with."""
    varied = {name for other in SETTINGS for name in other.variables}
    variables = {name: value for name, value in os.environ.items() if name not in varied}
    command = [sys.executable, "-m", "reproml", "train", "--json", "--recipe", recipe]
    command += ["--steps", str(steps), "--numerics", numerics]
    command += ["--data", str(data_folder)] if data_folder else []
    child = subprocess.run(
        command, env={**variables, **setting.variables}, capture_output=True, text=True, check=False
    )
    if child.returncode == 0:
        return str(json.loads(child.stdout)["weights.state_dict.sha256"])
    last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
    raise ReproError(f"training with {setting.name} and {numerics} numerics failed: {last}")
