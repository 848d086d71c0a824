"""Figures of tuned steering: the surface of everything that was tried, and what steering reaches against its cost.

Public through `memgen_lens.viz.figures`. Does not choose or measure: analysis does.
"""

from collections.abc import Callable, Iterator
from html import escape
from math import isfinite
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.cost_records import STEERED, Band, CostCurve, SteeringCost
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.steering_records import SteeringSetting, SweepRow
from memgen_lens.core.tuning_records import TunedSteering
from memgen_lens.viz.theme import (
    BEHAVIOR_COLORS,
    DIVERGING,
    INK,
    MUTED,
    SITE_COLORS,
    UNKNOWN,
    counted,
    drawn,
    faded,
    rule_of,
    sequential,
    themed,
)

Shown = Literal[
    "objective",
    "to_generalization",
    "to_generalization_other",
    "to_memorization",
    "memorized_form",
    "to_memorization_other",
    "heldout_loss",
    "heldout_loss_to_memorization",
]
"""What a surface can show."""
Against = Literal["heldout_loss", "kl_nats", "other"]
"""What a shift can be held against."""
WORDS = {
    "objective": "objective",
    "to_generalization": "the rule's answer",
    "to_generalization_other": "other outputs, towards generalization",
    "to_memorization": "exact recall",
    "memorized_form": "memorized form",
    "to_memorization_other": "other outputs, towards memorization",
    "heldout_loss": "held-out accuracy lost, towards generalization",
    "heldout_loss_to_memorization": "held-out accuracy lost, towards memorization",
}
COSTS = {
    "heldout_loss": "held-out accuracy lost",
    "kl_nats": "KL divergence on held-out prompts (nats)",
    "other": "share of other outputs",
}
COLUMNS = 2
"""Panels beside each other at most."""


