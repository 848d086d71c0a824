"""Figures of mode and content: what patches bring along, by depth and by position.

Public through `memgen_lens.viz.figures`. Does not patch.
"""

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.mode_records import ModeContent, ModeRow
from memgen_lens.viz.position_figures import position_axis
from memgen_lens.viz.theme import BEHAVIOR_COLORS, MUTED, SHARE_AXIS, SITE_COLORS, counted, sequential, themed

PANELS = {"answer": "answer position alone", "before": "all positions before it", "all": "all positions"}


@arguments(
    result=kinds.one(ModeContent),
)
def mode_and_content(result: ModeContent) -> go.Figure:
    """Form and exact recall of patched prompts, by how many blocks have been run where the stream is another's.

    A panel each: patched at the answer position alone, at all before it, at all. Solid lines: from the item's own
    recalling prompt. Dashed: from another item's, whose own memory (purple) may come along. Bars are 95 % intervals.

    Args:
        result: What `memgen_lens.mode_and_content` found.
    """
    figure = make_subplots(
        rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=list(PANELS.values())
    )
    figure.update_annotations(font_size=13)
    memory, others = BEHAVIOR_COLORS["memorization"], SITE_COLORS[1]
    lines = (
        ("own", "form", "form, from its own", MUTED, "solid", "diamond-open"),
        ("own", "recall", "exact recall, from its own", memory, "solid", "circle"),
        ("other", "form", "form, from another item", MUTED, "dash", "diamond-open"),
        ("other", "recall", "exact recall, from another item", memory, "dash", "circle-open"),
        ("other", "of_source", "the other item's memory", others, "dash", "square"),
    )
    for number, positions in enumerate(PANELS, start=1):
        for place, (source, field, name, color, dash, symbol) in enumerate(lines):
            rows: list[ModeRow] = result.patched(source, positions)  # pyright: ignore[reportArgumentType]
            rates = [getattr(row, field) for row in rows]
            values = np.array([rate["rate"] for rate in rates])
            low, high = np.array([rate["ci95"] for rate in rates]).T
            figure.add_scatter(
                x=[(row.depth or 0) + 0.04 * (place - 2) for row in rows],
                y=values,
                error_y={"array": high - values, "arrayminus": values - low, "thickness": 1.2, "width": 3},
                name=name,
                legendgroup=name,
                showlegend=number == 1,
                mode="lines+markers",
                line={"color": color, "dash": dash},
                marker={"symbol": symbol, "size": 8},
                hovertemplate=f"{name}: %{{y:.1%}}<extra></extra>",
                row=1,
                col=number,
            )
    every = max(1, -(-result.n_depths // 8))
    figure.update_xaxes(title_text="blocks run before", tick0=0, dtick=every)
    figure.update_yaxes(**SHARE_AXIS)
    figure.update_yaxes(title_text="share of prompts", row=1, col=1)
    title = f"Mode and content, patched ({counted(result.n_patched, _items(result), 'prompts')})"
    return themed(figure, title, height=460)


@arguments(
    result=kinds.one(ModeContent),
)
def mode_by_position(result: ModeContent) -> go.Figure:
    """Form and exact recall where one position at one depth is that of the item's own recalling prompt.

    Args:
        result: What `memgen_lens.mode_and_content` found.

    Raises:
        SettingsError: No single position was patched.
    """
    single = [row for row in result.rows if row.source == "own" and isinstance(row.positions, int)]
    if not single:
        raise SettingsError(
            "mode_by_position",
            expected="a result with single positions",
            received="one of n_positions=0",
            fix="Measure it with mode_and_content(..., n_positions=None).",
        )
    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.14,
        subplot_titles=["memorized form", "exact recall"],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    place = result.tokens.position
    for number, field in enumerate(("form", "recall"), start=1):
        rates: dict[Any, Any] = {(row.depth, row.positions): getattr(row, field) for row in single}
        cells = [[rates[depth, int(position)] for position in place] for depth in range(result.n_depths)]
        figure.add_heatmap(
            z=[[cell["rate"] for cell in line] for line in cells],
            x=place,
            y=np.arange(result.n_depths),
            customdata=[[cell["ci95"] for cell in line] for line in cells],
            colorscale=sequential(BEHAVIOR_COLORS["memorization"]),
            zmin=0,
            zmax=1,
            showscale=False,
            texttemplate="%{z:.0%}" if len(place) <= 16 else None,
            hovertemplate="after %{y} blocks, position %{x}: %{z:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}]"
            "<extra></extra>",
            row=number,
            col=1,
        )
        figure.update_yaxes(title_text="blocks run before", dtick=1, showgrid=False, row=number, col=1)
    figure.update_xaxes(showgrid=False)
    position_axis(figure.update_xaxes, result.tokens, row=2, col=1)
    title = f"One position patched ({escape(counted(result.n_patched, _items(result), 'prompts'))})"
    return themed(figure, title, height=240 + 2 * min(34 * result.n_depths, 300))


def _items(result: ModeContent) -> int:
    """Items of the prompts that are patched."""
    return next(row.recall["n_items"] for row in result.rows if row.source == "own")
