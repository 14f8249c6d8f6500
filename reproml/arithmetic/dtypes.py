"""Operators on bfloat16 and float16 tensors.

Each such number is a float32 number, so the definition of the operator runs on widened operands, while
`numerics/formats.py` rounds its results to the dtype that PyTorch gives them. Type promotion is PyTorch's:
operands of one of these dtypes and of float32, or of both of them, give float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics.formats import NARROW, rounding_to
from reproml.arithmetic.operators import casts


def has_narrow(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operand, a list of operands or an argument `dtype` is of 16 bits."""
    values = [*args, *kwargs.values()]
    return any(x in NARROW for x in values if isinstance(x, torch.dtype)) or any(
        x.dtype in NARROW for x in tensors(values)
    )


def run(definition: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], out: Optional[Tensor]) -> Any:
    """Run a definition on operands of which some are of 16 bits, and round its results once.

    out: the tensor that an in-place or out= form writes; the results are rounded to its dtype.
    """
    asked = kwargs.get("dtype") or next((x for x in args if isinstance(x, torch.dtype)), None)
    if asked is not None and asked.is_floating_point:  # PyTorch converts the operands first
        args = [_converted(x, asked) for x in args]
    dtype = out.dtype if out is not None else asked or _promoted([*args, *kwargs.values()])
    promoted = _promoted([*args, *kwargs.values()])
    args = [_widened(x, promoted) for x in args]
    kwargs = {k: _widened(x, promoted) for k, x in kwargs.items()}
    with rounding_to(dtype):
        results = definition(*args, **kwargs)
    if dtype not in NARROW:
        return results
    if isinstance(results, Tensor):
        return _narrowed(results, dtype)
    return type(results)(_narrowed(x, dtype) for x in results)


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


def _widened(x: Any, promoted: torch.dtype) -> Any:
    """Return an operand with float32 numbers. An integer tensor is converted to the promoted dtype first."""
    if isinstance(x, Tensor):
        return x.float() if x.dtype in NARROW else x
    if isinstance(x, torch.dtype) and x in NARROW:
        return torch.float32
    if isinstance(x, (list, tuple)) and any(isinstance(y, Tensor) for y in x):
        return [_widened(y, promoted) for y in x]
    return x


def _narrowed(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype is torch.float32 else x
