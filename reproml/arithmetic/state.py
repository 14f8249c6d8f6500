"""What changes while programs run: whether this thread is within `exact()`."""

from __future__ import annotations

import threading
from typing import Optional


class Active(threading.local):
    """The `exact()` contexts that this thread has entered."""

    depth = 0  # how many are nested
    passed: Optional[dict[str, str]] = None  # operators run natively -> the first caller's line


active = Active()
