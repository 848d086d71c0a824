"""Guards against hooks written by hand; what is left alone is left alone bit by bit."""

from dataclasses import replace

import bridges
import helpers
import numpy as np
import planted
import pytest
import torch
from transformer_lens import TransformerLensKeyValueCache

import memgen_lens as mg
from memgen_lens.analysis.steering.controls import control_draws
from memgen_lens.core.errors import ModelError, SettingsError, SiteError
from memgen_lens.core.layer_probe import LayerProbe
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.types import Behavior

GENERATE = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}


@pytest.fixture(scope="module")
def guard(known):
    """The planted neuron of layer 1, guarded by what layer 0 has moved to the last position."""
    steer = mg.Steering.from_scores(known.score, planted.ONE_NEURON)
    return mg.Guard(mg.fit_probes(known.acts, "resid_post").at(0), steer, 0.5)


def random_guard(model, prompts, *, site="resid_post", positions="answer", layer=0):
    """A guard with random weights that picks about half of some prompts, and a steering of all neurons above."""
    rng, width = np.random.default_rng(0), model.cfg.d_model
    rho, nmd = rng.uniform(-1, 1, size=(2, model.cfg.n_layers, width))
    ones = np.full_like(rho, 0.5)
    scores = NeuronScores("resid_post", 5 * nmd, rho, ones, ones, ones, 8, 8)
    steer = mg.Steering.from_scores(scores, 1.0, 3.0, positions=positions, layers=[1])
    probe = LayerProbe(site, layer, rng.normal(size=width), 0.0)
    odds = probe.log_odds(last_rows(model, prompts, f"blocks.{layer}.hook_{site}"))
    return mg.Guard(replace(probe, bias=-float(np.median(odds))), steer, 0.5)


def last_rows(model, tokens, name):
    """What a hook point has at the last position of prompts of one length."""
    seen = {}
    model.run_with_hooks(tokens, fwd_hooks=[(name, lambda h, hook: seen.update(h=h.detach()))])
    return seen["h"][:, -1].numpy()


def both_models():
    return [
        pytest.param(lambda: helpers.hooked_transformer(d_vocab=48), id="HookedTransformer", marks=helpers.hooked_only),
        pytest.param(lambda: helpers.hooked_transformer(native=True, d_vocab=48), id="native Bridge"),
        pytest.param(lambda: bridges.bridge("llama"), id="Bridge"),
    ]


