"""Training by several processes that comes to the weights of one, to the last bit.

    from reproml.distributed import DistributedDataParallel      # in place of torch.nn.parallel's

    torchrun --nproc-per-node 4 -m reproml train --recipe mnist-mlp
    torchrun --nproc-per-node 4 -m reproml run train.py

The processes are PyTorch's (torch.distributed: gloo on CPUs, NCCL on GPUs). What each operator of a batch
means is said in arithmetic/distributed/, how sums are exchanged in arithmetic/distributed/partial_sums.py; docs/distributed.md
has the proof, the bytes and the limits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Optional
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from reproml.arithmetic import state
from reproml.arithmetic.distributed.partial_sums import Group
from reproml.arithmetic.distributed.pending import Pending, at_end_of_backward, raw
from reproml.arithmetic.distributed.rules import table as _rules  # noqa: F401  (fills in the rules)
from reproml.arithmetic.distributed.sharded import Rows, Sharded, gathered, share
from reproml.errors import NotExactError, ReproError

_TIMEOUT = timedelta(
    minutes=10
)  # of a worker that lives and does not come; a dead one is seen at once


class Workers:
    """The processes of a group of torch.distributed, as partial.Group has them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.bytes_sent = 0  # by this worker, if each piece goes straight to whom it is for

    def to_owners(self, x: Tensor) -> Tensor:
        self.bytes_sent += x.nbytes // self.size * (self.size - 1)
        out = torch.empty_like(x)
        with _together():
            dist.all_to_all_single(out, x.contiguous(), group=self.group)
        return out

    def to_all(self, x: Tensor) -> Tensor:
        self.bytes_sent += x.nbytes * (self.size - 1)
        out = x.new_empty(self.size * x.numel())
        with _together():
            dist.all_gather_into_tensor(out, x.contiguous().view(-1), group=self.group)
        return out.view(self.size, *x.shape)

    def from_first(self, x: Tensor) -> None:
        """Overwrite x by that of worker 0."""
        with _together():
            dist.broadcast(x, 0, group=self.group)


_known: dict[dist.ProcessGroup, Workers] = {}


def workers(group: Optional[dist.ProcessGroup] = None) -> Workers:
    """The workers of a process group, all of them by default: one object for each group."""
    chosen = group or dist.group.WORLD
    if chosen is None:
        raise ReproError(
            "there are no workers yet: call torch.distributed.init_process_group first"
        )
    if chosen not in _known:
        _known[chosen] = Workers(chosen)
    return _known[chosen]


@contextmanager
def _together() -> Iterator[None]:
    try:
        with raw():
            yield
    except RuntimeError as error:  # all that a backend of torch.distributed raises
        raise ReproError(
            f"a worker has ended or does not answer, so this one cannot go on: {error}"
        ) from None


