"""Computes the constants of the elementary functions, as SLEEF's gencoef does.

    python -m tools.coefficients        # prints each constant, series and polynomial, with its error bound

They stand in reproml/arithmetic/numerics/elementary.py and in the C sources in reproml/arithmetic/csrc;
tests/tools/test_coefficients.py compares both with this script, bit for bit. No result depends on these
constants, but the error bounds are proven for them: a new constant needs a new analysis.

- Splits of ln 2 and pi / 2: leading bits first, so that a product with a small integer is exact.
- Taylor coefficients, each rounded once. Those of erf are computed in Python floats, step by step.
- Polynomials that interpolate a smooth function at Chebyshev nodes of their variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Any, Callable

import mpmath

mp = mpmath.MPContext()
mp.prec = 400
Function = Callable[[Any], Any]


# ---- constants -------------------------------------------------------------------------------------


def truncated(x: Any, bits: int) -> Any:
    """Return x, rounded towards zero to `bits` significant bits."""
    unit = mp.ldexp(1, int(mp.floor(mp.log(abs(x), 2))) + 1 - bits)
    return mp.floor(x / unit) * unit


def split(x: Any, *bits: int) -> list[float]:
    """Split x into numbers of these lengths and the rest, rounded to binary64.

    Each is made of the leading bits of what the numbers before it leave.
    """
    numbers = []
    for length in bits:
        numbers.append(float(truncated(x, length)))
        x -= numbers[-1]
    return [*numbers, float(x)]


CONSTANTS = {
    "1 / ln 2": [float(1 / mp.log(2))],
    "ln 2": split(mp.log(2), 37),
    "ln 2 as a pair": split(mp.log(2), 53),
    "1 / 6 as a pair": split(mp.mpf(1) / 6, 53),
    "pi / 2": split(mp.pi / 2, 33, 33),
    "pi": [float(mp.pi)],
    "pi / 2 in parts": split(mp.pi / 2, 30, 30, 53),
    "2 / pi": [float(2 / mp.pi)],
    "pi as a pair": split(mp.pi, 53),
    "2 / sqrt(pi) as a pair": split(2 / mp.sqrt(mp.pi), 53),
    "1 / sqrt(2 pi)": [float(1 / mp.sqrt(2 * mp.pi))],
}


def sqrt_half_bits() -> int:
    """The bit pattern of sqrt(1/2) in binary64, where `log` splits its argument."""
    mantissa = int(mp.nint(mp.sqrt(mp.mpf(1) / 2) * 2**53))
    return (1022 << 52) + mantissa - (1 << 52)


# ---- Taylor series, highest power first, as Horner's scheme takes them ------------------------------


def rounded(numerator: int, denominator: int) -> float:
    return float(mp.mpf(numerator) / denominator)


EXP = [rounded(1, factorial(n)) for n in range(14, -1, -1)]
EXPM1 = [rounded(1, factorial(n)) for n in range(15, 0, -1)]
LOG = [rounded(2, 2 * n + 1) for n in range(11, 0, -1)]
SIN = [rounded((-1) ** n, factorial(2 * n + 1)) for n in range(8, 0, -1)]
COS = [rounded((-1) ** n, factorial(2 * n)) for n in range(9, 0, -1)]
# The last terms of the series of pairs, which have one double each.
PAIR_EXP = [rounded(1, factorial(n)) for n in range(17, 8, -1)]
PAIR_SIN = [rounded((-1) ** n, factorial(2 * n + 1)) for n in range(13, 7, -1)]
PAIR_COS = [rounded((-1) ** n, factorial(2 * n)) for n in range(14, 8, -1)]
# Not rounded once, but at each step, as Python computes it.
ERF = [
    2 / float(mp.sqrt(float(mp.pi))) * (-1) ** n / (factorial(n) * (2 * n + 1))
    for n in range(15, -1, -1)
]


# ---- polynomials that interpolate at Chebyshev nodes ------------------------------------------------


def chebyshev_nodes(low: Any, high: Any, count: int) -> list[Any]:
    middle, half = (low + high) / 2, (high - low) / 2
    return [middle + half * mp.cos(mp.pi * (2 * i + 1) / (2 * count)) for i in range(count)]


def interpolated(f: Function, nodes: list[Any]) -> list[float]:
    """Return the coefficients, lowest power first, of the polynomial through f at the nodes.

    Newton's divided differences, expanded to powers, with each coefficient rounded once to binary64.
    """
    n = len(nodes)
    differences = [f(x) for x in nodes]
    for j in range(1, n):
        for i in range(n - 1, j - 1, -1):
            step = nodes[i] - nodes[i - j]
            differences[i] = (differences[i] - differences[i - 1]) / step
    coefficients = [mp.mpf(0)] * n
    for difference, node in zip(reversed(differences), reversed(nodes)):
        shifted = [mp.mpf(0), *coefficients[:-1]]
        coefficients = [s - c * node for s, c in zip(shifted, coefficients)]
        coefficients[0] += difference
    return [float(c) for c in coefficients]


def evaluated(coefficients: list[float], x: Any) -> Any:
    """The value of a polynomial, lowest power first, without rounding errors that matter."""
    y = mp.mpf(0)
    for coefficient in reversed(coefficients):
        y = y * x + coefficient
    return y


@dataclass(frozen=True)
class Polynomial:
    """The polynomial of this degree that interpolates f at the Chebyshev nodes of [low, high]."""

    name: str
    f: Function
    low: str  # decimal, or a fraction
    high: str
    degree: int
    domain: tuple[str, str]  # where it is used: within [low, high]
    error: Callable[[Any, Any], Any]  # (x, f(x) minus the polynomial) -> what the bound limits
    bound: str  # binary logarithm, as the comment in the sources states it

    def coefficients(self) -> list[float]:
        """The coefficients, lowest power first."""
        return interpolated(
            self.f, chebyshev_nodes(number(self.low), number(self.high), self.degree + 1)
        )

    def largest_error(self, coefficients: list[float], points: int = 400) -> Any:
        """The binary logarithm of the largest error on an even grid over the domain, ends included."""
        low, high = map(number, self.domain)
        grid = [low + i * (high - low) / points for i in range(points + 1)]
        errors = [self.error(x, self.f(x) - evaluated(coefficients, x)) for x in grid]
        return mp.log(max(map(abs, errors)), 2)


def number(text: str) -> Any:
    numerator, _, denominator = text.partition("/")
    return mp.mpf(numerator) / mp.mpf(denominator or 1)


def expm1_rest(r: Any) -> Any:
    """(expm1(r) - r) / r^2, by its series where the difference would cancel."""
    if abs(r) < mp.mpf(2) ** -60:
        return mp.mpf(1) / 2 + r / 6 + r * r / 24
    return (mp.expm1(r) - r) / r**2


def scaled_erfc(q: Any) -> Any:
    """(1 + 2 t) exp(t^2) erfc(t) with q = (t - 4) / (t + 4)."""
    t = 4 * (1 + q) / (1 - q)
    return (1 + 2 * t) * mp.exp(t * t) * mp.erfc(t)


def scaled_phi(q: Any) -> Any:
    """Phi(-t) exp(t^2 / 2) / w with w = 1 / (t + 6) and q = 1 - 12 w."""
    w = (1 - q) / 12
    t = 1 / w - 6
    return mp.erfc(t / mp.sqrt(2)) / 2 * mp.exp(t * t / 2) / w


def scaled_erfinv(q: Any) -> Any:
    """erfinv(x) / (x v) with v = 8 - log(1 - x^2) and q = 23/16 - 19.5 / v.

    y = erfinv(x) is the root of log(1 - erf(y)^2) + v - 8, which Newton's method descends to from above.
    """
    v = 19.5 / (mp.mpf(23) / 16 - q)
    if v == 8:
        return mp.sqrt(mp.pi) / 16  # at x = 0
    y = step = mp.sqrt(v - 7)
    while abs(step) > mp.ldexp(1, -380):
        c = mp.erfc(y)
        slope = 4 * (1 - c) / (c * (2 - c)) * mp.exp(-y * y) / mp.sqrt(mp.pi)
        step = (mp.log(c * (2 - c)) + v - 8) / slope
        y += step
    return y / (mp.sqrt(-mp.expm1(8 - v)) * v)


POLYNOMIALS = [
    Polynomial(
        name="Q of exp: expm1(r) = r + r^2 Q(r), |r| <= ln(2) / 2",
        f=expm1_rest,
        low="-0.34658",
        high="0.34658",
        degree=8,
        domain=("-0.34658", "0.34658"),
        # relative to expm1(r) and to exp(r), whichever is smaller
        error=lambda r, d: r**2 * d / min(abs(mp.expm1(r)), mp.exp(r)) if r else mp.mpf(0),
        bound="-48.3",
    ),
    Polynomial(
        name="P of Phi: Phi(-t) = exp(-t^2 / 2) w P(q), w = 1 / (t + 6), q = 1 - 12 w, 0 <= t <= 8",
        f=scaled_phi,
        low="-1",
        high="1/7",
        degree=15,
        domain=("-1", "1/7"),
        error=lambda q, d: d / scaled_phi(q),
        bound="-48.7",
    ),
    Polynomial(
        name="P of erfc: erfc(t) = exp(-t^2) P(q) / (1 + 2 t), q = (t - 4) / (t + 4), 0 <= t <= 26.4",
        f=scaled_erfc,
        low="-1",
        high="22.5/30.5",  # t = 26.5
        degree=22,
        domain=("-1", "22.4/30.4"),
        error=lambda q, d: d / scaled_erfc(q),
        bound="-53.8",
    ),
    Polynomial(
        name="R of erfinv: erfinv(x) = x v R(q), v = 8 - log(1 - x^2), q = 23/16 - 19.5 / v, |x| < 1",
        f=scaled_erfinv,
        low="-1",
        high="1",
        degree=37,
        domain=("-1", "0.995"),  # up to x = 1 - 2^-53
        error=lambda q, d: d / scaled_erfinv(q),
        bound="-53.9",
    ),
]


# ---- the list --------------------------------------------------------------------------------------

SERIES = {
    "exp (Taylor)": EXP,
    "expm1 (Taylor)": EXPM1,
    "log, log1p: 2 artanh (Taylor)": LOG,
    "sin (Taylor)": SIN,
    "cos (Taylor)": COS,
    "exp of a pair (Taylor)": PAIR_EXP,
    "sin of a pair (Taylor)": PAIR_SIN,
    "cos of a pair (Taylor)": PAIR_COS,
    "erf (Maclaurin)": ERF,
}


def main() -> None:
    for name, values in CONSTANTS.items():
        print(f"{name}: {' + '.join(x.hex() for x in values)}")
    print(f"bits of sqrt(1/2): {sqrt_half_bits():#x}")
    for name, values in SERIES.items():
        print(f"{name}, highest power first:", *(f"    {x.hex()}" for x in values), sep="\n")
    for p in POLYNOMIALS:
        values = p.coefficients()
        error = mp.nstr(p.largest_error(values), 5)
        print(f"{p.name}; error 2^{error}, bound 2^{p.bound}; lowest power first:")
        print(*(f"    {x.hex()}" for x in values), sep="\n")


if __name__ == "__main__":
    main()
