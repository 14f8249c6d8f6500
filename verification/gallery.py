"""Compare the digests of the training scripts of gallery/ with golden/gallery.json.

`python -m verification.gallery NAME...` runs the named scripts, or all of them; a script fails where its
libraries are absent. With `--matrix` it runs them in every setting of `invoke matrix` instead. With
`--write` it writes the digests to the file, of each script on whose digests the settings agree.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from reproml.matrix import offered
from verification.subprocesses import ROOT, Reproml

SCRIPTS = {path.stem: path for path in sorted((ROOT / "gallery").glob("*.py"))}
GOLDEN = ROOT / "golden/gallery.json"  # name -> digests of the parameters of each optimizer

# The libraries download nothing, and compile their modules once.
_ALL = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
SETTINGS = {
    "1 thread, no vector instructions": {
        "ATEN_CPU_CAPABILITY": "default",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    },
    "2 threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "MKL_DYNAMIC": "FALSE"},
}


def digests(run: Reproml, folder: Path, script: Path) -> list[str]:
    """Return the digests of the parameters of each optimizer. Raises RuntimeError if the script fails."""
    done = run(folder, "run", "--digest", "digest.json", str(script))
    if done.returncode:
        raise RuntimeError(_error(done.stderr))
    result = json.loads((folder / "digest.json").read_text())
    if "unseeded" in result:
        raise RuntimeError(f"it drew without a seed from {result['unseeded']}")
    return [optimizer["parameters.sha256"] for optimizer in result["optimizers"]]


def _error(stderr: str) -> str:
    """Return the error of the last traceback, if there is one: a library may report leaks after it."""
    _, found, rest = stderr.strip().rpartition("Traceback (most recent call last):\n")
    lines = rest.splitlines()
    error = [x for x in lines if found and not x.startswith(" ")][:5]
    return "\n".join(error or lines[-5:])


def run_all(
    scripts: Sequence[Path],
    expected: dict[str, list[str]],
    settings: Mapping[str, Mapping[str, str]] = SETTINGS,
) -> dict[str, list[str]]:
    """Run the scripts in all settings and print the outcomes.

    Return the digests of those that have the same digests in all settings and, if they are expected, these.
    """
    same = {script.stem: expected.get(script.stem) for script in scripts}
    failed = set()
    for setting, variables in settings.items():
        print(f"{setting}:", flush=True)
        with Reproml({**_ALL, **variables}) as run, TemporaryDirectory() as folder:
            for script in scripts:
                name, start = script.stem, time.monotonic()
                try:
                    found = digests(run, Path(folder), script)
                    outcome = " ".join(found) or "no optimizer took a step"
                    same[name] = same[name] or found
                except RuntimeError as error:
                    found, outcome = [], str(error)
                if not found or found != same[name]:
                    failed.add(name)
                word = "FAIL" if name in failed else "ok  "
                print(f"{word} {name} ({time.monotonic() - start:.0f} s): {outcome}", flush=True)
    return {name: found for name, found in same.items() if found and name not in failed}


def main(arguments: Sequence[str]) -> int:
    """Run the named scripts; return 1 if one fails or has other digests, otherwise 0."""
    options = {"--matrix", "--write"}.intersection(arguments)
    names = [name for name in arguments if name not in options] or list(SCRIPTS)
    if unknown := set(names) - set(SCRIPTS):
        print(f"gallery: there is no gallery/{sorted(unknown)[0]}.py", file=sys.stderr)
        return 2
    golden: dict[str, list[str]] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    write = "--write" in options
    if not write and (missing := set(names) - set(golden)):
        print(f"gallery: golden/gallery.json has no {sorted(missing)[0]}", file=sys.stderr)
        return 2
    settings = {x.name: x.variables for x in offered()} if "--matrix" in options else SETTINGS
    found = run_all([SCRIPTS[name] for name in names], {} if write else golden, settings)
    if write:
        GOLDEN.write_text(json.dumps({**golden, **found}, indent=2, sort_keys=True) + "\n")
    return int(len(found) < len(set(names)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
