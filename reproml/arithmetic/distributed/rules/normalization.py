"""Rules of normalizations: of each row alone, or of a channel with statistics of the global batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import TENSORS
from reproml.arithmetic.dispatch.dispatcher import natively
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.distributed.micro_batches import MicroBatch
from reproml.arithmetic.distributed.partial_sums import (
    CHUNK,
    DTYPES,
    Partial,
    all_reduce,
    in_units,
    row_sums,
)
from reproml.arithmetic.distributed.pending import reduce_over_batch
from reproml.arithmetic.distributed.rules.compute import on_gathered_batch, on_single_worker
from reproml.arithmetic.distributed.sharded import RoundRobinShard, Sharded, shard_batch
from reproml.arithmetic.distributed.tensors import map_tensors
from reproml.arithmetic.numerics.balls import Ball
from reproml.arithmetic.numerics.rounding import TINY, gamma, rounding_test, two_sum, widened
from reproml.arithmetic.operators import normalization
from reproml.arithmetic.operators.normalization_reference import (
    element_backward,
    mean_and_rstd,
    normalize,
)
from reproml.arithmetic.operators.reductions import row_variance

aten = torch.ops.aten


def layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], args[1]
    if not isinstance(x, Sharded) or x.shard.dim >= x.dim() - len(shape):
        return on_gathered_batch(func, args, kwargs)
    result = func(x.local, *args[1:])
    return tuple(Sharded(y, x.shard) for y in result)


def layer_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, shape, mean, rstd, w, b, mask = args
    sharded = all(isinstance(t, Sharded) and t.shard == x.shard for t in (g, x, mean, rstd))
    if not sharded or x.dtype not in DTYPES:
        return on_gathered_batch(func, args, kwargs)
    if x.shard.group.size == 1:
        return on_single_worker(func, args, kwargs)
    length = math.prod(shape)
    grad_x = grad_w = grad_b = None
    dtype = (x if w is None else w).dtype  # of the gradients of the parameters
    local = [t.local for t in (g, x, mean, rstd)]
    if mask[0]:
        grad_x = func(*local[:2], shape, *local[2:], w, b, [True, False, False])[0]
        grad_x = Sharded(grad_x, x.shard)
    if mask[1]:
        with natively():
            flat = [t.reshape(t.numel() // s, s) for t, s in zip(local, (length, length, 1, 1))]
            partial = _scaled_sum([t.t() for t in flat], x.numel() // length, dtype)
        grad_w = reduce_over_batch(x.shard.group, partial, shape)
    if mask[2]:
        dims = list(range(x.dim() - len(shape)))
        grad_b = aten.sum.dim_IntList(g, dims, dtype=dtype).reshape(shape)
    return grad_x, grad_w, grad_b


def _scaled_sum(
    operands: Sequence[Tensor], height: int, dtype: torch.dtype = torch.float32
) -> Partial:
    """Return the partial sums of g (x - mean) rstd, or that times a weight, over the last axis: [m, 1].

    operands: g, x, mean, rstd and optionally the weight, [m, n] or broadcast to g's shape [m, n]. dtype: of
    the sums.
    """
    g, x, mean, *factors = (t.double().expand(operands[0].shape) for t in operands)
    terms = g * (x - mean)
    for factor in factors:
        terms = terms * factor

    def exact(i: Tensor, j: Tensor) -> list[int]:
        picked = [[map(Fraction, row) for row in t[i].tolist()] for t in (g, x, mean, *factors)]
        return [
            in_units(sum((a * (b - m) * math.prod(f) for a, b, m, *f in zip(*rows)), Fraction(0)))
            for rows in zip(*picked)
        ]

    def exact_terms() -> Iterator[Tensor]:
        step = max(1, CHUNK // max(1, 12 * len(g)))
        for a, b, m, *others in zip(*(t.split(step, 1) for t in (g, x, mean, *factors))):
            difference, rest = two_sum(b, -m)
            parts = [rest * a, *(part * a for part in _halves(difference))]
            for factor in others:
                parts = [half * factor for part in parts for half in _halves(part)]
            yield torch.cat(parts, 1)

    # A term is rounded up to four times before it is added.
    sums, bounds = terms.sum(1, keepdim=True), terms.abs().sum(1)
    return Partial(sums, bounds, height + 4, exact=exact, terms=exact_terms, dtype=dtype)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers of at most 26 bits whose sum is x: a binary32 number times each is exact.

    Source: T. Dekker, Numerische Mathematik 18, 1971.
    """
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """In training, normalize each worker's rows with the statistics of the global batch.

    A batch that is not float32 is gathered instead.
    """
    x, weight, bias, *running, training, momentum, eps = args
    if training and isinstance(x, Sharded) and isinstance(x.shard.group, MicroBatch):
        x.shard.group.refuse_statistics()
    if not isinstance(x, Sharded) or not x.shard.is_leading:
        return on_gathered_batch(func, args, kwargs)
    if training and x.shard.group.size > 1 and not _is_float32(args):
        return _sharded_again(func, args, x.shard)
    if not training or x.shard.group.size == 1:
        return on_single_worker(func, args, kwargs)
    mean, rstd, var = _statistics(x, eps)
    for old, new in zip(running or (None, None), (mean, var)):
        if old is not None:
            with natively():
                normalization.update_running_stat(old, new, momentum)
    weight, bias = (None if t is None else _column(t, x) for t in (weight, bias))
    with natively():
        out = normalize(x.local, _column(mean, x), _column(rstd, x), weight, bias)
    return Sharded(out, x.shard), mean, rstd


