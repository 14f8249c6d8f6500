"""Tests of dispatch/gradients.py: the gradient of clamp is the same in all versions of PyTorch."""

from __future__ import annotations

import math
import threading
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reproml
from reproml.arithmetic import operator_table, patches
from verification.oracle import same_bits

NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.1, 1e-45, math.inf, -math.inf, math.nan]
BOUNDS = [None, *NUMBERS]
PAIRS = [pair for pair in product(BOUNDS, BOUNDS) if pair != (None, None)]


def receiver(x: float, low: Any, high: Any) -> str:
    """Return which operand of clamp gets the gradient, as in derivatives.yaml of PyTorch 2.8."""
    if (low is None or x >= low) and (high is None or x <= high):
        return "x"
    if low is not None and x < low and (high is None or low < high):
        return "low"
    if high is not None and (x > high or (low is not None and high < low)):
        return "high"
    return "none"


def float32(x: Any) -> Any:
    return x if x is None else torch.tensor(x).item()


@pytest.mark.parametrize("in_place", [False, True])
def test_numbers_as_bounds(in_place: bool) -> None:
    x = torch.tensor(NUMBERS, requires_grad=True)
    incoming = torch.arange(1.0, 1 + len(NUMBERS))
    with reproml.exact():
        for low, high in PAIRS:
            y = (x * 1).clamp_(low, high) if in_place else torch.clip(x, low, high)
            assert same_bits(y.detach(), x.detach().clamp(low, high))
            (gradient,) = torch.autograd.grad(y, x, incoming)
            expected = [
                g if receiver(n, float32(low), float32(high)) == "x" else 0.0
                for n, g in zip(x.tolist(), incoming.tolist())
            ]
            assert gradient.tolist() == expected, (low, high)


@pytest.mark.parametrize("in_place", [False, True])
def test_tensors_as_bounds(in_place: bool) -> None:
    """The bounds are broadcast, so that each gets the sum of the gradients of all elements beyond it."""
    x = torch.tensor(NUMBERS, requires_grad=True)
    incoming = torch.arange(1.0, 1 + len(NUMBERS))
    for low, high in PAIRS:
        bounds = [b if b is None else torch.tensor(b, requires_grad=True) for b in (low, high)]
        given = {name: b for name, b in zip(("low", "high"), bounds) if b is not None}
        with reproml.exact():
            y = (x * 1).clamp_(*bounds) if in_place else x.clamp(*bounds)
            found = torch.autograd.grad(y, [x, *given.values()], incoming)
        names = [receiver(n, float32(low), float32(high)) for n in x.tolist()]
        pairs = list(zip(names, incoming.tolist()))
        assert found[0].tolist() == [g if name == "x" else 0.0 for name, g in pairs], (low, high)
        for (name, bound), gradient in zip(given.items(), found[1:]):
            assert gradient.shape == bound.shape
            assert gradient.item() == sum(g for other, g in pairs if other == name), (low, high)


ONE_BOUND = {
    "clamp_min": (lambda x, b: x.clamp_min(b), "low"),
    "clamp_min_": (lambda x, b: (x * 1).clamp_min_(b), "low"),
    "clamp_max": (lambda x, b: x.clamp_max(b), "high"),
    "clamp_max_": (lambda x, b: (x * 1).clamp_max_(b), "high"),
}


@pytest.mark.parametrize("bound", NUMBERS)
@pytest.mark.parametrize("name", ONE_BOUND)
def test_one_bound(name: str, bound: float) -> None:
    function, side = ONE_BOUND[name]
    x = torch.tensor(NUMBERS, requires_grad=True)
    b = torch.tensor(bound, requires_grad=True)
    with reproml.exact():
        (of_number,) = torch.autograd.grad(function(x, bound).sum(), x)
        of_x, of_bound = torch.autograd.grad(function(x, b).sum(), (x, b))
    names = [receiver(n, *((b.item(), None) if side == "low" else (None, b.item()))) for n in x]
    assert of_number.tolist() == of_x.tolist() == [float(name == "x") for name in names]
    assert of_bound.item() == names.count(side)


def test_where_pytorchs_own_code_calls_it() -> None:
    """hinge_embedding_loss and margin_ranking_loss clamp in C++, here at the margin itself."""
    x = torch.tensor([1.0, 2.0, 0.0], requires_grad=True)
    with reproml.exact():
        hinge = F.hinge_embedding_loss(x, -torch.ones(3), margin=1.0, reduction="sum")
        ranking = F.margin_ranking_loss(
            x, x.detach() - 1, torch.ones(3), margin=1.0, reduction="sum"
        )
        assert torch.autograd.grad(hinge, x)[0].tolist() == [-1, 0, -1]
        assert torch.autograd.grad(ranking, x)[0].tolist() == [-1, -1, -1]


def test_views_and_second_derivatives() -> None:
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    with reproml.exact():
        y = x * 3
        y[1:].clamp_(0.0, 3.0)
        assert y.tolist() == [0, 3, 3]
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [3, 3, 0]
        (first,) = torch.autograd.grad((x**3).clamp(0.0, 1.0).sum(), x, create_graph=True)
        assert torch.autograd.grad(first.sum(), x)[0].tolist() == [0, 6, 0]
        with pytest.raises(RuntimeError, match="leaf Variable"):
            x.clamp_(0.0, 1.0)


