"""Shapes and types of the whole package are checked at run time in every test.

All but the command line, whose defaults hold tyro's placeholder for what the user must give.
"""

from importlib import import_module

from jaxtyping import install_import_hook

with install_import_hook("memgen_lens", "beartype.beartype"):
    for name in ("experiment", "training_dynamics", "viz.report"):
        import_module(f"memgen_lens.{name}")

import helpers
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small model that both recalls and computes, trained once for all tests: a `TrainingRun` with checkpoints."""
    return helpers.train_small(out=tmp_path_factory.mktemp("trained") / "run")
