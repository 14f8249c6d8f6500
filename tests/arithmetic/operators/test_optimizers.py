"""Tests of the optimizers: parameters and states after a step, against the definitions in real numbers."""

from __future__ import annotations

import importlib
import math
import threading
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.compiler import evaluate, kernels
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.operators import optimizers
from tests.arithmetic.strategies import FINITE, MODERATE, NOT_FINITE, SPECIAL, tensors
from verification import oracle as o
from verification.oracle import Real, check, float32_scalar, real, reals, rounded, same_bits

few_examples = settings(max_examples=15)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
in_each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def narrowed(x, dtype):
    """Round float32 numbers, or lists of them, to a dtype; finite numbers stay finite."""
    if isinstance(x, list):
        return [narrowed(y, dtype) for y in x]
    top = torch.finfo(dtype).max
    return torch.where(x.isfinite(), x.clamp(-top, top), x).to(dtype)


pytestmark = pytest.mark.usefixtures("path")


def penalized(p: Any, g: Any, decay: float, maximize: bool) -> Any:
    g = -g if maximize else g
    return g + float32_scalar(decay) * p if float32_scalar(decay).v else g


def adam_step(p, g, state, t, c):
    """Return one element of Adam or AdamW after step t: param, [m, v, v_max]."""
    m, v, v_max = state
    beta1, beta2 = c["betas"]
    decoupled = c["decoupled"]
    d = penalized(p, g, 0 if decoupled else c["weight_decay"], c["maximize"])
    m = rounded(float32_scalar(beta1) * m + float32_scalar(1 - beta1) * d)
    v = rounded(float32_scalar(beta2) * v + float32_scalar(1 - beta2) * (d * d))
    used = v
    if c["amsgrad"]:
        used = v_max = v if v.v != v.v or v > v_max else v_max
    correction1, correction2 = (1 - Fraction(b) ** t for b in (beta1, beta2))
    keep = 1 - float32_scalar(c["lr"]) * float32_scalar(c["weight_decay"]) if decoupled else real(1)
    move = float32_scalar(c["lr"]) / correction1 * (used_over(m, used, correction2, c["eps"]))
    return rounded(keep * p - move), [m, v, v_max]


def used_over(m, v, correction, eps):
    return m / (o.sqrt(v / correction) + float32_scalar(eps))


def sgd_step(p, g, buffer, c):
    d = penalized(p, g, c["weight_decay"], c["maximize"])
    mu = float32_scalar(c["momentum"])
    if mu.v == 0:
        return rounded(p - float32_scalar(c["lr"]) * d), None
    if buffer is None:
        buffer = rounded(d)
    else:
        buffer = rounded(mu * buffer + float32_scalar(1 - c["dampening"]) * d)
    direction = d + mu * buffer if c["nesterov"] else buffer
    return rounded(p - float32_scalar(c["lr"]) * direction), buffer


def train(kind, start, grads, **options):
    p = torch.nn.Parameter(start.clone())
    optimizer = getattr(torch.optim, kind)([p], **options)
    with reproml.exact():
        for g in grads:
            p.grad = g.clone()
            optimizer.step()
    return p.detach(), optimizer.state[p]


def elements(x: torch.Tensor) -> Any:
    return list(reals(x).ravel())


ADAM = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-3, 0.1, 1.0, 2.0**-130]),
        "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.75), (0.0, 0.0), (0.9999, 0.99999)]),
        "eps": st.sampled_from([1e-8, 0.0, 1.0]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)


