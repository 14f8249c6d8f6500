"""The batch that is dealt: a tensor that stands for all of it, of which a worker holds some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.distributed.partial_sums import Group
from reproml.arithmetic.distributed.pending import OPTIMIZER_REFUSAL, Pending, raw


@dataclass(frozen=True)
class Rows:
    """Where the batch is: dimension `dim` counts before x batch x after elements, row-major.

    Of the batch, worker r holds the rows r, r + size, r + 2 size, ...
    """

    group: Group
    batch: int
    dim: int = 0
    before: int = 1
    after: int = 1

    def held(self, worker: int) -> int:
        """The number of rows that a worker holds."""
        return len(range(worker, self.batch, self.group.size))

    def length(self, batch: int) -> int:
        """The dimension's size for so many rows."""
        return self.before * batch * self.after

    @property
    def own(self) -> int:
        """The dimension's size on this worker."""
        return self.length(self.held(self.group.rank))

    @property
    def all(self) -> int:
        """The dimension's size on all workers together."""
        return self.length(self.batch)

    @property
    def few(self) -> bool:
        """Whether this worker's part does not tell the layout of the whole: a row has any stride."""
        return self.own <= self.length(1)

    def moved(self, dim: int) -> Rows:
        return replace(self, dim=dim)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """This worker's part of a tensor that has the whole batch in `dim`."""
        split: Tensor = x.unflatten(dim, (self.before, self.batch, self.after))
        index: list[Any] = [slice(None)] * (dim + 1) + [
            slice(self.group.rank, None, self.group.size)
        ]
        return split[tuple(index)].flatten(dim, dim + 2)


class Rules:
    """What operators and functions of torch do with a Sharded tensor: rules/table.py fills this in."""

    prepare: Callable[[Any, Any, Any], tuple[Any, Any]]
    compute: Callable[[Any, Any, Any], Any]


_rules = Rules()


def use_rules(prepare: Callable[..., Any], compute: Callable[..., Any]) -> None:
    """Have Sharded tensors handled by these: of a function of torch the arguments, of an operator the result."""
    _rules.prepare, _rules.compute = prepare, compute


class Sharded(Tensor):
    """The whole batch, of which `local` is here. No two tensors share a `local` unless one is a view."""

    local: Tensor
    at: Rows
    optimizer_refusal = OPTIMIZER_REFUSAL

    @staticmethod
    def __new__(cls, local: Tensor, at: Rows, strides: Optional[Sequence[int]] = None) -> Sharded:
        shape = list(local.shape)
        shape[at.dim] = at.all
        strides = strides or _strides(local, shape)
        make: Any = Tensor._make_wrapper_subclass
        made: Sharded = make(cls, shape, strides=strides, dtype=local.dtype, device=local.device)
        made.local, made.at = local, at
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"Sharded(dim={self.at.dim}, batch={self.at.batch}, local={self.local})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = _rules.prepare(func, args, kwargs or {})
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, Pending) for t in types):
            args, kwargs = tree_map_only(Pending, Pending.value, (args, kwargs))
        return _rules.compute(func, args, kwargs or {})


def _strides(local: Tensor, shape: Sequence[int]) -> list[int]:
    """Those of the whole batch, laid out as the part is: 0 where it repeats, else densely."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
        if local.stride(d):
            strides[d] = step
            step *= max(shape[d], 1)
    return strides


def share(x: Tensor, group: Group) -> Sharded:
    """The batch x [batch, ...], which every worker has whole, with each worker's own rows kept."""
    at = Rows(group, len(x))
    with raw():
        return Sharded(at.of(x, 0).contiguous(), at)


def gathered(x: Sharded) -> Tensor:
    """The whole batch, on every worker."""
    at = x.at
    most = at.held(0)
    with raw():
        local = x.local.unflatten(at.dim, (at.before, at.held(at.group.rank), at.after))
        rows = local.movedim(at.dim + 1, 0)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        as_sent = padded.to(torch.uint8) if padded.dtype is torch.bool else padded
        dealt = at.group.to_all(as_sent).to(padded.dtype).transpose(0, 1)
        batch = dealt.reshape(-1, *rows.shape[1:])[: at.batch]
        return batch.movedim(0, at.dim + 1).flatten(at.dim, at.dim + 2).contiguous()
