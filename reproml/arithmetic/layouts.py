"""The layout of results: the strides of each result are part of its definition.

A result lies in memory as PyTorch's own kernel for the CPU lays it out, by one of the rules below. It
depends on the shapes and strides of the operands, never on their values, on the path that computed it or on
the version of PyTorch. If all operands are contiguous, so is the result. Axes of one element have defined
strides as well, because PyTorch derives the memory format of later results from them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

# fmt: off
# ELEMENTWISE: the order of the axes is that of the operands, as in PyTorch's TensorIterator.
ELEMENTWISE = frozenset("""
add sub rsub mul div reciprocal sqrt maximum minimum clamp clamp_min clamp_max signbit
addcmul addcdiv lerp pow rsqrt hypot copysign fmax fmin frac fmod remainder floor_divide
xlogy special_xlog1py exp2 log2 log10 logaddexp logaddexp2 logit logit_backward
tan asin acos atan atan2 sinh cosh asinh acosh atanh sinc lgamma digamma polygamma
round deg2rad rad2deg angle special_entr mvlgamma nextafter frexp
i0 special_i0e special_i1 special_i1e special_modified_bessel_i0 special_modified_bessel_i1
special_bessel_j0 special_bessel_j1 special_spherical_bessel_j0 special_airy_ai special_erfcx
special_ndtri special_log_ndtr
exp expm1 log log1p sin cos tanh sigmoid erf erfc erfinv
tanh_backward sigmoid_backward gelu gelu_backward silu silu_backward softplus softplus_backward mish
mish_backward log_sigmoid_backward leaky_relu leaky_relu_backward _prelu_kernel _prelu_kernel_backward
glu softshrink softshrink_backward hardshrink hardshrink_backward rrelu_with_noise
rrelu_with_noise_backward soft_margin_loss soft_margin_loss_backward
elu celu elu_backward hardtanh_backward hardsigmoid hardsigmoid_backward hardswish hardswish_backward
mse_loss smooth_l1_loss huber_loss binary_cross_entropy_with_logits
binary_cross_entropy_backward native_dropout_backward
""".split())
SECOND_FIRST = ("rsub", "leaky_relu_backward")  # their kernels take the second operand first
# LIKE_FIRST: as torch.empty_like of the first operand, where that is dense.
LIKE_FIRST = frozenset("""
index_put _unsafe_index_put put embedding_renorm rand_like randn_like randint_like native_dropout
log_sigmoid_forward binary_cross_entropy
""".split())
# MEMORY_FORMAT: channels_last if one of these operands is, by number, and contiguous otherwise.
MEMORY_FORMAT = {
    "convolution": (0, 1),
    "convolution_backward": (1, 2),
    **dict.fromkeys("""
        avg_pool2d _adaptive_avg_pool2d native_batch_norm _native_batch_norm_legit
        _native_batch_norm_legit_no_training native_group_norm upsample_nearest2d_backward
        _upsample_nearest_exact2d_backward upsample_bilinear2d upsample_bilinear2d_backward
        upsample_bicubic2d upsample_bicubic2d_backward _upsample_bilinear2d_aa
        _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa _upsample_bicubic2d_aa_backward
    """.split(), (0,)),
    **dict.fromkeys("""
        avg_pool2d_backward _adaptive_avg_pool2d_backward max_pool2d_with_indices_backward
        adaptive_max_pool2d_backward native_batch_norm_backward native_group_norm_backward
        replication_pad2d_backward
    """.split(), (1,)),
}
# The others are contiguous, but for linalg_qr, whose matrices are stored by columns.
# fmt: on


def arrangement(name: str) -> Callable[[Any, Sequence[Any]], Any]:
    """Return a function of the results of the operator `name` and of its operands.

    It returns the results in their defined layout: themselves, if they have it already.
    """
    if name.endswith("_"):  # the result is the first operand
        return lambda result, operands: result

    known: set[Any] = set()  # layouts of results and operands that are as they should be
    by_operands = name in ELEMENTWISE or name in LIKE_FIRST or name in MEMORY_FORMAT
    by_operands = by_operands or name in ("max", "min")

    def arrange(result: Any, operands: Sequence[Any]) -> Any:
        several = isinstance(result, (tuple, list))
        results = result if several else (result,)
        layout = (
            *[
                (x.shape, x.stride()) if isinstance(x, Tensor) else None
                for x in ((*results, *operands) if by_operands else results)
            ],
        )
        if layout in known:
            return result
        arranged = [_arranged(name, x, operands) for x in results]
        if all(map(operator.is_, arranged, results)):
            if len(known) < 10_000:
                known.add(layout)
            return result
        return type(result)(arranged) if several else arranged[0]

    return arrange


def _arranged(name: str, x: Any, operands: Sequence[Any]) -> Any:
    if not isinstance(x, Tensor):
        return x
    if name == "linalg_qr":
        return _with_strides(x, _dense(x.shape, [x.dim() - 2, x.dim() - 1, *range(x.dim() - 2)]))
    shaped = [y for y in operands if isinstance(y, Tensor)]
    if name == "glu":  # its operands are the halves of x
        shaped = list(shaped[0].chunk(2, operands[1] if len(operands) > 1 else -1))
    if name in ELEMENTWISE and (not shaped or any(y.dim() > x.dim() for y in shaped)):
        # all operands are Python numbers, as a trace passes them, or a loss is reduced
        return _with_strides(x, _dense(x.shape))
    if name in ELEMENTWISE or (name in ("max", "min") and len(shaped) > 1):
        if name in SECOND_FIRST:
            shaped.reverse()
        return _with_strides(x, elementwise_strides(x.shape, shaped))
    if name in LIKE_FIRST and x.shape == operands[0].shape:
        return _with_strides(x, torch.empty_like(operands[0], device="meta").stride())
    if x.dim() == 4 and any(is_channels_last(operands[i]) for i in MEMORY_FORMAT.get(name, ())):
        return _with_strides(x, _dense(x.shape, [1, 3, 2, 0]))
    return _with_strides(x, _dense(x.shape))


def _with_strides(x: Tensor, strides: Sequence[int]) -> Tensor:
    if x.stride() == tuple(strides) or not x.numel():
        return x
    if all(a == b for a, b, n in zip(x.stride(), strides, x.shape) if n > 1):
        return x.as_strided(x.shape, strides)  # later operators look at axes of one element, too
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _dense(shape: Sequence[int], order: Optional[Sequence[int]] = None) -> list[int]:
    """Return the strides of a dense tensor. order: its axes, innermost first; by default the last first."""
    strides, step = [0] * len(shape), 1
    for d in reversed(range(len(shape))) if order is None else order:
        strides[d] = step
        step *= max(shape[d], 1)
    return strides


def is_channels_last(x: Tensor) -> bool:
    """Return whether the strides of images [n, c, h, w] are those of channels_last.

    Where axes of one element leave that open, they are not: is_channels_last_strides_2d of c10.
    """
    if x.dim() != 4 or not x.numel() or not x.stride(1):
        return False
    smallest = 0
    for d in (1, 3, 2, 0):
        if x.stride(d) < smallest or (d == 0 and smallest == x.stride(1)):
            return False
        smallest = x.stride(d) * x.shape[d]
    return True


def elementwise_strides(shape: Sequence[int], operands: Sequence[Tensor]) -> Sequence[int]:
    """Return the strides of the result of an elementwise operator: those of PyTorch's TensorIterator.

    Operands of one shape and layout give it to the result if it is dense. Otherwise an axis lies within
    another if its stride is smaller in the first operand in which the two differ and neither is broadcast.
    """
    rank, strides = len(shape), [_broadcast_strides(x, shape) for x in operands]
    if all(x.shape == tuple(shape) for x in operands):
        first = operands[0]
        if all(x.is_contiguous() for x in operands):
            return _dense(shape)
        channels_last = torch.channels_last
        if rank == 4 and all(x.is_contiguous(memory_format=channels_last) for x in operands):
            return _dense(shape, [1, 3, 2, 0])
        if all(x.stride() == first.stride() for x in operands) and is_dense(first):
            return first.stride()
    order = list(reversed(range(rank)))  # innermost first
    for i in range(1, rank):
        at = i
        for j in reversed(range(i)):
            swap = _comparison(order[j], order[at], shape, strides)
            if swap > 0:
                order[j], order[at], at = order[at], order[j], j
            elif swap < 0:
                break
    return _dense(shape, order)


def _broadcast_strides(x: Tensor, shape: Sequence[int]) -> list[int]:
    missing = len(shape) - x.dim()
    own = [0 if n == 1 and shape[missing + d] != 1 else x.stride(d) for d, n in enumerate(x.shape)]
    return [0] * missing + own


def _comparison(
    inner: int, outer: int, shape: Sequence[int], strides: Sequence[Sequence[int]]
) -> int:
    """Return 1 if the two axes have to be swapped, -1 if their order is right, 0 if it does not matter."""
    for stride in strides:
        a, b = stride[inner], stride[outer]
        if not a or not b:
            continue
        if a != b:
            return 1 if a > b else -1
        if shape[inner] > shape[outer]:
            return 1
    return 0


def is_dense(x: Tensor) -> bool:
    """Return whether the elements of x fill its memory without overlaps or holes."""
    step = 1
    for stride, n in sorted((s, n) for s, n in zip(x.stride(), x.shape) if n != 1):
        if stride != step:
            return False
        step *= n
    return True
