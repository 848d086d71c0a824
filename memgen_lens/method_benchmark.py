"""Which way to score neurons finds those that recall? All methods on models of which it is known, and on others.

Does not train, and knows no method's formula: see `memgen_lens.attribute`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

from memgen_lens.analysis import Steering, attribute, collect_pairs
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT, Method, Observational
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.zeroed import zeroed
from memgen_lens.behavior import observe_items
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.config import Plant
from memgen_lens.core.errors import RunDirectoryError
from memgen_lens.core.files import read_json
from memgen_lens.core.items import Item, same_items
from memgen_lens.core.method_records import FEW, MethodResult, MethodsBenchmark, ModelResult
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.peak_memory import peak_memory
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.types import Behavior, LensModel
from memgen_lens.models import load_model
from memgen_lens.tasks.task import Task
from memgen_lens.training import TrainingRun

METHODS: tuple[Method, ...] = (*get_args(Observational), *CAUSAL)
N_RANDOM = 40
"""Random sets of neurons that the best method's are held against."""
NORMS = (0.5, 1.0, 2.0)
"""Norms of a shift to choose from, in multiples of the norm of all neurons' NMD."""
ENDS = 0.9
"""Share of recall that is lost where recall ends, and of held-out accuracy that is left."""


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
    norm) is chosen on ``tune`` and validation prompts. `ModelResult.verdict` says whether few neurons recall.

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
    with progress_bar(len(several) * (len(methods) + 1), "benchmark", shown=progress) as bar:
        for name, model, task, settings in (_opened(run, device) for run in several):
            subject = _Subject.of(model, task, site, seed=seed)
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
class _Subject:
    """A model, its pairs, and the prompts that are asked of it again and again.

    Attributes:
        model: The model.
        task: Its task.
        site: The site.
        pairs: Its pairs.
        recalled: By split, one prompt of each pair that recalls, none twice.
        generic: Validation prompts (``"tune"``) and held-out ones (``"test"``).
    """

    model: LensModel
    task: Any
    site: str
    pairs: PromptPairs
    recalled: dict[str, list[Item]]
    generic: dict[str, list[Item]]

    @classmethod
    def of(cls, model: LensModel, task: Any, site: str, *, seed: int) -> "_Subject":
        pairs = collect_pairs(model, task, seed=seed, progress=False)
        pairs.require(1, len(pairs), call="benchmark_methods")
        recalled = {
            split: list({pairs.memorized[i].prompt: pairs.memorized[i] for i in pairs.of(split)}.values())
            for split in ("tune", "test")
        }
        generic = {"tune": list(task.items("validation")), "test": list(task.items("heldout"))}
        return cls(model, task, site, pairs, recalled, generic)

    def recall(self, split: str) -> float:
        """Share of prompts that recall."""
        return self._share(self.recalled[split], Behavior.MEMORIZATION)

    def rates(self, split: str) -> tuple[float, float]:
        """Recall, and accuracy on prompts never trained on."""
        return self.recall(split), self._share(self.generic[split], Behavior.GENERALIZATION)

    def _share(self, items: Sequence[Item], aim: Behavior) -> float:
        outcomes = observe_items(self.model, self.task, items, progress=False)
        return float(np.mean([outcome.behavior is aim for outcome in outcomes]))


@dataclass(frozen=True)
class _Scored:
    """What a method said, and what that cost."""

    scores: NeuronScores
    seconds: float
    memory_mb: float | None

    @property
    def strength(self) -> Float[np.ndarray, " neuron"]:
        """What neurons are ordered by, as `Steering.from_scores` orders them."""
        score = self.scores.score.ravel()
        return score if self.scores.method in CAUSAL else np.abs(score)


