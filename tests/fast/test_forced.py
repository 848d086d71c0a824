"""Runs that set in where something is changed, beside the model's own forward under hooks."""

import helpers
import numpy as np
import pytest
import torch
from transformer_lens.utilities import get_act_name

import memgen_lens as mg
from memgen_lens.analysis.attribution import contrast
from memgen_lens.core.config import ModelConfig
from memgen_lens.models import build_model

SITES = ("resid_pre", "q", "v", "z", "attn_out", "resid_mid", "normalized2", "pre", "post", "mlp_out", "resid_post")
QUICK = {"n_permutations": 0, "progress": False, "split": None}


@pytest.fixture(scope="module", params=["standard", "rotary"])
def world(request):
    """A model with drawn weights, and pairs of one length whose answers have one, two or three tokens."""
    task = helpers.tiny_task(n_heldout=10, n_validation=2)
    shape = ModelConfig(n_layers=3, d_model=16, n_heads=2, d_mlp=24, positional_embedding_type=request.param)
    model = build_model(shape, task.tokenizer, n_ctx=24, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    prompts = [item.prompt for split in ("memorized", "heldout") for item in task.items(split)[:10]]
    how = {"memorized_answers": ["1", "23", "456"] * 3 + ["7"], "rule_answers": ["89", "4", "12"] * 3 + ["8"]}
    return model, mg.PromptPairs.from_strings(prompts[:10], prompts[10:], **how)


def both_roads(monkeypatch, model, pairs, site, **how):
    fast = mg.attribute(model, pairs, site, **how, **QUICK).score
    monkeypatch.setattr(contrast, "is_plain", lambda model: False)
    return fast, mg.attribute(model, pairs, site, **how, **QUICK).score


@pytest.mark.parametrize("site", SITES)
def test_every_site_gives_what_hooks_give(world, site, monkeypatch):
    model, pairs = world
    site = {"normalized2": "blocks.0.ln2.hook_normalized"}.get(site, site)
    fast, hooked = both_roads(monkeypatch, model, pairs, site, method="patching")
    assert np.abs(hooked).max() > 1e-3
    assert np.allclose(fast, hooked, atol=1e-5 * np.abs(hooked).max() + 1e-6)


def test_neurons_of_several_layers_are_changed_together(world, monkeypatch):
    model, pairs = world
    groups = np.random.default_rng(0).integers(-1, 5, size=(3, 24))
    how = {"method": "ablation", "baseline": "mean", "groups": groups}
    fast, hooked = both_roads(monkeypatch, model, pairs, "post", **how)
    assert len(np.unique(hooked)) == 6
    assert np.allclose(fast, hooked, atol=1e-5 * np.abs(hooked).max() + 1e-6)


def test_a_metric_sees_the_same_logits(world, monkeypatch):
    model, pairs = world
    how = {"method": "ablation", "baseline": "zero", "metric": lambda logits, items: logits[:, 3] - logits[:, 5]}
    fast, hooked = both_roads(monkeypatch, model, pairs, "post", **how)
    assert np.allclose(fast, hooked, atol=1e-5 * np.abs(hooked).max() + 1e-6)


def test_a_hook_of_the_users_takes_the_models_own_forward(world, monkeypatch):
    model, pairs = world
    plain = mg.attribute(model, pairs, "post", method="ablation", **QUICK).score
    halve = (get_act_name("resid_pre", 1), lambda activation, hook: activation / 2)
    with model.hooks(fwd_hooks=[halve]):
        halved = mg.attribute(model, pairs, "post", method="ablation", **QUICK).score
    assert np.abs(halved - plain).max() > 1e-2 * np.abs(plain).max()
    assert torch.is_grad_enabled()
