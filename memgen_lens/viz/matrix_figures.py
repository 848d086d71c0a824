"""Figures of consistency that hold every model or task against every other: adapters of one model, tasks of a mixture.

Public through `memgen_lens.viz.figures`. Does not compute: values are drawn as recorded.
"""

from collections.abc import Sequence
from html import escape
from textwrap import shorten, wrap
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import AdapterConsistency, Matrix, TaskConsistency
from memgen_lens.viz.theme import (
    BEHAVIOR_COLORS,
    SITE_COLORS,
    UNKNOWN,
    counted,
    drawn,
    sequential,
    themed,
)

STEERING_PANELS = (
    ("to_generalization", "to_generalization_other", "towards generalization: the rule's answer", "generalization"),
    ("memorized_form", "to_memorization_other", "towards memorization: memorized form", "memorization"),
    ("exact_recall", "to_memorization_other", "towards memorization: exact recall", "memorization"),
)


@arguments(
    result=kinds.one(AdapterConsistency),
)
def adapter_overlap(result: AdapterConsistency) -> go.Figure:
    """How far models tuned from one pretrained model have the same neurons: overlap of top sets, correlation of scores.

    ``chance`` is the mean overlap of random sets with as many neurons in each layer, ``labels exchanged`` that with top
    sets of labels which say nothing (where activations were given); hovering shows p, too.

    Args:
        result: At least two models compared.
    """

    def under(text: str, values: Float[np.ndarray, "model model"], p: Float[np.ndarray, "model model"]) -> Any:
        return lambda i, j: (
            f"{text} {_text(values[i, j], '.3f')} (p {_text(p[i, j], '.2g')} of {result.n_permutations:,} permutations)"
            f"<br>{_text(result.n_neurons[i, j], ',.0f')} neurons"
        )

    n = len(result.models)
    chance, exchanged = result.overlap_expected_within_layers, result.overlap_exchanged
    told = np.isfinite(exchanged).any()

    def cell(i: int, j: int) -> str:
        text = f"{_text(result.overlap[i, j], '.0%')}<br>chance {_text(chance[i, j], '.0%')}"
        return text + (f"<br>labels exchanged {_text(exchanged[i, j], '.0%')}" if told else "")

    def against(i: int, j: int) -> str:
        text = under("by chance within layers", chance, result.overlap_p)(i, j)
        p = _text(result.overlap_exchanged_p[i, j], ".2g")
        return text + (f"<br>with labels exchanged {_text(exchanged[i, j], '.3f')} (p {p})" if told else "")

    share = [[cell(i, j) for j in range(n)] for i in range(n)]
    rank = [[_text(result.rank_correlation[i, j], ".2f") for j in range(n)] for i in range(n)]
    panels = (f"overlap of the top {100 * result.top_fraction:g} %", "rank correlation of scores")
    figure = _panels(panels)
    hover = _cells(result.models, against, join="and")
    _draw(figure, result.overlap, share, hover, "overlap", sequential(SITE_COLORS[0]), (0.0, 1.0), 1)
    shuffled = under("by permutation", result.rank_correlation_expected, result.rank_correlation_p)
    hover = _cells(result.models, shuffled, join="and")
    _draw(figure, result.rank_correlation, rank, hover, panels[1], _diverging(), (-1.0, 1.0), 2)
    _named(figure, result.models)
    return themed(figure, f"Same neurons? {escape(result.site)}", height=150 + (80 if told else 62) * n)


