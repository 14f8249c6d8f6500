"""Tests of arithmetic/layouts.py: the strides of a result are PyTorch's own, on every path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_map

import reproml
from reproml.arithmetic import layouts, operator_table
from reproml.arithmetic.compiler import kernels
from tests.arithmetic.test_operator_table import CASES
from verification.oracle import same_bits

LAYOUTS = ["contiguous", "transposed", "inner", "sliced", "expanded", "channels_last"]
NAMES = sorted(name for name in CASES if not name.endswith("_"))

# The other outputs of these are for their backward operators alone, and differ from PyTorch's.
FIRST_OUTPUT = ("_embedding_bag", "_embedding_bag_forward_only", "_weight_norm_interface")

# Random operators, which have no case there.
DRAWN = {
    "rand_like": lambda x: (x,),
    "randn_like": lambda x: (x,),
    "bernoulli": lambda x: (x.sigmoid(),),
    "multinomial": lambda x: (x.abs().reshape(-1, x.shape[-1]), 2),
    "native_dropout": lambda x: (x, 0.5, True),
}


@pytest.fixture(autouse=True)
def as_within_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Natively, oneDNN lays some results out otherwise."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)


def laid_out(x: Any, layout: str) -> Any:
    """Return the tensor in another layout: with the same numbers, but for "expanded"."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "inner" and x.dim() > 2:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded" and x.dim() > 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def ordinary(x: Any) -> Any:
    """Replace numbers that are hard to round, which take longer, by others."""
    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
    return torch.rand(x.shape) / 2 + 0.25 if floating else x


def strides(result: Any) -> list[Any]:
    found = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
    return [t.stride() if t.numel() else () for t in found]


def on_both_paths(monkeypatch: Any, call: Any) -> Iterator[Any]:
    library = kernels.library
    for path in (library, None):
        monkeypatch.setattr(kernels, "library", path)
        torch.default_generator.manual_seed(3)  # torch.manual_seed takes a millisecond
        with reproml.exact():
            yield call()
    monkeypatch.setattr(kernels, "library", library)


def check(monkeypatch: Any, name: str, arguments: Any, options: dict[str, Any]) -> None:
    def call() -> Any:
        return getattr(torch.ops.aten, name)(*arguments, **options)

    compiled, reference = on_both_paths(monkeypatch, call)
    assert strides(compiled) == strides(reference)
    for x, y in zip(tree_flatten(compiled)[0], tree_flatten(reference)[0]):
        assert not isinstance(x, torch.Tensor) or same_bits(x, y)
    weight = arguments[2 if "backward" in name else 1] if "convolution" in name else None
    if weight is not None and weight.dim() == 3 and not weight.is_contiguous():
        return  # PyTorch's memory format of a signal's weight depends on the kernel
    if name == "log_sigmoid_forward":
        compiled = compiled[0], torch.empty_like(compiled[0])  # the buffer is not used
    try:
        native = call()
    except RuntimeError:  # some kernels take contiguous operands only
        return
    if name in FIRST_OUTPUT:
        compiled, native = compiled[:1], native[:1]
    if name == "convolution_backward":  # PyTorch's 1 x 1 weights have strides by the kernel
        compiled, native = map(without_single_axes, (compiled, native))
    assert strides(compiled) == strides(native)


def without_single_axes(tensors: Any) -> Any:
    return [None if x is None else x.squeeze() for x in tensors]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(data=st.data())
def test_strides_are_those_of_pytorch(name, data, monkeypatch):
    for case in CASES[name]:
        drawn = tree_map(ordinary, data.draw(case.draw))
        count = sum(
            isinstance(x, torch.Tensor) and x.is_floating_point() for x in tree_flatten(drawn)[0]
        )
        for layout in LAYOUTS:
            for only in (None, *range(count if count > 1 else 0)):
                at = iter(range(count))

                def arrange(x: Any, layout: str = layout, only: Any = only, at: Any = at) -> Any:
                    floating = isinstance(x, torch.Tensor) and x.is_floating_point()
                    chosen = floating and next(at) == only
                    return laid_out(x, layout if only is None or chosen else "contiguous")

                check(monkeypatch, name, tree_map(arrange, drawn), case.options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(DRAWN))
