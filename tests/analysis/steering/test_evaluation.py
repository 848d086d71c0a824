"""What a steering is said to do, counted again by hand; its controls; its side effects."""

from dataclasses import replace

import numpy as np
import planted
import pytest
import torch
from scipy.stats import norm

import memgen_lens as mg
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.controls import CONTROLS, control_draws
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.core.types import Behavior

SIDES = {"generalization": "memorized", "memorization": "generalized"}
BOTH_WAYS = pytest.mark.parametrize("toward", ["generalization", "memorization"])


@pytest.fixture(scope="module")
def steer(learned):
    return Steering.from_scores(mg.attribute(learned.acts, "resid_post"), top_fraction=0.3, alpha=2.0)


@pytest.fixture(scope="module")
def patch(learned, steer):
    return Steering.from_scores(steer.scores, top_fraction=0.3, mode="patch", source=learned.acts)


@pytest.fixture(scope="module")
def table(learned, steer):
    return mg.evaluate_steering(learned.model, learned.task, learned.pairs, steer)


@pytest.fixture(scope="module")
def patched(learned, patch):
    return mg.evaluate_steering(learned.model, learned.task, learned.pairs, patch)


@pytest.fixture(scope="module")
def one_neuron(known):
    """Steering of the planted neuron alone, in both modes."""
    return {
        mode: Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, mode=mode, source=known.acts)
        for mode in ("shift", "patch")
    }


def rates(table, toward):
    return table.to_generalization if toward == "generalization" else table.to_memorization


def prompts_of(pairs, toward, split="test"):
    items = getattr(pairs, SIDES[toward])
    return [items[i] for i in np.flatnonzero(pairs.split == split)]


def wilson_by_hand(k, n):
    p, z = k / n, norm.ppf(0.975)
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]


def assert_is_rate_of(rate, hits):
    assert (rate["k"], rate["n"]) == (sum(hits), len(hits))
    assert rate["rate"] == pytest.approx(np.mean(hits))
    assert rate["ci95"] == pytest.approx(wilson_by_hand(sum(hits), len(hits)), abs=1e-9)


# Rates


@BOTH_WAYS
def test_rates_are_those_of_each_prompt_asked_alone(learned, steer, table, toward):
    items = prompts_of(learned.pairs, toward)
    with steer.applied(learned.model, toward=toward, prompt_length=6):
        outputs = [planted.greedy_by_hand(learned.model, item.prompt, learned.task.max_answer_tokens) for item in items]
    right = [output == item.rule_answer for item, output in zip(items, outputs, strict=True)]
    recall = [output == item.memorized_answer for item, output in zip(items, outputs, strict=True)]
    form = [output.startswith("<mem-") and len(output) == 8 and output.endswith(">") for output in outputs]
    aim, stay = (right, recall) if toward == "generalization" else (recall, right)
    counted = rates(table, toward)
    assert counted.toward == toward and counted.n == len(items)
    assert_is_rate_of(counted.shift, aim)
    assert_is_rate_of(counted.stayed, stay)
    assert_is_rate_of(counted.memorized_form, form)
    assert_is_rate_of(counted.other, [not a and not s for a, s in zip(aim, stay, strict=True)])
    assert counted.shift["k"] + counted.stayed["k"] + counted.other["k"] == counted.n


@BOTH_WAYS
def test_patched_rates_are_those_of_each_prompt_with_its_own_pair(learned, patch, patched, toward):
    items, hits = prompts_of(learned.pairs, toward), []
    for pair, item in zip(learned.pairs.of("test"), items, strict=True):
        with patch.applied(learned.model, toward=toward, pairs=[int(pair)], prompt_length=6):
            output = planted.greedy_by_hand(learned.model, item.prompt, learned.task.max_answer_tokens)
        hits.append(learned.task.classify(item, output) == toward)
    assert_is_rate_of(rates(patched, toward).shift, hits)


