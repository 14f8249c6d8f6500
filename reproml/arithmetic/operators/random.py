"""Random numbers: PyTorch's own stream of random integers, passed to correctly rounded formulas.

A float32 from `rand` is a multiple of 2^-24 and a float64 one of 2^-53, both made of integers, so they
are the same on every machine. All numbers are drawn on the CPU, from a CPU generator, whatever the
tensor's device. Each function then follows PyTorch's CPU algorithm for contiguous tensors, with its
elementary functions replaced by exact ones. A tensor receives its numbers in logical order, that of its
indices, however it lies in memory.

Functions are named like PyTorch's operators and return float32 unless stated otherwise. Those that create
a tensor raise NotExactError for another dtype, and all of them for a generator that is not on the CPU.

Uniform and normal numbers of bfloat16 and float16 are made of the same integers as those of float32 and
rounded once. This is the algorithm of PyTorch 2.15; before, PyTorch made them of 8 and 11 bits.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.dispatch.deferred import replay_log
from reproml.arithmetic.numerics.devices import is_on_accelerator, to_device
from reproml.arithmetic.numerics.formats import (
    BINARY32,
    BINARY64,
    NARROW,
    narrow,
    narrow_float32,
    operate,
    storing,
    target,
)
from reproml.arithmetic.numerics.libm import EXACT_MATH, rounded_to_nearest, rounded_to_odd
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
    """Draw multiples of 2^-24 in [0, 1), or 16-bit numbers nearest to them, with 0 in place of 1."""
    _require_float32(dtype)
    require_cpu(generator)
    u = torch.rand(size, generator=generator, dtype=target().container, device="cpu")
    return _to(_below(narrow_float32(u), 0.0, 1.0) if target().dtype in NARROW else u, device)


def uniform_(x: Tensor, low: float = 0, high: float = 1, *, generator: Any = None) -> Tensor:
    """Write u (high - low) + low to x, with u from `rand`. Raises RuntimeError for low > high.

    A 16-bit number that is rounded to `high` becomes `low`.
    """
    require(low <= high, f"uniform_ expects low <= high, not low={low} and high={high}")
    u = _uniform_like(x, target().container, generator)
    a, b = float32_scalar(low), float32_scalar(high)
    if target().dtype in NARROW:
        y = elementwise(lambda ctx, u: u * (b - a) + a, u)
        return x.copy_(_below(y, nearest(a), nearest(b)))
    return x.copy_(u if (low, high) == (0, 1) else elementwise(lambda ctx, u: u * (b - a) + a, u))


def _below(x: Tensor, low: float, high: float) -> Tensor:
    return torch.where(x == high, low, x)


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
    require_cpu(generator)
    if is_on_accelerator(x):
        replay_log.flush()
    negative = x <= 0
    count = int(negative.sum())
    u = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    a, b = Fraction(low), Fraction(high)

    def noise_of(ctx: Any, u: Any) -> Any:
        return u * (b - a) + a

    ones = torch.ones_like(noise)
    noise.copy_(ones.masked_scatter(negative, _to(elementwise(noise_of, u), x.device)))
    if target() is BINARY32:
        return torch.where(negative, x * noise, x)
    with storing():  # as PyTorch keeps r in float32 for the product
        r = ones.masked_scatter(negative, _to(elementwise(noise_of, u), x.device))
    return torch.where(negative, operate(torch.mul, x, r), x)


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
    new numbers for the last 16 elements; for 16-bit elements it draws only the numbers that it uses. If x
    has fewer, it draws pairs (v, u) of float64 numbers; if the last result is one too many, its value for
    mean 0 and std 1 stays in the generator, rounded to binary64 to odd, or to nearest for a float64 tensor,
    and is the first number of the next such call.

    Raises RuntimeError for std < 0.
    """
    require_cpu(generator)
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
        count = n - n % 16 if target().dtype in NARROW else n
        u = torch.rand(count, generator=generator, dtype=target().container, device="cpu")
        flat = torch.cat([blocks_of_16(u[: n - n % 16]), u.new_empty(n % 16)])
        if n % 16:
            flat[-16:] = blocks_of_16(
                torch.rand(16, generator=generator, dtype=target().container, device="cpu")
            )
    elif n:
        spare = take_spare(generator)
        count = n - len(spare)
        draws = torch.rand(
            (count + 1) // 2, 2, generator=generator, dtype=torch.float64, device="cpu"
        )
        pairs = torch.stack(box_muller(draws[:, 1], draws[:, 0]), 1).reshape(-1)
        flat = torch.cat([elementwise(lambda ctx, z: z * s + m, spare), pairs[:count]])
        if count % 2:
            keep_spare(generator, *draws[-1].tolist())
    else:
        return x
    return x.copy_(_to(flat.reshape(x.shape), x.device))


