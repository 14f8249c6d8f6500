"""Operators on bfloat16 and float16 tensors: all numbers as operands, type promotion, and bad input."""

from __future__ import annotations

import math
from typing import Any, Callable

import numpy as np
import pytest
import torch

import reproml
from tests.arithmetic.test_operator_table import CASES
from verification import oracle as o

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
aten = torch.ops.aten

# ---- all 65,536 operands of unary operators ------------------------------------------------------

_erf, _erfc = (np.vectorize(f, otypes=[float]) for f in (math.erf, math.erfc))
ROOT_2, SLOPE = math.sqrt(2), 2 * math.sqrt(2 / math.pi)


def _sigmoid(x: Any) -> Any:
    e = np.exp(-abs(x))
    return np.where(x < 0, e, 1.0) / (1 + e)


def _softplus(x: Any) -> Any:
    return np.maximum(x, 0) + np.log1p(np.exp(-abs(x)))


def _lgamma(x: Any) -> Any:
    return torch.lgamma(torch.from_numpy(x)).numpy()


def _digamma(x: Any) -> Any:
    return torch.digamma(torch.from_numpy(x)).numpy()


def _nearest_even(x: Any) -> Any:
    return np.where(x == 0, x, np.copysign(np.rint(abs(x)), x))


float32 = np.float32
# name of the table or of DATA_MOVEMENT -> other arguments, a binary64 evaluation on finite numbers other than 0
UNARY: dict[str, tuple[tuple[Any, ...], Callable[[Any], Any]]] = {
    "exp": ((), np.exp),
    "exp2": ((), np.exp2),
    "expm1": ((), np.expm1),
    "log": ((), np.log),
    "log2": ((), np.log2),
    "log10": ((), np.log10),
    "log1p": ((), np.log1p),
    "sin": ((), np.sin),
    "cos": ((), np.cos),
    "tan": ((), np.tan),
    "sinh": ((), np.sinh),
    "cosh": ((), np.cosh),
    "tanh": ((), np.tanh),
    "asin": ((), np.arcsin),
    "acos": ((), np.arccos),
    "atan": ((), np.arctan),
    "asinh": ((), np.arcsinh),
    "acosh": ((), np.arccosh),
    "atanh": ((), np.arctanh),
    "sinc": ((), np.sinc),
    "erf": ((), _erf),
    "erfc": ((), _erfc),
    "erfinv": ((), lambda x: torch.erfinv(torch.from_numpy(x)).numpy()),
    "lgamma": ((), _lgamma),
    "digamma": ((), _digamma),
    "logit": ((), lambda x: np.log(x) - np.log1p(-x)),
    "special_entr": ((), lambda x: np.where(x > 0, -x * np.log(abs(x)), -np.inf)),
    "sigmoid": ((), _sigmoid),
    "silu": ((), lambda x: x * _sigmoid(x)),
    "gelu": ((), lambda x: x * _erfc(-x / ROOT_2) / 2),
    "softplus": ((), lambda x: np.where(x > 20, x, _softplus(x))),
    "mish": ((), lambda x: x * np.tanh(_softplus(x))),
    "log_sigmoid_forward": ((), lambda x: -_softplus(-x)),
    "elu": ((), lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
    "celu": ((1.0,), lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
    "leaky_relu": ((), lambda x: np.where(x > 0, x, x * float(float32(0.01)))),
    "hardsigmoid": ((), lambda x: (np.clip(x, -3, 3) + 3) / 6),
    "hardswish": ((), lambda x: x * (np.clip(x, -3, 3) + 3) / 6),
    "softshrink": ((), lambda x: np.where(abs(x) > 0.5, x - np.copysign(0.5, x), x * 0)),
    "hardshrink": ((), lambda x: np.where(abs(x) > 0.5, x, 0.0)),
    "sqrt": ((), np.sqrt),
    "rsqrt": ((), lambda x: 1 / np.sqrt(x)),
    "reciprocal": ((), np.reciprocal),
    "pow": ((2,), np.square),
    "frac": ((), lambda x: x - np.trunc(x)),
    "round": ((), _nearest_even),
    "deg2rad": ((), np.deg2rad),
    "rad2deg": ((), np.rad2deg),
    "angle": ((), lambda x: np.where(x < 0, math.pi, 0.0)),
}
# These lose digits near a zero of the function: the error is relative to 1 + |y|.
LOOSE = ("lgamma", "digamma", "logit", "sinc")
MARGIN = 2.0**-40  # several thousand times the error of these evaluations


def nearest(x: Any, dtype: torch.dtype) -> Any:
    """Round float64 numbers once to the format, in numpy."""
    precision, lowest, top = o.FORMATS[dtype][:3]
    last = np.maximum(np.frexp(x)[1] - precision, lowest)
    with np.errstate(all="ignore"):
        y = np.ldexp(np.rint(np.ldexp(x, -last)), last)
    return np.where(abs(y) >= 2.0**top, np.copysign(np.inf, y), np.where(np.isfinite(x), y, x))


def bits(x: torch.Tensor) -> Any:
    """Return the bit patterns of 16-bit numbers, -1 for NaN."""
    return torch.where(x.isnan(), -1, x.view(torch.int16).long() & 0xFFFF).numpy()


def all_numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def expected_bits(name: str, dtype: torch.dtype) -> Any:
    """Return the bits of the exact results, rounded once: of binary64 numbers where their error permits."""
    rest, wide = UNARY[name]
    operands = all_numbers(dtype)
    x = operands.double().numpy()
    ordinary = np.isfinite(x) & (x != 0)
    with np.errstate(all="ignore"):
        y = wide(np.where(ordinary, x, 0.75))
        error = MARGIN * (abs(y) + (name in LOOSE))
        low, high = (
            nearest(np.where(np.isfinite(y) & (y != 0), y + e, y), dtype) for e in (-error, error)
        )
    same = (low == high) & (np.signbit(low) == np.signbit(high))
    decided = ordinary & (np.isnan(y) | same)
    expected = bits(torch.from_numpy(np.where(decided, low, 0.0)).to(dtype))
    expected[np.isnan(x)] = -1
    left = np.flatnonzero(~decided & ~np.isnan(x))
    with o.rounding_to(dtype):
        exact = CASES[name][0].oracle(operands[torch.from_numpy(left)], *rest)
        exact = exact[0] if isinstance(exact, tuple) else exact
        expected[left] = [o.bits_of(o.real(v)) for v in exact]
    return expected


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", UNARY)
def test_unary_operator_is_exact_for_all_numbers(name, dtype):
    x = all_numbers(dtype)
    with reproml.exact():
        found = getattr(aten, name)(x, *UNARY[name][0])
    found = found[0] if isinstance(found, tuple) else found
    assert found.dtype is dtype
    wrong = bits(found) != expected_bits(name, dtype)
    shown = [(v.item(), found[i].item()) for i, v in enumerate(x) if wrong[i]][:5]
    assert not wrong.any(), f"{wrong.sum()} wrong: {shown}"
