"""Run a recipe, and read and write the folder that a run leaves behind.

    weights.safetensors   the final weights
    metrics.json          every item of a golden file, under the same names
    run.json              what was run: recipe, versions, machine, times
    provenance.json       a statement of all this for others, with digests (docs/provenance.md)
    log.txt               the lines that were printed
    trace.jsonl           a record of each step, if the recipe asks for one (docs/trace.md)
    model.sig             a signature, if the run was signed (docs/signatures.md)

The folder appears complete or not at all: it is written under another name beside it and then renamed.
Only one process at a time can write it.
"""

from __future__ import annotations

import codecs
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
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from reproml import distributed, environment
from reproml.digest import digest, file_sha256
from reproml.errors import ReproError
from reproml.evidence import provenance
from reproml.evidence.provenance import PROVENANCE
from reproml.files import locked, partial_path, read_regular, sync_folder, write_and_sync
from reproml.pipeline.checkpoint import Checkpoint, Checkpoints, TraceHead
from reproml.pipeline.data import Dataset, load_dataset
from reproml.pipeline.device import CPU
from reproml.pipeline.evaluate import evaluate
from reproml.pipeline.preprocess import Prepared, preprocess
from reproml.pipeline.recipe import Recipe, recipe_values
from reproml.pipeline.train import SILENT, Output, Trained, Training, dtypes_and_shapes, train
from reproml.tracing import trace as start_trace
from reproml.tracing.chain import last_head
from reproml.versions import DEFINITIONS

if TYPE_CHECKING:
    from reproml.tracing.recorder import Recorder

# Name of each item and its value, in the order of the pipeline: the first one that differs is the cause.
Items = dict[str, Union[str, int, float, None]]


class Number(str):
    """A number of a JSON file, as the digits that are written there; its type differs from a string's."""


class _Record(msgspec.Struct):
    """The part of run.json that is decoded to types."""

    recipe: Recipe


WEIGHTS, METRICS, RUN, LOG = provenance.RESULT, "metrics.json", "run.json", "log.txt"
TRACE, SIGNATURE = "trace.jsonl", "model.sig"
_FILES = {WEIGHTS, METRICS, RUN, LOG}
_OPTIONAL_FILES = {TRACE, SIGNATURE, PROVENANCE}  # earlier runs have no provenance
_WEIGHTS_SHA256 = "weights.safetensors.sha256"  # the item


@dataclass(frozen=True)
class Run:
    """A finished run, not yet on disk."""

    items: Items
    weights: bytes  # content of weights.safetensors
    record: dict[str, Any]  # content of run.json
    log: list[str]
    dependencies: list[provenance.Descriptor]  # of provenance.json: data, source and lock
    trace: Optional[Path] = None  # a file to copy into the folder as trace.jsonl
    builder: Optional[str] = None  # the name of the machine in provenance.json


@dataclass(frozen=True)
class Recording:
    """What a training writes on its way: checkpoints that it can resume from, and a trace."""

    checkpoints: Optional[Checkpoints] = None
    trace: Optional[Path] = None

    @property
    def start(self) -> Optional[Checkpoint]:
        """The checkpoint that the training resumes from."""
        return self.checkpoints.start if self.checkpoints else None

    def saving(self, log: list[str], recorder: Optional[Recorder]) -> Callable[[Training], None]:
        """Return the function to call after each step: it saves a checkpoint when one is due."""
        if self.checkpoints is None:
            return lambda training: None
        return functools.partial(self.checkpoints.save, log=log, recorder=recorder)


NOTHING_RECORDED = Recording()


class _Log:
    """The lines of log.txt, each with its time. A resumed run continues those of its checkpoint."""

    def __init__(self, output: Output, start: Optional[Checkpoint]) -> None:
        self.lines = list(start.head.log) if start else []
        self._output = output

    def __call__(self, line: str) -> None:
        self.lines.append(f"{_now()} {line}")
        self._output.log(line)


