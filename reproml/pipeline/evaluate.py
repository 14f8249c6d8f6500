"""Count the correct predictions of a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reproml.pipeline.device import CPU
from reproml.pipeline.train import autocast, numerics_mode

_BATCH = 1024  # limits the memory; exact results do not depend on it


@dataclass(frozen=True)
class Score:
    """The number of correct predictions, and the hash of all predictions."""

    correct: int
    total: int
    predictions_sha256: str  # of the predicted classes as little-endian int64, in the data's order

    def __str__(self) -> str:
        return f"{self.correct} of {self.total} correct ({100 * self.correct / self.total:.2f} %)"


def evaluate(
    model: torch.nn.Module,
    x: NDArray[Any],
    y: NDArray[Any],
    numerics: str = "exact",
    precision: str = "float32",
) -> Score:
    """Score `model` on x float32 [n, h, w] and y int64 [n].

    It runs on the model's device; `precision` is that of a recipe. The prediction is the class with the
    largest logit, the first one if several are equal.
    """
    model.eval()
    device = next((p.device for p in model.parameters()), CPU)
    predictions = []
    with numerics_mode(numerics), torch.no_grad(), autocast(precision, device):
        for start in range(0, len(x), _BATCH):
            logits = model(torch.from_numpy(x[start : start + _BATCH]).to(device))
            predictions.append(logits.float().cpu().numpy().argmax(axis=1).astype("<i8"))
    predicted = np.concatenate(predictions)
    sha256 = hashlib.sha256(predicted.tobytes()).hexdigest()
    return Score(int((predicted == y).sum()), len(y), sha256)
