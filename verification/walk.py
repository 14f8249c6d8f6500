"""Call everything that PyTorch offers within exact(), and find what computes without an exact result.

    python -m verification.walk [NAMESPACE or NAME ...]      # default: all of walk_cases.NAMESPACES

Each callable gets arguments for which it works natively (walk_cases.py). Within exact() it is then called
in four places: in the main thread, in a threading.Thread, and in forked and spawned workers of a
DataLoader; and all of this in two settings whose native numerics differ as much as possible (SETTINGS).
One call is

- "refused": it raises NotExactError, and the message names the operator, the line and a way out;
- "moved": the result is the native one, and each floating-point number in it is an operand's or a constant;
- "exact": each number is the native float64 result rounded once;
- "composite": it is near the float64 result or the native float32 result (TOLERANCE, CANCELLED);
- "failing": it raises something else, or the form of the result is not that of the native one;
- "SILENT": anything else. Results that differ between the places or the settings are silent, and so is a
  call in which an operator that computes was not intercepted.

Results are the returned values, the operands after the call, and the gradients. A callable is what the
worst of its calls is. The exit status is 1 if one is silent or failing, or if a refusal's message lacks
something.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Dataset

import reproml
from reproml import torch_internals
from reproml.arithmetic import handlers
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.dispatcher import Kind
from reproml.arithmetic.dispatch.interception import interception
from verification.op_db import difference
from verification.subprocesses import ROOT, environment

# Environment variables of the two settings.
SETTINGS: dict[str, dict[str, str]] = {
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "OMP_NUM_THREADS": "1",
        "REPROML_KERNELS": "off",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    },
    "usual": {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # both settings run at the same time
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    },
}
PLACES = ("main", "thread", "fork", "spawn")
# Allowed distance of a composite from its reference: relative to the largest element of the result, a few
# hundred ulps; or relative to the largest number of the call, a few ulps, as terms of that size may cancel.
TOLERANCE = 2.0**-15
CANCELLED = 2.0**-21
# Relative distance from a tie within which the float64 reference does not decide the rounding.
NEAR_TIE = 2.0**-45
SECONDS = 200  # after which the calls of one callable are given up
# What a callable is, the worst first.
VERDICTS = ("SILENT", "failing", "composite", "exact", "moved", "refused", "no arguments")

# Names that compute natively by design, as one definition or to print: they are compared, not watched.
NOT_WATCHED = (
    "verification.walk_cases.optimizer",
    "verification.walk_cases.averaged",
    "torch.nn.init.trunc_normal",
    "torch.Tensor.__repr__",
    "torch.Tensor.__str__",
    "torch.Tensor.__format__",
)


class Case(NamedTuple):
    """One call: a callable's dotted name, its operands, and whether gradients are computed."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool = True


Cases = dict[str, list[Case]]
Record = dict[str, Any]  # what one call did; it is written as JSON


# --- one call ------------------------------------------------------------------------------------


