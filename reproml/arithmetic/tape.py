"""Formulas compiled: recorded once as a short program, which a compiled loop runs block by block.

`Tape` is a field like `Binary64`, with the same balls; only its numbers are registers, and what is done
to them is recorded. Equal instructions are recorded once (value numbering; A. Aho et al., Compilers,
2nd ed., section 8.5), instructions that nothing needs are left out, and a register is used again after
its number's last use. c/tape.c runs the program. Elements that fail the rounding test, or are NaN, are
left to the definition, so a program only ever speeds up.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
from collections.abc import Sequence
from fractions import Fraction
from types import FunctionType
from typing import Any, Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor

from reproml.arithmetic import kernels
from reproml.arithmetic.field import Ball, DoubleField, Formula
from reproml.arithmetic.rounding import SLACK, U

# As in c/tape.c.
_OPS = {
    name: 4 * i
    for i, name in enumerate(
        """load32 load64 expand sum max settle
        add sub mul div lt le eq and or
        neg abs not sqrt exp log expm1 log1p sin cos sinpi cospi erf erfc
        select muladd absmuladd lost plus plus_error""".split()
    )
}
_SCRATCH, _LONGEST, _REDUCTIONS = 8192, 256, 16
_REDUCING = ("sum", "max")

Value = Union["Register", float, int]


class Unsupported(Exception):
    """The formula does something that cannot be recorded."""


class Register:
    """A binary64 number of each element (or one of each row), to be calculated."""

    __slots__ = ("tape", "at")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tape: Tape, at: int) -> None:
        self.tape, self.at = tape, at

    def __add__(self, other: Value) -> Register:
        return self.tape.add(self, other)

    def __sub__(self, other: Value) -> Register:
        return self.tape.binary("sub", self, other)

    def __rsub__(self, other: Value) -> Register:
        return self.tape.binary("sub", other, self)

    def __mul__(self, other: Value) -> Register:
        return self.tape.multiply(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Value) -> Register:
        return self.tape.binary("div", self, other)

    def __rtruediv__(self, other: Value) -> Register:
        return self.tape.binary("div", other, self)

    def __neg__(self) -> Register:
        return self.tape.unary("neg", self)

    def __abs__(self) -> Register:
        return self if self.tape.sign[self.at] > 0 else self.tape.unary("abs", self)

    def __lt__(self, other: Value) -> Any:
        return self.tape.binary("lt", self, other)

    def __gt__(self, other: Value) -> Any:
        return self.tape.binary("lt", other, self)

    def __le__(self, other: Value) -> Any:
        if not isinstance(other, Register) and other >= 0 and self.tape.sign[self.at] < 0:
            return True
        return self.tape.binary("le", self, other)

    def __ge__(self, other: Value) -> Any:
        return self.tape.binary("le", other, self)

    def __eq__(self, other: Any) -> Any:
        return self.tape.binary("eq", self, other)

    def __and__(self, other: Union[Register, bool]) -> Any:
        if isinstance(other, bool):
            return self if other else other
        return self.tape.binary("and", self, other)

    def __or__(self, other: Union[Register, bool]) -> Any:
        if isinstance(other, bool):
            return other if other else self
        return self.tape.binary("or", self, other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Register:
        return self.tape.unary("not", self)

    def __bool__(self) -> bool:
        raise Unsupported("a branch that depends on an operand")


class _Instruction(NamedTuple):
    """Arguments: earlier instructions, or constants where negative (~index)."""

    op: str
    arguments: tuple[int, ...]


def _function(name: str) -> Any:
    def function(self: Tape, x: Value) -> Register:
        return self.unary(name, x)

    return function


class Tape(DoubleField):
    """Balls on registers."""

    def __init__(self, operands: Sequence[str]) -> None:
        self.code: list[_Instruction] = []
        self.scalar: list[bool] = []  # one number a row?
        self.level: list[int] = []  # the reductions it takes, one after the other
        self.sign: list[int] = []  # 1: never below 0, -1: never above, 0: unknown (or NaN)
        self.constants: list[float] = []
        self._numbers: dict[Any, int] = {}
        self.operands = [self._emit(kind, (at,), False, 0, 0) for at, kind in enumerate(operands)]

    # ---- recording ---------------------------------------------------------------------------------

    def _emit(
        self, op: str, arguments: tuple[int, ...], scalar: bool, level: int, sign: int
    ) -> Register:
        key = (op, arguments)
        at = self._numbers.get(key)
        if at is None:
            at = self._numbers[key] = len(self.code)
            self.code.append(_Instruction(op, arguments))
            self.scalar.append(scalar)
            self.level.append(level)
            self.sign.append(sign)
        return Register(self, at)

    def _constant(self, x: float) -> int:
        key = struct.pack("d", x)  # 0.0 is not -0.0
        at = self._numbers.get(key)
        if at is None:
            at = self._numbers[key] = ~len(self.constants)
            self.constants.append(x)
        return at

    def _record(self, op: str, sign: int, *values: Value) -> Register:
        """An elementwise instruction; numbers of rows are spread over their rows if need be."""
        scalar, level = True, 0
        leading = values[:2] if len(values) == 2 else values[:1]
        if not any(isinstance(x, Register) for x in leading):
            raise Unsupported("an operation on constants")
        for x in values:
            if isinstance(x, Register):
                scalar = scalar and self.scalar[x.at]
                level = max(level, self.level[x.at])
        arguments = tuple(
            self._constant(float(x))
            if not isinstance(x, Register)
            else x.at
            if scalar or not self.scalar[x.at]
            else self.spread(x).at
            for x in values
        )
        return self._emit(op, arguments, scalar, level, sign)

    def spread(self, x: Register) -> Register:
        if not self.scalar[x.at]:
            return x
        return self._emit("expand", (x.at,), False, self.level[x.at], self.sign[x.at])

    def _reduce(self, op: str, x: Value) -> Register:
        if not isinstance(x, Register):
            raise Unsupported("a constant over a row")
        x = self.spread(x)
        sign = self.sign[x.at] if op == "sum" else 0
        return self._emit(op, (x.at,), True, self.level[x.at] + 1, sign)

    def _sign(self, x: Value) -> int:
        if isinstance(x, Register):
            return self.sign[x.at]
        return (x > 0) - (x < 0) if x else int(math.copysign(1, x))

    def unary(self, op: str, x: Value) -> Register:
        if not isinstance(x, Register):
            raise Unsupported(f"{op} of a constant")
        sign = self.sign[x.at]
        if op in ("abs", "exp", "erfc", "not"):
            sign = 1
        elif op == "neg":
            inner = self.code[x.at]
            if inner.op == "neg":
                return Register(self, inner.arguments[0])
            sign = -sign
        elif op not in ("sqrt", "log1p", "expm1", "erf"):
            sign = 0
        elif sign < 0:
            sign = -1 if op in ("expm1", "erf") else 0
        return self._record(op, sign, x)

    def binary(self, op: str, x: Value, y: Value) -> Register:
        if op == "div" and not isinstance(y, Register) and y == 1:
            return x  # type: ignore[return-value]
        if op in ("lt", "le", "eq", "and", "or"):
            sign = 1
        elif op == "div":
            sign = self._sign(x) * self._sign(y)
        else:
            sign = self._sign(x) if self._sign(x) == -self._sign(y) else 0
        return self._record(op, sign, x, y)

    def add(self, x: Register, y: Value) -> Register:
        if isinstance(y, int) and not y:  # only where the sign of a zero does not matter
            return x
        if isinstance(y, Register):
            if self.code[x.at].op in ("mul", "neg") and self.code[y.at].op != "mul":
                x, y = y, x  # what can be fused comes second
            inner = self.code[y.at]
            if inner.op == "neg":
                return self.binary("sub", x, Register(self, inner.arguments[0]))
            if (
                inner.op == "mul"
                and inner.arguments[1] < 0
                and self.scalar[x.at] >= self.scalar[y.at]
            ):
                return self._multiply_add(inner, x)
            if x.at > y.at:
                x, y = y, x
        elif self.code[x.at].op == "mul" and self.code[x.at].arguments[1] < 0:
            return self._multiply_add(self.code[x.at], y)
        sign = self._sign(x) if self._sign(x) == self._sign(y) else 0
        return self._record("add", sign, x, y)

    def _multiply_add(self, product: _Instruction, y: Value) -> Register:
        """x times a constant, plus y, in one instruction (and two roundings)."""
        at, factor = product.arguments
        number = self.constants[~factor]
        sign = self.sign[at] * self._sign(number)
        sign = sign if sign == self._sign(y) else 0
        inner = self.code[at]
        if inner.op == "abs":
            return self._record("absmuladd", sign, Register(self, inner.arguments[0]), number, y)
        return self._record("muladd", sign, Register(self, at), number, y)

    def multiply(self, x: Register, y: Value) -> Register:
        if not isinstance(y, Register):
            if y == 1:
                return x
        elif x.at > y.at:
            x, y = y, x
        same = isinstance(y, Register) and x.at == y.at
        return self._record("mul", 1 if same else self._sign(x) * self._sign(y), x, y)

    # ---- the field ---------------------------------------------------------------------------------

    _exp, _log, _expm1, _log1p = (_function(f) for f in ("exp", "log", "expm1", "log1p"))
    _erf, _erfc = _function("erf"), _function("erfc")
    _sin, _cos, _sinpi, _cospi = (_function(f) for f in ("sin", "cos", "sinpi", "cospi"))

    def _sqrt(self, x: Value) -> Any:
        return self.unary("sqrt", x) if isinstance(x, Register) else math.sqrt(x)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):
            return x if condition else y
        sign = self._sign(x) if self._sign(x) == self._sign(y) else 0
        return self._record("select", sign, condition, x, y)

    def _two_sum(self, x: Value, y: Value) -> tuple[Any, Any]:
        return x + y, self._record("lost", 0, x, y)

    def plus(self, x: Ball, y: Ball) -> Ball:
        """As Binary64.plus."""
        s, t = self._two_sum(x.c, y.c)
        e = x.error + y.error
        return Ball(
            self._record("plus", 0, s, t, e), 0, self._record("plus_error", 1, s, t, e), self
        )

    def _total(self, x: Value, like: Value) -> Register:
        return self._reduce("sum", x)

    def _largest(self, x: Value) -> Register:
        return self._reduce("max", x)

    def _gamma(self, x: Value) -> float:
        """c/tape.c sums with all rounding errors kept: s + t differs from the sum by t's own rounding
        errors, gamma(h)^2 of the absolute values where no term goes through more than h additions (Ogita,
        Rump & Oishi 2005), less than U for h < 2^26; and is rounded once."""
        return 2 * U * SLACK


# ---- from the tape to a program ----------------------------------------------------------------------


class _Stage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("begin", "body", "end")]


class _Program(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("block", "operands", "stages", "reduces", "by_row")],
        *[(n, ctypes.c_void_p) for n in ("constants", "straight", "code")],
        ("straight_length", ctypes.c_int64),
        ("stage", ctypes.c_void_p),
    ]


_SETTLE = -1  # in a list of instructions: the rounding test of the result


class _Assembler:
    """Registers for the instructions of a tape, and their encoding."""

    def __init__(self, tape: Tape, c: int, r: int, e: int) -> None:
        self.tape, self.result = tape, (c, r, e)
        self.by_row = tape.scalar[c]
        needed = self._needed([x for x in (c, e) if x >= 0], lambda at: True)
        self.needed = sorted(needed)
        self.reductions = [at for at in self.needed if tape.code[at].op in _REDUCING]
        self.scalars = [at for at in self.needed if tape.scalar[at]]
        self.registers = 0

    def _arguments(self, at: int) -> tuple[int, ...]:
        if at == _SETTLE:
            c, r, e = self.result
            return (c, r, e)
        op, arguments = self.tape.code[at]
        return () if op.startswith("load") else arguments

    def _needed(self, roots: Sequence[int], enter: Callable[[int], bool]) -> set[int]:
        found: set[int] = set()
        stack = [at for at in roots if enter(at)]
        while stack:
            at = stack.pop()
            if at not in found:
                found.add(at)
                stack += [x for x in self._arguments(at) if x >= 0 and enter(x)]
        return found

    def straight(self) -> list[int]:
        """All of it, one after the other."""
        return self._encode([*self.needed, _SETTLE], {})

    def staged(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """A stage for each level of reductions: what they need of each block, then what is of the row."""
        tape = self.tape
        code: list[int] = []
        stages: list[tuple[int, int, int]] = []
        kept = {at: i for i, at in enumerate(self.scalars)}  # each in a register of its own
        last = max((tape.level[at] for at in self.reductions), default=0) + 1
        for level in range(1, last + 1):
            ends = [at for at in self.reductions if tape.level[at] == level]
            roots = [x for at in ends for x in self._arguments(at)]
            if level == last and not self.by_row:
                roots = [x for x in self._arguments(_SETTLE) if x >= 0]
                ends = [_SETTLE]
            body = sorted(self._needed(roots, lambda at: not tape.scalar[at]))
            after = [
                at for at in self.scalars if tape.level[at] == level and at not in self.reductions
            ]
            if level == last and self.by_row:
                after = [_SETTLE]
            begin = len(code) // 6
            code += self._encode([*body, *ends], kept)
            middle = len(code) // 6
            code += self._encode(after, kept)
            stages.append((begin, middle, len(code) // 6))
        return code, stages

    def _encode(self, order: Sequence[int], kept: dict[int, int]) -> list[int]:
        """Six numbers an instruction. kept: numbers with registers of their own, 0 to len(kept) - 1."""
        last_use = {x: i for i, at in enumerate(order) for x in self._arguments(at)}
        place = dict(kept)
        free: list[int] = []
        out: list[int] = []
        self.registers = max(self.registers, len(kept))
        used = len(kept)
        for i, at in enumerate(order):
            arguments = self._arguments(at)
            if at == _SETTLE:
                to, op, scalar = 0, "settle", self.by_row
            else:
                op, scalar = self.tape.code[at].op, self.tape.scalar[at]
                scalar = scalar and op not in _REDUCING
                if at not in place:
                    if free:
                        place[at] = free.pop()
                    else:
                        place[at] = used
                        used += 1
                to = place[at]
            if op.startswith("load"):
                encoded = [self.tape.code[at].arguments[0], 0, 0]
            else:
                encoded = [place[x] if x >= 0 else x for x in arguments]
                if op in _REDUCING:
                    encoded.append(self.reductions.index(at))
                encoded += [0] * (3 - len(encoded))
            out += [_OPS[op] + _form(op, arguments), to, *encoded, int(scalar)]
            for x in {*arguments, at}:
                if x >= 0 and x not in kept and last_use.get(x, i) == i and x in place:
                    free.append(place[x])
        self.registers = max(self.registers, used)
        return out


def _form(op: str, arguments: tuple[int, ...]) -> int:
    """Which operands are constants: the first or second of two, the second or third of three."""
    if len(arguments) == 2:
        return (arguments[0] < 0) + 2 * (arguments[1] < 0)
    if op == "settle":
        return 2 * (arguments[2] < 0)
    if len(arguments) == 3:
        return (arguments[1] < 0) + 2 * (arguments[2] < 0)
    return 0


class Program:
    """What c/tape.c runs; keeps its arrays alive."""

    def __init__(self, tape: Tape, y: Ball, rows: bool) -> None:
        if not isinstance(y.c, Register):
            raise Unsupported("a constant result")
        c = y.c + 0.0 if rows else y.c  # an exact zero of a row is +0
        error = y.e if isinstance(y.e, Register) else tape._constant(float(y.e))
        if isinstance(error, Register):
            if tape.scalar[error.at] and not tape.scalar[c.at]:
                error = tape.spread(error)
            if tape.scalar[c.at] and not tape.scalar[error.at]:
                c = tape.spread(c)
            error = error.at
        code = _Assembler(tape, c.at, tape._constant(float(y.r)), error)
        straight = code.straight()
        staged, stages = code.staged()
        if len(code.reductions) > _REDUCTIONS or code.registers > _SCRATCH // 32:
            raise Unsupported("too large a formula")
        self.by_row = code.by_row
        self.instructions = len(staged) // 6
        self.block = min(_LONGEST, _SCRATCH // 2 // code.registers // 16 * 16)
        self.block = max(self.block, 32)
        self._constants = (ctypes.c_double * len(tape.constants))(*tape.constants)
        self._straight = (ctypes.c_int32 * len(straight))(*straight)
        self._code = (ctypes.c_int32 * len(staged))(*staged)
        self._stages = (_Stage * len(stages))(*[_Stage(*s) for s in stages])
        self._program = _Program(
            self.block,
            len(tape.operands),
            len(stages),
            bool(code.reductions),
            self.by_row,
            *[ctypes.addressof(x) for x in (self._constants, self._straight, self._code)],
            len(straight) // 6,
            ctypes.addressof(self._stages),
        )
        self.address = ctypes.addressof(self._program)


def _compile(formula: Formula, kinds: Sequence[torch.dtype], rows: bool) -> Optional[Program]:
    """The program of a formula, on rows or elementwise; None if it cannot be recorded."""
    names = ["load32" if kind is torch.float32 else "load64" for kind in kinds]
    tape = Tape(names)
    try:
        y = formula(tape, *[tape.exact(x) for x in tape.operands])
        return Program(tape, y, rows)
    except (Unsupported, AttributeError, TypeError, ZeroDivisionError, ValueError, OverflowError):
        return None  # the plain path does it, or raises the same


# ---- running -----------------------------------------------------------------------------------------


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

    program: Program
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
_PLANS = 2048
_TASK = 1 << 20  # numbers times instructions that are worth a thread
_local = threading.local()
_FAILED = 1 << 14


def elementwise(
    formula: Formula, definition: Callable[..., Tensor], operands: Sequence[Any]
) -> Optional[Tensor]:
    """ball.elementwise by a program; None if there is none."""
    return _evaluate(formula, definition, None, operands)


def rowwise(
    formula: Formula, definition: Callable[..., Tensor], dim: int, operands: Sequence[Tensor]
) -> Optional[Tensor]:
    """ball.rowwise by a program; None if there is none."""
    return _evaluate(formula, definition, dim, operands)


def _evaluate(
    formula: Formula,
    definition: Callable[..., Tensor],
    dim: Optional[int],
    operands: Sequence[Any],
) -> Optional[Tensor]:
    library = kernels.library
    if library is None:
        return None
    try:
        key = [_key(formula), dim]
        for x in operands:
            if not x.is_cpu:
                return None
            key += (x.dtype, x.shape, x.stride())
    except (TypeError, AttributeError):
        return _evaluate_converted(formula, definition, dim, operands)
    hashed = tuple(key)
    try:
        plan = _plans[hashed]
    except KeyError:
        if len(_plans) >= _PLANS:
            _plans.clear()
        plan = _plans[hashed] = _planned(formula, dim, operands)
    if plan is None:
        return _evaluate_converted(formula, definition, dim, operands)
    if plan.like < 0:
        out = torch.empty(plan.shape, dtype=torch.float32, device="cpu")
    else:
        out = torch.empty_like(operands[plan.like])
    failed = _failed(plan.results)
    pointers = plan.pointers(*[x.data_ptr() for x in operands], out.data_ptr())
    tasks = 1
    if plan.work > _TASK:
        tasks = torch.get_num_threads()
        library.reproml_set_threads(tasks)
    count = library.reproml_tape(
        plan.program.address,
        plan.dims,
        plan.sizes,
        plan.strides,
        pointers,
        failed.data_ptr(),
        tasks,
    )
    if count:
        _settle(plan, definition, dim, operands, out, failed[:count].clone())
    return out


def _evaluate_converted(
    formula: Formula, definition: Callable[..., Tensor], dim: Optional[int], operands: Sequence[Any]
) -> Optional[Tensor]:
    """Numbers and integers first become float64 tensors."""
    wide = [
        x if isinstance(x, Tensor) and x.is_floating_point() else torch.as_tensor(x).double()
        for x in operands
    ]
    if all(x is y for x, y in zip(wide, operands)):
        return None
    return _evaluate(formula, definition, dim, wide)


def _failed(count: int) -> Tensor:
    """Room for the places of what fails."""
    if count > _FAILED:
        return torch.empty(count, dtype=torch.int64, device="cpu")
    try:
        failed: Tensor = _local.failed
    except AttributeError:
        failed = _local.failed = torch.empty(_FAILED, dtype=torch.int64, device="cpu")
    return failed


def _settle(
    plan: _Plan,
    definition: Callable[..., Tensor],
    dim: Optional[int],
    operands: Sequence[Tensor],
    out: Tensor,
    index: Tensor,
) -> None:
    """Put the values that the definition gives into `out` at the places that failed."""
    if not out.dim():
        out = out.view(1)
    laid = [x.expand(plan.full).permute(*plan.order) for x in operands]
    out = out.permute(*plan.order)
    if dim is None:
        at = torch.unravel_index(index, out.shape)
        out[at] = definition(*[x[at] for x in laid])
        return
    laid, out = [x.unsqueeze(0) for x in laid], out.unsqueeze(0)
    n = out.shape[-1]
    rows, row_of = torch.unique(index // n, return_inverse=True)
    at = torch.unravel_index(rows, out.shape[:-1])
    values = definition(*[x[at] for x in laid])
    column = index % n
    out[(*[a[row_of] for a in at], column)] = values[row_of, column]


def _planned(formula: Formula, dim: Optional[int], operands: Sequence[Tensor]) -> Optional[_Plan]:
    if any(x.dtype not in (torch.float32, torch.float64) for x in operands):
        return None
    shape = torch.broadcast_shapes(*[x.shape for x in operands])
    full = shape or torch.Size([1])
    if not full.numel() or len(operands) > 60:
        return None
    row = None if dim is None else dim % len(full)
    program = _compile(formula, [x.dtype for x in operands], row is not None)
    if program is None:
        return None
    result = list(full)
    if row is not None and program.by_row:
        result[row] = 1
    likes = [i for i, x in enumerate(operands) if x.shape == full and x.dtype is torch.float32]
    like = likes[0] if likes and row is None else -1
    stride = (torch.empty(result) if like < 0 else torch.empty_like(operands[like])).stride()
    order = sorted(range(len(full)), key=lambda d: -stride[d] if full[d] > 1 else -math.inf)
    if row is not None:
        order = [d for d in range(len(full)) if d != row] + [row]
    of_out = [0 if d == row and program.by_row else s for d, s in enumerate(stride)]
    layouts = [*[x.expand(full).stride() for x in operands], of_out]
    sizes, strides = _collapsed(
        [full[d] for d in order], [[s[d] for d in order] for s in layouts], row is not None
    )
    flat = [s for operand in strides for s in operand]
    return _Plan(
        program,
        len(sizes),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int64 * len(flat))(*flat),
        tuple(result) if shape else (),
        like if shape else -1,
        math.prod(result),
        order,
        tuple(full),
        ctypes.c_void_p * (len(operands) + 1),
        full.numel() * program.instructions,
    )


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
