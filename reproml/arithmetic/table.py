"""The table of operators: what each returns, one line each.

MOVES copy, select or compare numbers and do no arithmetic: any implementation gives the same bits.
EXACT gives each arithmetic operator its definition: a value per element that is rounded once. Keys
are ATen names; the in-place and out= forms follow from the plain one. Each line of EXACT has its test
against an exact oracle in tests/arithmetic/test_table.py, which fails for a line without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic import NotExactError, optimizers
from reproml.arithmetic.ball import elementwise, rowwise
from reproml.arithmetic.dot import matmul, sum_over
from reproml.arithmetic.optimizers import single

aten = torch.ops.aten

# fmt: off
MOVES = frozenset("""
alias as_strided cat chunk clone contiguous copy_ detach diagonal expand flatten flip lift lift_fresh
narrow permute repeat reshape resize_ roll select slice split split_with_sizes squeeze stack t
transpose tril triu unbind unfold unsqueeze view _reshape_alias _unsafe_view _to_copy
empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like
new_ones full full_like new_full fill zero scalar_tensor eye _local_scalar_dense item
eq ne lt le gt ge isnan isinf isfinite equal is_nonzero sign signbit logical_not logical_and logical_or
where masked_fill masked_select gather index index_select take nonzero
max min amax amin argmax argmin maximum minimum fmax fmin clamp clamp_min clamp_max sort topk
abs neg relu threshold_backward max_pool2d_with_indices
bernoulli_ random_ randperm randint
""".split())
# fmt: on


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    _only_float32(dtype)
    return sum_over(x.float(), _dims(dim), keepdim)


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    _only_float32(dtype)
    count = 1
    for d in _dims(dim) or range(x.dim()):
        count *= x.shape[d]
    return sum_over(x.float(), _dims(dim), keepdim, divisor=count)


def _dims(dim: Any) -> Sequence[int]:
    return () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def _only_float32(dtype: Any) -> None:
    if dtype not in (None, torch.float32):
        raise NotExactError(f"A result of {dtype} has no exact definition here; ask for float32.")


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return matmul(a, b, bias, single(alpha), single(beta))


def _add(x: Any, y: Any, *, alpha: float = 1) -> Tensor:
    if alpha == 1:
        return torch.add(x, y)  # one IEEE 754 operation
    a = single(alpha)
    return elementwise(lambda k, x, y: x + a * y, *_float32(x, y))


def _sub(x: Any, y: Any, *, alpha: float = 1) -> Tensor:
    return torch.sub(x, y) if alpha == 1 else _add(x, y, alpha=-alpha)


def _rsub(x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    return aten.rsub(x, y) if alpha == 1 else _add(y, x, alpha=-alpha)


def _div(x: Any, y: Any, *, rounding_mode: Optional[str] = None) -> Tensor:
    """x / y, never by a scalar's reciprocal.

    A quotient of binary32 numbers that is rounded to binary64 first rounds twice without harm, as
    53 >= 2 * 24 + 2 (Figueroa, ACM SIGNUM Newsletter 30(3), 1995).
    """
    if rounding_mode is not None:
        raise NotExactError(
            f"A division with rounding_mode={rounding_mode!r} has no exact definition."
        )
    wide_x, wide_y = (x.double() for x in _float32(x, y))
    return (wide_x / wide_y).float()


def _float32(*operands: Any) -> tuple[Tensor, ...]:
    """Python numbers, integers and 0-dim float64 tensors as they meet a float32 tensor."""
    device = next(x.device for x in operands if isinstance(x, Tensor))
    return tuple(torch.as_tensor(x, device=device).to(torch.float32) for x in operands)


def _sqrt(x: Tensor) -> Tensor:
    """Innocuous double rounding again; an error of an ulp of binary64 changes nothing either, as a root
    of a binary32 number stays 2^-49 away from every midpoint (relatively)."""
    return x.double().sqrt().float()


def _nll_loss(
    x: Tensor, target: Tensor, weight: Optional[Tensor], reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """-sum w x[target] / sum w (reduction 1, mean), without the division (2, sum), or each (0)."""
    if x.dim() == 1:
        x, target = x.unsqueeze(0), target.unsqueeze(0)
        if reduction == 0:
            loss, total = _nll_loss(x, target, weight, 0, ignore_index)
            return loss.squeeze(0), total
    counted = target != ignore_index
    at = torch.where(counted, target, 0)
    picked = torch.where(counted, x.gather(1, at.unsqueeze(1)).squeeze(1), 0.0)
    w = counted.float() if weight is None else torch.where(counted, weight[at], 0.0)
    if reduction == 0:
        return -(picked * w), torch.zeros((), device=x.device)
    total = sum_over(w, ())
    if reduction == 2:
        return -sum_over(picked, (), y=w), total
    mean = rowwise(lambda k, x, w: -(k.sum(x * w) / k.sum(w)), 0, picked, w).reshape(())
    return mean, total


def _nll_loss_backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    reduction: int,
    ignore_index: int,
    total: Tensor,
) -> Tensor:
    """-grad * w / total at the target, 0 elsewhere."""
    rows, row_target = (x.unsqueeze(0), target.reshape(1)) if x.dim() == 1 else (x, target)
    counted = row_target != ignore_index
    at = torch.where(counted, row_target, 0)
    w = torch.ones_like(at, dtype=torch.float32) if weight is None else weight[at]
    if reduction == 1:
        value = elementwise(lambda k, g, w, t: -(g * w / t), grad, w, total)
    else:
        value = -(grad * w)
    value = torch.where(counted, value, 0.0)
    return torch.zeros_like(rows).scatter(1, at.unsqueeze(1), value.unsqueeze(1)).reshape(x.shape)


def _log_softmax(k: Any, x: Any) -> Any:
    shifted = x - k.max(x)
    return shifted - k.log(k.sum(k.exp(shifted)))


def _uniform(x: Tensor, low: float = 0, high: float = 1, *, generator: Any = None) -> Tensor:
    """u (high - low) + low, u PyTorch's own random multiples of 2^-24 in [0, 1)."""
    u = torch.empty(x.shape).uniform_(generator=generator).to(x.device)
    a, b = single(low), single(high)
    return x.copy_(u if (low, high) == (0, 1) else elementwise(lambda k, u: u * (b - a) + a, u))


