"""Check exact arithmetic on a GPU against the CPU's results, to the last bit, in one run of a few minutes.

    python -m verification.gpu                # on a machine with a GPU
    python -m verification.gpu --device cpu --seconds 60  # on any machine: the CPU is declared a device
    python -m verification.gpu --wheels DIR   # without network: first installs what is missing from wheels

It needs the files of MNIST (REPROML_MIRROR, offline). In order: the self-test of `doctor` on the CPU, the
golden files, two steps of each script of examples/ against tests/examples.json, PyTorch's own samples of
operators, forward and backward, and the times and the memory of exact and native training. What does not
fit into `--seconds` is listed as not run. The exit status is 1 if something differs, and 2 if something was
not run.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parent.parent
# What the package needs and a machine with PyTorch may lack.
NEEDED = (
    "invoke",
    "msgspec",
    "platformdirs",
    "safetensors",
    "scikit-learn",
    "rich",
    "jinja2",
    "mpmath",
)

Result = tuple[str, str]  # SAME, DIFFERS, MEASURED or NOT_RUN, and what was seen
SAME, DIFFERS, MEASURED, NOT_RUN = "same", "DIFFERS", "measured", "NOT RUN"


def verdict(same: bool) -> str:
    return SAME if same else DIFFERS


def install(wheels: Path) -> None:
    """Install from a folder what is missing here, and the package itself with its loops in C."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--find-links",
        str(wheels),
    ]
    subprocess.run([*pip, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], check=True)


def declare_cpu_a_device() -> None:
    """Let the CPU count as a device: rounding tests are deferred, and no loop in C runs."""
    from reproml.arithmetic.compiler import kernels
    from reproml.arithmetic.numerics import devices

    kernels.library = None
    devices.is_on_accelerator = lambda x: not x.is_meta


def reproml(*arguments: str) -> tuple[int, str]:
    """Run the command line in this process; return its status and output."""
    from reproml import cli

    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        status = cli.main(arguments)
    return status, output.getvalue()


def last_line(output: str) -> str:
    return (output.strip().splitlines() or [""])[-1]


# --- what is checked -------------------------------------------------------------------------------


def doctor(device: str) -> Result:
    status, output = reproml("doctor")
    return verdict(status == 0), last_line(output)


def golden(recipe: str) -> Callable[[str], Result]:
    def verify(device: str) -> Result:
        status, output = reproml("verify", "--recipe", recipe, "--device", device)
        return {0: SAME, 1: DIFFERS}.get(status, NOT_RUN), last_line(output)

    return verify


def example(name: str) -> Callable[[str], Result]:
    def train(device: str) -> Result:
        from verification.examples import EXPECTED, digests

        with redirect_stdout(io.StringIO()):
            found = digests(name, "--device", device)
        return verdict(found == EXPECTED[name]), " ".join(sha256[:16] for sha256 in found)

    return train


def operators(seconds: float) -> Callable[[str], Result]:
    """Return a check that compares two samples of each operator of PyTorch on the CPU and the device."""

    def compare(device: str) -> Result:
        from reproml.errors import NotExactError
        from verification import op_db

        counts: Counter[str] = Counter()
        wrong, end = [], time.monotonic() + seconds
        for op in op_db.operators():
            if "empty" in op.name:  # its results are not initialised
                continue
            for sample, backward in islice(op_db.samples(op), 2):
                if time.monotonic() > end:
                    counts["not run, out of time"] += 1
                    continue
                try:
                    expected = outcome(op, sample, backward, "cpu")
                except NotExactError:
                    counts["refused"] += 1
                    continue
                except (
                    Exception
                ) as error:  # PyTorch itself does not run some samples in these dtypes
                    counts[f"failed on the CPU ({type(error).__name__})"] += 1
                    continue
                counts["compared"] += 1
                try:
                    same = outcome(op, sample, backward, device) == expected
                except Exception as error:
                    same = False
                    wrong.append(f"{op_db.title(op)} ({type(error).__name__}: {error})")
                else:
                    wrong += [op_db.title(op)] * (not same)
        listed = f"; other results: {', '.join(dict.fromkeys(wrong))}" if wrong else ""
        found = verdict(not wrong)
        if not wrong and counts["not run, out of time"]:
            found = NOT_RUN
        return found, ", ".join(f"{n} {what}" for what, n in counts.items()) + listed

    return compare