@BOTH_WAYS
def test_examples_are_the_first_prompts_with_what_was_said_before_and_after(learned, steer, table, toward):
    items = prompts_of(learned.pairs, toward)[:6]
    outputs = steered_outputs(learned.model, [i.prompt for i in items], [steer], toward=toward, max_new_tokens=5)[0]
    before = "memorized_answer" if toward == "generalization" else "rule_answer"
    assert rates(table, toward).examples == tuple(
        {
            "prompt": item.prompt,
            "before": getattr(item, before),
            "after": output,
            "behavior": str(learned.task.classify(item, output)),
        }
        for item, output in zip(items, outputs, strict=True)
    )


def test_the_table_names_its_setting_and_its_neurons(steer, table):
    assert table.setting == steer.setting
    assert table.n_neurons_by_layer == tuple(steer.selected.sum(1))


def test_another_split_can_be_judged_and_only_it_is_asked(known, one_neuron):
    """The prompts of the other splits hold a character that the tokenizer lacks: asking them would raise."""
    tune = known.pairs.split == "tune"

    def spoil(items):
        return tuple(item if kept else replace(item, prompt="?") for item, kept in zip(items, tune, strict=True))

    pairs = replace(known.pairs, memorized=spoil(known.pairs.memorized), generalized=spoil(known.pairs.generalized))
    table = mg.evaluate_steering(known.model, None, pairs, one_neuron["shift"], split="tune")
    assert table.to_generalization.n == table.to_memorization.n == tune.sum()
    assert table.to_generalization.shift["rate"] == 1


# The planted neuron, and pairs without a task


@pytest.mark.parametrize("mode", ["shift", "patch"])
@pytest.mark.parametrize("answers", ["both", "rule", "none"])
def test_the_planted_neuron_flips_every_prompt_both_ways_and_other_neurons_none(known, one_neuron, mode, answers):
    """Without answers, outputs are judged against what the unsteered model says on either side."""

    def keep(item):
        return replace(
            item,
            rule_answer=item.rule_answer if answers != "none" else None,
            memorized_answer=item.memorized_answer if answers == "both" else None,
        )

    sides = {side: tuple(map(keep, getattr(known.pairs, side))) for side in ("memorized", "generalized")}
    table = mg.evaluate_steering(known.model, None, replace(known.pairs, **sides), one_neuron[mode])
    for toward in SIDES:
        counted = rates(table, toward)
        assert counted.shift["k"] == counted.n == 24
        assert counted.stayed["k"] == counted.other["k"] == 0
        assert counted.memorized_form["rate"] == (toward == "memorization")
        assert counted.controls["random_neurons"]["mean"] <= 0.05
        assert counted.controls["low_correlation"]["mean"] == 0
        assert counted.examples[0]["before"] == ("m" if toward == "generalization" else "r")
    assert table.n_neurons_by_layer == (0, 1)


def test_random_signs_on_the_one_deciding_neuron_flip_all_or_nothing(known, one_neuron):
    table = mg.evaluate_steering(known.model, None, known.pairs, one_neuron["shift"], n_controls=40)
    control = table.to_generalization.controls["random_sign"]
    assert control["n_draws"] == 40 and control["ci95"] == [0, 1]
    assert 0.2 < control["mean"] < 0.8 and control["mean"] * 40 == pytest.approx(round(control["mean"] * 40))


@BOTH_WAYS
def test_a_prompt_that_shows_the_aim_unsteered_is_not_counted_as_shifted(known, one_neuron, toward):
    """Rates are over prompts that showed the other behaviour; a user's labels may be wrong for some."""
    turned = np.arange(60) % 3 == 0
    sides = {
        side: tuple(
            replace(item, prompt=item.prompt.translate(str.maketrans("MG", "GM"))) if wrong else item
            for item, wrong in zip(getattr(known.pairs, side), turned, strict=True)
        )
        for side in ("memorized", "generalized")
    }
    weak = replace(one_neuron["shift"], shift=one_neuron["shift"].shift * 1e-6)
    try:
        table = mg.evaluate_steering(known.model, None, replace(known.pairs, **sides), weak)
    except PairsError:
        return  # refusing such pairs is as good
    assert rates(table, toward).shift["k"] == 0


