"""Run a recipe or a script in fresh processes under every setting of this CPU that changes native results.

Native PyTorch produces different hashes under many of them; exact arithmetic produces one hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Optional

from reproml.errors import ReproError


@dataclass(frozen=True)
class Setting:
    """Environment variables for one process, and what the machine needs for them to have an effect."""

    name: str
    variables: dict[str, str]
    capabilities: tuple[str, ...] = ()  # values of torch.backends.cpu.get_cpu_capability(); (): any
    mkl: bool = False
    workers: int = 0  # processes started by torchrun; 0: one process without torchrun
    device: str = "cpu"


def _workers(count: int) -> Setting:
    return Setting(f"{count} worker{'s' * (count > 1)}", {}, workers=count)


def _threads(count: int) -> Setting:
    variables = {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
    variables["MKL_DYNAMIC"] = "FALSE"  # otherwise MKL uses at most one thread a core
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


# TF32 rounds the operands of a product to 11 bits. PyTorch uses it for products of matrices only if asked.
_TF32 = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}


def _on_gpu(device: str) -> list[Setting]:
    return [Setting(device, {}, device=device), Setting(f"{device}, TF32", _TF32, device=device)]


@dataclass(frozen=True)
class Row:
    """The SHA-256 digests of the weights after training under one setting."""

    setting: str
    native: str
    exact: str


def offered(workers: Sequence[int] = (), device: str = "cpu") -> list[Setting]:
    """Return the settings that have an effect on this machine, and one for each number of workers, all on
    the CPU; with another device two more on that."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return [
        setting
        for setting in SETTINGS
        if capability in (setting.capabilities or (capability,))
        and (torch.backends.mkl.is_available() or not setting.mkl)
    ] + [*map(_workers, workers), *(_on_gpu(device) if device != "cpu" else [])]


def run_recipe(
    recipe: str,
    steps: int,
    data_folder: Optional[Path] = None,
    settings: Optional[list[Setting]] = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Train this number of steps under each setting, natively and exactly, and call `on_row` with each row.

    `recipe` is a name or path. Raises ReproError, which names the setting, if a training fails.
    """

    def train(setting: Setting, numerics: str) -> str:
        return _train(setting, recipe, steps, data_folder, numerics)

    return _rows(train, settings, on_row)


def run_script(
    command: str,
    settings: Optional[list[Setting]] = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Run a training script under each setting, as `run_recipe` does with a recipe.

    `command` is the script's path and its arguments, quoted as for a shell. A row holds the digest of
    what the script trained and saved; of several digests, the SHA-256 of their lines.
    Raises ReproError if the script fails or produces no digest.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ReproError(f"cannot read the script's command line {command!r}: {error}") from None

    def run(setting: Setting, numerics: str) -> str:
        return _run_script(setting, words, numerics)

    return _rows(run, settings, on_row)


def _rows(
    measure: Callable[[Setting, str], str],
    settings: Optional[list[Setting]],
    on_row: Callable[[Row], None],
) -> list[Row]:
    rows = []
    for setting in offered() if settings is None else settings:
        native, exact = (measure(setting, numerics) for numerics in ("native", "exact"))
        rows.append(Row(setting.name, native, exact))
        on_row(rows[-1])
    return rows


def _train(
    setting: Setting, recipe: str, steps: int, data_folder: Optional[Path], numerics: str
) -> str:
    """Return the digest of the weights that a fresh process trains."""
    arguments = ["train", "--json", "--recipe", recipe, "--steps", str(steps)]
    arguments += ["--numerics", numerics, "--device", setting.device]
    arguments += ["--data", str(data_folder)] if data_folder else []
    return str(json.loads(_reproml(setting, arguments, numerics))["weights.state_dict.sha256"])


def _run_script(setting: Setting, words: list[str], numerics: str) -> str:
    """Return one digest of everything that a script trains and saves in a fresh process."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "digest.json"
        _reproml(setting, ["run", "--numerics", numerics, "--digest", str(file), *words], numerics)
        result = json.loads(file.read_text())
    found = [o["parameters.sha256"] for o in result["optimizers"]]
    found += [s["state_dict.sha256"] for s in (*result["saved"], *result.get("variables", []))]
    if not found:
        raise ReproError(
            f"{words[0]} neither stepped an optimizer nor saved a state dict, and no global variable "
            "holds a model"
        )
    lines = "".join(f"{sha256}\n" for sha256 in found)
    return found[0] if len(found) == 1 else hashlib.sha256(lines.encode()).hexdigest()


def _reproml(setting: Setting, arguments: list[str], numerics: str) -> str:
    """Return the standard output of a fresh `python -m reproml` under the setting."""
    varied = {name for other in SETTINGS for name in other.variables} | set(_TF32)
    inherited = {name: value for name, value in os.environ.items() if name not in varied}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    launcher = [*torchrun, str(setting.workers)] if setting.workers else []
    child = subprocess.run(
        [sys.executable, *launcher, "-m", "reproml", *arguments],
        env={**inherited, **setting.variables},
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
    )
    if child.returncode == 0:
        return child.stdout
    lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
    messages = [line for line in lines if line.startswith("reproml: ")]  # torchrun adds its own
    reason = (messages or lines)[-1]
    raise ReproError(f"training with {setting.name} and {numerics} numerics failed: {reason}")
