"""One HTML page about a run, to send to a reviewer: self-contained, it loads nothing.

    page = build_page(Path("runs/mnist-mlp"), "mnist-mlp")   # computes the verdict again
    write_page(page.html, Path("runs/mnist-mlp.html"))

The page depends only on the run folder, the data, the golden file, and the run or trace that it is compared
with. `contents` collects what it shows; the template report.html lays it out and escapes every text.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray

from reproml import doctor
from reproml.arithmetic.context import exact
from reproml.diff import compare
from reproml.diff.compare import Divergence
from reproml.errors import ReproError
from reproml.evidence import reproduced
from reproml.evidence.provenance import PROVENANCE, SOURCE, read_provenance
from reproml.files import write_atomically
from reproml.pipeline import golden, run
from reproml.pipeline.data import Split
from reproml.pipeline.golden import Comparison
from reproml.pipeline.recipe import Recipe, load_recipe, recipe_names
from reproml.pipeline.run import Items, Number
from reproml.pipeline.train import autocast, step_count
from reproml.terminal import printable
from reproml.tracing.chain import Reader

_WEIGHTS_SHA256 = f"{run.WEIGHTS}.sha256"  # of all hashes the first on the page
_EPOCH = re.compile(r"epoch\.([0-9]{1,9})\..+")  # metrics.json may have been edited by hand
_BATCH = 1024  # bounds the memory
_MOST_WRONG = 12  # images
_MISTAKES = 8  # pairs of classes
_HUGE, _TINY = 1e305, 1e-300  # beyond these the arithmetic of the axes overflows or underflows


@dataclass(frozen=True)
class Page:
    """The page and its verdict: whether the run matches the golden file, None without a golden file."""

    html: str
    verified: Optional[bool]
    differs: bool = False  # from the run or trace that it was compared with
    compared: str = ""  # the result of that comparison in one line


@dataclass(frozen=True)
class Verdict:
    """A run compared with its golden file."""

    golden: Optional[Path]  # None: no golden file
    comparisons: list[Comparison]

    @property
    def differing(self) -> list[tuple[str, str, str]]:
        """Item, expected value and found value of all that differ."""
        return [(c.item, c.expected, c.found) for c in self.comparisons if not c.match]

    @property
    def verified(self) -> Optional[bool]:
        """False if any item differs, including those of metrics.json; None without a golden file."""
        return False if self.differing else None if self.golden is None else True


@dataclass(frozen=True)
class Curve:
    """A curve of a plot. Points that are not finite are left out."""

    points: Sequence[tuple[float, float]]
    name: str
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Plot:
    """Curves over one pair of axes, in the coordinates of the drawing, which the page scales."""

    width: ClassVar[int] = 480
    height: ClassVar[int] = 240
    left: ClassVar[int] = 44
    bottom: ClassVar[int] = 40
    pad: ClassVar[int] = 12

    across: str  # what the horizontal axis counts
    label: str  # for screen readers
    y_ticks: list[tuple[str, str]]  # position, text
    x_ticks: list[tuple[str, str]]
    curves: list[tuple[Curve, list[tuple[str, str, str]]]]  # x, y and title of each point


def build_page(
    folder: Path,
    recipe_name: Optional[str] = None,
    data_folder: Optional[Path] = None,
    other: Optional[Path] = None,
) -> Page:
    """Return the page of a run.

    recipe_name: name or path, as on the command line; None: the recipe in run.json. other: a run folder or
    a trace, to show where the two first diverge. Raises ReproError if the folder is not a complete run of
    the recipe, or if the golden file or the other run or trace cannot be read.
    """
    shown = contents(folder, recipe_name, data_folder, other)
    return Page(render(shown), shown["verdict"].verified, shown["differs"], shown["compared"])


def render(shown: dict[str, Any]) -> str:
    """Return the HTML of a page. The template escapes every text and fails on a missing name."""
    return "\n".join(map(printable, _TEMPLATE.render(shown).split("\n")))


def write_page(html: str, path: Path) -> None:
    """Write the page atomically; an older one is replaced. Raises ReproError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html.encode())
    except OSError as error:
        raise ReproError(f"cannot write the report {path}: {error.strerror}") from None


