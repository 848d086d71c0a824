"""One self-contained HTML report of a run directory, to be opened offline and handed to a colleague.

Does not measure anything: what a run does not hold, the report says is missing, with the run's own reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.files import write_text
from memgen_lens.core.items import Outcome, same_items
from memgen_lens.core.ownership import require_ours
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import wilson
from memgen_lens.core.steering_records import SteeringTable, SweepRow
from memgen_lens.core.types import Behavior
from memgen_lens.viz import figures, guard_wording, wording
from memgen_lens.viz.contents import RunContents, read_run
from memgen_lens.viz.neuron_page import neuron_facts
from memgen_lens.viz.rendering import figure_html, listed, template
from memgen_lens.viz.steering_tables import effect_rows, other_outputs, rate_rows, task_rows
from memgen_lens.viz.theme import BEHAVIOR_COLORS

EXAMPLES = 3
"""Example prompts shown for each split and behaviour."""
SHORT_PROMPT = 24
"""Prompts of at most this many characters leave room for two tables side by side."""


@arguments(directory=kinds.place("write_report"))
def write_report(directory: str | Path) -> Path:
    """Write ``report.html`` into a run directory, whole or not at all.

    The file holds plotly.js and every figure; nothing is loaded from elsewhere.

    Args:
        directory: A run directory, as `memgen_lens.run_experiment` writes it.

    Returns:
        The path of the report.

    Raises:
        RunDirectoryError: A file of the run is missing or damaged, the report cannot be written, or a ``report.html``
            is there that is not ours.
    """
    run = read_run(directory)
    path = run.directory / "report.html"
    require_ours([path], call=f"write_report({str(directory)!r})")
    write_text(path, render(run))
    return path


def render(run: RunContents) -> str:
    """The report of a run as HTML."""
    tables = _tables(run)
    return template("report.html.j2").render(
        run=run,
        title=_title(run),
        verdict=wording.verdict(run),
        key_figures=wording.key_figures(run),
        figures={name: figure_html(name, figure) for name, figure in _figures(run)},
        splits=_splits(run),
        facts=_facts(run),
        examples=_examples(run.outcomes),
        long_prompts=max((len(outcome.item.prompt) for outcome in run.outcomes), default=0) > SHORT_PROMPT,
        sites=[_site(scores) for scores in run.scores],
        neurons=[neuron_facts(neuron) for neuron in run.neurons],
        tables=tables,
        guard_verdict=guard_wording.guard_verdict(run.guard) if run.guard is not None else None,
        mode_findings=guard_wording.mode_findings(run.mode) if run.mode is not None else [],
        mode_rows=guard_wording.mode_rows(run.mode) if run.mode is not None else [],
        mode_over=guard_wording.over(run.mode) if run.mode is not None else "",
        halves=run.halves.summary() if run.halves is not None else None,
        steering_rows={mode: rate_rows(table) for mode, table in tables.items()},
        others=[block for mode, table in tables.items() for block in other_outputs(mode, table)],
        effects=[row for mode, table in tables.items() for row in effect_rows(mode, table)],
        by_task={mode: rows for mode, table in tables.items() if (rows := task_rows(table))},
        sweep_rows=_best_rows(run),
        toward=((run.config.get("settings") or {}).get("analysis") or {}).get("toward"),
        settings=_settings(run.config),
        colors=BEHAVIOR_COLORS,
        plotlyjs=get_plotlyjs(),
    )


def _title(run: RunContents) -> str:
    task = run.config.get("task") or {}
    name = task.get("name") if isinstance(task, Mapping) else task
    return str(name or run.metrics.get("preset") or run.directory.name)


def _figures(run: RunContents) -> Iterator[tuple[str, go.Figure]]:
    """Every figure that the run has the records for, by the name the template knows."""
    if run.history:
        yield "training", figures.training_curves(run.history)
    if run.outcomes:
        yield "behavior", figures.behavior_bars(run.outcomes)
    for scores in run.scores:
        yield f"nmd-{scores.site}", figures.nmd_heatmap(scores)
    if run.scores:
        yield "rho", figures.rho_by_layer(run.scores)
        ranked = [scores for scores in run.scores if np.isfinite(scores.score).any()]
        if ranked:
            yield "top-neurons", figures.top_neurons(ranked[:2], top=15)
    for number, neuron in enumerate(run.neurons):
        yield f"neuron-{number}", figures.neuron_activations(neuron)
    if run.probes is not None:
        yield "probe", figures.probe_by_layer(run.probes)
        if run.probes.learning_curve:
            yield "learning", figures.learning_curve(run.probes)
    for mode, table in _tables(run).items():
        yield mode, figures.steering_rates(table)
    if any(row.layers is None for row in run.sweep):
        yield "sweep", figures.steering_sweep(run.sweep, chosen=_chosen(run))
    restricted = [row for row in run.sweep if row.layers is not None]
    if restricted:
        yield "layers", figures.steering_by_layer(restricted)
    if run.cost is not None:
        yield "cost", figures.steering_cost_curve(run.cost)
    if run.tuned is not None:
        yield "surface", figures.steering_surface(run.tuned)
    if run.guard is not None:
        yield "guard", figures.guard_trade_off(run.guard)
    if run.mode is not None:
        yield "mode", figures.mode_and_content(run.mode)
        if any(isinstance(row.positions, int) for row in run.mode.rows):
            yield "mode-positions", figures.mode_by_position(run.mode)
    if run.dynamics is not None:
        yield "dynamics", figures.dynamics(run.dynamics)
    if run.halves is not None:
        yield "halves", figures.split_half(run.halves)
    if run.tasks is not None:
        yield "overlap", figures.task_overlap(run.tasks)
        yield "probe-transfer", figures.probe_transfer(run.tasks)
        yield "steering-transfer", figures.steering_transfer(run.tasks)


def _chosen(run: RunContents) -> Any:
    """The setting that was swept and chosen: the one whose test results are reported."""
    swept = {row.setting for row in run.sweep if row.layers is None}
    return run.shift.setting if run.shift is not None and run.shift.setting in swept else None


def _splits(run: RunContents) -> list[dict[str, Any]]:
    """For each split, and each task of a mixture in it: n, the rate of each behaviour, outputs in memorized form."""
    tasks = list(dict.fromkeys(outcome.item.task for outcome in run.outcomes))
    kinds = [(split, None) for split in dict.fromkeys(outcome.item.split for outcome in run.outcomes)]
    if len(tasks) > 1:
        kinds = [(split, task) for split, _ in kinds for task in (None, *tasks)]
    rows = []
    for split, task in kinds:
        shown = [o for o in run.outcomes if o.item.split == split and task in (None, o.item.task)]
        if shown:
            independent = same_items(o.item for o in shown)
            rates = {str(b): wilson([o.behavior is b for o in shown], independent) for b in Behavior}
            name = split if task is None else f"{split}, {task}"
            form, n_items = sum(o.memorized_form for o in shown), len(set(independent))
            rows.append({"split": name, "n": len(shown), "n_items": n_items, "rates": rates, "form": form})
    return rows


def _facts(run: RunContents) -> list[tuple[str, str]]:
    """What was trained, in a few lines, as far as the settings are the usual ones."""
    settings = run.config.get("settings") or {}
    train = settings.get("train") or {}
    shape, base = train.get("model") or {}, run.config.get("base") or {}
    task = {"name": _title(run)} | {k: v for k, v in (settings.get("task") or {}).items() if k != "kind"}
    known = ("n_layers", "d_model", "n_heads", "d_mlp", "positional_embedding_type")
    facts = [
        ("Experiment", str(settings.get("about") or "")),
        ("Task", listed(task)),
        ("Model", listed({name: shape[name] for name in known if name in shape})),
        ("Pretrained model", str(run.config.get("model") or "") if base else ""),
        ("Weights before tuning", f"SHA-256 {base.get('sha256')}" if base else ""),
    ]
    if run.history:
        last = run.history[-1]
        facts.append(("Training", f"{last.step:,} steps, {last.tokens:,} tokens, {last.seconds:,.0f} s"))
    facts.append(("Stopped because", str(run.config.get("stop_reason") or "")))
    facts.append(("Seed", str(run.metrics.get("seed", ""))))
    return [(name, text) for name, text in facts if text]


def _examples(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The first few prompts of each split and behaviour; ``other`` in memorized form counts apart."""
    order = {name: place for place, name in enumerate(("memorized", "rephrased", "heldout"))}
    behaviors = list(Behavior)

    def kind(outcome: Outcome) -> tuple[int, str, int, bool]:
        split = outcome.item.split
        form = outcome.behavior == Behavior.OTHER and outcome.memorized_form
        return order.get(split, len(order)), split, behaviors.index(outcome.behavior), form

    groups = groupby(sorted(outcomes, key=kind), key=kind)
    return [outcome for _, group in groups for outcome in list(group)[:EXAMPLES]]