def outcome(op: Any, sample: Any, backward: bool, device: str) -> list[tuple[Any, ...]]:
    """Return digest, dtype and strides of each result and gradient of a sample, computed exactly."""
    import reproml
    from verification import op_db

    def move(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device(device)
        if isinstance(x, Tensor):
            return x.detach().to(device, copy=True).requires_grad_(x.requires_grad)
        return x

    input, args, kwargs = tree_map(move, (sample.input, sample.args, sample.kwargs))
    kwargs = {**kwargs, "device": device} if "device" in kwargs else kwargs
    torch.manual_seed(0)
    with reproml.exact():
        result = op(input, *args, **kwargs)
        kept = sample.output_process_fn_grad(result) if sample.output_process_fn_grad else result
        tensors = op_db.all_tensors(result)
        if backward:
            tensors += [x for x in op_db.gradients(kept, (input, args, kwargs), 1) if x is not None]
    return [(reproml.digest({"x": x.detach()}), x.dtype, x.stride()) for x in tensors]


def cost(recipe: str, steps: int) -> Callable[[str], Result]:
    """Return the times and the memory of exact and native training, in turn."""

    def measure(device: str) -> Result:
        from reproml.pipeline import data, preprocess, train
        from reproml.pipeline.recipe import load_recipe

        chosen = load_recipe(recipe)
        prepared = preprocess.preprocess(data.load_dataset(chosen.data.name), chosen.preprocess)
        times: dict[str, list[float]] = {"native": [], "exact": []}
        memory = {}
        for _ in range(3):
            for numerics, found in times.items():
                for count in (3, steps):  # the first call warms up
                    on_gpu = device != "cpu"
                    if on_gpu:
                        torch.cuda.synchronize()
                        torch.cuda.reset_peak_memory_stats()
                    start = time.perf_counter()
                    train.train(chosen, prepared, numerics, count, device=torch.device(device))
                    if on_gpu:
                        torch.cuda.synchronize()
                        memory[numerics] = torch.cuda.max_memory_allocated() / 1e6
                found.append(time.perf_counter() - start)
        native, exact = (sorted(found)[1] for found in times.values())
        words = (
            f"exact / native {exact / native:.2f} ({steps} steps: {exact:.2f} s, {native:.2f} s)"
        )
        used = [f"{numerics} {size:.0f} MB" for numerics, size in memory.items()]
        return MEASURED, "; ".join([words, *used])

    return measure


def checks(seconds: float) -> Iterator[tuple[str, Callable[[str], Result]]]:
    yield "self-test of the CPU", doctor
    yield "digits-mlp", golden("digits-mlp")
    for path in sorted((ROOT / "examples").glob("*.py")):
        if path.stem != "ddp":  # it needs torchrun
            yield f"examples/{path.name}", example(path.stem)
    yield "mnist-mlp", golden("mnist-mlp")
    yield "operators", operators(seconds / 3)
    yield "cost of digits-mlp", cost("digits-mlp", 100)
    yield "cost of mnist-mlp", cost("mnist-mlp", 100)
    yield "cost of mnist-cnn", cost("mnist-cnn", 30)
    yield "mnist-cnn", golden("mnist-cnn")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder with wheels to install")
    parser.add_argument("--seconds", type=float, default=280, help="begin no check after this time")
    args = parser.parse_args()
    start = time.monotonic()
    if args.wheels:
        install(args.wheels)
    if args.device == "cpu":
        declare_cpu_a_device()
    elif not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use here; use --device cpu")
    warnings.simplefilter("ignore")
    name = "the CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    counts: Counter[str] = Counter()
    for title, check in checks(args.seconds):
        begun = time.monotonic()
        if begun - start > args.seconds:
            word, seen = NOT_RUN, "out of time"
        else:
            try:
                word, seen = check(args.device)
            except Exception as error:  # the other checks are worth their time
                word, seen = DIFFERS, f"{type(error).__name__}: {error}"
        counts[word] += 1
        print(f"{word:8} {title:34} {time.monotonic() - begun:6.1f} s  {seen}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts[DIFFERS] else 2 if counts[NOT_RUN] else 0


if __name__ == "__main__":
    sys.exit(main())
