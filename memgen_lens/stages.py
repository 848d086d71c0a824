"""What an experiment does with a trained model, a stage a function: each saves what it found in the run directory.

Does not train, nor know any formula: the analyses do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from memgen_lens.analysis import (
    Guard,
    Steering,
    attribute,
    choose_setting,
    evaluate_guard,
    evaluate_steering,
    fit_probes,
    mode_and_content,
    optimize_direction,
    steering_cost,
    sweep_steering,
)
from memgen_lens.analysis.comparison import across_tasks, split_half, task_names
from memgen_lens.analysis.neurons.look import look_at
from memgen_lens.analysis.steering.grid import Candidate
from memgen_lens.analysis.steering.sweep import rows_on
from memgen_lens.analysis.steering.tune import ranked
from memgen_lens.core.errors import PairsError
from memgen_lens.core.files import with_nulls, write_json
from memgen_lens.core.guard_records import GuardTable
from memgen_lens.core.metrics import consistency_metrics
from memgen_lens.core.neuron_records import NeuronRecord, save_neurons
from memgen_lens.core.records import Activations, NeuronScores, ProbeReport
from memgen_lens.core.steering_records import SteeringSetting, SteeringTable, SweepRow
from memgen_lens.core.types import FittedKind, Method
from memgen_lens.presets import ExperimentConfig

N_RESAMPLES = 1000
"""Bootstrap resamples behind the interval of each score."""
N_LOOKED_AT = 3
"""Neurons that the report shows one by one."""


@dataclass(frozen=True)
class Steered:
    """What steering did on ``test``.

    Attributes:
        tables: By mode, the chosen steering's figures.
        shift: The chosen shift.
    """

    tables: dict[str, SteeringTable]
    shift: Steering


def find_and_predict(
    directory: Path,
    config: ExperimentConfig,
    acts: Activations,
    say: Callable[[str], None],
) -> tuple[dict[str, NeuronScores], ProbeReport]:
    """Score the neurons of every site and fit the probes; save both."""
    analysis = config.analysis
    say(f"scoring neurons of {', '.join(acts.sites)}")
    scores = {
        site: attribute(acts, site, n_permutations=analysis.n_permutations, n_resamples=N_RESAMPLES, seed=config.seed)
        for site in acts.sites
    }
    for score in scores.values():
        score.save(directory / "scores")
    say("fitting probes")
    probes = fit_probes(acts, analysis.probe_site, seed=config.seed)
    write_json(directory / "probes.json", probes.summary())
    return scores, probes


def look_at_top(
    directory: Path,
    config: ExperimentConfig,
    model: Any,
    acts: Activations,
    scores: dict[str, NeuronScores],
    say: Callable[[str], None],
    progress: bool,
) -> list[NeuronRecord]:
    """Look at the neurons that ``select`` ranks first by Pearson's rho, on ``test``; save what they do.

    Of the MLPs' neurons where these were scored, which read and write something of their own; else of the first site.
    """
    sites = list(config.analysis.sites)
    score = scores[next((site for site in sites if site == "post" or site.endswith("hook_post")), sites[0])]
    size = np.nan_to_num(np.abs(score.score), nan=-1.0)
    first = np.argsort(-size, axis=None, kind="stable")[:N_LOOKED_AT].tolist()
    say(f"looking at the top neurons of {score.site}")
    records = look_at(
        model,
        config.task,
        acts.pairs,
        [divmod(place, size.shape[1]) for place in first],
        site=score.site,
        split="test",
        seed=config.seed,
        batch_size=config.analysis.batch_size,
        progress=progress,
    )
    save_neurons(records, directory)
    return records


def steer(
    directory: Path,
    config: ExperimentConfig,
    model: Any,
    acts: Activations,
    scores: dict[str, NeuronScores],
    say: Callable[[str], None],
    progress: bool,
) -> Steered:
    """Choose every steering on ``tune``, report them on ``test``, and see which layers matter; save all."""
    analysis, task, pairs = config.analysis, config.task, acts.pairs
    how = {"batch_size": analysis.batch_size, "progress": progress}
    # By which scores are here already, with their test.
    others: list[Method] = [method for method in analysis.methods if method != "pearson"]
    by_score = {(site, "pearson"): scores[site] for site in analysis.sites}
    by_score |= ranked(model, acts, analysis.sites, others, seed=config.seed, **how)
    candidates = [by_score[site, method] for site in analysis.sites for method in analysis.methods]
    shared = {"top_fractions": analysis.top_fractions, **how}
    grid = {"alphas": analysis.alphas, "positions": analysis.positions, **shared}
    say("choosing site, ranking, fraction and alpha on the tune pairs")
    rows = {"shift": sweep_steering(model, task, pairs, candidates, **grid)}
    rows["patch"] = sweep_steering(model, task, pairs, candidates, mode="patch", source=acts, **shared)
    most = min(len(np.unique(pairs.item[pairs.of("select")])), *(score.rho.shape[1] for score in candidates))
    sizes = [size for size in analysis.fitted_sizes if size <= most] or [1]
    for kind in analysis.fitted:
        fitted = {"mode": kind, "source": acts, "sizes": sizes, "seed": config.seed}
        rows[kind] = sweep_steering(model, task, pairs, candidates, **fitted, **grid)
    chosen = {
        mode: _steering(choose_setting(swept, toward=analysis.toward).setting, by_score, acts, seed=config.seed)
        for mode, swept in rows.items()
    }
    optimized: tuple[SweepRow, ...] = ()
    if analysis.optimized_layers:
        optimized, chosen["direction"] = _optimized(config, model, acts, say, progress)
    controls = {"n_controls": analysis.n_controls, "seed": config.seed}
    say("steering the test pairs, with controls")
    tables = {mode: evaluate_steering(model, task, pairs, one, **controls, **how) for mode, one in chosen.items()}
    shift = tables["shift"].setting
    if analysis.cost_alphas:
        say("holding the shift against its cost, strength by strength")
        strengths = [factor * (shift.alpha or 1.0) for factor in analysis.cost_alphas]
        held = {"alphas": strengths, "toward": analysis.toward, **controls, **how}
        steering_cost(model, task, pairs, chosen["shift"], **held).save(directory)
    by_layer = sweep_steering(
        model,
        task,
        pairs,
        by_score[shift.site, str(shift.method)],
        top_fractions=(shift.top_fraction,),
        alphas=(shift.alpha or 1.0,),
        positions=(shift.positions,),
        layers=[[layer] for layer in range(scores[shift.site].rho.shape[0])],
        **how,
    )
    tried = [row for swept in rows.values() for row in swept]
    write_json(directory / "steering.json", {"tune": tried, "by_layer": by_layer, "optimized": optimized, **tables})
    return Steered(tables, chosen["shift"])


def _optimized(
    config: ExperimentConfig, model: Any, acts: Activations, say: Callable[[str], None], progress: bool
) -> tuple[tuple[SweepRow, ...], Steering]:
    """Directions optimized on ``select``, a layer each, what they do on ``tune``, and the one that does best there."""
    analysis, pairs = config.analysis, acts.pairs
    toward = analysis.toward or "generalization"
    say(f"optimizing a direction at each of {len(analysis.optimized_layers)} layers on the select pairs")
    tried = []
    for layer in analysis.optimized_layers:
        fit = {"toward": toward, "seed": config.seed, "batch_size": min(analysis.batch_size, 256), "progress": progress}
        tried.append(Candidate(optimize_direction(model, pairs, layers=layer, **fit), (layer,), None))
    rows = rows_on(model, config.task, pairs, tried, batch_size=analysis.batch_size, progress=progress)
    best = choose_setting(rows, toward=toward)
    return rows, next(one.steering for one, row in zip(tried, rows, strict=True) if row is best)


def guard(
    directory: Path,
    config: ExperimentConfig,
    model: Any,
    acts: Activations,
    scores: dict[str, NeuronScores],
    shift: Steering,
    say: Callable[[str], None],
    progress: bool,
) -> GuardTable:
    """Guard the chosen shift, report it on ``test``, and tell mode from content where that is asked for; save both."""
    analysis, task, pairs = config.analysis, config.task, acts.pairs
    how = {"batch_size": analysis.batch_size, "progress": progress, "seed": config.seed}
    say("guarding it: steering only where a probe below expects a recall")
    guard = Guard.fit(
        model, task, acts, shift, false_trigger_rate=analysis.false_trigger_rate, batch_size=analysis.batch_size
    )
    table = evaluate_guard(model, task, pairs, guard, **how)
    table.save(directory)
    if analysis.mode_and_content:
        say("telling mode from content: patching computing prompts from recalling ones")
        steerings = {"shift": shift, **_bring_back(config, model, acts, scores[shift.setting.site], progress)}
        try:
            mode_and_content(model, task, pairs, steerings=steerings, guard=guard, **how).save(directory)
        except PairsError as error:  # prompts whose lengths differ have no positions in common
            say(f"no mode and content: {error}")
    return table


def _bring_back(
    config: ExperimentConfig, model: Any, acts: Activations, score: NeuronScores, progress: bool
) -> dict[str, Steering]:
    """Of each kind of fitted rule the one that brings back the most memories on ``tune``, at all neurons of a site."""
    analysis = config.analysis
    most = min(len(np.unique(acts.pairs.item[acts.pairs.of("select")])), score.rho.shape[1])
    found = {}
    for kind in get_args(FittedKind):
        rows = sweep_steering(
            model,
            config.task,
            acts.pairs,
            score,
            mode=kind,
            source=acts,
            top_fractions=(1.0,),
            alphas=(1.0,),
            positions=("prompt",),  # where rules are fitted; of generated positions they know nothing
            sizes=[size for size in analysis.fitted_sizes if size <= most] or [1],
            seed=config.seed,
            batch_size=analysis.batch_size,
            progress=progress,
        )
        best = max(rows, key=lambda row: (row.to_memorization, row.memorized_form))
        found[kind.replace("_", " ")] = _steering(
            best.setting, {(score.site, score.method): score}, acts, seed=config.seed
        )
    return found


def _steering(
    chosen: SteeringSetting, ranked: Mapping[tuple[str, str], NeuronScores], acts: Activations, *, seed: int
) -> Steering:
    """The steering of a setting that a sweep over all layers has tried; scores by site and method."""
    score, alpha = ranked[chosen.site, str(chosen.method)], chosen.alpha or 1.0
    if chosen.mode in ("shift", "patch"):
        how = {"mode": chosen.mode, "source": acts, "positions": chosen.positions}
        return Steering.from_scores(score, chosen.top_fraction, alpha, **how)
    size = {"n_clusters" if chosen.mode == "clusters" else "rank": chosen.size}
    how = {"kind": chosen.mode, "positions": chosen.positions, "seed": seed, **size}
    return Steering.from_activations(score, acts, chosen.top_fraction, alpha, **how)


def compare(
    directory: Path,
    config: ExperimentConfig,
    model: Any,
    acts: Activations,
    site: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compare the neurons of two halves of the pairs and, in a mixture, of its tasks; save both."""
    analysis, pairs = config.analysis, acts.pairs
    say("comparing halves of the pairs" + (" and tasks" if len(task_names(pairs)) > 1 else ""))
    try:
        halves = split_half(acts, site, seed=config.seed)
    except PairsError as error:
        return {"why": str(error)}
    tasks, why = None, None
    if len(task_names(pairs)) > 1:
        try:
            tasks = across_tasks(
                model,
                config.task,
                pairs,
                site,
                top_fractions=analysis.top_fractions,
                alphas=analysis.alphas,
                positions=analysis.positions,
                seed=config.seed,
                batch_size=analysis.batch_size,
            )
        except PairsError as error:
            why = str(error)
    compared = {"split_half": halves, "across_tasks": tasks or ({"why": why} if why else None)}
    write_json(directory / "consistency.json", with_nulls(compared))
    return consistency_metrics(halves, tasks, why)
