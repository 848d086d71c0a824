"""Score every neuron of a site by one of many methods: what differs, and what makes the difference.

Does not compute a method: see `methods` (on recorded activations) and `causal` (on a model).
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from memgen_lens.analysis.attribution.bootstrap import observed_ci95, require_resamples
from memgen_lens.analysis.attribution.calls import (
    BaselineName,
    Groups,
    how_to_run,
    pairs_and_site,
    require_used,
    site_of_activations,
    source_of,
)
from memgen_lens.analysis.attribution.causal import Baseline
from memgen_lens.analysis.attribution.contrast import Metric
from memgen_lens.analysis.attribution.effects import CALL, explained
from memgen_lens.analysis.attribution.methods import CAUSAL, observed
from memgen_lens.analysis.attribution.moments import PairMoments
from memgen_lens.analysis.attribution.scored import by_item, pairs_of, places_of, require_permutations, scores_of
from memgen_lens.analysis.recording.activations import record
from memgen_lens.analysis.recording.finite import require_finite
from memgen_lens.core import arguments as kinds
from memgen_lens.core.arguments import arguments
from memgen_lens.core.pairs import PairSplit, PromptPairs
from memgen_lens.core.progress import progress_bar
from memgen_lens.core.records import Activations, NeuronScores
from memgen_lens.core.types import LensModel, Method

PAIRS_A_BLOCK = 1024


@arguments(
    source=source_of(CALL),
    pairs=kinds.one(PromptPairs) | kinds.Text | None,
    site=kinds.Text | None,
    method=Method,
    split=kinds.PairSplitName | None,
    n_permutations=kinds.Number0,
    n_resamples=kinds.Number0,
    seed=kinds.Seed,
    metric=kinds.Callback | None,
    baseline=BaselineName | None,
    n_steps=kinds.Count | None,
    groups=Groups | None,
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
    n_resamples: int = 0,
    seed: int = 0,
    metric: Metric | None = None,
    baseline: Baseline | None = None,
    n_steps: int | None = None,
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
    - ``"auroc"``: ``2 * AUROC - 1`` of the activation as a score for the label, in [-1, 1] (Somers' D, 1962; Hanley and
      McNeil 1982 for the AUROC).
    - ``"probe_weights"``: weights of a layer's linear probe (`fit_probes`' own, on all the pairs) on standardized
      activations (Dalvi et al. 2019, arXiv 1812.09355). Departures: L2 alone, no L1; signed weights, not their size.

    Which neurons *make* the difference (a model and pairs), to the contrast of a prompt: the log-probability of its
    memorized answer minus that of the rule's, each summed over its tokens, teacher-forced:

    - ``"attribution_patching"`` (Nanda 2023; Syed et al., arXiv 2310.10348): the contrast's gradient, the mean of both
      prompts', times ``h_mem - h_gen``. One backward pass for all neurons: the linear estimate of ``"patching"``.
    - ``"attribution_patching_ig"`` (after Hanna et al., arXiv 2403.17806): the same with gradients averaged while a
      layer's activation goes straight from one prompt's to the other's, inside either prompt. Departure: activations
      of one layer at the answer position, not input embeddings, as the prompts' lengths may differ.
    - ``"integrated_gradients"`` (Knowledge Neurons, Dai et al., arXiv 2104.08696, eq. 2): the activation on the
      recalled prompt times the mean gradient while its layer is scaled up from zero. Departures: of the contrast, not
      of a probability; Gauss-Legendre points ``u`` at shares ``u^3`` of the way, not a Riemann sum. Over a layer the
      scores sum up to what zeroing all of it loses, as far as the points see it. Measured on small models, the 20
      default points err at ``"post"`` by up to 0.2 % of it with smooth activations, 2 % where a norm stands behind the
      MLP (Gemma) or MLPs behind it are of relu (each that goes on or off on the way is a kink; 600 points: below
      0.1 %), and at residual sites by up to 5 % with smooth activations (100 points: below 0.01 %): a norm hides the
      scale until near zero, where the points therefore stand close together. With relu behind a residual site it is
      0.2 to 35 %, with 600 points up to 1 %.
    - ``"ablation"``: what the contrast of the recalled prompt loses where the neuron is zero, has its mean over all
      prompts (mean ablation; Wang et al., arXiv 2211.00593), or another item's value (resampling ablation; Chan et al.
      2022, causal scrubbing), by ``baseline``. ``"patching"`` (Vig et al. 2020): what it gains in the computed prompt
      with the recalled prompt's value, and loses in the recalled prompt with the computed one's; the mean. Both are
      exact, and run the model once for each neuron.

    Of these, attribution patching alone finds all layers in one backward pass a batch: a path takes one for each layer
    and point (several points at once where there is room), an exact method a forward pass for each neuron.

    ``p`` is a two-sided paired permutation test of whole items. Of observational methods: under the null the labels of
    an item are exchangeable, so the signs of its differences are flipped at random, those of all its pairs together;
    the statistic is the t of the items' sums of differences, the same for all these methods. It asks whether a neuron
    differs, not whether a probe needs it beside the others. Of causal ones: the signs of an item's effects are flipped,
    and the statistic is their t. That is what exchanging an item's two prompts comes to for attribution patching (both)
    and patching, and exchanging which of its two answers is called memorized for integrated gradients and ablation;
    with a ``metric`` of one's own the null is that effects are symmetric about 0. ``p_family`` refers each neuron to
    the largest abs(t) over all neurons (max-T; Westfall and Young 1993), ``q`` is Benjamini-Hochberg over the site.
    The papers test nothing.

    ``ci95`` is a percentile bootstrap of ``score`` (Efron and Tibshirani 1993, sec. 13.3): items are drawn anew with
    replacement, all pairs of one together, and the score is made of the pairs drawn. A causal method's effects are
    found once, what stands for ablated neurons included, and take 8 bytes a neuron and resample. 1,000 resamples of 200
    pairs, 12 layers and 768 neurons take half a second to a second of one core, with ``"auroc"`` five seconds; with
    ``"probe_weights"`` each layer's probe is fitted anew for each, in two minutes.

    Args:
        source: Activations recorded by `record`, or a lens model, left without hooks also after an exception.
        pairs: With a model, its prompt pairs.
        site: TransformerLens short name; with activations it may stand in second place.
        method: One of the above.
        split: Pairs to score on; ``"select"`` keeps ``tune`` and ``test`` untouched. None = all pairs.
        n_permutations: Sign flips, at least 1,000; p-values are at least ``1 / (n_permutations + 1)``. 0 = no test.
        n_resamples: Bootstrap resamples for ``ci95``, at least 100; 1,000 are usual. 0 = no intervals.
        seed: Seed of the sign flips, and of what is resampled.
        metric: With a causal method, in place of the contrast: a function of logits ``[row, d_vocab]`` behind the
            prompts and the rows' items, that gives one number a row; by torch, so that gradients pass.
        baseline: With ``"ablation"``, what stands for a neuron: ``"mean"`` (the default), ``"zero"``, ``"resample"``
            (for which the memorized side's activations are kept).
        n_steps: With ``"attribution_patching_ig"`` and ``"integrated_gradients"``, points of a path; default 20.
        groups: With an exact method, neurons that share a number are changed together and share the effect; those below
            0 are left alone and score 0. Default: each neuron on its own.
        batch_size: Prompts that run together at most, by default 256; fewer where logits would outgrow 512 MB. A causal
            method runs several copies of them at once as far as there is room.
        progress: Show a bar over what takes longer than two seconds.

    Returns:
        Scores ``[layer, neuron]``, in float64: ``score`` by the method, ``nmd`` and ``rho`` always; ``p``, ``p_family``
        and ``q`` are nan where no test was asked for, ``ci95`` is None where no intervals were.

    Raises:
        SiteError: The site is unknown, was not recorded, or lies where a prompt's last token does not pass.
        PairsError: The split holds fewer than 8 pairs, or a pair lacks an answer.
        ModelError: The metric cannot be used.
        SettingsError: Fewer than 1,000 permutations or 100 resamples, groups of another shape, what makes no call, or
            an argument that the method does not use.
    """
    require_permutations(CALL, n_permutations)
    require_resamples(CALL, n_resamples)
    require_used(CALL, method, metric=metric, baseline=baseline, n_steps=n_steps, groups=groups)
    counts = {"split": split, "n_permutations": n_permutations, "n_resamples": n_resamples}
    if isinstance(source, Activations):
        site = site_of_activations(CALL, method, pairs, site)
        return _of_activations(source, site, method, seed=seed, progress=progress, **counts)
    pairs, site = pairs_and_site(CALL, method, pairs, site)
    if method not in CAUSAL:
        acts = record(source, pairs, [site], batch_size=batch_size, progress=progress)
        return _of_activations(acts, site, method, seed=seed, progress=progress, **counts)
    how = how_to_run(metric, baseline, n_steps, groups, batch_size, seed, progress)
    with torch.inference_mode(False):  # where the caller keeps no gradients, ours are
        return explained(source, pairs, [site], method, how, **counts)[site]


