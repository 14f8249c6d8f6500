"""Record each operator of a training with its inputs, its outputs and the line of code that called it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Callable

import torch
from torch import Tensor

import reproml.arithmetic
from reproml.arithmetic.dispatch.schema import mutated_operands, tensors
from reproml.terminal import printable
from reproml.torch_internals import TorchDispatchMode, current_autograd_node, get_sequence_nr
from reproml.tracing.fingerprint import fingerprints, unseen

Write = Callable[[dict[str, Any], list[Tensor]], None]

# Their results are uninitialised memory: they are filled with zeros, so that they make no difference.
_UNFILLED = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_permuted",
}
# They only write to their first tensor.
_FILLING = {
    "uniform_",
    "normal_",
    "random_",
    "bernoulli_",
    "exponential_",
    "log_normal_",
    "cauchy_",
}
_FILLING |= {"geometric_", "zero_", "fill_", "copy_"}

# Frames in these files are not the caller's.
_OURS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(reproml.arithmetic.__file__) + os.sep,
    __file__,
    __file__.replace("operators.py", "recorder.py"),
    threading.__file__,
)


class Operators(TorchDispatchMode):
    """Passes the entry of each operator and its output tensors to `write`.

    Within exact() these are the operators of the program, not those that a definition calls.
    """

    def __init__(self, write: Write) -> None:
        super().__init__()
        self._write = write
        # Line of the forward pass by the autograd node's sequence number.
        self._lines: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.replace("::", ".")
        short = name.split(".")[-1]
        line, node = self._line()
        targets = list(mutated_operands(func, args, kwargs))
        skipped = targets if short in _FILLING or func._overloadname.endswith("out") else []
        inputs = _described([args, kwargs], skipped)
        result = func(*args, **kwargs)
        outputs = list(tensors(result)) or targets
        with unseen():
            if short in _UNFILLED:
                for x in outputs:
                    x.detach().zero_()
            found = {"op": name, "line": line, **({"backward": node} if node else {})}
            found.update({"in": inputs, "out": fingerprints(outputs), "shapes": _shapes(outputs)})
            self._write(found, outputs)
        return result

    def _line(self) -> tuple[str, str]:
        """Return the caller's line; for a backward operator, its forward line and the name of its node."""
        node: Any = current_autograd_node()
        if node is not None:
            return self._lines.get(node._sequence_nr(), _caller()), node.name()
        line = _caller()
        if torch.is_grad_enabled():
            # Autograd has already created this operator's node, so its number is the last one.
            self._lines.setdefault(get_sequence_nr() - 1, line)
        return line, ""


def _described(given: Any, skipped: list[Tensor]) -> list[str]:
    """Return the fingerprints of tensors and the values of numbers and strings."""
    found = [x for x in tensors(given) if not any(x is y for y in skipped)]
    return fingerprints(found) + [repr(x) for x in _python_values(given)]


def _caller() -> str:
    """Return "FILE:LINE" of the innermost frame that is neither PyTorch's nor reproml's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_OURS):
            return printable(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return "an unknown line"


def _python_values(data: Any) -> Iterator[Any]:
    if isinstance(data, dict):
        yield from _python_values(list(data.values()))
    elif isinstance(data, (list, tuple)):
        for x in data:
            yield from _python_values(x)
    elif data is None or isinstance(data, (bool, int, float, complex, str)):
        yield data


def _shapes(outputs: list[Tensor]) -> list[str]:
    return [f"{str(x.dtype)[6:]}{list(x.shape)}" for x in outputs]
