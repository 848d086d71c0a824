"""The cost curve beside each of its points evaluated alone, and side effects counted by hand."""

from dataclasses import replace

import numpy as np
import planted
import planted_tasks
import pytest
import torch
from planted_judge import PlantedTask

import memgen_lens as mg
from memgen_lens.core.cost_records import STEERED
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.steering_records import SideEffects, SteeringRates, SteeringTable

ALPHAS = (0.3, 1.0, 2.5)
QUIET = {"progress": False}
WAYS = ("generalization", "memorization")


def steering(known, kind, alpha):
    if kind == "clusters":
        return mg.Steering.from_activations(known.score, known.acts, 0.1, alpha, n_clusters=2)
    return mg.Steering.from_scores(known.score, 0.1, alpha, mode=kind, source=known.acts)


@pytest.fixture(scope="module")
def task():
    return PlantedTask()


@pytest.fixture(scope="module")
def cost(known, task):
    return mg.steering_cost(known.model, task, known.pairs, steering(known, "shift", 2.0), alphas=ALPHAS, **QUIET)


@pytest.mark.parametrize("kind", ["shift", "scale", "clusters"])
def test_every_point_is_its_strength_evaluated_alone_and_so_are_the_controls(known, task, kind):
    steer = steering(known, kind, 2.0)
    cost = mg.steering_cost(known.model, task, known.pairs, steer, alphas=reversed(ALPHAS), **QUIET)
    assert cost.alphas == ALPHAS and cost.setting == steer.setting
    for i, alpha in enumerate(ALPHAS):
        table = mg.evaluate_steering(known.model, task, known.pairs, steering(known, kind, alpha), **QUIET)
        for way, rates in zip(WAYS, (table.to_generalization, table.to_memorization), strict=True):
            curves = cost.curves[way]
            assert list(curves) == [STEERED, *rates.controls]
            for name in ("shift", "memorized_form", "stayed", "other"):
                band, rate = getattr(curves[STEERED], name), getattr(rates, name)
                assert (band.mean[i], band.low[i], band.high[i]) == pytest.approx((rate["rate"], *rate["ci95"]))
            lost, kl = table.side_effects.lost[way], curves[STEERED].kl_nats
            loss = curves[STEERED].heldout_loss
            assert (loss.mean[i], loss.low[i], loss.high[i]) == pytest.approx((lost["loss"], *lost["ci95"]))
            measured = (
                table.side_effects.kl_nats if way == "generalization" else table.side_effects.kl_nats_to_memorization
            )
            assert kl.mean[i] == pytest.approx(measured, rel=1e-4, abs=1e-7)
            for name, control in rates.controls.items():
                curve = curves[name]
                assert curve.n_draws == control["n_draws"] == 20
                for figure, block in (("shift", control), ("other", control["other"])):
                    band = getattr(curve, figure)
                    assert (band.mean[i], band.low[i], band.high[i]) == pytest.approx((block["mean"], *block["ci95"]))


def test_the_planted_neuron_reaches_all_at_the_cost_of_the_prompts_that_need_it(cost):
    curve = cost.curves["generalization"][STEERED]
    assert list(curve.shift.mean) == [0, 1, 1] and list(curve.heldout_loss.mean) == [0, 0.25, 0.25]
    assert (cost.n, cost.n_items, cost.n_heldout, cost.heldout, cost.why) == (24, 24, 16, 1.0, None)
    assert cost.curves["generalization"]["low_correlation"].shift.mean.max() == 0


def test_a_controls_loss_is_the_mean_over_its_draws(known, task, cost):
    from memgen_lens.analysis.steering.controls import control_draws
    from memgen_lens.analysis.steering.generation import steered_outputs

    draws = control_draws(steering(known, "shift", 2.5), "random_neurons", 20, np.random.default_rng(0))
    items = task.items("heldout")
    outputs = steered_outputs(known.model, [i.prompt for i in items], draws, toward="memorization", max_new_tokens=2)
    losses = [1 - np.mean([o == i.rule_answer for i, o in zip(items, row, strict=True)]) for row in outputs]
    band = cost.curves["memorization"]["random_neurons"].heldout_loss
    assert band.mean[2] == pytest.approx(np.mean(losses))
    assert (band.low[2], band.high[2]) == pytest.approx(tuple(np.quantile(losses, [0.025, 0.975])))


