"""Choose the device that trains a recipe. The device is no part of a recipe: exact results are the same."""

from __future__ import annotations

import torch

from reproml.errors import ReproError
from reproml.torchrun import local_rank, this_worker

CPU = torch.device("cpu")


def choose_device(name: str) -> torch.device:
    """Return the device "cpu", "cuda" or "cuda:N"; "cuda" is a GPU of its own for each worker of torchrun.

    Raises ReproError if this machine lacks it.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "lacks CUDA"
        raise ReproError(
            f"--device {name}: there is no GPU that PyTorch {torch.__version__}, which {build}, can use; "
            "use --device cpu, or see `python -m torch.utils.collect_env`"
        )
    count, worker = torch.cuda.device_count(), this_worker()
    index = device.index or 0
    if worker.size > 1:
        if device.index is not None:
            raise ReproError(
                f"--device {name}: each of several workers needs a GPU of its own; use --device cuda"
            )
        index = local_rank()
    if index >= count:
        raise ReproError(
            f"--device {name}: there is no GPU {index}, as this machine has {count}, numbered from 0; "
            + ("start fewer workers" if worker.size > 1 else "choose another number")
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
