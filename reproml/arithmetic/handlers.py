"""What happens to one operator inside `exact()`: `handler_of` decides, once for each operator.

An operator (an OpOverload, such as aten.add.Tensor) below autograd, forward or backward, is one of these
(`dispatcher.Kind`):

- MOVED: a name of the table's DATA_MOVEMENT or CASTS. It does no arithmetic, so it runs natively.
- DEFINED: a name of the table's EXACT. Its definition runs for float32 operands. With integers alone it
  runs natively if the table's INTEGER names it. dtypes.py converts tensors of 16 bits and of float64; other
  dtypes are refused.
- FOREACH: `_foreach_add` and the like run the functional operator on each element of their lists.
- DECOMPOSED: the operator is written in terms of others, by the table's COMPOSITES or, for other names, by
  PyTorch (CompositeImplicitAutograd); these run instead, and each is intercepted.
- REFUSED: any other. It runs natively if no floating-point number goes in or comes out.

The table names functional operators, such as `add`. The other forms of each follow from it here: the
in-place form `add_` computes the functional form and copies the result into its first operand (or is one
IEEE 754 operation itself, the table's IN_PLACE); the `out=` form copies the results into the outputs that
its schema marks (`_run_definition`).
"""

from __future__ import annotations

import inspect
import os
import threading
import traceback
from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic import dtypes, layouts, state
from reproml.arithmetic import operator_table as table
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.dispatcher import Handler, Kind
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics.formats import NARROW
from reproml.arithmetic.operators import casts
from reproml.errors import NotExactError
from reproml.torch_internals import DispatchKey, UnknownPyTorchError, in_forward_mode

_COMPOSITE = DispatchKey.CompositeImplicitAutograd

Function = Callable[..., Any]
TORCH_FOLDER = os.path.join(os.path.dirname(torch.__file__), "")


def handler_of(operator: Any) -> Handler:
    """Decide what runs in place of an operator inside `exact()`."""
    namespace, _, name = operator._schema.name.partition("::")
    if namespace in ("profiler", "prim"):
        return Handler(Kind.NATIVE, operator)
    if namespace != "aten" or _is_undefined_overload(name, operator):
        return Handler(Kind.REFUSED, _refuse_floats(operator))
    if name in table.EXACT and _takes_arguments(table.EXACT[name], operator):
        outputs = [x.name for x in operator._schema.arguments if x.is_out]
        return Handler(Kind.DEFINED, _run_definition(name, operator, outputs))
    if name in table.CASTS:
        return Handler(Kind.MOVED, _require_strided(table.CASTS[name], rounds_once=True))
    if name in table.DATA_MOVEMENT or name.rstrip("_") in table.DATA_MOVEMENT:
        return Handler(Kind.MOVED, _require_strided(operator))
    if name.endswith("_") and _takes_arguments(table.EXACT.get(name[:-1]), operator):
        return Handler(Kind.DEFINED, _run_definition(name[:-1], operator, ["self"]))
    if name.startswith("_foreach_"):
        return _foreach_handler(name[len("_foreach_") :], operator)
    if operator.has_kernel_for_dispatch_key(_COMPOSITE) or _composite_of(operator):
        return Handler(Kind.DECOMPOSED, _decompose(operator))
    return Handler(Kind.REFUSED, _refuse_floats(operator))


def _is_undefined_overload(name: str, operator: Any) -> bool:
    overload = operator._overloadname.replace("_out", "")
    return f"{name.rstrip('_')}.{overload}" in table.UNDEFINED_OVERLOADS


# What a definition with **kwargs passes on by name, or has no use for.
_WITHOUT_PARAMETER = frozenset(
    """
amsgrad beta1 beta2 dampening device dtype eps found_inf generator grad_scale layout lr maximize
memory_format momentum names nesterov pin_memory weight_decay
""".split()
)


