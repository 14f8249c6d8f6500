"""What each operator does with a dealt batch: a line for each."""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.nn.functional as F

from reproml.arithmetic.distributed.operands import (
    note_operands,
    with_rows,
    with_state,
    with_target,
)
from reproml.arithmetic.distributed.rules import compute, losses, normalization, views
from reproml.arithmetic.distributed.sharded import Sharded, use_rules

Rule = Callable[[Any, Any, Any], Any]  # (operator, positional, keywords) -> result

# Functions of torch that take plain tensors beside the batch: how these become part of it.
FUNCTIONS: dict[Any, Callable[[Any, Any], tuple[Any, Any]]] = {
    **dict.fromkeys([
        F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
        F.poisson_nll_loss, F.hinge_embedding_loss, F.multilabel_soft_margin_loss,
        F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
        F.cosine_similarity, F.pairwise_distance,
    ], with_target(2)),
    **dict.fromkeys([
        F.gaussian_nll_loss, F.cosine_embedding_loss, F.margin_ranking_loss,
        F.triplet_margin_loss,
    ], with_target(3)),
    **dict.fromkeys([torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu], with_state(1)),
    **dict.fromkeys(
        [torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell], with_state(0)
    ),
}  # fmt: skip


def prepared(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a function of torch, with plain tensors that are rows known as such."""
    if func in FUNCTIONS:
        return FUNCTIONS[func](args, kwargs)
    if func.__name__.strip("_") in _BESIDE:
        return with_rows(func.__name__, args), kwargs
    return args, kwargs


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator; from the gathered batch if the table does not have it."""
    name = func._schema.name[len("aten::") :]
    rule = RULES.get(name) or RULES.get(name.rstrip("_")) or compute.everywhere
    note_operands(args, kwargs, rule in (compute.pointwise, compute.along))
    if func._schema.is_mutable and not (rule in _IN_PLACE and name.endswith("_")):
        everywhere = compute.everywhere  # which refuses it
        rule = RULES[name] if name == "_native_batch_norm_legit" else everywhere
    return rule(func, args, kwargs)


_IN_PLACE = (compute.pointwise, compute.drawn, views.transpose_)


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


# fmt: off
RULES: dict[str, Rule] = {
    **_each("""
        add sub rsub mul div reciprocal sqrt rsqrt neg abs sign sgn pow addcmul addcdiv lerp xlogy
        exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv
        relu threshold gelu silu softplus mish log_sigmoid_forward leaky_relu _prelu_kernel elu celu
        hardtanh hardsigmoid hardswish
        tanh_backward sigmoid_backward threshold_backward gelu_backward silu_backward softplus_backward
        mish_backward log_sigmoid_backward leaky_relu_backward _prelu_kernel_backward elu_backward
        hardtanh_backward hardsigmoid_backward hardswish_backward
        clamp clamp_min clamp_max maximum minimum eq ne lt le gt ge isnan isinf isfinite signbit
        logical_not logical_and logical_or bitwise_not bitwise_and bitwise_or where masked_fill
        floor ceil round trunc
        clone detach alias lift lift_fresh contiguous _to_copy copy fill zero
        empty_like zeros_like ones_like full_like
    """, compute.pointwise),
    **_each("sum mean", compute.total),
    **_each("""
        _softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
        amax amin max min argmax argmin any all cumsum var std linalg_vector_norm norm sort topk
        gather scatter scatter_add index_select flip
    """, compute.along),
    **_each("mm bmm addmm baddbmm", compute.matmul),
    **_each("""
        convolution max_pool2d_with_indices max_pool2d_with_indices_backward
        avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
        adaptive_max_pool2d adaptive_max_pool2d_backward
        reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
        upsample_nearest1d pixel_shuffle pixel_unshuffle
    """, compute.each_row),
    "convolution_backward": compute.convolution_backward,
    "embedding": lambda func, args, kwargs: (
        compute.everywhere(func, args, kwargs) if isinstance(args[0], Sharded)
        else Sharded(func(args[0], args[1].local, *args[2:], **kwargs), args[1].at)
    ),
    "native_layer_norm": normalization.layer_norm,
    "native_layer_norm_backward": normalization.layer_norm_backward,
    "native_group_norm": normalization.group_norm,
    "native_group_norm_backward": normalization.group_norm_backward,
    **_each("native_batch_norm _native_batch_norm_legit", normalization.batch_norm),
    "native_batch_norm_backward": normalization.batch_norm_backward,
    "_native_batch_norm_legit_no_training": compute.each_row,
    "nll_loss_forward": losses.nll_loss,
    **_each("nll_loss_backward nll_loss2d_backward", losses.nll_loss_backward),
    **_each("""
        mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward
    """, losses.loss_backward),
    **_each("view _unsafe_view _reshape_alias", views.view),
    "t": views.permuted(lambda rank, _: range(rank)[::-1]),
    "transpose": views.permuted(views.swapped),
    "transpose_": views.transpose_,
    "permute": views.permuted(lambda rank, args: args[0]),
    "unsqueeze": views.unsqueeze,
    "squeeze": views.squeeze,
    "expand": views.expand,
    "slice": views.slice_,
    **_each("select split split_with_sizes unsafe_split unbind", views.parted),
    **_each("select_backward slice_backward", views.part_backward),
    **_each("cat stack", views.joined),
    "constant_pad_nd": views.padded,
    **_each("new_empty new_zeros new_ones new_full new_empty_strided", compute.new),
    **_each("""
        bernoulli_ uniform_ normal_ exponential_ random_ rand_like randn_like randint_like
    """, compute.drawn),
}
# fmt: on

# Names of functions of torch beside whose batch a plain tensor may be this worker's rows.
_BESIDE = {name for name, rule in RULES.items() if rule is compute.pointwise}
_BESIDE |= {a + b for a in "ri" for b in "add sub mul div truediv pow".split()}
_BESIDE |= set("gather take_along_dim truediv true_divide divide multiply subtract square".split())

use_rules(prepared, computed)
