"""Test that operands of wrong sizes or dtypes raise: no compiled loop reads what it was not given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reproml

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[3]


def f(*shape: int) -> Any:
    return torch.rand(shape)


def i(n: int, *shape: int) -> Any:
    return torch.randint(n, shape)


POOL = ([2, 2], [2, 2], [0, 0])
CONVOLUTION = ([1, 1], [0, 0], [1, 1], False, [0, 0], 2)

# Valid arguments. Each tensor is replaced by one of another size or dtype.
VALID: dict[str, Any] = {
    "native_batch_norm": lambda: [f(2, 4, 3), f(4), f(4), f(4), f(4), True, 0.1, 1e-5],
    "_native_batch_norm_legit_no_training": lambda: [f(2, 4, 9), f(4), f(4), f(4), f(4), 0.1, 1e-5],
    "native_batch_norm_backward": lambda: [
        f(2, 4, 9), f(2, 4, 9), f(4), f(4), f(4), f(4), f(4), True, 1e-5, [True] * 3],
    "native_layer_norm": lambda: [f(2, 4, 3), [3], f(3), f(3), 1e-5],
    "native_layer_norm_backward": lambda: [
        f(2, 4, 3), f(2, 4, 3), [3], f(2, 4, 1), f(2, 4, 1), f(3), f(3), [True] * 3],
    "native_group_norm": lambda: [f(2, 4, 4), f(4), f(4), 2, 4, 4, 2, 1e-5],
    "native_group_norm_backward": lambda: [
        f(2, 4, 4), f(2, 4, 4), f(2, 2), f(2, 2), f(4), 2, 4, 4, 2, [True] * 3],
    "convolution": lambda: [f(2, 4, 5, 5), f(4, 2, 3, 3), f(4), *CONVOLUTION],
    "convolution_backward": lambda: [
        f(2, 4, 3, 3), f(2, 4, 5, 5), f(4, 2, 3, 3), [4], *CONVOLUTION, [True] * 3],
    "nll_loss_forward": lambda: [f(4, 3), i(3, 4), f(3), 1, -100],
    "nll_loss_backward": lambda: [f(4), f(4, 3), i(3, 4), f(3), 0, -100, f()],
    "nll_loss2d_forward": lambda: [f(2, 3, 2, 2), i(3, 2, 2, 2), f(3), 1, -100],
    "nll_loss2d_backward": lambda: [f(), f(2, 3, 2, 2), i(3, 2, 2, 2), f(3), 1, -100, f()],
    "avg_pool2d_backward": lambda: [f(1, 2, 2, 2), f(1, 2, 4, 4), *POOL, False, True, None],
    "_adaptive_avg_pool2d_backward": lambda: [f(1, 2, 2, 2), f(1, 2, 4, 4)],
    "max_pool2d_with_indices_backward": lambda: [
        f(1, 2, 2, 2), f(1, 2, 4, 4), *POOL, [1, 1], False, i(16, 1, 2, 2, 2)],
    "adaptive_max_pool2d_backward": lambda: [f(1, 2, 2, 2), f(1, 2, 4, 4), i(16, 1, 2, 2, 2)],
    "embedding_dense_backward": lambda: [f(4, 3), i(5, 4), 5, -1, False],
    "upsample_nearest2d_backward": lambda: [f(1, 2, 4, 4), [4, 4], [1, 2, 2, 2]],
    "scatter_add": lambda: [f(4, 3), 0, i(4, 2, 3), f(2, 3)],
    "index_add": lambda: [f(4, 3), 0, i(4, 2), f(2, 3)],
    "put": lambda: [f(4, 3), i(12, 2), f(2), True],
    "unfold_backward": lambda: [f(2, 2), [4], 0, 2, 2],
    "reflection_pad1d_backward": lambda: [f(1, 2, 6), f(1, 2, 4), [1, 1]],
    "_softmax_backward_data": lambda: [f(3, 4), f(3, 4), 1, torch.float32],
    "_log_softmax_backward_data": lambda: [f(3, 4), f(3, 4), 1, torch.float32],
    "mm": lambda: [f(3, 4), f(4, 2)],
    "addmm": lambda: [f(2), f(3, 4), f(4, 2)],
    "dot": lambda: [f(4), f(4)],
}  # fmt: skip

# Another number of windows, pixels or rows, or a start of another size, is valid.
FITS = {
    *[(name, 0) for name in ("scatter_add", "index_add", "put", "embedding_dense_backward")],
    *[
        (name, 0)
        for name in ("native_batch_norm", "_native_batch_norm_legit_no_training", "convolution")
    ],
    *[
        (name, 1)
        for name in ("mm", "convolution", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward")
    ],
    *[(name, 1) for name in ("max_pool2d_with_indices_backward", "adaptive_max_pool2d_backward")],
    ("scatter_add", 3),
    ("_adaptive_avg_pool2d_backward", 0),
}


def wrong(x: Any) -> Any:
    """Yield tensors that do not fit in x's place."""
    yield torch.zeros(1000 * max(x.numel(), 1), dtype=x.dtype)
    yield x.new_zeros(x.shape[:-1] + (x.shape[-1] + 1,) if x.dim() else (2,))
    if x.is_floating_point():
        yield x.new_zeros(0)


