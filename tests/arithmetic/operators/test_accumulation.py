"""The order in which autograd adds the gradients of a tensor that is used several times.

The engine runs the node that was created last among those that are ready. A node is created after
those it depends on, so backward is the forward pass in reverse, and the gradients of a tensor are added
from its last use to its first, each sum rounded to float32.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml

# Sums of these depend on their order: 1 + 2^-24 is a tie, 2^24 + 1 too.
FACTORS = st.sampled_from([1.0, -1.0, 2.0**-24, 3 * 2.0**-25, 2.0**24, -(2.0**24), 0.1, -0.3])
PROGRAM = st.lists(st.tuples(st.integers(0, 3), FACTORS), min_size=3, max_size=12)
LEAF, INNER = "leaf", "inner"


def fold(gradients):
    """((g1 + g2) + g3) + ..., each sum rounded to float32."""
    total = np.float32(gradients[0])
    for g in gradients[1:]:
        total = np.float32(total + np.float32(g))
    return float(total)


@settings(max_examples=30)
@given(st.lists(FACTORS, min_size=3, max_size=9), st.randoms(), st.sampled_from([LEAF, INNER]))
def test_gradients_are_added_from_the_last_use_to_the_first(factors, random, kind):
    """Whatever the order in which the uses flow into the loss."""
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
def test_each_backward_adds_to_the_gradient_that_is_there(a, b, c):
    with reproml.exact():
        x = torch.ones(1, requires_grad=True)
        for f in (a, b, c):
            (x * f).sum().backward()
    assert x.grad is not None
    assert x.grad.item() == fold([a, b, c])


def run(program):
    """A graph in which each step uses one of the last four tensors; the gradient of its start."""
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
    """The same gradient from a list of operations, run backwards; no autograd."""
    with reproml.exact(), torch.no_grad():
        x = torch.linspace(-1.0, 1.0, 5)
        tensors, outputs = [x * 1.0], []
        for back, factor in program:
            used = max(0, len(tensors) - 1 - back)
            outputs.append(tensors[used].tanh())
            tensors.append(tensors[0] * factor + outputs[-1])
        grads = [torch.ones(5) for _ in tensors]  # of the stack, the last use of all
        for i in range(len(program), 0, -1):
            back, factor = program[i - 1]
            used = max(0, i - 1 - back)
            # in the forward pass: tensors[0] * factor, then tanh, so backward the other way round
            grads[used] += torch.ops.aten.tanh_backward(grads[i], outputs[i - 1])
            grads[0] += grads[i] * factor
        return grads[0].tolist()


@settings(max_examples=20)
@given(PROGRAM)
def test_backward_is_the_forward_pass_in_reverse(program):
    assert run(program) == by_hand(program)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_neither_threads_nor_what_ran_before_changes_the_order(threads):
    program = [(i % 4, f) for i, f in enumerate([0.1, 2.0**24, -0.3, 1.0, -(2.0**24), 2.0**-24])]
    results = []
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        for _ in range(3):
            results.append(run(program))
            (torch.ones(1, requires_grad=True) * 1.0 + 1.0).sum().backward()  # moves the numbers on
    elsewhere = threading.Thread(target=lambda: results.append(run(program)))
    elsewhere.start()
    elsewhere.join()
    assert len(results) == 10
    assert results == [by_hand(program)] * 10


def test_hooks_see_the_whole_gradient_in_order_of_registration():
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
    whole = fold([2.0**-24, 2.0**-24, 1.0])
    scaled = float(np.float32(whole) * np.float32(3.0))
    end = float(np.float32(scaled) * np.float32(0.1))
    assert seen == [("first", whole), ("second", scaled), ("leaf", end), ("after", end)]
