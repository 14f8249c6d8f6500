"""Programs over a sharded batch give the results of a single process, bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reproml
from reproml.arithmetic.distributed import pending
from reproml.arithmetic.distributed.sharded import Sharded, shard_batch
from reproml.arithmetic.numerics.formats import NARROW
from reproml.errors import ReproError
from tests.arithmetic.distributed.together import Thread, together

Loss = Callable[[nn.Module, Any, Any], torch.Tensor]


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell, self.out = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.places = nn.Parameter(torch.randn(5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.25, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.layer(self.table(x) + self.places).mean(1))


class Shared(nn.Module):
    """A weight that is used twice, and a parameter that is broadcast against the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)) * self.scale)[:, :3]


def floats(*shape: int) -> Callable[[int], torch.Tensor]:
    return lambda n: torch.randn(n, *shape)


def mlp(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), *last, nn.ReLU(), nn.Linear(6, 3))


def cnn(*between: nn.Module, **options: Any) -> nn.Module:
    first = nn.Conv2d(2, 4, 3, padding=1, **options)
    return nn.Sequential(
        first, *between, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, groups=2),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "mlp": (mlp, floats(2, 2)),
    "layer norm": (lambda: mlp(nn.LayerNorm(6)), floats(4)),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(6)), floats(4)),
    "dropout": (lambda: mlp(nn.Dropout(0.5)), floats(4)),
    "activations": (lambda: mlp(nn.GELU(), nn.SiLU(), nn.PReLU(), nn.Softplus()), floats(4)),
    "cnn": (cnn, floats(2, 8, 8)),
    "batch norm 2d": (lambda: cnn(nn.BatchNorm2d(4)), floats(2, 8, 8)),
    "group norm": (lambda: cnn(nn.GroupNorm(2, 4)), floats(2, 8, 8)),
    "transposed": (lambda: cnn(nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), nn.AvgPool2d(2, 1)),
                   floats(2, 8, 8)),
    "reflected": (lambda: cnn(padding_mode="reflect"), floats(2, 8, 8)),
    "conv 1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Flatten(), nn.Linear(6, 3)),
                floats(2, 5)),
    "lstm": (lambda: Recurrent(nn.LSTM), floats(3, 4)),
    "gru": (lambda: Recurrent(nn.GRU), floats(3, 4)),
    "attention": (Attention, lambda n: torch.randint(7, (n, 5))),
    "shared": (Shared, floats(4)),
}  # fmt: skip


def classes(n: int) -> torch.Tensor:
    return torch.randint(3, (n,))


LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Callable[[int], torch.Tensor]]] = {
    "cross entropy": (F.cross_entropy, classes),
    "sum": (lambda x, y: F.cross_entropy(x, y, reduction="sum"), classes),
    "weights": (lambda x, y: F.cross_entropy(x, y, weight=x.new_tensor([0.1, 2, 3])), classes),
    "ignored": (lambda x, y: F.cross_entropy(x, y, ignore_index=0), classes),
    "each": (lambda x, y: F.cross_entropy(x, y, reduction="none").mean(), classes),
    "smoothed": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), classes),
    "mse": (F.mse_loss, floats(3)),
    "l1": (F.l1_loss, floats(3)),
    "huber": (F.huber_loss, floats(3)),
    "by hand": (lambda x, y: ((x - y) ** 2).sum() / 3, floats(3)),
    "weighed": (lambda x, y: (x * y).sum(1).mean(), floats(3)),
    "gathered": (lambda x, y: -x.gather(1, y.unsqueeze(1)).mean(), classes),
    "swapped": (lambda x, y: F.mse_loss(y, x), floats(3)),
    "each weighed": (
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, weight=y),
        lambda n: torch.rand(n, 3),
    ),
    "cosine": (lambda x, y: F.cosine_similarity(x, y).mean(), floats(3)),
    "bce": (F.binary_cross_entropy_with_logits, lambda n: torch.rand(n, 3)),
}


