"""Split halves by every method: equal to scores of each half's pairs alone, found without a second run of the model."""

import json

import numpy as np
import planted
import pytest
from by_library import OBSERVATIONAL, score_by_library
from scipy.stats import spearmanr

import memgen_lens as mg
from memgen_lens.analysis.attribution import effects
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT, ON_A_PATH
from memgen_lens.analysis.comparison.halves import _Halvings
from memgen_lens.core.consistency_records import SplitHalf
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.files import to_json
from memgen_lens.core.records import Activations, SiteActivations

QUICK = {"n_splits": 20, "progress": False}
ITEMS = [*range(18), 3, 0, 0]
"""18 items, of which the first have several pairs, out of order."""


def activations(seed=0, n_layers=2, n_neurons=10):
    rng = np.random.default_rng(seed)
    mem, gen = rng.normal(size=(2, len(ITEMS), n_layers, n_neurons)).round(1).astype(np.float32)
    mem += np.linspace(-1, 1, n_neurons).astype(np.float32)
    mem[:, 0, 4] = gen[:, 0, 4] = 7.0
    names = [[f"{side}{row}" for row in range(len(ITEMS))] for side in "MG"]
    pairs = mg.PromptPairs.from_strings(*names, items=ITEMS)
    side = SiteActivations(mem, gen)
    return Activations({"x": side}, pairs, side, np.zeros((2 * len(ITEMS), 1), dtype=np.int64))


def figures_by_hand(scores_of, n_neurons, count, *, signed, seed=0):
    """Both figures of each split, from a function of the pairs that count and of which have their labels swapped."""
    halvings, items = _Halvings.drawn(18, 20, seed), np.array(ITEMS)
    assert (halvings.first.sum(1) == 9).all(), "each half has half the items"
    found = {name: [] for name in ("spearman", "overlap", "null_spearman", "null_overlap")}
    for first, swaps in zip(halvings.first, halvings.swaps, strict=True):
        for prefix, swapped in (("", np.zeros(len(ITEMS), bool)), ("null_", swaps[items] < 0)):
            # Rounding must not part neurons that score alike.
            a, b = (scores_of(np.flatnonzero(half[items]), swapped).round(12) for half in (first, ~first))
            assert a.shape == (n_neurons,)
            tops = [set(np.argsort(-s if signed else -np.abs(s), kind="stable")[:count]) for s in (a, b)]
            found[f"{prefix}spearman"].append(spearmanr(a, b).statistic)
            found[f"{prefix}overlap"].append(len(tops[0] & tops[1]) / count)
    return found


@pytest.mark.parametrize("method", OBSERVATIONAL)
def test_halves_are_scored_as_their_pairs_alone(method):
    acts = activations()
    found = mg.consistency.split_half(acts, "x", method=method, top_fraction=0.2, **QUICK)
    sides = [side.astype(float) for side in (acts.site("x").memorized, acts.site("x").generalized)]
    varies = np.arange(20) != 4

    def scores_of(rows, swapped):
        mem, gen = (np.where(swapped[:, None, None], b, a)[rows] for a, b in (sides, sides[::-1]))
        layers = [score_by_library(method, mem[:, layer], gen[:, layer]) for layer in range(2)]
        return np.concatenate(layers)[varies]

    expected = figures_by_hand(scores_of, 19, 4, signed=False)
    exact = method != "probe_weights"  # of two neurons with nearly one weight, the optimizer may prefer either
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, atol=1e-9 if exact else 0.26, err_msg=name)
        assert np.mean(getattr(found, name)) == pytest.approx(np.mean(values), abs=1e-9 if exact else 0.03)
    assert found.method == method and (found.n_items, found.n_pairs, found.n_neurons) == (18, 21, 19)


