"""Every intervention against a hook written by hand; where it acts while a model talks; nested; on both kinds."""

from dataclasses import replace

import helpers
import interventions
import numpy as np
import planted
import pytest
import torch
from interventions import MODES, N_NEW, N_PROMPT, hand_hooks, spoken, steering, where_of

import memgen_lens as mg
from memgen_lens.analysis.steering.controls import control_draws, controls_of
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.core.errors import PairsError, SettingsError, SiteError
from memgen_lens.models.tokens import decode

ALL = [*MODES, "direction"]
BOTH_WAYS = pytest.mark.parametrize("toward", ["generalization", "memorization"])
PLACES = pytest.mark.parametrize("positions", ["answer", "prompt", "generated", "all"])
KINDS = [
    pytest.param(False, marks=helpers.hooked_only, id="HookedTransformer"),
    pytest.param(True, id="native Bridge"),
]


@pytest.fixture(scope="module", params=KINDS)
def world(request):
    return interventions.talking(native=request.param)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=tolerance)


# One pass


@BOTH_WAYS
@pytest.mark.parametrize(
    ("name", "site"), [*((name, "post") for name in ALL), ("scale", "z"), ("clamp", "resid_post"), ("patch", "z")]
)
def test_it_is_run_with_hooks_with_a_hook_written_by_hand(world, name, site, toward):
    steer, pairs = steering(world, name, site), [5, 2, 20, 7, 0, 11, 29, 8]
    where = where_of(steer.setting.positions)
    by_hand = world.model.run_with_hooks(world.answered, fwd_hooks=hand_hooks(world, steer, name, toward, where, pairs))
    with steer.applied(world.model, toward=toward, pairs=pairs, prompt_length=N_PROMPT):
        close(world.model(world.answered), by_hand, 1e-6 * float(by_hand.abs().max()))
    assert planted.hooks_on(world.model) == {}
    assert not torch.allclose(by_hand, world.model(world.answered), atol=1e-2)


@PLACES
@pytest.mark.parametrize(("name", "toward"), [("clamp", "generalization"), ("resample", "memorization")])
def test_plain_hooks_do_in_one_pass_what_applied_does(world, name, positions, toward):
    steer = steering(world, name, positions=positions)
    for tokens, n_prompt in (
        (world.tokens, None),
        (world.answered, N_PROMPT),
        (world.answered, [6, 7, 8, 6, 7, 8, 6, 7]),
    ):
        how = {"toward": toward, "pairs": range(8), "prompt_length": n_prompt}
        with steer.applied(world.model, **how):
            inside = world.model(tokens)
        assert torch.equal(world.model.run_with_hooks(tokens, fwd_hooks=steer.hooks(world.model, **how)), inside)
    assert planted.hooks_on(world.model) == {}


def test_plain_hooks_steer_the_embedding_where_applied_cannot_know_the_position():
    model = interventions.talking_model(native=not helpers.HAS_HOOKED_TRANSFORMER)
    vector = np.arange(1.0, planted.D_MODEL + 1)
    steer = mg.Steering.from_direction(vector, site="embed", alpha=0.5, positions="all")
    seen = {}
    hooks = [*steer.hooks(model, toward="memorization"), ("hook_embed", lambda h, hook: seen.update(h=h.detach()))]
    model.run_with_hooks("abM=", fwd_hooks=hooks)
    model.run_with_hooks("abM=", fwd_hooks=[("hook_embed", lambda h, hook: seen.update(plain=h.detach()))])
    close(seen["h"], seen["plain"] + torch.as_tensor(0.5 * vector, dtype=torch.float32))


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_steered_as_each_prompt_alone(world, name):
    steer = steering(world, name)
    with steer.applied(world.model, toward="generalization", pairs=range(8)):
        batch = world.model(world.tokens)
    for row in (0, 5):
        with steer.applied(world.model, toward="generalization", pairs=[row]):
            close(world.model(world.tokens[[row]])[0], batch[row], 1e-5 * float(batch.abs().max()))


