"""Describe how a step is computed, beside its numbers: the settings that explain why two trainings differ.

Nothing here runs an operator or draws a random number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from reproml.arithmetic import state
from reproml.torch_internals import is_compiled

INPUT = "a module's input "  # before the description of a tensor that no data loader returned


# The settings of a data loader that affect its batches.
LOADER = (
    "dataset samples batch_size drop_last sampler generator collate_fn num_workers persistent_workers "
    "worker_init_fn"
).split()


def loader(of: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of a data loader, by the names in `LOADER`."""
    sampler = of.sampler
    if of.batch_size is None and of.batch_sampler is not None:
        sampler = of.batch_sampler
    values = (
        type(of.dataset).__name__,
        None if isinstance(of.dataset, IterableDataset) else _length(of.dataset),
        None if of.batch_size is None else int(of.batch_size),
        bool(of.drop_last),
        type(sampler).__name__,
        of.generator is not None,
        _name(of.collate_fn),
        int(of.num_workers),
        bool(of.persistent_workers),
        _name(of.worker_init_fn),
    )
    return dict(zip(LOADER, values))


def _length(dataset: Any) -> Optional[int]:
    """Return the length of a data set; None if it has none, or a method of the user's that fails."""
    try:
        return len(dataset)
    except Exception:
        return None


def process() -> tuple[Any, ...]:
    """Return the seed, the threads and the precision; of these exact results depend on the seed only."""
    if state.active.depth:
        return (torch.initial_seed(),)
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by a newer interface
        precision = "unknown"
    return torch.initial_seed(), torch.get_num_threads(), precision


class Call(NamedTuple):
    """How a module is called."""

    training: bool
    on_cpu: bool  # whether autocast is on
    on_cuda: bool


def call(module: nn.Module) -> Call:
    """Describe a call of a module that happens now."""
    autocast = torch.is_autocast_enabled
    return Call(module.training, autocast("cpu"), autocast("cuda"))


def calls(of: Mapping[nn.Module, Call]) -> dict[str, Any]:
    """Describe the calls of several modules in a step, such as the model and the loss."""
    found = list(of.values())
    devices = ["cuda"] * any(c.on_cuda for c in found) + ["cpu"] * any(c.on_cpu for c in found)
    return {
        "training": all(c.training for c in found),
        "autocast": str(torch.get_autocast_dtype(devices[0])) if devices else "off",
        "compiled": any(is_compiled(module) for module in of),
    }


def tensor(x: Tensor) -> str:
    """Return dtype and shape, and the strides unless the tensor is contiguous: "float32[4, 3]"."""
    text = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
    if not x.is_cpu:
        text += f" on {x.device.type}"
    if x.layout is not torch.strided:
        return f"{text} {x.layout}"
    return text if x.is_contiguous() else f"{text} with strides {list(x.stride())}"


def number(x: Any) -> Optional[float]:
    """Return a number of the optimizer's settings; None for a tensor."""
    return float(x) if isinstance(x, (int, float)) else None


def modules(root: nn.Module) -> Iterator[str]:
    """Yield a line for each module: its name, class and settings, "1: Dropout(p=0.5, inplace=False)".

    Settings are the attributes of PyTorch's own modules. Another module may keep anything in its
    attributes, such as the time at which it was made; its settings are what it returns as `extra_repr`.
    """
    for name, module in root.named_modules():
        if type(module).__module__.startswith("torch."):
            found = [f"{k}={v}" for k, v in vars(module).items() if k[:1] != "_" for v in _value(v)]
            settings = ", ".join(s for s in found if s != "training=True")
        else:
            settings = _described(module)
        yield f"{name}: {type(module).__name__}({settings})"


def _described(module: nn.Module) -> str:
    try:
        return str(module.extra_repr())[:200]
    except Exception:  # a method of the user's
        return ""


def _value(x: Any) -> list[str]:
    """Return the text of a value that is the same in every run, in a list; else an empty list."""
    if inspect.isroutine(x):
        return [_name(x)]
    numbers = x if isinstance(x, tuple) and len(x) <= 6 else (x,)
    simple = all(isinstance(y, (bool, int, float)) and abs(y) < 1e15 for y in numbers)
    # "mean", "zeros"; not the name of a file
    simple = simple or x is None or (isinstance(x, str) and len(x) <= 20)
    return [repr(x)] if simple else []


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)
