"""Deep learning that is reproducible to the last bit.

    import reproml

    with reproml.exact():          # every operator returns the correctly rounded result
        train()

    print(reproml.digest(model))   # the same on any machine

Importing reproml is light: PyTorch is loaded by the first call that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reproml.arithmetic import NotExactError as NotExactError
    from reproml.arithmetic import exact as exact
    from reproml.digest import digest as digest

# The public names, each with the module that defines it.
_PUBLIC = {
    "exact": "reproml.arithmetic",
    "NotExactError": "reproml.arithmetic",
    "digest": "reproml.digest",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'reproml' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the submodule reproml.digest must not hide the function
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
