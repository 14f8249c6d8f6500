"""Test each operator of the table against an exact oracle: CASES has an entry for each line of EXACT.

A case draws operands, calls `torch.ops.aten.NAME` under exact(), and compares every element, bit for bit,
with the operator's definition, computed by an oracle in real numbers that shares no code with reproml
(verification/oracle.py).

For a new operator, add its case to CASES. An elementwise one needs a formula in real numbers: `"hypot":
[each(lambda x, y: o.sqrt(x * x + y * y), 2)]`. `along` takes a function of a row, `reduced` one for sums
over axes, `drawn` and `Case` any arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import kernels
from tests.arithmetic.strategies import (
    ANY,
    FINITE,
    MODERATE,
    POSITIVE,
    SPECIAL,
    UNIT,
    broadcast,
    grid,
    tensors,
)
from verification import oracle as o
from verification.oracle import Real, check, dot, float32_scalar, real, reals, rounded, total

aten = torch.ops.aten
HALF = Fraction(1, 2)
TESTS = settings(max_examples=12, suppress_health_check=list(HealthCheck))


class Case(NamedTuple):
    """An operator's arguments and its oracle.

    draw: a strategy for the positional arguments. oracle: called with these, returns the exact result or
    results. fixed: one more tuple of arguments. options: keyword arguments for the operator and the
    oracle.
    """

    draw: Any
    oracle: Callable[..., Any]
    fixed: Optional[tuple[Any, ...]] = None
    options: dict[str, Any] = {}


def each(formula: Callable[..., Any], n: int = 1, values: Any = ANY, **options: Any) -> Case:
    """Return the case of an elementwise operator: formula(*Reals) -> Real."""
    fixed = grid(n) if values is ANY else grid(n, SPECIAL) if values is FINITE else None

    def oracle(*operands: Any, **options: Any) -> Any:
        arrays = np.broadcast_arrays(*[reals(x) for x in operands])
        out = np.empty(arrays[0].shape, dtype=object)
        for i in np.ndindex(out.shape):
            out[i] = formula(*[a[i] for a in arrays], **options)
        return out

    return Case(broadcast(n, values), oracle, fixed, options)


def along(formula: Callable[..., Any], n: int = 1, values: Any = FINITE, *rest: Any) -> Case:
    """Return the case of an operator along an axis: formula(*rows of Real) -> row of the same length."""

    @st.composite
    def draw(draw: Any) -> Any:
        shape = draw(st.sampled_from([(1,), (4,), (2, 5), (3, 2, 2), (3, 0)]))
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        kinds = values if isinstance(values, list) else [values] * n
        return (*[draw(tensors(shape, kind)) for kind in kinds], dim, *rest)

    def oracle(*arguments: Any) -> Any:
        operands, dim = [reals(x) for x in arguments[:n]], arguments[n]
        rows = [np.moveaxis(x, dim, -1) for x in operands]
        out = np.empty(rows[0].shape, dtype=object)
        for i in np.ndindex(out.shape[:-1]):
            if out.shape[-1]:
                out[i] = formula(*[row[i] for row in rows])
        return np.moveaxis(out, -1, dim)

    return Case(draw(), oracle)


def drawn(*strategies: Any, oracle: Any, **options: Any) -> Case:
    """Return a case whose positional arguments are strategies or fixed values."""
    return Case(
        st.tuples(*[s if isinstance(s, st.SearchStrategy) else st.just(s) for s in strategies]),
        oracle,
        None,
        options,
    )


def shaped(*shapes: Any, values: Any = FINITE) -> Any:
    """Return a strategy for tensors of shapes such as "mk", "kn", where equal letters are equal sizes."""

    @st.composite
    def draw(draw: Any) -> Any:
        sizes = {c: draw(st.integers(0, 4)) for c in sorted(set("".join(shapes)))}
        return tuple(draw(tensors(tuple(sizes[c] for c in shape), values)) for shape in shapes)

    return draw()


# ---- sums and products ---------------------------------------------------------------------------


def reduced(function: Callable[[Any], Any], values: Any = ANY, scalar: bool = True) -> Case:
    """Return the case of an operator (x, dim, keepdim): function(array of Real) -> Real."""

    @st.composite
    def draw(draw: Any) -> Any:
        shape = draw(st.sampled_from([(), (5,), (2, 3), (0,), (3, 0), (0, 2), (2, 2, 2), (1, 7)]))
        x = draw(tensors(shape, values))
        axes = list(range(len(shape)))
        if not axes or draw(st.booleans()):
            return (x, None, draw(st.booleans()))
        dims = draw(st.lists(st.sampled_from(axes), min_size=1, unique=True))
        return (x, [d - len(shape) * draw(st.integers(0, 1)) for d in dims], draw(st.booleans()))

    def oracle(x: Any, dim: Any, keepdim: bool) -> Any:
        a = reals(x)
        dims = sorted(d % a.ndim for d in dim) if dim else list(range(a.ndim))
        kept = [d for d in range(a.ndim) if d not in dims]
        rows = np.transpose(a, kept + dims)
        out = np.empty([a.shape[d] for d in kept], dtype=object)
        for i in np.ndindex(out.shape):
            out[i] = function(np.ravel(np.asarray(rows[i], dtype=object)))
        return np.expand_dims(out, dims) if keepdim else out

    return Case(draw(), oracle)


def mean(row: Any) -> Any:
    return total(row) / len(row)


def variance(row: Any, correction: int = 1) -> Any:
    if len(row) <= correction:
        return Real(o.NAN)
    m = mean(row)
    return total([(x - m) * (x - m) for x in row]) / (len(row) - correction)


def norm(row: Any) -> Any:
    return o.sqrt(total([x * x for x in row]))


def product(a: Any, b: Any, bias: Any = None, alpha: float = 1, beta: float = 1) -> Any:
    """Return alpha a b + beta bias for arrays of Real [..., m, k], [..., k, n]."""
    out = np.empty((*a.shape[:-1], b.shape[-1]), dtype=object)
    bias = None if bias is None else np.broadcast_to(bias, out.shape)
    for i in np.ndindex(out.shape):
        *batch, m, n = i
        c = dot(a[(*batch, m)], b[(*batch, slice(None), n)])
        c = c if alpha == 1 else float32_scalar(alpha) * c
        c = c if bias is None or beta == 0 else c + float32_scalar(beta) * bias[i]
        out[i] = c if c.v != 0 else Real(0)
    return out


def product_of(a: Any, b: Any) -> Any:
    return product(reals(a), reals(b))


def product_with_bias(bias: Any, a: Any, b: Any, alpha: float = 1, beta: float = 1) -> Any:
    return product(reals(a), reals(b), reals(bias), alpha, beta)


@st.composite
def independent_columns(draw: Any) -> Any:
    shape = draw(st.sampled_from([(3, 2), (2, 3), (3, 3), (1, 1)]))
    small = draw(tensors(shape, st.floats(-1, 1, width=32)))
    return (small + 8 * torch.eye(*shape),)


def qr(x: Any) -> Any:
    """Orthogonalize each column twice (Gram-Schmidt), each product and quotient rounded."""
    a = reals(x)
    columns: Any = []
    for v in list(a.T)[: min(a.shape)]:
        for _ in range(2 if columns else 0):
            along = [rounded(dot(q, v)) for q in columns]
            v = rounded(v - np.array([dot(row, along) for row in zip(*columns)], dtype=object))
        columns.append(rounded(v / rounded(norm(v))))
    r = [
        [dot(q, c) if i <= j else Real(0) for j, c in enumerate(a.T)] for i, q in enumerate(columns)
    ]
    return np.array(columns, dtype=object).T, np.array(r, dtype=object)


def cumulated(row: Any) -> Any:
    return [total(row[: i + 1]) for i in range(len(row))]


# ---- activations ---------------------------------------------------------------------------------


def phi(x: Any) -> Any:
    return o.erfc(-x / o.sqrt(2)) * HALF


def density(x: Any) -> Any:
    return o.exp(-(x * x) * HALF) / o.sqrt(2 * real(o.mp.pi * 1))


def elu(x: Any, alpha: float = 1, scale: float = 1, inner: float = 1) -> Any:
    a, s, i = float32_scalar(alpha), float32_scalar(scale), float32_scalar(inner)
    return x * s if x > 0 or x.v != x.v else s * a * o.expm1(i * x)


def elu_backward(g: Any, x: Any, a: float, s: float, i: float, is_result: bool) -> Any:
    if x > 0:
        return g * float32_scalar(s)
    a_, s_, i_ = float32_scalar(a), float32_scalar(s), float32_scalar(i)
    return g * i_ * (x + s_ * a_) if is_result else g * i_ * s_ * a_ * o.exp(i_ * x)


def tanh_softplus(x: Any) -> Any:
    return o.tanh(o.softplus(x))


def array(values: Any) -> Any:
    return np.array(list(values), dtype=object)


def extreme(sign: int) -> Callable[[Any], Real]:
    """Return a function for the largest (sign 1) or smallest number of a row; NaN counts, a zero is +0."""

    def function(row: Any) -> Any:
        if any(x.v != x.v for x in row):
            return Real(o.NAN)
        best = max(row, key=lambda x: sign * x.mpf)
        return best if best.v != 0 else Real(0)

    return function


def larger(x: Any, y: Any) -> Any:
    """Return the IEEE 754-2019 maximum: NaN if x or y is NaN, and +0 > -0."""
    if x.v != x.v or y.v != y.v:
        return Real(o.NAN)
    if x.v == y.v:
        return y if x.minus else x
    return x if x > y else y


def smaller(x: Any, y: Any) -> Any:
    return -larger(-x, -y)


def clip(x: Any, low: int, high: int) -> Any:
    return real(low) if x < low else real(high) if x > high else x


# ---- softmax and losses --------------------------------------------------------------------------


def largest(row: Any) -> Any:
    return max(row, key=lambda x: x.mpf)


def log_softmax(row: Any) -> Any:
    top = max(range(len(row)), key=lambda i: row[i].mpf)
    rest = o.log1p(total([o.exp(x - row[top]) for i, x in enumerate(row) if i != top]))
    return [x - row[top] - rest for x in row]


def softmax(row: Any) -> Any:
    e = [o.exp(x - largest(row)) for x in row]
    return [x / total(e) for x in e]


def losses(formula: Callable[..., Any], n: int, values: Any = FINITE, *extra: Any) -> Case:
    """Return the case of a loss (operands, *extra), where 'r' stands for the reduction."""

    @st.composite
    def draw(draw: Any) -> Any:
        shape = draw(st.sampled_from([(), (4,), (2, 3)]))
        kinds = values if isinstance(values, list) else [values] * n
        reduction = draw(st.integers(0, 2))
        xs = [draw(tensors(shape, kind)) for kind in kinds]
        return (*xs, *[reduction if e == "r" else e for e in extra or ("r",)])

    def oracle(*arguments: Any) -> Any:
        a = [reals(x) for x in arguments[:n]]
        kept = [e for e, name in zip(arguments[n:], extra or ("r",)) if name not in ("r", None)]
        reduction = next(e for e, name in zip(arguments[n:], extra or ("r",)) if name == "r")
        each = [formula(*xs, *kept) for xs in zip(*[x.ravel() for x in a])]
        if reduction == 0:
            return np.array(each, dtype=object).reshape(a[0].shape)
        return total(each) / (len(each) if reduction == 1 else 1)

    return Case(draw(), oracle)


def slopes(formula: Callable[..., Any], n: int, values: Any = FINITE, *extra: Any) -> Case:
    """Return the case of a loss's gradient (g, operands, *extra), where 'r' stands for the reduction."""

    @st.composite
    def draw(draw: Any) -> Any:
        shape = draw(st.sampled_from([(), (4,), (2, 3)]))
        kinds = values if isinstance(values, list) else [values] * n
        reduction = draw(st.integers(0, 2))
        g = draw(tensors(() if reduction else shape, MODERATE))
        xs = [draw(tensors(shape, kind)) for kind in kinds]
        return (g, *xs, *[reduction if e == "r" else e for e in extra or ("r",)])

    def oracle(g: Any, *arguments: Any) -> Any:
        a = [reals(x) for x in arguments[:n]]
        kept = [e for e, name in zip(arguments[n:], extra or ("r",)) if name not in ("r", None)]
        reduction = next(e for e, name in zip(arguments[n:], extra or ("r",)) if name == "r")
        gs = np.broadcast_to(reals(g), a[0].shape).ravel()
        rows = zip(gs, *[x.ravel() for x in a])
        count = a[0].size if reduction == 1 else 1
        each = [g * formula(*xs, *kept) / count for g, *xs in rows]
        return np.array(each, dtype=object).reshape(a[0].shape)

    return Case(draw(), oracle)