@arguments(
    result=kinds.one(TaskConsistency),
)
def task_overlap(result: TaskConsistency) -> go.Figure:
    """How far two tasks have the same neurons: overlap of their top sets, and rank correlation of rho.

    Rows are ranked on the source's ``select`` pairs, columns on the target's ``test`` pairs; the diagonal is one task
    on two sets of items. ``chance`` is the mean overlap of random sets with as many neurons in each layer; hovering
    shows it for random sets over all neurons, too.

    Args:
        result: The tasks of a mixture compared.
    """
    overlap, rank = result.overlap, result.rank_correlation
    chance = _cells(
        result.tasks,
        lambda i, j: (
            f"{_interval(overlap, i, j, '.1%')}, {_counted(overlap, i, j, 'pairs')}"
            f"<br>by chance {_text(result.overlap_expected[i, j], '.1%')} (p {_text(result.overlap_p[i, j], '.2g')})"
            f"<br>within layers {_text(result.overlap_expected_within_layers[i, j], '.1%')}"
            f" (p {_text(result.overlap_p_within_layers[i, j], '.2g')})"
        ),
    )
    ends = _cells(result.tasks, lambda i, j: f"{_interval(rank, i, j, '.3f')}, {_counted(rank, i, j, 'pairs')}")
    panels = (f"overlap of the top {100 * result.top_fraction:g} %", "rank correlation of rho")
    figure = _panels(panels)
    beside = ("chance", result.overlap_expected_within_layers)
    scale = sequential(SITE_COLORS[0])
    _draw(figure, overlap.value, _with_interval(overlap, ".0%", beside), chance, "overlap", scale, (0.0, 1.0), 1)
    _draw(figure, rank.value, _with_interval(rank, ".2f"), ends, panels[1], _diverging(), (-1.0, 1.0), 2)
    return _finished(figure, result, f"Same neurons? {escape(result.site)}")


@arguments(
    result=kinds.one(TaskConsistency),
)
def probe_transfer(result: TaskConsistency) -> go.Figure:
    """AUROC of each task's probe on each task's test prompts, with its 95 % interval.

    Colours run from chance (0.5) to 1; below chance the probe reads the other task the wrong way round.

    Args:
        result: The tasks of a mixture compared.
    """
    figure = _panels(["AUROC of the source's probe"])
    text = _with_interval(result.probe, ".2f")
    hover = _cells(
        result.tasks,
        lambda i, j: (
            f"{_interval(result.probe, i, j, '.3f')}, {_counted(result.probe, i, j, 'prompts')}, "
            f"layer {result.probe_layers[i]}"
        ),
    )
    _draw(figure, result.probe.value, text, hover, "AUROC", _diverging(), (0.0, 1.0), 1)
    return _finished(figure, result, f"Probes across tasks: {escape(result.site)}")


@arguments(
    result=kinds.one(TaskConsistency),
)
def steering_transfer(result: TaskConsistency) -> go.Figure:
    """Steering each task's test prompts with each task's neurons, both ways, with 95 % intervals.

    Hovering shows the rate of random neurons shifted as hard, the rate of outputs that are neither answer, and the
    source's setting.

    Args:
        result: The tasks of a mixture compared.
    """
    figure = _panels([title for _, _, title, _ in STEERING_PANELS], columns=1, n_rows=len(result.tasks))
    for row, (name, other, title, behavior) in enumerate(STEERING_PANELS, start=1):
        matrix, random = result.steering[name], result.random_neurons[name]
        others = result.steering[other].value

        def hover(i: int, j: int, matrix: Matrix = matrix, random: Any = random, others: Any = others) -> str:
            setting = result.settings[i]
            return (
                f"{_interval(matrix, i, j, '.1%')}, {_counted(matrix, i, j, 'prompts')}"
                f"<br>random neurons {_text(random[i, j], '.1%')}, other {_text(others[i, j], '.1%')}"
                f"<br>top {100 * setting.top_fraction:g} %, alpha {setting.alpha:g}, positions {setting.positions}"
            )

        scale = sequential(BEHAVIOR_COLORS[behavior])
        text = _with_interval(matrix, ".0%", ("random", random))
        _draw(figure, matrix.value, text, _cells(result.tasks, hover), title, scale, (0.0, 1.0), 1, row)
    return _finished(figure, result, f"Steering across tasks: {escape(result.site)}", rows=len(STEERING_PANELS))


