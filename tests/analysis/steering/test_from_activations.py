"""Fitted steering of models: where one shift does nothing, on every road, and what may be read to fit it."""

from dataclasses import replace

import bridges
import helpers
import numpy as np
import planted
import planted_xor
import pytest
import torch
from planted import greedy_by_hand
from transformer_lens.utilities import get_act_name

import memgen_lens as mg
from memgen_lens.analysis.steering.controls import CONTROLS, control_draws, controls_of
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import NeuronScores, SiteActivations

BOTH_WAYS = pytest.mark.parametrize("toward", ["generalization", "memorization"])
BOTH_KINDS = pytest.mark.parametrize("kind", ["clusters", "low_rank"])
SIDES = {"generalization": "memorized", "memorization": "generalized"}
NEW_TOKENS = 3


@pytest.fixture(scope="module")
def xor():
    """The model in which no one shift switches anything, its pairs, activations and scores."""
    model, pairs = planted_xor.build_model(), planted_xor.prompt_pairs()
    acts = mg.record(model, pairs, ["resid_pre"])
    return model, pairs, acts, mg.attribute(acts, "resid_pre", n_permutations=0)


@pytest.fixture(scope="module")
def of_trained(learned):
    """By kind, a fitted steering of the trained model at ``resid_post``, in both layers."""
    score = mg.attribute(learned.acts, "resid_post")
    return {
        kind: Steering.from_activations(score, learned.acts, 0.7, kind=kind, layers=[0, 1])
        for kind in ("clusters", "low_rank")
    }


def prompts_of(pairs, toward):
    return [item.prompt for item in getattr(pairs, SIDES[toward])]


def said(model, pairs, steer, toward, **how):
    return steered_outputs(model, prompts_of(pairs, toward), [steer], toward=toward, max_new_tokens=NEW_TOKENS, **how)[
        0
    ]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=tolerance)


# What it does


@BOTH_WAYS
@pytest.mark.parametrize(("kind", "size"), [("clusters", {"n_clusters": 2}), ("low_rank", {"rank": 4})])
def test_where_no_shift_switches_anything_a_rule_switches_every_prompt(xor, kind, size, toward):
    model, pairs, acts, score = xor
    aim = "r" if toward == "generalization" else "m"
    shift = Steering.from_scores(score, 1.0, 1.0, layers=[1])
    assert said(model, pairs, shift, toward) == ["m" if aim == "r" else "r"] * len(pairs)
    for layers in (None, [1], [2]):
        steer = Steering.from_activations(score, acts, 1.0, kind=kind, layers=layers, **size)
        assert said(model, pairs, steer, toward) == [aim] * len(pairs)


@BOTH_KINDS
def test_by_default_one_layer_is_steered_and_it_is_the_best_predicted(xor, kind):
    _, _, acts, score = xor
    steer = Steering.from_activations(score, acts, 1.0, kind=kind)
    changed = np.flatnonzero(steer.selected.any(1))
    assert len(changed) == 1 and changed[0] in (1, 2)  # in layer 0 both sides are the same
    alone = Steering.from_activations(score, acts, 1.0, kind=kind, layers=changed.tolist())
    np.testing.assert_array_equal(alone.selected, steer.selected)


def test_a_second_layer_may_move_on_what_the_first_has_moved(xor):
    """Why one layer is the default: moved rows are nobody's own side, and the nearest cluster is any of them."""
    model, pairs, acts, score = xor
    both = Steering.from_activations(score, acts, 1.0, kind="clusters", n_clusters=2, layers=[1, 2])
    assert said(model, pairs, both, "generalization") == ["m"] * len(pairs)
    first = replace(both, selected=both.selected & [[True], [True], [False]])
    assert said(model, pairs, first, "generalization") == ["r"] * len(pairs)


@BOTH_WAYS
@BOTH_KINDS
def test_several_layers_of_the_planted_neurons_site_still_flip_every_prompt(known, kind, toward):
    steer = Steering.from_activations(known.score, known.acts, 1.0, kind=kind, layers=[0, 1])
    assert (steer.selected.sum(1) == 64).all()
    assert said(known.model, known.pairs, steer, toward) == ["r" if toward == "generalization" else "m"] * 60