def smooth_l1(x: Any, y: Any, beta: float) -> Any:
    d = abs(x - y)
    return d * d / (2 * real(beta)) if d < beta else d - real(beta) * HALF


def smooth_l1_slope(x: Any, y: Any, beta: float) -> Any:
    d = x - y
    return d / real(beta) if abs(d) < beta else real((d.v > 0) - (d.v < 0))


def huber(x: Any, y: Any, delta: float) -> Any:
    d = abs(x - y)
    return d * d * HALF if d <= delta else real(delta) * (d - real(delta) * HALF)


def huber_slope(x: Any, y: Any, delta: float) -> Any:
    d = x - y
    return d if abs(d) <= delta else real(delta) * real((d.v > 0) - (d.v < 0))


def bce(x: Any, y: Any) -> Any:
    low = lambda z: real(-100) if z < -100 else z  # noqa: E731
    return -(y * low(o.log(x)) + (1 - y) * low(o.log1p(-x)))


def bce_slope(x: Any, y: Any) -> Any:
    v = x * (1 - x)
    return (x - y) / (v if v.v >= Fraction(1, 10**12) else real(Fraction(1, 10**12)))


@st.composite
def nll_arguments(draw: Any, spatial: bool) -> Any:
    """Draw x, target, weight, reduction, ignore_index."""
    n, c = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    shape = (n, c, 2, 1) if spatial else draw(st.sampled_from([(n, c), (c,)]))
    x = draw(tensors(shape, FINITE))
    places = (n, 2, 1) if spatial else shape[:-1]
    count = int(np.prod(places))
    labels = draw(st.lists(st.integers(-1, c - 1), min_size=count, max_size=count))
    weight = draw(st.sampled_from([None, draw(tensors((c,), MODERATE))]))
    target = torch.tensor(labels, dtype=torch.int64).reshape(places)
    return (x, target, weight, draw(st.integers(0, 2)), -1)


