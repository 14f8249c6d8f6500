from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from functools import partial

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reproml.arithmetic.context import exact
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline.recipe import Recipe
from reproml.pipeline.train import (
    Output,
    State,
    build_optimizer,
    epoch_batches,
    mean_loss,
    numerics_mode,
    step_count,
    train,
)
from tests import tiny

PRECISIONS = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


def plain_script(precision: str) -> tuple[str, list[str]]:
    """Train as a user would, without reproml; return the initial digest and that of each epoch."""
    x, y = (torch.from_numpy(array) for array in tiny.prepared().train)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    loader = DataLoader(TensorDataset(x, y), batch_size=500, shuffle=True)
    initial, digests = digest(model), []
    for _ in range(2):
        for inputs, labels in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
        digests.append(digest(model))
    return initial, digests


@PRECISIONS
def test_plain_script_reaches_same_weights(precision):
    trained = train(tiny.recipe(precision=precision), tiny.prepared())
    with exact():
        initial, digests = plain_script(precision)
    assert trained.initial_state_dict_sha256 == initial
    assert [epoch.state_dict_sha256 for epoch in trained.epochs] == digests
    assert digest(trained.model) == digests[-1]


@PRECISIONS
def test_native_equals_plain_script(precision):
    trained = train(tiny.recipe(precision=precision), tiny.prepared(), "native")
    with numerics_mode("native"):
        _, digests = plain_script(precision)
    assert [epoch.state_dict_sha256 for epoch in trained.epochs] == digests


def test_bfloat16_changes_weights_but_not_their_dtype():
    trained = train(tiny.recipe(precision="bfloat16"), tiny.prepared(), steps=1)
    other = train(tiny.recipe(), tiny.prepared(), steps=1)
    assert trained.initial_state_dict_sha256 == other.initial_state_dict_sha256
    assert digest(trained.model) != digest(other.model)
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}


@PRECISIONS
def test_micro_batches_do_not_change_weights(precision):
    recipe = tiny.recipe(precision=precision)
    expected = train(recipe, tiny.prepared(), steps=2)
    found = train(recipe, tiny.prepared(), steps=2, micro_batch=200)
    assert digest(found.model) == digest(expected.model)


@PRECISIONS
def test_threads_do_not_change_weights(precision):
    before = torch.get_num_threads()
    try:
        digests = set()
        for threads in (1, 3):
            torch.set_num_threads(threads)
            recipe = tiny.recipe(precision=precision)
            digests.add(digest(train(recipe, tiny.prepared()).model))
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


def test_only_the_seed_determines_weights():
    torch.manual_seed(99)
    torch.rand(5)  # earlier use of the generator must not matter
    again = train(tiny.recipe(), tiny.prepared(), steps=1)
    assert digest(again.model) == digest(train(tiny.recipe(), tiny.prepared(), steps=1).model)
    other = train(tiny.recipe(seed=2), tiny.prepared(), steps=1)
    assert digest(other.model) != digest(again.model)


@pytest.mark.parametrize(("steps", "done", "epochs"), [(0, 0, 0), (2, 2, 0), (3, 3, 1), (99, 6, 2)])
def test_steps_end_training_early(steps, done, epochs):
    calls: list[tuple[int, int]] = []
    lines: list[str] = []
    trained = train(
        tiny.recipe(),
        tiny.prepared(),
        steps=steps,
        output=Output(lines.append, lambda n, total: calls.append((n, total))),
    )
    assert calls == [(n, done) for n in range(1, done + 1)]
    assert len(trained.epochs) == len(lines) == epochs
    unbroken = train(tiny.recipe(), tiny.prepared())
    assert trained.initial_state_dict_sha256 == unbroken.initial_state_dict_sha256
    assert trained.epochs == unbroken.epochs[:epochs]
    digests = [unbroken.initial_state_dict_sha256, *[e.state_dict_sha256 for e in unbroken.epochs]]
    assert (digest(trained.model) in digests) == (done % 3 == 0)


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 3))
def test_step_count_equals_loader_length(samples, batch_size, epochs):
    schedule = msgspec.structs.replace(tiny.recipe().train, epochs=epochs, batch_size=batch_size)
    recipe = msgspec.structs.replace(tiny.recipe(), train=schedule)
    loader: DataLoader[int] = DataLoader(range(samples), batch_size=batch_size)  # type: ignore[arg-type]
    assert step_count(recipe, samples) == epochs * len(loader)


batches = st.lists(
    st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 64)),
    min_size=1,
)


@given(batches, st.randoms())
def test_mean_loss_is_correctly_rounded(losses, random):
    exact = sum(Fraction(x) * n for x, n in losses) / sum(n for _, n in losses)
    shuffled = random.sample(losses, len(losses))
    mean = mean_loss(shuffled)
    assert mean is not None and mean == float(exact)


@given(batches, st.sampled_from([math.nan, math.inf, -math.inf]))
def test_mean_of_nonfinite_losses_is_none(losses, bad):
    assert mean_loss([*losses, (bad, 1)]) is None