def grads_of(values):
    return st.lists(tensors((4,), values), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("values", [MODERATE, FINITE], ids=["moderate", "finite"])
@in_each_dtype
@few_examples
@given(data=st.data())
def test_adam(kind, values, dtype, data):
    c = data.draw(ADAM)
    start, grads = narrowed([data.draw(tensors((4,), values)), data.draw(grads_of(values))], dtype)
    with o.rounding_to(dtype):
        compare_adam(kind, c, start, grads)


def compare_adam(kind, c, start, grads):
    found, state = train(kind, start, grads, **c)
    c["decoupled"] = kind == "AdamW"
    states: Any = [[Real(0)] * 3 for _ in start]
    p = elements(start)
    for t, g in enumerate(grads, 1):
        p, states = zip(*[adam_step(*a, t, c) for a in zip(p, elements(g), states)])
    check(found, p)
    for name, i in [("exp_avg", 0), ("exp_avg_sq", 1), *[("max_exp_avg_sq", 2)] * c["amsgrad"]]:
        check(state[name], [s[i] for s in states])
    assert state["step"].item() == len(grads)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_beside_midpoints(kind, amsgrad, monkeypatch):
    """With a rate of 1/2 a whole number of 24 bits comes to lie 10^-15 of it beside a midpoint."""
    draw = torch.Generator().manual_seed(1)
    n = 40 if kernels.library is not None else 8
    start = torch.randint(-(2**24), 2**24, (n,), generator=draw).float()
    if kernels.library is not None:  # pairs decide them all
        monkeypatch.setattr(evaluate, "_exact_values_of_rows", None)
    c = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    compare_adam(kind, {**c, "amsgrad": amsgrad, "maximize": False}, start, [start.clone()])


@pytest.mark.parametrize("values", [MODERATE, FINITE], ids=["moderate", "finite"])
@in_each_dtype
@few_examples
@given(data=st.data())
def test_sgd(values, dtype, data):
    c = {
        "lr": data.draw(st.sampled_from([1e-3, 0.1, 1.0, 2.0**-130])),
        "momentum": data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        "weight_decay": data.draw(st.sampled_from([0.0, 0.01, 0.5])),
        "maximize": data.draw(st.booleans()),
        "nesterov": False,
        "dampening": 0.0,
    }
    if c["momentum"]:
        c["nesterov"] = data.draw(st.booleans())
        c["dampening"] = 0.0 if c["nesterov"] else data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    start, grads = narrowed([data.draw(tensors((4,), values)), data.draw(grads_of(values))], dtype)
    with o.rounding_to(dtype):
        compare_sgd(c, start, grads)


def compare_sgd(c, start, grads):
    found, state = train("SGD", start, grads, **c)
    buffers: Any = [None] * 4
    p = elements(start)
    for g in grads:
        p, buffers = zip(*[sgd_step(*a, c) for a in zip(p, elements(g), buffers)])
    check(found, p)
    if c["momentum"]:
        check(state["momentum_buffer"], buffers)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.double() * (1 + 2.0**-40)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@few_examples
@given(data=st.data())
def test_step_in_float64_is_rounded_to_binary64(kind, data):
    start, grads = doubled(data.draw(tensors((4,), FINITE))), data.draw(grads_of(FINITE))
    grads = [doubled(g) for g in grads]
    p = elements(start)
    with o.rounding_to(torch.float64):
        if kind == "SGD":
            c = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "maximize": False,
                 "nesterov": True, "dampening": 0.0}  # fmt: skip
            found, _ = train(kind, start, grads, **c)
            buffers: Any = [None] * 4
            for g in grads:
                p, buffers = zip(*[sgd_step(*a, c) for a in zip(p, elements(g), buffers)])
        else:
            c = data.draw(ADAM)
            found, _ = train(kind, start, grads, **c)
            c["decoupled"] = kind == "AdamW"
            states: Any = [[Real(0)] * 3 for _ in start]
            for t, g in enumerate(grads, 1):
                p, states = zip(*[adam_step(*a, t, c) for a in zip(p, elements(g), states)])
        check(found, p)


EXTREME = torch.tensor((SPECIAL + NOT_FINITE) * 60)


