"""Signatures by the package model-signing, with keys that are made here."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from model_signing import hashing, signing

from reproml.cli import main
from reproml.digest import file_sha256
from reproml.errors import ReproError
from reproml.evidence.signature import differences
from reproml.pipeline.run import SIGNATURE, reserve_run_folder
from tests import tiny

FILES = ["log.txt", "metrics.json", "run.json", "weights.safetensors"]


def write_keys(private: Any, path: Path, password: bytes = b"") -> Path:
    """Write path.pem and path.pub, and return the first."""
    encryption = form.BestAvailableEncryption(password) if password else form.NoEncryption()
    pem = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, encryption)
    public = private.public_key().public_bytes(
        form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(public)
    path.with_suffix(".pem").write_bytes(pem)
    return path.with_suffix(".pem")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    write_keys(ec.generate_private_key(ec.SECP256R1()), folder / "key")
    write_keys(ec.generate_private_key(ec.SECP384R1()), folder / "other")
    return folder


@pytest.fixture(scope="module")
def signed(keys: Path) -> Path:
    """A signed run, which no test changes."""
    with reserve_run_folder(keys / "run") as save:
        save(tiny.run())
    assert main(["sign", str(keys / "run"), "--key", str(keys / "key.pem")]) == 0
    return keys / "run"


@pytest.fixture
def run(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "run"))


@pytest.fixture
def check(
    run: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Verify the signature of `run`, and return the exit status and the one line that is printed."""

    def verify(key: str = "key.pub") -> tuple[int, str]:
        capsys.readouterr()
        status = main(["verify", "--run", str(run), "--signature", str(keys / key)])
        shown = capsys.readouterr()
        printed = shown.err if status == 2 else shown.out
        assert printed.count("\n") == 1 and printed == shown.out + shown.err
        return status, printed

    return verify


