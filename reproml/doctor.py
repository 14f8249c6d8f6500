"""The facts that describe this machine, and how they differ from those that a run recorded.

Facts decide nothing: an exact run has the same bits on every machine, and any of them may change a native
run. Whether exact arithmetic can be trusted on a machine is decided by the self-test
(arithmetic/selftest.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproml import environment
from reproml.pipeline.run import Number, read_record
from reproml.versions import DEFINITIONS

_GROUPS = ("arithmetic", "versions", "machine", "torch", "variables")
_ABSENT = "not recorded"


@dataclass(frozen=True)
class Difference:
    """A fact that differs between a run's machine and this one."""

    fact: str
    run: str
    here: str


def facts(described: dict[str, Any]) -> dict[str, str]:
    """Return the facts of `environment.describe()` or of a run.json, flattened to "torch.threads": "2"."""
    flat = {"arithmetic.definitions": _as_text(described.get("definitions.version", _ABSENT))}
    for group in _GROUPS:
        members = described.get(group)
        for name, value in members.items() if isinstance(members, dict) else ():
            flat[f"{group}.{name}"] = _as_text(value)
    return flat


def here() -> dict[str, str]:
    """Return the facts of this machine and this process."""
    return facts({"definitions.version": DEFINITIONS, **environment.describe()})


def differences(folder: Path) -> list[Difference]:
    """Return the facts that differ between the machine of a run folder and this one, in order.

    An environment variable that is missing on one side is "not set" there, any other fact "not recorded".
    Raises ReproError if the folder has no run.json.
    """
    recorded, current = facts(read_record(folder)), here()
    return [
        Difference(fact, recorded.get(fact, _missing(fact)), current.get(fact, _missing(fact)))
        for fact in dict.fromkeys([*current, *recorded])
        if recorded.get(fact) != current.get(fact)
    ]


def _missing(fact: str) -> str:
    return "not set" if fact.startswith("variables.") else _ABSENT


def _as_text(value: Any) -> str:
    """Return strings unchanged, and other values as JSON; numbers of a run.json keep their digits."""
    if isinstance(value, (str, Number)):
        return str(value)
    return json.dumps(value)
