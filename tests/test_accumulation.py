"""The gradients of micro-batches are those of the complete batch, bit for bit."""

from __future__ import annotations

import copy
import random
from typing import Any, Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reproml
from reproml import accumulation
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.distributed.micro_batches import Accumulation
from reproml.arithmetic.numerics.formats import NARROW
from reproml.errors import ReproError
from tests.arithmetic.distributed.test_sharded import (
    LOSSES,
    MODELS,
    classes,
    cnn,
    mlp,
    model_in_16_bits,
    regression_with,
    same,
)


def gradients(model: nn.Module) -> list[Any]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def complete(model: nn.Module, x: Any, y: Any, loss: Any) -> list[torch.Tensor]:
    """Return the loss, the gradients and the next random number after one backward pass."""
    torch.manual_seed(5)
    value = loss(model(x), y)
    value.backward()
    return [value.detach(), *gradients(model), torch.rand(1)]


def in_parts(model: nn.Module, x: Any, y: Any, loss: Any, sizes: Any) -> list[torch.Tensor]:
    torch.manual_seed(5)
    with reproml.accumulate(model, batch_size=len(x)):
        for rows, target in zip(x.split(sizes), y.split(sizes)):
            value = loss(model(rows), target)
            value.backward()
    return [value.detach(), *gradients(model), torch.rand(1)]


WITH_STATISTICS = ("batch norm", "batch norm 2d")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_STATISTICS])
def test_model_has_gradients_of_complete_batch(name):
    make, data = MODELS[name]
    torch.manual_seed(1)
    with reproml.exact():
        model, x, y = make(), data(5), classes(5)
        expected = complete(copy.deepcopy(model), x, y, F.cross_entropy)
        for sizes in (1, 2, 5, [1, 3, 1]):
            found = in_parts(copy.deepcopy(model), x, y, F.cross_entropy, sizes)
            assert len(found) == len(expected) and all(map(same, found, expected))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_STATISTICS])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("weights", [False, True])
def test_model_in_16_bits_has_gradients_of_complete_batch(name, dtype, weights):
    """By autocast, or with weights of 16 bits."""
    with reproml.exact():
        model, x, y = model_in_16_bits(name, dtype, weights)
        expected = complete(copy.deepcopy(model), x, y, F.cross_entropy)
        found = in_parts(model, x, y, F.cross_entropy, 3)
        assert len(found) == len(expected) and all(map(same, found, expected))


