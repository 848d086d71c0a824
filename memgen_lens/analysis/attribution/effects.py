"""A causal method over all pairs of a model, block by block: what each pair says, tested and summed up.

Does not know how a method works (`causal`), nor what a user may ask for (`attribute`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from memgen_lens.analysis.attribution.answers import Answers, answers_of
from memgen_lens.analysis.attribution.bootstrap import Bootstrap
from memgen_lens.analysis.attribution.causal import Baseline, Effects, Explainer, Sides, attribution_patching
from memgen_lens.analysis.attribution.contrast import Contrast, Metric
from memgen_lens.analysis.attribution.methods import EXACT
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.scored import by_item, pairs_of, places_of, scores_of
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
        sides: By site, the pairs and their activations.
        effects: By site, of every neuron in each pair, positive = towards memorization.
    """

    rows: slice
    sides: dict[str, Sides]
    effects: dict[str, Effects]


def found_effects(
    model: LensModel, scored: PromptPairs, sites: Sequence[str], method: Causal, how: How, *, call: str = CALL
) -> Iterator[Found]:
    """What a causal method says of each pair, block by block in their order; nothing is kept of those before."""
    size = how.batch_size
    answers = _no_answers(scored) if how.metric else answers_of(model, scored, batch_size=size, call=call)
    blocks = _Blocks(model, scored, sites, answers, size, call)
    n_runs = 0
    if method in EXACT:
        shapes = blocks.shapes
        for shape in shapes.values():
            _require_shape(how.groups, shape, call)
        groups = None if how.groups is None else len(np.unique(how.groups[how.groups >= 0]))
        n_groups = sum(int(np.prod(shape)) if groups is None else groups for shape in shapes.values())
        n_runs = n_groups * len(scored) * (2 if method == "patching" else 1)
    replaced = _replacement(blocks, how.baseline, how.seed) if method == "ablation" else None
    with progress_bar(n_runs or len(scored), f"{method} of {', '.join(sites)}", shown=how.progress) as bar:
        count = bar.update if n_runs else lambda n: None
        contrast = Contrast(model, how.metric)
        explainers = {
            site: Explainer(contrast, site_hooks(model, site), size, how.n_steps, how.groups, count) for site in sites
        }
        for rows, sides in blocks:
            found: dict[str, Effects]
            if method == "attribution_patching":
                found = attribution_patching(explainers, sides)
            elif replaced is not None:
                found = {
                    site: explainers[site].ablation(sides[site], replaced(site, rows, sides[site])) for site in sites
                }
            else:
                found = {site: getattr(explainers[site], method)(sides[site]) for site in sites}
            for site, effects in found.items():
                # Of both prompts of a pair.
                require_finite(call, f"effects at {site}", [effects, effects], sides[site].pairs)
            yield Found(rows, sides, found)
            bar.update(0 if n_runs else rows.stop - rows.start)


def explained(
    model: LensModel,
    pairs: PromptPairs,
    sites: Sequence[str],
    method: Causal,
    how: How,
    *,
    split: PairSplit | None,
    n_permutations: int,
    n_resamples: int,
    call: str = CALL,
) -> dict[str, NeuronScores]:
    """By site, scores by a causal method; see `memgen_lens.attribute`."""
    index = by_item(pairs, pairs_of(pairs, split, call=call))
    scored, places = pairs.take(index), places_of(pairs, index)
    n_items = int(places[-1]) + 1
    totals = {
        site: _Total(
            PairMoments(n_permutations=0, seed=how.seed),
            PairMoments(n_permutations=n_permutations, seed=how.seed),
            Bootstrap(n_resamples, n_items, seed=how.seed, method="nmd"),
        )
        for site in sites
    }
    for found in found_effects(model, scored, sites, method, how, call=call):
        for site, total in totals.items():
            total.add(found.sides[site], found.effects[site], places[found.rows])
    return {site: total.scores(site, method, n_items) for site, total in totals.items()}


