"""A batch whose rows are dealt to several workers, in programs that look like those of one process.

A `Sharded` tensor stands for the whole batch and has its shape; each worker holds every size-th row of it.
Each operator is looked up in RULES by its name. What computes a row from a row runs on the worker's own
rows; a sum over the batch is exchanged unrounded and rounded once (partial.py), the gradients of a backward
pass together at its end; any other function is computed by every worker from the gathered batch. All
results are those of one process with the whole batch. What writes or looks into a Sharded tensor by other
ways is refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Callable, NoReturn, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import compute_elementwise_output_strides
from torch.utils._pytree import tree_map_only

from reproml.arithmetic import NotExactError, dispatch, normalization
from reproml.arithmetic.ball import BINARY64
from reproml.arithmetic.convolution import weight_operands
from reproml.arithmetic.field import Ball
from reproml.arithmetic.normalization_steps import gradient, normalize, statistics, variance
from reproml.arithmetic.partial import (
    Group,
    Partial,
    in_units,
    marked,
    merge,
    plain_sum,
    product,
    units,
)
from reproml.arithmetic.rounding import SLACK, TINY, U, gamma

aten = torch.ops.aten
raw = dispatch.natively  # for what is no operator of the user's


@dataclass(frozen=True)
class Rows:
    """Where the batch is: dimension `dim` counts before x batch x after elements, row-major.

    Of the batch, worker r holds the rows r, r + size, r + 2 size, ...
    """

    group: Group
    batch: int
    dim: int = 0
    before: int = 1
    after: int = 1

    def held(self, worker: int) -> int:
        """The number of rows that a worker holds."""
        return len(range(worker, self.batch, self.group.size))

    def length(self, batch: int) -> int:
        """The dimension's size for so many rows."""
        return self.before * batch * self.after

    @property
    def own(self) -> int:
        """The dimension's size on this worker."""
        return self.length(self.held(self.group.rank))

    @property
    def all(self) -> int:
        """The dimension's size on all workers together."""
        return self.length(self.batch)

    def moved(self, dim: int) -> Rows:
        return replace(self, dim=dim)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """This worker's part of a tensor that has the whole batch in `dim`."""
        split: Tensor = x.unflatten(dim, (self.before, self.batch, self.after))
        index: list[Any] = [slice(None)] * (dim + 1) + [
            slice(self.group.rank, None, self.group.size)
        ]
        return split[tuple(index)].flatten(dim, dim + 2)


class Sharded(Tensor):
    """The whole batch, of which `local` is here. No two tensors share a `local` unless one is a view."""

    local: Tensor
    at: Rows

    @staticmethod
    def __new__(cls, local: Tensor, at: Rows, strides: Optional[Sequence[int]] = None) -> Sharded:
        shape = list(local.shape)
        shape[at.dim] = at.all
        strides = strides or _strides(local, shape)
        make: Any = Tensor._make_wrapper_subclass
        made: Sharded = make(cls, shape, strides=strides, dtype=local.dtype, device=local.device)
        made.local, made.at = local, at
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> Any:  # type: ignore[override]
        return f"Sharded(dim={self.at.dim}, batch={self.at.batch}, local={self.local})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOSSES:
                args, kwargs = _with_target(args, kwargs or {})
            elif func in _RECURRENT:
                args = _with_state(args, _RECURRENT[func])
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, Pending) for t in types):
            args, kwargs = tree_map_only(Pending, Pending.value, (args, kwargs))
        name = func._schema.name[len("aten::") :]
        rule = RULES.get(name) or RULES.get(name.rstrip("_")) or _whole
        if func._schema.is_mutable and not (rule in _IN_PLACE and name.endswith("_")):
            rule = RULES[name] if name == "_native_batch_norm_legit" else _whole  # which refuses it
        return rule(func, args, kwargs or {})


def _strides(local: Tensor, shape: Sequence[int]) -> list[int]:
    """Those of the whole batch, laid out as the part is: 0 where it repeats, else densely."""
    strides, step = [0] * len(shape), 1
    for d in sorted(range(len(shape)), key=lambda d: (local.stride(d), -d)):
        if local.stride(d):
            strides[d] = step
            step *= max(shape[d], 1)
    return strides


def _few(at: Rows) -> bool:
    """Whether this worker's part does not tell the layout of the whole: a row has any stride."""
    return at.own <= at.length(1)


def _view_strides(func: Any, args: Any, kwargs: Any) -> Optional[Sequence[int]]:
    """Those of a view of the whole batch args[0], where the part does not tell them."""
    x = args[0]
    if not _few(x.at):
        return None
    with raw():
        whole = torch.empty_strided(x.shape, x.stride(), device="meta")
        result = func(whole, *args[1:], **kwargs)
    return (result if isinstance(result, Tensor) else result[0]).stride()


def share(x: Tensor, group: Group) -> Sharded:
    """The batch x [batch, ...], which every worker has whole, with each worker's own rows kept."""
    at = Rows(group, len(x))
    with raw():
        return Sharded(at.of(x, 0).contiguous(), at)


