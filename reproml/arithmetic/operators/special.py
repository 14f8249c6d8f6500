"""Special functions, which are computed on the host.

Each has an approximation in binary64 with a bound of its error. What fails the rounding test, and results
in float64, which only some have (docs/operators.md), are computed in mpmath's long numbers: 500 bits, of
which 420 are kept. An element takes a tenth of a millisecond or more then; equal ones are computed once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import TENSORS, elementwise
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics import elementary, special
from reproml.arithmetic.numerics.balls import Ball, derivative_of_cot, polygamma
from reproml.arithmetic.numerics.devices import is_on_accelerator
from reproml.arithmetic.numerics.formats import BINARY64, narrow, target
from reproml.arithmetic.numerics.interpolation import Interpolated
from reproml.arithmetic.numerics.libm import rounded_to_double, rounded_to_odd
from reproml.arithmetic.numerics.rounding import SLACK, U, round_ball, two_sum
from reproml.arithmetic.operators.arguments import float32_operands

# As many as a value may need: I1(x) = x / 2 (1 + x^2 / 8 + ...) is near a midpoint for the least x.
_BITS = 500, 420
_CHUNK = 1 << 15  # elements at once, so that the temporary numbers stay in a processor's cache
_lock = threading.Lock()  # mpmath's precision is global


def by_long_numbers(
    function: Callable[..., Any], x: Tensor, quick: Optional[Callable[[Tensor], Ball]] = None
) -> Tensor:
    """Return function(mpmath, float) of each element of x, rounded once to the target.

    The function may return a Python float for an infinity or NaN. quick: the same on a float64 tensor [n]
    in binary64, as a ball; a midpoint that is infinite or NaN is the value. Only what fails the rounding
    test is computed in long numbers then.
    """
    if is_on_accelerator(x):
        replay_log.flush()
    wide = x.detach().cpu().double()
    if quick is None or target() is BINARY64 or not x.numel():
        return _in_long_numbers(function, wide).to(x.device)
    parts = [_quickly(function, part, quick) for part in wide.reshape(-1).split(_CHUNK)]
    return torch.cat(parts).reshape(x.shape).to(x.device)


def _quickly(function: Callable[..., Any], x: Tensor, quick: Callable[[Tensor], Ball]) -> Tensor:
    y = quick(x)
    error = torch.as_tensor(y.error, dtype=torch.float64).expand_as(y.mid)

    def resolve(index: Tensor) -> Any:
        return _in_long_numbers(function, x[index]).tolist()

    return round_ball(y.mid, error, resolve)


def _in_long_numbers(function: Callable[..., Any], x: Tensor) -> Tensor:
    values, places = torch.unique(x, return_inverse=True)
    with _lock:
        found = [_value(function, v) for v in values.tolist()]
    rounded = narrow(torch.tensor(found, dtype=torch.float64, device="cpu"))
    return rounded[places].reshape(x.shape)


def _value(function: Callable[..., Any], x: float) -> float:
    limits: list[float] = []

    def value(mp: Any) -> Any:
        y = function(mp, x)
        if isinstance(y, float):
            limits.append(y)
            return mp.mpf(0)
        return y

    found = (rounded_to_double if target() is BINARY64 else rounded_to_odd)(value, _BITS)
    return limits[0] if limits else found


def _function(
    formula: Callable[[Any, Any], Any],
    low: float,
    high: float,
    ends: Sequence[float],
    quick: Optional[Callable[[Tensor], Ball]] = None,
) -> Callable[[Any], Tensor]:
    """Return the operator formula(mpmath, x) on [low, high], where a value rounds like that at the bound.

    ends: the values at minus infinity and infinity. quick: the formula in binary64, for finite numbers.
    """

    def value(mp: Any, x: float) -> Any:
        if math.isnan(x):
            return x
        if math.isinf(x):
            return ends[x > 0]
        return formula(mp, mp.mpf(min(max(x, low), high)))

    def quickly(x: Tensor) -> Ball:
        assert quick is not None
        inside = (x > low) & (x < high)
        if inside.all():
            return quick(x)
        limit = torch.where(x < 0, ends[0], ends[1]).double()
        mid, error = torch.where(x.isnan(), x, limit), torch.zeros_like(x)
        for at, bound in ((x <= low, low), (x >= high, high)):
            if math.isfinite(bound) and at.any():
                y = quick(torch.full_like(x[:1], bound))
                at &= x.isfinite()
                mid[at], error[at] = y.mid, y.error
        index = inside.nonzero().squeeze(1)
        if len(index):
            y = quick(x[index])
            mid[index], error[index] = y.mid, y.error
        return TENSORS.ball(mid, error)

    def operator(x: Any) -> Tensor:
        (x,) = float32_operands(x)
        return by_long_numbers(value, x, quickly if quick else None)

    return operator


_ALL = (-math.inf, math.inf)
INF, NAN = math.inf, math.nan


def _of_parts(
    condition: Tensor,
    x: Tensor,
    there: Callable[[Tensor], Ball],
    elsewhere: Callable[[Tensor], Ball],
) -> Ball:
    """Return there(x) where a condition holds and elsewhere(x) where it does not."""
    if condition.all():
        return there(x)
    if not condition.any():
        return elsewhere(x)
    mid, error = torch.empty_like(x), torch.empty_like(x)
    for at, function in ((condition, there), (~condition, elsewhere)):
        index = at.nonzero().squeeze(1)
        y = function(x[index])
        mid[index], error[index] = y.mid, y.error
    return TENSORS.ball(mid, error)


# ---- modified Bessel functions -----------------------------------------------------------------------

_FAR = 1024.0


def _interpolated_i(order: int) -> Interpolated:
    """Return exp(-x) I0(x), or exp(-x) I1(x) / x, for 0 <= x <= _FAR.

    I0(z) is the mean of exp(z cos t) over 0 < t < pi, and I1(z) / z that of exp(z cos t) sin(t)^2, so that
    both are at most exp(|Re z|) (NIST Digital Library of Mathematical Functions, 10.32).
    """

    def function(mp: Any, x: Any) -> Any:
        return mp.exp(-x) * mp.besseli(order, x) / x**order

    def growth(mp: Any, centre: float, radius: float) -> float:
        return math.exp(2 * max(0.0, radius - centre))

    edges = [0.0, *[2.0**k for k in range(1, 11)]]
    return Interpolated(function, edges, growth, reach=3.0, degree=26)


_SCALED_I = [_interpolated_i(0), _interpolated_i(1)]

# The coefficients of 1 / x^5, ..., 1 in the asymptotic series of sqrt(2 pi x) exp(-x) I(x).
_SERIES_OF_I = [
    [
        math.prod((2 * j - 1) ** 2 - 4 * order for j in range(1, k + 1))
        / (math.factorial(k) * 8**k)
        for k in range(5, -1, -1)
    ]
    for order in (0, 1)
]


def scaled_i(order: int, x: Tensor) -> Ball:
    """Return exp(-x) I0(x), or exp(-x) I1(x) / x, for x >= 0.

    Beyond _FAR six terms of the asymptotic series suffice. It expands (1 - s / 2)^(-1/2) in the integral of
    exp(-x s) s^(-1/2) (1 - s / 2)^(-1/2) over 0 < s < 2, which is pi sqrt(2) exp(-x) I0(x), or the inverse
    of both roots for I1(x) / x. From the second on, its terms have one sign, and for s < 1 each is less
    than half of the one before. So the remainder is less than twice the first omitted term, of 0.68 / x^6
    at most, and exp(-x), and the roundings are 7.
    """
    mid, error = _SCALED_I[order](x.clamp(max=_FAR))
    far = x > _FAR
    if far.any():
        large = x[far]
        w = 1 / large
        y = elementary.horner(w, _SERIES_OF_I[order]) / torch.sqrt(large * (2 * math.pi))
        mid[far] = y * w if order else y
        error[far] = mid[far] * 2.0**-50
    return TENSORS.ball(mid, error)


def _i(order: int, scaled: bool) -> Callable[[Tensor], Ball]:
    def quick(x: Tensor) -> Ball:
        size = x.abs()
        y = scaled_i(order, size)
        if not scaled:
            y = y * TENSORS.exp(TENSORS.exact(size))
        return _times_x(x, y, not scaled) if order else y

    return quick


def _times_x(x: Tensor, y: Ball, above: bool) -> Ball:
    """Return x y, where y is 1/2 at x = 0. For |x| < 2^-54 x y may be next to a midpoint x / 2.

    Its size lies between those of x / 2 and of the next number in binary64, above or below it.
    """
    mid = y.mid * x
    error = (y.error * SLACK) * x.abs() + mid.abs() * U
    small = x.abs() < 2.0**-54
    if not small.any():
        return TENSORS.ball(mid, error)
    half = x * 0.5
    near = torch.nextafter(half, half * torch.inf if above else torch.zeros_like(half))
    near = torch.where(x == 0, 0.0, near)
    return TENSORS.ball(torch.where(small, near, mid), torch.where(small, 0.0, error))


# Beyond the bounds the values overflow or underflow in binary32.
i0 = _function(lambda mp, x: mp.besseli(0, x), -100, 100, (INF, INF), _i(0, False))
i1 = _function(lambda mp, x: mp.besseli(1, x), -100, 100, (-INF, INF), _i(1, False))


def _scaled_i(order: int) -> Callable[[Any, Any], Any]:
    """exp(-|x|) I(|x|), with the sign of x for order 1.

    From 2^60 on, two terms of its asymptotic series.
    """

    def formula(mp: Any, x: Any) -> Any:
        size = abs(x)
        if size > 2.0**60:
            y = (1 - mp.mpf(4 * order - 1) / (8 * size)) / mp.sqrt(2 * mp.pi * size)
        else:
            y = mp.besseli(order, size) * mp.exp(-size)
        return -y if order and x < 0 else y

    return formula


i0e = _function(_scaled_i(0), *_ALL, (0.0, 0.0), _i(0, True))
i1e = _function(_scaled_i(1), *_ALL, (-0.0, 0.0), _i(1, True))


# ---- the normal distribution -------------------------------------------------------------------------


def erfcx_of(mp: Any, x: Any) -> Any:
    """exp(x^2) erfc(x); the first terms of its asymptotic series from 2^60 on."""
    if x > 2.0**60:
        return (1 - 1 / (2 * x * x)) / (x * mp.sqrt(mp.pi))
    return mp.exp(x * x) * mp.erfc(x)


def _erfcx(t: Tensor) -> Ball:
    return Ball(elementary.erfcx(t), TENSORS.relative, 0, TENSORS)


def _quick_erfcx(x: Tensor) -> Ball:
    """Below 0 it is 2 exp(x^2) - erfcx(-x)."""
    return _of_parts(x < 0, x, lambda x: 2 * TENSORS.exp(TENSORS.exact(x * x)) - _erfcx(-x), _erfcx)


erfcx = _function(erfcx_of, -10, INF, (INF, 0.0), _quick_erfcx)


def _log_ndtr(mp: Any, x: Any) -> Any:
    """log(erfc(-x / sqrt 2) / 2), by `erfcx_of` below 0."""
    t = x / mp.sqrt(2)
    if x > 0:
        return mp.log1p(-mp.erfc(t) / 2)
    return mp.log(erfcx_of(mp, -t) / 2) - t * t


def _parts_of_log_ndtr(x: Tensor) -> tuple[Ball, Ball]:
    """Return -t^2 and log(erfcx(t) / 2), whose sum is log_ndtr(x), with t = -x / sqrt 2 > 0.

    The logarithm of erfcx(t) falls, by at most 1 / t: a relative error of t is at most one of erfcx. For as
    erfcx(t) is a mean of exp(-2 s t), it is convex; for the bound see BallContext.erfc.
    """
    scaled = Ball(elementary.erfcx(x * -math.sqrt(0.5)), TENSORS.relative + 4 * U, 0, TENSORS)
    return TENSORS.exact(x * x * -0.5), TENSORS.log(scaled * Fraction(1, 2))


def _quick_log_ndtr(x: Tensor) -> Ball:
    def left(x: Tensor) -> Ball:
        return TENSORS.plus(*_parts_of_log_ndtr(x))

    def right(x: Tensor) -> Ball:
        t = Ball(x * math.sqrt(0.5), 2 * U, 0, TENSORS)
        return TENSORS.log1p(TENSORS.erfc(t) * Fraction(-1, 2))

    return _of_parts(x > 0, x, right, left)


log_ndtr = _function(_log_ndtr, -INF, 30, (-INF, -0.0), _quick_log_ndtr)


def _ndtri(mp: Any, p: Any) -> Any:
    """The x at which the normal distribution function is p: Newton's method on log_ndtr from binary64."""
    if p <= 0 or p >= 1:
        return -INF if p == 0 else INF if p == 1 else NAN
    if p == 0.5:
        return mp.mpf(0)
    if p > 0.5:
        return -_ndtri(mp, 1 - p)
    target = mp.log(p)
    x = -mp.sqrt(-2 * target) if p < 0.1 else (p - 0.5) * mp.sqrt(2 * mp.pi)
    for _ in range(60):
        log = _log_ndtr(mp, x)
        slope = mp.sqrt(2 / mp.pi) / erfcx_of(mp, -x / mp.sqrt(2))  # of log_ndtr, for x < 0
        step = (log - target) / slope
        x = min(x - step, mp.mpf(0))
        if abs(step) <= mp.ldexp(1, -300) * max(abs(x), mp.ldexp(1, -200)):
            break
    return x


