"""Compare provenances of different machines, and state that they reproduced a training.

    checked = compare([Path("runs/mine"), Path("theirs/provenance.json")])
    checked.difference                # None, or the first difference in one sentence
    checked.summary("my-laptop")      # a verification summary, as bytes

The summary is an in-toto Statement v1 with a SLSA verification summary v1 (docs/provenance.md).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Optional

from reproml.digest import digest, file_sha256
from reproml.errors import ReproError
from reproml.evidence.provenance import (
    ADDRESS,
    DATA,
    MODULE,
    PROVENANCE,
    SCRIPT,
    STATE_DICT,
    STATEMENT,
    Descriptor,
    Provenance,
    builder_id,
    describe,
    encode,
    read_provenance,
    same_builder_key,
    timestamp,
)
from reproml.files import read_regular
from reproml.versions import __version__

SUMMARY = "https://slsa.dev/verification_summary/v1"
# Not SLSA_BUILD_REPRODUCED, which requires independent platforms that are trusted: names do not show that.
REPRODUCED = "REPROML_REPRODUCED"
SAME_BUILDER = "REPROML_REPEATED_BY_ONE_BUILDER"
POLICY = f"{ADDRESS}:policy:reproduced:1"
SLSA_VERSION = "1.2"


@dataclass(frozen=True)
class Reproduction:
    """Provenances that were compared: those of two or more trainings."""

    provenances: list[Provenance]
    difference: Optional[str]  # the first, in one sentence

    @property
    def builders(self) -> list[str]:
        """One URI of each builder, in the order of the provenances."""
        return distinct_builders(p.builder for p in self.provenances)

    def summary(self, verifier: Optional[str]) -> bytes:
        """Return the verification summary of provenances without a difference."""
        assert self.difference is None
        subjects = _agreed(self.provenances)
        return encode(
            {
                "_type": STATEMENT,
                "subject": subjects,
                "predicateType": SUMMARY,
                "predicate": {
                    "verifier": {"id": builder_id(verifier), "version": {"reproml": __version__}},
                    "timeVerified": timestamp(),
                    "resourceUri": _resource(subjects[0]),
                    "policy": {"uri": POLICY},
                    "inputAttestations": [
                        {"digest": {"sha256": p.sha256}, "annotations": {"builder": p.builder}}
                        for p in self.provenances
                    ],
                    "verificationResult": "PASSED",
                    "verifiedLevels": [REPRODUCED if len(self.builders) > 1 else SAME_BUILDER],
                    "slsaVersion": SLSA_VERSION,
                },
            }
        )


def distinct_builders(uris: Iterable[str]) -> list[str]:
    """Return the first URI of each builder."""
    first: dict[str, str] = {}
    for uri in uris:
        first.setdefault(same_builder_key(uri), uri)
    return list(first.values())


def _agreed(provenances: Sequence[Provenance]) -> list[Descriptor]:
    """Return the results, each with the digests that all provenances state."""
    agreed = []
    for same in zip(*(p.subjects for p in provenances)):
        shared = {a: d for a, d in same[0].digest.items() if all(a in s.digest for s in same)}
        agreed.append(describe(same[0].name, shared))
    return agreed


def _resource(subject: Descriptor) -> str:
    """Return the package URL of a result, which any holder of the file can compute."""
    algorithm = "sha256" if "sha256" in subject["digest"] else STATE_DICT
    return f"pkg:generic/weights?checksum={algorithm}:{subject['digest'][algorithm]}"


def weights_beside(provenance: Provenance) -> int:
    """Return how many of a provenance's results are beside it; `compare` checks these at the end."""
    folder = provenance.path.parent
    return sum(
        any(_file_of(folder, s.name, algorithm) is not None for algorithm in s.digest)
        for s in provenance.subjects
    )


def summary_path(given: Path) -> Path:
    """Return where the summary of a run folder or provenance is written: beside the folder.

    It is not written into the folder, whose signature covers all files.
    """
    folder = given if given.is_dir() else given.parent
    folder = folder.resolve() if folder.name in ("", "..") else folder
    return folder.parent / f"{folder.name}.reproduced.json"


