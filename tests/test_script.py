from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import torch
from safetensors.torch import load_file

import reproml
from reproml.diff.compare import compare
from reproml.script import Observer, state_dicts
from verification.subprocesses import Completed, Reproml, environment

TRAIN = """
import torch

torch.manual_seed(1)
model = torch.nn.Linear(3, 2)
idle = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.rand(4, 3)).sum().backward()
    optimizer.step()
"""


def python(folder: Path, *arguments: str) -> Completed:
    child = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return Completed(child.returncode, child.stdout, child.stderr)


@pytest.fixture(scope="module")
def reproml_in() -> Iterator[Reproml]:
    with Reproml() as server:
        yield server


@pytest.fixture
def reproml_run(reproml_in: Reproml, tmp_path: Path) -> Callable[..., Completed]:
    """`python -m reproml run ARGUMENTS` in tmp_path, where script.py holds `source`."""

    def run(*arguments: str, source: Optional[str] = None) -> Completed:
        if source is not None:
            (tmp_path / "script.py").write_text(source)
        return reproml_in(tmp_path, "run", *arguments)

    return run


def trained() -> torch.nn.Linear:
    names: dict[str, Any] = {}
    with reproml.exact():
        exec(TRAIN, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Linear)
    return model


def test_run_digests_parameters_andstate_dicts(tmp_path):
    source = TRAIN + (
        "from safetensors.torch import save_file\n"
        "torch.save(model.state_dict(), 'plain.pt')\n"
        "torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(),"
        " 'epoch': 3}, 'checkpoint.pt')\n"
        "save_file(model.state_dict(), 'model.safetensors')\n"
        "torch.save([1, 2], 'other.pt')\n"
    )
    (tmp_path / "script.py").write_text(source)
    shown = python(tmp_path, "-m", "reproml", "run", "--digest", "digest.json", "script.py")
    assert (shown.returncode, shown.stderr) == (0, "")
    model = trained()
    stepped = reproml.digest({"0": model.weight, "1": model.bias})
    state = reproml.digest(model)
    files = ["plain.pt", "checkpoint.pt['model']", "model.safetensors"]
    assert shown.stdout.splitlines() == [
        f"{stepped}  parameters of optimizer 1: AdamW, 2 tensors",  # the idle one took no step
        *[f"{state}  state dict saved: {file}" for file in files],
    ]
    assert json.loads((tmp_path / "digest.json").read_text()) == {
        "definitions": reproml.arithmetic.DEFINITIONS,
        "numerics": "exact",
        "optimizers": [{"optimizer": "AdamW", "tensors": 2, "parameters.sha256": stepped}],
        "saved": [{"file": file, "state_dict.sha256": state} for file in files],
    }
    assert reproml.digest(load_file(tmp_path / "model.safetensors")) == state
    assert reproml.digest(torch.load(tmp_path / "plain.pt", weights_only=True)) == state


def test_optimizers_are_listed_in_order_of_creation(reproml_run):
    source = (
        "import copy, torch\n"
        "p, q, r = (torch.nn.Parameter(torch.tensor([float(i)])) for i in range(3))\n"
        "first = torch.optim.SGD([p], lr=1)\n"
        "class Mine(torch.optim.SGD): pass\n"
        "second = Mine([q], lr=1)\n"
        "third = copy.deepcopy(first)\n"  # a copy is listed when it first steps
        "for optimizer in (third, second, first):\n"
        "    for x in optimizer.param_groups[0]['params']:\n"
        "        x.grad = torch.ones(1)\n"
        "    optimizer.step()\n"
        "first.add_param_group({'params': [r]})\n"
        "first.step()\n"
        "del first, second, third, optimizer\n"
    )
    shown = reproml_run("script.py", source=source)
    assert shown.stderr == ""
    one = torch.ones(1)
    assert shown.stdout.splitlines() == [
        f"{reproml.digest({'0': -2 * one, '1': 2 * one})}  "
        "parameters of optimizer 1: SGD, 2 tensors",
        f"{reproml.digest({'0': 0 * one})}  parameters of optimizer 2: Mine, 1 tensor",
        f"{reproml.digest({'0': -one})}  parameters of optimizer 3: SGD, 1 tensor",
    ]


def test_native_numerics_give_pytorch_results(reproml_run):
    x = "torch.special.bessel_y0(torch.linspace(0, 1, 5))"  # which is refused
    source = f"import torch; torch.save({{'x': {x}}}, 'x.pt')\n"
    assert reproml_run("script.py", source=source).returncode == 1
    shown = reproml_run("--numerics", "native", "script.py", source=source)
    expected = torch.special.bessel_y0(torch.linspace(0, 1, 5))
    assert shown.stdout.split()[0] == reproml.digest({"x": expected})