@pytest.mark.parametrize("make", both_models())
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
@pytest.mark.parametrize("toward", ["generalization", "memorization"])
def test_rows_are_steered_as_by_hand_or_left_alone_bit_by_bit(make, positions, toward):
    model = make()
    tokens = torch.randint(4, 40, (12, 5), generator=torch.Generator().manual_seed(1))
    answers = torch.randint(4, 40, (12, 2), generator=torch.Generator().manual_seed(2))
    guard = random_guard(model, tokens, positions=positions)
    whole = torch.cat([tokens, answers], dim=1)
    odds = guard.probe.log_odds(last_rows(model, tokens, "blocks.0.hook_resid_post"))
    picked = odds >= 0 if toward == "generalization" else -odds >= 0
    assert 4 <= picked.sum() <= 8
    where = {"answer": slice(4, None), "prompt": slice(4, 5), "all": slice(None)}[positions]
    sign = -1 if toward == "generalization" else 1

    def by_hand(h, hook):
        new = h.clone()
        for row in np.flatnonzero(picked):
            new[row, where] += torch.as_tensor(sign * guard.steering.shift[1], dtype=h.dtype)
        return new

    expected = model.run_with_hooks(whole, fwd_hooks=[("blocks.1.hook_resid_post", by_hand)])
    plain = model(whole)
    with guard.applied(model, toward=toward, prompt_length=5):
        guarded = model(whole)
    with guard.steering.applied(model, toward=toward, prompt_length=5):
        everywhere = model(whole)
    assert torch.equal(guarded[~picked], plain[~picked])
    assert torch.equal(guarded[picked], everywhere[picked])
    torch.testing.assert_close(guarded, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(guarded[picked], plain[picked], atol=1e-2)
    assert planted.hooks_on(model) == {}
    for row in range(12):  # alone
        with guard.applied(model, toward=toward, prompt_length=5):
            alone = model(whole[[row]])
        if picked[row]:
            torch.testing.assert_close(alone[0], guarded[row], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(alone, model(whole[[row]]))


@helpers.hooked_only  # of other models' caches, see the next test
def test_cached_steps_keep_what_the_prompt_decided():
    model = helpers.hooked_transformer()
    tokens = torch.randint(1, 13, (10, 7), generator=torch.Generator().manual_seed(1))
    guard = random_guard(model, tokens[:, :4])
    with guard.applied(model, toward="memorization", prompt_length=4):
        whole = model(tokens)[:, 3:]
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    plain_cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    parts = [tokens[:, :4], *tokens[:, 4:].split(1, dim=1)]

    def steps(cache):
        return torch.stack(
            [model(part, past_kv_cache=cache, attention_mask=torch.ones_like(part))[:, -1] for part in parts], dim=1
        )

    plain = steps(plain_cache)
    odds = guard.probe.log_odds(last_rows(model, tokens[:, :4], "blocks.0.hook_resid_post"))
    later = guard.probe.log_odds(last_rows(model, tokens[:, :6], "blocks.0.hook_resid_post"))
    assert ((odds >= 0) != (later >= 0)).any(), "a row on which a later position would decide otherwise"
    with guard.applied(model, toward="memorization"):
        cached = steps(cache)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)
    left = -odds < 0
    assert torch.equal(cached[left], plain[left])


@pytest.mark.parametrize("make", both_models())
def test_generate_is_guarded_with_a_cache_and_without(make):
    model = make()
    if model.tokenizer is None:
        model.tokenizer = bridges.character_tokenizer()
    prompts = torch.randint(4, 40, (12, 5), generator=torch.Generator().manual_seed(1))
    guard = random_guard(model, prompts)
    odds = guard.probe.log_odds(last_rows(model, prompts, "blocks.0.hook_resid_post"))
    outputs = []
    for cached in (True, False):
        plain = model.generate(prompts, use_past_kv_cache=cached, **GENERATE)
        with guard.steering.applied(model, toward="generalization"):
            everywhere = model.generate(prompts, use_past_kv_cache=cached, **GENERATE)
        with guard.applied(model, toward="generalization"):
            guarded = model.generate(prompts, use_past_kv_cache=cached, **GENERATE)
        assert torch.equal(guarded, torch.where(torch.as_tensor(odds >= 0)[:, None], everywhere, plain))
        assert not torch.equal(guarded, plain) and not torch.equal(guarded, everywhere)
        outputs.append(guarded)
    assert torch.equal(*outputs)


def test_new_prompts_are_decided_on_anew(known, guard):
    prompts = [known.model.to_tokens(text) for text in (["aM=", "bG=", "cM="], ["aG=", "bM=", "cM="])]
    with guard.applied(known.model, toward="generalization"):
        said = [known.model(tokens)[:, -1].argmax(-1) for tokens in prompts]
    assert all((row == known.model.to_single_token(planted.RULE)).all() for row in said)
    with guard.applied(known.model, toward="memorization"):
        said = [known.model(tokens)[:, -1].argmax(-1) for tokens in prompts]
    assert all((row == known.model.to_single_token(planted.MEMORY)).all() for row in said)


def test_padded_prompts_are_read_at_their_own_answer_positions(known, guard):
    texts = ["aM=", "abcdG=", "abM=", "G="]
    tokens = known.model.to_tokens(texts)
    plain = known.model(tokens)
    with guard.applied(known.model, toward="generalization", prompt_length=[3, 6, 4, 2]):
        guarded = known.model(tokens)
    assert torch.equal(guarded[[1, 3]], plain[[1, 3]])
    for row, place in ((0, 2), (2, 3)):
        assert guarded[row, place].argmax() == known.model.to_single_token(planted.RULE)


def test_at_the_same_hook_point_the_probe_reads_before_it_is_changed(known):
    report = mg.fit_probes(known.acts, "post")
    steer = mg.Steering.from_scores(known.score, planted.ONE_NEURON, 50.0)
    guard = mg.Guard(report.at(1), steer, 0.5)
    tokens = known.model.to_tokens(["aM=", "bG="])
    plain = known.model(tokens)
    with guard.applied(known.model, toward="generalization"):
        guarded = known.model(tokens)
    assert torch.equal(guarded[1], plain[1]) and not torch.equal(guarded[0], plain[0])


def test_nothing_is_left_behind_after_an_exception(known, guard):
    with pytest.raises(ZeroDivisionError), guard.applied(known.model, toward="generalization"):
        known.model(known.model.to_tokens("aM="))
        1 / 0  # noqa: B018
    assert planted.hooks_on(known.model) == {}


def test_a_probe_above_what_is_steered_is_refused(known):
    report, steer = mg.fit_probes(known.acts, "resid_post"), mg.Steering.from_scores(known.score, planted.ONE_NEURON)
    message = "reads blocks.1.hook_resid_post, where blocks.1.mlp.hook_post is steered before"
    with pytest.raises(SiteError, match=message):
        mg.Guard(report.at(1), steer, 0.5)
    with pytest.raises(SiteError, match="a probe inside the blocks"):
        mg.Guard(LayerProbe("embed", 0, np.zeros(3), 0.0), steer, 0.5)
    mg.Guard(report.at(0), steer, 0.5)


def test_a_hook_point_of_unknown_place_is_refused_when_it_comes_too_late():
    model = bridges.bridge("gpt2")
    tokens = torch.randint(4, 40, (6, 5), generator=torch.Generator().manual_seed(1))
    guard = random_guard(model, tokens)
    late = replace(guard, probe=replace(guard.probe, site="blocks.1.hook_out", layer=0))
    low = mg.Steering.from_scores(guard.steering.scores, 1.0, layers=[0])
    with (
        pytest.raises(SiteError, match=r"reads blocks.1.hook_out, where blocks.0.hook_resid_post is steered before"),
        replace(late, steering=low).applied(model, toward="generalization"),
    ):
        model(tokens)


@helpers.hooked_only
def test_a_pass_that_goes_on_from_prompts_that_were_not_seen_is_refused(known, guard):
    cache = TransformerLensKeyValueCache.init_cache(known.model.cfg, "cpu", 1)
    tokens = known.model.to_tokens("abM=")
    known.model(tokens[:, :2], past_kv_cache=cache)
    guarded = guard.applied(known.model, toward="generalization")
    with pytest.raises(ModelError, match="answer positions it has not seen"), guarded:
        known.model(tokens[:, 2:], past_kv_cache=cache)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"threshold": 1.5}, r"Guard\(threshold=...\)"),
        ({"probe": "probe"}, r"Guard\(probe=...\)"),
        ({"steering": None}, r"Guard\(steering=...\)"),
    ],
)
def test_a_guard_of_something_else_is_refused(guard, changed, message):
    with pytest.raises(SettingsError, match=message):
        replace(guard, **changed)


