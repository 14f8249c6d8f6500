"""Every operator in PyTorch's registry: what kind it is, and that the refused ones raise when called."""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import reproml
from reproml.arithmetic import operator_table
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.dispatch.dispatcher import Kind
from reproml.arithmetic.handlers import handler_of
from reproml.torch_internals import UnknownPyTorchError
from tests.arithmetic.test_operator_table import CASES, ELSEWHERE
from verification import op_db
from verification.oracle import same_bits

ROOT = Path(__file__).resolve().parents[2]

# It takes the name of a file.
NOT_CALLED = {"from_file"}
# A view and a change of size, which PyTorch does above our dispatch key.
VIEWS = {"_fw_primal", "resize_"}


def overloads() -> list[Any]:
    """Return all aten operators that PyTorch's dispatcher has registered and Python can call."""
    found = []
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, name = full.partition("::")
        name, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
        if packet is not None and (overload or "default") in packet.overloads():
            found.append(getattr(packet, overload or "default"))
    return found


OVERLOADS = overloads()


OF_KIND: dict[Kind, list[Any]] = {kind: [] for kind in Kind}
for _func in OVERLOADS:
    OF_KIND[handler_of(_func).kind].append(_func)


def dummy(kind: str, dtype: torch.dtype) -> Any:
    """Return an argument of a schema's type; tensors are small and hold ordinary numbers."""
    if kind.startswith("Optional[") and "Tensor" not in kind:
        return None
    if kind in ("Tensor", "Optional[Tensor]"):
        return torch.full((2, 2), 0.75, dtype=dtype)
    if kind in ("List[Tensor]", "List[Optional[Tensor]]", "Optional[List[Tensor]]"):
        return [torch.full((2, 2), 0.75, dtype=dtype)]
    reference = {"int": 1, "float": 0.5, "bool": False, "number": 0.5, "str": "", "Scalar": 0.5}
    reference.update({"complex": 1j, "Device": "cpu", "ScalarType": 6, "Layout": 0})
    if kind in reference:
        return reference[kind]
    if kind in ("List[int]", "List[bool]", "List[float]", "List[number]"):
        return [reference[kind[5:-1]]] * 2
    return None


def dummies(func: Any, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for i, a in enumerate(func._schema.arguments):
        if a.has_default_value() and not a.is_out and "Tensor" not in str(a.type):
            continue
        value = dummy(str(a.type), dtype)
        if a.kwarg_only or len(args) < i:
            kwargs[a.name] = value
        else:
            args.append(value)
    return args, kwargs


def floats(x: Any) -> list[Any]:
    """Return the floating-point numbers and tensors of a result."""
    return [
        t
        for t in tree_flatten(x)[0]
        if isinstance(t, (float, complex))
        or (isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()))
    ]


def attempt(func: Any, dtype: torch.dtype) -> str:
    """Call the operator with tensors of that dtype, and return the outcome in words."""
    args, kwargs = dummies(func, dtype)
    given = tree_flatten([args, kwargs])[0]
    before = [x.clone() if isinstance(x, Tensor) else x for x in given]
    try:
        with reproml.exact():
            result = func(*args, **kwargs)
    except reproml.NotExactError as error:
        assert str(error).startswith("aten.")
        for x, y in zip(given, before):
            assert not isinstance(x, Tensor) or torch.equal(x, y), f"{func} wrote before it refused"
        return "refused"
    except Exception:  # PyTorch does not accept these arguments
        return "not called"
    return "returned floats" if floats(result) else "returned"


def table_name(func: Any) -> str:
    """Return the name of the functional form: "add" for aten::add_."""
    return str(func._schema.name[len("aten::") :]).rstrip("_")


def test_registry_has_operators_of_each_kind():
    assert len(OVERLOADS) > 2500
    assert [kind for kind in Kind if not OF_KIND[kind]] == [Kind.NATIVE]
    assert len(OF_KIND[Kind.REFUSED]) > 800


