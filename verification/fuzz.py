"""Damage the files and command lines that reproml reads; the worst allowed outcome is an error message.

    python -m verification.fuzz [--minutes 60] [--seed 0]

In a folder with a recipe, its golden file, runs, checkpoints, traces and a data set in MNIST's format, one
or several files are altered, and a verb is called in this process. Allowed are exit status 0, 1, and
2 with one sentence on standard error, and no control character is printed. Any other outcome is printed
with the seed that reproduces it. Half of the damaged checkpoints and traces get the right hashes, so that
the code after the check is reached as well.
MNIST's files never do, because nothing decodes them before their hash has been checked.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Optional

import numpy as np

import reproml
from reproml import cli
from reproml.pipeline import data
from reproml.pipeline.checkpoint import Checkpoints
from reproml.tracing import chain

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
TRAIN = ["train", "--numerics", "native"]
RESUME = [*TRAIN, "--resume", "runs/begun"]
COMMANDS = [
    ["data", "--recipe", "mnist.toml", "--data", "mnist"],
    [*TRAIN, "--recipe", "mnist.toml", "--data", "mnist", "--steps", "1"],
    [*TRAIN, "--recipe", "./digits.toml", "--steps", "1"],
    [*TRAIN, "--recipe", "./digits.toml", "--out", "runs/fuzzed"],
    [*RESUME],
    [*RESUME, "--checkpoint-every", "2"],
    [*RESUME, "--recipe", "./digits.toml"],
    ["evaluate", "--run", "runs/fuzzed"],
    ["evaluate", "--recipe", "./digits.toml", "--run", "runs/fuzzed"],
    ["verify", "--run", "runs/fuzzed"],
    ["verify", "--recipe", "./digits.toml", "--run", "runs/fuzzed", "--json"],
    ["golden", "--recipe", "./digits.toml"],
    ["diff", "one.trace", "two.trace"],
    ["diff", "two.trace", "one.trace", "--json"],
    ["diff", "runs/fuzzed", "runs/other"],
    ["diff", "runs/fuzzed/weights.safetensors", "runs/other/weights.safetensors"],
    ["diff", "golden/fuzzed.json", "runs/fuzzed/metrics.json"],
    ["diff", "golden/fuzzed.json", "runs/other/metrics.json"],
    ["diff", "one.trace", "three.trace"],
    ["diff", "three.trace", "one.trace", "--rerun"],
    ["doctor", "--run", "runs/fuzzed"],
    ["report", "--run", "runs/other"],
    ["report", "--recipe", "./digits.toml", "--run", "runs/fuzzed"],
    ["report", "--recipe", "./digits.toml", "--run", "runs/fuzzed", "--diff", "runs/other"],
    ["report", "--recipe", "./digits.toml", "--run", "runs/other", "--diff", "one.trace", "--json"],
    [*TRAIN, "--recipe", "./digits.toml", "--steps", "1", "--trace", "one.trace"],
]
# fmt: off
WORDS = [
    "", "-1", "0", "1", "99999999999999999999", "nan", "é", "/", "..", "../..", "/dev/null",
    "runs", "runs/fuzzed", "digits.toml", "mnist", "--json", "--run", "--resume", "--steps", "--",
    "\x1b[2K\r", "\udcff", "\n", "\u202e", "--script", "--version",
]
SNIPPETS = [
    b"", b"\0", b"\xff", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"\n", b"[" * 2000,
    b"9" * 400, b"\xff" * 8, b"\x80\x02c", b'"../../up"', b'{"a":1,"a":2}', b"= [[", b"e308",
    b"9" * 20_000, b"1e308", b"\x1b[2K\x1b[1G", b"\\u001b[2K", b"\\u202e", b"\\udcff", b"\xef\xbb\xbf",
]
# Values for keys of a trace's header and entries, where random bytes would seldom be JSON.
VALUES: list[Any] = [
    None, True, -1, 0, 5, 2**53, 10**400, 1e308, "", "x", "-1", "1e999", "0" * 16, "exact", "\x1b[2K\r",
    "\udcff", [], ["x"], ["\x1b[2K"], [None], [1], [[]], [["0"]], [["0", "0"]], {}, {"x": "\x1b[2K"},
    "step", "end",
]
# fmt: on


def idx(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def prepare(folder: Path) -> None:
    """Write a complete set of valid files."""
    (folder / "digits.toml").write_text(RECIPE.format(data="digits", batch_size=500))
    (folder / "mnist.toml").write_text(RECIPE.format(data="mnist", batch_size=5))
    (folder / "mnist").mkdir()
    chance = np.random.default_rng(0)
    for name in data.MNIST:
        shape = (10, 28, 28) if "images" in name else (10,)
        top = 256 if "images" in name else 10
        (folder / "mnist" / name).write_bytes(idx(chance.integers(0, top, shape, np.uint8)))
    assert call(["golden", "--recipe", "./digits.toml"])[0] == 0
    assert call(["train", "--recipe", "./digits.toml"])[0] == 0
    delete = Checkpoints.delete
    Checkpoints.delete = lambda self: None  # type: ignore[method-assign]
    begin = [*TRAIN, "--recipe", "./digits.toml", "--out", "runs/begun", "--checkpoint-every", "2"]
    assert call(begin)[0] == 0
    Checkpoints.delete = delete  # type: ignore[method-assign]
    shutil.rmtree(folder / "runs/begun")
    for name, level in (("one", "step"), ("two", "op")):
        with reproml.trace(f"{name}.trace", level):
            few = ["--steps", "2", "--recipe", "./digits.toml"]
            assert call([*TRAIN, *few])[0] == 0
    other = ["--recipe", "./digits.toml", "--out", "runs/other"]
    assert call([*TRAIN, *other, "--trace", "three.trace"])[0] == 0
    shutil.copy("one.trace", "runs/other/trace.jsonl")


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Return the bytes altered in one to four places."""
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        at = chance.randrange(len(content) + 1)
        if chance.random() < 0.5:
            at = min(at, chance.randrange(400))  # headers of binary files more often
        end = min(len(content), at + chance.choice([0, 1, 1, 2, 8, 100, 100_000]))
        new = chance.choice(SNIPPETS)
        if chance.random() < 0.3 and at < len(content):
            end, new = at + 1, bytes([content[at] ^ 1 << chance.randrange(8)])
        if chance.random() < 0.1:
            start = chance.randrange(len(content) + 1)
            new = content[start : start + chance.randrange(200)]
        content = content[:at] + new + content[end:]
    return content


