"""The figure of one neuron: how active it is when the model recalls, and when it computes.

Public through `memgen_lens.viz.figures`. Does not compute results.
"""

from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.neuron_records import NeuronRecord
from memgen_lens.viz.theme import BEHAVIOR_COLORS, INK, counted, themed

N_BINS = 30
SIDES = (
    ("memorized", "recalling prompts", "memorization"),
    ("generalized", "computing prompts", "generalization"),
)
"""Of a neuron's record: side, what its prompts are called, and the behaviour that they show."""


@dataclass(frozen=True)
class Bins:
    """Both sides' activations counted in the same bins.

    Attributes:
        edges: Where bins begin and end.
        counts: By side, prompts in each.
    """

    edges: Float[np.ndarray, " edge"]
    counts: dict[str, Int[np.ndarray, " bin"]]


def binned(neuron: NeuronRecord, n_bins: int = N_BINS) -> Bins:
    """A neuron's activations in bins; where all are one number, in one bin around it."""
    values = np.concatenate([getattr(neuron, side) for side, _, _ in SIDES]).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    half = max(abs(low), 1.0) / 100
    edges = np.linspace(low, high, n_bins + 1) if high > low else np.array([low - half, low + half])
    counts = {side: np.histogram(getattr(neuron, side), edges)[0].astype(np.int64) for side, _, _ in SIDES}
    return Bins(edges, counts)


@arguments(
    neuron=kinds.one(NeuronRecord),
)
def neuron_activations(neuron: NeuronRecord) -> go.Figure:
    """How often a neuron is how active: recalling prompts upwards, computing prompts downwards; lines are means.

    Args:
        neuron: What `memgen_lens.neuron_page` gives.
    """
    bins = binned(neuron)
    figure = go.Figure()
    for (side, name, behavior), sign in zip(SIDES, (1, -1), strict=True):
        counts = bins.counts[side]
        figure.add_bar(
            x=(bins.edges[:-1] + bins.edges[1:]) / 2,
            y=sign * counts,
            width=np.diff(bins.edges),
            customdata=np.stack([counts, bins.edges[:-1], bins.edges[1:]], axis=-1),
            name=name,
            marker={"color": BEHAVIOR_COLORS[behavior], "line": {"color": "white", "width": 0.5}},
            hovertemplate="%{customdata[0]} prompts at %{customdata[1]:.3g} to %{customdata[2]:.3g}"
            f"<extra>{name}</extra>",
        )
        mean, most = float(getattr(neuron, side).mean(dtype=np.float64)), max(1, int(counts.max()))
        figure.add_scatter(
            x=[mean, mean],
            y=[0, sign * most],
            mode="lines",
            line={"color": INK, "width": 2, "dash": "dot"},
            hovertemplate=f"mean of {name}: %{{x:.3g}}<extra></extra>",
            showlegend=False,
        )
    ticks = _ticks(max(int(counts.max()) for counts in bins.counts.values()))
    figure.update_xaxes(title_text="activation at the answer position")
    figure.update_yaxes(title_text="prompts", tickvals=ticks, ticktext=[f"{abs(tick):,}" for tick in ticks])
    figure.update_layout(barmode="relative", bargap=0)
    place = f"{escape(neuron.site)}, layer {neuron.layer}, neuron {neuron.neuron}"
    return themed(figure, f"{place} ({counted(neuron.n_pairs, neuron.n_items, 'pairs')})", height=320)


def _ticks(most: int) -> list[int]:
    """Whole numbers of prompts, the same upwards and downwards."""
    step = next(step for power in range(12) for step in (10**power, 2 * 10**power, 5 * 10**power) if most <= 3 * step)
    return list(range(-(most // step) * step, most + 1, step))
