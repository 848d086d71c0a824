"""Runs side by side: means over seeds, differences paired by seed, and what each setting changes.

Does not run or draw anything: see `memgen_lens.many` and `memgen_lens.viz.compare_page`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.comparison_records import Comparison, Difference, Effect, Group, Measured, OverSeeds
from memgen_lens.core.errors import RunDirectoryError, SettingsError, suggest
from memgen_lens.core.files import to_json
from memgen_lens.core.run_records import Runs
from memgen_lens.core.stats import mean_over_seeds

Row = dict[str, Any]
INFINITY = float("inf")


@dataclass(frozen=True)
class Source:
    """Where a figure stands in the table of runs.

    Attributes:
        value: Its column.
        less: Column of what is taken off it: its control.
        ci95: Columns of its interval over items, without ``.0`` and ``.1``.
        n: Column of the number of prompts or pairs.
        n_items: Column of the number of items.
        bounds: What it can be.
    """

    value: str
    less: str | None = None
    ci95: str | None = None
    n: str | None = None
    n_items: str | None = None
    bounds: tuple[float, float] = (0.0, 1.0)


def _steered(way: str, rate: str, ci95: str, control: str, short: str) -> dict[str, Source]:
    block = f"steering.{way}"
    random = f"{block}.controls.random_neurons.{control}"
    return {
        f"{block}.{rate}": Source(
            f"{block}.{rate}", ci95=f"{block}.{ci95}", n=f"{block}.n", n_items=f"{block}.n_items"
        ),
        f"{block}.{short}above_random": Source(f"{block}.{rate}", less=random, bounds=(-1.0, 1.0)),
    }


FIGURES: dict[str, Source] = {
    **{
        f"behavior.{name}": Source(
            f"behavior.{name}",
            ci95=f"behavior.ci95.{name}",
            n=f"behavior.n.{split}",
            n_items=f"behavior.n_items.{split}",
        )
        for name, split in (("heldout_generalization", "heldout"), ("trained_memorization", "memorized"))
    },
    "behavior.flip_rate": Source("behavior.flip_rate", ci95="behavior.ci95.flip_rate"),
    "probe.best_auroc": Source("probe.best_auroc", ci95="probe.best_auroc_ci95", n="probe.n", n_items="probe.n_items"),
    "probe.above_prompt": Source("probe.best_auroc", less="probe.input_only_auroc", bounds=(-1.0, 1.0)),
    **_steered("to_generalization", "shift_rate", "ci95", "mean", ""),
    **_steered("to_memorization", "exact_recall_rate", "ci95", "mean", "exact_recall_"),
    **_steered(
        "to_memorization", "memorized_form_rate", "memorized_form_ci95", "memorized_form.mean", "memorized_form_"
    ),
}
"""What is compared where nothing else is asked for; ``above_random`` is a rate less that of random neurons."""


@arguments(
    runs=kinds.one(Runs) | kinds.several(kinds.place("compare(runs)")),
    figures=kinds.several(kinds.Text) | None,
    reference=kinds.Text | None,
)
def compare(
    runs: Runs | str | Path | Sequence[str | Path],
    *,
    figures: Sequence[str] | None = None,
    reference: str | None = None,
) -> Comparison:
    """Lay runs side by side: means with intervals over seeds, differences paired by seed, the effect of each setting.

    Runs that differ in their seed alone are one group. A group's interval is Student's over its seeds: each run draws
    its items and its first weights anew, so that this covers both, and the interval that a run gives of itself (over
    its items) stands beside each. Intervals are of one figure each, not of all together.

    Args:
        runs: Folders of `run_many`, run directories, ``runs.parquet`` files, or a table of runs.
        figures: Names in `memgen_lens.comparison.FIGURES`, or columns of the table that hold numbers; default: those
            of `FIGURES` that some run has.
        reference: Label of the group that the others are compared with; default: the first.

    Raises:
        RunDirectoryError: There is no run that is done, or a file is damaged.
        SettingsError: A figure or the reference is unknown.
    """
    table = runs if isinstance(runs, Runs) else Runs.load(runs)
    done = table.with_status("done")
    left_out = {row["run"]: row.get("error") or row["status"] for row in table.table if row["status"] != "done"}
    if not done.table:
        raise RunDirectoryError(
            "compare(runs)",
            expected="at least one run that is done",
            received=table.summary(),
            fix="Wait until runs have ended, or begin them again.",
        )
    sources = _sources(done, figures)
    settings = _varying(done)
    members: dict[str, list[Row]] = {}
    for row in done.table:
        members.setdefault(to_json([row.get(name) for name in settings]), []).append(row)
    several = [_group(rows, tuple(settings), sources) for rows in members.values()]
    several.sort(key=lambda group: [_place(values, group.settings[name]) for name, values in settings.items()])
    first = _reference(several, reference)
    groups = (first, *(group for group in several if group is not first))
    return Comparison(
        figures=tuple(sources),
        settings=settings,
        groups=groups,
        differences=tuple(_difference(name, group, first, sources[name]) for group in groups[1:] for name in sources),
        effects=tuple(_effects(done.table, settings, sources)),
        left_out=left_out,
    )


def _sources(done: Runs, asked: Sequence[str] | None) -> dict[str, Source]:
    columns = set(done.columns)
    if asked is None:
        kept = {
            name: source for name, source in FIGURES.items() if {source.value, source.less or source.value} <= columns
        }
        return {
            name: source
            for name, source in kept.items()
            if any(row.get(source.value) is not None for row in done.table)
        }
    found = {}
    for name in dict.fromkeys(asked):
        values = [row.get(name) for row in done.table]
        if name in FIGURES:
            found[name] = FIGURES[name]
        elif name in done.figures and all(value is None or isinstance(value, int | float) for value in values):
            found[name] = Source(name, bounds=(-INFINITY, INFINITY))
        else:
            raise SettingsError(
                "compare(figures=...)",
                expected="figures of the runs, which are numbers",
                received=repr(name),
                fix=suggest(name, [*FIGURES, *done.figures]),
            )
    return found


def _varying(done: Runs) -> dict[str, tuple[Any, ...]]:
    """Settings in which runs differ, seeds aside, with their values in order."""
    varying = {}
    for name in done.settings:
        if name.rsplit(".", 1)[-1] == "seed":
            continue
        values: list[Any] = list({to_json(row.get(name)): row.get(name) for row in done.table}.values())
        if len(values) > 1:
            numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            varying[name] = tuple(sorted(values) if numbers else values)
    return varying


def _place(values: Sequence[Any], value: Any) -> int:
    return [to_json(one) for one in values].index(to_json(value))


def _value(row: Row, source: Source) -> float | None:
    value, less = row.get(source.value), row.get(source.less) if source.less else 0.0
    return None if value is None or less is None else float(value) - float(less)


def _measured(row: Row, source: Source) -> Measured:
    ends = [row.get(f"{source.ci95}.{end}") for end in (0, 1)] if source.ci95 else [None]
    return Measured(
        run=row["run"],
        seed=row.get("seed", 0),
        value=_value(row, source),
        ci95=None if None in ends else (float(ends[0]), float(ends[1])),  # pyright: ignore[reportArgumentType]
        n=row.get(source.n) if source.n else None,
        n_items=row.get(source.n_items) if source.n_items else None,
    )


def _group(rows: Sequence[Row], names: Sequence[str], sources: Mapping[str, Source]) -> Group:
    rows = sorted(rows, key=lambda row: row.get("seed", 0))
    settings = {name: rows[0].get(name) for name in names}
    return Group(
        label=", ".join(f"{_short(name, names)}={_words(value)}" for name, value in settings.items()) or "all runs",
        settings=settings,
        runs={name: tuple(_measured(row, source) for row in rows) for name, source in sources.items()},
        over_seeds={
            name: _over_seeds([_value(row, source) for row in rows], source.bounds) for name, source in sources.items()
        },
    )


def _short(name: str, names: Sequence[str]) -> str:
    last = name.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in names) == 1 else name


def _words(value: Any) -> str:
    return value if isinstance(value, str) else to_json(value)


def _over_seeds(values: Sequence[float | None], bounds: tuple[float, float]) -> OverSeeds:
    known = [value for value in values if value is not None]
    if not known:
        return OverSeeds(None, None, 0, len(values))
    mean, ci95 = mean_over_seeds(np.array(known), bounds)
    return OverSeeds(mean, ci95, len(known), len(values) - len(known))


def _reference(groups: Sequence[Group], label: str | None) -> Group:
    labels = [group.label for group in groups]
    if label is None:
        return groups[0]
    if label not in labels:
        raise SettingsError(
            "compare(reference=...)", expected="the label of a group", received=repr(label), fix=suggest(label, labels)
        )
    return groups[labels.index(label)]


def _difference(name: str, group: Group, reference: Group, source: Source) -> Difference:
    """Seeds that both have, each the mean of its runs: the same folder may be given twice, or hold two versions."""
    ours, theirs = (_by_seed(one.runs[name]) for one in (group, reference))
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return Difference(name, group.label, reference.label, _over_seeds(differences, _spread(source.bounds)))


def _by_seed(runs: Sequence[Measured]) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for run in runs:
        if run.value is not None:
            values.setdefault(run.seed, []).append(run.value)
    return {seed: float(np.mean(of_seed)) for seed, of_seed in values.items()}


def _spread(bounds: tuple[float, float]) -> tuple[float, float]:
    return bounds[0] - bounds[1], bounds[1] - bounds[0]


def _effects(rows: Sequence[Row], settings: Mapping[str, Sequence[Any]], sources: Mapping[str, Source]) -> list[Effect]:
    effects = []
    for setting, values in settings.items():
        others = [name for name in settings if name != setting]
        twins: dict[str, dict[str, Row]] = {}
        for row in rows:
            rest = to_json([row.get("seed", 0), *(row.get(name) for name in others)])
            twins.setdefault(rest, {})[to_json(row.get(setting))] = row
        for value in values[1:]:
            for name, source in sources.items():
                by_seed = _paired(
                    twins.values(), to_json(values[0]), to_json(value), lambda row, s=source: _value(row, s)
                )
                found = [float(np.mean(differences)) for differences in by_seed.values()]
                if found:
                    over_seeds = _over_seeds(found, _spread(source.bounds))
                    n_pairs = sum(map(len, by_seed.values()))
                    effects.append(Effect(setting, value, values[0], name, over_seeds, n_pairs))
    return effects


def _paired(twins: Any, reference: str, value: str, measure: Callable[[Row], float | None]) -> dict[int, list[float]]:
    """By seed, the differences of runs that are alike in all but one setting."""
    by_seed: dict[int, list[float]] = {}
    for alike in twins:
        if reference in alike and value in alike:
            ours, theirs = measure(alike[value]), measure(alike[reference])
            if ours is not None and theirs is not None:
                by_seed.setdefault(alike[value].get("seed", 0), []).append(ours - theirs)
    return by_seed
