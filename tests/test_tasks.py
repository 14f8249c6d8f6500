from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task

import tasks
from reproml import cli

VERBS = {verb.__name__: options.split() for verb, options in cli._VERBS.items()}
del VERBS["run"]  # takes any script's own arguments: python -m reproml run
TASKS: dict[str, Any] = {name: t for name, t in vars(tasks).items() if isinstance(t, Task)}
ROOT = Path(__file__).resolve().parent.parent


def test_every_verb_is_a_task_and_there_are_some_more():
    assert set(TASKS) == {*VERBS, "test", "lint", "bench", "clean", "lock", "second"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_task_has_the_options_and_the_help_of_its_verb(verb):
    parameters = list(inspect.signature(TASKS[verb].body).parameters)[1:]
    assert [name.replace("_", "-") for name in parameters] == [o.lstrip("-") for o in VERBS[verb]]
    assert TASKS[verb].__doc__ == vars(cli)[verb].__doc__


@pytest.mark.parametrize("name", TASKS)
def test_the_docstring_is_the_help(name):
    assert TASKS[name].__doc__.strip().endswith(".")


def test_options_are_passed_on_only_if_given(monkeypatch):
    calls: list[list[str]] = []

    def fake(argv):
        calls.append(argv)
        return 0

    monkeypatch.setattr(cli, "main", fake)
    positional = {verb: [o for o in options if o[0] != "-"] for verb, options in VERBS.items()}
    for verb in VERBS:
        TASKS[verb](Context(), *positional[verb])
    TASKS["train"](Context(), recipe="digits-mlp", steps="5", json=True)
    TASKS["train"](Context(), checkpoint_every="7", resume="runs/mine")
    assert calls == [
        *[[verb, *positional[verb]] for verb in VERBS],
        ["train", "--recipe", "digits-mlp", "--steps", "5", "--json"],
        ["train", "--checkpoint-every", "7", "--resume", "runs/mine"],
    ]


def test_the_exit_status_is_the_verbs(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: 1)
    with pytest.raises(Exit) as caught:
        tasks.verify(Context())
    assert caught.value.code == 1


def test_invoke_finds_them():
    shown = subprocess.run(
        [sys.executable, "-m", "invoke", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(f"  {name} " in shown for name in TASKS)


def test_clean_keeps_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = ["runs/mine/log.txt", "golden/mine.json", "reproml/cli.py"]
    gone = ["runs/.mine.partial-1/log.txt", "reproml/__pycache__/cli.pyc", ".mypy_cache/x"]
    for name in kept + gone:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    tasks.clean(Context())
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(kept)