@arguments(
    tuned=kinds.one(TunedSteering),
    shown=Shown,
)
def steering_surface(tuned: TunedSteering, *, shown: Shown = "objective") -> go.Figure:
    """Everything that was tried on ``tune``: top fraction x alpha, a panel a site (and kind, method, size if several).

    The paper's topN x alpha surface (arXiv 2412.18497 v1, sec. 6), with the objective in place of the shift rate. Where
    several layers or positions were tried, a cell is the best of them by the objective, and hovering names it with all
    its rates, n and the held-out loss. The chosen point is framed. A kind without a strength has one column.

    Args:
        tuned: What `memgen_lens.tune_steering` gave.
        shown: What the colour is: the objective, or one of the rates.
    """
    panels: dict[tuple[Any, ...], list[SweepRow]] = {}
    for row in tuned.rows:
        panels.setdefault(_panel(row), []).append(row)
    varied = [len({key[i] for key in panels}) > 1 for i in range(4)]
    n_columns = min(COLUMNS, len(panels))
    n_rows = -(-len(panels) // n_columns)
    n_lines = max(len({row.setting.top_fraction for row in rows}) for rows in panels.values())
    height = 150 + n_rows * (90 + 34 * n_lines)
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=[_named(key, varied) for key in panels],
        vertical_spacing=min(90 / height, 0.9 / max(n_rows - 1, 1)),
        horizontal_spacing=0.12,
    )
    figure.update_annotations(font_size=13)
    read: Callable[[SweepRow], float | None] = tuned.value if shown == "objective" else lambda row: getattr(row, shown)
    figure.update_layout(coloraxis=_scale(shown, [read(row) for row in tuned.rows]))
    for number, rows in enumerate(panels.values()):
        place = {"row": number // n_columns + 1, "col": number % n_columns + 1}
        _draw_panel(figure, tuned, rows, read, shown, place)
    figure.update_xaxes(type="category", showgrid=False, ticks="")
    figure.update_yaxes(type="category", showgrid=False, ticks="")
    figure.update_xaxes(title_text="alpha", row=n_rows)
    figure.update_yaxes(title_text="top fraction", col=1)
    first = tuned.rows[0]
    what = f"{WORDS[shown]} = {tuned.objective}" if shown == "objective" else WORDS[shown]
    way = "both ways" if tuned.toward is None else f"towards {tuned.toward}"
    title = f"Tuned {way} ({counted(first.n, first.n_items)})"
    return themed(figure, title, height=height).update_layout(title_subtitle_text=escape(what), margin_t=84)


def _panel(row: SweepRow) -> tuple[Any, ...]:
    setting = row.setting
    return setting.site, kind_of(setting), setting.size, setting.method


def kind_of(setting: SteeringSetting) -> str:
    """What is done to neurons, in words."""
    if setting.size is not None:
        return rule_of(setting.mode, setting.size)
    return setting.mode if setting.how is None else f"{setting.mode} ({setting.how})"


def _named(key: tuple[Any, ...], varied: list[bool]) -> str:
    site, kind, _, method = key
    parts = [site, kind if varied[1] or varied[2] else "", method.replace("_", " ") if varied[3] else ""]
    return escape(", ".join(part for part in parts if part))


def _scale(shown: Shown, values: list[float | None]) -> dict[str, Any]:
    """One colour scale for all panels: shares from 0 to 1, what may be negative around 0."""
    bar = {"thickness": 12, "outlinewidth": 0, "nticks": 5}
    if shown == "objective" or shown.startswith("heldout"):
        known = [abs(value) for value in values if value is not None and isfinite(value)]
        limit = max(known, default=1.0) or 1.0
        # A loss is bad and an objective good: the colour of the good end is generalization's.
        colors = [[1 - at, color] for at, color in reversed(DIVERGING)] if shown == "objective" else list(DIVERGING)
        return {"colorscale": colors, "cmin": -limit, "cmax": limit, "colorbar": bar}
    behavior = "other" if shown.endswith("other") else "generalization" if "generalization" in shown else "memorization"
    return {"colorscale": sequential(BEHAVIOR_COLORS[behavior]), "cmin": 0, "cmax": 1, "colorbar": bar}


def _draw_panel(
    figure: go.Figure,
    tuned: TunedSteering,
    rows: list[SweepRow],
    read: Callable[[SweepRow], float | None],
    shown: Shown,
    place: dict[str, int],
) -> None:
    best: dict[tuple[float, float | None], SweepRow] = {}
    for row in rows:
        key = (row.setting.top_fraction, row.setting.alpha)
        if row == tuned.chosen or key not in best or (best[key] != tuned.chosen and _above(tuned, row, best[key])):
            best[key] = row
    fractions = sorted({fraction for fraction, _ in best})
    alphas = sorted({alpha for _, alpha in best}, key=lambda alpha: alpha or 0.0)
    cells = [[best.get((fraction, alpha)) for alpha in alphas] for fraction in fractions]
    values = [[_number(None if cell is None else read(cell)) for cell in line] for line in cells]
    number = "%{z:.2f}" if shown == "objective" else "%{z:.0%}"
    figure.add_heatmap(
        z=drawn(values),
        x=["no strength" if alpha is None else f"{alpha:g}" for alpha in alphas],
        y=[f"{100 * fraction:g} %" for fraction in fractions],
        customdata=[["" if cell is None else _told(tuned, cell) for cell in line] for line in cells],
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
        texttemplate=number,
        hovertemplate="%{customdata}<extra></extra>",
        **place,
    )
    if tuned.chosen in best.values():
        x, y = alphas.index(tuned.chosen.setting.alpha), fractions.index(tuned.chosen.setting.top_fraction)
        frame = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
        figure.add_shape(type="rect", **frame, line={"width": 3, "color": INK}, **place)


def _above(tuned: TunedSteering, row: SweepRow, other: SweepRow) -> bool:
    return tuned.value(row) > tuned.value(other)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _told(tuned: TunedSteering, row: SweepRow) -> str:
    """All that is known of a setting, a line each."""
    setting = row.setting
    alpha = "" if setting.alpha is None else f", alpha {setting.alpha:g}"
    where = "" if row.layers is None else f", layers {', '.join(map(str, row.layers)) or 'none'}"
    lines = [
        f"top {100 * setting.top_fraction:g} % of {escape(setting.site)} "
        f"by {str(setting.method).replace('_', ' ')}{alpha}",
        f"{kind_of(setting)}, positions {setting.positions}{where}",
        f"objective {tuned.value(row):.3f}",
        f"to generalization {row.to_generalization:.1%}, other {row.to_generalization_other:.1%}",
        f"to memorization {row.to_memorization:.1%}, in memorized form {row.memorized_form:.1%}, "
        f"other {row.to_memorization_other:.1%}",
        counted(row.n, row.n_items, "pairs"),
    ]
    for name, loss in (("", row.heldout_loss), (" to memorization", row.heldout_loss_to_memorization)):
        if loss is not None:
            lines.append(f"held-out accuracy lost{name} {loss:.1%} (n = {row.n_heldout:,})")
    return "<br>".join([*lines, "<b>chosen</b>"] if row == tuned.chosen else lines)


@arguments(
    cost=kinds.one(SteeringCost),
    against=Against | None,
)
def steering_cost_curve(cost: SteeringCost, *, against: Against | None = None) -> go.Figure:
    """What steering reaches against what it costs as its strength grows, ours beside every control.

    A panel a direction, towards memorization one for exact recall and one for the memorized form. A point is a
    strength, and hovering names it. Ours has 95 % intervals over items; a control is the mean of its draws with a band
    that holds 95 % of them. A control that runs along ours says that the damage did it, not the neurons.

    Args:
        cost: What `memgen_lens.steering_cost` gave.
        against: The horizontal axis: accuracy lost or KL divergence on held-out prompts, or other outputs. Default:
            accuracy lost where it was measured, else other outputs.

    Raises:
        SettingsError: That was not measured.
    """
    if against is None:
        against = "heldout_loss" if cost.n_heldout else "other"
    if against != "other" and not cost.n_heldout:
        raise SettingsError(
            f"steering_cost_curve(against={against!r})",
            expected="against='other', as nothing was measured on held-out prompts",
            received=cost.why or "no held-out prompts",
            fix="Leave against out.",
        )
    panels = list(_cost_panels(cost))
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.09,
        subplot_titles=[title for title, *_ in panels],
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    for row, (_, toward, reached) in enumerate(panels, start=1):
        for number, (name, curve) in enumerate(cost.curves[toward].items()):
            color = BEHAVIOR_COLORS[toward] if name == STEERED else SITE_COLORS[(number - 1) % len(SITE_COLORS)]
            for trace in _cost_traces(cost, name, curve, reached, against, color):
                figure.add_trace(trace.update(showlegend=bool(trace.showlegend) and row == 1), row=row, col=1)
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%")
    figure.update_xaxes(tickformat=None if against == "kl_nats" else ".0%")
    figure.update_xaxes(title_text=COSTS[against], row=len(panels), col=1)
    title = f"Shift and cost, {escape(cost.setting.site)} ({counted(cost.n, cost.n_items)})"
    return themed(figure, title, height=170 + 210 * len(panels))


def _cost_panels(cost: SteeringCost) -> Iterator[tuple[str, str, str]]:
    """Title, direction and figure of each panel."""
    if "generalization" in cost.curves:
        yield "towards generalization: the rule's answer", "generalization", "shift"
    if "memorization" in cost.curves:
        yield "towards memorization: exact recall", "memorization", "shift"
        yield "towards memorization: memorized form", "memorization", "memorized_form"


def _cost_traces(
    cost: SteeringCost, name: str, curve: CostCurve, reached: str, against: Against, color: str
) -> Iterator[Any]:
    """A line through the strengths, with error bars both ways, or with a band over the draws."""
    across: Band = getattr(curve, against)
    up: Band = getattr(curve, reached)
    label = name.replace("_", " ")
    told = [
        f"{escape(label)}, alpha {alpha:g}<br>{WORDS.get(reached, 'shifted')}: {_share(up, i)}<br>"
        f"other: {_share(curve.other, i)}<br>stayed: {_share(curve.stayed, i)}<br>"
        f"held-out accuracy lost: {_share(curve.heldout_loss, i)}<br>KL: {_nats(curve.kl_nats, i)}"
        + (f"<br>{curve.n_draws} draws" if name != STEERED else "")
        for i, alpha in enumerate(cost.alphas)
    ]
    line: dict[str, Any] = {
        "x": drawn(across.mean),
        "y": drawn(up.mean),
        "name": label,
        "legendgroup": label,
        "customdata": told,
        "hovertemplate": "%{customdata}<extra></extra>",
        "line": {"color": color, "width": 2.5 if name == STEERED else 1.5},
        "showlegend": True,
    }
    if name == STEERED:
        bars = {"thickness": 1, "width": 3, "color": faded(color, 0.6)}
        line["error_y"] = bars | {"array": drawn(up.high - up.mean), "arrayminus": drawn(up.mean - up.low)}
        line["error_x"] = bars | {
            "array": drawn(across.high - across.mean),
            "arrayminus": drawn(across.mean - across.low),
        }
        texts = [f"{alpha:g}" for alpha in cost.alphas]
        more = {"text": texts, "textposition": "bottom right", "textfont": {"size": 11, "color": MUTED}}
        yield go.Scatter(**line, mode="lines+markers+text", marker={"size": 8, "color": color}, **more)
        return
    yield go.Scatter(
        x=drawn(np.concatenate([across.mean, across.mean[::-1]])),
        y=drawn(np.concatenate([up.low, up.high[::-1]])),
        fill="toself",
        fillcolor=faded(color, 0.14),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=label,
        showlegend=False,
    )
    yield go.Scatter(**line, mode="lines+markers", marker={"size": 5, "color": color})


def _share(band: Band, i: int) -> str:
    if not np.isfinite(band.mean[i]):
        return UNKNOWN
    return f"{band.mean[i]:.1%} [{band.low[i]:.1%}, {band.high[i]:.1%}]"


def _nats(band: Band, i: int) -> str:
    if not np.isfinite(band.mean[i]):
        return UNKNOWN
    return f"{band.mean[i]:.3f} nats [{band.low[i]:.3f}, {band.high[i]:.3f}]"
