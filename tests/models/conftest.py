"""Tiny models train on one thread."""

import helpers
import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    with helpers.one_thread():
        yield
