"""Every training script of examples/, unmodified: the same digests whatever the settings.

`python -m tests.test_examples` writes examples.json anew, after a definition has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from verification.subprocesses import ROOT, Reproml

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
STEPS = "2"
EXPECTED = ROOT / "tests" / "examples.json"  # name: digests of what it trained, in order


def digests(run: Reproml, folder: Path, example: Path) -> list[str]:
    arguments = ["--digest", "digest.json", str(example), "--steps", STEPS]
    shown = run(folder, "run", *arguments)
    assert (shown.returncode, shown.stderr) == (0, "")
    result = json.loads((folder / "digest.json").read_text())
    return [optimizer["parameters.sha256"] for optimizer in result["optimizers"]]


@pytest.fixture(scope="module")
def plain() -> Iterator[Reproml]:
    """One thread and no vector instructions, so no fused multiplication and addition either."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with Reproml({"ATEN_CPU_CAPABILITY": "default", **threads}) as run:
        yield run


@pytest.fixture(scope="module")
def full() -> Iterator[Reproml]:
    """Two threads, and the best that this CPU has."""
    with Reproml({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "MKL_DYNAMIC": "FALSE"}) as run:
        yield run


def test_there_is_one_a_family():
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_comes_to_the_same_under_every_setting(tmp_path, plain, full, example):
    """With every Python and every PyTorch too, as the digests in the file say."""
    expected = json.loads(EXPECTED.read_text())[example.stem]
    assert expected
    assert digests(plain, tmp_path, example) == expected
    assert digests(full, tmp_path, example) == expected


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_plain_pytorch(example):
    """But for one line of the script for several workers."""
    source = example.read_text()
    if example.stem == "ddp":
        source = source.replace("\nfrom reproml.distributed import DistributedDataParallel\n", "")
    assert "reproml" not in source and '"--steps"' in source and '"--device"' in source


def test_the_numbers_are_those_of_pytorch_within_rounding(tmp_path, full):
    """Exact arithmetic is more accurate than native, not different: the same training to 4 digits."""
    for name in ("mlp", "vae", "transformer"):
        arguments = [str(ROOT / "examples" / f"{name}.py"), "--steps", "3"]
        losses = []
        for numerics in ("exact", "native"):
            shown = full(tmp_path, "run", "--numerics", numerics, *arguments)
            found = re.search(r"loss ([0-9.]+)", shown.stdout)
            assert found, shown
            losses.append(float(found[1]))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


if __name__ == "__main__":
    with Reproml() as run, TemporaryDirectory() as folder:
        found = {path.stem: digests(run, Path(folder), path) for path in EXAMPLES}
    EXPECTED.write_text(json.dumps(found, indent=2) + "\n")
