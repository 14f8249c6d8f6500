"""Random numbers: PyTorch's own stream of random integers, passed to correctly rounded formulas.

A float32 from `rand` is a multiple of 2^-24 and a float64 one of 2^-53, both made of integers, so they
are the same on every machine. All numbers are drawn on the CPU, from a CPU generator, whatever the
tensor's device. Each function then follows PyTorch's CPU algorithm for contiguous tensors, with its
elementary functions replaced by exact ones. A tensor receives its numbers in logical order, that of its
indices, however it lies in memory.

Functions are named like PyTorch's operators and return float32 unless stated otherwise. Those that create
a tensor raise NotExactError for another dtype, and all of them for a generator that is not on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics.devices import is_on_accelerator, to_device
from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.arithmetic.numerics.libm import EXACT_MATH, rounded_to_odd
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.activations import leaky_relu
from reproml.arithmetic.operators.arguments import require
from reproml.errors import NotExactError
from reproml.torch_internals import UnknownPyTorchError

# ---- uniform and normal numbers ----------------------------------------------------------------------


def rand(
    size: Sequence[int], *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Draw multiples of 2^-24 in [0, 1)."""
    _require_float32(dtype)
    _require_cpu(generator)
    return _to(
        torch.rand(size, generator=generator, dtype=target().container, device="cpu"), device
    )


def uniform_(x: Tensor, low: float = 0, high: float = 1, *, generator: Any = None) -> Tensor:
    """Write u (high - low) + low to x, with u from `rand`. Raises RuntimeError for low > high."""
    require(low <= high, f"uniform_ expects low <= high, not low={low} and high={high}")
    u = _uniform_like(x, target().container, generator)
    a, b = float32_scalar(low), float32_scalar(high)
    return x.copy_(u if (low, high) == (0, 1) else elementwise(lambda ctx, u: u * (b - a) + a, u))


def rrelu(
    x: Tensor,
    noise: Tensor,
    low: float = 1 / 8,
    high: float = 1 / 3,
    training: bool = False,
    generator: Any = None,
) -> Tensor:
    """Compute aten.rrelu_with_noise: x, or x r where x <= 0, with r = u (high - low) + low.

    r is written to noise, which is 1 elsewhere. A float64 number u is drawn for each such x, as PyTorch
    does. Without training, r is the mean of low and high, and noise is not written.
    """
    if not training:
        return leaky_relu(x, (low + high) / 2)
    _require_cpu(generator)
    if is_on_accelerator(x):
        replay_log.flush()
    negative = x <= 0
    count = int(negative.sum())
    u = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    a, b = Fraction(low), Fraction(high)
    r = elementwise(lambda ctx, u: u * (b - a) + a, u)
    noise.copy_(torch.ones_like(noise).masked_scatter(negative, _to(r, x.device)))
    return torch.where(negative, x * noise, x)