def find(name: str) -> Any:
    """Return what a dotted name refers to: "torch.Tensor.add"."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@contextmanager
def unseen() -> Iterator[None]:
    """Run a block natively, and hide it from Watch."""
    with dispatcher.natively(), torch_internals.DisableTorchDispatch():
        yield


def pattern(like: Tensor, seed: int = 1) -> Tensor:
    """Return numbers in [-1/2, 1/2) that use all 24 bits of float32, made of integers alone."""
    with unseen():
        n = torch.arange(seed, seed + like.numel())
        numbers = (n * 2654435761 % 2**24).to(torch.float32) / 2**24 - 0.5
        return numbers.reshape(like.shape).to(like.dtype)


def gradients(result: Any, leaves: list[Tensor]) -> list[Optional[Tensor]]:
    """Return the gradients of the sum of all results, each times a fixed weight."""
    outputs = [x for x in flatten(result) if isinstance(x, Tensor) and x.requires_grad]
    outputs = [x for x in outputs if x.is_floating_point() and x.layout is torch.strided]
    if not outputs or not leaves:
        return []
    weights = [pattern(x) for x in outputs]
    return list(torch.autograd.grad(outputs, leaves, weights, retain_graph=True, allow_unused=True))


def call(case: Case, wide: bool = False) -> list[Any]:
    """Return the results of a call: values, the operands after it, gradients. wide: in float64."""
    leaves: list[Tensor] = []

    def operand(x: Any) -> Any:
        if x is torch.float32 and wide:
            return torch.float64
        if not isinstance(x, Tensor):
            return x
        y = x.detach().clone()
        y = y.double() if wide and y.dtype is torch.float32 else y
        if case.grad and x.requires_grad:
            leaves.append(y.requires_grad_())
            y = y.clone()  # an in-place operator refuses a leaf
        return y

    with unseen():
        function = find(case.function)
        args, kwargs = tree_map(operand, [list(case.args), case.kwargs])
        torch.manual_seed(0)
        torch.distributions.Distribution.set_default_validate_args(
            True
        )  # torch.compile sets it to False
    with torch.set_grad_enabled(case.grad):
        result = function(*args, **kwargs)
        values = list(flatten(result))
        return [*values, *tensors([args, kwargs]), *gradients(values, leaves)]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def flatten(x: Any) -> Iterator[Any]:
    """Yield the tensors and Python values in a result."""
    if isinstance(x, Module):
        x = x.state_dict()
    elif isinstance(x, torch.distributions.Distribution):
        x = {k: v for k, v in vars(x).items() if not k.startswith("__")}
    elif isinstance(x, (tuple, Iterator)):
        x = list(x)
    if isinstance(x, (list, dict)):
        for y in x.values() if isinstance(x, dict) else x:
            yield from flatten(y)
    elif is_lazy(x):
        yield type(x).__name__
    elif isinstance(x, Tensor) and x.is_meta:
        yield f"{x.dtype}{list(x.shape)} without elements"
    elif x is None or isinstance(x, (Tensor, int, float, complex, str)):
        yield x
    else:
        children, _ = tree_flatten(x)
        if len(children) == 1 and children[0] is x:
            yield type(x).__name__
        else:
            yield from flatten(children)


def names(x: Tensor) -> tuple[Any, ...]:
    """Return the names of a tensor's dimensions, which PyTorch 2.13 no longer has."""
    return getattr(x, "names", ())


def parts(x: Any) -> list[Any]:
    """Return the dense real tensors that a tensor consists of; a number as a tensor; others unchanged."""
    if isinstance(x, (float, complex)):
        x = torch.tensor(x, dtype=torch.complex128 if isinstance(x, complex) else torch.float64)
    if not isinstance(x, Tensor):
        return [repr(x)]
    x = x.detach().rename(None) if any(names(x)) else x.detach()
    if x.layout is torch.sparse_coo:
        found = [x._indices(), x._values()]
    elif x.layout in (torch.sparse_csr, torch.sparse_bsr):
        found = [x.crow_indices(), x.col_indices(), x.values()]
    elif x.layout in (torch.sparse_csc, torch.sparse_bsc):
        found = [x.ccol_indices(), x.row_indices(), x.values()]
    else:
        found = [x.int_repr() if x.is_quantized else x]
    return [
        torch.view_as_real(y.resolve_conj()) if y.is_complex() else y.resolve_neg() for y in found
    ]


def form(x: Any) -> Any:
    """Return the type of a value, and what describes a tensor besides its elements."""
    if not isinstance(x, Tensor):
        return type(x)
    return str(x.dtype), list(x.shape), str(x.layout), names(x)


def content(x: Any) -> bytes:
    """Return the bytes of a value; all NaNs are one."""
    if not isinstance(x, Tensor):
        return repr(x).encode()
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.nan, x)
    return bytes(x.contiguous().reshape(-1).view(torch.uint8).numpy())


def digest(results: list[Any]) -> str:
    with unseen():
        each = [b"|".join([repr(form(x)).encode(), *map(content, parts(x))]) for x in results]
        return hashlib.sha256(b"|".join(each)).hexdigest()[:16]


# --- the comparison with native results ----------------------------------------------------------


def classify(case: Case, results: list[Any], native: list[Any], wide: list[Any]) -> tuple[str, str]:
    """Return "moved", "exact", "composite", "failing" or "SILENT" for results, and why."""
    forms = [[form(x) for x in y] for y in (results, native)]
    if forms[0] != forms[1]:
        return "failing", f"the result is {forms[0]}, natively {forms[1]}"
    weights = [pattern(x) for x in results if isinstance(x, Tensor) and x.is_floating_point()]
    operands = tree_flatten([list(case.args), case.kwargs])[0]
    given = numbers([*operands, *weights, 0.0, 1.0, math.inf, math.nan])
    known = torch.cat([given, given.float().double()])
    largest = _size(torch.cat([given, numbers(results)]))
    kinds = {"moved"}
    for x, y, z in zip(results, native, wide if len(wide) == len(results) else native):
        for few in zip(parts(x), parts(y), parts(z)):
            kind = _kind(*few, known, largest)
            if kind == "SILENT":
                return kind, ", ".join(
                    f"{where} {_short(v)}" for where, v in zip(("", "natively", "in float64"), few)
                )
            kinds.add(kind)
    return next(x for x in VERDICTS if x in kinds), ""


def _short(x: Any) -> str:
    return f"{x.flatten()[:3].tolist()}..." if isinstance(x, Tensor) else str(x)[:80]


def _size(x: Tensor) -> float:
    x = x[x.isfinite()].abs()
    return float(x.max()) if x.numel() else 0.0


def _kind(x: Any, native: Any, wide: Any, known: Tensor, largest: float) -> str:
    same = content(x) in (content(native), content(wide))
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return "moved" if same else "SILENT"
    if same and bool(torch.isin(numbers([x]).abs(), known.abs()).all()):
        return "moved"
    if x.dtype is torch.float32 and _rounded_once(x, wide):
        return "exact"
    for reference in (wide.double(), native.double()):
        allowed = max(TOLERANCE * _size(reference), CANCELLED * largest)
        if not difference(x, reference, torch.full_like(reference, allowed)):
            return "composite"
    return "SILENT"


def _rounded_once(x: Tensor, wide: Tensor) -> bool:
    if x.shape != wide.shape or wide.dtype is not torch.float64:
        return False
    nearest = wide.float()
    same = (x == nearest) | (x.isnan() & nearest.isnan())
    middle = (x.double() + nearest.double()) / 2
    return bool((same | ((wide - middle).abs() <= NEAR_TIE * wide.abs())).all())


def numbers(values: list[Any]) -> Tensor:
    """Return all floating-point numbers among the values, as float64; NaN becomes 0."""
    found = [x for value in values for x in parts(value) if isinstance(x, Tensor)]
    found = [x.double().flatten() for x in found if x.is_floating_point()]
    return torch.cat(found).nan_to_num(0.0, math.inf, -math.inf) if found else torch.empty(0)


class Watch(TorchDispatchMode):
    """Lists the operators that compute floating-point numbers and are not intercepted."""

    def __init__(self) -> None:
        super().__init__()
        self.bypassed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not interception.is_active() and handlers.handler_of(func).kind not in (
            Kind.NATIVE,
            Kind.MOVED,
        ):
            if any(
                x.is_floating_point() or x.is_complex() for x in tensors([args, kwargs, result])
            ):
                self.bypassed.append(str(func))
        return result


# --- records -------------------------------------------------------------------------------------


def native(case: Case, wide: bool = False) -> Optional[list[Any]]:
    """Return the native results, for use outside exact(); None where the call fails."""
    try:
        return call(case, wide)
    except Exception:
        return None


def record(case: Case) -> Record:
    """Call it, within exact(), and return what happened."""
    try:
        results = call(case)
        return {"status": "ran", "results": results}
    except reproml.NotExactError as error:
        return {"status": "refused", "why": str(error)}
    except Exception as error:
        return {"status": "failing", "why": f"{type(error).__name__}: {str(error)[:400]}"}


def compared(case: Case) -> Record:
    """Call it natively, in float64, within exact(), and with a watch; return what happened."""
    narrow, wide = native(case), native(case, wide=True)
    with reproml.exact():
        found = record(case)
    if narrow is None:  # torch.compile makes no code for the "plain" setting
        return with_digest(found)
    found["native"] = digest(narrow)
    if found["status"] == "ran":
        kind, why = classify(case, found["results"], narrow, wide or narrow)
        found = with_digest({**found, "kind": kind, "why": why})
        if not case.function.startswith(NOT_WATCHED):
            with reproml.exact(), Watch() as watch:
                record(case)
            found["bypassed"] = watch.bypassed
    return found


def with_digest(found: Record) -> Record:
    """Return a record with the digest of the results in place of the results."""
    results = found.pop("results", None)
    return found if results is None else {**found, "digest": digest(results)}


