"""Scores against scipy, a loop over run_with_cache, and every sign flip there is; no finding where there is nothing."""

from itertools import product

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, pearsonr, ttest_ind
from sklearn.metrics import roc_auc_score

import memgen_lens as mg
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.scored import correlation, sign_flip_test
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.records import Activations, SiteActivations

MODEST = settings(max_examples=30, deadline=None)


def activations(mem, gen, *, seed=0):
    """Recorded activations ``[pair, layer, neuron]`` that no model gave; all pairs may be scored with split=None."""
    n = len(mem)
    pairs = mg.PromptPairs.from_strings(
        memorized=[f"M{i}" for i in range(n)], generalized=[f"G{i}" for i in range(n)], seed=seed
    )
    site = SiteActivations(mem.astype(np.float32), gen.astype(np.float32))
    nothing = np.zeros((n, 1, 1), dtype=np.float32)
    tokens = np.zeros((2 * n, 1), dtype=np.int64)
    return Activations({"post": site}, pairs, SiteActivations(nothing, nothing), tokens)


def noise(rng, n_pairs=12, n_layers=2, n_neurons=20):
    """Both sides from one distribution, neurons correlated: labels carry nothing."""
    mixing = rng.normal(size=(n_neurons, n_neurons))
    mem, gen = rng.standard_t(5, size=(2, n_pairs, n_layers, n_neurons)) @ mixing
    return mem, gen


def every_flip(difference):
    """p and max-T p of each neuron over all 2^n sign flips, by the textbook's paired t."""
    n = len(difference)

    def t(d):
        return abs(d.mean(0)) / (d.std(0, ddof=1) / np.sqrt(n))

    observed = t(difference) * (1 - 1e-9)
    flipped = np.array([t(np.array(signs)[:, None] * difference) for signs in product((1, -1), repeat=n)])
    return (flipped >= observed).mean(0), (flipped.max(1, keepdims=True) >= observed).mean(0)


def assert_equal_within_monte_carlo_error(p, exact, n_permutations):
    error = 4 * np.sqrt(exact * (1 - exact) / n_permutations) + 1 / n_permutations
    assert (np.abs(p - exact) <= error).all(), (p, exact)


def test_the_planted_neuron_ranks_first_and_is_no_chance(known):
    score = known.score
    for measure in (score.rho, score.nmd):
        assert np.unravel_index(np.abs(measure).argmax(), measure.shape) == (planted.LAYER, planted.NEURON)
    at = planted.LAYER, planted.NEURON
    assert score.rho[at] == pytest.approx(1) and score.nmd[at] == pytest.approx(1)
    assert score.p[at] == score.p_family[at] == pytest.approx(1 / 10_001)
    assert score.q[at] == pytest.approx(score.q.size / 10_001) and score.q[at] < 0.05
    assert (score.p_family <= 0.05).sum() == 1


def test_the_planted_neuron_stands_clear_of_all_others(known):
    strength = np.sort(np.abs(known.score.rho).ravel())
    assert strength[-1] > 0.999 and strength[-2] < 0.6


@pytest.mark.parametrize("site", ["resid_post", "post", "z"])
def test_rho_is_scipys_pearsonr_with_the_label_neuron_by_neuron(learned, site):
    index = learned.pairs.of("select")
    recorded = learned.acts.site(site)
    both = np.concatenate([recorded.memorized[index], recorded.generalized[index]]).astype(np.float64)
    label = np.repeat([1.0, 0.0], len(index))
    rho = mg.attribute(learned.acts, site).rho
    compared = 0
    for layer, neuron in np.ndindex(rho.shape):
        values = both[:, layer, neuron]
        if np.ptp(values) == 0:
            assert rho[layer, neuron] == 0
        else:
            assert rho[layer, neuron] == pytest.approx(pearsonr(values, label).statistic, abs=1e-6)
            compared += 1
    assert compared > rho.size / 2


def test_nmd_is_a_loop_over_run_with_cache(learned):
    sites = ["resid_post", "post", "z", "attn_out", "mlp_out", "ln2"]
    few = learned.pairs.take(learned.pairs.of("select")[:8])
    acts = mg.record(learned.model, few, sites)
    total = dict.fromkeys(sites, 0.0)
    for memorized, generalized in zip(few.memorized, few.generalized, strict=True):
        for prompt, sign in ((memorized.prompt, 1), (generalized.prompt, -1)):
            _, cache = learned.model.run_with_cache(prompt)
            for site in sites:
                for_layer = [
                    cache["normalized", layer, site] if site == "ln2" else cache[site, layer] for layer in range(2)
                ]
                total[site] += sign * np.stack([h[0, -1].double().flatten().numpy() for h in for_layer])
    for site in sites:
        np.testing.assert_allclose(mg.attribute(acts, site, split=None).nmd, total[site] / 8, atol=1e-5)


