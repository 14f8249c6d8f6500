"""Products of any number of elements, each rounded once, which neither overflow nor underflow on the way.

A factor is m 2^e with 1/2 <= |m| < 1. The m are multiplied in binary64 and the e are added, so that a
product of n factors has a relative error of at most gamma_n, in any order (Higham, Accuracy and Stability
of Numerical Algorithms, section 3.1). It is exact if the odd parts of all factors have up to 53 bits
together. So are all ties, whose odd part has up to 25 bits: that of k numbers of b_i > 1 bits has more than
the sum of b_i - 1 bits, which is at least half of the sum of b_i. Products that fail the rounding test are
multiplied as integers. A zero has the sign that the signs of its factors give.

Products of rows, and those at indices, have loops of their own (csrc/products.c), which leave hardly any to
integers.

Products in float64 are those of integers from the start, of which 160 bits are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Optional

import torch
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics.formats import BINARY64, target
from reproml.arithmetic.numerics.rationals import to_double
from reproml.arithmetic.numerics.rounding import gamma, nearest, round_ball
from reproml.arithmetic.operators.arguments import require_float32
from reproml.torch_internals import canonicalize_dims

# As many factors of at least 1/2 do not underflow in binary64.
_BLOCK = 512

# Bits that a product in float64 keeps.
_BITS = 160


def prod(
    x: Tensor, dim: Optional[int] = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """Compute aten.prod: the product over one axis, or over all."""
    require_float32(dtype)
    x = x.to(target().container)
    wide = x.reshape(-1) if dim is None else torch.atleast_1d(x)
    result = _by_loop(wide, dim or 0, False)
    if result is None:
        result = row_products(wide.movedim(dim or 0, -1))
    if dim is None:
        return result
    return result.unsqueeze(dim) if keepdim and x.dim() else result


def row_products(rows: Tensor) -> Tensor:
    """Return the product of each row along the last axis: float32 [..., n] -> [...]."""
    if target() is BINARY64 and rows.shape[-1]:
        return _products_in_binary64(rows, False)
    m, e = _parts(rows)
    while (n := m.shape[-1]) > 1:
        block = min(_BLOCK, n)
        m, e = (torch.nn.functional.pad(t, (0, -n % block), value=v) for t, v in ((m, 1.0), (e, 0)))
        m, change = _normalized(m.unflatten(-1, (-1, block)).prod(-1))
        e = e.unflatten(-1, (-1, block)).sum(-1) + change
    if not n:
        return rows.new_ones(rows.shape[:-1])
    mid = _scaled(m.squeeze(-1), e.squeeze(-1))

    def resolve(failed: Tensor) -> Sequence[float]:
        return [
            nearest(exact_product(row)) for row in rows.reshape(-1, rows.shape[-1])[failed].tolist()
        ]

    return round_ball(mid, _error(mid, _odd_bits(rows).sum(-1), gamma(rows.shape[-1])), resolve)


def cumprod(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    """Return, for each element, the product of the elements up to it along `dim`, rounded once."""
    require_float32(dtype)
    x = x.to(target().container)
    if not x.numel():
        return x.clone()
    result = _by_loop(torch.atleast_1d(x), dim, True)
    if result is not None:
        return result.reshape(x.shape)
    rows = torch.atleast_1d(x).movedim(dim, -1)
    n = rows.shape[-1]
    if target() is BINARY64:
        return _products_in_binary64(rows, True).movedim(-1, dim).reshape(x.shape)
    m, e = _parts(rows)
    step = 1
    while step < n:  # each product consists of two that have up to `step` factors
        before, e_before = m[..., :-step], e[..., :-step]
        product, change = _normalized(m[..., step:] * before)
        e = torch.cat([e[..., :step], e[..., step:] + e_before + change], -1)
        m = torch.cat([m[..., :step], product], -1)
        step *= 2
    mid = _scaled(m, e)

    def resolve(failed: Tensor) -> Sequence[float]:
        flat = rows.reshape(-1, n)
        pairs = zip((failed // n).tolist(), (failed % n).tolist())
        return [nearest(exact_product(flat[i, : j + 1].tolist())) for i, j in pairs]

    result = round_ball(mid, _error(mid, _odd_bits(rows).cumsum(-1), gamma(n)), resolve)
    return result.movedim(-1, dim).reshape(x.shape)


def _by_loop(x: Tensor, dim: int, running: bool) -> Optional[Tensor]:
    """Return the products along `dim`, or those up to each element; None where no loop computes them."""
    loops = kernels.loops()
    if loops is None or not x.is_cpu or not x.numel():
        return None
    x = x.contiguous()
    at = canonicalize_dims(x.dim(), dim)
    n, inner = x.shape[at], x.shape[at + 1 :].numel()
    out = x.new_empty(x.shape if running else x.shape[:at] + x.shape[at + 1 :])
    arguments = x.numel() // (n * inner), n, inner, x.data_ptr(), running, out.data_ptr()
    complete, failed = kernels.run_kernel(loops.reproml_row_products, *arguments)
    if not complete:
        return None
    if failed is not None:
        rows = x.movedim(at, -1).reshape(-1, n)
        column = failed // inner % n if running else torch.full_like(failed, n - 1)
        row = failed // (n * inner) * inner + failed % inner if running else failed
        values = [
            nearest(exact_product(rows[i, : j + 1].tolist()))
            for i, j in zip(row.tolist(), column.tolist())
        ]
        out.view(-1)[failed] = torch.tensor(values, dtype=torch.float64).to(out.dtype)
    return out


def segment_product(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the product of the values of each index: int64 [n], float32 [n] -> float32 [size]."""
    loops = kernels.loops()
    if loops is not None and values.is_cpu and size:
        index, values = index.contiguous(), values.contiguous()
        out = torch.empty(size, dtype=torch.float32, device="cpu")
        pointers = index.data_ptr(), values.data_ptr(), out.data_ptr()
        complete, left = kernels.run_kernel(
            loops.reproml_segment_products, len(index), size, *pointers
        )
        if complete:
            if left is not None:
                exact = [nearest(exact_product(group)) for group in groups(index, values, left)]
                out[left] = torch.tensor(exact, dtype=torch.float64, device="cpu").float()
            return out
    m, e = _parts(values)
    ones = torch.ones(size, dtype=torch.float64, device=values.device)
    counts = (ones * 0).scatter_add(0, index, torch.ones_like(m))
    m = ones.scatter_reduce(0, index, m, "prod")
    m, change = _normalized(m)
    e = (ones * 0).long().scatter_add(0, index, e) + change
    mid = _scaled(m, e)
    # More factors may lose bits by underflow on the way: their product is computed exactly, unless it is 0.
    zeros = (ones * 0).scatter_add(0, index, (values == 0).double())
    unknown = torch.where((counts > 2 * _BLOCK - 24) & (zeros == 0), torch.inf, 0.0)

    def resolve(failed: Tensor) -> Sequence[float]:
        return [nearest(exact_product(group)) for group in groups(index, values, failed)]

    bits = (ones * 0).long().scatter_add(0, index, _odd_bits(values))
    return round_ball(mid, _error(mid, bits, gamma(counts)) + unknown, resolve)


