"""Operators that PyTorch writes in terms of others, and that models consist of: how exact() writes them.

PyTorch takes them apart by the layout of the operands, by `requires_grad` and by its version, which changes
where results are rounded. Here each is one expression of operators of the table, which determines the
gradients as well: autograd differentiates these operators, from the last to the first.

The functions are named like PyTorch's operators and take their arguments; they run above autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.formats import NARROW
from reproml.arithmetic.operators.arguments import require
from reproml.arithmetic.operators.recurrent_steps import are_plain
from reproml.torch_internals import (
    AutoDispatchBelowAutograd,
    TransformType,
    get_interpreter_stack,
)

# ---- products ----------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """Return x @ weight.T + bias, rounded once: one addmm, or mm, of all rows of x.

    x: [..., k]; weight: [n, k], or [k] without a bias; bias: [n] or a scalar. Returns [..., n], or [...]
    for a vector. A bias of two axes beside an x of other than two is added to the rounded product, as
    PyTorch does. Raises RuntimeError for other shapes.
    """
    require(x.dim() > 0 and weight.dim() > 0, "linear: the input and the weight need an axis")
    require(weight.dim() == 2 or bias is None, "linear: a bias needs a weight of two axes")
    if weight.dim() != 2 or (bias is not None and bias.dim() > 1 and x.dim() != 2):
        y = matmul(x, weight.t())
        return y if bias is None else torch.add(y, bias)
    rows = x if x.dim() == 2 else _rows(x)
    if bias is not None and _within_vmap():  # whose rule for addmm rounds twice
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        weight = torch.cat([weight, bias.expand(weight.shape[:1]).unsqueeze(1)], 1)
        bias = None
    y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return y if x.dim() == 2 else y.view([*x.shape[:-1], y.shape[-1]])


def conv_tbc(x: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Tensor:
    """Return the 1-dim convolution of x [time, n, channels] with weight [time, channels, channels]."""
    y = torch.conv1d(x.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad)
    return y.permute(2, 0, 1).contiguous()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices or vectors, rounded once.

    A matrix beside a batch of matrices, [..., m, k] @ [k, n] or [m, k] @ [..., k, n], is one mm of all
    their rows or columns, so that its gradient is one sum. Two batches are broadcast, then one bmm.
    """
    require(a.dim() > 0 and b.dim() > 0, "matmul: each operand needs an axis")
    if b.dim() == 1:
        if a.dim() == 1:
            return torch.dot(a, b)
        return torch.mv(a, b) if a.dim() == 2 else torch.mv(_rows(a), b).view(a.shape[:-1])
    if a.dim() == 1:
        return torch.mm(a.unsqueeze(0), b).squeeze(0) if b.dim() == 2 else matmul(b.mT, a)
    if b.dim() == 2:
        if a.dim() == 2:
            return torch.mm(a, b)
        return torch.mm(_rows(a), b).view([*a.shape[:-1], b.shape[-1]])
    if a.dim() == 2:
        return matmul(b.mT, a.t()).mT.contiguous()
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (m, k), (inner, n) = a.shape[-2:], b.shape[-2:]
    count = math.prod(batch)
    x = a.expand([*batch, m, k]).reshape(count, m, k)
    y = b.expand([*batch, inner, n]).reshape(count, inner, n)
    return torch.bmm(x, y).view([*batch, m, n])


def _within_vmap() -> bool:
    stack = get_interpreter_stack()
    return stack is not None and any(x.key() == TransformType.Vmap for x in stack)


