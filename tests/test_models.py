from __future__ import annotations

import pytest
import torch
from torch import nn

from reproml.arithmetic import exact
from reproml.digest import digest
from reproml.models import build
from tests import tiny


@pytest.mark.parametrize("hidden", ["[]", "[8]", "[16, 4]"])
def test_mlp_is_flatten_then_linear_layers_with_relu_between(hidden):
    model = build(tiny.recipe(hidden=hidden), (8, 8), 10)
    widths = [64, *[int(n) for n in hidden.strip("[]").split(",") if n], 10]
    linear = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(
        zip(widths, widths[1:])
    )
    kinds = [type(layer) for layer in model.children()]
    assert kinds == [nn.Flatten, *[nn.Linear, nn.ReLU] * (len(widths) - 2), nn.Linear]
    assert model(torch.zeros(3, 8, 8)).shape == (3, 10)


def test_weights_are_pytorchs_own_initialisation():
    with exact():
        torch.manual_seed(7)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
        torch.manual_seed(7)
        built = build(tiny.recipe(), (8, 8), 10)
    assert digest(built) == digest(plain)
