"""The files of a training run: may it be begun or resumed here, with which settings, and its history.

Does not train.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from memgen_lens.core.config import TrainConfig
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.files import cannot_write, damaged, read_json, read_text, to_json, write_json
from memgen_lens.core.records import Evaluation
from memgen_lens.training.checkpoints import list_checkpoints


def prepare(task: Any, config: TrainConfig, out: str | Path | None, *, resume: bool, force: bool) -> Path | None:
    """Check that ``out`` may be written to, clear it if ``force``, and write down what is trained."""
    if out is None:
        if resume:
            raise SettingsError(
                "train",
                expected="out= with resume=True",
                received="no directory",
                fix="Name the run's directory.",
            )
        return None
    directory = Path(out)
    wanted = {
        "task": task.settings(),
        "train": config.model_dump(mode="json"),
    }
    settings = directory / "checkpoints" / "settings.json"
    if (directory / "history.jsonl").exists() or list_checkpoints(directory / "checkpoints"):
        if resume:
            if read_json(settings) != wanted:
                raise RunDirectoryError(
                    f"train(out={str(directory)!r}, resume=True)",
                    expected="the settings that the run was begun with",
                    received=f"others: {_difference(read_json(settings), wanted)}",
                    fix="Use the same settings, or force=True (--force) to begin anew.",
                )
        elif not force:
            raise RunDirectoryError(
                f"train(out={str(directory)!r})",
                expected="a directory without a run",
                received="one that holds a run already",
                fix="Choose another, or resume=True (--resume) to go on, or force=True (--force) to begin anew.",
            )
    if not resume:
        _clear(directory)
    write_json(settings, wanted)
    return directory


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [
        f"{part}.{name} was {old.get(part, {}).get(name)!r}, now {new[part].get(name)!r}"
        for part in new
        for name in new[part] | old.get(part, {})
        if old.get(part, {}).get(name) != new[part].get(name)
    ]
    return "; ".join(changed[:3])


def _clear(directory: Path) -> None:
    """Remove a former training's files, and nothing else."""
    try:
        for name in ("checkpoints", "model"):
            if (directory / name).exists():
                shutil.rmtree(directory / name)
        (directory / "history.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(directory, error) from None


def read_history(directory: Path | None) -> list[Evaluation]:
    """The measurements that a run has written; none where it has no directory or has not begun."""
    if directory is None or not (directory / "history.jsonl").exists():
        return []
    # A killed run may leave a line half-written; the checkpoint it resumes from is older than that line.
    whole = [line for line in read_text(directory / "history.jsonl").split("\n")[:-1] if line]
    try:
        return [Evaluation(**json.loads(line)) for line in whole]
    except Exception as error:
        raise damaged(directory / "history.jsonl", f"a line that is no measurement ({error})"[:200]) from None


def append_history(directory: Path, row: Evaluation) -> None:
    """Add one line to ``history.jsonl``, on disk when this returns.

    Raises:
        RunDirectoryError: The file cannot be written.
    """
    try:
        with (directory / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(directory / "history.jsonl", error) from None
