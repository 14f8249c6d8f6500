"""Contexts in which a formula is evaluated: on balls (midpoint and error bound), or exactly on fractions.

A formula is a Python function of real numbers, `formula(ctx, x, y, ...)`, written once with + - * / and
the functions of the context ctx (`ctx.exp(x)`, `ctx.sum(x)` over the last axis, ...). This file has three
contexts:

- `TensorContext` computes with balls on float64 tensors (the reference path);
- `RationalContext` computes on rational numbers, as long as no value is transcendental (the exact path);
- `MultiPrecisionContext` computes with balls on mpmath's numbers of any length (the exact path, too).

A fourth, `compiler.tape.Tape`, records the operations of `Binary64Context` for the compiled path.
`compiler.evaluate` evaluates formulas in these contexts. The balls are those of Arb (F. Johansson, IEEE
Transactions on Computers 66(8), 2017), with a relative radius besides the absolute one.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from math import isqrt
from typing import Any, Callable, Union

import numpy as np
import torch

from reproml.arithmetic.numerics import elementary, special
from reproml.arithmetic.numerics.formats import target
from reproml.arithmetic.numerics.rationals import Number, Rationals
from reproml.arithmetic.numerics.rounding import U, gamma, two_sum

Formula = Callable[..., Any]


class Ball:
    """All real numbers v with |v - mid| <= rel |mid| + rad, elementwise.

    mid: the midpoint. rel: the relative radius, a Python number, which products and quotients propagate
    without computing on elements. rad: the absolute radius, of mid's shape, or a Python 0 for none.
    """

    __slots__ = ("mid", "rel", "rad", "ctx")
    __array_ufunc__ = None  # numpy leaves mixed operations to this class

    def __init__(self, mid: Any, rel: Any, rad: Any, ctx: Any) -> None:
        self.mid, self.rel, self.rad, self.ctx = mid, rel, rad, ctx

    @property
    def error(self) -> Any:
        """The bound of |v - mid|, a Python 0 for an exact number."""
        # The number is the second factor: as the first, an mpmath number would print the array.
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
        mid, ctx = self.mid * other.mid, self.ctx
        if self._relative and other._relative:
            return Ball(mid, ctx.propagated(self.rel, other.rel), 0, ctx)
        error, other_error = self.error, other.error
        rad = error * (abs(other.mid) + other_error) + other_error * abs(self.mid)
        return Ball(mid, ctx.u, rad, ctx)

    def __truediv__(self, other: Union[Ball, Number]) -> Ball:
        other = self._lift(other)
        mid, ctx = self.mid / other.mid, self.ctx
        if self._relative and other._relative:
            return Ball(mid, ctx.propagated(self.rel, other.rel), 0, ctx)
        error, other_error = self.error, other.error
        # |x / y - mid| <= (error + |mid| other_error) / low for x of self and y of other, |y| >= low
        low = abs(other.mid) - other_error
        rad = ctx.where(low > 0, (error + abs(mid) * other_error) / low, ctx.infinity)
        return Ball(mid, ctx.u, rad, ctx)

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
        """Compare elementwise; the ball must be an exact number."""
        return self.mid < other

    def __abs__(self) -> Ball:
        return Ball(abs(self.mid), self.rel, self.rad, self.ctx)


def _is_power_of_two(x: Number) -> bool:
    n, d = abs(x.numerator), x.denominator
    return n > 0 and not n & (n - 1) and not d & (d - 1)


class BallContext:
    """How an error propagates through each function; shared by all contexts of balls.

    In the comments below, x is the midpoint of the operand and d its error.
    """

    u: Any  # at least the unit roundoff of the numbers
    relative: Any  # bound of the relative error of every function but exp
    exp_relative: Any  # bound of the relative error of exp
    infinity: Any
    exp_max: Any  # above this the radius of exp and expm1 is infinite; None for no limit
    sin_max: Any  # beyond this the radius of sin and cos is infinite; None for no limit

    def exact(self, mid: Any) -> Ball:
        return Ball(mid, 0, 0, self)

    def constant(self, x: Number) -> Ball:
        mid = self.number(x)
        return Ball(mid, 0 if mid == x else self.u, 0, self)

    def propagated(self, rel: Any, other: Any) -> Any:
        """The relative radius of a rounded product or quotient (Higham, lemma 3.1, with room)."""
        return (rel + other + self.u) * (1 + 2.0**-20)

    def exp(self, x: Ball) -> Ball:
        mid, error = self._exp(x.mid), x.error
        rad = self.where(x.mid <= self.exp_max, 0.0, self.infinity) if self.exp_max else 0
        if not isinstance(error, int):  # exp(d) - 1 <= 2 d for d <= 1
            # Below exp(-700) < 2^-1009 are mid and value. A zero near it has no sign: 2^-998 > 2 TINY.
            far = self.where(x.mid + error < -700, 2.0**-998, self.infinity)
            rad = rad + self.where(error <= 1, 2 * mid * error, far)
        return Ball(mid, self.exp_relative, rad, self)

    def log(self, x: Ball) -> Ball:
        mid, error = self._log(x.mid), x.error
        if isinstance(error, int):
            return Ball(mid, self.relative, 0, self)
        low = x.mid - error
        return Ball(mid, self.relative, self.where(low > 0, error / low, self.infinity), self)

    def sqrt(self, x: Ball) -> Ball:
        mid = self._sqrt(x.mid)
        if x._relative:  # sqrt(1 + rel) <= 1 + rel / 2, sqrt(1 - rel) >= 1 - rel
            return Ball(mid, self.propagated(x.rel, self.relative), 0, self)
        error = x.error  # |sqrt(x + d) - sqrt(x)| <= d / sqrt(x), also <= sqrt(d)
        rad = self.where(
            error < x.mid, error / self.where(mid == 0, 1, mid), self._sqrt(error) + mid
        )
        return Ball(mid, self.relative, rad, self)

    tanh = special.tanh

    def sigmoid(self, x: Ball) -> Ball:
        """1 / (1 + t) or t / (1 + t) with t = exp(-|x|)."""
        t = self.exp(-abs(x))
        return self.choose(x < 0, t, self.exact(t.mid * 0 + 1)) / (1 + t)

    def choose(self, condition: Any, x: Ball, y: Ball) -> Ball:
        """Select x where the condition on exact numbers holds, else y. Neither may divide by zero."""
        mid = self.where(condition, x.mid, y.mid)
        if x._relative and y._relative:
            return Ball(mid, max(x.rel, y.rel), 0, self)
        return Ball(mid, 0, self.where(condition, x.error, y.error), self)

    def expm1(self, x: Ball) -> Ball:
        mid, error = self._expm1(x.mid), x.error
        if isinstance(error, int):
            rad = self.where(x.mid <= self.exp_max, 0.0, self.infinity) if self.exp_max else 0
        else:  # the derivative is 1 + expm1
            known = (error <= 1) & (x.mid <= 700)
            rad = self.where(known, 2 * (1 + abs(mid)) * error, self.infinity)
        return Ball(mid, self.relative, rad, self)

    def log1p(self, x: Ball) -> Ball:
        mid, error = self._log1p(x.mid), x.error
        if isinstance(error, int):
            return Ball(mid, self.relative, 0, self)
        low = 1 + x.mid - error
        rad = self.where(low > 0, 2 * error / low, self.infinity)
        return Ball(mid, self.relative, rad, self)

    def sin(self, x: Ball) -> Ball:
        return self._periodic(self._sin(x.mid), x)

    def cos(self, x: Ball) -> Ball:
        return self._periodic(self._cos(x.mid), x)

    def _periodic(self, mid: Any, x: Ball) -> Ball:
        rad = x.error  # no derivative exceeds 1
        if self.sin_max:
            rad = rad + self.where(self._has_sin(x.mid), 0.0, self.infinity)
        return Ball(mid, self.relative, rad, self)

    def _has_sin(self, x: Any) -> Any:
        return abs(x) <= self.sin_max

    def sinpi(self, x: Ball) -> Ball:
        return Ball(self._sinpi(x.mid), self.relative, 4 * x.error, self)

    def cospi(self, x: Ball) -> Ball:
        return Ball(self._cospi(x.mid), self.relative, 4 * x.error, self)

    def erf(self, x: Ball) -> Ball:
        return Ball(self._erf(x.mid), self.relative, 2 * x.error, self)

    def erfc(self, x: Ball) -> Ball:
        """Bound the error by the slope of log erfc, which is below 2 |t| + 2.

        erfc(t) > 2 / sqrt(pi) exp(-t^2) / (t + sqrt(t^2 + 2)) for t >= 0 (Abramowitz & Stegun, 7.1.13), and
        erfc(t) >= 1 below 0.
        """
        mid, error = self._erfc(x.mid), x.error
        if isinstance(error, int):
            return Ball(mid, self.relative, 0, self)
        # Over the ball, erfc changes by a factor of exp(q) at most, and exp(q) - 1 <= 2 q for q <= 1.
        q = error * (2 * (abs(x.mid) + error) + 2)
        # Beyond 27 erfc is 0 or 2 to within 2^-1050, and `_erfc` to within 2^-1010.
        far = self.where(abs(x.mid) - error > 27, 2.0**-1009, self.infinity)
        return Ball(mid, self.relative, self.where(q <= 1, 2 * q * mid, far), self)

    def erfinv(self, x: Ball) -> Ball:
        """The operand must be an exact number."""
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
    """Balls on binary64 numbers, which are held by tensors (`TensorContext`) or registers (`tape.Tape`)."""

    u, relative, infinity, exp_max = U, elementary.RELATIVE, math.inf, 709.0
    exp_relative, sin_max = elementary.EXP_RELATIVE, elementary.SIN_MAX

    @property
    def pi(self) -> Ball:
        return Ball(math.pi, self.u, 0, self)

    @property
    def ln2(self) -> Ball:
        return Ball(0.6931471805599453, self.u, 0, self)

    @property
    def ln10(self) -> Ball:
        return Ball(2.302585092994046, self.u, 0, self)

    atan, lgamma, digamma, trigamma = (
        special.atan,
        special.lgamma,
        special.digamma,
        special.trigamma,
    )
    stirling = special.BINARY64

    def number(self, x: Number) -> float:
        return float(x)

    def sum(self, x: Ball) -> Ball:
        """Add up the last axis, which is kept with length 1."""
        rad = (self._gamma(x.mid) + x.rel) * self._total(abs(x.mid), x.mid)
        if not x._relative:
            rad = rad + self._total(x.rad, x.mid)
        return Ball(self._total(x.mid, x.mid), 0, rad, self)

    def difference(self, x: Ball, y: Ball) -> Ball:
        """x - y of exact numbers, with radius 0 where it is exact: TwoSum's error is the bound."""
        s, t = self._two_sum(x.mid, -y.mid)
        return Ball(s, 0, abs(t), self)

    def max(self, x: Ball) -> Ball:
        """The largest of exact numbers over the last axis, which is kept with length 1."""
        return self.exact(self._largest(x.mid))

    def ball(self, mid: Any, rad: Any) -> Ball:
        """Return a ball with an absolute radius."""
        return Ball(mid, 0, rad, self)

    def total(self, x: Any) -> Any:
        """The sum of midpoints over the last axis, where it is exact."""
        return self._total(x, x)

    _gamma: Callable[[Any], float]  # bound of the relative error of a sum over a row
    _total: Callable[
        [Any, Any], Any
    ]  # (x, like): the sum of a row of x, broadcast to like's length
    _largest: Callable[[Any], Any]  # the largest number of a row
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

    def _has_sin(self, x: Any) -> Any:
        return (abs(x) <= self.sin_max) | (x.float() == x)

    @staticmethod
    def _total(x: Any, like: Any) -> Any:
        # + 0.0: otherwise the sign of a sum of -0's would depend on its order
        return x.expand_as(like).sum(-1, keepdim=True) + 0.0

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):  # a condition on a constant
            return x if condition else y
        if not (isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor)):
            # torch.where makes the default dtype of two numbers
            x = torch.full((), x, dtype=torch.float64, device=condition.device)
        return torch.where(condition, x, y)

    def plus(self, x: Ball, y: Ball) -> Ball:
        """x + y, the last step of a formula in which y may be much smaller than x.

        If x + y rounds to a midpoint of the target in binary64, the sign of TwoSum's error is the side of
        the midpoint on which x + y lies. No other midpoint is within an ulp of binary64, so every number on
        that side rounds like the exact one.
        """
        s, t = two_sum(x.mid, y.mid)
        error = x.error + y.error
        toward = torch.nextafter(s, torch.where(t > 0, torch.inf, -torch.inf).to(s))
        half = 1 << 53 - target().precision >> 1
        is_midpoint = (s.contiguous().view(torch.int64) & (2 * half - 1)) == half
        sided = is_midpoint & (t.abs() > error)
        sided &= (
            t.abs() > 2.0**-900 * s.abs()
        )  # smaller terms may count as zero: see evaluate._BITS
        rad = torch.where(sided, 0.0, t.abs() + error)
        return Ball(torch.where(sided, toward, s), 0, rad, self)


