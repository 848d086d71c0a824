"""Figures of what a model says: both behaviours during training, and by kind of prompt.

Public as `memgen_lens.figures`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from pydantic import BeforeValidator

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.items import Outcome
from memgen_lens.core.records import Evaluation
from memgen_lens.core.stats import wilson
from memgen_lens.core.types import Behavior
from memgen_lens.viz.theme import BEHAVIOR_COLORS, SHARE_AXIS, drawn, themed


@arguments(
    history=kinds.several(kinds.one(Evaluation)),
    loss_axis=Literal["log", "linear"],
)
def training_curves(history: Sequence[Evaluation], *, loss_axis: Literal["log", "linear"] = "log") -> go.Figure:
    """Both behaviours over training, with the loss on a second axis.

    The paper monitors both behaviours on a test set while training (arXiv 2412.18497).

    Args:
        history: Evaluations in the order of their steps.
        loss_axis: Scale of the loss (nats a labelled token).

    Raises:
        MemgenError: There are no evaluations.
    """
    steps = [row.step for row in history]
    curves = (
        ("generalization", "generalization (validation)", "generalization", "solid"),
        ("rephrased_generalization", "generalization (rephrased)", "generalization", "dash"),
        ("memorization", "memorization (memorized)", "memorization", "solid"),
    )
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    for field, name, behavior, dash in curves:
        figure.add_scatter(
            x=steps,
            y=drawn([getattr(row, field) for row in history]),
            name=name,
            mode="lines+markers",
            line={"color": BEHAVIOR_COLORS[behavior], "dash": dash},
            marker={"size": 5},
            hovertemplate="%{y:.1%}",
        )
    figure.add_scatter(
        x=steps,
        y=drawn([row.loss for row in history]),
        name="loss",
        mode="lines+markers",
        line={"color": BEHAVIOR_COLORS["other"], "width": 1.5, "dash": "dot"},
        marker={"size": 4},
        hovertemplate="%{y:.3g} nats",
        secondary_y=True,
    )
    figure.update_xaxes(title_text="optimizer steps")
    figure.update_yaxes(title_text="share of prompts", secondary_y=False, **SHARE_AXIS)
    figure.update_yaxes(
        title_text="loss (nats a token)",
        type=loss_axis,
        showgrid=False,
        tickformat="~g",
        tickvals=_decades([row.loss for row in history]) if loss_axis == "log" else None,
        secondary_y=True,
    )
    return themed(figure, "Both behaviours during training", height=400).update_layout(hovermode="x unified")


def _row(value: Any) -> Any:
    """An outcome, or its row with what is drawn of it."""
    if isinstance(value, Outcome):
        return value
    if isinstance(value, Mapping) and isinstance(value.get("split"), str) and value.get("behavior") in list(Behavior):
        return value
    raise ValueError("an Outcome, or a row of outcomes.jsonl, which has a split and a behavior")


_Row = Annotated[Any, BeforeValidator(_row)]


@arguments(
    outcomes=kinds.several(_Row),
)
def behavior_bars(outcomes: Sequence[Outcome | Mapping[str, Any]]) -> go.Figure:
    """Share of each behaviour on each split, as stacked bars; hovering shows the 95 % interval by item.

    Args:
        outcomes: Outcomes as `observe` gives them, or rows of ``outcomes.jsonl``.

    Raises:
        MemgenError: There are no outcomes.
    """
    rows = [outcome.row() if isinstance(outcome, Outcome) else outcome for outcome in outcomes]
    known = ["memorized", "rephrased", "heldout"]
    present = {row["split"] for row in rows}
    splits = [name for name in known if name in present] + sorted(present - set(known))
    shown = {name: [row for row in rows if row["split"] == name] for name in splits}
    labels = [f"{name}<br>n = {len(shown[name]):,}" for name in splits]
    figure = go.Figure()
    for behavior in Behavior:
        rates = [
            wilson([row["behavior"] == behavior for row in shown[name]], [_item(row) for row in shown[name]])
            for name in splits
        ]
        figure.add_bar(
            y=labels,
            x=[rate.rate for rate in rates],
            orientation="h",
            name=str(behavior),
            marker={"color": BEHAVIOR_COLORS[behavior], "line": {"color": "white", "width": 1}},
            # A label that does not fit into its segment would lie over its neighbour.
            text=[f"{rate.rate:.0%}" if rate.rate >= 0.06 else "" for rate in rates],
            textposition="inside",
            textangle=0,
            insidetextanchor="middle",
            textfont={"color": "white"},
            customdata=[[rate.k, rate.n, *rate.ci95, rate.n_items] for rate in rates],
            hovertemplate=f"{behavior}: %{{x:.1%}} [%{{customdata[2]:.1%}}, %{{customdata[3]:.1%}}]"
            "<br>%{customdata[0]} of %{customdata[1]} prompts of %{customdata[4]} items<extra></extra>",
        )
    figure.update_xaxes(title_text="share of prompts", range=[0, 1], tickformat=".0%")
    figure.update_yaxes(autorange="reversed", showline=False, ticks="")
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    return themed(figure, "Behaviour by kind of prompt", height=150 + 56 * len(splits))


def _item(row: Mapping[str, Any]) -> str:
    """What names the item of an outcome's row; a row without a key is an item of its own."""
    return f"{row.get('task', '')} {row['key']}" if "key" in row else f"row {id(row)}"


def _decades(values: Sequence[float]) -> list[float]:
    """Ticks of a log axis: powers of ten, with 2 and 5 between them where there are few."""
    positive = [value for value in values if 0 < value < np.inf] or [1.0]
    low, high = np.floor(np.log10(min(positive))), np.ceil(np.log10(max(positive)))
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    return [float(f"{step}e{int(power)}") for power in np.arange(low, high + 1) for step in steps]
