"""The whole story as one function that reads like the paper: train, find, predict, steer, report.

Does not know any formula or figure: the stages do.
"""

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from memgen_lens import processes
from memgen_lens.analysis import collect_pairs, record
from memgen_lens.behavior import observe
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import FinetuneConfig
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.files import read_json, write_json, write_jsonl
from memgen_lens.core.guard_records import GuardTable
from memgen_lens.core.items import Outcome, same_items
from memgen_lens.core.metrics import (
    SCHEMA,
    attribution_metrics,
    behavior_metrics,
    guard_metrics,
    probe_metrics,
    steering_metrics,
)
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import NeuronScores, ProbeReport
from memgen_lens.core.run_directory import prepared, processor
from memgen_lens.core.steering_records import SteeringTable
from memgen_lens.models import build_model, load_model
from memgen_lens.models.build import require_device
from memgen_lens.models.sites import site_hooks
from memgen_lens.presets import ExperimentConfig
from memgen_lens.stages import compare, find_and_predict, guard, look_at_top, steer
from memgen_lens.training import TrainingRun, train
from memgen_lens.training.finetune import tune
from memgen_lens.viz.report import write_report

PACKAGES = (
    *("memgen-lens", "transformer-lens", "torch", "transformers", "peft", "gguf"),
    *("numpy", "scipy", "scikit-learn", "plotly"),
)


@dataclass(frozen=True)
class Experiment:
    """A finished experiment.

    Attributes:
        config: Its settings.
        training: The trained model and its history.
        outcomes: One outcome a prompt, of every split that is reported.
        pairs: The prompts that flip when rephrased.
        scores: Neuron scores by site; empty where too few prompts flip.
        probes: Probes by layer; None where too few prompts flip.
        steering: ``"shift"`` and ``"patch"`` tables; empty where too few prompts flip.
        guard: The guard's figures; None where too few prompts flip.
        metrics: What ``metrics.json`` holds.
        report: The report's path.
    """

    config: ExperimentConfig
    training: TrainingRun
    outcomes: tuple[Outcome, ...]
    pairs: PromptPairs
    scores: dict[str, NeuronScores]
    probes: ProbeReport | None
    steering: dict[str, SteeringTable]
    guard: GuardTable | None
    metrics: dict[str, Any]
    report: Path

    def summary(self) -> list[str]:
        """The main figures, a line each."""
        behavior = self.metrics["behavior"]
        lines = [
            f"computes  {behavior['heldout_generalization']:.3f} of held-out prompts",
            f"recalls   {behavior['trained_memorization']:.3f} of memorized prompts",
            f"flips     {behavior['flip_rate']:.3f} of memorized prompts when rephrased ({len(self.pairs)} pairs)",
        ]
        if self.probes is None or not self.steering:
            return [*lines, f"no analysis: {self.metrics['steering']['why']}"]
        shift = self.steering["shift"]
        to_generalization, to_memorization = shift.to_generalization, shift.to_memorization
        random = {way.toward: way.controls["random_neurons"] for way in (to_generalization, to_memorization)}
        return [
            *lines,
            f"predicts  AUROC {self.probes.best.auroc:.3f} from layer {self.probes.best_layer} of {self.probes.site}"
            f" (prompt alone {self.probes.input_only.auroc:.3f})",
            f"steers    {to_generalization.shift['rate']:.3f} of recalled prompts to the rule's answer"
            f" (random neurons {random['generalization']['mean']:.3f})",
            f"          {to_memorization.memorized_form['rate']:.3f} of computed prompts to memorized form,"
            f" {to_memorization.shift['rate']:.3f} to the item's own answer"
            f" (random neurons {random['memorization']['memorized_form']['mean']:.3f})",
            *self._guarded(),
        ]

    def _guarded(self) -> list[str]:
        if self.guard is None:
            return []
        table, guarded = self.guard, self.guard.policies["guard"]
        return [
            f"guards    {guarded.prevented['rate']:.3f} of recalls prevented, steering "
            f"{table.triggered['rephrased']['rate']:.3f} of computed prompts"
            + (f" and {table.triggered['heldout']['rate']:.3f} of held-out ones" if table.n_heldout else "")
        ]