def test_a_constant_neuron_has_no_correlation_and_no_significance():
    rng = np.random.default_rng(0)
    mem, gen = noise(rng)
    mem[:, 0, 3] = gen[:, 0, 3] = 0.1  # not exact in binary
    mem[:, 1, 4] = gen[:, 1, 4] = 0.0
    score = mg.attribute(activations(mem, gen), "post", split=None)
    for at in ((0, 3), (1, 4)):
        assert score.rho[at] == score.nmd[at] == 0
        assert score.p[at] == score.p_family[at] == score.q[at] == 1
    assert np.count_nonzero(score.rho) == score.rho.size - 2


def test_a_neuron_that_is_constant_but_for_rounding_has_none_either():
    """One bit between the sides is what two batch shapes can give to one and the same value."""
    mem, gen = noise(np.random.default_rng(0))
    mem[:, 0, 3], gen[:, 0, 3] = np.nextafter(np.float32(0.1), np.float32(1)), np.float32(0.1)
    score = mg.attribute(activations(mem, gen), "post", split=None)
    assert score.rho[0, 3] == 0
    assert score.p[0, 3] > 0.05 and score.p_family[0, 3] > 0.05


def test_a_neuron_that_tells_the_sides_apart_without_fail_has_rho_one():
    mem, gen = noise(np.random.default_rng(0))
    mem[:, 0, 0], gen[:, 0, 0] = -3.0, 2.0
    score = mg.attribute(activations(mem, gen), "post", split=None)
    assert score.rho[0, 0] == pytest.approx(-1) and score.nmd[0, 0] == -5


def test_only_the_pairs_of_the_split_are_scored(learned):
    index = learned.pairs.of("select")
    others = np.setdiff1d(np.arange(len(learned.pairs)), index)
    recorded = learned.acts.site("post")
    spoiled = SiteActivations(recorded.memorized.copy(), recorded.generalized.copy())
    spoiled.memorized[others] = 1e3
    score = mg.attribute(learned.acts, "post")
    again = mg.attribute(
        Activations({"post": spoiled}, learned.pairs, learned.acts.embedding, learned.acts.tokens), "post"
    )
    assert score.n_pairs == again.n_pairs == len(index)
    for name in ("nmd", "rho", "p", "p_family", "q"):
        np.testing.assert_array_equal(getattr(score, name), getattr(again, name))


@pytest.mark.parametrize("kind", ["normal", "ties", "strong"])
def test_p_is_the_share_of_all_sign_flips_within_monte_carlo_error(kind):
    rng = np.random.default_rng(1)
    difference = {
        "normal": rng.normal(size=(9, 6)),
        "ties": rng.integers(-2, 4, size=(9, 6)).astype(float),
        "strong": rng.normal(size=(8, 6)) + np.linspace(0, 3, 6),
    }[kind]
    p, p_family = sign_flip_test(difference, n_permutations=20_000, seed=0)
    exact, exact_family = every_flip(difference)
    assert_equal_within_monte_carlo_error(p, exact, 20_000)
    assert_equal_within_monte_carlo_error(p_family, exact_family, 20_000)


@pytest.mark.parametrize("spread", [0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2])
def test_nearly_equal_differences_are_no_rarer_than_their_own_flip(spread):
    """Of the 256 flips of 8 pairs, two give the observed statistic or more: rounding must not lose them."""
    rng = np.random.default_rng(0)
    difference = 1 + spread * rng.normal(size=(8, 50))
    p, p_family = sign_flip_test(difference, n_permutations=20_000, seed=0)
    assert_equal_within_monte_carlo_error(p, np.full(50, 2 / 256), 20_000)
    assert (p_family >= p).all()


def moments_of(mem, gen, sizes, n_permutations=1000):
    moments, first = PairMoments(n_permutations=n_permutations, seed=0), 0
    for size in sizes:
        moments.add(mem[first : first + size], gen[first : first + size])
        first += size
    assert first == len(mem)
    return moments


