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
from itertools import combinations
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic import operator_table
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
from verification import functions as f
from verification import oracle as o
from verification.oracle import Real, check, dot, float32_scalar, real, reals, rounded, total

aten = torch.ops.aten
HALF = Fraction(1, 2)
TESTS = settings(max_examples=8, suppress_health_check=list(HealthCheck))


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


def trilinear(x: Any, w: Any, y: Any, *_: Any) -> Any:
    """Return the sum of x[k, i] w[o, i, j] y[k, j] over i and j."""
    a, b, c = reals(x), reals(w), reals(y)
    out = np.empty((len(a), len(b)), dtype=object)
    for k, n in np.ndindex(out.shape):
        out[k, n] = total([a[k, i] * b[n, i, j] * c[k, j] for i, j in np.ndindex(b.shape[1:])])
    return out


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


def other_if_nan(choose: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, y: x if y.v != y.v else y if x.v != x.v else choose(x, y)


def clip(x: Any, low: Any, high: Any) -> Any:
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


def margin_terms(x: Any, target: Any, p: int, margin: float, weight: Any) -> Any:
    """Yield row, target, class, w max(0, z)^p and its derivative of each term of multi_margin_loss."""
    rows = reals(x).reshape(-1, x.shape[-1])
    for i, t in enumerate(target.reshape(-1).tolist()):
        w = Real(1) if weight is None else reals(weight)[t]
        for j in range(rows.shape[1]):
            z = float32_scalar(margin) - rows[i, t] + rows[i, j]
            if j != t and z > 0:
                yield i, t, j, w * (z if p == 1 else z * z), w * (1 if p == 1 else 2 * z)


def multilabel_terms(x: Any, target: Any) -> Any:
    """Yield row, target, class and value of each term of multilabel_margin_loss."""
    rows = reals(x).reshape(-1, x.shape[-1])
    for i, listed in enumerate(target.reshape(-1, x.shape[-1]).tolist()):
        listed = listed[: listed.index(-1)] if -1 in listed else listed
        for t in listed:
            for j in set(range(rows.shape[1])) - set(listed):
                z = Real(1) - rows[i, t] + rows[i, j]
                if z > 0:
                    yield i, t, j, z


def loss_of_terms(x: Any, terms: Any, reduction: int) -> Any:
    n, classes = x.numel() // x.shape[-1], x.shape[-1]
    parts = [total([v for i, v in terms if i == row]) / classes for row in range(n)]
    if reduction == 0:
        return np.array(parts, dtype=object).reshape(x.shape[:-1])
    return total(parts) / (n if reduction == 1 else 1)


def slope_of_terms(g: Any, x: Any, terms: Any, reduction: int) -> Any:
    n, classes = x.numel() // x.shape[-1], x.shape[-1]
    parts: Any = {}
    for i, t, j, v in terms:
        parts.setdefault((i, j), []).append(v)
        parts.setdefault((i, t), []).append(-v)
    gs = np.broadcast_to(reals(g).reshape(-1, 1), (n, classes))
    return (gs * summed((n, classes), parts) / (classes * (n if reduction == 1 else 1))).reshape(
        x.shape
    )


@st.composite
def margins(draw: Any, several: bool, backward: bool) -> Any:
    """Draw the arguments of multi_margin_loss, or of multilabel_margin_loss, or of their gradients."""
    shape = draw(st.sampled_from([(3, 4), (1, 2), (5,)]))
    x = draw(tensors(shape, st.one_of(MODERATE, FINITE)))
    n, classes = x.numel() // shape[-1], shape[-1]
    low, count = (-1, x.numel()) if several else (0, n)
    labels = draw(st.lists(st.integers(low, classes - 1), min_size=count, max_size=count))
    target = torch.tensor(labels).reshape(shape if several else shape[:-1])
    reduction = draw(st.integers(0, 2))
    g = (draw(tensors(() if reduction else shape[:-1], MODERATE)),) if backward else ()
    if several:
        marks = aten.multilabel_margin_loss_forward(x, target, 0)[1]
        return (*g, x, target, reduction, *([marks] if backward else []))
    weight = draw(st.sampled_from([None, draw(tensors((classes,), MODERATE))]))
    margin = draw(st.sampled_from([1, 0.3]))
    return (*g, x, target, draw(st.sampled_from([1, 2])), margin, weight, reduction)


def multilabel_margin(x: Any, target: Any, reduction: int) -> Any:
    terms = [(i, z) for i, t, j, z in multilabel_terms(x, target)]
    marks = reals(aten.multilabel_margin_loss_forward(x, target, 0)[1])
    return loss_of_terms(x, terms, reduction), marks


def rrelu_backward(
    g: Any, x: Any, noise: Any, low: float, high: float, training: bool, is_result: bool
) -> Any:
    slope = float32_scalar((low + high) / 2)
    formula = lambda g, x, r: g * r if training else g if x > 0 else g * slope  # noqa: E731
    return each(formula, 3).oracle(g, x, noise)


def halves(x: Any, dim: int) -> Any:
    return np.split(reals(x), 2, dim)


def zip_fractions(x: Any) -> Any:
    """Return the fractions and the exponents of frexp, by Python's math."""
    pairs = [math.frexp(v) if math.isfinite(v) else (v, 0) for v in x.reshape(-1).tolist()]
    fractions = array([Real(m) for m, _ in pairs]).reshape(x.shape)
    return fractions, torch.tensor([e for _, e in pairs], dtype=torch.int32).reshape(x.shape)


def glu_backward(g: Any, x: Any, dim: int) -> Any:
    a, b = halves(x, dim)
    s = lambda b: o.sigmoid(b) * o.sigmoid(-b)  # noqa: E731
    values = [
        (u * o.sigmoid(w), u * v * s(w)) for u, v, w in zip(reals(g).ravel(), a.ravel(), b.ravel())
    ]
    return np.concatenate([array(column).reshape(a.shape) for column in zip(*values)], dim)


# ---- indexing ------------------------------------------------------------------------------------


@st.composite
def scattered(draw: Any, values: Any = FINITE) -> Any:
    x = draw(tensors((3, 2), values))
    n = draw(st.integers(0, 5))
    rows = draw(st.lists(st.integers(0, 2), min_size=2 * n, max_size=2 * n))
    index = torch.tensor(rows, dtype=torch.int64).reshape(n, 2)
    return (x, 0, index, draw(tensors((n, 2), values)))


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


# ---- reductions at indices -----------------------------------------------------------------------


def factors(row: Any) -> Any:
    result = Real(1)
    for x in row:
        result = result * x
    return result


REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "sum": total,
    "mean": lambda row: total(row) / len(row),
    "prod": factors,
    "amax": lambda row: extreme(1)(row),
    "amin": lambda row: extreme(-1)(row),
}


