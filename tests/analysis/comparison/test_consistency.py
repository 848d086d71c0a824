"""Consistency against planted truths: the same neurons, none in common, and labels that mean nothing."""

import json
from dataclasses import replace

import numpy as np
import planted_tasks
import pytest
from scipy.stats import fisher_exact, hypergeom, spearmanr

import memgen_lens as mg
from memgen_lens.analysis.attribution.resampled import weighted_rho
from memgen_lens.analysis.attribution.scored import correlation
from memgen_lens.analysis.comparison.exchanged import scores_of_exchanged_labels
from memgen_lens.core.consistency_records import SplitHalf, TaskConsistency
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.core.files import to_json, with_nulls
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations
from memgen_lens.core.stats import largest, overlap, row_correlation
from memgen_lens.presets import ExperimentConfig


def acts_of(mem: np.ndarray, gen: np.ndarray, items: list[int] | None = None) -> Activations:
    """Activations of one site ``x``, ``[pair, layer, neuron]``, on prompts that say nothing."""
    n = len(mem)
    pairs = PromptPairs.from_strings(
        memorized=[f"m{i}" for i in range(n)], generalized=[f"g{i}" for i in range(n)], items=items
    )
    side = SiteActivations(mem.astype(np.float32), gen.astype(np.float32))
    return Activations({"x": side}, pairs, side, np.zeros((2 * n, 1), dtype=np.int64))


def noise(n_pairs: int = 60, n_neurons: int = 100, seed: int = 0, n_layers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed).normal(size=(2, n_pairs, n_layers, n_neurons))
    return draws[0], draws[1]


def scores_of(rho: np.ndarray, site: str = "x") -> NeuronScores:
    ones = np.ones_like(rho)
    return NeuronScores(site, rho, rho, ones, ones, ones, 20, 20)


# --- the overlap of two sets -------------------------------------------------------------------------------------


def test_equal_sets_overlap_fully_and_disjoint_ones_not_at_all():
    a = np.zeros((2, 50), dtype=bool)
    a[1, :10] = True
    same, apart = overlap(a, a), overlap(a, np.roll(a, 10, axis=1))
    assert same.share == 1 and same.shared == 10
    assert apart.share == 0 and apart.p == 1
    assert same.p == pytest.approx(hypergeom.pmf(10, 100, 10, 10))


def test_the_chance_of_an_overlap_is_fishers_exact_test():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.random((2, 3, 40)) < rng.uniform(0.1, 0.5, size=(2, 1, 1))
        table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert overlap(a, b).p == pytest.approx(fisher_exact(table, alternative="greater").pvalue)


def test_random_sets_share_the_expected_number_and_are_seldom_significant():
    rng = np.random.default_rng(1)
    found = [
        overlap(*rng.permuted(np.tile(np.arange(200) < 40, (2, 1)), axis=1).reshape(2, 2, 100)) for _ in range(500)
    ]
    assert np.mean([one.share for one in found]) == pytest.approx(0.2, abs=0.02)
    assert all(one.expected == pytest.approx(0.2) for one in found)
    for p in ("p", "p_within_layers"):
        assert np.mean([getattr(one, p) <= 0.05 for one in found]) <= 0.08
        assert np.mean([getattr(one, p) <= 0.5 for one in found]) == pytest.approx(0.5, abs=0.15)


def test_sets_that_crowd_into_one_layer_share_more_by_chance_within_layers():
    rng = np.random.default_rng(2)
    a, b = np.zeros((2, 4, 50), dtype=bool)
    a[3, :20] = b[3, 10:30] = True
    found = overlap(a, b)
    assert found.expected == pytest.approx(20 / 200)
    assert found.expected_within_layers == pytest.approx(20 / 50)
    drawn = [(rng.permutation(a[3]) & b[3]).sum() for _ in range(5000)]
    assert found.p_within_layers == pytest.approx(np.mean(np.array(drawn) >= 10), abs=0.02)
    assert found.p < 1e-4 < found.p_within_layers


