"""Steering against hooks written by hand, cached against uncached, many at once against one at a time."""

from dataclasses import replace

import helpers
import jaxtyping
import numpy as np
import planted
import pytest
import torch
from transformer_lens import TransformerLensKeyValueCache
from transformer_lens.utilities import get_act_name

import memgen_lens as mg
from memgen_lens.analysis.steering import generation
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering, steering_hooks
from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.core.records import NeuronScores
from memgen_lens.models.passes import At
from memgen_lens.models.tokens import decode

SIGN = {"memorization": 1.0, "generalization": -1.0}
BOTH_WAYS = pytest.mark.parametrize("toward", ["generalization", "memorization"])


@pytest.fixture(scope="module")
def scores(learned):
    return {site: mg.attribute(learned.acts, site) for site in learned.acts.sites}


@pytest.fixture(scope="module")
def answered(learned):
    """Tokens ``[batch, pos]`` of eight memorized prompts with their answers fed in, and the prompt's length."""
    items = learned.pairs.memorized[:8]
    prompt = learned.model.to_tokens([item.prompt for item in items])
    answer = learned.model.to_tokens([item.memorized_answer for item in items])
    return torch.cat([prompt, answer], dim=1), prompt.shape[1]


def hand_hooks(steer, toward, where):
    """The formula of method.md, section 6, one hook a layer, for ``run_with_hooks``."""
    rho, nmd, setting = steer.scores.rho, steer.scores.nmd, steer.setting
    order = sorted(range(rho.size), key=lambda i: -abs(rho.flat[i]))
    top = set(order[: round(setting.top_fraction * rho.size)])

    def hook_of(layer):
        def hook(activation, hook):
            flat = activation.flatten(2).clone()
            for neuron in range(rho.shape[1]):
                if layer * rho.shape[1] + neuron in top:
                    step = setting.alpha * np.sign(rho[layer, neuron]) * abs(nmd[layer, neuron])
                    flat[:, where, neuron] += SIGN[toward] * step
            return flat.view_as(activation)

        return hook

    return [(get_act_name(setting.site, layer), hook_of(layer)) for layer in range(rho.shape[0])]


def step_by_step(model, tokens, n_prompt):
    """Logits at the last prompt position and at each later one, with a key-value cache."""
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    parts = [tokens[:, :n_prompt], *tokens[:, n_prompt:].split(1, dim=1)]
    logits = [model(part, past_kv_cache=cache, attention_mask=torch.ones_like(part))[:, -1] for part in parts]
    return torch.stack(logits, dim=1)


def scores_of(model, site="post"):
    """Scores that fit a model at a site, drawn at random."""
    rng, width = np.random.default_rng(0), {"post": model.cfg.d_mlp, "resid_post": model.cfg.d_model}[site]
    rho, nmd = rng.uniform(-1, 1, size=(2, model.cfg.n_layers, width))
    return NeuronScores(site, nmd, rho, np.full_like(rho, 0.5), np.full_like(rho, 0.5), np.full_like(rho, 0.5), 8, 8)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=tolerance)


# Which neurons, and how far


def test_the_top_fraction_is_taken_over_all_layers_by_abs_rho(scores):
    score = scores["post"]
    steer = Steering.from_scores(score, top_fraction=0.1, alpha=3.0)
    assert steer.selected.sum() == round(0.1 * score.rho.size)
    assert np.abs(score.rho[steer.selected]).min() >= np.abs(score.rho[~steer.selected]).max()
    np.testing.assert_allclose(
        steer.shift[steer.selected], 3 * np.sign(score.rho[steer.selected]) * np.abs(score.nmd[steer.selected])
    )
    assert (steer.shift[~steer.selected] == 0).all()


@pytest.mark.parametrize(("fraction", "count"), [(1e-9, 1), (0.26, 2), (0.5, 3), (1.0, 6)])
def test_a_fraction_is_rounded_to_neurons_and_never_to_none(fraction, count):
    rho = np.array([[0.1, -0.9, 0.2], [0.3, 0.0, -0.8]])
    score = NeuronScores("post", rho, rho, *[np.ones_like(rho)] * 3, 8, 8)
    selected = Steering.from_scores(score, top_fraction=fraction).selected
    assert selected.sum() == count and selected[0, 1]


