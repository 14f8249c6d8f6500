"""Every training script of examples/, unmodified, has the same digests under different settings.

`python -m tests.test_examples` writes examples.json again, after a definition has changed.
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
EXPECTED = (
    ROOT / "tests" / "examples.json"
)  # name -> digests of the parameters of each optimizer, in order


def digests(run: Reproml, folder: Path, example: Path) -> list[str]:
    arguments = ["--digest", "digest.json", str(example), "--steps", STEPS]
    shown = run(folder, "run", *arguments)
    # Triton, which PyTorch imports, reports at the end of a process what gc.freeze() has kept.
    of_triton = ("nanobind: ", " - ", "See https://nanobind")
    errors = [line for line in shown.stderr.splitlines() if not line.startswith(of_triton)]
    assert (shown.returncode, errors) == (0, [])
    result = json.loads((folder / "digest.json").read_text())
    return [optimizer["parameters.sha256"] for optimizer in result["optimizers"]]


@pytest.fixture(scope="module")
def plain() -> Iterator[Reproml]:
    """One thread and no vector instructions, hence no fused multiply-add."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with Reproml({"ATEN_CPU_CAPABILITY": "default", **threads}) as run:
        yield run


@pytest.fixture(scope="module")
def full() -> Iterator[Reproml]:
    """Two threads and the widest vector instructions of this CPU."""
    with Reproml({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "MKL_DYNAMIC": "FALSE"}) as run:
        yield run


def test_examples_cover_ten_families():
    assert len(EXAMPLES) >= 10


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_has_same_digests_under_settings(tmp_path, plain, full, example):
    """The file's digests also hold for every supported Python and PyTorch."""
    expected = json.loads(EXPECTED.read_text())[example.stem]
    assert expected
    assert digests(plain, tmp_path, example) == expected
    assert digests(full, tmp_path, example) == expected


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_plain_pytorch(example):
    """Only the script for several workers imports reproml, in one line."""
    source = example.read_text()
    if example.stem == "ddp":
        source = source.replace("\nfrom reproml.distributed import DistributedDataParallel\n", "")
    assert "reproml" not in source and '"--steps"' in source and '"--device"' in source


def test_losses_agree_with_native_within_rounding(tmp_path, full):
    """Exact and native arithmetic differ by rounding only: the losses agree to about 3 digits."""
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
