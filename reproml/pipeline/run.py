"""A run: everything a recipe comes to, and the folder it leaves behind.

    weights.safetensors   the final weights
    metrics.json          every item that a golden file holds, under the same names
    run.json              what was run: recipe, versions, machine, times
    log.txt               what was printed
    trace.jsonl           what was done, step by step, if that was asked for (trace.py)

The folder appears whole or not at all: it is written beside its place and renamed into it. One process
at a time may do so.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Optional, Union

import msgspec
import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from reproml import distributed, environment
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.files import locked, partial, sync_folder, write
from reproml.pipeline import data
from reproml.pipeline.checkpoint import Checkpoints, TraceHead
from reproml.pipeline.data import Dataset
from reproml.pipeline.evaluate import evaluate
from reproml.pipeline.preprocess import Prepared, preprocess
from reproml.pipeline.recipe import Recipe
from reproml.pipeline.train import Training, shapes, train
from reproml.tracing import trace as start_trace
from reproml.versions import DEFINITIONS

# Name of an item: its value. The order is the pipeline's, so the first difference is the cause.
Items = dict[str, Union[str, int, float, None]]


class Number(str):
    """A number of a JSON file as it is written there, to tell it from a string."""


class _Record(msgspec.Struct):
    """What is read of run.json."""

    recipe: Recipe


WEIGHTS, METRICS, RUN, LOG = "weights.safetensors", "metrics.json", "run.json", "log.txt"
TRACE = "trace.jsonl"
_FILES = {WEIGHTS, METRICS, RUN, LOG}
_WEIGHTS_SHA256 = "weights.safetensors.sha256"  # the item


@dataclass(frozen=True)
class Run:
    """A finished run, not yet on disk."""

    items: Items
    weights: bytes  # the file weights.safetensors
    record: dict[str, Any]  # run.json
    log: list[str]
    trace: Optional[Path] = None  # a file to be copied into the folder as trace.jsonl


def perform(
    recipe: Recipe,
    data_folder: Optional[Path] = None,
    numerics: str = "exact",
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    checkpoints: Optional[Checkpoints] = None,
    trace: Optional[Path] = None,
) -> Run:
    """Run the whole recipe in memory: data, preprocessing, training, evaluation.

    With `checkpoints` the training goes on from where they begin, and saves them on its way. `trace` is
    a file to record the training in: from its beginning, so one that goes on does so in the same file.
    """
    times = {"started": _now()}
    start = checkpoints.start if checkpoints else None
    lines = list(start.head.log) if start else []

    def tell(line: str) -> None:
        lines.append(f"{_now()} {line}")
        log(line)

    def after_step(training: Training) -> None:
        if checkpoints:
            checkpoints.save(training, lines)

    since = f", from the checkpoint of step {start.head.step} on" if start else ""
    tell(f"{recipe.name}: {numerics} numerics{since}")
    dataset, prepared, items = prepare(recipe, data_folder, numerics)
    times["resumed" if start else "data_ready"] = _now()  # the rest is not the time of it all
    state = start.state if start else None
    task = recipe, numerics, None, state
    if start and trace and not start.head.trace:
        raise ReproError(
            f"{start.path} is of a training that was not traced, so no trace can go on from there; "
            "leave out --trace, or delete the checkpoints to begin anew"
        )
    if start and start.head.trace and not trace:
        tell("from here on not traced, as --trace is left out")
    traced = tracing(trace, recipe, numerics, dataset, start.head.trace if start else None)
    with distributed.joined(recipe.train.batch_size, task), traced as recorder:
        if checkpoints and recorder:
            checkpoints.trace = lambda: TraceHead(**recorder.head())
        trained = train(recipe, prepared, numerics, None, tell, progress, state, after_step)
    times["trained"] = _now()
    weights: bytes = safetensors.torch.save(trained.model.state_dict())

    items["initial.state_dict.sha256"] = trained.initial_state_dict_sha256
    width = len(str(recipe.train.epochs))  # 01 ... 10, so that sorted names are in order
    for number, epoch in enumerate(trained.epochs, 1):
        items[f"epoch.{number:0{width}}.loss"] = epoch.loss
        items[f"epoch.{number:0{width}}.state_dict.sha256"] = epoch.state_dict_sha256
    items[_WEIGHTS_SHA256] = hashlib.sha256(weights).hexdigest()
    items.update(score(trained.model, prepared, numerics, tell))
    times["finished"] = _now()
    record = {
        **_about(recipe, numerics, dataset),
        "definitions.version": DEFINITIONS,
        "times": times,
        **environment.describe(),
    }
    return Run(items, weights, record, lines)


def _about(recipe: Recipe, numerics: str, dataset: Dataset) -> dict[str, Any]:
    """What run.json and the header of a trace both tell of a training."""
    return {
        "recipe": msgspec.to_builtins(recipe),
        "recipe.sha256": recipe.sha256,
        "numerics": numerics,
        "data.sha256": dataset.hashes,
    }


def tracing(
    path: Optional[Path],
    recipe: Recipe,
    numerics: str,
    dataset: Dataset,
    head: Optional[TraceHead] = None,
) -> AbstractContextManager[Any]:
    """Return the context in which a training is recorded, at the recipe's level; none without a path.

    With a checkpoint's `head` the file that is there goes on.
    """
    if path is None:
        return nullcontext()
    resume = msgspec.to_builtins(head) if head else None
    about = _about(recipe, numerics, dataset)
    return start_trace(path, recipe.trace or "step", resume, about)


def prepare(
    recipe: Recipe, data_folder: Optional[Path], numerics: str
) -> tuple[Dataset, Prepared, Items]:
    """Load and preprocess the recipe's data; return them and the items known before training."""
    dataset = data.load(recipe.data.name, data_folder)
    prepared = preprocess(dataset, recipe.preprocess)
    items: Items = {
        "recipe.name": recipe.name,
        "recipe.canonical_json.sha256": recipe.sha256,
        "definitions.version": DEFINITIONS if numerics == "exact" else "none: native numerics",
    }
    items.update({f"data.{name}.sha256": sha256 for name, sha256 in dataset.hashes.items()})
    items["preprocessed.arrays.sha256"] = prepared.digest
    return dataset, prepared, items


