"""Causal methods against hand-written loops, where they are equal, and on a model whose deciding neuron is known."""

import bridges
import numpy as np
import planted
import pytest
import torch
from scipy.stats import false_discovery_control, spearmanr
from transformer_lens.utilities import get_act_name

import memgen_lens as mg
from memgen_lens.analysis.attribution import contrast
from memgen_lens.analysis.attribution.answers import answers_of
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT, ON_A_PATH
from memgen_lens.core.errors import ModelError, PairsError, SettingsError, SiteError
from memgen_lens.models.tokens import tokenized

QUICK = {"n_permutations": 0, "progress": False}


@pytest.fixture(scope="module")
def known():
    return planted.build_model(), planted.prompt_pairs(20)


@pytest.fixture(scope="module")
def recalled(trained):
    """Pairs of the small trained model, whose memorized answers have more tokens than one."""
    pairs = mg.collect_pairs(trained.model, trained.task, seed=0, progress=False)
    return trained.model, pairs.take(np.arange(12))


def by_hand(model, item, hook, *, put=None, gradient=False):
    """The contrast of one prompt, run whole and without a cache, or its gradient by what ``hook`` has at its end."""
    prompt = model.to_tokens(item.prompt)
    last, total = prompt.shape[1] - 1, 0.0
    deltas = []

    def change(activation, hook):
        activation = activation.clone()
        if put is not None:
            put(activation, last)
        if gradient:
            deltas[:] = deltas or [torch.zeros_like(activation[0, last], requires_grad=True)]
            activation[0, last] = activation[0, last] + deltas[0]
        return activation

    for sign, answer in ((1, item.memorized_answer), (-1, item.rule_answer)):
        ids = model.tokenizer.encode(answer, add_special_tokens=False)
        tokens = torch.cat([prompt, torch.tensor([ids])], dim=1)
        with model.hooks(fwd_hooks=[(hook, change)]):
            logits = model(tokens, attention_mask=torch.ones_like(tokens))[0].log_softmax(-1)
        total = total + sign * sum(logits[last + i, token] for i, token in enumerate(ids))
    return torch.autograd.grad(total, deltas[0])[0] if gradient else total.detach()


def neurons(model, prompt, hook):
    seen = []
    tokens = model.to_tokens(prompt)
    with model.hooks(fwd_hooks=[(hook, lambda activation, hook: seen.append(activation[0, -1].detach()))]):
        model(tokens, attention_mask=torch.ones_like(tokens))
    return seen[0]


# --- a model whose deciding neuron is known ----------------------------------------------------------------------


@pytest.mark.parametrize("method", CAUSAL)
def test_the_neuron_that_decides_makes_the_difference(known, method):
    model, pairs = known
    score = mg.attribute(model, pairs, "post", method=method, split=None, progress=False)
    size = np.abs(score.score)
    assert np.unravel_index(size.argmax(), size.shape) == (planted.LAYER, planted.NEURON)
    assert score.score[planted.LAYER, planted.NEURON] > 0, "towards memorization"
    assert size.max() > 20 * np.sort(size.ravel())[-2]
    assert score.p_family[planted.LAYER, planted.NEURON] < 0.01
    assert score.method == method and score.n_pairs == 20
    assert np.allclose(score.q.ravel(), false_discovery_control(score.p.ravel())), "q is p, corrected for all neurons"
    assert mg.Steering.from_scores(score, planted.ONE_NEURON).selected[planted.LAYER, planted.NEURON]
    assert not planted.hooks_on(model)


def test_behind_the_last_nonlinearity_methods_are_one(known):
    """In the last MLP of a model without norms, the contrast of one-token answers is linear in its neurons."""
    model, pairs = known
    zero = {"ablation": {"baseline": "zero"}}
    found = {m: mg.attribute(model, pairs, "post", method=m, split=None, **zero.get(m, {}), **QUICK) for m in CAUSAL}
    last = {method: scores.score[-1] for method, scores in found.items()}
    for method in ("attribution_patching_ig", "patching"):
        assert np.allclose(last[method], last["attribution_patching"], atol=1e-4), method
    assert np.allclose(last["ablation"], last["integrated_gradients"], atol=1e-4)
    unembed = model.W_U if hasattr(model, "W_U") else model.unembed.W_U
    token = {text: model.tokenizer.convert_tokens_to_ids(text) for text in "rm"}
    weight = model.blocks[-1].mlp.W_out @ (unembed[:, token["m"]] - unembed[:, token["r"]])
    acts = mg.record(model, pairs, ["post"], progress=False)
    mem, gen = acts.site("post").memorized[:, -1], acts.site("post").generalized[:, -1]
    assert np.allclose(last["patching"], (mem - gen).mean(0) * weight.detach().numpy(), atol=1e-4)
    assert np.allclose(last["ablation"], mem.mean(0) * weight.detach().numpy(), atol=1e-4)