def _rand(
    size: Sequence[int], *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """PyTorch's random multiples of 2^-24 in [0, 1), drawn on the CPU whatever the device."""
    _only_float32(dtype)
    return torch.rand(size, generator=generator).to(device or "cpu")


Definition = Callable[..., Any]

EXACT: dict[str, Definition] = {
    # ---- one IEEE 754 operation ------------------------------------------------------------------
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": aten.mul,
    "div": _div,
    "sqrt": _sqrt,
    # ---- sums and products of matrices -----------------------------------------------------------
    "sum": _sum,
    "mean": _mean,
    "mm": matmul,
    "addmm": _addmm,
    # ---- elementary functions --------------------------------------------------------------------
    "exp": lambda x: elementwise(lambda k, x: k.exp(x), *_float32(x)),
    "log": lambda x: elementwise(lambda k, x: k.log(x), *_float32(x)),
    # ---- softmax and losses ----------------------------------------------------------------------
    "_log_softmax": lambda x, dim, half_to_float: rowwise(_log_softmax, dim, x),
    "_log_softmax_backward_data": lambda g, y, dim, dtype: rowwise(
        lambda k, g, y: g - k.exp(y) * k.sum(g), dim, g, y
    ),
    "nll_loss_forward": _nll_loss,
    "nll_loss_backward": _nll_loss_backward,
    # ---- random numbers --------------------------------------------------------------------------
    "rand": _rand,
    "uniform_": _uniform,
    # ---- optimizers ------------------------------------------------------------------------------
    "_fused_adam_": optimizers.fused_adam,
    "_fused_adamw_": optimizers.fused_adamw,
    "_fused_sgd_": optimizers.fused_sgd,
}
