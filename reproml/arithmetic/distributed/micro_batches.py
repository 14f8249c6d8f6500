"""A batch that is computed as several micro-batches, one after another.

To the rules of the operators a micro-batch is one of several workers: its rows are a `Sharded` tensor,
which represents the complete batch. But nothing can be exchanged with micro-batches that are not computed
yet. So a sum over the batch is a `Later` tensor: its terms are added to a running sum that keeps them
without rounding (running_sums.py), and its value is known after the last micro-batch. An operator on Later
tensors gives a Later tensor; an operator that needs a value, or combines one with rows, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any, Callable, NoReturn, Optional, Union
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reproml.arithmetic.dispatch.dispatcher import intercept_again, natively
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.distributed.partial_sums import Partial, Products
from reproml.arithmetic.distributed.running_sums import RunningSum
from reproml.arithmetic.distributed.tensors import DistributedTensor, map_tensors
from reproml.errors import NotExactError, ReproError
from reproml.torch_internals import (
    DisableAutocast,
    current_graph_task_id,
    disabled_torch_function_impl,
)


class _RunningRows:
    """The rows of a tensor, for functions of the batch that have no rule of their own."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.parts.append(rows.clone())

    def total(self) -> Tensor:
        return torch.cat(self.parts)


class Accumulation:
    """The gradients of one batch: what its micro-batches add to, in the order of their operators."""

    def __init__(self, batch: int) -> None:
        self.batch = batch  # rows of the complete batch
        self.rows = 0  # of the micro-batches so far
        self.current: Optional[MicroBatch] = None
        self.finished = False
        self.sums: list[tuple[Any, Any]] = []  # kind, and RunningSum or _RunningRows

    def begin(self, rows: int) -> MicroBatch:
        """Begin the next micro-batch, the first one after the end of the batch being refused."""
        self.end_of_micro_batch()
        if self.rows + rows > self.batch:
            raise ReproError(
                f"the micro-batches have {self.rows + rows} rows so far, but the batch has {self.batch}"
            )
        first = None if self.current is None else self.current.first or self.current
        self.current = MicroBatch(self, self.rows, rows, first)
        self.rows += rows
        return self.current

    def end_of_micro_batch(self) -> None:
        """Raise ReproError unless the current micro-batch did what the first one did."""
        current = self.current
        if current is None:
            return
        if not current.went_backward:
            raise ReproError(
                "a micro-batch had no backward pass; call backward() on the loss of each micro-batch "
                "before the model is called with the next one"
            )
        if current.count != len(self.sums):
            raise _different_operators()
        if current.first and current.first.checksum != current.checksum:
            raise ReproError(
                "the micro-batches computed with different numbers, so the gradients would differ from "
                "those of the complete batch; look for a number that is computed from the rows of a "
                "micro-batch, such as len(labels)"
            )

    def finish(self) -> None:
        """Make the values of Later tensors known. Raises ReproError if rows are missing."""
        self.end_of_micro_batch()
        if self.rows != self.batch:
            raise ReproError(
                f"the micro-batches have {self.rows} rows, but the batch has {self.batch}; give the number "
                "of rows of all micro-batches together"
            )
        self.finished = True


def _different_operators() -> ReproError:
    return ReproError(
        "the micro-batches computed with different operators, so they have no common sum; the model and "
        "the loss must do the same for each micro-batch"
    )


class MicroBatch:
    """Some consecutive rows of the batch: a partial_sums.Group, which cannot exchange anything."""

    rank = 0
    size = 2  # as of several workers: these are not all rows

    def __init__(
        self, accumulation: Accumulation, start: int, rows: int, first: Optional[MicroBatch]
    ) -> None:
        self.accumulation = accumulation
        self.start, self.rows = start, rows
        self.first = first  # the first micro-batch of the batch; None for the first one itself
        self.count = 0  # of the sums over the batch so far
        self.checksum = 0  # CRC-32 of the numbers that must be the same for all micro-batches
        self.went_backward = False
        self.draws = False  # whether random numbers are those of the first micro-batch
        self.models: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()

    def reduce(self, sums: Union[Products, Partial], shape: Sequence[int]) -> Tensor:
        """Return the sum over the batch, to which this micro-batch adds, in this shape."""
        m, n = sums.shape
        device = sums.device
        with natively():
            kind = ("sum", m, n, sums.dtype)
            running = self._running(kind, lambda: RunningSum(m, n, device, sums.dtype))
            running.add(sums)
            like = torch.empty(shape, dtype=sums.dtype, device=device)
        return Later(like, lambda: _natively(lambda: running.total().reshape(shape)), self)

    def gather(self, x: Tensor, dim: int, before: int, after: int) -> Later:
        """Return the Sharded x of the complete batch, to which this micro-batch adds its rows.

        Dimension `dim` counts before x rows x after elements.
        """
        local: Tensor = x.local  # type: ignore[attr-defined]
        with natively():
            rows = local.detach().unflatten(dim, (before, self.rows, after)).movedim(dim + 1, 0)
            running = self._running(("rows", *rows.shape[1:], rows.dtype), _RunningRows)
            running.add(rows)
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

        def value() -> Tensor:
            batch: Tensor = running.total().movedim(0, dim + 1)
            return batch.flatten(dim, dim + 2).contiguous()

        return Later(like, lambda: _natively(value), self)

    def apply(self, function: Callable[[Tensor], Tensor], x: Later, like: Tensor) -> Later:
        """Return function(x), computed when x is known. like: a tensor as the result will be."""
        return Later(like, lambda: _exactly(function, (x,), {}), self)

    def before_draw(self, generator: Any) -> None:
        """Refuse random numbers that would not be those of the complete batch."""
        if generator is not None or not (self.draws or current_graph_task_id() != -1):
            raise NotExactError(
                "random numbers for the rows of a micro-batch are those of the complete batch only within "
                "the model and from PyTorch's default generator; draw them there"
            )

    def _running(self, kind: Any, make: Callable[[], Any]) -> Any:
        """Return what the next sum of this micro-batch is added to."""
        a = self.accumulation
        if a.current is not self or a.finished:
            raise ReproError(
                "a micro-batch was used after the model was called with the next one; call backward() "
                "on the loss of each micro-batch before the model is called with the next one"
            )
        if self.first is None:
            a.sums.append((kind, make()))
        elif self.count >= len(a.sums) or a.sums[self.count][0] != kind:
            raise _different_operators()
        self.count += 1
        if current_graph_task_id() != -1:
            self.went_backward = True
        return a.sums[self.count - 1][1]

    def refuse_statistics(self, *_: Any) -> NoReturn:
        raise NotExactError(
            "a statistic over the batch, such as that of batch normalization in training, is not known "
            "before all micro-batches were computed; use layer or group normalization, or train with "
            "the complete batch"
        )

    start_all_to_all: Any = refuse_statistics
    start_all_gather: Any = refuse_statistics
    all_gather: Any = refuse_statistics
    broadcast: Any = refuse_statistics


