"""Find where two trainings part, by how much, and why: traces, run folders, weights or golden files.

reproml diff a.trace b.trace           # the first step and tensor
reproml diff a.trace b.trace --rerun   # and, by running that one step again, the first operator and line
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Optional

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from reproml.diff import causes, ulps
from reproml.diff.causes import Evidence
from reproml.diff.rerun import Rerun
from reproml.diff.ulps import Distance
from reproml.errors import ReproError
from reproml.pipeline.golden import compare_items
from reproml.pipeline.run import METRICS, TRACE, WEIGHTS, Items, read_items, read_record
from reproml.tracing.chain import Reader, is_trace

PARTS = {
    "settings": "the settings of the optimizer",
    "model": "the names or shapes of the model's tensors",
    "initial weights": "the initial weights",
    "batch": "the batch",
    "loss": "the loss",
    "gradients": "the gradients",
    "weights": "the weights after the optimizer's step",
    "operator": "an operator",
    "item": "an item",
    "length": "the number of steps",
}


@dataclass(frozen=True)
class Operator:
    """The first operator whose results differ."""

    name: str  # aten.mm
    line: str  # FILE:LINE that called it, or whose backward it is
    backward: Optional[str]  # the autograd node, if it is part of a backward pass
    same_inputs: bool
    distance: Optional[Distance]  # of its results
    shape: str  # "float32[64, 10]"


@dataclass(frozen=True)
class Divergence:
    """Where two things of one kind first part. What is not known is None."""

    kind: str  # trace, run, weights or golden
    part: str  # a key of PARTS
    epoch: Optional[int] = None
    step: Optional[int] = None  # from 1 on, over all epochs
    tensor: Optional[str] = None  # the first; of two runs' items the one that is furthest apart
    differing: Optional[tuple[int, int]] = (
        None  # so many of so many tensors (or items) differ there
    )
    distance: Optional[Distance] = None  # of the tensor
    operator: Optional[Operator] = None
    growth: list[tuple[int, int]] = field(default_factory=list)  # step, ulps between some weights
    cause: tuple[str, str] = ("unknown", "")  # name in causes.CAUSES, sentence
    item: Optional[str] = None  # the first of metrics.json or of a golden file
    values: Optional[tuple[str, str]] = None  # of an item, or of the loss
    notes: list[str] = field(default_factory=list)


def compare(a: Path, b: Path, rerun: bool = False) -> Optional[Divergence]:
    """Compare two traces, two run folders, two .safetensors or two golden files; None if they are equal.

    `rerun` runs the step that parts again on both sides (see rerun.py), to find the operator. Raises
    ReproError if the two are not of one kind, or one cannot be read.
    """
    kinds = [_kind(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        files = [f"{kind} file" if kind != "run" else "run folder" for kind in kinds]
        raise ReproError(f"{a} is a {files[0]} and {b} a {files[1]}: give two of one kind")
    if kinds[0] == "trace":
        return traces(Reader(a), Reader(b), rerun)
    if rerun and not (kinds[0] == "run" and all((p / TRACE).exists() for p in (a, b))):
        raise ReproError("--rerun needs two traces, or two runs that have one")
    return {"run": _runs, "weights": _weights, "golden": _goldens}[kinds[0]](a, b, rerun)


def _kind(path: Path) -> str:
    try:
        if path.is_dir():
            return "run"
        if path.suffix == ".safetensors":
            return "weights"
        if path.suffix == ".json" and not is_trace(path):
            return "golden"
        Reader(path)
        return "trace"
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None


# --- traces ---------------------------------------------------------------------------------------------


@dataclass
class _Parting:
    """The first two entries that differ, and what."""

    a: Optional[dict[str, Any]]
    b: Optional[dict[str, Any]]
    part: str
    at: Optional[int] = None  # position of the first differing tensor
    differing: Optional[tuple[int, int]] = None


def traces(a: Reader, b: Reader, rerun: bool = False) -> Optional[Divergence]:
    """Compare two traces entry by entry, each read once; see `compare`."""
    if a.header["level"] != b.header["level"]:
        raise ReproError(
            f"{a.path} was traced at level {a.header['level']} and {b.path} at {b.header['level']}: "
            "trace both at one level"
        )
    optimizers: list[tuple[dict[str, Any], dict[str, Any]]] = []
    left, right = iter(a), iter(b)
    parting = None
    for x, y in zip_longest(left, right):
        if x and y and x["entry"] == y["entry"] == "optimizer":
            optimizers.append((x, y))
        parting = None if x == y else _part(x, y)
        if parting:
            break
    if parting is None:
        return None
    rest = _Rest(parting, left, right)
    entry = parting.a or parting.b or {}
    step = 1 if entry["entry"] == "optimizer" else entry["step"]
    found = Divergence(
        "trace",
        parting.part,
        entry.get("epoch"),
        step,
        _tensor(parting, optimizers),
        parting.differing,
        _loss_distance(parting),
        _operator(parting),
        rest.growth,
        notes=[f"{r.path} is cut off after entry {r.entries}" for r in (a, b) if r.cut],
    )
    if rerun and parting.part in _RERUN:
        found = _with_rerun(found, a, b, parting)
    numerics = optimizers[0] if optimizers else ({}, {})
    evidence = Evidence(
        {"numerics": numerics[0].get("numerics"), **a.header},
        {"numerics": numerics[1].get("numerics"), **b.header},
        parting.part,
        found.operator.name if found.operator else None,
        found.operator.same_inputs if found.operator else None,
        rest.same_random,
        rest.same_samples,
        parting.part == "batch" and bool(parting.at),
        _settings(parting),
    )
    return replace(found, cause=causes.likely(evidence))


# (key of an entry, what parts if it differs), in the order in which a training comes to them
_ORDER = {
    "optimizer": [("tensors", "model"), ("shapes", "model"), ("kind", "settings")]
    + [("settings", "settings"), ("weights", "initial weights")],
    "step": [
        ("batch", "batch"),
        ("loss", "loss"),
        ("gradients", "gradients"),
        ("weights", "weights"),
    ],
    "op": [("op", "operator"), ("out", "operator")],
    "epoch": [("weights", "weights")],
    "end": [("weights", "weights")],
}
_RERUN = {"initial weights", "loss", "gradients", "weights"}  # what an operator came to


def _part(a: Optional[dict[str, Any]], b: Optional[dict[str, Any]]) -> Optional[_Parting]:
    """Tell what parts first in two entries that are not the same; None if nothing that counts."""
    if a is None or b is None or a["entry"] != b["entry"]:
        ended = a is None or b is None or "end" in (a["entry"], b["entry"])
        return _Parting(a, b, "length" if ended else "operator")
    for key, part in _ORDER[a["entry"]]:
        x, y = a[key], b[key]
        if x == y:
            continue
        if not isinstance(x, list) or len(x) != len(y):
            return _Parting(a, b, part)
        at = [i for i, (one, other) in enumerate(zip(x, y)) if one != other]
        return _Parting(a, b, part, at[0], (len(at), len(x)))
    return None  # only the state of the random numbers, or how far an epoch went


class _Rest:
    """What the entries from the parting on tell: each side's steps, the k-th against the k-th."""

    def __init__(
        self, parting: _Parting, left: Iterator[dict[str, Any]], right: Iterator[dict[str, Any]]
    ) -> None:
        self.growth: list[tuple[int, int]] = []
        self.same_random: Optional[bool] = None
        self.same_samples: Optional[bool] = None
        sums: tuple[dict[int, int], dict[int, int]] = ({}, {})
        epoch = None
        for x, y in zip(_steps(parting.a, left), _steps(parting.b, right)):
            if x["entry"] != y["entry"]:
                break
            if x["entry"] == "epoch":
                if self.same_samples is None and epoch is not None:
                    self.same_samples = sums[0] == sums[1]
                continue
            if self.same_random is None:
                self.same_random = x["random"] == y["random"]
                epoch = x["epoch"]
            self.growth.append((x["step"], _apart(x["sample"], y["sample"])))
            for total, step in zip(sums, (x, y)):
                for i, (_, words) in enumerate(step["batch"] if step["epoch"] == epoch else []):
                    total[i] = (total.get(i, 0) + int(words, 16)) % 2**64
        for _ in (*left, *right):
            pass  # to the end, so that damage and cut-off ends are found


