"""Tests of operators/recurrent_steps.py: the nodes return the bits of the expressions they stand for.

The oracle is operators/recurrent.py itself, whose operators autograd differentiates one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.operators import recurrent_steps
from verification.oracle import same_bits

pytestmark = pytest.mark.skipif(kernels.library is None, reason="needs the C library")

LAYERS: dict[str, Any] = {
    "lstm": lambda: nn.LSTM(5, 7),
    "lstm without bias": lambda: nn.LSTM(5, 7, bias=False),
    "lstm, two layers": lambda: nn.LSTM(5, 7, 2, bidirectional=True, dropout=0.5, batch_first=True),
    "lstm with projection": lambda: nn.LSTM(5, 7, proj_size=3),
    "wide lstm": lambda: nn.LSTM(3, 300),
    "gru": lambda: nn.GRU(5, 7),
    "gru, two layers": lambda: nn.GRU(5, 7, 2, bidirectional=True),
    "tanh": lambda: nn.RNN(5, 7),
    "relu": lambda: nn.RNN(5, 7, nonlinearity="relu", bidirectional=True),
}


@contextmanager
def expressions() -> Iterator[None]:
    """Evaluate the expressions themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_steps, "_has_node", lambda *operands: False)
        yield


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another test may have met a device, after which expressions are recorded for it."""
    monkeypatch.setattr(replay_log, "active", False)


@contextmanager
def nodes(expected: bool = True) -> Iterator[None]:
    """Check that nodes are used, or are not."""
    used: list[Any] = []

    def observe(*operands: Any) -> bool:
        used.append(has_node(*operands))
        return bool(used[-1])

    has_node = recurrent_steps._has_node
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recurrent_steps, "_has_node", observe)
        yield
    assert any(used) == expected


def states_of(layer: Any, batch: int) -> Any:
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, batch, layer.proj_size or layer.hidden_size, requires_grad=True)
    if isinstance(layer, nn.LSTM):
        return h, torch.randn(count, batch, layer.hidden_size, requires_grad=True)
    return h


def flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for y in x for t in flat(y)]


def weighted(results: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for x in results:
        total = total + (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()
    return total


def run(name: str, loss: Any, steps: int = 6, batch: int = 4) -> list[Tensor]:
    """Return the results of a layer, and the gradients of a loss (layer, x, states) -> (loss, results)."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(steps, batch, layer.input_size, requires_grad=True)
    states = states_of(layer, steps if layer.batch_first else batch)
    operands = [x, *flat(states), *layer.parameters()]
    with reproml.exact():
        torch.manual_seed(1)
        value, results = loss(layer, x, states)
        found = torch.autograd.grad(value, operands, allow_unused=True)
    return [*results, *[t for t in found if t is not None]]


def plain(layer: Any, x: Tensor, states: Any) -> Any:
    results = flat(layer(x, states))
    return weighted(results), results


def outputs_only(layer: Any, x: Tensor, states: Any) -> Any:
    results = flat(layer(x))
    return weighted(results[:1]), results


def last_only(layer: Any, x: Tensor, states: Any) -> Any:
    results = flat(layer(x, states))
    return weighted(results[1:2]), results


def c_only(layer: Any, x: Tensor, states: Any) -> Any:
    results = flat(layer(x, states))
    return weighted(results[-1:]), results


def shared(layer: Any, x: Tensor, states: Any) -> Any:
    """Use the weights several times, before and after."""
    weights = list(layer.parameters())
    first = flat(layer(x, states))
    second = flat(layer(-x, states))
    penalty = sum((w * w).sum() for w in weights)
    return weighted([*first, *second]) + penalty, [*first, *second]


def penalized(layer: Any, x: Tensor, states: Any) -> Any:
    """A second derivative, beside the first of the same results."""
    results = flat(layer(x, states))
    operands = [x, *flat(states), *layer.parameters()]
    found = torch.autograd.grad(weighted(results), operands, create_graph=True)
    penalty = sum((g * g).sum() for g in found)
    return penalty + weighted(results), [*results, *found]


def penalty_alone(layer: Any, x: Tensor, states: Any) -> Any:
    results = flat(layer(x, states))
    (found,) = torch.autograd.grad(weighted(results[:1]), [x], create_graph=True)
    return (found * found).sum(), [*results, found]


LOSSES = [plain, outputs_only, last_only, c_only, shared, penalized, penalty_alone]


# The penalties of the wide layer take long.
WITH_LOSS = [
    (name, loss)
    for name in LAYERS
    for loss in LOSSES
    if name != "wide lstm" or loss not in (penalized, penalty_alone)
]


