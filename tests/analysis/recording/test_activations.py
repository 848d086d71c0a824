"""Recording against TransformerLens' own cache, prompt by prompt; what is refused; what is left behind."""

from collections import Counter

import helpers
import numpy as np
import planted
import pytest
import torch
from safetensors.numpy import load_file

import memgen_lens as mg
from memgen_lens.analysis.recording import reading
from memgen_lens.core.errors import ModelError, PairsError, RunDirectoryError, SiteError
from memgen_lens.models.sites import LAYER_SITES, MODEL_SITES

ALL_SITES = [*LAYER_SITES, *MODEL_SITES]


def cached(model, prompt):
    """TransformerLens' own cache of one prompt alone."""
    return model.run_with_cache(prompt)[1]


def at_the_last_position(cache, site):
    """``[layer, neuron]`` of a cache at the last position, heads flattened."""
    layers = range(cache.model.cfg.n_layers)
    if site == "ln_final":
        rows = [cache["ln_final.hook_normalized"]]
    elif site in MODEL_SITES:
        rows = [cache[site]]
    elif site.startswith("ln"):
        rows = [cache["normalized", layer, site] for layer in layers]
    else:
        rows = [cache[site, layer] for layer in layers]
    return np.stack([row[0, -1].flatten().numpy() for row in rows])


def both_sides(site):
    return np.concatenate([site.memorized, site.generalized])


@pytest.fixture
def model():
    """A planted model of the test's own, to hang hooks on."""
    return planted.build_model()


@pytest.fixture(scope="module")
def mixed():
    """Pairs whose prompts have 4 to 7 tokens."""
    pairs = planted.prompt_pairs(10)
    assert len({len(item.prompt) for item in (*pairs.memorized, *pairs.generalized)}) == 4
    return pairs


@pytest.fixture(scope="module")
def some(learned):
    """A few pairs of the trained model, and the cache of each of their prompts."""
    pairs = learned.pairs.take(np.arange(0, len(learned.pairs), 8))
    return pairs, [cached(learned.model, item.prompt) for item in (*pairs.memorized, *pairs.generalized)]


@pytest.mark.parametrize("watch", [helpers.unwatched, helpers.watched])
@pytest.mark.parametrize("site", ALL_SITES)
def test_every_site_holds_what_run_with_cache_has_at_the_last_position(learned, some, site, watch):
    """By the fast forward, and by the model's own where a hook is on it."""
    pairs, caches = some
    with watch(learned.model):
        recorded = mg.record(learned.model, pairs, [site]).site(site)
    expected = np.stack([at_the_last_position(cache, site) for cache in caches])
    assert recorded.memorized.dtype == recorded.generalized.dtype == np.float32
    np.testing.assert_allclose(both_sides(recorded), expected, rtol=1e-5, atol=1e-5)


def test_the_logits_are_a_site_too(learned, some):
    pairs, _ = some
    recorded = mg.record(learned.model, pairs, ["unembed.hook_out"]).site("unembed.hook_out")
    expected = [learned.model(item.prompt)[0, -1].detach().numpy() for item in (*pairs.memorized, *pairs.generalized)]
    np.testing.assert_allclose(both_sides(recorded)[:, 0], np.stack(expected), atol=1e-4)


@pytest.mark.parametrize("watch", [helpers.unwatched, helpers.watched])
def test_prompts_of_several_lengths_in_one_call_give_what_each_gives_alone(model, mixed, watch):
    with watch(model):
        acts = mg.record(model, mixed, ["post", "z", "resid_pre"])
    caches = [cached(model, item.prompt) for item in (*mixed.memorized, *mixed.generalized)]
    for site in acts.sites:
        expected = [at_the_last_position(cache, site) for cache in caches]
        np.testing.assert_allclose(both_sides(acts.site(site)), np.stack(expected), atol=1e-6)


@pytest.mark.parametrize("watch", [helpers.unwatched, helpers.watched])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_any_batch_size_gives_the_same(learned, batch_size, watch):
    n = len(learned.pairs)
    pairs = learned.pairs.take(np.arange(12))
    with watch(learned.model):
        acts = mg.record(learned.model, pairs, ["resid_post", "post"], batch_size=batch_size)
    for site in acts.sites:
        everything_at_once = both_sides(learned.acts.site(site))[[*range(12), *range(n, n + 12)]]
        np.testing.assert_allclose(both_sides(acts.site(site)), everything_at_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"default_prepend_bos": True}, {"default_padding_side": "left"}])
