"""The table of operators: what each ATen operator does within `exact()`, one line per operator.

To find an operator, search for its ATen name (`_softmax_backward_data`, `addmm`, `pow`). Its line in
EXACT names the function that defines it, and the file: `softmax.softmax_backward` is in
operators/softmax.py. An operator in DATA_MOVEMENT runs as PyTorch implements it. In-place, out= and
foreach forms follow from the line of the plain operator. An operator without a line raises NotExactError,
unless PyTorch composes it from others or it takes and returns no floating-point numbers (handlers.py).

To add an operator, change four files:

1. its family's file in operators/: the definition;
2. this file: a line in EXACT;
3. tests/arithmetic/test_operator_table.py: a case with its oracle, without which test_coverage.py fails;
4. docs/operators.md: a line in the table of operators.

Its backward operator, if PyTorch has one, needs the same. A change of an existing definition's results
also raises `DEFINITIONS` and invalidates the golden files.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic import layouts
from reproml.arithmetic.operators import (
    activations,
    casts,
    composites,
    convolution,
    creation,
    ctc,
    elementary,
    embedding_bag,
    gamma_draws,
    grad_scaling,
    grid_sampling,
    histograms,
    indexing,
    linalg,
    linear_systems,
    losses,
    margin_losses,
    matmul,
    normalization,
    norms,
    optimizers,
    pointwise,
    pooling,
    powers,
    products,
    random,
    recurrent,
    reductions,
    remainders,
    scatter,
    selection,
    small_matrices,
    softmax,
    special,
    upsampling,
    windows,
)

# fmt: off
# DATA_MOVEMENT: operators that copy, select, compare or round to integers. Each number they
# return is one of their operands', its negative or its rounding to an integer, or a constant. So every
# implementation returns the same bits, and PyTorch's own runs. VIEWS and COPIES are the most frequent
# ones, three calls of four; the dispatcher runs them without calling Python, COPIES as long as no
# accelerator is in use (dispatch/dispatcher.py).
#
# VIEWS: views of a tensor's memory, and new tensors that are empty or filled with a constant.
VIEWS = frozenset("""
alias as_strided detach diagonal expand permute select slice split split_with_sizes squeeze t transpose
unbind unfold unsqueeze view _reshape_alias _unsafe_view
flatten reshape narrow chunk contiguous
empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like
new_ones lift_fresh empty_permuted _fw_primal
""".split())
# COPIES: operators that write some of their operands' numbers to a new tensor, and have no overload that
# computes.
COPIES = frozenset("""
cat stack index index_select embedding threshold_backward zero _local_scalar_dense argmax argmin
clone max_pool2d_with_indices where
""".split())
DATA_MOVEMENT = VIEWS | COPIES | frozenset("""
constant_pad_nd diagonal_copy flip lift pixel_shuffle pixel_unshuffle repeat resize_ roll tril triu
unsafe_split set select_copy select_backward slice_backward diagonal_backward
reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d _pack_padded_sequence
reflection_pad3d replication_pad3d max_pool3d_with_indices adaptive_max_pool3d
fractional_max_pool2d fractional_max_pool3d im2col channel_shuffle native_channel_shuffle
masked_fill eye item eq ne lt le gt ge isnan isinf isfinite equal is_nonzero sign sgn
logical_not logical_and logical_or logical_xor any count_nonzero isposinf isneginf isin searchsorted
bucketize all
masked_select gather _unsafe_index index_fill take nonzero
scatter masked_scatter diag_embed
hardtanh sort topk
abs neg relu threshold adaptive_max_pool2d nan_to_num heaviside
cummax cummin masked_scatter_backward
floor ceil trunc
alias_copy as_strided_copy detach_copy expand_copy narrow_copy permute_copy slice_copy split_copy
split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy unsqueeze_copy view_copy
as_strided_scatter diagonal_scatter select_scatter slice_scatter
block_diag rot90 resize_as nonzero_static _chunk_cat lu_unpack
_efficientzerotensor is_same_size _make_dual _new_zeros_with_same_feature_meta
_has_same_storage_numel
""".split())

# UNDEFINED_OVERLOADS: overloads that are refused although their operator is in DATA_MOVEMENT or EXACT.
UNDEFINED_OVERLOADS = frozenset("""
scatter.reduce scatter.value_reduce
mm.dtype bmm.dtype addmm.dtype baddbmm.dtype
""".split())

# INTEGER: operators in EXACT whose result is an integer if all operands are; PyTorch computes that.
INTEGER = frozenset("""
add sub rsub mul sum cumsum mm bmm mv dot addmm baddbmm addmv trace pow addcmul scatter_add index_add
index_put index_put_ max min amax amin maximum minimum clamp clamp_min clamp_max signbit
fmax fmin fmod remainder floor_divide
prod cumprod nansum scatter_reduce index_reduce index_copy _unsafe_index_put addbmm addr vdot linalg_cross
median nanmedian kthvalue mode aminmax bincount _unique2 unique_dim unique_consecutive round
""".split())

# FLOAT64: operators in EXACT that are also defined for float64 tensors, rounded once to binary64.
FLOAT64 = frozenset("""
add sub rsub mul div reciprocal sqrt max min amax amin maximum minimum clamp clamp_min clamp_max signbit
copysign fmax fmin frac allclose addcmul addcdiv lerp pow rsqrt hypot fmod remainder floor_divide round
nextafter arange linspace logspace
hann_window hamming_window blackman_window bartlett_window kaiser_window
sum mean cumsum var std std_mean var_mean nansum trace
index_put index_put_ _index_put_impl_ _unsafe_index_put index_copy put scatter_add index_add
embedding_dense_backward unfold_backward reflection_pad1d_backward reflection_pad2d_backward
replication_pad1d_backward replication_pad2d_backward reflection_pad3d_backward
replication_pad3d_backward
scatter_reduce index_reduce _unsafe_masked_index _unsafe_masked_index_put_accumulate
prod cumprod aminmax kthvalue median nanmedian mode _unique2 unique_dim unique_consecutive
linalg_vector_norm norm dist renorm embedding_renorm _cdist_forward _euclidean_dist _cdist_backward
_pdist_forward _pdist_backward _weight_norm_interface _weight_norm_interface_backward
mm bmm mv dot addmm baddbmm addmv vdot addbmm addr _trilinear linalg_cross linalg_qr
convolution convolution_backward
native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm_backward
native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv tan atan atan2 asin acos sinh cosh asinh
acosh atanh exp2 log2 log10 logaddexp logaddexp2 xlogy special_xlog1py special_entr logit logit_backward
sinc lgamma digamma polygamma deg2rad rad2deg angle
tanh_backward sigmoid_backward gelu gelu_backward silu silu_backward softplus softplus_backward mish
mish_backward log_sigmoid_forward log_sigmoid_backward leaky_relu leaky_relu_backward _prelu_kernel
_prelu_kernel_backward elu celu elu_backward hardtanh_backward hardsigmoid hardsigmoid_backward hardswish
hardswish_backward glu glu_backward softshrink softshrink_backward hardshrink hardshrink_backward
rrelu_with_noise_backward
_softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
logcumsumexp
nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward
smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
binary_cross_entropy_with_logits
binary_cross_entropy_backward soft_margin_loss soft_margin_loss_backward multi_margin_loss
multi_margin_loss_backward multilabel_margin_loss_forward multilabel_margin_loss_backward
max_pool2d_with_indices_backward adaptive_max_pool2d_backward max_pool3d_with_indices_backward
adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward max_unpool2d
max_unpool3d avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward avg_pool3d
avg_pool3d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward col2im
upsample_nearest1d_backward upsample_nearest2d_backward upsample_nearest3d_backward
_upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa upsample_linear1d_backward upsample_bilinear2d_backward
upsample_trilinear3d_backward upsample_bicubic2d_backward _upsample_bilinear2d_aa_backward
_upsample_bicubic2d_aa_backward affine_grid_generator
_embedding_bag _embedding_bag_forward_only _embedding_bag_backward _embedding_bag_dense_backward
_embedding_bag_per_sample_weights_backward
rand rand_like uniform_ randn randn_like normal normal_ multinomial bernoulli bernoulli_ native_dropout
native_dropout_backward exponential_ cauchy_ rrelu_with_noise
_amp_foreach_non_finite_check_and_unscale_
""".split())

# MIXED_FLOATS: operators in FLOAT64 whose definitions take float32 beside float64 tensors as they are.
MIXED_FLOATS = frozenset("""
bernoulli bernoulli_ _amp_foreach_non_finite_check_and_unscale_
""".split())

# ANY_FORMAT: operators in EXACT whose definitions take tensors of 16 bits as they are.
ANY_FORMAT = frozenset("""
randint randint_like randperm random_ _fused_adam_ _fused_adamw_ _fused_sgd_
_amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_
""".split())

# FLOAT32_ONLY: operators in EXACT that PyTorch has no kernel on the CPU for in 16 bits; the result of
# bincount would be float64.
FLOAT32_ONLY = frozenset("""
_cdist_forward _cdist_backward _euclidean_dist _pdist_forward _pdist_backward linalg_qr
histogram multilabel_margin_loss_forward multilabel_margin_loss_backward bincount
""".split())

# ONE_DTYPE: operators in EXACT that need one dtype among their floating-point operands, as in PyTorch or in
# one of its versions. RESULT_LIKE: operators that need no operand wider than the one at this place, whose
# dtype PyTorch gives the result.
ONE_DTYPE = frozenset("""
mm bmm mv dot vdot addmm baddbmm addmv addbmm _grouped_mm _trilinear linalg_cross
convolution convolution_backward grid_sampler_2d grid_sampler_2d_backward grid_sampler_3d
grid_sampler_3d_backward
_linalg_solve_ex linalg_solve_triangular triangular_solve linalg_lu_solve cholesky_solve linalg_lstsq
scatter_add index_add index_put index_put_ _index_put_impl_ _unsafe_index_put put
_unsafe_masked_index_put_accumulate scatter_reduce index_reduce index_copy _segment_reduce_backward
_embedding_bag _embedding_bag_forward_only _embedding_bag_backward _embedding_bag_dense_backward
_embedding_bag_per_sample_weights_backward
avg_pool2d_backward _adaptive_avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool3d_backward
max_pool2d_with_indices_backward adaptive_max_pool2d_backward fractional_max_pool2d_backward
max_pool3d_with_indices_backward adaptive_max_pool3d_backward fractional_max_pool3d_backward
reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
_cdist_forward _euclidean_dist _cdist_backward _pdist_backward _weight_norm_interface allclose normal
_softmax_backward_data _log_softmax_backward_data
_prelu_kernel _prelu_kernel_backward glu_backward mish_backward log_sigmoid_backward
rrelu_with_noise rrelu_with_noise_backward lerp
nll_loss_forward nll_loss_backward nll_loss2d_forward nll_loss2d_backward _ctc_loss_backward
binary_cross_entropy binary_cross_entropy_backward mse_loss_backward smooth_l1_loss_backward
huber_loss_backward soft_margin_loss_backward multi_margin_loss multi_margin_loss_backward
multilabel_margin_loss_backward
""".split())
RESULT_LIKE = {"binary_cross_entropy_with_logits": 1, "huber_loss": 0, "soft_margin_loss": 0}

# WITH_PARAMETERS: operators with the places of their operands that need one dtype, and of parameters that
# need one dtype as well. These and other floating-point operands may be float32 beside 16 bits.
_NORM = ((0,), (1, 2, 3, 4))
WITH_PARAMETERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "native_layer_norm": ((0,), (2, 3)),
    "native_layer_norm_backward": ((0, 1), (5, 6)),
    "native_group_norm": ((0,), (1, 2)),
    "native_group_norm_backward": ((0, 1), (4,)),
    "native_batch_norm": _NORM,
    "_native_batch_norm_legit": _NORM,
    "_native_batch_norm_legit_no_training": _NORM,
    "native_batch_norm_backward": ((0, 1), (2, 3, 4)),
    "_weight_norm_interface_backward": ((0, 1, 2), ()),
}
# fmt: on

# WITHOUT_FORWARD_MODE: operators in EXACT whose forward-mode derivatives differ between versions of
# PyTorch. Handlers do not see which operands have a tangent, so a dual level refuses them for all tensors.
WITHOUT_FORWARD_MODE = frozenset("clamp clamp_min clamp_max maximum minimum fmax fmin".split())
# WITHOUT_NARROW_FORWARD_MODE: operators whose forward-mode derivatives PyTorch computes from their mean and
# rstd. These are float32 here beside operands of 16 bits, and so would be the derivatives.
WITHOUT_NARROW_FORWARD_MODE = frozenset(
    "native_batch_norm _native_batch_norm_legit native_layer_norm native_group_norm".split()
)

# PROMOTING: operators whose operands of other dtypes are rounded to float32 first, as PyTorch promotes
# them. Those of PROMOTE_THEMSELVES do so themselves, by their own result's dtype.
PROMOTE_THEMSELVES = frozenset(
    "add sub rsub mul div sum mean max min amax amin maximum minimum allclose round".split()
)
PROMOTING = (layouts.ELEMENTWISE | {"cumsum"}) - PROMOTE_THEMSELVES

# ROUNDING_INTEGERS: beginnings of the names of operators outside this table that compute with real numbers
# even if they take and return integers.
ROUNDING_INTEGERS = ("upsample_", "_upsample_")

Definition = Callable[..., Any]

# IN_PLACE: in-place forms that are one IEEE 754 operation too, for float32 operands and numbers.
IN_PLACE: dict[str, Definition] = {"add": Tensor.add_, "sub": Tensor.sub_, "mul": Tensor.mul_}

# CASTS: copies of numbers of any dtype that we perform ourselves: casts between dtypes, copies that may
# cast, tensors filled with a number, and nearest-neighbor interpolation.
_aten = torch.ops.aten
CASTS: dict[str, Definition] = {
    "_to_copy": casts.to_copy,
    "copy_": casts.copy_,
    "full": casts.full,
    "full_like": casts.full_like,
    "new_full": casts.new_full,
    "fill": casts.fill,
    "fill_": casts.fill_,
    "scalar_tensor": casts.scalar_tensor,
    "_efficientzerotensor": casts.zero_tensor,
    **{
        f"upsample_nearest{n}d": upsampling.nearest(getattr(_aten, f"upsample_nearest{n}d"))
        for n in (1, 2, 3)
    },
    **{
        f"_upsample_nearest_exact{n}d": upsampling.nearest(
            getattr(_aten, f"_upsample_nearest_exact{n}d"), is_exact=True
        )
        for n in (1, 2, 3)
    },
}

# EXACT: the operators that compute, each with its definition. A definition takes the operator's
# arguments, with tensors of float32, and returns values that are rounded once, or a short expression of
# such values.
EXACT: dict[str, Definition] = {
    # ---- one IEEE 754 operation ------------------------------------------------------------------
    "add": pointwise.add,
    "sub": pointwise.sub,
    "rsub": pointwise.rsub,
    "mul": pointwise.mul,
    "div": pointwise.div,
    "reciprocal": pointwise.reciprocal,
    "sqrt": pointwise.sqrt,
    "max": pointwise.extremum("max"),
    "min": pointwise.extremum("min"),
    "amax": pointwise.extremum("amax"),
    "amin": pointwise.extremum("amin"),
    "maximum": pointwise.maximum,
    "minimum": pointwise.minimum,
    "clamp": pointwise.clamp,
    "clamp_min": pointwise.clamp_min,
    "clamp_max": pointwise.clamp_max,
    "signbit": pointwise.signbit,
    "copysign": pointwise.copysign,
    "fmax": pointwise.fmax,
    "fmin": pointwise.fmin,
    "frac": remainders.frac,
    "nextafter": pointwise.nextafter,
    "frexp": pointwise.frexp,
    "allclose": pointwise.allclose,
    # ---- short expressions -----------------------------------------------------------------------
    "addcmul": pointwise.addcmul,
    "addcdiv": pointwise.addcdiv,
    "lerp": pointwise.lerp,
    "pow": powers.power,
    "rsqrt": pointwise.rsqrt,
    "hypot": elementary.hypot,
    "fmod": remainders.fmod,
    "remainder": remainders.remainder,
    "floor_divide": remainders.floor_divide,
    "round": remainders.round_to_decimals,
    "arange": creation.arange,
    "linspace": creation.linspace,
    "logspace": creation.logspace,
    "hann_window": creation.hann_window,
    "hamming_window": creation.hamming_window,
    "blackman_window": creation.blackman_window,
    "bartlett_window": creation.bartlett_window,
    "kaiser_window": creation.kaiser_window,
    # ---- sums ------------------------------------------------------------------------------------
    "sum": reductions.sum_dims,
    "mean": reductions.mean,
    "cumsum": reductions.cumsum,
    "var": reductions.variance,
    "std": reductions.standard_deviation,
    "std_mean": reductions.standard_deviation_and_mean,
    "var_mean": reductions.variance_and_mean,
    "nansum": reductions.nansum,
    "trace": reductions.trace,
    "scatter_add": indexing.scatter_add,
    "index_add": indexing.index_add,
    "index_put": indexing.index_put,
    "index_put_": indexing.index_put_,
    "_index_put_impl_": indexing.index_put_,
    "_unsafe_index_put": indexing.index_put,
    "put": indexing.put,
    "_unsafe_masked_index": indexing.unsafe_masked_index,
    "_unsafe_masked_index_put_accumulate": indexing.unsafe_masked_index_put_accumulate,
    "unfold_backward": indexing.unfold_backward,
    "reflection_pad1d_backward": indexing.padding_backward(torch.ops.aten.reflection_pad1d),
    "reflection_pad2d_backward": indexing.padding_backward(torch.ops.aten.reflection_pad2d),
    "reflection_pad3d_backward": indexing.padding_backward(torch.ops.aten.reflection_pad3d),
    "replication_pad3d_backward": indexing.padding_backward(torch.ops.aten.replication_pad3d),
    "replication_pad1d_backward": indexing.padding_backward(torch.ops.aten.replication_pad1d),
    "replication_pad2d_backward": indexing.padding_backward(torch.ops.aten.replication_pad2d),
    "embedding_dense_backward": indexing.embedding_backward,
    # ---- reductions at indices, histograms --------------------------------------------------------
    "scatter_reduce": scatter.scatter_reduce,
    "index_reduce": scatter.index_reduce,
    "index_copy": scatter.index_copy,
    "segment_reduce": scatter.segment_reduce,
    "_segment_reduce_backward": scatter.segment_reduce_backward,
    "bincount": histograms.bincount,
    "histc": histograms.histc,
    "histogram": histograms.histogram,
    "_embedding_bag": embedding_bag.embedding_bag,
    "_embedding_bag_forward_only": embedding_bag.embedding_bag,
    "_embedding_bag_backward": embedding_bag.embedding_bag_backward,
    "_embedding_bag_dense_backward": embedding_bag.embedding_bag_dense_backward,
    "_embedding_bag_per_sample_weights_backward": embedding_bag.per_sample_weights_backward,
    # ---- products, selection by order --------------------------------------------------------------
    "prod": products.prod,
    "cumprod": products.cumprod,
    "aminmax": selection.aminmax,
    "kthvalue": selection.kthvalue,
    "median": selection.median,
    "nanmedian": selection.nanmedian,
    "mode": selection.mode,
    "_unique2": selection.unique,
    "unique_dim": selection.unique_dim,
    "unique_consecutive": selection.unique_consecutive,
    # ---- norms and distances -----------------------------------------------------------------------
    "linalg_vector_norm": norms.vector_norm,
    "norm": norms.norm,
    "dist": norms.dist,
    "renorm": norms.renorm,
    "embedding_renorm": norms.embedding_renorm,
    "_cdist_forward": norms.cdist,
    "_euclidean_dist": norms.euclidean_dist,
    "_cdist_backward": norms.cdist_backward,
    "_pdist_forward": norms.pdist,
    "_pdist_backward": norms.pdist_backward,
    "_weight_norm_interface": norms.weight_norm,
    "_weight_norm_interface_backward": norms.weight_norm_backward,
    # ---- matrix products -------------------------------------------------------------------------
    "mm": matmul.matmul,
    "bmm": matmul.matmul,
    "mv": matmul.mv,
    "dot": reductions.dot,
    "addmm": matmul.baddbmm,
    "baddbmm": matmul.baddbmm,
    "addmv": matmul.addmv,
    "vdot": reductions.dot,
    "addbmm": matmul.addbmm,
    "addr": matmul.addr,
    "_grouped_mm": matmul.grouped_mm,
    "_trilinear": linalg.trilinear,
    "linalg_cross": linalg.cross,
    "linalg_qr": linalg.qr,
    # ---- small matrices --------------------------------------------------------------------------
    "linalg_inv_ex": small_matrices.inv,
    "_linalg_solve_ex": small_matrices.solve,
    "linalg_solve_triangular": small_matrices.solve_triangular,
    "triangular_solve": small_matrices.triangular_solve,
    "_linalg_det": small_matrices.det,
    "_linalg_slogdet": small_matrices.slogdet,
    "linalg_lu_factor_ex": small_matrices.lu_factor,
    "linalg_lu": small_matrices.lu,
    "linalg_lu_solve": small_matrices.lu_solve,
    "linalg_cholesky_ex": small_matrices.cholesky_ex,
    "cholesky_solve": small_matrices.cholesky_solve,
    "cholesky_inverse": small_matrices.cholesky_inverse,
    "linalg_lstsq": small_matrices.lstsq,
    "linalg_pinv": small_matrices.pinv,
    # ---- convolution and pooling -----------------------------------------------------------------
    "convolution": convolution.convolution,
    "convolution_backward": convolution.convolution_backward,
    "avg_pool2d": pooling.avg_pool2d,
    "avg_pool2d_backward": pooling.avg_pool2d_backward,
    "_adaptive_avg_pool2d": pooling.adaptive_avg_pool2d,
    "_adaptive_avg_pool2d_backward": pooling.adaptive_avg_pool2d_backward,
    "avg_pool3d": windows.avg_pool(3),
    "avg_pool3d_backward": windows.avg_pool_backward(3),
    "_adaptive_avg_pool3d": windows.adaptive_avg_pool(3),
    "_adaptive_avg_pool3d_backward": windows.adaptive_avg_pool_backward(3),
    "max_pool3d_with_indices_backward": pooling.max_pool3d_backward,
    "adaptive_max_pool3d_backward": pooling.max_pool3d_backward,
    "fractional_max_pool2d_backward": pooling.max_pool_backward,
    "fractional_max_pool3d_backward": pooling.max_pool3d_backward,
    "max_unpool2d": pooling.max_unpool(2),
    "max_unpool3d": pooling.max_unpool(3),
    "col2im": windows.col2im,
    "max_pool2d_with_indices_backward": pooling.max_pool_backward,
    "adaptive_max_pool2d_backward": pooling.max_pool_backward,
    # ---- interpolation ---------------------------------------------------------------------------
    "upsample_linear1d": upsampling.interpolation(1, upsampling.linear),
    "upsample_linear1d_backward": upsampling.interpolation_backward(1, upsampling.linear),
    "upsample_bilinear2d": upsampling.interpolation(2, upsampling.linear),
    "upsample_bilinear2d_backward": upsampling.interpolation_backward(2, upsampling.linear),
    "upsample_trilinear3d": upsampling.interpolation(3, upsampling.linear),
    "upsample_trilinear3d_backward": upsampling.interpolation_backward(3, upsampling.linear),
    "upsample_bicubic2d": upsampling.interpolation(2, upsampling.cubic),
    "upsample_bicubic2d_backward": upsampling.interpolation_backward(2, upsampling.cubic),
    "_upsample_bilinear2d_aa": upsampling.interpolation(2, upsampling.antialiased_linear),
    "_upsample_bilinear2d_aa_backward": upsampling.interpolation_backward(
        2, upsampling.antialiased_linear
    ),
    "_upsample_bicubic2d_aa": upsampling.interpolation(2, upsampling.antialiased_cubic),
    "_upsample_bicubic2d_aa_backward": upsampling.interpolation_backward(
        2, upsampling.antialiased_cubic
    ),
    "affine_grid_generator": grid_sampling.affine_grid,
    "grid_sampler_2d": grid_sampling.grid_sampler,
    "grid_sampler_2d_backward": grid_sampling.grid_sampler_backward,
    "grid_sampler_3d": grid_sampling.grid_sampler,
    "grid_sampler_3d_backward": grid_sampling.grid_sampler_backward,
    "upsample_nearest1d_backward": upsampling.nearest_backward(),
    "upsample_nearest2d_backward": upsampling.nearest_backward(),
    "upsample_nearest3d_backward": upsampling.nearest_backward(),
    "_upsample_nearest_exact1d_backward": upsampling.nearest_backward(is_exact=True),
    "_upsample_nearest_exact2d_backward": upsampling.nearest_backward(is_exact=True),
    "_upsample_nearest_exact3d_backward": upsampling.nearest_backward(is_exact=True),
    # ---- normalization ---------------------------------------------------------------------------
    "native_batch_norm": normalization.batch_norm,
    "_native_batch_norm_legit": normalization.batch_norm_legit,
    "_native_batch_norm_legit_no_training": normalization.batch_norm_inference,
    "native_batch_norm_backward": normalization.batch_norm_backward,
    "native_layer_norm": normalization.layer_norm,
    "native_layer_norm_backward": normalization.layer_norm_backward,
    "native_group_norm": normalization.group_norm,
    "native_group_norm_backward": normalization.group_norm_backward,
    # ---- elementary functions --------------------------------------------------------------------
    "exp": pointwise.elementary_function("exp"),
    "expm1": pointwise.elementary_function("expm1"),
    "log": pointwise.elementary_function("log"),
    "log1p": pointwise.elementary_function("log1p"),
    "sin": pointwise.elementary_function("sin"),
    "cos": pointwise.elementary_function("cos"),
    "tanh": pointwise.elementary_function("tanh"),
    "sigmoid": pointwise.elementary_function("sigmoid"),
    "erf": pointwise.elementary_function("erf"),
    "erfc": pointwise.elementary_function("erfc"),
    "erfinv": pointwise.elementary_function("erfinv"),
    "deg2rad": elementary.deg2rad,
    "rad2deg": elementary.rad2deg,
    "angle": elementary.angle,
    "exp2": elementary.exp2,
    "log2": elementary.log2,
    "log10": elementary.log10,
    "logaddexp": elementary.logaddexp,
    "logaddexp2": elementary.logaddexp2,
    "xlogy": pointwise.xlogy,
    "special_xlog1py": elementary.xlog1py,
    "special_entr": elementary.entr,
    "logit": elementary.logit,
    "logit_backward": elementary.logit_backward,
    "tan": elementary.tan,
    "asin": elementary.asin,
    "acos": elementary.acos,
    "atan": elementary.atan,
    "atan2": elementary.atan2,
    "sinh": elementary.sinh,
    "cosh": elementary.cosh,
    "asinh": elementary.asinh,
    "acosh": elementary.acosh,
    "atanh": elementary.atanh,
    "sinc": elementary.sinc,
    "lgamma": elementary.lgamma,
    "digamma": elementary.digamma,
    "polygamma": elementary.polygamma,
    "mvlgamma": elementary.mvlgamma,
    "i0": special.i0,
    "special_modified_bessel_i0": special.i0,
    "special_i0e": special.i0e,
    "special_i1": special.i1,
    "special_modified_bessel_i1": special.i1,
    "special_i1e": special.i1e,
    "special_bessel_j0": special.bessel_j0,
    "special_bessel_j1": special.bessel_j1,
    "special_spherical_bessel_j0": special.spherical_bessel_j0,
    "special_airy_ai": special.airy_ai,
    "special_erfcx": special.erfcx,
    "special_ndtri": special.ndtri,
    "special_log_ndtr": special.log_ndtr,
    # ---- activations -----------------------------------------------------------------------------
    "tanh_backward": activations.tanh_backward,
    "sigmoid_backward": activations.sigmoid_backward,
    "gelu": activations.gelu,
    "gelu_backward": activations.gelu_backward,
    "silu": activations.silu,
    "silu_backward": activations.silu_backward,
    "softplus": activations.softplus,
    "softplus_backward": activations.softplus_backward,
    "mish": activations.mish,
    "mish_backward": activations.mish_backward,
    "log_sigmoid_forward": activations.log_sigmoid,
    "log_sigmoid_backward": activations.log_sigmoid_backward,
    "leaky_relu": activations.leaky_relu,
    "leaky_relu_backward": activations.leaky_relu_backward,
    "_prelu_kernel": activations.prelu,
    "_prelu_kernel_backward": activations.prelu_backward,
    "elu": activations.elu,
    "celu": activations.celu,
    "elu_backward": activations.elu_backward,
    "hardtanh_backward": activations.hardtanh_backward,
    "hardsigmoid": activations.hardsigmoid,
    "hardsigmoid_backward": activations.hardsigmoid_backward,
    "hardswish": activations.hardswish,
    "hardswish_backward": activations.hardswish_backward,
    "glu": activations.glu,
    "glu_backward": activations.glu_backward,
    "softshrink": activations.softshrink,
    "softshrink_backward": activations.shrink_backward,
    "hardshrink": activations.hardshrink,
    "hardshrink_backward": activations.shrink_backward,
    "rrelu_with_noise": random.rrelu,
    "rrelu_with_noise_backward": activations.rrelu_backward,
    # ---- softmax and losses ----------------------------------------------------------------------
    "_softmax": softmax.softmax,
    "_safe_softmax": softmax.safe_softmax,
    "_softmax_backward_data": softmax.softmax_backward,
    "_log_softmax": softmax.log_softmax,
    "_log_softmax_backward_data": softmax.log_softmax_backward,
    "logsumexp": softmax.logsumexp,
    "logcumsumexp": softmax.logcumsumexp,
    "nll_loss_forward": losses.nll_loss,
    "nll_loss_backward": losses.nll_loss_backward,
    "nll_loss2d_forward": losses.nll_loss2d,
    "nll_loss2d_backward": losses.nll_loss2d_backward,
    "mse_loss": losses.mse_loss,
    "mse_loss_backward": losses.mse_loss_backward,
    "smooth_l1_loss": losses.smooth_l1_loss,
    "smooth_l1_loss_backward": losses.smooth_l1_loss_backward,
    "huber_loss": losses.huber_loss,
    "huber_loss_backward": losses.huber_loss_backward,
    "binary_cross_entropy": losses.binary_cross_entropy,
    "binary_cross_entropy_backward": losses.binary_cross_entropy_backward,
    "binary_cross_entropy_with_logits": losses.binary_cross_entropy_with_logits,
    "soft_margin_loss": margin_losses.soft_margin_loss,
    "soft_margin_loss_backward": margin_losses.soft_margin_loss_backward,
    "multi_margin_loss": margin_losses.multi_margin_loss,
    "multi_margin_loss_backward": margin_losses.multi_margin_loss_backward,
    "multilabel_margin_loss_forward": margin_losses.multilabel_margin_loss,
    "_ctc_loss": ctc.ctc_loss,
    "_ctc_loss_backward": ctc.ctc_loss_backward,
    "multilabel_margin_loss_backward": margin_losses.multilabel_margin_loss_backward,
    # ---- random numbers --------------------------------------------------------------------------
    "rand": random.rand,
    "rand_like": random.like(random.rand),
    "uniform_": random.uniform_,
    "randn": random.randn,
    "randn_like": random.like(random.randn),
    "normal": random.normal,
    "normal_": random.normal_,
    "bernoulli": random.bernoulli,
    "bernoulli_": random.bernoulli_,
    "native_dropout": random.native_dropout,
    "native_dropout_backward": random.native_dropout_backward,
    "exponential_": random.exponential_,
    "cauchy_": random.cauchy_,
    "multinomial": random.multinomial,
    "_standard_gamma": gamma_draws.standard_gamma,
    "_sample_dirichlet": gamma_draws.sample_dirichlet,
    "randperm": random.drawn_on_cpu(torch.randperm),
    "randint": random.drawn_on_cpu(torch.randint),
    "randint_like": random.randint_like,
    "random_": random.random_,
    # ---- optimizers ------------------------------------------------------------------------------
    "_fused_adam_": optimizers.fused_adam,
    "_fused_adamw_": optimizers.fused_adamw,
    "_fused_sgd_": optimizers.fused_sgd,
    "_amp_foreach_non_finite_check_and_unscale_": grad_scaling.unscale_,
    "_amp_update_scale_": grad_scaling.update_scale_,
}

# COMPOSITES: operators that PyTorch writes in terms of others, written by us, as "name" or "name.overload",
# and operators whose gradients differ between versions of PyTorch. They run above autograd, which
# differentiates the operators that they consist of.
COMPOSITES: dict[str, Definition] = {
    "linear": composites.linear,
    "conv_tbc": composites.conv_tbc,
    "matmul": composites.matmul,
    "einsum": composites.einsum,
    "scaled_dot_product_attention": composites.scaled_dot_product_attention,
    "cross_entropy_loss": composites.cross_entropy_loss,
    "cosine_similarity": composites.cosine_similarity,
    "pairwise_distance": composites.pairwise_distance,
    "prod": composites.prod,
    "prod.dim_int": composites.prod_dim,
    "cumprod": composites.cumprod,
    "atan2": composites.atan2,
    "atan2_": composites.atan2_,
    "linalg_solve_ex": linear_systems.linalg_solve_ex,
    "linalg_det": linear_systems.linalg_det,
    "linalg_slogdet": linear_systems.linalg_slogdet,
    "lstm_cell": recurrent.lstm_cell,
    "gru_cell": recurrent.gru_cell,
    "rnn_tanh_cell": recurrent.rnn_tanh_cell,
    "rnn_relu_cell": recurrent.rnn_relu_cell,
    **{f"{name}.input": recurrent.layers_of(cell) for name, cell in recurrent.CELLS.items()},
    **{f"{name}.data": recurrent.packed_layers_of(cell) for name, cell in recurrent.CELLS.items()},
}

# GRADIENTS: operators whose gradient differs between versions of PyTorch: where each operand gets it.
GRADIENTS: dict[str, Definition] = {
    "clamp": pointwise.clamp_gradient,
    "clamp.Tensor": pointwise.clamp_gradient,
    "clamp_min": pointwise.clamp_gradient,
    "clamp_min.Tensor": pointwise.clamp_gradient,
    "clamp_max": pointwise.clamp_max_gradient,
    "clamp_max.Tensor": pointwise.clamp_max_gradient,
    "fmax": pointwise.fmax_gradient,
    "fmin": pointwise.fmin_gradient,
}

# ALTERNATIVES: why operators that begin with a name are refused, and what to use instead; the first match
# counts. The names without a namespace are PyTorch's own.
COMPLEX = (
    "complex numbers have no exact definition; keep real and imaginary parts in two float32 tensors"
)
SPARSE = (
    "sparse tensors have no exact definition; use dense tensors, sparse=False in an embedding, and "
    "index_add or scatter_add in place of a product with a sparse matrix"
)
_FOURIER = (
    "a Fourier transform has no exact definition; multiply by matrices of cosines and sines "
    "(torch.matmul, or torch.nn.functional.conv1d for frames of a signal), or transform the data before "
    "reproml.exact()"
)
_SPECTRUM = (
    "eigenvalues and singular values have no exact definition; use torch.linalg.cholesky, qr or solve, or "
    "power iterations of matrix products, as torch.nn.utils.parametrizations.spectral_norm does"
)
_REJECTION = (
    "its algorithm draws until it accepts a number, and accepting depends on rounding; draw these numbers "
    "before reproml.exact(), or use rand, randn, exponential_ or bernoulli"
)
_OF_DRAWS = (
    "the derivative of a drawn number by its concentration has no definition; draw by sample() instead of "
    "rsample(), and take the gradient of log_prob()"
)
_QUANTIZED = "quantized tensors have no exact definition; use torch.round(x / scale) * scale"
_NESTED = (
    "nested tensors have no exact definition; pad to one length and mask the rest "
    "(torch.nn.utils.rnn.pad_sequence)"
)
_RECURRENCE = "it has no definition; write its recurrence with mul and sub, whose steps are rounded"
_LONG = "it has no definition; compute it before reproml.exact()"
_POOLED_REGIONS = (
    "it has no definition; sample the regions by torch.nn.functional.grid_sample, then average them by "
    "torch.nn.functional.avg_pool2d"
)
ALTERNATIVES: dict[str, str] = {
    "_fft": _FOURIER,
    **dict.fromkeys(
        ["complex", "view_as_complex", "view_as_real", "polar", "real", "imag"], COMPLEX
    ),
    **dict.fromkeys(["_conj", "conj", "resolve_conj", "_neg_view"], COMPLEX),
    **dict.fromkeys(
        ["_to_sparse", "to_sparse", "sparse_", "_sparse_", "_coalesce", "coalesce"], SPARSE
    ),
    **dict.fromkeys(
        ["crow_indices", "ccol_indices", "col_indices", "row_indices", "hspmm"], SPARSE
    ),
    **dict.fromkeys(["_indices", "_values", "indices", "values", "_to_dense", "_nnz"], SPARSE),
    **dict.fromkeys(["_nested", "nested_", "_jagged_to", "_padded_dense"], _NESTED),
    **dict.fromkeys(["quantize", "dequantize", "fake_quantize", "_fake_quantize"], _QUANTIZED),
    **dict.fromkeys(
        ["quantized_", "_make_per", "q_scale", "q_per_channel", "int_repr"], _QUANTIZED
    ),
    **dict.fromkeys(["_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_eigvals"], _SPECTRUM),
    **dict.fromkeys(["linalg_matrix_sqrth", "linalg_polar", "lobpcg"], _SPECTRUM),
    "linalg_matrix_exp": "it has no definition; write its power series with torch.matmul",
    **dict.fromkeys(
        ["geqrf", "ormqr", "orgqr", "linalg_householder_product"],
        "it has no definition; use torch.linalg.qr, which returns Q and R",
    ),
    "linalg_ldl": "it has no definition; use torch.linalg.lu_factor or torch.linalg.cholesky",
    **dict.fromkeys(["_standard_gamma_grad", "_dirichlet_grad"], _OF_DRAWS),
    **dict.fromkeys(["poisson", "binomial"], _REJECTION),
    "log_normal": "it has no definition; use x.normal_(mean, std).exp_()",
    "geometric": "it has no definition; use torch.ceil(torch.log(1 - torch.rand_like(x)) / math.log1p(-p))",
    **dict.fromkeys(
        ["igamma", "special_zeta", "special_bessel_y", "special_modified_bessel_k"], _LONG
    ),
    "special_scaled_modified_bessel_k": _LONG,
    **dict.fromkeys(
        ["special_chebyshev", "special_shifted_chebyshev", "special_hermite"], _RECURRENCE
    ),
    **dict.fromkeys(["special_laguerre", "special_legendre"], _RECURRENCE),
    "torchvision::nms": "it has no definition; compare the boxes by torchvision.ops.box_iou in a loop over "
    "the sorted scores, or select boxes outside of reproml.exact()",
    **dict.fromkeys(
        [f"torchvision::{name}" for name in ("_roi", "roi", "_ps_roi", "ps_roi")], _POOLED_REGIONS
    ),
    **dict.fromkeys(
        ["torchvision::deform_conv2d", "torchvision::_deform_conv2d"],
        "it has no definition; sample the displaced places by torch.nn.functional.grid_sample and multiply "
        "by the weight with torch.matmul",
    ),
}