@BOTH_KINDS
def test_the_neurons_are_those_of_from_scores_and_only_they_are_changed(known, kind):
    plain = Steering.from_scores(known.score, 0.2, layers=[1])
    steer = Steering.from_activations(known.score, known.acts, 0.2, kind=kind, layers=[1])
    np.testing.assert_array_equal(steer.selected, plain.selected)
    name, seen = "blocks.1.mlp.hook_post", []
    tokens = known.model.to_tokens("abM=")
    look = [(name, lambda activation, hook: seen.append(activation[0, -1].numpy().copy()))]
    known.model.run_with_hooks(tokens, fwd_hooks=look)
    with steer.applied(known.model, toward="generalization"):
        known.model.run_with_hooks(tokens, fwd_hooks=look)
    assert (seen[0] == seen[1])[~steer.selected[1]].all() and (seen[0] != seen[1])[steer.selected[1]].any()


@BOTH_WAYS
def test_one_cluster_is_the_shift_by_the_mean_difference(learned, toward):
    score = mg.attribute(learned.acts, "resid_post")
    one = Steering.from_activations(score, learned.acts, 1.0, 1.7, n_clusters=1, layers=[0, 1])
    agree = np.sign(score.rho) == np.sign(score.nmd)
    assert agree.mean() > 0.5
    one = replace(one, rules=replace(one.rules, gain=one.rules.gain * agree))
    shift = Steering.from_scores(score, 1.0, 1.7)
    shift = replace(shift, shift=shift.shift * agree)
    tokens = learned.model.to_tokens(prompts_of(learned.pairs, toward)[:16])
    with one.applied(learned.model, toward=toward):
        by_rule = learned.model(tokens)
    with shift.applied(learned.model, toward=toward):
        close(by_rule, learned.model(tokens))
    assert not torch.allclose(by_rule, learned.model(tokens), atol=1e-2)


# On every road


@BOTH_WAYS
@BOTH_KINDS
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_applied_is_a_hook_written_by_hand(learned, of_trained, kind, toward, positions):
    steer = replace(of_trained[kind], setting=replace(of_trained[kind].setting, positions=positions))
    tokens = learned.model.to_tokens([i.prompt + "12" for i in learned.pairs.memorized[:6]])
    n_prompt = tokens.shape[1] - 2
    where = {"answer": slice(n_prompt - 1, None), "prompt": slice(n_prompt - 1, n_prompt), "all": slice(None)}[
        positions
    ]

    def hook_of(layer):
        rule, neurons = steer.rules.towards[toward][layer], np.flatnonzero(steer.selected[layer])

        def hook(activation, hook):
            out = activation.clone()
            for row in range(len(out)):
                for pos in range(out.shape[1])[where]:
                    added = rule(activation[row, pos].double().numpy()[None])[0, neurons]
                    out[row, pos, neurons] += torch.as_tensor(added, dtype=torch.float32)
            return out

        return hook

    hooks = [(get_act_name("resid_post", layer), hook_of(layer)) for layer in (0, 1)]
    with torch.no_grad(), steer.applied(learned.model, toward=toward, prompt_length=n_prompt):
        steered = learned.model(tokens)
    with torch.no_grad():
        close(steered, learned.model.run_with_hooks(tokens, fwd_hooks=hooks), 1e-3)


@BOTH_KINDS
def test_a_batch_is_steered_like_each_prompt_alone(learned, of_trained, kind):
    tokens = learned.model.to_tokens([item.prompt for item in learned.pairs.memorized[:8]])
    with of_trained[kind].applied(learned.model, toward="generalization"):
        batch = learned.model(tokens)
        for row in range(8):
            close(learned.model(tokens[[row]])[0], batch[row])


