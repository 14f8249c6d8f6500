from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reproml
from verification.subprocesses import environment

SCRIPT = """
import os, signal, sys
import numpy, random, torch
import reproml

torch.manual_seed(1); numpy.random.seed(2); random.seed(3)
data = torch.utils.data.TensorDataset(torch.randn(20, 5), torch.randint(3, (20,)))
loader = torch.utils.data.DataLoader(data, batch_size=6, shuffle=True)
model = torch.nn.Sequential(
    torch.nn.Linear(5, 9), torch.nn.BatchNorm1d(9), torch.nn.Dropout(0.3), torch.nn.Linear(9, 3)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, 24)
start, killed, losses = 0, int(sys.argv[1]), []
if os.path.exists("state.pt"):
    values = reproml.load("state.pt", model=model, optimizer=optimizer, scheduler=scheduler)
    start, losses = values["epoch"] + 1, values["losses"]
with reproml.exact():
    for epoch in range(start, 6):
        for x, y in loader:
            x = x + random.random() + numpy.random.rand()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if epoch == killed:
                os.kill(os.getpid(), signal.SIGKILL)
        values = {"epoch": epoch, "losses": losses}
        reproml.save("state.pt", model=model, optimizer=optimizer, scheduler=scheduler, **values)
print(reproml.digest(model), losses)
"""


def run(folder: Path, killed: int) -> tuple[int, str]:
    command = [sys.executable, "-c", SCRIPT, str(killed)]
    child = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True, check=False
    )
    return child.returncode, child.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_script_resumes_to_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", -1)
    assert whole[0] == 0
    for killed in (1, 4):
        assert run(tmp_path, killed) == (-signal.SIGKILL, "")
    assert run(tmp_path, -1) == whole
    assert sorted(os.listdir(tmp_path)) == ["state.pt", "whole"]


def parts() -> dict[str, Any]:
    model = torch.nn.Linear(2, 2)
    return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}


def test_generators_continue_where_they_were_saved(tmp_path):
    def draws() -> list[float]:
        found = [
            torch.rand(()),
            torch.randn(()),
            torch.randn(()),
        ]  # a pair: its second number is kept
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            *map(float, found),
        ]

    torch.randn(())
    reproml.save(tmp_path / "state", **parts(), epoch=7, names=["a", {"b": (1, 2.5)}])
    first = draws()
    assert reproml.load(tmp_path / "state", **parts()) == {
        "epoch": 7,
        "names": ["a", {"b": (1, 2.5)}],
    }
    assert draws() == first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_and_states_keep_their_dtypes(tmp_path, dtype):
    def make() -> dict[str, Any]:
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2).to(dtype)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.1)}

    def step(model: Any, optimizer: Any) -> None:
        model(torch.ones(3, dtype=dtype)).sum().backward()
        optimizer.step()

    saved, loaded = make(), make()
    step(**saved)
    reproml.save(tmp_path / "state", **saved)
    reproml.load(tmp_path / "state", **loaded)
    for each in (saved, loaded):
        each["optimizer"].zero_grad()
        step(**each)
    states = [list(each["optimizer"].state.values()) for each in (saved, loaded)]
    assert {x["exp_avg"].dtype for x in states[1]} == {dtype}
    assert reproml.digest(saved["model"]) == reproml.digest(loaded["model"])
    for x, y in zip(*states):
        assert reproml.digest(x) == reproml.digest(y)


def test_objects_must_be_those_that_were_saved(tmp_path):
    reproml.save(tmp_path / "state", **parts(), epoch=7)
    state = torch.get_rng_state()
    given = parts()
    before = reproml.digest(given["model"])
    for objects in ({"model": given["model"]}, {**given, "scheduler": given["model"]}, {}):
        with pytest.raises(
            reproml.ReproError, match="saved with the objects model, optimizer, not"
        ):
            reproml.load(tmp_path / "state", **objects)
    assert reproml.digest(given["model"]) == before
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("value", [lambda: 0, np.zeros(3), object()])
def test_other_values_are_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(reproml.ReproError, match="^thing cannot be saved"):
        reproml.save(tmp_path / "state", **parts(), thing=value)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    torch.save({"model": {}}, tmp_path / "other.pt")
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").touch()
    for name in ("other.pt", "text", "empty"):
        with pytest.raises(reproml.ReproError, match="was not written by reproml.save"):
            reproml.load(tmp_path / name)
    with pytest.raises(reproml.ReproError, match="cannot read .*: No such file"):
        reproml.load(tmp_path / "none")
    with pytest.raises(reproml.ReproError, match="cannot write"):
        reproml.save(tmp_path / "none" / "state")
