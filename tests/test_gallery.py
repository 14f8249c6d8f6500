"""The scripts of gallery/ are listed; `python -m verification.gallery` reports what differs or fails."""

from __future__ import annotations

import ast
import json
import re

import pytest

from verification import gallery
from verification.subprocesses import ROOT

NAMES = sorted(gallery.SCRIPTS)
SCRIPT = """
import torch
{seed}
model = torch.nn.Linear(2, 1)
model(torch.ones(1, 2)).sum().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
"""


def test_golden_file_and_page_list_every_script():
    golden = json.loads(gallery.GOLDEN.read_text())
    page = (ROOT / "docs/gallery.md").read_text("utf-8")
    assert len(NAMES) >= 15 and sorted(golden) == NAMES
    assert sorted(set(re.findall(r"gallery/(\w+)\.py", page))) == NAMES
    assert all(re.fullmatch("[0-9a-f]{64}", x) for found in golden.values() for x in found)


@pytest.mark.parametrize("name", NAMES)
def test_script_is_short_and_without_reproml(name):
    source = gallery.SCRIPTS[name].read_text("utf-8")
    assert "reproml" not in source and '"--steps"' in source
    assert 20 <= len(source.splitlines()) <= 75


def test_requirements_pin_every_library():
    lines = (ROOT / "gallery/requirements.txt").read_text("utf-8").splitlines()
    pinned = {match[1] for line in lines if (match := re.fullmatch(r"([\w-]+)==[\d.]+", line))}
    imported = set()
    for script in gallery.SCRIPTS.values():
        for node in ast.walk(ast.parse(script.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
    libraries = {name.split(".")[0].replace("_", "-") for name in imported}
    assert libraries - {"argparse", "tempfile"} <= pinned and len(pinned) > 10


def test_agreement_difference_and_failure_are_reported(tmp_path, capsys):
    sources = {
        "good": SCRIPT.format(seed="torch.manual_seed(0)"),
        "other": SCRIPT.format(seed="torch.manual_seed(1)"),
        "unseeded": SCRIPT.format(seed=""),
        "absent": "import atexit, sys\n"
        "atexit.register(lambda: sys.stderr.write('leak\\n' * 9))\nimport no_such_library",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    scripts = [tmp_path / f"{name}.py" for name in sources]
    found = gallery.run_all(scripts[:1], {})
    assert list(found) == ["good"]
    assert gallery.run_all(scripts, {"good": found["good"], "other": found["good"]}) == found
    shown = capsys.readouterr().out
    assert "without a seed" in shown and "No module named 'no_such_library'" in shown
    assert shown.count("ok   good") == 4 and shown.count("FAIL other") == 2


def test_unknown_name_is_refused(capsys):
    assert gallery.main(["no-such-script"]) == 2
    assert "no gallery/no-such-script.py" in capsys.readouterr().err
