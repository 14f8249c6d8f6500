"""Measure what a trace costs.

`python -m benchmarks.trace` trains mnist-mlp without a trace and at each level, in turn. It adds up the
CPU time of the training, from before the trace is opened until it is closed: the least time of each step
over all rounds, so that other work on the machine counts little.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

import reproml
from reproml.pipeline import recipe, run
from reproml.pipeline.preprocess import Prepared
from reproml.pipeline.recipe import Recipe
from reproml.pipeline.train import train

ROUNDS = 8


def pieces(
    mnist: Recipe, prepared: Prepared, numerics: str, level: Optional[str]
) -> NDArray[np.int64]:
    """Train once; return the CPU time of each step, of beginning and end, in nanoseconds."""
    with tempfile.TemporaryDirectory() as folder:
        marks = [time.process_time_ns()]
        traced: AbstractContextManager[Any] = nullcontext()
        if level:
            traced = reproml.trace(Path(folder) / "trace", level)
        with traced:
            train(
                mnist,
                prepared,
                numerics,
                after_step=lambda training: marks.append(time.process_time_ns()),
            )
        marks.append(time.process_time_ns())
    return np.diff(marks)


def main() -> None:
    mnist = recipe.load("mnist-mlp")
    _, prepared, _ = run.prepare(mnist, None, "exact")
    print(f"mnist-mlp, {torch.get_num_threads()} threads: CPU time of a step")
    for numerics in ("exact", "native"):
        least: dict[Optional[str], NDArray[np.int64]] = {}
        for _ in range(ROUNDS):
            for level in (None, "epoch", "step"):
                found = pieces(mnist, prepared, numerics, level)
                least[level] = np.minimum(found, least.get(level, found))
        for level, spent in least.items():
            more = 100 * (spent.sum() / least[None].sum() - 1)
            step = spent.sum() / (len(spent) - 1) / 1000
            print(f"{numerics:<7} {level or 'no trace':<9} {step:7.0f} µs {more:+6.1f} %")


if __name__ == "__main__":
    main()
