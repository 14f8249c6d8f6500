from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reproml
from reproml.pipeline import evaluate as module
from reproml.pipeline.evaluate import Score, evaluate
from reproml.pipeline.train import train
from tests import tiny


class Logits(nn.Module):
    """Returns its input, so that the test chooses the logits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@given(
    st.lists(
        st.tuples(st.lists(st.integers(-2, 2), min_size=3, max_size=3), st.integers(0, 2)),
        min_size=1,
        max_size=20,
    )
)
def test_evaluate_equals_plain_loop(rows):
    logits, labels = [row[0] for row in rows], [row[1] for row in rows]
    predictions = [row.index(max(row)) for row in logits]  # the first of the largest ones
    score = evaluate(Logits(), np.array(logits, np.float32), np.array(labels, np.int64))
    assert score.correct == sum(p == y for p, y in zip(predictions, labels))
    assert score.total == len(rows)
    packed = struct.pack(f"<{len(rows)}q", *predictions)
    assert score.predictions_sha256 == hashlib.sha256(packed).hexdigest()


def test_bfloat16_logits_are_those_of_autocast():
    """Rounded to bfloat16, several logits are equal more often: then the first one counts."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 500))
    x = tiny.prepared().test.x
    with reproml.exact(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.from_numpy(x)).tolist()
    y = np.array([row.index(max(row)) for row in logits])
    found, other = (evaluate(model, x, y, "exact", p) for p in ("bfloat16", "float32"))
    assert found.correct == len(y) > other.correct
    assert found.predictions_sha256 == hashlib.sha256(y.astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize("numerics", ["exact", "native"])
def test_batch_size_does_not_change_score(monkeypatch, numerics):
    model = train(tiny.recipe(), tiny.prepared(), "native", steps=3).model
    x, y = tiny.prepared().test
    expected = evaluate(model, x, y, numerics)
    monkeypatch.setattr(module, "_BATCH", 100)
    assert evaluate(model, x, y, numerics) == expected


def test_score_formats_as_sentence():
    assert str(Score(9711, 10000, "")) == "9711 of 10000 correct (97.11 %)"
