"""Numbers that are hard to add up, and comparison of the reference path with the compiled paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import pytest
import torch

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.formats import rounding_to
from verification.oracle import same_bits

KINDS = ["normal", "integers", "ties", "wide", "cancelling", "far", "constant", "sparse"]


def numbers(shape: tuple[int, ...], kind: str = "normal", seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    if kind == "integers":
        return torch.round(3 * x)
    if kind == "ties":  # integers, and halves of an ulp of 1
        return torch.round(x) + torch.round(4 * x) * 2.0**-24
    if kind == "wide":
        return x * torch.pow(2.0, torch.round(40 * torch.randn(shape, generator=random)))
    if kind == "cancelling":
        half = x[..., : shape[-1] // 2]
        return torch.cat([half, -half * (1 + 2.0**-22), x[..., 2 * half.shape[-1] :]], -1)
    if kind == "far":  # from zero
        return x * 1e-3 + 1000
    if kind == "constant":
        return torch.full(shape, 0.1)
    if kind == "sparse":  # as after relu
        return torch.relu(x - 1) * 1e-20
    return x


def limit_vectors(doubles: int, *dtypes: torch.dtype) -> None:
    """Let the kernels that round to these dtypes use vectors of at most so many doubles."""
    for dtype in dtypes:
        with rounding_to(dtype):
            kernels.loops().reproml_limit_vectors(doubles)


@contextmanager
def path_of_products(
    path: Any, monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype
) -> Iterator[None]:
    """Run PyTorch's own kernels ("reference"), or the compiled ones with vectors of so many doubles."""
    if path == "reference":
        monkeypatch.setattr(kernels, "library", None)
        yield
    elif kernels.library is None:
        pytest.skip("the kernels are not built")
    else:
        limit_vectors(path, *dtypes)
        yield
        limit_vectors(8, *dtypes)


def reference(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return the function's result on the reference path, without compiled kernels."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(kernels, "library", None)
        return function(*arguments, **options)


def agree(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Assert that both paths return the same bits; return the result."""
    found, expected = function(*arguments, **options), reference(function, *arguments, **options)
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, expected))):
        assert (x is None and y is None) or same_bits(x, y), (function, [str(a) for a in arguments])
    return found


def with_threads(function: Callable[..., Any], *arguments: Any) -> None:
    """Assert that the number of threads does not matter."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(function(*arguments))
    finally:
        torch.set_num_threads(before)
    first, *rest = [r if isinstance(r, tuple) else (r,) for r in results]
    assert all(same_bits(x, y) for other in rest for x, y in zip(first, other))
