"""Runs side by side as one self-contained HTML page.

Does not compare: see `memgen_lens.compare`.
"""

from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.comparison_records import Comparison, Measured, OverSeeds
from memgen_lens.core.files import to_json, write_text
from memgen_lens.core.ownership import require_ours
from memgen_lens.viz import figures
from memgen_lens.viz.rendering import figure_html, template
from memgen_lens.viz.theme import UNKNOWN

MAX_GROUPS = 60
"""Groups of which every run is drawn and listed; of more, tables show the means alone."""


@arguments(comparison=kinds.one(Comparison), directory=kinds.place("write_compare_page"))
def write_compare_page(comparison: Comparison, directory: str | Path) -> Path:
    """Write ``compare.html`` into a directory, whole or not at all; it opens offline.

    Args:
        comparison: What `memgen_lens.compare` gave.
        directory: Where to; made if it is not there.

    Returns:
        The path of the page.

    Raises:
        RunDirectoryError: The page cannot be written, or a ``compare.html`` is there that is not ours.
    """
    path = Path(directory) / "compare.html"
    require_ours([path], call=f"write_compare_page({str(directory)!r})")
    names = comparison.figures
    few = len(comparison.groups) <= MAX_GROUPS
    effects = {
        f"effect-{place}": (setting, figures.setting_effect(comparison, setting))
        for place, setting in enumerate(comparison.settings)
    }
    beside = {}
    for place, name in enumerate(names if few else ()):
        if any(group.over_seeds[name].n for group in comparison.groups):
            beside[f"runs-{place}"] = figures.runs_side_by_side(comparison, name)
    write_text(
        path,
        template("compare.html.j2").render(
            n_runs=comparison.n_runs,
            seeds=sorted({run.seed for group in comparison.groups for run in group.runs[names[0]]}) if names else [],
            settings={name: ", ".join(map(_words, values)) for name, values in comparison.settings.items()},
            names=names,
            groups=[(group.label, [_cell(group.over_seeds[name]) for name in names]) for group in comparison.groups],
            differences=_differences(comparison),
            reference=comparison.groups[0].label,
            effects=[
                (setting, figure_html(name, drawn), _effects(comparison, setting))
                for name, (setting, drawn) in effects.items()
            ],
            beside=[figure_html(name, drawn) for name, drawn in beside.items()],
            runs=_runs(comparison) if few else [],
            left_out=comparison.left_out,
            plotlyjs=get_plotlyjs(),
        ),
    )
    return path


def markdown(comparison: Comparison) -> str:
    """The table of groups as markdown: a row a group, mean [interval over seeds] of each figure."""
    lines = [f"| runs | seeds | {' | '.join(comparison.figures)} |", "|" + "---|" * (len(comparison.figures) + 2)]
    for group in comparison.groups:
        cells = [_cell(group.over_seeds[name]) for name in comparison.figures]
        n_seeds = max((len(runs) for runs in group.runs.values()), default=0)
        lines.append(f"| {group.label} | {n_seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """A row a group, its differences from the reference in the order of the figures."""
    rows: dict[str, dict[str, str]] = {}
    for one in comparison.differences:
        rows.setdefault(one.group, {})[one.figure] = _cell(one.over_seeds, signed=True)
    return [(group, [cells.get(name, "") for name in comparison.figures]) for group, cells in rows.items()]


def _effects(comparison: Comparison, setting: str) -> list[tuple[str, list[str]]]:
    """A row a value of the setting, its effect on each figure."""
    rows: dict[str, dict[str, str]] = {}
    for one in comparison.effects:
        if one.setting == setting:
            label = f"{_words(one.value)} instead of {_words(one.reference)}"
            cell = f"{_cell(one.over_seeds, signed=True)}, {one.n_pairs} pair{'s' * (one.n_pairs != 1)}"
            rows.setdefault(label, {})[one.figure] = cell
    return [(label, [cells.get(name, "") for name in comparison.figures]) for label, cells in rows.items()]


def _runs(comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """A row a run, with the interval over items that it gives of itself."""
    rows: dict[tuple[str, str], list[str]] = {}
    for group in comparison.groups:
        for name in comparison.figures:
            for place, run in enumerate(group.runs[name]):
                rows.setdefault((group.label, f"{place}:{run.run}"), []).append(_of_run(run))
    return [(group, key.split(":", 1)[1], cells) for (group, key), cells in rows.items()]


def _of_run(run: Measured) -> str:
    if run.value is None:
        return UNKNOWN
    ends = "" if run.ci95 is None else f" [{run.ci95[0]:.3f}, {run.ci95[1]:.3f}]"
    items = f" of {run.n_items} items" if run.n_items not in (None, run.n) else ""
    return f"{run.value:.3f}{ends}" + ("" if run.n is None else f" (n = {run.n}{items})")


def _cell(found: OverSeeds, *, signed: bool = False) -> str:
    if found.mean is None:
        return f"{UNKNOWN} (none of {found.n_without})" if found.n_without else UNKNOWN
    spec = "+.3f" if signed else ".3f"
    mean = format(found.mean, spec)
    ends = "" if found.ci95 is None else f" [{found.ci95[0]:{spec}}, {found.ci95[1]:{spec}}]"
    without = f" ({found.n} of {found.n + found.n_without})" if found.n_without else ""
    return f"{mean}{ends}{without}".replace("-", "\N{MINUS SIGN}")


def _words(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)
