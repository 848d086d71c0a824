"""Probes against a scikit-learn pipeline run by hand, and their baselines where the answer is known."""

import tracemalloc

import numpy as np
import planted
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import memgen_lens as mg
from memgen_lens.core.errors import PairsError, SiteError
from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.records import Activations, SiteActivations

CHANCE = pytest.approx(0.5, abs=0.2)


def activations(mem, gen, *, items=None, tokens=None):
    """Recorded activations ``[pair, layer, neuron]`` and tokens ``[2 * pair, pos]`` that no model gave."""
    n = len(mem)
    pairs = mg.PromptPairs.from_strings(
        memorized=[f"M{i}" for i in range(n)], generalized=[f"G{i}" for i in range(n)], items=items
    )
    nothing = np.zeros((n, 1, 1), dtype=np.float32)
    return Activations(
        {"post": SiteActivations(mem.astype(np.float32), gen.astype(np.float32))},
        pairs,
        SiteActivations(nothing, nothing),
        np.zeros((2 * n, 1), dtype=np.int64) if tokens is None else tokens,
    )


def noise(n_pairs, n_layers=2, n_neurons=8, *, seed=0):
    return np.random.default_rng(seed).normal(size=(2, n_pairs, n_layers, n_neurons))


def pipeline():
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def rows_of(acts, site, layer, split):
    """Features, labels and items of some splits, memorized prompts first."""
    index = np.concatenate([np.flatnonzero(acts.pairs.split == name) for name in split])
    recorded = acts.site(site)
    features = np.concatenate([recorded.memorized[index, layer], recorded.generalized[index, layer]])
    return features, np.repeat([1, 0], len(index)), np.tile(acts.pairs.item[index], 2)


@pytest.fixture(scope="module")
def report(known):
    return mg.fit_probes(known.acts, "post")


