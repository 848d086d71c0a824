"""Reading and writing JSON, JSON lines and safetensors: whole or not at all, never pickle.

Does not know what is in the files.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memgen_lens.core.errors import RunDirectoryError, shortened
from memgen_lens.core.ownership import replacing


def user_path(path: Any, *, call: str) -> Path:
    """A path that a user has given, with ``~`` expanded.

    Raises:
        RunDirectoryError: It is empty, names a home that is not there, or is no path.
    """
    fix = "Name a file or folder, e.g. 'runs/a'; '.' is the present one."
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise RunDirectoryError(call, expected="a path as text or Path", received=shortened(path), fix=fix)
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise RunDirectoryError(call, expected="a path", received=repr(text), fix=fix)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise RunDirectoryError(
            call, expected="a path below a home that is there", received=f"{text!r} ({error})", fix=fix
        ) from None


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of plain values, dataclasses and numpy arrays; NaN and infinity are refused (write null and why)."""
    return json.dumps(value, default=_plain, allow_nan=False, indent=indent, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"no JSON form for {type(value).__name__}")


def with_nulls(value: Any) -> Any:
    """Records and arrays as plain dicts and lists in which NaN is None: figures that could not be computed."""
    if isinstance(value, np.ndarray | np.generic):
        plain = np.asarray(value)
        if plain.dtype.kind != "f":
            return plain.tolist()
        holes = plain.astype(object)
        holes[np.isnan(plain)] = None
        return holes.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: with_nulls(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: with_nulls(entry) for name, entry in value.items()}
    return [with_nulls(entry) for entry in value] if isinstance(value, tuple | list) else value


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it into place.

    Raises:
        RunDirectoryError: The file cannot be written, or is not ours to overwrite.
    """
    # A path on a disk may hold bytes that are no text; JSON reads them back as they were.
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, to_json(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON line a row, whole or not at all."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays as safetensors, whole or not at all."""
    try:
        with replacing(path) as temporary:
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, temporary)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        RunDirectoryError: The file is missing or damaged.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise damaged(path, f"not JSON at line {error.lineno}") from None


def write_record(path: Path, record: Any) -> Path:
    """Write a record as JSON in which what could not be computed is null, and return the path."""
    write_json(path, with_nulls(record))
    return path


@contextmanager
def record_read(path: str | Path, name: str | None = None) -> Iterator[Any]:
    """What a record was written as: the file, or the directory that holds it under ``name``.

    Raises:
        RunDirectoryError: The file is missing; or what is made of its content inside the ``with`` block cannot be made.
    """
    path = Path(path)
    path = path / name if name is not None and path.is_dir() else path
    value = read_json(path)
    try:
        yield value
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RunDirectoryError):
            raise
        raise damaged(path, f"content that is not its own ({type(error).__name__}: {error})") from None


def read_jsonl(path: Path) -> list[Any]:
    """The rows of a JSON lines file.

    Raises:
        RunDirectoryError: The file is missing, or a line is damaged.
    """
    # Not splitlines(): a prompt may hold one of the other characters that it takes for a line break.
    *lines, rest = read_text(path).split("\n")
    if rest:
        raise damaged(path, "a last line that was cut")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise damaged(path, f"line {number} is not JSON") from None
    return rows


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The named arrays of a safetensors file.

    Raises:
        RunDirectoryError: The file is missing or damaged.
    """
    if not path.is_file():
        raise missing(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from None


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        RunDirectoryError: The file is missing or not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise missing(path) from None
    except UnicodeDecodeError:
        raise damaged(path, "not UTF-8 text") from None
    except OSError as error:
        raise RunDirectoryError(
            f"reading {path}",
            expected="a file that may be read",
            received=error.strerror or str(error),
            fix="Check its permissions.",
        ) from None


def missing(path: Path) -> RunDirectoryError:
    """The error for a file that should be there."""
    return RunDirectoryError(
        f"reading {path}",
        expected="a file of a complete run",
        received="no such file",
        fix="Check the directory's name, or make the run again with --force (memgen-lens) or force=True.",
    )


def damaged(path: Path, what: str) -> RunDirectoryError:
    """The error for a file that cannot be read as what it should be."""
    return RunDirectoryError(
        f"reading {path}",
        expected="a whole file of a memgen_lens run",
        received=what,
        fix="The file is damaged: restore it, or make the run again with --force (memgen-lens) or "
        "force=True once it is removed.",
    )


def cannot_write(path: Path, error: Exception) -> RunDirectoryError:
    """The error for a path that cannot be written."""
    return RunDirectoryError(
        f"writing {path}",
        expected="a place that can be written",
        received=getattr(error, "strerror", None) or str(error),
        fix="Choose another directory with --out (memgen-lens) or out=.",
    )


def counts_rows(path: Path, what: str) -> RunDirectoryError:
    """The error for a file whose statistics took rows for independent that are not: nothing in it can mend them."""
    return RunDirectoryError(
        f"reading {path}",
        expected=f"{what} that count items",
        received=f"{what} of an earlier version, which took all prompts of an item for independent",
        fix="Such figures look surer than they are: measure again, with --force (memgen-lens) or force=True.",
    )
