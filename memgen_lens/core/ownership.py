"""Whose file is it: nothing is overwritten or removed that this package did not write.

Every writer goes through `replacing`, which notes each file in a ledger beside it (``.memgen_lens.jsonl``: one line a
file, with its name and fingerprint). A file is ours if its present content is one that the ledger of its folder names;
a file of ours that somebody has changed is theirs. A file that an earlier version wrote, which kept no ledger, is
known by its content (`memgen_lens.core.earlier`).

The ledger is only ever added to, and *before* the file appears under its name: a process that is killed between the
two leaves the old file or none, and the ledger names both contents.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from memgen_lens.core.earlier import looks_ours
from memgen_lens.core.errors import RunDirectoryError

LEDGER = ".memgen_lens.jsonl"
ENDS = 2**20
"""Bytes at each end of a file that its fingerprint covers: text is covered whole, gigabytes of activations quickly."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` once the block has ended without an exception.

    Args:
        path: The file; its folder is made.

    Yields:
        A path in the same folder, where no file is yet.

    Raises:
        RunDirectoryError: Somebody else's file is at ``path``.
        OSError: The place cannot be written.
    """
    require_ours([path], call=f"writing {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        # Named in the ledger without a fingerprint: what a killed process leaves of it can be swept away.
        _note(temporary, None)
        yield temporary
        require_ours([path], call=f"writing {path}")
        _note(path, fingerprint(temporary))
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_ours(path: Path) -> bool:
    """Whether this package wrote the file at ``path``, and nobody has changed it since."""
    if path.is_symlink() or not path.is_file():
        return False
    ledger = path.parent / LEDGER
    if not ledger.is_file():
        return looks_ours(path)
    known = read_ledger(path.parent).get(path.name, [])
    return None in known or (bool(known) and fingerprint(path) in known)


def require_ours(paths: Iterable[Path], *, call: str) -> None:
    """Refuse if any of the paths that are about to be written holds somebody else's file.

    Raises:
        RunDirectoryError: Naming the first such file, and the way out.
    """
    for path in paths:
        # A folder in a file's place cannot be overwritten: writing there fails by itself, and says so.
        if (path.is_symlink() or path.is_file()) and not is_ours(path):
            raise RunDirectoryError(
                call,
                expected="only files that memgen_lens wrote where it is about to write",
                received=f"{path}, which it did not write, or which was changed since",
                fix="Move or rename that file, or choose another directory with --out (memgen-lens) or out=.",
            )


def remove_ours(folder: Path, names: Iterable[str]) -> None:
    """Remove those entries of ``folder`` that this package wrote: files, and folders with all of ours below.

    Somebody else's file, folder or link stays where it is, and so does the folder that holds it.

    Raises:
        OSError: A file cannot be removed.
    """
    # Which are ours is settled before the first is gone: some are known by a neighbour.
    ours = {path for name in names for path in (folder / name, *(folder / name).rglob("*")) if is_ours(path)}
    for path in ours:
        path.unlink()
    for name in names:
        below = [path for path in (folder / name).rglob("*") if path.is_dir()]
        for emptied in [*sorted(below, reverse=True), folder / name]:
            if emptied.is_dir() and not emptied.is_symlink() and [p.name for p in emptied.iterdir()] in ([], [LEDGER]):
                (emptied / LEDGER).unlink(missing_ok=True)
                emptied.rmdir()


def holds_ours(folder: Path) -> bool:
    """Whether any file in ``folder`` and below is this package's."""
    return any(is_ours(path) for path in folder.rglob("*"))


def all_ours(folder: Path) -> bool:
    """Whether everything in ``folder`` and below is this package's."""
    paths = [path for path in folder.rglob("*") if path.name != LEDGER]
    return not folder.is_symlink() and all(is_ours(path) or (path.is_dir() and not path.is_symlink()) for path in paths)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in ``folder`` and below."""
    for ledger in [folder / LEDGER, *folder.glob(f"*/{LEDGER}"), *folder.glob(f"*/*/{LEDGER}")]:
        for name, known in read_ledger(ledger.parent).items():
            if None in known:
                with suppress(OSError):
                    (ledger.parent / name).unlink(missing_ok=True)


def fingerprint(path: Path) -> str:
    """A file's size and a hash of its first and last MiB."""
    size = path.stat().st_size
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(ENDS, size - ENDS))
        digest.update(file.read(ENDS))
    return f"{size}-{digest.hexdigest()}"


def read_ledger(folder: Path) -> dict[str, list[str | None]]:
    """By file name, the fingerprints of all that this package has written into a folder under it; None for any."""
    ledger = folder / LEDGER
    known: dict[str, list[str | None]] = {}
    if ledger.is_symlink() or not ledger.is_file():
        return known
    for line in ledger.read_text(encoding="utf-8", errors="replace").splitlines():
        # A line that was cut, or is not one of ours, vouches for nothing.
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            known.setdefault(str(entry["name"]), []).append(entry["fingerprint"])
    return known


def _note(path: Path, content: str | None) -> None:
    """Add a line to the ledger (begun if there is none) beside ``path``, on disk when this returns."""
    # One short write at the end of the file: processes that note at once do not mix their lines. The line begins with
    # a line break, so that one which was cut spoils no other.
    entries = {path.name: content}
    if not (path.parent / LEDGER).is_file():  # a folder of an earlier version: its files are noted with the first
        old = [other for other in path.parent.iterdir() if other != path and is_ours(other)]
        entries |= {other.name: fingerprint(other) for other in old}
    lines = "".join("\n" + json.dumps({"name": name, "fingerprint": known}) for name, known in entries.items())
    file = os.open(path.parent / LEDGER, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        os.write(file, lines.encode())
        os.fsync(file)
    finally:
        os.close(file)