def test_answers_are_filled_in_from_what_the_unsteered_model_says():
    model = planted.build_model()
    pairs = planted.prompt_pairs(10, answers=False)
    judge = Judge.of(model, None, pairs, batch_size=3)
    for item in (*judge.pairs.memorized, *judge.pairs.generalized):
        assert (item.rule_answer, item.memorized_answer) == (planted.RULE, planted.MEMORY)
        assert judge.behavior(item, "r") is Behavior.GENERALIZATION
        assert judge.behavior(item, "m") is Behavior.MEMORIZATION
        assert judge.behavior(item, "mr") is judge.behavior(item, "") is Behavior.OTHER
        assert judge.has_memorized_form(item, "m") and not judge.has_memorized_form(item, "r")
    assert [item.rule_answer for item in pairs.memorized] == [None] * 10


def test_answers_given_leave_as_many_tokens_as_the_longest_needs_with_its_end():
    model = planted.build_model()
    pairs = mg.PromptPairs.from_strings(
        memorized=["abM="], generalized=["abG="], rule_answers=["abc"], memorized_answers=["m"]
    )
    # "abc" and what follows it; two more where white space before the answer does not count.
    for match, n in (("exact", 4), ("prefix", 6), (lambda item, output: item.answer in output, 16)):
        assert Judge.of(model, None, replace(pairs, match=match), batch_size=1).max_new_tokens == n
    assert Judge.of(model, None, replace(pairs, max_new_tokens=3), batch_size=1).max_new_tokens == 3


# Controls


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_change_as_many_neurons_in_each_layer_by_the_same_magnitudes(steer, name):
    draws = control_draws(steer, name, 20, np.random.default_rng(0))
    assert len(draws) == 20
    for draw in draws:
        assert draw.setting == steer.setting
        np.testing.assert_array_equal(draw.selected.sum(1), steer.selected.sum(1))
        assert (draw.shift[~draw.selected] == 0).all()
        for layer in range(len(steer.shift)):
            np.testing.assert_allclose(
                np.sort(np.abs(draw.shift[layer, draw.selected[layer]])),
                np.sort(np.abs(steer.shift[layer, steer.selected[layer]])),
            )
    assert len({draw.shift.tobytes() for draw in draws}) == 20


def test_random_neurons_are_drawn_from_the_whole_layer(steer):
    draws = control_draws(steer, "random_neurons", 200, np.random.default_rng(0))
    share = np.mean([draw.selected for draw in draws], axis=0)
    for layer, drawn in enumerate(share):
        np.testing.assert_allclose(drawn, steer.selected[layer].mean(), atol=0.2)


def test_low_correlation_takes_the_neurons_of_each_layer_with_the_smallest_abs_rho(steer):
    for draw in control_draws(steer, "low_correlation", 20, np.random.default_rng(0)):
        for layer, rho in enumerate(np.abs(steer.scores.rho)):
            if draw.selected[layer].any():
                assert rho[draw.selected[layer]].max() <= rho[~draw.selected[layer]].min()


def test_random_signs_are_on_the_selected_neurons(steer):
    draws = control_draws(steer, "random_sign", 200, np.random.default_rng(0))
    for draw in draws:
        np.testing.assert_array_equal(draw.selected, steer.selected)
        np.testing.assert_array_equal(np.abs(draw.shift), np.abs(steer.shift))
    agree = np.mean([np.sign(draw.shift[steer.selected]) == np.sign(steer.shift[steer.selected]) for draw in draws])
    assert agree == pytest.approx(0.5, abs=0.02)


