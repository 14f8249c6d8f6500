"""The probes reveal a known order of summation, and only an order that is one."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reproml
from verification import summation_order
from verification.summation_order import find, leaves_of, tree_of

trees = st.permutations(range(9)).flatmap(
    lambda leaves: st.integers(0, 2**32 - 1).map(lambda seed: random_tree(leaves, seed))
)


def random_tree(leaves, seed):
    if len(leaves) == 1:
        return leaves[0]
    cut = 1 + seed % (len(leaves) - 1)
    return [random_tree(leaves[:cut], seed // 7), random_tree(leaves[cut:], seed // 5)]


def add_by(tree):
    """Return the function that adds up in binary32 in the order of a tree."""

    def add(x):
        values = x.numpy()

        def value(node):
            return values[node] if isinstance(node, int) else np.add(*map(value, node))

        return torch.tensor(value(tree))

    return add


def test_sum_from_left_to_right_is_revealed():
    def add(x):
        return torch.tensor(reduce(np.add, x.numpy()))

    found = find(add, 6)
    assert found.tree == [[[[[0, 1], 2], 3], 4], 5]
    assert found.wrong == 14  # all pairs but the first one
    assert "depth 5" in str(found)


@given(trees)
def test_any_tree_is_revealed(tree):
    found = find(add_by(tree), 9)
    assert found.tree is not None
    assert leaves_of(found.tree, 9) == leaves_of(tree, 9)


def test_exact_sum_reveals_no_tree():
    found = find(lambda x: torch.tensor(math.fsum(x.tolist())), 8)
    assert found == (0, None) and "no tree" in str(found)


def test_order_that_depends_on_values_is_no_tree():
    forward, backward = add_by([[[0, 1], 2], 3]), add_by([[[3, 2], 1], 0])
    found = find(lambda x: backward(x) if x[0] == 1 else forward(x), 4)
    assert found.wrong and found.tree is None
    assert "no binary tree" in str(found)


def test_every_element_of_a_result_counts():
    found = find(lambda x: torch.tensor([len(x) - 2, len(x) - 2 + 1e-6]), 20)
    assert found.wrong == 190
    found = find(lambda x: torch.tensor([len(x) - 2, math.nan]), 4)
    assert found.wrong == 6


def test_two_summands_have_one_tree():
    assert tree_of([[0.0, 2.0], [2.0, 0.0]]) == [0, 1]


def test_operators_have_trees_only_natively(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["summation_order", "--summands", "8", "--tree"])
    assert summation_order.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("exact   every probe gives n - 2: no tree") == 4
    assert shown.count(": tree ") == 4 and "[0, 1]" in shown


@pytest.mark.parametrize("add", [torch.sum, torch.amax])
def test_exit_status_requires_exactness_and_tree(monkeypatch, capsys, add):
    monkeypatch.setattr(sys, "argv", ["summation_order", "--summands", "8"])
    monkeypatch.setattr(summation_order, "OPERATORS", {"add": add})
    monkeypatch.setattr(reproml, "exact", nullcontext)
    assert summation_order.main() == 1
