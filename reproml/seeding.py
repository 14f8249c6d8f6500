"""The random generators that a script draws from: Python's, NumPy's global one and PyTorch's.

Each starts in a state that differs from one process to the next, until it is seeded. `Generators` seeds
all three, or finds those from which numbers were drawn before.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import torch

from reproml.arithmetic.patches import replaced


class _Generator(NamedTuple):
    """A generator: its state, what seeds it, and the functions that a script may seed it by."""

    state: Callable[[], Any]
    seed: Callable[[int], Any]
    seeding: tuple[tuple[Any, str], ...]


_GENERATORS = {
    "Python's random": _Generator(
        random.getstate, random.seed, ((random, "seed"), (random, "setstate"))
    ),
    "NumPy's global generator": _Generator(
        np.random.get_state,
        np.random.seed,
        ((np.random, "seed"), (np.random, "set_state")),
    ),
    "PyTorch's generator": _Generator(
        lambda: torch.get_rng_state().tolist(),
        torch.manual_seed,
        tuple(
            (owner, name)
            for owner in (torch, torch.random)
            for name in ("manual_seed", "set_rng_state", "seed")
        ),
    ),
}


class Generators:
    """Watches the three generators while a script runs."""

    def __init__(self, seed: Optional[int] = None) -> None:
        self.unseeded: list[str] = []  # those from which numbers were drawn before they were seeded
        self._first: dict[str, bytes] = {}  # the states of those that are not seeded yet
        for name, generator in _GENERATORS.items():
            if seed is None:
                self._first[name] = pickle.dumps(generator.state())
            else:
                generator.seed(seed)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the functions that seed a generator until the end of the block."""

        def watch(name: str) -> Callable[[Any], Any]:
            return lambda original: self._seeding(name, original)

        patches = [(*place, watch(n)) for n, x in _GENERATORS.items() for place in x.seeding]
        with replaced(patches):
            yield
        for name in list(self._first):
            self._check(name)

    def _seeding(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def seed(*args: Any, **kwargs: Any) -> Any:
            self._check(name)
            first = self._first.pop(name, None)
            result = original(*args, **kwargs)
            given = [x for x in (*args, *kwargs.values()) if x is not None]
            state = pickle.dumps(_GENERATORS[name].state())
            if not given or state == first:
                self._first[name] = state  # seeded by the system, or restored
            return result

        return seed

    def _check(self, name: str) -> None:
        """Record that numbers were drawn from a generator: it is not seeded, and its state has changed."""
        first = self._first.get(name)
        if first is not None and first != pickle.dumps(_GENERATORS[name].state()):
            del self._first[name]
            self.unseeded.append(name)
