"""Exports, read by the packages of their formats: an RO-Crate validator, MLflow, Hugging Face's library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from rocrate.rocrate import ROCrate
from rocrate.vocabs import RO_CRATE
from rocrate_validator import services
from rocrate_validator.models import Severity, ValidationSettings
from rocrate_validator.utils.http import HttpRequester

from reproml.cli import main
from reproml.digest import file_sha256
from reproml.evidence.exports import RESULTS
from reproml.pipeline.run import reserve_run_folder
from tests import tiny


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with reserve_run_folder(Path("runs/tiny")) as save:
        save(tiny.run())
    return Path("runs/tiny")


def export(run: Path, form: str, *options: str) -> Path:
    assert main(["export", str(run), "--format", form, *options]) == 0
    return Path(f"runs/tiny-{form}")


# --- RO-Crate --------------------------------------------------------------------------------------


class Context:
    """The answer to a request for RO-Crate's context. The package rocrate has a copy of a newer one."""

    status_code, ok = 200, True
    headers: dict[str, str] = {"Content-Type": "application/ld+json"}
    url = "https://w3id.org/ro/crate/1.1/context"
    text = json.dumps(RO_CRATE)

    def json(self) -> Any:
        return RO_CRATE


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def get(self: Any, url: str, *_: Any, **__: Any) -> Context:
        assert url == Context.url, "the crate needs this address"
        return Context()

    monkeypatch.setattr(HttpRequester, "get", get, raising=False)
    monkeypatch.setattr(HttpRequester, "head", get, raising=False)


def issues(crate: Path, severity: Severity) -> set[str]:
    settings = ValidationSettings(
        rocrate_uri=str(crate),
        profile_identifier="process-run-crate-0.5",
        requirement_severity=severity,
    )
    return {str(issue.message) for issue in services.validate(settings).get_issues()}


def test_the_crate_is_a_process_run_crate(run, offline):
    crate = export(run, "ro-crate")
    assert issues(crate, Severity.REQUIRED) == set()
    unknown = "url|absolute URI|agent|license|author|publisher".split("|")  # a run records none
    for message in issues(crate, Severity.RECOMMENDED):
        assert any(word in message for word in unknown), message


def test_a_crate_without_its_program_is_invalid(run, offline):
    crate = export(run, "ro-crate")
    path = crate / "ro-crate-metadata.json"
    metadata = json.loads(path.read_text())
    for entity in metadata["@graph"]:
        entity.pop("instrument", None)
    path.write_text(json.dumps(metadata))
    assert any("instrument" in message for message in issues(crate, Severity.REQUIRED))


def test_the_crate_describes_every_file(run):
    folder = export(run, "ro-crate")
    crate = ROCrate(folder)
    described = {entity.id: entity["sha256"] for entity in crate.data_entities}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert described == {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in files
        if path.name != "ro-crate-metadata.json"
    }
    (action,) = crate.get_by_type("CreateAction")
    assert action["startTime"] == tiny.run().record["times"]["started"]
    inputs = {entity["name"]: entity.get("value") for entity in action["object"]}
    data = {k: v for k, v in tiny.run().items.items() if k.startswith("data.")}
    assert inputs == {"recipe.toml": None, **data}
    results = {entity["name"] for entity in action["result"]}
    assert results == {path.name for path in run.iterdir()} & RESULTS


def test_the_same_run_gives_the_same_crate(run):
    first = (export(run, "ro-crate") / "ro-crate-metadata.json").read_bytes()
    assert main(["export", str(run), "--format", "ro-crate", "--out", "again"]) == 0
    assert Path("again/ro-crate-metadata.json").read_bytes() == first


# --- model card ------------------------------------------------------------------------------------


def test_hugging_face_reads_the_card(run):
    card = ModelCard.load(export(run, "model-card") / "README.md")
    assert card.data.library_name == "reproml"
    assert card.data.pipeline_tag == "image-classification"
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("digits", "accuracy")
    items = tiny.run().items
    assert result.metric_value == int(str(items["test.correct"])) / int(str(items["test.total"]))
    assert str(items["weights.safetensors.sha256"]) in card.text


# --- MLflow ----------------------------------------------------------------------------------------


def test_mlflow_has_the_run(run):
    export(run, "mlflow", "--out", "store")
    client = MlflowClient(tracking_uri=Path("store").absolute().as_uri())
    experiment = client.get_experiment_by_name("tiny")
    (logged,) = client.search_runs([experiment.experiment_id])
    items = tiny.run().items
    assert logged.info.status == "FINISHED" and logged.info.start_time <= logged.info.end_time
    assert logged.data.params["optimizer.learning_rate"] == "0.001"
    assert logged.data.params["train.epochs"] == "2"
    sha256 = items["weights.safetensors.sha256"]
    assert logged.data.tags["weights.safetensors.sha256"] == sha256
    losses = client.get_metric_history(logged.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses] == [(n, items[f"epoch.{n}.loss"]) for n in (1, 2)]
    accuracy = int(str(items["test.correct"])) / int(str(items["test.total"]))
    assert logged.data.metrics["test.accuracy"] == accuracy
    weights = client.download_artifacts(logged.info.run_id, "weights.safetensors")
    assert file_sha256(Path(weights)) == sha256


def test_a_second_run_joins_the_experiment(run):
    export(run, "mlflow", "--out", "store")
    export(run, "mlflow", "--out", "store")
    client = MlflowClient(tracking_uri=Path("store").absolute().as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_refusals_of_mlflow_are_one_sentence(run, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    capsys.readouterr()
    assert main(["export", str(run), "--format", "mlflow"]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and shown.err.startswith("reproml: MLflow refuses the run: ")
    assert "set MLFLOW_TRACKING_URI, or name a folder" in shown.err
