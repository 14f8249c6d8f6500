"""Deferred rounding tests, as on a GPU.

No GPU is needed: the CPU is declared an accelerator, and sums are made so inaccurate that many results are
wrong until the log is flushed. Fake tensors, whose values cannot be read, show that no operator waits for
the device.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import reproml
from reproml.arithmetic import operator_table
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.dispatch import deferred
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.numerics import devices
from reproml.arithmetic.numerics.rounding import round_sum
from reproml.arithmetic.operators import (
    indexing,
    matmul,
    optimizer_formulas,
    optimizers,
    reductions,
)
from reproml.pipeline import data, preprocess, recipe
from reproml.pipeline.train import train as train_recipe
from tests.arithmetic.test_operator_table import CASES
from verification.oracle import same_bits

F = nn.functional


def inaccurate_round_sum(c: Tensor, e: Tensor, resolve: Any) -> Tensor:
    """Call round_sum for a sum that is off by some ulps, with an error bound to match."""
    e = e * 2**26
    noise = torch.sin(7.7 * torch.arange(c.numel(), dtype=torch.float64)).reshape(c.shape)
    return round_sum(c + 0.4 * e * noise, 1.5 * e, resolve)


@pytest.fixture
def accelerator(monkeypatch: Any) -> Iterator[Counter[str]]:
    """Declare all tensors to be on an accelerator.

    Counts how often outcomes were read, and how many operators with a failed test had given a right or
    a wrong result."""
    count: Counter[str] = Counter()
    failed_indices, result_unchanged = deferred.failed_indices, deferred.result_unchanged

    def counted_failed_indices(outcomes: list[Tensor]) -> Any:
        count["read"] += 1
        return failed_indices(outcomes)

    def counted_result_unchanged(*arguments: Any) -> bool:
        unchanged = result_unchanged(*arguments)
        count["right" if unchanged else "wrong"] += 1
        return unchanged

    monkeypatch.setattr(kernels, "library", None)
    monkeypatch.setattr(deferred, "failed_indices", counted_failed_indices)
    monkeypatch.setattr(deferred, "result_unchanged", counted_result_unchanged)
    monkeypatch.setattr(devices, "is_on_accelerator", lambda x: not x.is_meta)
    with reproml.exact():
        torch.ones(3).sum()  # the first test that meets a device
    count.clear()
    yield count
    assert not replay_log.entries


@pytest.fixture
def inaccurate(accelerator: Counter[str], monkeypatch: Any) -> Counter[str]:
    """The same, with sums that are mostly wrong until the log is flushed."""
    for module in (matmul, reductions, indexing):
        monkeypatch.setattr(module, "round_sum", inaccurate_round_sum)
    return accelerator


def immediate_result(function: Callable[[], Any]) -> Any:
    """Return the function's result with accurate sums and each test read immediately."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(devices, "is_on_accelerator", lambda x: False)
        for module in (matmul, reductions, indexing):
            m.setattr(module, "round_sum", round_sum)
        with reproml.exact():
            return function()


def assert_same_bits(function: Callable[[], Any]) -> None:
    """Assert that the function returns the same bits with deferred tests as with immediate ones."""
    expected = immediate_result(function)
    with reproml.exact():
        found = function()
    for x, y in zip(found, expected):
        assert same_bits(x, y) if isinstance(x, Tensor) else x == y


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "foreach": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "ASGD": {},
    "Rprop": {},
    "Adafactor": {},
}


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(3 * 4 * 4, 8), nn.GELU(), nn.Linear(8, 4),
    )  # fmt: skip


def attentive() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(1, 2), nn.TransformerEncoderLayer(10, 2, 12, batch_first=True), nn.Flatten(),
        nn.Linear(100, 4),
    )  # fmt: skip


def train(make: Callable[[], nn.Module], optimizer: str, steps: int = 3, clip: bool = True) -> Any:
    torch.manual_seed(1)
    model = make()
    chosen = getattr(torch.optim, optimizer)(model.parameters(), **OPTIMIZERS[optimizer])
    x, y = torch.randn(16, 1, 10, 10), torch.randint(4, (16,))
    losses = []
    for _ in range(steps):
        rows = torch.randint(16, (8,))
        chosen.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        chosen.step()
        losses.append(loss.detach())
    state = [x for s in chosen.state_dict()["state"].values() for x in s.values() if x is not None]
    return [*model.state_dict().values(), *state, *losses]


