"""The dispatch key at which operators are intercepted."""

from __future__ import annotations

from typing import Any

import torch

_C: Any = torch._C

# PyTorch keeps this key for extensions and registers no kernel for it. It lies just above `Python`, the
# key of modes and tensor subclasses.
NAME = "Fake"
KEY = _C._parse_dispatch_key(NAME)


def exclude() -> Any:
    """Return a context in which no operator of this thread is intercepted."""
    return _C._SetExcludeDispatchKeyGuard(KEY, True)
