"""Decide whether this process is one of several workers, from the variables that torchrun sets."""

from __future__ import annotations

import os
from typing import NamedTuple

from reproml.errors import ReproError


class Worker(NamedTuple):
    """This process among the workers that torchrun started; alone without torchrun."""

    rank: int
    size: int


def this_worker() -> Worker:
    """Return this process's number and the number of workers, from the variables that torchrun sets.

    A process is one of several workers only if WORLD_SIZE is above 1: clusters set RANK for purposes of
    their own. Raises ReproError if a variable is damaged, or if there are several workers and torchrun's
    other variables are missing.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if size == 0 or (rank >= size > 1):
        raise ReproError(
            f"RANK={rank} and WORLD_SIZE={size} are not those of a worker; unset both, "
            "or start the workers with torchrun"
        )
    if size == 1:
        return Worker(0, 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ReproError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set; unset WORLD_SIZE, "
            "or start the workers with torchrun"
        )
    _number("MASTER_PORT", 0)
    return Worker(rank, size)


def local_rank() -> int:
    """Return this process's number among the workers on the same machine, from 0."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ReproError(
            f"the environment variable {name} is {text!r}, not a number; unset it, "
            "or start the workers with torchrun"
        )
    return int(text)