def test_strides_of_drawn_numbers(name, layout, monkeypatch):
    x = laid_out(torch.randn(2, 3, 4, 5), layout)
    arguments = DRAWN[name](x)
    compiled, reference = on_both_paths(
        monkeypatch, lambda: getattr(torch.ops.aten, name)(*arguments)
    )
    assert (
        strides(compiled)
        == strides(reference)
        == strides(getattr(torch.ops.aten, name)(*arguments))
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_mask_does_not_depend_on_layout(layout, monkeypatch):
    x = torch.rand(3, 4, 5, 6) + 1
    for value in (x, x[0], x[0, 0]):
        value = laid_out(value, layout)
        expected, *_ = dropped(monkeypatch, value.contiguous())
        assert all(same_bits(found, expected) for found in dropped(monkeypatch, value))


def dropped(monkeypatch: Any, x: torch.Tensor) -> list[Any]:
    return list(on_both_paths(monkeypatch, lambda: torch.dropout(x, 0.5, True)))


def test_dropout_behind_results_that_were_laid_out_by_path(monkeypatch):
    """In all of these the mask followed a layout that the path, or even the value, determined."""
    torch.manual_seed(0)
    q, k, x = torch.randn(2, 5, 3, 8), torch.randn(2, 6, 3, 8), torch.randn(7, 5)

    def attention() -> torch.Tensor:
        scores = torch.einsum("bqhd,bkhd->bqkh", q, k)
        return torch.dropout(scores.softmax(2), 0.5, True)

    for call in (attention, lambda: torch.dropout(x.t().softmax(0), 0.5, True)):
        compiled, reference = on_both_paths(monkeypatch, call)
        assert same_bits(compiled, reference)
        assert strides(compiled) == strides(reference)
    normal = torch.randn(64, 40).t()
    for value in (normal, normal.round()):
        for found in on_both_paths(
            monkeypatch, lambda value=value: torch.nn.functional.layer_norm(value, (64,))
        ):
            assert found.stride() == (64, 1)


SINGLE: dict[str, Any] = {
    "exp": torch.exp,
    "add": lambda x: x + x[:1],
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "batch_norm": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
    "group_norm": lambda x: torch.nn.functional.group_norm(x, 1),
    "avg_pool": lambda x: torch.nn.functional.avg_pool2d(x, 1),
    "adaptive_pool": lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 1),
    "conv": lambda x: torch.nn.functional.conv2d(x, torch.ones(5, x.shape[1], 1, 1)),
    "dropout": lambda x: torch.dropout(x, 0.5, True),
}
AFTER: dict[str, Any] = {
    "pad": lambda x: torch.nn.functional.pad(x, (0, 1)),
    "max_pool": lambda x: torch.nn.functional.max_pool2d(x, 1),
    "upsample": lambda x: torch.nn.functional.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 1, 4, 4), (2, 3, 1, 1), (1, 1, 1, 5)], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_axes_of_one_element_have_defined_strides(name, shape, memory_format, monkeypatch):
    """PyTorch derives the memory format of later results from them."""
    for value in (torch.rand(shape), torch.full(shape, torch.nan)):
        x = value.contiguous(memory_format=memory_format)
        for after in AFTER.values():
            compiled, reference = on_both_paths(
                monkeypatch, lambda x=x, after=after: (y := SINGLE[name](x), after(y))
            )
            assert strides(compiled) == strides(reference)
            y = SINGLE[name](x)
            assert strides(compiled) == strides((y, after(y)))


def test_layout_lists_name_operators():
    listed = {*layouts.ELEMENTWISE, *layouts.LIKE_FIRST, *layouts.MEMORY_FORMAT}
    assert listed <= set(operator_table.EXACT)
    assert not layouts.ELEMENTWISE & layouts.LIKE_FIRST
    assert not (layouts.ELEMENTWISE | layouts.LIKE_FIRST) & set(layouts.MEMORY_FORMAT)


def test_other_layout_is_noticed(monkeypatch):
    """The comparison with PyTorch fails for a rule that is not PyTorch's."""
    monkeypatch.setattr(layouts, "ELEMENTWISE", frozenset())
    with pytest.raises(AssertionError):
        check(monkeypatch, "exp", (torch.randn(3, 4).t(),), {})
