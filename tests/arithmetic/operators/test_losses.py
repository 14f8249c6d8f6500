"""Test the negative log-likelihood of csrc/losses.c on sums that fail the rounding test at first."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.pairs import sum_by_pairs
from reproml.arithmetic.operators import losses
from tests.arithmetic.test_operator_table import bce_slope
from verification import oracle as o
from verification.oracle import Real, check, reals, same_bits, total

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

HALF = 2.0**-24  # half an ulp of 1
ROWS = [
    [1.0, HALF], [1.0, -HALF / 2], [1 + 2 * HALF, HALF], [1.0, HALF + 2.0**-60],
    [2.0**60, 2.0**36, 2.0**-60], [2.0**60, 2.0**36, -(2.0**-60)], [3.0, -1.0, -2.0],
    [2.0**-149], [2.0**-149, 2.0**-148, 0.0, 0.0], [3.4028234663852886e38, 2.0**102, 2.0**102],
]  # fmt: skip


@pytest.mark.parametrize("copies", [1, 4, 3])
@pytest.mark.parametrize("reduction", [losses.MEAN, losses.SUM])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 4.0], [1.0, 1.0, 1.0 + 2 * HALF]])
def test_nll_kernel_rounds_ties_and_near_ties(weight, reduction, copies, monkeypatch):
    for reference in ("rowwise", "reduce_sum"):
        monkeypatch.setattr(
            losses, reference, lambda *_, **__: pytest.fail("the reference path ran")
        )
    for row in ROWS:
        terms = [-x for x in row] * copies
        target = torch.arange(len(terms)) % 3
        x = torch.zeros(len(terms), 3)
        x[torch.arange(len(terms)), target] = torch.tensor(terms)
        w = None if weight is None else torch.tensor(weight)
        factors = [1.0 if w is None else float(w[i]) for i in target.tolist()]
        picked = x[torch.arange(len(terms)), target].tolist()
        exact = -sum(Fraction(a) * Fraction(f) for a, f in zip(picked, factors))
        total = sum(map(Fraction, factors))
        loss, weights = losses.nll_loss(x, target, w, reduction, -100)
        if exact or reduction == losses.MEAN:
            mean = reduction == losses.MEAN
            check(loss.reshape(1), [Real(exact / total if mean else exact)])
        else:
            assert loss == 0
        check(weights.reshape(1), [Real(total)])


@pytest.mark.parametrize("n", [1, 3, 8, 1024])
@pytest.mark.parametrize("g", [1.0, -2.0, 0.3, 2.0**-140, 0.0])
def test_gradient_of_mse_loss_where_differences_are_ties(n, g):
    """With a power of two of elements it is the difference times one: a tie for every eighth element."""
    random = torch.Generator().manual_seed(n)
    x, y = torch.randn(2, n, generator=random)
    y[::5] = x[::5]
    y[::7] *= 2.0**-60  # the difference has more bits than binary64
    g = torch.tensor(g).item()
    expected = [o.Real(g) * (2 * (a - b)) / n for a, b in zip(o.reals(x), o.reals(y))]
    with reproml.exact():
        found = torch.ops.aten.mse_loss_backward(torch.tensor(g), x, y, 1)
        empty = torch.ops.aten.mse_loss_backward(torch.tensor(g), x[:0], y[:0], 1)
    o.check(found, expected)
    assert empty.numel() == 0


def test_losses_of_a_saturated_classifier_take_equal_elements_together():
    """All but a few probabilities are 0 or 1, so equal elements are computed once."""
    x = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.25, 1e-30] * 3)
    y = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.125, 0.0] * 3)
    with reproml.exact():
        found = F.binary_cross_entropy(x, y, reduction="sum")
    terms = []
    for p, t in zip(o.reals(x), o.reals(y)):
        logs = [o.log(v) if v > 0 else o.Real(-100) for v in (p, o.Real(1) - p)]
        terms.append(-(t * logs[0] + (o.Real(1) - t) * logs[1]))
    o.check(found, o.total(terms))


@pytest.mark.parametrize("divisor", [1, 150])
@pytest.mark.parametrize("kind", ["halves", "equal", "beside 1", "subnormal", "zeros"])
def test_sum_by_pairs_rounds_hard_terms(kind, divisor):
    """Sums of several blocks and a rest: ties, terms far apart, zeros."""
    random = torch.Generator().manual_seed(7)
    x, y = (torch.randint(-9, 10, (150,), generator=random).float() for _ in range(2))
    x, y = {
        "halves": (x / 2, y / 16),
        "equal": (x, x),
        "beside 1": (1 + x * 2.0**-23, 1 + y * 2.0**-23),
        "subnormal": (x * 2.0**-149, y * 2.0**-149),
        "zeros": (x * 0, y * 0),
    }[kind]

    def squares(ctx, x, y):
        return (x - y) * (x - y)

    def logarithms(ctx, x, y):
        return y * y * x + ctx.log1p(ctx.exp(-abs(x)))

    pairs = list(zip(o.reals(x), o.reals(y)))
    exact = [
        (squares, [(a - b) * (a - b) for a, b in pairs]),
        (logarithms, [b * b * a + o.log1p(o.exp(-abs(a))) for a, b in pairs]),
    ]
    for formula, terms in exact:
        found = sum_by_pairs(formula, divisor, x, y)
        assert found is not None
        check(found, o.total(terms) / divisor)
    assert sum_by_pairs(squares, 1, x, torch.full_like(y, torch.inf)) is None


def test_sum_by_pairs_takes_ties_of_losses(monkeypatch):
    """The sum of whole squares, and 1 and half an ulp, do not reach the reference path."""
    monkeypatch.setattr(losses, "rowwise_by_balls", None)
    x = torch.tensor([1.0, 2.0**-12, 2.0**-40])
    found = losses.mse_loss(x, torch.zeros(3), losses.SUM)
    assert found.item() == 1 + 2.0**-23
    found = losses.mse_loss(x[:2], torch.zeros(2), losses.SUM)
    assert found.item() == 1


@pytest.mark.parametrize("reduction", [losses.MEAN, losses.SUM])
@pytest.mark.parametrize("n", [1, 7, 500, 100_003])
def test_mse_loss_of_many_numbers_is_rounded_once(n, reduction):
    x, y = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for target in (y, y[:1].expand(n), x):
        a, b = ([int(v * 2.0**90) for v in t.tolist()] for t in (x, target))
        exact = Fraction(sum((v - w) ** 2 for v, w in zip(a, b)), 2**180)
        found = losses.mse_loss(x, target, reduction)
        check(found, Real(exact / (n if reduction == losses.MEAN else 1)))
    x[n // 2] = torch.inf
    assert losses.mse_loss(x, y, reduction) == torch.inf
    assert losses.mse_loss(x, x, reduction).isnan()


@pytest.mark.parametrize("n", [1, 15, 500, 8_500])  # the last: by several threads
def test_cross_entropy_of_logits_is_rounded_once(n, monkeypatch):
    random = torch.Generator().manual_seed(1)
    x, soft = torch.randn(n, generator=random) * 8, torch.rand(n, generator=random)
    rest = [o.log1p(o.exp(-u)) for u in reals(x)]
    for y in (soft, soft.round(), (x > 0).float(), soft * 4 - 2):
        terms = [(1 - v) * u + w for u, v, w in zip(reals(x), reals(y), rest)]
        with monkeypatch.context() as patch:
            patch.setattr(losses, "reduced_loss", None)
            check(losses.binary_cross_entropy_with_logits(x, y), total(terms) / n)
            found = losses.binary_cross_entropy_with_logits(x, y, reduction=losses.SUM)
            check(found, total(terms))
    x[0] = torch.inf
    assert losses.binary_cross_entropy_with_logits(x, torch.zeros(n)) == torch.inf


@pytest.mark.parametrize("n", [1, 15, 500, 8_500])
@pytest.mark.parametrize("b", [1.0, 0.3, 2.0**-30, 1e30])
def test_smooth_losses_are_rounded_once(n, b, monkeypatch):
    x, y = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    y[::3] = x[::3] + 2.0**-31
    distances = [abs(Fraction(u) - Fraction(v)) for u, v in zip(x.tolist(), y.tolist())]
    bound = Fraction(b)
    exact = sum(d * d / (2 * bound) if d < bound else d - bound / 2 for d in distances)
    monkeypatch.setattr(losses, "reduced_loss", None)
    check(losses.smooth_l1_loss(x, y, losses.SUM, b), Real(exact))
    check(losses.huber_loss(x, y, losses.MEAN, b), Real(exact * bound / n))
    assert losses.huber_loss(x, x, losses.SUM, b) == 0


@pytest.mark.parametrize("reduction", [losses.NONE, losses.MEAN])
@pytest.mark.parametrize("b", [1.0, 0.5, 0.3])
def test_gradients_of_smooth_losses_are_rounded_once(b, reduction):
    random = torch.Generator().manual_seed(4)
    x, y = torch.randn(1000, generator=random), torch.randn(1000, generator=random).half().float()
    x[:4] = torch.tensor([1.0, 1.0, -1.0, 2.0**-149])  # just within the bound
    y[:4] = torch.tensor([HALF, 2.0**-60, -HALF, 0])
    n, bound = 1000 if reduction == losses.MEAN else 1, Fraction(b)
    differences = [Fraction(u) - Fraction(v) for u, v in zip(x.tolist(), y.tolist())]
    slopes = [max(min(d, bound), -bound) for d in differences]
    for value in (1.0, -(1 + 2.0**-23), 2.0**-140):
        g = torch.tensor(value) if n > 1 else torch.full((1000,), value)
        exact = [Fraction(value) * s / n for s in slopes]
        check(
            losses.huber_loss_backward(g, x, y, reduction, b), [Real(s, value < 0) for s in exact]
        )
        found = losses.smooth_l1_loss_backward(g, x, y, reduction, b)
        check(found, [Real(s / bound, value < 0) for s in exact])


@pytest.mark.parametrize("b", [1.0, 0.3])
@pytest.mark.parametrize("name", ["smooth_l1_loss_backward", "huber_loss_backward"])
def test_gradients_of_smooth_losses_pass_nan(name, b):
    """They are those of PyTorch where operands are infinite or NaN."""
    x = torch.tensor([torch.nan, 1, torch.inf, torch.inf, -torch.inf, 3])
    y = torch.tensor([0, torch.nan, 0, torch.inf, 1, torch.inf])
    native = getattr(torch.ops.aten, name)(torch.ones(6), x, y, losses.NONE, b)
    found = getattr(losses, name)(torch.ones(6), x, y, losses.NONE, b)
    assert same_bits(found, native)


def larger(v: Real) -> Real:
    return v if v > 0 else Real(0)


def test_soft_margin_loss_far_from_the_margin():
    """Where exp underflows by far, the loss is the exact product, or 0."""
    x = torch.tensor([-1e30, 1e30, -3e38, 2.0**-149], requires_grad=True)
    y = torch.tensor([3e5, 1e30, 0.1, 1.0])
    with reproml.exact():
        each = F.soft_margin_loss(x, y, reduction="none")
        mean = F.soft_margin_loss(x, y)
        (slope,) = torch.autograd.grad(mean, x)
    products = [larger(-a * b) for a, b in zip(reals(x.detach()), reals(y))]
    check(each[:3], products[:3])
    check(mean.reshape(1), [total(products) / 4])
    check(slope[:3], [-reals(y)[0] / 4, Real(0), -reals(y)[2] / 4], any_zero=True)


@pytest.mark.parametrize("library", [True, False])
def test_gradient_of_glu_near_zero(library, monkeypatch):
    """A quarter of a subnormal number is often a tie, which the square of the gate decides."""
    if not library:
        monkeypatch.setattr(kernels, "library", None)
    a = torch.arange(1, 41, dtype=torch.int32).view(torch.float32)
    gates = torch.tensor([2.0**-149, -(2.0**-100), 2.0**-65, 0.0])
    with reproml.exact():
        for gate in gates:
            x = torch.cat([a, gate.expand(40)])
            found = torch.ops.aten.glu_backward(torch.ones(40), x, 0)[40:]
            v = reals(gate.reshape(1))[0]
            sides = 1 / (1 + o.exp(v)) * (1 / (1 + o.exp(-v)))
            check(found, [p * sides for p in reals(a)], any_zero=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("path")
def test_small_variances_are_found_exactly(dtype):
    """binary_cross_entropy_backward divides by max(x (1 - x), 10^-12)."""
    middle = torch.tensor(
        [0.0, 1e-12, 1.000000000001e-12, 0.9999999999989999, 0.999999999999, 1.0], dtype=dtype
    )
    around = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0, 1)]
    x = torch.cat([middle, *around])
    y = torch.full_like(x, 0.3)
    with reproml.exact():
        found = torch.ops.aten.binary_cross_entropy_backward(torch.ones_like(x), x, y, None, 0)
    with o.rounding_to(dtype):
        check(found, [bce_slope(a, b) for a, b in zip(reals(x), reals(y))])


EMPTY = torch.zeros(0, 3, dtype=torch.float64)
LABELS = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    "function",
    [
        lambda: F.mse_loss(EMPTY, EMPTY),
        lambda: F.huber_loss(EMPTY, EMPTY),
        lambda: F.smooth_l1_loss(EMPTY, EMPTY),
        lambda: F.binary_cross_entropy(EMPTY, EMPTY),
        lambda: F.cross_entropy(EMPTY, LABELS),
        lambda: F.cross_entropy(EMPTY, LABELS, reduction="sum"),
        lambda: F.layer_norm(EMPTY.T, (0,)),
        lambda: torch.logsumexp(EMPTY.T, 1),
        lambda: torch.softmax(EMPTY.T, 1),
    ],
)
@pytest.mark.usefixtures("path")
def test_results_without_elements_are_those_of_pytorch(function):
    expected = function()
    with reproml.exact():
        found = function()
    assert found.dtype is torch.float64 and found.shape == expected.shape
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.usefixtures("path")
def test_layer_norm_takes_no_rows():
    x, w = (
        torch.zeros(*shape, dtype=torch.float64, requires_grad=True) for shape in ((0, 1), (1,))
    )
    with reproml.exact():
        y = F.layer_norm(x, (1,), w)
        of_x, of_w = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == x.shape == of_x.shape and of_w.tolist() == [0]