@pytest.mark.parametrize(
    "make, optimizer",
    [*((convolutional, name) for name in OPTIMIZERS), (attentive, "SGD"), (attentive, "AdamW")],
)
def test_training_gives_the_same_bits(make, optimizer, inaccurate):
    assert_same_bits(lambda: train(make, optimizer))
    assert inaccurate["wrong"] > 1


@pytest.mark.parametrize("make", [convolutional, attentive])
def test_training_step_reads_outcomes_twice(make, accelerator):
    """Before and after the optimizer's step. Results with a failed test are mostly right."""
    assert_same_bits(lambda: train(make, "AdamW", 10))
    assert accelerator["read"] <= 2 * 10 + 1  # once for the initial weights
    assert accelerator["right"] > 3 and not accelerator["wrong"]


def test_recipe_matches_its_golden_file(accelerator):
    chosen = recipe.load_recipe("digits-mlp")
    prepared = preprocess.preprocess(data.load_dataset(chosen.data.name), chosen.preprocess)
    trained = train_recipe(chosen, prepared)
    expected = json.loads((Path(__file__).parents[3] / "golden" / "digits-mlp.json").read_text())
    for i, epoch in enumerate(trained.epochs, 1):
        assert epoch.state_dict_sha256 == expected[f"epoch.{i:02}.state_dict.sha256"]
    assert accelerator["right"] > accelerator["wrong"]


def test_infinities_and_nan_pass_the_test(accelerator):
    x = torch.tensor([[-float("inf"), 1.0], [float("nan"), 2.0], [3.0, -4.0]])
    assert_same_bits(lambda: [x.sum(1), x @ x.t(), x.log(), x.exp().mean(0)])
    assert not accelerator["wrong"] and not accelerator["right"]


# ---- programs that a replay could get wrong ------------------------------------------------------

TERMS = torch.linspace(-1, 1, 40).reshape(4, 10).sin()


def in_place() -> list[Tensor]:
    y, z = TERMS.sum(1), torch.zeros(4)
    z += y
    y.mul_(z).add_(TERMS[:, :4].sum(0))
    z[1:].copy_(y[:-1])
    z.zero_()[2:].add_(y[2:])
    w = torch.empty(4, 4)
    torch.mm(TERMS, TERMS.t(), out=w)
    return [y, z, w, z.clone().fill_(2.0).add_(y)]


def other_sizes_and_memory() -> list[Tensor]:
    """The log keeps a tensor's old size and memory when they change."""
    y = TERMS.sum(1, keepdim=True)
    z = y * 3
    y.squeeze_()
    p = nn.Parameter(TERMS.sum(0))
    with torch.no_grad():
        q = p * 2
        p.data = p.data.sum(0, keepdim=True)
        old = z.view(-1)
        z.resize_(2, 1)
    return [y, z.clone(), p.detach(), q, old.clone()]


def random_numbers() -> list[Tensor]:
    torch.manual_seed(3)
    other = torch.Generator().manual_seed(5)
    x = TERMS.sum(0)
    dropped = F.dropout(x, 0.5)
    x.uniform_()
    y = torch.bernoulli(TERMS.sum(1).sigmoid(), generator=other)
    z = torch.normal(TERMS.sum(1), 1.0, generator=other)
    return [x, dropped, y, z, torch.rand(3), torch.rand(3, generator=other)]


def read_by_the_host() -> list[Any]:
    x = TERMS.sum(0)
    y = x.clone()
    y = y + 1 if x[3].item() > 0 else y - 1
    mask = x > x[5]
    return [
        y, float(x.norm()), x[mask], x.masked_select(mask), mask.nonzero(), bool((x == y).any()),
        torch.equal(x, y), (1e6 * TERMS.sum(1)).to(torch.int64), x.sort().values.tolist(), repr(x),
        mask.long().unique(), x.to("cpu").numpy().tobytes(),
        torch.linalg.qr(TERMS[:, :3] @ TERMS[:3, :3])[0],
    ]  # fmt: skip