# --- against loops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["post", "resid_mid", "z"])
def test_gradients_of_answers_of_many_tokens_are_those_of_a_loop(recalled, site):
    model, pairs = recalled
    found = mg.attribute(model, pairs, site, method="attribution_patching", split=None, **QUICK).score
    for layer in range(model.cfg.n_layers):
        hook, expected = get_act_name(site, layer), 0
        for mem, gen in zip(pairs.memorized, pairs.generalized, strict=True):
            slope = sum(by_hand(model, item, hook, gradient=True) for item in (mem, gen)) / 2
            expected = (
                expected + (slope * (neurons(model, mem.prompt, hook) - neurons(model, gen.prompt, hook))).flatten()
            )
        expected = (expected / len(pairs)).numpy()
        assert np.allclose(found[layer], expected, atol=1e-5 * np.abs(expected).max() + 1e-5)


# Not at residual sites: near zero a layer norm makes gradients so large that float32 keeps no five digits.
@pytest.mark.parametrize("site", ["post", "z"])
@pytest.mark.parametrize("method", ON_A_PATH)
def test_mean_gradients_on_a_path_are_those_of_a_loop_over_its_points(recalled, method, site):
    model, pairs = recalled
    pairs, n_steps = pairs.take(np.arange(8)), 2
    found = mg.attribute(model, pairs, site, method=method, n_steps=n_steps, split=None, **QUICK).score
    points, weights = np.polynomial.legendre.leggauss(n_steps)

    points, weights = (points + 1) / 2, weights / 2
    if method == "integrated_gradients":
        points, weights = points**3, weights * 3 * points**2

    def mean_gradient(item, hook, start, end):
        total = 0
        for point, weight in zip(points, weights, strict=True):
            placed = start + float(point) * (end - start)

            def put(activation, last, placed=placed):
                activation[0, last] = placed

            total = total + float(weight) * by_hand(model, item, hook, put=put, gradient=True)
        return total

    for layer in range(model.cfg.n_layers):
        hook, expected = get_act_name(site, layer), 0
        for mem, gen in zip(pairs.memorized, pairs.generalized, strict=True):
            of_mem, of_gen = (neurons(model, item.prompt, hook) for item in (mem, gen))
            if method == "integrated_gradients":
                effect = of_mem * mean_gradient(mem, hook, torch.zeros_like(of_mem), of_mem)
            else:
                slopes = [mean_gradient(item, hook, of_gen, of_mem) for item in (mem, gen)]
                effect = (of_mem - of_gen) * (slopes[0] + slopes[1]) / 2
            expected = expected + effect.flatten()
        expected = (expected / len(pairs)).numpy()
        assert np.allclose(found[layer], expected, atol=1e-5 * np.abs(expected).max() + 1e-5)


def test_exact_methods_are_those_of_a_loop(recalled):
    model, pairs = recalled
    some = np.full((model.cfg.n_layers, model.cfg.d_mlp), -1)
    chosen = [(0, 3), (0, 40), (1, 3), (1, 100)]
    for number, (layer, neuron) in enumerate(chosen):
        some[layer, neuron] = number
    how = {"split": None, "groups": some, **QUICK}
    patched = mg.attribute(model, pairs, "post", method="patching", **how).score
    zeroed = mg.attribute(model, pairs, "post", method="ablation", baseline="zero", **how).score
    assert np.count_nonzero(patched) <= len(chosen) and not patched[some < 0].any()
    for layer, neuron in chosen:
        hook, patch, zero = get_act_name("post", layer), 0, 0

        def value(to, neuron=neuron):
            def put(activation, last):
                activation[0, last, neuron] = to

            return put

        for mem, gen in zip(pairs.memorized, pairs.generalized, strict=True):
            of_mem, of_gen = (neurons(model, item.prompt, hook)[neuron] for item in (mem, gen))
            plain = [by_hand(model, item, hook) for item in (mem, gen)]
            patch += by_hand(model, gen, hook, put=value(of_mem)) - plain[1]
            patch += plain[0] - by_hand(model, mem, hook, put=value(of_gen))
            zero += plain[0] - by_hand(model, mem, hook, put=value(0.0))
        assert patched[layer, neuron] == pytest.approx(float(patch) / 2 / len(pairs), abs=1e-5)
        assert zeroed[layer, neuron] == pytest.approx(float(zero) / len(pairs), abs=1e-5)


