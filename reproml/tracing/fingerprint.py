"""Compute 64-bit fingerprints of tensors, which identify their bits much faster than a SHA-256.

The elements' bytes, row-major and little-endian as for `reproml.digest` (with one canonical NaN), are split
into blocks of 1024 words of 32 bits; the last block is padded with zeros. A block's hash is NH (J. Black,
S. Halevi, H. Krawczyk, T. Krovetz, P. Rogaway: UMAC, CRYPTO 1999, section 4.1)

    sum over j < 512 of (word[j] + key[j] mod 2^32) (word[j + 512] + key[j + 512] mod 2^32)   mod 2^64,

and the fingerprint is a polynomial in MULTIPLIER over the hashes of the blocks, with the number of bytes
as its first coefficient. For a random key, two different blocks have the same hash with a probability of
at most 2^-32. The key is public: unlike a SHA-256, a fingerprint does not protect against forgery.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.dispatch import dispatcher
from reproml.digest import canonical_array
from reproml.torch_internals import DisableTorchDispatch

WORDS = 1024
KEY = np.frombuffer(
    b"".join(hashlib.sha256(b"reproml fingerprint %d" % i).digest() for i in range(WORDS // 8)),
    "<u4",
)
_KEY_AT = KEY.ctypes.data
MULTIPLIER = 0x9E37_79B9_7F4A_7C15  # 2^64 over the golden ratio, an odd number


def fingerprints(of: Sequence[Tensor]) -> list[str]:
    """Return a fingerprint of 16 hexadecimal digits for each tensor.

    Tensors may have any layout, device and dtype that `reproml.digest` takes. The shape and the
    dtype do not enter.
    """
    return [f"{fingerprint:016x}" for fingerprint, _ in measure(of, 0)]


def measure(of: Sequence[Tensor], summed: int) -> list[tuple[int, int]]:
    """Return (fingerprint, sum of the words mod 2^64) for each tensor; sums only for the first `summed`.

    The sum does not depend on the order of the samples if a sample has a multiple of 32 bits.
    """
    if kernels.binary32_loops() is None:
        found = [_reference(_elements(x)) for x in of]
        return found[:summed] + [(fingerprint, 0) for fingerprint, _ in found[summed:]]
    kept = [x if _is_hashable_memory(x) else torch.from_numpy(_elements(x)) for x in of]
    table: list[int] = []  # for each: address, number of bytes, whether it is float32
    for x in kept:
        table += x.data_ptr(), x.nbytes, x.dtype is torch.float32
    count = len(kept)
    result = (ctypes.c_uint64 * (2 * count))()
    kernels.library.reproml_fingerprint(
        count, summed, struct.pack(f"{3 * count}q", *table), _KEY_AT, MULTIPLIER, result
    )
    return list(zip(result[::2], result[1::2]))


def first(x: Tensor, count: int) -> list[Any]:
    """Return at most the first `count` elements as Python numbers."""
    if x.dtype is torch.float32 and _is_hashable_memory(x):  # several times faster than an operator
        count = min(count, x.numel())
        return (ctypes.c_float * count).from_address(x.data_ptr())[:] if count else []
    with unseen():
        elements: list[Any] = x.detach().reshape(-1)[:count].tolist()
        return elements


_SAME_BYTES = {torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool}


def _is_hashable_memory(x: Tensor) -> bool:
    """Return whether the memory holds the bytes to hash, except for NaN, which the C loop replaces."""
    return x.dtype in _SAME_BYTES and x.is_cpu and x.layout is torch.strided and x.is_contiguous()


def _elements(x: Tensor) -> NDArray[Any]:
    with unseen():
        return canonical_array(x)


def _reference(array: NDArray[np.generic]) -> tuple[int, int]:
    """Compute fingerprint and sum without the C library."""
    raw = array.tobytes()
    words = np.zeros(-(-len(raw) // (4 * WORDS)) * WORDS, "<u4")
    words.view(np.uint8)[: len(raw)] = np.frombuffer(raw, np.uint8)
    keyed = (words.reshape(-1, WORDS) + KEY).astype(np.uint64)
    result = len(raw)
    for block in (keyed[:, : WORDS // 2] * keyed[:, WORDS // 2 :]).sum(axis=1, dtype=np.uint64):
        result = (result * MULTIPLIER + int(block)) & (1 << 64) - 1
    return result, int(words.sum(dtype=np.uint64))


class unseen:  # noqa: N801 (used like a function; a generator takes twice as long)
    """A context whose operators are not part of the training: neither modes nor exact() see them."""

    def __enter__(self) -> None:
        self._guards = dispatcher.natively(), DisableTorchDispatch()
        for guard in self._guards:
            guard.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(*exc)