def reduced_at(names: str, along_axis: bool = False) -> list[Case]:
    """Return the cases of an operator (x, dim, index, source, reduce), where dim is 0."""

    def oracle(x: Any, dim: int, index: Any, source: Any, reduce: str, include_self: bool) -> Any:
        if along_axis:
            index = index.unsqueeze(1).expand(-1, 2)
        a, s = reals(x), reals(source)
        parts: Any = {i: [a[i]] * include_self for i in np.ndindex(a.shape)}
        for i in np.ndindex(tuple(index.shape)):
            parts[(int(index[i]), i[1])].append(s[i])
        out = np.empty(a.shape, dtype=object)
        for i in np.ndindex(a.shape):
            out[i] = REDUCTIONS[reduce](parts[i]) if parts[i] else a[i]
        return out

    operands = indexed(False) if along_axis else scattered(ANY)
    draw = st.tuples(operands, st.sampled_from(names.split())).map(lambda t: (*t[0], t[1]))
    return [Case(draw, oracle, None, {"include_self": own}) for own in (True, False)]


def index_copy(x: Any, dim: int, index: Any, source: Any) -> Any:
    out, s = reals(x), reals(source)
    for i, row in enumerate(index.tolist()):
        out[row] = s[i]
    return out


LENGTHS = [2, 0, 3, 1]
SEGMENTS = [slice(0, 2), slice(2, 2), slice(2, 5), slice(5, 6)]
SEGMENT_REDUCTIONS = {"sum": "sum", "mean": "mean", "prod": "prod", "max": "amax", "min": "amin"}
EMPTY = {"sum": 0.0, "mean": math.nan, "prod": 1.0, "max": -math.inf, "min": math.inf}


def segment_reduce(x: Any, reduce: str, lengths: Any, initial: Any = None) -> Any:
    first = [] if initial is None else [float32_scalar(initial)]
    rows = [[*first, *column[s]] for s in SEGMENTS for column in reals(x).T]
    function = REDUCTIONS[SEGMENT_REDUCTIONS[reduce]]
    values = [function(row) if len(row) else Real(EMPTY[reduce]) for row in rows]
    return array(values).reshape(4, 2)


@st.composite
def segments_backward(draw: Any) -> Any:
    x, g = draw(tensors((6, 2), MODERATE)), draw(tensors((4, 2), MODERATE))
    reduce = draw(st.sampled_from([*SEGMENT_REDUCTIONS]))
    expected = segment_reduce(x, reduce, None)
    y = [[o.float_of(v) for v in row] for row in expected]
    return (g, torch.tensor(y), x, reduce)


def segment_reduce_backward(g: Any, y: Any, x: Any, reduce: str, lengths: Any) -> Any:
    a, gs, ys = reals(x), reals(g), reals(y)
    out = np.empty(a.shape, dtype=object)
    for n, s in enumerate(SEGMENTS):
        for c, i in ((c, i) for c in range(2) for i in range(6)[s]):
            row = a[s, c]
            rest = [v for j, v in enumerate(row, s.start) if j != i]
            if reduce == "sum":
                out[i, c] = gs[n, c]
            elif reduce == "mean":
                out[i, c] = gs[n, c] / len(row)
            elif reduce == "prod" and a[i, c].v:
                out[i, c] = gs[n, c] * ys[n, c] / a[i, c]
            elif reduce == "prod":
                others = Real(0) if any(v.v == 0 for v in rest) else rounded(factors(rest))
                out[i, c] = gs[n, c] * others
            else:
                chosen = a[i, c].v == ys[n, c].v
                ties = sum(v.v == ys[n, c].v for v in row)
                out[i, c] = gs[n, c] / ties if chosen else Real(0)
    return out


@st.composite
def bags(draw: Any, backward: str = "") -> Any:
    """Draw the arguments of _embedding_bag, or of one of its gradients: bags of 2, 0, 3 and 1 rows."""
    weight = draw(tensors((4, 2), FINITE))
    indices = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=6, max_size=6)))
    offsets, bag = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 0, 2, 2, 2, 3])
    mode, padding = draw(st.integers(0, 2)), draw(st.sampled_from([-1, 1]))
    samples = draw(tensors((6,), MODERATE)) if mode == 0 and draw(st.booleans()) else None
    if not backward:
        return (weight, indices, offsets, False, mode, False, samples, False, padding)
    g = draw(tensors((4, 2), MODERATE))
    if backward == "samples":
        return (g, weight, indices, offsets, bag, 0, padding)
    forward = (weight, indices, offsets, False, mode, False, samples, False, padding)
    with reproml.exact():
        _, bag, sizes, largest = aten._embedding_bag(*forward)
    if backward == "dense":
        return (g, indices, bag, sizes, largest, 4, False, mode, samples, padding)
    return (g, indices, offsets, bag, sizes, largest, 4, False, mode, False, samples, padding)


def embedding_bag(weight: Any, indices: Any, offsets: Any, *rest: Any) -> Any:
    _, mode, _, samples, _, padding = rest
    w, s = reals(weight), [Real(1)] * 6 if samples is None else reals(samples)
    out = np.empty((4, 2), dtype=object)
    for n, c in np.ndindex(4, 2):
        used = [i for i in range(6)[SEGMENTS[n]] if indices[i] != padding]
        row = [w[int(indices[i]), c] * s[i] for i in used]
        out[n, c] = REDUCTIONS[("sum", "mean", "amax")[mode]](row) if row else Real(0)
    return (out,)


def dense_bag_backward(g: Any, indices: Any, bag: Any, sizes: Any, largest: Any, *rest: Any) -> Any:
    _, _, mode, samples, padding = rest
    gs, s = reals(g), [Real(1)] * 6 if samples is None else reals(samples)
    parts: Any = {}
    if mode == 2:
        for n, c in np.ndindex(4, 2):
            parts.setdefault((int(largest[n, c]), c), []).append(gs[n, c])
    for i, c in np.ndindex(6, 2) if mode < 2 else ():
        if indices[i] != padding:
            n = int(bag[i])
            term = gs[n, c] * s[i] / (int(sizes[n]) if mode == 1 else 1)
            parts.setdefault((int(indices[i]), c), []).append(term)
    return summed((4, 2), parts)