def test_a_model_with_a_begin_token_or_left_padding_gives_what_each_prompt_gives_alone(mixed, settings):
    model = planted.build_model(**settings)
    acts = mg.record(model, mixed, ["post"])
    prompts = [item.prompt for item in (*mixed.memorized, *mixed.generalized)]
    expected = [at_the_last_position(cached(model, prompt), "post") for prompt in prompts]
    np.testing.assert_allclose(both_sides(acts.site("post")), np.stack(expected), atol=1e-6)
    assert model.tokenizer.padding_side == settings.get("default_padding_side", "right")


def test_only_what_was_asked_for_is_kept(learned):
    cfg = learned.model.cfg
    assert list(learned.acts.sites) == ["resid_post", "post", "z"]
    widths = {"resid_post": cfg.d_model, "post": cfg.d_mlp, "z": cfg.n_heads * cfg.d_head}
    for site, width in widths.items():
        shape = (len(learned.pairs), cfg.n_layers, width)
        assert learned.acts.site(site).memorized.shape == learned.acts.site(site).generalized.shape == shape


def test_heads_are_flattened_head_by_head(learned):
    _, cache = learned.model.run_with_cache(learned.pairs.memorized[3].prompt)
    d_head = learned.model.cfg.d_head
    for head in range(learned.model.cfg.n_heads):
        recorded = learned.acts.site("z").memorized[3, 1, head * d_head : (head + 1) * d_head]
        np.testing.assert_allclose(recorded, cache["z", 1][0, -1, head].numpy(), rtol=1e-5, atol=1e-5)


def test_a_full_hook_name_is_a_site_of_one_layer(learned):
    name = "blocks.1.mlp.hook_post"
    recorded = mg.record(learned.model, learned.pairs, [name]).site(name)
    np.testing.assert_allclose(
        both_sides(recorded), both_sides(learned.acts.site("post"))[:, [1]], rtol=1e-6, atol=1e-6
    )


def test_the_embedding_at_the_answer_position_comes_along(learned):
    model, pairs = learned.model, learned.pairs
    tokens = model.to_tokens([item.prompt for item in (*pairs.memorized, *pairs.generalized)])
    expected = model.W_E[tokens[:, -1]] + model.W_pos[tokens.shape[1] - 1]
    np.testing.assert_allclose(both_sides(learned.acts.embedding)[:, 0], expected.detach().numpy(), atol=1e-6)


def test_a_model_of_half_precision_is_recorded_in_float32(mixed):
    model = planted.build_model().to(torch.bfloat16)
    recorded = mg.record(model, mixed, ["post"]).site("post").memorized
    assert recorded.dtype == np.float32
    assert (recorded[:, planted.LAYER, planted.NEURON] == 1).all()


def test_the_tokens_come_along_padded_with_minus_one(model, mixed):
    tokens = mg.record(model, mixed, ["post"]).tokens
    assert tokens.shape == (20, 7)
    for row, item in zip(tokens, (*mixed.memorized, *mixed.generalized), strict=True):
        expected = model.to_tokens(item.prompt)[0].tolist()
        assert row.tolist() == expected + [-1] * (7 - len(expected))


@pytest.mark.parametrize(
    ("sites", "last"),
    [
        (["blocks.0.hook_resid_post"], "blocks.0"),
        (["blocks.0.mlp.hook_post", "embed"], "blocks.0"),
        (["embed"], "blocks.0"),  # what enters the first block is kept beside any site
        (["resid_pre"], "blocks.1"),
    ],
)
def test_the_forward_pass_stops_after_the_last_layer_asked_for(model, mixed, sites, last):
    calls = Counter()

    def count(activation, hook):
        calls["embed" if hook.name == "hook_embed" else hook.name.rsplit(".hook", 1)[0]] += 1

    parts = {
        "embed": "hook_embed",
        "blocks.0": "blocks.0.hook_resid_post",
        "blocks.1": "blocks.1.hook_resid_post",
        "unembed": "unembed.hook_in",
    }
    for name in parts.values():
        model.add_hook(name, count)
    mg.record(model, mixed, sites)
    reached = list(parts)[: list(parts).index(last) + 1]
    if last == "blocks.1" and not helpers.HAS_HOOKED_TRANSFORMER:
        reached = list(parts)  # a Bridge stops at a block: it has none behind the last
    # One call for all four lengths, which are padded and masked, in each part reached; none in the others.
    assert calls == dict.fromkeys(reached, 1)


def test_recording_leaves_no_hook_and_the_same_model(model, mixed):
    before, weights = model("abM="), {name: value.clone() for name, value in model.state_dict().items()}
    mg.record(model.train(), mixed, ["post", "resid_post", "hook_embed"])
    assert planted.hooks_on(model) == {} and model.context_level == 0
    assert model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model("abM="), before)


@pytest.mark.parametrize("where", ["blocks.0.hook_resid_pre", "blocks.1.mlp.hook_post"])
def test_after_a_users_hook_failed_only_that_hook_is_left(model, mixed, where):
    before = model("abM=")

    def fail(activation, hook):
        raise RuntimeError("a user's own hook failed")

    def look(activation, hook):
        return None

    model.add_hook(where, fail)
    model.add_hook("blocks.0.hook_resid_post", look)
    with pytest.raises(RuntimeError, match="a user's own hook failed"):
        mg.record(model, mixed, ["resid_pre", "post"])
    assert planted.hooks_on(model) == {where: 1, "blocks.0.hook_resid_post": 1}
    assert model.context_level == 0
    model.reset_hooks()
    assert torch.equal(model("abM="), before)


def test_recording_inside_a_users_hook_context_sees_their_hooks_and_leaves_them(model, mixed):
    plain = mg.record(model, mixed, ["resid_post"]).site("resid_post")

    def double(activation, hook):
        return 2 * activation

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", double)]):
        doubled = mg.record(model, mixed, ["resid_post"]).site("resid_post")
        assert planted.hooks_on(model) == {"blocks.1.hook_resid_post": 1}
    np.testing.assert_allclose(doubled.memorized[:, 1], 2 * plain.memorized[:, 1], rtol=1e-6)
    np.testing.assert_allclose(doubled.memorized[:, 0], plain.memorized[:, 0], rtol=1e-6)


def test_an_unknown_site_is_answered_with_the_near_names(model, mixed):
    with pytest.raises(SiteError, match=r"site 'resid_pots'.*received 'resid_pots'\. Did you mean resid_post"):
        mg.record(model, mixed, ["post", "resid_pots"])


def test_a_mistyped_full_name_is_answered_with_the_near_full_names(model, mixed):
    with pytest.raises(SiteError, match=r"Did you mean .*blocks\.1\.mlp\.hook_post"):
        mg.record(model, mixed, ["blocks.1.mlp.hook_pots"])


def test_a_site_that_the_model_lacks_is_named(model, mixed):
    with pytest.raises(SiteError, match=r"site 'ln1'.*received blocks\.0\.ln1\.hook_normalized, which it does not"):
        mg.record(model, mixed, ["ln1"])


def test_a_layer_that_the_model_lacks_is_refused(model, mixed):
    with pytest.raises(SiteError, match=r"received 'blocks\.2\.hook_resid_post'"):
        mg.record(model, mixed, ["blocks.2.hook_resid_post"])


def test_a_bare_string_is_one_site(model, mixed):
    one, several = (mg.record(model, mixed, sites, progress=False).site("post") for sites in ("post", ["post"]))
    np.testing.assert_array_equal(one.memorized, several.memorized)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "blocks.0.attn.hook_attn_scores"])
def test_a_hook_point_without_one_row_a_position_is_refused(learned, name):
    """A pattern is ``[batch, head, query, key]``: its second axis is no position."""
    with pytest.raises(SiteError, match="position"):
        mg.record(learned.model, learned.pairs, [name])


def test_a_pattern_is_refused_also_where_there_are_as_many_heads_as_tokens(model):
    pairs = mg.PromptPairs.from_strings(memorized=["M="], generalized=["G="])
    assert model.cfg.n_heads == model.to_tokens("M=").shape[1] == 2
    with pytest.raises(SiteError, match="position"):
        mg.record(model, pairs, ["blocks.0.attn.hook_pattern"])


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_result", "blocks.1.hook_mlp_in"])
def test_a_hook_point_that_this_model_never_calls_is_refused(model, mixed, name):
    """TransformerLens lists them and runs them only where cfg.use_attn_result or cfg.use_hook_mlp_in is set."""
    assert name in model.hook_dict
    with pytest.raises(SiteError, match=name):
        mg.record(model, mixed, [name])


def test_no_pairs_at_all_is_refused_with_the_way_out(model, mixed):
    with pytest.raises(
        PairsError, match=r"record: expected at least 1 pair; received 0 \(10 of 10 items flip, 0 pairs"
    ):
        mg.record(model, mixed.take(np.array([], dtype=np.int64)), ["post"])