def test_epoch_loss_equals_forward_loss():
    trained = train(tiny.recipe(optimizer='kind = "sgd"\nlearning_rate = 1e-30'), tiny.prepared())
    x, y = (torch.from_numpy(array) for array in tiny.prepared().train)
    loss = nn.functional.cross_entropy(trained.model(x), y).item()  # the weights have not changed
    assert trained.epochs[0].loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("toml", "kind", "settings"),
    [
        ('kind = "adamw"\nlearning_rate = 0.01', torch.optim.AdamW, {"lr": 0.01}),
        (
            'kind = "adam"\nlearning_rate = 0.01\nbetas = [0.5, 0.75]',
            torch.optim.Adam,
            {"lr": 0.01, "betas": (0.5, 0.75)},
        ),
        (
            'kind = "sgd"\nlearning_rate = 0.5\nmomentum = 0.25\nnesterov = true',
            torch.optim.SGD,
            {"lr": 0.5, "momentum": 0.25, "nesterov": True},
        ),
    ],
)
def test_optimizers_have_pytorch_defaults(toml, kind, settings):
    model = nn.Linear(1, 1)
    ours = build_optimizer(tiny.recipe(optimizer=toml).optimizer, model)
    assert type(ours) is kind
    assert ours.defaults == kind(model.parameters(), **settings).defaults


def test_native_restores_switches():
    cudnn = torch.backends.cudnn

    def switches():
        return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark

    before = switches()
    with numerics_mode("native"):
        assert switches() == (True, True, False)
    assert switches() == before


# --- resumed trainings ----------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**63 - 1))
def test_epoch_batches_equal_shuffling_loader(samples, batch_size, seed):
    torch.manual_seed(seed)
    loader = DataLoader(TensorDataset(torch.arange(samples)), batch_size, shuffle=True)
    expected = [rows.tolist() for (rows,) in loader]
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    assert epoch_batches(samples, batch_size) == expected
    assert torch.equal(torch.get_rng_state(), after)


def bits(state: State) -> str:
    return digest(state.tensors)


def copy(state: State) -> State:
    return dataclasses.replace(state, tensors={k: v.clone() for k, v in state.tensors.items()})


def noisy(recipe: Recipe, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return a model that draws random numbers in each step, and has buffers."""
    widths = input_shape[0] * input_shape[1]
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(widths, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.Linear(8, classes),
    )


@pytest.mark.parametrize("numerics", ["exact", "native"])
@pytest.mark.parametrize("model", ["mlp", "noisy", "mlp in bfloat16"])
@pytest.mark.parametrize(
    "optimizer",
    [
        tiny.ADAMW,
        'kind = "adam"\nlearning_rate = 0.01\nweight_decay = 0.1\namsgrad = true',
        'kind = "sgd"\nlearning_rate = 0.1',
        'kind = "sgd"\nlearning_rate = 0.1\nmomentum = 0.9\nnesterov = true\nweight_decay = 0.1',
        'kind = "sgd"\nlearning_rate = 0.1\nmomentum = 0.9\ndampening = 0.5',
    ],
)
def test_resumed_training_equals_unbroken_training(monkeypatch, numerics, model, optimizer):
    """Weights, optimizer, generator and losses are compared after every later step."""
    if model == "noisy":
        monkeypatch.setattr("reproml.pipeline.models.build_model", noisy)
    precision = "bfloat16" if model == "mlp in bfloat16" else "float32"
    recipe = tiny.recipe(optimizer=optimizer, precision=precision)
    states: list[State] = []
    unbroken = train(
        recipe, tiny.prepared(), numerics, after_step=lambda t: states.append(copy(t.state()))
    )
    assert [state.step for state in states] == [1, 2, 3, 4, 5, 6]
    expected = [bits(state) for state in states]
    for start in states:
        torch.manual_seed(99)
        found: list[str] = []
        resumed = train(
            recipe,
            tiny.prepared(),
            numerics,
            start=start,
            after_step=partial(lambda found, t: found.append(bits(t.state())), found),
        )
        assert found == expected[start.step :]
        assert digest(resumed.model) == digest(unbroken.model)
        assert resumed.epochs == unbroken.epochs
        assert resumed.initial_state_dict_sha256 == unbroken.initial_state_dict_sha256
    assert [bits(state) for state in states] == expected  # a start is not changed


def test_state_of_other_training_raises():
    states: list[State] = []
    train(
        tiny.recipe(), tiny.prepared(), steps=1, after_step=lambda t: states.append(copy(t.state()))
    )
    for other in (
        tiny.recipe(seed=2),
        tiny.recipe(hidden="[9]"),
        tiny.recipe(optimizer='kind = "sgd"\nlearning_rate = 0.1'),
    ):
        with pytest.raises(ReproError, match="the checkpoint of step 1 is not from a training of"):
            train(other, tiny.prepared(), start=states[0])
