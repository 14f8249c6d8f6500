"""Test pooling with windows of several sizes, pooling of volumes, and fold, against sums of fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reproml
from tests.arithmetic.strategies import FINITE, tensors
from tests.arithmetic.test_operator_table import widened
from verification import oracle as o
from verification.oracle import check, reals, same_bits, total

aten = torch.ops.aten
TESTS = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def drawn(data: Any, shape: Any, values: Any, dtype: torch.dtype) -> torch.Tensor:
    """Draw float32 numbers, or float64 numbers that have more bits and exponents."""
    x: torch.Tensor = data.draw(tensors(tuple(shape), values))
    return x if dtype is torch.float32 else widened(x, data.draw(st.sampled_from([1, 7])), True)


def pool_windows(
    size: Any, kernel: Any, stride: Any, padding: Any, ceil: bool, count: bool, divisor: Any
) -> Any:
    """Yield (index in the output, elements, divisor) of each window, as PyTorch documents them."""
    places = []
    for n, k, s, p in zip(size, kernel, stride, padding):
        m = (n + 2 * p - k) / s + 1
        m = math.ceil(m) if ceil else math.floor(m)
        places.append(m - 1 if (m - 1) * s >= n + p else m)
    for place in np.ndindex(*places):
        spans, padded = [], 1
        for i, n, k, s, p in zip(place, size, kernel, stride, padding):
            inside = range(i * s - p, min(i * s - p + k, n + p))
            padded *= len(inside)
            spans.append([j for j in inside if 0 <= j < n])
        elements = [()]
        for span in spans:
            elements = [(*e, j) for e in elements for j in span]  # type: ignore[misc]
        yield place, elements, divisor or (padded if count else len(elements))


def adaptive_windows(size: Any, out: Any) -> Any:
    for place in np.ndindex(*out):
        elements = [()]
        for i, n, m in zip(place, size, out):
            span = range(math.floor(i * n / m), math.ceil((i + 1) * n / m))
            elements = [(*e, j) for e in elements for j in span]  # type: ignore[misc]
        yield place, elements, len(elements)


def pooled(x: Any, windows: Any) -> Any:
    """Return the sum of each window divided by its divisor, for an array [n, c, ...]."""
    windows = list(windows)
    out = np.empty((*x.shape[:2], *[i + 1 for i in windows[-1][0]]), dtype=object)
    for n, c in np.ndindex(*x.shape[:2]):
        for place, elements, divisor in windows:
            out[(n, c, *place)] = total([x[(n, c, *i)] * Fraction(1, divisor) for i in elements])
    return out


def pooled_backward(g: Any, size: Any, windows: Any) -> Any:
    windows = list(windows)
    out = np.empty((*g.shape[:2], *size), dtype=object)
    for at in np.ndindex(*out.shape):
        terms = [g[(*at[:2], *p)] * Fraction(1, d) for p, e, d in windows if at[2:] in e]
        out[at] = total(terms)
    return out


@st.composite
def geometry(draw: Any, axes: int) -> Any:
    size = [draw(st.integers(3, 5 if axes == 2 else 4)) for _ in range(axes)]
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    divisor = draw(st.sampled_from([None, None, 3, -5]))
    return size, (kernel, stride, padding, draw(st.booleans()), draw(st.booleans()), divisor)


@in_dtypes
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.usefixtures("path")
@TESTS
@given(data=st.data())
def test_average_pooling_is_rounded_once(axes, dtype, data):
    size, rest = data.draw(geometry(axes))
    x = drawn(data, (1, 2, *size), FINITE, dtype)
    with reproml.exact():
        found = getattr(aten, f"avg_pool{axes}d")(x, *rest)
    g = drawn(data, found.shape, FINITE, dtype)
    with reproml.exact():
        backward = getattr(aten, f"avg_pool{axes}d_backward")(g, x, *rest)
    with o.rounding_to(dtype):
        check(found, pooled(reals(x), pool_windows(size, *rest)))
        check(backward, pooled_backward(reals(g), size, pool_windows(size, *rest)))


@in_dtypes
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.usefixtures("path")
@TESTS
@given(data=st.data())
def test_adaptive_average_pooling_is_rounded_once(axes, dtype, data):
    size = [data.draw(st.integers(2, 5)) for _ in range(axes)]
    out = [data.draw(st.integers(1, 4)) for _ in range(axes)]
    x, g = (drawn(data, (1, 2, *s), FINITE, dtype) for s in (size, out))
    with reproml.exact():
        found = getattr(aten, f"_adaptive_avg_pool{axes}d")(x, out)
        backward = getattr(aten, f"_adaptive_avg_pool{axes}d_backward")(g, x)
    with o.rounding_to(dtype):
        check(found, pooled(reals(x), adaptive_windows(size, out)))
        check(backward, pooled_backward(reals(g), size, adaptive_windows(size, out)))


def sum_of_parts(shape: Any, index: Any, values: Any) -> Any:
    """Return the sums of the values of each index in a plane, for index and values [n, c, ...]."""
    area = math.prod(shape[2:])
    parts: Any = [[[] for _ in range(area)] for _ in range(shape[0] * shape[1])]
    planes = zip(parts, index.reshape(len(parts), -1), values.reshape(len(parts), -1))
    for part, places, numbers in planes:
        for i, value in zip(places.tolist(), numbers):
            part[i].append(value)
    return np.array([[total(p) for p in part] for part in parts], dtype=object).reshape(shape)


POOLINGS: Any = {
    "max_pool3d_with_indices": ([2, 3, 2], [1, 1, 1], [0, 1, 0], [1, 1, 1], False),
    "adaptive_max_pool3d": ([3, 2, 2],),
    "fractional_max_pool3d": (
        [2, 2, 2],
        [2, 2, 2],
        torch.tensor([[[0.1, 0.7, 0.4]]]).expand(1, 2, 3),
    ),
    "fractional_max_pool2d": ([2, 2], [3, 2], torch.tensor([[[0.1, 0.7]]]).expand(1, 2, 2)),
}


@in_dtypes
@pytest.mark.parametrize("name", sorted(POOLINGS))
@TESTS
@given(data=st.data())
def test_gradient_of_max_pooling_is_sum_over_windows(name, dtype, data):
    arguments = POOLINGS[name]
    shape = (1, 2, 4, 5) if "2d" in name else (1, 2, 4, 4, 4)
    x = drawn(data, shape, st.floats(-30, 30, width=32), dtype)
    arguments = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
    with reproml.exact():
        y, index = getattr(aten, name)(x, *arguments)
    g = drawn(data, y.shape, FINITE, dtype)
    with reproml.exact():
        rest = arguments[:2] if "fractional" in name else arguments if "with" in name else ()
        found = getattr(aten, f"{name}_backward")(g, x, *rest, index)
    assert same_bits(y, x.flatten(2).gather(2, index.flatten(2)).reshape(y.shape))
    with o.rounding_to(dtype):
        check(found, sum_of_parts(shape, index, reals(g)))


@in_dtypes
@TESTS
@given(data=st.data())
def test_fold_is_sum_of_overlaps(dtype, data):
    kernel, dilation, padding, stride = [2, 3], [1, 2], [1, 2], [1, 2]
    places = aten.im2col(torch.ones(1, 1, 3, 5), kernel, dilation, padding, stride).shape[2]
    x = drawn(data, (2, 2 * 6, places), FINITE, dtype)
    parts: Any = {}
    columns = (5 + 2 * 2 - 2 * 2 - 1) // 2 + 1
    for n, c, a, b, place in np.ndindex(2, 2, 2, 3, places):
        row, column = place // columns - 1 + a, place % columns * 2 - 2 + 2 * b
        value = reals(x[n, c * 6 + a * 3 + b, place])
        parts.setdefault((n, c, row, column), []).append(value[()])
    expected = np.empty((2, 2, 3, 5), dtype=object)
    for i in np.ndindex(*expected.shape):
        expected[i] = total(parts.get(i, []))
    with reproml.exact(), o.rounding_to(dtype):
        check(aten.col2im(x, [3, 5], kernel, dilation, padding, stride), expected)
        check(aten.col2im(x[0], [3, 5], kernel, dilation, padding, stride), expected[0])
        patches = F.unfold(torch.rand(1, 2, 3, 5), (2, 3), padding=1)
    assert patches.shape == (1, 12, 20)


@in_dtypes
def test_unpooling_keeps_last_of_equal_indices(dtype):
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=dtype)
    index = torch.tensor([[[[0, 5], [5, 2]]]])
    with reproml.exact():
        found = aten.max_unpool2d(x, index, [2, 3])
        volume = aten.max_unpool3d(x[None], index[None], [1, 2, 3], [1, 1, 1], [0, 0, 0])
        assert found.flatten().tolist() == volume.flatten().tolist() == [1, 0, 4, 0, 0, 3]
        with pytest.raises(RuntimeError, match="an index is not in a plane of 4"):
            aten.max_unpool2d(x, index, [2, 2])


@in_dtypes
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_of_volumes_has_gradient(mode, dtype):
    x = torch.randn(1, 2, 3, 3, 4, dtype=dtype).requires_grad_()
    with reproml.exact():
        y = F.pad(x, (1, 2, 1, 0, 2, 1), mode)
        g = torch.randn(y.shape, dtype=dtype)
        (found,) = torch.autograd.grad(y, x, g)
    index = F.pad(torch.arange(36.0).reshape(1, 1, 3, 3, 4), (1, 2, 1, 0, 2, 1), mode)
    with o.rounding_to(dtype):
        check(found, sum_of_parts(x.shape, index.int().expand(y.shape), reals(g)))
