"""Rules of the normalisations: of a row by itself, and of a channel with the whole batch's statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import TENSORS
from reproml.arithmetic.distributed.partial_sums import Partial, merge, plain_sum, units
from reproml.arithmetic.distributed.pending import exchanged, raw
from reproml.arithmetic.distributed.rules.compute import everywhere
from reproml.arithmetic.distributed.sharded import Sharded, gathered
from reproml.arithmetic.numerics.balls import Ball
from reproml.arithmetic.numerics.rounding import SLACK, TINY, U, gamma
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
    if not isinstance(x, Sharded) or x.at.dim >= x.dim() - len(shape):
        return everywhere(func, args, kwargs)
    result = func(x.local, *args[1:])
    return tuple(Sharded(y, x.at) for y in result)


def layer_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, shape, mean, rstd, w, b, mask = args
    if not all(isinstance(t, Sharded) and t.at == x.at for t in (g, x, mean, rstd)):
        return everywhere(func, args, kwargs)
    at, length = x.at, math.prod(shape)
    grad_x = grad_w = grad_b = None
    local = [t.local for t in (g, x, mean, rstd)]
    if mask[0]:
        grad_x = func(*local[:2], shape, *local[2:], w, b, [True, False, False])[0]
        grad_x = Sharded(grad_x, at)
    if mask[1]:
        with raw():
            flat = [t.reshape(t.numel() // s, s) for t, s in zip(local, (length, length, 1, 1))]
            partial = _scaled_sum([t.t() for t in flat], x.numel() // length)
        grad_w = exchanged(at.group, partial, shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, list(range(x.dim() - len(shape)))).reshape(shape)
    return grad_x, grad_w, grad_b


def _scaled_sum(operands: Sequence[Tensor], height: int) -> Partial:
    """sum g (x - mean) rstd over the last axis, or that times a weight: this worker's part of it.

    operands: g, x, mean, rstd and perhaps the weight, float32 [m, n] or broadcast to that, g's shape.
    """
    g, x, mean, *factors = (t.double().expand(operands[0].shape) for t in operands)
    terms = g * (x - mean)
    for factor in factors:
        terms = terms * factor

    def exact(i: Tensor, j: Tensor) -> list[int]:
        picked = [[map(Fraction, row) for row in t[i].tolist()] for t in (g, x, mean, *factors)]
        return [
            units(sum((a * (b - m) * math.prod(f) for a, b, m, *f in zip(*rows)), Fraction(0)))
            for rows in zip(*picked)
        ]

    # Up to four roundings of a term come before the sum.
    return Partial(terms.sum(1, keepdim=True), terms.abs().sum(1), height + 4, exact)


def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """In training: statistics of the whole batch, then each worker's rows."""
    x, weight, bias, *running, training, momentum, eps = args
    if not isinstance(x, Sharded) or x.at.dim or x.at.length(1) != 1:
        return everywhere(func, args, kwargs)
    if not training:
        out, *rest = func(x.local, *args[1:])
        return (Sharded(out, x.at), *rest)
    mean, rstd, var = _statistics(x, eps)
    for old, new in zip(running or (None, None), (mean, var)):
        if old is not None:
            with raw():
                normalization.update_running_stat(old, new, momentum)
    weight, bias = (None if t is None else _column(t, x) for t in (weight, bias))
    with raw():
        out = normalize(x.local, _column(mean, x), _column(rstd, x), weight, bias)
    return Sharded(out, x.at), mean, rstd