def test_a_character_that_the_tokenizer_lacks_is_named(model):
    pairs = mg.PromptPairs.from_strings(memorized=["abM="], generalized=["ab?="])
    with pytest.raises(ModelError, match=r"'ab\?=', in which '\?' has no token"):
        mg.record(model, pairs, ["post"])


def test_a_prompt_longer_than_the_context_is_refused(model):
    pairs = mg.PromptPairs.from_strings(memorized=["a" * 24 + "="], generalized=["abG="])
    with pytest.raises(ModelError, match=r"at most 24 tokens, the model's context; received 25 tokens"):
        mg.record(model, pairs, ["post"])


def test_tokens_on_another_device_than_the_weights_are_refused(mixed):
    model = planted.build_model().to("meta")
    model.cfg.device = "cpu"
    with pytest.raises(ModelError, match=r"weights on meta, tokens on cpu.*Move the model with model\.to"):
        mg.record(model, mixed, ["post"])


def test_activations_written_to_a_directory_are_the_same_and_read_when_they_are_used(learned, tmp_path):
    sites = ["resid_post", "blocks.0.attn.hook_z"]
    kept = mg.record(learned.model, learned.pairs, sites, batch_size=32)
    written = mg.record(learned.model, learned.pairs, sites, batch_size=32, out=tmp_path / "acts")
    opened = mg.load_activations(tmp_path / "acts")
    for acts in (written, opened):
        assert list(acts.sites) == sites and acts.pairs.rows() == learned.pairs.rows()
        assert (acts.pairs.n_items, acts.pairs.n_flipped) == (learned.pairs.n_items, learned.pairs.n_flipped)
        np.testing.assert_array_equal(acts.tokens, kept.tokens)
        for site in sites:
            assert isinstance(acts.site(site).memorized, np.memmap), "not in memory"
            np.testing.assert_array_equal(acts.site(site).memorized, kept.site(site).memorized)
            np.testing.assert_array_equal(acts.site(site).generalized, kept.site(site).generalized)
        np.testing.assert_array_equal(acts.embedding.memorized, kept.embedding.memorized)
    np.testing.assert_array_equal(mg.attribute(opened, sites[0]).rho, mg.attribute(kept, sites[0]).rho)
    arrays = load_file(tmp_path / "acts" / "resid_post.safetensors")  # with the library too
    np.testing.assert_array_equal(arrays["memorized"], kept.site("resid_post").memorized)
    assert sorted(path.name for path in (tmp_path / "acts").glob("[!.]*")) == [
        "blocks.0.attn.hook_z.safetensors",
        "embedding.safetensors",
        "manifest.json",
        "resid_post.safetensors",
        "tokens.safetensors",
    ]


@pytest.mark.parametrize("name", ["manifest.json", "post.safetensors", "embedding.safetensors", "tokens.safetensors"])
def test_recording_over_a_file_of_the_users_is_refused_and_over_our_own_is_not(learned, tmp_path, name):
    mg.record(learned.model, learned.pairs, ["post"], out=tmp_path)
    again = mg.record(learned.model, learned.pairs, ["post"], out=tmp_path)
    np.testing.assert_array_equal(again.tokens, mg.load_activations(tmp_path).tokens)
    (tmp_path / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunDirectoryError, match=f"record.*{name}, which it did not write"):
        mg.record(learned.model, learned.pairs, ["post"], out=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(RunDirectoryError, match="expected a path; received ''"):
        mg.record(learned.model, learned.pairs, ["post"], out="")


def test_a_recording_that_fails_leaves_no_file_behind(learned, tmp_path, monkeypatch):
    calls = []

    def fail_later(*arguments, **keywords):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("the third batch")
        return recorded(*arguments, **keywords)

    recorded = reading._recorded
    monkeypatch.setattr(reading, "_recorded", fail_later)
    with pytest.raises(RuntimeError, match="the third batch"):
        mg.record(learned.model, learned.pairs, ["post"], batch_size=16, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".memgen_lens.jsonl"]
    assert planted.hooks_on(learned.model) == {}


@pytest.mark.parametrize("name", ["manifest.json", "post.safetensors", "embedding.safetensors", "tokens.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "not its own"])
def test_damaged_activations_are_refused_by_name(model, mixed, tmp_path, name, damage):
    mg.record(model, mixed, ["post"], out=tmp_path)
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else b"{}")
    with pytest.raises(RunDirectoryError, match=name):
        mg.load_activations(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(model, mixed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"writing .*file"):
        mg.record(model, mixed, ["post"], out=tmp_path / "file" / "acts")
