"""Gradients that PyTorch defines differently in different versions: one definition for all of them.

Autograd's own kernel of an operator decides which operand gets the gradient. In a version where that
differs from the table, a kernel around it corrects it, also where PyTorch's C++ code calls the operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.interception import interception
from reproml.torch_internals import get_interpreter_stack, lookup

Kernel = Callable[..., Any]


def differing(table: dict[str, Kernel]) -> dict[str, Kernel]:
    """Return the lines of a table of gradients that differ from those of this PyTorch.

    Each operator is tried at 1, with bounds or other operands of 0, 1 and 2.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return {name: line for name, line in table.items() if _differs(name, line)}


def _differs(name: str, receivers: Kernel) -> bool:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    takes_tensor = ["Tensor" in str(a.type) for a in operator._schema.arguments[1:]]
    for numbers in product((0.0, 1.0, 2.0), repeat=len(takes_tensor)):
        others = [_scalar(x) if tensor else x for x, tensor in zip(numbers, takes_tensor)]
        x = _scalar(1.0).requires_grad_()
        (found,) = torch.autograd.grad(operator(x, *others), x)
        mask = receivers(x.detach(), *others)[0]
        if found.item() != (1.0 if mask is None else float(mask)):
            return True
    return False


def _scalar(x: float) -> Tensor:
    return torch.full((), x, device="cpu", dtype=torch.float32)


@contextmanager
def gradients(table: dict[str, Kernel]) -> Iterator[None]:
    """Give operators, their in-place and foreach forms the gradients of a table until the block ends.

    table: those lines that `differing` returns, as only newer versions have autograd's own kernels at hand.

    The table maps "name" or "name.overload" to a function that takes the operands and returns, for each
    of them, where it gets the gradient: a tensor of bool, or None for all of it or for no tensor.
    """
    library = torch.library.Library("aten", "IMPL")

    def replace(name: str, make: Callable[[Any], Kernel]) -> None:
        for key in ("AutogradCPU", "AutogradCUDA", "AutogradNestedTensor"):
            original = lookup("torch.library.get_kernel")(f"aten::{name}", key)
            with warnings.catch_warnings():  # that autograd's kernel is replaced
                warnings.simplefilter("ignore")
                library.impl(name, make(original), key, with_keyset=True)

    for name, receivers in table.items():
        packet, dot, overload = name.partition(".")
        for suffix in ("", "_") if hasattr(torch.ops.aten, packet + "_") else ("",):
            replace(f"{packet}{suffix}{dot}{overload}", partial(_kernel, receivers, bool(suffix)))
    for packet in {name.partition(".")[0] for name in table}:
        for foreach in (f"_foreach_{packet}", f"_foreach_{packet}_"):
            for overload in _overloads(foreach):
                plain = getattr(Tensor, foreach[len("_foreach_") :])
                replace(f"{foreach}.{overload}", partial(_foreach_kernel, plain))
    try:
        yield
    finally:
        library._destroy()


def _overloads(name: str) -> list[str]:
    packet = getattr(torch.ops.aten, name, None)  # there is no _foreach_clamp
    return [each for each in packet.overloads() if "out" not in each] if packet else []


def _kernel(receivers: Kernel, in_place: bool, original: Any) -> Kernel:
    def kernel(keyset: Any, *operands: Any) -> Any:
        call = partial(original.call_boxed, keyset)
        if not interception.is_active():
            return call(*operands)
        transforms = get_interpreter_stack() or ()
        recorded = any(isinstance(x, Tensor) and x.requires_grad for x in operands)
        if not (recorded and torch.is_grad_enabled()):
            return call(*operands)
        if transforms:
            return _within_transforms(call, receivers, in_place, *operands)
        return _Corrected.apply(call, receivers, in_place, *operands)

    return kernel


def _foreach_kernel(plain: Kernel, original: Any) -> Kernel:
    def kernel(keyset: Any, tensors: Any, bounds: Any) -> Any:
        if not interception.is_active():
            return original.call_boxed(keyset, tensors, bounds)
        each = bounds if isinstance(bounds, (list, tuple)) else [bounds] * len(tensors)
        results = [plain(x, bound) for x, bound in zip(tensors, each)]
        return None if plain.__name__.endswith("_") else results

    return kernel


class _Corrected(torch.autograd.Function):
    """An operator with the gradients of the table."""

    @staticmethod
    def forward(ctx: Any, call: Kernel, receivers: Kernel, in_place: bool, *operands: Any) -> Any:
        kept = [operands[0].clone() if in_place else operands[0], *operands[1:]]
        ctx.receivers = receivers
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in kept]
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in kept])
        if in_place:
            ctx.mark_dirty(operands[0])
        return call(*operands)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        pairs = zip(ctx.saved_tensors, ctx.numbers)
        operands = [number if x is None else x for x, number in pairs]
        masks = ctx.receivers(*operands)
        needed = ctx.needs_input_grad[3:]
        given = zip(operands, masks, needed)
        return (
            *(None, None, None),
            *[_received(gradient, mask, x) if need else None for x, mask, need in given],
        )


def _received(gradient: Tensor, mask: Optional[Tensor], x: Tensor) -> Tensor:
    """Return the gradient of an operand, which the mask selects, in the operand's shape and dtype."""
    selected = gradient if mask is None else torch.where(mask, gradient, 0.0)
    if selected.shape != x.shape:  # a sum of one number would turn -0 into +0
        selected = selected.sum_to_size(x.shape)
    return selected.to(x.device, x.dtype)


def _within_transforms(
    call: Kernel, receivers: Kernel, in_place: bool, x: Tensor, *bounds: Any
) -> Any:
    """Correct the gradient by a hook: `_Corrected` does not know the levels of torch.func."""
    operands = (x.clone() if in_place else x, *bounds)
    result = call(*operands)
    if result.grad_fn is not None:
        masks = receivers(*operands)

        def correct(found: Any, given: Any) -> Any:
            return tuple(
                None if old is None else _received(given[0], mask, y)
                for old, mask, y in zip(found, masks, operands)
            )

        result.grad_fn.register_hook(correct)
    return x.copy_(result) if in_place else result
