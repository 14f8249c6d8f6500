"""Deferred rounding tests: on a GPU their outcomes are read later, many at once.

To read the outcome of a rounding test, the host has to wait for the device. On a device an operator
therefore returns its rounded result without waiting, and the log records the operator with its operands.
The outcomes are read (`ReplayLog.flush`) where a number leaves the device, before and after an
optimizer's step, and at the end of `exact()`.

An operator with a failed test then runs again, with its tests read immediately. The tests are cautious, so
this mostly gives the same bits. If it does not, everything that was changed in place since then is
restored, the operator and all later ones run again, and their results overwrite the old ones in the same
memory.

An operator that cannot run again later (`_can_replay`) flushes the log first: one with an operand on the
CPU, which the host may change; one whose result leaves the device or has a shape that depends on numbers;
one that is not PyTorch's own. Modes, tensor subclasses and native operators flush it as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.interception import interception
from reproml.arithmetic.dispatch.schema import mutated_arguments, mutated_operands, tensors
from reproml.arithmetic.numerics import devices
from reproml.errors import NotExactError
from reproml.torch_internals import DisableTorchDispatch, DisableTorchFunction, tree_map_only

# Aliases of the same memory: the originals may later get another size or other memory.
_aliases = partial(tree_map_only, Tensor, lambda x: x.data)


@dataclass(eq=False)
class Entry:
    """An operator that ran, with everything needed to run it again and to undo its writes."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    before: list[tuple[Tensor, Tensor]]  # its mutated operands, and copies of their contents
    rng: Any  # the generator that it draws from, and its state; None if it draws nothing
    default_dtype: torch.dtype
    result: Any = None
    outcomes: list[Tensor] = field(default_factory=list)  # bool, 0-dim: whether a test failed

    def rerun(self, args: Any, kwargs: Any) -> Any:
        """Run the operator again, with the random numbers and the default dtype of the first time."""
        default_dtype = torch.get_default_dtype()
        generator, old_state = self.rng or (None, None)
        state = generator.get_state() if generator else None
        torch.set_default_dtype(self.default_dtype)
        try:
            if generator:
                generator.set_state(old_state)
            return self.function(*args, **kwargs)
        finally:
            torch.set_default_dtype(default_dtype)
            if generator:
                generator.set_state(state)

    def size(self) -> int:
        """Return the bytes of its tensors; memory that several of them share counts several times."""
        held = tensors([self.args, self.kwargs, self.result, self.before])
        return sum(x.numel() * x.element_size() for x in held)


