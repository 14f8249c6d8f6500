"""Explain why two trainings differ: a table of known causes, from which the first that fits is reported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Optional


@dataclass
class Evidence:
    """What is known about two trainings a and b and about their first difference."""

    a: dict[str, Any]  # header of a trace, or record of a run: environment, recipe, numerics, ...
    b: dict[str, Any]
    part: str  # what differs first: a key of compare.PARTS
    operator: Optional[str] = None  # the first operator whose results differ
    same_inputs: Optional[bool] = None  # whether its inputs are the same
    # Whether the state of the random number generator is the same at the first step from there on.
    same_random: Optional[bool] = None
    same_samples: Optional[bool] = None  # whether the epoch has the same samples, in any order
    beside_same: bool = False  # whether an earlier tensor of the batch is the same on both sides
    settings: list[str] = field(default_factory=list)  # the optimizer's settings that differ

    def both(self, *keys: str) -> tuple[Any, Any]:
        """Return the values of a and b under these keys, None where one is missing."""
        found = []
        for value in (self.a, self.b):
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None  # type: ignore[assignment]
            found.append(value)
        return found[0], found[1]

    def differs(self, *keys: str) -> bool:
        """Return whether both sides have a value under these keys, and the values differ."""
        x, y = self.both(*keys)
        return x is not None and y is not None and x != y

    def environment(self) -> list[str]:
        """Describe what differs between the machines and can change native results."""
        found = [
            words.format(*self.both("environment", *keys))
            for words, keys in _ENVIRONMENT
            if self.differs("environment", *keys)
        ]
        a, b = self.both("environment", "variables")
        x: dict[str, Any] = a if isinstance(a, dict) else {}
        y: dict[str, Any] = b if isinstance(b, dict) else {}
        for name in sorted(
            {*x, *y} - {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY"}
        ):
            if x.get(name) != y.get(name):
                found.append(f"{name} ({x.get(name, 'unset')} and {y.get(name, 'unset')})")
        return found

    def recipe(self) -> list[str]:
        """Return the keys of the recipes that differ, such as "optimizer.learning_rate"."""
        found = _keys(*self.both("recipe"))
        return [
            key for key in found if not key.startswith(("name ", "trace "))
        ]  # these have no effect


_ENVIRONMENT = [
    ("the number of threads ({} and {})", ("torch", "threads")),
    ("the CPU capability ({} and {})", ("torch", "capability")),
    ("the version of PyTorch ({} and {})", ("versions", "torch")),
    ("the processor ({} and {})", ("machine", "cpu")),
    ("the architecture ({} and {})", ("machine", "architecture")),
    ("another BLAS (MKL: {} and {})", ("torch", "mkl")),
]

# Operators that add up many numbers, in an order that depends on threads, vector width and library.
_SUMS = re.compile(
    "sum|mean|mm|dot|conv|norm|softmax|loss|var|linear|matmul|index_add|addmv|scatter_add|dense_backward"
    "|pool|attention|lstm|gru"
)
_RANDOM = re.compile("dropout|bernoulli|normal_|rand|uniform|multinomial|exponential")

_FROM_ARITHMETIC = ("loss", "gradients", "weights", "operator", "initial weights", "item")


def _sums(e: Evidence) -> bool:
    return bool(_SUMS.search(e.operator or ""))


def _arithmetic(e: Evidence) -> bool:
    return e.part in _FROM_ARITHMETIC and e.same_inputs is not False


# name, whether it fits, the sentence, with fields to fill in
Row = tuple[str, Callable[[Evidence], bool], str]
CAUSES: list[Row] = [
    (
        "definitions",
        lambda e: e.differs("definitions") and _exact(e),
        "different versions of the definitions of exact arithmetic: {definitions}",
    ),
    (
        "data",
        lambda e: e.differs("data.sha256"),
        "different data: the SHA-256s of the files differ",
    ),
    (
        "recipe",
        lambda e: bool(e.recipe()),
        "different recipes: {recipe}",
    ),
    (
        "optimizer",
        lambda e: e.part == "settings",
        "different settings of the optimizer: {settings}",
    ),
    (
        "model",
        lambda e: e.part == "model",
        "different models or optimizers: the names or shapes of the tensors differ",
    ),
    (
        "seed",
        lambda e: e.part == "initial weights" and e.same_random is False,
        "a different seed, or a different order of random draws, before the weights were initialised",
    ),
    (
        "numerics",
        lambda e: e.differs("numerics") and e.part in _FROM_ARITHMETIC,
        "exact arithmetic on one side, native on the other, which rounds in an order of its own",
    ),
    (
        "contracted uniform_",
        lambda e: (
            e.part == "initial weights"
            and "uniform" in (e.operator or "uniform")
            and bool(e.environment())
        ),
        "the initialisation: from the same random numbers uniform_ computes x (b - a) + a with one "
        "rounding (contracted to a fused multiply-add) or with two, by {environment}",
    ),
    (
        "initial weights",
        lambda e: e.part == "initial weights",
        "different initial weights from the same random numbers: a different initialisation or checkpoint",
    ),
    (
        "part of the batch",
        lambda e: e.part == "batch" and e.beside_same,
        "different data: one tensor of the batch differs while another is the same, as when labels do not "
        "match their inputs",
    ),
    (
        "shuffle",
        lambda e: e.part == "batch" and e.same_samples is True,
        "a different shuffle: the epoch has the same samples in another order",
    ),
    (
        "other data",
        lambda e: e.part == "batch" and e.same_samples is False,
        "different data: the samples of the epoch differ",
    ),
    (
        "data or shuffle",
        lambda e: e.part == "batch",
        "different data or a different shuffle; a complete epoch in both traces would show which",
    ),
    (
        "random numbers",
        lambda e: (
            e.part in _FROM_ARITHMETIC
            and (e.same_random is False or bool(_RANDOM.search(e.operator or "")))
        ),
        "different random numbers (dropout, noise): a different seed, or one side drew more of them before",
    ),
    (
        "order of a sum",
        lambda e: _arithmetic(e) and _sums(e) and bool(e.environment()),
        "the order in which {operator} adds up, by {environment}",
    ),
    (
        "environment",
        lambda e: _arithmetic(e) and bool(e.environment()),
        "native arithmetic rounds differently by {environment}",
    ),
    (
        "length",
        lambda e: e.part == "length",
        "one side ended earlier: it has fewer steps or was truncated",
    ),
    (
        "optimizer's schedule",
        lambda e: e.part == "weights" and not e.operator,
        "the optimizer: the same gradients gave different weights, so its settings or its state differ",
    ),
    (
        "sum without order",
        lambda e: _arithmetic(e) and _sums(e),
        "the order in which {operator} adds up, which differs from run to run on one machine",
    ),
]
_UNKNOWN = "unknown: the recorded facts do not explain it"


def likely_cause(e: Evidence) -> tuple[str, str]:
    """Return name and sentence of the first cause that fits."""
    for name, fits, sentence in CAUSES:
        if fits(e):
            return name, sentence.format(
                environment=" and ".join(e.environment()),
                recipe=", ".join(e.recipe()),
                settings=", ".join(e.settings),
                definitions="{} and {}".format(*e.both("definitions")),
                operator=e.operator,
            )
    return "unknown", _UNKNOWN


def _exact(e: Evidence) -> bool:
    return e.both("numerics") == ("exact", "exact")


def _keys(a: Any, b: Any, at: str = "") -> list[str]:
    if a is None or b is None:
        return []
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [f"{at} ({a} and {b})"] if a != b else []
    return [
        found
        for key in sorted({*a, *b})
        for found in _keys(a.get(key, "default"), b.get(key, "default"), f"{at}.{key}".strip("."))
    ]
