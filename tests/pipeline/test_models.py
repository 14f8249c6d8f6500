from __future__ import annotations

import pytest
import torch
from torch import nn

from reproml.arithmetic.context import exact
from reproml.digest import digest
from reproml.errors import ReproError
from reproml.pipeline.models import build_model
from reproml.pipeline.recipe import load_recipe
from tests import tiny


@pytest.mark.parametrize("hidden", ["[]", "[8]", "[16, 4]"])
def test_mlp_has_expected_layers(hidden):
    model = build_model(tiny.recipe(hidden=hidden), (8, 8), 10)
    widths = [64, *[int(n) for n in hidden.strip("[]").split(",") if n], 10]
    linear = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(
        zip(widths, widths[1:])
    )
    kinds = [type(layer) for layer in model.children()]
    assert kinds == [nn.Flatten, *[nn.Linear, nn.ReLU] * (len(widths) - 2), nn.Linear]
    assert model(torch.zeros(3, 8, 8)).shape == (3, 10)


def test_lenet5_has_expected_layers():
    model = build_model(load_recipe("mnist-cnn"), (28, 28), 10)
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1]
    assert shapes == [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    after_each = [nn.ReLU, nn.MaxPool2d] * 2 + [nn.ReLU] * 2
    kinds = [type(layer) for layer in model.children()]
    assert [kind for kind in kinds if kind in (nn.ReLU, nn.MaxPool2d)] == after_each
    assert model(torch.zeros(3, 28, 28)).shape == (3, 10)


@pytest.mark.parametrize("shape", [(12, 12), (12, 40), (29, 31)])
def test_lenet5_adapts_to_image_size(shape):
    assert build_model(load_recipe("mnist-cnn"), shape, 7)(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("shape", [(8, 8), (11, 28), (28, 11)])
def test_lenet5_raises_for_small_images(shape):
    with pytest.raises(ReproError, match="12 x 12 .* not of {} x {}$".format(*shape)):
        build_model(load_recipe("mnist-cnn"), shape, 10)


def test_initial_weights_equal_pytorch():
    with exact():
        torch.manual_seed(7)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        torch.manual_seed(7)
        built = build_model(tiny.recipe(), (8, 8), 10)
    assert digest(built) == digest(plain)
