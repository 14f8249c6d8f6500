"""What PyTorch takes apart is taken apart as it was when the definitions were written."""

from __future__ import annotations

import torch

from verification import decompositions, op_db


def test_pytorch_takes_operators_apart_as_recorded():
    found = decompositions.record()
    assert decompositions.changes(found) == []
    assert len(found) >= 220


def test_change_is_found(monkeypatch):
    """A version that would write softplus as log(1 + exp(x)) is noticed."""
    recorded = {"nn.functional.softplus": ["softplus | softplus_backward"]}
    (op,) = op_db.operators(["nn.functional.softplus"])
    assert decompositions.decompositions_of(op) == recorded[op.name]

    def softplus(x, *args, **kwargs):
        return torch.log(torch.exp(x) + 1)

    monkeypatch.setattr(op, "op", softplus)
    found = {op.name: decompositions.decompositions_of(op)}
    assert found == {op.name: ["exp add log | div mul"]}
    assert len(decompositions.changes(found)) == 1