@MODEST
@given(st.data())
def test_scores_do_not_depend_on_the_blocks_they_are_merged_from(data):
    """2,500 pairs cross the chunks in which signs are drawn; far from zero, where naive sums of squares fail."""
    rng = np.random.default_rng(0)
    mem, gen = rng.normal([0, 1e3, 1e5, 1e6], size=(2, 2500, 4))
    mem[:, 0] += 0.1
    cuts = sorted(data.draw(st.sets(st.integers(1, 2499), max_size=6)))
    sizes = np.diff([0, *cuts, 2500]).tolist()
    whole, merged = moments_of(mem, gen, [2500]), moments_of(mem, gen, sizes)
    np.testing.assert_allclose(merged.nmd, (mem - gen).mean(0), atol=1e-8)
    np.testing.assert_allclose(merged.rho, whole.rho, rtol=1e-6, atol=1e-9)
    both, label = np.concatenate([mem, gen]), np.repeat([1.0, 0.0], 2500)
    np.testing.assert_allclose(merged.rho, [pearsonr(column, label).statistic for column in both.T], atol=1e-9)
    for ours, theirs in zip(merged.p_values(), whole.p_values(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_what_is_kept_does_not_grow_with_the_pairs():
    rng = np.random.default_rng(0)

    def kept(n_pairs):
        moments = moments_of(*rng.normal(size=(2, n_pairs, 3)), [n_pairs])
        return sum(value.nbytes for value in vars(moments).values() if isinstance(value, np.ndarray))

    assert kept(20) == kept(5000)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 4096])
def test_streaming_gives_the_scores_of_recorded_activations(learned, batch_size):
    sites = ["resid_post", "z"]
    streamed = mg.attribute_streaming(learned.model, learned.pairs, sites, batch_size=batch_size)
    acts = mg.record(learned.model, learned.pairs, sites)
    assert list(streamed) == sites
    for site in sites:
        ours, theirs = streamed[site], mg.attribute(acts, site)
        assert ours.n_pairs == theirs.n_pairs == len(learned.pairs.of("select"))
        np.testing.assert_allclose(ours.nmd, theirs.nmd, atol=1e-5)
        np.testing.assert_allclose(ours.rho, theirs.rho, atol=1e-5)
        np.testing.assert_allclose(ours.p, theirs.p, atol=5e-3)  # a tie may fall either way by rounding


def test_without_permutations_there_are_scores_and_no_p(learned):
    score = mg.attribute_streaming(learned.model, learned.pairs, ["post"], n_permutations=0)["post"]
    assert np.isnan([score.p, score.q, score.p_family]).all()
    np.testing.assert_allclose(score.nmd, mg.attribute(learned.acts, "post").nmd, atol=1e-5)


def test_streaming_refuses_what_attribute_refuses(learned):
    few = learned.pairs.take(np.arange(5))
    with pytest.raises(PairsError, match="attribute_streaming: expected at least 8 pairs; received 5"):
        mg.attribute_streaming(learned.model, few, ["post"], split=None)
    with pytest.raises(SettingsError, match="attribute_streaming: expected n_permutations"):
        mg.attribute_streaming(learned.model, learned.pairs, ["post"], n_permutations=10)
    with pytest.raises(SiteError, match="resid_pots"):
        mg.attribute_streaming(learned.model, learned.pairs, ["resid_pots"])


@pytest.mark.parametrize("n_permutations", [1000, 1001, 1249])
def test_p_counts_exactly_the_permutations_asked_for(n_permutations):
    difference = np.random.default_rng(0).normal(size=(40, 3)) + 10
    difference[:, 2] = 0  # reached by every permutation
    p, p_family = sign_flip_test(difference, n_permutations=n_permutations, seed=0)
    assert p.tolist() == p_family.tolist() == [1 / (1 + n_permutations)] * 2 + [1]


def test_p_is_the_same_for_both_signs():
    difference = np.random.default_rng(0).normal(size=(12, 30)) + 0.3
    for there, back in zip(
        sign_flip_test(difference, n_permutations=1000, seed=3),
        sign_flip_test(-difference, n_permutations=1000, seed=3),
        strict=True,
    ):
        np.testing.assert_array_equal(there, back)


def test_q_is_benjamini_hochberg_over_all_layers_of_the_site(learned):
    score = mg.attribute(learned.acts, "resid_post")
    np.testing.assert_allclose(score.q, false_discovery_control(score.p.ravel()).reshape(score.p.shape))
    assert (score.q >= score.p).all() and (score.p_family >= score.p).all()
    assert (score.q <= 0.05).any(), "the trained model has neurons that differ"


