"""Each row is steered at its own answer position, whichever way that is known; where it cannot be, it is refused."""

import helpers
import numpy as np
import planted
import pytest
import torch
from planted import greedy_by_hand

import memgen_lens as mg
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.core.errors import ModelError, SettingsError, SiteError
from memgen_lens.core.records import NeuronScores
from memgen_lens.tasks.tokenizer import build_tokenizer

PROMPTS = ["aM=", "bcdG=", "aM=", "abcdeG="]
POSITIONS = ["answer", "prompt", "all"]


@pytest.fixture(scope="module")
def model():
    return planted.build_model()


def steering(model, positions, site="resid_post"):
    """A strong push of all neurons, drawn at random: wherever it acts, it shows."""
    rng = np.random.default_rng(0)
    rho, nmd = rng.uniform(-1, 1, size=(2, model.cfg.n_layers, model.cfg.d_model))
    nothing = np.ones_like(rho)
    scores = NeuronScores(site, nmd, rho, nothing, nothing, nothing, 8, 8)
    return mg.Steering.from_scores(scores, 1.0, 5.0, positions=positions)


def padded(model, side):
    """Tokens ``[batch, pos]`` padded on one side, their mask, and each prompt's tokens alone."""
    rows = [model.tokenizer(prompt, return_tensors="pt").input_ids[0] for prompt in PROMPTS]
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), model.tokenizer.pad_token_id)
    for place, row in enumerate(rows):
        tokens[place, slice(len(row)) if side == "right" else slice(width - len(row), None)] = row
    return tokens, (tokens != model.tokenizer.pad_token_id).long(), rows


def alone(model, steer, rows):
    """Logits at the answer position of each prompt, steered in a batch of its own."""
    with steer.applied(model, toward="memorization"):
        return torch.stack([model(row[None], attention_mask=torch.ones_like(row[None]))[0, -1] for row in rows])


def answers(logits, rows):
    return torch.stack([of[len(row) - 1] for of, row in zip(logits, rows, strict=True)])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("known_by", ["mask", "pad tokens", "lengths"])
def test_short_rows_padded_on_the_right_are_steered_like_each_alone(model, positions, known_by):
    steer = steering(model, positions)
    tokens, mask, rows = padded(model, "right")
    lengths = [len(row) for row in rows] if known_by == "lengths" else None
    how = {"attention_mask": mask} if known_by == "mask" else {}
    with steer.applied(model, toward="memorization", prompt_length=lengths):
        steered = model(tokens, **how)
    torch.testing.assert_close(answers(steered, rows), alone(model, steer, rows), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answers(steered, rows), answers(model(tokens, attention_mask=mask), rows), atol=1e-2)


@pytest.mark.parametrize("positions", POSITIONS)
def test_rows_padded_on_the_left_are_steered_like_each_alone(model, positions):
    steer = steering(model, positions)
    tokens, mask, rows = padded(model, "left")
    with steer.applied(model, toward="memorization"):
        steered = model(tokens, attention_mask=mask)[:, -1]
    torch.testing.assert_close(steered, alone(model, steer, rows), rtol=1e-4, atol=1e-4)


