"""Write and read provenance: a statement of what was trained, from what, where, and with which result.

It is an in-toto Statement v1 with a SLSA provenance v1 predicate (docs/provenance.md), as JSON with sorted
keys. Its invocationId is the SHA-256 of the statement itself, in which the invocationId is empty. So
`read_provenance` notices any changed byte; who wrote the statement is shown by a signature only.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Optional
from urllib.parse import quote, unquote

import msgspec

from reproml.digest import file_sha256
from reproml.errors import ReproError
from reproml.files import read_regular
from reproml.versions import DEFINITIONS, __version__

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
ADDRESS = "urn:reproml"  # the beginning of all URIs that reproml defines
STATE_DICT = "reproml_digest_1"  # the algorithm of reproml.digest, as a key of a DigestSet
PROVENANCE = "provenance.json"
VARIABLE = "REPROML_BUILDER"

# The kinds of dependencies: the first three determine the result of a training.
DATA, SCRIPT, MODULE, SOURCE, LOCK = "data", "script", "module", "source", "lock"

RESULT = "weights.safetensors"  # the name of the only subject of a recipe

_PACKAGE = Path(__file__).parents[1]
_ROOT = _PACKAGE.parent  # of a checkout
_URI = re.compile(r"[a-z][a-z0-9+.-]+:[!-~]+")
_LOCKED = ("torch", "numpy", "safetensors", "scikit-learn", "msgspec")

Descriptor = dict[str, Any]  # a ResourceDescriptor of in-toto


def describe(name: str, digest: Mapping[str, str], **annotations: Any) -> Descriptor:
    """Return the description of a file or of another resource by its digests."""
    described: Descriptor = {"name": name, "digest": dict(digest)}
    return {**described, "annotations": annotations} if annotations else described


def builder_id(name: Optional[str] = None) -> str:
    """Return the URI of this machine: `name`, else REPROML_BUILDER, else the name of the host.

    A name that is a URI stays as it is. Raises ReproError for a name that cannot be shown.
    """
    name = name or os.environ.get(VARIABLE) or platform.node() or "unnamed"
    if _URI.fullmatch(name):
        return name
    if not name.isprintable() or not name.strip():
        raise ReproError(f"{name!r} is not a name of a machine; use letters and digits, or a URI")
    return f"{ADDRESS}:builder:{quote(name.strip(), safe='')}"


def same_builder_key(uri: str) -> str:
    """Return what is equal for two URIs of one builder: percent-decoded, and lower case where that is free.

    These are the scheme, the namespace of a URN and the host. Other characters become NFC.
    """
    decoded = unicodedata.normalize("NFC", unquote(uri, errors="surrogateescape"))
    head = re.match(r"(?i)urn:[^:]*:|[^:]*://[^/?#]*|[^:]*:", decoded)
    end = head.end() if head else 0
    return decoded[:end].lower() + decoded[end:]


def build_type(kind: str, definitions: Optional[int]) -> str:
    """Return the URI of a way to train: kind is "recipe" or "script"; native numerics have None."""
    return f"{ADDRESS}:{kind}:{'native' if definitions is None else f'definitions-{definitions}'}"


def definitions(numerics: str) -> Optional[int]:
    """Return the version of the definitions that a training depends on, None for native numerics."""
    return DEFINITIONS if numerics == "exact" else None


def timestamp(time: Optional[str] = None) -> str:
    """Return an ISO 8601 time of UTC, or the present time, as RFC 3339 with a Z."""
    return (time or datetime.now(timezone.utc).isoformat(timespec="seconds")).replace("+00:00", "Z")


def encode(statement: Mapping[str, Any]) -> bytes:
    """Return a statement as JSON with sorted keys, in ASCII."""
    return (json.dumps(statement, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def make_provenance(
    subjects: list[Descriptor],
    kind: str,
    parameters: Mapping[str, Any],
    dependencies: Iterable[Descriptor],
    *,
    internal: Mapping[str, Any],
    builder: Optional[str],
    versions: Mapping[str, str],
    times: tuple[str, str],
    byproducts: Iterable[Descriptor],
) -> bytes:
    """Return the content of a provenance file. `parameters` must have the numerics."""
    numerics = parameters["numerics"]
    statement: dict[str, Any] = {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": build_type(kind, definitions(numerics)),
                "externalParameters": {**parameters, "definitions": definitions(numerics)},
                "internalParameters": dict(internal),
                "resolvedDependencies": list(dependencies),
            },
            "runDetails": {
                "builder": {"id": builder_id(builder), "version": dict(versions)},
                "metadata": {
                    "invocationId": "",
                    "startedOn": timestamp(times[0]),
                    "finishedOn": timestamp(times[1]),
                },
                "byproducts": list(byproducts),
            },
        },
    }
    statement["predicate"]["runDetails"]["metadata"]["invocationId"] = _self_digest(statement)
    return encode(statement)


def _self_digest(statement: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a statement whose invocationId is empty."""
    copy = json.loads(json.dumps(statement))
    copy["predicate"]["runDetails"]["metadata"]["invocationId"] = ""
    return "sha256:" + hashlib.sha256(encode(copy)).hexdigest()


