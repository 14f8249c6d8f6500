"""The benchmark's cases can be built and trained; what they take is not for a test."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import bench, sizes, worst
from benchmarks.worst_cases import CASES
from reproml.pipeline import train
from reproml.pipeline.recipe import recipe_names
from tests import tiny


def test_cases_are_every_recipe_and_scripts_that_exist():
    assert set(bench.RECIPES) == set(recipe_names())
    assert all((bench.ROOT / "examples" / f"{name}.py").is_file() for name in bench.EXAMPLES)


@pytest.mark.parametrize("name", bench.EXAMPLES)
def test_an_example_runs_for_its_steps(name, monkeypatch):
    monkeypatch.setitem(bench.EXAMPLES, name, 2)
    assert bench.step_seconds(bench.of_example(name), "native") > 0


def test_curves_change_sizes_that_there_are(monkeypatch):
    assert set(bench.CURVES) == set(bench.SIZES)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    for size in bench.SIZES:
        assert bench.step_seconds(bench.of_size(size, 2), "exact") > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own, of pyparsing
def test_tables_and_plot(tmp_path, capsys):
    run = partial(train.train, tiny.recipe(), tiny.prepared())
    pairs = bench.steps(run)
    assert [len(values) for values in pairs.values()] == [bench.REPEATS] * 2
    commands = {"native": [(1.0, 300.0)], "exact": [(2.0, 400.0)]}
    curves = {"width": {32: pairs, 64: pairs}, "steps": {10: pairs}}
    results = {"commands": {"mnist-mlp": commands}, "steps": {"mnist-mlp": pairs}}
    real = {"MLP": sizes.Result(native=1.0, exact=3.0, floor=2.0)._asdict()}
    bench.show({**results, "curves": curves, "sizes": real})
    out = capsys.readouterr().out
    assert "mnist-mlp" in out and "1.50" in out
    bench.plot(curves, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 0


def test_a_floor_replaces_the_products_of_native():
    """The products of a step of a layer of 3 to 5 numbers: forward, and one for each gradient."""
    layer, x = torch.nn.Linear(3, 5), torch.ones(2, 3, requires_grad=True)
    with sizes.Products() as products:
        layer(x).sum().backward()
    assert products.sizes == {(1, 2, 3, 5): 1, (1, 2, 5, 3): 1, (1, 5, 2, 3): 1}
    convolution, images = torch.nn.Conv2d(3, 8, 3), torch.ones(2, 3, 6, 6)
    with sizes.Products() as products:
        convolution(images).sum().backward()
    assert products.sizes == {(1, 2 * 16, 27, 8): 2}  # forward, and the gradient of the weight


@pytest.mark.parametrize("name", CASES)
def test_the_hardest_inputs_are_searched_for_every_case(name, monkeypatch):
    x = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(worst, "kinds", lambda n: [("normal", x)])
    ratio, kind, seconds = worst.worst(CASES[name], len(x), (None,))
    assert ratio > 0 and kind == "normal" and seconds > 0


def test_kinds_of_numbers_are_as_many_as_asked_for():
    assert {x.numel() for _, x in worst.kinds(1000)} == {1000}
    assert all(x.dtype is torch.float32 and x.isfinite().all() for _, x in worst.kinds(1000))
