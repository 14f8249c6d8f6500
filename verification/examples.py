"""Compare the digests of training scripts of examples/ with tests/examples.json.

`python -m verification.examples NAME...` runs them in this process, without any other: an emulator may not
be able to start one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from reproml.cli import main as reproml

ROOT = Path(__file__).resolve().parent.parent


def main(names: list[str]) -> int:
    """Run the named examples; return 1 if a digest differs, otherwise 0."""
    expected = json.loads((ROOT / "tests/examples.json").read_text())
    if unknown := set(names) - set(expected):
        print(f"examples: tests/examples.json has no {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    status = 0
    for name in names or expected:
        with TemporaryDirectory() as folder:
            to = Path(folder, "digest.json")
            script = str(ROOT / f"examples/{name}.py")
            if reproml(["run", "--digest", str(to), script, "--steps", "2"]):
                return 1
            found = [each["parameters.sha256"] for each in json.loads(to.read_text())["optimizers"]]
        same = found == expected[name]
        status |= not same
        print("ok  " if same else "FAIL", f"{name}: {' '.join(found)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
