"""One page for a run, to send to a reviewer: report.html filled in, with nothing to be loaded.

    page = build(Path("runs/mnist-mlp"), "mnist-mlp")   # the verdict is found out anew
    save(page.html, Path("runs/mnist-mlp.html"))

Whatever stands on the page follows from the run folder, the data and the golden file, and from the run or
trace that it is compared with. Each text is escaped where it is put in (`_text`); a function that ends in
`_section` returns HTML.
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
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from reproml import doctor
from reproml.arithmetic.context import exact
from reproml.diff import compare
from reproml.diff.compare import Divergence
from reproml.errors import ReproError
from reproml.files import write_atomically
from reproml.pipeline import golden, run
from reproml.pipeline.data import Dataset, Split
from reproml.pipeline.golden import Comparison
from reproml.pipeline.recipe import Recipe, load_recipe
from reproml.pipeline.run import Items, Number
from reproml.pipeline.train import step_count
from reproml.tracing.chain import Reader

_TEMPLATE = Path(__file__).parent / "report.html"
_OF_WEIGHTS = f"{run.WEIGHTS}.sha256"  # the one that says it all: first on the page
_EPOCH = re.compile(r"epoch\.([0-9]{1,9})\..+")  # a run's own metrics.json may say anything else
_BATCH = 1024  # bounds the memory
_MOST_WRONG = 12  # images
_MISTAKES = 8  # pairs of classes


@dataclass(frozen=True)
class Page:
    """The page, and whether the run is that of the golden file: None if there is none."""

    html: str
    verified: Optional[bool]
    differs: bool = False  # from the run or trace it was compared with, if it was
    compared: str = ""  # in one line, what came of that


@dataclass(frozen=True)
class Verdict:
    """A run against its golden file."""

    golden: Optional[Path]  # None: there is none
    comparisons: list[Comparison]

    @property
    def differing(self) -> list[Comparison]:
        return [c for c in self.comparisons if not c.match]

    @property
    def verified(self) -> Optional[bool]:
        """False if anything differs, the run's own metrics.json included; None: nothing to compare."""
        return False if self.differing else None if self.golden is None else True


def build(
    folder: Path,
    recipe_name: str = "mnist-mlp",
    data_folder: Optional[Path] = None,
    other: Optional[Path] = None,
) -> Page:
    """Return the page of a run.

    recipe_name: name or path, as on the command line. other: a run folder or a trace, to tell where the
    two part. Raises ReproError if the folder is no whole run of the recipe, or the golden file or the
    other one no good.
    """
    recipe = load_recipe(recipe_name)
    record = run.read_record(folder)
    numerics = "native" if record.get("numerics") == "native" else "exact"
    divergence = _compare(folder, other) if other else None
    compared = compare.headline(divergence, str(folder), str(other)) if other else ""
    dataset, prepared, _ = run.prepare(recipe, data_folder, numerics)
    model, _, sha256 = run.load_run_model(folder, recipe, prepared, numerics)
    if numerics == "native":
        run.refuse_damaged(folder, sha256)
        found = {**run.read_items(folder / run.METRICS), **run.score(model, prepared, "exact")}
        verdict = Verdict(None, [])
    else:
        found, recorded = run.recompute(folder, recipe, data_folder)
        verdict = _verdict(folder, recipe, found, recorded)
    probabilities = predict(model, prepared.test.x)
    steps = step_count(recipe, len(dataset.train.labels))
    sections = [
        _verdict_section(verdict, recipe_name, numerics),
        _divergence_section(divergence, compared) if other else "",
        _figures_section(found, record, model, folder),
        _training_section(_losses(found), _step_losses(folder)),
        _confusion_section(dataset.test.labels, probabilities.argmax(1), dataset.classes),
        _most_wrong_section(dataset, probabilities),
        _recipe_section(record),
        _environment_section(record),
        _hashes_section(found, folder, recipe_name, recipe.train.epochs, steps, numerics),
    ]
    html = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_text(f"{recipe.name}: report of a run"),
        name=_text(recipe.name),
        about=_about(folder, record),
        sections="\n".join(section for section in sections if section),
        footer=_text(
            f"Written by reproml {doctor.here()['versions.reproml']} from {folder}. "
            "The page is whole in itself: it loads nothing."
        ),
    )
    return Page(html, verdict.verified, divergence is not None, compared)


