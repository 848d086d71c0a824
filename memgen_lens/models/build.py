"""Build models of random weights: HookedTransformers, or native Bridges where there are none; refuse missing devices.

Does not know how they are trained. TransformerLens' deprecation warnings and log lines stop here: a user of
memgen_lens can do nothing about them.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch

from memgen_lens.core.config import ModelConfig
from memgen_lens.core.errors import ModelError
from memgen_lens.core.quiet import quiet_imports
from memgen_lens.core.types import LensModel
from memgen_lens.fast.support import HAS_HOOKED_TRANSFORMER
from memgen_lens.models.native import draw_weights, native_bridge

with quiet_imports():
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig


def build_model(config: ModelConfig, tokenizer: Any, *, n_ctx: int, seed: int, device: str = "cpu") -> Any:
    """A model of random weights over a tokenizer's vocabulary: TransformerLens 3's HookedTransformer or 4's Bridge.

    Args:
        config: Its shape.
        tokenizer: A Hugging Face tokenizer; the model keeps it.
        n_ctx: Longest sequence in tokens.
        seed: Seed of the weights; both versions draw the same ones.
        device: Torch device.

    Returns:
        The model, in training mode, with ``cfg.default_prepend_bos`` off: a prompt's tokens are the prompt.

    Raises:
        ModelError: The device is not there.
    """
    require_device(device, call="build_model")
    settings = {
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "n_ctx": n_ctx,
        "d_head": config.d_model // config.n_heads,
        "n_heads": config.n_heads,
        "d_mlp": config.d_mlp,
        "act_fn": config.act_fn,
        "d_vocab": len(tokenizer),
        "normalization_type": config.normalization_type,
        "positional_embedding_type": config.positional_embedding_type,
        "rotary_dim": config.d_model // config.n_heads if config.positional_embedding_type == "rotary" else None,
        "gated_mlp": config.gated_mlp,
        "default_prepend_bos": False,
        "seed": seed,
        "device": device,
    }
    with own_random_state():
        if HAS_HOOKED_TRANSFORMER:
            return hooked_transformer(HookedTransformerConfig(**settings), tokenizer)
        model = native_bridge(settings, tokenizer, device=device)
        draw_weights(model, seed=seed)
        return model


def model_like(config: Mapping[str, Any], tokenizer: Any, *, device: str) -> Any:
    """A model of the settings that `save_model` wrote, for weights to be loaded into."""
    with own_random_state():
        if HAS_HOOKED_TRANSFORMER:
            cfg = HookedTransformerConfig.from_dict(dict(config) | {"device": device, "init_weights": False})
            model = hooked_transformer(cfg, tokenizer)
            model.cfg.init_weights = config.get("init_weights", True)
            return model
        return native_bridge(config, tokenizer, device=device)


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


def hooked_transformer(cfg: Any, tokenizer: Any) -> Any:
    """TransformerLens' model of a configuration, with a copy of a tokenizer."""
    with quiet_imports():
        # A copy, as TransformerLens gives the tokenizer a begin-of-text token and later refuses one that has it.
        model = HookedTransformer(cfg, tokenizer=deepcopy(tokenizer), default_padding_side="right")
    assert isinstance(model, LensModel)
    return model


@contextmanager
def own_random_state() -> Iterator[None]:
    """Let TransformerLens seed all generators there are, and give the caller's states back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
