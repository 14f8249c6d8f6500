"""Test sampling at the places of a grid against places and weights computed in fractions."""

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
from reproml.arithmetic.operators import grid_sampling
from tests.arithmetic.strategies import FINITE, tensors
from verification.oracle import check, reals, rounding_to, same_bits, total

aten = torch.ops.aten
TESTS = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)
A = Fraction(-3, 4)
PLACES = st.one_of(
    st.floats(-1.5, 1.5, width=32),
    st.sampled_from([-1.0, 1.0, 0.0, 0.5, -0.25, 2.0**-149, -(2.0**-30), 3.0, -1e20, 1.0 + 2**-23]),
)


pytestmark = pytest.mark.usefixtures("path")


def padded(p: Fraction, n: int, padding: int, align: bool) -> tuple[Fraction, int]:
    """Return where padding moves a place, and the derivative."""
    slope = 1
    if padding == REFLECTION:
        low = Fraction(0) if align else Fraction(-1, 2)
        high = n - 1 - low
        if low == high:
            return Fraction(0), 0
        turns = math.floor((p - low) / (high - low))
        rest = (p - low) - turns * (high - low)
        p, slope = (low + rest, 1) if turns % 2 == 0 else (high - rest, -1)
    if padding != ZEROS:
        slope = slope if 0 < p < n - 1 else 0
        p = min(max(p, Fraction(0)), Fraction(n - 1))
    return p, slope


def cubic(x: Fraction) -> Fraction:
    x = abs(x)
    if x <= 1:
        return (A + 2) * x**3 - (A + 3) * x**2 + 1
    return A * x**3 - 5 * A * x**2 + 8 * A * x - 4 * A


def cubic_slope(x: Fraction) -> Fraction:
    sign, x = (-1 if x < 0 else 1), abs(x)
    if x <= 1:
        return sign * (3 * (A + 2) * x**2 - 2 * (A + 3) * x)
    return sign * (3 * A * x**2 - 10 * A * x + 8 * A)


def neighbors(g: float, n: int, mode: int, padding: int, align: bool) -> list[Any]:
    """Return (element, weight, derivative of the weight by g) of the neighbors in one axis."""
    scale = Fraction(n - 1, 2) if align else Fraction(n, 2)
    p = Fraction(g) * scale + Fraction(n - 1, 2)
    if mode == BICUBIC:
        near = [math.floor(p) + k for k in (-1, 0, 1, 2)]
        return [
            (
                int(padded(Fraction(j), n, padding, align)[0]),
                cubic(p - j),
                cubic_slope(p - j) * scale,
            )
            for j in near
        ]
    p, slope = padded(p, n, padding, align)
    if mode == NEAREST:
        return [(round(p), Fraction(1), Fraction(0))]
    u, left = p - math.floor(p), math.floor(p)
    return [(left, 1 - u, -slope * scale), (left + 1, u, slope * scale)]


def sampled(x: Any, grid: Any, options: Any) -> Any:
    """Yield (index of the place, [(element, weight, derivatives in the grid's order)])."""
    size = x.shape[2:]
    for at in np.ndindex(*grid.shape[:-1]):
        axes = [neighbors(float(g), n, *options) for g, n in zip(reversed(grid[at].tolist()), size)]
        found = []
        for choice in np.ndindex(*map(len, axes)):
            picked = [axis[i] for axis, i in zip(axes, choice)]
            element = tuple(p[0] for p in picked)
            if not all(0 <= i < n for i, n in zip(element, size)):
                continue
            slopes = [
                math.prod([p[2] if i == a else p[1] for i, p in enumerate(picked)])
                for a in reversed(range(len(picked)))
            ]
            found.append((element, math.prod([p[1] for p in picked]), slopes))
        yield at, found


CASES = [(2, mode) for mode in (BILINEAR, NEAREST, BICUBIC)] + [(3, BILINEAR), (3, NEAREST)]


