"""Documents name files that exist, and the index names every document."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.conftest import SLOW_FILES
from tests.test_package import project_files

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PATH = r"`((?:reproml|tests|docs|verification|benchmarks|tools|nix|examples|gallery|golden)/[\w/.-]+\.\w+)`"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_and_paths_exist(document):
    text = document.read_text("utf-8")
    for target in re.findall(r"\]\(([^):#]+)(?:#[\w-]+)?\)", text):
        assert (document.parent / target).exists(), target
    for target in re.findall(PATH, text):
        assert (ROOT / target).exists() or re.search("RECIPE|NAME", target), target


def test_index_names_every_document():
    index = (ROOT / "docs/README.md").read_text("utf-8")
    for document in ROOT.glob("docs/**/*.md"):
        if document.name != "README.md":
            assert f"({document.relative_to(ROOT / 'docs')})" in index, document


def test_layout_names_every_folder_and_family():
    layout = (ROOT / "docs/layout.md").read_text("utf-8")
    folders = [path for path in ROOT.glob("reproml/**/") if list(path.glob("*.py"))]
    families = [path for path in ROOT.glob("reproml/arithmetic/operators/[a-z]*.py")]
    assert len(folders) > 10 and len(families) > 10
    for path in folders:
        assert f"{path.name}/" in layout, path
    for path in families:
        assert f"`{path.stem.split('_')[0]}" in layout, path


def test_picture_shows_the_golden_hashes():
    golden = json.loads((ROOT / "golden/digits-mlp.json").read_text("utf-8"))
    picture = (ROOT / "docs/pictures/pipeline.svg").read_text("utf-8")
    for item in ("recipe.canonical_json.sha256", "weights.safetensors.sha256"):
        assert golden[item][:8] in picture


# Words that a reader of PyTorch's or NumPy's documentation would stumble over (CONTRIBUTING.md).
STUMBLING = re.compile(
    r"\b(tells?|told|says|said|anew|whereof|dealt|unsettled|settle[sd]?|parting|lent|wish)\b"
    r"|\bcomes? to (it|us|the)\b|\bgo(es)? on\b|\bhas the last word\b|\beach so many\b|\bno sooner\b"
    r"|^ *# [Oo]f |\"\"\"Of |/\* Of "
)
LITERAL = ('"settled"', "['settled']")  # the key of a results file


def test_no_file_uses_unusual_english():
    suffixes = (".py", ".c", ".h", ".md", ".nix", ".html", ".toml")
    listed = [name(path) for path in project_files() if path.suffix in suffixes]
    found = [
        f"{file}:{number}: {line.strip()}"
        for file in listed
        if file != "tests/test_documents.py"
        for number, line in enumerate((ROOT / file).read_text("utf-8").splitlines(), 1)
        if STUMBLING.search(line) and not any(word in line for word in LITERAL)
    ]
    assert found == []


def test_list_of_slow_files_names_files():
    assert SLOW_FILES and all((ROOT / name).exists() for name in SLOW_FILES)
