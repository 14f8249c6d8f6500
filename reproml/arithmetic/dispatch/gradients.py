"""Gradients that PyTorch defines differently in different versions: one definition for all of them.

Autograd's own kernel of an operator decides who gets the gradient. In a version where that differs from
the table, a kernel around it corrects the gradient, also where PyTorch's C++ code calls the operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable

import torch
from torch import Tensor

from reproml.arithmetic.dispatch.interception import interception
from reproml.torch_internals import lookup

Kernel = Callable[..., Any]


def _clamp_differs() -> bool:
    """Return whether a number that equals its bound gets another gradient than in PyTorch 2.8."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones((), requires_grad=True)
        return torch.autograd.grad(x.clamp(1.0, 2.0), x)[0].item() != 1.0


_CLAMP_DIFFERS = _clamp_differs()


@contextmanager
def gradients(table: dict[str, Kernel]) -> Iterator[None]:
    """Give operators and their in-place forms the gradients of a table, until the end of the block.

    The table maps "name" or "name.overload" to a function that takes the operands and returns, for each
    of them that may be a tensor, where it gets the gradient: a tensor of bool, or None.
    """
    library = torch.library.Library("aten", "IMPL")

    def replace(name: str, make: Callable[[Any], Kernel]) -> None:
        for key in ("AutogradCPU", "AutogradCUDA"):
            original = lookup("torch.library.get_kernel")(f"aten::{name}", key)
            with warnings.catch_warnings():  # that autograd's kernel is replaced
                warnings.simplefilter("ignore")
                library.impl(name, make(original), key, with_keyset=True)

    for name, receivers in table.items() if _CLAMP_DIFFERS else ():
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        replace(name, partial(_kernel, receivers))
        in_place = f"{packet}_.{overload}".rstrip(".")
        replace(in_place, partial(_in_place_kernel, operator))
    try:
        yield
    finally:
        library._destroy()


def _kernel(receivers: Kernel, original: Any) -> Kernel:
    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        result = original.call_boxed(keyset, *args, **kwargs)
        if result.grad_fn is None or not interception.is_active():
            return result
        masks = receivers(*args, **kwargs)

        def gradient(found: Any, given: Any) -> Any:  # PyTorch's has the right shapes and dtypes
            return tuple(
                old if old is None else _received(given[0], mask, old)
                for old, mask in zip(found, masks)
            )

        result.grad_fn.register_hook(gradient)
        return result

    return kernel


def _received(gradient: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """Return the gradient of an operand, which the mask selects, in the shape and dtype of the operand."""
    return torch.where(mask, gradient, 0.0).sum_to_size(like.shape).to(like.dtype)


def _in_place_kernel(operator: Any, original: Any) -> Kernel:
    def kernel(keyset: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        operands = [x, *args, *kwargs.values()]
        recorded = any(isinstance(y, Tensor) and y.requires_grad for y in operands)
        if recorded and torch.is_grad_enabled() and interception.is_active():
            return x.copy_(operator(x.clone(), *args, **kwargs))
        return original.call_boxed(keyset, x, *args, **kwargs)

    return kernel
