"""TransformerLens' native Bridge where there is no HookedTransformer: the same model from the same settings.

Models of both kinds are written in one form, HookedTransformer's names and shapes, so that what either version has
trained loads on the other. Does not train.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memgen_lens.core.errors import ModelError
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.support import is_native_bridge, why_not

SETTINGS = (
    "n_layers",
    "d_model",
    "n_ctx",
    "d_head",
    "n_heads",
    "d_mlp",
    "d_vocab",
    "d_vocab_out",
    "act_fn",
    "eps",
    "attn_scale",
    "normalization_type",
    "positional_embedding_type",
    "rotary_dim",
    "rotary_base",
    "gated_mlp",
    "default_prepend_bos",
    "tokenizer_prepends_bos",
    "init_mode",
    "init_weights",
    "initializer_range",
    "seed",
    "device",
)
"""Settings of a native Bridge by which a HookedTransformer is made again; all others are at their defaults."""
UNKNOWN_TO_NATIVE = ("use_yarn_rope", "use_NTK_by_parts_rope", "rotary_adjacent_pairs", "rotary_base_local")
"""Settings of a HookedTransformer that a native Bridge does not have, beside those of `why_not`."""


def native_bridge(config: Mapping[str, Any], tokenizer: Any, *, device: str) -> Any:
    """A native Bridge with every weight that a HookedTransformer has, all of them zero but the norms'.

    TransformerLens gives its native model no bias in the unembedding nor in a gated MLP; they are added here, so that
    both versions train the same model.

    Args:
        config: Settings of a HookedTransformer, by name.
        tokenizer: A Hugging Face tokenizer, of which the model keeps a copy, or None.
        device: Torch device.

    Raises:
        ModelError: A setting that a native Bridge does not have.
    """
    with quiet_imports():
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

    own = {"init_weights": False, "device": device, "architecture": None}
    cfg = TransformerBridgeConfig.from_dict({"default_padding_side": "right"} | dict(config) | own)
    _require_native(vars(cfg) | dict(config))
    model: Any = TransformerBridge.boot_native(cfg, tokenizer=deepcopy(tokenizer), device=device)
    model.cfg.init_weights = True
    for layer in (model.unembed, *(block.mlp.out for block in model.blocks if cfg.gated_mlp)):
        _give_bias(layer.original_component)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if "ln" in name and name.endswith("weight") else 0)
    return model


def draw_weights(model: Any, *, seed: int) -> None:
    """Give a native Bridge the weights that TransformerLens 3 draws for a HookedTransformer: ``N(0, 0.64 / d_model)``.

    From one seed both versions start alike, number by number.
    """
    generator = torch.Generator().manual_seed(seed)
    state = state_of(model)
    for name, value in state.items():
        if ".W_" in name:
            state[name] = torch.empty(value.shape).normal_(std=0.8 / math.sqrt(model.cfg.d_model), generator=generator)
    set_state(model, state)


def config_of(model: Any) -> dict[str, Any]:
    """The settings of a model by a HookedTransformer's names, whichever kind it is."""
    if is_native_bridge(model):
        return {name: getattr(model.cfg, name) for name in SETTINGS}
    return model.cfg.to_dict()


def state_of(model: Any) -> dict[str, Tensor]:
    """All weights of a model by a HookedTransformer's names and in its shapes, whichever kind it is."""
    if not is_native_bridge(model):
        return model.state_dict()
    cfg = model.cfg
    state = {name: value.detach() for name, value in _named(parameters_of(model)).items()}
    for layer in range(cfg.n_layers):
        prefix = f"blocks.{layer}.attn."
        # What a HookedTransformer keeps beside its weights.
        state |= {prefix + "mask": torch.empty(0, 0, dtype=torch.bool), prefix + "IGNORE": torch.tensor(-torch.inf)}
        if cfg.positional_embedding_type == "rotary":
            rotary = model.original_model.rotary
            for name, table in (("sin", rotary.sin_cached), ("cos", rotary.cos_cached)):
                state[f"{prefix}rotary_{name}"] = _halves(table, rotary.rotary_dim)
            for name in ("W_Q", "b_Q", "W_K", "b_K"):
                state[prefix + name] = _halves(state[prefix + name], rotary.rotary_dim)
    return state


@torch.no_grad()
def set_state(model: Any, state: Mapping[str, Tensor]) -> None:
    """Set all weights of a model, of either kind, to those that `state_of` gave, of either kind.

    A native Bridge has no bias inside a gated MLP: it goes through the MLP's output weights into their bias.

    Raises:
        RuntimeError: Names or shapes are not the model's.
    """
    if not is_native_bridge(model):
        model.load_state_dict(state)
        return
    own = _named(parameters_of(model))
    kept = {name: value for name, value in state.items() if not name.endswith((".mask", ".IGNORE", "_sin", "_cos"))}
    if own.keys() != kept.keys():
        raise RuntimeError(f"weights of another model: {sorted(own.keys() ^ kept.keys())[0]}")
    rotary = model.original_model.rotary
    for name, value in kept.items():
        if value.shape != own[name].shape:
            raise RuntimeError(f"{name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}")
        if rotary is not None and name.endswith((".W_Q", ".b_Q", ".W_K", ".b_K")):
            value = _neighbours(value, rotary.rotary_dim)
        own[name].copy_(value)
    if model.cfg.gated_mlp:
        for layer in range(model.cfg.n_layers):
            prefix = f"blocks.{layer}.mlp."
            inner = kept[prefix + "b_in"].to(own[prefix + "b_out"])
            own[prefix + "b_out"].add_(inner @ own[prefix + "W_out"])


def _halves(x: Float[Tensor, "*any d_head"], turning: int) -> Float[Tensor, "*any d_head"]:
    """Of the first ``turning`` numbers, those that turn together far apart, as a HookedTransformer has them."""
    return torch.cat([x[..., :turning:2], x[..., 1:turning:2], x[..., turning:]], -1)


def _neighbours(x: Float[Tensor, "*any d_head"], turning: int) -> Float[Tensor, "*any d_head"]:
    """Of the first ``turning`` numbers, those that turn together side by side, as a native Bridge has them."""
    pairs = torch.stack(x[..., :turning].chunk(2, -1), -1).flatten(-2)
    return torch.cat([pairs, x[..., turning:]], -1)


def _named(part: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of `parameters_of` a native Bridge by their full names, in their order."""
    if isinstance(part, Tensor):
        return {path: part}
    if isinstance(part, list):
        inside = {str(layer): block for layer, block in enumerate(part)}
    else:
        inside = vars(part) if isinstance(part, SimpleNamespace) else {}
    named: dict[str, Tensor] = {}
    for name, below in inside.items():
        named |= _named(below, f"{path}.{name}" if path else name)
    return named


def _give_bias(linear: nn.Linear) -> None:
    """A bias that is trained, in the place of none or of a buffer of zeros."""
    if not isinstance(linear.bias, nn.Parameter):
        del linear.bias
        linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _require_native(config: Mapping[str, Any]) -> None:
    set_ones = [f"{name} is set" for name in UNKNOWN_TO_NATIVE if config.get(name)]
    off = [] if config.get("use_attn_scale", True) else ["use_attn_scale is off"]
    reason = next(iter(set_ones + off), why_not(SimpleNamespace(**config)))
    if reason is not None:
        raise ModelError(
            "making a model of TransformerLens 4",
            expected="settings that its native model has",
            received=reason,
            fix="Load the model where TransformerLens 3.9 is installed: pip install 'transformer-lens<4'.",
        )
