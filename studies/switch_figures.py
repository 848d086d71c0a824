"""Figures and tables of ``when_is_there_a_switch.csv``; runs nothing.

``python studies/switch_figures.py`` prints the tables; ``when_is_there_a_switch.py --draw`` writes the figures, as SVG
(which takes kaleido and a Chromium: ``pip install kaleido``).
"""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from memgen_lens.core.stats import mean_over_seeds
from memgen_lens.viz.theme import DIVERGING, SITE_COLORS, themed

Row = dict[str, Any]
TABLE = Path(__file__).parent / "when_is_there_a_switch.csv"
MAPS = TABLE.with_suffix(".json")
"""By run of the points without a factor changed, where recall is carried: layer x position."""
TEXTS = ("answers", "cue", "loss")
BASE: Row = {
    "lies": 0.0,
    "n_memorized": 200,
    "steps": 700,
    "share": 0.3,
    "loss": "answer",
    "width": 64,
    "layers": 2,
    "weight_decay": 0.01,
}
"""What a point has in common with all others, but for the one factor in which it differs."""
WORLDS = {
    ("apart", "none"): "answers apart, no cue",
    ("apart", "word"): "answers apart, a word",
    ("alike", "none"): "answers alike, no cue",
    ("alike", "word"): "answers alike, a word",
}
FACTORS = {
    "n_memorized": "memorized items",
    "steps": "steps",
    "share": "share of a batch",
    "loss": "loss on",
    "width": "width",
    "layers": "layers",
    "weight_decay": "weight decay",
}
MEASURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "flip": ("flip rate", lambda row: row["flip"]),
    "auroc": ("probe AUROC", lambda row: row["auroc"]),
    "to_rule": ("to the rule, above random", lambda row: row["to_rule"] - row["to_rule_random"]),
    "to_form": ("to memorized form, above random", lambda row: row["to_form"] - row["to_form_random"]),
    "to_memory": ("to the item's memory, above random", lambda row: row["to_memory"] - row["to_memory_random"]),
    "at_answer": ("carried at the answer position", lambda row: row["at_answer"]),
    "half": ("neurons without which half of recall is lost", lambda row: row["half"]),
    "half_random": ("the same of random neurons", lambda row: row["half_random"]),
    "area": ("area above random", lambda row: row["area"] - row["area_random"]),
}
"""By name, in words, and what is computed of a row; NaN where too little flips."""


