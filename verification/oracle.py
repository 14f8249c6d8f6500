"""An exact oracle that shares no code with reproml.arithmetic.

`Real` is a real number: a fraction as long as it is rational, otherwise an mpmath number of 1,200 bits. It
also represents the infinities, NaN, and the sign that IEEE 754 gives an exact zero, step by step. `bits_of`
rounds it once to a dtype, with integers. `check` compares an operator's result with it bit by bit; all
NaNs are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Callable

import mpmath
import numpy as np
import torch

mp = mpmath.MPContext()
mp.prec = 1200
INF, NAN = mp.inf, mp.nan


class Real:
    __slots__ = ("v", "minus")

    def __init__(self, v: Any, minus: bool = False) -> None:
        """
        v: a Python number, a fraction or an mpmath number. minus: whether a zero is negative.
        """
        if isinstance(v, float):
            minus = math.copysign(1, v) < 0
            v = Fraction(v) if math.isfinite(v) else mp.mpf(v)
        elif isinstance(v, int) or (isinstance(v, mp.mpf) and v == 0):
            v = Fraction(int(v))
        self.v: Any = v
        self.minus: bool = minus if v == 0 else bool(v < 0)

    @property
    def mpf(self) -> Any:
        v = self.v
        return mp.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v

    @property
    def finite(self) -> bool:
        return isinstance(self.v, Fraction) or bool(mp.isfinite(self.v))

    def __add__(self, other: Any) -> Real:
        other = real(other)
        return Real(_do(lambda a, b: a + b, self, other), self.minus and other.minus)

    def __mul__(self, other: Any) -> Real:
        other = real(other)
        return Real(_do(lambda a, b: a * b, self, other), self.minus != other.minus)

    def __truediv__(self, other: Any) -> Real:
        other = real(other)
        minus = self.minus != other.minus
        if other.v == 0:
            return Real(NAN if self.v == 0 or self.v != self.v else -INF if minus else INF)
        if other.v in (INF, -INF) and self.finite:
            return Real(0, minus)
        return Real(_do(lambda a, b: a / b, self, other), minus)

    def __neg__(self) -> Real:
        return Real(-self.v, not self.minus)

    def __sub__(self, other: Any) -> Real:
        return self + -real(other)

    def __abs__(self) -> Real:
        return Real(abs(self.v))

    def __radd__(self, other: Any) -> Real:
        return real(other) + self

    def __rsub__(self, other: Any) -> Real:
        return real(other) - self

    def __rmul__(self, other: Any) -> Real:
        return real(other) * self

    def __rtruediv__(self, other: Any) -> Real:
        return real(other) / self

    def __lt__(self, other: Any) -> bool:
        return bool(self.mpf < real(other).mpf)

    def __le__(self, other: Any) -> bool:
        return bool(self.mpf <= real(other).mpf)

    def __gt__(self, other: Any) -> bool:
        return bool(self.mpf > real(other).mpf)

    def __ge__(self, other: Any) -> bool:
        return bool(self.mpf >= real(other).mpf)

    def __repr__(self) -> str:
        return f"Real({'-' if self.v == 0 and self.minus else ''}{mp.nstr(self.mpf, 20)})"


def real(x: Any) -> Real:
    result: Real = x if isinstance(x, Real) else Real(x)
    return result


def _do(operation: Callable[[Any, Any], Any], a: Real, b: Real) -> Any:
    if isinstance(a.v, Fraction) and isinstance(b.v, Fraction):
        return operation(a.v, b.v)
    return operation(a.mpf, b.mpf)


def _function(
    f: Callable[[Any], Any], at_zero: Any, high: Any, low: Any, odd: bool = False
) -> Callable[[Any], Any]:
    """Return a function on `Real` from one on mpmath numbers, its exact value at 0, and its limits."""

    def function(x: Any) -> Any:
        x = real(x)
        if x.v != x.v:
            return x
        if x.v == 0:
            return Real(0, x.minus) if odd else Real(at_zero)
        if not x.finite:
            return real(high if x.v > 0 else low)
        return Real(f(x.mpf))

    return function


def _erfc(x: Any) -> Any:
    """Return erfc, which mpmath does not compute beyond 2^32: there it is below 2^-(2^64), or near 2."""
    return mp.erfc(x) if abs(x) < 2**32 else mp.ldexp(1, -(2**64)) if x > 0 else 2 - mp.eps


exp = _function(mp.exp, 1, INF, 0)
expm1 = _function(mp.expm1, 0, INF, -1, odd=True)
sin = _function(mp.sin, 0, NAN, NAN, odd=True)
cos = _function(mp.cos, 1, NAN, NAN)
tanh = _function(mp.tanh, 0, 1, -1, odd=True)
erf = _function(mp.erf, 0, 1, -1, odd=True)
erfc = _function(_erfc, 1, 0, 2)
sigmoid = _function(lambda x: 1 / (1 + mp.exp(-x)), Fraction(1, 2), 1, 0)


def log(x: Any) -> Any:
    x = real(x)
    if x.v == 0:
        return Real(-INF)
    if x.v < 0:
        return Real(NAN)
    return Real(0) if x.v == 1 else Real(mp.log(x.mpf))


def log1p(x: Any) -> Any:
    x = real(x)
    if x.v == 0 or x.v == INF or x.v <= -1 or x.v != x.v:
        return x if x.v == 0 else log(x + 1)
    return Real(mp.log1p(x.mpf))


def sqrt(x: Any) -> Any:
    x = real(x)
    if x.v == 0:
        return x
    if x.v < 0:
        return Real(NAN)
    if isinstance(x.v, Fraction):
        n, d = math.isqrt(x.v.numerator), math.isqrt(x.v.denominator)
        if (n * n, d * d) == (x.v.numerator, x.v.denominator):
            return Real(Fraction(n, d))
    return Real(mp.sqrt(x.mpf))


def erfinv(x: Any) -> Any:
    x = real(x)
    if x.v == 0:
        return x
    if not abs(x) < 1:
        return Real(x.v * INF) if abs(x.v) == 1 else Real(NAN)
    # A step of Newton's method doubles the digits, and mpmath's value is precise to 53 bits or more.
    y = mp.erfinv(x.mpf)
    return Real(y - (mp.erf(y) - x.mpf) * mp.sqrt(mp.pi) / 2 * mp.exp(y * y))


def softplus(x: Any) -> Any:
    x = real(x)
    return (x if x > 0 else Real(0)) + log1p(exp(-abs(x))) if x.v == x.v else x


def total(terms: Any) -> Real:
    """Return the sum of the terms; an exact zero is +0."""
    result = Real(0)
    for term in np.asarray(terms, dtype=object).ravel():
        result = result + term
    return result


def dot(a: Any, b: Any) -> Real:
    return total([x * y for x, y in zip(np.ravel(a), np.ravel(b))])


def float32_scalar(x: float) -> Real:
    """Return a Python number as PyTorch rounds it where it meets a float32 tensor.

    Beside a float64 tensor it is exact.
    """
    return Real(float(x) if target is torch.float64 else struct_float32(x))


def struct_float32(x: float) -> float:
    return float(np.float64(x).astype(np.float32))


# ---- rounding ------------------------------------------------------------------------------------

# Precision in bits, exponent of the smallest number, exponent of the first power of two that is too large,
# and the integer dtypes of PyTorch and NumPy of the same width.
FORMATS: dict[torch.dtype, tuple[Any, ...]] = {
    torch.float32: (24, -149, 128, torch.int32, np.uint32, np.float32),
    torch.float64: (53, -1074, 1024, torch.int64, np.uint64, np.float64),
    torch.float16: (11, -24, 16, torch.int16, np.uint16, np.float16),
    torch.bfloat16: (8, -133, 128, torch.int16, np.uint16, None),
}
target = torch.float32  # the dtype to which `check` and `rounded` round


@contextmanager
def rounding_to(dtype: torch.dtype) -> Iterator[None]:
    """Round to this dtype within the block."""
    global target
    before, target = target, dtype
    try:
        yield
    finally:
        target = before


def bits_of(x: Real, dtype: Any = None) -> int:
    """Return the bit pattern of the nearest number of a dtype, ties to even; -1 for NaN."""
    precision, lowest, top, *_ = FORMATS[dtype or target]
    v = x.v
    infinity: int = (top - lowest - precision + 2) << (precision - 1)
    sign: int = (infinity + (1 << (precision - 1))) * x.minus  # the bit above the largest exponent
    if isinstance(v, Fraction):
        # v = m 2^e with a sticky last bit, 64 bits long or exact
        n, d = abs(v.numerator), v.denominator
        e = n.bit_length() - d.bit_length() - 64
        m, rest = divmod(n << max(-e, 0), d << max(e, 0))
        m, e = 2 * m + (rest != 0), e - 1
    elif v != v:
        return -1
    elif not mp.isfinite(v):
        return sign | infinity
    else:
        _, m, e, _ = v._mpf_
        m, e = int(m), int(e)
    if m == 0 or m.bit_length() + e < lowest - 11:
        return sign
    if m.bit_length() + e > top + 72:
        return sign | infinity
    last = max(m.bit_length() + e - precision, lowest)  # exponent of the last place
    if last <= e:
        q = m << (e - last)
    else:
        q, rest, half = m >> (last - e), m & ((1 << (last - e)) - 1), 1 << (last - e - 1)
        q += rest > half or (rest == half and q & 1)
    # q has the hidden bit, which adds 1 to the exponent field; a subnormal number has neither
    magnitude: int = min(q + ((last - lowest) << (precision - 1)), infinity)
    return sign | magnitude


def float_of(x: Real, dtype: Any = None) -> float:
    """Return the nearest number of a dtype as a Python float."""
    return float_with(bits_of(x, dtype), dtype or target)


def float_with(bits: int, dtype: Any) -> float:
    """Return the number of a dtype with this bit pattern as a Python float."""
    if dtype is torch.bfloat16:
        bits, dtype = bits << 16 if bits >= 0 else bits, torch.float32
    integer, number = FORMATS[dtype][4:]
    return math.nan if bits < 0 else float(np.array(bits, integer).view(number))


def rounded(x: Any) -> Any:
    """Round a `Real`, or an array of them, to the target."""
    if isinstance(x, Real):
        return Real(float_of(x))
    return np.vectorize(rounded, otypes=[object])(x) if x.size else x


def reals(x: torch.Tensor) -> Any:
    """Convert a tensor to an array of `Real`."""
    array = x.detach().double().numpy()
    out = np.empty(array.shape, dtype=object)
    for i in np.ndindex(array.shape):
        out[i] = Real(float(array[i]))
    return out


def bits_of_tensor(x: torch.Tensor) -> list[int]:
    values = x.detach().contiguous().reshape(-1)
    patterns = values.view(FORMATS[x.dtype][3]).tolist()
    mask = (1 << 8 * x.element_size()) - 1
    return [-1 if n else b & mask for b, n in zip(patterns, values.isnan().tolist())]


def check(actual: torch.Tensor, expected: Any, any_zero: bool = False) -> None:
    """Assert that the tensor is the array of `Real` rounded once, to the last bit and the sign of zero.

    any_zero: an exact zero may have either sign.
    """
    expected = np.asarray(expected, dtype=object)
    assert tuple(actual.shape) == expected.shape, (tuple(actual.shape), expected.shape)
    assert actual.dtype is target, actual.dtype
    found, wanted = bits_of_tensor(actual), [bits_of(real(x)) for x in expected.ravel()]
    sign = 1 << (8 * actual.element_size() - 1)
    for i, (f, w) in enumerate(zip(found, wanted)):
        zero = any_zero and real(expected.ravel()[i]).v == 0 and f in (0, sign)
        if f != w and not zero:
            at = np.unravel_index(i, expected.shape)
            value = actual.detach().contiguous().reshape(-1)[i].item()
            raise AssertionError(
                f"element {tuple(map(int, at))}: found {value!r} ({f:#x}), "
                f"exact {expected.ravel()[i]!r} ({w:#x})"
            )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if a.dtype in FORMATS:
        return bits_of_tensor(a) == bits_of_tensor(b)
    return torch.equal(a, b)
