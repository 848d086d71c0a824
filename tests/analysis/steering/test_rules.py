"""Rules fitted on made-up activations whose change is known; the batched change against the rule itself."""

from dataclasses import replace

import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.analysis.steering.changes import rule_change
from memgen_lens.analysis.steering.fitted import RIDGES, Clusters, LowRank, weights
from memgen_lens.analysis.steering.rules import DIRECTIONS, LayerFit, SiteFits, best_predicted

BOTH_KINDS = pytest.mark.parametrize("kind", ["clusters", "low_rank"])
SIZES = {"clusters": 2, "low_rank": 1}


def rows_of_two_groups(n, rng):
    """Rows around 3 and -3 in four neurons, whose change is the group's: it is nothing on average."""
    group = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    own = rng.normal(size=(n, 10))
    own[:, :4] += 3 * group[:, None]
    change = np.zeros((n, 10))
    change[:, 5] = -2 * group
    change[:, 6] = group
    return own, change


def layer_fit(own, change, kind, size, items=None):
    items = np.arange(len(own)) if items is None else items
    own = own.astype(np.float32)
    return LayerFit(own, own + change.astype(np.float32), items, kind=kind, size=size, seed=0)


@BOTH_KINDS
def test_where_one_shift_does_nothing_a_rule_gives_unseen_rows_their_groups_change(kind):
    rng = np.random.default_rng(0)
    own, change = rows_of_two_groups(80, rng)
    unseen, expected = rows_of_two_groups(200, rng)
    fit = layer_fit(own, change, kind, SIZES[kind])
    np.testing.assert_allclose(change.mean(0), 0, atol=1e-12)
    # A linear map follows the noise of a row a little; the nearest centroid does not.
    np.testing.assert_allclose(fit.rule_(unseen), expected, atol=1e-6 if kind == "clusters" else 1.2)
    assert np.square(fit.rule_(unseen) - expected).sum() < 0.06 * np.square(expected).sum()
    by_rule, by_shift = fit.closed(np.ones(10, dtype=bool))
    assert by_rule > 0.9 and by_shift < 0.01


def test_a_low_rank_map_is_recovered_on_unseen_rows():
    rng = np.random.default_rng(0)
    left, right, offset = rng.normal(size=(12, 2)), rng.normal(size=(2, 12)), rng.normal(size=12)
    own, unseen = rng.normal(size=(2, 150, 12)) * rng.uniform(0.1, 10, size=12) + 50
    true = lambda h: (h - 50) @ left @ right + offset  # noqa: E731
    rule = layer_fit(own, true(own), "low_rank", 2).rule_
    assert rule.write.shape == (2, 12)
    np.testing.assert_allclose(rule(unseen), true(unseen), rtol=1e-3, atol=1e-2)
    too_small = layer_fit(own, true(own), "low_rank", 1).rule_
    assert np.abs(too_small(unseen) - true(unseen)).max() > 1


@pytest.mark.parametrize("n_rows", [9, 60])
@pytest.mark.parametrize("ridge", RIDGES[[0, 3, 6]].tolist())
def test_reduced_rank_ridge_is_the_projection_of_the_augmented_fit(n_rows, ridge):
    """Mukherjee and Zhu 2011 as they write it, with more neurons than rows and with fewer."""
    rng = np.random.default_rng(0)
    own, change = rng.normal(size=(2, n_rows, 15))
    rule = LowRank(own, 3).rule(change, ridge)
    x, d = ((v - v.mean(0)) / v.std(0) for v in (own, change))
    strength = ridge * np.linalg.norm(x, 2) ** 2
    augmented = np.concatenate([x, np.sqrt(strength) * np.eye(15)])
    full = np.linalg.lstsq(augmented, np.concatenate([d, np.zeros((15, 15))]), rcond=None)[0]
    axes = np.linalg.svd(augmented @ full)[2][:3]
    by_hand = x @ full @ axes.T @ axes * change.std(0) + change.mean(0)
    np.testing.assert_allclose(rule(own), by_hand, atol=1e-8)


def test_one_cluster_is_the_mean_change_whatever_the_row():
    rng = np.random.default_rng(0)
    own, change = rng.normal(size=(2, 40, 6))
    rule = layer_fit(own, change, "clusters", 1).rule_
    np.testing.assert_allclose(rule(100 * rng.normal(size=(7, 6))), np.tile(change.mean(0), (7, 1)), atol=1e-6)


def test_each_row_gets_the_mean_change_of_the_cluster_that_k_means_put_it_into():
    rng = np.random.default_rng(0)
    own, change = rng.normal(size=(2, 50, 6))
    rule = Clusters(own, 5, seed=0).rule(change)
    said = rule(own)
    assert len(np.unique(said.round(9), axis=0)) == 5
    for shift in np.unique(said.round(9), axis=0):
        members = (said.round(9) == shift).all(1)
        np.testing.assert_allclose(shift, change[members].mean(0), atol=1e-8)


def test_where_nothing_can_be_predicted_a_low_rank_map_is_one_shift():
    rng = np.random.default_rng(0)
    own, change = rng.normal(size=(2, 60, 8))
    rule = layer_fit(own, change + 5, "low_rank", 4).rule_
    np.testing.assert_allclose(rule(own), np.tile((change + 5).mean(0), (60, 1)), atol=0.1)


