from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reproml import cli, golden
from reproml import run as runs
from reproml.arithmetic import NotExactError
from reproml.cli import main
from tests import tiny


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parent.parent))  # for its processes
    tiny.toml(tmp_path)
    return tmp_path


TINY = ["--recipe", "./tiny.toml"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Bad input: exit status 2, one line on standard error, nothing on standard output."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("reproml: ")
    return captured.err


def test_data_shows_the_hashes(capsys):
    assert main(["data", *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(["data", *TINY, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert lines == [f"{sha256}  {name}" for name, sha256 in result["sha256"].items()]


def test_train_evaluate_verify(capsys, at_work):
    assert main(["train", *TINY]) == 0
    shown = capsys.readouterr().out
    assert "epoch 2 of 2: loss" in shown and "runs/tiny/weights.safetensors" in shown
    sha256 = tiny.run().items["weights.safetensors.sha256"]
    assert f"SHA-256 of the file runs/tiny/weights.safetensors: {sha256}" in shown

    assert main(["evaluate", *TINY]) == 0
    assert capsys.readouterr().out.splitlines() == [
        line.split(" ", 1)[1] for line in tiny.run().log if "correct" in line
    ]
    golden.save(tiny.run().items, golden.place("tiny"), force=False)
    assert main(["verify", *TINY, "--run", "runs/tiny"]) == 0
    assert "tiny: verified, all" in capsys.readouterr().out


def test_verify_says_what_differs_first_and_last(capsys, at_work):
    items = {**tiny.run().items, "train.correct": 1, "epoch.1.loss": 0.5}
    golden.save(items, golden.place("tiny"), force=False)
    assert main(["verify", *TINY]) == 1
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith(("ok ", "DIFFERS "))]
    assert [line.split()[1] for line in table[:2]] == ["epoch.1.loss", "train.correct"]
    assert f"expected 0.5, found {tiny.run().items['epoch.1.loss']}" in table[0]
    assert len(table) == len(items) and all(line.startswith("ok ") for line in table[2:])
    assert lines[-1] == (
        f"tiny: 2 of {len(items)} items differ from golden/tiny.json; the first is epoch.1.loss"
    )


def test_pipeline_trains_once(capsys, at_work, monkeypatch):
    golden.save(tiny.run().items, golden.place("tiny"), force=False)
    trainings = []
    perform = runs.perform

    def counted(*arguments):
        trainings.append(1)
        return perform(*arguments)

    monkeypatch.setattr(runs, "perform", counted)
    assert main(["pipeline", *TINY, "--json"]) == 0
    assert trainings == [1]
    results = json.loads(capsys.readouterr().out)
    assert list(results) == ["data", "train", "evaluate", "verify"]
    assert results["verify"]["verified"] is True


def test_json_is_all_there_is_on_standard_output(capsys):
    assert main(["train", *TINY, "--json", "--out", "here"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"run": "here", "items": tiny.run().items}
    assert "epoch 2 of 2" in captured.err


def test_steps_print_a_digest_and_leave_nothing(capsys, at_work):
    assert main(["train", *TINY, "--steps", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["weights.state_dict.sha256"]) == 64
    assert os.listdir(at_work) == ["tiny.toml"]
    assert main(["train", *TINY, "--steps", "6"]) == 0  # all: 2 epochs of 3 batches
    sha256 = tiny.run().items["epoch.2.state_dict.sha256"]
    line = f"digest of the state dict after at most 6 steps: {sha256}"
    assert line in capsys.readouterr().out.splitlines()


def test_a_native_run_has_a_folder_of_its_own_and_no_golden_file(capsys, at_work):
    assert main(["train", *TINY, "--numerics", "native"]) == 0
    assert os.listdir(at_work / "runs") == ["tiny-native"]
    capsys.readouterr()
    assert main(["evaluate", *TINY, "--numerics", "native"]) == 0
    capsys.readouterr()
    assert "not a run in exact" in refused(["evaluate", *TINY, "--run", "runs/tiny-native"], capsys)
    capsys.readouterr()
    for verb in ("verify", "golden", "pipeline"):
        error = refused([verb, *TINY, "--numerics", "native"], capsys)
        assert "native numerics have no golden file" in error


def test_golden_refuses_to_overwrite_before_it_trains(capsys, at_work, monkeypatch):
    golden.save(tiny.run().items, golden.place("tiny"), force=False)
    monkeypatch.setattr(runs, "perform", None)
    assert "--force" in refused(["golden", *TINY], capsys)


def test_golden_writes_what_a_run_records(capsys, at_work):
    assert main(["golden", *TINY]) == 0
    assert (at_work / "golden/tiny.json").read_text() == runs.items_json(tiny.run().items)


def test_bad_input_is_one_sentence(capsys, at_work):
    (at_work / "file").write_text("")
    (at_work / "golden").mkdir()
    assert "nonesuch" in refused(["train", "--recipe", "nonesuch"], capsys)
    assert "golden/tiny.json" in refused(["verify", *TINY], capsys)
    assert "golden/tiny.json" in refused(["pipeline", *TINY], capsys)
    assert "file/run" in refused(["train", *TINY, "--out", "file/run"], capsys)
    assert "runs/tiny does not exist" in refused(["evaluate", *TINY], capsys)
    (at_work / "golden/tiny.json").write_text("{}")
    assert "definitions.version" in refused(["verify", *TINY], capsys)
    (at_work / "golden/tiny.json").write_text("not")
    assert "golden/tiny.json is not JSON" in refused(["verify", *TINY], capsys)


@pytest.mark.parametrize("error", [NotExactError("no such operator"), OSError(28, "No space left")])
def test_errors_from_below_are_one_sentence(capsys, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(runs, "perform", fail)
    assert str(error) in refused(["train", *TINY], capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["tarin"],
        ["train", "--steps", "0"],
        ["train", "--steps", "-1"],
        ["train", "--steps", "many"],
        ["train", "--numerics", "fast"],
        ["train", "--no-such-option"],
    ],
)
def test_a_misspelt_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_misspelt_option_shows_the_usage_of_its_verb(capsys):
    for arguments in (["evaluate", "--out", "x"], ["evaluate", "--numerics", "fast"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err.startswith("usage: reproml evaluate [-h] [--recipe ")


def test_a_script_is_required_and_its_arguments_are_not(capsys):
    with pytest.raises(SystemExit):
        main(["run"])
    assert capsys.readouterr().err.endswith("arguments are required: SCRIPT.py\n")


def test_ctrl_c_while_training_leaves_nothing(at_work):
    tiny.toml(at_work, epochs=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "reproml", "train", *TINY, "--numerics", "native"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "epoch 3 " in line:
            break
    lock, partial = sorted(os.listdir("runs"))
    assert lock == ".tiny-native.lock" and partial.startswith(".tiny-native.partial-")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "reproml: interrupted\n"
    assert os.listdir("runs") == []


def test_every_verb_has_help(capsys):
    for verb in cli._VERBS:
        assert verb.__doc__
        with pytest.raises(SystemExit) as caught:
            main([verb.__name__, "--help"])
        assert caught.value.code == 0
    assert "default: mnist-mlp" in capsys.readouterr().out


def test_the_module_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "reproml", "train", "--recipe", "nonesuch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 2 and shown.stderr.startswith("reproml: no recipe")
