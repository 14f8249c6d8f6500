from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import resource
import shlex
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reproml import cli, report
from reproml.cli import main
from reproml.diff import compare
from reproml.diff.ulps import Distance
from reproml.errors import ReproError
from reproml.evidence.provenance import read_provenance
from reproml.pipeline import golden
from reproml.pipeline import run as runs
from reproml.pipeline.run import TRACE, Recording, Run, perform, reserve_run_folder
from tests import browser as browsers
from tests import tiny
from tests.evidence.statements import rewrite, save_run

TINY = ["--recipe", "tiny.toml"]
FOLDER = Path("runs/tiny")


@pytest.fixture(autouse=True)
def at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with the recipe, the run and its golden file."""
    monkeypatch.chdir(tmp_path)
    tiny.toml(tmp_path)
    save_run(FOLDER)
    golden.write_golden(tiny.run().items, golden.golden_path("tiny"), force=False)
    return tmp_path


@functools.cache
def traced(seed: int, numerics: str) -> tuple[Run, bytes]:
    """Return a run and its trace of level step."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TRACE
        result = perform(tiny.recipe(seed), numerics=numerics, recording=Recording(trace=path))
        return result, path.read_bytes()


def save_traced(folder: Path, seed: int = 1, numerics: str = "exact") -> Path:
    result, content = traced(seed, numerics)
    with reserve_run_folder(folder) as save:
        trace = folder.with_name("trace")
        trace.write_bytes(content)
        save(dataclasses.replace(result, trace=trace))
    return folder


def page(folder: Path = FOLDER, **more) -> report.Page:
    return report.build_page(folder, "tiny.toml", **more)


class Parsed(HTMLParser):
    """Checks that every element is closed where it was opened; gathers tags and text."""

    VOID = {"meta", "img", "br", "wbr", "link"}
    SHAPES = {"line", "circle", "polyline"}  # of SVG: self-closing

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == [] and self.rawdata == ""

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"duplicate attribute of {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in self.SHAPES, f"<{tag}/> closes nothing in HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- the verdict ----------------------------------------------------------------------------------


def test_golden_run_is_verified():
    built = page()
    assert built.verified is True
    text = Parsed(built.html).text
    assert f"All {len(tiny.run().items)} items match golden/tiny.json, to the last bit." in text
    assert "Verified" in text and "Not the golden run" not in text


def test_mismatch_shows_both_values():
    items = {**tiny.run().items, "epoch.1.loss": 0.5, "train.correct": 1}
    golden.write_golden(items, golden.golden_path("tiny"), force=True)
    built = page()
    assert built.verified is False
    text = Parsed(built.html).text
    assert "Not the golden run" in text and "Verified" not in text
    assert f"2 of {len(items)} items differ from golden/tiny.json" in text
    assert f"epoch.1.loss0.5{tiny.run().items['epoch.1.loss']}" in text


def test_damaged_weights_are_not_verified():
    raw = bytearray(tiny.run().weights)
    raw[-1] ^= 1
    (FOLDER / "weights.safetensors").write_bytes(raw)
    built = page()
    assert built.verified is False
    assert hashlib.sha256(raw).hexdigest() in Parsed(built.html).text


def test_invalid_epoch_names_differ():
    items = {**tiny.run().items, "epoch.x.state_dict.sha256": "ab", "epoch.1.loss": NASTY}
    (FOLDER / "metrics.json").write_text(runs.items_json(items))
    built = page()
    assert built.verified is False
    assert "epoch.x.state_dict.sha256" in Parsed(built.html).text


def test_altered_metrics_are_not_verified():
    items = {**tiny.run().items, "test.correct": 297}
    (FOLDER / "metrics.json").write_text(runs.items_json(items))
    built = page()
    assert built.verified is False
    assert "test.correct in runs/tiny/metrics.json" in Parsed(built.html).text
    golden.golden_path("tiny").unlink()
    assert page().verified is False
    assert "Not what the run recorded" in page().html


def test_loss_that_is_no_number_is_not_drawn():
    items = {**tiny.run().items, "epoch.1.loss": "<b>", "epoch.2.loss": None}
    (FOLDER / "metrics.json").write_text(runs.items_json(items))
    built = page()
    assert built.verified is False and "No value is finite" in built.html
    assert "&lt;b&gt;" in built.html


