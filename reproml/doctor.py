"""What this machine is, what was different where a run was made, and whether the arithmetic holds here.

Facts never decide: an exact run has the same bits whatever they are, and a native run differs for any
of them. What decides is the self-test (arithmetic/selftest.py).
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
    """One fact that is not what the run's machine recorded."""

    fact: str
    run: str
    here: str


def facts(described: dict[str, Any]) -> dict[str, str]:
    """Return the facts of `environment.describe()` or of a run.json, flat: "torch.threads": "2"."""
    flat = {"arithmetic.definitions": _text(described.get("definitions.version", _ABSENT))}
    for group in _GROUPS:
        members = described.get(group)
        for name, value in members.items() if isinstance(members, dict) else ():
            flat[f"{group}.{name}"] = _text(value)
    return flat


def here() -> dict[str, str]:
    """Return the facts of this machine and this process."""
    return facts({"definitions.version": DEFINITIONS, **environment.describe()})


def differences(folder: Path) -> list[Difference]:
    """Return what differs between the machine of a run folder and this one, in the facts' order.

    A variable that is not set has no fact; one that an older reproml did not record is "not recorded".
    Raises ReproError if the folder has no run.json.
    """
    theirs, ours = facts(read_record(folder)), here()
    return [
        Difference(fact, theirs.get(fact, _missing(fact)), ours.get(fact, _missing(fact)))
        for fact in dict.fromkeys([*ours, *theirs])
        if theirs.get(fact) != ours.get(fact)
    ]


def _missing(fact: str) -> str:
    return "not set" if fact.startswith("variables.") else _ABSENT


def _text(value: Any) -> str:
    """A string as it is, anything else as JSON writes it; a run.json keeps its numbers' own digits."""
    if isinstance(value, (str, Number)):
        return str(value)
    return json.dumps(value)