def _nll_terms(x: Any, target: Any, weight: Any) -> Any:
    """Return (index, class, x, weight) of each target that counts, and the number of targets."""
    a = reals(x)
    a = np.moveaxis(a, 1, -1) if a.ndim > 1 else a
    rows, labels = a.reshape(-1, a.shape[-1]), target.reshape(-1).tolist()
    w = [Real(1)] * a.shape[-1] if weight is None else list(reals(weight))
    return [(i, t, rows[i][t], w[t]) for i, t in enumerate(labels) if t != -1], len(labels)


def nll(x: Any, target: Any, weight: Any, reduction: int, ignore: int) -> Any:
    terms, n = _nll_terms(x, target, weight)
    weights = total([w for *_, w in terms])
    if reduction == 0:
        out = np.array([Real(0)] * n, dtype=object)
        for i, _, value, w in terms:
            out[i] = -(value * w)
        return out.reshape(target.shape), Real(0)
    loss = -total([value * w for _, _, value, w in terms])
    return loss / weights if reduction == 1 else loss, weights


@st.composite
def nll_backward_arguments(draw: Any, spatial: bool) -> Any:
    x, target, weight, reduction, ignore = draw(nll_arguments(spatial))
    g = draw(tensors(target.shape if reduction == 0 else (), MODERATE))
    weights = total([w for *_, w in _nll_terms(x, target, weight)[0]])
    total_weight = torch.tensor(o.float_of(weights))
    return (g, x, target, weight, reduction, ignore, total_weight)


def nll_backward(
    g: Any, x: Any, target: Any, weight: Any, reduction: int, ignore: int, total_weight: Any
) -> Any:
    shape = x.movedim(1, -1).shape if x.dim() > 1 else x.shape
    out = np.full((math.prod(shape[:-1]), shape[-1]), Real(0), dtype=object)
    gs = np.broadcast_to(reals(g), target.shape).ravel()
    for i, t, _, w in _nll_terms(x, target, weight)[0]:
        out[i, t] = -(gs[i] * w)
        if reduction == 1:
            out[i, t] = -(gs[i] * w / reals(total_weight)[()])
    out = out.reshape(shape)
    return np.moveaxis(out, -1, 1) if x.dim() > 1 else out


# ---- indexing ------------------------------------------------------------------------------------


@st.composite
def scattered(draw: Any) -> Any:
    x = draw(tensors((3, 2), FINITE))
    n = draw(st.integers(0, 5))
    rows = draw(st.lists(st.integers(0, 2), min_size=2 * n, max_size=2 * n))
    index = torch.tensor(rows, dtype=torch.int64).reshape(n, 2)
    return (x, 0, index, draw(tensors((n, 2), FINITE)))


def scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    a, s = reals(x), reals(source)
    parts: Any = {i: [a[i]] for i in np.ndindex(a.shape)}
    for i in np.ndindex(tuple(index.shape)):
        parts[(int(index[i]), i[1])].append(s[i])
    out = np.empty(a.shape, dtype=object)
    for i in np.ndindex(a.shape):
        out[i] = total(parts[i])
    return out


@st.composite
def indexed(draw: Any, put: bool) -> Any:
    x = draw(tensors((3, 2), FINITE))
    n = draw(st.integers(0, 5))
    rows = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    index, values = torch.tensor(rows, dtype=torch.int64), draw(tensors((n, 2), FINITE))
    return (x, [index], values, True) if put else (x, 0, index, values)


def index_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    return scatter_add(x, 0, index.unsqueeze(1).expand(-1, 2), source)


def index_put(x: Any, indices: Any, values: Any, accumulate: bool) -> Any:
    return index_add(x, 0, indices[0], values)


def put(x: Any, index: Any, source: Any, accumulate: bool) -> Any:
    a, i, s = (t.reshape(-1, 1) for t in (x, index, source))
    return scatter_add(a, 0, i, s).reshape(x.shape)


def sum_of_copies(g: Any, shape: Any, copy: Callable[[Any], Any]) -> Any:
    """Return the gradient of `copy`: for each element the sum of the gradients of its copies."""
    n = math.prod(shape)
    copied = copy(torch.arange(n, dtype=torch.float64).reshape(shape)).long()
    return put(torch.zeros(shape), copied, g, True)


def padded_backward(mode: str, outer: Any, inner: Any, padding: Any) -> Case:
    pad = torch.nn.functional.pad
    return drawn(tensors(outer, FINITE), torch.zeros(inner), padding, oracle=lambda g, x, p: sum_of_copies(
        g, x.shape, lambda t: pad(t, p, mode)))  # fmt: skip


def integer_power(x: Any, p: int) -> Any:
    y = reals(x)
    for _ in range(abs(p) - 1):
        y = y * reals(x)
    return y if p > 0 else 1 / y


@st.composite
def looked_up(draw: Any) -> Any:
    n = draw(st.integers(0, 5))
    rows = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    return (draw(tensors((n, 2), FINITE)), torch.tensor(rows, dtype=torch.int64), 3, 1, False)


def embedding_backward(g: Any, index: Any, rows: int, padding: int, by_freq: bool) -> Any:
    out = index_add(torch.zeros(rows, 2), 0, index, g)
    out[padding] = [Real(0), Real(0)]
    return out


@st.composite
def pooled(draw: Any, adaptive: bool) -> Any:
    x = draw(tensors((1, 2, 4, 4), MODERATE))
    if adaptive:
        out, index = aten.adaptive_max_pool2d(x, [3, 3])
        return (draw(tensors(tuple(out.shape), FINITE)), x, index)
    out, index = aten.max_pool2d_with_indices(x, [3, 3], [1, 1])
    g = draw(tensors(tuple(out.shape), FINITE))
    return (g, x, [3, 3], [1, 1], [0, 0], [1, 1], False, index)


def max_pool_backward(g: Any, x: Any, *rest: Any) -> Any:
    index, gs = rest[-1], reals(g)
    parts: Any = {i: [] for i in np.ndindex(tuple(x.shape))}
    for i in np.ndindex(gs.shape):
        row, column = divmod(int(index[i]), x.shape[3])
        parts[(i[0], i[1], row, column)].append(gs[i])
    out = np.empty(x.shape, dtype=object)
    for i in parts:
        out[i] = total(parts[i])
    return out


