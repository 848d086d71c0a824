"""The benchmark of methods as one self-contained HTML page.

Does not measure anything.
"""

from pathlib import Path

from plotly.offline import get_plotlyjs

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import write_text
from memgen_lens.core.method_records import MethodsBenchmark
from memgen_lens.core.ownership import require_ours
from memgen_lens.viz import figures
from memgen_lens.viz.rendering import figure_html, template

COLUMNS = {
    "average_precision": ("average precision", ".2f"),
    "precision": ("precision at k", ".2f"),
    "area": ("area", ".2f"),
    "removed_by_few": ("recall removed, 5 %", ".0%"),
    "kept_by_few": ("accuracy kept, 5 %", ".0%"),
    "steered": ("steered", ".0%"),
    "seconds": ("seconds", ".1f"),
    "memory_mb": ("MB", ".0f"),
}
"""Figures of `MethodsBenchmark.summary` with their headings and formats."""


@arguments(benchmark=kinds.one(MethodsBenchmark), directory=kinds.place("write_methods_page"))
def write_methods_page(benchmark: MethodsBenchmark, directory: str | Path) -> Path:
    """Write ``methods.html`` into a directory, whole or not at all; it opens offline.

    Args:
        benchmark: What `memgen_lens.benchmark_methods` gave.
        directory: Where to; made if it is not there.

    Returns:
        The path of the page.

    Raises:
        RunDirectoryError: The page cannot be written, or a ``methods.html`` is there that is not ours.
    """
    path = Path(directory) / "methods.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    require_ours([path], call=f"write_methods_page({str(directory)!r})")
    drawn = {"ablation": figures.method_ablation(benchmark), "agreement": figures.method_agreement(benchmark)}
    if any(model.n_planted for model in benchmark.models):
        drawn["recovery"] = figures.method_recovery(benchmark)
    write_text(
        path,
        template("methods.html.j2").render(
            models=benchmark.models,
            groups=_groups(benchmark),
            figures={name: figure_html(name, figure) for name, figure in drawn.items()},
            plotlyjs=get_plotlyjs(),
        ),
    )
    return path


def markdown(benchmark: MethodsBenchmark) -> str:
    """The tables of the page as markdown: one a kind of model and task, a row a method, mean [lowest, highest]."""
    parts = []
    for title, headings, rows in _groups(benchmark):
        lines = [f"| method | {' | '.join(headings)} |", "|" + "---|" * (len(headings) + 1)]
        lines += [f"| {method} | {' | '.join(cells)} |" for method, cells in rows]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _groups(benchmark: MethodsBenchmark) -> list[tuple[str, list[str], list[tuple[str, list[str]]]]]:
    """A table a kind of model and task: its title, its headings, and a row a method."""
    groups: dict[str, list[dict]] = {}
    for row in benchmark.summary():
        n = row["n_models"]
        groups.setdefault(f"{row['kind']} ({row['task']}, {n} model{'s' * (n > 1)})", []).append(row)
    tables = []
    for title, rows in groups.items():
        names = [name for name in COLUMNS if any(name in row for row in rows)]
        cells = [(row["method"], [_cell(row.get(name), COLUMNS[name][1]) for name in names]) for row in rows]
        tables.append((title, [COLUMNS[name][0] for name in names], cells))
    return tables


def _cell(figure: dict[str, float] | None, spec: str) -> str:
    if figure is None:
        return ""
    mean, low, high = (format(figure[name], spec) for name in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"