class DistributedDataParallel(nn.Module):
    """torch.nn.parallel.DistributedDataParallel for `reproml.exact()`: the results of one process.

    Forward takes this worker's rows of the global batch, in the first dimension of each tensor, dealt as
    DistributedSampler deals them: row i is worker i mod N's. What it returns stands for the global batch
    and has its shape; a loss of it is that of the global batch, on every worker, and so are the gradients.
    A target with this worker's rows only is understood by the losses of torch.nn.functional and by
    elementwise operators. In evaluation without gradients, rows stay this worker's own, as in PyTorch's.

    Outside of exact() it is PyTorch's own. Raises ReproError if the workers have not the rows they should,
    NotExactError for an operator that writes or looks into single rows of the global batch.
    """

    def __new__(cls, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if state.active.depth == 0:
            return nn.parallel.DistributedDataParallel(module, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        module: nn.Module,
        device_ids: Any = None,
        output_device: Any = None,
        *,
        process_group: Optional[dist.ProcessGroup] = None,
        # Of no effect: buffers are alike on all workers, each gradient is exchanged at the end.
        find_unused_parameters: bool = False,
        broadcast_buffers: bool = True,
        bucket_cap_mb: Optional[int] = None,
        gradient_as_bucket_view: bool = False,
        static_graph: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.workers = workers(process_group)
        for x in [*module.parameters(), *module.buffers()]:
            self.workers.from_first(x.detach())
        _wrapped.add(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if state.active.depth == 0:
            raise ReproError(
                "a model that was wrapped within reproml.exact() was called outside of it; "
                "put the training loop inside"
            )
        if self.training or torch.is_grad_enabled():
            args, kwargs = self._rows((args, kwargs))
        return self.module(*args, **kwargs)

    def no_sync(self) -> Any:
        """Nothing: each backward pass is exchanged, so that its gradients are those of one process."""
        return nullcontext()

    def _rows(self, inputs: Any) -> Any:
        """The inputs with their rows known as those of the global batch."""
        given = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        lengths = {n for n in map(_length, given) if n is not None}
        if not lengths:
            return inputs
        if len(lengths) > 1:
            raise ReproError(
                f"the model's inputs have {sorted(lengths)} rows: give each the batch's"
            )
        mine = torch.tensor([lengths.pop()])
        held = self.workers.to_all(mine.to(_device(self.module))).squeeze(1).tolist()
        at = Rows(self.workers, sum(held))
        if held != [at.held(r) for r in range(self.workers.size)]:
            raise ReproError(
                f"the workers have {held} rows of the global batch of {at.batch}; deal them one by one "
                "(worker r takes rows r, r + N, ...), as DistributedSampler does"
            )

        def mark(x: Tensor) -> Tensor:
            if _length(x) is None:
                return x
            if x.requires_grad and torch.is_grad_enabled():
                raise NotExactError(
                    "an input of the wrapped model requires a gradient, which would be lost: "
                    "wrap what computes it as well, or detach it"
                )
            return Sharded(x, at)

        return tree_map_only(Tensor, mark, inputs)


_wrapped: WeakSet[DistributedDataParallel] = WeakSet()


def _length(x: Tensor) -> Optional[int]:
    return None if isinstance(x, Sharded) or not x.dim() else len(x)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _write_gradients(group: Group) -> None:
    """Put the exchanged gradients where the parameters of all wrapped models have theirs."""
    for model in _wrapped:
        for p in model.parameters() if model.workers is group else ():
            if isinstance(p.grad, Pending):
                p.grad = p.grad.value()
            elif isinstance(p.grad, Sharded):
                p.grad = gathered(p.grad)


at_end_of_backward(_write_gradients)


# ---- recipes under torchrun ------------------------------------------------------------------------


@contextmanager
def joined(batch_size: int = sys.maxsize, task: Any = None) -> Iterator[Any]:
    """Join the workers that torchrun started, for batches of this size; nothing without torchrun.

    Yields the first worker's `task`, any Python object, to all: the others need not know what it found out.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield task
        return
    if size > batch_size:
        raise ReproError(
            f"{size} workers are too many for batches of {batch_size} rows: a worker needs one; "
            f"start at most {batch_size}"
        )
    with _together(), _told_to_stderr():
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    _joined.append(task)
    try:
        of_first = [task]
        with _together():
            dist.broadcast_object_list(of_first)
        yield of_first[0]
    finally:
        dist.destroy_process_group()


_joined: list[Any] = []  # the tasks of this process


def has_joined() -> bool:
    """Whether this process met the others at some time."""
    return bool(_joined)


@contextmanager
def _told_to_stderr() -> Iterator[None]:
    """Gloo writes to standard output that it has connected, where --json has its result."""
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def wrap(model: nn.Module) -> nn.Module:
    """The model as all workers train it, outside of exact() as PyTorch does; itself if alone."""
    if not dist.is_initialized():
        return model
    wrapped: nn.Module = DistributedDataParallel(model)
    return wrapped


def rows(batch: Tensor) -> Tensor:
    """This worker's rows of a batch that every worker has: the batch itself if alone."""
    if not dist.is_initialized():
        return batch
    group = workers()
    return share(batch, group) if state.active.depth else batch[group.rank :: group.size]
