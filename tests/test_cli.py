from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from reproml import cli
from reproml.cli import main
from reproml.errors import NotExactError
from reproml.pipeline import golden
from reproml.pipeline import run as runs
from reproml.pipeline.checkpoint import checkpoint_paths
from reproml.versions import DEFINITIONS, __version__
from tests import tiny


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(cli.__file__).parent.parent))  # for child processes
    tiny.toml(tmp_path)
    return tmp_path


TINY = ["--recipe", "./tiny.toml"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Check for exit status 2, one line on standard error and no standard output; return the line."""
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
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    assert main(["verify", *TINY, "--run", "runs/tiny"]) == 0
    assert "tiny: verified, all" in capsys.readouterr().out


def test_verify_lists_mismatches_first(capsys, at_work):
    items = {**tiny.run().items, "train.correct": 1, "epoch.1.loss": 0.5}
    golden.write_golden(items, golden.golden_path("tiny"), force=False)
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
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
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


def test_json_is_all_of_standard_output(capsys):
    assert main(["train", *TINY, "--json", "--out", "here"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"run": "here", "items": tiny.run().items}
    assert "epoch 2 of 2" in captured.err


def test_steps_print_digest_and_write_nothing(capsys, at_work):
    assert main(["train", *TINY, "--steps", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["weights.state_dict.sha256"]) == 64
    assert os.listdir(at_work) == ["tiny.toml"]
    assert main(["train", *TINY, "--steps", "6"]) == 0  # all: 2 epochs of 3 batches
    sha256 = tiny.run().items["epoch.2.state_dict.sha256"]
    line = f"digest of the state dict after at most 6 steps: {sha256}"
    assert line in capsys.readouterr().out.splitlines()


def test_micro_batches_give_the_same_run(capsys, at_work):
    """Batches of 500 and 437 rows, each computed 200 rows at a time."""
    assert main(["train", *TINY, "--micro-batch", "200", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == json.loads(json.dumps(tiny.run().items))
    assert (at_work / "runs/tiny/weights.safetensors").read_bytes() == tiny.run().weights
    assert "micro-batches of 200" in (at_work / "runs/tiny/log.txt").read_text()
    assert main(["train", *TINY, "--micro-batch", "499", "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["train", *TINY, "--steps", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_native_run_has_own_folder_no_golden_file(capsys, at_work):
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


def test_golden_refuses_to_overwrite_before_training(capsys, at_work, monkeypatch):
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    monkeypatch.setattr(runs, "perform", None)
    assert "--force" in refused(["golden", *TINY], capsys)


def test_golden_file_equals_metrics_of_run(capsys, at_work):
    assert main(["golden", *TINY]) == 0
    assert (at_work / "golden/tiny.json").read_text() == runs.items_json(tiny.run().items)


def test_bad_input_is_reported_in_one_sentence(capsys, at_work):
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
def test_errors_are_reported_in_one_sentence(capsys, monkeypatch, error):
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
        ["train", "--checkpoint-every", "0"],
        ["pipeline", "--resume", "runs/tiny"],
        ["train", "--numerics", "fast"],
        ["train", "--no-such-option"],
    ],
)
def test_misspelt_command_line_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_misspelt_option_shows_usage_of_its_verb(capsys):
    for arguments in (["evaluate", "--out", "x"], ["evaluate", "--numerics", "fast"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err.startswith("usage: reproml evaluate [-h] [--recipe ")


def test_script_is_required_arguments_are_optional(capsys):
    with pytest.raises(SystemExit):
        main(["run"])
    assert capsys.readouterr().err.endswith("arguments are required: SCRIPT.py\n")


def test_ctrl_c_while_training_leaves_no_files(at_work):
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


# --- checkpoints ----------------------------------------------------------------------------------


EVERY = ["--checkpoint-every", "2"]


@pytest.mark.parametrize("folder", ["runs/tiny", "runs/tiny.checkpoints"])
def test_resume_needs_only_the_folder(capsys, monkeypatch, at_work, folder):
    """The checkpoint has recipe and interval; the run and its log equal those of an uninterrupted one."""
    tiny.begin(monkeypatch, *TINY, *EVERY)
    assert sorted(os.listdir("runs")) == ["tiny.checkpoints"]
    (at_work / "tiny.toml").unlink()
    tiny.begin(monkeypatch, "--resume", folder, until=6)
    newest, before = checkpoint_paths(at_work / "runs/tiny.checkpoints")
    assert newest.name.startswith("step-00000006") and before.name.startswith("step-00000004")
    capsys.readouterr()
    assert main(["train", "--resume", folder, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"run": "runs/tiny", "items": tiny.run().items}
    assert os.listdir("runs") == ["tiny"]
    log = [line.split(" ", 1)[1] for line in Path("runs/tiny/log.txt").read_text().splitlines()]
    assert [line for line in log if "from the checkpoint" not in line] == [
        line.split(" ", 1)[1] for line in tiny.run().log
    ]
    assert [line for line in log if "from the checkpoint" in line] == [
        "tiny: exact numerics, from the checkpoint of step 4 on",
        "tiny: exact numerics, from the checkpoint of step 6 on",
    ]


def test_resume_without_checkpoint_needs_an_interval(capsys, at_work):
    """Alone it is refused; with an interval, as in a job that is restarted, the training starts."""
    error = refused(["train", *TINY, "--resume", "runs/tiny"], capsys)
    assert "no checkpoint of runs/tiny to resume from; add --checkpoint-every N" in error
    assert not (at_work / "runs").exists()
    assert main(["train", *TINY, *EVERY, "--resume", "runs/tiny"]) == 0
    assert json.loads(Path("runs/tiny/metrics.json").read_text()) == tiny.run().items


def test_resume_of_finished_run_does_nothing(capsys, at_work, monkeypatch):
    assert main(["train", *TINY]) == 0
    before = Path("runs/tiny/log.txt").read_bytes()
    monkeypatch.setattr(runs, "perform", None)
    capsys.readouterr()
    for recipe in ([], TINY):
        assert main(["train", *recipe, *EVERY, "--resume", "runs/tiny", "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == {"run": "runs/tiny", "items": tiny.run().items}
        assert "runs/tiny is already a finished run of tiny" in captured.err
    assert Path("runs/tiny/log.txt").read_bytes() == before


def test_resume_does_not_accept_run_of_another_recipe(capsys, at_work):
    assert main(["train", *TINY]) == 0
    capsys.readouterr()
    tiny.toml(at_work, seed=2)
    assert "no checkpoint of runs/tiny" in refused(
        ["train", *TINY, "--resume", "runs/tiny"], capsys
    )
    assert main(["train", *TINY, *EVERY, "--resume", "runs/tiny"]) == 0
    items = json.loads(Path("runs/tiny/metrics.json").read_text())
    assert items["recipe.canonical_json.sha256"] == tiny.recipe(seed=2).sha256


def test_checkpoints_of_unfinished_training_are_kept(capsys, at_work, monkeypatch):
    tiny.begin(monkeypatch, *TINY, *EVERY)
    before = [path.name for path in checkpoint_paths(at_work / "runs/tiny.checkpoints")]
    capsys.readouterr()
    for more in ([], EVERY):
        error = refused(["train", *TINY, *more], capsys)
        assert "runs/tiny.checkpoints has checkpoints of an unfinished training" in error
        assert "resume it with --resume runs/tiny" in error
    tiny.toml(at_work, seed=2)
    error = refused(["train", *TINY, "--resume", "runs/tiny"], capsys)
    assert "checkpoints of another recipe than tiny" in error
    error = refused(["train", "--resume", "runs/tiny", "--numerics", "native"], capsys)
    assert "in exact numerics, not native" in error
    assert [path.name for path in checkpoint_paths(at_work / "runs/tiny.checkpoints")] == before
    assert os.listdir("runs") == ["tiny.checkpoints"]


def test_conflicting_options_are_refused(capsys):
    resume = ["train", *TINY, "--resume", "runs/tiny"]
    assert "leave out --out" in refused([*resume, "--out", "runs/tiny"], capsys)
    for more in (resume[3:], EVERY):
        error = refused(["train", *TINY, *more, "--steps", "1"], capsys)
        assert "leave out --checkpoint-every and --resume" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--numerics", "native"], "only in exact numerics"),
        (["train", "--trace", "t"], "--trace records complete batches"),
        (["verify", "--run", "runs/tiny"], "leave out --micro-batch"),
    ],
)
def test_useless_micro_batch_is_refused(arguments, words, capsys):
    assert words in refused([*arguments, "--micro-batch", "7"], capsys)


# --- the recipe of a run, and a run that is damaged -----------------------------------------------


def test_recipe_is_read_from_run_folder(capsys, at_work):
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    assert main(["train", *TINY, "--out", "here"]) == 0
    (at_work / "tiny.toml").unlink()
    assert main(["verify", "--run", "here"]) == 0
    assert main(["evaluate", "--run", "here"]) == 0
    capsys.readouterr()
    Path("here/run.json").write_text('{"recipe": {"name": "../tiny"}}')
    error = refused(["verify", "--run", "here"], capsys)
    assert "here/run.json does not record a valid recipe" in error and "--recipe" in error
    assert "here2 does not exist" in refused(["evaluate", "--run", "here2"], capsys)


def test_damaged_weights_are_neither_evaluated_nor_verified(capsys, at_work):
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    assert main(["train", *TINY]) == 0
    path = at_work / "runs/tiny/weights.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    found = hashlib.sha256(raw).hexdigest()
    expected = tiny.run().items["weights.safetensors.sha256"]
    capsys.readouterr()
    error = refused(["evaluate", *TINY], capsys)
    assert f"is damaged: its SHA-256 is {found}, not {expected} as in metrics.json" in error
    assert main(["verify", "--run", "runs/tiny", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["items"]
    differ = {row["item"]: (row["expected"], row["found"]) for row in rows if not row["match"]}
    assert differ["weights.safetensors.sha256"] == (expected, found)
    assert not any("metrics.json" in item for item in differ)  # metrics.json is intact


def test_altered_metrics_differ_from_golden_file(capsys, at_work):
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    assert main(["train", *TINY]) == 0
    path = at_work / "runs/tiny/metrics.json"
    path.write_text(runs.items_json({**tiny.run().items, "test.correct": 297, "epoch.1.loss": 0.5}))
    capsys.readouterr()
    assert main(["verify", "--run", "runs/tiny", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["items"]
    differ = {row["item"]: (row["expected"], row["found"]) for row in rows if not row["match"]}
    items = tiny.run().items
    assert differ == {
        "epoch.1.loss": (str(items["epoch.1.loss"]), "0.5"),
        "test.correct in runs/tiny/metrics.json": (str(items["test.correct"]), "297"),
    }


def test_every_verb_has_help(capsys):
    for name, verb in cli.VERBS.items():
        assert verb.command.__doc__
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
    assert "default: mnist-mlp" in capsys.readouterr().out


def test_version_names_package_definitions_pytorch(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    expected = f"reproml {__version__}, definitions {DEFINITIONS}, PyTorch {version('torch')}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_closed_pipe_has_its_own_status(at_work, more):
    items = {**tiny.run().items, "test.correct": 1}
    golden.write_golden(items, golden.golden_path("tiny"), force=False)
    command = [sys.executable, "-m", "reproml", "verify", *TINY, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head -1` does after its line
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert b"Traceback" not in errors and b"Broken" not in errors


@pytest.mark.parametrize("coding", ["utf-8", "ascii"])
def test_names_that_are_not_utf8_are_printed(at_work, coding):
    """Names of files are bytes; a terminal shows some of them only as escapes."""
    items = {**tiny.run().items, "zz\x1b[2K\rok": "\u202e"}
    golden.write_golden(items, golden.golden_path("tiny"), force=False)
    name = os.fsdecode(b"\xff\x1b[2K\xc3\xa9")
    with runs.reserve_run_folder(Path(name)) as save:
        save(tiny.run())
    setting = {**os.environ, "PYTHONIOENCODING": coding}
    for verb in (["report"], ["verify"], ["doctor"], ["evaluate", "--json"]):
        command = [sys.executable, "-m", "reproml", *verb, "--run", name]
        shown = subprocess.run(command, env=setting, capture_output=True, check=False)
        assert shown.returncode == (1 if verb[0] in ("report", "verify") else 0), shown.stderr
        assert b"\x1b" not in shown.stdout + shown.stderr
    assert b"\x1b" not in Path(name + ".html").read_bytes()
    assert main(["diff", name, "none\x1b[2K"]) == 2


def test_too_deep_file_is_refused(at_work, capsys):
    with runs.reserve_run_folder(Path("run")) as save:
        save(tiny.run())
    record = json.loads(Path("run/run.json").read_text())
    deep = '{"a":' * 900 + "1" + "}" * 900
    text = json.dumps({**record, "deep": "DEEP"}).replace('"DEEP"', deep)
    Path("run/run.json").write_text(text.replace('"seed": 1', f'"seed": 1, "x": {deep}', 1))
    for verb in (["doctor", "--run", "run"], ["verify", "--run", "run"], ["diff", "run", "run"]):
        assert main(verb) in (0, 1, 2)
        assert "Traceback" not in capsys.readouterr().err


def test_python_m_reproml_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "reproml", "train", "--recipe", "nonesuch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 2 and shown.stderr.startswith("reproml: no recipe")


def test_lack_of_memory_is_reported_in_one_sentence(monkeypatch, capsys):
    def fail(recipe, shape, classes):
        return bytes(2**62) if recipe.seed else torch.empty(2**60)

    monkeypatch.setattr("reproml.pipeline.models.build_model", fail)
    command = ["train", *TINY, "--steps", "1"]
    assert "needs more memory than there is" in refused(command, capsys)
    tiny.toml(Path(), seed=0)
    assert "needs more memory than there is" in refused(command, capsys)
