"""Operators on bfloat16, float16 and float64 tensors.

Each such number is a float32 number, so the definition of the operator runs on widened operands, while
`numerics/formats.py` rounds its results to the dtype that PyTorch gives them. Type promotion is PyTorch's:
operands of one of these dtypes and of float32, or of both of them, give float32.

Beside float64 tensors, those of other dtypes become float64, and the definition runs on these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics.formats import NARROW, rounding_to
from reproml.arithmetic.operators import casts
from reproml.errors import NotExactError


def has_narrow(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operand, a list of operands or an argument `dtype` is of 16 bits."""
    values = [*args, *kwargs.values()]
    return any(x in NARROW for x in values if isinstance(x, torch.dtype)) or any(
        x.dtype in NARROW for x in tensors(values)
    )


def gives_float64(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether PyTorch computes in float64: it promotes to it, an argument asks for it, or it is the
    default of integers and of numbers that are drawn."""
    values = [*args, *kwargs.values()]
    asked = next((x for x in values if isinstance(x, torch.dtype)), None)
    if asked is not None:
        if asked is not torch.float64 and _promoted(values) is torch.float64:
            raise NotExactError(f"A result of {asked} is not defined for float64 operands.")
        return asked is torch.float64
    if any(x.is_floating_point() for x in tensors(values)):
        return _promoted(values) is torch.float64
    return torch.get_default_dtype() is torch.float64


def run_in_float64(
    definition: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    promotes: bool,
    with_integers: bool,
) -> Any:
    """Run a definition on float64 operands, and round its results once to float64.

    promotes: whether operands may be of several dtypes. with_integers: whether integers become float64 too.
    """
    operands = list(tensors([*args, *kwargs.values()]))
    if not promotes and any(
        x.dim() and x.is_floating_point() and x.dtype is not torch.float64 for x in operands
    ):
        asked = [x for x in [*args, *kwargs.values()] if isinstance(x, torch.dtype)]
        if not asked:
            raise RuntimeError("expected tensors of one dtype, but found float64 and another")
    wide = {
        id(x): x.double()
        for x in operands
        if x.dtype is not torch.float64 and (with_integers or x.is_floating_point())
    }
    with rounding_to(torch.float64):
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
}
# Operands that a definition writes; of names that end in "_" the first, which is also their result.
_WRITTEN = dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit"), (3, 4))


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
    asked = kwargs.get("dtype") or next((x for x in args if isinstance(x, torch.dtype)), None)
    if asked is not None and asked.is_floating_point:  # PyTorch converts the operands first
        args = [_converted(x, asked) for x in args]
    promoted = _promoted([*args, *kwargs.values()])
    wide = {id(x): x.float() for x in tensors([*args, *kwargs.values()]) if x.dtype in NARROW}

    def run_to(dtype: torch.dtype) -> Any:
        with rounding_to(dtype):
            return definition(
                *[_replaced(x, wide) for x in args],
                **{k: _replaced(x, wide) for k, x in kwargs.items()},
            )

    if name not in _RESULTS:
        if name.endswith("_"):
            out = args[0]
        dtype = out.dtype if out is not None else asked or promoted
        results = run_to(dtype)
        if name.endswith("_"):
            return args[0].copy_(results)
        if isinstance(results, Tensor):
            return _narrowed(results, dtype)
        return type(results)(_narrowed(x, dtype) for x in results)
    dtypes = [_dtype_of(source, args) for source in _RESULTS[name]]
    runs = {dtype: run_to(dtype) for dtype in set(dtypes[:1] if None in _RESULTS[name] else dtypes)}
    for i in _WRITTEN.get(name, ()):
        if isinstance(args[i], Tensor):
            args[i].copy_(wide.get(id(args[i]), args[i]))
    first = next(iter(runs.values()))
    return tuple(_narrowed(runs.get(d, first)[i], d) for i, d in enumerate(dtypes))


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
    return found.get(True) or found.get(False) or torch.float32


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