@BOTH_KINDS
def test_neurons_that_vary_by_rounding_alone_are_not_looked_at(kind):
    rng = np.random.default_rng(0)
    own, change = rows_of_two_groups(80, rng)
    noisy = np.concatenate([own, 400 + 1e-4 * rng.normal(size=(80, 3))], axis=1)
    fit = layer_fit(noisy, np.concatenate([change, np.ones((80, 3))], axis=1), kind, SIZES[kind])
    assert (weights(noisy, np.abs(noisy).max())[-3:] == 0).all()
    assert (fit.rule_.read[-3:] == 0).all()
    np.testing.assert_allclose(fit.rule_(noisy)[:, -3:], 1, atol=1e-4)


@BOTH_KINDS
def test_rows_that_are_all_alike_give_one_shift(kind):
    own = np.tile([1.0, -2.0, 0.0], (20, 1))
    change = np.random.default_rng(0).normal(size=(20, 3))
    rule = layer_fit(own, change, kind, 3).rule_
    np.testing.assert_allclose(rule(own[:2]), np.tile(change.mean(0), (2, 1)), atol=1e-6)


def test_what_is_closed_is_counted_on_items_that_were_left_out():
    """Rows of an item are alike: a rule that had seen one of them would know the others."""
    rng = np.random.default_rng(0)
    items = np.repeat(np.arange(12), 4)
    own, change = (rng.normal(size=(12, 6))[items] for _ in range(2))
    own += 1e-3 * rng.normal(size=own.shape)
    fit = layer_fit(own, change, "clusters", 12, items)
    assert np.square(fit.rule_(own) - change).sum() < 0.02 * np.square(change).sum()
    by_rule, by_shift = fit.closed(np.ones(6, dtype=bool))
    assert by_rule < 0 and by_shift < 0.1


def test_one_cluster_closes_what_one_shift_closes():
    rng = np.random.default_rng(0)
    own, change = rng.normal(size=(2, 40, 6))
    by_rule, by_shift = layer_fit(own, change + 2, "clusters", 1).closed(np.arange(6) < 3)
    assert by_rule == pytest.approx(by_shift) and 0.5 < by_rule < 1


def test_other_partners_are_those_of_other_items(known):
    items = np.repeat(np.arange(20), 3)
    pairs = mg.PromptPairs.from_strings(
        memorized=[f"m{i}" for i in range(60)], generalized=[f"g{i}" for i in range(60)], items=items
    )
    acts = replace(known.acts, pairs=pairs)
    fits = SiteFits(acts, "post", kind="clusters", size=2, seed=0, call="here")
    items = pairs.item[pairs.of("select")]
    partner = fits.other_partners(np.random.default_rng(0))
    assert (items[partner] != items).all() and len(set(partner.tolist())) == len(partner)
    assert (partner != fits.other_partners(np.random.default_rng(1))).any()


@BOTH_KINDS
def test_refitted_on_the_same_partners_a_rule_is_itself(kind):
    own, change = rows_of_two_groups(40, np.random.default_rng(0))
    fit = layer_fit(own, change, kind, 2)
    same, turned = fit.refitted(np.arange(40)), fit.refitted(np.arange(40)[::-1].copy())
    np.testing.assert_allclose(same(own), fit.rule_(own))
    assert not np.allclose(turned(own), fit.rule_(own), atol=0.1)


def test_the_layer_chosen_is_the_one_where_rules_close_the_most_on_selected_neurons(known):
    fits = SiteFits(known.acts, "post", kind="low_rank", size=1, seed=0, call="here")
    everything = np.ones((2, 64), dtype=bool)
    assert best_predicted(fits, everything) == planted.LAYER
    assert best_predicted(fits, everything & [[True], [False]]) == 0
    sums = [sum(fits.of(toward, layer).closed(everything[layer])[0] for toward in DIRECTIONS) for layer in (0, 1)]
    assert sums[1] > sums[0]


@BOTH_KINDS
@pytest.mark.parametrize("sizes", [(3,), (1, 3, 2)])
def test_the_change_of_many_copies_is_each_copys_rule(kind, sizes):
    """Rules of several sizes, one of them twice and one copy without, on other neurons and with other strengths."""
    rng = np.random.default_rng(0)
    own, change = rng.normal(size=(2, 50, 7))
    fitted = [layer_fit(own, change @ rng.normal(size=(7, 7)) + own, kind, size).rule_ for size in sizes]
    rules = [*fitted, fitted[0], None]
    gain, taken_from = rng.normal(size=(len(rules), 7)), rng.permuted(np.tile(np.arange(7), (len(rules), 1)), axis=1)
    gain[:, 2] = gain[-1] = 0
    changed = rule_change(rules, gain, taken_from)
    rows = rng.normal(size=(40, 7)).astype(np.float32)
    copy = rng.integers(len(rules), size=40)
    out = changed(torch.as_tensor(rows), torch.as_tensor(copy), torch.zeros(40, dtype=torch.int64)).numpy()
    for row, c, got in zip(rows, copy, out, strict=True):
        rule = rules[c]
        said = np.zeros(7) if rule is None else rule(row[None])[0]
        np.testing.assert_allclose(got, row + gain[c] * said[taken_from[c]], atol=2e-5)
        one = changed(torch.as_tensor(row[None]), torch.tensor([c]), torch.tensor([0])).numpy()[0]
        np.testing.assert_allclose(one, got, atol=1e-5)


def test_the_change_goes_to_the_device_of_what_is_changed():
    rule = layer_fit(*np.random.default_rng(0).normal(size=(2, 20, 6)), "low_rank", 2).rule_
    h, index = torch.zeros(4, 6, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    changed = rule_change([rule], np.ones((1, 6)), np.arange(6)[None])
    assert changed(h, index, index).device.type == "meta"
