"""Train a recipe's model: what a plain PyTorch script does, in the same order.

    torch.manual_seed(seed); model; optimizer; for each epoch a shuffling DataLoader's batches

so that a script of the same steps under `reproml.exact()` reaches the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, Optional

import msgspec
import torch
from torch.utils.data import DataLoader

from reproml import distributed
from reproml.arithmetic.context import exact
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline import models
from reproml.pipeline.preprocess import Prepared
from reproml.pipeline.recipe import SGD, Adam, AdamW, Optimizer, Recipe
from reproml.tracing import batch as tell_batch
from reproml.tracing import end_epoch as tell_end_of_epoch
from reproml.tracing import restoring


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


@dataclass(frozen=True)
class State:
    """A training after some steps: all that the steps to come depend on, and the trail so far.

    Nothing in it depends on how many processes computed it.
    """

    step: int  # steps done
    # "model.NAME": the state dict; "optimizer.PARAMETER.NAME": the optimizer's, parameters numbered;
    # "random.epoch", "random.now": uint8, the CPU generator's at the epoch's start and now;
    # "losses": float32 [steps done in the running epoch], their mean losses
    tensors: dict[str, torch.Tensor]
    initial_state_dict_sha256: str
    epochs: list[Epoch]  # those that were finished


def train(
    recipe: Recipe,
    prepared: Prepared,
    numerics: str = "exact",
    steps: Optional[int] = None,
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    start: Optional[State] = None,
    after_step: Callable[[Training], None] = lambda training: None,
) -> Trained:
    """Train on `prepared.train`: x float32 [n, h, w], y int64 [n].

    `numerics` is "exact" or "native"; `steps` ends the training early, inside an epoch too.
    `log` gets a line for each epoch, `progress` the number of steps done and of all steps.
    With `start` the training goes on from there, to the same bits; `after_step` may take its state.
    Raises NotExactError if the model needs an operator that has no exact definition, ReproError if
    `start` is not a state of this training.
    """
    with ExitStack() as stack:
        if start is None:
            stack.enter_context(numerics_mode(numerics))
            training = Training(recipe, prepared)
        else:
            with restoring() as tell:  # a trace has the steps so far, and this is none
                stack.enter_context(numerics_mode(numerics))
                training = Training(recipe, prepared)
                training.restore(start)
                tell(training.model, training.optimizer)
        total = step_count(recipe, len(prepared.train.y))
        total = total if steps is None else min(steps, total)
        while training.done < total:
            training.step()
            if training.done % training.steps_per_epoch == 0:
                loss = training.end_epoch().loss
                tell_end_of_epoch()
                log(f"epoch {len(training.epochs)} of {recipe.train.epochs}: loss {loss}")
            progress(training.done, total)
            after_step(training)
    return Trained(training.model, training.initial_state_dict_sha256, training.epochs)


class Training:
    """A training under way, as it is between two steps. To be used within `numerics_mode`."""

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        self._x, self._y = (torch.from_numpy(array) for array in prepared.train)
        self._recipe = recipe
        torch.manual_seed(recipe.seed)
        self.model = models.build(recipe, tuple(self._x.shape[1:]), prepared.classes)
        self.optimizer = _optimizer(recipe.optimizer, self.model)
        self._shared = distributed.wrap(self.model)  # itself in a single process
        self.initial_state_dict_sha256 = digest(self.model)
        self.epochs: list[Epoch] = []  # those that were finished
        self._batches: list[list[int]] = []  # of the running epoch; drawn at its first step
        self._losses: list[torch.Tensor] = []  # of its steps done
        self.steps_per_epoch = -(-len(self._y) // recipe.train.batch_size)  # rounded up
        self._begin_epoch()

    @property
    def done(self) -> int:
        """The number of steps done."""
        return len(self.epochs) * self.steps_per_epoch + len(self._losses)

    def step(self) -> None:
        """Take one step, on the next batch of the epoch."""
        if not self._batches:
            self._batches = epoch_batches(len(self._y), self._recipe.train.batch_size)
        inputs, labels = self._rows(self._batches[len(self._losses)])
        tell_batch(inputs, labels)
        self.optimizer.zero_grad()
        inputs, labels = distributed.shard(inputs), distributed.shard(labels)
        loss = torch.nn.functional.cross_entropy(self._shared(inputs), labels)
        loss.backward()
        self.optimizer.step()
        self._losses.append(loss.detach())  # read at the epoch's end: no wait in the loop

    def end_epoch(self) -> Epoch:
        """Return the epoch whose last step was taken, and be ready for the next."""
        sizes = [len(rows) for rows in self._batches]
        loss = _mean(list(zip(map(float, self._losses), sizes)))
        self.epochs.append(Epoch(loss, digest(self.model)))
        self._begin_epoch()
        return self.epochs[-1]

    def state(self) -> State:
        """Return the state, which shares memory with the training: read it before the next step."""
        tensors = {
            **self._weights(),
            "random.epoch": self._random,
            "random.now": torch.get_rng_state(),
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
        }
        return State(self.done, tensors, self.initial_state_dict_sha256, list(self.epochs))

    def restore(self, state: State) -> None:
        """Go on from a state of a training of the same recipe; raises ReproError if it is another's."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # its state is there from its first step on: room for the other's
        self.epochs = list(state.epochs)
        losses = state.tensors.get("losses", torch.empty(0))
        if losses.dtype is torch.float32 and losses.dim() == 1:
            self._losses = list(losses.clone().unbind())
        if (
            shapes(self.state().tensors) != shapes(state.tensors)
            or self.initial_state_dict_sha256 != state.initial_state_dict_sha256
            or len(self._losses) >= self.steps_per_epoch
            or not self.done == state.step <= self._recipe.train.epochs * self.steps_per_epoch
        ):
            raise _not_its_state(self._recipe, state)
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(state.tensors[name])
        self._random = state.tensors["random.epoch"].clone()
        try:
            if self._losses:
                torch.set_rng_state(self._random)
                self._batches = epoch_batches(len(self._y), self._recipe.train.batch_size)
            torch.set_rng_state(state.tensors["random.now"].clone())
        except RuntimeError:  # of the right size, but no state of the generator
            raise _not_its_state(self._recipe, state) from None

    def _begin_epoch(self) -> None:
        self._random = torch.get_rng_state()
        self._batches, self._losses = [], []

    def _rows(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor(rows)
        return self._x[index], self._y[index]

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return what a step changes: the tensors of the model and of the optimizer's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:  # SGD's buffer without a momentum
                    tensors[f"optimizer.{index}.{name}"] = value
        return tensors


def epoch_batches(samples: int, batch_size: int) -> list[list[int]]:
    """Draw the order of the next epoch: for each batch in turn, the rows of the samples in it.

    Both the order and the draws from PyTorch's generator are those of a shuffling DataLoader, which
    does it. Called again from the same state of the generator, it returns the same.
    """
    loader: Any = DataLoader(
        range(samples),  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        collate_fn=list,
    )
    with torch.no_grad():  # so that a trace takes these for no batches
        return list(loader)


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """Return the dtype and the shape of each tensor."""
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}


def _not_its_state(recipe: Recipe, state: State) -> ReproError:
    return ReproError(
        f"the checkpoint of step {state.step} is not one of a training of {recipe.name}; delete it"
    )


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


def _mean(losses: list[tuple[float, int]]) -> Optional[float]:
    """Return the mean over samples of (mean of a batch, its size), rounded once to binary64."""
    if not all(math.isfinite(loss) for loss, _ in losses):
        return None
    total = sum(Fraction(loss) * n for loss, n in losses)
    return float(total / sum(n for _, n in losses))
