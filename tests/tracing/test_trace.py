from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

import reproml
from reproml.cli import main
from reproml.errors import ReproError
from reproml.pipeline.run import RUN, TRACE
from reproml.tracing.chain import Reader
from reproml.tracing.fingerprint import fingerprints
from tests import tiny
from verification.subprocesses import Reproml


def entries(path: Path, kind: str = "") -> list[dict[str, Any]]:
    return [e for e in Reader(path) if kind in ("", e["entry"])]


def small() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(1)
    data = TensorDataset(torch.rand(12, 4), torch.randint(3, (12,)))
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, DataLoader(data, batch_size=4, shuffle=True)


def steps(model, loader, optimizer, epochs=2, each=lambda *seen: None) -> None:
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            each(x, y, loss, gradients, [p.clone() for p in model.parameters()])


@pytest.mark.parametrize("numerics", ["exact", "native"])
@pytest.mark.parametrize("inside", [False, True])
def test_step_has_fingerprints_of_its_tensors(tmp_path, numerics, inside):
    seen: list[Any] = []
    exact = reproml.exact if numerics == "exact" else torch.enable_grad
    trace = reproml.trace(tmp_path / "trace")
    with exact() if inside else trace, trace if inside else exact():
        model, loader = small()
        before = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps(model, loader, optimizer, each=lambda *args: seen.append(args))

    (first,) = entries(tmp_path / "trace", "optimizer")
    assert (first["kind"], first["numerics"]) == ("SGD", numerics)
    assert first["tensors"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert first["shapes"] == [[5, 4], [5], [3, 5], [3]]
    assert first["weights"] == fingerprints(list(before.parameters()))
    assert first["weights.sha256"] == reproml.digest(before)
    assert first["settings"][0]["lr"] == "0.1"

    found = entries(tmp_path / "trace", "step")
    assert [(e["epoch"], e["step"]) for e in found] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 4),
        (2, 5),
        (2, 6),
    ]
    for entry, (x, y, loss, gradients, weights) in zip(found, seen):
        assert [f for f, _ in entry["batch"]] == fingerprints([x, y])
        assert entry["loss"] == [repr(loss.item())]
        assert entry["gradients"] == fingerprints(gradients)
        assert entry["weights"] == fingerprints(weights)
        assert entry["sample"] == weights[-1].tolist()

    ends = [e for e in entries(tmp_path / "trace") if e["entry"] in ("epoch", "end")]
    assert [(e["entry"], e["epoch"], e["step"]) for e in ends] == [
        ("epoch", 1, 3),
        ("epoch", 2, 6),
        ("end", 2, 6),
    ]
    assert ends[-1]["weights.sha256"] == [reproml.digest(model)]


@pytest.mark.parametrize("level", ["epoch", "step", "op"])
@pytest.mark.parametrize("numerics", ["exact", "native"])
def test_trace_changes_no_bit_and_is_deterministic(tmp_path, level, numerics):
    from reproml.pipeline.train import train

    plain = train(tiny.recipe(), tiny.prepared(), numerics)
    for name in ("a", "b"):
        with reproml.trace(tmp_path / name, level):
            traced = train(tiny.recipe(), tiny.prepared(), numerics)
        assert reproml.digest(traced.model) == reproml.digest(plain.model)
    assert [traced.epochs, traced.initial_state_dict_sha256] == [
        plain.epochs,
        plain.initial_state_dict_sha256,
    ]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_everything_is_restored(tmp_path):
    torch_optimizers: Any = sys.modules["torch.optim.optimizer"]

    def places() -> list[Any]:
        return [
            nn.Module.__call__,
            torch.autograd.backward,
            _BaseDataLoaderIter.__next__,
            len(torch_optimizers._global_optimizer_pre_hooks),
            len(torch_optimizers._global_optimizer_post_hooks),
            torch._C._len_torch_dispatch_stack(),
        ]

    before = places()
    for _ in range(2):
        with pytest.raises(KeyError), reproml.trace(tmp_path / "trace", "op"):
            assert all(x != y for x, y in zip(places(), before))
            raise KeyError
        assert places() == before


def test_line_is_written_after_its_step(tmp_path):
    counts = []
    with reproml.trace(tmp_path / "trace"):
        model, loader = small()
        steps(
            model,
            loader,
            torch.optim.SGD(model.parameters(), lr=0.1),
            each=lambda *args: counts.append(len(entries(tmp_path / "trace", "step"))),
        )
    assert counts == [1, 2, 3, 4, 5, 6]