def gathered(x: Sharded) -> Tensor:
    """The whole batch, on every worker."""
    at = x.at
    most = at.held(0)
    with raw():
        local = x.local.unflatten(at.dim, (at.before, at.held(at.group.rank), at.after))
        rows = local.movedim(at.dim + 1, 0)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        as_sent = padded.to(torch.uint8) if padded.dtype is torch.bool else padded
        dealt = at.group.to_all(as_sent).to(padded.dtype).transpose(0, 1)
        batch = dealt.reshape(-1, *rows.shape[1:])[: at.batch]
        return batch.movedim(0, at.dim + 1).flatten(at.dim, at.dim + 2).contiguous()


# ---- sums over the batch ---------------------------------------------------------------------------


class Pending(Tensor):
    """A gradient not known before the workers have met: an operator that reads it makes them meet."""

    _value: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, value: Callable[[], Tensor]) -> Pending:
        make: Any = Tensor._make_wrapper_subclass
        made: Pending = make(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        made._value = value
        return made

    def value(self) -> Tensor:
        """The gradient, plain. It is exchanged now if it was not."""
        with raw():
            return self._value()

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name[len("aten::") :] in _LOOKS:
            x, rest = args[0], args[1:]
            with raw():
                like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                like = func(like, *rest, **kwargs)
            return Pending(like, lambda: func(x.value(), *rest, **kwargs))
        args, kwargs = tree_map_only(Pending, Pending.value, (args, kwargs))
        return func(*args, **kwargs)


_LOOKS = frozenset("detach alias t transpose permute view _unsafe_view".split())


class _Bucket:
    """The sums of one backward pass that are not exchanged yet."""

    def __init__(self, group: Group, task: int) -> None:
        self.group = group
        self.task = task  # the backward pass
        self.waiting: list[Partial] = []
        self.results: list[Tensor] = []

    def add(self, partial: Partial) -> Callable[[], Tensor]:
        self.waiting.append(partial)
        number = len(self.waiting) - 1

        def result() -> Tensor:
            if not self.results:
                self.close()
            return self.results[number]

        return result

    def close(self) -> None:
        """Exchange all that wait, at once."""
        if self.waiting and not self.results:
            with raw():
                self.results = merge(self.group, self.waiting)
            self.waiting.clear()


class _Backward(threading.local):
    """The backward pass of this thread."""

    bucket: Optional[_Bucket] = None


_backward = _Backward()
_at_end: list[Callable[[Group], None]] = []


def at_end_of_backward(function: Callable[[Group], None]) -> None:
    """Have it called whenever a backward pass that summed over a Sharded batch has ended."""
    _at_end.append(function)


def _end_of_backward() -> None:
    bucket, _backward.bucket = _backward.bucket, None
    if bucket is not None:
        bucket.close()
        for function in _at_end:
            function(bucket.group)


def _sum(group: Group, partial: Partial, shape: Sequence[int]) -> Tensor:
    """The whole sum, float32 of this shape: now, or within a backward pass at its end."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        with raw():
            return merge(group, [partial])[0].reshape(shape)
    bucket = _backward.bucket
    if bucket is None or bucket.task != task:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(_end_of_backward)
        bucket = None
    if bucket is None or bucket.results:
        bucket = _backward.bucket = _Bucket(group, task)
    result = bucket.add(partial)
    with raw():
        like = partial.sums.new_empty(shape, dtype=torch.float32)
    return Pending(like, lambda: result().reshape(shape))


# ---- operands --------------------------------------------------------------------------------------


def _refuse(func: Any, why: str) -> NoReturn:
    raise NotExactError(
        f"{func} is not defined for a batch that is dealt to several workers: {why}; "
        "compute it from the rows of one worker before the model, or from results without the batch"
    )


def _tensors(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _first(args: Any, kwargs: Any) -> Sharded:
    return next(x for x in _tensors([*args, *kwargs.values()]) if isinstance(x, Sharded))


def _own(func: Any, x: Any, at: Rows) -> Any:
    """This worker's part of an operand that broadcasts against one whose batch is `at`, dim from the right.

    A plain tensor has the whole batch, or (labels, say) just this worker's rows, or none of it.
    """
    if isinstance(x, Sharded):
        if replace(x.at, dim=x.at.dim - x.dim()) != at:
            _refuse(func, "its operands have the batch in different places")
        return x.local
    if not isinstance(x, Tensor) or x.dim() < -at.dim or x.shape[at.dim] == 1:
        return x
    if x.shape[at.dim] == at.all:
        with raw():
            return at.of(x, x.dim() + at.dim)
    if x.shape[at.dim] == at.own:
        return x
    _refuse(func, f"an operand of shape {list(x.shape)} has neither all of the batch nor its share")


def _wrapped(result: Any, at: Rows, strides: Optional[Sequence[int]] = None) -> Any:
    """Results that have the batch, at.dim counted from the right."""

    def wrap(x: Tensor) -> Tensor:
        return Sharded(x, at.moved(x.dim() + at.dim), strides) if x.dim() >= -at.dim else x

    return tree_map_only(Tensor, wrap, result)


def _like(y: Any, x: Tensor) -> bool:
    return isinstance(y, Tensor) and y.dim() == x.dim()


def _negative(x: Sharded) -> Rows:
    """Its rows, the dimension counted from the right."""
    return x.at.moved(x.at.dim - x.dim())


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by the schema's names."""
    schema = func._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**values, **{a.name: x for a, x in zip(schema, args)}, **kwargs}


