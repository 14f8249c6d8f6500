"""Export a run folder for other tools: an RO-Crate, a Hugging Face model card, a run of MLflow.

A crate and a card are folders that hold the run folder unchanged in `run/`, so that its hashes and its
signature hold there. The same run gives the same crate and the same card.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Optional

from reproml.digest import file_sha256
from reproml.errors import ReproError
from reproml.evidence.provenance import PROVENANCE
from reproml.files import files_below, partial_path
from reproml.pipeline import golden
from reproml.pipeline.recipe import Recipe, recipe_toml, recipe_values
from reproml.pipeline.run import (
    LOG,
    METRICS,
    RUN,
    SIGNATURE,
    TRACE,
    WEIGHTS,
    Items,
    read_undamaged,
    recorded_recipe,
)

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
SHA256 = {
    "sha256": "https://w3id.org/ro/terms/workflow-run#sha256"
}  # a term for the crate's context
DESCRIPTIONS = {
    WEIGHTS: "the trained weights",
    METRICS: "the results: hashes, losses and counts of correct predictions",
    RUN: "what was run: recipe, hashes of the data, versions, machine, times",
    LOG: "what the training printed",
    TRACE: "a record of each step of the training",
    PROVENANCE: "a statement of who trained the weights, from what, and where",
    SIGNATURE: "the signature of all other files",
}
RESULTS = {WEIGHTS, METRICS, RUN, LOG, TRACE, PROVENANCE}
MEDIA_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".sig": "application/vnd.dev.sigstore.bundle.v0.3+json",
    ".toml": "application/toml",
    ".txt": "text/plain",
}


@dataclass(frozen=True)
class Source:
    """The run folder that is exported, undamaged."""

    folder: Path
    recipe: Recipe
    record: dict[str, Any]
    items: Items

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of weights.safetensors, which is also that of the file."""
        return str(self.items["weights.safetensors.sha256"])

    @property
    def accuracies(self) -> dict[str, float]:
        """Fraction of correct predictions, for the training set and the test set."""
        numbers = self._numbers(r"(train|test)\.(?:correct|total)")
        try:
            return {
                split: numbers[split][0] / numbers[split][1]  # sorted: correct, total
                for split in ("train", "test")
            }
        except (KeyError, IndexError, ZeroDivisionError):
            raise ReproError(
                f"{self.folder / METRICS} lacks counts of correct predictions"
            ) from None

    @property
    def losses(self) -> dict[int, float]:
        """The loss of each epoch."""
        return {int(epoch): loss for epoch, (loss,) in self._numbers(r"epoch\.(\d+)\.loss").items()}

    def _numbers(self, pattern: str) -> dict[str, list[float]]:
        """Return the values of the items that match, by the pattern's group."""
        numbers: dict[str, list[float]] = {}
        for item, value in sorted(self.items.items()):
            if match := re.fullmatch(pattern, item):
                try:
                    numbers.setdefault(match[1], []).append(
                        float("nan" if value is None else value)
                    )
                except ValueError:
                    raise ReproError(f"{self.folder / METRICS}: {item} is not a number") from None
        return numbers

    @property
    def numerics(self) -> str:
        """Either exact or native."""
        return str(self.record.get("numerics"))

    @property
    def definitions(self) -> str:
        """Version of the definitions, or a note that the run was native."""
        return str(self.items.get("definitions.version"))

    def time(self, name: str) -> datetime:
        """Return when the training `started` or `finished`."""
        try:
            return datetime.fromisoformat(self.record["times"][name])
        except (KeyError, TypeError, ValueError):
            raise ReproError(f"{self.folder / RUN} does not record when the run {name}") from None


def read_source(folder: Path) -> Source:
    """Read a run folder. Raises ReproError if it is incomplete, damaged or contradicts itself."""
    record, items = read_undamaged(folder)
    recipe = recorded_recipe(folder)
    files_below(folder)  # which refuses links out of the folder
    stated = {name: sha256 for name, sha256 in items.items() if name.startswith("data.")}
    data: Any = record.get("data.sha256")
    data = data if isinstance(data, dict) else {}
    version = str(items.get("definitions.version"))
    exact = version if version.isdecimal() else None
    for what, same in {
        "another recipe": items.get("recipe.canonical_json.sha256") == recipe.sha256,
        "other data": stated == {f"data.{name}.sha256": d for name, d in data.items()},
        "other numerics": (record.get("numerics") == "exact") == (exact is not None),
        "other definitions": exact in (None, record.get("definitions.version")),
    }.items():
        if not same:
            raise ReproError(f"{folder / RUN} records {what} than {METRICS}; train again")
    return Source(folder.resolve(), recipe, record, items)


