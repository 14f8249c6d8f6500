"""The self-test of a machine: every assumption of exact arithmetic, checked on this machine.

The proofs of docs/operators.md start from IEEE 754: +, -, *, / and casts are rounded once, subnormal
numbers are kept, nothing is fused, and the error of a binary64 sum or matrix product is at most gamma_n
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). A broken processor, an
emulator or another BLAS may violate that. `CHECKS` has a line for each assumption; `self_test` runs them.

The oracle computes with integers only: operands are made from their bits and rounded by `nearest`, so that
no floating-point unit checks itself. Each pair of operands is tried in every lane of a vector, in every
thread of the pool and in every memory layout that has its own kernel.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import operator
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from math import isqrt
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.context import exact


class Fault(Exception):
    """An assumption is violated: the operation, its operands, the values expected and found."""

    def __init__(self, operation: str, operands: Sequence[str], expected: str, found: str) -> None:
        super().__init__(
            f"{operation} of {', '.join(operands)}: expected {expected}, found {found}"
        )
        self.operation, self.operands = operation, list(operands)
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Outcome:
    """The result for one assumption. `fault` is None if it holds; then `note` may add a remark."""

    name: str
    note: str = ""
    fault: Optional[Exception] = None

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as JSON, with the operation, operands and values of a Fault."""
        details = vars(self.fault) if isinstance(self.fault, Fault) else {}
        message = None if self.fault is None else str(self.fault)
        return {
            "name": self.name,
            "holds": self.fault is None,
            "note": self.note,
            "fault": message and {"message": message, **details},
        }


def self_test() -> Iterator[Outcome]:
    """Check the assumptions one by one. A violated assumption is an outcome, not an exception."""
    for name, check in CHECKS.items():
        try:
            yield Outcome(name, check() or "")
        except Exception as fault:
            yield Outcome(name, fault=fault)


# --- the oracle: bits, fractions, integers --------------------------------------------------------


class Format(NamedTuple):
    """A binary format of IEEE 754."""

    name: str  # torch's name for it
    integers: str  # torch's name for integers of the same width
    width: int  # bits
    precision: int  # bits of the significand, including the hidden one
    last: int  # subnormal numbers are multiples of 2**last

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def infinity(self) -> int:
        return self.sign - (1 << (self.precision - 1))

    @property
    def nan(self) -> int:
        return self.infinity | 1 << (self.precision - 2)

    @property
    def one(self) -> int:
        return (1 - self.precision - self.last + 1) << (self.precision - 1)


SINGLE = Format("float32", "int32", 32, 24, -149)
DOUBLE = Format("float64", "int64", 64, 53, -1074)


def value(bits: int, fmt: Format) -> Fraction:
    """Return the finite number that has these bits; -0 is 0."""
    high, low = divmod(bits & ~fmt.sign, 1 << (fmt.precision - 1))
    significand = low + (1 << (fmt.precision - 1)) * (high > 0)
    magnitude = Fraction(significand) * Fraction(2) ** (fmt.last + max(high - 1, 0))
    return -magnitude if bits & fmt.sign else magnitude


def nearest(x: Fraction, fmt: Format, negative: bool = False) -> int:
    """Return the bits of the number nearest to x, ties to even; `negative` is the sign if x is 0."""
    if x == 0:
        return fmt.sign * negative
    n, d = abs(x.numerator), x.denominator
    last = max(n.bit_length() - d.bit_length() - fmt.precision, fmt.last)
    while True:
        divisor = d << max(last, 0)
        q, rest = divmod(n << max(-last, 0), divisor)
        if q >> fmt.precision == 0:
            break
        last += 1
    q += 2 * rest > divisor or (2 * rest == divisor and q % 2 == 1)
    # A carry out of the significand increments the exponent.
    bits = min(((last - fmt.last) << (fmt.precision - 1)) + q, fmt.infinity)
    return bits | fmt.sign * (x < 0)


