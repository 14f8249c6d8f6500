"""Test convolutions by panels of packed patches and by rows of planes against exact sums of fractions."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import cache
from typing import NamedTuple

import pytest
import torch

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics import formats
from reproml.arithmetic.operators import convolution
from tests.arithmetic.forms import limit_vectors
from verification import oracle
from verification.oracle import Real, check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")


@pytest.fixture(params=[2, 4, 8], autouse=True)
def vectors(request, monkeypatch):
    """Run the kernels with vectors of 2, 4 and 8 doubles, and fail if they leave a result to Python."""
    limit_vectors(request.param, *DTYPES)

    def refuse(*_):
        raise AssertionError("the kernel did not calculate this convolution")

    monkeypatch.setattr(convolution, "_patches", refuse)
    yield
    limit_vectors(8, *DTYPES)


class Case(NamedTuple):
    n: int
    groups: int
    c: int  # channels of a group
    o: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


CASES = {
    "image of one number": Case(3, 1, 9, 13, (1, 1), (3, 3), padding=(1, 1)),
    "images in one tile": Case(5, 1, 8, 8, (2, 2), (3, 3), padding=(1, 1)),
    "more weights than places": Case(2, 1, 11, 27, (2, 3), (3, 3), padding=(1, 1)),
    "one place": Case(1, 1, 9, 25, (3, 3), (3, 3)),
    "no margins": Case(2, 1, 9, 10, (5, 9), (2, 3)),
    "one by one": Case(3, 1, 25, 9, (3, 7), (1, 1)),
    "one by one with stride": Case(2, 1, 9, 17, (5, 6), (1, 1), stride=(2, 3)),
    "stride": Case(2, 1, 8, 9, (7, 6), (3, 3), stride=(2, 2), padding=(1, 1)),
    "stride beyond the kernel": Case(2, 1, 8, 8, (7, 7), (2, 1), stride=(3, 2)),
    "dilation": Case(2, 1, 8, 9, (7, 8), (3, 2), padding=(2, 1), dilation=(2, 3)),
    "padding beyond the kernel": Case(2, 1, 8, 9, (2, 3), (2, 2), padding=(3, 2)),
    "groups": Case(3, 2, 9, 10, (3, 4), (3, 3), padding=(1, 1)),
    "depthwise": Case(5, 9, 1, 1, (3, 5), (3, 3), padding=(1, 1)),
    "depthwise with stride": Case(3, 9, 1, 2, (6, 5), (3, 3), stride=(2, 2), padding=(1, 1)),
    "few outputs": Case(3, 1, 9, 7, (4, 4), (3, 3), padding=(1, 1)),
    "long rows": Case(2, 1, 2, 11, (4, 27), (3, 3), padding=(1, 1)),
    "long rows of several channels": Case(2, 1, 10, 3, (3, 26), (3, 2)),
    "several sections": Case(3, 1, 1, 8, (27, 29), (2, 2)),
    "long sums": Case(1, 1, 260, 8, (2, 2), (3, 3), padding=(1, 1)),
}


def numbers(kind, dtype, *shape, seed):
    """Return float32 numbers that numbers of the dtype equal."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if (
        kind == "ties"
    ):  # with multiples of 2^-12, sums are often midpoints of binary32 numbers, or zero
        x = torch.round(2 * x) * 2.0 ** -(formats.FORMATS[dtype].precision // 2) + (x > 1).float()
    return x.to(dtype).float()


def operands(case, kind, dtype):
    sides = zip(case.size, case.kernel, case.stride, case.padding, case.dilation)
    out = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in sides]
    x = numbers(kind, dtype, case.n, case.groups * case.c, *case.size, seed=1)
    w = numbers(kind, dtype, case.groups * case.o, case.c, *case.kernel, seed=2)
    g = numbers(kind, dtype, case.n, case.groups * case.o, *out, seed=3)
    return x, w, g, numbers(kind, dtype, case.groups * case.o, seed=4)


@cache
def exact(case, kind, dtype):
    """Return the exact result and both exact gradients, summed in integers."""
    x, w, g, bias = operands(case, kind, dtype)
    scale = 2**160
    ints = [[int(Fraction(v) * 2**80) for v in t.flatten().tolist()] for t in (x, w, g)]
    xs, ws, gs = ints
    (h, wide), (kh, kw), (oh, ow) = case.size, case.kernel, g.shape[2:]
    y = [int(Fraction(b) * scale) for b in bias.tolist()]
    y = [y[i // (oh * ow) % len(y)] for i in range(g.numel())]
    grad_x, grad_w = [0] * x.numel(), [0] * w.numel()
    for n, group, o in itertools.product(*map(range, (case.n, case.groups, case.o))):
        for c, i, j in itertools.product(*map(range, (case.c, kh, kw))):
            at_w = (((group * case.o + o) * case.c + c) * kh + i) * kw + j
            for p, q in itertools.product(range(oh), range(ow)):
                row = p * case.stride[0] + i * case.dilation[0] - case.padding[0]
                column = q * case.stride[1] + j * case.dilation[1] - case.padding[1]
                if not (0 <= row < h and 0 <= column < wide):
                    continue
                at_x = (((n * case.groups + group) * case.c + c) * h + row) * wide + column
                at_y = (((n * case.groups + group) * case.o + o) * oh + p) * ow + q
                y[at_y] += xs[at_x] * ws[at_w]
                grad_x[at_x] += gs[at_y] * ws[at_w]
                grad_w[at_w] += gs[at_y] * xs[at_x]
    return [[Real(Fraction(v, scale)) for v in values] for values in (y, grad_x, grad_w)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_convolution_and_gradients_are_rounded_once(case, kind, dtype):
    x, w, g, bias = operands(case, kind, dtype)
    rest = (case.stride, case.padding, case.dilation, False, [0, 0], case.groups)
    expected, mask = exact(case, kind, dtype), [True, True, False]
    layouts = (
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.mT.contiguous().mT,
    )
    for change in layouts:
        a, b, d = change(x), change(w), change(g)
        with formats.rounding_to(dtype):
            y = convolution.convolution(a, b, bias, *rest)
            grad_x, grad_w, _ = convolution.convolution_backward(d, a, b, None, *rest, mask)
        for found, values in zip((y, grad_x, grad_w), expected):
            assert found is not None
            with oracle.rounding_to(dtype):
                check(found.to(dtype).flatten(), values)
