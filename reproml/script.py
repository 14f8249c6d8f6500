"""Run somebody's training script, unmodified, and tell the digests of what it trained and saved.

    python -m reproml run SCRIPT.py [ARGS...]

The script sees what `python SCRIPT.py ARGS...` would show it: sys.argv, sys.path[0], `__main__`, the
working directory, its exit status and tracebacks. Two things are watched while it runs:

- every optimizer: the parameters it stepped are digested at the end, in the order in which the
  optimizers were created, as `reproml.digest({"0": first parameter, "1": second, ...})`;
- every state dict that torch.save or safetensors.torch.save_file writes, also inside a checkpoint:
  digested when it is saved.
"""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from reproml.digest import digest
from reproml.errors import ReproError
from reproml.files import write_atomically
from reproml.pipeline.train import numerics_mode
from reproml.tracing import trace
from reproml.versions import DEFINITIONS


@dataclass
class Watch:
    """What a script stepped and saved so far."""

    # In order of creation. The parameters are kept, not the optimizer: its state may be freed.
    stepped: list[tuple[str, list[torch.Tensor]]] = field(default_factory=list)
    saved: list[dict[str, str]] = field(default_factory=list)

    def begin(self) -> None:
        """Watch every optimizer made and every state dict saved from now on in this process."""
        plain_init = Optimizer.__init__
        known: WeakKeyDictionary[Optimizer, list[torch.Tensor]] = WeakKeyDictionary()

        def parameters(optimizer: Optimizer) -> list[torch.Tensor]:
            if optimizer not in known:
                known[optimizer] = []
                self.stepped.append((type(optimizer).__name__, known[optimizer]))
            return known[optimizer]

        @functools.wraps(plain_init)
        def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            parameters(optimizer)
            plain_init(optimizer, *args, **kwargs)

        def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            groups = optimizer.param_groups  # may have grown; a copied optimizer is new here
            parameters(optimizer)[:] = [p for group in groups for p in group["params"]]

        Optimizer.__init__ = init  # type: ignore[method-assign, assignment]
        register_optimizer_step_post_hook(after_step)
        torch.save = torch.serialization.save = self._recording(torch.save)
        safetensors.torch.save_file = self._recording(safetensors.torch.save_file)

    def _recording(self, plain_save: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain_save)
        def save(content: Any, to: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain_save(content, to, *args, **kwargs)
            name = to if isinstance(to, (str, os.PathLike)) else getattr(to, "name", "(no name)")
            for place, state in _state_dicts(str(name), content):
                self.saved.append({"file": place, "state_dict.sha256": digest(state)})
            return result

        return save

    def result(self) -> dict[str, Any]:
        """Return the digests, as the option --digest writes them."""
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
        }


def run(
    script: str,
    arguments: list[str],
    numerics: str = "exact",
    digest_file: Optional[Path] = None,
    trace_file: Optional[Path] = None,
) -> tuple[Optional[SystemExit], dict[str, Any]]:
    """Run the script as `__main__` of this process, which cannot be undone.

    Return how it wants to exit, if it says so, and the digests, which `digest_file` gets as JSON; its
    steps are recorded in `trace_file`.
    An exception that the script does not catch is shown with its traceback and ends it with
    SystemExit(1), without digests: what it left half-trained is no result. Raises ReproError if the
    script cannot be read or the file not be written.
    """
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise ReproError(f"cannot read the script {script}: {error.strerror}") from None
    target = digest_file and _writable(digest_file)  # absolute: the script may change the folder
    # Entered here, as its header tells this process's own command line.
    traced = trace(trace_file) if trace_file else nullcontext()
    with traced:
        return _run(script, arguments, numerics, source, path, target)


def _run(
    script: str,
    arguments: list[str],
    numerics: str,
    source: bytes,
    path: str,
    target: Optional[Path],
) -> tuple[Optional[SystemExit], dict[str, Any]]:
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(os.path.realpath(path))
    watch = Watch()
    watch.begin()
    wish = _execute(source, path, main, numerics)
    result = {"definitions": DEFINITIONS, "numerics": numerics, **watch.result()}
    if target:
        _write_json(target, result)
    return wish, result


def lines(result: dict[str, Any]) -> list[str]:
    """Return what a person reads of the digests: the SHA-256, then what it is over."""
    return [
        f"{o['parameters.sha256']}  parameters of optimizer {i}: {o['optimizer']}, "
        f"{o['tensors']} tensor{'s' * (o['tensors'] != 1)}"
        for i, o in enumerate(result["optimizers"], 1)
    ] + [f"{s['state_dict.sha256']}  state dict saved: {s['file']}" for s in result["saved"]]


def _execute(
    source: bytes, path: str, main: types.ModuleType, numerics: str
) -> Optional[SystemExit]:
    code = None
    try:
        code = compile(source, path, "exec", dont_inherit=True)
        with numerics_mode(numerics):
            exec(code, main.__dict__)
    except SystemExit as wish:
        return wish
    except Exception as error:
        inner = error.__traceback__
        while inner and inner.tb_frame.f_code is not code:
            inner = inner.tb_next  # the script's own frames only, as usual
        sys.excepthook(type(error), error.with_traceback(inner), inner)
        raise SystemExit(1) from None
    return None


def _state_dicts(place: str, content: Any) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Yield the state dicts in what is saved: itself, a module's, or those inside a checkpoint.

    Only below names: an optimizer's state, numbered by parameter, is not taken apart.
    """
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        return
    if content and all(_dense(value) for value in content.values()):
        yield place, content
        return
    for key, value in content.items():
        yield from _state_dicts(f"{place}[{key!r}]", value)


def _dense(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def _writable(path: Path) -> Path:
    """Find out now, not after the training, whether the file can be written."""
    path = Path(os.path.abspath(path))
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ReproError(f"cannot write {path}: give a file name in a folder that can be written")
    return path


def _write_json(path: Path, result: dict[str, Any]) -> None:
    try:
        write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise ReproError(f"cannot write {path}: {error.strerror}") from None
