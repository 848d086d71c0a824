"""Many prompts at once give what each gives TransformerLens alone; the tree of their beginnings is what it says."""

from itertools import pairwise

import helpers
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformer_lens import TransformerLensKeyValueCache

from memgen_lens.fast import blocks as blocks_module
from memgen_lens.fast import prompts as prompts_module
from memgen_lens.fast.attention import SHORT
from memgen_lens.fast.blocks import BLOCK_SITES, MODEL_SITES, Blocks
from memgen_lens.fast.prompts import PrefixTree, at_last_position, can_read, keys_and_values
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER

PROMPTS = [
    [1, 2, 3, 4, 5, 6],
    [1, 2, 3],
    [7],
    [1, 2, 3, 4, 9, 9, 9],
    [1, 2, 3],
    [7, 7, 7, 7],
    [2, 1, 3, 4, 5, 6],
    [12],
    [1, 2, 3, 4, 5],
]
"""Duplicates, beginnings of others, single tokens, and a word in the same place behind other beginnings."""


def padded(prompts: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    widest = int(lengths.max())
    return torch.tensor([prompt + [pad] * (widest - len(prompt)) for prompt in prompts]), lengths


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=9), st.integers(0, 9))
@example(PROMPTS, 0)
@example([[0]], 0)
def test_the_tree_holds_every_beginning_once_and_each_prompt_can_be_read_from_it(prompts, pad):
    tokens, lengths = padded(prompts, pad)
    tree = PrefixTree.of(tokens, lengths)
    node_of: dict[tuple[int, ...], int] = {}
    for i, prompt in enumerate(prompts):
        for position in range(len(prompt)):
            node = int(tree.path[i, position])
            assert node_of.setdefault(tuple(prompt[: position + 1]), node) == node
            assert tree.tokens[tree.word[node]] == prompt[position]
            assert tree.positions[tree.word[node]] == position
        assert not tree.path[i, len(prompt) :].any()
        assert tree.last[i] == tree.path[i, len(prompt) - 1]
    assert sorted(node_of.values()) == list(range(len(tree.word))), "no node twice, and none that no prompt has"

    words = list(zip(tree.tokens.tolist(), tree.positions.tolist(), strict=True))
    beginnings = sorted(node_of, key=node_of.__getitem__)
    assert sorted(words) == sorted({(beginning[-1], len(beginning) - 1) for beginning in beginnings})
    assert all(len(a) <= len(b) for a, b in pairwise(beginnings)), "short beginnings first"

    assert len(tree.place) == len(beginnings)
    for node, place in enumerate(tree.place.tolist()):
        prompt, position = divmod(place, tokens.shape[1])
        assert position < lengths[prompt]
        assert tree.path[prompt, position] == node


def test_a_tree_written_out():
    tree = PrefixTree.of(*padded([[5, 6], [5], [6, 6, 5], [5, 6]]))
    assert list(zip(tree.tokens.tolist(), tree.positions.tolist(), strict=True)) == [(5, 0), (5, 2), (6, 0), (6, 1)]
    assert tree.word.tolist() == [0, 2, 3, 3, 1]  # 5, 6, 56, 66, 665
    assert tree.path.tolist() == [[0, 2, 0], [0, 0, 0], [1, 3, 4], [0, 2, 0]]
    assert tree.last.tolist() == [2, 0, 4, 2]


@pytest.fixture
def in_pieces(monkeypatch):
    """Several forward passes, several pieces of rows, and attention a few prompts at a time."""
    monkeypatch.setattr(prompts_module, "TOKENS_AT_ONCE", 29)
    monkeypatch.setattr(prompts_module, "PIECE", 900)
    monkeypatch.setattr(blocks_module, "PIECE", 3)


def groups_of(model) -> list[list[str]]:
    """Every site that the model has: those of the blocks in all layers, then each of the others."""
    n_layers, names = model.cfg.n_layers, model.hook_dict
    in_blocks = [[f"blocks.{layer}.{site}" for layer in range(n_layers)] for site in BLOCK_SITES]
    return [group for group in (*in_blocks, *([site] for site in MODEL_SITES)) if group[0] in names]


