"""Analysis on Bridges, on either version of TransformerLens, against plain transformers and loops written by hand."""

import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bridges
import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from transformer_lens.utilities import get_act_name
from transformers import DynamicCache

import memgen_lens as mg
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.core.errors import ModelError, SiteError
from memgen_lens.core.records import NeuronScores
from memgen_lens.models import step
from memgen_lens.models.cache import Past
from memgen_lens.models.guard import require_lens_model
from memgen_lens.models.tokens import tokenized

ROOT = Path(__file__).parents[2]
PROMPTS = ["ab", "1+2=", "q<eos>z", "12+34=", "abcdefghi", "7"]
NEW = 3
INSIDE = {
    "llama": ("model.layers", "self_attn.{}_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gemma": ("model.layers", "self_attn.{}_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


@pytest.fixture(scope="module", params=bridges.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return bridges.bridge(kind)


def hooks_on(model: Any) -> tuple[int, int]:
    """Functions on hook points, and torch's hooks on modules (transformers keeps some of its own)."""
    points = sum(len(point.fwd_hooks) for point in set(model.hook_dict.values()))
    modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return points, modules


def raw_sites(kind: str, prompt: str, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """What passes each site at a prompt's last position ``[layer, neuron]``, by hooks on plain transformers' model."""
    hf = bridges.hugging_face(kind, dtype=dtype)
    blocks, qkv, o, pre, down = INSIDE[kind]
    kept: dict[str, list[torch.Tensor]] = {}

    def last(site: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        kept.setdefault(site, []).append(value[0, -1].float())

    def into(module: Any, site: str) -> None:
        module.register_forward_pre_hook(
            lambda _, args, kwargs: last(site, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    def out(module: Any, site: str) -> None:
        module.register_forward_hook(lambda _, args, value: last(site, value))

    for block in hf.get_submodule(blocks):
        into(block, "resid_pre")
        out(block, "resid_post")
        into(block.get_submodule(o), "z")
        into(block.get_submodule(down), "post")
        out(block.get_submodule(pre), "pre")
        if kind == "gpt2":
            block.get_submodule(qkv).register_forward_hook(
                lambda _, args, value: (
                    [last(s, part) for s, part in zip("qkv", value.chunk(3, -1), strict=True)] and None
                )
            )
            into(block.ln_2, "resid_mid")
            out(block.attn, "attn_out")
            out(block.mlp, "mlp_out")
        else:
            for site in "qkv":
                out(block.get_submodule(qkv.format(site)), site)
            gemma = kind == "gemma"
            into(block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm, "resid_mid")
            out(block.post_attention_layernorm if gemma else block.self_attn, "attn_out")
            out(block.post_feedforward_layernorm if gemma else block.mlp, "mlp_out")
    ids = torch.tensor([bridges.character_tokenizer()(prompt, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        hf(ids, attention_mask=torch.ones_like(ids))
    return {site: torch.stack(values).numpy() for site, values in kept.items()}


SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "pre", "post", "q", "k", "v", "z"]


@pytest.mark.parametrize("batch_size", [2, None], ids=["two at a time", "batched"])
def test_every_site_equals_hooks_on_the_plain_hugging_face_model(model, kind, batch_size):
    pairs = mg.PromptPairs.from_strings(PROMPTS, PROMPTS[::-1])
    acts = mg.record(model, pairs, SITES, batch_size=batch_size, progress=False)
    for i, prompt in enumerate(PROMPTS):
        raw = raw_sites(kind, prompt, torch.float32)
        assert set(raw) == set(SITES)
        for site, expected in raw.items():
            bound = 1e-5 * np.abs(acts.site(site).memorized).max()
            np.testing.assert_allclose(acts.site(site).memorized[i], expected, rtol=0, atol=bound, err_msg=site)
        np.testing.assert_array_equal(acts.embedding.memorized[i, 0], acts.site("resid_pre").memorized[i, 0])


def test_streaming_attribution_equals_that_of_what_is_recorded(model):
    pairs = mg.PromptPairs.from_strings([*PROMPTS] * 4, [p + "=" for p in PROMPTS] * 4, items=[*range(6)] * 4)
    acts = mg.record(model, pairs, ["post"], progress=False)
    stored = mg.attribute(acts, "post")
    streamed = mg.attribute_streaming(model, pairs, ["post"], progress=False)["post"]
    np.testing.assert_allclose(streamed.rho, stored.rho, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_models_of_half_precision_are_recorded_and_steered(kind, dtype):
    model = bridges.bridge(kind, dtype=dtype)
    acts = mg.record(model, mg.PromptPairs.from_strings(PROMPTS, PROMPTS[::-1]), SITES, progress=False)
    for i, prompt in enumerate(PROMPTS):
        for site, expected in raw_sites(kind, prompt, dtype).items():
            bound = 5e-2 * np.abs(acts.site(site).memorized).max()
            np.testing.assert_allclose(acts.site(site).memorized[i], expected, rtol=0, atol=bound, err_msg=site)
    steer = Steering.from_scores(scores_of("post", acts.site("post").memorized.shape[1:]), 0.3, 5.0)
    with steer.applied(model, toward="memorization"):
        assert len(mg.complete(model, PROMPTS, max_new_tokens=2, progress=False)) == len(PROMPTS)


def scores_of(site: str, shape: tuple[int, ...]) -> NeuronScores:
    rng = np.random.default_rng(0)
    ones = np.ones(shape)
    return NeuronScores(site, 2 * rng.standard_normal(shape), rng.uniform(-1, 1, shape), ones, ones, ones, 8, 8)


def steering(model: Any, site: str, positions: Any, *, alpha: float = 5.0) -> Steering:
    width = {"resid_post": 16, "post": model.cfg.d_mlp, "z": 16}[site]
    return Steering.from_scores(scores_of(site, (bridges.N_LAYERS, width)), 0.3, alpha, positions=positions)


def by_hand(model: Any, prompt: str, steer: Steering | None = None, toward: str = "memorization") -> str:
    """A greedy completion: one prompt alone, no cache, hooks set one by one on the hook points."""
    tokenizer = bridges.character_tokenizer()
    tokens = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    answer, new = tokens.shape[1] - 1, []
    sign = 1.0 if toward == "memorization" else -1.0

    def hook_of(shift: Any) -> Any:
        where = {"all": slice(None), "prompt": slice(answer, answer + 1), "answer": slice(answer, None)}

        def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            flat = activation.flatten(2).clone()
            flat[:, where[steer.setting.positions]] += sign * torch.tensor(shift, dtype=torch.float32)
            return flat.view(activation.shape)

        return hook

    hooks = []
    if steer is not None:
        names = [get_act_name(steer.setting.site, layer) for layer in range(bridges.N_LAYERS)]
        hooks = [(name, hook_of(shift)) for name, shift in zip(names, steer.shift, strict=True)]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        for _ in range(NEW):
            token = int(model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    return tokenizer.decode(new)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_completions_are_those_of_a_loop_written_by_hand(model, use_cache):
    said = mg.complete(model, PROMPTS, max_new_tokens=NEW, use_cache=use_cache, progress=False)
    assert said == [by_hand(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
@pytest.mark.parametrize("site", ["resid_post", "post", "z"])
def test_steered_completions_are_those_of_a_loop_written_by_hand(model, site, positions, use_cache):
    steers = [steering(model, site, positions, alpha=alpha) for alpha in (1.0, 5.0, 20.0)]
    said = steered_outputs(model, PROMPTS, steers, toward="memorization", max_new_tokens=NEW, use_cache=use_cache)
    assert said == [[by_hand(model, prompt, steer) for prompt in PROMPTS] for steer in steers]
    assert any(answers != [by_hand(model, prompt) for prompt in PROMPTS] for answers in said)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_completions_under_applied_are_those_of_a_loop_written_by_hand(model, positions, use_cache):
    steer = steering(model, "resid_post", positions)
    expected = [by_hand(model, prompt, steer) for prompt in PROMPTS]  # a Bridge sets hooks of its own when first run
    before = hooks_on(model)
    with steer.applied(model, toward="memorization"):
        said = mg.complete(model, PROMPTS, max_new_tokens=NEW, use_cache=use_cache, progress=False)
    assert said == expected
    assert hooks_on(model) == before


@pytest.mark.parametrize("use_past_kv_cache", [True, False], ids=["cached", "uncached"])
def test_the_models_own_generate_is_steered_as_by_hand(model, use_past_kv_cache):
    steer, prompt = steering(model, "resid_post", "answer"), "12+34="
    tokens = tokenized(model, [prompt])[0]
    how = {"max_new_tokens": NEW, "do_sample": False, "use_past_kv_cache": use_past_kv_cache, "verbose": False}
    with steer.applied(model, toward="memorization"):
        new = model.generate(tokens, **how)[0, tokens.shape[1] :].tolist()
    expected = by_hand(model, prompt, steer)
    eos = model.tokenizer.eos_token_id
    assert model.tokenizer.decode(new[: new.index(eos)] if eos in new else new) == expected


@pytest.mark.parametrize("given", [True, False], ids=["prompt_length", "found out"])
@pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
def test_cached_steps_are_steered_like_the_whole_sequence(model, positions, given):
    """By the user's own calls of the model, with transformers' own cache."""
    steer, n_prompt = steering(model, "resid_post", positions), 5
    tokens = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(0))

    def step_by_step():
        cache = DynamicCache(config=model.original_model.config)
        logits, seen = [], 0
        for part in (tokens[:, :n_prompt], *tokens[:, n_prompt:].split(1, dim=1)):
            seen += part.shape[1]
            how = {"attention_mask": torch.ones_like(tokens[:, :seen]), "past_key_values": cache, "use_cache": True}
            logits.append(model(part, **how)[:, -1])
            assert cache.get_seq_length() == seen
        return torch.stack(logits, dim=1)

    with torch.inference_mode():
        with steer.applied(model, toward="memorization", prompt_length=n_prompt):
            whole = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)[:, n_prompt - 1 :]
        with steer.applied(model, toward="memorization", prompt_length=n_prompt if given else None):
            torch.testing.assert_close(step_by_step(), whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(step_by_step(), whole, atol=1e-2)


def test_rows_padded_on_either_side_are_steered_at_their_own_answer_position(model):
    steer = steering(model, "resid_post", "prompt")
    with steer.applied(model, toward="memorization"), torch.inference_mode():
        alone = []
        for prompt in ("1+2=", "12+34="):
            ids = tokenized(model, [prompt])[0]
            alone.append(model(ids, attention_mask=torch.ones_like(ids))[0, -1])
        short, long = (tokenized(model, [prompt])[0][0].tolist() for prompt in ("1+2=", "12+34="))
        for left in (True, False):
            fill = [0] * (len(long) - len(short))
            rows = torch.tensor([fill + short if left else short + fill, long])
            logits = model(rows, attention_mask=(rows != 0).long())
            places = [-1 if left else len(short) - 1, -1]
            for row, place in enumerate(places):
                torch.testing.assert_close(logits[row, place], alone[row], rtol=1e-4, atol=1e-4)


class TestLostCaches:
    """A transformers that Bridges do not know may take their keys and values away in silence."""

    @pytest.fixture(params=[0, 3, 6], ids=["always", "soon", "late"])
    def forgetful(self, model, monkeypatch, request):
        """Whether each pass was given a cache that it neither read nor added to: all passes beyond some positions."""
        own, seen = type(model).forward, []

        def forward(self, tokens, *, attention_mask, past_key_values=None, use_cache=None, **kwargs):
            if past_key_values is not None and attention_mask.shape[1] <= request.param:
                how = {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": True}
                return own(self, tokens, **how, **kwargs)
            seen.append(past_key_values is not None)
            alone = attention_mask[:, -tokens.shape[1] :]
            return own(self, tokens, attention_mask=alone, use_cache=False, **kwargs)

        monkeypatch.setattr(type(model), "forward", forward)
        return seen

    @pytest.mark.parametrize("positions", ["answer", "prompt", "all"])
    def test_steering_takes_the_uncached_road(self, model, forgetful, positions):
        steer = steering(model, "resid_post", positions)
        said = steered_outputs(model, PROMPTS, [steer], toward="memorization", max_new_tokens=NEW)[0]
        assert any(forgetful)
        assert said == [by_hand(model, prompt, steer) for prompt in PROMPTS]

    def test_completing_takes_the_uncached_road(self, model, forgetful):
        said = mg.complete(model, PROMPTS, max_new_tokens=NEW, progress=False)
        assert any(forgetful)
        assert said == [by_hand(model, prompt) for prompt in PROMPTS]


def test_the_installed_transformers_keeps_the_cache_of_a_bridge(model):
    """The canary: where this fails, transformers has outrun TransformerLens, and all generation is slow."""
    tokens = tokenized(model, ["12+34="])[0]
    past = Past.of_nothing(model, 1, tokens.device)
    with torch.inference_mode():
        step.forward(model, tokens, torch.ones_like(tokens), past)
    assert past.is_whole and past.cache.get_seq_length() == tokens.shape[1], (
        f"transformers {version('transformers')} takes a Bridge's cache away: pyproject.toml must bound it below that"
    )


def test_the_transformers_that_the_canary_speaks_of_is_within_the_bounds_of_the_package():
    """As installed, and as both files of constraints pin it."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    [bounds] = [each for each in map(Requirement, needed) if each.name == "transformers"]
    files = [ROOT / name for name in ("constraints.txt", "constraints-tl4.txt")]
    pinned = [line.removeprefix("transformers==") for file in files for line in file.read_text().splitlines()]
    pinned = [line for line in pinned if line[0].isdigit()]
    assert len(pinned) == 2
    for found in (*pinned, version("transformers")):
        assert bounds.specifier.contains(found), f"transformers {found} is not {bounds.specifier}"
    assert not bounds.specifier.contains("5.24.0"), "which takes every Bridge's cache away: the canary tells"


def test_no_hook_is_left_after_an_exception(model):
    before = hooks_on(model)
    pairs = mg.PromptPairs.from_strings(PROMPTS, PROMPTS)
    with pytest.raises(SiteError, match="one row a position"):
        mg.record(model, pairs, ["blocks.0.attn.hook_pattern"], progress=False)
    with pytest.raises(SiteError, match=r"hook_result.*use_attn_result"):
        mg.record(model, pairs, ["blocks.0.attn.hook_result"], progress=False)
    if model.cfg.positional_embedding_type == "rotary":
        with pytest.raises(SiteError, match="hook_pos_embed, which it has and never calls"):
            mg.record(model, pairs, ["hook_pos_embed"], progress=False)
    steer = steering(model, "resid_post", "answer")
    with pytest.raises(RuntimeError, match="user"), steer.applied(model, toward="memorization"):
        raise RuntimeError("user")
    wrong = Steering.from_scores(scores_of("resid_post", (bridges.N_LAYERS, 5)), 0.5, 1.0)
    with pytest.raises(SiteError, match="5 neurons"):
        steered_outputs(model, PROMPTS, [wrong], toward="memorization", max_new_tokens=1)
    assert hooks_on(model) == before


def test_an_unknown_site_is_refused_by_name(model):
    with pytest.raises(SiteError, match="resid_pots"):
        mg.record(model, mg.PromptPairs.from_strings(PROMPTS, PROMPTS), ["resid_pots"], progress=False)


class TestBeginOfText:
    def test_prompts_are_what_the_models_own_tokenizer_makes_of_them(self, model):
        own = bridges.character_tokenizer()
        tokens, lengths = tokenized(model, PROMPTS)
        for row, length, prompt in zip(tokens, lengths, PROMPTS, strict=True):
            assert row[:length].tolist() == own(prompt)["input_ids"]

    def test_it_is_put_once_where_asked_for_and_never_twice(self, model):
        bos = model.tokenizer.bos_token_id
        tokens, lengths = tokenized(model, ["ab", "<bos>ab"], prepend_bos=True)
        assert lengths.tolist() == [3, 3]
        assert torch.equal(tokens[0], tokens[1])
        assert tokens[0].tolist().count(bos) == 1

    def test_recorded_numbers_follow_it(self, model):
        with_it = mg.record(
            model, mg.PromptPairs.from_strings(["ab"], ["12"], prepend_bos=True), ["resid_post"], progress=False
        )
        written = mg.record(
            model, mg.PromptPairs.from_strings(["<bos>ab"], ["<bos>12"]), ["resid_post"], progress=False
        )
        without = mg.record(model, mg.PromptPairs.from_strings(["ab"], ["12"]), ["resid_post"], progress=False)
        np.testing.assert_allclose(
            with_it.site("resid_post").memorized, written.site("resid_post").memorized, atol=1e-5
        )
        assert np.abs(with_it.site("resid_post").memorized - without.site("resid_post").memorized).max() > 0.01


class TestRefused:
    """Asked of the guard itself: tests check the types of all other calls before it is reached."""

    def test_a_plain_hugging_face_model(self):
        with pytest.raises(ModelError, match=r"record.*plain Hugging Face.*load_model"):
            require_lens_model(bridges.hugging_face("gpt2"), call="record")

    def test_a_data_parallel_one(self, model):
        with pytest.raises(ModelError, match=r"model\.module"):
            require_lens_model(torch.nn.DataParallel(model), call="record")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_compiled_one(self, model):
        with pytest.raises(ModelError, match=r"model\._orig_mod"):
            require_lens_model(torch.compile(model), call="record")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("part", ["", "blocks.0", "blocks.1.mlp"])
    def test_one_compiled_in_place(self, part):
        model = bridges.bridge("gpt2")
        model.get_submodule(part).compile()
        with pytest.raises(ModelError, match="_compiled_call_impl"):
            require_lens_model(model, call="record")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_one_compiled_in_place_at_every_public_entry(self):
        model = bridges.bridge("gpt2")
        model.compile()
        pairs = mg.PromptPairs.from_strings([str(i) for i in range(60)], [f"={i}" for i in range(60)])
        steer = steering(model, "resid_post", "answer")
        calls = [
            lambda: mg.complete(model, ["a"], max_new_tokens=1),
            lambda: mg.record(model, pairs, ["resid_post"]),
            lambda: mg.attribute_streaming(model, pairs, ["resid_post"]),
            lambda: steer.applied(model, toward="memorization").__enter__(),
            lambda: mg.evaluate_steering(model, None, pairs, steer),
            lambda: mg.sweep_steering(model, None, pairs, steer.scores, top_fractions=[0.1]),
        ]
        for call in calls:
            with pytest.raises(ModelError, match="_compiled_call_impl"):
                call()


@pytest.mark.parametrize("prompt", ["a?b", "q<eos>?"])
def test_an_unknown_character_is_refused_where_it_would_become_an_end_of_text(prompt):
    """As with GPT-2's tokenizer: unk is eos, so that an unknown character would end the prompt in silence."""
    model = bridges.bridge("llama", tokenizer=bridges.character_tokenizer(unk_token="<eos>"))
    assert model.tokenizer.unk_token_id == model.tokenizer.eos_token_id
    with pytest.raises(ModelError, match=r"in which '\?' has no token"):
        mg.complete(model, ["ab", prompt], max_new_tokens=2, progress=False)
    assert len(mg.complete(model, ["ab", "q<eos>z"], max_new_tokens=2, progress=False)) == 2
