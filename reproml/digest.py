"""Compute one SHA-256 of a set of named arrays: a model, a state dict, a mapping of arrays.

    reproml.digest(model)                # parameters and buffers
    reproml.digest({"x": numpy_array})   # a torch tensor of the same bits has the same digest

The hashed bytes, so that anyone can recompute the digest:

1. the line ``reproml digest 1\\n``;
2. for each array, in the sorted order of the names' code points: the line
   ``["NAME", "DTYPE", [SHAPE]]\\n`` as ``json.dumps`` writes it, then the elements in row-major
   order, little-endian. NaN is written as the positive quiet NaN with an empty payload.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# dtype: (unsigned integer of the same width, bits of infinity, bits of the canonical NaN)
_FLOATS = {
    "float16": ("<u2", 0x7C00, 0x7E00),
    "bfloat16": ("<u2", 0x7F80, 0x7FC0),
    "float32": ("<u4", 0x7F80_0000, 0x7FC0_0000),
    "float64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF8_0000_0000_0000),
}
_FLOATS["complex64"] = _FLOATS["float32"]  # pairs: real, imaginary
_FLOATS["complex128"] = _FLOATS["float64"]
_INTEGERS = {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_CHUNK = 1 << 20  # elements at a time: a large array needs no second copy


def digest(state: torch.nn.Module | Mapping[str, NDArray[Any] | torch.Tensor]) -> str:
    """Return the hexadecimal SHA-256 of a module, a state dict or a mapping of arrays.

    Values are numpy arrays or torch tensors of any shape, layout and device; bool, integers,
    float16, bfloat16, float32, float64, complex64 or complex128. Raises TypeError for anything
    else, so that nothing is left out of the hash silently.
    """
    arrays: Mapping[str, Any] = state if isinstance(state, Mapping) else _state_dict(state)
    for name in arrays:
        if not isinstance(name, str):
            raise TypeError(f"a digest needs names of type str, not {name!r}")
    sha = hashlib.sha256(b"reproml digest 1\n")
    for name in sorted(arrays):
        dtype, shape, flat = _flatten(name, arrays[name])
        sha.update(json.dumps([name, dtype, shape]).encode() + b"\n")
        for start in range(0, flat.size, _CHUNK):
            sha.update(_canonical(dtype, flat[start : start + _CHUNK]).data)
    return sha.hexdigest()


def canonical_array(value: Any) -> NDArray[Any]:
    """Return the elements that `digest` hashes of one array: one-dimensional, floats as their bits.

    Raises TypeError for a value that `digest` does not accept.
    """
    dtype, _, flat = _flatten("a tensor", value)
    return _canonical(dtype, flat)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as ``sha256sum`` prints it. Raises OSError."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            sha.update(block)
    return sha.hexdigest()


def _state_dict(module: Any) -> Mapping[str, Any]:
    if not hasattr(module, "state_dict"):
        raise TypeError(f"cannot digest a {type(module).__name__}: give a module or a mapping")
    state: Mapping[str, Any] = module.state_dict()
    return state


def _flatten(name: str, value: Any) -> tuple[str, list[int], NDArray[Any]]:
    """Return dtype, shape, and the elements in row-major, little-endian order (floats as bits)."""
    import numpy as np

    if isinstance(value, np.ndarray):
        dtype = value.dtype.name
    else:
        dtype, value = _from_torch(name, value)
    if dtype not in _FLOATS and dtype not in _INTEGERS:
        raise TypeError(f"cannot digest {name!r}: dtype {dtype}")
    shape = list(value.shape)
    flat = value.astype(value.dtype.newbyteorder("<"), order="C", copy=False).ravel()
    return dtype, shape, flat.view(_FLOATS[dtype][0]) if dtype in _FLOATS else flat


def _from_torch(name: str, value: Any) -> tuple[str, NDArray[Any]]:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise TypeError(f"cannot digest {name!r}: {type(value).__name__} is not a dense array")
    tensor = value.detach().cpu().resolve_conj().resolve_neg()
    dtype = str(tensor.dtype)[len("torch.") :]
    if dtype == "bfloat16":  # NumPy has no bfloat16: take the bits
        return dtype, tensor.view(torch.int16).numpy()
    try:
        return dtype, tensor.numpy()
    except TypeError:
        raise TypeError(f"cannot digest {name!r}: dtype {dtype}") from None


def _canonical(dtype: str, part: NDArray[Any]) -> NDArray[Any]:
    if dtype not in _FLOATS:
        return part
    import numpy as np

    unsigned, infinity, canonical = _FLOATS[dtype]
    magnitude = part & np.array((1 << (8 * part.itemsize - 1)) - 1, unsigned)
    nan = magnitude > np.array(infinity, unsigned)
    return np.where(nan, np.array(canonical, unsigned), part) if nan.any() else part