def _site(scores: NeuronScores) -> dict[str, Any]:
    """A site's line in the table of neurons: how many differ, and the one that differs most."""
    layer, neuron = divmod(int(np.nan_to_num(abs(scores.rho), nan=-1).argmax()), scores.rho.shape[1])
    return {
        "site": scores.site,
        "n": scores.rho.size,
        "fdr": int((scores.q <= 0.05).sum()),
        "family": int((scores.p_family <= 0.05).sum()),
        "rho": float(scores.rho[layer, neuron]),
        "layer": layer,
        "neuron": neuron,
    }


def _tables(run: RunContents) -> dict[str, SteeringTable]:
    """What was measured on the test pairs, by mode."""
    tables = {"shift": run.shift, "patch": run.patch, **run.fitted}
    return {mode: table for mode, table in tables.items() if table is not None}


def _best_rows(run: RunContents) -> list[tuple[SweepRow, bool]]:
    """The rows that were chosen, each marked so, then the row of largest gain of each site, mode and positions."""
    whole = sorted((row for row in run.sweep if row.layers is None), key=lambda row: row.gain, reverse=True)
    chosen = {table.setting for table in _tables(run).values()}
    best: dict[tuple[Any, ...], SweepRow] = {}
    for row in whole:
        best.setdefault((row.setting.site, row.setting.mode, row.setting.positions, row.setting.method), row)
    shown = [row for row in whole if row.setting in chosen or row in best.values()]
    return sorted(((row, row.setting in chosen) for row in shown), key=lambda pair: not pair[1])


def _settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Everything in ``config.json`` as tables of plain lines, whatever its keys are."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, value in config.items():
        inner = value if isinstance(value, Mapping) else {name: value}
        for key, entry in inner.items():
            group = f"{name}: {key}" if isinstance(entry, Mapping) else name if inner is value else "run"
            groups.setdefault(group, []).extend(_lines(entry, "" if isinstance(entry, Mapping) else key))
    groups.get("run", []).sort()
    return [(name, [line for line in lines if line[0] != "command"]) for name, lines in groups.items() if lines]


def _lines(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _lines(entry, f"{name}.{key}".removeprefix("."))
    else:
        yield name, value
