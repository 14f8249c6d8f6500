"""Every private name of PyTorch that reproml uses: what it is for, and what happens without it.

PyTorch may rename or remove these in any release, so they are looked up here, once, when this module is
imported; other modules import them from here. A name that is missing raises UnknownPyTorchError, which
names it and the version of PyTorch: a fallback would be able to change results without an error.

`INTERNALS` lists them all. The names carry no leading underscore here and are otherwise PyTorch's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from reproml.errors import ReproError


class UnknownPyTorchError(ReproError, ImportError):
    """PyTorch lacks a private name that reproml uses, or an operator has other arguments."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"reproml does not know PyTorch {torch.__version__} yet: {problem}")


class Internal(NamedTuple):
    """Why reproml uses a private name."""

    purpose: str
    without: str  # what would happen without it


INTERNALS: dict[str, Internal] = {}


def internal(name: str, purpose: str, without: str) -> Any:
    """Record why a private name is used and return what it names. Raises UnknownPyTorchError."""
    INTERNALS[name] = Internal(purpose, without)
    return lookup(name)


def lookup(name: str) -> Any:
    """Return what a dotted name, such as "torch.nn.init.trunc_normal_", refers to."""
    found: Any = torch
    parts = name.split(".")
    for end, part in enumerate(parts[1:], 2):
        prefix = ".".join(parts[:end])
        try:  # torch.optim deletes the attributes `adam`, `sgd`, ...: the modules are in sys.modules
            found = sys.modules.get(prefix) or getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(prefix)
            except ImportError:
                raise UnknownPyTorchError(f"{name} is missing") from None
    return found


def attribute(example: Any, kind: str, name: str, purpose: str, without: str) -> None:
    """Record a private attribute of every object of a kind, and check that an example has it."""
    INTERNALS[f"{kind}.{name}"] = Internal(purpose, without)
    if not hasattr(example, name):
        raise UnknownPyTorchError(f"{kind}.{name} is missing")


# --- the dispatcher: how operators reach reproml (arithmetic/dispatch/) ---------------------------

DispatchKey = internal(
    "torch._C.DispatchKey",
    "names the keys Python and CompositeImplicitAutograd",
    "operators that PyTorch writes in terms of others would not be decomposed",
)
parse_dispatch_key = internal(
    "torch._C._parse_dispatch_key",
    "returns the key Fake, under which reproml registers its kernels",
    "no operator could be intercepted",
)
DispatchKeySet = internal(
    "torch._C.DispatchKeySet",
    "determines whether the key Fake lies between autograd and the backends",
    "operators might be intercepted too late or too early, and gradients would be lost",
)
dispatch_get_registrations_for_dispatch_key = internal(
    "torch._C._dispatch_get_registrations_for_dispatch_key",
    "determines whether the key Fake is in use",
    "the kernels of two programs would replace each other",
)
dispatch_has_backend_fallback = internal(
    "torch._C._dispatch_has_backend_fallback",
    "determines whether the key Fake is in use",
    "the kernels of two programs would replace each other",
)
dispatch_get_all_op_names = internal(
    "torch._C._dispatch_get_all_op_names",
    "lists the operators for which kernels are registered",
    "no operator could be intercepted while a mode is active",
)
dispatch_tls_set_dispatch_key_included = internal(
    "torch._C._dispatch_tls_set_dispatch_key_included",
    "sends the operators of a thread within exact() to reproml's kernels",
    "no operator could be intercepted",
)
dispatch_tls_set_dispatch_key_excluded = internal(
    "torch._C._dispatch_tls_set_dispatch_key_excluded",
    "runs what a kernel calls natively",
    "kernels would call themselves without end",
)
dispatch_tls_is_dispatch_key_included = internal(
    "torch._C._dispatch_tls_is_dispatch_key_included",
    "determines whether the operators of a thread are intercepted",
    "composite operators would run exactly outside of exact(), too",
)
dispatch_tls_is_dispatch_key_excluded = internal(
    "torch._C._dispatch_tls_is_dispatch_key_excluded",
    "determines whether a tensor subclass is calling an operator natively",
    "a subclass that calls the same operator would call itself without end",
)
SetExcludeDispatchKeyGuard = internal(
    "torch._C._SetExcludeDispatchKeyGuard",
    "runs a block natively, or intercepts operators again within a kernel",
    "kernels would call themselves without end",
)
attribute(
    torch.library.Library,
    "torch.library.Library",
    "_destroy",
    "removes the fallthrough kernels of copies once an accelerator is in use",
    "copies could not be replayed after a failed rounding test on an accelerator",
)

# --- modes and tensor subclasses -----------------------------------------------------------------

