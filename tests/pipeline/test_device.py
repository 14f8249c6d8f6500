"""The option --device: what is refused where there is no GPU, and that a training stays on its device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from reproml import cli
from reproml.distributed import joined
from reproml.errors import ReproError
from reproml.pipeline import train as training
from reproml.pipeline.device import CPU, choose_device
from tests import tiny


@pytest.fixture
def gpus(monkeypatch):
    """Simulate a machine with two GPUs; the list holds the one that is chosen."""
    chosen: list[torch.device] = []
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.fixture
def worker(gpus, monkeypatch):
    """Make this process worker 4 of 8, number 1 on its machine."""
    given = {"WORLD_SIZE": "8", "RANK": "4", "LOCAL_RANK": "1"}
    for name, value in {**given, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_cpu_is_the_default():
    assert choose_device("cpu") == CPU == torch.device(cli.OPTIONS["--device"]["default"])


@pytest.mark.parametrize("name, index", [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_gpu_is_chosen(gpus, name, index):
    device = choose_device(name)
    assert device == torch.device("cuda", index) and gpus == [device]


def test_missing_gpu_is_refused(gpus):
    with pytest.raises(
        ReproError, match="no GPU 2, as this machine has 2, numbered from 0; choose"
    ):
        choose_device("cuda:2")


def test_each_worker_has_a_gpu_of_its_own(worker, monkeypatch):
    assert choose_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(ReproError, match="a GPU of its own; use --device cuda"):
        choose_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ReproError, match="no GPU 2.*start fewer workers"):
        choose_device("cuda")


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_workers_on_gpus_use_nccl(worker, monkeypatch, device, backend):
    def init_process_group(backend, timeout):
        raise RuntimeError(f"asked for {backend}")

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    with (
        pytest.raises(ReproError, match=f"asked for {backend}$"),
        joined(device=torch.device(device)),
    ):
        pass


@pytest.mark.parametrize("build, words", [("12.8", "is built for CUDA 12.8"), (None, "lacks CUDA")])
@pytest.mark.parametrize(
    "verb", [verb for verb in cli.VERBS if "--device" in cli.VERBS[verb].options]
)
def test_verbs_report_that_there_is_no_gpu(monkeypatch, capsys, tmp_path, verb, build, words):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert cli.main([verb, "--recipe", "digits-mlp", "--device", "cuda"]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert (
        f"--device cuda: there is no GPU that PyTorch {torch.__version__}, which {words}"
        in shown.err
    )


@pytest.mark.parametrize("name", ["mps", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda:٣"])
def test_unknown_device_is_a_usage_error(capsys, name):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--device", name])
    assert caught.value.code == 2 and "is not cpu, cuda or cuda:N" in capsys.readouterr().err


def test_scripts_choose_their_device_themselves(gpus, capsys):
    assert cli.main(["matrix", "--script", "train.py", "--device", "cuda"]) == 2
    assert "a script chooses its device itself" in capsys.readouterr().err


def test_training_stays_on_its_device(monkeypatch):
    """The device "meta" stands for a GPU: its tensors have no numbers, so nothing may read one."""
    meta = torch.device("meta")
    monkeypatch.setattr(training, "digest", lambda model: "")
    monkeypatch.setattr(training, "epoch_batches", lambda samples, size: [[0, 1], [2]])
    seen: list[torch.device] = []

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.extend([logits.device, labels.device])
        return torch.nn.functional.nll_loss(logits.log_softmax(1), labels)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy)
    model = training.train(tiny.recipe(), tiny.prepared(), "native", 1, device=meta).model
    assert {parameter.device for parameter in model.parameters()} == {meta} == set(seen)


def test_training_resumes_on_another_device(monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(training, "digest", lambda model: "")
    states = []
    training.train(
        tiny.recipe(), tiny.prepared(), steps=1, after_step=lambda t: states.append(t.state())
    )
    resumed = training.Training(tiny.recipe(), tiny.prepared(), meta)
    resumed.restore(states[0])
    assert resumed.done == 1
    tensors = resumed.state().tensors
    on_gpu = {name for name, tensor in tensors.items() if tensor.is_meta}
    # PyTorch keeps an optimizer's number of steps, like the generator's state, on the CPU.
    on_cpu = {name for name in tensors if name.startswith("random.") or name.endswith(".step")}
    assert on_gpu == set(tensors) - on_cpu and len(on_gpu) > 4