def _of_activations(
    acts: Activations,
    site: str,
    method: Any,
    *,
    split: PairSplit | None,
    n_permutations: int,
    n_resamples: int,
    seed: int,
    progress: bool,
) -> NeuronScores:
    recorded = acts.site(site)
    index = by_item(acts.pairs, pairs_of(acts.pairs, split, call=CALL))
    places = places_of(acts.pairs, index)
    moments = PairMoments(n_permutations=n_permutations, seed=seed)
    for first in range(0, len(index), PAIRS_A_BLOCK):
        rows = index[first : first + PAIRS_A_BLOCK]
        mem, gen = recorded.memorized[rows], recorded.generalized[rows]
        require_finite(CALL, site, [mem, gen], acts.pairs.take(rows))
        moments.add(mem, gen, places[first : first + PAIRS_A_BLOCK])
    scores = scores_of(site, moments, recorded.memorized.shape[1:], int(places[-1]) + 1)
    ci95 = None
    if n_resamples:
        n_fits = n_resamples * len(scores.rho) if method == "probe_weights" else 0
        with progress_bar(n_fits, "fitting resampled probes", shown=progress and n_fits > 0, unit="probe") as bar:
            how = {"seed": seed, "fitted": bar.update}
            ci95 = observed_ci95(method, recorded, index, places, moments.constant, n_resamples, **how)
    return replace(scores, method=method, score=observed(method, recorded, index, moments), ci95=ci95)
