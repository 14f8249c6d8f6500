"""Workers for the tests: threads of this process, with PyTorch's autograd and no network."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reproml.arithmetic.dispatch.dispatcher import natively

T = TypeVar("T")


class Thread:
    """One worker: a partial_sums.Group.

    Only one thread runs at a time, so that each has a random number generator of its own.
    """

    def __init__(self, rank: int, table: list[Any], baton: Any, barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(table)
        self.models: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()
        self.table, self.baton, self.barrier = table, baton, barrier
        self.sent: list[tuple[int, ...]] = []  # the shape of every tensor that was exchanged

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.sent.append(tuple(x.shape))
        self.table[self.rank] = x.clone()
        random = torch.get_rng_state()
        self.baton.release()
        try:
            self.barrier.wait(60)
            received = list(self.table)
            self.barrier.wait(60)
        finally:
            self.baton.acquire()
        torch.set_rng_state(random)
        assert len({(y.shape, y.dtype) for y in received}) == 1
        return received

    def start_all_to_all(self, x: Tensor) -> Callable[[], Tensor]:
        with natively():
            received = torch.stack([y[self.rank] for y in self._exchange(x)])
        return lambda: received

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        with natively():
            received = torch.stack(self._exchange(x))
        return lambda: received

    def all_gather(self, x: Tensor) -> Tensor:
        return self.start_all_gather(x)()

    def broadcast(self, x: Tensor) -> None:
        x.copy_(self.all_gather(x)[0])


def together(size: int, work: Callable[[Thread], T]) -> list[T]:
    """Return what `work` returns on each of `size` workers; raise the error of any of them."""
    table: list[Any] = [None] * size
    baton, barrier = threading.Lock(), threading.Barrier(size)

    def run_worker(rank: int) -> T:
        try:
            with baton:
                return work(Thread(rank, table, baton, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run_worker, rank) for rank in range(size)]
        errors = [e for f in futures if (e := f.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [f.result() for f in futures]
