"""What neurons say to the vocabulary, against the weights of each kind of model."""

import bridges
import helpers
import pytest
import torch
from transformer_lens.utilities import get_act_name

from memgen_lens.core.errors import ModelError
from memgen_lens.models.directions import direct_effect

NEURON = 3


def unembedded(direction, weight, unembed, *, centred):
    direction = direction - direction.mean() if centred else direction
    logits = (direction * weight) @ unembed
    return (logits - logits.mean()).detach()


@pytest.mark.parametrize("kind", bridges.KINDS)
def test_of_a_pretrained_model_it_is_by_transformers_own_weights(kind):
    model, hf = bridges.bridge(kind), bridges.hugging_face(kind)
    unembed, behind_mlp, behind_attention = hf.lm_head.weight.T, 1.0, 1.0
    if kind == "gpt2":
        block, norm = hf.transformer.h[1], hf.transformer.ln_f.weight
        down, out = block.mlp.c_proj.weight[NEURON], block.attn.c_proj.weight[NEURON]
    else:
        block, norm = hf.model.layers[1], hf.model.norm.weight
        down, out = block.mlp.down_proj.weight[:, NEURON], block.self_attn.o_proj.weight[:, NEURON]
    if kind == "gemma":  # weights are kept as what is more than 1, and both parts have a norm behind them
        norm = 1 + norm
        behind_mlp, behind_attention = (
            1 + block.post_feedforward_layernorm.weight,
            1 + block.post_attention_layernorm.weight,
        )
    basis = torch.eye(model.cfg.d_model)[NEURON]
    centred = kind == "gpt2"
    for hook, direction, is_centred in (
        (get_act_name("post", 1), down * behind_mlp, centred),
        (get_act_name("z", 1), out * behind_attention, centred),
        (get_act_name("resid_mid", 1), basis, centred),
        (get_act_name("mlp_out", 0), basis, centred),
        ("ln_final.hook_normalized", basis, False),
    ):
        expected = unembedded(direction, norm, unembed, centred=is_centred)
        assert torch.allclose(direct_effect(model, hook, NEURON), expected, atol=2e-5), hook


@pytest.mark.parametrize("normalization", ["LN", "RMS", None])
@pytest.mark.parametrize("gated", [False, True])
@helpers.either_kind
def test_of_transformerlens_own_models_too(native, normalization, gated):
    model = helpers.hooked_transformer(native=native, normalization_type=normalization, gated_mlp=gated)
    weights = helpers.weights(model)
    norm = 1.0 if normalization is None else weights.ln_final.w
    expected = unembedded(weights.blocks[1].mlp.W_out[NEURON], norm, weights.unembed.W_U, centred=normalization == "LN")
    assert torch.allclose(direct_effect(model, get_act_name("post", 1), NEURON), expected, atol=2e-5)


def test_behind_the_last_block_it_is_what_the_logits_gain():
    """Without a norm the way is linear: twice the value moves the logits by the value times the effect."""
    model = helpers.hooked_transformer(normalization_type=None)
    tokens, hook, seen = torch.tensor([[1, 5, 2, 7]]), get_act_name("post", 2), []

    def double(activation, hook):
        activation = activation.clone()
        seen.append(float(activation[0, -1, NEURON]))
        activation[0, -1, NEURON] *= 2
        return activation

    with torch.no_grad():
        plain = model(tokens)[0, -1]
        with model.hooks(fwd_hooks=[(hook, double)]):
            gained = model(tokens)[0, -1] - plain
    assert torch.allclose(gained - gained.mean(), seen[0] * direct_effect(model, hook, NEURON), atol=1e-4)


@helpers.hooked_only
def test_weights_folded_into_the_unembedding_say_the_same():
    model = helpers.hooked_transformer()
    before = direct_effect(model, get_act_name("post", 1), NEURON)
    model.process_weights_(center_writing_weights=False, center_unembed=False)
    assert type(model.ln_final).__name__ == "LayerNormPre"
    assert torch.allclose(direct_effect(model, get_act_name("post", 1), NEURON), before, atol=2e-5)


def test_what_is_not_written_into_the_residual_stream_is_refused():
    model = helpers.hooked_transformer()
    for site in ("pre", "q", "ln2"):
        hook = get_act_name("normalized", 0, "ln2") if site == "ln2" else get_act_name(site, 0)
        with pytest.raises(ModelError, match=rf"received {hook}, whose values are not written"):
            direct_effect(model, hook, NEURON)
