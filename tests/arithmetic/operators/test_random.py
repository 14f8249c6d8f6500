"""Test random numbers: PyTorch's own stream, passed to exact formulas."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml
from tests.arithmetic.strategies import LAYOUTS, lay_out
from verification import oracle as o
from verification.oracle import Real, check, float32_scalar, reals, same_bits

few = settings(max_examples=15)
shapes = st.sampled_from([(), (0,), (1,), (15,), (16,), (17,), (40,), (3, 7), (2, 3, 4, 5)])
layouts = st.sampled_from([*LAYOUTS, "channels_last"])


def empty(shape, layout):
    x = torch.zeros(shape)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    return lay_out(x, layout)


def both(draw, seed=5):
    """Return `draw()` natively and under exact(), and check that both consume the same stream."""
    results = []
    for inside in (False, True):
        torch.manual_seed(seed)
        if inside:
            with reproml.exact():
                results.append(draw())
        else:
            results.append(draw())
        results.append(torch.rand(1))
    native, after, exact, after_exact = results
    assert torch.equal(after, after_exact), "the next random numbers differ"
    return native, exact


@few
@given(shapes)
def test_rand_matches_pytorch(shape):
    assert same_bits(*both(lambda: torch.rand(shape)))
    assert same_bits(*both(lambda: torch.rand_like(torch.zeros(shape))))
    x = torch.rand(1000).double() * 2**24
    assert torch.equal(x, x.round())


@few
@given(shapes, layouts)
def test_uniform_consumes_stream_like_pytorch(shape, layout):
    assert same_bits(*both(lambda: empty(shape, layout).uniform_()))


@few
@given(st.floats(-10, 10), st.floats(0, 10))
def test_uniform_is_rounded_once(low, width):
    u, _ = both(lambda: torch.empty(20).uniform_())
    native, exact = both(lambda: torch.empty(20).uniform_(low, low + width))
    a, b = float32_scalar(low), float32_scalar(low + width)
    check(exact, reals(u) * (b - a) + a)
    assert torch.allclose(native, exact, rtol=1e-5, atol=1e-6)


@few
@given(shapes, layouts)
def test_normal_is_close_to_pytorch(shape, layout):
    """The results differ from PyTorch's by rounding errors only."""
    for draw in (
        lambda: torch.randn(shape),
        lambda: torch.randn_like(torch.zeros(shape)),
        lambda: empty(shape, layout).normal_(3, 0.5),
        lambda: torch.normal(torch.full(shape, 2.0), torch.full(shape, 0.1)),
        lambda: torch.normal(1.0, 2.0, shape),
    ):
        native, exact = both(draw)
        assert torch.allclose(native, exact, rtol=2e-5, atol=2e-6)


def test_normal_is_rounded_once():
    torch.manual_seed(1)
    u = reals(torch.rand(32)).reshape(2, 2, 8)
    torch.manual_seed(1)
    with reproml.exact():
        x = torch.empty(32).normal_(0.25, 3)
    expected = np.empty((2, 2, 8), dtype=object)
    for i, j in np.ndindex(2, 8):
        radius = o.sqrt(-2 * o.log1p(-u[i, 0, j]))
        turn = 2 * u[i, 1, j].mpf
        expected[i, 0, j] = radius * Real(o.mp.cospi(turn)) * 3 + Fraction(1, 4)
        expected[i, 1, j] = radius * Real(o.mp.sinpi(turn)) * 3 + Fraction(1, 4)
    check(x, expected.reshape(32))


@few
@given(
    shapes,
    layouts,
    st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.7, 1.0]) | st.floats(0, 1),
    st.booleans(),
)
def test_native_dropout_matches_cpu_dropout(shape, layout, p, train):
    """F.dropout is decomposed on the CPU and calls native_dropout, which is tested here, on a GPU."""
    start, g = empty(shape, layout).normal_(), torch.randn(shape)
    start.masked_fill_(start < -1, -0.0)

    def run(dropout):
        torch.manual_seed(5)
        x = start.clone().requires_grad_()
        with reproml.exact():
            y = dropout(x)
            y.backward(g)
            return y.detach(), x.grad, torch.rand(1)

    decomposed = run(lambda x: torch.nn.functional.dropout(x, p, train))
    native = run(lambda x: torch.native_dropout(x, p, train)[0])
    assert all(map(same_bits, decomposed, native))
    with reproml.exact():
        _, mask = torch.native_dropout(torch.ones(shape), p, train)
    assert mask.dtype is torch.bool and mask.shape == start.shape


