"""Whether this process is a worker is decided in one place, and damaged variables are one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from reproml.cli import main
from reproml.errors import ReproError
from reproml.pipeline import golden
from reproml.torchrun import Worker, this_worker
from tests import tiny

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def set_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "worker"),
    [
        ({}, Worker(0, 1)),
        ({"RANK": "1"}, Worker(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "1"}, Worker(0, 1)),
        ({"WORLD_SIZE": "1", **ADDRESS}, Worker(0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, Worker(1, 2)),
    ],
)
def test_only_world_size_makes_a_worker(monkeypatch, variables, worker):
    set_variables(monkeypatch, variables)
    assert this_worker() == worker


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": ""}, "RANK is '', not a number"),
        ({"RANK": "x"}, "RANK is 'x', not a number"),
        ({"RANK": "-1"}, "RANK is '-1', not a number"),
        ({"RANK": "\u0663"}, "RANK is '\u0663', not a number"),
        ({"WORLD_SIZE": "banana"}, "WORLD_SIZE is 'banana', not a number"),
        ({"WORLD_SIZE": "9" * 5000}, "not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 are not those of a worker"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **ADDRESS}, "RANK=2 and WORLD_SIZE=2 are not"),
        ({"WORLD_SIZE": "2", "RANK": "0", **ADDRESS, "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_damaged_variables_are_refused(monkeypatch, capsys, variables, words):
    set_variables(monkeypatch, variables)
    with pytest.raises(ReproError, match=words):
        this_worker()
    for verb in (["verify", "--recipe", "digits-mlp"], ["run", "none.py"], ["doctor"]):
        assert main(verb) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}])
def test_rank_of_cluster_does_not_skip_verification(monkeypatch, capsys, tmp_path, variables):
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    golden.write_golden({**tiny.run().items, "test.correct": 1}, Path("golden/tiny.json"), False)
    set_variables(monkeypatch, variables)
    assert main(["verify", "--recipe", "./tiny.toml"]) == 1
    assert f"1 of {len(tiny.run().items)} items differ" in capsys.readouterr().out