def test_missing_golden_file_is_reported():
    golden.golden_path("tiny").unlink()
    built = page()
    assert built.verified is None
    assert "No golden file to compare with" in built.html and "Verified" not in built.html


# --- the rest of the page ---------------------------------------------------------------------------


def test_page_shows_figures_of_run():
    text = Parsed(page().html).text
    items: dict[str, Any] = dict(tiny.run().items)
    for part, name in (("test", "test set"), ("train", "training set")):
        correct, total = items[f"{part}.correct"], items[f"{part}.total"]
        assert f"correct in the {name}: {correct:,} of {total:,}" in text
        assert f"{100 * correct / total:.2f} %" in text
    assert str(items["epoch.1.loss"]) in text and str(items["epoch.2.loss"]) in text
    assert f"bytes of weights{len(tiny.run().weights):,}" in text
    assert "train.batch_size500" in text and tiny.run().record["machine"]["cpu"] in text


def test_every_hash_has_command_that_checks_it(capsys):
    """The output of every command contains its hash."""
    assert checked_hashes(page().html, capsys) == sum(
        name.endswith(".sha256") for name in tiny.run().items
    )


def test_native_run_shows_only_hashes_with_commands(capsys):
    save_traced(FOLDER, numerics="native")
    names = [name for name in tiny.run().items if name.endswith(".sha256")]
    theirs = [name for name in names if name.startswith(("data.", "epoch.", "weights."))]
    assert checked_hashes(page().html, capsys) == len(theirs) < len(names)


def checked_hashes(html: str, capsys: Any) -> int:
    """Run the command of every hash, check that it prints the hash, and return their number."""
    entries = re.findall(
        r'<div class="hash">.*?</button></div>\n.*?</button></div></div>', html, re.S
    )
    compared = {}
    for entry in entries:
        sha256, command = (Parsed(code).text for code in re.findall("<code.*?</code>", entry))
        if command.startswith("sha256sum "):
            shown = subprocess.run(shlex.split(command), capture_output=True, text=True).stdout
        else:
            python, minus_m, module, *arguments = shlex.split(command)
            assert (python, minus_m, module) == ("python", "-m", "reproml")
            if command not in compared:
                assert main(arguments) == 0
                compared[command] = capsys.readouterr().out
            shown = compared[command]
        assert sha256 in shown, command
    return len(entries)


def evidence(folder: Path = FOLDER) -> dict[str, str]:
    return dict(report.contents(folder, None, None, None)["evidence"])


def test_page_shows_provenance_signature_and_reproduction(monkeypatch, capsys):
    shown = evidence()
    stated = read_provenance(FOLDER)
    assert stated.sha256 in shown["provenance"] and stated.builder in shown["provenance"]
    assert shown["signature"] == "not signed"
    assert shown["reproduction"] == "not compared with a run of another machine"
    save_run(Path("runs/other"), builder="another")
    assert main(["reproduced", str(FOLDER), "runs/other"]) == 0
    assert (
        evidence()["reproduction"]
        == f"by 2 builders: {stated.builder}, urn:reproml:builder:another"
    )
    (FOLDER / "model.sig").write_text("{}")
    assert evidence()["signature"] == "model.sig, not checked for this page"
    assert main(["report", "--run", str(FOLDER)]) == 0
    text = Parsed(Path("runs/tiny.html").read_text()).text
    assert "by 2 builders" in text and stated.sha256 in text
    assert "python -m reproml verify --run runs/tiny --signature PUBLIC_KEY.pem" in text


def test_commands_of_the_page_check_the_run(monkeypatch, capsys):
    save_run(FOLDER, builder="another")
    first, train, compare_runs = (c for _, c in report.contents(FOLDER, None, None, None)["checks"])
    printed = subprocess.run(shlex.split(first), capture_output=True, text=True).stdout
    assert printed.split()[0] == tiny.run().items["weights.safetensors.sha256"]
    for command in train, compare_runs:
        assert command.startswith("python -m reproml ")
        assert main(shlex.split(command)[3:]) == 0
    assert "reproduced by 2 builders" in capsys.readouterr().out
    assert evidence()["reproduction"].startswith("by 2 builders: ")


