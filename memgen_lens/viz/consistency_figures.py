"""Figures of consistency over halves of the pairs and over training seeds.

Public through `memgen_lens.viz.figures`. Does not compute: values are drawn as recorded.
"""

from collections.abc import Sequence
from html import escape
from typing import cast

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
    result=kinds.several(kinds.one(SplitHalf)),
)
def split_half(result: SplitHalf | Sequence[SplitHalf]) -> go.Figure:
    """How far two halves of the pairs find the same neurons, every split a point, beside swapped labels.

    Above, the rank correlation of all neurons' scores; below, the share of the top neurons that both halves have in
    common, with a dotted line where the hypergeometric would put random sets. Several results (methods, sites) stand
    one below another. See `memgen_lens.analysis.comparison.split_half`.

    Args:
        result: Halvings of one site's pairs, or several of them.
    """
    results = cast("list[SplitHalf]", result)
    names = _names_of(results)
    score = _scored_by(results[0].method) if len(results) == 1 else "scores"
    counts = sorted({one.n_top for one in results})
    titles = [
        f"rank correlation of {score} between the halves (Spearman)",
        f"share of the top {' or '.join(map(str, counts))} neurons found by both halves",
    ]
    figure = make_subplots(rows=2, cols=1, vertical_spacing=0.26, subplot_titles=titles)
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    rows = [
        (row, name, getattr(one, prefix + of), MUTED if prefix else SITE_COLORS[0])
        for row, of in ((1, "spearman"), (2, "overlap"))
        for one, both in zip(results, names, strict=True)
        for name, prefix in zip(both, ("", "null_"), strict=True)
    ]
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
    for number, expected in enumerate(sorted({one.expected_overlap for one in results})):
        figure.add_vline(
            x=expected,
            line={"color": INK, "dash": "dot", "width": 1.5},
            annotation_text="" if number else "random sets",
            annotation_position="top right",
            annotation_font={"color": MUTED, "size": 12},
            row=2,  # pyright: ignore
            col=1,  # pyright: ignore
        )
    figure.update_yaxes(autorange="reversed", ticks="", showline=False)
    lowest = min(extreme([*one.null_spearman, *one.spearman], np.nanmin, 0.0) for one in results)
    figure.update_xaxes(range=[min(-0.02, lowest - 0.05), 1.02], row=1, col=1)
    splits = " or ".join(str(n) for n in sorted({len(one.spearman) for one in results}))
    figure.update_xaxes(title_text=f"over {splits} random halvings", **SHARE_AXIS, row=2, col=1)
    first, same = results[0], len({(one.n_pairs, one.n_items) for one in results}) == 1
    sites = ", ".join(dict.fromkeys(escape(one.site) for one in results))
    counted_pairs = f" ({counted(first.n_pairs, first.n_items, 'pairs')})" if same else ""
    return themed(figure, f"Split half: {sites}{counted_pairs}", height=300 + 90 * len(results))


def _names_of(results: list[SplitHalf]) -> list[tuple[str, str]]:
    """What each result's halvings, and those with labels swapped, are called: by what parts the results."""
    if len(results) == 1:
        return [("as they are", "labels swapped")]
    sites = {one.site for one in results}
    own = [_scored_by(one.method) if len(sites) == 1 else f"{one.site}, {_scored_by(one.method)}" for one in results]
    own = [name if own.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(own)]
    return [(escape(name), f"{escape(name)}, swapped") for name in own]


def _scored_by(method: str) -> str:
    return "rho" if method == "pearson" else method.replace("_", " ")


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