len_torch_dispatch_stack = internal(
    "torch._C._len_torch_dispatch_stack",
    "determines whether a TorchDispatchMode is active",
    "modes would not see the operators within exact()",
)
get_current_dispatch_mode = internal(
    "torch.utils._python_dispatch._get_current_dispatch_mode",
    "finds the mode that marks a thread started within exact()",
    "such a thread would compute natively, or hold exact() without need",
)
get_current_dispatch_mode_stack = internal(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "determines whether the mode that intercepts operators, where no key is free, is active",
    "the operators of a definition would be intercepted without end",
)
push_mode = internal(
    "torch.utils._python_dispatch._push_mode",
    "marks a thread that was started within exact(), and intercepts operators where no key is free",
    "such a thread would compute natively, or hold exact() without need",
)
pop_mode = internal(
    "torch.utils._python_dispatch._pop_mode",
    "removes such a mode",
    "all operators of such a thread would be slower",
)
pop_mode_temporarily = internal(
    "torch.utils._python_dispatch._pop_mode_temporarily",
    "calls the innermost TorchDispatchMode, as PyTorch does",
    "modes would not see the operators within exact()",
)
if TYPE_CHECKING:  # a base class needs a type
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = internal(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "sees each operator of a trace at level op",
        "there would be no traces at level op",
    )
DisableTorchDispatch = internal(
    "torch._C._DisableTorchDispatch",
    "hides a block from modes and subclasses",
    "a trace would contain the operators of its own fingerprints",
)
DisableAutocast = internal(
    "torch._C._DisableAutocast",
    "computes an operator that autocast has seen before, after the last micro-batch",
    "autocast would cast operands that it does not cast in the complete batch",
)
AutoDispatchBelowAutograd = internal(
    "torch._C._AutoDispatchBelowAutograd",
    "runs an operator whose gradient has a definition of its own without autograd's",
    "the operator would call its definition without end",
)
DisableTorchFunction = internal(
    "torch._C.DisableTorchFunction",
    "hides a block from __torch_function__ modes and subclasses",
    "rounding tests on an accelerator would be visible to them",
)
DisableTorchFunctionSubclass = internal(
    "torch._C.DisableTorchFunctionSubclass",
    "calls a function of torch from __torch_function__ of a sharded tensor",
    "__torch_function__ would call itself without end",
)
disabled_torch_function_impl = internal(
    "torch._C._disabled_torch_function_impl",
    "gives a subclass no __torch_function__",
    "gradients that are not exchanged yet would be slower to use",
)
make_wrapper_subclass = internal(
    "torch.Tensor._make_wrapper_subclass",
    "makes a sharded tensor and a gradient that is not exchanged yet",
    "no distributed training",
)
is_batchedtensor = internal(
    "torch._C._functorch.is_batchedtensor",
    "recognizes a condition of torch.cond within torch.vmap, for which reproml has no rule",
    "torch.cond would fail there with an error of PyTorch",
)
get_interpreter_stack = internal(
    "torch._C._functorch.get_interpreter_stack",
    "determines whether torch.vmap is active, whose rule for addmm rounds twice",
    "a linear layer within torch.vmap would round twice",
)
TransformType = internal(
    "torch._C._functorch.TransformType", "see get_interpreter_stack", "see get_interpreter_stack"
)
higher_order = internal(
    "torch._ops",
    "the module of higher-order operators, which call functions and compute nothing themselves",
    "torch.cond and torch.while_loop would fail within exact()",
)
internal(
    "torch._ops._compute_keyset",
    "returns the keys for which a higher-order operator needs a rule; reproml's needs none",
    "torch.cond and torch.while_loop would fail within exact()",
)
tree_map_only = internal(
    "torch.utils._pytree.tree_map_only",
    "applies a function to the tensors in nested arguments",
    "no deferred rounding tests and no distributed training",
)
tree_leaves = internal(
    "torch.utils._pytree.tree_leaves",
    "lists the tensors in nested arguments",
    "no distributed training",
)

# --- operators -----------------------------------------------------------------------------------

_operator = torch.ops.aten.add.Tensor
attribute(
    _operator,
    "torch._ops.OpOverload",
    "_schema",
    "holds an operator's name, arguments, and which of them it mutates",
    "no operator could be looked up in the table",
)
attribute(
    _operator,
    "torch._ops.OpOverload",
    "_overloadname",
    "separates the overloads of a data-movement operator that compute",
    "an operator that computes might run natively",
)
attribute(
    _operator,
    "torch._ops.OpOverload",
    "_op",
    "calls an operator without a Python frame",
    "data-movement operators would be slower",
)
canonicalize_dims = internal(
    "torch._prims_common.canonicalize_dims",
    "maps negative dimensions to positive ones and reports those out of range",
    "reductions could not be defined",
)
compute_elementwise_output_strides = internal(
    "torch._prims_common.compute_elementwise_output_strides",
    "returns the memory layout of an elementwise result",
    "sharded tensors would have other strides than PyTorch's",
)

