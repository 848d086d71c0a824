"""A faster forward pass over the same HookedTransformer parameters, for training only.

What it saves over the model's own forward: hook points are skipped, queries, keys and values come from one matrix
product, norms are fused, and the last block computes queries, MLP and logits only where there are labels. Nothing is
copied; gradients land in the model's own parameters. No hook fires here: analysis uses the model itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.fast.mlp import ACTIVATIONS, mlp
from memgen_lens.fast.products import linear
from memgen_lens.fast.short_attention import ShortAttention

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
    "load_in_4bit",
)
"""TransformerLens settings that must be off for this forward to be the same as the model's."""


@dataclass(frozen=True)
class Rows:
    """Sequences of one group of a batch, right-padded to one length.

    Attributes:
        tokens: Inputs ``[batch, pos]``.
        labels: Next tokens ``[batch, pos]``; -100 where there is no loss.
        start: First position with a label in any row; earlier positions need no logits.
    """

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]
    start: int

    def take(self, index: slice | Int[Tensor, " row"]) -> "Rows":
        """Some of the rows."""
        return Rows(self.tokens[index], self.labels[index], self.start)

    def to(self, device: str) -> "Rows":
        """The same rows on a device."""
        return Rows(self.tokens.to(device), self.labels.to(device), self.start)


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


def labelled_logits(model: Any, groups: list[Rows]) -> Float[Tensor, "labelled d_vocab"]:
    """Logits of all groups at and after each group's first label, row by row, group after group.

    Equal to ``model(rows.tokens)[:, rows.start :].flatten(0, 1)`` of each group, concatenated, to rounding.
    """
    cfg = model.cfg
    shapes = [tuple(rows.tokens.shape) for rows in groups]
    # Groups differ in length, so everything but attention runs on one flat list of tokens: [token, d_model].
    x = F.embedding(torch.cat([rows.tokens.flatten() for rows in groups]), model.embed.W_E)
    if cfg.positional_embedding_type == "standard":
        x = x + torch.cat([model.pos_embed.W_pos[:pos].repeat(batch, 1) for batch, pos in shapes])
    for index, block in enumerate(model.blocks):
        last = index == cfg.n_layers - 1
        starts = [rows.start if last else 0 for rows in groups]
        z = _attention(block.attn, _norm(block.ln1, x, cfg), shapes, starts, cfg)
        if last:
            x = _after(x, shapes, starts)
        x = x + linear(z, block.attn.W_O.flatten(0, 1), block.attn.b_O)
        x = x + mlp(block.mlp, _norm(block.ln2, x, cfg), cfg)
    x = _norm(model.ln_final, x, cfg) if cfg.normalization_type is not None else x
    return linear(x, model.unembed.W_U, model.unembed.b_U)


def labelled_loss(logits: Float[Tensor, "labelled d_vocab"], groups: list[Rows]) -> Float[Tensor, ""]:
    """Mean cross-entropy (nats a labelled token) of `labelled_logits` over all labels of a batch."""
    labels = torch.cat([rows.labels[:, rows.start :].flatten() for rows in groups])
    return F.cross_entropy(logits.float(), labels, ignore_index=-100)


def _after(x: Float[Tensor, "token d"], shapes: list[tuple[int, ...]], starts: list[int]) -> Float[Tensor, "kept d"]:
    """Drop the positions before each group's start."""
    parts = x.split([batch * pos for batch, pos in shapes])
    return torch.cat(
        [
            part.view(*shape, -1)[:, start:].flatten(0, 1)
            for part, shape, start in zip(parts, shapes, starts, strict=True)
        ]
    )


def _norm(norm: Any, x: Float[Tensor, "token d"], cfg: Any) -> Float[Tensor, "token d"]:
    if cfg.normalization_type is None:
        return x
    if cfg.normalization_type.startswith("LN"):
        return F.layer_norm(x, (cfg.d_model,), getattr(norm, "w", None), getattr(norm, "b", None), cfg.eps)
    return F.rms_norm(x, (cfg.d_model,), getattr(norm, "w", None), cfg.eps)


def _attention(
    attn: Any, x: Float[Tensor, "token d_model"], shapes: list[tuple[int, ...]], starts: list[int], cfg: Any
) -> Float[Tensor, "kept head_d_head"]:
    """Causal attention, group by group; queries only from each group's start on."""
    width = cfg.n_heads * cfg.d_head
    # [head, d_model, d_head] -> [d_model, head * d_head], the three side by side
    weight = torch.cat([w.transpose(0, 1).reshape(cfg.d_model, width) for w in (attn.W_Q, attn.W_K, attn.W_V)], 1)
    bias = torch.cat([b.flatten() for b in (attn.b_Q, attn.b_K, attn.b_V)])
    qkv = linear(x, weight, bias)
    outputs = []
    parts = qkv.split([batch * pos for batch, pos in shapes]) if len(shapes) > 1 else [qkv]
    for part, (batch, pos), start in zip(parts, shapes, starts, strict=True):
        heads = part.view(batch, pos, 3, cfg.n_heads, cfg.d_head)
        if cfg.positional_embedding_type == "rotary":
            q, k, v = heads.unbind(2)
            turned = [attn.apply_rotary(q), attn.apply_rotary(k)]  # float32 also where all else is bfloat16
            heads = torch.stack([*(t.to(v.dtype) for t in turned), v], 2)
        scale = 1 / attn.attn_scale if cfg.use_attn_scale else 1.0
        if _has_fused_attention(x):
            q, k, v = heads.transpose(1, 3).unbind(2)  # 3 x [batch, head, pos, d_head]
            seen = torch.ones(pos, pos, dtype=torch.bool, device=x.device).tril()[start:] if start else None
            z = F.scaled_dot_product_attention(
                q[:, :, start:], k, v, attn_mask=seen, is_causal=seen is None, scale=scale
            ).transpose(1, 2)
        else:
            z = ShortAttention.apply(heads, start, scale)
        outputs.append(z.reshape(-1, width))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _has_fused_attention(x: Tensor) -> bool:
    """Whether torch's fused kernel is the fastest there is: on a GPU, not on a CPU at such lengths."""
    return x.is_cuda