def test_only_data_movement_runs_natively():
    """An operator that runs natively on floats is in the table's list of those that do no arithmetic."""
    native = OF_KIND[Kind.NATIVE] + OF_KIND[Kind.MOVED]
    names = {table_name(func) for func in native}
    listed = {name.rstrip("_") for name in (*operator_table.DATA_MOVEMENT, *operator_table.CASTS)}
    assert names and names <= listed
    assert not names & set(operator_table.EXACT)
    computing = {f"aten.{name}" for name in operator_table.UNDEFINED_OVERLOADS}
    assert computing <= {str(func) for func in OF_KIND[Kind.REFUSED]}


def test_operators_outside_the_table_refuse_floats():
    """None returns a float when called with small float32 tensors or with numbers."""
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for func in OF_KIND[Kind.REFUSED]:
            if func._schema.name[len("aten::") :] in NOT_CALLED | VIEWS:
                continue
            outcome = attempt(func, torch.float32)
            assert outcome != "returned floats", func
            counts[outcome] += 1
    assert counts["refused"] >= 0.95 * sum(counts.values()), counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2, torch.complex64], ids=str)
def test_other_floats_are_refused(dtype):
    """By every line of EXACT; complex numbers by DATA_MOVEMENT too, as their abs is arithmetic."""
    counts: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for func in OF_KIND[Kind.DEFINED] + OF_KIND[Kind.FOREACH] + OF_KIND[Kind.MOVED]:
            name = func._schema.name[len("aten::") :].replace("_foreach_", "").rstrip("_")
            moved = (
                name in operator_table.DATA_MOVEMENT
                or name in operator_table.CASTS
                or name == "copy"
            )
            if (moved and not dtype.is_complex) or not takes_tensors(func) or name + "_" in VIEWS:
                continue
            if name in operator_table.VIEWS | operator_table.COPIES:
                continue
            if dtype is torch.float64 and {name, name + "_"} & operator_table.FLOAT64:
                continue
            outcome = attempt(func, dtype)
            assert outcome != "returned floats", func
            counts[outcome] += 1
    assert counts["refused"] >= 0.85 * sum(counts.values()), counts


def takes_tensors(func: Any) -> bool:
    return any("Tensor" in str(a.type) for a in func._schema.arguments if not a.is_out)


REGISTERED = set(torch._C._dispatch_get_all_op_names())
# Their forms with `unbiased` or `rcond` are written in terms of those with `correction` or `rtol`.
STD = ("std", "var", "std_mean", "var_mean", "linalg_pinv")


@pytest.mark.parametrize(
    "key", sorted({*operator_table.EXACT, *operator_table.DATA_MOVEMENT, *operator_table.CASTS})
)
def test_table_names_have_the_right_kind(key):
    packet = getattr(torch.ops.aten, key)
    for overload in packet.overloads():
        operator = getattr(packet, overload)
        if operator.name() not in REGISTERED:  # for TorchScript's numbers only
            continue
        kind = handler_of(operator).kind
        if key in operator_table.EXACT:  # a form may be undefined, or written in terms of another
            assert kind is Kind.DEFINED or overload.startswith(("dtype", "names")) or key in STD
        else:  # some overloads compute
            assert kind in (Kind.MOVED, Kind.REFUSED)


def test_operator_with_other_arguments_is_an_error(monkeypatch):
    monkeypatch.setitem(operator_table.EXACT, "dot", lambda x: x)
    with pytest.raises(UnknownPyTorchError, match=r"yet: the arguments of aten\.dot\.default are"):
        handler_of(torch.ops.aten.dot.default)


def test_new_keyword_argument_is_an_error():
    library = torch.library.Library("aten", "FRAGMENT")
    try:
        library.define("rand.reproml_test(SymInt[] size, *, float scale) -> Tensor")
        with pytest.raises(UnknownPyTorchError, match=r"arguments of aten\.rand\.reproml_test"):
            handler_of(torch.ops.aten.rand.reproml_test)
    finally:
        library._destroy()


