"""What Nix builds from, checked without Nix: the pins, the wheels, and the hashes stated in advance."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from reproml.pipeline import data, recipe

ROOT = Path(__file__).resolve().parent.parent
GROUPS: dict[str, dict[str, dict[str, str]]] = json.loads(
    (ROOT / "nix/wheels.json").read_text("utf-8")
)
# System -> file -> SHA-256, of both groups.
WHEELS = {
    system: {**groups["runtime"], **groups["development"]} for system, groups in GROUPS.items()
}
RECIPES = sorted(path.stem for path in (ROOT / "reproml/pipeline/recipes").glob("*.toml"))
CUDA = ("nvidia-", "triton", "importlib-metadata", "zipp")  # triton requires the last two
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


def python(folder: Path, *arguments: str) -> str:
    """Run this interpreter with the package of this checkout, and return what it prints."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout


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


@pytest.mark.parametrize("system", GROUPS)
def test_what_runs_is_installed_without_the_tools_of_development(system, lock_script):
    """The group `runtime` is what the extra `pipeline` requires, directly or not, and setuptools.

    What PyTorch requires for CUDA is left out: an installed PyTorch for the CPU does not name it.
    """
    project = tomli.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    own = [*project["dependencies"], *project["optional-dependencies"]["pipeline"]]
    seen: set[tuple[str, str]] = set()
    left = [("setuptools", ""), ("reproml", "")]
    while left:
        package, extra = left.pop()
        environment = {**lock_script.environment(system), "extra": extra}
        requirements = own if package == "reproml" else metadata.requires(package) or []
        for requirement in map(Requirement, requirements):
            name = str(canonicalize_name(requirement.name))
            applies = requirement.marker is None or requirement.marker.evaluate(environment)
            if applies and not name.startswith(CUDA):
                new = {(name, extra) for extra in {"", *requirement.extras}} - seen
                seen |= new
                left += new
    needed = {"setuptools", *(name for name, _ in seen)}
    found = {parse_wheel_filename(file)[0] for file in GROUPS[system]["runtime"]}
    assert {name for name in found if not name.startswith(CUDA)} == needed
    assert not needed & {"hypothesis", "mypy", "pytest", "ruff"}


def test_what_a_training_imports_is_in_the_group_runtime(tmp_path):
    """A package may import what it does not require: safetensors.torch imports packaging."""
    owners = {
        file.parts[0]: str(canonicalize_name(each.metadata["Name"]))
        for each in metadata.distributions()
        for file in each.files or []
    }
    script = (
        "import sys\n"
        "from reproml.cli import main\n"
        "for verb in ('train', 'evaluate', 'report'):\n"
        "    assert main([verb, '--recipe', 'digits-mlp']) == 0\n"
        "print('imported', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    found = python(tmp_path, "-c", script)
    modules = found[found.index("imported ") :].split()[1:]
    imported = {owners[name] for name in modules if name in owners} - {"reproml"}
    runtime = {str(parse_wheel_filename(file)[0]) for file in GROUPS["x86_64-linux"]["runtime"]}
    assert "torch" in imported and imported <= runtime


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
def test_golden_files_state_the_weights_of_their_recipes(name):
    """weights-RECIPE takes its output hash from them."""
    golden = json.loads((ROOT / f"golden/{name}.json").read_text("utf-8"))
    assert re.fullmatch("[0-9a-f]{64}", golden["weights.safetensors.sha256"])
    assert golden["recipe.canonical_json.sha256"] == recipe.load_recipe(name).sha256


def test_the_template_is_a_pipeline_that_verifies_at_once():
    """Recipe, golden file, flake and one workflow; the golden file is that of the recipe."""
    flake = (ROOT / "flake.nix").read_text("utf-8")
    assert "templates.default = {\n        path = ./nix/template;\n" in flake
    folder = ROOT / "nix/template"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        ".github/workflows/check.yml",
        "README.md",
        "flake.nix",
        "golden/my-mlp.json",
        "recipes/my-mlp.toml",
    }
    assert "run: nix flake check" in (folder / ".github/workflows/check.yml").read_text("utf-8")
    golden = json.loads((folder / "golden/my-mlp.json").read_text("utf-8"))
    recipe_sha256 = recipe.load_recipe(str(folder / "recipes/my-mlp.toml")).sha256
    assert golden["recipe.canonical_json.sha256"] == recipe_sha256
    # The two commands that are printed after `nix flake init` are those of the manual.
    commands = re.findall("^ +(nix flake (?:lock|check).*)$", flake, re.MULTILINE)
    manual = (ROOT / "docs/nix.md").read_text("utf-8")
    assert len(commands) == 2 and "\n".join(commands) in manual


