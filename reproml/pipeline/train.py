"""Train a recipe's model, in the same order as a plain PyTorch script.

    torch.manual_seed(seed); model; optimizer; for each epoch a shuffling DataLoader's batches

A script that takes the same steps under `reproml.exact()` reaches the same weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable, NamedTuple, Optional

import msgspec
import torch
from torch.utils.data import DataLoader

from reproml import distributed
from reproml.accumulation import accumulate
from reproml.arithmetic.context import exact
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline import models
from reproml.pipeline.device import CPU
from reproml.pipeline.preprocess import Prepared
from reproml.pipeline.recipe import SGD, Adam, AdamW, Optimizer, Recipe
from reproml.tracing import batch as record_batch
from reproml.tracing import end_epoch as record_end_of_epoch
from reproml.tracing import restoring


@dataclass(frozen=True)
class Epoch:
    """One pass over the training set."""

    loss: Optional[float]  # mean over the samples, None if it is not finite
    state_dict_sha256: str  # digest of the weights at its end


@dataclass(frozen=True)
class Trained:
    """A trained model, and the digests of its weights on the way."""

    model: torch.nn.Module
    initial_state_dict_sha256: str
    epochs: list[Epoch]  # the finished ones


@dataclass(frozen=True)
class State:
    """The state of a training after some steps: everything that its later steps and items depend on.

    Nothing in it depends on the number of processes that computed it.
    """

    step: int  # number of steps done
    # "model.NAME": the state dict
    # "optimizer.PARAMETER.NAME": the optimizer's state; PARAMETER is a number
    # "random.epoch", "random.now": uint8, state of the CPU generator at the start of the epoch, and now
    # "losses": float32 [steps done in the current epoch], the mean loss of each
    tensors: dict[str, torch.Tensor]
    initial_state_dict_sha256: str
    epochs: list[Epoch]  # the finished ones


def _discard(*reported: Any) -> None:
    """Report nothing."""


class Output(NamedTuple):
    """Where a training reports: a line of text, or the number of steps done and of all steps."""

    log: Callable[[str], None] = _discard
    progress: Callable[[int, int], None] = _discard


SILENT = Output()


def train(
    recipe: Recipe,
    prepared: Prepared,
    numerics: str = "exact",
    steps: Optional[int] = None,
    output: Output = SILENT,
    start: Optional[State] = None,
    after_step: Callable[[Training], None] = _discard,
    device: torch.device = CPU,
    micro_batch: Optional[int] = None,
) -> Trained:
    """Train on `prepared.train`: x float32 [n, h, w], y int64 [n].

    `numerics` is "exact" or "native"; `steps` ends the training early, also within an epoch. `output`
    receives a line for each epoch and the progress after each step. With `start` the training resumes
    from that state, to the same bits. `after_step` is called with the training after each step. The
    trained model stays on `device`. With `micro_batch`, a batch is computed that many rows at a time.
    Raises NotExactError if the model needs an operator that has no exact definition, ReproError if
    `start` is not a state of this training.
    """
    with ExitStack() as stack:
        if start is None:
            stack.enter_context(numerics_mode(numerics))
            training = Training(recipe, prepared, device, micro_batch)
        else:
            with restoring() as record_restored:  # not steps that a trace should record
                stack.enter_context(numerics_mode(numerics))
                training = Training(recipe, prepared, device, micro_batch)
                training.restore(start)
                record_restored(training.model, training.optimizer)
        total = step_count(recipe, len(prepared.train.y))
        total = total if steps is None else min(steps, total)
        while training.done < total:
            training.step()
            if training.done % training.steps_per_epoch == 0:
                loss = training.end_epoch().loss
                record_end_of_epoch()
                output.log(f"epoch {len(training.epochs)} of {recipe.train.epochs}: loss {loss}")
            output.progress(training.done, total)
            after_step(training)
    return Trained(training.model, training.initial_state_dict_sha256, training.epochs)


class Training:
    """A training in progress, between two steps. To be used within `numerics_mode`."""

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        device: torch.device = CPU,
        micro_batch: Optional[int] = None,
    ) -> None:
        self._x, self._y = (torch.from_numpy(array).to(device) for array in prepared.train)
        self._recipe = recipe
        self._micro_batch = micro_batch
        torch.manual_seed(recipe.seed)
        # Made on the CPU: its initial weights are then the same natively, too.
        model = models.build_model(recipe, tuple(self._x.shape[1:]), prepared.classes)
        self.model = model.to(device)
        self.optimizer = build_optimizer(recipe.optimizer, self.model)
        self._wrapped = distributed.wrap(self.model)  # the model itself in a single process
        self.initial_state_dict_sha256 = digest(self.model)
        self.epochs: list[Epoch] = []  # the finished ones
        self._batches: list[list[int]] = []  # of the current epoch, drawn at its first step
        self._losses: list[torch.Tensor] = []  # of the current epoch's steps so far
        self.steps_per_epoch = -(-len(self._y) // recipe.train.batch_size)  # rounded up
        self._begin_epoch()

    @property
    def done(self) -> int:
        """Number of steps done."""
        return len(self.epochs) * self.steps_per_epoch + len(self._losses)

    def step(self) -> None:
        """Take one step on the next batch of the epoch."""
        if not self._batches:
            self._batches = epoch_batches(len(self._y), self._recipe.train.batch_size)
        inputs, labels = self._rows(self._batches[len(self._losses)])
        record_batch(inputs, labels)
        self.optimizer.zero_grad()
        loss = self._backward(inputs, labels)
        self.optimizer.step()
        self._losses.append(
            loss.detach()
        )  # read at the end of the epoch: the loop does not wait for it

    def _backward(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of a batch, and return its loss."""
        size = self._micro_batch
        if size is None or size >= len(labels):
            inputs, labels = distributed.shard(inputs), distributed.shard(labels)
            return self._backward_of_rows(self._wrapped, inputs, labels)
        with accumulate(self.model, len(labels)):
            for x, y in zip(inputs.split(size), labels.split(size)):
                loss = self._backward_of_rows(self.model, x, y)
        return loss

    def _backward_of_rows(
        self, model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        with autocast(self._recipe.precision, self._x.device):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    def end_epoch(self) -> Epoch:
        """Finish the epoch whose last step was taken, and return it."""
        sizes = [len(rows) for rows in self._batches]
        loss = mean_loss(list(zip(map(float, self._losses), sizes)))
        self.epochs.append(Epoch(loss, digest(self.model)))
        self._begin_epoch()
        return self.epochs[-1]

    def state(self) -> State:
        """Return the state. It shares memory with the training, so read it before the next step."""
        tensors = {
            **self._weights(),
            "random.epoch": self._random,
            "random.now": torch.get_rng_state(),
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
        }
        return State(self.done, tensors, self.initial_state_dict_sha256, list(self.epochs))

    def restore(self, state: State) -> None:
        """Resume from a state. Raises ReproError if it is not one of a training of this recipe."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # creates the tensors of its state, to be overwritten below
        self.epochs = list(state.epochs)
        losses = state.tensors.get("losses", torch.empty(0))
        if losses.dtype is torch.float32 and losses.dim() == 1:
            self._losses = list(losses.to(self._x.device, copy=True).unbind())
        if (
            dtypes_and_shapes(self.state().tensors) != dtypes_and_shapes(state.tensors)
            or self.initial_state_dict_sha256 != state.initial_state_dict_sha256
            or len(self._losses) >= self.steps_per_epoch
            or not self.done == state.step <= self._recipe.train.epochs * self.steps_per_epoch
        ):
            raise _other_training(self._recipe, state)
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(state.tensors[name])
        self._random = state.tensors["random.epoch"].clone()
        try:
            if self._losses:
                torch.set_rng_state(self._random)
                self._batches = epoch_batches(len(self._y), self._recipe.train.batch_size)
            torch.set_rng_state(state.tensors["random.now"].clone())
        except RuntimeError:  # right size, but not a state of the generator
            raise _other_training(self._recipe, state) from None

    def _begin_epoch(self) -> None:
        self._random = torch.get_rng_state()
        self._batches, self._losses = [], []

    def _rows(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.tensor(rows, device=self._x.device)
        return self._x[index], self._y[index]

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors that a step changes: those of the model and of the optimizer's state."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:  # SGD without momentum has no buffer
                    tensors[f"optimizer.{index}.{name}"] = value
        return tensors


def epoch_batches(samples: int, batch_size: int) -> list[list[int]]:
    """Draw the order of the next epoch: for each batch, the rows of its samples.

    A shuffling DataLoader makes the draws, so the order and the generator's state afterwards are
    PyTorch's. The same state of the generator gives the same batches.
    """
    loader: Any = DataLoader(
        range(samples),  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        collate_fn=list,
    )
    with torch.no_grad():  # so that a trace does not record these as batches
        return list(loader)


def dtypes_and_shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[Any, ...]]:
    """Return the dtype and the shape of each tensor."""
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in tensors.items()}


def _other_training(recipe: Recipe, state: State) -> ReproError:
    return ReproError(
        f"the checkpoint of step {state.step} is not from a training of {recipe.name}; delete it"
    )


def step_count(recipe: Recipe, samples: int) -> int:
    """Return the number of steps of a complete training on `samples` samples."""
    return recipe.train.epochs * -(-samples // recipe.train.batch_size)  # rounded up


def numerics_mode(numerics: str) -> AbstractContextManager[Any]:
    """Return `reproml.exact()`, or for "native" PyTorch with its determinism switches on."""
    if numerics not in ("exact", "native"):
        raise ValueError(f"numerics must be 'exact' or 'native', not {numerics!r}")
    return _native() if numerics == "native" else exact()


@contextmanager
def _native() -> Iterator[None]:
    """Set PyTorch's own switches for reproducibility, and restore them at the end."""
    cudnn: Any = torch.backends.cudnn
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or ":4096:8"  # without it cuBLAS is refused
    saved = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(saved[0], warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = saved[1:]
        if workspace is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a model runs in this precision of a recipe."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def build_optimizer(chosen: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for the parameters of `model`."""
    kinds: dict[type, Any] = {
        AdamW: torch.optim.AdamW,
        Adam: torch.optim.Adam,
        SGD: torch.optim.SGD,
    }
    settings = msgspec.structs.asdict(chosen)  # PyTorch's names, except for the learning rate
    learning_rate = settings.pop("learning_rate")
    optimizer: torch.optim.Optimizer = kinds[type(chosen)](
        model.parameters(), lr=learning_rate, **settings
    )
    return optimizer


def mean_loss(losses: list[tuple[float, int]]) -> Optional[float]:
    """Return the mean over all samples, given (mean loss, size) of each batch, rounded once to binary64.

    None if a loss is not finite.
    """
    if not all(math.isfinite(loss) for loss, _ in losses):
        return None
    total = sum(Fraction(loss) * n for loss, n in losses)
    return float(total / sum(n for _, n in losses))
