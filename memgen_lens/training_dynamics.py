"""Over the checkpoints of one run: when do the two behaviours separate, and where first?

Does not train, and knows no formula: the stages do.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from memgen_lens.analysis import (
    Steering,
    attribute,
    choose_setting,
    collect_pairs,
    fit_probes,
    record,
    sweep_steering,
)
from memgen_lens.analysis.probing.probes import score_probe
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.transfer import ShiftRates, shift_rates
from memgen_lens.behavior import observe
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import AnalysisConfig
from memgen_lens.core.dynamics_records import STEERED, Dynamics, RateSeries
from memgen_lens.core.errors import PairsError, RunDirectoryError, SettingsError
from memgen_lens.core.files import read_json
from memgen_lens.core.items import same_items
from memgen_lens.core.linear_probe import fit_probe
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, NeuronScores, ProbeScores
from memgen_lens.core.stats import Rate, wilson
from memgen_lens.core.steering_records import SteeringSetting
from memgen_lens.core.types import Behavior
from memgen_lens.models import load_model
from memgen_lens.tasks.task import Task
from memgen_lens.training import TrainingRun
from memgen_lens.training.checkpoints import list_checkpoints
from memgen_lens.training.steps import models_at


@arguments(
    run=kinds.one(TrainingRun) | kinds.place("dynamics(run)"),
    site=kinds.Text,
    setting=kinds.one(SteeringSetting) | None,
    steps=kinds.Indices | None,
    task=kinds.TaskLike | None,
    analysis=kinds.one(AnalysisConfig) | None,
    seed=kinds.Seed,
    device=kinds.Text,
    save=kinds.Flag,
    progress=kinds.Flag,
)
def dynamics(
    run: TrainingRun | str | Path,
    *,
    site: str = "resid_post",
    setting: SteeringSetting | None = None,
    steps: Sequence[int] | None = None,
    task: Any = None,
    analysis: AnalysisConfig | None = None,
    seed: int = 0,
    device: str = "cpu",
    save: bool = True,
    progress: bool = True,
) -> Dynamics:
    """Behaviours, neuron scores, probes and steering at every checkpoint of a run.

    One set of pairs throughout, so that steps can be compared: the pairs on which the *last* model recalls and, on the
    rephrasing, computes. At earlier steps their labels say what the prompt will come to do, not what it does then: a
    probe that tells them apart early tells the two *kinds of prompt* apart, before any behaviour hangs on it. Steering,
    in contrast, is measured at each step on those ``test`` pairs that flip at that very step; where fewer than 8 do,
    it is NaN and ``why`` says so.

    At each step anew: neurons ranked and probes fitted on the pairs' ``select`` (probes: and ``tune``), reported on
    ``test``; steering with that step's neurons and shifts at one setting for all steps. Step 0 is the untrained model,
    made from the run's own seed, or the pretrained one. The papers (arXiv 2412.18497) look at the trained model only.

    Args:
        run: A run of `train` or `finetune` with a directory, or that directory. ``checkpoint_every`` of its settings
            sets how many steps there are to look at. Of a tuned run the pretrained model is loaded again, from where
            it was loaded then.
        site: TransformerLens short name.
        setting: How to steer, in shift mode, at ``site``; default: chosen on ``tune`` with the last model.
        steps: Checkpoints to measure, of those there are (0 for the untrained model); default: all.
        task: The task, where its class cannot be found by name (one of your own that is not imported).
        analysis: Shares of the splits, grid of settings, permutations and batch size; its sites are not used.
        seed: Seed of the splits, permutations, bootstrap and random neurons.
        device: Torch device.
        save: Write ``dynamics.json`` into the run directory; `Dynamics.load` reads it.
        progress: Show a progress bar.

    Raises:
        RunDirectoryError: The run has no directory or no checkpoints, a file is missing or damaged, or the pretrained
            model that it was begun from is not where it was loaded from (a model object may be from nowhere).
        PairsError: Too few prompts flip in the last model.
        SettingsError: A step that has no checkpoint, or a setting at another site or in patch mode.
        SiteError: The site is unknown.
        TaskError: The task's class is not known.
    """
    directory = _directory(run)
    written = read_json(directory / "checkpoints" / "settings.json")
    if task is None:
        task = run.task if isinstance(run, TrainingRun) else Task.from_settings(written["task"])
    analysis = analysis or AnalysisConfig()
    _require_shift(setting, site)
    model = load_model(directory / "model", device=device)
    checkpoints = _checkpoints(directory, steps)
    shown = models_at(checkpoints.values(), model, task, written, device=device)

    shares = (analysis.select_share, analysis.tune_share)
    pairs = collect_pairs(model, task, seed=seed, shares=shares, batch_size=analysis.batch_size, progress=False)
    acts = record(model, pairs, [site], batch_size=analysis.batch_size, progress=False)
    input_only = fit_probes(acts, site, seed=seed).input_only
    if setting is None:
        score = attribute(acts, site, n_permutations=analysis.n_permutations, seed=seed)
        setting = _choose(model, task, pairs, score, analysis)

    measured = [
        _measure(step_model, task, pairs, site, setting, analysis, seed)
        for step_model in tqdm(shown, total=len(checkpoints), disable=not progress, desc="dynamics", unit="step")
    ]
    result = _together(task.name, site, list(checkpoints), measured, pairs, input_only, setting)
    if save:
        result.save(directory)
    return result


def _directory(run: TrainingRun | str | Path) -> Path:
    directory = run.out if isinstance(run, TrainingRun) else run
    if directory is None:
        raise RunDirectoryError(
            "dynamics(run)",
            expected="a run with a directory, which holds its checkpoints",
            received="one that was kept in memory",
            fix="Train with train(task, config, out='runs/a').",
        )
    return Path(directory)


def _require_shift(setting: SteeringSetting | None, site: str) -> None:
    if setting is not None and (setting.mode != "shift" or setting.site != site):
        raise SettingsError(
            "dynamics",
            expected=f"a setting in shift mode at site {site!r}",
            received=f"mode {setting.mode!r} at {setting.site!r}",
            fix="Name its site with site=..., or leave setting out to have it chosen.",
        )


def _checkpoints(directory: Path, steps: Sequence[int] | None) -> dict[int, Path | None]:
    """Checkpoint folders by step, the untrained model (None) first; all, or those asked for."""
    folders = list_checkpoints(directory / "checkpoints")
    if not folders:
        raise RunDirectoryError(
            f"dynamics({str(directory)!r})",
            expected="a run with checkpoints",
            received="none",
            fix="Train with out=... and a checkpoint_every below the number of steps.",
        )
    found: dict[int, Path | None] = {0: None}
    found |= {int(folder.name.removeprefix("step-")): folder for folder in folders}
    unknown = sorted(set(steps or ()) - set(found))
    if unknown or (steps is not None and not len(steps)):
        raise SettingsError(
            "dynamics(steps=...)",
            expected=f"steps that have a checkpoint ({', '.join(map(str, found))})",
            received=", ".join(map(str, unknown)) or "none",
            fix="Leave steps out for all of them.",
        )
    return {step: folder for step, folder in found.items() if steps is None or step in set(steps)}


def _choose(
    model: Any, task: Any, pairs: PromptPairs, score: NeuronScores, analysis: AnalysisConfig
) -> SteeringSetting:
    rows = sweep_steering(
        model,
        task,
        pairs,
        score,
        top_fractions=analysis.top_fractions,
        alphas=analysis.alphas,
        positions=analysis.positions,
        batch_size=analysis.batch_size,
        progress=False,
    )
    return choose_setting(rows).setting


def _measure(
    model: Any,
    task: Any,
    pairs: PromptPairs,
    site: str,
    setting: SteeringSetting,
    analysis: AnalysisConfig,
    seed: int,
) -> dict[str, Any]:
    """Everything at one step."""
    acts = record(model, pairs, [site], batch_size=analysis.batch_size, progress=False)
    score = attribute(acts, site, n_permutations=analysis.n_permutations, seed=seed)
    steer = Steering.from_scores(score, setting.top_fraction, setting.alpha or 1.0, positions=setting.positions)
    judge = Judge.of(model, task, pairs, batch_size=analysis.batch_size)
    rates: ShiftRates | None = None
    why = None
    try:
        flipping = judge.flipping(model, pairs.of("test"), batch_size=analysis.batch_size)
        (rates,) = shift_rates(model, judge, flipping, [steer], seed=seed, batch_size=analysis.batch_size)
    except PairsError as error:
        flip = error.received.partition(" ")[0]
        why = f"only {flip} of the last model's test pairs flip at this step; expected {error.expected}"
    return {
        "behavior": _behavior(model, task, analysis.batch_size),
        "layers": _by_layer(acts, score),
        "probes": list(_probes(acts, site, seed)),
        "steering": rates,
        "why": why,
    }


def _behavior(model: Any, task: Any, batch_size: int) -> dict[str, Rate]:
    asked = {
        split: observe(model, task, split=split, batch_size=batch_size, progress=False)
        for split in ("validation", "memorized", "rephrased")
    }
    shown = {
        "generalization": ("validation", Behavior.GENERALIZATION),
        "memorization": ("memorized", Behavior.MEMORIZATION),
        "rephrased_generalization": ("rephrased", Behavior.GENERALIZATION),
    }
    computed = {
        (outcome.item.task, outcome.item.key)
        for outcome in asked["rephrased"]
        if outcome.behavior is Behavior.GENERALIZATION
    }
    flips = [
        outcome.behavior is Behavior.MEMORIZATION and (outcome.item.task, outcome.item.key) in computed
        for outcome in asked["memorized"]
    ]
    rates = {
        name: wilson([o.behavior is behavior for o in asked[split]], same_items(o.item for o in asked[split]))
        for name, (split, behavior) in shown.items()
    }
    return rates | {"flips": wilson(flips)}


def _by_layer(acts: Activations, score: NeuronScores) -> dict[str, np.ndarray]:
    """The layer-wise summaries of NMD and rho, named as in `Dynamics`."""
    nmd, rho = np.abs(score.nmd), np.abs(score.rho)
    index, recorded = acts.pairs.of("select"), acts.site(score.site)
    both = np.concatenate([recorded.memorized[index], recorded.generalized[index]]).astype(np.float64)
    spread = np.sqrt(both.var(0).mean(-1))
    in_sd = np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0)
    return {
        "nmd_mean": nmd.mean(1),
        "nmd_max": nmd.max(1),
        "nmd_mean_in_sd": nmd.mean(1) * in_sd,
        "nmd_max_in_sd": nmd.max(1) * in_sd,
        "rho_max": rho.max(1),
        "rho_p95": np.quantile(rho, 0.95, axis=1),
        "share_fdr05": (score.q <= 0.05).mean(1),
    }


def _probes(acts: Activations, site: str, seed: int) -> Iterator[ProbeScores]:
    """Each layer's probe, fitted on ``select`` and ``tune`` and tested on ``test``, as `fit_probes` does."""
    recorded, pairs = acts.site(site), acts.pairs
    train, test = np.concatenate([pairs.of("select"), pairs.of("tune")]), pairs.of("test")
    for layer in range(recorded.memorized.shape[1]):

        def rows(index: np.ndarray, layer: int = layer) -> np.ndarray:
            return np.concatenate([recorded.memorized[index, layer], recorded.generalized[index, layer]])

        probe = fit_probe(rows(train), np.repeat([True, False], len(train)))
        labels, items = np.repeat([True, False], len(test)), np.tile(pairs.item[test], 2)
        yield score_probe(probe, rows(test), labels, items, seed=seed)