def test_rows_of_answers_fed_in_are_steered_from_each_prompts_end_on(model):
    """Two prompts of unlike length with their answers behind them: lengths say where each prompt ends."""
    steer = steering(model, "prompt")
    _, _, rows = padded(model, "right")
    fed = torch.cat([rows[0], torch.tensor([model.tokenizer.convert_tokens_to_ids("m")])])
    batch = torch.stack([fed, rows[1][: len(fed)]])
    with steer.applied(model, toward="memorization", prompt_length=[3, 4]):
        both = model(batch)
    with steer.applied(model, toward="memorization", prompt_length=3):
        first = model(batch[:1])
    with steer.applied(model, toward="memorization", prompt_length=4):
        second = model(batch[1:])
    torch.testing.assert_close(both, torch.cat([first, second]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(first[:, -1], second[:, -1], atol=1e-2)


def test_where_no_row_can_be_told_from_padding_it_is_refused(model):
    tokens, _, _ = padded(model, "right")
    ended = torch.cat([tokens, torch.full((len(tokens), 1), model.tokenizer.pad_token_id)], dim=1)
    refused = pytest.raises(ModelError, match=r"to know where each prompt ends.*attention_mask")
    with steering(model, "answer").applied(model, toward="memorization"), refused:
        model(ended)


@pytest.mark.parametrize("lengths", [[3, 4, 5], [1, 2, 3, 4, 5]])
def test_a_length_for_some_of_the_rows_is_refused(model, lengths):
    tokens, _, _ = padded(model, "right")
    refused = pytest.raises(SettingsError, match="for all rows or for each of 4")
    with steering(model, "answer").applied(model, toward="memorization", prompt_length=lengths), refused:
        model(tokens)


def test_a_length_of_nothing_is_refused(model):
    with pytest.raises(SettingsError, match=r"Steering.applied\(prompt_length=...\): expected greater than or equal"):
        steering(model, "answer").applied(model, toward="memorization", prompt_length=0)


VOCABULARY = (*"abcdefgh", "=")
hooked_only = pytest.mark.skipif(not helpers.HAS_HOOKED_TRANSFORMER, reason="a setting of HookedTransformers")


def small(**settings):
    """A small HookedTransformer with a tokenizer, on which greedy completions change from prompt to prompt."""
    tokenizer = build_tokenizer(VOCABULARY)
    model = helpers.hooked_transformer(d_vocab=len(tokenizer), default_prepend_bos=False, n_ctx=24, **settings)
    model.set_tokenizer(tokenizer)
    return model


@hooked_only
def test_bidirectional_models_complete_and_are_steered_as_a_loop_without_a_cache_does():
    model = small(attention_dir="bidirectional")
    prompts = ["abc=", "h=", "cdefg=", "bb="]
    by_hand = [greedy_by_hand(model, prompt, 5) for prompt in prompts]
    assert len(set(by_hand)) > 1
    for use_cache in (True, False):
        assert mg.complete(model, prompts, max_new_tokens=5, use_cache=use_cache, progress=False) == by_hand
    steer = steering(model, "answer")
    outputs = [
        steered_outputs(model, prompts, [steer], toward="memorization", max_new_tokens=5, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0][0] != by_hand


@hooked_only
def test_a_site_of_all_cached_positions_is_recorded_and_refused_by_name_when_steered_from_a_cache():
    model = small(positional_embedding_type="rotary", rotary_dim=6)
    site = "blocks.1.attn.hook_rot_k"
    pairs = mg.PromptPairs.from_strings(["abc=", "bc="], ["cb=", "dcba="])
    acts = mg.record(model, pairs, [site], progress=False)
    for side, prompts in (("memorized", ["abc=", "bc="]), ("generalized", ["cb=", "dcba="])):
        for place, prompt in enumerate(prompts):
            _, cache = model.run_with_cache(model.to_tokens(prompt))
            expected = cache[site][0, -1].flatten().numpy()
            np.testing.assert_allclose(getattr(acts.site(site), side)[place, 0], expected, rtol=1e-5, atol=1e-6)
    rho = np.random.default_rng(0).uniform(0.1, 1, size=(1, 24))
    scores = NeuronScores(site, rho, rho, rho, rho, rho, 8, 8)
    steer = mg.Steering.from_scores(scores, 1.0, 5.0)
    how = {"toward": "memorization", "max_new_tokens": 4}
    with pytest.raises(SiteError, match=r"steering site 'blocks.1.attn.hook_rot_k'.*holds cached positions"):
        steered_outputs(model, ["abc=", "bc="], [steer], use_cache=True, **how)
    assert steered_outputs(model, ["abc=", "bc="], [steer], use_cache=False, **how)
