"""Tests of the optimizers other than Adam and SGD: parameters and states, against the definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators import optimizer_formulas as formulas
from reproml.arithmetic.operators import optimizers
from reproml.errors import NotExactError
from tests.arithmetic.operators.test_optimizers import OTHERS, in_each_dtype, narrowed, train
from tests.arithmetic.strategies import FINITE, MODERATE, NOT_FINITE, SPECIAL, tensors
from verification import oracle as o
from verification.oracle import Real, check, float32_scalar, real, reals, rounded, same_bits

pytestmark = pytest.mark.usefixtures("path")


def power(base: float, exponent: float) -> float:
    """Return the float nearest to base**exponent."""
    with mpmath.workprec(500):
        return float(mpmath.power(mpmath.mpf(base), mpmath.mpf(exponent)))


def direction(p: Real, g: Real, c: Any) -> Real:
    g = -g if c.get("maximize") else g
    decay = float32_scalar(0.0 if c.get("decoupled_weight_decay") else c.get("weight_decay", 0.0))
    return g + decay * p if decay.v else g


def shrinkage(c: Any) -> Real:
    return float32_scalar(
        1 - c["lr"] * c["weight_decay"] if c.get("decoupled_weight_decay") else 1.0
    )


def averages(p: Real, g: Real, m: Real, v: Real, c: Any) -> tuple[Real, Real, Real]:
    d, (beta1, beta2) = direction(p, g, c), c["betas"]
    m = rounded(float32_scalar(beta1) * m + float32_scalar(1 - beta1) * d)
    return d, m, rounded(float32_scalar(beta2) * v + float32_scalar(1 - beta2) * (d * d))


def nadam(p, g, s, t, c):
    d, m, v = averages(p, g, s["exp_avg"], s["exp_avg_sq"], c)
    beta1, beta2 = c["betas"]
    mu, following = (beta1 * (1.0 - 0.5 * power(0.96, i * c["momentum_decay"])) for i in (t, t + 1))
    reached = o.float_of(s["mu_product"] * float32_scalar(mu), torch.float32)
    product = Real(reached)
    a = float32_scalar(c["lr"] * (1.0 - mu) / (1.0 - reached))
    b = float32_scalar(c["lr"] * following / (1.0 - reached * following))
    root = o.sqrt(v / float32_scalar(1 - power(beta2, t))) + float32_scalar(c["eps"])
    p = rounded(shrinkage(c) * p - (a * d + b * m) / root)
    return p, {"exp_avg": m, "exp_avg_sq": v, "mu_product": product}


def radam(p, g, s, t, c):
    _, m, v = averages(p, g, s["exp_avg"], s["exp_avg_sq"], c)
    beta1, beta2 = c["betas"]
    rate, longest, power2 = c["lr"] / (1 - power(beta1, t)), 2 / (1 - beta2) - 1, power(beta2, t)
    length = longest - 2 * t * power2 / (1 - power2)
    move = m
    if length > 5.0:
        numerator = (length - 4) * (length - 2) * longest
        rate *= math.sqrt(numerator / ((longest - 4) * (longest - 2) * length))
        rate *= math.sqrt(1 - power2)
        move = m / (o.sqrt(v) + float32_scalar(c["eps"]))
    return rounded(shrinkage(c) * p - float32_scalar(rate) * move), {"exp_avg": m, "exp_avg_sq": v}


def adamax(p, g, s, t, c):
    d, (beta1, beta2) = direction(p, g, c), c["betas"]
    m = rounded(float32_scalar(beta1) * s["exp_avg"] + float32_scalar(1 - beta1) * d)
    u = rounded(float32_scalar(beta2) * s["exp_inf"])
    size = rounded(abs(d) + float32_scalar(c["eps"]))
    u = size if size > u else u
    rate = float32_scalar(c["lr"] / (1 - power(beta1, t)))
    return rounded(p - rate * (m / u)), {"exp_avg": m, "exp_inf": u}


def asgd(p, g, s, t, c):
    mu = s["mu"]
    with o.rounding_to(torch.float32):
        eta = o.float_of(s["eta"])
    p = rounded(float32_scalar(1 - c["lambd"] * eta) * p - s["eta"] * direction(p, g, c))
    ax = p if real(mu).v == 1 else rounded(s["ax"] + mu * (p - s["ax"]))
    rate = float32_scalar(c["lr"] / power(1 + c["lambd"] * c["lr"] * t, c["alpha"]))
    return p, {"ax": ax, "eta": rate, "mu": float32_scalar(1 / max(1, t - c["t0"]))}


def rprop(p, g, s, t, c):
    g = -g if c.get("maximize") else g
    product = g * s["prev"]
    sign = (product > 0) - (product < 0)
    factor = {1: c["etas"][1], 0: 1.0, -1: c["etas"][0]}[sign]
    low, high, factor = (rounded(real(x)) for x in (*c["step_sizes"], factor))
    size = rounded(s["step_size"] * factor)
    size = low if size < low else high if size > high else size
    g = Real(0) if sign < 0 else g
    p = rounded(p - ((g > 0) - (g < 0)) * size) if g.v else p
    return p, {"prev": g, "step_size": size}


ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
CASES: list[Any] = [
    ("NAdam", nadam, {**ADAM, "momentum_decay": 0.004}, {"mu_product": 1}),
    ("NAdam", nadam, {**ADAM, "momentum_decay": 4.0, "weight_decay": 0.1}, {"mu_product": 1}),
    (
        "NAdam",
        nadam,
        {**ADAM, "momentum_decay": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"mu_product": 1},
    ),
    ("RAdam", radam, ADAM, {}),
    ("RAdam", radam, {**ADAM, "weight_decay": 0.3, "maximize": True}, {}),
    ("RAdam", radam, {**ADAM, "weight_decay": 0.3, "decoupled_weight_decay": True}, {}),
    ("Adamax", adamax, ADAM, {}),
    ("Adamax", adamax, {**ADAM, "eps": 0.25, "weight_decay": 0.3, "maximize": True}, {}),
    (
        "ASGD",
        asgd,
        {"lr": 0.1, "lambd": 1e-4, "alpha": 0.75, "t0": 1.0},
        {"eta": float32_scalar(0.1), "mu": 1},
    ),
    (
        "ASGD",
        asgd,
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": -3, "weight_decay": 0.1, "maximize": True},
        {"eta": float32_scalar(0.1), "mu": 1},
    ),
    (
        "Rprop",
        rprop,
        {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50)},
        {"step_size": 0.1},
    ),
    (
        "Rprop",
        rprop,
        {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.04, 0.15), "maximize": True},
        {"step_size": 0.1},
    ),
]
NAMES = {
    "NAdam": "exp_avg exp_avg_sq mu_product",
    "RAdam": "exp_avg exp_avg_sq",
    "Adamax": "exp_avg exp_inf",
    "ASGD": "ax eta mu",
    "Rprop": "prev step_size",
}


@pytest.mark.parametrize("kind, step, options, first", CASES)
@pytest.mark.parametrize("values", [MODERATE, FINITE], ids=["moderate", "finite"])
@in_each_dtype
@settings(max_examples=4)
@given(data=st.data())
def test_parameter_and_states_are_rounded_once(kind, step, options, first, values, dtype, data):
    start = narrowed(data.draw(tensors((4,), values)), dtype)
    grads = narrowed(data.draw(st.lists(tensors((4,), values), min_size=1, max_size=7)), dtype)
    with o.rounding_to(dtype):
        compare(kind, step, options, first, start, grads)


def compare(kind, step, options, first, start, grads):
    states: Any = [{n: rounded(real(first.get(n, 0))) if n == "step_size" else real(first.get(n, 0))
                    for n in NAMES[kind].split()} for _ in range(4)]  # fmt: skip
    p: Any = list(reals(start))
    for t, g in enumerate(grads, 1):
        p, states = zip(*[step(*a, t, options) for a in zip(p, reals(g), states)])
    for foreach in (False, True):
        found, state = train(kind, start, grads, foreach=foreach, **options)
        check(found, p, any_zero=True)
        for name in NAMES[kind].split():
            with o.rounding_to(state[name].dtype):  # float32 for those without axes
                check(state[name].expand(4), [s[name] for s in states], any_zero=True)


LOOPS: list[tuple[str, Any]] = [
    *[(kind, options) for kind, _, options, _ in CASES],
    *[(kind, options) for kind, _, _, options in OTHERS],
    ("RMSprop", {"alpha": 0.5, "weight_decay": 0.5, "maximize": True}),
    ("RMSprop", {"alpha": 0.9, "centered": True, "momentum": 0.5}),
    ("Adagrad", {"lr": 0.5, "eps": 0.0}),
    ("Adadelta", {"rho": 0.5, "weight_decay": 0.25}),
    ("NAdam", {"betas": (0.5, 0.75), "eps": 0.0, "maximize": True}),
    ("RAdam", {"betas": (0.5, 0.875)}),
    ("Adamax", {"betas": (0.5, 0.5), "eps": 0.0}),
    ("ASGD", {"lr": 0.5, "lambd": 0.0, "t0": 0.0}),
    ("Rprop", {"lr": 2.0**-140, "step_sizes": (0.0, 2.0**-130)}),
]


def hard_numbers(n: int, seed: int) -> Tensor:
    """Ties, zeros of both signs, subnormals, huge numbers, infinities, NaN, and random numbers."""
    torch.manual_seed(seed)
    kinds = [
        torch.randn(n),
        torch.randint(-4, 5, (n,)) / 4,
        torch.tensor(SPECIAL + NOT_FINITE)[torch.randint(len(SPECIAL + NOT_FINITE), (n,))],
        torch.randn(n) * 2.0**-140,
        torch.randn(n) * 2.0**100,
    ]
    return torch.stack(kinds)[torch.randint(len(kinds), (n,)), torch.arange(n)]


@pytest.mark.skipif(kernels.library is None, reason="needs the C library")
@pytest.mark.parametrize("kind, options", LOOPS)
def test_loop_has_the_bits_of_its_definition(kind, options, monkeypatch):
    n = 1200
    start, grads = hard_numbers(n, 0), [hard_numbers(n, seed) for seed in (1, 2, 3)]
    grads[2][:600] = grads[1][:600]
    found, state = train(kind, start, grads, **options)
    monkeypatch.setattr(formulas, "has_kernel", lambda state: False)
    expected, states = train(kind, start, grads, **options)
    assert same_bits(found, expected)
    assert all(
        same_bits(torch.as_tensor(state[name]), torch.as_tensor(x)) for name, x in states.items()
    )


@pytest.mark.parametrize("kind, options", LOOPS)
def test_loop_leaves_few_numbers(kind, options, monkeypatch, request):
    if "reference" in request.node.name:
        return
    left: list[Any] = []
    redo = formulas.redo

    def counted(step: Any, states: Any, failed: Any) -> None:
        left.extend(failed)
        redo(step, states, failed)

    monkeypatch.setattr(formulas, "redo", counted)
    torch.manual_seed(0)
    grads = [torch.randn(5000) for _ in range(7)]
    train(kind, torch.randn(5000), grads, **options)
    assert len(left) < 20


@pytest.mark.parametrize("kind", ["RMSprop", "Adagrad", "Adadelta", "NAdam"])
def test_loop_decides_beside_an_infinite_average(kind, monkeypatch, request):
    """The average of the squares overflows: what is divided by its root is a zero."""
    start = torch.tensor([1.5, -0.0, 0.0, -(2.0**-149), 3e38])
    grad = torch.tensor([1e30, 1e30, -1e30, -3e38, 2e25])
    if "reference" not in request.node.name:
        monkeypatch.setattr(formulas, "redo", None)
    found, state = train(kind, start, [grad], **({"lr": 0.5} if kind != "Adadelta" else {}))
    assert torch.isinf(torch.cat([x for x in state.values() if x.dim()])).any()
    assert same_bits(found[[0, 2, 3, 4]], start[[0, 2, 3, 4]])
    monkeypatch.undo()
    monkeypatch.setattr(formulas, "has_kernel", lambda state: False)
    expected, _ = train(kind, start, [grad], **({"lr": 0.5} if kind != "Adadelta" else {}))
    assert same_bits(found, expected)


@pytest.mark.skipif(kernels.library is None, reason="needs the C library")
@pytest.mark.parametrize("lr", [0.5, 0.3])
@pytest.mark.parametrize("unit", [1.0, 2.0**-149])
@pytest.mark.parametrize("kind", ["Adam", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "SGD"])
def test_second_test_decides_beside_midpoints(kind, unit, lr, monkeypatch):
    """A change of about half a unit in the last place; the definition finds the same bits."""
    draw = torch.Generator().manual_seed(6)
    start = torch.randint(-(2**24), 2**24, (600,), generator=draw).float()
    start = start % 2**20 * unit if unit < 1 else start
    options: Any = {"lr": lr, **({"momentum": 0.5} if kind == "SGD" else {})}
    left: list[Any] = []
    redo = formulas.redo

    def counted(step: Any, states: Any, failed: Any) -> None:
        left.extend(failed)
        redo(step, states, failed)

    for module in (formulas, optimizers):
        monkeypatch.setattr(module, "redo", counted)
    found, _ = train(kind, start, [start.clone()], **options)
    assert len(left) < 3 or (kind, unit) not in {("Adam", 1.0), ("Adamax", 1.0), ("SGD", unit)}
    for module in (formulas, optimizers):
        monkeypatch.setattr(module, "has_kernel", lambda state: False)
    expected, _ = train(kind, start, [start.clone()], **options)
    assert same_bits(found, expected)


def test_a_gradient_in_the_memory_of_a_state_takes_the_definition():
    """Its formulas are evaluated one after the other, and one of them overwrites the gradient."""
    results = []
    for shared in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.RMSprop([p])
        with reproml.exact():
            p.grad = torch.full((3,), 0.5)
            optimizer.step()
            average = optimizer.state[p]["square_avg"]
            p.grad = average if shared else average.clone()
            optimizer.step()
        results.append((p.detach().clone(), average.clone()))
    assert same_bits(results[0][1], results[1][1]) and not same_bits(results[0][0], results[1][0])


def test_a_step_raises_the_version_of_what_it_changes():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adagrad([p])
    p.grad, before = torch.ones(3), p._version
    with reproml.exact():
        optimizer.step()
    assert p._version > before


def adafactor(p, g, s, t, c):
    """Return the parameter and the states after a step: arrays of real numbers."""
    g = -g if c.get("maximize") else g
    weight = float32_scalar(power(t, c["beta2_decay"]))

    def mean(x: Any) -> Any:
        return rounded(o.total(x) / len(x))

    def norm(x: Any) -> float:
        return o.float_of(rounded(o.sqrt(o.total((x * x).ravel())))) / math.sqrt(x.size)

    def moved(x: Real, y: Real) -> Any:
        return rounded(x + weight * (y - x))

    rate = min(c["lr"], 1 / math.sqrt(t)) * max(c["eps"][1], norm(p))
    if g.ndim == 1:
        s = {"variance": [rounded(v + weight * (x * x - v)) for v, x in zip(s["variance"], g)]}
        estimate = reals(torch.zeros(g.shape))
        estimate[:] = s["variance"]
    else:
        s = {
            "row_var": [moved(v, mean(x * x)) for v, x in zip(s["row_var"], g)],
            "col_var": [moved(v, mean(x * x)) for v, x in zip(s["col_var"], g.T)],
        }
        scale, least = mean(s["row_var"]), float32_scalar(c["eps"][0])
        scale = least if scale < least else scale
        estimate = reals(torch.zeros(g.shape))
        for i, row in enumerate(s["row_var"]):
            for j, column in enumerate(s["col_var"]):
                estimate[i, j] = rounded(row * column / scale)
    least = float32_scalar(c["eps"][0] * c["eps"][0])
    u = g * real(1)
    for at, x in zip(np.ndindex(*g.shape), estimate.ravel()):
        u[at] = rounded(g[at] / o.sqrt(least if x < least else x))
    rate = float32_scalar(rate / max(1.0, norm(u) / c["d"]))
    keep = float32_scalar(1 - c["lr"] * c["weight_decay"])
    result = p * real(1)
    for at in np.ndindex(*g.shape):
        result[at] = rounded(keep * p[at] - rate * u[at])
    return result, s


@pytest.mark.parametrize("shape", [(4,), (3, 2)])
@pytest.mark.parametrize("maximize", [False, True])
@in_each_dtype
@settings(max_examples=4)
@given(data=st.data())
def test_adafactor_is_rounded_once(shape, maximize, dtype, data):
    c: dict[str, Any] = {"lr": 0.3, "beta2_decay": -0.8, "eps": (1e-7, 1e-3), "d": 1.0}
    c.update(weight_decay=0.01, maximize=maximize)
    start = narrowed(data.draw(tensors(shape, MODERATE)), dtype)
    grads = narrowed(data.draw(st.lists(tensors(shape, MODERATE), min_size=1, max_size=3)), dtype)
    with o.rounding_to(dtype):
        compare_adafactor(c, start, grads)


def compare_adafactor(c, start, grads):
    shape = start.shape
    p, zeros = reals(start), [Real(0)] * 4
    state: Any = {"variance": zeros, "row_var": zeros[: shape[0]], "col_var": zeros[: shape[-1]]}
    for t, g in enumerate(grads, 1):
        p, state = adafactor(p, reals(g), state, t, c)
    for foreach in (False, True):
        found, states = train("Adafactor", start, grads, foreach=foreach, **c)
        check(found.flatten(), p.ravel(), any_zero=True)
        for name, expected in state.items():
            check(states[name].flatten(), expected)


LBFGS = [{}, {"line_search_fn": "strong_wolfe", "history_size": 3}]


@pytest.mark.parametrize("options", LBFGS)
def test_lbfgs_gives_the_same_bits_in_every_setting(options):
    def trained(threads: int, strided: bool) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(20, 30))
        x, y = torch.randn(50, 20), torch.randn(50, 30)
        x = x.t().contiguous().t() if strided else x
        optimizer = torch.optim.LBFGS([p], lr=0.5, max_iter=6, **options)

        def closure() -> Any:
            optimizer.zero_grad()
            loss = ((x @ p).tanh() - y).square().mean()
            loss.backward()
            return loss

        with reproml.exact():
            losses = [float(optimizer.step(closure)) for _ in range(3)]
        torch.set_num_threads(before)
        return p.detach(), losses

    (one, losses), (two, others) = (
        trained(1, False),
        trained(2, True),
    )
    assert same_bits(one, two) and losses == others and losses[-1] < losses[0]


def test_adafactor_refuses_a_sparse_gradient():
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.Adafactor([p])
    p.grad = torch.ones(2, 2).to_sparse()
    with reproml.exact(), pytest.raises((NotExactError, RuntimeError)):
        optimizer.step()


def test_rprop_multiplies_by_the_sign_of_the_exact_product():
    """The product of two small gradients underflows in binary32, but has a sign."""
    found, state = train("Rprop", torch.ones(1), [torch.full((1,), 2.0**-100)] * 2, lr=0.25)
    assert state["step_size"].item() == o.float_of(rounded(Fraction(1, 4) * float32_scalar(1.2)))
