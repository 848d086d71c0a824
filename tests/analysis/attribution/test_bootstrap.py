"""Bootstrap intervals: equal to a loop over resampled pairs by scipy and scikit-learn, and as wide as they say."""

import numpy as np
import planted
import pytest
from by_library import OBSERVATIONAL, score_by_library

import memgen_lens as mg
from memgen_lens.analysis.attribution.bootstrap import ItemCounts, percentiles
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT, ON_A_PATH
from memgen_lens.analysis.attribution.resampled import WeightedSums, Weighting
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.files import write_arrays
from memgen_lens.core.records import Activations, SiteActivations

QUICK = {"split": None, "n_permutations": 0, "progress": False}


def activations(mem, gen, items=None):
    """Activations of the site ``post`` that no model gave, in float32."""
    n = len(mem)
    pairs = mg.PromptPairs.from_strings([f"M{i}" for i in range(n)], [f"G{i}" for i in range(n)], items=items)
    side = SiteActivations(mem.astype(np.float32), gen.astype(np.float32))
    return Activations({"post": side}, pairs, side, np.zeros((2 * n, 1), dtype=np.int64))


def uneven(seed=0, n_items=14, n_layers=2, n_neurons=6):
    """Pairs of items that have one to four, out of order; ties, a constant neuron, one that fires in one pair."""
    rng = np.random.default_rng(seed)
    items = rng.permutation(np.repeat(np.arange(n_items), rng.integers(1, 5, size=n_items)))
    mem, gen = (30 + rng.normal(size=(2, len(items), n_layers, n_neurons))).round(1)
    mem += 0.8 * rng.normal(size=(n_layers, n_neurons))
    mem[:, 0, 0] = gen[:, 0, 0] = 0.1
    mem[:, 1, 2] = gen[:, 1, 2] = 0.0
    mem[3, 1, 2] = 5.0
    return mem.astype(np.float32), gen.astype(np.float32), items


@pytest.mark.parametrize("method", OBSERVATIONAL)
def test_intervals_are_those_of_a_loop_over_resampled_pairs(method):
    mem, gen, items = uneven()
    acts = activations(mem, gen, items=items.tolist())
    found = mg.attribute(acts, "post", method=method, n_resamples=120, seed=3, **QUICK)
    counts = ItemCounts(14, 120, seed=3)(0, 14).astype(int)
    mem, gen = mem.astype(np.float64), gen.astype(np.float64)
    drawn = np.zeros((120, 2, 6))
    for draw, count in enumerate(counts):
        rows = np.concatenate([np.tile(np.flatnonzero(items == item), n) for item, n in enumerate(count)]).astype(int)
        for layer in range(2):
            drawn[draw, layer] = score_by_library(method, mem[rows, layer], gen[rows, layer])
    drawn = np.sort(drawn, axis=0)
    expected = np.stack([drawn[2], drawn[-3]])  # 0.025 * 121 = 3.025: the third from either end
    np.testing.assert_allclose(found.ci95, expected, atol=5e-3 if method == "probe_weights" else 1e-9)
    assert found.ci95.shape == (2, 2, 6) and not found.ci95[:, 0, 0].any(), "a constant neuron has no interval"


