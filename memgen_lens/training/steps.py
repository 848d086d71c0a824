"""The model at each checkpoint of a run, trained from scratch or tuned.

Does not measure anything of it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memgen_lens.core.config import FinetuneConfig, ModelConfig
from memgen_lens.models.build import build_model
from memgen_lens.models.native import set_state, state_of
from memgen_lens.models.tensors import load_tensors
from memgen_lens.training.finetune import load_base, tuned


def models_at(
    folders: Iterable[Path | None], model: Any, task: Any, written: Mapping[str, Any], *, device: str
) -> Iterator[Any]:
    """The model at each checkpoint.

    Args:
        folders: Checkpoint folders; None for the model before the first step: as it was drawn, or the pretrained one.
        model: The last model; of a run from scratch it is set to each checkpoint in turn.
        task: The run's task.
        written: The run's settings, as ``checkpoints/settings.json`` holds them.
        device: Torch device.

    Raises:
        RunDirectoryError: At once: the pretrained model cannot be loaded, or has other weights now. Where a checkpoint
            is read: a file is missing or damaged.
    """
    if "base" not in written:
        return _trained_at(folders, model, task, written, device)
    config = FinetuneConfig.from_json(json.dumps(written["train"])).but(device=device)
    base = load_base(written["base"], device=device)
    return (base if folder is None else tuned(base, _weights(folder, device), config) for folder in folders)


def _trained_at(
    folders: Iterable[Path | None], model: Any, task: Any, written: Mapping[str, Any], device: str
) -> Iterator[Any]:
    shape, seed = ModelConfig.from_json(json.dumps(written["train"]["model"])), written["train"]["seed"]
    for folder in folders:
        if folder is None:
            first = build_model(shape, task.tokenizer, n_ctx=model.cfg.n_ctx, seed=seed, device=device)
            set_state(model, state_of(first))
        else:
            set_state(model, _weights(folder, device))
        yield model


def _weights(folder: Path, device: str) -> dict[str, Any]:
    return load_tensors(folder / "weights.safetensors", device=device)