def test_page_names_what_is_wrong_with_the_evidence():
    save_run(Path("runs/other"), builder="another")
    assert main(["reproduced", str(FOLDER), "runs/other"]) == 0
    path = FOLDER / "provenance.json"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"digits", b"digitz"))
    shown = evidence()
    assert "provenance.json is damaged" in shown["provenance"]
    assert "provenance.json is damaged" in shown["reproduction"]
    rewrite(path, lambda v: v["subject"][0]["digest"].update(sha256="0" * 64))
    shown = evidence()
    assert shown["provenance"] == f"provenance.json states other weights: {'0' * 64}"
    assert "is about other weights" in shown["reproduction"]
    path.unlink()
    assert evidence()["provenance"].startswith("no provenance.json")
    assert len(report.contents(FOLDER, None, None, None)["checks"]) == 1


def test_most_wrong_agree_with_golden_predictions():
    probabilities = report.predict(tiny_model(), tiny.prepared().test.x)
    predicted = probabilities.argmax(1).astype("<i8").tobytes()
    right = tiny.run().items["test.predictions.int64le.sha256"]
    assert hashlib.sha256(predicted).hexdigest() == right
    parsed = Parsed(page().html)
    chosen = report.most_wrong(tiny.prepared().test.y, probabilities, 12)
    assert [str(i["alt"]).split(":")[0] for i in parsed.all("img")] == [
        f"Test image {i}" for i in chosen
    ]


def tiny_model():
    return runs.load_run_model(FOLDER, tiny.recipe(), tiny.prepared(), "exact")[0]


def contents(**changes: Any) -> dict[str, Any]:
    """Return what the page of the run shows, with some of it replaced."""
    return {**report.contents(FOLDER, "tiny.toml", None, None), **changes}


def test_perfect_run_shows_no_wrong_images():
    test: Any = SimpleNamespace(labels=np.array([1, 0]))
    wrong = report._most_wrong(test, 17, np.array([[0.2, 0.8], [1, 0]]))
    assert wrong == [] and "Not one test image" in report.render(contents(most_wrong=wrong))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_confusion_counts_pairs(pairs):
    labels, predicted = (np.array([p[side] for p in pairs], np.int64) for side in (0, 1))
    counts = report.confusion_counts(labels, predicted, 4)
    assert {(i, j): n for (i, j), n in np.ndenumerate(counts)} == {
        (i, j): pairs.count((i, j)) for i in range(4) for j in range(4)
    }


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 4), min_size=3, max_size=3))),
    st.integers(0, 5),
)
def test_most_wrong_is_sorted_by_probability(samples, count):
    labels = np.array([label for label, _ in samples], np.int64)
    probabilities = np.array([p for _, p in samples], np.float32).reshape(-1, 3) / 8
    wrong = [(-max(p), i) for i, (label, p) in enumerate(samples) if p.index(max(p)) != label]
    assert report.most_wrong(labels, probabilities, count) == [i for _, i in sorted(wrong)[:count]]


@given(arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30))))
def test_png_holds_the_pixels(grey):
    content = report.png(grey)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, rest = {}, content[8:]
    while rest:
        (size,) = struct.unpack(">I", rest[:4])
        kind, body = rest[4:8], rest[8 : 8 + size]
        assert struct.unpack(">I", rest[8 + size : 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], rest = body, rest[12 + size :]
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *format_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (height, width) == grey.shape and format_ == [8, 0, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:] == grey).all()


def test_page_is_deterministic():
    assert page().html == page().html


def test_step_losses_of_traced_run_are_drawn():
    assert page().html.count("<polyline") == 1
    save_traced(FOLDER)
    html = page().html
    losses = [json.loads(line) for line in traced(1, "exact")[1].splitlines()]
    first, *_, last = [float(e["loss"][0]) for e in losses if e.get("entry") == "step"]
    assert html.count("<polyline") == 2 and f"each step, from {first:.4g} to {last:.4g}" in html
    (curve,) = re.findall('<polyline class="curve faint" points="([^"]*)"', html)
    assert len(curve.split()) == 6  # steps
    (FOLDER / TRACE).write_bytes(traced(1, "exact")[1].replace(b'"step":3', b'"step":4'))
    with pytest.raises(ReproError, match="is damaged"):
        page()


