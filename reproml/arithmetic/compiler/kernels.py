"""Load and call the compiled loops of csrc/.

`library` is None if they were not built: every result keeps its bits and only takes longer. The loops
are a shared library loaded with ctypes, which depends on no binary interface of PyTorch or Python. The same
loops, built to round to bfloat16 and float16, are two more libraries; `loops()` chooses by the target.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import sys
import threading
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from reproml.arithmetic.numerics import formats

_LONG, _DOUBLE, _POINTER, _INT = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_int

_VERSION = 21  # REPROML_VERSION of csrc/parallel.c; raise both with any change of the interface

_BINARY32 = "_kernels"  # name of the library that rounds to binary32

# Function name -> (result type, argument types), as in csrc/*.c.
_SIGNATURES = {
    "reproml_limit_vectors": (None, [_INT]),
    "reproml_product": (
        _LONG,
        [_POINTER] + [_LONG] * 4 + ([_POINTER] + [_LONG] * 3) * 2 + [_POINTER] * 4 + [_LONG],
    ),
    "reproml_program": (_LONG, [_POINTER, _LONG] + [_POINTER] * 4 + [_LONG, _INT]),
    "reproml_fast": (_LONG, [_INT, _POINTER, _LONG] + [_POINTER] * 4 + [_LONG]),
    "reproml_pair_sum": (_INT, [_POINTER, _LONG, _POINTER, _DOUBLE, _POINTER]),
    "reproml_pair_arrays": (None, [_POINTER, _LONG] + [_POINTER] * 3),
    "reproml_pair_sums": (None, [_LONG] * 2 + [_POINTER] * 4),
    "reproml_binary64_sums": (None, [_LONG] * 2 + [_POINTER] * 2 + [_INT, _POINTER]),
    "reproml_binary64_products": (None, [_LONG] * 4 + [_POINTER] * 3),
    "reproml_direct": (None, [_INT, _LONG, _POINTER, _POINTER, _DOUBLE, _POINTER, _LONG]),
    "reproml_recurrence": (None, [_LONG] * 2 + [_POINTER] * 3),
    "reproml_nll": (_INT, [_POINTER] * 3 + [_LONG] * 3 + [_INT, _POINTER, _POINTER]),
    "reproml_nll_backward": (
        _INT,
        [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, ctypes.c_float, _POINTER],
    ),
    "reproml_row_products": (
        _LONG,
        [_LONG] * 3 + [_POINTER, _INT] + [_POINTER] * 2 + [_LONG],
    ),
    "reproml_solve": (None, [_INT] + [_LONG] * 3 + [_POINTER, _INT] + [_POINTER] * 5),
    "reproml_decide": (None, [_LONG] * 3 + [_POINTER] * 7),
    "reproml_factorize": (None, [_INT] * 2 + [_LONG] * 3 + [_POINTER] * 5),
    "reproml_segment_products": (_LONG, [_LONG] * 2 + [_POINTER] * 4 + [_LONG]),
    "reproml_scatter": (_LONG, [_LONG] * 4 + [_POINTER] * 3 + [_LONG, _INT, _POINTER]),
    "reproml_sum": (_LONG, [_POINTER] * 3 + [_INT, _LONG, _DOUBLE, _POINTER]),
    "reproml_squared_distance": (_LONG, [_POINTER] * 2 + [_LONG, _DOUBLE, _POINTER]),
    "reproml_loss": (_INT, [_INT] + [_POINTER] * 2 + [_LONG] + [_DOUBLE] * 2 + [_POINTER]),
    "reproml_rows": (_LONG, [_INT] + [_POINTER] * 2 + [_LONG] * 2 + [_DOUBLE] + [_POINTER] * 2),
    "reproml_logcumsumexp": (_LONG, [_LONG] * 2 + [_POINTER] * 3 + [_LONG]),
    "reproml_normalize": (
        _LONG,
        [_POINTER] * 4 + [_DOUBLE] + [_POINTER] * 3 + [_DOUBLE] + [_POINTER] * 4 + [_LONG],
    ),
    "reproml_normalize_backward": (_LONG, [_POINTER] * 12 + [_LONG]),
    "reproml_column_moments": (_LONG, [_LONG] * 2 + [_POINTER] * 6),
    "reproml_adaptive_pool_backward": (_LONG, [_LONG] * 5 + [_POINTER] * 3 + [_LONG]),
    "reproml_grid_sampling": (_LONG, [_INT] + [_LONG] * 2 + [_POINTER] * 7),
    "reproml_weighted_sums": (_LONG, [_LONG] + [_POINTER] * 3 + [_DOUBLE, _LONG] + [_POINTER] * 3),
    "reproml_distances": (_LONG, [_LONG] * 4 + [_INT] + [_POINTER] * 4),
    "reproml_distances_backward": (_LONG, [_LONG] * 4 + [_POINTER] * 6),
    "reproml_channel_moments": (_LONG, [_LONG] * 4 + [_POINTER] * 5),
    "reproml_convolution": (_LONG, [_POINTER] * 6 + [_LONG]),
    "reproml_transposed": (_LONG, [_POINTER] * 6 + [_LONG]),
    "reproml_weight_gradient": (_LONG, [_POINTER] * 5 + [_LONG]),
    "reproml_adam": (_LONG, [_LONG, _POINTER, _POINTER] + [_DOUBLE] * 10 + [_POINTER]),
    "reproml_optimizer_step": (
        _LONG,
        [_INT, _LONG] + [_POINTER] * 2 + [_DOUBLE] * 2 + [_POINTER] * 2,
    ),
    "reproml_partial_product": (_INT, [_LONG] * 3 + [_POINTER] * 9),
    "reproml_partial_pairs": (None, [_LONG] * 2 + [_POINTER] * 7),
    "reproml_add_products": (_LONG, [_LONG] * 3 + [_POINTER] * 9),
    "reproml_pack_sums": (None, [_LONG] * 2 + [_POINTER] * 3),
    "reproml_round_sums": (
        _LONG,
        [_POINTER] + [_LONG] * 4 + [_DOUBLE] * 2 + [_POINTER] * 3,
    ),
    "reproml_fingerprint": (
        None,
        [_LONG] * 2 + [ctypes.c_char_p, _POINTER, ctypes.c_uint64, _POINTER],
    ),
    "reproml_gamma_approximations": (None, [_LONG] + [_POINTER] * 2),
    "reproml_gamma_decisions": (
        _INT,
        [_LONG] + [_POINTER] * 3 + [_LONG, _POINTER, _DOUBLE] + [_POINTER] * 3,
    ),
    "reproml_cell": (_INT, [_INT] + [_LONG] * 2 + [_POINTER]),
    "reproml_cell_backward": (_INT, [_INT] + [_LONG] * 2 + [_POINTER]),
    "reproml_layer": (_LONG, [_INT] + [_LONG] * 4 + [_POINTER]),
    "reproml_layer_backward": (_LONG, [_INT] + [_LONG] * 4 + [_INT] * 2 + [_POINTER]),
    "reproml_weight_norm": (_LONG, [_LONG] * 2 + [_POINTER] * 4),
    "reproml_weight_norm_backward": (_LONG, [_LONG] * 2 + [_POINTER] * 7),
    "reproml_sgd": (_LONG, [_LONG] + [_POINTER] * 3 + [_INT] * 2 + [_DOUBLE] * 5 + [_POINTER]),
}


# Functions that only the library for binary32 has: setup.py leaves their files out of the others.
_BINARY32_ONLY = frozenset(
    """
