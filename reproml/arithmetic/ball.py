"""Real numbers with an error bound, on which the definition of an operator is written once.

A definition is a Python function of real numbers, `formula(k, x, y, ...)`, written with + - * / and
the functions of the field k (`k.exp(x)`, `k.sum(x)` over the last axis, ...). Three fields evaluate it:

- `Binary64`, whole tensors at once: each number is a ball, a float64 centre and a bound of its error;
- `Rational`, one row at a time: exact, as long as nothing transcendental comes up;
- `MultiPrecision`, one row at a time: balls again, on mpmath's numbers of any length.

`elementwise` and `rowwise` evaluate it in the first field, put Ziv's rounding test to the result and
take the rare elements that fail to the second and third. So each output is rounded once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from math import isqrt
from typing import Any, Callable, Union

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic import elementary
from reproml.arithmetic.rounding import U, gamma, nearest, settle, two_sum

Number = Union[int, Fraction]
Formula = Callable[..., Any]


class Ball:
    """All real numbers v with |v - c| <= r |c| + e, elementwise.

    c: the centre. r: a Python number, the relative bound, which products and quotients pass on for
    nothing. e: the absolute bound, of c's shape, or a Python 0 where there is none.
    """

    __slots__ = ("c", "r", "e", "k")
    __array_ufunc__ = None  # numpy leaves mixed operations to this class

    def __init__(self, c: Any, r: Any, e: Any, k: Any) -> None:
        self.c, self.r, self.e, self.k = c, r, e, k

    @property
    def error(self) -> Any:
        """The absolute bound, a Python 0 for an exact number."""
        return self.e if isinstance(self.r, int) else self.r * abs(self.c) + self.e

    @property
    def _relative(self) -> bool:
        return isinstance(self.e, int)

    def _lift(self, other: Union[Ball, Number]) -> Ball:
        return other if isinstance(other, Ball) else self.k.constant(other)

    def __add__(self, other: Union[Ball, Number]) -> Ball:
        other = self._lift(other)
        return Ball(self.c + other.c, self.k.u, self.error + other.error, self.k)

    def __mul__(self, other: Union[Ball, Number]) -> Ball:
        other = self._lift(other)
        c, k = self.c * other.c, self.k
        if self._relative and other._relative:
            return Ball(c, k.passed(self.r, other.r), 0, k)
        d, other_d = self.error, other.error
        return Ball(c, k.u, d * (abs(other.c) + other_d) + other_d * abs(self.c), k)

    def __truediv__(self, other: Union[Ball, Number]) -> Ball:
        other = self._lift(other)
        c, k = self.c / other.c, self.k
        if self._relative and other._relative:
            return Ball(c, k.passed(self.r, other.r), 0, k)
        d, other_d = self.error, other.error
        low = abs(other.c) - other_d  # |a/b - c| <= (da + |c| db) / (|b| - db)
        return Ball(c, k.u, k.where(low > 0, (d + abs(c) * other_d) / low, k.infinity), k)

    def __neg__(self) -> Ball:
        return Ball(-self.c, self.r, self.e, self.k)

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
        return self.c < other

    def __abs__(self) -> Ball:
        return Ball(abs(self.c), self.r, self.e, self.k)


class _BallField:
    """What the two fields of balls have in common: how errors pass through a function."""

    u: Any
    relative: Any
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
        c, d = self._exp(x.c), x.error
        e = self.where(x.c <= self.exp_max, 0.0, self.infinity) if self.exp_max else 0
        if not isinstance(d, int):  # exp(d) - 1 <= 2 d for d <= 1
            e = e + self.where(d <= 1, 2 * c * d, self.infinity)
        return Ball(c, self.relative, e, self)

    def log(self, x: Ball) -> Ball:
        c, d = self._log(x.c), x.error
        if isinstance(d, int):
            return Ball(c, self.relative, 0, self)
        low = x.c - d
        return Ball(c, self.relative, self.where(low > 0, d / low, self.infinity), self)

    def sqrt(self, x: Ball) -> Ball:
        c = self._sqrt(x.c)
        if x._relative:  # sqrt(1 + r) <= 1 + r / 2, sqrt(1 - r) >= 1 - r
            return Ball(c, self.passed(x.r, self.relative), 0, self)
        d = x.error  # |sqrt(a + d) - sqrt(a)| <= d / sqrt(a), also <= sqrt(d)
        e = self.where(d < x.c, d / self.where(c == 0, 1, c), self._sqrt(d) + c)
        return Ball(c, self.relative, e, self)

    def tanh(self, x: Ball) -> Ball:
        """-t / (2 + t) with t = exp(-2 |x|) - 1, so that nothing cancels; and x's sign."""
        t = self.expm1(-2 * abs(x))
        y = -t / (2 + t)
        return self.choose(x < 0, -y, y)

    def sigmoid(self, x: Ball) -> Ball:
        """1 / (1 + t) or t / (1 + t) with t = exp(-|x|)."""
        t = self.exp(-abs(x))
        return self.choose(x < 0, t, self.exact(t.c * 0 + 1)) / (1 + t)

    def choose(self, condition: Any, x: Ball, y: Ball) -> Ball:
        """x where the condition on exact numbers holds, else y. Neither may divide by zero."""
        c = self.where(condition, x.c, y.c)
        if x._relative and y._relative:
            return Ball(c, max(x.r, y.r), 0, self)
        return Ball(c, 0, self.where(condition, x.error + 0 * c, y.error + 0 * c), self)

    def expm1(self, x: Ball) -> Ball:
        c, d = self._expm1(x.c), x.error
        if isinstance(d, int):
            e = self.where(x.c <= self.exp_max, 0.0, self.infinity) if self.exp_max else 0
        else:  # the derivative is 1 + expm1
            e = self.where((d <= 1) & (x.c <= 700), 2 * (1 + abs(c)) * d, self.infinity)
        return Ball(c, self.relative, e, self)

    def log1p(self, x: Ball) -> Ball:
        c, d = self._log1p(x.c), x.error
        if isinstance(d, int):
            return Ball(c, self.relative, 0, self)
        low = 1 + x.c - d
        return Ball(c, self.relative, self.where(low > 0, 2 * d / low, self.infinity), self)

    def sin(self, x: Ball) -> Ball:
        return self._periodic(self._sin(x.c), x)

    def cos(self, x: Ball) -> Ball:
        return self._periodic(self._cos(x.c), x)

    def _periodic(self, c: Any, x: Ball) -> Ball:
        e = x.error  # no derivative exceeds 1
        if self.sin_max:
            e = e + self.where(abs(x.c) <= self.sin_max, 0.0, self.infinity)
        return Ball(c, self.relative, e, self)

    def sinpi(self, x: Ball) -> Ball:
        return Ball(self._sinpi(x.c), self.relative, 4 * x.error, self)

    def cospi(self, x: Ball) -> Ball:
        return Ball(self._cospi(x.c), self.relative, 4 * x.error, self)

    def erf(self, x: Ball) -> Ball:
        return Ball(self._erf(x.c), self.relative, 2 * x.error, self)

    def erfc(self, x: Ball) -> Ball:
        c, d = self._erfc(x.c), x.error
        e: Any = 0
        if self.exp_max:  # beyond 11 only 0 < erfc(x) < exp(-x^2)
            far = x.c > 11
            c, e = self.where(far, 0.0, c), self.where(far, self._exp(-(x.c * x.c)), 0.0)
        if not isinstance(d, int):  # |erfc'| <= 1.13 exp(-t^2), t the end of the ball next to 0
            t = abs(x.c) - d
            t = self.where(t > 0, t, 0 * t)
            e = e + 2 * d * self._exp(-(t * t))
        return Ball(c, self.relative, e, self)

    def erfinv(self, x: Ball) -> Ball:
        """Of an exact number."""
        return Ball(self._erfinv(x.c), self.relative, 0, self)

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


