"""Train a recipe's model: what a plain PyTorch script does, in the same order.

    torch.manual_seed(seed); model; optimizer; for each epoch a shuffling DataLoader's batches

so that a script of the same steps under `reproml.exact()` reaches the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, Optional

import msgspec
import torch
from torch.utils.data import DataLoader, Dataset

from reproml import models
from reproml.arithmetic import exact
from reproml.digest import digest
from reproml.preprocess import Prepared
from reproml.recipe import SGD, Adam, AdamW, Optimizer, Recipe


@dataclass(frozen=True)
class Epoch:
    """One pass over the training set."""

    loss: Optional[float]  # mean over the samples, None if it is not finite
    state_dict_sha256: str  # of the weights after it


@dataclass(frozen=True)
class Trained:
    """A trained model and the trail of its weights."""

    model: torch.nn.Module
    initial_state_dict_sha256: str
    epochs: list[Epoch]  # those that were finished


def train(
    recipe: Recipe,
    prepared: Prepared,
    numerics: str = "exact",
    steps: Optional[int] = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train on `prepared.train`: x float32 [n, h, w], y int64 [n].

    `numerics` is "exact" or "native"; `steps` ends the training early, inside an epoch too.
    `log` gets a line for each epoch, `progress` the number of steps done and of all steps.
    Raises NotExactError if the model needs an operator that has no exact definition.
    """
    x, y = (torch.from_numpy(array) for array in prepared.train)
    with numerics_mode(numerics):
        torch.manual_seed(recipe.seed)
        model = models.build(recipe, tuple(x.shape[1:]), prepared.classes)
        optimizer = _optimizer(recipe.optimizer, model)
        initial = digest(model)
        loader: Any = DataLoader(
            _Batches(x, y),
            batch_size=recipe.train.batch_size,
            shuffle=True,
            collate_fn=lambda batch: batch,  # the dataset has put the batch together already
        )
        total = recipe.train.epochs * len(loader)
        total = total if steps is None else min(steps, total)
        done, epochs = 0, []
        while done < total:
            losses = []
            for inputs, labels in loader:
                optimizer.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                losses.append((loss.detach(), len(labels)))  # read at the end: no wait in the loop
                done += 1
                progress(done, total)
                if done == total:
                    break
            if len(losses) == len(loader):
                epoch = Epoch(_mean([(float(loss), n) for loss, n in losses]), digest(model))
                epochs.append(epoch)
                log(f"epoch {len(epochs)} of {recipe.train.epochs}: loss {epoch.loss}")
    return Trained(model, initial, epochs)


def step_count(recipe: Recipe, samples: int) -> int:
    """Return the number of steps of a whole training on so many samples."""
    return recipe.train.epochs * -(-samples // recipe.train.batch_size)  # rounded up


def numerics_mode(numerics: str) -> AbstractContextManager[Any]:
    """Return `reproml.exact()`, or for "native" PyTorch with its determinism switches on."""
    if numerics not in ("exact", "native"):
        raise ValueError(f"numerics must be 'exact' or 'native', not {numerics!r}")
    return _native() if numerics == "native" else exact()


@contextmanager
def _native() -> Iterator[None]:
    """All that PyTorch itself offers for reproducibility; put back at the end."""
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = before[1:]


def _optimizer(chosen: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    kinds: dict[type, Any] = {
        AdamW: torch.optim.AdamW,
        Adam: torch.optim.Adam,
        SGD: torch.optim.SGD,
    }
    settings = msgspec.structs.asdict(chosen)  # under PyTorch's own names, but for one
    learning_rate = settings.pop("learning_rate")
    optimizer: torch.optim.Optimizer = kinds[type(chosen)](
        model.parameters(), lr=learning_rate, **settings
    )
    return optimizer


class _Batches(Dataset[Any]):
    """A dataset that the loader asks for a whole batch, so that no sample is touched by itself.

    The loader's order and its random draws are those of a sample-by-sample dataset.
    """

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.tensor(indices)
        return self.x[rows], self.y[rows]


def _mean(losses: list[tuple[float, int]]) -> Optional[float]:
    """Return the mean over samples of (mean of a batch, its size), rounded once to binary64."""
    if not all(math.isfinite(loss) for loss, _ in losses):
        return None
    total = sum(Fraction(loss) * n for loss, n in losses)
    return float(total / sum(n for _, n in losses))