@pytest.mark.parametrize(("axes", "mode"), CASES)
@TESTS
@given(data=st.data())
def test_sampling_is_rounded_once(axes, mode, data):
    shape, out = ((2, 2, 3, 4), (2, 3, 1, 2)) if axes == 2 else ((1, 2, 2, 1, 3), (1, 2, 1, 2, 3))
    x, grid = data.draw(tensors(shape, FINITE)), data.draw(tensors(out, PLACES))
    g = data.draw(tensors((*shape[:2], *out[1:-1]), FINITE))
    options = (mode, data.draw(st.integers(0, 2)), data.draw(st.booleans()))
    check_sampling(x, grid, g, options)


def check_sampling(x: Any, grid: Any, g: Any, options: Any) -> None:
    shape, out, axes = x.shape, tuple(grid.shape), grid.shape[-1]
    a, b, channels = reals(x), reals(g), range(shape[1])
    expected, of_grid = np.empty(g.shape, dtype=object), np.empty(out, dtype=object)
    of_x: Any = {i: [] for i in np.ndindex(*shape)}
    for at, found in sampled(x, grid, options):
        n, places = at[0], at[1:]
        for c in channels:
            expected[(n, c, *places)] = total([a[(n, c, *e)] * w for e, w, _ in found])
            for e, w, _ in found:
                of_x[(n, c, *e)].append(b[(n, c, *places)] * w)
        for axis in range(axes):
            of_grid[(*at, axis)] = total(
                [
                    a[(n, c, *e)] * b[(n, c, *places)] * slopes[axis]
                    for c in channels
                    for e, _, slopes in found
                ]
            )
    sums = np.empty(shape, dtype=object)
    for i, terms in of_x.items():
        sums[i] = total(terms)
    with reproml.exact():
        y = getattr(aten, f"grid_sampler_{axes}d")(x, grid, *options)
        backward = getattr(aten, f"grid_sampler_{axes}d_backward")
        grad_x, grad_grid = backward(g, x, grid, *options, [True, True])
    check(y, expected, any_zero=True)
    check(grad_x, sums)
    check(grad_grid, of_grid, any_zero=True)


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("padding", [ZEROS, BORDER, REFLECTION])
def test_places_beside_the_only_element_keep_their_last_bits(mode, padding):
    """On an axis of length 1 a place is half of its number, however small, and 1 - u needs all its bits."""
    tiny = [2.0**-149, -(2.0**-149), 2.0**-60, -(2.0**-60), 2.0**-53, 0.0]
    grid = torch.tensor([[a, b] for a in tiny for b in (1.0, 0.5, 2.0**-149)]).reshape(1, 6, 3, 2)
    for number in (3 * 2.0**-149, 2.0**-149, 1 + 2.0**-23):
        x = torch.full((1, 1, 1, 1), number)
        check_sampling(x, grid, torch.ones(1, 1, 6, 3), (mode, padding, False))


def sampled_with_gradients(x: Any, grid: Any, g: Any, *options: Any) -> Any:
    backward = getattr(aten, f"grid_sampler_{x.dim() - 2}d_backward")
    y = getattr(aten, f"grid_sampler_{x.dim() - 2}d")(x, grid, *options)
    return (y, *backward(g, x, grid, *options, [True, True]))


@pytest.mark.parametrize(("axes", "mode"), [(2, BILINEAR), (2, BICUBIC), (3, BILINEAR)])
@pytest.mark.parametrize("bits", [3, 12, 24])
def test_ties_and_zeros_of_whole_tensors_are_exact(axes, mode, bits):
    """Weights are short at such places, so that native sums in float64 are exact."""
    draw = torch.Generator().manual_seed(bits)
    size = [4, 8, 4][:axes]
    x = torch.randint(-(2**bits), 2**bits, (3, 2, *size), generator=draw).float() * 2.0**-149
    x[0] = 0.1 * 2.0**-100  # whose differences are 0
    grid = torch.randint(-4, 5, (3, *[5] * axes, axes), generator=draw).float() / 4
    g = torch.randint(-3, 4, (3, 2, *[5] * axes), generator=draw).float()
    with reproml.exact():
        found = sampled_with_gradients(x, grid, g, mode, ZEROS, False)
    wide = sampled_with_gradients(x.double(), grid.double(), g.double(), mode, ZEROS, False)
    for a, b in zip(found, wide):
        assert torch.equal(a, b.float())


