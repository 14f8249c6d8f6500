"""Rounding tests on a GPU without a wait for each: their outcomes are read later, and all at once.

To look at the outcome of a test, the host has to wait for the device. So an operator there goes on
with what was rounded, and is logged with its operands. The outcomes are read where a value leaves the
device, before and after an optimizer's step, and at the end of `exact()`. If a test failed, which is
rare, all that was changed in place since then is put back, and the operators from the first failure on
run again, each settled at once; the results take the place of the old ones, in the same memory.

What could not be run again in this way finds all settled: an operator with an operand on the CPU, which
the host may change; one whose result has a shape that depends on numbers; modes, subclasses, native work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Callable, Optional

import torch
from torch import Tensor

# The log is read when it holds so many operators or bytes.
_OPERATORS, _BYTES = 1000, 1 << 30

active = False  # whether some test has met a device yet; until then nothing is logged

_changes: list[Callable[[], None]] = []  # to be called once when that happens
_lock = threading.RLock()  # the backward pass of a device has a thread of its own
_log: list[_Entry] = []
os.register_at_fork(after_in_child=_log.clear)  # a device is not for a forked process
_local = (
    threading.local()
)  # outcomes: those of the running operator; none where each is read at once


@dataclass(eq=False)
class _Entry:
    """One operator that ran: how to run it again, and all there is to put back or to replace."""

    run: Callable[..., Any]
    args: Any
    kwargs: Any
    before: list[tuple[Tensor, Tensor]]  # what it writes to, and its contents
    random: Any  # the generator that it draws from, and its state
    result: Any = None
    outcomes: list[Tensor] = field(default_factory=list)  # bool, 0-dim: whether a test failed


def far(x: Tensor) -> bool:
    """Whether a host that reads x waits for a device."""
    return not (x.is_cpu or x.is_meta)


def on_device(x: Any, device: torch.device) -> Tensor:
    """A number, or a tensor of the host's, as a tensor there, for which the host does not wait."""
    if not isinstance(x, Tensor):
        return torch.full((), x, device=device)
    if x.is_cpu and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


@contextmanager
def at_once() -> Iterator[None]:
    """Settle what there is, and each test within at once: for a definition that looks at numbers."""
    settle_all()
    with _noted(None):
        yield


def at_first(change: Callable[[], None]) -> None:
    """Have `change` called when a device is met for the first time."""
    _changes.append(change)


def later(failed: Tensor) -> bool:
    """Whether the outcome of a rounding test, bool of any shape, is noted and read later."""
    global active
    outcomes = getattr(_local, "outcomes", None)
    if outcomes is not None:
        outcomes.append(failed.any())
        return True
    if not active and far(failed):
        active = True
        for change in _changes:
            change()
    return False