@dataclass
class _Total:
    """What all pairs say of one site.

    Attributes:
        moments: Of its activations.
        effects: Of its neurons' effects.
        bootstrap: Of these, resampled.
        shape: Layers and neurons.
    """

    moments: PairMoments
    effects: PairMoments
    bootstrap: Bootstrap
    shape: tuple[int, ...] = ()

    def add(self, sides: Sides, effects: Effects, items: Int[np.ndarray, " pair"]) -> None:
        self.shape = effects.shape[1:]
        self.moments.add(sides.memorized.cpu().numpy(), sides.generalized.cpu().numpy())
        self.effects.add(effects, np.zeros_like(effects), items)
        self.bootstrap.add(effects, None, items)

    def scores(self, site: str, method: Causal, n_items: int) -> NeuronScores:
        mean = self.effects.nmd.reshape(self.shape)
        scores = scores_of(site, self.moments, self.shape, n_items, method, mean, self.effects)
        return replace(scores, ci95=self.bootstrap.ci95(self.effects.constant, self.shape))


class _Blocks:
    """Some consecutive pairs after others, with their activations; nothing is kept of those before."""

    def __init__(
        self, model: LensModel, pairs: PromptPairs, sites: Sequence[str], answers: Answers, batch_size: int, call: str
    ) -> None:
        self.model, self.pairs, self.sites, self.answers = model, pairs, sites, answers
        self.how: dict[str, Any] = {"batch_size": 2 * batch_size, "call": call}
        self.device = next(iter(model.parameters())).device

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Layers and neurons of each site."""
        first = next(recorded_blocks(self.model, self.pairs.take(np.array([0])), self.sites, **self.how))
        return {site: first.sides[site].shape[2:] for site in self.sites}

    def values(self) -> Iterator[Mapping[str, Float[np.ndarray, "2 pair layer neuron"]]]:
        """Activations alone, by site."""
        for block in recorded_blocks(self.model, self.pairs, self.sites, **self.how):
            yield block.sides

    def __iter__(self) -> Iterator[tuple[slice, dict[str, Sides]]]:
        first = 0
        for both in self.values():
            rows = slice(first, first + both[self.sites[0]].shape[1])
            first = rows.stop
            pairs, answers = self.pairs.take(np.arange(rows.start, rows.stop)), self.answers[rows]
            yield (
                rows,
                {
                    site: Sides(pairs, answers, *(torch.from_numpy(side.copy()).to(self.device) for side in both[site]))
                    for site in self.sites
                },
            )


_Replacement = Callable[[str, slice, Sides], torch.Tensor]
"""What stands for ablated neurons of a site, of the pairs at some places, ``[pair, layer, neuron]``."""


def _replacement(blocks: _Blocks, baseline: Baseline, seed: int) -> _Replacement:
    """What stands for ablated neurons."""
    if baseline == "zero":
        return lambda site, rows, sides: torch.zeros_like(sides.memorized)
    if baseline == "mean":
        total: dict[str, Any] = dict.fromkeys(blocks.sites, 0.0)
        for both in blocks.values():
            total = {site: total[site] + both[site].astype(np.float64).sum((0, 1)) for site in blocks.sites}
        mean = {
            site: torch.from_numpy((each / (2 * len(blocks.pairs))).astype(np.float32)) for site, each in total.items()
        }
        return lambda site, rows, sides: mean[site].to(sides.memorized).expand_as(sides.memorized)
    others = _others(blocks.pairs.item, np.random.default_rng(seed), blocks.how["call"])
    kept = [{site: both[site][0].copy() for site in blocks.sites} for both in blocks.values()]
    memorized = {site: np.concatenate([block[site] for block in kept]) for site in blocks.sites}
    return lambda site, rows, sides: torch.from_numpy(memorized[site][others[rows]]).to(sides.memorized)


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
