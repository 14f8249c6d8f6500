"""Measure what exact arithmetic costs: exact and native runs in turn, in one go of some minutes.

    python -m benchmarks.bench        # or: invoke bench

It prints three tables and writes every number to benchmarks/results/bench.json and the curves to bench.png.
Native is plain PyTorch on the same batches, with the same threads and the same warm-up.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Callable
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.optim.optimizer import register_optimizer_step_post_hook

import reproml
from benchmarks import sizes
from reproml import environment
from reproml.pipeline import data, preprocess, recipe, train

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

REPEATS = 5  # pairs of a native and an exact run
LIMIT = 60  # seconds after which a measurement begins no further pair

# Name: the steps that are timed.
RECIPES = {"mnist-mlp": 500, "mnist-mlp-bf16": 500, "mnist-cnn": 50, "digits-mlp": 250}
EXAMPLES = {"resnet_small": 50, "transformer": 50}

# One size of mnist-mlp grows, the others stay.
SIZES = {"batch size": 64, "width": 128, "threads": os.cpu_count() or 1, "steps": 50}
CURVES = {
    "batch size": [16, 64, 256, 1024],
    "width": [32, 64, 128, 256, 512, 1024],
    "threads": [1, 2],
    "steps": [10, 100, 1000],  # of one epoch: the data grow with them
}

Run = Callable[[str], object]  # trains for some steps, in "native" or "exact" numerics
Pairs = dict[str, list[float]]  # the same number of native and of exact values


def of_recipe(name: str) -> Run:
    """Return a function that trains the recipe on its own data."""
    chosen = recipe.load_recipe(name)
    prepared = preprocess.preprocess(data.load_dataset(chosen.data.name), chosen.preprocess)
    return partial(train.train, chosen, prepared, steps=RECIPES[name] + 1)


def of_example(name: str) -> Run:
    """Return a function that runs a script of examples/ unchanged."""

    def run(numerics: str) -> None:
        arguments = [name, "--steps", str(EXAMPLES[name] + 1)]
        mode = reproml.exact() if numerics == "exact" else nullcontext()
        with patch.object(sys, "argv", arguments), redirect_stdout(io.StringIO()), mode:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")

    return run


def of_size(size: str, value: int) -> Run:
    """Return a function that trains mnist-mlp on random images, with one of its sizes changed."""
    sizes = {**SIZES, size: value}
    torch.set_num_threads(sizes["threads"])
    chosen = msgspec.structs.replace(
        recipe.load_recipe("mnist-mlp"),
        model=recipe.MLP((sizes["width"],)),
        train=recipe.Train(epochs=1, batch_size=sizes["batch size"]),
    )
    random, steps = np.random.default_rng(1), sizes["steps"] + 1
    x = random.standard_normal((steps * sizes["batch size"], 28, 28), np.float32)
    arrays = preprocess.Arrays(x, random.integers(10, size=len(x)))
    return partial(train.train, chosen, preprocess.Prepared(arrays, arrays, 10))


def step_seconds(run: Run, numerics: str) -> float:
    """Return the seconds from the end of the first step to the end of the last."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    try:
        run(numerics)
    finally:
        hook.remove()
    return ends[-1] - ends[0]


def command(name: str, numerics: str) -> tuple[float, float]:
    """Return the seconds from the interpreter's start to the written run, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["-m", "reproml", "train", "--recipe", name, "--numerics", numerics]
        arguments += ["--out", f"{folder}/run"]
        start = time.perf_counter()
        child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"training {name} failed")
    return seconds, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def in_turn(measure: Callable[[str], Any], repeats: int = REPEATS) -> dict[str, list[Any]]:
    """Measure natively and exactly, in turn."""
    values: dict[str, list[Any]] = {"native": [], "exact": []}
    start = time.perf_counter()
    for _ in range(repeats):
        for numerics in values:
            values[numerics].append(measure(numerics))
        if time.perf_counter() - start > LIMIT:
            break
    return values


def steps(run: Run) -> Pairs:
    """Return the seconds of the training steps, after one run of each that does not count."""
    in_turn(run, repeats=1)
    return in_turn(partial(step_seconds, run))


def ratio(pairs: Pairs) -> float:
    """Return the ratio of the exact to the native time."""
    return median(e / n for n, e in zip(pairs["native"], pairs["exact"]))


def measure() -> dict[str, Any]:
    """Measure everything: commands, training steps, curves."""
    # The commands first: a child's peak memory counts what this process had when it started it.
    bar = partial(track, auto_refresh=False)  # no thread that draws while steps are timed
    commands = {name: in_turn(partial(command, name)) for name in bar(RECIPES, "train")}
    # The switches of --numerics native cost up to 4 %; plain PyTorch has them off.
    with patch.object(train, "_native", nullcontext):
        cases = {name: steps(of_recipe(name)) for name in bar(RECIPES, "recipes")}
        cases.update({name: steps(of_example(name)) for name in bar(EXAMPLES, "examples")})
        curves = {
            size: {value: steps(of_size(size, value)) for value in bar(values, size)}
            for size, values in CURVES.items()
        }
        real = {name: sizes.measure(name)._asdict() for name in bar(sizes.CASES, "real sizes")}
    return {"commands": commands, "steps": cases, "curves": curves, "sizes": real}


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    names = "steps;native s;exact s;exact / native;train native s;train exact s;native MB;exact MB"
    title = f"training steps, and `train` as a command: medians of {REPEATS} or less"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))  # not wider than a terminal
    table.add_column(no_wrap=True)
    for column in names.split(";"):
        table.add_column(column, justify="right")
    for name, pairs in results["steps"].items():
        cells = [str({**RECIPES, **EXAMPLES}[name])]
        cells += [f"{median(values):.3f}" for values in pairs.values()] + [f"{ratio(pairs):.2f}"]
        commands = results["commands"].get(name, {}).values()
        cells += [f"{median(seconds for seconds, _ in values):.1f}" for values in commands]
        cells += [f"{median(memory for _, memory in values):.0f}" for values in commands]
        table.add_row(name, *cells)
    Console().print(table)
    table = Table("of mnist-mlp", "exact / native", title="as one size grows", box=box.SIMPLE)
    for size, points in results["curves"].items():
        row = [f"{value}: {ratio(pairs):.2f}" for value, pairs in points.items()]
        table.add_row(size, "   ".join(row))
    Console().print(table)
    sizes.show({name: sizes.Result(**times) for name, times in results["sizes"].items()})


def plot(curves: dict[str, dict[int, Pairs]], path: Path) -> None:
    """Draw the ratio exact / native over each size."""
    from matplotlib.figure import Figure  # not before the commands: it takes memory

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (size, points) in zip(figure.subplots(1, len(curves), sharey=True), curves.items()):
        axes.plot([*points], [ratio(pairs) for pairs in points.values()], "o-")
        axes.set_xscale("log", base=10 if size == "steps" else 2)
        axes.set_xticks([*points], [str(value) for value in points])
        axes.set_xlabel(size)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("exact / native")
    figure.axes[0].set_ylim(bottom=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write."""
    results = {"environment": environment.describe(), **measure()}
    show(results)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["curves"], RESULTS / "bench.png")
    print(f"wrote {RESULTS / 'bench.json'} and bench.png")


if __name__ == "__main__":
    main()