@pytest.mark.parametrize("other", [Path("runs/other"), Path("runs/other/trace.jsonl")])
def test_page_shows_first_divergence_of_two_runs(other):
    """The page has everything that diff prints, and the growth as a curve."""
    save_traced(FOLDER)
    save_traced(Path("runs/other"), seed=2)
    found = compare.compare(FOLDER / TRACE, Path("runs/other/trace.jsonl"))
    assert found is not None and found.differing and found.growth[-1][1] > 1000
    built = page(other=other)
    text = Parsed(built.html).text
    assert built.differs and built.verified is True
    assert (
        built.compared == compare.headline(found, str(FOLDER), str(other))
        and built.compared in text
    )
    assert "First divergence" in text and "different recipes: seed (1 and 2)" in text
    ends = [math.log2(1 + ulps) for _, ulps in (found.growth[0], found.growth[-1])]
    assert "difference, from {:.4g} to {:.4g}".format(*ends) in built.html
    assert "First divergence" not in page().html


def test_every_fact_of_divergence_is_shown():
    d = Distance(3, 2, 64)
    operator = compare.Operator("aten.mm", "train.py:10", "MmBackward0", True, d, "float32[8, 8]")
    found = compare.Divergence(
        "trace", "gradients", 2, 7, "1.weight", (1, 4), d, operator, [(7, 0), (8, 0)],
        ("threads", "the order of a sum"), notes=["a.trace is truncated after entry 9"],
    )  # fmt: skip
    html = divergence_page(found, "a and b diverge")
    text = Parsed(html).text
    assert "a and b diverge" in text and "likely causethe order of a sum" in text
    for shown in ("aten.mm", "train.py:10", "MmBackward0", "float32[8, 8]", "at most 3 ulps",
                  "2 of 64 elements", "notea.trace is truncated after entry 9"):  # fmt: skip
        assert shown in text
    assert html.count("<svg") == 1  # the losses: nothing grew
    item = compare.Divergence("run", "item", item="test.correct", values=("9", "8"))
    assert "values9 and 8" in Parsed(divergence_page(item, "a and b diverge")).text


def divergence_page(found: compare.Divergence, compared: str) -> str:
    facts, growth = report.divergence_facts(found), report.growth_plot(found)
    return report.render(contents(differs=True, compared=compared, divergence=facts, growth=growth))


def test_equal_runs_have_no_divergence():
    save_run(Path("runs/other"))
    built = page(other=Path("runs/other"))
    assert "runs/tiny and runs/other: no difference" in Parsed(built.html).text
    assert not built.differs and "First divergence" not in built.html


def test_native_run_has_no_golden_verdict():
    save_traced(FOLDER, numerics="native")
    save_traced(Path("runs/exact"))
    built = page(other=Path("runs/exact"))
    text = Parsed(built.html).text
    assert built.verified is None and built.differs
    assert "Native numerics: no golden file" in text and "First divergence" in text
    assert "python -m reproml matrix --recipe tiny.toml" in text and "Verified" not in text
    assert "exact arithmetic on one side, native on the other" in text
    items: dict[str, Any] = dict(traced(1, "native")[0].items)
    assert str(items["epoch.2.loss"]) in text and items["weights.safetensors.sha256"] in text
    raw = bytearray(traced(1, "native")[0].weights)
    raw[-1] ^= 1
    (FOLDER / "weights.safetensors").write_bytes(raw)
    with pytest.raises(ReproError, match="is damaged"):
        page()


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_and_enclose_range(low, span):
    high = low + span
    if high - low > 1e-6:
        ticks = report.ticks(low, high)
        assert 2 <= len(ticks) <= 7 and ticks == sorted(set(ticks))
        slack = 1e-9 * max(abs(low), abs(high))
        assert ticks[0] <= low + slack and high - slack <= ticks[-1]


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [math.nan],
        [math.inf, 1.0],
        [0.5],
        [0.0, 0.0],
        [1e300, 1e-300],
        [-9e304, 9e304],
        [1e-13],
        [5e-324],
    ],
)
def test_only_finite_losses_are_drawn(losses):
    html = report.render(contents(loss_plot=report.loss_plot(losses, ())))
    Parsed(html)
    numbers = re.findall(r'(?:x\d?|y\d?|cx|cy|points)="([^"]*)"', html)
    assert not any("nan" in n or "inf" in n for n in numbers)
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert ("No value is finite" in html) == (not finite) and html.count("<circle") == len(finite)


