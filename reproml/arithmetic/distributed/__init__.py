"""A batch whose rows are dealt to several workers, in programs that look like those of one process.

A `Sharded` tensor stands for the whole batch and has its shape; each worker holds every size-th row of it
(tensor.py). Each operator is looked up by its name (table.py). What computes a row from a row runs on the
worker's own rows; a sum over the batch is exchanged unrounded and rounded once, the gradients of a backward
pass together at its end (exchange.py, ../partial.py); any other function is computed by every worker from
the gathered batch. All results are those of one process with the whole batch. What writes or looks into a
Sharded tensor by other ways is refused.
"""
