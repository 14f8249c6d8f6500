"""Measure training steps of networks of the sizes that people train, exact and native in turn.

    python -m benchmarks.sizes [NAME ...]        # part of: invoke bench

Sums of products are taken in binary64, at half of binary32's rate. So each network has a floor: native's
time, with the time of its products and convolutions replaced by that of torch.mm in binary64 on matrices of
the same sizes. All three are measured in one process; the table has medians of alternating steps.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from contextlib import nullcontext
from statistics import median
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import reproml

ROUNDS = 7  # steps of each, after one that does not count

Step = Callable[[], None]


def step_of(model: nn.Module, make: Any, inputs: Tensor, loss: Callable[[Tensor], Tensor]) -> Step:
    optimizer = make(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss(model(inputs)).backward()
        optimizer.step()

    return step


def mlp(width: int, batch: int) -> Step:
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    target = torch.randint(10, (batch,))
    return step_of(
        nn.Sequential(*layers, nn.Linear(width, 10)),
        torch.optim.AdamW,
        torch.randn(batch, 784),
        lambda y: F.cross_entropy(y, target),
    )


class GPT(nn.Module):
    """A decoder without dropout, over 256 symbols."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)

    def forward(self, x: Tensor) -> Tensor:
        places = self.place(torch.arange(x.shape[1]))
        y: Tensor = self.head(self.layers(self.token(x) + places, self.mask, is_causal=True))
        return y


def gpt(width: int, layers: int, batch: int, length: int) -> Step:
    x = torch.randint(256, (batch, length))
    return step_of(
        GPT(width, layers, length),
        torch.optim.AdamW,
        x,
        lambda y: F.cross_entropy(y[:, :-1].flatten(0, 1), x[:, 1:].flatten()),
    )


def resnet18(batch: int, pixels: int) -> Step:
    target = torch.randint(10, (batch,))
    return step_of(
        torchvision.models.resnet18(num_classes=10),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        torch.randn(batch, 3, pixels, pixels),
        lambda y: F.cross_entropy(y, target),
    )


def lstm(batch: int, length: int) -> Step:
    target = torch.randn(batch, length, 128)
    return step_of(
        nn.LSTM(64, 128, batch_first=True),
        torch.optim.Adam,
        torch.randn(batch, length, 64),
        lambda y: F.mse_loss(y[0], target),
    )


CASES: dict[str, Callable[[], Step]] = {
    "MLP 784-128-128, batch 64": lambda: mlp(128, 64),
    "MLP 784-2048-2048, batch 512": lambda: mlp(2048, 512),
    "GPT d 128, 2 layers, 8 x 64": lambda: gpt(128, 2, 8, 64),
    "GPT d 512, 4 layers, 8 x 128": lambda: gpt(512, 4, 8, 128),
    "ResNet-18, 16 of 64 pixels": lambda: resnet18(16, 64),
    "ResNet-18, 4 of 224 pixels": lambda: resnet18(4, 224),
    "LSTM 64-128, batch 32, 32 steps": lambda: lstm(32, 32),
}


class Result(NamedTuple):
    native: float  # seconds
    exact: float
    floor: float


# ---- the floor ---------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Times products and convolutions, and counts them as products of sizes (batch, m, k, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.sizes: Counter[tuple[int, int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        taken = time.perf_counter() - start
        name = func._schema.name[len("aten::") :]
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[-2:]
            self.sizes[
                (a.shape[0] if a.dim() == 3 else 1, a.shape[-2], a.shape[-1], b.shape[-1])
            ] += 1
            self.seconds += taken
        elif name == "convolution":
            self._convolution(args[1], result, args[8])
            self.seconds += taken
        elif name == "convolution_backward":
            for needed in args[10][:2]:  # as large as the forward product
                if needed:
                    self._convolution(args[2], args[0], args[9])
            self.seconds += taken
        elif name.startswith("mkldnn_rnn_layer"):
            self._recurrent(*args[:3], backward=name.endswith("backward"))
            self.seconds += taken
        return result

    def _convolution(self, weight: Tensor, output: Tensor, groups: int) -> None:
        places = output.shape[0] * math.prod(output.shape[2:])
        self.sizes[(groups, places, math.prod(weight.shape[1:]), weight.shape[0] // groups)] += 1

    def _recurrent(
        self, inputs: Tensor, of_input: Tensor, of_hidden: Tensor, backward: bool
    ) -> None:
        """Count the products of a layer; the gradient of its input is not wanted here."""
        length, batch, _ = inputs.shape
        (gates, width), hidden = of_input.shape, of_hidden.shape[1]
        if backward:
            self.sizes[(1, gates, length * batch, width)] += 1
            self.sizes[(1, gates, length * batch, hidden)] += 1
            self.sizes[(1, batch, gates, hidden)] += length - 1
        else:
            self.sizes[(1, length * batch, width, gates)] += 1
            self.sizes[(1, batch, hidden, gates)] += length


def _binary64_seconds(sizes: Counter[tuple[int, int, int, int]]) -> float:
    total = 0.0
    for (batch, m, k, n), count in sizes.items():
        a, b = torch.randn(batch, m, k).double(), torch.randn(batch, k, n).double()
        times = []
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        total += count * min(times)
    return total


def floor(step: Step, native: float) -> float:
    """Return the floor of a step that takes `native` seconds natively."""
    step()
    with Products() as products:
        step()
    rest: float = native - min(products.seconds, native)
    return rest + _binary64_seconds(products.sizes)


# ---- the measurement ---------------------------------------------------------------------------------


def measure(name: str) -> Result:
    steps = {}
    for numerics in ("native", "exact"):
        torch.manual_seed(0)
        steps[numerics] = CASES[name]()
    seconds: dict[str, list[float]] = {numerics: [] for numerics in steps}
    for _ in range(ROUNDS + 1):
        for numerics, step in steps.items():
            with reproml.exact() if numerics == "exact" else nullcontext():
                start = time.perf_counter()
                step()
                seconds[numerics].append(time.perf_counter() - start)
    native, exact = (median(times[1:]) for times in seconds.values())
    return Result(native, exact, floor(steps["native"], native))


def show(results: dict[str, Result]) -> None:
    table = Table(title=f"a step at real sizes: medians of {ROUNDS}", box=box.SIMPLE)
    table.add_column(no_wrap=True)
    for column in ("native ms", "exact ms", "exact / native", "floor / native", "exact / floor"):
        table.add_column(column, justify="right")
    for name, (native, exact, least) in results.items():
        ratios = exact / native, least / native, exact / least
        table.add_row(
            name, f"{native * 1e3:.1f}", f"{exact * 1e3:.1f}", *[f"{r:.2f}" for r in ratios]
        )
    Console().print(table)


def main(names: list[str]) -> None:
    show({name: measure(name) for name in names or CASES})


if __name__ == "__main__":
    main(sys.argv[1:])
