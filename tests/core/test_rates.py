"""Rates count items: an interval is as wide as what is independent in the data allows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memgen_lens.core.stats import _wilson_ends, wilson


def test_rows_that_say_the_same_are_one_case_each_item():
    # 480 test pairs of 120 memorized prompts, all of them shifted: what the inference preset reported as [0.992, 1].
    rate = wilson([True] * 480, np.repeat(np.arange(120), 4))
    assert (rate.k, rate.n, rate.n_items, rate.rate) == (480, 480, 120, 1.0)
    assert rate.ci95 == pytest.approx(wilson([True] * 120).ci95) and rate.ci95[0] == pytest.approx(0.969, abs=5e-4)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(2, 8))
def test_items_of_one_size_whose_rows_agree_have_wilsons_interval_over_items(hits, size):
    rate = wilson(np.repeat(hits, size), np.repeat(np.arange(len(hits)), size))
    assert rate.ci95 == pytest.approx(wilson(hits).ci95, abs=1e-9) and rate.n_items == len(hits)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=80))
def test_sharing_an_item_never_makes_an_interval_narrower(rows):
    hits, items = zip(*rows, strict=True)
    together, apart = wilson(hits, items), wilson(hits)
    assert together.rate == apart.rate and together.n_items == len(set(items))
    assert np.diff(together.ci95) >= np.diff(apart.ci95) - 1e-9
    assert 0 <= together.ci95[0] <= together.rate <= together.ci95[1] <= 1


def test_one_row_that_differs_does_not_narrow_the_interval_of_many_that_agree():
    items = np.repeat(np.arange(120), 4)
    all_but_one = wilson([True] * 479 + [False], items)
    assert all_but_one.ci95[0] <= wilson([True] * 480, items).ci95[0] + 0.002


@pytest.mark.parametrize("concentration", [0.0, 0.5, 5.0])
def test_the_interval_holds_the_true_rate_as_often_as_it_says(concentration):
    rng, held, n_draws = np.random.default_rng(0), 0, 600
    for _ in range(n_draws):
        items = np.repeat(np.arange(80), rng.integers(1, 9, size=80))
        own = rng.beta(0.6 * concentration, 0.4 * concentration, 80) if concentration else rng.random(80) < 0.6
        low, high = wilson(rng.random(len(items)) < own[items], items).ci95
        held += low <= 0.6 <= high
    assert 0.93 <= held / n_draws <= 0.97


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 8)), min_size=1, max_size=40))
def test_items_of_any_size_whose_rows_agree_count_once_at_most(items):
    hits, size = ([entry[i] for entry in items] for i in range(2))
    rate = wilson(np.repeat(hits, size), np.repeat(np.arange(len(size)), size))
    over_items = _wilson_ends(rate.rate, float(len(size)))
    assert rate.ci95[0] <= over_items[0] + 1e-9 and rate.ci95[1] >= over_items[1] - 1e-9