def test_kl_is_that_of_each_prompt_alone_both_ways(known, task):
    steer, prompts = steering(known, "shift", 1.0), [item.prompt for item in task.items("heldout")]
    effects = mg.evaluate_steering(known.model, task, known.pairs, steer, **QUIET).side_effects
    for way, kl in zip(WAYS, (effects.kl_nats, effects.kl_nats_to_memorization), strict=True):
        by_hand = []
        for prompt in prompts:
            tokens = known.model.to_tokens(prompt)
            with torch.no_grad():
                plain = known.model(tokens)[0, -1].double().log_softmax(-1)
                with steer.applied(known.model, toward=way):
                    changed = known.model(tokens)[0, -1].double().log_softmax(-1)
            by_hand.append(float((plain.exp() * (plain - changed)).sum()))
        assert kl == pytest.approx(np.mean(by_hand), rel=1e-4, abs=1e-8)
    assert effects.ci95["kl_nats"][0] <= effects.kl_nats <= effects.ci95["kl_nats"][1]


@pytest.mark.parametrize("positions", ["all", "generated"])
def test_kl_of_steering_elsewhere_is_that_of_the_steered_model(known, task, positions):
    steer = mg.Steering.from_scores(known.score, 0.3, 2.0, positions=positions)
    effects = mg.evaluate_steering(known.model, task, known.pairs, steer, **QUIET).side_effects
    by_hand = []
    for item in task.items("heldout"):
        tokens = known.model.to_tokens(item.prompt)
        with torch.no_grad():
            plain = known.model(tokens)[0, -1].double().log_softmax(-1)
            with steer.applied(known.model, toward="memorization"):
                changed = known.model(tokens)[0, -1].double().log_softmax(-1)
        by_hand.append(float((plain.exp() * (plain - changed)).sum()))
    assert effects.kl_nats_to_memorization == pytest.approx(np.mean(by_hand), rel=1e-4, abs=1e-8)
    assert (np.mean(by_hand) == 0) == (positions == "generated")


def test_users_pairs_have_a_curve_without_held_out_prompts_and_say_why(known):
    steer = steering(known, "shift", 1.0)
    cost = mg.steering_cost(known.model, None, known.pairs, steer, alphas=1.0, toward="memorization", **QUIET)
    assert list(cost.curves) == ["memorization"] and cost.n_heldout == 0 and cost.heldout is None
    assert cost.why == "a user's pairs name no held-out prompts"
    assert np.isnan(cost.curves["memorization"][STEERED].heldout_loss.mean).all()
    assert cost.curves["memorization"][STEERED].shift.mean == [1]


def test_a_curve_is_saved_and_read_back(cost, known, tmp_path):
    path = cost.save(tmp_path / "new")
    for there in (path, tmp_path / "new"):
        assert mg.SteeringCost.load(there).rows() == cost.rows()
    assert len(cost.rows()) == 2 * 4 * 3
    user = mg.steering_cost(known.model, None, known.pairs, steering(known, "shift", 1.0), alphas=[1.0], **QUIET)
    again = mg.SteeringCost.load(user.save(tmp_path))
    assert np.isnan(again.curves["memorization"][STEERED].kl_nats.high).all() and again.why == user.why
    path.write_text("[]")
    with pytest.raises(RunDirectoryError, match="content that is not its own"):
        mg.SteeringCost.load(path)


def test_what_has_no_strength_has_no_curve(known, task):
    patch = mg.Steering.from_scores(known.score, 0.1, mode="patch", source=known.acts)
    with pytest.raises(SettingsError, match=r"steering_cost: expected a steering that has a strength; received mode"):
        mg.steering_cost(known.model, task, known.pairs, patch)
    with pytest.raises(SettingsError, match="n_controls of at least 20"):
        mg.steering_cost(known.model, task, known.pairs, steering(known, "shift", 1.0), n_controls=2)


