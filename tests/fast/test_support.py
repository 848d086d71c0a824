"""The fast forward is taken where nothing would be missed by it; a user's hook fires and a user's module runs."""

import numpy as np
import planted
import pytest
import torch
from torch import nn

import memgen_lens as mg
from memgen_lens.behavior import complete
from memgen_lens.core.errors import ModelError
from memgen_lens.fast import support
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER, UNUSUAL, is_plain, require_room, why_not

ON_REQUEST = ("hook_mlp_in", "hook_result", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")
"""Hook points that a Bridge takes hooks at only where its configuration asks for them."""


class Negated(nn.Module):
    """A module's negative, in its place."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own
        self.__dict__.update({name: getattr(own, name) for name in ("act_fn",) if hasattr(own, name)})

    def forward(self, *inputs, **options):
        return -self.own(*inputs, **options)


@pytest.mark.parametrize("gated_mlp", [False, True])
@pytest.mark.parametrize("normalization_type", ["LN", "LNPre", "RMS", "RMSPre", None])
def test_a_model_as_transformer_lens_makes_it_is_plain(hooked_transformer, gated_mlp, normalization_type):
    for positional_embedding_type in ("standard", "rotary"):
        model = hooked_transformer(
            gated_mlp=gated_mlp,
            normalization_type=normalization_type,
            positional_embedding_type=positional_embedding_type,
        )
        assert is_plain(model) and is_plain(model.train())
    assert is_plain(planted.build_model())


def test_a_model_is_not_plain_while_a_hook_is_on_it(hooked_transformer):
    model = hooked_transformer()
    for name in model.hook_dict:
        if not HAS_HOOKED_TRANSFORMER and name.rpartition(".")[2] in ON_REQUEST:
            continue
        with model.hooks(fwd_hooks=[(name, lambda activation, hook: None)]):
            assert not is_plain(model), name
        assert is_plain(model), name
    with pytest.raises(RuntimeError, match="inside"), model.hooks(fwd_hooks=[("hook_embed", lambda a, hook: None)]):
        raise RuntimeError("inside")
    assert is_plain(model)


def test_a_permanent_hook_stays_through_a_reset(hooked_transformer):
    model = hooked_transformer()
    model.add_perma_hook("blocks.1.mlp.hook_post", lambda activation, hook: 2 * activation)
    model.reset_hooks()
    assert not is_plain(model)
    model.reset_hooks(including_permanent=True)
    assert is_plain(model)


@pytest.mark.parametrize("name", ["", "embed", "blocks", "blocks.1", "blocks.2.attn", "blocks.0.mlp", "ln_final"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_of_torchs_on_any_module_counts(hooked_transformer, name, kind):
    model = hooked_transformer()
    handle = getattr(model.get_submodule(name), kind)(lambda module, *inputs: None)
    assert not is_plain(model)
    handle.remove()
    assert is_plain(model)


def test_a_hook_of_torchs_on_all_modules_counts(hooked_transformer):
    model = hooked_transformer()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert not is_plain(model)
    finally:
        handle.remove()
    assert is_plain(model)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("part", ["attn", "mlp", "ln1", "ln2"])
def test_a_module_put_in_the_place_of_one_in_a_block_must_run(hooked_transformer, part, layer):
    model = hooked_transformer()
    block = model.blocks[layer]
    own = getattr(block, part)
    setattr(block, part, Negated(own))
    assert not is_plain(model)
    setattr(block, part, own)
    assert is_plain(model)
    model.blocks[layer] = Negated(block)
    assert not is_plain(model)


@pytest.mark.parametrize("part", ["embed", "pos_embed", "ln_final", "unembed"])
def test_a_module_put_in_the_place_of_one_outside_the_blocks_must_run(hooked_transformer, part):
    model = hooked_transformer()
    setattr(model, part, Negated(getattr(model, part)))
    assert not is_plain(model)


@pytest.mark.parametrize("part", ["ln1", "ln2", "ln_final"])
def test_a_norm_that_was_taken_out_is_not_put_back_in(hooked_transformer, part):
    """The configuration still says "LN": it alone does not tell what runs."""
    model = hooked_transformer()
    setattr(model if part == "ln_final" else model.blocks[1], part, nn.Identity())
    assert not is_plain(model)


def test_an_activation_function_put_in_the_place_of_an_mlps_must_run(hooked_transformer):
    model = hooked_transformer()
    if HAS_HOOKED_TRANSFORMER:
        model.blocks[1].mlp.act_fn = torch.sin
    else:
        model.blocks[1].mlp.original_component.act = torch.sin
    assert not is_plain(model)


@pytest.mark.parametrize("name", ["", "blocks.1", "blocks.1.attn", "blocks.1.mlp", "unembed"])
def test_a_forward_put_in_the_place_of_a_modules_must_run(hooked_transformer, name):
    model = hooked_transformer()
    module = model.get_submodule(name)
    module.forward = lambda *inputs, own=module.forward, **options: -own(*inputs, **options)
    assert not is_plain(model)


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "hook_embed"])
def test_a_module_put_in_the_place_of_a_hook_point_must_run(hooked_transformer, name):
    model = hooked_transformer()
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Negated(model.get_submodule(name)))
    assert not is_plain(model)


def test_a_subclass_or_another_class_is_not_plain(hooked_transformer):
    model = hooked_transformer()
    assert is_plain(model)
    model.__class__ = type("Overridden", (type(model),), {})  # a user's own model, whose forward may be another
    assert not is_plain(model)
    assert not is_plain(nn.Linear(2, 2)) and not is_plain(None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_precision_are_not_plain_and_even_one_of_them(hooked_transformer, dtype):
    assert not is_plain(hooked_transformer(normalization_type=None).to(dtype))
    model = hooked_transformer()
    model.unembed.to(dtype)
    assert not is_plain(model)


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_unusual_setting_is_named_and_no_model_that_has_it_is_plain(hooked_transformer, name):
    model = hooked_transformer()
    assert why_not(model.cfg) is None
    vars(model.cfg)[name] = True  # a Bridge refuses some of them otherwise
    assert why_not(model.cfg) == f"{name} is set"
    assert not is_plain(model)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("act_fn", "solu_ln", "act_fn is 'solu_ln'"),
        ("act_fn", "gelu_fast", "act_fn is 'gelu_fast'"),
        ("positional_embedding_type", "shortformer", "positional_embedding_type is 'shortformer'"),
        ("attention_dir", "bidirectional", "attention_dir is 'bidirectional'"),
        ("n_key_value_heads", 2, "n_key_value_heads is 2"),
        ("original_architecture", "Olmo2ForCausalLM", "original_architecture is 'Olmo2ForCausalLM'"),
        ("attn_scores_soft_cap", 30.0, "attn_scores_soft_cap is set"),
        ("output_logits_soft_cap", 30.0, "output_logits_soft_cap is set"),
        ("dtype", torch.bfloat16, "dtype is torch.bfloat16"),
    ],
)
def test_a_configuration_that_is_not_covered_says_why(hooked_transformer, name, value, why):
    model = hooked_transformer()
    setattr(model.cfg, name, value)
    assert why_not(model.cfg) == why
    assert not is_plain(model)


def test_a_sequence_longer_than_the_context_is_refused_with_the_way_out():
    require_room(8, 8, prompt_length=3)
    with pytest.raises(ModelError, match=r"context of 8 tokens; received prompts of 3 tokens.*max_new_tokens"):
        require_room(9, 8, prompt_length=3)


@pytest.fixture
def only_its_own_forward(monkeypatch):
    """The fast forward may not be taken."""
    for where in ("analysis.recording.reading", "behavior", "analysis.steering.generation"):
        monkeypatch.setattr(f"memgen_lens.{where}.is_plain", lambda model: support.is_plain(model) and pytest.fail())


def decided(activation: torch.Tensor, hook) -> torch.Tensor:
    """A user's hook, which takes the planted model's decision away."""
    activation = activation.clone()
    activation[..., planted.NEURON] = 0
    return activation


NAME = f"blocks.{planted.LAYER}.mlp.hook_post"


def test_a_hook_on_the_model_changes_what_it_is_recorded_to_hold_and_what_it_says(only_its_own_forward):
    model, pairs = planted.build_model(), planted.prompt_pairs(8)
    prompts = [item.prompt for item in pairs.memorized]
    with model.hooks(fwd_hooks=[(NAME, decided)]):
        assert complete(model, prompts, max_new_tokens=2) == [planted.RULE] * 8
        hooked = mg.record(model, pairs, ["post", "resid_post"])
    assert not hooked.site("post").memorized[:, planted.LAYER, planted.NEURON].any()
    assert not hooked.site("resid_post").memorized[:, planted.LAYER, planted.DECISION].any()
    model.add_hook(NAME, decided)
    assert complete(model, prompts, max_new_tokens=2) == [planted.RULE] * 8
    model.reset_hooks()


def test_without_the_hook_the_same_model_holds_and_says_what_it_did():
    model, pairs = planted.build_model(), planted.prompt_pairs(8)
    prompts = [item.prompt for item in pairs.memorized]
    with model.hooks(fwd_hooks=[(NAME, decided)]):
        complete(model, prompts, max_new_tokens=2)
        hooked = mg.record(model, pairs, ["post"]).site("post")
    assert complete(model, prompts, max_new_tokens=2) == [planted.MEMORY] * 8
    plain = mg.record(model, pairs, ["post"]).site("post")
    assert (plain.memorized[:, planted.LAYER, planted.NEURON] == 1).all()
    others = np.arange(planted.D_MLP) != planted.NEURON
    np.testing.assert_allclose(plain.memorized[:, :, others], hooked.memorized[:, :, others], atol=1e-6)


def test_a_replaced_mlp_decides_what_is_said(only_its_own_forward):
    model, prompts = planted.build_model(), planted.prompts("M", 5, seed=0)
    assert is_plain(model)
    model.blocks[planted.LAYER].mlp = Negated(model.blocks[planted.LAYER].mlp)
    assert complete(model, prompts, max_new_tokens=2) == [planted.RULE] * 5
