"""Rounding tests on a GPU without a wait for each: their outcomes are read later, all of them in one go.

To look at the outcome of a test, the host has to wait for the device. So an operator there goes on
with what was rounded, and is logged with its operands. The outcomes are read where a number leaves the
device, before and after an optimizer's step, and at the end of `exact()`.

An operator whose test failed somewhere is then run again, this time settled at once. Mostly that gives
the same bits, as the tests are cautious. If not, all that was changed in place since then is put back,
and what follows runs again as well; the results take the place of the old ones, in the same memory.

What could not be run again so (`_unlogged`) finds all settled: an operator with an operand on the CPU,
which the host may change; one whose result leaves the device or has a shape that depends on numbers; one
that is not PyTorch's own; modes, subclasses and native work.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from reproml.arithmetic.dispatch.schema import tensors, writes, written
from reproml.arithmetic.numerics import devices
from reproml.errors import NotExactError

_C: Any = torch._C
KEY = _C._parse_dispatch_key("Fake")  # by which operators come to us (dispatch.py)

# The log is read when it holds so many operators, or bytes (memory that several hold counts for each).
_OPERATORS, _BYTES = 1000, 1 << 30

active = False  # whether some test has met a device yet; until then nothing is logged

_changes: list[Callable[[], None]] = []  # to be called once when that happens
_lock = threading.RLock()  # the backward pass of a device has a thread of its own
_log: list[_Entry] = []
_held = 0  # bytes in it
_readings = 0  # how often it was read
_local = threading.local()  # outcomes: of the running operator; none where each is read at once


@dataclass(eq=False)
class _Entry:
    """One operator that ran: how to run it again, and all there is to put back or to replace."""

    run: Callable[..., Any]
    args: Any
    kwargs: Any
    before: list[tuple[Tensor, Tensor]]  # what it writes to, and its contents
    random: Any  # the generator that it draws from, and its state
    dtype: torch.dtype  # the default
    result: Any = None
    outcomes: list[Tensor] = field(default_factory=list)  # bool, 0-dim: whether a test failed


def _forked() -> None:
    """A device is not for a forked process."""
    global _lock, _held
    _lock = threading.RLock()
    _log.clear()
    _held = 0


os.register_at_fork(after_in_child=_forked)


@contextmanager
def at_once() -> Iterator[None]:
    """Settle what there is, and each test within at once: for a definition that looks at numbers."""
    flush()
    with _noted(None):
        yield


def at_first(change: Callable[[], None]) -> None:
    """Have `change` called when a device is met for the first time."""
    _changes.append(change)


def defer_test(failed: Tensor, c: Tensor) -> bool:
    """Whether the outcome of a rounding test on c, bool of its shape, is noted and read later.

    Where c is NaN or infinite there is nothing to settle."""
    global active
    outcomes = getattr(_local, "outcomes", None)
    if outcomes is not None:
        outcomes.append((failed & c.isfinite()).any())
        return True
    if not active and devices.is_on_accelerator(failed):
        active = True
        for change in _changes:
            change()
    return False


def run(operator: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """run(*args, **kwargs), which stands for `operator`; on a device its tests are read later.

    Raises NotExactError while a CUDA graph is captured, which could not be settled."""
    global _held
    given = list(tensors([args, kwargs]))
    if not any(map(devices.is_on_accelerator, given)) or hasattr(
        run, "parts"
    ):  # the parts come here by themselves
        return run(*args, **kwargs)
    if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotExactError("a CUDA graph is replayed without rounding tests; do not capture one")
    with _lock:
        targets = list(written(operator, args, kwargs))
        if not all(map(devices.is_on_accelerator, given)) or _unlogged(
            operator, args, kwargs, targets
        ):
            flush()
            return run(*args, **kwargs)
        entry = _Entry(
            run,
            _kept(args),
            _kept(kwargs),
            [(x.data, x.data.clone()) for x in targets],
            _random(operator, kwargs),
            torch.get_default_dtype(),
        )
        readings = _readings
        try:
            with _noted() as entry.outcomes:
                result = run(*args, **kwargs)
        except BaseException:
            if readings == _readings:  # else it is from before it was settled
                _put_back(entry.before)
            raise
        if _log or entry.outcomes:
            entry.result = _kept(result)
            _log.append(entry)
            _held += _size([entry.args, entry.kwargs, entry.result, entry.before])
            if len(_log) >= _OPERATORS or _held >= _BYTES:
                flush()
        return result


def step(run: Callable[..., None], lists: Sequence[list[Any]], options: dict[str, Any]) -> None:
    """An optimizer's step, run(*lists, **options), of which the second list holds the gradients.

    What comes before it is settled first, and itself before it ends. The lists may get other tensors.
    """
    targets = list(tensors([x for i, x in enumerate(lists) if i != 1])) if active else []
    if not any(map(devices.is_on_accelerator, targets)):
        run(*lists, **options)
        return
    with _lock:
        flush()
        given = [list(x) for x in lists]
        before = [(x.data, x.data.clone()) for x in targets]
        failed = True
        try:
            with _noted() as outcomes:
                run(*lists, **options)
            failed = bool(_all(outcomes))
        finally:
            if failed:  # or an error was raised
                _put_back(before)
                for x, y in zip(lists, given):
                    x[:] = y
        if failed:
            run(*lists, **options)


def flush() -> None:
    """Read the outcomes of all tests so far, and put right what they say is wrong."""
    global _held, _readings
    with _lock:
        if not _log:
            return
        log = list(_log)
        _log.clear()
        _held = 0
        _readings += 1
        noted = [(i, outcome) for i, entry in enumerate(log) for outcome in entry.outcomes]
        with _aside():
            places = sorted({noted[i][0] for i in _all([outcome for _, outcome in noted])})
            for i in places:
                if _stands(log[i], log[i:]):
                    continue
                for entry in reversed(log[i:]):
                    _put_back(entry.before)
                for entry in log[i:]:
                    entry.result = _over(entry.result, _again(entry, entry.args, entry.kwargs))
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # other streams may read it from now on
                return


@contextmanager
def _aside() -> Iterator[None]:
    """Native work that no mode sees; results may be inference tensors."""
    with _C._SetExcludeDispatchKeyGuard(KEY, True), _C._DisableTorchDispatch():
        with _C.DisableTorchFunction(), torch.inference_mode(), _noted(None):
            yield


@contextmanager
def _noted(outcomes: Any = ()) -> Iterator[Any]:
    """Outcomes are noted in a list, which this gives; with None each is read at once."""
    outside = getattr(_local, "outcomes", None)
    _local.outcomes = None if outcomes is None else []
    try:
        yield _local.outcomes
    finally:
        _local.outcomes = outside


def _all(outcomes: list[Tensor]) -> list[int]:
    """The places of those that are true."""
    found = []
    for device in {x.device for x in outcomes}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # outcomes of other streams
        here = [i for i, x in enumerate(outcomes) if x.device == device]
        read = torch.stack([outcomes[i] for i in here]).tolist()
        found += [i for i, failed in zip(here, read) if failed]
    return found


def _again(entry: _Entry, args: Any, kwargs: Any) -> Any:
    """Run it once more, with the random numbers and the default dtype that it had."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(entry.dtype)
    generator, then = entry.random or (None, None)
    now = generator.get_state() if generator else None
    try:
        if generator:
            generator.set_state(then)
        return entry.run(*args, **kwargs)
    finally:
        torch.set_default_dtype(dtype)
        if generator:
            generator.set_state(now)