def _quick_ndtri(p: Tensor) -> Ball:
    """Bound the error of what PyTorch computes by that of the probability there, and the slope.

    For p < 1/10 the values are below -1, where the slope of log_ndtr is more than 1 (Mills' ratio). Up to
    1/2 they lie in [-1.3, 0], where the slope of erf(x / sqrt 2) is more than 0.3.
    """

    def in_tail(q: Tensor) -> Ball:
        x = torch.special.ndtri(q)
        square, log = _parts_of_log_ndtr(x)
        gap = square + (log - TENSORS.log(TENSORS.exact(q)))
        return TENSORS.ball(x, torch.where(x < -1, gap.mid.abs() + gap.error, torch.inf))

    def central(q: Tensor) -> Ball:
        x = torch.special.ndtri(q)
        erf = TENSORS.erf(Ball(x * math.sqrt(0.5), 2 * U, 0, TENSORS))
        gap = (erf - TENSORS.exact(2 * q - 1)) * 4
        known = (x >= -1.3) & (x <= 0)
        return TENSORS.ball(x, torch.where(known, gap.mid.abs() + gap.error, torch.inf))

    def inside(p: Tensor) -> Ball:
        upper = p > 0.5
        q = torch.where(upper, 1 - p, p)
        y = _of_parts(q < 0.1, q, in_tail, central)
        return TENSORS.ball(torch.where(upper, -y.mid, y.mid) + 0.0, y.error)

    def outside(p: Tensor) -> Ball:
        return TENSORS.exact(torch.where(p == 0, -INF, torch.where(p == 1, INF, NAN)).double())

    return _of_parts((p > 0) & (p < 1), p, inside, outside)


