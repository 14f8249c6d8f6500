"""Checks all 2^32 float32 inputs of a function of one variable, or every N-th, against other evaluations.

    python -m verification.exhaustive [--function NAME ...] [--stride N]    # default: all, stride 65537

Each result is compared with PyTorch's native float64 function, cast to float32. Where the two differ, where
the rounding test failed, and at random inputs, the result is compared with mpmath's at 1,200 bits. Stride 1
takes some minutes a function, but the ties of gelu's subnormal results take hours.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import evaluate
from verification import oracle

CHUNK = 1 << 20
SAMPLE = 32  # random inputs of each chunk that mpmath evaluates
SHOWN = 5

# name -> (float64 evaluation, exact evaluation)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "exp": (torch.exp, oracle.exp),
    "expm1": (torch.expm1, oracle.expm1),
    "log": (torch.log, oracle.log),
    "log1p": (torch.log1p, oracle.log1p),
    "sin": (torch.sin, oracle.sin),
    "cos": (torch.cos, oracle.cos),
    "tanh": (torch.tanh, oracle.tanh),
    "sigmoid": (torch.sigmoid, oracle.sigmoid),
    "erf": (torch.erf, oracle.erf),
    "erfinv": (torch.erfinv, oracle.erfinv),
    "sqrt": (torch.sqrt, oracle.sqrt),
    "rsqrt": (torch.rsqrt, lambda x: 1 / oracle.sqrt(x)),
    "gelu": (
        lambda x: x * torch.special.erfc(x * -(0.5**0.5)) / 2,
        lambda x: oracle.real(x) * oracle.erfc(-oracle.real(x) / oracle.sqrt(2)) / 2,
    ),
}

# Outside these ranges every input takes the exact path, a millisecond each: only the sample is evaluated.
RANGES = {
    "exp": (-torch.inf, 709.0),
    "expm1": (-torch.inf, 709.0),
    "sin": (-(2.0**19), 2.0**19),
    "cos": (-(2.0**19), 2.0**19),
    "tanh": (-(2.0**23), 2.0**23),
    "erfinv": (-1.0, 1.0),
    "gelu": (-14.0, torch.inf),
}


def inputs(start: int, stop: int, stride: int) -> Tensor:
    """Return the float32 numbers with the bit patterns start, start + stride, ... below stop."""
    return torch.from_numpy(np.arange(start, stop, stride, dtype=np.uint32).view(np.float32))


def same(x: Tensor, y: Tensor) -> Tensor:
    return (x.view(torch.int32) == y.view(torch.int32)) | (x.isnan() & y.isnan())


class Failures:
    """Collects the inputs that fail the rounding test while the context is active."""

    def __enter__(self) -> Failures:
        self.inputs: list[float] = []
        self._before = evaluate.exact_elements

        def counted(formula: Any, rows: Any) -> Any:
            self.inputs += rows[:, 0].tolist()
            return self._before(formula, rows)

        evaluate.exact_elements = counted
        return self

    def __exit__(self, *_: Any) -> None:
        evaluate.exact_elements = self._before


def check(name: str, stride: int) -> int:
    """Check a function and print a summary; return the number of wrong results."""
    native, exact = FUNCTIONS[name]
    definition = operator_table.EXACT[name]
    total = failed = differing = decided = wrong = 0
    rng, begun = np.random.default_rng(0), time.perf_counter()
    for start in range(0, 1 << 32, CHUNK * stride):
        x = inputs(start, min(start + CHUNK * stride, 1 << 32), stride)
        sample = x[torch.from_numpy(rng.integers(len(x), size=SAMPLE))]
        low, high = RANGES.get(name, (-torch.inf, torch.inf))
        x = x[x.isnan() | ((x >= low) & (x <= high))]
        with Failures() as failures:
            y = definition(x)
        differ = ~same(y, native(x.double()).float()) & ~x.isnan()
        doubtful = set(x[differ].tolist()) | set(failures.inputs)
        doubtful |= set(sample.tolist())
        doubtful = {v for v in doubtful if v == v}
        if doubtful:
            points = torch.tensor(sorted(doubtful), dtype=torch.float32)
            values = [oracle.float_of(exact(v)) for v in points.tolist()]
            bad = ~same(definition(points), torch.tensor(values, dtype=torch.float32))
            for v in points[bad].tolist()[: max(0, SHOWN - wrong)]:
                print(f"  {name}({v.hex()}) is wrong", flush=True)
            wrong += int(bad.sum())
        total += len(x)
        failed += len(failures.inputs)
        differing += int(differ.sum())
        decided += len(doubtful)
    print(
        f"{name:8} {total:12,} inputs, {failed:8,} failed the rounding test, {differing:8,} differ from "
        f"native float64, {decided:8,} compared with mpmath, {wrong} wrong; "
        f"{time.perf_counter() - begun:.0f} s",
        flush=True,
    )
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Check every N-th float32 input of functions of one variable."
    )
    parser.add_argument("--function", choices=sorted(FUNCTIONS), action="append")
    parser.add_argument("--stride", type=int, default=65537)
    chosen = parser.parse_args()
    return 1 if sum(check(name, chosen.stride) for name in chosen.function or FUNCTIONS) else 0


if __name__ == "__main__":
    sys.exit(main())
