"""Fields of real numbers with an error bound, in which a definition is evaluated.

A definition is a Python function of real numbers, `formula(k, x, y, ...)`, written once with + - * /
and the functions of the field k (`k.exp(x)`, `k.sum(x)` over the last axis, ...). Three fields are here:

- `Binary64`, whole tensors at once: each number is a ball, a float64 centre and a bound of its error;
- `Rational`, one row at a time: exact, as long as nothing transcendental comes up;
- `MultiPrecision`, one row at a time: balls again, on mpmath's numbers of any length.

A fourth, `tape.Tape`, has the balls of `Binary64` again, recorded for compiled loops. ball.py evaluates.
"""

from __future__ import annotations

import math
from fractions import Fraction
from math import isqrt
from typing import Any, Callable, Union

import numpy as np
import torch

from reproml.arithmetic.numerics import elementary
from reproml.arithmetic.numerics.rounding import U, gamma, two_sum

Number = Union[int, Fraction]
Formula = Callable[..., Any]


class Ball:
    """All real numbers v with |v - c| <= r |c| + e, elementwise.

    c: the centre. r: a Python number, the relative bound, which products and quotients pass on for
    nothing. e: the absolute bound, of c's shape, or a Python 0 where there is none.
    """

    __slots__ = ("mid", "rel", "rad", "ctx")
    __array_ufunc__ = None  # numpy leaves mixed operations to this class

    def __init__(self, mid: Any, rel: Any, rad: Any, ctx: Any) -> None:
        self.mid, self.rel, self.rad, self.ctx = mid, rel, rad, ctx

    @property
    def error(self) -> Any:
        """The absolute bound, a Python 0 for an exact number."""
        # the number comes second: in front of an array mpmath would first print the array
        return self.rad if isinstance(self.rel, int) else abs(self.mid) * self.rel + self.rad

    @property
    def _relative(self) -> bool:
        return isinstance(self.rad, int)

    def _lift(self, other: Union[Ball, Number]) -> Ball:
        return other if isinstance(other, Ball) else self.ctx.constant(other)

    def __add__(self, other: Union[Ball, Number]) -> Ball:
        other = self._lift(other)
        return Ball(self.mid + other.mid, self.ctx.u, self.error + other.error, self.ctx)

    def __mul__(self, other: Union[Ball, Number]) -> Ball:
        if not isinstance(other, Ball) and _is_power_of_two(other):  # rounds nothing
            factor = self.ctx.number(other)
            return Ball(
                self.mid * factor,
                self.rel,
                0 if self._relative else self.rad * abs(factor),
                self.ctx,
            )
        other = self._lift(other)
        c, k = self.mid * other.mid, self.ctx
        if self._relative and other._relative:
            return Ball(c, k.passed(self.rel, other.rel), 0, k)
        d, other_d = self.error, other.error
        return Ball(c, k.u, d * (abs(other.mid) + other_d) + other_d * abs(self.mid), k)

    def __truediv__(self, other: Union[Ball, Number]) -> Ball:
        other = self._lift(other)
        c, k = self.mid / other.mid, self.ctx
        if self._relative and other._relative:
            return Ball(c, k.passed(self.rel, other.rel), 0, k)
        d, other_d = self.error, other.error
        low = abs(other.mid) - other_d  # |a/b - c| <= (da + |c| db) / (|b| - db)
        return Ball(c, k.u, k.where(low > 0, (d + abs(c) * other_d) / low, k.infinity), k)

    def __neg__(self) -> Ball:
        return Ball(-self.mid, self.rel, self.rad, self.ctx)

    def __sub__(self, other: Union[Ball, Number]) -> Ball:
        return self + -self._lift(other)

    def __radd__(self, other: Number) -> Ball:
        return self._lift(other) + self

    def __rsub__(self, other: Number) -> Ball:
        return self._lift(other) - self

    __rmul__ = __mul__

    def __rtruediv__(self, other: Number) -> Ball:
        return self._lift(other) / self

    def __lt__(self, other: int) -> Any:
        """Elementwise, of an exact number."""
        return self.mid < other

    def __abs__(self) -> Ball:
        return Ball(abs(self.mid), self.rel, self.rad, self.ctx)


def _is_power_of_two(x: Number) -> bool:
    n, d = abs(x.numerator), x.denominator
    return n > 0 and not n & (n - 1) and not d & (d - 1)