def run(operator: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """run(*args, **kwargs), which stands for `operator`; on a device its tests are read later."""
    given = list(_tensors([args, list(kwargs.values())]))
    if not any(map(far, given)) or hasattr(run, "parts"):  # the parts come here by themselves
        return run(*args, **kwargs)
    with _lock:
        if not all(map(far, given)) or _depends_on_numbers(operator, args):
            settle_all()
            return run(*args, **kwargs)
        entry = _Entry(
            run,
            _kept(args),
            _kept(kwargs),
            [(x.data, x.data.clone()) for x in _written(operator, args, kwargs)],
            _random(operator, kwargs),
        )
        with _noted() as entry.outcomes:
            result = run(*args, **kwargs)
        if not (_log or entry.outcomes):
            return result
        entry.result = _kept(result)
        _log.append(entry)
        if _leaves(result):
            settle_all()
            return entry.result
        if len(_log) >= _OPERATORS or sum(map(_size, _log)) >= _BYTES:
            settle_all()
        return result


def step(run: Callable[..., None], lists: Sequence[list[Any]], options: dict[str, Any]) -> None:
    """An optimizer's step, run(*lists, **options), of which the second list holds the gradients.

    What comes before it is settled first, and itself before it ends. The lists may get other tensors.
    """
    written = list(_tensors([x for i, x in enumerate(lists) if i != 1])) if active else []
    if not any(map(far, written)):
        run(*lists, **options)
        return
    with _lock:
        settle_all()
        given = [list(x) for x in lists]
        before = [(x.data, x.data.clone()) for x in written]
        with _noted() as outcomes:
            run(*lists, **options)
        if _first(outcomes) is not None:
            _put_back(before)
            for x, y in zip(lists, given):
                x[:] = y
            run(*lists, **options)


def settle_all() -> None:
    """Read the outcomes of all tests so far, and put right what they say is wrong."""
    with _lock:
        if not _log:
            return
        log = list(_log)
        _log.clear()
        noted = [(entry, outcome) for entry in log for outcome in entry.outcomes]
        first = _first([outcome for _, outcome in noted])
        if first is None:
            return
        wrong = log[log.index(noted[first][0]) :]
        with torch.inference_mode(), _noted(None):  # results may be inference tensors
            for entry in reversed(wrong):
                _put_back(entry.before)
            for entry in wrong:
                entry.result = _over(entry.result, _again(entry))


@contextmanager
def _noted(outcomes: Any = ()) -> Iterator[Any]:
    """Outcomes are noted in a list, which this gives; with None each is read at once."""
    outside = getattr(_local, "outcomes", None)
    _local.outcomes = None if outcomes is None else []
    try:
        yield _local.outcomes
    finally:
        _local.outcomes = outside


def _first(outcomes: list[Tensor]) -> Optional[int]:
    """The place of the first that is true."""
    found = [False] * len(outcomes)
    for device in {x.device for x in outcomes}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # outcomes of other streams
        here = [i for i, x in enumerate(outcomes) if x.device == device]
        for i, failed in zip(here, torch.stack([outcomes[i] for i in here]).tolist()):
            found[i] = failed
    return found.index(True) if True in found else None


def _again(entry: _Entry) -> Any:
    """Run it once more, with the random numbers that it had."""
    if entry.random is None:
        return entry.run(*entry.args, **entry.kwargs)
    generator, then = entry.random
    now = generator.get_state()
    generator.set_state(then)
    try:
        return entry.run(*entry.args, **entry.kwargs)
    finally:
        generator.set_state(now)


def _put_back(before: list[tuple[Tensor, Tensor]]) -> None:
    for x, contents in before:
        x.copy_(contents)


def _over(old: Any, new: Any) -> Any:
    """`old` with the contents of `new`: in the same memory, if it is a tensor."""
    if isinstance(old, Tensor):
        return old if old.data_ptr() == new.data_ptr() else old.copy_(new)
    if isinstance(old, (list, tuple)):
        return type(old)(map(_over, old, new))
    return new


def _kept(x: Any) -> Any:
    """The same on the same memory, but with tensors of our own: theirs may get other sizes or memory."""
    if isinstance(x, Tensor):
        return x.data
    if isinstance(x, dict):
        return {key: _kept(value) for key, value in x.items()}
    return type(x)(map(_kept, x)) if type(x) in (list, tuple) else x


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from _tensors(y)


def _leaves(result: Any) -> bool:
    """Whether some of a result is not on a device."""
    if isinstance(result, (list, tuple)):
        return any(map(_leaves, result))
    return result is not None and not (isinstance(result, Tensor) and far(result))


def _size(entry: _Entry) -> int:
    held = [entry.result, [contents for _, contents in entry.before]]
    return sum(x.numel() * x.element_size() for x in _tensors(held))


def _depends_on_numbers(operator: Any, args: Any) -> bool:
    """Whether the shape of the result does; of an index it does if that is a mask."""
    if operator is torch.ops.aten.index.Tensor:
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    tags = operator.tags
    return torch.Tag.dynamic_output_shape in tags or torch.Tag.inplace_view in tags


def _random(operator: Any, kwargs: Any) -> Any:
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    generator = kwargs.get("generator") or torch.default_generator
    return generator, generator.get_state()


def _written(operator: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The operands that it writes to."""
    for i, name in _writes(operator):
        yield from _tensors(args[i] if i < len(args) else kwargs.get(name))


@cache
def _writes(operator: Any) -> list[tuple[int, str]]:
    """Their places and names. Of batch norm's running statistics the schema does not say so."""
    statistics = ("running_mean", "running_var") if "batch_norm" in str(operator) else ()
    return [
        (i, x.name)
        for i, x in enumerate(operator._schema.arguments)
        if x.name in statistics or (x.alias_info is not None and x.alias_info.is_write)
    ]
