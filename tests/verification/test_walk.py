"""A part of the walk through PyTorch (python -m verification.walk does all of it), and its verdicts."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch

import reproml
from reproml.arithmetic import state
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
    return x * (1 + 2**-23 * state.active.depth * threading.active_count())


def compute_wrongly(x):
    return x * 1.01 if state.active.depth else x


def compute_slightly_wrongly(x):
    return torch.exp(x) * (1 + 2**-14 if state.active.depth else 1)


def compute_wrong_remainder(x):
    """Return a small difference of large numbers, wrong by 1/1000 of the small one."""
    return (x + 1) - x * (1 - 2**-10 if state.active.depth else 1)


def permute_wrongly(x):
    return x.flip(0) if state.active.depth else x


def refuse_without_line(x):
    if not state.active.depth:
        return x
    raise reproml.NotExactError("aten.exp.default has no exact result; use another operator.")


def fail(x):
    if state.active.depth:
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


@pytest.mark.parametrize(
    "function",
    [compute_wrongly, compute_slightly_wrongly, compute_wrong_remainder, permute_wrongly],
)
def test_wrong_result_is_silent(function):
    assert verdict_of(function)[0] == "SILENT"


def test_cancelling_gradients_are_not_wrong():
    """The gradient is 1e-6 of its terms, as they sum to zero."""
    image = walk_cases.data(2, 4, 20, 20)
    case = Case("torch.batch_norm", (image, None, None, None, None, True, 0.1, 1e-5, False), {})
    assert walk.verdict({"main": walk.compared(case)})[0] == "composite"


def test_other_exception_is_failing():
    kind, why = verdict_of(fail)
    assert kind == "failing" and "ValueError" in why


def test_refusal_without_line_is_reported():
    report = walk.Report()
    case = Case(f"{HERE}.refuse_without_line", (walk_cases.data(4),), {})
    report.add("all", "refuse_without_line", [case], [{"main": walk.compared(case)}])
    assert [x.partition(":")[0] for x in report.faults.values()] == ["lacks line"]


def test_complete_refusal_lacks_nothing():
    case = Case("torch.special.bessel_y0", (walk_cases.positive(9),), {})
    kind, why = walk.verdict({"main": walk.compared(case)})
    assert kind == "refused" and walk.lacking(why) == ""


@pytest.mark.parametrize(
    ("function", "expected"), [("relu", "moved"), ("exp", "exact"), ("layer_norm", "composite")]
)
def test_verdict_of_defined_operator(function, expected):
    options = {"normalized_shape": (60,)} if function == "layer_norm" else {}
    case = Case(f"torch.{function}", (walk_cases.data(50, 60),), options, False)
    assert walk.verdict({"main": walk.compared(case)}) == (expected, "")


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.complex(x, x),
        lambda x: torch.complex(x, x).conj(),
        lambda x: x.rename("a", "b") if hasattr(x, "rename") else x,
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csc(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        lambda x: x.to("meta"),
        lambda x: torch.nn.LazyLinear(3),
        lambda x: x.bfloat16(),
        lambda x: [1.5, 2j, "a", None, torch.float32],
    ],
)
def test_every_kind_of_result_is_compared(make):
    x = walk_cases.data(5, 6, grad=False)
    case = Case("torch.sin", (x,), {}, False)
    results, others = list(walk.flatten(make(x))), list(walk.flatten(make(x * 3)))
    assert walk.digest(results) == walk.digest(list(walk.flatten(make(x.clone()))))
    assert walk.classify(case, results, results, results)[0] in ("moved", "composite")
    if any(isinstance(y, torch.Tensor) for y in results):
        assert walk.digest(results) != walk.digest(others)
        assert walk.classify(case, results, others, others)[0] in ("SILENT", "failing")


def test_child_that_cannot_start_ends_the_walk(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(SystemExit, match="does not start"):
        walk.walk({"torch.sin": [Case("torch.sin", (torch.ones(2),), {})]}, tmp_path)


def test_calls_after_a_crash_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "PLACES", ("main",))
    monkeypatch.setattr(walk, "SETTINGS", {"usual": walk.SETTINGS["usual"]})
    cases = {name: [Case(name, (torch.ones(2),), {}, False)] for name in ("torch.sin", "torch.exp")}
    cases = {"crash": [Case("os.abort", (), {})], **cases}
    found = walk.walk(cases, tmp_path)
    assert [few[0]["usual, main"]["status"] for few in found] == ["failing", "ran", "ran"]