def flip(path: Path, position: int = -5) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def edit_bundle(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    bundle = json.loads((run / SIGNATURE).read_text("utf-8"))
    change(bundle)
    (run / SIGNATURE).write_text(json.dumps(bundle), "utf-8")


def edit_statement(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    def in_bundle(bundle: dict[str, Any]) -> None:
        envelope = bundle["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        change(statement)
        envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    edit_bundle(run, in_bundle)


def test_a_signed_run_verifies(check, run):
    status, line = check()
    assert status == 0
    count = len([*run.iterdir()]) - 1  # without model.sig
    assert line.startswith(f"{run}: signature verified, {count} files are as the owner of ")


def test_json_has_key_and_files(run, keys, capsys):
    command = ["verify", "--run", str(run), "--signature", str(keys / "key.pub"), "--json"]
    capsys.readouterr()
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["verified"] is True and result["differences"] == []
    assert {*result["files"], SIGNATURE} == {path.name for path in run.iterdir()}
    weights = tiny.run().items["weights.safetensors.sha256"]
    assert result["files"]["weights.safetensors"] == weights
    assert result["key.sha256"] == file_sha256(keys / "key.pub")


def test_the_package_verifies_it_too(run, keys):
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(run)]
    command += ["--signature", str(run / SIGNATURE), "--public_key", str(keys / "key.pub")]
    assert subprocess.run(command, check=False).returncode == 0
    flip(run / "metrics.json")
    assert subprocess.run(command, check=False).returncode != 0


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_named(check, run, name):
    flip(run / name)
    status, line = check()
    assert status == 1 and line.startswith(f"{name} was changed after it was signed: ")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(check, run, name):
    (run / name).unlink()
    status, line = check()
    assert status == 1 and line.startswith(f"{name} is missing: ")


@pytest.mark.parametrize("name", ["notes.txt", ".gitignore", ".git/config", "sub/model.sig"])
def test_an_extra_file_is_named(check, run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("")
    assert check() == (1, f"{name} is not signed: it was added after the signature\n")


def test_each_of_several_changes_is_named(run, keys, capsys):
    flip(run / "log.txt")
    (run / "run.json").rename(run / "moved.json")
    capsys.readouterr()
    assert main(["verify", "--run", str(run), "--signature", str(keys / "key.pub")]) == 1
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["log.txt", "run.json", "moved.json"]


def test_a_wrong_key_is_named(check, run):
    status, line = check("other.pub")
    assert status == 1 and line.startswith(f"{run / SIGNATURE} was made with another key than ")


def test_a_wrong_key_comes_before_the_files(check, run):
    flip(run / "log.txt")
    assert "another key" in check("other.pub")[1]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"dsseEnvelope": {}}', "\0"])
def test_a_damaged_signature_is_refused(check, run, content):
    (run / SIGNATURE).write_text(content)
    status, line = check()
    assert status == 2 and f"{run / SIGNATURE} is damaged" in line


def content(run: Path) -> tuple[bytes, bytes]:
    """Return statement and signature. Base64 can write the same bytes in several ways."""
    envelope = json.loads((run / SIGNATURE).read_text("utf-8"))["dsseEnvelope"]
    texts = envelope["payload"], envelope["signatures"][0]["sig"]
    statement, signature = map(base64.b64decode, texts)
    return statement, signature


def test_a_changed_byte_of_the_signature_never_verifies(run, keys):
    raw, original = (run / SIGNATURE).read_bytes(), content(run)
    refused = 0
    for position in range(0, len(raw), 7):
        (run / SIGNATURE).write_bytes(raw)
        flip(run / SIGNATURE, position)
        try:
            holds = differences(run, keys / "key.pub") == []
        except ReproError:
            holds = False
        assert not holds or content(run) == original
        refused += not holds
    assert refused > 200


def test_a_forged_statement_is_refused(check, run):
    def state_the_new_hash(statement: dict[str, Any]) -> None:
        flip(run / "log.txt")
        statement["predicate"]["resources"][0]["digest"] = "0" * 64

    edit_statement(run, state_the_new_hash)
    status, line = check()
    assert status == 2 and "is damaged or forged: its signature does not fit" in line


def test_a_signature_with_the_name_of_another_key_is_refused(check, run, keys):
    original = json.loads((run / SIGNATURE).read_text("utf-8"))["verificationMaterial"]
    assert main(["sign", str(run), "--key", str(keys / "other.pem"), "--force"]) == 0
    edit_bundle(run, lambda bundle: bundle.update(verificationMaterial=original))
    status, line = check()
    assert status == 2 and "damaged or forged" in line


def sign_otherwise(run: Path, keys: Path, covered: hashing.Config) -> None:
    (run / SIGNATURE).unlink()
    config = signing.Config().use_elliptic_key_signer(private_key=keys / "key.pem")
    config.set_hashing_config(covered).sign(run, run / SIGNATURE)


def test_a_file_that_the_signature_leaves_out_is_named(check, run, keys):
    covered = hashing.Config().set_ignored_paths(paths=["weights.safetensors", SIGNATURE])
    sign_otherwise(run, keys, covered)
    assert check() == (1, "weights.safetensors is not signed: it was added after the signature\n")


def test_a_signature_of_other_hashes_is_refused(check, run, keys):
    sign_otherwise(run, keys, hashing.Config().use_file_serialization(hashing_algorithm="blake2"))
    assert "check signatures of other kinds with: model_signing verify" in check()[1]
    sign_otherwise(run, keys, hashing.Config().use_shard_serialization(shard_size=1000))
    assert check()[0] == 2


def test_a_signature_without_a_key_pair_is_refused(check, run):
    edit_bundle(run, lambda bundle: bundle.update(verificationMaterial={"certificate": {}}))
    status, line = check()
    assert status == 2 and "model_signing verify" in line


def test_a_missing_signature_is_refused(check, run):
    (run / SIGNATURE).unlink()
    status, line = check()
    assert status == 2 and line.endswith(
        f"no model.sig; sign it with: reproml sign {run} --key FILE\n"
    )
    shutil.rmtree(run)
    assert check() == (2, f"reproml: {run} is not a signed run: there is no such folder\n")


def test_a_link_is_refused(check, run):
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(run / "run.json")
    status, line = check()
    assert status == 2 and f"{run / 'log.txt'} is a link" in line


def refusal(run: Path, key: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["sign", str(run), "--key", str(key), *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_unusable_keys_are_refused(run, keys, check, capsys, tmp_path):
    (run / SIGNATURE).unlink()
    key = rsa.generate_private_key(65537, 2048)
    secret = ec.generate_private_key(ec.SECP256R1())
    for path, reason in {
        write_keys(key, tmp_path / "rsa"): "it is not a private key on the curve P-256",
        write_keys(secret, tmp_path / "secret", b"password"): "it is encrypted",
        keys / "key.pub": "it is not a private key on the curve P-256",
        keys / "none.pem": "No such file",
    }.items():
        assert reason in refusal(run, path, capsys)
    assert not (run / SIGNATURE).exists()


@pytest.mark.parametrize("name", ["key.pem", "none.pub"])
def test_unusable_public_keys_are_refused(check, name):
    status, line = check(name)
    assert status == 2 and name in line


def test_what_is_no_undamaged_run_is_not_signed(run, keys, capsys):
    (run / SIGNATURE).unlink()
    flip(run / "weights.safetensors")
    assert "is damaged" in refusal(run, keys / "key.pem", capsys)
    (run / "weights.safetensors").unlink()
    assert "it has no weights.safetensors" in refusal(run, keys / "key.pem", capsys)
    assert "does not exist" in refusal(run / "none", keys / "key.pem", capsys)


def test_key_in_the_run_folder_is_refused(run, keys, capsys):
    (run / SIGNATURE).unlink()
    (run / "sub").mkdir()
    for name in "key.pem", "sub/key.pem":
        shutil.copy(keys / "key.pem", run / name)
        assert "is in the run folder, which others get" in refusal(run, run / name, capsys)
    assert not (run / SIGNATURE).exists()


def test_name_that_is_not_utf8_is_refused(run, keys, capsys):
    (run / SIGNATURE).unlink()
    Path(os.fsdecode(os.fsencode(run) + b"/\xff.txt")).write_text("x")
    assert "is not UTF-8; rename or delete" in refusal(run, keys / "key.pem", capsys)


def test_only_force_replaces_a_signature(run, keys, check, capsys):
    assert "--force replaces" in refusal(run, keys / "other.pem", capsys)
    assert check()[0] == 0
    assert main(["sign", str(run), "--key", str(keys / "other.pem"), "--force"]) == 0
    assert check("other.pub")[0] == 0 and check()[0] == 1


def test_a_signed_run_is_still_a_run(run, capsys, tmp_path):
    recipe = str(tiny.toml(tmp_path))
    assert main(["train", "--recipe", recipe, "--resume", str(run)]) == 0
    assert "is already a finished run" in capsys.readouterr().out
    assert (run / SIGNATURE).exists()
    assert main(["train", "--recipe", recipe, "--out", str(run)]) == 0
    assert not (run / SIGNATURE).exists()  # another run
