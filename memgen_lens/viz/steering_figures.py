"""Figures of steering: rates beside their controls, the sweep over settings, and the share of each layer.

Public through `memgen_lens.viz.figures`. Does not choose settings: analysis does, on ``tune``.
"""

from collections.abc import Sequence
from html import escape
from math import inf, isfinite
from textwrap import shorten, wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SiteError, suggest
from memgen_lens.core.steering_records import SteeringRates, SteeringSetting, SteeringTable, SweepRow
from memgen_lens.core.types import Ablation, Mode, Positions
from memgen_lens.viz.theme import (
    BEHAVIOR_COLORS,
    INK,
    MUTED,
    SHARE_AXIS,
    at_least_one,
    counted,
    drawn,
    rule_of,
    sequential,
    themed,
)

REACHED = {"generalization": "the rule's answer", "memorization": "exact recall"}
"""What counts as a success of steering, by the behaviour steered towards."""


@arguments(
    table=kinds.one(SteeringTable),
)
def steering_rates(table: SteeringTable) -> go.Figure:
    """What steering does on the test pairs, both ways, each rate with its 95 % interval beside the controls.

    The interval of the steered rate is Wilson's, by item; that of a control spans 95 % of its draws. Filled circles
    are prompts that now give the answer steered towards, open diamonds outputs in the form of a memorized
    answer, the item's own or not. A control that could not be drawn says why. After the steering results of
    arXiv 2412.18497, which have one control (random neurons) and no intervals.

    Args:
        table: Rates of one setting, in any mode.
    """
    sides = (table.to_generalization, table.to_memorization)
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.16,
        subplot_titles=[f"towards {side.toward} ({counted(side.n, side.n_items)})" for side in sides],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    for row, side in enumerate(sides, start=1):
        _draw_side(figure, side, row)
    figure.update_xaxes(**SHARE_AXIS)
    figure.update_xaxes(title_text="share of prompts", row=2, col=1)
    height = 190 + 34 * sum(1 + len(side.controls) for side in sides)
    return themed(
        figure, f"{_mode(table.setting).replace('_', '-').capitalize()}: {_describe(table.setting)}", height=height
    )


def _draw_side(figure: go.Figure, side: SteeringRates, row: int) -> None:
    """One direction: the steered rates on the first line, a control on each line below."""
    lines = {"steered": (_point(side.shift, "rate"), _point(side.memorized_form, "rate"))}
    for name, control in side.controls.items():
        label = name.replace("_", " ")
        form = control.get("memorized_form") or {}
        lines[label] = (_point(control, "mean"), _point(form, "mean"))
        if control.get("mean") is None:
            why = f"not measured: {control.get('why', 'no reason given')}"
            figure.add_annotation(
                x=0,
                y=len(lines) - 1,
                # Two lines are all that fit between the neighbours; hovering shows the rest.
                text="<br>".join(map(escape, wrap(shorten(why, 110, placeholder=" …"), 60))),
                hovertext=escape(why),
                showarrow=False,
                xanchor="left",
                align="left",
                font={"size": 12, "color": MUTED},
                bgcolor="white",
                row=row,
                col=1,
            )
    reached, recalled = BEHAVIOR_COLORS[side.toward], BEHAVIOR_COLORS["memorization"]
    kinds = (
        (REACHED[side.toward], reached, "circle", -0.14),
        ("memorized form", recalled, "diamond-open", 0.14),
    )
    for kind, (name, color, symbol, shift) in enumerate(kinds):
        points = [line[kind] for line in lines.values()]
        there = [(y + shift, *point) for y, point in enumerate(points) if point is not None]
        y, x, low, high = zip(*there, strict=True) if there else ((), (), (), ())
        figure.add_scatter(
            x=x,
            y=y,
            name=name,
            mode="markers",
            marker={"color": color, "symbol": symbol, "size": 10, "line": {"width": 2, "color": color}},
            error_x={
                "array": [end - value for end, value in zip(high, x, strict=True)],
                "arrayminus": [value - end for end, value in zip(low, x, strict=True)],
                "thickness": 2,
                "width": 5,
            },
            customdata=list(zip(low, high, strict=True)),
            hovertemplate=f"{name}: %{{x:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]<extra></extra>",
            legendgroup=name,
            showlegend=row == 1 or kind == 0,
            row=row,
            col=1,
        )
    figure.update_yaxes(
        tickvals=list(range(len(lines))),
        ticktext=[escape(label) for label in lines],
        range=[len(lines) - 0.5, -0.5],
        ticks="",
        row=row,
        col=1,
    )


