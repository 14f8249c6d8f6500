"""The table of operators: what each returns, one line each.

MOVES copy, select or compare numbers and do no arithmetic: any implementation gives the same bits.
EXACT gives each arithmetic operator its definition: a value per element that is rounded once, or a
short expression of such values. Keys are ATen names; the in-place, out= and foreach forms follow from
the plain one. Each line of EXACT has its test against an exact oracle in
tests/arithmetic/test_operator_table.py, which fails for a line without one.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic import NotExactError
from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.dispatch import deferred
from reproml.arithmetic.operators import (
    activations,
    convolution,
    indexing,
    normalization,
    optimizers,
    random,
    reductions,
)
from reproml.arithmetic.operators.activations import single
from reproml.arithmetic.operators.matmul import matmul, sum_over

aten = torch.ops.aten

# fmt: off
# Views, tensors of constants, and copies of which no part computes either: three operators of four, and
# nothing of ours is in their way (dispatch.py).
VIEWS = frozenset("""
alias as_strided detach diagonal expand permute select slice split split_with_sizes squeeze t transpose
unbind unfold unsqueeze view _reshape_alias _unsafe_view
flatten reshape narrow chunk contiguous
empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like
new_ones full full_like new_full lift_fresh
""".split())
COPIES = frozenset("""
cat stack index index_select embedding threshold_backward fill zero _local_scalar_dense argmax argmin
clone max_pool2d_with_indices where masked_fill
""".split())

MOVES = VIEWS | COPIES | frozenset("""
constant_pad_nd diagonal_copy flip lift pixel_shuffle pixel_unshuffle repeat resize_ roll tril triu
unsafe_split set select_backward slice_backward reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d upsample_nearest1d upsample_nearest2d _pack_padded_sequence
scalar_tensor eye item eq ne lt le gt ge isnan isinf isfinite equal is_nonzero sign sgn
logical_not logical_and logical_or
masked_select gather _unsafe_index index_fill take nonzero
scatter
hardtanh sort topk
abs neg relu threshold adaptive_max_pool2d
floor ceil round trunc
""".split())
# fmt: on


Definition = Callable[..., Any]


def _add(x: Any, y: Any, alpha: float = 1) -> Tensor:
    if alpha == 1:
        return torch.add(x, y)  # one IEEE 754 operation
    a = single(alpha)
    return elementwise(lambda k, x, y: x + a * y, *_float32(x, y))


def _sub(x: Any, y: Any, alpha: float = 1) -> Tensor:
    return torch.sub(x, y) if alpha == 1 else _add(x, y, alpha=-alpha)


def _rsub(x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    return aten.rsub(x, y) if alpha == 1 else _add(y, x, alpha=-alpha)


def _div(x: Any, y: Any, *, rounding_mode: Optional[str] = None) -> Tensor:
    """x / y, never by a scalar's reciprocal: on the CPU one IEEE 754 operation.

    A quotient of binary32 numbers that is rounded to binary64 first rounds twice without harm, as
    53 >= 2 * 24 + 2 (Figueroa, ACM SIGNUM Newsletter 30(3), 1995).
    """
    if rounding_mode is not None:
        raise NotExactError(
            f"A division with rounding_mode={rounding_mode!r} has no exact definition."
        )
    a, b = _float32(x, y)
    if a.is_cpu and b.is_cpu:
        return torch.div(a, b)
    return (a.double() / b.double()).float()


def _float32(*operands: Any) -> tuple[Tensor, ...]:
    """Python numbers, integers and 0-dim float64 tensors as they meet a float32 tensor."""
    if all(isinstance(x, Tensor) and x.dtype is torch.float32 for x in operands):
        return operands
    device = next(x.device for x in operands if isinstance(x, Tensor))
    return tuple(deferred.on_device(x, device).to(torch.float32) for x in operands)


def _sqrt(x: Tensor) -> Tensor:
    """The binary64 root may be an ulp wrong: a root of a binary32 number stays 2^-51 away (relatively)
    from every midpoint m. In units in which m is an odd integer below 2^25, x is one too and not m^2, so
    |sqrt(x) - m| >= 1 / (sqrt(x) + m)."""
    return x.double().sqrt().float()


def _elementary(name: str) -> Definition:
    """An operator that is one function of a field; an odd one keeps the sign of a zero."""

    odd = name in _ODD

    def formula(k: Any, x: Any) -> Any:
        y = getattr(k, name)(x)
        return k.choose(x.c == 0, x, y) if odd else y

    def plain(x: Tensor) -> Tensor:
        if name in _FLAT:
            x = x.clamp(*_FLAT[name])
        y = elementwise(lambda k, x: getattr(k, name)(x), x)
        return torch.where(x == 0, x, y) if odd else y

    direct = name if name in ("exp", "expm1", "tanh", "sigmoid") else None
    return lambda x: elementwise(formula, *_float32(x), plain=plain, direct=direct)


# Beyond these ends the rounded value is that at the end: 1, infinity, 0 or -1.
_FLAT = {"tanh": (-20, 20), "exp": (-120, 100), "expm1": (-120, 100)}
_ODD = ("sin", "tanh", "erf", "erfinv", "expm1", "log1p")


def _formula(formula: Definition, direct: Optional[str] = None) -> Definition:
    """An operator that is one formula of its operands, all of them numbers or tensors."""
    return lambda *operands: elementwise(formula, *operands, direct=direct)


def _maximum(x: Tensor, y: Tensor) -> Tensor:
    """The larger, +0 before -0 (IEEE 754-2019): native kernels differ in this."""
    return torch.where((x == 0) & (y == 0), x + y, torch.maximum(x, y))


def _minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x == 0) & (y == 0), -((-x) + (-y)), torch.minimum(x, y))


def _clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """min(max(x, low), high)."""
    if low is not None:
        x = _maximum(x, low) if isinstance(low, Tensor) else torch.clamp(x, min=low)
    if high is not None:
        x = _minimum(x, high) if isinstance(high, Tensor) else torch.clamp(x, max=high)
    return x


def _extreme(name: str) -> Definition:
    """max, min, amax and amin; a zero is +0, as the order decides between 0 and -0 natively."""

    def extreme(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 1 and isinstance(args[1], Tensor):
            return (_maximum if "max" in name else _minimum)(*args)
        result = getattr(aten, name)(*args, **kwargs)
        if not args[0].is_floating_point():
            return result
        return result + 0.0 if isinstance(result, Tensor) else (result[0] + 0.0, result[1])

    return extreme


def _to_copy(x: Tensor, *, dtype: Any = None, **options: Any) -> Tensor:
    _check_cast(x, dtype or x.dtype)
    return aten._to_copy(x, dtype=dtype, **options)  # type: ignore[no-any-return]


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _check_cast(source, x.dtype)
    return x.copy_(source, non_blocking)


def _check_cast(x: Tensor, dtype: torch.dtype) -> None:
    """A cast rounds once, except from float64 to 16 bits, which goes by way of float32; and what a
    number out of an integer's range becomes depends on the machine."""
    if x.dtype is torch.float64 and dtype in (torch.float16, torch.bfloat16):
        raise NotExactError(f"A cast from float64 to {dtype} rounds twice; cast to float32 first.")
    if x.dtype in (torch.int64, torch.int32) and dtype in (torch.float16, torch.bfloat16):
        raise NotExactError(
            f"A cast from {x.dtype} to {dtype} rounds twice; cast to float32 first."
        )
    if x.is_floating_point() and not (
        dtype.is_floating_point or dtype.is_complex or dtype is torch.bool
    ):
        if deferred.far(x):
            deferred.settle_all()
        whole, bounds = x.double().trunc(), torch.iinfo(dtype)
        if not bool(((whole >= bounds.min) & (whole < bounds.max + 1.0)).all()):
            raise NotExactError(
                f"A cast of NaN, infinity or a number out of range to {dtype} depends on the machine."
            )


