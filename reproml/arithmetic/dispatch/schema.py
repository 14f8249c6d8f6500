"""The operands of an operator: which are tensors, and which of these it mutates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor


def tensors(data: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(data, Tensor):
        yield data
        return
    if isinstance(data, dict):
        data = data.values()
    elif not isinstance(data, (list, tuple)):
        return
    for x in data:
        yield from tensors(x)


def mutated_operands(operator: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the operands that the operator writes to."""
    for i, name in mutated_arguments(operator):
        yield from tensors(args[i] if i < len(args) else kwargs.get(name))


@cache
def mutated_arguments(operator: Any) -> list[tuple[int, str]]:
    """Return index and name of every argument that the operator mutates.

    PyTorch's schema does not mark batch norm's running statistics as mutated."""
    statistics = ("running_mean", "running_var") if "batch_norm" in str(operator) else ()
    return [
        (i, x.name)
        for i, x in enumerate(operator._schema.arguments)
        if x.name in statistics or (x.alias_info is not None and x.alias_info.is_write)
    ]
