"""Write a model into a directory that plain TransformerLens reads too.

Does not know how it was trained.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import cannot_write, write_bytes, write_json
from memgen_lens.core.ownership import replacing, require_ours
from memgen_lens.models.guard import lens_model
from memgen_lens.models.hub import quiet
from memgen_lens.models.native import config_of, state_of
from memgen_lens.models.plain import plain_model
from memgen_lens.models.tensors import save_tensors


@arguments(model=lens_model("save_model"), directory=kinds.place("save_model"))
def save_model(model: Any, directory: str | Path) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into a directory.

    All three load with plain TransformerLens and transformers:
    ``HookedTransformer(HookedTransformerConfig.from_dict(config))`` and ``load_state_dict``. The config of a model that
    is not in float32 names its ``dtype`` ("float16"), for which plain TransformerLens wants the torch.dtype.
    Of a Bridge around a Hugging Face model, the directory is that model's, as transformers reads it.

    Raises:
        RunDirectoryError: The directory cannot be written, or holds somebody else's file of one of these names.
        ModelError: A Bridge's weights have been processed (compatibility mode).
    """
    directory = Path(directory)
    if hasattr(getattr(model, "original_model", None), "save_pretrained"):
        return _save_bridge(model, directory)
    cfg = {name: value for name, value in config_of(model).items() if _is_plain(value)}
    if model.cfg.dtype != torch.float32:
        cfg["dtype"] = str(model.cfg.dtype).removeprefix("torch.")
    tokenizer = _tokenizer_files(model)
    names = ["config.json", "model.safetensors", *tokenizer]
    try:
        require_ours([directory / name for name in names], call=f"save_model(directory={str(directory)!r})")
    except OSError as error:
        raise cannot_write(directory, error) from None
    write_json(directory / "config.json", cfg)
    save_tensors(state_of(model), directory / "model.safetensors")
    for name, content in tokenizer.items():
        write_bytes(directory / name, content)
    return directory


def _save_bridge(model: Any, directory: Path) -> Path:
    """Write the transformers model inside a Bridge, with its tokenizer, as a Hugging Face directory.

    ``AutoModelForCausalLM.from_pretrained(directory)`` has the same weights, bit for bit.

    Raises:
        ModelError: TransformerLens has processed the weights (compatibility mode): they are the model's no longer.
        RunDirectoryError: The directory cannot be written, or holds somebody else's file of one of these names.
    """
    plain = plain_model(model, call="save_model")
    tokenizer = getattr(model, "hugging_face_tokenizer", model.tokenizer)
    with written_whole(directory, call="save_model(directory={})") as elsewhere:
        plain.save_pretrained(elsewhere)
        if tokenizer is not None:
            tokenizer.save_pretrained(elsewhere)
    return directory


@contextmanager
def written_whole(directory: Path, *, call: str) -> Iterator[str]:
    """A folder for a library to write into, whose files then take their places in a directory.

    The library itself would write over whatever is there.

    Raises:
        RunDirectoryError: The directory cannot be written, or holds somebody else's file of one of these names.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=directory.parent) as elsewhere, quiet():
            yield elsewhere
            files = sorted(path for path in Path(elsewhere).rglob("*") if path.is_file())
            places = [directory / path.relative_to(elsewhere) for path in files]
            require_ours(places, call=call.format(repr(str(directory))))
            for path, place in zip(files, places, strict=True):
                with replacing(place) as part:
                    path.replace(part)
    except (OSError, AssertionError) as error:
        raise cannot_write(directory, error) from None


def _tokenizer_files(model: Any) -> dict[str, bytes]:
    """By name, the files that transformers writes of the model's tokenizer; it writes them over whatever is there."""
    if model.tokenizer is None:
        return {}
    tokenizer = copy.deepcopy(model.tokenizer)
    if not model.cfg.default_prepend_bos and tokenizer.bos_token == tokenizer.eos_token:
        tokenizer.bos_token = None  # TransformerLens has set it; saved, it would be prepended on loading
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # transformers keeps only what it was made with
    with TemporaryDirectory() as elsewhere:
        tokenizer.save_pretrained(elsewhere)
        files = [path for path in Path(elsewhere).rglob("*") if path.is_file()]
        return {str(path.relative_to(elsewhere)): path.read_bytes() for path in sorted(files)}


def _is_plain(value: Any) -> bool:
    """Whether a field of TransformerLens' config is data (its functions and types are made anew on loading)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
