"""Figures over the positions of prompts, counted from their end: patching, probes, steering.

Public through `memgen_lens.viz.figures`. Does not compute: values are drawn as recorded.
"""

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.dynamics_records import RateSeries
from memgen_lens.core.position_records import PatchingMap, PositionProbes, PositionSteering, PositionTokens
from memgen_lens.viz.theme import (
    BEHAVIOR_COLORS,
    DIVERGING,
    SHARE_AXIS,
    SITE_COLORS,
    UNKNOWN,
    counted,
    drawn,
    layer_axis,
    themed,
)

COMMON = 0.5
"""A token that fewer prompts than this share have at a position does not name the position."""
TICKS = 24
"""Positions that are named on an axis at most."""


@arguments(
    result=kinds.one(PatchingMap),
)
def patching_map(result: PatchingMap) -> go.Figure:
    """How much of the recall each layer carries at each position or in each head: white = nothing, full colour = all.

    Hovering shows the effect with its 95 % interval, how many pairs it is of, and the most frequent token there in
    either prompt. Colours saturate at -1 and 1. An effect goes towards memorization where recalled activations are
    patched into the computing prompt, towards generalization the other way round.

    Args:
        result: What `memgen_lens.patching_map` found.
    """
    n_layers, n_columns = result.effect.shape
    heads = result.by == "head"
    under = [f"head {head}" for head in range(n_columns)] if heads else _told(result.tokens)
    of = [counted(int(n), int(items), "pairs") for n, items in zip(result.n, result.n_items, strict=True)]
    hover = [
        [
            f"{under[column]}<br>effect {_number(result.effect[layer, column])} "
            f"[{_number(result.low[layer, column])}, {_number(result.high[layer, column])}], {of[column]}"
            for column in range(n_columns)
        ]
        for layer in range(n_layers)
    ]
    towards_memorization = result.direction == "denoising"
    figure = go.Figure(
        go.Heatmap(
            z=drawn(result.effect),
            x=np.arange(n_columns) if heads else result.tokens.position,
            y=np.arange(n_layers),
            customdata=hover,
            colorscale=DIVERGING,
            reversescale=not towards_memorization,
            zmid=0,
            zmin=-1,
            zmax=1,
            colorbar={"title": {"text": "effect"}, "thickness": 12, "outlinewidth": 0, "tickvals": [-1, 0, 1]},
            hovertemplate="layer %{y}, %{customdata}<extra></extra>",
        )
    )
    if heads:
        at = "all positions" if result.positions == "all" else "answer position"
        figure.update_xaxes(title_text=f"head, at {at}", showgrid=False, dtick=max(1, n_columns // 16))
    else:
        position_axis(figure.update_xaxes, result.tokens)
    layer_axis(figure.update_yaxes, n_layers, showgrid=False)
    # Where the figure says it: 1 is a full swap of the answers' log-probabilities, so many nats.
    title = f"Patching {escape(result.site)}, {result.direction} ({counted(result.n_pairs, _most(result), 'pairs')})"
    return themed(figure, title, height=min(200 + 26 * n_layers, 720))


@arguments(
    report=kinds.one(PositionProbes),
)
def probe_by_position(report: PositionProbes) -> go.Figure:
    """AUROC of a probe at each layer and position on the test pairs, above what the tokens so far tell.

    White is chance (0.5). Hovering shows intervals and tokens; below the layers stands the same probe on the tokens up
    to each position.

    Args:
        report: What `memgen_lens.probe_by_position` found.
    """
    n_layers, told = len(report.auroc), _told(report.tokens)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[n_layers + 0.5, 1.5], vertical_spacing=0.4 / (n_layers + 4)
    )
    look: dict[str, Any] = {
        "x": report.tokens.position,
        "colorscale": [[0.0, SITE_COLORS[1]], [0.5, "#ffffff"], [1.0, SITE_COLORS[0]]],
        "zmin": 0,
        "zmax": 1,
    }
    bar = {"title": {"text": "AUROC"}, "thickness": 12, "outlinewidth": 0, "tickvals": [0, 0.5, 1]}
    ends = np.stack([report.low, report.high])
    hover = [
        [f"{told[p]}<br>{_auroc(report.auroc[i, p], ends[:, i, p])}" for p in range(len(told))] for i in range(n_layers)
    ]
    figure.add_heatmap(
        z=drawn(report.auroc),
        y=np.arange(n_layers),
        customdata=hover,
        colorbar=bar,
        hovertemplate="layer %{y}, %{customdata}<extra></extra>",
        row=1,
        col=1,
        **look,
    )
    alone = np.stack([report.input_only_low, report.input_only_high])
    figure.add_heatmap(
        z=drawn(report.input_only[None]),
        y=["tokens"],
        customdata=[[f"{told[p]}<br>{_auroc(report.input_only[p], alone[:, p])}" for p in range(len(told))]],
        showscale=False,
        hovertemplate="tokens up to %{customdata}<extra></extra>",
        row=2,
        col=1,
        **look,
    )
    layer_axis(figure.update_yaxes, n_layers, showgrid=False, row=1, col=1)
    figure.update_yaxes(showgrid=False, ticks="", row=2, col=1)
    figure.update_xaxes(showgrid=False)
    position_axis(figure.update_xaxes, report.tokens, row=2, col=1)
    title = f"Probe by position, {escape(report.site)} ({counted(report.n_test, report.n_test_items, 'pairs')})"
    return themed(figure, title, height=min(250 + 26 * n_layers, 760))


@arguments(
    result=kinds.one(PositionSteering),
)
def steering_by_position(result: PositionSteering) -> go.Figure:
    """What steering at one position of the prompt alone does, both ways, with 95 % intervals.

    Args:
        result: What `memgen_lens.steering_by_position` found.
    """
    lines = (
        (result.to_generalization, "to generalization: the rule's answer", "generalization", "solid"),
        (result.exact_recall, "to memorization: exact recall", "memorization", "solid"),
        (result.memorized_form, "to memorization: memorized form", "memorization", "dot"),
    )
    told = _told(result.tokens)
    figure = go.Figure()
    for series, name, behavior, dash in lines:
        figure.add_scatter(
            x=result.tokens.position,
            y=drawn(series.rate),
            error_y={"array": series.high - series.rate, "arrayminus": series.rate - series.low, "thickness": 1.5},
            customdata=[[told[p], *_ends(series, p)] for p in range(len(told))],
            name=name,
            mode="lines+markers",
            line={"color": BEHAVIOR_COLORS[behavior], "dash": dash},
            hovertemplate="%{customdata[0]}<br>%{y:.1%} %{customdata[1]}, %{customdata[2]}"
            f"<extra>{name}</extra>",
        )
    position_axis(figure.update_xaxes, result.tokens)
    figure.update_yaxes(title_text="share of prompts", **SHARE_AXIS)
    setting = result.setting
    title = f"Steering by position: {escape(setting.site)}, top {100 * setting.top_fraction:g} %"
    return themed(figure, title, height=420)


def _told(tokens: PositionTokens) -> list[str]:
    """For each position a line that says what stands there in either prompt."""

    def often(token: str, share: float) -> str:
        return f"“{escape(_shown(token))}” ({share:.0%})"

    return [
        f"position {position}<br>recalling {often(tokens.memorized[p], tokens.memorized_share[p])}, "
        f"computing {often(tokens.generalized[p], tokens.generalized_share[p])}; unlike in {tokens.differing[p]:.0%}"
        for p, position in enumerate(tokens.position)
    ]


def position_axis(update: Any, tokens: PositionTokens, **where: Any) -> None:
    """Positions from the end, each named by its token where most prompts of either side share it."""
    every = -(-len(tokens.position) // TICKS)
    shown = range((len(tokens.position) - 1) % every, len(tokens.position), every)  # the last one always
    texts = []
    for p in shown:
        same = tokens.memorized[p] == tokens.generalized[p]
        common = same and min(tokens.memorized_share[p], tokens.generalized_share[p]) >= COMMON
        texts.append(f"{escape(_shown(tokens.memorized[p])) if common else '…'}<br>{tokens.position[p]}")
    update(
        title_text="position from the end, the last is the answer position",
        tickvals=[int(tokens.position[p]) for p in shown],
        ticktext=texts,
        showgrid=False,
        **where,
    )


def _shown(token: str) -> str:
    """A token on which white space can be seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else UNKNOWN


def _auroc(value: float, ends: np.ndarray) -> str:
    return f"AUROC {value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def _ends(series: RateSeries, p: int) -> tuple[str, str]:
    return f"[{series.low[p]:.1%}, {series.high[p]:.1%}]", counted(int(series.n[p]), int(series.n_items[p]), "prompts")


def _most(result: PatchingMap) -> int:
    """Items of all pairs: those that have the answer position, or any head."""
    return int(result.n_items[-1])
