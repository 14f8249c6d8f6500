"""Formulas by compiled programs: which program, on which operands, and what it leaves to the definition.

Elements that fail the rounding test, or are NaN, are left to the definition, so a program only ever
speeds up. Programs are kept, together with the layout of the operands they were made for.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from types import FunctionType
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.assembler import Program, program_of
from reproml.arithmetic.numerics.balls import Formula


def _key(x: Any) -> Any:
    """What identifies a formula: its code and the contents of its cells (globals are taken to be constant).

    TypeError for cells that hold anything but numbers, strings and functions."""
    kind = type(x)
    if kind is FunctionType:
        if x.__closure__ is None and x.__defaults__ is None and x.__kwdefaults__ is None:
            return x.__code__
        if x.__kwdefaults__:
            raise TypeError
        cells = [_key(cell.cell_contents) for cell in x.__closure__ or ()]
        return (x.__code__, *cells, *map(_key, x.__defaults__ or ()))
    if kind is Fraction:
        return (kind, x.numerator, x.denominator)
    if kind is float:
        return (kind, x, math.copysign(1, x))
    if kind in (int, bool, str, type(None)):
        return x
    raise TypeError


class _Plan(NamedTuple):
    """A program with the layout of its operands and its result."""

    program: Optional[Program]
    fast: int  # the loop of csrc/fast.c that takes the program's place; -1 for none
    dims: int
    sizes: Any
    strides: Any
    shape: Sequence[int]  # of the result
    like: int  # the operand that it is laid out like; -1 for none: contiguous
    results: int
    order: Sequence[int]  # the axes, as the results are counted
    full: Sequence[int]  # the shape of the operands, broadcast; at least one axis
    pointers: Any
    work: int


_plans: dict[Any, Optional[_Plan]] = {}
_programs: dict[Any, Optional[Program]] = {}
_PLANS = 2048
_TASK = 1 << 16
_local = threading.local()
_FAILED, _KEPT = 1 << 14, 1 << 22
_FEW = 16

Exactly = Callable[..., Optional[Tensor]]

# The formulas that have a loop of their own, as in csrc/fast.c; its rows have _ROOM numbers at most.
_FAST = {
    name: i
    for i, name in enumerate(
        """exp expm1 tanh sigmoid silu gelu tanh_backward sigmoid_backward silu_backward gelu_backward
        softmax log_softmax softmax_backward log_softmax_backward""".split()
    )
}
_ROOM, _FAST_STEPS = 2048, 16


def elementwise(
    formula: Formula,
    definition: Callable[..., Tensor],
    operands: Sequence[Any],
    fast: Optional[str] = None,
    exact_path: Optional[Exactly] = None,
) -> Optional[Tensor]:
    """ball.elementwise by a program; None if there is none. exactly: what may do for the definition, for a
    few places where operands and value are numbers."""
    return _evaluate(formula, definition, None, operands, fast, exact_path)


def rowwise(
    formula: Formula,
    definition: Callable[..., Tensor],
    dim: int,
    operands: Sequence[Tensor],
    fast: Optional[str] = None,
) -> Optional[Tensor]:
    """ball.rowwise by a program; None if there is none."""
    return _evaluate(formula, definition, dim, operands, fast)


def _evaluate(
    formula: Formula,
    definition: Callable[..., Tensor],
    dim: Optional[int],
    operands: Sequence[Any],
    fast: Optional[str] = None,
    exact_path: Optional[Exactly] = None,
) -> Optional[Tensor]:
    library = kernels.library
    if library is None:
        return None
    try:
        key = [_key(formula), dim, fast]
        for x in operands:
            if not x.is_cpu:
                return None
            key += (x.dtype, x.shape, x.stride())
    except (TypeError, AttributeError):
        return _evaluate_converted(formula, definition, dim, operands, exact_path)
    hashed = tuple(key)
    try:
        plan = _plans[hashed]
    except KeyError:
        if len(_plans) >= _PLANS:
            _plans.clear()
        plan = _plans[hashed] = _planned(key[0], formula, dim, operands, fast)
    if plan is None:
        return _evaluate_converted(formula, definition, dim, operands, exact_path)
    if plan.like < 0:
        out = torch.empty(plan.shape, dtype=torch.float32, device="cpu")
    else:
        out = torch.empty_like(operands[plan.like])
    failed = _failed(plan.results)
    pointers = plan.pointers(*[x.data_ptr() for x in operands], out.data_ptr())
    tasks = torch.get_num_threads() if plan.work > _TASK else 1
    layout = plan.dims, plan.sizes, plan.strides, pointers, failed.data_ptr(), tasks
    if plan.program is None:
        count = library.reproml_fast(plan.fast, *layout)
        definition, exact_path = partial(_again, formula, definition, dim, exact_path), None
    else:
        count = library.reproml_program(plan.program.address, *layout)
    if count:
        _settle(plan, definition, exact_path, dim, operands, out, failed[:count].clone())
    return out


def _again(
    formula: Formula,
    definition: Callable[..., Tensor],
    dim: Optional[int],
    exact_path: Optional[Exactly],
    *operands: Tensor,
) -> Tensor:
    """What a direct loop left, by the program, which is more precise."""
    dim = None if dim is None else -1
    stored = [x.contiguous() for x in operands]
    result = _evaluate(formula, definition, dim, stored, exact_path=exact_path)
    return definition(*operands) if result is None else result


def _evaluate_converted(
    formula: Formula,
    definition: Callable[..., Tensor],
    dim: Optional[int],
    operands: Sequence[Any],
    exact_path: Optional[Exactly],
) -> Optional[Tensor]:
    """Numbers and integers first become float64 tensors."""
    wide = [
        x if isinstance(x, Tensor) and x.is_floating_point() else torch.as_tensor(x).double()
        for x in operands
    ]
    if all(x is y for x, y in zip(wide, operands)):
        return None
    return _evaluate(formula, definition, dim, wide, exact_path=exact_path)


def _failed(count: int) -> Tensor:
    """Room for the places of what fails; kept, though mostly untouched, as mapping it anew costs time."""
    try:
        failed: Tensor = _local.failed
        if count <= failed.numel():
            return failed
    except AttributeError:
        pass
    failed = torch.empty(max(count, _FAILED), dtype=torch.int64, device="cpu")
    if count <= _KEPT:
        _local.failed = failed
    return failed


def _settle(
    plan: _Plan,
    definition: Callable[..., Tensor],
    exact_path: Optional[Exactly],
    dim: Optional[int],
    operands: Sequence[Tensor],
    out: Tensor,
    index: Tensor,
) -> None:
    """Put the definition's values into `out`, which has the program's, at the places that failed."""
    if not out.dim():
        out = out.view(1)
    laid = [x.expand(plan.full).permute(*plan.order) for x in operands]
    out = out.permute(*plan.order)
    if dim is None:
        at = torch.unravel_index(index, out.shape)
        few, value = [x[at] for x in laid], None
        if exact_path and len(index) < _FEW and bool(torch.stack([*few, out[at]]).isfinite().all()):
            value = exact_path(*few)
        out[at] = definition(*few) if value is None else value
        return
    laid, out = [x.unsqueeze(0) for x in laid], out.unsqueeze(0)
    n = out.shape[-1]
    rows, row_of = torch.unique(index // n, return_inverse=True)
    at = torch.unravel_index(rows, out.shape[:-1])
    values = definition(*[x[at] for x in laid])
    column = index % n
    out[(*[a[row_of] for a in at], column)] = values[row_of, column]


def _planned(
    key: Any,
    formula: Formula,
    dim: Optional[int],
    operands: Sequence[Tensor],
    fast: Optional[str],
) -> Optional[_Plan]:
    if any(x.dtype not in (torch.float32, torch.float64) for x in operands):
        return None
    shape = torch.broadcast_shapes(*[x.shape for x in operands])
    full = shape or torch.Size([1])
    if not full.numel() or len(operands) > 60:
        return None
    row = None if dim is None else dim % len(full)
    program = _program(key, formula, [x.dtype for x in operands], row is not None)
    if program is None:
        return None
    result = list(full)
    by_row = row is not None and program.by_row
    if row is not None and by_row:
        result[row] = 1
    likes = [i for i, x in enumerate(operands) if x.shape == full and x.dtype is torch.float32]
    like = likes[0] if likes and row is None else -1
    stride = (torch.empty(result) if like < 0 else torch.empty_like(operands[like])).stride()
    order = sorted(range(len(full)), key=lambda d: -stride[d] if full[d] > 1 else -math.inf)
    if row is not None:
        order = [d for d in range(len(full)) if d != row] + [row]
    of_out = [0 if d == row and by_row else s for d, s in enumerate(stride)]
    layouts = [*[x.expand(full).stride() for x in operands], of_out]
    sizes, strides = _collapsed(
        [full[d] for d in order], [[s[d] for d in order] for s in layouts], row is not None
    )
    flat = [s for operand in strides for s in operand]
    loop = -1
    if fast in _FAST and all(x.dtype is torch.float32 for x in operands):
        dense = len(sizes) == 1 and all(s == [1] for s in strides)
        if (dense or sizes[0] == 1) if row is None else sizes[-1] <= _ROOM:
            loop = _FAST[fast]
    return _Plan(
        program if loop < 0 else None,
        loop,
        len(sizes),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int64 * len(flat))(*flat),
        tuple(result) if shape else (),
        like if shape else -1,
        math.prod(result),
        order,
        tuple(full),
        ctypes.c_void_p * (len(operands) + 1),
        full.numel() * (program.instructions if loop < 0 else _FAST_STEPS),
    )


def _program(
    key: Any, formula: Formula, kinds: Sequence[torch.dtype], rows: bool
) -> Optional[Program]:
    """program_of, remembered: a formula is recorded once for all shapes."""
    hashed = (key, *kinds, rows)
    try:
        return _programs[hashed]
    except KeyError:
        if len(_programs) >= _PLANS:
            _programs.clear()
        program = _programs[hashed] = program_of(formula, kinds, rows)
        return program


def _collapsed(
    sizes: list[int], layouts: list[list[int]], rows: bool
) -> tuple[list[int], list[list[int]]]:
    """As few dimensions as possible: neighbours that each operand steps through evenly become one. With
    `rows`, the last stays by itself."""
    kept: list[tuple[int, list[int]]] = []
    for d, size in enumerate(sizes):
        strides = [s[d] for s in layouts]
        last = rows and d == len(sizes) - 1
        if size == 1 and not last and (kept or d < len(sizes) - 1):
            continue
        if kept and not last and all(a == b * size for a, b in zip(kept[-1][1], strides)):
            kept[-1] = (kept[-1][0] * size, strides)
        else:
            kept.append((size, strides))
    return [size for size, _ in kept], [list(s) for s in zip(*[strides for _, strides in kept])]
