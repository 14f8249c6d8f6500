"""Every command and example of the README works.

Commands on digits and the examples are run here, through the verb where the README shows an invoke task;
of the long ones (MNIST, the matrix) only the names and options are checked. `.ci/run` runs the first two
commands verbatim.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from invoke.collection import Collection
from invoke.parser import Parser

from reproml import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the fenced code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def unset(words: list[str]) -> list[str]:
    """Drop the variables before a command: NAME=value COMMAND."""
    return list(itertools.dropwhile(re.compile("[A-Z_]+=").match, words))


# One command a line; `&&` joins several.
LINES = [line for block in blocks("sh") for line in block.splitlines()]
COMMANDS = [unset(shlex.split(part, comments=True)) for line in LINES for part in line.split("&&")]
TASKS = [
    command[1:]
    for command in COMMANDS
    if Path(command[0]).name == "invoke" and command[1] != "--list"  # invoke's own
]
# The verbs of `python -m reproml` are also invoke tasks; torchrun starts several processes of it.
WORKERS = [command[1:] for command in COMMANDS if command[0] == "torchrun"]
VERBS = [command[3:] for command in COMMANDS if command[:3] == ["python", "-m", "reproml"]]
VERBS += [args for args in TASKS if args not in VERBS]
QUICK = [a for a in VERBS if "digits-mlp" in a and a[0] != "matrix" and "--trace" not in a]


def python(
    *args: str, cwd: Path, setting: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in another folder, with the package of this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(setting or {})}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)


def test_setup_and_tests_are_first_commands():
    """`.ci/run` reads the two commands from the README."""
    setup, tests = LINES[:2]
    assert setup.startswith("python3 -m venv .venv && .venv/bin/pip install --require-hashes ")
    assert setup.endswith(" && .venv/bin/invoke verify --recipe digits-mlp")
    assert tests == ".venv/bin/pytest"


def test_every_command_has_a_test():
    """A new kind of command in the README needs a new test."""
    known = {"invoke", "nix", "python", "python3", "pip", "pytest", ".", "sha256sum", "torchrun"}
    known |= {"$(nix", "apptainer"}  # what was run of these: docs/evidence/nix.md
    assert {Path(command[0]).name or "." for command in COMMANDS} <= known


def test_tasks_are_listed_by_invoke():
    result = python("-m", "invoke", "--list", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert {args[0] for args in TASKS} <= set(result.stdout.split())


@pytest.mark.parametrize("args", TASKS, ids=" ".join)
def test_task_accepts_options(args, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    tasks = Collection.from_module(importlib.import_module("tasks"))
    (parsed,) = Parser(contexts=tasks.to_contexts()).parse_argv(args)  # raises ParseError
    assert parsed.name == args[0]


def test_scripts_to_run_exist():
    scripts = [args[1] for args in VERBS if args[0] == "run"]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize(
    "args", VERBS + [w[w.index("reproml") + 1 :] for w in WORKERS], ids=" ".join
)
def test_verb_accepts_options(args):
    parsed, unknown = cli.parser().parse_known_args(args)
    assert parsed.verb == args[0] and unknown == []


@pytest.mark.parametrize("args", QUICK, ids=" ".join)
def test_command_on_digits_runs(args, tmp_path):
    result = python("-m", "reproml", *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_diff_of_two_traced_trainings(tmp_path):
    """Train twice with different numbers of threads and traces, then compare the traces."""
    lines = [line for line in LINES if "--trace" in line]
    for line in lines:
        name, _, value = line.split()[0].partition("=")
        args = unset(shlex.split(line))[1:]
        result = python("-m", "reproml", *args, cwd=tmp_path, setting={name: value})
        assert result.returncode == 0, result.stderr
    (args,) = [args for args in VERBS if args[0] == "diff"]
    result = python("-m", "reproml", *args, cwd=tmp_path)
    last = {0: "no difference", 1: "likely cause: "}  # on some machines threads change no sum
    assert len(lines) == 2 and last[result.returncode] in result.stdout, result.stderr


@pytest.mark.parametrize("args", WORKERS, ids=" ".join)
def test_command_with_several_workers_runs(args, tmp_path):
    # PET_STANDALONE is torchrun's --standalone: it chooses a free port.
    setting = {"PET_STANDALONE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    result = python("-m", "torch.distributed.run", *args, cwd=tmp_path, setting=setting)
    assert result.returncode == 0, result.stderr
    last = "verified, all" if "verify" in args else "parameters of optimizer 1"
    assert "2" in args and last in result.stdout


def test_own_recipe_verifies(tmp_path):
    (tmp_path / "golden").mkdir()
    (text,) = blocks("toml")
    (tmp_path / "my-mlp.toml").write_text(text)
    commands = [args for args in VERBS if "my-mlp.toml" in args]
    assert [args[0] for args in commands] == ["golden", "verify"]
    for args in commands:
        result = python("-m", "reproml", *args, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.glob("golden/*")] == ["my-mlp.json"]


@pytest.mark.parametrize("script", blocks("python"))
def test_own_script_has_the_stated_digest(script, tmp_path):
    other = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    first = python("-c", script, cwd=tmp_path)
    second = python("-c", script, cwd=tmp_path, setting=other)
    assert re.fullmatch("[0-9a-f]{64}\n", first.stdout), first.stderr
    assert second.stdout == first.stdout
    (stated,) = re.findall(r"# ([0-9a-f]{16})\.\.\.$", script, flags=re.MULTILINE)
    assert first.stdout.startswith(stated)


def test_files_and_links_exist():
    for target in re.findall(r"\]\(([^):#]+)[^):]*\)", README):
        assert (ROOT / target).exists(), target
    assert (ROOT / "requirements.lock").is_file()
