"""A pytest plugin under which the dispatch key that reproml uses is taken: `pytest -p tests.taken_key`.

It registers a kernel as another extension of PyTorch would, so reproml intercepts operators by a mode.
"""

from __future__ import annotations

import torch

library = torch.library.Library("taken_key", "DEF")
library.define("nothing(Tensor x) -> Tensor")
library.impl("nothing", lambda x: x, "Fake")
