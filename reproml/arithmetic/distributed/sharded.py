"""A tensor that represents the global batch: each worker holds some of its rows."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import Parameter

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.distributed.micro_batches import Later, MicroBatch
from reproml.arithmetic.distributed.partial_sums import Group
from reproml.arithmetic.distributed.pending import Pending, add_to_checksum, exchange_at_end
from reproml.arithmetic.distributed.tensors import DistributedTensor, map_tensors
from reproml.torch_internals import (
    DisableTorchFunctionSubclass,
    make_wrapper_subclass,
)


class RoundRobinShard(NamedTuple):
    """How the batch lies in a tensor: dimension `dim` counts before x batch x after elements, row-major.

    Worker r holds the rows r, r + N, r + 2 N, ... of the batch, N being the number of workers.
    """

    group: Group
    batch: int  # rows of the global batch
    dim: int = 0  # negative if counted from the right
    before: int = 1
    after: int = 1

    def local_count(self, worker: int) -> int:
        """Return the number of rows that a worker holds."""
        return len(range(worker, self.batch, self.group.size))

    @property
    def local_slice(self) -> slice:
        """The rows of the batch that this worker holds."""
        return slice(self.group.rank, None, self.group.size)

    def size_for(self, rows: int) -> int:
        """Return the size of the dimension for this number of rows."""
        return self.before * rows * self.after

    @property
    def local_sizes(self) -> list[int]:
        """The size of the dimension on each worker."""
        return [self.size_for(self.local_count(r)) for r in range(self.group.size)]

    @property
    def local_size(self) -> int:
        """The size of the dimension on this worker."""
        return self.size_for(self.local_count(self.group.rank))

    @property
    def global_size(self) -> int:
        """The size of the dimension in the global batch."""
        return self.size_for(self.batch)

    @property
    def hides_layout(self) -> bool:
        """Whether this worker has at most one row, so that its strides do not determine the batch's."""
        return self.local_size <= self.size_for(1)

    @property
    def is_leading(self) -> bool:
        """Whether dimension 0 is the batch and nothing else: index i is row i."""
        return self.dim == 0 and self.size_for(1) == 1

    def at_dim(self, dim: int) -> RoundRobinShard:
        """Return this shard with the batch in another dimension."""
        return self if dim == self.dim else self._replace(dim=dim)

    def local_rows(self, x: Tensor, dim: int) -> Tensor:
        """Return this worker's rows of a tensor that has the global batch in `dim`."""
        split: Tensor = x.unflatten(dim, (self.before, self.batch, self.after))
        index: list[Any] = [slice(None)] * (dim + 1) + [self.local_slice]
        return split[tuple(index)].flatten(dim, dim + 2)

    def is_local_count(self, n: int, device: torch.device) -> bool:
        """Whether a tensor of n rows on this worker has the rows of this worker. Collective."""
        if 1 not in self.local_sizes:
            return n == self.local_size
        with (
            natively()
        ):  # a single row looks like a broadcast operand: the sizes on all workers decide
            counts = self.group.all_gather(torch.tensor(n, device=device))
        return counts.tolist() == self.local_sizes


class MicroBatchShard(RoundRobinShard):
    """How the rows of a micro-batch lie in a tensor. The group is the MicroBatch."""

    group: MicroBatch

    def local_count(self, worker: int) -> int:
        return self.group.rows

    @property
    def local_slice(self) -> slice:
        return slice(self.group.start, self.group.start + self.group.rows)

    @property
    def local_sizes(self) -> list[int]:
        return [self.local_size, 1]  # as micro-batches of one row and of several must agree

    def is_local_count(self, n: int, device: torch.device) -> bool:
        # A single row that is broadcast gives the micro-batch the same numbers as its own row.
        return n == self.local_size


class Rule(NamedTuple):
    """How an operator treats a Sharded tensor."""

    compute: Callable[[Any, Any, Any], Any]  # (operator, args, kwargs) -> result
    takes_local_rows: bool = False  # whether a plain tensor may have this worker's rows only


# The tables of rules. rules/table.py fills them when the package is imported: here no operator is known.
# OPERATORS: name of an operator, without "aten::" -> rule; DEFAULT -> the rule of all others.
# FUNCTIONS: function of torch, or a name that several have -> its arguments, with plain tensors sharded.
DEFAULT = "default"
OPERATORS: dict[str, Rule] = {}
FUNCTIONS: dict[Any, Callable[[Any, Any, Any], tuple[Any, Any]]] = {}


