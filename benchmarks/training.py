"""Exact against native training, alternating in one run, and the whole of `train` as a command.

python benchmarks/training.py [RECIPE ...]       # default: mnist-mlp digits-mlp
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from reproml import data, preprocess, recipe, train
from reproml.arithmetic import kernels

REPEATS = 3


def training_seconds(name: str) -> tuple[list[float], list[float]]:
    """Seconds of each training, native and exact, in turn after one of each that does not count."""
    chosen = recipe.load(name)
    prepared = preprocess.preprocess(data.load(chosen.data.name), chosen.preprocess)
    seconds: dict[str, list[float]] = {"native": [], "exact": []}
    for repeat in range(REPEATS + 1):
        for numerics, times in seconds.items():
            start = time.perf_counter()
            train.train(chosen, prepared, numerics, steps=50 if repeat == 0 else None)
            if repeat:
                times.append(time.perf_counter() - start)
    return seconds["native"], seconds["exact"]


def command(name: str) -> tuple[float, float]:
    """Seconds from the interpreter's start to the written run, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "reproml", "train", "--recipe", name, "--out", f"{folder}/run"]
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"training {name} failed")
    return seconds, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main(names: list[str]) -> None:
    """Print one table."""
    title = (
        f"medians of {REPEATS} alternating runs, {'compiled' if kernels.library else 'no'} kernels"
    )
    table = Table(title=title)
    for column in ("recipe", "native s", "exact s", "exact / native", "whole train s", "peak MB"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for name in names:
        native, exact = training_seconds(name)
        ratio = median(e / n for e, n in zip(exact, native))
        seconds, memory = command(name)
        table.add_row(
            name,
            f"{median(native):.2f}",
            f"{median(exact):.2f}",
            f"{ratio:.2f}",
            f"{seconds:.1f}",
            f"{memory:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    os.chdir(Path(__file__).parent.parent)
    main(sys.argv[1:] or ["mnist-mlp", "digits-mlp"])
