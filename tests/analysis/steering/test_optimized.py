"""Directions found by gradient descent: against steps by hand, with every forward pass whole, and on planted models."""

from dataclasses import replace

import bridges
import helpers
import numpy as np
import planted
import pytest
import torch

import memgen_lens as mg
from memgen_lens.core.errors import MemgenError, ModelError, PairsError, SettingsError, SiteError

SITE = "resid_post"


def by_hand(model, pairs, layers, *, toward, n_steps, rate, ends, positions="answer"):
    """The same steps, a prompt and answer at a time, and nothing kept: ``[layer, neuron]``."""
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    eos, rows = model.tokenizer.eos_token_id, {}
    for i in pairs.of("select"):
        steered = (pairs.memorized if toward == "generalization" else pairs.generalized)[i]
        item = pairs.memorized[i]
        answer = item.rule_answer if toward == "generalization" else item.memorized_answer
        ids = [model.tokenizer.encode(text, add_special_tokens=False) for text in (steered.prompt, answer)]
        rows.setdefault(steered.prompt, (ids[0], ids[1] + [eos] * ends))
    norms = {name: [] for name in hooks}

    def looked(name, last):
        return name, lambda h, hook: norms[name].append(float(h[0, last].norm()))

    for prompt, _ in rows.values():
        with torch.no_grad():
            model.run_with_hooks(
                torch.tensor([prompt]), fwd_hooks=[looked(name, len(prompt) - 1) for name in hooks], prepend_bos=False
            )
    width = model.cfg.d_model
    scales = [float(np.mean(norms[name])) / width**0.5 for name in hooks]
    units = [torch.zeros(width, requires_grad=True) for _ in hooks]
    adam = torch.optim.Adam(units, lr=rate, betas=(0.9, 0.99))

    def adding(name, unit, scale, chosen):
        def add(h, hook):
            moved = torch.zeros_like(h)
            moved[:, chosen] = unit * scale
            return h + moved

        return name, add

    for _ in range(n_steps):
        adam.zero_grad()
        loss = torch.zeros(())
        for prompt, answer in rows.values():
            first = len(prompt) - 1
            chosen = {"answer": slice(first, None), "prompt": slice(first, first + 1), "all": slice(None)}[positions]
            fwd = [adding(*each, chosen) for each in zip(hooks, units, scales, strict=True)]
            tokens = torch.tensor([prompt + answer[:-1]])
            logits = model.run_with_hooks(tokens, fwd_hooks=fwd, prepend_bos=False)[0, first:]
            loss = loss - logits.log_softmax(-1)[torch.arange(len(answer)), answer].sum() / len(rows)
        loss.backward(inputs=units)
        adam.step()
    return np.stack([(unit.detach() * scale).numpy() for unit, scale in zip(units, scales, strict=True)])


@pytest.fixture(scope="module")
def adder(trained):
    """The small adder, whose answers are of several tokens and end by themselves, with its pairs."""
    return trained.model, mg.collect_pairs(trained.model, helpers.SMALL_TASK, seed=0, progress=False)


