"""Rounding of real numbers to the target format, to nearest with ties to even.

The target is binary32, or that of an operator on other tensors (formats.py).

The rounding test (A. Ziv, ACM TOMS 17(3), 1991): if an exact value lies between two binary64 numbers, and
both of these ends round to the same number of the target, then so does the exact value, as rounding is
monotone. `rounding_test` is the only place in Python where the test is written. It assumes that the exact
value lies between the ends as they were computed, so each caller must give its error bound enough room for
the roundings that it does not count:

- of the bound itself, which is computed in binary64 as well (SLACK);
- of `mid - error` and `mid + error`, by U |mid| each: an end might be rounded onto a midpoint of binary32
  while the exact value lies on the midpoint's other side;
- of results that underflow in binary64 (TINY).

| caller                    | bound of the error     | SLACK     | U |mid|   | TINY  | sign of a zero |
|---------------------------|------------------------|-----------|-----------|-------|----------------|
| `round_ball`              | Ball.error             | `widened` | `widened` | added | mid's if known |
| `round_sum`               | size gamma(n)          | `gamma`   | `gamma`   | -     | both ends', +0 |
| exact_sums._by_two_sum    | lost gamma(n)          | `gamma`   | -         | -     | +0             |
| evaluate._at_bits         | Ball.error             | ctx.u     | ctx.u     | -     | both ends'     |
| partial_sums._round_totals| size gamma(height + W) | `gamma`   | `gamma`   | -     | both ends', +0 |
|                           | + what packing lost    |           |           |       |                |
| running_sums.total        | 0: the sum is exact    | -         | -         | -     | +0             |
| batch norm, distributed   | Ball.error             | `widened` | `widened` | added | both ends'     |

"size" is a bound of the sum of absolute values, "lost" the sum of the absolute rounding errors that TwoSum
kept, W the number of workers. "both ends'": ends of different signs fail. "+0": an exact zero is +0.

Why some need no room ("-"): the terms of a sum are products of at most four binary32 numbers, multiples of
2^-596, so no sum underflows. `_by_two_sum` and `total` round each end once, and fail where that gives a
midpoint. mpmath's exponents are unbounded, and ctx.u is twice its unit roundoff.

The kernels in csrc have the same test with the same constants. tests/arithmetic/numerics/test_rounding.py
shows for each bound in Python that the ends enclose the exact value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.numerics.formats import narrow, target

U = 2.0**-53  # unit roundoff of binary64
# Bounds are themselves computed in binary64; this factor covers their own rounding errors.
SLACK = 1 + 2.0**-20
# Absolute error of a binary64 operation that underflows, with a wide margin (see elementary.exp).
TINY = 2.0**-1000

# Computes the correctly rounded values of the elements that failed the test, on the exact path. Takes
# their flat indices, int64 [k]; returns k numbers of the target format.
Resolve = Callable[[Tensor], Sequence[float]]


def _never_defer(failed: Tensor, mid: Tensor) -> bool:
    return False


# Hook: whether somebody else reads later what failed, so that the host does not wait for a device here. The
# dispatcher assigns replay_log.defer_test; without a dispatcher each outcome is read at once.
defer_test: Callable[[Tensor, Tensor], bool] = _never_defer


def rounding_test(low: Tensor, high: Tensor, zeros_agree: bool = False) -> tuple[Tensor, Tensor]:
    """Round to the target the exact values that lie in [low, high], and find those that it cannot round.

    low, high: float64 tensors of one shape, the computed ends. See the module's docstring for what they
    must enclose.
    zeros_agree: whether the ends may round to zeros of different signs; the caller then decides the sign.
    Returns (rounded, failed): of the target's container, correct wherever `failed`, a bool tensor, is
    False. A NaN at both ends is a failure with `zeros_agree`; otherwise the result is NaN.
    """
    rounded, below = narrow(high), narrow(low)
    if zeros_agree:
        return rounded, below != rounded
    return rounded, _bits(below) != _bits(rounded)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype is torch.float64 else torch.int32)


def gamma(n: Any) -> Any:
    """Return a bound of the relative error of a binary64 sum of `n` terms, added in any order.

    It holds with or without FMA. n: a number, or a float64 tensor of numbers.

    Source: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1. The bound has
    room for the roundings of the test itself (3 more operations) and of the bound (SLACK).
    """
    n = n + 3
    return n * U / (1 - n * U) * SLACK


def widened(error: Tensor, size: Tensor) -> Tensor:
    """Return a bound with room for its own roundings and those of `mid - error` and `mid + error`.

    error, size: float64 tensors, the bound without that room and |mid|.
    """
    return error * SLACK + 2 * U * size


def round_ball(mid: Tensor, error: Tensor, resolve: Resolve) -> Tensor:
    """Round to the target the real numbers that lie within `error` of `mid`.

    mid, error: float64 tensors of one shape, error >= 0. A NaN or infinite midpoint is the result itself.
    resolve: called for the elements that fail the test.
    Returns a tensor of the target's container. A zero has the sign of `mid`. On a device, failed elements
    may be resolved later (see `defer_test`).
    """
    size = mid.abs()
    error = torch.where(error == 0, error, widened(error, size)) + TINY
    _, failed = rounding_test(mid - error, mid + error, zeros_agree=True)
    result = narrow(mid)
    # Where the result underflows to zero, its sign must be certain as well.
    failed |= (result == 0) & (size <= error) & (error > 2 * TINY)
    if not defer_test(failed, mid) and failed.any():
        _overwrite_failures(result, mid, failed.reshape(-1).nonzero().squeeze(1), resolve)
    return result


def round_sum(mid: Tensor, error: Tensor, resolve: Resolve) -> Tensor:
    """Round like `round_ball`, for sums and dot products, whose terms may be added in any order.

    Therefore not even the sign of a zero may depend on `mid`: ends of different signs fail, and an exact
    zero is +0. `error` already has room for the test (see `gamma`).
    """
    result, failed = rounding_test(mid - error, mid + error)
    if defer_test(failed, mid):
        # Until the failures are resolved: mostly right, as a failure is often a tie or an exact zero.
        return torch.where(failed, narrow(mid + 0.0), result)
    if failed.any():
        _overwrite_failures(result, mid, failed.reshape(-1).nonzero().squeeze(1), resolve)
    return result


def _overwrite_failures(result: Tensor, mid: Tensor, index: Tensor, resolve: Resolve) -> None:
    """Write the resolved values to `result` at the flat indices of the elements that failed."""
    if not result.dim():
        return _overwrite_failures(result.view(1), mid.view(1), index, resolve)
    where = torch.unravel_index(index, result.shape)
    at = mid[where]
    value = narrow(at)  # right where the midpoint is NaN or infinite
    finite = at.isfinite()
    if finite.any():
        exact = torch.tensor(resolve(index[finite]), dtype=torch.float64, device=value.device)
        value[finite] = narrow(exact)  # what follows an infinity is not rounded yet
    result[where] = value
    return None


def nearest(x: Fraction) -> float:
    """Return the number of the target that is nearest to x, ties to even; infinity on overflow."""
    if x == 0:
        return 0.0
    to = target()
    n, d = abs(x.numerator), x.denominator
    # The exponent of the last place: `precision` bits, and not below that of the subnormal numbers.
    last = max(n.bit_length() - d.bit_length() - to.precision, to.lowest)
    while True:
        q, r = divmod(n << max(-last, 0), d << max(last, 0))
        if q < 1 << to.precision:
            break
        last += 1
    rest = 2 * r - (d << max(last, 0))
    if rest > 0 or (rest == 0 and q % 2):
        q += 1
    value = math.ldexp(q, last) if q.bit_length() + last <= to.top else math.inf
    return -value if x < 0 else value


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return s, which is a + b rounded, and t with s + t = a + b exactly.

    Source: D. Knuth, The Art of Computer Programming 2, section 4.2.2.
    """
    s = a + b
    z = s - a
    return s, (a - (s - z)) + (b - z)
