"""`exact()`, which a user enters: it lets operators come to their definitions, and applies the patches."""

from __future__ import annotations

import importlib
import inspect
import warnings
from contextlib import ContextDecorator
from typing import Any

import torch

from reproml.arithmetic import handlers, operator_table, patches, state
from reproml.arithmetic.dispatch import deferred, dispatcher
from reproml.errors import NotExactError


def _flushes_subnormals() -> bool:
    """Whether some thread does; it is a setting of each, which those of a pool have from their start."""
    threads = torch.get_num_threads()
    size = (
        1 if threads == 1 else (threads + 1) << 15
    )  # PyTorch gives a thread 2^15 elements or more
    x = torch.full((size,), 2.0**-140, dtype=torch.float32, device="cpu").mul(1)
    return int(x.count_nonzero()) < size


class exact(ContextDecorator):  # noqa: N801 (used like a function: `with reproml.exact():`)
    """Every floating-point operator inside returns the correctly rounded result, or raises.

        with reproml.exact():
            train()

        @reproml.exact()
        def train(): ...

    Raises NotExactError for an operator that has no exact definition; with `on_unknown="warn"` such
    operators run natively, and a warning at the end lists all that may have cost the guarantee. Use
    inside another exact() is allowed and changes nothing. Like every mode of PyTorch it holds for the
    thread that enters it.
    """

    def __init__(self, on_unknown: str = "raise") -> None:
        if on_unknown not in ("raise", "warn"):
            raise ValueError(f"on_unknown must be 'raise' or 'warn', not {on_unknown!r}")
        self._on_unknown = on_unknown

    def __call__(self, func: Any) -> Any:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func):
            raise TypeError(
                f"reproml.exact() does not reach into {func.__name__}, which runs after it returned; "
                "use `with reproml.exact():` inside."
            )
        return super().__call__(func)

    def __enter__(self) -> exact:
        depth = state.active.depth
        if depth == 0:
            with torch.device("cpu"):  # it cannot be imported with "meta" for a default device
                importlib.import_module("torch._dynamo")  # optimizers do; here it meets no mode

            if _flushes_subnormals():
                raise NotExactError(
                    "Subnormal numbers are flushed to zero; torch.set_flush_denormal(False)."
                )
            dispatcher.install(
                handlers.handler, handlers.refused, operator_table.VIEWS, operator_table.COPIES
            )
            patches.apply()
            state.active.passed = {} if self._on_unknown == "warn" else None
            dispatcher.include(True)
        state.active.depth = depth + 1
        return self

    def __exit__(self, *exc: Any) -> None:
        state.active.depth -= 1
        if state.active.depth == 0:
            dispatcher.include(False)
            try:
                deferred.flush()
            finally:
                patches.restore()
            if state.active.passed:
                listed = ", ".join(f"{op} ({at})" for op, at in state.active.passed.items())
                warnings.warn(
                    f"not exact, so the bits may differ elsewhere: {listed}", stacklevel=2
                )
