"""Tests of operators/selection.py: operators whose results have a length that depends on the numbers."""

from __future__ import annotations

import math

import pytest
import torch

import reproml
from verification.oracle import bits_of_tensor, same_bits

X = torch.tensor([2.0, -0.0, 0.0, 2.0, -1.0, math.inf, 0.0])


def test_unique_elements_are_sorted():
    for in_order in (True, False):
        with reproml.exact():
            values, inverse, counts = torch.unique(X, in_order, True, True)
        assert same_bits(values, torch.tensor([-1.0, 0.0, 2.0, math.inf]))
        assert inverse.tolist() == [2, 1, 1, 2, 0, 3, 1]
        assert counts.tolist() == [1, 3, 2, 1]


def test_unique_slices_are_sorted():
    x = torch.stack([X, X.abs()])
    with reproml.exact():
        values, inverse = torch.unique(x, dim=1, return_inverse=True)
    assert same_bits(values, torch.tensor([[-1.0, 0.0, 2.0, math.inf], [1.0, 0.0, 2.0, math.inf]]))
    assert inverse.tolist() == [2, 1, 1, 2, 0, 3, 1]


def test_unique_consecutive_ignores_the_sign_of_zero():
    with reproml.exact():
        values, counts = torch.unique_consecutive(X, return_counts=True)
    assert bits_of_tensor(values) == bits_of_tensor(
        torch.tensor([2.0, 0.0, 2.0, -1.0, math.inf, 0.0])
    )
    assert counts.tolist() == [1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["cummax", "cummin"])
def test_running_extrema_take_the_last_of_equal_elements(name):
    x = torch.tensor([1.0, -0.0, 0.0, 1.0, math.nan, 2.0, math.nan])
    with reproml.exact():
        values, indices = getattr(torch, name)(x, 0)
    assert indices.tolist() == (
        [0, 0, 0, 3, 4, 4, 6] if name == "cummax" else [0, 1, 2, 2, 4, 4, 6]
    )
    assert same_bits(values, x[indices])


@pytest.mark.parametrize(
    ("x", "limits", "first", "last"),
    [
        (torch.empty(0), None, 0.0, 1.0),
        (torch.ones(3), (2.0, 2.0), 1.5, 2.5),
        (torch.ones(3), None, 0.5, 1.5),
    ],
)
def test_histogram_without_width_has_default_range(x, limits, first, last):
    with reproml.exact():
        counts, edges = torch.histogram(x, 4, range=limits)
    native = torch.histogram(x, 4, range=limits)
    assert edges.tolist() == native.bin_edges.tolist()
    assert (edges[0], edges[-1]) == (first, last) and torch.equal(counts, native.hist)


def test_elements_outside_of_all_segments_are_left_out():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    with reproml.exact():
        y = torch.segment_reduce(x, "sum", offsets=torch.tensor([1, 2, 4]))
        y.sum().backward()
    assert y.tolist() == [2, 12]
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
