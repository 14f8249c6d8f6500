"""Forward-mode derivatives: PyTorch's formulas consist of operators of the table, each rounded once."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch.autograd import forward_ad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import reproml
from reproml import NotExactError
from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import kernels
from verification.oracle import check, real, same_bits

Function = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: dict[str, Function] = {
    "product": lambda x: x @ x.T,
    "linear": lambda x: F.linear(x, x[:3], x[0, :3]),
    "convolution": lambda x: F.conv2d(x.reshape(1, 1, 5, 4), x[:2, :2].reshape(1, 1, 2, 2), padding=1),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: F.cross_entropy(x, torch.arange(5) % 4),
    "layer_norm": lambda x: F.layer_norm(x, (4,), x[0], x[1]),
    "batch_norm": lambda x: F.batch_norm(x, None, None, x[0], x[1], training=True),
    "activations": lambda x: F.gelu(x) + F.silu(x) * x.tanh() / (1 + x.sigmoid()),
    "elementary": lambda x: x.exp() - (x * x + 1).log() * x.sin().atan() + (x.abs() + 1).sqrt() ** 3,
    "reductions": lambda x: x.var(0) + x.mean(0) * x.norm() + x.amax(0) + x.cumsum(0)[2] + x.prod(0),
    "indexing": lambda x: x[[0, 2, 2]].scatter_add(0, torch.zeros(3, 4, dtype=torch.int64), x[:3] ** 2),
    "pooling": lambda x: F.avg_pool2d(x[None, None], 2) + F.max_pool2d(x[None, None], 2),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "losses": lambda x: F.mse_loss(x, x.flip(0) ** 2) + F.smooth_l1_loss(x, -x),
}  # fmt: skip


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivative_has_the_same_bits_on_both_paths(name, monkeypatch):
    function, (x, t) = FUNCTIONS[name], inputs()
    with reproml.exact():
        found = jvp(function, (x,), (t,))
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(function(forward_ad.make_dual(x, t)))
    assert all(map(same_bits, found, y))
    monkeypatch.setattr(kernels, "library", None)
    with reproml.exact():
        again = jvp(function, (x,), (t,))
    assert all(map(same_bits, found, again))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
        expected = jvp(function, (x.double(),), (t.double(),))
    assert all(torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected))


def test_derivative_of_a_product_is_that_of_its_formula():
    """PyTorch computes t y + u x: two products and a sum, each rounded once."""
    x, y = torch.tensor([1 + 2.0**-23]), torch.tensor([3.0])
    t, u = torch.tensor([1 / 3]), torch.tensor([1e8])
    with reproml.exact():
        _, found = jvp(torch.mul, (x, y), (t, u))
    terms = [
        torch.tensor(float(Fraction(a.item()) * Fraction(b.item()))) for a, b in ((t, y), (u, x))
    ]
    check(found, [real(terms[0].item()) + real(terms[1].item())])


def test_jacobians_and_hessians_run():
    torch.manual_seed(2)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def function(x: torch.Tensor) -> Any:
        return functional_call(net, weights, (x,))

    x = inputs()[0][0]
    with reproml.exact():
        forward, reverse = jacfwd(function)(x), jacrev(function)(x)
        second = hessian(lambda x: function(x).square().sum())(x)
    assert torch.allclose(forward, reverse, atol=1e-6) and torch.allclose(
        second, second.T, atol=1e-6
    )


DIFFERING: dict[str, Callable[..., Any]] = {
    "clamp": lambda x: x.clamp(0.0, 1.0),
    "clamp_min": lambda x: x.clamp_min(torch.zeros(4)),
    "clamp_max": lambda x: (x * 1).clamp_max_(0.5),
    "maximum": lambda x: torch.max(x, x.flip(0)),
    "minimum": lambda x: torch.minimum(x, x.flip(0)),
    "fmax": lambda x: torch.fmax(x, x.flip(0)),
    "fmin": lambda x: torch._foreach_minimum([x], [x.flip(0)])[0] + torch.fmin(x, x),
}


@pytest.mark.parametrize("name", DIFFERING)
def test_formulas_that_differ_between_versions_are_refused(name):
    assert set(DIFFERING) == operator_table.WITHOUT_FORWARD_MODE
    function, (x, t) = DIFFERING[name], inputs()
    with reproml.exact():
        function(x)
        assert torch.func.vjp(function, x)[1](t)[0].shape == x.shape
        for transform in (lambda f: jvp(f, (x,), (t,)), lambda f: jacfwd(f)(x)):
            with pytest.raises(NotExactError, match="forward-mode derivative differs"):
                transform(function)
        with forward_ad.dual_level(), pytest.raises(NotExactError, match="forward-mode"):
            function(forward_ad.make_dual(x, t))
        function(x)


NORMS: dict[str, Callable[..., Any]] = {
    "native_layer_norm": lambda x: F.layer_norm(x, (4,), x[0], x[1]),
    "native_group_norm": lambda x: F.group_norm(x, 2, x[0], x[1]),
    "native_batch_norm": lambda x: F.batch_norm(x, None, None, x[0], x[1], training=True),
    "_native_batch_norm_legit": lambda x: torch.ops.aten._native_batch_norm_legit.no_stats(
        x, x[0], x[1], True, 0.1, 1e-5
    )[0],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_derivative_of_norm_in_16_bits_is_refused(name, dtype):
    """PyTorch's formula takes mean and rstd, which are float32 here: so would be the derivative."""
    assert set(NORMS) == operator_table.WITHOUT_NARROW_FORWARD_MODE
    x, t = inputs()
    with reproml.exact():
        assert jvp(NORMS[name], (x,), (t,))[1].dtype is torch.float32
        x, t = x.to(dtype), t.to(dtype)
        assert torch.func.vjp(NORMS[name], x)[1](t)[0].dtype is dtype
        with pytest.raises(NotExactError, match="derivative is not defined for 16 bits"):
            jvp(NORMS[name], (x,), (t,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"layer_norm", "batch_norm"}))
def test_derivative_has_the_dtype_of_the_result(name, dtype):
    x, t = (v.to(dtype) for v in inputs())
    with sdpa_kernel(SDPBackend.MATH):
        try:
            native = [v.dtype for v in jvp(FUNCTIONS[name], (x,), (t,))]
        except RuntimeError:  # PyTorch has no such derivative
            native = [dtype, dtype]
        with reproml.exact():
            assert [v.dtype for v in jvp(FUNCTIONS[name], (x,), (t,))] == native


def test_digest_is_the_same_in_every_version():
    """It has been confirmed with PyTorch 2.8 and 2.15."""
    x, t = inputs()
    with reproml.exact():
        found = {name: jvp(f, (x,), (t,))[1] for name, f in FUNCTIONS.items()}
    assert (
        reproml.digest(found) == "845dd311dd3c322deb005053d78918c05c1669a38e223942f4fece352c698d43"
    )
