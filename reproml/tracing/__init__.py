"""Record what a training did, step by step, so that two that differ can be compared: `reproml diff`.

    with reproml.trace("run.trace"):
        train()

Any training in plain PyTorch, native or exact, in one process: see docs/trace.md for what is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from reproml.errors import ReproError

if TYPE_CHECKING:
    from reproml.tracing.recorder import Recorder

LEVELS = ("epoch", "step", "op")
active: Optional[Recorder] = None  # the one that listens in this process


@contextmanager
def trace(
    path: Union[str, Path],
    level: str = "step",
    resume: Optional[dict[str, Any]] = None,
    about: Optional[dict[str, Any]] = None,
) -> Iterator[Recorder]:
    """Record the training inside into a trace file, which is written as it goes on.

    level: "epoch" the weights after each epoch; "step" also batch, loss, gradients and weights of each
    optimizer's step; "op" also each operator's inputs and outputs with the line of code (slow).
    resume: what `Recorder.head()` returned, say in a checkpoint: the file is cut back to there and goes on.
    about: more for the header; "command" is how to run this again, a list of words.

    Yields the recorder, whose `head()` can be asked for at any time. A trace that is there is replaced,
    any other file refused. Raises ReproError with the reason if the file cannot be written or, with
    `resume`, is damaged or another run's; or if a trace is being recorded already.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    from reproml.tracing.recorder import Recorder  # loads PyTorch

    global active
    if active is not None:
        raise ReproError("a trace is being recorded already; one process records one at a time")
    with Recorder.open(Path(path), level, resume, about or {}) as recorder:
        active = recorder
        try:
            yield recorder
        finally:
            active = None


def batch(*tensors: Any) -> None:
    """Tell the trace, if one is recorded, the tensors of a batch: for a loop without a DataLoader."""
    if active is not None:
        active.batch(tensors)


def end_epoch() -> None:
    """Tell the trace, if one is recorded, that an epoch is over: for a loop without a DataLoader."""
    if active is not None:
        active.end_epoch()


def restoring() -> AbstractContextManager[Callable[[Any, Any], None]]:
    """Return a context in which a checkpoint is loaded: nothing in it is recorded.

    It yields a function that tells the trace, if one is recorded, a model and its optimizer that have
    taken steps before: they are in its last entry, even if they take none any more.
    """
    return active.restoring() if active is not None else nullcontext(lambda model, optimizer: None)
