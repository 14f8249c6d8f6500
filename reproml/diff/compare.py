"""Find the first difference of two trainings, its size and its likely cause.

It compares two traces, run folders, weights or golden files:

reproml diff a.trace b.trace           # the first step and tensor that differ
reproml diff a.trace b.trace --rerun   # and, by running that step again, the first operator and its line
                                       # (of a script: --rerun --script 'SCRIPT.py ARGS')
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
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
from reproml.diff.rerun import Again, Rerun
from reproml.diff.ulps import Distance
from reproml.errors import ReproError
from reproml.files import read_regular
from reproml.pipeline.golden import compare_items
from reproml.pipeline.run import METRICS, TRACE, WEIGHTS, Items, read_items, read_record
from reproml.tracing.chain import Reader, is_trace
from reproml.tracing.facts import INPUT, LOADER

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
    "epoch": "the number of steps in the epoch",
    "length": "the number of steps",
}


@dataclass(frozen=True)
class Operator:
    """The first operator whose results differ."""

    name: str  # aten.mm
    line: str  # FILE:LINE that called it, or whose backward pass it belongs to
    backward: Optional[str]  # the autograd node, in a backward pass
    same_inputs: bool
    distance: Optional[Distance]  # of the results
    shape: str  # "float32[64, 10]"


@dataclass(frozen=True)
class Divergence:
    """The first difference of two things of the same kind. Unknown values are None."""

    kind: str  # trace, run, weights or golden
    part: str  # a key of PARTS
    epoch: Optional[int] = None
    step: Optional[int] = None  # counted from 1 over all epochs
    tensor: Optional[str] = (
        None  # the first; of two runs' items the one that is furthest difference
    )
    differing: Optional[tuple[int, int]] = (
        None  # how many tensors (or items) differ, and their total
    )
    distance: Optional[Distance] = None  # of the tensor
    operator: Optional[Operator] = None
    growth: list[tuple[int, int]] = field(
        default_factory=list
    )  # step, ulps between recorded weights
    cause: tuple[str, str] = ("unknown", "")  # name in causes.CAUSES, sentence
    item: Optional[str] = None  # the first that differs in metrics.json or in a golden file
    values: Optional[tuple[str, str]] = None  # both values of an item, or of the loss
    notes: list[str] = field(default_factory=list)


def compare(a: Path, b: Path, again: Optional[Again] = None) -> Optional[Divergence]:
    """Compare two traces, run folders, .safetensors or golden files; return None if they are equal.

    With `again` the first diverging step is run again on both sides (see rerun.py), to find the operator.
    Raises ReproError if the two are not of the same kind, or one cannot be read or run again.
    """
    kinds = [_kind(path) for path in (a, b)]
    if kinds[0] != kinds[1]:
        files = [f"{kind} file" if kind != "run" else "run folder" for kind in kinds]
        raise ReproError(f"{a} is a {files[0]} and {b} a {files[1]}: give two of the same kind")
    if kinds[0] == "trace":
        return compare_traces(Reader(a), Reader(b), again)
    if again and not (kinds[0] == "run" and all((p / TRACE).exists() for p in (a, b))):
        raise ReproError("--rerun needs two traces, or two runs that have traces")
    return {"run": _compare_runs, "weights": _compare_weights, "golden": _compare_goldens}[
        kinds[0]
    ](a, b, again)


def _kind(path: Path) -> str:
    try:
        if path.is_dir():
            return "run"
        if path.suffix == ".safetensors":
            return "weights"
        if path.suffix == ".json" and not is_trace(path):
            return "golden"
        if not path.exists():
            raise ReproError(
                f"{path} does not exist; name a trace, a run folder or a file of weights"
            )
        Reader(path)
        return "trace"
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None


# --- traces ---------------------------------------------------------------------------------------------


@dataclass
class _FirstDifference:
    """The first two entries that differ, and what differs in them."""

    a: Optional[dict[str, Any]]
    b: Optional[dict[str, Any]]
    part: str
    at: Optional[int] = None  # position of the first differing tensor
    differing: Optional[tuple[int, int]] = None


def compare_traces(a: Reader, b: Reader, again: Optional[Again] = None) -> Optional[Divergence]:
    """Compare two traces entry by entry; see `compare`. Operators count where nothing else differs."""
    if a.header["level"] != b.header["level"]:
        raise ReproError(
            f"{a.path} was traced at level {a.header['level']} and {b.path} at {b.header['level']}: "
            "trace both at the same level"
        )
    optimizers: list[tuple[dict[str, Any], dict[str, Any]]] = []
    sides = _Side(a), _Side(b)
    left, right = (iter(side) for side in sides)
    draws = _Draws()
    difference = None
    for x, y in zip_longest(left, right):
        if x and y and x["entry"] == y["entry"] == "optimizer":
            optimizers.append((x, y))
        difference = None if x == y else _first_difference(x, y)
        if difference:
            break
        draws.compare(x, y)
    for reader, side in zip((a, b), sides):
        if difference is None and not side.stepped:
            raise ReproError(
                f"{reader.path} has no step to compare: no optimizer of torch.optim took one while it "
                "was recorded"
            )
    operators = _first_operators(a, b) if a.header["level"] == "op" else None
    difference = difference or operators
    if difference is None:
        return None
    for side, last in zip(sides, (difference.a, difference.b)):
        side.diverged_at(last)
    rest = _Remainder(difference, left, right, draws, sides)
    entry = difference.a or difference.b or {}
    step = 1 if entry["entry"] == "optimizer" else entry["step"]
    found = Divergence(
        "trace",
        difference.part,
        entry.get("epoch"),
        step,
        _tensor(difference, optimizers),
        difference.differing,
        _loss_distance(difference, sides),
        _operator(operators),
        rest.growth,
        notes=[f"{r.path} is truncated after entry {r.entries}" for r in (a, b) if r.cut],
    )
    if again and difference.part in _RERUN:
        found = _with_rerun(found, a, b, difference, again)
    operator = found.operator if found.operator and " and " not in found.operator.name else None
    evidence = Evidence(
        sides[0].header(),
        sides[1].header(),
        difference.part,
        operator.name if operator else None,
        operator.same_inputs if operator else None,
        rest.same_random,
        rest.same_samples,
        difference.part == "batch" and bool(difference.at),
        _settings(difference),
        facts=_differing_facts(*(side.facts for side in sides)),
        drawn=draws.where,
        model=_model(difference),
        size=_size(difference),
        factor=_factor(difference),
        module_input=_is_module_input(difference, sides[0], sides[1]),
        one_gradient=_one_gradient(difference),
        outside_step=difference.part == "weights" and entry["entry"] != "step",
        steps=tuple(side.step for side in sides),
        interrupted=not min(sides, key=lambda side: side.step).ended,
    )
    return replace(found, cause=causes.likely_cause(evidence))


class _Side:
    """One of two traces: yields its entries, without operators, and collects facts for the cause.

    It collects the facts of all steps up to the first that diverges.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.facts: dict[str, Any] = {}
        self.step = 0  # the last
        self.stepped = False  # whether an optimizer has taken a step
        self.ended = False  # whether the training ended, and was not interrupted
        # Optimizer -> dtype and shape of the tensor that is sampled.
        self.sampled: dict[int, str] = {}
        self._diverged = self._complete = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for entry in self.reader:
            self.ended = entry["entry"] == "end"
            if entry["entry"] == "op":
                continue
            self.stepped = self.stepped or entry["entry"] in ("optimizer", "step")
            if entry["entry"] == "optimizer":
                self.sampled[entry["optimizer"]] = (_kinds(entry) or [""])[-1]
            if entry["entry"] == "step":
                self.step = entry["step"]
            if not self._complete:
                self._learn(entry)
            yield entry

    def diverged_at(self, entry: Optional[dict[str, Any]]) -> None:
        """Collect facts only up to this entry, or up to the next step if it is none."""
        self._diverged = True
        self._complete = entry is not None and entry["entry"] == "step"

    def _learn(self, entry: dict[str, Any]) -> None:
        self.facts.update(entry.get("about", {}))
        if entry["entry"] == "step":
            self.facts["passes"] = len(entry["loss"])
            self._complete = self._diverged
        if entry["entry"] == "optimizer":
            self.facts.setdefault("numerics", entry["numerics"])
            for key in ("kinds", "modules"):
                self.facts[key] = [*self.facts.get(key, []), *entry.get(key, [])]

    def header(self) -> dict[str, Any]:
        """Return the header; the script may have changed the number of threads since it was written."""
        header = {"numerics": self.facts.get("numerics"), **self.reader.header}
        threads, environment = self.facts.get("threads"), header.get("environment")
        if threads and isinstance(environment, dict) and isinstance(environment.get("torch"), dict):
            torch_facts = {**environment["torch"], "threads": threads}
            header["environment"] = {**environment, "torch": torch_facts}
        return header


