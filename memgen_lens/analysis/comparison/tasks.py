"""Is what is found on one task of a mixture true of another, in the same model?

Public through `memgen_lens.consistency`. Does not train.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import rankdata
from sklearn.pipeline import Pipeline

from memgen_lens.analysis.attribution.attribute import attribute
from memgen_lens.analysis.attribution.resampled import weighted_rho
from memgen_lens.analysis.attribution.scored import correlation
from memgen_lens.analysis.probing.probes import fit_probes, score_probe
from memgen_lens.analysis.recording.activations import record
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.analysis.steering.sweep import choose_setting, sweep_steering
from memgen_lens.analysis.steering.transfer import shift_rates
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.consistency_records import STEERING_RATES, Matrix, TaskConsistency
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import Activations, NeuronScores, SiteActivations
from memgen_lens.core.stats import Overlap, Rate, largest, overlap, row_correlation
from memgen_lens.core.types import LensModel, Positions
from memgen_lens.models.guard import lens_model

N_RESAMPLES = 200
"""Resamples behind the intervals of overlap and rank correlation."""


@arguments(
    "consistency.across_tasks",
    model=lens_model("consistency.across_tasks"),
    task=kinds.TaskLike | None,
    pairs=kinds.one(PromptPairs),
    site=kinds.Text,
    top_fraction=kinds.OpenShare,
    top_fractions=kinds.Shares,
    alphas=kinds.Positives,
    positions=kinds.PositionsNames,
    seed=kinds.Seed,
    batch_size=kinds.Count,
)
def across_tasks(
    model: LensModel,
    task: Any | None,
    pairs: PromptPairs,
    site: str,
    *,
    top_fraction: float = 0.1,
    top_fractions: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.5),
    alphas: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0),
    positions: Sequence[Positions] = ("answer", "prompt"),
    seed: int = 0,
    batch_size: int = 2048,
) -> TaskConsistency:
    """Whether what is found on one task of a mixture holds on another, in one model (inter-task consistency).

    Everything of a source task (row) is made from its own ``select`` and ``tune`` pairs: the ranking of neurons, the
    probe and its layer, the steering and its setting. Everything of a target task (column) comes from its ``test``
    pairs. The diagonal is thus the same task on other items, the most that could be expected of another one.

    - Overlap of the top sets (source: ``select``, target: ``test``) and rank correlation of rho, with 95 % bootstrap
      intervals by item. Beside the overlap, two expectations by chance: sets drawn from all neurons, and sets with the
      same number in each layer (`memgen_lens.core.stats.Overlap`). Neurons constant on both tasks are left out.
    - AUROC of the source's probe on the target, 95 % bootstrap interval by item.
    - Rates of steering the target's prompts, both ways, with the source's neurons, shifts and setting; 95 %
      intervals by item, and the mean of 20 draws of random neurons shifted as hard, as many in each layer.

    After the inter-task consistency of arXiv 2412.18497 v2; chance levels, probes and steering across tasks are ours.

    Args:
        model: A HookedTransformer trained on several tasks.
        task: The mixture, which judges outputs; None for a user's own pairs.
        pairs: Pairs of all tasks; ``item.task`` names the task of each.
        site: TransformerLens short name.
        top_fraction: Share of the site's neurons in the top sets that are compared, in (0, 1).
        top_fractions: Fractions to choose each source's steering from.
        alphas: Multiples of abs(nmd) likewise.
        positions: Positions likewise.
        seed: Seed of permutations, bootstrap and random neurons.
        batch_size: Prompts in one forward pass.

    Raises:
        PairsError: Fewer than two tasks have at least 8 pairs in each split.
        SiteError: The site is unknown.
        SettingsError: A value is out of range.
    """
    call = "consistency.across_tasks"
    names = task_names(pairs)
    ready, left_out = [], {}
    acts = record(model, pairs, [site], batch_size=batch_size)
    swept = {"top_fractions": top_fractions, "alphas": alphas, "positions": positions, "batch_size": batch_size}
    for name in names:
        try:
            ready.append(_prepare(model, task, acts.of_task(name), name, site, swept, seed))
        except PairsError as error:
            left_out[name] = str(error)
    if len(ready) < 2:
        raise PairsError(
            call,
            expected="at least two tasks with 8 flipping pairs in each split",
            received=f"{len(ready)} of {len(names)} ({', '.join(name or 'unnamed' for name in names)})",
            fix=next(iter(left_out.values()), "Train on a mixture: item.task names the task of each pair."),
        )
    overlaps = [[_overlap(source, target, top_fraction) for target in ready] for source in ready]
    same_neurons = {
        "rank_correlation": np.array([[_spearman(a.score.rho, b.retest) for b in ready] for a in ready]),
        "overlap": _field(overlaps, "share"),
    }
    shifted = [
        shift_rates(model, target.judge, target.flipping, [s.steer for s in ready], seed=seed, batch_size=batch_size)
        for target in ready
    ]
    by_source = [[rates[i] for rates in shifted] for i in range(len(ready))]
    return TaskConsistency(
        site=site,
        tasks=tuple(one.name for one in ready),
        n_pairs={one.name: _counts(one.acts.pairs) for one in ready},
        top_fraction=top_fraction,
        **_with_intervals(ready, same_neurons, top_fraction),
        overlap_expected=_field(overlaps, "expected"),
        overlap_p=_field(overlaps, "p"),
        overlap_expected_within_layers=_field(overlaps, "expected_within_layers"),
        overlap_p_within_layers=_field(overlaps, "p_within_layers"),
        probe=_probe_transfer(ready, site, seed),
        probe_layers=tuple(one.layer for one in ready),
        settings=tuple(one.steer.setting for one in ready),
        steering={name: _matrix([[getattr(r, name) for r in row] for row in by_source]) for name in STEERING_RATES},
        random_neurons={
            name: np.array([[rates.random_neurons[name] for rates in row] for row in by_source], dtype=float)
            for name in by_source[0][0].random_neurons
        },
        left_out=left_out,
    )


@arguments(
    "consistency.task_names",
    pairs=kinds.one(PromptPairs),
)
def task_names(pairs: PromptPairs) -> tuple[str, ...]:
    """The tasks whose items were asked, in the order in which they first occur, flipping or not."""
    return tuple(dict.fromkeys([*pairs.n_items_by_task, *(item.task for item in pairs.memorized)]))


@dataclass(frozen=True)
class _Prepared:
    """One task, ready to be a source and a target.

    Attributes:
        name: The task.
        acts: Activations of its pairs.
        score: Scores on ``select``.
        retest: rho on ``test``.
        resampled: rho on resampled items of ``select`` and of ``test``, ``[draw, neuron]`` each.
        layer: Layer of its probe.
        probe: That probe.
        steer: Its steering.
        judge: Its pairs, with how outputs are classified.
        flipping: Those of ``test`` that flip unsteered.
    """

    name: str
    acts: Activations
    score: NeuronScores
    retest: Float[np.ndarray, "layer neuron"]
    resampled: tuple[np.ndarray, np.ndarray]
    layer: int
    probe: Pipeline
    steer: Steering
    judge: Judge
    flipping: Int[np.ndarray, " pair"]


def _prepare(
    model: LensModel,
    task: Any | None,
    acts: Activations,
    name: str,
    site: str,
    swept: dict[str, Any],
    seed: int,
) -> _Prepared:
    """Rank, fit and choose on one task alone; a `PairsError` says that it has too few pairs."""
    pairs, recorded = acts.pairs, acts.site(site)
    score = attribute(acts, site, seed=seed)
    test = pairs.of("test")
    retest = correlation(*_sides(recorded, test)).reshape(score.rho.shape)
    if not (score.rho.any() and retest.any()):
        raise SettingsError(
            "consistency.across_tasks",
            expected="a site at which neurons vary between the prompts of each task",
            received=f"{site!r}, at which none does on task {name!r}",
            fix="Choose a site behind the attention of the first layer.",
        )
    probes = fit_probes(acts, site, seed=seed)
    setting = choose_setting(sweep_steering(model, task, pairs, score, **swept)).setting
    judge = Judge.of(model, task, pairs, batch_size=swept["batch_size"])
    return _Prepared(
        name=name,
        acts=acts,
        score=score,
        retest=retest,
        resampled=(
            _resample(recorded, pairs, pairs.of("select"), np.random.default_rng([seed, 0])),
            _resample(recorded, pairs, test, np.random.default_rng([seed, 1])),
        ),
        layer=probes.best_layer,
        probe=probes.probes[probes.best_layer],
        steer=Steering.from_scores(score, setting.top_fraction, setting.alpha or 1.0, positions=setting.positions),
        judge=judge,
        flipping=judge.flipping(model, test, batch_size=swept["batch_size"]),
    )


def _sides(recorded: SiteActivations, index: Int[np.ndarray, " index"]) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of some pairs, ``[pair, neuron]``, all layers in a row."""
    chosen = recorded.take(index)
    return chosen.memorized.reshape(len(index), -1), chosen.generalized.reshape(len(index), -1)


