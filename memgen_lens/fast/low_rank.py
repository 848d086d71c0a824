"""A frozen linear layer and its low-rank adapter (LoRA, arXiv 2106.09685) as one product with one backward pass.

peft runs the adapter beside the layer: two products, a scaling, a sum and two changes of type a layer, each a pass over
memory. Does not make adapters: see `memgen_lens.training.pretrained`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memgen_lens.fast.products import by_onednn, compute_dtype, product


@contextmanager
def fused_adapters(network: torch.nn.Module) -> Iterator[None]:
    """Inside the block, run adapted linear layers of a peft model as one; others, and those with dropout, as ever."""
    from peft.tuners.lora.layer import Linear as LoraLinear

    fused = [layer for layer in network.modules() if type(layer) is LoraLinear and _is_plain(layer)]
    for layer in fused:
        layer.forward = partial(_adapted, layer)
    try:
        yield
    finally:
        for layer in fused:
            del layer.forward


def _is_plain(layer: Any) -> bool:
    """Whether it is one frozen `torch.nn.Linear` with one adapter of two products, and nothing else happens in it."""
    if type(layer.base_layer) is not torch.nn.Linear or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        not (layer.merged or layer.disable_adapters or layer.lora_variant.get(name) or layer.lora_bias.get(name))
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _adapted(layer: Any, x: Tensor) -> Tensor:
    (name,) = layer.active_adapters
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Adapted.apply(x, base.weight, base.bias, down, up, layer.scaling[name], compute_dtype(x))


class _Adapted(torch.autograd.Function):
    """``x @ weight.T + bias + scale * (x @ down.T) @ up.T``; the weight and the bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.scale, ctx.x_dtype, ctx.adapter_dtype = scale, x.dtype, down.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, down, up = (matrix.to(dtype) for matrix in (weight, down, up))
        low = _times(rows, down)
        ctx.save_for_backward(rows, weight, down, up, low)
        y = _times(rows, weight, None if bias is None else bias.to(dtype)).addmm_(low, up.t(), alpha=scale)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, down, up, low = ctx.saved_tensors
        dy = gradients[0].reshape(-1, weight.shape[0])
        d_low = (dy @ up).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _times(dy, weight.t()).addmm_(d_low, down).to(ctx.x_dtype)
            dx = dx.view(*gradients[0].shape[:-1], -1)
        d_down = (d_low.t() @ rows).to(ctx.adapter_dtype)
        d_up = (dy.t() @ low).mul_(ctx.scale).to(ctx.adapter_dtype)
        return dx, None, None, d_down, d_up, None, None


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, float32 by oneDNN where that is faster."""
    if x.dtype == torch.float32 and by_onednn(x):
        return product(x, weight, bias)
    return F.linear(x, weight, bias)
