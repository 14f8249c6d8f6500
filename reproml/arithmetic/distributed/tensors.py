"""The base class of tensors whose value is not known to this process alone."""

from __future__ import annotations

from typing import Any, Callable

from torch import Tensor


def map_tensors(kind: type[Tensor], function: Callable[[Any], Any], data: Any) -> Any:
    """Apply a function to the tensors of a kind in nested lists, tuples and dictionaries.

    PyTorch's tree_map_only knows more containers and takes several times as long.
    """
    if isinstance(data, kind):
        return function(data)
    if isinstance(data, (list, tuple)):
        mapped = [map_tensors(kind, function, x) for x in data]
        return mapped if isinstance(data, list) else tuple(mapped)
    if isinstance(data, dict):
        return {name: map_tensors(kind, function, x) for name, x in data.items()}
    return data


class DistributedTensor(Tensor):
    """A tensor whose value is not in one place: Sharded, Pending or Later."""

    # Why the step of an optimizer refuses such a tensor (operators/optimizers.py).
    optimizer_refusal = (
        "The optimizer's step met a gradient that backward() did not write, as it does where a "
        "wrapped model has the parameter: wrap the module that owns this parameter "
        "(reproml.distributed.DistributedDataParallel)."
    )

    def full_tensor(self) -> Tensor:
        """Return the plain tensor of the global batch. Collective: every worker has to call it."""
        raise NotImplementedError