def second_derivatives() -> list[Tensor]:
    x = TERMS.clone().requires_grad_()
    y = (x @ x.t()).tanh().sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (h,) = torch.autograd.grad((g * g).sum(), x)
    with torch.inference_mode():
        z = x @ h.t()
        w = F.softmax(z, -1).sum(0)
    with torch.no_grad():
        return [g.detach(), h, w.clone(), TERMS.cumsum(1).index_add(0, torch.tensor([1, 1]), h[:2])]


def lists_of_tensors() -> list[Tensor]:
    parts = torch.unsafe_split(TERMS.t() @ TERMS, 5)
    halves = torch._foreach_mul(list(parts), 0.5)
    torch._foreach_add_(list(parts), halves)
    return [*parts, *torch.max(parts[0] @ parts[0].t(), 0)]


def masks_and_overlaps() -> list[Tensor]:
    x, y = TERMS.sum(0), torch.zeros(10)
    y[x > x[4]] = torch.arange(float((x > x[4]).sum()))
    y[x < 0] = x[x < 0]
    z = torch.zeros(1, 4).expand(3, 4)  # PyTorch warns
    z.index_put_((torch.tensor(1),), TERMS.sum(1))
    torch._assert_async((x == x.clone()).all())
    out = torch.empty(0)
    torch.ops.aten.index.Tensor_out(x, [x > x[4]], out=out)
    return [y, z.clone(), out]


def changed_defaults() -> list[Tensor]:
    x = torch.normal(TERMS.sum(1), 0.1, generator=torch.Generator().manual_seed(1))
    y = torch.lerp(TERMS.sum(1), x, 0.3)
    torch.set_default_dtype(torch.float64)
    try:
        replay_log.flush()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(2)
    z = torch.randn_like(TERMS.sum(0)) + TERMS.sum(0)
    with torch.device("meta"):  # a mode that sees every call of torch's functions
        replay_log.flush()
    return [x, y, z]


def activations_in_place() -> list[Tensor]:
    x = TERMS @ TERMS.t()
    y = F.relu(x, inplace=True) @ TERMS
    x.mul_(0.5)
    return [x, y, F.leaky_relu(y.sum(0), 0.1, inplace=True)]


@pytest.mark.parametrize(
    "function",
    [in_place, other_sizes_and_memory, random_numbers, read_by_the_host, second_derivatives,
     lists_of_tensors, masks_and_overlaps, changed_defaults, activations_in_place],
)  # fmt: skip
def test_program_gives_the_same_bits(function, inaccurate):
    assert_same_bits(function)
    assert inaccurate["wrong"]