def test_several_optimizers(tmp_path):
    torch.manual_seed(1)
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    first = torch.optim.SGD(generator.parameters(), lr=0.1)
    second = torch.optim.Adam(critic.parameters())
    noise = torch.rand(4, 2)
    with reproml.trace(tmp_path / "trace"):
        for _ in range(2):
            for optimizer in (second, first):  # in the order of their first step
                optimizer.zero_grad()
                critic(generator(noise)).sum().backward()
                optimizer.step()
    kinds = [(e["kind"], e["tensors"]) for e in entries(tmp_path / "trace", "optimizer")]
    assert [kind for kind, _ in kinds] == ["Adam", "SGD"]
    found = entries(tmp_path / "trace", "step")
    assert [e["optimizer"] for e in found] == [0, 1, 0, 1]
    assert all([f for f, _ in e["batch"]] == fingerprints([noise]) for e in found)
    assert found[-1]["weights"] == fingerprints(list(generator.parameters()))


def test_evaluation_and_unused_batches_leave_nothing(tmp_path):
    def run(path: Path, evaluate: bool) -> None:
        with reproml.trace(path):
            model, loader = small()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                if evaluate:
                    state = torch.get_rng_state()
                    with torch.no_grad():
                        for batch in loader:
                            model(batch[0])
                    torch.set_rng_state(state)
                steps(model, loader, optimizer, 1)

    run(tmp_path / "a", False)
    run(tmp_path / "b", True)
    assert entries(tmp_path / "a") == entries(tmp_path / "b")


def test_gradients_of_several_batches_in_one_step(tmp_path):
    with reproml.trace(tmp_path / "trace"):
        model, loader = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = []
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            batches += [x, y]
        optimizer.step()
    (entry,) = entries(tmp_path / "trace", "step")
    assert [f for f, _ in entry["batch"]] == fingerprints(batches) and len(entry["loss"]) == 3


def test_gradients_without_backward(tmp_path):
    model, loader = small()
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    with reproml.trace(tmp_path / "trace") as recorder:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients):
                parameter.grad = gradient
            optimizer.step()
            seen.append(fingerprints([x, y]))
            assert not recorder._inputs  # no batch is kept for ever
    found = entries(tmp_path / "trace", "step")
    assert [[f for f, _ in e["batch"]] for e in found] == seen
    assert all(e["loss"] == [] for e in found)


