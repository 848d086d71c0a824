"""One thread, and small models of TransformerLens to compare with."""

import helpers
import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    with helpers.one_thread():
        yield


@pytest.fixture(scope="session")
def hooked_transformer():
    """Makes a small model; see `helpers.hooked_transformer`."""
    return helpers.hooked_transformer