def score(
    model: nn.Module,
    prepared: Prepared,
    numerics: str,
    log: Callable[[str], None] = lambda line: None,
) -> Items:
    """Return the items of an evaluation on the training and on the test set."""
    items: Items = {}
    for part, (x, y) in {"train": prepared.train, "test": prepared.test}.items():
        result = evaluate(model, x, y, numerics)
        log(f"{part}: {result}")
        items[f"{part}.correct"] = result.correct
        items[f"{part}.total"] = result.total
        items[f"{part}.predictions.int64le.sha256"] = result.predictions_sha256
    return items


def load(
    folder: Path, recipe: Recipe, prepared: Prepared, numerics: str
) -> tuple[nn.Module, str, str]:
    """Return a run's model, the digest of its initial weights, the SHA-256 of its weights file.

    Raises ReproError if the folder is no whole run of this recipe in these numerics.
    """
    record = read_record(folder)
    if record.get("recipe.sha256") != recipe.sha256:
        raise ReproError(
            f"{folder} is a run of another recipe than {recipe.name}, says its {RUN} "
            "(recipe.sha256); name the right one with --recipe"
        )
    if record.get("numerics") != numerics:
        raise ReproError(f"{folder} is not a run in {numerics} numerics, says its {RUN}")
    path = _part(folder, WEIGHTS)
    raw = _read(path)
    try:
        tensors = safetensors.torch.load(raw)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ReproError(
            f"{path} is cut short or not a safetensors file ({error}); train again"
        ) from None
    fresh = train(recipe, prepared, numerics, steps=0)
    if shapes(tensors) != shapes(fresh.model.state_dict()):
        raise ReproError(f"{path} holds other tensors than a model of {recipe.name}; train again")
    fresh.model.load_state_dict(tensors)
    return fresh.model, fresh.initial_state_dict_sha256, hashlib.sha256(raw).hexdigest()


