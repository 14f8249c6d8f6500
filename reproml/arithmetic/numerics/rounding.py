"""From a real number to the nearest binary32 number, ties to even.

Ziv's rounding test (A. Ziv, ACM TOMS 17(3), 1991): if the exact value lies in [c - e, c + e] and
both ends round to the same binary32 number, rounding being monotone, so does the exact value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable

import torch
from torch import Tensor

U = 2.0**-53  # unit roundoff of binary64
# Bounds are themselves computed in binary64; this much covers their own rounding errors.
SLACK = 1 + 2.0**-20
# Absolute error of a binary64 operation that underflows, with a wide margin (see elementary.exp).
TINY = 2.0**-1000

# Where the test failed: flat indices, int64 [k] -> the k correctly rounded values.
Resolve = Callable[[Tensor], Sequence[float]]


def _read_at_once(failed: Tensor, c: Tensor) -> bool:
    return False


# Whether the outcome of a test is noted, to be read later; the log of a device's operators
# (dispatch/deferred.py) puts itself here.
defer_test: Callable[[Tensor, Tensor], bool] = _read_at_once


def gamma(n: Any) -> Any:
    """Bound of the relative error of a binary64 sum of `n` terms, in any order, with or without FMA.

    n: a number, or a float64 tensor of them.

    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1. The sum
    is returned with room for the rounding of the test itself (3 more operations) and of the bound.
    """
    n = n + 3
    return n * U / (1 - n * U) * SLACK


def round_ball(c: Tensor, e: Tensor, resolve: Resolve) -> Tensor:
    """Round to binary32 the real numbers that lie within `e` of `c`.

    c, e: float64 tensors of one shape, e >= 0. A c that is NaN or infinite is the result itself.
    resolve: called for the elements that fail the test.
    Returns a float32 tensor. A zero has the sign of c. On a device what fails may wait (deferred.py).
    """
    # c - e and c + e are rounded as well, by up to U |c|: onto a midpoint, perhaps, of which the number
    # is on the other side.
    e = torch.where(e == 0, e, e * SLACK + 2 * U * c.abs()) + TINY
    result = c.float()
    failed = (c - e).float() != (c + e).float()  # also where c or e is NaN
    # Of what underflows, the sign has to be sure as well.
    failed |= (result == 0) & (c.abs() <= e) & (e > 2 * TINY)
    if not defer_test(failed, c) and failed.any():
        overwrite_failures(result, c, failed.reshape(-1).nonzero().squeeze(1), resolve)
    return result


def round_sum(c: Tensor, e: Tensor, resolve: Resolve) -> Tensor:
    """Like `settle`, for sums and dot products: the order in which c was summed may be any.

    So not even the sign of a zero may come from c: the test compares bit patterns, -0 with +0 fails,
    and an exact zero is +0. `e` already has room for the test (see `gamma`).
    """
    result = (c + e).float()
    failed = (c - e).float().view(torch.int32) != result.view(torch.int32)
    if defer_test(failed, c):
        return torch.where(failed, (c + 0.0).float(), result)  # mostly right: a tie, or a zero
    if failed.any():
        overwrite_failures(result, c, failed.reshape(-1).nonzero().squeeze(1), resolve)
    return result


def overwrite_failures(result: Tensor, c: Tensor, index: Tensor, resolve: Resolve) -> None:
    """Put the exact values into `result` at the flat indices where the test failed."""
    if not result.dim():
        return overwrite_failures(result.view(1), c.view(1), index, resolve)
    where = torch.unravel_index(index, result.shape)
    at = c[where]
    value = at.float()  # right where c is NaN or infinite
    rest = at.isfinite()
    if rest.any():
        exact = torch.tensor(resolve(index[rest]), dtype=torch.float64, device=value.device)
        value[rest] = exact.float()
    result[where] = value
    return None


def nearest(x: Fraction) -> float:
    """The binary32 number nearest to x, ties to even, as a Python float; infinity on overflow."""
    if x == 0:
        return 0.0
    n, d = abs(x.numerator), x.denominator
    # The exponent of the last place: 24 bits, and not below that of the subnormal numbers.
    last = max(n.bit_length() - d.bit_length() - 24, -149)
    while True:
        q, r = divmod(n << max(-last, 0), d << max(last, 0))
        if q < 1 << 24:
            break
        last += 1
    rest = 2 * r - (d << max(last, 0))
    if rest > 0 or (rest == 0 and q % 2):
        q += 1
    value = math.ldexp(q, last) if q.bit_length() + last <= 128 else math.inf
    return -value if x < 0 else value


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """s + t = a + b exactly, s rounded (Knuth, The Art of Computer Programming 2, section 4.2.2)."""
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)
