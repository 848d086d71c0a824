"""Figures of the benchmark of methods: who finds the planted neurons, what zeroing them does, who agrees with whom.

Public through `memgen_lens.viz.figures`. Does not measure.
"""

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.method_records import CONTROLS, MethodsBenchmark, ModelResult
from memgen_lens.viz.theme import BEHAVIOR_COLORS, INK, MUTED, SHARE_AXIS, SITE_COLORS, at_least_one, drawn, themed

METHOD_COLORS = (
    *SITE_COLORS,
    *(BEHAVIOR_COLORS[name] for name in ("generalization", "memorization")),
    MUTED,
    "#999933",
)
DASHES = ("solid", "dash", "dot")


@arguments(benchmark=kinds.one(MethodsBenchmark))
def method_recovery(benchmark: MethodsBenchmark) -> go.Figure:
    """Average precision of each method's order against the planted neurons, a dot a model; the line is chance.

    Args:
        benchmark: At least one planted model.

    Raises:
        MemgenError: No model was planted.
    """
    models = [model for model in benchmark.models if model.n_planted]
    at_least_one(models, "method_recovery", "planted model")
    figure = go.Figure()
    for model in models:
        label = _name(model)
        figure.add_scatter(
            x=[result.average_precision for result in model.results],
            y=[result.method for result in model.results],
            mode="markers",
            marker={"color": SITE_COLORS[0], "size": 9, "opacity": 0.65},
            name=escape(label),
            showlegend=False,
            customdata=[[result.precision, result.n_pairs] for result in model.results],
            hovertemplate=f"%{{y}}, {escape(label)}<br>average precision %{{x:.3f}}<br>"
            "of its first %{customdata[0]:.0%} planted<br>%{customdata[1]} pairs<extra></extra>",
        )
    chance = float(np.mean([model.n_planted / model.n_neurons for model in models]))
    figure.add_vline(x=chance, line={"color": MUTED, "dash": "dot"}, annotation_text="chance")
    figure.update_xaxes(title_text="average precision against the planted neurons", range=[-0.02, 1.04])
    figure.update_yaxes(autorange="reversed")
    title = f"Planted neurons found ({len(models)} model{'s' * (len(models) > 1)})"
    return themed(figure, title, height=140 + 26 * len(models[0].results))


@arguments(benchmark=kinds.one(MethodsBenchmark))
def method_ablation(benchmark: MethodsBenchmark) -> go.Figure:
    """Recall left, and held-out accuracy left, where each method's first neurons are zero; a panel a kind of model.

    Means over the models of one kind and task. In grey, what random sets leave that have as many neurons in each layer
    as the best method's (up to 5 % of the neurons). A curve that falls early in the upper row and stays up in the lower
    one names the neurons that recall.

    Args:
        benchmark: At least one model.
    """
    at_least_one(benchmark.models, "method_ablation", "model")
    groups: dict[tuple[str, str], list[ModelResult]] = {}
    for model in benchmark.models:
        groups.setdefault((model.kind, model.task), []).append(model)
    titles = [f"{kind} ({task}, {len(models)})" for (kind, task), models in groups.items()]
    figure = make_subplots(
        rows=2,
        cols=len(groups),
        shared_xaxes=True,
        shared_yaxes=True,
        vertical_spacing=0.08,
        subplot_titles=[escape(title) for title in titles],
    )
    shown: set[str] = set()
    for column, models in enumerate(groups.values(), start=1):
        counts = models[0].counts
        alike = [model for model in models if model.counts == counts]
        for place, method in enumerate(dict.fromkeys(result.method for result in alike[0].results)):
            found = [next(r for r in model.results if r.method == method) for model in alike]
            color, dash = METHOD_COLORS[place % len(METHOD_COLORS)], DASHES[place // len(METHOD_COLORS) % len(DASHES)]
            if method in CONTROLS:
                color, dash = INK, ("dash", "dashdot")[CONTROLS.index(method)]
            line = {"color": color, "dash": dash, "width": 1.6}
            curves = (
                (1, 1 - np.mean([r.removed for r in found], axis=0)),
                (2, np.mean([r.kept for r in found], axis=0)),
            )
            for row, values in curves:
                figure.add_scatter(
                    x=counts,
                    y=drawn(values),
                    mode="lines+markers",
                    marker={"size": 4},
                    line=line,
                    name=method,
                    legendgroup=method,
                    showlegend=row == 1 and method not in shown,
                    hovertemplate=f"{method}: %{{y:.1%}} left without %{{x}} neurons<extra></extra>",
                    row=row,
                    col=column,
                )
            shown.add(method)
        figure.add_scatter(
            x=counts[: len(alike[0].random_removed)],
            y=drawn(1 - np.mean([model.random_removed for model in alike], axis=0)),
            mode="lines",
            line={"color": MUTED, "dash": "dot", "width": 3},
            name="random, as many in each layer",
            legendgroup="random sets",
            showlegend=column == 1,
            hovertemplate="random sets: %{y:.1%} left without %{x} neurons<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_xaxes(type="log")
    figure.update_xaxes(title_text="neurons that are zero", row=2)
    figure.update_yaxes(**SHARE_AXIS)
    figure.update_yaxes(title_text="recall left", row=1, col=1)
    figure.update_yaxes(title_text="held-out accuracy left", row=2, col=1)
    figure.update_annotations(font_size=13)
    return themed(figure, "Recall without each method's first neurons", height=640)


@arguments(benchmark=kinds.one(MethodsBenchmark))
def method_agreement(benchmark: MethodsBenchmark) -> go.Figure:
    """Spearman's correlation of the strength that each two methods give to the neurons, the mean over models.

    Args:
        benchmark: At least one model; all with the same methods as the first are shown.
    """
    at_least_one(benchmark.models, "method_agreement", "model")
    names = [result.method for result in benchmark.models[0].results if result.method not in CONTROLS]
    alike = [
        np.array(model.agreement)
        for model in benchmark.models
        if [result.method for result in model.results if result.method not in CONTROLS] == names
    ]
    mean = np.mean(alike, axis=0)
    figure = go.Figure(
        go.Heatmap(
            z=drawn(mean),
            x=names,
            y=names,
            zmin=-1,
            zmax=1,
            colorscale=[[0.0, SITE_COLORS[1]], [0.5, "#ffffff"], [1.0, SITE_COLORS[0]]],
            text=[[f"{value:.2f}" for value in row] for row in mean],
            texttemplate="%{text}",
            colorbar={"thickness": 12, "outlinewidth": 0},
            hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        )
    )
    figure.update_yaxes(title_text="method", autorange="reversed")
    figure.update_xaxes(title_text="method", tickangle=-40)
    return themed(figure, f"Agreement of methods ({len(alike)} models)", height=220 + 30 * len(names))


def _name(model: ModelResult) -> str:
    return f"{model.name}, seed {model.seed}"
