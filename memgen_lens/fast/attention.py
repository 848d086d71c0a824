"""Causal attention over whole sequences: on a CPU by hand where they are short, else by torch's fused kernel.

At a dozen tokens the fused kernel loses on a CPU: its backward takes most of a training step, and a softmax that takes
one row of a dozen keys at a time leaves the vector units empty. Here three batched products do the work, and the
softmax runs with the keys as the first axis, so that all rows share each vector (15 times faster at 14 keys). Does not
know models.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

SHORT = 48
"""Tokens up to which attention by hand is faster on a CPU (forward alone: 2.2 times at 10 tokens, 0.6 times at 100)."""


def attention(
    heads: Float[Tensor, "batch pos 3 head d_head"], start: int, scale: float
) -> Float[Tensor, "batch kept head d_head"]:
    """``softmax(scale * q k^T + causal mask) v`` for queries from position ``start`` on; no gradient."""
    if heads.device.type == "cpu" and heads.shape[1] <= SHORT:
        return _forward(heads, start, scale)[0]
    return fused_attention(heads, start, scale)


def gathered_attention(
    qkv: Float[Tensor, "row 3 head d_head"], path: Int[Tensor, "batch pos"], start: int, scale: float
) -> Float[Tensor, "batch kept head d_head"]:
    """`attention` of sequences whose positions are rows of ``qkv``, each row of any number of them.

    The rows are brought into the order of the products at once, where gathering sequences first would be a pass more.
    """
    n_heads, d_head = qkv.shape[2:]
    batch, pos = path.shape
    if qkv.device.type != "cpu" or pos > SHORT:
        return attention(qkv.index_select(0, path.flatten()).view(batch, pos, *qkv.shape[1:]), start, scale)
    parts = torch.arange(3 * n_heads, device=path.device).view(3, 1, n_heads, 1)
    place = parts + 3 * n_heads * path[:, None]  # [3, batch, head, pos], in units of d_head numbers
    by_head = qkv.view(-1, d_head).index_select(0, place.flatten()).view(3, batch * n_heads, pos, d_head)
    return rearrange(_by_hand(by_head, start, scale)[0], "(batch head) pos d -> batch pos head d", head=n_heads)


def fused_attention(
    heads: Float[Tensor, "batch pos 3 head d_head"], start: int, scale: float
) -> Float[Tensor, "batch kept head d_head"]:
    """`attention` by torch's fused kernel, differentiable."""
    pos = heads.shape[1]
    q, k, v = heads.transpose(1, 3).unbind(2)  # 3 x [batch, head, pos, d_head]
    seen = torch.ones(pos, pos, dtype=torch.bool, device=heads.device).tril()[start:] if start else None
    z = F.scaled_dot_product_attention(q[:, :, start:], k, v, attn_mask=seen, is_causal=seen is None, scale=scale)
    return z.transpose(1, 2)


class ShortAttention(torch.autograd.Function):
    """`attention` by hand, with its gradient.

    Scores and probabilities are kept transposed, ``[key, batch * head, query]``; the softmax is in float32, products
    are in the inputs' type.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Float[Tensor, "batch pos 3 head d_head"], start: int, scale: float
    ) -> Float[Tensor, "batch kept head d_head"]:
        """Attention of one group of sequences of one length."""
        z, *kept = _forward(heads, start, scale)
        ctx.save_for_backward(*kept)
        ctx.start, ctx.scale, ctx.shape = start, scale, heads.shape
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of queries, keys and values."""
        qkv, probs, kept = ctx.saved_tensors
        start, n_heads = ctx.start, ctx.shape[3]
        dz = rearrange(gradients[0], "batch pos head d -> (batch head) pos d").to(qkv.dtype)
        q, k, v = qkv[0, :, start:], qkv[1], qkv[2]
        d_qkv = torch.empty_like(qkv)
        torch.bmm(kept, dz, out=d_qkv[2])
        d_probs = (
            torch.bmm(v, dz.transpose(1, 2)).transpose(0, 1).to(probs.dtype, memory_format=torch.contiguous_format)
        )
        d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, 0, probs.dtype).mul_(ctx.scale)
        d_scores = d_scores.transpose(0, 1).to(qkv.dtype, memory_format=torch.contiguous_format)
        torch.bmm(d_scores, q, out=d_qkv[1])
        d_qkv[0, :, :start] = 0
        if start:
            d_qkv[0, :, start:] = torch.bmm(d_scores.transpose(1, 2), k)
        else:
            torch.bmm(d_scores.transpose(1, 2), k, out=d_qkv[0])
        heads = rearrange(d_qkv, "part (batch head) pos d -> batch pos part head d", head=n_heads)
        return heads.contiguous(), None, None


def _forward(
    heads: Float[Tensor, "batch pos 3 head d_head"], start: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, and what its gradient needs: queries, keys and values; probabilities; these in the inputs' type."""
    qkv = rearrange(heads, "batch pos part head d -> part (batch head) pos d")
    z, probs, kept = _by_hand(qkv, start, scale)
    return rearrange(z, "(batch head) pos d -> batch pos head d", head=heads.shape[3]), qkv, probs, kept


def _by_hand(
    qkv: Float[Tensor, "3 row pos d_head"], start: int, scale: float
) -> tuple[Float[Tensor, "row kept d_head"], Float[Tensor, "pos row kept"], Float[Tensor, "row pos kept"]]:
    """Attention of the heads of all sequences, and its probabilities, in float32 and in the inputs' type."""
    pos = qkv.shape[2]
    q, k, v = qkv[0, :, start:], qkv[1], qkv[2]
    scores = torch.bmm(k, q.transpose(1, 2)).transpose(0, 1)  # [key, row, query]
    mask = torch.full((pos, pos), -math.inf, device=qkv.device).triu(1)[start:].T[:, None]  # [key, 1, query]
    probs = torch.add(mask, scores, alpha=scale).softmax(0)
    kept = probs.transpose(0, 1).to(qkv.dtype, memory_format=torch.contiguous_format)  # [row, key, query]
    return torch.bmm(kept.transpose(1, 2), v), probs, kept