def _takes_arguments(definition: Optional[Function], operator: Any) -> bool:
    """Return whether a definition can be called with the arguments of an operator.

    False for an overload that PyTorch writes in terms of others. Raises UnknownPyTorchError for any other,
    as PyTorch has given it arguments since that the definition would drop. Only a definition with *args,
    which passes them on, takes any number."""
    if definition is None:
        return False
    arguments = [x for x in operator._schema.arguments if not x.is_out]
    in_order = [x.name for x in arguments if not x.kwarg_only]
    by_name = {x.name: None for x in arguments if x.kwarg_only}
    try:
        bound = inspect.signature(definition).bind(*in_order, **by_name)
        known = set(bound.arguments) | _WITHOUT_PARAMETER
        if not known.issuperset(by_name):
            raise TypeError
    except TypeError:
        if operator.has_kernel_for_dispatch_key(_COMPOSITE):
            return False
        raise UnknownPyTorchError(
            f"the arguments of {operator} are not those of its definition"
        ) from None
    return True


# ---- moved ---------------------------------------------------------------------------------------


def _require_strided(function: Function, rounds_once: bool = False) -> Function:
    """Run it natively, unless a tensor is complex or sparse: of these even a copy may compute.

    rounds_once: whether the function itself rounds the numbers that it takes.
    """
    run = getattr(function, "_op", function)  # saves a Python frame
    schema = getattr(function, "_schema", None)
    arguments = enumerate(schema.arguments) if schema else ()
    values = frozenset(
        i for i, x in arguments if str(x.type) in ("number", "Tensor") and x.name[:3] != "ind"
    )

    def strided(*args: Any, **kwargs: Any) -> Any:
        for x in args:  # every operator takes this path: no generator for what is not a list
            if isinstance(x, Tensor):
                if x.layout is not torch.strided or x.is_complex():
                    _refuse_layout(x)
                if not rounds_once and x.dtype in casts.NARROW:
                    args = tuple(_numbers_beside(x.dtype, args, values))
            elif isinstance(x, (list, tuple)):
                for y in tensors(x):
                    if y.layout is not torch.strided or y.is_complex():
                        _refuse_layout(y)
        try:
            return run(*args, **kwargs)
        except RuntimeError:
            given = _numbers_as_tensors(function, args)
            if given is None:
                raise
            return run(*given, **kwargs)

    return strided


def _numbers_as_tensors(operator: Any, args: Any) -> Optional[list[Any]]:
    """Return the operands with each Python number in the place of a tensor as one; None if there is none.

    A 0-dim tensor that PyTorch made of a Python number, as a trace does, becomes that number again on its
    way to a kernel, and not every operator accepts one there.
    """
    schema = getattr(operator, "_schema", None)
    types = [str(x.type) for x in schema.arguments] if schema else []
    places = [i for i, (x, t) in enumerate(zip(args, types)) if t == "Tensor" and _is_number(x)]
    if not places:
        return None
    beside = next((x for x in args if isinstance(x, Tensor)), None)
    given = list(args)
    for i in places:  # in the dtype in which PyTorch computes
        dtype = None if beside is None else torch.result_type(args[i], beside)
        given[i] = torch.tensor(args[i], dtype=dtype)
    return given


def _is_number(x: Any) -> bool:
    return isinstance(x, (bool, int, float))


def _refuse_layout(x: Tensor) -> None:
    if x.is_meta:
        return
    if x.is_complex():
        raise NotExactError(table.COMPLEX)
    raise NotExactError(table.SPARSE if "sparse" in str(x.layout) else _undefined_layout(x))


def _undefined_layout(x: Tensor) -> str:
    return f"it is not defined for {x.dtype} of layout {x.layout}"


def _numbers_beside(dtype: torch.dtype, args: Any, values: frozenset[int]) -> list[Any]:
    """Return the operands with each number such that PyTorch, by way of float32, rounds it once to `dtype`.

    values: the places of operands that may be such numbers; elsewhere an integer is a size or an index. A
    tensor without axes stands for a number.
    """
    given = list(args)
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            if i in values and x.dtype in _WIDE and not x.dim() and not x.is_meta:
                given[i] = casts.float32_to_odd(x)
        elif type(x) is float or (type(x) is int and i in values):
            if not casts.is_float32(x):
                given[i] = casts.number_for(x, dtype)
    return given


_NUMBERS = frozenset([int, float, bool, type(None)])
_WIDE = (torch.float64, torch.int64, torch.int32)


# ---- defined -------------------------------------------------------------------------------------


