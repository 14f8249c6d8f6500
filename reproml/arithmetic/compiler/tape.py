"""A context that records the operations of a formula, for the compiled path.

`Tape` computes with the balls of `Binary64Context`, but its numbers are registers, and each operation on
them is recorded as an instruction. Equal instructions are recorded once (value numbering; A. Aho et al.,
Compilers, 2nd ed., section 8.5). assembler.py makes a program of a tape, and executor.py runs it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Union

from reproml.arithmetic.numerics.balls import Ball, Binary64Context
from reproml.arithmetic.numerics.rounding import SLACK, U

Value = Union["Register", float, int]


class Unsupported(Exception):
    """The formula does something that cannot be recorded."""


class Register:
    """A binary64 number for each element (or for each row) that an instruction will compute."""

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


class Instruction(NamedTuple):
    """An operation. Its arguments are earlier instructions or, where negative, constants (~index)."""

    op: str
    arguments: tuple[int, ...]


def _function(name: str) -> Any:
    def function(self: Tape, x: Value) -> Register:
        return self.unary(name, x)

    return function


class Tape(Binary64Context):
    """Balls on registers, and the instructions that compute them."""

    def __init__(self, operands: Sequence[str]) -> None:
        self.code: list[Instruction] = []
        self.scalar: list[bool] = []  # whether it is one number for each row
        self.level: list[int] = []  # the number of reductions that must precede it
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
            self.code.append(Instruction(op, arguments))
            self.scalar.append(scalar)
            self.level.append(level)
            self.sign.append(sign)
        return Register(self, at)

    def constant_at(self, x: float) -> int:
        key = struct.pack("d", x)  # 0.0 is not -0.0
        at = self._numbers.get(key)
        if at is None:
            at = self._numbers[key] = ~len(self.constants)
            self.constants.append(x)
        return at

    def _record(self, op: str, sign: int, *values: Value) -> Register:
        """Record an elementwise instruction; numbers of rows are expanded over their rows where needed."""
        scalar, level = True, 0
        leading = values[:2] if len(values) == 2 else values[:1]
        if not any(isinstance(x, Register) for x in leading):
            raise Unsupported("an operation on constants")
        for x in values:
            if isinstance(x, Register):
                scalar = scalar and self.scalar[x.at]
                level = max(level, self.level[x.at])
        arguments = tuple(
            self.constant_at(float(x))
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
            raise Unsupported("a reduction of a constant")
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
        if (
            isinstance(y, int) and not y
        ):  # an int 0 is only added where the sign of a zero does not matter
            return x
        if isinstance(y, Register):
            if self.code[x.at].op in ("mul", "neg") and self.code[y.at].op != "mul":
                x, y = y, x  # the operand that can be fused comes second
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

    def _multiply_add(self, product: Instruction, y: Value) -> Register:
        """Record x times a constant, plus y, as one instruction (with two roundings)."""
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

    # ---- the context -------------------------------------------------------------------------------

    _exp, _log, _expm1, _log1p = (_function(f) for f in ("exp", "log", "expm1", "log1p"))
    _erf, _erfc, _erfinv = (_function(f) for f in ("erf", "erfc", "erfinv"))
    _sin, _cos, _sinpi, _cospi = (_function(f) for f in ("sin", "cos", "sinpi", "cospi"))

    def _sqrt(self, x: Value) -> Any:
        return self.unary("sqrt", x) if isinstance(x, Register) else math.sqrt(x)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):
            chosen = x if condition else y
            return 0 if isinstance(chosen, float) and chosen == 0 else chosen  # a radius of zero
        sign = self._sign(x) if self._sign(x) == self._sign(y) else 0
        return self._record("select", sign, condition, x, y)

    def _two_sum(self, x: Value, y: Value) -> tuple[Any, Any]:
        return x + y, self._record("lost", 0, x, y)

    def plus(self, x: Ball, y: Ball) -> Ball:
        """Record the two results of `TensorContext.plus`."""
        s, t = self._two_sum(x.mid, y.mid)
        error = x.error + y.error
        mid = self._record("plus", 0, s, t, error)
        return Ball(mid, 0, self._record("plus_error", 1, s, t, error), self)

    def _total(self, x: Value, like: Value) -> Register:
        return self._reduce("sum", x)

    def _largest(self, x: Value) -> Register:
        return self._reduce("max", x)

    def _gamma(self, x: Value) -> float:
        """Bound of the relative error of a sum by csrc/program.c, which keeps all rounding errors.

        s + t differs from the sum by the rounding errors of t: gamma(h)^2 times the absolute values, where
        no term takes part in more than h additions (Ogita, Rump & Oishi 2005); less than U for h < 2^26.
        s + t is rounded once.
        """
        return 2 * U * SLACK
