"""Figures: a record goes in, a plotly Figure comes out.

Every figure works on its own in a notebook (``mg.figures.nmd_heatmap(score).show()``) and is what the report
shows. Does not read files (see `memgen_lens.viz.contents`) and does not compute results: values are drawn as
recorded.
"""

from collections.abc import Sequence
from functools import partial
from html import escape

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import SettingsError
from memgen_lens.core.records import NeuronScores, ProbeReport
from memgen_lens.viz.behavior_figures import behavior_bars, training_curves
from memgen_lens.viz.consistency_figures import seed_profiles, split_half
from memgen_lens.viz.dynamics_figure import dynamics
from memgen_lens.viz.guard_figures import guard_trade_off
from memgen_lens.viz.matrix_figures import adapter_overlap, probe_transfer, steering_transfer, task_overlap
from memgen_lens.viz.method_figures import method_ablation, method_agreement, method_recovery
from memgen_lens.viz.mode_figures import mode_and_content, mode_by_position
from memgen_lens.viz.neuron_figures import neuron_activations
from memgen_lens.viz.position_figures import patching_map, probe_by_position, steering_by_position
from memgen_lens.viz.recitation_figures import recitation, recitation_under_steering
from memgen_lens.viz.run_figures import runs_side_by_side, setting_effect
from memgen_lens.viz.score_figures import top_neurons
from memgen_lens.viz.steering_figures import steering_by_layer, steering_rates, steering_sweep
from memgen_lens.viz.theme import (
    DIVERGING,
    INK,
    MUTED,
    SITE_COLORS,
    at_least_one,
    counted,
    drawn,
    extreme,
    faded,
    finite,
    layer_axis,
    over_neurons,
    themed,
)
from memgen_lens.viz.tuning_figures import steering_cost_curve, steering_surface

__all__ = [
    "adapter_overlap",
    "behavior_bars",
    "dynamics",
    "guard_trade_off",
    "learning_curve",
    "method_ablation",
    "method_agreement",
    "method_recovery",
    "mode_and_content",
    "mode_by_position",
    "neuron_activations",
    "nmd_heatmap",
    "patching_map",
    "probe_by_layer",
    "probe_by_position",
    "probe_transfer",
    "recitation",
    "recitation_under_steering",
    "rho_by_layer",
    "runs_side_by_side",
    "seed_profiles",
    "setting_effect",
    "split_half",
    "steering_by_layer",
    "steering_by_position",
    "steering_cost_curve",
    "steering_rates",
    "steering_surface",
    "steering_sweep",
    "steering_transfer",
    "task_overlap",
    "top_neurons",
    "training_curves",
]

MAX_COLUMNS = 1024
"""A heatmap of more neurons than this draws the strongest of each few neighbours: no screen shows more."""