class Factored(nn.Module):
    """A layer whose weight is a product that autocast does not cast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(s)) for s in ((3, 2), (2, 4)))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            weight = self.a @ self.b
        return F.linear(x, weight)


def test_autocast_at_the_end_of_the_block_casts_nothing():
    """Operators that were not within autocast when they were called are not when they are computed."""

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(model(x), y)
        with torch.autocast("cpu", enabled=False):
            value.backward()
        return value.detach()

    torch.manual_seed(1)
    with reproml.exact(), torch.autocast("cpu", torch.bfloat16):
        model, x, y = Factored(), torch.randn(5, 4), classes(5)
        other = copy.deepcopy(model)
        expected = [loss(model, x, y), *gradients(model)]
        with reproml.accumulate(other, 5):
            for rows, target in zip(x.split(2), y.split(2)):
                value = loss(other, rows, target)
        assert all(map(same, [value.detach(), *gradients(other)], expected))


def test_numbers_are_added_in_place_in_the_dtype_of_the_loss():
    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(out, y)
        value += torch.tensor([2.0**-20]).sum()
        return value

    with reproml.exact():
        model, x, y = mlp().bfloat16(), torch.randn(5, 4).bfloat16(), classes(5)
        expected = complete(copy.deepcopy(model), x, y, loss)
        assert all(map(same, in_parts(model, x, y, loss, 2), expected))


# Those that divide by a total of the batch which a micro-batch does not know.
UNKNOWN_TOTAL = {
    "weights": "reduction='sum' and divide by the total",
    "ignored": "reduction='sum' and divide by the total",
    "smoothed": "divide a sum by a number",
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in UNKNOWN_TOTAL])
def test_loss_is_that_of_complete_batch(name):
    loss, target = LOSSES[name]
    torch.manual_seed(2)
    with reproml.exact():
        model, x, y = mlp(), torch.randn(5, 4), target(5)
        expected = complete(copy.deepcopy(model), x, y, loss)
        for sizes in (1, 2, [4, 1]):
            found = in_parts(copy.deepcopy(model), x, y, loss, sizes)
            assert all(map(same, found, expected))


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in UNKNOWN_TOTAL])
@pytest.mark.parametrize("dtype", NARROW)
def test_loss_in_16_bits_is_that_of_complete_batch(name, dtype):
    loss, target = LOSSES[name]
    torch.manual_seed(2)
    with reproml.exact():
        model, x, y = mlp().to(dtype), torch.randn(5, 4).to(dtype), target(5)
        y = y.to(dtype) if y.is_floating_point() else y
        expected = complete(copy.deepcopy(model), x, y, loss)
        assert all(map(same, in_parts(model, x, y, loss, 2), expected))


@settings(max_examples=25)
@given(st.data())
def test_any_split_and_data_give_the_same_gradients(data):
    """Numbers of many magnitudes, zeros and ties, with and without the C library."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 2**30))
    spread = data.draw(st.sampled_from([0, 8, 60]))
    compiled = data.draw(st.booleans())
    torch.manual_seed(seed)
    rows = sum(sizes)
    scale = torch.randint(-spread, spread + 1, (rows, 1))
    x = torch.ldexp(torch.randn(rows, 4).round(decimals=2), scale)
    with reproml.exact():
        model, y = mlp(), classes(rows)
        expected = complete(copy.deepcopy(model), x, y, F.cross_entropy)
        library = kernels.library
        kernels.library = library if compiled else None
        try:
            found = in_parts(copy.deepcopy(model), x, y, F.cross_entropy, sizes)
        finally:
            kernels.library = library
    assert all(map(same, found, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_as_in_complete_batch(bad):
    with reproml.exact():
        model, x, y = regression_with(bad)
        expected = complete(copy.deepcopy(model), x, y, F.mse_loss)
        assert all(map(same, in_parts(model, x, y, F.mse_loss, 1), expected))


@pytest.mark.parametrize("name", WITH_STATISTICS)
@pytest.mark.parametrize("size", [1, 3])
def test_batch_statistics_are_refused(name, size):
    make, data = MODELS[name]
    with reproml.exact():
        model = make()
        before = [x.clone() for x in model.buffers() if x.dim()]
        with pytest.raises(
            reproml.NotExactError, match="a statistic over the batch, such as that of"
        ):
            in_parts(model, data(3), classes(3), F.cross_entropy, size)
    assert all(map(same, [x for x in model.buffers() if x.dim()], before))  # running statistics


@pytest.mark.parametrize("name", UNKNOWN_TOTAL)
def test_unknown_total_of_loss_is_refused(name):
    loss, target = LOSSES[name]
    y = target(5)
    y[0] = 0
    with reproml.exact():
        model, x = mlp(), torch.randn(5, 4)
        with pytest.raises(reproml.NotExactError, match=UNKNOWN_TOTAL[name]):
            in_parts(model, x, y, loss, 2)


REMEDIES: dict[str, dict[str, Any]] = {
    "weights": {"weight": torch.tensor([0.1, 2, 3])},
    "ignored": {"ignore_index": 0},
    "smoothed": {"label_smoothing": 0.1},
}


@pytest.mark.parametrize("name", REMEDIES)
def test_sum_divided_by_a_number_is_that_of_complete_batch(name):
    def loss(out: Any, y: Any) -> torch.Tensor:
        return F.cross_entropy(out, y, reduction="sum", **REMEDIES[name]) / 3

    with reproml.exact():
        model, x, y = mlp(), torch.randn(5, 4), classes(5)
        expected = complete(copy.deepcopy(model), x, y, loss)
        assert all(map(same, in_parts(model, x, y, loss, 2), expected))


def test_loss_of_pixels_is_that_of_complete_batch():
    with reproml.exact():
        model, x, y = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 5, 5), torch.randint(3, (4, 3, 3))
        expected = complete(copy.deepcopy(model), x, y, F.cross_entropy)
        assert all(map(same, in_parts(model, x, y, F.cross_entropy, 1), expected))


class Drawing(nn.Module):
    """Random numbers of every kind that a model may draw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        x = self.layer(x) * random.random() + np.random.rand()
        x = x + torch.rand(x.shape) + torch.rand_like(x)
        return F.dropout(x, 0.4) * x.new_empty(len(x), 1).bernoulli_(0.7)


def test_random_numbers_are_those_of_complete_batch():
    def seed() -> None:
        random.seed(1)
        np.random.seed(1)

    with reproml.exact():
        model, x, y = Drawing(), torch.randn(5, 4), classes(5)
        seed()
        expected = complete(copy.deepcopy(model), x, y, F.cross_entropy)
        after = random.random()
        for sizes in (1, 2):
            seed()
            found = in_parts(copy.deepcopy(model), x, y, F.cross_entropy, sizes)
            assert random.random() == after and all(map(same, found, expected))


def test_numbers_drawn_between_micro_batches_differ():
    """Those of augmentation, say: only the model's are drawn once for the complete batch."""
    torch.manual_seed(1)
    drawn = []
    with reproml.exact():
        model = mlp(nn.Dropout(0.5))
        with reproml.accumulate(model, 3):
            for _ in range(3):
                drawn.append(float(torch.rand(1)))
                model(torch.ones(1, 4)).sum().backward()
    assert len(set(drawn)) == 3


def steps(model: nn.Module, parts: bool, zero: str) -> str:
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3):
        x, y = torch.randn(6, 4), classes(6)
        if zero == "before":
            optimizer.zero_grad()
        if not parts:
            out = model(x)
            if zero == "between":
                optimizer.zero_grad()
            F.cross_entropy(out, y).backward()
        else:
            with reproml.accumulate(model, 6):
                for a, b in zip(x.split(4), y.split(4)):
                    out = model(a)
                    if zero == "between":
                        optimizer.zero_grad()
                    F.cross_entropy(out, b).backward()
        optimizer.step()
    return reproml.digest(model)


