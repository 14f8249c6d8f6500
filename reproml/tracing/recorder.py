"""Record a training at PyTorch's own functions, so that no training loop changes.

    where                          what is recorded
    a DataLoader's iterator        the loader's settings; a new iterator begins a new epoch
    a DataLoader's next batch      its tensors: the batch, if a backward pass follows
    a module called directly       its input tensors that need no gradient, unless they are the loader's
    torch.autograd.backward        the loss; the batch is complete
    an optimizer, before a step    the gradients and the state of the random number generator
    an optimizer, after a step     the weights; the entry is written

Only what happens with gradients enabled is recorded, so an evaluation leaves no trace. Tensors are
recorded by their fingerprints (fingerprint.py); the weights at the start, after each epoch and at the end
also by their SHA-256.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import DataLoader

from reproml import environment
from reproml.arithmetic import state
from reproml.arithmetic.dispatch.schema import tensors
from reproml.arithmetic.patches import replaced
from reproml.digest import digest
from reproml.torch_internals import BaseDataLoaderIter
from reproml.tracing import facts
from reproml.tracing.chain import Writer
from reproml.tracing.fingerprint import fingerprints, first, measure, readable, unseen
from reproml.tracing.operators import Operators
from reproml.versions import DEFINITIONS

RERUN = "REPROML_TRACE_RERUN"  # see rerun.py
# How many elements of the last parameter are recorded, to see a difference grow: all layers affect them.
_SAMPLE = 8


# Attributes of a data loader's iterator: the number of its pass, and the settings of its loader.
_PASS, _LOADER = "_reproml_pass", "_reproml_loader"


class StepReached(BaseException):
    """Ends a rerun at its last step; training code does not catch a BaseException."""


@dataclass
class _Stepped:
    """An optimizer and its parameters by name; the parameters are kept, its state may be freed."""

    optimizer: weakref.ref[Optimizer]
    named: dict[str, Tensor]


class Recorder:
    """Writes one trace. `reproml.trace` creates it."""

    def __init__(
        self, path: Path, level: str, resume: Optional[dict[str, Any]], about: dict[str, Any]
    ) -> None:
        self._level = level
        header = {"level": level, **_command_line(), **about, "environment": environment.describe()}
        self._writer = Writer(path, header, resume)
        self._step = resume["step"] if resume else 0
        self._epoch = resume["epoch"] if resume else 0
        self._known = resume["optimizers"] if resume else 0  # optimizers that the file contains
        self._optimizers: list[_Stepped] = []  # in order of their first step
        self._pass: Optional[int] = None  # the pass of a data loader that is the current epoch
        self._last: Optional[int] = None  # the pass that the last batch came from
        self._passes = 0
        # The modules that were called directly, and how they were called last.
        self._roots: weakref.WeakKeyDictionary[nn.Module, facts.Call] = weakref.WeakKeyDictionary()
        self._inside_module = False
        self._calls: dict[str, Any] = {}  # what they have in common
        self._made_of: Any = None  # what the facts of the step before were made of
        self._about: dict[str, Any] = {**resume.get("about", {})} if resume else {}  # in the file
        self._loaders: list[dict[str, Any]] = []  # of the batches since the last step
        self._kinds: list[Any] = []  # of the tensors of the batch
        self._batch_kinds: list[str] = []  # the same in words
        # By source, with the settings of its loader; not yet used by a backward pass.
        self._fetched: dict[int, tuple[list[Tensor], Any]] = {}
        self._inputs: list[Tensor] = []
        self._batch: list[Tensor] = []
        self._origins: list[bool] = []  # whether a tensor of the batch is only a module's input
        self._batch_found: list[tuple[int, int]] = []  # fingerprint, sum
        self._loss: list[str] = []
        self._loss_kinds: list[str] = []
        self._gradients: list[Optional[str]] = []
        self._gradient: list[Any] = []
        self._random = ""
        self._places = ExitStack()  # restores what `_listen` replaced
        self._rerun: Optional[tuple[int, Path]] = None
        self._operators: Optional[Operators] = None
        self._process = os.getpid()

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, level: str, resume: Optional[dict[str, Any]], about: dict[str, Any]
    ) -> Iterator[Recorder]:
        """Record until the end of the block, then restore what was replaced."""
        rerun = json.loads(os.environ[RERUN]) if RERUN in os.environ else None
        if rerun:
            path, level, resume = Path(rerun["folder"]) / "trace", "op", None
        recorder = cls(path, level, resume, about)
        if rerun:
            recorder._rerun = rerun["step"], Path(rerun["folder"])
        with ExitStack() as stack:
            stack.callback(recorder._writer.close)
            stack.callback(recorder._places.close)
            recorder._listen(recorder._places)
            yield recorder
            recorder._write_weights("end")

    @property
    def steps(self) -> int:
        """The number of steps that optimizers have taken."""
        return self._step

    def head(self) -> dict[str, Any]:
        """Return the current end of the trace, as JSON, to be kept in a checkpoint and passed as `resume`.

        The file is flushed to the disk up to this point. entries and sha256 are the number of entries and
        the head of the last; numbering continues from step, epoch and optimizers. An unfinished epoch is
        counted as one that begins again.
        """
        self._writer.sync()
        return {
            "entries": self._writer.entries,
            "sha256": self._writer.head,
            "step": self._step,
            "epoch": self._epoch - (self._pass is not None),
            "optimizers": max(self._known, len(self._optimizers)),
            "about": dict(self._about),
        }

    @contextmanager
    def restoring(self) -> Iterator[Callable[[nn.Module, Optimizer], None]]:
        """Implement `tracing.restoring`."""
        self._places.close()
        try:
            yield self._restored
        finally:
            self._listen(self._places)

    def _restored(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._roots[model] = facts.call(model)
        self._calls = facts.calls(self._roots)
        self._optimizers.append(_Stepped(weakref.ref(optimizer), self._named(optimizer)))

    # --- recording ------------------------------------------------------------------------------------

    def _listen(self, stack: ExitStack) -> None:
        observed = [
            (nn.Module, "__call__", self._call),
            (DataLoader, "__iter__", self._iterate),
            (BaseDataLoaderIter, "__next__", self._next),
        ]
        if self._level != "epoch":
            observed.append((torch.autograd, "backward", self._backward))
        stack.enter_context(replaced(observed))
        stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
        if self._level == "op":
            self._operators = Operators(self._write_operator)
            stack.enter_context(self._operators)

    def _iterate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def iterate(loader: Any) -> Any:
            iterator = original(loader)
            vars(iterator)[_LOADER] = facts.loader(loader)
            return iterator

        return iterate

    def _next(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def next_batch(iterator: Any) -> Any:
            attributes = iterator.__dict__  # holds the number of its pass until the pass ends
            try:
                data = original(iterator)
            except StopIteration:
                if self._pass is not None and attributes.get(_PASS) == self._pass:
                    self.end_epoch()
                else:  # a validation with gradients enabled: its last batch belongs to no step
                    self._fetched.pop(id(iterator), None)
                attributes.pop(_PASS, None)
                raise
            if torch.is_grad_enabled():
                if _PASS not in attributes:
                    self._passes += 1
                    attributes[_PASS] = self._passes
                self._last = attributes[_PASS]
                self._fetch(id(iterator), data, attributes.get(_LOADER))
            return data

        return next_batch

    def batch(self, data: Any) -> None:
        """Record a batch that does not come from a data loader."""
        self._last = self._last or 0
        self._fetch(0, data)

    def end_epoch(self) -> None:
        """Write the weights after an epoch."""
        self._write_weights("epoch")
        self._pass = None

    def _fetch(self, source: int, data: Any, settings: Any = None) -> None:
        if self._level != "epoch":
            self._fetched[source] = list(tensors(data)), settings

    def _call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._inside_module or not torch.is_grad_enabled():
                return original(module, *args, **kwargs)
            called = facts.call(module)
            if self._roots.get(module) != called:
                self._roots[module] = called
                self._calls = facts.calls(self._roots)
            if self._level != "epoch" and module.training:
                self._inputs += [x for x in tensors([args, kwargs]) if not x.requires_grad]
            self._inside_module = True
            try:
                return original(module, *args, **kwargs)
            finally:
                self._inside_module = False

        return call

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
            self._take_batch()
            for x in tensors(roots):
                loss = repr(first(x, 1)[0]) if x.numel() == 1 else fingerprints([x])[0]
                self._loss.append(loss)
                self._loss_kinds.append(facts.tensor(x))
            return original(roots, *args, **kwargs)

        return backward

    def _take_batch(self) -> None:
        batch = [x for fetched, _ in self._fetched.values() for x in fetched]
        known = {id(x) for x in batch}
        inputs = [x for x in self._inputs if id(x) not in known]
        self._batch += batch + inputs  # measured before the optimizer's step, all at once
        self._origins += [False] * len(batch) + [True] * len(inputs)
        for _, settings in self._fetched.values():
            if settings and settings not in self._loaders:
                self._loaders.append(settings)
        self._fetched.clear()
        self._inputs.clear()

    # --- entries --------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        number = self._number(optimizer)
        if number == len(self._optimizers):
            self._optimizers.append(_Stepped(weakref.ref(optimizer), self._named(optimizer)))
            if number >= self._known:
                with unseen():
                    self._write_optimizer(number, optimizer)
        if self._last is not None and self._last != self._pass:
            self._epoch += 1
            self._pass = self._last
        if self._level != "epoch":
            if not self._loss:  # no `backward` made the gradients: torch.autograd.grad, for example
                self._take_batch()
            gradients = [p.grad for p in _parameters(optimizer)]
            present = [g for g in gradients if g is not None]
            size = len(self._batch)
            self._describe_batch()
            found = measure([*self._batch, torch.get_rng_state(), *present], size)
            self._batch_found = found[:size]
            prints = iter([f"{fingerprint:016x}" for fingerprint, _ in found[size:]])
            self._random = next(prints)
            self._gradients = [None if g is None else next(prints) for g in gradients]
            self._gradient = first(present[-1], _SAMPLE) if present else []
            self._batch, self._origins = [], []

    def _describe_batch(self) -> None:
        kinds = [(x.dtype, x.shape, x.stride(), o) for x, o in zip(self._batch, self._origins)]
        if kinds != self._kinds:
            self._kinds = kinds
            self._batch_kinds = [
                facts.INPUT * only_input + facts.tensor(x)
                for x, only_input in zip(self._batch, self._origins)
            ]

    def _new_facts(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return how this step was computed, as far as it differs from what the file has already."""
        process, loaders, self._loaders = facts.process(), self._loaders, []
        rates = [facts.number(group.get("lr")) for group in optimizer.param_groups]
        losses = self._loss_kinds
        made_of = process, rates, self._calls, self._batch_kinds, loaders, losses
        if made_of == self._made_of:  # ten times as fast as what follows
            return {}
        self._made_of = made_of
        found = {
            **dict(zip(("seed", "threads", "precision"), (str(process[0]), *process[1:]))),
            **self._calls,
            "lr": rates,
            "batch": self._batch_kinds,
            **({"losses": losses} if "losses" in self._about or _not_float32(losses) else {}),
            **({"loaders": loaders} if loaders else {}),
        }
        new = {key: value for key, value in found.items() if self._about.get(key) != value}
        self._about.update(new)
        return {"about": new} if new else {}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._step += 1
        if self._level != "epoch":
            weights = _parameters(optimizer)
            self._writer.append(
                {
                    "entry": "step",
                    "epoch": self._epoch,
                    "step": self._step,
                    "optimizer": self._number(optimizer),
                    "random": self._random,
                    "batch": [[f"{f:016x}", f"{total:x}"] for f, total in self._batch_found],
                    "loss": self._loss,
                    "gradients": self._gradients,
                    "weights": fingerprints(weights),
                    "sample": first(weights[-1], _SAMPLE),
                    "gradient": self._gradient,
                    **self._new_facts(optimizer),
                }
            )
            self._loss, self._loss_kinds = [], []
        if self._rerun:
            with unseen():
                self._end_rerun(optimizer)

    def _end_rerun(self, optimizer: Optimizer) -> None:
        assert self._rerun is not None and self._operators is not None
        step, folder = self._rerun
        if self._step < step:
            return
        for name, value in (("gradients", lambda p: p.grad), ("weights", lambda p: p)):
            found = {n: value(p) for n, p in self._named(optimizer).items()}
            save(folder / f"{name}.safetensors", {n: x for n, x in found.items() if x is not None})
        raise StepReached

    def _write_operator(self, found: dict[str, Any], outputs: list[Tensor]) -> None:
        """Write an operator; in a rerun, only those of the last step, together with their results."""
        if os.getpid() != self._process:  # a worker of a data loader, which has inherited the file
            return
        if self._rerun:
            step, folder = self._rerun
            if self._step + 1 != step:
                return
            save(
                folder / f"{self._writer.entries + 1}.safetensors",
                {str(i): x for i, x in enumerate(outputs)},
            )
        self._writer.append({"entry": "op", "step": self._step + 1, **found})

    def _write_optimizer(self, number: int, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        self._writer.append(
            {
                "entry": "optimizer",
                "optimizer": number,
                "kind": type(optimizer).__name__,
                "numerics": "exact" if state.active.depth else "native",
                "settings": [
                    {k: repr(v) for k, v in sorted(g.items()) if k != "params"} for g in groups
                ],
                "tensors": list(self._named(optimizer)),
                "shapes": [list(p.shape) for p in _parameters(optimizer)],
                "kinds": [facts.tensor(p) for p in _parameters(optimizer)],
                "modules": [line for root in self._roots for line in facts.modules(root)],
                "weights": fingerprints(_parameters(optimizer)),
                "weights.sha256": _digest(self._named(optimizer)),
            }
        )

    def _write_weights(self, entry: str) -> None:
        with unseen():
            self._writer.append(
                {
                    "entry": entry,
                    "epoch": self._epoch,
                    "step": self._step,
                    "weights": [fingerprints(list(o.named.values())) for o in self._optimizers],
                    "weights.sha256": [_digest(o.named) for o in self._optimizers],
                }
            )

    # --- names ----------------------------------------------------------------------------------------

    def _number(self, optimizer: Optimizer) -> int:
        for number, known in enumerate(self._optimizers):
            if known.optimizer() is optimizer:
                return number
        return len(self._optimizers)

    def _named(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the optimizer's parameters under their modules' names, else under numbers."""
        names: dict[int, str] = {}
        roots = sorted(
            (m for m in self._roots if next(m.parameters(), None) is not None),
            key=lambda m: -sum(1 for _ in m.parameters()),
        )
        for root in roots:
            for name, parameter in root.named_parameters():
                names.setdefault(id(parameter), name)
        found = [(names.get(id(p), str(i)), p) for i, p in enumerate(_parameters(optimizer))]
        if len({name for name, _ in found}) < len(found):
            return {f"{i}: {name}": p for i, (name, p) in enumerate(found)}
        return dict(found)


def save(path: Path, values: dict[str, Tensor]) -> None:
    """Write tensors of any layout and device; tensors that share memory are written separately."""
    safetensors.torch.save_file(
        {name: readable(x).detach().cpu().contiguous().clone() for name, x in values.items()}, path
    )


def _digest(values: dict[str, Tensor]) -> str:
    return digest({name: readable(x) for name, x in values.items()})


def _not_float32(kinds: list[str]) -> bool:
    return not all(kind.startswith("float32") for kind in kinds)


def _command_line() -> dict[str, Any]:
    """Return how this process was started, to run it again; a notebook has no command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    command = None
    if spec is not None:
        command = [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    elif sys.argv and os.path.isfile(sys.argv[0]):
        command = [sys.executable, *sys.argv]
    return {"command": command, "folder": os.getcwd(), "definitions": DEFINITIONS}


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