# ---- convolution and pooling ---------------------------------------------------------------------


@st.composite
def convolved(draw: Any, backward: bool = False, nd: int = 2) -> Any:
    groups, transposed = draw(st.sampled_from([1, 2])), draw(st.booleans())
    c, out = 2, 2 * draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 2)) for _ in range(nd)]
    stride = [draw(st.integers(1, 2)) for _ in range(nd)]
    padding = [draw(st.integers(0, 1)) for _ in range(nd)]
    dilation = [draw(st.integers(1, 2)) for _ in range(nd)]
    size = [draw(st.integers(3, 4 if nd < 3 else 3)) for _ in range(nd)]
    output_padding = [s - 1 if transposed else 0 for s in stride]
    if transposed and any(p >= max(s, d) for p, s, d in zip(output_padding, stride, dilation)):
        output_padding = [0] * nd
    x = draw(tensors((draw(st.integers(1, 2)), c, *size), MODERATE))
    shape = (c, out // groups, *kernel) if transposed else (out, c // groups, *kernel)
    w = draw(tensors(shape, MODERATE))
    rest = (stride, padding, dilation, transposed, output_padding, groups)
    if not backward:
        bias = draw(st.sampled_from([None, draw(tensors((out,), MODERATE))]))
        return (x, w, bias, *rest)
    y = aten.convolution(x, w, None, *rest)
    g = draw(tensors(tuple(y.shape), MODERATE))
    return (g, x, w, [out], *rest, [True, True, True])


def conv_terms(x_shape: Any, w_shape: Any, y_shape: Any, rest: Any) -> Any:
    """Yield (index in y, index in x, index in w) of every product of the convolution."""
    stride, padding, dilation, transposed, _, groups = rest
    small, big = (x_shape, y_shape) if transposed else (y_shape, x_shape)
    o_per, c_per = w_shape[0] // groups, w_shape[1]
    for n in range(x_shape[0]):
        for k in np.ndindex(*w_shape):
            ko, kc = k[0], k[1] + (k[0] // o_per) * c_per  # channel of small, channel of big
            for place in np.ndindex(*small[2:]):
                at = [
                    p * s - q + t * d
                    for p, s, q, t, d in zip(place, stride, padding, k[2:], dilation)
                ]
                if all(0 <= a < b for a, b in zip(at, big[2:])):
                    i, j = (n, ko, *place), (n, kc, *at)
                    yield (j, i, k) if transposed else (i, j, k)


def summed(shape: Any, parts: Any) -> Any:
    out = np.empty(shape, dtype=object)
    for i in np.ndindex(*shape):
        out[i] = total(parts.get(i, []))
    return out


def convolution(x: Any, w: Any, bias: Any, *rest: Any) -> Any:
    shape = tuple(aten.convolution(x, w, None, *rest).shape)
    a, b = reals(x), reals(w)
    parts: Any = {}
    for i, j, k in conv_terms(x.shape, w.shape, shape, rest):
        parts.setdefault(i, []).append(a[j] * b[k])
    for i in np.ndindex(*shape) if bias is not None else ():
        parts.setdefault(i, []).append(reals(bias)[i[1]])
    return summed(shape, parts)


def convolution_backward(g: Any, x: Any, w: Any, sizes: Any, *rest: Any) -> Any:
    gs, a, b = reals(g), reals(x), reals(w)
    of_x: Any = {}
    of_w: Any = {}
    of_b: Any = {}
    for i, j, k in conv_terms(x.shape, w.shape, g.shape, rest[:-1]):
        of_x.setdefault(j, []).append(gs[i] * b[k])
        of_w.setdefault(k, []).append(gs[i] * a[j])
    for i in np.ndindex(*g.shape):
        of_b.setdefault((i[1],), []).append(gs[i])
    return summed(x.shape, of_x), summed(w.shape, of_w), summed((g.shape[1],), of_b)


def pool_windows(size: Any, kernel: Any, stride: Any, padding: Any) -> Any:
    """Yield (index in the output, elements) of each window."""
    places = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding)]
    for place in np.ndindex(*places):
        starts = [i * s - p for i, s, p in zip(place, stride, padding)]
        yield (
            place,
            [
                tuple(a + b for a, b in zip(starts, t))
                for t in np.ndindex(*kernel)
                if all(0 <= a + b < n for a, b, n in zip(starts, t, size))
            ],
        )


POOL = ([3, 2], [2, 1], [1, 1], False, True)


def avg_pool(x: Any, kernel: Any, stride: Any, padding: Any, *_: Any) -> Any:
    a = reals(x)
    windows = list(pool_windows(x.shape[2:], kernel, stride, padding))
    out = np.empty((*x.shape[:2], *[m + 1 for m in windows[-1][0]]), dtype=object)
    for n, c in np.ndindex(*x.shape[:2]):
        for place, inside in windows:
            out[(n, c, *place)] = total([a[(n, c, *i)] for i in inside]) / int(np.prod(kernel))
    return out


def avg_pool_backward(g: Any, x: Any, kernel: Any, stride: Any, padding: Any, *_: Any) -> Any:
    gs = reals(g)
    parts: Any = {}
    for n, c in np.ndindex(*x.shape[:2]):
        for place, inside in pool_windows(x.shape[2:], kernel, stride, padding):
            for i in inside:
                parts.setdefault((n, c, *i), []).append(gs[(n, c, *place)])
    out = summed(x.shape, parts)
    return out / int(np.prod(kernel))


def adaptive_windows(size: Any, out: Any) -> Any:
    for place in np.ndindex(*out):
        spans = [range(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, size, out)]
        yield place, [(a, b) for a in spans[0] for b in spans[1]]


def adaptive_pool(x: Any, size: Any) -> Any:
    a, out = reals(x), np.empty((*x.shape[:2], *size), dtype=object)
    for n, c in np.ndindex(*x.shape[:2]):
        for place, inside in adaptive_windows(x.shape[2:], size):
            out[(n, c, *place)] = total([a[(n, c, *i)] for i in inside]) / len(inside)
    return out


def adaptive_pool_backward(g: Any, x: Any) -> Any:
    gs = reals(g)
    parts: Any = {}
    for n, c in np.ndindex(*x.shape[:2]):
        for place, inside in adaptive_windows(x.shape[2:], g.shape[2:]):
            for i in inside:
                parts.setdefault((n, c, *i), []).append(gs[(n, c, *place)] / len(inside))
    return summed(x.shape, parts)


# ---- normalization -------------------------------------------------------------------------------

EPS = 1e-5


def statistics(row: Any) -> Any:
    """Return the mean and 1 / sqrt(variance + eps), each rounded."""
    return rounded(mean(row)), rounded(1 / o.sqrt(variance(row, 0) + real(EPS)))