def trained(model: nn.Module, x: Any, y: Any, loss: Any, steps: int = 1) -> list[torch.Tensor]:
    """Return losses, gradients and state dict after some backward passes."""
    torch.manual_seed(5)
    values = []
    for _ in range(steps):
        value = loss(model(x), y)
        value.backward()
        values.append(value.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [*values, *gradients, *model.state_dict().values()]


def by_workers(
    size: int, model: nn.Module, x: Any, y: Any, loss: Any, local: bool = True, steps: int = 1
) -> list[Any]:
    """Return `trained` of each worker; y is plain with its own rows if `local`, else a Sharded tensor."""

    def work(me: Thread) -> list[torch.Tensor]:
        mine = copy.deepcopy(model)
        me.models[mine] = None
        with reproml.exact():
            target = y[me.rank :: size] if local else shard_batch(y, me)
            return trained(mine, shard_batch(x, me), target, loss, steps)

    return together(size, work)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert type(a) is type(b) is torch.Tensor
    return reproml.digest({"": a}) == reproml.digest({"": b})


class Autocast(nn.Module):
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Any) -> Any:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.model(x)


def model_in_16_bits(name: str, dtype: torch.dtype, weights: bool) -> tuple[nn.Module, Any, Any]:
    """Return a model in autocast, or with weights of 16 bits, and seven rows with their classes."""
    make, data = MODELS[name]
    torch.manual_seed(1)
    x, y = data(7), classes(7)
    model = make().to(dtype) if weights else Autocast(make(), dtype)
    return model, x.to(dtype) if weights and x.is_floating_point() else x, y


@pytest.mark.parametrize("name", MODELS)
def test_model_trains_as_in_single_process(name):
    """Three rows for one to four workers: with four, one has no row."""
    make, data = MODELS[name]
    torch.manual_seed(1)
    with reproml.exact():
        model, x, y = make(), data(3), classes(3)
        expected = trained(copy.deepcopy(model), x, y, F.cross_entropy)
    for size in (1, 2, 4):
        for found in by_workers(size, model, x, y, F.cross_entropy):
            assert len(found) == len(expected)
            assert all(map(same, found, expected))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("weights", [False, True])
def test_model_trains_in_16_bits(name, dtype, weights):
    """By autocast, or with weights of 16 bits. Seven rows for three workers."""
    with reproml.exact():
        model, x, y = model_in_16_bits(name, dtype, weights)
        expected = trained(copy.deepcopy(model), x, y, F.cross_entropy, steps=2)
    for found in by_workers(3, model, x, y, F.cross_entropy, steps=2):
        assert len(found) == len(expected)
        assert all(map(same, found, expected))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", NARROW)
def test_loss_of_16_bits_is_that_of_global_batch(name, dtype):
    loss, target = LOSSES[name]
    torch.manual_seed(2)
    with reproml.exact():
        model, x, y = mlp().to(dtype), torch.randn(5, 4).to(dtype), target(5)
        y = y.to(dtype) if y.is_floating_point() else y
        expected = trained(copy.deepcopy(model), x, y, loss)
    for found in by_workers(2, model, x, y, loss):
        assert all(map(same, found, expected))


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_that_of_global_batch(name, local, rows):
    """The second backward pass adds to the gradients. Some workers have one row or none."""
    loss, target = LOSSES[name]
    torch.manual_seed(2)
    with reproml.exact():
        model, x, y = mlp(), torch.randn(rows, 4), target(rows)
        expected = trained(copy.deepcopy(model), x, y, loss, steps=2)
    for size in (2, 3):
        for found in by_workers(size, model, x, y, loss, local, steps=2):
            assert all(map(same, found, expected))