@pytest.mark.parametrize("method", CAUSAL)
def test_intervals_of_causal_methods_are_those_of_the_effects_of_single_items(method):
    """The effect of an item's pairs alone, from a call of its own a pair, averaged over the items drawn."""
    model = planted.build_model()
    pairs = planted.prompt_pairs(12)
    pairs = mg.PromptPairs.from_strings(
        [item.prompt for item in pairs.memorized],
        [item.prompt for item in pairs.generalized],
        memorized_answers=["m"] * 12,
        rule_answers=["r"] * 12,
        items=[0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 0, 0],
    )
    how = {"baseline": "zero"} if method == "ablation" else {}
    groups = np.full((planted.N_LAYERS, planted.D_MLP), -1)
    groups[0, :3] = groups[1, 6:9] = [0, 1, 2]
    how |= {"n_steps": 3} if method in ON_A_PATH else {}
    how |= {"groups": groups} if method in EXACT else {}
    found = mg.attribute(model, pairs, "post", method=method, n_resamples=150, seed=1, batch_size=3, **how, **QUICK)
    one_by_one = []
    for pair in range(12):  # eight copies of one pair are its item, and the fewest that are scored
        alone = pairs.take(np.full(8, pair))
        one_by_one.append(mg.attribute(model, alone, "post", method=method, **how, **QUICK).score)
    effects, places = np.array(one_by_one), np.unique(pairs.item, return_inverse=True)[1]
    weights = ItemCounts(int(places.max()) + 1, 150, seed=1)(0, int(places.max()) + 1)[:, places]
    drawn = np.einsum("rp,pln->rln", weights, effects) / weights.sum(1)[:, None, None]
    drawn = np.sort(drawn, axis=0)
    np.testing.assert_allclose(found.ci95, np.stack([drawn[2], drawn[-3]]), atol=1e-5)
    assert found.ci95[0, planted.LAYER, planted.NEURON] > 0


def test_resamples_draw_as_many_items_as_there_are_each_as_often_as_any_other():
    counts = ItemCounts(2500, 400, seed=0)
    whole = counts(0, 2500)
    assert (whole.sum(1) == 2500).all() and whole.min() == 0
    assert whole.mean(0) == pytest.approx(np.ones(2500), abs=5 / np.sqrt(400))
    assert whole.var() == pytest.approx(1 - 1 / 2500, abs=0.01)
    assert np.corrcoef(whole[:, 0], whole[:, 2000])[0, 1] == pytest.approx(0, abs=0.2)
    again = ItemCounts(2500, 400, seed=0)
    parts = [again(first, min(first + 300, 2500)) for first in range(0, 2500, 300)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert not np.array_equal(ItemCounts(2500, 400, seed=1)(0, 2500), whole)


@pytest.mark.parametrize("method", ["nmd", "pearson", "cohens_d"])
def test_sums_do_not_depend_on_blocks_nor_memory_on_pairs(method):
    rng = np.random.default_rng(0)
    mem, gen = rng.normal([0, 1e3, 1e5], size=(2, 3000, 3))
    items = np.arange(3000) // 2
    sizes = set()
    scores = []
    for block in (3000, 1024, 77):
        sums = WeightedSums(Weighting(100, ItemCounts(1500, 100, seed=0)), means_alone=method == "nmd")
        for first in range(0, 3000, block):
            rows = slice(first, first + block)
            sums.add(mem[rows], gen[rows], items[rows])
        scores.append(sums.scores(method))
        sizes.add(sum(value.nbytes for value in vars(sums).values() if isinstance(value, np.ndarray)))
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-7, atol=1e-9)
    assert len(sizes) == 1


def test_streaming_gives_the_intervals_of_recorded_activations(learned):
    kept = mg.attribute(learned.acts, "post", n_resamples=100)
    streamed = mg.attribute_streaming(
        learned.model, learned.pairs, ["post"], n_resamples=100, n_permutations=0, batch_size=10
    )["post"]
    np.testing.assert_allclose(streamed.ci95, kept.ci95, atol=1e-5)
    # Hardly anything but a percentile parts an interval from the score inside it.
    assert ((kept.ci95[0] <= kept.score) & (kept.score <= kept.ci95[1])).mean() > 0.99