@arguments(
    scores=kinds.one(NeuronScores),
    top=kinds.Count | None,
)
def nmd_heatmap(scores: NeuronScores, *, top: int | None = None) -> go.Figure:
    """Neuron-wise mean difference as a layer x neuron heatmap, the figure of arXiv 2412.18497.

    Colours are centred at zero and saturate at the 99.9 percentile of abs(NMD), so that a few extreme neurons
    do not whiten the rest; hovering shows the exact values. Above 1,024 neurons a cell is the neuron with the
    largest abs(NMD) among its neighbours, and hovering names it (the paper's models are narrower).

    Args:
        scores: Scores of one site.
        top: Draw only this many neurons, those with the largest abs(NMD) in any layer, in order of index.

    Raises:
        SettingsError: ``top`` is not between 1 and the number of neurons.
    """
    n_layers, n_neurons = scores.nmd.shape
    if top is not None and not 1 <= top <= n_neurons:
        raise SettingsError(
            f"nmd_heatmap(top={top})",
            expected=f"a number of neurons from 1 to {n_neurons}",
            received=str(top),
            fix="Leave top out to draw them all.",
        )
    width = 1 if top is not None else -(-n_neurons // MAX_COLUMNS)
    if top is not None:
        columns = np.sort(np.argsort(-_size(scores.nmd).max(0), kind="stable")[:top])
        neuron = np.broadcast_to(columns, (n_layers, top))
    else:
        neuron = _strongest(scores.nmd, width)
    nmd, rho, q = (np.take_along_axis(a, neuron, 1) for a in (scores.nmd, scores.rho, scores.q))
    limit = extreme(np.abs(scores.nmd), partial(np.nanquantile, q=0.999), 1.0) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=finite(nmd).astype(np.float32),
            x=[str(i) for i in neuron[0]] if top is not None else np.arange(neuron.shape[1]) * width,
            y=np.arange(n_layers),
            customdata=finite(np.stack([neuron, rho, q], axis=-1)).astype(np.float32),
            colorscale=DIVERGING,
            zmid=0,
            zmin=-limit,
            zmax=limit,
            colorbar={"title": {"text": "NMD"}, "thickness": 12, "outlinewidth": 0, "nticks": 5},
            hovertemplate="layer %{y}, neuron %{customdata[0]:d}<br>NMD %{z:.3f}<br>rho %{customdata[1]:.3f}"
            "<br>q %{customdata[2]:.3g}<extra></extra>",
        )
    )
    unit = "neuron" if width == 1 else f"neuron (strongest of each {width} neighbours)"
    figure.update_xaxes(title_text=unit, showgrid=False, nticks=12, type="category" if top is not None else "linear")
    layer_axis(figure.update_yaxes, n_layers, showgrid=False)
    title = f"NMD, {escape(scores.site)} ({counted(scores.n_pairs, scores.n_items, 'pairs')})"
    return themed(figure, title, height=min(180 + 26 * n_layers, 720))


@arguments(
    scores=kinds.several(kinds.one(NeuronScores)),
)
def rho_by_layer(scores: NeuronScores | Sequence[NeuronScores]) -> go.Figure:
    """Abs(rho) of a layer's neurons with the behaviour: largest, 95th percentile and median, a colour a site.

    Args:
        scores: Scores of one site or of several.

    Raises:
        MemgenError: There are no scores.
    """
    sites = [scores] if isinstance(scores, NeuronScores) else list(scores)
    figure = go.Figure()
    for number, site in enumerate(sites):
        size = np.abs(site.rho)
        lines = {
            "max": over_neurons(np.nanmax, size),
            "95th pct.": over_neurons(np.nanquantile, size, q=0.95),
            "median": over_neurons(np.nanmedian, size),
        }
        for (name, values), dash in zip(lines.items(), ("solid", "dash", "dot"), strict=True):
            figure.add_scatter(
                x=np.arange(len(values)),
                y=values,
                name=f"{escape(site.site)} {name}",
                mode="lines+markers",
                line={"color": SITE_COLORS[number % len(SITE_COLORS)], "dash": dash},
                hovertemplate="layer %{x}: %{y:.3f}",
            )
    layer_axis(figure.update_xaxes, max(len(site.rho) for site in sites))
    figure.update_yaxes(title_text="abs(rho) with the behaviour", range=[-0.02, 1.02])
    return themed(figure, "Correlation by layer")