def test_neurons_that_could_not_be_chosen_do_not_count():
    a = np.zeros((1, 100), dtype=bool)
    a[0, :10] = True
    among = np.zeros_like(a)
    among[0, :20] = True
    assert overlap(a, a, among=among).n == 20
    assert overlap(a, a, among=among).expected == pytest.approx(0.5)


# --- rho from sums -----------------------------------------------------------------------------------------------


def test_rho_of_a_half_is_that_of_its_pairs_alone():
    rng = np.random.default_rng(0)
    mem, gen = 50 + rng.normal(size=(2, 40, 7))
    mem[:, 3] = gen[:, 3] = 2.0
    half, items = rng.random(40) < 0.5, rng.permutation(40)
    signs = np.where(rng.random(40) < 0.5, -1.0, 1.0)
    by_item = half[np.argsort(items)][None].astype(float)
    assert np.allclose(weighted_rho(mem, gen, items, by_item)[0], correlation(mem[half], gen[half]), atol=1e-9)
    swap = (signs < 0)[:, None]
    swapped = correlation(np.where(swap, gen, mem)[half], np.where(swap, mem, gen)[half])
    found = weighted_rho(mem, gen, items, by_item, signs[np.argsort(items)][None])
    assert np.allclose(found[0], swapped, atol=1e-9)


def test_rho_of_weights_is_that_of_repeated_pairs():
    mem, gen = np.random.default_rng(3).normal(size=(2, 20, 5))
    counts = np.random.default_rng(4).multinomial(20, np.full(20, 1 / 20))
    repeated = correlation(np.repeat(mem, counts, axis=0), np.repeat(gen, counts, axis=0))
    assert np.allclose(weighted_rho(mem, gen, np.arange(20), counts[None].astype(float))[0], repeated)


def test_rank_correlations_are_scipys():
    from scipy.stats import rankdata

    a, b = np.random.default_rng(0).normal(size=(2, 4, 60)).round(1)
    b += a
    ours = row_correlation(rankdata(a, axis=1), rankdata(b, axis=1))
    assert np.allclose(ours, [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])


def test_the_largest_neurons_are_those_that_steering_takes():
    rho = np.random.default_rng(0).uniform(-1, 1, size=(3, 30))
    ours = largest(rho.reshape(1, -1), 9).reshape(rho.shape)
    assert np.array_equal(ours, mg.Steering.from_scores(scores_of(rho), 0.1).selected)


# --- halves of the pairs -----------------------------------------------------------------------------------------


def test_halves_agree_where_every_neuron_has_its_own_effect():
    mem, gen = noise()
    effect = np.where(np.arange(200) < 50, 4.0, np.linspace(-1.5, 1.5, 200))
    mem = mem + effect.reshape(2, 100)
    found = mg.consistency.split_half(acts_of(mem, gen), "x", top_fraction=0.25)
    assert found.spearman.min() > 0.85
    assert found.overlap.mean() > 0.97 and found.overlap_p < 1e-10
    assert abs(found.null_spearman.mean()) < 0.2
    assert found.expected_overlap == 0.25 and found.n_top == 50 and found.n_items == 60


def test_halves_of_noise_agree_no_more_than_chance():
    spearman, shares = [], []
    for seed in range(5):
        found = mg.consistency.split_half(acts_of(*noise(seed=seed)), "x", n_splits=40, seed=seed)
        spearman.append(found.spearman.mean())
        shares.append(found.overlap.mean())
        assert np.mean(found.null_overlap) == pytest.approx(found.expected_overlap, abs=0.06)
    assert abs(np.mean(spearman)) < 0.1
    assert np.mean(shares) == pytest.approx(0.1, abs=0.05)