class BallContext:
    """What the two fields of balls have in common: how errors pass through a function."""

    u: Any
    relative: Any  # bound of a function's error, and that of exp
    exp_relative: Any
    infinity: Any
    exp_max: Any
    sin_max: Any

    def exact(self, c: Any) -> Ball:
        return Ball(c, 0, 0, self)

    def constant(self, x: Number) -> Ball:
        c = self.number(x)
        return Ball(c, 0 if c == x else self.u, 0, self)

    def passed(self, r: Any, other: Any) -> Any:
        """The relative bound of a rounded product or quotient (Higham, lemma 3.1, with room)."""
        return (r + other + self.u) * (1 + 2.0**-20)

    def exp(self, x: Ball) -> Ball:
        c, d = self._exp(x.mid), x.error
        e = self.where(x.mid <= self.exp_max, 0.0, self.infinity) if self.exp_max else 0
        if not isinstance(d, int):  # exp(d) - 1 <= 2 d for d <= 1
            e = e + self.where(d <= 1, 2 * c * d, self.infinity)
        return Ball(c, self.exp_relative, e, self)

    def log(self, x: Ball) -> Ball:
        c, d = self._log(x.mid), x.error
        if isinstance(d, int):
            return Ball(c, self.relative, 0, self)
        low = x.mid - d
        return Ball(c, self.relative, self.where(low > 0, d / low, self.infinity), self)

    def sqrt(self, x: Ball) -> Ball:
        c = self._sqrt(x.mid)
        if x._relative:  # sqrt(1 + r) <= 1 + r / 2, sqrt(1 - r) >= 1 - r
            return Ball(c, self.passed(x.rel, self.relative), 0, self)
        d = x.error  # |sqrt(a + d) - sqrt(a)| <= d / sqrt(a), also <= sqrt(d)
        e = self.where(d < x.mid, d / self.where(c == 0, 1, c), self._sqrt(d) + c)
        return Ball(c, self.relative, e, self)

    def tanh(self, x: Ball) -> Ball:
        """-t / (2 + t) with t = exp(-2 |x|) - 1, so that nothing cancels; and x's sign."""
        t = self.expm1(-2 * abs(x))
        y = -t / (2 + t)
        return self.choose(x < 0, -y, y)

    def sigmoid(self, x: Ball) -> Ball:
        """1 / (1 + t) or t / (1 + t) with t = exp(-|x|)."""
        t = self.exp(-abs(x))
        return self.choose(x < 0, t, self.exact(t.mid * 0 + 1)) / (1 + t)

    def choose(self, condition: Any, x: Ball, y: Ball) -> Ball:
        """x where the condition on exact numbers holds, else y. Neither may divide by zero."""
        c = self.where(condition, x.mid, y.mid)
        if x._relative and y._relative:
            return Ball(c, max(x.rel, y.rel), 0, self)
        return Ball(c, 0, self.where(condition, x.error, y.error), self)

    def expm1(self, x: Ball) -> Ball:
        c, d = self._expm1(x.mid), x.error
        if isinstance(d, int):
            e = self.where(x.mid <= self.exp_max, 0.0, self.infinity) if self.exp_max else 0
        else:  # the derivative is 1 + expm1
            e = self.where((d <= 1) & (x.mid <= 700), 2 * (1 + abs(c)) * d, self.infinity)
        return Ball(c, self.relative, e, self)

    def log1p(self, x: Ball) -> Ball:
        c, d = self._log1p(x.mid), x.error
        if isinstance(d, int):
            return Ball(c, self.relative, 0, self)
        low = 1 + x.mid - d
        return Ball(c, self.relative, self.where(low > 0, 2 * d / low, self.infinity), self)

    def sin(self, x: Ball) -> Ball:
        return self._periodic(self._sin(x.mid), x)

    def cos(self, x: Ball) -> Ball:
        return self._periodic(self._cos(x.mid), x)

    def _periodic(self, c: Any, x: Ball) -> Ball:
        e = x.error  # no derivative exceeds 1
        if self.sin_max:
            e = e + self.where(abs(x.mid) <= self.sin_max, 0.0, self.infinity)
        return Ball(c, self.relative, e, self)

    def sinpi(self, x: Ball) -> Ball:
        return Ball(self._sinpi(x.mid), self.relative, 4 * x.error, self)

    def cospi(self, x: Ball) -> Ball:
        return Ball(self._cospi(x.mid), self.relative, 4 * x.error, self)

    def erf(self, x: Ball) -> Ball:
        return Ball(self._erf(x.mid), self.relative, 2 * x.error, self)

    def erfc(self, x: Ball) -> Ball:
        """Its logarithm's slope is below 2 |t| + 2: erfc(t) > 2 / sqrt(pi) exp(-t^2) / (t + sqrt(t^2 + 2))
        for t >= 0 (Abramowitz & Stegun, 7.1.13), and erfc(t) >= 1 below 0."""
        c, d = self._erfc(x.mid), x.error
        if isinstance(d, int):
            return Ball(c, self.relative, 0, self)
        q = d * (
            2 * (abs(x.mid) + d) + 2
        )  # over the ball by a factor exp(q) at most, exp(q) - 1 <= 2 q
        far = self.where(abs(x.mid) - d > 27, 2.0**-1050, self.infinity)  # 0 or 2 to 2^-1050
        return Ball(c, self.relative, self.where(q <= 1, 2 * q * c, far), self)

    def erfinv(self, x: Ball) -> Ball:
        """Of an exact number."""
        return Ball(self._erfinv(x.mid), self.relative, 0, self)

    def number(self, x: Number) -> Any:
        raise NotImplementedError

    _exp: Callable[[Any], Any]
    _log: Callable[[Any], Any]
    _sqrt: Callable[[Any], Any]
    _expm1: Callable[[Any], Any]
    _log1p: Callable[[Any], Any]
    _sin: Callable[[Any], Any]
    _cos: Callable[[Any], Any]
    _sinpi: Callable[[Any], Any]
    _cospi: Callable[[Any], Any]
    _erf: Callable[[Any], Any]
    _erfc: Callable[[Any], Any]
    _erfinv: Callable[[Any], Any]
    where: Callable[[Any, Any, Any], Any]