def test_the_image_is_layered_and_has_no_date():
    """dockerTools' default date is 1970; `created = "now"` would give each image another digest."""
    flake = (ROOT / "flake.nix").read_text("utf-8")
    assert "inherit (pkgs) image;" in flake and "image-cuda = cuda.image;" in flake
    image = (ROOT / "nix/image.nix").read_text("utf-8")
    assert "dockerTools.streamLayeredImage {" in image
    assert not re.search(r"\b(created|mtime)\s*=", image)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what `nix flake init -t` writes."""
    folder = tmp_path_factory.mktemp("template") / "copy"
    shutil.copytree(ROOT / "nix/template", folder)
    return folder


@pytest.fixture(scope="module")
def run_folder(template: Path) -> Path:
    """What run-my-mlp writes (nix/steps.nix): the run without times, machine and log, read-only."""
    trained, out = template.parent / "run", template.parent / "out"
    reproml(template, "train", "--out", str(trained))
    subprocess.run([sys.executable, ROOT / "nix/portable_run.py", trained, out], check=True)
    for path in (*out.iterdir(), out):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (template / "run").symlink_to(out)
    return out


def reproml(template: Path, verb: str, *options: str) -> str:
    """Run a command as a step of the template's recipe does."""
    return python(template, "-m", "reproml", verb, "--recipe", "recipes/my-mlp.toml", *options)


def test_the_golden_file_of_the_template_is_what_it_trains(template, run_folder):
    assert "verified, all 20 items match" in reproml(template, "verify", "--run", "run")


def test_the_steps_evaluate_and_report_such_a_run(template, run_folder):
    found = json.loads(reproml(template, "evaluate", "--run", "run", "--json"))
    assert found["run"] == "run"
    golden = json.loads((template / "golden/my-mlp.json").read_text("utf-8"))
    assert found["items"].items() <= golden.items()
    reproml(template, "report", "--run", "run", "--out", "page.html")
    page = (template / "page.html").read_text("utf-8")
    assert golden["weights.safetensors.sha256"] in page and "unknown" not in page


def test_such_a_run_names_nothing_of_this_machine_or_time(run_folder):
    record = json.loads((run_folder / "run.json").read_text("utf-8"))
    assert {path.name for path in run_folder.iterdir()} == {
        "metrics.json",
        "run.json",
        "weights.safetensors",
    }
    assert not {"machine", "times", "torch", "variables", "arithmetic"} & set(record)


def test_an_environment_is_the_same_wherever_it_was_compiled_from(tmp_path):
    """nix/compile.py: no bytecode with times, and no address of a wheel."""
    for name in ("one", "two"):
        package = tmp_path / name / "lib/package"
        (package / "__pycache__").mkdir(parents=True)
        (package / "__pycache__/old.pyc").write_bytes(b"stale")
        (package / "module.py").write_text("names = {'a', 'b', 'c'}\n")
        os.utime(package / "module.py", (0, len(name) + (name == "two")))
        info = tmp_path / name / "lib/package-1.dist-info"
        info.mkdir()
        (info / "direct_url.json").write_text(f'{{"url": "file:///{name}"}}')
        (info / "RECORD").write_text("package/module.py,,\npackage-1.dist-info/direct_url.json,,\n")
        subprocess.run(
            [sys.executable, ROOT / "nix/compile.py", name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            check=True,
        )
    assert [*tmp_path.rglob("direct_url.json")] == [*tmp_path.rglob("old.pyc")] == []
    compiled = [path.read_bytes() for path in sorted(tmp_path.rglob("*.pyc"))]
    assert len(compiled) == 2
    assert compiled[0].replace(b"one/", b"two/") == compiled[1]
    assert int.from_bytes(compiled[0][4:8], "little") == 1  # PEP 552: unchecked, by hash
    assert {path.read_text() for path in tmp_path.rglob("RECORD")} == {"package/module.py,,\n"}


def test_digests_of_a_script_are_compared(tmp_path):
    file = tmp_path / "digests.json"
    file.write_text(
        json.dumps(
            {
                "definitions": 2,
                "optimizers": [{"tensors": 4, "parameters.sha256": "a" * 64}],
                "saved": [{"file": "x.pt", "state_dict.sha256": "b" * 64}],
            }
        )
    )

    def status(*stated: str) -> int:
        command = [sys.executable, str(ROOT / "nix/digests.py"), str(file), *stated]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode

    assert status("a" * 64, "b" * 64) == status("b" * 64, "a" * 64) == 0
    assert status("a" * 64) == status() == status("a" * 64, "b" * 64, "c" * 64) == 1


def test_actions_are_pinned_by_commit():
    files = [
        *ROOT.glob(".github/workflows/*.yml"),
        *ROOT.glob("nix/template/.github/workflows/*.yml"),
    ]
    used = [line for f in files for line in f.read_text("utf-8").splitlines() if "uses:" in line]
    assert len(files) == 6 and used
    assert [u for u in used if not re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d", u)] == []


def test_there_are_recipes():
    assert {"digits-mlp", "mnist-cnn", "mnist-mlp"} <= set(RECIPES)
