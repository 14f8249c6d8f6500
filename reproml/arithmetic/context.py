"""`exact()`, the context that users enter: it intercepts operators and applies the patches."""

from __future__ import annotations

import importlib
import inspect
import warnings
from contextlib import ContextDecorator
from typing import Any

import torch

from reproml import torch_internals
from reproml.arithmetic import handlers, operator_table, patches, state
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.errors import NotExactError


def _flushes_subnormals() -> bool:
    """Return whether a thread flushes subnormal numbers to zero.

    Each thread has its own setting; those of a pool keep the one with which they were created."""
    threads = torch.get_num_threads()
    # PyTorch assigns at least 2^15 elements to a thread.
    size = 1 if threads == 1 else (threads + 1) << 15
    x = torch.full((size,), 2.0**-140, dtype=torch.float32, device="cpu").mul(1)
    return int(x.count_nonzero()) < size


class exact(ContextDecorator):  # noqa: N801 (used like a function: `with reproml.exact():`)
    """Make every floating-point operator return the correctly rounded result, or raise NotExactError.

        with reproml.exact():
            train()

        @reproml.exact()
        def train(): ...

    An operator without an exact definition raises NotExactError. With `on_unknown="warn"` it runs natively
    instead, and a warning at the end lists all such operators: the results may then differ between
    machines. Entering exact() inside another exact() changes nothing. Like every mode of PyTorch, it
    applies to the thread that enters it.
    """

    def __init__(self, on_unknown: str = "raise") -> None:
        if on_unknown not in ("raise", "warn"):
            raise ValueError(f"on_unknown must be 'raise' or 'warn', not {on_unknown!r}")
        self._on_unknown = on_unknown

    def __call__(self, func: Any) -> Any:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func):
            raise TypeError(
                f"reproml.exact() cannot decorate {func.__name__}: a generator or coroutine runs after "
                "the call has returned; use `with reproml.exact():` inside it."
            )
        return super().__call__(func)

    def __enter__(self) -> exact:
        depth = state.active.depth
        if depth == 0:
            # Optimizers import torch._dynamo in their first step. It must be imported outside any mode,
            # and cannot be imported while the default device is "meta".
            with torch.device("cpu"):
                importlib.import_module(torch_internals.DYNAMO)
            if _flushes_subnormals():
                raise NotExactError(
                    "Subnormal numbers are flushed to zero; call torch.set_flush_denormal(False)."
                )
            dispatcher.install(
                handlers.handler_of, handlers.refuse, operator_table.VIEWS, operator_table.COPIES
            )
            patches.apply()
            state.active.ran_natively = {} if self._on_unknown == "warn" else None
            dispatcher.set_thread_intercepted(True)
        state.active.depth = depth + 1
        return self

    def __exit__(self, *exc: Any) -> None:
        state.active.depth -= 1
        if state.active.depth == 0:
            dispatcher.set_thread_intercepted(False)
            try:
                replay_log.flush()
            finally:
                patches.restore()
            if state.active.ran_natively:
                listed = ", ".join(f"{op} ({at})" for op, at in state.active.ran_natively.items())
                warnings.warn(
                    f"not exact, so the bits may differ on another machine: {listed}", stacklevel=2
                )
