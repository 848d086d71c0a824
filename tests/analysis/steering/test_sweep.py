"""A sweep against each of its settings evaluated alone, and the choice among rows written by hand."""

from dataclasses import replace

import helpers
import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memgen_lens as mg
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.steering_records import SteeringSetting, SweepRow


@pytest.fixture(scope="module")
def resid(known):
    return mg.attribute(known.acts, "resid_post")


@pytest.fixture(scope="module")
def alone(known):
    """The row's numbers from `evaluate_steering` of its setting alone, on the tune pairs of the planted model."""
    seen = {}

    def evaluated(score, row):
        if (row.setting, row.layers) not in seen:
            steer = Steering.from_scores(
                score,
                row.setting.top_fraction,
                row.setting.alpha or 1.0,
                mode=row.setting.mode,
                source=known.acts,
                layers=row.layers,
                positions=row.setting.positions,
            )
            assert steer.setting == row.setting
            table = mg.evaluate_steering(known.model, None, known.pairs, steer, split="tune")
            there, back = table.to_generalization, table.to_memorization
            seen[row.setting, row.layers] = {
                "n": there.n,
                "to_generalization": there.shift["rate"],
                "to_generalization_other": there.other["rate"],
                "to_memorization": back.shift["rate"],
                "memorized_form": back.memorized_form["rate"],
            }
        return pytest.approx(seen[row.setting, row.layers])

    return evaluated


def measured(row):
    return {
        name: getattr(row, name)
        for name in ("n", "to_generalization", "to_generalization_other", "to_memorization", "memorized_form")
    }


def row(fraction, alpha, there, there_other, form, form_other, *, n=100, recall=0.0):
    mode = "shift" if alpha is not None else "patch"
    setting = SteeringSetting("post", fraction, alpha, "answer", mode)
    rates = (float(rate) for rate in (there, there_other, recall, form, form_other))
    return SweepRow(setting, None, n, n, *rates)


@pytest.mark.parametrize("watch", [helpers.unwatched, helpers.watched])
@pytest.mark.parametrize("use_cache", [True, False])
def test_every_row_is_its_setting_evaluated_alone(known, resid, alone, use_cache, watch):
    with watch(known.model):
        rows = mg.sweep_steering(
            known.model,
            None,
            known.pairs,
            [known.score, resid],
            top_fractions=[0.2],
            alphas=[0.3, 2.0],
            positions=["answer", "prompt", "all"],
            use_cache=use_cache,
        )
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        score = known.score if row.setting.site == "post" else resid
        assert measured(row) == alone(score, row)
    assert len({(row.to_generalization, row.to_memorization) for row in rows}) > 1


def test_rows_come_in_the_order_of_scores_positions_layers_fractions_alphas(known, resid):
    rows = mg.sweep_steering(
        known.model,
        None,
        known.pairs,
        [resid, known.score],
        top_fractions=[0.5, 0.1],
        alphas=[2.0, 1.0],
        layers=[[1], None],
        positions=["prompt", "answer"],
    )
    assert [(r.setting.site, r.setting.positions, r.layers, r.setting.top_fraction, r.setting.alpha) for r in rows] == [
        (site, positions, layers, fraction, alpha)
        for site in ("resid_post", "post")
        for positions in ("prompt", "answer")
        for layers in ((1,), None)
        for fraction in (0.5, 0.1)
        for alpha in (2.0, 1.0)
    ]


@pytest.mark.parametrize("batch_size", [60, 2048])
@pytest.mark.parametrize("use_cache", [True, False])
def test_on_a_trained_model_every_row_is_counted_by_hand(learned, use_cache, batch_size):
    scores = [mg.attribute(learned.acts, site) for site in ("resid_post", "z")]
    rows = mg.sweep_steering(
        learned.model,
        learned.task,
        learned.pairs,
        scores,
        top_fractions=[0.1, 0.4],
        alphas=[1.0, 3.0],
        batch_size=batch_size,
        use_cache=use_cache,
    )
    index = learned.pairs.of("tune")
    for row in rows:
        score = scores[0] if row.setting.site == "resid_post" else scores[1]
        steer = Steering.from_scores(score, row.setting.top_fraction, row.setting.alpha)
        seen = {}
        for toward, side in (("generalization", "memorized"), ("memorization", "generalized")):
            items = [getattr(learned.pairs, side)[i] for i in index]
            outputs = steered_outputs(
                learned.model, [i.prompt for i in items], [steer], toward=toward, max_new_tokens=5
            )[0]
            seen[toward] = [
                (str(learned.task.classify(i, o)), learned.task.is_memorized_form(i, o))
                for i, o in zip(items, outputs, strict=True)
            ]
        assert row.n == len(index)
        assert row.to_generalization == np.mean([b == "generalization" for b, _ in seen["generalization"]])
        assert row.to_generalization_other == np.mean([b == "other" for b, _ in seen["generalization"]])
        assert row.to_memorization == np.mean([b == "memorization" for b, _ in seen["memorization"]])
        assert row.memorized_form == np.mean([form for _, form in seen["memorization"]])
        assert row.to_memorization_other == np.mean([b == "other" and not form for b, form in seen["memorization"]])
    assert max(row.to_generalization for row in rows) > 0


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_sweep_of_patches_is_each_patch_evaluated_alone(known, alone, use_cache):
    rows = mg.sweep_steering(
        known.model,
        None,
        known.pairs,
        known.score,
        top_fractions=[planted.ONE_NEURON, 0.5],
        alphas=[1.0, 2.0, 3.0],
        layers=[None, [1]],
        mode="patch",
        source=known.acts,
        use_cache=use_cache,
    )
    assert [(r.setting.alpha, r.setting.positions, r.setting.mode) for r in rows] == [(None, "prompt", "patch")] * 4
    for row in rows:
        assert measured(row) == alone(known.score, row)
    assert [row.to_generalization for row in rows] == [1] * 4