def regression_with(bad: float) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return a model, inputs and targets, of which one number in two rows is `bad`."""
    torch.manual_seed(3)
    model, x, y = mlp(), torch.randn(4, 4), torch.randn(4, 3)
    x[2, 1] = y[1, 1] = bad
    return model, x, y


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate_as_in_single_process(bad):
    with reproml.exact():
        model, x, y = regression_with(bad)
        expected = trained(copy.deepcopy(model), x, y, F.mse_loss)
    for found in by_workers(3, model, x, y, F.mse_loss):
        assert all(map(same, found, expected))


HARD = torch.tensor(
    [
        [1.0, 1e8, 0.0, 1 + 2.0**-23, 3e38, 1.0],
        [1.0 + 2.0**-23, 1e8 + 8, 0.0, 1.0, -3e38, 2.0],
        [2.0**-24, 1e8 - 8, 2.0**-149, 1.0, 3e38, float("inf")],
        [-(2.0**-24), 1e8, 0.0, 1.0, 1e38, 0.0],
    ]
)


def test_batch_statistics_hard_to_round_are_exact():
    """Ties, cancellation, subnormal numbers, overflow and infinity, each in its own channel."""
    with reproml.exact():
        model, y = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)), torch.tensor([0, 1, 2, 0])
        expected = trained(copy.deepcopy(model), HARD, y, F.cross_entropy)
    for size in (2, 3):
        for found in by_workers(size, model, HARD, y, F.cross_entropy):
            assert all(map(same, found, expected))


Program = Callable[[torch.Tensor], Any]
OF_THE_BATCH: dict[str, Program] = {
    "var": lambda x: x.var(0),
    "max": lambda x: x.max(0).values,
    "argmax": lambda x: x.argmax(),
    "median of a row": lambda x: x.sort(1).values[:, 1].sum(),
    "norm": lambda x: x.norm(),
    "joined rows": lambda x: torch.cat([x, x]),
    "flip": lambda x: x.flip(0),
    "picked": lambda x: x[x[:, 0] > 0],
    "gram": lambda x: x @ x.t(),
    "count": lambda x: (x > 0).sum(),
    "fraction of a type": lambda x: (x > 0).mean(dtype=torch.float32),
    "sum as float": lambda x: ((x > 0) * (2**24 + 1)).sum(dtype=torch.float32),
    "fraction": lambda x: (x > 0).float().mean(),
    "item": lambda x: torch.tensor(x.sum().item()),
    "rows added to a plain tensor": lambda x: torch.ones(5, 4).add_(x),
    "random": lambda x: (x * torch.rand_like(x) + torch.randn(len(x), 4)).sum(),
    "mask": lambda x: x.masked_fill(torch.ones(5, 4).tril().bool(), 0.5).sum(0),
    "transposed": lambda x: (x.t() * torch.arange(4.0).unsqueeze(1)).t().reshape(-1).sum(),
    "rows of rows": lambda x: x.unsqueeze(0).expand(2, 5, 4).reshape(10, 4).cumsum(1).sum(0),
    "padded": lambda x: F.pad(x, (1, 0)).sum(0),
    "scaled by one row": lambda x: (x * torch.full((1, 4), 0.5)).sum(0),
    "sum as bfloat16": lambda x: x.sum(0, dtype=torch.bfloat16),
    "sum of bfloat16 as float": lambda x: x.bfloat16().sum(0, dtype=torch.float32),
    "mean of bfloat16": lambda x: x.bfloat16().mean(0),
    "mean of float16 as bfloat16": lambda x: x.half().mean(0, dtype=torch.bfloat16),
    "product of integers": lambda x: (x * 8).long().t() @ (x * 4).long(),
    "two dtypes": lambda x: (x.half() * x.bfloat16()).sum(0),
    "product of float64": lambda x: x.double().exp().t() @ x.double(),
    "mean of float64": lambda x: F.layer_norm(x.double(), (4,)).mean(0),
    "halves": lambda x: torch.cat([y * 3 for y in x.chunk(2, 1)], 1).sum(0),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_function_of_batch_is_that_of_global_batch(name):
    program = OF_THE_BATCH[name]
    x = torch.arange(20.0).reshape(5, 4).sin()

    def work(me: Thread) -> torch.Tensor:
        torch.manual_seed(7)
        with reproml.exact():
            result = program(shard_batch(x, me))
        return result.full_tensor() if isinstance(result, Sharded) else result

    torch.manual_seed(7)
    with reproml.exact():
        expected = program(x)
    for size in (1, 2, 3):
        assert all(same(found, expected) for found in together(size, work))


def write_a_row(x: torch.Tensor) -> None:
    x[0] = 1.0


REFUSED: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a row": (lambda x: x[0], "aten.select.int .*some rows"),
    "rows": (lambda x: x[:2], "aten.slice.Tensor .*some rows"),
    "split": (lambda x: x.split(2), "aten.split.Tensor .*some rows"),
    "write": (write_a_row, "rows"),
    "split by view": (lambda x: x.view(2, 10), r"\[5, 4\] as \[2, 10\] splits rows of the batch"),
    "strange rows": (
        lambda x: x + torch.ones(4, 4),
        r"\[4, 4\] has neither the 5 rows",
    ),
    "crossed": (lambda x: x.unsqueeze(0) + x.unsqueeze(1), "the batch in different dimensions"),
    "strange labels": (lambda x: F.cross_entropy(x, torch.ones(4).long()), "The target has 4 rows"),
    "joined to rows": (
        lambda x: torch.cat([torch.ones(3, 4), x]),
        "aten.cat.default .*concatenates rows",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operator_that_splits_rows_is_refused(name):
    program, words = REFUSED[name]

    def work(me: Thread) -> None:
        with reproml.exact(), pytest.raises(reproml.NotExactError, match=words):
            program(shard_batch(torch.ones(5, 4), me))

    together(2, work)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2)])
def test_gradients_of_gathered_batch_reach_the_rows(pool):
    torch.manual_seed(1)
    with reproml.exact():
        model, x = nn.Conv2d(2, 4, 3), torch.randn(5, 2, 6, 6)

    def loss(x: Any, y: Any) -> torch.Tensor:
        return torch.sum(pool(x).flip(0) * y)

    y = torch.randn(5, 4, 2, 2)
    with reproml.exact():
        expected = trained(copy.deepcopy(model), x, y, loss)
    for found in by_workers(2, model, x, y, lambda x, _: loss(x, y)):
        assert all(map(same, found, expected))


UNLIKE: dict[str, Callable[[torch.Tensor, Thread], torch.Tensor]] = {
    "a count of labels": lambda x, me: x.sum() / (me.rank + 1),
    "a number of labels": lambda x, me: (x * (me.rank + 0.5)).sum(),
    "random numbers": lambda x, me: (torch.manual_seed(me.rank), F.dropout(x))[1].sum(),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_different_numbers_on_workers_are_refused(name):
    model = nn.Linear(4, 3)

    def work(me: Thread) -> None:
        mine = copy.deepcopy(model)
        with reproml.exact():
            loss = UNLIKE[name](mine(shard_batch(torch.ones(5, 4), me)), me)
            with pytest.raises(ReproError, match="the workers computed with different numbers"):
                loss.backward()
            mine(shard_batch(torch.ones(5, 4), me)).sum().backward()  # training can continue

    together(2, work)


def test_exchange_begins_during_backward_pass(monkeypatch):
    """Results are on their way back before the last sums are sent, and have the same bits."""
    monkeypatch.setattr(pending, "_ENOUGH", 100)
    torch.manual_seed(1)
    with reproml.exact():
        model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 10))
        x, y = torch.randn(8, 50), classes(8)
        expected = trained(copy.deepcopy(model), x, y, F.cross_entropy)

    def work(me: Thread) -> None:
        mine = copy.deepcopy(model)
        me.models[mine] = None
        with reproml.exact():
            found = trained(mine, shard_batch(x, me), y[me.rank :: me.size], F.cross_entropy)
        assert all(map(same, found, expected))
        kinds = [len(shape) for shape in me.sent[1:6]]  # sums [size, bytes], results [numbers]
        assert kinds == [2, 2, 1, 2, 1]

    for size in (2, 3, 5, 8):
        together(size, work)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_of_backward_pass_are_exchanged_once(dtype):
    """The sums, of 6 bytes each, are sent to their owners in one message, not to all workers.

    Within autocast, too, where each gradient is cast to float32 before its parameter receives it.
    """
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 10))
    model = Autocast(model, dtype) if dtype else model
    weights = sum(p.numel() for p in model.parameters())

    def work(me: Thread) -> None:
        mine = copy.deepcopy(model)
        with reproml.exact():
            loss = F.cross_entropy(mine(shard_batch(torch.randn(8, 50), me)), classes(4))
            me.sent.clear()
            loss.backward()
        sums, *gathered = me.sent
        assert sums[0] == 2 and 6 * weights < sums[0] * sums[1] < 6.5 * weights
        assert [weights / 2 < math.prod(shape) < 0.6 * weights for shape in gathered][:1] == [True]
        assert len(gathered) in (1, 3)  # the others for the elements that failed the test

    together(2, work)