def test_layers_restrict_the_neurons_without_ranking_them_anew(scores):
    everywhere = Steering.from_scores(scores["post"], top_fraction=0.3)
    for layer in (0, 1):
        alone = Steering.from_scores(scores["post"], top_fraction=0.3, layers=[layer])
        np.testing.assert_array_equal(alone.selected[layer], everywhere.selected[layer])
        np.testing.assert_array_equal(alone.shift[layer], everywhere.shift[layer])
        assert not alone.selected[1 - layer].any() and not alone.shift[1 - layer].any()


def test_layers_restrict_the_hooks_too(learned, scores):
    steer = Steering.from_scores(scores["post"], top_fraction=0.3, layers=[1])
    with steer.applied(learned.model, toward="generalization"):
        assert planted.hooks_on(learned.model) == {"blocks.1.mlp.hook_post": 1}


# Shift: the same as hooks written by hand


@BOTH_WAYS
@pytest.mark.parametrize("site", ["resid_post", "post", "z"])
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_shift_is_run_with_hooks_with_a_hook_written_by_hand(learned, scores, answered, site, positions, toward):
    tokens, n_prompt = answered
    steer = Steering.from_scores(scores[site], top_fraction=0.2, alpha=1.5, positions=positions)
    where = {"answer": slice(n_prompt - 1, None), "prompt": slice(n_prompt - 1, n_prompt), "all": slice(None)}
    by_hand = learned.model.run_with_hooks(tokens, fwd_hooks=hand_hooks(steer, toward, where[positions]))
    with steer.applied(learned.model, toward=toward, prompt_length=n_prompt):
        close(learned.model(tokens), by_hand)
    assert not torch.allclose(by_hand, learned.model(tokens), atol=1e-2)


@helpers.hooked_only  # a native Bridge keeps no keys and values; of other Bridges, see test_bridges
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_cached_steps_are_steered_like_the_whole_sequence(learned, scores, answered, positions, given):
    tokens, n_prompt = answered
    steer = Steering.from_scores(scores["resid_post"], top_fraction=0.2, alpha=1.5, positions=positions)
    with steer.applied(learned.model, toward="memorization", prompt_length=n_prompt):
        whole = learned.model(tokens)[:, n_prompt - 1 :]
    with steer.applied(learned.model, toward="memorization", prompt_length=n_prompt if given else None):
        close(step_by_step(learned.model, tokens, n_prompt), whole, 1e-4)
    assert not torch.allclose(step_by_step(learned.model, tokens, n_prompt), whole, atol=1e-2)


@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_a_prompt_of_one_token_is_steered_alike_with_and_without_a_cache(positions):
    """A cached step is as long as such a prompt: length alone does not tell them apart."""
    model = planted.build_model()
    steer = Steering.from_scores(scores_of(model, "resid_post"), top_fraction=1.0, alpha=30.0, positions=positions)
    outputs = [
        steered_outputs(model, list("abcdefgh"), [steer], toward=toward, max_new_tokens=5, use_cache=use_cache)
        for use_cache in (True, False)
        for toward in SIGN
    ]
    assert outputs[:2] == outputs[2:]
    assert outputs[0] != outputs[1]


def test_a_prompt_of_one_token_is_steered_each_time_it_is_run():
    model = planted.build_model()
    tokens = model.to_tokens("M")
    plain = model(tokens)
    steer = Steering.from_scores(scores_of(model, "resid_post"), top_fraction=1.0, positions="prompt")
    with steer.applied(model, toward="memorization", prompt_length=1):
        first, second = model(tokens), model(tokens)
    assert torch.equal(first, second)
    assert not torch.allclose(first, plain, atol=1e-2)