def _rows(x: Tensor) -> Tensor:
    """[..., k] -> [n, k]"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def einsum(equation: str, operands: Sequence[Tensor], path: Any = None) -> Tensor:
    """Contract the operands from left to right: each step is one bmm, or mul if it sums nothing.

    Each step is rounded once. An axis that only one of the two operands has, and nothing after them, is
    summed first. `path`, which depends on whether opt_einsum is installed, is not used. Raises RuntimeError
    for an invalid equation.
    """
    inputs, output = _parse(equation, [x.dim() for x in operands])
    x, labels = _diagonals(operands[0], inputs[0])
    for i, (y, own) in enumerate(zip(operands[1:], inputs[1:]), 1):
        y, own = _diagonals(y, own)
        later = {*output, *(label for more in inputs[i + 1 :] for label in more)}
        x, labels = _contract(x, labels, y, own, later)
    x, labels = _sum_out(x, labels, set(output))
    return x.permute([labels.index(label) for label in output])


def _parse(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Return the labels of each operand and of the result. "..." stands for ".1", ".0" and so on."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise RuntimeError(f"einsum(): {equation!r} has {len(terms)} operands, not {len(ranks)}")

    def labels(term: str, rank: int) -> list[str]:
        before, dots, after = term.partition("...")
        if not all(c.isascii() and c.isalpha() for c in before + after):
            raise RuntimeError(f"einsum(): {equation!r} has a subscript that is not a letter")
        hidden = rank - len(before + after)
        if hidden < 0 or (hidden and not dots):
            raise RuntimeError(f"einsum(): {term!r} of {equation!r} does not fit {rank} axes")
        return [*before, *(f".{i}" for i in reversed(range(hidden))), *after]

    inputs = [labels(term, rank) for term, rank in zip(terms, ranks)]
    everything = [label for term in inputs for label in term]
    dots = max(inputs, key=lambda term: sum(x[0] == "." for x in term))
    hidden = [label for label in dots if label[0] == "."]
    if not arrow:
        once = sorted({x for x in everything if x[0] != "." and everything.count(x) == 1})
        return inputs, hidden + once
    output = labels(right, len(right.replace("...", "")) + len(hidden) * ("..." in right))
    if len(set(output)) != len(output) or not set(output) <= set(everything):
        raise RuntimeError(f"einsum(): the result of {equation!r} repeats or invents a subscript")
    return inputs, output


def _diagonals(x: Tensor, labels: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Take the diagonal of axes that have the same label."""
    found: list[str] = []
    for label in labels:
        if label in found:
            first = found.index(label)
            require(
                x.shape[first] == x.shape[len(found)],
                f"einsum(): {label!r} is repeated for axes of different sizes",
            )
            x = x.diagonal(0, first, len(found)).movedim(-1, first)
        else:
            found.append(label)
    return x, found


def _sum_out(x: Tensor, labels: list[str], kept: set[str]) -> tuple[Tensor, list[str]]:
    dims = [d for d, label in enumerate(labels) if label not in kept]
    if dims:
        x, labels = x.sum(dims), [label for label in labels if label in kept]
    return x, labels


def _contract(
    x: Tensor, of_x: list[str], y: Tensor, of_y: list[str], later: set[str]
) -> tuple[Tensor, list[str]]:
    """Return the product, summed over the labels that both have and nothing later needs."""
    x, of_x = _sum_out(x, of_x, later | set(of_y))
    y, of_y = _sum_out(y, of_y, later | set(of_x))
    both = [label for label in of_x if label in of_y]
    batch, summed = [s for s in both if s in later], [s for s in both if s not in later]
    only_x, only_y = [s for s in of_x if s not in both], [s for s in of_y if s not in both]
    sizes = dict(zip(of_x, x.shape))
    for label, n in zip(of_y, y.shape):
        if sizes.get(label, 1) not in (1, n) and n != 1:
            raise RuntimeError(
                f"einsum(): the operands have {sizes[label]} and {n} elements along {label!r}"
            )
        sizes[label] = n if sizes.get(label, 1) == 1 else sizes[label]
    shape = [sizes[label] for label in batch]

    def matrices(t: Tensor, labels: list[str], rows: list[str], columns: list[str]) -> Tensor:
        order = batch + rows + columns
        t = t.permute([labels.index(label) for label in order])
        t = t.expand([sizes[label] for label in order])
        return t.reshape(
            [math.prod(shape), *(math.prod(sizes[s] for s in g) for g in (rows, columns))]
        )

    labels = batch + only_x + only_y
    if not summed:
        x = x.permute([of_x.index(label) for label in batch + only_x])
        y = y.permute([of_y.index(label) for label in batch + only_y])
        ones = [1] * len(only_x)
        y = y.reshape([*y.shape[: len(batch)], *ones, *y.shape[len(batch) :]])
        return torch.mul(x.reshape([*x.shape, *[1] * len(only_y)]), y), labels
    product = torch.bmm(matrices(x, of_x, only_x, summed), matrices(y, of_y, summed, only_y))
    return product.view([sizes[label] for label in labels]), labels


