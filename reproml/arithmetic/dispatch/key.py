"""The dispatch key at which operators are intercepted."""

from __future__ import annotations

from typing import Any

from reproml.torch_internals import SetExcludeDispatchKeyGuard, parse_dispatch_key

# PyTorch keeps this key for extensions and registers no kernel for it. It lies just above `Python`, the
# key of modes and tensor subclasses.
NAME = "Fake"
KEY = parse_dispatch_key(NAME)


def exclude() -> Any:
    """Return a context in which no operator of this thread is intercepted."""
    return SetExcludeDispatchKeyGuard(KEY, True)
