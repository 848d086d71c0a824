"""Arrays too large for memory: safetensors files that are filled block by block and read back lazily.

Does not know what is in the arrays.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from memgen_lens.core.files import cannot_write, damaged, missing
from memgen_lens.core.ownership import replacing


@contextmanager
def new_shard(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, np.memmap]]:
    """A new safetensors file of float32 arrays, to be filled inside the ``with`` block; whole or not at all.

    The library writes a file from arrays that are in memory; here only the blocks being filled are.

    Args:
        path: The file; it appears once the block has ended without an exception.
        shapes: Shape of each array.

    Yields:
        The arrays, mapped into memory.

    Raises:
        RunDirectoryError: The file cannot be written, or is not ours to overwrite.
    """
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.flush()
                _reserve(file.fileno(), 8 + len(text) + offset)
            start = 8 + len(text)
            arrays = {
                name: np.memmap(temporary, np.float32, "r+", start + header[name]["data_offsets"][0], shape)
                for name, shape in shapes.items()
            }
            yield arrays
            for array in arrays.values():
                array.flush()
    except OSError as error:
        raise cannot_write(path, error) from None


def map_shard(path: Path) -> dict[str, np.memmap]:
    """The arrays of a safetensors file, read from disk where and when they are used.

    Raises:
        RunDirectoryError: The file is missing or damaged.
    """
    if not path.is_file():
        raise missing(path)
    try:
        with safe_open(path, framework="numpy"):
            pass  # the library checks header and length
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from None
    header.pop("__metadata__", None)
    if any(entry["dtype"] != "F32" for entry in header.values()):
        raise damaged(path, "arrays that are not float32")
    return {
        name: np.memmap(path, np.float32, "r", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _reserve(file: int, size: int) -> None:
    """Take the space on the disk now: filling a mapped file on a full one would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)
