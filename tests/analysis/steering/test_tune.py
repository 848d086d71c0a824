"""Tuned steering on a model whose deciding neuron is known, and beside each of its settings tried alone."""

from dataclasses import replace

import numpy as np
import planted
import pytest
from planted_judge import PlantedTask

import memgen_lens as mg
from memgen_lens.analysis.steering.grid import candidates
from memgen_lens.analysis.steering.tune import search
from memgen_lens.core.errors import SettingsError, SiteError
from memgen_lens.core.tuning_records import SteeringObjective

GRID = {"top_fractions": [0.5, planted.ONE_NEURON, 0.1], "alphas": [0.1, 1.0, 2.0], "positions": ["answer"]}
QUIET = {"progress": False}
FLIPS_ALL = {"to_generalization": 1.0, "to_generalization_other": 0.0}


@pytest.fixture(scope="module")
def task():
    return PlantedTask()


@pytest.fixture(scope="module")
def tuned(known, task):
    return mg.tune_steering(known.model, task, known.acts, sites=["post"], toward="generalization", **GRID, **QUIET)


def searched(known, task, tried, *, pairs=None, toward="generalization", n_heldout=200, seed=0, **weights):
    how = {"toward": toward, "n_heldout": n_heldout, "seed": seed, "batch_size": 512, "progress": False}
    objective = SteeringObjective(**weights)
    return search(known.model, task, pairs or known.pairs, tried, objective=objective, **how)


@pytest.fixture(scope="module")
def tried(known):
    more = {"layers": [None], "mode": "shift", "source": known.acts, "sizes": None, "seed": 0, "call": "tune_steering"}
    return candidates([known.score], **GRID, **more)


def test_the_one_neuron_that_decides_is_chosen_by_its_gentlest_shift_that_flips(tuned):
    assert (tuned.chosen.setting.site, tuned.chosen.setting.top_fraction) == ("post", planted.ONE_NEURON)
    assert tuned.chosen.setting.alpha == 1.0 and tuned.chosen.to_generalization == 1
    assert tuned.steering.setting == tuned.chosen.setting == tuned.table.setting
    assert tuned.steering.selected[planted.LAYER, planted.NEURON] and tuned.steering.selected.sum() == 1
    assert len(tuned.rows) == 9 and tuned.why is None
    assert (tuned.heldout["k"], tuned.heldout["n"]) == (8, 8)


def test_the_loss_is_that_of_each_setting_on_the_validation_prompts_asked_alone(known, task, tuned):
    for row in tuned.rows:
        steer = mg.Steering.from_scores(known.score, row.setting.top_fraction, row.setting.alpha)
        right = []
        for item in task.items("validation"):
            with steer.applied(known.model, toward="generalization", prompt_length=len(item.prompt)):
                right.append(planted.greedy_by_hand(known.model, item.prompt, 2) == item.rule_answer)
        assert row.heldout_loss == pytest.approx(1 - np.mean(right))
        assert row.n_heldout == 8 and row.heldout_loss_to_memorization is None
    assert {row.heldout_loss for row in tuned.rows} >= {0.0, 0.25}  # two of eight prompts are those that recall answers


def test_a_loss_that_weighs_enough_chooses_to_leave_the_model_alone(known, task, tried):
    for weight, flips in ((0.0, 1.0), (3.5, 1.0), (4.1, 0.0)):  # a quarter of the prompts is lost where all flip
        found = searched(known, task, tried, heldout_loss=weight)
        assert found.rows[found.place].to_generalization == flips
    assert searched(known, task, tried, heldout_loss=1.0).rows == searched(known, task, tried, heldout_loss=9.0).rows


def test_both_ways_the_loss_towards_memorization_is_measured_and_by_default_not_counted(known, task, tried):
    found = searched(known, task, tried, toward=None)
    chosen = found.rows[found.place]
    assert chosen.memorized_form == 1 and chosen.heldout_loss_to_memorization == 0.75
    counted = searched(known, task, tried, toward=None, heldout_loss_to_memorization=9.0)
    assert counted.rows[counted.place].heldout_loss_to_memorization == 0


def test_validation_prompts_are_sampled_by_the_seed(known, task, tried):
    some = searched(known, task, tried, n_heldout=5, seed=3)
    assert some.heldout["n"] == 5 == some.rows[0].n_heldout
    assert some.rows == searched(known, task, tried, n_heldout=5, seed=3).rows