@pytest.mark.parametrize("zero", ["before", "between", "never"])
def test_gradients_are_zeroed_or_added_as_in_complete_batch(zero):
    with reproml.exact():
        model = mlp()
        assert steps(copy.deepcopy(model), True, zero) == steps(model, False, zero)


def test_two_backward_passes_add_their_gradients():
    def backward(model: nn.Module, x: torch.Tensor) -> None:
        out = model(x)
        out.sum().backward(retain_graph=True)
        (out * out).mean().backward()

    with reproml.exact():
        model, x = mlp(), torch.randn(5, 4)
        other = copy.deepcopy(model)
        backward(model, x)
        with reproml.accumulate(other, 5):
            for rows in x.split(2):
                backward(other, rows)
    assert all(map(same, gradients(other), gradients(model)))


def test_frozen_and_unused_parameters_have_no_gradients():
    with reproml.exact():
        model: Any = mlp()
        x, y = torch.randn(5, 4), classes(5)
        model[1].weight.requires_grad_(False)
        model.unused = nn.Parameter(torch.ones(2))
        other = copy.deepcopy(model)
        expected = complete(model, x, y, F.cross_entropy)
        assert all(map(same, in_parts(other, x, y, F.cross_entropy, 2), expected))
    assert other[1].weight.grad is other.unused.grad is None


def test_regularization_is_counted_once():
    def loss(model: Any) -> Callable[..., torch.Tensor]:
        return lambda out, y: F.cross_entropy(out, y) + 0.1 * model[1].weight.square().sum()

    with reproml.exact():
        model, x, y = mlp(), torch.randn(5, 4), classes(5)
        other = copy.deepcopy(model)
        expected = complete(model, x, y, loss(model))
        assert all(map(same, in_parts(other, x, y, loss(other), 2), expected))


def test_evaluation_within_block_is_plain():
    with reproml.exact():
        model, x, y = mlp(), torch.randn(5, 4), classes(5)
        with reproml.accumulate(model, 5):
            for rows, target in zip(x.split(2), y.split(2)):
                F.cross_entropy(model(rows), target).backward()
                with torch.no_grad():
                    assert type(model(x)) is torch.Tensor


Body = Callable[[nn.Module, torch.Tensor], Any]


def backward_of_all(model: nn.Module, x: torch.Tensor, loss: Any) -> None:
    for number, rows in enumerate(x.split(2)):
        loss(model(rows), number).backward()


