"""The files of a training run: may it be begun or resumed here, with which settings, and its history.

Does not train.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memgen_lens.core.config import LearningConfig
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.files import cannot_write, damaged, read_json, read_text, user_path, write_json, write_jsonl
from memgen_lens.core.ownership import holds_ours, is_ours, remove_ours, require_ours
from memgen_lens.core.records import Evaluation
from memgen_lens.core.run_directory import TRAINED_FILES, alone_in
from memgen_lens.training.checkpoints import list_checkpoints

TRAINED = ("checkpoints", "adapter", "model", "history.jsonl")
"""What training begins anew."""


@contextmanager
def prepared(
    call: str,
    task: Any,
    config: LearningConfig,
    out: str | Path | None,
    *,
    resume: bool,
    force: bool,
    base: dict[str, Any] | None = None,
) -> Iterator[Path | None]:
    """The run's directory, held for this process alone, cleared if ``force``, with what is trained written down.

    Args:
        call: ``"train"`` or ``"finetune"``.
        task: What is learned.
        config: How.
        out: The directory; None for none.
        resume: Whether to go on with a run that is there.
        force: Whether to begin anew where one is.
        base: Name and hash of the pretrained model.
    """
    if out is None:
        if resume:
            raise SettingsError(
                call,
                expected="out= with resume=True",
                received="no directory",
                fix="Name the run's directory.",
            )
        yield None
        return
    directory = user_path(out, call=f"{call}(out=...)")
    wanted = {"task": task.settings(), "train": config.model_dump(mode="json")} | ({"base": base} if base else {})
    with alone_in(directory, call=f"{call}(out={str(directory)!r})"):
        _prepare(call, directory, wanted, type(config)().model_dump(mode="json"), resume=resume, force=force)
        yield directory


def _prepare(
    name: str, directory: Path, wanted: dict[str, Any], defaults: dict[str, Any], *, resume: bool, force: bool
) -> None:
    """Check everything, then clear, then write ``settings.json``."""
    call = f"{name}(out={str(directory)!r})"
    settings = directory / "checkpoints" / "settings.json"
    written = [directory / name for name in TRAINED_FILES]
    try:
        if not resume:
            require_ours(written, call=call)
        held = is_ours(directory / "history.jsonl") or any(
            holds_ours(folder) for folder in list_checkpoints(directory / "checkpoints")
        )
    except OSError as error:
        raise cannot_write(directory, error) from None
    if held:
        if resume:
            begun = read_json(settings)
            # A setting that the version of then did not have is what it is where nobody sets it.
            begun = begun | {"train": defaults | begun.get("train", {})}
            if "base" in wanted and wanted["base"]["sha256"] == begun.get("base", {}).get("sha256"):
                begun["base"] = wanted["base"]  # the same weights, whatever they are called by now
            if begun != wanted:
                raise RunDirectoryError(
                    f"{name}(out={str(directory)!r}, resume=True)",
                    expected="the settings that the run was begun with",
                    received=f"others: {_difference(begun, wanted)}",
                    fix="Use the same settings, or force=True (--force) to begin anew.",
                )
        elif not force:
            raise RunDirectoryError(
                call,
                expected="a directory without a run",
                received="one that holds a run already",
                fix="Choose another, or resume=True (--resume) to go on, or force=True (--force) to begin anew.",
            )
    try:
        if resume:
            read_history(directory)  # a damaged one is told as such
            require_ours(written, call=call)
        else:
            remove_ours(directory, TRAINED)
    except OSError as error:
        raise cannot_write(directory, error) from None
    write_json(settings, wanted)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [
        f"{part}.{name} was {old.get(part, {}).get(name)!r}, now {new[part].get(name)!r}"
        for part in new
        for name in new[part] | old.get(part, {})
        if old.get(part, {}).get(name) != new[part].get(name)
    ]
    return "; ".join(changed[:3])


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
    """Add one line to ``history.jsonl``, whole or not at all.

    Raises:
        RunDirectoryError: The file cannot be written, or somebody has changed it.
    """
    write_jsonl(directory / "history.jsonl", [*read_history(directory), row])
