"""`exact()`, the context that users enter: it intercepts operators and applies the patches."""

from __future__ import annotations

import importlib
import inspect
import warnings
from contextlib import ContextDecorator
from typing import Any, Callable

import torch

from reproml import torch_internals
from reproml.arithmetic import handlers, operator_table, patches, state
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.errors import NotExactError


def _flushes_subnormals(threads: int) -> bool:
    """Return whether one of PyTorch's threads flushes subnormal numbers to zero; 1: the calling thread.

    Each thread has its own setting; those of a pool keep the one with which they were created."""
    # PyTorch assigns at least 2^15 elements to a thread.
    size = 1 if threads == 1 else (threads + 1) << 15
    with torch_internals.DisableTorchDispatch():  # no mode sees this
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
    machines. Entering exact() inside another exact() changes nothing. It applies to the thread that enters
    it, and to threads and processes that are started within it.
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
            if _flushes_subnormals(torch.get_num_threads()):
                raise NotExactError(
                    "Subnormal numbers are flushed to zero; call torch.set_flush_denormal(False)."
                )
            dispatcher.install(
                handlers.handler_of, handlers.refuse, operator_table.VIEWS, operator_table.COPIES
            )
            patches.apply()
            self._begin()
        elif state.active.inherited is not None and not state.active.inherited.joined:
            patches.apply()
            state.active.inherited.joined = True
        state.active.depth = depth + 1
        return self

    def _begin(self) -> None:
        state.active.context = self
        state.active.ran_natively = {} if self._on_unknown == "warn" else None
        dispatcher.set_thread_intercepted(True)

    def run_in_thread(self, function: Callable[[], None]) -> None:
        """Run the body of a thread that was started within this context, which the thread inherits."""
        mode = state.active.inherited = dispatcher.Inherited(handlers.handler_of, patches.join)
        self._begin()
        state.active.depth = 1
        torch_internals.push_mode(mode)
        try:
            function()
        finally:
            if state.active.inherited is not None:
                torch_internals.pop_mode()
                state.active.inherited = None
            self._end(patches.restore if mode.joined else lambda: None)

    def __exit__(self, *exc: Any) -> None:
        if state.active.depth > 1:
            state.active.depth -= 1
            return
        self._end(patches.restore)
        if exc[:1] in ((), (None,)) and _flushes_subnormals(threads=1):
            raise NotExactError(
                "Subnormal numbers have been flushed to zero since something within reproml.exact(), such "
                "as a library that was loaded, turned that on; load it before, and call "
                "torch.set_flush_denormal(False)."
            )

    def _end(self, restore: Callable[[], None]) -> None:
        state.active.depth = 0
        state.active.context = None
        dispatcher.set_thread_intercepted(False)
        try:
            replay_log.flush()
        finally:
            restore()
        if state.active.ran_natively:
            listed = ", ".join(f"{op} ({at})" for op, at in state.active.ran_natively.items())
            warnings.warn(
                f"not exact, so the bits may differ on another machine: {listed}", stacklevel=3
            )
