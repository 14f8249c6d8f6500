"""Random numbers: PyTorch's own stream of random integers, through correctly rounded formulas.

A float32 of `rand` is a multiple of 2^-24, a float64 of 2^-53: integer work, the same everywhere. All
numbers are drawn on the CPU from the CPU's generator, whatever the device. What follows each draw is
PyTorch's own algorithm on the CPU, with its functions replaced by exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler.evaluate import elementwise
from reproml.arithmetic.numerics.devices import to_device
from reproml.arithmetic.numerics.libm import ExactMath
from reproml.arithmetic.numerics.rounding import nearest
from reproml.arithmetic.numerics.scalars import float32_scalar
from reproml.arithmetic.operators.arguments import require
from reproml.errors import NotExactError


def _only_float32(dtype: Any) -> None:
    if (dtype or torch.get_default_dtype()) is not torch.float32:
        raise NotExactError(f"Random numbers of {dtype} have no exact definition; ask for float32.")


def _on_cpu(generator: Optional[torch.Generator]) -> None:
    if generator is not None and generator.device.type != "cpu":
        raise NotExactError(
            f"A generator on {generator.device} has no exact stream; use one on the CPU."
        )


def _sent(x: Tensor, device: Any) -> Tensor:
    return to_device(x, torch.device(device or "cpu"))


def rand(
    size: Sequence[int], *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Multiples of 2^-24 in [0, 1)."""
    _only_float32(dtype)
    _on_cpu(generator)
    return _sent(torch.rand(size, generator=generator, dtype=torch.float32, device="cpu"), device)


def uniform(x: Tensor, low: float = 0, high: float = 1, *, generator: Any = None) -> Tensor:
    """u (high - low) + low, rounded once. Raises RuntimeError for low > high."""
    require(low <= high, f"uniform_ takes a range from low to high, not from {low} to {high}")
    u = _draws(x, torch.float32, generator)
    a, b = float32_scalar(low), float32_scalar(high)
    return x.copy_(u if (low, high) == (0, 1) else elementwise(lambda ctx, u: u * (b - a) + a, u))