def test_each_layer_scores_what_a_pipeline_run_by_hand_scores(learned):
    report = mg.fit_probes(learned.acts, "post")
    for layer, scores in enumerate(report.by_layer):
        features, labels, _ = rows_of(learned.acts, "post", layer, ["select", "tune"])
        unseen, expected, _ = rows_of(learned.acts, "post", layer, ["test"])
        fitted = pipeline().fit(features, labels)
        assert scores.auroc == pytest.approx(roc_auc_score(expected, fitted.decision_function(unseen)), abs=1e-9)
        assert scores.accuracy == pytest.approx(fitted.score(unseen, expected))
        np.testing.assert_allclose(report.probes[layer][-1].coef_, fitted[-1].coef_, atol=1e-6)
    assert (report.n_train, report.n_test) == (len(features) // 2, len(unseen) // 2)


def test_the_layer_is_chosen_by_cross_validation_grouped_by_item(learned):
    report = mg.fit_probes(learned.acts, "z")
    by_hand = []
    for layer in (0, 1):
        features, labels, items = rows_of(learned.acts, "z", layer, ["select", "tune"])
        decision = np.zeros(len(labels))
        for train, held_out in GroupKFold(5).split(features, labels, items):
            assert not set(items[train]) & set(items[held_out])
            fitted = pipeline().fit(features[train], labels[train])
            decision[held_out] = fitted.decision_function(features[held_out])
        by_hand.append(roc_auc_score(labels, decision))
    assert report.cv_auroc_by_layer == pytest.approx(by_hand, abs=1e-9)
    assert report.best_layer == int(np.argmax(by_hand))
    assert report.best is report.by_layer[report.best_layer]


def test_pairs_of_one_item_are_never_in_training_and_test_at_once():
    """Ten pairs an item with one and the same noise: whoever has seen the item knows the answer, nobody else does."""
    items = np.repeat(np.arange(100), 10)
    mem, gen = noise(100, n_layers=1, n_neurons=150)[:, items]
    report = mg.fit_probes(activations(mem, gen, items=items.tolist()), "post")
    assert report.cv_auroc_by_layer[0] == CHANCE
    assert report.by_layer[0].auroc == CHANCE


def test_the_best_layer_is_chosen_without_the_test_pairs():
    """On the test pairs layer 0 tells all and layer 1 nothing; on the others it is the other way round."""
    mem, gen = noise(60)
    test = activations(mem, gen).pairs.split == "test"
    mem[test, 0, 0] += 20
    mem[~test, 1, 0] += 20
    report = mg.fit_probes(activations(mem, gen), "post")
    assert report.best_layer == 1 and report.cv_auroc_by_layer[1] > 0.99
    assert report.best.auroc == report.by_layer[1].auroc == CHANCE


def test_the_test_pairs_do_not_fit_the_probes():
    mem, gen = noise(60)
    test = activations(mem, gen).pairs.split == "test"
    report = mg.fit_probes(activations(mem, gen), "post")
    mem[test] = 100.0
    spoiled = mg.fit_probes(activations(mem, gen), "post")
    for there, here in zip(report.probes, spoiled.probes, strict=True):
        np.testing.assert_array_equal(there[-1].coef_, here[-1].coef_)
        np.testing.assert_array_equal(there[0].mean_, here[0].mean_)
    assert report.cv_auroc_by_layer == spoiled.cv_auroc_by_layer


def test_the_layer_with_the_planted_neuron_tells_all_and_the_other_nothing(report):
    assert report.best_layer == planted.LAYER
    assert report.best.auroc == report.best.accuracy == 1
    assert report.best.auroc_ci95 == report.best.accuracy_ci95 == (1, 1)
    assert report.by_layer[0].auroc == pytest.approx(0.5, abs=0.25)


def test_intervals_hold_their_scores(learned):
    report = mg.fit_probes(learned.acts, "resid_post")
    for scores in (*report.by_layer, report.input_only, report.embedding):
        assert 0 <= scores.auroc_ci95[0] <= scores.auroc <= scores.auroc_ci95[1] <= 1
        assert 0 <= scores.accuracy_ci95[0] <= scores.accuracy <= scores.accuracy_ci95[1] <= 1
    layer = report.by_layer[0]
    assert layer.auroc in (0, 1) or layer.auroc_ci95[0] < layer.auroc_ci95[1]


def test_shuffled_labels_leave_chance(report, learned):
    for shuffled in (report.shuffled, mg.fit_probes(learned.acts, "resid_post").shuffled):
        assert shuffled["auroc"] == CHANCE
        assert shuffled["low"] <= shuffled["auroc"] <= shuffled["high"]
        assert shuffled["n_shuffles"] == 20


def test_the_prompt_alone_tells_where_a_marker_stands_in_it(report):
    assert report.input_only.auroc == report.input_only.accuracy == 1


def test_where_all_prompts_end_alike_the_embedding_tells_nothing(report):
    assert report.embedding.auroc == report.embedding.accuracy == 0.5
    assert report.embedding.auroc_ci95 == (0.5, 0.5)


def test_an_embedding_that_differs_tells():
    mem, gen = noise(60)
    acts = activations(mem, gen)
    ends = SiteActivations(np.ones((60, 1, 2), dtype=np.float32), np.zeros((60, 1, 2), dtype=np.float32))
    assert mg.fit_probes(Activations(acts.sites, acts.pairs, ends, acts.tokens), "post").embedding.auroc == 1


@pytest.mark.parametrize(
    ("told_by", "expected"),
    [("position", 1), ("count", pytest.approx(1, abs=0.05)), ("length", 1), ("nothing", CHANCE)],
)
def test_the_prompt_alone_is_its_token_counts_and_the_token_at_each_position(told_by, expected):
    n, rng = 120, np.random.default_rng(0)
    mem = rng.integers(5, 9, size=(n, 6))
    gen = rng.integers(5, 9, size=(n, 6))
    if told_by == "position":  # the same tokens in another order
        gen = mem.copy()
        mem[:, 0], mem[:, 1], gen[:, 0], gen[:, 1] = 1, 2, 2, 1
    if told_by == "count":  # one token more often, anywhere
        mem[np.arange(n), rng.integers(6, size=n)] = 1
    if told_by == "length":  # padding is a token of its own
        mem[:, 5] = -1
    acts = activations(*noise(n, n_layers=1, n_neurons=2), tokens=np.concatenate([mem, gen]))
    assert mg.fit_probes(acts, "post").input_only.auroc == expected


@pytest.mark.parametrize(("n_items", "pairs_an_item"), [(100, 1), (40, 1), (20, 4)])
def test_the_learning_curve_grows_to_all_training_pairs(n_items, pairs_an_item):
    mem, gen = noise(n_items * pairs_an_item)
    mem[:, 1, 0] += 20
    items = np.repeat(np.arange(n_items), pairs_an_item).tolist()
    report = mg.fit_probes(activations(mem, gen, items=items), "post")
    sizes = [point["n_pairs"] for point in report.learning_curve]
    assert sizes == sorted(set(sizes)), "each size once"
    assert sizes[-1] == report.n_train and sizes[0] >= 4
    assert all(0 <= point["auroc"] <= 1 for point in report.learning_curve)
    assert report.learning_curve[-1]["auroc"] == report.best.auroc == 1
    assert all(point["auroc"] > 0.9 for point in report.learning_curve)


def test_the_learning_curve_takes_whole_items():
    items = np.repeat(np.arange(40), 3)
    mem, gen = noise(40)[:, items]
    report = mg.fit_probes(activations(mem, gen, items=items.tolist()), "post")
    assert all(point["n_pairs"] % 3 == 0 for point in report.learning_curve)
    assert report.learning_curve[-1]["n_pairs"] == report.n_train


def test_a_seed_gives_the_same_report_again(known):
    first, again, other = (mg.fit_probes(known.acts, "post", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.shuffled != other.shuffled
    assert first.cv_auroc_by_layer == other.cv_auroc_by_layer


def test_the_summary_holds_everything_but_the_fitted_probes(report):
    summary = report.summary()
    assert "probes" not in summary and summary["best_layer"] == planted.LAYER
    assert set(summary) == set(report.__dataclass_fields__) - {"probes"}


@pytest.mark.parametrize(("label", "name"), [(True, "memorization"), (False, "generalization")])
def test_labels_of_one_class_only_are_refused(label, name):
    with pytest.raises(
        PairsError, match=rf"fit_probe: expected prompts of both behaviours; received 10 of {name} only\. Give prompts"
    ):
        fit_probe(np.zeros((10, 3)), np.full(10, label))


def test_one_probe_alone_is_the_pipeline():
    features = noise(1, 40, 3)[0, 0]
    labels = features[:, 1] > 0
    probe = fit_probe(features, labels)
    np.testing.assert_allclose(probe.predict_proba(features), pipeline().fit(features, labels).predict_proba(features))


@pytest.mark.parametrize(("n_pairs", "split"), [(10, "select"), (30, "tune"), (12, "select")])
def test_too_few_pairs_in_any_split_are_refused(n_pairs, split):
    with pytest.raises(
        PairsError, match=rf"split '{split}': expected at least 8 pairs; received \d \({n_pairs} pairs in all"
    ):
        mg.fit_probes(activations(*noise(n_pairs)), "post")


def test_a_site_that_was_not_recorded_is_refused(known):
    with pytest.raises(SiteError, match=r"site 'z': expected a recorded site \(post, resid_post\)"):
        mg.fit_probes(known.acts, "z")


@pytest.mark.parametrize("n_layers", [2, 16])
def test_one_layer_is_copied_at_a_time(n_layers):
    """Rows of 8 MB a layer: probes of 16 layers hold no more copies of them at once than probes of 2."""
    acts = activations(*noise(500, n_layers, 1000).astype(np.float32))
    tracemalloc.start()
    try:
        mg.fit_probes(acts, "post")
        assert tracemalloc.get_traced_memory()[1] < 6 * 8e6
    finally:
        tracemalloc.stop()


def test_shuffled_labels_are_swapped_item_by_item(monkeypatch):
    """Prompts of an item keep their labels' relation: all as they were, or all the other way round."""
    items = np.repeat(np.arange(40), 3)
    mem, gen = noise(40)[:, items]
    acts = activations(mem, gen, items=items.tolist())
    fitted, real = [], LogisticRegression.fit

    def fit(self, features, labels, *rest):
        fitted.append(np.asarray(labels))
        return real(self, features, labels, *rest)

    monkeypatch.setattr(LogisticRegression, "fit", fit)
    train = np.concatenate([acts.pairs.of("select"), acts.pairs.of("tune")])
    labels, item = np.repeat([True, False], len(train)), np.tile(acts.pairs.item[train], 2)
    mg.fit_probes(acts, "post")
    swapped = [found != labels for found in fitted if len(found) == len(labels) and (found != labels).any()]
    assert len(swapped) == 20
    assert all(len(set(swap[item == i])) == 1 for swap in swapped for i in np.unique(item))
    assert 0.3 < np.mean(swapped) < 0.7
