"""The benchmark's cases can be built and trained; what they take is not for a test."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks import bench
from reproml.pipeline import train
from reproml.pipeline.recipe import known
from tests import tiny


def test_cases_are_every_recipe_and_scripts_that_exist():
    assert set(bench.RECIPES) == set(known())
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
    bench.show(
        {"commands": {"mnist-mlp": commands}, "steps": {"mnist-mlp": pairs}, "curves": curves}
    )
    assert "mnist-mlp" in capsys.readouterr().out
    bench.plot(curves, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 0
