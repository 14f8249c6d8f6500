"""Sampling at the places of a grid (F.grid_sample), and its gradients, each element rounded once.

A number g of the grid, from -1 to 1, is at (g n + n - 1) / 2 of an axis of n elements, or at
(g + 1) (n - 1) / 2 with align_corners, computed exactly: a `Place` is a sum of two binary64 numbers. So the
neighbors of a place are exact, and so are its weights, the formulas below. PyTorch computes both in
binary32. A place that is infinite or NaN gives NaN.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.compiler.evaluate import TENSORS, elementwise, rowwise
from reproml.arithmetic.numerics.balls import Formula, RationalContext
from reproml.arithmetic.numerics.formats import narrow, operate
from reproml.arithmetic.numerics.rationals import Rationals
from reproml.arithmetic.numerics.rounding import SLACK, gamma, nearest, round_sum, two_sum
from reproml.arithmetic.operators.arguments import require_container, require_shape
from reproml.arithmetic.operators.creation import linspace
from reproml.arithmetic.operators.indexing import sums_in_planes
from reproml.arithmetic.operators.matmul import matmul
from reproml.errors import NotExactError

BILINEAR, NEAREST, BICUBIC = range(3)
ZEROS, BORDER, REFLECTION = range(3)


class Place(NamedTuple):
    """The real numbers s + t, where s is s + t rounded; float64 tensors."""

    s: Tensor
    t: Tensor

    def plus(self, x: Any) -> Place:
        """Add integers or halves of such: exact, as the last digits of s + t are in t."""
        s, lost = two_sum(self.s, torch.as_tensor(x, dtype=torch.float64, device=self.s.device))
        return Place(*two_sum(s, self.t + lost))

    def sign(self) -> Tensor:
        return torch.where(self.s == 0, self.t, self.s).sign()

    def choose(self, condition: Tensor, other: Place) -> Place:
        """Return `other` where the condition holds."""
        return Place(
            torch.where(condition, other.s, self.s), torch.where(condition, other.t, self.t)
        )

    def times(self, sign: Tensor) -> Place:
        return Place(self.s * sign, self.t * sign)

    def floor(self) -> Tensor:
        below = self.s.floor()
        return torch.where((below == self.s) & (self.t < 0), below - 1, below)


def _place(g: Tensor, n: int, align: bool) -> Place:
    factor, offset = (n - 1) / 2 if align else n / 2, (n - 1) / 2
    p = g.double() * factor  # exact: 24 bits times fewer than 29
    return Place(p, torch.zeros_like(p)).plus(offset)


def _clipped(place: Place, n: int) -> tuple[Place, Tensor]:
    """Return the place, moved to the nearest element if it is outside, and its derivative, 0 or 1."""
    low, high = place.sign() <= 0, place.plus(1 - n).sign() >= 0
    zero = torch.zeros_like(place.s)
    place = place.choose(low, Place(zero, zero)).choose(high & ~low, Place(zero + (n - 1), zero))
    return place, (~(low | high)).double()


def _reflected(place: Place, n: int, align: bool) -> tuple[Place, Tensor]:
    """Return the place, reflected at the borders until it is inside, and its derivative, 1 or -1."""
    low, span = (0.0, n - 1) if align else (-0.5, n)
    if not span:
        zero = torch.zeros_like(place.s)
        return Place(zero, zero), zero
    place = place.plus(-low)
    slope = torch.where(place.sign() < 0, -1.0, 1.0).double()
    place = place.times(slope)
    # Take the remainder by 2 span, of both parts, as s may be large.
    s, t = torch.fmod(place.s, 2 * span), torch.fmod(place.t, 2 * span)
    place = Place(*two_sum(s, t))
    place = place.choose(place.sign() < 0, place.plus(2 * span))
    place = place.choose(place.plus(-2 * span).sign() >= 0, place.plus(-2 * span))
    back = place.plus(-span).sign() >= 0
    place = place.choose(back, place.times(torch.tensor(-1.0, device=s.device)).plus(2 * span))
    return place.plus(low), torch.where(back, -slope, slope)


def _padded(place: Place, n: int, padding: int, align: bool) -> tuple[Place, Tensor]:
    """Return the place that padding gives, and its derivative."""
    slope = torch.ones_like(place.s)
    if padding == REFLECTION:
        place, slope = _reflected(place, n, align)
    if padding != ZEROS:
        place, inside = _clipped(place, n)
        slope = slope * inside
    return place, slope


# ---- weights as formulas -----------------------------------------------------------------------------

# Each takes d and t, |t| <= U d, whose sum is the fraction u of a place, and returns the weights of the
# neighbors. 1 - d is exact where d is not tiny, so that nothing cancels.


def _linear(ctx: Any, d: Any, t: Any) -> list[Any]:
    return [(1 - d) - t, d + t]


def _linear_slopes(ctx: Any, d: Any, t: Any) -> list[Any]:
    return [-1, 1]


def _cubic(ctx: Any, d: Any, t: Any) -> list[Any]:
    """Keys' cubic with a = -3/4 at 1 + u, u, 1 - u and 2 - u, as products."""
    v, u = _linear(ctx, d, t)
    near = [(1 + x - x * x * _FIVE_QUARTERS) for x in (u, v)]
    return [u * v * v * _A, v * near[0], u * near[1], u * u * v * _A]


