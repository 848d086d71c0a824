"""Which models the fast forward covers: those on which it gives TransformerLens' own numbers.

Does not run anything.
"""

from typing import Any

import torch
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.components.attention import Attention
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.layer_norm_pre import LayerNormPre
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.components.rms_norm import RMSNorm
from transformer_lens.components.rms_norm_pre import RMSNormPre
from transformer_lens.components.transformer_block import TransformerBlock

from memgen_lens.core.errors import ModelError
from memgen_lens.fast.mlp import ACTIVATIONS

UNUSUAL = (
    "attn_only",
    "final_rms",
    "parallel_attn_mlp",
    "use_normalization_before_and_after",
    "use_attn_result",
    "use_split_qkv_input",
    "use_attn_in",
    "use_hook_mlp_in",
    "use_local_attn",
    "use_qk_norm",
    "use_attention_sinks",
    "use_logn_attn",
    "post_embedding_ln",
    "use_hook_tokens",
    "scale_attn_by_inverse_layer_idx",
    "use_dynamic_ntk_rope",
    "load_in_4bit",
)
"""TransformerLens settings that must be off for this forward to be the same as the model's."""
NORMS = (LayerNorm, LayerNormPre, RMSNorm, RMSNormPre, nn.Identity)
OWN_MODULES = {"attn": (Attention,), "mlp": (MLP, GatedMLP), "ln1": NORMS, "ln2": NORMS}
"""What a block is made of, where nothing was put in the place of TransformerLens' own modules."""


def why_not(cfg: Any) -> str | None:
    """Why a model of this configuration needs TransformerLens' own forward; None if it does not."""
    unusual = [name for name in UNUSUAL if getattr(cfg, name, False)]
    if unusual:
        return f"{unusual[0]} is set"
    allowed = {
        "act_fn": tuple(ACTIVATIONS),
        "normalization_type": ("LN", "LNPre", "RMS", "RMSPre", None),
        "positional_embedding_type": ("standard", "rotary"),
        "attention_dir": ("causal",),
        "original_architecture": (None, "GPT2LMHeadModel"),
        "n_key_value_heads": (None,),
        "num_experts": (None,),
        "clip_qkv": (None,),
        "n_devices": (1,),
        "dtype": (torch.float32,),
    }
    for name, values in allowed.items():
        value = getattr(cfg, name, None)
        if value not in values:
            return f"{name} is {value!r}"
    for name in ("attn_scores_soft_cap", "output_logits_soft_cap"):
        if (getattr(cfg, name, None) or -1) > 0:
            return f"{name} is set"
    return None


def require_room(length: int, n_ctx: int, *, prompt_length: int) -> None:
    """Refuse a sequence that is longer than the model's context.

    Raises:
        ModelError: Saying how long the prompts were.
    """
    if length > n_ctx:
        raise ModelError(
            "completing prompts",
            expected=f"prompt and completion within the model's context of {n_ctx} tokens",
            received=f"prompts of {prompt_length} tokens that end later or never",
            fix="Shorten the prompts or lower max_new_tokens.",
        )


def is_plain(model: Any) -> bool:
    """Whether nothing tells a model from its configuration: its own modules, float32 weights, and no hook anywhere.

    A hook of the user's must fire, and a module that was put in place of another must run: both need the model itself.
    """
    if type(model) is not HookedTransformer or why_not(model.cfg) is not None:
        return False
    for block in model.blocks:
        own = all(type(getattr(block, name, None)) in kinds for name, kinds in OWN_MODULES.items())
        if type(block) is not TransformerBlock or not own:
            return False
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not hooked and all(parameter.dtype == torch.float32 for parameter in model.parameters())
