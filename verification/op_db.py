"""Compare PyTorch's own operator samples under exact arithmetic with a float64 reference.

    python -m verification.op_db [--dtype DTYPE] [NAME ...]     # default: float32, every operator of op_db

Three things are compared for each sample of this dtype of
`torch.testing._internal.common_methods_invocations.op_db` that exact() does not refuse, forward and
backward:

1. every call of an operator of the table with PyTorch's own operator on the same operands in float64.
   The distance is at most half an ulp of the result's dtype, plus the error of the float64 reference. For
   the operators of COMPOSITE, which round more than once, it is a few ulps of the largest element;
2. the results and the gradients with float64 autograd, from end to end, within COARSE, as several
   roundings may lie between;
3. the shapes, dtypes, devices and layouts of the results and the gradients with native PyTorch.

For samples of float64, which have no wider reference, these are the second and the third.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple, Optional
from unittest import TestCase, mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import reproml
from reproml.arithmetic import layouts, operator_table
from reproml.arithmetic.dispatch import dispatcher

# Expressions of several rounded steps (docs/operators.md names the steps). STEPS is their allowed error,
# relative to the largest element of the result.
COMPOSITE = frozenset(
    """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    native_batch_norm_backward native_layer_norm native_layer_norm_backward native_group_norm
    native_group_norm_backward renorm embedding_renorm
    histogram _ctc_loss _ctc_loss_backward
    """.split()
)
STEPS = 2.0**5  # units of the last place
STEPS_OF = {"_ctc_loss_backward": 2.0**13}  # exponentials of sums of many steps

dtype = torch.float32  # of the samples
# Precision in bits, exponents of the smallest normal number and of the first power of two that overflows.
FORMATS = {
    torch.float32: (24, -126, 128),
    torch.bfloat16: (8, -126, 128),
    torch.float16: (11, -14, 16),
    torch.float64: (53, -1022, 1024),
}
# Their statistics are float32 also beside weights of 16 bits, as on an accelerator.
STATISTICS = frozenset(
    {"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"}
)

FACTORIES = frozenset({"arange", "linspace", "logspace"})  # made of Python numbers alone

# These use Python numbers as given; all others round them to binary32 first.
AS_GIVEN = (
    COMPOSITE
    | FACTORIES
    | {"var", "std", "var_mean", "std_mean"}
    | {"smooth_l1_loss", "smooth_l1_loss_backward", "huber_loss", "huber_loss_backward"}
    | {name for name in operator_table.EXACT if "upsample_" in name}  # scale factors
)

# Error of the float64 reference, relative to its largest element and its operands.
REFERENCE = 2.0**-46
# Allowed error from end to end, relative to the largest element, or to 1.
COARSE = {
    torch.float32: 2.0**-13,
    torch.bfloat16: 2.0**-2,
    torch.float16: 2.0**-5,
    torch.float64: 2.0**-36,
}
# The gradient consists of logarithms and exponentials, whose errors grow with the numbers.
COARSE_OF = {
    "logcumsumexp": 2.0**-9,
    "nn.functional.ctc_loss": 2.0**-9,
    "nn.functional.hardsigmoid": 2.0**-13,  # see REFERENCE_OFF
    # The gradient of softmax cancels, and PyTorch takes all steps in float32.
    "nn.functional.scaled_dot_product_attention": COARSE[torch.float32],
}

# Outputs that only PyTorch's own backward kernel reads, which exact() replaces, and others that differ.
UNUSED = frozenset(
    {
        ("_ctc_loss", 1),
        ("log_sigmoid_forward", 1),
        ("nll_loss_forward", 1),
        ("nll_loss2d_forward", 1),
    }
    | {("_embedding_bag", i) for i in (1, 2, 3)}
    # Which one of equal elements is selected.
    | {(name, 1) for name in ("kthvalue", "median", "nanmedian", "mode")}
    | {("_linalg_det", 1), ("_linalg_det", 2), ("_linalg_slogdet", 2), ("_linalg_slogdet", 3)}
    | {("nextafter", 0)}  # of float64 it is another number
    | {("linalg_qr", 0), ("linalg_qr", 1)}  # R has a positive diagonal here
    | {("_linalg_solve_ex", 1), ("_linalg_solve_ex", 2)}
)
# The reference is inaccurate, not the result: PyTorch's float64 kernel has 1 / 6 in float32, and the bound
# 1 - eps of logit is rounded to float32 in float32 only.
REFERENCE_OFF = {
    **{"hardsigmoid_backward": 2.0**-24, "logit": 2.0**-21, "logit_backward": 2.0**-21},
    # PyTorch's float64 kernels have errors of 10^-6 for some arguments beyond 5.
    **dict.fromkeys(["special_bessel_j0", "special_bessel_j1", "special_airy_ai"], 2.0**-19),
}
# The elements of their results are uninitialised or random, or have other signs.
ARBITRARY = (
    "empty",
    "rand",
    "bernoulli",
    "multinomial",
    "normal",
    "uniform",
    "exponential",
    "cauchy",
    "qr",
    "dropout",
    "fractional_max_pool",
)

SHOWN = 3  # failures printed for an operator, unless it was named on the command line


class Outcome(NamedTuple):
    """The outcome of one sample: "passed", "failed" or "refused", and why."""

    status: str
    reason: str = ""


def name_of(func: Any) -> str:
    """Return the key of the table for an operator: add for aten::add_."""
    name: str = func._schema.name[len("aten::") :]
    return name if name in operator_table.EXACT else name.rstrip("_")


def _double(x: Any) -> Any:
    """Copy a tree, with every tensor and dtype of FORMATS in it converted to float64."""

    def convert(x: Any) -> Any:
        if isinstance(x, Tensor):
            y = x.detach().clone()
            return (y.double() if y.dtype in FORMATS else y).requires_grad_(x.requires_grad)
        return torch.float64 if isinstance(x, torch.dtype) and x in FORMATS else x

    return tree_map(convert, x)


def copy(tree: Any) -> Any:
    """Copy a tree of operands; the tensors become leaves."""

    def leaf(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(leaf, tree)


def _as_operands(x: Any) -> Any:
    """Round Python numbers and 0-dim float64 tensors in a tree to binary32, as beside a float32 tensor."""

    def convert(x: Any) -> Any:
        if isinstance(x, float):
            return torch.tensor(x, dtype=torch.float32).item()
        if isinstance(x, Tensor) and x.dtype is torch.float64 and not x.dim():
            return x.float().double()
        return x

    return tree_map(convert, x)


def _converted(x: Any) -> Any:
    """Convert a tensor of integers to the dtype in which PyTorch computes beside one of 16 bits."""
    integers = isinstance(x, Tensor) and x.dim() and not x.is_floating_point()
    return x.to(dtype).double() if integers else x


def all_tensors(x: Any) -> list[Tensor]:
    return [t for t in tree_flatten(x)[0] if isinstance(t, Tensor)]


def _with_defaults(func: Any, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments, with the schema's default numbers rounded like those given."""
    defaults = {
        a.name: a.default_value
        for a in func._schema.arguments[len(args) :]
        if isinstance(a.default_value, float) and a.name not in kwargs
    }
    return kwargs if name_of(func) in AS_GIVEN else {**kwargs, **_as_operands(defaults)}


