"""A run directory read back into records, or an error that names the file at fault.

Does not draw or judge what it reads. A stage that says in ``metrics.json`` why it has no figures may lack its
file; every other file must be there and whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from memgen_lens.core.consistency_records import SplitHalf, TaskConsistency
from memgen_lens.core.cost_records import FILE as COST
from memgen_lens.core.cost_records import SteeringCost
from memgen_lens.core.dynamics_records import FILE as DYNAMICS
from memgen_lens.core.dynamics_records import Dynamics
from memgen_lens.core.errors import MemgenError, RunDirectoryError
from memgen_lens.core.files import damaged, missing, read_json, read_jsonl, user_path
from memgen_lens.core.guard_records import FILE as GUARD
from memgen_lens.core.guard_records import GuardTable
from memgen_lens.core.items import Item, Outcome
from memgen_lens.core.metrics import SCHEMA
from memgen_lens.core.mode_records import FILE as MODE
from memgen_lens.core.mode_records import ModeContent
from memgen_lens.core.neuron_records import FILE as NEURONS
from memgen_lens.core.neuron_records import NeuronRecord, load_neurons
from memgen_lens.core.records import Evaluation, NeuronScores, ProbeReport, ProbeScores
from memgen_lens.core.steering_records import SteeringTable, SweepRow
from memgen_lens.core.tuning_records import FILE as TUNED
from memgen_lens.core.tuning_records import TunedSteering
from memgen_lens.core.types import Behavior, FittedKind

T = TypeVar("T")


@dataclass(frozen=True)
class RunContents:
    """All that a report shows of one run.

    Attributes:
        directory: Where it was read from.
        config: ``config.json`` as it is.
        metrics: ``metrics.json`` as it is.
        history: Evaluations of the training.
        outcomes: One outcome a prompt.
        pairs: Rows of ``pairs.jsonl``; empty where no prompt flipped.
        scores: Neuron scores, a site each.
        neurons: The top neurons, looked at one by one, where somebody has.
        probes: The probes' report, or None.
        sweep: Steering settings tried on ``tune``: for all layers, then the chosen one layer by layer.
        shift: Steering by shifting on ``test``, or None.
        patch: Steering by patching on ``test``, or None.
        fitted: Steering by fitted rules and an optimized direction on ``test``, by mode, where somebody has measured
            it.
        optimized: What directions optimized at one layer each did on ``tune``.
        cost: What the shift reaches against what it costs, strength by strength, where somebody has measured it.
        tuned: What `memgen_lens.tune_steering` tried and chose, where somebody has saved it here.
        guard: The guard on ``test``, where somebody has measured it.
        mode: Mode and content on ``test``, where somebody has measured them.
        halves: Agreement of two halves of the pairs, or None.
        tasks: The tasks of a mixture compared, or None.
        dynamics: Measurements over the checkpoints, where somebody has made them.
        why: By stage (``attribution``, ``probe``, ``steering``, ``shift``, ``patch``, ``consistency``,
            ``across_tasks``), why it has no figures.
    """

    directory: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: tuple[Evaluation, ...]
    outcomes: tuple[Outcome, ...]
    pairs: tuple[dict[str, Any], ...]
    scores: tuple[NeuronScores, ...]
    neurons: tuple[NeuronRecord, ...]
    probes: ProbeReport | None
    sweep: tuple[SweepRow, ...]
    shift: SteeringTable | None
    patch: SteeringTable | None
    fitted: dict[str, SteeringTable]
    optimized: tuple[SweepRow, ...]
    cost: SteeringCost | None
    tuned: TunedSteering | None
    guard: GuardTable | None
    mode: ModeContent | None
    halves: SplitHalf | None
    tasks: TaskConsistency | None
    dynamics: Dynamics | None
    why: dict[str, str]


def read_run(directory: str | Path) -> RunContents:
    """Read a run directory.

    Args:
        directory: A directory that a run of memgen_lens wrote.

    Raises:
        RunDirectoryError: A file is missing, damaged, or of another version of the format.
    """
    directory = user_path(directory, call="reading a run")
    metrics = _read(directory / "metrics.json", read_json, dict)
    if metrics.get("schema") != SCHEMA:
        raise RunDirectoryError(
            f"reading {directory / 'metrics.json'}",
            expected=f"schema {SCHEMA}",
            received=f"schema {metrics.get('schema')}",
            fix="Read it with the version of memgen_lens that wrote it (config.json names it), or run it again: "
            "intervals of schema 1 count rows where they should count items.",
        )
    why = {name: _why(metrics.get(name)) for name in ("attribution", "probe", "steering")}
    steering = _optional(directory / "steering.json", why["steering"], read_json, dict) or {}
    absent = {"why": why["steering"]} if why["steering"] else None
    tables = {mode: steering.get(mode) or absent for mode in ("shift", "patch")}
    why |= {mode: _why(table) for mode, table in tables.items()}
    measured = metrics.get("consistency") or {}  # a run of an earlier version has none, and nothing to explain
    why |= {"consistency": str(measured.get("why") or "")}
    compared = _read(directory / "consistency.json", read_json, dict) if "split_half" in measured else {}
    tasks = compared.get("across_tasks")
    why |= {"across_tasks": str((tasks or {}).get("why") or "")}
    pairs = _optional(directory / "pairs.jsonl", why["attribution"], read_jsonl, _each(dict)) or ()
    counted = (metrics.get("pairs") or {}).get("n")
    if counted is not None and counted != len(pairs):
        raise damaged(directory / "pairs.jsonl", f"{len(pairs)} pairs where metrics.json counts {counted}")
    path = directory / "steering.json"
    beside = directory / "consistency.json"
    return RunContents(
        directory=directory,
        config=_read(directory / "config.json", read_json, dict),
        metrics=metrics,
        history=_read(directory / "history.jsonl", read_jsonl, _each(lambda row: Evaluation(**row))),
        outcomes=_read(directory / "outcomes.jsonl", read_jsonl, _each(_outcome)),
        pairs=pairs,
        scores=_scores(directory, metrics.get("attribution") or {}),
        neurons=load_neurons(directory) if (directory / NEURONS).exists() else (),
        probes=_optional(directory / "probes.json", why["probe"], read_json, _probes),
        sweep=_rebuild(path, _each(SweepRow.from_json), [*steering.get("tune", ()), *steering.get("by_layer", ())]),
        shift=None if why["shift"] else _rebuild(path, SteeringTable.from_json, tables["shift"]),
        patch=None if why["patch"] else _rebuild(path, SteeringTable.from_json, tables["patch"]),
        fitted={
            kind: _rebuild(path, SteeringTable.from_json, steering[kind])
            for kind in (*get_args(FittedKind), "direction")
            if not _why(steering.get(kind))
        },
        optimized=_rebuild(path, _each(SweepRow.from_json), steering.get("optimized", ())),
        cost=SteeringCost.load(directory) if (directory / COST).exists() else None,
        tuned=TunedSteering.load(directory) if (directory / TUNED).exists() else None,
        guard=_read(directory / GUARD, read_json, GuardTable.from_json) if (directory / GUARD).exists() else None,
        mode=_read(directory / MODE, read_json, ModeContent.from_json) if (directory / MODE).exists() else None,
        halves=_rebuild(beside, SplitHalf.from_json, compared["split_half"]) if compared else None,
        tasks=_rebuild(beside, TaskConsistency.from_json, tasks) if tasks and not why["across_tasks"] else None,
        dynamics=Dynamics.load(directory) if (directory / DYNAMICS).exists() else None,
        why={name: text for name, text in why.items() if text},
    )


def _why(block: Any) -> str:
    """Why a block lacks figures; "" where it gives no reason to."""
    return str(block.get("why") or "") if block else "This run did not measure it."


def _read(path: Path, reader: Callable[[Path], Any], make: Callable[[Any], T]) -> T:
    return _rebuild(path, make, reader(path))


def _optional(path: Path, why: str, reader: Callable[[Path], Any], make: Callable[[Any], T]) -> T | None:
    """As `_read`, but None for a missing file whose absence is explained."""
    return None if why and not path.exists() else _read(path, reader, make)


def _rebuild(path: Path, make: Callable[[Any], T], value: Any) -> T:
    """``make(value)``; a value that is not what it should be means that the file at ``path`` is damaged."""
    try:
        return make(value)
    except MemgenError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise damaged(path, f"content that is not its own ({type(error).__name__}: {error})") from None


def _scores(directory: Path, attribution: dict[str, Any]) -> tuple[NeuronScores, ...]:
    """Scores of every site that ``metrics.json`` names; a site whose block says why may lack its file."""
    found = []
    for site, block in attribution.items():
        path = directory / "scores" / f"{site}.safetensors"
        if path.exists():
            found.append(_rebuild(path, NeuronScores.load, path))
        elif site != "why" and not _why(block):
            raise missing(path)
    return tuple(found)


def _each(make: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    return lambda rows: tuple(make(row) for row in rows)


def _outcome(row: Any) -> Outcome:
    item = Item(row["key"], row["split"], row["prompt"], row["rule_answer"], row["memorized_answer"], row["task"])
    return Outcome(item, row["output"], Behavior(row["behavior"]), row["memorized_form"])


def _probes(value: Any) -> ProbeReport:
    scores = {name: _probe_scores(value[name]) for name in ("input_only", "embedding")}
    lists = {name: tuple(value[name]) for name in ("cv_auroc_by_layer", "learning_curve")}
    layers = tuple(_probe_scores(row) for row in value["by_layer"])
    return ProbeReport(**{**value, **scores, **lists, "by_layer": layers, "probes": ()})


def _probe_scores(value: Any) -> ProbeScores:
    intervals = {name: tuple(value[name]) for name in ("auroc_ci95", "accuracy_ci95")}
    return ProbeScores(**{**value, **intervals})
