"""Test random numbers: PyTorch's own stream, passed to exact formulas."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.rounding import gamma
from reproml.arithmetic.operators import gamma_draws, random
from reproml.torch_internals import UnknownPyTorchError
from tests.arithmetic.strategies import LAYOUTS, lay_out
from verification import oracle as o
from verification.oracle import Real, check, float32_scalar, reals, rounded, same_bits

few = settings(max_examples=15)
shapes = st.sampled_from([(), (0,), (1,), (15,), (16,), (17,), (40,), (3, 7), (2, 3, 4, 5)])
layouts = st.sampled_from([*LAYOUTS, "channels_last"])


def empty(shape, layout):
    x = torch.zeros(shape)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    return lay_out(x, layout)


def both(draw, *layout, seed=5):
    """Return `draw()` natively and under exact(), and check that both consume the same stream.

    With a layout: `draw("plain")` natively, and draw(layout) under exact(), which has the same numbers.
    """
    results = []
    for inside in (False, True):
        torch.manual_seed(seed)
        if inside:
            with reproml.exact():
                results.append(draw(*layout))
        else:
            results.append(draw("plain") if layout else draw())
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
    assert same_bits(*both(lambda layout: empty(shape, layout).uniform_(), layout))


@few
@given(st.floats(-10, 10), st.floats(0, 10))
def test_uniform_is_rounded_once(low, width):
    u, _ = both(lambda: torch.empty(20).uniform_())
    native, exact = both(lambda: torch.empty(20).uniform_(low, low + width))
    a, b = float32_scalar(low), float32_scalar(low + width)
    check(exact, reals(u) * (b - a) + a)
    assert torch.allclose(native, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
def test_rrelu_is_rounded_once(layout):
    """It draws a number for each x <= 0, in logical order; natively in the order of memory."""
    start, low, high = torch.linspace(-2, 1, 120).reshape(2, 3, 4, 5), 0.1, 0.3
    start[0, 0, 0, :2] = torch.tensor([-0.0, math.nan])
    values = empty(start.shape, layout).copy_(start)
    for train in (False, True):
        native, exact = both(lambda layout, train=train: torch.rrelu(
            start if layout == "plain" else values, low, high, train), layout)  # fmt: skip
        assert torch.allclose(native, exact, rtol=1e-6, equal_nan=True)
    torch.manual_seed(5)
    negative = start <= 0
    draws = torch.rand(int(negative.sum()), dtype=torch.float64)
    noise = torch.zeros(start.shape)
    torch.manual_seed(5)
    with reproml.exact():
        exact = torch.ops.aten.rrelu_with_noise(values, noise, low, high, True)
        assert torch.ops.aten.rrelu_with_noise_(values, noise.clone(), low, high, False) is values
    slopes = [Real(u) * (Real(high) - Real(low)) + Real(low) for u in draws.tolist()]
    check(noise[negative], np.array(slopes, dtype=object))
    assert (noise[~negative] == 1).all()
    check(exact, np.where(negative, reals(start) * reals(noise), reals(start)))


def test_like_draws_from_the_generator():
    """Newer versions of PyTorch have overloads with a generator."""
    generator = torch.Generator()
    for draw, like in ((torch.rand, torch.rand_like), (torch.randn, torch.randn_like)):
        with reproml.exact():
            expected = draw(7, generator=generator.manual_seed(3))
            if "generator" in torch.ops.aten.rand_like.overloads():
                found = like(
                    torch.empty(7),
                    # type: ignore[call-arg]
                    generator=generator.manual_seed(3),
                )
            else:  # as the definition would be called
                found = random.like(draw)(torch.empty(7), generator=generator.manual_seed(3))
        assert same_bits(found, expected)


@pytest.mark.parametrize("mean, std, low, high", [(0, 0.02, -2, 2), (0.5, 2, -1, 3), (0, 1, -9, 9)])
def test_trunc_normal_rounds_each_step_once(mean, std, low, high):
    def bound(x):
        return 2 * ((1 + float(o.mp.erf((x - mean) / std / math.sqrt(2)))) / 2) - 1

    _, u = both(lambda: torch.empty(300).uniform_(bound(low), bound(high)))

    def draw():
        return torch.nn.init.trunc_normal_(torch.empty(300), mean, std, low, high)

    native = None
    if "erfinv_" in inspect.getsource(torch.nn.init._no_grad_trunc_normal_):
        native, exact = both(draw)
    else:  # a version of PyTorch with another algorithm
        torch.manual_seed(5)
        with reproml.exact():
            exact = draw()
    scale, shift = float32_scalar(std * math.sqrt(2)), float32_scalar(mean)
    expected = [o.rounded(o.rounded(o.rounded(o.erfinv(v)) * scale) + shift) for v in reals(u)]
    assert same_bits(exact, torch.tensor([o.float_of(v) for v in expected]).clamp(low, high))
    assert native is None or torch.allclose(native, exact, rtol=1e-4, atol=1e-5)


@few
@given(shapes, layouts)
def test_normal_is_close_to_pytorch(shape, layout):
    """The results differ from PyTorch's by rounding errors only."""
    for draw in (
        lambda layout: torch.randn(shape),
        lambda layout: torch.randn_like(empty(shape, layout)),
        lambda layout: empty(shape, layout).normal_(3, 0.5),
        lambda layout: torch.normal(torch.full(shape, 2.0), torch.full(shape, 0.1)),
        lambda layout: torch.normal(1.0, 2.0, shape),
    ):
        native, exact = both(draw, layout)
        assert torch.allclose(native, exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_normal_is_rounded_once(dtype):
    torch.manual_seed(1)
    u = reals(torch.rand(32, dtype=dtype)).reshape(2, 2, 8)
    torch.manual_seed(1)
    with reproml.exact():
        x = torch.empty(32, dtype=dtype).normal_(0.25, 3)
    expected = np.empty((2, 2, 8), dtype=object)
    for i, j in np.ndindex(2, 8):
        radius = o.sqrt(-2 * o.log1p(-u[i, 0, j]))
        turn = 2 * u[i, 1, j].mpf
        expected[i, 0, j] = radius * Real(o.mp.cospi(turn)) * 3 + Fraction(1, 4)
        expected[i, 1, j] = radius * Real(o.mp.sinpi(turn)) * 3 + Fraction(1, 4)
    with o.rounding_to(dtype):
        check(x, expected.reshape(32))


def box_muller(v: float, u: float) -> tuple[Real, Real]:
    radius, turn = o.sqrt(-2 * o.log1p(-Real(Fraction(u)))), 2 * Real(Fraction(v)).mpf
    return radius * Real(o.mp.cospi(turn)), radius * Real(o.mp.sinpi(turn))


@few
@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(0, 2**20))
def test_spare_normal_number_is_kept(counts, seed):
    """In the generator, as PyTorch does, until the next call; all numbers are rounded once."""

    def draw() -> list[torch.Tensor]:
        return [torch.randn(n) for n in counts]

    torch.manual_seed(seed)
    native, state = draw(), torch.get_rng_state()
    torch.manual_seed(seed)
    with reproml.exact():
        exact = draw()
    left = torch.get_rng_state()
    for x, y in zip(native, exact):
        assert torch.allclose(x, y, rtol=2e-5, atol=2e-6)
    spare = slice(5024, 5032)  # a float64, whose last bits may differ
    x, y = (s[spare].view(torch.float64) for s in (state, left))
    assert torch.allclose(x, y, rtol=1e-14)
    state[spare] = left[spare]
    assert torch.equal(state, left)

    torch.manual_seed(seed)
    kept: list[Real] = []
    for x in exact:
        if len(x) >= 16:
            torch.randn(len(x))
            continue
        while len(kept) < len(x):
            kept += box_muller(*torch.rand(2, dtype=torch.float64).tolist())
        check(x, np.array(kept[: len(x)], dtype=object))
        kept = kept[len(x) :]


