"""How every operator comes to us: by a dispatch key of our own.

PyTorch's dispatcher takes the highest key of an operator's set first: autocast and autograd, then Python,
of modes and subclasses, then the kernels. Just above Python lies a key kept for extensions, `Fake`. To it
PyTorch itself registers nothing. What we register for it gets each operator, the backward ones included, in
a thread that has included the key.

A `TorchDispatchMode` sees the same operators, at four times the price: some 3 microseconds each. We
give modes and subclasses their turn before ours: they see the operators and not what we make of them.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any, Callable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _pop_mode_temporarily

from reproml.arithmetic.dispatch import deferred
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics import rounding
from reproml.errors import NotExactError

_C: Any = torch._C
_NAME, _KEY = "Fake", deferred.KEY
_exclude = _C._dispatch_tls_set_dispatch_key_excluded
_modes = _C._len_torch_dispatch_stack

# Operands with which no subclass can have a say.
_PLAIN = frozenset([Tensor, Parameter, int, float, bool, type(None), torch.dtype])

_registered: list[Any] = []  # a registration ends with its object


def install(
    handler: Callable[[Any], Callable[..., Any]],
    refused: Callable[..., Any],
    views: frozenset[str],
    copies: frozenset[str],
) -> None:
    """Let `handler(operator)` stand for every operator but the free ones, which run as ever: views, and
    copies as long as no device but the CPU is in use.

    It is called in threads that have included the key; what it calls in turn is PyTorch's own. On a
    NotExactError `refused(error, operator, args, kwargs)` has the last word.
    """

    if _registered:
        return
    rounding.defer_test = deferred.defer_test

    def door(find: Callable[[], Any]) -> Callable[..., Any]:
        operator = run = None

        def come(*args: Any, **kwargs: Any) -> Any:
            nonlocal operator, run
            if run is None:
                operator = find()
                run = handler(operator)
            if _modes() or kwargs or not _PLAIN.issuperset(map(type, args)):
                said = _say_of_python(operator, args, kwargs)
                if said is not NotImplemented:
                    return said
            _exclude(_KEY, True)
            try:
                if deferred.active:
                    return deferred.run(operator, run, args, kwargs)
                return run(*args, **kwargs)
            except NotExactError as error:
                deferred.flush()
                return refused(error, operator, args, kwargs)
            finally:
                _exclude(_KEY, False)

        return come

    @cache
    def rare(operator: Any) -> Callable[..., Any]:
        return door(lambda: operator)

    # One by one, as a fallback for all is not found while a mode is active.
    main_library, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    lent = torch.library.Library("aten", "IMPL")
    passing = torch.library.fallthrough_kernel
    names: list[str] = []  # of the copies
    for full in _C._dispatch_get_all_op_names():
        if full.startswith("aten::"):
            name = full[len("aten::") :]
            plain = name.partition(".")[0]
            plain = plain[:-1] if plain.endswith("_") and plain[:-1] in views | copies else plain
            if plain in copies:
                names.append(name)
                lent.impl(name, passing, _NAME)
            else:
                main_library.impl(
                    name, passing if plain in views else door(partial(_overload, name)), _NAME
                )
    others.fallback(lambda operator, *args, **kwargs: rare(operator)(*args, **kwargs), _NAME)
    _registered.extend([main_library, others, lent])

    def watch_copies() -> None:
        lent._destroy()
        for name in names:
            main_library.impl(name, door(partial(_overload, name)), _NAME)

    deferred.at_first(watch_copies)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def include(on: bool) -> None:
    """Let this thread's operators come to us, or no longer."""
    _C._dispatch_tls_set_dispatch_key_included(_KEY, on)


def natively() -> Any:
    """A context in which no operator comes to us."""
    deferred.flush()
    return _C._SetExcludeDispatchKeyGuard(_KEY, True)


def again() -> Any:
    """A context inside of `run` in which they come to us once more."""
    return _C._SetExcludeDispatchKeyGuard(_KEY, False)


def _say_of_python(operator: Any, args: Any, kwargs: Any) -> Any:
    """What a mode that was entered, or else an operand's subclass, does with an operator.

    The operators that it calls come here in turn. NotImplemented if none has a say: a mode or a subclass
    may itself return that, and then the next is asked, as PyTorch does.
    """
    if _python_is_off():
        return NotImplemented
    types: list[Any] = []
    for x in tensors([*args, *kwargs.values()]):
        t = type(x)
        if t.__torch_dispatch__ is not Tensor.__torch_dispatch__ and t not in types:
            before = (i for i, other in enumerate(types) if issubclass(t, other))
            types.insert(next(before, len(types)), t)
    said = NotImplemented
    if types or _modes():
        deferred.flush()
    if _modes():
        with _pop_mode_temporarily() as mode:
            said = mode.__torch_dispatch__(operator, types, args, kwargs)
    for t in types:
        if said is NotImplemented:
            said = t.__torch_dispatch__(operator, types, args, kwargs)
    if said is NotImplemented and (types or _modes()):
        names = ", ".join(t.__name__ for t in types)
        raise TypeError(
            f"{operator}: no mode and none of the operands' types implements it: [{names}]"
        )
    return said


def _python_is_off() -> bool:
    """Whether modes and subclasses are passed over, as a subclass does that calls an operator natively."""
    return bool(_C._dispatch_tls_is_dispatch_key_excluded(_C.DispatchKey.Python))
