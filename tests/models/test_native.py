"""What TransformerLens 3 has made loads as TransformerLens 4's native Bridge with equal logits, and the other way."""

import json

import helpers
import pytest
import torch
from safetensors.torch import load_file

import memgen_lens as mg
from memgen_lens.core.errors import ModelError
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.support import is_native_bridge, is_plain
from memgen_lens.models import build, build_model, load_model, save_model
from memgen_lens.models.native import config_of, native_bridge, set_state, state_of
from memgen_lens.models.tokens import tokenized

TASK = helpers.tiny_task()
TOKENS = torch.randint(13, (5, 9), generator=torch.Generator().manual_seed(0))
SHAPES = [
    pytest.param(shape, id=" ".join(map(str, shape.values())) or "default")
    for shape in [
        {},
        {"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True},
        {"normalization_type": "RMSPre", "act_fn": "relu"},
        {"normalization_type": None},
        {"positional_embedding_type": "rotary", "rotary_dim": 6},
        {"positional_embedding_type": "rotary", "rotary_dim": 4, "act_fn": "gelu_new", "gated_mlp": True},
    ]
]


@pytest.fixture
def as_on_4(monkeypatch):
    """Models are built and loaded as where there is no HookedTransformer."""
    monkeypatch.setattr(build, "HAS_HOOKED_TRANSFORMER", False)


@helpers.hooked_only
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hooked_transformers_weights_in_a_native_bridge_give_its_logits(shape):
    hooked = helpers.hooked_transformer(**shape)
    bridge = native_bridge(config_of(hooked), None, device="cpu").eval()
    set_state(bridge, state_of(hooked))
    assert is_native_bridge(bridge) and not is_native_bridge(hooked)
    torch.testing.assert_close(bridge(TOKENS), hooked(TOKENS), atol=1e-5, rtol=0)


@helpers.hooked_only
@pytest.mark.parametrize("shape", SHAPES)
def test_a_native_bridges_weights_in_a_hooked_transformer_give_its_logits_by_its_own_strict_loading(shape):
    bridge = helpers.hooked_transformer(native=True, **shape)
    hooked = helpers.model_of(helpers.small_settings(**shape)).eval()
    hooked.load_state_dict(state_of(bridge))
    torch.testing.assert_close(hooked(TOKENS), bridge(TOKENS), atol=1e-5, rtol=0)


@helpers.hooked_only
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"normalization_type": "RMS", "act_fn": "silu", "gated_mlp": True, "positional_embedding_type": "rotary"},
        {"act_fn": "relu", "positional_embedding_type": "rotary"},
    ],
    ids=str,
)
def test_a_saved_model_loads_as_either_kind_with_equal_logits_and_both_write_the_same_weights(
    tmp_path, monkeypatch, shape
):
    model = build_model(helpers.tiny_training().model.but(**shape), TASK.tokenizer, n_ctx=16, seed=0).eval()
    save_model(model, tmp_path / "3")
    with monkeypatch.context() as on_4:
        on_4.setattr(build, "HAS_HOOKED_TRANSFORMER", False)
        bridge = load_model(tmp_path / "3")
    assert is_plain(bridge) and is_native_bridge(bridge) and not bridge.training
    torch.testing.assert_close(bridge(TOKENS), model(TOKENS), atol=1e-5, rtol=0)
    assert bridge.to_tokens("1+2=").tolist() == model.to_tokens("1+2=").tolist() == [[1, 16, 2, 17]]
    save_model(bridge, tmp_path / "4")
    again = load_model(tmp_path / "4")
    assert not is_native_bridge(again)
    torch.testing.assert_close(again(TOKENS), model(TOKENS), atol=1e-5, rtol=0)
    weights = [load_file(tmp_path / version / "model.safetensors") for version in "34"]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=0)
    settings = [json.loads((tmp_path / version / "config.json").read_text()) for version in "34"]
    assert settings[1].keys() <= settings[0].keys(), "nothing that a HookedTransformer does not know"


