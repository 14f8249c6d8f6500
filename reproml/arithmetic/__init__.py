"""Exact arithmetic for PyTorch: every operator returns the correctly rounded result.

    import reproml

    with reproml.exact():
        loss = model(x).sum()      # the binary32 number nearest to the exact sum
        loss.backward()

The folder reads in this order: `rounding` (from a real number to binary32), `field` (real numbers
with an error bound, on which a definition is written), `ball` (a definition evaluated, tested and
settled), `elementary` (exp, log, ... in binary64 with a proven error), `dot` (sums and products of
matrices), `table` (one line for each operator), `mode` (looks each operator up), `dispatch` (how they come
to it). Over several workers: `partial` (sums exchanged unrounded), `sharded` (what a dealt batch means).

What makes it fast, for the same bits, stands beside it: `kernels` (the compiled loops of `c/`), and for
formulas `tape` (records one), `program` (makes it short), `compiled` (runs it). `assumptions` tests on
this very machine what all of it takes for granted. It knows nothing of recipes or data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reproml.errors import NotExactError as NotExactError
from reproml.versions import DEFINITIONS as DEFINITIONS

if TYPE_CHECKING:
    from reproml.arithmetic.context import exact as exact


def __getattr__(name: str) -> Any:
    if name == "exact":  # loads PyTorch, so not before it is asked for
        from reproml.arithmetic.context import exact

        return exact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
