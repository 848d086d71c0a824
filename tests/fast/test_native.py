"""The fast forward reads, says and steers on a native Bridge what the Bridge itself does, on either version."""

from functools import partial

import helpers
import pytest
import torch

from memgen_lens.fast.blocks import BLOCK_SITES, MODEL_SITES, Blocks
from memgen_lens.fast.decoding import Intervention, greedy_copies
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.prompts import at_last_position
from memgen_lens.fast.support import is_plain

PROMPTS = torch.tensor([[1, 2, 3, 5], [1, 2, 3, 6], [9, 2, 3, 5]])
SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True}, id="RMS gated"),
    pytest.param({"positional_embedding_type": "rotary", "act_fn": "relu"}, id="rotary"),
    pytest.param({"positional_embedding_type": "rotary", "rotary_dim": 4, "normalization_type": None}, id="rotary 4"),
]
bridge_of = partial(helpers.hooked_transformer, native=True)


def sites_of(model) -> list[str]:
    """Sites of the middle block, and those outside the blocks, that the Bridge has and reaches."""
    names = [*(f"blocks.1.{site}" for site in BLOCK_SITES), *MODEL_SITES]
    _, cache = model.run_with_cache(PROMPTS[:1])
    return [name for name in names if name in cache]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_site_is_what_run_with_cache_has_at_the_last_position(shape):
    model = bridge_of(**shape)
    names = sites_of(model)
    assert {"blocks.1.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_z", "hook_embed"} <= set(names)
    assert is_plain(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(PROMPTS)
    found = at_last_position(Blocks(model), PROMPTS, torch.full((3,), 4), [[name] for name in names])
    for name, ours in zip(names, found, strict=True):
        expected = cache[name][:, -1].flatten(1)
        torch.testing.assert_close(
            ours[:, 0].clone(), expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.filterwarnings("ignore:A forward hook edited")  # a Bridge's own, about an edited RMS norm
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("site", [site for site in BLOCK_SITES if site != "mlp.hook_pre_linear"])
def test_a_change_at_every_site_says_what_the_bridges_own_hook_says(shape, site):
    """At ``hook_resid_mid`` too, which on a Bridge lies behind the fork of the stream: it enters the MLP alone."""
    model = bridge_of(**shape)
    name = f"blocks.1.{site}"
    if name not in sites_of(model):
        pytest.skip(f"this model has no {site}")
    with torch.no_grad():
        helpers.weights(model).unembed.W_U.mul_(20)
        helpers.weights(model).unembed.b_U[0] -= 60  # which some of these models would say always
    width = {"attn": 24, "mlp": 40}.get(name.split(".")[2], 24)
    added = (30 if site[-1] in "qk" else 3) * torch.randn(5, width, generator=torch.Generator().manual_seed(0))

    def shift(activation, hook, *, copy):
        out = activation.clone()
        out[:, 3:] += added[copy].view(out.shape[2:])
        return out

    intervention = Intervention({name: lambda h, copy, prompt: h + added[copy]})
    ours = greedy_copies(model, PROMPTS, copies=5, max_new_tokens=4, eos=-1, intervention=intervention)
    for copy in range(5):
        tokens = PROMPTS
        for _ in range(4):
            with torch.no_grad():
                logits = model.run_with_hooks(tokens, fwd_hooks=[(name, partial(shift, copy=copy))])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        assert ours[copy].tolist() == tokens[:, 4:].tolist()
    assert len({str(copy) for copy in ours.tolist()}) > 1, "copies say the same: shift them more"


def test_parameters_are_views_of_the_bridges_own():
    model = bridge_of()
    own = parameters_of(model)
    with torch.no_grad():
        before = model(PROMPTS)
        own.blocks[1].attn.W_Q[2, :, 3] += 1
        own.blocks[0].mlp.W_in[:, 5] = 0
        own.unembed.b_U[4] += 7
    after = model(PROMPTS)
    assert not torch.allclose(before[..., :4], after[..., :4], atol=1e-3)
    with torch.no_grad():
        own.unembed.b_U[4] -= 7
        torch.testing.assert_close((after - model(PROMPTS))[..., 4], torch.full((3, 4), 7.0), atol=1e-4, rtol=0)
    assert parameters_of(own) is own, "a HookedTransformer, or what reads like one, is itself"


def test_a_bridge_that_computes_otherwise_is_not_plain():
    assert is_plain(bridge_of())
    hooked = bridge_of()
    hooked(PROMPTS)  # when it first runs, a Bridge sets hooks of its own
    assert is_plain(hooked)
    for name in ("hook_embed", "blocks.0.hook_resid_mid", "blocks.1.mlp.hook_post", "blocks.2.attn.hook_z"):
        with hooked.hooks(fwd_hooks=[(name, lambda activation, hook: None)]):
            assert not is_plain(hooked), name
        assert is_plain(hooked), name
    handle = hooked.blocks[1].register_forward_pre_hook(lambda module, inputs: None)
    assert not is_plain(hooked)
    handle.remove()
    other = bridge_of()
    other.blocks[1].mlp.original_component.act = torch.sin
    assert not is_plain(other)
    processed = bridge_of()
    processed.compatibility_mode = True
    assert not is_plain(processed)
    half = bridge_of()
    half.blocks[0].mlp.to(torch.bfloat16)
    assert not is_plain(half)
