"""Assembles a tape into a program for csrc/program.c: selects instructions, registers and passes.

Instructions that the result does not need are left out. A register is reused after its number's last use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Callable, Optional

import torch

from reproml.arithmetic.compiler.pair_program import PairProgram, pair_program_of
from reproml.arithmetic.compiler.tape import Register, Tape, Unsupported
from reproml.arithmetic.numerics.balls import Ball, Formula

# The instructions and limits of csrc/program.c. Each instruction has four forms (see `_form`).
_OPS = {
    name: 4 * i
    for i, name in enumerate(
        """load32 load64 expand sum max round
        add sub mul div lt le eq and or
        neg abs not sqrt exp log expm1 log1p sin cos sinpi cospi erf erfc erfinv
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
        ("pairs", ctypes.c_void_p),
    ]


_ROUND = -1  # in a list of instructions: the rounding test of the result


class _Assembler:
    """Assigns registers to the instructions of a tape and encodes them.

    mid, rel, rad: the result, as instructions of the tape or, where negative, constants (~index).
    """

    def __init__(self, tape: Tape, mid: int, rel: int, rad: int) -> None:
        self.tape, self.result = tape, (mid, rel, rad)
        self.by_row = tape.scalar[mid]
        needed = self._needed([x for x in (mid, rad) if x >= 0], lambda at: True)
        self.needed = sorted(needed)
        self.reductions = [at for at in self.needed if tape.code[at].op in _REDUCING]
        self.scalars = [at for at in self.needed if tape.scalar[at]]
        self.registers = 0

    def _arguments(self, at: int) -> tuple[int, ...]:
        if at == _ROUND:
            return self.result
        op, arguments = self.tape.code[at]
        return () if op.startswith("load") else arguments

    def _needed(self, roots: Sequence[int], enter: Callable[[int], bool]) -> set[int]:
        """The instructions that the roots depend on, not beyond those that `enter` rejects."""
        found: set[int] = set()
        stack = [at for at in roots if enter(at)]
        while stack:
            at = stack.pop()
            if at not in found:
                found.add(at)
                stack += [x for x in self._arguments(at) if x >= 0 and enter(x)]
        return found

    def straight(self) -> list[int]:
        """All instructions in one sequence, for rows that fit into one block."""
        return self._encode([*self.needed, _ROUND], {})

    def staged(self) -> tuple[list[int], list[tuple[int, int, int]]]:
        """A stage for each level of reductions: what they need of each block, then what each row needs."""
        tape = self.tape
        code: list[int] = []
        stages: list[tuple[int, int, int]] = []
        # Numbers of rows outlive a block, so each has a register of its own.
        kept = {at: i for i, at in enumerate(self.scalars)}
        last = max((tape.level[at] for at in self.reductions), default=0) + 1
        for level in range(1, last + 1):
            ends = [at for at in self.reductions if tape.level[at] == level]
            roots = [x for at in ends for x in self._arguments(at)]
            if level == last and not self.by_row:
                roots = [x for x in self._arguments(_ROUND) if x >= 0]
                ends = [_ROUND]
            body = sorted(self._needed(roots, lambda at: not tape.scalar[at]))
            after = [
                at for at in self.scalars if tape.level[at] == level and at not in self.reductions
            ]
            if level == last and self.by_row:
                after = [_ROUND]
            begin = len(code) // 6
            code += self._encode([*body, *ends], kept)
            middle = len(code) // 6
            code += self._encode(after, kept)
            stages.append((begin, middle, len(code) // 6))
        return code, stages

    def _encode(self, order: Sequence[int], kept: dict[int, int]) -> list[int]:
        """Encode instructions as six numbers each: form, target, three arguments, one number a row?

        kept: the instructions whose numbers have the registers 0 to len(kept) - 1 for themselves.
        """
        last_use = {x: i for i, at in enumerate(order) for x in self._arguments(at)}
        place = dict(kept)
        free: list[int] = []
        out: list[int] = []
        self.registers = max(self.registers, len(kept))
        used = len(kept)
        for i, at in enumerate(order):
            arguments = self._arguments(at)
            if at == _ROUND:
                to, op, scalar = 0, "round", self.by_row
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
    """Bits for constant arguments: the first and second of two, the second and third of three."""
    if len(arguments) == 2:
        return (arguments[0] < 0) + 2 * (arguments[1] < 0)
    if op == "round":
        return 2 * (arguments[2] < 0)
    if len(arguments) == 3:
        return (arguments[1] < 0) + 2 * (arguments[2] < 0)
    return 0


class Program:
    """A program that csrc/program.c runs; keeps its arrays alive."""

    def __init__(
        self, tape: Tape, y: Ball, rows: bool, pairs: Optional[PairProgram] = None
    ) -> None:
        if not isinstance(y.mid, Register):
            raise Unsupported("a constant result")
        mid = y.mid + 0.0 if rows else y.mid  # an exact zero of a row is +0
        error = y.rad if isinstance(y.rad, Register) else tape.constant_at(float(y.rad))
        if isinstance(error, Register):
            if tape.scalar[error.at] and not tape.scalar[mid.at]:
                error = tape.spread(error)
            if tape.scalar[mid.at] and not tape.scalar[error.at]:
                mid = tape.spread(mid)
            error = error.at
        code = _Assembler(tape, mid.at, tape.constant_at(float(y.rel)), error)
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
            pairs.address if pairs else None,
        )
        self.pairs = pairs
        self.address = ctypes.addressof(self._program)


def program_of(formula: Formula, kinds: Sequence[torch.dtype], rows: bool) -> Optional[Program]:
    """Return the program of a formula, on rows or elementwise; None if it cannot be recorded.

    A formula may do what a tape does not support. Some of that raises `Unsupported`; but a formula may also
    use a function that `Tape` lacks (AttributeError), pass a register to torch or numpy (TypeError), or
    compute a constant that does not exist (the other three). None of these is lost: without a program the
    reference path evaluates the same formula, and raises the error if the formula itself is wrong.
    """
    names = ["load32" if kind is torch.float32 else "load64" for kind in kinds]
    tape = Tape(names)
    try:
        y = formula(tape, *[tape.exact(x) for x in tape.operands])
        return Program(tape, y, rows, None if rows else pair_program_of(formula, kinds))
    except (Unsupported, AttributeError, TypeError, ZeroDivisionError, ValueError, OverflowError):
        return None