def predict(
    model: torch.nn.Module, x: NDArray[Any], precision: str = "float32"
) -> NDArray[np.float32]:
    """Return the probability of each class, float32 [n, classes], for images x, float32 [n, h, w].

    The softmax is exact, so that the most wrong images are the same on any machine.
    """
    model.eval()
    with exact(), torch.no_grad(), autocast(precision, torch.device("cpu")):
        parts = [
            torch.softmax(model(torch.from_numpy(x[start : start + _BATCH])), 1).numpy()
            for start in range(0, len(x), _BATCH)
        ]
    return np.concatenate(parts)


def most_wrong(labels: NDArray[Any], probabilities: NDArray[Any], count: int) -> list[int]:
    """Return the images with the most probable wrong predictions, by decreasing probability."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    probability = probabilities[wrong, predicted[wrong]]
    return [int(i) for i in wrong[np.argsort(-probability, kind="stable")][:count]]


def confusion_counts(
    labels: NDArray[Any], predicted: NDArray[Any], classes: int
) -> NDArray[np.int64]:
    """Return how often each label (row) was predicted as each class (column): int64 [classes, classes]."""
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def png(grey: NDArray[np.uint8]) -> bytes:
    """Return a PNG of grey levels, uint8 [h, w], uncompressed so that no version of zlib changes it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = grey.shape
    raw = b"".join(b"\0" + row.tobytes() for row in grey)
    block = struct.pack("<BHH", 1, len(raw), len(raw) ^ 0xFFFF) + raw  # one stored block of deflate
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
            chunk(b"IDAT", b"\x78\x01" + block + struct.pack(">I", zlib.adler32(raw))),
            chunk(b"IEND", b""),
        ]
    )


# --- the contents -----------------------------------------------------------------------------------


def contents(
    folder: Path, recipe_name: Optional[str], data_folder: Optional[Path], other: Optional[Path]
) -> dict[str, Any]:
    """Return everything that the page shows, by the names that the template uses."""
    recipe = load_recipe(recipe_name) if recipe_name else run.recorded_recipe(folder)
    file = recipe_name or _file_of(recipe)
    record = run.read_record(folder)
    numerics = "native" if record.get("numerics") == "native" else "exact"
    divergence = _compare(folder, other) if other else None
    dataset, prepared, _ = run.prepare(recipe, data_folder, numerics)
    model, _, sha256 = run.load_run_model(folder, recipe, prepared, numerics)
    if numerics == "native":
        run.refuse_damaged(folder, sha256)
        found = {
            **run.read_items(folder / run.METRICS),
            **run.score(model, recipe, prepared, "exact"),
        }
        verdict = Verdict(None, [])
    else:
        found, recorded = run.recompute(folder, recipe, data_folder)
        verdict = _verdict(folder, recipe, found, recorded)
    probabilities = predict(model, prepared.test.x, recipe.precision)
    predicted = probabilities.argmax(1)
    counts = confusion_counts(dataset.test.labels, predicted, dataset.classes)
    losses, step_losses = _losses(found), _step_losses(folder)
    facts = doctor.facts(record)
    times = record["times"] if isinstance(record.get("times"), dict) else {}
    steps = step_count(recipe, len(dataset.train.labels))
    named = f"--recipe {shlex.quote(file)} " * bool(recipe_name)  # else the one in run.json
    verify = f"python -m reproml verify {named}--run {shlex.quote(str(folder))}"
    return {
        "name": recipe.name,
        "recipe_name": file,
        "folder": folder,
        "native": numerics == "native",
        "started": str(times.get("started", ""))[:16].replace("T", " "),
        "facts": facts,
        "version": doctor.here()["versions.reproml"],
        "verdict": verdict,
        "compared": compare.headline(divergence, str(folder), str(other)) if other else "",
        "differs": divergence is not None,
        "divergence": divergence_facts(divergence) if divergence else [],
        "growth": growth_plot(divergence) if divergence else None,
        "figures": _figures(found, losses, times, model, folder),
        "losses": list(enumerate(losses, 1)),
        "loss_plot": loss_plot(losses, step_losses),
        "traced": bool(step_losses),
        "confusion": _confusion_cells(counts),
        "wrong": int((dataset.test.labels != predicted).sum()),
        "total": len(predicted),
        "mistakes": _frequent_mistakes(counts),
        "most_wrong": _most_wrong(dataset.test, dataset.levels, probabilities),
        "evidence": _evidence(folder, sha256),
        "checks": _checks(folder, numerics),
        "settings": list(_flat("", record.get("recipe", {}))),
        "environment": _grouped(facts),
        "hashes": _hashes(
            found,
            folder,
            file,
            recipe.train.epochs,
            steps,
            None if numerics == "native" else verify,
        ),
    }