def test_a_model_of_another_shape_is_refused(guard):
    with pytest.raises(SiteError), guard.applied(helpers.hooked_transformer(), toward="generalization") as model:
        model(torch.ones(2, 4, dtype=torch.long))


# Fitted, and judged


@pytest.fixture(scope="module")
def fitted(learned):
    scores = mg.attribute(learned.acts, "resid_post")
    steer = mg.Steering.from_scores(scores, 0.2, 3.0, layers=[1])
    guard = mg.Guard.fit(learned.model, learned.task, learned.acts, steer, false_trigger_rate=0.05)
    table = mg.evaluate_guard(learned.model, learned.task, learned.pairs, guard, progress=False)
    return guard, table


def test_a_fitted_guard_knows_select_and_tune_and_not_test(learned, fitted):
    guard, _ = fitted
    acts = learned.acts
    test = acts.pairs.of("test")
    sites = {}
    for name, recorded in acts.sites.items():
        memorized, generalized = recorded.memorized.copy(), recorded.generalized.copy()
        memorized[test], generalized[test] = generalized[test], memorized[test]
        sites[name] = replace(recorded, memorized=memorized, generalized=generalized)
    again = mg.Guard.fit(
        learned.model, learned.task, replace(acts, sites=sites), guard.steering, false_trigger_rate=0.05
    )
    assert again.threshold == guard.threshold and again.probe.site == guard.probe.site
    np.testing.assert_array_equal(again.probe.weight, guard.probe.weight)
    assert all(rate["rate"] <= 0.05 for rate in guard.chosen.triggered.values())
    assert set(guard.chosen.triggered) == {"tune", "validation"}


