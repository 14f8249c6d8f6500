"""Gradients that are sums over the batch: exchanged together at the end of a backward pass."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.distributed.micro_batches import MicroBatch
from reproml.arithmetic.distributed.partial_sums import (
    DTYPES,
    Exchange,
    Group,
    Partial,
    Products,
    all_reduce,
    check_agreement,
    finish,
)
from reproml.arithmetic.distributed.tensors import DistributedTensor, map_tensors
from reproml.torch_internals import (
    current_graph_task_id,
    disabled_torch_function_impl,
    execution_engine,
)


class Pending(DistributedTensor):
    """A gradient that is not exchanged yet. An operator that reads it has it exchanged."""

    _value: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, value: Callable[[], Tensor]) -> Pending:
        made: Pending = cls.without_memory(like)
        made._value = value
        return made

    def full_tensor(self) -> Tensor:
        """Return the gradient as a plain tensor, after exchanging it if necessary."""
        with natively():
            return self._value()

    __torch_function__: Any = disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name[len("aten::") :]
        if name in _VIEWS or (name == "_to_copy" and _casts_once(args[0], kwargs)):
            x, rest = args[0], args[1:]
            with natively():
                like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                like = func(like, *rest, **kwargs)
            return Pending(like, lambda: func(x.full_tensor(), *rest, **kwargs))
        args, kwargs = map_tensors(Pending, Pending.full_tensor, (args, kwargs))
        return func(*args, **kwargs)


def _casts_once(x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Return whether a copy is a cast that has one rounding natively, as of a gradient within autocast."""
    if (kwargs.get("device") or x.device) != x.device:
        return False
    return x.dtype in DTYPES and kwargs.get("dtype") in DTYPES


# Operators that do not read the elements: their result is pending as well.
_VIEWS = frozenset("detach alias t transpose permute view _unsafe_view".split())


_ENOUGH = 1 << 19  # sums that are exchanged while the backward pass continues


class _Bucket:
    """The sums of one backward pass, which are exchanged while it continues, some of them together."""

    def __init__(self, group: Group, graph_task: int) -> None:
        self.group = group
        self.graph_task = graph_task  # PyTorch's number of the backward pass
        self.waiting: list[Partial] = []
        self.exchanges: list[Exchange] = []
        self.count = 0  # of the sums so far
        self.results: list[Tensor] = []  # empty until all are exchanged

    def add(self, partial: Partial) -> Callable[[], Tensor]:
        """Return a function that returns the sum, exchanging the bucket if necessary."""
        self.waiting.append(partial)
        self.count += 1
        number = self.count - 1
        if sum(p.sums.numel() for p in self.waiting) >= _ENOUGH:
            with natively():
                self._start()

        def result() -> Tensor:
            self.finish()
            return self.results[number]

        return result

    def _start(self) -> None:
        """Send the sums that wait to their owners, then the results of those sent before to all."""
        self.exchanges.append(Exchange(self.group, self.waiting))
        self.waiting = []
        for exchange in self.exchanges[-2:-1]:
            exchange.send_results()

    def finish(self) -> None:
        """Wait until all sums are exchanged."""
        if self.results:
            return
        with natively():
            if self.waiting:
                self._start()
            self.exchanges[-1].send_results(_backward.take_checksum())
            self.results = finish(self.exchanges)
        self.exchanges.clear()


class _Backward(threading.local):
    """The backward pass of this thread: all the state that this module keeps between calls."""

    bucket: Optional[_Bucket] = None
    graph_task = -1  # the last backward pass that has `_end_of_backward` in its queue
    checksum = 0  # CRC-32 of the numbers on which the workers must agree, since the last exchange

    def take_checksum(self) -> int:
        """Return the checksum and start a new one."""
        checksum, self.checksum = self.checksum, 0
        return checksum


_backward = _Backward()


def exchange_at_end(group: Group) -> int:
    """Have the running backward pass exchange its sums at its end; return its number, -1 if none runs."""
    task = int(current_graph_task_id())
    if isinstance(group, MicroBatch):
        group.went_backward |= task != -1
        return task
    if task not in (-1, _backward.graph_task):
        execution_engine.queue_callback(lambda: _end_of_backward(group))
        _backward.graph_task = task
    return task


def _end_of_backward(group: Group) -> None:
    """Exchange the sums that wait, and write the gradients of the wrapped models' parameters."""
    bucket, _backward.bucket = _backward.bucket, None
    if bucket is not None:
        bucket.finish()
    elif _backward.checksum:  # every gradient was computed from the gathered batch
        with natively():
            check_agreement(group.all_gather(torch.tensor([_backward.take_checksum()])))
    for model in group.models:
        for p in model.parameters():
            if isinstance(p.grad, DistributedTensor):
                p.grad = p.grad.full_tensor()


def add_to_checksum(group: Group, data: bytes) -> None:
    """Have the next exchange of gradients raise ReproError unless all workers added the same data.

    For micro-batches, the beginning of the next one does.
    """
    if isinstance(group, MicroBatch):
        group.checksum = zlib.crc32(data, group.checksum)
        return
    _backward.checksum = zlib.crc32(data, _backward.checksum)


def without_exchange(group: Group, total: Tensor) -> Tensor:
    """Return a sum over the batch that needs no exchange in the form of `reduce_over_batch`."""
    return total if exchange_at_end(group) == -1 else Pending(total, lambda: total)


def reduce_over_batch(group: Group, sums: Union[Products, Partial], shape: Sequence[int]) -> Tensor:
    """Return the sum over all workers in this shape.

    Within a backward pass the result is Pending until its end; else the sum is exchanged now. With
    micro-batches it is Later.
    """
    if isinstance(group, MicroBatch):
        return group.reduce(sums, shape)
    task = exchange_at_end(group)
    with natively():
        partial = sums.partial() if isinstance(sums, Products) else sums
    if task == -1:
        with natively():
            return all_reduce(group, [partial])[0].reshape(shape)
    bucket = _backward.bucket
    if bucket is None or bucket.graph_task != task or bucket.results:
        bucket = _backward.bucket = _Bucket(group, task)
    result = bucket.add(partial)
    with natively():
        like = partial.sums.new_empty(shape, dtype=partial.dtype)
    return Pending(like, lambda: result().reshape(shape))
