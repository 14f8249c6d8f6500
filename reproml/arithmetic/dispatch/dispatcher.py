"""Interception: every operator of a thread inside `exact()` runs the handler that handlers.py chose for it.

PyTorch's dispatcher calls the kernel of the highest key in an operator's key set: autocast and autograd
first, then `Python`, the key of modes and tensor subclasses, then the backends. We register a kernel for
each operator at a spare key beside `Python`. A thread that has included that key runs our kernels, in the
backward pass as well. Where no key is free, a mode runs the same kernels (interception.py).

Our kernels call modes and subclasses first, so these see the operators and not those that a definition
consists of.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache, partial
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from reproml.arithmetic import state
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.dispatch.interception import (
    KEY_NAME,
    ByKey,
    ByMode,
    interception,
    spare_key,
)
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics import rounding
from reproml.errors import NotExactError
from reproml.torch_internals import (
    DispatchKey,
    TorchDispatchMode,
    dispatch_get_all_op_names,
    dispatch_tls_is_dispatch_key_excluded,
    get_current_dispatch_mode,
    len_torch_dispatch_stack,
    pop_mode,
    pop_mode_temporarily,
)

_set_in_kernel = interception.set_in_kernel
_modes = len_torch_dispatch_stack

# Types of operands among which no tensor subclass can be.
_PLAIN = frozenset([Tensor, Parameter, int, float, bool, type(None), str])
_PLAIN |= {torch.dtype, torch.device, torch.layout, torch.memory_format}

Kernel = Callable[..., Any]


class Kind(Enum):
    """What happens to an operator inside `exact()`."""

    NATIVE = "runs natively: a mark for the profiler, or control flow"
    MOVED = "runs natively: it copies, selects, compares or casts numbers"
    DEFINED = "runs as defined in the table"
    FOREACH = "runs the functional operator on each element of its lists"
    DECOMPOSED = "runs as the operators it is written in, which are intercepted in turn"
    REFUSED = "raises NotExactError where a floating-point number goes in or comes out"


class Handler(NamedTuple):
    """What runs in place of an operator."""

    kind: Kind
    run: Kernel


_install_lock = threading.Lock()  # two threads may enter their first exact() at once


def install(
    handler_of: Callable[[Any], Handler],
    refuse: Callable[..., Any],
    views: frozenset[str],
    copies: frozenset[str],
) -> None:
    """Register a kernel for every operator, once in the process.

    handler_of: operator -> Handler; it is called when the operator runs for the first time.
    refuse: called as refuse(error, operator, args, kwargs) when a handler raises NotExactError. It raises
        the complete error or returns the result.
    views, copies: names of operators that are not intercepted; copies only while no device but the CPU is
        in use, as later they have to be logged.
    """
    with _install_lock:
        if state.registration is not None:
            return
        if isinstance(interception, ByKey) and spare_key() is None:
            raise NotExactError(
                f"the dispatch key {KEY_NAME}, which reproml uses, was taken by another library after "
                "reproml was imported; import reproml after that library."
            )
        rounding.defer_test = replay_log.defer_test
        if hasattr(os, "register_at_fork"):  # Windows has no fork
            os.register_at_fork(after_in_child=replay_log.reset_after_fork)
        state.registration = Registration(partial(make_kernel, handler_of, refuse), views, copies)


class Registration:
    """The kernels registered with PyTorch, which drops them when this object is deleted."""

    def __init__(
        self,
        make_kernel: Callable[[Callable[[], Any]], Kernel],
        views: frozenset[str],
        copies: frozenset[str],
    ) -> None:
        self._make_kernel = make_kernel
        self._kernels: dict[Any, Kernel] = {}  # those that `_run` has called
        self._native = views | copies
        self._registered = frozenset(_aten_names())  # listing them takes milliseconds
        if isinstance(interception, ByMode):
            interception.run = self._run
            return
        self._library = torch.library.Library("aten", "IMPL")
        self._copy_library = torch.library.Library("aten", "IMPL")
        self._other_namespaces = torch.library.Library("_", "IMPL")  # "_": all namespaces
        self._copies: list[str] = []
        # A fallback for all of aten would be shorter, but PyTorch skips it while a mode is active.
        for name in self._registered:
            functional = self._functional(name)
            if functional in copies:
                self._copies.append(name)
                self._copy_library.impl(name, torch.library.fallthrough_kernel, KEY_NAME)
            elif functional in views:
                self._library.impl(name, torch.library.fallthrough_kernel, KEY_NAME)
            else:
                self._intercept(name)
        self._other_namespaces.fallback(self._run, KEY_NAME)
        replay_log.on_first_device(self._intercept_copies)

    def _functional(self, name: str) -> str:
        """Return an operator's name without its overload, and that of `view` for `view_` and its like."""
        name = name.partition(".")[0]
        return name[:-1] if name.endswith("_") and name[:-1] in self._native else name

    def _intercept(self, name: str) -> None:
        self._library.impl(name, self._make_kernel(partial(_overload, name)), KEY_NAME)

    def _intercept_copies(self) -> None:
        self._copy_library._destroy()
        for name in self._copies:
            self._intercept(name)

    def _run(self, operator: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel of an operator for which none is registered."""
        kernel = self._kernels.get(operator)
        if kernel is None:
            namespace, _, name = operator.name().partition("::")
            native = namespace == "aten" and (
                self._functional(name) in self._native
                or name not in self._registered  # a size or a stride, which a mode is asked for
            )
            kernel = operator if native else self._make_kernel(lambda: operator)
            self._kernels[operator] = kernel
        return kernel(*args, **kwargs)


def make_kernel(
    handler_of: Callable[[Any], Handler], refuse: Callable[..., Any], find: Callable[[], Any]
) -> Kernel:
    """Return the kernel of the operator find(), which is looked up when it runs for the first time."""
    operator = run = None
    decomposed = False

    def intercept(*args: Any, **kwargs: Any) -> Any:
        nonlocal operator, decomposed, run
        if run is None:
            operator = find()
            handler = handler_of(operator)
            decomposed = handler.kind is Kind.DECOMPOSED
            run = handler.run  # last, as another thread may test it
        if (
            _modes()
            or (not _PLAIN.issuperset(map(type, args)) and _may_have_subclasses(args))
            or (kwargs and _may_have_subclasses(kwargs.values()))
        ):
            result = call_modes_and_subclasses(operator, args, kwargs)
            if result is not NotImplemented:
                return result
        _set_in_kernel(True)
        try:
            if replay_log.active and not decomposed:
                return replay_log.run(operator, run, args, kwargs)
            return run(*args, **kwargs)
        except NotExactError as error:
            if decomposed:
                raise  # complete: raised for one of the operators it is written in
            replay_log.flush()
            return refuse(error, operator, args, kwargs)
        finally:
            _set_in_kernel(False)

    return intercept


def _may_have_subclasses(operands: Iterable[Any]) -> bool:
    """Return whether operands, or the elements of a list of them, may be of a tensor subclass."""
    for x in operands:
        if type(x) not in _PLAIN and not (type(x) is list and _PLAIN.issuperset(map(type, x))):
            return True
    return False


def _aten_names() -> Iterator[str]:
    """Yield "name.overload" of every operator of PyTorch."""
    for full in dispatch_get_all_op_names():
        namespace, _, name = full.partition("::")
        if namespace == "aten":
            yield name


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


# ---- composites ----------------------------------------------------------------------------------


@contextmanager
def composites(table: dict[str, Kernel]) -> Iterator[None]:
    """Run these composite operators of aten above autograd and torch.func, until the end of the block.

    PyTorch takes a composite operator apart where autograd would record it, or a transform of torch.func
    sees it. Kernels for these keys run ours in a thread whose operators are intercepted, and PyTorch's in
    others. What PyTorch does not take apart runs as ours in every thread, there natively.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # that the kernel of torch.func for `linear` is replaced
        warnings.simplefilter("ignore")
        for name, composite in table.items():
            kernel = _composite_kernel(name, composite)
            for key in ("AutogradCPU", "AutogradCUDA", "FuncTorchDynamicLayerFrontMode"):
                library.impl(name, kernel, key)
    try:
        yield
    finally:
        library._destroy()


@cache
def _composite_kernel(name: str, composite: Kernel) -> Kernel:
    operator = _overload(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        result = NotImplemented
        if not interception.is_active():
            result = operator.decompose(*args, **kwargs)
        return composite(*args, **kwargs) if result is NotImplemented else result

    return kernel


# ---- which operators are intercepted -------------------------------------------------------------


def set_thread_intercepted(on: bool) -> None:
    """Intercept the operators that this thread runs, or no longer."""
    interception.set_included(on)


def natively() -> Any:
    """Return a context in which operators are not intercepted."""
    replay_log.flush()
    return interception.natively()


def intercept_again() -> Any:
    """Return a context, for use inside a handler or `natively`, in which operators are intercepted."""
    return interception.again()


# ---- modes and tensor subclasses -----------------------------------------------------------------


def call_modes_and_subclasses(operator: Any, args: Any, kwargs: Any) -> Any:
    """Return what the innermost active mode, or else an operand's subclass, returns for an operator.

    The operators that it calls are intercepted in turn. NotImplemented where neither exists. If a mode or
    a subclass returns NotImplemented itself, the next one is called, as in PyTorch; raises TypeError if
    all of them do.
    """
    if dispatch_tls_is_dispatch_key_excluded(DispatchKey.Python):
        return NotImplemented  # a subclass calls the operator natively, past modes and subclasses
    mode = get_current_dispatch_mode() if _modes() else None
    if isinstance(mode, Inherited):
        mode.before(operator)
        if mode.joined:
            _drop_inherited()
    types = _subclasses([*args, *kwargs.values()])
    if not types and not _modes():
        return NotImplemented
    replay_log.flush()
    if _modes():
        with pop_mode_temporarily() as mode, interception.again():
            result = mode.__torch_dispatch__(operator, types, args, kwargs)
        if result is not NotImplemented:
            return result
    for t in types:
        offered = state.active.offered
        # Our own subclasses run operators natively where they mean to.
        state.active.offered = None if t.__module__.startswith("reproml.") else operator
        try:
            with interception.again():
                result = t.__torch_dispatch__(operator, types, args, kwargs)
        finally:
            state.active.offered = offered
        if result is not NotImplemented:
            return result
    names = ", ".join(t.__name__ for t in types)
    raise TypeError(f"{operator}: no mode and none of the operands' types implements it: [{names}]")


class Inherited(TorchDispatchMode):
    """Marks a thread that was started within `exact()`, until its first operator.

    Such a thread does not hold the patches from its start: a thread that never computes, such as one of a
    progress bar, may run long after `exact()` has ended. The mode costs other threads nothing. In versions
    of PyTorch that call modes before our kernels it stays until the thread ends.
    """

    def __init__(self, handler_of: Callable[[Any], Handler], join: Callable[[], bool]) -> None:
        super().__init__()
        self._handler_of, self._join = handler_of, join
        self.joined = False  # whether the thread holds the patches

    def before(self, operator: Any) -> None:
        """Hold the patches, before an operator that computes. Raises NotExactError if they are undone."""
        if not self.joined and self._handler_of(operator).kind not in (Kind.NATIVE, Kind.MOVED):
            self.hold(operator)

    def hold(self, name: Any) -> None:
        """Hold the patches. Raises NotExactError if they are undone."""
        self.joined = self.joined or self._join()
        if not self.joined:
            raise NotExactError(
                f"{name} has no exact result in a thread that was started within reproml.exact(), "
                "which has ended since; use `with reproml.exact():` in the thread."
            )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.before(function)
        return function(*args, **(kwargs or {}))


def _drop_inherited() -> None:
    """Remove the innermost mode, that of a thread which now holds the patches."""
    state.active.inherited = None
    pop_mode()


def before_transform(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Enter a transform of torch.func, or compile a function, without the mode of an inherited thread.

    Both restore the keys of their thread, but not its modes: no mode may be removed within them.
    """
    mode = get_current_dispatch_mode() if _modes() else None
    if isinstance(mode, Inherited):
        mode.hold("torch.func or torch.compile")
        _drop_inherited()
    return original(*args, **kwargs)


def has_modes() -> bool:
    """Return whether a mode is active, except that of an inherited thread."""
    count = interception.count_other_modes()
    return count > 0 and not isinstance(get_current_dispatch_mode(), Inherited)


def keys_of_higher_order(original: Callable[..., Any], args: Any, kwargs: Any, keys: Any) -> Any:
    """Return the keys for which a higher-order operator, such as `torch.cond`, needs a rule.

    It computes nothing itself and needs no rule of ours: the operators of its functions are intercepted.
    """
    return original(args, kwargs, keys if has_modes() else keys.remove(interception.key))


def _subclasses(operands: Any) -> list[Any]:
    """Return the operands' types that override __torch_dispatch__, a subclass before its base class."""
    types: list[Any] = []
    for x in tensors(operands):
        t = type(x)
        if t.__torch_dispatch__ is not Tensor.__torch_dispatch__ and t not in types:
            before = (i for i, other in enumerate(types) if issubclass(t, other))
            types.insert(next(before, len(types)), t)
    return types
