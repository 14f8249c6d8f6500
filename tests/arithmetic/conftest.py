"""A fixture that several files of tests share."""

from __future__ import annotations

import pytest

from reproml.arithmetic.compiler import kernels


@pytest.fixture(params=["compiled", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test twice: with the C library, and on the reference path."""
    if request.param == "reference":
        monkeypatch.setattr(kernels, "library", None)
    elif kernels.library is None:
        pytest.skip("the kernels are not built")
