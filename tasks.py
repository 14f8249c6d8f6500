"""The invoke tasks, a line of work each: `invoke --list`, `invoke TASK --help`.

`python -m reproml VERB` offers the pipeline's own without invoke.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from inspect import signature
from pathlib import Path
from typing import Any

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

_HELP = {
    "recipe": "name or path of a recipe (TOML), default: mnist-mlp, or that of --run or --resume",
    "script": "'SCRIPT.py ARGS': a training script instead of a recipe",
    "data": "folder that holds the data files",
    "out": "run folder, default: runs/RECIPE; of report the page: RUN.html",
    "run": "run folder; default: verify trains, doctor compares with none, others: runs/RECIPE",
    "numerics": "exact (default), or native: plain PyTorch, for comparison",
    "steps": "stop after so many steps",
    "checkpoint_every": "save a checkpoint each so many steps, beside the run folder",
    "resume": "go on with this run folder from its newest checkpoint",
    "workers": "1,2,4: also with so many workers, started by torchrun",
    "force": "replace the golden file",
    "trace": "record each step in this file, to compare with: invoke diff",
    "a": "trace, run folder, .safetensors or golden .json",
    "b": "another of the same kind",
    "diff": "tell on the page where the run parts from this run folder or trace",
    "rerun": "run the step that parts again, on both sides, to find the operator",
    "json": "print JSON",
}


def _task(function: Any) -> Any:
    """Make a task whose options have their help from the one table above."""
    options = list(signature(function).parameters)[1:]
    return task(help={name: _HELP[name] for name in options})(function)


def _reproml(verb: str, *positional: str, **options: Any) -> None:
    """Call the command line's verb with the options that were given."""
    from reproml.cli import main

    arguments = [verb, *positional]
    for name, value in options.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            arguments += [option] if value is True else [option, str(value)]
    status = main(arguments)
    if status:
        raise Exit(code=status)


@_task
def data(c: Context, recipe: str = "", data: str = "", json: bool = False) -> None:
    """Get the recipe's data and check every hash."""
    _reproml("data", recipe=recipe, data=data, json=json)


@_task
def train(
    c: Context,
    recipe: str = "",
    data: str = "",
    out: str = "",
    numerics: str = "",
    steps: str = "",
    trace: str = "",
    checkpoint_every: str = "",
    resume: str = "",
    json: bool = False,
) -> None:
    """Train and evaluate the recipe; leave a run folder."""
    _reproml(
        "train",
        recipe=recipe,
        data=data,
        out=out,
        numerics=numerics,
        steps=steps,
        trace=trace,
        checkpoint_every=checkpoint_every,
        resume=resume,
        json=json,
    )


@_task
def evaluate(
    c: Context,
    recipe: str = "",
    data: str = "",
    run: str = "",
    numerics: str = "",
    json: bool = False,
) -> None:
    """Evaluate the weights of a run folder on the training and the test set."""
    _reproml("evaluate", recipe=recipe, data=data, run=run, numerics=numerics, json=json)


@_task
def verify(
    c: Context,
    recipe: str = "",
    data: str = "",
    run: str = "",
    numerics: str = "",
    json: bool = False,
) -> None:
    """Train anew, or take the run folder --run DIR, and compare all of it with the golden file."""
    _reproml("verify", recipe=recipe, data=data, run=run, numerics=numerics, json=json)


@_task
def pipeline(
    c: Context,
    recipe: str = "",
    data: str = "",
    out: str = "",
    numerics: str = "",
    json: bool = False,
) -> None:
    """Do it all in order: data, train, evaluate, verify (the run just trained)."""
    _reproml("pipeline", recipe=recipe, data=data, out=out, numerics=numerics, json=json)


@_task
def golden(
    c: Context,
    recipe: str = "",
    data: str = "",
    numerics: str = "",
    force: bool = False,
    json: bool = False,
) -> None:
    """Train the recipe and write what it comes to as its golden file."""
    _reproml("golden", recipe=recipe, data=data, numerics=numerics, force=force, json=json)


@_task
def matrix(
    c: Context,
    recipe: str = "",
    script: str = "",
    data: str = "",
    steps: str = "",
    workers: str = "",
    json: bool = False,
) -> None:
    """Train natively and exactly under every setting of this CPU; exact hashes must agree."""
    options = {"recipe": recipe, "script": script, "data": data, "steps": steps}
    _reproml("matrix", **options, workers=workers, json=json)


@_task
def doctor(c: Context, run: str = "", json: bool = False) -> None:
    """Say what this machine is and test here all that exact arithmetic takes for granted."""
    _reproml("doctor", run=run, json=json)


@_task
def report(
    c: Context,
    recipe: str = "",
    data: str = "",
    run: str = "",
    out: str = "",
    diff: str = "",
    json: bool = False,
) -> None:
    """Write one page for a run folder: its verdict against the golden file, where it parts from another."""
    _reproml("report", recipe=recipe, data=data, run=run, out=out, diff=diff, json=json)


@_task
def diff(c: Context, a: str, b: str, rerun: bool = False, json: bool = False) -> None:
    """Tell where two traces, runs, weights or golden files first part, by how much, and why."""
    _reproml("diff", a, b, rerun=rerun, json=json)


@task
def test(c: Context) -> None:
    """Run the tests."""
    _python(c, "-m pytest")


@task
def lint(c: Context) -> None:
    """Check style, formatting and types."""
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        _python(c, f"-m {command}")


@task
def bench(c: Context) -> None:
    """Measure what exact arithmetic costs, against native, in one table and a plot."""
    _python(c, "-m benchmarks.bench")


@task
def second(c: Context) -> None:
    """Verify the golden files in a second environment: another Python, another PyTorch."""
    c.run(".ci/second", pty=sys.stdout.isatty())


@task
def lock(c: Context) -> None:
    """Regenerate requirements.lock and Nix's table of wheels together."""
    _python(c, "nix/lock.py")


@task
def clean(c: Context) -> None:
    """Delete caches and what killed trainings left half-done; runs and data stay."""
    patterns = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist")
    for pattern in (*patterns, "*.egg-info", "runs/.*.partial-*", "**/__pycache__"):
        for path in Path().glob(pattern):
            shutil.rmtree(path)


def _python(c: Context, arguments: str) -> None:
    c.run(f"{shlex.quote(sys.executable)} {arguments}", pty=sys.stdout.isatty())