def bag_backward(g: Any, i: Any, offsets: Any, b: Any, s: Any, m: Any, n: int, *rest: Any) -> Any:
    freq, mode, _, samples, padding = rest
    return dense_bag_backward(g, i, b, s, m, n, freq, mode, samples, padding)


def samples_backward(g: Any, weight: Any, i: Any, offsets: Any, bag: Any, _: int, pad: int) -> Any:
    gs, w = reals(g), reals(weight)
    pairs = zip(i.tolist(), bag.tolist())
    return array(Real(0) if j == pad else dot(gs[n], w[j]) for j, n in pairs)


def histc(x: Any, bins: int, low: float, high: float) -> Any:
    counts = [0] * bins
    for v in reals(x).ravel():
        if low <= v and v <= high:
            counts[min(math.floor((v.v - low) * bins / (Fraction(high) - low)), bins - 1)] += 1
    return array(map(Real, counts))


def histogram(x: Any, bins: Any, weight: Any, density: bool) -> Any:
    edges, values, weights = reals(bins), reals(x), reals(weight)
    count = len(edges) - 1
    rows: list[Any] = [[] for _ in range(count)]
    for v, w in zip(values, weights):
        n = sum(bool(e <= v) for e in edges) - 1
        if 0 <= n < count or v.v == edges[-1].v:
            rows[min(n, count - 1)].append(w)
    sums = rounded(array(map(total, rows)))
    widths = edges[1:] - edges[:-1]
    return (sums / (widths * total(sums)) if density else sums), edges


def bincount(x: Any, weights: Any) -> Any:
    w = reals(weights)
    rows = [[w[i] for i in range(len(x)) if x[i] == n] for n in range(int(x.max()) + 1)]
    return array(map(total, rows))


# ---- selection by order --------------------------------------------------------------------------


def ascending(row: Any) -> list[tuple[Real, int]]:
    """Return the elements of a row with their indices, NaN last; a zero is +0."""
    pairs = [(v if v.v != 0 else Real(0), i) for i, v in enumerate(row)]
    return sorted((p for p in pairs if p[0].v == p[0].v), key=lambda p: p[0].mpf) + [
        p for p in pairs if p[0].v != p[0].v
    ]