def by_transformer_lens(model, prompts: list[list[int]], groups: list[list[str]]) -> list[torch.Tensor]:
    with torch.no_grad():
        caches = [model.run_with_cache(torch.tensor([prompt]))[1] for prompt in prompts]
    return [
        torch.stack([torch.stack([cache[name][0, -1].flatten() for name in group]) for cache in caches])
        for group in groups
    ]


def assert_read(model, prompts: list[list[int]], groups: list[list[str]], blocks: Blocks | None = None) -> None:
    found = at_last_position(blocks or Blocks(model), *padded(prompts), groups)
    for group, ours, theirs in zip(groups, found, by_transformer_lens(model, prompts, groups), strict=True):
        torch.testing.assert_close(
            ours.clone(), theirs, atol=1e-5, rtol=1e-5, msg=lambda text, group=group: f"{group}: {text}"
        )


CONFIGURATIONS = [
    pytest.param(shape, id=" ".join(map(str, shape.values())) or "default")
    for shape in [
        {},
        {"normalization_type": "LNPre", "act_fn": "relu"},
        {"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True},
        {"normalization_type": "RMSPre", "act_fn": "gelu_new"},
        {"normalization_type": None, "act_fn": "silu"},
        {"normalization_type": None, "positional_embedding_type": "rotary", "act_fn": "relu", "gated_mlp": True},
        {"positional_embedding_type": "rotary", "act_fn": "gelu_new"},
        {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True},
        {"positional_embedding_type": "rotary", "normalization_type": "LNPre", "rotary_dim": 4},
        {"normalization_type": "LN", "act_fn": "gelu_new", "gated_mlp": True, "d_head": 5},
        {"act_fn": "relu", "n_layers": 1, "use_attn_scale": not HAS_HOOKED_TRANSFORMER, "n_heads": 1},
        {"normalization_type": "RMSPre", "positional_embedding_type": "rotary", "n_layers": 2, "attn_scale": 3.0},
    ]
]


@pytest.mark.parametrize("shape", CONFIGURATIONS)
def test_every_site_of_every_layer_is_what_run_with_cache_has_at_the_last_position(hooked_transformer, shape):
    model = hooked_transformer(**shape)
    groups = groups_of(model)
    cfg = model.cfg
    standard = cfg.positional_embedding_type == "standard"
    assert len(groups) == 12 + cfg.gated_mlp + 3 * bool(cfg.normalization_type) + standard
    assert_read(model, PROMPTS, groups)


@pytest.mark.parametrize("shape", CONFIGURATIONS)
def test_every_site_is_the_same_in_pieces_and_in_any_order(hooked_transformer, in_pieces, shape):
    model = hooked_transformer(**shape)
    groups = groups_of(model)
    prompts = [*PROMPTS[::2], *PROMPTS[1::2]]
    assert len(prompts) > 2 * (prompts_module.TOKENS_AT_ONCE // 7)
    assert_read(model, prompts, groups[::-1])


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_every_site_alone_is_read_and_no_later_block_is_run(hooked_transformer, monkeypatch, positional_embedding_type):
    model, layers = hooked_transformer(positional_embedding_type=positional_embedding_type), []
    run = Blocks.run
    monkeypatch.setattr(Blocks, "run", lambda self, layer, *a, **k: layers.append(layer) or run(self, layer, *a, **k))
    for group in groups_of(model):
        for name in group:
            layers.clear()
            assert_read(model, PROMPTS, [[name]])
            asked = int(name.split(".")[1]) if name.startswith("blocks.") else 2 if name.startswith("ln_final") else -1
            assert layers == list(range(asked + 1))


def test_groups_may_share_hooks_in_any_order_and_layers_may_be_left_out(hooked_transformer, in_pieces):
    post = [f"blocks.{layer}.mlp.hook_post" for layer in range(3)]
    groups = [post, [post[1]], [post[2], post[0], post[2]], ["blocks.0.hook_resid_pre", "hook_embed"], [post[1]]]
    assert_read(hooked_transformer(), PROMPTS, groups)


def test_prompts_longer_than_attention_by_hand_takes_are_read_too(hooked_transformer):
    model = hooked_transformer(n_ctx=64, n_layers=2)
    draw = torch.Generator().manual_seed(0)
    long = torch.randint(13, (SHORT + 9,), generator=draw).tolist()
    assert_read(model, [long, long[:SHORT], [*long[:20], 3], [5], long[: SHORT + 1]], groups_of(model))
    assert_read(model, [long, [*long[:-1], (long[-1] + 1) % 13]], groups_of(model))


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_the_same_blocks_read_other_prompts_and_other_sites_afterwards(hooked_transformer, positional_embedding_type):
    model = hooked_transformer(positional_embedding_type=positional_embedding_type)
    blocks, groups = Blocks(model), groups_of(model)
    for prompts in (PROMPTS, PROMPTS[:2], [*PROMPTS[::-1], [3, 3, 3, 3, 3, 3, 3, 3]], [[4]]):
        assert_read(model, prompts, groups, blocks)
        assert_read(model, prompts, groups[3:5][::-1], blocks)


@pytest.mark.parametrize("pad", [0, 3, 12])
def test_what_stands_behind_a_prompts_end_has_no_influence(hooked_transformer, pad):
    blocks, names = Blocks(hooked_transformer()), [["blocks.2.hook_resid_post"], ["blocks.0.attn.hook_k"]]
    expected = [values.clone() for values in at_last_position(blocks, *padded(PROMPTS, 7), names)]
    for found, values in zip(at_last_position(blocks, *padded(PROMPTS, pad), names), expected, strict=True):
        torch.testing.assert_close(found, values, atol=1e-6, rtol=1e-6)


def test_reading_changes_no_weight_and_wants_no_gradient(hooked_transformer):
    model = hooked_transformer(normalization_type=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = at_last_position(Blocks(model), *padded(PROMPTS), groups_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(values.requires_grad for values in found)


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_under_autocast_what_is_read_is_near_to_what_is_read_without(hooked_transformer, positional_embedding_type):
    model = hooked_transformer(positional_embedding_type=positional_embedding_type)
    groups = groups_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = [values.float() for values in at_last_position(Blocks(model), *padded(PROMPTS), groups)]
    for values, expected in zip(found, by_transformer_lens(model, PROMPTS, groups), strict=True):
        assert (values - expected).norm() < 0.05 * expected.norm()


def test_only_hook_points_that_are_known_can_be_read():
    assert can_read([*MODEL_SITES, *(f"blocks.11.{site}" for site in BLOCK_SITES)]) and can_read([])
    for name in ("blocks.0.attn.hook_pattern", "blocks.0.ln1.hook_scale", "unembed.hook_out", "ln_final.hook_scale"):
        assert not can_read(["hook_embed", name])


@helpers.hooked_only
@pytest.mark.parametrize("shape", CONFIGURATIONS)
@pytest.mark.parametrize("n_positions", [1, 5])
def test_keys_and_values_are_those_of_transformer_lens_own_cache(hooked_transformer, shape, n_positions):
    """TransformerLens keeps keys before it turns them, and turns all of them anew at every step."""
    model = hooked_transformer(**shape)
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 5], [9, 2, 3, 4, 5], [1, 2, 3, 4, 5]])[:, :n_positions]
    kept = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, past_kv_cache=kept, attention_mask=torch.ones_like(tokens))
    found = keys_and_values(Blocks(model), tokens)
    assert len(found) == model.cfg.n_layers
    for layer, (keys, values) in enumerate(found):
        rotary = model.cfg.positional_embedding_type == "rotary"
        own_keys = cache[f"blocks.{layer}.attn.hook_rot_k"] if rotary else kept[layer].past_keys
        assert not rotary or n_positions == 1 or not torch.allclose(own_keys, kept[layer].past_keys, atol=1e-2)
        torch.testing.assert_close(keys, own_keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, kept[layer].past_values, atol=1e-5, rtol=1e-5)


def test_keys_and_values_are_the_same_in_pieces_and_of_no_tokens_there_are_none(hooked_transformer, monkeypatch):
    blocks = Blocks(hooked_transformer(positional_embedding_type="rotary"))
    tokens = torch.randint(13, (9, 6), generator=torch.Generator().manual_seed(0))
    whole = keys_and_values(blocks, tokens)
    monkeypatch.setattr(prompts_module, "PIECE", 900)
    monkeypatch.setattr(blocks_module, "PIECE", 4)
    for found, expected in zip(keys_and_values(blocks, tokens), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert [layer.shape for layer in keys_and_values(blocks, tokens[:, :0])] == [(2, 9, 0, 4, 6)] * 3
