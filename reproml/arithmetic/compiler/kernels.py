"""The compiled loops of c/, if they were built; otherwise `library` is None, for the same bits.

A plain shared library loaded with ctypes: it knows nothing of PyTorch's or Python's binary interface.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from typing import Any, Optional

import torch
from torch import Tensor

_LONG, _DOUBLE, _POINTER, _INT = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_int

_VERSION = 8  # REPROML_VERSION of c/parallel.c, raised with any change there

# name -> (result, arguments), as in c/*.c
_SIGNATURES = {
    "reproml_limit_vectors": (None, [_INT]),
    "reproml_product": (
        _LONG,
        [_LONG] * 4 + ([_POINTER] + [_LONG] * 3) * 2 + [_POINTER] * 3 + [_LONG],
    ),
    "reproml_tape": (_LONG, [_POINTER, _LONG] + [_POINTER] * 4 + [_LONG]),
    "reproml_direct": (_LONG, [_INT, _LONG] + [_POINTER] * 4 + [_LONG]),
    "reproml_nll": (_INT, [_POINTER] * 3 + [_LONG] * 3 + [_INT, _POINTER, _POINTER]),
    "reproml_nll_backward": (
        _INT,
        [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, ctypes.c_float, _POINTER],
    ),
    "reproml_scatter": (_LONG, [_LONG] * 4 + [_POINTER] * 3 + [_LONG, _POINTER]),
    "reproml_sum": (_LONG, [_POINTER] * 3 + [_INT, _LONG, _DOUBLE, _POINTER]),
    "reproml_normalize": (
        _LONG,
        [_POINTER] * 4 + [_DOUBLE] + [_POINTER] * 3 + [_DOUBLE] + [_POINTER] * 4 + [_LONG],
    ),
    "reproml_normalize_backward": (_LONG, [_POINTER] * 12 + [_LONG]),
    "reproml_column_moments": (_LONG, [_LONG] * 2 + [_POINTER] * 6),
    "reproml_channel_moments": (_LONG, [_LONG] * 4 + [_POINTER] * 5),
    "reproml_convolution": (_LONG, [_POINTER] * 6 + [_LONG]),
    "reproml_transposed": (_LONG, [_POINTER] * 6 + [_LONG]),
    "reproml_weight_gradient": (_LONG, [_POINTER] * 5 + [_LONG]),
    "reproml_adam": (_LONG, [_LONG, _POINTER, _POINTER] + [_DOUBLE] * 10 + [_POINTER]),
    "reproml_fingerprint": (
        None,
        [_LONG] * 2 + [ctypes.c_char_p, _POINTER, ctypes.c_uint64, _POINTER],
    ),
    "reproml_sgd": (_LONG, [_LONG] + [_POINTER] * 3 + [_INT] * 2 + [_DOUBLE] * 5 + [_POINTER]),
}


def _load() -> Any:
    if os.environ.get("REPROML_KERNELS") == "off":
        return None
    spec = importlib.util.find_spec("reproml.arithmetic._kernels")
    if spec is None or spec.origin is None:
        return _without("were not built; install reproml again where there is a C compiler")
    try:
        loaded = ctypes.CDLL(spec.origin)
        if loaded.reproml_version() != _VERSION:
            return _without("are of another version; install reproml again")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):  # built for another machine, or not by us
        return _without("cannot be loaded here; install reproml again")
    return loaded


def _without(why: str) -> None:
    logging.getLogger(__name__).warning(
        "reproml: same bits, but slower: the compiled loops %s", why
    )


library = _load()


_ROOM = 256  # indices; where more are left, the plain path does it all


def unsettled(kernel: Any, *arguments: Any) -> Optional[Tensor]:
    """Call a kernel whose last two arguments are a list of failures and its room.

    Returns the flat indices that it could not settle, int64, NONE if it settled all; None where there are
    too many to tell.
    """
    failed = _Failed()
    count = kernel(*arguments, failed, _ROOM)
    if not count:
        return NONE
    return torch.tensor(failed[:count]) if 0 < count <= _ROOM else None


NONE = torch.empty(0, dtype=torch.int64)
_Failed = ctypes.c_int64 * _ROOM


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take these tensors: on the CPU, dense and contiguous."""
    for x in tensors:
        if not (x.is_cpu and x.is_contiguous()):
            return False
    return library is not None