def affine(weight: Any, bias: Any, count: int) -> Any:
    w = [Real(1)] * count if weight is None else reals(weight).ravel()
    return w, [Real(0)] * count if bias is None else reals(bias).ravel()


class Groups(NamedTuple):
    """Describes how a normalization divides its input: the group and the weight of each element."""

    shape: tuple[int, ...]
    group: Callable[[tuple[int, ...]], int]
    weight: Callable[[tuple[int, ...]], int]

    def rows(self) -> Any:
        out: Any = {}
        for i in np.ndindex(*self.shape):
            out.setdefault(self.group(i), []).append(i)
        return [out[k] for k in sorted(out)]


def normalized(groups: Groups, x: Any, weight: Any, bias: Any, stats: Any = None) -> Any:
    a, out = reals(x), np.empty(x.shape, dtype=object)
    w, b = affine(weight, bias, 1 + max(groups.weight(i) for i in np.ndindex(*groups.shape)))
    stats = stats or [statistics([a[i] for i in row]) for row in groups.rows()]
    for i in np.ndindex(*groups.shape):
        m, r = stats[groups.group(i)]
        out[i] = (a[i] - m) * r * w[groups.weight(i)] + b[groups.weight(i)]
    return out, stats


def normalized_backward(
    groups: Groups, g: Any, x: Any, stats: Any, weight: Any, fixed: bool = False
) -> Any:
    gs, a = reals(g), reals(x)
    count = 1 + max(groups.weight(i) for i in np.ndindex(*groups.shape))
    w, _ = affine(weight, None, count)
    grad_x = np.empty(x.shape, dtype=object)
    of_w: Any = [[] for _ in range(count)]
    of_b: Any = [[] for _ in range(count)]
    for row, (m, r) in zip(groups.rows(), stats):
        wg = [w[groups.weight(i)] * gs[i] for i in row]
        p = rounded(total(wg))
        q = rounded(total([v * (a[i] - m) * r for v, i in zip(wg, row)]))
        for v, i in zip(wg, row):
            grad_x[i] = v * r if fixed else r * (v - (p + (a[i] - m) * r * q) / len(row))
            of_w[groups.weight(i)].append(gs[i] * (a[i] - m) * r)
            of_b[groups.weight(i)].append(gs[i])
    shape = (count,)
    return (
        grad_x,
        np.array([total(t) for t in of_w], dtype=object).reshape(shape),
        np.array([total(t) for t in of_b], dtype=object).reshape(shape),
    )


def by_channel(shape: Any) -> Groups:
    return Groups(tuple(shape), lambda i: i[1], lambda i: i[1])


def by_row(shape: Any) -> Groups:
    return Groups(tuple(shape), lambda i: i[0], lambda i: i[1])