@BOTH_WAYS
@BOTH_KINDS
def test_the_fast_road_the_models_own_and_no_cache_say_the_same(learned, of_trained, kind, toward):
    steer, prompts = of_trained[kind], prompts_of(learned.pairs, toward)[:40]
    how = {"toward": toward, "max_new_tokens": 5}
    fast = steered_outputs(learned.model, prompts, [steer], **how)
    with helpers.watched(learned.model):
        assert steered_outputs(learned.model, prompts, [steer], **how) == fast
    assert steered_outputs(learned.model, prompts, [steer], use_cache=False, **how) == fast
    with steer.applied(learned.model, toward=toward, prompt_length=6):
        assert fast[0][:4] == [greedy_by_hand(learned.model, prompt, 5) for prompt in prompts[:4]]
    assert fast[0] != mg.complete(learned.model, prompts, max_new_tokens=5, progress=False)


@pytest.mark.parametrize("batch_size", [7, 2048])
@pytest.mark.parametrize("use_cache", [True, False])
def test_steerings_of_all_modes_that_ride_together_give_what_each_gives_alone(xor, batch_size, use_cache):
    model, pairs, acts, score = xor
    rules = [
        Steering.from_activations(score, acts, 1.0, kind="clusters", n_clusters=2, layers=[1]),
        Steering.from_activations(score, acts, 1.0, kind="low_rank", rank=4, layers=[2]),
        Steering.from_activations(score, acts, 0.3, 0.2, kind="clusters", n_clusters=1),
        Steering.from_activations(score, acts, 1.0, 1.0, kind="low_rank", rank=5, layers=[1]),
    ]
    draws = [control_draws(rules[0], name, 2, np.random.default_rng(0)) for name in controls_of(rules[0])]
    steerings = [
        *rules,
        *(draw for two in draws for draw in two),
        Steering.from_scores(score, 1.0, 3.0),
        Steering.from_scores(score, 1.0, mode="patch", source=acts, layers=[1]),
    ]
    index = np.arange(8)
    how = {"toward": "generalization", "max_new_tokens": 3, "pairs": index, "use_cache": use_cache}
    prompts = [pairs.memorized[i].prompt for i in index]
    together = steered_outputs(model, prompts, steerings, batch_size=batch_size, **how)
    assert together == [steered_outputs(model, prompts, [s], **how)[0] for s in steerings]
    assert together[0] == together[1] == together[3] == together[-1] == ["r"] * 8 and together[2] == ["m"] * 8


@BOTH_KINDS
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bridge_is_steered_as_by_hand(name, kind):
    model = bridges.bridge(name)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(bridges.CHARACTERS[:36]), size=5)) + "=" for _ in range(60)]
    pairs = PromptPairs.from_strings(memorized=texts[:30], generalized=texts[30:])
    acts = mg.record(model, pairs, ["resid_post"], progress=False)
    steer = Steering.from_activations(mg.attribute(acts, "resid_post"), acts, 0.5, kind=kind, layers=[0])
    tokens, look = model.to_tokens(texts[:5]), []
    hooks = [("blocks.0.hook_resid_post", lambda activation, hook: look.append(activation[:, -1].detach().numpy()))]
    with torch.no_grad():
        with model.hooks(fwd_hooks=hooks):
            model(tokens)
        with steer.applied(model, toward="generalization"), model.hooks(fwd_hooks=hooks):
            model(tokens)
    added = steer.rules.towards["generalization"][0](look[0].astype(float)) * steer.selected[0]
    np.testing.assert_allclose(look[1] - look[0], added, atol=1e-4)
    assert np.abs(added).max() > 1e-2
    together = steered_outputs(model, texts[:5], [steer], toward="generalization", max_new_tokens=3)[0]
    for text, output in zip(texts[:5], together, strict=True):
        assert steered_outputs(model, [text], [steer], toward="generalization", max_new_tokens=3) == [[output]]


@BOTH_KINDS
def test_a_model_of_half_precision_keeps_its_precision(known, kind):
    model = planted.build_model().to(torch.bfloat16)
    steer = Steering.from_activations(known.score, known.acts, planted.ONE_NEURON, kind=kind)
    with steer.applied(model, toward="generalization"):
        logits = model("abM=")
    assert logits.dtype == torch.bfloat16
    assert logits[0, -1].argmax() == model.to_single_token(planted.RULE)