reproml_add_products reproml_cell reproml_cell_backward reproml_channel_moments
reproml_column_moments reproml_decide reproml_factorize reproml_fingerprint
reproml_gamma_approximations reproml_gamma_decisions reproml_layer reproml_layer_backward
reproml_normalize reproml_normalize_backward reproml_optimizer_step reproml_pack_sums
reproml_partial_pairs reproml_partial_product reproml_round_sums reproml_solve
""".split()
)


def _load_library(name: str) -> Any:
    if os.environ.get("REPROML_KERNELS") == "off":
        return None
    spec = importlib.util.find_spec(f"reproml.arithmetic.{name}")
    if spec is None or spec.origin is None:
        if sys.platform == "win32":
            return _warn("are not built for Windows")
        return _warn("were not built; install reproml again where there is a C compiler")
    try:
        loaded = ctypes.CDLL(spec.origin)
        if loaded.reproml_version() != _VERSION:
            return _warn("are of another version; install reproml again")
        for function_name, (result, arguments) in _SIGNATURES.items():
            if name == _BINARY32 or function_name not in _BINARY32_ONLY:
                function = getattr(loaded, function_name)
                function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):  # built for another machine, or another library of this name
        return _warn("cannot be loaded here; install reproml again")
    return loaded


def _warn(problem: str) -> None:
    logging.getLogger(__name__).warning(
        "reproml: same bits, but slower: the compiled loops %s", problem
    )


library = _load_library(_BINARY32)
_narrow = {  # rounds to the other formats, by their precision; loaded when first used
    formats.BFLOAT16.precision: "_kernels_bfloat16",
    formats.FLOAT16.precision: "_kernels_float16",
}
_loaded: dict[int, Any] = {}


def loops() -> Any:
    """Return the library whose loops round to the target format; None if there is none."""
    precision = formats.target().precision
    if precision == 24 or library is None:
        return library
    if precision not in _loaded:
        name = _narrow.get(precision)
        _loaded[precision] = _load_library(name) if name else None
    return _loaded[precision]


def binary32_loops() -> Any:
    """Return the library if it is the target format's; some loops are built for binary32 alone."""
    return library if formats.target() is formats.BINARY32 else None


class KernelResult(NamedTuple):
    """What a kernel did with its output."""

    complete: bool  # False: the output is undefined, take the reference path for all elements
    failed: Optional[Tensor]  # flat indices where the rounding test failed, int64; None: nowhere


_CAPACITY = 256  # failures; with more of them the reference path calculates all elements
_FailureList = ctypes.c_int64 * _CAPACITY
_local = threading.local()  # has a list for each thread, as making one takes as long as a call
_ROUNDED = KernelResult(True, None)
_INCOMPLETE = KernelResult(False, None)


def run_kernel(kernel: Any, *arguments: Any) -> KernelResult:
    """Call a kernel whose last two arguments are its list of failures and the list's capacity."""
    try:
        failed = _local.failed
    except AttributeError:
        failed = _local.failed = _FailureList()
    count = kernel(*arguments, failed, _CAPACITY)
    if not count:
        return _ROUNDED
    if 0 < count <= _CAPACITY:
        return KernelResult(True, torch.tensor(failed[:count]))
    return _INCOMPLETE


def usable(*tensors: Tensor) -> bool:
    """Return whether the kernels accept these tensors: on the CPU, dense and contiguous."""
    for x in tensors:
        if not (x.is_cpu and x.is_contiguous()):
            return False
    return loops() is not None