def test_layers_restrict_a_row_to_where_the_planted_neuron_is_or_is_not(known):
    rows = mg.sweep_steering(
        known.model, None, known.pairs, known.score, top_fractions=[0.2], layers=[[0], [1], [0, 1], None, []]
    )
    assert [row.layers for row in rows] == [(0,), (1,), (0, 1), None, ()]
    assert [row.to_generalization for row in rows] == [0, 1, 1, 1, 0]
    assert rows[2] == replace(rows[3], layers=(0, 1), share=0.2), "all of the neurons are in these layers"
    patches = mg.sweep_steering(
        known.model,
        None,
        known.pairs,
        known.score,
        top_fractions=[0.2],
        layers=[[0], [1]],
        mode="patch",
        source=known.acts,
    )
    assert [row.to_memorization for row in patches] == [0, 1]


def test_the_test_pairs_are_not_asked(known):
    """Their prompts hold a character that the tokenizer lacks: asking them would raise."""
    test = known.pairs.split == "test"

    def spoil(items):
        return tuple(replace(item, prompt="?") if hidden else item for item, hidden in zip(items, test, strict=True))

    pairs = replace(known.pairs, memorized=spoil(known.pairs.memorized), generalized=spoil(known.pairs.generalized))
    arguments = {"top_fractions": [planted.ONE_NEURON, 0.5]}
    spoiled = mg.sweep_steering(known.model, None, pairs, known.score, **arguments)
    assert spoiled == mg.sweep_steering(known.model, None, known.pairs, known.score, **arguments)
    assert spoiled[0].n == np.sum(known.pairs.split == "tune")


def test_another_split_can_be_swept(known):
    (row,) = mg.sweep_steering(known.model, None, known.pairs, known.score, top_fractions=[0.1], split="select")
    assert row.n == np.sum(known.pairs.split == "select")


def test_the_planted_model_is_steered_best_by_its_one_neuron(known):
    rows = mg.sweep_steering(
        known.model,
        None,
        known.pairs,
        known.score,
        top_fractions=[0.5, planted.ONE_NEURON, 0.1],
        alphas=[0.1, 1.0, 2.0],
    )
    chosen = mg.choose_setting(rows)
    assert chosen.setting == SteeringSetting("post", planted.ONE_NEURON, 1.0, "answer")
    assert chosen.to_generalization == chosen.to_memorization == 1


# The choice


def test_the_largest_shift_without_other_outputs_is_chosen():
    rows = [row(0.1, 1.0, 0.6, 0.0, 0.6, 0.0), row(0.2, 2.0, 0.9, 0.05, 0.9, 0.0), row(0.3, 4.0, 1.0, 0.5, 1.0, 0.0)]
    assert mg.choose_setting(rows) is rows[1]


def test_both_directions_count_alike():
    one_way, other_way, both = row(0.1, 1.0, 1, 0, 0, 0), row(0.1, 2.0, 0, 0, 1, 0), row(0.5, 6.0, 0.8, 0, 0.8, 0)
    assert mg.choose_setting([one_way, other_way, both]) is both


def test_other_outputs_count_against_either_direction():
    broken_there, broken_back, whole = (
        row(0.1, 1.0, 1, 0.6, 1, 0),
        row(0.1, 2.0, 1, 0, 1, 0.6),
        row(0.5, 6.0, 0.9, 0, 0.9, 0),
    )
    assert mg.choose_setting([broken_there, broken_back, whole]) is whole


