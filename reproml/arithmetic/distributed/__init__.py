"""Training with several workers whose results equal those of a single process, bit for bit.

A `Sharded` tensor (sharded.py) represents the global batch and has its shape. Each worker holds every
N-th row of it, N being the number of workers. Each operator is looked up by its name in a table
(rules/table.py):

- An operator that computes each row from that row alone runs on the rows that the worker holds.
- A sum over the batch is exchanged without rounding and rounded once (partial_sums.py). The sums of a
  backward pass are exchanged together at its end (pending.py).
- Every other operator gathers the batch and computes the result on every worker.

An operator that writes to single rows of a Sharded tensor, or returns a view of them, is refused.
"""

from reproml.arithmetic.distributed.rules import table as _table  # noqa: F401  (fills the tables)