# What else is said, and task by task


def test_other_outputs_are_counted_and_the_most_frequent_come_first(known):
    """With answers that the model never gives, what it says steered is neither of them."""

    def renamed(items):
        return tuple(replace(item, memorized_answer=None, rule_answer=None) for item in items)

    steer = mg.Steering.from_scores(known.score, planted.ONE_NEURON, 2.0)
    pairs = replace(known.pairs, memorized=renamed(known.pairs.memorized), generalized=renamed(known.pairs.generalized))
    table = mg.evaluate_steering(known.model, None, pairs, steer, **QUIET)
    assert table.to_generalization.others == ()
    task = PlantedTask()
    odd = [item.key % 3 == 0 for item in known.pairs.memorized]
    task.classify = lambda item, output: (
        mg.Behavior.OTHER if output == "r" and item.key % 3 == 0 and "M" in item.prompt else item.classify(output)
    )
    table = mg.evaluate_steering(known.model, task, known.pairs, steer, **QUIET)
    (said,) = table.to_generalization.others
    of_test = sum(odd[i] for i in np.flatnonzero(known.pairs.split == "test"))
    assert said == {"output": "r", "count": of_test, "memorized_form": False}
    assert table.to_generalization.other["k"] == of_test
    assert 0 < table.to_generalization.controls["random_sign"]["other"]["mean"] < 1


def test_a_steering_found_on_one_task_is_judged_on_each():
    """Task a's neuron switches task a and leaves task b alone."""
    model, pairs = planted_tasks.build_model(shared=False), planted_tasks.prompt_pairs(40)
    acts = mg.record(model, pairs, ["post"], **QUIET)
    score = mg.attribute(acts.of_task("a"), "post")
    steer = mg.Steering.from_scores(score, planted_tasks.ONE_NEURON, 2.0)
    table = mg.evaluate_steering(model, None, pairs, steer, **QUIET)
    shifted = {name: {way: rates.shift["rate"] for way, rates in ways.items()} for name, ways in table.by_task.items()}
    assert shifted == {
        "a": {"to_generalization": 1, "to_memorization": 1},
        "b": {"to_generalization": 0, "to_memorization": 0},
    }
    for name, ways in table.by_task.items():
        alone = mg.evaluate_steering(model, None, pairs.of_task(name), steer, **QUIET)
        assert ways["to_memorization"] == replace(alone.to_memorization, examples=())
        assert alone.by_task == {}


def test_side_effects_are_told_task_by_task_where_there_are_several(known):
    task = PlantedTask(heldout=(12, 8), names=("one", "two"))
    steer = mg.Steering.from_scores(known.score, planted.ONE_NEURON, 2.0)
    effects = mg.evaluate_steering(known.model, task, known.pairs, steer, **QUIET).side_effects
    assert {name: part.n for name, part in effects.by_task.items()} == {"one": 10, "two": 10}
    assert effects.lost["generalization"]["loss"] == pytest.approx(0.4) and effects.n_items == 20
    for part in effects.by_task.values():
        assert part.heldout_generalization_steered == pytest.approx(0.6) and part.by_task == {}
        assert part.ci95["heldout_generalization"] == [pytest.approx(0.722, abs=1e-3), 1.0]


def test_what_was_written_before_is_read_without_what_is_new(known, task):
    steer = steering(known, "shift", 1.0)
    table = mg.evaluate_steering(known.model, task, known.pairs, steer, **QUIET)
    from memgen_lens.core.files import with_nulls

    value = with_nulls(table)
    assert SteeringTable.from_json(value) == table
    for block, kind in (("side_effects", SideEffects), ("to_generalization", SteeringRates)):
        new = ("kl_nats_to_memorization", "n_items", "ci95", "lost", "by_task") if kind is SideEffects else ("others",)
        value[block] = {name: entry for name, entry in value[block].items() if name not in new}
    del value["by_task"]
    old = SteeringTable.from_json(value)
    assert (old.side_effects.lost, old.side_effects.n_items, old.to_generalization.others) == ({}, None, ())
    assert old.side_effects.kl_nats == table.side_effects.kl_nats
