"""The engine: each operator that PyTorch runs is looked up in the table, or refused.

Every operator below autograd comes here (dispatch.py), the backward ones included. An operator

- of the table's MOVES runs natively: it does no arithmetic;
- of the table's EXACT runs as defined there; its in-place and out= forms follow by themselves;
- that PyTorch itself writes in terms of others (CompositeImplicitAutograd) is taken apart;
- that touches no floating-point number runs natively;
- and any other raises NotExactError.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic import operator_table, state
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.schema import tensors
from reproml.errors import NotExactError

Handler = Callable[..., Any]


def handler(func: Any) -> Handler:
    """What stands for an operator (an OpOverload) within `exact()`."""
    name = func._schema.name
    if not name.startswith("aten::"):
        return func if name.startswith(("profiler::", "prim::")) else _guarded(func)
    name = name[len("aten::") :]
    if (
        f"{name.rstrip('_')}.{func._overloadname.replace('_out', '')}"
        in operator_table.COMPUTING_OVERLOADS
    ):
        return _guarded(func)
    if name not in operator_table.EXACT and (
        name in operator_table.DATA_MOVEMENT or name.rstrip("_") in operator_table.DATA_MOVEMENT
    ):
        return _strided(func)
    if name in operator_table.CASTS:
        return _strided(operator_table.CASTS[name])
    outputs = [a.name for a in func._schema.arguments if a.is_out]
    if name in operator_table.EXACT:
        return _for_float32(name, func, outputs)
    if name.endswith("_") and name[:-1] in operator_table.EXACT:
        return _for_float32(name[:-1], func, ["self"])
    if name.startswith("_foreach_"):
        return _for_each(name[len("_foreach_") :], func)
    if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return _taken_apart(func)
    return _guarded(func)


def _for_each(name: str, func: Any) -> Handler:
    """The plain operator on each position of the lists."""
    plain, in_place = name.rstrip("_"), name.endswith("_")
    plain = {"norm": "linalg_vector_norm"}.get(plain, plain)
    if plain in operator_table.EXACT:
        exact = _for_float32(plain, getattr(torch.ops.aten, plain))
    elif plain in operator_table.DATA_MOVEMENT:
        exact = _strided(getattr(torch.ops.aten, plain))
    else:
        return _guarded(func)

    def each(*args: Any, **kwargs: Any) -> Any:
        def at(i: int, x: Any) -> Any:
            return x[i] if isinstance(x, (list, tuple)) else x

        if "scalars" in kwargs:
            kwargs["value"] = kwargs.pop("scalars")
        results = [
            exact(*[at(i, x) for x in args], **{key: at(i, x) for key, x in kwargs.items()})
            for i in range(len(args[0]))
        ]
        if not in_place:
            return results
        for x, y in zip(args[0], results):
            x.copy_(y)
        return None

    return each


def _taken_apart(func: Any) -> Handler:
    def composite(*args: Any, **kwargs: Any) -> Any:
        with dispatcher.again():
            return func.decompose(*args, **kwargs)

    composite.parts = True  # type: ignore[attr-defined]  # for deferred.run
    return composite


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex() or x.is_quantized


def _strided(func: Handler) -> Handler:
    """Of complex and sparse tensors even a copy may compute: refused."""
    run = getattr(func, "_op", func)  # without a frame of Python's

    def strided(*args: Any, **kwargs: Any) -> Any:
        for x in args:  # every operator passes here: no generator for what is not a list
            if isinstance(x, Tensor):
                if x.layout is not torch.strided or x.is_complex():
                    raise _undefined(x)
            elif isinstance(x, (list, tuple)):
                for y in tensors(x):
                    if y.layout is not torch.strided or y.is_complex():
                        raise _undefined(y)
        return run(*args, **kwargs)

    return strided


def _undefined(x: Tensor) -> NotExactError:
    return NotExactError(f"it is not defined for {x.dtype} of layout {x.layout}")


def _for_float32(name: str, func: Any, outputs: Sequence[str] = ()) -> Handler:
    """The definition, for float32 operands; integers go natively, other floats are refused.

    outputs: of the out= form the names of the results to fill, of the in-place form "self".
    """
    definitions = operator_table.EXACT
    in_place = tuple(outputs) == ("self",)

    def exact(*args: Any, **kwargs: Any) -> Any:
        if not kwargs and _all_float32(args):
            if not outputs:
                return definitions[name](*args)
            if in_place and name in operator_table.IN_PLACE:
                return operator_table.IN_PLACE[name](*args)
        else:
            given = list(tensors([*args, *kwargs.values()]))
            if given and not _is_exact(name, given, [*args, *kwargs.values()]):
                return func(*args, **kwargs)
        if in_place:
            return _fill(args[0], definitions[name](*args, **kwargs))
        filled = [kwargs.pop(output) for output in outputs]
        results = definitions[name](*args, **kwargs)
        if not filled:
            return results
        for out, result in zip(filled, results if len(filled) > 1 else [results]):
            _fill(out.resize_(result.shape), result)
        return filled[0] if len(filled) == 1 else tuple(filled)

    return exact


def _all_float32(args: Any) -> bool:
    """Whether the first operand is float32 and all others are float32 or no floats: the usual case."""
    first = True
    for x in args:
        if isinstance(x, Tensor):
            if x.dtype is not torch.float32 and (first or x.dtype is not torch.int64):
                return False
            if x.layout is not torch.strided:
                return False
        elif first or isinstance(x, (complex, tuple)) or (type(x) is list and _holds_tensors(x)):
            return False
        first = False
    return not first


def _holds_tensors(x: list[Any]) -> bool:
    return any(isinstance(y, Tensor) or y is None for y in x)


def _is_exact(name: str, given: list[Tensor], args: list[Any]) -> bool:
    """Whether the definition applies: False for integers alone. Raises where it would not be exact."""
    if any(isinstance(x, complex) for x in args):
        raise NotExactError("it is not defined for complex numbers")
    beside_float32 = any(x.dtype is torch.float32 and x.dim() for x in given)
    for x in given:
        if x.layout is not torch.strided:
            raise NotExactError(f"it is not defined for layout {x.layout}")
        if x.dtype is torch.float64 and not x.dim() and beside_float32:
            continue  # beside a float32 tensor it counts like a Python number
        if _inexact(x) and x.dtype is not torch.float32:
            raise NotExactError(f"it is defined for float32, not for {x.dtype}")
    floating = any(map(_inexact, given)) or any(
        isinstance(x, float) or (isinstance(x, torch.dtype) and x.is_floating_point) for x in args
    )
    return floating or name not in operator_table.INTEGER


def _fill(out: Tensor, result: Any) -> Tensor:
    if not torch.can_cast(result.dtype, out.dtype):
        raise RuntimeError(
            f"result type {result.dtype} can't be cast to the output type {out.dtype}"
        )
    return out if out is result else out.copy_(result)


def _guarded(func: Any) -> Handler:
    """An operator outside the table: only if no floating-point number goes in or comes out."""

    counts = any(str(a.type) == "float" for a in func._schema.arguments)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if counts or any(isinstance(x, (float, complex)) for x in args):
            raise refusal(func, args, "it is not in the table of exact operators")
        if any(_inexact(x) for x in tensors([*args, *kwargs.values()])):
            raise refusal(func, args, "it is not in the table of exact operators")
        result = func(*args, **kwargs)
        if any(_inexact(x) for x in tensors([result])):
            raise refusal(func, args, "it is not in the table of exact operators")
        return result

    return guarded


def refusal(func: Any, args: Any, why: str) -> NotExactError:
    """The error, with the operator, its operands and the line of the caller."""
    operands = ", ".join(f"{x.dtype}{list(x.shape)}".replace("torch.", "") for x in tensors(args))
    operands = f" for ({operands})" * bool(operands)
    remedy = (
        "write it with operators that have a definition (docs/exact.md), "
        "or take this part out of reproml.exact()."
    )
    if str(func).startswith("c10d."):
        remedy = "for several workers: from reproml.distributed import DistributedDataParallel."
    error = NotExactError(
        f"{func} has no exact result{operands}, called at {_caller()}: {why.rstrip('.')}; {remedy}"
    )
    error.named = True  # type: ignore[attr-defined]
    return error


def _caller() -> str:
    """The innermost frame that is neither PyTorch's nor ours."""
    ours = (__file__.rsplit("/", 1)[0], torch.__file__.rsplit("/", 1)[0], threading.__file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(ours):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"


def refused(error: NotExactError, func: Any, args: Any, kwargs: Any) -> Any:
    if state.active.passed is not None:
        state.active.passed.setdefault(str(func), _caller())
        return func(*args, **kwargs)
    if getattr(error, "named", False):
        raise error
    raise refusal(func, args, str(error)) from None