def perform(
    recipe: Recipe,
    data_folder: Optional[Path] = None,
    numerics: str = "exact",
    output: Output = SILENT,
    recording: Recording = NOTHING_RECORDED,
    device: torch.device = CPU,
    micro_batch: Optional[int] = None,
) -> Run:
    """Run the complete recipe in memory: data, preprocessing, training, evaluation.

    With checkpoints in `recording`, the training resumes from their `start` and saves new ones. Its trace
    covers the training from the beginning, so a resumed training continues the same file. The model is
    trained and evaluated on `device`, with `micro_batch` rows at a time.
    """
    start = recording.start
    times = {"started": _now()}
    source = provenance.source_dependencies()
    log = _Log(output, start)
    resumed = f", from the checkpoint of step {start.head.step} on" if start else ""
    on_device = "" if device == CPU else f" on {device}"
    in_parts = f", micro-batches of {micro_batch}" if micro_batch else ""
    log(f"{recipe.name}: {numerics} numerics{on_device}{in_parts}{resumed}")
    dataset, prepared, items = prepare(recipe, data_folder, numerics)
    times["resumed" if start else "data_ready"] = _now()  # what follows is only the rest if resumed

    head = _trace_head(recording, log)
    state = start.state if start else None
    job = recipe, numerics, None, state  # what the other workers of torchrun need to know
    traced = trace_training(recording.trace, recipe, numerics, dataset, device, head)
    with distributed.joined(recipe.train.batch_size, job, device), traced as recorder:
        save, output = recording.saving(log.lines, recorder), output._replace(log=log)
        trained = train(recipe, prepared, numerics, None, output, state, save, device, micro_batch)
    times["trained"] = _now()
    weights: bytes = safetensors.torch.save(trained.model.state_dict())

    items.update(_training_items(trained, weights))
    items.update(score(trained.model, recipe, prepared, numerics, log))
    times["finished"] = _now()
    record = _record(recipe, numerics, dataset, device, times)
    data = [
        provenance.describe(name, {"sha256": sha256}, kind=provenance.DATA)
        for name, sha256 in sorted(dataset.hashes.items())
    ]
    return Run(items, weights, record, log.lines, [*data, *source])


def _trace_head(recording: Recording, log: Callable[[str], None]) -> Optional[TraceHead]:
    """Return the position from which the trace continues, None if it begins or if there is none."""
    start = recording.start
    if start and recording.trace and not start.head.trace:
        raise ReproError(
            f"{start.path} is from a training without a trace, so a trace cannot resume there; "
            "leave out --trace, or delete the checkpoints to train from scratch"
        )
    if start and start.head.trace and not recording.trace:
        log("no longer traced, as --trace is left out")
    return start.head.trace if start else None


def _training_items(trained: Trained, weights: bytes) -> Items:
    items: Items = {"initial.state_dict.sha256": trained.initial_state_dict_sha256}
    width = len(str(len(trained.epochs)))  # 01 ... 10, so that sorted names are in order
    for number, epoch in enumerate(trained.epochs, 1):
        items[f"epoch.{number:0{width}}.loss"] = epoch.loss
        items[f"epoch.{number:0{width}}.state_dict.sha256"] = epoch.state_dict_sha256
    items[_WEIGHTS_SHA256] = hashlib.sha256(weights).hexdigest()
    return items


def _record(
    recipe: Recipe,
    numerics: str,
    dataset: Dataset,
    device: torch.device,
    times: dict[str, str],
) -> dict[str, Any]:
    """Return the content of run.json."""
    return {
        **_about(recipe, numerics, dataset, device),
        "definitions.version": DEFINITIONS,
        "times": times,
        **environment.describe(),
    }


