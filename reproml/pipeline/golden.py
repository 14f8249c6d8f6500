"""Read, write and compare golden files: the items that a recipe must produce on any machine.

`golden/<recipe>.json` has one item per line, sorted, under the names of a run's metrics.json. So the
`diff` of two files shows the same items as `compare_items`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproml.errors import ReproError
from reproml.files import write_atomically
from reproml.pipeline.run import METRICS, Items, Number, items_json, read_items
from reproml.versions import DEFINITIONS

_ROOT = Path(__file__).parents[2]  # of a checkout, which has golden/; setup.py copies it for others
_IS_CHECKOUT = (_ROOT / "setup.py").is_file() and (_ROOT / "golden").is_dir()
_INSTALLED = _ROOT / "golden" if _IS_CHECKOUT else Path(__file__).parent / "golden_files"
_MISSING = Number("missing")  # differs from every value that an item can have


@dataclass(frozen=True)
class Comparison:
    """One item: its value in the golden file, and the value that was found."""

    item: str
    expected: str
    found: str

    @property
    def match(self) -> bool:
        return self.expected == self.found


def find_golden(recipe_name: str) -> Path:
    """Return the golden file in the working directory, otherwise the one installed with reproml."""
    candidates = [golden_path(recipe_name), _INSTALLED / f"{recipe_name}.json"]
    for path in candidates:
        if path.is_file():
            return path
    raise ReproError(
        f"{recipe_name} has no golden file {candidates[0]}; write one with: "
        "python -m reproml golden, and the same --recipe"
    )


def registry_folder() -> Path:
    """Return the folder golden/ in the working directory, otherwise the one installed with reproml."""
    here = Path("golden")
    return here if here.is_dir() else _INSTALLED


def differs_from_installed(path: Path) -> bool:
    """Return whether reproml has a golden file of the same name, with other content."""
    installed = _INSTALLED / path.name
    return installed.is_file() and read_items(installed) != read_items(path)


def golden_path(recipe_name: str) -> Path:
    """Return the path at which the golden file of a recipe is written."""
    return Path("golden") / f"{recipe_name}.json"


def read_golden(path: Path) -> Items:
    """Return the items of a golden file. Raises ReproError if it is for another version of definitions."""
    items = read_items(path)
    version = items.get("definitions.version")
    if "definitions.version" not in items:
        raise ReproError(f"{path} is not a golden file: it has no definitions.version")
    if not isinstance(version, Number) or not version.isdecimal():
        raise ReproError(
            f"{path}: definitions.version must be an integer, not {_as_texts(version, None)[0]}"
        )
    if version == str(DEFINITIONS):
        return items
    newer = len(version) > 9 or int(version) > DEFINITIONS
    older = "check it with a reproml that has that version, or make it again (docs/definitions.md)"
    remedy = "update reproml" if newer else older
    raise ReproError(
        f"{path} was made with version {version[:20]} of the definitions (definitions.version), "
        f"this reproml has version {DEFINITIONS}; {remedy}"
    )


def compare_items(expected: Items, found: Items) -> list[Comparison]:
    """Compare all items of both sides, in the order of `found`, which is that of the pipeline."""
    names = list(dict.fromkeys([*found, *sorted(expected)]))
    return [
        Comparison(name, *_as_texts(expected.get(name, _MISSING), found.get(name, _MISSING)))
        for name in names
    ]


def compare_run(expected: Items, found: Items, recorded: Items, folder: Path) -> list[Comparison]:
    """Compare a run on disk, as `run.recompute` returns it (found, recorded), with `expected`.

    If the run's metrics.json records a value that is neither the recomputed nor the expected one, that
    is one more difference.
    """
    contradicted = {c.item for c in compare_items(found, recorded) if not c.match}
    wrong_records = [
        Comparison(f"{c.item} in {folder / METRICS}", c.expected, c.found)
        for c in compare_items(expected, recorded)
        if c.item in contradicted and not c.match
    ]
    return compare_items(expected, found) + wrong_records


def write_golden(items: Items, path: Path, force: bool) -> None:
    """Write a golden file atomically. Only `force` replaces an existing one."""
    refuse_overwrite(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, items_json(items).encode())
    except OSError as error:
        raise ReproError(f"cannot write the golden file {path}: {error.strerror}") from None


def refuse_overwrite(path: Path, force: bool) -> None:
    """Raise ReproError if the golden file exists and may not be replaced."""
    if os.path.lexists(path) and not force:
        raise ReproError(f"{path} already exists; --force replaces it")


def _as_texts(expected: Any, found: Any) -> tuple[str, str]:
    """Return both values as text, numbers with the digits of the file.

    Two strings are without quotes. A string compared with a number keeps its quotes, and so differs.
    """
    if not (_is_string(expected) and _is_string(found)):
        expected, found = (v if isinstance(v, Number) else json.dumps(v) for v in (expected, found))
    return str(expected), str(found)


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Number)
