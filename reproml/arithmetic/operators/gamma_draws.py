"""Random numbers from the gamma and Dirichlet distributions, by rejection.

Which numbers of the stream belong to an element depends on all decisions before it. So the decisions are
taken one by one, by csrc/gamma_draws.c where it is built, nearly all of them from approximations in
binary64 with a bound of their errors, and the results are computed together afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.compiler import executor, kernels, pair_arrays
from reproml.arithmetic.numerics import elementary
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.formats import BINARY64, narrow, target
from reproml.arithmetic.numerics.libm import EXACT_MATH, power, rounded_to_nearest, rounded_to_odd
from reproml.arithmetic.numerics.rounding import gamma, nearest, round_ball
from reproml.arithmetic.operators.arguments import require
from reproml.arithmetic.operators.random import confirmed, keep_spare, require_cpu, take_spare


def standard_gamma(x: Tensor, generator: Any = None) -> Tensor:
    """Draw from the gamma distribution with the shapes x and scale 1.

    Each number is one of `_draws`, rounded and at least the smallest normal number. Raises RuntimeError
    unless 0 <= x < inf.
    """
    require_cpu(generator)
    require(
        (x >= 0) & x.isfinite(), "_standard_gamma expects shapes that are finite and not negative"
    )
    draws = _draws(confirmed(x).reshape(-1), generator)
    smallest = torch.finfo(target().dtype).tiny
    return to_device(narrow(draws).clamp(min=smallest).reshape(x.shape), x.device)


def sample_dirichlet(x: Tensor, generator: Any = None) -> Tensor:
    """Draw from the Dirichlet distributions with the concentrations in the last axis of x.

    The numbers g / sum(g), with g of `_draws`, are rounded once, but at least the smallest normal number
    and below 1. Raises RuntimeError unless 0 < x < inf.
    """
    require_cpu(generator)
    require(
        (x > 0) & x.isfinite(), "_sample_dirichlet expects concentrations that are finite and > 0"
    )
    if not x.numel():
        return torch.empty_like(x)
    draws = _draws(confirmed(x).reshape(-1), generator).reshape(-1, *x.shape[-1:])
    total = draws.sum(-1, keepdim=True)
    ratio = draws / torch.where(total == 0, 1.0, total)

    def resolve(index: Tensor) -> list[float]:
        rows, columns = torch.unravel_index(index, draws.shape)
        totals = {i: sum(map(Fraction, draws[i].tolist())) for i in rows.unique().tolist()}
        return [
            nearest(Fraction(g) / totals[i])
            for g, i in zip(draws[rows, columns].tolist(), rows.tolist())
        ]

    # A quotient rounds once more, and nothing cancels.
    rounded = round_ball(ratio, ratio * gamma(draws.shape[-1] + 1), resolve).float()
    smallest, largest = torch.finfo(torch.float32).tiny, 1 - 2.0**-24
    return to_device(rounded.clamp(smallest, largest).reshape(x.shape), x.device)


# ---- the rejection method ----------------------------------------------------------------------------


_CHUNK = 1 << 15  # numbers at once, so that the temporary ones stay in a processor's cache


def _approximations(u: Tensor) -> Tensor:
    if kernels.library is not None:
        found = torch.empty((4, len(u)), dtype=torch.float64, device="cpu")
        kernels.library.reproml_gamma_approximations(len(u), u.data_ptr(), found.data_ptr())
        return found
    parts = []
    for part in u.split(_CHUNK):
        log = elementary.log1p(-part)
        sin, cos = elementary.sin_cos_pi(2 * part)
        parts.append(torch.stack([log, torch.sqrt(-2 * log), cos, sin]))
    return torch.cat(parts, 1)


class _Stream:
    """Numbers of `rand` in float64, drawn ahead.

    u: the numbers. approximations [4, count]: of log(1 - u), sqrt(-2 log(1 - u)), cos(2 pi u) and
    sin(2 pi u). Two numbers v, u give two normal ones, sqrt(-2 log(1 - u)) times cos(2 pi v) and
    sin(2 pi v), with a relative error below 2^-47 (see elementary.py).
    """

    def __init__(self, generator: Optional[torch.Generator], count: int) -> None:
        self.generator = generator or torch.default_generator
        self.before = self.generator.get_state()
        self.count = count
        self.u = torch.empty(0, dtype=torch.float64, device="cpu")
        self.approximations = self.u.new_empty(4, 0)
        self.draw()

    def draw(self) -> None:
        more = torch.rand(self.count, generator=self.generator, dtype=torch.float64, device="cpu")
        self.u = torch.cat([self.u, more])
        self.approximations = torch.cat([self.approximations, _approximations(more)], 1)

    def leave(self, used: int) -> None:
        """Let the generator have drawn only so many numbers."""
        self.generator.set_state(self.before)
        torch.rand(used, generator=self.generator, dtype=torch.float64, device="cpu")

    def normals(self, found: Tensor) -> Tensor:
        """Return normal numbers as `normal_` draws single ones: 2 times the place of v, plus 1 for sin."""
        z = torch.empty(len(found), dtype=torch.float64, device="cpu")
        for second in (False, True):
            at = ((found & 1) == second).nonzero().squeeze(1)
            place = found[at] >> 1
            z[at] = _rounded_normals(self.u[place], self.u[place + 1], second)
        return z


def _draws(shapes: Tensor, generator: Optional[torch.Generator]) -> Tensor:
    """Draw binary64 numbers from gamma distributions of any shapes, by rejection.

    G. Marsaglia and W. W. Tsang, A simple method for generating gamma variables, ACM Transactions on
    Mathematical Software 26(3), 2000, in binary64 numbers: each operation, log and power is rounded once,
    from left to right, and a normal number z as in `normal_` for single elements, to odd. For a shape below
    1 the result for shape + 1 is multiplied by (1 - u)^(1 / shape). Otherwise, with d = shape - 1/3 and
    c = 1 / sqrt(9 d), it is d v with v = y^3, y = 1 + c z, of the first z and u for which y > 0 and
    log(1 - u) < z^2 / 2 + d (1 - v + log(v)). PyTorch does the same; it first tries a bound that makes most
    logarithms superfluous and accepts no other numbers.
    """
    shapes = shapes.to(device="cpu", dtype=torch.float64)
    result = torch.zeros_like(shapes)
    positive = shapes != 0
    a = shapes[positive].numpy()
    if not len(a):
        return result
    below_1 = a < 1
    d = a + below_1 - 1 / 3
    c = 1 / np.sqrt(9 * d)  # NumPy's root is that of IEEE 754
    spare = take_spare(generator).tolist()
    stream = _Stream(generator, 64 + 9 * len(a) // 4 + int(below_1.sum()))
    decide = _decisions_one_by_one if kernels.library is None else _compiled_decisions
    normals, uniforms, at, left = decide(stream, d, c, below_1, spare)
    if normals[0] == _SPARE:
        z = torch.cat([_float64(spare), stream.normals(normals[1:])])
    else:
        z = stream.normals(normals)
    stream.leave(at)
    if left != _NONE:
        keep_spare(generator, *stream.u[left >> 1 :][:2].tolist())
    y = 1 + torch.from_numpy(c) * z
    scale = torch.ones_like(y)
    if len(uniforms):
        small = torch.from_numpy(below_1)
        scale[small] = _powers(1 - stream.u[uniforms], torch.from_numpy(1 / a[below_1]))
    result[positive] = scale * torch.from_numpy(d) * (y * y * y)
    return result


_NONE, _SPARE = -1, -2  # no normal number, and that which the generator kept
_UNKNOWN: Any = object()
_exact_log = lru_cache(maxsize=4096)(EXACT_MATH.log)


class _Decisions(NamedTuple):
    """The places of the numbers that the elements take: of the normal number, and of u for the powers."""

    normals: Tensor
    uniforms: Tensor
    used: int  # numbers of the stream
    left: int  # the normal number that is left over, see `_Stream.normals`


def _decisions_one_by_one(
    stream: _Stream, ds: Any, cs: Any, below_1: Any, spare: list[float]
) -> _Decisions:
    """Decide which numbers the elements take. spare: the normal number that the generator kept, if any."""
    # For |t| < 1/2 the right side is at least d (-3/4 t^4 - 6/5 |t|^5), by the series of log(1 + t). All
    # errors together are below 2^-20 for d < 10^6, see `_passes`.
    bounds = np.where(ds < 1e6, -1.35 * ds, -math.inf).tolist()
    log, radius, cos, sin = stream.approximations.tolist()
    at = 0
    left = _SPARE if spare else _NONE
    normals: list[int] = []
    uniforms: list[int] = []
    for small, d, c, bound in zip(below_1.tolist(), ds.tolist(), cs.tolist(), bounds):
        if small:
            uniforms.append(at)
            at += 1
        passed: Optional[bool] = False
        while not passed:
            if len(log) - at < 5:
                stream.draw()
                log, radius, cos, sin = stream.approximations.tolist()
            if left == _NONE:
                z = radius[at + 1] * cos[at]
                normal, left = 2 * at, 2 * at + 1
                at += 2
            else:
                z = spare[0] if left == _SPARE else radius[(left >> 1) + 1] * sin[left >> 1]
                normal, left = left, _NONE
            t = c * z
            square = t * t
            if square < 0.25 and log[at] < bound * square * square - 1e-5:
                at += 1
                break
            passed = _passes(z, c, d, log[at])
            if passed is _UNKNOWN:
                passed = _decided_exactly(stream, normal, at, c, d, spare)
            at += passed is not None
        normals.append(normal)
    return _Decisions(_int64(normals), _int64(uniforms), at, left)


# In the order of csrc/gamma_draws.c: why its loop ended, its state, and a verdict about one attempt.
_ALL_DECIDED, _NUMBERS_MISSING, _UNDECIDED = range(3)
_ELEMENT, _AT, _LEFT, _BEGUN, _VERDICT = range(5)
_REJECTED, _ACCEPTED, _NOT_POSITIVE = range(1, 4)
_VERDICTS = {False: _REJECTED, True: _ACCEPTED, None: _NOT_POSITIVE}


def _compiled_decisions(
    stream: _Stream, d: Any, c: Any, below_1: Any, spare: list[float]
) -> _Decisions:
    """Take the same decisions by csrc/gamma_draws.c, which leaves few of them open."""
    n = len(d)
    normals, uniforms = (torch.empty(n, dtype=torch.int64, device="cpu") for _ in range(2))
    state = np.array([0, 0, _SPARE if spare else _NONE, 0, 0], dtype=np.int64)
    reason = _NUMBERS_MISSING
    while reason != _ALL_DECIDED:
        reason = kernels.library.reproml_gamma_decisions(
            n,
            *(x.ctypes.data for x in (d, c, below_1)),
            len(stream.u),
            stream.approximations.data_ptr(),
            spare[0] if spare else 0.0,
            state.ctypes.data,
            normals.data_ptr(),
            uniforms.data_ptr(),
        )
        if reason == _NUMBERS_MISSING:
            stream.draw()
        elif reason == _UNDECIDED:
            i, at, left = state[:3].tolist()
            normal, at = (2 * at, at + 2) if left == _NONE else (left, at)
            verdict = _decided_exactly(stream, normal, at, float(c[i]), float(d[i]), spare)
            state[_VERDICT] = _VERDICTS[verdict]
    return _Decisions(
        normals, uniforms[torch.from_numpy(below_1)], int(state[_AT]), int(state[_LEFT])
    )


def _decided_exactly(
    stream: _Stream, normal: int, at: int, c: float, d: float, spare: list[float]
) -> Optional[bool]:
    """Return whether `_draws` accepts a normal number with u at a place, or None for y <= 0."""
    z = spare[0] if normal == _SPARE else stream.normals(_int64([normal])).item()
    return _passes_exactly(z, c, d, stream.u[at].item())


def _int64(x: Sequence[int]) -> Tensor:
    return torch.tensor(x, dtype=torch.int64, device="cpu")


def _float64(x: Sequence[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, device="cpu")


def _passes(z: float, c: float, d: float, log: float) -> Any:
    """Return whether `_draws` accepts a z, None for y <= 0, or _UNKNOWN.

    z and log, the logarithm of 1 - u, are approximations. t errs by less than 2^-46 |t|, and v by less than
    2^-44 (1 + 1/y) v, as |t| <= 1 + y. v changes g = 1 - v + log(v) by |1 - v| times that, and by its
    square, which is not in the margin where |1 - v| is larger. The logarithm of v errs by less than 2^-47
    of it. If y is the same for all t, v is known.
    """
    t = c * z
    y = 1 + t
    if abs(y) < 2.0**-10:
        return _UNKNOWN
    if y < 0:
        return None
    v = y * y * y
    log_v = _near_log(v)
    error = abs(t) * 2.0**-46
    known = 1 + (t - error) == 1 + (t + error)
    margin = 1 + z * z - log + d * (abs(1 - v) + abs(log_v)) * (1 + 1 / y)
    margin = 2.0**-42 * margin + (0 if known else d * 2.0**-84)
    gap = 0.5 * (z * z) + d * (1 - v + log_v) - log
    if abs(gap) <= margin and known:
        g = d * (1 - v + _exact_log(v))
        gap = 0.5 * (z * z) + g - log
        margin = 2.0**-42 * (1 + z * z - log + abs(g))
    return gap > 0 if abs(gap) > margin else _UNKNOWN


def _passes_exactly(z: float, c: float, d: float, u: float) -> Optional[bool]:
    y = 1 + c * z
    if y <= 0:
        return None
    v = y * y * y
    passes: bool = EXACT_MATH.log(1 - u) < 0.5 * (z * z) + d * (1 - v + EXACT_MATH.log(v))
    return passes


def _near_log(x: float) -> float:
    """Compute the logarithm of a normal number to within 2^-48 of it, as `elementary.log` does."""
    m, k = math.frexp(x)
    if m < 0.7071067811865476:
        m, k = 2 * m, k - 1
    s = (m - 1) / (m + 1)
    square = s * s
    y = 0.0
    for n in range(23, 0, -2):
        y = y * square + 2 / n
    return y * s + k * 0.6931471805599453


# ---- exact normal numbers and powers -----------------------------------------------------------------


def _cosine(ctx: Any, u: Any, v: Any) -> Any:
    return ctx.sqrt(-2 * ctx.log1p(-u)) * ctx.cospi(2 * v)


def _sine(ctx: Any, u: Any, v: Any) -> Any:
    return ctx.sqrt(-2 * ctx.log1p(-u)) * ctx.sinpi(2 * v)


def _power(ctx: Any, x: Any, exponent: Any) -> Any:
    return ctx.exp(ctx.log(x) * exponent)


def _rounded_normals(v: Tensor, u: Tensor, second: bool) -> Tensor:
    """Return sqrt(-2 log(1 - u)) cos(2 pi v), or with sin, as single normal numbers are rounded.

    That is to odd, or to nearest if it is the second of two and the target is float64.
    """
    formula = _sine if second else _cosine
    to_nearest = second and target() is BINARY64
    program = executor.cached_pair_program(formula, 2)
    pairs = pair_arrays.elements_in_pairs(program, [u, v])
    if pairs is None:
        z, failed = torch.zeros_like(u), torch.ones_like(u, dtype=torch.bool)
    elif to_nearest:
        z, failed = pair_arrays.round_pairs(*pairs)
    else:
        z, failed = pair_arrays.round_pairs_to_odd(*pairs)
    round_one = rounded_to_nearest if to_nearest else rounded_to_odd
    for i in failed.nonzero().squeeze(1).tolist():

        def value(mp: Any, i: int = i) -> Any:
            turned = mp.sinpi if second else mp.cospi
            return mp.sqrt(-2 * mp.log1p(-mp.mpf(u[i].item()))) * turned(2 * mp.mpf(v[i].item()))

        z[i] = round_one(value)
    return z + 0.0


def _powers(x: Tensor, exponent: Tensor) -> Tensor:
    """Return x^exponent, 0 < x <= 1, correctly rounded to binary64."""
    found = pair_arrays.elements_by_pairs(
        _power, executor.cached_pair_program(_power, 2), [x, exponent]
    )
    y, failed = found or (torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool))
    zero = elementary.log(x) * exponent < -746  # half of the least binary64 number is exp(-745.1)
    y = torch.where(zero, 0.0, y)
    for i in (failed & ~zero).nonzero().squeeze(1).tolist():
        y[i] = power(x[i].item(), exponent[i].item())
    return y