@few
@given(shapes, layouts, st.floats(0, 1))
def test_bernoulli_matches_pytorch(shape, layout, p):
    native, exact = both(lambda: empty(shape, layout).bernoulli_(p))
    assert native.shape == exact.shape
    torch.manual_seed(5)
    expected = (torch.rand(shape, dtype=torch.float64) < p).float()
    assert same_bits(native, exact)
    if layout == "plain":
        assert same_bits(exact, expected)
    probabilities = torch.full(shape, p)
    assert same_bits(*both(lambda: torch.bernoulli(probabilities)))


@few
@given(shapes, layouts, st.sampled_from([1.0, 0.3, 7.0]))
def test_exponential_is_rounded_once(shape, layout, rate):
    native, exact = both(lambda: empty(shape, layout).exponential_(rate))
    assert torch.allclose(native, exact, rtol=2e-5, atol=2e-6)
    if layout != "plain":
        return
    torch.manual_seed(5)
    u = torch.rand(shape, dtype=torch.float64)
    check(exact, -np.vectorize(o.log1p, otypes=[object])(-reals(u)) / float32_scalar(rate)
          if u.numel() else np.empty(shape, dtype=object))  # fmt: skip


@few
@given(shapes, layouts)
def test_integers_match_pytorch(shape, layout):
    """The bits equal PyTorch's on the CPU."""
    for draw in (
        lambda: torch.randint(0, 10, shape),
        lambda: torch.randint(-5, 2**40, shape),
        lambda: torch.randint(0, 7, shape, dtype=torch.float32),
        lambda: empty(shape, layout).random_(),
        lambda: empty(shape, layout).random_(3, 17),
        lambda: empty(shape, layout).to(torch.int64).random_(9),
        lambda: torch.randperm(len(shape) * 10),
    ):
        assert same_bits(*both(draw))


def test_multinomial_matches_pytorch():
    weights = torch.tensor([[1.0, 2.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    for count in (1, 2, 3):
        native, exact = both(lambda count=count: torch.multinomial(weights, count))
        assert torch.equal(native, exact)
    with pytest.raises(reproml.NotExactError), reproml.exact():
        torch.multinomial(weights, 2, replacement=True)


numbers = st.one_of(st.integers(-20, 20), st.floats(-20, 20).map(lambda x: round(x, 2)))


@settings(max_examples=60)
@given(
    numbers, numbers, st.one_of(st.integers(1, 5), st.floats(0.01, 3).map(lambda x: round(x, 2)))
)
def test_arange_is_rounded_once(start, end, step):
    if step < 0.01 or end < start:
        return
    native, exact = both(lambda: torch.arange(start, end, step))
    assert native.shape == exact.shape and native.dtype is exact.dtype
    if exact.dtype is torch.float32:
        check(exact, [Real(Fraction(start) + i * Fraction(step)) for i in range(len(exact))])


@few
@given(numbers, numbers, st.integers(0, 12))
def test_linspace_is_rounded_once(start, end, steps):
    with reproml.exact():
        x = torch.linspace(start, end, steps)
    slope = (Fraction(end) - Fraction(start)) / max(steps - 1, 1)
    check(x, [Real(Fraction(start) + i * slope) for i in range(steps)])


def test_default_dtype_float64_raises_not_exact_error():
    torch.manual_seed(0)
    expected = torch.empty(3).uniform_()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with reproml.exact():
            assert torch.equal(torch.empty(3, dtype=torch.float32).uniform_(), expected)
            with pytest.raises(reproml.NotExactError):
                torch.rand(3)
    finally:
        torch.set_default_dtype(torch.float32)


def test_error_without_operands_is_well_formed():
    with pytest.raises(reproml.NotExactError) as caught, reproml.exact():
        torch.randn(3, dtype=torch.float64)
    message = str(caught.value)
    assert "has no exact result, called at " in message and "()," not in message
    assert ".;" not in message and message.endswith("; use float32.")  # one remedy