def _run_definition(name: str, operator: Any, outputs: Sequence[str] = ()) -> Function:
    """Run the definition `name` in place of `operator`, which is its functional, in-place or out= form.

    outputs: the arguments to copy the results into: "self" for an in-place form, none for a functional one.
    """
    definitions = table.EXACT
    in_place = tuple(outputs) == ("self",)
    arrange = layouts.arrangement(name)
    indices = (torch.float32, torch.int64)
    usual = (torch.float32,) if name in table.PROMOTING else indices

    def written(outs: list[Tensor], results: Any) -> Any:
        for out, result in zip(outs, results if len(outs) > 1 else [results]):
            _copy_into(out if in_place else out.resize_(result.shape), result)
        return outs[0] if len(outs) == 1 else tuple(outs)

    def wide(*args: Any, **kwargs: Any) -> Any:
        for x in args[:1] if in_place else [kwargs[output] for output in outputs]:
            if x.dtype in NARROW:
                raise NotExactError(f"its result would be rounded to float64 and then to {x.dtype}")
        return exact(
            *dtypes.as_float64(args), **dict(zip(kwargs, dtypes.as_float64(kwargs.values())))
        )

    def exact(*args: Any, **kwargs: Any) -> Any:
        run = definitions[name]
        if _all_of(usual, args) and (not kwargs or _NUMBERS.issuperset(map(type, kwargs.values()))):
            if not outputs:
                return arrange(run(*args, **kwargs), args)
            if in_place and not kwargs and name in table.IN_PLACE:
                return table.IN_PLACE[name](*args)
            return _copy_into(args[0], run(*args, **kwargs))
        if _is_on_meta(args, kwargs):
            return operator(*args, **kwargs)
        dtypes.require_defined_mixture(name, args)
        outs = [args[0]] if in_place else [kwargs[output] for output in outputs]
        operands = {k: x for k, x in kwargs.items() if k not in outputs}
        if name not in table.FLOAT32_ONLY and dtypes.has_narrow(args, kwargs):
            if dtypes.is_float64(args, operands):
                return wide(*args, **kwargs)
            narrow = True
        elif _runs_natively(name, [*args, *kwargs.values()]):
            return operator(*args, **kwargs)
        else:
            narrow = dtypes.is_narrow_by_default(args, kwargs)
        if narrow and name not in table.ANY_FORMAT:
            results = dtypes.run(name, run, args, operands, outs[0] if outs else None)
        elif (
            name in table.FLOAT64
            and name not in table.MIXED_FLOATS
            and dtypes.gives_float64(args, operands, outs)
        ):
            results = dtypes.run_in_float64(run, args, operands, name in table.PROMOTING)
        else:
            if name in table.PROMOTING:
                args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
            results = run(*args, **operands)
        return written(outs, results) if outs else arrange(results, args)

    if name in table.WITHOUT_FORWARD_MODE:
        return _refuse_in_forward_mode(exact, _is_inexact, "differs between versions of PyTorch")
    if name in table.WITHOUT_NARROW_FORWARD_MODE:
        return _refuse_in_forward_mode(
            exact, lambda x: x.dtype in NARROW, "is not defined for 16 bits"
        )
    return exact


def _refuse_in_forward_mode(
    run: Function, concerns: Callable[[Tensor], bool], why: str
) -> Function:
    """Refuse an operator in forward mode if one of its operands is one that this concerns."""

    def unless_dual(*args: Any, **kwargs: Any) -> Any:
        if in_forward_mode() and any(map(concerns, tensors([*args, *kwargs.values()]))):
            raise NotExactError(
                f"its forward-mode derivative {why}; use reverse mode, such as torch.func.vjp and jacrev"
                + ", or torch.where" * (concerns is _is_inexact)
            )
        return run(*args, **kwargs)

    return unless_dual


def _all_of(dtypes: tuple[torch.dtype, ...], args: Any) -> bool:
    """Return whether the first operand is a float32 tensor, and all others are of these dtypes: the usual
    case, which needs no further check."""
    first = True
    for x in args:
        if isinstance(x, Tensor):
            if x.dtype is not torch.float32 and (first or x.dtype not in dtypes):
                return False
            if x.layout is not torch.strided or x.is_meta:
                return False
        elif first or isinstance(x, (complex, tuple)) or (type(x) is list and _holds_tensors(x)):
            return False
        first = False
    return not first


