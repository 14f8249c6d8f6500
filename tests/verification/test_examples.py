"""Tests of verification/examples.py, which runs scripts one after the other in a process."""

from __future__ import annotations

import torch

from verification import examples


def test_script_does_not_take_the_default_dtype_of_the_one_before():
    torch.set_default_dtype(torch.float64)
    try:
        assert examples.digests("mlp") == examples.EXPECTED["mlp"]
    finally:
        torch.set_default_dtype(torch.float32)


def test_unknown_example_is_refused(capsys):
    assert examples.main(["no_such_example"]) == 2
    assert "has no no_such_example" in capsys.readouterr().err
