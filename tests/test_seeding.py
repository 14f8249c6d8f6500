from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from reproml.seeding import Generators

PYTHON, NUMPY, TORCH = "Python's random", "NumPy's global generator", "PyTorch's generator"


@pytest.fixture(autouse=True)
def states():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def unseeded(*steps):
    generators = Generators()
    with generators.watching():
        for step in steps:
            step()
    return generators.unseeded


DRAWS: dict[str, Any] = {
    PYTHON: [random.random, lambda: random.shuffle([1, 2, 3])],
    NUMPY: [np.random.rand, lambda: np.random.permutation(3)],
    TORCH: [lambda: torch.rand(1), lambda: torch.nn.Linear(2, 2)],
}
SEEDS: dict[str, Any] = {
    PYTHON: [lambda: random.seed(1), lambda: random.setstate(random.Random(2).getstate())],
    NUMPY: [
        lambda: np.random.seed(1),
        lambda: np.random.set_state(np.random.RandomState(2).get_state()),
    ],
    TORCH: [
        lambda: torch.manual_seed(1),
        lambda: torch.random.manual_seed(seed=1),
        lambda: torch.set_rng_state(torch.Generator().manual_seed(3).get_state()),
    ],
}
BY_SYSTEM: dict[str, Any] = {
    PYTHON: lambda: random.seed(),
    NUMPY: lambda: np.random.seed(None),
    TORCH: lambda: torch.seed(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_before_a_seed_are_named(name):
    for draw in DRAWS[name]:
        assert unseeded(draw) == [name]
        for seed in SEEDS[name]:
            assert unseeded(seed, draw) == []
            assert unseeded(draw, seed, draw) == [name]


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_of_the_system_is_no_seed(name):
    seed_by_system = BY_SYSTEM[name]
    assert unseeded(seed_by_system) == []
    assert unseeded(seed_by_system, DRAWS[name][0]) == [name]
    assert unseeded(SEEDS[name][0], DRAWS[name][0], seed_by_system, DRAWS[name][0]) == [name]


def test_a_state_that_is_restored_is_no_seed():
    def fork() -> None:
        with torch.random.fork_rng():
            torch.rand(1)

    assert unseeded(fork, lambda: torch.rand(1)) == [TORCH]


def test_a_given_seed_seeds_all_three():
    draws = [random.random, np.random.rand, lambda: torch.rand(1).item()]
    found = []
    for _ in range(2):
        generators = Generators(5)
        with generators.watching():
            found.append([draw() for draw in draws])
        assert generators.unseeded == []
    assert found[0] == found[1]
    assert found[0] == [random.Random(5).random(), np.random.RandomState(5).rand(), found[0][2]]
