"""The objective of tuned steering by hand, the choice by it, and what is saved."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

import memgen_lens as mg
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.stats import paired_loss
from memgen_lens.core.steering_records import SteeringSetting, SweepRow

TABLE = {  # fraction, alpha, shift, other, form, other (to memorization), held-out loss, to memorization
    "gentle": (0.1, 1.0, 0.50, 0.00, 0.60, 0.10, 0.00, 0.60),
    "strong": (0.2, 2.0, 0.90, 0.05, 0.80, 0.10, 0.20, 0.80),
    "harsh": (0.5, 4.0, 0.95, 0.05, 0.90, 0.05, 0.60, 0.90),
}


def row(name, **changed):
    fraction, alpha, shift, other, form, form_other, loss, loss_back = TABLE[name]
    made = SweepRow(
        SteeringSetting("post", fraction, alpha, "answer"), None, 40, 40, shift, other, 0.0, form, form_other
    )
    return replace(made, heldout_loss=loss, heldout_loss_to_memorization=loss_back, n_heldout=200, **changed)


ROWS = [row(name) for name in TABLE]


def test_the_objective_of_a_tiny_table_is_what_it_is_by_hand():
    plain = mg.SteeringObjective()
    assert [plain.value(r, "generalization") for r in ROWS] == pytest.approx([0.5, 0.65, 0.3])
    assert [plain.value(r, "memorization") for r in ROWS] == pytest.approx([0.5, 0.7, 0.85])
    assert [plain.value(r) for r in ROWS] == pytest.approx([1.0, 1.35, 1.15])
    weighted = mg.SteeringObjective(other=2.0, heldout_loss=3.0, heldout_loss_to_memorization=0.5)
    assert [weighted.value(r, "generalization") for r in ROWS] == pytest.approx([0.5, 0.2, -0.95])
    assert [weighted.value(r, "memorization") for r in ROWS] == pytest.approx([0.1, 0.2, 0.35])


def test_a_loss_that_was_not_measured_counts_as_none():
    unknown = replace(ROWS[1], heldout_loss=None, heldout_loss_to_memorization=None)
    assert mg.SteeringObjective(heldout_loss=9, heldout_loss_to_memorization=9).value(unknown) == pytest.approx(1.55)


@pytest.mark.parametrize(("weight", "chosen"), [(0.0, "harsh"), (1.0, "strong"), (5.0, "gentle")])
def test_the_weight_of_the_loss_decides_how_hard_is_pushed(weight, chosen):
    objective = mg.SteeringObjective(heldout_loss=weight)
    assert mg.choose_setting(ROWS, toward="generalization", objective=objective) == row(chosen)


def test_the_choice_by_default_is_that_of_a_plain_sweep_where_no_loss_is_known():
    plain = [replace(r, heldout_loss=None, heldout_loss_to_memorization=None) for r in ROWS]
    assert mg.choose_setting(plain) == max(plain, key=lambda r: r.gain)


def test_within_one_item_the_smallest_intervention_is_chosen_layers_counted():
    best, fewer = row("strong"), row("strong", layers=(1,), share=0.05, to_generalization=0.876)  # 1 item of 40
    assert mg.choose_setting([best, fewer], toward="generalization") is fewer
    assert mg.choose_setting([best, replace(fewer, to_generalization=0.874)], toward="generalization") is best
    assert fewer.strength == pytest.approx(0.1)


def test_ties_can_be_narrower_or_wider_than_an_item():
    best, gentle = row("strong"), row("strong", layers=(1,), share=0.05, to_generalization=0.86)  # 1.6 items of 40
    for ties, chosen in ((0.0, best), (1.0, best), (2.0, gentle)):
        objective = mg.SteeringObjective(ties=ties)
        assert mg.choose_setting([best, gentle], toward="generalization", objective=objective) is chosen
    equal = replace(gentle, to_generalization=best.to_generalization)
    assert mg.choose_setting([best, equal], objective=mg.SteeringObjective(ties=0)) is equal


@pytest.mark.parametrize("weight", [-1.0, float("nan"), "much"])
def test_weights_that_are_none_are_refused(weight):
    with pytest.raises(SettingsError, match="heldout_loss"):
        mg.SteeringObjective(heldout_loss=weight)


def test_a_record_is_saved_and_read_back_and_another_objective_asked(tmp_path, samples_tuned):
    path = samples_tuned.save(tmp_path / "new")
    assert mg.TunedSteering.load(tmp_path / "new") == mg.TunedSteering.load(path) == samples_tuned
    assert samples_tuned.choose(mg.SteeringObjective(heldout_loss=0)) == row("harsh")
    path.write_text('{"rows": 3}')
    with pytest.raises(RunDirectoryError, match="content that is not its own"):
        mg.TunedSteering.load(path)


@pytest.fixture
def samples_tuned():
    import made_up

    return replace(made_up.tuned(), rows=tuple(ROWS), chosen=ROWS[1], toward="generalization")


# The interval of an accuracy lost


def test_unpaired_cases_have_newcombes_interval_of_two_independent_rates():
    """With no correlation between before and after, phi is 0 and the ends are those of the unpaired hybrid."""
    before, after = np.repeat([True, True, False, False], 20), np.tile([True, False], 40)
    found = paired_loss(before, after)

    def ends(k, n):
        p, z = k / n, norm.ppf(0.975)
        middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)

    low, high = ends(40, 80)
    reach = np.sqrt((0.5 - low) ** 2 + (high - 0.5) ** 2)
    assert found["loss"] == 0 and found["n"] == found["n_items"] == 80
    assert found["ci95"] == pytest.approx([-reach, reach], abs=1e-9)


def test_cases_that_stay_have_a_narrower_interval_but_one_of_some_width():
    before = np.arange(100) < 90
    low, high = paired_loss(before, before)["ci95"]
    assert low < 0 < high and high - low < 0.1
    assert paired_loss(before, np.arange(100) < 60)["loss"] == pytest.approx(0.3)


def test_the_interval_holds_the_true_loss_in_about_95_of_100_cases():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        before = rng.random(60) < 0.9
        after = np.where(before, rng.random(60) < 0.85, rng.random(60) < 0.3)
        low, high = paired_loss(before, after)["ci95"]
        hits += low <= 0.9 - (0.9 * 0.85 + 0.1 * 0.3) <= high
    assert 0.92 <= hits / 400 <= 0.99


def test_rows_that_share_an_item_make_the_interval_wider():
    before, after = np.arange(80) < 70, np.arange(80) < 50
    alone, shared = paired_loss(before, after), paired_loss(before, after, np.arange(80) // 4)
    assert shared["n_items"] == 20
    assert np.diff(shared["ci95"]) > 1.5 * np.diff(alone["ci95"])