def _square_root(x: Fraction) -> Fraction:
    """Return sqrt(x) to 200 bits, the last one set if it is inexact: the result rounds as sqrt(x) does."""
    n, d = x.numerator, x.denominator
    shift = max(0, 200 - (n.bit_length() - d.bit_length()) // 2)
    root = isqrt((n << 2 * shift) // d)
    inexact = root * root * d != n << 2 * shift
    return Fraction(2 * root + inexact, 1 << (shift + 1))


def _exact_add(a: int, b: int, fmt: Format) -> int:
    both = bool(a & b & fmt.sign)
    return nearest(value(a, fmt) + value(b, fmt), fmt, negative=both)


def _exact_sub(a: int, b: int, fmt: Format) -> int:
    return _exact_add(a, b ^ fmt.sign, fmt)


def _exact_mul(a: int, b: int, fmt: Format) -> int:
    return nearest(value(a, fmt) * value(b, fmt), fmt, bool((a ^ b) & fmt.sign))


def _exact_div(a: int, b: int, fmt: Format) -> int:
    negative = (a ^ b) & fmt.sign
    if value(b, fmt) == 0:
        return fmt.infinity | negative if value(a, fmt) else fmt.nan
    return nearest(value(a, fmt) / value(b, fmt), fmt, bool(negative))


def _exact_sqrt(a: int, fmt: Format) -> int:
    x = value(a, fmt)
    return a if x == 0 else fmt.nan if x < 0 else nearest(_square_root(x), fmt)


# --- operands ------------------------------------------------------------------------------------


@cache
def _specials(fmt: Format) -> list[int]:
    """Return the bits of zeros, subnormal numbers, both ends of the range, and numbers that make ties."""
    one, step = fmt.one, 1 << (fmt.precision - 1)  # the bits of 1; doubling a number adds a step
    half_ulp = one - fmt.precision * step  # half an ulp of 1, so that 1 + half_ulp is a tie
    numbers = [0, 1, 2, 3, step // 2, step - 1, step, step + 1, 2 * step - 1]
    numbers += [half_ulp - 1, half_ulp, half_ulp + 1, half_ulp + step // 2]
    numbers += [one - step, one - 1, one, one + 1, one + 2, one + step // 2, one + step - 1]
    numbers += [one + step, one + step + step // 2, one + (fmt.precision - 1) * step + 1]
    numbers += [fmt.infinity - step, fmt.infinity - 2, fmt.infinity - 1]
    return numbers + [x | fmt.sign for x in numbers]


@cache
def _pairs(fmt: Format) -> list[tuple[int, int]]:
    """Return every pair of `_specials`, then random pairs."""
    draw = random.Random(1)
    step, exponents = fmt.precision - 1, fmt.infinity >> (fmt.precision - 1)

    def number(exponent: int, zeros: int = 0) -> int:
        """Return the bits of a number with a random sign and significand, whose last bits are zero."""
        significand = draw.getrandbits(step) >> zeros << zeros
        return (
            draw.getrandbits(1) * fmt.sign
            | min(max(exponent, 0), exponents - 1) << step
            | significand
        )

    bias, half = exponents // 2, fmt.precision // 2
    pairs = list(itertools.product(_specials(fmt), repeat=2))
    for _ in range(150):
        e = draw.randrange(exponents)
        pairs.append((number(e), number(draw.randrange(exponents))))  # any two numbers
        pairs.append((number(e), number(e + draw.randrange(-3, 4))))  # sums that cancel
        # Sums, then products, that are ties
        pairs.append((number(e), number(e - draw.randrange(1, fmt.precision + 2), step - 2)))
        pairs.append((number(bias, half), number(bias, half - 2)))
        # Products and quotients that are subnormal, and others that overflow
        pairs.append((number(e), number(bias - e + draw.randrange(-fmt.precision, 3))))
        pairs.append((number(e), number(e + bias + draw.randrange(-3, fmt.precision))))
        pairs.append((number(e), number(3 * bias - e + draw.randrange(-2, 3))))
    return _odd_length(pairs)


def _odd_length(operands: list[Any]) -> list[Any]:
    """Return an odd number of them: repeated, each is in each lane of a vector once."""
    return operands[: len(operands) - 1 + len(operands) % 2]


def _tensor(bits: Iterable[int], fmt: Format) -> Tensor:
    signed = [x - 2 * fmt.sign if x & fmt.sign else x for x in bits]
    return torch.tensor(signed, dtype=getattr(torch, fmt.integers)).view(getattr(torch, fmt.name))


def _hexadecimal(bits: int, fmt: Format) -> str:
    """Return the number as C's %a prints it, computed with integers, so that nothing is flushed to 0."""
    sign, bits = "-" * bool(bits & fmt.sign), bits & ~fmt.sign
    if bits >= fmt.infinity:
        return sign + "inf" if bits == fmt.infinity else "nan"
    high, low = divmod(bits, 1 << (fmt.precision - 1))
    digits = -(-(fmt.precision - 1) // 4)
    low <<= 4 * digits - (fmt.precision - 1)
    exponent = max(high, 1) + fmt.last + fmt.precision - 2
    return f"{sign}0x{int(high > 0)}.{low:0{digits}x}p{exponent if bits else 0:+d}"


def _parallel_size() -> int:
    """Return a number of elements for which every thread of the pool has work: 2^15 each, or more."""
    return (torch.get_num_threads() + 1) << 15


class _Case(NamedTuple):
    """Operands, a tuple for each element, and the bits expected of each result."""

    operands: list[tuple[int, ...]]
    expected: list[int]
    operand_format: Format
    result_format: Format


def _expect_bits(name: str, found: Tensor, case: _Case, allow_neighbours: bool = False) -> None:
    """Raise Fault at the first element that differs, or is not even a neighbour of the expected number.

    `found` repeats the case's elements any number of times. All NaNs are equal.
    """
    result_format, period = case.result_format, len(case.expected)
    expected = _tensor(case.expected, result_format).view(getattr(torch, result_format.integers))
    nan = _tensor([result_format.nan], result_format)
    bits = torch.where(found != found, nan, found).view(expected.dtype)
    copies = -(-len(bits) // period)
    expected = expected.repeat(copies)[: len(bits)]
    wrong = bits != expected
    if allow_neighbours:
        wrong &= (bits - 1 != expected) & (bits + 1 != expected)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise Fault(
            f"{name}, element {i} of {len(bits)},",
            [_hexadecimal(x, case.operand_format) for x in case.operands[i % period]],
            _hexadecimal(case.expected[i % period], result_format),
            _hexadecimal(int(bits[i]) % (1 << result_format.width), result_format),
        )


def _check_layouts(
    name: str, function: Callable[..., Tensor], case: _Case, allow_neighbours: bool = False
) -> None:
    """Check `function` on the case as one long vector, with strides, and one element at a time."""
    columns = [_tensor(column, case.operand_format) for column in zip(*case.operands)]
    period = len(case.expected)
    copies = -(-_parallel_size() // period)
    long = [x.repeat(copies) for x in columns]
    _expect_bits(name, function(*long), case, allow_neighbours)
    strided = [torch.stack([x, x], 1)[:, 0] for x in columns]
    _expect_bits(f"{name} with strides", function(*strided), case, allow_neighbours)
    chosen = range(0, period, 16)
    singles = torch.cat([function(*[x[i : i + 1] for x in columns]) for i in chosen])
    few = case._replace(
        operands=[case.operands[i] for i in chosen], expected=[case.expected[i] for i in chosen]
    )
    _expect_bits(f"{name} of single elements", singles, few, allow_neighbours)


# --- the checks: each raises Fault, or returns None or a note ------------------------------------


def _rounded_once(name: str, oracle: Callable[[int, int, Format], int], fmt: Format) -> None:
    function = partial(_call_torch, name)  # looked up at each call
    pairs = _pairs(fmt)
    expected = [oracle(a, b, fmt) for a, b in pairs]
    _check_layouts(f"torch.{name} in {fmt.name}", function, _Case(list(pairs), expected, fmt, fmt))
    specials = _specials(fmt)
    x = _tensor(specials, fmt)
    for j, b in enumerate(specials):  # tensor and number have other kernels
        at = range(j, len(specials) ** 2, len(specials))
        case = _Case([pairs[i] for i in at], [expected[i] for i in at], fmt, fmt)
        number = float(_tensor([b], fmt))
        _expect_bits(f"torch.{name} with a number in {fmt.name}", function(x, number), case)
    if fmt is DOUBLE:
        python = getattr(operator, "truediv" if name == "div" else name)
        keep = [i for i, (_, b) in enumerate(pairs) if name != "div" or value(b, fmt)]
        case = _Case([pairs[i] for i in keep], [expected[i] for i in keep], fmt, fmt)
        floats = [python(_as_float(a), _as_float(b)) for a, b in (pairs[i] for i in keep)]
        found = torch.tensor(floats, dtype=torch.float64)
        _expect_bits(f"{name} of Python's floats", found, case)


def _call_torch(name: str, *args: Any) -> Tensor:
    result: Tensor = getattr(torch, name)(*args)
    return result


def _as_float(bits: int) -> float:
    return float(_tensor([bits], DOUBLE))


def _sqrt() -> None:
    """A binary64 root is the one operation that may be an ulp off, as in vendors' vector libraries.

    The root of a binary32 number is at least 2^-51 away from every midpoint, so it still rounds correctly.
    """
    operands = [x & ~DOUBLE.sign for pair in _pairs(DOUBLE)[-1001:] for x in pair]
    operands = _odd_length([*_specials(DOUBLE), *operands])
    case = _Case(
        [(x,) for x in operands], [_exact_sqrt(x, DOUBLE) for x in operands], DOUBLE, DOUBLE
    )
    _check_layouts(
        "torch.sqrt in float64", partial(_call_torch, "sqrt"), case, allow_neighbours=True
    )


def _narrowing() -> None:
    """Casts to float32 of numbers on and beside the midpoints of neighbours, by PyTorch and by NumPy."""
    import numpy as np

    operands = [*_specials(DOUBLE)]
    drawn = [a for a, _ in _pairs(SINGLE)[-1001:]]
    for bits in [*_specials(SINGLE), *drawn]:
        x, above = value(bits, SINGLE), (bits & ~SINGLE.sign) + 1
        top = Fraction(2) ** 128 if above == SINGLE.infinity else value(above, SINGLE)
        middle = nearest((abs(x) + top) / 2, DOUBLE) | (bits & SINGLE.sign) << 32
        operands += [middle - 1, middle, middle + 1]
    operands = _odd_length(operands)
    expected = [nearest(value(x, DOUBLE), SINGLE, bool(x & DOUBLE.sign)) for x in operands]
    case = _Case([(x,) for x in operands], expected, DOUBLE, SINGLE)
    _check_layouts("cast of float64 to float32", lambda x: x.float(), case)
    found = _tensor(operands, DOUBLE).numpy()
    with np.errstate(over="ignore"):
        _expect_bits(
            "NumPy's cast of float64 to float32", torch.from_numpy(found.astype("f4")), case
        )


def _widening() -> None:
    """Casts of float32 to float64, and of integers below 2^53 to float64 and back."""
    operands = [*_specials(SINGLE), *(a for a, _ in _pairs(SINGLE)[-1001:])]
    operands = _odd_length(operands)
    expected = [nearest(value(x, SINGLE), DOUBLE, bool(x & SINGLE.sign)) for x in operands]
    case = _Case([(x,) for x in operands], expected, SINGLE, DOUBLE)
    _check_layouts("cast of float32 to float64", lambda x: x.double(), case)
    draw = random.Random(2)
    integers = [draw.getrandbits(1 + i % 53) * (-1) ** i for i in range(1001)]
    x = torch.tensor(integers).repeat(-(-_parallel_size() // len(integers)))
    expected = [nearest(Fraction(k), DOUBLE) for k in integers]
    case = _Case([(x,) for x in expected], expected, DOUBLE, DOUBLE)
    _expect_bits("cast of int64 to float64", x.double(), case)
    wrong = (x.double().long() != x).nonzero()
    if len(wrong):
        k = int(x[wrong[0]])
        raise Fault("cast of float64 to int64", [str(k)], str(k), "another")


def _subnormals(fmt: Format) -> None:
    """Subnormal results and subnormal operands, in every thread of the pool."""
    smallest = 1 << (fmt.precision - 1)  # bits of the smallest normal number
    half, two = fmt.one - smallest, fmt.one + smallest
    size = _parallel_size()
    for a, b in ((smallest, half), (smallest + 2, half), (1, two), (smallest // 2, two)):
        x = _tensor([a], fmt).repeat(size)
        case = _Case([(a, b)], [_exact_mul(a, b, fmt)], fmt, fmt)
        _expect_bits(f"torch.mul in {fmt.name}", x.mul(float(value(b, fmt))), case)
    a, b = smallest + 1, smallest | fmt.sign
    case = _Case([(a, b)], [1], fmt, fmt)
    x, y = (_tensor([bits], fmt).repeat(size) for bits in (a, b))
    _expect_bits(f"torch.add in {fmt.name}", x.add(y), case)


def _contraction(fmt: Format) -> None:
    """x * y - fl(x * y) is 0 as two operations; fused, it is the rounding error of x * y."""
    draw = random.Random(3)
    triples: list[tuple[int, ...]] = []
    while len(triples) < 501:
        x, y = (fmt.one | draw.getrandbits(fmt.precision - 1) for _ in range(2))
        z = _exact_mul(x, y, fmt) ^ fmt.sign
        if value(x, fmt) * value(y, fmt) == -value(z, fmt):
            continue  # the product is exact
        triples.append((x, y, z))
    case = _Case(triples, [0] * len(triples), fmt, fmt)
    _check_layouts(f"x * y + z in {fmt.name}", lambda x, y, z: x * y + z, case)
    _check_layouts(f"z - x * y in {fmt.name}", lambda x, y, z: -z - x * y, case)
    _check_layouts(
        f"x.mul_(y).add_(z) in {fmt.name}", lambda x, y, z: x.clone().mul_(y).add_(z), case
    )
    if fmt is DOUBLE:
        floats = [[_as_float(bits) for bits in triple] for triple in triples]
        found = torch.tensor([x * y + z for x, y, z in floats], dtype=torch.float64)
        _expect_bits("x * y + z of Python's floats", found, case)


def _rounding_to_integers() -> None:
    """torch.round (ties to even) and torch.floor of float64, on which exp, sin and cos depend."""
    halves = [Fraction(k, 4) for k in range(-41, 42)] + [Fraction(2) ** 52 - Fraction(1, 2)]
    operands = [nearest(x, DOUBLE) for x in halves] + [1, DOUBLE.one - 1, DOUBLE.one + 1]
    operands += [x | DOUBLE.sign for x in operands if not x & DOUBLE.sign]
    operands = _odd_length(operands)
    for name, to_integer in (("round", round), ("floor", math.floor)):
        expected = []
        for bits in operands:
            x = value(bits, DOUBLE)
            expected.append(nearest(Fraction(to_integer(x)), DOUBLE, bool(bits & DOUBLE.sign)))
        case = _Case([(x,) for x in operands], expected, DOUBLE, DOUBLE)
        _check_layouts(f"torch.{name} in float64", partial(_call_torch, name), case)


def _fsum() -> None:
    """math.fsum is rounded once: sums that fail every rounding test fall back to it."""
    draw = random.Random(4)
    for n in (2, 3, 10, 100, 1000):
        for _ in range(8):
            terms = [draw.choice((-1, 1)) * _random_float(draw, 400) for _ in range(n)]
            terms += [-x for x in terms[: n // 2]] + [1.0, 2.0**-53]
            expected_value = nearest(sum(map(Fraction, terms), Fraction(0)), DOUBLE)
            found = int.from_bytes(struct.pack("<d", math.fsum(terms)), "little")
            if found != expected_value:
                raise Fault(
                    "math.fsum",
                    [x.hex() for x in terms],
                    _hexadecimal(expected_value, DOUBLE),
                    _hexadecimal(found, DOUBLE),
                )


def _random_float(draw: random.Random, exponents: int) -> float:
    """Return a random binary32 significand times 2^e, -exponents <= e <= exponents."""
    return math.ldexp(draw.getrandbits(24) | 1, draw.randrange(-exponents, exponents + 1))


# --- sums and matrix products: the operands are integers over a power of two ----------------------

_SCALE = 1 << 400
_SUMS: dict[str, Callable[[Tensor], Tensor]] = {  # the sum of each row of x, float64 [rows, n]
    "torch.sum over the last axis": lambda x: x.sum(-1),
    "torch.sum over the first axis": lambda x: x.t().contiguous().sum(0),
    "torch.sum with strides": lambda x: x.t().contiguous().t().sum(1),
    "torch.cumsum": lambda x: x.cumsum(-1)[:, -1],
    "torch.scatter_add": lambda x: torch.zeros(len(x), dtype=x.dtype).scatter_add(
        0, torch.arange(len(x)).repeat_interleave(x.shape[1]), x.reshape(-1)
    ),
}
_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.matmul": lambda a, b: a @ b,
    "torch.matmul of transposed matrices": lambda a, b: (
        a.t().contiguous().t() @ b.t().contiguous().t()
    ),
    "torch.matmul of a batch": lambda a, b: (a.expand(3, *a.shape) @ b.expand(3, *b.shape))[-1],
}
# m, k, n of [m, k] @ [k, n]: single rows and columns, remainders of tiles, several threads
_SHAPES = [(1, 1, 1), (3, 5, 7), (1, 784, 10), (64, 64, 64), (129, 2049, 33), (512, 300, 513)]


def _scaled(x: float) -> int:
    """Return x * _SCALE, which is an integer."""
    n, d = x.as_integer_ratio()
    return n * (_SCALE // d)


def _gamma(n: int) -> Fraction:
    u = Fraction(1, 1 << 53)
    return n * u / (1 - n * u)


def _spread_numbers(*shape: int, spread: int = 20) -> Tensor:
    """Return binary32 numbers as float64: a quarter is 0, others spread over 2 * spread powers of two."""
    draw = torch.Generator().manual_seed(sum(shape))
    significand = torch.randint(-(1 << 24), 1 << 24, shape, generator=draw)
    exponent = torch.randint(-spread, spread + 1, shape, generator=draw)
    kept = torch.randint(4, shape, generator=draw) > 0
    return torch.ldexp(significand * kept, exponent).float().double()


def _expect_within_bound(name: str, found: float, terms: Sequence[int], scale: int) -> None:
    """Raise Fault unless |found - sum of the terms| <= gamma_n * sum of their absolute values."""
    exact_sum = Fraction(sum(terms), scale)
    bound = _gamma(len(terms)) * Fraction(sum(map(abs, terms)), scale)
    if not math.isfinite(found) or abs(Fraction(found) - exact_sum) > bound:
        expected_value = f"{float(exact_sum)!r} within {float(bound):.3g}"
        raise Fault(name, [f"{len(terms)} terms"], expected_value, repr(found))


def _sum_bound() -> None:
    for rows, n in ((1, 70_001), (3, 20_001), (129, 65), (2001, 3)):
        x = _spread_numbers(rows, n)
        terms = [list(map(_scaled, row)) for row in x.tolist()]
        for name, sums in _SUMS.items():
            for i, found in enumerate(sums(x).tolist()):
                _expect_within_bound(
                    f"{name}, row {i} of float64 [{rows}, {n}],", found, terms[i], _SCALE
                )


def _norm_bound() -> None:
    """The norms of rows and columns, which bound a matrix product."""
    for rows, n in ((1, 1), (3, 20_001), (129, 65)):
        x = _spread_numbers(rows, n)
        squares = [sum(_scaled(v) ** 2 for v in row) for row in x.tolist()]
        for name, y, axis in (("rows", x, -1), ("columns", x.t().contiguous(), -2)):
            for i, found in enumerate(torch.linalg.vector_norm(y, dim=axis).tolist()):
                expected_value, got = Fraction(squares[i], _SCALE**2), Fraction(found) ** 2
                if abs(got - expected_value) > 2 * _gamma(n + 2) * expected_value:
                    name = f"vector_norm of {name} of float64 [{rows}, {n}], norm {i},"
                    raise Fault(name, [f"{n} terms"], repr(math.sqrt(expected_value)), repr(found))


def _product_bound() -> None:
    """|error| <= gamma_k * sum |a||b| for each element, which Strassen's and emulated products violate."""
    for m, k, n in _SHAPES:
        scale = 2.0 ** _spread_numbers(m, 1, spread=0).sign().mul(30)
        a, b = _spread_numbers(m, k) * scale, _spread_numbers(k, n)
        corners = [(0, 0), (m - 1, 0), (0, n - 1), (m - 1, n - 1)]
        drawn = random.Random(m * n)
        places = {*corners, *((drawn.randrange(m), drawn.randrange(n)) for _ in range(12))}
        terms = {
            (i, j): [_scaled(x) * _scaled(y) for x, y in zip(a[i].tolist(), b[:, j].tolist())]
            for i, j in sorted(places)
        }
        for name, product in _PRODUCTS.items():
            c = product(a, b)
            for (i, j), exact_sum in terms.items():
                title = f"{name}, element [{i}, {j}] of float64 [{m}, {k}] @ [{k}, {n}],"
                _expect_within_bound(title, float(c[i, j]), exact_sum, _SCALE**2)


def _product_of_integers() -> None:
    """Every element of a product of integers is exact if its sums stay below 2^53."""
    for m, k, n in _SHAPES:
        draw = torch.Generator().manual_seed(m)
        a, b = (torch.randint(-(1 << 20), 1 << 20, s, generator=draw) for s in ((m, k), (k, n)))
        expected_value = a @ b  # in int64
        for name, product in _PRODUCTS.items():
            c = product(a.double(), b.double())
            wrong = (c != expected_value.double()).nonzero()
            if len(wrong):
                i, j = wrong[0].tolist()
                title = f"{name}, element [{i}, {j}] of float64 [{m}, {k}] @ [{k}, {n}],"
                raise Fault(
                    title,
                    [f"{k} products of integers"],
                    str(int(expected_value[i, j])),
                    repr(float(c[i, j])),
                )


def _integers() -> None:
    """Sums of integers, and the shifts that decompose a float64, in every thread."""
    import numpy as np

    draw = random.Random(6)
    drawn = [draw.getrandbits(40) - (1 << 39) for _ in range(1001)]
    copies = -(-_parallel_size() // len(drawn))
    x = torch.tensor(drawn).repeat(copies)
    for name, found, expected_value in (
        ("torch.sum of int64", int(x.sum()), copies * sum(drawn)),
        ("x >> 7, summed, of int64", int((x >> 7).sum()), copies * sum(k >> 7 for k in drawn)),
        ("x << 7, summed, of int64", int((x << 7).sum()), copies * sum(drawn) << 7),
        ("numpy.bincount", int(np.bincount(x.numpy() & 1)[1]), copies * sum(k & 1 for k in drawn)),
    ):
        if found != expected_value:
            raise Fault(name, [f"{len(x)} numbers"], str(expected_value), str(found))


# --- random bits, hashes, compiled loops ---------------------------------------------------------


def _mt19937() -> None:
    """The stream of Matsumoto & Nishimura (1998), which Python has too, and PyTorch's numbers from it."""
    state = [5489]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFF_FFFF)
    python = random.Random()

    def drawn(count: int) -> list[int]:
        """Return the first 32-bit integers of the stream with seed 5489."""
        python.setstate((3, (*state, 624), None))
        return [python.getrandbits(32) for _ in range(count)]

    def stream() -> torch.Generator:
        return torch.Generator().manual_seed(5489)

    words = drawn(20_002)
    # The C++ standard ([rand.predef]) gives this number.
    _expect_equal("mt19937 of Python", "its 10,000th draw", 4123659995, words[9999])
    singles = torch.rand(20_001, generator=stream()).double().mul(2.0**24).long().tolist()
    double = (
        torch.rand(10_001, generator=stream(), dtype=torch.float64).mul(2.0**53).long().tolist()
    )
    order = torch.randperm(10_001, generator=stream()).tolist()
    for i, found in enumerate(singles):
        _expect_equal("torch.rand in float32", f"draw {i}", words[i] & 0xFF_FFFF, found)
    for i, found in enumerate(double):
        expected_value = (words[2 * i] << 32 | words[2 * i + 1]) & (1 << 53) - 1
        _expect_equal("torch.rand in float64", f"draw {i}", expected_value, found)
    permuted = list(range(10_001))
    for i in range(10_000):
        j = i + words[i] % (10_001 - i)
        permuted[i], permuted[j] = permuted[j], permuted[i]
    for i, found in enumerate(order):
        _expect_equal("torch.randperm of 10,001", f"place {i}", permuted[i], found)


def _expect_equal(operation: str, operand: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise Fault(operation, [operand], str(expected), str(found))


def _sha256() -> None:
    """The examples of FIPS 180: one block, and a million letters."""
    for text, sha256 in (
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ):
        _expect_equal("SHA-256", f"{len(text)} bytes", sha256, hashlib.sha256(text).hexdigest())


F = torch.nn.functional
# Operators that have a compiled loop: the shapes of their operands, and the operator.
_SAMPLES: dict[str, tuple[Sequence[tuple[int, ...]], Callable[..., Tensor]]] = {
    "linear": ([(129, 257), (65, 257), (65,)], F.linear),
    "bmm": ([(3, 9, 33), (3, 33, 17)], torch.bmm),
    "conv2d": ([(3, 4, 13, 11), (6, 4, 3, 3), (6,)], partial(F.conv2d, padding=1)),
    "conv_transpose2d": ([(3, 4, 7, 5), (4, 6, 3, 3)], partial(F.conv_transpose2d, stride=2)),
    "sum": ([(7, 301)], lambda x: x.sum(0) + x.sum()),
    "var": ([(33, 65)], lambda x: x.var(1)),
    "layer_norm": ([(33, 70), (70,), (70,)], lambda x, w, b: F.layer_norm(x, (70,), w, b)),
    "batch_norm": (
        [(9, 5, 6, 7), (5,), (5,)],
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
    ),
    "softmax": ([(33, 70)], partial(F.softmax, dim=1)),
    "cross_entropy": ([(33, 10)], lambda x: F.cross_entropy(x, torch.arange(33) % 10)),
    "gelu": ([(33, 70)], F.gelu),
    "tanh": ([(33, 70)], torch.tanh),
    "embedding": ([(9, 20)], lambda x: F.embedding(torch.arange(70) % 9, x)),
}


@contextmanager
def _without_compiled_loops() -> Iterator[None]:
    library, kernels.library = kernels.library, None
    try:
        yield
    finally:
        kernels.library = library


def _compiled_loops() -> Optional[str]:
    """Compiled loops and reference path agree on results, gradients, and a step of two optimizers."""
    if kernels.library is None:
        return "not built or switched off; the reference path computes everything, which is slower"
    for name, (shapes, function) in _SAMPLES.items():
        compiled = _train(shapes, function)
        with _without_compiled_loops():
            reference = _train(shapes, function)
        outputs = ["the result"] + ["a gradient"] * len(shapes) + ["a step"] * len(shapes)
        for output, found, expected in zip(outputs, compiled, reference):
            bits, expected_bits = (
                x.contiguous().view(torch.int32).reshape(-1) for x in (found, expected)
            )
            wrong = (bits != expected_bits).nonzero()
            if len(wrong):
                i = int(wrong[0])
                values = (float(x.reshape(-1)[i]).hex() for x in (expected, found))
                title = f"compiled {name}, element {i} of {output},"
                raise Fault(title, [f"float32 {list(shape)}" for shape in shapes], *values)
    return None


def _train(shapes: Sequence[tuple[int, ...]], function: Callable[..., Tensor]) -> list[Tensor]:
    """Return the result, the gradients, and the operands after steps of AdamW and SGD."""
    draw = torch.Generator().manual_seed(7)
    operands = [torch.randint(-4000, 4000, s, generator=draw).float() / 1024 for s in shapes]
    with torch.enable_grad(), exact():
        operands = [x.requires_grad_() for x in operands]
        result = function(*operands)
        result.backward(torch.arange(result.numel()).remainder(7).float().reshape(result.shape))
        torch.optim.AdamW(operands, lr=0.01).step()
        torch.optim.SGD(operands, lr=0.01, momentum=0.9).step()
        gradients = [x.grad for x in operands if x.grad is not None]
    return [x.detach() for x in (result, *gradients, *operands)]


# The assumptions; each relies on those before it.
CHECKS: dict[str, Callable[[], Optional[str]]] = {
    "subnormal float32 numbers count, in every thread": partial(_subnormals, SINGLE),
    "subnormal float64 numbers count, in every thread": partial(_subnormals, DOUBLE),
    "float32 add is rounded once": partial(_rounded_once, "add", _exact_add, SINGLE),
    "float32 sub is rounded once": partial(_rounded_once, "sub", _exact_sub, SINGLE),
    "float32 mul is rounded once": partial(_rounded_once, "mul", _exact_mul, SINGLE),
    "float32 div is rounded once": partial(_rounded_once, "div", _exact_div, SINGLE),
    "float64 add is rounded once": partial(_rounded_once, "add", _exact_add, DOUBLE),
    "float64 sub is rounded once": partial(_rounded_once, "sub", _exact_sub, DOUBLE),
    "float64 mul is rounded once": partial(_rounded_once, "mul", _exact_mul, DOUBLE),
    "float64 div is rounded once": partial(_rounded_once, "div", _exact_div, DOUBLE),
    "float64 sqrt is within an ulp": _sqrt,
    "casts to float32 are rounded once": _narrowing,
    "casts to float64 and int64 are exact": _widening,
    "float32 mul and add are not fused": partial(_contraction, SINGLE),
    "float64 mul and add are not fused": partial(_contraction, DOUBLE),
    "float64 round and floor are exact": _rounding_to_integers,
    "math.fsum is rounded once": _fsum,
    "integer sums and shifts are exact": _integers,
    "float64 sums keep their error bound": _sum_bound,
    "float64 norms keep their error bound": _norm_bound,
    "float64 matrix products keep their error bound": _product_bound,
    "float64 matrix products of integers are exact": _product_of_integers,
    "random numbers are the stream of mt19937": _mt19937,
    "SHA-256 is right": _sha256,
    "compiled loops agree with the reference path": _compiled_loops,
}
