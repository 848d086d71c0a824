"""Write a model into a directory that plain TransformerLens reads too.

Does not know how it was trained.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from memgen_lens.core.files import write_json
from memgen_lens.models.pretrained import save_bridge
from memgen_lens.models.tensors import save_tensors


def save_model(model: Any, directory: str | Path) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into a directory.

    All three load with plain TransformerLens and transformers:
    ``HookedTransformer(HookedTransformerConfig.from_dict(config))`` and ``load_state_dict``.

    Raises:
        RunDirectoryError: The directory cannot be written.
    """
    if hasattr(getattr(model, "original_model", None), "save_pretrained"):
        return save_bridge(model, directory)
    directory = Path(directory)
    cfg = {name: value for name, value in model.cfg.to_dict().items() if _is_plain(value)}
    write_json(directory / "config.json", cfg)
    save_tensors(model.state_dict(), directory / "model.safetensors")
    if model.tokenizer is not None:
        tokenizer = deepcopy(model.tokenizer)
        if not model.cfg.default_prepend_bos and tokenizer.bos_token == tokenizer.eos_token:
            tokenizer.bos_token = None  # TransformerLens has set it; saved, it would be prepended on loading
        tokenizer.save_pretrained(str(directory))
    return directory


def _is_plain(value: Any) -> bool:
    """Whether a field of TransformerLens' config is data (its functions and types are made anew on loading)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