@in_each_dtype
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_special_values_are_rounded_correctly(kind, dtype):
    """Parameter and gradient are every pair of ties, subnormals, overflows, infinities and NaN."""
    n = len(SPECIAL + NOT_FINITE)
    start, g = (x.reshape(-1).contiguous() for x in torch.broadcast_tensors(
        EXTREME[:n].unsqueeze(1), EXTREME[:n]))  # fmt: skip
    start, g = narrowed([start, g], dtype)
    with o.rounding_to(dtype):
        compare_one_step(kind, start, g)


def compare_one_step(kind, start, g):
    c: dict[str, Any] = {"lr": 0.25, "weight_decay": 0.01, "maximize": False}
    if kind == "SGD":
        c.update(momentum=0.0, nesterov=False, dampening=0.0)
        expected = [sgd_step(p, d, None, c)[0] for p, d in zip(elements(start), elements(g))]
    else:
        c.update(betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
        d = {**c, "decoupled": kind == "AdamW"}
        states = [[Real(0)] * 3] * len(g)
        expected = [adam_step(*a, 1, d)[0] for a in zip(elements(start), elements(g), states)]
    check(train(kind, start, [g], **c)[0], expected)


def test_ties_round_to_even():
    """p - lr g exactly between two binary32 numbers."""
    p = torch.tensor([1.0, 1 + 2**-23, 2.0**24, 2.0**-149] * 20)
    g = torch.tensor([-(2.0**-24), -(2.0**-24), -1.0, 2.0**-150 * 2] * 20)
    found, _ = train("SGD", p, [g], lr=1.0)
    check(found, reals(p) - reals(g))
    assert found[:2].tolist() == [1.0, 1 + 2 * 2**-23]
    found, _ = train("SGD", p, [g], lr=0.5)
    check(found, reals(p) - reals(g) * Fraction(1, 2))


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "maximize": True}),
]


