"""Read models back.

Does not know how they were trained.
"""

from pathlib import Path
from typing import Any

from memgen_lens.core.files import damaged, missing, read_json
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER
from memgen_lens.models.build import hooked_transformer, own_random_state, require_device
from memgen_lens.models.tensors import load_tensors

with quiet_imports():
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformerConfig


def load_run_model(directory: str | Path, *, device: str = "cpu") -> Any:
    """The HookedTransformer that `save_model` or `train` wrote, with its tokenizer, in evaluation mode.

    Args:
        directory: A folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.
        device: Torch device.

    Raises:
        RunDirectoryError: A file is missing or damaged.
        ModelError: The device is not there.
    """
    from transformers import PreTrainedTokenizerFast

    directory = Path(directory)
    require_device(device, call="load_model")
    config = read_json(directory / "config.json")
    weights = load_tensors(directory / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).is_file():
            raise missing(directory / name)
    try:
        with own_random_state():
            cfg = HookedTransformerConfig.from_dict(config | {"device": device, "init_weights": False})
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
            model = hooked_transformer(cfg, tokenizer)
            model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise damaged(directory, f"config, weights and tokenizer that do not fit together ({cause})") from None
    model.cfg.init_weights = config.get("init_weights", True)
    return model.eval()
