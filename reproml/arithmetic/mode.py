"""The engine: each operator that PyTorch runs is looked up in the table, or refused.

A `TorchDispatchMode` sees every operator below autograd, the backward ones included. An operator

- of the table's MOVES runs natively: it does no arithmetic;
- of the table's EXACT runs as defined there; its in-place and out= forms follow by themselves;
- that PyTorch itself writes in terms of others (CompositeImplicitAutograd) is taken apart;
- that touches no floating-point number runs natively;
- and any other raises NotExactError.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import ContextDecorator
from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reproml.arithmetic import NotExactError, optimizers, table

Handler = Callable[..., Any]


class ExactMode(TorchDispatchMode):
    """Runs every operator by the table."""

    def __init__(self) -> None:
        super().__init__()
        self._handlers: dict[Any, Handler] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Optional[dict[str, Any]] = None,
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is None:
            handler = self._handlers[func] = self._find(func)
        return handler(*args, **kwargs) if kwargs else handler(*args)

    def _find(self, func: Any) -> Handler:
        name = func._schema.name
        if not name.startswith("aten::"):
            return func if name.startswith(("profiler::", "prim::")) else _guarded(func)
        name = name[len("aten::") :]
        if name in table.MOVES or name.rstrip("_") in table.MOVES:
            return func  # type: ignore[no-any-return]
        outputs = [a.name for a in func._schema.arguments if a.is_out]
        if name in table.EXACT:
            exact = _for_float32(table.EXACT[name], func)
            return _with_out(exact, outputs) if outputs else exact
        if name.endswith("_") and name[:-1] in table.EXACT:
            return _in_place(_for_float32(table.EXACT[name[:-1]], func))
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            return self._taken_apart(func)
        return _guarded(func)

    def _taken_apart(self, func: Any) -> Handler:
        def composite(*args: Any, **kwargs: Any) -> Any:
            with self:
                return func.decompose(*args, **kwargs)

        return composite


def _tensors(args: Any) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _for_float32(definition: Handler, func: Any) -> Handler:
    """The definition, for float32 operands; integers go natively, other floats are refused."""

    def exact(*args: Any, **kwargs: Any) -> Any:
        floating = False
        for x in _tensors(args):
            if x.dtype is torch.float32:
                floating = True
            elif _inexact(x) and not (x.dim() == 0 and x.dtype is torch.float64):
                raise refusal(func, args, f"it is defined for float32, not for {x.dtype}")
        if not floating and not any(_inexact(y) for y in _tensors([kwargs.get("out")])):
            result = func(*args, **kwargs)
            if not (isinstance(result, Tensor) and _inexact(result)):
                return result
        return definition(*args, **kwargs)

    return exact


def _in_place(exact: Handler) -> Handler:
    def in_place(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.copy_(exact(self, *args, **kwargs))

    return in_place


def _with_out(exact: Handler, names: list[str]) -> Handler:
    def with_out(*args: Any, **kwargs: Any) -> Any:
        outputs = [kwargs.pop(name) for name in names]
        results = exact(*args, **kwargs)
        for out, result in zip(outputs, results if len(outputs) > 1 else [results]):
            out.resize_(result.shape).copy_(result)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return with_out


def _guarded(func: Any) -> Handler:
    """An operator outside the table: only if no floating-point number goes in or comes out."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if any(_inexact(x) for x in _tensors([*args, *kwargs.values()])):
            raise refusal(func, args, "it is not in the table of exact operators")
        result = func(*args, **kwargs)
        if any(_inexact(x) for x in _tensors([result])):
            raise refusal(func, args, "it is not in the table of exact operators")
        return result

    return guarded


def refusal(func: Any, args: Any, why: str) -> NotExactError:
    operands = ", ".join(f"{x.dtype}{list(x.shape)}".replace("torch.", "") for x in _tensors(args))
    return NotExactError(
        f"{func} has no exact result for ({operands}), called at {_caller()}: {why}; "
        "write it with operators of the table, or take this part out of reproml.exact()."
    )


def _caller() -> str:
    """The innermost frame that is neither PyTorch's nor ours."""
    ours = (__file__.rsplit("/", 1)[0], torch.__file__.rsplit("/", 1)[0], threading.__file__)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(ours):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"


class exact(ContextDecorator):  # noqa: N801 (used like a function: `with reproml.exact():`)
    """Every floating-point operator inside returns the correctly rounded result, or raises.

        with reproml.exact():
            train()

        @reproml.exact()
        def train(): ...

    Raises NotExactError for an operator that has no exact definition. Use inside another exact() is
    allowed and changes nothing.
    """

    _active = threading.local()

    def __enter__(self) -> exact:
        depth = getattr(self._active, "depth", 0)
        if depth == 0:
            import torch._dynamo  # noqa: F401  (optimizers import it; here it meets no mode)

            optimizers.take_over()
            mode = ExactMode()
            mode.__enter__()
            self._active.mode = mode
        self._active.depth = depth + 1
        return self

    def __exit__(self, *exc: Any) -> None:
        self._active.depth -= 1
        if self._active.depth == 0:
            self._active.mode.__exit__(*exc)
            optimizers.give_back()