@pytest.mark.parametrize("method", CAUSAL)
def test_halves_by_a_causal_method_are_means_of_the_effects_of_their_pairs(method):
    model, plain = planted.build_model(), planted.prompt_pairs(len(ITEMS))
    prompts = [[item.prompt for item in side] for side in (plain.memorized, plain.generalized)]
    answers = {"memorized_answers": ["m"] * len(ITEMS), "rule_answers": ["r"] * len(ITEMS)}
    pairs = mg.PromptPairs.from_strings(*prompts, items=ITEMS, **answers)
    assert len(np.unique(pairs.item)) == 18, "no prompt stands twice"
    groups = np.full((planted.N_LAYERS, planted.D_MLP), -1)
    groups[0, :5] = groups[1, 5:10] = [0, 1, 2, 3, 4]
    groups[1, 5:10] += 5
    how = {"groups": groups} if method in EXACT else {}
    how |= {"n_steps": 3} if method in ON_A_PATH else {}
    how |= {"baseline": "zero"} if method == "ablation" else {}  # the mean of all prompts is unknown to single pairs
    one_by_one = []
    for pair in range(len(ITEMS)):  # eight copies of one pair are the fewest that are scored
        alone = pairs.take(np.full(8, pair))
        score = mg.attribute(model, alone, "post", method=method, split=None, n_permutations=0, progress=False, **how)
        one_by_one.append(score.score)
    found = mg.consistency.split_half(
        model, pairs, "post", method=method, top_fraction=3 / 128, batch_size=5, **how, **QUICK
    )
    effects = np.array(one_by_one).reshape(len(ITEMS), -1)
    varies = (effects != 0).any(0)

    def scores_of(rows, swapped):
        return (np.where(swapped, -1, 1)[:, None] * effects)[rows][:, varies].mean(0)

    expected = figures_by_hand(scores_of, int(varies.sum()), 3, signed=True)
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(found, name), values, atol=0.02, err_msg=name)
    assert found.n_top == 3 and found.method == method
    assert found.spearman.mean() > found.null_spearman.mean()


def test_a_model_is_recorded_where_activations_suffice(known):
    of_acts = mg.consistency.split_half(known.acts, "post", method="nmd", **QUICK)
    of_model = mg.consistency.split_half(known.model, known.pairs, "post", method="nmd", **QUICK)
    for name in ("spearman", "overlap", "null_spearman"):
        np.testing.assert_allclose(getattr(of_model, name), getattr(of_acts, name), atol=1e-3)


def test_the_model_runs_each_pair_once(known, monkeypatch):
    seen, plain = [], effects.attribution_patching

    def counted(explainers, sides):
        seen.append(len(sides["post"].pairs))
        return plain(explainers, sides)

    monkeypatch.setattr(effects, "attribution_patching", counted)
    how = {"method": "attribution_patching", "top_fraction": planted.ONE_NEURON, "n_splits": 100}
    found = mg.consistency.split_half(known.model, known.pairs, "post", **how)
    assert sum(seen) == len(known.pairs) and len(found.spearman) == 100
    assert found.n_top == 1 and (found.overlap == 1).all(), "both halves find the neuron that decides"


def test_halves_by_any_method_are_written_and_read_back_and_those_of_before_are_by_rho():
    found = mg.consistency.split_half(activations(), "x", method="auroc", **QUICK)
    written = json.loads(to_json(found))
    assert SplitHalf.from_json(written).method == found.summary()["method"] == "auroc"
    del written["method"]
    assert SplitHalf.from_json(written).method == "pearson"


def test_what_cannot_be_halved_is_refused(known):
    acts, model, pairs = known.acts, known.model, known.pairs
    for arguments, how, message in (
        ((acts, "post"), {"method": "patching"}, r"split_half: expected consistency.split_half\(model, pairs, site"),
        ((model, "post"), {}, r"expected consistency.split_half\(model, pairs, site"),
        ((acts, "post"), {"n_steps": 3}, r"split_half\(n_steps=...\): expected method='attribution_patching_ig'"),
        (
            (model, pairs, "post"),
            {"method": "patching", "groups": [[1, 2]]},
            r"split_half\(groups=...\): expected a number",
        ),
        ((acts, "post"), {"method": "rho"}, r"split_half\(method=...\): expected 'nmd'"),
    ):
        with pytest.raises(SettingsError, match=message):
            mg.consistency.split_half(*arguments, **how, **QUICK)
    with pytest.raises(PairsError, match=r"at least 16 items.* received 15 pairs of 15 items"):
        mg.consistency.split_half(model, pairs.take(np.arange(15)), "post", method="attribution_patching", **QUICK)
