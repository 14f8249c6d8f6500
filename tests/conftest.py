"""What all tests share: the MNIST mirror, hypothesis settings, the quick selection, no skips in CI."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

IN_CI = os.environ.get("CI") == "true"

# No deadline: a test must not fail because the machine is slow.
settings.register_profile("reproml", deadline=None, derandomize=IN_CI)
settings.load_profile("reproml")


# Each of these files takes more than three seconds. All others are the quick selection: `pytest -m quick`.
SLOW_FILES = {
    f"{folder}/test_{name}.py"
    for folder, names in {
        "tests": "accumulation cli distributed examples gallery layout matrix package "
        "readme report samples script seeding torch_internals training_state "
        "windows",
        "tests/arithmetic": "autocast context dtypes operator_table patches selftest",
        "tests/arithmetic/numerics": "libm",
        "tests/arithmetic/compiler": "direct evaluate fast pair_program rounding_bounds",
        "tests/arithmetic/dispatch": "deferred dispatcher",
        "tests/arithmetic/distributed": "partial_sums running_sums sharded",
        "tests/arithmetic/operators": "creation ctc elementary grad_scaling grid_sampling "
        "matmul narrow_products normalization optimizer_formulas optimizers "
        "packed_convolution random recurrent small_matrices "
        "special upsampling windows",
        "tests/diff": "compare pairs",
        "tests/evidence": "exports formats inputs provenance registry reproduced signature",
        "tests/pipeline": "data faults preprocess",
        "tests/tracing": "trace",
        "tests/verification": "invariance op_db sandbox summation_order workloads",
    }.items()
    for name in names.split()
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.partition("::")[0] not in SLOW_FILES:
            item.add_marker("quick")


@pytest.fixture(scope="session")
def mnist_mirror() -> Path:
    """The folder with the four MNIST files, from REPROML_MIRROR."""
    mirror = os.environ.get("REPROML_MIRROR")
    if not mirror:
        pytest.skip("needs MNIST: set REPROML_MIRROR to a folder with its four .gz files")
    return Path(mirror)


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """In CI a skipped test is a test that nobody runs. (An expected failure has `wasxfail`.)"""
    if IN_CI and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"no test may skip in CI: {report.longreprtext}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report)
    return report
