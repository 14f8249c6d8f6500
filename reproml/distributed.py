"""Training with several processes whose weights equal those of a single process, to the last bit.

    from reproml.distributed import DistributedDataParallel      # instead of torch.nn.parallel's

    torchrun --nproc-per-node 4 -m reproml train --recipe mnist-mlp
    torchrun --nproc-per-node 4 -m reproml run train.py

The processes communicate by torch.distributed (gloo on CPUs, NCCL on GPUs). arithmetic/distributed/ defines
what each operator does with a batch that is sharded over them, and how sums are exchanged
(partial_sums.py). docs/distributed.md has the proof, the bytes and the limits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, Callable, Optional
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reproml.arithmetic import state
from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.distributed.operands import shard_inputs
from reproml.arithmetic.distributed.sharded import RoundRobinShard, shard_batch
from reproml.errors import ReproError
from reproml.torchrun import this_worker

# Newer versions of PyTorch have another name for it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# How long to wait for a worker that lives but does not answer. One that has ended is noticed at once.
_TIMEOUT = timedelta(minutes=10)


class _Process:
    """All the state that this module keeps of the running process."""

    def __init__(self) -> None:
        self.workers: dict[dist.ProcessGroup, Workers] = {}  # one object for each process group
        self.has_joined = False


_process = _Process()


class Workers:
    """The processes of a torch.distributed process group: the Group of partial_sums.py."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        # Unlike a WeakSet it has an order, which is the same on every worker.
        self.models: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self.bytes_sent = 0  # by this worker, if each message goes straight to its destination

    def start_all_to_all(self, x: Tensor) -> Callable[[], Tensor]:
        self.bytes_sent += x.nbytes // self.size * (self.size - 1)
        out, sent = torch.empty_like(x), x.contiguous()
        with _collective():
            work = dist.all_to_all_single(out, sent, group=self.group, async_op=True)
        return partial(self._wait, work, out, sent)

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        self.bytes_sent += x.nbytes * (self.size - 1)
        out, sent = x.new_empty(self.size * x.numel()), x.contiguous().view(-1)
        with _collective():
            work = _all_gather(out, sent, group=self.group, async_op=True)
        return partial(self._wait, work, out.view(self.size, *x.shape), sent)

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if self.size == 1 else self.start_all_gather(x)()

    def _wait(self, work: Any, received: Tensor, sent: Tensor) -> Tensor:
        """Return what was received once it is here. `sent` has to live until then."""
        with _collective():
            work.wait()
        return received

    def broadcast(self, x: Tensor) -> None:
        with _collective():
            dist.broadcast(x, 0, group=self.group)


def workers(group: Optional[dist.ProcessGroup] = None) -> Workers:
    """Return the workers of a process group, by default of all processes: one object for each group."""
    chosen = group or dist.group.WORLD
    if chosen is None:
        raise ReproError(
            "there is no process group yet: call torch.distributed.init_process_group first"
        )
    if chosen not in _process.workers:
        _process.workers[chosen] = Workers(chosen)
    return _process.workers[chosen]


@contextmanager
def _collective() -> Iterator[None]:
    """Run a collective of PyTorch natively; raise ReproError if it fails."""
    try:
        with natively():
            yield
    except RuntimeError as error:  # the only type that the backends of torch.distributed raise
        raise ReproError(
            f"a worker has ended or does not answer, so this one cannot continue: {error}"
        ) from None


class DistributedDataParallel(nn.Module):
    """torch.nn.parallel.DistributedDataParallel for `reproml.exact()`: the results of a single process.

    Pass to forward this worker's rows of the global batch, in the first dimension of each tensor, sharded
    as DistributedSampler does it: worker r of N has the rows r, r + N, r + 2 N, ... The output represents
    the global batch and has its shape. A loss computed from it is the loss of the global batch, on every
    worker, and so are the gradients. The losses of torch.nn.functional and elementwise operators accept
    a target that has this worker's rows only. In evaluation without gradients the output has this
    worker's rows, as in PyTorch.

    Outside of exact() it is PyTorch's own class. Raises ReproError if the numbers of rows on the workers
    are not those of such shards, NotExactError for an operator that writes to single rows of the global
    batch or returns a view of them.
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
        # These have no effect: buffers are the same on all workers, and all gradients are exchanged at
        # the end of the backward pass.
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
            self.workers.broadcast(x.detach())
        self.workers.models[self] = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if state.active.depth == 0:
            raise ReproError(
                "a model that was wrapped within reproml.exact() was called outside of it; "
                "put the training loop inside"
            )
        if self.training or torch.is_grad_enabled():
            args, kwargs = self._shard_inputs((args, kwargs))
        return self.module(*args, **kwargs)

    def no_sync(self) -> Any:
        """Return a context that does nothing.

        Each backward pass is exchanged, so that accumulated gradients are those of a single process.
        """
        return nullcontext()

    def _shard_inputs(self, inputs: Any) -> Any:
        """Return the inputs with tensors of this worker's rows as Sharded tensors."""
        return shard_inputs(inputs, self._shard)

    def _shard(self, rows: int) -> RoundRobinShard:
        """Return the shard of which this worker has this number of rows."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        counts = self.workers.all_gather(torch.tensor([rows]).to(device)).squeeze(1).tolist()
        shard = RoundRobinShard(self.workers, sum(counts))
        if counts != [shard.local_count(r) for r in range(self.workers.size)]:
            raise ReproError(
                f"the workers have {counts} rows of the global batch of {shard.batch}; shard it "
                "round-robin (worker r of N takes the rows r, r + N, ...), as DistributedSampler does"
            )
        return shard


# ---- recipes under torchrun ------------------------------------------------------------------------


@contextmanager
def joined(
    batch_size: int = sys.maxsize, job: Any = None, device: Optional[torch.device] = None
) -> Iterator[Any]:
    """Initialize the process group of the workers that torchrun started; without torchrun do nothing.

    Yields the `job` of worker 0, any Python object, on every worker: only worker 0 has to know it before.
    Tensors on the CPU are exchanged by gloo, those on `device`, if it is a GPU, by NCCL.
    Raises ReproError if there are more workers than rows in a batch.
    """
    size = this_worker().size
    if size == 1:
        yield job
        return
    if size > batch_size:
        raise ReproError(
            f"{size} workers are too many for batches of {batch_size} rows: each worker needs a row; "
            f"start at most {batch_size}"
        )
    with _collective(), _stdout_to_stderr():
        on_gpu = device is not None and device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=_TIMEOUT)
    _process.has_joined = True
    try:
        jobs = [job]
        with _collective():
            dist.broadcast_object_list(jobs)
        yield jobs[0]
    finally:
        dist.destroy_process_group()


def has_joined() -> bool:
    """Whether this process was in a process group of `joined` at some time."""
    return _process.has_joined


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect standard output: gloo reports its connections there, where --json prints its result."""
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def wrap(model: nn.Module) -> nn.Module:
    """Return the model wrapped for training by all workers; the model itself without a process group."""
    if not dist.is_initialized():
        return model
    wrapped: nn.Module = DistributedDataParallel(model)
    return wrapped


def shard(batch: Tensor) -> Tensor:
    """Return this worker's rows of a batch that every worker has; the batch without a process group.

    Within exact() the result is a Sharded tensor.
    """
    if not dist.is_initialized():
        return batch
    group = workers()
    return shard_batch(batch, group) if state.active.depth else batch[group.rank :: group.size]