# --- RO-Crate --------------------------------------------------------------------------------------


def export_crate(folder: Path, out: Optional[Path]) -> str:
    """Write a Process Run Crate 0.5: an RO-Crate that describes one run of a program and its files."""
    from rocrate.model import ContextEntity, SoftwareApplication
    from rocrate.rocrate import ROCrate

    source = read_source(folder)
    started, finished = source.time("started"), source.time("finished")
    name = source.recipe.name
    with _new_folder(source, out, "ro-crate") as target:
        crate = ROCrate(version="1.1")  # on which the profile is based
        crate.metadata.extra_terms.update(SHA256)
        crate.name = f"Training of {name}"
        crate.description = (
            f"A training of the recipe {name} by reproml, {source.numerics} numerics"
        )
        crate.license = "not stated"
        crate.datePublished = finished
        profile = {"@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
        crate.root_dataset["conformsTo"] = crate.add(
            ContextEntity(crate, PROFILE, properties=profile)
        )

        def add(path: Path, **properties: str) -> Any:
            properties.update(name=path.name, sha256=file_sha256(path))
            properties["contentSize"] = str(path.stat().st_size)
            properties["encodingFormat"] = MEDIA_TYPES.get(path.suffix, "application/octet-stream")
            return crate.add_file(path, path.relative_to(target).as_posix(), properties=properties)

        results = []
        for path in sorted(path for path in (target / "run").rglob("*") if path.is_file()):
            file = add(path, description=DESCRIPTIONS.get(path.name, "a file of the run"))
            results += [file] * (path.name in RESULTS)
        (target / "recipe.toml").write_bytes(recipe_toml(source.recipe).encode())
        inputs = [add(target / "recipe.toml", description="the recipe")]
        hashes = {k: v for k, v in source.items.items() if k.startswith("data.")}
        for item, sha256 in sorted(hashes.items()):
            value = {"@type": "PropertyValue", "name": item, "value": str(sha256)}
            inputs.append(crate.add(ContextEntity(crate, f"#{item}", properties=value)))

        version = {"name": "reproml", "softwareVersion": _version(source, "reproml")}
        program = crate.add(SoftwareApplication(crate, "#reproml", properties=version))
        action = crate.add_action(
            program,
            f"#{name}",
            object=inputs,
            result=results,
            properties={
                "name": f"Training of {name}",
                "description": f"reproml train --recipe recipe.toml, definitions {source.definitions}",
                "startTime": started.isoformat(),
                "endTime": finished.isoformat(),
                "actionStatus": "http://schema.org/CompletedActionStatus",
            },
        )
        crate.root_dataset["mentions"] = action
        crate.metadata.write(target)
    return str(_target(source, out, "ro-crate"))


def _version(source: Source, package: str) -> str:
    versions = source.record.get("versions")
    return str(versions.get(package)) if isinstance(versions, dict) else "unknown"


# --- Hugging Face model card -----------------------------------------------------------------------

CARD = """---
{metadata}
---

# {name}

Trained by reproml in exact arithmetic, definitions {definitions}: every operator returns the correctly
rounded result. So the recipe below gives these weights, to the last bit, on any machine.

| | |
|---|---|
| data | {data} |
| correct on the test set | {test_correct} of {test_total} |
| correct on the training set | {train_correct} of {train_total} |
| SHA-256 of `run/weights.safetensors` | `{sha256}` |

{golden}

## How to verify

The file is the one that this card describes:

```sh
echo "{sha256}  run/weights.safetensors" | sha256sum --check
```

The weights follow from the recipe. Save the recipe as `{name}.toml`, train it, and compare the two hashes:

```sh
reproml train --recipe ./{name}.toml --out again
sha256sum run/weights.safetensors again/weights.safetensors
```
{signature}
## Recipe

```toml
{recipe}```
"""
SIGNED = """
Nobody has changed the folder since its owner signed it (`KEY.pub` is the owner's public key):

```sh
reproml verify --run run --signature KEY.pub
```
"""


def export_card(folder: Path, out: Optional[Path]) -> str:
    """Write a folder with README.md as Hugging Face reads it: YAML between two lines, then Markdown."""
    source = read_source(folder)
    name, items = source.recipe.name, source.items
    if source.numerics != "exact":
        raise ReproError(
            f"{folder} is not an exact run: a model card states a hash that all machines give"
        )
    data = source.recipe.data.name
    accuracy = {"type": "accuracy", "name": "Accuracy", "value": source.accuracies["test"]}
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": {"name": data, "type": data, "split": "test"},
        "metrics": [accuracy],
    }
    metadata = {
        "library_name": "reproml",
        "pipeline_tag": "image-classification",
        "tags": ["reproducible-training", "safetensors"],
        "model-index": [{"name": name, "results": [result]}],
    }
    text = CARD.format(
        # Every JSON value is a YAML value.
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
        name=name,
        definitions=source.definitions,
        data=data,
        sha256=source.weights_sha256,
        golden=_golden_sentence(source),
        signature=SIGNED if (folder / SIGNATURE).exists() else "",
        recipe=recipe_toml(source.recipe),
        **{f"{a}_{b}": items[f"{a}.{b}"] for a in ("train", "test") for b in ("correct", "total")},
    )
    with _new_folder(source, out, "model-card") as target:
        (target / "README.md").write_bytes(text.encode())
    return str(_target(source, out, "model-card"))


