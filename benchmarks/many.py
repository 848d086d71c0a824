"""24 small runs by joblib's loky, a local dask cluster and a local ray: the same table, and what the engine costs.

Each backend has two workers, and each run one thread. What is left out of "the same" is time alone.
"""

import statistics
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import memgen_lens as mg
from memgen_lens.core.files import read_json
from memgen_lens.core.run_records import STATUS

BASE = mg.ExperimentConfig(
    preset="benchmark",
    task=mg.tasks.Ciphertext(
        cipher="shift", alphabet_size=5, word_length=3, n_memorized=60, n_heldout=40, n_validation=20
    ),
    train=mg.TrainConfig(
        model=mg.ModelConfig(n_layers=1, d_model=64, n_heads=2, d_mlp=256, act_fn="relu"),
        batch_size=64,
        learning_rate=5e-3,
        warmup_steps=20,
    ),
    analysis=mg.AnalysisConfig(top_fractions=(0.1, 0.3), alphas=(1.0, 2.0, 4.0)),
)
SETTINGS = {"train.max_steps": [60, 120, 180, 240, 300, 500]}
NEEDS = {"loky": "joblib", "dask": "distributed", "ray": "ray"}
TIMES = ("directory", "seconds", "attempts")
"""Columns of `Runs` that may differ, beside ``timing_s``."""
HEADINGS = (
    "backend",
    "runs",
    "begun",
    "seconds a run",
    "all",
    "loading the workers",
    "between runs",
    "idle at the end",
    "engine / runs",
    "with loading",
    "same table",
)
MARK = 0.05
"""The engine's own time at most, loading left out, as a share of that of the runs."""


def measure(*, seeds: int = 4, n_jobs: int = 2) -> dict[str, Any]:
    """Run all on every backend that is installed, and compare the tables."""
    configs = mg.grid(BASE, seeds=range(seeds), settings=SETTINGS)
    rows, tables = [], {}
    for backend, package in NEEDS.items():
        if find_spec(package) is None:
            rows.append({"backend": backend, "why": f'not installed: pip install "memgen-lens[{backend}]"'})
            continue
        with TemporaryDirectory() as directory:
            out = Path(directory) / "runs"
            started = time.time()
            runs = mg.run_many(configs, out=out, backend=backend, n_jobs=n_jobs, threads=1, progress=False)
            ended = time.time()
            tables[backend] = _figures(runs)
            rows.append(
                {"backend": backend, "runs": runs.summary(), "begun": sum(runs.column("attempts"))}
                | _time(out, runs, started, ended, n_jobs)
            )
            print(rows[-1], flush=True)
    first = next(iter(tables.values()))
    n_figures = sum(len(row) for row in first.values())
    same = {name: table == first for name, table in tables.items()}
    analysed = sum("steering.to_generalization.shift_rate" in row for row in first.values())
    return {"rows": rows, "same_as_loky": same, "n_runs": len(first), "n_values": n_figures, "n_analysed": analysed}


def table(found: dict[str, Any]) -> str:
    """What was measured as a Markdown table."""
    lines = [
        f"| {' | '.join(HEADINGS)} |",
        "|" + "---|" * len(HEADINGS),
    ]
    for row in found["rows"]:
        if "why" in row:
            lines.append(f"| {row['backend']} | {row['why']} |" + " |" * (len(HEADINGS) - 2))
            continue
        cells = [row["backend"], row["runs"], row["begun"], f"{row['median']:.1f} [{row['min']:.1f}, {row['max']:.1f}]"]
        cells += [f"{row[name]:.1f} s" for name in ("wall", "loading", "between", "idle")]
        cells += [
            f"{row['overhead']:.1%}",
            f"{row['overhead_with_loading']:.1%}",
            "yes" if found["same_as_loky"][row["backend"]] else "NO",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    loky = next(row for row in found["rows"] if row["backend"] == "loky")
    share, loading = loky["overhead"], loky["overhead_with_loading"]
    values = f"{found['n_values']} values of {found['n_runs']} runs ({found['n_analysed']} of them with an analysis)"
    mark = (
        f"loky's engine at most {MARK:.0%} of the runs' own time: {share:.1%}"
        f" ({loading:.1%} with loading torch and TransformerLens once a worker)"
    )
    return "\n".join([*lines, "", f"{values}; {mark}{'' if share <= MARK else ', MISSED'}"])


def _time(out: Path, runs: mg.Runs, started: float, ended: float, n_jobs: int) -> dict[str, Any]:
    """Where the workers' time went: loading what a run needs, the runs, between two runs, and idle at the end."""
    spans: dict[Any, list[tuple[float, float]]] = {}
    for path in (out / STATUS).glob("*.json"):
        noted = read_json(path)
        spans.setdefault((noted["host"], noted["pid"]), []).append((noted["at"] - noted["seconds"], noted["at"]))
    workers = [sorted(of_worker) for of_worker in spans.values()]
    seconds = runs.column("seconds")
    between = sum(later[0] - earlier[1] for spans in workers for earlier, later in pairwise(spans))
    loading = sum(spans[0][0] - started for spans in workers)
    last = max(spans[-1][1] for spans in workers)
    idle = sum(last - spans[-1][1] for spans in workers)
    return {
        "wall": ended - started,
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "loading": loading,
        "between": between,
        "idle": idle,
        "ending": ended - last,
        "overhead": (between + n_jobs * (ended - last)) / sum(seconds),
        "overhead_with_loading": (loading + between + n_jobs * (ended - last)) / sum(seconds),
    }


def _figures(runs: mg.Runs) -> dict[str, dict[str, Any]]:
    return {
        row["run"]: {
            name: value for name, value in row.items() if name not in TIMES and not name.startswith("timing_s")
        }
        for row in runs.table
    }
