"""Figures of many runs: each beside the others, and what a setting changes.

Public through `memgen_lens.viz.figures`. Does not compare (see `memgen_lens.compare`).
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.comparison_records import Comparison, Group, Measured, OverSeeds
from memgen_lens.core.errors import SettingsError, suggest
from memgen_lens.core.files import to_json
from memgen_lens.viz.theme import INK, SITE_COLORS, at_least_one, drawn, faded, themed

MAX_LINES = 12
"""Combinations of the other settings that are drawn: those that have most values of the setting."""


@arguments(comparison=kinds.one(Comparison), figure=kinds.Text | None)
def runs_side_by_side(comparison: Comparison, figure: str | None = None) -> go.Figure:
    """One figure of every run, a dot with its interval over items; a diamond is the mean with its interval over seeds.

    Args:
        comparison: What `memgen_lens.compare` gave.
        figure: Its name; default: the first that is compared.

    Raises:
        MemgenError: The figure is not among those compared, or no run has it.
    """
    name = _known(comparison, figure, "runs_side_by_side")
    runs = [(group, run) for group in comparison.groups for run in group.runs[name] if run.value is not None]
    at_least_one(runs, "runs_side_by_side", f"run with {name}")
    plot = go.Figure()
    plot.add_scatter(
        x=[run.value for _, run in runs],
        y=[escape(group.label) for group, _ in runs],
        mode="markers",
        name="a run, interval over items",
        marker={"color": SITE_COLORS[0], "size": 8, "opacity": 0.6},
        error_x=_bars([run for _, run in runs], "rgba(0,158,115,0.4)"),
        customdata=[[escape(run.run), run.n] for _, run in runs],
        hovertemplate="%{customdata[0]}: %{x:.3f} (n = %{customdata[1]})<extra></extra>",
    )
    means = [(group, group.over_seeds[name]) for group in comparison.groups if group.over_seeds[name].n]
    plot.add_scatter(
        x=[found.mean for _, found in means],
        y=[escape(group.label) for group, _ in means],
        mode="markers",
        name="mean, interval over seeds",
        marker={"color": INK, "size": 10, "symbol": "diamond"},
        error_x=_bars([found for _, found in means], INK),
        customdata=[found.n for _, found in means],
        hovertemplate="%{y}: mean %{x:.3f} of %{customdata} seeds<extra></extra>",
    )
    plot.update_xaxes(title_text=escape(name))
    plot.update_yaxes(autorange="reversed", type="category")
    return themed(plot, f"{escape(_last(name))} of {len(runs)} runs", height=170 + 30 * len(comparison.groups))


@arguments(comparison=kinds.one(Comparison), setting=kinds.Text | None, figures=kinds.several(kinds.Text) | None)
def setting_effect(
    comparison: Comparison, setting: str | None = None, figures: str | Sequence[str] | None = None
) -> go.Figure:
    """Figures against the values of one setting, a panel a figure, a line for each combination of the other settings.

    Bars are the intervals over seeds. Values that are numbers lie on a scale, others side by side.

    Args:
        comparison: What `memgen_lens.compare` gave.
        setting: Its dotted name; default: the first in which the runs differ.
        figures: Names of figures; default: all that are compared.

    Raises:
        MemgenError: No setting differs, or a name is not among those compared.
    """
    at_least_one(list(comparison.settings), "setting_effect", "setting in which runs differ")
    setting = next(iter(comparison.settings)) if setting is None else setting
    if setting not in comparison.settings:
        raise SettingsError(
            "setting_effect(setting=...)",
            expected="a setting in which the runs differ",
            received=repr(setting),
            fix=suggest(setting, comparison.settings),
        )
    names = [_known(comparison, name, "setting_effect") for name in (figures or comparison.figures)]
    values = comparison.settings[setting]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    n_columns = min(2, len(names))
    n_rows = -(-len(names) // n_columns)
    plot = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=[escape(name) for name in names],
        vertical_spacing=0.24 / n_rows,
        horizontal_spacing=0.1,
    )
    lines = _lines(comparison, setting)
    for place, name in enumerate(names):
        at = {"row": place // n_columns + 1, "col": place % n_columns + 1}
        for line, (label, groups) in enumerate(lines.items()):
            color = SITE_COLORS[line % len(SITE_COLORS)]
            found = [group.over_seeds[name] for group in groups]
            plot.add_scatter(
                x=[value if numbers else _words(value) for value in (group.settings[setting] for group in groups)],
                y=drawn([float("nan") if one.mean is None else one.mean for one in found]),
                mode="lines+markers",
                name=escape(label),
                legendgroup=label,
                showlegend=place == 0 and len(lines) > 1,
                line={"color": color, "width": 1.6, "dash": ("solid", "dash")[line // len(SITE_COLORS) % 2]},
                marker={"size": 6},
                error_y=_bars(found, faded(color, 0.6)),
                customdata=[one.n for one in found],
                hovertemplate=f"{escape(label)}<br>{escape(_last(setting))} %{{x}}: %{{y:.3f}} (%{{customdata}} seeds)"
                "<extra></extra>",
                **at,
            )
        plot.update_xaxes(
            title_text=escape(setting), type="linear" if numbers else "category", row=at["row"], col=at["col"]
        )
        if numbers and min(values) > 0 and max(values) / min(values) >= 8:
            plot.update_xaxes(type="log", tickvals=list(values), row=at["row"], col=at["col"])
    plot.update_annotations(font_size=13)
    return themed(plot, f"Effect of {escape(setting)}", height=140 + 290 * n_rows)


def _lines(comparison: Comparison, setting: str) -> dict[str, list[Group]]:
    """Groups that differ in this setting alone, by the settings that they share."""
    lines: dict[str, list[Group]] = {}
    for group in comparison.groups:
        rest = {name: value for name, value in group.settings.items() if name != setting}
        label = ", ".join(f"{_last(name)}={_words(value)}" for name, value in rest.items()) or "all runs"
        lines.setdefault(label, []).append(group)
    order = [to_json(value) for value in comparison.settings[setting]]
    lines = dict(sorted(lines.items(), key=lambda line: -len(line[1]))[:MAX_LINES])
    return {
        label: sorted(groups, key=lambda group: order.index(to_json(group.settings[setting])))
        for label, groups in lines.items()
    }


def _bars(found: Sequence[OverSeeds | Measured], color: str) -> dict[str, Any]:
    """Bars of intervals around their values; none where there is no interval."""
    ends = []
    for one in found:
        value = one.mean if isinstance(one, OverSeeds) else one.value
        if value is None or one.ci95 is None:
            ends.append((0.0, 0.0))
        else:  # an interval cut to what a figure can be may end at its value; a bar has no negative length
            ends.append((max(0.0, value - one.ci95[0]), max(0.0, one.ci95[1] - value)))
    return {
        "type": "data",
        "symmetric": False,
        "array": [high for _, high in ends],
        "arrayminus": [low for low, _ in ends],
        "thickness": 1.4,
        "width": 3,
        "color": color,
    }


def _known(comparison: Comparison, name: str | None, call: str) -> str:
    if name is None:
        at_least_one(comparison.figures, call, "figure")
        return comparison.figures[0]
    if name not in comparison.figures:
        raise SettingsError(
            f"{call}(figures=...)",
            expected="a figure that was compared",
            received=repr(name),
            fix=suggest(name, comparison.figures),
        )
    return name


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1].replace("_", " ")


def _words(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)
