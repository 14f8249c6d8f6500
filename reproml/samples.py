"""Random augmentation that does not depend on the number of DataLoader workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


class SeededDataset(Dataset[Any]):
    """A dataset each of whose samples draws its own random numbers, from `seed`, the epoch and the index.

        data = reproml.SeededDataset(torchvision.datasets.CIFAR10(root, transform=augment), seed=0)
        loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=4)
        for epoch in range(10):
            data.set_epoch(epoch)
            for batch in loader: ...

    While `dataset[index]` runs, the generators of Python, NumPy and PyTorch (on the CPU) are seeded with
    SHA-256("seed epoch index"); afterwards they continue as if nothing had been drawn. So a sample is the
    same in the process of the training and in any worker, and the training's own random numbers do not
    depend on what a sample draws. Within samples, `exact()` is what decides whether arithmetic is exact.

    Raises TypeError for a dataset that is iterable only, whose samples have no index.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(dataset).__name__} has samples without an index, so that they cannot be seeded one "
                "by one; use a dataset with __getitem__"
            )
        self.dataset = dataset
        self.seed = int(seed)
        self._epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # of workers that persist, too

    def set_epoch(self, epoch: int) -> None:
        """Use other random numbers: call it before the loop over each epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: Any) -> Any:
        with _seeded(f"{self.seed} {self._epoch.item()} {int(index)}"):
            return self.dataset[index]


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    number = int.from_bytes(sha256(text.encode()).digest(), "big")
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(number)
            np.random.seed(number % 2**32)
            torch.default_generator.manual_seed(number % 2**63)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