REFUSED: dict[str, tuple[Body, str]] = {
    "value": (
        lambda m, x: float(m(x[:2]).sum().detach()),
        "used before all micro-batches were computed",
    ),
    "statistic": (lambda m, x: m(x[:2]) - m(x[:2]).mean(0), "had no backward pass"),
    "mean of batch": (
        lambda m, x: (lambda out: out - out.mean(0))(m(x[:2])),
        "used before all micro-batches were computed",
    ),
    "root": (
        lambda m, x: m(x[:2]).square().sum().sqrt().backward(),
        "used before all micro-batches were computed",
    ),
    "written": (
        lambda m, x: torch.zeros(()).add_(m(x[:2]).sum().detach()),
        "used before all micro-batches were computed",
    ),
    "added losses": (
        lambda m, x: sum([_backward(m(rows).sum()) for rows in x.split(2)]),
        "already the loss of the complete batch",
    ),
    "step": (
        lambda m, x: (_backward(m(x[:2]).sum()), torch.optim.SGD(m.parameters(), lr=1.0).step()),
        "take the step after `with reproml.accumulate",
    ),
    "random": (lambda m, x: F.dropout(m(x[:2])), "draw them there"),
    "too few rows": (lambda m, x: _backward(m(x[:2]).sum()), "have 2 rows, but the batch has 5"),
    "too many rows": (
        lambda m, x: backward_of_all(m, torch.cat([x, x]), lambda out, _: out.sum()),
        "have 6 rows so far, but the batch has 5",
    ),
    "no backward": (lambda m, x: [m(rows).sum() for rows in x.split(2)], "had no backward pass"),
    "other numbers": (
        lambda m, x: backward_of_all(m, x, lambda out, i: (out * (i + 0.5)).sum()),
        "computed with different numbers",
    ),
    "other operators": (
        lambda m, x: backward_of_all(m, x, lambda out, i: out.sum() if i else out.mean(1).sum()),
        "computed with different (operators|numbers)",
    ),
    "fewer operators": (
        lambda m, x: backward_of_all(
            m, x, lambda out, i: out.sum() + (0 if i else out.exp().sum())
        ),
        "computed with different (operators|numbers)",
    ),
}


def _backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_result_is_refused(name):
    body, words = REFUSED[name]
    with reproml.exact():
        model = mlp()
        with pytest.raises((reproml.NotExactError, ReproError), match=words):
            with reproml.accumulate(model, 5):
                body(model, torch.ones(5, 4))
        assert type(model(torch.ones(2, 4))) is torch.Tensor  # the hooks are removed


def test_outside_of_exact_it_is_refused():
    with pytest.raises(ReproError, match="only within reproml.exact"):
        with reproml.accumulate(mlp(), 5):
            pass


def test_traced_training_is_refused(tmp_path):
    with reproml.exact(), reproml.trace(tmp_path / "t"):
        with pytest.raises(ReproError, match="a trace records complete batches"):
            with reproml.accumulate(mlp(), 5):
                pass


def test_loss_of_an_earlier_block_is_a_number():
    with reproml.exact():
        model, x = mlp(), torch.randn(4, 4)
        losses = []
        for _ in range(2):
            with reproml.accumulate(model, 4):
                for rows in x.split(2):
                    loss = model(rows).sum()
                    loss.backward()
            losses.append(loss.detach())
        assert losses[0].item() == sum(losses).item() / 2 == model(x).sum().item()


def test_memory_does_not_grow_with_micro_batches(monkeypatch):
    """What is kept of a batch of images: two numbers for an element of a gradient, and the losses."""
    blocks: list[Accumulation] = []

    def make(batch_size: int) -> Accumulation:
        blocks.append(Accumulation(batch_size))
        return blocks[-1]

    monkeypatch.setattr(accumulation, "Accumulation", make)

    with reproml.exact():
        model, x, y = cnn(), torch.randn(8, 2, 8, 8), classes(8)
        for size in (1, 4):
            in_parts(model, x, y, F.cross_entropy, size)
    weights = sum(p.numel() for p in model.parameters())
    for block in blocks:
        kept = [s for (kind, *_), s in block.sums if kind == "sum"]
        assert sum(s.s.numel() for s in kept) == weights and not any(s.rests for s in kept)
        rows = [s for (kind, *_), s in block.sums if kind == "rows"]
        assert sum(part.numel() for s in rows for part in s.parts) == 2 * len(x)


def test_model_of_float64_is_refused():
    model = torch.nn.Linear(3, 2).double()
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="not of float64"):
        with reproml.accumulate(model, batch_size=2):
            raise AssertionError