def test_on_shuffled_labels_few_of_the_trained_models_neurons_are_called(learned):
    """The layers' neurons hang together, so that whole seeds find many or none: the mean over seeds must hold."""
    recorded, rng = learned.acts.site("resid_post"), np.random.default_rng(0)
    shares, family = [], []
    for seed in range(40):
        swap = rng.integers(2, size=len(learned.pairs)).astype(bool)[:, None, None]
        shuffled = SiteActivations(
            np.where(swap, recorded.generalized, recorded.memorized),
            np.where(swap, recorded.memorized, recorded.generalized),
        )
        acts = Activations({"resid_post": shuffled}, learned.pairs, learned.acts.embedding, learned.acts.tokens)
        score = mg.attribute(acts, "resid_post", seed=seed)
        shares.append((score.q <= 0.05).mean())
        family.append((score.p_family <= 0.05).any())
    assert np.mean(shares) <= 0.05
    assert np.mean(family) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 40)


def test_on_data_without_a_difference_error_rates_are_what_they_say():
    """200 data sets: p <= 0.05 for 5 % of neurons; a family-wise or FDR finding in 5 % of the sets at most."""
    rng = np.random.default_rng(0)
    n, called, family, found = 200, [], [], []
    for seed in range(n):
        score = mg.attribute(activations(*noise(rng)), "post", split=None, seed=seed)
        called.append((score.p <= 0.05).mean())
        family.append((score.p_family <= 0.05).any())
        found.append((score.q <= 0.05).any())
    error = 3 * np.sqrt(0.05 * 0.95 / n)
    assert np.mean(called) == pytest.approx(0.05, abs=0.01)
    assert 0.05 - error <= np.mean(family) <= 0.05 + error
    assert np.mean(found) <= 0.05 + error


def test_a_true_difference_is_found_where_the_rest_is_noise():
    mem, gen = noise(np.random.default_rng(0), n_pairs=30)
    mem[:, 1, 5] += 30
    score = mg.attribute(activations(mem, gen), "post", split=None)
    assert score.p_family[1, 5] <= 0.01 and (score.p_family <= 0.05).sum() == 1


def test_the_family_wise_p_of_one_neuron_alone_is_its_own_p():
    difference = np.random.default_rng(0).normal(size=(12, 1)) + 0.5
    p, p_family = sign_flip_test(difference, n_permutations=1000, seed=0)
    np.testing.assert_array_equal(p, p_family)


@MODEST
@given(st.integers(0, 2**32 - 1), st.floats(-2, 2))
def test_swapping_the_sides_negates_nmd_and_rho_and_keeps_p(seed, shift):
    mem, gen = noise(np.random.default_rng(seed))
    there = mg.attribute(activations(mem + shift, gen), "post", split=None)
    back = mg.attribute(activations(gen, mem + shift), "post", split=None)
    np.testing.assert_array_equal(there.nmd, -back.nmd)
    np.testing.assert_allclose(there.rho, -back.rho, atol=1e-12)
    for name in ("p", "p_family", "q"):
        np.testing.assert_array_equal(getattr(there, name), getattr(back, name))


@MODEST
@given(st.integers(0, 2**32 - 1), st.integers(-20, 20), st.integers(-3, 3))
def test_another_unit_of_activation_scales_nmd_and_keeps_the_rest(seed, exponent, offset):
    """Powers of two, which scale float32 exactly; an offset common to both sides changes nothing at all."""
    mem, gen = noise(np.random.default_rng(seed))
    mem, gen = np.round(mem * 64) / 64, np.round(gen * 64) / 64
    score = mg.attribute(activations(mem, gen), "post", split=None)
    other = mg.attribute(
        activations((mem + offset) * 2.0**exponent, (gen + offset) * 2.0**exponent), "post", split=None
    )
    np.testing.assert_allclose(other.nmd, score.nmd * 2.0**exponent)
    np.testing.assert_allclose(other.rho, score.rho, atol=1e-12)
    for name in ("p", "p_family", "q"):
        np.testing.assert_array_equal(getattr(score, name), getattr(other, name))


@MODEST
@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_rho_is_a_correlation(seed, n_pairs):
    mem, gen = np.random.default_rng(seed).normal(size=(2, n_pairs, 5))
    rho = correlation(mem, gen)
    label = np.repeat([1.0, 0.0], n_pairs)
    np.testing.assert_allclose(rho, np.corrcoef(np.concatenate([mem, gen]).T, label)[-1, :-1], atol=1e-12)
    assert (np.abs(rho) <= 1 + 1e-12).all()


