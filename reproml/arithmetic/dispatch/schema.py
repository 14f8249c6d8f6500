"""What an operator is given: its tensors, and those of them that it writes to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor


def tensors(data: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries, in order."""
    if isinstance(data, Tensor):
        yield data
        return
    if isinstance(data, dict):
        data = data.values()
    elif not isinstance(data, (list, tuple)):
        return
    for x in data:
        yield from tensors(x)


def written(operator: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The operands that it writes to."""
    for i, name in writes(operator):
        yield from tensors(args[i] if i < len(args) else kwargs.get(name))


@cache
def writes(operator: Any) -> list[tuple[int, str]]:
    """Their places and names. Of batch norm's running statistics the schema does not say so."""
    statistics = ("running_mean", "running_var") if "batch_norm" in str(operator) else ()
    return [
        (i, x.name)
        for i, x in enumerate(operator._schema.arguments)
        if x.name in statistics or (x.alias_info is not None and x.alias_info.is_write)
    ]