# With integers alone these stay integers, and PyTorch does them.
INTEGER = frozenset(
    """
add sub rsub mul sum cumsum mm bmm mv dot addmm baddbmm addmv trace pow addcmul scatter_add index_add
index_put index_put_ max min amax amin maximum minimum clamp clamp_min clamp_max signbit
""".split()
)

# Overloads of a MOVE that do compute.
NOT_MOVES = frozenset(["round.decimals", "scatter.reduce", "scatter.value_reduce"])

# In-place forms that are one IEEE 754 operation as well, for float32 with float32 or a number.
IN_PLACE: dict[str, Definition] = {"add": Tensor.add_, "sub": Tensor.sub_, "mul": Tensor.mul_}

# Casts, of any dtype.
CASTS: dict[str, Definition] = {"_to_copy": _to_copy, "copy_": _copy}

EXACT: dict[str, Definition] = {
    # ---- one IEEE 754 operation ------------------------------------------------------------------
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": lambda x, y: torch.mul(x, y),
    "div": _div,
    "reciprocal": lambda x: _div(1.0, x),
    "sqrt": _sqrt,
    "max": _extreme("max"),
    "min": _extreme("min"),
    "amax": _extreme("amax"),
    "amin": _extreme("amin"),
    "maximum": _maximum,
    "minimum": _minimum,
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "signbit": lambda x: torch.signbit(x) & ~x.isnan(),
    # ---- short expressions -----------------------------------------------------------------------
    "addcmul": reductions.addcmul,
    "addcdiv": reductions.addcdiv,
    "lerp": reductions.lerp,
    "pow": reductions.power,
    "rsqrt": _formula(lambda k, x: 1 / k.sqrt(x)),
    "arange": reductions.arange,
    "linspace": reductions.linspace,
    # ---- sums ------------------------------------------------------------------------------------
    "sum": reductions.total,
    "mean": reductions.mean,
    "cumsum": reductions.cumsum,
    "var": reductions.variance,
    "std": reductions.deviation,
    "linalg_vector_norm": reductions.vector_norm,
    "norm": reductions.norm,
    "trace": lambda x: sum_over(x.diagonal(), ()),
    "scatter_add": indexing.scatter_add,
    "index_add": indexing.index_add,
    "index_put": indexing.index_put,
    "index_put_": indexing.index_put_,
    "embedding_dense_backward": indexing.embedding_backward,
    "upsample_nearest2d_backward": reductions.upsample_nearest_backward,
    # ---- products of matrices --------------------------------------------------------------------
    "mm": matmul,
    "bmm": matmul,
    "mv": lambda a, b: matmul(a, b.unsqueeze(1)).squeeze(1),
    "dot": lambda a, b: sum_over(a, (), y=b),
    "addmm": reductions.baddbmm,
    "baddbmm": reductions.baddbmm,
    "addmv": reductions.addmv,
    "linalg_qr": reductions.qr,
    # ---- convolution and pooling -----------------------------------------------------------------
    "convolution": convolution.convolution,
    "convolution_backward": convolution.convolution_backward,
    "avg_pool2d": convolution.avg_pool2d,
    "avg_pool2d_backward": convolution.avg_pool2d_backward,
    "_adaptive_avg_pool2d": convolution.adaptive_avg_pool2d,
    "_adaptive_avg_pool2d_backward": convolution.adaptive_avg_pool2d_backward,
    "max_pool2d_with_indices_backward": indexing.max_pool_backward,
    "adaptive_max_pool2d_backward": indexing.max_pool_backward,
    # ---- normalisation ---------------------------------------------------------------------------
    "native_batch_norm": normalization.batch_norm,
    "_native_batch_norm_legit": normalization.batch_norm_legit,
    "_native_batch_norm_legit_no_training": normalization.batch_norm_inference,
    "native_batch_norm_backward": normalization.batch_norm_backward,
    "native_layer_norm": normalization.layer_norm,
    "native_layer_norm_backward": normalization.layer_norm_backward,
    "native_group_norm": normalization.group_norm,
    "native_group_norm_backward": normalization.group_norm_backward,
    # ---- elementary functions --------------------------------------------------------------------
    "exp": _elementary("exp"),
    "expm1": _elementary("expm1"),
    "log": _elementary("log"),
    "log1p": _elementary("log1p"),
    "sin": _elementary("sin"),
    "cos": _elementary("cos"),
    "tanh": _elementary("tanh"),
    "sigmoid": _elementary("sigmoid"),
    "erf": _elementary("erf"),
    "erfc": _elementary("erfc"),
    "erfinv": _elementary("erfinv"),
    # ---- activations -----------------------------------------------------------------------------
    "tanh_backward": _formula(lambda k, g, y: g * (1 - y * y), "tanh_backward"),
    "sigmoid_backward": _formula(lambda k, g, y: g * y * (1 - y), "sigmoid_backward"),
    "gelu": activations.gelu,
    "gelu_backward": activations.gelu_backward,
    "silu": _formula(lambda k, x: x * k.sigmoid(x), "silu"),
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
    # ---- softmax and losses ----------------------------------------------------------------------
    "_softmax": activations.softmax,
    "_safe_softmax": activations.safe_softmax,
    "_softmax_backward_data": activations.softmax_backward,
    "_log_softmax": activations.log_softmax,
    "_log_softmax_backward_data": activations.log_softmax_backward,
    "logsumexp": activations.logsumexp,
    "nll_loss_forward": activations.nll_loss,
    "nll_loss_backward": activations.nll_loss_backward,
    "nll_loss2d_forward": activations.nll_loss2d,
    "nll_loss2d_backward": activations.nll_loss2d_backward,
    "mse_loss": activations.mse_loss,
    "mse_loss_backward": activations.mse_loss_backward,
    "smooth_l1_loss": activations.smooth_l1_loss,
    "smooth_l1_loss_backward": activations.smooth_l1_loss_backward,
    "huber_loss": activations.huber_loss,
    "huber_loss_backward": activations.huber_loss_backward,
    "binary_cross_entropy": activations.bce,
    "binary_cross_entropy_backward": activations.bce_backward,
    "binary_cross_entropy_with_logits": activations.bce_with_logits,
    "xlogy": activations.xlogy,
    # ---- random numbers --------------------------------------------------------------------------
    "rand": random.rand,
    "rand_like": random.like(random.rand),
    "uniform_": random.uniform,
    "randn": random.randn,
    "randn_like": random.like(random.randn),
    "normal": random.normal_of,
    "normal_": random.normal,
    "bernoulli": random.bernoulli,
    "bernoulli_": random.bernoulli_,
    "native_dropout": random.dropout,
    "native_dropout_backward": random.dropout_backward,
    "exponential_": random.exponential,
    "multinomial": random.multinomial,
    "randperm": random.on_cpu(torch.randperm),
    "randint": random.on_cpu(torch.randint),
    "random_": random.random_,
    # ---- optimizers ------------------------------------------------------------------------------
    "_fused_adam_": optimizers.fused_adam,
    "_fused_adamw_": optimizers.fused_adamw,
    "_fused_sgd_": optimizers.fused_sgd,
}