def test_pairs_of_one_item_stay_in_one_half():
    mem, gen = noise(n_pairs=40)
    twice = acts_of(np.repeat(mem, 2, axis=0), np.repeat(gen, 2, axis=0), items=[i // 2 for i in range(80)])
    found = mg.consistency.split_half(twice, "x")
    assert found.n_items == 40 and found.n_pairs == 80
    # Dealt pair by pair, half of each half would be in the other one, too, and correlate at about 0.5.
    assert found.spearman.mean() < 0.2


def test_constant_neurons_are_not_among_those_that_chance_could_choose():
    mem, gen = noise()
    mem[:, 0], gen[:, 0] = 3.0, 3.0
    found = mg.consistency.split_half(acts_of(mem, gen), "x")
    assert found.n_neurons == 100 and found.n_top == 20 and found.expected_overlap == 0.2


def test_the_same_seed_gives_the_same_halves_and_another_others():
    acts = acts_of(*noise())
    first, again, other = (mg.consistency.split_half(acts, "x", n_splits=25, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.spearman, again.spearman) and np.array_equal(first.null_overlap, again.null_overlap)
    assert not np.array_equal(first.spearman, other.spearman)


def test_split_half_is_written_and_read_back():
    found = mg.consistency.split_half(acts_of(*noise()), "x", n_splits=20)
    again = SplitHalf.from_json(json.loads(to_json(found)))
    assert to_json(again) == to_json(found)
    assert len(found.rows()) == 20
    assert found.summary()["spearman"]["mean"] == pytest.approx(found.spearman.mean())


def test_the_trained_model_has_the_same_neurons_in_both_halves(learned):
    found = mg.consistency.split_half(learned.acts, "resid_post")
    assert found.spearman.mean() > 0.6
    assert found.overlap.mean() > np.quantile(found.null_overlap, 0.95)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"top_fraction": 0.0},
            SettingsError,
            r"split_half\(top_fraction=.*greater than 0; received 0.0. Change",
        ),
        ({"top_fraction": 1.0}, SettingsError, r"received 1.0"),
        ({"n_splits": 5}, SettingsError, "expected n_splits of at least 20; received 5. Raise it."),
        ({"split": "tune"}, PairsError, "at least 16 items.* received 12 pairs of 12 items. Give more pairs"),
        ({"site": "y"}, SiteError, "expected a recorded site"),
    ],
)
def test_split_half_refuses_what_it_cannot_halve(arguments, error, message):
    with pytest.raises(error, match=message):
        mg.consistency.split_half(acts_of(*noise()), **({"site": "x"} | arguments))


def test_a_site_where_nothing_varies_is_refused():
    still = np.ones((20, 1, 5))
    with pytest.raises(SettingsError, match=r"at least two neurons vary.*'x', at which 0 does"):
        mg.consistency.split_half(acts_of(still, still), "x")


# --- training seeds ----------------------------------------------------------------------------------------------


def test_profiles_over_layers_are_shares_and_maxima():
    rho = np.zeros((4, 10))
    rho[2, :3], rho[3, :1] = 0.9, 0.5
    found = mg.consistency.across_seeds({0: scores_of(rho), 7: scores_of(-rho[:, ::-1])}, top_fraction=0.1)
    assert found.seeds == ("0", "7")
    assert np.allclose(found.top_share, [[0, 0, 0.75, 0.25]] * 2)
    assert np.allclose(found.max_abs_rho, [[0, 0, 0.9, 0.5]] * 2)
    assert np.allclose(found.top_share_correlation, 1) and found.why is None
    assert len(found.rows()) == 8


def test_models_that_differ_in_other_layers_have_unlike_profiles():
    early, late = np.zeros((2, 3, 20))
    early[0], late[2] = 0.8, 0.8
    found = mg.consistency.across_seeds([scores_of(early), scores_of(late), scores_of(late)], top_fraction=0.2)
    assert found.max_abs_rho_correlation[1, 2] == pytest.approx(1)
    assert found.max_abs_rho_correlation[0, 1] == pytest.approx(-0.5)


