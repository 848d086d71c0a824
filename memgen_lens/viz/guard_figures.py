"""Figure of a guard: what is prevented against what is steered without need, by threshold.

Public through `memgen_lens.viz.figures`. Does not choose thresholds: analysis does, on ``tune``.
"""

from html import escape
from typing import Any

import plotly.graph_objects as go

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.guard_records import GuardTable
from memgen_lens.viz.theme import BEHAVIOR_COLORS, INK, MUTED, SHARE_AXIS, SITE_COLORS, counted, drawn, themed


@arguments(
    table=kinds.one(GuardTable),
)
def guard_trade_off(table: GuardTable) -> go.Figure:
    """Recall prevented against false triggers at every threshold, the chosen one with its 95 % intervals.

    A line a kind of prompt that should not be steered: held-out prompts, and rephrasings. The corner at the top left is
    a perfect guard, the one at the top right steers everything. Beside stands the control, as many prompts steered at
    random; the dashed diagonal is where guards lie that know nothing.

    Args:
        table: What `memgen_lens.evaluate_guard` found.
    """
    curve = table.curve
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 1],
        y=[0, table.policies["unconditional"].prevented["rate"]],
        name="at random",
        mode="lines",
        line={"color": MUTED, "dash": "dot", "width": 1.5},
        hoverinfo="skip",
    )
    lines = (
        ("heldout", "held-out prompts", curve.heldout_triggered, INK, "solid"),
        ("rephrased", "rephrased prompts", curve.rephrased_triggered, SITE_COLORS[0], "dash"),
    )
    prevented = table.policies["guard"].prevented
    for name, label, triggered, color, dash in lines:
        if name not in table.triggered:
            continue
        figure.add_scatter(
            x=drawn(triggered),
            y=drawn(curve.prevented),
            name=label,
            mode="lines",
            line={"color": color, "dash": dash, "shape": "hv"},
            customdata=drawn(curve.threshold),
            hovertemplate=f"threshold %{{customdata:.3f}}: %{{y:.1%}} prevented, %{{x:.1%}} of {label} steered"
            "<extra></extra>",
        )
        rate = table.triggered[name]
        figure.add_scatter(
            x=[rate["rate"]],
            y=[prevented["rate"]],
            name=f"chosen, {label}",
            mode="markers",
            marker={"color": color, "size": 11, "line": {"width": 2, "color": "white"}},
            error_x=_bar(rate),
            error_y=_bar(prevented),
            hovertemplate=f"threshold {table.threshold:.3f}: %{{y:.1%}} prevented, %{{x:.1%}} of {label} steered"
            "<extra></extra>",
            showlegend=False,
        )
    control = table.shuffled.prevented
    n_steered = sum(rate["k"] for name, rate in table.triggered.items() if name != "heldout_computing")
    n_all = sum(rate["n"] for name, rate in table.triggered.items() if name != "heldout_computing")
    figure.add_scatter(
        x=[n_steered / n_all],
        y=[control["mean"]],
        name="control: as many at random",
        mode="markers",
        marker={"color": BEHAVIOR_COLORS["other"], "symbol": "diamond", "size": 11},
        error_y=_bar({"rate": control["mean"], "ci95": control["ci95"]}),
        hovertemplate="as many prompts at random: %{y:.1%} prevented<extra></extra>",
    )
    figure.update_xaxes(title_text="share of prompts steered without need", **SHARE_AXIS)
    figure.update_yaxes(title_text="recall prevented", **SHARE_AXIS)
    title = f"Guard at {escape(table.site)}, layer {table.layer} ({counted(table.n, table.n_items)})"
    return themed(figure, title, height=440)


def _bar(rate: dict[str, Any]) -> dict[str, Any]:
    """The error bar of a rate."""
    low, high = rate["ci95"]
    value = rate["rate"]
    return {"array": [max(high - value, 0)], "arrayminus": [max(value - low, 0)], "thickness": 1.5, "width": 5}