@BOTH_WAYS
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_generate_with_a_cache_gives_what_uncached_steps_give(learned, scores, positions, toward):
    steer = Steering.from_scores(scores["resid_post"], top_fraction=0.3, alpha=2.0, positions=positions)
    items = learned.pairs.memorized if toward == "generalization" else learned.pairs.generalized
    prompt = learned.model.to_tokens([item.prompt for item in items[:16]])
    arguments = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False, "verbose": False}
    arguments["return_type"] = "tokens"
    plain = learned.model.generate(prompt, **arguments)
    with steer.applied(learned.model, toward=toward):
        cached = learned.model.generate(prompt, use_past_kv_cache=True, **arguments)
    with steer.applied(learned.model, toward=toward, prompt_length=prompt.shape[1]):
        uncached = learned.model.generate(prompt, use_past_kv_cache=False, **arguments)
    sequence = prompt
    with steer.applied(learned.model, toward=toward, prompt_length=prompt.shape[1]):
        for _ in range(5):
            logits = learned.model(sequence, attention_mask=torch.ones_like(sequence))
            sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, uncached) and torch.equal(cached, sequence)
    assert not torch.equal(cached, plain)


def test_memorization_adds_the_shift_and_generalization_takes_it_away(learned, scores, answered):
    tokens, n_prompt = answered
    steer = Steering.from_scores(scores["resid_post"], top_fraction=0.2, alpha=1.5, layers=[1])
    seen = {}

    def look(activation, hook):
        seen[toward] = activation[:, -1].detach().numpy()

    toward = None
    learned.model.run_with_hooks(tokens[:, :n_prompt], fwd_hooks=[("blocks.1.hook_resid_post", look)])
    for toward in ("memorization", "generalization"):
        with steer.applied(learned.model, toward=toward):
            learned.model.run_with_hooks(tokens[:, :n_prompt], fwd_hooks=[("blocks.1.hook_resid_post", look)])
        np.testing.assert_allclose(seen[toward] - seen[None], np.tile(SIGN[toward] * steer.shift[1], (8, 1)), atol=1e-5)


def test_shifting_a_batch_is_shifting_each_prompt_alone(learned, scores, answered):
    tokens, n_prompt = answered
    steer = Steering.from_scores(scores["post"], top_fraction=0.2)
    with steer.applied(learned.model, toward="generalization"):
        batch = learned.model(tokens[:, :n_prompt])
        for row in range(len(tokens)):
            close(learned.model(tokens[[row], :n_prompt])[0], batch[row], 1e-4)


def test_the_activation_that_others_hold_is_not_changed_in_place(learned, scores, answered):
    tokens, _ = answered
    held = {}

    def hold(activation, hook):
        held["is"], held["was"] = activation, activation.clone()

    steer = Steering.from_scores(scores["post"], top_fraction=1.0)
    with (
        learned.model.hooks(fwd_hooks=[("blocks.0.mlp.hook_post", hold)]),
        steer.applied(learned.model, toward="memorization"),
    ):
        learned.model(tokens)
    assert torch.equal(held["is"], held["was"])


def test_a_model_of_half_precision_keeps_its_precision(known):
    model = planted.build_model().to(torch.bfloat16)
    steer = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON)
    with steer.applied(model, toward="generalization"):
        logits = model("abM=")
    assert logits.dtype == torch.bfloat16
    assert logits[0, -1].argmax() == model.to_single_token(planted.RULE)


# Patch


@BOTH_WAYS
def test_patching_the_last_residual_stream_gives_the_paired_prompts_logits(learned, scores, toward):
    steer = Steering.from_scores(scores["resid_post"], top_fraction=1.0, mode="patch", source=learned.acts, layers=[1])
    sides = {"generalization": learned.pairs.memorized, "memorization": learned.pairs.generalized}
    prompts = learned.model.to_tokens([item.prompt for item in sides[toward]])
    other = "memorization" if toward == "generalization" else "generalization"
    expected = learned.model(learned.model.to_tokens([item.prompt for item in sides[other]]))
    with steer.applied(learned.model, toward=toward):
        patched = learned.model(prompts)
    close(patched[:, -1], expected[:, -1], 1e-4)
    close(patched[:, :-1], learned.model(prompts)[:, :-1])


