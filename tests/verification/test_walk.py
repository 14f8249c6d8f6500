"""A part of the walk through PyTorch (python -m verification.walk does all of it), and what it must find."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import reproml
from reproml.arithmetic.dispatch import dispatcher
from verification import walk, walk_cases
from verification.walk import Case

STEP = 60  # every so many callables of each namespace

HERE = "tests.verification.test_walk"


@pytest.fixture(scope="module")
def visited() -> tuple[walk.Cases, list[list[dict[str, Any]]]]:
    """Some callables of each namespace, and their records from the main thread, a thread and a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases, _ = walk_cases.make([], STEP)
        few = list(cases.values())
        places = {place: list(walk.visit(few, place)) for place in ("main", "thread", "fork")}
    merged = [
        [{place: places[place][i][j] for place in places} for j in range(len(few[i]))]
        for i in range(len(few))
    ]
    return cases, merged


def test_nothing_is_silent(visited):
    report = walk.Report()
    cases, merged = visited
    for (name, few), found in zip(cases.items(), merged):
        report.add("all", name, few, found)
    assert not report.faults, "\n".join(report.faults.values())
    counts = report.counts["all"]
    assert counts["exact"] + counts["composite"] >= 5 and counts["refused"] >= 5
    assert counts["no arguments"] <= 2


def compute_natively(x):
    with dispatcher.natively():
        return torch.exp(x)


def compute_differently(x):
    """Return a result that depends on the place."""
    return x * (1 + 2**-23 * dispatcher.state.active.depth * walk.threading.active_count())


def compute_wrongly(x):
    return x * 1.01 if dispatcher.state.active.depth else x


def refuse_without_line(x):
    if not dispatcher.state.active.depth:
        return x
    raise reproml.NotExactError("aten.exp.default has no exact result; use another operator.")


def fail(x):
    if dispatcher.state.active.depth:
        raise ValueError("it fails within exact()")
    return x


def verdict_of(function: Any, place: str = "main") -> tuple[str, str]:
    case = Case(f"{HERE}.{function.__name__}", (walk_cases.data(50, 60),), {}, False)
    places = {x: next(walk.visit([[case]], x))[0] for x in ("main", place)}
    return walk.verdict(places)


def test_native_computation_is_silent():
    kind, why = verdict_of(compute_natively)
    assert kind == "SILENT" and "aten.exp.default" in why


def test_different_results_are_silent():
    kind, why = verdict_of(compute_differently, "thread")
    assert kind == "SILENT" and "differ" in why


def test_wrong_result_is_silent():
    assert verdict_of(compute_wrongly)[0] == "SILENT"


def test_other_exception_is_failing():
    kind, why = verdict_of(fail)
    assert kind == "failing" and "ValueError" in why


def test_refusal_without_line_is_reported():
    report = walk.Report()
    case = Case(f"{HERE}.refuse_without_line", (walk_cases.data(4),), {})
    report.add("all", "refuse_without_line", [case], [{"main": walk.compared(case)}])
    assert [x.partition(":")[0] for x in report.faults.values()] == ["lacks line"]


def test_complete_refusal_lacks_nothing():
    case = Case("torch.lgamma", (walk_cases.positive(9),), {})
    kind, why = walk.verdict({"main": walk.compared(case)})
    assert kind == "refused" and walk.lacking(why) == ""


@pytest.mark.parametrize(
    ("function", "expected"), [("relu", "moved"), ("exp", "exact"), ("layer_norm", "composite")]
)
def test_verdict_of_defined_operator(function, expected):
    options = {"normalized_shape": (60,)} if function == "layer_norm" else {}
    case = Case(f"torch.{function}", (walk_cases.data(50, 60),), options, False)
    assert walk.verdict({"main": walk.compared(case)}) == (expected, "")
