"""Checkpoints: weights, optimizer and random state, whole or not at all.

A checkpoint is a folder ``step-000500`` with ``weights.safetensors``, ``optimizer.safetensors`` and ``state.json``;
it is written under a temporary name and then renamed. Does not know what training does with it.
"""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch

from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import cannot_write, read_json, write_json
from memgen_lens.core.ownership import all_ours, remove_ours
from memgen_lens.models.tensors import load_tensors, save_tensors


def save_checkpoint(
    directory: Path,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of one step into ``directory`` and return its folder.

    Args:
        directory: The run's ``checkpoints`` folder.
        step: Optimizer steps done.
        weights: What is trained, by name.
        optimizer: Its per-parameter tensors are kept, in the order of the parameters.
        state: Plain values to keep beside them.

    Raises:
        RunDirectoryError: The folder cannot be written.
    """
    final = directory / f"step-{step:06d}"
    temporary = directory / f".{final.name}.part"
    try:
        _make_room(temporary)
        temporary.mkdir(parents=True)
        save_tensors(dict(weights), temporary / "weights.safetensors")
        tensors = {
            f"{index}.{name}": value
            for index, slots in optimizer.state_dict()["state"].items()
            for name, value in slots.items()
        }
        save_tensors(tensors | _random_state(), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", state | {"step": step})
        _make_room(final)
        temporary.rename(final)
    except OSError as error:
        raise cannot_write(final, error) from None
    return final


def load_newest(
    directory: Path,
    set_weights: Callable[[Mapping[str, torch.Tensor]], None],
    optimizer: torch.optim.Optimizer,
    *,
    device: str,
) -> dict[str, Any] | None:
    """Restore weights, optimizer and random state from the newest whole checkpoint.

    A damaged checkpoint is passed over with a warning.

    Args:
        directory: The run's ``checkpoints`` folder.
        set_weights: Takes what `save_checkpoint` was given as weights.
        optimizer: Its state is set.
        device: Where the weights are put.

    Returns:
        What was kept as ``state``, with its ``step``; None if there is no whole checkpoint.

    Raises:
        RunDirectoryError: The other version of TransformerLens has written it.
    """
    for folder in reversed(list_checkpoints(directory)):
        try:
            state = read_json(folder / "state.json")
            weights = load_tensors(folder / "weights.safetensors", device=device)
            tensors = load_tensors(folder / "optimizer.safetensors")
        except RunDirectoryError as error:
            warnings.warn(f"passing over a damaged checkpoint: {error}", stacklevel=2)
            continue
        _require_shapes(tensors, optimizer, folder)
        set_weights(weights)
        _set_random_state(tensors)
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            index, slot = name.split(".", 1)
            slots.setdefault(int(index), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
        return state
    return None


def _require_shapes(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Refuse an optimizer's state of parameters in other shapes: the two versions of TransformerLens differ in them."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {str(index): parameter.shape for index, parameter in enumerate(parameters)}
    for name, value in tensors.items():
        index = name.partition(".")[0]
        if index.isdigit() and value.ndim and value.shape != shapes.get(index):
            raise RunDirectoryError(
                f"resuming from {folder}",
                expected="a checkpoint that the installed version of TransformerLens has written (3 or 4)",
                received=f"an optimizer's state of a parameter of shape {tuple(value.shape)}, which this model has not",
                fix="Resume with the version that the run was begun with; its models load with either.",
            )


def list_checkpoints(directory: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first; half-written ones have another name and are not listed."""
    if not directory.is_dir():
        return []
    folders = [path for path in directory.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def _make_room(folder: Path) -> None:
    """Remove a checkpoint of ours; one that is damaged, or holds somebody else's file, gets another name instead."""
    if folder.is_dir() and all_ours(folder):
        remove_ours(folder.parent, [folder.name])
    if os.path.lexists(folder):
        names = (folder.with_name(f"{folder.name}.kept-{number}") for number in count(1))
        folder.rename(next(name for name in names if not os.path.lexists(name)))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({"random.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_state(tensors: dict[str, torch.Tensor]) -> None:
    """Take the random state out of ``tensors`` and set it."""
    torch.set_rng_state(tensors.pop("random.cpu"))
    cuda = tensors.pop("random.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
