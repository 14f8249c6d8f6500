"""The table of rules: what each operator does with a Sharded tensor, one line for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from reproml.arithmetic.distributed.operands import (
    shard_hidden_state,
    shard_local_operands,
    shard_targets,
)
from reproml.arithmetic.distributed.rules import compute, losses, normalization, views
from reproml.arithmetic.distributed.sharded import DEFAULT, FUNCTIONS, OPERATORS, Rule

ELEMENTWISE = """
    add sub rsub mul div reciprocal sqrt rsqrt neg abs sign sgn pow addcmul addcdiv lerp xlogy
    exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv
    hypot copysign fmax fmin frac fmod remainder floor_divide nan_to_num heaviside
    special_xlog1py exp2 log2 log10 logaddexp logaddexp2 logit logit_backward
    tan asin acos atan atan2 sinh cosh asinh acosh atanh sinc lgamma digamma polygamma mvlgamma
    deg2rad rad2deg angle special_entr
    relu threshold gelu silu softplus mish log_sigmoid_forward leaky_relu _prelu_kernel elu celu
    hardtanh hardsigmoid hardswish softshrink hardshrink softshrink_backward hardshrink_backward
    rrelu_with_noise_backward
    tanh_backward sigmoid_backward threshold_backward gelu_backward silu_backward softplus_backward
    mish_backward log_sigmoid_backward leaky_relu_backward _prelu_kernel_backward elu_backward
    hardtanh_backward hardsigmoid_backward hardswish_backward
    clamp clamp_min clamp_max maximum minimum eq ne lt le gt ge isnan isinf isfinite signbit
    logical_not logical_and logical_or bitwise_not bitwise_and bitwise_or where masked_fill
    floor ceil round trunc
    clone detach alias lift lift_fresh contiguous _to_copy copy fill zero
    empty_like zeros_like ones_like full_like
""".split()

# fmt: off
# A name with "_" at its end is the in-place variant; without a line here it is refused.
OPERATORS.update({
    DEFAULT: Rule(compute.on_gathered_batch),
    **dict.fromkeys([*ELEMENTWISE, *[name + "_" for name in ELEMENTWISE]],
                    Rule(compute.elementwise, takes_local_rows=True)),
    **dict.fromkeys("""
        _softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
        amax amin max min argmax argmin any all cumsum var std linalg_vector_norm norm sort topk
        gather scatter scatter_add index_select flip
    """.split(), Rule(compute.along_dims, takes_local_rows=True)),
    **{name: Rule(function) for names, function in {
        "sum mean": compute.sum_or_mean,
        "mm bmm addmm baddbmm": compute.matmul,
        """
            convolution max_pool2d_with_indices max_pool2d_with_indices_backward
            avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
            adaptive_max_pool2d adaptive_max_pool2d_backward
            reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
            upsample_nearest1d pixel_shuffle pixel_unshuffle
            _native_batch_norm_legit_no_training
        """: compute.row_by_row,
        "convolution_backward": compute.convolution_backward,
        "embedding": compute.embedding,
        "native_layer_norm": normalization.layer_norm,
        "native_layer_norm_backward": normalization.layer_norm_backward,
        "native_group_norm": normalization.group_norm,
        "native_group_norm_backward": normalization.group_norm_backward,
        "native_batch_norm _native_batch_norm_legit": normalization.batch_norm,
        "native_batch_norm_backward": normalization.batch_norm_backward,
        "nll_loss_forward": losses.nll_loss,
        "nll_loss2d_forward": losses.nll_loss2d,
        "nll_loss_backward nll_loss2d_backward": losses.nll_loss_backward,
        """
            mse_loss_backward smooth_l1_loss_backward huber_loss_backward soft_margin_loss_backward
            binary_cross_entropy_backward
        """: losses.loss_backward,
        "view _unsafe_view _reshape_alias": views.view,
        "t": views.t,
        "transpose": views.transpose,
        "transpose_": views.transpose_,
        "permute": views.permute,
        "unsqueeze": views.unsqueeze,
        "squeeze": views.squeeze,
        "expand": views.expand,
        "slice": views.slice_,
        "select split split_with_sizes unsafe_split unbind": views.select_or_split,
        "select_backward slice_backward": views.select_backward,
        "cat stack": views.cat_or_stack,
        "constant_pad_nd": views.constant_pad,
        "new_empty new_zeros new_ones new_full new_empty_strided": compute.new_tensor,
        "bernoulli_ uniform_ normal_ exponential_ random_ rand_like randn_like randint_like":
            compute.random_numbers,
    }.items() for name in names.split()},
})

# Functions that have several objects for one name: torch.add, Tensor.add, Tensor.__add__.
FUNCTIONS.update(dict.fromkeys([
    *ELEMENTWISE, *[a + b for a in "ri" for b in "add sub mul div truediv pow".split()],
    *"gather take_along_dim truediv true_divide divide multiply subtract square".split(),
], shard_local_operands))
FUNCTIONS.update(dict.fromkeys([
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
    F.poisson_nll_loss, F.hinge_embedding_loss, F.multilabel_soft_margin_loss,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
    F.soft_margin_loss, F.multi_margin_loss, F.multilabel_margin_loss,
    F.cosine_similarity, F.pairwise_distance,
], shard_targets(2)))
FUNCTIONS.update(dict.fromkeys([
    F.gaussian_nll_loss, F.cosine_embedding_loss, F.margin_ranking_loss, F.triplet_margin_loss,
], shard_targets(3)))
FUNCTIONS.update(dict.fromkeys(
    [torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu], shard_hidden_state(1)
))
FUNCTIONS.update(dict.fromkeys(
    [torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell], shard_hidden_state(0)
))
# fmt: on