@BOTH_KINDS
def test_after_an_exception_the_model_has_no_hook_of_ours_and_its_old_logits(known, kind):
    model = planted.build_model()
    steer = Steering.from_activations(known.score, known.acts, kind=kind)
    before = model("abM=")
    with pytest.raises(KeyboardInterrupt), steer.applied(model, toward="generalization"):
        assert not torch.equal(model("abM="), before)
        raise KeyboardInterrupt
    assert planted.hooks_on(model) == {} and model.context_level == 0
    assert torch.equal(model("abM="), before)


# What it is fitted on


@BOTH_KINDS
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_only_the_select_pairs_are_read(xor, kind, poison):
    _, pairs, acts, score = xor
    others = pairs.split != "select"
    site = acts.site("resid_pre")
    sides = {side: getattr(site, side).copy() for side in ("memorized", "generalized")}
    for side in sides.values():
        side[others] = poison
    poisoned = replace(acts, sites={"resid_pre": SiteActivations(**sides)})
    clean, same = (Steering.from_activations(score, a, 0.7, kind=kind) for a in (acts, poisoned))
    assert clean.rules.predicted(clean.selected) == same.rules.predicted(same.selected)
    np.testing.assert_array_equal(clean.selected, same.selected)
    for toward, rules in clean.rules.towards.items():
        for a, b in zip(rules, same.rules.towards[toward], strict=True):
            assert (a is None) == (b is None)
            for name in ("center", "read", "bias", "write", "offset") if a is not None else ():
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@BOTH_KINDS
def test_a_seed_gives_the_same_rule_again(xor, kind):
    _, _, acts, score = xor
    one, two = (Steering.from_activations(score, acts, kind=kind, n_clusters=5, seed=3) for _ in range(2))
    for a, b in zip(one.rules.towards["memorization"], two.rules.towards["memorization"], strict=True):
        assert a is b is None or np.array_equal(a.write, b.write)


@BOTH_KINDS
def test_activations_on_disk_give_the_same_rule(xor, tmp_path, kind):
    model, pairs, acts, score = xor
    there = mg.record(model, pairs, ["resid_pre"], out=tmp_path / "acts", progress=False)
    a, b = (Steering.from_activations(score, source, kind=kind, layers=[1]) for source in (acts, there))
    np.testing.assert_array_equal(a.rules.towards["memorization"][1].write, b.rules.towards["memorization"][1].write)


# Its evaluation


@pytest.fixture(scope="module")
def tables(xor):
    model, pairs, acts, score = xor
    return {
        kind: mg.evaluate_steering(model, None, pairs, Steering.from_activations(score, acts, 1.0, kind=kind, **size))
        for kind, size in (("clusters", {"n_clusters": 2}), ("low_rank", {"rank": 4}))
    }


@BOTH_KINDS
def test_the_table_says_what_was_done_and_has_a_control_more(tables, kind):
    table = tables[kind]
    assert (table.setting.mode, table.setting.size) == (kind, 2 if kind == "clusters" else 4)
    assert sum(n > 0 for n in table.n_neurons_by_layer) == 1
    for side in (table.to_generalization, table.to_memorization):
        assert side.shift["rate"] == 1
        assert list(side.controls) == [*CONTROLS, "shuffled_items"]
        assert all(control["n_draws"] == 20 for control in side.controls.values())
        # A push of the value in either direction makes it agree with the group: there random signs say nothing.
        assert all(side.controls[name]["mean"] < 0.4 for name in ("random_neurons", "low_correlation"))
    # Led to strangers, the groups meet in the middle: there the model computes, whichever way it is steered.
    assert table.to_generalization.controls["shuffled_items"]["mean"] > 0.9
    assert table.to_memorization.controls["shuffled_items"]["mean"] < 0.1
    for layers in table.predicted.values():
        assert [row["layer"] for row in layers] == np.flatnonzero(table.n_neurons_by_layer).tolist()
        assert layers[0]["closed"] > 0.3 and layers[0]["closed_by_one_shift"] < 0.1