def test_spare_normal_number_survives_state():
    with reproml.exact():
        generator = torch.Generator().manual_seed(3)
        torch.randn(3, generator=generator)
        state = generator.get_state()
        first = torch.empty(2).normal_(1, 2, generator=generator)
        generator.set_state(state)
        assert same_bits(torch.empty(2).normal_(1, 2, generator=generator), first)
        generator.manual_seed(3)  # forgets it
        again = torch.randn(3, generator=generator)
        assert same_bits(again, torch.randn(3, generator=torch.Generator().manual_seed(3)))


def test_unknown_generator_state_is_an_error(monkeypatch):
    monkeypatch.setattr(random, "_STATE", 5057)
    with pytest.raises(UnknownPyTorchError, match="get_state"), reproml.exact():
        torch.randn(3)


def with_gradient(dropout: Any, start: torch.Tensor, g: torch.Tensor) -> tuple[Any, ...]:
    """Return the result, the gradient and the next random number of a function of a copy of `start`."""
    torch.manual_seed(5)
    x = start.clone().requires_grad_()
    with reproml.exact():
        y = dropout(x)
        y.backward(g)
        return y.detach(), x.grad, torch.rand(1)


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
    decomposed = with_gradient(lambda x: torch.nn.functional.dropout(x, p, train), start, g)
    native = with_gradient(lambda x: torch.native_dropout(x, p, train)[0], start, g)
    assert all(map(same_bits, decomposed, native))
    with reproml.exact():
        _, mask = torch.native_dropout(torch.ones(shape), p, train)
    assert mask.dtype is torch.bool and mask.shape == start.shape