# --- what a training depends on ----------------------------------------------------------------------


def source_dependencies() -> list[Descriptor]:
    """Return reproml's source code, its revision if this is a checkout, and the lock if it is installed.

    The digest of the source code is in-toto's dirHash of the package's .py files.
    """
    found = [
        describe("reproml", {"dirHash": _package_hash(_PACKAGE)}, kind=SOURCE, version=__version__)
    ]
    if not (_ROOT / "setup.py").is_file():
        return found
    found += revision(_ROOT / "setup.py", "reproml revision")
    lock = _ROOT / "requirements.lock"
    if lock.is_file() and _is_installed(lock.read_text("utf-8")):
        found.append(describe(lock.name, {"sha256": file_sha256(lock)}, kind=LOCK))
    return found


def revision(file: Path, name: str) -> list[Descriptor]:
    """Return the commit of the git repository that tracks the file, and whether it was clean, if any."""
    git = ["git", "--no-optional-locks", "-C", str(file.parent)]

    def output(*arguments: str) -> Optional[str]:
        try:
            done = subprocess.run([*git, *arguments], capture_output=True, text=True, check=False)
        except OSError:  # there is no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if output("ls-files", "--error-unmatch", file.name) is None:
        return []
    commit, changed = output("rev-parse", "HEAD"), output("status", "--porcelain", "-uno")
    if commit is None or changed is None:
        return []
    return [describe(name, {"gitCommit": commit}, kind=SOURCE, clean=not changed)]