class Binary64(_BallField):
    """Balls on float64 tensors."""

    u, relative, infinity, exp_max = U, elementary.RELATIVE, torch.inf, 709.0
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
    sin_max = elementary.SIN_MAX

    @staticmethod
    def where(condition: Any, x: Any, y: Any) -> Any:
        if isinstance(condition, bool):  # of a constant
            return x if condition else y
        return torch.where(condition, x, y)

    @property
    def pi(self) -> Ball:
        return Ball(math.pi, self.u, 0, self)

    def number(self, x: Number) -> float:
        return float(x)

    def sum(self, x: Ball) -> Ball:
        """Over the last axis, which stays with length 1."""
        e = (gamma(x.c.shape[-1]) + x.r) * x.c.abs().sum(-1, keepdim=True)
        if not x._relative:
            e = e + x.e.expand_as(x.c).sum(-1, keepdim=True)
        # + 0.0: a sum of -0's is 0 in whatever order it was taken
        return Ball(x.c.sum(-1, keepdim=True) + 0.0, 0, e, self)

    def difference(self, x: Ball, y: Ball) -> Ball:
        """x - y of exact numbers, known to be exact where it is (TwoSum's error is the bound)."""
        s, t = two_sum(x.c, -y.c)
        return Ball(s, 0, t.abs(), self)

    def plus(self, x: Ball, y: Ball) -> Ball:
        """x + y, the last step of a formula where y may be far below x.

        If x + y rounds to a midpoint of binary32 in binary64, TwoSum's error tells the side: no other
        midpoint is within an ulp of binary64, so any number on that side rounds like the true one.
        """
        s, t = two_sum(x.c, y.c)
        e = x.error + y.error
        toward = torch.nextafter(s, torch.where(t > 0, torch.inf, -torch.inf).to(s))
        sided = ((s.contiguous().view(torch.int64) & 0x1FFFFFFF) == 0x10000000) & (t.abs() > e)
        sided &= t.abs() > 2.0**-900 * s.abs()  # what is smaller may count as zero: see _BITS
        return Ball(torch.where(sided, toward, s), 0, torch.where(sided, 0.0, t.abs() + e), self)

    def max(self, x: Ball) -> Ball:
        """The largest of exact numbers over the last axis, which stays with length 1."""
        return self.exact(x.c.amax(-1, keepdim=True))


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