class Doubling(TorchDispatchMode):
    """A mode that doubles sums."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result + result if "sum" in str(func) else result


def test_modes_see_corrected_results(inaccurate):
    def function() -> list[Tensor]:
        x = TERMS.sum(0)
        with Doubling():
            return [x.sum(), x * 3]

    assert_same_bits(function)
    with Doubling():
        assert_same_bits(lambda: [TERMS.sum(0), TERMS @ TERMS.t()])
    assert inaccurate["wrong"]


def test_native_operators_see_corrected_results(inaccurate):
    def function() -> list[Tensor]:
        return [torch.special.bessel_y0(TERMS.sum(0))]

    with pytest.warns(UserWarning, match="bessel"), reproml.exact(on_unknown="warn"):
        expected = immediate_result(lambda: [TERMS.sum(0)])
        (found,) = function()
    assert same_bits(found, torch.special.bessel_y0(expected[0])) and inaccurate["wrong"]


def test_operators_with_effects_run_once(inaccurate):
    counts = []

    @torch.library.custom_op("reproml_test::count", mutates_args=())
    def count(x: Tensor) -> Tensor:
        counts.append(x.tolist())
        return x.clone()

    x = TERMS.sum(0)
    expected = immediate_result(lambda: x.argsort().tolist())
    with reproml.exact():
        count(TERMS.sum(0).argsort())
        TERMS.sum(0) * 2
    assert counts == [expected]


@pytest.mark.parametrize("which", ["step", "operator"])
def test_error_midway_restores_the_operands(which, inaccurate):
    p, q = (nn.Parameter(TERMS.to(t)) for t in (torch.float32, torch.float8_e5m2))
    p.grad, q.grad = TERMS.sum(0).expand(4, 10).contiguous(), TERMS.to(q.dtype)
    x = torch.zeros(4)
    with reproml.exact():
        if which == "step":
            with pytest.raises(reproml.NotExactError):
                torch.optim.SGD([p, q], lr=0.1).step()
        else:
            with pytest.raises(RuntimeError):
                torch._foreach_add_([x, torch.zeros(3)], [TERMS.sum(1), TERMS.sum(1)], alpha=0.5)
    assert torch.equal(p, TERMS) and not x.any()


def test_error_after_a_flush_keeps_corrected_results(inaccurate):
    def function() -> list[Tensor]:
        x = TERMS[:, :3]
        q, r, i = x.t() @ x, x.t() @ x, (TERMS @ TERMS.t()).view(-1).argsort()
        with pytest.raises(reproml.NotExactError):
            torch.linalg.qr(torch.zeros(3, 3), out=(q, r))
        with pytest.raises(reproml.NotExactError):
            i.copy_(torch.full((16,), float("nan")))
        return [q, r, i]

    assert_same_bits(function)


def test_forked_process_starts_with_an_empty_log(inaccurate):
    with reproml.exact():
        TERMS.sum()
        with replay_log.lock:
            pid = os.fork()
            if not pid:
                signal.alarm(20)
                try:
                    assert replay_log.lock.acquire(blocking=False) and not replay_log.entries
                    assert immediate_result(lambda: (torch.ones(2) + 1).tolist()) == [2, 2]
                    os._exit(0)
                finally:
                    os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_log_is_flushed_at_its_limits(inaccurate, monkeypatch):
    monkeypatch.setattr(replay_log, "MAX_ENTRIES", 10)
    with reproml.exact():
        for _ in range(25):
            TERMS.sum()
        assert len(replay_log.entries) < 10
    monkeypatch.setattr(replay_log, "MAX_BYTES", 1000)
    with reproml.exact():
        for _ in range(25):
            TERMS.sum(0)
            assert replay_log.bytes < 1000


def test_threads_share_the_log(inaccurate):
    """A backward pass on a device runs in a thread of its own."""

    def function() -> list[Tensor]:
        x, results = TERMS.sum(0), {}

        def work(i: int) -> None:
            with reproml.exact():
                results[i] = (x * i).sum() @ TERMS[0, 0] if i > 9 else (x.outer(x) * i).sum(0)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[i] + x for i in range(4)]

    assert_same_bits(function)
    assert inaccurate["wrong"]


# ---- random programs -------------------------------------------------------------------------------

PLACES = st.integers(0, 3)
STEPS: dict[str, Callable[[list[Tensor], int, int], Any]] = {
    "product": lambda r, i, j: r.__setitem__(i, r[i] @ r[j] / 4),
    "sum": lambda r, i, j: r.__setitem__(i, r[j].sum(0, keepdim=True).expand(4, 4).contiguous()),
    "add in place": lambda r, i, j: r[i].add_(r[j]),
    "write a row": lambda r, i, j: r[i][j].copy_(r[j][i].sum().expand(4)),
    "same memory": lambda r, i, j: r.__setitem__(i, r[j].view(4, 4)),
    "transposed": lambda r, i, j: r.__setitem__(i, r[j].t().clone()),
    "zero": lambda r, i, j: r[i][j:].zero_(),
    "gather": lambda r, i, j: r.__setitem__(i, r[j][torch.argsort(r[i][0])]),
    "softmax": lambda r, i, j: r.__setitem__(i, torch.log_softmax(r[j], -1)),
    "dropout": lambda r, i, j: r.__setitem__(i, F.dropout(r[j], 0.5)),
    "draw in place": lambda r, i, j: r[i].uniform_(-1, 1),
    "branch": lambda r, i, j: r.__setitem__(i, -r[j]) if float(r[i].sum()) > 0 else None,
    "stack": lambda r, i, j: r.__setitem__(i, torch.cat([r[i][:2], r[j][2:]])),
}


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), PLACES, PLACES), max_size=12))
def test_random_program_gives_the_same_bits(inaccurate, program):
    def function() -> list[Tensor]:
        torch.manual_seed(7)
        registers = list(torch.randn(4, 4, 4).unbind())
        registers = [r.clone() for r in registers]
        for name, i, j in program:
            STEPS[name](registers, i, j)
        return [r.clone() for r in registers]

    assert_same_bits(function)


# ---- no operator waits -----------------------------------------------------------------------------

DEVICE = "lazy:0"  # a device whose tensors can be faked without one


class NoTransfer(TorchDispatchMode):
    """Fails where a tensor is copied between the host and a device, for which the host would wait.

    Python numbers are allowed: they are passed to a kernel as its arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "copy" in str(func):
            given = list(tensors([args, list((kwargs or {}).values()), result]))
            assert len({x.device for x in given}) == 1, func
        return result


