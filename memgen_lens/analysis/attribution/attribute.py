"""Score every neuron of a site by one of many methods: what differs, and what makes the difference.

Does not compute a method: see `methods` (on recorded activations) and `causal` (on a model).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import BeforeValidator

from memgen_lens.analysis.attribution.causal import Baseline, Effects, Explainer, Sides
from memgen_lens.analysis.attribution.contrast import Answers, Contrast, Metric, answers_of
from memgen_lens.analysis.attribution.methods import CAUSAL, EXACT, Method, observed
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.streaming import (
    PAIRS_A_BLOCK,
    by_item,
    count_items,
    pairs_of,
    require_permutations,
    scores_of,
)
from memgen_lens.analysis.recording.activations import record
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.analysis.recording.reading import recorded_blocks
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.errors import PairsError, SettingsError
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.types import LensModel
from memgen_lens.models.guard import require_lens_model
from memgen_lens.models.sites import site_hooks

CALL = "attribute"
PROMPTS_AT_ONCE = 256
"""Prompts of one forward pass of a causal method, where no number is asked for."""


def _source(value: Any) -> Any:
    if not isinstance(value, Activations):
        require_lens_model(value, call=CALL)
    return value


def _groups(value: Any) -> Any:
    if value is None:
        return None
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.array("ragged")
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            "whole numbers [layer, neuron]: neurons with one number are changed together, below 0 not at all"
        )
    return array.astype(np.int64)


@arguments(
    source=Annotated[Any, BeforeValidator(_source)],
    pairs=kinds.one(PromptPairs) | kinds.Text | None,
    site=kinds.Text | None,
    method=Method,
    split=kinds.PairSplitName | None,
    n_permutations=kinds.Number0,
    seed=kinds.Seed,
    metric=kinds.Callback | None,
    baseline=Literal["zero", "mean", "resample"],
    n_steps=kinds.Count,
    groups=Annotated[Any, BeforeValidator(_groups)],
    batch_size=kinds.Count | None,
    progress=kinds.Flag,
)
def attribute(
    source: Activations | LensModel,
    pairs: PromptPairs | str | None = None,
    site: str | None = None,
    *,
    method: Method = "pearson",
    split: PairSplit | None = "select",
    n_permutations: int = 1000,
    seed: int = 0,
    metric: Metric | None = None,
    baseline: Baseline = "mean",
    n_steps: int = 20,
    groups: Int[np.ndarray, "layer neuron"] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> NeuronScores:
    """Score every neuron of a site; positive = towards memorization.

    ``attribute(acts, site)`` scores recorded activations, ``attribute(model, pairs, site, method=...)`` a model. Every
    method looks at the answer position alone. Which neurons *differ* between the two prompts of a pair (both forms of
    the call):

    - ``"pearson"`` (the default): ``rho``, the correlation of the activation with the label (1 = memorization) over
      both prompts of all pairs (arXiv 2412.18497 v2, sec. 4).
    - ``"nmd"``: mean over pairs of ``h_mem - h_gen`` (v1, sec. 5), in units of the activation.
    - ``"cohens_d"``: nmd by the pooled standard deviation (Cohen 1988). ``"welch_t"``: Welch's t (1947); with as many
      prompts on either side it is Cohen's d times ``sqrt(n / 2)``, and so ranks alike within one set of pairs.
    - ``"auroc"``: ``2 * AUROC - 1`` of the activation as a score for the label (Somers' D), in [-1, 1].
    - ``"probe_weights"``: weights of a layer's linear probe (`fit_probes`' own, on all the pairs) on standardized
      activations.

    Which neurons *make* the difference (a model and pairs), to the contrast of a prompt: the log-probability of its
    memorized answer minus that of the rule's, each summed over its tokens, teacher-forced:

    - ``"attribution_patching"`` (Nanda 2023; Syed et al., arXiv 2310.10348): the contrast's gradient, the mean of both
      prompts', times ``h_mem - h_gen``. One backward pass for all neurons: the linear estimate of ``"patching"``.
    - ``"attribution_patching_ig"`` (after Hanna et al., arXiv 2403.17806): the same with gradients averaged while a
      layer's activation goes straight from one prompt's to the other's, inside either prompt. Departure: activations
      of one layer at the answer position, not input embeddings, as the prompts' lengths may differ.
    - ``"integrated_gradients"`` (Knowledge Neurons, Dai et al., arXiv 2104.08696, eq. 2): the activation on the
      recalled prompt times the mean gradient while its layer is scaled up from zero. Departures: of the contrast, not
      of a probability; Gauss-Legendre points, not a Riemann sum. Over a layer the scores sum up to what zeroing all
      of it loses.
    - ``"ablation"``: what the contrast of the recalled prompt loses where the neuron is zero, has its mean over all
      prompts, or another item's value (``baseline``). ``"patching"`` (Vig et al. 2020): what it gains in the computed
      prompt with the recalled prompt's value, and loses in the recalled prompt with the computed one's; the mean.
      Both are exact, and run the model once for each neuron.

    ``p`` is a two-sided paired permutation test. Of observational methods: under the null the labels of an item are
    exchangeable, so the signs of its differences are flipped at random, those of all its pairs together; the statistic
    is the t of the items' sums of differences, the same for all these methods. Of causal ones: the signs of an item's
    effects are flipped. ``p_family`` refers each neuron to the largest abs(t) over all neurons (max-T; Westfall and
    Young 1993), ``q`` is Benjamini-Hochberg over the site. The papers test nothing.

    Args:
        source: Activations recorded by `record`, or a lens model, left without hooks also after an exception.
        pairs: With a model, its prompt pairs.
        site: TransformerLens short name; with activations it may stand in second place.
        method: One of the above.
        split: Pairs to score on; ``"select"`` keeps ``tune`` and ``test`` untouched. None = all pairs.
        n_permutations: Sign flips, at least 1,000; p-values are at least ``1 / (n_permutations + 1)``. 0 = no test.
        seed: Seed of the sign flips, and of what is resampled.
        metric: In place of the contrast: a function of logits ``[row, d_vocab]`` behind the prompts and the rows'
            items, that gives one number a row; by torch, so that gradients pass.
        baseline: What stands for an ablated neuron.
        n_steps: Points of a path (``"attribution_patching_ig"``, ``"integrated_gradients"``).
        groups: With an exact method, neurons that share a number are changed together and share the effect; those below
            0 are left alone and score 0. Default: each neuron on its own.
        batch_size: Prompts in one forward pass; by default as many as memory is kept for.
        progress: Show a bar over what takes longer than two seconds.

    Returns:
        Scores ``[layer, neuron]``, in float64: ``score`` by the method, ``nmd`` and ``rho`` always; ``p``, ``p_family``
        and ``q`` are nan where no test was asked for.

    Raises:
        SiteError: The site is unknown, was not recorded, or lies where a prompt's last token does not pass.
        PairsError: The split holds fewer than 8 pairs, or a pair lacks an answer.
        ModelError: The metric cannot be used.
        SettingsError: Fewer than 1,000 permutations, groups of another shape, or what makes no call.
    """
    require_permutations(CALL, n_permutations)
    if isinstance(source, Activations):
        site = pairs if isinstance(pairs, str) and site is None else site
        if isinstance(pairs, PromptPairs) or site is None or method in CAUSAL:
            raise _wrong_call(method, "recorded activations")
        return _of_activations(source, site, method, split, n_permutations, seed)
    if not isinstance(pairs, PromptPairs) or site is None:
        raise _wrong_call(method, "a model")
    if method not in CAUSAL:
        acts = record(source, pairs, [site], batch_size=batch_size, progress=progress)
        return _of_activations(acts, site, method, split, n_permutations, seed)
    index = by_item(pairs, pairs_of(pairs, split, call=CALL))
    scored = pairs.take(index)
    hooks = site_hooks(source, site)
    at_once = batch_size or PROMPTS_AT_ONCE
    answers: Answers = (
        [([0], [0])] * len(scored) if metric else answers_of(source, scored, batch_size=at_once, call=CALL)
    )
    moments, effects = (PairMoments(n_permutations=n, seed=seed) for n in (0, n_permutations))
    ablated = _Ablated(baseline, seed) if method == "ablation" else None
    if ablated and baseline == "mean":
        ablated.mean = _mean(source, scored, site, batch_size)
    how = {"batch_size": 2 * at_once, "call": CALL}
    n_runs = 0
    if method in EXACT:
        first = next(recorded_blocks(source, scored.take(np.array([0])), [site], **how))
        shape = first.sides[site].shape[2:]
        _require_shape(groups, shape)
        n_groups = int(np.prod(shape)) if groups is None else len(np.unique(groups[groups >= 0]))
        n_runs = n_groups * len(scored) * (2 if method == "patching" else 1)
    with progress_bar(n_runs or len(scored), f"{method} of {site}", shown=progress) as bar:
        explainer = Explainer(
            Contrast(source, metric), hooks, at_once, n_steps, groups, bar.update if n_runs else lambda n: None
        )
        shape = ()
        for block in recorded_blocks(source, scored, [site], **how):
            rows = slice(block.first, block.first + block.tokens.shape[1])
            mem, gen = block.sides[site]
            shape = mem.shape[1:]
            some = scored.take(np.arange(rows.start, rows.stop))
            sides = Sides(
                some, answers[rows], *(torch.from_numpy(side.copy()).to(_device(source)) for side in (mem, gen))
            )
            found = _effects(explainer, method, sides, ablated)
            require_finite(CALL, f"effects at {site}", [found, found], some)  # of both prompts of a pair
            moments.add(mem, gen)
            effects.add(found, np.zeros_like(found), some.item)
            bar.update(0 if n_runs else len(some))
    score = effects.nmd.reshape(shape)
    return scores_of(site, moments, shape, count_items(pairs, index), method, score, effects)


class _Ablated:
    """What stands for ablated neurons."""

    def __init__(self, baseline: Baseline, seed: int) -> None:
        self.baseline, self.rng = baseline, np.random.default_rng(seed)
        self.mean: Any = None

    def values(self, sides: Sides) -> torch.Tensor:
        if self.baseline == "zero":
            return torch.zeros_like(sides.memorized)
        if self.baseline == "mean":
            return torch.from_numpy(self.mean).to(sides.memorized).expand_as(sides.memorized)
        return sides.memorized[torch.from_numpy(self._others(sides.pairs.item)).to(sides.memorized.device)]

    def _others(self, items: Int[np.ndarray, " pair"]) -> Int[np.ndarray, " pair"]:
        """For each pair, one of another item, drawn at random among those that are run with it."""
        places = np.arange(len(items))
        others = [places[items != item] for item in items]
        if not all(map(len, others)):
            raise PairsError(
                f"{CALL}(method='ablation', baseline='resample')",
                expected="pairs of at least two items to draw from",
                received="one item",
                fix="Raise batch_size, or use baseline='mean'.",
            )
        return np.array([self.rng.choice(there) for there in others])


def _effects(explainer: Explainer, method: str, sides: Sides, ablated: _Ablated | None) -> Effects:
    if ablated is not None:
        return explainer.ablation(sides, ablated.values(sides))
    found: Callable[[Sides], Effects] = getattr(explainer, method)
    return found(sides)


def _of_activations(
    acts: Activations, site: str, method: Any, split: PairSplit | None, n_permutations: int, seed: int
) -> NeuronScores:
    recorded, item = acts.site(site), acts.pairs.item
    index = by_item(acts.pairs, pairs_of(acts.pairs, split, call=CALL))
    moments = PairMoments(n_permutations=n_permutations, seed=seed)
    for first in range(0, len(index), PAIRS_A_BLOCK):
        rows = index[first : first + PAIRS_A_BLOCK]
        mem, gen = recorded.memorized[rows], recorded.generalized[rows]
        require_finite(CALL, site, [mem, gen], acts.pairs.take(rows))
        moments.add(mem, gen, item[rows])
    shape = recorded.memorized.shape[1:]
    scores = scores_of(site, moments, shape, count_items(acts.pairs, index))
    return (
        scores
        if method == "pearson"
        else replace(scores, method=method, score=observed(method, recorded, index, moments))
    )


def _mean(model: LensModel, pairs: PromptPairs, site: str, batch_size: int | None) -> Float[np.ndarray, "layer neuron"]:
    """Mean activation over both sides."""
    total, shape = 0.0, ()
    for block in recorded_blocks(model, pairs, [site], batch_size=batch_size, call=CALL):
        shape = block.sides[site].shape[2:]
        total = total + block.sides[site].astype(np.float64).sum((0, 1))
    return (np.asarray(total).reshape(shape) / (2 * len(pairs))).astype(np.float32)


def _device(model: LensModel) -> torch.device:
    return next(iter(model.parameters())).device


def _require_shape(groups: Any, shape: tuple[int, ...]) -> None:
    if groups is not None and (groups.shape != shape or (groups < 0).all()):
        raise SettingsError(
            f"{CALL}(groups=...)",
            expected=f"a number for each neuron of the site, {'x'.join(map(str, shape))}, one of them 0 or more",
            received=f"{'x'.join(map(str, groups.shape))}, the largest {groups.max()}",
            fix="Number the neurons, those that are changed together alike.",
        )


def _wrong_call(method: str, given: str) -> SettingsError:
    needed = "attribute(model, pairs, site" if method in CAUSAL or given == "a model" else "attribute(acts, site"
    return SettingsError(
        CALL,
        expected=f"{needed}, method={method!r})",
        received=f"{given}, and other arguments than these",
        fix="Causal methods run the model: give it and its pairs. Recorded activations have pairs of their own.",
    )