def test_neurons_are_not_compared_one_by_one():
    rho = np.random.default_rng(0).uniform(-1, 1, size=(3, 20))
    shuffled = np.random.default_rng(1).permuted(rho, axis=1)
    found = mg.consistency.across_seeds([scores_of(rho), scores_of(shuffled)])
    assert np.allclose(found.top_share[0], found.top_share[1])


def test_two_layers_have_no_correlation_and_say_why():
    found = mg.consistency.across_seeds([scores_of(np.eye(2, 9)), scores_of(np.eye(2, 9))])
    assert np.isnan(found.top_share_correlation).all()
    assert "fewer than three layers" in found.why
    assert json.loads(to_json(found.summary()))["top_share_correlation"] == [[None, None], [None, None]]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([np.ones((3, 4))], "expected scores of at least two models; received 1. Train with another seed"),
        ([np.ones((3, 4)), np.ones((2, 4))], "one site and one depth; received x with 2 layers, x with 3 layers"),
    ],
)
def test_across_seeds_refuses_what_has_no_common_profile(scores, message):
    with pytest.raises(SettingsError, match=message):
        mg.consistency.across_seeds([scores_of(rho) for rho in scores])


# --- adapters of one pretrained model -----------------------------------------------------------------------------


def test_the_same_scores_share_all_and_no_permutation_reaches_them():
    rho = np.random.default_rng(0).uniform(-1, 1, size=(3, 40))
    found = mg.consistency.across_adapters({"a": scores_of(rho), "b": scores_of(rho)}, n_permutations=99)
    assert found.models == ("a", "b") and found.site == "x"
    assert np.allclose(found.overlap, 1) and np.allclose(found.rank_correlation, 1)
    assert np.allclose(found.overlap_p, 0.01) and np.allclose(found.rank_correlation_p, 0.01)
    assert np.allclose(found.overlap_expected, 0.1) and (found.n_neurons == 120).all()
    assert json.loads(to_json(found.summary()))["overlap"] == [[1, 1], [1, 1]]
    assert [(row["model"], row["other"], row["overlap"]) for row in found.rows()] == [("a", "b", 1.0)]


def test_a_top_set_shared_by_half_is_found_with_its_chance_in_each_layer():
    a, b = np.full((2, 2, 20), 0.01)
    a[1, :4], b[1, 2:6] = 0.9, 0.8  # four of forty, two of them shared, all in the last layer
    found = mg.consistency.across_adapters([scores_of(a), scores_of(b)], top_fraction=0.1)
    assert found.overlap[0, 1] == 0.5
    assert found.overlap_expected[0, 1] == pytest.approx(4 / 40)
    assert found.overlap_expected_within_layers[0, 1] == pytest.approx(4 / 20)
    # Of 20 places, 4 drawn: two or more of four known ones.
    assert found.overlap_p[0, 1] == pytest.approx(hypergeom.sf(1, 20, 4, 4), abs=0.04)


def test_neurons_that_are_alike_in_all_layers_are_not_taken_for_many():
    """Places of the residual stream: independent between the models, the same in each of 30 layers of one."""
    rng = np.random.default_rng(0)
    below = {"overlap": 0, "rank_correlation": 0}
    for _ in range(60):
        a, b = (np.tile(rng.uniform(-1, 1, 50), (30, 1)) for _ in range(2))
        found = mg.consistency.across_adapters([scores_of(a), scores_of(b)], top_fraction=0.2, n_permutations=99)
        for name in below:
            below[name] += getattr(found, f"{name}_p")[0, 1] <= 0.1
    assert all(count <= 13 for count in below.values()), "60 null sets, of which 6 are expected; 13 has p < 0.01"