@pytest.mark.parametrize("name", ["scale", "clamp", "resample"])
def test_rows_of_any_length_are_steered_at_their_own_answer_position(world, name):
    steer, prompts = steering(world, name), ["abM=", "abcdeG=", "hM="]
    tokens = world.model.to_tokens(prompts)
    with steer.applied(world.model, toward="memorization", pairs=range(3)):
        batch = world.model(tokens)
    for row, prompt in enumerate(prompts):
        with steer.applied(world.model, toward="memorization", pairs=[row]):
            close(world.model(world.model.to_tokens(prompt))[0, -1], batch[row, len(prompt) - 1], 1e-4)


# While the model talks


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        *[("clamp", positions) for positions in ("answer", "prompt", "generated", "all")],
        *[("resample", positions) for positions in ("answer", "generated")],
        ("direction", "generated"),
        ("scale", "all"),
        ("shift", "generated"),
    ],
)
def test_generated_text_is_that_of_hooks_by_hand_cached_and_not(world, name, positions):
    steer = steering(world, name, positions=positions)
    by_hand = hand_hooks(world, steer, name, "memorization", where_of(positions), list(range(8)))
    with world.model.hooks(fwd_hooks=by_hand):
        expected = spoken(world.model, world.tokens)
    how = {"toward": "memorization", "pairs": range(8)}
    with steer.applied(world.model, **how):
        assert torch.equal(spoken(world.model, world.tokens), expected)
    arguments = {"max_new_tokens": N_NEW, "do_sample": False, "verbose": False, "return_type": "tokens"}
    if helpers.HAS_HOOKED_TRANSFORMER and type(world.model).__name__ == "HookedTransformer":
        for use_cache in (True, False):
            with steer.applied(world.model, **how, **({} if use_cache else {"prompt_length": N_PROMPT})):
                said = world.model.generate(world.tokens, use_past_kv_cache=use_cache, **arguments)
            assert torch.equal(said[:, N_PROMPT:], expected)
    prompts = [item.prompt for item in world.pairs.memorized[:8]]
    how |= {"pairs": np.arange(8), "max_new_tokens": N_NEW}
    for use_cache in (True, False):
        said = steered_outputs(world.model, prompts, [steer], use_cache=use_cache, **how)
        assert said == [decode(world.model, expected)]
    with helpers.watched(world.model):  # TransformerLens' own forward, with its cache
        assert steered_outputs(world.model, prompts, [steer], **how) == [decode(world.model, expected)]
    assert not torch.equal(expected, spoken(world.model, world.tokens))


def test_at_generated_positions_alone_the_first_token_is_the_models_own(world):
    steer = steering(world, "shift", alpha=30.0, top_fraction=1.0, positions="generated")
    plain = spoken(world.model, world.tokens)
    with steer.applied(world.model, toward="memorization"):
        steered = spoken(world.model, world.tokens)
    assert torch.equal(steered[:, 0], plain[:, 0]) and not torch.equal(steered, plain)


@pytest.mark.parametrize("use_cache", [True, False])
def test_interventions_of_all_modes_ride_together_as_each_alone(world, use_cache):
    prompts = ["abM=", "M=", "cMd=", "Mabc=", "eMf="]
    steerings = [steering(world, name) for name in ALL]
    steerings += [steering(world, name, positions="generated") for name in ("clamp", "scale")]
    steerings.append(steering(world, "resample", seed=4))
    how = {"toward": "generalization", "max_new_tokens": 3, "pairs": np.arange(5), "use_cache": use_cache}
    together = steered_outputs(world.model, prompts, steerings, batch_size=9, **how)
    assert together == [steered_outputs(world.model, prompts, [steer], **how)[0] for steer in steerings]
    assert len({tuple(said) for said in together}) > 4


def test_prompts_of_no_pair_take_the_draws_in_their_order_whatever_the_batch(world):
    steer = steering(world, "resample", top_fraction=1.0)
    prompts = [item.prompt for item in planted.prompt_pairs(34, seed=6).memorized]
    how = {"toward": "generalization", "max_new_tokens": 3}
    said = steered_outputs(world.model, prompts, [steer], batch_size=5, **how)[0]
    assert said == steered_outputs(world.model, prompts, [steer], use_cache=False, **how)[0]
    distinct = list(dict.fromkeys(prompts))
    by_place = {prompt: place % 30 for place, prompt in enumerate(distinct)}
    for prompt, output in list(zip(prompts, said, strict=True))[-3:]:
        pair = np.array([by_place[prompt]])
        assert steered_outputs(world.model, [prompt], [steer], pairs=pair, **how) == [[output]]


