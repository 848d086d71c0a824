"""A faster forward pass over the same parameters, for training only.

What it saves over the model's own forward: hook points are skipped, queries, keys and values come from one matrix
product, norms are fused, and the last block computes queries, MLP and logits only where there are labels. Nothing is
copied; gradients land in the model's own parameters. No hook fires here: analysis uses the model itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from memgen_lens.fast.attention import ShortAttention, fused_attention
from memgen_lens.fast.blocks import norm, qkv_weights, rotated
from memgen_lens.fast.mlp import mlp
from memgen_lens.fast.native import parameters_of
from memgen_lens.fast.products import linear
from memgen_lens.fast.support import why_not

MlpStep = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]
"""From the residual stream before a block's MLP to the stream behind it."""


@dataclass(frozen=True)
class Rows:
    """Sequences of one group of a batch, right-padded to one length.

    Attributes:
        tokens: Inputs ``[batch, pos]``.
        labels: Next tokens ``[batch, pos]``; -100 where there is no loss.
        start: First position with a label in any row; earlier positions need no logits.
        lengths: Tokens of each sequence, its last one (which is a label alone) counted, padding not.
    """

    tokens: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]
    start: int
    lengths: Int[Tensor, " batch"]

    def take(self, index: slice | Int[Tensor, " row"]) -> "Rows":
        """Some of the rows."""
        # Lengths stay on the CPU, wherever the rows are.
        among = index if isinstance(index, slice) else index.to(self.lengths.device)
        return Rows(self.tokens[index], self.labels[index], self.start, self.lengths[among])

    def to(self, device: str) -> "Rows":
        """The same rows on a device."""
        return Rows(self.tokens.to(device), self.labels.to(device), self.start, self.lengths)


def labelled_logits(
    model: Any, groups: list[Rows], *, mlps: Mapping[int, MlpStep] | None = None
) -> Float[Tensor, "labelled d_vocab"]:
    """Logits of all groups at and after each group's first label, row by row, group after group.

    Equal to ``model(rows.tokens)[:, rows.start :].flatten(0, 1)`` of each group, concatenated, to rounding.

    Args:
        model: A model that `memgen_lens.fast.support.why_not` says nothing of.
        groups: The sequences.
        mlps: By layer, what is run in place of ``x + mlp(norm(x))``.
    """
    mlps = mlps or {}
    model, cfg = parameters_of(model), model.cfg
    shapes = [tuple(rows.tokens.shape) for rows in groups]
    # Groups differ in length, so everything but attention runs on one flat list of tokens: [token, d_model].
    x = F.embedding(torch.cat([rows.tokens.flatten() for rows in groups]), model.embed.W_E)
    if cfg.positional_embedding_type == "standard":
        x = x + torch.cat([model.pos_embed.W_pos[:pos].repeat(batch, 1) for batch, pos in shapes])
    for index, block in enumerate(model.blocks):
        last = index == cfg.n_layers - 1
        starts = [rows.start if last else 0 for rows in groups]
        z = _attention(block.attn, norm(block.ln1, x, cfg), shapes, starts, cfg)
        if last:
            x = _after(x, shapes, starts)
        x = x + linear(z, block.attn.W_O.flatten(0, 1), block.attn.b_O)
        x = mlps[index](x) if index in mlps else x + mlp(block.mlp, norm(block.ln2, x, cfg), cfg)
    x = norm(model.ln_final, x, cfg) if cfg.normalization_type is not None else x
    return linear(x, model.unembed.W_U, model.unembed.b_U)


def logits_of(model: Any, groups: list[Rows]) -> Float[Tensor, "labelled d_vocab"]:
    """`labelled_logits` of any model: by the fast forward where it allows, else by TransformerLens' own."""
    if why_not(model.cfg) is None:
        return labelled_logits(model, groups)
    return torch.cat([model(rows.tokens)[:, rows.start :].flatten(0, 1) for rows in groups])


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


def _attention(
    attn: Any, x: Float[Tensor, "token d_model"], shapes: list[tuple[int, ...]], starts: list[int], cfg: Any
) -> Float[Tensor, "kept head_d_head"]:
    """Causal attention, group by group; queries only from each group's start on."""
    width = cfg.n_heads * cfg.d_head
    qkv = linear(x, *qkv_weights(attn, cfg))
    outputs = []
    parts = qkv.split([batch * pos for batch, pos in shapes]) if len(shapes) > 1 else [qkv]
    scale = 1 / attn.attn_scale if cfg.use_attn_scale else 1.0
    for part, (batch, pos), start in zip(parts, shapes, starts, strict=True):
        heads = rotated(attn, part.view(batch, pos, 3, cfg.n_heads, cfg.d_head), cfg)
        attend = fused_attention if _has_fused_attention(x) else ShortAttention.apply
        outputs.append(attend(heads, start, scale).reshape(-1, width))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _has_fused_attention(x: Tensor) -> bool:
    """Whether torch's fused kernel is the fastest there is: on a GPU, not on a CPU at such lengths."""
    return x.is_cuda