def test_neurons_that_are_still_in_either_model_are_not_compared():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 2, 20))
    a[0, :5] = 0
    found = mg.consistency.across_adapters([scores_of(a), scores_of(b)], n_permutations=9)
    assert found.n_neurons.tolist() == [[35, 35], [35, 40]]
    nothing = mg.consistency.across_adapters([scores_of(a), scores_of(np.zeros((2, 20)))], n_permutations=9)
    assert np.isnan(nothing.overlap[0, 1]) and nothing.n_neurons[0, 1] == 0
    # Two live neurons: hardly a permutation leaves two to be compared, which says nothing against chance.
    two = np.zeros((1, 400))
    two[0, :2] = 1, 2
    few = mg.consistency.across_adapters([scores_of(two), scores_of(two)], n_permutations=99)
    assert few.rank_correlation[0, 1] == 1 and few.rank_correlation_p[0, 1] > 0.9


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(3, 4)], "at least two models; received 1. Tune the same pretrained model with another seed"),
        ([(3, 4), (3, 5)], r"of models tuned from one pretrained model; received x \(3, 4\) by pearson, x \(3, 5\)"),
    ],
)
def test_across_adapters_refuses_what_has_no_common_index(shapes, message):
    with pytest.raises(SettingsError, match=message):
        mg.consistency.across_adapters([scores_of(np.ones(shape)) for shape in shapes])


