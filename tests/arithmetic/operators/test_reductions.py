"""Test that sums over any axes have the same bits by csrc/reductions.c and on the reference path."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators import norms, reductions
from tests.arithmetic.forms import KINDS, agree, numbers, with_threads
from tests.arithmetic.strategies import ANY, LAYOUTS, lay_out, tensors
from verification import oracle as o
from verification.oracle import Real, check, reals, same_bits

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

SHAPES = [
    (1,), (7,), (100_000,), (64, 128), (300, 17), (20_000, 2), (3, 1), (3, 5, 7), (16, 8, 5, 5),
    (2, 3, 2, 5, 3), (9, 1, 40), (0, 5), (5, 0),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_path_matches_reference(shape, kind):
    x = numbers(shape, kind)
    y = numbers(tuple(x.shape), "normal", 1)
    subsets = [c for r in range(1, x.dim() + 1) for c in combinations(range(x.dim()), r)]
    for i, dims in enumerate(subsets):
        v = lay_out(x, LAYOUTS[i % len(LAYOUTS)])
        for options in ({}, {"keepdim": True, "divisor": 3}, {"y": y}):
            agree(reductions.reduce_sum, v, dims, **options)


def test_sum_is_independent_of_memory_layout():
    x = numbers((4, 6, 9, 9), "normal").to(memory_format=torch.channels_last)
    assert same_bits(
        reductions.reduce_sum(x, (0, 2, 3)), reductions.reduce_sum(x.contiguous(), (0, 2, 3))
    )


@pytest.mark.parametrize(
    "shape, dims", [((400_000,), (0,)), ((3, 64, 40, 40), (0, 2, 3)), ((5000, 40), (0,))]
)
def test_sum_is_independent_of_threads(shape, dims):
    x = numbers(shape, "ties")
    with_threads(reductions.reduce_sum, x, dims)
    agree(reductions.reduce_sum, x, dims)


@settings(max_examples=100)
@given(tensors((5, 4), ANY), st.sampled_from([1, 3, 7, -2]))
def test_arbitrary_numbers_match_reference(x, divisor):
    for dims in ((0,), (1,), ()):
        agree(reductions.reduce_sum, x, dims, divisor=divisor)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_non_finite_numbers_match_reference(n):
    x = numbers((3 * n, n))
    for i, value in enumerate((float("inf"), float("nan"), -float("inf"))):
        x[i::3, i % n] = value
        x[i, (i + 1) % n] = float("inf")
    for dims in ((0,), (1,), (0, 1)):
        agree(reductions.reduce_sum, x, dims)
        agree(reductions.reduce_sum, x.t(), dims, divisor=3)


def total(rows, divisor=1):
    return [Real(sum(map(Fraction, r), Fraction(0)) / divisor) for r in rows.tolist()]


@pytest.mark.parametrize("divisor", [1, 2, 3, 12])
def test_kernel_rounds_ties_and_near_ties(divisor):
    """Ties, sums next to a tie, and zeros fail the first rounding test but do not need fractions."""
    half = 2.0**-24
    rows = torch.tensor([
        [1.0, half, 0.0], [1.0, -half / 2, 0.0], [1 + 2 * half, half, 0.0], [1.0, half, 2.0**-90],
        [1.0, half, -(2.0**-90)], [3.0, -1.0, -2.0], [-0.0, -0.0, -0.0], [2.0**-149, 0.0, 0.0],
        [2.0**-149, 2.0**-149, 2.0**-149], [3.4028234663852886e38, 2.0**102, 2.0**102],
    ])  # fmt: skip
    for x in (rows, rows.t().contiguous().t(), rows.repeat(1, 20)):
        found = reductions._compiled_sum(x, (1,), False, divisor, None)
        assert found is not None
        check(found, total(x, divisor))


def test_sums_needing_fractions_use_reference_path():
    x = torch.tensor([[2.0**80, 1.0, -(2.0**80), -1.0], [1.0, 2.0, 3.0, 4.0]])
    assert reductions._compiled_sum(x, (1,), False, 1, None) is None
    check(reductions.reduce_sum(x, (1,)), total(x))


def test_invalid_axes_raise_pytorch_error():
    for dims in ((2,), (-3,), (0, 0)):
        with pytest.raises((IndexError, RuntimeError)):
            reductions.reduce_sum(torch.ones(2, 3), dims)


def rows_of(kind: str) -> torch.Tensor:
    """Return rows whose distances, or the sums of whose gradients, are midpoints, zeros or near those."""
    draw = torch.Generator().manual_seed(3)
    whole = torch.randint(-9, 10, (7, 67), generator=draw).float()
    x: torch.Tensor = {
        "whole": whole,
        "few": whole[:, :2],
        "equal": whole[:1].expand(7, -1),
        "subnormal": whole * 2.0**-149,
        "large": whole * 2.0**120,
        "wide": whole * torch.exp2(torch.arange(67.0) * 3 - 100),
        "like 100": -100 - torch.rand(7, 67, generator=draw) * 20,
        "near ties": torch.tensor(
            [[0.0, 0.0], [2.0**24 + 2, 0.0], [2.0**12, 2.0**24], [1, 2.0**-20]]
        ),
    }[kind]
    return x.contiguous()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "kind", ["whole", "few", "equal", "subnormal", "large", "wide", "like 100", "near ties"]
)
def test_distances_and_their_gradients_are_rounded_once(kind):
    x = rows_of(kind)
    y, a = x[2:], reals(x)
    found = norms.cdist(x, y, 2.0)
    expected = [[o.sqrt(o.total((r - q) * (r - q))) for q in a[2:]] for r in a]
    check(found, np.array(expected, dtype=object))
    i, j = torch.triu_indices(len(x), len(x), 1)
    assert same_bits(norms.pdist(x), norms.cdist(x, x, 2.0)[i, j])
    for g in (torch.ones_like(found), found, 1 / (found + 1)):
        b, d = reals(g), reals(found)
        sums = np.empty(x.shape, dtype=object)
        for i, k in np.ndindex(*x.shape):
            terms = [
                b[i, j] * (a[i, k] - a[2 + j, k]) / d[i, j] for j in range(len(y)) if d[i, j].v
            ]
            sums[i, k] = o.total(terms)
        check(norms.cdist_backward(g, x, y, 2.0, found), sums)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("kind", ["whole", "few", "subnormal", "large", "wide", "like 100"])
def test_scaled_rows_and_their_gradients_are_rounded_once(kind):
    v = rows_of(kind)
    a, g = reals(v), torch.tensor([[1.0], [-0.3], [2.0**-140], [3.0], [2.0**20], [0.1], [7.0]])
    b = reals(g)[:, 0]
    with reproml.exact():
        w, n = torch._weight_norm_interface(v, g, 0)
        n = n.clamp(max=3e38)
        lengths = reals(n)[:, 0]
        rows = [r * x / o.sqrt(o.total(r * r)) for r, x in zip(a, b)]
        check(w, np.array(rows, dtype=object), any_zero=True)
        for e in (torch.ones_like(v), w.clone(), v * 0.5):  # the last two cancel
            sums = [o.total(r * x) for r, x in zip(reals(e), a)]
            of_v = [(q - r * (s / (m * m))) * (x / m)
                    for q, r, s, m, x in zip(reals(e), a, sums, lengths, b)]  # fmt: skip
            found = torch.ops.aten._weight_norm_interface_backward(e, v, g, n, 0)
            check(found[0], np.array(of_v, dtype=object), any_zero=True)
            of_g = [s / m for s, m in zip(sums, lengths)]
            check(found[1][:, 0], np.array(of_g, dtype=object), any_zero=True)


def test_rows_that_have_no_length_are_nan():
    """As on the reference path, also beside rows that have one, and with infinities."""
    v, g = torch.zeros(4, 3), torch.ones(4, 1)
    v[1], v[2, 0] = 1.0, torch.inf
    with reproml.exact():
        w, n = torch._weight_norm_interface(v, g, 0)
        of_v, of_g = torch.ops.aten._weight_norm_interface_backward(torch.ones(4, 3), v, g, n, 0)
    for x in (w, of_v):
        assert x[0].isnan().all() and x[3].isnan().all() and x[1].isfinite().all()
    assert of_g[0].isnan().all() and of_g[1].item() == pytest.approx(3**0.5)


def test_distances_of_batches_match_reference(monkeypatch):
    """Infinite and NaN elements reach the same distances; the batches of x and y broadcast."""
    x, y = numbers((3, 1, 5, 9), "normal", 1), numbers((2, 4, 9), "normal", 2)
    x[0, 0, 1, 2], x[1, 0, 0, 0], y[0, 3, 8] = torch.inf, torch.nan, -torch.inf
    g = numbers((3, 2, 5, 4), "normal", 3)
    distance = norms.cdist(x, y, 2.0)
    found = distance, norms.cdist_backward(g, x.expand(3, 2, 5, 9), y, 2.0, distance)
    monkeypatch.setattr(kernels, "library", None)
    expected = (
        norms.cdist(x, y, 2.0),
        norms.cdist_backward(g, x.expand(3, 2, 5, 9), y, 2.0, distance),
    )
    for one, other in zip(found, expected):
        assert one.shape == other.shape and torch.equal(one.isnan(), other.isnan())
        assert same_bits(one.nan_to_num(1.5), other.nan_to_num(1.5))


@pytest.mark.parametrize("p", [1.5, 3.0, 0.5])
def test_gradient_of_an_infinite_distance(p):
    x, y = torch.tensor([[2.0**127, 1.0]]), torch.tensor([[-(2.0**127), 0.0], [2.0**126, 1.0]])
    of_both = norms.cdist_backward(torch.ones(1, 2), x, y, p, torch.tensor([[torch.inf, 2.0**126]]))
    of_first = norms.cdist_backward(torch.ones(1, 1), x, y[:1], p, torch.tensor([[torch.inf]]))
    assert of_first.tolist() == [[0.0, 0.0] if p > 1 else [torch.inf, torch.inf]]
    assert of_both.tolist() == [[1.0, 0.0] if p > 1 else [torch.inf, torch.inf]]


def test_norms_and_draws_of_nothing():
    empty, wide = torch.empty(3, 0), torch.empty(0, 3, requires_grad=True)
    with reproml.exact():
        assert torch.cdist(empty, empty, p=torch.inf).tolist() == [[0.0] * 3] * 3
        assert torch.nn.functional.pdist(empty, torch.inf).tolist() == [0.0] * 3
        assert torch._sample_dirichlet(empty).shape == (3, 0)
        w = torch._weight_norm(wide, torch.empty(0, 1), 0)
        (gradient,) = torch.autograd.grad(w.sum(), wide)
    assert w.shape == gradient.shape == (0, 3)
