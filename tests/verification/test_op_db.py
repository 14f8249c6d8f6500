"""PyTorch's own operator samples, the first few of each operator (verification/op_db.py runs them all)."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import islice

import pytest

from reproml.arithmetic import operator_table
from verification import op_db

SAMPLES = 4  # of each operator

OPERATORS = list(op_db.operators())
outcomes: Counter[str] = Counter()
compared: Counter[str] = Counter()


@pytest.mark.parametrize("op", OPERATORS, ids=op_db.title)
def test_no_sample_is_wrong(op):
    """Each is rounded like its float64 reference, or refused; nothing else is raised."""
    statuses: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample, backward in islice(op_db.samples(op), SAMPLES):
            outcome, calls = op_db.check(op, sample, backward)
            statuses[outcome.status] += 1
            assert outcome.status != "failed", outcome.reason
            compared.update(calls)
    outcomes["operators"] += 1
    outcomes["claimed"] += statuses["passed"] > 0
    outcomes["samples"] += statuses["passed"]


def test_much_was_compared():
    """The test above would pass if everything were refused."""
    if outcomes["operators"] < len(OPERATORS):
        return  # run on its own, or on a selection
    assert outcomes["claimed"] >= 320
    assert outcomes["samples"] >= 1000
    assert len(compared) >= 110
    assert set(compared) <= set(operator_table.EXACT)


def test_a_wrong_result_is_seen(monkeypatch):
    """The comparison finds a line of the table that is off by one ulp in one element."""
    import torch

    definition = operator_table.EXACT["exp"]

    def wrong(x):
        y = definition(x)
        return y.view(-1).index_copy(0, torch.tensor([0]), y.view(-1)[:1] * (1 + 2**-23)).view_as(y)

    monkeypatch.setitem(operator_table.EXACT, "exp", wrong)
    (op,) = op_db.operators(["exp"])
    sample, backward = next(op_db.samples(op))
    outcome, _ = op_db.check(op, sample, backward)
    assert outcome.status == "failed" and "aten.exp" in outcome.reason