ndtri = _function(_ndtri, *_ALL, (NAN, NAN), _quick_ndtri)


# ---- Bessel functions and Airy's function ------------------------------------------------------------


def _interpolated_j(order: int) -> Interpolated:
    """Return J0(x), or J1(x) / x, for 0 <= x <= 26: at most exp(|Im z|), see `_interpolated_i`."""

    def function(mp: Any, x: Any) -> Any:
        return mp.besselj(order, x) / x**order

    edges = [float(x) for x in range(0, 28, 2)]
    return Interpolated(
        function, edges, lambda mp, _, radius: math.exp(radius), reach=5.0, degree=24
    )


_J = [_interpolated_j(0), _interpolated_j(1)]


def _alternating(coefficients: Sequence[Fraction], odd: int) -> list[float]:
    """Return every second coefficient with alternating signs, the last first."""
    return [float(c) * (-1) ** k for k, c in enumerate(coefficients[odd::2])][::-1]


# The first 20 coefficients a of the asymptotic series of J0 and J1.
_A = [
    [
        Fraction(
            math.prod(4 * order - (2 * j - 1) ** 2 for j in range(1, k + 1)),
            math.factorial(k) * 8**k,
        )
        for k in range(20)
    ]
    for order in (0, 1)
]


def _j(order: int) -> Callable[[Tensor], Ball]:
    # The series of (-x^2 / 4)^k / (k! (k + order)! 2^order) is cut after k = 5, with a remainder below
    # 2^-66.
    series = [
        0.5**order / (math.factorial(k) * math.factorial(k + order)) for k in range(5, -1, -1)
    ]

    def near(size: Tensor) -> Ball:
        return _of_parts(size < 0.125, size, small, middle)

    def small(size: Tensor) -> Ball:
        return Ball(elementary.horner(size * size * -0.25, series), 2.0**-51, 0, TENSORS)

    def middle(size: Tensor) -> Ball:
        return TENSORS.ball(*_J[order](size))

    def far(size: Tensor) -> Ball:
        """sqrt(2 / (pi x)) (P cos w - Q sin w) with w = x - order pi / 2 - pi / 4.

        The series of P and Q leave out less than their first omitted terms, a_20 / x^20 < 2^-58 and less
        (NIST Digital Library of Mathematical Functions, 10.17(iii)). Each rounding is one of a number of at
        most 1.5.
        """
        w = 1 / size
        p, q = (elementary.horner(w * w, _alternating(_A[order], odd)) for odd in (0, 1))
        sin, cos = elementary.sin_cos(size)
        if order:
            sin, cos = -cos, sin  # of x - pi / 2
        scale = torch.sqrt(size * math.pi)
        scale = scale * size if order else scale
        return TENSORS.ball((p * (cos + sin) - q * w * (sin - cos)) / scale, 2.0**-46 / scale)

    def quick(x: Tensor) -> Ball:
        y = _of_parts(x.abs() <= 26, x.abs(), near, far)
        return _times_x(x, y, False) if order else y

    return quick