def test_a_shift_has_no_shuffled_items_and_nothing_predicted(known):
    steer = Steering.from_scores(known.score, planted.ONE_NEURON)
    table = mg.evaluate_steering(known.model, None, known.pairs, steer, progress=False)
    assert list(table.to_generalization.controls) == list(CONTROLS) and table.predicted is None
    assert control_draws(steer, "shuffled_items", 20, np.random.default_rng(0)) == []


@BOTH_KINDS
@pytest.mark.parametrize("name", CONTROLS)
def test_controls_write_the_same_magnitudes_row_by_row(learned, kind, name):
    """In each layer as many neurons, the same multiset of what is added to each row."""
    score = mg.attribute(learned.acts, "resid_post")
    steer = Steering.from_activations(score, learned.acts, 0.3, 1.5, kind=kind, layers=[1])
    tokens = learned.model.to_tokens([item.prompt for item in learned.pairs.memorized[:5]])
    seen = []
    look = [("blocks.1.hook_resid_post", lambda activation, hook: seen.append(activation[:, -1].detach().numpy()))]
    draws = control_draws(steer, name, 20, np.random.default_rng(0))
    assert len(draws) == 20
    learned.model.run_with_hooks(tokens, fwd_hooks=look)
    for one in (steer, *draws):
        np.testing.assert_array_equal(one.selected.sum(1), steer.selected.sum(1))
        with one.applied(learned.model, toward="generalization"):
            learned.model.run_with_hooks(tokens, fwd_hooks=look)
    added = [activation - seen[0] for activation in seen[1:]]
    for draw, one in zip(draws, added[1:], strict=True):
        assert not one[:, ~draw.selected[1]].any()
        np.testing.assert_allclose(np.sort(np.abs(one), axis=1), np.sort(np.abs(added[0]), axis=1), atol=2e-5)
        assert np.abs(one - added[0]).max() > 1e-2
    if name == "low_correlation":
        rho = np.abs(score.rho[1])
        assert all(rho[draw.selected[1]].max() <= rho[~draw.selected[1]].min() for draw in draws)
    if name == "random_sign":
        np.testing.assert_array_equal(draws[0].selected, steer.selected)


@BOTH_KINDS
def test_side_effects_are_measured_as_a_rule_needs_no_pair(learned, of_trained, kind):
    table = mg.evaluate_steering(learned.model, learned.task, learned.pairs, of_trained[kind], progress=False)
    assert table.side_effects.n == 60 and table.side_effects.kl_nats > 0 and table.side_effects.why is None
    again = mg.evaluate_steering(
        learned.model, learned.task, learned.pairs, of_trained[kind], batch_size=333, progress=False
    )
    assert again.to_generalization == table.to_generalization and again.to_memorization == table.to_memorization


# The sweep


@BOTH_KINDS
def test_every_row_of_a_sweep_is_its_setting_evaluated_alone(xor, kind):
    model, pairs, acts, score = xor
    sizes = [1, 2] if kind == "clusters" else [1, 4]
    rows = mg.sweep_steering(
        model,
        None,
        pairs,
        score,
        top_fractions=[1.0],
        alphas=[0.5, 1.0],
        layers=[None, [1]],
        positions=["prompt"],
        mode=kind,
        source=acts,
        sizes=sizes,
        progress=False,
    )
    assert [(r.setting.size, r.setting.positions, r.layers, r.setting.top_fraction, r.setting.alpha) for r in rows] == [
        (size, positions, layers, fraction, alpha)
        for size in sizes
        for positions in ("prompt",)
        for layers in (None, (1,))
        for fraction in (1.0,)
        for alpha in (0.5, 1.0)
    ]
    index = pairs.of("tune")
    for row in rows:
        setting = row.setting
        steer = Steering.from_activations(
            score,
            acts,
            setting.top_fraction,
            setting.alpha,
            kind=kind,
            n_clusters=setting.size,
            rank=setting.size,
            layers=row.layers,
            positions=setting.positions,
        )
        assert steer.setting == setting
        for toward, rate in (("generalization", row.to_generalization), ("memorization", row.to_memorization)):
            outputs = np.array(said(model, pairs, steer, toward))[index]
            assert rate == np.mean(outputs == ("r" if toward == "generalization" else "m"))
    assert mg.choose_setting(rows).gain == 2


