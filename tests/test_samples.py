from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import reproml


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = [random.random(), np.random.rand(), torch.rand(()).item(), float(index)]
        return torch.tensor(drawn, dtype=torch.float64)


def epochs(workers: int, **options: Any) -> torch.Tensor:
    """Three epochs of shuffled samples, sorted by index: [3, 12, 4]."""
    data = reproml.SeededDataset(Noise(), seed=3)
    torch.manual_seed(1)
    loader = DataLoader(data, batch_size=5, shuffle=True, num_workers=workers, **options)
    found = []
    for epoch in range(3):
        data.set_epoch(epoch)
        samples = torch.cat(list(loader))
        found.append(samples[samples[:, 3].argsort()])
    return torch.stack(found)


@pytest.fixture(scope="module")
def without_workers() -> torch.Tensor:
    return epochs(0)


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}])
@pytest.mark.parametrize("workers", [1, 4])
def test_samples_do_not_depend_on_workers(workers, options, without_workers):
    assert torch.equal(epochs(workers, **options), without_workers)


def test_every_sample_and_epoch_draws_other_numbers(without_workers):
    assert all(len(without_workers[..., i].unique()) == 36 for i in range(3))
    other = reproml.SeededDataset(Noise(), seed=4)
    assert other[0][0] != without_workers[0, 0, 0]


def keys() -> Any:
    return np.random.get_state(legacy=False)["state"]["key"].tolist()


def test_a_sample_draws_nothing_from_the_training():
    data = reproml.SeededDataset(Noise(), seed=3)
    states = random.getstate(), keys(), torch.get_rng_state().tolist()
    assert len(data) == 12 and data[3].equal(data[3])
    assert states == (
        random.getstate(),
        keys(),
        torch.get_rng_state().tolist(),
    )


def test_a_dataset_without_index_is_refused():
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([1])

    with pytest.raises(TypeError, match="Stream has samples without an index"):
        reproml.SeededDataset(Stream(), 0)