# Where the state of a CPU generator keeps a normal number, and whether it holds one: CPUGeneratorImpl.cpp.
_STATE, _SPARE, _HAS_SPARE = 5056, slice(5024, 5032), slice(5040, 5044)


def take_spare(generator: Optional[torch.Generator]) -> Tensor:
    """Remove the normal number that a generator keeps. Returns float64 [1], or [0] if there is none."""
    generator = generator or torch.default_generator
    state = _state_of(generator)
    if not int(state[_HAS_SPARE].view(torch.int32)):
        return torch.empty(0, dtype=torch.float64, device="cpu")
    spare = state[_SPARE].view(torch.float64).clone()
    state[_HAS_SPARE] = 0
    generator.set_state(state)
    return spare


def keep_spare(generator: Optional[torch.Generator], v: float, u: float) -> None:
    """Let a generator keep sqrt(-2 log(1 - u)) sin(2 pi v), rounded to odd, or to float64 for float64."""
    generator = generator or torch.default_generator
    state = _state_of(generator)
    rounded = rounded_to_nearest if target() is BINARY64 else rounded_to_odd
    spare = rounded(lambda mp: mp.sqrt(-2 * mp.log1p(-mp.mpf(u))) * mp.sinpi(2 * mp.mpf(v)))
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
    return g * (mask.to(g.dtype) * (_dropout_scale(1 / scale) if scale else 0.0))


def _dropout_scale(keep: float) -> float:
    """Return 1 / keep as F.dropout computes it on the CPU, where keep is rounded to x's dtype first."""
    return nearest(1 / float32_scalar(keep))


def exponential_(x: Tensor, rate: float = 1, *, generator: Any = None) -> Tensor:
    """Write -log(1 - u) / rate to x, rounded once, with u a float64 from `rand`.

    Raises RuntimeError unless rate > 0.
    """
    require(rate > 0, f"exponential_ expects lambd > 0, not {rate}")
    u = _uniform_like(x, torch.float64, generator)
    r = float32_scalar(rate)
    return x.copy_(elementwise(lambda ctx, u: -ctx.log1p(-u) / r, u))


def cauchy_(x: Tensor, median: float = 0, sigma: float = 1, *, generator: Any = None) -> Tensor:
    """Write median + sigma tan(pi (u - 1/2)) to x, rounded once, with u a float64 from `rand`.

    For u = 0 it is minus infinity. Raises RuntimeError unless sigma > 0.
    """
    require(sigma > 0, f"cauchy_ expects sigma > 0, not {sigma}")
    u = _uniform_like(x, torch.float64, generator)
    m, s = float32_scalar(median), float32_scalar(sigma)

    def formula(ctx: Any, u: Any) -> Any:
        v = u - Fraction(1, 2)
        return m + s * ctx.sinpi(v) / ctx.sinpi(Fraction(1, 2) - abs(v))

    y = elementwise(formula, torch.where(u == 0, 0.5, u))
    return x.copy_(torch.where(u == 0, -torch.inf, y))


def multinomial(
    x: Tensor, count: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    """Draw int64 indices with the probabilities x / sum(x), for each row of x.

    One sample, or several without replacement: the indices of the largest x / q, where q is exponentially
    distributed. Several with replacement: for each a float64 u from `rand`, and the
    first index whose prefix sum of x, which is exact, is positive and at least u sum(x). These are
    PyTorch's algorithms.

    Raises RuntimeError if x is not a tensor of probabilities or has too few of them.
    """
    require_cpu(generator)
    require((x >= 0) & x.isfinite(), "multinomial: a probability is inf, NaN or negative")
    require(x.sum(-1) > 0, "multinomial: the sum of the probabilities is 0")
    if replacement and count > 1:
        return _multinomial_with_replacement(x, count, generator)
    require(
        count <= x.shape[-1],
        f"multinomial cannot draw {count} samples from {x.shape[-1]} without replacement",
    )
    q = exponential_(torch.empty_like(x), generator=generator)
    ratio = narrow(x.double() / q.double())
    order: Tensor = ratio.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count]


