"""Everything of PyTorch that is replaced while a thread is within `exact()`.

`PATCHES` is the list. `apply` replaces all of it when the first thread enters `exact()`, `restore` restores
it when the last one leaves. These are attributes of the process, which other threads see too, so that most
replacements call the original in a thread that is not within `exact()`.

Two more places replace parts of PyTorch for as long as they observe a program: reproml/script.py and
reproml/tracing/recorder.py. Operators are not replaced but intercepted (dispatch/dispatcher.py).
"""

from __future__ import annotations

import _thread
import functools
import inspect
import math
import multiprocessing.pool
import re
import struct
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any, Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data.distributed import DistributedSampler

from reproml.arithmetic import handlers, operator_table, state
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.gradients import differing, gradients
from reproml.arithmetic.dispatch.interception import ByMode, interception
from reproml.arithmetic.numerics.libm import EXACT_MATH, ExactPower, exact_functions
from reproml.arithmetic.operators import optimizers, random
from reproml.arithmetic.operators.casts import NARROW, is_float32, wide_numbers
from reproml.errors import NotExactError, ReproError
from reproml.torch_internals import (
    DECORATORS,
    EXPORTS,
    OUTPUT_CODE,
    STANCE,
    TRANSFORMS,
    ScriptFunction,
    ScriptMethod,
    UnknownPyTorchError,
    allow_nonbracketed_mutation,
    create_function_from_graph,
    flush_compilation_cache,
    get_graph_executor_optimize,
    higher_order,
    init_scale_fn,
    is_batchedtensor,
    jit_pass_inline,
    jit_pass_inline_fork_wait,
    jit_set_profiling_mode,
    lookup,
    profiler_enabled,
    set_graph_executor_optimize,
    tensor_str,
    torch_c,
)

# Owner, name of the attribute, and the function that makes the replacement of the original.
Patch = tuple[Any, str, Callable[[Any], Any]]


@contextmanager
def replaced(patches: Iterable[Patch]) -> Iterator[None]:
    """Replace attributes until the end of the block. Raises UnknownPyTorchError if one is missing."""
    with ExitStack() as stack:
        for owner, name, make in patches:
            inherited = isinstance(owner, type) and name not in vars(owner)
            try:  # vars() keeps a static method, for which getattr() returns its function
                own = isinstance(owner, type) and not inherited
                original = vars(owner)[name] if own else getattr(owner, name)
            except AttributeError:
                raise UnknownPyTorchError(f"{_dotted_name(owner)}.{name} is missing") from None
            setattr(owner, name, make(original))
            if inherited:
                stack.callback(delattr, owner, name)
            else:
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


class _ScriptSwitch:
    """PyTorch's switch that lets TorchScript optimize functions, which has no getter, as an attribute."""

    @property
    def profiling(self) -> bool:
        on = jit_set_profiling_mode(False)  # returns what it was
        jit_set_profiling_mode(on)
        return bool(on)

    @profiling.setter
    def profiling(self, on: bool) -> None:
        jit_set_profiling_mode(on)


_script_switch = _ScriptSwitch()


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
    """Do a scheduler's step with a correctly rounded `math`, and powers of, or with, its attributes."""
    numbers: dict[str, float] = {}
    for name in ("gamma", "power"):
        x = getattr(scheduler, name, None)
        if isinstance(x, (int, float)):
            numbers[name] = x
    if isinstance(
        scheduler, CyclicLR
    ):  # if it was made before exact(), it has the original function
        init_scale_fn(scheduler)
    try:
        for name, x in numbers.items():
            setattr(scheduler, name, ExactPower(x))
        with _schedules, exact_functions(_globals_of_schedule(scheduler)):
            return original(scheduler, *args, **kwargs)
    finally:
        for name, x in numbers.items():
            setattr(scheduler, name, x)


_schedules = threading.RLock()  # of the global variables that are replaced during a step


def _globals_of_schedule(scheduler: Any) -> list[dict[str, Any]]:
    """Return the global variables of the modules that compute a scheduler's rates, PyTorch's excepted."""
    functions = [vars(kind).get("get_lr") for kind in type(scheduler).__mro__]
    for function in getattr(scheduler, "lr_lambdas", ()):
        while isinstance(function, functools.partial):
            function = function.func
        functions.append(function if hasattr(function, "__code__") else type(function).__call__)
    found = (getattr(inspect.unwrap(f), "__globals__", {}) for f in functions if f)
    return [x for x in found if not str(x.get("__name__")).startswith("torch.optim.")]


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