def _steps(
    first: Optional[dict[str, Any]], rest: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The entries of steps, and those that end an epoch."""
    for entry in chain([first] if first else [], rest):
        if entry["entry"] in ("step", "epoch") and "random" in entry or entry["entry"] == "epoch":
            yield entry


def _apart(a: list[Optional[float]], b: list[Optional[float]]) -> int:
    """The largest distance in ulps of float32 of two lists of numbers; None stands for NaN."""
    x, y = (
        torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32)
        for values in (a, b)
    )
    found = ulps.distance(x, y)
    return found.ulps or 0 if found else 0


def _loss_distance(parting: _Parting) -> Optional[Distance]:
    if parting.part != "loss":
        return None
    assert parting.a and parting.b
    pairs = zip(parting.a["loss"], parting.b["loss"])
    with contextlib.suppress(ValueError):  # of losses that are no single numbers
        x, y = next((float(x), float(y)) for x, y in pairs if x != y)
        return Distance(_apart([x], [y]), 1, 1)
    return None


def _tensor(
    parting: _Parting, optimizers: list[tuple[dict[str, Any], dict[str, Any]]]
) -> Optional[str]:
    """The name of the first tensor that differs."""
    if parting.at is None or parting.a is None:
        return None
    if parting.part == "batch":
        return f"tensor {parting.at + 1} of the batch"
    entry = parting.a if parting.a["entry"] == "optimizer" else None
    if parting.a["entry"] == "step":
        entry = optimizers[parting.a["optimizer"]][0]
    if entry and parting.part in ("initial weights", "gradients", "weights"):
        return str(entry["tensors"][parting.at])
    return None


def _settings(parting: _Parting) -> list[str]:
    """The settings of the optimizer that differ, in words."""
    if parting.part != "settings" or not parting.a or not parting.b:
        return []
    if parting.a["kind"] != parting.b["kind"]:
        return [f"{parting.a['kind']} and {parting.b['kind']}"]
    return [
        f"{key} ({x.get(key)} and {y.get(key)})"
        for x, y in zip(parting.a["settings"], parting.b["settings"])
        for key in sorted({*x, *y})
        if x.get(key) != y.get(key)
    ]


def _operator(parting: _Parting) -> Optional[Operator]:
    if not (parting.a and parting.b and parting.a["entry"] == parting.b["entry"] == "op"):
        return None
    return _described(parting.a, parting.b, None, parting.at or 0)


def _described(
    a: dict[str, Any], b: dict[str, Any], distance: Optional[Distance], at: int
) -> Operator:
    name = a["op"] if a["op"] == b["op"] else f"{a['op']} and {b['op']}"
    shape = a["shapes"][at] if at < len(a["shapes"]) else ""
    return Operator(name, a["line"], a.get("backward"), a["in"] == b["in"], distance, shape)


def _with_rerun(found: Divergence, a: Reader, b: Reader, parting: _Parting) -> Divergence:
    """Add the operator that parts first in that step, and by how much the tensors do."""
    assert found.step is not None
    with tempfile.TemporaryDirectory() as x, tempfile.TemporaryDirectory() as y:
        runs = Rerun(a, found.step, Path(x)), Rerun(b, found.step, Path(y))
        notes = [
            f"the rerun of {reader.path} did not come to the bits of its trace: another machine, or "
            "something that changes from run to run; the operator is the rerun's"
            for reader, run, entry in zip((a, b), runs, (parting.a, parting.b))
            if entry and entry["entry"] == "step" and entry != run.step
        ]
        distance = found.distance
        if found.part in ("gradients", "weights") and found.tensor:
            values = [run.tensors(found.part)[found.tensor] for run in runs]
            distance = ulps.distance(*values)
        operator = _first_operator(*runs)
        if found.part == "initial weights" and operator:
            distance = operator.distance
        return replace(found, operator=operator, distance=distance, notes=found.notes + notes)


def _first_operator(a: Rerun, b: Rerun) -> Optional[Operator]:
    """The first operator that both sides ran and whose results differ.

    Exact and native runs, say, have some operators of their own: these are passed over.
    """
    left, right = ([(e["op"], *e["shapes"]) for _, e in run.operators] for run in (a, b))
    for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        for k in range(block.size):
            (i, x), (j, y) = a.operators[block.a + k], b.operators[block.b + k]
            parting = _part(x, y)
            if parting and parting.at is not None:
                at = str(parting.at)
                distance = ulps.distance(a.results(i)[at], b.results(j)[at])
                return _described(x, y, distance, parting.at)
    return None


# --- runs, weights, golden files --------------------------------------------------------------------------


def _runs(a: Path, b: Path, rerun: bool) -> Optional[Divergence]:
    """By their traces if both have one, else by their items; by how much from their weights."""
    apart = ulps.first_apart(_load(a / WEIGHTS), _load(b / WEIGHTS))
    if all((path / TRACE).exists() for path in (a, b)):
        found = traces(Reader(a / TRACE), Reader(b / TRACE), rerun)
        found = found and replace(found, kind="run")
    else:
        found = _items(
            read_items(a / METRICS), read_items(b / METRICS), "run", _record(a), _record(b)
        )
        if found and apart:
            found = replace(found, tensor=apart[0], distance=apart[1])
    if found is None and apart:
        raise ReproError(f"{a} or {b} is damaged: their records are the same but not their weights")
    return found


def _record(folder: Path) -> dict[str, Any]:
    """What run.json tells, under the names of a trace's header."""
    record = read_record(folder)
    return {**record, "definitions": record.get("definitions.version"), "environment": record}


def _weights(a: Path, b: Path, rerun: bool) -> Optional[Divergence]:
    x, y = _load(a), _load(b)
    apart = ulps.first_apart(x, y)
    if apart is None:
        return None
    differing = sum(n not in x or n not in y or not _same(x[n], y[n]) for n in {*x, *y})
    sentence = "weights alone do not tell why: compare the traces, or the run folders"
    return Divergence(
        "weights",
        "weights",
        tensor=apart[0],
        differing=(differing, len({*x, *y})),
        distance=apart[1],
        cause=("unknown", sentence),
    )


def _same(a: Tensor, b: Tensor) -> bool:
    d = ulps.distance(a, b)
    return d is not None and d.elements == 0


def _load(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None
    except SafetensorError as error:
        raise ReproError(f"{path} is cut short or not a safetensors file ({error})") from None
    return found


def _goldens(a: Path, b: Path, rerun: bool) -> Optional[Divergence]:
    return _items(read_items(a), read_items(b), "golden", {}, {})


# The items of a run in the pipeline's order: (how their names begin, the cause if they part first)
_ITEMS = [
    ("recipe.", ("recipe", "another recipe")),
    (
        "definitions.",
        ("definitions", "another version of the definitions, or exact against native"),
    ),
    ("data.", ("data", "other data: the files have other SHA-256s")),
    ("preprocessed.", ("preprocessing", "another preprocessing of the same data")),
    ("initial.", ("initial weights", "")),
    ("epoch.", ("environment", "")),
    ("weights.", ("environment", "")),
    ("", ("evaluation", "the evaluation of the same weights")),
]


def _items(
    a: Items, b: Items, kind: str, record_a: dict[str, Any], record_b: dict[str, Any]
) -> Optional[Divergence]:
    def place(name: str) -> tuple[int, str]:
        return next(i for i, (start, _) in enumerate(_ITEMS) if name.startswith(start)), name

    names = sorted({*a, *b}, key=place)
    compared = compare_items({n: a[n] for n in names if n in a}, {n: b[n] for n in names if n in b})
    differing = sorted((c for c in compared if not c.match), key=lambda c: place(c.item))
    if not differing:
        return None
    first = differing[0]
    cause = _ITEMS[place(first.item)[0]][1]
    part = "initial weights" if cause[0] == "initial weights" else "item"
    likely = causes.likely(Evidence(record_a, record_b, part))
    return Divergence(
        kind,
        "item",
        item=first.item,
        differing=(len(differing), len(compared)),
        values=(first.expected, first.found),
        cause=likely if likely[0] != "unknown" or not cause[1] else cause,
    )


# --- in words -------------------------------------------------------------------------------------------


def lines(found: Optional[Divergence], a: str, b: str) -> list[str]:
    """Return what a person reads of what `compare` found between a and b."""
    said = [headline(found, a, b)]
    if found is None:
        return said
    said += [f"{name}: {text}" for name, text in facts(found)]
    if any(distance for _, distance in found.growth):
        first, last = found.growth[0], found.growth[-1]
        said.append(
            f"growth (ulps between weights): {sparkline([d for _, d in found.growth])} "
            f"from {first[1]:,} at step {first[0]} to {last[1]:,} at step {last[0]}"
        )
    return [*said, f"likely cause: {found.cause[1]}"]


def headline(found: Optional[Divergence], a: str, b: str) -> str:
    """Return in one line whether a and b part, and where."""
    if found is None:
        return f"{a} and {b}: no difference"
    at = f"epoch {found.epoch}, " * bool(found.epoch) + f"step {found.step}"
    if found.part in ("initial weights", "settings", "model"):
        at = "the first step"
    at = f" in {at}" * (found.step is not None)
    many = "" if not found.differing else "; {} of {} differ there".format(*found.differing)
    first = found.item or found.tensor
    name = f", first {first}" if first else ""
    return f"{a} and {b} part{at}: {PARTS[found.part]}{name}{many}"


def facts(found: Divergence) -> list[tuple[str, str]]:
    """Return what is known of it besides, but for its growth and its cause: name, text."""
    said = []
    if found.values:
        said.append(("values", "{} and {}".format(*found.values)))
    if found.distance:
        of = f"weights, most in {found.tensor}: " if found.item else ""
        said.append(("by how much", of + _words(found.distance)))
    if found.operator:
        o = found.operator
        backward = f", in its backward pass ({o.backward})" if o.backward else ""
        inputs = "the same inputs" if o.same_inputs else "inputs that differ already"
        said.append(("operator", f"{o.name}, called at {o.line}{backward}: from {inputs}"))
        if o.distance:
            said.append((f"its result {o.shape}", _words(o.distance)))
    return said + [("note", note) for note in found.notes]


def _words(d: Distance) -> str:
    ulps = "" if d.ulps is None else f"at most {d.ulps:,} ulp{'s' * (d.ulps != 1)}, "
    return f"{ulps}{d.elements:,} of {d.of:,} element{'s' * (d.of != 1)}"


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[int], width: int = 40) -> str:
    """Draw numbers from 0 on in a line, by their binary logarithms, the largest of each column."""
    columns = [
        max(values[i * len(values) // width : (i + 1) * len(values) // width], default=None)
        for i in range(width)
    ]
    heights = [value.bit_length() for value in columns if value is not None]
    top = max(1, *heights)
    return "".join(_BARS[height * (len(_BARS) - 1) // top] for height in heights)
