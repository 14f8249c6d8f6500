"""Kill a training at random moments, resume it, and compare each ending with the golden file.

    python -m verification.kills [--kills 200] [--recipe digits-mlp] [--every 10] [--seed 0]

Each training is killed (SIGKILL) at least once. Half of them are killed at a random moment from start to
end: while reading, training, saving checkpoints, writing the results or deleting the checkpoints. The
others are killed at a random one of the calls that change a folder, or in the middle of a write. The same
command resumes the training, and is killed again with probability one half each time. The exit status is
1 if an ending differs from the golden file.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from reproml.digest import file_sha256
from reproml.pipeline import golden
from reproml.pipeline.run import Items, read_items
from verification.subprocesses import Reproml

CALLS = 190  # approximate number of such calls in a complete training of digits-mlp
SHA256 = "weights.safetensors.sha256"


def stage(folder: Path) -> str:
    """Return what the killed process was doing, judging by the files it left."""
    names = {path.name for path in folder.rglob("*")}
    if "weights.safetensors" in names:
        return "results begun"
    if any(name.startswith(".step-") for name in names):
        return "within a checkpoint"
    return "some checkpoints" if any(n.startswith("step-") for n in names) else "no checkpoint"


def is_golden(run: Path, expected: Items) -> bool:
    """Return whether all items and the weights file itself are those of the golden file."""
    weights = file_sha256(run / "weights.safetensors")
    return read_items(run / "metrics.json") == expected and weights == expected[SHA256]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of trainings to kill")
    parser.add_argument("--recipe", default="digits-mlp")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = f"runs/{args.recipe}"
    train = ["train", "--recipe", args.recipe, "--checkpoint-every", str(args.every)]
    chance, expected = random.Random(args.seed), read_items(golden.find_golden(args.recipe))
    stages: Counter[str] = Counter()
    good = endings = 0
    duration = 0.0
    with Reproml() as reproml:
        while endings < args.kills:
            with tempfile.TemporaryDirectory() as name:
                folder, kills = Path(name), 0
                while duration and (kills == 0 or chance.random() < 0.5):
                    moment: dict[str, Any] = {"seconds": chance.uniform(0.001, duration)}
                    if endings % 2:
                        moment = {"call": chance.randint(1, CALLS)}
                    status = reproml(folder, *train, "--resume", out, **moment).returncode
                    if status != -9:
                        break
                    kills += 1
                    stages[stage(folder)] += 1
                began = time.monotonic()
                shown = reproml(folder, *train, "--resume", out)
                if not kills:  # the first, which measures the duration; or it ended before the kill
                    duration = duration or time.monotonic() - began
                    continue
                endings += 1
                good += shown.returncode == 0 and is_golden(folder / out, expected)
                total = sum(stages.values())
                print(
                    f"{good} of {endings} endings golden, {total} kills: {dict(stages)}", flush=True
                )
    return int(good != endings)


if __name__ == "__main__":
    sys.exit(main())
