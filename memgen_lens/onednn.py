"""Matrix products on a CPU by oneDNN or by hand, where torch's default for float32 is slower.

Torch hands float32 products to MKL, which leaves AVX-512 unused on processors that are not Intel's: there oneDNN, which
is in torch too, is more than twice as fast, in the same float32. Does not know models.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memgen_lens.core.quiet import quiet_imports

with quiet_imports():
    from transformer_lens.utilities.activation_functions import gelu_new


@cache
def available() -> bool:
    """Whether oneDNN is in this torch and the processor has AVX-512; decided once, so that results stay the same."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(
    x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "row d_out"]:
    """``x @ weight + bias``, differentiable."""
    if torch.is_autocast_enabled(x.device.type) or x.device.type != "cpu" or not available():
        return torch.addmm(bias, x, weight)  # bfloat16 products are oneDNN's already
    return _Linear.apply(x, weight, bias)


@contextmanager
def fast_products(model: Any) -> Iterator[None]:
    """Send the float32 products of a model's forward pass on a CPU to oneDNN, inside the ``with`` block.

    Without gradients only; everything else goes where it went. TransformerLens writes GPT-2's gelu out in eight steps,
    each a pass over memory; inside the block torch's fused one takes its place.
    """
    mlps: list[Any] = [getattr(block, "mlp", None) for block in getattr(model, "blocks", ())]
    written_out = [mlp for mlp in mlps if getattr(mlp, "act_fn", None) is gelu_new]
    try:
        for mlp in written_out:
            mlp.act_fn = _FUSED_GELU
        with _Rerouted() if available() else nullcontext():
            yield
    finally:
        for mlp in written_out:
            mlp.act_fn = gelu_new


_FUSED_GELU = partial(F.gelu, approximate="tanh")


class _Rerouted(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if bias.ndim == 1 and x.ndim == 2 and _plain(x, weight, bias):
                return _product(x, weight.t(), bias)
        elif func is F.linear and not kwargs:
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else None
            if _plain(x, weight, *([] if bias is None else [bias])):
                return _product(x, weight, bias)
        elif func in _MATMULS and not kwargs:
            a, b = args
            if a.ndim == b.ndim == 4 and a.shape[2] == 1 and _plain(a, b):
                # One query over cached keys: thousands of products this small are slower than a sum over the axis.
                return (a.transpose(2, 3) * b).sum(2, keepdim=True)
        return func(*args, **(kwargs or {}))


_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.t(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy = gradients[0]
        return _product(dy, weight, None), _product(x.t(), dy.t(), None), dy.sum(0)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _plain(*tensors: Tensor) -> bool:
    """Whether all are float32 on the CPU, and no gradient is wanted."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wanted and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