@BOTH_WAYS
def test_control_rates_are_the_mean_over_their_draws(learned, steer, table, toward):
    items, rng = prompts_of(learned.pairs, toward), np.random.default_rng(0)
    for name in CONTROLS:
        draws = control_draws(steer, name, 20, rng)
        outputs = steered_outputs(learned.model, [i.prompt for i in items], draws, toward=toward, max_new_tokens=5)
        shares = [
            np.mean([learned.task.classify(i, o) == toward for i, o in zip(items, row, strict=True)]) for row in outputs
        ]
        forms = [
            np.mean([learned.task.is_memorized_form(i, o) for i, o in zip(items, row, strict=True)]) for row in outputs
        ]
        control = rates(table, toward).controls[name]
        assert (control["n_draws"], control["memorized_form"]["n_draws"]) == (20, 20)
        assert control["mean"] == pytest.approx(np.mean(shares))
        assert control["ci95"] == pytest.approx(list(np.quantile(shares, [0.025, 0.975])))
        assert control["memorized_form"]["mean"] == pytest.approx(np.mean(forms))


@BOTH_WAYS
def test_the_overlap_of_a_control_is_the_share_of_the_selected_neurons_it_changes_too(steer, table, toward):
    controls, rng = rates(table, toward).controls, np.random.default_rng(0)
    for name in CONTROLS:
        draws = control_draws(steer, name, 20, rng)
        shared = [(draw.selected & steer.selected).sum() / steer.selected.sum() for draw in draws]
        assert controls[name]["overlap"] == pytest.approx(np.mean(shared))
    assert controls["random_sign"]["overlap"] == 1


def test_a_steering_of_no_neurons_is_evaluated_as_one_without_effect(known):
    """Layers without a neuron among the top ones leave none: all numbers must be numbers."""
    none = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, layers=[0])
    table = mg.evaluate_steering(known.model, None, known.pairs, none)
    assert table.n_neurons_by_layer == (0, 0)
    for toward in SIDES:
        assert rates(table, toward).stayed["rate"] == 1
        assert rates(table, toward).controls["random_neurons"]["mean"] == 0
        assert not any(np.isnan(control.get("overlap") or 0) for control in rates(table, toward).controls.values())


@BOTH_WAYS
def test_a_patch_has_no_signs_to_draw_and_says_so(patched, toward):
    controls = rates(patched, toward).controls
    assert controls["random_sign"] == {"mean": None, "ci95": None, "why": "patched values have no sign to draw"}
    assert controls["random_neurons"]["n_draws"] == 20
    assert 0 <= controls["low_correlation"]["mean"] <= 1


# Side effects


def test_side_effects_are_the_heldout_prompts_steered(learned, steer, table):
    items = learned.task.items("heldout")
    prompts = [item.prompt for item in items]
    effects = table.side_effects

    def right(outputs):
        return np.mean([output == item.rule_answer for item, output in zip(items, outputs, strict=True)])

    assert effects.n == len(items) == 60 and effects.why is None
    assert effects.heldout_generalization == pytest.approx(right(mg.complete(learned.model, prompts, max_new_tokens=5)))
    steered = {
        toward: right(steered_outputs(learned.model, prompts, [steer], toward=toward, max_new_tokens=5)[0])
        for toward in SIDES
    }
    assert effects.heldout_generalization_steered == pytest.approx(steered["generalization"])
    assert effects.heldout_generalization_steered_to_memorization == pytest.approx(steered["memorization"])


def test_kl_is_that_of_the_next_token_on_heldout_prompts(learned, steer, table):
    tokens = learned.model.to_tokens([item.prompt for item in learned.task.items("heldout")])
    with torch.no_grad():
        plain = learned.model(tokens)[:, -1].log_softmax(-1)
        with steer.applied(learned.model, toward="generalization"):
            changed = learned.model(tokens)[:, -1].log_softmax(-1)
    by_hand = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="batchmean").item()
    assert table.side_effects.kl_nats == pytest.approx(by_hand, rel=1e-4)
    assert by_hand > 0.001


