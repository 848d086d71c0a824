"""The MLP of a block on rows of tokens, forward and backward, with the activation function taken along.

Does not know attention nor hook points.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from memgen_lens.fast.products import by_onednn, compute_dtype, linear, product, product_times, weight_gradients

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def mlp(module: Any, x: Float[Tensor, "row d_model"], cfg: Any) -> Float[Tensor, "row d_model"]:
    """What a block's ``mlp`` gives, differentiable, in the type that autocast asks for."""
    if cfg.gated_mlp:
        hidden = ACTIVATIONS[cfg.act_fn](x @ module.W_gate) * (x @ module.W_in) + module.b_in
        return linear(hidden, module.W_out, module.b_out)
    if by_onednn(x) and torch.is_grad_enabled():
        dtype = compute_dtype(x)
        weights = (module.W_in, module.b_in, module.W_out, module.b_out)
        return _Mlp.apply(x.to(dtype), *weights, cfg.act_fn, dtype)
    return linear(activated(module, x, cfg.act_fn), module.W_out, module.b_out)


def activated(module: Any, x: Float[Tensor, "row d_model"], act_fn: str) -> Float[Tensor, "row d_mlp"]:
    """The hidden layer of an MLP without a gate, behind its activation function; in one go without gradient."""
    if by_onednn(x) and not torch.is_grad_enabled():
        dtype = compute_dtype(x)
        return product(x.to(dtype), module.W_in.to(dtype).t(), module.b_in.to(dtype), act_fn)
    return ACTIVATIONS[act_fn](linear(x, module.W_in, module.b_in))


class _Mlp(torch.autograd.Function):
    """``act_fn(x @ W_in + b_in) @ W_out + b_out``; the slope of the activation function is kept, its input is not."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "row d_model"],
        w_in: Float[Tensor, "d_model d_mlp"],
        b_in: Float[Tensor, " d_mlp"],
        w_out: Float[Tensor, "d_mlp d_model"],
        b_out: Float[Tensor, " d_model"],
        act_fn: str,
        dtype: torch.dtype,
    ) -> Float[Tensor, "row d_model"]:
        inward, outward = w_in.to(dtype), w_out.to(dtype)
        if act_fn == "relu":
            hidden = product(x, inward.t(), b_in.to(dtype), "relu")
            slope = hidden
        else:
            pre = product(x, inward.t(), b_in.to(dtype))
            hidden, slope = _gelu_new(pre) if act_fn == "gelu_new" else (ACTIVATIONS[act_fn](pre), pre)
        ctx.save_for_backward(x, inward, outward, hidden, slope)
        ctx.act_fn, ctx.parameter_dtype = act_fn, w_in.dtype
        return product(hidden, outward.t(), b_out.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inward, outward, hidden, slope = ctx.saved_tensors
        dy = gradients[0]
        if ctx.act_fn == "gelu_new":
            d_pre = product_times(dy, outward, slope)
        else:
            d_hidden = product(dy, outward, None)
            d_pre = _BACKWARD[ctx.act_fn](d_hidden, slope)
        d_in, d_out = (weight_gradients(a, b, ctx.parameter_dtype) for a, b in ((x, d_pre), (hidden, dy)))
        return product(d_pre, inward, None), *d_in, *d_out, None, None


_BACKWARD = {
    "relu": lambda dy, post: torch.ops.aten.threshold_backward(dy, post, 0),
    "gelu": lambda dy, pre: torch.ops.aten.gelu_backward(dy, pre),
    "silu": lambda dy, pre: torch.ops.aten.silu_backward(dy, pre),
}

PIECE = 1 << 19
"""Numbers that `_gelu_new` takes at a time, so that what it holds in between stays in the processor's cache."""


def _gelu_new(x: Float[Tensor, "row d_mlp"]) -> tuple[Float[Tensor, "row d_mlp"], Float[Tensor, "row d_mlp"]]:
    """GPT-2's gelu and its slope.

    With ``v = c (x + 0.044715 x^3)``, ``c = 2 sqrt(2 / pi)`` and ``s = sigmoid(v)``: gelu is ``x s``, its slope
    ``s + x s (1 - s) dv/dx``. Torch computes a tanh in each of its two passes, which takes six times a sigmoid.
    """
    c = 2 * math.sqrt(2 / math.pi)
    post, slope = torch.empty_like(x), torch.empty_like(x)
    n = min(PIECE, x.numel())
    kept = torch.empty(4, n)
    pieces = (tensor.view(-1).split(n) for tensor in (x, post, slope))
    for x_piece, post_piece, slope_piece in zip(*pieces, strict=True):
        a, square, s, falling = kept[:, : len(x_piece)]
        a.copy_(x_piece)
        torch.mul(a, a, out=square)
        torch.addcmul(a, square, a, value=0.044715, out=s).mul_(c).sigmoid_()
        post_piece.copy_(a.mul_(s))
        torch.addcmul(a, a, s, value=-1, out=falling)
        slope_piece.copy_(torch.addcmul(s, falling, square.mul_(3 * 0.044715 * c).add_(c), out=square))
    return post, slope
