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


def loader(of: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of a data loader that affect its batches."""
    sampler = of.sampler if of.batch_size is not None else of.batch_sampler or of.sampler
    sized = not isinstance(of.dataset, IterableDataset) and hasattr(of.dataset, "__len__")
    return {
        "dataset": type(of.dataset).__name__,
        "samples": len(of.dataset) if sized else None,  # type: ignore[arg-type]
        "batch_size": of.batch_size,
        "drop_last": of.drop_last,
        "sampler": type(sampler).__name__,
        "generator": of.generator is not None,
        "collate_fn": _name(of.collate_fn),
        "num_workers": of.num_workers,
        "persistent_workers": of.persistent_workers,
        "worker_init_fn": _name(of.worker_init_fn),
    }


def process() -> tuple[Any, ...]:
    """Return the seed, the threads and the precision; of these exact results depend on the seed only."""
    if state.active.depth:
        return (torch.initial_seed(),)
    return torch.initial_seed(), torch.get_num_threads(), torch.get_float32_matmul_precision()


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
    if x.layout is not torch.strided:
        return f"{text} {x.layout}"
    return text if x.is_contiguous() else f"{text} with strides {list(x.stride())}"


def number(x: Any) -> Optional[float]:
    """Return a number of the optimizer's settings; None for a tensor."""
    return float(x) if isinstance(x, (int, float)) else None


def modules(root: nn.Module) -> Iterator[str]:
    """Yield a line for each module: its name, class and settings, "1: Dropout(p=0.5, inplace=False)"."""
    for name, module in root.named_modules():
        settings = [f"{k}={v}" for k, v in vars(module).items() if k[0] != "_" for v in _value(v)]
        yield f"{name}: {type(module).__name__}({', '.join(s for s in settings if s != 'training=True')})"


def _value(x: Any) -> list[str]:
    """Return the text of a value that is the same in every run, in a list; else an empty list."""
    if inspect.isroutine(x):
        return [_name(x)]
    simple = x is None or isinstance(x, (bool, int, float))
    simple = simple or (isinstance(x, tuple) and all(isinstance(y, (int, float)) for y in x))
    simple = simple or (
        isinstance(x, str) and len(x) <= 20
    )  # "mean", "zeros"; not the name of a file
    return [repr(x)] if simple else []


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", None) or type(function).__name__)