@pytest.mark.parametrize("loss", [1e308, -1e308, 1.7e308])
def test_report_on_huge_losses_is_written(loss, capsys):
    items = {**tiny.run().items, "epoch.1.loss": loss, "epoch.2.loss": -loss}
    (FOLDER / "metrics.json").write_text(runs.items_json(items))
    assert main(["report", *TINY]) == 1
    assert capsys.readouterr().out == "wrote runs/tiny.html: not the golden run\n"


def test_step_loss_may_be_a_fingerprint():
    """A trace has the fingerprint of a loss of several elements."""
    assert report._number("0.5") == 0.5 and math.isnan(report._number("00ab00ab00ab00ab"))


# --- the page is well-formed, safe and readable----------------------------------------------------


def test_page_is_well_formed_and_accessible():
    save_traced(FOLDER)
    html = page(other=save_traced(Path("runs/other"), seed=2)).html
    parsed = Parsed(html)
    assert html.startswith("<!doctype html>\n") and parsed.all("html") == [{"lang": "en"}]
    assert parsed.all("img") and all(i["alt"] for i in parsed.all("img"))
    assert parsed.all("svg") and all(
        s["role"] == "img" and s["aria-label"] for s in parsed.all("svg")
    )
    assert parsed.all("th") and all(t["scope"] in ("row", "col") for t in parsed.all("th"))
    assert parsed.all("button") and all(b["aria-label"] for b in parsed.all("button"))
    headings = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1 and headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(headings, headings[1:]))


def test_page_refers_to_no_other_file():
    html = page().html
    assert not re.search(r"https?:|url\(|@import|srcset|<link|<iframe", html)
    for tag, attributes in Parsed(html).tags:
        assert "href" not in attributes
        assert tag != "script" or "src" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:")


NASTY = '<b onclick="x">&amp;\'{{name}}</script><!--'


def test_every_text_is_escaped(at_work):
    folder = at_work / NASTY.replace("/", "∕")
    save_run(folder)
    record = json.loads((folder / "run.json").read_text())
    record["machine"]["cpu"] = record["variables"]["MKL_CBWR"] = NASTY
    record["recipe"][NASTY] = NASTY
    record["times"]["started"] = NASTY
    (folder / "run.json").write_text(json.dumps(record))
    other = folder.with_name(folder.name + "2")
    save_run(other)
    (other / "metrics.json").write_text(runs.items_json({**tiny.run().items, NASTY: NASTY}))
    html = page(folder, other=other).html
    assert len(Parsed(html).all("b")) == 0 and Parsed(html).text.count(NASTY) >= 6
    plain = Parsed(page().html)
    assert len(Parsed(html).all("script")) == len(plain.all("script")) == 1


def test_control_characters_are_shown_as_text(at_work):
    folder = at_work / os.fsdecode(b"\xff\x1b[2K")
    save_run(folder)
    record = json.loads((folder / "run.json").read_text())
    record["machine"]["cpu"] = "\u202egnp.exe\x9b"
    (folder / "run.json").write_text(json.dumps(record))
    html = page(folder).html
    html.encode()
    assert r"\udcff\x1b[2K" in html and r"\u202egnp.exe\x9b" in html
    assert all(c.isprintable() or c == "\n" for c in html)


def test_record_without_times_or_machine_has_page():
    """The record that Nix makes has only what an evaluation needs."""
    record = json.loads((FOLDER / "run.json").read_text())
    kept = {name: record[name] for name in ("recipe.sha256", "numerics")}
    for times in ({}, {"times": "soon"}, {"times": {"data_ready": "x", "trained": "y"}}):
        (FOLDER / "run.json").write_text(json.dumps({**kept, **times}))
        assert page().verified is True


# --- the file and the command line ----------------------------------------------------------------


