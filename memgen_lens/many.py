"""Many runs as easily as one: through joblib, on this machine or a cluster, begun again where they were cut.

Does not know what a run is (see `memgen_lens.experiment`) nor who schedules it (see `memgen_lens.backends`).
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from joblib import delayed

from memgen_lens.backends import Backend, Engine, opened
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.ownership import is_ours, require_ours
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.run_directory import alone_in
from memgen_lens.core.run_records import FILE, Runs, is_finished, run_row, settings_of, settings_row, status_of
from memgen_lens.grids import named
from memgen_lens.one_of_many import note, run_one
from memgen_lens.presets import ExperimentConfig
from memgen_lens.processes import require_alone

Configs = dict[str, ExperimentConfig]


@arguments(
    configs=kinds.one(ExperimentConfig)
    | dict[kinds.Text, kinds.one(ExperimentConfig)]
    | kinds.several(kinds.one(ExperimentConfig)),
    out=kinds.place("run_many(out=...)"),
    n_jobs=kinds.Count | None,
    threads=kinds.Count | None,
    backend=Backend | None,
    address=kinds.Text | None,
    retries=kinds.Number0,
    retry_failed=kinds.Flag,
    progress=kinds.Flag,
)
def run_many(
    configs: Mapping[str, ExperimentConfig] | Sequence[ExperimentConfig] | ExperimentConfig,
    *,
    out: str | Path,
    n_jobs: int | None = None,
    threads: int | None = None,
    backend: Backend | None = None,
    address: str | None = None,
    retries: int = 1,
    retry_failed: bool = False,
    progress: bool = True,
) -> Runs:
    """Run many experiments, each into a run directory of its own under ``out``, and write ``runs.parquet`` beside them.

    The same call again runs only what is missing: a run is done once all its files are there, one that was cut goes on
    from its newest checkpoint, one that failed is kept with its error. A run whose worker dies (killed, out of memory)
    is tried again, and so are those that joblib's pool takes down with it: after all others, one at a time, so that it
    is known whose fault it is. Ctrl-C keeps all that is done.

    Training depends on the number of threads, so give every machine the same ``threads`` to get the same figures.

    Args:
        configs: Experiments by name (`grid` makes them), or in a list, named by the settings in which they differ.
        out: The folder; a cluster's workers must see it under the same path.
        n_jobs: Runs at once; default: as many as there are cores for, or what ``joblib.parallel_config`` says.
        threads: Threads of each run; default: the cores shared out over ``n_jobs``, or 1.
        backend: ``"loky"`` (processes of this machine), ``"dask"`` or ``"ray"``; default: what
            ``joblib.parallel_config`` around the call says, else loky.
        address: Of a dask scheduler or ray cluster that is running; default: one on this machine, for this call.
        retries: How often a run whose worker died is tried again before it counts as failed.
        retry_failed: Run those again that failed before.
        progress: Show a bar, and a line for each run that ends.

    Returns:
        One row for each of ``configs``.

    Raises:
        RunDirectoryError: ``out`` holds a run of one of these names with other settings, cannot be written, or is
            another call's now.
        SettingsError: Two experiments are alike, ``n_jobs x threads`` exceeds the cores, or the call is in one of
            several processes of accelerate launch or torchrun.
    """
    require_alone(
        "run_many", why="It starts processes of its own: call it in one, or share the runs out by their seeds."
    )
    experiments = named([configs] if isinstance(configs, ExperimentConfig) else configs)
    directory = Path(out)
    call = f"run_many(out={str(directory)!r})"
    with alone_in(directory, call=call):
        require_ours([directory / FILE], call=call)
        experiments = _placed(directory, experiments, call)
        todo = _to_do(directory, experiments, retry_failed)
        n_there = len(experiments) - len(todo)
        with progress_bar(len(experiments), "runs", shown=progress, unit="run") as bar:

            def say(line: str) -> None:
                if progress:
                    bar.write(line, file=sys.stderr)

            def tell(name: str) -> None:
                bar.update()
                say(f"{name}: {_line(run_row(directory, name))}")

            if n_there:
                say(f"{n_there} of {len(experiments)} runs are there already")
            bar.update(n_there)

            try:
                if todo:
                    with opened(backend, address, n_jobs=n_jobs, threads=threads, n_runs=len(todo)) as engine:
                        _Pool(engine, directory, retries, tell).carry_out(todo)
            except KeyboardInterrupt:
                done = sum(is_finished(directory / name) for name in experiments)
                say(
                    f"interrupted: {done} of {len(experiments)} runs are done and kept; "
                    "the same call goes on with the others"
                )
                raise
            finally:
                runs = Runs(tuple(run_row(directory, name, _plain(config)) for name, config in experiments.items()))
                _everything(directory, runs).save(directory)
    return runs


def _everything(directory: Path, runs: Runs) -> Runs:
    """These runs and those of other calls in the same folder."""
    rows = {row["run"]: row for row in (*Runs.load(directory).table, *runs.table)}
    return Runs(tuple(rows.values()))


def _plain(config: ExperimentConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _placed(directory: Path, experiments: Configs, call: str) -> Configs:
    """Experiments by the folder that they are in, or will be.

    A run that is there keeps its folder, also where further settings that differ would now give it a longer name.

    Raises:
        RunDirectoryError: A folder of one of these names holds a run with other settings, or one that is not ours.
    """
    there: dict[str, dict[str, Any]] = {}
    if directory.is_dir():
        names = {path.stem for path in (directory / "status").glob("*.json")}
        names |= {path.parent.name for path in directory.glob("*/config.json") if is_ours(path)}
        for name in names:
            settings = settings_of(directory, name)
            if settings is not None and status_of(directory, name).get("status") != "waiting":
                there[name] = settings_row(settings)
    folders = {_key(settings): name for name, settings in there.items()}
    placed: Configs = {}
    for name, config in experiments.items():
        wanted = settings_row(_plain(config))
        folder = folders.get(_key(wanted), name)
        if folder in there and there[folder] != wanted:
            was = next(key for key in {**wanted, **there[folder]} if wanted.get(key) != there[folder].get(key))
            raise RunDirectoryError(
                call,
                expected=f"a folder whose run {folder} has these settings",
                received=f"one in which {was} was {there[folder].get(was)!r}, now {wanted.get(was)!r}",
                fix="Choose another folder with --out (memgen-lens) or out=, or go back to its settings.",
            )
        placed[folder] = config
    return placed


def _key(settings: dict[str, Any]) -> str:
    return repr(sorted(settings.items()))


def _to_do(directory: Path, experiments: Configs, retry_failed: bool) -> Configs:
    """Those that are not done, nor kept as failed; each is noted, so that a folder tells what is missing."""
    todo: Configs = {}
    for name, config in experiments.items():
        noted = status_of(directory, name)
        if is_finished(directory / name) or (noted.get("status") == "failed" and not retry_failed):
            continue
        todo[name] = config
        if noted.get("status") != "running":  # else cut: what is noted of it stands
            note(directory, name, config, noted, status="waiting")
    return todo


class _Pool:
    """Runs handed to joblib until each is done, has failed, or has killed its worker too often."""

    def __init__(self, engine: Engine, directory: Path, retries: int, tell: Callable[[str], None]) -> None:
        self.engine, self.directory, self.retries, self.tell = engine, directory, retries, tell
        self.deaths: Counter[str] = Counter()

    def carry_out(self, todo: Configs) -> None:
        waiting, in_vain = dict(todo), 0
        while waiting:
            n_before = len(waiting)
            trusted = [name for name in waiting if not self.deaths[name]]
            batch = trusted or list(waiting)[:1]
            try:
                self._together({name: waiting[name] for name in batch}, waiting)
            except Exception as error:
                # `run_one` raises nothing: a worker died, or the pool itself is not to be had.
                blamed = self._cut(batch, waiting)
                if not blamed and len(waiting) == n_before:  # e.g. a worker died before it had begun
                    in_vain += 1
                    if in_vain > self.retries:
                        raise
                for name in blamed:
                    self.deaths[name] += 1
                    if self.deaths[name] > self.retries:
                        self._give_up(name, waiting.pop(name), error)

    def _together(self, batch: Configs, waiting: Configs) -> None:
        for name in batch:  # what an earlier pool has left behind is nobody's in this one
            noted = status_of(self.directory, name)
            if noted.get("status") == "running":
                note(self.directory, name, batch[name], noted, status="waiting")
        parallel = self.engine.parallel(len(batch))
        tasks = (
            delayed(run_one)(name, config, str(self.directory), self.engine.threads) for name, config in batch.items()
        )
        if not self.engine.streams:
            parallel.print_progress = lambda: self._tell_ended(batch, waiting)  # joblib calls it as each task ends
            parallel(tasks)
            self._tell_ended(batch, waiting)
        else:
            with closing(parallel(tasks)) as names:  # pyright: ignore[reportArgumentType]
                for name in names:
                    waiting.pop(name, None)
                    self.tell(name)
        for name in batch:  # held by a process of another call: theirs to finish
            waiting.pop(name, None)

    def _tell_ended(self, batch: Sequence[str] | Configs, waiting: Configs) -> None:
        """Tell of those that have ended, where results come all at once or not at all."""
        for name in [name for name in batch if name in waiting and self._has_ended(name)]:
            if waiting.pop(name, None) is not None:
                self.tell(name)

    def _has_ended(self, name: str) -> bool:
        return is_finished(self.directory / name) or status_of(self.directory, name).get("status") == "failed"

    def _cut(self, batch: Sequence[str], waiting: Configs) -> list[str]:
        """Those that were running when the pool broke."""
        self._tell_ended(batch, waiting)
        return [
            name for name in batch if name in waiting and status_of(self.directory, name).get("status") == "running"
        ]

    def _give_up(self, name: str, config: ExperimentConfig, error: Exception) -> None:
        noted = status_of(self.directory, name)
        told = f"its worker died {self.deaths[name]} times (killed, or out of memory): {type(error).__name__}"
        note(self.directory, name, config, noted, status="failed", error=told)
        self.tell(name)


def _line(row: dict[str, Any]) -> str:
    """How a run ended, in a few words."""
    if row["status"] != "done":
        return f"{row['status']}: {row['error']}" if row["error"] else "still held by another process"
    shown = {
        "computes": "behavior.heldout_generalization",
        "recalls": "behavior.trained_memorization",
        "flips": "behavior.flip_rate",
        "AUROC": "probe.best_auroc",
        "steers": "steering.to_generalization.shift_rate",
    }
    figures = [f"{word} {row[name]:.3f}" for word, name in shown.items() if row.get(name) is not None]
    took = "" if row["seconds"] is None else f" in {row['seconds']:.0f} s"  # unknown where its worker died just then
    return f"done{took} ({', '.join(figures)})"
