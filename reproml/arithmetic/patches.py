"""Everything of PyTorch that is replaced while a thread is within `exact()`.

`PATCHES` is the list. `apply` replaces all of it when the first thread enters `exact()`, `restore` restores
it when the last one leaves. These are attributes of the process, which other threads see too, so that most
replacements call the original in a thread that is not within `exact()`.

Two more places replace parts of PyTorch for as long as they observe a program: reproml/script.py and
reproml/tracing/recorder.py. Operators are not replaced but intercepted (dispatch/dispatcher.py).
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Callable

import torch
from torch.autograd.profiler import record_function
from torch.optim.lr_scheduler import CyclicLR, LRScheduler
from torch.utils.data.distributed import DistributedSampler

from reproml.arithmetic import state
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.numerics.libm import ExactMath, ExactPower
from reproml.arithmetic.operators import optimizers, random
from reproml.errors import ReproError
from reproml.torch_internals import (
    OPTIMIZER_STEPS,
    UnknownPyTorchError,
    allow_nonbracketed_mutation,
    profiler_enabled,
    tensor_str,
)

# Owner, name of the attribute, and the function that makes the replacement of the original.
Patch = tuple[Any, str, Callable[[Any], Any]]


@contextmanager
def replaced(patches: Iterable[Patch]) -> Iterator[None]:
    """Replace attributes until the end of the block. Raises UnknownPyTorchError if one is missing."""
    with ExitStack() as stack:
        for owner, name, make in patches:
            try:  # vars() keeps a static method, for which getattr() returns its function
                original = vars(owner)[name] if isinstance(owner, type) else getattr(owner, name)
            except (AttributeError, KeyError):
                raise UnknownPyTorchError(f"{_dotted_name(owner)}.{name}") from None
            setattr(owner, name, make(original))
            stack.callback(setattr, owner, name, original)
        yield


def _dotted_name(owner: Any) -> str:
    if isinstance(owner, type):
        return f"{owner.__module__}.{owner.__qualname__}"
    return getattr(owner, "__name__", type(owner).__name__)


def _always(value: Any) -> Callable[[Any], Any]:
    """Replace an attribute for all threads."""
    return lambda original: value


def _within_exact(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Call `function(original, ...)` in threads that are within `exact()`, the original in others."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def either(*args: Any, **kwargs: Any) -> Any:
            if state.active.depth:
                return function(original, *args, **kwargs)
            return original(*args, **kwargs)

        return either

    return make


def _instead(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Call `function(...)` in threads that are within `exact()`, the original in others."""
    return _within_exact(lambda original, *args, **kwargs: function(*args, **kwargs))


# --- replacements --------------------------------------------------------------------------------


class _AttentionSwitches:
    """PyTorch's switches that are pairs of functions, as attributes."""

    flash = property(
        lambda self: torch.backends.cuda.flash_sdp_enabled(),
        lambda self, on: torch.backends.cuda.enable_flash_sdp(on),
    )
    memory_efficient = property(
        lambda self: torch.backends.cuda.mem_efficient_sdp_enabled(),
        lambda self, on: torch.backends.cuda.enable_mem_efficient_sdp(on),
    )
    cudnn = property(
        lambda self: torch.backends.cuda.cudnn_sdp_enabled(),
        lambda self, on: torch.backends.cuda.enable_cudnn_sdp(on),
    )
    transformer_fast_path = property(
        lambda self: torch.backends.mha.get_fastpath_enabled(),
        lambda self, on: torch.backends.mha.set_fastpath_enabled(on),
    )


_attention = _AttentionSwitches()