class Binary64Context(BallContext):
    """Balls on binary64 numbers, whatever holds them: tensors (Binary64) or registers (tape.Tape)."""

    u, relative, infinity, exp_max = U, elementary.RELATIVE, math.inf, 709.0
    exp_relative, sin_max = elementary.EXP_RELATIVE, elementary.SIN_MAX

    @property
    def pi(self) -> Ball:
        return Ball(math.pi, self.u, 0, self)

    def number(self, x: Number) -> float:
        return float(x)

    def sum(self, x: Ball) -> Ball:
        """Over the last axis, which stays with length 1."""
        e = (self._gamma(x.mid) + x.rel) * self._total(abs(x.mid), x.mid)
        if not x._relative:
            e = e + self._total(x.rad, x.mid)
        return Ball(self._total(x.mid, x.mid), 0, e, self)

    def difference(self, x: Ball, y: Ball) -> Ball:
        """x - y of exact numbers, known to be exact where it is (TwoSum's error is the bound)."""
        s, t = self._two_sum(x.mid, -y.mid)
        return Ball(s, 0, abs(t), self)

    def max(self, x: Ball) -> Ball:
        """The largest of exact numbers over the last axis, which stays with length 1."""
        return self.exact(self._largest(x.mid))

    def ball(self, c: Any, e: Any) -> Ball:
        """With an absolute bound."""
        return Ball(c, 0, e, self)

    def total(self, x: Any) -> Any:
        """The sum of centres over the last axis, where it is exact."""
        return self._total(x, x)

    # The relative error of a sum over a row; the sum of a row of `like`'s length; the largest.
    _gamma: Callable[[Any], float]
    _total: Callable[[Any, Any], Any]
    _largest: Callable[[Any], Any]
    _two_sum: Callable[[Any, Any], tuple[Any, Any]]


class TensorContext(Binary64Context):
    """Balls on float64 tensors."""

    _exp = staticmethod(elementary.exp)
    _log = staticmethod(elementary.log)
    _sqrt = staticmethod(lambda x: math.sqrt(x) if isinstance(x, float) else torch.sqrt(x))
    _expm1 = staticmethod(elementary.expm1)
    _log1p = staticmethod(elementary.log1p)
    _sin = staticmethod(lambda x: elementary.sin_cos(x)[0])
    _cos = staticmethod(lambda x: elementary.sin_cos(x)[1])
    _sinpi = staticmethod(lambda x: elementary.sin_cos_pi(x)[0])
    _cospi = staticmethod(lambda x: elementary.sin_cos_pi(x)[1])
    _erf = staticmethod(elementary.erf)
    _erfc = staticmethod(elementary.erfc)
    _erfinv = staticmethod(elementary.erfinv)
    _two_sum = staticmethod(two_sum)
    _gamma = staticmethod(lambda x: gamma(x.shape[-1]))
    _largest = staticmethod(lambda x: x.amax(-1, keepdim=True))

    @staticmethod
    def _total(x: Any, like: Any) -> Any:
        # + 0.0: a sum of -0's is 0 in whatever order it was taken
        return x.expand_as(like).sum(-1, keepdim=True) + 0.0

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):  # of a constant
            return x if condition else y
        return torch.where(condition, x, y)

    def plus(self, x: Ball, y: Ball) -> Ball:
        """x + y, the last step of a formula where y may be far below x.

        If x + y rounds to a midpoint of binary32 in binary64, TwoSum's error tells the side: no other
        midpoint is within an ulp of binary64, so any number on that side rounds like the true one.
        """
        s, t = two_sum(x.mid, y.mid)
        e = x.error + y.error
        toward = torch.nextafter(s, torch.where(t > 0, torch.inf, -torch.inf).to(s))
        sided = ((s.contiguous().view(torch.int64) & 0x1FFFFFFF) == 0x10000000) & (t.abs() > e)
        sided &= t.abs() > 2.0**-900 * s.abs()  # what is smaller may count as zero: see ball._BITS
        return Ball(torch.where(sided, toward, s), 0, torch.where(sided, 0.0, t.abs() + e), self)


