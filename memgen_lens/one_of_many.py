"""What a worker does with one run of many: claim it, run it with its share of the threads, note how it went.

Does not know who else runs what: what is noted beside the runs is all that workers and `memgen_lens.many` share, so
that it is still there when either dies.
"""

import os
import platform
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from memgen_lens.core.errors import MemgenError
from memgen_lens.core.files import write_json
from memgen_lens.core.run_records import STATUS, is_finished, status_of
from memgen_lens.presets import ExperimentConfig

CLAIM_S = 600.0
"""Seconds that a worker waits for another one that holds the run: one that is about to die, or to finish it."""


def run_one(name: str, config: ExperimentConfig, root: str, threads: int) -> str:
    """Run an experiment into ``root/name``, or go on with it from its newest checkpoint.

    An error is noted with the run, not raised: what comes out of here as an exception is the pool's own trouble. A
    finished run is left alone, whoever finished it.

    Args:
        name: The run's folder.
        config: Its settings, seeded.
        root: The folder of all runs, which every worker sees under this path.
        threads: Threads that the run computes with: training depends on their number.

    Returns:
        The name.
    """
    directory = Path(root)
    with suppress(Timeout), _claimed(directory / STATUS / f"{name}.lock"):
        if is_finished(directory / name):
            return name
        noted = status_of(directory, name)
        note(directory, name, config, noted, status="running", attempts=noted.get("attempts", 0) + 1, threads=threads)
        how: dict[str, Any] = {"status": "done"}
        from memgen_lens.experiment import run_experiment  # torch is loaded once a worker, on nobody's account

        started = time.perf_counter()
        try:
            with computing_with(threads):
                run_experiment(config, out=directory / name, resume=True, progress=False)
        except Exception as error:
            how = {"status": "failed", "error": _told(error)}
            if not isinstance(error, MemgenError):
                how["traceback"] = traceback.format_exc()
        note(directory, name, config, status_of(directory, name), seconds=time.perf_counter() - started, **how)
    return name


def note(root: Path, name: str, config: ExperimentConfig, noted: dict[str, Any] | None = None, **facts: Any) -> None:
    """Write down how far a run is: ``status`` is ``"waiting"``, ``"running"``, ``"done"`` or ``"failed"``."""
    kept = {key: value for key, value in (noted or {}).items() if key not in ("error", "traceback", "seconds")}
    place = {"host": platform.node(), "pid": os.getpid(), "at": time.time()}
    write_json(
        root / STATUS / f"{name}.json", kept | place | facts | {"settings": config.model_dump(mode="json"), "run": name}
    )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold a run for this process alone; a killed process holds nothing.

    Raises:
        Timeout: Another process has it for longer than one waits.
    """
    lock = FileLock(path, timeout=CLAIM_S)
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # filelock looks whether the file that it has locked is still there
                path.unlink()


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """Let torch, BLAS and OpenMP use that many threads, and as many as before afterwards."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(limits=threads):
            yield
    finally:
        torch.set_num_threads(before)
