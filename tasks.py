"""The invoke tasks: `invoke --list`, `invoke --help TASK`.

A verb of the command line becomes a task with the same options; `python -m reproml VERB` needs no invoke.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import Task, task

from reproml import cli

PYTHON = shlex.quote(sys.executable)
BIN = shlex.quote(str(Path(sys.executable).parent))  # where pip installed the linters of C
C_FILES = "reproml/arithmetic/csrc/*.c"
LINTERS = (
    f"{PYTHON} -m ruff check .",
    f"{PYTHON} -m ruff format --check .",
    f"{PYTHON} -m mypy",
    f"{PYTHON} -m mypy --platform win32 --cache-dir .mypy_cache/win32 reproml",
    f"{BIN}/clang-format --dry-run --Werror {C_FILES} reproml/arithmetic/csrc/*.h",
    f"{BIN}/clang-tidy --quiet {C_FILES} -- -O0 -std=gnu11",
)


def verb_task(verb: str) -> Task[Any]:
    """Return the task that runs a verb of the command line, with the verb's own options and help."""
    options = {name.lstrip("-").replace("-", "_"): name for name in cli.VERBS[verb].options}
    helps, parameters = {}, [Parameter("c", Parameter.POSITIONAL_OR_KEYWORD)]
    for name, option in options.items():
        settings = cli.OPTIONS[option]
        helps[name] = settings["help"]
        default: Any = False if settings.get("action") == "store_true" else ""
        if not option.startswith("-") and "nargs" not in settings:
            default = Parameter.empty
        parameters.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default))
    signature = Signature(parameters)

    def body(*args: Any, **kwargs: Any) -> None:
        arguments = [verb]
        for name, value in list(signature.bind(*args, **kwargs).arguments.items())[1:]:
            option = options[name]
            if value and "nargs" in cli.OPTIONS[option]:
                arguments += shlex.split(value)
            elif value:
                arguments += [option] * option.startswith("-") + [value] * (value is not True)
        if status := cli.main(arguments):
            raise Exit(code=status)

    body.__name__, body.__doc__ = verb, cli.VERBS[verb].command.__doc__
    vars(body)["__signature__"] = signature  # from which invoke reads the options
    return Task(body, help=helps)


@task
def test(c: Context) -> None:
    """Run all tests."""
    _run(c, f"{PYTHON} -m pytest")


@task
def quick(c: Context) -> None:
    """Run the quick selection of the tests, under a minute in total."""
    _run(c, f"{PYTHON} -m pytest -q -m quick")


@task
def lint(c: Context) -> None:
    """Check style, formatting and types, in Python and in C."""
    for command in LINTERS:
        _run(c, command)


@task
def bench(c: Context) -> None:
    """Measure the cost of exact arithmetic against native, in one table and a plot."""
    _run(c, f"{PYTHON} -m benchmarks.bench")


@task(help={"names": "scripts of gallery/, separated by spaces; default: all"})
def gallery(c: Context, names: str = "") -> None:
    """Run the training scripts of gallery/, whose libraries must be installed."""
    _run(c, shlex.join([sys.executable, "-m", "verification.gallery", *names.split()]))


@task(help={"environment": "oldest, middle or newest; default: all three"})
def second(c: Context, environment: str = "") -> None:
    """Verify golden files, examples and arithmetic with other versions of Python and PyTorch."""
    _run(c, f".ci/second {shlex.quote(environment)}" if environment else ".ci/second")


@task
def lock(c: Context) -> None:
    """Regenerate requirements.lock and Nix's table of wheels together."""
    _run(c, f"{PYTHON} nix/lock.py")


@task
def clean(c: Context) -> None:
    """Delete caches and the partial folders of killed trainings; keep runs and data."""
    patterns = (".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build", "dist")
    for pattern in (*patterns, "*.egg-info", "runs/.*.partial-*", "**/__pycache__"):
        for path in Path().glob(pattern):
            shutil.rmtree(path)


def _run(c: Context, command: str) -> None:
    c.run(command, pty=sys.stdout.isatty())


# The verb `run` has no task: after the script's name its options are the script's own.
VERB_TASKS = [verb_task(verb) for verb in cli.VERBS if verb != "run"]
ns = Collection(*VERB_TASKS, test, quick, lint, bench, gallery, second, lock, clean)