def test_report_is_written_beside_run(capsys, at_work):
    assert main(["report", *TINY]) == 0
    assert capsys.readouterr().out == "wrote runs/tiny.html: verified\n"
    assert sorted(os.listdir("runs")) == ["tiny", "tiny.html"]
    assert Path("runs/tiny.html").read_text(encoding="utf-8") == page().html
    assert main(["train", *TINY]) == 0  # the run folder has no other files, so it may be replaced
    capsys.readouterr()
    arguments = ["report", *TINY, "--run", "runs/tiny", "--out", "new/page.html", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "new/page.html", "verified": True}
    assert "Verified" in Path("new/page.html").read_text(encoding="utf-8")


def test_report_of_dot_is_written_beside_run(capsys, at_work, monkeypatch):
    monkeypatch.chdir(FOLDER)
    assert main(["report", "--recipe", "../../tiny.toml", "--run", "."]) == 0
    assert (at_work / "runs/tiny.html").is_file() and len(os.listdir(".")) == 5
    assert main(["report", "--run", "/"]) == 2
    assert "/ is not a complete run" in capsys.readouterr().err


def test_report_takes_recipe_of_the_run(capsys, at_work):
    """Without --recipe the one that run.json records, which has no other file here."""
    (at_work / "tiny.toml").unlink()
    assert main(["report", "--run", "runs/tiny"]) == 0
    assert capsys.readouterr().out == "wrote runs/tiny.html: verified\n"
    html = Path("runs/tiny.html").read_text(encoding="utf-8")
    assert "python -m reproml verify --run runs/tiny<" in html
    assert "python -m reproml data --recipe tiny.toml<" in html


def test_exit_status_is_one_for_other_run(capsys):
    golden.write_golden(
        {**tiny.run().items, "test.correct": 1}, golden.golden_path("tiny"), force=True
    )
    assert main(["report", *TINY]) == 1
    assert capsys.readouterr().out == "wrote runs/tiny.html: not the golden run\n"


