"""The figure of the first neurons of a ranking, with their intervals.

Public through `memgen_lens.viz.figures`. Does not compute results.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import NeuronScores
from memgen_lens.viz.theme import BEHAVIOR_COLORS, INK, at_least_one, counted, finite, themed

HEIGHT = 19
"""Pixels of a neuron's row."""


@arguments(
    scores=kinds.several(kinds.one(NeuronScores)),
    top=kinds.Count,
)
def top_neurons(scores: NeuronScores | Sequence[NeuronScores], *, top: int = 20) -> go.Figure:
    """The neurons that come first, with the interval of each score where it has one; a panel a method or site.

    A score is as uncertain as its interval is wide, and the first of many neurons are first by luck as well: on other
    items they score less. Hovering shows q of the permutation test, which counts how many were looked at.

    Args:
        scores: Scores of one method and site, or of several; with ``n_resamples`` they have intervals.
        top: Neurons in a panel, those with the largest abs(score); at most as many as there are.

    Raises:
        MemgenError: There are no scores.
        SettingsError: No score is a finite number.
    """
    panels = [scores] if isinstance(scores, NeuronScores) else list(scores)
    at_least_one(panels, "top_neurons", "NeuronScores")
    figure = go.Figure().set_subplots(1, len(panels), subplot_titles=[_name(one) for one in panels])
    rows = 0
    for column, one in enumerate(panels, start=1):
        value = finite(one.score)
        if not np.isfinite(value).any():
            raise SettingsError(
                "top_neurons",
                expected="scores that are finite numbers",
                received=f"none, of {one.method} at {one.site}",
                fix="Score the neurons anew.",
            )
        size = np.nan_to_num(np.abs(value), nan=-1.0).ravel()
        first = np.argsort(-size, kind="stable")[: min(top, int((size >= 0).sum()))][::-1]
        layer, neuron = np.divmod(first, value.shape[1])
        at = (layer, neuron)
        low, high = (finite(end)[at] for end in one.ci95) if one.ci95 is not None else (value[at], value[at])
        figure.add_scatter(
            x=value[at],
            y=[f"{i}.{j}" for i, j in zip(layer.tolist(), neuron.tolist(), strict=True)],
            mode="markers",
            marker={"size": 7, "color": [_color(x) for x in value[at]]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": np.maximum(high - value[at], 0),
                "arrayminus": np.maximum(value[at] - low, 0),
                "color": INK,
                "thickness": 1,
                "width": 2,
                "visible": one.ci95 is not None,
            },
            customdata=np.stack([layer, neuron, low, high, finite(one.q)[at], finite(one.nmd)[at]], axis=-1),
            hovertemplate="layer %{customdata[0]:d}, neuron %{customdata[1]:d}<br>score %{x:.4g}"
            + (" [%{customdata[2]:.4g}, %{customdata[3]:.4g}]" if one.ci95 is not None else "")
            + "<br>NMD %{customdata[5]:.3g}, q %{customdata[4]:.3g}<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        title = "layer.neuron" if column == 1 else None
        figure.update_yaxes(title_text=title, type="category", showgrid=True, row=1, col=column)
        figure.update_xaxes(title_text=f"score ({one.method})", zeroline=True, nticks=6, row=1, col=column)
        rows = max(rows, len(first))
    counts = counted(panels[0].n_pairs, panels[0].n_items, "pairs")
    return themed(figure, f"Top neurons ({counts})", height=150 + HEIGHT * rows)


def _name(scores: NeuronScores) -> str:
    return escape(f"{scores.method}, {scores.site}")


def _color(value: float) -> str:
    return BEHAVIOR_COLORS["memorization" if value > 0 else "generalization"]