# ---- rules: (operator, positional, keywords) -> result ----------------------------------------------


def _whole(func: Any, args: Any, kwargs: Any) -> Any:
    """From the gathered batch, on every worker."""
    schema = func._schema
    if schema.is_mutable or any(r.alias_info for r in schema.returns):
        _refuse(func, "it writes or looks into a tensor of the batch")
    return func(*tree_map_only(Sharded, gathered, args), **tree_map_only(Sharded, gathered, kwargs))


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise, of operands that broadcast together; also in place."""
    at = _negative(_first(args, kwargs))
    in_place = func._schema.is_mutable
    if in_place and not isinstance(args[0], Sharded):
        return func(*tree_map_only(Sharded, gathered, args), **kwargs)
    result = func(
        *[_own(func, x, at) for x in args], **{k: _own(func, x, at) for k, x in kwargs.items()}
    )
    if in_place:
        return args[0]
    told = not _few(at) or kwargs.get("memory_format") is torch.contiguous_format
    return _wrapped(result, at, None if told else _pointwise_strides(args))


def _pointwise_strides(args: Any) -> Optional[Sequence[int]]:
    """Those that PyTorch gives to the whole result, where the part does not tell them."""
    batches = [x for x in _tensors(args) if isinstance(x, Sharded)]
    if len({x.shape for x in batches}) > 1:
        return None
    with raw():
        plain = [torch.empty_strided(x.shape, x.stride(), device="meta") for x in batches]
        return compute_elementwise_output_strides(*plain)


def _rows(func: Any, args: Any, kwargs: Any) -> Any:
    """Each row of the first dimension by itself: layers, pooling, padding."""
    x = _first(args, kwargs)
    at = x.at
    if at.dim or any(isinstance(y, Sharded) and y.at != at for y in _tensors(args)):
        return _whole(func, args, kwargs)
    result = func(*tree_map_only(Sharded, lambda y: y.local, args), **kwargs)
    return tree_map_only(Tensor, lambda y: Sharded(y, at), result)


def _along(func: Any, args: Any, kwargs: Any) -> Any:
    """Over one or more dimensions, kept or not: over the batch itself from the gathered batch."""
    x = _first(args, kwargs)
    named = _named(func, args, kwargs)
    if "other" in named:  # max and min of two tensors
        return _pointwise(func, args, kwargs)
    dims = _dims(named.get("dim", named.get("dims")), x.dim())
    if x.at.dim in dims or any(isinstance(y, Sharded) and y.at != x.at for y in _tensors(args)):
        return _whole(func, args, kwargs)
    at = _negative(x)
    result = func(*[_own(func, y, at) if _like(y, x) else y for y in args], **kwargs)
    first = next(_tensors([result] if isinstance(result, Tensor) else result))
    gone = 0 if first.dim() == x.dim() else sum(d < x.at.dim for d in dims)
    return tree_map_only(Tensor, lambda y: Sharded(y, x.at.moved(x.at.dim - gone)), result)


def _dims(dim: Any, rank: int) -> list[int]:
    """PyTorch's `dim`, from the left; all for none."""
    given = [dim] if isinstance(dim, int) else list(dim or range(rank))
    return [d % rank for d in given]