def _package_hash(package: Path) -> str:
    """Return dirHash: the SHA-256 of what sha256sum prints for all .py files, sorted by their names."""
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    lines = [f"{file_sha256(files[name])}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_installed(lock: str) -> bool:
    """Return whether the packages that a training uses have versions of the lock."""
    pinned = set(re.findall(r"^([a-z0-9-]+==[^\s;]+)", lock, re.MULTILINE))
    try:
        return pinned.issuperset(f"{name}=={version(name)}" for name in _LOCKED)
    except PackageNotFoundError:
        return False


# --- reading -----------------------------------------------------------------------------------------


class _Resource(msgspec.Struct, frozen=True):
    name: str
    digest: dict[str, str]
    annotations: dict[str, Any] = {}


class _RecipeParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    recipe: dict[str, Any]
    numerics: Literal["exact", "native"]
    definitions: Optional[int]


class _ScriptParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    script: str
    arguments: list[str]
    seed: Optional[int]
    numerics: Literal["exact", "native"]
    definitions: Optional[int]


class _Definition(msgspec.Struct, frozen=True, rename="camel"):
    build_type: str
    external_parameters: dict[str, Any]
    internal_parameters: dict[str, Any]
    resolved_dependencies: list[_Resource]


class _Builder(msgspec.Struct, frozen=True):
    id: str
    version: dict[str, str]


class _Metadata(msgspec.Struct, frozen=True, rename="camel"):
    invocation_id: str
    started_on: str
    finished_on: str


class _Details(msgspec.Struct, frozen=True, rename="camel"):
    builder: _Builder
    metadata: _Metadata
    byproducts: list[_Resource] = []


class _Predicate(msgspec.Struct, frozen=True, rename="camel"):
    build_definition: _Definition
    run_details: _Details


class _Statement(msgspec.Struct, frozen=True):
    subject: list[_Resource]
    predicate: _Predicate


@dataclass(frozen=True)
class Provenance:
    """A provenance file that was read and is as it was written."""

    path: Path
    sha256: str  # of the file
    subjects: list[_Resource]
    definition: _Definition
    details: _Details

    @property
    def parameters(self) -> dict[str, Any]:
        return self.definition.external_parameters

    @property
    def builder(self) -> str:
        return self.details.builder.id

    @property
    def definitions(self) -> Optional[int]:
        """The version of the definitions, None for native numerics."""
        number: Optional[int] = self.parameters.get("definitions")
        return number


def read_provenance(path: Path) -> Provenance:
    """Read a provenance file, or that of a run folder.

    Raises ReproError if it is not a provenance of reproml, or if any byte of it was changed.
    """
    try:
        path = path / PROVENANCE if path.is_dir() else path
        raw = read_regular(path)
    except OSError as error:
        raise ReproError(f"cannot read the provenance {path}: {error.strerror}") from None
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ReproError(f"{path} is damaged: it is not JSON ({error})") from None
    _refuse_foreign(path, values)
    try:
        statement = msgspec.convert(values, _Statement)
        digest, unchanged = _self_digest(values), encode(values) == raw
    except (msgspec.ValidationError, ValueError, KeyError, TypeError) as error:
        raise ReproError(f"{path} is damaged: {error}") from None
    stated = statement.predicate.run_details.metadata.invocation_id
    if digest != stated or not unchanged:
        reason = (
            "it is not written as reproml writes it"
            if digest == stated
            else f"the digest of its content is {digest}, but its invocationId is {stated}"
        )
        raise ReproError(f"{path} is damaged: {reason}")
    definition, details = statement.predicate.build_definition, statement.predicate.run_details
    for reason in _contradictions(statement.subject, definition, details):
        raise ReproError(f"{path} is not a provenance that reproml wrote: {reason}")
    sha256 = hashlib.sha256(raw).hexdigest()
    return Provenance(path, sha256, statement.subject, definition, details)


def _refuse_foreign(path: Path, values: Any) -> None:
    """Raise ReproError for JSON that is not a provenance which reproml wrote."""
    table = values if isinstance(values, dict) else {}
    for key, expected in ("_type", STATEMENT), ("predicateType", PREDICATE):
        if table.get(key) != expected:
            raise ReproError(
                f"{path} is not a provenance: its {key} is {table.get(key)!r}, not {expected!r}"
            )
    definition: Any = table.get("predicate")
    definition = definition.get("buildDefinition") if isinstance(definition, dict) else None
    found = definition.get("buildType") if isinstance(definition, dict) else None
    if not isinstance(found, str) or not found.startswith(f"{ADDRESS}:"):
        raise ReproError(f"{path} is not a provenance of reproml: its buildType is {found!r}")


# The hexadecimal digits of all algorithms that reproml writes; git has two kinds of repositories.
_DIGITS = {"sha256": {64}, STATE_DICT: {64}, "dirHash": {64}, "gitCommit": {40, 64}}

# The algorithm of each kind of dependency; source code has one of two.
_ALGORITHMS = {
    **dict.fromkeys((DATA, SCRIPT, MODULE, LOCK), ({"sha256"},)),
    SOURCE: ({"dirHash"}, {"gitCommit"}),
}


def _contradictions(
    subjects: list[_Resource], definition: _Definition, details: _Details
) -> Iterator[str]:
    """Yield why reproml cannot have written a statement whose fields have the right types."""
    kind = "recipe" if "recipe" in definition.external_parameters else "script"
    table: Any = _RecipeParameters if kind == "recipe" else _ScriptParameters
    try:
        stated = msgspec.convert(definition.external_parameters, table)
    except msgspec.ValidationError as error:
        yield f"its externalParameters are not those of a {kind}: {error}"
        return
    if (stated.numerics == "exact") != (stated.definitions is not None):
        yield f"its numerics are {stated.numerics}, but its definitions are {stated.definitions}"
    expected = build_type(kind, stated.definitions)
    if definition.build_type != expected:
        yield f"its buildType is {definition.build_type!r}, not {expected!r}"
    if not re.fullmatch("[A-Za-z][A-Za-z0-9+.-]*:[!-~]+", details.builder.id):
        yield f"its builder {details.builder.id!r} is not a URI"
    for time in details.metadata.started_on, details.metadata.finished_on:
        if not _is_time(time):
            yield f"{time!r} is not a time of UTC as in RFC 3339"
    for resource in [*subjects, *definition.resolved_dependencies, *details.byproducts]:
        for algorithm, digest in resource.digest.items():
            if not re.fullmatch("[0-9a-f]+", digest) or len(digest) not in _DIGITS.get(
                algorithm, ()
            ):
                yield f"{resource.name!r} has the {algorithm} {digest!r}, which is no digest of reproml"
    kinds = [d.annotations.get("kind") for d in definition.resolved_dependencies]
    for dependency, found in zip(definition.resolved_dependencies, kinds):
        if not isinstance(found, str) or found not in _ALGORITHMS:
            yield f"its dependency {dependency.name!r} is of the unknown kind {found!r}"
        elif set(dependency.digest) not in _ALGORITHMS[found]:
            yield f"its dependency {dependency.name!r} has no digest of the kind {found}"
    if kind == "recipe":
        if DATA not in kinds or not {DATA, SOURCE, LOCK}.issuperset(kinds):
            yield "a recipe depends on data, source code and a lock, and on nothing else"
        if [s.name for s in subjects] != [RESULT] or set(subjects[0].digest) != {"sha256"}:
            yield f"the only subject of a recipe is {RESULT} with its sha256"
    else:
        if kinds.count(SCRIPT) != 1:
            yield "it must have one dependency of the kind script"
        if not subjects:
            yield "it has no subject"
        for subject in subjects:
            if set(subject.digest) not in ({STATE_DICT}, {STATE_DICT, "sha256"}):
                yield f"its subject {subject.name!r} has no {STATE_DICT}"
    for field, names in (
        ("subjects", [s.name for s in subjects]),
        ("dependencies", [(k, d.name) for k, d in zip(kinds, definition.resolved_dependencies)]),
        ("byproducts", [b.name for b in details.byproducts]),
    ):
        if len({*map(str, names)}) != len(names):
            yield f"two of its {field} have the same name"


def _is_time(text: str) -> bool:
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?Z", text):
        return False
    try:
        datetime.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")
    except ValueError:
        return False
    return True