def test_patching_is_run_with_hooks_with_the_paired_prompts_values(learned, scores):
    steer = Steering.from_scores(scores["z"], top_fraction=0.3, mode="patch", source=learned.acts)
    rows = [5, 2, 40]
    there = learned.model.to_tokens([learned.pairs.memorized[i].prompt for i in rows])
    paired = learned.model.to_tokens([learned.pairs.generalized[i].prompt for i in rows])
    _, cache = learned.model.run_with_cache(paired)

    def hook_of(layer):
        def hook(activation, hook):
            changed = activation.clone()
            mask = torch.as_tensor(steer.selected[layer]).view(activation.shape[2:])
            changed[:, -1, mask] = cache["z", layer][:, -1, mask]
            return changed

        return hook

    by_hand = learned.model.run_with_hooks(there, fwd_hooks=[(get_act_name("z", i), hook_of(i)) for i in (0, 1)])
    with steer.applied(learned.model, toward="generalization", pairs=rows):
        close(learned.model(there), by_hand, 1e-4)
    with steer.applied(learned.model, toward="generalization", pairs=rows[::-1]):
        assert not torch.allclose(learned.model(there), by_hand, atol=1e-3)


def test_a_patch_holds_at_the_answer_position_alone(learned, scores, answered):
    tokens, n_prompt = answered
    steer = Steering.from_scores(scores["resid_post"], top_fraction=1.0, mode="patch", source=learned.acts)
    assert steer.setting.positions == "prompt" and steer.setting.alpha is None and not steer.shift.any()
    seen = {}

    def look(activation, hook):
        seen["resid_post"] = activation.detach()

    with steer.applied(learned.model, toward="generalization", pairs=range(8), prompt_length=n_prompt):
        learned.model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_resid_post", look)])
        if helpers.HAS_HOOKED_TRANSFORMER:  # a native Bridge keeps no keys and values
            whole = learned.model(tokens)[:, n_prompt - 1 :]
            close(step_by_step(learned.model, tokens, n_prompt), whole, 1e-4)
    source = torch.as_tensor(learned.acts.site("resid_post").generalized[:8, 1])
    close(seen["resid_post"][:, n_prompt - 1], source, 1e-5)
    assert not torch.isclose(seen["resid_post"][:, n_prompt:], source[:, None], atol=1e-5).all(-1).any()


def test_a_batch_that_does_not_match_its_pairs_is_refused(learned, scores):
    steer = Steering.from_scores(scores["post"], mode="patch", source=learned.acts)
    prompt = learned.pairs.memorized[0].prompt
    message = rf"a batch of {len(learned.pairs)} prompts, one for each source pair; received 1\..*pairs=\[\.\.\.\]"
    with pytest.raises(PairsError, match=message), steer.applied(learned.model, toward="generalization"):
        learned.model(prompt)
    assert planted.hooks_on(learned.model) == {}


def test_a_source_pair_that_is_not_there_is_refused(learned, scores):
    steer = Steering.from_scores(scores["post"], mode="patch", source=learned.acts)
    applied = steer.applied(learned.model, toward="generalization", pairs=[10_000])
    with pytest.raises(PairsError, match="received 10000"), applied:
        learned.model(learned.pairs.memorized[0].prompt)
    with pytest.raises(SettingsError, match=r"Steering.applied\(pairs=...\): expected .* equal to 0; received -1"):
        steer.applied(learned.model, toward="generalization", pairs=[-1])


# The planted neuron


