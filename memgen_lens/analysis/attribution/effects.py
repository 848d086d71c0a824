"""A causal method over all pairs of a model, block by block: what each pair says, tested and summed up.

Does not know how a method works (`causal`), nor what a user may ask for (`attribute`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from memgen_lens.analysis.attribution.answers import Answers, answers_of
from memgen_lens.analysis.attribution.bootstrap import Bootstrap
from memgen_lens.analysis.attribution.causal import Baseline, Effects, Explainer, Sides
from memgen_lens.analysis.attribution.contrast import Contrast, Metric
from memgen_lens.analysis.attribution.methods import EXACT
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.streaming import by_item, pairs_of, places_of, scores_of
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.types import Causal, LensModel
from memgen_lens.models.sites import site_hooks

CALL = "attribute"


@dataclass(frozen=True)
class How:
    """How a causal method is to be run; see `memgen_lens.attribute`.

    Attributes:
        metric: In place of the answers' contrast.
        baseline: What stands for an ablated neuron.
        n_steps: Points of a path.
        groups: Neurons that are changed together.
        batch_size: Prompts in one forward pass at most.
        seed: Seed of what stands for ablated neurons.
        progress: Whether a bar is shown.
    """

    metric: Metric | None
    baseline: Baseline
    n_steps: int
    groups: Int[np.ndarray, "layer neuron"] | None
    batch_size: int
    seed: int
    progress: bool


@dataclass(frozen=True)
class Found:
    """What a causal method says of some consecutive pairs.

    Attributes:
        rows: Their places among all.
        sides: The pairs and their activations.
        effects: Of every neuron in each pair, positive = towards memorization.
    """

    rows: slice
    sides: Sides
    effects: Effects


def found_effects(
    model: LensModel, scored: PromptPairs, site: str, method: Causal, how: How, *, call: str = CALL
) -> Iterator[Found]:
    """What a causal method says of each pair, block by block in their order; nothing is kept of those before."""
    size = how.batch_size
    answers = _no_answers(scored) if how.metric else answers_of(model, scored, batch_size=size, call=call)
    blocks = _Blocks(model, scored, site, answers, size, call)
    n_runs = 0
    if method in EXACT:
        shape = blocks.shape
        _require_shape(how.groups, shape, call)
        n_groups = int(np.prod(shape)) if how.groups is None else len(np.unique(how.groups[how.groups >= 0]))
        n_runs = n_groups * len(scored) * (2 if method == "patching" else 1)
    replaced = _replacement(blocks, how.baseline, how.seed) if method == "ablation" else None
    with progress_bar(n_runs or len(scored), f"{method} of {site}", shown=how.progress) as bar:
        count = bar.update if n_runs else lambda n: None
        contrast = Contrast(model, how.metric)
        explainer = Explainer(contrast, site_hooks(model, site), size, how.n_steps, how.groups, count)
        for rows, sides in blocks:
            if replaced is not None:
                found = explainer.ablation(sides, replaced(rows, sides))
            else:
                found: Effects = getattr(explainer, method)(sides)
            require_finite(call, f"effects at {site}", [found, found], sides.pairs)  # of both prompts of a pair
            yield Found(rows, sides, found)
            bar.update(0 if n_runs else len(sides.pairs))


def explained(
    model: LensModel,
    pairs: PromptPairs,
    site: str,
    method: Causal,
    how: How,
    *,
    split: PairSplit | None,
    n_permutations: int,
    n_resamples: int,
) -> NeuronScores:
    """Scores by a causal method; see `memgen_lens.attribute`."""
    index = by_item(pairs, pairs_of(pairs, split, call=CALL))
    scored, places = pairs.take(index), places_of(pairs, index)
    moments, effects = (PairMoments(n_permutations=n, seed=how.seed) for n in (0, n_permutations))
    bootstrap = Bootstrap(n_resamples, int(places[-1]) + 1, seed=how.seed, method="nmd")
    shape: tuple[int, ...] = ()
    for found in found_effects(model, scored, site, method, how):
        sides, effect = found.sides, found.effects
        shape, items = effect.shape[1:], places[found.rows]
        moments.add(sides.memorized.cpu().numpy(), sides.generalized.cpu().numpy())
        effects.add(effect, np.zeros_like(effect), items)
        bootstrap.add(effect, None, items)
    scores = scores_of(site, moments, shape, int(places[-1]) + 1, method, effects.nmd.reshape(shape), effects)
    return replace(scores, ci95=bootstrap.ci95(effects.constant, shape))


class _Blocks:
    """Some consecutive pairs after others, with their activations; nothing is kept of those before."""

    def __init__(
        self, model: LensModel, pairs: PromptPairs, site: str, answers: Answers, batch_size: int, call: str
    ) -> None:
        self.model, self.pairs, self.site, self.answers = model, pairs, site, answers
        self.how: dict[str, Any] = {"batch_size": 2 * batch_size, "call": call}
        self.device = next(iter(model.parameters())).device

    @property
    def shape(self) -> tuple[int, ...]:
        """Layers and neurons of the site."""
        first = next(recorded_blocks(self.model, self.pairs.take(np.array([0])), [self.site], **self.how))
        return first.sides[self.site].shape[2:]

    def values(self) -> Iterator[Float[np.ndarray, "2 pair layer neuron"]]:
        """Activations alone."""
        for block in recorded_blocks(self.model, self.pairs, [self.site], **self.how):
            yield block.sides[self.site]

    def __iter__(self) -> Iterator[tuple[slice, Sides]]:
        first = 0
        for both in self.values():
            rows = slice(first, first + both.shape[1])
            first = rows.stop
            mem, gen = (torch.from_numpy(side.copy()).to(self.device) for side in both)
            yield rows, Sides(self.pairs.take(np.arange(rows.start, rows.stop)), self.answers[rows], mem, gen)


_Replacement = Callable[[slice, Sides], torch.Tensor]
"""What stands for ablated neurons of the pairs at some places, ``[pair, layer, neuron]``."""


def _replacement(blocks: _Blocks, baseline: Baseline, seed: int) -> _Replacement:
    """What stands for ablated neurons."""
    if baseline == "zero":
        return lambda rows, sides: torch.zeros_like(sides.memorized)
    if baseline == "mean":
        total = sum(both.astype(np.float64).sum((0, 1)) for both in blocks.values())
        mean = torch.from_numpy((np.asarray(total) / (2 * len(blocks.pairs))).astype(np.float32))
        return lambda rows, sides: mean.to(sides.memorized).expand_as(sides.memorized)
    others = _others(blocks.pairs.item, np.random.default_rng(seed), blocks.how["call"])
    memorized = np.concatenate([both[0].copy() for both in blocks.values()])
    return lambda rows, sides: torch.from_numpy(memorized[others[rows]]).to(sides.memorized)


def _others(items: Int[np.ndarray, " pair"], rng: np.random.Generator, call: str) -> Int[np.ndarray, " pair"]:
    """For each pair, one of another item; pairs of one item stand together."""
    _, start, count = np.unique(items, return_index=True, return_counts=True)
    if len(start) < 2:
        raise PairsError(
            f"{call}(method='ablation', baseline='resample')",
            expected="pairs of at least two items to draw from",
            received="one item",
            fix="Use baseline='mean' or 'zero'.",
        )
    first, size = (np.repeat(part[np.argsort(start)], count[np.argsort(start)]) for part in (start, count))
    drawn = rng.integers(len(items) - size)
    return np.where(drawn < first, drawn, drawn + size)


def _no_answers(pairs: PromptPairs) -> Answers:
    """For a user's own quantity, which looks at no answer."""
    return [([0], [0])] * len(pairs)


def _require_shape(groups: Any, shape: tuple[int, ...], call: str) -> None:
    if groups is not None and (groups.shape != shape or (groups < 0).all()):
        raise SettingsError(
            f"{call}(groups=...)",
            expected=f"a number for each neuron of the site, {'x'.join(map(str, shape))}, one of them 0 or more",
            received=f"{'x'.join(map(str, groups.shape))}, the largest {groups.max()}",
            fix="Number the neurons, those that are changed together alike.",
        )