def randn(
    size: Sequence[int], *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Draw from the normal distribution with mean 0 and std 1."""
    _require_float32(dtype)
    return _to(
        normal_(torch.empty(size, dtype=target().container, device="cpu"), generator=generator),
        device,
    )


def normal(
    mean: Any,
    std: Any = 1.0,
    size: Any = None,
    *,
    generator: Any = None,
    dtype: Any = None,
    **_: Any,
) -> Tensor:
    """Draw numbers with a mean and a std that are numbers, or tensors: std z + mean, rounded once.

    Raises RuntimeError for std < 0.
    """
    if size is not None:
        _require_float32(dtype)
        return normal_(
            torch.empty(size, dtype=target().container, device="cpu"),
            mean,
            std,
            generator=generator,
        )
    require(std >= 0, "normal expects all elements of std >= 0")
    shape = torch.broadcast_shapes(*[x.shape for x in (mean, std) if isinstance(x, Tensor)])
    z = normal_(torch.empty(shape, dtype=target().container, device="cpu"), generator=generator)
    return elementwise(lambda ctx, z, s, m: z * s + m, z, std, mean)


def normal_(x: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
    """Write std sqrt(-2 log(1 - u)) cos(2 pi v) + mean, and the same with sin, to x (Box & Muller 1958).

    Each number is rounded once. If x has at least 16 elements, PyTorch draws as many numbers of `rand`; of
    each 16 the first 8 are u and the others v. If 16 does not divide the number of elements, it draws 16
    new numbers for the last 16 elements. If x has fewer, it draws pairs (v, u) of float64 numbers; if the
    last result is one too many, its value for mean 0 and std 1 stays in the generator, rounded to binary64
    to odd, and is the first number of the next such call.

    Raises RuntimeError for std < 0.
    """
    _require_cpu(generator)
    require(std >= 0, f"normal_ expects std >= 0, not {std}")
    m, s = float32_scalar(mean), float32_scalar(std)

    def box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        radius = lambda ctx, u: s * ctx.sqrt(-2 * ctx.log1p(-u))  # noqa: E731
        cosine = elementwise(lambda ctx, u, v: radius(ctx, u) * ctx.cospi(2 * v) + m, u, v)
        return cosine, elementwise(lambda ctx, u, v: radius(ctx, u) * ctx.sinpi(2 * v) + m, u, v)

    def blocks_of_16(u: Tensor) -> Tensor:
        u = u.reshape(-1, 2, 8)
        return torch.stack(box_muller(u[:, 0], u[:, 1]), 1).reshape(-1)

    n = x.numel()
    if n >= 16:
        u = torch.rand(n, generator=generator, dtype=target().container, device="cpu")
        flat = torch.cat([blocks_of_16(u[: n - n % 16]), u[n - n % 16 :]])
        if n % 16:
            flat[-16:] = blocks_of_16(
                torch.rand(16, generator=generator, dtype=target().container, device="cpu")
            )
    elif n:
        if target() is BINARY64 and (n % 2 or _has_spare(generator)):
            raise NotExactError(
                "Of fewer than 16 normal float64 numbers only an even number is defined; draw 16 or more."
            )
        spare = _take_spare(generator)
        count = n - len(spare)
        draws = torch.rand(
            (count + 1) // 2, 2, generator=generator, dtype=torch.float64, device="cpu"
        )
        pairs = torch.stack(box_muller(draws[:, 1], draws[:, 0]), 1).reshape(-1)
        flat = torch.cat([elementwise(lambda ctx, z: z * s + m, spare), pairs[:count]])
        if count % 2:
            _keep_spare(generator, *draws[-1].tolist())
    else:
        return x
    return x.copy_(_to(flat.reshape(x.shape), x.device))


# Where the state of a CPU generator keeps a normal number, and whether it holds one: CPUGeneratorImpl.cpp.
_STATE, _SPARE, _HAS_SPARE = 5056, slice(5024, 5032), slice(5040, 5044)


def _has_spare(generator: Optional[torch.Generator]) -> bool:
    state = _state_of(generator or torch.default_generator)
    return bool(state[_HAS_SPARE].view(torch.int32))


def _take_spare(generator: Optional[torch.Generator]) -> Tensor:
    """Remove the normal number that a generator keeps. Returns float64 [1], or [0] if there is none."""
    generator = generator or torch.default_generator
    state = _state_of(generator)
    if not int(state[_HAS_SPARE].view(torch.int32)):
        return torch.empty(0, dtype=torch.float64, device="cpu")
    spare = state[_SPARE].view(torch.float64).clone()
    state[_HAS_SPARE] = 0
    generator.set_state(state)
    return spare


def _keep_spare(generator: Optional[torch.Generator], v: float, u: float) -> None:
    """Let a generator keep sqrt(-2 log(1 - u)) sin(2 pi v), rounded to odd."""
    generator = generator or torch.default_generator
    state = _state_of(generator)
    spare = rounded_to_odd(lambda mp: mp.sqrt(-2 * mp.log1p(-mp.mpf(u))) * mp.sinpi(2 * mp.mpf(v)))
    state[_SPARE].view(torch.float64).fill_(spare)
    state[_HAS_SPARE].view(torch.int32).fill_(1)
    generator.set_state(state)


def _state_of(generator: torch.Generator) -> Tensor:
    state = generator.get_state()
    if state.numel() != _STATE:
        raise UnknownPyTorchError(f"torch.Generator.get_state() of {_STATE} bytes")
    return state


def trunc_normal_(
    x: Tensor, mean: float, std: float, low: float, high: float, generator: Any = None
) -> Tensor:
    """Apply torch.nn.init.trunc_normal_ with PyTorch 2.8's algorithm; later versions draw other numbers.

    std sqrt(2) erfinv(u) + mean, clamped to the bounds, with u uniform between 2 Phi - 1 of the two
    bounds, where Phi is the normal distribution function; each step is rounded once.
    """

    def distribution(bound: float) -> float:
        result: float = (1.0 + EXACT_MATH.erf((bound - mean) / std / math.sqrt(2.0))) / 2.0
        return result

    with torch.no_grad():
        x.uniform_(2 * distribution(low) - 1, 2 * distribution(high) - 1, generator=generator)
        return x.erfinv_().mul_(std * math.sqrt(2.0)).add_(mean).clamp_(min=low, max=high)


def like(draw: Any) -> Any:
    """Return the definition of rand_like or randn_like, made from rand or randn."""

    def drawn(
        x: Tensor, *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
    ) -> Tensor:
        dtype, device = dtype or x.dtype, device or x.device
        result: Tensor = draw(x.shape, generator=generator, dtype=dtype, device=device)
        return result

    return drawn


# ---- other distributions -----------------------------------------------------------------------------


def bernoulli(x: Tensor, p: Any = None, *, generator: Any = None) -> Tensor:
    """Apply bernoulli_ to a new tensor, with the probability p or, by default, x."""
    return bernoulli_(torch.empty_like(x), x if p is None else p, generator=generator)


def bernoulli_(x: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    """Write 1 to x where `rand` is below the probability p, and 0 elsewhere.

    The numbers of `rand` have p's dtype, or float64 if p is a Python number. Raises RuntimeError for a p
    outside of [0, 1].
    """
    valid = (p >= 0) & (p <= 1) if isinstance(p, Tensor) else 0 <= p <= 1
    require(valid, "bernoulli_ expects all probabilities p to be between 0 and 1")
    dtype = p.dtype if isinstance(p, Tensor) else torch.float64
    return torch.lt(_uniform_like(x, dtype, generator), p, out=x)


def native_dropout(x: Tensor, p: float, train: Optional[bool] = True) -> tuple[Tensor, Tensor]:
    """Return what F.dropout returns on the CPU, and the bool mask of kept elements."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return x * 0.0, torch.zeros_like(x, dtype=torch.bool)
    kept = bernoulli_(torch.empty_like(x), 1 - p)
    return x * (kept * _dropout_scale(1 - p)), kept.bool()


def native_dropout_backward(g: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return g times the mask and the scale of native_dropout. scale: 1 / (1 - p), or 0 for p = 1."""
    return g * (mask.float() * (_dropout_scale(1 / scale) if scale else 0.0))


def _dropout_scale(keep: float) -> float:
    """Return 1 / keep as F.dropout computes it on the CPU, where keep is rounded to binary32 first."""
    return nearest(1 / float32_scalar(keep))


def exponential_(x: Tensor, rate: float = 1, *, generator: Any = None) -> Tensor:
    """Write -log(1 - u) / rate to x, rounded once, with u a float64 from `rand`.

    Raises RuntimeError unless rate > 0.
    """
    require(rate > 0, f"exponential_ expects lambd > 0, not {rate}")
    u = _uniform_like(x, torch.float64, generator)
    r = float32_scalar(rate)
    return x.copy_(elementwise(lambda ctx, u: -ctx.log1p(-u) / r, u))


def multinomial(
    x: Tensor, count: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    """Return the int64 indices of the largest x / q, where q is exponentially distributed.

    This is PyTorch's algorithm for one sample, or several without replacement. Raises NotExactError for
    several with replacement, RuntimeError if x is not a tensor of probabilities or has too few of them.
    """
    if replacement and count > 1:
        raise NotExactError(
            "multinomial with replacement=True is defined for one sample only; draw one at a time."
        )
    require((x >= 0) & x.isfinite(), "multinomial: a probability is inf, NaN or negative")
    require(x.sum(-1) > 0, "multinomial: the sum of the probabilities is 0")
    require(
        count <= x.shape[-1],
        f"multinomial cannot draw {count} samples from {x.shape[-1]} without replacement",
    )
    q = exponential_(torch.empty_like(x), generator=generator)
    ratio = (x.double() / q.double()).float()
    order: Tensor = ratio.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count]


# ---- integers ----------------------------------------------------------------------------------------


def drawn_on_cpu(draw: Any) -> Any:
    """Return the definition of randint or randperm: PyTorch's function, always called on the CPU."""

    def drawn(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
        _require_cpu(options.get("generator"))
        return _to(draw(*args, **options), device)

    return drawn


def randint_like(
    x: Tensor, *bounds: Any, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Return random integers in the shape of x, as randint draws them."""
    _require_cpu(generator)
    low, high = map(int, bounds if len(bounds) > 1 else (0, *bounds))
    draws = torch.randint(low, high, x.shape, generator=generator, dtype=dtype or x.dtype)
    return _to(draws, device or x.device)


def random_(x: Tensor, *bounds: int, generator: Any = None) -> Tensor:
    """Write random integers within the bounds to x."""
    _require_cpu(generator)
    draws = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    return x.copy_(_to(draws.random_(*bounds, generator=generator), x.device))


# ---- helpers -----------------------------------------------------------------------------------------


def _uniform_like(x: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """Draw numbers of `rand` in the shape of x."""
    _require_cpu(generator)
    u = torch.rand(x.shape, generator=generator, dtype=dtype, device="cpu")
    return _to(u, x.device)


def _require_float32(dtype: Any) -> None:
    """Raise NotExactError unless a new tensor of this dtype (None: the default dtype) is float32."""
    dtype = dtype or torch.get_default_dtype()
    if dtype not in (torch.float32, target().dtype):
        raise NotExactError(f"Random numbers of {dtype} have no exact definition; use float32.")


def _require_cpu(generator: Optional[torch.Generator]) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise NotExactError(
            f"A generator on {generator.device} draws other numbers than the CPU's; use a CPU generator."
        )


def _to(x: Tensor, device: Any) -> Tensor:
    """Move x to an operator's `device` argument, by default the CPU."""
    return to_device(x, torch.device(device or "cpu"))