def test_a_layer_above_what_is_steered_is_not_taken(learned):
    scores = mg.attribute(learned.acts, "post")
    steer = mg.Steering.from_scores(scores, 0.2, per_layer=True, layers=[0])
    assert steer.selected[0].any()
    guard = mg.Guard.fit(learned.model, None, learned.acts, steer)
    assert guard.probe.layer == 0 and guard.probe.site in ("post", "z")
    with pytest.raises(SiteError, match=r"resid_post, layer 1, where blocks.0.mlp.hook_post is steered"):
        mg.Guard.fit(learned.model, None, learned.acts, steer, site="resid_post", layer=1)


def test_outputs_put_together_are_those_of_the_guard_itself(learned, fitted):
    """The table against the model generating inside `Guard.applied`, prompt after prompt."""
    guard, table = fitted
    task, index = learned.task, learned.pairs.of("test")
    kinds = {
        "prevented": [learned.pairs.memorized[i] for i in index],
        "rephrased": [learned.pairs.generalized[i] for i in index],
        "heldout": task.items("heldout")[:20],
    }
    said = {}
    with guard.applied(learned.model, toward="generalization", prompt_length=6):
        for name, items in kinds.items():
            said[name] = [planted.greedy_by_hand(learned.model, item.prompt, 5) for item in items]
    behaviors = {n: [task.classify(i, o) for i, o in zip(kinds[n], said[n], strict=True)] for n in kinds}
    rates = table.policies["guard"]
    assert table.n == len(index)
    assert rates.prevented["k"] == sum(b is not Behavior.MEMORIZATION for b in behaviors["prevented"])
    assert rates.to_rule["k"] == sum(b is Behavior.GENERALIZATION for b in behaviors["prevented"])
    assert rates.rephrased["k"] == sum(b is Behavior.GENERALIZATION for b in behaviors["rephrased"])


def test_the_ends_of_the_curve_steer_everything_and_nothing(fitted):
    _, table = fitted
    curve, none, every = table.curve, table.policies["none"], table.policies["unconditional"]
    assert curve.prevented[0] == every.prevented["rate"] and curve.prevented[-1] == none.prevented["rate"] == 0
    assert curve.lost[0] == every.lost and curve.lost[-1] == none.lost == 0
    assert curve.heldout_triggered[0] == 1 and curve.rephrased_triggered[-1] == 0
    assert (np.diff(curve.heldout_triggered) <= 0).all()


def test_the_control_steers_as_many_prompts_without_knowing_which(fitted):
    _, table = fitted
    kinds = [table.triggered[name] for name in ("memorized", "rephrased", "heldout")]
    share = sum(rate["k"] for rate in kinds) / sum(rate["n"] for rate in kinds)
    every = table.policies["unconditional"].prevented["rate"]
    assert table.shuffled.prevented["mean"] == pytest.approx(share * every, abs=0.03)
    assert table.shuffled.prevented["n_draws"] == 200
    assert table.policies["guard"].prevented["rate"] > 2 * table.shuffled.prevented["ci95"][1]


def test_a_perfect_probe_prevents_every_recall_and_steers_nothing_else(known, guard):
    table = mg.evaluate_guard(known.model, None, known.pairs, guard, progress=False)
    rates = table.policies["guard"]
    assert rates.prevented["rate"] == rates.to_rule["rate"] == rates.rephrased["rate"] == 1
    assert table.triggered["memorized"]["rate"] == 1 and table.triggered["rephrased"]["rate"] == 0
    assert rates.heldout is None and rates.lost is None and "no held-out prompts" in table.why
    assert table.policies["unconditional"].rephrased["rate"] == 1, "what is taken away is not there on these"


def test_a_steering_of_nothing_prevents_nothing_whatever_is_picked(known, guard):
    none = control_draws(guard.steering, "low_correlation", 1, np.random.default_rng(0))[0]
    none = replace(none, shift=np.zeros_like(none.shift))
    table = mg.evaluate_guard(known.model, None, known.pairs, replace(guard, steering=none), progress=False)
    assert table.triggered["memorized"]["rate"] == 1 and table.policies["guard"].prevented["rate"] == 0


def test_patches_and_too_few_draws_are_refused(known, guard):
    patch = mg.Steering.from_scores(known.score, 0.1, mode="patch", source=known.acts, layers=[1])
    with pytest.raises(SettingsError, match="received mode='patch'"):
        mg.evaluate_guard(known.model, None, known.pairs, replace(guard, steering=patch), progress=False)
    with pytest.raises(SettingsError, match="n_controls of at least 20"):
        mg.evaluate_guard(known.model, None, known.pairs, guard, n_controls=5, progress=False)