def _scored(subject: _Subject, method: Method, exact_pairs: int, seed: int) -> _Scored:
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
    subject: _Subject, scored: Sequence[_Scored], plant: Plant | None, *, name: str, trained: int, seed: int
) -> ModelResult:
    rng = np.random.default_rng(seed)
    shape = scored[0].scores.score.shape
    noise = replace(scored[0].scores, method="random", score=rng.random(shape))
    everyone = [*scored, _Scored(noise, 0.0, None)]
    counts = _counts(noise.score.size)
    planted = _planted(plant, subject.site, shape)
    before = {split: subject.rates(split) for split in ("tune", "test")}
    results = [_judged(subject, one, counts, planted, before) for one in everyone]
    best = max(range(len(scored)), key=lambda i: results[i].area_tune)
    drawn = _random_sets(subject, scored[best], counts, before["test"][0], rng)
    high = np.quantile(drawn, 0.975, axis=0).tolist()
    strengths = np.stack([one.strength for one in scored])
    return ModelResult(
        name=name,
        kind="ordinary" if plant is None else "planted" if plant.neurons else "distributed",
        task=subject.task.name,
        seed=trained,
        site=subject.site,
        n_neurons=noise.score.size,
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


def _judged(
    subject: _Subject,
    one: _Scored,
    counts: Sequence[int],
    planted: Bool[np.ndarray, "layer neuron"],
    before: dict[str, tuple[float, float]],
) -> MethodResult:
    """Everything of one method on one model."""
    order = np.argsort(-one.strength, kind="stable")
    removed, kept, areas = {}, {}, {}
    for split in ("tune", "test"):
        rates = []
        for count in counts:
            with zeroed(subject.model, subject.site, _first(order, count, planted.shape)):
                rates.append(subject.rates(split))
        recall, generic = np.array(rates).T / np.maximum(np.array(before[split])[:, None], 1e-9)
        removed[split], kept[split] = 1 - recall, generic
        areas[split] = float(np.mean(removed[split] - (1 - kept[split])))
    steered, norm = _steered(subject, one, order)
    there = bool(planted.any())
    hits = planted.ravel()[order[: int(planted.sum())]]
    return MethodResult(
        method=one.scores.method,
        n_pairs=one.scores.n_pairs,
        seconds=one.seconds,
        memory_mb=one.memory_mb,
        average_precision=float(average_precision_score(planted.ravel(), one.strength)) if there else None,
        precision=float(hits.mean()) if there else None,
        removed=tuple(removed["test"].tolist()),
        kept=tuple(kept["test"].tolist()),
        area=areas["test"],
        area_tune=areas["tune"],
        steered=steered,
        norm=norm,
    )


def _steered(subject: _Subject, one: _Scored, order: Int[np.ndarray, " neuron"]) -> tuple[float, float]:
    """Share of recalled ``test`` prompts that compute, shifted by the norm that did best on ``tune``."""
    scores = one.scores
    selected = _first(order, max(1, round(FEW * scores.score.size)), scores.score.shape)
    steer = Steering.from_scores(replace(scores, score=np.where(selected, 1.0, 0.0), method="chosen"), FEW, 1.0)
    length, whole = np.linalg.norm(steer.shift), np.linalg.norm(scores.nmd)
    shifts = [steer.shift * (norm * whole / max(length, 1e-12)) for norm in NORMS]
    judge = Judge.of(subject.model, subject.task, subject.pairs, batch_size=2048)

    def shares(split: str, shifts: Sequence[np.ndarray]) -> list[dict[Behavior, float]]:
        items = subject.recalled[split]
        outputs = steered_outputs(
            subject.model,
            [item.prompt for item in items],
            [replace(steer, shift=shift) for shift in shifts],
            toward="generalization",
            max_new_tokens=judge.max_new_tokens,
        )
        shown = [[judge.behavior(item, said) for item, said in zip(items, row, strict=True)] for row in outputs]
        return [{kind: float(np.mean([b is kind for b in row])) for kind in Behavior} for row in shown]

    tried = shares("tune", shifts)
    best = max(range(len(NORMS)), key=lambda i: tried[i][Behavior.GENERALIZATION] - tried[i][Behavior.OTHER])
    return shares("test", [shifts[best]])[0][Behavior.GENERALIZATION], NORMS[best]


def _random_sets(
    subject: _Subject, best: _Scored, counts: Sequence[int], recall: float, rng: np.random.Generator
) -> Float[np.ndarray, "draw few"]:
    """Recall lost without random neurons, as many in each layer as are among the best method's first: for few."""
    order, shape = np.argsort(-best.strength, kind="stable"), best.scores.score.shape
    few = [count for count in counts if count <= FEW * len(order)]
    lost = np.zeros((N_RANDOM, len(few)))
    for draw in range(N_RANDOM):
        for place, count in enumerate(few):
            selected = np.zeros(shape, dtype=bool)
            for layer, n in enumerate(_first(order, count, shape).sum(1).tolist()):
                selected[layer, rng.choice(shape[1], n, replace=False)] = True
            with zeroed(subject.model, subject.site, selected):
                lost[draw, place] = 1 - subject.recall("test") / max(recall, 1e-9)
    return lost


def _sufficient(
    removed: Sequence[float], kept: Sequence[float], counts: Sequence[int], random_high: Sequence[float]
) -> int | None:
    """See `ModelResult.verdict`; random sets there are for few neurons alone."""
    for lost, left, count, high in zip(removed, kept, counts, random_high, strict=False):
        if lost >= ENDS and left >= ENDS and high <= 1 - ENDS:
            return count
    return None


def _counts(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to 5 % of the neurons; 5, 10, 25 and 50 %."""
    few = max(1, int(FEW * n))
    powers = [2**i for i in range(few.bit_length()) if 2**i < few]
    return tuple(sorted({*powers, few, *(max(1, round(share * n)) for share in (0.1, 0.25, 0.5))}))


def _first(order: Int[np.ndarray, " neuron"], count: int, shape: tuple[int, ...]) -> Bool[np.ndarray, "layer neuron"]:
    selected = np.zeros(len(order), dtype=bool)
    selected[order[:count]] = True
    return selected.reshape(shape)


def _planted(plant: Plant | None, site: str, shape: tuple[int, ...]) -> Bool[np.ndarray, "layer neuron"]:
    planted = np.zeros(shape, dtype=bool)
    if plant is not None and site == "post":
        planted[plant.layer, list(plant.neurons)] = True
    return planted


def _agreement(strengths: Float[np.ndarray, "method neuron"]) -> tuple[tuple[float, ...], ...]:
    if len(strengths) < 3:  # scipy gives a number, not a matrix, for two
        pairs = [[float(spearmanr(a, b).statistic) for b in strengths] for a in strengths]
        return tuple(map(tuple, pairs))
    return tuple(map(tuple, np.asarray(spearmanr(strengths, axis=1).statistic).tolist()))