def median(row: Any) -> Any:
    pairs = ascending(row)
    numbers = [p for p in pairs if p[0].v == p[0].v]
    return pairs[len(numbers)] if len(numbers) < len(pairs) else pairs[(len(pairs) - 1) // 2]


def nanmedian(row: Any) -> Any:
    pairs = ascending(row)
    numbers = [p for p in pairs if p[0].v == p[0].v]
    return numbers[(len(numbers) - 1) // 2] if numbers else pairs[0]


def mode(row: Any) -> Any:
    pairs = ascending(row)
    best = max(sum(p[0].v == q[0].v for q in pairs) for p in pairs)
    if not best:  # all are NaN
        return pairs[0]
    value = next(p[0] for p in pairs if sum(p[0].v == q[0].v for q in pairs) == best)
    return value, max(i for v, i in pairs if v.v == value.v)


REPEATED = st.one_of(ANY, st.sampled_from([0.0, -0.0, 1.0, -2.0, math.nan]))


def selected(choose: Callable[..., Any], *rest: Any) -> Case:
    """Return the case of an operator (x, *rest, dim, keepdim) that returns elements and their indices."""

    def oracle(x: Any, *_: Any) -> Any:
        found = [choose(row) for row in reals(x)]
        indices = torch.tensor([i for _, i in found], dtype=torch.int64)
        return array(v for v, _ in found).reshape(-1, 1), indices.reshape(-1, 1)

    return drawn(tensors((3, 5), REPEATED), *rest, 1, True, oracle=oracle)


def selected_of_all(choose: Callable[..., Any]) -> Case:
    return drawn(tensors((2, 3), REPEATED), oracle=lambda x: choose(reals(x).ravel())[0])


@st.composite
def multiplied(draw: Any) -> Any:
    shape = draw(st.sampled_from([(5,), (2, 3), (3, 0), (0, 2), (2, 2, 2), (1, 40)]))
    x = draw(tensors(shape, draw(st.sampled_from([ANY, MODERATE]))))
    return (x, draw(st.integers(-len(shape), len(shape) - 1)), draw(st.booleans()))


def many_factors(seed: int) -> torch.Tensor:
    x = torch.randn(120, generator=torch.Generator().manual_seed(seed))
    return torch.cat([2.0**-100 * x, 2.0**102 * x.flip(0)])


def multiply(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    a = reals(x)
    if dim is None:
        return factors(a.ravel())
    rows = np.moveaxis(a, dim, -1)
    out = np.empty(rows.shape[:-1], dtype=object)
    for i in np.ndindex(out.shape):
        out[i] = factors(rows[i])
    return np.expand_dims(out, dim) if keepdim else out


# ---- norms and distances -------------------------------------------------------------------------


def norm_of_order(row: Any, p: float) -> Any:
    sizes = [abs(x) for x in row]
    if any(x.v != x.v for x in sizes) and p != 0:
        return Real(o.NAN)
    if p == 0:
        return Real(sum(x.v != 0 for x in sizes))
    if math.isinf(p):
        return max(sizes, key=lambda x: x.mpf) if p > 0 else min(sizes, key=lambda x: x.mpf)
    if p == 1:
        return total(sizes)
    if p == 2:
        return o.sqrt(total([x * x for x in sizes]))
    q, infinite = float32_scalar(p), [x for x in sizes if not x.finite]
    if p < 0 and any(x.v == 0 for x in sizes):
        return Real(0)
    if infinite and (p > 0 or len(infinite) == len(sizes)):
        return Real(o.INF)
    kept = [x for x in sizes if x.finite and x.v]
    if (
        len(kept) < 2
    ):  # these, and the two orders below, may be ties, which a long number would miss
        return total(kept)
    if p == -1:
        return 1 / total([1 / x for x in kept])
    if p == 0.5:
        return total([*kept, *(2 * o.sqrt(x * y) for x, y in combinations(kept, 2))])
    return o.exp(o.log(total([o.exp(q * o.log(x)) for x in kept])) / q)


ORDERS = (0, 1, 2, 3, 0.5, 1.3, 6, 100, -1, -2.5, math.inf, -math.inf)


def distance_slopes(g: Any, x: Any, y: Any, p: float, distance: Any) -> Any:
    """Return the gradient of each row of x: g [n, m], x [n, k], y [m, k], distance [n, m]."""
    out = np.empty(x.shape, dtype=object)
    q = float32_scalar(p)
    for i, c in np.ndindex(*x.shape):
        terms = []
        for j in range(len(y)):
            d, length = x[i, c] - y[j, c], distance[i, j]
            sign = real((d.v > 0) - (d.v < 0))
            if p == 1:
                terms.append(g[i, j] * sign)
            elif p == math.inf:
                equal = rounded(abs(d)).v == length.v
                terms.append(g[i, j] * sign if equal else Real(0))
            elif p == 2 and d.v and length.v:
                terms.append(g[i, j] * d / length)
            elif p and d.v and length.v:
                terms.append(g[i, j] * sign * o.exp((q - 1) * o.log(abs(d) / length)))
        out[i, c] = total(terms)
    return out


def cdist(x: Any, y: Any, p: float, _: Any = None) -> Any:
    return np.array([[norm_of_order(a - b, p) for b in reals(y)] for a in reals(x)], dtype=object)


def as_tensor(values: Any) -> torch.Tensor:
    numbers = [o.float_of(v) for v in np.ravel(values)]
    return torch.tensor(numbers, dtype=torch.float32).reshape(np.shape(values))


SLOPE_ORDERS = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf])


@st.composite
def distances_backward(draw: Any) -> Any:
    x, y, p = draw(tensors((3, 2), MODERATE)), draw(tensors((2, 2), MODERATE)), draw(SLOPE_ORDERS)
    return (draw(tensors((3, 2), MODERATE)), x, y, p, as_tensor(cdist(x, y, p)))


def pairs_of(x: Any) -> Any:
    return [(i, j) for i in range(len(x)) for j in range(i + 1, len(x))]


def pdist(x: Any, p: float) -> Any:
    a = reals(x)
    return array(norm_of_order(a[i] - a[j], p) for i, j in pairs_of(x))


@st.composite
def pairs_backward(draw: Any) -> Any:
    x, p = draw(tensors((3, 2), MODERATE)), draw(SLOPE_ORDERS)
    return (draw(tensors((3,), MODERATE)), x, p, as_tensor(pdist(x, p)))


def pdist_backward(g: Any, x: Any, p: float, distance: Any) -> Any:
    gs, lengths = np.full((2, 3, 3), Real(0), dtype=object)
    for (i, j), a, b in zip(pairs_of(x), reals(g), reals(distance)):
        gs[i, j] = gs[j, i] = a
        lengths[i, j] = lengths[j, i] = b
    return distance_slopes(gs, reals(x), reals(x), p, lengths)


def limited(row: Any, p: float, largest: float, of_table: bool = False) -> Any:
    """Scale a row down to a norm of at most `largest`, in rounded steps."""
    n, bound = norm_of_order(row, p), float32_scalar(largest)
    n = rounded(n) if of_table else stored(n)
    if not n > bound:
        return row
    factor = rounded(bound / stored(n + float32_scalar(1e-7)))
    return row * factor


def weight_norm(v: Any, g: Any, dim: int) -> Any:
    rows, norms = reals(v), [norm(row) for row in reals(v)]
    w = [row * a[0] / n for row, a, n in zip(rows, reals(g), norms)]
    return np.array(w, dtype=object), array(norms).reshape(-1, 1)


def weight_norm_backward(grad: Any, v: Any, g: Any, norms: Any, dim: int) -> Any:
    of_v, of_g = [], []
    for e, row, a, n in zip(reals(grad), reals(v), reals(g)[:, 0], reals(norms)[:, 0]):
        s = dot(e, row)
        of_v.append((e - row * (s / (n * n))) * (a / n))
        of_g.append(s / n)
    return np.array(of_v, dtype=object), array(of_g).reshape(-1, 1)


def cross(x: Any, y: Any) -> Any:
    rows = zip(reals(x), reals(y))
    at = ((1, 2), (2, 0), (0, 1))
    return np.array([[a[i] * b[j] - a[j] * b[i] for i, j in at] for a, b in rows], dtype=object)


def sum_of_products(bias: Any, a: Any, b: Any, alpha: float = 1, beta: float = 1) -> Any:
    wide, tall = a.transpose(0, 1).flatten(1), b.flatten(0, 1)
    return product_with_bias(bias, wide, tall, alpha, beta)


def grouped(a: Any, b: Any, ends: Any) -> Any:
    rows, start = [np.empty((0, b.shape[2]), dtype=object)], 0
    for n, end in enumerate(ends.tolist()):
        rows.append(product_of(a[start:end], b[n]))
        start = end
    return np.concatenate(rows)


def logcumsumexp(row: Any) -> Any:
    out = []
    for i in range(len(row)):
        top = largest(row[: i + 1])
        out.append(top + o.log(total([o.exp(v - top) for v in row[: i + 1]])))
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
    """Return the mean and 1 / sqrt(variance + eps), each rounded to float32."""
    return stored(mean(row)), stored(1 / o.sqrt(variance(row, 0) + real(EPS)))


def stored(x: Any) -> Any:
    """Round an intermediate result that is stored in float32 for narrower operands, too."""
    with o.rounding_to(torch.promote_types(o.target, torch.float32)):
        return rounded(x)


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
        p = stored(total(wg))
        q = stored(total([v * (a[i] - m) * r for v, i in zip(wg, row)]))
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
    fixed = list(zip(reals(mean_), [stored(1 / o.sqrt(v + real(EPS))) for v in reals(var_)]))
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

# numbers of which many powers are ties
SQUARES = st.one_of(st.integers(1, 90).map(lambda n: float(n * n)), st.integers(4097, 8191).map(float),
                    st.integers(-6, 6).map(lambda n: n / 2), st.just(-75.0))  # fmt: skip
POWERS_OF_TEN = st.integers(0, 12).map(lambda n: 10.0**n)

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
    "linalg_vector_norm": [drawn(tensors((2, 5), ANY), p, [1], oracle=lambda x, p, _: array(
                               norm_of_order(row, p) for row in reals(x))) for p in ORDERS],
    "norm": [drawn(tensors((5,), FINITE), oracle=lambda x: norm(reals(x)))],
    "dist": [drawn(tensors((5,), MODERATE), tensors((5,), MODERATE), p,
                   oracle=lambda x, y, p: norm_of_order(reals(x) - reals(y), p)) for p in ORDERS],
    "renorm": [drawn(tensors((3, 4), MODERATE), 2, 0, 5.1, oracle=lambda x, p, _, m: np.array(
                   [limited(row, p, m) for row in reals(x)], dtype=object)),
               drawn(tensors((3, 4), MODERATE), 3, 0, 5.1, oracle=lambda x, p, _, m: np.array(
                   [limited(row, p, m) for row in reals(x)], dtype=object))],
    "embedding_renorm": [
        drawn(tensors((3, 4), MODERATE), torch.tensor([2, 0, 2]), 5.1, 2,
              oracle=lambda x, i, m, p: np.array([row if n == 1 else limited(
                  row, p, m, True) for n, row in enumerate(reals(x))], dtype=object))],
    "_cdist_forward": [drawn(tensors((3, 2), MODERATE), tensors((4, 2), MODERATE), p, None, oracle=cdist)
                       for p in (0.0, 0.5, 1.0, 2.0, 3.0, math.inf)],
    "_euclidean_dist": [drawn(tensors((3, 2), MODERATE), tensors((4, 2), MODERATE),
                              oracle=lambda x, y: cdist(x, y, 2))],
    "_cdist_backward": [Case(distances_backward(), lambda g, x, y, p, d: distance_slopes(
        reals(g), reals(x), reals(y), p, reals(d)))],
    "_pdist_forward": [drawn(tensors((4, 2), MODERATE), p, oracle=pdist)
                       for p in (0.0, 1.0, 1.5, 2.0, math.inf)],
    "_pdist_backward": [Case(pairs_backward(), pdist_backward)],
    "_weight_norm_interface": [
        drawn(tensors((3, 4), FINITE).map(lambda t: torch.where(t == 0, 1.5, t)), tensors((3, 1), FINITE),
              0, oracle=weight_norm)],
    "_weight_norm_interface_backward": [
        drawn(tensors((3, 4), MODERATE), tensors((3, 4), MODERATE), tensors((3, 1), MODERATE),
              torch.tensor([[1.5], [0.7], [3.0]]), 0, oracle=weight_norm_backward)],
    "prod": [Case(multiplied(), multiply), drawn(tensors((2, 3)), oracle=multiply),
             drawn(st.integers(0, 99).map(many_factors), oracle=multiply)],
    "cumprod": [along(lambda row: [factors(row[: i + 1]) for i in range(len(row))], 1, ANY)],
    "nansum": [reduced(lambda row: total([x for x in row if x.v == x.v]))],
    "std_mean": [drawn(tensors((2, 5), MODERATE), [1], oracle=lambda x, dim: (
        array(o.sqrt(variance(r)) for r in reals(x)), array(map(mean, reals(x)))))],
    "var_mean": [drawn(tensors((2, 5), MODERATE), [1], oracle=lambda x, dim: (
        array(map(variance, reals(x))), array(map(mean, reals(x)))))],
    "aminmax": [drawn(tensors((2, 3)), oracle=lambda x: (
        extreme(-1)(reals(x).ravel()), extreme(1)(reals(x).ravel())))],
    "kthvalue": [selected(lambda row, k=k: ascending(row)[k - 1], k) for k in (1, 3, 5)],
    "median": [selected(median), selected_of_all(median)],
    "nanmedian": [selected(nanmedian), selected_of_all(nanmedian)],
    "mode": [selected(mode)],
    "scatter_reduce": reduced_at("sum mean prod amax amin"),
    "index_reduce": reduced_at("mean prod amax amin", True),
    "index_copy": [Case(indexed(False), index_copy)],
    "segment_reduce": [
        Case(st.tuples(tensors((6, 2), MODERATE), st.sampled_from([*SEGMENT_REDUCTIONS])), segment_reduce,
             None, {"lengths": torch.tensor(LENGTHS)}),
        *[drawn(tensors((6, 2), ANY), name, oracle=segment_reduce, lengths=torch.tensor(LENGTHS),
                initial=0.7) for name in ("sum", "prod", "max", "min")]],
    "_segment_reduce_backward": [
        Case(segments_backward(), segment_reduce_backward, None, {"lengths": torch.tensor(LENGTHS)})],
    "_embedding_bag": [Case(bags(), embedding_bag)],
    "_embedding_bag_forward_only": [Case(bags(), embedding_bag)],
    "_embedding_bag_backward": [Case(bags("any"), bag_backward)],
    "_embedding_bag_dense_backward": [Case(bags("dense"), dense_bag_backward)],
    "_embedding_bag_per_sample_weights_backward": [Case(bags("samples"), samples_backward)],
    "histc": [drawn(tensors((2, 7), MODERATE), 7, -3.0, 3.5, oracle=histc)],
    "histogram": [drawn(tensors((9,), MODERATE), torch.tensor([-3.0, -0.3, 0.1, 2.0, 3.0]),
                        weight=torch.tensor([0.1, 0.7, 1, 2, 3e-9, 0.3, 0.4, 1e7, 2]), density=density,
                        oracle=histogram) for density in (False, True)],
    "bincount": [drawn(torch.tensor([1, 4, 1, 1, 0, 4]), tensors((6,), FINITE), oracle=bincount)],
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
    "addr": [Case(shaped("mn", "m", "n"), lambda c, a, b: product_with_bias(c, a[:, None], b[None])),
             Case(shaped("n", "m", "n"), lambda c, a, b, alpha, beta: product_with_bias(
                 c, a[:, None], b[None], alpha, beta), None, {"alpha": 0.3, "beta": -1.7})],
    "addbmm": [Case(shaped("mn", "bmk", "bkn"), sum_of_products),
               Case(shaped("n", "bmk", "bkn"), sum_of_products, None, {"alpha": 0.3, "beta": -1.7})],
    "vdot": [Case(shaped("k", "k"), lambda a, b: dot(reals(a), reals(b)))],
    "_grouped_mm": [drawn(tensors((6, 3), FINITE), tensors((3, 3, 2), FINITE),
                          torch.tensor([2, 2, 6], dtype=torch.int32), oracle=grouped)],
    "linalg_cross": [drawn(tensors((2, 3), FINITE), tensors((2, 3), FINITE), oracle=cross)],
    "_trilinear": [Case(shaped("ki", "oij", "kj").map(lambda t: (*t, [1, 3], [0], [1, 2], [2, 3])),
                        trilinear)],
    "linalg_qr": [Case(independent_columns(), qr)],
    "scatter_add": [Case(scattered(), scatter_add)],
    "index_add": [Case(indexed(False), index_add)],
    "index_put": [Case(indexed(True), index_put)],
    "index_put_": [Case(indexed(True), index_put)],
    "_index_put_impl_": [Case(indexed(True), index_put)],
    "_unsafe_index_put": [Case(indexed(True), index_put)],
    "_unsafe_masked_index": [drawn(
        tensors((3, 2)), torch.tensor([True, False, True]),
        [torch.tensor([2, -9, -3]), torch.tensor([0, 7, 1])], 0.1,
        oracle=lambda x, *_: array([reals(x)[2, 0], float32_scalar(0.1), reals(x)[0, 1]]))],
    "_unsafe_masked_index_put_accumulate": [drawn(
        tensors((3,), FINITE), torch.tensor([True, False, True, True]), [torch.tensor([2, 1, -1, 0])],
        tensors((4,), FINITE), oracle=lambda x, m, i, v: (lambda a, b: array(
            [a[0] + b[3] + 0, a[1] + 0, a[2] + b[0] + b[2] + 0]))(reals(x), reals(v)))],
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
    "i0": [each(f.i0, 1, FINITE)],
    "special_modified_bessel_i0": [each(f.i0, 1, MODERATE)],
    "special_i0e": [each(f.i0e, 1, MODERATE)],
    "special_i1": [each(f.i1, 1, FINITE)],
    "special_modified_bessel_i1": [each(f.i1, 1, MODERATE)],
    "special_i1e": [each(f.i1e, 1, MODERATE)],
    "special_bessel_j0": [each(f.bessel_j(0), 1, MODERATE)],
    "special_bessel_j1": [each(f.bessel_j(1), 1, MODERATE)],
    "special_spherical_bessel_j0": [each(f.spherical_bessel_j0)],
    "special_airy_ai": [each(f.airy_ai, 1, MODERATE)],
    "special_erfcx": [each(f.erfcx, 1, MODERATE)],
    "special_ndtri": [each(f.ndtri, 1, UNIT)],
    "special_log_ndtr": [each(f.log_ndtr, 1, MODERATE)],
    "nextafter": [each(f.nextafter, 2)],
    "frexp": [Case(broadcast(1), lambda x: tuple(zip_fractions(x)))],
    "erfc": [each(o.erfc)],
    "pow": [drawn(tensors((5,)), 2, oracle=lambda x, p: reals(x) * reals(x)),
            drawn(tensors((5,)), 3, oracle=lambda x, p: reals(x) * reals(x) * reals(x)),
            drawn(tensors((5,)), -1, oracle=lambda x, p: 1 / reals(x)),
            *[drawn(tensors((5,)), p, oracle=integer_power) for p in (65, 66, -65, -100)],
            drawn(tensors((5,), POSITIVE), 0.5, oracle=lambda x, p: each(o.sqrt).oracle(x)),
            each(f.power, 2), each(f.power, 2, SQUARES), each(f.power, 2, MODERATE),
            *[drawn(base, tensors((5,)), oracle=lambda base, x: each(
                lambda x: f.power(float32_scalar(base), x)).oracle(x)) for base in (10000.0, 0.3, -2, 0)]],
    "fmod": [each(f.fmod, 2), each(f.fmod, 2, MODERATE)],
    "remainder": [each(f.remainder, 2), each(f.remainder, 2, MODERATE)],
    "floor_divide": [each(f.floor_divide, 2), each(f.floor_divide, 2, MODERATE)],
    "frac": [each(f.frac)],
    "round": [each(lambda x: f.round_to_decimals(x, 0)),
              *[drawn(tensors((6,), kind), decimals=d, oracle=lambda x, decimals: each(
                  lambda x: f.round_to_decimals(x, decimals)).oracle(x))
                for d in (1, 3, 12, -3, -7) for kind in (ANY, st.floats(-2.0**31, 2.0**31, width=32))]],
    "deg2rad": [each(f.deg2rad)],
    "rad2deg": [each(f.rad2deg)],
    "angle": [each(f.angle)],
    "special_entr": [each(f.entr)],
    "mvlgamma": [drawn(tensors((5,), values), p, oracle=lambda x, p: each(
        lambda x: f.mvlgamma(x, p)).oracle(x)) for p in (1, 4) for values in (ANY, MODERATE)],
    "copysign": [each(f.copysign, 2)],
    "fmax": [each(other_if_nan(larger), 2)],
    "fmin": [each(other_if_nan(smaller), 2)],
    "hypot": [each(f.hypot, 2)],
    "exp2": [each(f.exp2)],
    "log2": [each(f.log2)],
    "log10": [each(f.log10), each(f.log10, 1, POWERS_OF_TEN)],
    "logaddexp": [each(f.logaddexp, 2), each(f.logaddexp, 2, MODERATE)],
    "logaddexp2": [each(f.logaddexp2, 2), each(f.logaddexp2, 2, MODERATE)],
    "special_xlog1py": [each(f.xlog1py, 2)],
    "logit": [each(f.logit), each(f.logit, 1, UNIT),
              drawn(tensors((5,)), 0.1, oracle=lambda x, eps: each(lambda x: f.logit(
                  x if x.v != x.v else clip(x, float32_scalar(0.1), float32_scalar(0.9)))).oracle(x))],
    "logit_backward": [each(f.logit_backward, 2), each(f.logit_backward, 2, [MODERATE, UNIT]),
                       Case(broadcast(2).map(lambda t: (*t, 0.1)), lambda g, x, eps: each(
                           lambda g, x: Real(0) if x < float32_scalar(0.1) or x > float32_scalar(0.9)
                           else f.logit_backward(g, x), 2).oracle(g, x))],
    **{name: [each(getattr(f, name)), each(getattr(f, name), 1, st.floats(-2, 2, width=32))] for name in
       "tan asin acos atan sinh cosh asinh acosh atanh sinc lgamma digamma".split()},
    "atan2": [each(f.atan2, 2), each(f.atan2, 2, MODERATE)],
    "polygamma": [drawn(n, tensors((5,), values), oracle=lambda n, x: each(
        f.trigamma if n else f.digamma).oracle(x)) for n in (0, 1) for values in (ANY, MODERATE)],
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
    "glu": [drawn(tensors((4, 2), FINITE), dim, oracle=lambda x, dim: (lambda a, b: array(
        u * o.sigmoid(v) for u, v in zip(a.ravel(), b.ravel())).reshape(a.shape))(*halves(x, dim)))
        for dim in (0, -1)],
    "glu_backward": [drawn(tensors((2, 3), MODERATE), tensors((2, 6), MODERATE), 1, oracle=glu_backward),
                     drawn(tensors((2, 2), MODERATE), tensors((4, 2), MODERATE), 0, oracle=glu_backward)],
    "softshrink": [each(lambda x: x - 0.5 if x > 0.5 else x + 0.5 if x < -0.5 else x * 0),
                   drawn(tensors((5,)), 0.1, oracle=lambda x, b: each(lambda x: x - float32_scalar(b) if x >
                         float32_scalar(b) else x + float32_scalar(b) if -x > float32_scalar(b) else x * 0
                         ).oracle(x))],
    "hardshrink": [each(lambda x: Real(0) if abs(x) <= 0.5 else x)],
    **{name: [Case(broadcast(2).map(lambda t: (*t, 0.3)), lambda g, x, b: each(
        lambda g, x: Real(0) if abs(x) <= float32_scalar(b) else g, 2).oracle(g, x))]
       for name in ("hardshrink_backward", "softshrink_backward")},
    "rrelu_with_noise_backward": [
        drawn(*[tensors((5,))] * 3, 0.1, 0.3, training, False, oracle=rrelu_backward)
        for training in (False, True)],
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
    "logcumsumexp": [along(logcumsumexp, 1, MODERATE)],
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
    "soft_margin_loss": [losses(lambda x, y: o.softplus(-(x * y)), 2, MODERATE)],
    "soft_margin_loss_backward": [slopes(lambda x, y: -y * o.sigmoid(-(x * y)), 2, MODERATE)],
    "multi_margin_loss": [Case(margins(False, False), lambda x, t, p, m, w, r: loss_of_terms(
        x, [(i, v) for i, _, _, v, _ in margin_terms(x, t, p, m, w)], r))],
    "multi_margin_loss_backward": [Case(margins(False, True), lambda g, x, t, p, m, w, r: slope_of_terms(
        g, x, [(i, t, j, d) for i, t, j, _, d in margin_terms(x, t, p, m, w)], r))],
    "multilabel_margin_loss_forward": [Case(margins(True, False), multilabel_margin)],
    "multilabel_margin_loss_backward": [Case(margins(True, True), lambda g, x, t, r, _: slope_of_terms(
        g, x, [(i, t, j, Real(1)) for i, t, j, _ in multilabel_terms(x, t)], r))],
}  # fmt: skip