def test_integrated_gradients_of_a_layer_sum_up_to_what_zeroing_it_loses(recalled):
    model, pairs = recalled
    how = {"method": "integrated_gradients", "split": None, **QUICK}
    found = mg.attribute(model, pairs, "post", n_steps=600, **how).score
    coarse = mg.attribute(model, pairs, "post", **how).score
    layers = np.repeat(np.arange(model.cfg.n_layers)[:, None], model.cfg.d_mlp, axis=1)
    whole = mg.attribute(
        model, pairs, "post", method="ablation", baseline="zero", groups=layers, split=None, **QUICK
    ).score
    for layer in range(model.cfg.n_layers):
        assert found[layer].sum() == pytest.approx(whole[layer, 0], rel=1e-3)
        # Each relu that goes on or off on the way is a kink, which 20 points meet less well than 600.
        assert coarse[layer].sum() == pytest.approx(whole[layer, 0], rel=3e-2)


@pytest.mark.parametrize("method", CAUSAL)
@pytest.mark.parametrize("which", ["answers of many tokens", "prompts of many lengths"])
def test_batched_is_single(recalled, known, method, which):
    model, pairs = recalled if which == "answers of many tokens" else known
    how = {"method": method, "split": None, "n_steps": 5 if method in ON_A_PATH else None, **QUICK}
    if method in EXACT:  # some neurons, one by one
        groups = np.full((model.cfg.n_layers, model.cfg.d_mlp), -1)
        groups[:, :12] = np.arange(12 * len(groups)).reshape(-1, 12)
        groups[planted.LAYER, planted.NEURON] = groups.max() + 1
        how["groups"] = groups
    many, single = (mg.attribute(model, pairs, "post", batch_size=size, **how).score for size in (None, 1))
    assert np.abs(single).max() > 0.01
    assert np.allclose(many, single, atol=1e-5 * np.abs(single).max() + 1e-6)


@pytest.mark.parametrize("method", ["attribution_patching", "integrated_gradients", "ablation"])
def test_a_model_that_keeps_no_past_gives_the_same(recalled, method, monkeypatch):
    model, pairs = recalled
    groups = np.repeat(np.arange(model.cfg.n_layers)[:, None], model.cfg.d_mlp, axis=1) if method in EXACT else None
    how = {"method": method, "split": None, "groups": groups, "n_steps": 5 if method in ON_A_PATH else None, **QUICK}
    cached = mg.attribute(model, pairs, "post", **how).score
    monkeypatch.setattr(contrast, "run_before", lambda *args: None)
    whole = mg.attribute(model, pairs, "post", **how).score
    assert np.allclose(cached, whole, atol=1e-5 * np.abs(whole).max() + 1e-6)


@pytest.mark.parametrize("method", CAUSAL)
def test_room_for_one_row_at_a_time_is_enough(known, method, monkeypatch):
    model, pairs = known
    how = {"method": method, "split": "select", **QUICK}
    expected = mg.attribute(model, pairs, "post", **how).score
    monkeypatch.setattr(contrast, "rows_at_once", lambda *args, **how: 1)
    found = mg.attribute(model, pairs, "post", batch_size=3, **how).score
    assert np.allclose(found, expected, atol=1e-5 * np.abs(expected).max() + 1e-6)


