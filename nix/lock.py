"""Regenerate requirements.lock and nix/wheels.json together, so that pip and Nix install the same files.

    python nix/lock.py              # keep the pinned versions, follow pyproject.toml
    python nix/lock.py --upgrade    # the newest versions that pyproject.toml allows

Options are handed on to `uv pip compile`. It needs uv 0.7 or newer, and a package index to ask.
requirements.lock holds hashes without file names; Nix needs the names. So uv resolves once for the
lock, and twice more, held to it, for listings with names, of all packages and of those that reproml itself
needs (the extra `pipeline`); these are thrown away, as they also hold addresses.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli
from packaging import tags
from packaging.markers import Marker
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
WHEELS = ROOT / "nix" / "wheels.json"

COMPILE = (
    "uv pip compile --universal --python-version 3.9 --prerelease disallow --generate-hashes "
    "--no-emit-index-url"
).split()


def manylinux(machine: str) -> Iterator[str]:
    """The platform tags of Linux wheels up to glibc 2.28, newest first, with their older spellings."""
    older = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    for minor in range(28, 4, -1):
        yield f"manylinux_2_{minor}_{machine}"
        if minor in older:
            yield f"{older[minor]}_{machine}"


# Nix's name of a system -> sys_platform, platform_system, platform_machine, platform tags.
SYSTEMS = {
    "aarch64-darwin": ("darwin", "Darwin", "arm64", [*tags.mac_platforms((12, 0), "arm64")]),
    "aarch64-linux": ("linux", "Linux", "aarch64", [*manylinux("aarch64")]),
    "x86_64-linux": ("linux", "Linux", "x86_64", [*manylinux("x86_64")]),
}


def environment(system: str) -> dict[str, str]:
    """What a requirement's marker may ask of Python 3.9 on `system`."""
    sys_platform, platform_system, machine, _ = SYSTEMS[system]
    return {
        "extra": "",
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": platform_system,
        "python_full_version": "3.9.21",
        "python_version": "3.9",
        "sys_platform": sys_platform,
    }


def is_for(system: str, package: dict[str, Any]) -> bool:
    return "marker" not in package or Marker(package["marker"]).evaluate(environment(system))


def best_wheel(package: dict[str, Any], system: str) -> tuple[str, str]:
    """(file name, SHA-256) of the wheel that an installer prefers for Python 3.9 on `system`."""
    platforms = SYSTEMS[system][3]
    order = [
        *tags.cpython_tags((3, 9), ["cp39"], platforms),
        *tags.compatible_tags((3, 9), "cp39", platforms),
    ]
    fitting = []
    for wheel in package.get("wheels", []):
        name = wheel["url"].rsplit("/", 1)[1]
        ranks = [order.index(tag) for tag in parse_wheel_filename(name)[3] if tag in order]
        if ranks:
            fitting.append((min(ranks), name, wheel["hashes"]["sha256"]))
    if not fitting:
        sys.exit(f"lock: {package['name']} {package['version']} has no wheel for {system}")
    return min(fitting)[1:]


def compile_in(folder: str, extra: str, output: str, *options: str) -> str:
    """Resolve the package with an extra into a file of the folder, and return the file's text."""
    command = [
        *COMPILE,
        "--extra",
        extra,
        "--output-file",
        output,
        *options,
        "--quiet",
        "pyproject.toml",
    ]
    try:
        subprocess.run(command, cwd=folder, check=True)
    except FileNotFoundError:
        sys.exit("lock: no uv here; install uv 0.7 or newer")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    return Path(folder, output).read_text("utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for path in (ROOT / "pyproject.toml", LOCK):
            shutil.copy(path, folder)
        lock = compile_in(folder, "dev", LOCK.name, *sys.argv[1:])
        packages, needed = (
            tomli.loads(compile_in(folder, extra, "pylock.toml", "--constraint", LOCK.name))[
                "packages"
            ]
            for extra in ("dev", "pipeline")
        )
    table: dict[str, dict[str, dict[str, str]]] = {}
    for system in SYSTEMS:
        table[system] = {"runtime": {}, "development": {}}
        runtime = {
            "setuptools",
            *(p["name"] for p in needed if is_for(system, p)),
        }  # it builds reproml
        for package in packages:
            if is_for(system, package):
                file, sha256 = best_wheel(package, system)
                group = "runtime" if package["name"] in runtime else "development"
                table[system][group][file] = sha256
    LOCK.write_text(lock, "utf-8")  # both, or neither
    WHEELS.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
