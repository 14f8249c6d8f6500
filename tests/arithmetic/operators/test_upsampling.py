"""Test interpolation against weights computed from the kernels' formulas in fractions."""

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
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics import formats
from reproml.arithmetic.operators import weighted_sums
from tests.arithmetic.strategies import ANY, FINITE, tensors
from tests.arithmetic.test_operator_table import widened
from verification import oracle as o
from verification.oracle import check, reals, same_bits, total

aten = torch.ops.aten
TESTS = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
HALF = Fraction(1, 2)


def hat(x: Fraction) -> Fraction:
    return max(1 - abs(x), Fraction(0))


def keys(a: Fraction) -> Any:
    """Return Keys' cubic kernel, as the piecewise polynomial of his paper."""

    def kernel(x: Fraction) -> Fraction:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else Fraction(0)

    return kernel


def weights(kind: str, n: int, m: int, align: bool, scale: Any) -> list[dict[int, Fraction]]:
    """Return the weights of the n elements for each of m outputs."""
    if n == m and kind != "cubic":
        return [{i: Fraction(1)} for i in range(m)]
    ratio = Fraction(n - 1, m - 1) if align and m > 1 else Fraction(0)
    if not align:
        ratio = 1 / Fraction(scale) if scale else Fraction(n, m)
    rows = []
    for i in range(m):
        row: dict[int, Fraction] = dict.fromkeys(range(n), Fraction(0))
        if "aa" in kind:
            kernel, wide = keys(-HALF) if "cubic" in kind else hat, max(ratio, Fraction(1))
            row = {j: kernel((j + HALF - ratio * (i + HALF)) / wide) for j in range(n)}
            sum_of_row = sum(row.values()) or 1  # no element may be within reach
            row = {j: w / sum_of_row for j, w in row.items()}
        else:
            place = i * ratio if align else (i + HALF) * ratio - HALF
            if kind == "linear":
                place = min(max(place, Fraction(0)), Fraction(n - 1))
                row = {j: hat(place - j) for j in range(n)}
            else:
                for j in range(math.floor(place) - 1, math.floor(place) + 3):
                    row[min(max(j, 0), n - 1)] += keys(Fraction(-3, 4))(place - j)
        rows.append({j: w for j, w in row.items() if w})
    return rows


def applied(x: Any, axes: list[list[dict[int, Fraction]]]) -> Any:
    """Return the weighted sums of the last axes of an array of Real."""
    out = np.empty((*x.shape[: x.ndim - len(axes)], *map(len, axes)), dtype=object)
    first = x.ndim - len(axes)
    for i in np.ndindex(out.shape):
        rows = [axis[j] for axis, j in zip(axes, i[first:])]
        terms = []
        for at in np.ndindex(*[len(row) for row in rows]):
            pairs = [list(row.items())[j] for row, j in zip(rows, at)]
            weight = math.prod(w for _, w in pairs)
            terms.append(x[(*i[:first], *[j for j, _ in pairs])] * weight)
        out[i] = total(terms)
    return out


def transposed(rows: list[dict[int, Fraction]], n: int) -> list[dict[int, Fraction]]:
    return [{i: row[j] for i, row in enumerate(rows) if j in row} for j in range(n)]


KINDS = {
    "upsample_linear1d": ("linear", 1),
    "upsample_bilinear2d": ("linear", 2),
    "upsample_trilinear3d": ("linear", 3),
    "upsample_bicubic2d": ("cubic", 2),
    "_upsample_bilinear2d_aa": ("linear aa", 2),
    "_upsample_bicubic2d_aa": ("cubic aa", 2),
}
SIZES = [(3, 6), (4, 7), (5, 2), (3, 1), (1, 3), (2, 2), (6, 3)]


@st.composite
def resized(draw: Any, axes: int, backward: bool) -> Any:
    """Draw the input or the incoming gradient, the output's and the input's size, and the scale factors."""
    sides = [draw(st.sampled_from(SIZES)) for _ in range(axes)]
    if axes == 3:
        sides = [(min(n, 3), min(m, 4)) for n, m in sides]
    inner, outer = [n for n, _ in sides], [m for _, m in sides]
    factors = st.sampled_from([None, 2.0, 1.7, 0.6, 1 / 3])
    scales = draw(st.lists(factors, min_size=axes, max_size=axes))
    x = draw(tensors((1, 2, *(outer if backward else inner)), draw(st.sampled_from([FINITE, ANY]))))
    return x, inner, outer, draw(st.booleans()), scales