def _about(recipe: Recipe, numerics: str, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """Return what run.json and the header of a trace both record about a training."""
    return {
        "recipe": recipe_values(recipe),
        "recipe.sha256": recipe.sha256,
        "numerics": numerics,
        "device": str(device),
        "data.sha256": dataset.hashes,
    }


def trace_training(
    path: Optional[Path],
    recipe: Recipe,
    numerics: str,
    dataset: Dataset,
    device: torch.device = CPU,
    head: Optional[TraceHead] = None,
) -> AbstractContextManager[Optional[Recorder]]:
    """Return a context in which a training is recorded at the recipe's level, or not without a path.

    With a checkpoint's `head`, the trace that exists is continued from there.
    """
    if path is None:
        return nullcontext()
    resume = msgspec.to_builtins(head) if head else None
    return start_trace(
        path, recipe.trace or "step", resume, _about(recipe, numerics, dataset, device)
    )


def prepare(
    recipe: Recipe, data_folder: Optional[Path], numerics: str
) -> tuple[Dataset, Prepared, Items]:
    """Load and preprocess the recipe's data; return them and the items known before training."""
    dataset = load_dataset(recipe.data.name, data_folder)
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
    recipe: Recipe,
    prepared: Prepared,
    numerics: str,
    log: Callable[[str], None] = SILENT.log,
) -> Items:
    """Evaluate the model on the training and the test set; return the items of both."""
    items: Items = {}
    for split, (x, y) in {"train": prepared.train, "test": prepared.test}.items():
        result = evaluate(model, x, y, numerics, recipe.precision)
        log(f"{split}: {result}")
        items[f"{split}.correct"] = result.correct
        items[f"{split}.total"] = result.total
        items[f"{split}.predictions.int64le.sha256"] = result.predictions_sha256
    return items


def load_run_model(
    folder: Path, recipe: Recipe, prepared: Prepared, numerics: str, device: torch.device = CPU
) -> tuple[nn.Module, str, str]:
    """Return a run's model, the digest of its initial weights, and the SHA-256 of its weights file.

    Raises ReproError if the folder is not a complete run of this recipe in these numerics.
    """
    record = read_record(folder)
    if record.get("recipe.sha256") != recipe.sha256:
        raise ReproError(
            f"{folder} is a run of another recipe than {recipe.name}, according to its {RUN} "
            "(recipe.sha256); name the right one with --recipe"
        )
    if record.get("numerics") != numerics:
        raise ReproError(
            f"{folder} is not a run in {numerics} numerics, according to its {RUN}; evaluate it with "
            "--numerics, or name another with --run"
        )
    path = _file_in(folder, WEIGHTS)
    raw = _read_bytes(path)
    try:
        tensors = safetensors.torch.load(raw)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ReproError(
            f"{path} is truncated or not a safetensors file ({error}); train again"
        ) from None
    untrained = train(recipe, prepared, numerics, steps=0, device=device)
    if dtypes_and_shapes(tensors) != dtypes_and_shapes(untrained.model.state_dict()):
        raise ReproError(f"{path} has other tensors than a model of {recipe.name}; train again")
    untrained.model.load_state_dict(tensors)
    return untrained.model, untrained.initial_state_dict_sha256, hashlib.sha256(raw).hexdigest()


def refuse_damaged(folder: Path, weights_sha256: str) -> None:
    """Raise ReproError if the run's weights file is not the one that its metrics.json records."""
    recorded = read_items(_file_in(folder, METRICS)).get(_WEIGHTS_SHA256)
    if recorded != weights_sha256:
        raise ReproError(
            f"{folder / WEIGHTS} is damaged: its SHA-256 is {weights_sha256}, "
            f"not {recorded} as in {METRICS}; train again"
        )


def read_undamaged(folder: Path) -> tuple[dict[str, Any], Items]:
    """Return what a run's run.json and metrics.json record, if its weights file is the one they record."""
    record, items = read_record(folder), read_items(_file_in(folder, METRICS))
    refuse_damaged(folder, hashlib.sha256(_read_bytes(_file_in(folder, WEIGHTS))).hexdigest())
    return record, items


def recorded_recipe(folder: Path) -> Recipe:
    """Return the recipe that is recorded in a run folder's run.json."""
    path = _file_in(folder, RUN)
    try:
        return msgspec.json.decode(
            _read_bytes(path).removeprefix(codecs.BOM_UTF8), type=_Record
        ).recipe
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ReproError(
            f"{path} does not record a valid recipe ({error}); name it with --recipe"
        ) from None