@arguments(
    report=kinds.one(ProbeReport),
)
def probe_by_layer(report: ProbeReport) -> go.Figure:
    """AUROC of each layer's probe with its 95 % interval, beside the baselines.

    The paper shows the accuracy of one classifier a layer (arXiv 2412.18497); we draw AUROC, which does not
    depend on a threshold, and add the baselines: the prompt alone, shuffled labels, and the embedding.

    Args:
        report: Probes of one site, also as rebuilt from ``probes.json``.
    """
    n_layers = len(report.by_layer)
    figure = go.Figure()
    # Ends a little outside the first and last layer, so that a single layer still gets a line.
    span = [-0.4, n_layers - 0.6]
    shuffled = report.shuffled
    spread = (shuffled.get("low", shuffled["auroc"]), shuffled.get("high", shuffled["auroc"]))
    baselines = (
        ("input only", report.input_only.auroc, report.input_only.auroc_ci95, "#7a5195", "dash"),
        ("embedding", report.embedding.auroc, report.embedding.auroc_ci95, "#009E73", "dashdot"),
        ("shuffled labels", shuffled["auroc"], spread, MUTED, "dot"),
    )
    for name, value, (low, high), color, dash in baselines:
        figure.add_scatter(
            x=[*span, *span[::-1]],
            y=drawn([low, low, high, high]),
            fill="toself",
            fillcolor=faded(color, 0.12),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=name,
            showlegend=False,
        )
        figure.add_scatter(
            x=span,
            y=drawn([value, value]),
            name=name,
            legendgroup=name,
            mode="lines",
            line={"color": color, "dash": dash, "width": 1.5},
            hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
        )
    values = finite([scores.auroc for scores in report.by_layer])
    low, high = finite([scores.auroc_ci95 for scores in report.by_layer]).T
    figure.add_scatter(
        x=np.arange(n_layers),
        y=values,
        name=f"probe on {escape(report.site)}",
        mode="lines+markers",
        line={"color": INK},
        marker={"size": 8},
        # A percentile bootstrap interval can miss its estimate; a bar cannot have a negative length.
        error_y={"array": (high - values).clip(0), "arrayminus": (values - low).clip(0), "thickness": 1.5},
        customdata=np.stack([low, high], axis=-1),
        hovertemplate="layer %{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
    )
    layer_axis(figure.update_xaxes, n_layers)
    figure.update_yaxes(title_text="AUROC on test pairs")
    return themed(figure, f"Probe by layer ({counted(report.n_test, report.n_test_items, 'test pairs')})", height=400)


@arguments(
    report=kinds.one(ProbeReport),
)
def learning_curve(report: ProbeReport) -> go.Figure:
    """AUROC of the best layer's probe fitted on fewer pairs (the paper's classifier by amount of data).

    Raises:
        MemgenError: The report has no learning curve.
    """
    at_least_one(report.learning_curve, "learning_curve(report)", "point of a learning curve")
    figure = go.Figure(
        go.Scatter(
            x=[point["n_pairs"] for point in report.learning_curve],
            y=drawn([point["auroc"] for point in report.learning_curve]),
            mode="lines+markers",
            line={"color": INK},
            marker={"size": 8},
            name=f"layer {report.best_layer}",
            hovertemplate="%{x} pairs: %{y:.3f}<extra></extra>",
        )
    )
    figure.add_hline(y=0.5, line={"color": MUTED, "dash": "dot", "width": 1.5}, annotation_text="chance")
    figure.update_xaxes(title_text="pairs the probe was fitted on", rangemode="tozero")
    figure.update_yaxes(title_text="AUROC on test pairs")
    title = f"Learning curve (layer {report.best_layer})"
    return themed(figure, title, height=340)


def _size(nmd: Float[np.ndarray, "layer neuron"]) -> Float[np.ndarray, "layer neuron"]:
    """Abs(nmd) to choose by; below any other where it is not finite."""
    return np.nan_to_num(np.abs(finite(nmd)), nan=-0.5)


def _strongest(nmd: Float[np.ndarray, "layer neuron"], width: int) -> Int[np.ndarray, "layer column"]:
    """Index of the neuron with the largest abs(nmd) among each ``width`` neighbours, layer by layer."""
    n_layers, n_neurons = nmd.shape
    n_columns = -(-n_neurons // width)
    size = np.full((n_layers, n_columns * width), -1.0)
    size[:, :n_neurons] = _size(nmd)
    return size.reshape(n_layers, n_columns, width).argmax(-1) + np.arange(n_columns) * width