@BOTH_WAYS
@pytest.mark.parametrize("mode", ["shift", "patch"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_the_planted_neuron_alone_flips_every_prompt(known, mode, toward, use_cache):
    source = {"source": known.acts} if mode == "patch" else {}
    steer = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, mode=mode, **source)
    assert np.argwhere(steer.selected).tolist() == [[planted.LAYER, planted.NEURON]]
    items = known.pairs.memorized if toward == "generalization" else known.pairs.generalized
    outputs = steered_outputs(
        known.model,
        [item.prompt for item in items],
        [steer],
        toward=toward,
        max_new_tokens=3,
        pairs=np.arange(len(items)),
        use_cache=use_cache,
    )
    assert outputs == [[planted.RULE if toward == "generalization" else planted.MEMORY] * len(items)]


def test_all_other_neurons_together_flip_none(known):
    one = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON)
    others = Steering.from_scores(known.score, top_fraction=1.0)
    others = replace(others, selected=~one.selected, shift=np.where(one.selected, 0.0, others.shift))
    outputs = steered_outputs(
        known.model, [i.prompt for i in known.pairs.memorized], [others], toward="generalization", max_new_tokens=3
    )
    assert outputs == [[planted.MEMORY] * 60]


# Many at once


@pytest.mark.parametrize("batch_size", [1, 7, 2048])
@pytest.mark.parametrize("use_cache", [True, False])
def test_steerings_that_ride_together_give_what_each_gives_alone(known, batch_size, use_cache):
    """Of two sites, all positions and both modes, on prompts of four lengths."""
    resid = mg.attribute(known.acts, "resid_post")
    steerings = [
        Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, alpha=2.0),
        Steering.from_scores(resid, top_fraction=0.5, alpha=1.0, positions="all"),
        Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, alpha=0.3),
        Steering.from_scores(known.score, top_fraction=0.4, mode="patch", source=known.acts),
        Steering.from_scores(resid, top_fraction=0.9, alpha=12.0, positions="all"),
        Steering.from_scores(known.score, top_fraction=0.4, mode="patch", source=known.acts, layers=[0]),
        Steering.from_scores(known.score, top_fraction=0.9, alpha=40.0),
    ]
    index = np.array([3, 9, 0, 21, 40, 41, 59, 7])
    arguments = {"toward": "memorization", "max_new_tokens": 3, "pairs": index, "use_cache": use_cache}
    prompts = [known.pairs.generalized[i].prompt for i in index]
    together = steered_outputs(known.model, prompts, steerings, batch_size=batch_size, **arguments)
    assert together == [steered_outputs(known.model, prompts, [s], **arguments)[0] for s in steerings]
    assert together[0] == together[3] == ["m"] * 8 and together[2] == together[5] == ["r"] * 8
    assert len({tuple(outputs) for outputs in together}) >= 3


@BOTH_WAYS
def test_riding_together_on_a_trained_model_gives_what_each_gives_alone(learned, scores, toward):
    steerings = [
        Steering.from_scores(scores[site], top_fraction=fraction, alpha=alpha)
        for site in ("resid_post", "z")
        for fraction in (0.1, 0.5)
        for alpha in (1.0, 3.0)
    ]
    prompts = [item.prompt for item in learned.pairs.memorized[:20]]
    together = steered_outputs(learned.model, prompts, steerings, toward=toward, max_new_tokens=5)
    uncached = steered_outputs(
        learned.model, prompts, steerings, toward=toward, max_new_tokens=5, batch_size=30, use_cache=False
    )
    assert together == uncached
    for steer, outputs in zip(steerings, together, strict=True):
        with steer.applied(learned.model, toward=toward, prompt_length=6):
            assert outputs[:4] == [planted.greedy_by_hand(learned.model, prompt, 5) for prompt in prompts[:4]]


def test_patches_from_two_sources_ride_apart(known):
    """Each steering patches from its own source, also where site, mode and positions are the same."""
    turned = mg.record(
        known.model,
        mg.PromptPairs.from_strings(
            memorized=[item.prompt for item in known.pairs.generalized],
            generalized=[item.prompt for item in known.pairs.memorized],
        ),
        ["post"],
    )
    steerings = [
        Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, mode="patch", source=source)
        for source in (known.acts, turned)
    ]
    outputs = steered_outputs(
        known.model,
        [item.prompt for item in known.pairs.memorized],
        steerings,
        toward="generalization",
        max_new_tokens=3,
        pairs=np.arange(60),
    )
    assert outputs == [[planted.RULE] * 60, [planted.MEMORY] * 60]


