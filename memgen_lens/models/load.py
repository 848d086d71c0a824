"""Read models back.

Does not know how they were trained.
"""

from pathlib import Path
from typing import Any

import torch

from memgen_lens.core.files import damaged, missing, read_json, user_path
from memgen_lens.models.build import model_like, require_device
from memgen_lens.models.native import set_state
from memgen_lens.models.tensors import load_tensors


def load_run_model(directory: str | Path, *, device: str = "cpu") -> Any:
    """The model that `save_model` or `train` wrote, with its tokenizer, in evaluation mode.

    A HookedTransformer on TransformerLens 3, a native Bridge on 4, whichever of them has written it.

    Args:
        directory: A folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
        device: Torch device.

    Raises:
        RunDirectoryError: A file is missing or damaged.
        ModelError: The device is not there.
    """
    from transformers import PreTrainedTokenizerFast

    directory = user_path(directory, call="load_model")
    require_device(device, call="load_model")
    config = read_json(directory / "config.json")
    weights = load_tensors(directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise missing(directory / name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
        model = model_like(config | {"dtype": _dtype(config.get("dtype", "float32"))}, tokenizer, device=device)
        assert model.tokenizer is not None
        model.tokenizer.padding_side = tokenizer.padding_side
        # A weight may be of another precision than the config says: model.half() changes the weights alone.
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.data = parameter.data.to(weights[name].dtype)
        set_state(model, weights)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise damaged(directory, f"config, weights and tokenizer that do not fit together ({cause})") from None
    return model.eval()


def _dtype(name: str) -> torch.dtype:
    """The torch.dtype of a config: ``"float16"``."""
    dtype = getattr(torch, str(name))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype {name!r} is none of torch's")
    return dtype
