"""Record how PyTorch writes operators, and gradients, in terms of operators of the table.

    python -m verification.decompositions            # compare with decompositions.json
    python -m verification.decompositions --write    # after a look at what changed

What PyTorch takes apart, unless the table's COMPOSITES write it, is rounded where its parts are. A version
that takes it apart differently changes results, so this record fails then. It holds, for the first samples
of each operator of op_db, the operators of the table that run, forward | backward.
"""

from __future__ import annotations

import json
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import reproml
from reproml.arithmetic import operator_table
from verification import op_db

FILE = Path(__file__).with_name("decompositions.json")
SAMPLES = 4  # of each operator

# Known differences between versions of PyTorch that change no result: 2.8 subtracts the correction from the
# number of observations by an operator, later versions as Python numbers; 2.15 adds up the gradient of
# `combinations` by another operator, its samples of rand_like call that and not randn_like, and it computes
# gradients of clamp, fmax and fmin that are replaced (arithmetic/dispatch/gradients.py), and take_along_dim
# by remainders of integers. 2.8 has no gradient of aminmax.
SAME_RESULT = frozenset(
    """
    cov corrcoef combinations rand_like clamp clamp_min clamp_max fmax fmin aminmax take_along_dim
    """.split()
)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op_db.name_of(func)
        if name in operator_table.EXACT:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def decompositions_of(op: Any) -> list[str]:
    """Return "forward | backward" of an operator's first samples, but for those that are refused."""
    found = set()
    for sample, backward in islice(op_db.samples(op), SAMPLES):
        recorder = _Recorder()
        tree = op_db.copy((sample.input, sample.args, sample.kwargs))
        try:
            with reproml.exact(), recorder:
                input, args, kwargs = tree
                result = op(input, *args, **kwargs)
                recorder.names.append("|")
                if sample.output_process_fn_grad:
                    result = sample.output_process_fn_grad(result)
                if backward:
                    op_db.gradients(result, tree, 1)
        except (reproml.NotExactError, RuntimeError, ValueError, TypeError, AssertionError):
            continue  # refused, or PyTorch itself cannot run it here
        found.add(" ".join(recorder.names).strip())
    return sorted(found - {"|"})


def record() -> dict[str, list[str]]:
    """Return the decompositions of all operators of op_db that have one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {op_db.title(op): decompositions_of(op) for op in op_db.operators()}
    return {name: found[name] for name in sorted(found) if found[name]}


def changes(found: dict[str, list[str]]) -> list[str]:
    """Describe what differs from the record. Operators that only one of the versions has do not count."""
    recorded = json.loads(FILE.read_text(encoding="utf-8"))
    return [
        f"{name}: {', '.join(found[name])}; recorded: {', '.join(recorded[name])}"
        for name in sorted(set(found) & set(recorded) - SAME_RESULT)
        if found[name] != recorded[name]
    ]


def main(arguments: list[str]) -> int:
    found = record()
    if arguments == ["--write"]:
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    different = changes(found)
    print(*different, sep="\n")
    print(f"{len(found)} operators, {len(different)} taken apart differently")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
