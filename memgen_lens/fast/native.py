"""TransformerLens' native Bridge read as if it were a HookedTransformer: the same numbers under the other's names.

A Bridge around TransformerLens' own small model (``boot_native``) keeps its weights as torch's layers do,
``[d_out, d_in]``. Everything here is a view of them, so that gradients and changes land in the Bridge itself. Does not
know whether a model may be read this way (`support`).
"""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memgen_lens.fast.support import is_native_bridge


def parameters_of(model: Any) -> Any:
    """What the fast forward reads: a HookedTransformer itself, or a native Bridge's parameters under its names.

    The names of a Bridge's come in the order that a HookedTransformer's parameters have. Two things stay the Bridge's
    own: rotary queries and keys have the two numbers that turn together side by side, and a gated MLP has no ``b_in``
    (zeros here).
    """
    if not is_native_bridge(model):
        return model
    cfg, native = model.cfg, model.original_model
    parts: dict[str, Any] = {"embed": SimpleNamespace(W_E=_layer(native.tok_embed).weight)}
    if native.pos is not None:
        parts["pos_embed"] = SimpleNamespace(W_pos=_layer(native.pos).weight)
    blocks = [_block(_layer(block), cfg) for block in native.layers]
    head = _layer(native.head)
    unembed = SimpleNamespace(W_U=head.weight.t(), b_U=head.bias)
    return SimpleNamespace(**parts, cfg=cfg, blocks=blocks, ln_final=_norm(native.ln_out), unembed=unembed)


def _block(block: Any, cfg: Any) -> SimpleNamespace:
    ln1, ln2 = _norm(block.ln1), _norm(block.ln2)
    return SimpleNamespace(ln1=ln1, ln2=ln2, attn=_attention(_layer(block.attn), cfg), mlp=_mlp(_layer(block.mlp)))


def _attention(attn: Any, cfg: Any) -> SimpleNamespace:
    heads = (cfg.n_heads, cfg.d_head)
    q, k, v, o = (_layer(getattr(attn, name)) for name in "qkvo")

    def by_head(weight: Float[Tensor, "width d_model"]) -> Float[Tensor, "head d_model d_head"]:
        return weight.view(*heads, cfg.d_model).transpose(1, 2)

    return SimpleNamespace(
        W_Q=by_head(q.weight),
        W_O=o.weight.t().unflatten(0, heads),
        b_Q=q.bias.view(heads),
        b_O=o.bias,
        W_K=by_head(k.weight),
        W_V=by_head(v.weight),
        b_K=k.bias.view(heads),
        b_V=v.bias.view(heads),
        attn_scale=attn.scale,
        apply_rotary=lambda x, first: _turned(attn.rotary, x, first),
    )


def _mlp(mlp: Any) -> SimpleNamespace:
    if hasattr(mlp, "gate"):
        inward, outward = _layer(getattr(mlp, "in")), _layer(mlp.out)
        return SimpleNamespace(
            W_in=inward.weight.t(),
            W_out=outward.weight.t(),
            W_gate=_layer(mlp.gate).weight.t(),
            b_in=inward.weight.new_zeros(len(inward.weight)),
            b_out=outward.weight.new_zeros(len(outward.weight)) if outward.bias is None else outward.bias,
        )
    inward, outward = _layer(mlp.fc_in), _layer(mlp.fc_out)
    return SimpleNamespace(W_in=inward.weight.t(), b_in=inward.bias, W_out=outward.weight.t(), b_out=outward.bias)


def _norm(norm: Any) -> SimpleNamespace:
    layer = _layer(norm)
    names = {"w": getattr(layer, "weight", None), "b": getattr(layer, "bias", None)}
    return SimpleNamespace(**{name: value for name, value in names.items() if value is not None})


def _layer(component: Any) -> Any:
    """The layer that a part of a Bridge wraps."""
    return component.original_component


def _turned(
    rotary: Any, x: Float[Tensor, "batch pos head d_head"], first: int
) -> Float[Tensor, "batch pos head d_head"]:
    """Pairs of neighbours turned by their positions, from ``first`` on."""
    cos, sin = (table[first : first + x.shape[1], None] for table in (rotary.cos_cached, rotary.sin_cached))
    turn, rest = x[..., : rotary.rotary_dim], x[..., rotary.rotary_dim :]
    even, odd = turn.unflatten(-1, (-1, 2)).unbind(-1)
    turned = turn * cos + torch.stack([-odd, even], -1).flatten(-2) * sin
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned
