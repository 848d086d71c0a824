"""Intervals, false discovery rate and bootstrap against formulas and loops written by hand."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score

from memgen_lens.core.stats import (
    auroc,
    bootstrap_auroc_and_accuracy,
    bootstrap_mean,
    bootstrap_ratio,
    fdr,
    mean_of_draws,
    wilson,
)

Z = 1.959963984540054


def auroc_by_loop(labels, decision) -> float:
    """Share of (positive, negative) couples in the right order, ties counted half."""
    positive = [d for label, d in zip(labels, decision, strict=True) if label]
    negative = [d for label, d in zip(labels, decision, strict=True) if not label]
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    return won / (len(positive) * len(negative))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_the_wilson_interval_is_that_of_the_formula(hits):
    rate = wilson(hits)
    n, p = len(hits), sum(hits) / len(hits)
    center = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert (rate.k, rate.n, rate.rate) == (sum(hits), n, p)
    assert rate.ci95 == pytest.approx((max(center - half, 0), min(center + half, 1)), abs=1e-9)
    assert 0 <= rate.ci95[0] <= p <= rate.ci95[1] <= 1


def test_a_rate_reads_as_one_line():
    assert str(wilson([True, True, False, True])) == "0.750 [0.301, 0.954] (n=4)"


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(AssertionError, match="at least one case"):
        wilson([])


def test_hits_may_be_any_truth_values():
    assert wilson(np.array([1, 0, 1])) == wilson([True, False, True])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_fdr_is_that_of_benjamini_and_hochberg_by_hand(values):
    # q of the k-th smallest p is the least of p_j * n / j over j >= k.
    n = len(values)
    order = sorted(range(n), key=lambda i: values[i])
    expected, least = [0.0] * n, 1.0
    for rank in range(n, 0, -1):
        least = min(least, values[order[rank - 1]] * n / rank)
        expected[order[rank - 1]] = least
    np.testing.assert_allclose(fdr(np.array(values)), expected, rtol=1e-12, atol=1e-300)


def test_fdr_runs_over_all_entries_and_keeps_the_shape():
    p = np.random.default_rng(0).uniform(size=(3, 5))
    assert fdr(p).shape == (3, 5)
    np.testing.assert_array_equal(fdr(p).ravel(), fdr(p.ravel()))
    assert not np.allclose(fdr(p), np.stack([fdr(row) for row in p]))


def test_mean_of_draws_is_the_mean_and_the_central_95_percent_of_the_draws():
    summary = mean_of_draws(np.arange(201) / 200)
    assert summary == {"mean": pytest.approx(0.5), "ci95": pytest.approx([0.025, 0.975]), "n_draws": 201}


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auroc_is_the_share_of_couples_in_the_right_order(rows):
    labels, decision = np.array([label for label, _ in rows]), np.array([float(d) for _, d in rows])
    if labels.all() or not labels.any():
        return
    assert auroc(labels, decision) == pytest.approx(auroc_by_loop(labels, decision))


@pytest.mark.parametrize(
    ("n_items", "signal", "digits"), [(4, 0.5, 1), (25, 1.0, 0), (40, 2.0, 6)], ids=["few", "ties", "many"]
)
def test_the_bootstrap_is_that_of_a_loop_that_repeats_the_rows_of_each_drawn_item(n_items, signal, digits):
    rng = np.random.default_rng(n_items)
    # Items of one, two or three rows; with 4 items of one class each, some resamples lack a class and are left out.
    groups = np.repeat(np.arange(n_items) * 7 + 3, rng.integers(1, 4, size=n_items))
    labels = groups % 2 == 0 if n_items == 4 else rng.random(len(groups)) < 0.5
    decision = np.round(rng.normal(size=len(groups)) + signal * (labels - 0.5), digits)

    found = bootstrap_auroc_and_accuracy(labels, decision, groups, n_resamples=200, seed=5)

    counts = np.random.default_rng(5).multinomial(n_items, np.full(n_items, 1 / n_items), size=200)
    areas, accuracies = [], []
    for draw in counts:
        rows = np.concatenate([np.tile(np.flatnonzero(groups == 7 * k + 3), times) for k, times in enumerate(draw)])
        drawn_labels, drawn_decision = labels[rows], decision[rows]
        accuracies.append(np.mean((drawn_decision > 0) == drawn_labels))
        if drawn_labels.any() and not drawn_labels.all():
            areas.append(auroc_by_loop(drawn_labels, drawn_decision))
    if n_items == 4:
        assert len(areas) < 200
    assert found["auroc"] == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-12)
    assert found["accuracy"] == pytest.approx(tuple(np.quantile(accuracies, [0.025, 0.975])), abs=1e-12)


@pytest.mark.parametrize("digits", [0, 1, 6], ids=["many ties", "some ties", "no ties"])
def test_the_bootstrap_is_that_of_weights_given_to_scikit_learn_in_several_blocks(monkeypatch, digits):
    rng = np.random.default_rng(digits)
    groups = np.repeat(np.arange(70), rng.integers(1, 4, size=70))
    labels = rng.random(len(groups)) < 0.5
    decision = np.round(rng.normal(size=len(groups)) + labels, digits)
    monkeypatch.setattr("memgen_lens.core.stats._BLOCK_ENTRIES", 7 * len(groups))  # 7 resamples at once, and 2 left

    found = bootstrap_auroc_and_accuracy(labels, decision, groups, n_resamples=100, seed=5)

    weights = np.random.default_rng(5).multinomial(70, np.full(70, 1 / 70), size=100)[:, groups]
    areas = [roc_auc_score(labels, decision, sample_weight=weight) for weight in weights]
    accuracies = [np.average((decision > 0) == labels, weights=weight) for weight in weights]
    assert found["auroc"] == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-12)
    assert found["accuracy"] == pytest.approx(tuple(np.quantile(accuracies, [0.025, 0.975])), abs=1e-12)


def test_the_memory_of_the_bootstrap_does_not_grow_with_the_rows():
    """Of 16,000 pairs: where each row met each other value, 7.6 GiB."""
    peaks = []
    for n in (4_000, 16_000):
        labels, groups = np.tile([True, False], n), np.repeat(np.arange(n), 2)
        decision = np.random.default_rng(0).normal(size=2 * n) + labels
        tracemalloc.start()
        try:
            bootstrap_auroc_and_accuracy(labels, decision, groups, seed=0)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 100e6 and peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_bootstrap_interval_holds_the_point_and_shrinks_with_more_items(seed):
    rng = np.random.default_rng(seed)
    widths = []
    for n in (20, 320):
        labels = np.tile([True, False], n)
        decision = rng.normal(size=2 * n) + labels
        interval = bootstrap_auroc_and_accuracy(labels, decision, np.repeat(np.arange(n), 2), seed=seed)
        low, high = interval["auroc"]
        assert 0 <= low < auroc(labels, decision) < high <= 1
        low_accuracy, high_accuracy = interval["accuracy"]
        assert low_accuracy < np.mean((decision > 0) == labels) < high_accuracy
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_perfect_classifier_has_an_interval_without_width():
    labels = np.tile([True, False], 10)
    interval = bootstrap_auroc_and_accuracy(labels, labels - 0.5, np.repeat(np.arange(10), 2), seed=0)
    assert interval == {"auroc": (1.0, 1.0), "accuracy": (1.0, 1.0)}


def test_the_bootstrap_follows_from_its_seed():
    rng = np.random.default_rng(0)
    arguments = (np.tile([True, False], 15), rng.normal(size=30), np.repeat(np.arange(15), 2))
    first = bootstrap_auroc_and_accuracy(*arguments, seed=1)
    assert bootstrap_auroc_and_accuracy(*arguments, seed=1) == first
    assert bootstrap_auroc_and_accuracy(*arguments, seed=2) != first


def test_rows_of_one_item_are_resampled_together():
    # Ten copies of each of five items carry no more information than the five items alone.
    rng = np.random.default_rng(3)
    labels, decision = np.array([True, True, True, False, False]), rng.normal(size=5)
    once = bootstrap_auroc_and_accuracy(labels, decision, np.arange(5), seed=0)
    copies = [np.repeat(values, 10) for values in (labels, decision, np.arange(5))]
    assert bootstrap_auroc_and_accuracy(*copies, seed=0)["auroc"] == pytest.approx(once["auroc"])


def test_intervals_of_ratios_are_scipys_of_items():
    rng = np.random.default_rng(0)
    below = rng.uniform(1, 3, size=(30, 2))
    above = (0.4 + 0.3 * rng.normal(size=(30, 3, 2))) * below[:, None]
    items = np.arange(30) // 2
    ratio, low, high = bootstrap_ratio(above, below, items, n_resamples=4000, seed=0)
    assert np.allclose(ratio, above.sum(0) / below.sum(0))
    for cell, column in np.ndindex(ratio.shape):
        sums = [values.reshape(15, 2).sum(1) for values in (above[:, cell, column], below[:, column])]
        theirs = bootstrap(
            sums,
            lambda a, b, axis: a.sum(axis) / b.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=4000,
            random_state=1,
        ).confidence_interval
        assert (low[cell, column], high[cell, column]) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_ratios_to_nothing_are_no_numbers():
    below = np.array([[1.0, 0.0, -1.0]] * 4)
    ratio, low, high = bootstrap_ratio(np.ones((4, 1, 3)), below, np.arange(4), seed=0)
    for values in (ratio, low, high):
        assert values[0, 0] == 1 and np.isnan(values[0, 1:]).all()


def test_the_interval_of_a_mean_is_that_of_a_loop_over_whole_items():
    rng = np.random.default_rng(0)
    groups = np.repeat([3, 1, 7, 9, 4], [1, 4, 2, 2, 3])[rng.permutation(12)]
    values = rng.normal(size=12) + groups
    low, high = bootstrap_mean(values, groups, n_resamples=20_000, seed=1)
    keys, means = np.unique(groups), []
    for _ in range(5_000):
        drawn = [values[groups == key] for key in rng.choice(keys, size=len(keys))]
        means.append(np.concatenate(drawn).mean())
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.15)
    assert (low, high) == bootstrap_mean(values, groups, n_resamples=20_000, seed=1)
    assert bootstrap_mean(np.full(4, 2.5), np.arange(4), seed=0) == (2.5, 2.5)


def test_rows_that_share_an_item_do_not_narrow_the_interval_of_a_mean():
    values, items = np.random.default_rng(2).normal(size=40), np.arange(40)
    one = bootstrap_mean(values, items, seed=0)
    ten = bootstrap_mean(np.tile(values, 10), np.tile(items, 10), seed=0)
    alone = bootstrap_mean(np.tile(values, 10), np.arange(400), seed=0)
    assert ten == pytest.approx(one)
    assert alone[1] - alone[0] < 0.5 * (one[1] - one[0])
