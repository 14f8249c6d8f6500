"""Sums over the batch: exchanged unrounded, rounded once, those of a backward pass together at its end."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.distributed.partial_sums import Group, Partial, merge, refuse_unlike

raw = dispatcher.natively  # for what is no operator of the user's


# Why an optimizer's step refuses a tensor of this folder (operators/optimizers.py).
OPTIMIZER_REFUSAL = (
    "The optimizer's step met a gradient that backward() did not write, as it does where a "
    "wrapped model has the parameter: wrap the module that owns this parameter "
    "(reproml.distributed.DistributedDataParallel)."
)


class Pending(Tensor):
    """A gradient not known before the workers have met: an operator that reads it makes them meet."""

    _value: Callable[[], Tensor]
    optimizer_refusal = OPTIMIZER_REFUSAL

    @staticmethod
    def __new__(cls, like: Tensor, value: Callable[[], Tensor]) -> Pending:
        make: Any = Tensor._make_wrapper_subclass
        made: Pending = make(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._value = value
        return made

    def value(self) -> Tensor:
        """The gradient, plain. It is exchanged now if it was not."""
        with raw():
            return self._value()

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name[len("aten::") :] in _LOOKS:
            x, rest = args[0], args[1:]
            with raw():
                like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                like = func(like, *rest, **kwargs)
            return Pending(like, lambda: func(x.value(), *rest, **kwargs))
        args, kwargs = tree_map_only(Pending, Pending.value, (args, kwargs))
        return func(*args, **kwargs)


_LOOKS = frozenset("detach alias t transpose permute view _unsafe_view".split())


class _Bucket:
    """The sums of one backward pass that are not exchanged yet."""

    def __init__(self, group: Group, task: int) -> None:
        self.group = group
        self.task = task  # the backward pass
        self.waiting: list[Partial] = []
        self.results: list[Tensor] = []

    def add(self, partial: Partial) -> Callable[[], Tensor]:
        self.waiting.append(partial)
        number = len(self.waiting) - 1

        def result() -> Tensor:
            if not self.results:
                self.close()
            return self.results[number]

        return result

    def close(self) -> None:
        """Exchange all that wait, at once."""
        if self.waiting and not self.results:
            with raw():
                noted, _backward.noted = _backward.noted, 0
                self.results = merge(self.group, self.waiting, noted)
            self.waiting.clear()


class _Backward(threading.local):
    """The backward pass of this thread."""

    bucket: Optional[_Bucket] = None
    task = -1  # that has its end in the queue
    noted = 0  # CRC of what the workers have to agree on, since the last exchange


_backward = _Backward()
_at_end: list[Callable[[Group], None]] = []


def at_end_of_backward(function: Callable[[Group], None]) -> None:
    """Have it called whenever a backward pass that summed over a Sharded batch has ended."""
    _at_end.append(function)


def await_end(group: Group) -> int:
    """Have the backward pass that runs, if one does, exchange what waits at its end; its number or -1."""
    task = int(torch._C._current_graph_task_id())
    if task not in (-1, _backward.task):
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: _end_of_backward(group))
        _backward.task = task
    return task


def _end_of_backward(group: Group) -> None:
    bucket, _backward.bucket = _backward.bucket, None
    if bucket is not None:
        bucket.close()
    elif _backward.noted:  # all was computed from the gathered batch
        noted, _backward.noted = _backward.noted, 0
        with raw():
            refuse_unlike(group.to_all(torch.tensor([noted])))
    for function in _at_end:
        function(group)


def note(data: bytes) -> None:
    """Have the next exchange of gradients raise ReproError if the workers do not agree on it."""
    _backward.noted = zlib.crc32(data, _backward.noted)


def exchanged(group: Group, partial: Partial, shape: Sequence[int]) -> Tensor:
    """The whole sum, float32 of this shape: now, or within a backward pass at its end."""
    task = await_end(group)
    if task == -1:
        with raw():
            return merge(group, [partial])[0].reshape(shape)
    bucket = _backward.bucket
    if bucket is None or bucket.task != task or bucket.results:
        bucket = _backward.bucket = _Bucket(group, task)
    result = bucket.add(partial)
    with raw():
        like = partial.sums.new_empty(shape, dtype=torch.float32)
    return Pending(like, lambda: result().reshape(shape))
