"""Kills a random worker at a random time, resumes with another number of workers, and checks the weights.

python -m verification.worker_kills [RUNS]
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from reproml.pipeline import golden

RECIPE = "digits-mlp"


def attempt(out: Path, workers: int, seconds: float) -> bool:
    """Resume from the newest checkpoint; return whether the run finished before the kill."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    arguments = ["train", "--recipe", RECIPE, "--resume", str(out), "--checkpoint-every", "10"]
    child = subprocess.Popen(
        [sys.executable, *torchrun, "-m", "reproml", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        started = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        if started:
            os.kill(int(random.choice(started)), 9)
    return child.wait() == 0


def main(runs: int) -> None:
    """Finish this many runs, print a line for each; exit with 1 if the weights of one are not golden."""
    expected = golden.read(golden.find(RECIPE))["weights.safetensors.sha256"]
    random.seed(1)
    kills, good = 0, 0
    for number in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            out, used, finished = Path(folder) / "run", [], False
            while not finished:
                used.append(random.randint(1, 4))
                finished = attempt(out, used[-1], random.uniform(3, 12) if len(used) < 3 else 600)
                kills += not finished
            found = json.loads((out / "metrics.json").read_text())["weights.safetensors.sha256"]
        good += found == expected
        print(number, "workers", used, "golden" if found == expected else found, flush=True)
    print(f"{kills} kills, {good} of {runs} runs golden")
    sys.exit(int(good != runs))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