@pytest.fixture(scope="module", autouse=True)
def entered() -> None:
    """The first exact() lets rounding tests be deferred."""
    with reproml.exact():
        pass


def on_device(x: Any) -> Any:
    if isinstance(x, Tensor):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)
    return type(x)(map(on_device, x)) if isinstance(x, (list, tuple)) else x


# linalg_qr reads the lengths of columns, bincount the length of its result, _grouped_mm the offsets, and
# special functions that mpmath computes on the host their operands.
READING = (
    *("linalg_qr", "bincount", "_grouped_mm", "i0", "special_i0e", "special_i1"),
    *("special_i1e", "special_modified_bessel_i0", "special_modified_bessel_i1"),
    *("special_bessel_j0", "special_bessel_j1", "special_airy_ai", "special_erfcx"),
    *("special_ndtri", "special_log_ndtr"),
)
# They copy a table of weights to the device, from pinned memory (numerics/devices.py), so nothing waits.
COPYING = ("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward")


@pytest.mark.parametrize(
    "name",
    [n for n in sorted(CASES) if n in operator_table.EXACT and n not in (*READING, *COPYING)],
)
@settings(max_examples=3, suppress_health_check=list(HealthCheck))
@given(drawing=st.data())
def test_no_operator_waits_for_the_device(name, drawing):
    """Reading a fake tensor raises DataDependentOutputException."""
    for case in CASES[name]:
        drawn = drawing.draw(case.draw)
        with FakeTensorMode(), NoTransfer(), replay_log.collect_outcomes():
            options = {key: on_device(x) for key, x in case.options.items()}
            operator_table.EXACT[name](*on_device(drawn), **options)


# definition -> the number of lists of states that it takes, its other arguments, and its options
STATES: dict[str, tuple[int, list[Any], dict[str, Any]]] = {
    "adam": (2, [[], [3, 3]], {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "amsgrad": False,
                               "decoupled_weight_decay": True}),
    "sgd": (1, [], {"momentum": 0.9, "dampening": 0.0, "nesterov": False}),
    "rmsprop": (3, [], {"alpha": 0.9, "eps": 1e-8, "momentum": 0.9, "centered": True}),
    "adagrad": (1, [[3, 3]], {"lr_decay": 0.1, "eps": 1e-8}),
    "adadelta": (2, [], {"rho": 0.9, "eps": 1e-8}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_no_optimizer_waits_for_the_device(name, monkeypatch):
    monkeypatch.setattr(optimizers, "_check", lambda *_: None)  # it refuses fake tensors
    states, rest, options = STATES[name]
    with FakeTensorMode(), NoTransfer(), replay_log.collect_outcomes() as outcomes:
        lists = [on_device([torch.empty(3), torch.empty(2, 2)]) for _ in range(2 + states)]
        step = getattr(optimizers if hasattr(optimizers, name) else optimizer_formulas, name)
        step(*lists, *rest, lr=0.1, weight_decay=0.01, maximize=False, **options)
    assert outcomes