def compare(paths: Sequence[Path], same_builder: bool = False) -> Reproduction:
    """Compare provenances, or those of run folders, with one another and with the files beside them.

    Raises ReproError if one is damaged or not a provenance, if they are of one builder without
    `same_builder`, or if they are of different definitions: these cannot be compared.
    """
    return compare_statements([read_provenance(path) for path in paths], same_builder)


def compare_statements(provenances: list[Provenance], same_builder: bool = False) -> Reproduction:
    """Compare provenances that were read already. Raises ReproError as `compare` does."""
    if len(provenances) < 2:
        raise ReproError("one provenance shows nothing; name two or more, of different builders")
    first = provenances[0]
    for other in provenances[1:]:
        _refuse_incomparable(first, other)
    by_content: dict[str, Provenance] = {}
    by_builder: dict[str, Provenance] = {}
    for p in provenances:
        twin = by_content.setdefault(p.sha256, p)
        if twin is not p:
            raise ReproError(f"{twin.path} and {p.path} are the same provenance")
        twin = by_builder.setdefault(same_builder_key(p.builder), p)
        if twin is not p and not same_builder:
            raise ReproError(
                f"{twin.path} and {p.path} are of the same builder {p.builder}, so they are not "
                "independent; if two machines have this name, train again with --builder NAME; "
                "--same-builder compares them nevertheless"
            )
    differences = chain(
        *(_differences(first, other) for other in provenances[1:]),
        _differing_results(provenances),
        *(wrong_files(p) for p in provenances),
    )
    return Reproduction(provenances, next(differences, None))


def _refuse_incomparable(first: Provenance, other: Provenance) -> None:
    versions = first.definitions, other.definitions
    if None not in versions and versions[0] != versions[1]:
        raise ReproError(
            f"{first.path} was made with version {versions[0]} of the definitions and {other.path} "
            f"with version {versions[1]}; only trainings with the same definitions can agree"
        )


def _differences(first: Provenance, other: Provenance) -> Iterator[str]:
    """Yield what differs between two provenances: parameters, then dependencies."""
    ignored = {"script"}  # its name: the content is compared as a dependency
    mine, theirs = (
        dict(_flat((), {k: v for k, v in p.parameters.items() if k not in ignored}))
        for p in (first, other)
    )
    for path in dict.fromkeys([("numerics",), *mine, *theirs]):
        a, b = mine.get(path, "not stated"), theirs.get(path, "not stated")
        if a != b:
            yield f"{first.path} and {other.path} differ in {'.'.join(path)}: {a} and {b}"
    for kind in (SCRIPT, MODULE, DATA):
        yield from _differing_dependencies(first, other, kind)


def _differing_results(provenances: Sequence[Provenance]) -> Iterator[str]:
    """Yield results that differ between any two provenances, by any algorithm that both state."""
    for first, other in combinations(provenances, 2):
        between = f"{first.path} and {other.path} differ in"
        if len(first.subjects) != len(other.subjects):
            count = f"{len(first.subjects)} and {len(other.subjects)}"
            yield f"{between} the number of results: {count}"
        for x, y in zip(first.subjects, other.subjects):
            for algorithm in x.digest:
                if x.digest[algorithm] != y.digest.get(algorithm, x.digest[algorithm]):
                    pair = f"{x.digest[algorithm]} and {y.digest[algorithm]}"
                    yield f"{between} the {algorithm} of {x.name}: {pair}"


def _differing_dependencies(first: Provenance, other: Provenance, kind: str) -> Iterator[str]:
    """Yield dependencies that only one of two has. Names are of no account: folders may differ."""
    sides = [
        {
            json.dumps(d.digest, sort_keys=True): d
            for d in p.definition.resolved_dependencies
            if d.annotations.get("kind") == kind
        }
        for p in (first, other)
    ]
    for has, lacks, (here, there) in (
        (first, other, (sides[0], sides[1])),
        (other, first, (sides[1], sides[0])),
    ):
        for key in here:
            if key not in there:
                listed = ", ".join(f"{a} {value}" for a, value in here[key].digest.items())
                name = here[key].name
                yield f"{has.path} depends on the {kind} {name} ({listed}), and {lacks.path} does not"