def records(cases: list[Case]) -> list[Record]:
    """Return what each call does, for use within exact()."""
    return [with_digest(record(case)) for case in cases]


class InWorker(Dataset[str]):
    """Each element is the records of one callable, made by the worker that fetches it."""

    def __init__(self, cases: list[list[Case]]) -> None:
        self._pickled = [pickle.dumps(few) for few in cases]  # natively

    def __len__(self) -> int:
        return len(self._pickled)

    def __getitem__(self, index: int) -> str:
        warnings.simplefilter("ignore")
        with unseen():
            cases = pickle.loads(self._pickled[index])
        return json.dumps(records(cases))


def visit(cases: list[list[Case]], place: str) -> Iterator[list[Record]]:
    """Yield the records of each callable, made in a place."""
    if place == "main":
        for few in cases:
            yield [compared(case) for case in few]
        return
    dataset = InWorker(cases)
    with reproml.exact():
        if place == "thread":
            for few in cases:
                found: list[Record] = []
                thread = threading.Thread(target=lambda few=few, to=found: to.extend(records(few)))
                thread.start()
                thread.join()
                yield found
        else:
            loader = DataLoader(
                dataset,
                batch_size=None,
                num_workers=1,
                multiprocessing_context=place,
                timeout=SECONDS - 20,
            )
            yield from map(json.loads, loader)


# --- verdicts ------------------------------------------------------------------------------------


_VERBS = "use|write|convert|call|move|take|set|pass|draw|leave|compute|multiply|keep|pad|sample"


def lacking(message: str) -> str:
    """Return what the message of a refusal lacks: the operator, the caller's line or a way out.

    An optimizer's message needs no line, as the caller's own call of step() raises it."""
    has = {
        "operator": re.search(r"\b(aten|prims|prim|c10d|quantized|mkldnn\w*|torch)\.\w+", message),
        "line": re.search(r"called at \S+\.py:\d+|^The optimizer", message),
        "way out": re.search(rf"; .*\b({_VERBS})\b", message),
    }
    return ", ".join(what for what, found in has.items() if not found)


def verdict(found: dict[str, Record]) -> tuple[str, str]:
    """Return what one call is, given its records by setting and place, and why."""
    statuses = {x["status"]: where for where, x in found.items()}
    if "failing" in statuses:
        where = statuses["failing"]
        return "failing", f"{where}: {found[where]['why']}"
    if len(statuses) > 1:
        return "failing", f"refused in {statuses['refused']}, not in {statuses['ran']}"
    if "refused" in statuses:
        return "refused", next(iter(found.values()))["why"]
    digests = {where: x["digest"] for where, x in found.items()}
    if len(set(digests.values())) > 1:
        return "SILENT", f"the results differ: {digests}"
    for where, x in found.items():
        if x.get("bypassed"):
            return "SILENT", f"{where}: not intercepted: {sorted(set(x['bypassed']))}"
    kinds = {x["kind"]: x["why"] for x in found.values() if "kind" in x}
    kind = next(kind for kind in VERDICTS if kind in kinds)
    return kind, kinds[kind]