@pytest.mark.parametrize("toward", ["generalization", "memorization"])
@pytest.mark.parametrize("layers, positions", [([0], "answer"), ([0, 1], "prompt"), ([1], "all")])
def test_steps_are_adams_on_the_whole_answers(adder, toward, layers, positions):
    model, pairs = adder
    few = pairs.take(np.concatenate([pairs.of("select")[:9], pairs.of("tune")]))
    how = {"toward": toward, "n_steps": 4, "positions": positions}
    found = mg.optimize_direction(model, few, layers=layers, learning_rate=0.05, progress=False, **how)
    expected = by_hand(model, few, layers, rate=0.05, ends=True, **how)
    sign = 1 if toward == "memorization" else -1  # what is added towards memorization
    np.testing.assert_allclose(found.shift[layers], sign * expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    assert np.flatnonzero(found.selected.any(1)).tolist() == layers
    assert (found.setting.mode, found.setting.alpha, found.setting.positions) == ("direction", 1.0, positions)
    assert found.setting.chosen == f"optimized towards {toward}"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_a_bridge_with_padded_prompts_too(kind):
    model = bridges.bridge(kind)
    prompts = [f"{'a' * (i % 3)}{i}+{i + 1}= " for i in range(9)]
    pairs = mg.PromptPairs.from_strings(
        memorized=prompts,
        generalized=[f"{i + 1}+{i}= " for i in range(9)],
        rule_answers=[f"{2 * i + 1}k" for i in range(9)],
        memorized_answers=[f"z{i}" for i in range(9)],
    )
    pairs = replace(pairs, split=np.array(["select"] * 9))
    how = {"toward": "generalization", "n_steps": 3}
    found = mg.optimize_direction(model, pairs, layers=0, learning_rate=0.05, progress=False, **how)
    expected = by_hand(model, pairs, [0], rate=0.05, ends=False, **how)
    np.testing.assert_allclose(found.shift[[0]], -expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max())
    with pytest.raises(ModelError, match="changes them"):  # answers of one token that nothing ends
        short = replace(
            pairs, memorized=tuple(replace(item, rule_answer=str(item.rule_answer)[:1]) for item in pairs.memorized)
        )
        mg.optimize_direction(model, short, layers=0, positions="generated", progress=False)


def test_the_first_step_goes_against_the_sign_of_the_gradient_as_far_as_was_said(known):
    """Behind the last block the planted model's logits are linear: the gradient is known."""
    model, pairs = known.model, known.pairs
    found = mg.optimize_direction(model, pairs, layers=[1], n_steps=1, learning_rate=0.2, positions="prompt")
    unembed = helpers.weights(model).unembed
    at, rule = [], model.tokenizer.convert_tokens_to_ids(planted.RULE)
    for prompt in {pairs.memorized[i].prompt for i in pairs.of("select")}:
        with torch.no_grad():
            model.run_with_hooks(prompt, fwd_hooks=[("blocks.1.hook_resid_post", lambda h, hook: at.append(h[0, -1]))])
    rows = torch.stack(at)
    chance = (rows @ unembed.W_U + unembed.b_U).softmax(-1)
    uphill = (unembed.W_U[:, rule] - chance @ unembed.W_U.T).mean(0).numpy()
    moved = -found.shift[1]  # towards the rule
    clear = np.abs(uphill) > 1e-5
    assert clear.sum() > 5
    length = 0.2 * float(rows.norm(dim=1).mean()) / planted.D_MODEL**0.5
    np.testing.assert_allclose(moved[clear], length * np.sign(uphill[clear]), rtol=1e-3)


def test_it_turns_what_it_was_not_fitted_on_and_random_directions_do_not(known):
    model, pairs = known.model, known.pairs
    steer = mg.optimize_direction(model, pairs, layers=[1], n_steps=40, positions="prompt", progress=False)
    table = mg.evaluate_steering(model, None, pairs, steer, progress=False)
    assert table.to_generalization.shift["rate"] == 1.0
    assert table.to_generalization.controls["random_direction"]["mean"] < 0.5
    assert not planted.hooks_on(model)


def test_only_the_split_is_read_and_prompts_are_drawn_by_the_seed(adder):
    model, pairs = adder
    select = pairs.take(pairs.of("select"))

    def found(of, **how):
        return mg.optimize_direction(model, of, layers=0, n_steps=2, progress=False, **how).shift

    np.testing.assert_allclose(found(pairs), found(select), rtol=1e-4, atol=1e-6)
    assert (found(pairs, max_prompts=8, seed=1) == found(pairs, max_prompts=8, seed=1)).all()
    assert (found(pairs, max_prompts=8, seed=1) != found(pairs, max_prompts=8, seed=2)).any()
    assert (found(pairs, split=None) != found(pairs)).any()


def test_what_cannot_be_optimized_is_one_error(known):
    model, pairs = known.model, known.pairs

    def refused(error, match, **how):
        with pytest.raises(error, match=match):
            mg.optimize_direction(model, pairs, **{"layers": [0], "progress": False} | how)
        assert not planted.hooks_on(model)

    refused(SettingsError, "the layers of 'resid_post'", layers=None)
    refused(SettingsError, "layers of 'resid_post', 0 to 1", layers=[2])
    refused(SettingsError, "different layers", layers=[1, 1])
    refused(SiteError, "resid_posts", site="resid_posts")
    refused(ModelError, "nothing that is added to 'z' in layer 1 there changes them", site="z", layers=[1])
    with pytest.raises(PairsError, match="both answers"):
        mg.optimize_direction(model, planted.prompt_pairs(answers=False), layers=0)
    with pytest.raises(MemgenError, match="8 pairs"):
        mg.optimize_direction(model, pairs.take(pairs.of("select")[:7]), layers=0)


@pytest.mark.parametrize("site", ["post", "z", "blocks.1.hook_resid_mid"])
def test_other_sites_are_steered_where_they_were_fitted(known, site):
    layers = None if "." in site else [0]
    how = {"layers": layers, "n_steps": 2, "positions": "prompt", "progress": False}
    steer = mg.optimize_direction(known.model, known.pairs, site, **how)
    with steer.applied(known.model, toward="generalization") as model:
        said = mg.complete(model, [known.pairs.memorized[0].prompt], max_new_tokens=2, progress=False)
    assert len(said) == 1 and np.isfinite(steer.shift).all() and steer.shift.any()
