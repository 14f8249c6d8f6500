"""Kill a random worker at a random time and go on with another number of them: golden weights each time.

python -m verification.worker_kills [ENDINGS]
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
    """Train on from the newest checkpoint; whether the run was finished before the kill."""
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


def main(endings: int) -> None:
    """Print a line for each ending; exit with 1 if one is not golden."""
    expected = golden.read_golden(golden.find_golden(RECIPE))["weights.safetensors.sha256"]
    random.seed(1)
    kills, good = 0, 0
    for ending in range(1, endings + 1):
        with tempfile.TemporaryDirectory() as folder:
            out, used, finished = Path(folder) / "run", [], False
            while not finished:
                used.append(random.randint(1, 4))
                finished = attempt(out, used[-1], random.uniform(3, 12) if len(used) < 3 else 600)
                kills += not finished
            found = json.loads((out / "metrics.json").read_text())["weights.safetensors.sha256"]
        good += found == expected
        print(ending, "workers", used, "golden" if found == expected else found, flush=True)
    print(f"{kills} kills, {good} of {endings} endings golden")
    sys.exit(int(good != endings))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
