"""Deep learning that is reproducible to the last bit.

    import reproml

    with reproml.exact():          # every operator returns the correctly rounded result
        train()

    print(reproml.digest(model))   # the same on any machine

Importing reproml is light: PyTorch is loaded by the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reproml.digest import digest as digest
from reproml.errors import NotExactError as NotExactError
from reproml.errors import ReproError as ReproError
from reproml.tracing import trace as trace
from reproml.versions import __version__ as __version__

if TYPE_CHECKING:
    from reproml.arithmetic.context import exact as exact
    from reproml.arithmetic.numerics.libm import EXACT_MATH

    math = EXACT_MATH


def __getattr__(name: str) -> Any:
    if name == "exact":
        from reproml.arithmetic.context import exact

        return exact
    if name == "math":  # Python's math, whose functions are correctly rounded
        from reproml.arithmetic.numerics.libm import EXACT_MATH

        return EXACT_MATH
    raise AttributeError(f"module 'reproml' has no attribute {name!r}")