# Several at once


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (("shift", "post", [0]), ("clamp", "post", [1])),  # another layer
        (("scale", "post", None), ("direction", "resid_post", [1])),  # another site
        (("shift", "post", None), ("clamp", "post", None)),  # the same neurons
        (("clamp", "post", None), ("shift", "post", None)),
        (("resample", "z", None), ("scale", "z", None)),
    ],
)
def test_nested_the_outer_is_applied_first_and_then_the_inner(world, outer, inner):
    made = [(name, steering(world, name, site, layers=layers)) for name, site, layers in (outer, inner)]
    where, rows, how = where_of("answer"), list(range(8)), {"toward": "memorization", "prompt_length": N_PROMPT}
    hooks = [hook for name, steer in made for hook in hand_hooks(world, steer, name, "memorization", where, rows)]
    by_hand = world.model.run_with_hooks(world.answered, fwd_hooks=hooks)
    (_, first), (_, second) = made
    with first.applied(world.model, **how):
        alone = world.model(world.answered)
        with second.applied(world.model, **how):
            close(world.model(world.answered), by_hand, 1e-6 * float(by_hand.abs().max()))
            nested = spoken(world.model, world.answered, 2)
        assert torch.equal(world.model(world.answered), alone)
    assert planted.hooks_on(world.model) == {}
    with world.model.hooks(fwd_hooks=hooks):
        assert torch.equal(nested, spoken(world.model, world.answered, 2))


def test_of_a_shift_inside_a_clamp_something_is_left_and_of_one_around_it_nothing(world):
    clamp, shift = steering(world, "clamp"), steering(world, "shift")
    how = {"toward": "memorization"}
    with clamp.applied(world.model, **how):
        clamped = world.model(world.tokens)
        with shift.applied(world.model, **how):
            assert not torch.allclose(world.model(world.tokens), clamped, atol=1e-3)
    with shift.applied(world.model, **how), clamp.applied(world.model, **how):
        assert torch.equal(world.model(world.tokens), clamped)


@pytest.mark.parametrize("name", ALL)
def test_an_exception_inside_leaves_no_hook_and_the_models_own_logits(world, name):
    steer, before = steering(world, name), world.model(world.tokens)
    with (
        pytest.raises(KeyboardInterrupt),
        steering(world, "shift").applied(world.model, toward="memorization"),
        steer.applied(world.model, toward="generalization", pairs=range(8)),
    ):
        assert not torch.equal(world.model(world.tokens), before)
        raise KeyboardInterrupt
    assert planted.hooks_on(world.model) == {} and torch.equal(world.model(world.tokens), before)


@pytest.mark.parametrize("name", ["scale", "clamp"])
def test_a_model_of_half_precision_keeps_its_precision(world, name):
    half = interventions.talking_model(native=type(world.model).__name__ != "HookedTransformer").to(torch.bfloat16)
    with steering(world, name).applied(half, toward="generalization"):
        assert half(world.tokens).dtype == torch.bfloat16


# What the values are


def test_a_resampled_value_is_that_of_a_select_prompt_of_another_item(world):
    items = np.arange(30) // 2  # two pairs an item
    pairs = mg.PromptPairs.from_strings(
        memorized=[item.prompt for item in world.pairs.memorized],
        generalized=[item.prompt for item in world.pairs.generalized],
        items=items,
    )
    acts = replace(world.acts, pairs=pairs)
    how = {"mode": "ablate", "how": "resample", "source": acts}
    draws = np.array([mg.Steering.from_scores(world.scores["post"], seed=seed, **how).draw for seed in range(40)])
    place = draws % 30
    assert (pairs.split[place] == "select").all() and (items[place] != items).all()
    assert 0.4 < (draws >= 30).mean() < 0.6, "of either side"
    assert set(place.ravel()) == set(np.flatnonzero(pairs.split == "select"))
    again = mg.Steering.from_scores(world.scores["post"], seed=7, **how).draw
    np.testing.assert_array_equal(again, draws[7])


