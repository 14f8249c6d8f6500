"""The arguments of an operator for the rules: plain tensors beside a batch, sharded like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, NoReturn, Optional

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.distributed.pending import Pending
from reproml.arithmetic.distributed.sharded import (
    RoundRobinShard,
    Sharded,
    first_sharded,
    shard_from_right,
)
from reproml.arithmetic.distributed.tensors import map_tensors
from reproml.errors import NotExactError, ReproError
from reproml.torch_internals import tree_leaves, tree_map_only


def refuse(func: Any, why: str) -> NoReturn:
    raise NotExactError(
        f"{func} is not supported for a batch that is sharded over several workers: {why}; "
        "compute it from this worker's rows before they enter the model, or from a result that has no "
        "batch dimension"
    )


def arguments_by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments, defaults included, by their names in the schema."""
    schema = func._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**values, **{a.name: x for a, x in zip(schema, args)}, **kwargs}


def normalize_dims(dim: Any, rank: int) -> list[int]:
    """Return PyTorch's `dim` as a list of dimensions counted from the left; all of them for None."""
    dims = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return [d % rank for d in dims]


def local_operand(func: Any, x: Any, shard: RoundRobinShard) -> Any:
    """Return this worker's rows of an operand that broadcasts against a batch with this shard.

    shard: with its dimension counted from the right.
    A plain tensor has the global batch, this worker's rows (labels, for example), or no batch.
    """
    if isinstance(x, Sharded):
        if x.shard.at_dim(x.shard.dim - x.dim()) != shard:
            refuse(func, "its operands have the batch in different dimensions")
        return x.local
    if not isinstance(x, Tensor) or x.dim() < -shard.dim or x.shape[shard.dim] == 1:
        return x
    if x.shape[shard.dim] == shard.global_size:
        with natively():
            return shard.local_rows(x, x.dim() + shard.dim)
    if x.shape[shard.dim] == shard.local_size:
        return x
    refuse(
        func,
        f"an operand of shape {list(x.shape)} has neither the {shard.global_size} rows of the global "
        f"batch nor the {shard.local_size} of this worker",
    )


def as_sharded(
    results: Any, shard: RoundRobinShard, strides: Optional[Sequence[int]] = None
) -> Any:
    """Return the results that have the batch as Sharded tensors. shard: counted from the right."""

    def wrap(x: Tensor) -> Tensor:
        if x.dim() < -shard.dim:
            return x
        return Sharded(x, shard.at_dim(x.dim() + shard.dim), strides)

    return map_tensors(Tensor, wrap, results)


def shard_like(y: Any, x: Any) -> Any:
    """Return y sharded like the batch x, if both have rows in dimension 0; else y itself.

    A plain y has the rows of the global batch or of this worker.
    """
    if not isinstance(x, Sharded) or isinstance(y, Sharded) or x.shard.dim or not y.dim():
        return y
    sizes = x.shard.local_size, x.shard.global_size
    if len(y) not in sizes:
        raise NotExactError(
            f"The target has {len(y)} rows, but the global batch has {sizes[1]} rows and this worker "
            f"{sizes[0]}."
        )
    with natively():
        local = x.shard.local_rows(y, 0).contiguous() if len(y) == sizes[1] else y
        return Sharded(local, x.shard)


def shard_inputs(inputs: Any, shard_of: Callable[[int], RoundRobinShard]) -> Any:
    """Return the inputs of a model with their tensors, which have the rows of this worker, Sharded.

    shard_of: called with the number of rows; it returns the shard.
    """
    lengths = {len(x) for x in tree_leaves(inputs) if _has_rows(x)}
    if not lengths:
        return inputs
    if len(lengths) > 1:
        raise ReproError(
            f"the model's inputs have {sorted(lengths)} rows, but all must have the same number, "
            "one for each row of the batch"
        )
    shard = shard_of(lengths.pop())

    def shard_input(x: Tensor) -> Tensor:
        if not _has_rows(x):
            return x
        if x.requires_grad and torch.is_grad_enabled():
            raise NotExactError(
                "an input of the wrapped model requires a gradient, which would be lost: "
                "wrap the module that computes it as well, or detach it"
            )
        return Sharded(x, shard)

    return tree_map_only(Tensor, shard_input, inputs)


def _has_rows(x: Any) -> bool:
    """Whether an input is a plain tensor with rows, so of this worker."""
    return isinstance(x, Tensor) and not isinstance(x, Sharded) and x.dim() > 0


# ---- functions of torch: (function, args, kwargs) -> (args, kwargs), plain tensors made Sharded -------

Prepare = Callable[[Any, Any, Any], tuple[Any, Any]]


def shard_targets(count: int) -> Prepare:
    """Return a function for losses whose first `count` arguments have rows."""

    def prepare(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x = first_sharded(args, kwargs)

        def prepare_one(name: str, y: Any) -> Any:
            if not isinstance(y, Tensor) or name == "pos_weight":
                return y
            if name == "weight" and y.dim() != x.dim():  # one weight per class
                return y
            return shard_like(y, x)

        first = [prepare_one("", y) for y in args[:count]]
        return [*first, *args[count:]], {k: prepare_one(k, y) for k, y in kwargs.items()}

    return prepare


def shard_local_operands(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Prepare an elementwise function, or gather, whose plain operands may have this worker's rows.

    Autograd keeps operands for the backward pass, where nothing else identifies whose rows they are.
    """
    name = func.__name__
    x = next((x for x in tensors(args) if isinstance(x, Sharded)), None)
    if x is None or (name in ("gather", "take_along_dim") and args[1] % x.dim() == x.shard.dim):
        return args, kwargs
    in_place = name.endswith("_") and name.strip("_") == name[:-1]
    if in_place and not isinstance(args[0], Sharded):
        return args, kwargs  # the tensor that is written to stays plain
    shard = shard_from_right(x)

    def prepare_one(y: Any) -> Any:
        if not isinstance(y, Tensor) or isinstance(y, (Sharded, Pending)):
            return y
        return Sharded(y, shard.at_dim(y.dim() + shard.dim)) if _is_local(y, shard) else y

    return [prepare_one(y) for y in args], kwargs


def _is_local(y: Tensor, shard: RoundRobinShard) -> bool:
    """Whether a plain tensor has this worker's rows. shard: counted from the right."""
    if y.requires_grad or y.dim() < -shard.dim or shard.group.size == 1:
        return False
    n = y.shape[shard.dim]
    if n not in (1, shard.local_size) or n == shard.global_size != 1:
        return False
    return shard.is_local_count(n, y.device)


def shard_hidden_state(dim: int) -> Prepare:
    """Return a function for recurrent layers whose initial state has the batch in `dim`."""

    def prepare(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, state, *rest = args
        if not isinstance(x, Sharded) or isinstance(state, Sharded) or x.dim() != dim + 2:
            return args, kwargs
        shard = x.shard.at_dim(dim)

        def prepare_one(y: Tensor) -> Tensor:
            local = local_operand(func, y, shard.at_dim(dim - y.dim()))
            return Sharded(local.contiguous(), shard)

        with natively():
            return (x, map_tensors(Tensor, prepare_one, state), *rest), kwargs

    return prepare
