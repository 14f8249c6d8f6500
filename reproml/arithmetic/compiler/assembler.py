"""From a tape to a program for csrc/program.c: what is needed, in which register, in which pass.

Instructions that nothing needs are left out, and a register is used again after its number's last use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Callable, Optional

import torch

from reproml.arithmetic.compiler.tape import Register, Tape, Unsupported
from reproml.arithmetic.numerics.balls import Ball, Formula

# As in csrc/program.c.
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
    """What csrc/program.c runs; keeps its arrays alive."""

    def __init__(self, tape: Tape, y: Ball, rows: bool) -> None:
        if not isinstance(y.mid, Register):
            raise Unsupported("a constant result")
        c = y.mid + 0.0 if rows else y.mid  # an exact zero of a row is +0
        error = y.rad if isinstance(y.rad, Register) else tape.constant_at(float(y.rad))
        if isinstance(error, Register):
            if tape.scalar[error.at] and not tape.scalar[c.at]:
                error = tape.spread(error)
            if tape.scalar[c.at] and not tape.scalar[error.at]:
                c = tape.spread(c)
            error = error.at
        code = _Assembler(tape, c.at, tape.constant_at(float(y.rel)), error)
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


def program_of(formula: Formula, kinds: Sequence[torch.dtype], rows: bool) -> Optional[Program]:
    """The program of a formula, on rows or elementwise; None if it cannot be recorded."""
    names = ["load32" if kind is torch.float32 else "load64" for kind in kinds]
    tape = Tape(names)
    try:
        y = formula(tape, *[tape.exact(x) for x in tape.operands])
        return Program(tape, y, rows)
    except (Unsupported, AttributeError, TypeError, ZeroDivisionError, ValueError, OverflowError):
        return None  # the plain path does it, or raises the same