def refuse_damaged(folder: Path, weights_sha256: str) -> None:
    """Raise ReproError if the run's weights file is not the one that its metrics.json records."""
    recorded = read_items(_part(folder, METRICS)).get(_WEIGHTS_SHA256)
    if recorded != weights_sha256:
        raise ReproError(
            f"{folder / WEIGHTS} is damaged: its SHA-256 is {weights_sha256}, "
            f"not {recorded} as in {METRICS}; train again"
        )


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe that a run folder is a run of, as its run.json has it."""
    path = _part(folder, RUN)
    try:
        return msgspec.json.decode(_read(path), type=_Record).recipe
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ReproError(
            f"{path} does not say which recipe was run ({error}); name it with --recipe"
        ) from None


def finished(folder: Path, recipe: Recipe, numerics: str) -> Optional[Items]:
    """Return the items of the run in a folder if it is a whole one of this recipe, else None."""
    if not folder.is_dir() or set(os.listdir(folder)) - {TRACE} != _FILES:
        return None
    record = read_record(folder)
    same = {
        "recipe.sha256": recipe.sha256,
        "numerics": numerics,
        "definitions.version": str(DEFINITIONS),
    }
    if {name: record.get(name) for name in same} != same:
        return None
    refuse_damaged(folder, hashlib.sha256(_read(folder / WEIGHTS)).hexdigest())
    items: Items = json.loads(_read(folder / METRICS))
    return items


def recompute(
    folder: Path, recipe: Recipe, data_folder: Optional[Path] = None
) -> tuple[Items, Items]:
    """Return the items of an exact run on disk: (as found out anew, as its metrics.json has them).

    Whatever follows from recipe, data and weights is computed anew. The trail of the training
    (losses, weights after the earlier epochs) can only be taken from metrics.json.
    """
    recorded = read_items(_part(folder, METRICS))
    _, prepared, items = prepare(recipe, data_folder, "exact")
    model, initial_sha256, file_sha256 = load(folder, recipe, prepared, "exact")
    items["initial.state_dict.sha256"] = initial_sha256
    items.update({name: value for name, value in recorded.items() if name.startswith("epoch.")})
    items[f"epoch.{recipe.train.epochs}.state_dict.sha256"] = digest(model)
    items[_WEIGHTS_SHA256] = file_sha256
    items.update(score(model, prepared, "exact"))
    unknown = {name: value for name, value in recorded.items() if name not in items}
    return {**items, **unknown}, recorded


def read_record(folder: Path) -> dict[str, Any]:
    """Return what a run's run.json says, numbers as they are written there."""
    return _json_object(_part(folder, RUN))


def read_items(path: Path) -> Items:
    """Return the items in a JSON file, numbers as they are written there: no digit is lost."""
    items = _json_object(path)
    for name, value in items.items():
        if not isinstance(value, (str, type(None))):
            raise ReproError(f"{path}: the value of {name!r} must be a string or a number")
    return items


def items_json(items: Items) -> str:
    """Return the text of a golden file or metrics.json: an item a line, sorted."""
    return json.dumps(items, indent=2, sort_keys=True) + "\n"