def test_at_alpha_one_a_scale_doubles_neurons_or_silences_them_and_beyond_it_never_negates(world):
    for alpha, factors in ((1.0, {0.0, 2.0}), (4.0, {0.0, 5.0})):
        steer = steering(world, "scale", alpha=alpha)
        assert set(steer.values.ravel()) == factors | {1.0}, "1 where a neuron is silent on both sides"
        assert (steer.values[0] != steer.values[1]).mean() > 0.5


def test_without_a_source_a_scale_goes_by_the_sign_of_rho(world):
    score = world.scores["post"]
    steer = mg.Steering.from_scores(score, mode="scale", alpha=0.5)
    np.testing.assert_array_equal(steer.values[1], np.where(score.rho > 0, 1.5, np.where(score.rho < 0, 0.5, 1.0)))
    by_source = steering(world, "scale", alpha=0.5)  # no activation behind a ReLU is below 0
    strong = np.abs(score.rho) > 1e-6
    np.testing.assert_array_equal(by_source.values[:, strong], steer.values[:, strong])


# The planted neuron


@pytest.mark.parametrize("name", ["scale", "clamp", "zero", "direction"])
def test_what_switches_the_planted_model_is_what_its_one_neuron_can(known, name):
    """Silenced or clamped to 0, recall ends; from 0 no factor brings it back, a clamp or a direction does."""
    if name == "direction":
        steer = mg.Steering.from_mean_difference(known.acts, "post", layers=[1], alpha=2.0)
    else:
        how = {"mode": "ablate"} if name == "zero" else {"mode": name, "alpha": 1.0}
        steer = mg.Steering.from_scores(known.score, top_k=1, source=known.acts, **how)
    table = mg.evaluate_steering(known.model, None, known.pairs, steer, progress=False)
    assert table.to_generalization.shift["rate"] == 1
    assert table.to_memorization.shift["rate"] == (1 if name in ("clamp", "direction") else 0)
    controls = table.to_generalization.controls
    assert set(controls) == set(controls_of(steer))
    assert controls["random_direction" if name == "direction" else "random_neurons"]["mean"] < 0.2
    if name == "zero":
        assert controls["random_sign"] == {"mean": None, "ci95": None, "why": "an ablation has no sign to draw"}
    assert mg.figures.steering_rates(table).data


@pytest.mark.parametrize(("mode", "how"), [("scale", None), ("clamp", None), ("ablate", "resample")])
def test_a_sweep_tries_the_new_modes_as_each_is_alone(known, mode, how):
    rows = mg.sweep_steering(
        known.model,
        None,
        known.pairs,
        known.score,
        top_fractions=[planted.ONE_NEURON, 0.5],
        alphas=[0.5, 1.0],
        positions=["answer", "generated"],
        mode=mode,
        how=how,
        source=known.acts,
        progress=False,
    )
    assert len(rows) == (8 if mode == "scale" else 4)
    one = next(row for row in rows if row.setting.positions == "answer" and row.setting.alpha in (1.0, None))
    late = [row for row in rows if row.setting.positions == "generated"]
    assert {row.setting.how for row in rows} == {how}
    assert one.to_generalization == 1 if mode != "ablate" else 0 < one.to_generalization < 1
    assert all(row.to_generalization == 0 for row in late), "the answer is one token"
    assert mg.figures.steering_sweep(rows).data


def test_a_steering_by_position_acts_where_it_is_told_in_any_mode_but_a_patch(known):
    pairs = planted.twin_pairs(24, lengths=(3, 3))
    steer = mg.Steering.from_scores(known.score, top_k=1, mode="ablate", how="mean", source=known.acts)
    result = mg.steering_by_position(known.model, None, pairs, steer, progress=False)
    clamp = mg.Steering.from_scores(known.score, top_k=1, mode="clamp", source=known.acts)
    clamped = mg.steering_by_position(known.model, None, pairs, clamp, progress=False)
    assert clamped.to_generalization.rate[-1] == 1 and not clamped.to_generalization.rate[:-1].any()
    assert not result.to_generalization.rate[:-1].any()


