"""Sums over indices: each output is the exact sum of what is put there, rounded once, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.exact_sums import nearest_of_rows
from reproml.arithmetic.numerics.rounding import gamma, round_sum
from reproml.errors import NotExactError


def sum_at(index: Tensor, values: Tensor, size: int, start: Optional[Tensor] = None) -> Tensor:
    """start + the sum of the values of each index. index int64 [n], values float32 [n] -> [size]."""
    compiled = scatter_sums(1, size, index, values, start)
    if compiled is not None:
        return compiled.reshape(size)
    wide = values.double()
    if start is not None:
        index = torch.cat([torch.arange(size, device=index.device), index])
        wide = torch.cat([start.double(), wide])
    zeros = torch.zeros(size, dtype=torch.float64, device=values.device)
    c, bound = zeros.scatter_add(0, index, wide), zeros.scatter_add(0, index, wide.abs())
    terms = zeros.scatter_add(0, index, torch.ones_like(wide))

    def resolve(at: Tensor) -> Sequence[float]:
        return [nearest_of_rows(wide[index == i].unsqueeze(0))[0] for i in at.tolist()]

    return round_sum(c, bound * gamma(terms), resolve)


def scatter_sums(
    planes: int,
    rows: int,
    index: Tensor,
    values: Tensor,
    start: Optional[Tensor] = None,
    padding: int = -1,
) -> Optional[Tensor]:
    """Sums of rows of values by c/scatter.c, [planes, rows, width]; None where that cannot do it.

    index: int64 [planes, n], values: float32 [planes, n, width]. What has the index `padding` is left out.
    """
    if kernels.library is None or not (values.is_cpu and index.numel()):
        return None
    index, values = index.contiguous(), values.contiguous()
    start = None if start is None else start.contiguous()
    width = values.numel() // index.numel()
    out = torch.empty(planes, rows, width, dtype=torch.float32, device="cpu")
    left = kernels.library.reproml_scatter(
        planes,
        index.numel() // planes,
        width,
        rows,
        index.data_ptr(),
        values.data_ptr(),
        None if start is None else start.data_ptr(),
        padding,
        out.data_ptr(),
    )
    return None if left else out


def _places(x: Tensor) -> Tensor:
    """The flat index of each element of x."""
    return torch.arange(x.numel(), device=x.device).reshape(x.shape)


def _add_at(x: Tensor, at: Tensor, source: Tensor) -> Tensor:
    flat = sum_at(at.reshape(-1), source.expand(at.shape).reshape(-1), x.numel(), x.reshape(-1))
    return flat.reshape(x.shape)


def scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not index.numel():
        return x + 0.0  # a sum like any other
    if not x.dim():
        return _add_at(x, index * 0, source)
    used = [slice(0, n) for n in index.shape]
    whole = list(used)
    whole[dim] = slice(None)
    return _add_at(x, _places(x)[tuple(whole)].gather(dim, index), source[tuple(used)])


def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    source = source if alpha == 1 else source * alpha
    return _add_at(x, _places(x).index_select(dim, index), source)


def index_put(
    x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    return index_put_(x.clone(), indices, values, accumulate)


def index_put_(
    x: Tensor, indices: Any, values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    """Of several values for one place the last stays; with `accumulate` their exact sum is added."""
    if accumulate:
        return x.copy_(_add_at(x, torch.ops.aten.index(_places(x), indices), values))
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)  # one thread writes, in order
    try:
        return x.index_put_(indices, values)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def embedding_backward(
    g: Tensor, indices: Tensor, rows: int, padding: int, scale_by_freq: bool
) -> Tensor:
    """embedding_dense_backward: of each row of the table, the sum of its gradients."""
    if scale_by_freq:
        raise NotExactError(
            "An embedding with scale_grad_by_freq=True has no exact definition; leave it out."
        )
    compiled = scatter_sums(1, rows, indices.long(), g, padding=padding)
    if compiled is not None:
        return compiled.squeeze(0)
    flat, width = indices.reshape(-1), g.shape[-1]
    grads = torch.where((flat == padding).unsqueeze(1), 0.0, g.reshape(-1, width))
    at = flat.unsqueeze(1) * width + torch.arange(width, device=g.device)
    return sum_at(at.reshape(-1), grads.reshape(-1), rows * width).reshape(rows, width)