@contextmanager
def place(out: Path) -> Iterator[Callable[[Run], None]]:
    """Reserve the run folder `out` and yield the function that saves a run there.

    Entered before the training, so that a folder that cannot be written is found at once, or one
    that another process is training into. A whole run that is there already is replaced in one
    step; any other folder with content is refused.
    """
    out = Path(os.path.realpath(out))
    with ExitStack() as stack:
        try:
            _refuse_other_content(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out.parent / f".{out.name}.lock"))
            _delete_begun(out)
            part = partial(out)
            part.mkdir()
        except BlockingIOError:
            raise ReproError(
                f"another process is training into {out}; wait for it, or choose another folder "
                "with --out"
            ) from None
        except OSError as error:
            raise ReproError(f"cannot write the run folder {out}: {error.strerror}") from None
        kept: list[Path] = []
        try:
            yield functools.partial(_save, part, out, kept)
        finally:
            if part not in kept:
                shutil.rmtree(part, ignore_errors=True)  # begun, or the run that was replaced


def _save(part: Path, out: Path, kept: list[Path], run: Run) -> None:
    try:
        write(part / WEIGHTS, run.weights)
        write(part / METRICS, items_json(run.items).encode())
        write(part / RUN, (json.dumps(run.record, indent=2, sort_keys=True) + "\n").encode())
        if run.trace:
            shutil.copyfile(run.trace, part / TRACE)  # killed now, a training goes on in the old
        write(part / LOG, "".join(line + "\n" for line in run.log).encode())
        sync_folder(part)
    except OSError as error:
        raise ReproError(f"cannot write the run folder {out}: {error.strerror}") from None
    try:
        _publish(part, out)
        sync_folder(out.parent)
    except (OSError, ReproError) as error:  # the training is done: not to be lost
        kept.append(part)
        why = error.strerror if isinstance(error, OSError) else error
        raise ReproError(f"the run is whole but stays in {part}: {why}") from None
    _delete_copies(part, out, run)


def _partials(out: Path) -> list[tuple[Path, bool]]:
    """Return what is being written for `out`, or was by killed processes: (folder, whether it is whole)."""
    paths = [out.parent / name for name in os.listdir(out.parent)]
    found = [p for p in paths if p.name.startswith(f".{out.name}.partial-") and p.is_dir()]
    return [(path, set(os.listdir(path)) - {TRACE} == _FILES) for path in found]


def _delete_begun(out: Path) -> None:
    """Delete what killed processes had begun to write for `out`; not what has all its files."""
    for path, whole in _partials(out):
        if not whole:
            shutil.rmtree(path)


def _delete_copies(part: Path, out: Path, run: Run) -> None:
    """Delete what processes killed just before the end had whole, if it is the run that is in `out` now."""
    content = {WEIGHTS: run.weights, METRICS: items_json(run.items).encode()}
    with suppress(OSError):
        for path, whole in _partials(out):
            same = whole and all((path / name).read_bytes() == content[name] for name in content)
            if same and path != part:
                shutil.rmtree(path)


def _publish(part: Path, out: Path) -> None:
    try:
        os.rename(part, out)  # POSIX: also over an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _refuse_other_content(out)
        _exchange(part, out)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders: in one step where the system can, else by way of a third name."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2  # Linux
        at_fdcwd, rename_exchange = -100, 2
        if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
            return
    except AttributeError:
        pass
    aside = a.with_name(a.name + "-old")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)


def _refuse_other_content(out: Path) -> None:
    there = set(os.listdir(out)) if os.path.lexists(out) else set()
    if there and there - {TRACE} != _FILES:
        raise ReproError(f"{out} has content that is not a run; choose another folder with --out")


def _part(folder: Path, name: str) -> Path:
    if not folder.exists():
        raise ReproError(f"the run folder {folder} does not exist; train first, or name another")
    if not (folder / name).is_file():
        raise ReproError(f"{folder} is not a whole run: it has no {name}; train first")
    return folder / name


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(
            _read(path),
            parse_float=Number,
            parse_int=Number,
            parse_constant=Number,
            object_pairs_hook=_unique,
        )
    except (ValueError, RecursionError) as error:
        raise ReproError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ReproError(f"{path} must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} is there twice")
        value[key] = item
    return value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
