"""Figures of consistency over halves of the pairs and over training seeds.

Public through `memgen_lens.viz.figures`. Does not compute: values are drawn as recorded.
"""

from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import SeedConsistency, SplitHalf
from memgen_lens.viz.theme import (
    INK,
    MUTED,
    SHARE_AXIS,
    SITE_COLORS,
    counted,
    drawn,
    extreme,
    layer_axis,
    themed,
)


@arguments(
    result=kinds.one(SplitHalf),
)
def split_half(result: SplitHalf) -> go.Figure:
    """How far two halves of the pairs find the same neurons, every split a point, beside swapped labels.

    Above, the rank correlation of all neurons' rho; below, the share of the top neurons that both halves have in
    common, with a dotted line where the hypergeometric would put random sets. See
    `memgen_lens.analysis.comparison.split_half`.

    Args:
        result: Halvings of one site's pairs.
    """
    titles = [
        "rank correlation of rho between the halves (Spearman)",
        f"share of the top {result.n_top} neurons found by both halves",
    ]
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.26, subplot_titles=titles)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    rows = (
        (1, "as they are", result.spearman, SITE_COLORS[0]),
        (1, "labels swapped", result.null_spearman, MUTED),
        (2, "as they are", result.overlap, SITE_COLORS[0]),
        (2, "labels swapped", result.null_overlap, MUTED),
    )
    for row, name, values, color in rows:
        there = values[np.isfinite(values)]
        figure.add_box(
            x=there.tolist(),
            y=[name] * len(there),
            orientation="h",
            name=name,
            legendgroup=name,
            showlegend=False,
            boxpoints="all",
            jitter=0.5,
            pointpos=0,
            whiskerwidth=0,
            line={"color": color, "width": 1.5},
            marker={"color": color, "size": 4, "opacity": 0.45},
            fillcolor="rgba(0,0,0,0)",
            hovertemplate=f"{name}: %{{x:.3f}}<extra></extra>",
            row=row,
            col=1,
        )
    figure.add_vline(
        x=result.expected_overlap,
        line={"color": INK, "dash": "dot", "width": 1.5},
        annotation_text="random sets",
        annotation_position="top right",
        annotation_font={"color": MUTED, "size": 12},
        row=2,  # pyright: ignore
        col=1,  # pyright: ignore
    )
    figure.update_yaxes(autorange="reversed", ticks="", showline=False)
    low = min(-0.02, extreme([*result.null_spearman, *result.spearman], np.nanmin, 0.0) - 0.05)
    figure.update_xaxes(range=[low, 1.02], row=1, col=1)
    figure.update_xaxes(title_text=f"over {len(result.spearman)} random halvings", **SHARE_AXIS, row=2, col=1)
    title = f"Split half: {escape(result.site)} ({counted(result.n_pairs, result.n_items, 'pairs')})"
    return themed(figure, title, height=390)


@arguments(
    result=kinds.one(SeedConsistency),
)
def seed_profiles(result: SeedConsistency) -> go.Figure:
    """Where separately trained models keep their top neurons and their largest abs(rho), a line a model.

    Neurons of separate trainings have no common index; only profiles over layers can be compared.

    Args:
        result: Profiles of at least two models.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.12,
        subplot_titles=[f"share of the top {100 * result.top_fraction:g} %", "largest abs(rho)"],
    )
    figure.update_annotations(font_size=13)
    for number, seed in enumerate(result.seeds):
        for column, values in ((1, result.top_share), (2, result.max_abs_rho)):
            figure.add_scatter(
                x=list(range(values.shape[1])),
                y=drawn(values[number]),
                name=f"seed {escape(seed)}",
                legendgroup=seed,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": SITE_COLORS[number % len(SITE_COLORS)]},
                hovertemplate=f"seed {escape(seed)}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
                row=1,
                col=column,
            )
    layer_axis(figure.update_xaxes, result.top_share.shape[1])
    figure.update_yaxes(range=[-0.02, 1.02])
    figure.update_yaxes(tickformat=".0%", row=1, col=1)
    return themed(figure, f"Layers across seeds: {escape(result.site)}", height=380)