@pytest.mark.parametrize("unbiased", [False, True])
def test_forms_written_in_terms_of_others_are_exact(unbiased):
    """In inference mode these reach our kernels as they are."""
    x = torch.rand(5, 3)
    with reproml.exact():
        expected = x.var(0, correction=int(unbiased)), x.std(0, correction=int(unbiased))
        with torch.inference_mode():
            found = x.var(0, unbiased=unbiased), x.std(0, unbiased=unbiased)
            for a, b in zip(found, expected):
                assert same_bits(a, b)
            with pytest.raises(reproml.NotExactError, match="mm.dtype"):
                torch.ops.aten.mm.dtype(x.t(), x, torch.float32)


# ---- moved operators -----------------------------------------------------------------------------

ROUNDED: dict[str, Any] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
    "trunc": math.trunc,
}
SIGNS = {"abs", "neg", "sign", "sgn"}


def memory_of(x: Any) -> Any:
    """Return the contents of a tensor's storage, as `as_strided` may read beyond the tensor."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty(0, dtype=x.dtype).set_(x.detach().untyped_storage()).clone()


class MoveChecker(TorchDispatchMode):
    """Checks that a moved operator returns only numbers of its operands, and the constants 0, 1, -1."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name[len("aten::") :]
        key = name if name in operator_table.DATA_MOVEMENT else name.rstrip("_")
        if key not in operator_table.DATA_MOVEMENT or "empty" in key or key == "resize_":
            return func(*args, **kwargs)
        with dispatcher.natively():
            before = tree_map(memory_of, [args, kwargs])
        result = func(*args, **kwargs)
        with dispatcher.natively():
            outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
            outputs = [t for t in outputs if t.dtype is torch.float32 and t.numel()]
            if outputs:
                self.check(key, tree_flatten(before)[0], outputs, func)
        return result

    def check(self, key: str, operands: list[Any], outputs: list[Tensor], func: Any) -> None:
        numbers = [float(x) for x in operands if isinstance(x, (int, float))] + [0.0, 1.0, -1.0]
        tensors = [torch.tensor(numbers, dtype=torch.float32)]
        tensors += [x.reshape(-1).float() for x in operands if isinstance(x, Tensor)]
        given = torch.cat(tensors)
        if key in SIGNS:
            given = torch.cat([given, -given])
        if key in ROUNDED:
            finite = given[given.isfinite()].tolist()
            given = torch.cat([given, torch.tensor([float(ROUNDED[key](x)) for x in finite])])
            given = torch.cat([given, torch.zeros(1).neg()])
        out = torch.cat([t.detach().reshape(-1) for t in outputs])
        out, given = out[~out.isnan()], given.contiguous()
        known = torch.isin(out.view(torch.int32), given.view(torch.int32))
        assert bool(known.all()), f"{func} made {out[~known][0].item()!r}"
        self.seen[key] += 1


def test_moved_operators_compute_nothing():
    """Checked with PyTorch's own samples."""
    checker = MoveChecker()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db.operators():
            key = op.name.rsplit(".", 1)[-1]
            if key not in operator_table.DATA_MOVEMENT and "pad" not in key and "pool" not in key:
                continue
            for sample, _ in islice(op_db.samples(op), 5):
                try:
                    with reproml.exact(), checker:
                        op(sample.input, *sample.args, **sample.kwargs)
                except (reproml.NotExactError, RuntimeError):
                    continue
    assert len(checker.seen) >= 60, sorted(checker.seen)


# ---- the page --------------------------------------------------------------------------------------


def test_docs_name_every_table_line():
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", page))
    assert sorted(set(operator_table.EXACT) - named) == []


def test_every_operator_has_a_case():
    assert set(CASES) | set(ELSEWHERE) == set(operator_table.EXACT)
    for test in ELSEWHERE.values():
        module, function = test.rsplit(".", 1)
        assert hasattr(importlib.import_module(f"tests.arithmetic.{module}"), function)