def test_a_prompt_of_several_pairs_is_run_once_unless_it_is_patched(known, monkeypatch):
    run = []
    monkeypatch.setattr(generation, "decode", lambda model, new: run.append(len(new)) or decode(model, new))
    prompts = [item.prompt for item in known.pairs.memorized[:4]] * 3
    how = {"toward": "generalization", "max_new_tokens": 3, "pairs": np.arange(12)}
    shift = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, alpha=2.0)
    assert steered_outputs(known.model, prompts, [shift], **how) == [[planted.RULE] * 12]
    assert sum(run) == 4
    run.clear()
    turned = mg.record(
        known.model,
        mg.PromptPairs.from_strings(
            memorized=[item.prompt for item in known.pairs.memorized],
            # What is patched in: from prompts that compute, but from pair 4 on from ones that recall.
            generalized=[
                (known.pairs.generalized if place < 4 else known.pairs.memorized)[place].prompt for place in range(60)
            ],
        ),
        ["post"],
    )
    patch = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON, mode="patch", source=turned)
    outputs = steered_outputs(known.model, prompts, [patch], **how)
    assert outputs == [[planted.RULE] * 4 + [planted.MEMORY] * 8] and sum(run) == 12


def test_rows_that_do_not_divide_into_the_steerings_are_refused(known):
    steer = Steering.from_scores(known.score)
    everywhere = At(4, slice(None))
    hooks = steering_hooks(known.model, [steer, steer], toward="generalization", at=lambda: everywhere)
    with (
        pytest.raises(ModelError, match=r"a batch in 2 equal blocks; received 3 rows"),
        known.model.hooks(fwd_hooks=hooks),
    ):
        known.model(["abM=", "abG=", "acG="])


def test_without_prompts_or_steerings_there_are_no_outputs(known):
    steer = Steering.from_scores(known.score)
    arguments = {"toward": "generalization", "max_new_tokens": 2}
    assert steered_outputs(known.model, [], [steer], **arguments) == [[]]
    assert steered_outputs(known.model, ["abM="], [], **arguments) == []


# What is left behind


@pytest.mark.parametrize("mode", ["shift", "patch"])
def test_after_an_exception_the_model_has_no_hook_of_ours_and_its_old_logits(known, mode):
    model = planted.build_model()
    source = {"source": known.acts} if mode == "patch" else {}
    steer = Steering.from_scores(known.score, mode=mode, **source)
    before = model("abM=")
    with pytest.raises(KeyboardInterrupt), steer.applied(model, toward="generalization", pairs=[0]):
        assert not torch.equal(model("abM="), before)
        raise KeyboardInterrupt
    assert planted.hooks_on(model) == {} and model.context_level == 0
    assert torch.equal(model("abM="), before)


def test_a_users_own_hooks_remain_also_after_one_of_them_failed(known):
    model, steer, calls = planted.build_model(), Steering.from_scores(known.score), []

    def count(activation, hook):
        calls.append(hook.name)

    def fail(activation, hook):
        raise RuntimeError("a user's own hook failed")

    model.add_hook("blocks.1.mlp.hook_post", count)
    before = model("abM=")
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", fail)]):
        with pytest.raises(RuntimeError, match="a user's own hook failed"), steer.applied(model, toward="memorization"):
            model("abM=")
        assert planted.hooks_on(model) == {"blocks.1.mlp.hook_post": 1, "blocks.1.hook_resid_post": 1}
    assert planted.hooks_on(model) == {"blocks.1.mlp.hook_post": 1}
    assert torch.equal(model("abM="), before) and len(calls) == 3


def test_steerings_nest_and_each_takes_only_its_own_hooks_away(known):
    model = planted.build_model()
    steer = Steering.from_scores(known.score, top_fraction=planted.ONE_NEURON)
    plain = model("abM=")
    with steer.applied(model, toward="generalization"):
        once = model("abM=")
        with steer.applied(model, toward="memorization"):
            close(model("abM="), plain, 1e-4)
        assert torch.equal(model("abM="), once)
    assert torch.equal(model("abM="), plain) and not torch.equal(once, plain)


