"""Test the negative log-likelihood of csrc/losses.c on sums that fail the rounding test at first."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators import losses
from verification.oracle import Real, check

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")

HALF = 2.0**-24  # half an ulp of 1
ROWS = [
    [1.0, HALF], [1.0, -HALF / 2], [1 + 2 * HALF, HALF], [1.0, HALF + 2.0**-60],
    [2.0**60, 2.0**36, 2.0**-60], [2.0**60, 2.0**36, -(2.0**-60)], [3.0, -1.0, -2.0],
    [2.0**-149], [2.0**-149, 2.0**-148, 0.0, 0.0], [3.4028234663852886e38, 2.0**102, 2.0**102],
]  # fmt: skip


@pytest.mark.parametrize("copies", [1, 4, 3])
@pytest.mark.parametrize("reduction", [losses.MEAN, losses.SUM])
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 4.0], [1.0, 1.0, 1.0 + 2 * HALF]])
def test_nll_kernel_rounds_ties_and_near_ties(weight, reduction, copies, monkeypatch):
    for reference in ("rowwise", "reduce_sum"):
        monkeypatch.setattr(
            losses, reference, lambda *_, **__: pytest.fail("the reference path ran")
        )
    for row in ROWS:
        terms = [-x for x in row] * copies
        target = torch.arange(len(terms)) % 3
        x = torch.zeros(len(terms), 3)
        x[torch.arange(len(terms)), target] = torch.tensor(terms)
        w = None if weight is None else torch.tensor(weight)
        factors = [1.0 if w is None else float(w[i]) for i in target.tolist()]
        picked = x[torch.arange(len(terms)), target].tolist()
        exact = -sum(Fraction(a) * Fraction(f) for a, f in zip(picked, factors))
        total = sum(map(Fraction, factors))
        loss, weights = losses.nll_loss(x, target, w, reduction, -100)
        if exact or reduction == losses.MEAN:
            mean = reduction == losses.MEAN
            check(loss.reshape(1), [Real(exact / total if mean else exact)])
        else:
            assert loss == 0
        check(weights.reshape(1), [Real(total)])