# ---- attention ---------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return dropout(softmax((query r) @ (key.mT r) + mask)) @ value, with r the root of the scale.

    query: [..., l, e]; key: [..., s, e]; value: [..., s, v]. A bool mask is 0 where true and -inf
    elsewhere; is_causal masks what lies above the diagonal. Each step is rounded. A float32 mask beside a
    query of 16 bits is added exactly, and the sum is rounded to the query's dtype.
    """
    name = "scaled_dot_product_attention"
    require(
        min(query.dim(), key.dim(), value.dim()) >= 2,
        f"{name}: each operand needs two axes or more",
    )
    if attn_mask is not None:
        require(not is_causal, f"{name}: is_causal is set beside an attn_mask")
        require(
            attn_mask.dtype in (torch.bool, query.dtype)
            or (attn_mask.dtype is torch.float32 and query.dtype in NARROW),
            f"{name}: the mask is {attn_mask.dtype}, not bool or {query.dtype}",
        )
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(query.dtype)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    root = math.sqrt(abs(scale))
    query = query * (-root if scale < 0 else root)
    if enable_gqa:
        heads = query.shape[-3]
        for x in (key, value):
            require(
                x.shape[-3] > 0 and heads % x.shape[-3] == 0,
                f"{name}: {heads} heads of the query are not a multiple of {x.shape[-3]}",
            )
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    scores = matmul(query, key.mT * root)
    if attn_mask is not None and attn_mask.dtype is scores.dtype:
        scores = scores + attn_mask
    elif attn_mask is not None:  # in place, because the sum would be float32
        shape = torch.broadcast_shapes(scores.shape, attn_mask.shape)
        scores = scores.expand(shape).clone().add_(attn_mask)
    weights = torch.ops.aten._safe_softmax(scores, -1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return matmul(weights, value)


# ---- losses and distances ----------------------------------------------------------------------------

_NONE, _MEAN, _SUM = range(3)


def cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Optional[Tensor] = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the cross entropy of logits x [n, c, ...] or [c]; the targets are classes or probabilities.

    log_softmax is rounded, then the loss. With label smoothing s, the loss times fl(1 - s) is added to
    fl(s / c) times the negative sum of the logarithms, which is weighted and reduced like the loss.
    """
    require(x.dim() > 0, "cross_entropy: the input needs an axis of classes")
    require(label_smoothing <= 1.0, f"cross_entropy: label_smoothing is {label_smoothing}, above 1")
    label_smoothing = max(label_smoothing, 0.0)  # PyTorch does not smooth by negative numbers
    axis = 1 if x.dim() > 1 else 0
    classes = x.shape[axis]
    uniform = label_smoothing / classes if classes else math.nan
    logs = x.log_softmax(axis)
    require(
        weight is None or weight.numel() == classes,
        f"cross_entropy: the weight needs one number for each of the {classes} classes",
    )
    shape = [1] * axis + [classes] + [1] * (x.dim() - axis - 1)
    weights = None if weight is None else weight.view(shape)
    if target.shape == x.shape and target.is_floating_point():
        require(ignore_index < 0, "cross_entropy: ignore_index has no meaning for probabilities")
        require(weight is None or weight.dim() == 1, "cross_entropy: the weight needs one axis")
        if label_smoothing:
            target = target * (1 - label_smoothing) + uniform
        terms = logs * target if weights is None else logs * target * weights
        if reduction == _NONE:
            return -terms.sum(axis)
        total = -terms.sum()
        return total if reduction == _SUM else total / (x.numel() // max(classes, 1))
    loss = torch.nn.functional.nll_loss(
        logs, target, weight, None, ignore_index, None, ("none", "mean", "sum")[reduction]
    )
    if not label_smoothing:
        return loss
    target = target.long()
    ignored = target == ignore_index
    smooth = -(logs if weights is None else logs * weights).sum(axis)
    smooth = smooth.masked_fill(ignored, 0.0)
    if reduction == _MEAN:
        if weight is None:
            smooth = smooth.sum() / (~ignored).sum()
        else:
            used = weight.gather(0, target.masked_fill(ignored, 0).flatten())
            smooth = smooth.sum() / used.masked_fill(ignored.flatten(), 0).sum()
    elif reduction == _SUM:
        smooth = smooth.sum()
    return loss * (1 - label_smoothing) + smooth * uniform


def cosine_similarity(x: Tensor, y: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Return sum(x / max(|x|, eps) * y / max(|y|, eps)) along `dim`, each step rounded.

    The gradient of a norm is that of the norm, also where it is smaller than eps.
    """
    dtype = torch.promote_types(x.dtype, y.dtype)
    require(dtype.is_floating_point, f"cosine_similarity: the operands are {dtype}")
    x, y = torch.broadcast_tensors(x.to(dtype), y.to(dtype))
    norm_x, norm_y = (torch.linalg.vector_norm(t, 2, dim, keepdim=True).clone() for t in (x, y))
    with torch.no_grad():
        norm_x.clamp_min_(eps)
        norm_y.clamp_min_(eps)
    return torch.sum(x / norm_x * (y / norm_y), dim)


def pairwise_distance(
    x: Tensor, y: Tensor, p: float = 2, eps: float = 1e-6, keepdim: bool = False
) -> Tensor:
    """Return the p-norm of x - y + eps along the last axis, each step rounded."""
    distance: Tensor = torch.norm(x - y + eps, p, -1, keepdim)
    return distance


# ---- products ----------------------------------------------------------------------------------------

# PyTorch computes their gradients in different ways within a TorchDispatchMode and without one.


def prod(x: Tensor, *, dtype: Any = None) -> Tensor:
    """Return the product of all elements. The gradient is that of `prod_dim`."""
    return prod_dim(x.reshape(-1), 0, dtype=dtype)


def prod_dim(x: Tensor, dim: int, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """Return the product over one axis.

    The gradient is g (p s), where p and s are the products of the elements before and after an element. The
    forward-mode derivative is the sum of t (p s), with the tangent t.
    """
    if _is_recorded(x):
        product: Tensor = _Prod.apply(x if dtype is None else x.to(dtype), dim, keepdim)
        return product
    with AutoDispatchBelowAutograd():
        return torch.prod(x, dim, keepdim, dtype=dtype)


def cumprod(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    """Return the products of the elements up to each element along `dim`.

    The gradient is p t, where p is the product of the elements before an element x[i], and
    t[i] = g[i] + x[i + 1] t[i + 1], which is rounded once. In forward mode the derivative is
    d[i] = p t + x[i] d[i - 1], with the tangent t.
    """
    if _is_recorded(x):
        products: Tensor = _Cumprod.apply(x if dtype is None else x.to(dtype), dim)
        return products
    with AutoDispatchBelowAutograd():
        return torch.cumprod(x, dim, dtype=dtype)


def _is_recorded(*operands: Tensor) -> bool:
    """Return whether autograd or a transform of torch.func has to see the operator."""
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    has_tangent = any(unpack_dual(x).tangent is not None for x in operands)
    return recorded or has_tangent or bool(get_interpreter_stack())


def _products_before(x: Tensor, dim: int) -> Tensor:
    """Return the product of the elements before each element."""
    n = x.shape[dim]
    if not n:
        return x
    shifted = torch.cat([torch.ones_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, n - 1)], dim)
    return torch.cumprod(shifted, dim)


def _products_of_others(x: Tensor, dim: int) -> Tensor:
    """Return the product of all elements but one, for each element."""
    after = _products_before(x.flip(dim), dim).flip(dim)
    return _products_before(x, dim) * after


class _Prod(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dim: int, keepdim: bool) -> Tensor:
        return prod_dim(x.detach(), dim, keepdim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.dim, ctx.keepdim = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        if not x.dim():
            return t.clone()
        terms = t * _products_of_others(x, ctx.dim)
        total: Tensor = terms.sum(ctx.dim, keepdim=ctx.keepdim)
        return total

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int, keepdim: bool) -> Any:
        x = x.movedim(in_dims[0], 0)
        return (_Prod.apply(x, _behind_batch(x, dim), keepdim) if x.dim() > 1 else x.clone()), 0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,), dim = ctx.saved_tensors, ctx.dim
        if not x.dim():
            return g.clone(), None, None
        g = g if ctx.keepdim else g.unsqueeze(dim)
        return g * _products_of_others(x, dim), None, None


class _Cumprod(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dim: int) -> Tensor:
        return cumprod(x.detach(), dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.dim = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        (x,), dim = ctx.saved_tensors, ctx.dim
        if not x.numel() or not x.dim():
            return t.clone()
        terms, factors = (t * _products_before(x, dim)).unbind(dim), x.unbind(dim)
        sums = [terms[0]]
        for term, factor in zip(terms[1:], factors[1:]):
            sums.append(torch.addcmul(term, factor, sums[-1]))
        return torch.stack(sums, dim)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dim: int) -> Any:
        x = x.movedim(in_dims[0], 0)
        return (_Cumprod.apply(x, _behind_batch(x, dim)) if x.dim() > 1 else x.clone()), 0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,), dim = ctx.saved_tensors, ctx.dim
        if not x.numel() or not x.dim():
            return g.clone(), None
        # In this order the loop of addcmul takes each step's numbers as they lie.
        first, second = (t.movedim(dim, 0).contiguous() for t in (g, x))
        sums = _sums_after(first, second).movedim(0, dim)
        return _products_before(x, dim) * sums, None


def _sums_after(g: Tensor, x: Tensor) -> Tensor:
    """Return t with t[i] = g[i] + x[i + 1] t[i + 1] along the first axis, each rounded once."""
    if not torch.is_grad_enabled() and not get_interpreter_stack() and are_plain((g, x)):
        out = torch.empty_like(g)
        kernels.library.reproml_recurrence(
            *(len(g), g.numel() // len(g), g.data_ptr(), x.data_ptr(), out.data_ptr())
        )
        return out
    gradients, factors = g.unbind(), x.unbind()
    sums = [gradients[-1]]
    for i in reversed(range(len(factors) - 1)):
        sums.append(torch.addcmul(gradients[i], factors[i + 1], sums[-1]))
    return torch.stack(sums[::-1])


def _behind_batch(x: Tensor, dim: int) -> int:
    """Return the axis of x that is `dim` of each element of a batch along the first axis."""
    return dim % (x.dim() - 1) + 1


# ---- angles ------------------------------------------------------------------------------------------

# The gradient at the origin differs between versions of PyTorch.


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """Return the angle of the point (x, y).

    The gradients are (g x) r and (g (-y)) r, where r = 1 / (y y + x x) in rounded steps, and 0 if that is
    infinite. In forward mode the derivative is the sum of the same products with the tangents.
    """
    angle: Tensor = _Atan2.apply(y, x) if _is_recorded(y, x) else _Atan2.forward(y, x)
    return angle


def atan2_(y: Tensor, x: Tensor) -> Tensor:
    """Overwrite y with the angle of the point (x, y)."""
    return y.copy_(atan2(y.clone(), x))


def _inverse_square(y: Tensor, x: Tensor) -> Tensor:
    """Return 1 / (y y + x x) in rounded steps, and 0 if that is infinite."""
    r = (y * y + x * x).reciprocal()
    return torch.where(r.isinf(), 0.0, r)


class _Atan2(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, x: Tensor) -> Tensor:
        with AutoDispatchBelowAutograd():
            return torch.atan2(y, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, of_y: Tensor, of_x: Tensor) -> Tensor:
        y, x = ctx.saved_tensors
        r = _inverse_square(y, x)
        total: Tensor = of_y * x * r + of_x * -y * r
        return total

    @staticmethod
    def vmap(info: Any, in_dims: Any, y: Tensor, x: Tensor) -> Any:
        axes = max(t.dim() - (at is not None) for t, at in zip((y, x), in_dims))

        def batched(t: Tensor, at: Optional[int]) -> Tensor:
            if at is None:
                return t
            t = t.movedim(at, 0)
            return t.reshape(len(t), *[1] * (axes + 1 - t.dim()), *t.shape[1:])

        return _Atan2.apply(batched(y, in_dims[0]), batched(x, in_dims[1])), 0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        y, x = ctx.saved_tensors
        r = _inverse_square(y, x)
        return (g * x * r).sum_to_size(y.shape), (g * -y * r).sum_to_size(x.shape)
