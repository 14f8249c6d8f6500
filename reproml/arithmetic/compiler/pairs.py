"""Formulas over rows in pairs of binary64 numbers (csrc/pairs.c), for rows that failed the rounding test.

A pair has about 100 bits and a bound that is 0 where nothing was rounded. So it rounds what the first test
leaves in masses: equal numbers, whole numbers, gradients that cancel. What remains takes the next path.
"""

from __future__ import annotations

import ctypes
from typing import Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import executor, kernels
from reproml.arithmetic.numerics.balls import Formula

# In the order of csrc/pairs.c.
_KINDS = (
    "running_sums variance deviation softmax_backward log_softmax_backward softmax log_softmax logsumexp"
).split()
_ONE_FOR_EACH_ROW = ("variance", "deviation", "logsumexp")


def rows_by_pairs(
    kind: str, otherwise: Callable[..., Tensor], *operands: Tensor, divisor: float = 1
) -> Tensor:
    """Compute a formula on rows [..., n], float32.

    otherwise: the next path, which takes the rows with a result that fails the test as well, or all of them
    where the compiled loops cannot take them.
    """
    x, y = operands[0], operands[-1]
    n = x.shape[-1]
    taken = x.numel() and kernels.usable(*operands)
    if not taken or any(t.dtype is not torch.float32 for t in operands):
        return otherwise(*operands)
    length = 1 if kind in _ONE_FOR_EACH_ROW else n
    out = x.new_empty(*x.shape[:-1], length)
    failed = torch.empty(out.shape, dtype=torch.bool, device="cpu")
    if kernels.loops().reproml_rows(
        _KINDS.index(kind),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // n,
        n,
        divisor,
        out.data_ptr(),
        failed.data_ptr(),
    ):
        rows = failed.any(-1)
        out[rows] = otherwise(*[t[rows] for t in operands])
    return out


def sum_by_pairs(formula: Formula, divisor: int, *operands: Tensor) -> Optional[Tensor]:
    """Return the sum of an elementwise formula, divided and rounded once: float32 [].

    The operands have one shape. Returns None if a number is infinite or NaN, if the test fails, or without
    a program.
    """
    dtypes = [x.dtype for x in operands]
    if not kernels.usable(*operands) or not set(dtypes) <= {torch.float32, torch.float64}:
        return None
    program = executor.pair_program(formula, dtypes)
    if program is None:
        return None
    out = operands[0].new_empty((), dtype=torch.float32)
    pointers = (ctypes.c_void_p * len(operands))(*[x.data_ptr() for x in operands])
    passed = kernels.loops().reproml_pair_sum(
        program.address, operands[0].numel(), pointers, divisor, out.data_ptr()
    )
    return out if passed else None