@pytest.mark.parametrize(("name", "loss"), WITH_LOSS)
def test_layer_has_the_bits_of_its_expression(name, loss):
    for steps in (1, 6):
        with expressions():
            expected = run(name, loss, steps)
        with nodes():
            found = run(name, loss, steps)
        assert [x.shape for x in found] == [x.shape for x in expected]
        assert [x.stride() for x in found] == [x.stride() for x in expected]
        assert [same_bits(a, b) for a, b in zip(found, expected)] == [True] * len(found)


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "wide lstm", "two sections"])
def test_packed_weight_has_the_bits_of_its_products(name, monkeypatch):
    """From five rows on, the steps of a layer share the panels of the weight."""
    monkeypatch.setitem(LAYERS, "two sections", lambda: nn.LSTM(2, 520, bias=False))  # 2,080 terms

    def update(layer: Any, x: Tensor, states: Any) -> Any:
        first, results = plain(layer, x, states)
        with torch.no_grad():
            changed = [w * 1.5 for w in layer.parameters()]
            for w, y in zip(layer.parameters(), changed):
                w.data = y
        second, more = plain(layer, x, states)
        return second, [first, *results, *more]

    with expressions():
        expected = run(name, update, 3, batch=7)
    with nodes():
        found = run(name, update, 3, batch=7)
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("number", [0.5, 0.0, 2.0**-12, math.nan])
@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "relu"])
def test_rows_of_several_threads_have_the_bits_of_one(name, number, monkeypatch):
    """Each thread takes its rows through all steps. A test may fail in the rows of one of them."""

    def constant_rows(layer: Any, x: Tensor, states: Any) -> Any:
        rows = torch.arange(x.shape[1]).unsqueeze(1) < 9
        return plain(layer, torch.where(rows, number, x), states)

    with expressions():
        expected = run(name, constant_rows, batch=40)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with nodes():
                assert all(map(same_bits, run(name, constant_rows, batch=40), expected))
        monkeypatch.setattr(kernels, "library", Failing(kernels.library, [6, 3]))
        assert all(map(same_bits, run(name, constant_rows, batch=40), expected))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "relu"])
def test_several_nodes_have_the_bits_of_one(name, monkeypatch):
    """A layer with a large weight is one node for each few steps."""
    with expressions():
        expected = run(name, shared)
    monkeypatch.setattr(recurrent_steps, "_MOST_GRADIENTS", 4 * 4 * 7 * 7)
    assert all(map(same_bits, run(name, shared), expected))
    with expressions():
        expected = run(name, penalized)
    assert all(map(same_bits, run(name, penalized), expected))


class Failing:
    """The compiled loops, where tests fail at every second step, and backward with `steps` left."""

    def __init__(self, library: Any, steps: Sequence[int]) -> None:
        self.library, self.steps = library, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def reproml_cell(self, *args: Any) -> int:
        return 1

    reproml_cell_backward = reproml_cell

    def reproml_layer(self, *args: Any) -> int:
        return int(min(self.library.reproml_layer(*args), args[4] + 1))

    def reproml_layer_backward(self, *args: Any) -> int:
        left = args[4]
        return int(left if left in self.steps else self.library.reproml_layer_backward(*args))


@pytest.mark.parametrize("steps", [range(7), [6]])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "wide lstm"])
def test_steps_that_fail_are_computed_by_operators(name, steps, monkeypatch):
    with expressions():
        expected = run(name, plain)
    monkeypatch.setattr(kernels, "library", Failing(kernels.library, steps))
    assert all(map(same_bits, run(name, plain), expected))


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "relu"])
@pytest.mark.parametrize(
    "number", [0.0, -0.0, 1e-45, 2.0**-12, 1.0, 100.0, 1e38, math.inf, math.nan]
)
def test_special_numbers_have_the_bits_of_the_expression(name, number):
    def special(layer: Any, x: Tensor, states: Any) -> Any:
        x = torch.where(torch.arange(5) % 2 == 0, x * number, x)
        return plain(layer, x, states)

    with expressions():
        expected = run(name, special)
    with nodes():
        found = run(name, special)
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("name", ["lstm", "gru", "tanh", "relu"])
def test_constant_weights_have_the_bits_of_the_expression(name):
    """All gates of a step are equal then, and many values are midpoints."""

    def constant(layer: Any, x: Tensor, states: Any) -> Any:
        with torch.no_grad():
            for i, w in enumerate(layer.parameters()):
                w.fill_([0.0, 0.5, -0.25, 1.0][i % 4])
        return plain(layer, x.round(), tree_map(torch.round, states))

    with expressions():
        expected = run(name, constant)
    with nodes():
        assert all(map(same_bits, run(name, constant), expected))