def _point(block: dict[str, Any], key: str) -> tuple[float, float, float] | None:
    """A value and its interval, clipped to hold it; None where the value could not be computed."""
    value = block.get(key)
    if value is None or not isfinite(value):
        return None
    low, high = block.get("ci95") or (value, value)
    low, high = (end if isfinite(end) else value for end in (low, high))
    return value, min(low, value), max(high, value)


@arguments(
    rows=kinds.several(kinds.one(SweepRow)),
    chosen=kinds.one(SteeringSetting) | None,
    site=kinds.Text | None,
    positions=kinds.PositionsName | None,
)
def steering_sweep(
    rows: Sequence[SweepRow],
    *,
    chosen: SteeringSetting | None = None,
    site: str | None = None,
    positions: Positions | None = None,
) -> go.Figure:
    """Success of every fraction x alpha of one site, both ways: the topN x alpha grid of arXiv 2412.18497.

    Three panels: recalling prompts that now give the rule's answer, computing prompts that now give the
    item's own memorized answer, and computing prompts whose output has the form of one. Where neurons were ranked by
    several methods, those of the chosen setting's, or of the best row's. Patch mode has no
    alpha and is the last column; fitted rules have columns of their own. Rows restricted to some layers are left to
    `steering_by_layer`.

    Args:
        rows: The sweep, of any sites and positions.
        chosen: The setting that was chosen; framed where it is in the grid.
        site: Whose rows to draw. Default: that of ``chosen``, else of the row with the largest `SweepRow.gain`.
        positions: Likewise.

    Raises:
        MemgenError: There are no rows for all layers.
        SiteError: None of them is of this site and positions.
    """
    whole = [row for row in rows if row.layers is None]
    at_least_one(whole, "steering_sweep(rows)", "row for all layers")
    best = _best(whole)
    wanted = (site or (chosen or best).site, positions or (chosen or best).positions)
    grid = [row for row in whole if _place(row.setting) == wanted]
    if not grid:
        known = sorted({f"site={row.setting.site!r}, positions={row.setting.positions!r}" for row in whole})
        raise SiteError(
            "steering_sweep(rows)",
            expected="a site and positions that were swept",
            received=f"site={wanted[0]!r}, positions={wanted[1]!r}",
            fix=suggest(f"site={wanted[0]!r}, positions={wanted[1]!r}", known),
        )
    ranked_by = (chosen if chosen is not None and _place(chosen) == wanted else _best(grid)).method
    grid = [row for row in grid if row.setting.method == ranked_by]
    columns = sorted({_column(row.setting) for row in grid}, key=_order)
    fractions = sorted({row.setting.top_fraction for row in grid})
    found = {(row.setting.top_fraction, _column(row.setting)): row for row in grid}
    panels = (
        ("to_generalization", "towards generalization: the rule's answer", "generalization"),
        ("to_memorization", "towards memorization: exact recall", "memorization"),
        ("memorized_form", "towards memorization: memorized form", "memorization"),
    )
    figure = make_subplots(
        rows=3,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.09,
        subplot_titles=[title for _, title, _ in panels],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    for number, (field, title, behavior) in enumerate(panels, start=1):
        cells = [[found.get((fraction, column)) for column in columns] for fraction in fractions]
        figure.add_heatmap(
            z=drawn([[np.nan if cell is None else getattr(cell, field) for cell in line] for line in cells]),
            x=[_label(*column) for column in columns],
            y=[f"{100 * fraction:g} %" for fraction in fractions],
            customdata=[[_others(cell) for cell in line] for line in cells],
            colorscale=sequential(BEHAVIOR_COLORS[behavior]),
            zmin=0,
            zmax=1,
            showscale=False,
            xgap=2,
            ygap=2,
            texttemplate="%{z:.0%}",
            hovertemplate=f"{title.split(': ')[1]}: %{{z:.1%}}<br>alpha %{{x}}, top %{{y}} of neurons"
            "<br>other: %{customdata[0]:.1%} / %{customdata[1]:.1%} (to generalization / memorization)"
            "<extra></extra>",
            row=number,
            col=1,
        )
        if chosen is not None and (chosen.top_fraction, _column(chosen)) in found and wanted == _place(chosen):
            x, y = columns.index(_column(chosen)), fractions.index(chosen.top_fraction)
            frame = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
            figure.add_shape(type="rect", **frame, line={"width": 3, "color": INK}, row=number, col=1)
    figure.update_xaxes(type="category", showgrid=False, ticks="")
    figure.update_yaxes(type="category", showgrid=False, ticks="", title_text="top fraction")
    modes = {mode for mode, *_, alpha in columns if alpha is not None}
    unit = " (multiples of abs(NMD))" if modes <= {"shift"} else " (multiples of abs(NMD), or of what a rule says)"
    # Of a scale, or a direction, alpha is a multiple of something else.
    unit = unit if modes <= {"shift", "clusters", "low_rank"} else ""
    figure.update_xaxes(title_text=f"alpha{unit}", row=3, col=1)
    title = f"Sweep: {escape(wanted[0])}, positions “{wanted[1]}” ({counted(grid[0].n, grid[0].n_items)})"
    return themed(figure, title, height=170 + 3 * (44 + 30 * len(fractions)))


Column = tuple[Mode, Ablation | None, int | None, float | None]
"""Mode, how neurons are ablated, size of a rule, and alpha."""


def _column(setting: SteeringSetting) -> Column:
    return setting.mode, setting.how, setting.size, setting.alpha


def _order(column: Column) -> tuple[int, str, int, float]:
    mode, how, size, alpha = column
    modes = ("shift", "scale", "direction", "clusters", "low_rank", "clamp", "ablate", "patch")
    return modes.index(mode), how or "", size or 0, alpha or 0.0


def _label(mode: Mode, how: Ablation | None, size: int | None, alpha: float | None) -> str:
    if alpha is None:
        return mode if how is None else f"{mode} ({how})"
    if size is not None:
        return f"{rule_of(mode, size)}: {alpha:g}"
    return f"{alpha:g}" if mode == "shift" else f"{mode}: {alpha:g}"


def _mode(setting: SteeringSetting) -> str:
    return setting.mode if setting.how is None else f"{setting.mode} ({setting.how})"


def _best(rows: Sequence[SweepRow]) -> SteeringSetting:
    """The setting of the row with the largest gain."""
    return max(rows, key=lambda row: row.gain if isfinite(row.gain) else -inf).setting


def _place(setting: SteeringSetting) -> tuple[str, str]:
    return setting.site, setting.positions


def _others(row: SweepRow | None) -> list[float | None]:
    return [None, None] if row is None else drawn([row.to_generalization_other, row.to_memorization_other])


@arguments(
    rows=kinds.several(kinds.one(SweepRow)),
)
def steering_by_layer(rows: Sequence[SweepRow]) -> go.Figure:
    """What is left of steering when it is restricted to some layers: which layers matter.

    Args:
        rows: Sweep rows of one setting, each restricted to other layers; a row without a restriction is drawn last.

    Raises:
        MemgenError: There are no rows.
    """
    ordered = sorted(rows, key=lambda row: (row.layers is None, row.layers))
    whole = "all" if ordered[0].setting.size is None else "best predicted"
    labels = [whole if row.layers is None else ", ".join(map(str, row.layers)) for row in ordered]
    bars = (
        ("to_generalization", "to generalization: the rule's answer", "generalization", ""),
        ("to_memorization", "to memorization: exact recall", "memorization", ""),
        ("memorized_form", "to memorization: memorized form", "memorization", "/"),
    )
    figure = go.Figure()
    for field, name, behavior, pattern in bars:
        figure.add_bar(
            x=labels,
            y=drawn([getattr(row, field) for row in ordered]),
            customdata=[[row.n, row.n_items] for row in ordered],
            name=name,
            marker={
                "color": BEHAVIOR_COLORS[behavior],
                "pattern": {"shape": pattern, "fillmode": "replace", "fgcolor": BEHAVIOR_COLORS[behavior]},
            },
            hovertemplate="layers %{x}: %{y:.1%}<br>n = %{customdata[0]} of %{customdata[1]} items"
            f"<extra>{name}</extra>",
        )
    figure.update_xaxes(title_text="layers steered", type="category")
    figure.update_yaxes(title_text="share of prompts", **SHARE_AXIS)
    return themed(figure, f"Steering by layer: {_describe(ordered[0].setting)}", height=400)


def _describe(setting: SteeringSetting) -> str:
    """A setting in a few words."""
    alpha = "" if setting.alpha is None else f", alpha {setting.alpha:g}"
    rule = "" if setting.size is None else f", {rule_of(setting.mode, setting.size)}"
    chosen = f"top {100 * setting.top_fraction:g} %" if setting.chosen is None else escape(setting.chosen)
    return f"{escape(setting.site)}, {chosen}{alpha}{rule}"
