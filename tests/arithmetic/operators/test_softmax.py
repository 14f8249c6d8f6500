"""Sums of exponentials that are infinite."""

from __future__ import annotations

import math

import pytest
import torch

import reproml

INF, NAN = math.inf, math.nan


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("row", "sums"),
    [
        ([0.0, INF, 1.0], [0.0, INF, INF]),
        ([INF, INF], [INF, INF]),
        ([-INF, INF], [-INF, INF]),
        ([-INF, -INF], [-INF, -INF]),
        ([INF, NAN, INF], [INF, NAN, NAN]),
        ([0.0, -INF], [0.0, 0.0]),
    ],
)
def test_logsumexp_of_infinities_is_the_logarithm_of_their_sum(row, sums, dtype):
    x = torch.tensor([row, row], dtype=dtype)
    expected = torch.tensor([sums, sums], dtype=dtype)
    with reproml.exact():
        found = x.logcumsumexp(1), x.T.logcumsumexp(0).T
        last = x.logsumexp(1), x.T.logsumexp(0, keepdim=True)[0], x[0].logsumexp(0)
        both = x.logsumexp((0, 1)) if math.isinf(sums[-1]) else expected[0, -1]
    for y in found:
        assert torch.equal(y.nan_to_num(nan=2.0), expected.nan_to_num(nan=2.0))
    for y in (*last, both):
        assert (y.isnan() if math.isnan(sums[-1]) else y == sums[-1]).all()
