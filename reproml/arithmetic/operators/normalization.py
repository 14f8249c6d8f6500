"""PyTorch's operators of batch, group and layer normalization.

Each operator tries the compiled path (normalization_compiled.py) first; if that returns None, it computes
the result on the reference path, by the rounded steps of normalization_reference.py. Tensors are float32;
x is [n, c, ...] for batch and group normalization. Without a weight or bias, 1 and 0 take their place.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.formats import storing, writing
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require_shape
from reproml.arithmetic.operators.normalization_compiled import (
    compiled_batch_norm,
    compiled_batch_norm_backward,
    compiled_group_norm,
    compiled_group_norm_backward,
    compiled_layer_norm,
    compiled_layer_norm_backward,
)
from reproml.arithmetic.operators.normalization_reference import (
    mean_and_rstd,
    normalize,
    rows_backward,
    weight_gradient,
)
from reproml.arithmetic.operators.reductions import reduce_sum, row_variance

# ---- batch normalization -----------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and in training the mean and rstd of each channel (otherwise empty).

    Running statistics become (1 - momentum) * old + momentum * new, rounded once, where the new ones are
    the rounded mean and the rounded unbiased variance.
    """
    _check_channels(x, weight, bias, running_mean, running_var)
    if not training:
        _require_statistics(running_mean, running_var)
    arguments = (x, weight, bias, running_mean, running_var, training, momentum, eps)
    compiled = compiled_batch_norm(*arguments)
    if compiled is not None:
        return compiled
    rows = channel_rows(x)
    if training:
        mean, rstd = mean_and_rstd(rows, eps)
        if running_mean is not None:
            update_running_stat(running_mean, mean.squeeze(1), momentum)
        if running_var is not None:
            with storing():
                variance = row_variance(rows, 1).squeeze(1)
            update_running_stat(running_var, variance, momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, rstd = running_mean.unsqueeze(1), _rstd(running_var, eps).unsqueeze(1)
    out = _from_channel_rows(normalize(rows, mean, rstd, _column(weight), _column(bias)), x)
    if not training:
        return out, x.new_empty(0), x.new_empty(0)
    return out, mean.squeeze(1), rstd.squeeze(1)


def batch_norm_legit(
    x: Tensor, weight: Any, bias: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten._native_batch_norm_legit, whose overload `no_stats` has no running statistics."""
    stats = rest[:-3] or (None, None)
    return batch_norm(x, weight, bias, *stats, *rest[-3:])


def batch_norm_inference(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute aten._native_batch_norm_legit_no_training."""
    return batch_norm(x, weight, bias, mean, var, False, momentum, eps)


def batch_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    mean: Optional[Tensor],
    rstd: Optional[Tensor],
    train: bool,
    eps: float,
    mask: list[bool],
) -> tuple[Optional[Tensor], ...]:
    """Return the gradients of x, weight and bias, each None unless `mask` asks for it."""
    _check_channels(x, weight, None, running_mean, running_var)
    require_shape("the gradient", g, x.shape)
    if not train:
        _require_statistics(running_mean, running_var)
        assert running_mean is not None and running_var is not None
        mean, rstd = running_mean, _rstd(running_var, eps)
    _require_statistics(mean, rstd)
    assert mean is not None and rstd is not None
    _check_channels(x, None, None, mean, rstd)
    compiled = compiled_batch_norm_backward(g, x, weight, mean, rstd, not train, mask)
    if compiled is not None:
        return compiled
    rows, g_rows = channel_rows(x), channel_rows(g)
    mean, rstd = mean.unsqueeze(1), rstd.unsqueeze(1)
    w = torch.ones_like(mean) if weight is None else weight.unsqueeze(1)
    grad_x = None
    if mask[0] and train:
        grad_x = _from_channel_rows(rows_backward(g_rows, rows, mean, rstd, w), x)
    elif mask[0]:
        grad_x = _from_channel_rows(elementwise(lambda ctx, g, w, r: g * w * r, g_rows, w, rstd), x)
    grad_weight = weight_gradient(g_rows, rows, mean, rstd) if mask[1] else None
    return grad_x, grad_weight, reduce_sum(g_rows, (1,)) if mask[2] else None


def _check_channels(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    mean: Optional[Tensor],
    variance: Optional[Tensor],
) -> None:
    if x.dim() < 2:
        raise RuntimeError(f"batch normalization expects an input [n, c, ...], not {list(x.shape)}")
    channels = x.shape[1:2]
    require_shape("the input", x, x.shape)
    require_shape("the weight", weight, channels)
    require_shape("the bias", bias, channels)
    require_shape("the mean", mean, channels)
    require_shape("the variance", variance, channels)


def _require_statistics(mean: Optional[Tensor], variance: Optional[Tensor]) -> None:
    if mean is None or variance is None:
        raise RuntimeError("batch normalization without statistics of its own needs those given")


def update_running_stat(running: Tensor, new: Tensor, momentum: float) -> None:
    """Write (1 - momentum) * running + momentum * new to `running`, rounded once."""
    m = float32_scalar(momentum)
    with writing():
        running.copy_(elementwise(lambda ctx, old, new: (1 - m) * old + m * new, running, new))


def _rstd(variance: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(variance + eps), rounded once."""
    with storing():
        return elementwise(lambda ctx, v: 1 / ctx.sqrt(v + Fraction(eps)), variance)


def channel_rows(x: Tensor) -> Tensor:
    """Return the numbers of each channel as a row: [n, c, ...] -> [c, n * ...]."""
    return x.transpose(0, 1).reshape(x.shape[1], x[:, :1].numel())


def _from_channel_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `channel_rows`, for the shape of `like`."""
    n, c, *rest = like.shape
    return rows.reshape(c, n, *rest).transpose(0, 1).contiguous()


def _column(x: Optional[Tensor]) -> Optional[Tensor]:
    return None if x is None else x.unsqueeze(1)


# ---- layer normalization -----------------------------------------------------------------------------


def layer_norm(
    x: Tensor, shape: list[int], weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize over the last axes, `shape`; return the output, and mean and rstd with length 1 there.

    Raises RuntimeError for an input, weight or bias of another shape.
    """
    _check_layer(x, shape, weight, bias)
    compiled = compiled_layer_norm(x, shape, weight, bias, eps)
    if compiled is not None:
        return compiled
    outer = x.shape[: x.dim() - len(shape)]
    rows = x.reshape(outer.numel(), math.prod(shape))
    mean, rstd = mean_and_rstd(rows, eps)
    flat = [None if p is None else p.reshape(1, -1) for p in (weight, bias)]
    kept = (*outer, *[1] * len(shape))
    return (
        normalize(rows, mean, rstd, *flat).reshape(x.shape),
        mean.reshape(kept),
        rstd.reshape(kept),
    )


def layer_norm_backward(
    g: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    mask: list[bool],
) -> tuple[Optional[Tensor], ...]:
    """Return the gradients of x, weight and bias, each None unless `mask` asks for it."""
    _check_layer(x, shape, weight, bias)
    outer = x.shape[: x.dim() - len(shape)]
    rows = math.prod(outer)
    require_shape("the gradient", g, x.shape)
    for name, t in (("the mean", mean), ("rstd", rstd)):
        require_shape(name, t.reshape(-1), (rows,))
    compiled = compiled_layer_norm_backward(g, x, shape, mean, rstd, weight, mask)
    if compiled is not None:
        return compiled
    x_rows, g_rows = (t.reshape(rows, math.prod(shape)) for t in (x, g))
    mean, rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
    w = torch.ones_like(x_rows[:1]) if weight is None else weight.reshape(1, -1)
    grad_x = rows_backward(g_rows, x_rows, mean, rstd, w).reshape(x.shape) if mask[0] else None
    across = [t.expand(x_rows.shape).t() for t in (g_rows, x_rows, mean, rstd)]
    grad_weight = weight_gradient(*across).reshape(shape) if mask[1] else None
    return grad_x, grad_weight, reduce_sum(g_rows, (0,)).reshape(shape) if mask[2] else None


def _check_layer(
    x: Tensor, shape: list[int], weight: Optional[Tensor], bias: Optional[Tensor]
) -> None:
    """Check what PyTorch checks only in its own kernel."""
    require_shape("the input", x, x.shape)
    if not len(shape) or list(x.shape[-len(shape) :]) != list(shape):
        raise RuntimeError(
            f"layer normalization with normalized_shape {list(shape)} expects an input of shape [*, "
            f"{', '.join(map(str, shape))}], not {list(x.shape)}"
        )
    require_shape("the weight", weight, shape)
    require_shape("the bias", bias, shape)


# ---- group normalization -----------------------------------------------------------------------------


def group_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    n: int,
    c: int,
    hw: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and mean and rstd, float32 [n, groups].

    Raises RuntimeError for an input, weight or bias of another shape.
    """
    _check_groups(x, weight, bias, n, c, hw, groups)
    compiled = compiled_group_norm(x, weight, bias, n, c, hw, groups, eps)
    if compiled is not None:
        return compiled
    rows = x.reshape(n * groups, c // groups * hw)
    mean, rstd = mean_and_rstd(rows, eps)
    split = (n, groups, c // groups, hw)
    flat = [None if p is None else p.reshape(1, groups, -1, 1) for p in (weight, bias)]
    stats = (t.reshape(n, groups, 1, 1) for t in (mean, rstd))
    out = normalize(x.reshape(split), *stats, *flat).reshape(x.shape)
    return out, mean.reshape(n, groups), rstd.reshape(n, groups)


def group_norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Optional[Tensor],
    n: int,
    c: int,
    hw: int,
    groups: int,
    mask: list[bool],
) -> tuple[Optional[Tensor], ...]:
    """Return the gradients of x, weight and bias, each None unless `mask` asks for it."""
    _check_groups(x, weight, None, n, c, hw, groups)
    require_shape("the gradient", g, x.shape)
    require_shape("the mean", mean, (n, groups))
    require_shape("rstd", rstd, (n, groups))
    compiled = compiled_group_norm_backward(g, x, mean, rstd, weight, n, c, hw, groups, mask)
    if compiled is not None:
        return compiled
    split = (n, groups, c // groups, hw)
    w = (x.new_ones(c) if weight is None else weight).reshape(1, groups, -1, 1)
    grad_x = None
    if mask[0]:
        g_rows, rows = (t.reshape(n * groups, c // groups * hw) for t in (g, x))
        row_mean, row_rstd = (t.reshape(n * groups, 1) for t in (mean, rstd))
        w_rows = w.expand(split).reshape(n * groups, c // groups * hw)
        grad_x = rows_backward(g_rows, rows, row_mean, row_rstd, w_rows).reshape(x.shape)

    def by_channel(t: Tensor) -> Tensor:
        return t.expand(split).permute(1, 2, 0, 3).reshape(c, n * hw)

    g4, x4 = g.reshape(split), x.reshape(split)
    m4, r4 = (t.reshape(n, groups, 1, 1) for t in (mean, rstd))
    grad_weight = weight_gradient(*map(by_channel, (g4, x4, m4, r4))) if mask[1] else None
    return grad_x, grad_weight, reduce_sum(by_channel(g4), (1,)) if mask[2] else None


def _check_groups(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    n: int,
    c: int,
    hw: int,
    groups: int,
) -> None:
    if min(n, c, hw) < 0 or groups < 1 or c % groups or x.numel() != n * c * hw:
        raise RuntimeError(
            f"an input of shape {list(x.shape)} is not {n} times {c} channels of {hw} numbers in {groups} "
            "equal groups"
        )
    require_shape("the input", x, x.shape)
    require_shape("the weight", weight, (c,))
    require_shape("the bias", bias, (c,))
