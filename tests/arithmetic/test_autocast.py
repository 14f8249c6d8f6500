"""Tests of autocast and of models in 16 bits: PyTorch decides the dtypes, each operator rounds once."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import reproml
from reproml.arithmetic.compiler import kernels
from verification.oracle import same_bits

in_16_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def model():
    return nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 4)
    )


@in_16_bits
def test_autocast_gives_the_dtypes_of_pytorch(dtype):
    x = torch.randn(3, 4, 8)
    functions = [
        lambda: F.linear(x, x[0]),
        lambda: x @ x.mT,
        lambda: F.conv1d(x, x.reshape(8, 4, 3)),
        lambda: F.scaled_dot_product_attention(x, x, x),
        lambda: F.layer_norm(F.linear(x, x[0]), (4,)),
        lambda: F.linear(x, x[0]).softmax(-1),
        lambda: F.linear(x, x[0]) + x[:, :, :4],
        lambda: F.mse_loss(F.linear(x, x[0]), x[:, :, :4]),
        lambda: F.linear(x, x[0]).exp(),
        lambda: torch.cat([F.linear(x, x[0]), x[:, :, :4]]),
    ]
    for function in functions:
        found = []
        for context in (reproml.exact(), torch.no_grad()):
            with context, torch.autocast("cpu", dtype=dtype):
                found.append(function())
        exact, native = found
        assert exact.dtype is native.dtype
        torch.testing.assert_close(exact, native, rtol=0.05, atol=0.05)


def train(dtype, autocast, library=True, checkpointed=False, accumulated=1):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, reproml.exact():
        if not library:
            patch.setattr(kernels, "library", None)
        net = model() if autocast else model().to(dtype)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for _ in range(3):
            for _ in range(accumulated):
                x = torch.randn(5, 8).to(torch.float32 if autocast else dtype)
                with torch.autocast("cpu", dtype=dtype, enabled=autocast):
                    y = checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
                    assert y.dtype is dtype
                    loss = F.cross_entropy(y, torch.arange(5) % 4) / accumulated
                loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            nn.utils.clip_grad_value_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in net.parameters()]


@in_16_bits
@pytest.mark.parametrize("autocast", [True, False])
def test_training_has_the_same_bits_on_both_paths(dtype, autocast):
    expected = train(dtype, autocast)
    assert all(p.dtype is (torch.float32 if autocast else dtype) for p in expected)
    assert all(map(same_bits, expected, train(dtype, autocast, library=False)))
    assert all(map(same_bits, expected, train(dtype, autocast, checkpointed=True)))
    accumulated = [train(dtype, autocast, library, accumulated=2) for library in (True, False)]
    assert all(map(same_bits, *accumulated))


@in_16_bits
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(8, 6, 2, batch_first=True),
        lambda: nn.GRU(8, 6, bidirectional=True),
        lambda: nn.RNN(8, 6),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    ],
)
def test_layers_in_16_bits_have_the_same_bits_on_both_paths(dtype, make):
    torch.manual_seed(0)
    layer, x = make().to(dtype), torch.randn(3, 4, 8).to(dtype)

    def run():
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))
        return [y.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())]

    native = run()
    with reproml.exact():
        exact = run()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "library", None)
            reference = run()
    assert all(map(same_bits, exact, reference))
    for found, near in zip(exact, native):
        assert found.dtype is dtype
        torch.testing.assert_close(found, near, rtol=0.1, atol=0.1)


@in_16_bits
def test_default_dtype_of_16_bits_trains(dtype):
    results = []
    for library in (True, False):
        torch.set_default_dtype(dtype)
        try:
            with pytest.MonkeyPatch.context() as patch, reproml.exact():
                if not library:
                    patch.setattr(kernels, "library", None)
                torch.manual_seed(0)
                net = model()
                y = net(torch.randn(5, 8))
                y.square().mean().backward()
                assert (torch.arange(3) / 3).dtype is dtype
                assert (torch.arange(3) + torch.arange(3)).dtype is torch.int64
                results.append([y.detach(), *(p.grad for p in net.parameters())])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(x.dtype is dtype for x in results[0])
    assert all(map(same_bits, *results))
