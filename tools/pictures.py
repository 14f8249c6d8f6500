"""Draw the pictures of the documents.

    python tools/pictures.py        # writes docs/pictures/*.svg

The numbers in them are measured or read here: the shares of the ladder on 67 million random numbers, the
hashes from a golden file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable
from unittest.mock import patch

import matplotlib
import matplotlib.pyplot as plt
import torch

import reproml
from reproml.arithmetic.compiler import evaluate, kernels

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
BLUE, RED, GREY = "#2b6cb0", "#c53030", "#718096"

# Text stays text, and the same input gives the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "reproml", "font.size": 10})


def rounding_test() -> Any:
    """Draw two intervals on a number line: one between two midpoints, and one that contains a midpoint."""
    figure, axes = plt.subplots(figsize=(8, 2.6))
    axes.axhline(0, color="black", linewidth=1)
    for x in (0.0, 1.0, 2.0, 3.0):
        axes.plot([x, x], [-0.12, 0.12], color="black", linewidth=2)
        axes.text(x, -0.35, "float32 number", ha="center", fontsize=8)
    for x in (0.5, 1.5, 2.5):
        axes.plot([x, x], [-0.08, 0.08], color=GREY, linewidth=1, linestyle="--")
        axes.text(x, -0.3, "midpoint", ha="center", color=GREY, fontsize=8)
    cases = [
        (0.2, 0.16, BLUE, "both ends round to the same number:\nthe test passes"),
        (2.42, 0.16, RED, "the ends round to different numbers:\nthe test fails"),
    ]
    for middle, radius, colour, text in cases:
        axes.plot([middle - radius, middle + radius], [0, 0], color=colour, linewidth=6, alpha=0.5)
        axes.plot([middle], [0], "o", color=colour)
        axes.text(middle, 0.22, text, ha="center", color=colour)
        axes.text(middle - radius, 0.1, "m − e", ha="right", color=colour, fontsize=8)
        axes.text(middle + radius, 0.1, "m + e", ha="left", color=colour, fontsize=8)
    axes.set(xlim=(-0.4, 3.4), ylim=(-0.5, 0.7))
    axes.axis("off")
    return figure


def shares(count: int = 1 << 26) -> dict[str, int]:
    """Return how many of `count` normally distributed numbers reach each path, for gelu."""
    failed = {"fast": 0, "compiled": 0, "exact": 0}

    def counted(path: str, kernel: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            found = kernel(*arguments)
            failed[path] += found
            return found

        return call

    def exact_values(*arguments: Any) -> Any:
        failed["exact"] += 1
        return original(*arguments)

    original, library = evaluate.exact_values, kernels.library
    fast = counted("fast", library.reproml_fast)
    compiled = counted("compiled", library.reproml_program)
    x = torch.randn(count, generator=torch.Generator().manual_seed(1))
    with patch.object(library, "reproml_fast", fast):
        with patch.object(library, "reproml_program", compiled):
            with patch.object(evaluate, "exact_values", exact_values), reproml.exact():
                torch.nn.functional.gelu(x)
    return {
        "fast path: a loop of its own in C": count,
        "compiled path: the recorded formula": failed["fast"],
        "exact path: fractions, mpmath": failed["exact"],
    }


def ladder() -> Any:
    """Draw a bar for each path, on a logarithmic scale, with the number of elements that reach it."""
    found = shares()
    figure, axes = plt.subplots(figsize=(8, 2.2))
    total = max(found.values())
    for y, count in enumerate(found.values()):
        axes.barh(-y, max(count, 0.5), color=BLUE, height=0.6)
        text = f" {count:,}" if count == total else f" {count:,} of {total:,}"
        axes.text(max(count, 0.5), -y, text, va="center")
    axes.set_yticks([-y for y in range(len(found))], list(found))
    axes.set(xscale="log", xlim=(0.5, total * 300))
    figure.suptitle("gelu of normally distributed numbers: elements that reach each path")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def pipeline() -> Any:
    """Draw the steps of a recipe, with the SHA-256 that the golden file records after each."""
    golden = json.loads((ROOT / "golden" / "digits-mlp.json").read_text("utf-8"))
    data = next(value for name, value in golden.items() if name.startswith("data."))
    steps = [
        ("recipe", golden["recipe.canonical_json.sha256"]),
        ("data", data),
        ("arrays", golden["preprocessed.arrays.sha256"]),
        ("weights", golden["weights.safetensors.sha256"]),
        ("predictions", golden["test.predictions.int64le.sha256"]),
    ]
    figure, axes = plt.subplots(figsize=(9, 2.2))
    box = {"boxstyle": "round,pad=0.5", "facecolor": "#ebf4ff", "edgecolor": BLUE}
    for x, (name, sha256) in enumerate(steps):
        axes.text(x, 0.5, name, ha="center", va="center", bbox=box)
        axes.text(x, 0.05, f"SHA-256\n{sha256[:8]}…", ha="center", va="center", color=GREY)
        axes.annotate("", (x, -0.35), (x, -0.12), arrowprops={"arrowstyle": "->", "color": GREY})
        if x:
            axes.annotate("", (x - 0.3, 0.5), (x - 0.7, 0.5), arrowprops={"arrowstyle": "->"})
    middle = (len(steps) - 1) / 2
    axes.text(
        middle, -0.5, f"golden/digits-mlp.json: {len(golden)} items", ha="center", va="center"
    )
    axes.set(xlim=(-0.5, len(steps) - 0.5), ylim=(-0.65, 0.85))
    axes.axis("off")
    return figure


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    for draw in (rounding_test, ladder, pipeline):
        path = PICTURES / f"{draw.__name__}.svg"
        draw().savefig(path, metadata={"Date": None})
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