def test_applied_hands_out_the_model_itself(known):
    with Steering.from_scores(known.score).applied(known.model, toward="memorization") as model:
        assert model is known.model


# What is refused


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, float("nan")])
def test_a_fraction_outside_zero_to_one_is_refused(known, fraction):
    with pytest.raises(SettingsError, match=r"from_scores\(top_fraction=...\): expected .*; received .*Change top_fra"):
        Steering.from_scores(known.score, top_fraction=fraction)


@pytest.mark.parametrize("alpha", [0.0, -2.0, float("inf"), float("nan")])
def test_an_alpha_that_is_not_a_finite_multiple_above_zero_is_refused(known, alpha):
    with pytest.raises(SettingsError, match=r"Steering.from_scores\(alpha=...\): expected .*; received .*Change alpha"):
        Steering.from_scores(known.score, alpha=alpha)


@pytest.mark.parametrize("layers", [[2], [-1], [0, 5]])
def test_layers_that_the_scores_lack_are_refused(known, layers):
    with pytest.raises(SettingsError, match=r"\(layers=...\): expected (layers of the scores, 0 to 1|.* to 0); rec"):
        Steering.from_scores(known.score, layers=layers)


def test_a_patch_without_a_source_is_refused(known):
    with pytest.raises(SettingsError, match=r"source=record\(\.\.\.\).*received source=None, positions=None"):
        Steering.from_scores(known.score, mode="patch")


@pytest.mark.parametrize("positions", ["answer", "all"])
def test_a_patch_beyond_the_answer_position_is_refused(known, positions):
    with pytest.raises(
        SettingsError, match=rf"positions='{positions}'\. Activations are recorded at the answer position"
    ):
        Steering.from_scores(known.score, mode="patch", source=known.acts, positions=positions)


def test_a_source_without_the_scores_site_is_refused(learned, known):
    score = mg.attribute(mg.record(known.model, known.pairs, ["z"]), "z")
    with pytest.raises(SiteError, match=r"site 'z'.*a recorded site \(post, resid_post\)"):
        Steering.from_scores(score, mode="patch", source=known.acts)


def test_an_unknown_direction_is_refused(known):
    steer = Steering.from_scores(known.score)
    with pytest.raises(SettingsError, match=r"\(toward=.*'generalization' or 'memorization'; received 'recall'"):
        steer.applied(known.model, toward="recall")


@pytest.mark.parametrize(("name", "value"), [("mode", "erase"), ("positions", "last")])
def test_an_unknown_mode_or_place_is_refused(known, name, value):
    with pytest.raises(SettingsError, match=rf"{name}.*{value}"):
        Steering.from_scores(known.score, **{name: value})


def test_a_model_of_another_width_is_refused(learned, known):
    steer = Steering.from_scores(known.score)
    with (
        pytest.raises(SiteError, match=r"a model with 64 neurons there, as in the scores; received 256"),
        steer.applied(learned.model, toward="memorization"),
    ):
        learned.model("12+34=")
    assert planted.hooks_on(learned.model) == {}


def test_a_model_of_another_depth_is_refused(known):
    rho = np.ones((3, 64))
    steer = Steering.from_scores(NeuronScores("post", rho, rho, rho, rho, rho, 8, 8))
    with (
        pytest.raises(SiteError, match=r"a model with 3 layers there, as in the scores; received 2"),
        steer.applied(known.model, toward="memorization"),
    ):
        pass


def test_a_model_without_the_site_is_refused(known):
    rho = np.ones((2, planted.D_MODEL))
    steer = Steering.from_scores(NeuronScores("ln2", rho, rho, rho, rho, rho, 8, 8))
    with (
        pytest.raises(SiteError, match=r"blocks\.0\.ln2\.hook_normalized, which it does not have"),
        steer.applied(known.model, toward="memorization"),
    ):
        pass


def test_shapes_are_checked_in_every_test(known):
    steer = Steering.from_scores(known.score)
    with pytest.raises(jaxtyping.TypeCheckError):
        replace(steer, shift="nothing")
