"""Explain why two trainings differ: a table of known causes, from which the first that fits is reported.

tests/diff/test_pairs.py judges the table as a whole, on pairs of trainings that are one edit apart.
"""

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
    # The facts about the diverging step (tracing/facts.py) that both sides have and that differ.
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    drawn: str = ""  # between which epochs or steps the random numbers have begun to differ
    model: str = ""  # how the tensors of the models differ
    size: Optional[float] = None  # the relative difference of the loss or of the gradients
    factor: str = ""  # between the last gradients, where all differ
    module_input: bool = (
        False  # whether the tensor of the batch is a module's input and no loader's
    )
    one_gradient: bool = False  # whether the first gradient that differs exists on one side only
    outside_step: bool = False  # whether the weights differ where no optimizer takes a step
    steps: tuple[int, ...] = (0, 0)  # how many both sides have
    interrupted: bool = False  # whether one side did not reach the end of its training

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
            words.format(*(str(x)[:80] for x in self.both(*keys)))
            for words, keys in _ENVIRONMENT
            if self.differs(*keys)
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

    def known(self, table: list[tuple[str, str]]) -> list[str]:
        """Describe the facts of a table that differ."""
        return [
            words.format(*(str(x)[:300] for x in self.facts[key]))
            for words, key in table
            if key in self.facts
        ]

    def recipe(self) -> list[str]:
        """Return the keys of the recipes that differ, such as "optimizer.learning_rate"."""
        found = _keys(*self.both("recipe"))
        return [
            key for key in found if not key.startswith(("name ", "trace "))
        ]  # these have no effect


_ENVIRONMENT = [
    ("the device ({} and {})", ("device",)),
    ("the number of threads ({} and {})", ("environment", "torch", "threads")),
    ("the CPU capability ({} and {})", ("environment", "torch", "capability")),
    ("the version of PyTorch ({} and {})", ("environment", "versions", "torch")),
    ("the processor ({} and {})", ("environment", "machine", "cpu")),
    ("the architecture ({} and {})", ("environment", "machine", "architecture")),
    ("another BLAS (MKL: {} and {})", ("environment", "torch", "mkl")),
    ("the GPU ({} and {})", ("environment", "torch", "gpu")),
    ("the version of CUDA ({} and {})", ("environment", "torch", "cuda")),
]

# Facts that explain another batch, another computation of the step, and only another rounding.
_BATCHES = [
    ("the number of backward passes in a step ({} and {}), as gradients are accumulated", "passes"),
    ("the batch size ({} and {})", "batch_size"),
    ("drop_last ({} and {})", "drop_last"),
    ("the number of samples ({} and {})", "samples"),
    ("the sampler ({} and {})", "sampler"),
    ("whether the data loader has a generator of its own ({} and {})", "generator"),
    ("collate_fn ({} and {})", "collate_fn"),
    ("the class of the dataset ({} and {})", "dataset"),
]
_WORKERS = [
    ("num_workers ({} and {})", "num_workers"),
    ("persistent_workers ({} and {})", "persistent_workers"),
    ("worker_init_fn ({} and {})", "worker_init_fn"),
]
_MODEL = [
    ("a module ({} and {})", "modules"),
    ("whether the model is in training mode ({} and {})", "training"),
    ("autocast ({} and {})", "autocast"),
    ("the precision of matrix products ({} and {})", "precision"),
]
_KERNELS = [
    ("the memory layout of the weights ({} and {})", "kinds"),
    ("the memory layout of the batch ({} and {})", "layout"),
]

# Operators that add up many numbers, in an order that depends on threads, vector width and library.
_SUMS = re.compile(
    "sum|mean|mm|dot|conv|norm|softmax|loss|var|linear|matmul|index_add|addmv|scatter_add|dense_backward"
    "|pool|attention|lstm|gru"
)
_RANDOM = re.compile(
    "dropout|bernoulli|normal_|rand|uniform|multinomial|exponential|gamma|dirichlet"
)

_FROM_LOADER = ("batch", "epoch", "operator")
_FROM_ARITHMETIC = ("loss", "gradients", "weights", "operator", "initial weights", "item")