def test_the_order_of_the_pairs_does_not_matter():
    mem, gen = noise(np.random.default_rng(0), n_pairs=30)
    order = np.random.default_rng(1).permutation(30)
    score = mg.attribute(activations(mem, gen), "post", split=None, n_permutations=20_000)
    other = mg.attribute(activations(mem[order], gen[order]), "post", split=None, n_permutations=20_000)
    np.testing.assert_allclose(other.nmd, score.nmd)
    np.testing.assert_allclose(other.rho, score.rho)
    np.testing.assert_allclose(other.p, score.p, atol=6 * np.sqrt(0.25 / 20_000))


def test_a_seed_gives_the_same_p_again_and_another_seed_others(known):
    first, again, other = (mg.attribute(known.acts, "post", seed=seed).p for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_fewer_than_a_thousand_permutations_are_refused(known):
    with pytest.raises(
        SettingsError, match=r"attribute: expected n_permutations of at least 1000, or 0 for no test; received 999\."
    ):
        mg.attribute(known.acts, "post", n_permutations=999)


def test_a_site_that_was_not_recorded_is_refused_with_the_way_to_record_it(known):
    with pytest.raises(
        SiteError,
        match=r"a recorded site \(post, resid_post\); received 'resid_pre'.*record\(model, pairs, sites=\['resid",
    ):
        mg.attribute(known.acts, "resid_pre")


def test_too_few_of_a_users_pairs_in_a_split_say_how_many_there_are_and_what_to_change():
    mem, gen = noise(np.random.default_rng(0), n_pairs=15)
    with pytest.raises(
        PairsError,
        match=r"split 'select': expected at least 8 pairs; received 6 \(15 pairs in all\)\. "
        r"Give more pairs, .* larger share",
    ):
        mg.attribute(activations(mem, gen), "post")


def test_too_few_pairs_in_all_are_refused():
    mem, gen = noise(np.random.default_rng(0), n_pairs=7)
    with pytest.raises(PairsError, match=r"attribute: expected at least 8 pairs; received 7 \(7 pairs in all"):
        mg.attribute(activations(mem, gen), "post", split=None)
    assert mg.attribute(activations(*noise(np.random.default_rng(0), n_pairs=8)), "post", split=None).n_pairs == 8


def test_what_differs_is_told_as_scipy_and_scikit_learn_tell_it():
    rng = np.random.default_rng(0)
    mem, gen = noise(rng, n_pairs=16)
    mem[:, 0, 0] = gen[:, 0, 0] = 3.0
    mem[:, 1, 4] += 5
    acts = activations(mem, gen)
    mem, gen = (side.astype(np.float32).astype(np.float64) for side in (mem, gen))
    found = {
        method: mg.attribute(acts, "post", method=method, split=None, n_permutations=0)
        for method in ("nmd", "pearson", "cohens_d", "welch_t", "auroc", "probe_weights")
    }
    pooled = np.sqrt((mem.var(0, ddof=1) + gen.var(0, ddof=1)) / 2)
    labels = np.repeat([True, False], 16)
    for layer, neuron in product(range(2), range(20)):
        if (layer, neuron) == (0, 0):
            continue
        a, b = mem[:, layer, neuron], gen[:, layer, neuron]
        told = {method: scores.score[layer, neuron] for method, scores in found.items()}
        assert told["nmd"] == pytest.approx((a - b).mean(), rel=1e-6)
        assert told["pearson"] == pytest.approx(pearsonr(np.concatenate([a, b]), labels).statistic, rel=1e-6)
        assert told["cohens_d"] == pytest.approx((a - b).mean() / pooled[layer, neuron], rel=1e-5)
        assert told["welch_t"] == pytest.approx(ttest_ind(a, b, equal_var=False).statistic, rel=1e-5)
        assert told["auroc"] == pytest.approx(2 * roc_auc_score(labels, np.concatenate([a, b])) - 1)
    for layer in range(2):
        probe = fit_probe(
            np.concatenate([acts.site("post").memorized, acts.site("post").generalized])[:, layer], labels
        )
        weights = np.where(np.arange(20) + layer > 0, probe[-1].coef_[0], 0)
        assert np.allclose(found["probe_weights"].score[layer], weights)
    for method, scores in found.items():
        assert scores.method == method and scores.score[0, 0] == 0, "a neuron that never varies"
        assert np.array_equal(scores.rho, found["pearson"].score)
