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
from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reproml
from benchmarks.worst_cases import CASES, Case
from reproml.arithmetic import operator_table

LIMIT = 10  # seconds
TIMED = 3  # repetitions, of which the shortest counts


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
                native = seconds("native", case, x, gradient)
                exact = seconds("exact", case, x, gradient)
            except _TooLong:
                exact = float("inf")
            except (reproml.NotExactError, RuntimeError):
                continue  # such numbers have no result, as no inverse
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            kind_of_both = kind + (f", gradient {gradient}" if gradient else "")
            found = max(found, (min(exact / native, 99e3), kind_of_both, exact))
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
        x = torch.randn(args.numbers, requires_grad=True)
        with reproml.exact(), reached:
            y = case(x)
            has_gradient = y.requires_grad
            if has_gradient:
                try:
                    torch.autograd.grad(y, x, torch.ones_like(y))
                except RuntimeError:  # PyTorch has none, as of unique
                    has_gradient = False
        if has_gradient:
            ratio, kind, took = worst(case, args.numbers, ("ones", "the result"))
            print(f"{'':15} backward {ratio:9.1f} {took * 1e3:9.1f} ms  {kind}", flush=True)
    if not args.names:
        left = sorted(set(operator_table.EXACT) - reached.found)
        print(f"not reached: {' '.join(left)}")


if __name__ == "__main__":
    main(sys.argv[1:])