def _golden_sentence(source: Source) -> str:
    """Return what the golden file of the recipe states, if there is one."""
    try:
        path = golden.find_golden(source.recipe.name)
    except ReproError:
        return "No golden file states this hash in advance."
    if any(not each.match for each in golden.compare_items(golden.read_golden(path), source.items)):
        raise ReproError(f"{source.folder} is not the run that {path} expects; see: reproml verify")
    return f"The golden file `golden/{path.name}` of the recipe states this hash in advance."


# --- MLflow ----------------------------------------------------------------------------------------


def export_mlflow(folder: Path, out: Optional[Path]) -> str:
    """Log a run: recipe as parameters, losses and accuracies as metrics, hashes as tags, all files.

    `out` is a folder for MLflow's file store; without it the run is logged where MLflow is set to,
    MLFLOW_TRACKING_URI.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    source = read_source(folder)
    losses, accuracies = source.losses, source.accuracies
    started, finished = (int(1000 * source.time(t).timestamp()) for t in ("started", "finished"))
    if out is not None:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow 3.17 refuses the store without it
    try:
        client = MlflowClient(tracking_uri=out.absolute().as_uri() if out else None)
        experiment = client.get_experiment_by_name(source.recipe.name)
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(source.recipe.name)
        )
        run = client.create_run(experiment_id, started, run_name=source.folder.name).info.run_id
        for key, value in _flat(recipe_values(source.recipe)):
            client.log_param(run, key, value)
        for item, value in source.items.items():
            if "sha256" in item or item == "definitions.version":
                client.set_tag(run, item, str(value))
        for epoch, loss in losses.items():
            client.log_metric(run, "loss", loss, finished, epoch)
        for split, accuracy in accuracies.items():
            client.log_metric(run, f"{split}.accuracy", accuracy, finished)
        client.log_artifacts(run, str(source.folder))
        client.set_terminated(run, end_time=finished)
    except MlflowException as error:
        raise ReproError(
            f"MLflow refuses the run: {str(error).splitlines()[0].partition('. ')[0]}; set "
            "MLFLOW_TRACKING_URI, or name a folder for its file store with --out"
        ) from None
    return f"run {run} of MLflow"


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the recipe's values, by names such as train.epochs."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner


# --- what all formats need -------------------------------------------------------------------------


def _target(source: Source, out: Optional[Path], suffix: str) -> Path:
    return out or source.folder.parent / f"{source.folder.name}-{suffix}"


@contextmanager
def _new_folder(source: Source, out: Optional[Path], suffix: str) -> Iterator[Path]:
    """Yield a folder with the run in run/, which then takes its name; it appears complete or not at all."""
    target = _target(source, out, suffix)
    if target.resolve().is_relative_to(source.folder):
        raise ReproError(f"{target} is within the run folder; choose another folder with --out")
    if os.path.lexists(target):
        raise ReproError(f"{target} already exists; delete it, or choose another folder with --out")
    part = partial_path(target)
    try:
        part.mkdir(parents=True)
        shutil.copytree(source.folder, part / "run", symlinks=True)
        yield part
        os.rename(part, target)
    except OSError as error:  # shutil.Error, which is one, has no strerror
        raise ReproError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


FORMATS: dict[str, Callable[[Path, Optional[Path]], str]] = {
    "ro-crate": export_crate,
    "model-card": export_card,
    "mlflow": export_mlflow,
}
