"""Golden files: what a recipe must come to, on any machine. `golden/<recipe>.json`.

An item a line, sorted, under the names of a run's metrics.json: `diff` shows the same as `compare`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproml.errors import ReproError
from reproml.files import write_whole
from reproml.pipeline.run import METRICS, Items, Number, items_json, read_items
from reproml.versions import DEFINITIONS

_INSTALLED = Path(__file__).parent / "golden_files"
_MISSING = Number("missing")  # unlike any value of an item


@dataclass(frozen=True)
class Comparison:
    """One item of a golden file against what was found."""

    item: str
    expected: str
    found: str

    @property
    def match(self) -> bool:
        return self.expected == self.found


def find(recipe_name: str) -> Path:
    """Return the golden file: the working directory's, else the one that came with reproml."""
    candidates = [place(recipe_name), _INSTALLED / f"{recipe_name}.json"]
    for path in candidates:
        if path.is_file():
            return path
    raise ReproError(
        f"{recipe_name} has no golden file {candidates[0]}; write one with: "
        f"python -m reproml golden --recipe {recipe_name}"
    )


def place(recipe_name: str) -> Path:
    """Return where the golden file of a recipe is written."""
    return Path("golden") / f"{recipe_name}.json"


def read(path: Path) -> Items:
    """Return the items of a golden file made with the definitions that are in force here."""
    items = read_items(path)
    version = items.get("definitions.version")
    if "definitions.version" not in items:
        raise ReproError(f"{path} is not a golden file: it has no definitions.version")
    if not isinstance(version, Number) or not version.isdecimal():
        raise ReproError(
            f"{path}: definitions.version must be a whole number, not {_texts(version, None)[0]}"
        )
    if version == str(DEFINITIONS):
        return items
    remedy = "update reproml" if int(version) > DEFINITIONS else "write it anew with --force"
    raise ReproError(
        f"{path} was made with version {version} of the definitions (definitions.version), "
        f"this reproml has version {DEFINITIONS}; {remedy}"
    )


def compare(expected: Items, found: Items) -> list[Comparison]:
    """Compare every item of either side, in the order of `found`, which is the pipeline's."""
    names = list(dict.fromkeys([*found, *sorted(expected)]))
    return [
        Comparison(name, *_texts(expected.get(name, _MISSING), found.get(name, _MISSING)))
        for name in names
    ]


def compare_run(expected: Items, found: Items, recorded: Items, folder: Path) -> list[Comparison]:
    """Compare a run on disk with `expected`: what `run.recompute` returns, (found, recorded).

    Where the run's metrics.json has another value than was found anew, and not the expected one, that
    is one more that differs.
    """
    lies = {c.item for c in compare(found, recorded) if not c.match}
    claims = [
        Comparison(f"{c.item} in {folder / METRICS}", c.expected, c.found)
        for c in compare(expected, recorded)
        if c.item in lies and not c.match
    ]
    return compare(expected, found) + claims


def save(items: Items, path: Path, force: bool) -> None:
    """Write a golden file, whole or not at all. Only `force` replaces one."""
    refuse_overwrite(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, items_json(items).encode())
    except OSError as error:
        raise ReproError(f"cannot write the golden file {path}: {error.strerror}") from None


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise ReproError if the golden file is there and may not be replaced."""
    if os.path.lexists(path) and not force:
        raise ReproError(f"{path} is there already; --force replaces it")


def _texts(expected: Any, found: Any) -> tuple[str, str]:
    """Return the values as JSON writes them: the same digits, the same number.

    Two strings go without their quotes; a string against a number has them, and so differs.
    """
    if not (_is_string(expected) and _is_string(found)):
        expected, found = (v if isinstance(v, Number) else json.dumps(v) for v in (expected, found))
    return str(expected), str(found)


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Number)
