"""Gradient accumulation whose gradients are those of one large batch, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

from reproml import tracing
from reproml.arithmetic import state
from reproml.arithmetic.distributed.micro_batches import Accumulation, Later, MicroBatch
from reproml.arithmetic.distributed.operands import shard_inputs
from reproml.arithmetic.distributed.sharded import MicroBatchShard
from reproml.errors import NotExactError, ReproError
from reproml.training_state import random_states, set_random_states


@contextmanager
def accumulate(model: nn.Module, batch_size: int) -> Iterator[None]:
    """Give the gradients of one batch, rounded once, from micro-batches that need less memory.

        with reproml.accumulate(model, batch_size=len(x)):
            for inputs, labels in zip(x.split(8), y.split(8)):
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
        optimizer.step()

    The micro-batches are consecutive rows of the batch, of any sizes; `batch_size` is the number of rows
    of all together. Within the block the model's output represents the complete batch, as with
    DistributedDataParallel, so a loss computed from it is the loss of the complete batch, with the mean
    over all its rows: do not divide it by the number of micro-batches, and do not add the losses of
    several. The values of the loss and of the gradients are known at the end of the block.

    Raises ReproError if the micro-batches have not batch_size rows together or differ in what they compute,
    NotExactError if the model depends on a statistic of the batch, such as batch normalization in training.
    """
    if state.active.depth == 0:
        raise ReproError("reproml.accumulate is exact only within reproml.exact(); put it inside")
    if tracing.active is not None:
        raise ReproError(
            "a trace records complete batches, not micro-batches; record the training without "
            "reproml.accumulate, which has the same steps"
        )
    block = _Block(model, batch_size)
    with block.hooks():
        yield
        block.accumulation.finish()
    block.write_gradients()


class _Block:
    """What happens between the beginning and the end of `accumulate`."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model = model
        self.accumulation = Accumulation(batch_size)
        self._random: Any = None  # states of the random generators before the first micro-batch
        self._own_random: Any = None  # those before this micro-batch, to be continued after it
        # Parameter -> the micro-batch that wrote its gradient last.
        self._written: dict[Tensor, Optional[MicroBatch]] = {}
        self._before: dict[Tensor, Optional[Tensor]] = {}  # gradients before the block

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Have the model take micro-batches, and its parameters the gradients."""
        if any(p.dtype is torch.float64 for p in self.model.parameters()):
            raise NotExactError(
                "Micro-batches are defined for models of float32, bfloat16 and float16, not of float64; "
                "convert the model, or compute the complete batch at once."
            )
        with ExitStack() as stack:
            handles: list[Any] = [
                self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                self.model.register_forward_hook(self._after_forward, always_call=True),
            ]
            for p in self.model.parameters():
                if p.requires_grad:
                    handles.append(p.register_hook(lambda _, p=p: self._before_gradient(p)))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def write_gradients(self) -> None:
        """Write the gradients of the complete batch, added to those before the block."""
        with torch.no_grad():
            for p, before in self._before.items():
                if isinstance(p.grad, Later):
                    p.grad = p.grad.full_tensor()
                if before is not None and p.grad is not None:
                    p.grad = before.add_(p.grad)

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return args, kwargs
        return shard_inputs((args, kwargs), self._begin)

    def _begin(self, rows: int) -> MicroBatchShard:
        micro_batch = self.accumulation.begin(rows)
        if micro_batch.first is None:
            self._random = random_states()
        else:
            self._own_random = random_states()
            set_random_states(self._random)
        micro_batch.draws = True
        return MicroBatchShard(micro_batch, self.accumulation.batch)

    def _after_forward(self, *_: Any) -> None:
        micro_batch = self.accumulation.current
        if micro_batch is not None and micro_batch.draws:
            micro_batch.draws = False
            if micro_batch.first is not None:
                set_random_states(self._own_random)

    def _before_gradient(self, p: Tensor) -> None:
        """Make room for the gradient of a micro-batch, which is that of the complete batch."""
        current = self.accumulation.current
        if p not in self._written:
            self._before[p], p.grad = p.grad, None
        elif self._written[p] is not current:
            p.grad = None  # that of an earlier micro-batch
        elif current is not None and type(p.grad) is Tensor:  # so that a Later can be added to it
            grad = p.grad
            p.grad = Later(grad, lambda: grad, current)
        self._written[p] = current