def _is_on_meta(args: Any, kwargs: Any) -> bool:
    """Return whether an operand, or the result of a factory, has no numbers: nothing is to be computed."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "meta":
        return True
    return any(x.is_meta for x in tensors([args, kwargs]))


def _holds_tensors(x: list[Any]) -> bool:
    return any(isinstance(y, Tensor) or y is None for y in x)


def _runs_natively(name: str, args: list[Any]) -> bool:
    """Return whether the operands are integers alone, for which the definition `name` is not needed.

    Raises NotExactError for complex, sparse and other operands that the definition does not cover."""
    operands = list(tensors(args))
    if not operands:
        return False
    if any(isinstance(x, complex) for x in args):
        raise NotExactError(table.COMPLEX)
    beside_float32 = any(x.dtype is torch.float32 and x.dim() for x in operands)
    in_float64 = name in table.FLOAT64
    for x in operands:
        if x.layout is not torch.strided or x.is_complex():
            _refuse_layout(x)
        if x.dtype is torch.float64 and not x.dim() and beside_float32:
            continue  # beside a float32 tensor it counts like a Python number
        if x.dtype is torch.float64 and in_float64:
            continue
        if _is_inexact(x) and x.dtype is not torch.float32:
            raise NotExactError(
                f"it is defined for {_dtypes_of(name)}, not for {x.dtype}; convert its operands"
            )
    if any(map(_is_inexact, operands)):
        return False
    if name in table.ANY_FORMAT:
        return False
    result = next((x for x in args if isinstance(x, torch.dtype)), None)
    if name in table.INTEGER and not any(isinstance(x, float) for x in args):
        return result is None or not result.is_floating_point
    result = result or torch.get_default_dtype()  # to which PyTorch converts the integers
    if result.is_floating_point and result is not torch.float32 and result not in NARROW:
        if result is not torch.float64 or not in_float64:
            raise NotExactError(f"it is defined for {_dtypes_of(name)}, not for {result}")
    return False


def _dtypes_of(name: str) -> str:
    """Return the dtypes for which an operator is defined, in words."""
    narrow = "" if name in table.FLOAT32_ONLY else " bfloat16 float16"
    *others, last = f"float32{narrow}{' float64' if name in table.FLOAT64 else ''}".split()
    return f"{', '.join(others)} and {last}" if others else last


def _copy_into(out: Tensor, result: Tensor) -> Tensor:
    if not torch.can_cast(result.dtype, out.dtype):
        raise RuntimeError(
            f"result type {result.dtype} can't be cast to the output type {out.dtype}"
        )
    if result.dtype is torch.float64 and out.dtype is not torch.float64:
        raise NotExactError(
            f"its result would be rounded to {result.dtype} and then to {out.dtype}"
        )
    return out if out is result else out.copy_(result)


# ---- foreach -------------------------------------------------------------------------------------


def _foreach_handler(name: str, operator: Any) -> Handler:
    """Handle `_foreach_<name>` by the functional operator of that name."""
    in_place = name.endswith("_")
    name = name.rstrip("_")
    name = "linalg_vector_norm" if name == "norm" else name
    if name in ("maximum", "minimum") and operator._overloadname.startswith("Scalar"):
        name = {"maximum": "clamp_min", "minimum": "clamp_max"}[name]  # which take numbers
    outputs = ["self"] if in_place else [x.name for x in operator._schema.arguments if x.is_out]
    if name in table.EXACT:
        function = _run_definition(name, getattr(torch.ops.aten, name), outputs)
    elif name in table.DATA_MOVEMENT:
        function = _require_strided(getattr(torch.ops.aten, name))
    elif name == "copy" and in_place:
        function = _require_strided(casts.copy_, rounds_once=True)
    else:
        return Handler(Kind.REFUSED, _refuse_floats(operator))

    def foreach(*args: Any, **kwargs: Any) -> Any:
        outs = args[0] if in_place else kwargs.get("out")
        if "scalars" in kwargs:
            kwargs["value"] = kwargs.pop("scalars")
        if name == "linalg_vector_norm" and len(args) > 2:  # which takes axes there
            args, kwargs["dtype"] = args[:2], args[2]
        if name in ("addcdiv", "addcmul"):  # a tensor may hold the numbers
            args = tuple(x.tolist() if isinstance(x, Tensor) else x for x in args)
        if name not in table.EXACT:
            kwargs.pop("out", None)
        count = next(len(x) for x in args if isinstance(x, (list, tuple)))
        results = []
        for i in range(count):
            result = function(
                *[_element(x, i) for x in args], **{k: _element(x, i) for k, x in kwargs.items()}
            )
            if outs is None:
                results.append(result)
            elif result is not outs[i]:  # before the next element, which may share its memory
                _copy_into(outs[i] if in_place else outs[i].resize_(result.shape), result)
        return results if outs is None else None

    return Handler(Kind.FOREACH, foreach)


def _element(x: Any, i: int) -> Any:
    return x[i] if isinstance(x, (list, tuple)) else x


# ---- decomposed ----------------------------------------------------------------------------------


def _composite_of(operator: Any) -> Optional[Function]:
    """Return how the table writes this overload in terms of others, if it does."""
    return table.COMPOSITES.get(str(operator)[len("aten.") :].replace(".default", ""))


def _decompose(operator: Any) -> Function:
    """Run the operator as the table's COMPOSITES write it or, for others, as PyTorch does."""
    composite = _composite_of(operator)
    apart = operator.decompose if operator.has_kernel_for_dispatch_key(_COMPOSITE) else operator

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        with dispatcher.intercept_again():
            if composite is None or _is_on_meta(args, kwargs):
                return apart(*args, **kwargs)
            return composite(*args, **kwargs)

    return decomposed