def read(path: Path = TABLE) -> list[Row]:
    """The rows, numbers as numbers; NaN where a figure is missing."""
    with path.open() as file:
        return [
            {k: v if k in TEXTS else float(v) if v else float("nan") for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def at(rows: Sequence[Row], **settings: Any) -> list[Row]:
    """Rows of one point, or of several: what is not named is as in `BASE`."""
    wanted = BASE | settings
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def mean(rows: Sequence[Row], measure: str) -> tuple[float, float, int]:
    """Mean over seeds, half of Student's 95 % interval, and how many runs have the figure."""
    values = np.array([MEASURES[measure][1](row) for row in rows])
    return _mean(values[~np.isnan(values)])


def _mean(values: np.ndarray) -> tuple[float, float, int]:
    """NaN in place of an interval for a single seed, and where all are the same."""
    if not len(values):
        return float("nan"), float("nan"), 0
    mean, ci95 = mean_over_seeds(values, (-np.inf, np.inf))
    return mean, ci95[1] - mean if ci95 else float("nan"), len(values)


def between(
    rows: Sequence[Row], one: tuple[str, str], other: tuple[str, str], measure: str
) -> tuple[float, float, int]:
    """One world less the other, point by point and seed by seed, then the mean over seeds with its interval."""
    of = MEASURES[measure][1]
    key = ("lies", *FACTORS)
    sides = [
        {(row["seed"], *(row[name] for name in key)): of(row) for row in rows if (row["answers"], row["cue"]) == world}
        for world in (one, other)
    ]
    by_seed: dict[float, list[float]] = {}
    for point in sides[0].keys() & sides[1].keys():
        difference = sides[0][point] - sides[1][point]
        if not np.isnan(difference):
            by_seed.setdefault(point[0], []).append(difference)
    return _mean(np.array([np.mean(values) for values in by_seed.values()]))


def draw(into: Path) -> None:
    """Write all figures, an SVG file each."""
    rows = read()
    into.mkdir(parents=True, exist_ok=True)
    for name, figure, size in (
        ("switch_worlds", worlds(rows), (1000, 420)),
        ("switch_factors", factors(rows), (1000, 900)),
        ("switch_lies", lies(rows), (1000, 420)),
        ("switch_where", where(json.loads(MAPS.read_text())), (1000, 480)),
    ):
        figure.write_image(into / f"{name}.svg", width=size[0], height=size[1])


def worlds(rows: Sequence[Row]) -> go.Figure:
    """Every run of the four worlds, a panel a measure: is there a switch?"""
    measures = ("to_rule", "to_form", "to_memory", "auroc", "half", "flip")
    plot = make_subplots(rows=2, cols=3, subplot_titles=[MEASURES[name][0] for name in measures], vertical_spacing=0.2)
    rng = np.random.default_rng(0)
    for place, measure in enumerate(measures):
        for x, (world, label) in enumerate(WORLDS.items()):
            found = [row for row in rows if (row["answers"], row["cue"]) == world and row["lies"] == 0]
            values = np.array([MEASURES[measure][1](row) for row in found])
            plot.add_scatter(
                x=x + rng.uniform(-0.25, 0.25, len(values)),
                y=values,
                mode="markers",
                marker={"size": 5, "opacity": 0.6, "color": SITE_COLORS[x]},
                name=label,
                showlegend=place == 0,
                row=place // 3 + 1,
                col=place % 3 + 1,
            )
    plot.update_xaxes(showticklabels=False, showgrid=False, ticks="", range=[-0.5, len(WORLDS) - 0.5])
    plot.update_yaxes(range=[-0.1, 1.05])
    return _sized(themed(plot, "Is there a switch? A dot a run", height=520))


def factors(rows: Sequence[Row]) -> go.Figure:
    """What each factor does to steering, a row a direction, a panel a factor, a line a world."""
    measures = ("to_rule", "to_form", "half")
    plot = make_subplots(
        rows=len(measures),
        cols=len(FACTORS),
        shared_yaxes=True,
        subplot_titles=list(FACTORS.values()),
        vertical_spacing=0.08,
        horizontal_spacing=0.015,
    )
    for column, factor in enumerate(FACTORS, 1):
        for line, (world, label) in enumerate(WORLDS.items()):
            of_world = {"answers": world[0], "cue": world[1]}
            found = [row for row in rows if all(row[k] == v for k, v in of_world.items())]
            values = sorted({row[factor] for row in found}, key=lambda v: (isinstance(v, str), v))
            points = [at(found, **of_world, **{factor: value}) for value in values]
            for line_row, measure in enumerate(measures, 1):
                means = [mean(point, measure)[0] for point in points]
                plot.add_scatter(
                    x=[str(int(v)) if isinstance(v, float) and v == int(v) else str(v) for v in values],
                    y=means,
                    mode="lines+markers",
                    marker={"size": 6},
                    line={"color": SITE_COLORS[line], "width": 2},
                    name=label,
                    showlegend=column == 1 and line_row == 1,
                    row=line_row,
                    col=column,
                )
    plot.update_xaxes(type="category", tickangle=0, tickfont={"size": 10})
    plot.update_yaxes(range=[-0.1, 1.05])
    for line_row, measure in enumerate(measures, 1):
        plot.update_yaxes(title_text=MEASURES[measure][0], row=line_row, col=1)
    return _sized(themed(plot, "One factor at a time: means over seeds", height=900))


def lies(rows: Sequence[Row]) -> go.Figure:
    """What steering does where a cue lies, by how often it does."""
    measures = ("to_rule", "to_form", "auroc")
    plot = make_subplots(rows=1, cols=len(measures), subplot_titles=[MEASURES[name][0] for name in measures])
    lines = [(answers, cue) for answers in ("apart", "alike") for cue in ("word", "order")]
    for column, measure in enumerate(measures, 1):
        for line, (answers, cue) in enumerate(lines):
            values = sorted({row["lies"] for row in rows if row["cue"] == cue})
            found = [mean(at(rows, answers=answers, cue=cue, lies=value), measure) for value in values]
            plot.add_scatter(
                x=values,
                y=[one[0] for one in found],
                mode="lines+markers",
                line={"color": SITE_COLORS[line]},
                name=f"answers {answers}, cue: {cue}",
                showlegend=column == 1,
                row=1,
                col=column,
            )
    plot.update_xaxes(title_text="share of prompts on which the cue lies")
    plot.update_yaxes(range=[-0.1, 1.05])
    return _sized(themed(plot, "A cue that lies: means over seeds", height=420))


def where(maps: Sequence[Row]) -> go.Figure:
    """Where in the prompt recall is carried behind each attention, a panel a world: means over seeds."""
    kinds = [(answers, cue) for answers in ("apart", "alike") for cue in ("none", "word", "order")]
    plot = make_subplots(
        rows=2,
        cols=3,
        subplot_titles=[f"answers {answers}, cue: {cue}" for answers, cue in kinds],
        vertical_spacing=0.25,
    )
    for place, kind in enumerate(kinds):
        found = [np.array(one["where"]) for one in maps if (one["answers"], one["cue"]) == kind]
        if not found:
            continue
        effect = np.mean(found, axis=0)
        tokens = [*(["word"] if kind[1] == "word" else []), *"12+34="]
        plot.add_heatmap(
            z=effect,
            x=[f"{token}<br>{i}" for i, token in enumerate(tokens)],
            y=[f"block {layer}" for layer in range(len(effect))],
            text=np.round(effect, 2).astype(str),
            texttemplate="%{text}",
            textfont={"size": 10},
            zmin=-1,
            zmax=1,
            colorscale=DIVERGING,
            showscale=False,
            row=place // 3 + 1,
            col=place % 3 + 1,
        )
    plot.update_xaxes(type="category")
    return _sized(themed(plot, "Where recall is carried", height=480))


def _sized(figure: go.Figure) -> go.Figure:
    """With smaller headings of panels, of which there are many."""
    figure.for_each_annotation(lambda note: note.update(font={"size": 12}))
    return figure.update_layout(margin={"l": 60, "r": 20, "t": 70, "b": 80})


def tables(rows: Sequence[Row]) -> str:
    """The tables of the page: worlds, factors, lies, as Markdown."""
    heads = [MEASURES[name][0] for name in MEASURES]
    lines = ["| world | runs | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for world, label in WORLDS.items():
        found = [row for row in rows if (row["answers"], row["cue"]) == world and row["lies"] == 0]
        by_seed = [[row for row in found if row["seed"] == seed] for seed in sorted({row["seed"] for row in found})]
        cells = []
        for of in (one[1] for one in MEASURES.values()):
            means = [np.nanmean([of(row) for row in group]) for group in by_seed]
            cells.append(_cell(_mean(np.array(means))))
        lines.append(f"| {label} | {len(found)} | {' | '.join(cells)} |")
    lines += ["", "| point | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for world, label in WORLDS.items():
        of_world = {"answers": world[0], "cue": world[1]}
        lines.append(f"| **{label}** | " + _cells(at(rows, **of_world)))
        for factor, words in FACTORS.items():
            values = {row[factor] for row in rows if (row["answers"], row["cue"]) == world} - {BASE[factor]}
            for value in sorted(values):
                shown = f"{value:g}" if isinstance(value, float) else value
                lines.append(f"| {words} {shown} | " + _cells(at(rows, **of_world, **{factor: value})))
    for answers in ("apart", "alike"):
        for cue in ("word", "order"):
            for value in sorted({row["lies"] for row in rows if row["cue"] == cue}):
                found = at(rows, answers=answers, cue=cue, lies=value)
                lines.append(f"| answers {answers}, cue: {cue}, lies {value:g} | " + _cells(found))
    return "\n".join(lines)


def _cells(rows: Sequence[Row]) -> str:
    return " | ".join(_cell(mean(rows, measure)) for measure in MEASURES) + " |"


def _cell(found: tuple[float, float, int]) -> str:
    value, half, n = found
    if not n:
        return "–"
    shown = f"{round(value, 2) + 0.0:.2f}"  # no minus before nothing
    return shown + ("" if np.isnan(half) else f" ± {half:.2f}") + (f" ({n})" if n < 3 else "")


if __name__ == "__main__":
    print(tables(read()))