def test_effects_are_of_the_right_pairs_whatever_their_order(known):
    """Items that recur out of order, of which a split takes some: the mean over its pairs, one by one."""
    model, pairs = known
    shuffled = mg.PromptPairs.from_strings(
        [item.prompt for item in pairs.memorized],
        [item.prompt for item in pairs.generalized],
        memorized_answers=[planted.MEMORY] * 20,
        rule_answers=[planted.RULE] * 20,
        items=list(range(10)) * 2,
        shares=(0.8, 0.1),
    )
    how = {"method": "attribution_patching", **QUICK}
    found = mg.attribute(model, shuffled, "post", split="select", **how)
    each = [
        mg.attribute(model, shuffled.take(np.repeat(place, 8)), "post", split=None, **how).score
        for place in shuffled.of("select")
    ]
    assert np.allclose(found.score, np.mean(each, axis=0), atol=1e-5)
    assert found.n_pairs == len(each) == 2 * found.n_items


@pytest.mark.parametrize("method", CAUSAL)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_callers_mode_does_not_matter(known, method, mode):
    model, pairs = known
    how = {"method": method, "split": None, "n_steps": 3 if method in ON_A_PATH else None, **QUICK}
    expected = mg.attribute(model, pairs, "post", **how).score
    with mode():
        assert np.array_equal(mg.attribute(model, pairs, "post", **how).score, expected)


