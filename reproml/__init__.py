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


def __getattr__(name: str) -> Any:
    if name != "exact":
        raise AttributeError(f"module 'reproml' has no attribute {name!r}")
    from reproml.arithmetic.context import exact

    return exact