# The rational point of each function, and its value there. There is no other (Lindemann-Weierstrass); for
# erf, erfc and erfinv no other is known.
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
    "atan": (0, Fraction(0)),
}


class MultiPrecisionContext(BallContext):
    """Balls on numpy arrays of mpmath numbers with `bits` binary digits."""

    exp_max = sin_max = None  # mpmath's exponents are unbounded, its reduction has no limit

    def __init__(self, bits: int) -> None:
        import mpmath  # imported here because few elements need it

        self.mp = mpmath.MPContext()
        self.mp.prec = bits
        self.u = self.mp.ldexp(1, 1 - bits)
        self.relative = self.exp_relative = 16 * self.u  # mpmath guarantees less than an ulp
        self.infinity = self.mp.inf
        for name in _TRANSCENDENTAL:
            if name not in ("tanh", "sigmoid"):  # these are compositions
                setattr(self, f"_{name}", np.frompyfunc(getattr(self.mp, name), 1, 1))
        # mpmath cannot compute erfc beyond 2^32. From 2^20 on it is below 2^-(2^40), or as near to 2.
        far = self.mp.mpf(2**20)
        self._erfc = np.frompyfunc(lambda x: self.mp.erfc(max(min(x, far), -far)), 1, 1)

    @property
    def pi(self) -> Ball:
        return Ball(+self.mp.pi, self.u, 0, self)

    @property
    def ln2(self) -> Ball:
        return Ball(+self.mp.ln2, self.u, 0, self)

    @property
    def ln10(self) -> Ball:
        return Ball(+self.mp.ln10, self.u, 0, self)

    _atan: Callable[[Any], Any]

    def atan(self, x: Ball) -> Ball:
        return Ball(self._atan(x.mid), self.relative, x.error, self)  # no slope exceeds 1

    def lgamma(self, x: Ball) -> Ball:
        """The operand of this function and its derivatives must be an exact number."""
        return self._with_twice_the_bits(self._lgamma, x)

    def digamma(self, x: Ball) -> Ball:
        return self._with_twice_the_bits(lambda x: self.mp.psi(0, x), x)

    def trigamma(self, x: Ball) -> Ball:
        return self._with_twice_the_bits(lambda x: polygamma(self.mp, 1, x), x)

    def _lgamma(self, x: Any) -> Any:
        if x > 0:
            return self.mp.loggamma(x)
        return self.mp.log(self.mp.pi / abs(self.mp.sinpi(x))) - self.mp.loggamma(1 - x)

    def _with_twice_the_bits(self, function: Callable[[Any], Any], x: Ball) -> Ball:
        """Evaluate a function that may cancel near its zeros, of which no other binary32 number is one."""
        with self.mp.workprec(2 * self.mp.prec + 200):
            values = np.frompyfunc(function, 1, 1)(x.mid)
        return Ball(values, self.relative, 0, self)

    def number(self, x: Number) -> Any:
        x = Fraction(x)
        return self.mp.mpf(x.numerator) / x.denominator

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        return np.where(condition, x, y)

    def sum(self, x: Ball) -> Ball:
        n = x.mid.shape[-1]
        rad = np.sum(abs(x.mid), -1, keepdims=True) * (2 * n * self.u + x.rel)
        if not x._relative:
            rad = rad + np.sum(np.broadcast_to(x.rad, x.mid.shape), -1, keepdims=True)
        return Ball(np.sum(x.mid, -1, keepdims=True), 0, rad, self)

    def difference(self, x: Ball, y: Ball) -> Ball:
        return x - y

    def plus(self, x: Ball, y: Ball) -> Ball:
        return x + y

    def max(self, x: Ball) -> Ball:
        return self.exact(np.max(x.mid, -1, keepdims=True))


