"""Shapes and types of the whole package are checked at run time in every test.

All but the command line, whose defaults hold tyro's placeholder for what the user must give.
"""

import os
from importlib import import_module

from jaxtyping import install_import_hook

with install_import_hook("memgen_lens", "beartype.beartype"):
    for name in ("experiment", "training_dynamics", "viz.report", "many", "comparison", "viz.compare_page"):
        import_module(f"memgen_lens.{name}")

import helpers
import pytest
import torch
from filelock import FileLock

import memgen_lens as mg


@pytest.fixture(scope="session", autouse=True)
def _one_thread_a_worker() -> None:
    """Two workers share two cores; and sums round alike wherever the tests run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small model that both recalls and computes, trained once for all tests: a `TrainingRun` with checkpoints."""
    return helpers.train_small(out=tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """A small model whose recall is in 12 MLP neurons of its last block: a `TrainingRun`, made once for all workers."""
    preset = mg.presets["planted"]
    task = preset.task.but(n_memorized=48, n_heldout=100, n_validation=60)
    config = preset.train.but(
        model=preset.train.model.but(d_mlp=256),
        max_steps=1000,
        batch_size=64,
        memorized_share=0.5,
        generic_steps=250,
        eval_every=200,
        target_generalization=0.97,
        plant=mg.Plant(layer=1, neurons=range(12)),
    )
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "planted"
    with FileLock(f"{out}.lock"):
        return mg.train(task, config, out=out, resume=out.exists(), progress=False)
