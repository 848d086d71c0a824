"""Which way to score neurons finds those that recall? All methods on models of which it is known, and on others.

Does not train, and knows no method's formula: see `memgen_lens.attribute`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from memgen_lens.analysis import attribute, record
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT
from memgen_lens.analysis.steering.ranked import (
    Subject,
    counts_of,
    order_of,
    random_sets,
    steered,
    strength_of,
    without_first,
)
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import Plant
from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import read_json
from memgen_lens.core.items import same_items
from memgen_lens.core.method_records import CONTROLS, MethodResult, MethodsBenchmark, ModelResult
from memgen_lens.core.peak_memory import peak_memory
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.stats import row_correlation
from memgen_lens.core.types import LensModel, Method, Observational
from memgen_lens.models import load_model
from memgen_lens.tasks.task import Task
from memgen_lens.training import TrainingRun

METHODS: tuple[Method, ...] = (*get_args(Observational), *CAUSAL)
ENDS = 0.9
"""Share of recall that is lost where recall ends, and of held-out accuracy that is left."""
BY_CHANCE = 0.5
"""Share of recall that random neurons may take, where few neurons are said to suffice."""


@arguments(
    runs=kinds.several(kinds.one(TrainingRun) | kinds.place("benchmark_methods(runs)")),
    methods=kinds.several(Method) | None,
    site=kinds.Text,
    exact_pairs=kinds.Count,
    seed=kinds.Seed,
    device=kinds.Text,
    progress=kinds.Flag,
)
def benchmark_methods(
    runs: TrainingRun | str | Path | Sequence[TrainingRun | str | Path],
    *,
    methods: Sequence[Method] | None = None,
    site: str = "post",
    exact_pairs: int = 32,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> MethodsBenchmark:
    """Hold all methods of `attribute` against each other, on planted, distributed and ordinary models.

    On each model: every method scores the neurons on the ``select`` pairs. Then the neurons are zeroed in the order of
    its scores (by size; causal ones: the largest above 0 first), 1, 2, 4, ... of them, and recall of ``test`` prompts
    and accuracy on held-out prompts are asked again. Where recall was planted (`memgen_lens.Plant`), the order is held
    against the planted neurons too. The first 5 % of neurons are shifted as `Steering` shifts them, by a shift of the
    same norm for all methods, whatever the sizes of their neurons' differences. What is chosen (the best method, the
    norm) is chosen on ``tune`` and validation prompts. Beside the methods stand a random order, and one by the spread
    of each neuron's activation, whatever the label: planted neurons are few that do much, and so large.
    `ModelResult.verdict` says whether few neurons recall.

    Args:
        runs: Runs of `train` or `finetune`, or their directories.
        methods: Methods to compare; default: all.
        site: TransformerLens short name. Plants are in ``"post"``.
        exact_pairs: ``select`` pairs that the exact methods are given at most, which run the model once for each neuron
            and pair.
        seed: Seed of the splits, of random orders and sets.
        device: Torch device.
        progress: Show a progress bar.

    Raises:
        RunDirectoryError: A directory holds no run.
        PairsError: Too few prompts of a model flip.
        SiteError: A model lacks the site.
    """
    several = [runs] if isinstance(runs, TrainingRun | str | Path) else list(runs)
    methods = METHODS if methods is None else tuple(dict.fromkeys(methods))
    found = []
    with progress_bar(len(several) * (len(methods) + 1), "benchmark", shown=progress, unit="method") as bar:
        for name, model, task, settings in (_opened(run, device) for run in several):
            subject = Subject.of(model, task, site, seed=seed)
            plant = Plant(**settings["plant"]) if settings.get("plant") else None
            scored = []
            for method in methods:
                scored.append(_scored(subject, method, exact_pairs, seed))
                bar.update()
            found.append(_result(subject, scored, plant, name=name, trained=settings.get("seed", 0), seed=seed))
            bar.update()
    return MethodsBenchmark(tuple(found))


def _opened(run: TrainingRun | str | Path, device: str) -> tuple[str, LensModel, Any, dict[str, Any]]:
    """Name, model, task and settings of training."""
    if isinstance(run, TrainingRun):
        return (
            str(run.out.name) if run.out else run.task.name,
            run.model,
            run.task,
            run.config.model_dump(mode="json"),
        )
    directory = Path(run)
    if not (directory / "checkpoints" / "settings.json").exists():
        raise RunDirectoryError(
            f"benchmark_methods({str(directory)!r})",
            expected="a run directory of train, finetune or memgen-lens run",
            received="none: it has no checkpoints/settings.json",
            fix="Train with out=..., or give the run itself.",
        )
    written = read_json(directory / "checkpoints" / "settings.json")
    model = load_model(directory / "model", device=device)
    return directory.name, model, Task.from_settings(written["task"]), written["train"]


@dataclass(frozen=True)
class _Scored:
    """What a method said, and what that cost."""

    scores: NeuronScores
    seconds: float
    memory_mb: float | None


def _scored(subject: Subject, method: Method, exact_pairs: int, seed: int) -> _Scored:
    pairs = subject.pairs
    index = pairs.of("select")
    if method in EXACT:
        _, first = np.unique(pairs.item[index], return_index=True)  # one pair an item before any second one
        index = np.concatenate([index[first], np.delete(index, first)])[:exact_pairs]
    given = pairs.take(index)
    with peak_memory() as grown:
        started = time.perf_counter()
        scores = attribute(
            subject.model,
            given,
            subject.site,
            method=method,
            split=None,
            n_permutations=0,
            seed=seed,
            progress=False,
        )
        seconds = time.perf_counter() - started
    return _Scored(scores, seconds, grown())


def _result(
    subject: Subject, scored: Sequence[_Scored], plant: Plant | None, *, name: str, trained: int, seed: int
) -> ModelResult:
    rng = np.random.default_rng(seed)
    shape = scored[0].scores.score.shape
    unlabelled = {"activation_std": _spread(subject), "random": rng.random(shape)}
    controls = [replace(scored[0].scores, method=name, score=unlabelled[name]) for name in CONTROLS]
    everyone = [*scored, *(_Scored(scores, 0.0, None) for scores in controls)]
    n_neurons = controls[0].score.size
    counts = counts_of(n_neurons)
    planted = _planted(plant, subject.site, shape)
    before = {split: subject.rates(split) for split in ("tune", "test")}
    results = [_judged(subject, one, counts, planted, before) for one in everyone]
    best = max(range(len(scored)), key=lambda i: results[i].area_tune)
    drawn = random_sets(subject, scored[best].scores, counts, before["test"][0], rng)
    high = np.quantile(drawn, 0.975, axis=0).tolist()
    strengths = np.stack([strength_of(one.scores) for one in scored])
    return ModelResult(
        name=name,
        kind="ordinary" if plant is None else "planted" if plant.neurons else "distributed",
        task=subject.task.name,
        seed=trained,
        site=subject.site,
        n_neurons=n_neurons,
        n_planted=int(planted.sum()),
        recall=before["test"][0],
        heldout=before["test"][1],
        n=len(subject.recalled["test"]),
        n_items=len(set(same_items(subject.recalled["test"]))),
        n_heldout=len(subject.generic["test"]),
        counts=counts,
        results=tuple(results),
        best=results[best].method,
        random_removed=tuple(drawn.mean(0).tolist()),
        random_removed_high=tuple(high),
        n_random=len(drawn),
        agreement=_agreement(strengths),
        n_sufficient=_sufficient(results[best].removed, results[best].kept, counts, high),
    )


def _spread(subject: Subject) -> Float[np.ndarray, "layer neuron"]:
    """Standard deviation of each activation over both prompts of the ``select`` pairs: no label is looked at."""
    pairs = subject.pairs.take(subject.pairs.of("select"))
    recorded = record(subject.model, pairs, [subject.site], progress=False).site(subject.site)
    return np.concatenate([recorded.memorized, recorded.generalized]).std(0, dtype=np.float64)


def _judged(
    subject: Subject,
    one: _Scored,
    counts: Sequence[int],
    planted: Bool[np.ndarray, "layer neuron"],
    before: dict[str, tuple[float, float]],
) -> MethodResult:
    """Everything of one method on one model."""
    order = order_of(one.scores)
    removed, kept, areas = {}, {}, {}
    for split in ("tune", "test"):
        removed[split], kept[split] = without_first(subject, order, counts, planted.shape, split, before[split])
        areas[split] = float(np.mean(removed[split] - (1 - kept[split])))
    shifted, norm = steered(subject, one.scores, order)
    there = bool(planted.any())
    hits = planted.ravel()[order[: int(planted.sum())]]
    return MethodResult(
        method=one.scores.method,
        n_pairs=one.scores.n_pairs,
        seconds=one.seconds,
        memory_mb=one.memory_mb,
        average_precision=float(average_precision_score(planted.ravel(), strength_of(one.scores))) if there else None,
        precision=float(hits.mean()) if there else None,
        removed=tuple(removed["test"].tolist()),
        kept=tuple(kept["test"].tolist()),
        area=areas["test"],
        area_tune=areas["tune"],
        steered=shifted,
        norm=norm,
    )


def _sufficient(
    removed: Sequence[float], kept: Sequence[float], counts: Sequence[int], random_high: Sequence[float]
) -> int | None:
    """See `ModelResult.verdict`; random sets there are for few neurons alone."""
    for lost, left, count, high in zip(removed, kept, counts, random_high, strict=False):
        if lost >= ENDS and left >= ENDS and high <= BY_CHANCE:
            return count
    return None


def _planted(plant: Plant | None, site: str, shape: tuple[int, ...]) -> Bool[np.ndarray, "layer neuron"]:
    planted = np.zeros(shape, dtype=bool)
    if plant is not None and site == "post":
        planted[plant.layer, list(plant.neurons)] = True
    return planted


def _agreement(strengths: Float[np.ndarray, "method neuron"]) -> tuple[tuple[float, ...], ...]:
    """Spearman's correlation of each two rows: Pearson's of their ranks."""
    ranks = rankdata(strengths, axis=1)
    return tuple(tuple(row_correlation(ranks, np.broadcast_to(rank, ranks.shape)).tolist()) for rank in ranks)
