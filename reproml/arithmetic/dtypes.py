"""Operators on bfloat16, float16 and float64 tensors.

A number of 16 bits is a float32 number, so the definition of the operator runs on widened operands, while
`numerics/formats.py` rounds its results to the dtype that PyTorch gives them. Type promotion is PyTorch's:
operands of 16 bits and of float32, or of both kinds of 16 bits, give float32.

Beside float64 tensors, those of other dtypes become float64, and the definition runs on these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic import layouts
from reproml.arithmetic import operator_table as table
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics.formats import FORMATS, NARROW, rounding_to
from reproml.arithmetic.operators import casts
from reproml.errors import NotExactError


def has_narrow(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operand, a list of operands or an argument `dtype` is of 16 bits."""
    values = [*args, *kwargs.values()]
    return any(x in NARROW for x in values if isinstance(x, torch.dtype)) or any(
        x.dtype in NARROW for x in tensors(values)
    )


def is_narrow_by_default(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether the default dtype is of 16 bits, and neither operands nor `dtype` decide instead."""
    if torch.get_default_dtype() not in NARROW:
        return False
    values = [*args, *kwargs.values()]
    return not any(isinstance(x, torch.dtype) for x in values) and not any(
        x.is_floating_point() for x in tensors(values)
    )


def gives_float64(args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[Tensor]) -> bool:
    """Return whether PyTorch computes in float64: it promotes to it, an argument asks for it, or it is the
    default of integers and of numbers that are drawn, or the dtype of the tensors to write these to.
    """
    values = [*args, *kwargs.values()]
    asked = next((x for x in values if isinstance(x, torch.dtype)), None)
    floats = [x for x in tensors(values) if x.is_floating_point()]
    floats = floats or [x for x in tensors(outs) if x.is_floating_point()]
    if asked in (None, torch.float64):
        return (asked or _promoted(floats)) is torch.float64
    if floats and _promoted(floats) is torch.float64:
        raise NotExactError(f"A result of {asked} is not defined for float64 operands.")
    return False


def require_defined_mixture(name: str, args: Sequence[Any]) -> None:
    """Raise RuntimeError for operands of several dtypes where PyTorch, or one of its versions, does.

    Raises NotExactError where PyTorch rounds a result to the dtype of an operand that is not the widest."""
    if name in table.RESULT_LIKE:
        like = args[table.RESULT_LIKE[name]]
        if isinstance(like, Tensor) and _promoted(args) is not like.dtype:
            raise NotExactError(
                f"PyTorch rounds its result from {_promoted(args)} to {like.dtype}; convert the operands "
                "to one dtype"
            )
    elif name in table.ONE_DTYPE:
        is_number = name == "lerp" and not getattr(args[2], "ndim", 0)  # its weight
        _require_one_dtype(name, args[:2] if is_number else args)
    elif name in table.WITH_PARAMETERS:
        places, of_parameters = table.WITH_PARAMETERS[name]
        dtype = _require_one_dtype(name, [args[i] for i in places])
        _require_one_dtype(name, [args[i] for i in of_parameters if i < len(args)])
        for x in tensors(args):
            if x.dtype is not torch.float32 or dtype not in NARROW:
                _require_one_dtype(name, [args[places[0]], x])


def _require_one_dtype(name: str, operands: Sequence[Any]) -> Optional[torch.dtype]:
    """Return the dtype of the floating-point tensors among the operands."""
    dtype = None
    for x in tensors(operands):
        if x.is_floating_point() and x.dtype is not (dtype := dtype or x.dtype):
            raise RuntimeError(
                f"{name}: expected operands of one dtype, but found {dtype} and {x.dtype}"
            )
    return dtype


def run_in_float64(
    definition: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    with_integers: bool,
) -> Any:
    """Run a definition on float64 operands, and round its results once to float64.

    with_integers: whether integers become float64 too.
    """
    operands = list(tensors([*args, *kwargs.values()]))
    wide = {
        id(x): x.double()
        for x in operands
        if x.dtype is not torch.float64 and (with_integers or x.is_floating_point())
    }
    with rounding_to(torch.float64):
        return _run_widened(definition, args, kwargs, wide)


def _run_widened(
    definition: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    wide: dict[int, Tensor],
) -> Any:
    """Run a definition on operands of which some are replaced: wide has the other tensors, by the id."""
    return definition(
        *[_replaced(x, wide) for x in args],
        **{k: _replaced(x, wide) for k, x in kwargs.items()},
    )


# Operators of which the results have dtypes of their own: for each result, the operand whose dtype it has,
# None for float32, or a tuple, of which the first operand that is there counts.
_RESULTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        """native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit
        _native_batch_norm_legit_no_training""".split(),
        (0, None, None),
    ),
    "native_layer_norm_backward": (1, (5, 1), (5, 1)),
    "native_group_norm_backward": (1, (4, 1), (4, 1)),
    "native_batch_norm_backward": (1, (2, 1), (2, 1)),
    "_weight_norm_interface": (0, None),
    "_weight_norm_interface_backward": (1, 2),
}
# Operands that a definition writes; of names that end in "_" the first, which is also their result.
_WRITTEN = {
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), (3, 4)),
    "rrelu_with_noise": (1,),
}
# Operators of which the result has the default dtype, whatever the tensors among their operands.
_FACTORIES = ("arange", "linspace", "logspace")
# Operators whose argument `dtype` is that of their result alone; others convert their operands to it first.
_RESULT_DTYPE = (*_FACTORIES, "_softmax_backward_data", "_log_softmax_backward_data")
# Operators that round any float32 operands once to a narrower dtype, that of the tensor that they write.
# The definitions of others use that a number of an operand is one of the result, too.
_FROM_WIDER = frozenset(
    """
    add sub rsub mul div addcmul addcdiv lerp mm bmm addmm baddbmm mv addmv addbmm addr dot sum mean cumsum
    copysign maximum minimum clamp clamp_min clamp_max index_put index_put_ index_add scatter_add
    """.split()
)


# PyTorch converts two operands of 16 bits to float32 and rounds the result of one operation there. That
# rounds once, because 24 >= 2 p + 2 for p = 8 and p = 11 (S. Figueroa, ACM SIGNUM Newsletter 30(3), 1995).
# So it does for subnormal results: sums and differences are exact there, products are exact unless they are
# below half of the smallest number, and a quotient that is not halfway between two numbers is further than
# 2^-(2 p + 1) of it away. tests/arithmetic/numerics/test_formats.py tests it.
_ONE_OPERATION = {
    "add": torch.ops.aten.add.Tensor,
    "sub": torch.ops.aten.sub.Tensor,
    "mul": torch.ops.aten.mul.Tensor,
    "div": torch.ops.aten.div.Tensor,
}


def _are_alike(args: Sequence[Any], out: Optional[Tensor]) -> bool:
    """Return whether the operands are two tensors of one 16-bit dtype, which is that of the result."""
    if len(args) != 2 or not all(isinstance(x, Tensor) and x.numel() > 1 for x in args):
        return False
    dtype = args[0].dtype
    return dtype in NARROW and args[1].dtype is dtype and (out is None or out.dtype is dtype)


def run(
    name: str,
    definition: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    out: Optional[Tensor],
) -> Any:
    """Run a definition on operands of which some are of 16 bits, and round its results once.

    out: the tensor that an in-place or out= form writes; the results are rounded to its dtype.
    """
    one = name in _ONE_OPERATION and not kwargs and _are_alike(args, out)
    if one and (name != "div" or args[0].is_cpu):  # accelerators may divide by way of a reciprocal
        return _ONE_OPERATION[name](*args)
    asked = _asked(args, kwargs)
    if asked is not None and asked.is_floating_point and name not in _RESULT_DTYPE:
        args = [_converted(x, asked) for x in args]
    promoted = _promoted([*args, *kwargs.values()])
    if name in layouts.ELEMENTWISE:  # integers become numbers of PyTorch's dtype
        args = [_float_operand(x, promoted) for x in args]
    wide = {id(x): x.float() for x in tensors([*args, *kwargs.values()]) if x.dtype in NARROW}
    written = [args[i] for i in _WRITTEN.get(name, ()) if isinstance(args[i], Tensor)]

    def run_to(dtype: torch.dtype) -> Any:
        with rounding_to(dtype, written[0].dtype if written else dtype):
            return _run_widened(definition, args, kwargs, wide)

    def write_back() -> None:
        for i in _WRITTEN.get(name, ()):
            if isinstance(args[i], Tensor):
                args[i].copy_(wide.get(id(args[i]), args[i]))

    if name not in _RESULTS:
        if name.endswith("_"):
            out = args[0]
        dtype = asked or (torch.get_default_dtype() if name in _FACTORIES else promoted)
        if name in ("_softmax", "_log_softmax") and args[2]:
            dtype = torch.float32
        if out is not None and out.dtype is not dtype:
            dtype = _dtype_written(name, out.dtype, dtype)
        results = run_to(dtype)
        write_back()
        if name.endswith("_"):
            return args[0].copy_(results)
        if isinstance(results, Tensor):
            return _narrowed(results, dtype)
        if not isinstance(results, (list, tuple)):
            return results
        return type(results)(_narrowed(x, dtype) for x in results)
    dtypes = [_dtype_of(source, args) for source in _RESULTS[name]]
    runs = {dtype: run_to(dtype) for dtype in set(dtypes[:1] if None in _RESULTS[name] else dtypes)}
    write_back()
    first = next(iter(runs.values()))
    return tuple(_narrowed(runs.get(d, first)[i], d) for i, d in enumerate(dtypes))


def is_float64(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether operands, of which some are of 16 bits, are promoted or converted to float64.

    Raises NotExactError for operands of other dtypes.
    """
    values = [*args, *kwargs.values()]
    _require_defined(values)
    return (_asked(args, kwargs) or _promoted(values)) is torch.float64


def as_float64(values: Iterable[Any]) -> list[Any]:
    """Return arguments with their tensors of 16 bits converted to float64."""
    every = list(values)
    wide = {id(x): x.double() for x in tensors(every) if x.dtype in NARROW}
    return [_replaced(x, wide) if not isinstance(x, torch.dtype) else x for x in every]


def _asked(args: Sequence[Any], kwargs: dict[str, Any]) -> Optional[torch.dtype]:
    """Return the argument `dtype` of an operator."""
    return kwargs.get("dtype") or next((x for x in args if isinstance(x, torch.dtype)), None)


def _require_defined(values: Sequence[Any]) -> None:
    if any(isinstance(x, complex) for x in values):
        raise NotExactError("it is not defined for complex numbers")
    for x in tensors(values):
        if x.layout is not torch.strided:
            raise NotExactError(f"it is not defined for layout {x.layout}")
        if x.is_complex() or (x.is_floating_point() and x.dtype not in FORMATS):
            raise NotExactError(
                f"it is defined for float32, bfloat16 and float16, not for {x.dtype}; convert its "
                "operands to one of these"
            )


def _dtype_written(name: str, out: torch.dtype, result: torch.dtype) -> torch.dtype:
    """Return the dtype to which results of dtype `result` are rounded for a tensor of dtype `out`."""
    if not torch.can_cast(result, out):
        raise RuntimeError(f"result type {result} can't be cast to the output type {out}")
    if out not in FORMATS:
        raise NotExactError(f"a result of {out} has no exact definition")
    if torch.promote_types(result, out) is out:  # each number of the result is one of `out`
        return result
    if name not in _FROM_WIDER:
        raise NotExactError(
            f"its result would be rounded to {result} and then to {out}; write it to a {result} tensor"
        )
    return out


def _float_operand(x: Any, dtype: torch.dtype) -> Any:
    """Return an integer operand in the dtype to which PyTorch promotes, and a 0-dim one in float32."""
    if not isinstance(x, Tensor) or x.dtype in NARROW or x.dtype is torch.float32:
        return x
    return x.float() if not x.dim() else casts.to_copy(x, dtype=dtype)


def _dtype_of(source: Any, args: Sequence[Any]) -> torch.dtype:
    places = source if isinstance(source, tuple) else () if source is None else (source,)
    return next((args[i].dtype for i in places if isinstance(args[i], Tensor)), torch.float32)


def _promoted(values: Sequence[Any]) -> torch.dtype:
    """Return the dtype to which PyTorch promotes the floating-point tensors among the operands."""
    found: dict[bool, torch.dtype] = {}
    for x in tensors(values):
        if x.is_floating_point():
            known = found.get(bool(x.dim()))
            found[bool(x.dim())] = x.dtype if known is None else torch.promote_types(known, x.dtype)
    return found.get(True) or found.get(False) or torch.get_default_dtype()


def _converted(x: Any, dtype: torch.dtype) -> Any:
    return casts.to_copy(x, dtype=dtype) if isinstance(x, Tensor) else None if x is dtype else x


def _replaced(x: Any, wide: dict[int, Tensor]) -> Any:
    """Return an argument with its tensors of 16 bits replaced by float32 ones."""
    if isinstance(x, Tensor):
        return wide.get(id(x), x)
    if isinstance(x, torch.dtype) and x in NARROW:
        return torch.float32
    if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
        return [_replaced(y, wide) for y in x]
    return x


def _narrowed(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype is torch.float32 else x