# --- autograd ------------------------------------------------------------------------------------

current_graph_task_id = internal(
    "torch._C._current_graph_task_id",
    "identifies the backward pass that is running",
    "gradients of several processes could not be exchanged together",
)
execution_engine = internal(
    "torch.autograd.Variable._execution_engine",
    "calls a function at the end of a backward pass",
    "gradients of several processes could not be exchanged together",
)
current_autograd_node = internal(
    "torch._C._current_autograd_node",
    "names the backward node of an operator in a trace",
    "traces at level op would not name the forward line of a backward operator",
)
get_sequence_nr = internal(
    "torch._C._autograd._get_sequence_nr",
    "returns the number of the autograd node that was made last",
    "traces at level op would not name the forward line of a backward operator",
)
attribute(
    torch._C._FunctionBase,
    "torch.autograd.graph.Node",
    "_sequence_nr",
    "returns the number of an autograd node",
    "traces at level op would not name the forward line of a backward operator",
)
profiler_enabled = internal(
    "torch._C._autograd._profiler_enabled",
    "determines whether a profiler is running",
    "profilers would not show the names of optimizers' steps",
)

# --- what is replaced: arithmetic/patches.py, tracing/recorder.py --------------------------------

allow_nonbracketed_mutation = internal(
    "torch.backends.__allow_nonbracketed_mutation",
    "sets torch.backends.*.enabled after torch.backends.disable_global_flags()",
    "exact() would raise RuntimeError in programs that call it, such as PyTorch's own tests",
)
tensor_str = internal(
    "torch._tensor_str",
    "the module that prints tensors, for which it computes in float64",
    "tensors could not be printed within exact()",
)
internal("torch._tensor_str._str", "prints a tensor", "see torch._tensor_str")
internal(
    "torch.nn.init._no_grad_trunc_normal_",
    "implements trunc_normal_, whose algorithm depends on the version of PyTorch",
    "initial weights would depend on the version of PyTorch",
)
internal(
    "torch.nn.init.math",
    "is where initializers take erf and sqrt from",
    "initial weights would depend on the C library",
)
internal(
    "torch.optim.lr_scheduler.math",
    "is where schedulers take cos from",
    "learning rates would depend on the C library",
)
internal(
    "torch.optim.swa_utils.math",
    "is where SWALR takes cos from",
    "learning rates would depend on the C library",
)
init_scale_fn = internal(
    "torch.optim.lr_scheduler.CyclicLR._init_scale_fn",
    "finds the function that takes the power again, for a scheduler made before exact()",
    "learning rates would depend on the C library",
)
internal(
    "torch.optim.lr_scheduler.CyclicLR._exp_range_scale_fn",
    "takes a power of gamma",
    "learning rates would depend on the C library",
)
BaseDataLoaderIter = internal(
    "torch.utils.data.dataloader._BaseDataLoaderIter",
    "returns the batches of every data loader",
    "traces would have no batches and no epochs",
)

attribute(
    torch.nn.Identity(),
    "torch.nn.Module",
    "_compiled_call_impl",
    "is set by Module.compile()",
    "diff could not name compilation as a cause",
)


internal(
    "torch.autograd.forward_ad._current_level",
    "determines whether tensors may have tangents, as within torch.func.jvp",
    "forward-mode derivatives that differ between versions of PyTorch would not be refused",
)


def in_forward_mode() -> bool:
    """Return whether torch.func.jvp or a block of forward_ad.dual_level() is active."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether torch.compile(module) made the module, or module.compile() has compiled it."""
    return type(module).__name__ == "OptimizedModule" or bool(module._compiled_call_impl)


# Each module of torch.optim, and its functions that do a step: "single_tensor" for
# torch.optim.adam._single_tensor_adam, and so on. AdamW has Adam's. Those of the optimizers without a
# definition are found by their names (arithmetic/patches.py).
OPTIMIZER_STEPS: dict[str, tuple[str, ...]] = {
    "adam": ("single_tensor", "multi_tensor", "fused"),
    "sgd": ("single_tensor", "multi_tensor", "fused"),
    "adagrad": ("single_tensor", "multi_tensor", "fused"),
    "rmsprop": ("single_tensor", "multi_tensor"),
    "adadelta": ("single_tensor", "multi_tensor"),
    "nadam": ("single_tensor", "multi_tensor"),
    "radam": ("single_tensor", "multi_tensor"),
    "adamax": ("single_tensor", "multi_tensor"),
    "asgd": ("single_tensor", "multi_tensor"),
    "rprop": ("single_tensor", "multi_tensor"),
    "_adafactor": ("single_tensor", "multi_tensor"),
}
for _name, _forms in OPTIMIZER_STEPS.items():
    for _form in _forms:
        internal(
            f"torch.optim.{_name}._{_form}_{_name.lstrip('_')}",
            "does a step of the optimizer",
            "weights would depend on the form of the step and on the C library",
        )

