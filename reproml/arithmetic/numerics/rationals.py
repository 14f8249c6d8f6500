"""Exact arithmetic on arrays of rational numbers.

A formula on binary32 numbers that fails the rounding test in an entire tensor, as a gradient that cancels
does, is computed on these. Fractions would be reduced after every operation; here integers are multiplied.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Union

import numpy as np
import torch

from reproml.arithmetic.numerics.formats import BINARY64, narrow, target
from reproml.arithmetic.numerics.rounding import nearest

Number = Union[int, Fraction]


class Rationals:
    """An array of rational numbers n * 2**exponent / d, not reduced.

    n, d: numpy arrays of Python integers, which broadcast, or one integer; d > 0. Sums and products of
    binary32 numbers have d = 1, so that their arithmetic is that of integers.
    """

    __slots__ = ("n", "d", "exponent")
    __array_ufunc__ = None  # numpy leaves mixed operations to this class

    def __init__(self, n: Any, d: Any = 1, exponent: int = 0) -> None:
        self.n, self.d, self.exponent = n, d, exponent

    @classmethod
    def of_floats(cls, x: Any) -> Rationals:
        """Return finite float64 numbers."""
        fraction, exponents = np.frexp(np.atleast_1d(x))
        n = np.ldexp(fraction, 53).astype(np.int64)
        together = int(np.bitwise_or.reduce(n, axis=None))
        if not together:
            return cls(n.astype(object))
        zeros = (together & -together).bit_length() - 1  # at the end of each
        exponents = np.where(n == 0, exponents.max(), exponents)
        lowest = int(exponents.min())
        n = (n >> zeros).astype(object)
        if (exponents > lowest).any():
            n = n << (exponents - lowest).astype(object)
        return cls(n, 1, lowest + zeros - 53)

    @classmethod
    def of_fractions(cls, x: Any) -> Rationals:
        return cls(_numerator(x), _denominator(x))

    def fractions(self) -> Any:
        """Return a numpy array of fractions."""
        scale = Fraction(2) ** self.exponent
        return _fraction(np.atleast_1d(self.n), self.d) * scale

    def total(self) -> Fraction:
        """Return the sum of all numbers, which have the denominator 1."""
        return Fraction(int(np.sum(self.n))) * Fraction(2) ** self.exponent

    def nearest(self) -> Any:
        """Return the nearest numbers of the target format, as float64; infinity on overflow."""
        if target() is BINARY64:
            return _nearest(self.fractions()).astype(np.float64)
        with np.errstate(over="ignore", under="ignore"):
            odd = _odd(np.atleast_1d(self.n), self.d, self.exponent).astype(np.float64)
        return narrow(torch.from_numpy(odd)).double().numpy()

    def __getitem__(self, at: Any) -> Rationals:
        if isinstance(self.d, int):
            return Rationals(self.n[at], self.d, self.exponent)
        n, d = np.broadcast_arrays(self.n, self.d)
        return Rationals(n[at], d[at], self.exponent)

    def _lift(self, other: Union[Rationals, Number]) -> Rationals:
        if isinstance(other, Rationals):
            return other
        return Rationals(other.numerator, other.denominator)

    def _aligned(self, other: Union[Rationals, Number]) -> tuple[Any, Any, Any, int]:
        """Return both numerators, their common denominator and the common exponent."""
        other = self._lift(other)
        exponent = min(self.exponent, other.exponent)
        x, y = self.n << (self.exponent - exponent), other.n << (other.exponent - exponent)
        if isinstance(self.d, int) and isinstance(other.d, int) and self.d == other.d:
            return x, y, self.d, exponent
        return x * other.d, y * self.d, self.d * other.d, exponent

    def __add__(self, other: Union[Rationals, Number]) -> Rationals:
        x, y, d, exponent = self._aligned(other)
        return Rationals(x + y, d, exponent)

    def __sub__(self, other: Union[Rationals, Number]) -> Rationals:
        x, y, d, exponent = self._aligned(other)
        return Rationals(x - y, d, exponent)

    def __mul__(self, other: Union[Rationals, Number]) -> Rationals:
        other = self._lift(other)
        return Rationals(self.n * other.n, self.d * other.d, self.exponent + other.exponent)

    def __truediv__(self, other: Union[Rationals, Number]) -> Rationals:
        other = self._lift(other)
        if not np.all(other.n):
            raise ZeroDivisionError
        sign = _sign(other.n)
        n, d = self.n * other.d * sign, self.d * (other.n * sign)
        return Rationals(n, d, self.exponent - other.exponent)

    def __neg__(self) -> Rationals:
        return Rationals(-self.n, self.d, self.exponent)

    def __abs__(self) -> Rationals:
        return Rationals(abs(self.n), self.d, self.exponent)

    def __lt__(self, other: Number) -> Any:
        x, y, _, _ = self._aligned(other)
        return np.asarray(x < y, dtype=bool)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Number) -> Rationals:
        return self._lift(other) - self

    def __rtruediv__(self, other: Number) -> Rationals:
        return self._lift(other) / self


def to_53_bits(n: int, d: int, exponent: int) -> float:
    """Return n * 2**exponent / d rounded to odd, to 53 bits, so that rounding it further rounds it once."""
    q, r = abs(n), 0
    if d != 1:
        places = max(0, 55 + d.bit_length() - q.bit_length())
        q, r = divmod(q << places, d)
        exponent -= places
    excess = q.bit_length() - 53
    if excess > 0:
        lost = q & ((1 << excess) - 1)
        q, exponent = q >> excess, exponent + excess
        r = r or lost
    if r:
        q |= 1
    try:
        value = math.ldexp(q, exponent)
    except OverflowError:
        value = math.inf
    return -value if n < 0 else value


def to_double(n: int, exponent: int) -> float:
    """Return n * 2**exponent rounded once to binary64, ties to even; infinity on overflow.

    Python rounds a quotient of integers once, to a subnormal number as well.
    """
    size = abs(n)
    try:
        if size.bit_length() + exponent < -1100:
            value = 0.0
        else:
            value = (size << min(max(exponent, 0), 1100)) / (1 << max(-exponent, 0))
    except OverflowError:
        value = math.inf
    return -value if n < 0 else value


_sign: Any = np.frompyfunc(lambda n: -1 if n < 0 else 1, 1, 1)
_odd: Any = np.frompyfunc(to_53_bits, 3, 1)
_fraction: Any = np.frompyfunc(Fraction, 2, 1)
_nearest: Any = np.frompyfunc(nearest, 1, 1)
_numerator: Any = np.frompyfunc(lambda x: x.numerator, 1, 1)
_denominator: Any = np.frompyfunc(lambda x: x.denominator, 1, 1)