def _together(
    task: str,
    site: str,
    steps: list[int],
    measured: list[dict[str, Any]],
    pairs: PromptPairs,
    input_only: ProbeScores,
    setting: SteeringSetting,
) -> Dynamics:
    """The steps' measurements side by side."""
    probes: list[list[ProbeScores]] = [one["probes"] for one in measured]
    rates: list[ShiftRates | None] = [one["steering"] for one in measured]
    return Dynamics(
        task=task,
        site=site,
        steps=np.array(steps, dtype=np.int64),
        n_pairs={split: int((pairs.split == split).sum()) for split in ("select", "tune", "test")},
        behavior={name: _series([one["behavior"][name] for one in measured]) for name in measured[0]["behavior"]},
        **{name: np.array([one["layers"][name] for one in measured]) for name in measured[0]["layers"]},
        auroc=np.array([[layer.auroc for layer in row] for row in probes]),
        auroc_low=np.array([[layer.auroc_ci95[0] for layer in row] for row in probes]),
        auroc_high=np.array([[layer.auroc_ci95[1] for layer in row] for row in probes]),
        input_only=input_only,
        setting=setting,
        steering={name: _series([getattr(rate, name) if rate else None for rate in rates]) for name in STEERED},
        random_neurons={
            name: np.array([rate.random_neurons[name] if rate else np.nan for rate in rates])
            for name in ("to_generalization", "memorized_form")
        },
        why={step: one["why"] for step, one in zip(steps, measured, strict=True) if one["why"]},
    )


def _series(rates: Sequence[Rate | None]) -> RateSeries:
    return RateSeries(
        rate=np.array([rate.rate if rate else np.nan for rate in rates]),
        low=np.array([rate.ci95[0] if rate else np.nan for rate in rates]),
        high=np.array([rate.ci95[1] if rate else np.nan for rate in rates]),
        n=np.array([rate.n if rate else 0 for rate in rates], dtype=np.int64),
        n_items=np.array([rate.n_items if rate else 0 for rate in rates], dtype=np.int64),
    )