def _cubic_slopes(ctx: Any, d: Any, t: Any) -> list[Any]:
    v, u = _linear(ctx, d, t)
    return [
        v * (1 - 3 * u) * _A,
        u * (u * _SLOPE_2 - _SLOPE_1),
        -(v * (v * _SLOPE_2 - _SLOPE_1)),
        u * (2 - 3 * u) * _A,
    ]


_A, _FIVE_QUARTERS, _SLOPE_2, _SLOPE_1 = (Fraction(n, 4) for n in (-3, 5, 15, 18))


def _combined(first: Formula, *rest: Formula) -> Formula:
    """Return the formula of all products of one weight for each axis. It takes d and t of each axis."""
    if not rest:
        return first
    others = _combined(*rest)

    def formula(ctx: Any, d: Any, t: Any, *offsets: Any) -> list[Any]:
        return [w * other for w in first(ctx, d, t) for other in others(ctx, *offsets)]

    return formula


# ---- neighbors ---------------------------------------------------------------------------------------


class _Samples(NamedTuple):
    """The neighbors of all places: n images, p places in each, k neighbors of a place.

    flat: int64 [n, p, k], index in an image; inside: bool [n, p, k], whether there is such an element.
    offsets: d and t of each axis, float64 [n, p], d NaN for a place that is not finite. slopes: the
    derivative of the place in each axis by the grid, float64 [n, p].
    """

    flat: Tensor
    inside: Tensor
    offsets: list[Tensor]
    slopes: list[Tensor]


