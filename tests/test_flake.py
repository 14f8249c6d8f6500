"""What Nix builds from, checked without Nix: the pins, the wheels, and the hashes stated in advance."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from reproml.pipeline import data, recipe

ROOT = Path(__file__).resolve().parent.parent
WHEELS: dict[str, dict[str, str]] = json.loads((ROOT / "nix/wheels.json").read_text("utf-8"))
RECIPES = sorted(path.stem for path in (ROOT / "reproml/pipeline/recipes").glob("*.toml"))
NIXPKGS = "1e5b653dff12029333a6546c11e108ede13052eb"


def locked() -> dict[Requirement, set[str]]:
    """The requirements of requirements.lock and the hashes of each."""
    text = (ROOT / "requirements.lock").read_text("utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    result = {}
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=sha256:")
        result[Requirement(requirement)] = {value.strip() for value in hashes}
    return result


@pytest.fixture(scope="module")
def lock_script() -> ModuleType:
    """nix/lock.py, which is a script and not part of the package."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / "nix/lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flake_lock_has_the_one_input_at_its_pin():
    assert f'"github:NixOS/nixpkgs/{NIXPKGS}"' in (ROOT / "flake.nix").read_text("utf-8")
    lock = json.loads((ROOT / "flake.lock").read_text("utf-8"))
    repository = {"owner": "NixOS", "repo": "nixpkgs", "rev": NIXPKGS, "type": "github"}
    assert lock == {
        "nodes": {
            "nixpkgs": {
                "locked": {
                    "lastModified": 1742669843,
                    "narHash": "sha256-G5n+FOXLXcRx+3hCJ6Rt6ZQyF1zqQ0DL0sWAMn2Nk0w=",
                    **repository,
                },
                "original": repository,
            },
            "root": {"inputs": {"nixpkgs": "nixpkgs"}},
        },
        "root": "root",
        "version": 7,
    }


def test_wheels_are_for_the_systems_of_the_flake(lock_script):
    flake = (ROOT / "flake.nix").read_text("utf-8")
    assert set(WHEELS) == set(lock_script.SYSTEMS)
    assert set(WHEELS) == set(re.findall(r'^ +"(\w+-(?:linux|darwin))"$', flake, re.MULTILINE))


@pytest.mark.parametrize("system", WHEELS)
def test_wheels_are_those_of_the_lock(system, lock_script):
    """Each package that the lock has for Python 3.9 there, no other, at its version and hash."""
    expected = {
        (canonicalize_name(requirement.name), str(requirement.specifier)): hashes
        for requirement, hashes in locked().items()
        if requirement.marker is None
        or requirement.marker.evaluate(lock_script.environment(system))
    }
    found = {}
    for file, sha256 in WHEELS[system].items():
        name, version, _, _ = parse_wheel_filename(file)
        found[name, f"=={version}"] = sha256
    assert len(found) == len(WHEELS[system])
    assert set(found) == set(expected)
    assert {key: sha256 for key, sha256 in found.items() if sha256 not in expected[key]} == {}


@pytest.mark.parametrize("system", WHEELS)
def test_wheels_fit_python_39_there(system, lock_script):
    for file, sha256 in WHEELS[system].items():
        package = {"wheels": [{"url": f"/{file}", "hashes": {"sha256": sha256}}]}
        assert lock_script.best_wheel(package, system) == (file, sha256)


def test_wheels_have_names_that_nix_can_take_apart():
    """NAME-VERSION-PYTHON-ABI-PLATFORM, without the build number that a wheel may have."""
    assert {file for table in WHEELS.values() for file in table if file.count("-") != 4} == set()


def test_best_wheel_prefers_as_pip_does(lock_script):
    def wheel(tags: str) -> dict[str, Any]:
        return {"url": f"https://host/x-1-{tags}.whl", "hashes": {"sha256": tags}}

    def best(system: str) -> str:
        chosen: str = lock_script.best_wheel({"wheels": wheels}, system)[1]
        return chosen

    wheels = [
        wheel("py3-none-any"),
        wheel("cp38-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"),
        wheel("cp39-cp39-manylinux_2_17_x86_64.manylinux2014_x86_64"),
        wheel("cp39-cp39-manylinux_2_28_x86_64"),
        wheel("cp39-cp39-manylinux_2_34_x86_64"),
        wheel("cp39-cp39-musllinux_1_2_x86_64"),
        wheel("cp310-cp310-manylinux_2_28_x86_64"),
        wheel("cp39-cp39-macosx_11_0_arm64"),
        wheel("cp39-cp39-macosx_14_0_arm64"),
    ]
    assert best("x86_64-linux") == "cp39-cp39-manylinux_2_28_x86_64"
    assert best("aarch64-darwin") == "cp39-cp39-macosx_11_0_arm64"
    assert best("aarch64-linux") == "py3-none-any"
    with pytest.raises(SystemExit, match="lock: x 1 has no wheel for aarch64-linux"):
        lock_script.best_wheel({"name": "x", "version": "1", "wheels": []}, "aarch64-linux")


def test_cpu_wheels_are_the_locked_versions_for_the_cpu():
    """Their site is not the lock's, so their hashes stand in nix/python.nix alone."""
    text = (ROOT / "nix/python.nix").read_text("utf-8")
    cpu = dict(re.findall(r'"([\w.+-]+\.whl)" =\s+"([0-9a-f]{64})";', text))
    assert {file.replace("+cpu", "") for file in cpu} == {
        file for file in WHEELS["x86_64-linux"] if file.startswith(("torch-", "torchvision-"))
    }
    assert not set(cpu.values()) & set(WHEELS["x86_64-linux"].values())


def test_mnist_is_the_data_of_the_package():
    text = (ROOT / "nix/mnist.nix").read_text("utf-8")
    found = dict(re.findall(r'"([\w-]+\.gz)" = "([0-9a-f]{64})";', text))
    assert found == {name: file.sha256 for name, file in data.MNIST.items()}
    assert re.findall(r'"(https://.*/)\$\{name\}"', text) == list(data.MIRRORS)


@pytest.mark.parametrize("name", RECIPES)
def test_weights_have_the_golden_hash(name):
    """nix/steps.nix states it as the output hash of weights-RECIPE, and names the recipe by it.

    golden/ may hold files of recipes that lie elsewhere; flake.nix passes them over, too.
    """
    golden = json.loads((ROOT / f"golden/{name}.json").read_text("utf-8"))
    assert re.fullmatch("[0-9a-f]{64}", golden["weights.safetensors.sha256"])
    assert golden["recipe.canonical_json.sha256"] == recipe.load_recipe(name).sha256
    steps = (ROOT / "nix/steps.nix").read_text("utf-8")
    assert 'outputHash = golden."weights.safetensors.sha256";' in steps
    assert '= golden."recipe.canonical_json.sha256";' in steps
    flake = (ROOT / "flake.nix").read_text("utf-8")
    assert 'builtins.pathExists (./reproml/pipeline/recipes + "/${recipe}.toml")' in flake


def test_there_are_recipes():
    assert {"digits-mlp", "mnist-cnn", "mnist-mlp"} <= set(RECIPES)
