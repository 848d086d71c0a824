"""A causal method over all pairs of a model, block by block: what each pair says, tested and summed up.

Does not know how a method works (`causal`), nor what a user may ask for (`attribute`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from memgen_lens.analysis.attribution.answers import Answers, answers_of
from memgen_lens.analysis.attribution.causal import Baseline, Effects, Explainer, Sides
from memgen_lens.analysis.attribution.contrast import Contrast, Metric
from memgen_lens.analysis.attribution.methods import EXACT, Causal
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.streaming import by_item, count_items, pairs_of, scores_of
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import NeuronScores
from memgen_lens.core.types import LensModel
from memgen_lens.models.sites import site_hooks

CALL = "attribute"


def explained(
    model: LensModel,
    pairs: PromptPairs,
    site: str,
    method: Causal,
    *,
    split: PairSplit | None,
    n_permutations: int,
    seed: int,
    metric: Metric | None,
    baseline: Baseline,
    n_steps: int,
    groups: Int[np.ndarray, "layer neuron"] | None,
    batch_size: int,
    progress: bool,
) -> NeuronScores:
    """Scores by a causal method; see `memgen_lens.attribute`."""
    index = by_item(pairs, pairs_of(pairs, split, call=CALL))
    scored = pairs.take(index)
    answers = _no_answers(scored) if metric else answers_of(model, scored, batch_size=batch_size, call=CALL)
    blocks = _Blocks(model, scored, site, answers, batch_size)
    shape = blocks.shape
    n_runs = 0
    if method in EXACT:
        _require_shape(groups, shape)
        n_groups = int(np.prod(shape)) if groups is None else len(np.unique(groups[groups >= 0]))
        n_runs = n_groups * len(scored) * (2 if method == "patching" else 1)
    replaced = _replacement(blocks, baseline, seed) if method == "ablation" else None
    moments, effects = (PairMoments(n_permutations=n, seed=seed) for n in (0, n_permutations))
    with progress_bar(n_runs or len(scored), f"{method} of {site}", shown=progress) as bar:
        count = bar.update if n_runs else lambda n: None
        explainer = Explainer(Contrast(model, metric), site_hooks(model, site), batch_size, n_steps, groups, count)
        for rows, sides in blocks:
            if replaced is not None:
                found = explainer.ablation(sides, replaced(rows, sides))
            else:
                found: Effects = getattr(explainer, method)(sides)
            require_finite(CALL, f"effects at {site}", [found, found], sides.pairs)  # of both prompts of a pair
            moments.add(sides.memorized.cpu().numpy(), sides.generalized.cpu().numpy())
            effects.add(found, np.zeros_like(found), sides.pairs.item)
            bar.update(0 if n_runs else len(sides.pairs))
    score = effects.nmd.reshape(shape)
    return scores_of(site, moments, shape, count_items(pairs, index), method, score, effects)


class _Blocks:
    """Some consecutive pairs after others, with their activations; nothing is kept of those before."""

    def __init__(self, model: LensModel, pairs: PromptPairs, site: str, answers: Answers, batch_size: int) -> None:
        self.model, self.pairs, self.site, self.answers = model, pairs, site, answers
        self.how: dict[str, Any] = {"batch_size": 2 * batch_size, "call": CALL}
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
    others = _others(blocks.pairs.item, np.random.default_rng(seed))
    memorized = np.concatenate([both[0].copy() for both in blocks.values()])
    return lambda rows, sides: torch.from_numpy(memorized[others[rows]]).to(sides.memorized)


def _others(items: Int[np.ndarray, " pair"], rng: np.random.Generator) -> Int[np.ndarray, " pair"]:
    """For each pair, one of another item; pairs of one item stand together."""
    _, start, count = np.unique(items, return_index=True, return_counts=True)
    if len(start) < 2:
        raise PairsError(
            f"{CALL}(method='ablation', baseline='resample')",
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


def _require_shape(groups: Any, shape: tuple[int, ...]) -> None:
    if groups is not None and (groups.shape != shape or (groups < 0).all()):
        raise SettingsError(
            f"{CALL}(groups=...)",
            expected=f"a number for each neuron of the site, {'x'.join(map(str, shape))}, one of them 0 or more",
            received=f"{'x'.join(map(str, groups.shape))}, the largest {groups.max()}",
            fix="Number the neurons, those that are changed together alike.",
        )
