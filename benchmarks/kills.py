"""Kill a training at random moments, resume it, and compare each ending with the golden file.

    python -m benchmarks.kills [--kills 200] [--recipe digits-mlp] [--every 10] [--seed 0]

Each training is killed (SIGKILL) at least once: every other time at any moment from the start of its
process, else from the moment when it says that it trains, so that checkpoints and results are being
written. Then it is started again with the same command, and every other such training is killed again.
Exit status 1 if an ending is not the golden one.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Optional

from reproml import golden
from reproml.digest import file_sha256
from reproml.run import Items, read_items

SHA256 = "weights.safetensors.sha256"
NOTED = "exact numerics"  # a training says so when it begins


def command(recipe: str, every: int) -> list[str]:
    verb = [sys.executable, "-m", "reproml", "train", "--recipe", recipe]
    return [*verb, "--checkpoint-every", str(every), "--resume", f"runs/{recipe}"]


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
    )


def first_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while NOTED not in process.stdout.readline() and process.poll() is None:
        pass


def life(arguments: list[str]) -> tuple[float, float]:
    """Return the seconds until a whole training says that it trains, and from there to its end."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = start(arguments, Path(folder))
        first_line(process)
        trains = time.monotonic()
        process.communicate()
        return trains - began, time.monotonic() - trains


def killed(arguments: list[str], folder: Path, wait: float, from_training: bool) -> Optional[str]:
    """Kill it; return what it was doing, as far as its folder shows, None if it had ended."""
    process = start(arguments, folder)
    if from_training:
        first_line(process)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.kill()
    process.communicate()
    return stage(folder) if process.returncode == -9 else None


def stage(folder: Path) -> str:
    names = {path.name for path in folder.rglob("*")}
    if "weights.safetensors" in names:
        return "writing the results, or later"
    if any(name.startswith(".step-") for name in names):
        return "writing a checkpoint"
    if any(name.startswith("step-") for name in names):
        return "after a checkpoint"
    return "before the first checkpoint"


def is_golden(run: Path, expected: Items) -> bool:
    weights = file_sha256(run / "weights.safetensors")
    return read_items(run / "metrics.json") == expected and expected[SHA256] == weights


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many trainings are killed")
    parser.add_argument("--recipe", default="digits-mlp")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    arguments = command(args.recipe, args.every)
    expected = read_items(golden.find(args.recipe))
    before, training = life(arguments)
    stages: dict[str, int] = {}
    good = endings = 0
    while endings < args.kills:
        with tempfile.TemporaryDirectory() as name:
            folder, kills = Path(name), 0
            while kills == 0 or chance.random() < 0.5:
                whole = endings % 2 == 0
                wait = chance.uniform(0, before + training if whole else training)
                at = killed(arguments, folder, wait, not whole)
                if at is None:
                    break
                kills += 1
                stages[at] = stages.get(at, 0) + 1
            if kills == 0:  # it was quicker than the first one
                continue
            start(arguments, folder).communicate()
            found = read_items(folder / "runs" / args.recipe / "metrics.json")
            endings += 1
            good += found == expected and os.listdir(folder / "runs") == [args.recipe]
            print(
                f"{good} of {endings} golden endings after {sum(stages.values())} kills: {stages}"
            )
    return int(good != endings)


if __name__ == "__main__":
    sys.exit(main())
