"""Scores of several sites from one pass are those of each site alone, by every method that keeps no activation."""

import numpy as np
import planted
import pytest

import memgen_lens as mg
from memgen_lens.analysis.attribution import interventions
from memgen_lens.analysis.attribution.methods import CAUSAL, FROM_MOMENTS
from memgen_lens.core.errors import PairsError, SettingsError

SITES = ["resid_mid", "post"]
HOW = {"n_permutations": 1000, "n_resamples": 100, "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def known():
    return planted.build_model(), planted.prompt_pairs(20)


def same(ours, alone):
    assert (ours.method, ours.n_pairs, ours.n_items) == (alone.method, alone.n_pairs, alone.n_items)
    for name in ("score", "nmd", "rho", "p", "p_family", "q", "ci95"):
        np.testing.assert_allclose(getattr(ours, name), getattr(alone, name), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", [*FROM_MOMENTS, *CAUSAL])
def test_each_site_has_the_scores_tests_and_intervals_that_it_has_alone(known, method):
    model, pairs = known
    found = mg.attribute_streaming(model, pairs, SITES, method=method, **HOW)
    assert list(found) == SITES
    for site in SITES:
        if method in CAUSAL:
            same(found[site], mg.attribute(model, pairs, site, method=method, **HOW))
        else:
            same(found[site], mg.attribute(mg.record(model, pairs, [site]), site, method=method, **HOW))


def test_attribution_patching_takes_one_backward_pass_a_batch_for_all_sites(known, monkeypatch):
    model, pairs = known
    passes = []
    grad = interventions._grad
    monkeypatch.setattr(interventions, "_grad", lambda *given: passes.append(len(given[1])) or grad(*given))
    mg.attribute_streaming(model, pairs, SITES, method="attribution_patching", split=None, n_permutations=0)
    mg.attribute(model, pairs, "post", method="attribution_patching", split=None, n_permutations=0)
    both, one = passes[: len(passes) // 2], passes[len(passes) // 2 :]
    assert len(both) == len(one) > 0
    assert both == [2 * n for n in one]


def test_a_metric_and_what_stands_for_ablated_neurons_go_through(known):
    model, pairs = known

    def first(logits, items):
        return logits[:, 0]

    for how in ({"metric": first}, {"baseline": "zero"}, {"baseline": "resample"}):
        how |= {"method": "ablation", "n_permutations": 0, "progress": False}
        found = mg.attribute_streaming(model, pairs, SITES, **how)
        for site in SITES:
            expected = mg.attribute(model, pairs, site, **how).score
            np.testing.assert_allclose(found[site].score, expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_done_in_one_pass_is_refused(known):
    model, pairs = known
    with pytest.raises(
        SettingsError, match=r"attribute_streaming\(method=...\).*'auroc', which needs every activation"
    ):
        mg.attribute_streaming(model, pairs, SITES, method="auroc")
    with pytest.raises(SettingsError, match=r"attribute_streaming\(n_steps=...\).*which does not use it"):
        mg.attribute_streaming(model, pairs, SITES, n_steps=3)
    few = pairs.take(np.arange(5))
    with pytest.raises(PairsError, match="attribute_streaming: expected at least 8 pairs; received 5"):
        mg.attribute_streaming(model, few, SITES, split=None, method="patching")