def polygamma(mp: Any, n: int, x: Any) -> Any:
    """Return the n-th derivative of digamma in mpmath's numbers, for n > 0, but not at a pole.

    mpmath steps from numbers far below 0 to 0; reflection takes as long for each. Source: NIST Digital
    Library of Mathematical Functions, 5.15.6.
    """
    if x > 0:
        return mp.psi(n, x)
    with mp.workprec(2 * mp.prec):  # the difference has zeros for even n
        cot = mp.cospi(x) / mp.sinpi(x)
        derivative = mp.pi ** (n + 1) * mp.polyval(derivative_of_cot(n), cot)
        return (-1) ** n * mp.psi(n, 1 - x) - derivative


@lru_cache(maxsize=16)
def derivative_of_cot(n: int) -> list[int]:
    """Return the n-th derivative of cot as a polynomial of cot, highest power first.

    All signs agree, and every second coefficient is 0."""
    p = [1, 0]
    for _ in range(n):  # that of cot^k is -k cot^(k - 1) (1 + cot^2)
        slope = [-k * c for k, c in zip(range(len(p) - 1, 0, -1), p)]
        p = [a + b for a, b in zip([*slope, 0, 0], [0, 0, *slope])]
    return p


class Irrational(ArithmeticError):
    """A value that is not known to be rational, so fractions cannot represent it."""