class Later(DistributedTensor):
    """A tensor that depends on sums over the batch, whose value is known after the last micro-batch."""

    optimizer_refusal = (
        "The optimizer's step met a gradient that is not known before all micro-batches were computed: "
        "take the step after `with reproml.accumulate(...)`."
    )
    value: Callable[[], Tensor]
    micro_batch: MicroBatch

    @staticmethod
    def __new__(cls, like: Tensor, value: Callable[[], Tensor], micro_batch: MicroBatch) -> Later:
        made: Later = cls.without_memory(like)
        made.value, made.micro_batch = _once(value), micro_batch
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"Later(shape={list(self.shape)})"

    def full_tensor(self) -> Tensor:
        """Return the value. Raises NotExactError if it is not known yet."""
        if not self.micro_batch.accumulation.finished:
            _refuse_use()
        return self.value()

    __torch_function__: Any = disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = tensors([*args, *kwargs.values()])
        waiting = {x.micro_batch for x in operands if isinstance(x, Later) and not x.is_known}
        if not waiting or any(issubclass(t, DistributedTensor) and t is not Later for t in types):
            args, kwargs = map_tensors(Later, Later.full_tensor, (args, kwargs))
            return func(*args, **kwargs)
        if len(waiting) > 1:
            raise NotExactError(
                "the losses of two micro-batches were combined, but each of them is already the loss of "
                "the complete batch; use one of them, after `with reproml.accumulate(...)`"
            )
        return _later(func, args, kwargs, waiting.pop())

    @property
    def is_known(self) -> bool:
        return self.micro_batch.accumulation.finished


# Operators that read no element: their result is known.
_NEW = frozenset(
    """
    empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full new_empty_strided
""".split()
)


def _later(func: Any, args: Any, kwargs: Any, micro_batch: MicroBatch) -> Any:
    """Return the result of an operator, which is computed when the values of its operands are known."""
    name = func._schema.name[len("aten::") :]
    device = next(x.device for x in tensors([*args, *kwargs.values()]) if isinstance(x, Later))
    device = kwargs.get("device") or device
    if name in _NEW:
        with natively():
            args, kwargs = map_tensors(Later, lambda x: _empty(x, device), (args, kwargs))
        return func(*args, **kwargs)
    if name == "add_" and isinstance(args[0], Later):
        x, before, rest = args[0], args[0].value, args[1:]
        x.value = _once(lambda: _exactly(func, (before().clone(), *rest), kwargs))
        return x
    if func._schema.is_mutable:
        _refuse_use()
    with natively():
        meta = map_tensors(Tensor, lambda x: _empty(x, torch.device("meta")), (args, kwargs))
        if kwargs.get("device"):  # of a cast, as of a gradient within autocast
            meta[1]["device"] = torch.device("meta")
        try:
            results = func(*meta[0], **meta[1])
        except RuntimeError:  # an operator that reads elements, such as `item`
            _refuse_use()
    compute = _once(lambda: _exactly(func, args, kwargs))

    def wrap(x: Any, pick: Callable[[Any], Any]) -> Any:
        if x is None:
            return None
        if not isinstance(x, Tensor):
            _refuse_use()
        with natively():
            like = _empty(x, device)
        return Later(like, lambda: pick(compute()), micro_batch)

    if isinstance(results, (tuple, list)):
        wrapped = [wrap(x, itemgetter(k)) for k, x in enumerate(results)]
        return wrapped if isinstance(results, list) else tuple(wrapped)
    return wrap(results, lambda result: result)


def _refuse_use() -> NoReturn:
    raise NotExactError(
        "a number that depends on the complete batch, such as its loss, a statistic or the number of rows "
        "that count in a mean, was used before all micro-batches were computed; use it after `with "
        "reproml.accumulate(...)`, divide a sum by a number, or train with the complete batch"
    )


def _empty(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def _exactly(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operator within exact(), when the values of its operands are known.

    It ran within autocast already, if at all: its operands are cast.
    """
    args, kwargs = map_tensors(Later, Later.full_tensor, (args, kwargs))
    with intercept_again(), torch.no_grad(), DisableAutocast():
        return func(*args, **kwargs)


def _natively(function: Callable[[], Tensor]) -> Tensor:
    with natively():
        return function()


def _once(function: Callable[[], Any]) -> Callable[[], Any]:
    """Return the function, which computes its result when it is called for the first time."""
    results: list[Any] = []

    def once() -> Any:
        if not results:
            results.append(function())
        return results[0]

    return once