def test_transforms() -> None:
    x = torch.tensor([0.0, 0.5, 1.0, 2.0])
    with reproml.exact():
        assert torch.func.grad(lambda x: x.clamp(0.0, 1.0).sum())(x).tolist() == [1, 1, 1, 0]
        of_each = torch.func.vmap(torch.func.grad(lambda x: x.clamp(0.0, 1.0)))
        assert of_each(x).tolist() == [1, 1, 1, 0]


def test_a_gradient_of_minus_zero_keeps_its_sign_and_layout() -> None:
    minus = torch.full((4,), -0.0)
    with reproml.exact():
        x = torch.tensor([0.0, 0.5, 1.0, 2.0], requires_grad=True)
        y = x * 1
        y.clamp_(0.0, 1.0)
        expected = torch.tensor([-0.0, -0.0, -0.0, 0.0])
        assert same_bits(torch.autograd.grad(y, x, minus)[0], expected)
        y = x * 1
        y[:1].clamp_(0.0, 1.0)  # beside the view the gradient is unchanged
        assert same_bits(torch.autograd.grad(y, x, minus)[0], minus)
        x = torch.tensor(0.5, requires_grad=True)
        assert same_bits(torch.autograd.grad(x.clamp(0.0, 1.0), x, minus[0])[0], minus[0])
        x = torch.ones(2, 3).t().requires_grad_()
        y = x * 1
        y.clamp_(1.0)
        assert torch.autograd.grad(y, x, torch.ones(3, 2))[0].stride() == (1, 3)
        assert torch.autograd.grad(x.clip(None, None), x, torch.ones(()).expand(3, 2))[
            0
        ].stride() == (0, 0)


@pytest.mark.parametrize("side", ["min", "max"])
def test_foreach_forms(side: str) -> None:
    x = torch.tensor([0.0, 1.0, 2.0, math.nan], requires_grad=True)
    bound = torch.ones(4, requires_grad=True)
    plain = getattr(Tensor, f"clamp_{side}")
    foreach = getattr(torch, f"_foreach_clamp_{side}")
    in_place = getattr(torch, f"_foreach_clamp_{side}_")
    with reproml.exact():
        for given, per_tensor in ((1.0, 1.0), ([1.0], 1.0), ([bound], bound)):
            (expected,) = torch.autograd.grad(plain(x, per_tensor).sum(), x)
            assert expected.tolist()[1] == 1
            (found,) = torch.autograd.grad(foreach([x], given)[0].sum(), x)
            copy = x * 1
            in_place([copy], given)
            (also,) = torch.autograd.grad(copy.sum(), x)
            assert same_bits(found, expected) and same_bits(also, expected)


def test_a_recorded_clamp_keeps_no_more_than_its_operands() -> None:
    """The masks are made in the backward pass, so checkpointing saves what it promises."""
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x = torch.ones(3, requires_grad=True)
    with reproml.exact(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = x.clamp(0.0, 1.0)
    assert [each.dtype for each in kept] == [torch.float32]
    with reproml.exact():
        y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1]


def test_other_threads_keep_pytorchs_gradient() -> None:
    def gradient() -> Tensor:
        x = torch.ones((), requires_grad=True)
        return torch.autograd.grad(x.clamp(max=1.0), x)[0]

    native, found = gradient(), []
    start = threading.Event()

    def wait() -> None:
        start.wait()
        found.append(gradient())

    thread = threading.Thread(target=wait)
    thread.start()  # before exact(), so not within it
    with reproml.exact():
        start.set()
        thread.join()
        assert gradient() == 1
    assert found == [native] and gradient() == native


def test_every_form_of_clamp_is_in_the_table() -> None:
    packets = ("clamp", "clamp_min", "clamp_max")
    forms = {
        f"{packet}.{overload}".replace(".default", "")
        for packet in packets
        for overload in getattr(torch.ops.aten, packet).overloads()
        if overload not in ("out", "Tensor_out")
    }
    assert set(operator_table.GRADIENTS) == forms | {"fmax", "fmin"}


def test_a_pytorch_without_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "GRADIENTS", operator_table.GRADIENTS)
    monkeypatch.delattr(torch.library, "get_kernel", raising=False)
    with pytest.raises(
        ImportError, match="does not know PyTorch .* torch.library.get_kernel is missing"
    ):
        with reproml.exact():
            pass
    monkeypatch.undo()
    with reproml.exact():
        pass


@pytest.mark.parametrize(("name", "first"), [("fmax", [1, 0, 0, 1]), ("fmin", [1, 1, 0, 1])])
def test_first_of_equal_numbers_gets_the_gradient(name, first):
    x = torch.tensor([1.0, 2.0, torch.nan, 3.0], requires_grad=True)
    y = torch.tensor([1.0, 3.0, 1.0, torch.nan], requires_grad=True)
    with reproml.exact():
        getattr(torch, name)(x, y).sum().backward()
    assert x.grad is not None and y.grad is not None
    assert x.grad.tolist() == first and y.grad.tolist() == [1 - n for n in first]