@few
@given(shapes, layouts, st.floats(0, 1))
def test_bernoulli_matches_pytorch(shape, layout, p):
    native, exact = both(lambda layout: empty(shape, layout).bernoulli_(p), layout)
    torch.manual_seed(5)
    expected = (torch.rand(shape, dtype=torch.float64) < p).float()
    assert same_bits(native, exact)
    assert same_bits(exact, expected)
    probabilities = torch.full(shape, p)
    assert same_bits(*both(lambda: torch.bernoulli(probabilities)))


@few
@given(shapes, layouts, st.sampled_from([1.0, 0.3, 7.0]))
def test_exponential_is_rounded_once(shape, layout, rate):
    native, exact = both(lambda layout: empty(shape, layout).exponential_(rate), layout)
    assert torch.allclose(native, exact, rtol=2e-5, atol=2e-6)
    torch.manual_seed(5)
    u = torch.rand(shape, dtype=torch.float64)
    check(exact, -np.vectorize(o.log1p, otypes=[object])(-reals(u)) / float32_scalar(rate)
          if u.numel() else np.empty(shape, dtype=object))  # fmt: skip


@few
@given(shapes, st.sampled_from([(0.0, 1.0), (0.3, 7.0)]))
def test_cauchy_is_rounded_once(shape, parameters):
    native, exact = both(lambda: torch.empty(shape).cauchy_(*parameters))
    assert torch.allclose(native, exact, rtol=1e-4, atol=1e-4)
    torch.manual_seed(5)
    u = torch.rand(shape, dtype=torch.float64).reshape(-1).tolist()
    median, sigma = map(float32_scalar, parameters)
    tangents = [Real(o.mp.tan(o.mp.pi * (o.mp.mpf(v) - 0.5))) for v in u]
    check(exact.reshape(-1), [median + sigma * t for t in tangents])


@few
@given(shapes, layouts)
def test_integers_match_pytorch(shape, layout):
    """The bits equal PyTorch's on the CPU."""
    for draw in (
        lambda layout: torch.randint(0, 10, shape),
        lambda layout: torch.randint(-5, 2**40, shape),
        lambda layout: torch.randint(0, 7, shape, dtype=torch.float32),
        lambda layout: empty(shape, layout).random_(),
        lambda layout: empty(shape, layout).random_(3, 17),
        lambda layout: empty(shape, layout).to(torch.int64).random_(9),
        lambda layout: torch.randperm(len(shape) * 10),
        lambda layout: torch.randint_like(empty(shape, layout), 9),
        lambda layout: torch.randint_like(empty(shape, layout), -3, 17, dtype=torch.int64),
    ):
        assert same_bits(*both(draw, layout))