def test_no_test_prompt_is_asked_while_tuning(known, task, tried):
    """Theirs hold a character that the tokenizer lacks, and so do the task's held-out prompts: asking would raise."""
    test = known.pairs.split == "test"

    def spoil(items):
        return tuple(replace(item, prompt="?") if hidden else item for item, hidden in zip(items, test, strict=True))

    pairs = replace(known.pairs, memorized=spoil(known.pairs.memorized), generalized=spoil(known.pairs.generalized))
    spoiled = PlantedTask()
    spoiled.splits["heldout"] = tuple(replace(item, prompt="?") for item in spoiled.splits["heldout"])
    assert searched(known, spoiled, tried, pairs=pairs) == searched(known, task, tried)


def test_other_test_pairs_are_reported_and_change_nothing_that_was_tuned(known, task, tuned):
    test = np.flatnonzero(known.pairs.split == "test")
    kept = np.concatenate([np.flatnonzero(known.pairs.split != "test"), test[::2]])
    acts = mg.record(known.model, known.pairs.take(kept), ["post"], **QUIET)
    other = mg.tune_steering(known.model, task, acts, toward="generalization", **GRID, **QUIET)
    assert (other.rows, other.chosen) == (tuned.rows, tuned.chosen)
    assert (other.table.to_generalization.n, tuned.table.to_generalization.n) == (12, 24)


def test_the_report_is_the_chosen_steering_evaluated_on_test(known, task, tuned):
    table = mg.evaluate_steering(known.model, task, known.pairs, tuned.steering, **QUIET)
    assert table == tuned.table
    assert table.to_generalization.shift["rate"] == 1 and table.side_effects.n == 16


def test_every_kind_of_intervention_is_tried_and_patches_say_why_they_have_no_loss(known, task):
    tuned = mg.tune_steering(
        known.model,
        task,
        known.acts,
        sites=["post"],
        methods=["pearson", "nmd"],
        kinds=["shift", "scale", "clamp", "ablate", "patch", "clusters"],
        ablations=["zero", "mean"],
        sizes=[1],
        layers=[None, [1]],
        top_fractions=[planted.ONE_NEURON],
        alphas=[1.0, 2.0],
        positions=["answer", "prompt"],
        toward="generalization",
        **QUIET,
    )
    counts = {}
    for row in tuned.rows:
        counts[row.setting.mode, row.setting.how] = counts.get((row.setting.mode, row.setting.how), 0) + 1
    # Twice for both methods, both layers and (but of patches) both positions, of what has a strength for each alpha.
    by_mode = {"shift": 16, "scale": 16, "clusters": 16, "clamp": 8, "patch": 4}
    assert counts == {(mode, None): n for mode, n in by_mode.items()} | {("ablate", "zero"): 8, ("ablate", "mean"): 8}
    assert {row.setting.method for row in tuned.rows} == {"pearson", "nmd"}
    for row in tuned.rows:
        assert (row.heldout_loss is None) == (row.setting.mode == "patch")
        assert row.share == (None if row.layers is None else pytest.approx(planted.ONE_NEURON))
    assert tuned.why == "held-out prompts have no pair to patch from"
    # Zeroing the neuron makes every prompt compute, and costs what every other way to flip it costs.
    zeroed = next(row for row in tuned.rows if row.setting.how == "zero" and row.layers is None)
    assert (zeroed.to_generalization, zeroed.heldout_loss, zeroed.memorized_form) == (1, 0.25, 0)


def test_a_users_own_pairs_are_tuned_without_held_out_loss_and_say_so(known):
    tuned = mg.tune_steering(known.model, None, known.pairs, sites="post", **GRID, **QUIET)
    assert tuned.heldout is None and tuned.why == "a user's pairs name no held-out prompts"
    assert {row.heldout_loss for row in tuned.rows} == {None}
    swept = mg.sweep_steering(known.model, None, known.pairs, known.score, **GRID, **QUIET)
    assert tuned.rows == swept and tuned.chosen == mg.choose_setting(swept)


def test_tuning_leaves_no_hook(known, task):
    mg.tune_steering(known.model, task, known.acts, sites=["post"], top_fractions=[0.1], alphas=[1.0], **QUIET)
    assert planted.hooks_on(known.model) == {}


def test_what_cannot_be_tuned_is_refused(known, task):
    with pytest.raises(SettingsError, match=r"tune_steering: expected n_controls of at least 20; received 3\."):
        mg.tune_steering(known.model, task, known.acts, n_controls=3)
    with pytest.raises(SiteError, match="'z'"):
        mg.tune_steering(known.model, task, known.acts, sites=["z"])
    with pytest.raises(SettingsError, match=r"tune_steering\(kinds=...\)"):
        mg.tune_steering(known.model, task, known.acts, kinds=["direction"])
    with pytest.raises(SettingsError, match=r"tune_steering\(objective=...\): expected SteeringObjective as mg"):
        mg.tune_steering(known.model, task, known.acts, objective=1.0)
