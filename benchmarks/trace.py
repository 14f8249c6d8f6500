"""What a trace costs: `python -m benchmarks.trace` trains mnist-mlp without one and at each level, in turn.

The least CPU time of many short trainings each, so that other work on the machine counts little.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Optional

import torch

import reproml
from reproml import recipe, run
from reproml.train import train

STEPS, ROUNDS = 938, 6  # an epoch


def main() -> None:
    mnist = recipe.load("mnist-mlp")
    _, prepared, _ = run.prepare(mnist, None, "exact")
    print(f"mnist-mlp, {STEPS} steps, {torch.get_num_threads()} threads: CPU time of a step")
    for numerics in ("exact", "native"):
        best: dict[Optional[str], float] = {}
        for _ in range(ROUNDS):
            for level in (None, "epoch", "step"):
                with tempfile.TemporaryDirectory() as folder:
                    traced: AbstractContextManager[Any] = nullcontext()
                    if level:
                        traced = reproml.trace(Path(folder) / "trace", level)
                    start = time.process_time()
                    with traced:
                        train(mnist, prepared, numerics, STEPS)
                    spent = time.process_time() - start
                best[level] = min(spent, best.get(level, spent))
        for level, spent in best.items():
            more = 100 * (spent / best[None] - 1)
            print(
                f"{numerics:<7} {level or 'no trace':<9} {1e6 * spent / STEPS:7.0f} µs {more:+6.1f} %"
            )


if __name__ == "__main__":
    main()