def test_weights_that_learn_get_no_gradient(known):
    model, pairs = planted.build_model().requires_grad_(), known[1]
    expected = mg.attribute(*known, "post", method="attribution_patching", split=None, **QUICK).score
    found = mg.attribute(model, pairs, "post", method="attribution_patching", split=None, **QUICK).score
    assert np.array_equal(found, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_linear_estimate_goes_along_with_the_exact_effect(recalled):
    model, pairs = recalled
    exact = mg.attribute(model, pairs, "post", method="patching", split=None, **QUICK).score
    for method in ("attribution_patching", "attribution_patching_ig"):
        estimate = mg.attribute(model, pairs, "post", method=method, split=None, **QUICK).score
        assert spearmanr(estimate.ravel(), exact.ravel()).statistic > 0.6, method


# --- a user's own quantity and answers ---------------------------------------------------------------------------


def test_a_metric_takes_the_place_of_the_answers(known):
    model, _ = known
    pairs = planted.prompt_pairs(20, answers=False)
    token = {text: model.tokenizer.convert_tokens_to_ids(text) for text in "rm"}
    seen = []

    def metric(logits, items):
        seen.append(len(items) == len(logits))
        return 3 * (logits[:, token["m"]] - logits[:, token["r"]])

    for method in ("attribution_patching", "patching"):
        tripled = mg.attribute(model, pairs, "post", method=method, metric=metric, split=None, **QUICK).score
        plain = mg.attribute(model, planted.prompt_pairs(20), "post", method=method, split=None, **QUICK).score
        assert np.allclose(tripled, 3 * plain, atol=1e-3)
    assert all(seen)


def test_what_cannot_be_explained_is_refused(known):
    model, pairs = known
    with pytest.raises(PairsError, match=r"attribute: expected both answers of each pair; .*memorized_answers="):
        mg.attribute(model, planted.prompt_pairs(20, answers=False), "post", method="patching", split=None, **QUICK)
    how = {"site": "post", "split": None, **QUICK}
    with pytest.raises(ModelError, match=r"a tensor of one number a row, \[\d+\]; received \[\d+, \d+\]"):
        mg.attribute(model, pairs, method="patching", metric=lambda logits, items: logits, **how)
    with pytest.raises(ModelError, match=r"the rows' items; received len, which says: len\(\) takes exactly one"):
        mg.attribute(model, pairs, method="patching", metric=len, **how)
    with pytest.raises(ModelError, match=r"received one without a gradient"):
        mg.attribute(
            model, pairs, method="attribution_patching", metric=lambda logits, items: logits.detach()[:, 0], **how
        )
    for argument, value in {"groups": [[1]], "baseline": "zero", "n_steps": 3, "metric": len}.items():
        with pytest.raises(SettingsError, match=rf"attribute\({argument}=\.\.\.\).*which does not use it"):
            mg.attribute(model, pairs, method="pearson", **{argument: value}, **how)
    odd = mg.PromptPairs.from_strings(["Ma="] * 9, ["Ga="] * 9, memorized_answers=["m"] * 9, rule_answers=["?"] * 9)
    with pytest.raises(ModelError, match=r"received '\?', of which it makes none, or unknown ones"):
        mg.attribute(model, odd, method="patching", **how)
    long = mg.PromptPairs.from_strings(
        ["M" + "a" * 22 + "="] * 9, ["G" + "a" * 22 + "="] * 9, memorized_answers=["mm"] * 9, rule_answers=["rr"] * 9
    )
    with pytest.raises(ModelError, match=r"within the model's context of 24 tokens"):
        mg.attribute(model, long, method="patching", **how)
    with pytest.raises(SettingsError, match=r"a number for each neuron of the site, 2x64, .*received 1x3"):
        mg.attribute(model, pairs, method="patching", groups=[[1, 2, 3]], **how)
    acts = mg.record(model, pairs, ["post"], progress=False)
    with pytest.raises(
        SettingsError, match=r"attribute\(model, pairs, site, method='patching'\).*recorded activations"
    ):
        mg.attribute(acts, "post", method="patching")
    with pytest.raises(SettingsError, match=r"expected attribute\(model, pairs, site"):
        mg.attribute(model, "post")
    with pytest.raises(SiteError):
        mg.attribute(model, pairs, "nowhere", method="ablation", split=None)
    assert not planted.hooks_on(model)


def test_an_answer_is_spelled_as_the_model_spells_it():
    model = bridges.bridge("llama")
    texts = [f"{a}+{b}=" for a in "abcd" for b in "efgh"][:10]
    pairs = mg.PromptPairs.from_strings(texts, texts[::-1], memorized_answers=["1"] * 10, rule_answers=["2"] * 10)
    found = answers_of(model, pairs, batch_size=4, call="here")
    space, one = (model.tokenizer.convert_tokens_to_ids(text) for text in (" ", "1"))
    for item, (memorized, _) in zip(pairs.memorized, found, strict=True):
        tokens, _ = tokenized(model, [item.prompt])
        logits = model(tokens, attention_mask=torch.ones_like(tokens))[0, -1]
        assert memorized == ([space, one] if logits[space] > logits[one] else [one])
    assert len({len(memorized) for memorized, _ in found}) == 2, "both spellings occur"


def test_ablation_by_another_items_value_and_by_the_mean(known):
    model, pairs = known
    acts = mg.record(model, pairs, ["post"], progress=False).site("post")
    both = np.concatenate([acts.memorized, acts.generalized])
    how = {"method": "ablation", "split": None, **QUICK}
    zero = mg.attribute(model, pairs, "post", baseline="zero", **how).score[-1]
    mean = mg.attribute(model, pairs, "post", baseline="mean", **how).score[-1]
    # Linear: what is lost is proportional to how far the value is moved.
    size = acts.memorized[:, -1].mean(0)
    moved = size - both[:, -1].mean(0)
    there = np.abs(size) > 1e-3
    assert np.allclose(mean[there], (zero * moved / np.where(there, size, 1))[there], atol=1e-3)
    drawn = [mg.attribute(model, pairs, "post", baseline="resample", seed=seed, **how).score for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert abs(drawn[0][planted.LAYER, planted.NEURON]) < 0.2 * zero[planted.NEURON], "the marker fires on all items"
    batched = mg.attribute(model, pairs, "post", baseline="resample", seed=0, batch_size=3, **how).score
    assert np.allclose(batched, drawn[0], atol=1e-5), "who stands for whom depends on no batch"


def test_an_answer_that_another_begins_with_ends(known):
    model, _ = known
    pairs = mg.PromptPairs.from_strings(
        ["Ma=", "aM="] * 5, ["Ga=", "aG="] * 5, memorized_answers=["m"] * 10, rule_answers=["mr"] * 10
    )
    memorized, rule = answers_of(model, pairs, batch_size=8, call="here")[0]
    assert memorized[-1] == rule[-1] == model.tokenizer.eos_token_id and len(rule) == len(memorized) + 1


def test_a_causal_score_steers_neurons_that_make_for_the_recall(known):
    model, pairs = known
    score = mg.attribute(model, pairs, "post", method="patching", split=None, **QUICK)
    every = mg.Steering.from_scores(score, 1.0).selected
    assert np.array_equal(every, score.score > 0) and not every.all()


def test_scores_by_any_method_are_read_as_they_were_written(known, tmp_path):
    model, pairs = known
    score = mg.attribute(model, pairs, "post", method="attribution_patching", split=None, **QUICK)
    again = mg.NeuronScores.load(score.save(tmp_path))
    assert again.method == "attribution_patching" and np.array_equal(again.score, score.score)
    assert np.array_equal(again.rho, score.rho)
