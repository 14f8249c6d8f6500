"""The golden files as a registry: what each is of, and which machines confirmed it.

A confirmation is the provenance.json of a run that gave the golden weights, in golden/confirmations/NAME/.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from reproml.errors import ReproError
from reproml.evidence.provenance import DATA, Provenance, read_provenance
from reproml.evidence.reproduced import compare_statements
from reproml.pipeline import golden
from reproml.pipeline.data import SHAPES
from reproml.pipeline.models import build_model
from reproml.pipeline.recipe import Recipe, load_recipe, recipe_names, stated_recipe
from reproml.pipeline.run import WEIGHTS

CONFIRMATIONS = "confirmations"
_SCRIPTS = "gallery.json"  # the digests of gallery/, which `invoke gallery` checks


@dataclass(frozen=True)
class Entry:
    """One golden file of the registry."""

    name: str
    task: str  # the data set
    parameters: Optional[int]  # None: there is no recipe of that name to count them by
    accuracy: str  # on the test set
    sha256: str  # of the weights
    definitions: int
    confirmed: list[str]  # an environment each
    defects: list[str]  # what contradicts the golden file


def entries() -> list[Entry]:
    """Return the golden files of the folder golden/ here, else those installed with reproml."""
    folder = golden.registry_folder()
    paths = sorted(path for path in folder.glob("*.json") if path.name != _SCRIPTS)
    return [_entry(path) for path in paths]


def _entry(path: Path) -> Entry:
    items = {name: str(value) for name, value in golden.read_golden(path).items()}
    name = path.stem
    try:
        sha256, recipe_sha256 = items[f"{WEIGHTS}.sha256"], items["recipe.canonical_json.sha256"]
        accuracy = f"{100 * int(items['test.correct']) / int(items['test.total']):.2f} %"
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ReproError(f"{path} is not a complete golden file: {error}") from None
    defects: list[str] = []
    confirmed: list[Provenance] = []
    if items.get("recipe.name") != name:
        defects.append(f"{path} is of the recipe {items.get('recipe.name')}")
    recipe = _recipe(name)
    if recipe and recipe.sha256 != recipe_sha256:
        defects.append(f"{path} is of another recipe than the one named {name}")
    for statement in sorted((path.parent / CONFIRMATIONS / name).glob("*.json")):
        try:
            confirmation = read_provenance(statement)
            defect = _defect(confirmation, items)
            if confirmed and not defect:
                defect = compare_statements([*confirmed, confirmation]).difference
        except ReproError as error:
            defect = str(error)
        if defect:
            defects.append(defect)
        else:
            confirmed.append(confirmation)
    return Entry(
        name,
        recipe.data.name if recipe else "",
        _parameters(recipe) if recipe else None,
        accuracy,
        sha256,
        int(items["definitions.version"]),
        [_environment(p) for p in confirmed],
        defects,
    )


def _recipe(name: str) -> Optional[Recipe]:
    """Return the recipe that is installed with reproml or in the folder here, None if there is none."""
    if name in recipe_names():
        return load_recipe(name)
    return load_recipe(f"{name}.toml") if Path(f"{name}.toml").is_file() else None


def _parameters(recipe: Recipe) -> int:
    with torch.device("meta"):  # nothing is computed
        model = build_model(recipe, *SHAPES[recipe.data.name])
    return sum(p.numel() for p in model.parameters())


def _defect(confirmation: Provenance, items: dict[str, str]) -> Optional[str]:
    """Return what contradicts the golden file's items, None if the provenance confirms it."""
    data = {
        f"data.{d.name}.sha256": d.digest["sha256"]
        for d in confirmation.definition.resolved_dependencies
        if d.annotations["kind"] == DATA
    }
    found = confirmation.subjects[0].digest.get("sha256")
    expected = items[f"{WEIGHTS}.sha256"]
    for wrong, defect in (
        (confirmation.definitions is None, "is of native numerics"),
        (
            str(confirmation.definitions) != items["definitions.version"],
            f"was made with version {confirmation.definitions} of the definitions",
        ),
        (
            stated_recipe(confirmation).sha256 != items["recipe.canonical_json.sha256"],
            "is of another recipe",
        ),
        (data != {k: v for k, v in items.items() if k.startswith("data.")}, "is of other data"),
        (found != expected, f"states other weights: {found}"),
    ):
        if wrong:
            return f"{confirmation.path} {defect}"
    return None


def _environment(confirmation: Provenance) -> str:
    versions: dict[str, Any] = confirmation.details.builder.version
    internal = confirmation.definition.internal_parameters
    python = ".".join(str(versions.get("python", "?")).split(".")[:2])
    machine = f"{internal.get('architecture', '?')}, {internal.get('device', '?')}"
    return (
        f"Python {python}, PyTorch {versions.get('torch', '?')}, {machine}: {confirmation.builder}"
    )


def lines(entry: Entry) -> list[str]:
    """Return an entry as lines of text."""
    count = "unknown" if entry.parameters is None else f"{entry.parameters:,}"
    return [
        f"{entry.name:<16} {entry.task or 'unknown':<8} {count:>12}  {entry.accuracy:>8}  "
        f"{entry.definitions:>11}  {entry.sha256}",
        *(f"    confirmed: {environment}" for environment in entry.confirmed),
        *(f"    WRONG: {defect}" for defect in entry.defects),
    ]


HEADING = (
    f"{'name':<16} {'task':<8} {'parameters':>12}  {'accuracy':>8}  {'definitions':>11}  "
    "SHA-256 of the weights"
)