bessel_j0 = _function(lambda mp, x: mp.besselj(0, x), *_ALL, (0.0, 0.0), _j(0))
bessel_j1 = _function(lambda mp, x: mp.besselj(1, x), *_ALL, (0.0, 0.0), _j(1))


def _airy_growth(mp: Any, centre: float, radius: float) -> float:
    """Bound |Ai(z)| by Bi(|z|) / sqrt(3): two power series with the same positive coefficients."""
    return float(mp.airybi(abs(centre) + radius))


_AIRY = Interpolated(
    lambda mp, x: mp.airyai(x),
    [float(x) for x in range(-12, 14, 2)],
    _airy_growth,
    reach=5.0,
    degree=48,
)
# The first 24 coefficients u of the asymptotic series of Ai.
_U = [
    Fraction(math.prod(range(2 * k + 1, 6 * k, 2)), 216**k * math.factorial(k)) for k in range(24)
]


def _quick_airy(x: Tensor) -> Ball:
    return _of_parts(x.abs() <= 12, x, lambda x: TENSORS.ball(*_AIRY(x)), _far_airy)


def _far_airy(x: Tensor) -> Ball:
    return _of_parts(x > 0, x, _airy_above, _airy_below)


def _airy_above(x: Tensor) -> Ball:
    """exp(-z) / (2 sqrt(pi) x^(1/4)) times the series of (-1)^k u_k / z^k with z = 2/3 x^(3/2).

    It leaves out less than the first omitted term, u_24 / z^24 < 2^-60 for x >= 12 (NIST Digital Library of
    Mathematical Functions, 9.7(iii)).
    """
    root = TENSORS.sqrt(TENSORS.exact(x))
    z = TENSORS.exact(x) * root * Fraction(2, 3)
    series = [float(u) * (-1) ** k for k, u in enumerate(_U)][::-1]
    y = Ball(elementary.horner(1 / z.mid, series), 2.0**-49, 0, TENSORS)
    return TENSORS.exp(-z) * y / (TENSORS.sqrt(root * TENSORS.pi) * 2)


