"""Promises of the package: light import, lock without addresses, wheel with its data."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import reproml
from reproml.cli import parser

ROOT = Path(__file__).resolve().parent.parent

# Written in pieces, or this file would name what no file may name.
PACKAGE_INDEXES = ["Py" + "PI", "py" + "pi.", "python" + "hosted", "ana" + "conda.", "npm" + "js."]

# A requirement, perhaps with a marker, then its hashes and nothing else.
LOCKED = re.compile(r"[a-z0-9-]+==[0-9a-z.+]+( ; [^\\]+)?( --hash=sha256:[0-9a-f]{64})+")


def project_files() -> list[Path]:
    """Every file of the project: what git would commit, or all of them where there is no git."""
    if not (ROOT / ".git").exists():
        return [path for path in ROOT.rglob("*") if path.is_file()]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    return [path for path in (ROOT / name for name in listed if name) if path.is_file()]


@pytest.mark.parametrize("module", ["reproml", "reproml.cli"])
def test_import_is_light(module):
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout.split()
    assert {"torch", "numpy", "sklearn", "rich", "torchvision"}.isdisjoint(loaded)


def test_no_file_names_a_package_index():
    named = [
        f"{path.relative_to(ROOT)}: {index}"
        for path in project_files()
        for index in PACKAGE_INDEXES
        if index.encode() in path.read_bytes()
    ]
    assert named == []


def test_no_lock_with_addresses():
    names = {path.name for path in project_files()}
    assert names.isdisjoint({"uv.lock", "pylock.toml", "poetry.lock", "pdm.lock", "Pipfile.lock"})


def test_lock_is_hashed_and_has_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "file:" not in text and " @ " not in text
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    requirements = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    assert len(requirements) > 50
    for requirement in requirements:
        assert LOCKED.fullmatch(requirement), requirement[:100]


def test_lock_holds_every_dependency():
    pyproject = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|pipeline|dev) = \[\n(.*?)^\]", pyproject, re.M | re.S)
    declared = re.findall(r'^    "([a-z0-9-]+)', "".join(lists), flags=re.MULTILINE)
    declared.remove("reproml")
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.M))
    assert len(declared) > 15 and locked.issuperset(declared)


def test_citation_has_the_version():
    assert f"\nversion: {reproml.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def build(kind: str, source: Path, target: Path, **variables: str) -> Path:
    """Build an sdist or a wheel of the folder `source` without fetching anything; return its file."""
    call = "import setuptools.build_meta as b, sys; getattr(b, sys.argv[1])(sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", call, f"build_{kind}", str(target)],
        cwd=source,
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
    )
    (file,) = [*target.glob("*.whl"), *target.glob("*.tar.gz")]
    return file


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist from a copy, because setuptools leaves folders in the tree that it builds."""
    source = tmp_path_factory.mktemp("source")
    for path in project_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


# Writes an empty file where a compiler would write its result, which takes ten seconds.
NO_COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


def test_wheel_of_the_sdist_is_complete(sdist, tmp_path):
    """It has a tag for every Python since 3.9, and all files that the installed package reads."""
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    compiler = tmp_path / "cc"
    compiler.write_text(NO_COMPILER)
    compiler.chmod(0o755)
    wheel = build("wheel", source, tmp_path / "wheel", CC=str(compiler))
    assert re.fullmatch(r"reproml-[\d.]+-cp39-abi3-[a-z0-9_]+\.whl", wheel.name)
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = {
        path.relative_to(ROOT).as_posix()
        for path in project_files()
        if path.is_relative_to(ROOT / "reproml") and path.suffix not in (".c", ".h")
    }
    golden = {
        f"reproml/pipeline/golden_files/{path.relative_to(ROOT / 'golden').as_posix()}"
        for path in ROOT.glob("golden/**/*.json")
    }
    licence = f"{'-'.join(wheel.name.split('-')[:2])}.dist-info/licenses/LICENSE"
    assert golden and {"reproml/py.typed", "reproml/report.html"} <= package
    loops = {f"reproml/arithmetic/_kernels{name}.abi3.so" for name in ("", "_bfloat16", "_float16")}
    assert inside >= package | golden | loops | {licence}


def test_sdist_has_the_sources_of_the_loops(sdist):
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("reproml/arithmetic/csrc/*")}
    assert len(sources) > 20 and inside >= sources | {"setup.py", "pyproject.toml", "README.md"}


@pytest.mark.parametrize(
    ("asked", "answer", "tag"),
    [
        ("sys.platform", "'win32'", "py3-none-any"),
        ('sysconfig.get_config_var("Py_GIL_DISABLED")', "1", r"cp(\d+)-cp\1-[a-z0-9_]+"),
    ],
)
def test_wheel_of_another_python_has_its_tag(sdist, tmp_path, asked, answer, tag):
    """On Windows it has no loops; without the global lock it is for that Python alone."""
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    setup = source / "setup.py"
    assert setup.read_text().count(asked) == 1
    setup.write_text(setup.read_text().replace(asked, answer))
    wheel = build("wheel", source, tmp_path / "wheel", CC="false")
    assert re.fullmatch(rf"reproml-[\d.]+-{tag}\.whl", wheel.name)


def test_commands_of_the_workflows_are_valid():
    files = [ROOT / "pyproject.toml", *ROOT.glob(".github/workflows/*.yml")]
    lines = "\n".join(path.read_text() for path in files)
    commands = re.findall(r'(?:run: |")reproml ([^"\n]+)', lines)
    assert len(commands) == 3
    for command in commands:
        assert parser().parse_args(command.split()).recipe == "digits-mlp"


def test_package_is_found_beside_its_clone(tmp_path):
    """In the folder that holds a clone named `reproml`, for an editable install."""
    clone = tmp_path / "reproml"
    for path in ROOT.glob("reproml/**/*"):
        if path.is_file() and path.suffix in (".py", ".toml"):
            target = clone / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, clone / name)
    install = (
        "from setuptools.build_meta import build_editable; import sys; build_editable(sys.argv[1])"
    )
    (clone / "setup.py").write_text(
        "from setuptools import setup; setup()"
    )  # without the C library
    subprocess.run(
        [sys.executable, "-c", install, str(tmp_path)], cwd=clone, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        (name,) = [name for name in content.namelist() if name.endswith(".pth")]
        assert Path(content.read(name).decode().strip()) == clone
    shown = subprocess.run(
        [sys.executable, "-m", "reproml", "--version"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(clone)},  # as the .pth file does
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0 and shown.stdout.startswith("reproml "), shown.stderr


def test_the_public_names_are_functions_whatever_was_imported_before() -> None:
    code = "import reproml.pipeline.train, reproml; assert reproml.digest({}) and reproml.exact()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_exact_needs_no_extra_package() -> None:
    """Without the packages of reproml[pipeline], exact() works; a trace and a verb name the package."""
    code = """
import sys
for name in "invoke jinja2 msgspec platformdirs rich safetensors sklearn tomli".split():
    sys.modules[name] = None  # its import raises ModuleNotFoundError
import reproml, torch
with reproml.exact():
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
print(reproml.digest(model))
try:
    with reproml.trace("never.trace"):
        pass
except reproml.ReproError as error:
    print(error)
from reproml.cli import main
print(main(["verify", "--recipe", "digits-mlp"]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    digest, trace, status = done.stdout.splitlines()
    assert len(digest) == 64 and status == "2"
    needed = re.compile("needs the package [a-z0-9]+; install reproml\\[pipeline\\]$")
    assert needed.search(trace) and needed.search(done.stderr.strip())