def test_bad_input_writes_no_page(capsys, at_work):
    def refused(*arguments: str) -> str:
        assert main(["report", *TINY, *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return str(captured.err)

    assert "runs/none does not exist" in refused("--run", "runs/none")
    (at_work / "file").write_text("")
    assert "cannot write the report file/page.html" in refused("--out", "file/page.html")
    assert "cannot write the report runs" in refused("--out", "runs")
    (at_work / "golden/tiny.json").write_text("{}")
    assert "definitions.version" in refused()
    (FOLDER / "weights.safetensors").write_bytes(tiny.run().weights[:100])
    assert "truncated" in refused()
    (FOLDER / "weights.safetensors").write_bytes(tiny.run().weights)
    (FOLDER / "metrics.json").unlink()
    assert "it has no metrics.json" in refused()
    assert sorted(os.listdir("runs")) == ["tiny"]


def test_diff_prints_headline_and_sets_exit_status(capsys):
    save_traced(Path("runs/other"), seed=2)
    assert main(["report", *TINY, "--diff", "runs/tiny"]) == 0
    assert capsys.readouterr().out == (
        "wrote runs/tiny.html: verified\nruns/tiny and runs/tiny: no difference\n"
    )
    assert main(["report", *TINY, "--diff", "runs/other"]) == 1
    wrote, compared = capsys.readouterr().out.splitlines()
    assert wrote == "wrote runs/tiny.html: verified"
    assert compared.startswith(
        "runs/tiny and runs/other diverge: an item, first recipe.canonical_json"
    )
    assert main(["report", *TINY, "--diff", "runs/other", "--json"]) == 1
    result = {"report": "runs/tiny.html", "verified": True, "differ": True}
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("runs/other/trace.jsonl", "runs/tiny has no trace.jsonl to compare with"),
        ("runs", "cannot read runs/weights.safetensors"),
        ("none", "runs/tiny has no trace.jsonl to compare with none"),
    ],
)
def test_incomparable_input_is_reported_in_one_sentence(capsys, other, words):
    save_traced(Path("runs/other"), seed=2)
    assert main(["report", *TINY, "--diff", other]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not Path("runs/tiny.html").exists()


def test_full_disk_keeps_older_page(at_work):
    report.write_page("older", at_work / "page.html")
    before = sorted(os.listdir(at_work))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(ReproError, match="cannot write the report"):
            report.write_page("new" * 100, at_work / "page.html")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (at_work / "page.html").read_text() == "older"
    assert sorted(os.listdir(at_work)) == before


def test_help_names_default_page(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "RUN.html" in capsys.readouterr().out and cli.report_command.__doc__


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[browsers.Browser]:
    if browsers.find() is None:
        pytest.skip("needs Chromium or Chrome on the PATH")
    with browsers.Browser() as running:
        yield running


def everything(at_work: Path) -> Path:
    """Write a page with every section and with very long names, and return its path."""
    folder = save_traced(at_work / ("long-" * 40))
    other = save_traced(at_work / ("other" * 40), seed=2)
    items = {**tiny.run().items, "epoch.1.loss": 0.5, "x" * 90: "y" * 90}
    golden.write_golden(items, golden.golden_path("tiny"), force=True)
    run, out = ["--run", str(folder), "--diff", str(other)], ["--out", str(at_work / "page.html")]
    assert main(["report", *TINY, *run, *out]) == 1
    return at_work / "page.html"


OVERFLOW = """
[...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.right > document.documentElement.clientWidth + .5 || box.left < -.5;
}).map(e => e.outerHTML.slice(0, 80))
"""
# WCAG 2, 1.4.3: the contrast of every text with its background.
CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (e) => {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    return colour[3] ? colour : behind(e.parentElement);
  };
  const texts = [...document.querySelectorAll('body *')].filter(e =>
    !['SCRIPT', 'TITLE'].includes(e.tagName) && e.tagName !== 'title' &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  return texts.map(e => {
    const style = getComputedStyle(e);
    const [a, b] = [light(rgb(e.closest('svg') ? style.fill : style.color)), light(behind(e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.outerHTML.slice(0, 80)];
  });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 700, 1280])
def test_page_fits_is_legible_loads_nothing(browser, at_work, width, scheme):
    path = everything(at_work)
    browser.open(path, width, scheme)
    headings = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings[0] == "First divergence"
    assert browser.evaluate("document.querySelectorAll('svg').length") == 2
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OVERFLOW) == []
    contrasts = browser.evaluate(CONTRAST)
    assert len(contrasts) > 100 and [c for c in contrasts if c[0] < 4.5] == []
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 27)"
    assert dark == (scheme == "dark")
    sizes = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
    assert len(sizes) == 12 and all(size == [True, 8] for size in sizes)
    complaints = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}
    assert [e for e in browser.events if e.get("method") in complaints] == []
    asked = [e["params"]["request"]["url"] for e in browser.events
             if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.parametrize("closed", [False, True], ids=["clipboard", "selection"])
def test_button_copies_hash_beside_it(browser, at_work, closed):
    """A real mouse click copies into the real clipboard, also where scripts may not write to it."""
    report.write_page(page().html, at_work / "page.html")
    browser.open(at_work / "page.html", 390)
    browser.call("Page.bringToFront")
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    browser.evaluate("navigator.clipboard.writeText('nothing yet')")
    if closed:
        browser.evaluate(
            "navigator.clipboard.writeText = () => Promise.reject(new Error('closed'))"
        )
    browser.click(".hash button")
    wait = "new Promise(r => setTimeout(() => r(document.querySelector('.hash button').textContent), 200))"
    assert browser.evaluate(wait) == "Copied"
    copied = browser.evaluate("navigator.clipboard.readText()")
    assert copied == tiny.run().items["weights.safetensors.sha256"]


def test_browser_blocks_and_logs_outside_image(browser, at_work):
    """The test above can fail: the browser refuses such an image and logs it."""
    html = page().html.replace("</main>", '<img src="http://127.0.0.1:9/x.png" alt="x"></main>')
    report.write_page(html, at_work / "page.html")
    browser.open(at_work / "page.html", 390)
    logged = [e for e in browser.events if e.get("method") == "Log.entryAdded"]
    assert any("Content Security Policy" in e["params"]["entry"]["text"] for e in logged)


def test_too_wide_or_pale_text_is_detected(browser, at_work):
    html = page().html.replace("<main>", '<main><p style="width: 999px; color: #999">wide</p>')
    report.write_page(html, at_work / "page.html")
    browser.open(at_work / "page.html", 390)
    assert len(browser.evaluate(OVERFLOW)) >= 1
    assert [c[1] for c in browser.evaluate(CONTRAST) if c[0] < 4.5] != []