@pytest.mark.parametrize("method", ["nmd", "pearson", "welch_t", "cohens_d", "auroc"])
def test_intervals_cover_the_truth_as_often_as_they_say(method):
    """40 items of two pairs that share most of what they say; a true difference of half a standard deviation."""
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(8):
        shared = rng.normal(size=(2, 40, 1, 200))
        mem, gen = np.repeat(shared, 2, axis=1) * np.sqrt(0.8) + np.sqrt(0.2) * rng.normal(size=(2, 80, 1, 200))
        acts = activations(mem + 0.5, gen, items=np.repeat(np.arange(40), 2).tolist())
        found = mg.attribute(acts, "post", method=method, n_resamples=400, seed=seed, **QUICK)
        # Of two normals half a deviation apart: P(mem > gen) = Phi(0.5 / sqrt(2)).
        truth = {"nmd": 0.5, "pearson": 0.25 / np.sqrt(1 + 0.25**2), "auroc": 2 * 0.638163 - 1, "cohens_d": 0.5}
        true = truth.get(method, 0.5 * np.sqrt(80 / 2))
        covered.append((found.ci95[0] <= true) & (true <= found.ci95[1]))
    assert 0.90 <= np.mean(covered) <= 0.98


def test_intervals_of_a_causal_mean_cover_it_too():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(8):
        effects = 0.3 + rng.standard_t(6, size=(40, 300))
        sums = WeightedSums(Weighting(400, ItemCounts(40, 400, seed=seed)), means_alone=True)
        sums.add(effects, None, np.arange(40))
        low, high = percentiles(sums.scores("nmd"))
        covered.append((low <= 0.3) & (high >= 0.3))
    assert 0.90 <= np.mean(covered) <= 0.98


def test_swapping_the_sides_mirrors_the_intervals():
    mem, gen, items = uneven(1)
    there, back = (
        mg.attribute(activations(*sides, items=items.tolist()), "post", method="auroc", n_resamples=101, **QUICK)
        for sides in ((mem, gen), (gen, mem))
    )
    np.testing.assert_allclose(there.ci95, -back.ci95[::-1], atol=1e-12)


def test_an_effect_may_be_infinite_in_a_resample():
    mem, gen = np.random.default_rng(0).normal(size=(2, 10, 1, 2))
    mem[:, 0, 0], gen[:, 0, 0] = 2.0, 1.0
    found = mg.attribute(activations(mem, gen), "post", method="cohens_d", n_resamples=100, **QUICK)
    assert np.isposinf(found.ci95[:, 0, 0]).all() and np.isfinite(found.ci95[:, 0, 1]).all()


def test_a_seed_gives_the_same_intervals_again_and_another_seed_others():
    acts = activations(*uneven()[:2])
    first, again, other = (mg.attribute(acts, "post", n_resamples=100, seed=seed, **QUICK) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.ci95, again.ci95)
    assert not np.array_equal(first.ci95, other.ci95)


def test_intervals_are_written_and_read_back_and_files_of_before_have_none(tmp_path):
    acts = activations(*uneven()[:2])
    with_ci = mg.attribute(acts, "post", method="auroc", n_resamples=100, **QUICK)
    again = mg.NeuronScores.load(with_ci.save(tmp_path))
    np.testing.assert_array_equal(again.ci95, with_ci.ci95)
    assert again.method == "auroc"
    without = mg.attribute(acts, "post", **QUICK)
    assert without.ci95 is None and mg.NeuronScores.load(without.save(tmp_path)).ci95 is None
    arrays = dict.fromkeys(("nmd", "rho", "p", "p_family", "q", "ci95"), without.nmd)
    write_arrays(tmp_path / "post.safetensors", arrays | {"n_pairs": np.array([8]), "n_items": np.array([8])})
    with pytest.raises(RunDirectoryError, match="The file is damaged"):
        mg.NeuronScores.load(tmp_path / "post.safetensors")


def test_too_few_resamples_are_refused(known):
    for call in (
        lambda: mg.attribute(known.acts, "post", n_resamples=99),
        lambda: mg.attribute_streaming(known.model, known.pairs, ["post"], n_resamples=1),
    ):
        with pytest.raises(SettingsError, match=r"n_resamples of at least 100, or 0 .* received \d+\. Take 1000"):
            call()