CELLS: dict[str, Any] = {
    "lstm": lambda: nn.LSTMCell(5, 7),
    "gru": lambda: nn.GRUCell(5, 7, bias=False),
    "tanh": lambda: nn.RNNCell(5, 7),
    "relu": lambda: nn.RNNCell(5, 7, nonlinearity="relu"),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_cells_have_the_bits_of_their_expressions(name, create_graph):
    def outcome() -> list[Tensor]:
        torch.manual_seed(0)
        cell = CELLS[name]()
        x, h, c = (torch.randn(6, 4, n, requires_grad=True) for n in (5, 7, 7))
        with reproml.exact():
            state: Any = (h[0], c[0]) if name == "lstm" else h[0]
            results = []
            for step in x:
                state = cell(step, state)
                results += flat(state)
            operands = [x, h, *cell.parameters()]
            found = list(
                torch.autograd.grad(weighted(results), operands, create_graph=create_graph)
            )
            if create_graph:
                penalty = sum((g * g).sum() for g in found) + weighted(results)
                found += torch.autograd.grad(penalty, operands)
        return [*results, *found]

    with expressions():
        expected = outcome()
    with nodes():
        found = outcome()
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("trained", [[], [0], [1], [2], [3], [0, 2], [1, 3]])
@pytest.mark.parametrize("name", ["lstm", "gru", "lstm with projection"])
def test_frozen_parameters_get_no_gradient(name, trained):
    def outcome() -> list[Tensor]:
        torch.manual_seed(0)
        layer = LAYERS[name]()
        for i, w in enumerate(layer.parameters()):
            w.requires_grad_(i in trained)
        with reproml.exact():
            results = flat(
                layer(torch.randn(3, 4, 5), tree_map(Tensor.detach, states_of(layer, 4)))
            )
            if trained:
                weighted(results).backward()
        gradients = [w.grad for w in layer.parameters()]
        assert [i for i, g in enumerate(gradients) if g is not None] == trained
        return [*results, *[g for g in gradients if g is not None]]

    with expressions():
        expected = outcome()
    with nodes():
        found = outcome()
    assert all(map(same_bits, found, expected))


def test_results_may_be_overwritten():
    """Nothing that is returned is needed for the gradients."""
    layer = nn.LSTM(5, 7)
    with reproml.exact():
        y, (h, c) = layer(torch.randn(3, 4, 5))
        for x in (y, h, c):
            x.mul_(2)
        (y.sum() + h.sum() + c.sum()).backward()


def test_weight_that_is_overwritten_is_an_error():
    layer = nn.GRU(5, 7)
    with reproml.exact():
        y, _ = layer(torch.randn(3, 4, 5))
        with torch.no_grad():
            list(layer.parameters())[1].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_second_backward_pass_has_the_bits_of_the_first():
    layer = nn.LSTM(5, 7)
    with reproml.exact():
        y, _ = layer(torch.randn(3, 4, 5))
        found = [
            torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True) for _ in "ab"
        ]
    assert all(map(same_bits, found[0], found[1]))


def test_modes_and_transforms_see_the_operators():
    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += func is torch.ops.aten.tanh.default
            return func(*args, **(kwargs or {}))

    layer, x = nn.LSTM(5, 7), torch.randn(3, 4, 5)
    parameters = dict(layer.named_parameters())

    def loss(parameters: Any, x: Tensor) -> Any:
        return weighted(flat(torch.func.functional_call(layer, parameters, (x,))))

    with reproml.exact():
        expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        with Count() as mode, nodes(False):
            layer(x)
        assert mode.count == 3
        with nodes(False):
            found = torch.func.grad(loss)(parameters, x)
        assert all(map(same_bits, found.values(), expected))
        t = torch.randn_like(x)
        with nodes(False):
            _, expected = torch.func.jvp(lambda x: flat(layer(x))[0], (x,), (t,))
        with forward_ad.dual_level(), nodes(False):
            y = flat(layer(forward_ad.make_dual(x, t)))[0]
            assert same_bits(forward_ad.unpack_dual(y).tangent, expected)


def test_a_mode_of_the_backward_pass_sees_operators():
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    layer, x = nn.GRU(5, 7), torch.randn(3, 4, 5)
    with reproml.exact():
        expected = torch.autograd.grad(weighted(flat(layer(x))), list(layer.parameters()))
        loss = weighted(flat(layer(x)))
        with Names() as mode:
            found = torch.autograd.grad(loss, list(layer.parameters()))
    assert "aten::tanh_backward" in mode.names
    assert all(map(same_bits, found, expected))
