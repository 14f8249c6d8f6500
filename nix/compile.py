"""Make an environment in the Nix store the same from build to build: python compile.py FOLDER.

pip and venv leave two things that differ. Bytecode holds times, and depends on what its process compiled
before: here one process compiles all, in sorted order. And pip records the path from which it installed
each package, which would keep the wheels among what the environment needs.
"""

from __future__ import annotations

import compileall
import shutil
import sys
from pathlib import Path
from py_compile import PycInvalidationMode


def main(folder: str) -> None:
    packages = Path(folder, "lib")
    for path in [*packages.rglob("__pycache__")]:
        shutil.rmtree(path)
    for path in [*packages.rglob("direct_url.json")]:
        record = path.parent / "RECORD"
        lines = record.read_text("utf-8").splitlines(keepends=True)
        name = f"{path.parent.name}/{path.name},"
        record.write_text("".join(line for line in lines if not line.startswith(name)), "utf-8")
        path.unlink()
    # Some packages hold files for other versions of Python, which are no errors: pip passes them over too.
    compileall.compile_dir(
        packages, maxlevels=20, quiet=2, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH
    )


if __name__ == "__main__":
    main(sys.argv[1])
