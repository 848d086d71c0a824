"""A run directory before it is written: whose files they are, and whether they may be.

Does not know what is in the files.
"""

import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.files import cannot_write, user_path
from memgen_lens.core.ownership import holds_ours, is_ours, remove_ours, require_ours, sweep

LOCK = ".memgen_lens.lock"
"""Held while a run writes into a directory; removed when it ends, and of no weight where a killed one has left it."""
TRAINED_FILES = (
    "history.jsonl",
    "checkpoints/settings.json",
    "checkpoints/held_out.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/README.md",
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/special_tokens_map.json",
    "model/chat_template.jinja",
)
"""What training writes, checkpoints aside."""

OWN_FILES = (
    "config.json",
    "outcomes.jsonl",
    "pairs.jsonl",
    "probes.json",
    "steering.json",
    "steering_cost.json",
    "tuned.json",
    "guard.json",
    "mode_and_content.json",
    "consistency.json",
    "dynamics.json",
    "neurons.json",
    "metrics.json",
    "report.html",
    "history.jsonl",
)
OWN_FOLDERS = ("checkpoints", "adapter", "model", "scores", "activations")


@contextmanager
def prepared(out: Any, *, sites: Iterable[str], resume: bool, force: bool) -> Iterator[Path]:
    """A directory that a whole run may be written into, held for this process alone inside the ``with`` block.

    Everything is checked before anything is removed.

    Raises:
        RunDirectoryError: It holds a run (and neither ``resume`` nor ``force``), or somebody else's file where one of
            the run's would be; another process is writing into it; or it cannot be written.
        SettingsError: Both ``resume`` and ``force``.
    """
    if resume and force:
        raise SettingsError(
            "run_experiment",
            expected="resume or force",
            received="both",
            fix="resume goes on, force begins anew.",
        )
    directory = user_path(out, call="run_experiment(out=...)")
    call = f"run_experiment(out={str(directory)!r})"
    with alone_in(directory, call=call):
        names = [*OWN_FILES, *TRAINED_FILES, *(f"scores/{site}.safetensors" for site in sites)]
        try:
            require_ours([directory / name for name in names], call=call)
            held = [name for name in OWN_FILES if is_ours(directory / name)]
            held += [name for name in OWN_FOLDERS if holds_ours(directory / name)]
            if held and not (resume or force):
                raise RunDirectoryError(
                    call,
                    expected="a directory without a run",
                    received=f"one that holds {', '.join(held[:3])}",
                    fix="Choose another with --out, or go on with --resume, or begin anew with --force "
                    "(in Python: out=, resume=True, force=True).",
                )
            if force:
                remove_ours(directory, [*OWN_FILES, *OWN_FOLDERS])
        except OSError as error:
            raise cannot_write(directory, error) from None
        yield directory


@contextmanager
def alone_in(directory: Path, *, call: str) -> Iterator[None]:
    """Make a directory and hold it for this process; a killed process holds nothing.

    What holds it may hold it again inside: `run_experiment` trains in its own directory.

    Raises:
        RunDirectoryError: Another process (or thread) holds it, or it cannot be made or written.
    """
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(
            call,
            expected="a directory, or a name that is free",
            received="a file",
            fix="Choose another directory with --out (memgen-lens) or out=.",
        )
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise RunDirectoryError(
            call,
            expected="a directory that no other run is writing into",
            received="one that another process is writing into now",
            fix="Wait until it has ended, or choose another directory with --out (memgen-lens) or out=.",
        ) from None
    except OSError as error:
        raise cannot_write(directory, error) from None
    try:
        sweep(directory)
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # filelock looks whether the file that it has locked is still there
                (directory / LOCK).unlink()
        lock.release()
        if made:
            with suppress(OSError):  # refused before anything was written: as if never made
                directory.rmdir()


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
