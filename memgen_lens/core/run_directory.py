"""A run directory before it is written: whose files they are, and whether they may be.

Does not know what is in the files.
"""

import platform
import shutil
from pathlib import Path

from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.files import cannot_write

OWN_FILES = (
    "config.json",
    "outcomes.jsonl",
    "pairs.jsonl",
    "probes.json",
    "steering.json",
    "consistency.json",
    "dynamics.json",
    "metrics.json",
    "report.html",
    "history.jsonl",
)
OWN_FOLDERS = ("checkpoints", "model", "scores", "activations")


def prepare(directory: Path, *, resume: bool, force: bool) -> None:
    """Refuse a directory that holds a run (unless told to go on or to begin anew) or cannot be written."""
    if resume and force:
        raise SettingsError(
            "run_experiment",
            expected="resume or force",
            received="both",
            fix="resume goes on, force begins anew.",
        )
    if directory.exists() and not directory.is_dir():
        raise RunDirectoryError(
            f"run_experiment(out={str(directory)!r})",
            expected="a directory, or a name that is free",
            received="a file",
            fix="Choose another directory with --out (memgen-lens) or out=.",
        )
    held = [name for name in (*OWN_FILES, *OWN_FOLDERS) if (directory / name).exists()]
    if held and not (resume or force):
        raise RunDirectoryError(
            f"run_experiment(out={str(directory)!r})",
            expected="a directory without a run",
            received=f"one that holds {', '.join(held[:3])}",
            fix="Choose another with --out, or go on with --resume, or begin anew with --force "
            "(in Python: out=, resume=True, force=True).",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
        if force:
            for name in held:
                path = directory / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise cannot_write(directory, error) from None


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