@pytest.mark.parametrize(("axes", "mode"), CASES)
def test_loops_agree_with_reference_path(axes, mode, monkeypatch):
    """Zeros keep their signs, and what is not finite reaches the same elements."""
    draw = torch.Generator().manual_seed(axes)
    few = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, math.nan, 2.0**-149, -3e38])
    odds = torch.tensor([20, 20, 10, 10, 1, 1, 5, 5]).double()

    def numbers(*shape: int) -> Any:
        return few[odds.multinomial(math.prod(shape), True, generator=draw)].reshape(shape)

    x, g = numbers(4, 3, *[3] * axes), numbers(4, 3, *[4] * axes)
    grid = torch.rand(4, *[4] * axes, axes, generator=draw) * 3 - 1.5
    grid = torch.where(grid > 1, numbers(*grid.shape), grid)
    for padding in (ZEROS, BORDER, REFLECTION):
        with reproml.exact():
            found = sampled_with_gradients(x, grid, g, mode, padding, False)
            with monkeypatch.context() as patch:
                patch.setattr(grid_sampling, "_by_loop", lambda *_: None)
                expected = sampled_with_gradients(x, grid, g, mode, padding, False)
        for a, b in zip(found, expected):
            assert torch.equal(a.isnan(), b.isnan())
            assert same_bits(a.nan_to_num(1.5), b.nan_to_num(1.5))


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_place_that_is_not_finite_gives_nan(mode, padding):
    x = torch.rand(1, 2, 3, 3).requires_grad_()
    grid = torch.tensor([[[[0.1, math.nan], [0.3, 0.2], [math.inf, 0.0]]]])
    with reproml.exact():
        y = F.grid_sample(x, grid, mode, padding, align_corners=False)
        alone = F.grid_sample(x, grid[:, :, 1:2], mode, padding, align_corners=False)
        (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
        (expected,) = torch.autograd.grad(alone, x, torch.ones_like(alone))
    assert y.isnan().flatten(0, 2).all(0).tolist() == [True, False, True]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 3, 4), (2, 3, 2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_affine_grid_is_product_of_rounded_places(align, size, dtype):
    theta = torch.randn(2, len(size) - 2, len(size) - 1, dtype=dtype).requires_grad_()
    with reproml.exact():
        grid = F.affine_grid(theta, list(size), align)
        grid.backward(torch.randn(grid.shape, dtype=dtype))
        lines = []
        for n in size[2:]:
            line = torch.linspace(-1, 1, n, dtype=dtype) if n > 1 else torch.zeros(1, dtype=dtype)
            lines.append(line if align or n == 1 else line * (n - 1) / n)
    expected = np.empty(grid.shape, dtype=object)
    rows = reals(theta)
    for i in np.ndindex(*grid.shape):
        place = [reals(line)[j] for line, j in zip(lines, i[1:-1])][::-1]
        expected[i] = total([w * v for w, v in zip(rows[i[0], i[-1]], [*place, 1])])
    with rounding_to(dtype):
        check(grid, expected)
    assert theta.grad is not None


def test_sampling_of_four_axes_is_refused():
    with reproml.exact(), pytest.raises(RuntimeError, match="does not fit"):
        aten.grid_sampler_3d(torch.rand(1, 1, *[2] * 4), torch.rand(1, *[2] * 4, 4), 0, 0, False)


def test_bicubic_sampling_of_volumes_is_refused():
    x, grid = torch.rand(1, 1, 2, 2, 2), torch.rand(1, 2, 2, 2, 3)
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="for images, not for volumes"):
        F.grid_sample(x, grid, "bicubic", align_corners=False)


@pytest.mark.parametrize("shape", [(0, 1), (2, 0)])
def test_samples_of_nothing(shape):
    x = torch.empty(*shape, 3, 3, requires_grad=True)
    grid = torch.zeros(shape[0], 2, 4, 2, requires_grad=True)
    with reproml.exact():
        y = F.grid_sample(x, grid, align_corners=False)
        gradients = torch.autograd.grad(y.sum(), [x, grid])
    assert y.shape == (*shape, 2, 4) and gradients[0].shape == x.shape
    assert not gradients[1].any()
