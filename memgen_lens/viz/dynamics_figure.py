"""The figure of a run's dynamics: behaviours over steps, and a slider through the layers' profiles.

Public through `memgen_lens.viz.figures`. Does not measure.
"""

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.dynamics_records import Dynamics, RateSeries
from memgen_lens.viz.theme import (
    BEHAVIOR_COLORS,
    INK,
    MUTED,
    SHARE_AXIS,
    SITE_COLORS,
    drawn,
    extreme,
    faded,
    finite,
    layer_axis,
    themed,
)

PROFILES = ("abs(NMD) in SD: max, mean (dashed)", "abs(rho): max, 95th pct. (dashed)", "probe AUROC (test pairs)")


@arguments(
    result=kinds.one(Dynamics),
    threshold=kinds.Positive,
)
def dynamics(result: Dynamics, *, threshold: float = 0.9) -> go.Figure:
    """Behaviours and steering over training; below, a slider through the layers' NMD, rho and probes.

    A dotted line marks the first step at which a layer's probe tells the behaviours apart
    (`Dynamics.first_separation`), a grey one the step that the slider is at. In the profiles, the last step stays
    visible in grey. Gaps in the steering curves are steps at which too few pairs flip. The papers (arXiv 2412.18497)
    show the trained model only.

    Args:
        result: Measurements over the checkpoints of one run.
        threshold: AUROC in [0.5, 1) from which on the behaviours count as told apart.

    Raises:
        SettingsError: The threshold is out of range.
    """
    first = result.first_separation(threshold)
    titles = ["both behaviours", "steering the prompts that flip at that step", *PROFILES]
    figure = make_subplots(
        rows=3,
        cols=3,
        specs=[[{"colspan": 3}, None, None], [{"colspan": 3}, None, None], [{}, {}, {}]],
        row_heights=[0.35, 0.27, 0.38],
        vertical_spacing=0.13,
        horizontal_spacing=0.09,
        subplot_titles=titles,
    )
    figure.update_annotations(font_size=13)
    for annotation, title in zip(figure.select_annotations(), titles, strict=True):
        if title not in PROFILES:
            annotation.update(x=0, xanchor="left")
    _draw_rates(figure, result)
    last = len(result.steps) - 1
    marker = int(result.steps[last])
    for row in (1, 2):  # the first two shapes are the slider's; see _step
        figure.add_vline(x=marker, line={"color": MUTED, "width": 1.5}, row=row, col=1)  # pyright: ignore
    moving = _draw_profiles(figure, result, last)
    if first is not None:
        figure.add_vline(
            x=first.step,
            line={"color": SITE_COLORS[0], "dash": "dot", "width": 2},
            annotation_text=f"layer {first.layer} separates",
            annotation_position="top right" if first.step < marker / 2 else "top left",
            annotation_font={"color": SITE_COLORS[0], "size": 12},
            row=1,  # pyright: ignore
            col=1,  # pyright: ignore
        )
    figure.update_layout(
        sliders=[
            {
                "active": last,
                "currentvalue": {"prefix": "profiles at step ", "font": {"size": 13, "color": INK}},
                "pad": {"t": 44, "b": 4},
                "x": 0,
                "len": 1,
                "steps": [_step(result, i, moving) for i in range(len(result.steps))],
            }
        ],
    )
    figure.update_xaxes(title_text="optimizer steps", row=2, col=1)
    span = float(result.steps[-1] - result.steps[0]) or 1.0
    for row in (1, 2):
        figure.update_xaxes(range=[result.steps[0] - 0.02 * span, result.steps[-1] + 0.02 * span], row=row, col=1)
        figure.update_yaxes(title_text="share of prompts", **SHARE_AXIS, row=row, col=1)
    n = result.n_pairs["test"]
    figure = themed(figure, f"Dynamics: {escape(result.site)} ({n} test pairs)", height=900)
    return figure.update_layout(margin={"b": 150})


def _draw_rates(figure: go.Figure, result: Dynamics) -> None:
    """The two upper panels, over steps."""
    blue, orange = BEHAVIOR_COLORS["generalization"], BEHAVIOR_COLORS["memorization"]
    curves = (
        (1, result.behavior["memorization"], "recalls memorized", orange, "solid"),
        (1, result.behavior["generalization"], "computes validation", blue, "solid"),
        (1, result.behavior["rephrased_generalization"], "computes rephrased", blue, "dash"),
        (1, result.behavior["flips"], "items that flip", INK, "dot"),
        (2, result.steering["to_generalization"], "steered: rule's answer", blue, "solid"),
        (2, result.steering["memorized_form"], "steered: memorized form", orange, "solid"),
        (2, result.steering["exact_recall"], "steered: exact recall", orange, "dot"),
    )
    for row, series, name, color, dash in curves:
        _draw_band(figure, result, series, color, row)
        figure.add_scatter(
            x=result.steps.tolist(),
            y=drawn(series.rate),
            name=name,
            mode="lines+markers",
            line={"color": color, "dash": dash},
            marker={"size": 5},
            customdata=drawn(np.stack([series.low, series.high, series.n, series.n_items], axis=1)),
            hovertemplate=f"{name}: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]"
            "<br>step %{x}, n = %{customdata[2]} of %{customdata[3]} items<extra></extra>",
            row=row,
            col=1,
        )
    names = {"to_generalization": blue, "memorized_form": orange}
    for (name, values), color in zip(result.random_neurons.items(), names.values(), strict=True):
        figure.add_scatter(
            x=result.steps.tolist(),
            y=drawn(values),
            name="random neurons",
            legendgroup="random",
            showlegend=name == "to_generalization",
            mode="lines",
            line={"color": faded(color, 0.7), "dash": "dash", "width": 1.5},
            hovertemplate=f"random neurons, {name.replace('_', ' ')}: %{{y:.1%}}<extra></extra>",
            row=2,
            col=1,
        )