def _is_float32(args: Sequence[Any]) -> bool:
    return all(x.dtype is torch.float32 for x in tensors(args) if x.is_floating_point())


def _sharded_again(func: Any, args: Any, shard: RoundRobinShard) -> Any:
    """Compute from the gathered batch. The first result has its rows, and is sharded like it."""
    first, *others = func(*map_tensors(Sharded, Sharded.full_tensor, args))
    return (None if first is None else shard_batch(first, shard.group), *others)


def _column(t: Tensor, x: Tensor) -> Tensor:
    """Return t [c] in a shape that broadcasts against x [n, c, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 2))


def _statistics(x: Sharded, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return each channel's mean, 1 / sqrt(variance + eps) and unbiased variance, float32 [c].

    Worker r sends a pivot p, d = sum (x - p) and q = sum (x - p)^2 over its n numbers. For any mu, with
    the sums over the workers s = sum (d + n (p - mu)) and v = sum (q + 2 (p - mu) d + n (p - mu)^2):

        mean = mu + s / N,    N variance = v - s^2 / N

    Worker 0 applies the rounding test. The channels that fail are gathered and computed exactly.
    """
    group, ctx = x.shard.group, TENSORS
    with natively():
        rows = normalization.channel_rows(x.local).double()
        n, places = rows.shape[1], math.prod(x.shape[2:])
        pivot = rows.mean(1) if n else rows.new_zeros(len(rows))
        centered = rows - pivot.unsqueeze(1)
        moments = torch.stack([pivot, centered.sum(1), (centered * centered).sum(1)])
        gathered = group.all_gather(moments)
        counts = [x.shard.local_count(r) * places for r in range(group.size)]
        total = sum(counts)
        mu = sum(count / total * p for count, (p, _, _) in zip(counts, gathered))
        s, v = ctx.constant(0), ctx.constant(0)
        for count, (p, d, q) in zip(counts, gathered):
            rel = gamma(count + 3)
            offset = ctx.exact(p) - ctx.exact(mu)
            d_sum = Ball(d, 0, (q * count).sqrt() * rel, ctx)  # sum |x - p| <= sqrt(n q)
            s = s + d_sum + count * offset
            v = v + Ball(q, rel, 0, ctx) + 2 * offset * d_sum + count * offset * offset
        v = v - s * s / total
        mean = ctx.exact(mu) + s / total
        rstd = 1 / ctx.sqrt(v / total + Fraction(eps))
        tested = [_rounding_test(ball) for ball in (mean, rstd, v / max(total - 1, 1))]
        values = [value for value, _ in tested]
        failed = torch.stack([fails for _, fails in tested]).any(0)
        if total == 1:
            failed[:] = True
        # Only the decisions of worker 0 count: the last bits may differ between processors.
        *values, failed = group.all_gather(torch.stack([*values, failed.float()]))[0]
        channels = failed.nonzero().squeeze(1)
        if len(channels):
            batch = Sharded(x.local[:, channels], x.shard).full_tensor()
            batch = normalization.channel_rows(batch)
            exact = *mean_and_rstd(batch, eps), row_variance(batch, 1)
            for value, correct in zip(values, exact):
                value[channels] = correct.squeeze(1)
    return values[0], values[1], values[2]