def _largest(x: Tensor) -> float:
    x = x.detach().double().abs()
    x = x[x.isfinite()]
    return float(x.max()) if x.numel() else 0.0


def ulp(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the distance between numbers of a dtype around each element of x, as float64."""
    precision, smallest, _ = FORMATS[dtype]
    exponent = torch.frexp(x.abs().clamp(min=2.0**smallest))[1]
    return torch.ldexp(torch.ones_like(x), exponent - precision)


def difference(got: Tensor, reference: Tensor, allowed: Tensor) -> str:
    """Describe the element of `got` that exceeds the allowed distance most, or return an empty string."""
    if got.shape != reference.shape:
        return f"shape {list(got.shape)}, not {list(reference.shape)}"
    if not got.numel():
        return ""
    x, y = got.detach().double(), reference.detach()
    if got.dtype in FORMATS and got.dtype is not torch.float64:
        precision, _, top = FORMATS[got.dtype]
        y = torch.where(
            y.abs() >= 2.0**top * (1 - 2.0 ** -(precision + 1)), y.sign() * torch.inf, y
        )
    both = (x == y) | (x.isnan() & y.isnan())
    off = torch.where(both, 0.0, ((x - y).abs() - allowed).nan_to_num(torch.inf, torch.inf))
    if not bool((off > 0).any()):
        return ""
    i = int(off.argmax())
    return f"{x.flatten()[i].item()!r} for {y.flatten()[i].item()!r} (element {i})"


class Checker(TorchDispatchMode):
    """A mode for use inside exact() that compares each call of a table operator with float64."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_compared(func, all_tensors([args, kwargs])):
            return func(*args, **kwargs)
        name = name_of(func)
        with dispatcher.natively():  # before the call, which may mutate its operands
            wide_args, wide_kwargs = list(args), kwargs
            if name not in AS_GIVEN:
                wide_args, wide_kwargs = _as_operands([wide_args, wide_kwargs])
            if name in layouts.ELEMENTWISE and dtype is not torch.float32:
                wide_args = tree_map(_converted, wide_args)
            wide_args, wide_kwargs = _double([wide_args, wide_kwargs])
        result = func(*args, **kwargs)
        if name in FACTORIES and result.dtype not in FORMATS:
            return result
        with dispatcher.natively():
            self.calls[name] += 1
            shapes = [list(t.shape) for t in all_tensors([args, kwargs])]
            for i, message in _wrong_outputs(func, result, wide_args, wide_kwargs):
                self.wrong.append(f"{func} output {i} of {shapes}: {message}")
        return result


def _is_compared(func: Any, operands: list[Tensor]) -> bool:
    """Return whether it is a deterministic operator of the table, on operands of FORMATS."""
    name = name_of(func)
    return (
        name in operator_table.EXACT
        and dtype is not torch.float64
        and torch.Tag.nondeterministic_seeded not in func.tags
        and (any(x.dtype in FORMATS for x in operands) or name in FACTORIES)
        and not any(x.dtype is torch.float64 and x.dim() for x in operands)
        and {x.dtype for x in operands if x.is_floating_point()} != {torch.float64}
    )


def _wrong_outputs(
    func: Any, result: Any, args: list[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    """Yield index and description of each output that is not the rounded float64 result on args, kwargs."""
    name = name_of(func)
    if name in FACTORIES:
        kwargs["dtype"] = torch.float64
    if name == "log_sigmoid_backward":  # its buffer is the forward's second output
        args[2] = torch.ops.aten.log_sigmoid_forward(args[1])[1]
    if name == "_pdist_backward" and args[2] == math.inf:  # the largest elements equal the distance
        args[3] = torch.ops.aten._pdist_forward(*args[1:3])
    if name == "_cdist_backward" and args[3] == math.inf:
        args[4] = torch.ops.aten._cdist_forward(*args[1:4], None)
    reference = func(*args, **_with_defaults(func, args, kwargs))
    size = max([1.0, *map(_largest, all_tensors([args, kwargs]))])
    for i, (x, y) in enumerate(zip(all_tensors(result), all_tensors(reference))):
        if (name, i) in UNUSED:
            continue
        if x.dtype not in FORMATS:
            if x.dtype is not y.dtype or not torch.equal(x, y):
                yield i, f"{x.dtype} differs from {y.dtype}"
            continue
        allowed = (_largest(y) + size * size) * REFERENCE_OFF.get(name, REFERENCE)
        if name in COMPOSITE:
            unit = 2.0 ** -FORMATS[x.dtype][0]
            limit = torch.full_like(
                y, max(_largest(y), 1.0) * STEPS_OF.get(name, STEPS) * unit + allowed
            )
        else:
            limit = ulp(y, x.dtype) / 2 * (1 + 2.0**-20) + allowed
        message = difference(x, y, limit)
        if message:
            yield i, message


def gradients(outputs: Any, inputs: Any, seed: int) -> list[Optional[Tensor]]:
    """Return the gradients of all inputs, for incoming gradients of a fixed pattern."""
    outs = [t for t in all_tensors(outputs) if t.requires_grad and t.is_floating_point()]
    leaves = [t for t in all_tensors(inputs) if t.requires_grad]
    if not outs or not leaves:
        return []
    incoming = []
    for t in outs:
        pattern = [(n * 37 % 64 - 31) / 32 for n in range(seed, seed + t.numel())]
        incoming.append(torch.tensor(pattern, dtype=t.dtype).reshape(t.shape))
    found = torch.autograd.grad(outs, leaves, incoming, allow_unused=True)
    # Whether one without elements is a tensor depends on PyTorch's version.
    return [g if g is not None and g.numel() else None for g in found]


def _run(op: Any, sample: Any, tree: Any, backward: bool) -> tuple[Any, list[Optional[Tensor]]]:
    torch.manual_seed(0)
    input, args, kwargs = tree
    result = op(input, *args, **kwargs)
    kept = sample.output_process_fn_grad(result) if sample.output_process_fn_grad else result
    return result, gradients(kept, tree, 1) if backward else []


def check(op: Any, sample: Any, backward: bool) -> tuple[Outcome, Counter[str]]:
    """Check one sample: return the outcome, and how often each operator of the table was compared."""
    tree = (sample.input, sample.args, sample.kwargs)
    checker = Checker()

    try:
        native, native_grads = _run(op, sample, copy(tree), backward)
        given = _as_operands(tree) if op.name == "histc" else tree  # a bound decides on the bin
        wide, wide_grads = _run(op, sample, _double(given), backward)
    except Exception as error:  # PyTorch itself does not run this sample in these dtypes
        return Outcome("refused", f"natively: {type(error).__name__}"), checker.calls
    try:
        with reproml.exact(), checker:
            result, grads = _run(op, sample, copy(tree), backward)
    except reproml.NotExactError as error:
        return Outcome("refused", str(error)), checker.calls
    except Exception as error:
        return Outcome("failed", f"{type(error).__name__}: {error}"), checker.calls
    if checker.wrong:
        return Outcome("failed", checker.wrong[0]), checker.calls
    random = any(word in op.name for word in ARBITRARY)
    if op.name == "mode" and torch.finfo(dtype).bits == 16:  # often of several equal elements
        grads, native_grads, wide_grads = map(_sorted, (grads, native_grads, wide_grads))
    for kind, ours, theirs, references in (
        ("result", result, native, wide),
        ("gradient", grads, native_grads, wide_grads),
    ):
        message = _compare(
            all_tensors(ours),
            all_tensors(theirs),
            all_tensors(references),
            random,
            _coarse(op.name, tree),
            op.name in STATISTICS,
        )
        if message:
            return Outcome("failed", f"{kind} {message}"), checker.calls
    return Outcome("passed"), checker.calls


def _sorted(gradients: list[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """Return gradients that do not depend on which element they are of."""
    return [None if x is None else x.flatten().sort().values.view_as(x) for x in gradients]


def _coarse(name: str, tree: Any) -> float:
    """Return the allowed error from end to end; none is known in 16 bits where errors grow."""
    if dtype is torch.float64 and any(x.dtype is torch.float32 for x in all_tensors(tree)):
        return COARSE[torch.float32]
    if name not in COARSE_OF or dtype is torch.float32:
        return COARSE_OF.get(name, COARSE[dtype])
    return math.inf


def _compare(
    ours: list[Tensor],
    theirs: list[Tensor],
    references: list[Tensor],
    random: bool,
    coarse: float,
    has_statistics: bool = False,
) -> str:
    if len(ours) != len(theirs):
        return f"has {len(ours)} tensors, not {len(theirs)}"
    for i, (x, native, wide) in enumerate(zip(ours, theirs, references)):
        for what in ("shape", "dtype", "device", "layout"):
            if what == "dtype" and has_statistics and i and torch.finfo(dtype).bits == 16:
                continue
            if getattr(x, what) != getattr(native, what):
                return f"{i}: {what} {getattr(x, what)}, not {getattr(native, what)}"
        if random or not x.is_floating_point() or not wide.is_floating_point():
            continue
        if dtype is not torch.float32:  # what leaves the range on the way does so natively, too
            same = (x == native) | (x.isnan() & native.isnan())
            wide = torch.where(same & ((x == 0) | ~x.isfinite()), x.double(), wide.double())
        allowed = torch.full_like(wide, coarse * max(1.0, _largest(wide)), dtype=torch.float64)
        message = difference(x, wide.double(), allowed)
        if message:
            return f"{i}: {message}"
    return ""


def operators(names: Any = ()) -> Iterator[Any]:
    """Yield op_db's operators for the dtype on the CPU, all of them or those named."""
    # PyTorch's samples import expecttest for a base class of tests, which are not used here. It has to be
    # a module, as hypothesis reads all of sys.modules.
    expecttest = ModuleType("expecttest")
    expecttest.TestCase = TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", expecttest)
    with mock.patch("torch.backends.disable_global_flags"):  # it would outlive the import
        from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if (not names or op.name in names) and dtype in op.supported_dtypes("cpu"):
            yield op


def title(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def samples(op: Any) -> Iterator[tuple[Any, bool]]:
    """Yield each sample, and whether it has a backward pass."""
    backward = op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    for sample in op.sample_inputs("cpu", dtype, requires_grad=backward):
        yield sample, backward


def main(arguments: list[str]) -> int:
    global dtype
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=[str(x)[6:] for x in FORMATS])
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    names, dtype = options.names, getattr(torch, options.dtype)
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    refused: list[str] = []
    claimed = 0
    for op in operators(names):
        outcomes: Counter[str] = Counter()
        for number, (sample, backward) in enumerate(samples(op)):
            outcome, compared = check(op, sample, backward)
            calls += compared
            outcomes[outcome.status] += 1
            if outcome.status == "failed" and (names or outcomes["failed"] <= SHOWN):
                print(
                    f"{title(op)} sample {number}: {outcome.status}: {outcome.reason}", flush=True
                )
        counts += outcomes
        ran = outcomes["passed"] + outcomes["failed"]
        claimed += ran > 0
        counts["operators"] += 1
        counts["all"] += ran > 0 and not outcomes["refused"]
        if not ran:
            refused.append(title(op))
    ran = counts["passed"] + counts["failed"]
    print(f"refused throughout: {', '.join(refused)}")
    print(f"never called: {', '.join(sorted(set(operator_table.EXACT) - set(calls)))}")
    print(
        f"{counts['operators']} operators in op_db; {claimed} claimed ({counts['all']} with every "
        f"sample), {len(refused)} refused. {ran} samples ran, {counts['refused']} were refused; "
        f"{counts['passed']} passed, {counts['failed']} failed. {sum(calls.values())} calls of "
        f"{len(calls)} lines of the table were compared."
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
