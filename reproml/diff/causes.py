"""Why two trainings part: a table of known causes, of which the first that fits is told."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Optional


@dataclass
class Evidence:
    """What is known of two trainings a and b and of the place where they part."""

    a: dict[str, Any]  # header of a trace, or record of a run: environment, recipe, numerics, ...
    b: dict[str, Any]
    part: str  # what parts first: a key of diff.PARTS
    operator: Optional[str] = None  # the first whose results differ
    same_inputs: Optional[bool] = None  # of that operator
    same_random: Optional[bool] = (
        None  # the state of the random numbers at the first step from there on
    )
    same_samples: Optional[bool] = None  # the epoch's samples, in whatever order
    beside_same: bool = False  # of the batch a tensor differs beside an earlier one that does not
    settings: list[str] = field(default_factory=list)  # of the optimizer, that differ

    def both(self, *keys: str) -> tuple[Any, Any]:
        """The values of a and b below these keys; None where there is none."""
        found = []
        for value in (self.a, self.b):
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None  # type: ignore[assignment]
            found.append(value)
        return found[0], found[1]

    def differs(self, *keys: str) -> bool:
        """Whether both sides tell, and not the same."""
        x, y = self.both(*keys)
        return x is not None and y is not None and x != y

    def environment(self) -> list[str]:
        """What differs between the machines and can change native results, in words."""
        found = [
            words.format(*self.both("environment", *keys))
            for words, keys in _ENVIRONMENT
            if self.differs("environment", *keys)
        ]
        a, b = self.both("environment", "variables")
        x: dict[str, str] = a or {}
        y: dict[str, str] = b or {}
        for name in sorted(
            {*x, *y} - {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY"}
        ):
            if x.get(name) != y.get(name):
                found.append(f"{name} ({x.get(name, 'unset')} and {y.get(name, 'unset')})")
        return found

    def recipe(self) -> list[str]:
        """The keys of the recipes that differ: "optimizer.learning_rate"."""
        found = _keys(*self.both("recipe"))
        return [key for key in found if not key.startswith(("name ", "trace "))]  # without effect


_ENVIRONMENT = [
    ("the number of threads ({} and {})", ("torch", "threads")),
    ("the CPU capability ({} and {})", ("torch", "capability")),
    ("the version of PyTorch ({} and {})", ("versions", "torch")),
    ("the processor ({} and {})", ("machine", "cpu")),
    ("the architecture ({} and {})", ("machine", "architecture")),
    ("another BLAS (MKL: {} and {})", ("torch", "mkl")),
]

# What adds up many numbers, in an order that depends on threads, vector width and library.
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


# name, whether it fits, the sentence with what is to be filled in
Row = tuple[str, Callable[[Evidence], bool], str]
CAUSES: list[Row] = [
    (
        "definitions",
        lambda e: e.differs("definitions") and _exact(e),
        "another version of the definitions of exact arithmetic: {definitions}",
    ),
    (
        "data",
        lambda e: e.differs("data.sha256"),
        "other data: the files have other SHA-256s",
    ),
    (
        "recipe",
        lambda e: bool(e.recipe()),
        "another recipe: {recipe}",
    ),
    (
        "optimizer",
        lambda e: e.part == "settings",
        "other settings of the optimizer: {settings}",
    ),
    (
        "model",
        lambda e: e.part == "model",
        "another model or another optimizer: its tensors have other names or shapes",
    ),
    (
        "seed",
        lambda e: e.part == "initial weights" and e.same_random is False,
        "another seed, or random numbers drawn in another order, before the weights were initialised",
    ),
    (
        "numerics",
        lambda e: e.differs("numerics") and e.part in _FROM_ARITHMETIC,
        "exact arithmetic against native: native rounds in an order of its own",
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
        "other initial weights from the same random numbers: another initialisation or checkpoint",
    ),
    (
        "part of the batch",
        lambda e: e.part == "batch" and e.beside_same,
        "other data: one tensor of the batch differs beside another that does not, as labels do that are "
        "out of step with their inputs",
    ),
    (
        "shuffle",
        lambda e: e.part == "batch" and e.same_samples is True,
        "another shuffle: the epoch has the same samples in another order",
    ),
    (
        "other data",
        lambda e: e.part == "batch" and e.same_samples is False,
        "other data: the samples of the epoch are not the same",
    ),
    (
        "data or shuffle",
        lambda e: e.part == "batch",
        "other data or another shuffle; a whole epoch in both traces would tell which",
    ),
    (
        "random numbers",
        lambda e: (
            e.part in _FROM_ARITHMETIC
            and (e.same_random is False or bool(_RANDOM.search(e.operator or "")))
        ),
        "other random numbers (dropout, noise): another seed, or one side has drawn more of them before",
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
        "one side ended earlier: fewer steps, or cut off",
    ),
    (
        "optimizer's schedule",
        lambda e: e.part == "weights" and not e.operator,
        "the optimizer: from the same gradients other weights, so its settings or its state differ",
    ),
    (
        "sum without order",
        lambda e: _arithmetic(e) and _sums(e),
        "the order in which {operator} adds up, which differs from run to run on one machine",
    ),
]
_UNKNOWN = "unknown: nothing that was recorded explains it"


def likely(e: Evidence) -> tuple[str, str]:
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
