"""Measure what exact arithmetic costs each example: exact and native runs in turn.

python benchmarks/examples.py [STEPS]
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import reproml

REPEATS = 3


def seconds(script: Path, steps: int, numerics: AbstractContextManager[Any]) -> float:
    """Return the seconds that the script takes in this process."""
    sys.argv = [str(script), "--steps", str(steps)]
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), numerics:
        runpy.run_path(str(script), run_name="__main__")
    return time.perf_counter() - start


def main(steps: int) -> None:
    """Print one table."""
    title = f"{steps} steps, evaluation included, medians of {REPEATS} alternating runs"
    table = Table("example", "native s", "exact s", "exact / native", title=title)
    for script in sorted((Path(__file__).parent.parent / "examples").glob("*.py")):
        native, exact = [], []
        for repeat in range(REPEATS + 1):
            pair = (
                seconds(script, steps, contextlib.nullcontext()),
                seconds(script, steps, reproml.exact()),
            )
            if repeat:  # the first is for what is loaded and cached
                native.append(pair[0])
                exact.append(pair[1])
        ratio = median(e / n for e, n in zip(exact, native))
        table.add_row(script.stem, f"{median(native):.2f}", f"{median(exact):.2f}", f"{ratio:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
