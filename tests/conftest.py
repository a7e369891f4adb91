"""Models that several tests share: each is loaded once."""

from __future__ import annotations

import pytest

from interp.models import Model, load


@pytest.fixture(scope="session")
def smol() -> Model:
    """The packaged default model, processed weights."""
    return load("smollm2-135m")


@pytest.fixture(scope="session")
def smol_raw() -> Model:
    """The packaged default model as it was trained."""
    return load("smollm2-135m", weights="raw")