class Report:
    """Counts what the callables are, and collects what has to be looked at."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.faults: dict[str, str] = {}
        self.names: dict[str, list[str]] = {kind: [] for kind in VERDICTS}
        self.calls: Counter[str] = Counter()

    def add(
        self, namespace: str, name: str, cases: list[Case], found: list[dict[str, Record]]
    ) -> None:
        """Add a callable. found: the records of each of its calls, by setting and place."""
        kinds = {"no arguments"} if not cases else set()
        for case, at in zip(cases, found):
            kind, why = verdict(at)
            kinds.add(kind)
            self.calls[kind] += 1
            natively = {x["native"] for x in at.values() if "native" in x}
            self.calls["differ natively"] += len(natively) > 1
            if kind in ("SILENT", "failing"):
                self._fault(f"{kind} {name}", why, describe(case))
            for where, x in at.items() if kind == "refused" else ():
                if lacking(x["why"]):
                    self._fault(f"lacks {lacking(x['why'])}: {name}", x["why"], f", {where}")
                    break
        worst = next(kind for kind in VERDICTS if kind in kinds)
        self.names[worst].append(name)
        self.counts.setdefault(namespace, Counter())[worst] += 1

    def _fault(self, what: str, why: str, example: str) -> None:
        """Keep the first of the faults that differ only in numbers."""
        self.faults.setdefault(re.sub(r"[\d.e-]+", "0", what + why), f"{what}{example}: {why}")

    def __str__(self) -> str:
        order = [*VERDICTS[2:], *VERDICTS[1::-1]]
        lines = [f"{'':28}{'callables':>13}" + "".join(f"{x:>13}" for x in order)]
        for namespace, counts in [
            *self.counts.items(),
            ("all", sum(self.counts.values(), Counter())),
        ]:
            row = [sum(counts.values()), *(counts[x] for x in order)]
            lines.append(f"{namespace:28}" + "".join(f"{x:13}" for x in row))
        calls = ", ".join(f"{n} {kind}" for kind, n in sorted(self.calls.items()))
        lines += ["", f"calls: {calls}"]
        for kind in ("no arguments", "refused", "composite"):
            lines += ["", f"{kind}: {', '.join(self.names[kind])}"]
        return "\n".join([*lines, "", *self.faults.values()])


def describe(case: Case) -> str:
    """Return the operands in short: (float32[3, 4], 2, dim=1)."""

    def short(x: Any) -> Any:
        return f"{x.dtype}{list(x.shape)}".replace("torch.", "") if isinstance(x, Tensor) else x

    args, kwargs = tree_map(short, [list(case.args), case.kwargs])
    text = ", ".join([*map(str, args), *(f"{k}={v}" for k, v in kwargs.items())])
    return f"({text[:200]}){'' if case.grad else ' without gradients'}"


# --- processes -----------------------------------------------------------------------------------


def child(file: str, out: str, place: str, first: str) -> None:
    """Write the records of the callables from number `first` on, a line each."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cases = list(pickle.loads(Path(file).read_bytes()).values())[int(first) :]
    Path(f"{out}.started").touch()
    with open(out, "a") as lines:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        for found in visit(cases, place):
            print(json.dumps(found), file=lines, flush=True)
            faulthandler.dump_traceback_later(SECONDS, exit=True)


def walk(cases: Cases, folder: Path) -> list[list[dict[str, Record]]]:
    """Visit all places in all settings; return the records of each call of each callable."""
    (folder / "cases").write_bytes(pickle.dumps(cases))
    merged: list[list[dict[str, Record]]] = [[{} for _ in few] for few in cases.values()]
    for place in PLACES:
        outs = {name: folder / f"{name}-{place}" for name in SETTINGS}
        running = {name: _start(folder, outs[name], name, place, 0) for name in SETTINGS}
        for name, process in running.items():
            while process.wait() or len(_lines(outs[name])) < len(cases):
                lost = len(_lines(outs[name]))
                log = outs[name].with_suffix(".log").read_text()[-2000:]
                if not outs[name].with_suffix(".started").exists():
                    sys.exit(f"the process for {name}, {place} does not start: {log}")
                if lost == len(cases):
                    break
                why = f"the process ended with {process.returncode}: {log[-200:]}"
                row = [{"status": "failing", "why": why} for _ in merged[lost]]
                with outs[name].open("a") as lines:
                    print(json.dumps(row), file=lines)
                process = _start(folder, outs[name], name, place, lost + 1)
            for few, row in zip(merged, map(json.loads, _lines(outs[name]))):
                for at, found in zip(few, row):
                    at[f"{name}, {place}"] = found
    return merged


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _start(
    folder: Path, out: Path, setting: str, place: str, first: int
) -> subprocess.Popen[bytes]:
    out.with_suffix(".started").unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "verification.walk", "--child"]
    return subprocess.Popen(
        [*command, str(folder / "cases"), str(out), place, str(first)],
        env=environment(SETTINGS[setting]),
        stdout=subprocess.DEVNULL,
        stderr=out.with_suffix(".log").open("ab"),
        cwd=ROOT,
    )


def main(names: Iterable[str]) -> int:
    from verification import walk_cases

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report = Report()
    cases, namespaces = walk_cases.make(list(names))
    with tempfile.TemporaryDirectory() as folder:
        merged = walk(cases, Path(folder))
    for (name, few), found in zip(cases.items(), merged):
        report.add(namespaces[name], name, few, found)
    print(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
