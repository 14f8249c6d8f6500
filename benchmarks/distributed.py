"""What several workers cost, exact against native DDP: seconds and bytes a step, in one run.

    python -m benchmarks.distributed

Each number of workers is started once by torchrun on this machine, with one thread each, and trains both
ways in turn. Bytes are what a worker sends: counted at each exchange (`Workers.bytes_sent`), of native DDP
at each bucket, as a ring all-reduce sends it: 2 (W - 1) / W of its bytes.
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
PAIRS = 5  # of a native and an exact measurement
STEPS = 20  # of each

# Name: (rows of a batch, their shape, the model).
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


class Measured:
    """One way to train one case, on this worker."""

    def __init__(self, case: str, numerics: str) -> None:
        rows, shape, make = CASES[case]
        self.mode = reproml.exact if numerics == "exact" else nullcontext
        torch.manual_seed(1)
        with self.mode():
            self.x, self.y = torch.randn(rows, *shape), torch.randint(10, (rows,))
            self.model = distributed.wrap(make())
            self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.native_bytes = 0
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            self.model.register_comm_hook(None, lambda state, bucket: self._counted(bucket))

    def _counted(self, bucket: Any) -> Any:
        size = dist.get_world_size()
        self.native_bytes += 2 * (size - 1) * bucket.buffer().nbytes // size
        return allreduce_hook(dist.group.WORLD, bucket)

    def steps(self, count: int) -> tuple[float, float]:
        """Seconds and bytes a step."""
        sent = distributed.workers() if dist.is_initialized() else None
        before = self.native_bytes + (sent.bytes_sent if sent else 0)
        start = time.perf_counter()
        with self.mode():
            for _ in range(count):
                self.optimizer.zero_grad()
                x, y = distributed.local_rows(self.x), distributed.local_rows(self.y)
                nn.functional.cross_entropy(self.model(x), y).backward()
                self.optimizer.step()
        seconds = time.perf_counter() - start
        after = self.native_bytes + (sent.bytes_sent if sent else 0)
        return seconds / count, (after - before) / count


def worker() -> None:
    """What each process does; the first prints the results."""
    settled: list[int] = []
    plain_settle = partial_sums._settle

    def round_ball(group: Any, partials: Any, whole: Any, lists: Any) -> None:
        settled.append(sum(map(len, lists)))
        plain_settle(group, partials, whole, lists)

    partial_sums._settle = round_ball
    results: dict[str, Any] = {}
    with distributed.joined(64):
        for case in CASES:
            ways = {numerics: Measured(case, numerics) for numerics in ("native", "exact")}
            for way in ways.values():
                way.steps(3)
            settled.clear()
            found: dict[str, list[Any]] = {numerics: [] for numerics in ways}
            for _ in range(PAIRS):
                for numerics, way in ways.items():
                    found[numerics].append(way.steps(STEPS))
            parameters = sum(p.numel() for p in ways["exact"].model.parameters())
            results[case] = {
                **found, "parameters": parameters, "settled": sum(settled) / (PAIRS * STEPS),
            }  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT " + json.dumps(results), flush=True)


def measure() -> dict[int, Any]:
    """Start all numbers of workers one after the other."""
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
    """Print one table."""
    table = Table(title=f"a step: medians of {PAIRS} times {STEPS}; {os.cpu_count()} cores")
    for column in "case;workers;native ms;exact ms;ratio;native kB;exact kB;ratio;settled".split(
        ";"
    ):
        table.add_column(column, justify="right")
    for case in CASES:
        for count, found in results.items():
            native, exact = found[case]["native"], found[case]["exact"]
            ms = [1000 * median(seconds for seconds, _ in way) for way in (native, exact)]
            ratio = median(e[0] / n[0] for n, e in zip(native, exact))
            kb = [median(sent for _, sent in way) / 1000 for way in (native, exact)]
            table.add_row(
                case, str(count), f"{ms[0]:.2f}", f"{ms[1]:.2f}", f"{ratio:.2f}",
                f"{kb[0]:.1f}", f"{kb[1]:.1f}", f"{kb[1] / kb[0]:.2f}" if kb[0] else "",
                f"{found[case]['settled']:.1f}",
            )  # fmt: skip
    Console(width=100).print(table)


def main() -> None:
    """Measure, print, write."""
    from benchmarks.bench import RESULTS

    results = measure()
    show(results)
    RESULTS.mkdir(exist_ok=True)
    told = {"environment": environment.describe(), "workers": results}
    (RESULTS / "distributed.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    worker() if "--worker" in sys.argv else main()
