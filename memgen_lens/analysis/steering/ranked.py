"""What an order of the neurons does: recall and the rule without its first neurons, and with these shifted.

Does not know methods nor plants: see `memgen_lens.method_benchmark`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memgen_lens.analysis.attribution.methods import CAUSAL
from memgen_lens.analysis.recording.judge import Judge
from memgen_lens.analysis.recording.pairs import collect_pairs
from memgen_lens.analysis.steering.generation import steered_outputs
from memgen_lens.analysis.steering.steering import Steering
from memgen_lens.analysis.steering.zeroed import zeroed
from memgen_lens.behavior import observe_items
from memgen_lens.core.items import Item
from memgen_lens.core.method_records import FEW
from memgen_lens.core.pairs import PromptPairs
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.types import Behavior, LensModel

N_RANDOM = 40
"""Random sets of neurons that an order's first ones are held against."""
NORMS = (0.5, 1.0, 2.0)
"""Norms of a shift to choose from, in multiples of the norm of all neurons' NMD."""


@dataclass(frozen=True)
class Subject:
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
    def of(cls, model: LensModel, task: Any, site: str, *, seed: int) -> "Subject":
        """Collect the pairs of a model and what is asked of it; `collect_pairs` says what it refuses."""
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


def strength_of(scores: NeuronScores) -> Float[np.ndarray, " neuron"]:
    """What neurons are ordered by, as `Steering.from_scores` orders them."""
    score = scores.score.ravel()
    return score if scores.method in CAUSAL else np.abs(score)


def order_of(scores: NeuronScores) -> Int[np.ndarray, " neuron"]:
    """The neurons, strongest first."""
    return np.argsort(-strength_of(scores), kind="stable")


def without_first(
    subject: Subject,
    order: Int[np.ndarray, " neuron"],
    counts: Sequence[int],
    shape: tuple[int, ...],
    split: str,
    before: tuple[float, float],
) -> tuple[Float[np.ndarray, " count"], Float[np.ndarray, " count"]]:
    """Shares of recall lost, and of accuracy on prompts never trained on left, where the first neurons are zero.

    Args:
        subject: The model.
        order: Neurons, strongest first.
        counts: How many are zero.
        shape: Layers and neurons.
        split: ``"tune"`` or ``"test"``.
        before: Both rates where none is zero.
    """
    rates = []
    for count in counts:
        with zeroed(subject.model, subject.site, first_of(order, count, shape)):
            rates.append(subject.rates(split))
    recall, generic = np.array(rates).T / np.maximum(np.array(before)[:, None], 1e-9)
    return 1 - recall, generic


def steered(subject: Subject, scores: NeuronScores, order: Int[np.ndarray, " neuron"]) -> tuple[float, float]:
    """Share of recalled ``test`` prompts that compute, shifted by the norm that did best on ``tune``."""
    selected = first_of(order, max(1, round(FEW * scores.score.size)), scores.score.shape)
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


def random_sets(
    subject: Subject, best: NeuronScores, counts: Sequence[int], recall: float, rng: np.random.Generator
) -> Float[np.ndarray, "draw few"]:
    """Recall lost without random neurons, as many in each layer as are among the best method's first: for few."""
    order, shape = order_of(best), best.score.shape
    few = [count for count in counts if count <= FEW * len(order)]
    lost = np.zeros((N_RANDOM, len(few)))
    for draw in range(N_RANDOM):
        for place, count in enumerate(few):
            selected = np.zeros(shape, dtype=bool)
            for layer, n in enumerate(first_of(order, count, shape).sum(1).tolist()):
                selected[layer, rng.choice(shape[1], n, replace=False)] = True
            with zeroed(subject.model, subject.site, selected):
                lost[draw, place] = 1 - subject.recall("test") / max(recall, 1e-9)
    return lost


def counts_of(n: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to 5 % of the neurons; 5, 10, 25 and 50 %."""
    few = max(1, int(FEW * n))
    powers = [2**i for i in range(few.bit_length()) if 2**i < few]
    return tuple(sorted({*powers, few, *(max(1, round(share * n)) for share in (0.1, 0.25, 0.5))}))


def first_of(order: Int[np.ndarray, " neuron"], count: int, shape: tuple[int, ...]) -> Bool[np.ndarray, "layer neuron"]:
    """The first neurons of an order."""
    selected = np.zeros(len(order), dtype=bool)
    selected[order[:count]] = True
    return selected.reshape(shape)