def normal(x: Tensor, mean: float = 0, std: float = 1, *, generator: Any = None) -> Tensor:
    """std sqrt(-2 log(u)) cos(2 pi v) + mean, and the same with sin (Box & Muller 1958), rounded once.

    From 16 elements on PyTorch takes u = 1 - u' and v from each 16 numbers of `rand`, u' the first 8
    and v the others, and draws the last 16 elements anew where 16 does not divide their number. For
    fewer elements it draws pairs (v, u') of float64; the second number of the last pair, where there is
    one too many, is dropped.

    Raises RuntimeError for std < 0.
    """
    _on_cpu(generator)
    require(std >= 0, f"a normal distribution has a std of 0 or more, not {std}")
    m, s = float32_scalar(mean), float32_scalar(std)

    def pairs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        radius_of = lambda ctx, u: s * ctx.sqrt(-2 * ctx.log1p(-u))  # noqa: E731
        cosine = elementwise(lambda ctx, u, v: radius_of(ctx, u) * ctx.cospi(2 * v) + m, u, v)
        return cosine, elementwise(lambda ctx, u, v: radius_of(ctx, u) * ctx.sinpi(2 * v) + m, u, v)

    def blocks(u: Tensor) -> Tensor:
        u = u.reshape(-1, 2, 8)
        return torch.stack(pairs(u[:, 0], u[:, 1]), 1).reshape(-1)

    n = x.numel()
    if n >= 16 and x.is_contiguous():
        u = torch.rand(n, generator=generator, dtype=torch.float32, device="cpu")
        flat = torch.cat([blocks(u[: n - n % 16]), u[n - n % 16 :]])
        if n % 16:
            flat[-16:] = blocks(
                torch.rand(16, generator=generator, dtype=torch.float32, device="cpu")
            )
    else:
        draws = torch.rand((n + 1) // 2, 2, generator=generator, dtype=torch.float64, device="cpu")
        flat = torch.stack(pairs(draws[:, 1], draws[:, 0]), 1).reshape(-1)[:n]
    in_memory_order = torch.empty_like(x, device="cpu")
    in_memory_order.as_strided((n,), (1,)).copy_(flat)
    return x.copy_(_sent(in_memory_order, x.device))


def _draws(x: Tensor, dtype: torch.dtype, generator: Any) -> Tensor:
    """Numbers of `rand` in the shape of x, in the order of its memory, as PyTorch draws them."""
    _on_cpu(generator)
    u = torch.empty_like(x, dtype=dtype, device="cpu").uniform_(generator=generator)
    return _sent(u, x.device)


def randn(
    size: Sequence[int], *, generator: Any = None, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    _only_float32(dtype)
    return _sent(
        normal(torch.empty(size, dtype=torch.float32, device="cpu"), generator=generator), device
    )


def normal_of(
    mean: Any, std: Any = 1.0, size: Any = None, *, generator: Any = None, **_: Any
) -> Tensor:
    """torch.normal: numbers, or tensors of means and deviations (std z + mean, rounded once)."""
    if size is not None:
        return normal(
            torch.empty(size, dtype=torch.float32, device="cpu"), mean, std, generator=generator
        )
    require(std >= 0, "a normal distribution has no std below 0")
    shape = torch.broadcast_shapes(*[x.shape for x in (mean, std) if isinstance(x, Tensor)])
    z = normal(torch.empty(shape, dtype=torch.float32, device="cpu"), generator=generator)
    return elementwise(lambda ctx, z, s, m: z * s + m, z, std, mean)


def like(draw: Any) -> Any:
    """rand_like and randn_like of rand and randn."""

    def drawn(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        result: Tensor = draw(x.shape, dtype=dtype or x.dtype, device=device or x.device)
        return result

    return drawn


def bernoulli(x: Tensor, p: Any = None, *, generator: Any = None) -> Tensor:
    """1 where `rand` is below the probability: p, or x itself. rand of p's dtype, float64 for a number."""
    return bernoulli_(torch.empty_like(x), x if p is None else p, generator=generator)


def bernoulli_(x: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    within = (p >= 0) & (p <= 1) if isinstance(p, Tensor) else 0 <= p <= 1
    require(within, "a probability p of bernoulli_ is outside of [0, 1]")
    dtype = p.dtype if isinstance(p, Tensor) else torch.float64
    return torch.lt(_draws(x, dtype, generator), p, out=x)


def dropout(x: Tensor, p: float, train: Optional[bool] = True) -> tuple[Tensor, Tensor]:
    """native_dropout, which a GPU has for F.dropout: what F.dropout gives on the CPU, and the mask."""
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return x * 0.0, torch.zeros_like(x, dtype=torch.bool)
    kept = bernoulli_(torch.empty_like(x), 1 - p)
    return x * (kept * _factor(1 - p)), kept.bool()


def dropout_backward(g: Tensor, mask: Tensor, scale: float) -> Tensor:
    """native_dropout_backward; scale: 1 / (1 - p), or 0 for p = 1."""
    return g * (mask.float() * (_factor(1 / scale) if scale else 0.0))


def _factor(keep: float) -> float:
    """1 / keep as the CPU has it: keep is rounded to binary32 first."""
    return nearest(1 / float32_scalar(keep))


def exponential(x: Tensor, rate: float = 1, *, generator: Any = None) -> Tensor:
    """-log(1 - u) / rate, u a float64 of `rand`. Raises RuntimeError unless rate > 0."""
    require(rate > 0, f"exponential_ takes a rate above 0, not {rate}")
    u = _draws(x, torch.float64, generator)
    r = float32_scalar(rate)
    return x.copy_(elementwise(lambda ctx, u: -ctx.log1p(-u) / r, u))


def on_cpu(draw: Any) -> Any:
    """A function that draws integers, on the CPU whatever the device."""

    def drawn(*args: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Tensor:
        _on_cpu(options.get("generator"))
        return _sent(draw(*args, **options), device)

    return drawn


def random_(x: Tensor, *bounds: int, generator: Any = None) -> Tensor:
    _on_cpu(generator)
    draws = torch.empty_like(x, device="cpu")  # x's strides: PyTorch draws in the order of memory
    return x.copy_(_sent(draws.random_(*bounds, generator=generator), x.device))


def multinomial(
    x: Tensor, count: int, replacement: bool = False, *, generator: Any = None
) -> Tensor:
    """The indices of the largest x / q, q exponential (PyTorch's own way for one sample or none put back).

    Raises NotExactError for several samples with replacement, RuntimeError for what are no probabilities.
    """
    if replacement and count > 1:
        raise NotExactError(
            "Several samples with replacement have no exact definition; draw one at a time."
        )
    require((x >= 0) & x.isfinite(), "a probability of multinomial is inf, NaN or below 0")
    require(x.sum(-1) > 0, "the probabilities of multinomial are all 0")
    require(
        count <= x.shape[-1],
        f"multinomial cannot draw {count} of {x.shape[-1]} without replacement",
    )
    q = exponential(torch.empty_like(x), generator=generator)
    ratio = (x.double() / q.double()).float()
    order: Tensor = ratio.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count]


def trunc_normal_(
    x: Tensor, mean: float, std: float, low: float, high: float, generator: Any = None
) -> Tensor:
    """torch.nn.init.trunc_normal_ as PyTorch 2.8 has it (later versions draw other numbers): std sqrt(2)
    erfinv(u) + mean, u uniform between the erf of both bounds, then clamped; each step rounded once."""

    def distribution(bound: float) -> float:
        result: float = (1.0 + ExactMath().erf((bound - mean) / std / math.sqrt(2.0))) / 2.0
        return result

    with torch.no_grad():
        x.uniform_(2 * distribution(low) - 1, 2 * distribution(high) - 1, generator=generator)
        return x.erfinv_().mul_(std * math.sqrt(2.0)).add_(mean).clamp_(min=low, max=high)
