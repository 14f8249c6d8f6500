from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reproml import matrix
from reproml.cli import main
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline.train import train
from tests import tiny


def names(settings: list[matrix.Setting]) -> list[str]:
    return [setting.name for setting in settings]


@pytest.mark.parametrize(
    ("capability", "mkl", "missing"),
    [
        ("AVX512", True, []),
        ("AVX2", True, ["ATEN_CPU_CAPABILITY=avx512"]),
        ("AVX2", False, ["ATEN_CPU_CAPABILITY=avx512", "MKL"]),
        ("DEFAULT", False, ["ATEN_CPU_CAPABILITY=avx", "MKL"]),
    ],
)
def test_offered_settings_depend_on_machine(monkeypatch, capability, mkl, missing):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    expected = [n for n in names(matrix.SETTINGS) if not n.startswith(tuple(missing))]
    assert names(matrix.offered()) == expected


def test_settings_are_those_documented():
    assert names(matrix.SETTINGS) == [
        "ATEN_CPU_CAPABILITY=default",
        "ATEN_CPU_CAPABILITY=avx2",
        "ATEN_CPU_CAPABILITY=avx512",
        "1 thread",
        "2 threads",
        "7 threads",
        "MKL_CBWR=COMPATIBLE",
        "MKL_ENABLE_INSTRUCTIONS=SSE4_2",
        "MKL_ENABLE_INSTRUCTIONS=AVX2",
    ]


def test_setting_takes_effect_in_fresh_process():
    """PyTorch must still interpret the variables as the table expects."""
    script = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    variables = {
        **matrix._variable("ATEN_CPU_CAPABILITY", "default").variables,
        **matrix._threads(7).variables,
    }
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert shown[-1] == "7" and not shown[0].startswith("AVX")  # "DEFAULT" or "NO AVX"


def test_every_process_has_same_exact_hash(tmp_path):
    expected = digest(train(tiny.recipe(), tiny.prepared(), steps=2).model)
    rows: list[matrix.Row] = []
    settings = matrix.SETTINGS[:1]  # the default capability: no FMA, as on another CPU
    matrix.run_recipe(str(tiny.toml(tmp_path)), 2, settings=settings, on_row=rows.append)
    assert [row.setting for row in rows] == names(settings)
    assert {row.exact for row in rows} == {expected}
    assert all(len(row.native) == 64 and row.native != expected for row in rows)


def test_gpu_adds_rows_that_train_on_it():
    on_gpu = [s for s in matrix.offered(device="cuda:1") if s.device == "cuda:1"]
    assert [s.name for s in on_gpu] == ["cuda:1", "cuda:1, TF32"]
    assert not [s for s in matrix.offered() if s.device != "cpu"]


def test_process_gets_only_its_own_setting(monkeypatch):
    calls = []

    def fake(command, env, **options):
        calls.append((command, env))
        output = json.dumps({"weights.state_dict.sha256": "0"})
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setattr(subprocess, "run", fake)
    matrix.run_recipe("tiny", 5, Path("folder"), [matrix._threads(7)])
    commands = [command[1:] for command, _ in calls]
    common = (
        "-m reproml train --json --recipe tiny --steps 5 --numerics {} --device cpu --data folder"
    )
    assert commands == [common.format(n).split() for n in ("native", "exact")]
    for _, env in calls:
        assert env["OMP_NUM_THREADS"] == "7" and "MKL_CBWR" not in env


