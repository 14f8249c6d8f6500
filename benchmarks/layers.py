"""Measure convolution layers and matrix products one by one, exact, native and in binary64.

    python -m benchmarks.layers [NETWORK ...]        # or: products

Rates are in GF/s, the best of several rounds; the last column is the time of exact arithmetic in that of
torch.mm in binary64 on matrices of the same sizes. With OMP_NUM_THREADS=1, processor time is measured, so
that other processes on the machine matter little.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import torch
import torchvision
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import reproml

NETWORKS = ("resnet18", "resnet50", "vgg11", "mobilenet_v2")
IMAGES = {32: 16, 64: 16, 224: 4}  # pixels: batch
PRODUCTS = (  # batch, m, k, n
    *(
        (1, 32, 64, 64),
        (1, 64, 784, 128),
        (1, 128, 128, 128),
        (1, 32, 128, 512),
        (1, 512, 128, 512),
    ),
    *((1, 256, 4096, 64), (1, 4096, 64, 64), (1, 512, 2048, 2048), (1, 2048, 2048, 2048)),
    *((1, 1, 1024, 1024), (64, 64, 64, 64), (32, 128, 64, 128)),
)


class Row(NamedTuple):
    native: float  # GF/s
    exact: float
    binary64: float


def best(function: Callable[[], Any], operations: float) -> float:
    """Return the rate of the fastest of some calls that take a tenth of a second together."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 0.1 and len(seconds) < 300):
        start = now()
        function()
        seconds.append(now() - start)
    return operations / min(seconds) / 1e9


def measure(function: Callable[[], Any], batch: int, m: int, k: int, n: int) -> Row:
    """Measure a function that takes as many operations as a batch of products of these sizes."""
    operations = 2.0 * batch * m * k * n
    with reproml.exact():
        exact = best(function, operations)
    a, b = torch.randn(batch, m, k).double(), torch.randn(batch, k, n).double()
    return Row(best(function, operations), exact, best(lambda: a @ b, operations))


# ---- layers ------------------------------------------------------------------------------------------


def layers_of(network: str, pixels: int) -> dict[str, tuple[nn.Conv2d, Tensor]]:
    """Return each distinct convolution layer of a network with its input."""
    found: dict[str, tuple[nn.Conv2d, Tensor]] = {}

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        assert isinstance(layer, nn.Conv2d)
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        name = f"{layer.in_channels}-{layer.out_channels} {kernel}x{kernel}/{stride}"
        name += f" groups {layer.groups}" if layer.groups > 1 else ""
        found.setdefault(f"{name}, {inputs[0].shape[2]} px", (layer, inputs[0]))

    model = getattr(torchvision.models, network)().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.randn(IMAGES[pixels], 3, pixels, pixels))
    return found


def directions(layer: nn.Conv2d, x: Tensor) -> Iterator[tuple[str, Row]]:
    weight = layer.weight.detach()
    rest = (layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups)
    forward, backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
    g = torch.randn_like(forward(x, weight, None, *rest))
    places, terms = g.shape[0] * math.prod(g.shape[2:]), math.prod(weight.shape[1:])
    sizes = (layer.groups, len(weight) // layer.groups, terms, places)
    yield "forward", measure(lambda: forward(x, weight, None, *rest), *sizes)
    for i, name in enumerate(("input", "weight")):
        mask = [i == 0, i == 1, False]
        yield name, measure(lambda m=mask: backward(g, x, weight, None, *rest, m), *sizes)  # type: ignore


# ---- products ----------------------------------------------------------------------------------------


def products() -> Iterator[tuple[str, str, Row]]:
    for batch, m, k, n in PRODUCTS:
        a, b = torch.randn(batch, m, k), torch.randn(batch, k, n)
        if batch == 1:
            a, b = a[0], b[0]
        transposed = a.mT.contiguous().mT, b.mT.contiguous().mT
        for name, x, y in (("", a, b), ("a^T", transposed[0], b), ("b^T", a, transposed[1])):
            row = measure(lambda x=x, y=y: x @ y, batch, m, k, n)  # type: ignore
            yield f"{batch} x {m} x {k} x {n}", name, row


def show(title: str, rows: Iterator[tuple[str, str, Row]]) -> None:
    table = Table(title=title, box=box.SIMPLE)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    columns = ("native", "exact", "binary64", "exact / native", "exact / binary64")
    for column in columns:
        table.add_column(column, justify="right")
    for name, what, (native, exact, wide) in rows:
        rates = [f"{rate:.1f}" for rate in (native, exact, wide)]
        table.add_row(name, what, *rates, f"{native / exact:.2f}", f"{wide / exact:.2f}")
    Console(width=110).print(table)


def convolutions(network: str, pixels: int) -> Iterator[tuple[str, str, Row]]:
    for name, (layer, x) in layers_of(network, pixels).items():
        for direction, row in directions(layer, x):
            yield name, direction, row


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for name in names or ("products", *NETWORKS):
        if name == "products":
            show("products", products())
        else:
            for pixels in IMAGES:
                show(f"{name} at {pixels} pixels", convolutions(name, pixels))


if __name__ == "__main__":
    main(sys.argv[1:])
