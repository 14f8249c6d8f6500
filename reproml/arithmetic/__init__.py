"""Exact arithmetic for PyTorch: every operator returns the correctly rounded result.

    import reproml

    with reproml.exact():
        loss = model(x).sum()      # the binary32 number nearest to the exact sum
        loss.backward()

To read the code, start with what computes one operator:

1. `numerics`: from real numbers to binary32. `rounding` (the rounding test), `balls` (real numbers with an
   error bound, on which a formula is written), `elementary` (exp, log, ... in binary64 with a proven
   bound), `exact_sums` (sums that fail the test).
2. `compiler`: from a formula to its values. `evaluate` (the paths of an evaluation, and which element takes
   which), then what makes it fast: `tape` (records a formula), `assembler` (makes a program of it),
   `executor` (runs the program), `kernels` (loads the C library that is built from `csrc`).
3. `operators`: one file per family of operators, each with its definitions.
4. `operator_table`: one line for each operator of PyTorch. `handlers`: what happens to an operator: it is
   defined, moves data, is decomposed, or is refused.
5. `dispatch`: how an operator of PyTorch reaches its handler. `deferred`: rounding tests on a GPU, which
   are read later. `context`: the class `exact`, which turns all of it on. `patches`: what it replaces in
   PyTorch meanwhile.
6. `distributed`: sharded tensors, and sums that workers exchange before they are rounded.

`selftest` checks on the machine itself what all of this assumes of it. Nothing here knows recipes or data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reproml.errors import NotExactError as NotExactError
from reproml.versions import DEFINITIONS as DEFINITIONS

if TYPE_CHECKING:
    from reproml.arithmetic.context import exact as exact


def __getattr__(name: str) -> Any:
    if name == "exact":  # imports PyTorch, so only on first use
        from reproml.arithmetic.context import exact

        return exact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