def test_multinomial_matches_pytorch():
    weights = torch.tensor([[1.0, 2.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    for count in (1, 2, 3):
        native, exact = both(lambda count=count: torch.multinomial(weights, count))
        assert torch.equal(native, exact)
        native, exact = both(lambda count=count: torch.multinomial(weights.double(), count))
        assert torch.equal(native, exact)


@few
@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=9),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_multinomial_with_replacement_is_the_exact_inverse(weights, dtype):
    p = torch.stack(
        [torch.tensor([*weights, 1e-3], dtype=dtype), torch.ones(len(weights) + 1, dtype=dtype)]
    )
    _, exact = both(lambda: torch.multinomial(p, 40, replacement=True))
    torch.manual_seed(5)
    draws = torch.rand(2, 40, dtype=torch.float64)
    for row, us, found in zip(p.tolist(), draws.tolist(), exact.tolist()):
        sums = [sum(map(Fraction, row[: i + 1])) for i in range(len(row))]
        reached = [[s >= Fraction(u) * sums[-1] and s > 0 for s in sums] for u in us]
        assert found == [each.index(True) for each in reached]


def test_samplers_and_categorical_distributions_match_pytorch():
    sampler = torch.utils.data.WeightedRandomSampler([0.25, 0.5, 0.0, 0.25], 60)
    native, exact = both(lambda: torch.tensor(list(sampler)))
    assert torch.equal(native, exact) and set(exact.tolist()) == {0, 1, 3}
    categorical = torch.distributions.Categorical(torch.tensor([[0.25, 0.75], [0.5, 0.5]]))
    native, exact = both(lambda: categorical.sample((30,)))
    assert torch.equal(native, exact) and exact.shape == (30, 2)


class GammaOracle:
    """Draw as `gamma_draws._draws` is documented, with mpmath's numbers and roundings of our own."""

    def __init__(self):
        self.spare = None

    def round(self, x):
        with o.mp.workprec(53):
            return +x

    def to_odd(self, x):
        if not x:
            return x
        exponent = o.mp.mpf(2) ** (o.mp.floor(o.mp.log(abs(x), 2)) - 52)
        quotient = abs(x) / exponent
        digits = int(o.mp.floor(quotient))
        digits += digits % 2 == 0 and quotient != digits
        return o.mp.sign(x) * digits * exponent

    def uniform(self):
        return o.mp.mpf(torch.rand((), dtype=torch.float64).item())

    def normal(self):
        found, self.spare = self.spare, None
        if found is not None:
            return found
        v, u = self.uniform(), self.uniform()
        radius = o.mp.sqrt(-2 * o.mp.log1p(-u))
        self.spare = self.to_odd(radius * o.mp.sinpi(2 * v))
        return self.to_odd(radius * o.mp.cospi(2 * v))

    def draw(self, shape):
        r, mp = self.round, o.mp
        a, scale = mp.mpf(shape), mp.mpf(1)
        if not a:
            return a
        if a < 1:
            scale = r(mp.power(r(1 - self.uniform()), r(1 / a)))
            a = r(a + 1)
        d = r(a - r(mp.mpf(1) / 3))
        c = r(1 / r(mp.sqrt(r(9 * d))))
        while True:
            z = self.normal()
            y = r(1 + r(c * z))
            if y <= 0:
                continue
            v = r(r(y * y) * y)
            u = r(1 - self.uniform())
            right = r(r(r(1 - v) + r(mp.log(v))) * d)
            if r(mp.log(u)) < r(r(r(z * z) / 2) + right):
                return r(r(scale * d) * v)


SHAPES = torch.tensor([[0.3, 1.0, 2.5], [40.0, 0.05, 1e-3], [1e6, 3.0, 0.9]])


@pytest.mark.parametrize("seed", [0, 5])
def test_gamma_is_the_rejection_method_in_rounded_steps(seed):
    tiny = torch.finfo(torch.float32).tiny
    x = SHAPES if seed else torch.cat([SHAPES, torch.zeros(1, 3)])
    native, exact = both(lambda: torch._standard_gamma(x), seed=seed)
    assert torch.allclose(native, exact, rtol=1e-5)
    torch.manual_seed(seed)
    oracle = GammaOracle()
    expected = [max(oracle.draw(a), tiny) for a in x.reshape(-1).tolist()]
    check(exact.reshape(-1), [Real(v) for v in expected])


def _every_shape():
    draw = torch.Generator().manual_seed(2)
    size = torch.exp(torch.rand(30, generator=draw) * 40 - 5)
    return torch.cat([size, torch.tensor([0.0, 1.0, 0.999, 2.0**-20, 1e20, 1e30, 0.34, 4e12])])


@pytest.mark.parametrize("path", ["usual", "exact decisions", "reference"])
def test_gamma_of_every_shape_takes_as_many_numbers_as_single_draws(path, monkeypatch):
    x, oracle, tiny = _every_shape(), GammaOracle(), torch.finfo(torch.float32).tiny
    torch.manual_seed(3)
    expected = [max(oracle.draw(a), tiny) for a in x.tolist()]
    following = torch.rand(2)
    if path == "exact decisions":
        monkeypatch.setattr(gamma_draws, "_passes", lambda *_: gamma_draws._UNKNOWN)
        decide = gamma_draws._decisions_one_by_one
        monkeypatch.setattr(gamma_draws, "_compiled_decisions", decide)
    if path == "reference":
        monkeypatch.setattr(kernels, "library", None)
    torch.manual_seed(3)
    with reproml.exact():
        check(torch._standard_gamma(x), [Real(v) for v in expected])
        if oracle.spare is not None:
            check(torch.empty(1).normal_(), [Real(oracle.spare)])
        assert torch.equal(torch.rand(2), following)


def test_decisions_about_gammas_are_known_but_for_few(monkeypatch):
    found = []

    def passes(*numbers):
        found.append(numbers)
        return True

    monkeypatch.setattr(gamma_draws, "_passes_exactly", passes)
    with reproml.exact():
        for x in (torch.rand(500) + 1e-3, torch.rand(500) * 1e7, torch.rand(500) * 1e30):
            torch._standard_gamma(x)
    assert len(found) < 3


@pytest.mark.skipif(kernels.library is None, reason="needs the C library")
@pytest.mark.parametrize("size", [0.5, 1.0, 1e5, 1e12, 1e30, 3e38])
@pytest.mark.parametrize("kept", [False, True])
def test_compiled_decisions_are_those_taken_one_by_one(size, kept, monkeypatch):
    """They take the same numbers of the stream, also if more are drawn in between."""
    x = torch.rand(3000, generator=torch.Generator().manual_seed(1)) * size
    x[::100] = 0
    stream = gamma_draws._Stream

    def draw():
        torch.manual_seed(4)
        if kept:
            torch.empty(1).normal_()
        return torch._standard_gamma(x), torch.empty(1).normal_(), torch.rand(2)

    with reproml.exact():
        found = draw()
        monkeypatch.setattr(gamma_draws, "_Stream", lambda generator, count: stream(generator, 40))
        again = draw() if size == 1.0 else found
        monkeypatch.setattr(gamma_draws, "_compiled_decisions", gamma_draws._decisions_one_by_one)
        monkeypatch.setattr(gamma_draws, "_Stream", stream)
        expected = draw()
    for a, b, c in zip(found, again, expected):
        assert same_bits(a, c) and same_bits(b, c)


def test_near_logarithm_is_within_its_bound():
    for x in [1 + k * 2.0**-52 for k in (-9, -1, 1, 9)] + [
        0.7071,
        0.7072,
        1.5,
        80.0,
        1e-9,
        1 - 1e-9,
    ]:
        exact = o.mp.log(o.mp.mpf(x))
        assert abs(gamma_draws._near_log(x) - exact) < abs(exact) * o.mp.mpf(2) ** -48


def test_ratios_that_fail_the_test_are_rounded_once(monkeypatch):
    results = []
    for bound in (gamma, lambda n: 1.0):
        monkeypatch.setattr(gamma_draws, "gamma", bound)
        torch.manual_seed(1)
        with reproml.exact():
            results.append(torch._sample_dirichlet(torch.rand(40, 7) + 0.01))
    assert same_bits(*results)


@pytest.mark.parametrize("seed", [0, 5])
def test_dirichlet_is_a_ratio_of_gammas_rounded_once(seed):
    native, exact = both(lambda: torch._sample_dirichlet(SHAPES), seed=seed)
    assert torch.allclose(native, exact, rtol=1e-5, atol=1e-37)
    torch.manual_seed(seed)
    oracle, tiny = GammaOracle(), o.mp.mpf(torch.finfo(torch.float32).tiny)
    expected = []
    for row in SHAPES.tolist():
        draws = [oracle.draw(a) for a in row]
        expected += [min(max(g / sum(draws), tiny), 1 - o.mp.mpf(2) ** -24) for g in draws]
    check(exact.reshape(-1), [Real(v) for v in expected])


def test_distributions_that_draw_gammas_run():
    one, half = torch.ones(3), torch.full((3,), 0.5)
    D = torch.distributions  # noqa: N806
    for distribution in (D.Gamma(half, one), D.Beta(half, one), D.Dirichlet(half), D.StudentT(one)):
        native, exact = both(lambda distribution=distribution: distribution.sample((4,)))
        assert torch.allclose(native, exact, rtol=1e-5)
    with reproml.exact():
        for x in (-one, one * math.inf, one * math.nan):
            for draw in (torch._standard_gamma, torch._sample_dirichlet):
                with pytest.raises(RuntimeError, match="expects"):
                    draw(x)
        for tiny in (torch.full((2,), 1e-40), torch.full((2,), 1e-30)):
            assert ((torch._sample_dirichlet(tiny) > 0) & (torch._sample_dirichlet(tiny) < 1)).all()


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


def test_default_dtype_float64_draws_53_bits():
    torch.manual_seed(0)
    expected = torch.empty(3).uniform_()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with reproml.exact():
            assert torch.equal(torch.empty(3, dtype=torch.float32).uniform_(), expected)
            for draw in (
                lambda: torch.rand(3),
                lambda: torch.rand_like(torch.ones(3)),
                lambda: torch.empty(3).uniform_(),
            ):
                torch.manual_seed(0)
                found = draw()
                torch.manual_seed(0)
                assert same_bits(found, torch._C._VariableFunctions.rand(3, dtype=torch.float64))
            with o.rounding_to(torch.float64):
                check(torch.arange(0, 1, 0.1), [Real(Fraction(0.1) * i) for i in range(10)])
                check(torch.linspace(0, 1, 4), [Real(Fraction(i, 3)) for i in range(4)])
            assert torch.nn.Linear(2, 2).weight.dtype is torch.float64
            assert torch.empty((), dtype=torch.int64).random_().dtype is torch.int64
            assert torch.rand(3, dtype=torch.float32).dtype is torch.float32
            torch.manual_seed(5)
            first, second = torch.randn(3), torch.empty(2).normal_(1, 2)
        torch.manual_seed(5)
        pairs = [box_muller(*torch.rand(2).tolist()) for _ in range(3)]
        z = np.array([*pairs[0], *pairs[1], *pairs[2]], dtype=object)
        with o.rounding_to(torch.float64):
            check(first, z[:3])
            check(second, np.array([1 + 2 * rounded(z[3]), 1 + 2 * z[4]], dtype=object))
    finally:
        torch.set_default_dtype(torch.float32)


F64 = torch.float64


@few
@given(shapes, layouts, st.floats(0, 1))
def test_bernoulli_of_float64_matches_pytorch(shape, layout, p):
    native, exact = both(lambda layout: empty(shape, layout).to(F64).bernoulli_(p), layout)
    torch.manual_seed(5)
    assert same_bits(native, exact) and same_bits(exact, (torch.rand(shape, dtype=F64) < p).to(F64))
    assert same_bits(*both(lambda: torch.bernoulli(torch.full(shape, p, dtype=F64))))
    # The numbers that are drawn have the dtype of the probabilities.
    for x, q in ((F64, torch.float32), (torch.float32, F64)):
        for probabilities in (torch.full(shape, p, dtype=q), torch.tensor(p, dtype=q)):
            assert same_bits(
                *both(lambda x=x, p=probabilities: torch.zeros(shape, dtype=x).bernoulli_(p))
            )


@few
@given(shapes, st.sampled_from([0.0, 0.1, 0.3, 1.0]) | st.floats(0, 1))
def test_dropout_of_float64_is_rounded_once(shape, p):
    start, g = torch.randn(2, *shape, dtype=F64)
    results = []
    for dropout in (
        lambda x: torch.nn.functional.dropout(x, p),
        lambda x: torch.native_dropout(x, p, True)[0],
    ):
        torch.manual_seed(5)
        x = start.clone().requires_grad_()
        with reproml.exact():
            y = dropout(x)
            y.backward(g)
        results.append((y.detach(), x.grad))
    assert all(map(same_bits, *results))
    torch.manual_seed(5)
    kept = torch.rand(shape, dtype=F64) < 1 - p if 0 < p < 1 else torch.full(shape, p == 0)
    with o.rounding_to(F64):
        scale = o.rounded(np.array([1 / Real(1 - p)], dtype=object))[0] if p < 1 else Real(0)
        for found, x in zip(results[0], (start, g)):
            check(found, reals(x) * kept.long().numpy().astype(object) * scale, True)


@pytest.mark.parametrize("rate", [1.0, 0.3, 7.0])
def test_exponential_and_cauchy_numbers_of_float64_are_rounded_once(rate):
    native, exact = both(lambda: torch.empty(40, dtype=F64).exponential_(rate))
    assert torch.allclose(native, exact)
    torch.manual_seed(5)
    u = torch.rand(40, dtype=F64)
    with o.rounding_to(F64):
        check(exact, [-o.log1p(-Real(v)) / Real(rate) for v in u.tolist()])
    native, exact = both(lambda: torch.empty(40, dtype=F64).cauchy_(0.3, rate))
    assert torch.allclose(native, exact)
    tangents = [Real(o.mp.tan(o.mp.pi * (o.mp.mpf(v) - 0.5))) for v in u.tolist()]
    with o.rounding_to(F64):
        check(exact, [Real(0.3) + Real(rate) * t for t in tangents])


def test_trunc_normal_of_float64_rounds_each_step_once():
    mean, std, low, high = 0.3, 0.7, -0.75, 1.25
    torch.manual_seed(5)
    with reproml.exact():
        exact = torch.nn.init.trunc_normal_(torch.empty(40, dtype=F64), mean, std, low, high)
    ends = [
        2 * ((1 + float(o.mp.erf((x - mean) / std / math.sqrt(2)))) / 2) - 1 for x in (low, high)
    ]
    torch.manual_seed(5)
    with reproml.exact():
        u = torch.empty(40, dtype=F64).uniform_(*ends)
    with o.rounding_to(F64):
        scaled = [o.rounded(o.rounded(o.erfinv(v)) * Real(std * math.sqrt(2))) for v in reals(u)]
        expected = [o.float_of(o.rounded(v + Real(mean))) for v in scaled]
    assert same_bits(exact, torch.tensor(expected, dtype=F64).clamp(low, high))


def test_rrelu_of_float64_is_rounded_once():
    x, low, high = torch.linspace(-2, 1, 30, dtype=F64), 0.1, 0.3
    native, exact = both(lambda: torch.rrelu(x, low, high, True))
    assert torch.allclose(native, exact)
    torch.manual_seed(5)
    u = torch.rand(int((x <= 0).sum()), dtype=F64).tolist()
    with o.rounding_to(F64):
        slopes = o.rounded(np.array([Real(v) * (Real(high) - Real(low)) + Real(low) for v in u]))
        check(exact[x <= 0], reals(x[x <= 0]) * slopes)
    assert same_bits(exact[x > 0], x[x > 0])


def test_error_without_operands_is_well_formed():
    with pytest.raises(reproml.NotExactError) as caught, reproml.exact():
        torch.randn(3, dtype=torch.complex64)
    message = str(caught.value)
    assert "has no exact result, called at " in message and "()," not in message
    assert ".;" not in message and message.endswith("; use float32.")  # one remedy


# ---- bfloat16 and float16 ----------------------------------------------------------------------------

in_16_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def made_of_float32(dtype):
    """Return whether this PyTorch makes 16-bit numbers of 24 random bits, as 2.15 does."""
    x = torch.rand(64, dtype=dtype, generator=torch.Generator().manual_seed(0)).double() * 2**11
    return not torch.equal(x, x.round())


def below(x, low, high):
    return low if x == high else x


@in_16_bits
@pytest.mark.parametrize("low, high", [(0, 1), (-0.1, 0.3), (1, 1.5), (-2, 70000.0)])
def test_uniform_16_bit_numbers_are_rounded_once(dtype, low, high):
    n = 3000
    torch.manual_seed(5)
    u, after = reals(torch.rand(n)), torch.rand(1)
    torch.manual_seed(5)
    with reproml.exact():
        x = (
            torch.rand(n, dtype=dtype)
            if high == 1
            else torch.empty(n, dtype=dtype).uniform_(low, high)
        )
    assert torch.equal(torch.rand(1), after)
    with o.rounding_to(dtype):
        a, b = float32_scalar(low), float32_scalar(high)
        lowest, highest = o.float_of(a), o.float_of(b)
        exact = [below(o.float_of(y * (b - a) + a), lowest, highest) for y in u]
        check(x, [o.real(y) for y in exact])


@in_16_bits
@pytest.mark.parametrize("n", [1, 5, 16, 40])
def test_normal_16_bit_numbers_are_rounded_once(dtype, n):
    torch.manual_seed(1)
    expected: list[Real] = []
    if n < 16:
        while len(expected) < n:
            expected += box_muller(*torch.rand(2, dtype=torch.float64).tolist())
    else:
        for start in [*range(0, n - n % 16, 16), *[n - 16] * (n % 16 > 0)]:
            u = reals(torch.rand(16))
            radius = [o.sqrt(-2 * o.log1p(-y)) for y in u[:8]]
            turns = [2 * y.mpf for y in u[8:]]
            for i, turn in enumerate((o.mp.cospi, o.mp.sinpi)):
                at = start + 8 * i
                expected[at : at + 8] = [r * Real(turn(t)) for r, t in zip(radius, turns)]
    after = torch.rand(1)
    torch.manual_seed(1)
    with reproml.exact():
        x = torch.empty(n, dtype=dtype).normal_(0.25, 3)
    if n >= 16:
        assert torch.equal(torch.rand(1), after)
    with o.rounding_to(dtype):
        check(x, np.array([y * 3 + Fraction(1, 4) for y in expected[:n]], dtype=object))


@in_16_bits
@few
@given(shapes, layouts)
def test_16_bit_numbers_match_pytorch(dtype, shape, layout):
    """The bits equal PyTorch's on the CPU where these do not depend on its version."""

    def zeros(layout):
        return empty(shape, layout).to(dtype)

    chances = torch.rand(shape).to(dtype)
    draws = [
        lambda layout: zeros(layout).bernoulli_(0.3),
        lambda layout: zeros(layout).bernoulli_(chances),
        lambda layout: torch.bernoulli(chances),
        lambda layout: torch.randint(0, 10, shape, dtype=dtype),
        lambda layout: torch.randint_like(zeros(layout), -3, 17),
        lambda layout: torch.randperm(len(shape) * 10, dtype=dtype),
        lambda layout: zeros(layout).random_(),
        lambda layout: zeros(layout).random_(3, 17),
    ]
    if made_of_float32(dtype):
        draws += [
            lambda layout: torch.rand(shape, dtype=dtype),
            lambda layout: torch.rand_like(zeros("plain")),
        ]
    for draw in draws:
        assert same_bits(*both(draw, layout))


@in_16_bits
def test_exponential_16_bit_numbers_are_rounded_once(dtype):
    native, exact = both(lambda: torch.empty(300, dtype=dtype).exponential_(0.3))
    assert torch.allclose(native, exact, rtol=2e-2)
    torch.manual_seed(5)
    u = reals(torch.rand(300, dtype=torch.float64))
    with o.rounding_to(dtype):
        check(exact, [-o.log1p(-y) / float32_scalar(0.3) for y in u])


@in_16_bits
def test_rrelu_of_16_bits_is_rounded_once(dtype):
    start = torch.randn(300).to(dtype)
    torch.manual_seed(5)
    with reproml.exact():
        noise = torch.empty_like(start)
        x = torch.ops.aten.rrelu_with_noise(start, noise, 0.1, 0.7, True)
    torch.manual_seed(5)
    u = iter(torch.rand(300, dtype=torch.float64).tolist())
    a, b = Fraction(0.1), Fraction(0.7)
    expected, ratios = [], []
    for y in reals(start):
        ratio = Real(Fraction(next(u)) * (b - a) + a) if y.v <= 0 else o.real(1)
        ratios.append(ratio)
        expected.append(y * Real(o.float_of(ratio, torch.float32)))
    with o.rounding_to(dtype):
        check(noise, ratios)
        check(x, expected)


@in_16_bits
def test_multinomial_rounds_the_ratio_to_16_bits(dtype):
    """The first of equal ratios is drawn, as argmax returns it."""
    weights = torch.tensor([1.0, 1.0, 2.0, 0.0] * 50).to(dtype)
    for seed in range(20):
        torch.manual_seed(seed)
        q = torch.rand(200, dtype=torch.float64)
        with o.rounding_to(dtype):
            waits = [Real(o.float_of(-o.log1p(-y))) for y in reals(q)]
            ratios = [o.float_of(w / y) for w, y in zip(reals(weights), waits)]
        torch.manual_seed(seed)
        with reproml.exact():
            found = torch.multinomial(weights, 3)
        order = sorted(range(200), key=lambda i: -ratios[i])
        assert found.tolist() == order[:3]


@in_16_bits
@pytest.mark.parametrize("p", [0.1, 0.5, 0.7])
def test_native_dropout_of_16_bits_matches_cpu_dropout(dtype, p):
    start, g = torch.randn(200).to(dtype), torch.randn(200).to(dtype)
    decomposed = with_gradient(lambda x: torch.nn.functional.dropout(x, p), start, g)
    found = with_gradient(lambda x: torch.native_dropout(x, p, True)[0], start, g)
    assert all(map(same_bits, decomposed, found))


@in_16_bits
def test_default_dtype_of_16_bits_is_drawn(dtype):
    draws = [
        lambda kind: torch.rand(20, **kind),
        lambda kind: torch.randn(20, **kind),
        lambda kind: torch.normal(1.0, 2.0, (5,), **kind),
        lambda kind: torch.arange(0, 1, 0.1, **kind),
        lambda kind: torch.linspace(0, 1, 7, **kind),
    ]
    with reproml.exact():
        for draw in draws:
            torch.manual_seed(3)
            expected = draw({"dtype": dtype})
            torch.set_default_dtype(dtype)
            try:
                torch.manual_seed(3)
                assert same_bits(draw({}), expected)
                assert torch.arange(3).dtype is torch.int64
            finally:
                torch.set_default_dtype(torch.float32)


def test_integers_that_pytorch_rounds_twice_are_refused():
    with reproml.exact():
        for draw in (
            lambda: torch.randint(0, 2**25, (3,), dtype=torch.bfloat16),
            lambda: torch.empty(3, dtype=torch.bfloat16).random_(2**25),
            lambda: torch.randint_like(torch.ones(3, dtype=torch.bfloat16), 2**25),
        ):
            with pytest.raises(reproml.NotExactError, match="2\\^24"):
                draw()
