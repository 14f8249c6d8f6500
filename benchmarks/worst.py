"""Search the inputs on which each operator takes longest, compared with native PyTorch.

    python -m benchmarks.worst [--numbers 100000] [NAME ...]

Most results are confirmed by the first rounding test. Inputs whose exact results are all ties, cancel to
zero or lie beside a midpoint are not, for whole tensors, and take the slower paths. So each operator is
timed on every kind of input below, forward and backward, with one thread, and its worst ratio is printed.
A ratio of 99,000 means that it took longer than LIMIT. Lines of the operator table that no case reaches are
listed at the end.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reproml
from reproml.arithmetic import operator_table

LIMIT = 10  # seconds
ROW = 50  # length of the rows of softmax, normalization and the like
TIMED = 3  # repetitions, of which the shortest counts

Case = Callable[[Tensor], Tensor]


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, ROW)


def images(x: Tensor) -> Tensor:
    return x[: x.numel() // 800 * 800].reshape(-1, 8, 10, 10)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    n = x.numel() // 2
    return x[:n], x[n : 2 * n]


def square(x: Tensor) -> Tensor:
    n = int(x.numel() ** 0.5)
    return x[: n * n].reshape(n, n)


def places(n: int, limit: int) -> Tensor:
    return torch.arange(n) * 7919 % limit


def conv(x: Tensor) -> Tensor:
    return F.conv2d(images(x), x[:576].reshape(8, 8, 3, 3), x[:8], padding=1)


def target(x: Tensor) -> Tensor:
    return places(x.numel() // ROW, ROW)


CASES: dict[str, Case] = {
    "add": lambda x: torch.add(*halves(x), alpha=0.1),
    "sub": lambda x: halves(x)[0] - halves(x)[1],
    "mul": lambda x: halves(x)[0] * halves(x)[1],
    "div": lambda x: halves(x)[0] / halves(x)[1],
    "reciprocal": torch.reciprocal,
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: x.abs().rsqrt(),
    "maximum": lambda x: torch.maximum(*halves(x)),
    "minimum": lambda x: torch.minimum(*halves(x)),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "amax, amin, max, min": lambda x: rows(x).amax(1) - rows(x).amin(1) + x.max() - x.min(),
    "addcmul": lambda x: torch.addcmul(*halves(x), halves(x)[1], value=0.1),
    "addcdiv": lambda x: torch.addcdiv(*halves(x), halves(x)[1], value=0.1),
    "lerp": lambda x: torch.lerp(*halves(x), 0.1),
    "pow, 3": lambda x: x**3,
    "pow, -2": lambda x: x**-2,
    "pow, 0.5": lambda x: x.abs() ** 0.5,
    "pow, 2.5": lambda x: x.abs() ** 2.5,
    "sum": torch.sum,
    "sum of rows": lambda x: rows(x).sum(1),
    "mean of columns": lambda x: rows(x).mean(0),
    "cumsum": lambda x: x.cumsum(0),
    "cumsum of rows": lambda x: rows(x).cumsum(1),
    "var": lambda x: rows(x).var(1),
    "std": lambda x: rows(x).std(1),
    "norm": lambda x: rows(x).norm(dim=1),
    "norm of all": torch.norm,
    "trace": lambda x: square(x).trace(),
    "scatter_add": lambda x: torch.zeros(97).scatter_add(0, places(x.numel(), 97), x),
    "index_add": lambda x: torch.zeros(97).index_add(0, places(x.numel(), 97), x),
    "x[index]": lambda x: x[places(x.numel(), 97)],
    "embedding": lambda x: F.embedding(places(x.numel() // ROW, 20), x[: 20 * ROW].view(20, ROW)),
    "unfold": lambda x: x.unfold(0, 4, 2),
    "pad, reflect": lambda x: F.pad(images(x), (1, 1, 1, 1), "reflect"),
    "pad, replicate": lambda x: F.pad(images(x), (1, 1, 1, 1), "replicate"),
    "upsample": lambda x: F.interpolate(images(x), scale_factor=2),
    "mm": lambda x: square(x) @ square(x),
    "bmm": lambda x: images(x)[:, 0] @ images(x)[:, 1],
    "mv": lambda x: square(x) @ square(x)[0],
    "dot": lambda x: torch.dot(*halves(x)),
    "linear": lambda x: F.linear(square(x), square(x), square(x)[0]),
    "conv2d": conv,
    "avg_pool2d": lambda x: F.avg_pool2d(images(x), 3, 1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(images(x), 3),
    "max_pool2d": lambda x: F.max_pool2d(images(x), 3, 1),
    "batch_norm": lambda x: F.batch_norm(images(x), None, None, x[:8], x[:8], training=True),
    "layer_norm": lambda x: F.layer_norm(rows(x), (ROW,), x[:ROW], x[:ROW]),
    "group_norm": lambda x: F.group_norm(images(x), 2, x[:8], x[:8]),
    **{
        name: getattr(torch, name)
        for name in "exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv".split()
    },
    **{
        name: getattr(F, name)
        for name in "gelu silu softplus mish logsigmoid leaky_relu elu celu selu hardtanh "
        "hardsigmoid hardswish".split()
    },
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "prelu": lambda x: F.prelu(images(x), x[:8]),
    "softmax": lambda x: rows(x).softmax(1),
    "softmax of columns": lambda x: rows(x).softmax(0),
    "log_softmax": lambda x: rows(x).log_softmax(1),
    "logsumexp": lambda x: rows(x).logsumexp(1),
    "cross_entropy": lambda x: F.cross_entropy(rows(x), target(x)),
    "mse_loss": lambda x: F.mse_loss(*halves(x)),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(*halves(x)),
    "huber_loss": lambda x: F.huber_loss(*halves(x), delta=0.3),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), x.sigmoid().detach()),
    "bce_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "xlogy": lambda x: torch.xlogy(halves(x)[0], halves(x)[1].abs()),
    "soft_margin_loss": lambda x: F.soft_margin_loss(halves(x)[0], halves(x)[1].sign().detach()),
    "glu": lambda x: F.glu(rows(x), 1),
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 0.5),
    "hypot": lambda x: torch.hypot(*halves(x)),
    "log2, log10": lambda x: x.abs().log2() + x.abs().log10(),
    "exp2": torch.exp2,
    "tan": torch.tan,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sinh, cosh": lambda x: x.sinh() + x.cosh(),
    "lgamma": torch.lgamma,
    "remainder": lambda x: torch.remainder(*halves(x)),
    "prod of rows": lambda x: rows(x).prod(1),
    "cumprod of rows": lambda x: rows(x).cumprod(1),
    "logcumsumexp": lambda x: rows(x)[:20].logcumsumexp(1),
    "max_unpool2d": lambda x: F.max_unpool2d(
        *F.max_pool2d(images(x), 2, return_indices=True), [2, 2]
    ),
    "embedding_bag": lambda x: F.embedding_bag(
        places(200, 20).view(20, 10), x[: 20 * ROW].view(20, ROW)
    ),
    "attention": lambda x: F.scaled_dot_product_attention(images(x), images(x), images(x)),
}


def kinds(n: int) -> Iterator[tuple[str, Tensor]]:
    """Yield inputs of n numbers that are hard for one operator or another."""
    draw = torch.Generator().manual_seed(0)

    def uniform() -> Tensor:
        return torch.rand(n, generator=draw)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=draw)

    yield "normal", torch.randn(n, generator=draw)
    yield "zeros", torch.zeros(n)
    yield "ones", torch.ones(n)
    yield "0.1", torch.full((n,), 0.1)
    yield "2^-12", torch.full((n,), 2.0**-12)
    yield "2^-24", torch.full((n,), 2.0**-24)
    yield "whole numbers", whole(-20, 20).float()
    yield "halves", whole(-20, 20).float() / 2
    yield "24-bit whole numbers", whole(-(2**24), 2**24).float()
    yield "beside 1", 1 + whole(-3, 4).float() * 2.0**-23
    yield "subnormal", whole(1, 2**23).int().view(torch.float32)
    yield "below 2^-40", uniform() * 2.0**-40
    yield "about 1e7", uniform() * 1e7 + 1e6
    yield "about 1e30", uniform() * 1e30
    yield "-80 to -120", -80 - uniform() * 40
    half = uniform()[: n // 2]
    yield "of both signs, cancelling", torch.stack([half, -half], 1).flatten()


class _Names(TorchDispatchMode):
    """Records which operators of the table run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name[len("aten::") :]
        self.found |= {name, name.rstrip("_")}
        return func(*args, **(kwargs or {}))