# Each function with its one rational point (Lindemann-Weierstrass; of erf nothing more is known).
_TRANSCENDENTAL = {
    "exp": (0, Fraction(1)),
    "log": (1, Fraction(0)),
    "sqrt": (0, Fraction(0)),
    "expm1": (0, Fraction(0)),
    "log1p": (0, Fraction(0)),
    "sin": (0, Fraction(0)),
    "cos": (0, Fraction(1)),
    "sinpi": (0, Fraction(0)),
    "cospi": (0, Fraction(1)),
    "tanh": (0, Fraction(0)),
    "sigmoid": (0, Fraction(1, 2)),
    "erf": (0, Fraction(0)),
    "erfc": (0, Fraction(1)),
    "erfinv": (0, Fraction(0)),
}


class MultiPrecisionContext(BallContext):
    """Balls on numpy arrays of mpmath numbers with `bits` binary digits."""

    exp_max = sin_max = None  # mpmath's exponents are unbounded, its reduction has no limit

    def __init__(self, bits: int) -> None:
        import mpmath  # only for the rare elements that come here

        self.mp = mpmath.MPContext()
        self.mp.prec = bits
        self.u = self.mp.ldexp(1, 1 - bits)
        self.relative = self.exp_relative = 16 * self.u  # mpmath promises less than an ulp
        self.infinity = self.mp.inf
        for name in _TRANSCENDENTAL:
            if name not in ("tanh", "sigmoid"):  # these are compositions
                setattr(self, f"_{name}", np.frompyfunc(getattr(self.mp, name), 1, 1))

    @property
    def pi(self) -> Ball:
        return Ball(+self.mp.pi, self.u, 0, self)

    def number(self, x: Number) -> Any:
        x = Fraction(x)
        return self.mp.mpf(x.numerator) / x.denominator

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        return np.where(condition, x, y)

    def sum(self, x: Ball) -> Ball:
        n = x.mid.shape[-1]
        e = np.sum(abs(x.mid), -1, keepdims=True) * (2 * n * self.u + x.rel)
        if not x._relative:
            e = e + np.sum(np.broadcast_to(x.rad, x.mid.shape), -1, keepdims=True)
        return Ball(np.sum(x.mid, -1, keepdims=True), 0, e, self)

    def difference(self, x: Ball, y: Ball) -> Ball:
        return x - y

    def plus(self, x: Ball, y: Ball) -> Ball:
        return x + y

    def max(self, x: Ball) -> Ball:
        return self.exact(np.max(x.mid, -1, keepdims=True))


class Irrational(ArithmeticError):
    """The exact field cannot give this function's value."""


def _only_at(at: int, value: Fraction) -> Any:
    def function(x: Fraction) -> Fraction:
        if x != at:
            raise Irrational
        return value

    return np.frompyfunc(function, 1, 1)


def _root(x: Fraction) -> Fraction:
    n, d = x.numerator, x.denominator
    if x < 0 or isqrt(n) ** 2 != n or isqrt(d) ** 2 != d:
        raise Irrational
    return Fraction(isqrt(n), isqrt(d))


def _turning(quarter: int) -> Any:
    """sin(pi (x + quarter / 2)) where x is a multiple of 1/2."""

    def function(x: Fraction) -> Fraction:
        if (2 * x).denominator != 1:
            raise Irrational
        return Fraction((0, 1, 0, -1)[(int(2 * x) + quarter) % 4])

    return np.frompyfunc(function, 1, 1)


class RationalContext:
    """Numpy arrays of fractions."""

    def __init__(self) -> None:
        for name, (at, value) in _TRANSCENDENTAL.items():
            setattr(self, name, _only_at(at, value))
        self.sqrt = np.frompyfunc(_root, 1, 1)
        self.sinpi, self.cospi = _turning(0), _turning(1)

    choose = staticmethod(np.where)
    constant = Fraction
    where = staticmethod(np.where)

    @staticmethod
    def sum(x: Any) -> Any:
        return np.sum(x, -1, keepdims=True)

    @staticmethod
    def difference(x: Any, y: Any) -> Any:
        return x - y

    @staticmethod
    def plus(x: Any, y: Any) -> Any:
        return x + y

    @staticmethod
    def max(x: Any) -> Any:
        return np.max(x, -1, keepdims=True)
