"""Operators on bfloat16 and float16 tensors round once, also where PyTorch does it in one operation."""

from __future__ import annotations

import math

import pytest
import torch

import reproml
from reproml.arithmetic.numerics import formats
from verification import oracle
from verification.oracle import check

DTYPES = [torch.bfloat16, torch.float16]
SYMBOLS = {"add": "__add__", "sub": "__sub__", "mul": "__mul__", "div": "__truediv__"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.mul, torch.div])
def test_operation_on_two_tensors_is_rounded_once(operation, dtype):
    """Results that are normal, subnormal, zero, infinite and midpoints."""
    to, random = formats.FORMATS[dtype], torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**15), 2**15, (2, 3000), generator=random).to(torch.int16)
    x, y = bits.view(dtype)
    small = torch.randint(-(2**to.precision), 2**to.precision, (2, 2000), generator=random)
    x = torch.cat([x, (small[0] * 2.0**to.lowest).to(dtype), torch.tensor([1.0, -0.0]).to(dtype)])
    y = torch.cat([y, small[1].to(dtype), torch.tensor([2.0**-to.precision, 0.0]).to(dtype)])
    expected = [
        getattr(oracle.real(a), SYMBOLS[operation.__name__])(oracle.real(b))
        for a, b in zip(x.tolist(), y.tolist())
    ]
    with oracle.rounding_to(dtype), reproml.exact():
        check(operation(x, y), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", [torch.add, torch.sub, torch.mul, torch.div])
def test_operation_with_a_float32_tensor_in_place_is_rounded_once(operation, dtype):
    """Numbers of 24 bits, of which some results are just beside a midpoint of 16-bit numbers."""
    to, random = formats.FORMATS[dtype], torch.Generator().manual_seed(3)
    x = torch.randn(2000, generator=random).to(dtype)
    y = torch.randn(2000, generator=random)
    half = 2.0**-to.precision
    x[:3], y[:3] = 1.0, torch.tensor([half, half * (1 + 2.0**-20), half * (1 - 2.0**-20)])
    x[3:9], y[3:9] = (
        1 + 2 * half,
        torch.tensor([1 + half, 1 - half, 1 + half / 2, 3.0, 1 / 3, half]),
    )
    name = operation.__name__
    expected = [
        getattr(oracle.real(a), SYMBOLS[name])(oracle.real(b))
        for a, b in zip(x.tolist(), y.tolist())
    ]
    with oracle.rounding_to(dtype), reproml.exact():
        check(getattr(x, f"{name}_")(y), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_numbers_are_rounded_once(dtype):
    """Numbers beside midpoints, normal and subnormal, on either side and by less than float32 holds."""
    to = formats.FORMATS[dtype]
    found = []
    for exponent in (0, 5, -10, to.lowest + to.precision - 2, to.lowest + 3, to.lowest, to.top - 1):
        last = max(exponent - to.precision + 1, to.lowest)
        for odd in (1, 3, 5, 2**to.precision - 1):
            m = 2.0**exponent + odd * 2.0 ** (last - 1)
            found += [
                m,
                m * (1 + 2.0**-40),
                m * (1 - 2.0**-40),
                m * (1 + 2.0**-24),
                -m * (1 + 2.0**-52),
            ]
    found += [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-300, -(2.0**-300), 1e300]
    x = torch.tensor(found, dtype=torch.float64)
    with formats.rounding_to(dtype), oracle.rounding_to(dtype):
        check(formats.narrow(x).to(dtype), [oracle.real(v) for v in found])
        for i, v in enumerate(found):  # tensors without axes
            check(formats.narrow(x[i]).to(dtype).reshape(1), [oracle.real(v)])
