"""The transformers model inside a Bridge, as plain transformers made it: without hook points, with the same weights.

Does not load models (`pretrained`) nor write them (`save`).
"""

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memgen_lens.core.errors import ModelError


def plain_model(model: Any, *, call: str) -> Any:
    """A transformers model that shares the values of all weights with the one inside a Bridge.

    Args:
        model: A Bridge around a Hugging Face model.
        call: The call that needs it.

    Raises:
        ModelError: TransformerLens has processed the weights (compatibility mode): they are the model's no longer.
    """
    if model.compatibility_mode:
        raise ModelError(
            call,
            expected="a Bridge with the weights of its Hugging Face model",
            received="one in TransformerLens' compatibility mode",
            fix=f"Call {call} before enable_compatibility_mode().",
        )
    hf = model.original_model
    with torch.device("meta"):
        plain = type(hf)(copy.deepcopy(hf.config))
    inside = {own_name(name): tensor for name, tensor in hf.state_dict().items()}
    plain.load_state_dict({name: inside[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    # What no state dict holds, such as the frequencies of rotary positions.
    buffers = {own_name(name): tensor for name, tensor in hf.named_buffers()}
    for path, module in plain.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, buffers[f"{path}.{name}" if path else name])
    plain.generation_config = copy.deepcopy(hf.generation_config)
    plain.name_or_path = hf.name_or_path
    return plain.eval()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values of weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def own_name(name: str) -> str:
    """A tensor's name in the model that a Bridge was put around."""
    return name.replace("._original_component", "")
