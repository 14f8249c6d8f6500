"""ResNet-50 has the digest of docs/comparison.md; GPT-2 needs transformers, which is not locked."""

from __future__ import annotations

import re
from pathlib import Path

from reproml import matrix

ROOT = Path(__file__).resolve().parent.parent.parent


def test_resnet50_has_the_documented_digest():
    page = (ROOT / "docs/comparison.md").read_text("utf-8")
    [documented] = set(re.findall(r"^.*\S {2,}\w{16} (8c11\w{12})$", page, re.M))
    script = ROOT / "verification/workloads.py"
    [row] = matrix.run_script(f"'{script}' resnet50", [matrix._threads(1)])
    assert row.exact[:16] == documented != row.native[:16]