def _flat(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict) and value:
        for name in sorted(value):
            yield from _flat((*path, name), value[name])
    else:
        yield path, json.dumps(value)


# --- the files beside a provenance -------------------------------------------------------------------


def wrong_files(provenance: Provenance) -> Iterator[str]:
    """Yield the files beside a provenance that do not have the digests which it states."""
    folder = provenance.path.parent
    for resource in [*provenance.subjects, *provenance.details.byproducts]:
        for algorithm, stated in resource.digest.items():
            found = _digest_of(folder, resource.name, algorithm)
            if found not in (None, stated):
                yield (
                    f"{folder / resource.name} is not the file that {provenance.path} states: its "
                    f"{algorithm} is {found}, not {stated}"
                )


def _digest_of(folder: Path, name: str, algorithm: str) -> Optional[str]:
    """Return the digest of a result that is in the folder, None if it is not there."""
    file = _file_of(folder, name, algorithm)
    if file is None:
        return None
    if algorithm == STATE_DICT:
        return _state_dicts(folder / file, file).get(name, "missing")
    try:
        return file_sha256(folder / file)
    except OSError as error:
        raise ReproError(f"cannot read {folder / file}: {error.strerror}") from None


def _file_of(folder: Path, name: str, algorithm: str) -> Optional[str]:
    """Return the name of the file in the folder that a digest of a result is computed from, or None."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None  # it is not beside the provenance
    ends = [len(name)] if algorithm in ("sha256", STATE_DICT) else []
    if algorithm == STATE_DICT:  # of a file such as model.pt['model']: its name is followed by keys
        ends += [i for i, character in enumerate(name) if character == "[" and i]
    try:
        return next((name[:end] for end in ends if (folder / name[:end]).is_file()), None)
    except OSError as error:
        raise ReproError(f"cannot read {folder / name}: {error.strerror}") from None


def _state_dicts(path: Path, name: str) -> Mapping[str, str]:
    """Return the digest of each state dict in a file of PyTorch or safetensors."""
    import safetensors.torch
    import torch

    from reproml.script import state_dicts

    try:
        if name.endswith(".safetensors"):
            content: Any = safetensors.torch.load(read_regular(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the pickle, of the archive or of the file
        reason = str(error).partition("\n")[0]
        raise ReproError(f"{path} cannot be read to check its digest: {reason}") from None
    return {place: digest(state) for place, state in state_dicts(name, content)}


# --- the status of a run folder ----------------------------------------------------------------------


def reproduced_by(folder: Path) -> Optional[list[str]]:
    """Return the different builders that a run folder's summary names, None without a summary.

    Raises ReproError if the summary beside the folder is of other weights or of another provenance, or if
    `reproduced` cannot have written it.
    """
    path = summary_path(folder)
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None
    try:
        summary = json.loads(raw)
        predicate = summary["predicate"]
        inputs = {
            entry["digest"]["sha256"]: str(entry["annotations"]["builder"])
            for entry in predicate["inputAttestations"]
        }
        subjects = [subject["digest"].items() for subject in summary["subject"]]
        builders = distinct_builders(inputs.values())
        written = (
            summary["_type"] == STATEMENT
            and summary["predicateType"] == SUMMARY
            and predicate["policy"] == {"uri": POLICY}
            and predicate["verificationResult"] == "PASSED"
            and predicate["verifiedLevels"] == [REPRODUCED if len(builders) > 1 else SAME_BUILDER]
            and 1 < len(inputs) == len(predicate["inputAttestations"])
            and all(subjects)
        )
        if not written:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ReproError(f"{path} is not a summary that reproduced wrote; delete it") from None
    if len(builders) == 1:
        return None
    here = read_provenance(folder)
    same = len(subjects) == len(here.subjects) and all(
        digests <= subject.digest.items() for digests, subject in zip(subjects, here.subjects)
    )
    if inputs.get(here.sha256) != here.builder or not same:
        raise ReproError(
            f"{path} is about other weights than {folder / PROVENANCE}; run reproduced again"
        )
    return builders