def _file_of(recipe: Recipe) -> str:
    """Return the name of a recipe of the project; of any other the file that README.md would call it."""
    known = recipe.name in recipe_names() and load_recipe(recipe.name).sha256 == recipe.sha256
    return recipe.name if known else f"{recipe.name}.toml"


def _verdict(folder: Path, recipe: Recipe, found: Items, recorded: Items) -> Verdict:
    try:
        path = golden.find_golden(recipe.name)
    except ReproError:
        return Verdict(None, golden.compare_run(found, found, recorded, folder))
    return Verdict(path, golden.compare_run(golden.read_golden(path), found, recorded, folder))


def _losses(items: Items) -> list[float]:
    """Return the mean loss of each epoch; NaN where it was not finite or is not recorded as a number."""
    return [
        float(value) if isinstance(value, (Number, int, float)) else math.nan
        for name, value in items.items()
        if _EPOCH.fullmatch(name) and name.endswith(".loss")
    ]


def _step_losses(folder: Path) -> list[float]:
    """Return the loss of each step if the run was traced step by step, else an empty list."""
    if not (folder / run.TRACE).is_file():
        return []
    entries = Reader(folder / run.TRACE)
    return [_number(loss) for e in entries if e["entry"] == "step" for loss in e["loss"][:1]]