@in_each_dtype
@pytest.mark.parametrize("kind, options", OPTIONS)
def test_all_forms_give_the_same_bits(kind, options, dtype):
    torch.manual_seed(0)
    start, grads = narrowed([torch.randn(300), [torch.randn(300) for _ in range(3)]], dtype)
    forms = [{"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}]
    results = [train(kind, start, grads, **options, **f)[0] for f in forms]
    strided = torch.stack([start, start], 1)[:, 0]
    results.append(train(kind, strided, grads, **options)[0])
    assert all(same_bits(results[0], r) for r in results)


@pytest.mark.parametrize("kind, options", OPTIONS)
def test_steps_are_close_to_native_steps(kind, options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(50))
    start, grads = p.detach().clone(), [torch.randn(50) for _ in range(4)]
    optimizer = getattr(torch.optim, kind)([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    assert torch.allclose(train(kind, start, grads, **options)[0], p, rtol=1e-5, atol=1e-6)


def test_fused_operators():
    """_fused_adam_, _fused_adamw_ and _fused_sgd_ give the same bits when they are called directly."""
    torch.manual_seed(0)
    start, g = torch.randn(9), torch.randn(9)
    rest: dict[str, Any] = {"weight_decay": 0.1, "maximize": False}
    adam: dict[str, Any] = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "amsgrad": False,
        **rest,
    }
    sgd: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False, **rest}
    for kind, options in [("Adam", adam), ("AdamW", adam), ("SGD", sgd)]:
        p, m, v = start.clone(), torch.zeros(9), torch.zeros(9)
        with reproml.exact():
            if kind == "SGD":
                torch._fused_sgd_([p], [g], [m], **options, is_first_step=True)
            else:
                step = torch.ones(())
                getattr(torch, f"_fused_{kind.lower()}_")([p], [g], [m], [v], [], [step], **options)
        public = {k: x for k, x in options.items() if k not in ("beta1", "beta2")}
        if kind != "SGD":
            public["betas"] = (0.9, 0.99)
        assert same_bits(p, train(kind, start, [g], **public)[0])


@given(st.sampled_from([0.0, 0.5, 0.9, 0.999, 0.9999999, 1e-300]), st.integers(1, 2000))
@few_examples
def test_bias_correction(beta, step):
    with mpmath.workprec(400):
        exact = 1 - mpmath.mpf(beta) ** step
        found = optimizers.bias_correction(beta, step)
        assert abs(mpmath.mpf(found.numerator) / found.denominator - exact) <= mpmath.mpf(2) ** -160


def assert_refused(p, grad, kind="Adam", **options):
    optimizer = getattr(torch.optim, kind)([p], **options)
    p.grad = grad
    before = p.detach().clone()
    with pytest.raises(reproml.NotExactError), reproml.exact():
        optimizer.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_refuses_other_dtypes_and_differentiable(kind):
    number = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert_refused(number, torch.ones(2, dtype=torch.complex64), kind)
    assert_refused(torch.nn.Parameter(torch.ones(2)), torch.ones(2), kind, differentiable=True)


def test_refuses_a_sparse_gradient():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.ones(2), (2,))
    assert_refused(torch.nn.Parameter(torch.ones(2)), sparse, "SGD")


def native_steps():
    return [
        getattr(importlib.import_module(f"torch.optim.{name}"), form + name)
        for name in ("adam", "sgd")
        for form in ("_single_tensor_", "_multi_tensor_", "_fused_")
    ]


def test_native_steps_are_restored_after_exact():
    before = native_steps()
    with reproml.exact():
        with reproml.exact():
            pass
        assert all(a is not b for a, b in zip(native_steps(), before))
    assert native_steps() == before
    with pytest.raises(ZeroDivisionError), reproml.exact():
        raise ZeroDivisionError
    assert native_steps() == before

    def work():
        for _ in range(20):
            with reproml.exact():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert native_steps() == before


def test_threads_outside_exact_step_natively():
    def step():
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        p.grad = torch.full((4,), 0.1, dtype=torch.float64)
        torch.optim.SGD([p], lr=0.1).step()
        results.append(p.detach())

    results: list[torch.Tensor] = []
    step()
    ready = threading.Event()
    thread = threading.Thread(target=lambda: (ready.wait(10), step()))
    thread.start()
    with reproml.exact():
        ready.set()
        thread.join()
    assert len(results) == 2 and torch.equal(*results)


# ---- RMSprop, Adagrad, Adadelta ------------------------------------------------------------------


def direction(p, g, c):
    return penalized(p, g, c.get("weight_decay", 0.0), c.get("maximize", False))


def rmsprop_step(p, g, s, t, c):
    v, a, b = s
    d = direction(p, g, c)
    keep, rest = float32_scalar(c["alpha"]), float32_scalar(1 - c["alpha"])
    v = rounded(keep * v + rest * (d * d))
    a = rounded(keep * a + rest * d) if c["centered"] else a
    u = d / (o.sqrt(v - a * a if c["centered"] else v) + float32_scalar(c["eps"]))
    if not c["momentum"]:
        return rounded(p - float32_scalar(c["lr"]) * u), [v, a, b]
    b = rounded(float32_scalar(c["momentum"]) * b + u)
    return rounded(p - float32_scalar(c["lr"]) * b), [v, a, b]


def adagrad_step(p, g, s, t, c):
    d = direction(p, g, c)
    v = rounded(s[0] + d * d)
    rate = float32_scalar(c["lr"]) / (1 + (t - 1) * float32_scalar(c["lr_decay"]))
    return rounded(p - rate * (d / (o.sqrt(v) + float32_scalar(c["eps"])))), [v]


def adadelta_step(p, g, s, t, c):
    v, a = s
    d = direction(p, g, c)
    keep, rest, eps = (
        float32_scalar(c["rho"]),
        float32_scalar(1 - c["rho"]),
        float32_scalar(c["eps"]),
    )
    v = rounded(keep * v + rest * (d * d))
    u = rounded(o.sqrt(a + eps) / o.sqrt(v + eps) * d)
    a = rounded(keep * a + rest * (u * u))
    return rounded(p - float32_scalar(c["lr"]) * u), [v, a]


OTHERS = [
    ("RMSprop", rmsprop_step, 3, {"lr": 0.01, "alpha": 0.9, "eps": 1e-8, "centered": False,
                                  "momentum": 0.9}),
    ("RMSprop", rmsprop_step, 3, {"lr": 0.01, "alpha": 0.75, "eps": 1e-8, "centered": True, "momentum": 0.0,
                                  "weight_decay": 0.1}),
    ("Adagrad", adagrad_step, 1, {"lr": 0.1, "lr_decay": 0.3, "eps": 1e-10, "weight_decay": 0.1}),
    ("Adadelta", adadelta_step, 2, {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "maximize": True}),
]  # fmt: skip


@in_each_dtype
@pytest.mark.parametrize("kind, step, states, options", OTHERS)
@few_examples
@given(start=tensors((4,), MODERATE), grads=grads_of(MODERATE))
def test_other_optimizers(kind, step, states, options, dtype, start, grads):
    with o.rounding_to(dtype):
        compare_other(kind, step, states, options, *narrowed([start, grads], dtype))


def compare_other(kind, step, states, options, start, grads):
    state: Any = [[Real(0)] * states for _ in range(4)]
    p = elements(start)
    for t, g in enumerate(grads, 1):
        p, state = zip(*[step(*a, t, options) for a in zip(p, elements(g), state)])
    for foreach in (False, True):
        check(train(kind, start, grads, foreach=foreach, **options)[0], np.array(p, dtype=object))


def test_refuses_a_state_of_another_shape():
    p = torch.nn.Parameter(torch.ones(8))
    for optimizer, name in (
        (torch.optim.Adam([p]), "exp_avg"),
        (torch.optim.SGD([p], lr=0.1, momentum=0.9), "momentum_buffer"),
    ):
        p.grad = torch.ones(8)
        with reproml.exact():
            optimizer.step()
            optimizer.state[p][name] = torch.ones(1)
            with pytest.raises(RuntimeError):
                optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_autograd_detects_a_changed_parameter(kind):
    p = torch.nn.Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    with reproml.exact():
        y = (p * p).sum()
        kind([p], lr=0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_sharing_memory_step_in_order(threads, path):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        base = torch.linspace(-1, 1, 60_000)
        p, q = torch.nn.Parameter(base), torch.nn.Parameter(base.view(200, 300))
        p.grad, q.grad = torch.ones(60_000), torch.full((200, 300), -0.5)
        with reproml.exact():
            torch.optim.Adam([p, q], lr=0.1).step()
    finally:
        torch.set_num_threads(before)
    one = torch.nn.Parameter(torch.linspace(-1, 1, 60_000))
    for grad in (1.0, -0.5):
        one.grad = torch.full((60_000,), grad)
        with reproml.exact():
            torch.optim.Adam([one], lr=0.1).step()
    assert same_bits(p, one)


def test_gradient_may_be_the_parameter():
    p = torch.nn.Parameter(torch.tensor([math.inf, 1.0, 2.0**-140]))
    p.grad = p.detach()
    with reproml.exact():
        torch.optim.SGD([p], lr=1.0).step()
    assert p[0].isnan() and p[1:].tolist() == [0, 0]


def test_negative_epsilon_takes_the_reference_path(path):
    """The root and epsilon may cancel, which the error bound of the compiled loop excludes."""
    p, m, v = torch.ones(64), torch.zeros(64), torch.zeros(64)
    g = 1 + torch.arange(64) * 2.0**-23
    options: dict[str, Any] = {"lr": 2.0**-24, "beta1": 0.0, "beta2": 0.0, "eps": -1.0}
    options.update(weight_decay=0.0, amsgrad=False, maximize=False)
    with reproml.exact():
        torch._fused_adam_([p], [g], [m], [v], [], [torch.ones(())], **options)
    expected = [1 - 2.0**-24 * (x / (o.sqrt(rounded(x * x)) - 1)) for x in reals(g[1:])]
    check(p[1:], expected)


@pytest.mark.parametrize("library", [True, False])
def test_state_is_rounded_beside_a_nan_parameter(library, monkeypatch):
    """Without weight decay the parameter is no operand: 3/4 v + 1/4 is just above a tie."""
    if not library:
        monkeypatch.setattr(kernels, "library", None)
    p = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([p], betas=(0.5, 0.75), eps=0.0, weight_decay=0.0)
    with reproml.exact():
        for g in (0.0, 212109920.0, 1.0):  # 0 / 0 makes the parameter NaN
            p.grad = torch.tensor([g])
            optimizer.step()
    v = nearest(Fraction(212109920) ** 2 / 4)
    assert p.isnan() and optimizer.state[p]["exp_avg_sq"].item() == nearest(
        Fraction(v) * 3 / 4 + Fraction(1, 4)
    )


def test_refuses_a_state_of_another_dtype():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(2, dtype=torch.bfloat16)
    with reproml.exact():
        optimizer.step()
        optimizer.state[p]["momentum_buffer"] = torch.ones(2)
        with pytest.raises(reproml.NotExactError, match="not of torch.float32"):
            optimizer.step()


def test_parameters_of_several_dtypes_step_together():
    torch.manual_seed(0)
    starts = [torch.randn(5).to(dtype) for dtype in (*DTYPES.values(), *DTYPES.values())]
    grads = [torch.randn(5).to(x.dtype) for x in starts]
    for kind, options in OPTIONS:
        alone = [train(kind, x, [g, g], **options) for x, g in zip(starts, grads)]
        params = [torch.nn.Parameter(x.clone()) for x in starts]
        optimizer = getattr(torch.optim, kind)(params, **options)
        with reproml.exact():
            for _ in range(2):
                for p, g in zip(params, grads):
                    p.grad = g.clone()
                optimizer.step()
        for p, (found, state) in zip(params, alone):
            assert same_bits(p.detach(), found)
            for name, x in state.items():
                assert x is optimizer.state[p][name] or same_bits(x, optimizer.state[p][name])


@in_each_dtype
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_learning_rate_may_be_a_tensor(kind, dtype):
    torch.manual_seed(0)
    start, grads = narrowed([torch.randn(9), [torch.randn(9)]], dtype)
    expected = train(kind, start, grads, lr=0.1)[0]
    for form in ("fused", "foreach"):
        options = {form: form == "fused"}
        assert same_bits(train(kind, start, grads, lr=torch.tensor(0.1), **options)[0], expected)


@pytest.mark.parametrize("library", [True, False])
def test_weight_decay_is_not_lost_where_its_factor_rounds_to_one(library, monkeypatch):
    """1 - 2^-60 is 1 in binary64. The parameter comes out just below a midpoint, not above it."""
    if not library:
        monkeypatch.setattr(kernels, "library", None)
    p = torch.nn.Parameter(torch.tensor([1 + 2.0**-22]))
    p.grad = torch.ones(1)
    options: dict[str, Any] = {"lr": 2.0**-24, "weight_decay": 2.0**-36, "betas": (0.0, 0.0)}
    with reproml.exact():
        torch.optim.AdamW([p], eps=2.0**-40, **options).step()
    value = (1 + Fraction(1, 2**22)) * (1 - Fraction(1, 2**60))
    value -= Fraction(1, 2**24) / (1 + Fraction(1, 2**40))
    assert p.item() == nearest(value) == 1 + 2.0**-23


@pytest.mark.parametrize("lr", [torch.tensor(math.inf), 10**60, 3e38])
def test_a_refused_step_is_not_counted(lr):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.RAdam([p], lr=lr)
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="not finite"):
        optimizer.step()
    assert p.tolist() == [1, 1] and optimizer.state[p]["step"] == 0
