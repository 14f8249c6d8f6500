"""Loading the compiled loops: what is missing is said in one line, and never an error."""

from __future__ import annotations

import ctypes
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import reproml
from reproml.arithmetic.compiler import kernels


def test_they_are_built_here():
    assert kernels.library is not None


@pytest.mark.parametrize("case", ["not built", "not a library", "another version", "lacks a loop"])
def test_one_line_says_what_is_missing(case, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_text("not a library")
    spec = None if case == "not built" else SimpleNamespace(origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    if case in ("another version", "lacks a loop"):
        version = kernels._VERSION - (case == "another version")
        library = SimpleNamespace(reproml_version=lambda: version)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    assert kernels._load_library() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("reproml: same bits, but slower: the compiled loops ")
    assert "\n" not in record.getMessage()


def test_nothing_is_said_where_they_are_switched_off(monkeypatch, caplog):
    monkeypatch.setenv("REPROML_KERNELS", "off")
    assert kernels._load_library() is None and not caplog.records


def test_only_tensors_in_memory_of_the_processor_are_usable():
    x = torch.ones(2, 3)
    assert kernels.usable(x) and not kernels.usable(x, x.t())
    assert not kernels.usable(torch.ones(2, device="meta"))


def test_a_forked_process_with_one_thread_waits_for_nobody():
    """As a worker of a DataLoader: the parent's threads are not there."""

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