def _resample(
    recorded: SiteActivations, pairs: PromptPairs, index: Int[np.ndarray, " index"], rng: np.random.Generator
) -> Float[np.ndarray, "draw neuron"]:
    """Rho of every neuron on resampled items."""
    _, item = np.unique(pairs.item[index], return_inverse=True)
    n_items = int(item.max()) + 1
    counts = rng.multinomial(n_items, np.full(n_items, 1 / n_items), size=N_RESAMPLES)
    return weighted_rho(*_sides(recorded, index), item, counts.astype(np.float64))


def _overlap(source: _Prepared, target: _Prepared, top_fraction: float) -> Overlap:
    varies = (source.score.rho != 0) | (target.retest != 0)
    count = max(1, round(top_fraction * varies.size))
    a, b = (largest(rho.reshape(1, -1), count).reshape(rho.shape) for rho in (source.score.rho, target.retest))
    return overlap(a & (source.score.rho != 0), b & (target.retest != 0), among=varies)


def _spearman(a: Float[np.ndarray, "layer neuron"], b: Float[np.ndarray, "layer neuron"]) -> float:
    return float(row_correlation(rankdata(a).reshape(1, -1), rankdata(b).reshape(1, -1))[0])


def _with_intervals(
    ready: Sequence[_Prepared], values: dict[str, np.ndarray], top_fraction: float
) -> dict[str, Matrix]:
    """Both figures with their intervals, the items of both sides resampled.

    Resampled pairs hold fewer different items and rank more noisily, so that their figures lie below those of the
    pairs themselves. The percentile interval is therefore moved until the resamples' median is the figure.
    """
    count = max(1, round(top_fraction * ready[0].score.rho.size))
    ranks = [[rankdata(rho, axis=1) for rho in one.resampled] for one in ready]
    tops = [[largest(rho, count) & (rho != 0) for rho in one.resampled] for one in ready]
    low, high = ({name: np.zeros_like(value) for name, value in values.items()} for _ in range(2))
    for i in range(len(ready)):
        for j in range(len(ready)):
            (source, _), (_, target) = tops[i], tops[j]
            smaller = np.maximum(np.minimum(source.sum(1), target.sum(1)), 1)
            draws = {
                "rank_correlation": row_correlation(ranks[i][0], ranks[j][1]),
                "overlap": (source & target).sum(1) / smaller,
            }
            for name, drawn in draws.items():
                ends = np.nanquantile(drawn, [0.025, 0.975]) - np.nanmedian(drawn) + values[name][i, j]
                low[name][i, j], high[name][i, j] = ends.clip(-1 if name == "rank_correlation" else 0, 1)
    tests = [target.acts.pairs.item[target.acts.pairs.of("test")] for target in ready]
    n, n_items = (np.array([[len(of(item)) for item in tests]] * len(ready)) for of in (np.asarray, np.unique))
    return {name: Matrix(value, low[name], high[name], n, n_items) for name, value in values.items()}


