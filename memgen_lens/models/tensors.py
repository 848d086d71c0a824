"""Named tensors on disk: safetensors, whole or not at all.

Does not know what they are.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import damaged, missing
from memgen_lens.core.ownership import replacing


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write named tensors as safetensors, whole or not at all."""
    try:
        with replacing(path) as temporary:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
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