def _number(text: str) -> float:
    """Return a loss of a trace; NaN for one that is not a single real number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _compare(folder: Path, other: Path) -> Optional[Divergence]:
    """Compare the run with another run, or its trace with another trace."""
    if other.is_dir():
        return compare.compare(folder, other)
    if not (folder / run.TRACE).is_file():
        raise ReproError(
            f"{folder} has no {run.TRACE} to compare with {other}; name a run folder, or train again "
            'with trace = "step" in the recipe'
        )
    return compare.compare(folder / run.TRACE, other)


def divergence_facts(found: Divergence) -> list[tuple[str, str]]:
    """Return name and text of everything that is known about a divergence."""
    return [*compare.facts(found), ("likely cause", found.cause[1])]


def growth_plot(found: Divergence) -> Optional[Plot]:
    """Return the plot of a divergence that grows over the steps, None if nothing grew."""
    if not any(ulps for _, ulps in found.growth):
        return None
    points = [(step, math.log2(1 + ulps)) for step, ulps in found.growth]
    return plot([Curve(points, "difference")], "step", "log2(1 + ulps)")


def loss_plot(losses: Sequence[float], step_losses: Sequence[float]) -> Optional[Plot]:
    """Return the plot of the loss of each epoch and, of a traced run, each step."""
    curves = [Curve([(i + 1.0, y) for i, y in enumerate(losses)], "each epoch", dots=True)]
    if step_losses:
        width = len(losses) / len(step_losses) if losses else 1.0
        points = [((i + 1) * width, y) for i, y in enumerate(step_losses)]
        curves.insert(0, Curve(points, "each step", faint=True))
    return plot(curves, "epoch", "loss")


def _figures(
    items: Items,
    losses: list[float],
    times: dict[str, Any],
    model: torch.nn.Module,
    folder: Path,
) -> list[tuple[str, str]]:
    """Return the numbers in large type, each with what it means."""
    figures = []
    for part, name in (("test", "test set"), ("train", "training set")):
        correct, total = int(str(items[f"{part}.correct"])), int(str(items[f"{part}.total"]))
        meaning = f"correct in the {name}: {correct:,} of {total:,}"
        figures.append((f"{100 * correct / total:.2f} %", meaning))
    if losses:
        text = f"{losses[-1]:.4f}" if abs(losses[-1]) < 1e6 else f"{losses[-1]:.4g}"
        figures.append((text, "mean loss in the last epoch"))
    parameters = sum(p.numel() for p in model.parameters())
    figures.append((f"{parameters:,}", "parameters"))
    figures.append((f"{(folder / run.WEIGHTS).stat().st_size:,}", "bytes of weights"))
    try:
        start, end = (datetime.fromisoformat(times[name]) for name in ("data_ready", "trained"))
        figures.append((f"{int((end - start).total_seconds()):,} s", "of training"))
    except (KeyError, TypeError, ValueError):
        pass  # a resumed run has no such time, nor has a record that was written by hand
    return figures


def _confusion_cells(counts: NDArray[np.int64]) -> list[list[tuple[int, str, str]]]:
    """Return count, kind and shade of each cell; the diagonal has a scale of its own."""
    diagonal = np.eye(len(counts), dtype=bool)
    most = np.where(diagonal, counts[diagonal].max(), counts[~diagonal].max(initial=0))

    def cell(i: int, j: int) -> tuple[int, str, str]:
        count = int(counts[i, j])
        shade = f"{8 + 32 * math.sqrt(count / most[i, j]):.0f}%" if count else "0%"
        return count, "right" if i == j else "wrong", shade

    return [[cell(i, j) for j in range(len(counts))] for i in range(len(counts))]


def _frequent_mistakes(counts: NDArray[np.int64]) -> list[tuple[int, int, str]]:
    pairs = [(i, j) for i, j in np.ndindex(*counts.shape) if i != j and counts[i, j]]
    pairs.sort(key=lambda pair: -counts[pair])
    return [(i, j, f"{counts[i, j]:,}") for i, j in pairs[:_MISTAKES]]


def _most_wrong(test: Split, levels: int, probabilities: NDArray[Any]) -> list[dict[str, Any]]:
    mistakes = []
    for i in most_wrong(test.labels, probabilities, _MOST_WRONG):
        grey = test.images[i].astype(np.int64) * 255 // (levels - 1)
        predicted = int(probabilities[i].argmax())
        mistakes.append(
            {
                "index": i,
                "label": int(test.labels[i]),
                "predicted": predicted,
                "probability": f"{float(probabilities[i, predicted]):.6f}",
                "png": base64.b64encode(
                    png((255 - grey).astype(np.uint8))
                ).decode(),  # ink on paper
            }
        )
    return mistakes


def _evidence(folder: Path, weights_sha256: str) -> list[tuple[str, str]]:
    """Return what is known about provenance, signature and reproduction of the run."""
    signed = (folder / run.SIGNATURE).is_file()
    signature = f"{run.SIGNATURE}, not checked for this page" if signed else "not signed"
    return [
        ("provenance", _provenance_status(folder, weights_sha256)),
        ("signature", signature),
        ("reproduction", _reproduction_status(folder)),
    ]


def _provenance_status(folder: Path, weights_sha256: str) -> str:
    if not (folder / PROVENANCE).is_file():
        return f"no {PROVENANCE}: the run is of an earlier reproml"
    try:
        stated = read_provenance(folder)
    except ReproError as error:
        return str(error)
    found = stated.subjects[0].digest.get("sha256")
    if found != weights_sha256:
        return f"{PROVENANCE} states other weights: {found}"
    revisions = [
        d.digest.get("gitCommit", "") + " with changes" * (not d.annotations.get("clean"))
        for d in stated.definition.resolved_dependencies
        if d.annotations.get("kind") == SOURCE and "gitCommit" in d.digest
    ]
    text = f"{PROVENANCE}, unchanged, by {stated.builder}, SHA-256 {stated.sha256}"
    return ", revision ".join([text, *revisions])


def _reproduction_status(folder: Path) -> str:
    try:
        builders = reproduced.reproduced_by(folder)
    except ReproError as error:
        return str(error)
    if builders is None:
        return "not compared with a run of another machine"
    return f"by {len(builders)} builders: {', '.join(builders)}"


def _checks(folder: Path, numerics: str) -> list[tuple[str, str]]:
    """Return commands that check the run, each with what it does."""
    named = folder.resolve() if folder.name in ("", "..") else folder
    again = shlex.quote(str(named.with_name(f"{named.name}-again")))
    quoted = shlex.quote(str(folder))
    weights = shlex.quote(str(folder / run.WEIGHTS))
    provenance = shlex.quote(str(folder / PROVENANCE))
    train = f"python -m reproml train --recipe {provenance} --out {again}"
    checks = [("Compute the SHA-256 of the weights", f"sha256sum {weights}")]
    if (folder / PROVENANCE).is_file():
        checks += [
            ("Train again", train + " --numerics native" * (numerics == "native")),
            ("Compare the two", f"python -m reproml reproduced {quoted} {again}"),
        ]
    if (folder / run.SIGNATURE).is_file():
        verify = f"python -m reproml verify --run {quoted} --signature PUBLIC_KEY.pem"
        checks.append(("Check the signature", verify))
    return checks


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(value, dict):
        yield prefix, _setting(value)
        return
    for name, inner in value.items():
        yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_setting, value)) + "]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _grouped(facts: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for fact, value in facts.items():
        group, _, name = fact.partition(".")
        shown = name if group == "variables" else name.replace("_", " ")
        groups.setdefault(group, []).append((shown, value))
    return groups


def _hashes(
    items: Items, folder: Path, recipe_name: str, epochs: int, steps: int, verify: Optional[str]
) -> list[tuple[str, str, str]]:
    """Return name, value and command of every hash that a command can check, the weights first.

    verify: the command that compares the run with its golden file, None for a native run.
    """
    names = sorted((n for n in items if n.endswith(".sha256")), key=lambda n: n != _WEIGHTS_SHA256)
    commands = {n: _command(n, folder, recipe_name, epochs, steps, verify) for n in names}
    return [(name, str(items[name]), c) for name, c in commands.items() if c is not None]


def _command(
    name: str, folder: Path, recipe_name: str, epochs: int, steps: int, verify: Optional[str]
) -> Optional[str]:
    """Return a shell command that prints the hash or compares it, None if no command does."""
    weights = shlex.quote(str(folder / run.WEIGHTS))
    recipe = shlex.quote(recipe_name)
    if name == _WEIGHTS_SHA256:
        return f"sha256sum {weights}"
    if name.startswith("data."):
        return f"python -m reproml data --recipe {recipe}"
    if epoch := _EPOCH.fullmatch(name):
        steps = steps * int(epoch[1]) // epochs
        native = " --numerics native" * (verify is None)
        return f"python -m reproml train --recipe {recipe} --steps {steps}{native}"
    return verify


# --- plots and the template -------------------------------------------------------------------------


def plot(curves: Sequence[Curve], across: str, up: str) -> Optional[Plot]:
    """Lay out curves over one pair of axes; None if no value is below _HUGE. The vertical has 0."""
    finite = [[(x, y) for x, y in c.points if abs(x) < _HUGE and abs(y) < _HUGE] for c in curves]
    everything = [point for points in finite for point in points]
    if not everything:
        return None
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = min(0.0, *(y for _, y in everything)), max(y for _, y in everything)
    y_ticks = ticks(low, high if high > low else low + 1)
    low, high = y_ticks[0], y_ticks[-1]
    x_ticks = [left, *(t for t in ticks(left, right) if left < t <= right)]
    width, height = Plot.width - Plot.left - 2 * Plot.pad, Plot.height - Plot.bottom - Plot.pad

    def at_x(x: float) -> str:
        fraction = (x - left) / (right - left) if right > left else 0.5
        return f"{Plot.left + Plot.pad + width * fraction:.1f}"

    def at_y(y: float) -> str:
        return f"{Plot.pad + height * (high - y) / (high - low):.1f}"

    def at(x: float, y: float) -> tuple[str, str, str]:
        return at_x(x), at_y(y), f"{across} {x:g}: {y!r}"

    ranges = [
        f"{c.name}, from {p[0][1]:.4g} to {p[-1][1]:.4g}" for c, p in zip(curves, finite) if p
    ]
    return Plot(
        across,
        f"{up} by {across}: " + "; ".join(ranges),
        [(at_y(t), f"{t:g}") for t in y_ticks],
        [(at_x(t), f"{t:g}") for t in x_ticks if t == int(t)],  # steps and epochs are integers
        [(curve, [at(*point) for point in points]) for curve, points in zip(curves, finite)],
    )


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that enclose both."""
    raw = max((high - low or 1.0) / 4, _TINY)
    digits = math.floor(math.log10(raw))
    power = 10.0**digits
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [
        round(k * step, 12 - digits)
        for k in range(math.floor(low / step), math.ceil(high / step) + 1)
    ]


_TEMPLATE = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
).get_template("report.html")
