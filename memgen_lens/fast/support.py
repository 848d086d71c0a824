"""Which models the fast forward covers: those on which it gives TransformerLens' own numbers.

Does not run anything.
"""

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from memgen_lens.core.errors import ModelError
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.fast.mlp import ACTIVATIONS

try:  # TransformerLens 3.x has HookedTransformer, 4.x does not; nothing else of ours asks which it is
    with quiet_imports():
        from transformer_lens import HookedTransformer
        from transformer_lens.components.attention import Attention
        from transformer_lens.components.embed import Embed
        from transformer_lens.components.layer_norm import LayerNorm
        from transformer_lens.components.layer_norm_pre import LayerNormPre
        from transformer_lens.components.mlps.gated_mlp import GatedMLP
        from transformer_lens.components.mlps.mlp import MLP
        from transformer_lens.components.pos_embed import PosEmbed
        from transformer_lens.components.rms_norm import RMSNorm
        from transformer_lens.components.rms_norm_pre import RMSNormPre
        from transformer_lens.components.transformer_block import TransformerBlock
        from transformer_lens.components.unembed import Unembed
        from transformer_lens.utilities.typed_module_list import TypedModuleList
except ImportError:
    HAS_HOOKED_TRANSFORMER = False
else:
    HAS_HOOKED_TRANSFORMER = True

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
NORMS: dict[str | None, type] = {}
OWN_MODULES: dict[str, type] = {}
"""What a model is made of, by the last part of a module's name, where nothing stands in another's place."""
if HAS_HOOKED_TRANSFORMER:
    NORMS |= {"LN": LayerNorm, "LNPre": LayerNormPre, "RMS": RMSNorm, "RMSPre": RMSNormPre, None: nn.Identity}
    OWN_MODULES |= {
        "embed": Embed,
        "pos_embed": PosEmbed,
        "unembed": Unembed,
        "blocks": TypedModuleList,
        "attn": Attention,
    }


def is_hooked_transformer(model: Any) -> bool:
    """Whether a model is TransformerLens 3's own kind, of which 4 has none: there every model is a Bridge."""
    return HAS_HOOKED_TRANSFORMER and isinstance(model, HookedTransformer)


def is_native_bridge(model: Any) -> bool:
    """Whether a model is a Bridge around TransformerLens' own small model (``boot_native``), whose weights we know."""
    if getattr(getattr(model, "cfg", None), "architecture", None) != "TransformerLensNative":
        return False
    from transformer_lens.model_bridge import TransformerBridge  # late: on 4.x this takes a second

    return type(model) is TransformerBridge


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
    hooked = HAS_HOOKED_TRANSFORMER and type(model) is HookedTransformer
    if not (hooked or is_native_bridge(model)) or why_not(model.cfg) is not None or _on_all_modules():
        return False
    own_type = _own_type if hooked else _own_type_of_bridge
    for name, module in model.named_modules():
        pre_hooks = [hook for hook in module._forward_pre_hooks.values() if not _of_bridges(hook)]
        touched = module._forward_hooks or pre_hooks or "forward" in vars(module)
        if touched or type(module) is not own_type(name, model.cfg):
            return False
    own = _own_activations(model) if hooked else _own_bridge(model)
    return own and all(parameter.dtype == torch.float32 for parameter in model.parameters())


def _of_bridges(hook: Any) -> bool:
    """Whether a hook is one that a Bridge sets itself when it first runs: to look ahead, it changes nothing."""
    return getattr(hook, "__module__", "").startswith("transformer_lens.model_bridge.")


def _own_activations(model: Any) -> bool:
    act_fn = SUPPORTED_ACTIVATIONS[model.cfg.act_fn]
    return all(block.mlp.act_fn is act_fn for block in model.blocks)


def _own_bridge(model: Any) -> bool:
    """Whether a native Bridge computes with its own weights and activation function, at the usual scale."""
    act_fn = _new_bridge(*_kind(model.cfg)).act_fn
    own = all(block.mlp.original_component.act is act_fn for block in model.blocks)
    return own and model.cfg.use_attn_scale and not model.compatibility_mode


def _own_type(name: str, cfg: Any) -> type | None:
    """What TransformerLens puts at a name."""
    name = name.rpartition(".")[2]
    if not name:
        return HookedTransformer
    if name.startswith("hook_"):
        return HookPoint
    if name.isdigit():
        return TransformerBlock
    if name.startswith("ln"):
        return NORMS[cfg.normalization_type]
    return (GatedMLP if cfg.gated_mlp else MLP) if name == "mlp" else OWN_MODULES.get(name)


def _own_type_of_bridge(name: str, cfg: Any) -> type | None:
    """What TransformerLens puts at a name in a native Bridge: what stands there in a new one."""
    return _new_bridge(*_kind(cfg)).types.get(re.sub(r"\.\d+\b", ".0", name))


def _kind(cfg: Any) -> tuple[Any, ...]:
    """What the modules of a native Bridge depend on."""
    return cfg.normalization_type, cfg.positional_embedding_type, cfg.act_fn, cfg.gated_mlp


@cache
def _new_bridge(normalization_type: str | None, positional_embedding_type: str, act_fn: str, gated_mlp: bool) -> Any:
    """Of a new native Bridge, the types of its modules by name, and its activation function."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(
        d_model=2,
        d_head=2,
        n_heads=1,
        n_layers=1,
        n_ctx=1,
        d_mlp=1,
        d_vocab=1,
        act_fn=act_fn,
        normalization_type=normalization_type,
        positional_embedding_type=positional_embedding_type,
        gated_mlp=gated_mlp,
        seed=0,
    )
    bridge: Any = TransformerBridge.boot_native(cfg)
    types = {name: type(module) for name, module in bridge.named_modules()}
    return SimpleNamespace(types=types, act_fn=bridge.blocks[0].mlp.original_component.act)


def _on_all_modules() -> bool:
    """Whether torch's hooks on all modules are in use."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)
