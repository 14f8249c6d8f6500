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
active: Optional[Recorder] = None  # the recorder of this process, while it records


@contextmanager
def trace(
    path: Union[str, Path],
    level: str = "step",
    resume: Optional[dict[str, Any]] = None,
    about: Optional[dict[str, Any]] = None,
) -> Iterator[Recorder]:
    """Record the training inside the block in a trace file, which is written step by step.

    level: "epoch" records the weights after each epoch; "step" also the batch, loss, gradients and weights
    of each optimizer step; "op" also the inputs and outputs of each operator with its line of code (slow).
    resume: what `Recorder.head()` returned, for example from a checkpoint: the file is truncated to that
    head and continued. about: more keys for the header.

    Yields the recorder, whose `head()` may be called at any time. An existing trace is replaced; any other
    file is refused. Raises ReproError if the file cannot be written; with `resume`, if it is damaged or
    belongs to another run; and if this process is recording a trace already.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    try:
        from reproml.tracing.recorder import Recorder  # loads PyTorch
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ReproError(
            f"a trace needs the package {package}; install reproml[pipeline]"
        ) from None

    global active
    if active is not None:
        raise ReproError("this process is recording a trace already; end that trace first")
    with Recorder.open(Path(path), level, resume, about or {}) as recorder:
        active = recorder
        try:
            yield recorder
        finally:
            active = None


def batch(*tensors: Any) -> None:
    """Record the tensors of a batch, if a trace is being recorded: for a loop without a DataLoader."""
    if active is not None:
        active.batch(tensors)


def end_epoch() -> None:
    """Record the end of an epoch, if a trace is being recorded: for a loop without a DataLoader."""
    if active is not None:
        active.end_epoch()


def restoring() -> AbstractContextManager[Callable[[Any, Any], None]]:
    """Return a context in which a checkpoint is loaded: nothing inside it is recorded.

    It yields a function that registers a restored model and its optimizer with the trace, if one is being
    recorded, so that they appear in its last entry even if they take no further step.
    """
    return active.restoring() if active is not None else nullcontext(lambda model, optimizer: None)
