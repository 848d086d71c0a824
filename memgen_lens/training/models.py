"""The one file that builds, saves and loads TransformerLens models.

Does not know how they are trained. TransformerLens' deprecation warnings and log lines stop here: a user of
memgen_lens can do nothing about them.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memgen_lens.core.config import ModelConfig
from memgen_lens.core.errors import ModelError, RunDirectoryError
from memgen_lens.core.files import damaged, missing, read_json, write_json
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.core.types import LensModel

with quiet_imports():
    from transformer_lens import HookedTransformer, HookedTransformerConfig


def build_model(
    config: ModelConfig, tokenizer: Any, *, n_ctx: int, seed: int, device: str = "cpu"
) -> HookedTransformer:
    """A HookedTransformer of random weights over a tokenizer's vocabulary.

    Args:
        config: Its shape.
        tokenizer: A Hugging Face tokenizer; the model keeps it.
        n_ctx: Longest sequence in tokens.
        seed: Seed of the weights.
        device: Torch device.

    Returns:
        The model, in training mode, with ``cfg.default_prepend_bos`` off: a prompt's tokens are the prompt.

    Raises:
        ModelError: The device is not there.
    """
    require_device(device, call="build_model")
    with _own_random_state():
        cfg = HookedTransformerConfig(
            n_layers=config.n_layers,
            d_model=config.d_model,
            n_ctx=n_ctx,
            d_head=config.d_model // config.n_heads,
            n_heads=config.n_heads,
            d_mlp=config.d_mlp,
            act_fn=config.act_fn,
            d_vocab=len(tokenizer),
            normalization_type=config.normalization_type,
            positional_embedding_type=config.positional_embedding_type,
            rotary_dim=config.d_model // config.n_heads if config.positional_embedding_type == "rotary" else None,
            gated_mlp=config.gated_mlp,
            default_prepend_bos=False,
            seed=seed,
            device=device,
        )
        return _hooked_transformer(cfg, tokenizer)


def save_model(model: HookedTransformer, directory: str | Path) -> Path:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into a directory.

    All three load with plain TransformerLens and transformers:
    ``HookedTransformer(HookedTransformerConfig.from_dict(config))`` and ``load_state_dict``.

    Raises:
        RunDirectoryError: The directory cannot be written.
    """
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


def load_model(directory: str | Path, *, device: str = "cpu") -> HookedTransformer:
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
        with _own_random_state():
            cfg = HookedTransformerConfig.from_dict(config | {"device": device, "init_weights": False})
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
            model = _hooked_transformer(cfg, tokenizer)
            model.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise damaged(directory, f"config, weights and tokenizer that do not fit together ({cause})") from None
    model.cfg.init_weights = config.get("init_weights", True)
    return model.eval()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write named tensors as safetensors, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"writing {path}",
            expected="a place that can be written",
            received=str(error),
            fix="Free some space, or choose another directory with --out (memgen-lens) or out=.",
        ) from None


def load_tensors(path: Path, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The named tensors of a safetensors file.

    Raises:
        RunDirectoryError: The file is missing or damaged.
    """
    if not path.is_file():
        raise missing(path)
    try:
        return load_file(path, device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from None


def require_device(device: str, *, call: str) -> None:
    """Refuse a device that torch does not know or the machine does not have.

    Raises:
        ModelError: Saying which devices there are.
    """
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    available += ["mps"] if torch.backends.mps.is_available() else []
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in available:
        raise ModelError(
            call,
            expected=f"a device of this machine ({', '.join(available)})",
            received=repr(device),
            fix="Set device (memgen-lens run ...: --train.device) to one of these.",
        )


def _hooked_transformer(cfg: HookedTransformerConfig, tokenizer: Any) -> HookedTransformer:
    with quiet_imports():
        # A copy, as TransformerLens gives the tokenizer a begin-of-text token and later refuses one that has it.
        model = HookedTransformer(cfg, tokenizer=deepcopy(tokenizer), default_padding_side="right")
    assert isinstance(model, LensModel)
    return model


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Let TransformerLens seed all generators there are, and give the caller's states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _is_plain(value: Any) -> bool:
    """Whether a field of TransformerLens' config is data (its functions and types are made anew on loading)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
