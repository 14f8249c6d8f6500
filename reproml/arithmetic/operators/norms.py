"""Norms of any order, distances between rows, and what is scaled by a norm.

The norm of order p is (sum |d|^p)^(1/p), rounded once from the exact differences d = x - y. All |d| are
divided by a power of two near the largest (p > 0) or smallest of them, so that no power overflows. A d
that is zero is left out of the sum, for p < 0 it makes the norm zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import elementwise, rowwise
from reproml.arithmetic.numerics.formats import BINARY64, operate, storing, target
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import dims_tuple, require_float32, require_shape
from reproml.arithmetic.operators.reductions import apply_to_rows, reduce_sum
from reproml.torch_internals import canonicalize_dims

INFINITY = float("inf")


def vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Compute aten.linalg_vector_norm: the norm of any order over any axes."""
    require_float32(dtype)
    if ord == 2:
        return apply_to_rows(_euclidean_norm, x, dim, keepdim)
    if ord == 1:
        return reduce_sum(x.abs(), dims_tuple(dim), keepdim)
    if ord == INFINITY:
        return x.abs().amax(tuple(dims_tuple(dim)), keepdim)
    return apply_to_rows(lambda rows: row_norms(rows, rows.new_zeros(()), ord), x, dim, keepdim)


def _euclidean_norm(rows: Tensor) -> Tensor:
    return rowwise(lambda ctx, x: ctx.sqrt(ctx.sum(x * x)), 1, rows)


