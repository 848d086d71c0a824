"""Causal methods on pretrained models of three kinds, and how far their halves agree, against raw hooks."""

import bridges
import numpy as np
import pytest
from raw_hooks import N_PAIRS, N_STEPS, by_raw_hooks
from scipy.stats import spearmanr

import memgen_lens as mg
from memgen_lens.analysis.attribution.methods import CAUSAL, ON_A_PATH
from memgen_lens.analysis.comparison.halves import _Halvings

WAYS = [(method, None) for method in CAUSAL if method != "ablation"] + [("ablation", "zero"), ("ablation", "mean")]
"""Every causal method, and what stands for ablated neurons."""


@pytest.fixture(scope="module", params=bridges.KINDS)
def raw(request):
    return by_raw_hooks(request.param)


def how_to(method, baseline):
    return {"method": method, "baseline": baseline, "n_steps": N_STEPS if method in ON_A_PATH else None}


@pytest.mark.parametrize(("method", "baseline"), WAYS)
def test_scores_are_means_of_effects_by_raw_hooks(raw, method, baseline):
    quick = {"split": None, "n_permutations": 0, "progress": False}
    found = mg.attribute(raw.model, raw.pairs, "post", **how_to(method, baseline), **quick).score
    expected = raw.effects[baseline or method].mean(0)
    assert np.allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("method", "baseline"), [("patching", None), ("integrated_gradients", None)])
def test_halves_are_scored_by_the_effects_of_their_pairs(raw, method, baseline):
    how = {"n_splits": 20, "top_fraction": 0.1, "seed": 3, "progress": False}
    found = mg.consistency.split_half(raw.model, raw.pairs, "post", **how_to(method, baseline), **how)
    effects = raw.effects[baseline or method].reshape(N_PAIRS, -1)
    halvings, count = _Halvings.drawn(N_PAIRS, 20, 3), round(0.1 * effects.shape[1])
    assert (found.n_pairs, found.n_items, found.n_top) == (N_PAIRS, N_PAIRS, count)
    signs = {"": np.ones_like(halvings.swaps), "null_": halvings.swaps}
    for prefix, swaps in signs.items():
        for split, first in enumerate(halvings.first):
            halves = [(swaps[split][:, None] * effects)[half].mean(0) for half in (first, ~first)]
            tops = [set(np.argsort(-half)[:count].tolist()) for half in halves]
            rank, share = spearmanr(*halves).statistic, len(tops[0] & tops[1]) / count
            # Rounding may change the places of neurons whose scores are all but alike.
            assert getattr(found, f"{prefix}spearman")[split] == pytest.approx(rank, abs=2e-3)
            assert abs(getattr(found, f"{prefix}overlap")[split] - share) <= 1.01 / count


@pytest.mark.parametrize("site", ["post", "resid_post"])
def test_twenty_points_hold_what_zeroing_a_layer_loses_also_near_zero(raw, site):
    """Behind a norm (in Gemma, the MLP's own) nearly all is lost near zero: points spread evenly miss a third of it."""
    quick = {"split": None, "n_permutations": 0, "progress": False}
    found = mg.attribute(raw.model, raw.pairs, site, method="integrated_gradients", **quick).score
    layers = np.repeat(np.arange(len(found))[:, None], found.shape[1], axis=1)
    whole = mg.attribute(raw.model, raw.pairs, site, method="ablation", baseline="zero", groups=layers, **quick).score
    assert np.allclose(found.sum(1), whole[:, 0], atol=3e-2 * np.abs(whole).max())
