"""Load and call the compiled loops; a missing or broken library is one warning and never an error."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reproml
from reproml.arithmetic.compiler import kernels
from reproml.arithmetic.numerics import formats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_library_is_built(dtype):
    with formats.rounding_to(dtype):
        assert kernels.loops() is not None and kernels.loops().reproml_product
        assert (kernels.loops() is kernels.library) == (dtype is torch.float32)
        assert (kernels.binary32_loops() is None) == (dtype is not torch.float32)


@pytest.mark.parametrize("name", sorted(kernels._BINARY32_ONLY))
def test_other_libraries_lack_what_binary32_alone_needs(name):
    assert name in kernels._SIGNATURES and hasattr(kernels.library, name)
    with formats.rounding_to(torch.bfloat16):
        assert not hasattr(kernels.loops(), name)


@pytest.mark.parametrize("case", ["not built", "not a library", "another version", "lacks a loop"])
def test_broken_library_logs_one_warning(case, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_text("not a library")
    spec = None if case == "not built" else SimpleNamespace(origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    if case in ("another version", "lacks a loop"):
        version = kernels._VERSION - (case == "another version")
        library = SimpleNamespace(reproml_version=lambda: version)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    assert kernels._load_library("_kernels") is None
    (record,) = caplog.records
    assert record.getMessage().startswith("reproml: same bits, but slower: the compiled loops ")
    assert "\n" not in record.getMessage()


def test_warning_on_windows_advises_no_compiler(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.platform", "win32")
    assert kernels._load_library("_kernels") is None
    assert caplog.messages == [
        "reproml: same bits, but slower: the compiled loops are not built for Windows"
    ]


def test_loops_for_several_instruction_sets_have_names_of_their_own():
    """Clang makes a global symbol of each, also of those that are static."""
    sources = Path(kernels.__file__).parents[1] / "csrc"
    text = "\n".join(path.read_text() for path in sorted(sources.glob("*.c")))
    names = re.findall(r"^VECTORISED static [^(;]*?(\w+)\(", text, re.MULTILINE)
    assert len(names) > 30 and sorted(names) == sorted(set(names))


def test_switched_off_library_logs_nothing(monkeypatch, caplog):
    monkeypatch.setenv("REPROML_KERNELS", "off")
    assert kernels._load_library("_kernels") is None and not caplog.records


def test_only_contiguous_cpu_tensors_are_usable():
    x = torch.ones(2, 3)
    assert kernels.usable(x) and not kernels.usable(x, x.t())
    assert not kernels.usable(torch.ones(2, device="meta"))


def test_forked_process_uses_one_thread():
    """A worker of a DataLoader is forked without the threads of its parent."""

    class Products(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return torch.full((300, 300), i + 1.0) @ torch.ones(300, 300)

    with reproml.exact():
        first = Products()[0]  # starts the parent's threads
        loader = torch.utils.data.DataLoader(Products(), num_workers=1, timeout=60)
        found = [x[0] for x in loader]
    assert torch.equal(found[0], first) and torch.equal(found[1], 2 * first)


@pytest.mark.parametrize("count", [-1, 0, 3, 256, 257])
def test_run_kernel_reports_failures(count):
    def kernel(first, failed, capacity):
        for i in range(min(max(count, 0), capacity)):
            failed[i] = first + i
        return count

    complete, failed = kernels.run_kernel(kernel, 10)
    assert complete == (0 <= count <= 256)
    if complete and count:
        assert failed is not None and torch.equal(failed, torch.arange(10, 10 + count))
    else:
        assert failed is None
