"""The networks a recipe can name: a new one is a function here and its line in `_KINDS`."""

from __future__ import annotations

from math import prod
from typing import Any, Callable

from torch import nn

from reproml.recipe import MLP, Recipe


def build(recipe: Recipe, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Return the recipe's network, float32, initialised as PyTorch initialises it.

    Its input has the shape [n, *input_shape], its output (logits) [n, classes]. The weights depend
    on `torch.manual_seed` and on whether `reproml.exact()` is on.
    """
    return _KINDS[type(recipe.model)](recipe.model, input_shape, classes)


def _mlp(model: MLP, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    widths = [prod(input_shape), *model.hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])  # logits: no ReLU after the last


_KINDS: dict[type, Callable[[Any, tuple[int, ...], int], nn.Module]] = {MLP: _mlp}