def _probe_transfer(ready: Sequence[_Prepared], site: str, seed: int) -> Matrix:
    """Each source's probe on each target's test prompts."""
    cells = []
    for source in ready:
        row = []
        for target in ready:
            test, recorded = target.acts.pairs.of("test"), target.acts.site(site)
            both = np.concatenate([recorded.memorized[test, source.layer], recorded.generalized[test, source.layer]])
            labels, items = np.repeat([True, False], len(test)), np.tile(target.acts.pairs.item[test], 2)
            scores = score_probe(source.probe, both, labels, items, seed=seed)
            row.append((scores, len(labels), len(np.unique(items))))
        cells.append(row)
    return Matrix(
        value=np.array([[scores.auroc for scores, *_ in row] for row in cells]),
        low=np.array([[scores.auroc_ci95[0] for scores, *_ in row] for row in cells]),
        high=np.array([[scores.auroc_ci95[1] for scores, *_ in row] for row in cells]),
        n=np.array([[n for _, n, _ in row] for row in cells]),
        n_items=np.array([[n_items for *_, n_items in row] for row in cells]),
    )


def _matrix(rates: list[list[Rate]]) -> Matrix:
    ends = [[rate.ci95 for rate in row] for row in rates]
    return Matrix(
        _field(rates, "rate"),
        np.array([[low for low, _ in row] for row in ends]),
        np.array([[high for _, high in row] for row in ends]),
        np.array([[rate.n for rate in row] for row in rates]),
        np.array([[rate.n_items for rate in row] for row in rates]),
    )


def _field(cells: Sequence[Sequence[Overlap | Rate]], name: str) -> Float[np.ndarray, "source target"]:
    return np.array([[getattr(cell, name) for cell in row] for row in cells], dtype=float)


def _counts(pairs: PromptPairs) -> dict[str, int]:
    return {split: int((pairs.split == split).sum()) for split in ("select", "tune", "test")}
