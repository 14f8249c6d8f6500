"""Rules of the losses that do not gather all of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.distributed.operands import first_batch, rows_of
from reproml.arithmetic.distributed.pending import raw
from reproml.arithmetic.distributed.rules.compute import everywhere
from reproml.arithmetic.distributed.sharded import Sharded, gathered

_NONE = 0  # PyTorch's number of a reduction


def nll_loss(func: Any, args: Any, kwargs: Any) -> Any:
    """Only the numbers at the targets meet."""
    x, target, weight, reduction, ignored = args
    if not isinstance(x, Sharded) or x.at.dim or x.dim() != 2:
        return everywhere(func, args, kwargs)
    target = rows_of(target, x)
    if reduction == _NONE:
        loss, total = func(x.local, target.local, weight, reduction, ignored)
        return Sharded(loss, x.at), total
    with raw():
        counted = target.local != ignored
        at = torch.where(counted, target.local, 0).unsqueeze(1)
        pairs = torch.cat([x.local.gather(1, at).double(), target.local.unsqueeze(1).double()], 1)
        picked, target = gathered(Sharded(pairs, x.at)).split(1, 1)
        picked, target = picked.float(), target.squeeze(1).long()
        if weight is None:  # one class for all that count
            scores, target = picked, torch.where(target != ignored, 0, -100)
            ignored = -100
        else:
            scores = picked.new_zeros(len(picked), x.shape[1])
            scores.scatter_(1, torch.where(target != ignored, target, 0).unsqueeze(1), picked)
    return func(scores, target, weight, reduction, ignored)


def loss_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise, but for the size of the whole batch in a mean: computed in its shape, without
    the others' rows."""
    x = first_batch(args, kwargs)
    if x.at.dim:
        return everywhere(func, args, kwargs)
    at = x.at

    def full(y: Tensor) -> Tensor:
        y = rows_of(y, x) if y.dim() and y.shape[:1] in (x.shape[:1], x.local.shape[:1]) else y
        if not isinstance(y, Sharded):
            return y
        with raw():
            whole = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
            index = torch.arange(at.all, device=y.device)
            whole[at.of(index, 0)] = y.local
        return whole

    result = func(*tree_map_only(Tensor, full, args), **tree_map_only(Tensor, full, kwargs))
    with raw():
        return Sharded(at.of(result, 0).contiguous(), at)


def nll_loss_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, target, *rest = args
    if not isinstance(x, Sharded) or x.at.dim:
        return everywhere(func, args, kwargs)
    g, target = rows_of(g, x), rows_of(target, x)
    local = [t.local if isinstance(t, Sharded) else t for t in (g, x, target)]
    return Sharded(func(*local, *rest), x.at)