def _panels(titles: Sequence[str], *, columns: int | None = None, n_rows: int = 1) -> go.Figure:
    """Heatmaps side by side, or below each other with ``n_rows`` rows each."""
    columns = columns or len(titles)
    figure = make_subplots(
        rows=len(titles) // columns,
        cols=columns,
        subplot_titles=titles,
        shared_yaxes=columns > 1,
        horizontal_spacing=0.06,
        vertical_spacing=0.36 / (1 + n_rows) if columns == 1 and len(titles) > 1 else None,
    )
    return figure.update_annotations(font_size=13)


def _draw(
    figure: go.Figure,
    values: Float[np.ndarray, "source target"],
    text: list[list[str]],
    hover: list[list[str]],
    name: str,
    scale: Any,
    span: tuple[float, float],
    column: int,
    row: int = 1,
) -> None:
    figure.add_heatmap(
        z=drawn(values),
        text=text,
        texttemplate="%{text}",
        customdata=hover,
        colorscale=scale,
        zmin=span[0],
        zmax=span[1],
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate=f"{name}: %{{z:.3f}}<br>%{{customdata}}<extra></extra>",
        row=row,
        col=column,
    )


def _finished(figure: go.Figure, result: TaskConsistency, title: str, *, rows: int = 1) -> go.Figure:
    _named(figure, result.tasks)
    last = rows if rows > 1 else 1
    figure.update_xaxes(title_text="tested on", row=last)
    figure.update_yaxes(title_text="made on", col=1)
    return themed(figure, title, height=150 + rows * (50 + 62 * len(result.tasks)))


def _named(figure: go.Figure, of: Sequence[str]) -> None:
    """Write what rows and columns are of."""
    names = [shorten(name.replace("_", " ") or "unnamed", 40, placeholder="…") for name in of]
    ticks = {"tickvals": list(range(len(names))), "ticktext": ["<br>".join(map(escape, wrap(n, 14))) for n in names]}
    figure.update_xaxes(showgrid=False, ticks="", tickangle=0, **ticks)
    figure.update_yaxes(showgrid=False, ticks="", autorange="reversed", **ticks)


def _cells(of: Sequence[str], make: Any, *, join: str = "to") -> list[list[str]]:
    """For every row and column a line that names them, and what ``make`` says of them."""
    names = [escape(name or "unnamed") for name in of]
    first = "from " if join == "to" else ""
    return [
        [f"{first}{row} {join} {column}<br>{make(i, j)}" for j, column in enumerate(names)]
        for i, row in enumerate(names)
    ]


def _with_interval(matrix: Matrix, form: str, beside: tuple[str, np.ndarray] | None = None) -> list[list[str]]:
    """The figure, below it its interval and, where there is one, the share to compare it with."""
    n_rows, n_columns = matrix.value.shape
    scale, digits = (100, 0) if form.endswith("%") else (1, 2)

    def cell(i: int, j: int) -> str:
        if not np.isfinite(matrix.value[i, j]):
            return UNKNOWN
        ends = "[" + ", ".join(_text(scale * end[i, j], f".{digits}f") for end in (matrix.low, matrix.high)) + "]"
        below = "" if beside is None else f"<br>{beside[0]} {_text(beside[1][i, j], '.0%')}"
        return f"{format(matrix.value[i, j], form)}<br>{ends}{below}"

    return [[cell(i, j) for j in range(n_columns)] for i in range(n_rows)]


def _text(value: Any, form: str) -> str:
    """A number as text, or a dash where there is none."""
    return format(value, form) if np.isfinite(value) else UNKNOWN


def _interval(matrix: Matrix, i: int, j: int, form: str) -> str:
    return f"95 % [{_text(matrix.low[i, j], form)}, {_text(matrix.high[i, j], form)}]"


def _counted(matrix: Matrix, i: int, j: int, what: str) -> str:
    return counted(int(matrix.n[i, j]), int(matrix.n_items[i, j]), what)


def _diverging() -> list[list[float | str]]:
    """White in the middle: no relation, chance; one colour either way, none of them a behaviour's."""
    return [[0.0, SITE_COLORS[1]], [0.5, "#ffffff"], [1.0, SITE_COLORS[0]]]
