"""Training with several workers gives the weights of a single process.

Some tests start processes that communicate over loopback; in most the workers are threads.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data.distributed import DistributedSampler

import reproml
from reproml import distributed
from reproml.cli import main
from reproml.distributed import DistributedDataParallel, joined
from reproml.errors import ReproError
from reproml.pipeline.train import train
from tests import tiny
from tests.arithmetic.distributed.together import together
from tests.test_torchrun import ADDRESS, set_variables
from verification.subprocesses import ROOT, environment


def launch(size: int, *arguments: str, folder: Path) -> list[tuple[int, str, str]]:
    """Start processes as torchrun does; return exit status, standard output and standard error of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=environment({**group, "RANK": str(rank), "OMP_NUM_THREADS": "1"}),
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        shown = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(children, shown)]


def test_recipe_writes_run_of_single_process(tmp_path):
    """Three workers, batches of 500 and 437 rows; only the first one prints and writes files."""
    recipe = str(tiny.toml(tmp_path))
    first, *others = launch(
        3, "-m", "reproml", "train", "--json", "--recipe", recipe, "--out", "run", folder=tmp_path
    )
    assert first[0] == 0, first
    assert json.loads(first[1])["items"] == json.loads(json.dumps(tiny.run().items))
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == tiny.run().weights
    assert [(status, out) for status, out, _ in others] == [(0, "")] * 2


def test_bfloat16_recipe_has_weights_of_single_process(tmp_path):
    arguments = ["train", "--recipe", str(tiny.toml(tmp_path, precision="bfloat16"))]
    shown = launch(3, "-m", "reproml", *arguments, "--out", "run", folder=tmp_path)
    assert [status for status, *_ in shown] == [0] * 3, shown
    alone = train(tiny.recipe(precision="bfloat16"), tiny.prepared())
    weights = safetensors.torch.load_file(tmp_path / "run" / "weights.safetensors")
    assert reproml.digest(weights) == reproml.digest(alone.model)


def test_example_has_same_digest_with_two_workers(tmp_path):
    expected = json.loads((ROOT / "tests" / "examples.json").read_text())["ddp"]
    arguments = ["--digest", "digest.json", str(ROOT / "examples" / "ddp.py"), "--steps", "2"]
    shown = launch(2, "-m", "reproml", "run", *arguments, folder=tmp_path)
    assert [status for status, *_ in shown] == [0, 0], shown
    result = json.loads((tmp_path / "digest.json").read_text())
    assert [o["parameters.sha256"] for o in result["optimizers"]] == expected


DIES = """
import os, sys
from reproml.cli import main
from torch.optim.optimizer import register_optimizer_step_post_hook
if os.environ["RANK"] == "1":
    register_optimizer_step_post_hook(lambda *_: os._exit(9))
sys.exit(main(["train", "--recipe", sys.argv[1], "--out", "run"]))
"""


def test_worker_that_dies_ends_the_others(tmp_path):
    first, second = launch(2, "-c", DIES, str(tiny.toml(tmp_path)), folder=tmp_path)
    assert (first[0], second[0]) == (2, 9)
    assert "\nreproml: a worker has ended or does not answer" in "\n" + first[2]
    assert not list(tmp_path.glob("*run*"))  # no incomplete run folder


def test_training_resumes_with_another_number_of_workers(tmp_path):
    """Two workers die after a checkpoint; three read the recipe from it and take the remaining steps."""
    died = DIES.replace('"run"]', '"run", "--checkpoint-every", "1"]')
    died = died.replace(
        "lambda *_: os._exit(9)", "lambda *_: steps.append(1) or steps[2:] and os._exit(9)"
    )
    died = died.replace("import os, sys", "import os, sys; steps = []")
    shown = launch(2, "-c", died, str(tiny.toml(tmp_path)), folder=tmp_path)
    assert [status for status, *_ in shown] == [2, 9]
    first, *others = launch(3, "-m", "reproml", "train", "--resume", "run", folder=tmp_path)
    assert first[0] == 0 and "from the checkpoint of step" in first[1], first
    assert [status for status, *_ in others] == [0, 0]
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == tiny.run().weights
    resume = ["train", "--resume", "run", "--checkpoint-every", "1"]
    again = launch(2, "-m", "reproml", *resume, folder=tmp_path)  # nothing is left to do
    assert [status for status, *_ in again] == [0, 0]
    assert "is already a finished run of tiny" in again[0][1]


def test_more_workers_than_rows_are_refused(monkeypatch):
    set_variables(monkeypatch, {"WORLD_SIZE": "65", "RANK": "0", **ADDRESS})
    with pytest.raises(ReproError, match="65 workers are too many for batches of 64 rows"):
        with joined(64):
            pass