class Sharded(DistributedTensor):
    """The global batch. No two of these tensors share a `local` unless one is a view of the other."""

    local: Tensor  # the rows of this worker
    shard: RoundRobinShard

    @staticmethod
    def __new__(
        cls, local: Tensor, shard: RoundRobinShard, strides: Optional[Sequence[int]] = None
    ) -> Sharded:
        shape = list(local.shape)
        shape[shard.dim] = shard.global_size
        strides = strides or _global_strides(local, shape)
        made: Sharded = make_wrapper_subclass(
            cls, shape, strides=strides, dtype=local.dtype, device=local.device
        )
        made.local, made.shard = local, shard
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"Sharded(dim={self.shard.dim}, batch={self.shard.batch}, local={self.local})"

    def full_tensor(self) -> Tensor:
        """Return the global batch as a plain tensor, gathered from all workers."""
        shard = self.shard
        if shard.group.size == 1:
            return self.local
        if isinstance(shard, MicroBatchShard):
            return shard.group.gather(self, shard.dim, shard.before, shard.after)
        most = shard.local_count(0)
        with natively():
            local = self.local.unflatten(
                shard.dim, (shard.before, shard.local_count(shard.group.rank), shard.after)
            )
            rows = local.movedim(shard.dim + 1, 0)
            padded = rows.new_zeros((most, *rows.shape[1:]))
            padded[: len(rows)] = rows
            sent = padded.to(torch.uint8) if padded.dtype is torch.bool else padded
            gathered = shard.group.all_gather(sent).to(padded.dtype)
            batch = gathered.transpose(0, 1).reshape(-1, *rows.shape[1:])[: shard.batch]
            return batch.movedim(0, shard.dim + 1).flatten(shard.dim, shard.dim + 2).contiguous()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            kwargs = kwargs or {}
            prepare = FUNCTIONS.get(func) or FUNCTIONS.get(func.__name__.strip("_"))
            if prepare:
                args, kwargs = prepare(func, args, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for kind in (Pending, Later):
            if kind in types:
                args, kwargs = map_tensors(kind, kind.full_tensor, (args, kwargs))
        rule = _rule_of(func)
        with DisableTorchFunctionSubclass():  # a method like dim() is ten times as fast without it
            _checksum_operands(args, kwargs, rule.takes_local_rows)
            return rule.compute(func, args, kwargs)


@cache
def _rule_of(func: Any) -> Rule:
    # Variants with out= have the same name as the others.
    has_out = any(a.is_out for a in func._schema.arguments)
    name = DEFAULT if has_out else func._schema.name[len("aten::") :]
    return OPERATORS.get(name) or OPERATORS[DEFAULT]


def _global_strides(local: Tensor, shape: Sequence[int]) -> list[int]:
    """Return strides for the global batch in the layout of `local`: dense, 0 where `local` has 0."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
        if local.stride(d):
            strides[d] = step
            step *= max(shape[d], 1)
    return strides


def shard_batch(x: Tensor, group: Group) -> Sharded:
    """Return the batch x [batch, ...], which every worker has, with each worker keeping its own rows."""
    shard = RoundRobinShard(group, len(x))
    with natively():
        return Sharded(shard.local_rows(x, 0).contiguous(), shard)


def first_sharded(args: Any, kwargs: Any) -> Sharded:
    """Return the first Sharded tensor among the arguments."""
    for x in args:
        if isinstance(x, Sharded):
            return x
    return next(x for x in tensors([*args, *kwargs.values()]) if isinstance(x, Sharded))


def shard_from_right(x: Sharded) -> RoundRobinShard:
    """Return the shard with its dimension counted from the right, as broadcasting does."""
    return x.shard.at_dim(x.shard.dim - x.dim())


def _checksum_operands(args: Any, kwargs: Any, takes_local_rows: bool) -> None:
    """Add a sample of every number and plain tensor to the checksum of the backward pass.

    A worker may have computed them from its own rows; the exchange of gradients then raises ReproError.
    """
    first = first_sharded(args, kwargs)
    if first.shard.group.size == 1:
        return
    shard = shard_from_right(first)
    sizes = shard.local_sizes
    for x in args:
        if type(x) is float:
            add_to_checksum(shard.group, struct.pack("<d", x))
        elif type(x) in (Tensor, Parameter) and x.is_floating_point() and x.is_cpu and x.numel():
            # Local rows differ. All workers have to decide alike, so the sizes of all of them count.
            if takes_local_rows and x.dim() >= -shard.dim and x.shape[shard.dim] in sizes:
                continue
            with natively():
                value = float(x[(0,) * x.dim()])
            add_to_checksum(shard.group, struct.pack("<d", value) if value == value else b"nan")
    exchange_at_end(shard.group)
