"""Build the network that a recipe names.

To add a network, write a function here, enter it in `_KINDS` at the end of this file, and declare its
settings as a class of `Model` in recipe.py.
"""

from __future__ import annotations

from math import prod
from typing import Any, Callable

from torch import nn

from reproml.errors import ReproError
from reproml.pipeline.recipe import MLP, LeNet5, Recipe


def build_model(recipe: Recipe, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the recipe's network, float32, initialised as PyTorch initialises it.

    Its input has the shape [n, *input_shape], its output (logits) [n, classes]. The weights depend
    on `torch.manual_seed` and on whether `reproml.exact()` is active. Raises ReproError if the network
    cannot take inputs of that shape.
    """
    return _KINDS[type(recipe.model)](recipe.model, input_shape, classes)


def _mlp(model: MLP, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    widths = [prod(input_shape), *model.hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # no ReLU after the last layer: its outputs are logits


def _lenet5(model: LeNet5, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    height, width = ((side // 2 - 4) // 2 for side in input_shape)  # 5 x 5 of MNIST's 28 x 28
    if height < 1 or width < 1:
        shape = " x ".join(map(str, input_shape))
        raise ReproError(f"model lenet5 needs images of 12 x 12 pixels or more, not of {shape}")
    return nn.Sequential(
        nn.Unflatten(1, (1, -1)),  # [n, h, w] to [n, 1, h, w]: one channel
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * height * width, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


# To add a network: a line here, and its class in recipe.Model.
_KINDS: dict[type, Callable[[Any, tuple[int, ...], int], nn.Module]] = {
    MLP: _mlp,
    LeNet5: _lenet5,
}