def test_epoch_level_has_the_weights_only(tmp_path):
    with reproml.trace(tmp_path / "trace", "epoch"):
        model, loader = small()
        steps(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    found = entries(tmp_path / "trace")
    assert [e["entry"] for e in found] == ["optimizer", "epoch", "epoch", "end"]
    assert found[-1]["weights.sha256"] == [reproml.digest(model)]


@pytest.mark.parametrize("numerics", ["exact", "native"])
def test_op_level_names_operator_and_lines(tmp_path, numerics):
    source = (
        "linear = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)\n"
        "x = torch.ones(3, 2)\n"
        "y = linear(x)\n"
        "z = y.sum()\n"
        "z.backward()\n"
        "optimizer.step()\n"
    )
    code = compile(source, "script.py", "exec")
    exact = reproml.exact if numerics == "exact" else torch.enable_grad
    with reproml.trace(tmp_path / "trace", "op"), exact():
        exec(code, {"torch": torch})
    found = entries(tmp_path / "trace", "op")
    lines = {e["op"]: e["line"] for e in found if "backward" not in e}
    assert lines["aten.uniform_"] == "script.py:1"
    assert lines["aten.addmm"] == "script.py:4" and lines["aten.sum"] == "script.py:5"
    backward = {(e["op"], e["backward"], e["line"]) for e in found if "backward" in e}
    assert ("aten.mm", "AddmmBackward0", "script.py:4") in backward
    (addmm,) = [e for e in found if e["op"] == "aten.addmm"]
    assert addmm["shapes"] == ["float32[3, 2]"] and len(addmm["in"]) >= 3


class Computing(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return torch.full((4,), float(i)) * 2, i % 3


def test_workers_do_not_write_to_the_trace(tmp_path):
    for workers in (0, 2):
        with reproml.trace(tmp_path / "trace", "op"):
            model, _ = small()
            loader: DataLoader = DataLoader(Computing(), 4, num_workers=workers)
            steps(model, loader, torch.optim.SGD(model.parameters(), lr=0.1), 1)
        names = {e["op"] for e in entries(tmp_path / "trace", "op")}
        assert ("aten.mul" in names) == (workers == 0) and "aten.addmm" in names


def test_uninitialised_memory_is_no_difference(tmp_path):
    for name in ("a", "b"):
        keep = [torch.rand(1000) for _ in range(5)]  # so that other memory is handed out
        del keep
        with reproml.trace(tmp_path / name, "op"):
            torch.empty(1000).detach().fill_(1.0)
    assert entries(tmp_path / "a") == entries(tmp_path / "b")


@pytest.mark.parametrize("level", ["step", "epoch"])
@pytest.mark.parametrize("at", [3, 4])  # an epoch's end; within one
def test_resumed_training_has_uninterrupted_trace(tmp_path, at, level):
    """With a checkpoint of all that counts, the training's loop skips the batches that were done."""

    def train(path: Path, checkpoint: dict, stop: int) -> None:
        with reproml.trace(path, level, resume=checkpoint.get("head")) as recorder:
            model, loader = small()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            if checkpoint:
                model.load_state_dict(checkpoint["model"])
                optimizer.load_state_dict(checkpoint["optimizer"])
                torch.set_rng_state(checkpoint["random"])
            done = checkpoint.get("step", 0)
            for epoch in range(done // 3, 2):
                random = torch.get_rng_state()
                for i, (x, y) in enumerate(loader):
                    if epoch * 3 + i < done:
                        continue
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    if epoch * 3 + i + 1 == stop and stop % 3:
                        break
                if epoch * 3 + i + 1 == stop:
                    checkpoint.update(
                        model=copy.deepcopy(model.state_dict()),
                        optimizer=copy.deepcopy(optimizer.state_dict()),
                        random=random if stop % 3 else torch.get_rng_state(),
                        step=stop,
                        head=json.loads(json.dumps(recorder.head())),
                    )
                    if stop < 6:
                        raise KeyboardInterrupt

    train(tmp_path / "single", {}, 6)
    checkpoint: dict = {}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", checkpoint, at)
    train(tmp_path / "parts", checkpoint, 6)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "single").read_bytes()


def test_one_trace_at_a_time(tmp_path):
    with reproml.trace(tmp_path / "a"):
        with (
            pytest.raises(ReproError, match="recording a trace already"),
            reproml.trace(tmp_path / "b"),
        ):
            pass
    with (
        pytest.raises(ValueError, match="level must be one of"),
        reproml.trace(tmp_path / "c", "x"),
    ):
        pass
    assert os.listdir(tmp_path) == ["a"]


# --- on the command line ----------------------------------------------------------------------------


def test_traced_recipe_has_trace_in_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tiny.toml(tmp_path)
    path.write_text('trace = "step"\n' + path.read_text())
    for _ in range(2):  # the second replaces the first
        assert main(["train", "--recipe", "./tiny.toml"]) == 0
    header = Reader(tmp_path / "runs/tiny" / TRACE).header
    assert header["recipe.sha256"] == tiny.recipe().sha256
    assert json.loads((tmp_path / "runs/tiny" / RUN).read_text())["recipe"]["trace"] == "step"
    found = entries(tmp_path / "runs/tiny" / TRACE, "step")
    assert [e["epoch"] for e in found] == [1, 1, 1, 2, 2, 2]
    assert all(len(e["batch"]) == 2 for e in found)  # images and labels
    ends = entries(tmp_path / "runs/tiny" / TRACE, "epoch")
    sha256s = [tiny.run().items[f"epoch.{i}.state_dict.sha256"] for i in (1, 2)]
    assert [e["weights.sha256"] for e in ends] == [[sha256] for sha256 in sha256s]
    assert os.listdir("runs") == ["tiny"]
    capsys.readouterr()


def test_train_and_run_take_trace_file(tmp_path, monkeypatch):
    tiny.toml(tmp_path)
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "torch.manual_seed(1)\n"
        "x = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.SGD(x.parameters(), lr=1)\n"
        "x(torch.ones(2)).sum().backward()\n"
        "optimizer.step()\n"
    )
    with Reproml() as reproml_in:
        shown = reproml_in(
            tmp_path, "train", "--recipe", "./tiny.toml", "--steps", "2", "--trace", "a"
        )
        assert (shown.returncode, shown.stderr) == (0, "")
        shown = reproml_in(tmp_path, "run", "--trace", "b", "script.py", "--trace", "c")
        assert (shown.returncode, shown.stderr) == (0, "")
    assert [e["step"] for e in entries(tmp_path / "a", "step")] == [1, 2]
    assert [e["numerics"] for e in entries(tmp_path / "b", "optimizer")] == ["exact"]
    assert not (tmp_path / "c").exists()


# --- over a resume ----------------------------------------------------------------------------------


def asks_for_a_trace(folder: Path, level: str) -> None:
    path = tiny.toml(folder)
    path.write_text(f'trace = "{level}"\n' + path.read_text())


TINY = ["--recipe", "./tiny.toml", "--checkpoint-every", "1"]


@pytest.mark.parametrize("numerics", ["exact", "native"])
@pytest.mark.parametrize("level", ["epoch", "step", "op"])
@pytest.mark.parametrize("stops", [[3], [2, 4], [6]])  # an epoch's end; within, twice; the last
def test_resumed_run_has_uninterrupted_trace(tmp_path, monkeypatch, numerics, level, stops):
    """Entry by entry and head by head: all the file is the same but for the header."""
    monkeypatch.chdir(tmp_path)
    asks_for_a_trace(tmp_path, level)
    more = ["--numerics", numerics]
    assert main(["train", *TINY, *more, "--out", "single"]) == 0
    tiny.begin(monkeypatch, *TINY, *more, "--out", "parts", until=stops[0])
    for stop in stops[1:]:
        tiny.begin(monkeypatch, "--resume", "parts", *more, until=stop)
    assert Path(".parts.trace.jsonl").exists()
    assert main(["train", "--resume", "parts", *more]) == 0
    single, parts = (
        (tmp_path / name / TRACE).read_bytes().splitlines()[1:] for name in ("single", "parts")
    )
    assert parts == single and len(single) > 3
    assert sorted(os.listdir()) == ["parts", "single", "tiny.toml"]


def test_named_trace_file_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    assert main(["train", *TINY, "--out", "single", "--trace", "a"]) == 0
    tiny.begin(monkeypatch, *TINY, "--trace", "b", until=4)
    with Path("b").open("ab") as file:
        file.write(b'{"entry":"step",')  # killed in the next one
    assert main(["train", "--resume", "runs/tiny", "--trace", "b"]) == 0
    assert entries(tmp_path / "a") == entries(tmp_path / "b")


def test_unresumable_trace_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    tiny.begin(monkeypatch, *TINY, "--trace", "a", until=4)
    checkpoints = sorted(os.listdir("runs/tiny.checkpoints"))
    raw = Path("a").read_bytes()
    lines = raw.splitlines(keepends=True)
    flipped = raw.replace(b'"step":2', b'"step":9')
    for name, content, message in (
        ("none", b"", "cannot resume trace none: file not found; restore it, resume without"),
        (
            "short",
            b"".join(lines[:-1]),
            "cannot resume trace short: it does not contain the checkpoint's entry 6",
        ),
        ("flipped", flipped, "flipped is damaged: entry 3 (line 4) is not what was written"),
    ):
        if content:
            Path(name).write_bytes(content)
        capsys.readouterr()
        assert main(["train", "--resume", "runs/tiny", "--trace", name]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not content or Path(name).read_bytes() == content
    assert sorted(os.listdir("runs/tiny.checkpoints")) == checkpoints
    capsys.readouterr()
    tiny.begin(monkeypatch, "--resume", "runs/tiny", until=5)
    assert "no longer traced, as --trace is left out" in capsys.readouterr().out
    assert main(["train", "--resume", "runs/tiny", "--trace", "a"]) == 2
    assert "without a trace, so a trace cannot resume there" in capsys.readouterr().err
    assert Path("a").read_bytes() == raw


def test_kill_while_saving_keeps_the_trace(tmp_path, monkeypatch):
    """The checkpoints are still there then, and need it."""
    monkeypatch.chdir(tmp_path)
    asks_for_a_trace(tmp_path, "step")
    for place in (
        "reproml.pipeline.run._publish",
        "reproml.pipeline.checkpoint.Checkpoints.delete",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, lambda *args: os.kill(os.getpid(), signal.SIGINT))
            assert main(["train", *TINY, "--resume", "runs/tiny"]) == 130
        assert main(["train", *TINY, "--resume", "runs/tiny"]) == 0
        assert len(entries(tmp_path / "runs/tiny" / TRACE, "step")) == 6
        shutil.rmtree("runs/tiny")
