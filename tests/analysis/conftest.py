"""What several files here look at; nothing of it may be changed by a test."""

from types import SimpleNamespace

import planted
import pytest
import torch
from threadpoolctl import threadpool_limits

import memgen_lens as mg

SITES = ["resid_post", "post", "z"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small run no faster on two threads, and ten times slower where other work shares the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def learned(trained):
    """The trained model with its pairs and their activations."""
    pairs = mg.collect_pairs(trained.model, trained.task, seed=0)
    acts = mg.record(trained.model, pairs, SITES)
    return SimpleNamespace(model=trained.model, task=trained.task, pairs=pairs, acts=acts)


@pytest.fixture(scope="session")
def known():
    """The planted model with pairs that name their answers, its activations and its scores."""
    model, pairs = planted.build_model(), planted.prompt_pairs()
    acts = mg.record(model, pairs, ["post", "resid_post"])
    return SimpleNamespace(model=model, pairs=pairs, acts=acts, score=mg.attribute(acts, "post", n_permutations=10_000))