def finished_items(folder: Path, recipe: Recipe, numerics: str) -> Optional[Items]:
    """Return the items of a folder that is a complete run of this recipe, None if it is not one."""
    if not folder.is_dir() or not _is_complete(folder):
        return None
    record = read_record(folder)
    expected = {
        "recipe.sha256": recipe.sha256,
        "numerics": numerics,
        "definitions.version": str(DEFINITIONS),
    }
    if {name: record.get(name) for name in expected} != expected:
        return None
    refuse_damaged(folder, hashlib.sha256(_read_bytes(folder / WEIGHTS)).hexdigest())
    try:
        items: Items = json.loads(_read_bytes(folder / METRICS))
    except ValueError as error:  # a number of thousands of digits, which `read_items` keeps as text
        raise ReproError(f"{folder / METRICS} cannot be read: {error}; train again") from None
    return items


def recompute(
    folder: Path,
    recipe: Recipe,
    data_folder: Optional[Path] = None,
    device: torch.device = CPU,
) -> tuple[Items, Items]:
    """Return the items of an exact run on disk: (computed again, recorded in its metrics.json).

    Everything that follows from recipe, data and weights is computed again. What only the training can
    produce (losses, weights after the earlier epochs) is taken from metrics.json.
    """
    recorded = read_items(_file_in(folder, METRICS))
    _, prepared, items = prepare(recipe, data_folder, "exact")
    model, initial_sha256, file_sha256 = load_run_model(folder, recipe, prepared, "exact", device)
    items["initial.state_dict.sha256"] = initial_sha256
    items.update({name: value for name, value in recorded.items() if name.startswith("epoch.")})
    items[f"epoch.{recipe.train.epochs}.state_dict.sha256"] = digest(model)
    items[_WEIGHTS_SHA256] = file_sha256
    items.update(score(model, recipe, prepared, "exact"))
    unknown = {name: value for name, value in recorded.items() if name not in items}
    return {**items, **unknown}, recorded


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of a run's run.json, numbers as the digits that are written there."""
    return _json_object(_file_in(folder, RUN))


def read_items(path: Path) -> Items:
    """Return the items in a JSON file, numbers as the digits that are written there."""
    items = _json_object(path)
    for name, value in items.items():
        if not isinstance(value, (str, type(None))):
            raise ReproError(f"{path}: the value of {name!r} must be a string or a number")
    return items


def items_json(items: Items) -> str:
    """Return the text of a golden file or metrics.json: one item per line, sorted."""
    return json.dumps(items, indent=2, sort_keys=True) + "\n"


@contextmanager
def reserve_run_folder(out: Path) -> Iterator[Callable[[Run], None]]:
    """Reserve the run folder `out` and yield the function that writes a run there.

    Enter it before the training, so that a folder that cannot be written, or into which another process
    is training, is an error at once. An existing complete run is replaced in one step; a folder with any
    other content is refused.
    """
    out = Path(os.path.realpath(out))
    with ExitStack() as stack:
        try:
            _refuse_other_content(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out.parent / f".{out.name}.lock"))
            _delete_incomplete(out)
            part = partial_path(out)
            part.mkdir()
        except BlockingIOError:
            raise ReproError(
                f"another process is training into {out}; wait for it, or choose another folder "
                "with --out"
            ) from None
        except OSError as error:
            raise ReproError(f"cannot write the run folder {out}: {error.strerror}") from None
        writer = _Writer(part, out)
        try:
            yield writer.write
        finally:
            if not writer.unpublished:
                shutil.rmtree(part, ignore_errors=True)  # incomplete, or the run that was replaced


class _Writer:
    """Writes a run into the folder `part`, which then replaces `out`."""

    def __init__(self, part: Path, out: Path) -> None:
        self._part, self._out = part, out
        self.unpublished = False  # whether `part` is a complete run that could not be renamed

    def write(self, run: Run) -> None:
        part, out = self._part, self._out
        try:
            _write_files(part, run)
        except OSError as error:
            raise ReproError(f"cannot write the run folder {out}: {error.strerror}") from None
        try:
            _publish(part, out)
            sync_folder(out.parent)
        except (OSError, ReproError) as error:  # the training is done and must not be lost
            self.unpublished = True
            reason = error.strerror if isinstance(error, OSError) else error
            raise ReproError(f"the run is complete but stays in {part}: {reason}") from None
        _delete_copies(part, out, run)


