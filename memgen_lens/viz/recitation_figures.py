"""Figures of recitation: by group and text, and under steering beside what that costs.

Public through `memgen_lens.viz.figures`. Does not measure, nor choose a steering.
"""

from html import escape
from textwrap import wrap

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.recitation_records import Recitation, RecitationCurve, RecitationPoint
from memgen_lens.viz.theme import BEHAVIOR_COLORS, SHARE_AXIS, SITE_COLORS, at_least_one, counted, drawn, themed

RECITED = BEHAVIOR_COLORS["memorization"]
SHOWN = 160
"""Characters of a text that hovering shows."""
CONTROLS = {"random_neurons": "random neurons", "random_direction": "random direction"}


@arguments(result=kinds.one(Recitation))
def recitation(result: Recitation) -> go.Figure:
    """How much is recited: the share of each group with its 95 % interval, and the recited tokens of each text.

    Groups, such as how often a text was trained on, stand side by side in the order in which they first occur. Above,
    filled circles are texts recited to the suffix's end, open ones those recited for half of it; below, one marker a
    text, of which hovering shows suffix and continuation. After fig. 1b of Carlini et al. 2022 (arXiv 2202.07646).

    Args:
        result: What `memgen_lens.recitation` found.
    """
    at_least_one(result.group, "figures.recitation", "text")
    labels = list(dict.fromkeys(result.group))
    names = [escape(str(label)) or "texts" for label in labels]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    half = max(1, result.suffix_tokens // 2)
    for k, symbol, shift in ((result.suffix_tokens, "circle", 0.0), (half, "circle-open", 0.12)):
        rates = [result.extractable(k, group=label) for label in labels]
        figure.add_scatter(
            x=np.arange(len(labels)) + shift,
            y=[rate.rate for rate in rates],
            error_y={
                "array": [rate.ci95[1] - rate.rate for rate in rates],
                "arrayminus": [rate.rate - rate.ci95[0] for rate in rates],
                "thickness": 1.5,
            },
            customdata=[[*rate.ci95, counted(rate.n, rate.n_items, "texts")] for rate in rates],
            name=f"{k} tokens recited",
            mode="markers",
            marker={"color": RECITED, "symbol": symbol, "size": 10, "line": {"width": 2, "color": RECITED}},
            hovertemplate="%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}], %{customdata[2]}"
            f"<extra>{k} tokens</extra>",
            row=1,
            col=1,
        )
    place = np.array([labels.index(label) for label in result.group], dtype=float)
    for number in range(len(labels)):  # side by side within their group
        mine = np.flatnonzero(place == number)
        place[mine] += np.linspace(-0.3, 0.3, len(mine)) if len(mine) > 1 else 0.0
    figure.add_scatter(
        x=place,
        y=result.matched,
        name="a text",
        mode="markers",
        marker={"color": RECITED, "size": 6, "opacity": 0.6},
        customdata=[
            [_lines(suffix), _lines(said), f"{perplexity:.3g}"]
            for suffix, said, perplexity in zip(
                result.suffixes, result.continuations, result.perplexity.tolist(), strict=True
            )
        ],
        hovertemplate="%{y} tokens, perplexity %{customdata[2]}<br><b>text</b> %{customdata[0]}<br>"
        "<b>said</b> %{customdata[1]}<extra></extra>",
        row=2,
        col=1,
    )
    grouped = any(label != "" for label in labels)
    figure.update_xaxes(tickvals=np.arange(len(labels)), ticktext=names, showgrid=False)
    figure.update_xaxes(title_text="group" if grouped else None, row=2, col=1)
    figure.update_yaxes(title_text="share of texts", row=1, col=1, **SHARE_AXIS)
    room = [-0.03 * result.suffix_tokens, 1.03 * result.suffix_tokens]
    figure.update_yaxes(title_text="tokens recited", range=room, row=2, col=1)
    title = f"Recitation of {result.suffix_tokens} tokens behind {result.prefix_tokens} ({len(result):,} texts)"
    return themed(figure, title, height=560)


@arguments(curve=kinds.one(RecitationCurve))
def recitation_under_steering(curve: RecitationCurve) -> go.Figure:
    """How much is still recited, and what that costs on other text, against the strength of steering, layer by layer.

    Each line is one site, positions and set of layers; open markers are the means over a control's draws, with the span
    of 95 % of them, at the same strengths. From above: share of texts recited, perplexity on other text over that
    without steering, and KL divergence there; dotted, no steering. After the figures of arXiv 2503.06040.

    Args:
        curve: What `memgen_lens.recitation_under_steering` found.
    """
    at_least_one(curve.points, "figures.recitation_under_steering", "steering")
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    lines: dict[str, list[RecitationPoint]] = {}
    for point in curve.points:
        lines.setdefault(_named(point), []).append(point)
    for number, (name, points) in enumerate(lines.items()):
        color = SITE_COLORS[number % len(SITE_COLORS)]
        points = sorted(points, key=_strength)
        strengths = [_strength(point) for point in points]
        shares = [point.recited["rate"] for point in points]
        spans = [
            [high - share, share - low]
            for share, (low, high) in zip(shares, (p.recited["ci95"] for p in points), strict=True)
        ]
        look = {"name": name, "legendgroup": name, "mode": "lines+markers", "line": {"color": color}}
        bars = {"array": [up for up, _ in spans], "arrayminus": [down for _, down in spans], "thickness": 1.5}
        for row, (values, more) in enumerate(
            (
                (shares, {"error_y": bars}),
                ([point.other_ratio for point in points], {}),
                ([point.kl_nats for point in points], {}),
            ),
            start=1,
        ):
            figure.add_scatter(
                x=strengths,
                y=drawn(values),
                showlegend=row == 1,
                hovertemplate="%{y:.3g}",
                row=row,
                col=1,
                **look,
                **more,
            )
        for control, symbol in zip(CONTROLS, ("x-open", "diamond-open"), strict=True):
            some = [point for point in points if control in point.controls]
            for row, figure_of in enumerate(("recited", "other_ratio", "kl_nats") if some else (), start=1):
                blocks = [point.controls[control][figure_of] for point in some]
                figure.add_scatter(
                    x=[_strength(point) for point in some],
                    y=drawn([block["mean"] for block in blocks]),
                    error_y={
                        "array": drawn([block["ci95"][1] - block["mean"] for block in blocks]),
                        "arrayminus": drawn([block["mean"] - block["ci95"][0] for block in blocks]),
                        "thickness": 1,
                    },
                    name=f"{CONTROLS[control]}, {name}",
                    legendgroup=f"{control} {name}",
                    showlegend=row == 1,
                    mode="markers",
                    marker={"symbol": symbol, "color": color, "size": 8},
                    hovertemplate=f"{CONTROLS[control]} %{{y:.3g}}<extra></extra>",
                    row=row,
                    col=1,
                )
    for row, value in enumerate((curve.unsteered.recited["rate"], 1.0, 0.0), start=1):
        figure.add_hline(y=value, line={"dash": "dot", "width": 1}, row=row, col=1)  # pyright: ignore[reportArgumentType]
    figure.update_yaxes(title_text="texts recited", row=1, col=1, **SHARE_AXIS)
    figure.update_yaxes(title_text="perplexity ratio", type="log", row=2, col=1)
    figure.update_yaxes(title_text="KL (nats)", row=3, col=1)
    figure.update_xaxes(title_text="alpha", row=3, col=1)
    of = counted(curve.n, curve.n_items, "texts")
    title = f"Recitation of {curve.k} tokens under steering ({of}; cost on {curve.n_other:,} others)"
    return themed(figure, title, height=640 + 18 * len(lines))


def _named(point: RecitationPoint) -> str:
    setting = point.setting
    assert setting is not None
    layers = ", ".join(map(str, point.layers))
    where = f"layer{'s' if len(point.layers) > 1 else ''} {layers}"
    return f"{escape(setting.site)}, top {100 * setting.top_fraction:g} %, {where}, at {setting.positions}"


def _strength(point: RecitationPoint) -> float:
    return 0.0 if point.setting is None or point.setting.alpha is None else point.setting.alpha


def _lines(text: str) -> str:
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
    return "<br>".join(map(escape, wrap(shown, 60)))