# Controls


def test_controls_of_a_scale_move_or_swap_its_factors(world):
    steer, rng = steering(world, "scale"), np.random.default_rng(0)
    for name in ("random_neurons", "low_correlation", "random_sign"):
        for draw in control_draws(steer, name, 20, rng):
            np.testing.assert_array_equal(draw.selected.sum(1), steer.selected.sum(1))
            for layer in (0, 1):
                found = [np.sort(s.values[0, layer, s.selected[layer]]) for s in (draw, steer)]
                assert len(found[0]) == len(found[1])
                if name != "random_sign":
                    np.testing.assert_array_equal(*found)
    tells = steer.values[0] != steer.values[1]
    flips = [(draw.values[0] != steer.values[0])[tells] for draw in control_draws(steer, "random_sign", 50, rng)]
    assert 0.45 < np.mean(flips) < 0.55


def test_controls_of_what_is_set_set_other_neurons_to_values_of_their_own(world):
    for name in ("clamp", "zero", "resample", "patch"):
        steer, rng = steering(world, name), np.random.default_rng(0)
        for control, n in (("random_neurons", 20), ("low_correlation", 1)):
            draws = control_draws(steer, control, 20, rng)
            assert len(draws) == n
            for draw in draws:
                assert draw.values is steer.values and draw.source is steer.source
                np.testing.assert_array_equal(draw.selected.sum(1), steer.selected.sum(1))
        signs = control_draws(steer, "random_sign", 20, rng)
        assert len(signs) == (20 if name == "clamp" else 0)
        for draw in signs:
            assert ((draw.values == steer.values) | (draw.values == steer.values[::-1])).all()


def test_random_directions_have_the_norm_of_the_direction_in_each_layer_and_no_direction_of_their_own(world):
    steer, rng = steering(world, "direction", "resid_post"), np.random.default_rng(0)
    draws = control_draws(steer, "random_direction", 200, rng)
    for layer in (0, 1):
        norm = np.linalg.norm(steer.shift[layer])
        np.testing.assert_allclose([np.linalg.norm(draw.shift[layer]) for draw in draws], norm)
        assert np.linalg.norm(np.mean([draw.shift[layer] for draw in draws], axis=0)) < 0.2 * norm
    one = mg.Steering.from_mean_difference(world.acts, "resid_post", layers=[1])
    assert not any(draw.shift[0].any() for draw in control_draws(one, "random_direction", 3, rng))


# What is refused


@pytest.mark.parametrize(("name", "words"), [("clamp", "clamp"), ("mean", "mean"), ("resample", "resample")])
def test_values_without_a_source_are_refused(world, name, words):
    with pytest.raises(SettingsError, match=rf"source=record\(\.\.\.\) with mode='.*{words}'; received source=None"):
        steering(world, name, source=None)


def test_how_belongs_to_an_ablation(world):
    with pytest.raises(SettingsError, match=r"\(how=...\): expected mode='ablate' with it; received mode='clamp'"):
        steering(world, "clamp", how="mean")


def test_a_source_of_another_shape_is_refused(world, known):
    with pytest.raises(SiteError, match=r"2x64 there, as in the scores; received 2x22"):
        scores = replace(known.score, site="resid_post")
        mg.Steering.from_scores(scores, mode="clamp", source=world.acts)


def test_values_are_not_resampled_from_the_items_own_prompts(world):
    one = mg.PromptPairs.from_strings(
        memorized=[item.prompt for item in world.pairs.memorized],
        generalized=[item.prompt for item in world.pairs.generalized],
        items=np.array([0] * 28 + [1, 2]),
        seed=1,
    )
    acts = replace(world.acts, pairs=replace(one, split=np.array(["select"] * 28 + ["test"] * 2)))
    with pytest.raises(PairsError, match=r"select pairs of at least 2 items.*received 1"):
        mg.Steering.from_scores(world.scores["post"], mode="ablate", how="resample", source=acts)
