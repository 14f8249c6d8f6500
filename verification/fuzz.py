"""Damage the files and command lines that reproml reads; the worst allowed outcome is an error message.

    python -m verification.fuzz [--minutes 60] [--seed 0]

In a folder with recipes, golden files, runs, checkpoints, traces, weights and a data set in MNIST's format,
one or several files are altered (mutants.py), and a verb is called in another process (sandbox.py). Allowed
are exit status 0, 1, and 2 with one sentence on standard error. Forbidden, and printed with the seed that
reproduces it, are

- a traceback, a crash, another exit status, no end;
- a control character in the output, JSON that is not JSON, markup from a file in a page;
- a program that is executed, code from a file, and a write outside the folders that the verb may write.

A training is limited, because a recipe may ask for any: "a long training" in the statistics. MNIST's files
never get the right hashes, because nothing decodes them before their hash has been checked.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import reproml
from reproml.pipeline import data
from reproml.pipeline.checkpoint import Checkpoints
from verification import mutants
from verification.mutants import CODE, MARKUP
from verification.sandbox import Outcome, Worker, call

RECIPE = """
name = "fuzzed"
seed = 1
[data]
name = "{data}"
[preprocess]
kind = "standardize"
[model]
kind = "mlp"
hidden = [4]
[train]
epochs = 2
batch_size = {batch_size}
[optimizer]
kind = "adamw"
learning_rate = 0.001
"""
ODD = "runs/new\nline\x1b[77m"  # a run folder whose name a terminal must not receive
NATIVE = "train --numerics native"
DIGITS = "--recipe ./digits.toml"
# Each command, then after the bar the files that it reads. ODD is a word of its own.
COMMANDS = """
data --recipe mnist.toml --data mnist | mnist.toml mnist/*
data DIGITS | digits.toml
NATIVE --recipe mnist.toml --data mnist --steps 1 | mnist.toml mnist/*
NATIVE DIGITS --steps 1 | digits.toml
NATIVE DIGITS --steps 1 --trace one.trace | digits.toml one.trace
NATIVE DIGITS --out runs/fuzzed | digits.toml runs/fuzzed/*
NATIVE --resume runs/begun | runs/begun.checkpoints/*
NATIVE --resume runs/begun --checkpoint-every 2 --json | runs/begun.checkpoints/*
NATIVE --resume runs/begun DIGITS | digits.toml runs/begun.checkpoints/*
NATIVE --resume runs/traced --trace begun.trace | begun.trace runs/traced.checkpoints/*
train --resume runs/fuzzed | runs/fuzzed/*
train --resume ODD | runs/new*/*
evaluate --run runs/fuzzed | runs/fuzzed/*
evaluate DIGITS --run runs/fuzzed --json | digits.toml runs/fuzzed/*
verify DIGITS | digits.toml golden/*
verify --run runs/fuzzed | runs/fuzzed/* golden/*
verify DIGITS --run runs/fuzzed --json | digits.toml runs/fuzzed/* golden/*
verify --run ODD | runs/new*/* golden/*
pipeline DIGITS --json | digits.toml golden/*
golden DIGITS --force | digits.toml golden/*
matrix DIGITS | digits.toml
doctor --run runs/fuzzed | runs/fuzzed/run.json
diff one.trace two.trace | *.trace
diff two.trace one.trace --json | *.trace
diff one.trace three.trace | *.trace
diff three.trace one.trace --rerun | three.trace one.trace
diff one.trace one.again --rerun --json | one.trace one.again
diff runs/fuzzed runs/other | runs/fuzzed/* runs/other/*
diff ODD runs/other --json | runs/new*/* runs/other/*
diff runs/fuzzed/weights.safetensors runs/other/weights.safetensors | runs/*/weights.safetensors
diff odd.safetensors odd.again.safetensors --json | odd*
diff golden/fuzzed.json runs/fuzzed/metrics.json | golden/* runs/fuzzed/metrics.json
diff golden/fuzzed.json runs/other/metrics.json --json | golden/* runs/other/metrics.json
golden --list | golden/*
reproduced runs/fuzzed runs/other --same-builder | runs/fuzzed/* runs/other/*
report --run runs/other | runs/other/* golden/*
report DIGITS --run runs/fuzzed | digits.toml runs/fuzzed/* golden/*
report --run runs/fuzzed --diff runs/other | runs/fuzzed/* runs/other/* golden/*
report --run runs/other --diff one.trace --json | runs/other/* one.trace golden/*
report --run ODD --diff runs/other | runs/new*/* runs/other/* golden/*
""".replace("NATIVE", NATIVE).replace("DIGITS", DIGITS)
WRITES = {"train": ("runs", "one.trace", "begun.trace"), "pipeline": ("runs",)}
WRITES |= {
    "golden": ("golden",),
    "report": ("runs",),
    "reproduced": ("runs",),
}  # all other verbs write nothing
# fmt: off
WORDS = [
    "", "-1", "0", "1", "9" * 20, "nan", "é", "/", "..", "../..", "/dev/null", "runs", "runs/fuzzed",
    "mnist", "digits.toml", "--json", "--run", "--resume", "--steps", "--", "\x1b[77m\r", "\udcff", "\n",
    "\u202e", "--script", "--version", "x" * 300, *CODE[:3],
]
# fmt: on
KEPT: list[str] = []  # temporary files of this process


# --- files --------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """Write a complete set of valid files into the working directory."""
    torch.set_num_threads(1)  # no threads, so that forking is safe
    (folder / "digits.toml").write_text(RECIPE.format(data="digits", batch_size=500))
    (folder / "mnist.toml").write_text(RECIPE.format(data="mnist", batch_size=5))
    (folder / "mnist").mkdir()
    chance = np.random.default_rng(0)
    for name in data.MNIST:
        shape = (10, 28, 28) if "images" in name else (10,)
        content = chance.integers(0, 256 if "images" in name else 10, shape, np.uint8).tobytes()
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (folder / "mnist" / name).write_bytes(gzip.compress(header + content, mtime=0))

    def succeed(command: str) -> None:
        outcome = call(command.split())
        assert outcome.status == 0, outcome

    succeed(f"golden {DIGITS}")
    succeed(f"train {DIGITS}")
    delete = Checkpoints.delete
    Checkpoints.delete = lambda self: None  # type: ignore[method-assign]
    for out, more in (("begun", ""), ("traced", "--trace begun.trace")):
        succeed(f"{NATIVE} {DIGITS} --out runs/{out} --checkpoint-every 2 {more}")
        shutil.rmtree(folder / "runs" / out)
    Checkpoints.delete = delete  # type: ignore[method-assign]
    for name, level in (("one.trace", "step"), ("two.trace", "op")):
        with reproml.trace(name, level):
            succeed(f"{NATIVE} {DIGITS} --steps 2")
    succeed(f"{NATIVE} {DIGITS} --out runs/other --trace three.trace")
    shutil.copy("one.trace", "runs/other/trace.jsonl")
    (folder / "one.again").write_bytes(
        mutants.forge((folder / "one.trace").read_bytes(), _other_loss)
    )
    shutil.copytree("runs/fuzzed", ODD)
    shutil.copy("runs/other/trace.jsonl", ODD)
    dtypes = "float64 float16 bfloat16 int64 uint8 bool complex64 float8_e4m3fn".split()
    tensors = {f"{d}\n": torch.arange(6).reshape(2, 3).to(getattr(torch, d)) for d in dtypes}
    for name in ("odd.safetensors", "odd.again.safetensors"):
        safetensors.torch.save_file(tensors, name, {"note": name})


def warm_up(good: Path, work: Path) -> None:
    """Call each command once, so that a forked process has nothing left to import."""
    for line in COMMANDS.strip().splitlines():
        shutil.copytree(good, work)
        os.chdir(work)
        words, _ = parsed(line)
        if words[0] not in ("matrix", "doctor"):  # which take seconds
            call([word for word in words if word != "--rerun"])
        os.chdir(good)
        shutil.rmtree(work)
    gc.freeze()  # so that the processes share the memory


def _other_loss(lines: list[Any]) -> None:
    next(line for line in lines if line.get("entry") == "step")["loss"][0] = "1.5"


# --- commands -----------------------------------------------------------------------------------------


def parsed(line: str) -> tuple[list[str], list[str]]:
    """Return the words of a line of COMMANDS, and the patterns of the files that it reads."""
    words, patterns = line.split(" | ")
    return [ODD if word == "ODD" else word for word in words.split()], patterns.split()


def faults(command: list[str], outcome: Outcome) -> list[str]:
    """Return what is forbidden in the outcome of a command and in the files that it wrote."""
    found, status = list(outcome.forbidden), outcome.status
    messages = [line for line in outcome.errors.splitlines() if line.startswith("reproml: ")]
    one = len(messages) == 1 or outcome.errors.startswith("usage: ")
    if status not in (0, 1, "a long training") and not (status == 2 and one):
        found.append(f"status {status:.2000}" if isinstance(status, str) else f"status {status}")
    shown = re.sub(r"\x1b\[(?!77)[0-9;?]*[A-Za-z]|\r", "", outcome.output)  # of rich's table
    if not all(c.isprintable() or c == "\n" for c in (shown + outcome.errors)):
        found.append(f"a control character: {shown + outcome.errors!r:.500}")
    if "--json" in command and status in (0, 1):
        try:
            json.loads(outcome.output, parse_constant=lambda name: float(f"{name} in JSON"))
        except ValueError as error:
            found.append(f"not JSON: {error}")
    pages = [path.read_text() for path in Path("runs").rglob("*.html") if path.is_file()]
    found += [f"{markup} in a page" for markup in MARKUP for page in pages if markup in page]
    found += ["executed: CANARY"] * bool(list(Path().rglob("CANARY")))
    left = sorted({*os.listdir(tempfile.gettempdir())} - {*KEPT})
    return found + [f"left {name} in the folder of temporary files" for name in left]


def try_mutant(seed: int, worker: Worker, counts: Counter[str]) -> list[str]:
    """Make one mutant and call a verb; return what is forbidden in the outcome."""
    chance = random.Random(seed)
    command, patterns = parsed(chance.choice(COMMANDS.strip().splitlines()))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        paths = {p for pattern in patterns for p in Path().glob(pattern) if p.is_file()}
        if not paths:
            break  # the only one has become something else
        path = chance.choice(sorted(paths))
        counts[f"{mutants.alter_file(path, chance)} > {command[0]}"] += 1
    writable: tuple[str, ...] = (*WRITES.get(command[0], ()), "../tmp")
    if chance.random() < 0.15:
        at = chance.randrange(1, len(command) + 1)
        command[at : at + chance.randrange(2)] = [chance.choice(WORDS)]
        writable = ("../..",)  # as the words say
    outcome = worker.run(command, writable, seed)
    found = faults(command, outcome)
    counts[f"status {str(outcome.status).splitlines()[0]}"] += 1
    if found:
        print(
            f"seed {seed}: {' '.join(command)!r}",
            *found,
            outcome.errors[-500:],
            sep="\n",
            flush=True,
        )
    return found


def clean(folder: Path, before: set[Path]) -> None:
    """Delete everything in a folder that was not there before."""
    for path in sorted({*folder.rglob("*")} - before, reverse=True):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first mutant; each further one adds 1"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    bad, seed, end = 0, args.seed, time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as name:
        good, work = Path(name) / "good", Path(name) / "a/b/work"
        good.mkdir()
        (work.parent / "tmp").mkdir(parents=True)
        os.environ.update(REPROML_MIRROR="mnist", TMPDIR=str(work.parent / "tmp"))  # no downloads
        tempfile.tempdir = None  # so that TMPDIR is read
        os.chdir(good)
        prepare(good)
        warm_up(good, work)
        KEPT.extend(os.listdir(tempfile.gettempdir()))
        before = {*Path(name).rglob("*")}
        worker = Worker(work)
        try:
            while time.monotonic() < end or seed == args.seed:
                os.chdir("/")
                shutil.copytree(good, work)
                os.chdir(work)
                found = try_mutant(seed, worker, counts)
                bad += bool(found)
                seed += 1
                if found or seed % 500 == 0:
                    worker.end()
                    worker = Worker(work)
                if seed % 1000 == 0:
                    print(f"{seed - args.seed} mutants, {bad} with a forbidden outcome", flush=True)
                clean(Path(name), before)
        finally:
            os.chdir("/")
            worker.end()
    for count in sorted(counts):
        print(f"{count:<32} {counts[count]}")
    print(f"{seed - args.seed} mutants in {args.minutes} minutes, {bad} with a forbidden outcome")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