def _print_natively(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def text(*args: Any, **kwargs: Any) -> str:
        with dispatcher.natively():
            return original(*args, **kwargs)

    return text


def _enter_label(original: Callable[..., Any], label: Any) -> Any:
    return original(label) if profiler_enabled() else label


def _exit_label(original: Callable[..., Any]) -> Callable[..., Any]:
    def leave(label: Any, *exc: Any) -> None:
        if label.record is not None:  # it was entered
            original(label, *exc)

    return leave


def _scheduler_step(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Do a scheduler's step with correctly rounded powers of, or with, its attributes."""
    numbers: dict[str, float] = {}
    for name in ("gamma", "power"):
        x = getattr(scheduler, name, None)
        if isinstance(x, (int, float)):
            numbers[name] = x
    try:
        for name, x in numbers.items():
            setattr(scheduler, name, ExactPower(x))
        return original(scheduler, *args, **kwargs)
    finally:
        for name, x in numbers.items():
            setattr(scheduler, name, x)


def _exp_range(original: staticmethod[Any, Any]) -> staticmethod[Any, Any]:
    def exact_power(function: Callable[..., float], gamma: float, x: float) -> float:
        return float(function(ExactPower(gamma), x))

    return staticmethod(_within_exact(exact_power)(original.__func__))


def _refuse_uneven_shards(original: Callable[..., Any], sampler: Any) -> Any:
    """Iterate over a sampler, unless PyTorch would repeat or drop samples to make the shards equal."""
    samples, workers = len(sampler.dataset), sampler.num_replicas
    if samples % workers:
        raise ReproError(
            f"DistributedSampler assigns {samples} samples to {workers} workers by repeating or dropping "
            f"some, so that batches depend on the number of workers; use a multiple of {workers}, for "
            f"example torch.utils.data.Subset(data, range({samples - samples % workers}))"
        )
    return original(sampler)


def _optimizer_steps() -> list[Patch]:
    patches: list[Patch] = []
    for name, forms in OPTIMIZER_STEPS.items():
        module = importlib.import_module(f"torch.optim.{name}")
        step = _instead(optimizers.STEPS[name])
        patches += [(module, f"_{form}_{name}", step) for form in forms]
    return patches


# --- the list ------------------------------------------------------------------------------------

_exact_math = _always(ExactMath())

PATCHES: list[Patch] = [
    # Kernels that compute a layer as one operator are off, so that it runs as the operators it consists of.
    (torch.backends.mkldnn, "enabled", _always(False)),
    (torch.backends.cudnn, "enabled", _always(False)),
    (_attention, "flash", _always(False)),
    (_attention, "memory_efficient", _always(False)),
    (_attention, "cudnn", _always(False)),
    (_attention, "transformer_fast_path", _always(False)),
    # The C library's cos, erf and pow differ between systems: schedulers and initializers round correctly.
    (torch.nn.init, "math", _exact_math),
    (torch.optim.lr_scheduler, "math", _exact_math),
    (LRScheduler, "step", _within_exact(_scheduler_step)),
    (CyclicLR, "_exp_range_scale_fn", _exp_range),
    # Its algorithm changed between versions of PyTorch: one of them (operators/random.py).
    (torch.nn.init, "_no_grad_trunc_normal_", _instead(random.trunc_normal_)),
    # Each step of an optimizer is one definition, whichever form it has (operators/optimizers.py).
    *_optimizer_steps(),
    # Labels for a profiler, which are six operators of an optimizer's step, are left out while none runs.
    (record_function, "__enter__", _within_exact(_enter_label)),
    (record_function, "__exit__", _exit_label),
    # To print a tensor PyTorch computes in float64.
    (tensor_str, "_str", _print_natively),
    # The batches of several processes must not depend on how many they are (reproml/distributed.py).
    (DistributedSampler, "__iter__", _within_exact(_refuse_uneven_shards)),
]


class _Applied:
    """The patches, applied once for all threads that are within `exact()`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._undo = ExitStack()

    def apply(self) -> None:
        """Apply the patches, until as many calls of `restore`."""
        with self._lock:
            if self._users == 0:
                with ExitStack() as stack, allow_nonbracketed_mutation():
                    # A compiled function bypasses the operators, so functions run as they are written.
                    # This raises within a compiled function.
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                    stack.enter_context(replaced(PATCHES))
                    self._undo = stack.pop_all()
            self._users += 1

    def restore(self) -> None:
        """Undo one call of `apply`."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                with allow_nonbracketed_mutation():
                    self._undo.close()


_applied = _Applied()
apply, restore = _applied.apply, _applied.restore