def _samples(x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> _Samples:
    size = x.shape[2:]
    coordinates = grid.flatten(1, -2).unbind(-1)[::-1]  # the grid has x first
    index = torch.zeros(*coordinates[0].shape, 1, dtype=torch.int64, device=x.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    offsets, slopes = [], []
    for g, n in zip(coordinates, size):
        finite = g.isfinite()
        place = _place(torch.where(finite, g, 0.0), n, align)
        slope = torch.ones_like(place.s)
        if mode != BICUBIC:
            place, slope = _padded(place, n, padding, align)
        floor = place.floor()
        d, t = place.plus(-floor)
        if mode == NEAREST:  # ties to even
            odd = floor % 2 == 1
            upper = (2 * d > 1) | ((2 * d == 1) & ((t > 0) | ((t == 0) & odd)))
            neighbors = [floor + upper.double()]
        elif mode == BILINEAR:
            neighbors = [floor, floor + 1]
        else:
            # From 2^52 on, s is an integer, and t may have more of them.
            more = torch.where(floor.abs() >= 2.0**52, place.t.floor(), 0.0)
            d, t = Place(d, t).plus(-more)
            places = [Place(floor, more).plus(k) for k in (-1, 0, 1, 2)]
            neighbors = [_padded(p, n, padding, align)[0].s for p in places]
        within = torch.stack([(m >= 0) & (m < n) for m in neighbors], -1)
        here = torch.stack(neighbors, -1).clamp(0, n - 1).long()
        index = (index.unsqueeze(-1) * n + here.unsqueeze(-2)).flatten(-2)
        inside = (inside.unsqueeze(-1) & within.unsqueeze(-2)).flatten(-2)
        offsets += [torch.where(finite, d, torch.nan), t]
        slopes.append(slope * ((n - 1) / 2 if align else n / 2))
    return _Samples(index, inside, offsets, slopes)


def _values(x: Tensor, samples: _Samples) -> list[Tensor]:
    """Return the neighbors' values, k tensors [n, c, p], zero outside."""
    images = x.flatten(2)
    shape = (len(x), x.shape[1], samples.flat.shape[1])
    return [
        torch.where(ok.unsqueeze(1), images.gather(2, i.unsqueeze(1).expand(shape)), 0.0)
        for i, ok in zip(samples.flat.unbind(-1), samples.inside.unbind(-1))
    ]


def _is_known(samples: _Samples) -> Tensor:
    """Return whether all coordinates of a place are finite, [n, p]."""
    return ~torch.stack(samples.offsets[::2]).isnan().any(0)


def _values_at(x: Tensor, samples: _Samples, n: Tensor, c: Tensor, p: Tensor) -> list[Tensor]:
    """Return the neighbors' values of some places, k tensors of the indices' common shape."""
    found = x.flatten(2)[n.unsqueeze(-1), c.unsqueeze(-1), samples.flat[n, p]]
    return list(torch.where(samples.inside[n, p], found, 0.0).unbind(-1))


# ---- the compiled loops ------------------------------------------------------------------------------

_SAMPLES, _OF_IMAGE, _OF_GRID = range(3)  # as in csrc/grid_sampling.c


def _by_loop(
    kind: int, samples: _Samples, x: Tensor, g: Optional[Tensor]
) -> Optional[tuple[Tensor, Optional[Tensor]]]:
    """Compute samples or a gradient by csrc/grid_sampling.c; None where it does not apply.

    g: float32 [n, c, p]. Returns the samples [n, c, p], the gradient [n, c, area] of x or [n, p, axes] of
    the grid, and a bool tensor of its shape, where it failed; None: nowhere.
    """
    loops = kernels.loops()
    n, p, k = samples.flat.shape
    axes, c, area = len(samples.slopes), x.shape[1], math.prod(x.shape[2:])
    if loops is None or not x.is_cpu or not p:
        return None
    shape = {_SAMPLES: (n, c, p), _OF_IMAGE: (n, c, area), _OF_GRID: (n, p, axes)}[kind]
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    failed = torch.empty(shape, dtype=torch.bool, device="cpu")
    index = torch.where(samples.inside & _is_known(samples).unsqueeze(-1), samples.flat, -1)
    dense = [t.contiguous() for t in (*samples.offsets, *samples.slopes)]
    x, g = x.contiguous(), None if g is None else g.contiguous()
    count = loops.reproml_grid_sampling(
        kind,
        axes,
        round(k ** (1 / axes)),
        (ctypes.c_int64 * 4)(n, c, p, area),
        (ctypes.c_void_p * len(dense))(*[t.data_ptr() for t in dense]),
        index.contiguous().data_ptr(),
        x.data_ptr(),
        None if g is None else g.data_ptr(),
        out.data_ptr(),
        failed.data_ptr(),
    )
    return out, failed if count else None


# ---- PyTorch's operators -----------------------------------------------------------------------------

_WEIGHTS = {BILINEAR: (_linear, _linear_slopes), BICUBIC: (_cubic, _cubic_slopes)}


def grid_sampler(x: Tensor, grid: Tensor, mode: int, padding: int, align: bool) -> Tensor:
    """Return the sum of the neighbors of each place times their weights, rounded once.

    x: float32 [n, c, *size]; grid: float32 [n, *out, axes]. Returns float32 [n, c, *out].
    """
    _require(x, grid, mode)
    shape = (*x.shape[:2], *grid.shape[1:-1])
    if 0 in shape:
        return x.new_empty(shape)
    samples = _samples(x, grid, mode, padding, align)
    if mode == NEAREST:
        (values,) = _values(x, samples)
        return torch.where(_is_known(samples).unsqueeze(1), values, torch.nan).reshape(shape)
    axes, weights = grid.shape[-1], _combined(*[_WEIGHTS[mode][0]] * grid.shape[-1])

    def formula(ctx: Any, *operands: Any) -> Any:
        return _dot(weights(ctx, *operands[: 2 * axes]), operands[2 * axes :])

    compiled = _by_loop(_SAMPLES, samples, x, None)
    if compiled is None:
        offsets = [d.unsqueeze(1) for d in samples.offsets]
        return elementwise(formula, *offsets, *_values(x, samples)).reshape(shape)
    result, failed = compiled
    if failed is not None:
        n, c, p = failed.nonzero(as_tuple=True)
        few = [d[n, p] for d in samples.offsets]
        result[n, c, p] = elementwise(formula, *few, *_values_at(x, samples, n, c, p))
    return result.reshape(shape)


def grid_sampler_backward(
    g: Tensor,
    x: Tensor,
    grid: Tensor,
    mode: int,
    padding: int,
    align: bool,
    mask: Sequence[bool],
) -> tuple[Optional[Tensor], Tensor]:
    """Return the gradients of x, if mask[0], and of the grid: each element is one sum, rounded once."""
    _require(x, grid, mode)
    require_shape("the gradient", g, (*x.shape[:2], *grid.shape[1:-1]))
    if not g.numel():
        zeros = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (x, grid)]
        return zeros[0] if mask[0] else None, zeros[1]
    samples = _samples(x, grid, mode, padding, align)
    g = g.flatten(2)
    grad_x = _gradient_of_image(g, x, samples, mode) if mask[0] else None
    if mode == NEAREST:
        return grad_x, torch.zeros_like(grid, memory_format=torch.contiguous_format)
    return grad_x, _gradient_of_grid(g, x, samples, mode).reshape(grid.shape)


def affine_grid(theta: Tensor, size: Sequence[int], align: bool) -> Tensor:
    """Return the grid of an affine map: theta times (x, y, 1) or (x, y, z, 1), a matrix product.

    The places x, from -1 to 1, are rounded: linspace(-1, 1, n), without align_corners times n - 1 and
    divided by n. theta: float32 [n, axes, axes + 1]; size: [n, c, *out]. Returns float32 [n, *out, axes].
    """
    axes, out = len(size) - 2, list(size[2:])
    require_container(theta)
    if axes not in (2, 3) or theta.shape != (size[0], axes, axes + 1) or min(size) < 1:
        raise RuntimeError(f"theta of shape {list(theta.shape)} does not fit size {list(size)}")
    columns: list[Tensor] = []
    for axis, n in enumerate(out):
        line = linspace(-1, 1, n, device=theta.device) if n > 1 else theta.new_zeros(1)
        if not align and n > 1:
            line = operate(torch.div, operate(torch.mul, line, n - 1), n)
        shape = [n if a == axis else 1 for a in range(axes)]
        columns.insert(0, line.reshape(shape).expand(out))  # x first
    places = torch.stack([*columns, torch.ones_like(columns[0])], -1).reshape(1, -1, axes + 1)
    grid = matmul(places.expand(len(theta), -1, -1), theta.transpose(1, 2))
    return grid.reshape(size[0], *out, axes)


def _gradient_of_grid(g: Tensor, x: Tensor, samples: _Samples, mode: int) -> Tensor:
    """[n, c, p] -> [n, p, axes]"""
    axes = len(samples.slopes)
    compiled = _by_loop(_OF_GRID, samples, x, g)
    failed = None if compiled is None else compiled[1]
    if compiled is not None and failed is None:
        return compiled[0]
    if failed is None:
        values = _values(x, samples)
        offsets = [d.unsqueeze(1) for d in (*samples.slopes, *samples.offsets)]
    else:  # the rows of the places that failed
        n, p = failed.any(-1).nonzero(as_tuple=True)
        at = n.unsqueeze(1), torch.arange(x.shape[1], device=x.device), p.unsqueeze(1)
        values, g = _values_at(x, samples, *at), g[at]
        offsets = [d[n, p].unsqueeze(1) for d in (*samples.slopes, *samples.offsets)]
    grads = []
    for axis in reversed(range(axes)):  # the grid has x first
        weights = _combined(*[_WEIGHTS[mode][a == axis] for a in range(axes)])

        def formula(ctx: Any, g: Any, slope: Any, *operands: Any) -> Any:
            ws = weights(ctx, *operands[: 2 * axes])  # noqa: B023
            return ctx.sum(_dot(ws, operands[2 * axes :]) * g * slope)

        row = rowwise(formula, 1, g, offsets[axis], *offsets[axes:], *values)
        grads.append(row.squeeze(1))
    result = torch.stack(grads, -1)
    if compiled is None:
        return result
    compiled[0][n, p] = result
    return compiled[0]


def _gradient_of_image(g: Tensor, x: Tensor, samples: _Samples, mode: int) -> Tensor:
    """Return, for each element, the sum of weight * gradient over all places whose neighbor it is."""
    (n, c, p), k, area = g.shape, samples.flat.shape[-1], math.prod(x.shape[2:])
    inside = samples.inside & _is_known(samples).unsqueeze(-1)
    index = torch.where(inside, samples.flat, area).reshape(n, p * k)  # one more for all outside
    if mode == NEAREST:
        every = index.unsqueeze(1).expand(n, c, p).reshape(n * c, p)
        return sums_in_planes(every, g.reshape(n * c, p), area + 1)[:, :-1].reshape(x.shape)
    weights = _combined(*[_WEIGHTS[mode][0]] * len(samples.slopes))
    finite = g.isfinite()
    terms = torch.where(finite, g, 0.0).double().unsqueeze(-1)

    def resolve(failed: Tensor) -> Any:
        return _exact_gradients(weights, samples, index, terms, failed, area)

    compiled = _by_loop(_OF_IMAGE, samples, x, g) if finite.all() else None
    if compiled is not None:
        result, left = compiled
        if left is not None:
            at = left.reshape(-1).nonzero().squeeze(1)
            exact = torch.as_tensor(resolve(at), dtype=torch.float64, device="cpu")
            result.view(-1)[at] = narrow(exact)
        return result.reshape(x.shape)
    balls = weights(TENSORS, *[TENSORS.exact(d) for d in samples.offsets])
    w = torch.where(inside, torch.stack([b.mid for b in balls], -1), 0.0).unsqueeze(1)
    e = torch.where(inside, torch.stack([b.error for b in balls], -1), 0.0).unsqueeze(1)

    def scattered(terms: Tensor) -> Tensor:
        zeros = torch.zeros(n, c, area + 1, dtype=torch.float64, device=x.device)
        every = index.unsqueeze(1).expand(n, c, p * k)
        return zeros.scatter_add(2, every, terms.expand(n, c, p, k).reshape(n, c, p * k))[
            ..., :area
        ]

    mid = scattered(terms * w) + 0.0
    counts = scattered(torch.ones_like(w)) + 1
    error = scattered((terms * w).abs()) * gamma(counts) + scattered(terms.abs() * e) * SLACK

    result = round_sum(mid, error, resolve)
    limits = scattered(torch.where(finite, 0.0, g.double()).unsqueeze(-1) * w)
    return torch.where(limits == 0, result, limits.float()).reshape(x.shape)


def _exact_gradients(
    weights: Formula, samples: _Samples, index: Tensor, terms: Tensor, failed: Tensor, area: int
) -> Any:
    """Return the correctly rounded sums of `_gradient_of_image` at these flat indices."""
    n, c, p, _ = terms.shape
    k = samples.flat.shape[-1]
    image, channel, element = np.unravel_index(failed.cpu().numpy(), (n, c, area))
    at = index.cpu().numpy()
    order = np.argsort(at, 1, kind="stable")
    offsets = [d.cpu().numpy() for d in samples.offsets]
    gradients = terms.squeeze(-1).cpu().numpy()
    values = np.zeros(len(element))
    for i, (image_, channel_, element_) in enumerate(zip(image, channel, element)):
        ordered = order[image_]
        start, end = np.searchsorted(at[image_], [element_, element_ + 1], sorter=ordered)
        places, neighbors = np.divmod(ordered[start:end], k)
        if not len(places):
            continue
        few = [Rationals.of_floats(d[image_][places]) for d in offsets]
        rows = [w.fractions() for w in weights(RationalContext(), *few)]
        numbers = gradients[image_, channel_][places].tolist()
        products = [rows[m][j] * Fraction(v) for j, (m, v) in enumerate(zip(neighbors, numbers))]
        values[i] = nearest(sum(products, Fraction(0)))
    return values


def _dot(weights: Sequence[Any], values: Sequence[Any]) -> Any:
    total = values[0] * weights[0]
    for w, v in zip(weights[1:], values[1:]):
        total = total + v * w
    return total


def _require(x: Tensor, grid: Tensor, mode: int) -> None:
    for t in (x, grid):
        if t.dtype is not torch.float32:
            raise NotExactError(f"it is defined for float32, not for {t.dtype}")
    axes = x.dim() - 2
    if (
        axes not in (2, 3)
        or grid.dim() != x.dim()
        or grid.shape[-1] != axes
        or len(grid) != len(x)
        or 0 in x.shape[2:]
    ):
        raise RuntimeError(
            f"a grid of shape {list(grid.shape)} does not fit an input of shape {list(x.shape)}"
        )
    if mode == BICUBIC and axes != 2:
        raise NotExactError("bicubic sampling is defined for images, not for volumes")