@helpers.hooked_only
def test_both_versions_start_from_the_same_weights(monkeypatch):
    for shape in ({}, {"gated_mlp": True, "positional_embedding_type": "rotary", "normalization_type": "RMS"}):
        config = mg.ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=24, **shape)
        hooked = build_model(config, TASK.tokenizer, n_ctx=12, seed=5)
        with monkeypatch.context() as on_4:
            on_4.setattr(build, "HAS_HOOKED_TRANSFORMER", False)
            bridge = build_model(config, TASK.tokenizer, n_ctx=12, seed=5)
        ours, theirs = state_of(bridge), state_of(hooked)
        assert [name for name in ours if "W_" in name] == [name for name in theirs if "W_" in name]
        assert all(torch.equal(ours[name], value) for name, value in theirs.items() if "rotary" not in name)


def test_a_saved_native_bridge_loads_in_plain_transformer_lens_4(tmp_path, as_on_4):
    """By its own converter, which knows no rotary tables: they are left out."""
    conversion = pytest.importorskip(
        "transformer_lens.utilities.tl_checkpoint_conversion", reason="TransformerLens 3 has no converter"
    )
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    model = build_model(helpers.tiny_training().model, TASK.tokenizer, n_ctx=16, seed=0).eval()
    with torch.no_grad():
        helpers.weights(model).unembed.b_U.copy_(torch.arange(23) / 10)
    save_model(model, tmp_path)
    config = TransformerBridgeConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    plain = TransformerBridge.boot_native(config).eval()
    plain.load_state_dict(conversion.convert_tl_checkpoint(load_file(tmp_path / "model.safetensors"), config))
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), atol=1e-6, rtol=0)


def test_biases_of_the_unembedding_and_of_gated_mlps_are_trained(as_on_4):
    config = helpers.tiny_training().model.but(gated_mlp=True, act_fn="silu")
    model = build_model(config, TASK.tokenizer, n_ctx=16, seed=0)
    model(TOKENS).logsumexp(-1).pow(2).sum().backward()
    trained = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    own = parameters_of(model)
    for bias in (own.unembed.b_U, own.blocks[0].mlp.b_out, own.blocks[0].attn.b_O):
        assert id(bias) in trained and bias.grad.abs().max() > 1e-3


@helpers.either_kind
@pytest.mark.parametrize("prepends", [True, False])
def test_a_begin_of_text_token_stands_before_prompts_where_the_config_says_so(tmp_path, monkeypatch, prepends, native):
    """Also on a native Bridge, so that a saved model is asked the same on both versions."""
    settings = helpers.small_settings(d_vocab=len(TASK.tokenizer), default_prepend_bos=prepends)
    model = helpers.model_of(settings, TASK.tokenizer, native=native)
    before = [model.tokenizer.bos_token_id] if prepends else []
    save_model(model, tmp_path)
    monkeypatch.setattr(build, "HAS_HOOKED_TRANSFORMER", False)
    bridge = load_model(tmp_path)
    assert is_native_bridge(bridge) and is_native_bridge(model) == native
    for each in (model, bridge):
        tokens, lengths = tokenized(each, ["1+2=", "3"])
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        assert rows == [[*before, 1, 16, 2, 17], [*before, 3]]
        assert tokenized(each, ["3"], prepend_bos=not prepends)[1].tolist() == [1 + (not prepends)]


def test_weights_of_another_model_are_refused_by_name_and_shape(as_on_4):
    model = build_model(helpers.tiny_training().model, TASK.tokenizer, n_ctx=16, seed=0)
    state = state_of(model)
    with pytest.raises(RuntimeError, match=r"embed.W_E has shape \(23, 5\), not \(23, 32\)"):
        set_state(model, state | {"embed.W_E": torch.zeros(23, 5)})
    with pytest.raises(RuntimeError, match=r"weights of another model: blocks\.0\.mlp\.b_in"):
        set_state(model, {name: value for name, value in state.items() if name != "blocks.0.mlp.b_in"})


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ({"use_attn_scale": False}, "use_attn_scale is off"),
        ({"use_yarn_rope": True}, "use_yarn_rope is set"),
        ({"attn_only": True}, "attn_only is set"),
        ({"act_fn": "solu_ln"}, "act_fn is 'solu_ln'"),
    ],
    ids=str,
)
def test_settings_that_a_native_bridge_does_not_have_are_refused_with_the_way_out(setting, why):
    with pytest.raises(ModelError, match=rf"received {why}. .*transformer-lens<4"):
        native_bridge(helpers.small_settings(**setting), None, device="cpu")
