from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.digest import canonical_array
from reproml.errors import ReproError
from reproml.torch_internals import (
    TorchDispatchMode,
    disabled_torch_function_impl,
    make_wrapper_subclass,
)
from reproml.tracing.fingerprint import (
    KEY,
    MULTIPLIER,
    WORDS,
    _reference,
    fingerprints,
    first,
    measure,
    unseen,
)

LENGTHS = st.sampled_from([0, 1, 2, 3, 5, 1000, 1023, 1024, 1025, 2048, 5000])
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = st.sampled_from([*FLOATS, torch.int64, torch.uint8, torch.bool])


def oracle(raw: bytes) -> int:
    """The definition, in Python's integers."""
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    words += [0] * (-len(words) % WORDS)
    key = [int(k) for k in KEY]
    result = len(raw)
    for start in range(0, len(words), WORDS):
        block = [(w + k) % 2**32 for w, k in zip(words[start : start + WORDS], key)]
        nh = sum(a * b for a, b in zip(block[: WORDS // 2], block[WORDS // 2 :]))
        result = (result * MULTIPLIER + nh) % 2**64
    return result


def random(dtype: torch.dtype, length: int, seed: int) -> torch.Tensor:
    values = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    return (values - 100).to(dtype)


@given(DTYPES, LENGTHS, st.integers(0, 9))
def test_c_python_and_definition_agree(dtype, length, seed):
    x = random(dtype, length, seed)
    found, unsummed = measure([x, x], 1)
    assert found == _reference(canonical_array(x)) and unsummed == (found[0], 0)
    assert found[0] == oracle(canonical_array(x).tobytes())


@given(st.integers(0, 5000 * 32 - 1))
def test_flipped_bit_changes_fingerprint(bit):
    x = torch.zeros(5000, dtype=torch.int32)
    raw = x.numpy().view(np.uint8)
    before = fingerprints([x])
    raw[bit // 8] ^= 1 << bit % 8
    assert fingerprints([x]) != before


@given(st.data())
def test_pairs_of_changed_signs_are_noticed(data):
    """What a sum of products modulo 2^64 would miss: high bits only, in pairs."""
    length = data.draw(st.integers(2, 3000))
    x = torch.ones(length)
    for at in data.draw(st.lists(st.integers(0, length - 1), min_size=1, unique=True)):
        x[at] = -1.0
    assert fingerprints([x]) != fingerprints([torch.ones(length)])
    assert fingerprints([-torch.ones(length)]) != fingerprints([torch.ones(length)])


def test_nans_are_equal_and_zeros_differ():
    bits = torch.tensor([0x7FC00000, 0x7F800001, -1, -(2**31)], dtype=torch.int32)
    nans = fingerprints([x.view(torch.float32) for x in bits[:3].split(1)])
    assert len(set(nans)) == 1
    assert fingerprints([torch.tensor([0.0])]) != fingerprints([torch.tensor([-0.0])])
    assert fingerprints([bits[:1]]) != fingerprints([bits[1:2]])  # of integers all bits count


def test_layout_does_not_enter():
    x = torch.arange(12.0).view(3, 4)
    assert fingerprints([x.t()]) == fingerprints([x.t().contiguous()]) != fingerprints([x])


@given(st.permutations(range(6)))
def test_sum_ignores_order_of_samples(order):
    x = torch.randn(6, 5)
    assert measure([x], 1)[0][1] == measure([x[order]], 1)[0][1]


@pytest.mark.parametrize("dtype", FLOATS)
def test_first_elements_are_numbers(dtype):
    x = torch.tensor([[1 / 3, 2.0], [float("inf"), -0.0]], dtype=dtype).t()
    assert [repr(v) for v in first(x, 3)] == [repr(v) for v in x.reshape(-1).tolist()[:3]]
    assert first(x, 0) == first(x[:0], 3) == []


class Wrapper(torch.Tensor):
    """A tensor that has its numbers in another one, and no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        options: Any = {"dtype": inner.dtype, "strides": inner.stride()}
        made: Wrapper = make_wrapper_subclass(cls, inner.shape, **options)
        made.held = inner
        return made

    held: torch.Tensor
    __torch_function__: Any = disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.copy_.default):
            raise NotImplementedError(f"{func} is not implemented")
        result = func(*[x.held if isinstance(x, Wrapper) else x for x in args])
        return Wrapper(result) if isinstance(args[0], Wrapper) else result


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("library", [kernels.library, None])
def test_numbers_of_wrapped_tensors_are_read(monkeypatch, dtype, library):
    monkeypatch.setattr(kernels, "library", library)
    x = random(dtype, 1500, 1).view(3, 500).t()
    none = x[:0]
    wrapped, empty = Wrapper(x), Wrapper(none)
    assert wrapped.data_ptr() == 0
    with reproml.exact(), Refuse():
        assert fingerprints([wrapped, empty]) == fingerprints([x, none])
        assert first(wrapped, 8) == first(x, 8)


def test_unreadable_tensor_is_refused():
    class Opaque(Wrapper):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
            raise NotImplementedError(f"{func} is not implemented")

    for read in (lambda x: first(x, 1), lambda x: measure([x], 0)):
        with pytest.raises(ReproError, match="cannot read the numbers of a Opaque"):
            read(Opaque(torch.ones(3)))


class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(func)


def test_modes_do_not_see_unseen_work():
    x = torch.ones(3)
    with reproml.exact(), Refuse():
        with unseen():
            torch.special.bessel_y0(x)  # has no exact definition
        with pytest.raises(AssertionError):
            torch.special.bessel_y0(x)