# --- TorchScript ---------------------------------------------------------------------------------

torch_c = torch._C
ScriptFunction = internal(
    "torch._C.ScriptFunction",
    "is the class of scripted functions, whose optimized forms exact() drops before they are called",
    "functions that were called before exact() would compute natively",
)
ScriptMethod = internal("torch._C.ScriptMethod", "see ScriptFunction", "see ScriptFunction")
internal(
    "torch._C.ScriptFunction._debug_flush_compilation_cache",
    "drops the optimized form of a scripted function",
    "functions that were called before exact() would compute natively",
)


def flush_compilation_cache(script: Any) -> None:
    """Drop the optimized form of a scripted function or method."""
    script._debug_flush_compilation_cache()


jit_pass_inline_fork_wait = internal(
    "torch._C._jit_pass_inline_fork_wait",
    "runs what a script forks in the same thread",
    "torch.jit.fork would run in threads that do not inherit exact()",
)
jit_pass_inline = internal(
    "torch._C._jit_pass_inline",
    "writes out what a forked function calls, which may fork in turn",
    "torch.jit.fork of a module would be refused",
)
create_function_from_graph = internal(
    "torch._C._create_function_from_graph",
    "makes a function of a script whose forks are inlined",
    "torch.jit.fork would run in threads that do not inherit exact()",
)
jit_set_profiling_mode = internal(
    "torch._C._jit_set_profiling_mode",
    "keeps scripted functions from being optimized after some calls",
    "scripted functions would compute other gradients after some calls, on a GPU natively",
)
get_graph_executor_optimize = internal(
    "torch._C._get_graph_executor_optimize",
    "restores torch.jit.optimized_execution after a scripted function",
    "scripted functions would be slower after exact()",
)
set_graph_executor_optimize = internal(
    "torch._C._set_graph_executor_optimize",
    "runs a scripted function as written",
    "functions scripted with PyTorch's old executor would compute natively",
)

# --- torch.compile -------------------------------------------------------------------------------

# Not imported here, as it takes seconds; exact() imports it.
DYNAMO = "torch._dynamo"
INTERNALS[DYNAMO] = Internal(
    "is imported before the first exact(), as the optimizers import it at their first step",
    "its import would fail within a mode or a default device",
)
if importlib.util.find_spec(DYNAMO) is None:
    raise UnknownPyTorchError(f"{DYNAMO} is missing")

# Not imported here either; exact() looks them up when it is entered.
TRANSFORMS = [
    "torch._functorch.eager_transforms._grad_increment_nesting",
    "torch._functorch.eager_transforms._jvp_increment_nesting",
    "torch._functorch.eager_transforms._func_increment_nesting",
    "torch._functorch.vmap._vmap_increment_nesting",
]
for _name in TRANSFORMS:
    INTERNALS[_name] = Internal(
        "enters a transform of torch.func, before which the mode of a thread is removed",
        "torch.func.grad and torch.vmap would fail in a thread that was started within exact()",
    )
EXPORTS = {
    "torch.export._trace._export_for_training": "torch.export.export",
    "torch.export.exported_program._decompose_exported_program": "ExportedProgram.run_decompositions",
}
for _name in EXPORTS:
    INTERNALS[_name] = Internal(
        "traces or rewrites a program, which exact() refuses",
        "torch.export would fail within exact(), with an error of PyTorch",
    )
OUTPUT_CODE = "torch._inductor.output_code.OutputCode"
DECORATORS, STANCE = "torch._dynamo.decorators", "torch._dynamo.eval_frame._stance"
INTERNALS[OUTPUT_CODE] = Internal(
    "is the class of compiled functions, which exact() refuses to call",
    "compiled functions would compute natively",
)
INTERNALS[f"{DECORATORS}._set_stance"] = Internal(
    "sets whether functions of torch.compile run as they are written",
    "compiled functions would compute natively after torch.compiler.set_stance()",
)
INTERNALS[STANCE] = Internal(
    "is the stance that remains while exact() is active",
    "torch.compiler.set_stance() would raise AttributeError",
)
