"""Measures what several workers cost: seconds and bytes per step, exact and with PyTorch's native DDP.

    python -m benchmarks.distributed

torchrun starts each number of workers once on this machine, with one thread each. They train exactly and
natively in turn, by the wrappers; a single worker also without a wrapper. Bytes are what one worker sends.
In exact training they are counted at each exchange (`Workers.bytes_sent`), in native DDP for each bucket as
a ring all-reduce sends it: 2 (W - 1) / W of its bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import reproml
from reproml import distributed, environment
from reproml.arithmetic.distributed import partial_sums

WORKERS = [1, 2, 4]
PAIRS = 5  # pairs of a native and an exact measurement
STEPS = 20  # steps of each measurement

# Name: (rows in a batch, shape of a row, function that makes the model).
CASES: dict[str, Any] = {
    "mnist-mlp": (64, (784,), lambda: _mlp(784, 128, 10)),
    "wide mlp": (256, (784,), lambda: _mlp(784, 1024, 1024, 10)),
    "mnist-cnn": (100, (1, 28, 28), lambda: _lenet5()),
}


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), _mlp(400, 120, 84, 10),
    )  # fmt: skip


class Trainer:
    """Trains one case with one kind of numerics, on this worker."""

    def __init__(self, case: str, numerics: str) -> None:
        rows, shape, make = CASES[case]
        self.mode = nullcontext if numerics == "native" else reproml.exact
        self.is_wrapped = numerics != "single"
        torch.manual_seed(1)
        with self.mode():
            self.x, self.y = torch.randn(rows, *shape), torch.randint(10, (rows,))
            self.model = distributed.wrap(make()) if self.is_wrapped else make()
            self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.native_bytes = 0
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.register_comm_hook(
                None, lambda state, bucket: self._count_and_reduce(bucket)
            )

    def _count_and_reduce(self, bucket: Any) -> Any:
        size = dist.get_world_size()
        self.native_bytes += 2 * (size - 1) * bucket.buffer().nbytes // size
        return allreduce_hook(dist.group.WORLD, bucket)

    def steps(self, count: int) -> tuple[float, float]:
        """Take `count` steps; return seconds and bytes per step."""
        before = self._bytes_sent()
        start = time.perf_counter()
        with self.mode():
            for _ in range(count):
                self.optimizer.zero_grad()
                x, y = self.x, self.y
                if self.is_wrapped:
                    x, y = distributed.shard(x), distributed.shard(y)
                nn.functional.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
        seconds = time.perf_counter() - start
        return seconds / count, (self._bytes_sent() - before) / count

    def _bytes_sent(self) -> int:
        exact_bytes = distributed.workers().bytes_sent if dist.is_initialized() else 0
        return self.native_bytes + exact_bytes


def worker() -> None:
    """Run the measurements in each process; worker 0 prints the results."""
    failed: list[
        int
    ] = []  # elements that failed the rounding test, for each exchange with failures
    resolve = partial_sums._resolve

    def count_failures(group: Any, partials: Any, results: Any, failures: Any) -> None:
        failed.append(sum(map(len, failures)))
        resolve(group, partials, results, failures)

    partial_sums._resolve = count_failures
    results: dict[str, Any] = {}
    kinds = ["native", "exact"]
    with distributed.joined(64):
        if not dist.is_initialized():
            dist.init_process_group("gloo")  # a group of one worker
            kinds.append("single")
        for case in CASES:
            trainers = {numerics: Trainer(case, numerics) for numerics in kinds}
            for trainer in trainers.values():
                trainer.steps(3)  # warm up
            failed.clear()
            measured: dict[str, list[Any]] = {numerics: [] for numerics in trainers}
            for _ in range(PAIRS):
                for numerics, trainer in trainers.items():
                    measured[numerics].append(trainer.steps(STEPS))
            parameters = sum(p.numel() for p in trainers["exact"].model.parameters())
            results[case] = {
                **measured, "parameters": parameters, "failed": sum(failed) / (PAIRS * STEPS),
            }  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT " + json.dumps(results), flush=True)


def measure() -> dict[int, Any]:
    """Run the benchmark with each number of workers, one after the other."""
    results = {}
    for count in WORKERS:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        child = subprocess.run(
            [sys.executable, *torchrun, "-m", "benchmarks.distributed", "--worker"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        line = next(x for x in child.stdout.splitlines() if x.startswith("RESULT "))
        results[count] = json.loads(line[len("RESULT ") :])
    return results


def show(results: dict[int, Any]) -> None:
    """Print the results as one table."""
    table = Table(
        title=f"per step: medians of {PAIRS} measurements of {STEPS} steps; {os.cpu_count()} cores"
    )
    for column in (
        "case", "workers", "native ms", "exact ms", "ratio", "native kB", "exact kB", "ratio",
        "failed test", "exact / one process"
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for case in CASES:
        for count, measured in results.items():
            native, exact = measured[case]["native"], measured[case]["exact"]
            ms = [1000 * median(seconds for seconds, _ in pairs) for pairs in (native, exact)]
            ratio = median(e[0] / n[0] for n, e in zip(native, exact))
            kb = [median(sent for _, sent in pairs) / 1000 for pairs in (native, exact)]
            single = measured[case].get("single")  # with one worker only
            over_single = (
                f"{median(e[0] / s[0] for e, s in zip(exact, single)):.2f}" if single else ""
            )
            table.add_row(
                case, str(count), f"{ms[0]:.2f}", f"{ms[1]:.2f}", f"{ratio:.2f}",
                f"{kb[0]:.1f}", f"{kb[1]:.1f}", f"{kb[1] / kb[0]:.2f}" if kb[0] else "",
                f"{measured[case]['failed']:.1f}", over_single,
            )  # fmt: skip
    Console(width=100).print(table)


def main() -> None:
    """Measure, print the table and write results/distributed.json."""
    from benchmarks.bench import RESULTS

    results = measure()
    show(results)
    RESULTS.mkdir(exist_ok=True)
    report = {"environment": environment.describe(), "workers": results}
    (RESULTS / "distributed.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