def _sums(e: Evidence) -> bool:
    return bool(_SUMS.search(e.operator or ""))


def _computed(e: Evidence) -> bool:
    return e.part in ("loss", "gradients", "operator")


def _large(e: Evidence) -> bool:
    """Return whether the loss or the gradients differ by more than rounding does."""
    return e.size is not None and e.size > (1e-4 if e.part == "loss" else 1e-3)


def _arithmetic(e: Evidence) -> bool:
    return e.part in _FROM_ARITHMETIC and e.same_inputs is not False and not _exact(e)


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
        "scheduler",
        lambda e: e.part == "settings" and any(x.startswith("initial_lr (") for x in e.settings),
        "a learning rate scheduler on one side only, or two that differ: {settings}",
    ),
    (
        "optimizer",
        lambda e: e.part == "settings",
        "different settings of the optimizer: {settings}",
    ),
    (
        "model",
        lambda e: e.part == "model",
        "different models or optimizers: {model}",
    ),
    (
        "seed",
        lambda e: (
            "seed" in e.facts
            and e.same_random is False
            and e.part in ("initial weights", *_FROM_LOADER, "loss", "gradients")
        ),
        "different seeds ({seed}); without a seed PyTorch takes another in each run",
    ),
    (
        "draws before the weights",
        lambda e: e.part == "initial weights" and e.same_random is False,
        "different random numbers before the weights were initialised: another initialisation, modules "
        "made in another order, or a model that was made before its seed was set; in the last case two "
        "traces of one side differ too",
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
            and not _exact(e)
            and "uniform" in (e.operator or "uniform")
            and bool(e.environment())
        ),
        "the initialisation: from the same random numbers uniform_ computes x (b - a) + a with one "
        "rounding (contracted to a fused multiply-add) or with two, by {environment}",
    ),
    (
        "initial weights",
        lambda e: e.part == "initial weights",
        "different initial weights from the same random numbers: another initialisation or checkpoint, "
        "modules made in another order, or a model that was made before the seed was set; in the last "
        "case two traces of one side differ too",
    ),
    (
        "loader",
        lambda e: (
            bool(e.known(_BATCHES))
            and (e.part in _FROM_LOADER or "passes" in e.facts and _computed(e))
        ),
        "other batches, by {batches}",
    ),
    (
        "draws between steps",
        lambda e: bool(e.drawn) and (e.part == "batch" or _computed(e)) and not _model(e),
        "one side drew random numbers {drawn} that the other did not, as an evaluation does with "
        "dropout, noise or a DataLoader, which draws one number for each pass even without shuffling; "
        "or one side set a seed there",
    ),
    (
        "workers",
        lambda e: e.part in _FROM_LOADER and e.same_samples is not True and bool(e.known(_WORKERS)),
        "{workers}: each worker draws from a generator of its own, so a dataset with random augmentation "
        "gives other samples; if the batches still differ with equal settings, the data differ",
    ),
    (
        "module's input",
        lambda e: e.module_input,
        "what happens between the batch and the model: the batch is the same, but the input of a module "
        "is computed from it (noise, augmentation, normalisation) on one side only or differently",
    ),
    (
        "kinds of batch",
        lambda e: e.part in ("batch", "operator") and "batch" in e.facts,
        "other batches, by dtype or shape ({batch}): another batch size, padding or preprocessing",
    ),
    (
        "epoch",
        lambda e: e.part == "epoch",
        "the epochs have different numbers of steps: another batch size or drop_last, more data, or a "
        "loop that leaves the epoch early",
    ),
    (
        "part of the batch",
        lambda e: e.part == "batch" and e.beside_same,
        "different data: one tensor of the batch differs while another is the same, as when labels do not "
        "match their inputs",
    ),
    (
        "draws before the batch",
        lambda e: e.part == "batch" and e.same_random is False and e.same_samples is True,
        "a different shuffle: the epoch has the same samples in another order, from other random numbers, "
        "although the weights before it are the same: one side drew more numbers after its model was made",
    ),
    (
        "augmentation",
        lambda e: e.part == "batch" and e.same_random is False,
        "random augmentation of the data on one side, or a different shuffle: the weights before this "
        "batch are the same, but the random numbers are not; without the augmentation on both sides "
        "only the second would remain",
    ),
    (
        "shuffle",
        lambda e: e.part == "batch" and e.same_samples is True,
        "a different shuffle: the epoch has the same samples in another order",
    ),
    (
        "other data",
        lambda e: e.part == "batch" and e.same_samples is False,
        "different data: the samples of the epoch differ, by their files, their preprocessing or an "
        "augmentation that draws from Python or NumPy; in the last case two traces of one side differ too",
    ),
    (
        "data or shuffle",
        lambda e: e.part == "batch",
        "different data or a different shuffle; a complete epoch in both traces would show which",
    ),
    (
        "one gradient",
        lambda e: e.one_gradient,
        "a gradient exists on one side only: the tensor is frozen (requires_grad=False) or unused there, "
        "or zero_grad(set_to_none=False) keeps a gradient of zeros",
    ),
    (
        "kernels",
        lambda e: _computed(e) and not _large(e) and bool(e.known(_KERNELS)),
        "other kernels, which round in another order, by {kernels}",
    ),
    (
        "model settings",
        lambda e: _computed(e) and _model(e),
        "another computation of the loss, by {computation}",
    ),
    (
        "compiled",
        lambda e: _computed(e) and "compiled" in e.facts,
        "torch.compile ({compiled}): its kernels round in another order, and draw the random numbers of "
        "dropout from a generator of their own unless torch._inductor.config.fallback_random is set",
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
        "factor of the gradients",
        lambda e: e.part == "gradients" and bool(e.factor),
        "gradients from the same loss that all differ, the last by a factor of {factor}: clipped, averaged "
        "or scaled after the backward pass",
    ),
    (
        "computation",
        lambda e: _computed(e) and _large(e),
        "another computation from the same batch: the loss or the gradients differ by {size}, more than "
        "rounding explains; compare the forward pass, the loss function, what happens to gradients, and "
        "what changes weights outside of an optimizer's step{machines}",
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
        "interrupted",
        lambda e: e.part == "length" and e.interrupted,
        "one side ended earlier ({steps} steps): a training was interrupted, still runs, or its trace was "
        "truncated",
    ),
    (
        "length",
        lambda e: e.part == "length",
        "one side ended earlier ({steps} steps): it trained for fewer epochs or steps",
    ),
    (
        "outside a step",
        lambda e: e.outside_step and e.both("level") != ("epoch", "epoch"),
        "the weights were changed on one side after the last step of an optimizer",
    ),
    (
        "level of the trace",
        lambda e: e.outside_step,
        "unknown: the weights differ after this epoch; trace both at level step to see where it begins",
    ),
    (
        "learning rate",
        lambda e: e.part == "weights" and "lr" in e.facts,
        "the learning rate ({lr}), as a scheduler sets it",
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
    (
        "rounding",
        lambda e: _computed(e) and e.size is not None and not e.operator,
        "only rounding: the loss or the gradients differ by {size}. The operators differ from run to run, "
        "or one side uses others, for example by torch.compile of a function; --rerun names the operator",
    ),
]
_UNKNOWN = "unknown: the recorded facts do not explain it"


def _model(e: Evidence) -> bool:
    return bool(e.known(_MODEL))


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
                batches=" and ".join(e.known(_BATCHES)),
                workers=" and ".join(e.known(_WORKERS)),
                computation=" and ".join(e.known(_MODEL)),
                kernels=" and ".join(e.known(_KERNELS)),
                drawn=e.drawn,
                model=e.model or "the names or shapes of the tensors differ",
                size=f"{100 * (e.size or 0):.3g} %",
                machines="".join(f"; also different: {x}" for x in e.environment()),
                factor=e.factor,
                steps="{:,} and {:,}".format(*e.steps),
                **{
                    name: "{} and {}".format(*e.facts.get(name, ("", "")))
                    for name in ("batch", "compiled", "lr", "seed")
                },
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