def test_without_torchrun_no_process_group_is_initialized(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(1):
        assert not dist.is_initialized()
    model, batch = nn.Linear(1, 1), torch.ones(3, 1)
    assert distributed.wrap(model) is model and distributed.shard(batch) is batch


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A process group of PyTorch with one process."""
    store = torch._C._distributed_c10d.FileStore(str(tmp_path / "store"), 1)
    with distributed._stdout_to_stderr():
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps(model: Any, x: torch.Tensor, y: torch.Tensor) -> str:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return reproml.digest(getattr(model, "module", model))


def data() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, torch.randn(6, 4), torch.randint(3, (6,))


def test_wrapper_uses_process_group_of_pytorch(alone):
    """A group of one process exchanges as well; outside of exact() the wrapper is PyTorch's class."""
    with reproml.exact():
        model, x, y = data()
        expected = steps(copy.deepcopy(model), x, y)
        wrapped = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=True
        )
        with wrapped.no_sync():
            assert steps(wrapped, x, y) == expected
    with pytest.raises(ReproError, match="was called outside"):
        wrapped(x)
    plain: Any = type(DistributedDataParallel(model))
    assert plain is nn.parallel.DistributedDataParallel


def test_wrapper_with_two_workers_trains_as_one_process(monkeypatch):
    """Both start from the weights of worker 0; the rows are sharded round-robin."""
    with reproml.exact():
        model, x, y = data()
        expected = steps(copy.deepcopy(model), x, y)
    monkeypatch.setattr(distributed, "workers", lambda group: group)

    def work(me: Any) -> str:
        with reproml.exact():
            mine = copy.deepcopy(model) if me.rank == 0 else data()[0]
            wrapped = DistributedDataParallel(mine, process_group=me)
            assert steps(wrapped, x[me.rank :: 2], y[me.rank :: 2]) == expected
            wrapped.eval()
            with torch.no_grad():
                assert type(wrapped(x)) is torch.Tensor  # this worker's rows, as in PyTorch
            with pytest.raises(ReproError, match=r"have \[1, 3\] rows of the global batch of 4"):
                wrapped.train()(x[: 1 + 2 * me.rank])
            return reproml.digest(mine)

    assert together(2, work) == [expected] * 2


def test_inputs_with_different_row_counts_are_refused(alone):
    with reproml.exact():
        wrapped = DistributedDataParallel(nn.Bilinear(2, 2, 1))
        with pytest.raises(ReproError, match=r"have \[2, 3\] rows"):
            wrapped(torch.ones(2, 2), torch.ones(3, 2))


def test_input_that_requires_gradient_is_refused(alone):
    with reproml.exact():
        wrapped = DistributedDataParallel(nn.Linear(2, 1))
        with pytest.raises(reproml.NotExactError, match="requires a gradient, which would be lost"):
            wrapped(nn.Linear(2, 2)(torch.ones(3, 2)))


def test_optimizer_refuses_parameter_of_unwrapped_module(alone):
    with reproml.exact():
        wrapped, scale = DistributedDataParallel(nn.Linear(2, 2)), nn.Parameter(torch.ones([]))
        (wrapped(torch.ones(3, 2)) * scale).sum().backward()
        optimizer = torch.optim.SGD([scale], lr=0.1)
        with pytest.raises(reproml.NotExactError, match="wrap the module that owns this parameter"):
            optimizer.step()


def test_wrapper_of_pytorch_is_refused_in_exact(alone):
    with reproml.exact(), pytest.raises(reproml.NotExactError):
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        model(torch.ones(2, 2)).sum().backward()


def test_a_sampler_that_would_repeat_samples_is_refused():
    sampler: Any = DistributedSampler(range(10), num_replicas=4, rank=0)  # type: ignore[arg-type]
    assert len(list(sampler)) == 3  # PyTorch's own, outside
    with reproml.exact():
        with pytest.raises(
            ReproError, match=r"10 samples to 4 workers .*Subset\(data, range\(8\)\)"
        ):
            iter(sampler)
        fitting: Any = DistributedSampler(range(8), num_replicas=4, rank=0)  # type: ignore[arg-type]
        assert len(list(fitting)) == 2


def test_sent_bytes_are_counted(alone):
    workers = distributed.workers()
    workers.all_gather(torch.ones(4))
    assert workers.bytes_sent == 0  # to itself
    assert distributed.workers() is workers and os.environ.get("RANK") is None


@pytest.mark.parametrize(
    "verb", [["evaluate"], ["data"], ["matrix"], ["verify", "--run", "runs/x"]]
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_verb_without_training_is_refused_under_torchrun(monkeypatch, capsys, verb, rank):
    set_variables(monkeypatch, {"WORLD_SIZE": "2", "RANK": rank, **ADDRESS})
    assert main(verb) == 2
    assert f"reproml: {verb[0]} does not train" in capsys.readouterr().err


def test_micro_batches_are_refused_under_torchrun(monkeypatch, capsys):
    set_variables(monkeypatch, {"WORLD_SIZE": "2", "RANK": "0", **ADDRESS})
    assert main(["train", "--micro-batch", "7"]) == 2
    assert "--micro-batch is for the training of one process" in capsys.readouterr().err
