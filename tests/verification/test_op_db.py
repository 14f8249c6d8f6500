"""PyTorch's own operator samples, the first few of each operator (verification/op_db.py runs them all)."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from itertools import islice

import pytest
import torch

from reproml.arithmetic import operator_table
from verification import op_db

SAMPLES = 4  # of each operator

OPERATORS = list(op_db.operators())


@cache
def first_outcomes(index: int) -> tuple[list[op_db.Outcome], Counter[str]]:
    """Return the outcomes of an operator's first samples, and how often each table line was compared."""
    op = OPERATORS[index]
    outcomes: list[op_db.Outcome] = []
    compared: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample, backward in islice(op_db.samples(op), SAMPLES):
            outcome, calls = op_db.check(op, sample, backward)
            outcomes.append(outcome)
            compared.update(calls)
    return outcomes, compared


@pytest.mark.parametrize("index", range(len(OPERATORS)), ids=map(op_db.title, OPERATORS))
def test_no_sample_fails(index):
    """Each is rounded like its float64 reference, or refused; nothing else is raised."""
    outcomes, _ = first_outcomes(index)
    assert [x.reason for x in outcomes if x.status == "failed"] == []


def test_enough_samples_are_compared():
    """The test above would pass if everything were refused."""
    compared: Counter[str] = Counter()
    passed = []
    for index in range(len(OPERATORS)):
        outcomes, calls = first_outcomes(index)
        passed.append(sum(x.status == "passed" for x in outcomes))
        compared.update(calls)
    assert sum(n > 0 for n in passed) >= 590
    assert sum(passed) >= 2050
    assert len(compared) >= 250
    assert set(compared) <= set(operator_table.EXACT)


def test_wrong_result_is_found(monkeypatch):
    """The comparison finds a line of the table that is off by one ulp in one element."""
    definition = operator_table.EXACT["exp"]

    def wrong(x):
        y = definition(x)
        return y.view(-1).index_copy(0, torch.tensor([0]), y.view(-1)[:1] * (1 + 2**-23)).view_as(y)

    monkeypatch.setitem(operator_table.EXACT, "exp", wrong)
    (op,) = op_db.operators(["exp"])
    sample, backward = next(op_db.samples(op))
    outcome, _ = op_db.check(op, sample, backward)
    assert outcome.status == "failed" and "aten.exp" in outcome.reason
