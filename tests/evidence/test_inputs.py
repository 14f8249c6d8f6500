"""`run --provenance`: which files of a script are in its provenance."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from reproml.cli import main
from reproml.digest import digest
from reproml.evidence.inputs import Inputs
from tests.evidence.statements import check_statement, parse

# Python compiles helper.py to a file of its own, which is not listed.
SCRIPT = """
import os, sys
import numpy as np, safetensors.torch, torch
from torch.utils.data import DataLoader, Dataset
import helper

class Rows(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        return torch.from_numpy(np.load(f"data/{i}.npy"))

torch.manual_seed(0)
workers = int(sys.argv[1])
context = "fork" if workers else None
rows = list(DataLoader(Rows(), num_workers=workers, multiprocessing_context=context))
start = safetensors.torch.load_file("start.safetensors")
inplace = np.memmap("inplace.bin", mode="r+", dtype="u1")
inplace[0] = 7
del inplace
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=helper.RATE)
for row in rows:
    model(row).sum().backward()
    optimizer.step()
open("notes.txt", "w").write("x"); open("notes.txt").read()
open("part", "w").write("x"); os.replace("part", "whole"); open("whole").read()
torch.save({"model": model.state_dict()}, "model.pt"); torch.load("model.pt")
safetensors.torch.save_file(model.state_dict(), "out.safetensors")
try:
    open("missing")
except FileNotFoundError:
    pass
"""


def sha256(path: Path) -> dict[str, str]:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for i in range(2):
        np.save(f"data/{i}.npy", np.arange(3, dtype="f4") + i)
    safetensors.torch.save_file({"a": torch.ones(1)}, "start.safetensors")
    Path("inplace.bin").write_bytes(b"1")
    Path("helper.py").write_text("RATE = 0.1\n")
    Path("train.py").write_text(SCRIPT)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reproml", "run", "--provenance", "p.json", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def dependencies(values: dict[str, Any], *kinds: str) -> dict[str, dict[str, str]]:
    listed = values["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {d["name"]: d["digest"] for d in listed if d["annotations"]["kind"] in kinds}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_provenance_lists_what_the_script_reads(workers):
    names = ["data/0.npy", "data/1.npy", "inplace.bin", "start.safetensors"]
    expected = {name: sha256(Path(name)) for name in names}  # before they are changed
    shown = run("--builder", "lab", "train.py", workers)
    assert shown.returncode == 0, shown.stderr
    raw = Path("p.json").read_bytes()
    values = check_statement(raw)
    parse(raw)
    assert dependencies(values, "data") == expected
    assert dependencies(values, "module") == {"helper.py": sha256(Path("helper.py"))}
    assert dependencies(values, "script") == {"train.py": sha256(Path("train.py"))}
    definition = values["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["arguments"] == [workers]
    assert definition["externalParameters"]["script"] == "train.py"
    state = {"reproml_digest_1": digest(safetensors.torch.load_file("out.safetensors"))}
    assert values["subject"] == [
        {"name": "model.pt['model']", "digest": state},
        {"name": "out.safetensors", "digest": {**state, **sha256(Path("out.safetensors"))}},
    ]
    assert values["predicate"]["runDetails"]["builder"]["id"] == "urn:reproml:builder:lab"


def test_script_reproduces_itself_in_another_folder(tmp_path, monkeypatch, capsys):
    assert run("--builder", "a", "train.py", "0").returncode == 0
    other = tmp_path / "other"
    (other / "data").mkdir(parents=True)
    for name in ["data/0.npy", "data/1.npy", "start.safetensors", "helper.py", "train.py"]:
        (other / name).write_bytes(Path(name).read_bytes())
    (other / "inplace.bin").write_bytes(b"1")
    monkeypatch.chdir(other)
    assert run("--builder", "b", str(other / "train.py"), "0").returncode == 0
    assert main(["reproduced", "../p.json", "p.json"]) == 0
    Path("data/0.npy").write_bytes(Path("data/1.npy").read_bytes())
    assert run("--builder", "b", "train.py", "0").returncode == 0
    assert main(["reproduced", "../p.json", "p.json"]) == 1
    assert "../p.json depends on the data data/0.npy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "subject"),
    [
        ("o = torch.optim.SGD(m.parameters(), lr=0.1); o.step()", "parameters of optimizer 1: SGD"),
        ("", "m"),
    ],
)
def test_subject_without_a_saved_file(script, subject):
    Path("train.py").write_text(f"import torch\nm = torch.nn.Linear(1, 1)\n{script}\n")
    assert run("--seed", "1", "train.py").returncode == 0
    values = check_statement(Path("p.json").read_bytes())
    assert [s["name"] for s in values["subject"]] == [subject]
    assert values["predicate"]["buildDefinition"]["externalParameters"]["seed"] == 1


def test_unseeded_generators_are_stated():
    Path("train.py").write_text("import torch\nm = torch.nn.Linear(1, 1)\n")
    assert run("train.py").returncode == 0
    values = check_statement(Path("p.json").read_bytes())
    internal = values["predicate"]["buildDefinition"]["internalParameters"]
    assert internal["unseeded"] == ["PyTorch's generator"]


def test_script_without_a_result_writes_no_provenance():
    Path("train.py").write_text("print(1)\n")
    shown = run("train.py")
    assert shown.returncode == 2 and "no provenance was written" in shown.stderr
    assert not Path("p.json").exists()


def test_failed_script_writes_no_provenance():
    Path("train.py").write_text("1 / 0\n")
    assert run("train.py").returncode == 1
    assert not Path("p.json").exists()


def test_workers_of_torchrun_are_refused(monkeypatch, capsys):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "::1",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["run", "--provenance", "p.json", "train.py", "0"]) == 2
    assert "--provenance records the training of one process" in capsys.readouterr().err


def test_nothing_is_recorded_afterwards():
    inputs = Inputs("train.py")
    with inputs.watching():
        Path("data/0.npy").read_bytes()
        os.path.exists("data/1.npy")
        with pytest.raises(IsADirectoryError):
            open("data")
        with open(os.open("inplace.bin", os.O_RDONLY)) as file:
            file.read()
    Path("data/1.npy").read_bytes()
    assert [d["name"] for d in inputs.dependencies()] == ["data/0.npy", "inplace.bin"]


def test_only_what_python_itself_reads_is_left_out(tmp_path, monkeypatch):
    read = ["data/x.pyc", "data/a.dist-info/METADATA", "data/b.egg-info/rows"]
    left_out = ["data/__pycache__/x.pyc", "cache/a/x.pyc", "packages/a.dist-info/METADATA"]
    monkeypatch.setattr(sys, "pycache_prefix", "cache")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    inputs = Inputs("train.py")
    for name in [*read, *left_out]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    with inputs.watching():
        for name in [*read, *left_out]:
            Path(name).read_text()
    assert {d["name"] for d in inputs.dependencies()} == set(read)


def test_link_and_bytes_are_names_too():
    Path("link").symlink_to("data/0.npy")
    inputs = Inputs("train.py")
    with inputs.watching():
        open(b"link").close()
    (found,) = inputs.dependencies()
    assert (found["name"], found["digest"]) == ("link", sha256(Path("data/0.npy")))