def test_towards_memorization_the_form_counts_and_not_exact_recall():
    recalls, forms = row(0.1, 1.0, 0.5, 0, 0.5, 0, recall=0.5), row(0.5, 6.0, 0.5, 0, 0.9, 0, recall=0.0)
    assert mg.choose_setting([recalls, forms]) is forms


def test_among_equals_the_gentlest_is_chosen():
    """Within one item of the best in either direction, the smallest fraction times alpha."""
    harsh = row(0.3, 4.0, 0.9, 0.0, 0.9, 0.0)
    gentle = row(0.1, 2.0, 0.89, 0.01, 0.9, 0.0)  # one prompt of 100 goes from shifted to other
    gentler_but_worse = row(0.05, 1.0, 0.88, 0.01, 0.9, 0.0)
    assert mg.choose_setting([harsh, gentle, gentler_but_worse]) is gentle
    assert mg.choose_setting([gentler_but_worse, gentle, harsh]) is gentle


def test_as_gentle_ones_are_told_apart_by_their_gain():
    worse, better = row(0.1, 2.0, 0.89, 0.0, 0.9, 0.0), row(0.2, 1.0, 0.9, 0.0, 0.9, 0.0)
    assert mg.choose_setting([worse, better]) is mg.choose_setting([better, worse]) is better


def test_one_direction_alone_can_be_chosen_for():
    there, back = row(0.1, 1.0, 0.9, 0, 0.0, 0.5), row(0.1, 1.0, 0.0, 0.9, 0.8, 0.1)
    both, harsh = row(0.1, 1.0, 0.5, 0, 0.5, 0), row(0.1, 2.0, 0.91, 0, 0.0, 0.5)
    rows = [there, back, both, harsh]
    assert mg.choose_setting(rows) is both
    assert mg.choose_setting(rows, toward="generalization") is there  # within one item of the harsher one
    assert mg.choose_setting(rows, toward="memorization") is back


def test_patches_are_chosen_by_their_fraction():
    wide, narrow = row(0.5, None, 0.9, 0, 0.9, 0), row(0.1, None, 0.9, 0, 0.9, 0)
    assert mg.choose_setting([wide, narrow]) is narrow


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 20)] * 4, st.integers(1, 10), st.integers(1, 6)), min_size=1, max_size=12))
def test_no_row_is_clearly_better_than_the_chosen_one_or_as_good_and_gentler(drawn):
    rows = [
        row(fraction / 10, float(alpha), there / 40, broken / 40, form / 40, other / 40, n=40)
        for there, broken, form, other, fraction, alpha in drawn
    ]
    chosen = mg.choose_setting(rows)

    def gain(r):
        return r.to_generalization - r.to_generalization_other + r.memorized_form - r.to_memorization_other

    def force(r):
        return r.setting.top_fraction * r.setting.alpha

    best = max(map(gain, rows))
    assert chosen in rows and gain(chosen) >= best - 2 / 40 - 1e-9
    assert not any(gain(r) >= best - 2 / 40 and force(r) < force(chosen) for r in rows)


# What is refused


def test_no_rows_to_choose_from_are_refused():
    with pytest.raises(SettingsError, match=r"choose_setting\(rows=...\): expected at least one value; received \[\]"):
        mg.choose_setting([])


@pytest.mark.parametrize("empty", ["top_fractions", "alphas", "layers", "positions"])
def test_an_empty_list_of_anything_is_refused(known, empty):
    with pytest.raises(SettingsError, match=rf"\({empty}=...\): expected at least one value; received \[\]"):
        mg.sweep_steering(known.model, None, known.pairs, known.score, **({"top_fractions": [0.1]} | {empty: []}))


def test_no_scores_at_all_are_refused(known):
    with pytest.raises(SettingsError, match="at least one value; received"):
        mg.sweep_steering(known.model, None, known.pairs, [], top_fractions=[0.1])


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"top_fractions": [0.1, 1.5]}, "top_fraction"),
        ({"alphas": [1.0, 0.0]}, "alpha"),
        ({"layers": [[7]]}, "layers"),
        ({"mode": "patch"}, "source=record"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_runs(known, values, name):
    with pytest.raises(SettingsError, match=rf"{name}"):
        refuse = {"fwd_hooks": [("hook_embed", lambda activation, hook: pytest.fail("it was run"))]}
        with known.model.hooks(**refuse):
            mg.sweep_steering(known.model, None, known.pairs, known.score, **({"top_fractions": [0.1]} | values))


def test_fewer_than_eight_tune_pairs_are_refused(known):
    with pytest.raises(PairsError, match="split 'tune': expected at least 8 pairs"):
        mg.sweep_steering(known.model, None, known.pairs.take(np.arange(20)), known.score, top_fractions=[0.1])
