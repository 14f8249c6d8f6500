"""Copy a run folder without what is no function of the recipe: python portable_run.py RUN OUT.

Times, the machine and the log are left out, so that every machine writes the same bytes. Nix records how
the folder was made.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

PORTABLE = (
    "data.sha256",
    "definitions.version",
    "device",
    "numerics",
    "recipe",
    "recipe.sha256",
    "versions",
)


def main(run: str, out: str) -> None:
    record = json.loads(Path(run, "run.json").read_text("utf-8"))
    Path(out).mkdir()
    for name in ("metrics.json", "weights.safetensors"):
        shutil.copyfile(Path(run, name), Path(out, name))
    text = json.dumps({name: record[name] for name in PORTABLE}, indent=2, sort_keys=True) + "\n"
    Path(out, "run.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