def _total(func: Any, args: Any, kwargs: Any) -> Any:
    """sum, mean."""
    named = _named(func, args, kwargs)
    x = named["self"]
    dims = _dims(named.get("dim"), x.dim())
    if x.at.dim not in dims:
        return _along(func, args, kwargs)
    group, keep = x.at.group, named.get("keepdim", False)
    if not x.is_floating_point():
        with raw():
            local = func(*tree_map_only(Sharded, lambda y: y.local, args), **kwargs)
            return group.to_all(local).sum(0)
    if x.dtype is not torch.float32 or named.get("dtype") not in (None, torch.float32):
        return _whole(func, args, kwargs)
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [x.shape[d] for d in kept]
    m = math.prod(shape)
    count = math.prod(x.shape[d] for d in dims)
    with raw():
        rows = x.local.permute([*kept, *dims]).reshape(m, x.local.numel() // max(m, 1))
        partial = plain_sum(rows, count, count if "mean" in func._schema.name else 1)
    if keep:
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
    return _sum(group, partial, shape)


def _matmul(func: Any, args: Any, kwargs: Any) -> Any:
    """mm, bmm, and with a first operand that is added, addmm and baddbmm."""
    *bias, a, b = args
    of_a, of_b = (_negative(x) if isinstance(x, Sharded) else None for x in (a, b))
    rows = of_a.dim if of_a else None, of_b.dim if of_b else None
    if rows == (-1, -2) and of_a and of_b and a.dim() == 2 and not bias:
        if of_a.moved(-2) == of_b:
            with raw():
                partial = product(a.local.t(), b.local, a.shape[1])
            return _sum(of_a.group, partial, (a.shape[0], b.shape[1]))
    elif rows in ((-2, None), (None, -1), (-3, -3), (-3, None), (None, -3)):
        at = of_a or of_b
        assert at is not None
        if rows[0] == -3 or rows[1] == -3:
            a, b = _own(func, a, at), _own(func, b, at)
        else:
            a, b = (x.local if isinstance(x, Sharded) else x for x in (a, b))
        return _wrapped(func(*[_own(func, x, at) for x in bias], a, b, **kwargs), at)
    return _whole(func, args, kwargs)


def _convolution_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, w, sizes, stride, padding, dilation, transposed, output_padding, groups, mask = args
    if not (isinstance(g, Sharded) and isinstance(x, Sharded)) or isinstance(w, Sharded):
        return _whole(func, args, kwargs)
    if g.at != x.at or x.at.dim:
        return _whole(func, args, kwargs)
    at, rest = x.at, (sizes, stride, padding, dilation, transposed, output_padding, groups)
    grad_x = grad_w = grad_b = None
    if mask[0]:
        grad_x = Sharded(func(g.local, x.local, w, *rest, [True, False, False])[0], at)
    if mask[1]:
        slid, still = (g, x) if transposed else (x, g)
        with raw():
            partial = _weight_partial(slid, still, w, stride, padding, dilation, groups)
        grad_w = _sum(at.group, partial, w.shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return grad_x, grad_w, grad_b


def _weight_partial(
    slid: Sharded, still: Sharded, w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Partial:
    """The weight's gradient, [o, c / groups * kh * kw], image by image, so that few additions follow
    each other: the terms of a place, then of an image."""
    operands = [slid.local, still.local, w]
    if w.dim() == 3:  # one dimension is two with a height of 1
        operands = [t.unsqueeze(2) for t in operands]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    given = (*operands, stride, padding, dilation, groups)
    rows, columns = weight_operands(
        *given
    )  # float32 [n, groups, o, places], [n, groups, places, l]
    n, _, o, places = rows.shape
    length = columns.shape[3]
    wide_rows, wide_columns = rows.double(), columns.double()
    sums = marked(
        (wide_rows @ wide_columns).sum(0),
        lambda: ((rows != 0).float() @ (columns != 0).float()).sum(0),
    ).reshape(groups * o, length)
    norms = torch.linalg.vector_norm(wide_rows, dim=(0, 3))  # [groups, o]
    others = torch.linalg.vector_norm(wide_columns, dim=(0, 2)).amax(1, keepdim=True)

    def exact(i: Tensor, j: Tensor) -> list[int]:
        def terms(at: slice) -> Tensor:
            group, row = i[at] // o, i[at] % o
            left, right = wide_rows[:, group, row], wide_columns[:, group, :, j[at]]
            return (left.transpose(0, 1) * right).reshape(len(row), n * places)

        return in_units(terms, n * places, len(i))

    return Partial(sums, (norms * others).reshape(-1), places + slid.at.batch, exact)


def _layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], args[1]
    if not isinstance(x, Sharded) or x.at.dim >= x.dim() - len(shape):
        return _whole(func, args, kwargs)
    result = func(x.local, *args[1:])
    return tuple(Sharded(y, x.at) for y in result)


def _layer_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, shape, mean, rstd, w, b, mask = args
    if not all(isinstance(t, Sharded) and t.at == x.at for t in (g, x, mean, rstd)):
        return _whole(func, args, kwargs)
    at, length = x.at, math.prod(shape)
    grad_x = grad_w = grad_b = None
    local = [t.local for t in (g, x, mean, rstd)]
    if mask[0]:
        grad_x = func(*local[:2], shape, *local[2:], w, b, [True, False, False])[0]
        grad_x = Sharded(grad_x, at)
    if mask[1]:
        with raw():
            flat = [t.reshape(t.numel() // s, s) for t, s in zip(local, (length, length, 1, 1))]
            partial = _scaled_sum([t.t() for t in flat], x.numel() // length)
        grad_w = _sum(at.group, partial, shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, list(range(x.dim() - len(shape)))).reshape(shape)
    return grad_x, grad_w, grad_b


def _scaled_sum(operands: Sequence[Tensor], height: int) -> Partial:
    """sum g (x - mean) rstd over the last axis, or that times a weight: this worker's part of it.

    operands: g, x, mean, rstd and perhaps the weight, float32 [m, n] or broadcast to that, g's shape.
    """
    g, x, mean, *factors = (t.double().expand(operands[0].shape) for t in operands)
    terms = g * (x - mean)
    for factor in factors:
        terms = terms * factor

    def exact(i: Tensor, j: Tensor) -> list[int]:
        picked = [[map(Fraction, row) for row in t[i].tolist()] for t in (g, x, mean, *factors)]
        return [
            units(sum((a * (b - m) * math.prod(f) for a, b, m, *f in zip(*rows)), Fraction(0)))
            for rows in zip(*picked)
        ]

    # Up to four roundings of a term come before the sum.
    return Partial(terms.sum(1, keepdim=True), terms.abs().sum(1), height + 4, exact)


def _batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """In training: statistics of the whole batch, then each worker's rows."""
    x, weight, bias, *running, training, momentum, eps = args
    if not isinstance(x, Sharded) or x.at.dim or x.at.length(1) != 1:
        return _whole(func, args, kwargs)
    if not training:
        out, *rest = func(x.local, *args[1:])
        return (Sharded(out, x.at), *rest)
    mean, rstd, var = _statistics(x, eps)
    for old, new in zip(running or (None, None), (mean, var)):
        if old is not None:
            with raw():
                normalization.follow(old, new, momentum)
    weight, bias = (None if t is None else _column(t, x) for t in (weight, bias))
    with raw():
        out = normalize(x.local, _column(mean, x), _column(rstd, x), weight, bias)
    return Sharded(out, x.at), mean, rstd


def _column(t: Tensor, x: Tensor) -> Tensor:
    """[c], to broadcast against x [n, c, ...]."""
    return t.reshape(-1, *[1] * (x.dim() - 2))


def _statistics(x: Sharded, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel the mean, 1 / sqrt(variance + eps) and the unbiased variance, float32 [c].

    Worker r sends a pivot p, d = sum (x - p) and q = sum (x - p)^2 over its n numbers. For any mu, with
    the sums over the workers s = sum (d + n (p - mu)) and v = sum (q + 2 (p - mu) d + n (p - mu)^2):

        mean = mu + s / N,    N variance = v - s^2 / N

    The first worker puts the rounding test to them; channels that fail are gathered.
    """
    group, k = x.at.group, BINARY64
    with raw():
        rows = normalization.channels(x.local).double()
        n, places = rows.shape[1], math.prod(x.shape[2:])
        pivot = rows.mean(1) if n else rows.new_zeros(len(rows))
        apart = rows - pivot.unsqueeze(1)
        every = group.to_all(torch.stack([pivot, apart.sum(1), (apart * apart).sum(1)]))
        counts = [x.at.held(r) * places for r in range(group.size)]
        total = sum(counts)
        mu = sum(c / total * each[0] for c, each in zip(counts, every))
        s, v = k.constant(0), k.constant(0)
        for count, (p, d, q) in zip(counts, every):
            error = gamma(count + 3)
            off = k.exact(p) - k.exact(mu)
            d_sum = Ball(d, 0, (q * count).sqrt() * error, k)  # sum |x - p| <= sqrt(n q)
            s = s + d_sum + count * off
            v = v + Ball(q, error, 0, k) + 2 * off * d_sum + count * off * off
        v = v - s * s / total
        mean = k.exact(mu) + s / total
        rstd = 1 / k.sqrt(v / total + Fraction(eps))
        found, failed = [], rows.new_zeros(len(rows), dtype=torch.bool)
        for ball in (mean, rstd, v / max(total - 1, 1)):
            e = ball.error * SLACK + 2 * U * ball.c.abs() + TINY
            low, high = (ball.c - e).float(), (ball.c + e).float()
            failed |= ~(low.view(torch.int32) == high.view(torch.int32)) | ~ball.c.isfinite()
            found.append(high)
        if total == 1:
            failed[:] = True
        *found, failed = group.to_all(torch.stack([*found, failed.float()]))[0]
        doubtful = failed.nonzero().squeeze(1)
        if len(doubtful):
            whole = normalization.channels(gathered(Sharded(x.local[:, doubtful], x.at)))
            exact = *statistics(whole, eps), variance(whole, 1)
            for known, settled in zip(found, exact):
                known[doubtful] = settled.squeeze(1)
    return found[0], found[1], found[2]


def _batch_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, w, running_mean, running_var, mean, rstd, train, eps, mask = args
    if not (isinstance(g, Sharded) and isinstance(x, Sharded)) or g.at != x.at or not train:
        return _whole(func, args, kwargs)
    if x.at.dim or x.at.length(1) != 1:
        return _whole(func, args, kwargs)
    at, n = x.at, x.numel() // max(x.shape[1], 1)
    grad_x = grad_w = grad_b = None
    with raw():
        m, r = mean.unsqueeze(1), rstd.unsqueeze(1)
        scale = torch.ones_like(m) if w is None else w.detach().unsqueeze(1)
        rows = [normalization.channels(t.local) for t in (g, x)]
        if mask[0] and n > 1:
            sums = [_scaled_sum([*rows, m, r, scale], n), plain_sum(rows[0], n, times=scale)]
            b, a = (_column(t, x) for t in merge(at.group, sums))
            m, r, scale = (_column(t, x) for t in (m, r, scale))
            grad_x = gradient(n, g.local, scale.expand(g.local.shape), x.local, m, r, a, b)
        elif mask[0]:
            grad_x = torch.zeros_like(x.local)
        scaled = _scaled_sum([*rows, mean.unsqueeze(1), rstd.unsqueeze(1)], n)
    if mask[1]:
        grad_w = _sum(at.group, scaled, mean.shape)
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return None if grad_x is None else Sharded(grad_x, at), grad_w, grad_b


def _group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    x, w, b, n, *rest = args
    if not isinstance(x, Sharded) or x.at.dim or x.at.length(1) != 1:
        return _whole(func, args, kwargs)
    return tuple(Sharded(y, x.at) for y in func(x.local, w, b, len(x.local), *rest))


def _group_norm_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, mean, rstd, w, n, c, hw, groups, mask = args
    if not all(isinstance(t, Sharded) and t.at == x.at for t in (g, x, mean, rstd)):
        return _whole(func, args, kwargs)
    grad_x = grad_w = grad_b = None
    local = [t.local for t in (g, x, mean, rstd)]
    if mask[0]:
        grad_x = func(*local, w, len(local[0]), c, hw, groups, [True, False, False])[0]
        grad_x = Sharded(grad_x, x.at)
    if mask[1]:
        split = (len(local[0]), groups, c // groups, hw)
        with raw():
            shapes = (split, split, *[(split[0], groups, 1, 1)] * 2)
            flat = [t.reshape(s).expand(split) for t, s in zip(local, shapes)]
            flat = [t.permute(1, 2, 0, 3).reshape(c, split[0] * hw) for t in flat]
            partial = _scaled_sum(flat, n * hw)
        grad_w = _sum(x.at.group, partial, (c,))
    if mask[2]:
        grad_b = aten.sum.dim_IntList(g, [0, *range(2, g.dim())])
    return grad_x, grad_w, grad_b


# ---- losses ----------------------------------------------------------------------------------------

_NONE, _MEAN = 0, 1  # PyTorch's numbers of a reduction

_LOSSES = {
    F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.kl_div,
    F.binary_cross_entropy, F.binary_cross_entropy_with_logits,
}  # fmt: skip


def _with_target(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a loss with the target's rows known as those of the batch."""
    args, kwargs = list(args), dict(kwargs)
    x = args[0] if args else kwargs.get("input")
    if len(args) > 1:
        args[1] = _rows_of(args[1], x)
    elif "target" in kwargs:
        kwargs["target"] = _rows_of(kwargs["target"], x)
    return args, kwargs


def _rows_of(y: Any, x: Any) -> Any:
    """A tensor beside a batch with rows in the first dimension: the whole batch's, or this worker's."""
    if not isinstance(x, Sharded) or isinstance(y, Sharded) or x.at.dim or not y.dim():
        return y
    if len(y) not in (x.at.own, x.at.all):
        raise NotExactError(
            f"The target has {len(y)} rows, the batch {x.at.all}, of which {x.at.own} are here."
        )
    with raw():
        return Sharded(x.at.of(y, 0).contiguous() if len(y) == x.at.all else y, x.at)


_RECURRENT = {
    torch.lstm: 1, torch.gru: 1, torch.rnn_tanh: 1, torch.rnn_relu: 1,
    torch.lstm_cell: 0, torch.gru_cell: 0, torch.rnn_tanh_cell: 0, torch.rnn_relu_cell: 0,
}  # fmt: skip


def _with_state(args: Any, dim: int) -> Any:
    """The arguments of a recurrent layer; its first state has the batch in `dim`."""
    x, state, *rest = args
    if not isinstance(x, Sharded) or isinstance(state, Sharded) or x.dim() != dim + 2:
        return args
    at = replace(x.at, dim=dim)

    def mark(y: Tensor) -> Tensor:
        return Sharded(_own(None, y, at.moved(dim - y.dim())).contiguous(), at)

    with raw():
        return (x, tree_map_only(Tensor, mark, state), *rest)


def _nll_loss(func: Any, args: Any, kwargs: Any) -> Any:
    """Only the numbers at the targets meet."""
    x, target, weight, reduction, ignored = args
    if not isinstance(x, Sharded) or x.at.dim or x.dim() != 2:
        return _whole(func, args, kwargs)
    target = _rows_of(target, x)
    if reduction == _NONE:
        loss, total = func(x.local, target.local, weight, reduction, ignored)
        return Sharded(loss, x.at), total
    with raw():
        counted = target.local != ignored
        at = torch.where(counted, target.local, 0).unsqueeze(1)
        pairs = torch.cat([x.local.gather(1, at).double(), target.local.unsqueeze(1).double()], 1)
        picked, target = gathered(Sharded(pairs, x.at)).split(1, 1)
        picked, target = picked.float(), target.squeeze(1).long()
        if weight is None:  # one class for all that count
            scores, target = picked, torch.where(target != ignored, 0, -100)
            ignored = -100
        else:
            scores = picked.new_zeros(len(picked), x.shape[1])
            scores.scatter_(1, torch.where(target != ignored, target, 0).unsqueeze(1), picked)
    return func(scores, target, weight, reduction, ignored)


def _loss_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """Elementwise, but for the size of the whole batch in a mean: computed in its shape, without
    the others' rows."""
    x = _first(args, kwargs)
    if x.at.dim:
        return _whole(func, args, kwargs)
    at = x.at

    def full(y: Tensor) -> Tensor:
        y = _rows_of(y, x) if y.dim() and y.shape[:1] in (x.shape[:1], x.local.shape[:1]) else y
        if not isinstance(y, Sharded):
            return y
        with raw():
            whole = torch.zeros(y.shape, dtype=y.dtype, device=y.device)
            at.of(whole.view(whole.shape), 0)
            index = torch.arange(at.all, device=y.device)
            whole[at.of(index, 0)] = y.local
        return whole

    result = func(*tree_map_only(Tensor, full, args), **tree_map_only(Tensor, full, kwargs))
    with raw():
        return Sharded(at.of(result, 0).contiguous(), at)


def _nll_loss_backward(func: Any, args: Any, kwargs: Any) -> Any:
    g, x, target, *rest = args
    if not isinstance(x, Sharded) or x.at.dim:
        return _whole(func, args, kwargs)
    g, target = _rows_of(g, x), _rows_of(target, x)
    local = [t.local if isinstance(t, Sharded) else t for t in (g, x, target)]
    return Sharded(func(*local, *rest), x.at)


# ---- views -----------------------------------------------------------------------------------------


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    """view and its kin: the batch goes where row-major order has it in the new shape."""
    x, at = args[0], args[0].at
    shape = list(args[1])
    if -1 in shape:
        known = -math.prod(shape)
        shape[shape.index(-1)] = x.numel() // known if known else 0
    moved = _placed(at, math.prod(x.shape[at.dim + 1 :]) * at.after, shape)
    if moved is None:
        _refuse(func, f"{list(x.shape)} as {shape} takes the rows of the batch apart")
    strides = _view_strides(aten.view.default, [x, shape], {})
    shape[moved.dim] = moved.own
    return Sharded(x.local.view(shape), moved, strides)


def _placed(at: Rows, inner: int, shape: Sequence[int]) -> Optional[Rows]:
    """The batch in another shape, `inner` elements of the whole tensor lying within one of its rows."""
    for dim in [at.dim, *range(len(shape))]:
        if dim >= len(shape):
            continue
        after, rest = divmod(inner, math.prod(shape[dim + 1 :]) or 1)
        before, over = divmod(shape[dim], at.batch * after) if after else (0, 1)
        if before and not rest and not over:
            return replace(at, dim=dim, before=before, after=after)
    return None


def _permuted(order: Callable[[int, Any], Sequence[int]]) -> Callable[..., Any]:
    """A rule for a permutation: order(rank, arguments) has the old dimension at each new place."""

    def rule(func: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        dims = [d % x.dim() for d in order(x.dim(), args[1:])]
        strides = [x.stride(d) for d in dims]
        return Sharded(func(x.local, *args[1:]), x.at.moved(dims.index(x.at.dim)), strides)

    return rule


def _swapped(rank: int, dims: Any) -> list[int]:
    order = list(range(rank))
    a, b = dims
    order[a], order[b] = order[b], order[a]
    return order


def _transpose_in_place(func: Any, args: Any, kwargs: Any) -> Any:
    x, dims = args[0], [d % args[0].dim() for d in args[1:]]
    with raw(), torch._C._DisableTorchDispatch():
        func(x, *dims)  # its shape and strides
    x.local = x.local.transpose(*dims)
    x.at = x.at.moved(_swapped(x.dim(), dims)[x.at.dim])
    return x


def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    x, dim = args[0], args[1] % (args[0].dim() + 1)
    strides = _view_strides(func, args, kwargs)
    return Sharded(func(x.local, dim), x.at.moved(x.at.dim + (dim <= x.at.dim)), strides)


def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    x = args[0]
    gone = [d for d in _dims(args[1] if len(args) > 1 else None, x.dim()) if x.shape[d] == 1]
    kept = [d for d in gone if d != x.at.dim]
    at = x.at.moved(x.at.dim - sum(d < x.at.dim for d in kept))
    if kept != gone:
        _refuse(func, "it takes away the dimension of the batch")
    return Sharded(aten.squeeze.dims(x.local, kept), at, _view_strides(func, args, kwargs))


def _expand(func: Any, args: Any, kwargs: Any) -> Any:
    x, shape = args[0], list(args[1])
    at = x.at.moved(x.at.dim + len(shape) - x.dim())
    strides = _view_strides(func, args, kwargs)
    shape[at.dim] = at.own
    return Sharded(func(x.local, shape, **kwargs), at, strides)


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    named = _named(func, args, kwargs)
    x, dim = named["self"], named["dim"] % named["self"].dim()
    strides = _view_strides(func, args, kwargs)
    if dim != x.at.dim:
        return Sharded(func(x.local, *args[1:], **kwargs), x.at, strides)
    start, end, step = named["start"], named["end"], named["step"]
    if start not in (None, 0) or step != 1 or (end is not None and end < x.shape[dim]):
        _refuse(func, "it takes some rows of the batch")
    return Sharded(aten.alias(x.local), x.at, strides)


def _parted(func: Any, args: Any, kwargs: Any) -> Any:
    """split, unbind, select along another dimension than the batch's."""
    named = _named(func, args, kwargs)
    x, dim = named["self"], named["dim"] % named["self"].dim()
    if dim == x.at.dim:
        _refuse(func, "it takes some rows of the batch")
    result = func(x.local, *args[1:], **kwargs)
    first = result if isinstance(result, Tensor) else result[0]
    at = x.at.moved(x.at.dim - (first.dim() < x.dim() and dim < x.at.dim))
    strides = _view_strides(func, args, kwargs)  # of the first, and so of all
    return tree_map_only(Tensor, lambda y: Sharded(y, at, strides), result)


def _part_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """select_backward, slice_backward: zeros but for the part."""
    g, shape, dim, *rest = args
    shape = list(shape)
    dim %= len(shape)
    at = g.at.moved(g.at.dim + (g.dim() < len(shape) and dim <= g.at.dim))
    if dim == at.dim:
        return _whole(func, args, kwargs)
    shape[at.dim] = at.own
    return Sharded(func(g.local, shape, dim, *rest, **kwargs), at)


def _joined(func: Any, args: Any, kwargs: Any) -> Any:
    """cat and stack along another dimension than the batch's."""
    named = _named(func, args, kwargs)
    x = _first(args, kwargs)
    stacked = "stack" in func._schema.name
    dim = named["dim"] % (x.dim() + stacked)
    if any(y.dim() != x.dim() for y in named["tensors"]) or dim == x.at.dim and not stacked:
        return _whole(func, args, kwargs)
    at = _negative(x)
    result = func([_own(func, y, at) for y in named["tensors"]], dim)
    return Sharded(result, x.at.moved(x.at.dim + (stacked and dim <= x.at.dim)))


def _padded(func: Any, args: Any, kwargs: Any) -> Any:
    x, pad = args[0], args[1]
    if x.dim() - x.at.dim <= len(pad) // 2:
        return _whole(func, args, kwargs)
    return Sharded(func(x.local, *args[1:], **kwargs), x.at)


# ---- numbers from nowhere ----------------------------------------------------------------------------


def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """new_zeros and its kin: a tensor that every worker has."""
    return func(args[0].local, *args[1:], **kwargs)


def _drawn(func: Any, args: Any, kwargs: Any) -> Any:
    """Random numbers: every worker draws those of the whole batch, and keeps its own."""
    x, *rest = args
    if any(isinstance(y, Sharded) for y in _tensors(rest)):
        _refuse(func, "its parameters are part of the batch")
    with raw():
        whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    result = func(whole, *rest, **kwargs)
    with raw():
        own = x.at.of(result, x.at.dim)
        if not func._schema.is_mutable:
            return Sharded(own.contiguous(), x.at)
        x.local.copy_(own)
    return x


_IN_PLACE = (_pointwise, _drawn, _transpose_in_place)

Rule = Callable[[Any, Any, Any], Any]


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
    """, _pointwise),
    **_each("sum mean", _total),
    **_each("""
        _softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
        amax amin max min argmax argmin any all cumsum var std linalg_vector_norm norm sort topk
        gather scatter scatter_add index_select flip
    """, _along),
    **_each("mm bmm addmm baddbmm", _matmul),
    **_each("""
        convolution max_pool2d_with_indices max_pool2d_with_indices_backward
        avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
        adaptive_max_pool2d adaptive_max_pool2d_backward
        reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
        upsample_nearest1d pixel_shuffle pixel_unshuffle
    """, _rows),
    "convolution_backward": _convolution_backward,
    "embedding": lambda func, args, kwargs: (
        _whole(func, args, kwargs) if isinstance(args[0], Sharded)
        else Sharded(func(args[0], args[1].local, *args[2:], **kwargs), args[1].at)
    ),
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    **_each("native_batch_norm _native_batch_norm_legit", _batch_norm),
    "native_batch_norm_backward": _batch_norm_backward,
    "_native_batch_norm_legit_no_training": _rows,
    "nll_loss_forward": _nll_loss,
    **_each("nll_loss_backward nll_loss2d_backward", _nll_loss_backward),
    **_each("""
        mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward
    """, _loss_backward),
    **_each("view _unsafe_view _reshape_alias", _view),
    "t": _permuted(lambda rank, _: range(rank)[::-1]),
    "transpose": _permuted(_swapped),
    "transpose_": _transpose_in_place,
    "permute": _permuted(lambda rank, args: args[0]),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "slice": _slice,
    **_each("select split split_with_sizes unsafe_split unbind", _parted),
    **_each("select_backward slice_backward", _part_backward),
    **_each("cat stack", _joined),
    "constant_pad_nd": _padded,
    **_each("new_empty new_zeros new_ones new_full new_empty_strided", _new),
    **_each("bernoulli_ uniform_ normal_ exponential_ random_ rand_like randn_like randint_like", _drawn),
}
# fmt: on
