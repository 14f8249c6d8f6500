"""Windows and logspace against mpmath."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.operators import special
from verification.functions import i0
from verification.oracle import Real, check, mp, rounding_to, sqrt

few = settings(max_examples=20, deadline=None)
numbers = st.floats(-40, 40, width=32)


def cosine(t: Fraction, times: int = 1) -> Real:
    return Real(mp.cospi(2 * times * mp.mpf(t.numerator) / t.denominator))


# name -> the window as a function of the place in it, from 0 to 1
WINDOWS = {
    "hann": lambda t: (1 - cosine(t)) / 2,
    "hamming": lambda t: Real(0.54) - Real(0.46) * cosine(t),
    "blackman": lambda t: Fraction(42, 100) - cosine(t) / 2 + cosine(t, 2) * Fraction(8, 100),
    "bartlett": lambda t: Real(1 - abs(2 * t - 1)),
    "kaiser": lambda t: i0(12 * sqrt(Real(4 * t * (1 - t)))) / i0(Real(12)),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_windows_are_rounded_once(name, periodic, dtype):
    window = getattr(torch, f"{name}_window")
    with reproml.exact(), rounding_to(dtype):
        assert window(0, dtype=dtype).shape == (0,) and window(1, dtype=dtype).tolist() == [1.0]
        for length in (2, 3, 16, 25):
            last = length if periodic else length - 1
            wanted = [WINDOWS[name](Fraction(i, last)) for i in range(length)]
            check(window(length, periodic, dtype=dtype), wanted, True)
        with pytest.raises(reproml.NotExactError, match="complex"):
            window(4, dtype=torch.complex64)
    close = torch.tensor([float(x.mpf) for x in wanted])
    assert torch.allclose(window(25, periodic), close, atol=1e-6)


def test_parameters_of_windows_are_used():
    with reproml.exact():
        hamming = torch.hamming_window(4, True, 0.75, 0.25)
        kaiser = torch.kaiser_window(4, False, 2.5)
    assert hamming.tolist() == [0.5, 0.75, 1.0, 0.75]
    places = [Fraction(i, 3) for i in range(4)]
    check(kaiser, [i0(2.5 * sqrt(Real(4 * t * (1 - t)))) / i0(Real(2.5)) for t in places])


@pytest.mark.parametrize("name", [*WINDOWS, "logspace"])
def test_long_windows_need_few_long_numbers(name, monkeypatch):
    found, value = [], special._value

    def counted(function, x):
        found.append(x)
        return value(function, x)

    monkeypatch.setattr(special, "_value", counted)
    n = 3000
    with reproml.exact():
        if name == "logspace":
            x = torch.logspace(0.1, 0.7, n)
        else:
            x = getattr(torch, f"{name}_window")(n)
    assert len(found) < 4
    places = [0, 1, 2, 499, 500, 749, 750, 751, 1000, 1499, 1500, 1501, 2250, 2998, 2999]
    if name == "logspace":
        slope = (Fraction(0.7) - Fraction(0.1)) / (n - 1)
        wanted = [Real(mp.power(10, Real(Fraction(0.1) + i * slope).mpf)) for i in places]
    else:
        wanted = [WINDOWS[name](Fraction(i, n)) for i in places]
    check(x[places], wanted, True)


def test_infinite_parameters_of_windows_are_refused():
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="parameters"):
        torch.hamming_window(4, True, float("inf"), 0.5)


def test_zeros_of_windows_are_positive():
    with reproml.exact():
        assert torch.hamming_window(12, True, 0.0, 1.0)[[3, 9]].signbit().tolist() == [False] * 2


@few
@given(
    numbers,
    numbers,
    st.integers(0, 8),
    st.sampled_from([10.0, 2.0, 0.3, 1.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_logspace_is_rounded_once(start, end, steps, base, dtype):
    if dtype is torch.float64:
        start *= 9  # some of the results overflow, or are subnormal
    with reproml.exact():
        x = torch.logspace(start, end, steps, base, dtype=dtype)
        from_tensor = torch.logspace(
            torch.tensor(start, dtype=dtype), end, steps, base, dtype=dtype
        )
        assert torch.equal(x, from_tensor)
    slope = (Fraction(end) - Fraction(start)) / max(steps - 1, 1)
    powers = [Fraction(start) + i * slope for i in range(steps)]
    wanted = [
        mp.mpf(base) ** int(p) if p.denominator == 1 else mp.exp(Real(p).mpf * mp.log(base))
        for p in powers
    ]
    with rounding_to(dtype):
        check(x, [Real(v) for v in wanted])


def test_logspace_needs_positive_base():
    with reproml.exact(), pytest.raises(reproml.NotExactError, match="use a positive base"):
        torch.logspace(0, 2, 3, -2.0)


def test_ends_of_logspace_are_not_rounded_to_16_bits():
    with reproml.exact():
        found = torch.logspace(torch.tensor(1.2), torch.tensor(0.0), 2, dtype=torch.bfloat16)
    assert found.tolist() == [15.875, 1.0]  # 10^1.2 is 15.849; 10^1.203125 would be 15.9375
