"""The compiled path: runs a formula as a compiled program, and completes what the program leaves.

A formula is recorded (tape.py) and assembled (assembler.py) once. Each layout of operands has a plan: the
program and how it steps through the operands. A program returns the indices of the elements that failed the
rounding test or are NaN; their values come from the slower paths of the `FormulaCall`. Therefore a program
only saves time and decides no result.

The most common formulas also have a fast path: a loop of their own in csrc, less precise than the program.
What such a loop leaves is computed by the program first.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from types import FunctionType
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.assembler import Program, program_of
from reproml.arithmetic.compiler.pair_program import PairProgram, pair_program_of
from reproml.arithmetic.numerics.balls import Formula


class FormulaCall:
    """One call of a formula: what to compute, and the slower paths for what a program leaves."""

    __slots__ = ("formula", "dim", "fast", "reference", "scalars")

    def __init__(
        self,
        formula: Formula,
        dim: Optional[int],
        fast: Optional[str],
        reference: Optional[Callable[..., Tensor]],
        scalars: tuple[float, ...] = (),
    ) -> None:
        """
        dim: the axis of the rows that the formula takes; None for an elementwise formula.
        fast: the name of the formula's own loop, if it has one (see _FAST). scalars: what that takes, up to
            three numbers.
        reference: the operator's complete definition, where the formula describes it only as long as the
            result passes the rounding test.
        """
        self.formula, self.dim, self.fast, self.reference = formula, dim, fast, reference
        self.scalars = scalars

    def by_reference(self, *operands: Any) -> Tensor:
        """The reference path. Rows lie along the last axis."""
        raise NotImplementedError

    def by_exact_path(self, *operands: Tensor) -> Optional[Tensor]:
        """The exact path, for a few elements [n] of a call without `reference` whose operands and value are
        finite. Returns None where the reference path must be taken."""
        return None

    def by_program_on_rows(self) -> FormulaCall:
        """Return the same call without the fast loop, for rows along the last axis."""
        return type(self)(self.formula, None if self.dim is None else -1, None, self.reference)


class _Plan(NamedTuple):
    """A program, or a fast loop in its place, and how it steps through operands of one layout."""

    program: Optional[Program]
    fast: int  # the fast loop that takes the program's place; -1 for none
    scalars: Any  # of the fast loop
    dims: int
    sizes: Any
    strides: Any
    shape: Sequence[int]  # of the result
    like: int  # the operand whose layout the result takes; -1: contiguous
    results: int
    order: Sequence[int]  # the axes in the order in which the program counts elements
    full: Sequence[int]  # the shape of the operands, broadcast; at least one axis
    pointers: Any
    work: int


# All mutable state of this module: plans by formula and layout, programs by formula and dtypes, and each
# thread's buffer of indices.
_plans: dict[Any, Optional[_Plan]] = {}
_programs: dict[Any, Optional[Program]] = {}
_pair_programs: dict[Any, Optional[PairProgram]] = {}
_local = threading.local()

_MAX_PLANS = 2048  # plans and programs that are kept
_MIN_WORK_FOR_THREADS = 1 << 16  # instructions times elements, above which several threads are used
_MIN_BUFFER, _MAX_KEPT_BUFFER = (
    1 << 14,
    1 << 22,
)  # smallest buffer of indices, and the largest that is kept
_FEW = 16  # fewer failures than this may go to the exact path at once
_MANY = 4  # if more than this fraction of all results is left, the next path takes them all

# The formulas with a loop of their own, in the order of the enum in csrc. The loops on rows take at most
# _MAX_ROW numbers a row, as in csrc; a loop costs about _FAST_STEPS instructions of a program.
_FAST = {
    name: i
    for i, name in enumerate(
        """exp expm1 erfinv tanh sigmoid silu gelu gelu_tanh softplus log_sigmoid elu mish
        tanh_backward sigmoid_backward silu_backward gelu_backward gelu_tanh_backward
        softplus_backward log_sigmoid_backward elu_backward elu_backward_of_result mish_backward
        softmax log_softmax softmax_backward log_softmax_backward""".split()
    )
}
_MAX_ROW, _FAST_STEPS = 2048, 16


def run(call: FormulaCall, operands: Sequence[Any]) -> Optional[Tensor]:
    """Evaluate a formula by its program or fast loop; None where neither is available."""
    library = kernels.loops()
    if library is None:
        return None
    try:
        key = [_key(call.formula), call.dim, call.fast, *call.scalars]
        for x in operands:
            if not x.is_cpu:
                return None
            key += (x.dtype, x.shape, x.stride())
    except (TypeError, AttributeError):  # a formula without a key, or a Python number
        return _run_on_float64(call, operands)
    cache_key = tuple(key)
    try:
        plan = _plans[cache_key]
    except KeyError:
        if len(_plans) >= _MAX_PLANS:
            _plans.clear()
        plan = _plans[cache_key] = _plan(key[0], call, operands)
    if plan is None:
        return _run_on_float64(call, operands)
    if plan.like < 0:
        out = torch.empty(plan.shape, dtype=torch.float32, device="cpu")
    else:
        out = torch.empty_like(operands[plan.like])
    failed = _failure_buffer(plan.results)
    pointers = plan.pointers(*[x.data_ptr() for x in operands], out.data_ptr())
    tasks = torch.get_num_threads() if plan.work > _MIN_WORK_FOR_THREADS else 1
    layout = plan.dims, plan.sizes, plan.strides, pointers, failed.data_ptr(), tasks
    if plan.program is None:
        count = library.reproml_fast(plan.fast, plan.scalars, *layout)
    else:
        # Without another definition, what is infinite or NaN in binary64 is the result, as in round_ball.
        # With one, at least the NaN of an operand that is NaN is.
        limits = 0 if call.dim is not None else 1 if call.reference is None else 2
        count = library.reproml_program(plan.program.address, *layout, limits)
    if count > plan.results // _MANY:
        if plan.program is None:
            return run(type(call)(call.formula, call.dim, None, call.reference), operands)
        if call.reference and call.dim is None and count > _FEW:
            return call.reference(*operands)
    if count:
        _complete(plan, call, operands, out, failed[:count].clone())
    return out


def _key(x: Any) -> Any:
    """Key that identifies a formula: its code and its cells (globals are assumed to be constant).

    Raises TypeError for cells that contain anything but numbers, strings and functions.
    """
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


def _run_on_float64(call: FormulaCall, operands: Sequence[Any]) -> Optional[Tensor]:
    """Run again with numbers and integer tensors converted to float64; None if nothing was converted."""
    wide = [
        x if isinstance(x, Tensor) and x.is_floating_point() else torch.as_tensor(x).double()
        for x in operands
    ]
    if all(x is y for x, y in zip(wide, operands)):
        return None
    return run(type(call)(call.formula, call.dim, None, call.reference), wide)


def _failure_buffer(count: int) -> Tensor:
    """Return room for `count` indices. It is kept, as mapping memory takes time even if it stays unused."""
    try:
        failed: Tensor = _local.failed
        if count <= failed.numel():
            return failed
    except AttributeError:
        pass
    failed = torch.empty(max(count, _MIN_BUFFER), dtype=torch.int64, device="cpu")
    if count <= _MAX_KEPT_BUFFER:
        _local.failed = failed
    return failed


# ---- what a program leaves -------------------------------------------------------------------------


def _complete(
    plan: _Plan, call: FormulaCall, operands: Sequence[Tensor], out: Tensor, index: Tensor
) -> None:
    """Write the values of the slower paths to `out` at the indices, in the plan's order, that failed."""
    if not out.dim():
        out = out.view(1)
    ordered = [x.expand(plan.full).permute(*plan.order) for x in operands]
    out = out.permute(*plan.order)
    if call.dim is None:
        at = torch.unravel_index(index, out.shape)
        few = [x[at] for x in ordered]
        exact = plan.program is not None and call.reference is None and len(index) < _FEW
        exact = exact and bool(torch.stack([*few, out[at]]).isfinite().all())
        out[at] = _slower(plan, call, few, exact)
        return
    ordered, out = [x.unsqueeze(0) for x in ordered], out.unsqueeze(0)
    if len(index) == plan.results:
        out.copy_(_slower(plan, call, ordered, False))
        return
    n = out.shape[-1]
    is_left = torch.zeros(out.shape[:-1], dtype=torch.bool)
    is_left.view(-1)[index // n if is_left.numel() > 1 else 0] = True
    # Complete rows are written, as elements that have passed have the same bits on every path.
    out[is_left] = _slower(plan, call, [x[is_left] for x in ordered], False)


def _slower(plan: _Plan, call: FormulaCall, operands: list[Tensor], exact: bool) -> Tensor:
    """Compute what a fast loop left by the program, and what a program left by exact or reference path."""
    value = None
    if plan.program is None:
        value = run(call.by_program_on_rows(), [x.contiguous() for x in operands])
    elif exact:
        value = call.by_exact_path(*operands)
    return call.by_reference(*operands) if value is None else value


# ---- plans -----------------------------------------------------------------------------------------


def _plan(key: Any, call: FormulaCall, operands: Sequence[Tensor]) -> Optional[_Plan]:
    """Plan a formula for the layout of these operands; None if no program can take them."""
    dtypes = [x.dtype for x in operands]
    if any(dtype not in (torch.float32, torch.float64) for dtype in dtypes):
        return None
    shape = torch.broadcast_shapes(*[x.shape for x in operands])
    full = shape or torch.Size([1])
    if not full.numel() or len(operands) > 60:
        return None
    row = None if call.dim is None else call.dim % len(full)
    program = _program(key, call.formula, dtypes, row is not None)
    if program is None:
        return None
    reduced = row if program.by_row else None
    result = [1 if d == reduced else size for d, size in enumerate(full)]
    like = _operand_like_result(operands, full) if row is None else -1
    strides = (torch.empty(result) if like < 0 else torch.empty_like(operands[like])).stride()
    order = _order_of_axes(full, strides, row)
    out_strides = [0 if d == reduced else stride for d, stride in enumerate(strides)]
    layouts = [*[x.expand(full).stride() for x in operands], out_strides]
    sizes, steps = _collapsed(
        [full[d] for d in order], [[s[d] for d in order] for s in layouts], row is not None
    )
    fast = _fast_loop(call, dtypes, sizes, steps)
    flat = [step for operand in steps for step in operand]
    return _Plan(
        program=program if fast < 0 else None,
        fast=fast,
        scalars=(ctypes.c_double * 3)(*call.scalars),
        dims=len(sizes),
        sizes=(ctypes.c_int64 * len(sizes))(*sizes),
        strides=(ctypes.c_int64 * len(flat))(*flat),
        shape=tuple(result) if shape else (),
        like=like if shape else -1,
        results=math.prod(result),
        order=order,
        full=tuple(full),
        pointers=ctypes.c_void_p * (len(operands) + 1),
        work=full.numel() * (program.instructions if fast < 0 else _FAST_STEPS),
    )


def _program(
    key: Any, formula: Formula, dtypes: Sequence[torch.dtype], rows: bool
) -> Optional[Program]:
    """Return program_of(...) from the cache: a formula is recorded once for all shapes."""
    cache_key = (key, *dtypes, rows)
    return _kept(_programs, cache_key, program_of, formula, dtypes, rows)  # type: ignore[no-any-return]


def _kept(cache: dict[Any, Any], key: Any, make: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a cache has for a key, which is made first if it has nothing."""
    try:
        return cache[key]
    except KeyError:
        if len(cache) >= _MAX_PLANS:
            cache.clear()
        value = cache[key] = make(*arguments)
        return value


def pair_program(formula: Formula, dtypes: Sequence[torch.dtype]) -> Optional[PairProgram]:
    """Return the program in pairs of an elementwise formula, if it has one."""
    try:
        program = _program(_key(formula), formula, dtypes, False)
    except TypeError:  # a formula without a key
        return None
    return program.pairs if program else None


def cached_pair_program(formula: Formula, operands: int) -> Optional[PairProgram]:
    """Return the program in pairs of an elementwise formula of float64 operands, if it has one."""
    dtypes = [torch.float64] * operands
    try:
        key = _key(formula), operands
    except TypeError:  # a formula without a key
        return pair_program_of(formula, dtypes)
    return _kept(_pair_programs, key, pair_program_of, formula, dtypes)  # type: ignore[no-any-return]


def _operand_like_result(operands: Sequence[Tensor], full: torch.Size) -> int:
    """Index of the first float32 operand of the result's shape: the result gets its layout. -1 for none."""
    for i, x in enumerate(operands):
        if x.shape == full and x.dtype is torch.float32:
            return i
    return -1


def _order_of_axes(full: torch.Size, strides: Sequence[int], row: Optional[int]) -> list[int]:
    """The axes as they lie in the result's memory, outermost first; that of the rows last."""
    order = sorted(range(len(full)), key=lambda d: -strides[d] if full[d] > 1 else -math.inf)
    return order if row is None else [d for d in order if d != row] + [row]


def _collapsed(
    sizes: list[int], layouts: list[list[int]], rows: bool
) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring axes that every operand steps through evenly. With `rows`, the last is kept."""
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


def _fast_loop(
    call: FormulaCall, dtypes: list[torch.dtype], sizes: list[int], steps: list[list[int]]
) -> int:
    """The number of the formula's own loop, if it has one that can step through the operands; else -1."""
    if call.fast not in _FAST or any(dtype is not torch.float32 for dtype in dtypes):
        return -1
    if call.dim is None:
        dense = len(sizes) == 1 and all(step == [1] for step in steps)
        fits = dense or sizes[0] == 1
    else:
        fits = sizes[-1] <= _MAX_ROW
    return _FAST[call.fast] if fits else -1
