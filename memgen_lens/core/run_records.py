"""Many runs as one table: a row a run, with its settings and every figure of its ``metrics.json`` by dotted names.

Reads folders of runs; does not run them (see `memgen_lens.many`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import RunDirectoryError, SettingsError, suggest
from memgen_lens.core.files import cannot_write, damaged, read_json, to_json
from memgen_lens.core.ownership import replacing

FILE = "runs.parquet"
STATUS = "status"
"""Folder beside the runs that holds one JSON file a run: how far it is."""
ABOUT = ("run", "directory", "status", "error", "seconds", "threads", "attempts")
"""Columns that are neither settings nor figures."""
FIGURES = ("behavior", "pairs", "attribution", "probe", "steering", "consistency", "timing_s")
"""Blocks of ``metrics.json`` that hold figures; what is in neither these nor `ABOUT` is a setting."""
UNLIKE = ("about", "measured")
"""Settings that say something of a run and change nothing in it."""


@dataclass(frozen=True)
class Runs:
    """Many runs, one row each.

    Attributes:
        table: By run, a dict of the columns `ABOUT` (``status``: ``"done"``, ``"failed"`` or ``"missing"``; ``error``;
            ``seconds`` of the run itself; ``threads`` that it computed with; ``attempts``: how often it was begun), of
            its settings (``"task.n_memorized"``; lists as JSON) and of its figures (``"behavior.flip_rate"``; entries
            of a list by their place: ``"probe.best_auroc_ci95.0"``). A column that a run lacks is not in its row.
    """

    table: tuple[dict[str, Any], ...]

    @property
    def directories(self) -> tuple[Path, ...]:
        """The run directories."""
        return tuple(Path(row["directory"]) for row in self.table)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that some run has: those of `ABOUT`, then settings, then figures."""
        names = dict.fromkeys(name for row in self.table for name in row)
        order = sorted(names, key=lambda name: 0 if name in ABOUT else 2 if is_figure(name) else 1)
        return (*(name for name in ABOUT if name in names), *(name for name in order if name not in ABOUT))

    @property
    def settings(self) -> tuple[str, ...]:
        """The columns that are settings."""
        return tuple(name for name in self.columns if name not in ABOUT and not is_figure(name))

    @property
    def figures(self) -> tuple[str, ...]:
        """The columns that are figures."""
        return tuple(filter(is_figure, self.columns))

    @arguments("Runs.with_status", status=kinds.Text)
    def with_status(self, status: str) -> "Runs":
        """Those runs alone that are ``"done"``, ``"failed"`` or ``"missing"``."""
        return Runs(tuple(row for row in self.table if row["status"] == status))

    @arguments("Runs.column", name=kinds.Text)
    def column(self, name: str) -> list[Any]:
        """A column's value for each run; None where a run lacks it.

        Raises:
            SettingsError: No run has such a column.
        """
        if name not in self.columns:
            raise SettingsError(
                "Runs.column", expected="a column of the table", received=repr(name), fix=suggest(name, self.columns)
            )
        return [row.get(name) for row in self.table]

    def summary(self) -> str:
        """How many runs are done, failed and missing, in one line."""
        counts = {status: len(self.with_status(status).table) for status in ("done", "failed", "missing")}
        return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "no runs"

    @arguments("Runs.save", directory=kinds.place("Runs.save"))
    def save(self, directory: str | Path) -> Path:
        """Write ``runs.parquet`` into a directory, whole or not at all; gives its path.

        Raises:
            RunDirectoryError: It cannot be written, or a ``runs.parquet`` is there that is not ours.
        """
        import pyarrow as pa
        from pyarrow import parquet

        path = Path(directory) / FILE
        arrays = {}
        for name in self.columns:
            values = [row.get(name) for row in self.table]
            try:
                arrays[name] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError):  # e.g. a number here and a text there
                arrays[name] = pa.array([None if value is None else to_json(value) for value in values])
        try:
            with replacing(path) as temporary:
                parquet.write_table(pa.table(arrays), temporary, compression="zstd")
        except OSError as error:
            raise cannot_write(path, error) from None
        return path

    @classmethod
    @arguments("Runs.load", source=kinds.several(kinds.place("Runs.load")))
    def load(cls, source: str | Path | Iterable[str | Path]) -> "Runs":
        """Read runs: folders of many runs, run directories, and ``runs.parquet`` files, in any number.

        A folder of many runs is read run by run, also while they go on; one that holds its table alone, from that.

        Raises:
            RunDirectoryError: There is no run, or a file is damaged.
        """
        paths: list[Path] = [Path(path) for path in source]  # pyright: ignore[reportGeneralTypeIssues]
        return cls(tuple(row for path in paths for row in _rows(path)))


