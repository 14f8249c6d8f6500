"""Checkpoints: a training's state on disk, so that a killed run goes on where it was.

    runs/NAME.checkpoints/step-STEP-SHA256.safetensors

A file's name has its SHA-256, so that loading checks every byte of it (and `sha256sum` can). It is
safetensors: the tensors of `train.State`, and under "reproml" in the header all else as JSON. It is
written beside its place and renamed, the last two are kept, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import msgspec
import safetensors.torch
from safetensors import SafetensorError

from reproml.errors import ReproError
from reproml.files import sync_folder, write_whole
from reproml.pipeline.recipe import Recipe
from reproml.pipeline.train import Epoch, State, Training
from reproml.versions import DEFINITIONS

FORMAT = 1
KEPT = 2
SUFFIX = ".checkpoints"

_NAME = re.compile(r"step-(\d{8,18})-[0-9a-f]{64}\.safetensors")
_PARTIAL = re.compile(r"\.step-.*\.partial-[0-9a-f]+")
_KEY = "reproml"  # in the file's header


class TraceHead(msgspec.Struct, frozen=True):
    """How far a trace had come: what `tracing.recorder.Recorder.head` returns."""

    entries: int
    sha256: str
    step: int
    epoch: int
    optimizers: int


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """All of a checkpoint but its tensors."""

    format: int
    recipe: Recipe
    numerics: str
    definitions: int
    every: int  # steps from a checkpoint to the next
    step: int
    initial_state_dict_sha256: str
    epochs: list[Epoch]
    log: list[str]  # what was printed so far
    trace: Optional[TraceHead] = None  # if one is recorded


class Checkpoint(NamedTuple):
    """A whole one, read and checked."""

    path: Path
    head: Head
    state: State


class _Damaged(Exception):
    """The file is not what was written."""


class _Versions(msgspec.Struct):
    """What is read first: the rest of a head may look otherwise in another version."""

    format: int
    definitions: int


def folder_of(run: Path) -> Path:
    """Return the folder of the checkpoints of the run folder `run`."""
    run = Path(os.path.realpath(run))
    return run.parent / (run.name + SUFFIX)


def run_of(folder: Path) -> Path:
    """Return the run folder that `folder` is, or that it has the checkpoints of."""
    return folder.with_name(folder.name[: -len(SUFFIX)]) if folder.name.endswith(SUFFIX) else folder


def latest(folder: Path, log: Callable[[str], None] = lambda line: None) -> Optional[Checkpoint]:
    """Return the newest whole checkpoint of a folder, None if there are none at all.

    `log` is told of each that is damaged. Raises ReproError if all are, or if one was made by
    another version that this reproml cannot go on from.
    """
    paths = paths_in(folder)
    for path in paths:
        try:
            return load(path)
        except _Damaged as damage:
            log(f"passing over the checkpoint {path}: {damage}")
    if paths:
        raise ReproError(f"no checkpoint in {folder} is whole; delete that folder to begin anew")
    return None


def paths_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first; none if there is no such folder."""
    found = [(match, name) for name in _listed(folder) if (match := _NAME.fullmatch(name))]
    return [folder / name for _, name in sorted(found, key=lambda f: (-int(f[0][1]), f[1]))]


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, after a check of every byte of it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _Damaged(f"it cannot be read: {error.strerror}") from None
    if hashlib.sha256(raw).hexdigest() not in path.name:
        raise _Damaged("its SHA-256 is not the one in its name")
    try:
        tensors = safetensors.torch.load(raw)
        text = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"][_KEY]
        _refuse_other_versions(path, msgspec.json.decode(text, type=_Versions))
        head = msgspec.json.decode(text, type=Head)
    except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError) as error:
        raise _Damaged(f"it is not a checkpoint in safetensors: {error}") from None
    state = State(head.step, tensors, head.initial_state_dict_sha256, head.epochs)
    return Checkpoint(path, head, state)


class Checkpoints:
    """The checkpoints of a training: the one it goes on from, and one for each `every` steps."""

    def __init__(
        self, folder: Path, recipe: Recipe, numerics: str, every: int, start: Optional[Checkpoint]
    ) -> None:
        """Raises ReproError if `start` is of another training, or if the folder cannot be written."""
        self.folder, self.recipe, self.numerics = folder, recipe, numerics
        self.every, self.start = every, start
        self.trace: Callable[[], Optional[TraceHead]] = lambda: None  # asked for each checkpoint
        self._kept = [start.path] if start else []
        if start and start.head.recipe != recipe:
            raise ReproError(
                f"{folder} has checkpoints of another recipe than {recipe.name}; "
                "leave out --recipe, or begin anew without --resume"
            )
        if start and start.head.numerics != numerics:
            raise ReproError(
                f"{folder} has checkpoints of a training in {start.head.numerics} numerics, "
                f"not {numerics}; choose with --numerics"
            )
        with self._written():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            for name in filter(_PARTIAL.fullmatch, os.listdir(folder)):  # left by a kill
                (folder / name).unlink()

    def save(self, training: Training, log: list[str]) -> None:
        """Save the training's state if its turn has come, and delete what is then too old."""
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
            trace=self.trace(),
        )
        raw = safetensors.torch.save(state.tensors, {_KEY: msgspec.json.encode(head).decode()})
        path = self.folder / f"step-{state.step:08}-{hashlib.sha256(raw).hexdigest()}.safetensors"
        with self._written():
            write_whole(path, raw)
            self._kept = [*self._kept, path][-KEPT:]
            self._delete(self._kept)

    def delete(self) -> None:
        """Delete them all, as the run is whole; anything else in the folder stays."""
        with self._written():
            self._delete([])
            if not os.listdir(self.folder):
                self.folder.rmdir()

    def _delete(self, but: list[Path]) -> None:
        for path in reversed(paths_in(self.folder)):  # the newest is the last to go
            if path not in but:
                path.unlink()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ReproError(
                f"cannot write checkpoints into {self.folder}: {error.strerror}; make room there "
                "and go on with --resume, or choose another folder with --out"
            ) from None


def _listed(folder: Path) -> list[str]:
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
            remedy = "update reproml" if found > here else "delete the folder to begin anew"
            raise ReproError(
                f"{path} was made with version {found} of {what}, "
                f"this reproml has version {here}; {remedy}"
            )