def _multinomial_with_replacement(x: Tensor, count: int, generator: Any) -> Tensor:
    """Return the indices, which the CPU computes with integers of any length."""
    rows = numbers_of(x.reshape(-1, x.shape[-1]))
    u = torch.rand(len(rows), count, generator=generator, dtype=torch.float64, device="cpu")
    indices = []
    for row, draws in zip(rows, (u * 2.0**53).long().tolist()):
        ratios = [p.as_integer_ratio() for p in row]
        scale = max(denominator for _, denominator in ratios)
        sums = list(accumulate(n * (scale // denominator) for n, denominator in ratios))
        bounds = [-(-draw * sums[-1] >> 53) for draw in draws]  # u sum(x), rounded up
        indices.append([bisect_left(sums, max(bound, 1)) for bound in bounds])
    return _to(torch.tensor(indices, device="cpu").reshape(*x.shape[:-1], count), x.device)


# ---- integers ----------------------------------------------------------------------------------------


def drawn_on_cpu(draw: Any) -> Any:
    """Return the definition of randint or randperm: PyTorch's function, always called on the CPU."""

    def drawn(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
        require_cpu(options.get("generator"))
        _require_narrow_bounds(options.get("dtype"), args)
        return _to(draw(*args, **options), device)

    return drawn


def randint_like(
    x: Tensor, *bounds: Any, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Return random integers in the shape of x, as randint draws them."""
    require_cpu(generator)
    low, high = map(int, bounds if len(bounds) > 1 else (0, *bounds))
    _require_narrow_bounds(dtype or x.dtype, (low, high))
    draws = torch.randint(low, high, x.shape, generator=generator, dtype=dtype or x.dtype)
    return _to(draws, device or x.device)


def random_(x: Tensor, *bounds: int, generator: Any = None) -> Tensor:
    """Write random integers within the bounds to x."""
    require_cpu(generator)
    _require_narrow_bounds(x.dtype, bounds)
    draws = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    return x.copy_(_to(draws.random_(*bounds, generator=generator), x.device))


# ---- helpers -----------------------------------------------------------------------------------------


def _uniform_like(x: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """Draw numbers of `rand` in the shape of x."""
    require_cpu(generator)
    u = torch.rand(x.shape, generator=generator, dtype=dtype, device="cpu")
    return _to(u, x.device)


def confirmed(x: Tensor) -> Tensor:
    """Return a tensor after all numbers of a device have been confirmed."""
    if is_on_accelerator(x):
        replay_log.flush()
    return x


def numbers_of(x: Tensor) -> Any:
    """Return the numbers of a tensor, after all those of a device have been confirmed."""
    return confirmed(x).tolist()


def _require_float32(dtype: Any) -> None:
    """Raise NotExactError unless a new tensor of this dtype is float32.

    None is the default dtype; where that has 16 bits, the result is rounded to it.
    """
    dtype = dtype or torch.get_default_dtype()
    if dtype not in (torch.float32, target().dtype, *NARROW):
        raise NotExactError(f"Random numbers of {dtype} have no exact definition; use float32.")


def _require_narrow_bounds(dtype: Any, bounds: Sequence[Any]) -> None:
    """Raise NotExactError for integers that PyTorch would round to float32 and then to 16 bits."""
    if dtype in NARROW and any(type(x) is int and abs(x) > 1 << 24 for x in bounds):
        raise NotExactError(
            f"Random integers of {dtype} are defined for bounds up to 2^24; draw int64 and cast it."
        )


def require_cpu(generator: Optional[torch.Generator]) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise NotExactError(
            f"A generator on {generator.device} draws other numbers than the CPU's; use a CPU generator."
        )


def _to(x: Tensor, device: Any) -> Tensor:
    """Move x to an operator's `device` argument, by default the CPU."""
    return to_device(x, torch.device(device or "cpu"))