@arguments(
    config=kinds.one(ExperimentConfig),
    out=kinds.place("run_experiment(out=...)"),
    resume=kinds.Flag,
    force=kinds.Flag,
    progress=kinds.Flag,
    say=kinds.Callback,
)
def run_experiment(
    config: ExperimentConfig,
    *,
    out: str | Path,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Experiment:
    """Train a model until it recalls and computes, find the neurons, predict, steer, and write a report.

    Started as several processes by ``accelerate launch`` or torchrun, all of them train (see `train`); then the first
    alone analyses and writes, while the others wait for what it returns.

    Args:
        config: Settings, e.g. ``mg.presets["quickstart"]``; ``config.seed`` seeds everything.
        out: Run directory; see the README for what it holds.
        resume: Go on with a run that was cut: training from its newest checkpoint, analysis anew.
        force: Remove a run that ``out`` holds already, and no file that this package did not write.
        progress: Show a progress bar while training.
        say: Called with a line at the beginning of each stage, in the first process alone.

    Raises:
        RunDirectoryError: ``out`` holds a run already, or somebody else's file where one of the run's would be, is
            being written by another process, or cannot be written.
        MemgenError: A setting is at odds with another.
        ProcessError: Another process of the run has died.
    """
    started = time.perf_counter()
    config = config.seeded()
    world = processes.world("run_experiment", config.train.device)
    base = _base(config)
    sites = [*config.analysis.sites, config.analysis.probe_site]
    say, progress = (say, progress) if world.is_first else (lambda line: None, False)
    held = prepared(out, sites=sites, resume=resume, force=force)
    with processes.held_by_first("run_experiment", held) as directory:
        return _run(config, base, directory, started, resume=resume, force=force, progress=progress, say=say)


def _run(
    config: ExperimentConfig,
    base: Any,
    directory: Path,
    started: float,
    *,
    resume: bool,
    force: bool,
    progress: bool,
    say: Callable[[str], None],
) -> Experiment:
    """Training by all processes, then the analysis by the first, in a directory that is this run's alone."""
    say(f"training {config.preset}: {config.about}" if config.about else f"training {config.preset}")
    how = {"out": directory, "resume": resume, "force": force, "progress": progress}
    if isinstance(config.train, FinetuneConfig):
        training = tune(base, str(config.base), config.task, config.train, **how)
    else:
        training = train(config.task, config.train, **how)
    n_processes = processes.world("run_experiment").count
    found = processes.by_first(
        "run_experiment",
        lambda: _analysed(config, training, directory, started, n_processes, progress=progress, say=say),
    )
    return Experiment(config, training, **found)


def _analysed(
    config: ExperimentConfig,
    training: TrainingRun,
    directory: Path,
    started: float,
    n_processes: int,
    *,
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All stages behind training; what they found, by its name in `Experiment`."""
    model, task, analysis = training.model, config.task, config.analysis
    trained = time.perf_counter()

    say(f"{training.stop_reason}; asking all prompts")
    outcomes = [
        outcome
        for split in ("memorized", "rephrased", "heldout")
        for outcome in observe(model, task, split=split, progress=progress)
    ]
    pairs = collect_pairs(
        model,
        task,
        seed=config.seed,
        shares=(analysis.select_share, analysis.tune_share),
        batch_size=analysis.batch_size,
        progress=progress,
    )
    write_jsonl(directory / "outcomes.jsonl", [outcome.row() for outcome in outcomes])
    write_jsonl(directory / "pairs.jsonl", pairs.rows())

    say(f"{pairs.n_flipped} of {pairs.n_items} memorized prompts flip when rephrased: {len(pairs)} pairs")
    scores: dict[str, NeuronScores] = {}
    tables: dict[str, SteeringTable] = {}
    consistency: dict[str, Any] = {}
    probes, guarded, why = None, None, None
    try:
        sites = list(dict.fromkeys([*analysis.sites, analysis.probe_site]))
        acts = record(model, pairs, sites, batch_size=analysis.batch_size, progress=progress)
        scores, probes = find_and_predict(directory, config, acts, say)
        look_at_top(directory, config, model, acts, scores, say, progress)
        steered = steer(directory, config, model, acts, scores, say, progress)
        tables = steered.tables
        guarded = guard(directory, config, model, acts, scores, steered.shift, say, progress)
        consistency = compare(directory, config, model, acts, steered.shift.setting.site, say)
    except PairsError as error:
        # A null result is a result: too few flips leave the behaviours, and the reason why there is no more.
        why = str(error)
        say(f"no analysis: {why}")

    finished = time.perf_counter()
    metrics = {
        "schema": SCHEMA,
        "preset": config.preset,
        "seed": config.seed,
        "behavior": behavior_metrics(outcomes, pairs),
        "pairs": {
            "n": len(pairs),
            "n_items": len(set(same_items(pairs.memorized))),
            **{split: int((pairs.split == split).sum()) for split in ("select", "tune", "test")},
        },
        "attribution": {site: attribution_metrics(score) for site, score in scores.items()} or {"why": why},
        "probe": probe_metrics(probes) if probes else {"why": why},
        "steering": steering_metrics(tables) if tables else {"why": why},
        "guard": guard_metrics(guarded) if guarded else {"why": why},
        "consistency": consistency or {"why": why},
        "timing_s": {
            "train": round(trained - started, 3),
            "analysis": round(finished - trained, 3),
            "total": round(finished - started, 3),
        },
    }
    _write_config(directory, config, training, n_processes)
    write_json(directory / "metrics.json", metrics)
    say("writing the report")
    report = write_report(directory)
    return {
        "outcomes": tuple(outcomes),
        "pairs": pairs,
        "scores": scores,
        "probes": probes,
        "steering": tables,
        "guard": guarded,
        "metrics": read_json(directory / "metrics.json"),
        "report": report,
    }


def _base(config: ExperimentConfig) -> Any:
    """The pretrained model that is tuned, or None.

    Refuses, before an hour of training, a device that is not there and sites or layers that the model will not have.
    """
    require_device(config.train.device, call="run_experiment")
    if isinstance(config.train, FinetuneConfig):
        device = processes.own_device("run_experiment", config.train.device)
        base: Any = load_model(config.base, device=device)
        asked = base
    else:
        base, asked = None, build_model(config.train.model, config.task.tokenizer, n_ctx=1, seed=0)
    for site in (*config.analysis.sites, config.analysis.probe_site):
        site_hooks(asked, site)
    n_layers, optimized = int(asked.cfg.n_layers), config.analysis.optimized_layers
    if max(optimized, default=0) >= n_layers:
        raise SettingsError(
            "AnalysisConfig.optimized_layers",
            expected=f"layers of the model, 0 to {n_layers - 1}",
            received=repr(optimized),
            fix="Change them; () optimizes no direction.",
        )
    return base


def _write_config(directory: Path, config: ExperimentConfig, training: TrainingRun, n_processes: int) -> None:
    """Every setting, the seed, versions and the machine: enough to run it again."""
    write_json(
        directory / "config.json",
        {
            "settings": config.model_dump(mode="json"),
            "task": config.task.name,
            "model": config.size,
            "base": training.base,
            "command": f"memgen-lens run {config.preset} --out {directory} --seed {config.seed}",
            "stop_reason": training.stop_reason,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "machine": {
                "system": f"{platform.system()} {platform.machine()}",
                "processor": processor(),
                "threads": torch.get_num_threads(),
                "processes": n_processes,
                "device": config.train.device,
            },
            "argv": sys.argv[1:] if Path(sys.argv[0]).name.startswith("memgen") else None,
        },
    )