def norm(
    x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Compute aten.norm: vector_norm of order p, by default 2."""
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


# ---- the norm of differences -------------------------------------------------------------------------


def row_norms(x: Tensor, y: Tensor, order: float) -> Tensor:
    """Return the norm of x - y along the last axis, which is kept with length 1.

    x, y: float32 tensors that broadcast together. order: any number, or an infinity.
    """
    x, y = torch.broadcast_tensors(x, y)
    if order == 0:
        return reduce_sum((x != y).float(), (-1,), True)
    size = (x - y).abs()  # 0 only if x = y
    if not x.shape[-1] and order > -INFINITY:
        return x.new_full((*x.shape[:-1], 1), 0.0 if order > 0 else INFINITY)
    if order in (INFINITY, -INFINITY):
        size = operate(torch.sub, x, y).abs()
        return size.amax(-1, True) if order > 0 else size.amin(-1, True)
    if order == 2:
        return rowwise(lambda ctx, x, y: ctx.sqrt(ctx.sum((x - y) * (x - y))), -1, x, y)
    if order == 1:
        return rowwise(lambda ctx, x, y: ctx.sum(abs(x - y)), -1, x, y)
    return _of_any_order(x, y, size, float32_scalar(order))


def _of_any_order(x: Tensor, y: Tensor, size: Tensor, p: Fraction) -> Tensor:
    ordinary = x.isfinite() & y.isfinite() & (size > 0)
    nothing = torch.full_like(size, 0.0 if p > 0 else INFINITY)
    kept = torch.where(ordinary, size, nothing)
    near = kept.amax(-1, True) if p > 0 else kept.amin(-1, True)
    near = torch.where(near.isinf() | (near == 0), 1.0, near)
    scale = torch.ldexp(torch.ones_like(near), torch.frexp(near)[1] - 1)
    weight = ordinary.float()

    def formula(ctx: Any, x: Any, y: Any, weight: Any, scale: Any) -> Any:
        total = ctx.sum(weight * ctx.exp(p * ctx.log(abs(x - y) / scale)))
        return scale * ctx.exp(ctx.log(total) / p)

    some = ordinary.any(-1, True)
    first = torch.zeros_like(ordinary)
    first[..., :1] = True
    weight = torch.where(some, weight, first.float())
    a = torch.where(ordinary, x, scale)
    b = torch.where(ordinary, y, 0.0)
    result = rowwise(formula, -1, a, b, weight, scale.expand_as(a))[..., :1]
    result = torch.where(some, result, 0.0)
    is_zero, is_infinite = (size == 0) & (x == y), (x - y).isinf() & (x.isinf() | y.isinf())
    if p > 0:
        result = torch.where(is_infinite.any(-1, True), INFINITY, result)
    else:
        result = torch.where(is_infinite.all(-1, True), INFINITY, result)
        result = torch.where(is_zero.any(-1, True), 0.0, result)
    return torch.where((x - y).isnan().any(-1, True), torch.nan, result)


# ---- distances ---------------------------------------------------------------------------------------


def dist(x: Tensor, y: Tensor, p: float = 2) -> Tensor:
    """Return the norm of x - y over all elements."""
    x, y = (t.reshape(-1) for t in torch.broadcast_tensors(x, y))
    return row_norms(x, y, p).reshape(())


def cdist(x: Tensor, y: Tensor, p: float, compute_mode: Any = None) -> Tensor:
    """Compute aten._cdist_forward: the distance of each row of x [..., n, k] from each of y [..., m, k]."""
    result = _euclidean_distances(x, y) if p == 2 else None
    return row_norms(x.unsqueeze(-2), y.unsqueeze(-3), p).squeeze(-1) if result is None else result


def _euclidean_distances(x: Tensor, y: Tensor, of_pairs: bool = False) -> Optional[Tensor]:
    """Compute the Euclidean `cdist` by csrc/distances.c, or with of_pairs `pdist` of y = x [n, k].

    Returns float32 [..., n, m], or [n (n - 1) / 2] of pairs; None where that does not apply.
    """
    operands, batch = _in_one_batch(x, y)
    if operands is None or x.shape[-1] != y.shape[-1]:
        return None
    x, y = operands
    n, m, k = x.shape[1], y.shape[1], x.shape[2]
    side = n if of_pairs else 0
    i, j = torch.triu_indices(side, side, 1, device="cpu")
    shape = i.shape if of_pairs else (len(x), n, m)
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    failed = torch.empty(shape, dtype=torch.bool, device="cpu")
    pointers = [t.data_ptr() for t in (x, y, out, failed)]
    if kernels.loops().reproml_distances(len(x), n, m, k, of_pairs, *pointers):
        at = failed.nonzero().unbind(1)
        of_x, of_y = (x[0, i[at]], x[0, j[at]]) if of_pairs else (x[at[0], at[1]], y[at[0], at[2]])
        out[at] = row_norms(of_x, of_y, 2).squeeze(-1)
    return out if of_pairs else out.reshape(*batch, n, m)


def _in_one_batch(*matrices: Tensor) -> tuple[Optional[list[Tensor]], torch.Size]:
    """Return matrices [..., rows, columns] as contiguous [batches, rows, columns], and the shape of `...`.

    Returns None for the matrices where the compiled loops do not take them.
    """
    if kernels.loops() is None or not all(
        t.is_cpu and t.dtype is torch.float32 and t.dim() > 1 and t.numel() for t in matrices
    ):
        return None, torch.Size()
    batch = torch.broadcast_tensors(*[t[..., 0, 0] for t in matrices])[0].shape
    wide = [t.expand(*batch, *t.shape[-2:]) for t in matrices]
    return [t.reshape(-1, *t.shape[-2:]).contiguous() for t in wide], batch


def cdist_backward(g: Tensor, x: Tensor, y: Tensor, p: float, distance: Tensor) -> Tensor:
    """Compute aten._cdist_backward, the gradient of x, from the rounded distances.

    It is the sum over the rows of y of g sign(d) (|d| / distance)^(p - 1), where d = x - y; a term is 0
    where d is 0. The largest elements get g for p = inf, those with fl(|d|) equal to the distance. Of an
    infinite distance the quotient is 0.
    """
    require_shape("the gradient", g, distance.shape)
    if not g.numel() or not x.numel():
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    result = _euclidean_gradients(g, x, y, distance) if p == 2 else None
    if result is not None:
        return result
    # The last axis has the terms of a sum: the rows of y. A batch that shares x is added up by autograd.
    a, b, weight, length = torch.broadcast_tensors(
        x.unsqueeze(-1), y.mT.unsqueeze(-3), g.unsqueeze(-2), distance.unsqueeze(-2)
    )
    if p == 0:
        return torch.zeros_like(a[..., 0], memory_format=torch.contiguous_format)
    difference = a - b
    sign = torch.sign(difference)
    if p in (1, INFINITY):
        chosen = sign if p == 1 else torch.where(difference.abs() == length, sign, 0.0)
        terms = torch.where(chosen == 0, 0.0, weight * chosen)
        return reduce_sum(terms, (-1,))
    if p == 2:
        return _sums_of_directions(weight, a, b, length)
    q = float32_scalar(p) - 1
    use = (difference != 0) & (length != 0)
    far = use & length.isinf() & a.isfinite() & b.isfinite() & weight.isfinite()
    use &= ~far
    a, b, length = torch.where(use, a, 1.0), torch.where(use, b, 0.0), torch.where(use, length, 1.0)
    slope = weight * sign
    weight = torch.where(use, slope, 0.0)
    # About the largest power comes out of the sum, whose other terms may be far below all numbers.
    power = float(q) * ((a.double() - b.double()).abs() / length.double()).log()
    at = torch.where(weight == 0, -torch.inf, power).argmax(-1, keepdim=True)
    largest = [t.gather(-1, at) for t in (a, b, length)]

    def formula(ctx: Any, g: Any, x: Any, y: Any, length: Any, u: Any, v: Any, of_u: Any) -> Any:
        u, v, of_u = (ctx.max(t) for t in (u, v, of_u))  # one number for each row
        top = ctx.log(abs(u - v) / of_u)
        terms = g * ctx.exp(q * (ctx.log(abs(x - y) / length) - top))
        return ctx.exp(q * top) * ctx.sum(terms)

    result = rowwise(formula, -1, weight, a, b, length, *largest).squeeze(-1)
    return result if q > 0 else result + torch.where(far, slope * torch.inf, 0.0).sum(-1)


def _sums_of_directions(g: Tensor, x: Tensor, y: Tensor, distance: Tensor) -> Tensor:
    """Return the sum of g (x - y) / distance over the last axis, without terms of 0 / 0."""
    use = (x - y != 0) & (distance != 0)
    g, x, y, d = (
        torch.where(use, t, other) for t, other in ((g, 0.0), (x, 1.0), (y, 0.0), (distance, 1.0))
    )
    total = rowwise(lambda ctx, g, x, y, d: ctx.sum(g * (x - y) / d), -1, g, x, y, d)
    return total.squeeze(-1)


def _euclidean_gradients(g: Tensor, x: Tensor, y: Tensor, distance: Tensor) -> Optional[Tensor]:
    """Compute the Euclidean `cdist_backward` by csrc/distances.c.

    Returns float32 of the shape of x, [..., n, k]; None where that does not apply.
    """
    operands, batch = _in_one_batch(g, x, y, distance)
    sides = (x.shape[-2:-1] + y.shape[-2:-1], x.shape[-1:])
    if operands is None or sides != (distance.shape[-2:], y.shape[-1:]):
        return None
    g, x, y, distance = operands
    out = torch.empty_like(x)
    failed = torch.empty(x.shape, dtype=torch.bool, device="cpu")
    pointers = [t.data_ptr() for t in (*operands, out, failed)]
    sizes = (len(x), x.shape[1], y.shape[1], x.shape[2])
    if kernels.loops().reproml_distances_backward(*sizes, *pointers):
        at = b, i, k = failed.nonzero().unbind(1)
        terms = g[b, i], x[at].unsqueeze(1), y[b, :, k], distance[b, i]
        out[at] = _sums_of_directions(*torch.broadcast_tensors(*terms))
    return out.reshape(*batch, *x.shape[1:])


def pdist(x: Tensor, p: float = 2) -> Tensor:
    """Compute aten._pdist_forward: the distances of all pairs of rows of x [n, k]."""
    result = _euclidean_distances(x, x, True) if p == 2 else None
    if result is not None:
        return result
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return row_norms(x[i], x[j], p).squeeze(-1)


def pdist_backward(g: Tensor, x: Tensor, p: float, distance: Tensor) -> Tensor:
    """Compute aten._pdist_backward, as `cdist_backward` for the rows of x and themselves."""
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)

    def matrix(t: Tensor) -> Tensor:
        zeros = x.new_zeros(len(x), len(x))
        return zeros.index_put([torch.cat([i, j]), torch.cat([j, i])], torch.cat([t, t]))

    return cdist_backward(matrix(g), x, x, p, matrix(distance))


# ---- scaled by a norm --------------------------------------------------------------------------------


def renorm(x: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """Return x with each slice along `dim` scaled down to a norm of at most `maxnorm`."""
    kept = canonicalize_dims(x.dim(), dim)
    others = [d for d in range(x.dim()) if d != kept]
    with storing():
        norm = vector_norm(x, p, others, True)
    return operate(torch.mul, x, _factor(norm, maxnorm))


def embedding_renorm(x: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Return x with the rows at the indices scaled down to a norm of at most `max_norm`."""
    at = indices.reshape(-1)
    rows = x[at]
    norm = vector_norm(rows, norm_type, [1], True)
    scaled = operate(torch.mul, rows, _factor(norm, max_norm))
    return x.index_put([at], scaled)


def _factor(norm: Tensor, largest: float) -> Tensor:
    """Return fl(largest / fl(norm + 1e-7)) where the norm is larger, and 1 elsewhere."""
    factor = elementwise(lambda ctx, x: float32_scalar(largest) / x, norm + 1e-7)
    return torch.where(norm > float(float32_scalar(largest)), factor, 1.0)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Compute aten._weight_norm_interface: g v / |v| for each slice along `dim`, and the norms."""
    rows, of_rows = _slices(v, g, dim)

    def scaled(v: Tensor, g: Tensor) -> Tensor:
        return rowwise(lambda ctx, v, g: g * v / ctx.sqrt(ctx.sum(v * v)), 1, v, g)

    result = _by_weight_norm_loop("reproml_weight_norm", rows, of_rows)
    if result is None:
        w = scaled(rows, of_rows)
    else:
        w, _, failed = result
        if failed is not None:
            w[failed] = scaled(rows[failed], of_rows[failed])
    with storing():
        norms = vector_norm(rows, 2, [1]).reshape(g.shape)
    return _from_slices(w, v, dim), norms


def weight_norm_backward(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Compute aten._weight_norm_interface_backward from the rounded norms n.

    The gradient of v is g / n (grad - v sum(grad v) / n^2), that of g is sum(grad v) / n.
    """
    rows, of_rows = _slices(v, g, dim)
    if not len(rows):
        return torch.zeros_like(v), torch.zeros_like(g)
    grads, lengths = _slices(grad, norms, dim)
    operands = grads, rows, of_rows, lengths
    result = _by_weight_norm_loop("reproml_weight_norm_backward", *operands)
    if result is None:
        grad_v, grad_g = _weight_norm_gradients(*operands)
    else:
        grad_v, grad_g, failed = result
        if failed is not None:
            found = _weight_norm_gradients(*[x[failed] for x in operands])
            grad_v[failed], grad_g[failed] = found
    return _from_slices(grad_v, v, dim), grad_g.reshape(g.shape)


def _weight_norm_gradients(
    grad: Tensor, v: Tensor, g: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of v [slices, n] and of g [slices] from operands [slices, n]."""

    def of_v(ctx: Any, grad: Any, v: Any, g: Any, n: Any) -> Any:
        return g / n * (grad - v * ctx.sum(grad * v) / (n * n))

    grad_v = rowwise(of_v, 1, grad, v, g, norms)
    grad_g = rowwise(lambda ctx, grad, v, n: ctx.sum(grad * v) / n, 1, grad, v, norms)
    return grad_v, grad_g[:, 0]


def _by_weight_norm_loop(
    loop: str, *operands: Tensor
) -> Optional[tuple[Tensor, Tensor, Optional[Tensor]]]:
    """Run a loop of csrc/weight_norm.c on operands [rows, n], the last of which have equal columns.

    Returns a result [rows, n], one [rows] and the rows that failed the test; None where it does not apply.
    """
    rows = operands[0]
    matrices = len(operands) // 2
    taken = [
        x.contiguous() for x in (*operands[:matrices], *[x[:, :1] for x in operands[matrices:]])
    ]
    single = all(x.dtype is torch.float32 for x in taken)
    if target() is BINARY64 or not (single and rows.numel() and kernels.usable(*taken)):
        return None
    out, of_rows = torch.empty_like(taken[0]), taken[0].new_empty(len(rows))
    failed = torch.empty(len(rows), dtype=torch.bool, device="cpu")
    results = [out, of_rows, failed] if matrices == 2 else [out, failed]
    pointers = [x.data_ptr() for x in (*taken, *results)]
    left = getattr(kernels.loops(), loop)(*rows.shape, *pointers)
    return out, of_rows, failed if left else None


def _slices(x: Tensor, of_slices: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return x as [slices, n], and a number for each slice as [slices, n]."""
    slices = x.shape[dim]
    rows = x.movedim(dim, 0).reshape(slices, x.numel() // max(slices, 1))
    return rows, of_slices.reshape(-1, 1).expand(rows.shape)


def _from_slices(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    shape: Sequence[int] = like.movedim(dim, 0).shape
    return rows.reshape(shape).movedim(0, dim).contiguous()


def euclidean_dist(x: Tensor, y: Tensor) -> Tensor:
    """Compute aten._euclidean_dist: `cdist` for p = 2."""
    return cdist(x, y, 2)