def _draw_band(figure: go.Figure, result: Dynamics, series: RateSeries, color: str, row: int) -> None:
    there = np.flatnonzero(np.isfinite([series.rate, series.low, series.high]).all(0))
    x = result.steps[there].tolist()
    figure.add_scatter(
        x=[*x, *x[::-1]],
        y=[*series.low[there].tolist(), *series.high[there].tolist()[::-1]],
        fill="toself",
        fillcolor=faded(color, 0.08),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        row=row,
        col=1,
    )


def _draw_profiles(figure: go.Figure, result: Dynamics, last: int) -> list[int]:
    """The layers' profiles at the last step; returns the places of the traces that the slider moves."""
    n_layers = result.auroc.shape[1]
    layers = list(range(n_layers))
    moving = []
    for column, values, name, color, dash in _profiles(result):
        shared = {"x": layers, "mode": "lines+markers", "row": 3, "col": column}
        figure.add_scatter(
            **shared,
            y=drawn(values[last]),
            name="last step",
            legendgroup="last",
            showlegend=column == 3,
            line={"color": faded(BEHAVIOR_COLORS["other"], 0.5), "dash": dash, "width": 1.5},
            marker={"size": 4},
            hoverinfo="skip",
        )
        moving.append(len(tuple(figure.select_traces())))
        figure.add_scatter(
            **shared,
            y=drawn(values[last]),
            name=name,
            showlegend=False,
            line={"color": color, "dash": dash},
            marker={"size": 8},
            error_y=_errors(result, last) if column == 3 else None,
            hovertemplate=f"{name}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
        )
    baseline = result.input_only.auroc
    figure.add_hline(
        y=baseline,
        line={"color": MUTED, "dash": "dash", "width": 1.5},
        annotation_text="prompt alone",
        annotation_position="bottom right",
        annotation_font={"color": MUTED, "size": 12},
        row=3,  # pyright: ignore
        col=3,  # pyright: ignore
    )
    top = extreme(result.nmd_max_in_sd, np.nanmax, 0.0) * 1.05 or 1.0
    low = extreme([*result.auroc_low.flat, baseline, 0.5], np.nanmin, 0.5)
    for column, span in ((1, [-0.02 * top, top]), (2, [-0.02, 1.02]), (3, [low - 0.03, 1.02])):
        layer_axis(figure.update_xaxes, n_layers, row=3, col=column)
        figure.update_yaxes(range=span, row=3, col=column)
    return moving


def _profiles(result: Dynamics) -> tuple[tuple[int, Float[np.ndarray, "step layer"], str, str, str], ...]:
    return (
        (1, result.nmd_max_in_sd, "largest abs(NMD)", SITE_COLORS[0], "solid"),
        (1, result.nmd_mean_in_sd, "mean abs(NMD)", SITE_COLORS[0], "dash"),
        (2, result.rho_max, "largest abs(rho)", SITE_COLORS[1], "solid"),
        (2, result.rho_p95, "95th percentile", SITE_COLORS[1], "dash"),
        (3, result.auroc, "AUROC", INK, "solid"),
    )


def _errors(result: Dynamics, i: int) -> dict[str, Any]:
    """Error bars of the probes at one step; a bootstrap interval can miss its estimate, a bar cannot be negative."""
    low, value, high = (finite(ends[i]) for ends in (result.auroc_low, result.auroc, result.auroc_high))
    above, below = high - value, value - low
    return {"array": drawn(above.clip(0)), "arrayminus": drawn(below.clip(0)), "thickness": 1.5}


def _step(result: Dynamics, i: int, moving: list[int]) -> dict[str, Any]:
    """What the slider does on arriving at a step: move the profiles and the two marker lines."""
    step = int(result.steps[i])
    values = [drawn(values[i]) for _, values, *_ in _profiles(result)]
    errors = _errors(result, i)
    bars = {f"error_y.{name}": [None] * (len(moving) - 1) + [errors[name]] for name in ("array", "arrayminus")}
    lines = {f"shapes[{line}].x{end}": step for line in (0, 1) for end in (0, 1)}
    return {"label": f"{step:,}", "method": "update", "args": [{"y": values, **bars}, lines, moving]}