# Operators that are tested elsewhere: the module and a test function in it.
_MATRICES = "operators.test_small_matrices."
_UPSAMPLING, _WINDOWS = "operators.test_upsampling.", "operators.test_windows."
ELSEWHERE = {
    "_amp_foreach_non_finite_check_and_unscale_": "operators.test_grad_scaling"
    ".test_unscaled_gradients_are_rounded_once",
    "_amp_update_scale_": "operators.test_grad_scaling.test_scale_is_updated_as_in_pytorch",
    "_unique2": "operators.test_selection.test_unique_elements_are_sorted",
    "unique_dim": "operators.test_selection.test_unique_slices_are_sorted",
    "unique_consecutive": "operators.test_selection.test_unique_consecutive_ignores_the_sign_of_zero",
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
    **dict.fromkeys(
        ["linalg_inv_ex", "_linalg_solve_ex"],
        _MATRICES + "test_inverse_and_solution_are_rounded_once",
    ),
    **dict.fromkeys(
        ["linalg_solve_triangular", "triangular_solve"],
        _MATRICES + "test_triangular_solution_is_rounded_once",
    ),
    **dict.fromkeys(
        ["_linalg_det", "_linalg_slogdet"],
        _MATRICES + "test_determinant_and_its_gradient_are_rounded_once",
    ),
    **dict.fromkeys(
        ["linalg_lu_factor_ex", "linalg_lu", "linalg_lu_solve"],
        _MATRICES + "test_lu_factors_are_rounded_once",
    ),
    **dict.fromkeys(
        ["linalg_cholesky_ex", "cholesky_solve", "cholesky_inverse"],
        _MATRICES + "test_cholesky_factor_is_rounded_once",
    ),
    **dict.fromkeys(
        ["linalg_lstsq", "linalg_pinv"],
        _MATRICES + "test_least_squares_and_pseudoinverse_are_rounded_once",
    ),
    **dict.fromkeys(
        ["_ctc_loss", "_ctc_loss_backward"],
        "operators.test_ctc.test_each_step_is_rounded_once",
    ),
    **dict.fromkeys(
        [f"{name}_window" for name in ("hann", "hamming", "blackman", "bartlett", "kaiser")],
        "operators.test_creation.test_windows_are_rounded_once",
    ),
    "logspace": "operators.test_creation.test_logspace_is_rounded_once",
    "cauchy_": "operators.test_random.test_cauchy_is_rounded_once",
    "arange": "operators.test_random.test_arange_is_rounded_once",
    "linspace": "operators.test_random.test_linspace_is_rounded_once",
    "allclose": "test_handlers.test_evaluation_code_works",
    "signbit": "test_handlers.test_sign_of_nan",
    "randint": "operators.test_random.test_integers_match_pytorch",
    "randint_like": "operators.test_random.test_integers_match_pytorch",
    "random_": "operators.test_random.test_integers_match_pytorch",
    "randperm": "operators.test_random.test_integers_match_pytorch",
    "multinomial": "operators.test_random.test_multinomial_matches_pytorch",
    "_standard_gamma": "operators.test_random.test_gamma_is_the_rejection_method_in_rounded_steps",
    "_sample_dirichlet": "operators.test_random.test_dirichlet_is_a_ratio_of_gammas_rounded_once",
    "rand": "operators.test_random.test_rand_matches_pytorch",
    "rand_like": "operators.test_random.test_rand_matches_pytorch",
    "native_dropout": "operators.test_random.test_native_dropout_matches_cpu_dropout",
    "rrelu_with_noise": "operators.test_random.test_rrelu_is_rounded_once",
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


pytestmark = pytest.mark.usefixtures("path")


# Operators for which the sign of an exact zero depends on how the formula is written.
ANY_ZERO = """
multi_margin_loss multi_margin_loss_backward
multilabel_margin_loss_forward multilabel_margin_loss_backward
smooth_l1_loss smooth_l1_loss_backward huber_loss huber_loss_backward binary_cross_entropy
binary_cross_entropy_backward binary_cross_entropy_with_logits
_softmax _safe_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data logsumexp
logcumsumexp _weight_norm_interface _weight_norm_interface_backward
nll_loss_forward nll_loss2d_forward mse_loss native_batch_norm_backward native_layer_norm_backward
native_group_norm_backward _segment_reduce_backward
""".split()


def test_exact_zero_of_row_is_positive():
    g = torch.tensor([[-0.0, 1.0, -1.0]])
    with reproml.exact():
        found = torch.ops.aten._log_softmax_backward_data(g, torch.zeros(1, 3), 1, torch.float32)
        empty = torch.ops.aten._softmax_backward_data(-torch.zeros(1, 3), g, 1, torch.float32)
    assert found[0, 0] == 0 and not found[0, 0].signbit() and not empty.signbit().any()


# results that are float32 whatever the operands are
STORED = {
    (name, i)
    for name in CASES
    if name.endswith(("norm", "norm_legit", "no_training"))
    for i in (1, 2)
}
STORED |= {("_weight_norm_interface", 1)}


def converted(x: Any, dtype: torch.dtype) -> Any:
    """Return arguments with their float32 tensors rounded to a dtype, and that dtype."""
    if isinstance(x, torch.Tensor) and x.dtype is torch.float32:
        top = torch.finfo(dtype).max
        return torch.where(x.isfinite(), x.clamp(-top, top), x).to(dtype)  # stays finite
    if x is torch.float32:
        return dtype
    return type(x)(converted(y, dtype) for y in x) if isinstance(x, (list, tuple)) else x


def widened(x: Any, spread: int, bits: bool) -> Any:
    """Return arguments with their float32 tensors as float64, with more bits and exponents than these have.

    spread: the factor of each exponent. bits: whether half of the numbers get 29 more bits.
    """
    if isinstance(x, torch.Tensor) and x.dtype is torch.float32:
        m, e = torch.frexp(x.double())
        y = torch.where(x.isfinite(), torch.ldexp(m * 2, (e - 1) * spread), x)
        low = (torch.arange(x.numel()).reshape(x.shape) * 0x9E3779B1 + 12345) & (2**29 - 1)
        pattern = y.contiguous().view(torch.int64)
        more = (pattern - low).view(torch.float64)
        y = (
            torch.where((low % 2 == 1) & y.isfinite() & (y.abs() > 2.0**-1000), more, y)
            if bits
            else y
        )
        layout = torch.empty_strided(x.shape, x.stride(), dtype=torch.float64)
        return layout.copy_(y)
    if x is torch.float32:
        return torch.float64
    return type(x)(widened(y, spread, bits) for y in x) if isinstance(x, (list, tuple)) else x


def compare(
    name: str, case: Case, arguments: Sequence[Any], dtype: torch.dtype = torch.float32
) -> None:
    arguments = converted(arguments, dtype)
    with o.rounding_to(dtype):
        compare_in(name, case, arguments)


def compare_in(name: str, case: Case, arguments: Sequence[Any]) -> None:
    expected = case.oracle(*arguments, **case.options)
    with reproml.exact():
        found = getattr(aten, name)(*arguments, **case.options)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    got = found if isinstance(found, tuple) else (found,)
    for i, (x, y) in enumerate(zip(got, wanted)):
        if isinstance(y, torch.Tensor):  # indices
            assert torch.equal(x, y), (x, y)
        elif (name, i) in STORED:
            with o.rounding_to(torch.float64 if x.dtype is torch.float64 else torch.float32):
                check(x, y, name in ANY_ZERO)
        else:
            check(x, y, name in ANY_ZERO)


@pytest.mark.parametrize("name", [name for name in sorted(CASES) if name in operator_table.EXACT])
@TESTS
@given(data=st.data())
def test_operator_is_rounded_once(name, data):
    for case in CASES[name]:
        compare(name, case, data.draw(case.draw))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", sorted(CASES.keys() & operator_table.EXACT.keys() - operator_table.FLOAT32_ONLY)
)
@settings(TESTS, max_examples=3)
@given(data=st.data())
def test_operator_is_rounded_once_to_16_bits(name, dtype, data):
    for case in CASES[name]:
        compare(name, case, data.draw(case.draw), dtype)


@pytest.mark.parametrize("name", sorted(CASES.keys() & operator_table.FLOAT64))
@settings(TESTS, max_examples=3)
@given(data=st.data())
def test_operator_is_rounded_once_to_binary64(name, data):
    for case in CASES[name]:
        arguments = data.draw(case.draw)
        spread, bits = data.draw(st.sampled_from([(1, False), (1, True), (7, True)]))
        with o.rounding_to(torch.float64):
            compare_in(name, case, widened(arguments, spread, bits))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", [n for n in sorted(CASES) if any(c.fixed for c in CASES[n])])
def test_operator_is_rounded_once_at_special_values(name, dtype):
    for case in CASES[name]:
        if case.fixed:
            compare(name, case, case.fixed, dtype)


@pytest.mark.parametrize("name", [
    n for n in sorted(CASES.keys() & operator_table.FLOAT64) if any(c.fixed for c in CASES[n])
])  # fmt: skip
def test_operator_is_rounded_once_to_binary64_at_special_values(name):
    for case in CASES[name]:
        if case.fixed:
            for spread in (1, 7):
                with o.rounding_to(torch.float64):
                    compare_in(name, case, widened(case.fixed, spread, bits=False))