def save(html: str, path: Path) -> None:
    """Write the page, whole or not at all; an older one is replaced. Raises ReproError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, html.encode())
    except OSError as error:
        raise ReproError(f"cannot write the report {path}: {error.strerror}") from None


def predict(model: torch.nn.Module, x: NDArray[Any]) -> NDArray[np.float32]:
    """Return the probability of each class, float32 [n, classes], of x float32 [n, h, w].

    In exact arithmetic, so that the most wrong images are the same on any machine.
    """
    model.eval()
    with exact(), torch.no_grad():
        parts = [
            torch.softmax(model(torch.from_numpy(x[start : start + _BATCH])), 1).numpy()
            for start in range(0, len(x), _BATCH)
        ]
    return np.concatenate(parts)


def most_wrong(labels: NDArray[Any], probabilities: NDArray[Any], count: int) -> list[int]:
    """Return the images whose wrong prediction has the largest probability, the surest mistake first."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    sure = probabilities[wrong, predicted[wrong]]
    return [int(i) for i in wrong[np.argsort(-sure, kind="stable")][:count]]


def confusion(labels: NDArray[Any], predicted: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Return how often each label (row) was predicted as each class (column): int64 [classes, classes]."""
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def png(grey: NDArray[np.uint8]) -> bytes:
    """Return a PNG of grey levels, uint8 [h, w]: not compressed, so the same with any zlib."""

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


# --- what is known of the run ---------------------------------------------------------------------


def _verdict(folder: Path, recipe: Recipe, found: Items, recorded: Items) -> Verdict:
    try:
        path = golden.find_golden(recipe.name)
    except ReproError:
        return Verdict(None, golden.compare_run(found, found, recorded, folder))
    return Verdict(path, golden.compare_run(golden.read_golden(path), found, recorded, folder))


def _losses(items: Items) -> list[float]:
    """The mean loss of each epoch; NaN where it was not finite, or the run records no number."""
    return [
        float(value) if isinstance(value, (Number, int, float)) else math.nan
        for name, value in items.items()
        if _EPOCH.fullmatch(name) and name.endswith(".loss")
    ]


def _step_losses(folder: Path) -> list[float]:
    """The loss of each step, if the run was traced step by step."""
    if not (folder / run.TRACE).is_file():
        return []
    entries = Reader(folder / run.TRACE)
    return [float(loss) for e in entries if e["entry"] == "step" for loss in e["loss"][:1]]


def _compare(folder: Path, other: Path) -> Optional[Divergence]:
    """Compare the run with another one, or its trace with another."""
    if other.is_dir():
        return compare.compare(folder, other)
    if not (folder / run.TRACE).is_file():
        raise ReproError(
            f"{folder} has no {run.TRACE} to compare with {other}; name a run folder, or train again "
            'with trace = "step" in the recipe'
        )
    return compare.compare(folder / run.TRACE, other)


def _seconds(record: dict[str, Any], start: str, end: str) -> Optional[int]:
    try:
        times = [datetime.fromisoformat(record["times"][name]) for name in (start, end)]
    except (KeyError, TypeError, ValueError):  # written by hand
        return None
    return int((times[1] - times[0]).total_seconds())


# --- the sections ---------------------------------------------------------------------------------


def _about(folder: Path, record: dict[str, Any]) -> str:
    facts = doctor.facts(record)
    started = record["times"].get("started", "") if isinstance(record.get("times"), dict) else ""
    when = f"trained {str(started)[:16].replace('T', ' ')} UTC" if started else "trained"
    return (
        f"{_code(str(folder))}, {_text(when)} on {_text(facts.get('machine.cpu', 'unknown'))} with "
        f"PyTorch {_text(facts.get('versions.torch', 'unknown'))}"
    )


def _verdict_section(verdict: Verdict, recipe_name: str, numerics: str) -> str:
    all_, differing = len(verdict.comparisons), verdict.differing
    of = verdict.golden or Path(run.METRICS)
    if differing:
        kind, title = "bad", "Not the golden run" if verdict.golden else "Not what the run recorded"
        said = (
            f"{len(differing)} of {all_} items differ from {_code(str(of))}; "
            f"the first, in the pipeline’s order, is {_code(differing[0].item)}."
        )
    elif verdict.golden:
        kind, title = "good", "Verified"
        said = f"All {all_} items are those of {_code(str(of))}, to the last bit."
    elif numerics == "native":
        kind, title = "none", "Native numerics: no golden file"
        drift = _code(f"python -m reproml matrix --recipe {recipe_name}")
        said = f"What the training comes to depends on the machine: {drift} shows how."
    else:
        kind, title = "none", "No golden file to compare with"
        said = f"{_code(f'python -m reproml golden --recipe {recipe_name}')} writes one."
    how = (
        "Whatever follows from recipe, data and weights was computed anew for this page; the losses, and "
        "the weights after all but the last epoch, are what the run recorded."
    )
    if numerics == "native":
        how = (
            "The weights file has the SHA-256 that the run recorded. It was evaluated anew for this page "
            "in exact arithmetic; all that is said of the training is what the run recorded."
        )
    rows = [[_code(c.item), _code(c.expected), _code(c.found)] for c in differing]
    table = _table(["item", "expected", "found"], rows, "differing") if differing else ""
    return (
        f'<div class="verdict {kind}"><p><strong>{_text(title)}</strong></p>\n'
        f'<p>{said}</p><p class="quiet">{how}</p></div>\n{table}'
    )


def _figures_section(
    items: Items, record: dict[str, Any], model: torch.nn.Module, folder: Path
) -> str:
    def accuracy(part: str) -> tuple[str, str]:
        correct, total = int(str(items[f"{part}.correct"])), int(str(items[f"{part}.total"]))
        of = "test set" if part == "test" else "training set"
        return f"{100 * correct / total:.2f} %", f"right in the {of}: {correct:,} of {total:,}"

    losses = _losses(items)
    figures = [accuracy("test"), accuracy("train")]
    if losses:
        figures.append((f"{losses[-1]:.4f}", "mean loss in the last epoch"))
    parameters = sum(p.numel() for p in model.parameters())
    figures.append((f"{parameters:,}", "parameters"))
    figures.append((f"{(folder / run.WEIGHTS).stat().st_size:,}", "bytes of weights"))
    seconds = _seconds(record, "data_ready", "trained")
    if seconds is not None:
        figures.append((f"{seconds:,} s", "of training"))
    listed = "".join(
        f"<div><dt>{_text(what)}</dt><dd>{_text(value)}</dd></div>\n" for value, what in figures
    )
    return f'<dl class="figures">\n{listed}</dl>'


def _training_section(losses: list[float], step_losses: Sequence[float]) -> str:
    epochs = len(losses)
    curves = [_Curve([(i + 1.0, y) for i, y in enumerate(losses)], "each epoch", dots=True)]
    if step_losses:
        each = epochs / len(step_losses) if epochs else 1.0
        points = [((i + 1) * each, y) for i, y in enumerate(step_losses)]
        curves.insert(0, _Curve(points, "each step", faint=True))
    caption = "Mean loss over the samples of each epoch" + ", and the loss of each step" * bool(
        step_losses
    )
    plot = _plot(curves, "epoch", "loss")
    rows = [[str(i), _text(repr(loss))] for i, loss in enumerate(losses, 1)]
    return (
        '<section><h2>Training</h2><div class="beside">\n'
        f"<figure>{plot}<figcaption>{caption}.</figcaption></figure>\n"
        f"{_table(['epoch', 'mean loss'], rows, '')}</div></section>"
    )


def _confusion_section(labels: NDArray[Any], predicted: NDArray[Any], classes: int) -> str:
    counts = confusion(labels, predicted, classes).tolist()
    most = {True: 1, False: 1}  # on the diagonal, beside it
    for i, j in np.ndindex(classes, classes):
        most[i == j] = max(most[i == j], counts[i][j])

    def cell(i: int, j: int, n: int) -> str:
        share = f"{8 + 32 * math.sqrt(n / most[i == j]):.0f}%" if n else "0%"
        kind = "right" if i == j else "wrong"
        return f'<td class="{kind}{"" if n else " zero"}" style="--share: {share}">{n or "·"}</td>'

    head = "".join(f'<th scope="col">{j}</th>' for j in range(classes))
    body = "\n".join(
        f'<tr><th scope="row">{i}</th>{"".join(cell(i, j, n) for j, n in enumerate(row))}</tr>'
        for i, row in enumerate(counts)
    )
    wrong = int((labels != predicted).sum())
    mistakes = [(counts[i][j], i, j) for i, j in np.ndindex(classes, classes) if i != j]
    mistakes = [m for m in sorted(mistakes, key=lambda m: -m[0]) if m[0]][:_MISTAKES]
    rows = [[str(i), str(j), f"{n:,}"] for n, i, j in mistakes]
    often = _table(["label", "predicted", "times"], rows, "", "The most frequent mistakes")
    return (
        f"<section><h2>Confusion</h2>\n<p>{wrong:,} of {len(labels):,} test images got another class than "
        "their label. Rows are labels, columns predictions; the shade grows with the count.</p>\n"
        '<div class="beside wide-first">'
        f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table>\n{often if rows else ''}</div></section>"
    )


def _most_wrong_section(dataset: Dataset, probabilities: NDArray[Any]) -> str:
    test: Split = dataset.test
    chosen = most_wrong(test.labels, probabilities, _MOST_WRONG)
    if not chosen:
        return "<section><h2>Most wrong</h2><p>Not one test image got a wrong class.</p></section>"

    def figure(i: int) -> str:
        levels = test.images[i].astype(np.int64) * 255 // (dataset.levels - 1)
        image = base64.b64encode(png((255 - levels).astype(np.uint8))).decode()  # ink on paper
        label, predicted = int(test.labels[i]), int(probabilities[i].argmax())
        sure = f"{float(probabilities[i, predicted]):.6f}"
        return (
            f'<li><figure><img src="data:image/png;base64,{image}" '
            f'alt="Test image {i}: label {label}, predicted {predicted}">'
            f"<figcaption><strong>{label}, predicted {predicted}</strong><br>"
            f"p = {sure}<br>image {i}</figcaption></figure></li>"
        )

    return (
        "<section><h2>Most wrong</h2>\n<p>The test images whose wrong class has the largest probability p, "
        "by an exact softmax: the same images, in the same order, on any machine.</p>\n"
        f'<ul class="digits">{"".join(map(figure, chosen))}</ul></section>'
    )


def _recipe_section(record: dict[str, Any]) -> str:
    rows = [[_name(name), _code(value)] for name, value in _flat("", record.get("recipe", {}))]
    return f"<section><h2>Recipe</h2>\n{_table(['setting', 'value'], rows, 'facts')}</section>"


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(value, dict):
        yield prefix, _plain(value)
        return
    for name, inner in value.items():
        yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value) if isinstance(value, str) else json.dumps(value)


def _environment_section(record: dict[str, Any]) -> str:
    groups: dict[str, list[list[str]]] = {}
    for fact, value in doctor.facts(record).items():
        group, _, name = fact.partition(".")
        shown = _name(name) if group == "variables" else _text(name.replace("_", " "))
        groups.setdefault(group, []).append([shown, _code(value)])
    tables = "\n".join(
        _table(["fact", "value"], rows, "facts", caption=group) for group, rows in groups.items()
    )
    return (
        "<section><h2>Environment</h2>\n<p>Where the run was made. Of an exact run, none of it may change "
        f'a bit.</p>\n<div class="columns">{tables}</div></section>'
    )


def _hashes_section(
    items: Items, folder: Path, recipe_name: str, epochs: int, steps: int, numerics: str
) -> str:
    entries = []
    for name, value in sorted(items.items(), key=lambda item: item[0] != _OF_WEIGHTS):
        if name.endswith(".sha256"):
            command = _command(name, folder, recipe_name, epochs, steps, numerics)
            if command is None:
                continue
            entries.append(
                f'<div class="hash"><h3>{_name(name)}</h3>\n'
                f"{_copied(str(value), f'the hash {name}', 'value')}\n"
                f"{_copied(command, f'the command that checks {name}', 'command')}</div>"
            )
    return (
        "<section><h2>Hashes</h2>\n<p>Each with the command that comes to it or checks it.</p>\n"
        f"{''.join(entries)}</section>"
    )


def _command(
    name: str, folder: Path, recipe_name: str, epochs: int, steps: int, numerics: str
) -> Optional[str]:
    """Return one line of a shell that prints the hash, or compares it; None if there is none."""
    weights = shlex.quote(str(folder / run.WEIGHTS))
    recipe = shlex.quote(recipe_name)
    if name == _OF_WEIGHTS:
        return f"sha256sum {weights}"
    if name.startswith("data."):
        return f"python -m reproml data --recipe {recipe}"
    if epoch := _EPOCH.fullmatch(name):
        steps = steps * int(epoch[1]) // epochs
        native = " --numerics native" * (numerics == "native")
        return f"python -m reproml train --recipe {recipe} --steps {steps}{native}"
    if numerics == "native":
        return None  # has no golden file
    return f"python -m reproml verify --recipe {recipe} --run {shlex.quote(str(folder))}"


def _divergence_section(found: Optional[Divergence], compared: str) -> str:
    if found is None:
        return f"<section><h2>Comparison</h2>\n<p>{_text(compared)}</p></section>"
    facts = [*compare.facts(found), ("likely cause", found.cause[1])]
    table = _table(["fact", "value"], [[_text(name), _code(text)] for name, text in facts], "facts")
    figure = ""
    if any(ulps for _, ulps in found.growth):
        curve = _Curve([(step, math.log2(1 + ulps)) for step, ulps in found.growth], "difference")
        said = "The largest distance of eight of the last layer’s weights after each step, in ulps."
        plot = _plot([curve], "step", "log2(1 + ulps)")
        figure = f"<figure>{plot}<figcaption>{said} Shown: log2(1 + ulps).</figcaption></figure>"
    return (
        f"<section><h2>First divergence</h2>\n<p>{_text(compared)}</p>\n"
        f'<div class="beside">\n{table}{figure}</div></section>'
    )


# --- HTML and SVG ---------------------------------------------------------------------------------


def _text(text: str) -> str:
    return escape(text, quote=True)


def _name(text: str) -> str:
    """A dotted name, which may break after a dot or an underscore."""
    return _text(text).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _table(head: list[str], rows: list[list[str]], kind: str, caption: str = "") -> str:
    """A table of HTML cells, the first of each row its header."""
    titles = "".join(f'<th scope="col">{_text(title)}</th>' for title in head)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    shown = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<table class="{kind}">{shown}<thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table>'


def _copied(text: str, what: str, kind: str) -> str:
    """The text and the button that copies it; the script takes the element before the button."""
    return (
        f'<div class="copied"><code class="{kind}">{_text(text)}</code>'
        f'<button type="button" aria-label="Copy {_text(what)}">Copy</button></div>'
    )


@dataclass(frozen=True)
class _Curve:
    points: Sequence[tuple[float, float]]  # those that are not finite are left out
    name: str
    dots: bool = False
    faint: bool = False


_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _PAD = 480, 240, 44, 40, 12  # of the drawing; the page scales it


def _plot(curves: Sequence[_Curve], across: str, up: str) -> str:
    """An SVG of curves over one pair of axes, both from 0 on or from the least value if that is below."""
    finite = [
        [(x, y) for x, y in c.points if math.isfinite(x) and math.isfinite(y)] for c in curves
    ]
    everything = [point for points in finite for point in points]
    if not everything:
        return "<p>No value is finite.</p>"
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    span = right - left
    low, high = min(0.0, *(y for _, y in everything)), max(y for _, y in everything)
    ticks = _ticks(low, high if high > low else low + 1)
    low, high = ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[str, str]:
        return (
            f"{_LEFT + _PAD + (_WIDTH - _LEFT - 2 * _PAD) * ((x - left) / span if span else 0.5):.1f}",
            f"{_PAD + (_HEIGHT - _BOTTOM - _PAD) * (high - y) / (high - low):.1f}",
        )

    lines = []
    for tick in ticks:
        _, y = at(left, tick)
        lines.append(f'<line class="axis" x1="{_LEFT}" y1="{y}" x2="{_WIDTH}" y2="{y}"/>')
        lines.append(
            f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end" dominant-baseline="middle">{tick:g}</text>'
        )
    across_ticks = [left, *(t for t in _ticks(left, right) if left < t <= right)]
    for tick in (t for t in across_ticks if t == int(t)):  # steps and epochs are whole
        x, _ = at(tick, low)
        lines.append(f'<text x="{x}" y="{_HEIGHT - 18}" text-anchor="middle">{tick:g}</text>')
    for curve, points in zip(curves, finite):
        joined = " ".join(",".join(at(*point)) for point in points)
        lines.append(f'<polyline class="curve{" faint" * curve.faint}" points="{joined}"/>')
        for point in points if curve.dots else ():
            cx, cy = at(*point)
            title = f"{across} {point[0]:g}: {point[1]!r}"
            lines.append(f'<circle cx="{cx}" cy="{cy}" r="3"><title>{title}</title></circle>')
    lines.append(f'<text x="{_WIDTH}" y="{_HEIGHT}" text-anchor="end">{_text(across)}</text>')
    label = f"{up} by {across}: " + "; ".join(
        f"{c.name}, from {p[0][1]:.4g} to {p[-1][1]:.4g}" for c, p in zip(curves, finite) if p
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)}">\n'
        + "\n".join(lines)
        + "\n</svg>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose both."""
    raw = (high - low or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    return [round(k * step, 12) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
