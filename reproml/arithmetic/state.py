"""The state that changes while programs run: whether a thread is inside `exact()`, and what is registered.

The log of deferred rounding tests is an object of its own, `dispatch.deferred.replay_log`.
"""

from __future__ import annotations

import threading
from typing import Any, Callable, Optional
from weakref import WeakKeyDictionary


class Active(threading.local):
    """The `exact()` contexts that this thread has entered."""

    depth = 0  # how many are nested
    context: Any = None  # the outermost
    # In a thread that was started within exact(), until its first operator: dispatch.dispatcher.Inherited.
    inherited: Any = None
    offered: Any = None  # the operator that is being offered to a tensor subclass
    # With on_unknown="warn": operators that ran natively -> the line of their first caller.
    ran_natively: Optional[dict[str, str]] = None


active = Active()

# The kernels registered with PyTorch (dispatch.dispatcher.Registration); None until the first `exact()`.
registration: Any = None

# Functions of TorchScript that were called since the patches were applied -> what runs in place of each.
scripts: WeakKeyDictionary[Any, Callable[..., Any]] = WeakKeyDictionary()
