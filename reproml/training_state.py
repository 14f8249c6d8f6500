"""Save and load everything that a script's training depends on, so that it resumes to the same bits."""

from __future__ import annotations

import io
import os
import pickle
import random
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch

from reproml.errors import ReproError
from reproml.files import read_regular, write_atomically

_FORMAT = "reproml training state 1"


def save(path: Union[str, os.PathLike[str]], **training: Any) -> None:
    """Save the objects of a training, and the states of the random generators.

        reproml.save("state.pt", model=model, optimizer=optimizer, scheduler=scheduler, epoch=epoch)

    An object with `state_dict` (a model, an optimizer, a scheduler, a gradient scaler, a data loader that
    can resume) is saved as its state dict, anything else as its value, which must consist of tensors,
    numbers, strings, lists, tuples and dicts. The generators are Python's, NumPy's global one and PyTorch's
    of the CPU and of all GPUs in use. The file is replaced at once: a killed process leaves the old one.

    Raises ReproError if the file cannot be written or a value is of another type.
    """
    for name, x in training.items():
        if not hasattr(x, "state_dict"):
            _refuse_unless_loadable(name, x)
    content = {
        "format": _FORMAT,
        "objects": {n: x.state_dict() for n, x in training.items() if hasattr(x, "state_dict")},
        "values": {n: x for n, x in training.items() if not hasattr(x, "state_dict")},
        "random": random_states(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        write_atomically(Path(path), buffer.getvalue())
    except OSError as error:
        raise ReproError(f"cannot write {path}: {error.strerror}") from None


def load(path: Union[str, os.PathLike[str]], **objects: Any) -> dict[str, Any]:
    """Load what `save` wrote into the objects, set the random generators, and return the values.

        epoch = reproml.load("state.pt", model=model, optimizer=optimizer, scheduler=scheduler)["epoch"]

    Call it after all objects are made, so that nothing draws random numbers between `load` and the next
    step. Objects stay on their devices.

    Raises ReproError if the file cannot be read, was not written by `save`, or was saved with other
    objects; then nothing has changed. An object that does not fit its state dict raises its own error.
    """
    try:
        content = torch.load(io.BytesIO(read_regular(Path(path))), "cpu", weights_only=True)
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None
    except Exception:  # a file of any other content
        content = None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ReproError(f"{path} was not written by reproml.save; give a file that was")
    if objects.keys() != content["objects"].keys():
        raise ReproError(
            f"{path} was saved with the objects {_names(content['objects'])}, not {_names(objects)}; "
            "give each that was saved, and no other, or the training would not resume to the same bits"
        )
    for name, x in objects.items():
        x.load_state_dict(content["objects"][name])
    set_random_states(content["random"])
    values: dict[str, Any] = content["values"]
    return values


def _names(objects: dict[str, Any]) -> str:
    return ", ".join(sorted(objects)) or "none"


def _refuse_unless_loadable(name: str, value: Any) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):
        raise ReproError(
            f"{name} cannot be saved: it has no state_dict, and is or holds something else than tensors, "
            "numbers, strings, lists, tuples and dicts; save it as one of these"
        ) from None


def random_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's global and PyTorch's generators, as torch.save takes them."""
    numpy = np.random.get_state(legacy=False)
    gpus = torch.cuda.is_initialized()
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if gpus else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the generators to what `random_states` returned."""
    random.setstate(states["python"])
    numpy = states["numpy"]
    keys = np.array(numpy["state"]["key"], np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": keys}})
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