def acts_of_models(shared: float, n_items: int = 60) -> dict[str, Activations]:
    """Two models, two pairs an item; ten of 100 neurons vary most, and tell the labels apart by ``shared``."""
    acts = {}
    for name, seed in (("a", 0), ("b", 1)):
        mem, gen = noise(2 * n_items, seed=seed)
        for side in (mem, gen):  # the two pairs of an item are nearly one
            side[1::2] = side[::2] + 0.1 * side[1::2]
            side[..., :10] *= 20
        mem[..., :10] += 20 * shared
        acts[name] = acts_of(mem, gen, items=[i // 2 for i in range(2 * n_items)])
    return acts


def test_neurons_that_vary_most_in_both_models_are_the_same_ones_whatever_the_labels_say():
    acts = acts_of_models(shared=0)
    scores = {name: mg.attribute(of, "x", method="nmd") for name, of in acts.items()}
    found = mg.consistency.across_adapters(scores, acts=acts, n_permutations=99)
    assert found.overlap[0, 1] > 0.7 and found.overlap_p[0, 1] == 0.01, "to the index alone that is no chance"
    assert found.overlap_exchanged[0, 1] == pytest.approx(found.overlap[0, 1], abs=0.15)
    assert found.overlap_exchanged_p[0, 1] > 0.2
    assert found.rows()[0]["overlap_exchanged"] == found.overlap_exchanged[0, 1] == found.overlap_exchanged[1, 0]
    without = mg.consistency.across_adapters(scores, n_permutations=99)
    assert np.isnan(without.overlap_exchanged).all() and without.summary()["overlap_exchanged"][0][1] is None
    assert np.array_equal(without.overlap, found.overlap) and np.array_equal(without.overlap_p, found.overlap_p)


def test_neurons_that_tell_the_labels_apart_in_both_models_are_others_where_labels_are_exchanged():
    acts = acts_of_models(shared=2.0)
    scores = {name: mg.attribute(of, "x", split=None) for name, of in acts.items()}
    found = mg.consistency.across_adapters([*scores.values()], acts=[*acts.values()], n_permutations=99)
    assert found.overlap[0, 1] == 1
    assert found.overlap_exchanged[0, 1] < 0.2 and found.overlap_exchanged_p[0, 1] == pytest.approx(1 / 201)


@pytest.mark.parametrize("method", ["pearson", "nmd"])
def test_exchanged_labels_are_those_of_whole_items_half_of_them(method):
    acts = acts_of_models(shared=0.5, n_items=10)["a"]
    score = mg.attribute(acts, "x", method=method, split=None, n_permutations=0)
    drawn = scores_of_exchanged_labels(score, acts, np.random.default_rng(3), call="test")
    side, rng = acts.site("x"), np.random.default_rng(3)
    signs = rng.permuted(np.tile(np.where(np.arange(10) < 5, -1.0, 1.0), (100, 1)), axis=1)
    for draw in (0, 41, 99):
        swap = np.repeat(signs[draw] < 0, 2)[:, None, None]
        mem, gen = np.where(swap, side.generalized, side.memorized), np.where(swap, side.memorized, side.generalized)
        by_hand = mg.attribute(acts_of(mem, gen), "x", method=method, split=None, n_permutations=0)
        np.testing.assert_allclose(drawn[draw], by_hand.score, rtol=0, atol=1e-4 * np.abs(by_hand.score).max())


def test_across_adapters_refuses_activations_that_are_not_those_of_the_scores():
    acts = acts_of_models(shared=0)
    scores = {name: mg.attribute(of, "x") for name, of in acts.items()}
    for given, message in (
        ({"a": acts["a"], "c": acts["b"]}, r"the models that have scores: .*'b'.*; received .*'c'"),
        ([acts["a"]], "the models that have scores"),
        ({"a": acts["b"], "b": acts["a"]}, r"scores of 'x' were made of \(\d+ pairs\); received others: 120 pairs"),
    ):
        with pytest.raises(SettingsError, match=message):
            mg.consistency.across_adapters(scores, acts=given)
    causal = {name: replace(score, method="attribution_patching") for name, score in scores.items()}
    with pytest.raises(SettingsError, match="received scores by attribution_patching, which runs the model"):
        mg.consistency.across_adapters(causal, acts=acts)
    with pytest.raises(SiteError):
        mg.consistency.across_adapters({name: replace(score, site="y") for name, score in scores.items()}, acts=acts)


# --- tasks of a mixture ------------------------------------------------------------------------------------------


GRID = {"top_fractions": (planted_tasks.ONE_NEURON,), "alphas": (1.0, 2.0), "positions": ("answer",)}


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def two_tasks(request):
    model, pairs = planted_tasks.build_model(shared=request.param), planted_tasks.prompt_pairs()
    found = mg.consistency.across_tasks(model, None, pairs, "post", top_fraction=planted_tasks.ONE_NEURON, **GRID)
    return request.param, found


def test_tasks_with_neurons_of_their_own_share_none_and_shared_ones_all(two_tasks):
    shared, found = two_tasks
    assert found.tasks == ("a", "b") and found.left_out == {}
    assert np.array_equal(found.overlap.value, np.ones((2, 2)) if shared else np.eye(2))
    # One of 128 neurons, less those that fire on neither task.
    assert found.overlap_p[0, 0] == pytest.approx(1 / 126, rel=0.02)
    assert found.overlap_expected[0, 1] == pytest.approx(1 / 126, rel=0.02)


def test_probes_tell_their_own_task_and_another_only_where_it_shares_the_neuron(two_tasks):
    shared, found = two_tasks
    assert np.allclose(np.diag(found.probe.value), 1)
    other = found.probe.value[~np.eye(2, dtype=bool)]
    assert (other == 1).all() if shared else (other < 0.85).all()
    assert found.probe_layers == (planted_tasks.LAYER,) * 2
    assert (found.probe.low <= found.probe.value).all() and (found.probe.value <= found.probe.high).all()
    # Both prompts of every test pair; prompts that are drawn twice are one item, and their pairs stay together.
    tests = [2 * found.n_pairs[name]["test"] for name in found.tasks]
    assert found.probe.n.tolist() == [tests, tests] and (found.probe.n_items <= found.probe.n / 2).all()


def test_steering_switches_another_task_only_where_it_shares_the_neuron(two_tasks):
    shared, found = two_tasks
    expected = np.ones((2, 2)) if shared else np.eye(2)
    assert np.array_equal(found.steering["to_generalization"].value, expected)
    assert np.array_equal(found.steering["memorized_form"].value, expected)
    assert np.array_equal(found.steering["exact_recall"].value, expected)
    for rates in found.steering.values():
        assert (rates.low <= rates.value).all() and (rates.value <= rates.high).all()
    assert found.random_neurons["to_generalization"].max() < 0.2
    assert all(setting.site == "post" for setting in found.settings)


def test_task_consistency_is_written_and_read_back(two_tasks):
    _, found = two_tasks
    written = to_json(found.summary())
    assert to_json(TaskConsistency.from_json(json.loads(written)).summary()) == written
    rows = found.rows()
    assert [(row["source"], row["target"]) for row in rows] == [("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")]
    assert rows[1]["to_generalization"] == found.steering["to_generalization"].value[0, 1]
    json.dumps(rows, allow_nan=False)


def test_one_task_split_in_two_by_name_is_consistent_with_itself(learned):
    """What holds of one task must hold between two halves of it that are called two tasks."""
    names = {key: "even" if i % 2 else "odd" for i, key in enumerate(np.unique(learned.pairs.item).tolist())}
    half = replace(
        learned.pairs,
        memorized=tuple(replace(item, task=names[item.key]) for item in learned.pairs.memorized),
        generalized=tuple(replace(item, task=names[item.key]) for item in learned.pairs.generalized),
        split=np.array(["select", "tune", "test"])[np.arange(len(learned.pairs)) // 2 % 3],
        n_items_by_task={},
    )
    grid = {"top_fractions": (0.1, 0.3), "alphas": (2.0, 4.0), "positions": ("answer",)}
    found = mg.consistency.across_tasks(learned.model, learned.task, half, "resid_post", **grid)
    assert (found.probe.value > 0.85).all()
    steered = found.steering["to_generalization"]  # of a dozen pairs each; how many flip differs between machines
    assert (steered.value > found.random_neurons["to_generalization"].max() + 0.2).all()
    assert steered.low.max() <= steered.high.min(), "one rate lies in all four intervals"
    assert (found.overlap_p < 0.01).all()
    assert set(found.n_pairs["odd"]) == {"select", "tune", "test"}


def test_a_task_with_too_few_pairs_is_left_out_with_the_reason():
    model, pairs = planted_tasks.build_model(shared=True), planted_tasks.prompt_pairs()
    third = [replace(item, task="c") for item in pairs.memorized[:5]]
    more = replace(
        pairs,
        memorized=(*third, *pairs.memorized[5:]),
        generalized=(*(replace(item, task="c") for item in pairs.generalized[:5]), *pairs.generalized[5:]),
    )
    grid = GRID | {"alphas": (1.0,)}
    found = mg.consistency.across_tasks(model, None, more, "post", **grid)
    assert found.tasks == ("a", "b")
    assert "expected at least 8 pairs" in found.left_out["c"]


def test_pairs_of_one_task_are_refused():
    model, pairs = planted_tasks.build_model(shared=True), planted_tasks.prompt_pairs()
    one = pairs.take(np.arange(60))
    with pytest.raises(PairsError, match=r"at least two tasks .*received 1 of 1 \(a\). Train on a mixture"):
        mg.consistency.across_tasks(model, None, one, "post", **GRID)
    with pytest.raises(SettingsError, match=r"across_tasks\(top_fraction=...\): expected less than 1; received 2.0"):
        mg.consistency.across_tasks(model, None, pairs, "post", top_fraction=2.0)


def test_a_site_that_is_the_same_for_all_prompts_is_refused():
    model, pairs = planted_tasks.build_model(shared=True), planted_tasks.prompt_pairs()
    with pytest.raises(SettingsError, match="neurons vary between the prompts of each task; received 'embed'"):
        mg.consistency.across_tasks(model, None, pairs, "embed", **GRID)


def test_missing_figures_become_null():
    assert with_nulls({"a": np.array([1.0, np.nan]), "b": (np.float64("nan"), 2)}) == {"a": [1.0, None], "b": [None, 2]}


def test_a_mixture_is_a_task_of_an_experiment():
    mixture = mg.tasks.Mixture(tasks=(mg.tasks.Addition(n_digits=1, n_memorized=10, n_heldout=6, n_validation=6),))
    assert ExperimentConfig(task=mixture).task.name == "mixture"