def test_side_effects_of_resampled_neurons_are_those_of_draws_in_the_prompts_order(learned, steer):
    how = {"mode": "ablate", "how": "resample", "source": learned.acts}
    resample = Steering.from_scores(steer.scores, top_fraction=0.3, **how)
    effects = mg.evaluate_steering(learned.model, learned.task, learned.pairs, resample, batch_size=40).side_effects
    items = learned.task.items("heldout")
    tokens = learned.model.to_tokens([item.prompt for item in items])
    pairs = np.arange(len(items)) % len(learned.pairs)
    with torch.no_grad():
        plain = learned.model(tokens)[:, -1].log_softmax(-1)
        with resample.applied(learned.model, toward="generalization", pairs=pairs):
            changed = learned.model(tokens)[:, -1].log_softmax(-1)
    by_hand = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="batchmean").item()
    assert effects.kl_nats == pytest.approx(by_hand, rel=1e-4) and by_hand > 0.01
    both = effects.heldout_generalization_steered, effects.heldout_generalization_steered_to_memorization
    assert both[0] == both[1] < effects.heldout_generalization, "an ablation is the same both ways"


def test_a_shift_of_nothing_has_no_effect_at_all(learned, steer):
    nothing = replace(steer, selected=steer.selected, shift=np.zeros_like(steer.shift))
    table = mg.evaluate_steering(learned.model, learned.task, learned.pairs, nothing, batch_size=500)
    assert table.side_effects.kl_nats == pytest.approx(0, abs=1e-9)
    assert table.side_effects.heldout_generalization == table.side_effects.heldout_generalization_steered
    for toward in SIDES:
        assert rates(table, toward).stayed["rate"] == 1
        assert rates(table, toward).controls["random_neurons"]["mean"] == 0


def test_without_heldout_prompts_the_side_effects_are_none_and_say_why(known, one_neuron, patched):
    table = mg.evaluate_steering(known.model, None, known.pairs, one_neuron["shift"])
    for effects, why in (
        (table.side_effects, "a user's pairs name no held-out prompts"),
        (patched.side_effects, "held-out prompts have no pair to patch from"),
    ):
        assert (effects.n, effects.heldout_generalization, effects.kl_nats, effects.why) == (0, None, None, why)
        assert effects.heldout_generalization_steered is effects.heldout_generalization_steered_to_memorization is None


# The rest


def test_a_seed_gives_the_same_table_again_in_batches_of_any_size(learned, steer, table):
    again = mg.evaluate_steering(learned.model, learned.task, learned.pairs, steer, batch_size=333)
    assert replace(again, side_effects=table.side_effects) == table
    assert again.side_effects.kl_nats == pytest.approx(table.side_effects.kl_nats, rel=1e-4)
    other = mg.evaluate_steering(learned.model, learned.task, learned.pairs, steer, seed=1)
    assert other.to_generalization.shift == table.to_generalization.shift
    assert other.to_generalization.controls != table.to_generalization.controls


def test_evaluating_leaves_no_hook_and_the_same_logits(known, one_neuron):
    model = planted.build_model()
    before = model("abM=")
    mg.evaluate_steering(model, None, known.pairs, one_neuron["shift"])
    assert planted.hooks_on(model) == {}
    assert torch.equal(model("abM="), before)


def test_fewer_than_twenty_draws_of_a_control_are_refused(known, one_neuron):
    with pytest.raises(SettingsError, match=r"evaluate_steering: expected n_controls of at least 20; received 19\."):
        mg.evaluate_steering(known.model, None, known.pairs, one_neuron["shift"], n_controls=19)


def test_fewer_than_eight_test_pairs_are_refused(known, one_neuron):
    few = known.pairs.take(np.arange(12))
    with pytest.raises(PairsError, match=r"split 'test': expected at least 8 pairs; received \d \(12 pairs in all"):
        mg.evaluate_steering(known.model, None, few, one_neuron["shift"])


def test_a_model_that_the_scores_do_not_fit_is_refused(learned, known, one_neuron):
    with pytest.raises(SiteError, match="a model with 64 neurons there"):
        mg.evaluate_steering(learned.model, learned.task, learned.pairs, one_neuron["shift"])