# ---- refused -------------------------------------------------------------------------------------


def _refuse_floats(operator: Any) -> Function:
    """Run it natively, but only if no floating-point number goes in or comes out."""
    takes_float = any(str(x.type) == "float" for x in operator._schema.arguments)
    namespace, _, name = operator._schema.name.partition("::")
    reason = _reason(name if namespace == "aten" else operator._schema.name)
    rounds = name.startswith(table.ROUNDING_INTEGERS)

    def integers_only(*args: Any, **kwargs: Any) -> Any:
        if _is_on_meta(args, kwargs):
            return operator(*args, **kwargs)
        if rounds or takes_float or any(isinstance(x, (float, complex)) for x in args):
            raise NotExactError(reason)
        if any(_is_inexact(x) for x in tensors([*args, *kwargs.values()])):
            raise NotExactError(reason)
        result = operator(*args, **kwargs)
        if any(_is_inexact(x) for x in tensors([result])):
            raise NotExactError(reason)
        return result

    return integers_only


def _is_inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex() or x.is_quantized


# ---- errors --------------------------------------------------------------------------------------

# A handler or a definition raises a NotExactError with the reason, perhaps with a remedy after a semicolon;
# `refuse` completes it.


def _reason(name: str) -> str:
    """Return why an operator without a definition is refused, with a remedy if the table has one."""
    known = (text for start, text in table.ALTERNATIVES.items() if name.startswith(start))
    return next(known, "it is not in the table of exact operators")


def refuse(error: NotExactError, operator: Any, args: Any, kwargs: Any) -> Any:
    """Raise the error with the operator, its operands and the line of the caller.

    Inside `exact(on_unknown="warn")`, record the operator and run it natively instead."""
    if may_run_natively(str(operator)):
        return operator(*args, **kwargs)
    operands = ", ".join(f"{x.dtype}{list(x.shape)}".replace("torch.", "") for x in tensors(args))
    operands = f" for ({operands})" * bool(operands)
    reason = str(error).rstrip(".")
    if operator.namespace == "c10d":
        reason += "; on several workers, use reproml.distributed.DistributedDataParallel"
    elif ";" not in reason:  # otherwise it has a remedy of its own
        reason += (
            "; write it with operators that have a definition (docs/operators.md), or move this code "
            "out of reproml.exact()"
        )
    raise NotExactError(
        f"{operator} has no exact result{operands}, called at {caller()}: {reason}."
    ) from None


def may_run_natively(name: str) -> bool:
    """Return whether something may run natively, within `exact(on_unknown="warn")`, and record it."""
    if state.active.ran_natively is None:
        return False
    state.active.ran_natively.setdefault(name, caller())
    return True


def caller() -> str:
    """Return file and line of the innermost frame that is neither PyTorch's nor this folder's."""
    ours = (os.path.join(os.path.dirname(__file__), ""), TORCH_FOLDER, threading.__file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(ours):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"