def _calculate_gain(original: Callable[..., float], nonlinearity: Any, param: Any = None) -> float:
    """Return the gain of an initializer, which takes a power of a float."""
    return original(nonlinearity, ExactPower(param) if isinstance(param, float) else param)


def _round_once(original: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Make a tensor of Python numbers.

    PyTorch would round them twice to 16 and 8 bits. Other data, such as arrays, it casts like a tensor.
    """
    result = original(*args, **options)
    if result.dtype in NARROW:
        data = args[0] if args else options.get("data", options.get("obj"))
        wide = wide_numbers(data)
        if wide is not None:
            with torch.no_grad():
                result.copy_(torch.from_numpy(np.array(wide, np.float64)))
    return result


def _new_tensor(original: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    return _round_once(functools.partial(original, x), *args, **options)


def _set_item(original: Callable[..., None], x: Tensor, index: Any, value: Any) -> None:
    """Write a number to elements; PyTorch would round it twice to 16 and 8 bits."""
    if isinstance(value, (int, float)) and x.dtype in NARROW and not is_float32(value):
        value = torch.tensor(value, dtype=x.dtype, device=x.device)
    original(x, index, value)


def _refuse_flushing(original: Callable[[bool], bool], mode: bool) -> bool:
    if mode:
        raise NotExactError(
            "torch.set_flush_denormal(True) would flush subnormal numbers to zero, so no result would be "
            "exact; call it outside reproml.exact()."
        )
    return original(mode)


def _hide_block(original: Callable[[], Any]) -> Any:
    """Hide a block of PyTorch's own, of tensors without numbers. Raises NotExactError for others."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.endswith(("_mode_utils.py", "contextlib.py")):  # no_dispatch()
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(handlers.TORCH_FOLDER):
        return original()
    raise _hidden("torch._C._DisableTorchDispatch()")


def _hidden(what: str) -> NotExactError:
    return NotExactError(
        f"{what} would hide operators from reproml, which intercepts them by a mode, as the dispatch key "
        f"that it uses otherwise is taken or missing, called at {handlers.caller()}; move this code out of "
        "reproml.exact()."
    )


def _call_operator(
    original: Callable[..., Any], operator: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Intercept the operator that a subclass passes on by `super().__torch_dispatch__`.

    That excludes all dispatch keys down to `Python`, in some versions of PyTorch with the one that reproml
    uses. The kernel then runs the definition, past modes and subclasses.
    """
    if operator is not state.active.offered or interception.is_active():
        return original(operator, *args, **kwargs)
    state.active.offered = None
    if isinstance(interception, ByMode):
        raise _hidden("super().__torch_dispatch__()")
    with dispatcher.intercept_again():
        return original(operator, *args, **kwargs)


# Optimizers: the functions that do a step, of any module of torch.optim, and a hook for those without one.


def _optimizer_steps() -> list[Patch]:
    patches: list[Patch] = []
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith("torch.optim."):
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if function.__module__ == module_name and re.match(
                    "_(single_tensor|multi_tensor|fused)_", name
                ):
                    step = _step(module_name.rpartition(".")[2])
                    patches.append((module, name, _within_exact(step)))
    return patches


def _step(module: str) -> Callable[..., None]:
    name, step = f"torch.optim.{module.lstrip('_')}", optimizers.STEPS.get(module)

    def exact_step(original: Callable[..., None], *lists: Any, **options: Any) -> None:
        try:
            if step is None:
                raise _undefined_optimizer(name)
            step(*lists, **options)
        except NotExactError:
            if not handlers.may_run_natively(name):
                raise
            with dispatcher.natively():
                original(*lists, **options)

    return exact_step


def _check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse the step of an optimizer of torch.optim, or of a subclass of it, that has no definition.

    Warn of a learning rate that may differ in the last bit between machines.
    """
    name = _undefined_name(type(optimizer))  # type: ignore[arg-type]
    if name and state.active.depth and not handlers.may_run_natively(name):
        raise _undefined_optimizer(name)
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if isinstance(rate, float) and state.active.depth and _is_near_midpoint(rate):
            warnings.warn(
                f"The learning rate {rate!r} is within two binary64 ulps of a midpoint between two float32 "
                "numbers. If functions of the C library computed it, ** among them, it may be rounded "
                "differently on another machine; compute it with reproml.math.",
                stacklevel=2,
            )


def _is_near_midpoint(x: float) -> bool:
    """Return whether x is within two binary64 ulps of a midpoint of two normal binary32 numbers."""
    bits: int = struct.unpack("<Q", struct.pack("<d", x))[0]
    return abs((bits & (1 << 29) - 1) - (1 << 28)) <= 2


@functools.cache
def _undefined_name(kind: type) -> str:
    """Return the name of the class of torch.optim without a definition that `kind` is, or derives from."""
    for base in kind.__mro__:
        of_pytorch = (base.__module__ + ".").startswith("torch.optim.") and base is not Optimizer
        if of_pytorch and base.__name__ not in optimizers.DEFINED:
            return f"torch.optim.{base.__name__.lower()}"
    return ""


def _undefined_optimizer(name: str) -> NotExactError:
    return NotExactError(
        f"The optimizer {name} has no exact definition, called at {handlers.caller()}; use one of "
        f"{', '.join(sorted(optimizers.DEFINED))}, or take its step out of reproml.exact()."
    )


# Threads and processes that are started within exact() inherit it.


class _Within:
    """A function that runs within a context of another thread or process. It can be pickled."""

    def __init__(self, context: Any, function: Callable[..., Any]) -> None:
        self._context, self._function = context, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._context:
            return self._function(*args, **kwargs)


def _start_thread(original: Callable[..., None], thread: threading.Thread) -> None:
    run, context = thread.run, state.active.context
    thread.run = lambda: context.run_in_thread(run)  # type: ignore[method-assign]
    original(thread)


def _start_new_thread(original: Any, function: Any, args: Any, kwargs: Any = None) -> Any:
    context, run = state.active.context, functools.partial(function, *args, **(kwargs or {}))
    return original(context.run_in_thread, (run,))


def _start_process(original: Callable[..., None], process: Any) -> None:
    process.run = _Within(state.active.context, process.run)
    try:
        original(process)
    finally:
        del process.run


def _submit(original: Any, pool: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    return original(pool, _Within(state.active.context, function), *args, **kwargs)


@contextmanager
def _threads_inherit_nothing() -> Iterator[None]:
    depth, state.active.depth = state.active.depth, 0
    try:
        yield
    finally:
        state.active.depth = depth


def _submit_to_thread(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Submit a task, which inherits exact(): the threads of a pool may outlive it."""
    pool, function, *args = args  # type: ignore[assignment]
    task = _Within(state.active.context, function)
    with _threads_inherit_nothing():
        return original(pool, task, *args, **kwargs)


def _make_thread_pool(original: Any, *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(original).bind(*args, **kwargs)
    if given.arguments.get("initializer"):
        function = given.arguments["initializer"]
        given.arguments["initializer"] = _Within(state.active.context, function)
    with _threads_inherit_nothing():
        original(*given.args, **given.kwargs)


# torch.compile: a compiled function bypasses the operators.


def _keep_stance(original: Callable[[Any], Any], stance: Any) -> Any:
    """Run functions as they are written, whatever stance is set within `exact()`."""
    return lookup(STANCE)


def _call_compiled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not handlers.may_run_natively("a function compiled by torch._inductor"):
        raise NotExactError(
            "A function that torch._inductor compiled has no exact result; call the function that was "
            "compiled, or use torch.compile, whose functions run as they are written."
        )
    with dispatcher.natively():
        return original(*args, **kwargs)


# TorchScript: after some calls its executor differentiates and fuses a function, past the operators. With
# profiling off it runs the operators as written. A function that was optimized before is reset.


def _call_script(original: Callable[..., Any], script: Any, *args: Any, **kwargs: Any) -> Any:
    if script not in state.scripts:
        with suppress(RuntimeError):  # raised by executors that never optimize
            flush_compilation_cache(script)
        state.scripts[script] = _exact_script(original, script)
    optimize = get_graph_executor_optimize()
    set_graph_executor_optimize(False)  # for PyTorch's older executor
    try:
        return state.scripts[script](script, *args, **kwargs)
    finally:
        set_graph_executor_optimize(optimize)


def _exact_script(original: Callable[..., Any], script: Any) -> Callable[..., Any]:
    """Return what calls a script. Raises NotExactError for what would run past `exact()`."""
    graph = script.inlined_graph
    forks = bool(graph.findAllNodes("prim::fork"))
    while graph.findAllNodes("prim::fork"):
        jit_pass_inline_fork_wait(graph)
        jit_pass_inline(graph)  # the functions that were forked call others
    refused = [what for kind, what in _REFUSED_IN_SCRIPTS.items() if graph.findAllNodes(kind)]
    if forks and "Future" in str(script.schema):
        refused.append("torch.jit.fork, whose future is returned,")
    for what in refused:
        if handlers.may_run_natively(what):
            return original
        raise NotExactError(
            f"{what} has no exact result in the TorchScript function {script.name}, called at "
            f"{handlers.caller()}; call the Python function or module that was scripted."
        )
    return _in_sequence(script, graph) if forks else original


def _in_sequence(script: Any, graph: Any) -> Callable[..., Any]:
    """Return a function that runs a script without other threads, given its graph without forks."""
    function = create_function_from_graph(script.name, graph)
    takes = script.schema.arguments  # the function has their names, but no defaults

    def call(script: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(script, ScriptMethod):
            args = (script.owner, *args)
        defaults = {x.name: x.default_value for x in takes[len(args) :] if x.has_default_value()}
        return function(*args, **{**defaults, **kwargs})

    return call


_REFUSED_IN_SCRIPTS = {
    "aten::wait": "torch.jit.wait of one of several futures",
    "prim::rpc_async": "torch.distributed.rpc.rpc_async",
    "prim::rpc_sync": "torch.distributed.rpc.rpc_sync",
    "prim::rpc_remote": "torch.distributed.rpc.remote",
    "prim::CallMethod": "A method of a torch.jit.interface",  # of a function that may be optimized
}


def _cond(
    original: Callable[..., Any],
    operator: Any,
    pred: Any,
    true_fn: Any,
    false_fn: Any,
    operands: Any,
) -> Any:
    """Call the function that the predicate selects, as written; PyTorch's own rule is for compiled ones."""
    if dispatcher.has_modes():
        return original(operator, pred, true_fn, false_fn, operands)
    if isinstance(pred, Tensor) and is_batchedtensor(pred):
        raise NotExactError(
            f"torch.cond has no exact result within torch.vmap, called at {handlers.caller()}; use "
            "torch.where."
        )
    return (true_fn if pred else false_fn)(*operands)


# torch.export runs a program on tensors without numbers.


def _refuse_export(name: str) -> Callable[[Any], Any]:
    def refuse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not handlers.may_run_natively(name):
            raise NotExactError(
                f"{name} does not work within reproml.exact(), called at {handlers.caller()}; call it "
                "before, and run the exported program within reproml.exact()."
            )
        with dispatcher.natively():
            return original(*args, **kwargs)

    return _within_exact(refuse)


def _lazy_patches() -> list[Patch]:
    """Return the patches of modules that exact() imports when it is entered."""

    def patch(name: str, make: Callable[[Any], Any]) -> Patch:
        owner, _, attribute = name.rpartition(".")
        return lookup(owner), attribute, make

    for name in (STANCE, f"{DECORATORS}._set_stance"):  # which PyTorch itself uses in `apply`
        lookup(name)
    base = lookup(OUTPUT_CODE)
    calls = [
        (kind, "__call__", _within_exact(_call_compiled))
        for kind in base.__subclasses__()
        if "__call__" in vars(kind)
    ]
    schedules = [  # of packages whose schedulers are no subclass of PyTorch's
        (sys.modules[name], "math", _exact_math)
        for name in (list(sys.modules) if "timm.scheduler" in sys.modules else ())
        if name.startswith("timm.scheduler.") and vars(sys.modules[name]).get("math") is math
    ]
    return [
        *calls,
        *schedules,
        (lookup(DECORATORS), "_set_stance", _within_exact(_keep_stance)),
        *[patch(name, _within_exact(dispatcher.before_transform)) for name in TRANSFORMS],
        *[patch(name, _refuse_export(public)) for name, public in EXPORTS.items()],
    ]


# --- the list ------------------------------------------------------------------------------------

_exact_math = _always(EXACT_MATH)
# Initializers, losses, optimizers, schedulers and distributions.
_math_users = [
    module
    for name, module in sorted(sys.modules.items())
    if re.match(r"torch\.(nn\.init|nn\.functional|optim\.|distributions\.)", name)
    if vars(module).get("math") is math
]

PATCHES: list[Patch] = [
    # Kernels that compute a layer as one operator are off, so that it runs as the operators it consists of.
    (torch.backends.mkldnn, "enabled", _always(False)),
    (torch.backends.cudnn, "enabled", _always(False)),
    (_attention, "flash", _always(False)),
    (_attention, "memory_efficient", _always(False)),
    (_attention, "cudnn", _always(False)),
    (_attention, "transformer_fast_path", _always(False)),
    # The C library's cos, erf and pow differ between systems: schedulers and initializers round correctly.
    *[(module, "math", _exact_math) for module in _math_users],
    (torch.nn.init, "calculate_gain", _within_exact(_calculate_gain)),
    (LRScheduler, "step", _within_exact(_scheduler_step)),
    (CyclicLR, "_exp_range_scale_fn", _exp_range),
    # Its algorithm changed between versions of PyTorch: one of them (operators/random.py).
    (torch.nn.init, "_no_grad_trunc_normal_", _instead(random.trunc_normal_)),
    # Each step of an optimizer is one definition, whichever form it has (operators/optimizers.py).
    *_optimizer_steps(),
    # Labels for a profiler, which are six operators of an optimizer's step, are left out while none runs.
    (record_function, "__enter__", _within_exact(_enter_label)),
    (record_function, "__exit__", _exit_label),
    # Numbers become tensors of 16 and 8 bits by one rounding.
    *[(torch, name, _within_exact(_round_once)) for name in ("tensor", "as_tensor", "asarray")],
    (Tensor, "new_tensor", _within_exact(_new_tensor)),
    (Tensor, "__setitem__", _within_exact(_set_item)),
    # To print a tensor PyTorch computes in float64.
    (tensor_str, "_str", _print_natively),
    # Threads and processes inherit exact(), and so do the tasks of pools.
    (threading.Thread, "start", _within_exact(_start_thread)),
    (_thread, "start_new_thread", _within_exact(_start_new_thread)),
    (BaseProcess, "start", _within_exact(_start_process)),
    (ThreadPoolExecutor, "__init__", _within_exact(_make_thread_pool)),
    (ThreadPoolExecutor, "submit", _within_exact(_submit_to_thread)),
    (ProcessPoolExecutor, "submit", _within_exact(_submit)),
    (multiprocessing.pool.ThreadPool, "__init__", _within_exact(_make_thread_pool)),
    *[
        (multiprocessing.pool.Pool, name, _within_exact(_submit))
        for name in "apply_async imap imap_unordered map map_async starmap starmap_async".split()
    ],
    # A thread that flushes subnormal numbers rounds otherwise.
    (torch, "set_flush_denormal", _within_exact(_refuse_flushing)),
    (type(torch.ops.aten.add.Tensor), "__call__", _within_exact(_call_operator)),
    # TorchScript runs the operators as written, also after several calls.
    (_script_switch, "profiling", _always(False)),
    (torch_c, "_jit_set_profiling_mode", _always(lambda on: False)),
    (ScriptFunction, "__call__", _within_exact(_call_script)),
    (ScriptMethod, "__call__", _within_exact(_call_script)),
    # Higher-order operators, such as torch.cond, run the functions that they are given, by torch.compile.
    (type(torch.ops.higher_order.cond), "__call__", _within_exact(_cond)),
    (torch, "compile", _within_exact(dispatcher.before_transform)),
    (higher_order, "_compute_keyset", _within_exact(dispatcher.keys_of_higher_order)),
    # The batches of several processes must not depend on how many they are (reproml/distributed.py).
    (DistributedSampler, "__iter__", _within_exact(_refuse_uneven_shards)),
]
if isinstance(interception, ByMode):  # which does not see what is hidden from modes
    PATCHES.append((torch_c, "_DisableTorchDispatch", _within_exact(_hide_block)))


# What this PyTorch differentiates otherwise than the table.
GRADIENTS = differing(operator_table.GRADIENTS)


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
                # It raises where PyTorch lacks one, before anything is replaced.
                lazy = _lazy_patches()
                with ExitStack() as stack, allow_nonbracketed_mutation():
                    # A compiled function bypasses the operators, so functions run as they are written.
                    # This raises within a compiled function.
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                    stack.enter_context(replaced([*PATCHES, *lazy]))
                    stack.enter_context(dispatcher.composites(operator_table.COMPOSITES))
                    stack.enter_context(gradients(GRADIENTS))
                    stack.callback(state.scripts.clear)
                    stack.callback(register_optimizer_step_pre_hook(_check_optimizer).remove)
                    self._undo = stack.pop_all()
            self._users += 1

    def join(self) -> bool:
        """Call `apply` if the patches are applied already. Return whether they are."""
        with self._lock:
            self._users += self._users > 0
            return self._users > 0

    def restore(self) -> None:
        """Undo one call of `apply` or `join`."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                with allow_nonbracketed_mutation():
                    self._undo.close()


_applied = _Applied()
apply, join, restore = _applied.apply, _applied.join, _applied.restore
