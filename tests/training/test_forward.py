"""The fast forward gives TransformerLens' logits and gradients, or says why it cannot."""

from dataclasses import replace
from functools import partial
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from memgen_lens.core.errors import ModelError
from memgen_lens.fast import products
from memgen_lens.fast.support import why_not
from memgen_lens.models import build_model
from memgen_lens.training import forward
from memgen_lens.training.forward import Rows, labelled_logits, labelled_loss

D_VOCAB = 13


hooked_transformer = partial(helpers.hooked_transformer, n_layers=2, d_vocab=D_VOCAB)


def groups_of(*shapes: tuple[int, int, int], seed: int = 0) -> list[Rows]:
    """Groups of (batch, pos, start) with random tokens; about a third of the labels from start on are left out."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for batch, pos, start in shapes:
        tokens = torch.randint(D_VOCAB, (batch, pos + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
        labels[:, :start] = -100
        labels[0, start] = 3
        groups.append(Rows(tokens[:, :-1], labels, start, torch.full((batch,), pos + 1)))
    return groups


GROUPS = groups_of((5, 9, 4), (3, 12, 0), (4, 6, 5), (1, 1, 0))


def own_logits(model: Any, groups: list[Rows]) -> torch.Tensor:
    return torch.cat([model(rows.tokens)[:, rows.start :].flatten(0, 1) for rows in groups])


def own_loss(model: Any, groups: list[Rows]) -> torch.Tensor:
    """Mean cross-entropy (nats a label) over all labels, from the logits of all positions."""
    losses = []
    for rows in groups:
        log_probs = model(rows.tokens).log_softmax(-1)
        chosen = log_probs.gather(-1, rows.labels.clamp(min=0)[:, :, None])[:, :, 0]
        losses.append(-chosen[rows.labels != -100])
    return torch.cat(losses).mean()


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CONFIGURATIONS = [
    pytest.param(settings, id=" ".join(map(str, settings.values())) or "default")
    for settings in [
        {},
        {"normalization_type": "LNPre", "act_fn": "relu"},
        {"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True},
        {"normalization_type": "RMSPre", "act_fn": "gelu_new"},
        {"normalization_type": None},
        {"positional_embedding_type": "rotary"},
        {"positional_embedding_type": "rotary", "normalization_type": "RMS", "gated_mlp": True},
        {"positional_embedding_type": "rotary", "normalization_type": "LNPre", "act_fn": "relu", "rotary_dim": 4},
        {"act_fn": "gelu_new", "gated_mlp": True},
        {"act_fn": "relu", "n_layers": 1},
        {"act_fn": "silu", "n_layers": 3, "d_head": 5},
        {"normalization_type": "RMSPre", "positional_embedding_type": "rotary", "act_fn": "silu", "gated_mlp": True},
    ]
]


@pytest.mark.parametrize("settings", CONFIGURATIONS)
@helpers.either_kind
def test_logits_and_every_gradient_are_those_of_transformer_lens(settings, native):
    model = hooked_transformer(native=native, **settings)
    assert why_not(model.cfg) is None
    torch.testing.assert_close(labelled_logits(model, GROUPS), own_logits(model, GROUPS), atol=1e-5, rtol=0)

    ours = gradients(model, labelled_loss(labelled_logits(model, GROUPS), GROUPS))
    theirs = gradients(model, own_loss(model, GROUPS))
    assert set(ours) == set(theirs) == {name for name, _ in model.named_parameters()}
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(
        float(ours[name].abs().max()) > 1e-4
        for name in ours
        if not name.endswith(("b_K", "k._original_component.bias"))
    )


@pytest.mark.parametrize("frozen", ["b_", "W_", "embed", "ln"])
def test_parameters_without_gradient_stay_without_and_the_others_keep_theirs(frozen):
    """Biases that are not trained, as in a model without any, among them."""
    model = hooked_transformer(act_fn="gelu_new")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    ours = gradients(model, labelled_loss(labelled_logits(model, GROUPS), GROUPS))
    theirs = gradients(model, own_loss(model, GROUPS))
    assert set(ours) == set(theirs) == {name for name, _ in model.named_parameters() if frozen not in name}
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_the_fused_attention_of_gpus_gives_the_same(monkeypatch, positional_embedding_type):
    monkeypatch.setattr(forward, "_has_fused_attention", lambda x: True)
    model = hooked_transformer(positional_embedding_type=positional_embedding_type)
    ours = gradients(model, labelled_loss(labelled_logits(model, GROUPS), GROUPS))
    theirs = gradients(model, own_loss(model, GROUPS))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-5, rtol=0)


def test_under_autocast_the_logits_are_bfloat16s_and_near(positional_embedding_type="rotary"):
    model = hooked_transformer(positional_embedding_type=positional_embedding_type)
    with torch.autocast("cpu", torch.bfloat16):
        logits = labelled_logits(model, GROUPS)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), own_logits(model, GROUPS), atol=0.2, rtol=0.05)
    gradient = gradients(model, labelled_loss(logits, GROUPS))
    theirs = gradients(model, own_loss(model, GROUPS))
    for name, expected in theirs.items():
        assert gradient[name].dtype == torch.float32
        similarity = F.cosine_similarity(gradient[name].flatten(), expected.flatten(), dim=0)
        assert similarity > 0.98 or expected.abs().max() < 1e-3, name


@pytest.mark.parametrize("act_fn", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("normalization_type", ["LN", "RMS"])
@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
@pytest.mark.parametrize("gated_mlp", [False, True])
def test_every_model_that_the_settings_can_describe_trains_with_the_fast_forward(
    act_fn, normalization_type, positional_embedding_type, gated_mlp
):
    config = helpers.tiny_training().model.but(
        act_fn=act_fn,
        normalization_type=normalization_type,
        positional_embedding_type=positional_embedding_type,
        gated_mlp=gated_mlp,
    )
    model = build_model(config, helpers.tiny_task().tokenizer, n_ctx=12, seed=0)
    assert why_not(model.cfg) is None
    torch.testing.assert_close(labelled_logits(model, GROUPS), own_logits(model, GROUPS), atol=1e-5, rtol=0)


def test_embedding_and_unembedding_of_equal_values_keep_their_own_gradients():
    model = hooked_transformer()
    with torch.no_grad():
        helpers.weights(model).unembed.W_U.copy_(helpers.weights(model).embed.W_E.T)
    ours = gradients(model, labelled_loss(labelled_logits(model, GROUPS), GROUPS))
    theirs = gradients(model, own_loss(model, GROUPS))
    inward, outward = (name for name in ours if ours[name].shape.numel() == D_VOCAB * model.cfg.d_model)
    for name in (inward, outward):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
    assert not torch.allclose(ours[inward], ours[outward].reshape(ours[inward].shape))
    assert not torch.allclose(ours[inward], ours[outward].T.reshape(ours[inward].shape))


@pytest.mark.parametrize("positional_embedding_type", ["standard", "rotary"])
def test_a_later_start_gives_the_same_logits_as_slicing(positional_embedding_type):
    model = hooked_transformer(positional_embedding_type=positional_embedding_type)
    rows = GROUPS[1]
    whole = labelled_logits(model, [rows]).view(3, 12, D_VOCAB)
    for start in range(12):
        part = labelled_logits(model, [replace(rows, start=start)])
        torch.testing.assert_close(part.view(3, 12 - start, D_VOCAB), whole[:, start:], atol=1e-5, rtol=0)


def test_the_last_layer_is_computed_at_labelled_positions_only(monkeypatch):
    monkeypatch.setattr(products, "available", lambda: False)  # whose products the counter does not know
    model, rows = hooked_transformer(), GROUPS[1]

    def operations(start: int) -> int:
        with FlopCounterMode(display=False) as counter:
            labelled_logits(model, [replace(rows, start=start)])
        return counter.get_total_flops()

    batch, cfg = 3, model.cfg
    # What one position less costs less: its scores, its z, W_O, the MLP's two products and the unembedding.
    width = cfg.n_heads * cfg.d_head
    one = 2 * batch * (2 * 12 * width + width * cfg.d_model + 2 * cfg.d_model * cfg.d_mlp + cfg.d_model * D_VOCAB)
    assert operations(0) - operations(7) == 7 * one


def test_groups_do_not_see_each_other():
    model = hooked_transformer()
    together = labelled_logits(model, GROUPS)
    alone = torch.cat([labelled_logits(model, [rows]) for rows in GROUPS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_no_position_sees_a_later_one():
    model = hooked_transformer()
    rows = GROUPS[1]
    changed = rows.tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % D_VOCAB
    before = labelled_logits(model, [rows]).view(3, 12, D_VOCAB)
    after = labelled_logits(model, [replace(rows, tokens=changed, start=0)]).view(3, 12, D_VOCAB)
    torch.testing.assert_close(before[:, :8], after[:, :8], atol=1e-5, rtol=0)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_the_loss_weighs_every_label_alike_whatever_its_group():
    logits = torch.randn(sum(rows.labels[:, rows.start :].numel() for rows in GROUPS), D_VOCAB)
    labels = torch.cat([rows.labels[:, rows.start :].flatten() for rows in GROUPS])
    expected = [F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True) if y != -100]
    torch.testing.assert_close(labelled_loss(logits, GROUPS), torch.stack(expected).mean())


def test_the_loss_of_half_precision_logits_is_taken_in_float32():
    logits = torch.randn(sum(rows.labels[:, rows.start :].numel() for rows in GROUPS), D_VOCAB).bfloat16()
    assert labelled_loss(logits, GROUPS).dtype == torch.float32


UNUSUAL = [
    ({"attn_only": True}, "attn_only is set"),
    ({"parallel_attn_mlp": True}, "parallel_attn_mlp is set"),
    ({"use_attn_result": True}, "use_attn_result is set"),
    ({"use_split_qkv_input": True}, "use_split_qkv_input is set"),
    ({"use_attn_in": True}, "use_attn_in is set"),
    ({"use_hook_mlp_in": True}, "use_hook_mlp_in is set"),
    ({"use_local_attn": True, "window_size": 3, "attn_types": ["local", "global"]}, "use_local_attn is set"),
    ({"use_qk_norm": True}, "use_qk_norm is set"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is set"),
    ({"post_embedding_ln": True}, "post_embedding_ln is set"),
    ({"attention_dir": "bidirectional"}, "attention_dir is 'bidirectional'"),
    ({"act_fn": "gelu_fast"}, "act_fn is 'gelu_fast'"),
    ({"act_fn": "solu_ln"}, "act_fn is 'solu_ln'"),
    ({"positional_embedding_type": "shortformer"}, "positional_embedding_type is 'shortformer'"),
    ({"positional_embedding_type": "alibi"}, "positional_embedding_type is 'alibi'"),
    ({"n_key_value_heads": 2}, "n_key_value_heads is 2"),
    ({"num_experts": 2, "experts_per_token": 1}, "num_experts is 2"),
    ({"clip_qkv": 0.5}, "clip_qkv is 0.5"),
    ({"dtype": torch.float64}, "dtype is torch.float64"),
    ({"attn_scores_soft_cap": 5.0}, "attn_scores_soft_cap is set"),
    ({"output_logits_soft_cap": 5.0}, "output_logits_soft_cap is set"),
    ({"original_architecture": "Olmo2ForCausalLM"}, "original_architecture is 'Olmo2ForCausalLM'"),
    ({"final_rms": True}, "final_rms is set"),
]


@pytest.mark.parametrize(("settings", "reason"), [pytest.param(*case, id=case[1]) for case in UNUSUAL])
def test_an_unusual_setting_is_named(settings, reason):
    cfg = hooked_transformer().cfg
    vars(cfg).update(settings)  # a Bridge refuses some of them otherwise
    assert why_not(cfg) == reason


@pytest.mark.parametrize(
    "settings",
    [
        {"use_attn_scale": False},
        {"attn_scale": 1.3},
        {"eps": 0.1},
        {"final_rms": True},
        {"final_rms": True, "normalization_type": "LNPre"},
        {"init_mode": "xavier_uniform"},
        {"d_vocab_out": 5},
        {"tie_word_embeddings": True},
        {"use_logn_attn": True},
        {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": True},
        {"positional_embedding_type": "rotary", "rotary_base": 50},
        {"positional_embedding_type": "rotary", "rotary_scaling_factor": 3.0},
        {"positional_embedding_type": "rotary", "use_dynamic_ntk_rope": True, "train_seq_length": 4},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_any_other_setting_is_either_refused_by_name_or_makes_no_difference(settings):
    try:
        model = hooked_transformer(**settings)
    except ModelError as error:  # a native Bridge of them cannot be made
        assert any(name in str(error) for name in settings)
        return
    if why_not(model.cfg) is None:
        torch.testing.assert_close(labelled_logits(model, GROUPS), own_logits(model, GROUPS), atol=1e-5, rtol=0)
    else:
        assert any(name in why_not(model.cfg) for name in settings)