def alter_file(folder: Path, chance: random.Random) -> None:
    path = chance.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    old = path.read_bytes()
    forged = old.startswith(chain._BEGINNING) and chance.random() < 0.7
    try:
        new = forge(old, chance) if forged else mutate(old, chance)
    except (ValueError, KeyError):  # a trace that was altered before
        new = mutate(old, chance)
    path.write_bytes(new)
    if path.name.startswith("step-") and chance.random() < 0.5:
        path.rename(
            path.with_name(f"{path.name[:14]}{hashlib.sha256(new).hexdigest()}.safetensors")
        )


def forge(content: bytes, chance: random.Random) -> bytes:
    """Return a trace with some values replaced and all hashes right, as anybody can write it."""
    lines = [json.loads(line) for line in content.splitlines()]
    for _ in range(chance.choice([1, 1, 2, 4])):
        entry = chance.choice([lines[0], *lines[:4], *lines])
        while True:
            key = chance.choice(sorted(entry))
            if not isinstance(entry[key], dict) or not entry[key] or chance.random() < 0.2:
                break
            entry = entry[key]
        if chance.random() < 0.2:
            del entry[key]
        elif isinstance(entry[key], list) and entry[key] and chance.random() < 0.5:
            entry[key][chance.randrange(len(entry[key]))] = chance.choice(VALUES)
        else:
            entry[key] = chance.choice(VALUES)
        if not all(lines):
            break
    lines = [{k: v for k, v in line.items() if k not in ("head", "sha256")} for line in lines]
    forged, head = chain._sealed(lines[0]), chain._START
    for entry in lines[1:]:
        text = json.dumps(entry, separators=(",", ":")).encode()
        head = hashlib.sha256(head.encode() + text).hexdigest()
        forged += text[:-1] + chain._tail(head)
    return forged


def alter_words(command: list[str], chance: random.Random) -> list[str]:
    command = list(command)
    at = chance.randrange(1, len(command) + 1)
    command[at : at + chance.randrange(2)] = [chance.choice(WORDS)]
    return command


def call(command: list[str]) -> tuple[object, str]:
    """Run a command; return its exit status and its standard error."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            status: object = cli.main(command)
        except SystemExit as exit_request:
            status = exit_request.code
        except BaseException:
            return "a traceback", traceback.format_exc()
    output, errors = (stream.buffer.getvalue().decode() for stream in streams)
    if not all(c.isprintable() or c == "\n" for c in output + errors):
        return "a control character", repr(output + errors)
    return status, errors


def try_mutant(folder: Path, seed: int, statuses: Counter[object]) -> Optional[str]:
    """Make one mutant and call a verb; return a description of a forbidden outcome, None if allowed."""
    chance = random.Random(seed)
    command = chance.choice(COMMANDS)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        alter_file(folder, chance)
    if chance.random() < 0.2:
        command = alter_words(command, chance)
    status, errors = call(command)
    messages = errors.splitlines()
    if "--json" in command:  # then progress is on standard error as well
        messages = [line for line in messages if line.startswith("reproml: ")]
    usage = errors.startswith("usage: ")
    statuses[status] += 1
    if status in (0, 1) or (status == 2 and (usage or len(messages) == 1)):
        return None
    return f"seed {seed}: {' '.join(command)!r} gives {status}\n{errors}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first mutant; each further one adds 1"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["REPROML_MIRROR"] = "mnist"  # no downloads
    statuses: Counter[object] = Counter()
    bad, seed, end = 0, args.seed, time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as name:
        good, work = Path(name) / "good", Path(name) / "work"
        good.mkdir()
        os.chdir(good)
        prepare(good)
        while time.monotonic() < end:
            os.chdir("/")
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(good, work)
            os.chdir(work)
            failure = try_mutant(work, seed, statuses)
            if failure:
                bad += 1
                print(failure, flush=True)
            seed += 1
            if seed % 1000 == 0:
                print(f"{seed - args.seed} mutants, exit status: {dict(statuses)}", flush=True)
        os.chdir("/")
    print(f"{seed - args.seed} mutants in {args.minutes} minutes, {bad} with a forbidden outcome")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