def test_a_sweep_of_a_rule_without_activations_is_refused(xor):
    model, pairs, _, score = xor
    with pytest.raises(SettingsError, match=r"sweep_steering: expected source=record\(\.\.\.\) with mode='clust"):
        mg.sweep_steering(model, None, pairs, score, top_fractions=[0.5], mode="clusters")


# What is refused


def test_an_unknown_kind_is_refused(known):
    with pytest.raises(SettingsError) as refused:
        Steering.from_activations(known.score, known.acts, kind="shift")
    assert str(refused.value) == (
        "Steering.from_activations(kind=...): expected 'clusters' or 'low_rank'; received 'shift'. Change kind."
    )


def test_more_clusters_than_items_are_refused(known):
    with pytest.raises(SettingsError) as refused:
        Steering.from_activations(known.score, known.acts, n_clusters=25)
    assert str(refused.value) == (
        "Steering.from_activations(n_clusters=...): expected at most 24, the items that there are in select; "
        "received 25. Lower n_clusters."
    )


@pytest.mark.parametrize(("site", "message"), [("post", "24, the items that there are in select"), ("z", "16, the n")])
def test_a_rank_beyond_items_or_neurons_is_refused(known, site, message):
    acts = mg.record(known.model, known.pairs, [site], progress=False)
    score = mg.attribute(acts, site, n_permutations=0)
    with pytest.raises(SettingsError, match=rf"ions\(rank=\.\.\.\): expected at most {message}.*; received 25\."):
        Steering.from_activations(score, acts, kind="low_rank", rank=25)


@pytest.mark.parametrize("name", ["n_clusters", "rank"])
def test_a_size_of_none_is_refused(known, name):
    with pytest.raises(SettingsError, match=rf"{name}=\.\.\.\): expected .*greater than or equal to 1; received 0"):
        Steering.from_activations(known.score, known.acts, **{name: 0})


def test_activations_without_the_site_are_refused(known, xor):
    with pytest.raises(SiteError) as refused:
        Steering.from_activations(xor[3], known.acts)
    assert str(refused.value).startswith(
        "activations of site 'resid_pre': expected a recorded site (post, resid_post); received 'resid_pre'."
    )


def test_activations_of_another_shape_than_the_scores_are_refused(known):
    rho = np.ones((3, 64))
    with pytest.raises(SiteError, match=r"'post': expected a model with 3x64 there, as in the scores; received 2x64"):
        Steering.from_activations(NeuronScores("post", rho, rho, rho, rho, rho, 8, 8), known.acts)


def test_select_pairs_of_one_item_are_refused(known):
    keys = [0] * 30 + list(range(1, 31))
    pairs = replace(
        known.pairs,
        memorized=tuple(replace(item, key=key) for item, key in zip(known.pairs.memorized, keys, strict=True)),
        split=np.array(["select"] * 30 + ["test"] * 30),
    )
    with pytest.raises(PairsError, match=r"activations: expected select pairs of at least 2 items.*; received 1\."):
        Steering.from_activations(known.score, replace(known.acts, pairs=pairs))


def test_activations_that_are_not_finite_are_refused(known):
    site = known.acts.site("post")
    wrong = site.memorized.copy()
    wrong[known.pairs.of("select")[0], 1, 5] = np.inf
    acts = replace(known.acts, sites={"post": SiteActivations(wrong, site.generalized)})
    with pytest.raises(ModelError, match=r"from_activations: expected finite activations; received inf at site 'post'"):
        Steering.from_activations(known.score, acts)


def test_layers_that_the_scores_lack_are_refused(known):
    with pytest.raises(SettingsError, match=r"activations\(layers=\.\.\.\): expected layers of the scores, 0 to 1"):
        Steering.from_activations(known.score, known.acts, layers=[2])


def test_a_model_of_another_width_is_refused(learned, known):
    steer = Steering.from_activations(known.score, known.acts)
    with (
        pytest.raises(SiteError, match=r"a model with 64 neurons there, as in the scores; received 256"),
        steer.applied(learned.model, toward="memorization"),
    ):
        learned.model("12+34=")
    assert planted.hooks_on(learned.model) == {}
