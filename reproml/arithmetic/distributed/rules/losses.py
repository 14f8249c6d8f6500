"""Rules of the losses that do not gather the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.distributed.operands import shard_like
from reproml.arithmetic.distributed.pending import map_tensors
from reproml.arithmetic.distributed.rules.compute import on_gathered_batch
from reproml.arithmetic.distributed.sharded import Sharded, first_sharded

_NONE = 0  # PyTorch's number of reduction="none"


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
        picked, target = Sharded(pairs, x.shard).full_tensor().split(1, 1)
        picked, target = picked.to(x.dtype), target.squeeze(1).long()
        if weight is None:  # one class for all rows that count
            scores, target = picked, torch.where(target != ignored, 0, -100)
            ignored = -100
        else:
            scores = picked.new_zeros(len(picked), x.shape[1])
            scores.scatter_(1, torch.where(target != ignored, target, 0).unsqueeze(1), picked)
    return func(scores, target, weight, reduction, ignored)


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