# 3 pi / 4 in three parts of 18 bits, whose products with integers below 2^35 are exact, and the rest.
_TURN = [
    float.fromhex(h)
    for h in (
        "0x1.2d97800000000p+1",
        "0x1.1fcc800000000p-17",
        "0x1.21d2000000000p-35",
        "0x1.a79394c9e8a0ap-54",
    )
]


def _airy_below(x: Tensor) -> Ball:
    """(P cos w + Q sin w) / (sqrt(pi) x^(1/4)) at -x, with w = z - pi / 4.

    P and Q are the series of `_airy_above` in parts.
    3/2 z = x (h + l + t), where h + l is the root in binary64, h has 24 bits and t is what the root lacks.
    Less k times 3 pi / 4, two thirds of it are z less k quarters of a turn. The differences keep their
    errors; what is left errs by less than 2^-50. Beyond 2^24 this is not known.
    """
    size = (-x).clamp(max=2.0**24)
    root = torch.sqrt(size)
    high = root.float().double()
    low = root - high
    lacks = ((size - high * high) - 2 * high * low - low * low) / (2 * root)
    k = torch.round(size * root * (4 / (3 * math.pi)))
    r, lost = two_sum(size * high, -k * _TURN[0])
    for term in (size * low, -k * _TURN[1], -k * _TURN[2]):
        r, more = two_sum(r, term)
        lost = lost + more
    r = r + (lost + (size * lacks - k * _TURN[3]))
    sin, cos = elementary.sin_cos_reduced(r * (2 / 3), k)
    w = 1.5 / (size * root)
    p, q = (elementary.horner(w * w, _alternating(_U, odd)) for odd in (0, 1))
    scale = torch.sqrt(root * (2 * math.pi))
    error = torch.where(x >= -(2.0**24), 2.0**-46 / scale, torch.inf)
    return TENSORS.ball((p * (cos + sin) + q * w * (sin - cos)) / scale, error)