def _only_at(at: int, value: Fraction) -> Any:
    def function(x: Fraction) -> Fraction:
        if x != at:
            raise Irrational
        return value

    return np.frompyfunc(function, 1, 1)


def _irrational(self: Any, x: Any) -> Any:
    raise Irrational


def _log_of_gamma(x: Fraction) -> Fraction:
    if x not in (1, 2):
        raise Irrational
    return Fraction(0)


def _square_root(x: Fraction) -> Fraction:
    n, d = x.numerator, x.denominator
    if x < 0 or isqrt(n) ** 2 != n or isqrt(d) ** 2 != d:
        raise Irrational
    return Fraction(isqrt(n), isqrt(d))


def _sinpi_shifted(quarter: int) -> Any:
    """Return the function sin(pi (x + quarter / 2)), for x that are multiples of 1/2."""

    def function(x: Fraction) -> Fraction:
        if (2 * x).denominator != 1:
            raise Irrational
        return Fraction((0, 1, 0, -1)[(int(2 * x) + quarter) % 4])

    return np.frompyfunc(function, 1, 1)


class RationalContext:
    """Exact arithmetic on `Rationals`. Raises `Irrational` for a value that has none."""

    def __init__(self) -> None:
        for name, (at, value) in _TRANSCENDENTAL.items():
            setattr(self, name, _on_fractions(_only_at(at, value)))
        self.sqrt = _on_fractions(np.frompyfunc(_square_root, 1, 1))
        self.sinpi, self.cospi = (_on_fractions(_sinpi_shifted(n)) for n in (0, 1))
        self.lgamma = _on_fractions(np.frompyfunc(_log_of_gamma, 1, 1))

    @property
    def pi(self) -> Any:
        raise Irrational

    ln2 = ln10 = pi
    digamma = trigamma = _irrational

    constant = Fraction

    @staticmethod
    def choose(condition: Any, x: Any, y: Any) -> Any:
        x = x if isinstance(x, Rationals) else Rationals(x.numerator, x.denominator)
        n, m, d, exponent = x._aligned(y)
        return Rationals(np.where(condition, np.asarray(n, object), m), d, exponent)

    where = choose

    @staticmethod
    def sum(x: Any) -> Any:
        if isinstance(x.d, int):
            return Rationals(np.sum(x.n, -1, keepdims=True), x.d, x.exponent)
        return Rationals.of_fractions(np.sum(x.fractions(), -1, keepdims=True))

    @staticmethod
    def difference(x: Any, y: Any) -> Any:
        return x - y

    @staticmethod
    def plus(x: Any, y: Any) -> Any:
        return x + y

    @staticmethod
    def max(x: Any) -> Any:
        return Rationals.of_fractions(np.max(x.fractions(), -1, keepdims=True))


def _on_fractions(function: Any) -> Any:
    def on_rationals(x: Any) -> Rationals:
        return Rationals.of_fractions(function(x.fractions() if isinstance(x, Rationals) else x))

    return on_rationals
