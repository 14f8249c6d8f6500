"""Check the digest against a second implementation, written from its docstring alone."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reproml.digest import digest, file_sha256

DTYPES = ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "complex64"]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
)
states = st.dictionaries(st.text(max_size=4), arrays, max_size=3)


def oracle(state: dict[str, np.ndarray]) -> str:
    """Compute the digest element by element with struct, sharing nothing with the code under test."""
    code = {"float16": "e", "float32": "f", "float64": "d", "complex64": "f", "bool": "?"}
    integers = {"uint8": "B", "int16": "h", "int64": "q"}
    nan = {"e": "007e", "f": "0000c07f", "d": "000000000000f87f"}
    data = b"reproml digest 1\n"
    for name in sorted(state):
        value = state[name]
        shape = ", ".join(str(n) for n in value.shape)
        data += f'[{json.dumps(name)}, "{value.dtype.name}", [{shape}]]\n'.encode()
        c = {**code, **integers}[value.dtype.name]
        for element in value.flatten(order="C").tolist():
            pair = isinstance(element, complex)
            for x in (element.real, element.imag) if pair else (element,):
                data += bytes.fromhex(nan[c]) if math.isnan(x) else struct.pack("<" + c, x)
    return hashlib.sha256(data).hexdigest()


@given(states)
def test_digest_equals_documented_layout(state):
    assert digest(state) == oracle(state)


@given(states)
def test_torch_and_numpy_agree(state):
    assert digest({k: torch.from_numpy(v.copy()) for k, v in state.items()}) == digest(state)


@given(states, st.randoms())
def test_order_and_memory_layout_do_not_matter(state, random):
    names = list(state)
    random.shuffle(names)
    turned = {k: state[k].astype(state[k].dtype.newbyteorder(">"), order="F") for k in names}
    strided = {k: np.asarray(np.stack([v, v], -1)[..., 0]) for k, v in state.items()}
    assert digest(turned) == digest(strided) == digest(state)


@given(states.filter(lambda s: any(v.size for v in s.values())), st.data())
def test_flipped_bit_changes_digest(state, data):
    name = data.draw(st.sampled_from([k for k, v in state.items() if v.size]))
    raw = bytearray(state[name].tobytes())
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    value = np.frombuffer(bytes(raw), state[name].dtype).reshape(state[name].shape)
    if state[name].dtype == bool:
        value = np.asarray(~state[name])
    elif state[name].dtype.kind in "fc" and (np.isnan(value) & np.isnan(state[name])).any():
        return  # one NaN became another, which must not change the digest: see below
    assert digest({**state, name: value}) != digest(state)


def test_name_dtype_and_shape_change_digest():
    zeros = np.zeros((2, 3), np.float32)
    variants: list[dict[str, np.ndarray]] = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(3, 2)},
        {"a": zeros.view(np.int32)},
        {"a": -zeros},  # -0 differs from +0
        {"a": zeros[:1], "b": zeros[1:]},
        {},
        {"a": zeros[:0]},
    ]
    assert len({digest(v) for v in variants}) == len(variants)


@pytest.mark.parametrize(
    ("bits", "float_dtype"),
    [
        (np.array([0x7E00, 0xFE01, 0x7C01], np.uint16), "float16"),
        (np.array([0x7FC00000, 0xFFC00000, 0x7F800001], np.uint32), "float32"),
        (np.array([0x7FF8 << 48, 0xFFF8 << 48, (0x7FF0 << 48) + 1], np.uint64), "float64"),
    ],
)
def test_all_nans_have_same_digest(bits, float_dtype):
    assert len({digest({"x": bits[i : i + 1].view(float_dtype)}) for i in range(3)}) == 1


def test_bfloat16_digest_equals_documented_layout():
    bits = np.array([0x3F80, 0x7FC0, 0xFF81], np.uint16).view(np.int16)
    header = b'reproml digest 1\n["x", "bfloat16", [3]]\n'
    expected = hashlib.sha256(header + struct.pack("<3H", 0x3F80, 0x7FC0, 0x7FC0)).hexdigest()
    assert digest({"x": torch.from_numpy(bits).view(torch.bfloat16)}) == expected


def test_module_digest_includes_buffers():
    norm = torch.nn.BatchNorm1d(2)
    before = digest(norm)
    assert before == digest(norm.state_dict())
    norm.get_buffer("running_mean")[0] = 1.0
    assert digest(norm) != before


def test_chunks_do_not_change_digest(monkeypatch):
    x = np.arange(1000, dtype=np.float32)
    x[[6, 7, 8]] = np.nan
    expected = digest({"x": x})
    monkeypatch.setattr(sys.modules["reproml.digest"], "_CHUNK", 7)
    assert digest({"x": x}) == expected


@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {"a": [1.0]},
        {1: np.zeros(1)},
        {"a": np.array(["text"])},
        {"a": np.array([object()])},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(2).to(torch.float8_e5m2)},
    ],
)
def test_unsupported_values_raise(state):
    with pytest.raises(TypeError, match="digest"):
        digest(state)


def test_file_sha256_equals_hashlib(tmp_path):
    (tmp_path / "f").write_bytes(b"x" * (1 << 21))
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"x" * (1 << 21)).hexdigest()
