"""Compare the digests of training scripts of examples/ with tests/examples.json.

`python -m verification.examples NAME...` runs them in this process, without any other: an emulator may not
be able to start one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from reproml.cli import main as reproml

ROOT = Path(__file__).resolve().parent.parent


EXPECTED: dict[str, list[str]] = json.loads((ROOT / "tests/examples.json").read_text())


def digests(name: str, *options: str) -> list[str]:
    """Return the digests of an example's parameters after two steps. Raises RuntimeError if it fails."""
    torch.set_default_dtype(torch.float32)  # the script before may have set another
    with TemporaryDirectory() as folder:
        to = Path(folder, "digest.json")
        script = str(ROOT / f"examples/{name}.py")
        if reproml(["run", "--digest", str(to), script, "--steps", "2", *options]):
            raise RuntimeError(f"examples/{name}.py failed")
        return [each["parameters.sha256"] for each in json.loads(to.read_text())["optimizers"]]


def main(names: list[str]) -> int:
    """Run the named examples; return 1 if a digest differs, otherwise 0."""
    if unknown := set(names) - set(EXPECTED):
        print(f"examples: tests/examples.json has no {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    status = 0
    for name in names or EXPECTED:
        found = digests(name)
        same = found == EXPECTED[name]
        status |= not same
        print("ok  " if same else "FAIL", f"{name}: {' '.join(found)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
