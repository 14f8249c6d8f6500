"""Save and load checkpoints, so that a training that was killed can be resumed.

    runs/NAME.checkpoints/step-STEP-SHA256.safetensors

The name of a file contains its SHA-256, which is checked when it is loaded (`sha256sum` checks it, too).
The file holds the tensors of `train.State` and, as JSON under "reproml" in its header, everything else.
It is written under another name and renamed. The last two are kept. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import msgspec
import safetensors.torch
from safetensors import SafetensorError

from reproml.errors import ReproError
from reproml.files import read_regular, sync_folder, write_atomically
from reproml.pipeline.recipe import Recipe
from reproml.pipeline.train import Epoch, State, Training
from reproml.versions import DEFINITIONS

if TYPE_CHECKING:
    from reproml.tracing.recorder import Recorder

FORMAT = 1
KEPT = 2
SUFFIX = ".checkpoints"

_NAME = re.compile(r"step-(\d{8,18})-[0-9a-f]{64}\.safetensors")
_PARTIAL = re.compile(r"\.step-.*\.partial-[0-9a-f]+")
_KEY = "reproml"  # in the file's header


class TraceHead(msgspec.Struct, frozen=True):
    """The position of a trace, as `tracing.recorder.Recorder.head` returns it."""

    entries: int
    sha256: str
    step: int
    epoch: int
    optimizers: int
    about: dict[str, Any] = {}


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Everything in a checkpoint except its tensors."""

    format: int
    recipe: Recipe
    numerics: str
    definitions: int
    every: int  # number of steps between two checkpoints
    step: int
    initial_state_dict_sha256: str
    epochs: list[Epoch]
    log: list[str]  # the lines printed so far
    trace: Optional[TraceHead] = None  # if the training is traced


class Checkpoint(NamedTuple):
    """A checkpoint that was read and checked."""

    path: Path
    head: Head
    state: State


class _DamagedError(Exception):
    """The file is not as it was written."""


class _Versions(msgspec.Struct):
    """The part of a head that is read first: other versions may have other fields."""

    format: int
    definitions: int


def checkpoint_folder(run: Path) -> Path:
    """Return the folder with the checkpoints of the run folder `run`."""
    run = Path(os.path.realpath(run))
    return run.parent / (run.name + SUFFIX)


def run_folder(folder: Path) -> Path:
    """Return the run folder, given either that folder or the one with its checkpoints."""
    return folder.with_name(folder.name[: -len(SUFFIX)]) if folder.name.endswith(SUFFIX) else folder


def latest_checkpoint(
    folder: Path, log: Callable[[str], None] = lambda line: None
) -> Optional[Checkpoint]:
    """Return the newest undamaged checkpoint of a folder, None if the folder has no checkpoint.

    `log` receives a line for each damaged one. Raises ReproError if all are damaged, or if one was made
    by another version, from which this reproml cannot resume.
    """
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            return load_checkpoint(path)
        except _DamagedError as damage:
            log(f"skipping the damaged checkpoint {path}: {damage}")
    if paths:
        raise ReproError(
            f"all checkpoints in {folder} are damaged; delete that folder to train from scratch"
        )
    return None


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first; none if the folder does not exist."""
    found = [(match, name) for name in _names_in(folder) if (match := _NAME.fullmatch(name))]
    return [folder / name for _, name in sorted(found, key=lambda f: (-int(f[0][1]), f[1]))]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, after checking the SHA-256 of the file."""
    try:
        raw = read_regular(path)
    except OSError as error:
        raise _DamagedError(f"it cannot be read: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() not in path.name:
        raise _DamagedError("its SHA-256 differs from the one in its name")
    try:
        tensors = safetensors.torch.load(raw)
        text = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"][_KEY]
        _refuse_other_versions(path, msgspec.json.decode(text, type=_Versions))
        head = msgspec.json.decode(text, type=Head)
    except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError) as error:
        raise _DamagedError(f"it is not a safetensors checkpoint: {error}") from None
    state = State(head.step, tensors, head.initial_state_dict_sha256, head.epochs)
    return Checkpoint(path, head, state)


class Checkpoints:
    """The checkpoints of a training: the one it resumes from, and a new one every `every` steps."""

    def __init__(
        self, folder: Path, recipe: Recipe, numerics: str, every: int, start: Optional[Checkpoint]
    ) -> None:
        """Raise ReproError if `start` is from another training, or if the folder cannot be written."""
        self.folder, self.recipe, self.numerics = folder, recipe, numerics
        self.every, self.start = every, start
        self._kept = [start.path] if start else []
        if start and start.head.recipe != recipe:
            raise ReproError(
                f"{folder} has checkpoints of another recipe than {recipe.name}; "
                "leave out --recipe, or train from scratch without --resume"
            )
        if start and start.head.numerics != numerics:
            raise ReproError(
                f"{folder} has checkpoints of a training in {start.head.numerics} numerics, "
                f"not {numerics}; choose with --numerics"
            )
        with self._write_errors():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            for name in filter(_PARTIAL.fullmatch, os.listdir(folder)):  # left by a kill
                (folder / name).unlink()

    def save(self, training: Training, log: list[str], recorder: Optional[Recorder] = None) -> None:
        """Save the training's state if a checkpoint is due, and delete those that are too old then."""
        if training.done % self.every:
            return
        state = training.state()
        head = Head(
            format=FORMAT,
            recipe=self.recipe,
            numerics=self.numerics,
            definitions=DEFINITIONS,
            every=self.every,
            step=state.step,
            initial_state_dict_sha256=state.initial_state_dict_sha256,
            epochs=state.epochs,
            log=log,
            trace=TraceHead(**recorder.head()) if recorder else None,
        )
        raw = safetensors.torch.save(state.tensors, {_KEY: msgspec.json.encode(head).decode()})
        path = self.folder / f"step-{state.step:08}-{hashlib.sha256(raw).hexdigest()}.safetensors"
        with self._write_errors():
            write_atomically(path, raw)
            self._kept = [*self._kept, path][-KEPT:]
            self._delete_except(self._kept)

    def delete(self) -> None:
        """Delete all checkpoints, because the run is complete. Other files in the folder stay."""
        with self._write_errors():
            self._delete_except([])
            if not os.listdir(self.folder):
                self.folder.rmdir()

    def _delete_except(self, kept: list[Path]) -> None:
        for path in reversed(checkpoint_paths(self.folder)):  # the newest is deleted last
            if path not in kept:
                path.unlink()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReproError(
                f"cannot write checkpoints into {self.folder}: {error.strerror}; make room there "
                "and resume with --resume, or choose another folder with --out"
            ) from None


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ReproError(f"cannot read the checkpoints in {folder}: {error.strerror}") from None


def _refuse_other_versions(path: Path, versions: _Versions) -> None:
    for what, found, here in (
        ("the format", versions.format, FORMAT),
        ("the definitions", versions.definitions, DEFINITIONS),
    ):
        if found != here:
            remedy = "update reproml" if found > here else "delete the folder to train from scratch"
            raise ReproError(
                f"{path} was made with version {found} of {what}, "
                f"this reproml has version {here}; {remedy}"
            )