class ReplayLog:
    """The operators whose rounding tests have not been read yet, in the order in which they ran."""

    # The log is flushed when it reaches either limit.
    MAX_ENTRIES, MAX_BYTES = 1000, 1 << 30

    def __init__(self) -> None:
        self.active = False  # whether a test has met a device yet; until then nothing is logged
        self.entries: list[Entry] = []
        self.bytes = 0
        self.flushes = 0
        self.lock = threading.RLock()  # a device's backward pass runs in a thread of its own
        # thread.outcomes: where this thread's tests put their outcomes; None if they are read immediately.
        self._thread = threading.local()
        self._on_first_device: list[Callable[[], None]] = []

    def on_first_device(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when a test meets a device for the first time."""
        self._on_first_device.append(callback)

    def reset_after_fork(self) -> None:
        """Drop the log in a forked process, which cannot use the device."""
        self.lock = threading.RLock()
        self.entries, self.bytes = [], 0

    def defer_test(self, failed: Tensor, mid: Tensor) -> bool:
        """Return whether the outcome of a rounding test is recorded, to be read later.

        failed: bool, of the shape of `mid`; ignored where `mid` is infinite or NaN, which needs no test.
        """
        outcomes = getattr(self._thread, "outcomes", None)
        if outcomes is not None:
            outcomes.append((failed & mid.isfinite()).any())
            return True
        if not self.active and devices.is_on_accelerator(failed):
            self.active = True
            for callback in self._on_first_device:
                callback()
        return False

    def run(self, operator: Any, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run function(*args, **kwargs) in place of `operator`; on a device its tests are deferred.

        Raises NotExactError while a CUDA graph is captured, whose replay would skip the tests."""
        operands = list(tensors([args, kwargs]))
        if not any(map(devices.is_on_accelerator, operands)):
            return function(*args, **kwargs)
        if operands[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise NotExactError(
                "a CUDA graph is replayed without rounding tests; do not capture one"
            )
        with self.lock:
            mutated = list(mutated_operands(operator, args, kwargs))
            if not all(map(devices.is_on_accelerator, operands)) or not _can_replay(
                operator, args, kwargs, mutated
            ):
                self.flush()
                return function(*args, **kwargs)
            entry = Entry(
                function,
                _aliases(args),
                _aliases(kwargs),
                _contents(mutated),
                _rng_state(operator, kwargs),
                torch.get_default_dtype(),
            )
            flushes = self.flushes
            try:
                with self.collect_outcomes() as entry.outcomes:
                    result = function(*args, **kwargs)
            except BaseException:
                if flushes == self.flushes:  # otherwise a flush has restored newer contents
                    _restore(entry.before)
                raise
            if self.entries or entry.outcomes:
                entry.result = _aliases(result)
                self._append(entry)
            return result

    def run_step(
        self, step: Callable[..., None], lists: Sequence[list[Any]], options: dict[str, Any]
    ) -> None:
        """Run an optimizer's step(*lists, **options); the second list holds the gradients.

        The log is flushed before, and the step's own tests are read at its end: if one failed, the step
        is undone and runs again. It may put other tensors into the lists.
        """
        mutated = list(tensors([x for i, x in enumerate(lists) if i != 1])) if self.active else []
        if not any(map(devices.is_on_accelerator, mutated)):
            step(*lists, **options)
            return
        with self.lock:
            self.flush()
            originals = [list(x) for x in lists]
            before = _contents(mutated)
            failed = True
            try:
                with self.collect_outcomes() as outcomes:
                    step(*lists, **options)
                failed = bool(failed_indices(outcomes))
            finally:
                if failed:  # or an error was raised
                    _restore(before)
                    for x, original in zip(lists, originals):
                        x[:] = original
            if failed:
                step(*lists, **options)

    def flush(self) -> None:
        """Read the outcomes of all tests in the log, and correct the results of those that failed."""
        with self.lock:
            if not self.entries:
                return
            entries, self.entries, self.bytes = self.entries, [], 0
            self.flushes += 1
            with _native_unseen(), self.immediate_tests():
                owners = [i for i, entry in enumerate(entries) for _ in entry.outcomes]
                failed = failed_indices([x for entry in entries for x in entry.outcomes])
                for i in sorted({owners[j] for j in failed}):
                    if not result_unchanged(entries[i], entries[i:]):
                        _replay(entries[i:])
                        return

    @contextmanager
    def collect_outcomes(self) -> Iterator[list[Tensor]]:
        """Yield a list in which the outcomes of the tests of this thread are collected, unread."""
        outside = getattr(self._thread, "outcomes", None)
        outcomes: list[Tensor] = []
        self._thread.outcomes = outcomes
        try:
            yield outcomes
        finally:
            self._thread.outcomes = outside

    @contextmanager
    def immediate_tests(self) -> Iterator[None]:
        """Flush the log, and read each test immediately: for a definition that looks at numbers."""
        self.flush()
        outside = getattr(self._thread, "outcomes", None)
        self._thread.outcomes = None
        try:
            yield
        finally:
            self._thread.outcomes = outside

    def _append(self, entry: Entry) -> None:
        self.entries.append(entry)
        self.bytes += entry.size()
        if len(self.entries) >= self.MAX_ENTRIES or self.bytes >= self.MAX_BYTES:
            self.flush()


replay_log = ReplayLog()


# ---- reading outcomes and running again ----------------------------------------------------------


def failed_indices(outcomes: list[Tensor]) -> list[int]:
    """Return the indices of the outcomes that are true, with one transfer from each device."""
    found = []
    for device in {x.device for x in outcomes}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # outcomes of other streams
        here = [i for i, x in enumerate(outcomes) if x.device == device]
        values = torch.stack([outcomes[i] for i in here]).tolist()
        found += [i for i, failed in zip(here, values) if failed]
    return found


def result_unchanged(entry: Entry, entries: list[Entry]) -> bool:
    """Return whether `entry`, run again on its original operands, gives the same bits.

    entries: the log from `entry` on. False also where the operands or the result are not known any more.
    """
    operands = {id(x): contents_before(x, entries) for x in tensors([entry.args, entry.kwargs])}
    mutated = [x for x, _ in entry.before]
    old = [contents_before(x, entries[1:]) for x in [*tensors(entry.result), *mutated]]
    if any(x is None for x in [*operands.values(), *old]):
        return False
    written = set(map(_memory_key, mutated))

    def original_operand(x: Tensor) -> Any:
        return operands[id(x)].clone() if _memory_key(x) in written else operands[id(x)]

    args, kwargs = tree_map_only(Tensor, original_operand, (entry.args, entry.kwargs))
    result = entry.rerun(args, kwargs)
    pairs = zip(tensors([entry.args, entry.kwargs]), tensors([args, kwargs]))
    rewritten = {_memory_key(x): y for x, y in pairs}
    new = [*tensors(result), *[rewritten[_memory_key(x)] for x in mutated]]
    return len(new) == len(old) and all(map(_same_bits, new, old))


def contents_before(x: Tensor, entries: list[Entry]) -> Any:
    """Return the contents of x before `entries` ran, or None if they were not kept."""
    start, end = _address_range(x)
    for entry in entries:
        for y, contents in entry.before:
            other_start, other_end = _address_range(y)
            if other_start < end and start < other_end:
                return contents.view_as(x) if _memory_key(x) == _memory_key(y) else None
    return x


def _replay(entries: list[Entry]) -> None:
    """Undo the writes of the entries, run them again, and overwrite their results."""
    for entry in reversed(entries):
        _restore(entry.before)
    for entry in entries:
        entry.result = _overwrite(entry.result, entry.rerun(entry.args, entry.kwargs))
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # other streams may read the results from now on


@contextmanager
def _native_unseen() -> Iterator[None]:
    """Run operators natively and unseen by modes; results may be inference tensors."""
    with interception.natively(), DisableTorchDispatch(), DisableTorchFunction():
        with torch.inference_mode():
            yield


# ---- memory --------------------------------------------------------------------------------------


def _address_range(x: Tensor) -> tuple[int, int]:
    """Return the addresses of its first byte and after its last."""
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + span * x.element_size()


def _memory_key(x: Tensor) -> Any:
    """Return a key that identifies the tensor's memory, dtype and layout."""
    layout = x.numel() if x.is_contiguous() else (x.shape, x.stride())
    return x.data_ptr(), x.dtype, layout


def _same_bits(x: Tensor, y: Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(a, b)


def _contents(mutated: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return an alias of each tensor with a copy of its contents, for `_restore`."""
    return [(x.data, x.data.clone()) for x in mutated]


def _restore(before: list[tuple[Tensor, Tensor]]) -> None:
    for x, contents in before:
        x.copy_(contents)


def _overwrite(old: Any, new: Any) -> Any:
    """Return `old` with the contents of `new`, in the same memory."""
    if isinstance(old, Tensor):
        return old if old.data_ptr() == new.data_ptr() else old.copy_(new)
    return type(old)(map(_overwrite, old, new)) if isinstance(old, (list, tuple)) else new


# ---- which operators can run again later ---------------------------------------------------------


def _can_replay(operator: Any, args: Any, kwargs: Any, mutated: list[Tensor]) -> bool:
    """Return whether an operator, all of whose operands are on devices, can run again later."""
    if _has_other_effects(operator):
        return False
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return False
    if operator._schema.name.startswith(("aten::index", "aten::_index_put", "aten::_unsafe_index")):
        masks = (torch.bool, torch.uint8)
        if any(x.dtype in masks for x in tensors(list(args[1:2]))):
            return False
    # Where several elements share memory, the contents cannot be restored.
    return not any(0 in x.stride() and x.numel() > 1 for x in mutated)


@cache
def _has_other_effects(operator: Any) -> bool:
    """Return whether an operator does more than return and mutate tensors of known shapes: it returns a
    number to the host, or a tensor whose shape depends on numbers, or is not PyTorch's own."""
    tags, returns = operator.tags, [str(x.type) for x in operator._schema.returns]
    return (
        operator.namespace != "aten"
        or (
            torch.Tag.dynamic_output_shape in tags
            and not operator._schema.name.startswith("aten::index")
        )
        or torch.Tag.inplace_view in tags
        or any("Tensor" not in x for x in returns)
        or not (returns or mutated_arguments(operator))
    )


def _rng_state(operator: Any, kwargs: Any) -> Any:
    """Return the generator that the operator draws from, and its state; None if it draws nothing."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    generator = kwargs.get("generator") or torch.default_generator
    return generator, generator.get_state()