def test_valid_arguments_are_accepted():
    with reproml.exact():
        for name, arguments in VALID.items():
            getattr(aten, name)(*arguments())


@pytest.mark.parametrize("name", VALID)
def test_operands_of_wrong_size_raise(name):
    for at, x in enumerate(VALID[name]()):
        for replacement in (
            wrong(x) if isinstance(x, torch.Tensor) and (name, at) not in FITS else ()
        ):
            arguments = VALID[name]()
            arguments[at] = replacement
            with pytest.raises((RuntimeError, IndexError)), reproml.exact():
                getattr(aten, name)(*arguments)


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_operands_of_wrong_dtype_raise(name, dtype):
    if name in ("unfold_backward", "upsample_nearest2d_backward") and dtype is torch.float64:
        return  # which have no second operand of another dtype
    for at, x in enumerate(VALID[name]()):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and (name, at) not in FITS:
            arguments = VALID[name]()
            arguments[at] = x.to(dtype)
            with pytest.raises((RuntimeError, IndexError)), reproml.exact():
                getattr(aten, name)(*arguments)


def test_group_norm_of_too_many_rows_raises():
    """It read two million rows of an input of 32 numbers, so it runs in a process of its own."""
    script = (
        "import torch, reproml\nwith reproml.exact():\n"
        " torch.native_group_norm(torch.ones(2, 4, 4), None, None, 2000000, 4, 4, 2, 1e-5)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 1 and "RuntimeError: an input of shape [2, 4, 4]" in run.stderr


def test_optimizer_refuses_a_gradient_of_another_shape():
    p, g = f(3), f(1)
    with pytest.raises(RuntimeError, match="gradient"), reproml.exact():
        aten._fused_sgd_([p], [g], [], lr=0.1, momentum=0.0, weight_decay=0.0, dampening=0.0,
                         nesterov=False, maximize=False, is_first_step=True)  # fmt: skip


X, INDICES = torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.long)
ALONG: dict[str, Any] = {
    "_softmax": lambda d: aten._softmax(X, d, False),
    "_safe_softmax": lambda d: aten._safe_softmax(X, d),
    "_log_softmax": lambda d: aten._log_softmax(X, d, False),
    "_softmax_backward_data": lambda d: aten._softmax_backward_data(X, X, d, torch.float32),
    "glu": lambda d: aten.glu(X, d),
    "index_add": lambda d: aten.index_add(X, d, INDICES[0, :3], X[:, :3]),
    "linalg_cross": lambda d: aten.linalg_cross(X, X, dim=d),
    "prod": lambda d: aten.prod.dim_int(X, d),
    "renorm": lambda d: aten.renorm(X, 2, d, 1.0),
    "scatter_add": lambda d: aten.scatter_add(X, d, INDICES, X),
    **{
        name: lambda d, name=name: getattr(aten, name)(X, d)
        for name in "cumprod cumsum logcumsumexp median mode sort".split()
    },
    **{
        name: lambda d, name=name: getattr(aten, name)(X, [d])
        for name in "amax logsumexp mean nansum std sum var".split()
    },
}


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dim", [2, -3])
def test_axis_out_of_range_raises_index_error(name, dim):
    with pytest.raises(IndexError), reproml.exact():
        ALONG[name](dim)


def bag(indices: list[int], offsets: list[int]) -> Any:
    return aten._embedding_bag(f(3, 2), torch.tensor(indices), torch.tensor(offsets))


@pytest.mark.parametrize(
    "call",
    [
        lambda: bag([-1, 2], [0]),
        lambda: bag([3], [0]),
        lambda: bag([0, 1], [0, 5]),
        lambda: bag([1, 2], [1, 2]),
        lambda: bag([0, 1, 2, 1], [0, 3, 1]),
        lambda: aten.huber_loss(f(2), f(2), 1, 0.0),
        lambda: aten.huber_loss(f(2), f(2), 1, -1.0),
        lambda: aten.smooth_l1_loss(f(2), f(2), 1, -1.0),
        lambda: torch.nn.functional.cross_entropy(f(2, 3), torch.tensor([0, 1]), weight=f(4)),
    ],
)
def test_value_that_pytorch_refuses_raises_runtime_error(call):
    with pytest.raises(RuntimeError), reproml.exact():
        call()
