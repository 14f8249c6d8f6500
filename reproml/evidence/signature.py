"""Sign a run folder with a private key, and check its signature with the public key (reproml[sign]).

`model.sig` has the format of OpenSSF Model Signing 1.0, a Sigstore bundle with an in-toto statement of the
SHA-256 of every file; the package model-signing makes and checks it. It covers all files of the folder but
itself. The check here is stricter than the package's, which lets a signature leave out files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproml.digest import file_sha256
from reproml.errors import ReproError
from reproml.files import files_below, read_regular, write_atomically
from reproml.pipeline.run import SIGNATURE, read_undamaged

_PREDICATE = "https://model_signing/signature/v1.0"
_CURVES = "on the curve P-256, P-384 or P-521, in PEM format"


@dataclass(frozen=True)
class Signature:
    """What model.sig states, whether it is true or not."""

    key: str  # SHA-256 of the public key, in PEM format
    files: dict[str, str]  # name -> SHA-256


def sign(folder: Path, private_key: Path, force: bool = False) -> Signature:
    """Write model.sig into a run folder. Only `force` replaces an existing one."""
    from model_signing import hashing, signing

    read_undamaged(folder)
    if private_key.resolve().is_relative_to(folder.resolve()):
        raise ReproError(
            f"the private key {private_key} is in the run folder, which others get; move it elsewhere"
        )
    path = folder / SIGNATURE
    if path.exists() and not force:
        raise ReproError(f"{folder} is already signed; --force replaces {path}")
    _digests(folder)  # which refuses what cannot be signed
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=_existing(private_key))
    except _unusable() as error:
        encrypted = "encrypted" in str(error)
        reason = "it is encrypted" if encrypted else f"it is not a private key {_CURVES}"
        raise ReproError(
            f"the private key {private_key} cannot be used: {reason}; make one with: "
            "openssl ecparam -genkey -name prime256v1 -noout -out NEW.pem"
        ) from None
    covered = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch, SIGNATURE)
        config.set_hashing_config(covered).sign(folder.resolve(), written)
        try:
            write_atomically(path, written.read_bytes())
        except OSError as error:
            raise ReproError(f"cannot write {path}: {error.strerror}") from None
    return read_signature(folder)


def differences(folder: Path, public_key: Path) -> list[str]:
    """Return one sentence for each reason why the folder is not what the key's owner signed."""
    from model_signing import verifying

    path = folder / SIGNATURE
    signature = read_signature(folder)
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=_existing(public_key))
        key = _fingerprint(public_key)
    except _unusable():
        raise ReproError(
            f"the public key {public_key} cannot be used: it is not a public key {_CURVES}; extract one "
            "from the private key with: openssl ec -in PRIVATE.pem -pubout -out NEW.pub"
        ) from None
    if signature.key != key:
        return [
            f"{path} was made with another key than {public_key}: "
            f"the SHA-256 of its public key is {signature.key}, not {key}"
        ]
    try:
        config.set_hashing_config(_AfterTheSignature()).verify(folder, path)
    except _SignatureHolds:
        return list(_changes(signature.files, _digests(folder)))
    except _unusable():
        pass
    raise ReproError(
        f"{path} is damaged or forged: its signature does not fit its content; get it again "
        "from the person who signed the run"
    )


def read_signature(folder: Path) -> Signature:
    """Return what a folder's model.sig states. Raises ReproError if it is missing or damaged."""
    path = folder / SIGNATURE
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        hint = f"it has no {SIGNATURE}; sign it with: reproml sign {folder} --key FILE"
        reason = hint if folder.is_dir() else "there is no such folder"
        raise ReproError(f"{folder} is not a signed run: {reason}") from None
    except OSError as error:
        raise ReproError(f"cannot read {path}: {error.strerror}") from None
    try:
        bundle = json.loads(raw)
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        statement = json.loads(payload)
        predicate = statement["predicate"]
        files = {entry["name"]: entry["digest"] for entry in predicate["resources"]}
        algorithms = {entry["algorithm"] for entry in predicate["resources"]}
        kind = statement["predicateType"], predicate["serialization"]["method"], algorithms
        key = bundle["verificationMaterial"]["publicKey"]["hint"]
        texts = all(isinstance(text, str) for text in (key, *files, *files.values()))
        if not texts or kind != (_PREDICATE, "files", {"sha256"}):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ReproError(
            f"{path} is damaged, or not a signature of SHA-256 hashes of files that was made with a key "
            "pair; check signatures of other kinds with: model_signing verify"
        ) from None
    return Signature(key, files)


class _SignatureHolds(Exception):
    """The key's owner made the signature, whatever the files are."""


class _AfterTheSignature:
    """Takes the place of the package's hashing of files, which it begins once the signature holds.

    The package reports all differences in a single text, and leaves out files that the signature ignores.
    """

    def add_ignored_paths(self, **_: Any) -> None:
        """Ignore no path."""

    def hash(self, *_: Any, **__: Any) -> None:
        """Return to `differences`, which compares the files."""
        raise _SignatureHolds


def _changes(signed: dict[str, str], found: dict[str, str]) -> list[str]:
    changes = []
    for name, sha256 in sorted(signed.items()):
        if name not in found:
            changes.append(f"{name} is missing: it was signed with the SHA-256 {sha256}")
        elif found[name] != sha256:
            changes.append(
                f"{name} was changed after it was signed: its SHA-256 is {found[name]}, not {sha256}"
            )
    return changes + [
        f"{name} is not signed: it was added after the signature"
        for name in found
        if name not in signed
    ]


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in the folder but model.sig, by its path."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in files_below(folder)
        if path != folder / SIGNATURE
    }


def _fingerprint(public_key: Path) -> str:
    """Return what the package writes into a signature to name its key."""
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_public_key(public_key.read_bytes())
    pem = key.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _existing(key: Path) -> Path:
    try:
        read_regular(key)
    except OSError as error:
        raise ReproError(f"cannot read the key {key}: {error.strerror}") from None
    return key


def _unusable() -> tuple[type[Exception], ...]:
    """Return the errors with which the package refuses keys and signatures."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    others = AttributeError, IndexError, KeyError, TypeError, ValueError
    return InvalidSignature, UnsupportedAlgorithm, *others
