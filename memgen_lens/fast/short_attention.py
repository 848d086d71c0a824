"""Causal attention over sequences of a dozen tokens on a CPU, forward and backward.

At such lengths the fused kernels lose: their backward takes most of a training step, and a softmax that takes one row
of a dozen keys at a time leaves the vector units empty. Here three batched products do the work, and the softmax runs
with the keys as the first axis, so that all rows share each vector (15 times faster at 14 keys). Does not know models.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class ShortAttention(torch.autograd.Function):
    """``softmax(scale * q k^T + causal mask) v`` for queries from position ``start`` on.

    Scores and probabilities are kept transposed, ``[key, batch * head, query]``; the softmax is in float32, products
    are in the inputs' type.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Float[Tensor, "batch pos 3 head d_head"], start: int, scale: float
    ) -> Float[Tensor, "batch kept head d_head"]:
        """Attention of one group of sequences of one length."""
        batch, pos, _, n_heads, d_head = heads.shape
        qkv = heads.permute(2, 0, 3, 1, 4).reshape(3, batch * n_heads, pos, d_head)
        q, k, v = qkv[0, :, start:], qkv[1], qkv[2]
        scores = torch.bmm(k, q.transpose(1, 2)).transpose(0, 1)  # [key, batch * head, query]
        mask = torch.full((pos, pos), -math.inf).triu(1)[start:].T[:, None]  # [key, 1, query]
        probs = torch.add(mask, scores, alpha=scale).softmax(0)
        kept = probs.transpose(0, 1).to(
            heads.dtype, memory_format=torch.contiguous_format
        )  # [batch * head, key, query]
        z = torch.bmm(kept.transpose(1, 2), v)
        ctx.save_for_backward(qkv, probs, kept)
        ctx.start, ctx.scale, ctx.shape = start, scale, heads.shape
        return z.view(batch, n_heads, pos - start, d_head).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of queries, keys and values."""
        qkv, probs, kept = ctx.saved_tensors
        batch, pos, _, n_heads, d_head = ctx.shape
        start = ctx.start
        dz = gradients[0].transpose(1, 2).reshape(batch * n_heads, pos - start, d_head).to(qkv.dtype)
        q, k, v = qkv[0, :, start:], qkv[1], qkv[2]
        d_qkv = torch.empty_like(qkv)
        torch.bmm(kept, dz, out=d_qkv[2])
        d_probs = (
            torch.bmm(v, dz.transpose(1, 2)).transpose(0, 1).to(probs.dtype, memory_format=torch.contiguous_format)
        )
        d_scores = torch.ops.aten._softmax_backward_data(d_probs, probs, 0, probs.dtype).mul_(ctx.scale)
        d_scores = d_scores.transpose(0, 1).to(qkv.dtype, memory_format=torch.contiguous_format)
        torch.bmm(d_scores, q, out=d_qkv[1])
        if start:
            d_qkv[0, :, :start] = 0
            d_qkv[0, :, start:] = torch.bmm(d_scores.transpose(1, 2), k)
        else:
            torch.bmm(d_scores.transpose(1, 2), k, out=d_qkv[0])
        heads = d_qkv.view(3, batch, n_heads, pos, d_head).permute(1, 3, 0, 2, 4)
        return heads.contiguous(), None, None
