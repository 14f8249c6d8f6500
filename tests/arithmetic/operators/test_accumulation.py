"""Test the order in which autograd adds the gradients of a tensor that is used several times.

Among the nodes that are ready, the engine runs the one that was created last. A node is created after
those it depends on, so backward runs the operations of the forward pass in reverse order. The gradients
of a tensor are added from its last use to its first, each sum rounded to float32.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml

# Sums of these numbers depend on their order: 1 + 2^-24 and 2^24 + 1 are ties.
FACTORS = st.sampled_from([1.0, -1.0, 2.0**-24, 3 * 2.0**-25, 2.0**24, -(2.0**24), 0.1, -0.3])
PROGRAM = st.lists(st.tuples(st.integers(0, 3), FACTORS), min_size=3, max_size=12)
LEAF, INNER = "leaf", "inner"


def fold(gradients):
    """Return ((g1 + g2) + g3) + ..., each sum rounded to float32."""
    total = np.float32(gradients[0])
    for g in gradients[1:]:
        total = np.float32(total + np.float32(g))
    return float(total)


@settings(max_examples=30)
@given(st.lists(FACTORS, min_size=3, max_size=9), st.randoms(), st.sampled_from([LEAF, INNER]))
def test_gradients_are_added_from_last_to_first_use(factors, random, kind):
    """The order in which the uses enter the loss does not matter."""
    with reproml.exact():
        x = torch.ones(1, requires_grad=True)
        h = x if kind == LEAF else x * 1.0
        uses = [h * f for f in factors]
        random.shuffle(uses)
        loss = torch.cat(uses).sum()
        loss.backward()
    assert x.grad is not None
    assert x.grad.item() == fold(factors[::-1])


@settings(max_examples=30)
@given(FACTORS, FACTORS, FACTORS)
def test_backward_adds_to_existing_gradient(a, b, c):
    with reproml.exact():
        x = torch.ones(1, requires_grad=True)
        for f in (a, b, c):
            (x * f).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == fold([a, b, c])


def run(program):
    """Return the gradient of the first tensor of a graph whose steps use one of the last four tensors."""
    with reproml.exact():
        x = torch.linspace(-1.0, 1.0, 5).requires_grad_()
        tensors = [x * 1.0]
        for back, factor in program:
            used = tensors[max(0, len(tensors) - 1 - back)]
            tensors.append(tensors[0] * factor + used.tanh())
        torch.stack(tensors).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def by_hand(program):
    """Return the same gradient without autograd, from a list of operations that is run backwards."""
    with reproml.exact(), torch.no_grad():
        x = torch.linspace(-1.0, 1.0, 5)
        tensors, outputs = [x * 1.0], []
        for back, factor in program:
            used = max(0, len(tensors) - 1 - back)
            outputs.append(tensors[used].tanh())
            tensors.append(tensors[0] * factor + outputs[-1])
        grads = [torch.ones(5) for _ in tensors]  # the gradient of the stack, which is the last use
        for i in range(len(program), 0, -1):
            back, factor = program[i - 1]
            used = max(0, i - 1 - back)
            # The forward pass multiplies tensors[0] first, then applies tanh; backward reverses that order.
            grads[used] += torch.ops.aten.tanh_backward(grads[i], outputs[i - 1])
            grads[0] += grads[i] * factor
        return grads[0].tolist()


@settings(max_examples=20)
@given(PROGRAM)
def test_backward_reverses_forward_order(program):
    assert run(program) == by_hand(program)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_order_is_independent_of_threads_and_history(threads):
    program = [(i % 4, f) for i, f in enumerate([0.1, 2.0**24, -0.3, 1.0, -(2.0**24), 2.0**-24])]
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        for _ in range(3):
            results.append(run(program))
            # Another graph advances the sequence numbers of nodes.
            (torch.ones(1, requires_grad=True) * 1.0 + 1.0).sum().backward()
    elsewhere = threading.Thread(target=lambda: results.append(run(program)))
    elsewhere.start()
    elsewhere.join()
    assert len(results) == 10
    assert results == [by_hand(program)] * 10


def test_hooks_see_accumulated_gradient_in_registration_order():
    seen = []

    def scale(name, factor):
        def hook(g):
            seen.append((name, g.item()))
            return g * factor

        return hook

    with reproml.exact():
        x = torch.ones(1, requires_grad=True)
        h = x * 1.0
        h.register_hook(scale("first", 3.0))
        h.register_hook(scale("second", 0.1))
        x.register_hook(lambda g: seen.append(("leaf", g.item())))
        x.register_post_accumulate_grad_hook(lambda x: seen.append(("after", x.grad.item())))
        torch.cat([h * f for f in (1.0, 2.0**-24, 2.0**-24)]).sum().backward()
    accumulated = fold([2.0**-24, 2.0**-24, 1.0])
    scaled = float(np.float32(accumulated) * np.float32(3.0))
    end = float(np.float32(scaled) * np.float32(0.1))
    assert seen == [("first", accumulated), ("second", scaled), ("leaf", end), ("after", end)]