class _Draws:
    """Finds where the state of the random numbers differs first, in steps whose numbers are the same."""

    def __init__(self) -> None:
        self.where = ""  # "between epoch 1 and epoch 2"; empty if it is the same or never was
        self._before: Optional[dict[str, Any]] = None  # the step before
        self._found = False

    def compare(self, a: Optional[dict[str, Any]], b: Optional[dict[str, Any]]) -> None:
        if self._found or not (a and b and a["entry"] == b["entry"] == "step"):
            return
        self._found = a["random"] != b["random"]
        if self._found and self._before:
            unit = "epoch" if a["epoch"] != self._before["epoch"] else "step"
            self.where = f"between {unit} {self._before[unit]} and {unit} {a[unit]}"
        self._before = a


# (key of an entry, what differs if it does), in the order in which a training computes them
_ORDER = {
    "optimizer": [("tensors", "model"), ("shapes", "model"), ("kinds", "model")]
    + [("kind", "settings"), ("settings", "settings"), ("weights", "initial weights")],
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
_RERUN = {"initial weights", "loss", "gradients", "weights"}  # results of operators


def _first_difference(
    a: Optional[dict[str, Any]], b: Optional[dict[str, Any]]
) -> Optional[_FirstDifference]:
    """Return what differs first in two entries that are not the same; None if nothing that matters."""
    if a is None or b is None or a["entry"] != b["entry"]:
        kinds = {entry["entry"] if entry else "end" for entry in (a, b)}
        parts = {"end": "length", "epoch": "epoch", "optimizer": "model"}
        return _FirstDifference(a, b, next((parts[k] for k in parts if k in kinds), "operator"))
    for key, part in _ORDER[a["entry"]]:
        x, y = a.get(key, []), b.get(key, [])
        if x == y or _same_effect(key, a, b):
            continue
        if part == "batch" and a["epoch"] != b["epoch"]:
            return _FirstDifference(a, b, "epoch")
        if not isinstance(x, list) or len(x) != len(y):
            common = len(os.path.commonprefix([x, y])) if isinstance(x, list) else 0
            return _FirstDifference(a, b, part, common if part == "batch" and common else None)
        at = [i for i, (one, other) in enumerate(zip(x, y)) if one != other]
        return _FirstDifference(a, b, part, at[0], (len(at), len(x)))
    return None  # only the state of the random numbers or the length of an epoch differs


# How torch.compile, DataParallel and others change the names of a model that they wrap.
_WRAPPERS = re.compile(
    r"(?:^module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|(?=:))"
)
_WRAPPER_CLASSES = ("OptimizedModule", "GraphModule", "DataParallel", "DistributedDataParallel")


def _same_effect(key: str, a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two values of an optimizer's entry differ, but not in what they do."""
    if key == "tensors":  # a name alone changes no number
        return bool(a["shapes"] == b["shapes"] and a["weights"] == b["weights"]) or (
            _unwrapped(a["tensors"]) == _unwrapped(b["tensors"])
        )
    if key == "kinds":  # strides alone change no element; older traces do not have them
        x, y = ([_without_strides(kind) for kind in entry.get(key, [])] for entry in (a, b))
        return not x or not y or x == y
    return key == "settings" and a["kind"] == b["kind"] and not _differing_settings(a, b)


def _unwrapped(names: list[str]) -> list[str]:
    return [_WRAPPERS.sub("", name) for name in names]


class _Remainder:
    """What the entries from the first difference on show: the steps of both sides, compared in pairs."""

    def __init__(
        self,
        difference: _FirstDifference,
        left: Iterator[dict[str, Any]],
        right: Iterator[dict[str, Any]],
        draws: _Draws,
        sides: tuple[_Side, _Side],
    ) -> None:
        self.growth: list[tuple[int, int]] = []
        self.same_random: Optional[bool] = None
        self.same_samples: Optional[bool] = None
        sums: tuple[dict[int, int], dict[int, int]] = ({}, {})
        epoch = None
        for x, y in zip(_steps(difference.a, left), _steps(difference.b, right)):
            if x["entry"] == y["entry"] == "step" and self.same_random is None:
                draws.compare(x, y)
            if x["entry"] != y["entry"]:
                break
            if x["entry"] == "epoch":
                if self.same_samples is None and epoch is not None:
                    self.same_samples = sums[0] == sums[1]
                continue
            if self.same_random is None:
                self.same_random = x["random"] == y["random"]
                epoch = x["epoch"]
            kinds = [side.sampled.get(step["optimizer"], "") for side, step in zip(sides, (x, y))]
            self.growth.append((x["step"], _largest_ulps(x["sample"], y["sample"], kinds)))
            for total, step in zip(sums, (x, y)):
                for i, (_, words) in enumerate(step["batch"] if step["epoch"] == epoch else []):
                    total[i] = (total.get(i, 0) + int(words, 16)) % 2**64
        for _ in (*left, *right):
            pass  # read to the end, so that damage and truncation are found


def _steps(
    first: Optional[dict[str, Any]], rest: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the entries of steps and those that end an epoch."""
    for entry in chain([first] if first else [], rest):
        if entry["entry"] in ("step", "epoch") and "random" in entry or entry["entry"] == "epoch":
            yield entry


def _largest_ulps(a: list[Optional[float]], b: list[Optional[float]], kinds: Sequence[str]) -> int:
    """Return the largest distance of two lists of numbers, in ulps; None represents NaN.

    kinds: what facts.tensor returns for the tensors of both sides. Their dtype, or the one to which PyTorch
    promotes two dtypes, has the ulps.
    """
    dtype = torch.promote_types(*(_FLOATS.get(kind.split("[")[0], torch.float32) for kind in kinds))
    x, y = (
        torch.tensor([math.nan if v is None else v for v in values], dtype=dtype)
        for values in (a, b)
    )
    found = ulps.distance(x, y)
    return found.ulps or 0 if found else 0


_FLOATS = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}


def _loss_distance(difference: _FirstDifference, sides: tuple[_Side, _Side]) -> Optional[Distance]:
    if difference.part != "loss":
        return None
    assert difference.a and difference.b
    losses = difference.a["loss"], difference.b["loss"]
    kinds = [side.facts.get("losses") or ["float32"] * len(x) for side, x in zip(sides, losses)]
    with contextlib.suppress(ValueError):  # losses that are not single numbers
        for x, y, *kind in zip(*losses, *kinds):
            if x != y:
                return Distance(_largest_ulps([float(x)], [float(y)], kind), 1, 1)
    return None


def _tensor(
    difference: _FirstDifference, optimizers: list[tuple[dict[str, Any], dict[str, Any]]]
) -> Optional[str]:
    """Return the name of the first tensor that differs."""
    if difference.at is None or difference.a is None:
        return None
    if difference.part == "batch":
        return f"tensor {difference.at + 1} of the batch"
    if difference.part == "model":
        return None
    names = difference.a["tensors"] if difference.a["entry"] == "optimizer" else []
    if difference.a["entry"] == "step" and difference.a["optimizer"] < len(optimizers):
        names = optimizers[difference.a["optimizer"]][0]["tensors"]
    if difference.part in ("initial weights", "gradients", "weights"):
        return str(names[difference.at]) if difference.at < len(names) else None
    return None


def _settings(difference: _FirstDifference) -> list[str]:
    """Describe the settings of the optimizer that differ."""
    if difference.part != "settings" or not difference.a or not difference.b:
        return []
    if difference.a["kind"] != difference.b["kind"]:
        return [f"{difference.a['kind']} and {difference.b['kind']}"]
    return _differing_settings(difference.a, difference.b)


def _differing_settings(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Describe the settings that differ; a version of PyTorch may have more, which are off."""
    if len(a["settings"]) != len(b["settings"]):
        return [f"parameter groups ({len(a['settings'])} and {len(b['settings'])})"]
    return [
        f"{key} ({x.get(key, 'unset')} and {y.get(key, 'unset')})"
        for x, y in zip(a["settings"], b["settings"])
        for key in sorted({*x, *y})
        if x.get(key) != y.get(key)
        and not (None in (x.get(key), y.get(key)) and {x.get(key), y.get(key)} & {"None", "False"})
    ]


def _differing_facts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the facts that both sides have with different values, by name; see tracing/facts.py."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in a.keys() & b.keys():
        x, y = a[key], b[key]
        if key == "loaders":
            for one, other in zip(x, y):
                both = [n for n in LOADER if n in one and n in other and one[n] != other[n]]
                found.update({name: (one[name], other[name]) for name in both})
        elif key in ("kinds", "modules"):
            x, y = _modules(x), _modules(y)
            for one, other in zip(x, y):
                if one != other:
                    one, other = (
                        f"the model{v}" if v.startswith(": ") else v for v in (one, other)
                    )
                    found[key] = one, other
                    break
        elif key == "batch" and x != y:
            same = [_without_strides(kind) for kind in x] == [_without_strides(kind) for kind in y]
            found["layout" if same else key] = ", ".join(x), ", ".join(y)
        elif x != y:
            one, other = (", ".join(map(str, v)) if isinstance(v, list) else v for v in (x, y))
            found[key] = one, other
    return found


def _modules(described: list[str]) -> list[str]:
    """Return the descriptions of modules without those that only wrap another."""
    inside = [
        line for line in described if line.partition(": ")[2].split("(")[0] not in _WRAPPER_CLASSES
    ]
    return _unwrapped(inside)


def _without_strides(kind: str) -> str:
    return kind.partition(" with strides")[0]


def _model(difference: _FirstDifference) -> str:
    """Describe how the tensors of the two models differ."""
    if difference.part != "model" or not difference.a or not difference.b:
        return ""
    if difference.a["entry"] != difference.b["entry"]:
        return "one side has one optimizer more"
    names = [_unwrapped(entry.get("tensors", [])) for entry in (difference.a, difference.b)]
    if any(
        all(name.isdecimal() for name in side) for side in names
    ):  # of no module that was called
        names = [[str(i) for i in range(len(side))] for side in names]
    kinds = [
        dict(zip(side, _kinds(entry))) for side, entry in zip(names, (difference.a, difference.b))
    ]
    alone = [[name for name in x if name not in y] for x, y in (kinds, kinds[::-1])]
    if any(alone):
        return " and ".join(
            f"only the {side} has {', '.join(names[:3])}"
            + f" and {len(names) - 3} more" * (len(names) > 3)
            for side, names in zip(("first", "second"), alone)
            if names
        )
    for name, kind in kinds[0].items():
        if kind != kinds[1][name]:
            return f"{name} is {kind} and {kinds[1][name]}"
    return "they have the same tensors in another order"


def _kinds(entry: dict[str, Any]) -> list[str]:
    """Return dtype and shape of each tensor; older traces have the shapes only."""
    return entry.get("kinds") or [str(shape) for shape in entry.get("shapes", [])]


def _numbers(difference: _FirstDifference) -> tuple[list[float], list[float]]:
    """Return some numbers of both sides: losses, or those of the last gradient, if they differ."""
    key = {"loss": "loss", "gradients": "gradient"}.get(difference.part, "")
    if not difference.a or not difference.b:
        return [], []
    if difference.part == "gradients":
        last = [[x for x in e["gradients"] if x][-1:] for e in (difference.a, difference.b)]
        if last[0] == last[1]:  # only others differ
            return [], []
    with contextlib.suppress(ValueError, TypeError):  # no single numbers, or NaN
        x, y = ([float(v) for v in entry.get(key, [])] for entry in (difference.a, difference.b))
        if len(x) == len(y) and all(math.isfinite(v) for v in (*x, *y)):
            return x, y
    return [], []


def _size(difference: _FirstDifference) -> Optional[float]:
    """Return the largest difference of some numbers, relative to the largest of them."""
    x, y = _numbers(difference)
    largest = max(map(abs, (*x, *y)), default=0.0)
    return max(abs(v - w) for v, w in zip(x, y)) / largest if largest else None


def _factor(difference: _FirstDifference) -> str:
    """Return the factor between the last gradients, as text, if all differ; empty if there is none."""
    x, y = _numbers(difference)
    if difference.part != "gradients" or len(x) < 2:
        return ""
    assert difference.a and difference.b
    pairs = zip(difference.a["gradients"], difference.b["gradients"])
    if any(v == w and v is not None for v, w in pairs):
        return ""
    first = max(range(len(x)), key=lambda i: abs(x[i]))
    factor = y[first] / x[first] if x[first] else 1.0
    largest = abs(y[first])
    same = all(abs(w - factor * v) <= 1e-4 * largest for v, w in zip(x, y))
    return f"{factor:.6g}" if same and abs(factor - 1) > 1e-3 else ""


def _is_module_input(difference: _FirstDifference, *sides: _Side) -> bool:
    """Return whether the first tensor of the batch that differs is no loader's, but a module's input."""
    found = [
        side.facts.get("batch", [])[difference.at : (difference.at or 0) + 1] for side in sides
    ]
    return bool(difference.part == "batch" and difference.at) and any(
        kinds and kinds[0].startswith(INPUT) for kinds in found
    )


def _one_gradient(difference: _FirstDifference) -> bool:
    """Return whether the first gradient that differs exists on one side only."""
    if difference.part != "gradients" or difference.at is None:
        return False
    assert difference.a and difference.b
    return None in (entry["gradients"][difference.at] for entry in (difference.a, difference.b))


def _first_operators(a: Reader, b: Reader) -> Optional[_FirstDifference]:
    """Return the first two operators of the traces that differ, None if all that both have are equal."""
    left, right = ((e for e in Reader(r.path) if e["entry"] == "op") for r in (a, b))
    return next((d for d in map(_first_difference, left, right) if d), None)


def _operator(difference: Optional[_FirstDifference]) -> Optional[Operator]:
    if difference is None or not difference.a or not difference.b:
        return None
    return _described(difference.a, difference.b, None, difference.at or 0)


def _described(
    a: dict[str, Any], b: dict[str, Any], distance: Optional[Distance], at: int
) -> Operator:
    name = a["op"] if a["op"] == b["op"] else f"{a['op']} and {b['op']}"
    shape = a["shapes"][at] if at < len(a["shapes"]) else ""
    return Operator(name, a["line"], a.get("backward"), a["in"] == b["in"], distance, shape)


def _with_rerun(
    found: Divergence, a: Reader, b: Reader, difference: _FirstDifference, again: Again
) -> Divergence:
    """Add the first operator whose results differ in that step, and the distance of the tensors."""
    assert found.step is not None
    with tempfile.TemporaryDirectory() as x, tempfile.TemporaryDirectory() as y:
        runs = Rerun(a, found.step, Path(x), again), Rerun(b, found.step, Path(y), again)
        notes = [
            f"the rerun of {reader.path} did not reproduce the bits of its trace: other arguments of the "
            "script, another machine, torch.compile (a rerun runs compiled functions as they are written), "
            "or something that changes from run to run"
            for reader, run, entry in zip((a, b), runs, (difference.a, difference.b))
            if entry and entry["entry"] == "step" and _numbers_differ(entry, run.step)
        ]
        distance = found.distance
        if found.part in ("gradients", "weights") and found.tensor:
            values = [run.tensors(found.part).get(found.tensor) for run in runs]
            if values[0] is not None and values[1] is not None:
                distance = ulps.distance(values[0], values[1])
        operator = _first_operator(*runs)
        if found.part == "initial weights" and operator:
            distance = operator.distance
        return replace(found, operator=operator, distance=distance, notes=found.notes + notes)


def _numbers_differ(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two steps differ in more than the facts about them, which older traces lack."""
    return any(a[key] != b[key] for key in ("random", "batch", "loss", "gradients", "weights"))


def _first_operator(a: Rerun, b: Rerun) -> Optional[Operator]:
    """Return the first operator that both sides ran and whose results differ.

    Operators that only one side ran are skipped; exact and native runs have some.
    """
    left, right = ([(e["op"], *e["shapes"]) for _, e in run.operators] for run in (a, b))
    for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        for k in range(block.size):
            (i, x), (j, y) = a.operators[block.a + k], b.operators[block.b + k]
            difference = _first_difference(x, y)
            if difference and difference.at is not None:
                at = str(difference.at)
                distance = ulps.distance(a.results(i)[at], b.results(j)[at])
                return _described(x, y, distance, difference.at)
    return None


# --- runs, weights, golden files --------------------------------------------------------------------------


def _compare_runs(a: Path, b: Path, again: Optional[Again]) -> Optional[Divergence]:
    """Compare two runs by their traces if both have one, else by their items and weights."""
    difference = ulps.largest_difference(_read_weights(a / WEIGHTS), _read_weights(b / WEIGHTS))
    if all((path / TRACE).exists() for path in (a, b)):
        found = compare_traces(Reader(a / TRACE), Reader(b / TRACE), again)
        found = found and replace(found, kind="run")
    else:
        found = _compare_items(
            read_items(a / METRICS), read_items(b / METRICS), "run", _as_header(a), _as_header(b)
        )
        if found and difference:
            found = replace(found, tensor=difference[0], distance=difference[1])
    if found is None and difference:
        raise ReproError(
            f"{a} or {b} is damaged: their records are equal, but their weights differ"
        )
    return found


def _as_header(folder: Path) -> dict[str, Any]:
    """Return the contents of run.json under the names of a trace's header."""
    record = read_record(folder)
    return {**record, "definitions": record.get("definitions.version"), "environment": record}


def _compare_weights(a: Path, b: Path, again: Optional[Again]) -> Optional[Divergence]:
    x, y = _read_weights(a), _read_weights(b)
    difference = ulps.largest_difference(x, y)
    if difference is None:
        return None
    differing = sum(n not in x or n not in y or not _same(x[n], y[n]) for n in {*x, *y})
    sentence = "weights alone do not show the cause: compare traces or run folders"
    return Divergence(
        "weights",
        "weights",
        tensor=difference[0],
        differing=(differing, len({*x, *y})),
        distance=difference[1],
        cause=("unknown", sentence),
    )


def _same(a: Tensor, b: Tensor) -> bool:
    d = ulps.distance(a, b)
    return d is not None and d.elements == 0


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = safetensors.torch.load(read_regular(path))
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ReproError(f"{path} is truncated or not a safetensors file ({error})") from None
    return found


def _compare_goldens(a: Path, b: Path, again: Optional[Again]) -> Optional[Divergence]:
    return _compare_items(read_items(a), read_items(b), "golden", {}, {})


# The items of a run in the pipeline's order: (how their names begin, the cause if they differ first)
_ITEMS = [
    ("recipe.", ("recipe", "different recipes")),
    (
        "definitions.",
        (
            "definitions",
            "different versions of the definitions, or exact on one side and native on the other",
        ),
    ),
    ("data.", ("data", "different data: the SHA-256s of the files differ")),
    ("preprocessed.", ("preprocessing", "a different preprocessing of the same data")),
    ("initial.", ("initial weights", "")),
    ("epoch.", ("environment", "")),
    ("weights.", ("environment", "")),
    ("", ("evaluation", "the evaluation of the same weights")),
]


def _compare_items(
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
    likely = causes.likely_cause(Evidence(record_a, record_b, part))
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
    """Return the lines that describe what `compare` found between a and b."""
    shown = [headline(found, a, b)]
    if found is None:
        return shown
    shown += [f"{name}: {text}" for name, text in facts(found)]
    if any(distance for _, distance in found.growth):
        first, last = found.growth[0], found.growth[-1]
        shown.append(
            f"growth (ulps between weights): {sparkline([d for _, d in found.growth])} "
            f"from {first[1]:,} at step {first[0]} to {last[1]:,} at step {last[0]}"
        )
    return [*shown, f"likely cause: {found.cause[1]}"]


def headline(found: Optional[Divergence], a: str, b: str) -> str:
    """Return one line: whether and where a and b diverge."""
    if found is None:
        return f"{a} and {b}: no difference"
    at = f"epoch {found.epoch}, " * bool(found.epoch) + f"step {found.step}"
    if found.part in ("initial weights", "settings", "model"):
        at = "the first step"
    at = f" in {at}" * (found.step is not None)
    many = "" if not found.differing else "; {} of {} differ there".format(*found.differing)
    first = found.item or found.tensor
    name = f", first {first}" if first else ""
    return f"{a} and {b} diverge{at}: {PARTS[found.part]}{name}{many}"


def facts(found: Divergence) -> list[tuple[str, str]]:
    """Return the other known facts, except growth and cause, as (name, text)."""
    shown = []
    if found.values:
        shown.append(("values", "{} and {}".format(*found.values)))
    if found.distance:
        of = f"weights, most in {found.tensor}: " if found.item else ""
        shown.append(("by how much", of + _words(found.distance)))
    if found.operator:
        o = found.operator
        backward = f", in its backward pass ({o.backward})" if o.backward else ""
        inputs = "the same inputs" if o.same_inputs else "inputs that already differ"
        shown.append(("operator", f"{o.name}, called at {o.line}{backward}: from {inputs}"))
        if o.distance:
            shown.append((f"its result {o.shape}", _words(o.distance)))
    return shown + [("note", note) for note in found.notes]


def _words(d: Distance) -> str:
    ulps = "" if d.ulps is None else f"at most {d.ulps:,} ulp{'s' * (d.ulps != 1)}, "
    return f"{ulps}{d.elements:,} of {d.of:,} element{'s' * (d.of != 1)}"


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[int], width: int = 40) -> str:
    """Draw numbers as a line of bars, by their binary logarithms, the largest of each column."""
    columns = [
        max(values[i * len(values) // width : (i + 1) * len(values) // width], default=None)
        for i in range(width)
    ]
    heights = [value.bit_length() for value in columns if value is not None]
    top = max(1, *heights)
    return "".join(_BARS[height * (len(_BARS) - 1) // top] for height in heights)
