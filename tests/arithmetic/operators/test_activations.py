"""Inputs of activations that fail the rounding test in masses: ties of subnormal results."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import reproml
from reproml.arithmetic.compiler import evaluate, kernels
from reproml.arithmetic.numerics.rounding import nearest

UNIT = Fraction(2) ** -149


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("f", [F.gelu, partial(F.gelu, approximate="tanh"), F.silu])
def test_half_of_subnormal_numbers_is_rounded_up_at_ties(monkeypatch, f, compiled):
    """x / 2 + c x^2 with c > 0: between a midpoint and the next number above."""
    if not compiled:
        monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(evaluate, "exact_values", None)  # no element may take the slow path
    monkeypatch.setattr(evaluate, "exact_elements", None)
    counts = [1, 2, 3, 4, 5, 2**22 + 1, 2**23 - 1, 2**23 + 1, 2**24 - 1]
    x = torch.tensor([float(sign * n * UNIT) for n in counts for sign in (1, -1)] + [0.0, -0.0])
    with reproml.exact():
        y = f(x)
    above = [Fraction(v) / 2 + UNIT / 2**60 * (v != 0) for v in x.tolist()]
    expected = torch.tensor([nearest(v) for v in above]).copysign(x)
    assert y.view(torch.int32).tolist() == expected.view(torch.int32).tolist()
