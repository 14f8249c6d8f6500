"""The counts of different outputs find each kind of dependence on the batch."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reproml
from verification import invariance
from verification.invariance import VARIED, Case, different_outputs


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def tokens(n):
    return torch.randint(100, (n, invariance.TOKENS))


DEPENDENT = {
    "batch size": lambda x: x * len(x),
    "position": lambda x: x + torch.arange(len(x))[:, None],
    "neighbours": lambda x: x + x.amax(0),
    "padding": lambda x: x + (x < 0).sum(1, keepdim=True),
}


@pytest.mark.parametrize("varied", VARIED)
def test_dependence_is_found_where_it_is(varied):
    for name, function in DEPENDENT.items():
        found = different_outputs(Case(Function(function), tokens, True), VARIED[varied], 20)
        dependent = varied in (name, "all") or (varied, name) == ("batch size", "neighbours")
        assert (found > 1) == dependent, name


def test_independent_function_has_one_output():
    case = Case(Function(lambda x: F.one_hot(x.clamp(0), 100).float()), tokens, True)
    assert different_outputs(case, VARIED["all"], 20) == 1


def test_models_have_one_output_within_exact():
    for name, case in invariance.cases().items():
        with reproml.exact():
            assert different_outputs(case, VARIED["all"], 10) == 1, name


def test_transformer_reads_its_tokens():
    case = invariance.cases()["transformer"]
    with torch.no_grad():
        first, second = case.model(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]))
    assert not torch.equal(first[0], second[0])  # each token attends to all others


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x,  # the native outputs do not differ
        DEPENDENT["neighbours"],  # and here the exact ones do
    ],
)
def test_exit_status_requires_both_columns(monkeypatch, capsys, function):
    monkeypatch.setattr(sys, "argv", ["invariance", "--batches", "10"])
    monkeypatch.setattr(invariance, "cases", lambda: {"f": Case(Function(function), tokens, True)})
    monkeypatch.setattr(reproml, "exact", nullcontext)
    assert invariance.main() == 1
    assert "padding" in capsys.readouterr().out
