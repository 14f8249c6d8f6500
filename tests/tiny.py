"""A recipe that trains in a moment (the bundled digits, 6 steps), for tests of the pipeline."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from reproml.cli import main
from reproml.pipeline.checkpoint import Checkpoints
from reproml.pipeline.data import load_dataset
from reproml.pipeline.preprocess import Prepared, preprocess
from reproml.pipeline.recipe import Recipe, load_recipe
from reproml.pipeline.run import Run, perform

TOML = """
name = "tiny"
seed = {seed}
precision = "{precision}"
[data]
name = "digits"
[preprocess]
kind = "standardize"
[model]
kind = "mlp"
hidden = {hidden}
[train]
epochs = {epochs}
batch_size = 500
[optimizer]
{optimizer}
"""
ADAMW = 'kind = "adamw"\nlearning_rate = 0.001'


def toml(
    folder: Path,
    seed: int = 1,
    hidden: str = "[8]",
    epochs: int = 2,
    optimizer: str = ADAMW,
    precision: str = "float32",
) -> Path:
    path = folder / "tiny.toml"
    values = {"hidden": hidden, "epochs": epochs, "optimizer": optimizer, "precision": precision}
    path.write_text(TOML.format(seed=seed, **values))
    return path


@functools.cache
def recipe(
    seed: int = 1,
    hidden: str = "[8]",
    epochs: int = 2,
    optimizer: str = ADAMW,
    precision: str = "float32",
) -> Recipe:
    with tempfile.TemporaryDirectory() as folder:
        return load_recipe(str(toml(Path(folder), seed, hidden, epochs, optimizer, precision)))


@functools.cache
def prepared() -> Prepared:
    return preprocess(load_dataset("digits"), recipe().preprocess)


@functools.cache
def run() -> Run:
    """Return the exact run of `recipe()`. It is shared: do not change it."""
    return perform(recipe())


def begin(monkeypatch: pytest.MonkeyPatch, *arguments: str, until: int = 4) -> None:
    """Train by the command line until the checkpoint of step `until` is saved, then interrupt."""
    save_checkpoint = Checkpoints.save

    def save(self, training, log, recorder):
        save_checkpoint(self, training, log, recorder)
        if training.done == until:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        assert main(["train", *arguments]) == 130
