"""Rules of the losses that do not gather the batch."""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.distributed.micro_batches import Later, MicroBatch
from reproml.arithmetic.distributed.operands import shard_like
from reproml.arithmetic.distributed.rules.compute import on_gathered_batch
from reproml.arithmetic.distributed.sharded import Sharded, first_sharded
from reproml.arithmetic.distributed.tensors import map_tensors
from reproml.errors import NotExactError

_NONE, _MEAN = 0, 1  # PyTorch's numbers of the reductions


def nll_loss(func: Any, args: Any, kwargs: Any) -> Any:
    """Gather only the numbers at the targets, then compute as a single process."""
    x, target, weight, reduction, ignored = args
    if not isinstance(x, Sharded) or x.shard.dim or x.dim() != 2:
        return on_gathered_batch(func, args, kwargs)
    target = shard_like(target, x)
    if reduction == _NONE:
        loss, total_weight = func(x.local, target.local, weight, reduction, ignored)
        return Sharded(loss, x.shard), total_weight
    if x.shard.group.size == 1:
        return on_gathered_batch(func, [x, target, weight, reduction, ignored], {})
    with natively():
        index = torch.where(target.local != ignored, target.local, 0).unsqueeze(1)
        picked = x.local.gather(1, index).double()
        pairs = torch.cat([picked, target.local.unsqueeze(1).double()], 1)

    def loss_of(pairs: Tensor) -> Any:
        with natively():
            picked, target = pairs.split(1, 1)
            picked, target = picked.to(x.dtype), target.squeeze(1).long()
            if weight is None:  # one class for all rows that count
                scores, target, other = picked, torch.where(target != ignored, 0, -100), -100
            else:
                scores, other = picked.new_zeros(len(picked), x.shape[1]), ignored
                scores.scatter_(1, torch.where(target != ignored, target, 0).unsqueeze(1), picked)
        return func(scores, target, weight, reduction, other)

    total_weight = _weight_of_batch(x, target, weight, reduction, ignored)
    with natively():
        batch = Sharded(pairs, x.shard).full_tensor()
        like = x.local.new_empty(())
    if total_weight is None or not isinstance(batch, Later):
        return loss_of(batch)
    return batch.micro_batch.apply(lambda pairs: loss_of(pairs)[0], batch, like), total_weight


def nll_loss2d(func: Any, args: Any, kwargs: Any) -> Any:
    """Gather the batch. The total weight of a batch of micro-batches is known before."""
    x, target, weight, reduction, ignored = args
    total_weight = None
    if isinstance(x, Sharded) and not x.shard.dim and reduction != _NONE:
        target = shard_like(target, x)
        total_weight = _weight_of_batch(x, target, weight, reduction, ignored)
    loss, total = on_gathered_batch(func, [x, target, weight, reduction, ignored], {})
    return loss, total if total_weight is None else total_weight


def _weight_of_batch(
    x: Sharded, target: Sharded, weight: Any, reduction: int, ignored: int
) -> Optional[Tensor]:
    """Return the total weight of a batch that is computed as micro-batches; None with workers.

    The backward pass needs it for a mean, before the targets of the other micro-batches are known.
    """
    if not isinstance(x.shard.group, MicroBatch):
        return None
    with natively():
        if reduction == _MEAN and (weight is not None or (target.local == ignored).any()):
            raise NotExactError(
                "the mean of a loss with weights of classes, or with ignored targets, divides by their "
                "total over the batch, which a micro-batch does not know; use reduction='sum' and divide "
                "by the total of the complete batch"
            )
        return x.local.new_tensor(float(math.prod(target.shape)))


def loss_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an elementwise gradient which depends on the size of the global batch through a mean.

    The operands are padded with zeros to the shape of the global batch: other workers' rows do not matter.
    """
    x = first_sharded(args, kwargs)
    if x.shard.dim or x.shard.group.size == 1:
        return on_gathered_batch(func, args, kwargs)

    def in_global_shape(y: Tensor) -> Tensor:
        if y.dim() and y.shape[:1] in (x.shape[:1], x.local.shape[:1]):
            y = shard_like(y, x)
        if not isinstance(y, Sharded):
            return y
        with natively():
            padded = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
            index = torch.arange(x.shard.global_size, device=y.device)
            padded[x.shard.local_rows(index, 0)] = y.local
        return padded

    args, kwargs = map_tensors(Tensor, in_global_shape, (args, kwargs))
    result = func(*args, **kwargs)
    with natively():
        return Sharded(x.shard.local_rows(result, 0).contiguous(), x.shard)


def nll_loss_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, target, *rest = args
    if not isinstance(x, Sharded) or x.shard.dim:
        return on_gathered_batch(func, args, kwargs)
    local = [
        t.local if isinstance(t, Sharded) else t
        for t in (shard_like(g, x), x, shard_like(target, x))
    ]
    return Sharded(func(*local, *rest), x.shard)
