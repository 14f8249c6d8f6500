"""Workers for the tests: threads of this process, with PyTorch's autograd and no network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, TypeVar

import torch
from torch import Tensor

from reproml.arithmetic.distributed.pending import raw

T = TypeVar("T")


class Thread:
    """One worker: a partial.Group. One runs at a time, so that each has random numbers of its own."""

    def __init__(self, rank: int, table: list[Any], baton: Any, barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(table)
        self.table, self.baton, self.barrier = table, baton, barrier
        self.sent: list[tuple[int, ...]] = []  # the shape of all that it gave to others

    def _exchanged(self, x: Tensor) -> list[Tensor]:
        self.sent.append(tuple(x.shape))
        self.table[self.rank] = x.clone()
        random = torch.get_rng_state()
        self.baton.release()
        try:
            self.barrier.wait(60)
            shown = list(self.table)
            self.barrier.wait(60)
        finally:
            self.baton.acquire()
        torch.set_rng_state(random)
        assert len({(y.shape, y.dtype) for y in shown}) == 1
        return shown

    def to_owners(self, x: Tensor) -> Tensor:
        with raw():
            return torch.stack([y[self.rank] for y in self._exchanged(x)])

    def to_all(self, x: Tensor) -> Tensor:
        with raw():
            return torch.stack(self._exchanged(x))


def together(size: int, work: Callable[[Thread], T]) -> list[T]:
    """What `work` returns on each of so many workers; an error of any of them is raised."""
    table: list[Any] = [None] * size
    baton, barrier = threading.Lock(), threading.Barrier(size)

    def run(rank: int) -> T:
        try:
            with baton:
                return work(Thread(rank, table, baton, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [e for f in futures if (e := f.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [f.result() for f in futures]