def by_group(shape: Any, groups: int) -> Groups:
    per = shape[1] // groups
    return Groups(tuple(shape), lambda i: i[0] * groups + i[1] // per, lambda i: i[1])


def stat_arrays(stats: Any, shape: Any) -> Any:
    return [np.array([s[j] for s in stats], dtype=object).reshape(shape) for j in (0, 1)]


NORM_VALUES = st.one_of(st.floats(-30, 30, width=32), st.integers(-3, 3).map(float), FINITE)


@st.composite
def normed(draw: Any, shape: Any, count: int, *rest: Any) -> Any:
    x = draw(tensors(shape, NORM_VALUES))
    w = draw(st.sampled_from([None, draw(tensors((count,), MODERATE))]))
    b = draw(st.sampled_from([None, draw(tensors((count,), MODERATE))]))
    return (x, w, b, *rest)


@st.composite
def batch_normed(draw: Any, kind: str) -> Any:
    x, w, b = draw(normed((3, 2, 2), 2))
    mean, var = draw(tensors((2,), MODERATE)), draw(tensors((2,), MODERATE.map(abs)))
    if kind == "inference":
        return (x, w, b, mean, var, 0.1, EPS)
    return (x, w, b, mean, var, kind == "legit" or draw(st.booleans()), 0.1, EPS)


def batch_norm(x: Any, w: Any, b: Any, mean_: Any, var_: Any, *rest: Any) -> Any:
    training = rest[0] if len(rest) == 3 else False
    groups = by_channel(x.shape)
    if training:
        out, stats = normalized(groups, x, w, b)
        return (out, *stat_arrays(stats, (2,)))
    fixed = list(zip(reals(mean_), [rounded(1 / o.sqrt(v + real(EPS))) for v in reals(var_)]))
    empty = np.empty(0, dtype=object)
    return normalized(groups, x, w, b, fixed)[0], empty, empty


@st.composite
def normed_backward(draw: Any, shape: Any, groups: Groups, stats_shape: Any, weights: int) -> Any:
    """Draw g, x, mean, rstd, weight."""
    g, x = draw(tensors(shape, MODERATE)), draw(tensors(shape, st.floats(-30, 30, width=32)))
    a = reals(x)
    stats = [statistics([a[i] for i in row]) for row in groups.rows()]
    m, r = (
        torch.tensor([o.float_of(s[j]) for s in stats], dtype=torch.float32).reshape(stats_shape)
        for j in (0, 1)
    )
    return g, x, m, r, draw(st.sampled_from([None, draw(tensors((weights,), MODERATE))]))


def stats_of(mean_: Any, rstd: Any) -> Any:
    return list(zip(reals(mean_).ravel(), reals(rstd).ravel()))


def arranged(strategy: Any, arrange: Callable[..., Any]) -> Any:
    return strategy.map(lambda t: arrange(*t))


# ---- the cases -----------------------------------------------------------------------------------

BATCH, ROWS, GROUPS = by_channel((3, 2, 2)), by_row((3, 4)), by_group((2, 4, 2), 2)
PAIRS = st.one_of(
    broadcast(2, ANY), st.tuples(tensors((4,)), st.sampled_from([2, 0.1, -0.0, 1e-46, 3]))
)

CASES: dict[str, list[Case]] = {
    "add": [each(lambda x, y: x + y, 2),
            each(lambda x, y, alpha: x + float32_scalar(alpha) * y, 2, alpha=0.3)],
    "sub": [each(lambda x, y: x - y, 2),
            each(lambda x, y, alpha: x + float32_scalar(-alpha) * y, 2, alpha=3)],
    "rsub": [each(lambda x, y: y - x, 2),
             each(lambda x, y, alpha: y + float32_scalar(-alpha) * x, 2, alpha=0.1)],
    "mul": [each(lambda x, y: x * y, 2)],
    "div": [each(lambda x, y: x / y, 2)],
    "reciprocal": [each(lambda x: 1 / x)],
    "sqrt": [each(o.sqrt)],
    "addcmul": [each(lambda x, a, b, value: x + float32_scalar(value) * a * b, 3, FINITE, value=0.7)],
    "addcdiv": [each(lambda x, a, b, value: x + float32_scalar(value) * a / b, 3, FINITE, value=-0.7)],
    "lerp": [each(lambda x, y, w: x + w * (y - x), 3, FINITE)],
    "rsqrt": [each(lambda x: 1 / o.sqrt(x))],
    "sum": [reduced(total)],
    "mean": [reduced(mean)],
    "max": [drawn(tensors((5,)), oracle=lambda x: extreme(1)(reals(x))),
            Case(broadcast(2), lambda x, y: each(larger, 2).oracle(x, y))],
    "min": [drawn(tensors((5,)), oracle=lambda x: extreme(-1)(reals(x))),
            Case(broadcast(2), lambda x, y: each(smaller, 2).oracle(x, y))],
    "amax": [drawn(tensors((2, 3)), [1], oracle=lambda x, d: array(map(extreme(1), reals(x))))],
    "amin": [drawn(tensors((2, 3)), [1], oracle=lambda x, d: array(map(extreme(-1), reals(x))))],
    "maximum": [each(larger, 2)],
    "minimum": [each(smaller, 2)],
    "clamp": [each(lambda x, low, high: smaller(larger(x, low), high), 3)],
    "clamp_min": [each(larger, 2)],
    "clamp_max": [each(smaller, 2)],
    "erfinv": [each(o.erfinv)],
    "var": [Case(st.tuples(tensors((2, 5), MODERATE), st.just([1])),
                 lambda x, dim: np.array([variance(r) for r in reals(x)], dtype=object))],
    "std": [Case(st.tuples(tensors((2, 5), MODERATE), st.just([1])),
                 lambda x, dim: np.array([o.sqrt(variance(r)) for r in reals(x)], dtype=object))],
    "trace": [drawn(tensors((3, 4)), oracle=lambda x: total(np.diagonal(reals(x))))],
    "cumsum": [along(cumulated, 1, ANY)],
    "linalg_vector_norm": [drawn(tensors((5,), FINITE), oracle=lambda x: norm(reals(x))),
                           drawn(tensors((5,), FINITE), 1, oracle=lambda x, p: total(abs(reals(x))))],
    "norm": [drawn(tensors((5,), FINITE), oracle=lambda x: norm(reals(x)))],
    "mm": [Case(shaped("mk", "kn"), product_of), Case(shaped("mk", "kn", values=ANY), product_of)],
    "bmm": [Case(shaped("bmk", "bkn"), product_of)],
    "mv": [Case(shaped("mk", "k"), lambda a, b: product(reals(a), reals(b)[:, None])[:, 0])],
    "dot": [Case(shaped("k", "k"), lambda a, b: dot(reals(a), reals(b)))],
    "addmm": [Case(shaped("n", "mk", "kn"), product_with_bias),
              Case(shaped("mn", "mk", "kn"), product_with_bias, None, {"alpha": 0.3, "beta": -1.7}),
              Case(shaped("n", "mk", "kn", values=ANY), product_with_bias, None, {"beta": 0})],
    "baddbmm": [Case(shaped("bmn", "bmk", "bkn"), product_with_bias)],
    "addmv": [Case(shaped("m", "mk", "k"),
                   lambda c, a, b: product(reals(a), reals(b)[:, None], reals(c)[:, None])[:, 0])],
    "linalg_qr": [Case(independent_columns(), qr)],
    "scatter_add": [Case(scattered(), scatter_add)],
    "index_add": [Case(indexed(False), index_add)],
    "index_put": [Case(indexed(True), index_put)],
    "index_put_": [Case(indexed(True), index_put)],
    "_index_put_impl_": [Case(indexed(True), index_put)],
    "put": [Case(indexed(True).map(lambda t: (t[0], t[1][0], t[2][:, 0].contiguous(), True)), put)],
    "unfold_backward": [
        drawn(tensors((3, 2, 2), FINITE), [4, 2], 0, 2, 1, oracle=lambda g, shape, *window: sum_of_copies(
            g, shape, lambda x: x.unfold(*window)))],
    "reflection_pad1d_backward": [padded_backward("reflect", (2, 6), (2, 4), [0, 2])],
    "reflection_pad2d_backward": [padded_backward("reflect", (1, 5, 6), (1, 3, 4), [1, 1, 2, 0])],
    "replication_pad1d_backward": [padded_backward("replicate", (2, 6), (2, 3), [2, 1])],
    "replication_pad2d_backward": [padded_backward("replicate", (1, 5, 6), (1, 3, 2), [3, 1, 2, 0])],
    "embedding_dense_backward": [Case(looked_up(), embedding_backward)],
    "max_pool2d_with_indices_backward": [Case(pooled(False), max_pool_backward)],
    "adaptive_max_pool2d_backward": [Case(pooled(True), max_pool_backward)],
    "convolution": [Case(convolved(), convolution), Case(convolved(nd=1), convolution),
                    Case(convolved(nd=3), convolution)],
    "convolution_backward": [Case(convolved(True), convolution_backward),
                             Case(convolved(True, 1), convolution_backward),
                             Case(convolved(True, 3), convolution_backward)],
    "avg_pool2d": [drawn(tensors((2, 1, 5, 4), FINITE), *POOL, oracle=avg_pool)],
    "avg_pool2d_backward": [drawn(tensors((1, 2, 3, 5), FINITE), torch.zeros(1, 2, 5, 4), *POOL, None,
                                  oracle=avg_pool_backward)],
    "_adaptive_avg_pool2d": [drawn(tensors((1, 2, 5, 4), FINITE), [3, 2], oracle=adaptive_pool)],
    "_adaptive_avg_pool2d_backward": [drawn(tensors((1, 2, 2, 2), FINITE), torch.zeros(1, 2, 4, 6),
                                            oracle=adaptive_pool_backward)],
    "native_batch_norm": [Case(batch_normed("any"), batch_norm)],
    "_native_batch_norm_legit": [Case(batch_normed("legit"), batch_norm)],
    "_native_batch_norm_legit_no_training": [Case(batch_normed("inference"), batch_norm)],
    "native_batch_norm_backward": [
        Case(arranged(normed_backward((3, 2, 2), BATCH, (2,), 2),
                      lambda g, x, m, r, w: (g, x, w, None, None, m, r, True, EPS, [True] * 3)),
             lambda g, x, w, rm, rv, m, r, *_: normalized_backward(BATCH, g, x, stats_of(m, r), w))],
    "native_layer_norm": [
        Case(normed((3, 4), 4).map(lambda t: (t[0], [4], *t[1:], EPS)),
             lambda x, s, w, b, e: (lambda y, stats: (y, *stat_arrays(stats, (3, 1))))(
                 *normalized(ROWS, x, w, b)))],
    "native_layer_norm_backward": [
        Case(arranged(normed_backward((3, 4), ROWS, (3, 1), 4),
                      lambda g, x, m, r, w: (g, x, [4], m, r, w, w, [True] * 3)),
             lambda g, x, s, m, r, w, *_: normalized_backward(ROWS, g, x, stats_of(m, r), w))],
    "native_group_norm": [
        Case(normed((2, 4, 2), 4, 2, 4, 2, 2, EPS),
             lambda x, w, b, *_: (lambda y, stats: (y, *stat_arrays(stats, (2, 2))))(
                 *normalized(GROUPS, x, w, b)))],
    "native_group_norm_backward": [
        Case(arranged(normed_backward((2, 4, 2), GROUPS, (2, 2), 4),
                      lambda g, x, m, r, w: (g, x, m, r, w, 2, 4, 2, 2, [True] * 3)),
             lambda g, x, m, r, w, *_: normalized_backward(GROUPS, g, x, stats_of(m, r), w))],
    "exp": [each(o.exp)],
    "expm1": [each(o.expm1)],
    "log": [each(o.log)],
    "log1p": [each(o.log1p)],
    "sin": [each(o.sin)],
    "cos": [each(o.cos)],
    "tanh": [each(o.tanh)],
    "sigmoid": [each(o.sigmoid)],
    "erf": [each(o.erf)],
    "erfc": [each(o.erfc)],
    "pow": [drawn(tensors((5,)), 2, oracle=lambda x, p: reals(x) * reals(x)),
            drawn(tensors((5,)), 3, oracle=lambda x, p: reals(x) * reals(x) * reals(x)),
            drawn(tensors((5,)), -1, oracle=lambda x, p: 1 / reals(x)),
            *[drawn(tensors((5,)), p, oracle=integer_power) for p in (65, 66, -65, -100)],
            drawn(tensors((5,), POSITIVE), 0.5, oracle=lambda x, p: each(o.sqrt).oracle(x))],
    "xlogy": [each(lambda x, y: y if y.v != y.v else Real(0) if x.v == 0 else x * o.log(y), 2, FINITE)],
    "tanh_backward": [each(lambda g, y: g * (1 - y * y), 2, FINITE)],
    "sigmoid_backward": [each(lambda g, y: g * y * (1 - y), 2, FINITE)],
    "gelu": [each(lambda x: x * phi(x), 1, FINITE)],
    "gelu_backward": [each(lambda g, x: g * (phi(x) + x * density(x)), 2, MODERATE)],
    "silu": [each(lambda x: x * o.sigmoid(x), 1, FINITE)],
    "silu_backward": [each(lambda g, x: g * (o.sigmoid(x) * (1 + x * o.sigmoid(-x))), 2, MODERATE)],
    "softplus": [each(lambda x: x if x > 20 else o.softplus(x), 1, FINITE)],
    "softplus_backward": [Case(broadcast(2, MODERATE).map(lambda t: (*t, 1, 20)),
                               lambda g, x, b, t: np.vectorize(
                                   lambda g, x: g if x > 20 else g * o.sigmoid(x), otypes=[object])(
                                       *np.broadcast_arrays(reals(g), reals(x))) if x.numel() * g.numel()
                               else np.empty(torch.broadcast_shapes(g.shape, x.shape), dtype=object))],
    "mish": [each(lambda x: x * tanh_softplus(x), 1, MODERATE)],
    "mish_backward": [each(lambda g, x: g * (tanh_softplus(x) + x * o.sigmoid(x) * (
        1 - tanh_softplus(x) * tanh_softplus(x))), 2, MODERATE)],
    "log_sigmoid_forward": [each(lambda x: -o.softplus(-x), 1, FINITE)],
    "log_sigmoid_backward": [Case(broadcast(2, MODERATE).map(lambda t: (*t, torch.empty(0))),
                                  lambda g, x, _: each(lambda g, x: g * o.sigmoid(-x), 2).oracle(g, x))],
    "leaky_relu": [each(lambda x: x if x > 0 else x * float32_scalar(0.01))],
    "leaky_relu_backward": [Case(broadcast(2).map(lambda t: (*t, 0.01, False)),
                                 lambda g, x, s, _: each(
                                     lambda g, x: g if x > 0 else g * float32_scalar(s), 2).oracle(g, x))],
    "_prelu_kernel": [each(lambda x, w: x if x > 0 else x * w, 2)],
    "_prelu_kernel_backward": [Case(st.tuples(tensors((4,)), tensors((4,)), tensors((4,))),
                                    lambda g, x, w: (
                                        each(lambda g, x, w: g if x > 0 else g * w, 3).oracle(g, x, w),
                                        each(lambda g, x: Real(0) if x > 0 else g * x, 2).oracle(g, x)))],
    "elu": [each(elu, 1, ANY), Case(st.tuples(tensors((5,)), st.just(0.7), st.just(1.1), st.just(0.3)),
                                    lambda x, *c: each(lambda x: elu(x, *c)).oracle(x))],
    "celu": [Case(st.tuples(tensors((5,)), st.just(1.0)), lambda x, a: each(elu).oracle(x))],
    "elu_backward": [Case(st.tuples(broadcast(2, MODERATE), st.booleans()).map(
                              lambda t: (t[0][0], 0.7, 1.1, 0.3, t[1], t[0][1])),
                          lambda g, a, s, i, r, x: each(
                              lambda g, x: elu_backward(g, x, a, s, i, r), 2).oracle(g, x))],
    "hardtanh_backward": [Case(broadcast(2).map(lambda t: (*t, -1, 1)),
                               lambda g, x, *_: each(
                                   lambda g, x: g if x > -1 and x < 1 else Real(0), 2).oracle(g, x))],
    "hardsigmoid": [each(lambda x: (clip(x, -3, 3) + 3) / 6)],
    "hardsigmoid_backward": [each(lambda g, x: g / 6 if x > -3 and x < 3 else Real(0), 2)],
    "hardswish": [each(lambda x: x * (clip(x, -3, 3) + 3) / 6, 1, FINITE)],
    "hardswish_backward": [
        each(lambda g, x: Real(0) if x <= -3 else g * (2 * x + 3) / 6 if x < 3 else g, 2, FINITE)],
    "_softmax": [along(softmax, 1, FINITE, False)],
    "_safe_softmax": [along(softmax, 1, FINITE)],
    "_softmax_backward_data": [
        along(lambda g, y: [b * (a - dot(g, y)) for a, b in zip(g, y)], 2, [FINITE, UNIT], torch.float32)],
    "_log_softmax": [along(log_softmax, 1, MODERATE, False), along(log_softmax, 1, FINITE, False)],
    "_log_softmax_backward_data": [
        along(lambda g, y: [a - o.exp(b) * total(g) for a, b in zip(g, y)], 2,
              [MODERATE, MODERATE.map(lambda v: -abs(v))], torch.float32)],
    "logsumexp": [Case(st.tuples(tensors((2, 4), MODERATE), st.just([1])), lambda x, d: np.array(
        [largest(r) + o.log(total([o.exp(v - largest(r)) for v in r])) for r in reals(x)], dtype=object))],
    "nll_loss_forward": [Case(nll_arguments(False), nll)],
    "nll_loss_backward": [Case(nll_backward_arguments(False), nll_backward)],
    "nll_loss2d_forward": [Case(nll_arguments(True), nll)],
    "nll_loss2d_backward": [Case(nll_backward_arguments(True), nll_backward)],
    "mse_loss": [losses(lambda x, y: (x - y) * (x - y), 2)],
    "mse_loss_backward": [slopes(lambda x, y: 2 * (x - y), 2)],
    "smooth_l1_loss": [losses(smooth_l1, 2, FINITE, "r", 0.75)],
    "smooth_l1_loss_backward": [slopes(smooth_l1_slope, 2, FINITE, "r", 0.75)],
    "huber_loss": [losses(huber, 2, FINITE, "r", 0.75)],
    "huber_loss_backward": [slopes(huber_slope, 2, FINITE, "r", 0.75)],
    "binary_cross_entropy": [losses(bce, 2, [UNIT, UNIT], None, "r")],
    "binary_cross_entropy_backward": [slopes(bce_slope, 2, [UNIT, UNIT], None, "r")],
    "binary_cross_entropy_with_logits": [
        losses(lambda x, y: (1 - y) * x + o.softplus(-x), 2, [FINITE, UNIT], None, None, "r")],
}  # fmt: skip

# Operators that are tested elsewhere: the module and a test function in it.
_UPSAMPLING, _WINDOWS = "operators.test_upsampling.", "operators.test_windows."
ELSEWHERE = {
    **{
        f"grid_sampler_{n}d{backward}": "operators.test_grid_sampling.test_sampling_is_rounded_once"
        for n in (2, 3)
        for backward in ("", "_backward")
    },
    "affine_grid_generator": "operators.test_grid_sampling.test_affine_grid_is_product_of_rounded_places",
    **dict.fromkeys(
        ["avg_pool3d", "avg_pool3d_backward"], _WINDOWS + "test_average_pooling_is_rounded_once"
    ),
    **dict.fromkeys(
        ["_adaptive_avg_pool3d", "_adaptive_avg_pool3d_backward"],
        _WINDOWS + "test_adaptive_average_pooling_is_rounded_once",
    ),
    **dict.fromkeys(
        [
            "max_pool3d_with_indices_backward",
            "adaptive_max_pool3d_backward",
            "fractional_max_pool2d_backward",
            "fractional_max_pool3d_backward",
        ],
        _WINDOWS + "test_gradient_of_max_pooling_is_sum_over_windows",
    ),
    "col2im": _WINDOWS + "test_fold_is_sum_of_overlaps",
    **dict.fromkeys(
        ["max_unpool2d", "max_unpool3d"], _WINDOWS + "test_unpooling_keeps_last_of_equal_indices"
    ),
    **dict.fromkeys(
        ["reflection_pad3d_backward", "replication_pad3d_backward"],
        _WINDOWS + "test_padding_of_volumes_has_gradient",
    ),
    **{
        name + backward: _UPSAMPLING + "test_interpolation_is_rounded_once"
        for name in (
            "upsample_linear1d",
            "upsample_bilinear2d",
            "upsample_trilinear3d",
            "upsample_bicubic2d",
            "_upsample_bilinear2d_aa",
            "_upsample_bicubic2d_aa",
        )
        for backward in ("", "_backward")
    },
    **{
        f"{name}{n}d_backward": _UPSAMPLING + "test_gradient_of_nearest_is_sum_of_copies"
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for n in (1, 2, 3)
    },
    "arange": "operators.test_random.test_arange_is_rounded_once",
    "linspace": "operators.test_random.test_linspace_is_rounded_once",
    "allclose": "test_handlers.test_evaluation_code_works",
    "signbit": "test_handlers.test_sign_of_nan",
    "randint": "operators.test_random.test_integers_match_pytorch",
    "random_": "operators.test_random.test_integers_match_pytorch",
    "randperm": "operators.test_random.test_integers_match_pytorch",
    "multinomial": "operators.test_random.test_multinomial_matches_pytorch",
    "rand": "operators.test_random.test_rand_matches_pytorch",
    "rand_like": "operators.test_random.test_rand_matches_pytorch",
    "native_dropout": "operators.test_random.test_native_dropout_matches_cpu_dropout",
    "native_dropout_backward": "operators.test_random.test_native_dropout_matches_cpu_dropout",
    "uniform_": "operators.test_random.test_uniform_is_rounded_once",
    "randn": "operators.test_random.test_normal_is_close_to_pytorch",
    "randn_like": "operators.test_random.test_normal_is_close_to_pytorch",
    "normal": "operators.test_random.test_normal_is_close_to_pytorch",
    "normal_": "operators.test_random.test_normal_is_close_to_pytorch",
    "bernoulli": "operators.test_random.test_bernoulli_matches_pytorch",
    "bernoulli_": "operators.test_random.test_bernoulli_matches_pytorch",
    "exponential_": "operators.test_random.test_exponential_is_rounded_once",
    "_fused_adam_": "operators.test_optimizers.test_fused_operators",
    "_fused_adamw_": "operators.test_optimizers.test_fused_operators",
    "_fused_sgd_": "operators.test_optimizers.test_fused_operators",
}


@pytest.fixture(params=["compiled", "reference"], autouse=True)
def path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(kernels, "library", None)
    elif kernels.library is None:
        pytest.skip("the kernels are not built")


# Operators for which the sign of an exact zero depends on how the formula is written.
ANY_ZERO = """
smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
binary_cross_entropy_backward binary_cross_entropy_with_logits
_softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
nll_loss_forward nll_loss2d_forward mse_loss native_batch_norm_backward native_layer_norm_backward
native_group_norm_backward
""".split()


def test_exact_zero_of_row_is_positive():
    g = torch.tensor([[-0.0, 1.0, -1.0]])
    with reproml.exact():
        found = torch.ops.aten._log_softmax_backward_data(g, torch.zeros(1, 3), 1, torch.float32)
        empty = torch.ops.aten._softmax_backward_data(-torch.zeros(1, 3), g, 1, torch.float32)
    assert found[0, 0] == 0 and not found[0, 0].signbit() and not empty.signbit().any()


def compare(name: str, case: Case, arguments: Sequence[Any]) -> None:
    expected = case.oracle(*arguments, **case.options)
    with reproml.exact():
        found = getattr(aten, name)(*arguments, **case.options)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    got = found if isinstance(found, tuple) else (found,)
    for x, y in zip(got, wanted):
        check(x, y, name in ANY_ZERO)


@pytest.mark.parametrize("name", [name for name in sorted(CASES) if name in operator_table.EXACT])
@TESTS
@given(data=st.data())
def test_operator_is_rounded_once(name, data):
    for case in CASES[name]:
        compare(name, case, data.draw(case.draw))


@pytest.mark.parametrize("name", [n for n in sorted(CASES) if any(c.fixed for c in CASES[n])])
def test_operator_is_rounded_once_at_special_values(name):
    for case in CASES[name]:
        if case.fixed:
            compare(name, case, case.fixed)