class MultiPrecision(_BallField):
    """Balls on numpy arrays of mpmath numbers with `bits` binary digits."""

    exp_max = sin_max = None  # mpmath's exponents are unbounded, its reduction has no limit

    def __init__(self, bits: int) -> None:
        import mpmath  # only for the rare elements that come here

        self.mp = mpmath.MPContext()
        self.mp.prec = bits
        self.u = self.mp.ldexp(1, 1 - bits)
        self.relative = 16 * self.u  # mpmath promises less than an ulp
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
        n = x.c.shape[-1]
        e = (2 * n * self.u + x.r) * np.sum(abs(x.c), -1, keepdims=True)
        if not x._relative:
            e = e + np.sum(np.broadcast_to(x.e, x.c.shape), -1, keepdims=True)
        return Ball(np.sum(x.c, -1, keepdims=True), 0, e, self)

    def difference(self, x: Ball, y: Ball) -> Ball:
        return x - y

    def plus(self, x: Ball, y: Ball) -> Ball:
        return x + y

    def max(self, x: Ball) -> Ball:
        return self.exact(np.max(x.c, -1, keepdims=True))


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


class Rational:
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


BINARY64 = Binary64()
# A value that agrees with a midpoint of two binary32 numbers to 1,000 bits is taken to be it. This is
# part of the contract: a term that is 2^-1000 times smaller than the rest counts as zero.
_BITS = (120, 240, 480, 1100)


_lock = threading.Lock()  # mpmath's caches are not made for threads