SCRIPTS = {
    "the surroundings": (
        "import os, sys\n"
        "import beside\n"
        "print(sys.argv, sys.path[0], os.getcwd(), __name__, __file__, __spec__, __package__)\n"
        "print(__doc__, sys.modules['__main__'].__dict__ is globals())\n"
    ),
    "a docstring": "'What this is.'\nprint(__doc__)\n",
    "pickling a class of its own": (
        "import pickle\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__ is A)\n"
    ),
    "exit 3": "import sys; sys.exit(3)",
    "exit None": "import sys; sys.exit()",
    "exit with a message": "import sys; sys.exit('no good')",
    "exit with a bool": "raise SystemExit(True)",
    "exit at the end": "import atexit; atexit.register(print, 'bye'); print('hello')",
    "an exception": "def f():\n    raise ValueError('bad')\nprint('before')\nf()\n",
    "a chain": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('x') from e\n",
    "a syntax error": "x = = 1\n",
    "its own excepthook": "import sys; sys.excepthook = lambda *e: print(e[0])\n1 / 0\n",
    "an encoding": "# coding: latin-1\nprint('\u00e4')\n",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_run_behaves_like_python(tmp_path, reproml_run, what):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "beside.py").write_text("")
    encoding = "latin-1" if what == "an encoding" else "utf-8"
    (folder / "script.py").write_text(SCRIPTS[what], encoding=encoding)
    arguments = ["scripts/script.py", "-h", "--digest", "x", "--", "--steps=3", "a b"]
    expected = python(tmp_path, *arguments)
    shown = reproml_run(*arguments)
    assert shown.returncode == expected.returncode
    assert shown.stdout == expected.stdout
    errors = [line for line in shown.stderr.splitlines(True) if "nothing to digest" not in line]
    assert "".join(errors) == expected.stderr
    assert not (tmp_path / "x").exists()


def test_digests_are_written_after_system_exit(tmp_path, reproml_run):
    source = TRAIN + "raise SystemExit(4)\n"
    shown = reproml_run("--digest", "digest.json", "script.py", source=source)
    assert (shown.returncode, shown.stderr) == (4, "")
    assert "optimizer 1" in shown.stdout and (tmp_path / "digest.json").exists()


def test_no_digests_are_written_after_an_exception(tmp_path, reproml_run):
    (tmp_path / "digest.json").write_text("old")
    shown = reproml_run("--digest", "digest.json", "script.py", source=TRAIN + "1 / 0\n")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert (tmp_path / "digest.json").read_text() == "old"


def test_refusal_names_operator_and_line(reproml_run):
    shown = reproml_run(
        "script.py", source="import torch\n\ntorch.special.bessel_y0(torch.ones(3))\n"
    )
    assert shown.returncode == 1
    last = shown.stderr.splitlines()[-1]
    assert "NotExactError" in last and "aten.special_bessel_y0" in last and "script.py:3" in last


def test_digest_path_is_relative_to_starting_folder(tmp_path, reproml_run):
    (tmp_path / "elsewhere").mkdir()
    source = "import os; os.chdir('elsewhere')"
    assert reproml_run("--digest", "d.json", "script.py", source=source).returncode == 0
    assert (tmp_path / "d.json").exists() and os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.py"], "cannot read the script none.py: No such file"),
        (["."], "cannot read the script .: Is a directory"),
        (["--digest", "no/such/d.json", "script.py"], "cannot write .*/no/such/d.json"),
        (["--digest", ".", "script.py"], "cannot write .*: give a file name"),
    ],
)
def test_bad_input_is_reported_before_the_script_runs(tmp_path, reproml_run, arguments, words):
    (tmp_path / "script.py").write_text("print('ran')")
    shown = reproml_run(*arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.count("\n") == 1
    assert re.search(words, shown.stderr)


def test_run_reports_that_nothing_was_digested(reproml_run):
    result = reproml_run("script.py", source="import torch\nprint(torch.ones(2).sum().item())")
    assert result.returncode == 0
    assert result.stdout == "2.0\n" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("reproml: nothing to digest: ")
    assert "torch.save(model.state_dict(), FILE)" in result.stderr


OWN_OPTIMIZER = """
import torch

class Learner:  # as of a library that has optimizers of its own
    def __init__(self, model):
        self.model = model

    def fit(self):
        self.model(torch.ones(4, 3)).sum().backward()
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.5 * p.grad

torch.manual_seed(1)
"""


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ("network = torch.nn.Linear(3, 2)\nLearner(network).fit()\n", ["network"]),
        ("learn = Learner(torch.nn.Linear(3, 2))\nlearn.fit()\n", ["learn.model"]),
        ("net = torch.nn.Linear(3, 2)\nlearn = Learner(net)\nlearn.fit()\nagain = net\n", ["net"]),
        ("def main():\n    Learner(torch.nn.Linear(3, 2)).fit()\nmain()\n", []),
    ],
)
def test_model_of_other_optimizer_is_found(tmp_path, reproml_run, rest, found):
    shown = reproml_run("--trace", "t", "script.py", source=OWN_OPTIMIZER + rest)
    names: dict[str, Any] = {}
    with reproml.exact():
        exec(OWN_OPTIMIZER + "learn = Learner(torch.nn.Linear(3, 2))\nlearn.fit()\n", names)
    digest = reproml.digest(names["learn"].model)
    assert shown.stdout.splitlines() == [f"{digest}  state dict at the end: {x}" for x in found]
    errors = shown.stderr.splitlines()
    assert errors[0].startswith("reproml: t has no step: no optimizer of torch.optim")
    assert [line.startswith("reproml: nothing to digest: ") for line in errors[1:]] == [True] * (
        not found
    )
    with pytest.raises(reproml.errors.ReproError, match="t has no step to compare"):
        compare(tmp_path / "t", tmp_path / "t")


