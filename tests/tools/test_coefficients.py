"""The constants in the Python and C sources are those that tools/coefficients.py computes, bit for bit."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from reproml.arithmetic.numerics import elementary
from tools import coefficients
from tools.coefficients import CONSTANTS, POLYNOMIALS, SERIES

ROOT = Path(__file__).resolve().parents[2]
C_SOURCES = "\n".join(
    path.read_text("utf-8") for path in sorted(ROOT.glob("reproml/arithmetic/csrc/**/*.[ch]"))
)
INTERPOLATED = {p.name: p.coefficients() for p in POLYNOMIALS}

NUMBER = r"(?:0x[0-9a-fA-F]+(?:\.[0-9a-fA-F]*)?p[+-]?\d+|\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
MACROS = dict(re.findall(rf"#define (\w+) (-?{NUMBER})\s", C_SOURCES))
TERM = rf"(?:(?:{'|'.join(MACROS)})(?!\w)|{NUMBER}(?: / {NUMBER})?)"


def value_of(text: str) -> float:
    """The value of a C constant: a literal, a quotient of two, or the name of a macro; with a sign."""
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.lstrip("+-")
    if text in MACROS:
        return sign * value_of(MACROS[text])
    numerator, *denominator = [
        float.fromhex(x) if x.startswith("0x") else float(x) for x in text.split(" / ")
    ]
    return sign * (numerator / denominator[0] if denominator else numerator)


def horner_schemes(source: str) -> list[list[float]]:
    """The coefficients, highest power first, of `y = c_n; y = y * x + c_(n-1); ...` for any names."""
    pattern = rf"\b(\w+) = (?:(-?{TERM})(?=[,;])|\1 \* [\w.]+ ([+-]) ({TERM});)"
    running: dict[str, list[float]] = defaultdict(list)
    found = []
    for name, first, sign, other in re.findall(pattern, source):
        if first:
            found.append(running.pop(name, []))
            running[name] = [value_of(first)]
        elif name in running:
            running[name].append(value_of(sign + other))
    return [scheme for scheme in [*found, *running.values()] if len(scheme) > 3]


def bits(values: list[float]) -> list[str]:
    return [x.hex() for x in values]


def test_python_series_are_bit_equal():
    for name, found in [
        ("exp (Taylor)", elementary._EXP),
        ("expm1 (Taylor)", elementary._EXPM1),
        ("log, log1p: 2 artanh (Taylor)", elementary._LOG),
        ("sin (Taylor)", elementary._SIN),
        ("cos (Taylor)", elementary._COS),
        ("erf (Maclaurin)", elementary._ERF),
    ]:
        assert bits(found) == bits(SERIES[name]), name


def test_python_constants_are_bit_equal():
    assert [elementary._INV_LN2] == CONSTANTS["1 / ln 2"]
    assert [elementary._LN2_HIGH, elementary._LN2_LOW] == CONSTANTS["ln 2"]
    assert elementary._PIO2 == CONSTANTS["pi / 2"]
    assert elementary._SQRT_HALF_BITS == coefficients.sqrt_half_bits()
    for name, found in [("erfc", elementary._ERFC), ("erfinv", elementary._ERFINV)]:
        (values,) = (values for of, values in INTERPOLATED.items() if f" of {name}:" in of)
        assert bits(found) == bits(values), name


def test_long_literals_in_python_are_known():
    """A literal of many digits in elementary.py is one of the constants."""
    tree = ast.parse(Path(elementary.__file__).read_text("utf-8"))
    literals = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    long = {x for x in literals if isinstance(x, float) and len(repr(x)) > 12 and x > 2.0**-40}
    assert len(long) >= 2 and long <= {x for values in CONSTANTS.values() for x in values}


def test_polynomials_in_c_are_bit_equal():
    """Each polynomial is in the C sources, and the C sources have no other."""
    expected = [*SERIES.values(), *(values[::-1] for values in INTERPOLATED.values())]
    found = horner_schemes(C_SOURCES)
    assert sorted(map(bits, found)) == sorted(map(bits, expected))


def test_constants_in_c_are_bit_equal():
    """Each constant is in the C sources, and each literal of many digits is a constant or a coefficient."""
    literals = set(re.findall(rf"(?<![\w.]){NUMBER}", C_SOURCES))
    values = {value_of(text): text for text in literals}
    for name in CONSTANTS:
        assert set(CONSTANTS[name]) <= set(values), name
    assert f"0x{coefficients.sqrt_half_bits():X}" in C_SOURCES
    known = [*CONSTANTS.values(), *SERIES.values(), *INTERPOLATED.values()]
    known_values = {abs(x) for constants in known for x in constants}
    long = {x for x, text in values.items() if "." in text and len(text) > 15}
    assert len(long) > 60
    assert {values[x] for x in long if x not in known_values and 1 / x not in known_values} == set()


@pytest.mark.parametrize("polynomial", POLYNOMIALS, ids=lambda p: p.name.partition(":")[0])
def test_error_bound_of_polynomial_holds(polynomial):
    error = polynomial.largest_error(INTERPOLATED[polynomial.name])
    assert error < coefficients.number(polynomial.bound)


@pytest.mark.parametrize("name, bits_free", [("ln 2", [16]), ("pi / 2", [20, 20])])
def test_leading_numbers_of_splits_are_short(name, bits_free):
    """Their products with integers of so many bits are exact, and the split is precise to 2^-93."""
    *leading, last = CONSTANTS[name]
    for x, free in zip(leading, bits_free):
        assert (x * (2**free - 1)) / (2**free - 1) == x
        assert int(float.hex(x).split("p")[0].replace(".", "")[2:], 16) % 2**free == 0
    exact = coefficients.mp.log(2) if name == "ln 2" else coefficients.mp.pi / 2
    assert abs(exact - sum(map(coefficients.mp.mpf, leading)) - last) < 2.0**-93
    assert last


def test_script_prints_every_name(capsys):
    coefficients.main()
    printed = capsys.readouterr().out
    for name in [*CONSTANTS, *SERIES, *INTERPOLATED]:
        assert name in printed
    assert elementary._ERFC[-1].hex() in printed
