"""What else has to change around the operators while `exact()` is active, and back afterwards.

- PyTorch's switches for kernels that do a whole layer as one operator (oneDNN, cuDNN, fused attention,
  the transformer's fast path): off, so that the layers arrive as the operators they are made of.
- `math` in PyTorch's schedulers and initialisers: the C library's cos, erf, ... differ between systems;
  `ExactMath` rounds them correctly. So does `ExactPower` what schedulers take powers of.
- `torch.compile`: what it makes of a function passes the operators by, so the function runs as written.
- Marks for a profiler (`record_function`, six operators of an optimizer's step): left out while none runs.
- `trunc_normal_`, whose algorithm changed between versions of PyTorch: one of them (randomness.py).
- Printing a tensor, for which PyTorch computes in float64: natively.
- The optimizers' steps (see optimizers.py).

These are settings of the process, so they stay until the last `exact()` of any thread ends.
"""

from __future__ import annotations

import math
import threading
from typing import Any, Callable

import torch
import torch._tensor_str
import torch.nn.init
import torch.optim.lr_scheduler
from torch.autograd.profiler import record_function
from torch.optim.lr_scheduler import CyclicLR, LRScheduler

from reproml.arithmetic import state
from reproml.arithmetic.dispatch import dispatcher
from reproml.arithmetic.numerics.libm import ExactMath, ExactPower
from reproml.arithmetic.operators import optimizers, random

_SWITCHES: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
]


_exact_math: Any = ExactMath()
_USERS_OF_MATH: list[Any] = [torch.nn.init, torch.optim.lr_scheduler]


_original_trunc_normal = torch.nn.init._no_grad_trunc_normal_


def _trunc_normal(*args: Any, **kwargs: Any) -> Any:
    if not state.active.depth:
        return _original_trunc_normal(*args, **kwargs)
    return random.trunc_normal_(*args, **kwargs)


_original_enter, _original_exit = record_function.__enter__, record_function.__exit__


def _enter_mark(self: Any) -> Any:
    if state.active.depth and not torch._C._autograd._profiler_enabled():
        return self
    return _original_enter(self)


def _exit_mark(self: Any, *exc: Any) -> None:
    if self.record is not None:  # what was not entered is not left
        _original_exit(self, *exc)


_original_text = torch._tensor_str._str


def _text(*args: Any, **kwargs: Any) -> Any:
    with dispatcher.natively():
        return _original_text(*args, **kwargs)


_original_step = LRScheduler.step
_original_range = CyclicLR._exp_range_scale_fn


def _step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """A scheduler's step with `**` correctly rounded: what it takes powers of is one for so long."""
    taken: dict[str, float] = {}
    for name in ("gamma", "power") if state.active.depth else ():
        value = getattr(scheduler, name, None)
        if isinstance(value, (int, float)):
            taken[name] = value
            setattr(scheduler, name, ExactPower(value))
    try:
        return _original_step(scheduler, *args, **kwargs)
    finally:
        _set(scheduler, **taken)


def _range(gamma: float, x: float) -> float:
    result: float = _original_range(ExactPower(gamma) if state.active.depth else gamma, x)
    return float(result)


_lock = threading.Lock()
_users = 0
_before: list[bool] = []
_stance: Any = None  # of the compiler: puts the one before back


def _set(owner: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(owner, name, value)


def apply() -> None:
    """Change all of it, until as many calls of `give_back`."""
    global _users, _stance
    with _lock:
        if _users == 0:
            _stance = torch.compiler.set_stance("force_eager")  # raises within a compiled function
        _users += 1
        if _users > 1:
            return
        _before[:] = [get() for get, _ in _SWITCHES]
        for _, set_to in _SWITCHES:
            set_to(False)
        for module in _USERS_OF_MATH:
            module.math = _exact_math
        torch.nn.init._no_grad_trunc_normal_ = _trunc_normal
        _set(torch._tensor_str, _str=_text)
        _set(record_function, __enter__=_enter_mark, __exit__=_exit_mark)
        _set(LRScheduler, step=_step)
        _set(CyclicLR, _exp_range_scale_fn=staticmethod(_range))
        optimizers.apply(lambda: state.active.depth > 0)


def restore() -> None:
    """Undo one `take_over`."""
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        _stance.__exit__(None, None, None)
        for (_, set_to), value in zip(_SWITCHES, _before):
            set_to(value)
        for module in _USERS_OF_MATH:
            module.math = math
        torch.nn.init._no_grad_trunc_normal_ = _original_trunc_normal
        _set(torch._tensor_str, _str=_original_text)
        _set(record_function, __enter__=_original_enter, __exit__=_original_exit)
        _set(LRScheduler, step=_original_step)
        _set(CyclicLR, _exp_range_scale_fn=staticmethod(_original_range))
        optimizers.restore()