@pytest.mark.parametrize(
    "model", ["torch.nn.LazyLinear(3)", "torch.nn.Linear(3, 2).to(torch.float8_e4m3fn)"]
)
def test_model_without_digest_is_reported(reproml_run, model):
    """The script has succeeded, and so does the command."""
    shown = reproml_run("script.py", source=f"import torch\nmodel = {model}\n")
    assert shown.returncode == 0 and not shown.stdout
    first, second = shown.stderr.splitlines()
    assert first.startswith("reproml: no digest of the variable model: ")
    assert second.startswith("reproml: nothing to digest")


UNSEEDED = TRAIN.replace(
    "torch.manual_seed(1)", "import random; random.random(); import numpy; numpy.random.rand()"
)


def test_draws_without_a_seed_are_reported(tmp_path, reproml_run):
    found = reproml_run("--digest", "d.json", "script.py", source=UNSEEDED)
    assert found.returncode == 0 and found.stderr == (
        "reproml: the script drew numbers from Python's random and NumPy's global generator and PyTorch's "
        "generator without a seed: if the training uses them, each run has another digest; seed each "
        "generator in the script, or put --seed N before SCRIPT.py\n"
    )
    assert len(json.loads((tmp_path / "d.json").read_text())["unseeded"]) == 3


def test_a_seed_makes_two_runs_agree(reproml_run):
    runs = [reproml_run("--seed", str(n), "script.py", source=UNSEEDED) for n in (7, 7, 8)]
    assert all(x.returncode == 0 and not x.stderr for x in runs)
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout
    refused = reproml_run("--seed", "-1", "script.py")
    assert (
        refused.returncode == 2 and "'-1' is not an integer from 0 to 2**32 - 1" in refused.stderr
    )


def test_interrupt_prints_one_line(tmp_path):
    (tmp_path / "script.py").write_text("import time; print('on', flush=True); time.sleep(60)")
    child = subprocess.Popen(
        [sys.executable, "-m", "reproml", "run", "script.py"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stdout.readline() == "on\n"
    time.sleep(0.2)  # into the sleep
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert (child.returncode, errors) == (130, "reproml: interrupted\n")


def teststate_dicts_are_found_below_string_keys():
    x = torch.ones(2)
    linear = torch.nn.Linear(1, 1)
    content = {
        "model": linear,
        "ema": {"x": x},
        "optimizer": {"state": {0: {"step": x}}, "param_groups": [{"params": [0]}]},
        "loss": 0.5,
        "mixed": {"x": x, "y": 1},
        "empty": {},
        "sparse": {"x": x.to_sparse()},
        "deep": {"er": {"x": x}},
        "scores": {os.path.abspath("best.ckpt"): x},
    }
    found = {place: sorted(state) for place, state in state_dicts("f", content)}
    assert found == {
        "f['model']": ["bias", "weight"],
        "f['ema']": ["x"],
        "f['deep']['er']": ["x"],
    }
    assert list(state_dicts("f", x)) == []


def test_observer_restores_what_it_replaces(tmp_path):
    optimizer_module: Any = sys.modules["torch.optim.optimizer"]

    def replaced() -> list[Any]:
        hooks = len(optimizer_module._global_optimizer_post_hooks)
        return [torch.optim.Optimizer.__init__, torch.save, torch.serialization.save, hooks]

    before, observer = replaced(), Observer()
    with pytest.raises(ZeroDivisionError), observer.observing():
        assert all(x != y for x, y in zip(replaced(), before))
        torch.save({"x": torch.ones(1)}, tmp_path / "x")
        raise ZeroDivisionError
    assert replaced() == before
    torch.save({"x": torch.ones(1)}, tmp_path / "y")
    assert [x["file"] for x in observer.result()["saved"]] == [str(tmp_path / "x")]