def _rounding_test(ball: Ball) -> tuple[Tensor, Tensor]:
    """Round a ball to binary32; return the values and where the test fails.

    The test assumes of the ball's error:
    - It has no room yet for the roundings of mid - radius and mid + radius, for its own computation in
      binary64 and for underflow: `widened` and TINY add it here.
    - The sign of a zero is not known: the test compares bit patterns, so that -0 beside +0 fails.
    - Where mid is NaN or infinite the test fails, and the exact path decides the result.
    """
    radius = widened(ball.error, ball.mid.abs()) + TINY
    value, failed = rounding_test(ball.mid - radius, ball.mid + radius)
    return value, failed | ~ball.mid.isfinite()


def batch_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, w, running_mean, running_var, mean, rstd, train, eps, mask = args
    if not (isinstance(g, Sharded) and isinstance(x, Sharded)) or g.shard != x.shard or not train:
        return on_gathered_batch(func, args, kwargs)
    if not x.shard.is_leading:
        return on_gathered_batch(func, args, kwargs)
    if x.shard.group.size > 1 and not _is_float32(args):
        return _sharded_again(func, args, x.shard)
    if x.shard.group.size == 1:
        return on_single_worker(func, args, kwargs)
    n = x.numel() // max(x.shape[1], 1)
    grad_x = grad_w = grad_b = None
    with natively():
        m, r = mean.unsqueeze(1), rstd.unsqueeze(1)
        scale = torch.ones_like(m) if w is None else w.detach().unsqueeze(1)
        rows = [normalization.channel_rows(t.local) for t in (g, x)]
        if mask[0] and n > 1:
            sums = [_scaled_sum([*rows, m, r, scale], n), row_sums(rows[0], n, scale)]
            b, a = (_column(t, x) for t in all_reduce(x.shard.group, sums))
            m, r, scale = (_column(t, x) for t in (m, r, scale))
            grad_x = element_backward(n, g.local, scale.expand(g.local.shape), x.local, m, r, a, b)
        elif mask[0]:
            grad_x = torch.zeros_like(x.local)
        scaled = _scaled_sum([*rows, mean.unsqueeze(1), rstd.unsqueeze(1)], n)
    if mask[1]:
        grad_w = reduce_over_batch(x.shard.group, scaled, mean.shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return None if grad_x is None else Sharded(grad_x, x.shard), grad_w, grad_b


def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, w, b, n, *rest = args
    if not isinstance(x, Sharded) or not x.shard.is_leading:
        return on_gathered_batch(func, args, kwargs)
    return tuple(Sharded(y, x.shard) for y in func(x.local, w, b, len(x.local), *rest))


def group_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, mean, rstd, w, n, c, hw, groups, mask = args
    sharded = all(isinstance(t, Sharded) and t.shard == x.shard for t in (g, x, mean, rstd))
    if not sharded or x.dtype not in DTYPES:
        return on_gathered_batch(func, args, kwargs)
    if x.shard.group.size == 1:
        return on_single_worker(func, args, kwargs)
    grad_x = grad_w = grad_b = None
    dtype = (x if w is None else w).dtype  # of the gradients of the parameters
    local = [t.local for t in (g, x, mean, rstd)]
    if mask[0]:
        grad_x = func(*local, w, len(local[0]), c, hw, groups, [True, False, False])[0]
        grad_x = Sharded(grad_x, x.shard)
    if mask[1]:
        split = (len(local[0]), groups, c // groups, hw)
        with natively():
            shapes = (split, split, *[(split[0], groups, 1, 1)] * 2)
            flat = [t.reshape(s).expand(split) for t, s in zip(local, shapes)]
            flat = [t.permute(1, 2, 0, 3).reshape(c, split[0] * hw) for t in flat]
            partial = _scaled_sum(flat, n * hw, dtype)
        grad_w = reduce_over_batch(x.shard.group, partial, (c,))
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())], dtype=dtype)
    return grad_x, grad_w, grad_b