def test_worker_counts_are_started_by_torchrun(monkeypatch, capsys, tmp_path):
    commands = []

    def fake(command, **options):
        commands.append(command[1:])
        digest = "a" if "exact" in command else f"n{len(commands)}"
        output = json.dumps({"weights.state_dict.sha256": digest})
        return subprocess.CompletedProcess(command, 0, output, "")

    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setattr(matrix, "SETTINGS", [])
    recipe = str(tiny.toml(tmp_path))
    assert main(["matrix", "--recipe", recipe, "--steps", "1", "--workers", "1,3"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^1 worker +n1 +a\n3 workers +n3 +a$", shown, re.M)
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 3 -m reproml train"
    assert commands[2][:8] == torchrun.split()


@pytest.mark.parametrize("counts", ["0", "1,x", ""])
def test_worker_count_is_positive_integer(counts, capsys):
    with pytest.raises(SystemExit):
        main(["matrix", "--workers", counts])
    assert "is not a positive integer" in capsys.readouterr().err


def test_torchrun_output_does_not_hide_cause(monkeypatch):
    errors = "reproml: no such recipe\nTraceback\nChildFailedError\n====\n"
    failed = subprocess.CompletedProcess([], 1, "", errors)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ReproError, match="2 workers and native numerics failed: .*no such recipe"):
        matrix.run_recipe("tiny", 1, settings=[matrix._workers(2)])


def test_failed_training_names_setting(tmp_path):
    with pytest.raises(ReproError, match="1 thread and native numerics failed: .*no such file"):
        matrix.run_recipe(str(tmp_path / "none.toml"), 1, settings=[matrix._threads(1)])


@pytest.mark.parametrize(("hashes", "status"), [("aa", 0), ("ab", 1)])
def test_exit_status_requires_one_exact_hash(monkeypatch, capsys, tmp_path, hashes, status):
    def fake(setting, recipe, steps, data_folder, numerics):
        assert steps == 6  # all: 2 epochs of 3 batches
        return numerics + setting.name if numerics == "native" else hashes[setting.name[0] == "7"]

    monkeypatch.setattr(matrix, "_train", fake)
    monkeypatch.setattr(matrix, "offered", lambda *asked: [matrix._threads(1), matrix._threads(7)])
    recipe = str(tiny.toml(tmp_path))
    assert main(["matrix", "--recipe", recipe]) == status
    shown = capsys.readouterr().out
    assert "different hashes                 2                " + str(1 + status) in shown
    assert main(["matrix", "--recipe", recipe, "--json", "--steps", "100"]) == status
    result = json.loads(capsys.readouterr().out)
    assert (result["native_hashes"], result["exact_hashes"]) == (2, 1 + status)


SCRIPT = """
import sys, torch
p = torch.nn.Parameter(torch.ones(int(sys.argv[1])))
for optimizer in [torch.optim.SGD([p], lr=1.0) for _ in range(int(sys.argv[2]))]:
    p.grad = torch.ones_like(p)
    optimizer.step()
"""


def test_script_row_digests_stepped_parameters(tmp_path):
    (tmp_path / "a script.py").write_text(SCRIPT)
    command = f"'{tmp_path}/a script.py' 3 {{}}"
    rows: list[matrix.Row] = []
    settings = [matrix._threads(1)]
    assert matrix.run_script(command.format(1), settings, rows.append) == rows
    one = digest({"0": torch.zeros(3)})
    assert rows == [matrix.Row("1 thread", one, one)]
    [two] = matrix.run_script(command.format(2), settings)
    both = 2 * (digest({"0": -torch.ones(3)}) + "\n")  # the same parameters, stepped by two
    assert two.exact == hashlib.sha256(both.encode()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("3 0", "neither stepped an optimizer nor saved"), ("x 1", "native numerics failed: .*'x'")],
)
def test_script_without_digest_is_refused(tmp_path, arguments, words):
    (tmp_path / "script.py").write_text(SCRIPT)
    with pytest.raises(ReproError, match=words):
        matrix.run_script(f"{tmp_path}/script.py {arguments}", [matrix._threads(1)])


def test_script_command_with_open_quote_is_refused():
    with pytest.raises(ReproError, match="No closing quotation"):
        matrix.run_script("'train.py", [])


def test_matrix_runs_a_script(monkeypatch, capsys):
    def fake(setting, words, numerics):
        assert words == ["train.py", "--steps", "5"]
        return numerics

    monkeypatch.setattr(matrix, "_run_script", fake)
    monkeypatch.setattr(matrix, "offered", lambda *asked: [matrix._threads(1), matrix._threads(7)])
    command = "train.py --steps 5"
    assert main(["matrix", "--script", command, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{command}: SHA-256 of all it trained and saved")
    result = json.loads(captured.out)
    assert (result["script"], result["exact_hashes"], len(result["settings"])) == (command, 1, 2)
    assert main(["matrix", "--script", "train.py", "--steps", "5"]) == 2
    assert "--steps is for recipes" in capsys.readouterr().err