def _write_files(part: Path, run: Run) -> None:
    contents = {
        WEIGHTS: run.weights,
        METRICS: items_json(run.items).encode(),
        RUN: (json.dumps(run.record, indent=2, sort_keys=True) + "\n").encode(),
        LOG: "".join(line + "\n" for line in run.log).encode(),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if run.trace:
        # not moved: after a kill, training resumes with it
        shutil.copyfile(run.trace, part / TRACE)
        digests[TRACE] = file_sha256(part / TRACE)
        if head := last_head(part / TRACE):
            digests["head of the trace"] = head
    contents[PROVENANCE] = _provenance(run, digests)
    for name in (WEIGHTS, METRICS, RUN, PROVENANCE, LOG):  # LOG last: then the folder is complete
        write_and_sync(part / name, contents[name])
    sync_folder(part)


def _provenance(run: Run, digests: dict[str, str]) -> bytes:
    """Return the content of provenance.json, given the SHA-256 of all other files of the folder."""
    record, recipe = run.record, dict(run.record["recipe"])
    del recipe["trace"]  # the weights do not depend on it
    byproducts = [
        provenance.describe(name, {"sha256": sha256})
        for name, sha256 in sorted(digests.items())
        if name != WEIGHTS
    ]
    return provenance.make_provenance(
        [provenance.describe(WEIGHTS, {"sha256": digests[WEIGHTS]})],
        "recipe",
        {"recipe": recipe, "numerics": record["numerics"]},
        run.dependencies,
        internal={
            "device": record["device"],
            "architecture": record["machine"]["architecture"],
        },
        builder=run.builder,
        versions=record["versions"],
        times=(record["times"]["started"], record["times"]["finished"]),
        byproducts=byproducts,
    )


def _is_complete(folder: Path) -> bool:
    return set(os.listdir(folder)) - _OPTIONAL_FILES == _FILES


def _partial_folders(out: Path) -> list[Path]:
    """Return the folders in which runs for `out` are being written, or were by killed processes."""
    paths = [out.parent / name for name in os.listdir(out.parent)]
    return [p for p in paths if p.name.startswith(f".{out.name}.partial-") and p.is_dir()]


def _delete_incomplete(out: Path) -> None:
    """Delete the incomplete folders that killed processes left; a complete one stays."""
    for path in _partial_folders(out):
        if not _is_complete(path):
            shutil.rmtree(path)


def _delete_copies(part: Path, out: Path, run: Run) -> None:
    """Delete the folders that killed processes had completed, if they hold the run now in `out`."""
    content = {WEIGHTS: run.weights, METRICS: items_json(run.items).encode()}
    with suppress(OSError):
        for path in _partial_folders(out):
            if path == part or not _is_complete(path):
                continue
            if all(read_regular(path / name) == content[name] for name in content):
                shutil.rmtree(path)


def _publish(part: Path, out: Path) -> None:
    try:
        os.rename(part, out)  # also over an empty folder, but not on Windows
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _refuse_other_content(out)
        _exchange(part, out)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders: in one step where the system can, otherwise through a third name."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2  # Linux
        at_fdcwd, rename_exchange = -100, 2
        if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
            return
    except (AttributeError, TypeError):  # TypeError on Windows, where CDLL needs the name of a file
        pass
    aside = a.with_name(a.name + "-old")
    os.rename(b, aside)
    os.rename(a, b)
    os.rename(aside, a)


def _refuse_other_content(out: Path) -> None:
    if os.path.lexists(out) and os.listdir(out) and not _is_complete(out):
        raise ReproError(f"{out} has content that is not a run; choose another folder with --out")


def _file_in(folder: Path, name: str) -> Path:
    if not folder.exists():
        raise ReproError(f"the run folder {folder} does not exist; train first, or name another")
    if not (folder / name).is_file():
        raise ReproError(f"{folder} is not a complete run: it has no {name}; train first")
    return folder / name


def _read_bytes(path: Path) -> bytes:
    try:
        return read_regular(path)
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(
            _read_bytes(path),
            parse_float=Number,
            parse_int=Number,
            parse_constant=Number,
            object_pairs_hook=_unique_keys,
        )
    except (ValueError, RecursionError) as error:
        raise ReproError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ReproError(f"{path} must be a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} occurs twice")
        value[key] = item
    return value


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