def _stands(entry: _Entry, since: list[_Entry]) -> bool:
    """Whether what it gave was right: that comes out again on its operands as they were.

    since: the log from it on. False also where that cannot be known."""
    operands = {id(x): _then(x, since) for x in tensors([entry.args, entry.kwargs])}
    given = [*tensors(entry.result), *[x for x, _ in entry.before]]
    gave = [_then(x, since[1:]) for x in given]
    if any(x is None for x in [*operands.values(), *gave]):
        return False
    places = {_place(x) for x, _ in entry.before}
    used = lambda x: operands[id(x)].clone() if _place(x) in places else operands[id(x)]  # noqa: E731
    args, kwargs = tree_map_only(Tensor, used, (entry.args, entry.kwargs))
    result = _again(entry, args, kwargs)
    then, now = tensors([entry.args, entry.kwargs]), tensors([args, kwargs])
    copies = {_place(x): y for x, y in zip(then, now)}
    gives = [*tensors(result), *[copies[_place(x)] for x, _ in entry.before]]
    return len(gives) == len(gave) and all(map(_same_bits, gives, gave))


def _then(x: Tensor, since: list[_Entry]) -> Any:
    """The contents of x before the log `since`; None if they are not kept."""
    first, end = _reach(x)
    for entry in since:
        for y, contents in entry.before:
            start, last = _reach(y)
            if start < end and first < last:
                return contents.view_as(x) if _place(x) == _place(y) else None
    return x


def _reach(x: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and after its last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + last * x.element_size()


def _place(x: Tensor) -> Any:
    """What of the memory it is."""
    layout = x.numel() if x.is_contiguous() else (x.shape, x.stride())
    return x.data_ptr(), x.dtype, layout


def _same_bits(x: Tensor, y: Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(a, b)


def _put_back(before: list[tuple[Tensor, Tensor]]) -> None:
    for x, contents in before:
        x.copy_(contents)


def _over(old: Any, new: Any) -> Any:
    """`old` with the contents of `new`, in the same memory."""
    if isinstance(old, Tensor):
        return old if old.data_ptr() == new.data_ptr() else old.copy_(new)
    return type(old)(map(_over, old, new)) if isinstance(old, (list, tuple)) else new


# The same on the same memory, but with tensors of our own: theirs may get other sizes or memory.
_kept = partial(tree_map_only, Tensor, lambda x: x.data)


def _size(x: Any) -> int:
    return sum(y.numel() * y.element_size() for y in tensors(x))


def _unlogged(operator: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> bool:
    """Whether an operator, on operands of devices alone, is none that can be run again later."""
    if _has_effects(operator):
        return True
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return True
    if operator._schema.name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index")):
        masks = (torch.bool, torch.uint8)
        if any(x.dtype in masks for x in tensors(list(args[1:2]))):
            return True
    # several elements in one place
    return any(0 in x.stride() and x.numel() > 1 for x in targets)


@cache
def _has_effects(operator: Any) -> bool:
    """Whether an operator does more than its schema says: it tells the host a number, or gives a tensor a
    shape that depends on numbers, or is none of PyTorch's own."""
    tags, returns = operator.tags, [str(x.type) for x in operator._schema.returns]
    return (
        operator.namespace != "aten"
        or (
            torch.Tag.dynamic_output_shape in tags
            and not operator._schema.name.startswith("aten::index")
        )
        or torch.Tag.inplace_view in tags
        or any("Tensor" not in x for x in returns)
        or not (returns or writes(operator))
    )


def _random(operator: Any, kwargs: Any) -> Any:
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    generator = kwargs.get("generator") or torch.default_generator
    return generator, generator.get_state()