def exact_values(formula: Formula, operands: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """The correctly rounded values of a formula on finite numbers.

    operands: float64 arrays that broadcast together. Returns a float64 array of binary32 numbers.
    Raises ZeroDivisionError where the formula divides by zero.
    """
    rationals = [_to_fraction(np.atleast_1d(x)) for x in operands]
    try:
        return np.asarray(_nearest(formula(Rational(), *rationals)))
    except Irrational:
        pass
    with _lock:
        return _multi_precision(formula, rationals)


def _multi_precision(formula: Formula, rationals: Sequence[Any]) -> NDArray[Any]:
    for bits in _BITS:
        k = MultiPrecision(bits)
        number = np.frompyfunc(k.number, 1, 1)
        y = formula(k, *[k.exact(number(x)) for x in rationals])
        low, high = (_nearest(_from_mp(end)) for end in (y.c - y.error, y.c + y.error))
        same = (low == high) & (np.signbit(low) == np.signbit(high))
        if same.all():
            return np.asarray(high)
    return np.where(same, high, _nearest(_snap(_from_mp(y.c))))


def _mp_to_fraction(x: Any) -> Fraction:
    """A mpmath number as a fraction; what is out of binary32's range may stay anywhere out of it."""
    sign, mantissa, exponent, bits = x._mpf_
    if not mantissa and exponent:  # infinite
        exponent, mantissa = 2000, 1
    exponent = min(max(exponent, -2000 - bits), 2000)
    q = Fraction(int(mantissa)) * Fraction(2) ** int(exponent)
    return -q if sign else q


def _to_60_bits(q: Fraction) -> Fraction:
    """The nearest number of about 60 bits; a midpoint of binary32 has 25."""
    unit = Fraction(2) ** (abs(q.numerator).bit_length() - q.denominator.bit_length() - 60)
    return round(q / unit) * unit


_to_fraction: Any = np.frompyfunc(Fraction, 1, 1)
_from_mp: Any = np.frompyfunc(_mp_to_fraction, 1, 1)
_snap: Any = np.frompyfunc(_to_60_bits, 1, 1)
_nearest: Any = np.vectorize(nearest, otypes=[float])


# Elements at once: the float64 temporaries of a formula stay in a processor's cache.
_CHUNK = 1 << 15


def _wide(x: Union[Tensor, float, int], device: torch.device) -> Tensor:
    return torch.as_tensor(x, device=device).double()


def elementwise(formula: Formula, *operands: Union[Tensor, float, int]) -> Tensor:
    """The formula on each element of operands that broadcast together, rounded once to float32."""
    shape = torch.broadcast_shapes(*[x.shape for x in operands if isinstance(x, Tensor)])
    n = shape.numel()
    device = next(x.device for x in operands if isinstance(x, Tensor))
    if n <= _CHUNK or device.type != "cpu":
        return _elementwise(formula, *operands)
    result = torch.empty(n, dtype=torch.float32, device=device)
    flat = [
        x.expand(shape).reshape(-1) if isinstance(x, Tensor) and x.numel() > 1 else x
        for x in operands
    ]
    for at in range(0, n, _CHUNK):
        part = slice(at, at + _CHUNK)
        chunk = [x[part] if isinstance(x, Tensor) and x.numel() == n else x for x in flat]
        result[part] = _elementwise(formula, *chunk).reshape(-1)
    return result.reshape(shape)


def _elementwise(formula: Formula, *operands: Union[Tensor, float, int]) -> Tensor:
    device = next(x.device for x in operands if isinstance(x, Tensor))
    wide = [_wide(x, device) for x in operands]
    y = formula(BINARY64, *[BINARY64.exact(x) for x in wide])
    shape = torch.broadcast_shapes(*[x.shape for x in wide])
    if not shape:
        return _elementwise(formula, *[x.reshape(1) for x in wide]).reshape(())

    def value(row: NDArray[Any], c: float) -> float:
        if not np.isfinite(row).all():
            return c  # a limit: nothing to round
        exact = float(exact_values(formula, list(row))[0])
        # An exact zero has the sign that IEEE arithmetic gives it step by step, where it gives 0.
        return c if c == 0 and exact == 0 and not np.signbit(exact) else exact

    def resolve(index: Tensor) -> list[float]:
        where = torch.unravel_index(index, shape)
        rows = torch.stack([x.expand(shape)[where] for x in wide], 1).cpu().numpy()
        return [value(row, c) for row, c in zip(rows, y.c.expand(shape)[where].tolist())]

    return settle(y.c.expand(shape), _wide(y.error, device).expand(shape), resolve)


def rowwise(formula: Formula, dim: int, *operands: Tensor) -> Tensor:
    """The formula on each row along `dim`, of operands that broadcast, rounded once to float32.

    The formula gives a value for each element of the row, or one for each row (then `dim` has
    length 1 in the result).
    """
    operands = torch.broadcast_tensors(*[x.double() for x in operands])
    wide = [torch.atleast_1d(x).movedim(dim, -1) for x in operands]
    y = formula(BINARY64, *[BINARY64.exact(x) for x in wide])
    n = y.c.shape[-1]

    def resolve(index: Tensor) -> list[float]:
        rows, row_of = torch.unique(index // n, return_inverse=True)
        picked = torch.stack([x.reshape(-1, x.shape[-1])[rows] for x in wide], 1).cpu().numpy()
        centre = y.c.reshape(-1, n)[rows].cpu().numpy()
        # A row with an infinity has a limit for its value: nothing to round.
        values = [
            exact_values(formula, list(row)) if np.isfinite(row).all() else c
            for row, c in zip(picked, centre)
        ]
        picks = row_of.cpu().numpy(), (index % n).cpu().numpy()
        return list(np.stack(values)[picks])

    # + 0.0: an exact zero is +0, as the order of a sum may decide its sign natively
    result = settle(y.c + 0.0, y.error, resolve).movedim(-1, dim)
    return result if operands[0].dim() else result.reshape(())