def groups(index: Tensor, values: Tensor, wanted: Tensor) -> Iterator[list[Any]]:
    """Yield the values at each wanted index."""
    ordered, order = index.sort(stable=True)
    starts, ends = (torch.searchsorted(ordered, wanted, right=right) for right in (False, True))
    for start, end in zip(starts.tolist(), ends.tolist()):
        yield values[order[start:end]].tolist()


def exact_product(factors: Sequence[float]) -> Fraction:
    """Return the product of finite numbers, in pairs of about equal length."""
    pairs = [x.as_integer_ratio() for x in factors if x != 1]
    powers = sum(d.bit_length() - 1 for _, d in pairs)
    numbers = []
    for n, _ in pairs:
        zeros = (n & -n).bit_length() - 1 if n else 0
        powers -= zeros
        numbers.append(n >> zeros)
    while len(numbers) > 1:
        odd = numbers[-1:] if len(numbers) % 2 else []
        numbers = [a * b for a, b in zip(numbers[::2], numbers[1::2])] + odd
    return Fraction(numbers[0] if numbers else 1) / Fraction(2) ** powers


def _products_in_binary64(rows: Tensor, running: bool) -> Tensor:
    """Return the product of each row, [..., n] -> [...], or those up to each element, [..., n]; n > 0."""
    special = ~rows.isfinite() | (rows == 0)
    signs = torch.where(special, rows, rows.sign())
    limits = signs.cumprod(-1) if running else signs.prod(-1)
    sizes = torch.where(special, 1.0, rows.abs()).reshape(-1, rows.shape[-1]).cpu()
    m, e = torch.frexp(sizes)
    m = (m * 2.0**53).long()
    power = m & -m
    e = e.long() - 54 + torch.frexp(power.double())[1]
    values = [
        _rounded_products(row, running, odd, exponents)
        for row, odd, exponents in zip(sizes.tolist(), (m // power).tolist(), e.tolist())
    ]
    value = torch.tensor(values, dtype=torch.float64).reshape(limits.shape).to(rows.device)
    return torch.where(limits.abs() == 1, value * limits, limits)


def _rounded_products(
    row: list[float], running: bool, odd: list[int], exponents: list[int]
) -> list[float]:
    """Return the product of odd * 2**exponent over a row of positive numbers, or those up to each of them.

    A product of up to 160 bits is exact, so all that lie halfway between two numbers are. From a longer one
    the last bits are cut, which loses less than 2^-159 of it each time.
    """
    values = []
    m, e, cuts = 1, 0, 0
    for i, (factor, exponent) in enumerate(zip(odd, exponents), 1):
        m, e = m * factor, e + exponent
        excess = m.bit_length() - _BITS
        if excess > 0:
            m, e, cuts = m >> excess, e + excess, cuts + 1
        if running or i == len(row):
            value = to_double(m, e)
            if cuts and to_double(m + 1 + (m * cuts >> _BITS - 2), e) != value:
                value = nearest(exact_product(row[:i]))
            values.append(value)
    return values


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return m in float64 and e in int64 with x = m 2^e; m is x itself if that is 0, infinite or NaN."""
    return _normalized(x.double())


def _odd_bits(x: Tensor) -> Tensor:
    """Return how many bits the odd part of each number has; 0 for a power of two and for 0: int64."""
    m = (_parts(x)[0] * 2.0**24).nan_to_num(1.0, 1.0, 1.0).long()
    lowest = torch.frexp((m & -m).double())[1].long()  # 1 for an odd number
    return torch.where(m.abs() == m & -m, 0, 25 - lowest)


def _error(mid: Tensor, bits: Tensor, bound: Any) -> Tensor:
    """Return the error of products whose factors have `bits` bits in their odd parts."""
    return torch.where(bits <= 53, 0.0, mid.abs() * bound)


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    m, e = torch.frexp(x)
    ordinary = x.isfinite() & (x != 0)
    return torch.where(ordinary, m, x), torch.where(ordinary, e, 0).long()


def _scaled(m: Tensor, e: Tensor) -> Tensor:
    """Return m 2^e in float64, or another number beyond the range of binary32 where that is."""
    return m * (e.clamp(-1000, 1000) + 1023 << 52).view(torch.float64)
