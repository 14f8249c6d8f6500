"""Tests for reproml.doctor; those of the self-test are in tests/arithmetic/test_selftest.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reproml import doctor
from reproml.arithmetic import selftest
from reproml.arithmetic.selftest import Fault
from reproml.cli import main
from reproml.pipeline.run import reserve_run_folder
from tests import tiny

FAULT = Fault("torch.add, element 3,", ["0x1p+0", "0x1p-24"], "0x1p+0", "0x1.000002p+0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with reserve_run_folder(tmp_path / "run") as save:
        save(tiny.run())
    return tmp_path / "run"


def change(folder: Path, group: str, **facts: object) -> None:
    """Change facts in the record of a run."""
    record = json.loads((folder / "run.json").read_text())
    record[group].update(facts)
    (folder / "run.json").write_text(json.dumps(record))


def use_checks(monkeypatch, *checks: object) -> None:
    monkeypatch.setattr(selftest, "CHECKS", {f"assumption {i}": c for i, c in enumerate(checks)})


def failing_check() -> None:
    raise FAULT


def test_differences_of_a_local_run_are_empty(folder):
    assert doctor.differences(folder) == []


def test_differences_list_both_values(folder, monkeypatch):
    change(folder, "torch", threads=99, capability="NEON", new="1.50")
    change(folder, "variables", MKL_CBWR="COMPATIBLE")
    monkeypatch.setenv("OMP_SCHEDULE", "static")
    here = doctor.here()
    assert [(d.fact, d.run, d.here) for d in doctor.differences(folder)] == [
        ("torch.capability", "NEON", here["torch.capability"]),
        ("torch.threads", "99", here["torch.threads"]),
        ("variables.OMP_SCHEDULE", "not set", "static"),
        ("torch.new", "1.50", "not recorded"),
        ("variables.MKL_CBWR", "COMPATIBLE", "not set"),
    ]


def test_differences_report_facts_not_recorded(folder):
    record = json.loads((folder / "run.json").read_text())
    del record["arithmetic"], record["torch"]["blas"]
    (folder / "run.json").write_text(json.dumps(record))
    found = [(d.fact, d.run) for d in doctor.differences(folder)]
    assert found == [("arithmetic.compiled_loops", "not recorded"), ("torch.blas", "not recorded")]


def test_json_has_facts_differences_and_assumptions(folder, capsys, monkeypatch):
    use_checks(monkeypatch, lambda: None, lambda: "slower")
    assert main(["doctor", "--run", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["healthy"] is True and result["differences"] == []
    assert result["facts"] == doctor.here()
    held = {"holds": True, "fault": None}
    assert result["assumptions"] == [
        {"name": "assumption 0", "note": "", **held},
        {"name": "assumption 1", "note": "slower", **held},
    ]


def test_doctor_succeeds_when_only_facts_differ(folder, capsys, monkeypatch):
    use_checks(monkeypatch, lambda: None)
    change(folder, "machine", cpu="another")
    assert main(["doctor", "--run", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"1 of these facts differ from those that {folder} recorded:" in lines
    assert any(line.startswith("machine.cpu ") and "in the run another" in line for line in lines)
    assert lines[-1] == "1 assumptions tested: all hold on this machine"


def test_doctor_reports_a_broken_assumption(capsys, monkeypatch):
    use_checks(monkeypatch, lambda: "slower", failing_check)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "ok       assumption 0: slower",
        "BROKEN   assumption 1: torch.add, element 3, of 0x1p+0, 0x1p-24: "
        "expected 0x1p+0, found 0x1.000002p+0",
        "2 assumptions tested: 1 failed; do not rely on any hash from this machine",
    ]
    assert main(["doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["healthy"], result["differences"]) == (False, None)
    assert result["assumptions"][1] == {
        "name": "assumption 1",
        "holds": False,
        "note": "",
        "fault": {"message": str(FAULT), **vars(FAULT)},
    }


def test_doctor_rejects_a_folder_without_record(tmp_path, capsys):
    assert main(["doctor", "--run", str(tmp_path)]) == 2
    assert "it has no run.json" in capsys.readouterr().err
