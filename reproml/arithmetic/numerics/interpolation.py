"""Functions of one variable as polynomials on intervals, with a proven bound of the error.

The polynomials interpolate values of mpmath, which are computed when a function is first used.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from reproml.arithmetic.numerics.elementary import horner
from reproml.arithmetic.numerics.rounding import SLACK, U

_BITS = 200  # a power of 2 for each degree is lost to cancellation
_lock = threading.Lock()  # mpmath's contexts are not thread-safe


class _Piece(NamedTuple):
    centre: float
    half: float  # of the interval's length
    coefficients: list[float]  # of powers of (x - centre) / half, the highest first
    bound: float  # of the absolute error


class Interpolated:
    """A function on the intervals between neighbouring edges.

    function: its value at a number, given mpmath. growth(mpmath, centre, radius): a bound of its absolute
    value on the disc around an interval's centre. reach: the disc's radius in half lengths of the interval.
    The function is analytic there. Centres are binary64 numbers, and the lengths powers of two.

    With rho = reach + sqrt(reach^2 - 1) the disc contains the ellipse with the foci at the ends whose half
    axes add up to rho half lengths. So interpolation in the n + 1 roots of a Chebyshev polynomial errs by
    at most 4 M rho^-n / (rho - 1) (L. N. Trefethen, Approximation Theory and Approximation Practice,
    theorem 8.2; its proof holds for these nodes as well, since a Chebyshev polynomial is aliased to one of
    them). Horner's scheme errs by gamma(2 k + 1) for the power k (N. Higham, Accuracy and Stability of
    Numerical Algorithms, 2nd ed., section 5.1), to which come the roundings of the coefficient and k times
    that of x - centre.
    """

    def __init__(
        self,
        function: Callable[[Any, Any], Any],
        edges: Sequence[float],
        growth: Callable[[Any, float, float], float],
        reach: float,
        degree: int,
    ) -> None:
        self.function, self.edges, self.growth = function, edges, growth
        self.reach, self.degree = reach, degree

    @cached_property
    def _pieces(self) -> list[_Piece]:
        with _lock:
            return [self._piece(a, b) for a, b in zip(self.edges, self.edges[1:])]

    def _piece(self, low: float, high: float) -> _Piece:
        centre, half = (low + high) / 2, (high - low) / 2
        mp, nodes, weights, chebyshev = _nodes(self.degree)
        values = np.array([self.function(mp, centre + half * x) for x in nodes])
        numbers = chebyshev.T @ (weights @ values)
        powers = [float(number) for number in numbers]
        rho = self.reach + math.sqrt(self.reach**2 - 1)
        omitted = self.growth(mp, centre, self.reach * half) * 4 * rho**-self.degree / (rho - 1)
        rounded = sum((3 * k + 3) * abs(number) for k, number in enumerate(powers)) * U
        return _Piece(centre, half, powers[::-1], (omitted + rounded) * SLACK)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at float64 numbers [n] within the edges, and bounds of their errors."""
        edges = torch.tensor(self.edges[1:-1], dtype=torch.float64, device="cpu")
        piece_of = torch.bucketize(x, edges)
        mid, error = torch.empty_like(x), torch.empty_like(x)
        for i in torch.bincount(piece_of).nonzero().squeeze(1).tolist():
            piece = self._pieces[i]
            at = (piece_of == i).nonzero().squeeze(1)
            u = (x[at] - piece.centre) * (1 / piece.half)
            mid[at], error[at] = horner(u, piece.coefficients), piece.bound
        return mid, error


@cache
def _nodes(degree: int) -> tuple[Any, Any, Any, Any]:
    """Return mpmath, the roots of a Chebyshev polynomial, and two matrices.

    The first computes the coefficients of Chebyshev polynomials from values at the roots; the rows of the
    second are the coefficients of their powers, from T(k + 1) = 2 x T(k) - T(k - 1).
    """
    import mpmath  # imported here because few programs need it

    mp = mpmath.MPContext()
    mp.prec = _BITS
    n = degree + 1
    cosines = [mp.cospi(mp.mpf(k) / (2 * n)) for k in range(4 * n)]
    angles = np.outer(np.arange(n), 2 * np.arange(n) + 1) % (4 * n)
    weights = np.array(cosines)[angles] * (mp.mpf(2) / n)
    weights[0] /= 2
    chebyshev = np.zeros((n, n), object)
    chebyshev[0, 0] = chebyshev[1, 1] = 1
    for k in range(2, n):
        chebyshev[k, 1:] = 2 * chebyshev[k - 1, :-1]
        chebyshev[k] -= chebyshev[k - 2]
    return mp, cosines[1 : 2 * n : 2], weights, chebyshev
