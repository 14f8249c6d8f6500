"""The oracle agrees with IEEE 754 hardware."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from verification import oracle
from verification.oracle import Real


@given(st.one_of(st.floats(), st.integers(-(2**26), 2**26).map(lambda n: n * 2.0**-150)))
def test_float_of_rounds_like_the_hardware(x):
    with np.errstate(over="ignore"):
        expected = np.float64(x).astype(np.float32)
    found = oracle.float_of(Real(x))
    assert (math.isnan(x) and math.isnan(found)) or (
        np.float32(found).tobytes() == expected.tobytes()
    )


@given(st.floats(width=32), st.floats(width=32))
def test_operations_follow_ieee_754(x, y):
    a, b = np.float32(x), np.float32(y)
    with np.errstate(all="ignore"):
        for found, expected in [
            (Real(x) + Real(y), a + b),
            (Real(x) - Real(y), a - b),
            (Real(x) * Real(y), a * b),
            (Real(x) / Real(y), a / b),
            (oracle.sqrt(Real(x)), np.sqrt(a)),
        ]:
            value = np.float32(oracle.float_of(found))
            assert value.tobytes() == expected.tobytes() or (np.isnan(value) and np.isnan(expected))


def test_ties_and_underflow_follow_ieee_754():
    assert oracle.float_of(Real(Fraction(2**25 + 2))) == 2**25
    assert oracle.float_of(Real(Fraction(2**25 + 6))) == 2**25 + 8
    assert oracle.bits_of(Real(-Fraction(1, 2**150))) == 0x80000000
    assert oracle.bits_of(Real(-Fraction(3, 2**151))) == 0x80000001
    assert oracle.bits_of(Real(2**128 - 2**103)) == 0x7F800000
    assert oracle.bits_of(Real(2**128 - 2**103 - 1)) == 0x7F7FFFFF
    assert oracle.bits_of(oracle.exp(Real(-1e30))) == 0
