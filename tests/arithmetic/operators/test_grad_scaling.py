"""Tests of gradient scalers: unscaled gradients, the next scale, and steps that are skipped."""

from __future__ import annotations

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

import reproml
from tests.arithmetic.strategies import NOT_FINITE, SPECIAL
from verification import oracle as o
from verification.oracle import check, reals, same_bits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "float64"])
@pytest.mark.parametrize("inverse", [1.0, 2.0**-16, 0.3, 2.0**-20])
def test_unscaled_gradients_are_rounded_once(dtype, inverse):
    top = torch.finfo(dtype).max
    g = torch.tensor(SPECIAL).double().clamp(-top, top).to(dtype)
    g = g / 3 if dtype is torch.float64 else g  # numbers of 53 bits
    grads, found = [g.clone(), g[:3].clone()], torch.zeros(())
    factor = torch.tensor(inverse)
    with reproml.exact():
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, factor)
    assert found.item() == 0
    with o.rounding_to(dtype):
        for x, n in zip(grads, (len(g), 3)):
            check(x, reals(g[:n]) * reals(factor).item())


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES, "float64"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_infinities_and_nan_are_found(dtype, value):
    grads = [torch.ones(3, dtype=dtype), torch.tensor([1.0, value], dtype=dtype)]
    for found in (torch.zeros(()), torch.ones(())):
        with reproml.exact():
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found, torch.tensor(0.5))
        assert found.item() == 1


def test_scale_must_be_float32():
    grads, double = [torch.ones(3, dtype=torch.float64)], torch.ones((), dtype=torch.float64)
    for scales in ((torch.zeros(()), double), (double, torch.ones(()))):
        with reproml.exact(), pytest.raises(RuntimeError, match="must be float32"):
            torch._amp_foreach_non_finite_check_and_unscale_(grads, *scales)


@pytest.mark.parametrize("scale", [65536.0, 1.5, 2.0**127, 2.0**-149])
@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [0, 3])
def test_scale_is_updated_as_in_pytorch(scale, found, steps):
    """A factor that float32 has, so that PyTorch rounds the product once too."""
    results = []
    for context in (reproml.exact(), torch.no_grad()):
        state = torch.tensor(scale), torch.tensor(steps, dtype=torch.int32), torch.tensor(found)
        with context:
            torch._amp_update_scale_(*state, 2.0, 0.5, 4)
        results.append(state)
    for exact, native in zip(*results):
        assert exact.dtype is native.dtype and torch.equal(exact, native)


def train(optimizer_class, dtype, bad_step, explicit=True, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40).to(dtype))
    grads = [torch.randn(40).to(dtype) for _ in range(4)]
    optimizer = optimizer_class([p], lr=0.125, **options)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    skipped = []
    with reproml.exact():
        for i, g in enumerate(grads):
            before = p.detach().clone()
            p.grad = g * scaler.get_scale()
            if i == bad_step:
                p.grad[7] = float("inf")
            scaler.scale(torch.ones(()))  # as for a loss
            if explicit:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            skipped.append(torch.equal(before, p.detach()))
    return p.detach(), skipped, scaler.get_scale(), optimizer.state[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_scaler_skips_steps_with_infinities(kind, dtype):
    p, skipped, scale, state = train(kind, dtype, 1)
    assert skipped == [False, True, False, False]
    assert scale == 1024.0  # halved after the second step, doubled after two more
    if "step" in state:
        assert state["step"].item() == 3
    for options in ({"fused": True}, {"foreach": True}):
        for explicit in (True, False):
            other, skipped, scale, _ = train(kind, dtype, 1, explicit, **options)
            assert same_bits(p, other)
            assert (skipped, scale) == ([False, True, False, False], 1024.0)


def test_fused_operators_divide_gradients_by_the_scale():
    for dtype in DTYPES.values():
        torch.manual_seed(0)
        g = torch.randn(40).to(dtype)
        p, grads = torch.zeros(40, dtype=dtype), [g.clone()]
        with reproml.exact():
            torch._fused_sgd_([p], grads, [], weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0,
                              nesterov=False, maximize=False, is_first_step=False,
                              grad_scale=torch.tensor(3.0), found_inf=torch.zeros(()))  # fmt: skip
        with o.rounding_to(dtype):
            check(grads[0], reals(g) / 3)
            check(p, -o.rounded(reals(g) / 3))
