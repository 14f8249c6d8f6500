from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reproml.diff.ulps import Distance, distance, largest_difference
from reproml.errors import ReproError


@given(st.floats(-(2.0**127), 2.0**127, width=32), st.integers(0, 50))  # short of infinity
def test_neighbour_is_one_ulp_away(x, steps):
    """np.nextafter goes from -0 to the smallest positive number: the two zeros are one place to it."""
    y = np.float32(x)
    for _ in range(steps):
        y = np.nextafter(y, np.float32(np.inf))
    zero = x < 0 <= y or (x == 0 and np.signbit(x) and steps > 0)
    d = distance(torch.tensor([x]), torch.tensor([float(y)]))
    assert d is not None and np.isfinite(y)
    crossed = 1 if zero and not (y == 0 and np.signbit(y)) else 0
    assert d.ulps == steps + crossed and (d.elements, d.of) == (int(d.ulps > 0), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_format(dtype):
    one, eps = torch.ones(3, dtype=dtype), torch.finfo(dtype).eps
    other = torch.tensor([1.0, 1.0 + 2 * eps, -1.0], dtype=torch.float64).to(dtype)
    d = distance(one, other)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    assert d == Distance(2 * int(one[:1].view(bits)) + 1, 2, 3)  # down to +0, -0, and as far again


def test_complex_parts_are_compared():
    x = torch.tensor([1 + 2j, 3j])
    assert distance(x, x) == Distance(0, 0, 4)
    assert distance(x, x + torch.tensor([1, 0])) == Distance(2**23, 1, 4)


def test_dtype_without_digest_is_refused():
    x = torch.ones(2).to(torch.float8_e4m3fn)
    with pytest.raises(ReproError, match="float8_e4m3fn cannot be compared"):
        distance(x, x)


def test_integers_and_other_shapes_have_no_ulps():
    assert distance(torch.tensor([1, 2]), torch.tensor([1, 3])) == Distance(None, 1, 2)
    assert distance(torch.zeros(2), torch.zeros(3)) is None
    assert distance(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) is None
    assert distance(torch.zeros(0), torch.zeros(0)) == Distance(0, 0, 0)


def test_first_difference_is_the_largest():
    x = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    near, far = torch.tensor([1.0, 1.0 + 2**-23]), torch.tensor([1.0, 1.5])
    assert largest_difference(x, x) is None
    assert largest_difference(x, {**x, "b": near}) == ("b", Distance(1, 1, 2))
    assert largest_difference(x, {**x, "a": near, "b": far}) == ("b", Distance(2**22, 1, 2))
    assert largest_difference(x, {**x, "c": torch.ones(3)}) == ("c", None)
    assert largest_difference(x, {"a": x["a"]}) == ("b", None)


def test_all_nans_are_equal():
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32)
    found = distance(bits.view(torch.float32), torch.full((3,), torch.nan))
    assert found == Distance(0, 0, 3)
