"""The fields of the specifications, written down for the tests, and what parses and validates statements.

Sources: in-toto Attestation Framework v1.1 (Statement, ResourceDescriptor, DigestSet, field types) and
SLSA 1.2 (Build Provenance, Verification Summary Attestation).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Optional

import pytest

from reproml.evidence import provenance
from reproml.pipeline.run import reserve_run_folder
from tests import tiny

URI = re.compile(r"[a-z][a-z0-9+.-]*:[!-~]+")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
HEX = {
    "sha256": 64,
    "dirHash": 64,
    "gitCommit": 40,
    "reproml_digest_1": 64,  # ours; a DigestSet may have other algorithms
}


def texts(value: Any) -> None:
    assert isinstance(value, list) and all(isinstance(one, str) for one in value)


def uri(value: Any) -> None:
    assert isinstance(value, str) and URI.fullmatch(value), value


def time(value: Any) -> None:
    assert isinstance(value, str) and TIME.fullmatch(value), value


def text(value: Any) -> None:
    assert isinstance(value, str)


def table(value: Any) -> None:
    assert isinstance(value, dict) and all(isinstance(key, str) for key in value)


def versions(value: Any) -> None:
    table(value)
    assert all(isinstance(version, str) for version in value.values())


def digest_set(value: Any) -> None:
    table(value)
    assert value
    for algorithm, digits in value.items():
        assert re.fullmatch(f"[0-9a-f]{{{HEX[algorithm]}}}", digits), (algorithm, digits)


def resource(value: Any) -> None:
    fields = {"name": text, "uri": uri, "digest": digest_set, "annotations": table}
    check(value, {}, fields)
    assert value.keys() & {"uri", "digest", "content"}


def resources(value: Any) -> None:
    assert isinstance(value, list)
    for one in value:
        resource(one)


def with_digest(value: Any) -> None:
    resources(value)
    assert value and all("digest" in one for one in value)


def one_of(*values: Any) -> Any:
    def checked(value: Any) -> None:
        assert value in values

    return checked


def check(value: Any, required: dict[str, Any], optional: Optional[dict[str, Any]] = None) -> None:
    """Check the fields of an object: a required one exists, and there is none of another name."""
    table(value)
    fields = {**required, **(optional or {})}
    assert set(required) <= set(value) <= set(fields), set(value) ^ set(fields)
    for name, content in value.items():
        if isinstance(fields[name], tuple):
            check(content, *fields[name])
        else:
            fields[name](content)


PROVENANCE = (
    {
        "buildDefinition": (
            {"buildType": uri, "externalParameters": table},
            {"internalParameters": table, "resolvedDependencies": resources},
        ),
        "runDetails": (
            {"builder": ({"id": uri}, {"version": versions, "builderDependencies": resources})},
            {
                "metadata": ({}, {"invocationId": text, "startedOn": time, "finishedOn": time}),
                "byproducts": resources,
            },
        ),
    },
)
SUMMARY = (
    {
        "verifier": ({"id": uri}, {"version": versions}),
        "resourceUri": uri,
        "policy": ({"uri": uri}, {"digest": digest_set}),
        "verificationResult": one_of("PASSED", "FAILED"),
        "verifiedLevels": texts,
    },
    {
        "timeVerified": time,
        "inputAttestations": with_digest,
        "dependencyLevels": table,
        "slsaVersion": one_of("1.2"),
    },
)
PREDICATES = {
    "https://slsa.dev/provenance/v1": PROVENANCE,
    "https://slsa.dev/verification_summary/v1": SUMMARY,
}


def check_statement(raw: bytes) -> dict[str, Any]:
    """Check every field of a statement; return it."""
    values: dict[str, Any] = json.loads(raw)
    check(
        values,
        {
            "_type": one_of("https://in-toto.io/Statement/v1"),
            "subject": with_digest,
            "predicateType": one_of(*PREDICATES),
            "predicate": PREDICATES[values["predicateType"]],
        },
    )
    names = [subject["name"] for subject in values["subject"]]
    assert len(set(names)) == len(names)
    return values


def parse(raw: bytes) -> Any:
    """Parse and validate a statement, and its predicate, with in-toto's own library."""
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.predicates.vsa.v1 import vsa_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.statement import Statement

    statement = json_format.Parse(raw, statement_pb2.Statement())
    Statement.copy_from_pb(statement).validate()
    predicate = json_format.MessageToDict(statement.predicate)
    if statement.predicate_type == "https://slsa.dev/provenance/v1":
        return json_format.ParseDict(predicate, provenance_pb2.Provenance())
    # The library's class lacks fields of SLSA 1.1, which consumers must then ignore, and has one level
    # where the specification has a list.
    known = copy.deepcopy(predicate)
    (known["verifiedLevels"],) = known["verifiedLevels"]
    del known["verifier"]["version"]
    for attestation in known["inputAttestations"]:
        del attestation["annotations"]
    return json_format.ParseDict(known, vsa_pb2.VerificationSummary())


def save_run(folder: Path, builder: Optional[str] = "a", **changes: Any) -> Path:
    """Write the run of the tiny recipe as a builder would; return its folder."""
    run = dataclasses.replace(tiny.run(), builder=builder, **changes)
    with reserve_run_folder(folder) as save:
        save(run)
    return folder


def rewrite(path: Path, change: Any) -> None:
    """Change a provenance and correct its invocationId, as somebody would who forges it."""
    values = json.loads(path.read_bytes())
    change(values)
    metadata = values["predicate"]["runDetails"]["metadata"]
    metadata["invocationId"] = provenance._self_digest(values)
    path.write_bytes(provenance.encode(values))
