"""Matrix products on a CPU by oneDNN or by hand, where torch's default is slower.

Torch hands float32 products to MKL, which leaves AVX-512 unused on processors that are not Intel's: there oneDNN, which
is in torch too, is more than twice as fast, in the same float32. In bfloat16 it takes the bias, the activation function
or a factor along with the product. Does not know models.
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


def by_onednn(x: Tensor) -> bool:
    """Whether products of this tensor go to oneDNN: on a CPU, in float32 or under bfloat16 autocast."""
    return x.device.type == "cpu" and available() and compute_dtype(x) in (torch.float32, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that products are computed in: autocast's where it is on, else the tensor's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(
    x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_in d_out"], bias: Float[Tensor, " d_out"]
) -> Float[Tensor, "row d_out"]:
    """``x @ weight + bias``, differentiable, in the type that autocast asks for."""
    if not by_onednn(x):
        return torch.addmm(bias, x, weight)
    dtype = compute_dtype(x)
    return _Linear.apply(x.to(dtype), weight, bias, dtype)


def product(
    x: Float[Tensor, "*row d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    act_fn: str = "none",
) -> Float[Tensor, "*row d_out"]:
    """``act_fn(x @ weight.T + bias)`` by oneDNN, all in one type; no gradient.

    Args:
        x: Rows.
        weight: Weights, one row an output.
        bias: Biases or None.
        act_fn: ``"none"``, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_new"``.
    """
    name, algorithm = _POINTWISE[act_fn]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], algorithm)


def product_times(
    x: Float[Tensor, "row d_in"], weight: Float[Tensor, "d_out d_in"], factor: Float[Tensor, "row d_out"]
) -> Float[Tensor, "row d_out"]:
    """``(x @ weight.T) * factor`` by oneDNN, all in one type; no gradient."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, None, "mul")


_POINTWISE = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight.to(dtype))
        ctx.parameter_dtype = weight.dtype
        return product(x, weight.to(dtype).t(), bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dy = gradients[0]
        return product(dy, weight, None), *weight_gradients(x, dy, ctx.parameter_dtype), None


def weight_gradients(
    x: Float[Tensor, "row d_in"], dy: Float[Tensor, "row d_out"], dtype: torch.dtype
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    """Gradients of the weight and the bias of ``x @ weight + bias``."""
    # bfloat16's own product takes a transposed operand as it is; float32's would go to MKL.
    weight = product(x.t(), dy.t(), None) if x.dtype == torch.float32 else x.t() @ dy
    return weight.to(dtype), dy.sum(0).to(dtype)


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


@contextmanager
def trained_products() -> Iterator[None]:
    """Send float32 products by weights on a CPU to oneDNN inside the ``with`` block, forth and back.

    Of frozen weights no gradient is made and no input kept.
    """
    with _TrainedRerouted() if available() else nullcontext():
        yield


_FUSED_GELU = partial(F.gelu, approximate="tanh")


class _Rerouted(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.addmm and len(args) == 3 and not kwargs:
            bias, x, weight = args
            if bias.ndim == 1 and x.ndim == 2 and _plain(x, weight, bias):
                return product(x, weight.t(), bias)
        elif func is F.linear and not kwargs:
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else None
            if _plain(x, weight, *([] if bias is None else [bias])):
                return product(x, weight, bias)
        elif func in _MATMULS and not kwargs:
            a, b = args
            if a.ndim == b.ndim == 4 and a.shape[2] == 1 and _plain(a, b):
                # One query over cached keys: thousands of products this small are slower than a sum over the axis.
                return (a.transpose(2, 3) * b).sum(2, keepdim=True)
        return func(*args, **(kwargs or {}))


class _TrainedRerouted(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else None
            tensors = [x, weight, *([] if bias is None else [bias])]
            if all(by_onednn(tensor) and compute_dtype(tensor) == torch.float32 for tensor in tensors):
                return _Product.apply(*tensors)
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias``, of which only those gradients are made that are wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = gradients[0].contiguous()
        rows = dy.flatten(0, -2)
        wanted = ctx.needs_input_grad
        dx = product(dy, weight.t(), None) if wanted[0] else None
        dw = product(rows.t(), x.flatten(0, -2).t(), None) if wanted[1] else None
        db = rows.sum(0) if wanted[2:] == (True,) else None
        return (dx, dw, db)[: len(wanted)]


_MATMULS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


def _plain(*tensors: Tensor) -> bool:
    """Whether all are float32 on the CPU, and no gradient is wanted."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wanted and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
