"""Count the different outputs that one sample gets in random batches, natively and under exact().

    python -m verification.invariance [--batches 1000]

A sample is put into random batches, and its output, taken out of each, is compared bit by bit. What is
random:

- "batch size": the number of samples, 1 to 64; the sample is the first one;
- "position": where in a batch of 64 it is; its neighbours stay the same;
- "neighbours": the other samples of a batch of 64; the sample is the first one;
- "padding" (transformer): how many tokens of padding, 0 to 32, precede or follow it, masked;
- "all": all of these together.

The models have random weights and are in evaluation mode. The exit status is 1 if an exact output is not
unique, or if the native outputs of a model are the same in all batches.
"""

from __future__ import annotations

import argparse
import sys
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

import reproml

BATCH, PADDING, TOKENS, VOCABULARY = 64, 32, 5, 100
VARIED = {
    "batch size": {"size"},
    "position": {"position"},
    "neighbours": {"neighbours"},
    "padding": {"padding"},
    "all": {"size", "position", "neighbours", "padding"},
}


class Transformer(nn.Module):
    """Two layers of an encoder. A negative token is padding; positions are counted without it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, 96), nn.Embedding(TOKENS, 96)
        layer = nn.TransformerEncoderLayer(96, 3, 384, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(96, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens < 0
        position = ((~padding).cumsum(1) - 1).clamp(0, TOKENS - 1)
        x = self.token(tokens.clamp(0)) + self.position(position)
        result: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding))
        return result


class Case(NamedTuple):
    model: nn.Module
    draw: Callable[[int], Tensor]  # random samples
    padded: bool = False  # whether samples may have padding


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
    )
    cnn = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return {
        "MLP": Case(mlp.eval(), lambda n: torch.randn(n, 784)),
        "CNN": Case(cnn.eval(), lambda n: torch.randn(n, 3, 16, 16)),
        "transformer": Case(
            Transformer().eval(), lambda n: torch.randint(VOCABULARY, (n, TOKENS)), padded=True
        ),
    }


@torch.no_grad()
def different_outputs(case: Case, varied: set[str], batches: int, seed: int = 0) -> int:
    """Return the number of different outputs of one sample in random batches."""
    torch.manual_seed(seed)
    sample, others = case.draw(1), case.draw(BATCH - 1)
    outputs = set()
    for _ in range(batches):
        size = draw(1, BATCH) if "size" in varied else BATCH
        if "neighbours" in varied:
            others = case.draw(BATCH - 1)
        at = draw(0, size - 1) if "position" in varied else 0
        batch = torch.cat([others[:at], sample, others[at : size - 1]])
        before = after = 0
        if "padding" in varied and case.padded:
            before, after = draw(0, PADDING // 2), draw(0, PADDING // 2)
            batch = torch.nn.functional.pad(batch, (before, after), value=-1)
        output = case.model(batch)[at]
        if case.padded:
            output = output[before : before + TOKENS]
        outputs.add(output.contiguous().numpy().tobytes())
    return len(outputs)


def draw(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, default=1000)
    batches = parser.parse_args().batches
    print(f"different outputs of one sample in {batches} batches, PyTorch {torch.__version__}")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"{'model':12} {'varied':12} {'native':>8} {'exact':>8}")
    failed = False
    for name, case in cases().items():
        for varied, names in VARIED.items():
            if varied == "padding" and not case.padded:
                continue
            native = different_outputs(case, names, batches)
            with reproml.exact():
                exact = different_outputs(case, names, batches)
            print(f"{name:12} {varied:12} {native:8} {exact:8}", flush=True)
            failed = failed or exact != 1 or (varied == "all" and native == 1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
