"""Two ways to intercept the operators of a thread: a spare dispatch key or, without one, a mode.

PyTorch keeps the dispatch key `Fake` for extensions, between autograd and the backends. A version of
PyTorch without it, or a process in which something else has registered kernels for it, gets a
TorchDispatchMode: it intercepts the same operators, with the same results, and takes longer for each. It
does not see operators that a program hides from modes by private functions of PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Optional, Union

from reproml.torch_internals import (
    DispatchKey,
    DispatchKeySet,
    SetExcludeDispatchKeyGuard,
    TorchDispatchMode,
    dispatch_get_registrations_for_dispatch_key,
    dispatch_has_backend_fallback,
    dispatch_tls_is_dispatch_key_excluded,
    dispatch_tls_is_dispatch_key_included,
    dispatch_tls_set_dispatch_key_excluded,
    dispatch_tls_set_dispatch_key_included,
    get_current_dispatch_mode_stack,
    len_torch_dispatch_stack,
    parse_dispatch_key,
    pop_mode,
    push_mode,
)

KEY_NAME = "Fake"


class ByKey:
    """Interception by kernels for a dispatch key, which a thread includes."""

    def __init__(self, key: Any) -> None:
        self.key = key
        self.set_included: Callable[[bool], None] = partial(
            dispatch_tls_set_dispatch_key_included, key
        )
        # Whether the kernel that is running called an operator; to be set by kernels only.
        self.set_in_kernel: Callable[[bool], None] = partial(
            dispatch_tls_set_dispatch_key_excluded, key
        )
        self.count_other_modes: Callable[[], int] = len_torch_dispatch_stack

    def is_active(self) -> bool:
        """Return whether the operators of this thread are intercepted now."""
        return dispatch_tls_is_dispatch_key_included(
            self.key
        ) and not dispatch_tls_is_dispatch_key_excluded(self.key)

    def natively(self) -> Any:
        """Return a context in which no operator of this thread is intercepted."""
        return SetExcludeDispatchKeyGuard(self.key, True)

    def again(self) -> Any:
        """Return a context, within a kernel or `natively`, in which operators are intercepted."""
        return SetExcludeDispatchKeyGuard(self.key, False)


class ByMode(TorchDispatchMode):
    """Interception by a mode on the stack of modes of a thread. PyTorch removes it while it is called."""

    key = DispatchKey.Python

    def __init__(self) -> None:
        super().__init__()
        # What runs an operator: run(operator, *args, **kwargs).
        self.run: Callable[..., Any] = lambda operator, *args, **kwargs: operator(*args, **kwargs)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.run(function, *args, **(kwargs or {}))

    def set_included(self, on: bool) -> None:
        if on:
            push_mode(self)
        elif self.is_active():
            self._remove()

    def set_in_kernel(self, on: bool) -> None:
        """Do nothing: while a kernel runs, the mode is not on the stack."""

    def count_other_modes(self) -> int:
        return int(len_torch_dispatch_stack()) - self.is_active()

    def is_active(self) -> bool:
        return not dispatch_tls_is_dispatch_key_excluded(self.key) and any(
            mode is self for mode in get_current_dispatch_mode_stack()
        )

    @contextmanager
    def natively(self) -> Iterator[None]:
        if not self.is_active():
            yield
            return
        above = self._remove()
        try:
            yield
        finally:
            self._insert(above)

    @contextmanager
    def again(self) -> Iterator[None]:
        if self.is_active():
            yield
            return
        push_mode(self)
        try:
            yield
        finally:
            self._remove()

    def _remove(self) -> int:
        """Remove the mode from the stack; return the number of modes that were pushed after it."""
        above = []
        while (mode := pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            push_mode(mode)
        return len(above)

    def _insert(self, count: int) -> None:
        """Push the mode below the last `count` modes."""
        above = [pop_mode() for _ in range(count)]
        for mode in (self, *reversed(above)):
            push_mode(mode)


def spare_key() -> Optional[Any]:
    """Return the dispatch key for interception, None if PyTorch has none or if it is in use."""
    try:
        key = parse_dispatch_key(KEY_NAME)
    except RuntimeError:
        return None
    if key is None or dispatch_has_backend_fallback(key):
        return None
    if dispatch_get_registrations_for_dispatch_key(KEY_NAME):
        return None
    # It must be called after autograd and before the backends.
    return key if _first(key, "AutogradCPU") != key and _first(key, "CPU") == key else None


def _first(key: Any, other: str) -> Any:
    """Return which of two keys the dispatcher calls first."""
    both = DispatchKeySet(key) | DispatchKeySet(parse_dispatch_key(other))
    return both.highestPriorityTypeId()


def choose() -> Union[ByKey, ByMode]:
    """Return the way in which this process intercepts operators."""
    key = spare_key()
    return ByMode() if key is None else ByKey(key)


interception = choose()