in_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def in_dtype(x: Any, dtype: torch.dtype, data: Any) -> Any:
    return x if dtype is torch.float32 else widened(x, data.draw(st.sampled_from([1, 7])), True)


@in_dtypes
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.usefixtures("path")
@TESTS
@given(data=st.data())
def test_interpolation_is_rounded_once(name, backward, dtype, data):
    kind, axes = KINDS[name]
    x, inner, outer, align, scales = data.draw(resized(axes, backward))
    x = in_dtype(x, dtype, data)
    rows = [weights(kind, n, m, align, s) for n, m, s in zip(inner, outer, scales)]
    with reproml.exact():
        if backward:
            rows = [transposed(r, n) for r, n in zip(rows, inner)]
            found = getattr(aten, f"{name}_backward")(x, outer, [1, 2, *inner], align, *scales)
        else:
            found = getattr(aten, name)(x, outer, align, *scales)
    with o.rounding_to(dtype):
        check(found, applied(reals(x), rows))


@pytest.mark.parametrize("name", ["upsample_nearest", "_upsample_nearest_exact"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@in_dtypes
@TESTS
@given(data=st.data())
def test_gradient_of_nearest_is_sum_of_copies(name, axes, dtype, data):
    """The copies are those that the forward pass makes, for any factor."""
    g, inner, outer, _, scales = data.draw(resized(axes, True))
    g = in_dtype(g, dtype, data)
    n = math.prod(inner)
    numbers = torch.arange(2.0 * n).reshape(1, 2, *inner)
    with reproml.exact():
        copied = getattr(aten, f"{name}{axes}d")(numbers, outer, *scales)
    parts: Any = [[] for _ in range(2 * n)]
    for i, value in zip(copied.flatten().int().tolist(), reals(g).ravel()):
        parts[i].append(value)
    expected = np.array([total(p) for p in parts], dtype=object).reshape(1, 2, *inner)
    with reproml.exact():
        found = getattr(aten, f"{name}{axes}d_backward")(g, outer, [1, 2, *inner], *scales)
    with o.rounding_to(dtype):
        check(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("is_exact", [False, True])
def test_nearest_place_is_the_same_in_every_kernel(is_exact, channels_last, dtype):
    """PyTorch chooses a kernel by layout and size, and two of them ignore a factor of 2.1 for 5 -> 10."""
    name = "_upsample_nearest_exact2d" if is_exact else "upsample_nearest2d"
    for n, m, scale in [(5, 10, 2.1), (5, 5, 1.01), (2, 3, None), (7, 3, None), (5, 10, None)]:
        x = torch.arange(n).reshape(1, 1, n, 1).to(dtype).expand(1, 4, n, 200)
        x = x.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        with reproml.exact():
            found = getattr(aten, name)(x, [m, 200], scale, None)
        ratio = 1 / Fraction(scale) if scale else Fraction(n, m)
        if not is_exact:
            ratio = Fraction(float(np.float32(float(ratio))))
        places = [math.floor((i + HALF * is_exact) * ratio) for i in range(m)]
        assert found[0, 0, :, 0].tolist() == [min(p, n - 1) for p in places]
        assert found.dtype is dtype and found.shape == (1, 4, m, 200)
        assert found.is_contiguous(memory_format=torch.channels_last) == channels_last


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_size_and_scale_factor_agree_in_inference(mode):
    """In inference mode the overloads "vec" arrive as they are."""
    x = torch.rand(2, 3, 5, 4)
    align = None if mode == "nearest" else False
    for size in ({"scale_factor": 2.5}, {"size": [7, 3]}, {"scale_factor": [1.3, 0.7]}):
        with reproml.exact():
            expected = F.interpolate(x, mode=mode, align_corners=align, **size)
            with torch.inference_mode():
                assert same_bits(F.interpolate(x, mode=mode, align_corners=align, **size), expected)


def test_ties_of_doubled_image_go_to_even():
    """Weights of quarters make many ties, which integers decide; fractions are not needed."""
    x = torch.arange(1 << 12).reshape(1, 1, 64, 64).float() + 2**23
    with reproml.exact():
        found = F.interpolate(x, scale_factor=2, mode="bilinear")
    sums = F.interpolate(x.double(), scale_factor=2, mode="bilinear")  # exact, as they are short
    assert (sums.float().double() != sums).any()
    assert same_bits(found, sums.float())


@TESTS
@given(
    st.lists(st.lists(FINITE, min_size=5, max_size=5), min_size=1, max_size=8),
    st.integers(1, 2**27 - 1),
)
def test_quotients_of_sums_are_rounded_once(rows, divisor):
    terms = torch.tensor(rows, dtype=torch.float64)
    divisors = torch.full((len(rows),), float(divisor), dtype=torch.float64)
    found = torch.from_numpy(weighted_sums.nearest_of_quotients(terms, divisors)).float()
    check(found, np.array([total(r) / divisor for r in reals(terms)], dtype=object))


@pytest.mark.parametrize("divisor", [1, 2, 3, 6, 1000, 2**27 - 1])
def test_small_quotients_are_rounded_once(divisor):
    """Below the normal numbers, and beside the smallest of them, midpoints are multiples of one number."""
    counts = torch.arange(-40, 41).double().repeat_interleave(5)
    beside = torch.tensor([0.0, 2.0**-60, -(2.0**-60), 0.25, 2.0**-20]).repeat(81).double()
    for scale in (2.0**-150, 2.0**-125):
        offset = 0.0 if scale == 2.0**-150 else 2.0**-125
        terms = (
            torch.stack([counts * 2.0**-150, beside * 2.0**-150, 0 * counts + offset], 1) * divisor
        )
        found = weighted_sums.nearest_of_quotients(terms, torch.full_like(counts, divisor))
        check(torch.from_numpy(found).float(), [total(r) / divisor for r in reals(terms)])


@pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted({*KINDS} - {"_upsample_bicubic2d_aa"}))
def test_ties_of_whole_tensors_stay_in_the_loop(name, dtype, monkeypatch):
    kind, axes = KINDS[name]
    inner, outer = [4, 3, 5][:axes], [8, 9, 10][:axes]
    draw = torch.Generator().manual_seed(axes)
    x = torch.randint(-9, 10, (3, 2, *inner), generator=draw).double()
    x = (x * 2.0 ** formats.FORMATS[dtype].lowest).to(dtype)  # subnormal
    monkeypatch.setattr(weighted_sums, "_in_chunks", None)
    rows = [weights(kind, n, m, False, None) for n, m in zip(inner, outer)]
    with reproml.exact(), o.rounding_to(dtype):
        none = [None] * axes
        check(getattr(aten, name)(x, outer, False, *none), applied(reals(x), rows))
        g = getattr(aten, name)(x, outer, False, *none)
        found = getattr(aten, f"{name}_backward")(g, outer, [3, 2, *inner], False, *none)
        check(found, applied(reals(g), [transposed(r, n) for r, n in zip(rows, inner)]))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scale", [2.0**-149, 1.0, 2.0**-30])
@pytest.mark.parametrize("name", ["upsample_bilinear2d", "_upsample_bilinear2d_aa"])
def test_planes_of_short_and_of_long_numbers(name, scale):
    """All sums of a plane are computed at once where binary64 holds them, and one by one otherwise."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(-50, 50, (1, 4, 6, 5), generator=draw).float() * scale
    x[0, 1] *= torch.rand(6, 5, generator=draw)
    x[0, 2, ::2] = 0
    x[0, 3, 0, 0] = 1e30
    x[0, 3, 3, 2:4] = torch.tensor([-1e30, 1e-30])
    args = ([9, 7], False, None, None)
    kind = "linear aa" if name.endswith("aa") else "linear"
    rows = [weights(kind, n, m, False, None) for n, m in ((6, 9), (5, 7))]
    with reproml.exact():
        found = getattr(aten, name)(x, *args)
    check(found, applied(reals(x), rows))


def test_underflow_of_tie_keeps_sign():
    terms = torch.tensor([[-(2.0**-149), 0.0], [-0.0, -0.0], [1.0, -1.0]], dtype=torch.float64)
    found = weighted_sums.nearest_of_quotients(terms, torch.full((3,), 2.0, dtype=torch.float64))
    assert [math.copysign(1, v) for v in found.tolist()] == [-1, 1, 1] and not found.any()


def test_other_dtypes_are_refused():
    x = torch.ones(1, 1, 2, 2, dtype=torch.uint8)
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="not for torch.uint8"):
        F.interpolate(x, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_an_empty_batch_has_an_empty_result(mode):
    x = torch.empty(0, 2, 3, 3, requires_grad=True)
    with reproml.exact():
        y = F.interpolate(x, size=(4, 5), mode=mode)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (0, 2, 4, 5) and gradient.shape == x.shape
