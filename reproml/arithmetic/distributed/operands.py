"""What the rules read of an operator's arguments, and plain tensors that come beside a batch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Callable, NoReturn, Optional

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.dispatch.schema import tensors as tensors
from reproml.arithmetic.distributed.pending import Pending, await_end, note, raw
from reproml.arithmetic.distributed.sharded import Rows, Sharded
from reproml.errors import NotExactError


def refuse(func: Any, why: str) -> NoReturn:
    raise NotExactError(
        f"{func} is not defined for a batch that is dealt to several workers: {why}; "
        "compute it from the rows of one worker before the model, or from results without the batch"
    )


def first_batch(args: Any, kwargs: Any) -> Sharded:
    return next(x for x in tensors([*args, *kwargs.values()]) if isinstance(x, Sharded))


def own_part(func: Any, x: Any, at: Rows) -> Any:
    """This worker's part of an operand that broadcasts against one whose batch is `at`, dim from the right.

    A plain tensor has the whole batch, or (labels, say) just this worker's rows, or none of it.
    """
    if isinstance(x, Sharded):
        if replace(x.at, dim=x.at.dim - x.dim()) != at:
            refuse(func, "its operands have the batch in different places")
        return x.local
    if not isinstance(x, Tensor) or x.dim() < -at.dim or x.shape[at.dim] == 1:
        return x
    if x.shape[at.dim] == at.all:
        with raw():
            return at.of(x, x.dim() + at.dim)
    if x.shape[at.dim] == at.own:
        return x
    refuse(func, f"an operand of shape {list(x.shape)} has neither all of the batch nor its share")


def with_batch(result: Any, at: Rows, strides: Optional[Sequence[int]] = None) -> Any:
    """Results that have the batch, at.dim counted from the right."""

    def wrap(x: Tensor) -> Tensor:
        return Sharded(x, at.moved(x.dim() + at.dim), strides) if x.dim() >= -at.dim else x

    return tree_map_only(Tensor, wrap, result)


def from_the_right(x: Sharded) -> Rows:
    """Its rows, the dimension counted from the right."""
    return x.at.moved(x.at.dim - x.dim())


def by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by the schema's names."""
    schema = func._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**values, **{a.name: x for a, x in zip(schema, args)}, **kwargs}


def dimensions(dim: Any, rank: int) -> list[int]:
    """PyTorch's `dim`, from the left; all for none."""
    given = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return [d % rank for d in given]


def note_operands(args: Any, kwargs: Any, may_have_rows: bool) -> None:
    """Of each number and plain tensor beside a batch a sample: it may come from one worker's rows.

    may_have_rows: whether the operator takes plain tensors with this worker's rows, which differ.
    """
    at = from_the_right(first_batch(args, kwargs))
    shares = [at.length(at.held(r)) for r in range(at.group.size)]

    def has_rows(x: Tensor) -> bool:  # of this worker, perhaps; the same decision on all workers
        return may_have_rows and x.dim() >= -at.dim and x.shape[at.dim] in shares

    for x in args if len(shares) > 1 else ():
        if type(x) is float:
            note(struct.pack("<d", x))
        elif type(x) in (Tensor, Parameter) and x.is_floating_point() and x.is_cpu and x.numel():
            if not has_rows(x):
                with raw():
                    value = float(x[(0,) * x.dim()])
                note(struct.pack("<d", value) if value == value else b"nan")
    if len(shares) > 1:
        await_end(at.group)


def with_target(count: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """For the arguments of a loss, of which the first `count` have rows: known as those of the batch."""

    def prepared(args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, kwargs = first_batch(args, kwargs), dict(kwargs)

        def mark(y: Any) -> Any:
            return rows_of(y, x) if isinstance(y, Tensor) else y

        for name, y in kwargs.items():  # a weight has rows if it is one of each element
            if name != "pos_weight" and (
                name != "weight" or (y is not None and y.dim() == x.dim())
            ):
                kwargs[name] = mark(y)
        return [*map(mark, args[:count]), *args[count:]], kwargs

    return prepared


def rows_of(y: Any, x: Any) -> Any:
    """A tensor beside a batch with rows in the first dimension: the whole batch's, or this worker's."""
    if not isinstance(x, Sharded) or isinstance(y, Sharded) or x.at.dim or not y.dim():
        return y
    if len(y) not in (x.at.own, x.at.all):
        raise NotExactError(
            f"The target has {len(y)} rows, the batch {x.at.all}, of which {x.at.own} are here."
        )
    with raw():
        return Sharded(x.at.of(y, 0).contiguous() if len(y) == x.at.all else y, x.at)


def with_rows(name: str, args: Any) -> Any:
    """The arguments of an elementwise function, or gather, with this worker's rows known as such.

    Autograd keeps operands for the backward pass, where nothing else may tell whose rows they are.
    """
    x = next((x for x in tensors(args) if isinstance(x, Sharded)), None)
    if x is None or (name in ("gather", "take_along_dim") and args[1] % x.dim() == x.at.dim):
        return args
    if not isinstance(args[0], Sharded) and (name.endswith("_") and name.strip("_") == name[:-1]):
        return args  # what is written to stays what it is
    at = from_the_right(x)

    def mark(y: Any) -> Any:
        plain = isinstance(y, Tensor) and not isinstance(y, (Sharded, Pending))
        return Sharded(y, at.moved(y.dim() + at.dim)) if plain and _is_own(y, at) else y

    return [mark(y) for y in args]


def _is_own(y: Tensor, at: Rows) -> bool:
    """Whether a plain tensor has this worker's rows, at.dim counted from the right."""
    if y.requires_grad or y.dim() < -at.dim or at.group.size == 1:
        return False
    n, shares = y.shape[at.dim], [at.length(at.held(r)) for r in range(at.group.size)]
    if n not in (1, at.own) or n == at.all != 1:
        return False
    if 1 not in shares:
        return bool(n == at.own)
    with raw():  # a single row looks like what all have: the others know
        return at.group.to_all(torch.tensor(n, device=y.device)).tolist() == shares


def with_state(dim: int) -> Callable[[Any, Any], tuple[Any, Any]]:
    """For the arguments of a recurrent layer, whose first state has the batch in `dim`."""

    def prepared(args: Any, kwargs: Any) -> tuple[Any, Any]:
        x, state, *rest = args
        if not isinstance(x, Sharded) or isinstance(state, Sharded) or x.dim() != dim + 2:
            return args, kwargs
        at = x.at.moved(dim)

        def mark(y: Tensor) -> Tensor:
            return Sharded(own_part(None, y, at.moved(dim - y.dim())).contiguous(), at)

        with raw():
            return (x, tree_map_only(Tensor, mark, state), *rest), kwargs

    return prepared
