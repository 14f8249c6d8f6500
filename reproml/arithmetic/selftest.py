"""What exact arithmetic takes for granted of a machine, tested on this very machine.

The proofs of docs/exact.md begin with IEEE 754: +, -, *, / and casts are rounded once, subnormal numbers
count, nothing is fused, a sum or product of matrices in binary64 errs by no more than gamma_n (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1). A broken processor, an emulator or
another BLAS may break that. `CHECKS` has a line for each assumption; `self_test` tries them.

The oracle is integers alone: operands are made from their bits and rounded by `nearest`, so that no
floating-point unit judges itself. Each pair of operands comes in every lane of a vector, in every thread
of the pool and in every layout that has a kernel of its own.
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
    """An assumption that does not hold: the operation, its operands, the values expected and found."""

    def __init__(self, operation: str, operands: Sequence[str], expected: str, found: str) -> None:
        super().__init__(
            f"{operation} of {', '.join(operands)}: expected {expected}, found {found}"
        )
        self.operation, self.operands = operation, list(operands)
        self.expected, self.found = expected, found


@dataclass(frozen=True)
class Outcome:
    """One assumption, tested. `fault` is None where it holds; `note` then may say more."""

    name: str
    note: str = ""
    fault: Optional[Exception] = None

    def as_json(self) -> dict[str, Any]:
        """Return the name, whether it holds, the note, and of a Fault the four parts."""
        parts = vars(self.fault) if isinstance(self.fault, Fault) else {}
        message = None if self.fault is None else str(self.fault)
        return {
            "name": self.name,
            "holds": self.fault is None,
            "note": self.note,
            "fault": message and {"message": message, **parts},
        }


def self_test() -> Iterator[Outcome]:
    """Try every assumption in turn. Never raises for a machine that breaks one."""
    for name, check in CHECKS.items():
        try:
            yield Outcome(name, check() or "")
        except Exception as fault:
            yield Outcome(name, fault=fault)


# --- the oracle: bits, fractions, integers --------------------------------------------------------


class Format(NamedTuple):
    """A binary format of IEEE 754."""

    name: str  # torch's name of it
    integers: str  # torch's name of integers of the same width
    width: int  # bits
    precision: int  # bits of the significand, the hidden one included
    last: int  # the last place of the subnormal numbers is 2**last

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


def value(bits: int, of: Format) -> Fraction:
    """The finite number with these bits; -0 is 0."""
    high, low = divmod(bits & ~of.sign, 1 << (of.precision - 1))
    significand = low + (1 << (of.precision - 1)) * (high > 0)
    magnitude = Fraction(significand) * Fraction(2) ** (of.last + max(high - 1, 0))
    return -magnitude if bits & of.sign else magnitude


def nearest(x: Fraction, to: Format, minus: bool = False) -> int:
    """The bits of the number nearest to x, ties to even; `minus` is the sign if x is 0."""
    if x == 0:
        return to.sign * minus
    n, d = abs(x.numerator), x.denominator
    last = max(n.bit_length() - d.bit_length() - to.precision, to.last)
    while True:
        q, rest = divmod(n << max(-last, 0), d << max(last, 0))
        if q >> to.precision == 0:
            break
        last += 1
    twice, whole = 2 * rest, d << max(last, 0)
    q += twice > whole or (twice == whole and q % 2 == 1)
    # A carry out of the significand is the next exponent.
    bits = min(((last - to.last) << (to.precision - 1)) + q, to.infinity)
    return bits | to.sign * (x < 0)


def _root(x: Fraction) -> Fraction:
    """sqrt(x) to 200 bits, the last of them set if anything is cut off: it rounds as sqrt(x) does."""
    n, d = x.numerator, x.denominator
    shift = max(0, 200 - (n.bit_length() - d.bit_length()) // 2)
    root = isqrt((n << 2 * shift) // d)
    inexact = root * root * d != n << 2 * shift
    return Fraction(2 * root + inexact, 1 << (shift + 1))


def _exact_add(a: int, b: int, of: Format) -> int:
    both = bool(a & b & of.sign)
    return nearest(value(a, of) + value(b, of), of, minus=both)


def _exact_sub(a: int, b: int, of: Format) -> int:
    return _exact_add(a, b ^ of.sign, of)


def _exact_mul(a: int, b: int, of: Format) -> int:
    return nearest(value(a, of) * value(b, of), of, bool((a ^ b) & of.sign))


def _exact_div(a: int, b: int, of: Format) -> int:
    minus = (a ^ b) & of.sign
    if value(b, of) == 0:
        return of.infinity | minus if value(a, of) else of.nan
    return nearest(value(a, of) / value(b, of), of, bool(minus))


def _exact_sqrt(a: int, of: Format) -> int:
    x = value(a, of)
    return a if x == 0 else of.nan if x < 0 else nearest(_root(x), of)


# --- operands ------------------------------------------------------------------------------------


@cache
def _specials(of: Format) -> list[int]:
    """Where rounding goes wrong first: zeros, subnormal numbers, both ends of the range, ties."""
    one, step = of.one, 1 << (of.precision - 1)  # the bits of 1; twice a number is a step more
    half_ulp = one - of.precision * step  # of 1: half of the last place, so that 1 + this is a tie
    numbers = [0, 1, 2, 3, step // 2, step - 1, step, step + 1, 2 * step - 1]
    numbers += [half_ulp - 1, half_ulp, half_ulp + 1, half_ulp + step // 2]
    numbers += [one - step, one - 1, one, one + 1, one + 2, one + step // 2, one + step - 1]
    numbers += [one + step, one + step + step // 2, one + (of.precision - 1) * step + 1]
    numbers += [of.infinity - step, of.infinity - 2, of.infinity - 1]
    return numbers + [x | of.sign for x in numbers]


@cache
def _pairs(of: Format) -> list[tuple[int, int]]:
    """Every pair of `_specials`, then pairs drawn at random."""
    draw = random.Random(1)
    step, exponents = of.precision - 1, of.infinity >> (of.precision - 1)

    def number(exponent: int, zeros: int = 0) -> int:
        """Any significand, with so many zeros at its end, and sign."""
        significand = draw.getrandbits(step) >> zeros << zeros
        return (
            draw.getrandbits(1) * of.sign
            | min(max(exponent, 0), exponents - 1) << step
            | significand
        )

    bias, half = exponents // 2, of.precision // 2
    pairs = list(itertools.product(_specials(of), repeat=2))
    for _ in range(150):
        e = draw.randrange(exponents)
        pairs.append((number(e), number(draw.randrange(exponents))))  # any
        pairs.append((number(e), number(e + draw.randrange(-3, 4))))  # that cancel
        # Sums, then products, that end half a unit below the last place: ties
        pairs.append((number(e), number(e - draw.randrange(1, of.precision + 2), step - 2)))
        pairs.append((number(bias, half), number(bias, half - 2)))
        # Products and quotients that are subnormal, and such that overflow
        pairs.append((number(e), number(bias - e + draw.randrange(-of.precision, 3))))
        pairs.append((number(e), number(e + bias + draw.randrange(-3, of.precision))))
        pairs.append((number(e), number(3 * bias - e + draw.randrange(-2, 3))))
    return _odd(pairs)


def _odd(operands: list[Any]) -> list[Any]:
    """An odd number of them, so that, repeated, each meets each lane of a vector."""
    return operands[: len(operands) - 1 + len(operands) % 2]


def _tensor(bits: Iterable[int], of: Format) -> Tensor:
    signed = [x - 2 * of.sign if x & of.sign else x for x in bits]
    return torch.tensor(signed, dtype=getattr(torch, of.integers)).view(getattr(torch, of.name))


def _shown(bits: int, of: Format) -> str:
    """The number in hexadecimal, as C's %a has it, by integers: printing must not flush it."""
    sign, bits = "-" * bool(bits & of.sign), bits & ~of.sign
    if bits >= of.infinity:
        return sign + "inf" if bits == of.infinity else "nan"
    high, low = divmod(bits, 1 << (of.precision - 1))
    digits = -(-(of.precision - 1) // 4)
    low <<= 4 * digits - (of.precision - 1)
    exponent = max(high, 1) + of.last + of.precision - 2
    return f"{sign}0x{int(high > 0)}.{low:0{digits}x}p{exponent if bits else 0:+d}"


def _threaded() -> int:
    """How many elements give every thread of the pool its share: 2^15 are the least, for one."""
    return (torch.get_num_threads() + 1) << 15


class _Bits(NamedTuple):
    """Operands, a tuple for each element, and the bits expected of each."""

    operands: list[tuple[int, ...]]
    expected: list[int]
    of: Format  # of the operands
    to: Format  # of the result


def _compare(name: str, found: Tensor, case: _Bits, neighbours: bool = False) -> None:
    """Raise Fault at the first element that differs; with `neighbours` the numbers beside it will do.

    `found` repeats the case's elements over and over. A NaN is a NaN.
    """
    period = len(case.expected)
    expected = _tensor(case.expected, case.to).view(getattr(torch, case.to.integers))
    nan = _tensor([case.to.nan], case.to)
    bits = torch.where(found != found, nan, found).view(expected.dtype)
    copies = -(-len(bits) // period)
    expected = expected.repeat(copies)[: len(bits)]
    wrong = bits != expected
    if neighbours:
        wrong &= (bits - 1 != expected) & (bits + 1 != expected)
    if wrong.any():
        i = int(wrong.nonzero()[0])
        at = int(bits[i]) % (1 << case.to.width)
        raise Fault(
            f"{name}, element {i} of {len(bits)},",
            [_shown(x, case.of) for x in case.operands[i % period]],
            _shown(case.expected[i % period], case.to),
            _shown(at, case.to),
        )


def _try(name: str, function: Callable[..., Tensor], case: _Bits, neighbours: bool = False) -> None:
    """Compare `function` with the case as one long vector, with strides, and an element at a time."""
    columns = [_tensor(column, case.of) for column in zip(*case.operands)]
    period = len(case.expected)
    copies = -(-_threaded() // period)
    long = [x.repeat(copies) for x in columns]
    _compare(name, function(*long), case, neighbours)
    apart = [torch.stack([x, x], 1)[:, 0] for x in columns]
    _compare(f"{name} with strides", function(*apart), case, neighbours)
    some = range(0, period, 16)
    alone = torch.cat([function(*[x[i : i + 1] for x in columns]) for i in some])
    few = case._replace(
        operands=[case.operands[i] for i in some], expected=[case.expected[i] for i in some]
    )
    _compare(f"{name} of single elements", alone, few, neighbours)


# --- the checks: each raises Fault, or returns None or a note ------------------------------------


def _binary(name: str, oracle: Callable[[int, int, Format], int], of: Format) -> None:
    function = partial(_torch, name)  # looked up when called
    pairs = _pairs(of)
    expected = [oracle(a, b, of) for a, b in pairs]
    _try(f"torch.{name} in {of.name}", function, _Bits(list(pairs), expected, of, of))
    specials = _specials(of)
    x = _tensor(specials, of)
    for j, b in enumerate(specials):  # a number instead of a tensor has kernels of its own
        at = range(j, len(specials) ** 2, len(specials))
        case = _Bits([pairs[i] for i in at], [expected[i] for i in at], of, of)
        number = float(_tensor([b], of))
        _compare(f"torch.{name} with a number in {of.name}", function(x, number), case)
    if of is DOUBLE:
        python = getattr(operator, "truediv" if name == "div" else name)
        keep = [i for i, (_, b) in enumerate(pairs) if name != "div" or value(b, of)]
        case = _Bits([pairs[i] for i in keep], [expected[i] for i in keep], of, of)
        floats = [python(_python(a), _python(b)) for a, b in (pairs[i] for i in keep)]
        found = torch.tensor(floats, dtype=torch.float64)
        _compare(f"{name} of Python's floats", found, case)


def _torch(name: str, *args: Any) -> Tensor:
    result: Tensor = getattr(torch, name)(*args)
    return result


def _python(bits: int) -> float:
    return float(_tensor([bits], DOUBLE))


def _sqrt() -> None:
    """A root in binary64 is the one operation here that may be an ulp off: vendors' vector libraries are.

    A root of a binary32 number stays 2^-51 away from every midpoint, so it is rounded right all the same.
    """
    operands = [x & ~DOUBLE.sign for pair in _pairs(DOUBLE)[-1001:] for x in pair]
    operands = _odd([*_specials(DOUBLE), *operands])
    case = _Bits(
        [(x,) for x in operands], [_exact_sqrt(x, DOUBLE) for x in operands], DOUBLE, DOUBLE
    )
    _try("torch.sqrt in float64", partial(_torch, "sqrt"), case, neighbours=True)


def _narrowing() -> None:
    """float64 to float32: beside and on the midpoints of neighbours, by PyTorch and by NumPy."""
    import numpy as np

    operands = [*_specials(DOUBLE)]
    drawn = [a for a, _ in _pairs(SINGLE)[-1001:]]
    for bits in [*_specials(SINGLE), *drawn]:
        x, above = value(bits, SINGLE), (bits & ~SINGLE.sign) + 1
        top = Fraction(2) ** 128 if above == SINGLE.infinity else value(above, SINGLE)
        middle = nearest((abs(x) + top) / 2, DOUBLE) | (bits & SINGLE.sign) << 32
        operands += [middle - 1, middle, middle + 1]
    operands = _odd(operands)
    expected = [nearest(value(x, DOUBLE), SINGLE, bool(x & DOUBLE.sign)) for x in operands]
    case = _Bits([(x,) for x in operands], expected, DOUBLE, SINGLE)
    _try("cast of float64 to float32", lambda x: x.float(), case)
    found = _tensor(operands, DOUBLE).numpy()
    with np.errstate(over="ignore"):
        _compare("NumPy's cast of float64 to float32", torch.from_numpy(found.astype("f4")), case)


def _widening() -> None:
    """float32 to float64, and whole numbers below 2^53 to float64 and back: exact."""
    operands = [*_specials(SINGLE), *(a for a, _ in _pairs(SINGLE)[-1001:])]
    operands = _odd(operands)
    expected = [nearest(value(x, SINGLE), DOUBLE, bool(x & SINGLE.sign)) for x in operands]
    case = _Bits([(x,) for x in operands], expected, SINGLE, DOUBLE)
    _try("cast of float32 to float64", lambda x: x.double(), case)
    draw = random.Random(2)
    whole = [draw.getrandbits(1 + i % 53) * (-1) ** i for i in range(1001)]
    there = torch.tensor(whole).repeat(-(-_threaded() // len(whole)))
    expected = [nearest(Fraction(k), DOUBLE) for k in whole]
    case = _Bits([(x,) for x in expected], expected, DOUBLE, DOUBLE)
    _compare("cast of int64 to float64", there.double(), case)
    wrong = (there.double().long() != there).nonzero()
    if len(wrong):
        k = int(there[wrong[0]])
        raise Fault("cast of float64 to int64", [str(k)], str(k), "another")


def _subnormals(of: Format) -> None:
    """Neither as results nor as operands, in no thread of the pool."""
    smallest = 1 << (of.precision - 1)  # bits of the smallest normal number
    half, two = of.one - smallest, of.one + smallest
    size = _threaded()
    for a, b in ((smallest, half), (smallest + 2, half), (1, two), (smallest // 2, two)):
        x = _tensor([a], of).repeat(size)
        case = _Bits([(a, b)], [_exact_mul(a, b, of)], of, of)
        _compare(f"torch.mul in {of.name}", x.mul(float(value(b, of))), case)
    a, b = smallest + 1, smallest | of.sign
    case = _Bits([(a, b)], [1], of, of)
    x, y = (_tensor([bits], of).repeat(size) for bits in (a, b))
    _compare(f"torch.add in {of.name}", x.add(y), case)


def _contraction(of: Format) -> None:
    """x * y - fl(x * y) is 0 in two operations, and the rounding error of x * y in a fused one."""
    draw = random.Random(3)
    triples: list[tuple[int, ...]] = []
    while len(triples) < 501:
        x, y = (of.one | draw.getrandbits(of.precision - 1) for _ in range(2))
        z = _exact_mul(x, y, of) ^ of.sign
        if value(x, of) * value(y, of) == -value(z, of):
            continue  # nothing was rounded
        triples.append((x, y, z))
    case = _Bits(triples, [0] * len(triples), of, of)
    _try(f"x * y + z in {of.name}", lambda x, y, z: x * y + z, case)
    _try(f"z - x * y in {of.name}", lambda x, y, z: -z - x * y, case)
    _try(f"x.mul_(y).add_(z) in {of.name}", lambda x, y, z: x.clone().mul_(y).add_(z), case)
    if of is DOUBLE:
        floats = [[_python(bits) for bits in triple] for triple in triples]
        found = torch.tensor([x * y + z for x, y, z in floats], dtype=torch.float64)
        _compare("x * y + z of Python's floats", found, case)


def _whole() -> None:
    """torch.round (ties to even) and torch.floor of float64: exp, sin and cos reduce with them."""
    halves = [Fraction(k, 4) for k in range(-41, 42)] + [Fraction(2) ** 52 - Fraction(1, 2)]
    operands = [nearest(x, DOUBLE) for x in halves] + [1, DOUBLE.one - 1, DOUBLE.one + 1]
    operands += [x | DOUBLE.sign for x in operands if not x & DOUBLE.sign]
    operands = _odd(operands)
    for name, to_whole in (("round", round), ("floor", math.floor)):
        expected = []
        for bits in operands:
            x = value(bits, DOUBLE)
            expected.append(nearest(Fraction(to_whole(x)), DOUBLE, bool(bits & DOUBLE.sign)))
        case = _Bits([(x,) for x in operands], expected, DOUBLE, DOUBLE)
        _try(f"torch.{name} in float64", partial(_torch, name), case)


def _fsum() -> None:
    """math.fsum, rounded once, is the last resort of sums; ldexp is exact."""
    draw = random.Random(4)
    for n in (2, 3, 10, 100, 1000):
        for _ in range(8):
            terms = [draw.choice((-1, 1)) * _float(draw, 400) for _ in range(n)]
            terms += [-x for x in terms[: n // 2]] + [1.0, 2.0**-53]
            right = nearest(sum(map(Fraction, terms), Fraction(0)), DOUBLE)
            found = int.from_bytes(struct.pack("<d", math.fsum(terms)), "little")
            if found != right:
                raise Fault(
                    "math.fsum",
                    [x.hex() for x in terms],
                    _shown(right, DOUBLE),
                    _shown(found, DOUBLE),
                )


def _float(draw: random.Random, exponents: int) -> float:
    """A positive binary32 significand, at any of so many exponents on both sides of 0."""
    return math.ldexp(draw.getrandbits(24) | 1, draw.randrange(-exponents, exponents + 1))


# --- sums and products of matrices: the operands, over a power of two, are integers --------------

_SCALE = 1 << 400
_SUMS: dict[str, Callable[[Tensor], Tensor]] = {  # of each row of x, float64 [rows, n]
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
# m, k, n of a product [m, k] @ [k, n]: rows and columns alone, remainders of tiles, threads
_SHAPES = [(1, 1, 1), (3, 5, 7), (1, 784, 10), (64, 64, 64), (129, 2049, 33), (512, 300, 513)]


def _integer(x: float) -> int:
    """x * _SCALE, exactly."""
    n, d = x.as_integer_ratio()
    return n * (_SCALE // d)


def _gamma(n: int) -> Fraction:
    u = Fraction(1, 1 << 53)
    return n * u / (1 - n * u)


def _wide(*shape: int, spread: int = 20) -> Tensor:
    """Binary32 numbers as float64, a quarter of them 0, the others over 2 * spread powers of two."""
    draw = torch.Generator().manual_seed(sum(shape))
    significand = torch.randint(-(1 << 24), 1 << 24, shape, generator=draw)
    exponent = torch.randint(-spread, spread + 1, shape, generator=draw)
    kept = torch.randint(4, shape, generator=draw) > 0
    return torch.ldexp(significand * kept, exponent).float().double()


def _within(name: str, found: float, terms: Sequence[int], scale: int) -> None:
    """Raise Fault unless |found - sum of the terms| <= gamma_n * sum of their absolute values."""
    exact_sum = Fraction(sum(terms), scale)
    bound = _gamma(len(terms)) * Fraction(sum(map(abs, terms)), scale)
    if not math.isfinite(found) or abs(Fraction(found) - exact_sum) > bound:
        right = f"{float(exact_sum)!r} within {float(bound):.3g}"
        raise Fault(name, [f"{len(terms)} terms"], right, repr(found))


def _sum_bound() -> None:
    for rows, n in ((1, 70_001), (3, 20_001), (129, 65), (2001, 3)):
        x = _wide(rows, n)
        terms = [list(map(_integer, row)) for row in x.tolist()]
        for name, sums in _SUMS.items():
            for i, found in enumerate(sums(x).tolist()):
                _within(f"{name}, row {i} of float64 [{rows}, {n}],", found, terms[i], _SCALE)


def _norm_bound() -> None:
    """The norms of rows and columns, whose product bounds a whole product of matrices."""
    for rows, n in ((1, 1), (3, 20_001), (129, 65)):
        x = _wide(rows, n)
        squares = [sum(_integer(v) ** 2 for v in row) for row in x.tolist()]
        for name, y, axis in (("rows", x, -1), ("columns", x.t().contiguous(), -2)):
            for i, found in enumerate(torch.linalg.vector_norm(y, dim=axis).tolist()):
                right, got = Fraction(squares[i], _SCALE**2), Fraction(found) ** 2
                if abs(got - right) > 2 * _gamma(n + 2) * right:
                    name = f"vector_norm of {name} of float64 [{rows}, {n}], norm {i},"
                    raise Fault(name, [f"{n} terms"], repr(math.sqrt(right)), repr(found))


def _product_bound() -> None:
    """|error| <= gamma_k * sum |a||b| for each element: Strassen's and emulated products break it."""
    for m, k, n in _SHAPES:
        a, b = _wide(m, k) * 2.0 ** _wide(m, 1, spread=0).sign().mul(30), _wide(k, n)
        corners = [(0, 0), (m - 1, 0), (0, n - 1), (m - 1, n - 1)]
        drawn = random.Random(m * n)
        places = {*corners, *((drawn.randrange(m), drawn.randrange(n)) for _ in range(12))}
        terms = {
            (i, j): [_integer(x) * _integer(y) for x, y in zip(a[i].tolist(), b[:, j].tolist())]
            for i, j in sorted(places)
        }
        for name, product in _PRODUCTS.items():
            c = product(a, b)
            for (i, j), exact_sum in terms.items():
                title = f"{name}, element [{i}, {j}] of float64 [{m}, {k}] @ [{k}, {n}],"
                _within(title, float(c[i, j]), exact_sum, _SCALE**2)


def _product_of_integers() -> None:
    """Products of whole numbers whose sums stay below 2^53 are exact, every element of them."""
    for m, k, n in _SHAPES:
        draw = torch.Generator().manual_seed(m)
        a, b = (torch.randint(-(1 << 20), 1 << 20, s, generator=draw) for s in ((m, k), (k, n)))
        right = a @ b  # in int64
        for name, product in _PRODUCTS.items():
            c = product(a.double(), b.double())
            wrong = (c != right.double()).nonzero()
            if len(wrong):
                i, j = wrong[0].tolist()
                title = f"{name}, element [{i}, {j}] of float64 [{m}, {k}] @ [{k}, {n}],"
                raise Fault(
                    title,
                    [f"{k} products of whole numbers"],
                    str(int(right[i, j])),
                    repr(float(c[i, j])),
                )


def _integers() -> None:
    """Sums of integers, and the shifts that take a float64 apart, in every thread."""
    import numpy as np

    draw = random.Random(6)
    drawn = [draw.getrandbits(40) - (1 << 39) for _ in range(1001)]
    copies = -(-_threaded() // len(drawn))
    x = torch.tensor(drawn).repeat(copies)
    for name, found, right in (
        ("torch.sum of int64", int(x.sum()), copies * sum(drawn)),
        ("x >> 7, summed, of int64", int((x >> 7).sum()), copies * sum(k >> 7 for k in drawn)),
        ("x << 7, summed, of int64", int((x << 7).sum()), copies * sum(drawn) << 7),
        ("numpy.bincount", int(np.bincount(x.numpy() & 1)[1]), copies * sum(k & 1 for k in drawn)),
    ):
        if found != right:
            raise Fault(name, [f"{len(x)} numbers"], str(right), str(found))


# --- random bits, hashes, compiled loops ---------------------------------------------------------


def _mt19937() -> None:
    """The stream of Matsumoto & Nishimura (1998), and what PyTorch makes of it; Python has it as well."""
    state = [5489]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFF_FFFF)
    python = random.Random()

    def drawn(count: int) -> list[int]:
        """The first 32-bit integers of the stream of seed 5489."""
        python.setstate((3, (*state, 624), None))
        return [python.getrandbits(32) for _ in range(count)]

    def stream() -> torch.Generator:
        return torch.Generator().manual_seed(5489)

    words = drawn(20_002)
    # The C++ standard ([rand.predef]) gives this one.
    _same("mt19937 of Python", "its 10,000th draw", 4123659995, words[9999])
    singles = torch.rand(20_001, generator=stream()).double().mul(2.0**24).long().tolist()
    double = (
        torch.rand(10_001, generator=stream(), dtype=torch.float64).mul(2.0**53).long().tolist()
    )
    order = torch.randperm(10_001, generator=stream()).tolist()
    for i, found in enumerate(singles):
        _same("torch.rand in float32", f"draw {i}", words[i] & 0xFF_FFFF, found)
    for i, found in enumerate(double):
        right = (words[2 * i] << 32 | words[2 * i + 1]) & (1 << 53) - 1
        _same("torch.rand in float64", f"draw {i}", right, found)
    permuted = list(range(10_001))
    for i in range(10_000):
        j = i + words[i] % (10_001 - i)
        permuted[i], permuted[j] = permuted[j], permuted[i]
    for i, found in enumerate(order):
        _same("torch.randperm of 10,001", f"place {i}", permuted[i], found)


def _same(operation: str, operand: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise Fault(operation, [operand], str(expected), str(found))


def _sha256() -> None:
    """The examples of FIPS 180: one block, and a million letters."""
    for text, sha256 in (
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ):
        _same("SHA-256", f"{len(text)} bytes", sha256, hashlib.sha256(text).hexdigest())


F = torch.nn.functional
# A sample of what has a compiled loop: its operands' shapes, and the operator.
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
    """What they settle is what the plain path comes to: forward, backward and a step of two optimizers."""
    if kernels.library is None:
        return "not built or switched off: the plain path does it all, slower"
    for name, (shapes, function) in _SAMPLES.items():
        compiled = _train(shapes, function)
        with _without_compiled_loops():
            reference = _train(shapes, function)
        for part, (found, right) in enumerate(zip(compiled, reference)):
            bits, expected = (x.contiguous().view(torch.int32).reshape(-1) for x in (found, right))
            wrong = (bits != expected).nonzero()
            if len(wrong):
                i = int(wrong[0])
                values = (float(x.reshape(-1)[i]).hex() for x in (right, found))
                what = (["the result"] + ["a gradient"] * len(shapes) + ["a step"] * len(shapes))[
                    part
                ]
                title = f"compiled {name}, element {i} of {what},"
                raise Fault(title, [f"float32 {list(shape)}" for shape in shapes], *values)
    return None


def _train(shapes: Sequence[tuple[int, ...]], function: Callable[..., Tensor]) -> list[Tensor]:
    """Return the result, the gradients, and the operands after a step of AdamW and one of SGD."""
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


# The assumptions, in the order in which they build on each other.
CHECKS: dict[str, Callable[[], Optional[str]]] = {
    "subnormal float32 numbers count, in every thread": partial(_subnormals, SINGLE),
    "subnormal float64 numbers count, in every thread": partial(_subnormals, DOUBLE),
    "float32 add is rounded once": partial(_binary, "add", _exact_add, SINGLE),
    "float32 sub is rounded once": partial(_binary, "sub", _exact_sub, SINGLE),
    "float32 mul is rounded once": partial(_binary, "mul", _exact_mul, SINGLE),
    "float32 div is rounded once": partial(_binary, "div", _exact_div, SINGLE),
    "float64 add is rounded once": partial(_binary, "add", _exact_add, DOUBLE),
    "float64 sub is rounded once": partial(_binary, "sub", _exact_sub, DOUBLE),
    "float64 mul is rounded once": partial(_binary, "mul", _exact_mul, DOUBLE),
    "float64 div is rounded once": partial(_binary, "div", _exact_div, DOUBLE),
    "float64 sqrt is within an ulp": _sqrt,
    "casts to float32 are rounded once": _narrowing,
    "casts to float64 and int64 are exact": _widening,
    "float32 mul and add are not fused": partial(_contraction, SINGLE),
    "float64 mul and add are not fused": partial(_contraction, DOUBLE),
    "float64 round and floor are exact": _whole,
    "math.fsum is rounded once": _fsum,
    "integer sums and shifts are exact": _integers,
    "float64 sums keep their error bound": _sum_bound,
    "float64 norms keep their error bound": _norm_bound,
    "float64 matrix products keep their error bound": _product_bound,
    "float64 matrix products of integers are exact": _product_of_integers,
    "random numbers are the stream of mt19937": _mt19937,
    "SHA-256 is right": _sha256,
    "the compiled loops agree with the plain path": _compiled_loops,
}
