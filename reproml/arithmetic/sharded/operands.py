"""What the rules read of an operator's arguments, and plain tensors that come beside a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Callable, NoReturn, Optional

from torch import Tensor
from torch.utils._pytree import tree_map_only

from reproml.arithmetic import NotExactError
from reproml.arithmetic.sharded.exchange import raw
from reproml.arithmetic.sharded.tensor import Rows, Sharded


def refuse(func: Any, why: str) -> NoReturn:
    raise NotExactError(
        f"{func} is not defined for a batch that is dealt to several workers: {why}; "
        "compute it from the rows of one worker before the model, or from results without the batch"
    )


def tensors(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from tensors(x)


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


def with_target(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a loss with the target's rows known as those of the batch."""
    args, kwargs = list(args), dict(kwargs)
    x = args[0] if args else kwargs.get("input")
    if len(args) > 1:
        args[1] = rows_of(args[1], x)
    elif "target" in kwargs:
        kwargs["target"] = rows_of(kwargs["target"], x)
    return args, kwargs


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
