"""Test that compiled convolutions equal im2col and a matrix product, bit for bit, for every geometry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.operators import convolution
from verification.oracle import same_bits

pytestmark = pytest.mark.skipif(kernels.library is None, reason="the kernels are not built")


@pytest.fixture(params=[2, 4, 8], autouse=True)
def vectors(request):
    """Run the kernels with vectors of 2, 4 and 8 doubles."""
    kernels.library.reproml_limit_vectors(request.param)
    yield
    kernels.library.reproml_limit_vectors(8)


def both(function, *arguments):
    """Return the results with and without the compiled kernels."""
    library = kernels.library
    compiled = function(*arguments)
    kernels.library = None
    try:
        return compiled, function(*arguments)
    finally:
        kernels.library = library


def numbers(kind, *shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":  # integer multiples of half an ulp of 1, plus 1
        return torch.round(2 * x) * 2.0**-12 + (x > 1).float()
    return torch.relu(x) if kind == "sparse" else x


def check(x, w, g, bias, places):
    """Check forward and both gradients of a convolution, and the transposed convolution of its output."""
    stride, padding, dilation, groups = places
    rest = (stride, padding, dilation, False, [0, 0], groups)
    assert same_bits(*both(convolution.convolution, x, w, bias, *rest))
    backward = both(convolution.convolution_backward, g, x, w, None, *rest, [True, True, False])
    for compiled, reference in zip(*backward):
        assert reference is None or same_bits(compiled, reference)
    more = [min(1, s - 1) for s in stride]
    rest = (stride, padding, dilation, True, more, groups)
    size = [
        (n - 1) * s - 2 * p + d * (k - 1) + m + 1
        for n, s, p, d, k, m in zip(g.shape[2:], stride, padding, dilation, w.shape[2:], more)
    ]
    if min(size) > 0:
        assert same_bits(*both(convolution.convolution, g, w, None, *rest))


@settings(max_examples=40)
@given(st.data())
def test_every_geometry_matches_reference(data):
    def pair(low, high):
        return [data.draw(st.integers(low, high)) for _ in range(2)]

    groups, images = data.draw(st.sampled_from([1, 1, 2, 3])), data.draw(st.integers(1, 4))
    c, o = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 10))
    size, kernel, stride, padding, dilation = (
        pair(1, 20),
        pair(1, 4),
        pair(1, 3),
        pair(0, 3),
        pair(1, 3),
    )
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)
    ]
    assume(min(out) > 0)
    kind = data.draw(st.sampled_from(["normal", "ties", "sparse"]))
    x = numbers(kind, images, groups * c, *size, seed=1)
    w = numbers(kind, groups * o, c, *kernel, seed=2)
    g = numbers(kind, images, groups * o, *out, seed=3)
    bias = numbers(kind, groups * o, seed=4)
    check(x, w, g, bias, (stride, padding, dilation, groups))


def test_result_is_independent_of_threads():
    x, w, g = (numbers("normal", *s) for s in ((37, 6, 14, 14), (16, 6, 5, 5), (37, 16, 10, 10)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(x, w, g, numbers("normal", 16), ([1, 1], [0, 0], [1, 1], 1))
    finally:
        torch.set_num_threads(before)


def test_result_is_independent_of_memory_layout():
    x, w, g = (numbers("normal", *s) for s in ((2, 4, 9, 9), (6, 4, 3, 3), (2, 6, 9, 9)))
    places = ([1, 1], [1, 1], [1, 1], 1)
    for change in (lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.flip(-1)):
        check(change(x), change(w), change(g), None, places)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", ["x", "w", "g"])
def test_non_finite_operands_match_reference(value, where):
    operands = {"x": (2, 2, 6, 6), "w": (3, 2, 3, 3), "g": (2, 3, 3, 3)}
    tensors = {name: numbers("normal", *shape) for name, shape in operands.items()}
    tensors[where][0, 1, 1, 2] = value
    check(tensors["x"], tensors["w"], tensors["g"], None, ([2, 2], [1, 1], [1, 1], 1))


def test_empty_batch_matches_reference():
    x, w, g = (torch.ones(s) for s in ((0, 2, 6, 6), (3, 2, 3, 3), (0, 3, 4, 4)))
    check(x, w, g, torch.ones(3), ([1, 1], [0, 0], [1, 1], 1))


ONES = {
    "x": (2, 4, 5, 5),
    "w": (4, 2, 3, 3),
    "bias": (4,),
    "stride": 1,
    "padding": 0,
    "dilation": 1,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"w": (4, 3, 3, 3)},
        {"w": (3, 2, 3, 3)},
        {"w": (4, 2, 3)},
        {"bias": (2,)},
        {"stride": -1},
        {"stride": 0},
        {"dilation": 0},
        {"padding": -1},
        {"x": (2, 3, 5, 5)},
        {"w": (4, 2, 9, 9), "padding": 1},
    ],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_invalid_arguments_raise_runtime_error(changed, transposed):
    """PyTorch checks these in its own kernels, which do not run here."""
    of = {**ONES, **changed}
    if transposed and of["w"] in ((4, 3, 3, 3), (4, 2, 9, 9)):
        of["bias"] = (5,)
    x, w, bias = (torch.ones(of[name]) for name in ("x", "w", "bias"))
    rest = ([of["stride"]] * 2, [of["padding"]] * 2, [of["dilation"]] * 2, transposed, [0, 0], 2)
    with pytest.raises(RuntimeError):
        convolution.convolution(x, w, bias, *rest)


@pytest.mark.parametrize("which", range(3))
def test_other_dtypes_raise_not_exact_error(which):
    operands = [torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), torch.ones(2)]
    operands[which] = operands[which].long()
    with pytest.raises(reproml.NotExactError):
        x, w, bias = operands
        convolution.convolution(x, w, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def test_stride_beyond_input_matches_reference():
    """The kernel skips most of the image, and the gradient's margin cuts off more than the image has."""
    x, w = numbers("normal", 1, 2, 40, 40), numbers("normal", 3, 2, 1, 1)
    check(x, w, numbers("normal", 1, 3, 1, 1), None, ([900, 900], [0, 0], [1, 1], 1))
    x, w = numbers("normal", 3, 1, 1, 1), numbers("normal", 2, 1, 1, 1)
    check(x, w, numbers("normal", 3, 2, 1, 1), None, ([2, 5], [0, 2], [1, 1], 1))
