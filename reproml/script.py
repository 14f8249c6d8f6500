"""Run a training script, unmodified, and record the digests of what it trained and saved.

    python -m reproml run SCRIPT.py [ARGS...]

The script sees what `python SCRIPT.py ARGS...` would give it: sys.argv, sys.path[0], `__main__`, the
working directory, its exit status and tracebacks. Two things are observed while it runs:

- every optimizer: the parameters that it stepped are digested at the end, in the order in which the
  optimizers were created, as `reproml.digest({"0": first parameter, "1": second, ...})`;
- every state dict that torch.save or safetensors.torch.save_file writes, also inside a checkpoint: it is
  digested when it is saved.

If there is neither, as with a library that has optimizers of its own and no saved file, the modules among
the script's global variables are digested at the end, also those that an object has as its `model`.

With a file for the provenance, the files that the script reads are recorded as well (evidence/inputs.py).
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import io
import json
import os
import platform
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from reproml.arithmetic.patches import replaced
from reproml.digest import digest, file_sha256
from reproml.environment import versions
from reproml.errors import ReproError
from reproml.evidence import provenance
from reproml.evidence.inputs import Inputs
from reproml.files import write_atomically
from reproml.pipeline.train import numerics_mode
from reproml.seeding import Generators
from reproml.terminal import complain
from reproml.tracing import trace
from reproml.versions import DEFINITIONS


@dataclass
class Observer:
    """Records what a script has stepped and saved."""

    # In order of creation. The parameters are kept, not the optimizer: its state may be freed.
    stepped: list[tuple[str, list[torch.Tensor]]] = field(default_factory=list)
    saved: list[dict[str, str]] = field(default_factory=list)
    variables: list[dict[str, str]] = field(default_factory=list)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe the optimizers and the state dicts of this process until the end of the block."""
        known: WeakKeyDictionary[Optimizer, list[torch.Tensor]] = WeakKeyDictionary()

        def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
            if optimizer not in known:
                known[optimizer] = []
                self.stepped.append((type(optimizer).__name__, known[optimizer]))
            return known[optimizer]

        def recording_init(original: Callable[..., None]) -> Callable[..., None]:
            @functools.wraps(original)
            def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
                parameters(optimizer)
                original(optimizer, *args, **kwargs)

            return init

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            groups = optimizer.param_groups  # may have grown; a copied optimizer is new here
            parameters(optimizer)[:] = [p for group in groups for p in group["params"]]

        hook = register_optimizer_step_post_hook(after_step)
        try:
            with replaced(
                [
                    (Optimizer, "__init__", recording_init),
                    (torch, "save", self._recording_save),
                    (torch.serialization, "save", self._recording_save),
                    (safetensors.torch, "save_file", self._recording_save),
                ]
            ):
                yield
        finally:
            hook.remove()

    def _recording_save(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save(content: Any, to: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(to, (str, os.PathLike)):  # the writers in C++ and Rust report nothing
                sys.audit("open", to, "wb", os.O_WRONLY)
            result = original(content, to, *args, **kwargs)
            name = to if isinstance(to, (str, os.PathLike)) else getattr(to, "name", "(no name)")
            for place, state in state_dicts(str(name), content):
                self.saved.append({"file": place, "state_dict.sha256": digest(state)})
            return result

        return save

    def find_models(self, variables: dict[str, Any]) -> None:
        """Digest the modules among the variables, each once, if nothing was stepped or saved."""
        if self.saved or any(parameters for _, parameters in self.stepped):
            return
        known: set[int] = set()
        for name, value in list(variables.items()):  # a digest may run code that adds a variable
            for place, model in _models(name, value):
                if id(model) in known:
                    continue
                known.add(id(model))
                try:
                    found = [(p, digest(state)) for p, state in state_dicts(place, model)]
                except Exception as error:  # the script has succeeded, with whatever it made
                    complain(f"no digest of the variable {place}: {error}")
                    continue
                self.variables += [
                    {"variable": p, "state_dict.sha256": sha256} for p, sha256 in found
                ]

    def result(self) -> dict[str, Any]:
        """Return the digests, as JSON: the option --digest writes them."""
        return {
            "optimizers": [
                {
                    "optimizer": name,
                    "tensors": len(parameters),
                    "parameters.sha256": digest({str(i): p for i, p in enumerate(parameters)}),
                }
                for name, parameters in self.stepped
                if parameters
            ],
            "saved": self.saved,
            **({"variables": self.variables} if self.variables else {}),
        }


def execute(
    script: str,
    arguments: list[str],
    numerics: str = "exact",
    digest_file: Optional[Path] = None,
    trace_file: Optional[Path] = None,
    seed: Optional[int] = None,
    provenance_file: Optional[Path] = None,
    builder: Optional[str] = None,
) -> tuple[Optional[SystemExit], dict[str, Any]]:
    """Run the script as `__main__` of this process, which cannot be undone.

    Return the SystemExit that the script raised, if any, and the digests, which are also written to
    `digest_file` as JSON. `trace_file` records the steps of its training. `seed` seeds the generators of
    Python, NumPy and PyTorch before; the result names those that the script drew from without a seed.
    `provenance_file` is written with a statement of the training by the machine with the name `builder`.

    An exception that the script does not catch is printed with its traceback and raises SystemExit(1);
    there are no digests then, as a training that failed half-way has no result. Raises ReproError if the
    script cannot be read or a file cannot be written.
    """
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise ReproError(f"cannot read the script {script}: {error.strerror}") from None
    target = digest_file and _writable(digest_file)  # absolute: the script may change the folder
    statement = provenance_file and _writable(provenance_file)
    about = _About(script, source, arguments, numerics, seed, builder) if statement else None
    observer = Observer()
    # The trace is opened before sys.argv is set: its header records this process's command line.
    # Its numerics show `diff --rerun` that this verb recorded it and not the script.
    traced = trace(trace_file, about={"numerics": numerics}) if trace_file else nullcontext()
    with traced as recorder:
        main = _main_module(script, arguments, path)
        generators = Generators(seed)
        reading = about.inputs.watching() if about else nullcontext()
        with observer.observing(), generators.watching(), reading:
            exit_request = _execute_source(source, path, main, numerics)
        if recorder and not recorder.steps:
            complain(f"{trace_file} has no step: no optimizer of torch.optim took one")
        observer.find_models(main.__dict__)
        result = {"definitions": DEFINITIONS, "numerics": numerics, **observer.result()}
        if generators.unseeded:
            result["unseeded"] = generators.unseeded
        if target:
            _write_json(target, result)
    if about and statement:
        _write(statement, about.provenance(result, recorder))
    return exit_request, result


class _About:
    """What the provenance of a script states: made before the script is run, and completed after it."""

    def __init__(
        self,
        script: str,
        source: bytes,
        arguments: list[str],
        numerics: str,
        seed: Optional[int],
        builder: Optional[str],
    ) -> None:
        self.inputs = Inputs(script)
        self._builder = provenance.builder_id(builder)  # an invalid name is an error now
        self._started = provenance.timestamp()
        self._parameters = {
            "script": Path(script).as_posix(),
            "arguments": arguments,
            "seed": seed,
            "numerics": numerics,
        }
        sha256 = {"sha256": hashlib.sha256(source).hexdigest()}
        self._dependencies = [
            provenance.describe(Path(script).as_posix(), sha256, kind=provenance.SCRIPT),
            *provenance.revision(Path(os.path.abspath(script)), "revision of the script"),
            *provenance.source_dependencies(),
        ]

    def provenance(self, result: dict[str, Any], recorder: Any) -> bytes:
        """Return the content of the provenance file. Raises ReproError if nothing was trained."""
        parameters = [
            _digested(f"parameters of optimizer {i}: {o['optimizer']}", o["parameters.sha256"])
            for i, o in enumerate(result["optimizers"], 1)
        ]
        states = {s["file"]: s["state_dict.sha256"] for s in result["saved"]}  # the last of each
        states.update({v["variable"]: v["state_dict.sha256"] for v in result.get("variables", [])})
        subjects = [_digested(*state) for state in states.items()] or parameters
        if not subjects:
            raise ReproError(
                "no provenance was written: the script trained and saved nothing; save its model with "
                "torch.save(model.state_dict(), FILE)"
            )
        head = recorder.head() if recorder else {}
        traced = {"sha256": head.get("sha256", "")}
        return provenance.make_provenance(
            subjects,
            "script",
            self._parameters,
            [*self._dependencies, *self.inputs.dependencies()],
            internal={
                "architecture": platform.machine(),
                "unseeded": result.get("unseeded", []),
            },
            builder=self._builder,
            versions=versions(),
            times=(self._started, provenance.timestamp()),
            byproducts=[
                *(parameters if states else []),
                *(
                    [provenance.describe("head of the trace", traced)]
                    if head.get("entries")
                    else []
                ),
            ],
        )


def _digested(name: str, digest: str) -> provenance.Descriptor:
    """Describe a state dict by its digest; a file of nothing else by its SHA-256 as well."""
    digests = {provenance.STATE_DICT: digest}
    if name.endswith(".safetensors") and os.path.isfile(name):
        digests["sha256"] = file_sha256(Path(name))
    return provenance.describe(name, digests)


def _main_module(script: str, arguments: list[str], path: str) -> types.ModuleType:
    """Make a new `__main__`, and set sys.argv and sys.path[0] as Python sets them for a script."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    return main


def lines(result: dict[str, Any]) -> list[str]:
    """Return the digests as lines of text: each SHA-256, and which tensors it covers."""
    return [
        f"{o['parameters.sha256']}  parameters of optimizer {i}: {o['optimizer']}, "
        f"{o['tensors']} tensor{'s' * (o['tensors'] != 1)}"
        for i, o in enumerate(result["optimizers"], 1)
    ] + [
        *(f"{s['state_dict.sha256']}  state dict saved: {s['file']}" for s in result["saved"]),
        *(
            f"{v['state_dict.sha256']}  state dict at the end: {v['variable']}"
            for v in result.get("variables", [])
        ),
    ]


def _execute_source(
    source: bytes, path: str, main: types.ModuleType, numerics: str
) -> Optional[SystemExit]:
    code = None
    try:
        code = compile(source, path, "exec", dont_inherit=True)
        with numerics_mode(numerics):
            exec(code, main.__dict__)
    except SystemExit as exit_request:
        return exit_request
    except Exception as error:
        inner = error.__traceback__
        while inner and inner.tb_frame.f_code is not code:
            inner = inner.tb_next  # only the frames of the script, as Python prints them
        sys.excepthook(type(error), error.with_traceback(inner), inner)
        raise SystemExit(1) from None
    return None


def _models(name: str, value: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield a variable that is a module, and the module in its attribute `model`."""
    try:
        inside = object.__getattribute__(value, "__dict__").get("model")
    except Exception:  # it has no attributes, or only computed ones
        inside = None
    for place, model in ((name, value), (f"{name}.model", inside)):
        if issubclass(type(model), torch.nn.Module):
            yield place, model


def state_dicts(place: str, content: Any) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Yield the state dicts in what is saved: itself, a module's, or those inside a checkpoint.

    Only below keys that are strings: an optimizer's state, with a number for each parameter, is skipped. So
    are scores by file, such as those of Lightning's checkpoints, whose absolute paths differ between runs.
    """
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    if content and all(_dense(value) for value in content.values()):
        if not any(map(os.path.isabs, content)):
            yield place, content
        return
    for key, value in content.items():
        yield from state_dicts(f"{place}[{key!r}]", value)


def _dense(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def _writable(path: Path) -> Path:
    """Return the absolute path. Raises ReproError, before the training, if it cannot be written."""
    path = Path(os.path.abspath(path))
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ReproError(f"cannot write {path}: give a file name in a folder that can be written")
    return path


def _write_json(path: Path, result: dict[str, Any]) -> None:
    _write(path, (json.dumps(result, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ReproError(f"cannot write {path}: {error.strerror}") from None