def _column(t: Tensor, x: Tensor) -> Tensor:
    """[c], to broadcast against x [n, c, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 2))


def _statistics(x: Sharded, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel the mean, 1 / sqrt(variance + eps) and the unbiased variance, float32 [c].

    Worker r sends a pivot p, d = sum (x - p) and q = sum (x - p)^2 over its n numbers. For any mu, with
    the sums over the workers s = sum (d + n (p - mu)) and v = sum (q + 2 (p - mu) d + n (p - mu)^2):

        mean = mu + s / N,    N variance = v - s^2 / N

    The first worker puts the rounding test to them; channels that fail are gathered.
    """
    group, k = x.at.group, TENSORS
    with raw():
        rows = normalization.channel_rows(x.local).double()
        n, places = rows.shape[1], math.prod(x.shape[2:])
        pivot = rows.mean(1) if n else rows.new_zeros(len(rows))
        apart = rows - pivot.unsqueeze(1)
        every = group.to_all(torch.stack([pivot, apart.sum(1), (apart * apart).sum(1)]))
        counts = [x.at.held(r) * places for r in range(group.size)]
        total = sum(counts)
        mu = sum(c / total * each[0] for c, each in zip(counts, every))
        s, v = k.constant(0), k.constant(0)
        for count, (p, d, q) in zip(counts, every):
            error = gamma(count + 3)
            off = k.exact(p) - k.exact(mu)
            d_sum = Ball(d, 0, (q * count).sqrt() * error, k)  # sum |x - p| <= sqrt(n q)
            s = s + d_sum + count * off
            v = v + Ball(q, error, 0, k) + 2 * off * d_sum + count * off * off
        v = v - s * s / total
        mean = k.exact(mu) + s / total
        rstd = 1 / k.sqrt(v / total + Fraction(eps))
        found, failed = [], rows.new_zeros(len(rows), dtype=torch.bool)
        for ball in (mean, rstd, v / max(total - 1, 1)):
            e = ball.error * SLACK + 2 * U * ball.mid.abs() + TINY
            low, high = (ball.mid - e).float(), (ball.mid + e).float()
            failed |= ~(low.view(torch.int32) == high.view(torch.int32)) | ~ball.mid.isfinite()
            found.append(high)
        if total == 1:
            failed[:] = True
        *found, failed = group.to_all(torch.stack([*found, failed.float()]))[0]
        doubtful = failed.nonzero().squeeze(1)
        if len(doubtful):
            whole = normalization.channel_rows(gathered(Sharded(x.local[:, doubtful], x.at)))
            exact = *mean_and_rstd(whole, eps), row_variance(whole, 1)
            for known, settled in zip(found, exact):
                known[doubtful] = settled.squeeze(1)
    return found[0], found[1], found[2]


def batch_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, w, running_mean, running_var, mean, rstd, train, eps, mask = args
    if not (isinstance(g, Sharded) and isinstance(x, Sharded)) or g.at != x.at or not train:
        return everywhere(func, args, kwargs)
    if x.at.dim or x.at.length(1) != 1:
        return everywhere(func, args, kwargs)
    at, n = x.at, x.numel() // max(x.shape[1], 1)
    grad_x = grad_w = grad_b = None
    with raw():
        m, r = mean.unsqueeze(1), rstd.unsqueeze(1)
        scale = torch.ones_like(m) if w is None else w.detach().unsqueeze(1)
        rows = [normalization.channel_rows(t.local) for t in (g, x)]
        if mask[0] and n > 1:
            sums = [_scaled_sum([*rows, m, r, scale], n), plain_sum(rows[0], n, times=scale)]
            b, a = (_column(t, x) for t in merge(at.group, sums))
            m, r, scale = (_column(t, x) for t in (m, r, scale))
            grad_x = element_backward(n, g.local, scale.expand(g.local.shape), x.local, m, r, a, b)
        elif mask[0]:
            grad_x = torch.zeros_like(x.local)
        scaled = _scaled_sum([*rows, mean.unsqueeze(1), rstd.unsqueeze(1)], n)
    if mask[1]:
        grad_w = exchanged(at.group, scaled, mean.shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return None if grad_x is None else Sharded(grad_x, at), grad_w, grad_b


def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, w, b, n, *rest = args
    if not isinstance(x, Sharded) or x.at.dim or x.at.length(1) != 1:
        return everywhere(func, args, kwargs)
    return tuple(Sharded(y, x.at) for y in func(x.local, w, b, len(x.local), *rest))


def group_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, mean, rstd, w, n, c, hw, groups, mask = args
    if not all(isinstance(t, Sharded) and t.at == x.at for t in (g, x, mean, rstd)):
        return everywhere(func, args, kwargs)
    grad_x = grad_w = grad_b = None
    local = [t.local for t in (g, x, mean, rstd)]
    if mask[0]:
        grad_x = func(*local, w, len(local[0]), c, hw, groups, [True, False, False])[0]
        grad_x = Sharded(grad_x, x.at)
    if mask[1]:
        split = (len(local[0]), groups, c // groups, hw)
        with raw():
            shapes = (split, split, *[(split[0], groups, 1, 1)] * 2)
            flat = [t.reshape(s).expand(split) for t, s in zip(local, shapes)]
            flat = [t.permute(1, 2, 0, 3).reshape(c, split[0] * hw) for t in flat]
            partial = _scaled_sum(flat, n * hw)
        grad_w = exchanged(x.at.group, partial, (c,))
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return grad_x, grad_w, grad_b