class _TooLong(Exception):
    pass


def _interrupt(*_: Any) -> None:
    raise _TooLong


def seconds(numerics: str, case: Case, x: Tensor, gradient: Optional[str]) -> float:
    """Return the shortest time of the forward pass or, with a kind of gradient, of the backward pass."""
    best = float("inf")
    with reproml.exact() if numerics == "exact" else nullcontext():
        for _ in range(TIMED):
            leaf = x.clone().requires_grad_(gradient is not None)
            start = time.perf_counter()
            y = case(leaf)
            if gradient is not None:
                incoming = torch.ones_like(y) if gradient == "ones" else y.detach().clone()
                start = time.perf_counter()
                torch.autograd.grad(y, leaf, incoming)
            best = min(best, time.perf_counter() - start)
    return best


def worst(case: Case, n: int, gradients: tuple[Optional[str], ...]) -> tuple[float, str, float]:
    """Return the largest ratio of exact to native, the kind of input, and the exact time in seconds."""
    found = (0.0, "", 0.0)
    for kind, x in kinds(n):
        for gradient in gradients:
            signal.setitimer(signal.ITIMER_REAL, LIMIT)
            try:
                exact = seconds("exact", case, x, gradient)
            except _TooLong:
                exact = float("inf")
            except reproml.NotExactError:
                continue
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            ratio = min(exact / seconds("native", case, x, gradient), 99e3)
            found = max(
                found, (ratio, kind + (f", gradient {gradient}" if gradient else ""), exact)
            )
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Search the slowest inputs of each operator.")
    parser.add_argument("names", nargs="*", help="operators, default: all")
    parser.add_argument("--numbers", type=int, default=100_000, help="numbers of each input")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _interrupt)
    reached = _Names()
    print(f"exact / native, {args.numbers:,} numbers, one thread; milliseconds are exact")
    for name, case in CASES.items():
        if args.names and name not in args.names:
            continue
        ratio, kind, took = worst(case, args.numbers, (None,))
        print(f"{name:24} {ratio:9.1f} {took * 1e3:9.1f} ms  {kind}", flush=True)
        x = torch.randn(2000, requires_grad=True)
        with reproml.exact(), reached:
            y = case(x)
            if y.requires_grad:
                torch.autograd.grad(y, x, torch.ones_like(y))
        if y.requires_grad:
            ratio, kind, took = worst(case, args.numbers, ("ones", "the result"))
            print(f"{'':15} backward {ratio:9.1f} {took * 1e3:9.1f} ms  {kind}", flush=True)
    if not args.names:
        left = sorted(set(operator_table.EXACT) - reached.found)
        print(f"not reached: {' '.join(left)}")


if __name__ == "__main__":
    main(sys.argv[1:])
