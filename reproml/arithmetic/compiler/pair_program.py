"""Records a formula for the second rounding test, in pairs of binary64 numbers (csrc/pair_program.c).

The first test leaves some elements in masses: ties, numbers beside a midpoint, results whose bits lie far
apart. A pair s + t has about 100 bits and a bound that is 0 where nothing was rounded. What fails this test
too, or is not supported here, takes the next path.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable, Optional, Union

import torch

from reproml.arithmetic.numerics import special
from reproml.arithmetic.numerics.balls import Formula

# The instructions and limits of csrc/pair_program.c.
_OPS = {
    name: i
    for i, name in enumerate(
        """add add1 add11 mul mul1 mul11 div div1
        neg abs sqrt exp expm1 log log1p sin cos sinpi cospi atan erf erfc erfinv lt eq select""".split()
    )
}
_REGISTERS, _OPERANDS = 64, 8

Number = Union[int, float, Fraction]


class Unsupported(Exception):
    """The formula does something that has no instruction here."""


class Register:
    """A pair for each element. single: its second number and its bound are 0."""

    __slots__ = ("ctx", "at", "single")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, ctx: PairContext, at: int, single: bool) -> None:
        self.ctx, self.at, self.single = ctx, at, single

    @property
    def mid(self) -> Register:
        """The number itself, for `x.mid == 0` on an exact number."""
        return self

    def __add__(self, other: Union[Register, Number]) -> Register:
        return self.ctx.commutative("add", self, other)

    def __sub__(self, other: Union[Register, Number]) -> Register:
        return self + -other

    def __rsub__(self, other: Number) -> Register:
        return -self + other

    def __mul__(self, other: Union[Register, Number]) -> Register:
        return self.ctx.commutative("mul", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Union[Register, Number]) -> Register:
        return self.ctx.divide(self, self.ctx.lift(other))

    def __rtruediv__(self, other: Number) -> Register:
        return self.ctx.divide(self.ctx.lift(other), self)

    def __neg__(self) -> Register:
        return self.ctx.run("neg", self, single=self.single)

    def __abs__(self) -> Register:
        return self.ctx.run("abs", self, single=self.single)

    def __lt__(self, other: Number) -> Any:
        return self.ctx.run("lt", self - other if other else self)

    def __gt__(self, other: Number) -> Any:
        return self.ctx.run("lt", other - self if other else -self)

    def __eq__(self, other: Any) -> Any:
        return self.ctx.run("eq", self - other if other else self)

    def __bool__(self) -> bool:
        raise Unsupported("a branch that depends on an operand")


def _function(name: str) -> Callable[[PairFunctions, Any], Any]:
    return lambda ctx, x: ctx.run(name, x)


class PairFunctions:
    """Constants and functions of pairs, which both contexts of pairs share."""

    run: Callable[..., Any]  # (op, *operands): the result of an instruction
    choose: Callable[..., Any]
    pair: Callable[..., Any]  # the constant with these two numbers and this bound

    pi = property(lambda self: self.pair(3.141592653589793, 1.2246467991473532e-16, 2.0**-107))
    ln2 = property(lambda self: self.pair(0.6931471805599453, 2.3190468138462996e-17, 2.0**-107))
    ln10 = property(lambda self: self.pair(2.302585092994046, -2.1707562233822494e-16, 2.0**-105))

    sqrt, exp, expm1, log, log1p = map(_function, ("sqrt", "exp", "expm1", "log", "log1p"))
    sin, cos, sinpi, cospi, atan = map(_function, ("sin", "cos", "sinpi", "cospi", "atan"))
    erf, erfc, erfinv = map(_function, ("erf", "erfc", "erfinv"))

    tanh = special.tanh

    def sigmoid(self, x: Any) -> Any:
        t = self.exp(-abs(x))
        return self.choose(x < 0, t, 1) / (1 + t)

    def difference(self, x: Any, y: Any) -> Any:
        return x - y

    def plus(self, x: Any, y: Any) -> Any:
        return x + y


class PairContext(PairFunctions):
    """Registers, and the instructions that compute them. Equal instructions are recorded once."""

    def __init__(self, operands: int) -> None:
        self.operands = [Register(self, at, True) for at in range(operands)]
        self.constants: list[tuple[float, ...]] = []  # of three numbers each
        # Until `Program` numbers the registers, constants are negative (~index).
        self.code: list[tuple[str, tuple[int, ...]]] = []
        self._numbers: dict[Any, int] = {}

    # ---- recording ---------------------------------------------------------------------------------

    def run(self, op: str, *arguments: Register, single: bool = False) -> Register:
        key = op, tuple(x.at for x in arguments)
        at = self._numbers.get(key)
        if at is None:
            at = self._numbers[key] = len(self.operands) + len(self.code)
            self.code.append(key)
        return Register(self, at, single)

    def lift(self, x: Union[Register, Number]) -> Register:
        if isinstance(x, Register):
            return x
        x = Fraction(x)
        high = float(x)
        low = float(x - Fraction(high))
        rest = abs(x - Fraction(high) - Fraction(low))
        return self.pair(high, low, math.nextafter(float(rest), math.inf) if rest else 0.0)

    def pair(self, *numbers: float) -> Register:
        if numbers not in self.constants:
            self.constants.append(numbers)
        return Register(self, ~self.constants.index(numbers), not any(numbers[1:]))

    def commutative(self, op: str, x: Register, y: Union[Register, Number]) -> Register:
        if not isinstance(y, Register) and y == (1 if op == "mul" else 0):
            return x
        y = self.lift(y)
        if x.single and not y.single:
            x, y = y, x  # a single number comes second
        return self.run(op + "1" * (x.single + y.single), x, y)

    def divide(self, x: Register, y: Register) -> Register:
        return self.run("div" + "1" * y.single, x, y)

    # ---- the context -------------------------------------------------------------------------------

    def exact(self, x: Register) -> Register:
        return x

    constant = lift

    def choose(self, condition: Register, x: Any, y: Any) -> Register:
        x, y = self.lift(x), self.lift(y)
        return self.run("select", condition, x, y, single=x.single and y.single)

    where = choose


class _Program(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("operands", "constants", "length", "wide")],
        *[(n, ctypes.c_void_p) for n in ("constant", "code")],
    ]


class PairProgram:
    """A program that csrc/pair_program.c runs; keeps its arrays alive."""

    def __init__(self, ctx: PairContext, y: Register, wide: Sequence[bool]) -> None:
        operands, constants = len(ctx.operands), len(ctx.constants)
        last = operands + len(ctx.code) - 1
        if not ctx.code or y.at != last or last + constants >= _REGISTERS or operands > _OPERANDS:
            raise Unsupported("a formula of another form")

        def register(at: int) -> int:
            return operands + ~at if at < 0 else at if at < operands else at + constants

        numbers = [x for constant in ctx.constants for x in constant]
        code = []
        for op, arguments in ctx.code:
            registers = [register(at) for at in arguments]
            code += [_OPS[op], *registers, *[0] * (3 - len(registers))]
        self._constants = (ctypes.c_double * len(numbers))(*numbers)
        self._code = (ctypes.c_int32 * len(code))(*code)
        self._program = _Program(
            operands,
            constants,
            len(ctx.code),
            sum(1 << j for j, is_wide in enumerate(wide) if is_wide),
            ctypes.addressof(self._constants),
            ctypes.addressof(self._code),
        )
        self.address = ctypes.addressof(self._program)


def pair_program_of(formula: Formula, kinds: Sequence[torch.dtype]) -> Optional[PairProgram]:
    """Return the elementwise program of a formula; None if it cannot be recorded (see `program_of`)."""
    ctx = PairContext(len(kinds))
    try:
        y = formula(ctx, *ctx.operands)
        return PairProgram(ctx, y, [kind is torch.float64 for kind in kinds])
    except (Unsupported, AttributeError, TypeError, ZeroDivisionError, ValueError, OverflowError):
        return None
