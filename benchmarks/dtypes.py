"""Measure products of bfloat16, float16 and float64 matrices, and a training in bfloat16 autocast.

    python -m benchmarks.dtypes

Exact and native calls alternate, so that other processes disturb all of them; each number is the best
of several rounds. With OMP_NUM_THREADS=1, processor time is measured. The last column is the fraction of
elements that fail the first rounding test: those of bfloat16 products, which sum blocks in binary32, are
summed again in binary64; the others, with their rounding errors. Those of float64, which are computed with
their rounding errors at once, are computed again in integers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Callable

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import reproml
from reproml.arithmetic.compiler import pair_arrays
from reproml.arithmetic.compiler.pair_arrays import round_pairs
from reproml.arithmetic.numerics.formats import rounding_to
from reproml.arithmetic.numerics.rounding import gamma, rounding_test

PRODUCTS = ((64, 784, 128), (256, 256, 256), (512, 128, 512), (1024, 1024, 1024), (4096, 64, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 16  # SINGLE_BLOCK of csrc/tile.h


def alternate(calls: dict[Any, Callable[[], Any]], seconds: float) -> dict[Any, float]:
    """Return the shortest time of each call; they take turns for so many seconds."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for key, call in calls.items():
            with reproml.exact() if "exact" in key else nullcontext():
                start = now()
                call()
                best[key] = min(best[key], now() - start)
        rounds += 1
    return best


def failures(a: Tensor, b: Tensor) -> float:
    """Return the fraction of the elements of a @ b that fail the first test."""
    if a.dtype is torch.float64:
        failed = round_pairs(*pair_arrays.products(a.unsqueeze(0), b.unsqueeze(0)))[1]
        return failed.double().mean().item()
    wide_a, wide_b = a.double(), b.double()
    weight, relative = torch.ones(len(b), dtype=torch.float64), gamma(len(b))
    if a.dtype is torch.bfloat16:  # each term is in at most 15 sums that are rounded
        weight, relative = BLOCK - (torch.arange(len(b)) % BLOCK).clamp(1).double(), 2.0**-24
    sizes = (wide_a.square() @ weight).sqrt().outer((weight @ wide_b.square()).sqrt())
    mid, error = wide_a @ wide_b, relative * sizes
    with rounding_to(a.dtype):
        _, failed = rounding_test(mid - error, mid + error)
    return failed.double().mean().item()


def products() -> Iterator[list[str]]:
    for m, k, n in PRODUCTS:
        calls: dict[Any, Callable[[], Any]] = {}
        left = {}
        for dtype in DTYPES:
            a = torch.randn(m, k, dtype=torch.float64).to(dtype)
            b = torch.randn(k, n, dtype=torch.float64).to(dtype)
            left[dtype] = failures(a, b)
            calls[dtype, "native"] = lambda a=a, b=b: a @ b  # type: ignore[misc]
            calls[dtype, "exact"] = calls[dtype, "native"]
        best = alternate(calls, 4.0)
        for dtype in DTYPES:
            native, exact = best[dtype, "native"], best[dtype, "exact"]
            yield [
                *(f"{m} x {k} x {n}", str(dtype).replace("torch.", "")),
                *(f"{native * 1e3:.3f}", f"{exact * 1e3:.3f}", f"{exact / native:.2f}"),
                f"{exact / best[torch.float32, 'exact']:.2f}",
                f"{left[dtype]:.1e}",
            ]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 256, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*[Block(width, 4) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))  # type: ignore[no-any-return]


def training_step(autocast: bool) -> Callable[[], None]:
    """Return one step of AdamW, with float32 weights."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randint(0, 256, (16, 65))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def trainings() -> Iterator[list[str]]:
    names = {"float32": False, "bfloat16 autocast": True}
    calls: dict[Any, Callable[[], Any]] = {}
    for name, autocast in names.items():
        calls[name, "native"] = training_step(autocast)
        calls[name, "exact"] = training_step(autocast)
    best = alternate(calls, 20.0)
    for name in names:
        native, exact = best[name, "native"], best[name, "exact"]
        yield [
            *("small GPT, one step", name, f"{native * 1e3:.1f}", f"{exact * 1e3:.1f}"),
            *(f"{exact / native:.2f}", f"{exact / best['float32', 'exact']:.2f}", ""),
        ]


def main() -> None:
    torch.manual_seed(0)
    table = Table(box=box.SIMPLE)
    for i, column in enumerate(
        ("", "", "native ms", "exact ms", "exact / native", "/ exact float32", "failures")
    ):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=True)
    for row in (*products(), *trainings()):
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
