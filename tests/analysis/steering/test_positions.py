"""Steering at one position at a time, on a model in which it is known where that works, and against a loop."""

import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.core.records import NeuronScores
from memgen_lens.models import step

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


@pytest.fixture(scope="module")
def pairs():
    return planted.twin_pairs(60)


def steering(site, shape, layer, neuron, size):
    """A shift of one neuron, and of no other."""
    nmd = np.zeros(shape)
    nmd[layer, neuron] = size
    ones = np.ones(shape)
    return mg.Steering.from_scores(NeuronScores(site, nmd, np.sign(nmd), ones, ones, ones, 8, 8), 1 / nmd.size, 1.0)


def test_the_marker_can_be_changed_where_it_stands_and_the_decision_at_the_answer(model, pairs):
    marker = steering("resid_pre", (2, planted.D_MODEL), 0, planted.IS_M, 1.0)
    found = mg.steering_by_position(model, None, pairs, marker, **QUIET)
    test = pairs.of("test")
    n = len(found.tokens.position)
    for side, series in (("memorized", found.to_generalization), ("generalized", found.exact_recall)):
        prompts = [getattr(pairs, side)[i].prompt for i in test]
        for column, distance in enumerate(range(n, 0, -1)):
            some = [text for text in prompts if len(text) >= distance]
            at = sum(text[-distance] in "MG" for text in some)
            assert series.n[column] == len(some)
            assert series.rate[column] == at / len(some), (side, distance)
    decision = steering("post", (2, planted.D_MLP), planted.LAYER, planted.NEURON, 1.0)
    found = mg.steering_by_position(model, None, pairs, decision, **QUIET)
    for series in (found.to_generalization, found.exact_recall, found.memorized_form):
        assert series.rate.tolist() == [0] * (n - 1) + [1]
        assert ((series.low <= series.rate) & (series.rate <= series.high)).all()
    assert np.array_equal(found.tokens.n, found.to_generalization.n)
    assert not planted.hooks_on(model)


@pytest.fixture(scope="module")
def learned_steering(trained):
    pairs = mg.collect_pairs(trained.model, trained.task, seed=0, progress=False)
    acts = mg.record(trained.model, pairs, ["resid_post"], progress=False)
    score = mg.attribute(acts, "resid_post", n_permutations=0)
    shift = mg.Steering.from_scores(score, 0.1, 2.0, positions="prompt")
    rule = mg.Steering.from_activations(score, acts, 0.2, 1.0, n_clusters=3, layers=[0, 1], positions="prompt")
    return pairs, {"shift": shift, "clusters": rule}


@pytest.mark.parametrize("cached", [True, False])
def test_rates_are_those_of_a_loop(trained, learned_steering, cached, monkeypatch):
    """Each prompt alone, its whole text run anew for every token, with hooks of a few lines."""
    pairs, steer = learned_steering[0], learned_steering[1]["shift"]
    model = trained.model
    if not cached:
        monkeypatch.setattr(step, "keeps_past", lambda model: False)
    found = mg.steering_by_position(model, trained.task, pairs, steer, n_positions=3, **QUIET).to_generalization
    judge = Judge.of(model, trained.task, pairs, batch_size=64)
    items = judge.side("generalization", judge.flipping(model, pairs.of("test"), batch_size=64))
    assert found.n.tolist() == [len(items)] * 3
    for column, distance in ((0, 3), (2, 1)):
        hits = []
        for item in items:
            place = model.to_tokens(item.prompt).shape[1] - distance

            def push(layer, place=place):
                shift = torch.as_tensor(-steer.shift[layer], dtype=torch.float32)

                def hook(activation, hook):
                    activation = activation.clone()
                    activation[:, place] += shift
                    return activation

                return hook

            hooks = [(f"blocks.{layer}.hook_resid_post", push(layer)) for layer in range(model.cfg.n_layers)]
            with model.hooks(fwd_hooks=hooks):
                said = planted.greedy_by_hand(model, item.prompt, judge.max_new_tokens)
            hits.append(judge.behavior(item, said) is mg.Behavior.GENERALIZATION)
        assert found.rate[column] == pytest.approx(np.mean(hits), abs=1 / len(items) + 1e-9)
    assert found.rate[2] > found.rate[0], "steering works where it was measured"


@pytest.mark.parametrize("kind", ["shift", "clusters"])
def test_at_the_answer_position_it_is_steering_of_the_prompt_alone(trained, learned_steering, kind):
    pairs, steer = learned_steering[0], learned_steering[1][kind]
    found = mg.steering_by_position(trained.model, trained.task, pairs, steer, n_positions=1, **QUIET)
    table = mg.evaluate_steering(trained.model, trained.task, pairs, steer, **QUIET)
    for series, shift in (
        (found.to_generalization, table.to_generalization.shift),
        (found.exact_recall, table.to_memorization.shift),
        (found.memorized_form, table.to_memorization.memorized_form),
    ):
        assert [series.low[0], series.high[0]] == pytest.approx(shift["ci95"])
        assert (series.rate[0], series.n[0], series.n_items[0]) == (shift["rate"], shift["n"], shift["n_items"])


def test_small_batches_give_the_same(model, pairs):
    marker = steering("resid_pre", (2, planted.D_MODEL), 0, planted.IS_M, 1.0)
    found, small = (
        mg.steering_by_position(model, None, pairs, marker, batch_size=size, **QUIET) for size in (2048, 19)
    )
    for name in ("to_generalization", "exact_recall", "memorized_form"):
        assert np.array_equal(getattr(found, name).rate, getattr(small, name).rate)


def test_what_cannot_be_steered_is_refused(model, pairs):
    acts = mg.record(model, pairs, ["post"], progress=False)
    patch = mg.Steering.from_scores(mg.attribute(acts, "post", n_permutations=0), 0.1, mode="patch", source=acts)
    with pytest.raises(SettingsError, match=r"steering_by_position: .*received mode='patch'.*patching_map"):
        mg.steering_by_position(model, None, pairs, patch)
    marker = steering("resid_pre", (2, planted.D_MODEL), 0, planted.IS_M, 1.0)
    with pytest.raises(PairsError, match="at least 8 pairs"):
        mg.steering_by_position(model, None, pairs.take(np.arange(12)), marker, **QUIET)
    with pytest.raises(SiteError):
        mg.steering_by_position(model, None, pairs, steering("post", (3, 9), 0, 0, 1.0), **QUIET)
    assert not planted.hooks_on(model)
