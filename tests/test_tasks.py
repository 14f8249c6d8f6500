from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invoke.context import Context
from invoke.exceptions import Exit

import tasks
from reproml import cli

# `run` passes on all arguments of any script: python -m reproml run
VERBS = {name: list(verb.options) for name, verb in cli.VERBS.items() if name != "run"}
TASKS: dict[str, Any] = dict(tasks.ns.tasks)
ROOT = Path(__file__).resolve().parent.parent


def test_tasks_are_the_verbs_and_the_chores():
    assert set(TASKS) == {*VERBS, *"test quick lint bench clean gallery lock second".split()}


@pytest.mark.parametrize("verb", VERBS)
def test_task_has_options_and_help_of_its_verb(verb):
    parameters = list(inspect.signature(TASKS[verb].body).parameters)[1:]
    assert [name.replace("_", "-") for name in parameters] == [o.lstrip("-") for o in VERBS[verb]]
    assert TASKS[verb].__doc__ == cli.VERBS[verb].command.__doc__
    helps = [argument.help for argument in TASKS[verb].get_arguments()]
    assert helps == [cli.OPTIONS[option]["help"] for option in VERBS[verb]]


@pytest.mark.parametrize("name", TASKS)
def test_docstring_is_a_sentence(name):
    assert TASKS[name].__doc__.strip().endswith(".")


def test_only_given_options_are_passed_on(monkeypatch):
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


def test_exit_status_is_the_verbs(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: 1)
    with pytest.raises(Exit) as caught:
        TASKS["verify"](Context())
    assert caught.value.code == 1


def test_invoke_lists_every_task():
    shown = subprocess.run(
        [sys.executable, "-m", "invoke", "--list"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(f"  {name} " in shown for name in TASKS)


def test_invoke_shows_options_with_short_flags():
    command = [sys.executable, "-m", "invoke", "--help", "train"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in (
        "-c STRING, --checkpoint-every=STRING",
        "-r STRING, --recipe=STRING",
        "-j, --json",
    ):
        assert option in shown


def test_clean_keeps_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = ["runs/mine/log.txt", "golden/mine.json", "reproml/cli.py"]
    gone = ["runs/.mine.partial-1/log.txt", "reproml/__pycache__/cli.pyc", ".mypy_cache/x"]
    for name in kept + gone:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    TASKS["clean"](Context())
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(kept)