def is_figure(name: str) -> bool:
    """Whether a column is a figure of ``metrics.json``."""
    return name.split(".", 1)[0] in FIGURES


def flattened(value: Any, prefix: str = "", *, lists: bool) -> dict[str, Any]:
    """Nested values by dotted names: ``{"a": {"b": [1, 2]}}`` is ``{"a.b.0": 1, "a.b.1": 2}``.

    Args:
        value: Plain values, as JSON has them.
        prefix: Name of the value itself.
        lists: Go into lists; else a list is one value, as JSON text.
    """
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        if not lists:
            return {prefix: to_json(value)}
        pairs = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, entry in pairs:
        flat |= flattened(entry, f"{prefix}.{name}" if prefix else str(name), lists=lists)
    return flat


def settings_row(settings: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment's settings by dotted names, without those that only say something of it."""
    return {name: value for name, value in flattened(settings, lists=False).items() if name not in UNLIKE}


def is_finished(directory: Path) -> bool:
    """Whether a run has written all its files; the report comes last."""
    return (directory / "metrics.json").is_file() and (directory / "report.html").is_file()


def status_of(root: Path, name: str) -> dict[str, Any]:
    """What is noted of a run; empty where nothing is."""
    path = root / STATUS / f"{name}.json"
    return read_json(path) if path.is_file() else {}


def settings_of(root: Path, name: str) -> dict[str, Any] | None:
    """The settings of a run that is there, as far as it may be; None where there is none."""
    noted = status_of(root, name).get("settings")
    config = root / name / "config.json"
    return noted if noted is not None else read_json(config)["settings"] if config.is_file() else None


def run_row(root: Path, name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The table's row of one run, from what is on the disk.

    Args:
        root: The folder that holds it.
        name: Its own folder's name.
        settings: Of a run of which nothing is on the disk.
    """
    directory, noted = root / name, status_of(root, name)
    done = is_finished(directory)
    metrics = read_json(directory / "metrics.json") if done else {}
    total = metrics.get("timing_s", {}).get("total")
    failed = noted.get("status") == "failed" and not done
    row: dict[str, Any] = {
        "run": name,
        "directory": str(directory),
        "status": "done" if done else "failed" if failed else "missing",
        "error": noted.get("error") if failed else None,
        "seconds": noted.get("seconds", total) if done or failed else None,
        "threads": noted.get("threads"),
        "attempts": noted.get("attempts"),
    }
    if done and row["threads"] is None:
        row["threads"] = read_json(directory / "config.json").get("machine", {}).get("threads")
    row |= settings_row(settings_of(root, name) or settings or {})
    for block in FIGURES:
        row |= flattened(metrics.get(block, {}), block, lists=True)
    return row


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.is_file():
        return _read_table(path)
    if (path / "metrics.json").is_file() or (path / "config.json").is_file():
        return [run_row(path.resolve().parent, path.resolve().name) | {"directory": str(path)}]
    if not path.is_dir():
        names = set()
    else:
        names = {file.stem for file in (path / STATUS).glob("*.json")}
        names |= {file.parent.name for file in path.glob("*/config.json") if (file.parent / "metrics.json").exists()}
    if names:
        return [run_row(path, name) for name in sorted(names, key=_natural)]
    if (path / FILE).is_file():
        return _read_table(path / FILE)
    raise RunDirectoryError(
        f"Runs.load({str(path)!r})",
        expected="a folder of run_many (memgen-lens sweep), a run directory or a runs.parquet",
        received="none of them",
        fix="Name the folder that was given as out= (--out).",
    )


def _read_table(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid) as error:
        raise damaged(path, f"no Parquet table ({error})") from None
    if any(not {"run", "status", "directory"} <= row.keys() for row in rows):
        raise damaged(path, "a table that is not of runs")
    return rows


def _natural(name: str) -> list[tuple[bool, Any]]:
    """A key by which ``seed=10`` comes behind ``seed=9``."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", name)]
