"""Deep learning that is reproducible to the last bit.

    import reproml

    with reproml.exact():          # every operator returns the correctly rounded result
        train()

    print(reproml.digest(model))   # the same on any machine

Importing reproml is light: PyTorch is loaded by the first call that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from reproml.digest import digest as digest
from reproml.errors import NotExactError as NotExactError
from reproml.errors import ReproError as ReproError
from reproml.tracing import trace as trace
from reproml.versions import __version__ as __version__

if TYPE_CHECKING:
    from reproml.accumulation import accumulate as accumulate
    from reproml.arithmetic.context import exact as exact
    from reproml.arithmetic.numerics.libm import EXACT_MATH
    from reproml.samples import SeededDataset as SeededDataset
    from reproml.training_state import load as load
    from reproml.training_state import save as save

    math = EXACT_MATH


# Name -> the module that has it, and its name there. They need PyTorch.
_LAZY = {
    "accumulate": ("accumulation", "accumulate"),
    "exact": ("arithmetic.context", "exact"),
    "math": (
        "arithmetic.numerics.libm",
        "EXACT_MATH",
    ),  # Python's, with correctly rounded functions
    "SeededDataset": ("samples", "SeededDataset"),
    "save": ("training_state", "save"),
    "load": ("training_state", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'reproml' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(import_module(f"reproml.{module}"), attribute)