# Ai(100) underflows.
airy_ai = _function(lambda mp, x: mp.airyai(x), -INF, 100, (NAN, 0.0), _quick_airy)


# ---- derivatives of digamma --------------------------------------------------------------------------


def higher_polygamma(n: int, x: Tensor) -> Tensor:
    """Return the n-th derivative of digamma, infinite at its poles: 0, -1, -2 and so on."""

    def value(mp: Any, x: float) -> Any:
        if math.isinf(x):
            return 0.0 if x > 0 else NAN
        if x <= 0 and x == math.floor(x):
            return INF if n % 2 else -INF
        return x if math.isnan(x) else polygamma(mp, n, mp.mpf(x))

    def quick(x: Tensor) -> Ball:
        pole = (x <= 0) & (x == x.floor())
        y = _quick_polygamma(n, torch.where(pole | ~x.isfinite(), 1.0, x))
        mid = torch.where(pole, INF if n % 2 else -INF, torch.where(x == INF, 0.0, y.mid))
        mid = torch.where(x.isnan() | (x == -INF), NAN, mid)
        return TENSORS.ball(mid, torch.where(mid == y.mid, y.error, 0.0))

    return by_long_numbers(value, x, quick if n <= 20 else None)


def _sum_of_powers(n: int, x: Tensor) -> Ball:
    """Return n! times the sum of (x + k)^(-n - 1) for k = 0, 1, ... and x > 0.

    From k = s on, with z = x + s, that is z^-n / n times 1 + n / (2 z) + sum of B_2k C(2k + n - 1, n - 1) /
    z^2k. What this series leaves out is less than the first omitted term (H. Alzer, On some inequalities
    for the gamma and psi functions, Mathematics of Computation 66, 1997, theorem 8). Nothing cancels, so
    that all errors are relative: for each power n + 1 times three roundings, s additions, and 20 others.
    """
    shift, terms = n + 10, 12
    z = x + shift
    square = 1 / (z * z)
    ratios = [b * math.comb(2 * k + n - 1, n - 1) for k, b in enumerate(special.EVEN_BERNOULLI, 1)]
    omitted = float(abs(ratios[terms])) / float(shift) ** (2 * terms + 2)
    y = elementary.horner(square, [float(r) for r in [*ratios[:terms][::-1], 0]])
    total = (1 + 0.5 * n / z + y) * _power(1 / z, n) / n
    for k in range(shift - 1, -1, -1):
        total = total + _power(1 / (x + k), n + 1)
    rel = (3 * (n + 1) + shift + 20) * U + omitted
    return Ball(total * math.factorial(n), rel, 0, TENSORS)


def _quick_polygamma(n: int, x: Tensor) -> Ball:
    """Return the n-th derivative of digamma at numbers that are not poles; below 0 see balls.polygamma."""

    def right(x: Tensor) -> Ball:
        return _sum_of_powers(n, x) if n % 2 else -_sum_of_powers(n, x)

    def left(x: Tensor) -> Ball:
        low = TENSORS.exact(x)
        cot = TENSORS.cospi(low) / TENSORS.sinpi(low)
        derivative = TENSORS.constant(0)
        for coefficient in derivative_of_cot(n):
            derivative = derivative * cot + abs(coefficient)
        for _ in range(n + 1):
            derivative = derivative * TENSORS.pi
        return (derivative if n % 2 else -derivative) - _sum_of_powers(n, 1 - x)

    return _of_parts(x < 0, x, left, right)


def _power(x: Tensor, n: int) -> Tensor:
    y = x
    for _ in range(n - 1):
        y = y * x
    return y


def spherical_bessel_j0(x: Any) -> Tensor:
    """Return sin(x) / x: 1 at 0, 0 at both infinities."""
    (x,) = float32_operands(x)
    regular = (x != 0) & ~x.isinf()
    y = elementwise(lambda ctx, x: ctx.sin(x) / x, torch.where(regular, x, 1.0))
    return torch.where(regular, y, (x == 0).float())
